"""An archive that is being written: under a name that no archive has, until all of it is on the disk.

lib/backup-runs/*.partial    the path of each: what a daemon that died was writing, the next one removes
"""

import contextlib
import errno
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator

from sysctr.engine import archives
from sysctr.errors import NoSpace, SysctrError
from sysctr.linux import fault, files
from sysctr.paths import Layout
from sysctr.storage.tree import explain

log = logging.getLogger(__name__)

_SUFFIX = ".partial"
_MOST_SECONDS = 3600


class Partial:
    """The file, and the directory that it is in; both stay what was opened, wherever their names lead."""

    def __init__(self, directory: str, directory_fd: int, name: str, file_fd: int) -> None:
        self.directory = directory
        self.name = name
        self.file_fd = file_fd
        self.complete = False
        self._directory_fd = directory_fd

    @property
    def path(self) -> str:
        """Return where the archive is, or will be."""
        return f"{self.directory}/{self.name}"

    def complete_with(self, log_text: bytes, notes: str, *, protected: bool) -> None:
        """Make it the archive, with what lies beside it; from then on it stays."""
        with self.saying():
            os.fsync(self.file_fd)
            # First what lies beside it: it must not be there unprotected for a moment.
            beside = {archives.log_name(self.name): log_text}
            if notes:
                beside[f"{self.name}{archives.NOTES}"] = notes.encode("utf-8", "surrogateescape")
            if protected:
                beside[f"{self.name}{archives.PROTECTED}"] = b""
            written = []
            try:
                for name, data in beside.items():
                    files.write_atomically(f"/proc/self/fd/{self._directory_fd}/{name}", data)
                    written.append(name)
                fault.point("backup.beside.written")
                os.rename(
                    f"{self.name}{archives.PARTIAL}", self.name,
                    src_dir_fd=self._directory_fd, dst_dir_fd=self._directory_fd,
                )  # fmt: skip
                self.complete = True
            except BaseException:
                for name in written:
                    with contextlib.suppress(OSError):
                        os.unlink(name, dir_fd=self._directory_fd)
                raise
            os.fsync(self._directory_fd)
        fault.point("backup.renamed")

    @contextlib.contextmanager
    def saying(self) -> Iterator[None]:
        """Turn what the destination said into an error that names it."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            raise explain(error, f"write {self.name}", self.directory) from error


@contextlib.contextmanager
def writing(where: Layout, directory: str, number: int, compress: str) -> Iterator[Partial]:
    """Open a new archive of a container in a directory; without `complete_with` nothing of it stays."""
    archives.prepare(where, directory)
    with archives.opened(directory) as place, contextlib.ExitStack() as undo:
        directory_fd = os.open(place.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        undo.callback(os.close, directory_fd)
        name, file_fd = _begin(directory, directory_fd, number, compress)
        partial = Partial(directory, directory_fd, name, file_fd)
        undo.callback(_end, partial, directory_fd)
        os.makedirs(where.backup_runs, 0o700, exist_ok=True)
        mark = f"{where.backup_runs}/{secrets.token_hex(6)}{_SUFFIX}"
        try:
            files.write_atomically(mark, os.fsencode(f"{partial.path}{archives.PARTIAL}"))
        except OSError as error:
            raise explain(error, f"write {name}", where.backup_runs) from error
        undo.callback(os.unlink, mark)
        fault.point("backup.begun")
        yield partial


def _begin(directory: str, directory_fd: int, number: int, compress: str) -> tuple[str, int]:
    """Create the file under the first free name, from this second on."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    now_s = time.time()
    for later_s in range(_MOST_SECONDS):
        name = archives.make_name(number, now_s + later_s, compress)
        try:
            # Two hosts may share the directory, so only this tells that the name is free.
            file_fd = os.open(f"{name}{archives.PARTIAL}", flags, 0o600, dir_fd=directory_fd)
        except FileExistsError:
            continue
        except OSError as error:
            raise explain(error, f"write {name}", directory) from error
        try:
            os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            return name, file_fd
        os.close(file_fd)
        os.unlink(f"{name}{archives.PARTIAL}", dir_fd=directory_fd)
    raise SysctrError(f"cannot write an archive of {number} in {directory}: no name of this hour is free")


def _end(partial: Partial, directory_fd: int) -> None:
    os.close(partial.file_fd)
    if not partial.complete:
        try:
            os.unlink(f"{partial.name}{archives.PARTIAL}", dir_fd=directory_fd)
        except OSError as error:
            log.warning("%s%s stays: %s", partial.path, archives.PARTIAL, error.strerror)


def sweep(where: Layout) -> None:
    """Remove what a daemon that died was writing; called by the only daemon before it writes any."""
    with contextlib.suppress(FileNotFoundError):
        for entry in os.listdir(where.backup_runs):
            if not entry.endswith(_SUFFIX):
                continue
            mark = f"{where.backup_runs}/{entry}"
            try:
                path = os.fsdecode(files.read_bounded(mark, 4096)[0])
                if path.endswith(archives.PARTIAL) and stat.S_ISREG(os.lstat(path).st_mode):
                    os.unlink(path)
                    log.info("removed %s, which a crash cut short", path)
            except FileNotFoundError:
                pass
            except OSError as error:
                # Its file system may not be there today: looked at again at the next start.
                log.warning("cannot remove what %s names: %s", mark, error)
                continue
            os.unlink(mark)


def check_space(directory: str, needed_bytes: int) -> None:
    """Raise NoSpace where an archive of that size certainly does not fit."""
    facts = os.statvfs(directory)
    free_bytes = facts.f_bavail * facts.f_frsize
    if free_bytes < needed_bytes:
        raise NoSpace(
            f"cannot back up to {directory}: it needs about {_about(needed_bytes)}, and {_about(free_bytes)} "
            "are free",
            "choose another --dir, or `sysctr backup prune` removes old archives",
        )


def _about(size_bytes: int) -> str:
    """Return a size for people.

    >>> _about(1536 << 20)
    '1536 MiB'
    """
    return f"{size_bytes >> 20} MiB" if size_bytes >= 1 << 20 else f"{size_bytes} bytes"
