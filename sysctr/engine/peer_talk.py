"""Talking with other hosts: the greeting on every connection, and the answers to what they ask for."""

import logging
import os
import platform
import threading
import time
from collections.abc import Callable
from typing import Any

from sysctr import __version__
from sysctr.engine.peer_records import Book, Peer
from sysctr.engine.peer_tokens import ADDRESSES, WrongToken
from sysctr.errors import Refused, SysctrError
from sysctr.linux import process
from sysctr.peer import identity
from sysctr.peer.channel import Channel, PeerLost
from sysctr.peer.dial import dial
from sysctr.peer.frame import FIRST_LIMIT_BYTES
from sysctr.peer.identity import Identity
from sysctr.peer.message import Items, Shape, Speakers, Text, Whole, shown

log = logging.getLogger(__name__)

PROTOCOL = 1
CERTIFICATE = Text(identity.CERTIFICATE_LIMIT_BYTES)
REQUEST_S = 30.0
_HELLO_S = 15.0
# A migration may be silent for as long as a container takes to stop.
_IDLE_S = 900.0
_SEEN_S = 60.0
_WRONG_PAUSE_S = 0.25
_MOST_WRONG_PAUSE_S = 3.0
_WRONG_MEMORY_S = 60.0

# What ends in messages and in the log, and is shown to people.
_PLAIN = "[\x20-\x7e]*"
_VERSION = Text(32, pattern=_PLAIN)
_FINGERPRINTS = Items(Text(64, pattern="[0-9a-f]{64}"), 8)
_HELLO = Shape(
    {"op": Text(16), "protocol": Whole(1, 1000), "version": _VERSION, "name": Text(255)},
    {
        "arch": Text(64, _PLAIN), "kernel": Text(128, _PLAIN), "rsync": Text(32, _PLAIN),
        "accepts": _FINGERPRINTS, "next": CERTIFICATE,
    },
)  # fmt: skip
_JOIN = Shape(
    {
        "op": Text(16), "protocol": Whole(1, 1000), "version": _VERSION, "secret": Text(64),
        "name": Text(255), "certificate": CERTIFICATE, "addresses": ADDRESSES,
        "proof": Text(256, pattern="([0-9a-f]{2})*"),
    }
)  # fmt: skip

Handler = Callable[[Peer, dict[str, Any], Channel], "dict[str, Any] | None"]


