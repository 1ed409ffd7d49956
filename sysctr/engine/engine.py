"""The engine's face: what the API offers, each a method; what takes longer than a moment returns a task."""

import logging
import os
import platform
import re
import shutil
from collections.abc import Callable
from typing import Any

from sysctr import __version__
from sysctr.config import pct
from sysctr.engine import guest
from sysctr.engine.archive_actions import ArchiveActions
from sysctr.engine.archiving import Archiving
from sysctr.engine.backup_jobs import BackupJobs
from sysctr.engine.changes import Changes
from sysctr.engine.creation import Creation
from sysctr.engine.disks import Disks
from sysctr.engine.doors import Doors
from sysctr.engine.events import Bus
from sysctr.engine.history import History
from sysctr.engine.host import Host
from sysctr.engine.lifecycle import Lifecycle
from sysctr.engine.live import Live
from sysctr.engine.migrations import Migrations
from sysctr.engine.naming import naming, title
from sysctr.engine.peer_manage import Management
from sysctr.engine.peers import Peers
from sysctr.engine.pools import HOME
from sysctr.engine.proxmox import Proxmox
from sysctr.engine.record import Record
from sysctr.engine.replica import Replicas
from sysctr.engine.replication import Replication
from sysctr.engine.tasks import Task, TaskRunner
from sysctr.engine.view import View
from sysctr.errors import NotFound, UsageError, WrongState
from sysctr.paths import Layout
from sysctr.template.archive import import_archive
from sysctr.template.base import check_name
from sysctr.template.build import build_template
from sysctr.template.recipe import load as load_recipe

log = logging.getLogger(__name__)

_WAIT_LIMIT_S = 600.0


