"""One v1 hierarchy: a tree with one controller or some, in which containers have a directory each.

Nothing in it is delegated. A container's processes are in the directory that carries the limits; it may mount
the hierarchy through its cgroup namespace, but all files there belong to host root.
"""

import contextlib
import errno
import os
import signal

from sysctr.cgroup import base, files
from sysctr.cgroup.base import Bounds, Limits
from sysctr.errors import Refused, SysctrError
from sysctr.linux import process

# cpuacct carries no limit and nothing here reads it (cgroup2 counts processor time), but lxcfs does for
# /proc/uptime and /proc/stat. freezer and devices are left out: cgroup2 freezes, and a user namespace cannot
# make device nodes that work.
WANTED = frozenset({"cpu", "cpuacct", "cpuset", "memory", "pids", "blkio"})

# The kernel says "no limit" as the largest multiple of a page.
_NO_MEMORY_LIMIT = 1 << 62


class Hierarchy:
    """The directories of one installation in one v1 hierarchy."""

    def __init__(self, mount: str, controllers: frozenset[str], name: str) -> None:
        self.mount = mount
        self.controllers = controllers
        self.root = f"{mount}/{name}"

    def path(self, ct_id: int) -> str:
        """Return the directory of a container."""
        return f"{self.root}/{ct_id}"

    def counts_swap(self) -> bool:
        """Say whether memory and swap together can be limited (a boot option of the host)."""
        return os.path.exists(f"{self.mount}/memory.memsw.limit_in_bytes")

    def online(self) -> frozenset[int]:
        """Return the cores this hierarchy may hand out."""
        return base.parse_cpu_list(files.read(f"{self.mount}/cpuset.effective_cpus"))

    def prepare(self) -> None:
        """Make our directory; idempotent."""
        with contextlib.suppress(FileExistsError):
            files.make_directory(self.root, 0o755)
        if "cpuset" in self.controllers and not files.read(f"{self.root}/cpuset.mems").strip():
            # A v1 cpuset without cores and memory nodes takes no process. clone_children lets the directory
            # of each container be born with those of this one, which saves two writes at every start.
            for name in ("cpuset.cpus", "cpuset.mems"):
                files.write(f"{self.root}/{name}", files.read(f"{self.mount}/{name}"))
            files.write(f"{self.root}/cgroup.clone_children", "1")

    def create(self, ct_id: int, timeout_s: float = 10) -> None:
        """Make a container's directory, without what an earlier run may have left in it."""
        try:
            files.make_directory(self.path(ct_id), 0o755)
        except FileExistsError:
            self.destroy(ct_id, timeout_s)
            files.make_directory(self.path(ct_id), 0o755)

    def destroy(self, ct_id: int, timeout_s: float) -> None:
        """Kill what is left here and remove the directory; no error when there is none."""
        path = self.path(ct_id)
        if not os.path.isdir(path):
            return
        _kill_members(path)
        try:
            files.remove_tree(path, timeout_s)
        except OSError as error:
            raise SysctrError(f"cannot remove the cgroup of {ct_id}: {error}") from error

    def job_directory(self, name: str, bounds: Bounds) -> "list | None":
        """Return path and values of a job's directory; None where this hierarchy bounds nothing of it."""
        values = {}
        if "memory" in self.controllers:
            values["memory.limit_in_bytes"] = str(bounds.memory_bytes)
            if self.counts_swap():
                values["memory.memsw.limit_in_bytes"] = str(bounds.memory_bytes)
        if "pids" in self.controllers:
            values["pids.max"] = str(bounds.pids)
        return [f"{self.root}/{base.JOBS}/{name}", values] if values else None

    def set_limits(self, ct_id: int, limits: Limits, cores: str | None, *, fresh: bool) -> None:
        """Write those limits that this hierarchy's controllers carry."""
        path = self.path(ct_id)
        values: list[tuple[str, str | None, str]] = []
        if "cpu" in self.controllers:
            quota = None if limits.cpus is None else str(base.quota_usec(limits.cpus))
            shares = None if limits.weight is None else str(base.shares_from_weight(limits.weight))
            values += [("cpu.cfs_quota_us", quota, "-1"), ("cpu.shares", shares, "1024")]
        if "cpuset" in self.controllers:
            none = "" if fresh else files.read(f"{self.root}/cpuset.cpus").strip()
            values.append(("cpuset.cpus", cores, none))
        if "pids" in self.controllers:
            values.append(("pids.max", None if limits.pids is None else str(limits.pids), "max"))
        for name, value, none in values:
            if value is not None or not fresh:
                _set(ct_id, path, name, none if value is None else value)
        if "memory" in self.controllers:
            self._set_memory(ct_id, path, limits, fresh=fresh)

    def _set_memory(self, ct_id: int, path: str, limits: Limits, *, fresh: bool) -> None:
        if limits.memory_bytes is None and limits.swap_bytes is not None:
            raise Refused(
                f"cannot give {ct_id} a swap limit: a v1 memory controller limits memory and swap together",
                hint="set a memory limit too",
            )
        memory = "-1" if limits.memory_bytes is None else str(limits.memory_bytes)
        both = "-1"
        if limits.memory_bytes is not None and limits.swap_bytes is not None:
            both = str(limits.memory_bytes + limits.swap_bytes)
        if fresh:
            if memory != "-1":
                _set(ct_id, path, "memory.limit_in_bytes", memory)
            if both != "-1":
                _set(ct_id, path, "memory.memsw.limit_in_bytes", both)
            return
        # At no moment may memory alone be above the two together: lift the second out of the way first.
        before = None
        if self.counts_swap():
            before = files.read(f"{path}/memory.memsw.limit_in_bytes").strip()
            _set(ct_id, path, "memory.memsw.limit_in_bytes", "-1")
        try:
            _set(ct_id, path, "memory.limit_in_bytes", memory)
            if both != "-1":
                _set(ct_id, path, "memory.memsw.limit_in_bytes", both)
        except Refused:
            if before is not None:
                with contextlib.suppress(OSError):
                    files.write(f"{path}/memory.memsw.limit_in_bytes", before)
            raise


