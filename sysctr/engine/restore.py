"""Restoring: an archive becomes a container, a new one or in the place of one that is here.

Nothing of what is here is touched before the archive was unpacked whole, beside it. Taking its place is then
one write of a record; what a crash cuts short before that is undone, and after it finished.
"""

import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from sysctr.cgroup.base import check_enforceable
from sysctr.config.mounts import Mount
from sysctr.engine import archives, firewall
from sysctr.engine.archive_head import Head
from sysctr.engine.archive_source import Source
from sysctr.engine.archive_writer import MARKS
from sysctr.engine.cloning import renew
from sysctr.engine.creation import with_limit
from sysctr.engine.disks import disk_limit
from sysctr.engine.host import Host
from sysctr.engine.journal import Journal
from sysctr.engine.lifecycle import Lifecycle, limits_of
from sysctr.engine.pools import HOME
from sysctr.engine.record import Guest, Record, new_record
from sysctr.engine.restore_config import Draft, Wishes, archived_name, draft, here_of
from sysctr.engine.restore_states import states_of, unpack_states
from sysctr.engine.tasks import Task
from sysctr.errors import Refused, SysctrError, UsageError, WrongState
from sysctr.linux import fault
from sysctr.storage.base import Driver
from sysctr.template.layout import tar_arguments
from sysctr.template.rootfs_check import check_rootfs
from sysctr.template.unpack import RESERVE_BYTES, Outcome, unpack

log = logging.getLogger(__name__)

_SETTLE_S = 30.0
# Devices are made at each start; the rest describes the archive and is no part of the rootfs.
_NOT_UNPACKED = ("dev/*", "etc/vzdump/pct.conf", "etc/vzdump/pct.fw", "etc/vzdump/vps.conf")


_OPTIONS = ("--anchored", *(f"--xattrs-exclude=user.overlay.{mark}" for mark in MARKS))


