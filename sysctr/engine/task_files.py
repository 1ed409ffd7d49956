"""What tasks leave on disk: one JSON record and one bounded log each, read again when the daemon starts."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)

LOG_LIMIT_BYTES = 1 << 20
# Kept free for the end of the log, where the reason of a failure stands.
_LOG_RESERVE_BYTES = 64 << 10
_JOURNAL = "running"
_JOURNAL_LIMIT_BYTES = 16 << 20
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class TaskFiles:
    """The directory of records and logs. A disk that is full or broken costs the record, never the task."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._journal_fd = os.open(f"{directory}/{_JOURNAL}", flags, 0o600)

    def close(self) -> None:
        """Close the journal; nothing may begin or end afterwards."""
        if self._journal_fd >= 0:
            os.close(self._journal_fd)
        self._journal_fd = -1

    def record_path(self, task_id: str) -> str:
        """Return the path of a task's record."""
        return f"{self.directory}/{task_id}.json"

    def log_path(self, task_id: str) -> str:
        """Return the path of a task's log."""
        return f"{self.directory}/{task_id}.log"

    def begin(self, record: dict[str, Any]) -> None:
        """Leave the trace that a task runs, by which the next daemon knows that it was interrupted.

        A line added to an open file takes 0.001 ms, a new file on ext4 0.13 ms. It is not synced: after a
        power failure nothing runs that it could tell of, and the undoing has the engine's own journal.
        """
        with self._tolerated(record["id"]):
            os.write(self._journal_fd, json.dumps(record).encode() + b"\n")

    def idle(self) -> None:
        """Empty the journal, because no task runs."""
        with self._tolerated("any"):
            os.ftruncate(self._journal_fd, 0)

    def end(self, record: dict[str, Any]) -> None:
        """Replace the record by the final one."""
        new = f"{self.directory}/.{record['id']}.new"
        with self._tolerated(record["id"]):
            try:
                _write(new, _NEW_FILE | os.O_TRUNC, record)
                os.rename(new, self.record_path(record["id"]))
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(new)
                raise
            os.write(self._journal_fd, json.dumps({"id": record["id"], "ended": True}).encode() + b"\n")

    def remove(self, task_id: str) -> None:
        """Remove a task's record and log."""
        for path in (self.log_path(task_id), self.record_path(task_id)):
            with self._tolerated(task_id), contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def load(self) -> list[dict[str, Any]]:
        """Return every readable record, oldest first, and remove what belongs to none."""
        records = self._unended()
        names = os.listdir(self.directory)
        for name in names:
            task_id, suffix = os.path.splitext(name)
            if suffix == ".json" and not name.startswith("."):
                record = self._read(task_id)
                if record is not None:
                    records[task_id] = record
        for name in names:
            if name != _JOURNAL and (os.path.splitext(name)[0] not in records or name.endswith(".new")):
                with contextlib.suppress(OSError):
                    os.unlink(f"{self.directory}/{name}")
        return sorted(records.values(), key=lambda record: record["created"])

    def _unended(self) -> dict[str, dict[str, Any]]:
        records: dict[str, dict[str, Any]] = {}
        for line in os.pread(self._journal_fd, _JOURNAL_LIMIT_BYTES, 0).splitlines():
            try:
                record = json.loads(line)
                records.pop(record["id"], None)
                if not record.get("ended") and isinstance(record["created"], int | float):
                    records[record["id"]] = record
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # cut short by a crash
        return records

    def _read(self, task_id: str) -> dict[str, Any] | None:
        try:
            fd = os.open(self.record_path(task_id), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(fd, encoding="utf-8") as file:
                record = json.load(file)
            if record["id"] != task_id or not isinstance(record["created"], int | float):
                raise ValueError("it is another task's")
            return record
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("cannot read the record of task %s: %s", task_id, error)
            return None

    @contextlib.contextmanager
    def _tolerated(self, task_id: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.error("cannot keep the record of task %s: %s", task_id, error)


class TaskLog:
    """The log file of one task, made when its first line is written. Not safe for threads; Task locks it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1
        self._room = LOG_LIMIT_BYTES - _LOG_RESERVE_BYTES
        self._cut = False
        self._pending: list[str] = []

    def add(self, text: str) -> None:
        """Add lines that are written with the next flush()."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._pending.extend(f"{now} {line}\n" for line in text.splitlines() or [""])

    def flush(self) -> None:
        """Write what was added; beyond the limit only a note that something is missing."""
        data = "".join(self._pending).encode("utf-8", "backslashreplace")
        self._pending.clear()
        if len(data) > self._room:
            data = data[: max(0, self._room)]
            if not self._cut:
                data += b"\n... the log has reached its limit; what follows is its end\n"
            self._cut = True
        if not data:
            return
        self._room -= len(data)
        try:
            if self._fd < 0:
                self._fd = os.open(self._path, _NEW_FILE | os.O_APPEND, 0o600)
            os.write(self._fd, data)
        except OSError as error:
            log.error("cannot write %s: %s", self._path, error)

    def close(self, last: str) -> None:
        """Write the last words, for which room was reserved, and close the file."""
        self.flush()
        self._room = _LOG_RESERVE_BYTES // 2
        # A traceback says most at its end.
        self.add(last[-_LOG_RESERVE_BYTES // 4 :])
        self.flush()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _write(path: str, flags: int, record: dict[str, Any]) -> None:
    fd = os.open(path, flags, 0o600)
    try:
        data = json.dumps(record).encode()
        if os.write(fd, data) != len(data):
            raise OSError(f"{path} was written in part: the disk is full")
    finally:
        os.close(fd)
