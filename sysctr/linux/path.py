"""Paths inside trees that somebody else writes: resolved by the kernel, never by string concatenation.

Source: openat2(2).
"""

import ctypes
import errno
import os
import struct

from sysctr.linux import syscall
from sysctr.linux.syscall import KernelError, bind, check

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

_fstatfs = bind("fstatfs", ctypes.c_int, ctypes.c_char_p)

# File systems through which one talks to the kernel (linux/magic.h).
_KERNELS_OWN = {
    0x9FA0: "proc", 0x62656572: "sysfs", 0x1CD1: "devpts", 0x27E0EB: "cgroup", 0x63677270: "cgroup2",
    0x64626720: "debugfs", 0x74726163: "tracefs", 0x73636673: "securityfs", 0xCAFE4A11: "bpf",
    0x62656570: "configfs", 0xDE5E81E4: "efivarfs", 0x6165676C: "pstore", 0x42494E4D: "binfmt_misc",
    0x6E736673: "nsfs", 0x65735543: "fusectl", 0xF97CFF8C: "selinuxfs", 0x5A4F4653: "zonefs",
}  # fmt: skip

# The kernel answers EAGAIN when a rename raced with the walk (openat2(2)); an attacker can force a few.
_ATTEMPTS = 32


def openat2(dir_fd: int, path: str, flags: int, resolve: int, mode: int = 0) -> int:
    """Open `path` relative to `dir_fd` under the rules of `resolve`; the descriptor is close-on-exec."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    for _ in range(_ATTEMPTS):
        result = syscall.call(
            syscall.OPENAT2, dir_fd, ctypes.c_char_p(os.fsencode(path)), ctypes.c_char_p(how), len(how)
        )
        if result >= 0 or ctypes.get_errno() != errno.EAGAIN:
            return check(result, "openat2", path)
    raise KernelError(errno.EAGAIN, "openat2", path)


def open_in_root(root_fd: int, path: str, flags: int, mode: int = 0) -> int:
    """Open `path` as a process whose root directory is `root_fd` would; symlinks stay inside."""
    return openat2(root_fd, path, flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS, mode)


def open_without_links(root_fd: int, path: str, flags: int, mode: int = 0) -> int:
    """Open `path` beneath `root_fd`; a symlink anywhere on the way is ELOOP."""
    return openat2(root_fd, path.lstrip("/") or ".", flags, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS, mode)


def make_directory(root_fd: int, path: str, mode: int = 0o755) -> int:
    """Return an O_PATH descriptor of the directory `path` beneath `root_fd`; what is missing is made.

    Raises KernelError ELOOP for a symlink on the way and ENOTDIR for a file.
    """
    try:
        # Nearly always it is there; one call instead of three for each part of the path.
        return _open_directory(root_fd, path)
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
    current_fd = os.open(".", os.O_PATH | os.O_CLOEXEC, dir_fd=root_fd)
    for name in [part for part in path.split("/") if part not in ("", ".")]:
        try:
            try:
                next_fd = _open_directory(current_fd, name)
            except KernelError as error:
                if error.errno != errno.ENOENT:
                    raise
                os.mkdir(name, mode, dir_fd=current_fd)
                next_fd = _open_directory(current_fd, name)
        finally:
            os.close(current_fd)
        current_fd = next_fd
    return current_fd


def _open_directory(dir_fd: int, name: str) -> int:
    return open_without_links(dir_fd, name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)


def make_file(root_fd: int, path: str, mode: int = 0o644) -> int:
    """Return an O_PATH descriptor of the file `path` beneath `root_fd`, made empty if missing.

    An existing object of any kind but a symlink is returned as it is: it serves as a mount target.
    """
    try:
        return open_without_links(root_fd, path, os.O_PATH)
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
    parent, _, name = path.rpartition("/")
    parent_fd = make_directory(root_fd, parent)
    try:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=parent_fd))
        return open_without_links(parent_fd, name, os.O_PATH)
    finally:
        os.close(parent_fd)


def kernels_own(fd: int) -> str:
    """Return the name of the file system `fd` is on if one talks to the kernel through it; empty for others.

    What such a one holds is no data. Source: statfs(2).
    """
    # struct statfs begins with a long; it has 120 bytes where that has 8.
    buffer = ctypes.create_string_buffer(256)
    check(_fstatfs(fd, buffer), "fstatfs", f"fd {fd}")
    return _KERNELS_OWN.get(struct.unpack_from("=Q", buffer)[0], "")
