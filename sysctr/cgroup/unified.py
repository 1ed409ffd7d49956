"""The cgroup2 driver: limits, freezing and killing through one tree.

Where the tree is: `/sys/fs/cgroup/<name>`, a directory of our own at the top, beside systemd's slices and not
inside one. systemd tolerates directories it does not know and never removes them (LXC has done so for years).
The alternative, Delegate=yes on the daemon's unit, would tie the containers to the life of that unit: its
restart, its slice's limits and its clean-up, while containers must survive the daemon. One thing systemd does
do at the top: it takes controllers out of the root's cgroup.subtree_control that none of its units asks for
(systemd#38547). The kernel refuses that with EBUSY as long as a child has the controller in its *own*
subtree_control, so ours has all of them there, always.

    <name>/           all controllers enabled for children; no processes, no limits
    <name>/101/       the limits; owned by host root, so the container cannot change them
    <name>/101/ns/    what the container sees as the root of its tree; delegated to its root
    <name>/101/ns/.sysctr/   programs that came by exec: ns takes none once the init has made sub-cgroups
    <name>/jobs/3f9c12ab/    one job; the supervisor makes and removes it

Nothing outside <name> is written to, but for the root's subtree_control, and in a container whose processes
live in the root of its namespace (see `_make_room`).
"""

import contextlib
import errno
import os
import threading

from sysctr.cgroup import base, files
from sysctr.cgroup.base import Bounds, Cores, Events, Limits, Placement, Usage
from sysctr.errors import NotFound, Refused, SysctrError, WrongState

EXEC_LEAF = ".sysctr"

# Each cgroup takes kernel memory and makes every walk of the tree longer; systemd with Docker has hundreds.
_DESCENDANTS_MAX = 4096

# /sys/kernel/cgroup/delegate names these since 4.15; memory.reclaim came later and may be missing.
_DELEGATE = ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control", "memory.oom.group")
_CONTROLLERS = frozenset({"cpu", "cpuset", "memory", "pids", "io"})


