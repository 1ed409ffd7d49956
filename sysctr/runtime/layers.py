"""Overlay layers as they lie on the disk: several made into one by hard links, and marks taken off copies.

Runs in a job with a container's ids that sees nothing but the layers. They are what the container wrote and
never change again: nothing is followed, and no depth of directories needs more descriptors or stack.

What hides what is fs/overlayfs/namei.c (ovl_lookup_single): a whiteout and anything that is no directory end
the search below, an opaque directory ends it with itself.
"""

import errno
import os
import socket
import stat

from sysctr.linux import attributes

WHITEOUT = os.makedev(0, 0)
OPAQUE = "user.overlay.opaque"
# Of an upper's past: where it was copied from, and what the kernel counts. No frozen layer needs it, and in
# another file system it would point at strange files.
MARKS = frozenset({
    "user.overlay.origin", "user.overlay.impure", "user.overlay.uuid", "user.overlay.nlink",
})  # fmt: skip

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK_BYTES = 1 << 20


def merge(sync: socket.socket, program: dict) -> None:
    """Make program["target"], an empty directory, the union of program["layers"], top first.

    All of them are paths below /volume. What is no directory is linked, not copied; directories are made
    anew, with the owner, mode, times and attributes of the topmost.
    """
    layers = [os.open(f"/volume/{path}", _DIRECTORY) for path in program["layers"]]
    below_fd = os.open("/source", _DIRECTORY) if program.get("below") else -1
    union(layers, os.open(f"/volume/{program['target']}", _DIRECTORY), below_fd)


def strip(sync: socket.socket, program: dict) -> None:
    """Take the marks of an upper's past off everything below /volume, which is a copy of one."""
    walk = [os.open("/volume", _DIRECTORY)]
    waiting = [_strip_directory(walk[0])]
    while waiting:
        if not waiting[-1]:
            waiting.pop()
            if waiting:
                walk[0] = _replace(walk[0], os.open("..", _DIRECTORY, dir_fd=walk[0]))
            continue
        name = waiting[-1].pop()
        walk[0] = _replace(walk[0], os.open(name, _DIRECTORY, dir_fd=walk[0]))
        waiting.append(_strip_directory(walk[0]))
    os.close(walk[0])


