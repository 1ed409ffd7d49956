"""Runs one job whose streams are fed and read by threads of this side, and says how it ended."""

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sysctr.template.base import RunJob, Task

_LINE_MAX_BYTES = 64 * 1024
# The interpreter ignores SIGPIPE and a child inherits that; a pipeline that is cut short needs the default.
_PLAIN_SIGNALS = ["env", "--default-signal=PIPE"]

# Reads or writes this side's end of one of a job's streams.
Stream = Callable[[int], None]


class StopReading(Exception):
    """Raised by a line's reader to end the job: its next write fails."""


def run_lines(
    run_job: RunJob,
    argv: Sequence[str],
    *,
    volume: str,
    on_line: Callable[[str], None],
    feed: Callable[[int], None] | None = None,
    network: bool = False,
    binds: Sequence[tuple[str, str]] = (),
    environment: Mapping[str, str] | None = None,
    volumes: Sequence[tuple[str, str]] = (),
    task: Task,
) -> int:
    """Run `argv` as a job and return its exit status.

    Each line of its standard output goes to `on_line` as it comes; errors go there too only if `argv` sends
    them to standard output. `feed` writes the job's input to the descriptor it is given, in a thread of its
    own, and gets BrokenPipeError when the job has ended. An exception of either is raised here.
    """
    return run_connected(
        run_job, argv, stdin=feed, stdout=line_reader(on_line), volume=volume, network=network,
        binds=tuple(binds), environment=dict(environment or {}), volumes=tuple(volumes), task=task,
    )  # fmt: skip


def run_connected(
    run_job: Callable[..., int],
    argv: Sequence[str],
    *,
    stdin: Stream | None = None,
    stdout: Stream | None = None,
    stderr: Stream | None = None,
    **options: Any,
) -> int:
    """Run `argv` as a job and return its exit status; each stream's function has a thread of its own.

    It gets the descriptor of this side's end, which is closed when it returns. What it raises is raised here
    when the job has ended; BrokenPipeError and StopReading are no error.
    """
    streams = (("stdin_fd", stdin), ("stdout_fd", stdout), ("stderr_fd", stderr))
    with contextlib.ExitStack() as stack:
        theirs: dict[str, _End] = {}
        threads = []
        for name, function in streams:
            if function is not None:
                read_end, write_end = _pipe(stack)
                ours, theirs[name] = (write_end, read_end) if name == "stdin_fd" else (read_end, write_end)
                threads.append(_Worker(f"job-{name}", function, ours))
        for thread in threads:
            thread.start()
        try:
            status = run_job(
                [*_PLAIN_SIGNALS, *argv], **{name: end.fd for name, end in theirs.items()}, **options
            )
        finally:
            # Our copies of the job's ends: only now can the readers see the end and the feeder the break.
            for end in theirs.values():
                end.close()
            for thread in threads:
                thread.join()
    for thread in threads:
        if thread.error is not None and not isinstance(thread.error, StopReading | BrokenPipeError):
            raise thread.error
    return status


class _End:
    """One end of a pipe, closed once by whoever is done with it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1


def _pipe(stack: contextlib.ExitStack) -> tuple[_End, _End]:
    read_fd, write_fd = os.pipe()
    ends = _End(read_fd), _End(write_fd)
    for end in ends:
        stack.callback(end.close)
    return ends


class _Worker(threading.Thread):
    """Serves one stream; its exception is kept for the one who waits for it."""

    def __init__(self, name: str, work: Stream, end: _End) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._end = end
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._work(self._end.fd)
        except BaseException as error:
            # Of a broken pipe: the job ended early, and its status and its words say why.
            self.error = error
        finally:
            self._end.close()


def line_reader(on_line: Callable[[str], None]) -> Stream:
    """Return a stream's function that hands on each line of what the job says."""

    def read(fd: int) -> None:
        rest = b""
        while data := os.read(fd, 65536):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                on_line(line.decode(errors="replace"))
            rest = rest[-_LINE_MAX_BYTES:]
        if rest:
            on_line(rest.decode(errors="replace"))

    return read
