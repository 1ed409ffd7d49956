"""The way every system call of sysctr is made: bound once, checked always, an error that names the call."""

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)

# Numbers from 424 on are the same on every architecture (include/uapi/asm-generic/unistd.h).
OPEN_TREE = 428
MOVE_MOUNT = 429
FSOPEN = 430
FSCONFIG = 431
FSMOUNT = 432
CLONE3 = 435
CLOSE_RANGE = 436
OPENAT2 = 437
PIDFD_OPEN = 434
PIDFD_SEND_SIGNAL = 424
MOUNT_SETATTR = 442
QUOTACTL_FD = 443

_OLD_NUMBERS = {
    "x86_64": {"pivot_root": 155, "keyctl": 250, "seccomp": 317},
    "aarch64": {"pivot_root": 41, "keyctl": 219, "seccomp": 277},
}


class KernelError(OSError):
    """The kernel refused a call; `syscall` names it and `filename` the object."""

    def __init__(self, errno: int, syscall: str, path: str = "") -> None:
        super().__init__(errno, os.strerror(errno), path or None)
        self.syscall = syscall

    def __str__(self) -> str:
        where = f" {self.filename}" if self.filename else ""
        return f"{self.syscall}{where}: {self.strerror}"


def bind(name: str, *argtypes: type, restype: type = ctypes.c_int):
    """Return the libc function `name` with its own prototype."""
    # libc["mount"] is a new function object each time; libc.mount is one shared object, and argtypes
    # set on it by one wrapper would be seen by every other.
    function = libc[name]
    function.argtypes = argtypes
    function.restype = restype  # c_long only for syscall(): as c_long, an int -1 reads as 4294967295
    return function


def check(result: int, syscall: str, path: str = "") -> int:
    """Return `result`, or raise the KernelError that errno stands for."""
    if result < 0:
        raise KernelError(ctypes.get_errno(), syscall, path)
    return result


_syscall = libc["syscall"]
_syscall.restype = ctypes.c_long


def call(number: int, *arguments: object) -> int:
    """Make a raw system call; integers are passed as longs, everything else as ctypes passes it."""
    return _syscall(
        ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    )


def old_number(name: str) -> int:
    """Return the number of a call that is older than the common table, on this machine.

    Raises KeyError for an architecture sysctr was not built for.
    """
    return _OLD_NUMBERS[os.uname().machine][name]
