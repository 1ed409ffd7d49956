"""What every driver keeps of a volume and its snapshots: small records, each replaced whole, and a trash.

    POOL/                             0700, so that a setuid file below is out of reach of the host's users
      volumes/ID/volume.json          the volume: its limit, what it goes back to, its note, the driver's own
      volumes/ID/snapshots/NAME.json  a snapshot: the same, and when it was taken
      .trash/                         what was destroyed, until its data is deleted

A record is an object with what all drivers share; whatever else is in it belongs to the driver.
"""

import contextlib
import errno
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sysctr.errors import NotFound, Refused, SysctrError, UsageError, WrongState
from sysctr.linux import files
from sysctr.storage import tree
from sysctr.storage.base import Snapshot

log = logging.getLogger(__name__)

SCHEMA = 1
# The state that a container is in: the name of no snapshot.
NOW = "now"

_VOLUME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_SNAPSHOT = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_RECORD_MAX_BYTES = 16 << 20
_MOST_REMEMBERED = 20_000
_SHARED = frozenset({"schema", "size_bytes", "note", "parents", "name", "created"})

# The snapshots that a state goes back to, nearest first, each with its time: a name may be used again later.
Parents = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class VolumeRecord:
    """What is recorded of a volume; `fields` is what its driver adds."""

    size_bytes: int | None = None
    parents: Parents = ()
    note: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SnapshotRecord:
    """What is recorded of a snapshot; `error` says why it cannot be read, and then there is no more of it."""

    name: str
    created: float
    parents: Parents = ()
    note: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


def check_volume(name: str) -> str:
    """Return the name if a volume can have it; raises UsageError.

    >>> check_volume("101-data")
    '101-data'
    """
    if not _VOLUME.fullmatch(name):
        raise UsageError(f"cannot use volume {name[:80]!r}: not the name of a volume")
    return name


def check_snapshot(name: str) -> str:
    """Return the name if a snapshot can have it; raises UsageError.

    >>> check_snapshot("before_2.0")
    'before_2.0'
    """
    if not _SNAPSHOT.fullmatch(name) or name == NOW:
        raise UsageError(
            f"cannot use snapshot name {name[:80]!r}: not 1 to 63 of a-z, 0-9, '.', '_' and '-'",
            f"begin and end with a letter or a digit; {NOW!r} is the present state",
        )
    return name


