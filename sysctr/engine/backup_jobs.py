"""Backup jobs: their files, when they are due, and what the API offers on them.

etc/backup-jobs/NAME.toml   what the job is, an administrator's file
lib/backup-runs/NAME.json   when it ran and what became of it, ours
"""

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sysctr.config import backup_job, toml, values
from sysctr.config.backup import in_force
from sysctr.config.backup_job import Job
from sysctr.config.schedule import parse_schedule
from sysctr.engine import alarm, archives
from sysctr.engine.archiving import Archiving
from sysctr.engine.backup_run import Runner, Start
from sysctr.engine.host import Host
from sysctr.engine.job_state import JobState, read_state, write_state
from sysctr.engine.tasks import ENDED, Cancelled, Task
from sysctr.errors import Busy, ConfigError, NoDaemon, NotFound, SysctrError, UsageError, WrongState
from sysctr.linux import files

log = logging.getLogger(__name__)

# A file may be edited by hand: so often it is looked again.
_LOOK_S = 60.0


@dataclass(frozen=True)
class JobFile:
    """The file of a job: its text, and the job or the mistake in it."""

    name: str
    text: str
    job: Job | None
    mistake: str = ""

    @property
    def digest(self) -> str:
        """Return what tells whether the text was edited meanwhile."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogateescape")).hexdigest()


class JobFiles:
    """The files of all jobs, read anew whenever they are asked for."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def path(self, name: str) -> str:
        """Return the path of a job's file."""
        return f"{self._directory}/{name}.toml"

    def names(self) -> "list[str]":
        """Return the names of all jobs."""
        try:
            found = [name.removesuffix(".toml") for name in os.listdir(self._directory)]
        except FileNotFoundError:
            return []
        return sorted(name for name in found if os.path.isfile(self.path(name)) and _is_name(name))

    def all(self) -> "list[JobFile]":
        """Return every job, one with a mistake too."""
        found = []
        for name in self.names():
            with contextlib.suppress(NotFound):
                found.append(self.load(name))
        return found

    def load(self, name: str) -> JobFile:
        """Return a job, with a mistake or not; NotFound where there is none of this name."""
        try:
            if not _is_name(name):
                raise FileNotFoundError
            data, _ = files.read_bounded(self.path(name), toml.LONGEST_FILE_BYTES)
        except FileNotFoundError as error:
            raise NotFound(
                f"cannot find backup job {values.shown(name)[1:-1]}: there is none of this name",
                "`sysctr backup job list` shows them",
            ) from error
        except OSError as error:
            return JobFile(name, "", None, f"cannot read {self.path(name)}: {error.strerror or error}")
        text = data.decode("utf-8", "surrogateescape")
        try:
            return JobFile(name, text, backup_job.read_job(data.decode()))
        except UnicodeDecodeError:
            return JobFile(name, text, None, f"{self.path(name)} is not UTF-8")
        except ConfigError as error:
            return JobFile(name, text, None, f"{self.path(name)}: {error.message}")

    def write(self, name: str, text: str) -> None:
        """Write the file of a job."""
        os.makedirs(self._directory, 0o755, exist_ok=True)
        files.write_atomically(self.path(name), text.encode(), 0o644)

    def remove(self, name: str) -> None:
        """Remove the file of a job."""
        os.unlink(self.path(name))
        files.sync_directory(self._directory)


