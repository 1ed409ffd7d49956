"""Quotas of projects, and which project a file belongs to; the same calls serve ext4 and xfs.

A project is a number that files carry. A directory with FS_XFLAG_PROJINHERIT gives its number to all that is
made in it, and takes in by link(2) and rename(2) only what has it: all else is EXDEV. The kernel lets nobody
change the number or the flag from within a user namespace (fs/ioctl.c, fileattr_set_prepare).

Sources: quotactl(2), ioctl_xfs_fsgetxattr(2), include/uapi/linux/quota.h, dqblk_xfs.h and
fs.h, fs/quota/quota.c.
"""

import ctypes
import errno
import fcntl
import struct
from typing import NamedTuple

from sysctr.linux import syscall
from sysctr.linux.syscall import KernelError, check

FS_XFLAG_PROJINHERIT = 0x200
# What Q_XGETQSTATV tells: projects are counted, and their limits hold.
FS_QUOTA_PDQ_ACCT = 1 << 4
FS_QUOTA_PDQ_ENFD = 1 << 5

_PRJQUOTA = 2
_Q_GETQUOTA = 0x800007
_Q_SETQUOTA = 0x800008
_Q_GETNEXTQUOTA = 0x800009
_Q_XGETQSTATV = ord("X") << 8 | 8
_QIF_LIMITS = 1 | 4  # of blocks and of inodes
# Limits of space are counted in these; what is used, in bytes.
_BLOCK_BYTES = 1024

# struct if_dqblk: limits of blocks (hard, soft) and bytes used; the same of inodes; two times; what is valid.
# In struct if_nextdqblk a number follows, where the former has padding.
_DQBLK = "=8QII"
# struct fs_quota_statv: version, flags; the rest is not looked at. It has 160 bytes.
_STATV = "=bxH"
_STATV_BYTES = 256
# struct fsxattr: xflags, extsize, nextents, projid, cowextsize.
_FSXATTR = "=5I8x"
_FS_IOC_FSGETXATTR = 0x801C581F
_FS_IOC_FSSETXATTR = 0x401C5820
# struct xfs_fs_eofblocks: version, flags, uid, gid, prid; the size of the smallest file.
_EOFBLOCKS = "=5I4xQ96x"
_XFS_IOC_FREE_EOFBLOCKS = 0x8080583A
_XFS_EOF_FLAGS_SYNC = 1
_XFS_EOF_FLAGS_PRID = 8


class Quota(NamedTuple):
    """What a project uses of a file system and may use; a limit of 0 is none."""

    project: int
    limit_bytes: int = 0
    used_bytes: int = 0
    limit_inodes: int = 0
    used_inodes: int = 0


class Fsxattr(NamedTuple):
    """The attributes of a file that file systems share; not those that setxattr(2) sets."""

    xflags: int
    extsize: int
    nextents: int
    projid: int
    cowextsize: int


def quotactl_fd(fd: int, command: int, number: int, argument: ctypes.Array) -> None:
    """Make a call about the quota of project `number` on the file system that `fd` is on."""
    check(
        syscall.call(syscall.QUOTACTL_FD, fd, command << 8 | _PRJQUOTA, number, argument),
        "quotactl_fd",
        f"fd {fd}",
    )


def project_flags(fd: int) -> int:
    """Return which of FS_QUOTA_PDQ_* hold on the file system of `fd`; 0 where it has no such quotas."""
    # The version asked for; every other byte is the kernel's.
    buffer = ctypes.create_string_buffer(struct.pack(_STATV, 1, 0), _STATV_BYTES)
    try:
        quotactl_fd(fd, _Q_XGETQSTATV, 0, buffer)
    except KernelError as error:
        if error.errno in (errno.ENOSYS, errno.EINVAL, errno.ESRCH, errno.EOPNOTSUPP):
            return 0
        raise
    flags: int = struct.unpack_from(_STATV, buffer)[1]
    return flags & (FS_QUOTA_PDQ_ACCT | FS_QUOTA_PDQ_ENFD)


def get_quota(fd: int, project: int) -> Quota:
    """Return the quota of a project; one that nothing was ever counted for has none and uses nothing."""
    buffer = ctypes.create_string_buffer(struct.calcsize(_DQBLK))
    try:
        quotactl_fd(fd, _Q_GETQUOTA, project, buffer)
    except KernelError as error:
        if error.errno == errno.ENOENT:  # xfs
            return Quota(project)
        raise
    return _quota(project, buffer.raw)


def next_quota(fd: int, project: int) -> Quota | None:
    """Return the quota of the first project from this number on that is known there; None for none."""
    buffer = ctypes.create_string_buffer(struct.calcsize(_DQBLK))
    try:
        quotactl_fd(fd, _Q_GETNEXTQUOTA, project, buffer)
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return _quota(struct.unpack(_DQBLK, buffer.raw)[9], buffer.raw)


def set_quota(fd: int, project: int, limit_bytes: int, limit_inodes: int) -> None:
    """Set the limits of a project; 0 is none. One below what is used only stops growth.

    A limit of space becomes a whole number of blocks (of 1 KiB, or the file system's), rounded up.
    """
    data = struct.pack(
        _DQBLK, -(-limit_bytes // _BLOCK_BYTES), 0, 0, limit_inodes, 0, 0, 0, 0, _QIF_LIMITS, 0
    )
    quotactl_fd(fd, _Q_SETQUOTA, project, ctypes.create_string_buffer(data, len(data)))


def _quota(project: int, data: bytes) -> Quota:
    blocks, _, used_bytes, inodes, _, used_inodes, *_ = struct.unpack(_DQBLK, data)
    return Quota(project, blocks * _BLOCK_BYTES, used_bytes, inodes, used_inodes)


def fsgetxattr(fd: int) -> Fsxattr:
    """Return the attributes of an open file or directory; OSError where its file system has none."""
    data = bytearray(struct.calcsize(_FSXATTR))
    fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, data)
    return Fsxattr(*struct.unpack(_FSXATTR, data))


def fssetxattr(fd: int, attributes: Fsxattr) -> None:
    """Set the attributes of an open file or directory; OSError."""
    fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, struct.pack(_FSXATTR, *attributes))


def xfs_free_eofblocks(fd: int, project: int) -> None:
    """Take back what xfs has reserved for files of a project to grow, and finish what was deleted; OSError.

    Both happen by themselves a moment later, and count as used until then.
    """
    flags = _XFS_EOF_FLAGS_SYNC | _XFS_EOF_FLAGS_PRID
    fcntl.ioctl(fd, _XFS_IOC_FREE_EOFBLOCKS, struct.pack(_EOFBLOCKS, 1, flags, 0, 0, project, 0))
