"""Volumes on any directory of ext4 or xfs: an upper of their own over shared layers that never change.

Every upper is born as a layer. A snapshot of what is not in use lets the upper stand and gives the volume a
new one above it; rollback and clone give a new one above the layers of the snapshot. Nothing is renamed or
copied, and what no record names any more is garbage.

Where the pool's file system keeps project quotas, every volume has a project: its uppers, that in use and
those below it, are counted in that, and its limit is the project's. Elsewhere, and of a volume that was made
elsewhere, the uppers of one with a limit lie in an image of that size.
"""

import contextlib
import errno
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from sysctr.errors import NotFound, Refused, SysctrError, UsageError, WrongState
from sysctr.linux import fault
from sysctr.storage import overlay_compact, overlay_copy, tree
from sysctr.storage.base import Base, Pause, RootSpec, Traits, Tree, Worker
from sysctr.storage.kept import KeepsRecords
from sysctr.storage.overlay_layers import Chain, Layers
from sysctr.storage.sizes import Sizes
from sysctr.storage.volumes import SnapshotRecord, VolumeRecord, VolumeRecords

log = logging.getLogger(__name__)

_LAYER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,190}")
# One more layer than this is not put on a volume without merging some first: 500 are EINVAL, and up to Linux
# 6.7 the paths of all have to fit into a page.
_MOST_LAYERS = 48


