"""This host: everything the engine's actions work with, opened once and handed to each of them."""

import contextlib
import logging
import os
import threading
from collections.abc import Callable

from sysctr.cgroup.detect import open_driver
from sysctr.config import host as host_settings
from sysctr.config import toml
from sysctr.engine import lxcfs, seccomp
from sysctr.engine.events import Bus
from sysctr.engine.ids import default_count
from sysctr.engine.job import JobRunner
from sysctr.engine.live import Live, LiveTable
from sysctr.engine.mounts import Mounts
from sysctr.engine.plan import Idmap
from sysctr.engine.pools import HOME, Pools
from sysctr.engine.record import Guest, Record
from sysctr.engine.state import Store
from sysctr.engine.supervisor import SupervisorClient
from sysctr.engine.tasks import Task, TaskRunner
from sysctr.engine.trees import TreeWorker
from sysctr.errors import ConfigError, SysctrError
from sysctr.network.network import Network, Settings
from sysctr.paths import Layout
from sysctr.runtime.console import ring_content
from sysctr.storage.base import Driver, RootSpec
from sysctr.template.base import Template
from sysctr.template.registry import Registry

log = logging.getLogger(__name__)

_OS_RELEASE = ("/etc/os-release", "/usr/lib/os-release")
_SETTINGS_LIMIT_BYTES = 1 << 20
_LOOK_AT_POOLS_S = 30.0
# How long a command waits for an end, and for the start after it, that were asked for inside.
REBOOT_PATIENCE_S = 30.0


