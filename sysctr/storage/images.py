"""File systems in files: sparse ext4 images on loop devices, made, mounted, copied and resized.

Every image was made here and only ever written by the kernel through its own mount. One that comes from
elsewhere must never get here: ext4 trusts what it reads.

A volume lies in the image's directory CONTENT, beside lost+found, so that its root is a directory like any
other. The mount is nodev, but not nosuid: a container's bind of it would inherit that, and su and sudo in
there would fail. Therefore the directory above a mount point has to be closed to all but root.
Sources: loop(4), ioctl_ficlonerange(2), ext4(5), include/uapi/linux/loop.h, include/uapi/linux/fs.h.
"""

import contextlib
import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator

from sysctr.errors import NotFound, Refused, SysctrError, UsageError, WrongState
from sysctr.linux import mount as mounts
from sysctr.linux import process
from sysctr.storage import tree

CONTENT = "rootfs"
# Below, the journal that ext4 wants leaves too little for anything else.
MIN_SIZE_BYTES = 16 << 20
MAX_SIZE_BYTES = 16 << 40

_BLOCK_BYTES = 4096
# A container has many small files: mke2fs's own 16 KiB for each inode is meant for a disk of everything. The
# tables are holes in the image until they are used.
_BYTES_PER_INODE = 8192
# A journal keeps its size when the image grows. What mke2fs takes for 16 GiB is enough for more, too.
_MIN_JOURNAL_MIB, _MAX_JOURNAL_MIB = 4, 64

_LOOP_GET_STATUS64 = 0x4C05
_LOOP_SET_CAPACITY = 0x4C07
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
_LO_FLAGS_DIRECT_IO = 16
# struct loop_info64: device, inode, rdevice, offset, sizelimit; number, two for encryption, flags; file name,
# crypt name, key; init.
_INFO64 = "=5Q4I64s64s32s2Q"
# struct loop_config: fd, block size, the former; reserved.
_CONFIG_HEAD, _CONFIG_TAIL = "=II", "=8Q"
# Others take loop devices too, and may be faster.
_LOOP_TRIES = 100

_FICLONE = 0x40049409
_BTRFS_FS_INFO = 0x8400941F
_FIFREEZE = 0xC0045877
_FITHAW = 0xC0045878

# Of the superblock: s_magic, s_state, and s_feature_incompat with the bit that says "replay my journal".
_SUPERBLOCK_AT = 1024
_MAGIC_AT, _STATE_AT, _INCOMPATIBLE_AT = 0x38, 0x3A, 0x60
_MAGIC = b"\x53\xef"
_HAS_ERRORS = 0x2
_NEEDS_RECOVERY = 0x4


