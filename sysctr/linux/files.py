"""Files that are there whole or not at all: written beside, synced and renamed into place."""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import select
import stat
import time
from collections.abc import Callable, Iterator

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{12}\.unfinished")
# A write takes milliseconds, so what is older belongs to a process that died.
UNFINISHED_AGE_S = 600
_CHECK_MS = 200


def write_atomically(path: str, data: bytes, mode: int = 0o600) -> None:
    """Replace a file by one with this content and mode; after a crash or an error the old one is there.

    The owner is who calls. A symlink at the path is replaced, not followed.
    """
    directory, name = os.path.split(path)
    directory = directory or "."
    # A file name has 255 bytes, and a character up to four; 50 are enough to recognise the real one.
    temporary = f"{directory}/.{name[:50]}.{secrets.token_hex(6)}.unfinished"
    file_fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            # Not by open(): the umask would take its share.
            os.fchmod(file_fd, mode)
            write_all(file_fd, data)
            # Without this, ext4 may put the rename on disk before the content, and a crash leaves zeros.
            os.fsync(file_fd)
        finally:
            os.close(file_fd)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(directory)


def write_all(fd: int, data: bytes) -> None:
    """Write to a descriptor that may take less at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def wait_ready(fd: int, events: int, check: Callable[[], None]) -> None:
    """Wait until a descriptor can be read or written; `check` is called meanwhile, and may raise."""
    poller = select.poll()
    poller.register(fd, events)
    while not poller.poll(_CHECK_MS):
        check()


def sync_directory(path: str) -> None:
    """Wait until what was created, renamed and removed in a directory is on disk."""
    directory_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory_fd)
    except OSError as error:
        # Of a network file system that cannot (fsync(2)): its server decides when that is.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(directory_fd)


def remove_unfinished(directory: str) -> list[str]:
    """Remove what writers that died left in a directory, and return the names."""
    removed = []
    oldest_s = time.time() - UNFINISHED_AGE_S
    for entry in os.scandir(directory):
        if _UNFINISHED.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_mtime < oldest_s:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry.path)
                removed.append(entry.name)
    return removed


def read_bounded(path: str, most_bytes: int) -> tuple[bytes, os.stat_result]:
    """Return the content of a regular file and its state; OSError where it is another thing or too large."""
    # Opening a FIFO would wait for its writer.
    file_fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        state = os.fstat(file_fd)
        if not stat.S_ISREG(state.st_mode):
            raise OSError(f"{path} is not a regular file")
        # One more than allowed tells a file that is too large; its size may grow while we read.
        data = b""
        while chunk := os.read(file_fd, most_bytes + 1 - len(data)):
            data += chunk
    finally:
        os.close(file_fd)
    if len(data) > most_bytes:
        raise OSError(f"{path} is larger than {most_bytes} bytes")
    return data, state


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold the exclusive flock of a file, which is created where it is missing, or of a directory.

    It excludes threads as well as processes, because each call opens the file anew; so it does not nest.
    """
    if os.path.isdir(path):
        lock_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    else:
        lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock_fd)
