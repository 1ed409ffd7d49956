"""The layers of the overlay driver: where they lie, who needs them, and which are garbage.

    POOL/layers/NAME/rootfs/            a template's tree (in the first pool the template registry's)
    POOL/uppers/VOLUME.HEX/rootfs/      what a container wrote: still does, or did until it was frozen
    POOL/uppers/VOLUME.HEX/work/        the kernel's, while it is written to
    POOL/uppers/VOLUME.HEX/users/       one file for each clone that may stand on it too
                                        (never in the volume's project, as rootfs and work are: always room)
    RUN/VOLUME/uppers/…                 the same in the image of a volume with a limit, while that is mounted
    RUN/ACTIVE/VOLUME.json              the layers that an active volume stands on, until the next boot

A layer is named "layers/NAME", "uppers/VOLUME.HEX" or, where only the volume itself can mean it,
"disk/VOLUME.HEX". No layer is ever renamed, and none changes once another stands on it.
"""

import contextlib
import logging
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sysctr.errors import NotFound, Refused, SysctrError
from sysctr.linux import fault
from sysctr.storage import tree
from sysctr.storage.base import RootSpec, Tree
from sysctr.storage.overlay_disks import Active, Disks
from sysctr.storage.projects import Projects, is_project
from sysctr.storage.volumes import SnapshotRecord, VolumeRecord, VolumeRecords

log = logging.getLogger(__name__)

_LAYER = re.compile(
    r"layers/[A-Za-z0-9][A-Za-z0-9._+-]{0,190}|(uppers|disk)/[a-z0-9][a-z0-9._-]{0,62}\.[0-9a-f]{8}"
)
# What belongs to one file system, so that it would mean other files in a copy or in another layer.
_MARKS = ("user.overlay.", "trusted.overlay.")


@dataclass(frozen=True)
class Chain:
    """What a volume is mounted from: the writable layer, and those below it, top first."""

    upper: str
    layers: tuple[str, ...]

    def fields(self) -> "dict[str, Any]":
        """Return what a volume's record says of it."""
        return {"upper": self.upper, "layers": list(self.layers)}

    @property
    def all(self) -> tuple[str, ...]:
        """All layers, top first."""
        return (self.upper, *self.layers)