class OverlayDriver(KeepsRecords):
    """The storage driver for a plain directory."""

    kind = "overlay"
    traits = Traits(
        shared_base=True, cheap_snapshots=True, cheap_clones=True, needs_freeze=True, enforces_size=True,
        grows_live=True, shrinks=True, native_stream=False,
    )  # fmt: skip

    def __init__(self, pool: str, run_directory: str) -> None:
        self.directory = pool
        self._run = run_directory
        self.records = VolumeRecords(pool)
        self.records.trash = tree.Trash(self.records.trash.directory, self._delete)
        self.layers = Layers(self.records, run_directory)
        self._sizes = Sizes(self._measure)
        self._copying_base = threading.Lock()

    def prepare(self) -> None:
        """Make the pool's directories and see that they can hold uppers.

        Raises Refused, NoSpace or SysctrError that names the pool and what is wrong with it.
        """
        self.records.prepare(f"{self.directory}/layers", f"{self.directory}/uppers")
        self._check_xattrs()
        tree.ensure_directory(self._run)

    def _check_xattrs(self) -> None:
        # A mount in a user namespace keeps overlay's marks as user.overlay.*: NFS and old tmpfs refuse them.
        pool = self.directory
        probe = f"{self.records.directory}/{tree.hidden_name('probe', 'xattr')}"
        try:
            os.mkdir(probe, 0o700)
            try:
                os.setxattr(probe, "user.overlay.opaque", b"y")
            finally:
                os.rmdir(probe)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EPERM):
                raise Refused(
                    f"cannot use pool {pool}: its file system has no user extended attributes",
                    hint="use ext4 or xfs",
                ) from error
            # A full disk says nothing about attributes, and destroying containers is the way out of it.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise tree.explain(error, f"use pool {pool}", pool) from error

    def sweep(self) -> None:
        """Throw away what a crash left half made, and unmount what nobody uses."""
        self.records.sweep()
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(f"{self.directory}/layers"):
                if name.startswith(".copy-"):
                    self.records.trash.throw(f"{self.directory}/layers/{name}")
        self.layers.disks.sweep()
        enforced = self.layers.projects.enforced()
        for volume in self.records.list():
            if self.layers.disks.exists(volume):
                self.layers.stale_disks.add(volume)
            if enforced:
                try:
                    self._sweep_limit(volume)
                except (SysctrError, OSError) as error:
                    log.warning("the limit of volume %s cannot be seen to: %s", volume, error)

    def _sweep_limit(self, volume: str) -> None:
        record = self.records.read(volume)
        project = self.layers.project(record)
        if project:
            self.layers.projects.limit_with_room(project, record.size_bytes)

    def _delete(self, path: str) -> None:
        try:
            # First, because afterwards nothing tells of it.
            self.layers.free_project(path)
        except (SysctrError, OSError) as error:
            log.warning("the limit of %s stays: %s", path, error)
        tree.delete(path)

    def empty_trash(self) -> None:
        """Delete the data of what was destroyed and of layers that nobody uses."""
        self.layers.collect()
        self.records.trash.empty()

    def create(
        self, volume: str, base: Base | None, worker: Worker, *, size_bytes: int | None = None
    ) -> None:
        """Make a volume over the template's layer, in constant time once the pool has that."""
        doing = f"create volume {volume}"
        layers = (f"layers/{base.layer}",) if base else ()
        with self.layers.pinned(volume, layers):
            if base:
                self._need_base(doing, base, worker)
            overlay_copy.make(self.layers, volume, doing, layers, size_bytes)
            fault.point("overlay.create.published")
        # Whoever removes a template looks for its users before and after: one of us sees the other.
        for layer in layers:
            if not os.path.isdir(f"{self.directory}/{layer}/rootfs"):
                self.records.remove(volume)
                raise NotFound(f"cannot {doing}: no layer {layer} in {self.directory}")

    def _need_base(self, doing: str, base: Base, worker: Worker) -> None:
        """Bring a template into this pool where it is not yet; it is there completely or not at all."""
        if not _LAYER.fullmatch(base.layer):
            raise UsageError(f"cannot {doing}: {base.layer[:80]!r} is not the name of a layer")
        final = f"{self.directory}/layers/{base.layer}"
        with self._copying_base:
            if os.path.isdir(f"{final}/rootfs"):
                return
            if not os.path.isdir(base.tree) or os.path.abspath(base.tree) == f"{final}/rootfs":
                raise NotFound(f"cannot {doing}: no layer {base.layer} in {self.directory}/layers")
            hidden = f"{self.directory}/layers/{tree.hidden_name('copy', base.layer[:100])}"
            with self.records.explained(doing), contextlib.ExitStack() as undo:
                os.mkdir(hidden, 0o700)
                undo.callback(tree.delete, hidden)
                os.mkdir(f"{hidden}/rootfs", 0o755)
                worker.copy(RootSpec((Tree("base", base.tree, read_only=True),)), f"{hidden}/rootfs")
                # Not a template of this pool's own: it goes when nobody uses it.
                tree.write_file(f"{hidden}/copy.json", "{}\n")
                tree.sync_file_system(hidden)
                fault.point("overlay.create.base")
                os.rename(hidden, final)
                undo.pop_all()
                tree.sync_directory(f"{self.directory}/layers")

    def destroy(self, volume: str) -> None:
        """Take a volume away in constant time, on a full disk too; `empty_trash` deletes its data."""
        self._check_idle(volume, f"destroy volume {volume}")
        # Somebody may merge layers in there; another volume of this name must not meet the old image.
        disk = self.layers.disks.exists(volume)
        with self.layers.disks.alone(volume) if disk else contextlib.nullcontext():
            self.records.remove(volume)
        fault.point("overlay.destroy.thrown")
        self._sizes.forget(volume)

    def activate(self, volume: str) -> RootSpec:
        """Note that the volume's layers are in use, mount its image if it has one, and say how it is mounted.

        Raises NotFound for a missing volume or layer, SysctrError for a damaged record.
        """
        with self.records.lock, self.records.explained(f"activate volume {volume}"):
            record = self.records.read(volume)
            chain = self.layers.chain(volume, record)
            if record.size_bytes is not None and self.layers.project(record):
                self.layers.make_room(volume, record, f"activate volume {volume}")
            before = volume in self.active()
            # First, so that no collection of this or the next daemon takes them away.
            self.layers.active.add(volume, chain.all)
            fault.point("overlay.activate.noted")
            try:
                if any(layer.startswith("disk/") for layer in chain.all):
                    self.layers.disks.hold(volume)
                self._check_layers(volume, chain.all)
            except BaseException:
                if not before:
                    self.deactivate(volume)
                raise
            fault.point("overlay.activate.mounted")
            return self.layers.root(volume, chain)

    def deactivate(self, volume: str) -> None:
        """Take back `activate`; nothing uses the volume any more."""
        with self.records.lock:
            self.layers.active.remove(volume)
            fault.point("overlay.deactivate.noted")
            self.layers.disks.release(volume)

    def active(self) -> frozenset[str]:
        """Return the volumes that are active."""
        return self.layers.active.volumes()

    def snapshot(
        self, volume: str, name: str, note: Mapping[str, Any], worker: Worker, pause: Pause | None = None
    ) -> None:
        """Keep the volume's state: its upper becomes a layer, or is copied where it is in use."""
        doing = f"take snapshot {name} of volume {volume}"
        self.records.check_new_snapshot(volume, name)
        self._make_room(volume, worker)
        if volume not in self.active():
            with self.records.lock:
                self._check_idle(volume, doing)
                record = self.records.read(volume)
                layers = self.layers.chain(volume, record).all
                kept = self._new_snapshot(volume, name, note, record, layers)
                parents = ((name, kept.created), *kept.parents)
                # The volume first: it means the same with one more layer, and goes back to what is not yet.
                self._freeze(volume, replace(record, parents=parents), doing)
                fault.point("overlay.snapshot.frozen")
                self.records.write_snapshot(volume, kept)
        else:
            # Without a pause nobody writes, says the caller.
            copied = overlay_copy.live(self.layers, volume, doing, worker, pause or contextlib.nullcontext)
            with copied as layers, self.records.lock:
                record = self.records.read(volume)
                kept = self._new_snapshot(volume, name, note, record, layers)
                parents = ((name, kept.created), *kept.parents)
                self.records.write(volume, replace(record, parents=parents))
                fault.point("overlay.snapshot.copied")
                self.records.write_snapshot(volume, kept)
        fault.point("overlay.snapshot.recorded")

    def _new_snapshot(
        self, volume: str, name: str, note: Mapping[str, Any], record: VolumeRecord, layers: tuple[str, ...]
    ) -> SnapshotRecord:
        self.records.check_new_snapshot(volume, name)
        fields = {"layers": list(layers), "limit_bytes": record.size_bytes}
        return self.records.new_snapshot(volume, name, note, fields)

    def _freeze(self, volume: str, record: VolumeRecord, doing: str) -> Chain:
        """Give an idle volume a new upper above the one it has, which never changes again."""
        chain = self.layers.chain(volume, record)
        where = self.layers.where(record)
        return self._switch(volume, record, chain.all, where, doing)

    def _switch(
        self, volume: str, record: VolumeRecord, layers: tuple[str, ...], where: str, doing: str
    ) -> Chain:
        """Let a volume stand on these layers with an empty upper; its record is replaced at once."""
        with self.layers.mounted(volume, [*layers, f"{where}/"]), self.records.explained(doing):
            self._check_layers(volume, layers)
            top = f"{self.layers.path(volume, layers[0])}/rootfs"
            # A project without quotas counts nothing, and not every file system has it then.
            project = self.layers.project(record) if self.layers.projects.enforced() else 0
            with self.layers.fresh(volume, where, top, project) as upper:
                fault.point("overlay.switch.made")
                chain = Chain(upper, layers)
                fields = {**record.fields, **chain.fields()}
                self.records.write(volume, replace(record, fields=fields))
                fault.point("overlay.switch.recorded")
        return chain

    def rollback(self, volume: str, name: str) -> None:
        """Give a volume that is not active the content of a snapshot; all snapshots stay."""
        doing = f"roll volume {volume} back to snapshot {name}"
        with self.records.lock:
            self._check_idle(volume, doing)
            kept = self.records.snapshot(volume, name)
            record = self.records.read(volume)
            parents = ((name, kept.created), *self.records.alive(volume, kept.parents))
            layers = self.layers.kept(volume, kept)
            self._switch(volume, replace(record, parents=parents), layers, self.layers.where(record), doing)
            self._mark_stale(volume)
        fault.point("overlay.rollback.done")

    def delete_snapshot(self, volume: str, name: str) -> None:
        """Forget a snapshot, a damaged one too; works on a full disk."""
        self.records.remove_snapshot(volume, name)
        fault.point("overlay.delete.forgotten")
        self._mark_stale(volume)

    def _mark_stale(self, volume: str) -> None:
        if self.layers.disks.exists(volume):
            self.layers.stale_disks.add(volume)

    def clone(
        self,
        volume: str,
        snapshot: str,
        target: str,
        worker: Worker,
        *,
        size_bytes: int | None = None,
    ) -> None:
        """Make a new volume in this pool with the content of a snapshot, or of an inactive volume ("").

        Its limit is that of what it is made of, if no other is given. Constant time, unless the source lies
        in an image: its layers are copied out of that.
        """
        doing = f"clone volume {volume} to {target}"
        if self.records.exists(target):
            raise WrongState(f"cannot {doing}: volume {target} exists already")
        self._make_room(volume, worker)
        with self.records.lock:
            if snapshot:
                kept = self.records.snapshot(volume, snapshot)
                layers, limit = self.layers.kept(volume, kept), kept.fields.get("limit_bytes")
            else:
                self._check_idle(volume, doing)
                record = self.records.read(volume)
                layers, limit = self.layers.chain(volume, record).all, record.size_bytes
                if not any(layer.startswith("disk/") for layer in layers):
                    layers = self._freeze(volume, record, doing).layers
                    fault.point("overlay.clone.frozen")
            pins = contextlib.ExitStack()
            pins.enter_context(self.layers.pinned(volume, layers))
        with pins, self.layers.mounted(volume, layers), self.records.explained(doing):
            self._check_layers(volume, layers)
            size_bytes = limit if size_bytes is None else size_bytes
            overlay_copy.clone(self.layers, volume, target, doing, layers, size_bytes, worker)
        fault.point("overlay.clone.published")

    @contextlib.contextmanager
    def opened(self, volume: str, snapshot: str = "") -> Iterator[RootSpec]:
        """Return a read-only view of a snapshot, or of the volume where it is not active, while entered."""
        with self.records.lock:
            if snapshot:
                layers = self.layers.kept(volume, self.records.snapshot(volume, snapshot))
            else:
                self._check_idle(volume, f"look into volume {volume}")
                layers = self.layers.chain(volume, self.records.read(volume)).all
            pins = contextlib.ExitStack()
            pins.enter_context(self.layers.pinned(volume, layers))
        with pins, self.layers.mounted(volume, layers):
            self._check_layers(volume, layers)
            yield self.layers.view(volume, layers)

    def resize(self, volume: str, size_bytes: int | None, worker: Worker) -> None:
        """Change a volume's limit. With a project it may be in use; else to grow from one limit to another.

        Without one, between no limit and one everything but the template is copied into an image or out.
        """
        record = self.records.read(volume)
        if size_bytes == record.size_bytes:
            return
        if size_bytes is None:
            doing = f"take the limit off volume {volume}"
        else:
            doing = f"limit volume {volume} to {overlay_copy.mib(size_bytes)}"
        if self._limited_by_project(volume, record):
            overlay_copy.limit(self.layers, volume, doing, size_bytes)
        elif record.size_bytes is not None and size_bytes is not None and size_bytes > record.size_bytes:
            overlay_copy.grow(self.layers, volume, size_bytes)
        else:
            self._check_idle(volume, doing)
            if size_bytes is None:
                overlay_copy.move_out(self.layers, volume, doing, worker)
                self._mark_stale(volume)
            elif record.size_bytes is None:
                overlay_copy.move_in(self.layers, volume, doing, size_bytes, worker)
            else:
                overlay_copy.shrink(self.layers, volume, doing, size_bytes)
        fault.point("overlay.resize.done")
        self._sizes.forget(volume)

    def _limited_by_project(self, volume: str, record: VolumeRecord) -> bool:
        """Tell whether a volume's limit is that of its project, or can be."""
        if not self.layers.project(record):
            return False
        if record.size_bytes is not None:
            return True
        return self.layers.projects.enforced() and self.layers.in_project(volume, record)

    def usage(self, volume: str) -> int | None:
        """Return the bytes that belong to the volume as counted, or as last measured, and measure again."""
        try:
            counted = self._counted_bytes(volume)
        except (SysctrError, OSError) as error:
            log.debug("%s", error)
            counted = None
        return self._sizes.usage(volume) if counted is None else counted

    def filled(self, volume: str) -> int | None:
        """Return the bytes that count towards the volume's limit: nothing that it shares does."""
        return self.usage(volume)

    def measure(self, volume: str) -> int:
        """Return the same as of now; where nothing is counted, walk the volume's own layers."""
        return self._sizes.measure(volume)

    def _counted_bytes(self, volume: str, *, settled: bool = False) -> int | None:
        """Return what a volume's project uses; None for a volume that has none."""
        record = self.records.read(volume)
        project = self.layers.project(record)
        if not project or not self.layers.projects.enforced() or not self.layers.in_project(volume, record):
            return None
        return self.layers.projects.all_bytes(project, settled=settled)

    def _measure(self, volume: str) -> int:
        if not self.records.exists(volume):
            raise NotFound(f"cannot measure volume {volume}: it does not exist")
        with contextlib.suppress(SysctrError), self.records.explained(f"measure volume {volume}"):
            counted = self._counted_bytes(volume, settled=True)
            if counted is not None:
                return counted
        paths = self.layers.own(volume)
        size_bytes = tree.size_bytes(*paths) if paths else 0
        with contextlib.suppress(FileNotFoundError):
            size_bytes += os.stat(self.layers.disks.image(volume)).st_blocks * 512
        return size_bytes

    def users_of(self, layer: str) -> "list[str]":
        """Return the volumes that stand on the layer of a template and would break without it.

        Raises SysctrError where a damaged record does not say what it needs.
        """
        with self.records.lock:
            needed, damaged = self.layers.users()
        users = needed.get(("", f"layers/{layer}"), set())
        if damaged and not users:
            names = ", ".join(sorted(damaged))
            raise SysctrError(f"cannot tell who uses layer {layer}: records of volume {names} are damaged")
        return sorted(users)

    def drop_bases(self, keep: "frozenset[str]") -> None:
        """Do nothing: `empty_trash` takes away a copy that no volume stands on."""

    def compact(self, volume: str, worker: Worker) -> None:
        """Merge layers that nobody needs one by one, and the oldest where there are too many."""
        if overlay_compact.compact(self.layers, volume, worker):
            self._mark_stale(volume)

    def _make_room(self, volume: str, worker: Worker) -> None:
        if len(self.layers.chain(volume, self.records.read(volume)).layers) >= _MOST_LAYERS:
            self.compact(volume, worker)

    def _check_layers(self, volume: str, layers: tuple[str, ...]) -> None:
        for layer in layers:
            path = f"{self.layers.path(volume, layer)}/rootfs"
            if not os.path.isdir(path):
                raise NotFound(f"cannot use volume {volume}: its layer {path} is missing")

    def _check_idle(self, volume: str, doing: str) -> None:
        if volume in self.active():
            raise WrongState(f"cannot {doing}: it is in use", hint="stop its container first")
