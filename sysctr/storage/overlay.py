"""Volumes on any directory of ext4 or xfs: an upper of their own over shared layers that never change.

    POOL/                      0700, so that a setuid file below is out of reach of the host's users
      layers/NAME/rootfs/      a template's tree, ids as seen inside (the template registry's)
      volumes/ID/upper/        what the container wrote
      volumes/ID/work/         the kernel's
      volumes/ID/volume.json   the layers below, top first
      .trash/                  destroyed volumes, until their data is deleted
"""

import contextlib
import errno
import json
import logging
import os
import queue
import re
import threading
import time

from sysctr.errors import NotFound, Refused, SysctrError, UsageError, WrongState
from sysctr.storage import tree
from sysctr.storage.base import Base, RootSpec, Traits, Tree, Worker

log = logging.getLogger(__name__)

SCHEMA = 1
# Lookup costs about 1 µs for each layer and file, and more than 500 layers are EINVAL.
MAX_LAYERS = 500

_VOLUME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_LAYER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}")
_MEASURE_AGAIN_S = 60.0


class OverlayDriver:
    """The storage driver for a plain directory."""

    kind = "overlay"
    traits = Traits(
        shared_base=True, cheap_snapshots=True, cheap_clones=True, needs_freeze=True, enforces_size=False,
        grows_live=False, shrinks=False, native_stream=False,
    )  # fmt: skip

    def __init__(self, pool: str, run_directory: str) -> None:
        self.pool = self.directory = pool
        self._run = run_directory
        self.layers = f"{pool}/layers"
        self.volumes = f"{pool}/volumes"
        self.trash = tree.Trash(f"{pool}/.trash")
        self._sizes: dict[str, tuple[float, int]] = {}
        self._wanted: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._measuring: set[str] = set()
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Make the pool's directories and see that they can hold uppers.

        Raises Refused, NoSpace or SysctrError that names the pool and what is wrong with it.
        """
        if os.path.islink(self.pool):
            raise Refused(
                f"cannot use pool {self.pool}: it is a symlink", hint="mount or bind the other place there"
            )
        for directory in (self.pool, self.layers, self.volumes, self.trash.directory):
            tree.ensure_directory(directory)
        self._check_one_file_system()
        self._check_xattrs()

    def _check_one_file_system(self) -> None:
        device = os.stat(self.pool).st_dev
        for directory in (self.layers, self.volumes, self.trash.directory):
            # Renames into the trash and the single bind of all layers both end at a mount.
            if os.stat(directory).st_dev != device:
                raise Refused(
                    f"cannot use pool {self.pool}: {directory} is another file system",
                    hint="mount one file system on the pool itself",
                )

    def _check_xattrs(self) -> None:
        # A mount in a user namespace keeps overlay's marks as user.overlay.*: NFS and old tmpfs refuse them.
        probe = f"{self.volumes}/{tree.hidden_name('probe', 'xattr')}"
        try:
            os.mkdir(probe, 0o700)
            try:
                os.setxattr(probe, "user.overlay.opaque", b"y")
            finally:
                os.rmdir(probe)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EPERM):
                raise Refused(
                    f"cannot use pool {self.pool}: its file system has no user extended attributes",
                    hint="use ext4 or xfs",
                ) from error
            # A full disk says nothing about attributes, and destroying containers is the way out of it.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise tree.explain(error, f"use pool {self.pool}", self.pool) from error

    def sweep(self) -> None:
        """Throw away volumes whose making a crash cut short."""
        self.trash.sweep(self.volumes)

    def empty_trash(self) -> None:
        """Delete the data of destroyed volumes."""
        self.trash.empty()

    def create(
        self, volume: str, base: Base | None, worker: Worker, *, size_bytes: int | None = None
    ) -> None:
        """Make a volume over the template's layer, in constant time."""
        layers = (base.layer,) if base else ()
        final = self._path(volume)
        doing = f"create volume {volume}"
        if not 0 < len(layers) <= MAX_LAYERS:
            raise UsageError(f"cannot create volume {volume}: {len(layers)} layers, not 1 to {MAX_LAYERS}")
        self._check_layers(doing, layers)
        hidden = f"{self.volumes}/{tree.hidden_name('new', volume)}"
        try:
            with contextlib.ExitStack() as undo:
                if os.path.lexists(final):
                    raise FileExistsError(errno.EEXIST, "exists", final)
                os.mkdir(hidden, 0o700)
                undo.callback(self.trash.throw, hidden)
                os.mkdir(f"{hidden}/work", 0o700)
                os.mkdir(f"{hidden}/upper", 0o755)
                # The merged root shows the upper's own mode, which the umask must not have narrowed.
                os.chmod(f"{hidden}/upper", 0o755)
                record = json.dumps({"schema": SCHEMA, "layers": list(layers)})
                tree.write_file(f"{hidden}/volume.json", record + "\n")
                os.rename(hidden, final)
                undo.pop_all()
                # Whoever removes a template looks for its users before and after: one of us sees the other.
                undo.callback(self.trash.throw, final)
                self._check_layers(doing, layers)
                undo.pop_all()
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise WrongState(f"cannot {doing}: it exists already") from error
            if error.errno == errno.ENOENT and not os.path.isdir(self.volumes):
                raise NotFound(
                    f"cannot {doing}: pool {self.pool} is missing", hint="is it mounted?"
                ) from error
            raise tree.explain(error, doing, self.pool) from error

    def _check_layers(self, doing: str, layers: tuple[str, ...]) -> None:
        for layer in layers:
            if not _LAYER.fullmatch(layer):
                raise UsageError(f"cannot {doing}: {layer!r} is not the name of a layer")
            if not os.path.isdir(f"{self.layers}/{layer}/rootfs"):
                raise NotFound(f"cannot {doing}: no layer {layer} in {self.layers}")

    def destroy(self, volume: str) -> None:
        """Take a volume away in constant time, on a full disk too; `empty_trash` deletes its data."""
        path = self._path(volume)
        try:
            self.trash.throw(path)
        except OSError as error:
            raise tree.explain(error, f"destroy volume {volume}", self.pool) from error
        with self._lock:
            self._sizes.pop(volume, None)

    def exists(self, volume: str) -> bool:
        """Tell whether the volume is there."""
        return os.path.isdir(self._path(volume))

    def list(self) -> "list[str]":
        """Return the names of all volumes, sorted."""
        try:
            return sorted(name for name in os.listdir(self.volumes) if _VOLUME.fullmatch(name))
        except FileNotFoundError:
            return []

    def activate(self, volume: str) -> RootSpec:
        """Return how the volume is mounted; nothing is mounted on the host for it.

        Raises NotFound for a missing volume or layer, SysctrError for a damaged record.
        """
        layers = self._layers_of(volume)
        for layer in layers:
            if not os.path.isdir(f"{self.layers}/{layer}/rootfs"):
                raise NotFound(f"cannot mount volume {volume}: its layer {layer} is missing in {self.layers}")
        return RootSpec(
            trees=(Tree("pool", self.pool, read_only=True), Tree("volume", self._path(volume))),
            lowers=tuple(f"pool/layers/{layer}/rootfs" for layer in layers),
            upper="volume/upper",
            work="volume/work",
        )

    def deactivate(self, volume: str) -> None:
        """Do nothing: nothing is mounted on the host."""

    def active(self) -> frozenset[str]:
        """Return nothing: nothing is mounted on the host."""
        return frozenset()

    def users_of(self, layer: str) -> "list[str]":
        """Return the volumes that stand on a layer."""
        users = []
        for volume in self.list():
            # A damaged record stops only its own volume; but which layers it needs is then unknown.
            with contextlib.suppress(NotFound):
                if layer in self._layers_of(volume):
                    users.append(volume)
        return users

    def usage(self, volume: str) -> int | None:
        """Return the bytes of the upper as last measured, and have them measured again when that is old."""
        with self._lock:
            measured_at, size = self._sizes.get(volume, (0.0, -1))
            if size < 0 or time.monotonic() - measured_at > _MEASURE_AGAIN_S:
                self._measure_later(volume)
        return size if size >= 0 else None

    def measure(self, volume: str) -> int:
        """Walk the upper now and return its bytes."""
        path = self._path(volume)
        if not os.path.isdir(path):
            raise NotFound(f"cannot measure volume {volume}: it does not exist")
        size = tree.size_bytes(f"{path}/upper")
        with self._lock:
            self._sizes[volume] = (time.monotonic(), size)
        return size

    def _measure_later(self, volume: str) -> None:
        if volume in self._measuring:
            return
        # One thread for all: a list of 200 containers must not start 200 walks at once. It ends when it
        # has nothing to do, so that no idle thread is kept.
        idle = not self._measuring
        self._measuring.add(volume)
        self._wanted.put(volume)
        if idle:
            threading.Thread(target=self._measure_wanted, name="volume-sizes", daemon=True).start()

    def _measure_wanted(self) -> None:
        while True:
            volume = self._wanted.get()
            try:
                self.measure(volume)
            except SysctrError as error:
                log.debug("%s", error)
            with self._lock:
                self._measuring.discard(volume)
                if not self._measuring:
                    return

    def _layers_of(self, volume: str) -> tuple[str, ...]:
        path = f"{self._path(volume)}/volume.json"
        try:
            with open(path, encoding="utf-8") as file:
                record = json.load(file)
            if record["schema"] > SCHEMA:
                raise SysctrError(
                    f"cannot use volume {volume}: a newer sysctr made it (schema {record['schema']})",
                    hint="upgrade sysctr",
                )
            layers = tuple(record["layers"])
            if layers and all(isinstance(layer, str) and _LAYER.fullmatch(layer) for layer in layers):
                return layers
            raise ValueError("layers")
        except FileNotFoundError as error:
            raise NotFound(f"cannot use volume {volume}: no such volume in {self.pool}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise SysctrError(f"cannot use volume {volume}: {path} is damaged") from error
        except OSError as error:
            raise tree.explain(error, f"use volume {volume}", self.pool) from error

    def _path(self, volume: str) -> str:
        if not _VOLUME.fullmatch(volume):
            raise UsageError(f"cannot use volume {volume!r}: not the name of a volume")
        return f"{self.volumes}/{volume}"
