"""A stream in both directions between two local descriptors and the other host: one loop, no thread.

Each direction ends with a frame of its own. A side that cannot go on breaks both off, says why, and then
throws away what still comes until the other side has noticed: the connection is in step after that.
"""

import contextlib
import os
import select
import socket
import stat
import time
from collections.abc import Callable

from sysctr.errors import SysctrError
from sysctr.peer import frame
from sysctr.peer.frame import BROKEN, END, HEADER, PIECE, Garbled
from sysctr.peer.wire import BUFFER_BYTES, PeerLost, Wire

_TELL_S = 0.2
_SETTLE_S = 10.0
_SIGN_OF_LIFE_S = 10.0
_PIPE_BYTES = 1 << 20
_F_SETPIPE_SZ = 1031
# With its header a full piece is a whole number of TLS records.
_PIECE_BYTES = BUFFER_BYTES - HEADER.size
_FREE = 0.0


class _LocalEnd(Exception):
    """The program on this side of the stream is gone, or cannot be read."""


class Stream:
    """One exchange. It takes over both descriptors and closes each as its direction ends."""

    def __init__(
        self,
        wire: Wire,
        read_fd: int,
        write_fd: int,
        *,
        told: Callable[[int], None],
        check: Callable[[], None],
        rate_bytes: int | None,
        idle_s: float,
    ) -> None:
        self._wire = wire
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._told = told
        self._check = check
        self._rate_bytes = rate_bytes
        self._idle_s = idle_s
        self.sent_bytes = 0
        self.received_bytes = 0
        self._out = memoryview(bytearray(BUFFER_BYTES))
        # What is being sent: the library must be given the same data until it has taken all of it.
        self._pending: memoryview | None = None
        self._queue: list[bytes] = []
        self._left = 0  # of the piece that is being received
        self._sent_end = self._got_end = False
        self._discards = False
        # What can be done without waiting, as far as is known.
        self._can = {"read": True, "write": True, "local read": True, "local write": True}
        self._poller = select.poll()
        self._polled: dict[int, int] = {}
        self._untold = 0
        self._free_at = _FREE
        self._tell_at = self._sent_at = self._heard_at = 0.0

    def run(self) -> tuple[int, int]:
        """Move everything until both directions have ended; return the bytes sent and received."""
        self._wire.bear_silence(True)
        try:
            for fd in {self._read_fd, self._write_fd}:
                _prepare(fd)
            self._tell_at = self._sent_at = self._heard_at = time.monotonic()
            try:
                # A stream of nothing has ended before the first look.
                self._check()
                self._loop(None)
            except PeerLost:
                raise
            except Garbled as error:
                raise PeerLost(f"cannot talk to {self._wire.name}: {error}") from error
            except _LocalEnd as error:
                told = SysctrError(f"cannot move data: {error}")
                self._break_off(told)
                raise told from error
            except BaseException as error:
                self._break_off(error)
                raise
        except (PeerLost, Garbled):
            self._wire.close()
            raise
        finally:
            self._wire.bear_silence(False)
            self._close_reading()
            self._close_writing()
            if self._untold:
                self._told(self._untold)
        return self.sent_bytes, self.received_bytes

    @property
    def _over(self) -> bool:
        return self._sent_end and self._got_end and self._pending is None and not self._queue

    def _loop(self, deadline_s: float | None) -> None:
        while not self._over:
            self._receive()
            self._deliver()
            self._send()
            now_s = time.monotonic()
            self._keep_alive(now_s)
            if deadline_s is None and now_s >= self._tell_at:
                self._tell_at = now_s + _TELL_S
                moved, self._untold = self._untold, 0
                if moved:
                    self._told(moved)
                self._check()
            if deadline_s is not None and now_s > deadline_s:
                raise PeerLost(f"cannot talk to {self._wire.name}: it does not end a stream that broke")
            self._wait(now_s)

    # From the other side

    def _receive(self) -> None:
        wire = self._wire
        while self._can["read"] and wire.has_room:
            if not wire.read_some():
                self._can["read"] = False
            else:
                self._heard_at = time.monotonic()

    def _deliver(self) -> None:
        """Pass on what has been read ahead, as far as the local program takes it."""
        wire = self._wire
        while wire.held:
            if self._left:
                count = min(self._left, wire.held)
                if not self._discards:
                    count = self._write_local(wire.view[wire.start : wire.start + count])
                    if not count:
                        return
                    self.received_bytes += count
                    self._untold += count
                wire.start += count
                self._left -= count
            elif not self._take_header():
                return

    def _take_header(self) -> bool:
        """Take the next frame's header, and all of a frame that is no piece; False if more has to come."""
        wire = self._wire
        if (self._sent_end and self._got_end) or wire.held < HEADER.size:
            return False
        body = wire.start + HEADER.size
        # Who has ended its direction may still break the other one off, and shows that it lives.
        kind, length = frame.parse_header(wire.view[wire.start : body], PIECE + END + BROKEN)
        if kind == PIECE:
            if length and self._got_end:
                raise Garbled("it goes on after the end")
            self._left = length
        elif kind == END:
            if self._got_end:
                raise Garbled("it ends twice")
            self._got_end = True
            self._close_writing()
        else:
            if wire.end - body < length:
                return False
            error = frame.decode_error(bytes(wire.view[body : body + length]))
            wire.start = body + length
            self._got_end = True
            if self._discards:
                return True
            raise error
        wire.start = body
        return True

    def _write_local(self, data: memoryview) -> int:
        if not self._can["local write"]:
            return 0
        try:
            return os.write(self._write_fd, data)
        except BlockingIOError:
            self._can["local write"] = False
            return 0
        except OSError as error:
            raise _LocalEnd(f"the program that takes it has ended ({error.strerror})") from error

    # To the other side

    def _send(self) -> None:
        if self._pending is None:
            self._pending = self._next()
        while self._pending is not None and self._can["write"]:
            taken = self._wire.write_some(self._pending)
            if not taken:
                self._can["write"] = False
                return
            self._pending = self._pending[taken:] or None
            if self._pending is None:
                self._sent_at = time.monotonic()
                return

    def _next(self) -> memoryview | None:
        """Return the next frame, if there is something to send."""
        if self._queue:
            return memoryview(self._queue.pop(0))
        if self._sent_end or self._discards or not self._can["local read"]:
            return None
        most = _PIECE_BYTES
        if self._rate_bytes:
            if time.monotonic() < self._free_at:
                return None
            most = max(4096, min(most, self._rate_bytes // 20))
        try:
            count = os.readv(self._read_fd, [self._out[HEADER.size : HEADER.size + most]])
        except BlockingIOError:
            self._can["local read"] = False
            return None
        except OSError as error:
            raise _LocalEnd(f"the program that gives it has ended ({error.strerror})") from error
        if count == 0:
            self._sent_end = True
            self._close_reading()
            return memoryview(frame.pack(END))
        if self._rate_bytes:
            self._free_at = max(self._free_at, time.monotonic() - 0.1) + count / self._rate_bytes
        HEADER.pack_into(self._out, 0, PIECE, count)
        self.sent_bytes += count
        self._untold += count
        return self._out[: HEADER.size + count]

    def _keep_alive(self, now_s: float) -> None:
        # While the local program keeps us from reading, silence says nothing of the other side.
        if self._left and not self._can["local write"] and not self._wire.has_room:
            self._heard_at = now_s
        if now_s - self._heard_at > self._idle_s:
            raise PeerLost(f"cannot talk to {self._wire.name}: nothing came for {self._idle_s:g} s")
        if self._pending is None and now_s - self._sent_at > min(_SIGN_OF_LIFE_S, self._idle_s / 4):
            self._pending = memoryview(frame.pack(PIECE))

    # Waiting

    def _wait(self, now_s: float) -> None:
        """Sleep until one of the things can be done that could not."""
        wanted: dict[int, int] = {}
        wire_fd, timeout_s = self._wire.fileno(), _TELL_S
        if self._over or (self._queue and self._pending is None):
            return
        if self._pending is not None:
            if self._can["write"]:
                return
            wanted[wire_fd] = self._wire.write_wants
        elif not (self._sent_end or self._discards):
            if self._free_at > now_s:
                timeout_s = min(timeout_s, self._free_at - now_s)
            elif self._can["local read"]:
                return
            else:
                wanted[self._read_fd] = select.POLLIN
        if self._left and not self._discards and self._wire.held:
            if self._can["local write"]:
                return
            wanted[self._write_fd] = wanted.get(self._write_fd, 0) | select.POLLOUT
        if self._wire.has_room and not (self._sent_end and self._got_end):
            if self._can["read"]:
                return
            wanted[wire_fd] = wanted.get(wire_fd, 0) | self._wire.read_wants
        for fd in self._polled.keys() - wanted.keys():
            self._poller.unregister(fd)
        for fd, events in wanted.items():
            if self._polled.get(fd) != events:
                self._poller.register(fd, events)
        self._polled = wanted
        for fd, _events in self._poller.poll(timeout_s * 1000):
            if fd == wire_fd:
                self._can["read"] = self._can["write"] = True
            if fd == self._read_fd:
                self._can["local read"] = True
            if fd == self._write_fd:
                self._can["local write"] = True

    # Ending

    def _break_off(self, error: BaseException) -> None:
        """Tell the other side, unless it knows, and get the connection in step again; else it is closed."""
        try:
            self._discards = True
            self._close_reading()
            self._close_writing()
            if not (self._sent_end and self._got_end):
                # After our own end too: the other side would else go on sending what nobody takes.
                self._queue.append(frame.encode_error(error))
                self._sent_end = True
            self._heard_at = time.monotonic()
            self._loop(time.monotonic() + _SETTLE_S)
        except (SysctrError, Garbled):
            self._wire.close()

    def _close_reading(self) -> None:
        fd, self._read_fd = self._read_fd, -1
        self._forget(fd)
        if fd >= 0 and fd != self._write_fd:
            os.close(fd)

    def _close_writing(self) -> None:
        fd, self._write_fd = self._write_fd, -1
        self._forget(fd)
        if fd < 0:
            return
        _end_writing(fd)
        if fd != self._read_fd:
            os.close(fd)

    def _forget(self, fd: int) -> None:
        if fd >= 0 and self._polled.pop(fd, None) is not None:
            self._poller.unregister(fd)


def _prepare(fd: int) -> None:
    os.set_blocking(fd, False)
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        # A pipe has 64 KiB, so whoever fills it would wait for us more often than for its disk.
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, _F_SETPIPE_SZ, _PIPE_BYTES)


def _end_writing(fd: int) -> None:
    """Let the reader of a socket see the end also where another descriptor of it stays open."""
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        sock = socket.socket(fileno=os.dup(fd))
        with sock, contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
