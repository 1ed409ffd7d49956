"""Both ends of a synchronisation on one machine: two runners of jobs, and a socket for the connection."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sysctr.engine import seccomp
from sysctr.engine.job import JobRunner
from sysctr.engine.plan import Idmap
from sysctr.engine.tree_sync import Exchange, PassMark, Received, receive_tree, send_tree
from sysctr.errors import SysctrError
from sysctr.storage.base import RootSpec, Tree

_PIECE_BYTES = 256 << 10


class Broken(SysctrError):
    """What these exchanges raise for a broken rsync: `Channel.exchange` raises something like it."""


class Cancelled(Exception):
    """What the tasks here raise when they were cancelled, as the engine's do."""


@dataclass
class Telling:
    """A task that can be looked at."""

    doing: str = "migrate 101"
    cancelled: bool = False
    lines: list[str] = field(default_factory=list)

    def check(self) -> None:
        if self.cancelled:
            raise Cancelled

    def log(self, text: str) -> None:
        self.lines.append(text)


def runner_with(jobs: JobRunner, first: int) -> JobRunner:
    """Return a runner under the same supervisor with other ids, and the filter that containers have."""
    allowed = seccomp.compile_filter(frozenset())
    return JobRunner(jobs._supervisor, jobs._stage, Idmap(first, 65536), allowed, jobs._cgroup)


def plain(directory: object) -> RootSpec:
    """Return a directory as the root of a volume that somebody may write to."""
    return RootSpec((Tree("volume", str(directory)),))


def over(connection: socket.socket, told: Callable[[int], None] = lambda count: None) -> Exchange:
    """Return an exchange over a socket; `told` hears of each piece that comes, and may raise."""

    def exchange(read_fd: int, write_fd: int) -> None:
        failures: list[BaseException] = []

        def up() -> None:
            try:
                while data := os.read(read_fd, _PIECE_BYTES):
                    connection.sendall(data)
            except OSError as error:
                failures.append(error)
            finally:
                os.close(read_fd)
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=up, daemon=True)
        thread.start()
        try:
            while data := connection.recv(_PIECE_BYTES):
                told(len(data))
                view = memoryview(data)
                while view:
                    view = view[os.write(write_fd, view) :]
        except OSError as error:
            failures.append(error)
        finally:
            os.close(write_fd)
            # Whoever is still sending gets an error, as it does from a connection.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
            thread.join()
        if failures:
            raise Broken("cannot move bytes: the local rsync ended") from failures[0]

    return exchange


class Pair:
    """A source and a target; `pass_` does what a pass of a migration does."""

    def __init__(self, here: JobRunner, there: JobRunner, source: RootSpec, target: RootSpec) -> None:
        self.here = here
        self.there = there
        self.source = source
        self.target = target
        self.task = Telling()
        self.their_task = Telling()
        self.since: PassMark | None = None
        self.bytes = 0
        self.same = False

    def pass_(self, mode: str = "all", *, still: bool = False) -> list[Received]:
        """Bring the target up to date and return what each run did.

        After one of the mode "places" `same` tells whether both ends saw the same.
        """
        done = []
        since, self.since = self.since, PassMark(self.source)
        for each in ("listed", mode) if since else (mode,):
            options = {"since": since} if each == "listed" else {}
            first = self.since if each in ("listed", "places") or not since else None
            sent, received = self.run(each, still=still, mark=first, **options)
            words = f"{sent!r}, {received!r}, {self.task.lines}, {self.their_task.lines}"
            assert isinstance(sent, str), words
            assert isinstance(received, Received), words
            self.same = bool(sent) and sent == received.digest
            done.append(received)
        return done

    def run(
        self,
        mode: str = "all",
        *,
        told: Callable[[int], None] = lambda count: None,
        still: bool = False,
        **options: Any,
    ) -> tuple[str | BaseException, Received | BaseException]:
        """Do one run and return what came of it at either end."""

        def count(number: int) -> None:
            self.bytes += number
            told(number)

        with connected() as (ours, theirs):
            def receive() -> Received:
                exchange = over(theirs, count)
                try:
                    return receive_tree(
                        self.there, self.their_task, self.target, exchange, mode, still=still
                    )
                finally:
                    # Where it failed before there was an exchange, nobody else tells the other side.
                    theirs.shutdown(socket.SHUT_RDWR)

            def send() -> str:
                try:
                    return send_tree(
                        self.here, self.task, self.source, over(ours), mode, still=still, **options
                    )
                finally:
                    ours.shutdown(socket.SHUT_RDWR)

            receiving, sending = Outcome(receive), Outcome(send)
            return sending.wait(), receiving.wait()


@contextlib.contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Give both ends of a connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


class Outcome(threading.Thread):
    """Something done in a thread: what it returned, or what it raised."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._outcome: object = None
        self.start()

    def run(self) -> None:
        try:
            self._outcome = self._work()
        except BaseException as error:
            self._outcome = error

    def wait(self, deadline_s: float = 120) -> object:
        """Return it; an AssertionError if it takes too long."""
        self.join(deadline_s)
        assert not self.is_alive(), f"no end within {deadline_s:g} s"
        return self._outcome
