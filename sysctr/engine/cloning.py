"""Clones of containers, and templates made of them: the same files under an identity of their own."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from sysctr.cgroup.base import check_enforceable
from sysctr.config import values
from sysctr.engine.host import Host
from sysctr.engine.identity import cleaning, cloned_config, setup_work
from sysctr.engine.lifecycle import Lifecycle, limits_of
from sysctr.engine.record import Record, new_record
from sysctr.engine.snapshots import Snapshots, Volume
from sysctr.engine.tasks import Task
from sysctr.errors import ConfigError, Refused, SysctrError, UsageError
from sysctr.linux import fault
from sysctr.storage.base import Driver
from sysctr.template.base import Made, Source, Template

# A clone holds the original, so that nobody starts, changes or destroys it meanwhile.
_HOLD_TIMEOUT_S = 30.0


class Cloning:
    """Makes containers and templates of containers."""

    def __init__(
        self, host: Host, lifecycle: Lifecycle, snapshots: Snapshots, discard: Callable[[int], None]
    ) -> None:
        self._host = host
        self._discard = discard
        self._lifecycle = lifecycle
        self._snapshots = snapshots

    def check(self, record: Record, spec: dict[str, Any]) -> None:
        """Raise what can be told before anything is made."""
        try:
            values.parse_name(spec["name"])
        except ConfigError as error:
            raise UsageError(f"cannot clone {record.id}: {error.message}") from error
        if record.damaged:
            record.usable("clone")
        if spec.get("pool"):
            self._host.pools.get(spec["pool"], f"clone {record.id}")
        self._configuration(record, spec)

    def clone(self, task: Task, source_id: int, spec: dict[str, Any], number: int) -> dict[str, Any]:
        """Make the container whose number and name are reserved already a copy of another one.

        Constant time where the storage can, unless a full copy is wanted. A running original goes on; it is
        paused for as long as a snapshot takes.
        """
        host = self._host
        with ExitStack() as undo:
            undo.callback(host.store.release, number)
            with host.tasks.hold(source_id, "clone", _HOLD_TIMEOUT_S):
                source = host.store.load(source_id)
                text, notes = self._configuration(source, spec)
                idmap = host.store.allocate_ids(number)
                record = new_record(
                    number, text, idmap, template=source.template, pool=spec.get("pool") or source.pool
                )
                check_enforceable(number, limits_of(record), host.cgroups.available)
                undo.callback(self._discard, number)
                with self._state(task, source, spec.get("snapshot") or "") as snapshot:
                    for volume in self._volumes(source, snapshot):
                        self._copy(task, volume, snapshot, source, record, spec)
                        fault.point("clone.volume.copied")
            undo.callback(host.network.release, number)
            host.network.ensure()
            host.network.enroll(number, record.config.name, record.config.nets)
            fault.point("clone.enrolled")
            renew(host, record, task)
            fault.point("clone.renewed")
            task.check()
            host.store.create(record)
            fault.point("clone.created")
            undo.pop_all()
        host.bus.publish("container", id=number, change="created", source=source_id)
        host.collect_soon()
        for note in notes:
            task.log(note)
        if spec.get("start"):
            self._lifecycle.start_new(task, record)
        return {"id": number, "name": record.name, "source": source_id, "notes": notes}

    def _configuration(self, source: Record, spec: dict[str, Any]) -> tuple[str, list[str]]:
        text = source.config_text
        if spec.get("snapshot"):
            kept = self._snapshots.get(source, spec["snapshot"])
            if kept.error:
                raise SysctrError(f"cannot clone {source.id}: snapshot {kept.name} is damaged: {kept.error}")
            if isinstance(kept.note.get("config"), str):
                text = kept.note["config"]
        elif source.config is None:
            source.usable("clone")
        return cloned_config(
            text, spec["name"], self._host.network.bridge, spec.get("set") or {},
            keep_addresses=bool(spec.get("keep_addresses")),
        )  # fmt: skip

    @contextlib.contextmanager
    def _state(self, task: Task, source: Record, snapshot: str) -> Iterator[str]:
        """Give the name of the snapshot that is copied; empty for the volumes of a stopped container."""
        if snapshot or self._host.live.running(source.id) is None:
            if not snapshot:
                self._host.live.wait_settled(source.id, _HOLD_TIMEOUT_S)
                self._host.release(source.id)
            yield snapshot
            return
        with self._snapshots.temporary(task, source) as name:
            yield name

    def _volumes(self, source: Record, snapshot: str) -> list[Volume]:
        """Return the volumes that are copied, the root first."""
        return [
            (driver, volume)
            for driver, volume in reversed(self._snapshots.volumes(source))
            if not snapshot or any(one.name == snapshot for one in driver.snapshots(volume))
        ]

    def _copy(
        self, task: Task, volume: Volume, snapshot: str, source: Record, record: Record, spec: dict[str, Any]
    ) -> None:
        host = self._host
        driver, name = volume
        is_root = name == source.volume
        # The root of a container that was restored in place has another name than its number.
        target = record.volume if is_root else f"{record.id}{name.removeprefix(str(source.id))}"
        target_driver = host.pools.get(record.pool) if is_root or spec.get("pool") else driver
        size_bytes = record.config.limits.disk_bytes if is_root else driver.size(name)
        if size_bytes is not None and not target_driver.traits.enforces_size:
            raise Refused(
                f"cannot limit the disk of {record.name}: pool {record.pool} cannot enforce a size",
                "add `--set limits.disk=`",
            )
        worker = host.worker(record, task)
        if target_driver is driver and not (spec.get("full") and driver.traits.cheap_clones):
            task.step("cloning" if driver.traits.cheap_clones else "copying")
            driver.clone(name, snapshot, target, worker, size_bytes=size_bytes)
            return
        task.step("copying")
        target_driver.create(target, None, worker, size_bytes=size_bytes)
        with driver.opened(name, snapshot) as view:
            try:
                root = target_driver.activate(target)
                if root.lowers:
                    raise SysctrError(f"cannot copy into volume {target}: it is not empty")
                fault.point("clone.volume.copying")
                worker.copy(view, root.trees[-1].path)
            finally:
                target_driver.deactivate(target)


    def template(
        self, task: Task, number: int, name: str, *, snapshot: str = "", description: str = ""
    ) -> dict[str, Any]:
        """Make a template of a container's root, without what makes it this container; it may run."""
        host = self._host
        source = host.store.load(number)
        if source.damaged:
            source.usable("make a template of")
        driver: Driver = host.driver(source)
        known = host.template_of(source)

        def build(building: str) -> Made:
            rootfs = f"{building}/rootfs"
            task.step("copying")
            with self._state(task, source, snapshot) as kept, driver.opened(source.volume, kept) as view:
                host.worker(source, task).copy(view, rootfs)
            fault.point("template.copied")
            task.check()
            task.step("removing what makes it this container")
            self._clean(task, source, rootfs)
            fault.point("template.cleaned")
            return _made(source, known, description)

        made = host.templates.add(name, build, log_line=task.step)
        host.bus.publish("template", name=name, change="created", source=number)
        return {"name": made.name, "size_bytes": made.size_bytes}

    def _clean(self, task: Task, source: Record, rootfs: str) -> None:
        jobs = self._host.jobs_for(source)
        status = jobs.run_tool(cleaning("/volume"), volume=rootfs, task=task)
        if status:
            raise SysctrError(
                f"cannot make a template of {source.id}: cleaning it up ended with {status}",
                "the task's log says why",
            )


def renew(host: Host, record: Record, task: Task | None) -> None:
    """Take the original's identity out of the files of a copy that does not run."""
    if task is not None:
        task.step("giving it an identity of its own")
    template = host.template_of(record)
    # Templates of ours bring their own way to make host keys at the first boot.
    ours = template is not None and template.source.kind == "recipe"
    systemd = host.guest_of(record).init_kind == "systemd" and not ours
    root = host.activate(record)
    try:
        host.jobs_for(record).run_builtin(record.id, root, setup_work(systemd=systemd), task)
    finally:
        host.driver(record).deactivate(record.volume)


def _made(source: Record, known: Template | None, description: str) -> Made:
    config = source.config
    return Made(
        source=Source(kind="container", name=source.title, digest=""),
        description=description or f"made of {source.title}",
        init=(config.init if config else "") or (known.init if known else ""),
        stop_signal=(config.stop_signal if config else "") or (known.stop_signal if known else ""),
        labels=dict(known.labels) if known else {},
    )
