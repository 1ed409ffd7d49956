"""Mounts by file descriptor: the new mount interface, and the few old calls it cannot replace.

Nothing here takes a path inside a foreign tree; such a path is resolved first (see `path`) and passed as
a descriptor.
Sources: fsopen(2), fsconfig(2), fsmount(2), open_tree(2), move_mount(2), mount_setattr(2), mount(2).
"""

import ctypes
import os
import struct

from sysctr.linux import syscall
from sysctr.linux.syscall import KernelError, bind, check

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
AT_SYMLINK_NOFOLLOW = 0x100

OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_IDMAP = 0x100000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOVE_MOUNT_T_EMPTY_PATH = 0x40

_mount = bind(
    "mount", ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p
)
_umount2 = bind("umount2", ctypes.c_char_p, ctypes.c_int)


def mount(source: str, target: str, fstype: str | None, flags: int = 0, data: str | None = None) -> None:
    """Mount the old way, for propagation changes and for overlay, which takes paths anyway."""
    result = _mount(
        os.fsencode(source), os.fsencode(target), fstype.encode() if fstype else None, flags,
        data.encode() if data else None,
    )  # fmt: skip
    check(result, "mount", target)


def umount2(path: str, flags: int = 0) -> None:
    """Unmount what is mounted at `path`."""
    check(_umount2(os.fsencode(path), flags), "umount2", path)


def unescaped(field: bytes) -> str:
    r"""Return a path of /proc/self/mountinfo: a space, tab, newline and backslash are written in octal.

    >>> unescaped(rb"/srv/my\040data")
    '/srv/my data'
    """
    return os.fsdecode(field.decode("unicode_escape").encode("latin-1"))


def points_below(directory: str) -> "list[str]":
    """Return where something is mounted below a directory, as this process sees it; the deepest first.

    What is mounted several times at one place is there as often. Source: proc_pid_mountinfo(5).
    """
    found = []
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            point = unescaped(line.split()[4])
            if point.startswith(directory.rstrip("/") + "/"):
                found.append(point)
    return sorted(found, key=len, reverse=True)


def pivot_root(new_root: str, put_old: str) -> None:
    """Make `new_root` the root of this mount namespace."""
    number = syscall.old_number("pivot_root")
    check(
        syscall.call(number, ctypes.c_char_p(os.fsencode(new_root)), ctypes.c_char_p(os.fsencode(put_old))),
        "pivot_root",
        new_root,
    )


def new_mount(fstype: str, options: dict[str, str | None] | None = None, attributes: int = 0) -> int:
    """Return a descriptor of a new, detached mount of `fstype`.

    An option whose value is None is a flag. The kernel's own words, where it leaves some on the descriptor,
    become part of the error. Raises KernelError.
    """
    context_fd = check(
        syscall.call(syscall.FSOPEN, ctypes.c_char_p(fstype.encode()), _FSOPEN_CLOEXEC), "fsopen", fstype
    )
    try:
        for key, value in (options or {}).items():
            command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
            text = None if value is None else ctypes.c_char_p(os.fsencode(value))
            _checked_by_context(
                context_fd,
                syscall.call(syscall.FSCONFIG, context_fd, command, ctypes.c_char_p(key.encode()), text, 0),
                "fsconfig", f"{fstype} {key}",
            )  # fmt: skip
        _checked_by_context(
            context_fd,
            syscall.call(syscall.FSCONFIG, context_fd, _FSCONFIG_CMD_CREATE, None, None, 0),
            "fsconfig", fstype,
        )  # fmt: skip
        return check(
            syscall.call(syscall.FSMOUNT, context_fd, _FSMOUNT_CLOEXEC, attributes), "fsmount", fstype
        )
    finally:
        os.close(context_fd)


def _checked_by_context(context_fd: int, result: int, name: str, what: str) -> None:
    if result >= 0:
        return
    errno = ctypes.get_errno()
    try:
        words = os.read(context_fd, 512).decode(errors="replace").strip()
    except OSError:
        words = ""  # most file systems leave no message: ENODATA
    raise KernelError(errno, name, f"{what} ({words})" if words else what)


def open_tree(path: str, flags: int = OPEN_TREE_CLONE, *, dir_fd: int = AT_FDCWD) -> int:
    """Return a descriptor of `path`, by default of a detached bind mount; an empty path means dir_fd."""
    if not path:
        flags |= AT_EMPTY_PATH
    return check(
        syscall.call(
            syscall.OPEN_TREE, dir_fd, ctypes.c_char_p(os.fsencode(path)), flags | OPEN_TREE_CLOEXEC
        ),
        "open_tree",
        path or f"fd {dir_fd}",
    )


def move_mount(mount_fd: int, target_fd: int) -> None:
    """Attach the detached mount `mount_fd` on the object `target_fd`."""
    empty = ctypes.c_char_p(b"")
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
    check(
        syscall.call(syscall.MOVE_MOUNT, mount_fd, empty, target_fd, empty, flags),
        "move_mount",
        f"fd {target_fd}",
    )


def mount_setattr(
    mount_fd: int, *, attributes: int = 0, userns_fd: int = -1, propagation: int = 0, recursive: bool = False
) -> None:
    """Change flags, propagation and the id map of a mount; a userns_fd ≥ 0 means its map is applied."""
    if userns_fd >= 0:
        attributes |= MOUNT_ATTR_IDMAP
    # struct mount_attr: set, clear, propagation, userns_fd, each 64 bits.
    argument = struct.pack("=QQQQ", attributes, 0, propagation, max(userns_fd, 0))
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    result = syscall.call(
        syscall.MOUNT_SETATTR, mount_fd, ctypes.c_char_p(b""), flags, ctypes.c_char_p(argument), len(argument)
    )
    check(result, "mount_setattr", f"fd {mount_fd}")
