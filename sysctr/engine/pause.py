"""Holding a running container still for the moment in which the states of its volumes are taken."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from sysctr.engine.host import Host
from sysctr.errors import SysctrError
from sysctr.linux import fault

_COPY_TIMEOUT_S = 24 * 3600.0


class Pause:
    """One pause for all volumes of a container, each snapshot of which is taken in a thread of its own.

    The container is frozen when the last of the `parties` has copied what it can while it runs, and goes on
    when the last has taken its state. One that was frozen already stays so.
    """

    def __init__(self, host: Host, number: int, parties: int) -> None:
        live = host.live.running(number)
        self._host = host
        self._number = number
        self._stays_frozen = live is not None and live.frozen
        self._changed = threading.Condition()
        self._copying = parties
        self._come: set[int] = set()
        self._inside = 0
        self._began_s = 0.0
        self._failed = False
        self.length_s = 0.0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Hold the container while entered, together with the other volumes' threads."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def run(self, take: Callable[[], None]) -> None:
        """Take one volume's state; who ends without having paused keeps nobody waiting."""
        try:
            take()
        except BaseException:
            self._failed = True
            raise
        finally:
            with self._changed:
                self._arrive()

    def _arrive(self) -> None:
        if threading.get_ident() not in self._come:
            self._come.add(threading.get_ident())
            self._copying -= 1
        self._changed.notify_all()

    def _enter(self) -> None:
        with self._changed:
            self._inside += 1
            self._arrive()
            come = self._changed.wait_for(lambda: self._failed or not self._copying, _COPY_TIMEOUT_S)
            if self._failed or not come:
                self._inside -= 1
                raise OtherFailed(f"cannot snapshot {self._number}: another of its volumes could not be kept")
            if not self._began_s:
                self._freeze()

    def _freeze(self) -> None:
        self._began_s = time.monotonic()
        if not self._stays_frozen:
            try:
                self._host.cgroups.freeze(self._number)
            except BaseException:
                self._failed = True
                self._inside -= 1
                raise
        fault.point("snapshot.frozen")

    def _leave(self) -> None:
        with self._changed:
            self._inside -= 1
            if not self._inside:
                if not self._stays_frozen:
                    self._host.cgroups.thaw(self._number)
                self.length_s = time.monotonic() - self._began_s


class OtherFailed(SysctrError):
    """The state of another volume could not be taken, and the error of that one says why."""