@dataclass(frozen=True)
class RestoreOptions:
    """What whoever restores wants; a number of None is the archive's own, or the first free one."""

    number: int | None = None
    name: str = ""
    pool: str = ""
    force: bool = False
    unique: bool = False
    start: bool = False
    allow: frozenset[str] = frozenset()
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What will be made of an archive. `replaced` is the container in whose place it comes, if any."""

    number: int | None
    name: str
    head: Head
    draft: Draft
    renew: bool
    replaced: Record | None
    options: RestoreOptions


class Restoring:
    """Makes containers of archives."""

    def __init__(
        self, host: Host, lifecycle: Lifecycle, journal: Journal, discard: Callable[[int], None]
    ) -> None:
        self._host = host
        self._lifecycle = lifecycle
        self._journal = journal
        self._discard = discard

    # Before anything is done

    def plan(self, source: Source, options: RestoreOptions) -> Plan:
        """Read the beginning of an archive and decide what becomes of it; raises what can be told now."""
        host = self._host
        head = source.peek(host.jobs_for_templates())
        own = head.own or {}
        number = options.number if options.number is not None else _own_number(source.name, own)
        taken = {record.id: record for record in host.store.list()}
        replaced = taken.get(number) if number is not None else None
        if replaced is not None and not options.force:
            if options.number is not None:
                raise WrongState(
                    f"cannot {source.doing}: there is a container {replaced.title} already",
                    "--force restores in its place when all is unpacked; another number keeps both",
                )
            replaced = number = None
        if replaced is not None:
            # Which container ends is for people to say, not for what is in an archive.
            if options.number is None and number != _own_number(source.name, {}):
                raise UsageError(
                    f"cannot {source.doing}: nothing but the archive says that it is {replaced.title}",
                    f"give the number too, {number}, if that is what it should replace",
                )
            self._check_replaced(replaced, source.doing)
        same = {record.uuid for record in taken.values() if record is not replaced}
        moved = options.number is not None and own and options.number != own["id"]
        numbered = bool(head.own or head.pct) and number is not None and not moved
        keeps = (numbered or head.foreign is not None) and not options.unique
        # Two with one identity there must not be, whatever is asked for.
        renewed = not keeps or head.uuid in same - {""} or self._has_cards(head, replaced)
        name = options.name or archived_name(head, source.name, source.doing)
        if not name:
            raise UsageError(f"cannot {source.doing}: nothing says how it is called", "give it a --name")
        wishes = Wishes(self._free_name(name, replaced, options), options.allow, options.changes, renewed)
        here = here_of(host, replaced)
        made = draft(head, source.doing, wishes, here, replaced.config if replaced else None)
        pool = options.pool or (replaced.pool if replaced else "") or host.settings.defaults.pool or HOME
        host.pools.get(pool, source.doing)
        return Plan(
            number, wishes.name, head, made, renewed, replaced, dataclasses.replace(options, pool=pool)
        )

    def _has_cards(self, head: Head, replaced: Record | None) -> bool:
        """Tell whether a container here has a card of the one of another manager: it is a copy then."""
        macs = head.foreign.macs if head.foreign is not None else frozenset()
        return any(
            nic.mac in macs
            for record in (self._host.store.list() if macs else ())
            if record.config is not None and record != replaced
            for nic in record.config.nets
        )

    def _check_replaced(self, record: Record, doing: str) -> None:
        if record.config is not None and record.config.protected:
            raise Refused(
                f"cannot {doing}: {record.title} is protected", f"`sysctr protect {record.id} --off` first"
            )
        if record.damaged:
            record.usable("replace")

    def _free_name(self, name: str, replaced: Record | None, options: RestoreOptions) -> str:
        """Return the name, or one that is made of it where another container has it."""
        taken = {record.name for record in self._host.store.list() if record is not replaced}
        if replaced is not None and name in taken:
            return replaced.name
        if name not in taken or options.name:
            return name
        return next(one for k in range(2, len(taken) + 3) if (one := f"{name[:59]}-{k}") not in taken)

    # Doing it

    def restore(self, task: Task, source: Source, plan: Plan, number: int) -> dict[str, Any]:
        """Make the container whose number and name are reserved, or replace the one that is there."""
        began_s = time.monotonic()
        if plan.replaced is not None:
            record, outcome = self._replace(task, source, plan)
        else:
            record, outcome = self._create(task, source, plan, number)
        for note in (*plan.draft.notes, *(f"left out: {text}" for text in plan.draft.left_out)):
            task.log(note)
        self._host.collect_soon()
        if plan.options.start and self._host.live.running(record.id) is None:
            self._lifecycle.start_new(task, record)
        return {
            "id": record.id, "name": record.name, "replaced": plan.replaced is not None,
            "files": outcome.entries, "seconds": round(time.monotonic() - began_s, 3),
            "notes": plan.draft.notes, "left_out": plan.draft.left_out, "devices": outcome.nodes,
            "new_identity": plan.renew,
        }  # fmt: skip

    def _create(self, task: Task, source: Source, plan: Plan, number: int) -> tuple[Record, Outcome]:
        host = self._host
        with ExitStack() as undo:
            undo.callback(host.store.release, number)
            idmap = host.store.allocate_ids(number)
            record = new_record(number, plan.draft.text, idmap, pool=plan.options.pool)
            head = plan.head
            if head.uuid and not plan.renew:
                generation = head.own["generation"] + 1 if head.own is not None else 1
                record = dataclasses.replace(record, uuid=head.uuid, generation=generation)
            check_enforceable(number, limits_of(record), host.cgroups.available)
            undo.callback(self._discard, number)
            record, outcome = self._fill(task, source, record, None, undo, plan)
            undo.callback(host.network.release, number)
            host.network.ensure()
            self._enroll(record, plan.draft)
            fault.point("restore.enrolled")
            if plan.renew:
                renew(host, record, task)
            task.check()
            firewall.keep(host.where, number, plan.head.firewall)
            host.store.create(record)
            fault.point("restore.created")
            undo.pop_all()
        host.bus.publish("container", id=number, change="created")
        return record, outcome

    def _fill(
        self,
        task: Task,
        source: Source,
        record: Record,
        known: Record | None,
        undo: ExitStack,
        plan: Plan,
    ) -> tuple[Record, Outcome]:
        """Make the volumes of a container and unpack the archive into them."""
        head, made = plan.head, plan.draft
        host, config = self._host, record.usable("restore")
        driver = host.driver(record)
        if config.limits.disk_bytes is not None and not driver.traits.enforces_size:
            raise Refused(
                f"cannot {source.doing}: the driver {driver.kind} of pool {record.pool} cannot enforce the "
                "size of its disk",
                "add `--set limits.disk=`, or choose another --pool",
            )
        worker = host.worker(record, task)
        driver.create(record.volume, None, worker, size_bytes=config.limits.disk_bytes)
        undo.callback(self._destroy, driver, record.volume)
        record = with_limit(record, disk_limit(host, record))
        host.mounts.prepare(record, known.config if known else None, undo, task)
        fault.point("restore.volumes.made")
        with ExitStack() as active:
            path = self._activated(driver, record.volume, active)
            volumes = [
                (mount.target, self._activated(volume.driver, volume.name, active))
                for mount in sorted(config.mounts, key=lambda one: one.target.count("/"))
                if mount.kind == "volume"
                and (volume := host.mounts.volume_of(record, mount)).name not in self._kept(known)
            ]
            task.step(f"unpacking {source.name}")
            if head.foreign is not None and head.foreign.snapshots:
                outcome, notes = unpack_states(
                    host, task, source, record, path, head.below, head.foreign.snapshots, _OPTIONS,
                    _NOT_UNPACKED,
                )  # fmt: skip
                made.notes += notes
            else:
                outcome = unpack(
                    path, source.codec, lambda fd: source.feed(fd, task), doing=source.doing,
                    run_job=host.jobs_for(record).run_tool, task=task, volumes=volumes,
                    options=[*_OPTIONS, *tar_arguments({head.below: ""}, _NOT_UNPACKED)],
                    # Nobody else is on a disk of its own, which may have less than that.
                    reserve_bytes=RESERVE_BYTES if driver.size(record.volume) is None else 0,
                )  # fmt: skip
            source.check_ended()
            found = check_rootfs(path, config.init)
        guest = Guest(found.init, found.init_kind, found.stop_signal, found.arch, found.os_id)
        fault.point("restore.unpacked")
        return dataclasses.replace(record, guest=dataclasses.asdict(guest)), outcome

    def _activated(self, driver: Driver, volume: str, active: ExitStack) -> str:
        root = driver.activate(volume)
        active.callback(driver.deactivate, volume)
        if root.lowers:
            raise SysctrError(f"cannot unpack into volume {volume}: it is not empty")
        return root.trees[-1].path

    def _destroy(self, driver: Driver, volume: str) -> None:
        driver.deactivate(volume)
        driver.destroy(volume)
        self._host.collect_soon()

    def _enroll(self, record: Record, made: Draft) -> None:
        """Take the addresses of its cards; one that another container has by now is given up."""
        try:
            self._host.network.enroll(record.id, record.name, record.usable("restore").nets)
        except SysctrError as error:
            made.notes.append(f"the network is not as it was: {error.message}")

    # In the place of another

    def _kept(self, known: Record | None) -> frozenset[str]:
        """Return the volumes of a replaced container that the archive has not, and that stay therefore."""
        if known is None or known.config is None:
            return frozenset()
        return frozenset(
            self._host.mounts.volume_of(known, mount).name
            for mount in known.config.mounts
            if mount.kind == "volume" and not mount.backup
        )

    def _replace(self, task: Task, source: Source, plan: Plan) -> tuple[Record, Outcome]:
        assert plan.replaced is not None
        host = self._host
        before = host.store.load(plan.replaced.id)
        self._check_replaced(before, source.doing)
        if before.uuid != plan.replaced.uuid:
            raise WrongState(f"cannot {source.doing}: {before.title} is another container than a moment ago")
        number = before.id
        self._name_volumes_anew(before, plan.draft)
        record = dataclasses.replace(
            before, name=plan.name, config=plan.draft.config, config_text=plan.draft.text, error="",
            pool=plan.options.pool, volume=self._free_volume(before, plan.options.pool), template="",
            generation=before.generation + 1, boot_config="",
            # What was restored is what it was when it was backed up.
            uuid=(not plan.renew and plan.head.uuid) or before.uuid,
        )  # fmt: skip
        check_enforceable(number, limits_of(record), host.cgroups.available)
        made = self._own_volumes(record) - self._own_volumes(before)
        made |= {f"{record.pool}/{states_of(record)}"}
        gone = self._own_volumes(before) - self._own_volumes(record) - self._unmounted(before, record)
        facts: dict[str, Any] = {
            "volume": record.volume, "new": sorted(made), "old": sorted(gone),
            "firewall": plan.head.firewall,
        }  # fmt: skip
        self._journal.write(number, "restore", **facts)
        running = False
        try:
            with ExitStack() as undo:
                record, outcome = self._fill(task, source, record, before, undo, plan)
                if plan.renew:
                    renew(host, record, task)
                task.check()
                running = host.live.running(number) is not None
                facts |= {"start": running, "config": record.config_text}
                self._journal.write(number, "restore", **facts)
                self._stop(task, number)
                fault.point("restore.stopped")
                self._take_place(record)
                undo.pop_all()
        except BaseException:
            self._journal.clear(number)
            if running and host.live.running(number) is None:
                self._lifecycle.start(task, number)
            raise
        self._finish(number, record.config_text, gone, plan.head.firewall, plan.draft)
        host.bus.publish("container", id=number, change="restored")
        if running:
            task.step("starting")
            self._lifecycle.start(task, number)
        return host.store.load(number), outcome

    def _stop(self, task: Task, number: int) -> None:
        """End the container that is replaced."""
        live = self._host.live
        if live.running(number):
            task.step("stopping")
            # Nothing that it could still write in its own volumes would be kept.
            self._lifecycle.stop(task, number, kill=True)
        elif not live.wait_settled(number, _SETTLE_S):
            raise WrongState(f"cannot replace {number}: its end is still being put away")
        self._host.release(number)

    def _take_place(self, record: Record) -> None:
        """Let the record name the new volume: from here on there is no way back."""
        kept = {
            name: getattr(record, name)
            for name in ("volume", "pool", "template", "generation", "uuid", "guest", "boot_config")
        }
        self._host.store.update(record.id, **kept)
        fault.point("restore.record.written")

    def _finish(
        self,
        number: int,
        text: str,
        gone: Sequence[str] | frozenset[str],
        rules: str,
        made: Draft | None,
    ) -> None:
        """Do what follows once the record names the new volume; every step can be done twice."""
        host = self._host
        before = host.store.load(number)
        if before.config_text != text:
            host.store.save_config(number, text)
        firewall.keep(host.where, number, rules)
        fault.point("restore.config.written")
        record = host.store.load(number)
        host.network.forget_others(number, record.config.nets if record.config else ())
        self._enroll(record, made or Draft(text))
        for name in host.pools.names():
            with contextlib.suppress(SysctrError):
                driver = host.pools.get(name)
                for volume in driver.list():
                    if f"{name}/{volume}" in gone:
                        self._destroy(driver, volume)
        fault.point("restore.old.destroyed")
        self._journal.clear(number)

    def settle(self, record: Record, entry: dict[str, Any]) -> bool:
        """Finish or undo what a crash cut short; True if the container has to be started then."""
        host = self._host
        if record.volume == entry["volume"]:
            log.info("%d: finishing the restore that a crash cut short", record.id)
            self._finish(record.id, entry["config"], entry["old"], entry.get("firewall", ""), None)
        else:
            log.info("%d: taking back the restore that a crash cut short", record.id)
            for name in host.pools.names():
                with contextlib.suppress(SysctrError):
                    driver = host.pools.get(name)
                    for volume in driver.list():
                        if f"{name}/{volume}" in entry["new"]:
                            self._destroy(driver, volume)
            self._journal.clear(record.id)
        return bool(entry.get("start")) and host.live.running(record.id) is None

    def _name_volumes_anew(self, before: Record, made: Draft) -> None:
        """Give the mount points whose data the archive has new volumes beside those of the container."""
        host, edits = self._host, {}
        kept = self._kept(before)
        taken = {volume for name in host.pools.names() for volume in self._volumes(name)}
        for mount in made.config.mounts:
            name = f"{before.id}-{mount.name}"
            if mount.kind == "volume" and name in taken and name not in kept:
                stem = re.sub(r"-[0-9]+$", "", mount.name)
                number = next(k for k in range(2, 10_000) if f"{before.id}-{stem}-{k}" not in taken)
                edits[f"{mount.key}.name"] = f"{stem}-{number}"
                taken.add(f"{before.id}-{stem}-{number}")
        made.edit(edits)

    def _free_volume(self, before: Record, pool: str) -> str:
        taken = self._volumes(pool)
        return next(name for k in range(2, 10_000) if (name := f"{before.id}-{k}") not in taken)

    def _volumes(self, pool: str) -> frozenset[str]:
        try:
            return frozenset(self._host.pools.get(pool).list())
        except SysctrError:
            return frozenset()

    def _own_volumes(self, record: Record) -> frozenset[str]:
        """Return the volumes of a container by pool and name: its root, and its own mount points."""
        mounts: tuple[Mount, ...] = record.config.mounts if record.config is not None else ()
        return frozenset(
            [f"{record.pool}/{record.volume}"]
            + [
                f"{mount.pool or record.pool}/{record.id}-{mount.name}"
                for mount in mounts
                if mount.kind == "volume"
            ]
        )

    def _unmounted(self, before: Record, record: Record) -> frozenset[str]:
        """Return the volumes that no mount point has any more: they are kept, as by `mount remove --keep`."""
        targets = {mount.target for mount in record.usable("restore").mounts if mount.kind == "volume"}
        mounts = before.config.mounts if before.config is not None else ()
        return frozenset(
            f"{mount.pool or before.pool}/{before.id}-{mount.name}"
            for mount in mounts
            if mount.kind == "volume" and mount.target not in targets
        )


def _own_number(file_name: str, own: dict[str, Any]) -> int | None:
    """Return the number that an archive's container had, by what it says or else by its name."""
    if own:
        return int(own["id"])
    parsed = archives.parse_name(file_name)
    return parsed.number if parsed is not None else None