class Host:
    """The parts of an installation, and the few facts about the machine that plans are made of."""

    def __init__(self, where: Layout, bus: Bus, tasks: TaskRunner, on_exit: Callable[[Live], None]) -> None:
        self.where = where
        self.bus = bus
        self.tasks = tasks
        self.settings = read_settings(where)
        self.store = Store(where)
        self.pools = Pools(where)
        self.templates = Registry(where)
        self.cgroups = open_driver(where)
        self.supervisor = SupervisorClient(where)
        self.live = LiveTable(self.supervisor, bus, on_exit)
        network = self.settings.network
        self.network = Network(
            where, Settings(bridge=network.bridge, subnet=network.subnet, domain=network.domain)
        )
        self.stage = f"{where.run}/stage"
        self.mounts = Mounts(self)
        self.os_release = _read_os_release()
        # Each raises what speaks against an action, such as "start" or "destroy", on a container.
        self.guards: list[Callable[[str, Record], None]] = []
        self._seccomp: bytes | None = None
        self._seccomp_lock = threading.Lock()
        self._templates: dict[str, Template] = {}
        self._closing = False
        self._trash_wanted = threading.Event()

    def open(self) -> None:
        """Make what every container needs of the host, and learn what runs."""
        ids = self.settings.ids
        self.store.pool.register(ids.count or default_count(self.where), ids.first)
        if self.pools.problem(HOME) is None:
            self.templates.prepare()
        self.supervisor.ensure()
        self.live.open(self.cgroups.is_frozen)
        threading.Thread(target=self._warm, name="warm", daemon=True).start()
        threading.Thread(target=self._collect, name="trash", daemon=True).start()
        self.collect_soon()

    def close(self) -> None:
        """Let go of everything; what runs goes on."""
        self._closing = True
        self._trash_wanted.set()
        self.live.close()
        self.store.close()

    def _warm(self) -> None:
        """Do what the first start would else wait for: compile the filter, look for lxcfs."""
        self.lxcfs_binds()
        log.debug("the system call filter has %d bytes", len(self.seccomp))

    @property
    def seccomp(self) -> bytes:
        """The compiled system call filter of a container without features."""
        with self._seccomp_lock:
            if self._seccomp is None:
                self._seccomp = seccomp.compile_filter(frozenset())
            return self._seccomp

    def lxcfs_binds(self) -> "list[tuple[str, str]]":
        """Return what lxcfs shows over /proc; nothing, where it is not installed."""
        try:
            # Asked at each start (it remembers for seconds): one that died must not be bound again.
            return lxcfs.ensure(self.where)
        except SysctrError as error:
            log.warning("containers see the host's cpu and memory: %s", error.message)
            return []

    def reload(self) -> None:
        """Read the settings again; what needs a restart of the daemon keeps its old value until then."""
        self.settings = read_settings(self.where)

    def guest_of(self, record: Record) -> Guest:
        """Return what is known of the distribution inside a container."""
        if record.guest is not None:
            return Guest(**record.guest)
        template = self.template_of(record)
        if template is None:
            return Guest()
        return Guest(
            template.init, template.init_kind, template.stop_signal, template.arch, template.os_id
        )

    def template_of(self, record: Record) -> Template | None:
        """Return the template a container was made from; None for none, or one that cannot be read."""
        if not record.template:
            return None
        if record.template not in self._templates:
            try:
                self._templates[record.template] = self.templates.get(record.template)
            except SysctrError as error:
                log.warning("%d: %s", record.id, error.message)
                return None
        return self._templates[record.template]

    def jobs_for(self, record: Record) -> JobRunner:
        """Return what does work on a container's files."""
        return self._jobs(Idmap(record.idmap_first, record.idmap_count))

    def jobs_for_templates(self) -> JobRunner:
        """Return what unpacks and builds templates, with ids no container has: the last block of the pool."""
        block = self.store.pool.template_block()
        return self._jobs(Idmap(block.first, block.count))

    def driver(self, record: Record) -> Driver:
        """Return the storage driver that keeps a container's rootfs."""
        return self.pools.of(record)

    def worker(self, record: Record, task: Task | None = None) -> TreeWorker:
        """Return what works on a container's trees for its storage driver."""
        return TreeWorker(self.jobs_for(record), task)

    def activate(self, record: Record, verb: str = "mount") -> RootSpec:
        """Make a container's volume mountable and return how it is mounted; `release` takes it back."""
        return self.pools.of(record, f"{verb} {record.id}").activate(record.volume)

    def release(self, number: int) -> None:
        """Take back what `activate` did for a container that does not run."""
        # Of a pool that has become read-only or was pulled out too: only then can it be unmounted.
        for _name, driver in self.pools.opened():
            with contextlib.suppress(SysctrError):
                for volume in driver.active():
                    if owner(volume) == number:
                        driver.deactivate(volume)
        self.mounts.release(number)

    def release_unused(self) -> None:
        """Take back what a daemon that died did for containers that are not in use any more."""
        working = self.supervisor.working()
        for name, driver in self.pools.opened():
            with contextlib.suppress(SysctrError):
                for volume in driver.active():
                    number = owner(volume)
                    of_container = self.live.running(number) or number in working
                    if not (of_container if number else self.mounts.is_used(name, volume)):
                        driver.deactivate(volume)

    def guard(self, verb: str, record: Record) -> None:
        """Raise what speaks against an action on a container."""
        for guard in self.guards:
            guard(verb, record)

    def run_of(self, container_id: int) -> Live | None:
        """Return the container's Live if it runs, having waited for the rest of an end or a reboot inside.

        Both happen without anybody who asked for them outside: whoever gives a command meanwhile means the
        state that follows. Never called from a task that holds the container.
        """
        self.live.wait(
            container_id, lambda live: live is None or live.running or live.settled, REBOOT_PATIENCE_S
        )
        if self.live.running(container_id) is None:
            self.tasks.wait_for_brief(container_id)
        return self.live.running(container_id)

    def register_name(self, record: Record) -> None:
        """Let the names of this host's network say where a container is."""
        macs = {nic.index: nic.mac for nic in record.config.nets} if record.config else {}
        self.network.register(record.id, record.name, macs)

    def read_console(self, container_id: int) -> bytes:
        """Return what a container's console showed last, also after its end."""
        try:
            with open(f"{self.where.consoles}/{container_id}.ring", "rb") as ring:
                return ring_content(ring.read())
        except FileNotFoundError:
            return b""

    def forget_console(self, container_id: int) -> None:
        """Remove what is kept of a destroyed container's console."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.where.consoles}/{container_id}.ring")

    def collect_soon(self) -> None:
        """Delete the data of destroyed volumes in the background."""
        self._trash_wanted.set()

    def _collect(self) -> None:
        while True:
            wanted = self._trash_wanted.wait(_LOOK_AT_POOLS_S)
            if self._closing:
                return
            if wanted:
                self._trash_wanted.clear()
                self.pools.empty_trash()
            self.tell_low_pools()

    def tell_low_pools(self) -> None:
        """Publish which pools have run low on space or inodes, once for each time that it happens."""
        for name in self.pools.became_low():
            room = self.pools.room(name)
            log.warning("pool %s: %d bytes and %d inodes are free", name, room.free_bytes, room.free_inodes)
            self.bus.publish("pool-low", pool=name, free_bytes=room.free_bytes, size_bytes=room.size_bytes)

    def _jobs(self, idmap: Idmap) -> JobRunner:
        return JobRunner(self.supervisor, self.stage, idmap, self.seccomp, self.cgroups.job_plan)


def owner(volume: str) -> int:
    """Return the container that a volume belongs to; 0 for one that belongs to none.

    >>> owner("101"), owner("101-data"), owner("media")
    (101, 101, 0)
    """
    number = volume.partition("-")[0]
    return int(number) if number.isdigit() else 0


def read_settings(where: Layout) -> host_settings.Host:
    """Return the host's settings; the defaults where the file does not exist."""
    try:
        with open(where.host_config, encoding="utf-8") as file:
            text = file.read(_SETTINGS_LIMIT_BYTES)
    except FileNotFoundError:
        return host_settings.parse_host({})
    try:
        return host_settings.parse_host(toml.read_host(text))
    except ConfigError as error:
        raise ConfigError(f"cannot read {where.host_config}: {error.message}", error.hint) from error


def _read_os_release() -> str:
    for path in _OS_RELEASE:
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                return file.read(65536)
    return ""
