"""What drivers share that keep a volume's files in one *disk*: an image or a subvolume that its record names.

    POOL/layers/NAME/DISK              a template, copied by every volume that is made of it
    POOL/volumes/ID/DISK-RANDOM        the volume's files
    POOL/volumes/ID/snapshots/NAME.DISK

To give a volume other files a new disk is made beside the old one, and the record replaced: at any moment the
volume is the one or the other. What no record names is garbage.
"""

import contextlib
import logging
import os
import re
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sysctr.errors import SysctrError, UsageError, WrongState
from sysctr.linux import fault
from sysctr.storage import tree
from sysctr.storage.base import Base, Pause, RootSpec, Traits, Worker
from sysctr.storage.kept import KeepsRecords
from sysctr.storage.volumes import VolumeRecord, VolumeRecords

log = logging.getLogger(__name__)

_LAYER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}")
# The fields of the records: the disk's name, and the limit that a snapshot's volume had.
_DISK = "disk"
_LIMIT = "limit_bytes"


class RecordedDriver(KeepsRecords, ABC):
    """A storage driver but for how a disk is made, copied, limited and mounted."""

    kind: ClassVar[str]
    disk: ClassVar[str]  # the file name of a template's disk, and the beginning of a volume's
    default_size_bytes: ClassVar[int | None] = None
    traits: Traits

    def __init__(self, pool: str, run_directory: str) -> None:
        self.directory = pool
        self.run = run_directory
        self.layers = f"{pool}/layers"
        self.records = VolumeRecords(pool)
        self._making_layer = threading.Lock()

    @abstractmethod
    def _make_disk(self, path: str, size_bytes: int | None) -> int | None:
        """Make an empty disk and return its limit."""

    @abstractmethod
    def _fill_disk(self, path: str, base: Base, worker: Worker) -> None:
        """Make a disk with a template's files, for others to be copied from."""

    @abstractmethod
    def _copy_disk(self, source: str, target: str, size_bytes: int | None) -> int | None:
        """Make a copy of a disk that is not active, with a limit or as it comes; return the limit it has."""

    @abstractmethod
    def _keep_disk(self, volume: str, disk: str, target: str, pause: Pause | None) -> None:
        """Make a copy of a volume's disk as it is at one moment of `pause`."""

    @abstractmethod
    def active(self) -> frozenset[str]:
        """Return the volumes that are active."""

    @abstractmethod
    def activate(self, volume: str) -> RootSpec:
        """Make a volume mountable and return how it is mounted."""

    def prepare(self) -> None:
        """Make the pool's directories; raises Refused, NoSpace or SysctrError that names the pool."""
        self.records.prepare(self.layers)
        tree.ensure_directory(self.run)

    def sweep(self) -> None:
        """Throw away what a crash left unfinished or without a record."""
        self.records.sweep()
        self.records.trash.sweep(self.layers)
        for volume in self.records.list():
            try:
                with self.records.explained(f"sweep volume {volume}"):
                    self._sweep(volume)
            except SysctrError as error:
                # It may be anything in there that its record names, so all of it stays.
                log.warning("%s", error)

    def _sweep(self, volume: str) -> None:
        disk = self._disk(volume)
        directory = self.records.path(volume)
        for name in os.listdir(directory):
            path = f"{directory}/{name}"
            if name.startswith(f"{self.disk}-") and path != disk:
                self._discard(path)
        ending = f".{self.disk}"
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(f"{directory}/snapshots"):
                if name.endswith(ending) and not os.path.lexists(
                    f"{directory}/snapshots/{name.removesuffix(ending)}.json"
                ):
                    self._discard(f"{directory}/snapshots/{name}")

    def empty_trash(self) -> None:
        """Delete the data of what was destroyed."""
        self.records.trash.empty()

    def create(
        self, volume: str, base: Base | None, worker: Worker, *, size_bytes: int | None = None
    ) -> None:
        """Make a volume with the files of a template, which the first of its volumes brings to this pool."""
        doing = f"create volume {volume}"
        if size_bytes is None:
            size_bytes = self.default_size_bytes
        with self.records.making(volume, doing) as hidden:
            disk = self._new_name()
            self._point("create.begun")
            if base is None:
                limit = self._make_disk(f"{hidden}/{disk}", size_bytes)
            else:
                limit = self._copy_disk(self._layer(base, worker), f"{hidden}/{disk}", size_bytes)
            self._point("create.copied")
            self.records.write_in(hidden, VolumeRecord(limit, fields={_DISK: disk}))
            self._point("create.recorded")
        self._point("create.published")

    def _layer(self, base: Base, worker: Worker) -> str:
        """Return the disk of a template in this pool; the first time it is copied here."""
        if not _LAYER.fullmatch(base.layer):
            raise UsageError(f"cannot use layer {base.layer[:80]!r}: not the name of a layer")
        final = f"{self.layers}/{base.layer}"
        with self._making_layer:
            if not os.path.lexists(final):
                hidden = f"{self.layers}/{tree.hidden_name('new', base.layer)}"
                with contextlib.ExitStack() as undo:
                    os.mkdir(hidden, 0o700)
                    undo.callback(self._discard, hidden)
                    self._point("layer.begun")
                    self._fill_disk(f"{hidden}/{self.disk}", base, worker)
                    self._point("layer.filled")
                    os.rename(hidden, final)
                    undo.pop_all()
                tree.sync_directory(self.layers)
        return f"{final}/{self.disk}"

    def destroy(self, volume: str) -> None:
        """Take a volume and its snapshots away, on a full disk too; `empty_trash` deletes the data."""
        self._check_idle(volume, f"destroy volume {volume}")
        self.records.remove(volume)
        self._point("destroy.thrown")

    def snapshot(
        self, volume: str, name: str, note: Mapping[str, Any], worker: Worker, pause: Pause | None = None
    ) -> None:
        """Keep the volume's state under a name, as it is at one moment of `pause`."""
        self.records.check_new_snapshot(volume, name)
        disk, kept = self._disk(volume), self._kept(volume, name)
        with (
            self.records.explained(f"take snapshot {name} of volume {volume}"),
            contextlib.ExitStack() as undo,
        ):
            with contextlib.suppress(FileExistsError):
                os.mkdir(os.path.dirname(kept), 0o700)
            self._discard(kept)
            undo.callback(self._discard, kept)
            self._keep_disk(volume, disk, kept, pause)
            self._point("snapshot.kept")
            with self.records.lock:
                before = self.records.read(volume)
                record = self.records.new_snapshot(volume, name, note, {_LIMIT: before.size_bytes})
                # First: of those it goes back to, one that does not exist (yet) counts for nothing.
                parents = ((name, record.created), *record.parents)
                self.records.write(volume, replace(before, parents=parents))
                self._point("snapshot.followed")
                self.records.write_snapshot(volume, record)
            undo.pop_all()
        self._point("snapshot.recorded")

    def rollback(self, volume: str, name: str) -> None:
        """Give a volume that is not active the files and the limit of a snapshot."""
        doing = f"roll volume {volume} back to snapshot {name}"
        self._check_idle(volume, doing)
        snapshot = self.records.snapshot(volume, name)
        old, kept = self._disk(volume), self._kept(volume, name)
        if not os.path.lexists(kept):
            raise SysctrError(f"cannot {doing}: {kept} is missing", "it can only be deleted")
        disk = self._new_name()
        path = f"{self.records.path(volume)}/{disk}"
        with self.records.explained(doing), contextlib.ExitStack() as undo:
            undo.callback(self._discard, path)
            limit = self._copy_disk(kept, path, snapshot.fields.get(_LIMIT))
            self._point("rollback.copied")
            with self.records.lock:
                before = self.records.read(volume)
                parents = ((name, snapshot.created), *self.records.alive(volume, snapshot.parents))
                fields = {**before.fields, _DISK: disk}
                self.records.write(volume, replace(before, size_bytes=limit, parents=parents, fields=fields))
            undo.pop_all()
        self._point("rollback.recorded")
        self._discard(old)

    def delete_snapshot(self, volume: str, name: str) -> None:
        """Forget a snapshot, a damaged one too; works on a full disk."""
        kept = self._kept(volume, name)
        self.records.remove_snapshot(volume, name)
        self._point("delete_snapshot.forgotten")
        self._discard(kept)

    def clone(
        self,
        volume: str,
        snapshot: str,
        target: str,
        worker: Worker,
        *,
        size_bytes: int | None = None,
    ) -> None:
        """Make a new volume in this pool with the files of a snapshot, or of an inactive volume ("")."""
        source, limit = self._source(volume, snapshot, f"clone volume {volume}")
        with self.records.making(target, f"clone volume {volume} to {target}") as hidden:
            disk = self._new_name()
            limit = self._copy_disk(source, f"{hidden}/{disk}", limit if size_bytes is None else size_bytes)
            self._point("clone.copied")
            self.records.write_in(hidden, VolumeRecord(limit, fields={_DISK: disk}))
            self._point("clone.recorded")
        self._point("clone.published")

    @abstractmethod
    def usage(self, volume: str) -> int | None:
        """Return the bytes that belong to the volume alone as last measured; None before the first time."""

    def filled(self, volume: str) -> int | None:
        """Return the bytes that count towards the volume's limit."""
        return self.usage(volume)

    def users_of(self, layer: str) -> "list[str]":
        """Return nothing: a volume has a copy of its own of the template."""
        return []

    def drop_bases(self, keep: "frozenset[str]") -> None:
        """Take away the copies of templates but for `keep`: what was made of them does not need them."""
        with self._making_layer, self.records.explained("remove copies of templates"):
            for name in os.listdir(self.layers):
                if name not in keep:
                    self.records.trash.throw(f"{self.layers}/{name}")

    def compact(self, volume: str, worker: Worker) -> None:
        """Do nothing: there are no layers."""

    def _source(self, volume: str, snapshot: str, doing: str) -> tuple[str, int | None]:
        """Return the disk of a snapshot, or of an inactive volume (""), and its limit."""
        if snapshot:
            limit = self.records.snapshot(volume, snapshot).fields.get(_LIMIT)
            source = self._kept(volume, snapshot)
        else:
            self._check_idle(volume, doing)
            limit, source = self.records.size(volume), self._disk(volume)
        if not os.path.lexists(source):
            raise SysctrError(f"cannot {doing}: {source} is missing")
        return source, limit

    def _disk(self, volume: str) -> str:
        """Return the path of a volume's disk; raises NotFound, or SysctrError for a damaged record."""
        name = self.records.read(volume).fields.get(_DISK)
        if not isinstance(name, str) or not name.startswith(f"{self.disk}-") or "/" in name:
            raise SysctrError(f"cannot use volume {volume}: its record is damaged")
        return f"{self.records.path(volume)}/{name}"

    def _kept(self, volume: str, name: str) -> str:
        return f"{self.records.snapshot_path(volume, name).removesuffix('.json')}.{self.disk}"

    def _new_name(self) -> str:
        return f"{self.disk}-{secrets.token_hex(4)}"

    def _check_idle(self, volume: str, doing: str) -> None:
        if volume in self.active():
            raise WrongState(f"cannot {doing}: it is in use", hint="stop its container first")

    def _discard(self, path: str) -> None:
        """Take away what no record names; what cannot be taken away now is left to the next sweep."""
        try:
            self.records.trash.throw(path)
        except (OSError, SysctrError) as error:
            log.warning("%s stays for now: %s", path, error)

    def _point(self, name: str) -> None:
        fault.point(f"{self.kind}.{name}")

    def _set_limit(self, volume: str, size_bytes: int | None, disk: str = "") -> None:
        """Record a volume's limit, and its new disk if it got one; the old one is thrown away."""
        with self.records.lock:
            before = self.records.read(volume)
            fields = {**before.fields, _DISK: os.path.basename(disk)} if disk else before.fields
            self.records.write(volume, replace(before, size_bytes=size_bytes, fields=fields))

    @contextlib.contextmanager
    def opened(self, volume: str, snapshot: str = "") -> Iterator[RootSpec]:
        """Return a read-only view of a snapshot, or of the volume where it is not active, while entered."""
        doing = f"look into volume {volume}"
        source, _ = self._source(volume, snapshot, doing)
        with self._view(source) as root:
            yield root

    @abstractmethod
    def _view(self, disk: str) -> "contextlib.AbstractContextManager[RootSpec]":
        """Return a read-only view of a disk that is not active, while entered."""
