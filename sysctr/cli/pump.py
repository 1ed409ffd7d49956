"""Moving bytes between the user's descriptors and those of a session, exactly and without deadlock.

Every direction holds at most one buffer and waits only for its own two ends, so a full stdout never stops
stdin. The user's descriptors are shared with the shell and are never made non-blocking; ours are.
"""

import os
import select
import stat
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from sysctr.ticket import Ticket

BUFFER_BYTES = 65536
# After POLLOUT a blocking pipe takes this much without blocking, and not more (pipe(7), PIPE_BUF).
SAFE_WRITE_BYTES = 4096
# A program that has ended may have left children that still write, as `tee` in `> >(tee log)` does. Their
# output is waited for as long as some comes; a service that keeps stdout open must not hold us for ever.
IDLE_GRACE_S = 1.0
# So many interrupts in vain, and the user means us.
PATIENCE = 3
_BROKEN = select.POLLERR | select.POLLNVAL
_READABLE = select.POLLIN | select.POLLHUP | _BROKEN


class Flow:
    """One direction: what is read from one descriptor is written to the other."""

    def __init__(
        self,
        source_fd: int,
        sink_fd: int,
        *,
        inward: bool,
        change: "Callable[[bytes], bytes] | None" = None,
        at_end: bytes = b"",
        shared: bool = False,
    ) -> None:
        self.source_fd = source_fd
        self.sink_fd = sink_fd
        self.inward = inward
        self.pending = b""
        self.ended = False
        self.dead = False
        self._change = change
        self._at_end = at_end
        # A pty or a socket is one descriptor for both directions: neither may close it alone.
        self._shared = shared
        self._all_at_once = inward or _is_file(sink_fd)
        os.set_blocking(sink_fd if inward else source_fd, False)

    @property
    def done(self) -> bool:
        """Whether nothing more will be moved."""
        return self.dead or (self.ended and not self.pending)

    def interests(self) -> "list[tuple[int, int]]":
        """Return the descriptors to poll with their events; 0 only watches for a reader that is gone."""
        if self.done:
            return []
        wanted = [(self.sink_fd, select.POLLOUT if self.pending else 0)]
        if not self.pending and not self.ended:
            wanted.append((self.source_fd, select.POLLIN))
        return wanted

    def advance(self, ready: "dict[int, int]") -> bool:
        """Read or write once where poll allows it; return whether bytes moved."""
        if self.done:
            return False
        if ready.get(self.sink_fd, 0) & _BROKEN:
            self.kill()
            return False
        if self.pending:
            return bool(ready.get(self.sink_fd, 0) & select.POLLOUT) and self._write()
        if ready.get(self.source_fd, 0) & _READABLE:
            return self._read()
        return False

    def _read(self) -> bool:
        try:
            content = os.read(self.source_fd, BUFFER_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            # EIO: the last writer of a pty is gone, or our terminal is; EBADF: started with stdin closed.
            content = b""
        if content:
            self.pending = self._change(content) if self._change else content
        else:
            self.ended = True
            self.pending = self._at_end
            if not self.pending:
                self._close()
        return True

    def _write(self) -> bool:
        piece = self.pending if self._all_at_once else self.pending[:SAFE_WRITE_BYTES]
        try:
            written = os.write(self.sink_fd, piece)
        except BlockingIOError:
            return False
        except OSError:
            self.kill()
            return False
        self.pending = self.pending[written:]
        if not self.pending and self.ended:
            self._close()
        return True

    def kill(self) -> None:
        """Give the direction up; closing our end lets the other side see EOF or SIGPIPE, as without us."""
        if not self.done:
            self.dead = True
            self.pending = b""
            self._close()

    def _close(self) -> None:
        if not self._shared:
            os.close(self.sink_fd if self.inward else self.source_fd)


def _is_file(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False


class Signals:
    """Collect signals in a pipe while the block runs; `fd` is readable when some came."""

    def __init__(self, numbers: "Sequence[int]") -> None:
        self._numbers = numbers
        self._old: list[tuple[int, Any]] = []

    def __enter__(self) -> "Signals":
        import signal

        self.fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._old_wakeup_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for number in self._numbers:
            # With SIG_IGN inherited (nohup) the signal stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._old.append((number, signal.signal(number, lambda *_: None)))
        return self

    def __exit__(self, *_: object) -> None:
        import signal

        for number, handler in self._old:
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup_fd)
        os.close(self.fd)
        os.close(self._write_fd)

    def take(self) -> bytes:
        """Return the numbers of the signals that came, one byte each."""
        try:
            return os.read(self.fd, 256)
        except BlockingIOError:
            return b""


class RawTerminal:
    """Put a terminal into raw mode while the block runs, and back whatever happens."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> "RawTerminal":
        import termios
        import tty

        self._before = termios.tcgetattr(self._fd)
        tty.setraw(self._fd, termios.TCSADRAIN)
        return self

    def __exit__(self, *_: object) -> None:
        import termios

        try:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
        except termios.error:
            # The terminal was closed while we ran.
            pass


def pump(
    ticket: "Ticket",
    flows: "Sequence[Flow]",
    on_message: "Callable[[dict[str, Any] | None], bool]",
    *,
    signals: "Signals | None" = None,
    on_signal: "Callable[[int], bool] | None" = None,
    finished: "Callable[[], bool] | None" = None,
) -> None:
    """Move bytes until the session is over and its output is drained.

    `on_message` gets every message of the ticket's connection (None at its end), `on_signal` every signal;
    either returns whether the session is over. `finished` is asked after every round.
    """
    over = False
    idle_since = 0.0
    while True:
        interests: dict[int, int] = {}
        for flow in flows:
            for fd, events in flow.interests():
                interests[fd] = interests.get(fd, 0) | events
        if not over:
            interests[ticket.fileno()] = select.POLLIN
        if signals is not None:
            interests[signals.fd] = select.POLLIN
        ready = _poll(interests, 50 if over else None)
        moved = False
        for flow in flows:
            moved = flow.advance(ready) or moved
        if finished is not None and finished():
            return
        if signals is not None and on_signal is not None and signals.fd in ready:
            # A list, not any(): every signal is passed on.
            over = max([on_signal(number) for number in signals.take()], default=False) or over
        if not over and ticket.fileno() in ready:
            over = on_message(ticket.receive())
        if over:
            for flow in flows:
                if flow.inward:
                    flow.kill()
            now = time.monotonic()
            if moved or not idle_since or any(flow.pending for flow in flows):
                idle_since = now
            if all(flow.done for flow in flows) or now - idle_since > IDLE_GRACE_S:
                return


def _poll(interests: "dict[int, int]", timeout_ms: "int | None") -> "dict[int, int]":
    poll = select.poll()
    for fd, events in interests.items():
        poll.register(fd, events)
    return dict(poll.poll(timeout_ms))


def window_size(fd: int) -> "tuple[int, int]":
    """Return (rows, columns) of a terminal, or the size of old if it has none."""
    try:
        found = os.get_terminal_size(fd)
    except OSError:
        return 24, 80
    return found.lines or 24, found.columns or 80
