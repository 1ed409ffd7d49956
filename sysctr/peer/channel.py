"""A connection to another host: messages, calls that are answered, and streams in between."""

import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sysctr.errors import SysctrError
from sysctr.peer import frame
from sysctr.peer.frame import BROKEN, HEADER, MESSAGE, PIECE, Garbled
from sysctr.peer.stream import Stream
from sysctr.peer.wire import NotTrusted, PeerLost, Wire

if TYPE_CHECKING:
    import ssl

__all__ = ["Channel", "NotTrusted", "PeerLost"]

_SEND_S = 60.0
# Signs of life and a late break of a stream that has ended meanwhile; no honest host sends more.
_MOST_STRAY = 1000


def _nothing(_moved_bytes: int = 0) -> None:
    pass


class Channel:
    """One TLS connection between two hosts, used by one thread at a time.

    `fingerprint` is that of the other side's certificate, empty for one that showed none, and `hello` what
    it has said of itself. Everything raises PeerLost when the connection breaks, and NotTrusted when the
    other side does not take our certificate.
    """

    def __init__(self, sock: "ssl.SSLSocket", fingerprint: str, name: str) -> None:
        self.fingerprint = fingerprint
        self.hello: dict[str, Any] = {}
        self._wire = Wire(sock, name)

    @property
    def name(self) -> str:
        """Return what errors call the other side."""
        return self._wire.name

    @name.setter
    def name(self, name: str) -> None:
        self._wire.name = name

    def __enter__(self) -> "Channel":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; returns when the kernel has it."""
        self._wire.write(frame.encode(message), _SEND_S)

    def receive(
        self, timeout_s: float, limit_bytes: int = frame.MESSAGE_LIMIT_BYTES
    ) -> dict[str, Any]:
        """Return the next message, all of which has to come within the time, and which is no longer."""
        deadline_s = time.monotonic() + timeout_s
        try:
            for _ in range(_MOST_STRAY):
                kind, length = frame.parse_header(
                    self._wire.read(HEADER.size, deadline_s), MESSAGE + PIECE + BROKEN
                )
                if kind == PIECE and length:
                    raise Garbled("it sends what is not expected")
                if length > limit_bytes:
                    raise Garbled(f"it sends {length} bytes at once")
                body = self._wire.read(length, deadline_s)
                if kind == MESSAGE:
                    return frame.decode(body)
            raise Garbled("it sends no message")
        except Garbled as error:
            self.close()
            raise PeerLost(f"cannot talk to {self.name}: {error}") from error

    def call(self, op: str, timeout_s: float = 60, **fields: Any) -> dict[str, Any]:
        """Ask the other side for something and return its answer; the error that it answers is raised."""
        self.send({"op": op, **fields})
        return self.answer(timeout_s)

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """Return what the other side answers to the last question; the error that it answers is raised."""
        message = self.receive(timeout_s)
        if message.keys() == {"error"}:
            raise frame.read_error(message["error"])
        told = message.get("ok")
        if message.keys() != {"ok"} or not isinstance(told, dict):
            self.close()
            raise PeerLost(f"cannot talk to {self.name}: it sends what is no answer")
        return told

    def refuse(self, error: SysctrError) -> None:
        """Answer a question with an error."""
        self.send({"error": error.as_dict()})

    def exchange(
        self,
        read_fd: int,
        write_fd: int,
        *,
        told: Callable[[int], None] = _nothing,
        rate_bytes: int | None = None,
        check: Callable[[], None] = _nothing,
        idle_s: float = 120,
    ) -> tuple[int, int]:
        """Send what `read_fd` gives and write what comes to `write_fd`, until both have ended.

        Returns the bytes sent and received. It takes over both descriptors, which may be one socket, and
        closes them whatever happens. `told` gets the bytes moved since it was called last, several times a
        second, and then `check` is called, as it is before the first: it may raise, and both sides end.
        `rate_bytes` limits what is sent in a second. After silence of `idle_s` seconds the other side is
        lost; while it lives it is not silent, even if it has nothing to send.

        When the local program has ended a SysctrError says so; when the other side breaks the stream off, the
        error that it tells is raised. Messages can go on after both, and after everything else it is closed.
        """
        stream = Stream(
            self._wire, read_fd, write_fd, told=told, check=check, rate_bytes=rate_bytes, idle_s=idle_s
        )
        return stream.run()

    def decline(self, error: SysctrError) -> None:
        """Break a stream off that the other side is about to send, for the reason that it is told."""

        def check() -> None:
            raise error

        read_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        write_fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        with contextlib.suppress(SysctrError):
            self.exchange(read_fd, write_fd, check=check)

    def abort(self) -> None:
        """End the connection from another thread: whoever uses it finds it broken."""
        self._wire.abort()

    def close(self) -> None:
        """End the connection; a second time does nothing."""
        with contextlib.suppress(OSError):
            self._wire.close()
