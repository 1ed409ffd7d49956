"""Runs one job with its output read line by line and its input fed, and says how it ended."""

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence

from sysctr.template.base import RunJob, Task

_LINE_MAX_BYTES = 64 * 1024
# The interpreter ignores SIGPIPE and a child inherits that; a pipeline that is cut short needs the default.
_PLAIN_SIGNALS = ["env", "--default-signal=PIPE"]


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
    with contextlib.ExitStack() as stack:
        output_read, output_write = _pipe(stack)
        input_read, input_write = _pipe(stack) if feed else (None, None)
        threads = [_Worker("job-output", lambda: _read_lines(output_read, on_line))]
        if feed and input_write is not None:
            threads.append(_Worker("job-input", lambda: _feed_and_close(feed, input_write)))
        for thread in threads:
            thread.start()
        try:
            status = run_job(
                [*_PLAIN_SIGNALS, *argv],
                volume=volume,
                stdin_fd=input_read.fd if input_read else None,
                stdout_fd=output_write.fd,
                network=network,
                binds=tuple(binds),
                environment=dict(environment or {}),
                volumes=tuple(volumes),
                task=task,
            )
        finally:
            # Our copies of the job's ends: only now can the reader see the end and the feeder the break.
            output_write.close()
            if input_read:
                input_read.close()
            for thread in threads:
                thread.join()
    for thread in threads:
        if thread.error is not None and not isinstance(thread.error, StopReading):
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
    """A thread whose exception is kept for the one who waits for it."""

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error


def _read_lines(end: _End, on_line: Callable[[str], None]) -> None:
    rest = b""
    try:
        while data := os.read(end.fd, 65536):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                on_line(line.decode(errors="replace"))
            rest = rest[-_LINE_MAX_BYTES:]
        if rest:
            on_line(rest.decode(errors="replace"))
    finally:
        end.close()


def _feed_and_close(feed: Callable[[int], None], end: _End) -> None:
    try:
        feed(end.fd)
    except BrokenPipeError:
        pass  # the job ended early; its status and its words say why
    finally:
        end.close()
