"""Volumes on btrfs, each a subvolume: snapshots, clones and rollbacks take a moment, whatever the size.

    POOL/layers/NAME/rootfs                 a template, read-only
    POOL/volumes/ID/rootfs-RANDOM           a volume
    POOL/volumes/ID/snapshots/NAME.rootfs   a snapshot, read-only
    RUN/ID                                  says that a volume is active

A limit is that of the subvolume's quota group: on all that it refers to, what it shares with others too.
Sources: btrfs-subvolume(8), btrfs-qgroup(8), include/uapi/linux/btrfs.h, fs/btrfs/sysfs.c.
"""

import contextlib
import fcntl
import logging
import os
import struct
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from sysctr.errors import Refused, SysctrError, UsageError
from sysctr.linux import process
from sysctr.storage import btrfs_stream, tree
from sysctr.storage.base import Base, Pause, RootSpec, Traits, Tree, Worker
from sysctr.storage.recorded import RecordedDriver

log = logging.getLogger(__name__)

# Below, the metadata of an empty system does not fit.
MIN_SIZE_BYTES = 1 << 20

_FS_INFO = 0x8400941F
_INO_LOOKUP = 0xD0009412
# struct btrfs_ioctl_fs_info_args and btrfs_ioctl_ino_lookup_args.
_FS_INFO_BYTES, _INO_LOOKUP_BYTES = 1024, 4096
_FSID_AT = 16
# The inode number of every subvolume's root, and of nothing else.
_SUBVOLUME_INODE = 256
_NO_LIMIT = (0, (1 << 64) - 1)


