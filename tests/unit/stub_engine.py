"""An engine of the API's shape without containers: what the tests of the API and the daemon talk to."""

import os
import socket
import threading
from typing import Any

from sysctr.engine.events import Bus
from sysctr.engine.tasks import Task, TaskRunner
from sysctr.errors import NotFound, Refused, WrongState
from sysctr.paths import Layout
from sysctr.runtime import wire


def container(number: int) -> dict[str, Any]:
    return {
        "id": number, "name": f"ct{number}", "state": "running", "booted": True, "template": "debian-12",
        "tags": ["web", "prod"], "addresses": ["10.0.3.2"], "uptime_s": 1234.5, "pid": 4242, "cpu_s": 12.25,
        "memory_bytes": 123456789, "memory_max_bytes": 536870912, "pids": 17, "onboot": False,
        "protected": False, "pending": [], "exit": None, "task": None,
    }  # fmt: skip


class Engine:
    """Methods as the real engine has them; `calls` is what arrived."""

    def __init__(self, where: Layout, bus: Bus, tasks: TaskRunner) -> None:
        self.where, self.bus, self.tasks = where, bus, tasks
        self.calls: list[tuple] = []
        self.count = int(os.environ.get("STUB_CONTAINERS", "3"))
        self.states: dict[str, str] = {}
        self.changed = threading.Condition()
        self.gate = threading.Event()
        self.console = b"boot\n"
        self.supervised: list[socket.socket] = []
        self.answer_ticket = None
        self.history = History(self)
        self.archiving = Archiving(self)
        self.archive = ArchiveActions(self)
        self.backup_jobs = BackupJobs(self)
        self.migrations = Migrations(self)
        self.peers = Peers(self)
        self.replication = Replication(self)

    def open(self) -> None:
        self.calls.append(("open",))

    def close(self) -> None:
        self.gate.set()

    def reload(self) -> None:
        self.calls.append(("reload",))
        self.bus.publish("host", change="reloaded")

    def list(self, tag: str | None = None) -> "list[dict]":
        return [container(100 + number) for number in range(self.count)]

    def info(self, ref: str) -> dict:
        if ref == "missing":
            raise NotFound("cannot find missing: there is no such container")
        return container(100) | {"state": self.states.get(ref, "running")}

    def usage(self, ref: str) -> dict:
        if ref == "oserror":
            raise OSError(28, "No space left on device", "/x")
        if ref == "unserialisable":
            return {"x": object()}
        raise ZeroDivisionError("a secret of the daemon")

    def wait(self, ref: str, state: str, timeout_s: float, *, ran: bool = False) -> dict:
        with self.changed:
            reached = self.changed.wait_for(lambda: self.states.get(ref) == state, timeout_s)
        return {"reached": reached, "ended": False, "container": self.info(ref)}

    def become(self, ref: str, state: str) -> None:
        with self.changed:
            self.states[ref] = state
            self.changed.notify_all()

    def logs(self, ref: str, kind: str = "console") -> bytes:
        return self.console

    def host(self) -> dict:
        return {"name": "here"}

    def supervisor(self) -> dict:
        raise WrongState("no supervisor")

    def upgrade_supervisor(self) -> dict:
        return {}

    def doctor(self) -> "list[dict]":
        return [{"check": "kernel", "ok": True, "detail": "", "hint": ""}]

    def create(self, spec: dict) -> Task:
        self.calls.append(("create", spec))
        return self.tasks.submit("create", spec.get("id", 100), lambda task: {"id": 100})

    def export_pct(self, ref: str) -> dict:
        self.calls.append(("export_pct", ref))
        return {"pct": "", "notes": []}

    def check_pct(self, spec: dict) -> dict:
        self.calls.append(("check_pct", spec))
        return {"name": "www"}

    def import_pct(self, spec: dict) -> Task:
        self.calls.append(("import_pct", spec))
        return self.tasks.submit("create", 100, lambda task: {"id": 100})

    def _held(self, task: Task) -> None:
        # Let go by the test, in this process or in another.
        for _ in range(6000):
            if self.gate.wait(0.005) or os.path.exists(f"{self.where.root}/open"):
                return

    def _act(self, verb: str, ref: str, options: dict) -> Task:
        self.calls.append((verb, ref, options))
        return self.tasks.submit(verb, 100, lambda task: None, exclusive=False)

    def start(self, ref: str, **options: Any) -> Task:
        if ref == "held":
            return self.tasks.submit("start", 999, self._held)
        return self._act("start", ref, options)

    def stop(self, ref: str, *, timeout_s: float | None = None, kill: bool = False) -> Task:
        return self._act("stop", ref, {"timeout_s": timeout_s, "kill": kill})

    def shutdown(self, ref: str, *, timeout_s: float | None = None) -> Task:
        return self._act("shutdown", ref, {})

    def reboot(self, ref: str, *, timeout_s: float | None = None) -> Task:
        return self._act("reboot", ref, {})

    def freeze(self, ref: str) -> Task:
        return self._act("freeze", ref, {})

    def thaw(self, ref: str) -> Task:
        return self._act("thaw", ref, {})

    def destroy(self, ref: str, *, force: bool = False) -> Task:
        if ref == "protected":
            raise Refused("cannot destroy 101: it is protected", "`sysctr protect --off 101`")
        return self._act("destroy", ref, {"force": force})

    def passwd(self, ref: str, user: str, password: str) -> Task:
        return self._act("passwd", ref, {"user": user, "password": password})

    def rename(self, ref: str, name: str) -> dict:
        return {}

    def protect(self, ref: str, protected: bool) -> dict:
        return {}

    def config(self, ref: str) -> dict:
        return {"toml": "schema = 1\n", "config": {}, "pending": [], "digest": "0"}

    def set_config(self, ref: str, changes: dict) -> dict:
        self.calls.append(("set", ref, changes))
        return {"applied": list(changes), "pending": []}

    def mount_list(self, ref: str) -> "list[dict]":
        return []

    def mount_add(self, ref: str, mount: object = None, device: object = None) -> dict:
        self.calls.append(("mount_add", ref, mount, device))
        return {"applied": ["mount.0"], "pending": [], "notes": [], "key": "mount.0"}

    def mount_remove(self, ref: str, which: str, data: str | None = None) -> dict:
        self.calls.append(("mount_remove", ref, which, data))
        return {"applied": ["mount.0"], "pending": [], "notes": [], "volume": "", "deleted": False}

    def put_config(self, ref: str, text: str, digest: str) -> dict:
        return {"applied": [], "pending": []}

    def exec_ticket(self, ref: str, request: dict) -> dict:
        self.calls.append(("exec", ref, request))
        return {"ticket": "aa" * 16, "socket": self.where.ticket_socket}

    def console_ticket(self, ref: str) -> dict:
        return {"ticket": "bb" * 16, "socket": self.where.ticket_socket}

    def files_ticket(self, ref: str, request: dict) -> dict:
        return {"ticket": "cc" * 16, "socket": self.where.ticket_socket}

    def notices(self) -> "list[str]":
        return []

    def disk_usage(self) -> "list[dict]":
        return []

    def pool_list(self) -> "list[dict]":
        return []

    def pool_show(self, name: str) -> dict:
        return {"name": name}

    def pool_add(self, name: str, driver: str, path: str, **options: Any) -> dict:
        self.calls.append(("pool-add", name, driver, path, options))
        return {"name": name}

    def pool_remove(self, name: str, *, force: bool = False) -> Task:
        return self._act("pool-remove", name, {"force": force})

    def template_list(self) -> "list[dict]":
        return []

    def template_show(self, name: str) -> dict:
        return {"name": name}

    def template_remove(self, name: str) -> Task:
        return self._act("template-remove", name, {})

    def template_build(self, recipe: str, name: str | None = None, settings: dict | None = None) -> Task:
        return self._act("template-build", recipe, {})

    def template_import(self, path: str, name: str | None = None) -> Task:
        return self._act("template-import", path, {})


