"""The driver for hosts whose controllers are (partly) v1: limits there, freezing and killing by cgroup2.

Every container gets a directory in each v1 hierarchy of `v1.WANTED`, with a limit or without. That costs some
0.1 ms each at the start, all counters are there, and a limit set later works at once: adding the directory to
a running container would mean moving its processes while they fork. The expensive part, moving a process,
costs one grace period for all hierarchies together, or nothing (see Placement).

In each of the other v1 hierarchies (freezer, devices, name=systemd, …) all containers are in one directory.
It limits nothing. But a container's root may mount any v1 hierarchy, and sees it from where its cgroup
namespace began: for a process that was never moved that is the host's root, with the names of all services.
"""

import contextlib
import os
import threading
from collections.abc import Iterable
from dataclasses import replace

from sysctr.cgroup import base, files, v1
from sysctr.cgroup.base import Cores, Events, Limits, Placement, Usage
from sysctr.cgroup.unified import Unified, cpu_usec
from sysctr.cgroup.v1 import Hierarchy
from sysctr.errors import Refused

# Which limits a v1 controller takes away from the cgroup2 side.
_FIELDS = {
    "cpu": ("cpus", "weight"),
    "cpuset": ("cores",),
    "memory": ("memory_bytes", "swap_bytes"),
    "pids": ("pids",),
}


