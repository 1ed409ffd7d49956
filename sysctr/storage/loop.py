"""Volumes on any file system, each an ext4 of its own in a file, with the size that it was given.

    POOL/layers/NAME/disk.img                 a template
    POOL/volumes/ID/disk.img-RANDOM           a volume
    POOL/volumes/ID/snapshots/NAME.disk.img   a snapshot
    RUN/ID                                    where the image of an active volume is mounted

Copies share their blocks where the file system can (xfs, btrfs): there snapshots and clones are cheap.
Elsewhere a snapshot would take as much room and time as the volume, so there is none.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace

from sysctr.errors import Refused, SysctrError
from sysctr.storage import images, tree
from sysctr.storage.base import Base, Pause, RootSpec, Traits, Tree, Worker
from sysctr.storage.recorded import RecordedDriver

# What Proxmox makes of a container that nobody said a size for.
DEFAULT_SIZE_BYTES = 8 << 30
_TEMPLATE_ROOM_BYTES = 32 << 20


class LoopDriver(RecordedDriver):
    """The storage driver for images in files."""

    kind = "loop"
    disk = "disk.img"
    default_size_bytes = DEFAULT_SIZE_BYTES

    def __init__(self, pool: str, run_directory: str) -> None:
        super().__init__(pool, run_directory)
        self.traits = Traits(
            shared_base=False, cheap_snapshots=False, cheap_clones=False, needs_freeze=False,
            enforces_size=True, grows_live=True, shrinks=True, native_stream=False,
        )  # fmt: skip

    def prepare(self) -> None:
        """Make the pool's directories, and learn whether its file system can share blocks."""
        super().prepare()
        shares = images.can_reflink(self.directory)
        self.traits = replace(self.traits, cheap_snapshots=shares, cheap_clones=shares)

    def sweep(self) -> None:
        """Unmount what a crash left mounted for a moment, let what it froze go on, and throw away garbage."""
        for name in _entries(self.run):
            if name.startswith("."):
                images.unmount(f"{self.run}/{name}")
            elif images.mounted(f"{self.run}/{name}"):
                images.thaw(f"{self.run}/{name}")
        super().sweep()

    def _sweep(self, volume: str) -> None:
        super()._sweep(volume)
        size_bytes = images.size_of(self._disk(volume))
        if size_bytes != self.size(volume):
            self._set_limit(volume, size_bytes)

    def activate(self, volume: str) -> RootSpec:
        """Mount a volume's image, and return its content as a root."""
        directory = f"{self.run}/{volume}"
        disk = self._disk(volume)
        images.mount(disk, directory)
        return _root(directory)

    def deactivate(self, volume: str) -> None:
        """Unmount a volume's image."""
        self.records.path(volume)  # the name of a volume
        images.unmount(f"{self.run}/{volume}")

    def active(self) -> frozenset[str]:
        """Return the volumes whose images are mounted."""
        return frozenset(
            name for name in _entries(self.run)
            if not name.startswith(".") and images.mounted(f"{self.run}/{name}")
        )  # fmt: skip

    def resize(self, volume: str, size_bytes: int | None, worker: Worker) -> None:
        """Grow a volume, in use or not, or shrink one that is not in use."""
        doing = f"resize volume {volume}"
        disk = self._disk(volume)
        if size_bytes is None:
            raise Refused(f"cannot {doing}: an image always has a size", hint="give it a larger one")
        images.check_size(doing, size_bytes)
        before = images.size_of(disk)
        if size_bytes < before:
            self._check_idle(volume, doing)
            self._replace(volume, disk, size_bytes, doing)
        elif size_bytes > before:
            self._grow(volume, disk, size_bytes, doing)
        self._point("resize.resized")
        self._set_limit(volume, images.size_of(self._disk(volume)))
        self._point("resize.recorded")

    def _grow(self, volume: str, disk: str, size_bytes: int, doing: str) -> None:
        if volume in self.active():
            images.grow(disk, f"{self.run}/{volume}", size_bytes)
            return
        try:
            # Mounted, it is the kernel that does it, which takes a moment and survives a crash.
            with self._mounted(disk) as directory:
                images.grow(disk, directory, size_bytes)
        except Refused:
            self._replace(volume, disk, size_bytes, doing)

    def _replace(self, volume: str, disk: str, size_bytes: int, doing: str) -> None:
        """Give an inactive volume a copy of its disk of another size."""
        path = f"{self.records.path(volume)}/{self._new_name()}"
        with self.records.explained(doing), contextlib.ExitStack() as undo:
            undo.callback(self._discard, path)
            limit = self._copy_disk(disk, path, size_bytes)
            self._point("resize.copied")
            self._set_limit(volume, limit, path)
            undo.pop_all()
        self._point("resize.switched")
        self._discard(disk)

    def usage(self, volume: str) -> int | None:
        """Return what the image takes on the disk; blocks that it shares with another count too."""
        return self.measure(volume)

    def measure(self, volume: str) -> int:
        """Return the same."""
        with self.records.explained(f"measure volume {volume}"):
            return os.stat(self._disk(volume)).st_blocks * 512

    def _make_disk(self, path: str, size_bytes: int | None) -> int:
        images.make(path, DEFAULT_SIZE_BYTES if size_bytes is None else size_bytes)
        return images.size_of(path)

    def _fill_disk(self, path: str, base: Base, worker: Worker) -> None:
        # As small as it may be, because an image grows in a moment, and shrinks only so far: the tables for
        # what it was made for stay. A quarter is room for the tables, and for what is counted otherwise here.
        images.make(path, tree.size_bytes(base.tree) * 5 // 4 + _TEMPLATE_ROOM_BYTES)
        with self._mounted(path) as directory:
            source = RootSpec((Tree("base", base.tree, read_only=True),))
            worker.copy(source, f"{directory}/{images.CONTENT}")
            # Before it is unmounted: a process with its own view of the host's mounts may hold it longer.
            with images.frozen(directory):
                pass

    def _copy_disk(self, source: str, target: str, size_bytes: int | None) -> int:
        if images.held(source):
            with self._mounted(source) as directory, images.frozen(directory):
                images.copy(source, target)
        else:
            images.settle(source)
            images.copy(source, target)
        size = images.size_of(target)
        if size_bytes is not None and size_bytes > size:
            images.grow(target, None, size_bytes)
        elif size_bytes is not None and size_bytes < size:
            images.shrink(target, size_bytes)
        return images.size_of(target)

    def _keep_disk(self, volume: str, disk: str, target: str, pause: Pause | None) -> None:
        if not self.traits.cheap_snapshots:
            raise Refused(
                f"cannot take a snapshot of volume {volume}: the file system of {self.directory} cannot "
                "share blocks between files",
                hint="keep it in a pool on xfs or btrfs, or in one of the driver overlay",
            )
        if volume not in self.active():
            self._copy_disk(disk, target, None)
            return
        directory = f"{self.run}/{volume}"
        tree.sync_file_system(directory)
        with (pause or contextlib.nullcontext)(), images.frozen(directory):
            self._point("snapshot.frozen")
            images.copy(disk, target, sync=False)
        images.sync(target)  # while the container goes on

    @contextlib.contextmanager
    def _view(self, disk: str) -> Iterator[RootSpec]:
        with self._mounted(disk, read_only=True) as directory:
            yield _root(directory, read_only=True)

    @contextlib.contextmanager
    def _mounted(self, disk: str, *, read_only: bool = False) -> Iterator[str]:
        """Mount an image for a moment, at a place that `sweep` knows."""
        directory = f"{self.run}/{tree.hidden_name('view', os.path.basename(os.path.dirname(disk)))}"
        images.mount(disk, directory, read_only=read_only)
        try:
            self._point("mounted")
            yield directory
        finally:
            images.unmount(directory)


def _root(directory: str, *, read_only: bool = False) -> RootSpec:
    return RootSpec((Tree("volume", f"{directory}/{images.CONTENT}", read_only=read_only),))


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise SysctrError(f"cannot list {directory}: {error.strerror}") from error
