"""What users see of storage: pools, what each container takes of them, and the limits on that."""

import logging
import os
import time
from collections.abc import Iterable
from typing import Any

from sysctr.config.values import format_size
from sysctr.engine import doctor
from sysctr.engine.host import Host, owner
from sysctr.engine.pool_setup import add_pool, remove_pool
from sysctr.engine.record import Record
from sysctr.engine.tasks import Task
from sysctr.errors import NotFound, Refused, SysctrError
from sysctr.linux import mount
from sysctr.storage.base import Driver

log = logging.getLogger(__name__)

# Whoever asks what containers take waits so long for what nobody has measured yet, and no longer.
_MEASURE_S = 5.0
_BLOCK_BYTES = 4096
_SETTLE_S = 30.0


class Disks:
    """Shows pools and disks, and adds and removes pools."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def pools(self) -> "list[dict]":
        """Return every pool in short, one that cannot be used too."""
        return [self._pool(name) for name in self._host.pools.names()]

    def pool(self, name: str) -> dict:
        """Return one pool with the volumes and the templates in it."""
        pools = self._host.pools
        shown = self._pool(name)
        if shown["state"] in ("missing", "damaged"):
            return {**shown, "volumes": [], "templates": []}
        driver = dict(pools.opened())[name]
        names = {record.id: record.name for record in self._host.store.list()}
        volumes = [_volume(driver, volume, names) for volume in driver.list()]
        return {**shown, "volumes": volumes, "templates": _layers(driver)}

    def add(
        self, name: str, driver: str, path: str, *, low_space: str | None = None, force: bool = False
    ) -> dict:
        """Make a directory a pool and return it as `pool` does."""
        where, pools = self._host.where, self._host.pools
        add_pool(where, pools, name, driver, path, low_space=low_space, force=force, check=self._refuse_taken)
        self._host.bus.publish("pool", name=name, change="added")
        return self.pool(name)

    def remove(self, name: str, *, force: bool = False) -> dict:
        """Forget a pool that no container is in; says what stays in its directory."""
        host = self._host
        users = [record.title for record in host.store.list() if record.pool == name]
        path = host.pools.settings(name).path
        left = remove_pool(host.where, host.pools, name, users, force=force)
        host.bus.publish("pool", name=name, change="removed")
        return {"name": name, "path": path, "left": left}

    def usage(self) -> "list[dict]":
        """Return for each container which volumes it has, what they take and what limits them."""
        host = self._host
        deadline = time.monotonic() + _MEASURE_S
        volumes: dict[int, list[dict]] = {}
        for pool in host.pools.names():
            try:
                driver = host.pools.get(pool)
                for volume in driver.list():
                    if number := owner(volume):
                        fact = {"volume": volume, "pool": pool, **_usage(driver, volume, deadline)}
                        volumes.setdefault(number, []).append(fact)
            except SysctrError as error:
                log.debug("%s", error.message)
        records = host.store.list()
        problems = pool_problems(host, {record.pool for record in records})
        return [
            {
                "id": record.id, "name": record.name, "pool": record.pool,
                "volumes": volumes.get(record.id, []), "error": problems.get(record.pool, ""),
            }
            for record in records
        ]  # fmt: skip

    def notices(self) -> "list[str]":
        """Return what whoever looks at the containers should know: pools that run out of room."""
        self._host.tell_low_pools()
        pools = self._host.pools
        found = []
        for name in pools.names():
            if pools.is_low(name):
                room = pools.room(name)
                free = f"{_about(room.free_bytes)} of {_about(room.size_bytes)}"
                if room.inodes:
                    free += f" and {room.free_inodes} of {room.inodes} inodes"
                found.append(f"pool {name} is nearly full: {free} are free")
        return found

    def checks(self) -> "list[doctor.Check]":
        """Check every pool, and what is mounted for containers."""
        checks = []
        for name in self._host.pools.names():
            shown = self._pool(name)
            checks.append(doctor.check_pool(shown))
        return [*checks, doctor.check_stale_mounts(self._stale_mounts())]

    def _stale_mounts(self) -> "list[str]":
        """Return what is mounted below the run directory for volumes that nothing uses."""
        host = self._host
        used = {volume for _name, driver in host.pools.opened() for volume in driver.active()}
        top = f"{host.where.run}/storage/"
        stale = []
        for point in mount.points_below(top):
            volume = point.removeprefix(top).partition("/")[2].partition("/")[0]
            if volume.startswith(".") and host.tasks.list("running"):
                continue  # somebody looks into a volume at the moment
            number = owner(volume)
            busy = bool(number and (host.live.running(number) or host.tasks.current(number)))
            if volume and volume not in used and not busy:
                stale.append(point)
        return stale

    def _pool(self, name: str) -> dict[str, Any]:
        pools = self._host.pools
        settings = pools.settings(name)
        shown: dict[str, Any] = {
            "name": name, "driver": settings.driver, "path": settings.path, "id": settings.id,
            "low_space": f"{settings.low_space_percent}%", "state": "ok", "error": "", "hint": "",
            "size_bytes": None, "used_bytes": None, "free_bytes": None, "inodes": None, "free_inodes": None,
            "count": None, "low": False,
        }  # fmt: skip
        problem = pools.problem(name)
        if problem is not None:
            shown |= {"state": problem.state, "error": problem.reason, "hint": problem.hint}
            if problem.state in ("missing", "damaged"):
                return shown
        try:
            room = pools.room(name)
            shown["count"] = len(dict(pools.opened())[name].list())
        except (OSError, SysctrError) as error:
            return shown | {"state": "missing", "error": f"pool {name} cannot be read: {error}"}
        low = room.is_low(settings.low_space_percent)
        return shown | {
            "size_bytes": room.size_bytes, "free_bytes": room.free_bytes, "inodes": room.inodes or None,
            "used_bytes": room.used_bytes,
            "free_inodes": room.free_inodes if room.inodes else None, "low": low,
        }  # fmt: skip

    def _refuse_taken(self, driver: Driver) -> None:
        """Raise Refused for a pool that brings volumes of containers whose numbers this host has given."""
        numbers = {record.id for record in self._host.store.list()}
        taken = [volume for volume in driver.list() if owner(volume) in numbers]
        if taken:
            raise Refused(
                f"cannot use {driver.directory}: its volume{'s' * (len(taken) > 1)} {', '.join(taken)} would "
                "be those of containers of this host, which have these numbers",
                "destroy the containers of these numbers first, or keep that pool apart",
            )


def fit_disk(host: Host, record: Record, task: Task | None = None) -> int | None:
    """Give a container's volume the limit that its configuration says; returns the one it had before.

    Raises Refused where the driver cannot, or where more is used, and nothing is changed then.
    """
    assert record.config is not None
    wanted = record.config.limits.disk_bytes
    if wanted is None:
        doing = f"take the limit off the disk of {record.id}"
    else:
        doing = f"limit the disk of {record.id} to {format_size(wanted)}"
    driver = host.pools.of(record, doing)
    if wanted is not None and not driver.traits.enforces_size:
        raise Refused(
            f"cannot {doing}: the driver {driver.kind} of pool {record.pool} cannot enforce a size",
            "leave limits.disk out",
        )
    present = driver.size(record.volume)
    if _same_size(wanted, present):
        return present
    if host.live.running(record.id) is None:
        # Files that were pushed into a stopped container leave its volume mounted.
        host.live.wait_settled(record.id, _SETTLE_S)
        host.release(record.id)
    try:
        driver.resize(record.volume, wanted, host.worker(record, task))
    except SysctrError as error:
        # The driver knows a volume or a file, the user a container.
        error.message = f"cannot {doing}: {_reason(error)}"
        error.args = (error.message,)
        raise
    return present


def fit_before_start(host: Host, record: Record, task: Task | None = None) -> None:
    """Raise where a container's pool cannot be used; give its disk the limit of a file edited by hand."""
    host.pools.of(record, f"start {record.id}")
    if disk_differs(host, record):
        try:
            fit_disk(host, record, task)
        except SysctrError as error:
            if record.config is not None and record.config.limits.disk_bytes is None:
                return  # an image has always a size, and nobody asked for another one
            reason = _reason(error)
            hint = error.hint or f"`sysctr set {record.id} disk=SIZE` says another one"
            raise type(error)(
                f"cannot start {record.id}: its disk cannot be as limits.disk says: {reason}", hint
            ) from error


