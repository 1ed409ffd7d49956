"""Mount points and devices of containers: their volumes, and changes while a container runs."""

import contextlib
import dataclasses
import errno
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from sysctr.config import schema, toml
from sysctr.config.mounts import Device, Mount, free_index
from sysctr.config.table import HIGHEST_NUMBER, Plain
from sysctr.engine.mount_plan import MountPlan, Place, mount_plan, target_of
from sysctr.engine.mount_sources import check_device, check_ids, check_source
from sysctr.engine.record import Record
from sysctr.errors import ConfigError, NotFound, Refused, SysctrError, WrongState
from sysctr.runtime import steps
from sysctr.runtime.steps_mounts import Unmount
from sysctr.storage.base import Driver

if TYPE_CHECKING:
    from sysctr.engine.host import Host
    from sysctr.engine.tasks import Task

log = logging.getLogger(__name__)

_OCTAL = re.compile(rb"\\([0-7]{3})")
# A mount takes milliseconds; a container whose change never ends could not be stopped either.
_CHANGE_S = 20.0
_OPTIONS = ("read_only", "noexec", "dev", "suid", "host_root")


@dataclasses.dataclass(frozen=True)
class Volume:
    """Where the volume of a mount point is."""

    pool: str
    driver: Driver
    name: str


@dataclasses.dataclass(frozen=True)
class Followed:
    """What a running container took of a change: the tables in force now, and why others are not."""

    done: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Mounts:
    """The mount points of all containers of a host."""

    def __init__(self, host: "Host") -> None:
        self._host = host
        # Held while a shared volume is activated or given back: containers start and end at the same time.
        self._lock = threading.RLock()
        self._active: set[int] = set()

    # Before it runs

    def prepare(
        self, record: Record, known: schema.Container | None, undo: ExitStack, task: "Task | None" = None
    ) -> None:
        """Check what is new against `known` and make the volumes that are missing; `undo` takes them back.

        Raises NotFound where a volume is gone that `known` had: an empty one must not take its place.
        """
        config = record.config
        if config is None:
            return
        had = _every(known)
        for device in config.devices:
            if had.get(device.key) != device:
                check_device(device)
        for mount in config.mounts:
            new = not _same(had.get(mount.key), mount)
            if mount.kind == "bind" and new:
                check_source(mount)
                check_ids(mount, record.idmap_count)
            elif mount.kind in ("volume", "shared"):
                self._make_volume(record, mount, undo, task, known=not new)

    def make_ready(self, record: Record) -> None:
        """Make what a file that was edited by hand asks for since the last start."""
        with ExitStack() as undo:
            self.prepare(record, _boot_config(record), undo)
            undo.pop_all()

    def _make_volume(
        self, record: Record, mount: Mount, undo: ExitStack, task: "Task | None", *, known: bool
    ) -> None:
        with self._lock:
            volume = self.volume_of(record, mount)
            worker = self._host.worker(record, task)
            wanted = mount.size_bytes
            if not volume.driver.exists(volume.name):
                if known:
                    raise NotFound(
                        f"cannot use {mount.key} of {record.title}: its volume {volume.name} is not in pool "
                        f"{volume.pool}",
                        f"`sysctr mount remove {record.id} {mount.index} --keep` forgets it",
                    )
                if wanted is not None and not volume.driver.traits.enforces_size:
                    raise Refused(
                        f"cannot make {mount.key} of {record.title}: the driver {volume.driver.kind} of pool "
                        f"{volume.pool} cannot enforce a size",
                        "leave the size out, or choose another pool",
                    )
                volume.driver.create(volume.name, None, worker, size_bytes=wanted)
                undo.callback(self._destroy, volume)
            elif mount.kind == "volume" and volume.driver.size(volume.name) != wanted:
                before = volume.driver.size(volume.name)
                volume.driver.resize(volume.name, wanted, worker)
                undo.callback(volume.driver.resize, volume.name, before, worker)
            elif mount.kind == "shared" and wanted not in (None, volume.driver.size(volume.name)):
                raise Refused(
                    f"cannot use {mount.key} of {record.title}: the volume {volume.name} exists and has "
                    "another size",
                    "leave the size out",
                )

    def _destroy(self, volume: Volume) -> None:
        volume.driver.deactivate(volume.name)
        volume.driver.destroy(volume.name)
        self._host.collect_soon()

    def volume_of(self, record: Record, mount: Mount) -> Volume:
        """Return where a mount point's volume is or would be; raises why its pool cannot be used."""
        pool = mount.pool or record.pool
        driver = self._host.pools.get(pool, f"use {mount.key} of {record.id}")
        return Volume(pool, driver, mount.volume or f"{record.id}-{mount.name}")

    def activate(self, record: Record, *, volumes_only: bool = False) -> tuple[Place, ...]:
        """Make a container's volumes mountable and return what is mounted; Host.release takes it back."""
        config = record.usable("mount the volumes of")
        with self._lock:
            self._active.add(record.id)
            places = [self._place(record, mount) for mount in config.mounts]
        every = (*places, *(Place(device) for device in config.devices))
        return tuple(place for place in every if place.root is not None or not volumes_only)

    def _place(self, record: Record, mount: Mount) -> Place:
        if mount.kind not in ("volume", "shared"):
            return Place(mount)
        with self._lock:
            volume = self.volume_of(record, mount)
            root = volume.driver.activate(volume.name)
            if mount.kind == "shared" and root.lowers:
                # One upper must never be mounted twice, and containers that share it would do just that.
                raise Refused(
                    f"cannot mount {mount.key} of {record.title}: the volume {volume.name} has layers, and "
                    "only a plain one can be shared"
                )
            return Place(mount, root)

    def release(self, number: int) -> None:
        """Give back the shared volumes that only this container had; its own are not looked at."""
        with self._lock:
            self._active.discard(number)
            self.release_shared()

    def release_shared(self) -> None:
        """Give back the shared volumes that no running container has any more."""
        with self._lock:
            for pool, driver in self._host.pools.opened():
                with contextlib.suppress(SysctrError):
                    for volume in driver.active():
                        if volume[:1].isalpha() and not self.is_used(pool, volume):
                            driver.deactivate(volume)

    def is_used(self, pool: str, volume: str) -> bool:
        """Tell whether a container that runs or starts has a shared volume mounted, or may have."""
        for record in self._host.store.list():
            if record.id in self._active or self._host.live.running(record.id):
                every = [*_of(record.config), *_of(_boot_config(record))]
                if any(m.volume == volume and (m.pool or record.pool) == pool for m in every):
                    return True
        return False

    # While it runs

    def follow(
        self, draft: Record, old: schema.Container | None, in_force: schema.Container | None, undo: ExitStack
    ) -> Followed:
        """Make what a new configuration needs, and let a running container take what it can at once.

        `in_force` is what it runs with, None for a stopped one. Raises where something new cannot be mounted.
        """
        self.prepare(draft, in_force or old, undo)
        new = draft.config
        if in_force is None or new is None:
            return Followed()
        before, after = _every(in_force), _every(new)
        done = [key for key in before if key in after and before[key] != after[key]
                and _same(before[key], after[key])]  # fmt: skip
        notes = []
        gone = [one for key, one in before.items() if key not in after]
        for one in sorted(gone, key=lambda one: -target_of(one).count("/")):
            try:
                self._unmount(draft, one)
            except SysctrError as error:
                notes.append(error.message)
                continue
            undo.callback(self._mount, draft, one)
            done.append(one.key)
        coming = [one for key, one in after.items() if key not in before]
        for one in sorted(coming, key=lambda one: target_of(one).count("/")):
            below = [b.key for b in before.values() if target_of(b).startswith(f"{target_of(one)}/")]
            if below:
                notes.append(f"cannot mount {one.key} in {draft.title} now: it would hide {below[0]}")
                continue
            self._mount(draft, one)
            undo.callback(self._unmount, draft, one)
            done.append(one.key)
        return Followed(tuple(done), tuple(notes))

    def _mount(self, record: Record, one: Mount | Device) -> None:
        place = self._place(record, one) if isinstance(one, Mount) else Place(one)
        plan = mount_plan([place], record.idmap_first)
        try:
            self._change(record, plan, f"mount {target_of(one)} in {record.title}")
        except SysctrError:
            self._deactivate(record, one)
            raise

    def _unmount(self, record: Record, one: Mount | Device) -> None:
        target = target_of(one)
        if self.mounted(record.id).count(target) > 1:
            raise WrongState(
                f"cannot unmount {target} in {record.title}: something else is mounted over it",
                "unmount that inside, or restart the container",
            )
        try:
            off = Unmount(target, remove=isinstance(one, Device))
            self._change(record, MountPlan((), (), (), (off,)), f"unmount {target} in {record.title}")
        except SysctrError as error:
            if os.strerror(errno.EBUSY).lower() not in error.message.lower():
                raise
            raise WrongState(
                f"cannot unmount {target} in {record.title}: it is busy",
                "end what uses it inside, or restart the container",
            ) from error
        self._deactivate(record, one)

    def _deactivate(self, record: Record, one: Mount | Device) -> None:
        if isinstance(one, Mount) and one.kind == "volume":
            volume = self.volume_of(record, one)
            volume.driver.deactivate(volume.name)

    def _change(self, record: Record, plan: MountPlan, doing: str) -> None:
        work = {
            "stage": self._host.stage, "binds": [*plan.trees, *plan.binds],
            "prepare": [steps.to_json(step) for step in plan.prepare],
            "attach": [steps.to_json(step) for step in plan.attach],
        }  # fmt: skip
        request = {"mounts": work, "streams": [], "program": {"builtin": "mounts"}}
        supervisor = self._host.supervisor
        try:
            ticket = supervisor.ticket({"kind": "files", "id": record.id, "request": request})
            supervisor.use_ticket(ticket, _patience())
        except SysctrError as error:
            raise SysctrError(f"cannot {doing}: {error.message}", error.hint) from error

    def mounted(self, number: int) -> "list[str]":
        """Return every mount point of a running container as its init sees it, each as often as it is one."""
        live = self._host.live.running(number)
        if live is None:
            return []
        try:
            with open(f"/proc/{live.pid}/mountinfo", "rb") as file:
                return [_unescaped(line.split(b" ", 5)[4]) for line in file]
        except OSError:
            return []

    # Looking and removing

    def list(self, record: Record) -> "list[dict]":
        """Return a container's mount points and devices, and the volumes of its own that are not mounted."""
        mounted = self.mounted(record.id)
        running = self._host.live.running(record.id) is not None
        in_force = _boot_config(record) if running else None
        wanted = _every(record.config)
        shown = []
        for one in wanted.values():
            state = "" if not running else "mounted" if target_of(one) in mounted else "pending"
            shown.append({**self._facts(record, one), "state": state})
        for key, one in _every(in_force).items():
            if key not in wanted and target_of(one) in mounted:
                shown.append({**self._facts(record, one), "state": "leaving"})
        sources = {row["source"] for row in shown}
        blank: dict[str, Any] = {"key": "", "kind": "volume", "target": "", "size_bytes": None, "options": []}
        for pool, volume, used in self._own_volumes(record):
            if f"{pool}:{volume}" not in sources:
                kept = {"volume": volume, "source": f"{pool}:{volume}", "used_bytes": used, "state": "kept"}
                shown.append(blank | kept)
        return shown

    def _own_volumes(self, record: Record) -> "Iterator[tuple[str, str, int | None]]":
        for pool in self._host.pools.names():
            with contextlib.suppress(SysctrError):
                driver = self._host.pools.get(pool)
                for volume in driver.list():
                    if volume.startswith(f"{record.id}-") and volume != record.volume:
                        yield pool, volume, driver.usage(volume)

    def _facts(self, record: Record, one: Mount | Device) -> dict:
        facts: dict[str, Any] = {"key": one.key, "kind": one.kind, "target": target_of(one), "volume": "",
                 "size_bytes": None, "used_bytes": None}  # fmt: skip
        if isinstance(one, Device):
            return {**facts, "source": one.path, "options": [f"mode={one.mode}"]}
        options = [name for name in _OPTIONS if getattr(one, name)]
        options += [f"idmap={one.idmap}"] if one.idmap else []
        options += ["backup=no"] if one.kind == "volume" and not one.backup else []
        facts |= {"source": one.source, "size_bytes": one.size_bytes, "options": options}
        if one.kind in ("volume", "shared"):
            pool = one.pool or record.pool
            name = one.volume or f"{record.id}-{one.name}"
            facts |= {"volume": name, "source": f"{pool}:{name}"}
            with contextlib.suppress(SysctrError):
                facts["used_bytes"] = self._host.pools.get(pool).usage(name)
        return facts

    def changes_to_add(
        self, record: Record, line: object, *, device: bool = False
    ) -> "tuple[str, dict[str, Plain | None]]":
        """Return a table with a free number, and the changes that make it this mount point or device."""
        config = record.usable("add a mount to")
        kind = "device" if device else "mount"
        taken = {one.index for one in _every(config).values() if one.key.startswith(f"{kind}.")}
        key = f"{kind}.{free_index(taken, HIGHEST_NUMBER)}"
        changes = dict(schema.plain_changes({key: line}))
        names = {f"{key}.{name}" for name in ("source", "volume", "tmpfs", "name")}
        if not device and not any(changes.get(name) for name in names):
            # Not a name that would bring back what an earlier mount point left.
            changes[f"{key}.name"] = self._free_name(record)
        return key, changes

    def _free_name(self, record: Record) -> str:
        taken = {volume for _, volume, _ in self._own_volumes(record)}
        taken |= {f"{record.id}-{mount.name}" for mount in _of(record.config) if mount.kind == "volume"}
        number = next(n for n in range(len(taken) + 1) if f"{record.id}-disk{n}" not in taken)
        return f"disk{number}"

    def find(self, record: Record, which: str) -> "Mount | Device | Volume":
        """Return what a user means by a target, a number, a table's name, or the name of a kept volume."""
        config = record.usable("remove a mount from")
        for one in _every(config).values():
            names = {target_of(one), one.key, *((str(one.index),) if isinstance(one, Mount) else ())}
            if which in names or which.rstrip("/") == target_of(one):
                return one
        used = {self._facts(record, one)["source"] for one in config.mounts}
        for pool, volume, _ in self._own_volumes(record):
            if which in (volume, volume.partition("-")[2]) and f"{pool}:{volume}" not in used:
                return Volume(pool, self._host.pools.get(pool), volume)
        raise NotFound(
            f"cannot find the mount {which[:200]} of {record.title}: there is no such target or number",
            f"`sysctr mount list {record.id}` shows them",
        )

    def discard(self, volume: Volume) -> None:
        """Delete a volume that no mount point has any more, with all data in it."""
        self._destroy(volume)

    def refuse_deletion(self, record: Record, mount: "Mount | Device | Volume") -> None:
        """Raise Refused where the data of a mount point's volume is protected, or another one's too."""
        if record.config is not None and record.config.protected:
            raise Refused(
                f"cannot delete a volume of {record.title}: it is protected",
                f"`sysctr protect {record.id} --off` first",
            )
        if not isinstance(mount, Mount) or mount.kind != "shared":
            return
        pool = mount.pool or record.pool
        users = []
        for other in self._host.store.list():
            mounts = [m for m in (*_of(other.config), *_of(_boot_config(other)))
                      if other.id != record.id or m.key != mount.key]  # fmt: skip
            if any(m.volume == mount.volume and (m.pool or other.pool) == pool for m in mounts):
                users.append(other.title)
        if users:
            raise Refused(
                f"cannot delete the volume {mount.volume}: {', '.join(users)} has it too",
                "remove it there first, or keep it with --keep",
            )


