"""Project quotas of a pool: which volume has which project, what it may use, and what it uses.

A volume's project has an even number, and the limit. What is kept of it beside the limit (the copy that a
snapshot of a running container makes) is counted in the odd number after it. The numbers are random from a
range of a billion that people's own do not begin in; one that the file system knows already is not taken.
Two pools, or hosts, on one file system need not know of each other.
"""

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator

from sysctr.linux import quota

log = logging.getLogger(__name__)

# Even, and with its neighbour below 2**31, as some programs take the number for an int.
_FIRST, _COUNT = 1 << 30, 1 << 29
# Of every file system that has quotas; a limit is never rounded up.
_BLOCK_BYTES = 4096
# So many files for a limit as an image of that size has (images.make).
_BYTES_PER_INODE = 8192
# Mounting an overlay makes a directory in the upper's project, and what cannot be made is mounted read-only.
# xfs wants to have a hundred blocks free for one, ext4 has one. What is given for that can be used up inside,
# and asked for again by a reboot: so often and no more.
_ROOM_BYTES, _ROOM_INODES = 1 << 20, 16
_MOST_ROOMS = 8


def is_project(number: object) -> bool:
    """Tell whether something is the number of a volume's project.

    >>> is_project(1 << 30), is_project((1 << 30) + 1), is_project(7), is_project("7")
    (True, False, False, False)
    """
    return type(number) is int and _FIRST <= number < _FIRST + 2 * _COUNT and number % 2 == 0


class Projects:
    """The projects of one pool; raises OSError where the kernel refuses."""

    def __init__(self, pool: str) -> None:
        self._pool = pool

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        pool_fd = os.open(self._pool, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield pool_fd
        finally:
            os.close(pool_fd)

    def enforced(self) -> bool:
        """Tell whether the pool's file system, as it is mounted now, keeps limits that we may set."""
        wanted = quota.FS_QUOTA_PDQ_ACCT | quota.FS_QUOTA_PDQ_ENFD
        try:
            with self._opened() as pool_fd:
                if quota.project_flags(pool_fd) != wanted:
                    return False
                # Whether there are any is told to everybody, all else only to the host's own root.
                quota.next_quota(pool_fd, _FIRST)
        except OSError as error:
            log.debug("%s: %s", self._pool, error)
            return False
        return True

    def new(self) -> int:
        """Return the number of a project that has never been used; 0 where no limits are kept."""
        if not self.enforced():
            return 0
        with self._opened() as pool_fd:
            while True:
                project = _FIRST + 2 * secrets.randbelow(_COUNT)
                known = quota.next_quota(pool_fd, project)
                if known is None or known.project > project + 1:
                    return project

    def limit(self, project: int, size_bytes: int | None) -> None:
        """Set the limit of a project; None takes it away."""
        with self._opened() as pool_fd:
            quota.set_quota(pool_fd, project, _whole(size_bytes or 0), _inodes(size_bytes))

    def limit_with_room(self, project: int, size_bytes: int | None) -> bool:
        """Set the limit of a project, a little higher if it is used up; tell whether it has room now."""
        with self._opened() as pool_fd:
            now = quota.get_quota(pool_fd, project)
            most_bytes, most_inodes = 0, 0
            if size_bytes is not None:
                most_bytes = _whole(_with_room(size_bytes, now.used_bytes, _ROOM_BYTES))
                most_inodes = _with_room(_inodes(size_bytes), now.used_inodes, _ROOM_INODES)
            if (most_bytes, most_inodes) != (now.limit_bytes, now.limit_inodes):
                quota.set_quota(pool_fd, project, most_bytes, most_inodes)
        return size_bytes is None or (most_bytes > now.used_bytes and most_inodes > now.used_inodes)

    def limit_of(self, project: int) -> int | None:
        """Return the limit of a project in bytes; None without one."""
        with self._opened() as pool_fd:
            return quota.get_quota(pool_fd, project).limit_bytes or None

    def used_bytes(self, project: int, *, settled: bool = False) -> int:
        """Return what counts against the limit of a project; `settled` waits for what is being deleted."""
        with self._opened() as pool_fd:
            if settled:
                # Only xfs has it. Elsewhere deleting is over when it returns.
                with contextlib.suppress(OSError):
                    quota.xfs_free_eofblocks(pool_fd, project)
            return quota.get_quota(pool_fd, project).used_bytes

    def all_bytes(self, project: int, *, settled: bool = False) -> int:
        """Return what counts against the limit of a project, and what is kept beside it."""
        return sum(self.used_bytes(number, settled=settled) for number in (project, project + 1))

    def of(self, path: str) -> int:
        """Return the project that all which is made in a directory belongs to; 0 for none."""
        try:
            directory_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return 0
        try:
            attributes = quota.fsgetxattr(directory_fd)
        except OSError:
            return 0  # this file system has none
        finally:
            os.close(directory_fd)
        return attributes.projid if attributes.xflags & quota.FS_XFLAG_PROJINHERIT else 0

    def enter(self, path: str, project: int) -> None:
        """Make a directory, which is empty, and all that will be made in it part of a project."""
        directory_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            attributes = quota.fsgetxattr(directory_fd)
            xflags = attributes.xflags | quota.FS_XFLAG_PROJINHERIT
            quota.fssetxattr(directory_fd, attributes._replace(xflags=xflags, projid=project))
        finally:
            os.close(directory_fd)


def _whole(size_bytes: int) -> int:
    return size_bytes // _BLOCK_BYTES * _BLOCK_BYTES


def _inodes(size_bytes: int | None) -> int:
    return 0 if size_bytes is None else size_bytes // _BYTES_PER_INODE


def _with_room(limit: int, used: int, room: int) -> int:
    """Return a limit that leaves some room above what is used, as far as that may go.

    >>> _with_room(100, 50, 2), _with_room(100, 99, 2), _with_room(100, 200, 2)
    (100, 101, 116)
    """
    return max(limit, min(used + room, limit + _MOST_ROOMS * room))