class VolumeRecords:
    """The records of all volumes of a pool; `lock` is held around what must see no other change between."""

    def __init__(self, pool: str) -> None:
        self.pool = pool
        self.directory = f"{pool}/volumes"
        self.trash = tree.Trash(f"{pool}/.trash")
        self.lock = threading.RLock()
        # When snapshots were taken, by their record's path, inode, time and size.
        self._created_at: dict[tuple[str, int, int, int], float] = {}

    def prepare(self, *directories: str) -> None:
        """Make the pool's directories, a driver's own among them, and see that they can be used together.

        Raises Refused, NoSpace or SysctrError that names the pool and what is wrong with it.
        """
        if os.path.islink(self.pool):
            raise Refused(
                f"cannot use pool {self.pool}: it is a symlink", hint="mount or bind the other place there"
            )
        below = (*directories, self.directory, self.trash.directory)
        for directory in (self.pool, *below):
            tree.ensure_directory(directory)
        device = os.stat(self.pool).st_dev
        for directory in below:
            # Renames into the trash and the single bind of all layers both end at a mount.
            if os.stat(directory).st_dev != device:
                raise Refused(
                    f"cannot use pool {self.pool}: {directory} is another file system",
                    hint="mount one file system on the pool itself",
                )

    def sweep(self) -> None:
        """Throw away volumes whose making a crash cut short, and records that were never finished."""
        self.trash.sweep(self.directory)
        for volume in self.list():
            for directory in (self.path(volume), f"{self.path(volume)}/snapshots"):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    for name in os.listdir(directory):
                        if name.startswith("."):
                            self.trash.throw(f"{directory}/{name}")

    @contextlib.contextmanager
    def explained(self, doing: str) -> Iterator[None]:
        """Turn an OSError of the body into the SysctrError of that `doing`."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOENT and not os.path.isdir(self.directory):
                raise NotFound(
                    f"cannot {doing}: pool {self.pool} is missing", hint="is it mounted?"
                ) from error
            raise tree.explain(error, doing, self.pool) from error

    def path(self, volume: str) -> str:
        """Return the directory of a volume, whether it exists or not."""
        return f"{self.directory}/{check_volume(volume)}"

    def exists(self, volume: str) -> bool:
        """Tell whether the volume is there."""
        return os.path.isdir(self.path(volume))

    def list(self) -> "list[str]":
        """Return the names of all volumes, sorted."""
        try:
            return sorted(name for name in os.listdir(self.directory) if _VOLUME.fullmatch(name))
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def making(self, volume: str, doing: str) -> Iterator[str]:
        """Make a volume: the body fills the hidden directory it gets, with its record (`write_in`) too.

        Then it becomes the volume at once. If the body fails it is thrown away, and OSError is explained.
        Raises WrongState for a volume that exists.
        """
        final = self.path(volume)
        exists = WrongState(f"cannot {doing}: volume {volume} exists already")
        if os.path.lexists(final):
            raise exists
        hidden = f"{self.directory}/{tree.hidden_name('new', volume)}"
        with self.explained(doing), contextlib.ExitStack() as undo:
            os.mkdir(hidden, 0o700)
            undo.callback(self.trash.throw, hidden)
            os.mkdir(f"{hidden}/snapshots", 0o700)
            yield hidden
            try:
                os.rename(hidden, final)
            except OSError as error:
                # A directory that is not empty is never replaced: another was faster.
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise exists from error
                raise
            undo.pop_all()
            files.sync_directory(self.directory)

    def remove(self, volume: str) -> None:
        """Take a volume away with all its snapshots; one that is not there is fine. Works on a full disk."""
        path = self.path(volume)
        with self.lock, self.explained(f"destroy volume {volume}"):
            self.trash.throw(path)

    def read(self, volume: str) -> VolumeRecord:
        """Return what is recorded of a volume; raises NotFound, or SysctrError for a damaged record."""
        path = f"{self.path(volume)}/volume.json"
        doing = f"use volume {volume}"
        with self.explained(doing):
            try:
                data = _read(path, doing)
                parents, note, fields = _shared(data)
                size = data.get("size_bytes")
                if size is not None and (type(size) is not int or size <= 0):
                    raise ValueError("size_bytes")
            except FileNotFoundError as error:
                if not os.path.isdir(self.path(volume)):
                    raise NotFound(f"cannot {doing}: no such volume in {self.pool}") from error
                raise SysctrError(f"cannot {doing}: {path} is missing") from error
            except ValueError as error:
                raise SysctrError(f"cannot {doing}: {path} is damaged") from error
        return VolumeRecord(size, parents, note, fields)

    def write(self, volume: str, record: VolumeRecord) -> None:
        """Replace what is recorded of a volume that exists."""
        with self.lock, self.explained(f"change volume {volume}"):
            if not self.exists(volume):
                raise NotFound(f"cannot change volume {volume}: no such volume in {self.pool}")
            self.write_in(self.path(volume), record)

    def write_in(self, directory: str, record: VolumeRecord) -> None:
        """Write a volume's record into its directory, also while that is hidden; raises OSError."""
        data = {
            "schema": SCHEMA, "size_bytes": record.size_bytes, "parents": record.parents,
            "note": dict(record.note), **record.fields,
        }  # fmt: skip
        files.write_atomically(f"{directory}/volume.json", _encoded(data))

    def size(self, volume: str) -> int | None:
        """Return the limit of a volume in bytes; None without one."""
        return self.read(volume).size_bytes

    def note(self, volume: str) -> "dict[str, Any]":
        """Return what was kept with a volume; {} where there is nothing or it is damaged."""
        try:
            return dict(self.read(volume).note)
        except SysctrError as error:
            log.warning("%s", error)
            return {}

    def set_note(self, volume: str, note: Mapping[str, Any]) -> None:
        """Replace what is kept with a volume."""
        with self.lock:
            self.write(volume, replace(self.read(volume), note=note))

    def parent(self, volume: str) -> str:
        """Return the nearest snapshot that a volume's content goes back to and that still exists, or ""."""
        return _nearest(self.read(volume).parents, self._created(volume))

    def snapshot_records(self, volume: str) -> "list[SnapshotRecord]":
        """Return what is recorded of all snapshots of a volume, oldest first, the damaged ones too."""
        found = []
        for name in self._snapshot_names(volume):
            with contextlib.suppress(NotFound):  # deleted meanwhile
                found.append(self._read_snapshot(volume, name))
        return sorted(found, key=lambda record: (record.created, record.name))

    def _snapshot_names(self, volume: str) -> "list[str]":
        with self.explained(f"list the snapshots of volume {volume}"):
            try:
                names = os.listdir(f"{self.path(volume)}/snapshots")
            except FileNotFoundError:
                if not self.exists(volume):
                    raise NotFound(f"cannot use volume {volume}: no such volume in {self.pool}") from None
                return []
        names = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        return [name for name in names if _SNAPSHOT.fullmatch(name) and name != NOW]

    def _created(self, volume: str) -> "dict[str, float]":
        """Return when each snapshot that can be read was taken; what did not change is not read again."""
        found = {}
        for name in self._snapshot_names(volume):
            path = self.snapshot_path(volume, name)
            with contextlib.suppress(FileNotFoundError, NotFound):
                status = os.lstat(path)
                key = (path, status.st_ino, status.st_mtime_ns, status.st_size)
                if key not in self._created_at:
                    record = self._read_snapshot(volume, name)
                    if record.error:
                        continue
                    if len(self._created_at) >= _MOST_REMEMBERED:
                        self._created_at.clear()
                    self._created_at[key] = record.created
                found[name] = self._created_at[key]
        return found

    def snapshots(self, volume: str) -> "list[Snapshot]":
        """Return the snapshots of a volume, oldest first, as callers of a driver see them."""
        records = self.snapshot_records(volume)
        times = _times(records)
        return [
            Snapshot(each.name, each.created, _nearest(each.parents, times), each.note, each.error)
            for each in records
        ]

    def snapshot(self, volume: str, name: str) -> SnapshotRecord:
        """Return what is recorded of a snapshot; raises NotFound, or SysctrError for a damaged record."""
        record = self._read_snapshot(volume, name)
        if record.error:
            raise SysctrError(
                f"cannot use snapshot {name} of volume {volume}: {record.error}", "it can only be deleted"
            )
        return record

    def check_new_snapshot(self, volume: str, name: str) -> None:
        """Raise WrongState where a volume has a snapshot of this name, NotFound where there is no volume."""
        path = self.snapshot_path(volume, name)
        if not self.exists(volume):
            raise NotFound(f"cannot use volume {volume}: no such volume in {self.pool}")
        if os.path.lexists(path):
            raise WrongState(f"cannot take snapshot {name} of volume {volume}: it exists already")

    def new_snapshot(
        self, volume: str, name: str, note: Mapping[str, Any], fields: Mapping[str, Any]
    ) -> SnapshotRecord:
        """Return the record of a snapshot that is taken now; nothing is written."""
        parents = self.alive(volume, self.read(volume).parents)
        # Rounded, so that it is the same number after it was written and read.
        return SnapshotRecord(check_snapshot(name), round(time.time(), 6), parents, note, fields)

    def write_snapshot(self, volume: str, record: SnapshotRecord) -> None:
        """Write the record of a snapshot, or replace it."""
        path = self.snapshot_path(volume, record.name)
        data = {
            "schema": SCHEMA, "name": record.name, "created": record.created, "parents": record.parents,
            "note": dict(record.note), **record.fields,
        }  # fmt: skip
        with self.lock, self.explained(f"write snapshot {record.name} of volume {volume}"):
            if not self.exists(volume):
                raise NotFound(f"cannot use volume {volume}: no such volume in {self.pool}")
            with contextlib.suppress(FileExistsError):
                os.mkdir(os.path.dirname(path), 0o700)
            files.write_atomically(path, _encoded(data))

    def set_snapshot_note(self, volume: str, name: str, note: Mapping[str, Any]) -> None:
        """Replace what is kept with a snapshot."""
        with self.lock:
            self.write_snapshot(volume, replace(self.snapshot(volume, name), note=note))

    def remove_snapshot(self, volume: str, name: str) -> None:
        """Remove the record of a snapshot, a damaged one too; raises NotFound. Works on a full disk."""
        path = self.snapshot_path(volume, name)
        doing = f"delete snapshot {name} of volume {volume}"
        with self.lock, self.explained(doing):
            try:
                os.unlink(path)
            except FileNotFoundError as error:
                raise self._no_snapshot(volume, name) from error
            except IsADirectoryError:
                self.trash.throw(path)
            files.sync_directory(os.path.dirname(path))

    def snapshot_path(self, volume: str, name: str) -> str:
        """Return the path of a snapshot's record, whether it exists or not."""
        return f"{self.path(volume)}/snapshots/{check_snapshot(name)}.json"

    def alive(self, volume: str, parents: Parents) -> Parents:
        """Return those of the snapshots that still exist."""
        times = self._created(volume)
        return tuple((name, created) for name, created in parents if times.get(name) == created)

    def _read_snapshot(self, volume: str, name: str) -> SnapshotRecord:
        path = self.snapshot_path(volume, name)
        try:
            data = _read(path, f"use snapshot {name} of volume {volume}")
            parents, note, fields = _shared(data)
            created = data["created"]
            if data["name"] != name or type(created) not in (int, float) or not math.isfinite(created):
                raise ValueError("name or time")
            return SnapshotRecord(name, float(created), parents, note, fields)
        except FileNotFoundError as error:
            raise self._no_snapshot(volume, name) from error
        except SysctrError as error:
            reason = error.message.partition(": ")[2]
        except (ValueError, KeyError, OverflowError):  # JSON has integers of any size
            reason = "its record is damaged"
        except OSError as error:
            reason = f"its record cannot be read: {(error.strerror or str(error)).lower()}"
        try:
            created = os.lstat(path).st_mtime
        except OSError:
            created = 0.0
        return SnapshotRecord(name, created, error=reason)

    def _no_snapshot(self, volume: str, name: str) -> NotFound:
        if not self.exists(volume):
            return NotFound(f"cannot use volume {volume}: no such volume in {self.pool}")
        return NotFound(f"cannot use snapshot {name} of volume {volume}: there is none")


