"""Tasks: actions that take longer than a moment, with progress, log, cancellation and a record on disk.

What a task did is undone by the engine, beside the deed and from its own journal. The record here only tells
people what became of it.
"""

import contextlib
import errno
import json
import logging
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sysctr.engine.events import Bus
from sysctr.engine.naming import name_in
from sysctr.engine.task_files import TaskFiles, TaskLog
from sysctr.errors import Busy, NoDaemon, NoSpace, NotFound, SysctrError
from sysctr.paths import Layout

log = logging.getLogger(__name__)

KEPT = 500
THREADS = 32
PROGRESS_INTERVAL_S = 0.1
# A cancelled task ends at its next step, or when its programs are killed.
TAKE_OVER_S = 60.0
_CHECK_S = 0.2
# How long a task waits for a short action that holds its container, before it is refused.
_HOLD_PATIENCE_S = 2.0
# Kinds that are no verb of their object.
_VERBS = {
    "delsnapshot": "delete snapshots of", "diff": "compare", "passwd": "set a password of",
    "pull": "pull files from", "push": "push files to", "rollback": "roll back", "shutdown": "shut down",
    "template-create": "make a template of",
}  # fmt: skip
ENDED = frozenset({"done", "failed", "cancelled"})


class Cancelled(BaseException):
    """The task was asked to stop; a BaseException, so that no `except Exception` on the way swallows it."""


class Task:
    """One action: what the engine reports through it, and what others may see of it.

    Attributes are read without a lock: each is replaced whole.
    """

    __slots__ = (
        "_callbacks", "_changed", "_lock", "_log", "_published_s", "cancelling", "container",
        "created", "ended", "error", "id", "kind", "patience_s", "progress_bytes", "result", "started",
        "state", "step_text", "subject", "total_bytes",
    )  # fmt: skip

    def __init__(
        self,
        kind: str,
        container: int | None,
        subject: str,
        changed: "Callable[[Task], None]",
        directory: str,
    ) -> None:
        self.id = os.urandom(6).hex()
        self.kind = kind
        self.container = container
        self.subject = subject
        self.state = "queued"
        self.step_text = ""
        self.progress_bytes: int | None = None
        self.total_bytes: int | None = None
        self.created = time.time()
        self.started: float | None = None
        self.ended: float | None = None
        self.error: dict[str, str] | None = None
        self.result: Any = None
        self.cancelling = False
        self.patience_s = 0.0
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._changed = changed
        self._published_s = 0.0
        self._log: TaskLog | None = TaskLog(f"{directory}/{self.id}.log")

    @property
    def doing(self) -> str:
        """What it does, as words after "cannot"."""
        verb = _VERBS.get(self.kind) or re.sub("^(template|backup|pool)-", "", self.kind)
        return f"{verb} {self.subject}".rstrip()

    def check(self) -> None:
        """Raise Cancelled if the task was asked to stop; called by the engine between steps."""
        if self.cancelling:
            raise Cancelled

    def step(self, text: str) -> None:
        """Say what is done now."""
        self.step_text = text
        with self._lock:
            if self._log:
                # Written with the next line of log() or at the end: starting a container has ten steps
                # and no time for ten writes.
                self._log.add(text)
        self._changed(self)

    def progress(self, done_bytes: int, total_bytes: int | None = None) -> None:
        """Say how far it is; published ten times a second at most."""
        self.progress_bytes = done_bytes
        if total_bytes is not None:
            self.total_bytes = total_bytes
        now_s = time.monotonic()
        if now_s - self._published_s >= PROGRESS_INTERVAL_S:
            self._published_s = now_s
            self._changed(self)

    def log(self, text: str) -> None:
        """Add lines to the task's log file."""
        with self._lock:
            if self._log:
                self._log.add(text)
                self._log.flush()

    def flush(self) -> None:
        """Write the steps that are not in the log file yet."""
        with self._lock:
            if self._log:
                self._log.flush()

    def cancel(self) -> None:
        """Ask the task to stop; it does at its next check(), or never if it has passed the last."""
        with self._lock:
            if self.cancelling or self.state in ENDED:
                return
            self.cancelling = True
        self._changed(self)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once when the task ends, in its thread; at once if it has ended.

        With loop.call_soon_threadsafe inside, any number of coroutines wait without a thread each.
        """
        with self._lock:
            if self.state not in ENDED:
                self._callbacks.append(callback)
                return
        callback()

    def forget(self, callback: Callable[[], None]) -> None:
        """Take back on_end()."""
        with self._lock, contextlib.suppress(ValueError):
            self._callbacks.remove(callback)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait in this thread until the task has ended; return whether it has."""
        ended = threading.Event()
        self.on_end(ended.set)
        try:
            return ended.wait(timeout_s)
        finally:
            self.forget(ended.set)

    def as_dict(self) -> dict[str, Any]:
        """Return the task as the API sends it and as it is recorded."""
        return {
            "id": self.id, "kind": self.kind, "container": self.container, "subject": self.subject,
            "state": self.state, "step": self.step_text, "progress_bytes": self.progress_bytes,
            "total_bytes": self.total_bytes, "created": self.created, "started": self.started,
            "ended": self.ended, "error": self.error, "result": self.result, "cancelling": self.cancelling,
        }  # fmt: skip

    def begin(self) -> bool:
        """Go from queued to running; False if it was cancelled or ended before."""
        with self._lock:
            if self.state != "queued":
                return False
            self.started = time.time()
            self.state = "running"
        return True

    def end(self, state: str, error: dict[str, str] | None, result: Any, last_words: str) -> bool:
        """Take the final state and wake whoever waits; False if it had one already."""
        with self._lock:
            if self.state in ENDED:
                return False
            self.error, self.result, self.ended = error, result, time.time()
            # Last, since others look at the state first and at the rest if it is final.
            self.state = state
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback()
            except Exception:
                log.exception("task %s: who waited for it failed", self.id)
        with self._lock:
            if self._log:
                self._log.close(last_words)
                self._log = None
        return True