def make(path: str, size_bytes: int) -> None:
    """Make an image of an ext4 with an empty CONTENT, at a path where nothing is; what is empty is a hole.

    Raises NoSpace, UsageError for a size that cannot be, or SysctrError; then there is no file.
    """
    doing = f"make the disk {path}"
    check_size(doing, size_bytes)
    journal = min(max(size_bytes >> 24, _MIN_JOURNAL_MIB), _MAX_JOURNAL_MIB)
    options = [
        "-m", "0", "-i", str(_BYTES_PER_INODE), "-b", str(_BLOCK_BYTES), "-e", "remount-ro",
        "-J", f"size={journal}",
    ]  # fmt: skip
    # All of it is a hole, which reads as zeros: nothing has to be written, now or by a thread after mounting.
    extended = "lazy_itable_init=0,lazy_journal_init=1,root_owner=0:0"
    with _new_file(path, doing) as file_fd:
        os.ftruncate(file_fd, size_bytes // _BLOCK_BYTES * _BLOCK_BYTES)
        _run(["mkfs.ext4", "-q", "-F", *options, "-E", extended, path], doing, path)
        _run(["debugfs", "-w", "-R", f"mkdir /{CONTENT}", path], doing, path)
        os.fsync(file_fd)


def check_size(doing: str, size_bytes: int) -> None:
    """Raise UsageError for a size that no image can have."""
    if not MIN_SIZE_BYTES <= size_bytes <= MAX_SIZE_BYTES:
        raise UsageError(
            f"cannot {doing}: a disk of {_mib(size_bytes)} is not between {_mib(MIN_SIZE_BYTES)} and "
            f"{MAX_SIZE_BYTES >> 40} TiB"
        )


def mount(path: str, directory: str, *, read_only: bool = False) -> None:
    """Mount an image at a directory, which is made; one that is mounted there already is fine.

    An image whose file system somebody still holds is that file system again: two of them on one file would
    destroy it. The loop device goes with its last user. Raises NotFound, WrongState or SysctrError.
    """
    doing = f"mount the disk {path}"
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        if mounted(directory):
            return
        if not held(path):
            settle(path)
        device_fd = _device(path, read_only=read_only)
        try:
            device = os.readlink(f"/proc/self/fd/{device_fd}")
            flags = mounts.MS_NODEV | (mounts.MS_RDONLY if read_only else 0)
            # Blocks that are freed inside become holes in the image. Tables that were never written are
            # holes, too, which a thread of the kernel would else fill with zeros.
            mounts.mount(device, directory, "ext4", flags, None if read_only else "discard,noinit_itable")
        finally:
            os.close(device_fd)
    except FileNotFoundError as error:
        raise NotFound(f"cannot {doing}: there is no {error.filename or path}") from error
    except OSError as error:
        if error.errno == errno.EBUSY:
            how = "read-only " if not read_only else ""
            raise WrongState(f"cannot {doing}: it is mounted {how}elsewhere") from error
        if error.errno == errno.ENODEV:
            raise Refused(f"cannot {doing}: this kernel has no ext4", hint="modprobe ext4") from error
        raise tree.explain(error, doing, os.path.dirname(path)) from error


def unmount(directory: str) -> None:
    """Take a mount away, and its directory; where nothing is mounted, or nothing at all is, is fine."""
    try:
        while mounted(directory):
            try:
                mounts.umount2(directory)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                # Somebody looks around in there; the file system goes when they leave.
                mounts.umount2(directory, mounts.MNT_DETACH)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(directory)
    except OSError as error:
        raise tree.explain(error, f"unmount {directory}", directory) from error


def mounted(directory: str) -> bool:
    """Tell whether something is mounted at a directory."""
    return os.path.ismount(directory)


def held(path: str) -> bool:
    """Tell whether an image is in use by a loop device: mounted, or still held after it was unmounted."""
    try:
        with _opened_devices(path) as device_fds:
            return bool(device_fds)
    except FileNotFoundError:
        return False


def grow(path: str, directory: str | None, size_bytes: int) -> None:
    """Make an image and its file system larger; `directory` is where it is mounted, None if it is not.

    Mounted, it takes a moment; else it is checked first. Raises NoSpace, Refused, UsageError for a size that
    is smaller or cannot be, SysctrError; then the size is as before.
    """
    doing = f"grow the disk {path}"
    check_size(doing, size_bytes)
    size_bytes = size_bytes // _BLOCK_BYTES * _BLOCK_BYTES
    try:
        # The file can be larger than its file system, if a crash came between the two.
        before = size_of(path)
        if size_bytes < before:
            raise UsageError(f"cannot {doing}: {_mib(size_bytes)} is less than the {_mib(before)} it has")
        os.truncate(path, size_bytes)
        try:
            if directory is None:
                _check(path, doing)
                _run(["resize2fs", path], doing, path)
            else:
                _grow_mounted(directory, doing)
        except BaseException:
            # What is cut off is a hole, as the file system did not grow into it.
            if size_of(path) <= before:
                os.truncate(path, before)
                if directory is not None:
                    _update_capacity(directory)
            raise
    except OSError as error:
        raise tree.explain(error, doing, os.path.dirname(path)) from error


def _grow_mounted(directory: str, doing: str) -> None:
    device = _update_capacity(directory)
    try:
        _run(["resize2fs", device], doing, directory)
    except SysctrError as error:
        if "Permission denied to resize" not in error.message:
            raise
        raise Refused(
            f"cannot {doing}: the kernel lets only a process with CAP_SYS_RESOURCE grow what is mounted",
            hint="stop the container first",
        ) from error


def _update_capacity(directory: str) -> str:
    number = os.stat(directory).st_dev
    with open(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/uevent", encoding="ascii") as file:
        name = dict(line.rstrip("\n").split("=", 1) for line in file)["DEVNAME"]
    device_fd = os.open(f"/dev/{name}", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device_fd, _LOOP_SET_CAPACITY)
    finally:
        os.close(device_fd)
    return f"/dev/{name}"


def shrink(path: str, size_bytes: int) -> None:
    """Make an image that is not mounted smaller: work on a copy of it that nobody needs if this fails.

    A crash in the middle would cost the file system. Raises Refused with numbers for a size below what its
    files take, WrongState for one in use, UsageError, SysctrError.
    """
    doing = f"shrink the disk {path}"
    check_size(doing, size_bytes)
    if held(path):
        raise WrongState(f"cannot {doing}: it is in use")
    _check(path, doing)
    least = least_size_bytes(path)
    if size_bytes < least:
        raise Refused(
            f"cannot {doing}: its files need {_mib(least)}, which is more than {_mib(size_bytes)}",
            hint="delete files in it first",
        )
    size_bytes = size_bytes // _BLOCK_BYTES * _BLOCK_BYTES
    _run(["resize2fs", path, f"{size_bytes // 1024}K"], doing, path)
    try:
        os.truncate(path, size_bytes)
    except OSError as error:
        raise tree.explain(error, doing, os.path.dirname(path)) from error


def least_size_bytes(path: str) -> int:
    """Return how far an image that was just checked can shrink, as resize2fs estimates it."""
    done = _run(["resize2fs", "-P", path], f"measure the disk {path}", path)
    blocks = re.search(rb": (\d+)\s*$", done.stdout)
    if blocks is None:
        raise SysctrError(f"cannot measure the disk {path}: resize2fs said {done.stdout!r}")
    return int(blocks[1]) * _BLOCK_BYTES


def size_of(path: str) -> int:
    """Return the size of the file system in an image, which a crash can leave smaller than the file."""
    try:
        with _opened_devices(path) as device_fds, open(path, "rb") as image:
            # A mounted one writes its superblock to the file when it likes.
            block = os.pread(device_fds[0] if device_fds else image.fileno(), 1024, _SUPERBLOCK_AT)
    except OSError as error:
        raise tree.explain(error, f"read the disk {path}", os.path.dirname(path)) from error
    if len(block) < 1024 or block[_MAGIC_AT : _MAGIC_AT + 2] != _MAGIC:
        raise SysctrError(f"cannot read the disk {path}: it is damaged")
    low, high = struct.unpack_from("<I", block, 4)[0], struct.unpack_from("<I", block, 0x150)[0]
    return (high << 32 | low) * _BLOCK_BYTES


def settle(path: str) -> None:
    """Bring the last changes from the journal into the file system of an image that is not mounted.

    Only what was not unmounted in order (the host crashed) has any. What the kernel found wrong is repaired.
    """
    with open(path, "rb") as image:
        block = os.pread(image.fileno(), 1024, _SUPERBLOCK_AT)
    doing = f"repair the disk {path}"
    if len(block) < 1024 or block[_MAGIC_AT : _MAGIC_AT + 2] != _MAGIC:
        raise SysctrError(f"cannot {doing}: it is damaged")
    if struct.unpack_from("<H", block, _STATE_AT)[0] & _HAS_ERRORS:
        _check(path, doing)
    elif struct.unpack_from("<I", block, _INCOMPATIBLE_AT)[0] & _NEEDS_RECOVERY:
        _run(["e2fsck", "-E", "journal_only", "-y", path], doing, path, accept=(0, 1))


def copy(source: str, target: str, *, sync: bool = True) -> None:
    """Copy an image to a path where nothing is; blocks are shared where the file system can, holes stay.

    Of a mounted one the copy is only good while it is `frozen`. Without `sync` that is left to do.
    Raises NoSpace or SysctrError; then there is no `target`.
    """
    doing = f"copy the disk {source}"
    with _new_file(target, doing) as target_fd:
        source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not _share(source_fd, target_fd):
                _run(["cp", "--reflink=never", "--sparse=always", "--", source, target], doing, target)
        finally:
            os.close(source_fd)
        if sync:
            os.fsync(target_fd)


def sync(path: str) -> None:
    """Put an image that was copied on the disk."""
    try:
        image_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(image_fd)
        finally:
            os.close(image_fd)
    except OSError as error:
        raise tree.explain(error, f"write the disk {path}", os.path.dirname(path)) from error


def can_reflink(directory: str) -> bool:
    """Tell whether files in a directory can share blocks, as on btrfs and xfs, so that copies are cheap."""
    try:
        with contextlib.ExitStack() as stack:
            flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
            fds = [os.open(directory, flags, 0o600) for _ in range(2)]
            for fd in fds:
                stack.callback(os.close, fd)
            return _share(*fds)
    except OSError as error:
        raise tree.explain(error, f"use {directory}", directory) from error


@contextlib.contextmanager
def frozen(directory: str) -> Iterator[None]:
    """Hold all writes to a mounted image while entered, with everything before them in the file.

    After a crash in there only `thaw` lets the writers go on.
    """
    directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(directory_fd, _FIFREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(directory_fd, _FITHAW, 0)
    except OSError as error:
        raise tree.explain(error, f"freeze {directory}", directory) from error
    finally:
        os.close(directory_fd)


def thaw(directory: str) -> None:
    """End what a crash left `frozen`; one that is not frozen is fine."""
    directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(directory_fd, _FITHAW, 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise tree.explain(error, f"thaw {directory}", directory) from error
    finally:
        os.close(directory_fd)


def _check(path: str, doing: str) -> None:
    """Let e2fsck see that all is well, which resize2fs wants before it moves anything."""
    _run(["e2fsck", "-f", "-y", path], doing, path, accept=(0, 1))


def _share(source_fd: int, target_fd: int) -> bool:
    try:
        fcntl.ioctl(target_fd, _FICLONE, source_fd)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV):
            return False
        raise
    return True


@contextlib.contextmanager
def _new_file(path: str, doing: str) -> Iterator[int]:
    """Yield a descriptor of a file that stays only if nothing fails."""
    try:
        file_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise WrongState(f"cannot {doing}: {path} exists already") from error
    except OSError as error:
        raise tree.explain(error, doing, os.path.dirname(path)) from error
    try:
        yield file_fd
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        if isinstance(error, OSError):
            raise tree.explain(error, doing, os.path.dirname(path)) from error
        raise
    finally:
        os.close(file_fd)


def _run(argv: list[str], doing: str, path: str, accept: tuple[int, ...] = (0,)) -> process.Completed:
    return tree.run_tool(argv, doing, os.path.dirname(path), "e2fsprogs", accept)


def _device(path: str, *, read_only: bool) -> int:
    """Return an open loop device of an image: one that has it already, or a new one."""
    file_fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with _opened_devices(path) as device_fds:
            if device_fds:
                return os.dup(device_fds[0])
        for _ in range(_LOOP_TRIES):
            control_fd = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
            try:
                number = fcntl.ioctl(control_fd, _LOOP_CTL_GET_FREE)
            finally:
                os.close(control_fd)
            device_fd = os.open(f"/dev/loop{number}", os.O_RDWR | os.O_CLOEXEC)
            flags = _LO_FLAGS_AUTOCLEAR | (_LO_FLAGS_READ_ONLY if read_only else 0)
            if not _is_on_btrfs(file_fd):
                # Else everything is in memory twice.
                flags |= _LO_FLAGS_DIRECT_IO
            # The name is for losetup(8), which has more of it from sysfs.
            info = struct.pack(_INFO64, *[0] * 8, flags, os.fsencode(path)[:63], b"", b"", 0, 0)
            config = struct.pack(_CONFIG_HEAD, file_fd, 0) + info + struct.pack(_CONFIG_TAIL, *[0] * 8)
            try:
                fcntl.ioctl(device_fd, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(device_fd)
                if error.errno != errno.EBUSY:
                    raise
                continue  # somebody else was faster
            return device_fd
        raise OSError(errno.EBUSY, "every free loop device was taken by others", path)
    finally:
        os.close(file_fd)


def _is_on_btrfs(file_fd: int) -> bool:
    """Tell whether a file is on btrfs: a page that changes while it is written breaks its checksum there."""
    try:
        fcntl.ioctl(file_fd, _BTRFS_FS_INFO, bytearray(1024))
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _opened_devices(path: str) -> Iterator[list[int]]:
    """Yield descriptors of the loop devices that an image has; while open, they keep it."""
    state = os.stat(path)
    wanted = os.major(state.st_dev), os.minor(state.st_dev), state.st_ino
    # Most devices are told apart by the end of a path, without opening them: a volume's directory has its
    # name, wherever this mount namespace sees the pool.
    ending = "/".join(["", *os.path.realpath(path).split("/")[-2:]])
    with contextlib.ExitStack() as stack:
        found = []
        for name in os.listdir("/sys/block"):
            with contextlib.suppress(FileNotFoundError, OSError):
                if not name.startswith("loop"):
                    continue
                with open(f"/sys/block/{name}/loop/backing_file", encoding="utf-8") as file:
                    if not file.read().rstrip("\n").endswith(ending):
                        continue
                device_fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, device_fd)
                status = bytearray(struct.calcsize(_INFO64))
                fcntl.ioctl(device_fd, _LOOP_GET_STATUS64, status)
                device, inode = struct.unpack_from("=QQ", status)
                # huge_encode_dev(): the minor's lower 8 bits, 12 of the major, the rest of the minor.
                minor = device & 0xFF | (device >> 12) & 0xFFF00
                if ((device >> 8) & 0xFFF, minor, inode) == wanted:
                    found.append(device_fd)
        yield found


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.0f} MiB"
