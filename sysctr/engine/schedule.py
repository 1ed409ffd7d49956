"""Snapshots that are made and deleted by themselves, as each container's configuration says."""

import logging
import threading
import time

from sysctr.config.schedule import parse_schedule
from sysctr.config.schema import SnapshotRules
from sysctr.engine import retention
from sysctr.engine.host import Host
from sysctr.engine.record import Record
from sysctr.engine.snapshots import Snapshots
from sysctr.engine.tasks import Task
from sysctr.errors import Busy, NoDaemon, SysctrError

log = logging.getLogger(__name__)

# A configuration may be edited by hand: so often it is looked again.
_LOOK_S = 60.0
# And so often where a task is in the way.
_BUSY_S = 2.0
_EXPIRY_LOOK_S = 3600.0
_RETRY_S = 900.0


class Scheduler:
    """A thread that wakes when a snapshot is due or expires.

    When the last one was made is read from the snapshots themselves, so a restart forgets nothing, and what
    was missed meanwhile is made up for once.
    """

    def __init__(self, host: Host, snapshots: Snapshots) -> None:
        self._host = host
        self._snapshots = snapshots
        self._wanted = threading.Event()
        self._closing = False
        self._newest: dict[str, float] = {}
        self._not_before: dict[int, float] = {}
        self._under_way: set[int] = set()
        self._look_for_expired_s = 0.0

    def start(self) -> None:
        """Begin."""
        self._snapshots.on_expiry = self.look_for_expired
        threading.Thread(target=self._run, name="schedule", daemon=True).start()

    def close(self) -> None:
        """End; a snapshot that is being made is made."""
        self._closing = True
        self._wanted.set()

    def look_for_expired(self) -> None:
        """Look now when the next snapshot expires."""
        self._look_for_expired_s = 0.0
        self._wanted.set()

    def look(self) -> None:
        """Look now what is due: a configuration was changed."""
        self._wanted.set()

    def _run(self) -> None:
        while not self._closing:
            now_s = time.time()
            try:
                next_s = min(self._make_due(now_s), self._delete_expired(now_s))
            except Exception:
                log.exception("cannot look which snapshots are due")
                next_s = now_s + _LOOK_S
            self._wanted.wait(min(max(next_s - time.time(), 0.1), _LOOK_S))
            self._wanted.clear()

    def _make_due(self, now_s: float) -> float:
        next_s = now_s + _LOOK_S
        for record in self._host.store.list():
            if record.config is None or record.error:
                continue
            schedule = parse_schedule(record.config.snapshot.schedule)
            if schedule is None or record.id in self._under_way:
                continue
            if self._newest_of(record) >= schedule.last_due(now_s):
                next_s = min(next_s, schedule.next_due(now_s))
            elif self._not_before.get(record.id, 0.0) <= now_s and not self._submit(record):
                next_s = min(next_s, now_s + _BUSY_S)
        return next_s

    def _newest_of(self, record: Record) -> float:
        if record.uuid not in self._newest:
            made = [one.created for one in self._snapshots.all(record) if one.note.get("automatic")]
            self._newest[record.uuid] = max(made, default=0.0)
        return self._newest[record.uuid]

    def _submit(self, record: Record) -> bool:
        self._under_way.add(record.id)
        try:
            self._host.tasks.submit(
                "snapshot", record.id, lambda task: self._make(task, record), subject=record.title
            )
        except (Busy, NoDaemon):
            # What is in the way ends some time: often it is the very change that set the schedule.
            self._under_way.discard(record.id)
            return False
        return True

    def _make(self, task: Task, record: Record) -> dict:
        number = record.id
        # It may have been changed, renamed or destroyed since it was looked at.
        try:
            name = self._snapshots.free_name(self._host.store.load(number), "auto")
            made = self._snapshots.take(task, number, name, description="automatic", automatic=True)
            self._newest[record.uuid] = time.time()
            config = self._host.store.load(number).config
            surplus = self._surplus(record, config.snapshot) if config is not None else []
            if surplus:
                task.step(f"deleting {len(surplus)} that no rule keeps")
                self._snapshots.remove(number, surplus)
            return {**made, "deleted": surplus}
        except SysctrError as error:
            self._not_before[number] = time.time() + _RETRY_S
            self._host.bus.publish("container", id=number, change="snapshot-failed", reason=error.message)
            log.error("%d: the automatic snapshot failed: %s", number, error.message)
            raise
        finally:
            self._under_way.discard(number)
            self._wanted.set()

    def _surplus(self, record: Record, rules: SnapshotRules) -> list[str]:
        made = {
            one.created: one.name
            for one in self._snapshots.all(record)
            if one.note.get("automatic") and not one.error
        }
        keep = {rule: getattr(rules, f"keep_{rule}") or 0 for rule in retention.RULES}
        return [made[created] for created in retention.surplus(made, keep)]

    def _delete_expired(self, now_s: float) -> float:
        """Delete what has expired, and return when to look again."""
        if now_s < self._look_for_expired_s:
            return self._look_for_expired_s
        next_s = now_s + _EXPIRY_LOOK_S
        for record in self._host.store.list():
            if record.error:
                continue
            try:
                kept = self._snapshots.all(record)
            except SysctrError as error:
                log.debug("%s", error)
                continue
            ends = {one.name: end for one in kept if isinstance(end := one.note.get("expires"), int | float)}
            over = [name for name, end in ends.items() if end <= now_s]
            next_s = min([next_s, *(end for end in ends.values() if end > now_s)])
            if over and not self._delete(record, over):
                next_s = min(next_s, now_s + _BUSY_S)
        self._look_for_expired_s = next_s
        return next_s

    def _delete(self, record: Record, names: list[str]) -> bool:
        try:
            self._host.tasks.submit(
                "delsnapshot", record.id, lambda _task: self._snapshots.remove(record.id, names),
                subject=record.title,
            )  # fmt: skip
        except (Busy, NoDaemon):
            return False
        return True
