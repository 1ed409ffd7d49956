"""A daemon that does nothing: it answers from tables, notes what it is asked, sends events when told to."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sysctr import errors

BEGAN_S = 1_700_000_000.0


def container(number: int, name: str = "", **changes: Any) -> dict[str, Any]:
    """Return what the list says of a container."""
    runs = changes.get("state", "running") != "stopped"
    return {
        "id": number, "name": name or f"web-{number - 100}", "state": "running",
        "booted": True if runs else None,
        "template": "debian-12", "tags": ["prod"], "addresses": [f"10.0.0.{number % 250}"] if runs else [],
        "uptime_s": 3600 if runs else None, "pid": 4000 + number if runs else None,
        "cpu_s": 1.0 if runs else None,
        "memory_bytes": 64 << 20 if runs else None, "memory_max_bytes": 1 << 30, "pids": 12, "onboot": False,
        "protected": False, "pending": [], "exit": None, "task": None, "pool": "default", "last_backup": None,
        "away": None, "error": "", "pool_error": "", **changes,
    }  # fmt: skip


def task(id_: str, **changes: Any) -> dict[str, Any]:
    """Return a task as the API sends it."""
    return {
        "id": id_, "kind": "backup", "container": 101, "subject": "web-1", "state": "running",
        "step": "copying",
        "progress_bytes": 25 << 20, "total_bytes": 100 << 20, "created": BEGAN_S, "started": BEGAN_S,
        "ended": None,
        "error": None, "result": None, "cancelling": False, **changes,
    }  # fmt: skip


class FakeDaemon:
    """What a host answers. `fails` maps a request to the error that it gets, `gone` lets nothing through."""

    def __init__(self, *containers: dict[str, Any]) -> None:
        self.containers = list(containers)
        self.tasks: list[dict[str, Any]] = []
        self.lists: dict[str, list[dict[str, Any]]] = {
            "templates": [
                {"name": "debian-12", "os_name": "Debian 12", "version": "12", "arch": "amd64",
                 "created": BEGAN_S,
                 "size_bytes": 300 << 20, "source": {"kind": "recipe", "name": "debian-12"}},
            ],
            "backups": [
                {"name": "vzdump-lxc-101-2023_11_14-12_00_00.tar.zst", "container": 101,
                 "container_name": "web-1",
                 "path": "/dump/vzdump-lxc-101-2023_11_14-12_00_00.tar.zst", "time": BEGAN_S,
                 "size_bytes": 90 << 20,
                 "protected": False, "renamed": False, "notes": "before the upgrade", "directory": "/dump"},
            ],
            "backup-jobs": [{"name": "nightly", "enabled": True, "error": "", "schedule": "daily",
                             "next_run": BEGAN_S + 86400, "last_success": BEGAN_S, "settings": {}}],
            "pools": [{"name": "default", "driver": "overlay", "size_bytes": 100 << 30,
            "used_bytes": 10 << 30,
                       "free_bytes": 90 << 30, "count": 3, "low": False, "error": "",
                       "path": "/var/lib/sysctr"}],
            "peers": [{"name": "paris", "addresses": ["192.0.2.7:8645"], "may_send": True,
            "may_receive": True,
                       "may_pull": False, "may_manage": False, "pools": [], "version": "0.1.0",
                       "last_seen": 0}],
            "migrations": [{"id": "0123", "name": "web-9", "container": 109, "role": "source",
            "peer": "paris",
                            "state": "in-doubt", "phase": "committed", "since": BEGAN_S,
                            "error": "no answer"}],
            "replicas": [{"id": "4567", "role": "replica", "container": 120, "name": "db", "peer": "paris",
                          "every_s": None, "last": BEGAN_S, "error": "", "promoted": False}],
        }  # fmt: skip
        self.snapshots = {"snapshots": [{"name": "before", "parent": "", "created": BEGAN_S,
        "description": "upgrade"}],
                          "parent": "before"}  # fmt: skip
        self.asked: list[tuple[str, str, Any]] = []
        self.fails: dict[tuple[str, str], errors.SysctrError] = {}
        # What the notes of the archive are in full.
        self.notes = "before the upgrade"
        # Until it is set no change is answered; and what the next tasks come to.
        self.held: threading.Event | None = None
        # Cleared, nothing at all is answered.
        self.hangs = threading.Event()
        self.hangs.set()
        self.result: dict[str, Any] = {}
        self.gone = ""
        self._listeners: list[queue.Queue[Any]] = []
        self._lock = threading.Lock()
        self._number = 0

    def client(self) -> "FakeClient":
        """Return a client of it."""
        return FakeClient(self)

    def tell(self, kind: str, **data: Any) -> None:
        """Send an event."""
        with self._lock:
            for one in self._listeners:
                one.put((kind, {"kind": kind, **data}))

    def die(self, reason: str) -> None:
        """End all connections, and refuse new ones."""
        self.gone = reason
        with self._lock:
            for one in self._listeners:
                one.put(errors.NoDaemon(f"cannot talk to the daemon: {reason}"))

    def changes(self) -> list[tuple[str, str, Any]]:
        """Return what it was asked to change."""
        return [one for one in self.asked if one[0] != "GET"]

    def answer(self, method: str, where: str, body: Any) -> Any:
        """Return the answer to a request."""
        if self.gone:
            raise errors.NoDaemon(f"cannot reach the daemon: {self.gone}")
        self.hangs.wait(20)
        if method != "GET" and self.held is not None:
            self.held.wait(20)
        self.asked.append((method, where, body))
        if (error := self.fails.get((method, where))) is not None:
            raise error
        words = where.split("/")[2:]
        if method != "GET":
            if words[:2] == ["peers", "token"]:
                return {"token": "sysctr1.abc", "expires": BEGAN_S, "fingerprint": "f", "addresses": []}
            return self._begin(words, body)
        if words == ["containers"]:
            return {"containers": [dict(one) for one in self.containers], "notices": []}
        if words == ["tasks"]:
            return {"tasks": list(self.tasks)}
        if words == ["host"]:
            return {"host": {"version": "0.1.0"}}
        if words == ["doctor"]:
            return {"checks": [{"check": "kernel", "ok": True, "state": "ok", "detail": "6.18", "hint": ""}]}
        if words[:2] == ["backups", "archive"]:
            return {"archive": {**self.lists["backups"][0], "notes": self.notes}}
        if len(words) == 1 and words[0] in self.lists:
            return {
                {"backups": "archives", "backup-jobs": "jobs"}.get(words[0], words[0]): self.lists[words[0]]
            }
        if words[0] == "tasks":
            if words[-1] == "log":
                return b"first line\nsecond line\n"
            return {"task": next(one for one in self.tasks if one["id"] == words[1])}
        if words[0] == "containers":
            return self._of_container(words)
        raise errors.NotFound(f"cannot find {where}")

    def _of_container(self, words: list[str]) -> Any:
        found = next((one for one in self.containers if str(one["id"]) == words[1]), None)
        if found is None:
            raise errors.NotFound(f"cannot find container {words[1]}")
        if len(words) == 2:
            nets = [{"name": "eth0", "mac": "02:00:00:00:00:01", "bridge": "sysctr0"}]
            return {
                "container": {
                    **found,
                    "uuid": "u-1",
                    "nets": nets,
                    "limits": {"memory": "1G"},
                    "created": BEGAN_S,
                }
            }
        if words[2] == "snapshots":
            return self.snapshots
        if words[2] == "usage":
            return {"usage": {"time": time.time(), "cpu_s": 1.0, "memory_bytes": 64 << 20, "pids": 12}}
        if words[2] == "logs":
            return b"boot\nlogin:\n"
        raise errors.NotFound("cannot find it")

    def _begin(self, words: list[str], body: Any) -> Any:
        self._number += 1
        result: dict[str, Any] = {"blockers": [], "there": {}, "archives": [], "changes": [["M",
        "/etc/motd"]],
                                  "before": "before", "counts": {}}  # fmt: skip
        result |= self.result
        done = task(f"t{self._number}", kind=words[-1], state="done", ended=BEGAN_S + 1, result=result)
        self.tasks.append(done)
        return {"task": done}


class FakeClient:
    """Has the methods of sysctr.client.Client that the connection of the UI calls."""

    def __init__(self, daemon: FakeDaemon) -> None:
        self._daemon = daemon
        self._events: queue.Queue[Any] = queue.Queue()

    def request(
        self, method: str, where: str, body: Any = None, query: "Mapping[str, object] | None" = None
    ) -> Any:
        """Answer a request."""
        return self._daemon.answer(method, where, body)

    def events(
        self, query: "Mapping[str, object] | None" = None, begun: "Callable[[], None] | None" = None
    ) -> Iterator[tuple[str, Any]]:
        """Yield what the daemon tells."""
        if self._daemon.gone:
            raise errors.NoDaemon(f"cannot reach the daemon: {self._daemon.gone}")
        with self._daemon._lock:
            self._daemon._listeners.append(self._events)
        if begun is not None:
            begun()
        while (event := self._events.get()) is not None:
            if isinstance(event, errors.SysctrError):
                raise event
            yield event

    def stream(self, where: str, query: "Mapping[str, object] | None" = None) -> Iterator[bytes]:
        """Yield an answer in two pieces."""
        answer = self._daemon.answer("GET", where, None)
        yield answer[:7]
        yield answer[7:]

    def hang_up(self) -> None:
        """End the events."""
        self._events.put(None)

    def close(self) -> None:
        """Nothing is open."""
