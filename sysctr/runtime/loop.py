"""The supervisor's event loop: descriptors and deadlines, one thread, no framework."""

import heapq
import select
import time
from collections.abc import Callable

from sysctr.runtime.begin import log


class Loop:
    """Calls a function for each descriptor that is ready and for each deadline that has passed."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.stopping = False
        # Children that somebody has to reap, and that nothing else is known of: pidfds by pid.
        self.strays: dict[int, int] = {}

    def watch(self, fd: int, handler: Callable[[int], None], *, write: bool = False) -> None:
        """Call handler(events) whenever fd is readable (and writable, where asked)."""
        events = select.EPOLLIN | (select.EPOLLOUT if write else 0)
        if fd in self._handlers:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """Stop watching fd; to be called before it is closed, because its number is used again at once."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def after(self, delay_s: float, function: Callable[[], None]) -> None:
        """Call function once, delay_s from now."""
        self._count += 1
        heapq.heappush(self._timers, (time.monotonic() + delay_s, self._count, function))

    def run(self) -> None:
        """Serve until `stopping` is set."""
        while not self.stopping:
            timeout_s = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else -1
            for fd, events in self._epoll.poll(timeout_s):
                # A handler of this round may have closed this one, and its number may stand for another file.
                handler = self._handlers.get(fd)
                if handler is None or _survives(handler, events):
                    continue
                if self._handlers.get(fd) == handler:
                    self.forget(fd)
            while self._timers and self._timers[0][0] <= time.monotonic():
                _survives(heapq.heappop(self._timers)[2])


def _survives(function: Callable[..., None], *arguments: object) -> bool:
    """Call a handler; one that fails is logged and costs its own conversation, not everybody's supervisor."""
    try:
        function(*arguments)
    except Exception:
        import traceback  # never needed, we hope: 4 ms and 0.5 MB

        log(f"a handler failed:\n{traceback.format_exc()}", 3)
        return False
    return True


class Budget:
    """What one source may cost in a window of time, so that a flood from it leaves the others their share."""

    def __init__(self, amount: int, window_s: float) -> None:
        self._amount = amount
        self._window_s = window_s
        self._left = amount
        self._end = 0.0

    def spend(self, amount: int) -> float:
        """Note a cost; returns for how many seconds the source has to pause now, mostly 0."""
        self._left -= amount
        if self._left > 0:
            return 0.0
        now = time.monotonic()
        pause_s = max(0.0, self._end - now)
        self._left = self._amount
        self._end = now + pause_s + self._window_s
        return pause_s
