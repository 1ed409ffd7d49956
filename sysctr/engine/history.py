"""What the API offers on the past of containers and on copies of them; whatever takes long is a task."""

import contextlib
import logging
import threading
from typing import Any

from sysctr.config.schedule import parse_span
from sysctr.engine.backup import Backups
from sysctr.engine.cloning import Cloning
from sysctr.engine.compaction import Compaction
from sysctr.engine.creation import Creation
from sysctr.engine.differences import compare
from sysctr.engine.host import Host
from sysctr.engine.journal import Journal
from sysctr.engine.lifecycle import Lifecycle
from sysctr.engine.naming import naming, title
from sysctr.engine.record import Record
from sysctr.engine.recover import Notes, Recovery
from sysctr.engine.restore import Restoring
from sysctr.engine.rollback import Rollback
from sysctr.engine.schedule import Scheduler
from sysctr.engine.snapshots import Snapshots, check_name
from sysctr.engine.tasks import Task
from sysctr.errors import ConfigError, SysctrError, UsageError, WrongState
from sysctr.storage.base import RootSpec, Tree
from sysctr.template.base import check_name as check_template_name

log = logging.getLogger(__name__)


class History:
    """Snapshots, rollback, clones, templates of containers, differences, and recovery."""

    def __init__(self, host: Host, lifecycle: Lifecycle, creation: Creation) -> None:
        self._host = host
        self._lifecycle = lifecycle
        self._journal = Journal(host.store)
        self._snapshots = self.snapshots_of = Snapshots(host, self._journal)
        self._rollback = Rollback(host, lifecycle, self._snapshots, self._journal)
        self._cloning = Cloning(host, lifecycle, self._snapshots, creation.discard_volumes)
        self.backups = Backups(host, lifecycle, self._snapshots, self._journal)
        self.restoring = Restoring(host, lifecycle, self._journal, creation.discard_volumes)
        self._recovery = Recovery(host, self._snapshots, self._journal)
        self._scheduler = Scheduler(host, self._snapshots)
        self._compaction = Compaction(host, self._snapshots)
        self._snapshots.on_change = self._compaction.soon
        notes = Notes(host)
        self._notes = notes

        def saved(number: int) -> None:
            if notes.keep(number):
                self._scheduler.look()

        host.store.on_saved = saved

    def settle(self) -> list[int]:
        """Finish or undo what a crash cut short; returns the containers that have to be started then."""
        to_start = []
        for number, entry in self._journal.pending():
            try:
                record = self._host.store.load(number)
                if entry["action"] == "restart":
                    if self._lifecycle.finish_restart(number, float(entry["until"])):
                        to_start.append(number)
                elif entry["action"] == "rollback":
                    if self._rollback.finish(record, entry):
                        to_start.append(number)
                elif entry["action"] == "restore":
                    if self.restoring.settle(record, entry):
                        to_start.append(number)
                else:
                    self._snapshots.finish(record, entry)
                    if entry.get("start") and self._host.live.running(number) is None:
                        to_start.append(number)
            except (SysctrError, OSError, KeyError, ValueError) as error:
                # Its pool may be missing today. The journal stays, and so `doctor` tells of it.
                log.error(
                    "%d: cannot finish the %s that a crash cut short: %s", number, entry["action"], error
                )
        self._snapshots.sweep()
        self.backups.sweep()
        return to_start

    def open(self, to_start: list[int]) -> None:
        """Take up what goes on by itself, when everything that runs is known."""
        for number in to_start:
            with contextlib.suppress(SysctrError):
                self._lifecycle.submit_start(number)
        self._scheduler.start()
        self._compaction.start()
        # Volumes that an earlier version made have none.
        threading.Thread(target=self._notes.keep_all, name="notes", daemon=True).start()

    def close(self) -> None:
        """End what goes on by itself."""
        self._scheduler.close()
        self._compaction.close()

    def orphans(self) -> list[str]:
        """Return, in words, what belongs to no container."""
        return self._recovery.orphans()

    def checks(self) -> list[dict[str, Any]]:
        """Return what `doctor` says of it."""
        found = self.orphans()
        if not found:
            found, state, hint = ["nothing is left of containers that are gone"], "ok", ""
        else:
            state, hint = (
                "warn",
                "`sysctr recover` rebuilds containers whose records are lost; what else was cut short, "
                "`sysctr daemon restart` finishes",
            )
        return [
            {"check": "leftovers", "ok": True, "state": state, "detail": text, "hint": hint} for text in found
        ]

    def count(self, record: Record) -> int | None:
        """Return how many snapshots a container has; None where nobody can tell."""
        try:
            return len(self._snapshots.all(record))
        except SysctrError:
            return None

    # Snapshots

    @naming
    def snapshots(self, ref: str) -> dict[str, Any]:
        """Return a container's snapshots, oldest first, and the one that the present goes back to."""
        record = self._find(ref)
        return {"id": record.id, "name": record.name, **self._snapshots.show(record)}

    @naming
    def snapshot(
        self, ref: str, name: str | None = None, *, description: str = "", expires: str | None = None
    ) -> Task:
        """Keep the state of a container; without a name it gets one of the time."""
        record = self._find(ref)
        chosen = check_name(name) if name else self._snapshots.free_name(record, "snap")
        try:
            expires_s = parse_span(expires) if expires else None
        except ConfigError as error:
            raise UsageError(f"cannot let the snapshot {chosen} expire: {error.message}") from error
        if any(one.name == chosen for one in self._snapshots.all(record)):
            raise WrongState(
                f"cannot snapshot {record.id}: there is a snapshot {chosen} already", "choose another name"
            )
        return self._submit(
            "snapshot",
            record,
            lambda task: self._snapshots.take(
                task, record.id, chosen, description=description, expires_s=expires_s
            ),
        )

    @naming
    def delsnapshot(self, ref: str, names: list[str], *, every: bool = False) -> Task:
        """Delete snapshots by name, or every one."""
        record = self._find(ref)
        if every == bool(names):
            raise UsageError(f"cannot delete snapshots of {record.id}: give names, or --all")
        chosen = [one.name for one in self._snapshots.all(record)] if every else list(dict.fromkeys(names))
        for name in chosen:
            self._snapshots.get(record, name)
        return self._submit("delsnapshot", record, lambda _task: self._snapshots.remove(record.id, chosen))

    @naming
    def rollback(self, ref: str, name: str) -> Task:
        """Bring a container back to a snapshot; all snapshots stay."""
        record = self._find(ref)
        self._rollback.check(record, name)
        return self._submit("rollback", record, lambda task: self._rollback.carry_out(task, record.id, name))

    @naming
    def diff(self, ref: str, snapshot: str | None = None) -> Task:
        """Compare the present files with a snapshot, or with the template the container was made of."""
        record = self._find(ref)
        if record.damaged:
            record.usable("compare")
        if snapshot:
            self._snapshots.get(record, snapshot)
        else:
            self._host.templates.get(record.template)
        return self._submit("diff", record, lambda task: self._compare(task, record, snapshot))

    def _compare(self, task: Task, record: Record, snapshot: str | None) -> dict[str, Any]:
        host = self._host
        driver, volume = host.driver(record), record.volume
        with contextlib.ExitStack() as stack:
            now = ""
            if host.live.running(record.id) is not None:
                now = stack.enter_context(self._snapshots.temporary(task, record))
            else:
                host.live.wait_settled(record.id, 30)
                host.release(record.id)
            if snapshot:
                before = stack.enter_context(driver.opened(volume, snapshot))
            else:
                rootfs = host.templates.rootfs(record.template)
                before = RootSpec((Tree("template", rootfs, read_only=True),))
            after = stack.enter_context(driver.opened(volume, now))
            task.step("comparing")
            found = compare(host.jobs_for(record), before, after, f"{host.where.lib}/scratch", task)
        return {"id": record.id, "before": snapshot or f"template {record.template}", **found}

    # Copies

    @naming
    def clone(self, ref: str, spec: dict[str, Any]) -> Task:
        """Make a container of another one, with an identity of its own."""
        source = self._find(ref)
        self._cloning.check(source, spec)
        host = self._host
        number = host.store.reserve(spec["name"], spec.get("id"))
        try:
            return host.tasks.submit(
                "clone", number, lambda task: self._cloning.clone(task, source.id, spec, number),
                subject=title(spec["name"], number),
            )  # fmt: skip
        except BaseException:
            host.store.release(number)
            raise

    @naming
    def template(self, ref: str, name: str, *, snapshot: str | None = None, description: str = "") -> Task:
        """Make a template of a container, which is not touched and may run."""
        source = self._find(ref)
        check_template_name(name)
        if any(template.name == name for template in self._host.templates.list()):
            raise WrongState(f"cannot make template {name}: it exists already", "choose another name")
        if snapshot:
            self._snapshots.get(source, snapshot)
        return self._submit(
            "template-create",
            source,
            lambda task: self._cloning.template(
                task, source.id, name, snapshot=snapshot or "", description=description
            ),
        )

    def recover(self, *, dry_run: bool = False) -> dict[str, Any]:
        """Rebuild the records that are missing from what the volumes say."""
        return self._recovery.recover(dry_run=dry_run)

    def _find(self, ref: str) -> Record:
        return self._host.store.find(ref)

    def _submit(self, kind: str, record: Record, function: Any) -> Task:
        return self._host.tasks.submit(kind, record.id, function, subject=record.title)