class Talk:
    """Both ends of the connections of this host."""

    def __init__(
        self, book: Book, directory: str, join: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> None:
        self._book = book
        self._directory = directory
        self._join = join
        self._ops: dict[str, tuple[Shape, Handler]] = {}
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._wrong = 0
        self._wrong_at_s = 0.0
        self._rsync: str | None = None
        # Called when a peer has come while this host waits for its peers to know its next key.
        self.on_rotating: Callable[[], None] = lambda: None
        self.register("peer.ping", Shape({}), lambda _peer, _told, _channel: {})

    def register(self, op: str, shape: Shape, handler: Handler) -> None:
        """Let peers ask for something; `shape` is what their question may have beside its `op`."""
        self._ops[op] = (shape, handler)

    def close(self) -> None:
        """Let whoever waits for something to pass go on."""
        self._closing.set()

    def connect(self, peer: Peer, timeout_s: float) -> Channel:
        """Return a new connection to a peer; raises PeerLost or NotTrusted."""
        own = identity.obtain(self._directory)
        channel = dial(peer.addresses, peer.trusted, own, timeout_s, name=peer.name)
        try:
            # It speaks first: by that we know that it takes our certificate.
            self._meet(peer, channel, channel.receive(_HELLO_S, FIRST_LIMIT_BYTES))
            channel.send(self._hello(self._book.find(peer.id)))
        except BaseException:
            channel.close()
            raise
        return channel

    def following(self) -> Identity | None:
        """Return the pair that is to be the next one of this host."""
        try:
            return identity.read(self._directory, "next.pem")
        except FileNotFoundError:
            return None

    def checked(self, peer: Peer, certificate: str) -> str:
        """Return a certificate that a peer wants to have next, if it can be one."""
        try:
            fingerprint = identity.check(certificate)
        except ValueError as error:
            raise SysctrError(f"cannot take the new key of {peer.name}: {error}") from error
        other = self._book.trusting(fingerprint)
        if other is not None and other.id != peer.id:
            raise Refused(f"cannot take the new key of {peer.name}: it is that of another host")
        return certificate

    def serve(self, channel: Channel) -> None:
        """Answer what the other side of a connection asks for, until it ends."""
        if not channel.fingerprint:
            self._serve_stranger(channel)
            return
        peer = self._book.trusting(channel.fingerprint)
        if peer is None:
            return
        channel.name = peer.name
        channel.send(self._hello(peer))
        try:
            self._meet(peer, channel, channel.receive(_HELLO_S, FIRST_LIMIT_BYTES))
        except PeerLost:
            raise
        except SysctrError as error:
            log.info("peer %s: %s", peer.name, error.message)
            channel.refuse(error)
            return
        if self.following() is not None:
            self.on_rotating()
        while not self._closing.is_set():
            try:
                message = channel.receive(_IDLE_S)
            except PeerLost as error:
                log.debug("%s", error.message)
                return
            # It may have been removed or renamed since; with a new key it is the same host.
            now = self._book.by_id(peer.id)
            if now is None:
                return
            channel.name = now.name
            self._answer(now, message, channel)

    def _hello(self, peer: Peer) -> dict[str, Any]:
        if self._rsync is None:
            self._rsync = _rsync_version()
        following = self.following()
        return {
            "op": "hello", "protocol": PROTOCOL, "version": __version__, "name": os.uname().nodename,
            "arch": platform.machine(), "kernel": platform.release(), "rsync": self._rsync,
            "accepts": list(peer.trusted), "next": following.certificate if following else "",
        }  # fmt: skip

    def _meet(self, peer: Peer, channel: Channel, told: dict[str, Any]) -> None:
        """Take in what a peer says of itself."""
        protocol, there = told.get("protocol"), shown(told.get("version", "?"))
        if isinstance(protocol, int) and protocol > PROTOCOL:
            raise SysctrError(
                f"cannot talk to {peer.name}: it speaks protocol {protocol} (sysctr {there}), "
                f"here is {PROTOCOL} ({__version__})",
                "upgrade sysctr here",
            )
        hello = Speakers(peer.name, there, __version__).read(_HELLO, told, "hello")
        if hello["op"] != "hello":
            raise SysctrError(f"cannot understand {peer.name}: it does not say hello first")
        channel.hello = hello
        self._note(peer, channel.fingerprint, hello)

    def _note(self, peer: Peer, fingerprint: str, hello: dict[str, Any]) -> None:
        changes: dict[str, Any] = {"version": hello["version"], "state": ""}
        following = self.following()
        accepts = tuple(hello.get("accepts", ()))
        if following is not None:
            changes["accepts"] = accepts
        if peer.next and fingerprint == identity.fingerprint_of(peer.next):
            # It has come with the new key, so the old one counts no more.
            former = (*peer.former, peer.fingerprint)[-16:]
            changes |= {"certificate": peer.next, "next": "", "former": former}
        elif hello.get("next"):
            changes["next"] = self.checked(peer, hello["next"])
        now_s = time.time()
        if not 0 <= now_s - peer.last_seen < _SEEN_S:
            changes["last_seen"] = now_s
        self._book.change(peer.id, **changes)

    def _answer(self, peer: Peer, message: dict[str, Any], channel: Channel) -> None:
        op = message.pop("op", None)
        speakers = Speakers(peer.name, str(channel.hello.get("version", "?")), __version__)
        try:
            if not isinstance(op, str) or op not in self._ops:
                raise speakers.unknown(op)
            shape, handler = self._ops[op]
            answer = handler(peer, speakers.read(shape, message, op), channel)
        except PeerLost:
            raise
        except SysctrError as error:
            log.info("peer %s: %s: %s", peer.name, shown(op), error.message)
            channel.refuse(error)
        except Exception:
            log.exception("peer %s: %s", peer.name, shown(op))
            channel.refuse(SysctrError(f"cannot do {shown(op)}: an internal error", "the log there has it"))
        else:
            if answer is not None:
                channel.send({"ok": answer})

    def _serve_stranger(self, channel: Channel) -> None:
        """Serve a host that has shown no certificate: it may join, with a token, and nothing else."""
        message = channel.receive(_HELLO_S, FIRST_LIMIT_BYTES)
        try:
            if message.get("op") != "peer.join":
                raise Refused("cannot do that: this host does not know you", "`sysctr peer join` first")
            protocol, there = message.get("protocol"), shown(message.get("version", "?"))
            if isinstance(protocol, int) and protocol > PROTOCOL:
                raise SysctrError(
                    f"cannot join: sysctr {there} speaks protocol {protocol}, here is {PROTOCOL}",
                    "upgrade sysctr on the host that made the token",
                )
            speakers = Speakers("the joining host", there, __version__)
            answer = self._join(speakers.read(_JOIN, message, "peer.join"))
        except SysctrError as error:
            if isinstance(error, WrongToken):
                self._slow_down(channel)
            log.info("a host at %s: %s", channel.name, error.message)
            channel.refuse(error)
            return
        channel.send({"ok": answer})

    def _slow_down(self, channel: Channel) -> None:
        """Let who guesses wait the longer the more wrong guesses there were lately."""
        with self._lock:
            now_s = time.monotonic()
            self._wrong = self._wrong + 1 if now_s - self._wrong_at_s < _WRONG_MEMORY_S else 1
            self._wrong_at_s, wrong = now_s, self._wrong
        log.warning("a host at %s came with a wrong token (%d lately)", channel.name, wrong)
        self._closing.wait(min(_MOST_WRONG_PAUSE_S, wrong * _WRONG_PAUSE_S))


def _rsync_version() -> str:
    try:
        done = process.run(["rsync", "--version"], timeout_s=10)
    except SysctrError:
        return ""
    words = done.stdout.decode("ascii", "replace").split()
    return words[2][:32] if len(words) > 2 else ""
