"""The ways into a container: exec, console, files. The daemon gives a ticket, the supervisor opens."""

import os
import re

from sysctr.config import toml
from sysctr.config.schema import Container, parse_config
from sysctr.engine.host import Host
from sysctr.engine.plan import CONTAINER_TYPE, volume_job_plan
from sysctr.engine.record import Record
from sysctr.errors import UsageError, WrongState
from sysctr.template.base import Task


class Doors:
    """Gives tickets, and runs the engine's own work on files."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def exec_ticket(self, record: Record, request: dict) -> dict:
        """Return a ticket for a program; an empty argv means the user's login shell."""
        live = self._host.live.running(record.id)
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
        if not self._host.live.running(record.id):
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
        return self._ticket({"kind": "files", "id": record.id, **self._work(record, program, streams)})

    def run_builtin(self, record: Record, program: dict, task: Task) -> None:
        """Do one of the supervisor's own works in a container, running or stopped, and wait for its end."""
        if not self._host.live.running(record.id):
            spec = self._host.activate(record)
            try:
                self._host.jobs_for(record).run_builtin(record.id, spec, program, task)
            finally:
                self._host.release(record.id)
            return
        ticket = self._ticket({"kind": "files", "id": record.id, **self._work(record, program, [])})
        self._host.supervisor.use_ticket(ticket["ticket"], task.check)

    def _work(self, record: Record, program: dict, streams: "list[str]") -> dict:
        """Return the part of a request that says where the work is done: inside, or on the stopped volume.

        An upper must never be mounted twice: the supervisor refuses a second plan on the same container,
        the start of it among them, while such a job runs.
        """
        if self._host.live.running(record.id):
            inner = {"program": program, "streams": streams, "cgroup": self._cgroup(record)}
            return {"request": inner}
        spec = self._host.activate(record)
        idmap = self._host.jobs_for(record).idmap
        # What is in its volumes is seen where they will be mounted; the host's own paths are not a job's.
        mounts = self._host.mounts.activate(record, volumes_only=True)
        plan = volume_job_plan(record.id, spec, idmap, self._host.stage, program, mounts)
        return {"plan": {**plan, "cgroup": self._host.cgroups.job_plan()}, "streams": streams}

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