class History:
    """What the engine keeps of the past, as the real one has it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def snapshots(self, ref: str) -> dict:
        return {"id": 100, "name": ref, "snapshots": [], "parent": ""}

    def snapshot(self, ref: str, name: str | None = None, **options: Any) -> Task:
        return self._engine._act("snapshot", ref, {"name": name, **options})

    def delsnapshot(self, ref: str, names: "list[str]", *, every: bool = False) -> Task:
        return self._engine._act("delsnapshot", ref, {"names": names, "every": every})

    def rollback(self, ref: str, name: str) -> Task:
        return self._engine._act("rollback", ref, {"snapshot": name})

    def clone(self, ref: str, spec: dict) -> Task:
        return self._engine._act("clone", ref, spec)

    def template(self, ref: str, name: str, **options: Any) -> Task:
        return self._engine._act("template-create", ref, {"name": name, **options})

    def diff(self, ref: str, snapshot: str | None = None) -> Task:
        return self._engine._act("diff", ref, {"snapshot": snapshot})

    def recover(self, *, dry_run: bool = False) -> dict:
        return {"recovered": [], "problems": [], "dry_run": dry_run}


class Archiving:
    """What the engine does with archives, as the real one has it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def list(self, directory: str | None = None) -> dict:
        return {"archives": [], "containers": [], "problems": [], "directory": directory}

    def show(self, ref: str) -> dict:
        return {"path": ref}

    def protect(self, ref: str, protected: bool) -> dict:
        return {"path": ref, "protected": protected}

    def notes(self, ref: str, text: str) -> dict:
        return {"path": ref, "notes": text}

    def remove(self, ref: str) -> Task:
        return self._engine._act("backup-remove", ref, {})

    def prune(self, directory: str | None = None, **options: Any) -> Task:
        return self._engine._act("backup-prune", directory or "", options)


