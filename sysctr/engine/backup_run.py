"""One run of a backup job: its containers one after the other, pruning, and telling of what failed."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sysctr import errors
from sysctr.config.backup import BackupSettings, in_force
from sysctr.config.backup_job import Job, expand_notes
from sysctr.engine import alarm, archives
from sysctr.engine.archiving import Archiving
from sysctr.engine.backup import BackupOptions
from sysctr.engine.host import Host
from sysctr.engine.record import Record
from sysctr.engine.tasks import Cancelled, Task
from sysctr.errors import Busy, NoDaemon, SysctrError

log = logging.getLogger(__name__)

# So long a job waits for a container that something else is done to, and so often it asks.
_PATIENCE_S = 1800.0
_ASK_S = 2.0
_LOOK_S = 0.5

# Starts the backup of a container as a task of its own; Busy where one of it is being made.
Start = Callable[[str, BackupOptions], Task]


@dataclass(frozen=True)
class Failure:
    """What was not backed up, and why; without a container it is the job as a whole."""

    container: int | None
    title: str
    reason: str
    task: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it as the API sends it and as it is recorded."""
        return {"container": self.container, "title": self.title, "error": self.reason, "task": self.task}


def select(job: Job, records: Iterable[Record]) -> tuple[list[Record], list[str]]:
    """Return the containers that a job is for, and the names in its list that nobody has."""
    known = list(records)
    if job.containers:
        by_ref = {str(record.id): record for record in known} | {record.name: record for record in known}
        found = {by_ref[ref].id: by_ref[ref] for ref in job.containers if ref in by_ref}
        return list(found.values()), [ref for ref in job.containers if ref not in by_ref]
    chosen = [
        record
        for record in known
        # Of a container whose file has a mistake nobody knows the tags, and it should not go unseen.
        if job.all or record.config is None or job.tag in record.config.tags
    ]
    return [one for one in chosen if not {str(one.id), one.name} & set(job.exclude)], []


