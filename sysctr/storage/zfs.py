"""Volumes on ZFS, each a dataset: snapshots, clones and rollbacks take a moment, whatever the size.

    POOL/                                   where the dataset PARENT is mounted: records, and notes
    POOL/layers/NAME/rootfs                 a note: the dataset of a template, and its snapshot
    POOL/volumes/ID/rootfs-RANDOM           a note: the dataset of a volume, PARENT/ID-RANDOM
    POOL/volumes/ID/snapshots/NAME.rootfs   a note: a snapshot, PARENT/ID-RANDOM@NAME-RANDOM
    POOL/held/DATASET                       a note: a dataset that is thrown away, but others stand on it
    RUN/ID                                  where the dataset of an active volume is mounted

A note is a small file with names below PARENT, written before what it names is made and deleted after that is
gone. So files are all that is renamed, and what a crash leaves is found. A note that is thrown away takes
what it names with it, as soon as nothing stands on it:

- A volume that is rolled back becomes a clone of the snapshot. Its old dataset is held while it has
  snapshots, but what was written after the last of them goes at once.
- A snapshot that a clone stands on is marked (`zfs destroy -d`), and goes with its last clone.
- When a single clone stands on a held dataset, it takes over what both share (`zfs promote`).

PARENT has 16 MiB reserved for the records, so that something can be destroyed when volumes fill the disk.
Sources: zfs-clone(8), zfs-destroy(8), zfs-promote(8), zfs-rollback(8).
"""

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Iterator

from sysctr.errors import Refused, SysctrError
from sysctr.linux import files, process
from sysctr.linux import mount as mounts
from sysctr.storage import images, tree
from sysctr.storage.base import Base, Pause, RootSpec, Traits, Tree, Worker
from sysctr.storage.recorded import RecordedDriver
from sysctr.storage.sizes import Sizes
from sysctr.storage.zfs_datasets import Dataset, Datasets, is_name

log = logging.getLogger(__name__)

_NOTE_MAX_BYTES = 64 << 10
_RESERVED_BYTES = 16 << 20


