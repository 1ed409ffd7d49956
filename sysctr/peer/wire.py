"""One TLS connection without blocking: what has arrived of it, and how to wait for more.

A TLS socket of Python must not be read and written by two threads at once, so whoever moves data both ways
does so in one loop. What the library has decrypted already no poll shows: it is read until nothing comes.
"""

import contextlib
import select
import socket
import time
from typing import TYPE_CHECKING

from sysctr.errors import Refused, SysctrError

if TYPE_CHECKING:
    import ssl
    from typing import NoReturn

BUFFER_BYTES = 256 << 10
_RECORD_BYTES = 16 << 10
# A connection whose other end is gone is found out within this time: a container may stand still for it.
_SILENT_S = 20
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENT_S // 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _SILENT_S // 4),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENT_S * 1000),
    # A question is one small packet, and its answer waits for it.
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)
# Alerts by which the other side says that it does not take our certificate.
_UNTRUSTED = ("UNKNOWN_CA", "CERTIFICATE_UNKNOWN", "BAD_CERTIFICATE", "CERTIFICATE_REQUIRED", "ACCESS_DENIED")


class PeerLost(SysctrError):
    """The other host cannot be reached, or the connection to it broke; trying again may help."""

    code = "peer-lost"
    http_status = 502


class NotTrusted(Refused):
    """The other host does not know us, or is another one than it should be; trying again does not help."""


def tune(sock: socket.socket) -> None:
    """Set what every TCP connection between hosts has."""
    for level, option, value in _KEEPALIVE:
        # What is no TCP, as in tests, has none of it.
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)


def handshake(sock: "ssl.SSLSocket", deadline_s: float) -> None:
    """Agree with the other side; raises OSError. However slowly it comes along, there is one time for all."""
    import ssl

    sock.setblocking(False)
    poller = select.poll()
    while True:
        try:
            return sock.do_handshake()
        except ssl.SSLWantReadError:
            events = select.POLLIN
        except ssl.SSLWantWriteError:
            events = select.POLLOUT
        poller.register(sock.fileno(), events)
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not poller.poll(left_s * 1000):
            raise TimeoutError("no handshake in time")


class Wire:
    """A TLS socket after its handshake, and the bytes that were read ahead. For one thread at a time."""

    def __init__(self, sock: "ssl.SSLSocket", name: str) -> None:
        import ssl

        sock.setblocking(False)
        self.name = name
        self.view = memoryview(bytearray(BUFFER_BYTES))
        self.start = 0
        self.end = 0
        # What a socket is waited for before reading and writing can go on.
        self.read_wants = select.POLLIN
        self.write_wants = select.POLLOUT
        self._socket = sock
        self._want_read = ssl.SSLWantReadError
        self._want_write = ssl.SSLWantWriteError

    @property
    def held(self) -> int:
        """Return how many bytes have been read ahead."""
        return self.end - self.start

    @property
    def has_room(self) -> bool:
        """Tell whether more can be read ahead."""
        return self.held < BUFFER_BYTES

    def bear_silence(self, bears: bool) -> None:
        """Let the other end take nothing for as long as it likes, or no longer than is usual.

        In a stream it may wait for its disk, which the kernel cannot tell from a cable that is out (tcp(7)).
        """
        with contextlib.suppress(OSError):
            self._socket.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0 if bears else _SILENT_S * 1000
            )

    def fileno(self) -> int:
        """Return the descriptor, to be waited for."""
        fd = self._socket.fileno()
        if fd < 0:
            raise PeerLost(f"cannot talk to {self.name}: the connection is closed")
        return fd

    def read_some(self) -> int:
        """Read ahead what is there now and return how much it was; 0: it has to be waited for."""
        if self.start == self.end:
            self.start = self.end = 0
        elif self.end == BUFFER_BYTES or max(self.held, BUFFER_BYTES - self.end) < _RECORD_BYTES:
            held = self.held
            self.view[:held] = bytes(self.view[self.start : self.end])
            self.start, self.end = 0, held
        try:
            got = self._socket.recv_into(self.view[self.end :])
        except self._want_read:
            self.read_wants = select.POLLIN
            return 0
        except self._want_write:
            self.read_wants = select.POLLOUT
            return 0
        except (OSError, ValueError) as error:
            self.lose(error)
        if got == 0:
            raise PeerLost(f"cannot talk to {self.name}: it has closed the connection")
        self.end += got
        return got

    def write_some(self, data: memoryview) -> int:
        """Write what is taken now; 0: it has to be waited for, and the same data must come then."""
        try:
            return self._socket.send(data)
        except self._want_write:
            self.write_wants = select.POLLOUT
        except self._want_read:
            self.write_wants = select.POLLIN
        except (OSError, ValueError) as error:
            self.lose(error)
        return 0

    def write(self, data: bytes, patience_s: float) -> None:
        """Write all of it; PeerLost when the other side takes nothing for so long."""
        view = memoryview(data)
        while view:
            taken = self.write_some(view)
            if taken:
                view = view[taken:]
            else:
                self._wait(self.write_wants, time.monotonic() + patience_s)

    def read(self, count: int, deadline_s: float) -> bytes:
        """Return the next bytes, as many as asked for; PeerLost when they do not come in time."""
        parts = []
        while count:
            if not self.held:
                self._fill(deadline_s)
            taken = min(count, self.held)
            parts.append(bytes(self.view[self.start : self.start + taken]))
            self.start += taken
            count -= taken
        return b"".join(parts)

    def abort(self) -> None:
        """End the connection from another thread, which may not touch its TLS."""
        with contextlib.suppress(OSError):
            # A TLS socket's own shutdown() would let its owner go on without TLS.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection; the other side learns that this was on purpose."""
        # It does not wait for the other side's good-bye.
        with contextlib.suppress(OSError, ValueError):
            self._socket.unwrap()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def lose(self, error: Exception) -> "NoReturn":
        """Raise what an error of the connection means."""
        reason = str(getattr(error, "reason", None) or "")
        if any(word in reason for word in _UNTRUSTED):
            raise NotTrusted(
                f"cannot talk to {self.name}: it does not trust this host (any more)",
                "`sysctr peer remove` it here, and join again with a new token",
            ) from error
        words = reason.replace("_", " ").lower() or getattr(error, "strerror", None) or str(error)
        raise PeerLost(f"cannot talk to {self.name}: {words[:1].lower()}{words[1:]}") from error

    def _fill(self, deadline_s: float) -> None:
        while not self.read_some():
            self._wait(self.read_wants, deadline_s)

    def _wait(self, events: int, deadline_s: float) -> None:
        left_s = deadline_s - time.monotonic()
        poller = select.poll()
        poller.register(self.fileno(), events)
        if left_s <= 0 or not poller.poll(left_s * 1000):
            raise PeerLost(f"cannot talk to {self.name}: it does not answer in time")