class BtrfsDriver(RecordedDriver):
    """The storage driver for subvolumes of btrfs."""

    kind = "btrfs"
    disk = "rootfs"
    traits = Traits(
        shared_base=True, cheap_snapshots=True, cheap_clones=True, needs_freeze=False, enforces_size=True,
        grows_live=True, shrinks=True, native_stream=True,
    )  # fmt: skip

    def __init__(self, pool: str, run_directory: str) -> None:
        super().__init__(pool, run_directory)
        self.records.trash = tree.Trash(self.records.trash.directory, self._delete)
        self._groups = ""

    def prepare(self) -> None:
        """Make the pool's directories and turn its quotas on; raises Refused where there is no btrfs."""
        doing = f"use pool {self.directory}"
        tree.ensure_directory(self.directory)
        with self.records.explained(doing):
            fsid = _file_system(self.directory)
        if not fsid:
            raise Refused(
                f"cannot {doing}: it is not on btrfs",
                hint="mount one there, or choose the driver overlay or loop",
            )
        super().prepare()
        self._groups = f"/sys/fs/btrfs/{fsid}/qgroups"
        if not os.path.exists(self._groups):
            self._enable_quotas(doing)

    def _enable_quotas(self, doing: str) -> None:
        enable = ["btrfs", "quota", "enable"]
        try:
            # Of Linux 6.7: counts what each subvolume wrote, and costs nothing when snapshots are deleted.
            process.run([*enable, "--simple", self.directory])
        except process.ProgramFailed as error:
            log.debug("%s", error)
            self._run([*enable, self.directory], doing)

    def sweep(self) -> None:
        """Throw away what a crash left, and forget the quota groups of subvolumes that are gone."""
        super().sweep()
        with contextlib.suppress(SysctrError):
            self._run(["btrfs", "qgroup", "clear-stale", self.directory], "sweep quota groups")

    def _sweep(self, volume: str) -> None:
        super()._sweep(volume)
        size_bytes, disk = self.size(volume), self._disk(volume)
        if self._number(disk, "max_referenced") != size_bytes:
            self._limit(disk, size_bytes, f"limit volume {volume}")

    def activate(self, volume: str) -> RootSpec:
        """Return a volume's subvolume as a root, and note that it is in use."""
        disk = self._disk(volume)
        with self.records.explained(f"activate volume {volume}"):
            if not os.path.isdir(disk):
                raise SysctrError(f"cannot use volume {volume}: {disk} is missing")
            os.makedirs(self.run, mode=0o700, exist_ok=True)
            os.close(os.open(f"{self.run}/{volume}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        return RootSpec((Tree("volume", disk),))

    def deactivate(self, volume: str) -> None:
        """Note that a volume is not in use any more."""
        self.records.path(volume)  # the name of a volume
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.run}/{volume}")

    def active(self) -> frozenset[str]:
        """Return the volumes that are in use."""
        try:
            return frozenset(os.listdir(self.run))
        except FileNotFoundError:
            return frozenset()

    def resize(self, volume: str, size_bytes: int | None, worker: Worker) -> None:
        """Change a volume's limit, in use or not; raises Refused below what it holds."""
        doing = f"resize volume {volume}"
        disk, before = self._disk(volume), self.size(volume)
        with self.records.explained(doing), contextlib.ExitStack() as undo:
            if size_bytes is not None:
                tree.sync_file_system(disk)
                self._check_size(disk, size_bytes, doing)
            undo.callback(self._limit, disk, before, doing)
            self._limit(disk, size_bytes, doing)
            self._point("resize.resized")
            self._set_limit(volume, size_bytes)
            undo.pop_all()
        self._point("resize.recorded")

    def usage(self, volume: str) -> int | None:
        """Return the bytes that nothing but the volume refers to, as of the last commit (every 30 s)."""
        try:
            return self._number(self._disk(volume), "exclusive")
        except OSError:
            return None

    def filled(self, volume: str) -> int | None:
        """Return the bytes that the volume refers to: its limit counts what it shares with snapshots too."""
        try:
            return self._number(self._disk(volume), "referenced")
        except OSError:
            return None

    def measure(self, volume: str) -> int:
        """Return the same as of now."""
        disk = self._disk(volume)
        with self.records.explained(f"measure volume {volume}"):
            tree.sync_file_system(disk)
            return self._number(disk, "exclusive") or 0

    def send(self, volume: str, snapshot: str, out_fd: int, base: str = "") -> None:
        """Write a snapshot to a descriptor as btrfs-send(8) does, or what of it differs from `base`."""
        doing = f"send snapshot {snapshot} of volume {volume}"
        disk, _ = self._source(volume, snapshot, doing)
        below = self._source(volume, base, doing)[0] if base else ""
        btrfs_stream.send(disk, out_fd, doing, below)

    def receive(self, volume: str, name: str, in_fd: int, note: Mapping[str, Any]) -> None:
        """Make a snapshot of a volume of what `send` wrote, of a trusted peer; the volume stays as it is."""
        doing = f"receive snapshot {name} of volume {volume}"
        self.records.check_new_snapshot(volume, name)
        kept = self._kept(volume, name)
        with self.records.explained(doing), contextlib.ExitStack() as undo:
            with contextlib.suppress(FileExistsError):
                os.mkdir(os.path.dirname(kept), 0o700)
            self._discard(kept)
            undo.callback(self._discard, kept)
            btrfs_stream.receive(os.path.dirname(kept), os.path.basename(kept), in_fd, doing)
            self._point("receive.received")
            with self.records.lock:
                limit = {"limit_bytes": self.records.size(volume)}
                self.records.write_snapshot(volume, self.records.new_snapshot(volume, name, note, limit))
            undo.pop_all()
        self._point("receive.recorded")

    def _make_disk(self, path: str, size_bytes: int | None) -> int | None:
        doing = f"make subvolume {path}"
        self._run(["btrfs", "subvolume", "create", path], doing)
        os.chmod(path, 0o755)  # whatever the umask is
        if size_bytes is not None:
            self._check_size(path, size_bytes, doing)
            self._limit(path, size_bytes, doing)
        return size_bytes

    def _fill_disk(self, path: str, base: Base, worker: Worker) -> None:
        self._make_disk(path, None)
        worker.copy(RootSpec((Tree("base", base.tree, read_only=True),)), path)
        self._run(["btrfs", "property", "set", "-t", "subvol", path, "ro", "true"], f"close {path}")

    def _copy_disk(self, source: str, target: str, size_bytes: int | None) -> int | None:
        doing = f"copy subvolume {source}"
        self._run(["btrfs", "subvolume", "snapshot", source, target], doing)
        if size_bytes is not None:
            # Making it has committed all there was, and the numbers of its group are those of now.
            self._check_size(target, size_bytes, doing)
            self._limit(target, size_bytes, doing)
        return size_bytes

    def _keep_disk(self, volume: str, disk: str, target: str, pause: Pause | None) -> None:
        if pause is not None:
            # What is written before the pause need not be written in it.
            tree.sync_file_system(disk)
        with (pause or contextlib.nullcontext)():
            self._run(
                ["btrfs", "subvolume", "snapshot", "-r", disk, target], f"take a snapshot of volume {volume}"
            )

    @contextlib.contextmanager
    def _view(self, disk: str) -> Iterator[RootSpec]:
        yield RootSpec((Tree("volume", disk, read_only=True),))

    def _check_size(self, disk: str, size_bytes: int, doing: str) -> None:
        if size_bytes < MIN_SIZE_BYTES:
            raise UsageError(f"cannot {doing}: a limit of {size_bytes} bytes is less than 1 MiB")
        used = self._number(disk, "referenced") or 0
        if used > size_bytes:
            raise Refused(
                f"cannot {doing}: its files take {_mib(used)}, which is more than {_mib(size_bytes)}",
                hint="delete files in it first",
            )

    def _limit(self, disk: str, size_bytes: int | None, doing: str) -> None:
        limit = "none" if size_bytes is None else str(size_bytes)
        self._run(["btrfs", "qgroup", "limit", limit, disk], doing)

    def _number(self, disk: str, name: str) -> int | None:
        """Return one number of a subvolume's quota group; None for no limit. Raises OSError."""
        with open(f"{self._groups}/0_{_subvolume_id(disk)}/{name}", encoding="ascii") as file:
            number = int(file.read())
        return None if name.startswith("max_") and number in _NO_LIMIT else number

    def _discard(self, path: str) -> None:
        # A read-only subvolume cannot be renamed, and deleting one takes a moment.
        try:
            self._delete(path)
        except SysctrError as error:
            log.warning("%s stays for now: %s", path, error)

    def _delete(self, path: str) -> None:
        """Delete a directory of ours and the subvolumes in it."""
        doing = f"delete {path}"
        delete = ["btrfs", "subvolume", "delete"]
        with self.records.explained(doing):
            for disk in _subvolumes(path):
                try:
                    self._run([*delete, disk], doing)
                except SysctrError:
                    # Has it subvolumes of its own? A container cannot make any, but an administrator can.
                    for number in self._below(_subvolume_id(disk)):
                        self._run([*delete, "--subvolid", str(number), self.directory], doing)
                    self._run([*delete, disk], doing)
        tree.delete(path)

    def _below(self, number: int) -> list[int]:
        """Return the subvolumes below a subvolume, the deepest first."""
        done = self._run(["btrfs", "subvolume", "list", "-p", self.directory], "list subvolumes")
        parents = {}
        for line in done.stdout.decode(errors="replace").splitlines():
            words = line.split()
            parents[int(words[1])] = int(words[words.index("parent") + 1])
        return list(_descendants(number, parents))

    def _run(self, argv: list[str], doing: str) -> process.Completed:
        return tree.run_tool(argv, doing, self.directory, "btrfs-progs")


def _descendants(number: int, parents: Mapping[int, int]) -> Iterator[int]:
    """Yield what is below a number in a tree, children before their parents.

    >>> list(_descendants(1, {2: 1, 3: 2, 4: 9}))
    [3, 2]
    """
    for child, parent in parents.items():
        if parent == number:
            yield from _descendants(child, parents)
            yield child


def _subvolumes(path: str) -> Iterator[str]:
    """Yield the subvolumes in a directory of ours; nothing looks into one."""
    try:
        state = os.lstat(path)
    except FileNotFoundError:
        return
    if not os.path.isdir(path) or os.path.islink(path):
        return
    if state.st_ino == _SUBVOLUME_INODE:
        yield path
        return
    for name in os.listdir(path):
        yield from _subvolumes(f"{path}/{name}")


def _file_system(path: str) -> str:
    """Return the UUID of the btrfs that a directory is on, "" where it is on another file system."""
    directory_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        info = bytearray(_FS_INFO_BYTES)
        fcntl.ioctl(directory_fd, _FS_INFO, info)
    except OSError:
        return ""
    finally:
        os.close(directory_fd)
    return str(uuid.UUID(bytes=bytes(info[_FSID_AT : _FSID_AT + 16])))


def _subvolume_id(path: str) -> int:
    """Return the number of the subvolume at a path."""
    directory_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # The tree that a directory is in: that of the descriptor, where the first field is 0.
        argument = bytearray(_INO_LOOKUP_BYTES)
        struct.pack_into("=QQ", argument, 0, 0, _SUBVOLUME_INODE)
        fcntl.ioctl(directory_fd, _INO_LOOKUP, argument)
    finally:
        os.close(directory_fd)
    return int(struct.unpack_from("=Q", argument)[0])


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"