class ZfsDriver(RecordedDriver):
    """The storage driver for datasets of ZFS."""

    kind = "zfs"
    disk = "rootfs"
    traits = Traits(
        shared_base=True, cheap_snapshots=True, cheap_clones=True, needs_freeze=False, enforces_size=True,
        grows_live=True, shrinks=True, native_stream=False,
    )  # fmt: skip

    def __init__(self, pool: str, run_directory: str) -> None:
        super().__init__(pool, run_directory)
        self.records.trash = tree.Trash(self.records.trash.directory, self._delete)
        self.held = f"{pool}/held"
        self.datasets = Datasets(pool)
        self._sizes = Sizes(self._measure)
        self._letting_go = threading.Lock()

    def prepare(self) -> None:
        """Make the pool's directories; raises Refused where there is no dataset, or no id maps on it."""
        doing = f"use pool {self.directory}"
        with self.records.explained(doing):
            if not self.datasets.find():
                raise Refused(
                    f"cannot {doing}: no dataset of ZFS is mounted there",
                    hint=f"`zfs create -o mountpoint={self.directory} POOL/NAME` makes one",
                )
        super().prepare()
        tree.ensure_directory(self.held)
        reason = self._why_no_id_maps()
        if reason:
            raise Refused(
                f"cannot {doing}: its ZFS does not show files with a container's ids: {reason}",
                hint="ZFS does from version 2.2; with an older one choose the driver loop",
            )
        self.datasets.reserve(_RESERVED_BYTES, doing)

    def _why_no_id_maps(self) -> str:
        """Return why no mount of the directory can have an id map, "" if one can: it is tried."""
        # A namespace that outlives unshare(1), as a bind: the daemon cannot fork to make one.
        kept = f"{self.run}/{tree.hidden_name('ids', 'tried')}"
        with self.records.explained("make a user namespace"), contextlib.ExitStack() as undo:
            undo.callback(_clear, kept)
            os.close(os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            # With a mount namespace too, or it would be the new root who makes the bind, and may not.
            process.run(["unshare", f"--user={kept}", "--mount", "--map-root-user", "true"])
            userns_fd = os.open(kept, os.O_RDONLY | os.O_CLOEXEC)
            undo.callback(os.close, userns_fd)
            tree_fd = mounts.open_tree(self.directory)
            undo.callback(os.close, tree_fd)
            try:
                mounts.mount_setattr(tree_fd, userns_fd=userns_fd)
            except OSError as error:
                return (error.strerror or str(error)).lower()
        return ""

    def sweep(self) -> None:
        """Unmount what a crash left mounted for a moment, throw away garbage, put limits right."""
        for name in _entries(self.run):
            if name.startswith("."):
                with self.records.explained(f"unmount {name}"):
                    _clear(f"{self.run}/{name}")
        super().sweep()
        limits = self.datasets.limits()
        for volume in self.records.list():
            try:
                size_bytes, name = self.size(volume), self._dataset(volume)
                if limits.get(name, size_bytes) != size_bytes:
                    self.datasets.limit(name, size_bytes, f"limit volume {volume}")
            except SysctrError as error:
                log.warning("%s", error)

    def activate(self, volume: str) -> RootSpec:
        """Mount a volume's dataset, and return it as a root."""
        directory = f"{self.run}/{volume}"
        self._mount(self._dataset(volume), directory)
        return RootSpec((Tree("volume", directory),))

    def deactivate(self, volume: str) -> None:
        """Unmount a volume's dataset."""
        self.records.path(volume)  # the name of a volume
        images.unmount(f"{self.run}/{volume}")

    def active(self) -> frozenset[str]:
        """Return the volumes whose datasets are mounted."""
        return frozenset(
            name for name in _entries(self.run)
            if not name.startswith(".") and images.mounted(f"{self.run}/{name}")
        )  # fmt: skip

    def destroy(self, volume: str) -> None:
        """Take a volume and its snapshots away, on a full disk too; `empty_trash` deletes the data."""
        super().destroy(volume)
        self._sizes.forget(volume)

    def resize(self, volume: str, size_bytes: int | None, worker: Worker) -> None:
        """Change a volume's limit, in use or not; raises Refused below what it holds."""
        doing = f"resize volume {volume}"
        name, before = self._dataset(volume), self.size(volume)
        with contextlib.ExitStack() as undo:
            if size_bytes is not None:
                self.datasets.settle(doing)
                self.datasets.check_size(name, size_bytes, doing)
            undo.callback(self.datasets.limit, name, before, doing)
            self.datasets.limit(name, size_bytes, doing)
            self._point("resize.resized")
            self._set_limit(volume, size_bytes)
            undo.pop_all()
        self._point("resize.recorded")

    def usage(self, volume: str) -> int | None:
        """Return the bytes of its datasets, snapshots and all, as of a minute ago or less."""
        return self._sizes.usage(volume)

    def measure(self, volume: str) -> int:
        """Return the same as of now."""
        self.datasets.settle(f"measure volume {volume}")
        return self._sizes.measure(volume)

    def _measure(self, volume: str) -> int:
        names = {self._dataset(volume)}
        for record in self.records.snapshot_records(volume):
            # One whose note is gone or damaged takes nothing that we know of.
            with contextlib.suppress(SysctrError, OSError):
                names.update(name.partition("@")[0] for name in _read(self._kept(volume, record.name)))
        return sum(self.datasets.numbers("used", sorted(names), f"measure volume {volume}"))

    def _make_disk(self, path: str, size_bytes: int | None) -> int | None:
        doing = f"make dataset {path}"
        name = _new_dataset(path)
        _write(path, name)
        self._point("disk.noted")
        self.datasets.create(name, size_bytes, doing)
        if size_bytes is not None:
            self.datasets.check_size(name, size_bytes, doing)
        return size_bytes

    def _fill_disk(self, path: str, base: Base, worker: Worker) -> None:
        doing = f"copy template {base.layer}"
        name = _new_dataset(path)
        snapshot = f"{name}@base"
        _write(path, name, snapshot)
        self.datasets.create(name, None, doing)
        with self._mounted(name) as directory:
            worker.copy(RootSpec((Tree("base", base.tree, read_only=True),)), directory)
            # A process with its own view of the host's mounts may hold it longer.
            tree.sync_file_system(directory)
        self.datasets.snapshot(snapshot, doing)

    def _copy_disk(self, source: str, target: str, size_bytes: int | None) -> int | None:
        doing = f"copy {source}"
        name = _new_dataset(target)
        names = _read(source)
        origin = next((each for each in names if "@" in each), "")
        note = ""
        if not origin:
            # Clones are made of snapshots. This one goes with the clone; where that does not come to be, it
            # goes with its note, which is in a directory that is not a volume yet.
            origin = f"{names[0]}@copy-{secrets.token_hex(4)}"
            note = f"{os.path.dirname(target)}/{tree.hidden_name('of', name)}"
            _write(note, origin)
            self.datasets.snapshot(origin, doing)
            self._point("copy.kept")
        if size_bytes is not None:
            self.datasets.check_size(origin, size_bytes, doing)
        _write(target, name)
        self._point("copy.noted")
        self.datasets.clone(origin, name, size_bytes, doing)
        self._point("copy.cloned")
        if note:
            self.datasets.destroy(origin)
            os.unlink(note)
        return size_bytes

    def _keep_disk(self, volume: str, disk: str, target: str, pause: Pause | None) -> None:
        doing = f"take a snapshot of volume {volume}"
        name = os.path.basename(target).removesuffix(f".{self.disk}")
        snapshot = f"{_read(disk)[0]}@{name}-{secrets.token_hex(4)}"
        _write(target, snapshot)
        self._point("snapshot.noted")
        if pause is None:
            self.datasets.snapshot(snapshot, doing)
            return
        # What is written before the pause need not be written in it. A snapshot has all that was written, but
        # not what was changed through a mapping and is still in memory: therefore once more.
        directory = f"{self.run}/{volume}"
        tree.sync_file_system(directory)
        with pause():
            tree.sync_file_system(directory)
            self.datasets.snapshot(snapshot, doing)

    @contextlib.contextmanager
    def _view(self, disk: str) -> Iterator[RootSpec]:
        with self._mounted(_read(disk)[0]) as directory:
            yield RootSpec((Tree("volume", directory, read_only=True),))

    @contextlib.contextmanager
    def _mounted(self, name: str) -> Iterator[str]:
        """Mount a dataset or a snapshot for a moment, at a place that `sweep` knows."""
        directory = f"{self.run}/{tree.hidden_name('view', name.replace('@', '-'))}"
        self._mount(name, directory)
        try:
            self._point("mounted")
            yield directory
        finally:
            images.unmount(directory)

    def _mount(self, name: str, directory: str) -> None:
        """Mount a dataset or a snapshot; one that is mounted there already is fine.

        Nodev, but not nosuid, which a container would inherit: the directory above is closed to all but root.
        """
        full = self.datasets.full(name)
        doing = f"mount {full}"
        with self.records.explained(doing):
            os.makedirs(directory, mode=0o700, exist_ok=True)
            if images.mounted(directory):
                return
            # All mounts of a dataset are one superblock, and who starts it must not find it read-only.
            flags = mounts.MS_NODEV | (mounts.MS_RDONLY if "@" in name else 0)
            try:
                mounts.mount(full, directory, "zfs", flags)
            except FileNotFoundError as error:
                raise SysctrError(f"cannot {doing}: there is no such dataset") from error

    def empty_trash(self) -> None:
        """Delete the data of what was destroyed, and what was held for it."""
        super().empty_trash()
        with self._letting_go, self.records.explained("delete what was held"):
            while _entries(self.held) and self._let_go():
                pass

    def _delete(self, path: str) -> None:
        """Delete a note or a directory of ours, and what the notes in it name; some of that may be held."""
        with self.records.explained(f"delete {path}"):
            names = [name for note in _notes(path) for name in _read(note)]
            # Snapshots first: a file system that has none is not held.
            for name in sorted(names, key=lambda name: "@" not in name):
                if "@" in name or not self.datasets.has_snapshots(name):
                    self.datasets.destroy(name)
                else:
                    with contextlib.suppress(FileExistsError):
                        _write(f"{self.held}/{name}", name)
                self._point("trash.destroyed")
        tree.delete(path)

    def _let_go(self) -> bool:
        """Take one step to get rid of a dataset that is held; False where there is none to take."""
        written: dict[str, int] = {}
        snapshots: dict[str, list[Dataset]] = {}
        for each in self.datasets.all():
            of, at, _ = each.name.partition("@")
            if at:
                snapshots.setdefault(of, []).append(each)
            else:
                written[of] = each.written_bytes
        for name in _entries(self.held):
            try:
                if self._let_go_of(name, snapshots.get(name, []), written.get(name, 0)):
                    return True
            except SysctrError as error:
                log.warning("%s", error)
        return False

    def _let_go_of(self, name: str, snapshots: list[Dataset], written_bytes: int) -> bool:
        clones = [clone for snapshot in snapshots for clone in snapshot.clones]
        # What somebody else cloned or keeps a snapshot of stays until he is done with it.
        ours = all(snapshot.marked for snapshot in snapshots) and all(map(is_name, clones))
        if ours and len(clones) <= 1:
            if clones:
                # What both share is then the clone's alone, and what it does not need of that can go.
                self.datasets.promote(clones[0], f"delete {name}")
                self._point("trash.promoted")
            self.datasets.destroy(name)
            os.unlink(f"{self.held}/{name}")
            self._point("trash.let_go")
            return True
        if written_bytes:
            self.datasets.rollback(snapshots[-1].name, f"delete what is new in {name}")
        return False

    def _dataset(self, volume: str) -> str:
        """Return the name of a volume's dataset."""
        with self.records.explained(f"use volume {volume}"):
            return _read(self._disk(volume))[0]


def _new_dataset(path: str) -> str:
    """Return a name for the dataset whose note is at a path, in a directory that may be hidden still.

    >>> _new_dataset("/tank/ct/volumes/.new-101-data-0123abcd/rootfs-89abcdef").rpartition("-")[0]
    '101-data'
    >>> _new_dataset("/tank/ct/volumes/101/rootfs-89abcdef").rpartition("-")[0]
    '101'
    """
    above = os.path.basename(os.path.dirname(path))
    if above.startswith(".new-"):
        above = above.removeprefix(".new-").rpartition("-")[0]
    return f"{above}-{secrets.token_hex(4)}"


def _write(path: str, *names: str) -> None:
    """Write a note, and put it on the disk."""
    tree.write_file(path, "".join(f"{name}\n" for name in names))
    tree.sync_directory(os.path.dirname(path))


def _read(path: str) -> list[str]:
    """Return the names in a note; raises OSError, or SysctrError for what is none."""
    content, _ = files.read_bounded(path, _NOTE_MAX_BYTES)
    names = content.decode("ascii", errors="replace").splitlines()
    if not names or not all(map(is_name, names)):
        raise SysctrError(f"cannot use {path}: it is damaged")
    return names


def _notes(path: str) -> Iterator[str]:
    """Yield the notes in a directory of ours, or the one that it is itself."""
    if os.path.isdir(path) and not os.path.islink(path):
        for name in os.listdir(path):
            yield from _notes(f"{path}/{name}")
    elif not path.endswith(".json") and os.path.isfile(path):
        with open(path, "rb") as file:
            # A record that was never finished, or a note that was not and therefore names nothing.
            if file.read(1) not in (b"", b"{"):
                yield path


def _clear(path: str) -> None:
    """Take away a file or an empty directory of ours, and what is mounted on it."""
    while os.path.ismount(path):
        mounts.umount2(path, mounts.MNT_DETACH)
    with contextlib.suppress(FileNotFoundError):
        (os.rmdir if os.path.isdir(path) else os.unlink)(path)


def _entries(directory: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return os.listdir(directory)
    return []
