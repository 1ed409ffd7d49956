"""Snapshots of containers: the root volume and its own mount volumes together, with the configuration.

What is known of a snapshot is kept with the root volume's, which is written last and decides whether there is
one. So there is no second list that could differ.
"""

import contextlib
import difflib
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sysctr.engine.host import Host, owner
from sysctr.engine.journal import Journal
from sysctr.engine.pause import OtherFailed, Pause
from sysctr.engine.record import Record
from sysctr.engine.tasks import Task
from sysctr.errors import NotFound, SysctrError, UsageError, WrongState
from sysctr.linux import fault
from sysctr.storage import tree
from sysctr.storage.base import Driver, Snapshot
from sysctr.storage.volumes import check_snapshot

log = logging.getLogger(__name__)

# Of states that are kept only while a clone, a template, a backup or a list of changes is made of them.
_TEMPORARY = "tmp-"
_DESCRIPTION_LIMIT = 1024

Volume = tuple[Driver, str]


def check_name(name: str) -> str:
    """Return the name if a snapshot can have it.

    >>> check_name("before-upgrade")
    'before-upgrade'
    """
    if name.startswith(_TEMPORARY):
        raise UsageError(f"cannot use snapshot name {name[:80]!r}: sysctr itself uses names like this")
    return check_snapshot(name)


def time_name(prefix: str, at_s: float) -> str:
    """Return the name of a snapshot that nobody named.

    >>> time_name("auto", 0.0)[:5], len(time_name("auto", 0.0))
    ('auto-', 20)
    """
    return time.strftime(f"{prefix}-%Y%m%d-%H%M%S", time.localtime(at_s))