def tables(config: schema.Container, keys: "tuple[str, ...]") -> "dict[str, Plain | None]":
    """Return the changes that give a file these tables of mounts and devices as `config` has them."""
    dumped = schema.dump_config(config)
    changes: dict[str, Plain | None] = {}
    for key in keys:
        kind, _, index = key.partition(".")
        changes[key] = None
        given: Mapping[str, Mapping[str, Plain]] = dumped.get(kind, {})  # type: ignore[assignment]
        changes |= {f"{key}.{name}": value for name, value in given.get(index, {}).items()}
    return changes


def _patience() -> "Callable[[], None]":
    """Return what raises SysctrError when a change inside has taken too long: paths can be made to hang."""
    deadline_s = time.monotonic() + _CHANGE_S

    def check() -> None:
        if time.monotonic() > deadline_s:
            raise SysctrError(
                f"it was not done within {_CHANGE_S:g} s",
                "does a FUSE or network file system hang, on the source or inside?",
            )

    return check


def _same(old: "Mount | Device | None", new: "Mount | Device") -> bool:
    """Tell whether a mount point is as it was, but for what takes effect without a new mount."""
    if not isinstance(old, Mount) or not isinstance(new, Mount):
        return old == new
    if new.kind not in ("volume", "shared"):
        return dataclasses.replace(old, backup=True) == dataclasses.replace(new, backup=True)
    return dataclasses.replace(old, backup=True, size_bytes=None) == dataclasses.replace(
        new, backup=True, size_bytes=None
    )


def _every(config: schema.Container | None) -> "dict[str, Mount | Device]":
    every: tuple[Mount | Device, ...] = (*config.mounts, *config.devices) if config is not None else ()
    return {one.key: one for one in every}


def _of(config: schema.Container | None) -> tuple[Mount, ...]:
    return config.mounts if config is not None else ()


def _boot_config(record: Record) -> schema.Container | None:
    if not record.boot_config:
        return None
    try:
        return schema.parse_config(toml.read_container(record.boot_config))
    except ConfigError:
        return None


def _unescaped(field: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field))
