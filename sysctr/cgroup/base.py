"""What every cgroup driver takes and gives: limits, usage, placements, and the rules they share."""

import contextlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from sysctr.errors import ConfigError, NotFound, Refused

# What cfs takes as the length of one round; the kernel's own default.
CPU_PERIOD_USEC = 100_000
# The smallest quota the kernel takes is 1 ms: 0.01 of a processor.
CPU_QUOTA_MIN_USEC = 1000


@dataclass(frozen=True)
class Limits:
    """What a container may use; None is without a limit.

    `cores` is a number ("2": any two, the driver chooses) or a list ("0-1,3"; one certain core is "3-3").
    `swap_bytes` counts swap alone, as in v2, on every driver.
    """

    cpus: float | None = None
    cores: str | None = None
    weight: int | None = None
    memory_bytes: int | None = None
    swap_bytes: int | None = None
    pids: int | None = None


@dataclass(frozen=True)
class Usage:
    """What a container uses now; None where this host does not count it."""

    cpu_usec: int
    memory_bytes: int | None
    memory_max: int | None
    swap_bytes: int | None
    pids: int | None
    io_read_bytes: int | None
    io_write_bytes: int | None


@dataclass(frozen=True)
class Events:
    """How often a limit was hit since the container started."""

    oom_kills: int
    pids_refused: int


@dataclass(frozen=True)
class Placement:
    """Where a process of a container belongs, said in two ways.

    From outside: write its pid to `cgroup.procs` of every directory in `procs` (what `place` does). The first
    of such writes waits for an RCU grace period of 4 to 17 ms.

    From inside, 0.3 ms in all: clone3 with CLONE_INTO_CGROUP and an fd of `into`, and then, in the child,
    while it is still root of the host and has one thread, write "0" to every file in `tasks`. A single thread
    that moves itself needs no grace period (kernel commit 9a3284fad42f, 5.5).
    """

    procs: tuple[str, ...]
    into: str
    tasks: tuple[str, ...]


# The directory of the jobs' cgroups, beside those of the containers.
JOBS = "jobs"
# A hostile archive or a fork bomb in a build ends there, and not with the host; mmdebstrap has some dozens.
_JOB_PIDS = 1024
_JOB_MEMORY_MIN_BYTES = 256 << 20


@dataclass(frozen=True)
class Bounds:
    """What one job may use."""

    memory_bytes: int
    pids: int = _JOB_PIDS