class Snapshots:
    """Takes, lists and deletes snapshots."""

    def __init__(self, host: Host, journal: Journal) -> None:
        self._host = host
        self._journal = journal
        # Told of every container whose snapshots have changed.
        self.on_change: Callable[[int], None] = lambda number: None
        # The temporary ones that somebody still works with; any other is a crash's.
        self._in_use: set[tuple[int, str]] = set()
        # Told of every snapshot that expires.
        self.on_expiry: Callable[[], None] = lambda: None

    def volumes(self, record: Record) -> list[Volume]:
        """Return a container's own volumes with their drivers, that of its root last.

        Raises why a pool cannot be used that has one of them.
        """
        host = self._host
        root: Volume = (host.driver(record), record.volume)
        mounts = record.config.mounts if record.config is not None else ()
        needed = {mount.pool or record.pool for mount in mounts if mount.kind == "volume"}
        found: list[Volume] = []
        for name in host.pools.names():
            try:
                driver = host.pools.get(name)
                found += [(driver, volume) for volume in driver.list() if owner(volume) == record.id]
            except SysctrError:
                if name in needed:
                    raise
        return [volume for volume in found if volume != root] + [root]

    def all(self, record: Record) -> list[Snapshot]:
        """Return a container's snapshots, oldest first, without those that an action keeps for itself."""
        found = self._host.driver(record).snapshots(record.volume)
        return [one for one in found if not one.name.startswith(_TEMPORARY)]

    def get(self, record: Record, name: str) -> Snapshot:
        """Return one snapshot; NotFound names the nearest."""
        known = {one.name: one for one in self.all(record)}
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"did you mean {near[0]}?" if near else f"`sysctr snapshots {record.id}` shows what there is"
            )
            raise NotFound(f"cannot find snapshot {name[:64]} of {record.id}", hint)
        return known[name]

    def free_name(self, record: Record, prefix: str) -> str:
        """Return a name of the time that no snapshot of the container has."""
        taken = {one.name for one in self.all(record)}
        name = time_name(prefix, time.time())
        # Two in one second.
        others = (f"{name}-{number}" for number in itertools.count(2))
        return next(one for one in itertools.chain((name,), others) if one not in taken)

    def show(self, record: Record) -> dict[str, Any]:
        """Return the snapshots, oldest first, and the one that the present state goes back to."""
        shown = []
        for one in self.all(record):
            note = one.note
            shown.append(
                {
                    # One that came with an archive is as old as it was where it was taken.
                    "name": one.name, "created": note.get("taken") or one.created, "parent": one.parent,
                    "description": note.get("description", ""), "expires": note.get("expires"),
                    "running": bool(note.get("running")), "automatic": bool(note.get("automatic")),
                    "volumes": [name for _, name in note.get("mounts", [])], "error": one.error,
                }
            )  # fmt: skip
        return {"snapshots": shown, "parent": self._host.driver(record).parent(record.volume)}

    def take(
        self,
        task: Task,
        number: int,
        name: str,
        *,
        description: str = "",
        expires_s: float | None = None,
        automatic: bool = False,
    ) -> dict[str, Any]:
        """Keep the state of a container, running or stopped, under a name.

        `expires_s` is how long it is kept. The result says how long a running one was paused, in ms.
        """
        record = self._host.store.load(number)
        record.usable("snapshot")
        if any(one.name == name for one in self.all(record)):
            raise WrongState(
                f"cannot snapshot {number}: there is a snapshot {name} already", "choose another name"
            )
        if len(description) > _DESCRIPTION_LIMIT or not (description.isprintable() or not description):
            raise UsageError(
                f"cannot snapshot {number}: the description is not one line of at most {_DESCRIPTION_LIMIT} "
                "characters"
            )
        note = {
            "description": description, "automatic": automatic,
            "expires": None if expires_s is None else round(time.time() + expires_s, 3),
        }  # fmt: skip
        pause_s = self._take(task, record, name, note, {})
        self._host.bus.publish("container", id=number, change="snapshot", snapshot=name)
        self.on_change(number)
        if expires_s is not None:
            self.on_expiry()
        return {
            "id": number, "snapshot": name, "pause_ms": None if pause_s is None else round(pause_s * 1000, 2)
        }  # fmt: skip

    @contextlib.contextmanager
    def temporary(self, task: Task, record: Record) -> Iterator[str]:
        """Keep the present state under a name of its own while entered; a crash leaves nothing of it."""
        name, _ = self.take_temporary(task, record)
        try:
            yield name
        finally:
            self.forget_temporary(record, name)

    def take_temporary(self, task: Task, record: Record, **facts: Any) -> tuple[str, float | None]:
        """Keep the present state until `forget_temporary`, or until this daemon ends.

        Returns its name and for how long the container was paused, None for a stopped one.

        Whoever calls either holds the container, but not in between. With `facts` a journal entry that has
        them stays.
        """
        name = f"{_TEMPORARY}{secrets.token_hex(4)}"
        self._in_use.add((record.id, name))
        try:
            pause_s = self._take(task, record, name, {"temporary": True}, facts)
        except BaseException:
            self._in_use.discard((record.id, name))
            raise
        fault.point("snapshot.temporary")
        return name, pause_s

    def forget_temporary(self, record: Record, name: str) -> None:
        """Delete a state that `take_temporary` kept."""
        try:
            self.forget(record, name)
        finally:
            self._in_use.discard((record.id, name))

    def _take(self, task: Task, record: Record, name: str, note: dict, facts: dict) -> float | None:
        """Take the snapshot, and return for how long the container was paused; None for a stopped one."""
        live = self._host.live.running(record.id)
        volumes = self.volumes(record)
        root = volumes[-1]
        note = {
            **note, "config": record.config_text, "generation": record.generation,
            "running": live is not None,
            "mounts": [[self.pool_of(driver), volume] for driver, volume in volumes[:-1]],
        }  # fmt: skip
        # A single volume that nobody uses is its driver's to keep whole.
        journaled = bool(facts) or live is not None or len(volumes) > 1
        if journaled:
            frozen = live is not None and live.frozen
            self._journal.write(record.id, "snapshot", name=name, frozen=frozen, **facts)
        try:
            # Left over where a crash or a full disk kept it from being deleted.
            self._drop(name, volumes[:-1])
            if live is None:
                for driver, volume in volumes:
                    worker = self._host.worker(record, task)
                    driver.snapshot(volume, name, note if (driver, volume) == root else {}, worker)
                    fault.point("snapshot.volume.taken")
                pause_s = None
            else:
                pause_s = self._take_running(task, record, name, note, volumes)
        except BaseException:
            self._undo_take(record, name, volumes)
            if journaled:
                self._journal.clear(record.id)
            raise
        if journaled and not facts:
            self._journal.clear(record.id)
        fault.point("snapshot.taken")
        return pause_s

    def _take_running(
        self, task: Task, record: Record, name: str, note: dict, volumes: Sequence[Volume]
    ) -> float:
        # What is written now need not be written while nothing runs.
        task.step("writing to the disk")
        for driver, volume in volumes:
            tree.sync_root(driver.activate(volume))
        task.step("taking the snapshot")
        pause = Pause(self._host, record.id, len(volumes))
        root = volumes[-1]

        def take(of: Volume) -> None:
            driver, volume = of
            kept = note if of == root else {}
            worker = self._host.worker(record, task)
            pause.run(lambda: driver.snapshot(volume, name, kept, worker, pause))
            fault.point("snapshot.volume.taken")

        if len(volumes) == 1:
            take(root)
            return pause.length_s
        with ThreadPoolExecutor(len(volumes), "snapshot") as pool:
            taken = [pool.submit(take, volume) for volume in volumes]
        errors = [error for one in taken if (error := one.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, OtherFailed)):
            raise error
        return pause.length_s

    def _undo_take(self, record: Record, name: str, volumes: Sequence[Volume]) -> None:
        try:
            self._drop(name, [*reversed(volumes)])
        except (SysctrError, OSError) as error:
            log.error("%d: cannot take back the snapshot %s: %s", record.id, name, error)

    def remove(self, number: int, names: Sequence[str]) -> dict[str, Any]:
        """Delete snapshots, damaged ones too; works on a full disk."""
        record = self._host.store.load(number)
        for name in names:
            self.get(record, name)
        for name in names:
            self.forget(record, name)
            self._host.bus.publish("container", id=number, change="delsnapshot", snapshot=name)
        self._host.collect_soon()
        self.on_change(number)
        return {"id": number, "snapshots": list(names)}

    def forget(self, record: Record, name: str) -> None:
        """Delete one snapshot, in the root volume first: from then on there is none."""
        self._drop(name, [*reversed(self.volumes(record))])

    def _drop(self, name: str, volumes: Sequence[Volume]) -> None:
        for driver, volume in volumes:
            if any(one.name == name for one in driver.snapshots(volume)):
                driver.delete_snapshot(volume, name)
                fault.point("snapshot.volume.deleted")

    def finish(self, record: Record, entry: dict[str, Any]) -> None:
        """Undo a snapshot that a crash cut short, and let a container go on that it paused.

        One whose root was kept is complete: that is the last step of one of a stopped container.
        """
        name = str(entry.get("name", ""))
        live = self._host.live.running(record.id)
        if live is not None and not entry.get("frozen") and self._host.cgroups.is_frozen(record.id):
            self._host.cgroups.thaw(record.id)
            self._host.live.note_frozen(record.id, frozen=False)
        volumes = self.volumes(record)
        having = [any(one.name == name for one in driver.snapshots(volume)) for driver, volume in volumes]
        if not all(having):
            log.info("%d: taking back the snapshot %s that a crash cut short", record.id, name)
            self._drop(name, [*reversed(volumes)])
        self._journal.clear(record.id)

    def sweep(self) -> None:
        """Delete what a crash left of snapshots that were being deleted; called when nothing is under way."""
        for record in self._host.store.list():
            if record.error:
                continue
            try:
                for driver, volume, name in self.half_made(record):
                    log.info("%d: deleting the rest of snapshot %s in volume %s", record.id, name, volume)
                    driver.delete_snapshot(volume, name)
            except SysctrError as error:
                log.warning("%d: %s", record.id, error.message)

    def half_made(self, record: Record) -> list[tuple[Driver, str, str]]:
        """Return driver, volume and name of what is left of snapshots, the root volume's last.

        They are those that the root volume has not, and temporary ones that nobody works with.
        """
        *mounts, root = self.volumes(record)
        of_root = {one.name for one in root[0].snapshots(root[1])}
        stale = {
            name for name in of_root
            if name.startswith(_TEMPORARY) and (record.id, name) not in self._in_use
        }  # fmt: skip
        return [
            (driver, volume, one.name)
            for driver, volume in mounts
            for one in driver.snapshots(volume)
            if one.name in stale or one.name not in of_root
        ] + [(*root, name) for name in sorted(stale)]

    def pool_of(self, driver: Driver) -> str:
        """Return the name of the pool that a driver keeps, empty where it is gone."""
        for name in self._host.pools.names():
            with contextlib.suppress(SysctrError):
                if self._host.pools.get(name) is driver:
                    return name
        return ""
