"""Work that waits for peers, a thread for each: one that does not answer keeps nobody else waiting."""

import logging
import threading
import time
from collections.abc import Callable, Iterable

log = logging.getLogger(__name__)


class PeerWorkers:
    """Does the work of each peer in a thread of its own, never twice at once for the same one."""

    def __init__(self, name: str, work: Callable[[str], None]) -> None:
        self._name = name
        self._work = work
        self._threads: dict[str, threading.Thread] = {}

    def begin(self, peers: Iterable[str]) -> None:
        """Begin the work of these peers, but for those with which it goes on still."""
        for peer in peers:
            thread = self._threads.get(peer)
            if thread is None or not thread.is_alive():
                thread = threading.Thread(target=self._do, args=(peer,), name=self._name, daemon=True)
                self._threads[peer] = thread
                thread.start()

    def wait(self, seconds: float) -> None:
        """Wait until all of it is done, or so long."""
        until_s = time.monotonic() + seconds
        # Whoever ends the daemon waits while new work may begin still.
        for thread in list(self._threads.values()):
            thread.join(max(0.0, until_s - time.monotonic()))

    def _do(self, peer: str) -> None:
        try:
            self._work(peer)
        except Exception:
            # A mistake of ours: it is begun again in the next round, and has to be seen.
            log.exception("%s: peer %s", self._name, peer)