class Runner:
    """Runs jobs, one at a time: two would share the disks and take longer than one after the other."""

    def __init__(self, host: Host, archiving: Archiving, start: Start) -> None:
        self._host = host
        self._archiving = archiving
        self._start = start
        self._turn = threading.Lock()

    def run(
        self, task: Task, name: str, job: Job, done: "set[int]", after: Callable[[], None]
    ) -> list[Failure]:
        """Back up what is not in `done`, which grows; `after` is called after each; returns what failed."""
        while not self._turn.acquire(timeout=_LOOK_S):
            task.check()
            task.step("waiting for another backup job")
        try:
            return self._run(task, name, job, done, after)
        finally:
            self._turn.release()

    def _run(
        self, task: Task, name: str, job: Job, done: "set[int]", after: Callable[[], None]
    ) -> list[Failure]:
        host = self._host
        settings = in_force(job, host.settings.backup)
        directory = archives.own_directory(host.where, settings)
        chosen, unknown = select(job, host.store.list())
        failures = [Failure(None, ref, f"there is no container {ref}") for ref in unknown]
        try:
            archives.prepare(host.where, directory)
            with archives.opened(directory):
                pass
        except SysctrError as error:
            chosen, failures = [], [Failure(None, "", error.message)]
        if not chosen and not failures:
            task.log("there is no container that this job is for")
        for number, record in enumerate(chosen, 1):
            task.check()
            if record.id in done:
                continue
            words = f"{number} of {len(chosen)}: {record.title}"
            task.step(words)
            found = self._back_up(task, words, record, job, settings, directory)
            failures += found
            if not found:
                done.add(record.id)
            after()
        for failure in failures:
            task.log(f"failed: {failure.title}: {failure.reason}" if failure.title else failure.reason)
        if failures:
            self._tell(task, name, job, failures)
        return failures

    def _back_up(
        self, task: Task, words: str, record: Record, job: Job, settings: BackupSettings, directory: str
    ) -> list[Failure]:
        facts = {"guestname": record.name, "vmid": str(record.id), "node": os.uname().nodename}
        options = BackupOptions(
            directory=directory, mode=settings.mode, compress=settings.compress,
            notes=expand_notes(job.notes, facts), protected=job.protected, exclude=job.exclude_paths,
            bwlimit_bytes=settings.bwlimit_bytes or None,
        )  # fmt: skip
        made: Task | None = None
        try:
            made = self._started(task, record, options)
            self._follow(task, made, words)
            if made.state != "done":
                raise errors.from_dict(made.error or {})
            result = made.result
            task.log(f"{record.title}: {result['archive']}, {result['size_bytes']} bytes")
            for warning in result.get("warnings") or ():
                task.log(f"{record.title}: {warning}")
            # Never before: what a failed backup leaves is all there is.
            if rules := settings.keep.rules:
                self._archiving.prune_now(task, directory, rules, [record.id])
        except SysctrError as error:
            return [Failure(record.id, record.title, error.message, made.id if made else "")]
        return []

    def _started(self, task: Task, record: Record, options: BackupOptions) -> Task:
        deadline_s = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return self._start(str(record.id), options)
            except Busy as error:
                if time.monotonic() >= deadline_s:
                    raise
                task.step(f"waiting: {error.message}")
                task.check()
                time.sleep(_ASK_S)
            except NoDaemon:
                # The daemon is being stopped; the next one goes on here.
                raise Cancelled from None

    def _follow(self, task: Task, made: Task, words: str) -> None:
        """Wait for a backup, and end it where the job is cancelled."""
        step = ""
        while not made.wait(_LOOK_S):
            if task.cancelling and not made.cancelling:
                made.cancel()
            if made.step_text != step:
                step = made.step_text
                task.step(f"{words}: {step}")
            if made.progress_bytes is not None:
                task.progress(made.progress_bytes, made.total_bytes)
        # A daemon that is stopped cancels the job before its backups, which it then does not miss.
        task.check()

    def _tell(self, task: Task, name: str, job: Job, failures: Sequence[Failure]) -> None:
        node = os.uname().nodename
        for failure in failures:
            self._host.bus.publish(
                "backup-failed", job=name, container=failure.container, title=failure.title,
                error=failure.reason, task=failure.task or task.id,
            )  # fmt: skip
            log.error("backup job %s: %s: %s", name, failure.title or "it", failure.reason)
            if job.on_failure:
                facts = {
                    "SYSCTR_JOB": name, "SYSCTR_ERROR": failure.reason, "SYSCTR_NODE": node,
                    "SYSCTR_CONTAINER": str(failure.container or ""), "SYSCTR_NAME": failure.title,
                    "SYSCTR_TASK": failure.task or task.id,
                }  # fmt: skip
                self._try(task, "on_failure", lambda facts=facts: alarm.run_command(job.on_failure, facts))
        if job.mail_to:
            subject, body = mail_text(node, name, task.id, failures)
            self._try(task, "mail_to", lambda: alarm.send_mail(job.mail_to, subject, body))

    @staticmethod
    def _try(task: Task, what: str, tell: Callable[[], None]) -> None:
        # One that cannot be told of a failure must not hide it, nor keep others from being told.
        try:
            tell()
        except (SysctrError, OSError, ValueError) as error:
            log.error("%s: %s", what, error)
            task.log(f"{what}: {error}")


def mail_text(node: str, job: str, task_id: str, failures: Sequence[Failure]) -> tuple[str, str]:
    """Return subject and body of the mail that tells of failures."""
    titles = [failure.title for failure in failures if failure.title]
    which = f"{titles[0]} failed" if len(titles) == 1 else f"{len(titles)} containers failed"
    lines = [f"Backup job {job} of {node} did not back up everything.", ""]
    lines += [f"{failure.title or 'the job'}: {failure.reason}" for failure in failures]
    lines += ["", f"`sysctr task show {task_id}` on {node} has the log."]
    subject = f"sysctr on {node}: backup {f'of {which}' if titles else f'job {job} failed'}"
    return subject, "\n".join(lines) + "\n"