class Unified(base.Counter):
    """Containers in a cgroup2 tree, with whatever controllers it has (none, on a hybrid host)."""

    def __init__(self, mount: str, name: str) -> None:
        self.mount = mount
        self.root = f"{mount}/{name}"
        self._lock = threading.Lock()
        self._prepared = False
        self._jobs_prepared = False
        self._enabled: frozenset[str] = frozenset()
        self._delegate: tuple[str, ...] = ()
        self._cores = Cores(self._online)
        self._cores_known = False

    # Facts

    @property
    def available(self) -> frozenset[str]:
        """What this tree can do; asking changes nothing."""
        names = self._enabled if self._prepared else frozenset(self._offered())
        facts = names & _CONTROLLERS | {"freeze", "kill"}
        if "memory" in names and self._counts_swap():
            facts |= {"swap"}
        return facts

    def _offered(self) -> list[str]:
        return files.read(f"{self.mount}/cgroup.controllers").split()

    def _counts_swap(self) -> bool:
        # The root of the tree has no limit files, so any child must do; without one there is only the
        # kernel's word that it can swap at all.
        with os.scandir(self.mount) as entries:
            for entry in entries:
                if entry.is_dir() and os.path.exists(f"{entry.path}/memory.max"):
                    return os.path.exists(f"{entry.path}/memory.swap.max")
        return os.path.exists("/proc/swaps")

    def _online(self) -> frozenset[int]:
        with contextlib.suppress(OSError):
            return base.parse_cpu_list(files.read(f"{self.root}/cpuset.cpus.effective"))
        return base.host_cores()

    def _path(self, ct_id: int) -> str:
        return f"{self.root}/{ct_id}"

    def _existing(self, ct_id: int) -> str:
        path = self._path(ct_id)
        if not os.path.isdir(path):
            raise NotFound(f"cannot find the cgroup of {ct_id}: it does not run")
        return path

    def list_ids(self) -> list[int]:
        """Return the containers that have a cgroup."""
        return base.ids_below(self.root)

    # The tree

    def prepare(self) -> None:
        """Make our directory and enable the controllers for it and its children; idempotent."""
        with self._lock:
            if self._prepared and os.path.isdir(self.root):
                return
            with contextlib.suppress(FileExistsError):
                files.make_directory(self.root, 0o755)
            offered = frozenset(self._offered())
            # Twice: until ours holds a controller in its own subtree_control, systemd may take it from the
            # root's in between.
            for _ in range(2):
                self._enable(self.mount, offered)
                self._enabled = self._enable(self.root, offered)
                if self._enabled >= offered & _CONTROLLERS:
                    break
            self._delegate = _delegated_files()
            self._prepared = True

    def _enable(self, directory: str, wanted: frozenset[str]) -> frozenset[str]:
        path = f"{directory}/cgroup.subtree_control"
        missing = wanted - frozenset(files.read(path).split())
        if missing:
            try:
                files.write(path, " ".join(f"+{name}" for name in sorted(missing)))
            except OSError as error:
                if error.errno == errno.EBUSY and directory == self.mount:
                    self._make_room()
                # One bad controller spoils the whole line: `cpu` is refused while a realtime process is
                # anywhere below the root, and whatever the parent has not got is ENOENT.
                for name in sorted(missing):
                    with contextlib.suppress(OSError):
                        files.write(path, f"+{name}")
        return frozenset(files.read(path).split())

    def _make_room(self) -> None:
        """Move the processes in the root of our cgroup namespace into a leaf.

        Inside a container whose init does not manage cgroups all processes are in the namespace's root, which
        is an inner cgroup like any other: it may have processes or pass controllers on, not both. The host's
        real root is exempt from the rule, has no cgroup.type, and is left alone.
        """
        if not os.path.exists(f"{self.mount}/cgroup.type"):
            return
        leaf = f"{self.root}.init"
        with contextlib.suppress(FileExistsError):
            files.make_directory(leaf, 0o755)
        # Some are forking: a few rounds, then the error of the next write says it.
        for _ in range(10):
            pids = files.read(f"{self.mount}/cgroup.procs").split()
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(OSError):
                    files.write(f"{leaf}/cgroup.procs", pid)

    def create(self, ct_id: int, limits: Limits, root_uid: int, root_gid: int | None = None) -> Placement:
        """Make the container's cgroups with its limits; on failure nothing is left.

        What a crash left of an earlier run is removed first; processes in it are an error.
        """
        self.prepare()
        base.check_enforceable(ct_id, limits, self.available)
        path = self._path(ct_id)
        try:
            files.make_directory(path, 0o755)
        except FileExistsError:
            if files.flat(files.read(f"{path}/cgroup.events")).get("populated"):
                raise WrongState(f"cannot create the cgroup of {ct_id}: there are processes in it") from None
            self.destroy(ct_id)
            files.make_directory(path, 0o755)
        with contextlib.ExitStack() as undo:
            undo.callback(self.destroy, ct_id)
            try:
                files.write(f"{path}/cgroup.max.descendants", str(_DESCENDANTS_MAX))
                if self._enabled:
                    self._enable(path, self._enabled)
                self._write_limits(ct_id, limits, fresh=True)
                files.make_directory(f"{path}/ns", 0o775)
                self._hand_over(f"{path}/ns", root_uid, root_uid if root_gid is None else root_gid)
            except OSError as error:
                raise SysctrError(f"cannot create the cgroup of {ct_id}: {error}") from error
            undo.pop_all()
        return self.placement(ct_id)

    def _hand_over(self, directory: str, uid: int, gid: int) -> None:
        os.chown(directory, uid, gid)
        for name in self._delegate:
            with contextlib.suppress(FileNotFoundError):
                os.chown(f"{directory}/{name}", uid, gid)

    # Processes

    def placement(self, ct_id: int) -> Placement:
        """Return where the container's init belongs."""
        payload = f"{self._path(ct_id)}/ns"
        return Placement(procs=(payload,), into=payload, tasks=())

    def exec_placement(self, ct_id: int) -> Placement:
        """Return where a program belongs that enters a running container; makes it when it is not there."""
        payload = f"{self._existing(ct_id)}/ns"
        leaf = f"{payload}/{EXEC_LEAF}"
        try:
            files.make_directory(leaf, 0o775)
        except FileExistsError:
            pass
        except OSError as error:
            # cgroup.max.descendants, or a cgroup.max.depth the container set for itself.
            raise SysctrError(f"cannot make a cgroup for a program in {ct_id}: {error.strerror}") from error
        else:
            owner = os.stat(payload)
            self.prepare()
            self._hand_over(leaf, owner.st_uid, owner.st_gid)
        return Placement(procs=(leaf,), into=leaf, tasks=())

    def place(self, placement: Placement, pid: int) -> None:
        """Move a process; safe from another thread while the process does its set-up."""
        for directory in placement.procs:
            try:
                files.write(f"{directory}/cgroup.procs", str(pid))
            except OSError as error:
                raise SysctrError(f"cannot move process {pid} into {directory}: {error.strerror}") from error

    def pids(self, ct_id: int) -> list[int]:
        """Return all processes of the container as the host numbers them."""
        found: list[int] = []
        for path, _, _ in os.walk(self._path(ct_id)):
            # EOPNOTSUPP: a threaded sub-cgroup; its processes are listed at the threaded root above.
            with contextlib.suppress(OSError):
                found.extend(int(pid) for pid in files.read(f"{path}/cgroup.procs").split())
        return sorted(set(found))

    # Limits

    def set_limits(self, ct_id: int, limits: Limits) -> None:
        """Change the limits of a running container; None lifts one.

        Raises Refused, before anything changed, for what this host cannot enforce; and for a memory limit
        below what the container cannot give back, since the kernel would kill its processes.
        """
        self.prepare()
        base.check_enforceable(ct_id, limits, self.available)
        path = self._existing(ct_id)
        if limits.memory_bytes is not None:
            self._shrink(ct_id, path, limits.memory_bytes)
        self._write_limits(ct_id, limits, fresh=False)

    def _shrink(self, ct_id: int, path: str, memory_bytes: int) -> None:
        used_bytes = int(files.read(f"{path}/memory.current"))
        if used_bytes <= memory_bytes:
            return
        # EAGAIN: not all of it could be had. A kernel before 5.19 has no such file, and then the answer to
        # a limit below the present use is no.
        with contextlib.suppress(OSError):
            files.write(f"{path}/memory.reclaim", str(used_bytes - memory_bytes))
        used_bytes = int(files.read(f"{path}/memory.current"))
        if used_bytes > memory_bytes:
            raise Refused(
                f"cannot limit the memory of {ct_id} to {memory_bytes} bytes: {used_bytes} are in use",
                hint="choose more, or set it while the container is stopped",
            )

    def _write_limits(self, ct_id: int, limits: Limits, *, fresh: bool) -> None:
        """Write the limits; a fresh cgroup has none, so only those that are set."""
        path = self._path(ct_id)
        values: list[tuple[str, str | None, str, str]] = []
        if limits.cores is not None:
            self._adopt_cores()
            values.append(("cpuset", self._cores.give(ct_id, limits.cores), "cpuset.cpus", ""))
        else:
            self._cores.release(ct_id)
            values.append(("cpuset", None if fresh else self._all_cores(path), "cpuset.cpus", ""))
        quota = None if limits.cpus is None else f"{base.quota_usec(limits.cpus)} {base.CPU_PERIOD_USEC}"
        values.append(("cpu", quota, "cpu.max", f"max {base.CPU_PERIOD_USEC}"))
        values.append(("cpu", _text(limits.weight), "cpu.weight", "100"))
        values.append(("memory", _text(limits.memory_bytes), "memory.max", "max"))
        values.append(("swap", _text(limits.swap_bytes), "memory.swap.max", "max"))
        values.append(("pids", _text(limits.pids), "pids.max", "max"))
        available = self.available
        for needed, value, name, none in values:
            if needed not in available or (value is None and (fresh or not none)):
                continue
            try:
                files.write(f"{path}/{name}", none if value is None else value)
            except OSError as error:
                raise Refused(f"cannot set {name} of {ct_id} to {value or none}: {error.strerror}") from error

    def _all_cores(self, path: str) -> str | None:
        """Return what lifts a core limit, None when there is none to lift.

        Emptying it would be the way, but 6.1 refuses that with ENOSPC where processes are.
        """
        with contextlib.suppress(OSError):
            if files.read(f"{path}/cpuset.cpus").strip():
                return base.format_cpu_list(self._online())
        return None

    def _adopt_cores(self) -> None:
        if self._cores_known or "cpuset" not in self._enabled:
            return
        for ct_id in self.list_ids():
            with contextlib.suppress(OSError):
                cpus = files.read(f"{self._path(ct_id)}/cpuset.cpus")
                self._cores.adopt(ct_id, base.parse_cpu_list(cpus))
        self._cores_known = True

    # Jobs

    def job_plan(self) -> dict:
        """Return the part of a job's plan that bounds its memory and its processes.

        The supervisor makes the directories of "make" with these values before the job is born in "into", and
        removes them after its end: so none is left by a daemon that dies or a ticket that nobody uses.
        """
        return self.job_plan_of(os.urandom(4).hex(), base.job_bounds(files.read("/proc/meminfo")))

    def job_plan_of(self, name: str, bounds: Bounds) -> dict:
        """Return the plan's part for a job of this name."""
        self.prepare()
        jobs = f"{self.root}/{base.JOBS}"
        with self._lock:
            if not self._jobs_prepared:
                files.prepare_jobs(jobs)
                self._enable(jobs, self._enabled & {"memory", "pids"})
                self._jobs_prepared = True
        wanted = {"memory.max": bounds.memory_bytes, "memory.swap.max": 0, "pids.max": bounds.pids}
        path = f"{jobs}/{name}"
        values = {file: str(value) for file, value in wanted.items() if os.path.exists(f"{jobs}/{file}")}
        return {"into": path, "tasks": [], "make": [[path, values]]}

    # Freezing, killing

    def freeze(self, ct_id: int, timeout_s: float = 10) -> None:
        """Stop every process of the container and wait until all stand; on time-out they run again."""
        path = self._existing(ct_id)
        files.write(f"{path}/cgroup.freeze", "1")
        if not files.wait_for_event(path, "frozen", 1, timeout_s):
            files.write(f"{path}/cgroup.freeze", "0")
            raise SysctrError(
                f"cannot freeze {ct_id}: a process did not stop within {timeout_s:g} s",
                hint="it waits in the kernel, for a disk or a FUSE file system perhaps",
            )

    def thaw(self, ct_id: int, timeout_s: float = 10) -> None:
        """Let a frozen container run; no error when it does."""
        path = self._existing(ct_id)
        files.write(f"{path}/cgroup.freeze", "0")
        if not files.wait_for_event(path, "frozen", 0, timeout_s):
            raise SysctrError(f"cannot thaw {ct_id}: a process did not run again within {timeout_s:g} s")

    def is_frozen(self, ct_id: int) -> bool:
        """Say whether all processes of the container stand; False for one without a cgroup."""
        try:
            return files.flat(files.read(f"{self._path(ct_id)}/cgroup.events")).get("frozen") == 1
        except FileNotFoundError:
            return False

    def kill(self, ct_id: int) -> None:
        """Send SIGKILL to every process, frozen ones and those being forked included; does not wait.

        cgroup.kill came with 5.14, below our minimum: there is no loop over pids to fall back to.
        """
        with contextlib.suppress(FileNotFoundError):
            files.write(f"{self._path(ct_id)}/cgroup.kill", "1")

    def wait_empty(self, ct_id: int, timeout_s: float) -> bool:
        """Wait until no process is left; False when some were after `timeout_s`."""
        try:
            return files.wait_for_event(self._path(ct_id), "populated", 0, timeout_s)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):
                return True
            raise

    def destroy(self, ct_id: int, timeout_s: float = 10) -> None:
        """Kill what is left in the container's cgroups and remove them; no error when there are none."""
        path = self._path(ct_id)
        if os.path.isdir(path):
            self.kill(ct_id)
            if not self.wait_empty(ct_id, timeout_s):
                left = ", ".join(map(str, self.pids(ct_id)[:10]))
                raise SysctrError(f"cannot remove the cgroup of {ct_id}: killed processes do not end: {left}")
            try:
                files.remove_tree(path, timeout_s)
            except OSError as error:
                raise SysctrError(f"cannot remove the cgroup of {ct_id}: {error}") from error
        self._cores.release(ct_id)

    def destroy_root(self) -> None:
        """Remove our directory; refused while a container has a cgroup in it.

        The controllers enabled at the root stay: others may have come to need them.
        """
        ids = self.list_ids()
        if ids:
            raise WrongState(f"cannot remove {self.root}: {', '.join(map(str, ids))} have cgroups in it")
        with self._lock:
            self._prepared = self._jobs_prepared = False
            files.remove_root(self.root)

    # Counting

    def _usage(self, ct_id: int) -> Usage:
        path = self._path(ct_id)
        memory_bytes = memory_max = swap_bytes = pids = read_bytes = write_bytes = None
        available = self._counted()
        if "memory" in available:
            memory_bytes = int(files.read(f"{path}/memory.current"))
            memory_max = files.number(files.read(f"{path}/memory.max"))
            with contextlib.suppress(FileNotFoundError):
                swap_bytes = int(files.read(f"{path}/memory.swap.current"))
        if "pids" in available:
            pids = int(files.read(f"{path}/pids.current"))
        if "io" in available:
            read_bytes, write_bytes = io_bytes(files.read(f"{path}/io.stat"))
        return Usage(
            cpu_usec(files.read(f"{path}/cpu.stat")),
            memory_bytes,
            memory_max,
            swap_bytes,
            pids,
            read_bytes,
            write_bytes,
        )

    def _counted(self) -> frozenset[str]:
        # A daemon that was restarted counts containers before it creates one: prepare() has not run.
        if not self._prepared:
            return frozenset(files.read(f"{self.root}/cgroup.subtree_control").split())
        return self._enabled

    def events(self, ct_id: int) -> Events:
        """Return how often the memory or process limit was hit."""
        path = self._existing(ct_id)
        oom_kills = _count(path, "memory.events", "oom_kill")
        refused = _count(path, "pids.events", "max")
        if not refused:
            # Before 6.11 a refused fork was counted where the process was and not where the limit is.
            refused = sum(_count(below, "pids.events", "max") for below, _, _ in os.walk(f"{path}/ns"))
        return Events(oom_kills=oom_kills, pids_refused=refused)