class ArchiveActions:
    """How the engine makes archives and containers of them, as the real one has it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def backup(self, ref: str, spec: dict) -> Task:
        return self._engine._act("backup", ref, spec)

    def restore(self, ref: str, spec: dict) -> Task:
        return self._engine._act("restore", ref, spec)

    def verify(self, ref: str) -> Task:
        return self._engine._act("backup-verify", ref, {})


class BackupJobs:
    """What the engine does with backup jobs, as the real one has it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def list(self) -> "list[dict]":
        return []

    def show(self, name: str) -> dict:
        return {"job": {"name": name}, "toml": "", "digest": "0"}

    def add(self, name: str, settings: dict) -> dict:
        self._engine.calls.append(("backup-job-add", name, settings))
        return {"job": {"name": name}, "notes": []}

    def replace(self, name: str, text: str, digest: str) -> dict:
        return {"job": {"name": name}, "notes": []}

    def remove(self, name: str) -> None:
        self._engine.calls.append(("backup-job-remove", name))

    def run(self, name: str) -> Task:
        return self._engine._act("backup-run", name, {})


class Migrations:
    """How the engine moves containers to other hosts, as the real one has it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def migrate(self, ref: str, spec: dict) -> Task:
        return self._engine._act("migrate", ref, spec)

    def copy(self, ref: str, spec: dict) -> Task:
        return self._engine._act("copy", ref, spec)

    def list(self) -> "list[dict]":
        return []

    def resolve(self, ref: str, keep: str | None = None) -> Task:
        return self._engine._act("resolve", ref, {"keep": keep})


class Peers:
    """What the engine does with other hosts, as the real one has it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def list(self) -> "list[dict]":
        return []

    def status(self) -> dict:
        return {"fingerprint": "", "listen": "", "problem": ""}

    def show(self, ref: str) -> dict:
        return {"name": ref}

    def token(self, *, expires_s: float = 3600, addresses: tuple = (), listen: str = "") -> dict:
        return {"token": "sysctr1.x", "expires": 0.0, "fingerprint": "", "addresses": list(addresses)}

    def join(self, token: str, *, name: str = "", addresses: tuple = ()) -> dict:
        self._engine.calls.append(("peer-join", name))
        return {"name": name}

    def rename(self, ref: str, new: str) -> dict:
        return {"name": new}

    def restrict(self, ref: str, **permissions: Any) -> dict:
        self._engine.calls.append(("peer-restrict", ref, permissions))
        return {"name": ref}

    def remove(self, ref: str, *, force: bool = False) -> None:
        self._engine.calls.append(("peer-remove", ref, force))

    def rotate(self) -> dict:
        return {"fingerprint": "", "next": "", "waits_for": []}


class Replication:
    """What the engine does with replicas, as the real one has it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def replicate(self, ref: str, spec: dict) -> Task:
        return self._engine._act("replicate", ref, spec)

    def stop(self, ref: str, **options: Any) -> Task:
        return self._engine._act("unreplicate", ref, options)

    def list(self) -> "list[dict]":
        return []

    def promote(self, ref: str, **options: Any) -> Task:
        return self._engine._act("promote", ref, options)


class Supervisor:
    """The ticket socket's other side: hands out pipes for a program, or one stream for a console."""

    def __init__(self, where: Layout) -> None:
        os.makedirs(where.run, exist_ok=True)
        self._listening = wire.listen(where.ticket_socket, 0o600)
        self.connection: socket.socket | None = None
        self.tickets: list[str] = []
        self._ours: list[int] = []
        self._files: list = []

    def serve(self, kind: str) -> dict[str, int]:
        """Accept one client; return our ends of what it was given."""
        self._listening.settimeout(10)
        self.connection, _ = self._listening.accept()
        self.connection.settimeout(10)
        self.tickets.append(wire.receive_plain(self.connection)["ticket"])
        if kind == "refuse":
            error = {"code": "not-found", "message": "cannot use the ticket: it is unknown", "hint": ""}
            wire.send(self.connection, {"error": error})
            return {}
        if kind == "console":
            ours, theirs = socket.socketpair()
            self._files += [ours, theirs]
            wire.send(self.connection, {"ok": True, "fds": ["stream"]}, [theirs.fileno()])
            theirs.close()
            return {"stream": ours.fileno()}
        given, kept = {}, {}
        for name in ("stdin", "stdout", "stderr"):
            reader, writer = os.pipe2(os.O_CLOEXEC)
            kept[name], given[name] = (reader, writer) if name == "stdin" else (writer, reader)
        wire.send(self.connection, {"ok": True, "fds": list(given)}, list(given.values()))
        wire.close_all(list(given.values()))
        self._ours += kept.values()
        return kept

    def close(self) -> None:
        wire.close_all(self._ours)
        for file in self._files:
            file.close()
        if self.connection:
            self.connection.close()
        self._listening.close()
