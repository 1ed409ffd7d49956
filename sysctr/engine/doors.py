"""The ways into a container: exec, console, files. The daemon gives a ticket, the supervisor opens."""

import contextlib
import functools
import os
import queue
import re

from sysctr.config import toml
from sysctr.config.schema import Container, parse_config
from sysctr.engine.host import Host
from sysctr.engine.plan import CONTAINER_TYPE, volume_job_plan
from sysctr.engine.record import Record
from sysctr.engine.tasks import Cancelled, Task
from sysctr.errors import UsageError, WrongState, from_dict

# Who copied files hears of the end from the supervisor, before the daemon has put it away.
_PATIENCE_S = 2.0


class Doors:
    """Gives tickets, and runs the engine's own work on files."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def exec_ticket(self, record: Record, request: dict) -> dict:
        """Return a ticket for a program; an empty argv means the user's login shell."""
        live = self._host.run_of(record.id)
        if live is None:
            raise WrongState(
                f"cannot execute in {record.id}: it is not running", f"`sysctr start {record.id}` starts it"
            )
        if live.frozen:
            raise WrongState(
                f"cannot execute in {record.id}: it is frozen", f"`sysctr thaw {record.id}` lets it go on"
            )
        argv = [str(word) for word in request.get("argv") or ()]
        if any("\0" in word for word in argv):
            raise UsageError("cannot execute: an argument has a null byte")
        size = request.get("tty")
        environment = {"container": CONTAINER_TYPE, **_in_force(record).environment}
        if size:
            environment["TERM"] = "xterm-256color"
        environment |= request.get("environment") or {}
        program = {
            "argv": argv, "environment": environment, "user": request.get("user") or "root",
            "seccomp": self._host.seccomp.hex(), "login": not argv or bool(request.get("login")),
        }  # fmt: skip
        if request.get("cwd"):
            program["cwd"] = request["cwd"]
        inner = {
            "program": program, "tty": size or None, "cgroup": self._cgroup(record),
            "owner": record.idmap_first,
        }  # fmt: skip
        return self._ticket({"kind": "exec", "id": record.id, "request": inner})

    def console_ticket(self, record: Record) -> dict:
        """Return a ticket for the console."""
        if self._host.run_of(record.id) is None:
            raise WrongState(
                f"cannot attach to the console of {record.id}: it is not running",
                f"`sysctr logs {record.id}` shows what it said last",
            )
        return self._ticket({"kind": "console", "id": record.id})

    def files_ticket(self, record: Record, request: dict) -> dict:
        """Return a ticket for a tar stream in ("push") or out ("pull")."""
        operation = request.get("op")
        if operation == "push":
            program = {"builtin": "untar", "path": _absolute(request["path"])}
            program |= {key: request.get(key) for key in ("names", "user", "group", "mode")}
            if program["mode"] and not re.fullmatch("[0-7]{1,4}", program["mode"]):
                raise UsageError(f"cannot use the mode {program['mode']!r}: it is not octal, such as 0644")
            streams = ["stdin"]
        elif operation == "pull":
            paths = request.get("paths") or [request.get("path")]
            program = {"builtin": "tar", "paths": [_absolute(path) for path in paths]}
            streams = ["stdout"]
        else:
            raise UsageError(f"cannot move files: {operation!r} is neither push nor pull")
        if self._host.run_of(record.id) is not None:
            return self._ticket(self._files_inside(record, program, streams))
        return self._files_of_stopped(record, operation, program, streams)

    def _files_of_stopped(self, record: Record, operation: str, program: dict, streams: "list[str]") -> dict:
        """Return a ticket for work on a stopped container, which a task holds until the work has ended.

        So the container is not started, snapshot or resized meanwhile, and its volume is let go of after it.
        """
        given: queue.SimpleQueue[dict] = queue.SimpleQueue()

        def work(task: Task) -> None:
            if self._host.live.running(record.id):
                raise WrongState(f"cannot {operation} {record.id}: it was started meanwhile", "try again")
            with contextlib.ExitStack() as undo:
                undo.callback(self._host.release, record.id)
                plan = self._plan(self._host.store.load(record.id), program)
                ticket = self._ticket({"kind": "files", "id": record.id, "plan": plan, "streams": streams})
                undo.pop_all()
            given.put(ticket)
            self._hold(task, record.id)

        task = self._host.tasks.submit(
            operation, record.id, work, subject=record.title, patience_s=_PATIENCE_S
        )
        task.on_end(lambda: given.put({}))
        ticket = given.get()
        if not ticket:
            raise from_dict(task.error or {"message": f"cannot {operation} {record.id}: interrupted"})
        return ticket

    def _hold(self, task: Task, number: int) -> None:
        """Wait for the end of the work on a stopped container's files, and let go of its volumes.

        The end of the daemon is none of the work: the next daemon goes on with this.
        """
        tasks = self._host.tasks

        def check() -> None:
            if tasks.closing:
                raise Cancelled
            task.check()

        try:
            self._host.supervisor.wait_idle(number, check)
        except Cancelled:
            if not tasks.closing:
                self._host.supervisor.wait_idle(number, end=True)
            raise
        finally:
            # A supervisor that does not answer has no jobs any more: they end with it.
            if not tasks.closing:
                self._host.release(number)

    def resume(self) -> None:
        """Hold the stopped containers whose files are being worked on since an earlier daemon."""
        for number in self._host.supervisor.working():
            self._host.tasks.submit(
                "push", number, functools.partial(self._hold, number=number), patience_s=_PATIENCE_S
            )

    def run_builtin(self, record: Record, program: dict, task: Task) -> None:
        """Do one of the supervisor's own works in a container, running or stopped, and wait for its end."""
        if not self._host.live.running(record.id):
            spec = self._host.activate(record)
            try:
                self._host.jobs_for(record).run_builtin(record.id, spec, program, task)
            finally:
                self._host.release(record.id)
            return
        ticket = self._ticket(self._files_inside(record, program, []))
        self._host.supervisor.use_ticket(ticket["ticket"], task.check)

    def _files_inside(self, record: Record, program: dict, streams: "list[str]") -> dict:
        """Return the request of work on a running container's files, done in its own mount namespace."""
        inner = {"program": program, "streams": streams, "cgroup": self._cgroup(record)}
        return {"kind": "files", "id": record.id, "request": inner}

    def _plan(self, record: Record, program: dict) -> dict:
        """Return the plan of work on a stopped container's files.

        An upper must never be mounted twice: the supervisor refuses a second plan on the same container,
        the start of it among them, while such a job runs.
        """
        spec = self._host.activate(record)
        idmap = self._host.jobs_for(record).idmap
        # What is in its volumes is seen where they will be mounted; the host's own paths are not a job's.
        mounts = self._host.mounts.activate(record, volumes_only=True)
        plan = volume_job_plan(record.id, spec, idmap, self._host.stage, program, mounts)
        return {**plan, "cgroup": self._host.cgroups.job_plan()}

    def _cgroup(self, record: Record) -> dict:
        placement = self._host.cgroups.exec_placement(record.id)
        return {"into": placement.into, "tasks": list(placement.tasks)}

    def _ticket(self, request: dict) -> dict:
        return {"ticket": self._host.supervisor.ticket(request), "socket": self._host.where.ticket_socket}


def _in_force(record: Record) -> Container:
    """Return the configuration that a running container was started with.

    A mistake in the file, edited by hand since, must not lock its administrator out.
    """
    if record.boot_config and record.boot_config != record.config_text:
        return parse_config(toml.read_container(record.boot_config))
    return record.usable("execute in")


def _absolute(path: object) -> str:
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        raise UsageError(f"cannot use the path {path!r}: it does not begin with /")
    # A trailing slash says that it has to be a directory; normpath would drop it.
    normal = os.path.normpath(path)
    return normal + "/" if path.endswith("/") and normal != "/" else normal