class Hybrid(base.Counter):
    """Containers in v1 hierarchies and a cgroup2 tree at once."""

    def __init__(
        self, unified: Unified, hierarchies: Iterable[Hierarchy], others: Iterable[str] = ()
    ) -> None:
        self.unified = unified
        self._others = tuple(others)
        self.hierarchies = tuple(h for h in hierarchies if h.controllers & v1.WANTED)
        self._by_controller = {name: h for h in self.hierarchies for name in h.controllers}
        self._cores: Cores | None = None
        if cpuset := self._by_controller.get("cpuset"):
            self._cores = Cores(cpuset.online)
        self._cores_known = False
        self._prepared = False
        self._jobs_prepared = False
        self._lock = threading.Lock()
        # A host without a swap device needs no reading of swap at every look at the usage.
        self._swap_bytes = self._swap_reader()

    @property
    def available(self) -> frozenset[str]:
        """What the trees can do together; asking changes nothing."""
        facts = set(self.unified.available)
        facts |= self._by_controller.keys() & {"cpu", "cpuset", "memory", "pids"}
        if "blkio" in self._by_controller:
            facts.add("io")
        if (memory := self._by_controller.get("memory")) and memory.counts_swap():
            facts.add("swap")
        return frozenset(facts)

    def list_ids(self) -> list[int]:
        """Return the containers that have a cgroup in any of the trees."""
        found = set(self.unified.list_ids())
        for hierarchy in self.hierarchies:
            found.update(base.ids_below(hierarchy.root))
        return sorted(found)

    def prepare(self) -> None:
        """Make our directory in every tree; idempotent."""
        self.unified.prepare()
        with self._lock:
            if not self._prepared:
                for hierarchy in self.hierarchies:
                    hierarchy.prepare()
                self._others = tuple(path for path in self._others if _made(path))
                self._prepared = True

    def create(self, ct_id: int, limits: Limits, root_uid: int, root_gid: int | None = None) -> Placement:
        """Make the container's cgroups with its limits; on failure nothing is left."""
        base.check_enforceable(ct_id, limits, self.available)
        self.prepare()
        with contextlib.ExitStack() as undo:
            # First: it refuses when processes of an earlier run are still there.
            self.unified.create(ct_id, self._without_v1(limits), root_uid, root_gid)
            undo.callback(self.destroy, ct_id)
            cores = self._choose_cores(ct_id, limits)
            for hierarchy in self.hierarchies:
                hierarchy.create(ct_id)
                hierarchy.set_limits(ct_id, limits, cores, fresh=True)
            undo.pop_all()
        return self.placement(ct_id)

    def _without_v1(self, limits: Limits) -> Limits:
        fields = [field for name in self._by_controller for field in _FIELDS.get(name, ())]
        return replace(limits, **dict.fromkeys(fields))

    def _choose_cores(self, ct_id: int, limits: Limits) -> str | None:
        if self._cores is None:
            return None
        if limits.cores is None:
            self._cores.release(ct_id)
            return None
        if not self._cores_known:
            root = self._by_controller["cpuset"].root
            for other in base.ids_below(root):
                with contextlib.suppress(OSError):
                    cpus = files.read(f"{root}/{other}/cpuset.cpus")
                    self._cores.adopt(other, base.parse_cpu_list(cpus))
            self._cores_known = True
        return self._cores.give(ct_id, limits.cores)

    def placement(self, ct_id: int) -> Placement:
        """Return where the container's init belongs."""
        return self._with_v1(ct_id, self.unified.placement(ct_id))

    def exec_placement(self, ct_id: int) -> Placement:
        """Return where a program belongs that enters a running container."""
        return self._with_v1(ct_id, self.unified.exec_placement(ct_id))

    def _with_v1(self, ct_id: int, placement: Placement) -> Placement:
        directories = (*(h.path(ct_id) for h in self.hierarchies), *self._others)
        return Placement(
            procs=(*directories, *placement.procs),
            into=placement.into,
            tasks=tuple(f"{directory}/tasks" for directory in directories),
        )

    def job_plan(self) -> dict:
        """Return the part of a job's plan that bounds its memory and its processes; see Unified."""
        name, bounds = os.urandom(4).hex(), base.job_bounds(files.read("/proc/meminfo"))
        self.prepare()
        plan = self.unified.job_plan_of(name, bounds)
        for hierarchy in self.hierarchies:
            directory = hierarchy.job_directory(name, bounds)
            if directory:
                plan["make"].append(directory)
                plan["tasks"].append(f"{directory[0]}/tasks")
        with self._lock:
            if not self._jobs_prepared:
                for path, _ in plan["make"][1:]:
                    files.prepare_jobs(os.path.dirname(path))
                self._jobs_prepared = True
        return plan

    def place(self, placement: Placement, pid: int) -> None:
        """Move a process; safe from another thread while the process does its set-up."""
        self.unified.place(placement, pid)

    def set_limits(self, ct_id: int, limits: Limits) -> None:
        """Change the limits of a running container; None lifts one."""
        base.check_enforceable(ct_id, limits, self.available)
        if limits.swap_bytes is not None and limits.memory_bytes is None and "memory" in self._by_controller:
            raise Refused(
                f"cannot give {ct_id} a swap limit: a v1 memory controller limits memory and swap together",
                hint="set a memory limit too",
            )
        self.unified.set_limits(ct_id, self._without_v1(limits))
        cores = self._choose_cores(ct_id, limits)
        # The only one that a running container can refuse goes first, so that nothing else has changed then.
        for hierarchy in sorted(self.hierarchies, key=lambda h: "memory" not in h.controllers):
            hierarchy.set_limits(ct_id, limits, cores, fresh=False)

    def freeze(self, ct_id: int, timeout_s: float = 10) -> None:
        """Stop every process of the container and wait until all stand."""
        self.unified.freeze(ct_id, timeout_s)

    def thaw(self, ct_id: int, timeout_s: float = 10) -> None:
        """Let a frozen container run; no error when it does."""
        self.unified.thaw(ct_id, timeout_s)

    def is_frozen(self, ct_id: int) -> bool:
        """Say whether all processes of the container stand."""
        return self.unified.is_frozen(ct_id)

    def kill(self, ct_id: int) -> None:
        """Send SIGKILL to every process of the container; does not wait."""
        self.unified.kill(ct_id)

    def wait_empty(self, ct_id: int, timeout_s: float) -> bool:
        """Wait until no process is left; False when some were after `timeout_s`."""
        return self.unified.wait_empty(ct_id, timeout_s)

    def pids(self, ct_id: int) -> list[int]:
        """Return all processes of the container as the host numbers them."""
        return self.unified.pids(ct_id)

    def destroy(self, ct_id: int, timeout_s: float = 10) -> None:
        """Kill what is left in the container's cgroups and remove them; no error when there are none."""
        self.unified.destroy(ct_id, timeout_s)
        for hierarchy in self.hierarchies:
            hierarchy.destroy(ct_id, timeout_s)
        if self._cores is not None:
            self._cores.release(ct_id)

    def destroy_root(self) -> None:
        """Remove our directory from every tree; refused while a container has a cgroup there."""
        self.unified.destroy_root()
        self._prepared = self._jobs_prepared = False
        for path in (*(hierarchy.root for hierarchy in self.hierarchies), *self._others):
            files.remove_root(path)

    def _usage(self, ct_id: int) -> Usage:
        by = self._by_controller
        if "memory" not in by or "pids" not in by or "blkio" not in by:
            usage = self.unified.usage(ct_id)
        else:
            cpu = files.read(f"{self.unified.root}/{ct_id}/cpu.stat")
            usage = Usage(cpu_usec(cpu), None, None, None, None, None, None)
        values: dict[str, int | None] = {}
        if memory := by.get("memory"):
            path = memory.path(ct_id)
            values["memory_bytes"] = used = int(files.read(f"{path}/memory.usage_in_bytes"))
            values["memory_max"] = v1.memory_limit(files.read(f"{path}/memory.limit_in_bytes"))
            values["swap_bytes"] = self._swap_bytes(path, used)
        if pids := by.get("pids"):
            values["pids"] = int(files.read(f"{pids.path(ct_id)}/pids.current"))
        if blkio := by.get("blkio"):
            text = files.read(f"{blkio.path(ct_id)}/blkio.throttle.io_service_bytes_recursive")
            values["io_read_bytes"], values["io_write_bytes"] = v1.blkio_bytes(text)
        return replace(usage, **values)

    def _swap_reader(self):
        memory = self._by_controller.get("memory")
        if memory is None or not memory.counts_swap():
            return lambda path, used_bytes: None
        return _swap_bytes

    def events(self, ct_id: int) -> Events:
        """Return how often the memory or process limit was hit."""
        events = self.unified.events(ct_id)
        if memory := self._by_controller.get("memory"):
            control = files.flat(files.read(f"{memory.path(ct_id)}/memory.oom_control"))
            events = replace(events, oom_kills=control.get("oom_kill", 0))
        if pids := self._by_controller.get("pids"):
            refused = files.flat(files.read(f"{pids.path(ct_id)}/pids.events"))
            events = replace(events, pids_refused=refused.get("max", 0))
        return events


def _made(path: str) -> bool:
    """Make a directory for all containers; False in a hierarchy that takes none, as one mounted read-only."""
    try:
        files.make_directory(path, 0o755)
    except FileExistsError:
        pass
    except OSError:
        return False
    return True


def _swap_bytes(path: str, used_bytes: int) -> int:
    """Return the swap in use: v1 counts only memory and swap together, a moment later than memory alone."""
    return max(0, int(files.read(f"{path}/memory.memsw.usage_in_bytes")) - used_bytes)