class TaskRunner:
    """Runs tasks in threads, at most one exclusive task of a container at a time, and keeps their records."""

    def __init__(self, layout: Layout, bus: Bus, *, threads: int = THREADS, kept: int = KEPT) -> None:
        self._files = TaskFiles(layout.tasks)
        self._bus = bus
        self._kept = kept
        self._free = threading.Condition()
        # Who holds a container (or another subject), and the words for it in a message.
        self._holders: dict[int | str, tuple[Task | None, str]] = {}
        self._tasks: dict[str, Task] = {}
        self._closing = False
        self._unended = 0
        # Its threads start with the first task that finds no idle one.
        self._pool = ThreadPoolExecutor(threads, "task")
        self._load()

    def submit(
        self,
        kind: str,
        container_id: int | None,
        function: Callable[[Task], Any],
        *,
        exclusive: bool = True,
        subject: str = "",
        holds: str = "",
        takes_over: bool = False,
        patience_s: float = 0.0,
        waits: bool = True,
    ) -> Task:
        """Run `function(task)` in a thread; what it returns (JSON) is the result, what it raises the error.

        An exclusive task holds its container, or without one its subject ("template debian-12"); Busy is
        raised if another holds it. One that takes over waits for the other instead, having cancelled it. One
        that is not exclusive neither holds nor minds. Tasks are begun in the order in which they were
        submitted. `subject` is what messages call the container, `holds` what it holds in its place: a backup
        holds the container itself only for moments.

        For `patience_s` others wait for the end of this task before they are refused: for tasks whose end is
        near or seen from outside before they have ended, and for those that no user asked for. One that does
        not wait for others is refused at once.
        """
        named = subject or ("" if container_id is None else str(container_id))
        task = Task(kind, container_id, named, self._publish, self._files.directory)
        task.patience_s = patience_s
        key = holds or (container_id if container_id is not None else subject)
        with self._free:
            if self._closing:
                raise NoDaemon(f"cannot {task.doing}: the daemon is being stopped", "try again in a moment")
            if exclusive and waits and not takes_over:
                self._wait_for_brief(key)
            if exclusive and key != "" and not (takes_over and key in self._holders):
                self._hold(key, task)
            self._tasks[task.id] = task
            self._unended += 1
            self._files.begin(task.as_dict())
        try:
            self._pool.submit(self._run, task, key, function, takes_over=exclusive and takes_over)
        except RuntimeError as error:  # the pool was shut down since
            self._finish(task, key, "failed", _interrupted(task), None, "the daemon was stopped")
            raise NoDaemon(f"cannot {task.doing}: the daemon is being stopped") from error
        self._publish(task)
        return task

    @contextlib.contextmanager
    def hold(
        self, container_id: int, kind: str, timeout_s: float = 0, task: Task | None = None
    ) -> Iterator[None]:
        """Hold a container for a short action, as an exclusive task would; `task` is that of the action.

        With a time-out it waits for the holder to let go; never call it from a task that holds the container.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._free:
            while container_id in self._holders and (left_s := deadline_s - time.monotonic()) > 0:
                self._free.wait(min(left_s, _CHECK_S) if task else left_s)
                if task:
                    task.check()
            self._refuse_if_held(container_id, f"{kind} {container_id}")
            self._holders[container_id] = (task, f"task {task.id} ({task.kind})" if task else kind)
        try:
            yield
        finally:
            with self._free:
                del self._holders[container_id]
                self._free.notify_all()

    @property
    def closing(self) -> bool:
        """Tell whether the daemon is being stopped."""
        return self._closing

    def wait_for_brief(self, container_id: int) -> None:
        """Wait in this thread for who holds the container, if it is a task that others are to wait for."""
        with self._free:
            self._wait_for_brief(container_id)

    def _wait_for_brief(self, key: int | str) -> None:
        def patience_s() -> float:
            if self._closing or key not in self._holders:
                return 0.0
            holder = self._holders[key][0]
            return _HOLD_PATIENCE_S if holder is None else holder.patience_s

        self._free.wait_for(lambda: not patience_s(), patience_s())

    def wait_free(self, container_id: int) -> None:
        """Wait in this thread until nothing holds the container; another may take it before the caller."""
        with self._free:
            self._free.wait_for(lambda: container_id not in self._holders)

    def current(self, container_id: int) -> Task | None:
        """Return the task that holds the container."""
        return self._holders.get(container_id, (None, ""))[0]

    def get(self, task_id: str) -> Task:
        """Return a task by its id, or by a beginning of it that fits no other."""
        task = self._tasks.get(task_id)
        if task is not None:
            return task
        with self._free:
            fitting = [
                task for key, task in self._tasks.items() if len(task_id) >= 4 and key.startswith(task_id)
            ]
        if len(fitting) != 1:
            reason = "it fits several tasks" if fitting else "there is no such task"
            raise NotFound(f"cannot find task {task_id[:32]}: {reason}", "`sysctr task list` shows them")
        return fitting[0]

    def wait(self, task_id: str, timeout_s: float | None = None) -> Task:
        """Wait in this thread until the task has ended or the time is over; its state tells which."""
        task = self.get(task_id)
        task.wait(timeout_s)
        return task

    def read_log(self, task_id: str) -> bytes:
        """Return the log of a task."""
        task = self.get(task_id)
        task.flush()
        try:
            fd = os.open(self._files.log_path(task.id), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        with open(fd, "rb") as file:
            return file.read()

    def close(self, grace_s: float, cancel_s: float = 5.0) -> list[Task]:
        """Take no more tasks, let those that run end in time, cancel the rest; return those still running."""
        with self._free:
            self._closing = True
            unended = [task for task in self._tasks.values() if task.state not in ENDED]
        _wait_for_all(unended, grace_s)
        unended = [task for task in unended if task.state not in ENDED]
        for task in unended:
            task.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for task in unended:
            if task.state == "queued":
                self._finish(task, None, "cancelled", _interrupted(task), None, "the daemon was stopped")
        _wait_for_all(unended, cancel_s)
        stuck = [task for task in unended if task.state not in ENDED]
        for task in stuck:
            self._finish(task, None, "failed", _interrupted(task), None, "the daemon was stopped")
        if not stuck:
            # Those that have told of their end still write their records.
            self._pool.shutdown(wait=True)
            self._files.close()
        return stuck

    def list(self, state: str | None = None) -> list[Task]:
        """Return the tasks known, oldest first."""
        with self._free:
            tasks = [*self._tasks.values()]
        return [task for task in tasks if state is None or task.state == state]

    def _refuse_if_held(self, key: int | str, doing: str) -> None:
        if key not in self._holders:
            return
        task, words = self._holders[key]
        hint = f"wait for it with `sysctr task wait {task.id}`" if task else "try again in a moment"
        if task:
            hint += f", or end it with `sysctr task cancel {task.id}`"
        raise Busy(f"cannot {doing}: {words} is running", hint)

    def _hold(self, key: int | str, task: Task) -> None:
        self._refuse_if_held(key, task.doing)
        self._holders[key] = (task, f"task {task.id} ({task.kind})")

    def _take_over(self, key: int | str, task: Task) -> None:
        """Hold a container as soon as who holds it has ended; raise Busy if that takes too long."""
        deadline_s = time.monotonic() + TAKE_OVER_S
        asked = None
        while True:
            task.check()
            with self._free:
                held = self._holders.get(key)
                if held is None or time.monotonic() >= deadline_s:
                    self._hold(key, task)
                    return
                if held[0] is task:
                    return
                if held is asked:
                    self._free.wait(min(_CHECK_S, deadline_s - time.monotonic()))
            if held is not asked and held[0] is not None:
                task.log(f"cancelling {held[1]}")
                held[0].cancel()
            asked = held

    def _run(
        self, task: Task, key: int | str, function: Callable[[Task], Any], *, takes_over: bool = False
    ) -> None:
        if task.cancelling or not task.begin():
            self._finish(task, key, "cancelled", _cancelled(task), None, "cancelled before it began")
            return
        self._publish(task)
        result, error, last_words = None, None, ""
        try:
            if takes_over:
                self._take_over(key, task)
            result = function(task)
            json.dumps(result)
        except Cancelled:
            state, error, last_words = "cancelled", _cancelled(task), "cancelled"
        except Exception as raised:
            state, result = "failed", None
            known = as_error(raised, task.doing)
            if known and task.container is not None:
                name_in(known, task.container, task.subject)
            error = known.as_dict() if known else _bug(task)
            last_words = error["message"]
            if not isinstance(raised, SysctrError):
                log.exception("task %s: cannot %s", task.id, task.doing)
                last_words = f"{traceback.format_exc()}\n{last_words}"
            # Its programs were killed to end it: what they died of is not the reason.
            if task.cancelling:
                state, error = "cancelled", _cancelled(task)
        else:
            state = "done"
            last_words = f"done in {time.time() - (task.started or task.created):.3f} s"
        self._finish(task, key, state, error, result, last_words)

    def _finish(
        self, task: Task, key: int | str | None, state: str, error: dict | None, result: Any, last_words: str
    ) -> None:
        # Whoever is told of the end may act on the container at once, so it is let go first.
        with self._free:
            if key is not None and self._holders.get(key, (None, ""))[0] is task:
                del self._holders[key]
                self._free.notify_all()
        if not task.end(state, error, result, last_words):
            return
        self._publish(task)
        # After everybody was told: nobody waits for the disk.
        self._files.end(task.as_dict())
        with self._free:
            self._unended -= 1
            if not self._unended:
                self._files.idle()
        self._prune()

    def _publish(self, task: Task) -> None:
        if self._bus.heard:
            self._bus.publish("task", task=task.as_dict())

    def _prune(self) -> None:
        with self._free:
            surplus = len(self._tasks) - self._kept
            if surplus <= 0:
                return
            ended = (key for key, task in self._tasks.items() if task.state in ENDED)
            old = [key for key, _ in zip(ended, range(surplus), strict=False)]
            for key in old:
                del self._tasks[key]
        for key in old:
            self._files.remove(key)

    def _load(self) -> None:
        for record in self._files.load():
            task = _from_record(record, self._publish, self._files.directory)
            if task.state not in ENDED:
                task.end("failed", _interrupted(task), None, "interrupted: the daemon was stopped")
                self._files.end(task.as_dict())
            self._tasks[task.id] = task
        self._files.idle()
        self._prune()


def as_error(error: Exception, doing: str) -> SysctrError | None:
    """Return what was raised as an error for people, or None if it is a bug."""
    if isinstance(error, SysctrError):
        return error
    if isinstance(error, OSError):
        # Uncaught where one could have said more; still, "no space left" is a better answer than "a bug".
        kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else SysctrError
        reason = str(error)
        if type(error).__str__ is OSError.__str__ and error.strerror:
            reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return kind(f"cannot {doing}: {reason}")
    return None


def _wait_for_all(tasks: list[Task], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    for task in tasks:
        task.wait(max(0.0, deadline_s - time.monotonic()))


def _cancelled(task: Task) -> dict[str, str]:
    return {"code": "cancelled", "message": f"cannot {task.doing}: the task was cancelled", "hint": ""}


def _interrupted(task: Task) -> dict[str, str]:
    message = f"cannot {task.doing}: interrupted: the daemon was stopped"
    hint = "what it had begun is finished or undone by now: look, and do it again if it was not done"
    return {"code": "interrupted", "message": message, "hint": hint}


def _bug(task: Task) -> dict[str, str]:
    return {
        "code": "bug",
        "message": f"cannot {task.doing}: an internal error",
        "hint": f"`sysctr task show {task.id}` has the details; please report them",
    }


def _from_record(record: dict[str, Any], changed: Callable[[Task], None], directory: str) -> Task:
    task = Task(
        str(record.get("kind", "")),
        record.get("container"),
        str(record.get("subject", "")),
        changed,
        directory,
    )
    task.id = record["id"]
    task.step_text = record.get("step", "")
    for name in ("progress_bytes", "total_bytes", "created", "started", "ended", "error", "result", "state"):
        setattr(task, name, record.get(name))
    # The log of an earlier daemon's task is complete, but for one that was interrupted.
    task._log = TaskLog(f"{directory}/{task.id}.log") if task.state not in ENDED else None
    return task