def cpu_usec(text: str) -> int:
    r"""Return the processor time in a cgroup2 cpu.stat, which is there without the cpu controller too.

    >>> cpu_usec("usage_usec 1500\nuser_usec 1000\n")
    1500
    """
    # The first line always; parsing the other ten for 200 containers costs milliseconds.
    return int(text[len("usage_usec ") : text.index("\n")])


def io_bytes(text: str) -> tuple[int, int]:
    r"""Return the bytes read and written of an io.stat, all devices together.

    >>> io_bytes("8:0 rbytes=10 wbytes=5 rios=1\n8:16 rbytes=1 wbytes=1\n")
    (11, 6)
    """
    sums = {"rbytes": 0, "wbytes": 0}
    for word in text.split():
        key, _, value = word.partition("=")
        if key in sums:
            sums[key] += int(value)
    return sums["rbytes"], sums["wbytes"]


def _count(path: str, name: str, key: str) -> int:
    try:
        return files.flat(files.read(f"{path}/{name}")).get(key, 0)
    except FileNotFoundError:
        return 0


def _delegated_files() -> tuple[str, ...]:
    """Return the files a delegatee may write, in the kernel's own words."""
    try:
        names = files.read("/sys/kernel/cgroup/delegate").split()
    except FileNotFoundError:
        return _DELEGATE
    return tuple(name for name in names if "/" not in name)


def _text(value: int | None) -> str | None:
    return None if value is None else str(value)
