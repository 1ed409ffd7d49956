"""What this host remembers of the hosts it trusts.

lib/peers/NAME.json    one of them: its certificate, its addresses, and what it may do

A host keeps its `id`, which is the fingerprint that it had when trust was made, through renames and new keys.
"""

import contextlib
import json
import logging
import os
import threading
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from sysctr.config import values
from sysctr.errors import ConfigError, NotFound, SysctrError, UsageError, WrongState
from sysctr.linux import files
from sysctr.paths import Layout
from sysctr.peer import identity

log = logging.getLogger(__name__)

PERMISSIONS = ("may_send", "may_receive", "may_pull", "may_manage")
# The API has these words where a peer's name stands.
RESERVED_NAMES = frozenset({"token", "join", "rotate"})
MOST_ADDRESSES = 16
# JOINING: we asked, and have not yet seen that it trusts us. OFFERED: it asked, and has not yet come.
JOINING, OFFERED = "joining", "offered"
_LIMIT_BYTES = 256 << 10


@dataclass(frozen=True)
class Peer:
    """A host that we trust; times are seconds since 1970, certificates PEM."""

    name: str
    id: str
    certificate: str
    addresses: tuple[str, ...]
    created: float
    last_seen: float = 0.0
    may_send: bool = True  # it may send containers here
    may_receive: bool = True  # containers may be sent to it
    may_pull: bool = True  # it may fetch templates here
    may_manage: bool = False  # it may do here all that root may
    pools: tuple[str, ...] = ()  # where its containers may be kept; empty: in all
    version: str = ""
    state: str = ""
    # It has told that this one will take the place of its certificate.
    next: str = ""
    former: tuple[str, ...] = ()  # fingerprints that it had
    accepts: tuple[str, ...] = ()  # fingerprints of ours that it has said it takes

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of its certificate."""
        return identity.fingerprint_of(self.certificate)

    @property
    def trusted(self) -> tuple[str, ...]:
        """Return the fingerprints that it may have now."""
        return tuple(identity.fingerprint_of(one) for one in (self.certificate, self.next) if one)

    def as_dict(self) -> dict[str, Any]:
        """Return it for the API."""
        shown = ("name", "id", "fingerprint", "addresses", "created", "last_seen", *PERMISSIONS, "pools")
        told = {name: getattr(self, name) for name in (*shown, "version", "state")}
        return {**told, "addresses": list(self.addresses), "pools": list(self.pools)}


class Book:
    """All of them, in memory and on disk. A change is on the disk when its method returns."""

    def __init__(self, where: Layout) -> None:
        self._directory = where.peers
        self._lock = threading.RLock()
        self._peers: dict[str, Peer] = {}

    def load(self) -> None:
        """Read the files; one with a mistake is logged and left alone."""
        found: dict[str, Peer] = {}
        with contextlib.suppress(FileNotFoundError):
            for entry in sorted(os.listdir(self._directory)):
                name, dot, kind = entry.rpartition(".")
                if dot and kind == "json" and not entry.startswith("."):
                    peer = _read(f"{self._directory}/{entry}", name)
                    if peer is not None:
                        found[name] = peer
        with self._lock:
            self._peers = found

    def all(self) -> list[Peer]:
        """Return every one, by name."""
        with self._lock:
            return [self._peers[name] for name in sorted(self._peers)]

    def find(self, ref: str) -> Peer:
        """Return the one of this name, id or fingerprint, also of one that it had; raises NotFound."""
        with self._lock:
            if ref in self._peers:
                return self._peers[ref]
            for peer in self._peers.values():
                if ref in (peer.id, *peer.trusted, *peer.former):
                    return peer
        named = values.shown(ref)[1:-1]
        raise NotFound(f"cannot find peer {named}", "`sysctr peer list` shows what there is")

    def trusting(self, fingerprint: str) -> Peer | None:
        """Return the one whose certificate has this fingerprint now; no former one counts."""
        with self._lock:
            return next((one for one in self._peers.values() if fingerprint in one.trusted), None)

    def by_id(self, id_: str) -> Peer | None:
        """Return the one that has this id, whatever became of its name."""
        with self._lock:
            return next((one for one in self._peers.values() if one.id == id_), None)

    def put(self, peer: Peer) -> Peer:
        """Write one down."""
        with self._lock:
            try:
                os.makedirs(self._directory, 0o700, exist_ok=True)
                told = {name: value for name, value in asdict(peer).items() if name != "name"}
                data = json.dumps({"schema": 1, **told}, indent=1).encode() + b"\n"
                files.write_atomically(self._path(peer.name), data)
            except OSError as error:
                raise SysctrError(
                    f"cannot write down peer {peer.name}: {self._directory}: {error.strerror}"
                ) from error
            self._peers[peer.name] = peer
        return peer

    def change(self, name: str, **changes: Any) -> Peer:
        """Change fields of one that is there; raises NotFound."""
        with self._lock:
            before = self.find(name)
            after = replace(before, **changes)
            return after if after == before else self.put(after)

    def drop(self, name: str) -> None:
        """Forget one."""
        with self._lock:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(name))
                files.sync_directory(self._directory)
            self._peers.pop(name, None)

    def rename(self, name: str, new: str) -> Peer:
        """Give one another name, which must be free."""
        check_name(new)
        with self._lock:
            peer = self.find(name)
            if new == peer.name:
                return peer
            if new in self._peers:
                raise WrongState(f"cannot rename peer {peer.name}: there is a peer {new}")
            os.rename(self._path(peer.name), self._path(new))
            files.sync_directory(self._directory)
            del self._peers[peer.name]
            self._peers[new] = replace(peer, name=new)
            return self._peers[new]

    def free_name(self, wanted: str) -> str:
        """Return the name, or one made of it that no peer has: web, web-2, web-3.

        What a host calls itself may be anything; it is made a name of ours.
        """
        base = plain_name(wanted)
        with self._lock:
            taken = self._peers.keys() | RESERVED_NAMES
            number, name = 1, base
            while name in taken:
                number += 1
                name = f"{base[:58].rstrip('-')}-{number}"
        return name

    def _path(self, name: str) -> str:
        return f"{self._directory}/{name}.json"


def check_name(name: str) -> str:
    """Return a name that a peer can have; raises UsageError."""
    try:
        values.parse_name(name)
    except ConfigError as error:
        raise UsageError(f"cannot name a peer: {error.message.replace('container name', 'name')}") from error
    if name in RESERVED_NAMES:
        raise UsageError(f"cannot name a peer {name}: it is a word of its own", "choose another name")
    return name


def plain_name(wanted: str) -> str:
    """Return the name of a peer that a host's own name suggests.

    >>> plain_name("Node1.Example.org"), plain_name("10"), plain_name("")
    ('node1', 'host-10', 'host')
    """
    letters = "".join(
        letter if letter.isascii() and letter.isalnum() else "-"
        for letter in wanted.partition(".")[0].lower()[:58]
    )
    name = letters.strip("-")
    return f"host-{name}".rstrip("-") if not name or name.isdigit() else name


def _read(path: str, name: str) -> Peer | None:
    try:
        check_name(name)
        data, _ = files.read_bounded(path, _LIMIT_BYTES)
        told = json.loads(data)
        known = {one.name: told[one.name] for one in fields(Peer) if one.name in told and one.name != "name"}
        for field in ("addresses", "pools", "former", "accepts"):
            known[field] = tuple(known.get(field, ()))
            if not all(isinstance(item, str) for item in known[field]):
                raise ValueError(field)
        peer = Peer(name=name, **known)
        if not peer.trusted or not isinstance(peer.id, str):
            raise ValueError("certificate")
        return peer
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SysctrError) as error:
        # A host that cannot be read is not trusted; its file waits for somebody who looks.
        log.error("%s: %s", path, error)
        return None