def _strip_directory(directory_fd: int) -> "list[str]":
    """Strip a directory and the files in it; returns the directories in it."""
    _strip_marks(directory_fd)
    directories = []
    with os.scandir(directory_fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                directories.append(entry.name)
            elif entry.is_file(follow_symlinks=False):
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                file_fd = os.open(entry.name, flags, dir_fd=directory_fd)
                _strip_marks(file_fd)
                os.close(file_fd)
    return directories


def _strip_marks(fd: int) -> None:
    for name in MARKS.intersection(os.listxattr(fd)):
        os.removexattr(fd, name)


def _replace(old_fd: int, new_fd: int) -> int:
    os.close(old_fd)
    return new_fd


class _Level:
    """A directory being made: which layers have it, by number, and which directories in it are to come.

    One that is `covered` is in no layer below the run, or does not show it.
    """

    def __init__(self, layers: "list[int]", opaque: bool, covered: bool) -> None:
        self.layers = layers
        self.opaque = opaque
        self.covered = covered
        self.waiting: list[tuple[str, list[int], bool]] = []


def union(layers: "list[int]", target_fd: int, below_fd: int = -1) -> None:
    """Fill the directory `target_fd` with the union of the layers, which are open directories; closes all.

    `below_fd` is what shows below the layers, -1 for nothing.

    A layer that has no part in a directory waits, open, at the last one that it had a part in; the others go
    down with the walk and come back by "..". So there is one descriptor of each, however deep they go.
    """
    levels = [_Level(list(range(len(layers))), False, below_fd < 0)]
    copies: dict[tuple[int, int], int] = {}
    _fill(levels[0], layers, target_fd, copies)
    while levels:
        level = levels[-1]
        if level.waiting:
            name, members, opaque = level.waiting.pop()
            os.mkdir(name, 0o700, dir_fd=target_fd)
            target_fd = _replace(target_fd, os.open(name, _DIRECTORY, dir_fd=target_fd))
            for number in members:
                layers[number] = _replace(layers[number], os.open(name, _DIRECTORY, dir_fd=layers[number]))
            covered = opaque or level.covered
            if not covered:
                try:
                    below_fd = _replace(below_fd, os.open(name, _DIRECTORY, dir_fd=below_fd))
                except (FileNotFoundError, NotADirectoryError):
                    covered = True
                except OSError as error:
                    if error.errno != errno.ELOOP:
                        raise
                    covered = True
            levels.append(_Level(members, opaque, covered))
            _fill(levels[-1], layers, target_fd, copies)
            continue
        # Last, because linking files into it changes its times, and it may be one that nobody may write to.
        copy_attributes(layers[level.layers[0]], target_fd)
        if level.opaque:
            os.setxattr(target_fd, OPAQUE, b"y")
        levels.pop()
        if levels:
            if not level.covered:
                below_fd = _replace(below_fd, os.open("..", _DIRECTORY, dir_fd=below_fd))
            target_fd = _replace(target_fd, os.open("..", _DIRECTORY, dir_fd=target_fd))
            for number in level.layers:
                layers[number] = _replace(layers[number], os.open("..", _DIRECTORY, dir_fd=layers[number]))
    for fd in (*layers, target_fd, *copies.values(), *([below_fd] if below_fd >= 0 else [])):
        os.close(fd)


def _fill(level: _Level, layers: "list[int]", target_fd: int, copies: "dict[tuple[int, int], int]") -> None:
    """Link what the level's layers have in their directory, and note the directories that are to come."""
    decided = {}  # name: None, or the layers that have it as a directory, and whether the search has ended
    for number in level.layers:
        for name in os.listdir(layers[number]):
            if name in decided:
                found = decided[name]
                if found is None or found[1]:
                    continue
            else:
                found = None
            status = os.stat(name, dir_fd=layers[number], follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                opaque = _is_opaque(layers[number], name)
                members = [*found[0], number] if found else [number]
                decided[name] = (members, opaque)
            elif found:
                decided[name] = (found[0], True)
            else:
                decided[name] = None
                # The kernel shows the names of whiteouts where nothing is below that they could hide.
                if not (level.covered and _is_whiteout(status)):
                    _link(layers[number], name, status, target_fd, copies)
    level.waiting = [(name, *found) for name, found in decided.items() if found]


def _is_opaque(directory_fd: int, name: str) -> bool:
    child_fd = os.open(name, _DIRECTORY, dir_fd=directory_fd)
    try:
        return os.getxattr(child_fd, OPAQUE) == b"y"
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        os.close(child_fd)


def _is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == WHITEOUT


def _link(
    source_fd: int, name: str, status: os.stat_result, target_fd: int, copies: "dict[tuple[int, int], int]"
) -> None:
    """Link a thing that is no directory, or its copy where it has all the names already that it can have."""
    file = (status.st_dev, status.st_ino)
    try:
        if file in copies:
            os.link(f"/proc/self/fd/{copies[file]}", name, dst_dir_fd=target_fd, follow_symlinks=True)
        else:
            os.link(name, name, src_dir_fd=source_fd, dst_dir_fd=target_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EMLINK:  # ext4 has 65000 links to a file, and all whiteouts may be one
            raise
        _duplicate(source_fd, name, status, target_fd)
        if file in copies:
            os.close(copies[file])
        copies[file] = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=target_fd)


def _duplicate(source_fd: int, name: str, status: os.stat_result, target_fd: int) -> None:
    """Copy one thing that is no directory."""
    if stat.S_ISREG(status.st_mode):
        old_fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source_fd)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        new_fd = os.open(name, flags, 0o600, dir_fd=target_fd)
        while data := os.read(old_fd, _CHUNK_BYTES):
            view = memoryview(data)
            while view:
                view = view[os.write(new_fd, view) :]
        copy_attributes(old_fd, new_fd)
        os.close(old_fd)
        os.close(new_fd)
        return
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(name, dir_fd=source_fd), name, dir_fd=target_fd)
    else:
        os.mknod(name, status.st_mode, status.st_rdev, dir_fd=target_fd)
    os.chown(name, status.st_uid, status.st_gid, dir_fd=target_fd, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode) and not _is_whiteout(status):
        os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=target_fd)
    os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=target_fd, follow_symlinks=False)


def copy_attributes(source_fd: int, target_fd: int) -> None:
    """Give one open file or directory the owner, mode, times and extended attributes of another."""
    status = os.fstat(source_fd)
    os.fchown(target_fd, status.st_uid, status.st_gid)
    os.fchmod(target_fd, stat.S_IMODE(status.st_mode))  # after the owner, whose change takes setuid away
    for name in os.listxattr(source_fd):
        if name in MARKS:
            continue
        try:
            os.setxattr(target_fd, name, attributes.read(source_fd, name))
        except OSError as error:
            # A label of the host's own security module is the host's to give.
            label = name.startswith("security.") and name != "security.capability"
            if not label or error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                raise
    os.utime(target_fd, ns=(status.st_atime_ns, status.st_mtime_ns))