def _times(records: "list[SnapshotRecord]") -> "dict[str, float]":
    return {record.name: record.created for record in records if not record.error}


def _nearest(parents: Parents, times: Mapping[str, float]) -> str:
    return next((name for name, created in parents if times.get(name) == created), "")


def _encoded(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, separators=(",", ":")) + "\n").encode()


def _read(path: str, doing: str) -> "dict[str, Any]":
    """Return a record's object; ValueError where it is none, SysctrError where it is of a later sysctr."""
    content, _ = files.read_bounded(path, _RECORD_MAX_BYTES)
    try:
        data = json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(data, dict) or type(data.get("schema")) is not int:
        raise ValueError("schema")
    if data["schema"] > SCHEMA:
        raise SysctrError(
            f"cannot {doing}: a newer sysctr made it (schema {data['schema']})", "upgrade sysctr"
        )
    return data


def _shared(data: "dict[str, Any]") -> "tuple[Parents, dict[str, Any], dict[str, Any]]":
    """Return a record's parents and note, and the fields of its driver; raises ValueError."""
    note, parents = data.get("note", {}), data.get("parents", [])
    if not isinstance(note, dict) or not isinstance(parents, list):
        raise ValueError("note or parents")
    for each in parents:
        if not isinstance(each, list) or [type(part) for part in each] not in ([str, float], [str, int]):
            raise ValueError("parents")
    own = {key: value for key, value in data.items() if key not in _SHARED}
    try:
        return tuple((name, float(created)) for name, created in parents), note, own
    except OverflowError as error:
        raise ValueError("parents") from error
