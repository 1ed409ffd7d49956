"""Merging the layers that snapshots leave, in the background: no action waits for it."""

import logging
import queue
import threading

from sysctr.engine.host import Host
from sysctr.engine.snapshots import Snapshots
from sysctr.errors import SysctrError

log = logging.getLogger(__name__)


class Compaction:
    """One thread that lets the drivers merge what nobody needs one by one, a container at a time.

    It runs beside everything else: a driver keeps what is in use, and a crash leaves what its sweep can undo.
    """

    def __init__(self, host: Host, snapshots: Snapshots) -> None:
        self._host = host
        self._snapshots = snapshots
        self._wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: set[int] = set()

    def start(self) -> None:
        """Begin."""
        threading.Thread(target=self._run, name="compact", daemon=True).start()

    def close(self) -> None:
        """End after the container whose layers are merged at the moment."""
        self._wanted.put(0)

    def soon(self, number: int) -> None:
        """Look at the layers of a container soon; while it waits for its turn, once is enough."""
        with self._lock:
            if number in self._waiting:
                return
            self._waiting.add(number)
        self._wanted.put(number)

    def _run(self) -> None:
        while number := self._wanted.get():
            with self._lock:
                self._waiting.discard(number)
            try:
                self._compact(number)
            except (SysctrError, OSError) as error:
                # Destroyed meanwhile, or its pool is gone: it is looked at again after its next snapshot.
                log.info("%d: its layers stay as they are: %s", number, error)
            except Exception:
                log.exception("%d: cannot merge its layers", number)

    def _compact(self, number: int) -> None:
        record = self._host.store.load(number)
        if record.damaged:
            return
        for driver, volume in self._snapshots.volumes(record):
            driver.compact(volume, self._host.worker(record))
        self._host.collect_soon()