class BackupJobs:
    """Jobs, and a thread that runs each when it is due; what was missed meanwhile is made up for once."""

    def __init__(self, host: Host, archiving: Archiving, start: Start) -> None:
        self._host = host
        self._archiving = archiving
        self._runner = Runner(host, archiving, start)
        self._files = JobFiles(host.where.backup_jobs)
        self._lock = threading.Lock()
        self._states: dict[str, JobState] = {}
        self._running: dict[str, Task] = {}
        self._told: dict[str, str] = {}
        self._wanted = threading.Event()
        self._closing = False

    def open(self) -> None:
        """Begin to run what is due."""
        threading.Thread(target=self._keep_looking, name="backup-jobs", daemon=True).start()

    def close(self) -> None:
        """End; a run goes on until its task is cancelled, and is taken up by the next daemon."""
        self._closing = True
        self._wanted.set()

    def look(self) -> None:
        """Look now what is due."""
        self._wanted.set()

    def directories(self) -> "list[str]":
        """Return the directories that jobs name."""
        return [one.job.directory for one in self._files.all() if one.job and one.job.directory]

    # What the API offers

    def list(self) -> "list[dict[str, Any]]":
        """Return every job with what became of its last run."""
        return [self._shown(one) for one in self._files.all()]

    def show(self, name: str) -> dict[str, Any]:
        """Return a job, and its file to edit."""
        one = self._files.load(name)
        return {"job": self._shown(one), "toml": one.text, "digest": one.digest}

    def add(self, name: str, settings: Mapping[str, object]) -> dict[str, Any]:
        """Make a job; WrongState where there is one of this name."""
        doing = f"add backup job {values.shown(name)[1:-1]}"
        if not _is_name(name):
            rule = "lower-case letters, digits and inner hyphens, 63 at most and not digits alone"
            raise UsageError(f"cannot {doing}: a job's name has {rule}")
        job = self._checked(doing, lambda: backup_job.parse_job(settings))
        with self._lock:
            if os.path.lexists(self._files.path(name)):
                hint = f"`sysctr backup job edit {name}` changes it"
                raise WrongState(f"cannot {doing}: there is one of this name", hint)
            self._write(doing, name, backup_job.new_text(name, job))
            # What was remembered of an earlier job of this name is not of this one.
            self._forget(name)
        return self._changed(name, job, "added")

    def replace(self, name: str, text: str, digest: str) -> dict[str, Any]:
        """Replace the file of a job, if it is still the one of `digest`."""
        doing = f"change backup job {name}"
        job = self._checked(doing, lambda: backup_job.read_job(text))
        with self._lock:
            if self._files.load(name).digest != digest:
                raise WrongState(f"cannot {doing}: its file was changed meanwhile", "try again")
            self._write(doing, name, text)
        return self._changed(name, job, "changed")

    def remove(self, name: str) -> None:
        """Forget a job; its archives stay."""
        self._files.load(name)
        with self._lock:
            task = self._running_task(name)
            if task is not None:
                raise Busy(
                    f"cannot remove backup job {name}: it is running",
                    f"wait for it with `sysctr task wait {task.id}`, or end it with "
                    f"`sysctr task cancel {task.id}`",
                )
            self._files.remove(name)
            self._forget(name)
        self._host.bus.publish("backup-job", name=name, change="removed")

    def run(self, name: str) -> Task:
        """Run a job now, whatever its schedule says."""
        one = self._files.load(name)
        if one.job is None:
            hint = f"mend {self._files.path(name)}"
            raise ConfigError(f"cannot run backup job {name}: {one.mistake}", hint)
        return self._submit(name, one.job, resume=False)

    def notices(self) -> "list[str]":
        """Return what whoever looks at the containers should know: jobs that failed."""
        found = []
        # No file is read for this: the list of containers is asked for all the time.
        for name in self._files.names():
            with self._lock:
                failed = self._state(name).state == "failed"
            words = self._told.get(name) or ("its last run failed" if failed else "")
            if words:
                found.append(f"backup job {name}: {words} (`sysctr backup job show {name}`)")
        return found

    def checks(self) -> "list[dict[str, Any]]":
        """Return what `doctor` says of jobs; nothing on a host without any."""
        checks = []
        for shown in self.list():
            detail, hint = shown["error"], f"mend {shown['file']}"
            if not detail and shown["state"] == "failed":
                detail, hint = "its last run failed", f"`sysctr backup job show {shown['name']}` says why"
            checks.append(
                {
                    "check": f"backup job {shown['name']}", "ok": not detail,
                    "state": "fail" if detail else "ok", "hint": hint if detail else "",
                    "detail": detail or ("its last run was well" if shown["last_success"] else "no run yet"),
                }
            )  # fmt: skip
        return checks

    # Running

    def _keep_looking(self) -> None:
        while not self._closing:
            try:
                next_s = self._run_due(time.time())
            except Exception:
                log.exception("cannot look which backup jobs are due")
                next_s = time.time() + _LOOK_S
            self._wanted.wait(min(max(next_s - time.time(), 0.1), _LOOK_S))
            self._wanted.clear()

    def _run_due(self, now_s: float) -> float:
        """Run what is due, and return when to look again."""
        next_s = now_s + _LOOK_S
        jobs = self._files.all()
        self._tell_mistakes(jobs)
        for one in jobs:
            if one.job is None:
                continue
            resume, due = False, False
            with self._lock:
                if self._running_task(one.name) is not None:
                    continue
                state = self._state(one.name)
                before = (state.schedule, state.since, state.begun)
                after_s = state.due_after(one.job.schedule, now_s)
                if before != (state.schedule, state.since, state.begun):
                    self._save(one.name)
                resume = state.cut_short and not state.resumed
            schedule = parse_schedule(one.job.schedule) if one.job.enabled else None
            if schedule is not None:
                due = schedule.last_due(now_s) > after_s
                next_s = min(next_s, schedule.next_due(now_s))
            if due or resume:
                # What is due anew is done from the beginning.
                with contextlib.suppress(Busy, NoDaemon):
                    self._submit(one.name, one.job, resume=not due)
        return next_s

    def _submit(self, name: str, job: Job, *, resume: bool) -> Task:
        with self._lock:
            task = self._host.tasks.submit(
                "backup-run", None, lambda task: self._run(task, name, job, resume=resume),
                subject=f"backup job {name}",
            )  # fmt: skip
            self._running[name] = task
        task.on_end(self._wanted.set)
        return task

    def _running_task(self, name: str) -> Task | None:
        task = self._running.get(name)
        return task if task is not None and task.state not in ENDED else None

    def _run(self, task: Task, name: str, job: Job, *, resume: bool) -> dict[str, Any]:
        with self._lock:
            state = self._state(name)
            state.begun, state.ended, state.state, state.task = time.time(), None, "", task.id
            state.resumed, state.failures = resume, []
            if not resume:
                state.done = []
            done = set(state.done)
            self._save(name)

        def after() -> None:
            with self._lock:
                state.done = sorted(done)
                self._save(name)

        outcome = "failed"
        try:
            failures = self._runner.run(task, name, job, done, after)
            state.failures = [failure.as_dict() for failure in failures]
            outcome = "failed" if failures else "done"
        except Cancelled:
            outcome = "cancelled"
            raise
        except SysctrError as error:
            state.failures = [{"container": None, "title": "", "error": error.message, "task": task.id}]
            raise
        finally:
            self._end(name, state, outcome)
        if failures:
            more = f", and {len(failures) - 1} more failed" if len(failures) > 1 else ""
            first = f"{failures[0].title}: " if failures[0].title else ""
            raise SysctrError(
                f"cannot run backup job {name}: {first}{failures[0].reason}{more}",
                f"`sysctr task show {task.id}` has the log",
            )
        return {"job": name, "backed_up": sorted(done)}

    def _end(self, name: str, state: JobState, outcome: str) -> None:
        with self._lock:
            if self._host.tasks.closing and outcome == "cancelled":
                # The next daemon goes on with it, however often one is restarted.
                state.resumed = False
            else:
                state.ended, state.state = time.time(), outcome
                if outcome == "done":
                    state.last_success = state.ended
            self._save(name)

    def _tell_mistakes(self, jobs: "list[JobFile]") -> None:
        for one in jobs:
            if one.mistake and self._told.get(one.name) != one.mistake:
                log.error("backup job %s is not run: %s", one.name, one.mistake)
        self._told = {one.name: one.mistake for one in jobs}

    # What is remembered; with the lock held

    def _state(self, name: str) -> JobState:
        if name not in self._states:
            self._states[name] = read_state(self._state_path(name))
        return self._states[name]

    def _save(self, name: str) -> None:
        write_state(self._state_path(name), self._states[name])

    def _forget(self, name: str) -> None:
        self._states.pop(name, None)
        with contextlib.suppress(OSError):
            os.unlink(self._state_path(name))

    def _state_path(self, name: str) -> str:
        return f"{self._host.where.backup_runs}/{name}.json"

    # Checks and views

    def _checked(self, doing: str, parse: Any) -> Job:
        """Return a job that can be run on this host as it is now."""
        try:
            job: Job = parse()
        except ConfigError as error:
            reason = error.message.removeprefix("cannot accept ").removeprefix("cannot read ")
            raise UsageError(f"cannot {doing}: {reason}", error.hint) from error
        records = self._host.store.list()
        known = {record.name for record in records} | {str(record.id) for record in records}
        for ref in (*job.containers, *job.exclude):
            if ref not in known:
                hint = "`sysctr list` shows what there is"
                raise NotFound(f"cannot {doing}: there is no container {ref}", hint)
        try:
            alarm.check_command(job.on_failure)
            alarm.check_mail(job.mail_to)
            if job.directory:
                with archives.opened(job.directory):
                    pass
        except SysctrError as error:
            reason = error.message.removeprefix("cannot accept ").removeprefix("cannot open the ")
            raise type(error)(f"cannot {doing}: {reason}", error.hint) from error
        return job

    def _write(self, doing: str, name: str, text: str) -> None:
        try:
            self._files.write(name, text)
        except OSError as error:
            raise SysctrError(f"cannot {doing}: {error.strerror or error}") from error

    def _changed(self, name: str, job: Job, change: str) -> dict[str, Any]:
        self._host.bus.publish("backup-job", name=name, change=change)
        self._wanted.set()
        notes = []
        if not in_force(job, self._host.settings.backup).keep.rules:
            notes.append("no rule says how many archives to keep: all of them are")
        if job.schedule == "off" or not job.enabled:
            notes.append(f"it is run by `sysctr backup job run {name}` only")
        return {"job": self._shown(self._files.load(name)), "notes": notes}

    def _shown(self, one: JobFile) -> dict[str, Any]:
        with self._lock:
            state = self._state(one.name)
            task = self._running_task(one.name)
        shown: dict[str, Any] = {
            "name": one.name, "file": self._files.path(one.name), "error": one.mistake,
            "state": "running" if task else ("interrupted" if state.cut_short else state.state),
            "task": state.task or None, "last_run": state.begun, "last_end": state.ended,
            "last_success": state.last_success, "failures": state.failures, "done": state.done,
            "next_run": None, "enabled": False, "schedule": "", "settings": {},
        }  # fmt: skip
        if one.job is None:
            return shown
        job, settings = one.job, in_force(one.job, self._host.settings.backup)
        schedule = parse_schedule(job.schedule)
        return shown | {
            "enabled": job.enabled, "schedule": job.schedule, "settings": backup_job.TABLE.dump(job),
            "next_run": schedule.next_due(time.time()) if schedule and job.enabled else None,
            "directory": archives.own_directory(self._host.where, settings), "mode": settings.mode,
            "compress": settings.compress, "bwlimit_bytes": settings.bwlimit_bytes or None,
            "keep": settings.keep.rules,
        }  # fmt: skip


def _is_name(name: str) -> bool:
    try:
        values.parse_name(name)
    except ConfigError:
        return False
    return True
