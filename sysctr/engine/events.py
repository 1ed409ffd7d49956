"""A bus that tells whoever listens what happened, and never waits for a listener."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

QUEUE_LIMIT = 1000


class Subscription:
    """One listener's queue of events; a listener who lets it fill is dropped, and finds it closed."""

    def __init__(self, bus: "Bus", wake: Callable[[], None] | None, limit: int) -> None:
        self._bus = bus
        self._wake = wake
        self._limit = limit
        self._queue: deque[dict[str, Any]] = deque()
        self._ready = threading.Condition()
        self.closed = False
        self.overflowed = False

    def take(self) -> list[dict[str, Any]]:
        """Return what has come since the last call, without waiting."""
        with self._ready:
            events = list(self._queue)
            self._queue.clear()
        return events

    def get(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """Return the next event, or None at the time-out or when the subscription is closed and empty."""
        with self._ready:
            self._ready.wait_for(lambda: self._queue or self.closed, timeout_s)
            return self._queue.popleft() if self._queue else None

    def close(self) -> None:
        """Stop listening."""
        self._bus.forget(self)
        with self._ready:
            self.closed = True
            self._ready.notify_all()
        if self._wake:
            self._wake()

    def __enter__(self) -> "Subscription":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, event: dict[str, Any]) -> bool:
        """Add an event; False if the queue is full."""
        with self._ready:
            if self.closed:
                return True
            if len(self._queue) >= self._limit:
                self.overflowed = True
                return False
            self._queue.append(event)
            # Whoever was woken takes all there is; waking again for each event would only cost.
            first = len(self._queue) == 1
            self._ready.notify()
        if first and self._wake:
            self._wake()
        return True


class Bus:
    """Events by kind: "task" (task), "container" (container, state, …), "template", "network" and so on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscriptions: tuple[Subscription, ...] = ()

    @property
    def heard(self) -> bool:
        """Whether anybody listens; lets a publisher save the making of an event that nobody wants."""
        return bool(self._subscriptions)

    def publish(self, kind: str, **data: Any) -> None:
        """Tell every listener; never waits, and drops a listener whose queue is full."""
        listeners = self._subscriptions
        if not listeners:
            return
        event = {"kind": kind, "time": round(time.time(), 3), **data}
        for subscription in listeners:
            if not subscription.put(event):
                subscription.close()

    def subscribe(self, wake: Callable[[], None] | None = None, limit: int = QUEUE_LIMIT) -> Subscription:
        """Listen from now on; the publisher's thread calls `wake` when an empty queue gets an event."""
        subscription = Subscription(self, wake, limit)
        with self._lock:
            self._subscriptions = (*self._subscriptions, subscription)
        return subscription

    def forget(self, subscription: Subscription) -> None:
        """Take a listener off the list; closing the subscription does this."""
        with self._lock:
            self._subscriptions = tuple(one for one in self._subscriptions if one is not subscription)