class Layers:
    """All layers of a pool."""

    def __init__(self, records: VolumeRecords, run: str) -> None:
        self.records = records
        self.pool = records.pool
        self.active = Active(run)
        self.disks = Disks(records, run, self.active)
        self.projects = Projects(records.pool)
        self._pins: Counter[tuple[str, str]] = Counter()
        # Images in which something became garbage since they were last looked through.
        self.stale_disks: set[str] = set()

    def path(self, volume: str, layer: str) -> str:
        """Return the directory of a layer as a volume names it; an image has to be mounted for it."""
        kind, _, name = layer.partition("/")
        return f"{self.disks.at(volume)}/uppers/{name}" if kind == "disk" else f"{self.pool}/{layer}"

    def new_name(self, volume: str, where: str) -> str:
        """Return the name of a layer that does not exist yet, at `where` ("uppers" or "disk")."""
        return f"{where}/{volume}.{secrets.token_hex(4)}"

    @contextlib.contextmanager
    def fresh(self, volume: str, where: str, like: str = "", project: int = 0) -> Iterator[str]:
        """Make an empty layer and return its name; after that it is garbage unless a record names it."""
        name = self.new_name(volume, where)
        with self.pinned(volume, [name]):
            self.make(self.path(volume, name), like, project)
            yield name

    def make(self, path: str, like: str = "", project: int = 0) -> None:
        """Make the directories of an empty layer; raises OSError.

        `like` is a tree whose top directory has the owner, mode and attributes that it gets: the top of a
        mounted overlay is the top of its upper.
        """
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        os.mkdir(path, 0o700)
        try:
            os.mkdir(f"{path}/work", 0o700)
            os.mkdir(f"{path}/rootfs", 0o755)
            # Whatever the umask is.
            os.chmod(f"{path}/rootfs", 0o755)
            if like:
                _copy_top(like, f"{path}/rootfs")
            if project:
                # Last: to move into a project that is full is allowed, to make something in it is not.
                for name in ("work", "rootfs"):
                    self.projects.enter(f"{path}/{name}", project)
        except BaseException:
            with contextlib.suppress(SysctrError):
                tree.delete(path)
            raise

    def owners(self, path: str) -> "set[str]":
        """Return the volumes whose records may name the layer at a path: what made it, and its clones."""
        found = {os.path.basename(path).rpartition(".")[0]}
        with contextlib.suppress(FileNotFoundError):
            found.update(os.listdir(f"{path}/users"))
        return found

    def add_owners(self, path: str, volumes: Iterable[str]) -> None:
        """Note that records of these volumes may name a layer, for when they are damaged; raises OSError."""
        for volume in set(volumes) - self.owners(path):
            os.makedirs(f"{path}/users", mode=0o700, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                tree.write_file(f"{path}/users/{volume}", "")

    def own(self, volume: str) -> "list[str]":
        """Return the paths of the layers that a volume and its snapshots stand on, and no other volume."""
        every: set[str] = set()
        with contextlib.suppress(SysctrError):
            every.update(self.chain(volume, self.records.read(volume)).all)
        for record in self.records.snapshot_records(volume):
            with contextlib.suppress(SysctrError):
                every.update(self.kept(volume, record))
        # By their marks, not by the records of all volumes: this is asked for each of them in turn.
        paths = [f"{self.pool}/{layer}" for layer in every if layer.startswith("uppers/")]
        return [
            path for path in sorted(paths)
            if {each for each in self.owners(path) if self.records.exists(each)} == {volume}
        ]  # fmt: skip

    def where(self, record: VolumeRecord) -> str:
        """Return where new layers of a volume are made."""
        return "uppers" if record.size_bytes is None or self.project(record) else "disk"

    def project(self, record: VolumeRecord) -> int:
        """Return the project of a volume; 0 for one that has none: its limit is the size of its image."""
        number = record.fields.get("project", 0)
        if number and not is_project(number):
            raise SysctrError(f"cannot use project {number!r}: the record that names it is damaged")
        return number

    def in_project(self, volume: str, record: VolumeRecord) -> bool:
        """Tell whether what a volume writes belongs to its project: not so if files were copied by others."""
        project = self.project(record)
        path = self.path(volume, self.chain(volume, record).upper)
        return bool(project) and all(
            self.projects.of(f"{path}/{name}") == project for name in ("work", "rootfs")
        )

    def check_limit(self, volume: str, record: VolumeRecord, doing: str) -> None:
        """Raise Refused where the limit that a volume has by its project would not be kept."""
        if not self.projects.enforced():
            raise Refused(
                f"cannot {doing}: its limit is a project quota, and {self.pool} is mounted without",
                "mount it with prjquota, or take the limit off the volume",
            )
        if not self.in_project(volume, record):
            raise Refused(
                f"cannot {doing}: its limit is a project quota, and its files are not in its project",
                "take the limit off the volume and set it again",
            )

    def make_room(self, volume: str, record: VolumeRecord, doing: str) -> None:
        """Let a volume that has its limit by its project be mounted; raises Refused where that cannot be."""
        self.check_limit(volume, record, doing)
        if not self.projects.limit_with_room(self.project(record), record.size_bytes):
            raise Refused(
                f"cannot {doing}: it has used up its limit",
                "raise the limit, or delete snapshots that were taken while it was stopped",
            )

    def free_project(self, path: str) -> None:
        """Take the limit away that a layer in the trash was written under, if its volume is gone."""
        project = self.projects.of(f"{path}/rootfs")
        if not project or self.projects.limit_of(project) is None:
            return
        try:
            # What writes a layer is in its name, and no other volume has that one's project.
            record = self.records.read(os.path.basename(path).rpartition(".")[0])
            if self.project(record) == project:
                return
        except NotFound:
            pass
        self.projects.limit(project, None)

    def chain(self, volume: str, record: VolumeRecord) -> Chain:
        """Return what a volume is mounted from; raises SysctrError where its record does not say that."""
        upper = record.fields.get("upper")
        layers = _layers(record.fields)
        if not isinstance(upper, str) or not _LAYER.fullmatch(upper) or layers is None:
            path = f"{self.records.path(volume)}/volume.json"
            raise SysctrError(f"cannot use volume {volume}: {path} is damaged")
        return Chain(upper, layers)

    def kept(self, volume: str, record: SnapshotRecord) -> tuple[str, ...]:
        """Return the layers of a snapshot, top first; raises SysctrError where its record does not say."""
        layers = None if record.error else _layers(record.fields)
        if not layers:
            reason = record.error or "its record is damaged"
            raise SysctrError(f"cannot use snapshot {record.name} of volume {volume}: {reason}")
        return layers

    def view(self, volume: str, layers: Iterable[str]) -> RootSpec:
        """Return how layers are looked at, none of them written to."""
        layers = tuple(layers)
        return RootSpec(self._trees(volume, layers), tuple(self._below(layer) for layer in layers))

    def raw(self, volume: str, layer: str) -> RootSpec:
        """Return a layer by itself, with the marks that make it one."""
        return RootSpec((Tree("layer", f"{self.path(volume, layer)}/rootfs", read_only=True),))

    def root(self, volume: str, chain: Chain) -> RootSpec:
        """Return how a volume is mounted to be written to."""
        upper = Tree("volume", self.path(volume, chain.upper))
        if not chain.layers:
            return RootSpec((Tree("volume", f"{upper.path}/rootfs"),))
        trees = (*self._trees(volume, chain.layers), upper)
        lowers = tuple(self._below(layer) for layer in chain.layers)
        return RootSpec(trees, lowers, upper="volume/rootfs", work="volume/work")

    def _trees(self, volume: str, layers: tuple[str, ...]) -> tuple[Tree, ...]:
        trees = (Tree("pool", self.pool, read_only=True),)
        if any(layer.startswith("disk/") for layer in layers):
            trees += (Tree("disk", self.disks.at(volume), read_only=True),)
        return trees

    def _below(self, layer: str) -> str:
        kind, _, name = layer.partition("/")
        return f"disk/uppers/{name}/rootfs" if kind == "disk" else f"pool/{layer}/rootfs"

    @contextlib.contextmanager
    def mounted(self, volume: str, layers: Iterable[str]) -> Iterator[None]:
        """Have the volume's image mounted while entered, if one of the layers is in it."""
        with contextlib.ExitStack() as stack:
            if any(layer.startswith("disk/") for layer in layers):
                stack.enter_context(self.disks.used(volume))
            yield

    @contextlib.contextmanager
    def pinned(self, volume: str, layers: Iterable[str]) -> Iterator[None]:
        """Keep layers from being collected while entered: records do not name them yet, or soon not more."""
        keys = [_key(volume, layer) for layer in layers]
        with self.records.lock:
            self._pins.update(keys)
        try:
            yield
        finally:
            with self.records.lock:
                self._pins.subtract(keys)

    def users(self) -> "tuple[dict[tuple[str, str], set[str]], set[str]]":
        """Return which volumes need each layer, and the volumes of which that cannot be read.

        Layers in images are told apart by their volume. Called with the records' lock held.
        """
        needed: dict[tuple[str, str], set[str]] = {}
        damaged = set()

        def need(volume: str, layers: Iterable[str]) -> None:
            for layer in layers:
                needed.setdefault(_key(volume, layer), set()).add(volume)

        for volume in self.records.list():
            try:
                need(volume, self.chain(volume, self.records.read(volume)).all)
            except SysctrError:
                damaged.add(volume)
            for record in self.records.snapshot_records(volume):
                try:
                    need(volume, self.kept(volume, record))
                except SysctrError:
                    damaged.add(volume)
        for volume in self.active.volumes():
            try:
                need(volume, self.active.layers(volume))
            except ValueError:
                damaged.add(volume)
        return needed, damaged

    def collect(self) -> None:
        """Throw away the layers that nobody needs, and delete those that lie in images."""
        with self.records.lock:
            needed, damaged = self.users()
            needed = {*needed, *+self._pins}
            if damaged:
                log.warning("layers are kept for volumes whose records are damaged: %s", ", ".join(damaged))
            self._collect_in(f"{self.pool}/uppers", "uppers", "", needed, damaged, self.records.trash)
            if not damaged:
                self._collect_copies(needed)
            stale = {
                volume for volume in self.stale_disks | self.active.volumes() if self.disks.exists(volume)
            }
            self.stale_disks.clear()
        for volume in stale - damaged:
            with contextlib.suppress(SysctrError, OSError):
                self._collect_disk(volume)

    def _collect_in(
        self,
        directory: str,
        kind: str,
        volume: str,
        needed: "set[tuple[str, str]]",
        damaged: "set[str]",
        trash: tree.Trash,
    ) -> None:
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(directory):
                key = (volume, f"{kind}/{name}")
                if key not in needed and not self.owners(f"{directory}/{name}") & damaged:
                    fault.point("overlay.collect.layer")
                    trash.throw(f"{directory}/{name}")

    def _collect_copies(self, needed: "set[tuple[str, str]]") -> None:
        """Throw away copies of templates that nobody uses; templates themselves are the registry's."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(f"{self.pool}/layers"):
                path = f"{self.pool}/layers/{name}"
                if ("", f"layers/{name}") not in needed and os.path.exists(f"{path}/copy.json"):
                    self.records.trash.throw(path)

    def _collect_disk(self, volume: str) -> None:
        with self.disks.used(volume) as directory:
            trash = tree.Trash(f"{directory}/trash")
            tree.ensure_directory(trash.directory)
            with self.records.lock:
                needed, damaged = self.users()
                if volume in damaged:
                    return
                wanted = {*needed, *+self._pins}
                self._collect_in(f"{directory}/uppers", "disk", volume, wanted, damaged, trash)
            trash.empty()
        with self.records.lock:
            record = self.records.read(volume)
            in_image = any(owner == volume for owner, _ in {*self.users()[0], *+self._pins})
            if record.size_bytes is None and not in_image and volume not in self.active.volumes():
                # The limit was taken away, and now the last snapshot is gone that lay in it.
                self.records.trash.throw(self.disks.image(volume))


def _key(volume: str, layer: str) -> tuple[str, str]:
    return (volume if layer.startswith("disk/") else "", layer)


def _layers(fields: "Any") -> "tuple[str, ...] | None":
    layers = fields.get("layers")
    if not isinstance(layers, list):
        return None
    if not all(isinstance(layer, str) and _LAYER.fullmatch(layer) for layer in layers):
        return None
    return tuple(layers)


def _copy_top(source: str, target: str) -> None:
    """Give a layer's top directory what another's has; neither can be replaced by what is below it."""
    status = os.stat(source, follow_symlinks=False)
    os.chown(target, status.st_uid, status.st_gid)
    os.chmod(target, status.st_mode & 0o7777)
    for name in os.listxattr(source, follow_symlinks=False):
        if not name.startswith(_MARKS):
            os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
