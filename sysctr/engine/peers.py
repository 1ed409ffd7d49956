"""Other hosts that this one trusts: how trust is made, kept and ended.

lib/peer/identity.pem   who this host is to them, see sysctr.peer.identity
lib/peers/NAME.json     one of them, see peer_records
lib/peer/tokens.json    what makes two hosts trust each other, see peer_tokens
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sysctr import __version__
from sysctr.engine import peer_records as records
from sysctr.engine.host import Host
from sysctr.engine.peer_listener import Listener
from sysctr.engine.peer_records import JOINING, OFFERED, Book, Peer, check_name
from sysctr.engine.peer_talk import CERTIFICATE, PROTOCOL, REQUEST_S, Handler, Talk
from sysctr.engine.peer_tokens import Token, Tokens, as_told, check_expiry, decode, encode, with_port
from sysctr.errors import NotFound, Refused, SysctrError, UsageError, WrongState
from sysctr.linux import fault
from sysctr.peer import identity
from sysctr.peer.channel import Channel, NotTrusted, PeerLost
from sysctr.peer.dial import DEFAULT_PORT, dial
from sysctr.peer.message import Shape, Speakers, Text, shown

log = logging.getLogger(__name__)

_OFFER_S = 120.0
_UPKEEP_S = 20.0
# While another program has its port.
_LISTEN_AGAIN_S = 2.0
_QUICK_S = 5.0
_JOIN_CONTEXT = b"sysctr-join-1"
_JOINED = Shape({"name": Text(255), "certificate": CERTIFICATE, "version": Text(32)})


class Peers:
    """All peers of this host; every method may be called from any thread."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._directory = host.where.peer
        self._book = Book(host.where)
        self._tokens = Tokens(host.where)
        self._talk = Talk(self._book, self._directory, self._on_join)
        self._talk.on_rotating = self._kick
        self._listener = Listener(host, self._expects_somebody, self._certificates, self._talk.serve)
        # Each is asked before trust ends, and raises where that would hurt: a migration is under way.
        self.guards: list[Callable[[Peer], None]] = []
        # Each is told before that of a peer which is removed by force, and may not send anything any more.
        self.on_forced: list[Callable[[Peer], None]] = []
        # Called with a peer whose permissions have changed.
        self.on_restricted: list[Callable[[Peer], None]] = []
        self._lock = threading.RLock()
        self._rotating = threading.Lock()
        self._closing = threading.Event()
        self._wanted = threading.Event()
        self._upkeep: threading.Thread | None = None
        # What a join that is under way has written down; of others a daemon that died has left it.
        self._joining: set[str] = set()
        self.register("peer.rotate", Shape({"certificate": CERTIFICATE}), self._on_rotate)
        self.register("peer.remove", Shape({}), self._on_remove)

    def open(self) -> None:
        """Learn who is trusted, and listen if there is anybody."""
        self._book.load()
        self._tokens.load()
        self._listener.adjust()
        if self._something_to_do():
            self._kick()

    def close(self) -> None:
        """Listen no more and end all connections that others made."""
        self._closing.set()
        self._wanted.set()
        self._talk.close()
        self._listener.close()
        with self._lock:
            upkeep = self._upkeep
        if upkeep is not None:
            upkeep.join(_QUICK_S)

    def reload(self) -> None:
        """Follow the host's settings."""
        self._listener.adjust()

    def register(self, op: str, shape: Shape, handler: Handler) -> None:
        """Let peers ask for something; `shape` is what their question may have beside its `op`.

        What the handler returns is the answer, None if it has answered itself; a SysctrError is one as well.
        It runs in the thread of the connection, which it may use for streams and further questions.
        """
        self._talk.register(op, shape, handler)

    # Looking

    def list(self) -> "list[dict[str, Any]]":
        """Return every peer."""
        return [peer.as_dict() for peer in self._book.all() if peer.state != OFFERED]

    def status(self) -> dict[str, Any]:
        """Return who this host is to others, where it listens, and why it does not."""
        try:
            fingerprint = identity.read(self._directory).fingerprint
        except FileNotFoundError:
            fingerprint = ""
        return {
            "fingerprint": fingerprint, "listen": self._listener.address, "problem": self._listener.problem
        }  # fmt: skip

    def checks(self) -> "list[dict[str, Any]]":
        """Return what `doctor` says of peers; nothing on a host that has none and expects none."""
        problem = self._listener.problem
        if not problem and not self._listener.address:
            return []
        waiting = [one.name for one in self._book.all()] if self._talk.following() else []
        return [
            {
                "check": "peers", "ok": not problem, "state": "fail" if problem else "ok",
                "detail": problem or f"listening at {self._listener.address}"
                + (f"; a new key holds when {', '.join(waiting)} were told" if waiting else ""),
                "hint": "see [peer] listen in host.toml" if problem else "",
            }
        ]  # fmt: skip

    def show(self, ref: str) -> dict[str, Any]:
        """Return a peer, and whether it can be reached now."""
        peer = self.get(ref)
        try:
            with self.connect(peer.id) as channel:
                channel.call("peer.ping", REQUEST_S)
                told = {name: channel.hello.get(name, "") for name in ("arch", "kernel", "rsync")}
        except SysctrError as error:
            return {**self.get(peer.id).as_dict(), "reachable": False, "error": error.message}
        return {**self.get(peer.id).as_dict(), "reachable": True, "error": "", **told}

    def get(self, ref: str) -> Peer:
        """Return a peer by name, id or fingerprint, also a fingerprint that it had; raises NotFound."""
        peer = self._book.find(ref)
        if peer.state == OFFERED:
            raise NotFound(f"cannot find peer {shown(ref)}", "`sysctr peer list` shows what there is")
        return peer

    def connect(self, ref: str, timeout_s: float = 20.0) -> Channel:
        """Return a new connection to a peer, the `hello` of which says what that is.

        Raises NotFound, PeerLost where it cannot be reached, NotTrusted where it does not know us any more.
        """
        return self._talk.connect(self._book.find(ref), timeout_s)

    # Trust

    def token(
        self, *, expires_s: float = 3600, addresses: Sequence[str] = (), listen: str = ""
    ) -> dict[str, Any]:
        """Return a new token; whoever has it can join once, until it expires."""
        check_expiry(expires_s)
        if listen:
            self._listener.choose(listen)
        self._listener.refuse_if_off("make a token")
        own = identity.obtain(self._directory)
        where = self._listener.addresses(addresses)
        if not where:
            raise SysctrError(
                "cannot make a token: this host has no address that others could reach",
                "say where it can be reached with --address HOST:PORT",
            )
        expires = time.time() + expires_s
        secret = self._tokens.make(expires)
        self._listener.adjust()
        if self._listener.problem:
            raise SysctrError(f"cannot make a token: {self._listener.problem}", "see [peer] in host.toml")
        self._kick()
        made = Token(os.uname().nodename, where, own.fingerprint, secret, expires)
        return as_told(made, encode(made))

    def join(self, token: str, *, name: str = "", addresses: Sequence[str] = ()) -> dict[str, Any]:
        """Make this host and the one that made the token trust each other; both do afterwards, or neither."""
        told = decode(token)
        own = identity.obtain(self._directory)
        if told.fingerprint == own.fingerprint:
            raise UsageError("cannot join: this host made the token", "use it on another host")
        before = self._book.trusting(told.fingerprint)
        if name:
            check_name(name)
            if any(one.name == name and one != before for one in self._book.all()):
                raise WrongState(f"cannot join: there is a peer {name}", "choose another name")
        where = self._listener.addresses(addresses)
        issuer = shown(told.name)
        with dial(told.addresses, told.fingerprint, None, name=issuer) as channel:
            proof = own.sign(_proof(told.secret, own.fingerprint, told.fingerprint))
            answer = channel.call(
                "peer.join", REQUEST_S, protocol=PROTOCOL, version=__version__, secret=told.secret,
                name=os.uname().nodename, certificate=own.certificate, addresses=list(where),
                proof=proof.hex(),
            )  # fmt: skip
        speakers = Speakers(issuer, shown(answer.get("version", "?")), __version__)
        answer = speakers.read(_JOINED, answer, "the answer")
        try:
            if identity.check(answer["certificate"]) != told.fingerprint:
                raise ValueError("it is another one than the token says")
        except ValueError as error:
            raise NotTrusted(f"cannot join {issuer}: its certificate: {error}") from error
        self._joining.add(told.fingerprint)
        try:
            peer = self._admit(answer["certificate"], name or answer["name"], told.addresses, JOINING)
            fault.point("peer.joining")
            self._listener.adjust()
            try:
                with self.connect(peer.id) as channel:
                    channel.call("peer.ping", REQUEST_S)
            except SysctrError as error:
                if before is None:
                    self._forget(peer)
                raise type(error)(f"cannot join {issuer}: {error.message}", error.hint) from error
        finally:
            self._joining.discard(told.fingerprint)
        if name and peer.name != name:
            self._book.rename(peer.name, name)
        log.info("peer %s: joined", self.get(peer.id).name)
        return self.get(peer.id).as_dict()

    def rename(self, ref: str, new: str) -> dict[str, Any]:
        """Give a peer another name; it does not learn of it."""
        return self._book.rename(self.get(ref).name, new).as_dict()

    def restrict(self, ref: str, **permissions: Any) -> dict[str, Any]:
        """Change what a peer may do (PERMISSIONS of peer_records, and pools), or its addresses."""
        peer = self.get(ref)
        changes = {name: value for name, value in permissions.items() if value is not None}
        for name in changes.keys() - {*records.PERMISSIONS, "pools", "addresses"}:
            raise UsageError(f"cannot restrict {peer.name}: there is no permission {shown(name)}")
        if "pools" in changes:
            changes["pools"] = tuple(dict.fromkeys(changes["pools"]))
            for pool in changes["pools"]:
                if pool not in self._host.pools.names():
                    raise NotFound(f"cannot restrict {peer.name}: there is no pool {shown(pool)}")
        if "addresses" in changes:
            changes["addresses"] = with_port(changes["addresses"], DEFAULT_PORT)[: records.MOST_ADDRESSES]
        changed = self._book.change(peer.name, **changes)
        self._limited(changed)
        return changed.as_dict()

    def remove(self, ref: str, *, force: bool = False) -> None:
        """End trust on both sides; with `force` here alone, where the other side cannot be reached."""
        peer = self.get(ref)
        if force:
            self._limited(self._book.change(peer.id, may_send=False, may_manage=False))
            self._listener.turn_out(peer.trusted)
            for give_up in self.on_forced:
                give_up(peer)
        self._may_end(peer)
        try:
            with self.connect(peer.id) as channel:
                channel.call("peer.remove", REQUEST_S)
        except NotTrusted:
            log.info("peer %s: had ended the trust before", peer.name)
        except SysctrError as error:
            # With force, what it answers does not count: it may be the reason why it is removed.
            if not force and not isinstance(error, PeerLost):
                raise
            if not force:
                raise PeerLost(
                    f"cannot remove peer {peer.name}: {error.message}",
                    "with --force it is removed here, and has to be removed there by hand",
                ) from error
        self._forget(peer)
        log.info("peer %s: removed", peer.name)

    def rotate(self) -> dict[str, Any]:
        """Get a new key. Peers are told over the old trust, and the old key counts until all of them are."""
        identity.obtain(self._directory)
        # What was given out names the certificate that is about to go.
        self._tokens.drop()
        with self._rotating:
            following = self._talk.following() or identity.make(self._directory, "next.pem")
        log.info("this host will have a new key: %s", following.fingerprint)
        waiting = self._tell_next()
        self._listener.adjust()
        self._kick()
        now = identity.read(self._directory).fingerprint
        return {"fingerprint": now, "next": following.fingerprint if waiting else "", "waits_for": waiting}

    # Being asked

    def _on_join(self, told: dict[str, Any]) -> dict[str, Any]:
        # First of all: of who does not have the secret nothing else is looked at.
        self._tokens.consume(told["secret"])
        own = identity.obtain(self._directory)
        try:
            fingerprint = identity.check(told["certificate"])
            proof = _proof(told["secret"], fingerprint, own.fingerprint)
            if not identity.verify(told["certificate"], bytes.fromhex(told["proof"]), proof):
                raise ValueError("it does not have the key of its certificate")
        except ValueError as error:
            raise Refused(f"cannot join: {error}", "make a new token and try again") from error
        if fingerprint == own.fingerprint:
            raise Refused("cannot join: this host made the token", "use it on another host")
        where = with_port(told["addresses"], DEFAULT_PORT)
        fault.point("peer.consumed")
        peer = self._admit(told["certificate"], told["name"], where, OFFERED)
        fault.point("peer.offered")
        self._kick()
        log.info("peer %s: joins with a token", peer.name)
        return {"name": os.uname().nodename, "certificate": own.certificate, "version": __version__}

    def _admit(self, certificate: str, name: str, addresses: tuple[str, ...], state: str) -> Peer:
        """Write a host down that is to be trusted; one that is trusted already keeps its name and limits."""
        fingerprint = identity.fingerprint_of(certificate)
        with self._lock:
            before = self._book.trusting(fingerprint)
            if before is not None:
                created = time.time() if before.state == OFFERED else before.created
                return self._book.change(before.id, addresses=addresses, accepts=(), created=created)
            free = self._book.free_name(name)
            return self._book.put(Peer(free, fingerprint, certificate, addresses, time.time(), state=state))

    def _on_rotate(self, peer: Peer, told: dict[str, Any], _channel: Channel) -> dict[str, Any]:
        self._book.change(peer.id, next=self._talk.checked(peer, told["certificate"]))
        log.info("peer %s: will have a new key", peer.name)
        return {}

    def _on_remove(self, peer: Peer, _told: dict[str, Any], channel: Channel) -> None:
        self._may_end(peer)
        self._book.drop(peer.name)
        log.info("peer %s: has ended the trust", peer.name)
        channel.send({"ok": {}})
        self._forget(peer)

    def _may_end(self, peer: Peer) -> None:
        for guard in self.guards:
            guard(peer)

    def _forget(self, peer: Peer) -> None:
        now = self._book.by_id(peer.id)
        if now is not None:
            self._book.drop(now.name)
        # By its id too: what it has open may be older than the key that it has now.
        self._limited(replace(peer, may_manage=False))
        self._listener.turn_out((*peer.trusted, *peer.former))
        # Not here: to listen no more may mean to wait for the very thread that we are in.
        self._kick()

    def _limited(self, peer: Peer) -> None:
        for tell in self.on_restricted:
            tell(peer)

    def _certificates(self) -> "list[str]":
        return [one for peer in self._book.all() for one in (peer.certificate, peer.next) if one]

    # Upkeep

    def _expects_somebody(self) -> bool:
        return bool(self._book.all()) or self._tokens.next_expiry() is not None

    def _something_to_do(self) -> bool:
        return (
            any(peer.state for peer in self._book.all())
            or self._talk.following() is not None
            or self._tokens.next_expiry() is not None
            # An address may come up later than the daemon.
            or bool(self._listener.problem)
        )

    def _kick(self) -> None:
        """Have done soon what need not be done now."""
        with self._lock:
            self._wanted.set()
            if self._closing.is_set() or self._upkeep is not None:
                return
            self._upkeep = threading.Thread(target=self._work, name="peer upkeep", daemon=True)
            self._upkeep.start()

    def _work(self) -> None:
        due_s = 0.0
        while True:
            # Until the last token expires: nobody is listened to after that.
            left_s = (self._tokens.next_expiry() or time.time() + _UPKEEP_S) - time.time()
            most_s = _LISTEN_AGAIN_S if self._listener.problem else _UPKEEP_S
            asked = self._wanted.wait(min(most_s, max(0.1, left_s)))
            self._wanted.clear()
            if self._closing.is_set():
                return
            # A port is tried for more often than peers are.
            if asked or time.monotonic() >= due_s:
                due_s = time.monotonic() + _UPKEEP_S
                self._keep_up()
            self._listener.adjust()
            with self._lock:
                if not self._wanted.is_set() and not self._something_to_do():
                    self._upkeep = None
                    return

    def _keep_up(self) -> None:
        try:
            self._settle_joins()
            self._tell_next()
        except SysctrError as error:
            log.warning("%s", error.message)
        except Exception:
            log.exception("the upkeep of peers")

    def _settle_joins(self) -> None:
        """Finish or undo what was cut off between two hosts that were about to trust each other."""
        for peer in self._book.all():
            if peer.state == OFFERED and not 0 <= time.time() - peer.created < _OFFER_S:
                log.info("peer %s: did not come after it joined", peer.name)
                self._forget(peer)
            elif peer.state == JOINING and peer.id not in self._joining:
                try:
                    with self.connect(peer.id, _QUICK_S) as channel:
                        channel.call("peer.ping", REQUEST_S)
                except NotTrusted:
                    self._forget(peer)
                except SysctrError as error:
                    log.info("peer %s: %s", peer.name, error.message)

    def _tell_next(self) -> "list[str]":
        """Tell peers of the next key and go over to it when all know; return who does not yet."""
        with self._rotating:
            following = self._talk.following()
            if following is None:
                return []
            for peer in self._book.all():
                if following.fingerprint not in peer.accepts and not self._closing.is_set():
                    self._tell(peer, following)
            with self._lock:
                waiting = [one.name for one in self._book.all() if following.fingerprint not in one.accepts]
                if waiting:
                    return waiting
                identity.succeed(self._directory)
        log.info("the new key of this host holds: %s", following.fingerprint)
        # Whoever sees it drops the old one.
        for peer in self._book.all():
            try:
                with self.connect(peer.id, _QUICK_S) as channel:
                    channel.call("peer.ping", REQUEST_S)
            except SysctrError as error:
                log.info("peer %s: %s", peer.name, error.message)
        return []

    def _tell(self, peer: Peer, following: identity.Identity) -> None:
        try:
            with self.connect(peer.id, _QUICK_S) as channel:
                channel.call("peer.rotate", REQUEST_S, certificate=following.certificate)
            self._book.change(peer.id, accepts=(following.fingerprint,))
        except SysctrError as error:
            log.info("peer %s: does not know the new key yet: %s", peer.name, error.message)


def _proof(secret: str, joiner: str, issuer: str) -> bytes:
    return b"\0".join((_JOIN_CONTEXT, secret.encode(), joiner.encode(), issuer.encode()))
