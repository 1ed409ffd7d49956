"""Where an archive comes from: a file, or a stream that can be read once; and what its beginning says.

An archive is its sender's until all of it was judged. What decompresses it runs in a job without rights, and
what is decided of its head is decided of the same bytes that are unpacked afterwards.
"""

import os
import select
from collections.abc import Callable
from types import TracebackType

from sysctr.engine.archive_head import Head, parse_head
from sysctr.engine.job import JobRunner
from sysctr.engine.tasks import Task
from sysctr.errors import SysctrError
from sysctr.linux.files import wait_ready, write_all
from sysctr.template.layout import PEEKED_BYTES, unpacked_head
from sysctr.template.unpack import CHUNK_BYTES, HEAD_BYTES, detect, open_archive


class Source:
    """An archive that is read from a descriptor, once from its beginning to its end."""

    def __init__(
        self, fd: int, name: str, doing: str, size_bytes: int | None, whole: Callable[[], bool] | None = None
    ) -> None:
        """Take a descriptor; `whole` tells at the end of a stream whether its sender has sent all of it."""
        self._fd = fd
        self._whole = whole
        self._ended = False
        self.name = name
        self.doing = doing
        self.size_bytes = size_bytes
        self._peeked = b""
        self.codec = ""

    @classmethod
    def of_file(cls, path: str, doing: str) -> "Source":
        """Open a file; raises NotFound, or UsageError for what is none."""
        fd = open_archive(path, doing)
        return cls(fd, os.path.basename(path), doing, os.fstat(fd).st_size)

    def __enter__(self) -> "Source":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def peek(self, jobs: JobRunner) -> Head:
        """Return what the first members say; nothing is lost of what comes after them."""
        while len(self._peeked) < PEEKED_BYTES:
            data = os.read(self._fd, PEEKED_BYTES - len(self._peeked))
            if not data:
                self._note_end()
                break
            self._peeked += data
        if not self._peeked:
            raise SysctrError(f"cannot {self.doing}: it is empty")
        self.codec = detect(self._peeked[:HEAD_BYTES], self.doing)
        return parse_head(unpacked_head(jobs.run_tool, self.codec, self._peeked), self.doing)

    def feed(self, fd: int, task: Task, saw: Callable[[bytes], None] | None = None) -> None:
        """Write all of it to a job, and tell how far it is; BrokenPipeError when the job wants no more."""
        done = 0
        data = self._peeked
        while data:
            task.check()
            if saw is not None:
                saw(data)
            write_all(fd, data)
            done += len(data)
            task.progress(done, self.size_bytes)
            # A sender that stalls must not keep the task from being cancelled.
            wait_ready(self._fd, select.POLLIN, task.check)
            data = os.read(self._fd, CHUNK_BYTES)
        self._note_end()

    def check_ended(self) -> None:
        """Raise SysctrError if the archive's end, as its job saw it, was not the end of what was given."""
        if not self._ended:
            raise SysctrError(f"cannot {self.doing}: something else follows the end of the archive")

    def _note_end(self) -> None:
        # What was cut may look whole: tar and some compressors end anywhere between two parts.
        if self._whole is not None and not self._whole():
            raise SysctrError(f"cannot {self.doing}: its sender was cut off before its end")
        self._ended = True
