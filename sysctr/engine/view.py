"""What the engine tells of containers: short for lists, whole for one, and what they use."""

import time

from sysctr import __version__
from sysctr.cgroup.base import Usage
from sysctr.config import schema
from sysctr.engine import doctor
from sysctr.engine.changes import Changes
from sysctr.engine.disks import Disks, disk_limit, pool_problems
from sysctr.engine.host import Host
from sysctr.engine.live import Live
from sysctr.engine.record import Record
from sysctr.errors import SysctrError

# A reboot is no state of its own: it stops first, and what is not running then is starting.
_STATES_OF_TASKS = {
    "start": "starting", "reboot": "starting", "stop": "stopping", "shutdown": "stopping",
    "destroy": "stopping",
}  # fmt: skip


class View:
    """Reads, and changes nothing."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._changes = Changes(host)

    def list(self, tag: str | None) -> "list[dict]":
        """Return every container in short, or those with a tag."""
        records = self._host.store.list()
        if tag is not None:
            records = [r for r in records if r.config is not None and tag in r.config.tags]
        running = [r.id for r in records if self._host.live.running(r.id)]
        usages = self._host.cgroups.usage_all(running)
        leases = self._host.network.all_addresses()
        problems = pool_problems(self._host, {record.pool for record in records})
        return [
            self._short(r, usages.get(r.id), leases.get(r.id, ()), problems.get(r.pool, "")) for r in records
        ]

    def short(self, record: Record) -> dict:
        """Return one container as the list shows it."""
        live = self._host.live.running(record.id)
        usage = self._host.cgroups.usage_all([record.id]).get(record.id) if live else None
        problem = pool_problems(self._host, (record.pool,)).get(record.pool, "")
        return self._short(record, usage, self._host.network.addresses(record.id), problem)

    def info(self, record: Record) -> dict:
        """Return all that is known of a container."""
        config = record.config
        detail = {
            **self.short(record),
            "uuid": record.uuid, "generation": record.generation, "created": record.created,
            "idmap": {"first": record.idmap_first, "count": record.idmap_count}, "volume": record.volume,
            **self._disk(record), "disk_limit_bytes": disk_limit(self._host, record),
            "config_file": self._host.where.container_config(record.id),
        }  # fmt: skip
        if config is not None:
            flat = schema.TABLE.dump(config)
            detail |= {
                "mounts": self._host.mounts.list(record),
                "description": config.description, "limits": flat.get("limits", {}),
                "nets": [
                    {
                        "name": n.name, "mac": n.mac, "ip": n.ip, "gateway": n.gateway, "mtu": n.mtu,
                        "bridge": n.bridge or self._host.network.bridge,
                        "host_name": self._veth(record.id, n.index),
                    }
                    for n in config.nets
                ],
                "environment": config.environment, "init": config.init or self._host.guest_of(record).init,
            }  # fmt: skip
        if self._host.live.running(record.id):
            detail["usage"] = self.usage(record)
        return detail

    def usage(self, record: Record) -> dict:
        """Return what a container uses now; nothing but nulls when it does not run."""
        usage = None
        traffic = None
        if self._host.live.running(record.id):
            usage = self._host.cgroups.usage_all([record.id]).get(record.id)
            traffic = self._host.network.statistics(record.id)
        return {
            "cpu_s": usage.cpu_usec / 1e6 if usage else None,
            "memory_bytes": usage.memory_bytes if usage else None,
            "memory_max_bytes": usage.memory_max if usage else None,
            "swap_bytes": usage.swap_bytes if usage else None,
            "pids": usage.pids if usage else None,
            "io_read_bytes": usage.io_read_bytes if usage else None,
            "io_write_bytes": usage.io_write_bytes if usage else None,
            "net_received_bytes": traffic.rx_bytes if traffic else None,
            "net_sent_bytes": traffic.tx_bytes if traffic else None,
            "time": time.time(),
        }

    def state(self, container_id: int) -> str:
        """Return stopped, starting, running, frozen or stopping."""
        live = self._host.live.running(container_id)
        task = self._host.tasks.current(container_id)
        if task is not None and task.kind in _STATES_OF_TASKS:
            between = _STATES_OF_TASKS[task.kind]
            if (between == "starting") != (live is not None):
                return between
        if live is None:
            ended = self._host.live.get(container_id)
            # What follows an end may be a start, where a reboot was asked for inside.
            return "stopped" if ended is None or ended.settled else "stopping"
        return "frozen" if live.frozen else "running"

    def doctor(self) -> "list[dict]":
        """Check the host with what only the running daemon knows."""
        host = self._host
        problems = [(problem.detail, problem.hint) for problem in host.network.problems()]
        versions = {"daemon": __version__, "supervisor": host.supervisor.hello()["version"]}
        checks = doctor.run(host.where, host.network.bridge, problems, versions)
        checks += [*Disks(host).checks(), *self._damaged()]
        return [
            {"check": c.name, "ok": c.state != "fail", "state": c.state, "detail": c.detail, "hint": c.hint}
            for c in checks
        ]

    def _damaged(self) -> "list[doctor.Check]":
        damaged = [record for record in self._host.store.list() if record.error]
        if not damaged:
            return [doctor.ok("containers", "every configuration can be read")]
        return [
            doctor.fail("containers", f"{r.id}: {r.error}", f"`sysctr edit {r.id}` mends it") for r in damaged
        ]

    def _short(
        self, record: Record, usage: Usage | None, addresses: "tuple[str, ...]", pool_error: str
    ) -> dict:
        live = self._host.live.running(record.id)
        task = self._host.tasks.current(record.id)
        config = record.config
        return {
            "id": record.id, "name": config.name if config else record.name,
            "state": "away" if record.away is not None and live is None else self.state(record.id),
            "booted": self._booted(record, live), "template": record.template,
            "tags": list(config.tags) if config else [],
            "addresses": [address.partition("/")[0] for address in addresses],
            "uptime_s": max(0, round(time.time() - live.started)) if live else None,
            "pid": live.pid if live else None, "cpu_s": usage.cpu_usec / 1e6 if usage else None,
            "memory_bytes": usage.memory_bytes if usage else None,
            "memory_max_bytes": usage.memory_max if usage else None, "pids": usage.pids if usage else None,
            "onboot": config.onboot if config else False, "protected": config.protected if config else False,
            "pending": self._changes.pending(record), "exit": None if live else record.exit,
            "task": {"id": task.id, "kind": task.kind} if task else None, "pool": record.pool,
            "last_backup": record.last_backup, "away": record.away,
            "error": record.error or pool_error, "pool_error": pool_error,
        }  # fmt: skip

    def _booted(self, record: Record, live: Live | None) -> bool | None:
        if live is None:
            return None
        return live.ready if live.ready or self.tells_ready(record) else None

    def tells_ready(self, record: Record) -> bool:
        """Tell whether the container's init is one that says when it is ready."""
        return self._host.guest_of(record).init_kind == "systemd"

    def _veth(self, container_id: int, index: int) -> str:
        return self._host.where.veth(container_id, index)

    def _disk(self, record: Record) -> "dict[str, int | None]":
        try:
            driver = self._host.driver(record)
            used, filled = driver.usage(record.volume), driver.filled(record.volume)
        except (SysctrError, OSError):
            used = filled = None
        return {"disk_used_bytes": used, "disk_filled_bytes": filled}