def job_bounds(meminfo: str) -> Bounds:
    r"""Return the bounds of a job on a host with this /proc/meminfo: half of its memory, and no swap.

    >>> job_bounds("MemTotal:        4194304 kB\n").memory_bytes >> 30
    2
    """
    total_bytes = next(int(line.split()[1]) << 10 for line in meminfo.splitlines() if "MemTotal:" in line)
    return Bounds(max(_JOB_MEMORY_MIN_BYTES, total_bytes // 2))


class Driver(Protocol):
    """A kind of cgroup tree; `available` says which limits and actions it has."""

    @property
    def available(self) -> frozenset[str]: ...

    def create(self, ct_id: int, limits: Limits, root_uid: int, root_gid: int | None = None) -> Placement: ...

    def placement(self, ct_id: int) -> Placement: ...

    def exec_placement(self, ct_id: int) -> Placement: ...

    def place(self, placement: Placement, pid: int) -> None: ...

    def set_limits(self, ct_id: int, limits: Limits) -> None: ...

    def freeze(self, ct_id: int, timeout_s: float = 10) -> None: ...

    def thaw(self, ct_id: int, timeout_s: float = 10) -> None: ...

    def is_frozen(self, ct_id: int) -> bool: ...

    def kill(self, ct_id: int) -> None: ...

    def wait_empty(self, ct_id: int, timeout_s: float) -> bool: ...

    def pids(self, ct_id: int) -> list[int]: ...

    def usage(self, ct_id: int) -> Usage: ...

    def usage_all(self, ids: Iterable[int]) -> dict[int, Usage]: ...

    def events(self, ct_id: int) -> Events: ...

    def destroy(self, ct_id: int, timeout_s: float = 10) -> None: ...

    def destroy_root(self) -> None: ...

    def job_plan(self) -> dict: ...

    def list_ids(self) -> list[int]: ...


class Counter(ABC):
    """The two questions of a driver about what containers use, answered by its `_usage`."""

    def usage(self, ct_id: int) -> Usage:
        """Return what one container uses."""
        usage = self.usage_all([ct_id]).get(ct_id)
        if usage is None:
            raise NotFound(f"cannot find the cgroup of {ct_id}: it does not run")
        return usage

    def usage_all(self, ids: Iterable[int]) -> dict[int, Usage]:
        """Return what each container uses, without those that have no cgroup (any more)."""
        found: dict[int, Usage] = {}
        for ct_id in ids:
            with contextlib.suppress(OSError):
                found[ct_id] = self._usage(ct_id)
        return found

    @abstractmethod
    def _usage(self, ct_id: int) -> Usage:
        """Count one container; OSError for one without a cgroup."""


_NEEDS = (
    ("cpus", "cpu", "a cpu limit"),
    ("weight", "cpu", "a cpu weight"),
    ("cores", "cpuset", "a core limit"),
    ("memory_bytes", "memory", "a memory limit"),
    ("swap_bytes", "swap", "a swap limit"),
    ("pids", "pids", "a process limit"),
)


def check_enforceable(ct_id: int, limits: Limits, available: frozenset[str]) -> None:
    """Raise Refused for the first limit that this host has no controller for."""
    for field, needed, words in _NEEDS:
        if getattr(limits, field) is not None and needed not in available:
            hint = f"this host offers no {needed} controller to sysctr; leave the limit out"
            if needed == "swap":
                hint = "boot the host with swapaccount=1, or leave the limit out"
            raise Refused(f"cannot give {ct_id} {words}: the kernel does not offer `{needed}`", hint)
    if limits.cores is not None:
        _check_cores(ct_id, limits.cores, host_cores())


def _check_cores(ct_id: int, wanted: str, online: frozenset[int]) -> None:
    """Raise Refused when this host has not so many cores, or not these."""
    has = format_cpu_list(online)
    if wanted.strip().isdecimal():
        if not 0 < int(wanted) <= len(online):
            raise Refused(
                f"cannot limit {ct_id} to {wanted} cores: this host has {len(online)}",
                hint=f"choose 1 to {len(online)}, or leave the limit out",
            )
        return
    chosen = parse_cpu_list(wanted)
    missing = chosen - online
    if missing or not chosen:
        raise Refused(
            f"cannot limit {ct_id} to the cores {format_cpu_list(chosen)}: this host has {has}, "
            f"not {format_cpu_list(missing) or 'an empty list'}"
        )


def quota_usec(cpus: float) -> int:
    """Return the part of a period that so many processors are.

    >>> quota_usec(1.5)
    150000
    """
    return max(CPU_QUOTA_MIN_USEC, round(cpus * CPU_PERIOD_USEC))


def shares_from_weight(weight: int) -> int:
    """Return the v1 `cpu.shares` (default 1024) of a v2 weight (default 100).

    >>> shares_from_weight(100), shares_from_weight(1), shares_from_weight(10000)
    (1024, 10, 102400)
    """
    return max(2, weight * 1024 // 100)


def parse_cpu_list(text: str) -> frozenset[int]:
    """Read the kernel's list format.

    >>> sorted(parse_cpu_list("0-2,5"))
    [0, 1, 2, 5]
    """
    cpus: set[int] = set()
    for part in text.strip().split(","):
        if not part:
            continue
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise ConfigError(f"cannot read the core list {text!r}", hint='write "2" or "0-3,5"')
        if int(last or first) > 0xFFFF:
            raise ConfigError(f"cannot read the core list {text!r}: no machine has so many cores")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def format_cpu_list(cpus: Iterable[int]) -> str:
    """Write the kernel's list format.

    >>> format_cpu_list({5, 0, 1, 2})
    '0-2,5'
    """
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][-1] + 1:
            parts[-1].append(cpu)
        else:
            parts.append([cpu])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


class Cores:
    """Which cores each container was given; "any two" are those that the fewest containers were given.

    The answer depends only on what was given before and the cores' numbers, so a test can foresee it.
    """

    def __init__(self, online: Callable[[], frozenset[int]]) -> None:
        self._online = online
        self._given: dict[int, frozenset[int]] = {}
        self._lock = threading.Lock()

    def adopt(self, ct_id: int, cpus: frozenset[int]) -> None:
        """Count what a container that runs already was given."""
        with self._lock:
            if cpus and cpus != self._online():
                self._given.setdefault(ct_id, cpus)

    def give(self, ct_id: int, wanted: str) -> str:
        """Return the list of cores for `wanted` and remember it.

        Raises Refused when this host has not so many, or not these.
        """
        online = self._online()
        _check_cores(ct_id, wanted, online)
        with self._lock:
            counted = wanted.strip().isdecimal()
            chosen = self._choose(ct_id, int(wanted), online) if counted else parse_cpu_list(wanted)
            self._given[ct_id] = chosen
        return format_cpu_list(chosen)

    def _choose(self, ct_id: int, count: int, online: frozenset[int]) -> frozenset[int]:
        held = self._given.get(ct_id, frozenset())
        if len(held) == count and held <= online:
            # Setting another limit must not move a running container to other cores.
            return held
        used = dict.fromkeys(online, 0)
        for other, cpus in self._given.items():
            for cpu in cpus & online if other != ct_id else ():
                used[cpu] += 1
        return frozenset(sorted(online, key=lambda cpu: (used[cpu], cpu))[:count])

    def release(self, ct_id: int) -> None:
        """Forget what a container was given."""
        with self._lock:
            self._given.pop(ct_id, None)


def host_cores() -> frozenset[int]:
    """Return the processors that are switched on."""
    with open("/sys/devices/system/cpu/online", encoding="ascii") as file:
        return parse_cpu_list(file.read())


def ids_below(root: str) -> list[int]:
    """Return the numbers of the containers that have a directory in `root`."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if name.isdecimal())
