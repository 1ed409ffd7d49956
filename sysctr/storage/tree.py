"""Directory trees on the host's side: made whole or not at all, measured, and thrown away in the background.

Trees hold what containers wrote, so nothing here follows a path into one: they are renamed as a whole, and
walked only by coreutils, whose walk is bounded in depth and descriptors and never follows a symlink.
"""

import contextlib
import errno
import logging
import os
import secrets
import stat
import threading
from collections.abc import Callable

from sysctr.errors import NoSpace, Refused, SysctrError
from sysctr.linux import process
from sysctr.storage.base import RootSpec

log = logging.getLogger(__name__)

# Deleting or measuring millions of files takes as long as it takes; nothing waits for it.
_WALK_TIMEOUT_S = 24 * 3600.0


def explain(error: OSError, doing: str, directory: str) -> SysctrError:
    """Turn what the file system said into the error of that `doing`, with what to do about it.

    >>> explain(OSError(28, "No space left on device"), "create volume 101", "/pool").message
    'cannot create volume 101: no space left on /pool'
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"cannot {doing}: no space left on {directory}", hint=f"see `df {directory}`")
    if error.errno == errno.EROFS:
        return Refused(
            f"cannot {doing}: {directory} is read-only", hint="see `dmesg` for the reason, then remount it"
        )
    if error.errno == errno.EIO:
        return SysctrError(f"cannot {doing}: input/output error on {directory}", hint="see `dmesg`")
    reason = (error.strerror or str(error)).lower()
    return SysctrError(f"cannot {doing}: {error.filename or directory}: {reason}")


def run_tool(
    argv: list[str],
    doing: str,
    directory: str,
    package: str,
    accept: tuple[int, ...] = (0,),
    *,
    stdout_fd: int | None = None,
    pass_fds: tuple[int, ...] = (),
) -> process.Completed:
    """Run a program that works on the file system of `directory`, however long it takes.

    Raises NoSpace, or SysctrError with the program's last words.
    """
    try:
        return process.run(
            argv, timeout_s=_WALK_TIMEOUT_S, accept=accept, stdout_fd=stdout_fd, pass_fds=pass_fds
        )
    except process.ProgramFailed as error:
        # No program has an exit status for it, and ZFS has words of its own.
        words = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "out of space")
        if any(each in error.message for each in words):
            raise explain(OSError(errno.ENOSPC, ""), doing, directory) from error
        hint = f"install the package {package}" if "is not installed" in error.message else ""
        raise SysctrError(f"cannot {doing}: {error.message}", hint) from error


def ensure_directory(path: str, mode: int = 0o700) -> None:
    """Make `path`, its parents too, and see that it is a real directory with exactly that mode."""
    try:
        os.makedirs(path, mode=mode, exist_ok=True)
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode):
            raise Refused(f"cannot use {path}: it is not a directory but a link or a file", hint="remove it")
        if stat.S_IMODE(status.st_mode) != mode:
            os.chmod(path, mode)
    except FileExistsError as error:
        raise Refused(f"cannot use {path}: it is not a directory", hint="remove it") from error
    except OSError as error:
        raise explain(error, f"make {path}", os.path.dirname(path)) from error


def hidden_name(prefix: str, name: str) -> str:
    """Return a name of its own for something half-made: `.PREFIX-NAME-RANDOM`."""
    return f".{prefix}-{name}-{secrets.token_hex(4)}"


def write_file(path: str, text: str, mode: int = 0o600) -> None:
    """Write a new file and put it on the disk; the directory entry is the caller's to publish."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: str) -> None:
    """Put a directory's entries on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file_system(path: str) -> None:
    """Put everything that was written to the file system of `path` on the disk."""
    process.run(["sync", "--file-system", "--", path], timeout_s=_WALK_TIMEOUT_S)


def sync_root(root: RootSpec) -> None:
    """Put everything on the disk that was written to the trees of a volume that somebody may write to."""
    for one in root.trees:
        if not one.read_only:
            sync_file_system(one.path)


def size_bytes(*paths: str) -> int:
    """Return what trees take on the disk together, hard links once, mounts in them not counted."""
    # Files vanish while a running container is measured: du says so with status 1 and counts the rest.
    argv = ["du", "--summarize", "--total", "--block-size=1", "--one-file-system", "--", *paths]
    done = process.run(argv, timeout_s=_WALK_TIMEOUT_S, accept=(0, 1))
    count = (done.stdout.splitlines() or [b""])[-1].split(b"\t")[0]
    if not count.isdigit() or len(done.stdout.splitlines()) < 2:
        raise SysctrError(f"cannot measure {paths[0]}: {done.stderr.decode(errors='replace').strip()}")
    return int(count)


def delete(path: str) -> None:
    """Delete a tree for good, whatever it holds; nothing mounted in it is touched."""
    process.run(["rm", "--recursive", "--force", "--one-file-system", "--", path], timeout_s=_WALK_TIMEOUT_S)


class Trash:
    """A directory that trees are renamed into, so that taking one away is over at once."""

    def __init__(self, directory: str, delete: Callable[[str], None] = delete) -> None:
        self.directory = directory
        self._delete = delete
        self._emptying = threading.Lock()

    def throw(self, path: str) -> None:
        """Take `path` away; a path that does not exist is fine."""
        target = f"{self.directory}/{os.path.basename(path).lstrip('.')}-{secrets.token_hex(4)}"
        try:
            os.rename(path, target)
        except FileNotFoundError:
            if not os.path.lexists(path):
                return
            self._delete(path)  # the trash itself is missing
        except OSError as error:
            # A full disk may have no block for the new directory entry (btrfs): deleting needs none.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EXDEV):
                raise
            self._delete(path)

    def empty(self) -> None:
        """Delete everything thrown away so far; a second caller returns at once."""
        if not self._emptying.acquire(blocking=False):
            return
        try:
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(self.directory):
                    try:
                        self._delete(f"{self.directory}/{name}")
                    except SysctrError as error:
                        log.warning("%s stays in the trash: %s", name, error)
        finally:
            self._emptying.release()

    def sweep(self, directory: str) -> None:
        """Throw away every hidden, half-made entry of `directory`."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(directory):
                if name.startswith("."):
                    log.info("throwing away %s/%s, left unfinished", directory, name)
                    self.throw(f"{directory}/{name}")
