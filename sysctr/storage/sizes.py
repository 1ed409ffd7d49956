"""What volumes take on the disk: told from memory; measured at once where that is quick, else meanwhile."""

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable

from sysctr.errors import SysctrError

log = logging.getLogger(__name__)

_MEASURE_AGAIN_S = 60.0
# A volume that took no longer is measured for whoever asks; `df` of 200 containers must not take long.
_QUICK_S = 0.02
_QUICK_AGAIN_S = 2.0


class Sizes:
    """The sizes of a driver's volumes; `measure` walks one, however long it takes."""

    def __init__(self, measure: Callable[[str], int]) -> None:
        self._walk = measure
        # When it was measured, the bytes, and how long that took.
        self._known: dict[str, tuple[float, int, float]] = {}
        self._wanted: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._measuring: set[str] = set()
        self._lock = threading.Lock()

    def usage(self, volume: str) -> int | None:
        """Return the bytes as last measured; None before the first time."""
        with self._lock:
            measured_at, size_bytes, took_s = self._known.get(volume, (-math.inf, -1, math.inf))
            age_s = time.monotonic() - measured_at
            quick = took_s <= _QUICK_S
            if not quick and age_s > _MEASURE_AGAIN_S:
                self._measure_later(volume)
        if quick and age_s > _QUICK_AGAIN_S:
            with contextlib.suppress(SysctrError, OSError):
                return self.measure(volume)
        return size_bytes if size_bytes >= 0 else None

    def measure(self, volume: str) -> int:
        """Measure now, however long it takes, and return the bytes."""
        began = time.monotonic()
        size_bytes = self._walk(volume)
        with self._lock:
            now = time.monotonic()
            self._known[volume] = (now, size_bytes, now - began)
        return size_bytes

    def forget(self, volume: str) -> None:
        """Drop what is known of a volume that is gone."""
        with self._lock:
            self._known.pop(volume, None)

    def _measure_later(self, volume: str) -> None:
        if volume in self._measuring:
            return
        # One thread for all: a list of 200 containers must not start 200 walks at once. It ends when it
        # has nothing to do, so that no idle thread is kept.
        idle = not self._measuring
        self._measuring.add(volume)
        self._wanted.put(volume)
        if idle:
            threading.Thread(target=self._measure_wanted, name="volume-sizes", daemon=True).start()

    def _measure_wanted(self) -> None:
        while True:
            volume = self._wanted.get()
            try:
                self.measure(volume)
            except (SysctrError, OSError) as error:
                log.debug("%s", error)
            with self._lock:
                self._measuring.discard(volume)
                if not self._measuring:
                    return