def memory_limit(text: str) -> int | None:
    """Return the limit in a v1 memory file, None for none.

    >>> memory_limit("536870912"), memory_limit("9223372036854771712")
    (536870912, None)
    """
    value = int(text)
    return None if value >= _NO_MEMORY_LIMIT else value


def blkio_bytes(text: str) -> tuple[int, int]:
    r"""Return the bytes read and written of a blkio.throttle.io_service_bytes file, all devices together.

    >>> blkio_bytes("254:0 Read 10\n254:0 Write 5\n254:16 Read 1\nTotal 16\n")
    (11, 5)
    """
    sums = {"Read": 0, "Write": 0}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[1] in sums:
            sums[words[1]] += int(words[2])
    return sums["Read"], sums["Write"]


def _set(ct_id: int, path: str, name: str, value: str) -> None:
    try:
        files.write(f"{path}/{name}", value)
    except OSError as error:
        if error.errno == errno.EBUSY and name.startswith("memory."):
            raise Refused(
                f"cannot limit the memory of {ct_id} to {value} bytes: more is in use",
                hint="choose more, or set it while the container is stopped",
            ) from error
        raise Refused(f"cannot set {name} of {ct_id} to {value}: {error.strerror}") from error


def _kill_members(path: str) -> None:
    """Kill the processes that are in this directory but were not in the container's cgroup2 one.

    A start that broke off between the two leaves such. The pidfd is opened before the second look at the
    list, so a process that got the number of a dead one in between is not hit.
    """
    for pid in files.read(f"{path}/cgroup.procs").split():
        try:
            pidfd = process.pidfd_open(int(pid))
        except OSError:
            continue
        try:
            if pid in files.read(f"{path}/cgroup.procs").split():
                process.pidfd_send_signal(pidfd, signal.SIGKILL)
        except OSError:
            pass  # it ended meanwhile
        finally:
            os.close(pidfd)