class Engine:
    """One installation. Opened once by the daemon; every method may be called from any thread."""

    def __init__(self, where: Layout, bus: Bus, tasks: TaskRunner) -> None:
        self.where = where
        self.bus = bus
        self.tasks = tasks
        self._host = Host(where, bus, tasks, self._on_exit)
        self._lifecycle = Lifecycle(self._host)
        self._creation = Creation(self._host, self._lifecycle)
        self.history = History(self._host, self._lifecycle, self._creation)
        self.archiving = Archiving(self._host, lambda: self.backup_jobs.directories())
        self.archive = ArchiveActions(
            self._host, self.history.backups, self.history.restoring, self.archiving
        )
        self.peers = Peers(self._host)
        self.management = Management(self._host, self.peers)
        self.migrations = Migrations(
            self._host, self._lifecycle, self._creation, self.history.snapshots_of, self.peers
        )
        replicas = Replicas(self._host, self.migrations.journal, self.migrations.incoming, self.peers)
        self.replication = Replication(
            self._host, self._lifecycle, self.history.snapshots_of, self.history.backups.states, self.peers,
            replicas,
        )  # fmt: skip
        self.backup_jobs = BackupJobs(self._host, self.archiving, self.archive.start)
        self._view = View(self._host)
        self._doors = Doors(self._host)
        self._changes = Changes(self._host)
        self._disks = Disks(self._host)
        self._proxmox = Proxmox(self._host)

    def open(self) -> None:
        """Take up work: finish or undo what a crash left, then adopt what runs."""
        host = self._host
        host.pools.prepare()
        if host.pools.problem(HOME) is None:
            host.templates.sweep()
        for stale in host.store.stale_reservations(self.migrations.load()):
            log.info("%d: taking back what was left of %s", stale.id, stale.name)
            self._creation.discard_volumes(stale.id)
            host.network.release(stale.id)
            host.store.release(stale.id)
        host.open()
        # What runs and has no record has lost it: `recover` brings it back, and until then it runs on.
        running = {number for number in host.live.ids() if host.live.running(number)}
        known = running | {record.id for record in host.store.list()}
        host.network.ensure()
        host.network.sweep(running)
        # Destroyed on a full disk, which could not note that.
        for number in host.network.all_addresses().keys() - known:
            self._lifecycle.quietly(host.network.release, number)
        self._doors.resume()
        host.release_unused()
        for number in host.cgroups.list_ids():
            if number not in running:
                self._lifecycle.quietly(host.cgroups.destroy, number)
        to_start = self.history.settle()
        self.migrations.settle()
        # Last: it may start a container that asked for a reboot, whose cgroup and link are no leftovers.
        host.live.follow()
        self.history.open(to_start)
        self.backup_jobs.open()
        self.peers.open()
        self.migrations.open()
        self.replication.open()

    def close(self) -> None:
        """Let go; containers run on."""
        self.replication.close()
        self.migrations.close()
        self.peers.close()
        self.backup_jobs.close()
        self.history.close()
        self._host.close()

    def reload(self) -> None:
        """Read the host's settings again."""
        self._host.reload()
        self.backup_jobs.look()
        self.peers.reload()

    # Looking

    def list(self, tag: str | None = None) -> "list[dict]":
        """Return every container in short, by number."""
        return self._view.list(tag)

    @naming
    def info(self, ref: str) -> dict:
        """Return all that is known of one container."""
        record = self._find(ref)
        return {**self._view.info(record), "snapshots": self.history.count(record)}

    @naming
    def usage(self, ref: str) -> dict:
        """Return what a running container uses now."""
        return self._view.usage(self._find(ref))

    @naming
    def logs(self, ref: str, kind: str = "console") -> bytes:
        """Return what a container's console showed last."""
        if kind != "console":
            raise UsageError(f"cannot show the log {kind!r}: there is only the console's")
        return self._host.read_console(self._find(ref).id)

    @naming
    def wait(self, ref: str, state: str, timeout_s: float, *, ran: bool = False) -> dict:
        """Wait until a container is running, stopped, frozen or booted; `reached` says whether it is.

        `ended` says that it runs no more though it did meanwhile, or before where the caller has seen it so.
        """
        record = self._find(ref)
        number = record.id
        # An init that does not speak the notify protocol has booted when it runs, as far as can be told.
        tells = self._view.tells_ready(record)
        facts = {
            "running": lambda live: live is not None and live.running,
            "stopped": lambda live: live is None or (not live.running and live.settled),
            "frozen": lambda live: live is not None and live.frozen,
            "booted": lambda live: live is not None and live.running and (live.ready or not tells),
        }
        if state not in facts:
            raise UsageError(f"cannot wait for {state!r}: choose one of {', '.join(facts)}")
        ended = False

        def fact(live: Live | None) -> bool:
            nonlocal ran, ended
            ended = ran and facts["stopped"](live)
            ran = ran or facts["running"](live)
            return ended or facts[state](live)

        self._host.live.wait(number, fact, min(timeout_s, _WAIT_LIMIT_S))
        reached = facts[state](self._host.live.get(number))
        return {"reached": reached, "ended": ended, "container": self._view.short(self._find(str(number)))}

    def host(self) -> dict:
        """Return facts about this host."""
        disk = shutil.disk_usage(self.where.lib)
        memory = {}
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key in ("MemTotal", "MemAvailable"):
                    memory[key] = int(value.split()[0]) * 1024
        return {
            "name": os.uname().nodename, "version": __version__, "kernel": platform.release(),
            "arch": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
            "memory_bytes": memory.get("MemTotal"), "memory_available_bytes": memory.get("MemAvailable"),
            "disk_bytes": disk.total, "disk_free_bytes": disk.free, "root": self.where.root,
            "limits": sorted(self._host.cgroups.available), "bridge": self._host.network.bridge,
            "subnet": str(self._host.network.subnet), "bridges": sorted(self._host.network.host_bridges()),
            "containers": len(self._host.store.list()),
        }  # fmt: skip

    def supervisor(self) -> dict:
        """Return version, pid and counts of the supervisor."""
        return self._host.supervisor.hello()

    def upgrade_supervisor(self) -> dict:
        """Let the supervisor execute the code that is on disk now; containers do not notice."""
        self._host.supervisor.upgrade()
        return self._host.supervisor.ensure()

    def doctor(self) -> "list[dict]":
        """Check the host and say how to mend what is wrong."""
        parts = (self.history, self.backup_jobs, self.peers)
        return [*self._view.doctor(), *(check for part in parts for check in part.checks())]

    # Doing

    def create(self, spec: dict) -> Task:
        """Create a container, and start it where asked."""
        return self._create(spec, self._creation.check(spec))

    def _create(self, spec: dict, changes: dict, **told: Any) -> Task:
        self._host.templates.get(changes["template"])
        number = self._host.store.reserve(changes["name"], spec.get("id"))

        def run(task: Task) -> dict:
            return {**self._creation.create(task, spec, changes, number), **told}

        try:
            return self.tasks.submit("create", number, run, subject=title(changes["name"], number))
        except BaseException:
            self._host.store.release(number)
            raise

    @naming
    def start(self, ref: str) -> Task:
        """Start a container."""
        record = self._stopped(ref, "start")
        return self._submit("start", record, lambda task: self._lifecycle.start(task, record.id))

    @naming
    def stop(self, ref: str, *, timeout_s: float | None = None, kill: bool = False) -> Task:
        """Stop a container: ask its init, and kill at the time-out, or at once."""
        record = self._running(ref, "stop")
        return self._submit(
            "stop", record, lambda task: self._lifecycle.stop(task, record.id, timeout_s, kill=kill)
        )

    @naming
    def shutdown(self, ref: str, *, timeout_s: float | None = None) -> Task:
        """Ask a container's init to end; on time-out it runs on."""
        record = self._running(ref, "shut down")
        return self._submit(
            "shutdown", record, lambda task: self._lifecycle.shutdown(task, record.id, timeout_s)
        )

    @naming
    def reboot(self, ref: str, *, timeout_s: float | None = None) -> Task:
        """Stop a container and start it again."""
        record = self._running(ref, "reboot")
        return self._submit("reboot", record, lambda task: self._lifecycle.reboot(task, record.id, timeout_s))

    @naming
    def freeze(self, ref: str) -> Task:
        """Stop every process of a container where it stands."""
        record = self._running(ref, "freeze")
        return self._submit("freeze", record, lambda _task: self._lifecycle.freeze(record.id))

    @naming
    def thaw(self, ref: str) -> Task:
        """Let a frozen container go on."""
        record = self._running(ref, "thaw")
        return self._submit("thaw", record, lambda _task: self._lifecycle.thaw(record.id))

    @naming
    def destroy(self, ref: str, *, force: bool = False) -> Task:
        """Remove a container with all it has."""
        record = self._find(ref)
        self._creation.refuse_protected(record, "destroy")
        if self._host.live.running(record.id) and not force:
            raise WrongState(
                f"cannot destroy {record.id}: it is running", "stop it first, or destroy it with --force"
            )
        if force:
            self.archive.end_backup(record.id)
        self.archive.refuse_backed_up(record, "destroy")
        return self._submit(
            "destroy",
            record,
            lambda task: self._creation.destroy(task, record.id, force=force),
            takes_over=force,
        )

    @naming
    def passwd(self, ref: str, user: str, password: str) -> Task:
        """Set a user's password inside a container, running or stopped."""
        record = self._find(ref)
        work = {"builtin": "setup", "passwords": {user: guest.hash_password(password)}}
        return self._submit("passwd", record, lambda task: self._doors.run_builtin(record, work, task))

    # Configuration

    @naming
    def rename(self, ref: str, name: str) -> dict:
        """Give a container another name; its host name follows at the next start."""
        return self._changes.rename(self._find(ref), name)

    @naming
    def protect(self, ref: str, protected: bool) -> dict:
        """Protect a container from being destroyed, or no longer."""
        return self._changes.apply(self._find(ref), {"protected": protected})

    @naming
    def config(self, ref: str) -> dict:
        """Return a container's configuration as text and values, and what waits for a restart."""
        return self._changes.show(self._find(ref))

    def mount_list(self, ref: str) -> "list[dict]":
        """Return a container's mount points and devices, and volumes of its own that are not mounted."""
        return self._host.mounts.list(self._find(ref))

    @naming
    def mount_add(self, ref: str, mount: object = None, device: object = None) -> dict:
        """Add a mount point or a device, to a running container at once; returns what `set_config` does."""
        if (mount is None) == (device is None):
            raise UsageError("cannot add a mount: name a mount or a device, and not both")
        line = mount if mount is not None else device
        return self._changes.add_mount(self._find(ref), line, device=mount is None)

    @naming
    def mount_remove(self, ref: str, which: str, data: str | None = None) -> dict:
        """Remove a mount point, a device or a kept volume; `data` of a volume is "keep" or "delete"."""
        return self._changes.remove_mount(self._find(ref), which, data)

    @naming
    def set_config(self, ref: str, changes: dict) -> dict:
        """Change keys; returns what holds at once and what waits for a restart."""
        return self._changes.apply(self._find(ref), changes)

    @naming
    def put_config(self, ref: str, text: str, digest: str) -> dict:
        """Replace the whole file, if it is still the one of `digest`."""
        return self._changes.replace(self._find(ref), text, digest)

    # Proxmox

    @naming
    def export_pct(self, ref: str) -> dict:
        """Return a container's settings as a pct.conf of Proxmox, and what that cannot say."""
        exported = self._proxmox.export(self._find(ref))
        return {"pct": pct.write(exported.document), "notes": [note.as_dict() for note in exported.notes]}

    def check_pct(self, spec: dict) -> dict:
        """Return the settings that a container made of a pct.conf would have, and what stays behind."""
        return self._proxmox.convert(spec).as_dict()

    def import_pct(self, spec: dict) -> Task:
        """Create a container from a template with the settings of a pct.conf."""
        imported = self._proxmox.convert(spec)
        self._creation.check_pool(spec, imported.config.name)
        return self._create(spec, imported.changes, notes=[note.as_dict() for note in imported.notes])

    # Ways in

    @naming
    def exec_ticket(self, ref: str, request: dict) -> dict:
        """Return a ticket that runs a program inside a running container."""
        return self._doors.exec_ticket(self._find(ref), request)

    @naming
    def console_ticket(self, ref: str) -> dict:
        """Return a ticket that attaches to a running container's console."""
        return self._doors.console_ticket(self._find(ref))

    @naming
    def files_ticket(self, ref: str, request: dict) -> dict:
        """Return a ticket that moves files in or out as a tar stream, running or stopped."""
        return self._doors.files_ticket(self._find(ref), request)

    # Pools

    def notices(self) -> "list[str]":
        """Return what whoever looks at the containers should know: what runs out of room, what failed."""
        return [*self._disks.notices(), *self.backup_jobs.notices(), *self.replication.notices()]

    def disk_usage(self) -> "list[dict]":
        """Return what each container takes of which pool, and what limits it."""
        return self._disks.usage()

    def pool_list(self) -> "list[dict]":
        """Return every pool with its room."""
        return self._disks.pools()

    def pool_show(self, name: str) -> dict:
        """Return one pool with the volumes and templates in it."""
        return self._disks.pool(name)

    def pool_add(
        self, name: str, driver: str, path: str, *, low_space: str | None = None, force: bool = False
    ) -> dict:
        """Make a directory of this host a pool."""
        return self._disks.add(name, driver, path, low_space=low_space, force=force)

    def pool_remove(self, name: str, *, force: bool = False) -> Task:
        """Forget a pool that no container is in, and remove what was made in it."""
        return self.tasks.submit(
            "pool-remove", None, lambda _task: self._disks.remove(name, force=force), subject=f"pool {name}"
        )

    # Templates

    def template_list(self) -> "list[dict]":
        """Return every template."""
        return [template.as_dict() for template in self._host.templates.list()]

    def template_show(self, name: str) -> dict:
        """Return one template and the containers that use it."""
        template = self._host.templates.get(name)
        return {**template.as_dict(), "used_by": self._users(name)}

    def template_remove(self, name: str) -> Task:
        """Remove a template that no container uses."""
        check_name(name)
        return self.tasks.submit(
            "template-remove", None,
            lambda _task: self._remove_template(name), subject=f"template {name}",
        )  # fmt: skip

    def _remove_template(self, name: str) -> None:
        host = self._host
        host.templates.remove(name, lambda: self._users(name))
        host.pools.drop_bases(host.templates.list())
        host.collect_soon()

    def template_build(self, recipe: str, name: str | None = None, settings: dict | None = None) -> Task:
        """Build a template from a recipe: the name of one that came with sysctr, or a file's path."""
        parsed = load_recipe(recipe, settings or {})
        target = name or parsed.name

        def run(task: Task) -> dict:
            jobs = self._host.jobs_for_templates()
            template = build_template(
                self._host.templates, parsed, name=target, run_job=jobs.run_tool, task=task
            )
            return {"name": template.name}

        return self.tasks.submit("template-build", None, run, subject=f"template {target}")

    def template_import(self, path: str, name: str | None = None) -> Task:
        """Make a template of a rootfs tarball on this host."""
        if not os.path.isfile(path):
            raise NotFound(f"cannot import {path}: no such file")
        target = check_name(name or name_from_path(path))

        def run(task: Task) -> dict:
            jobs = self._host.jobs_for_templates()
            template = import_archive(self._host.templates, path, target, run_job=jobs.run_tool, task=task)
            return {"name": template.name}

        return self.tasks.submit("template-import", None, run, subject=f"template {target}")

    # Helpers

    def _users(self, template: str) -> "list[str]":
        """Return who stands on a template: recorded containers, and volumes whose record is still to come."""
        records = self._host.store.list()
        names = {record.volume: record.name for record in records if record.pool == HOME}
        return [names.get(volume, volume) for volume in self._host.pools.home.users_of(template)]

    def _find(self, ref: str) -> Record:
        return self._host.store.find(ref)

    def _submit(
        self, kind: str, record: Record, function: Callable[[Task], Any], *, takes_over: bool = False
    ) -> Task:
        return self.tasks.submit(kind, record.id, function, subject=record.title, takes_over=takes_over)

    def _running(self, ref: str, verb: str) -> Record:
        record = self._find(ref)
        if self._host.run_of(record.id) is None and not self._lifecycle.reboots(record.id):
            raise WrongState(f"cannot {verb} {record.id}: it is not running")
        return record

    def _stopped(self, ref: str, verb: str) -> Record:
        record = self._find(ref)
        record.usable(verb)
        if self._host.run_of(record.id) is not None:
            raise WrongState(f"cannot {verb} {record.id}: it is running")
        return record

    def _on_exit(self, live: Live) -> None:
        self._lifecycle.on_exit(live)


def name_from_path(path: str) -> str:
    """Return the template's name that a file's name suggests.

    >>> name_from_path("/tmp/Alpine-3.20_x86.tar.gz")
    'alpine-3.20_x86'
    """
    stem = re.sub(r"\.(tar(\.[a-z0-9]+)?|tgz|txz)$", "", os.path.basename(path).lower())
    return re.sub(r"[^a-z0-9._-]+", "-", stem).strip("-._")