def disk_differs(host: Host, record: Record) -> bool:
    """Tell whether the limit in force on a container's disk is another than its configuration says."""
    if record.config is None:
        return False
    try:
        return not _same_size(record.config.limits.disk_bytes, host.driver(record).size(record.volume))
    except (SysctrError, OSError):
        return False  # what is the matter is told by whoever needs the volume


def disk_limit(host: Host, record: Record) -> int | None:
    """Return the limit that is in force on a container's disk; None without one, or where it is unknown."""
    try:
        return host.driver(record).size(record.volume)
    except (SysctrError, OSError):
        return None


def pool_problems(host: Host, names: Iterable[str]) -> "dict[str, str]":
    """Return why those of these pools that cannot be used cannot be, by name."""
    found = {}
    for name in set(names):
        try:
            problem = host.pools.problem(name)
            if problem is not None:
                found[name] = problem.reason
        except NotFound:
            found[name] = f"pool {name} is missing: there is no {host.where.pool_configs}/{name}.toml"
    return found


def _reason(error: SysctrError) -> str:
    return error.message.partition(": ")[2] or error.message


def _same_size(wanted: int | None, present: int | None) -> bool:
    # File systems have whole blocks.
    if wanted is None or present is None:
        return wanted == present
    return wanted // _BLOCK_BYTES == present // _BLOCK_BYTES


def _volume(driver: Driver, volume: str, names: "dict[int, str]") -> dict:
    number = owner(volume)
    return {
        "volume": volume, "container": number or None, "name": names.get(number, ""),
        **_usage(driver, volume, 0.0),
    }  # fmt: skip


def _usage(driver: Driver, volume: str, deadline: float) -> dict[str, Any]:
    """Return what a volume takes; measured now where it never was and the deadline is not over.

    `used_bytes` is what the pool would get back, `filled_bytes` what counts towards the limit.
    """
    fact: dict[str, Any] = {"used_bytes": None, "filled_bytes": None, "limit_bytes": None, "snapshots": None}
    try:
        used = driver.usage(volume)
        if used is None and time.monotonic() < deadline:
            used = driver.measure(volume)
        fact |= {
            "used_bytes": used, "filled_bytes": driver.filled(volume), "limit_bytes": driver.size(volume),
        }  # fmt: skip
        return fact | {"snapshots": len(driver.snapshots(volume))}
    except (SysctrError, OSError) as error:
        log.debug("volume %s: %s", volume, error)
        return fact


def _layers(driver: Driver) -> "list[str]":
    try:
        return sorted(name for name in os.listdir(f"{driver.directory}/layers") if not name.startswith("."))
    except OSError:
        return []


def _about(size_bytes: int) -> str:
    """Return a size as people say it, rounded.

    >>> _about(1536 * 2**20)
    '1.5 GiB'
    """
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes / 1024:.1f} KiB"
