"""The cgroup driver of this host, whichever it is: every limit is run into, not read back."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from sysctr.cgroup import Driver, Limits, Placement, files, open_driver
from sysctr.cgroup.unified import EXEC_LEAF, Unified
from sysctr.errors import NotFound, Refused, SysctrError, WrongState
from sysctr.linux import process
from sysctr.paths import Layout
from tests import leaks

pytestmark = [pytest.mark.root, pytest.mark.kernel]

MIB = 1 << 20
ROOT_UID = 1_000_000


class Child:
    """A forked process that obeys one order after another and answers each with a line.

    It starts outside the container's cgroups unless `born` moves it in before anything else.
    """

    def __init__(self, born: Placement | None = None) -> None:
        self.status: int | None = None
        order_fd, self._order_fd = os.pipe2(os.O_CLOEXEC)
        self._answer_fd, answer_fd = os.pipe2(os.O_CLOEXEC)
        self.pid = _born_in(born.into) if born else os.fork()
        if self.pid == 0:
            try:
                for path in born.tasks if born else ():
                    files.write(path, "0")
                _obey(order_fd, answer_fd)
            finally:
                os._exit(1)
        self.pidfd = process.pidfd_open(self.pid)
        os.close(order_fd)
        os.close(answer_fd)

    def order(self, text: str) -> None:
        os.write(self._order_fd, f"{text}\n".encode())

    def answer(self, timeout_s: float = 20) -> str | None:
        if not select.select([self._answer_fd], [], [], timeout_s)[0]:
            return None
        return os.read(self._answer_fd, 4096).decode()

    def ask(self, text: str) -> str:
        self.order(text)
        answer = self.answer()
        assert answer is not None, f"no answer to {text}"
        return answer

    def ended(self, timeout_s: float = 10) -> int:
        """Return the wait status of the end that is awaited."""
        assert select.select([self.pidfd], [], [], timeout_s)[0], f"{self.pid} did not end"
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def close(self) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                process.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            self.ended()
        for fd in (self._order_fd, self._answer_fd, self.pidfd):
            os.close(fd)


def _born_in(directory: str) -> int:
    # Not for the other children: pytest has a watchdog thread, and a raw clone leaves glibc in the child
    # convinced of it, so that setresuid there waits for a thread that does not exist.
    into_fd = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    try:
        pid, pidfd = process.clone(0, into_fd)
    finally:
        os.close(into_fd)
    if pid:
        os.close(pidfd)
    return pid


def _obey(order_fd: int, answer_fd: int) -> None:
    held: list[object] = []
    for line in os.fdopen(order_fd):
        verb, *words = line.split()
        try:
            answer = str(_ORDERS[verb](held, *words))
        except OSError as error:
            answer = f"errno {error.errno}"
        os.write(answer_fd, answer.encode() or b" ")


def _fork(held: list[object]) -> int:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    return pid


def _hold(held: list[object], mib: str) -> int:
    memory = bytearray(int(mib) * MIB)
    for offset in range(0, len(memory), 4096):
        memory[offset] = 1
    held.append(memory)
    return len(memory)


def _burn(held: list[object], wall_s: str) -> float:
    end = time.monotonic() + float(wall_s)
    start_s = time.process_time()
    while time.monotonic() < end:
        pass
    return time.process_time() - start_s


def _become(held: list[object], uid: str) -> int:
    os.setgroups([])
    os.setresgid(int(uid), int(uid), int(uid))
    os.setresuid(int(uid), int(uid), int(uid))
    return os.getuid()


_ORDERS: dict[str, Callable[..., object]] = {
    "ping": lambda held: "pong",
    "fork": _fork,
    "hold": _hold,
    "drop": lambda held: held.clear(),
    "burn": _burn,
    "cores": lambda held: sorted(os.sched_getaffinity(0)),
    "become": _become,
    "write": lambda held, path, text: files.write(path, text),
    "mkdir": lambda held, path: os.mkdir(path),
    "rmdir": lambda held, path: os.rmdir(path),
    "groups": lambda held: files.read("/proc/self/cgroup"),
}


class Bed:
    """A driver with a tree of its own, and the processes a test put into it."""

    def __init__(self, root: str) -> None:
        leaks.register(root)
        self.layout = Layout(root)
        self.driver: Driver = open_driver(self.layout)
        self.children: list[Child] = []

    def child(self, born: Placement | None = None) -> Child:
        self.children.append(Child(born))
        return self.children[-1]

    def start(self, ct_id: int, limits: Limits = Limits()) -> Child:  # noqa: B008 - a frozen value
        child = self.child()
        self.driver.place(self.driver.create(ct_id, limits, ROOT_UID), child.pid)
        return child

    def need(self, *facts: str) -> None:
        missing = sorted(set(facts) - self.driver.available)
        if missing:
            pytest.skip(f"the cgroup tree of this host has no {', '.join(missing)}")

    def close(self) -> None:
        # Frozen or not, what is in the tree dies here; the test's own children are then reaped.
        for ct_id in self.driver.list_ids():
            self.driver.kill(ct_id)
        for child in self.children:
            child.close()
        for ct_id in self.driver.list_ids():
            self.driver.destroy(ct_id)
        self.driver.destroy_root()


@pytest.fixture
def bed(tmp_path) -> Iterator[Bed]:
    bed = Bed(str(tmp_path))
    yield bed
    bed.close()


def trees(bed: Bed) -> list[str]:
    """Return the directories of the installation in all hierarchies, from what is mounted."""
    found = []
    with open("/proc/self/mounts", encoding="ascii") as mounts:
        for line in mounts:
            _, target, fstype, *_ = line.split()
            if fstype in ("cgroup", "cgroup2") and os.path.isdir(f"{target}/{bed.layout.cgroup}"):
                found.append(f"{target}/{bed.layout.cgroup}")
    return found


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_asking_what_there_is_changes_nothing(bed: Bed) -> None:
    assert {"freeze", "kill"} <= bed.driver.available
    assert bed.driver.list_ids() == []
    assert trees(bed) == []


def test_every_controller_a_container_needs_is_here(bed: Bed) -> None:
    assert {"cpu", "cpuset", "memory", "pids", "io"} <= bed.driver.available


def test_a_placed_process_is_in_every_tree(bed: Bed) -> None:
    child = bed.start(101)
    for line in child.ask("groups").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            assert path.endswith(f"/{bed.layout.cgroup}/101/ns")
        elif {"cpu", "memory", "pids", "cpuset", "cpuacct", "blkio"} & set(controllers.split(",")):
            assert path.endswith(f"/{bed.layout.cgroup}/101")
    assert bed.driver.pids(101) == [child.pid]


def test_a_strict_umask_hides_no_cgroup_from_the_container(bed: Bed) -> None:
    """Linux 6.1 mounts cgroup2 only for who may search all directories above the root that it will show."""
    before = os.umask(0o077)
    try:
        bed.driver.create(101, Limits(), ROOT_UID)
        bed.driver.exec_placement(101)
    finally:
        os.umask(before)
    found = [path for tree in trees(bed) for path, _, _ in os.walk(tree)]
    assert any(path.endswith(f"/101/ns/{EXEC_LEAF}") for path in found)
    assert [path for path in found if os.stat(path).st_mode & 0o755 != 0o755] == []


def test_a_child_can_be_born_in_its_place(bed: Bed) -> None:
    outside = bed.start(101)
    placement = bed.driver.create(102, Limits(), ROOT_UID)
    inside = bed.child(placement)
    assert inside.ask("groups") == outside.ask("groups").replace("/101", "/102")


def test_placing_a_dead_process_is_an_error(bed: Bed) -> None:
    child = bed.child()
    process.pidfd_send_signal(child.pidfd, signal.SIGKILL)
    child.ended()
    placement = bed.driver.create(101, Limits(), ROOT_UID)
    with pytest.raises(SysctrError, match=f"cannot move process {child.pid}"):
        bed.driver.place(placement, child.pid)


def test_too_many_processes_are_refused_to_the_container(bed: Bed) -> None:
    bed.need("pids")
    child = bed.start(101, Limits(pids=3))
    assert [child.ask("fork").startswith("errno 11") for _ in range(3)] == [False, False, True]
    assert bed.driver.usage(101).pids == 3
    assert bed.driver.events(101).pids_refused >= 1
    bed.driver.set_limits(101, Limits(pids=4))
    assert not child.ask("fork").startswith("errno")
    bed.driver.set_limits(101, Limits())
    assert not child.ask("fork").startswith("errno")
    assert len(bed.driver.pids(101)) == 5


def test_memory_above_the_limit_kills_in_the_container(bed: Bed) -> None:
    bed.need("memory")
    swap_bytes = 0 if "swap" in bed.driver.available else None
    child = bed.start(101, Limits(memory_bytes=48 * MIB, swap_bytes=swap_bytes))
    assert bed.driver.usage(101).memory_max == 48 * MIB
    assert child.ask("hold 20") == str(20 * MIB)
    used_bytes = bed.driver.usage(101).memory_bytes
    assert used_bytes is not None
    assert 20 * MIB <= used_bytes <= 48 * MIB
    assert bed.driver.events(101).oom_kills == 0
    child.order("hold 60")
    assert child.ended() == -signal.SIGKILL
    assert bed.driver.events(101).oom_kills == 1


def test_memory_in_use_is_not_taken_away(bed: Bed) -> None:
    bed.need("memory", "swap")
    child = bed.start(101, Limits(memory_bytes=96 * MIB, swap_bytes=0))
    child.ask("hold 40")
    with pytest.raises(Refused, match=r"cannot limit the memory of 101 to .*in use"):
        bed.driver.set_limits(101, Limits(memory_bytes=16 * MIB, swap_bytes=0))
    assert child.ask("ping") == "pong"
    assert bed.driver.usage(101).memory_max == 96 * MIB
    child.ask("drop")
    bed.driver.set_limits(101, Limits(memory_bytes=24 * MIB, swap_bytes=0))
    child.order("hold 40")
    assert child.ended() == -signal.SIGKILL


def test_a_raised_memory_limit_holds_more(bed: Bed) -> None:
    bed.need("memory", "swap")
    child = bed.start(101, Limits(memory_bytes=24 * MIB, swap_bytes=8 * MIB))
    bed.driver.set_limits(101, Limits(memory_bytes=96 * MIB, swap_bytes=0))
    assert child.ask("hold 64") == str(64 * MIB)
    bed.driver.set_limits(101, Limits())
    assert bed.driver.usage(101).memory_max is None
    assert child.ask("hold 64") == str(64 * MIB)


def test_a_swap_limit_that_cannot_hold_is_refused(bed: Bed) -> None:
    limits = Limits(swap_bytes=MIB)
    if "swap" in bed.driver.available and isinstance(bed.driver, Unified):
        bed.driver.create(101, limits, ROOT_UID)  # v2 counts swap by itself
        bed.driver.set_limits(101, limits)
        return
    with pytest.raises(Refused, match="swap limit"):
        bed.driver.create(101, limits, ROOT_UID)
    assert bed.driver.list_ids() == []
    child = bed.start(102)
    with pytest.raises(Refused, match="swap limit"):
        bed.driver.set_limits(102, limits)
    assert child.ask("ping") == "pong"


def test_a_container_runs_on_its_cores(bed: Bed) -> None:
    bed.need("cpuset")
    online = sorted(os.sched_getaffinity(0))
    if len(online) < 2:
        pytest.skip("this host has one core")
    first = bed.start(101, Limits(cores="1"))
    second = bed.start(102, Limits(cores="1"))
    assert first.ask("cores") == str([online[0]])
    assert second.ask("cores") == str([online[1]])
    bed.driver.set_limits(101, Limits(cores=f"{online[0]},{online[1]}"))
    assert first.ask("cores") == str(online[:2])
    bed.driver.set_limits(101, Limits())
    assert first.ask("cores") == str(online)
    # A daemon that was restarted knows which core the first one has for itself.
    bed.driver.set_limits(101, Limits(cores=f"{online[0]}-{online[0]}"))
    bed.driver.set_limits(102, Limits())
    again = open_driver(bed.layout)
    again.set_limits(102, Limits(cores="1"))
    assert first.ask("cores") == str([online[0]])
    assert second.ask("cores") == str([online[1]])


def test_cores_that_are_not_there_are_refused(bed: Bed) -> None:
    bed.need("cpuset")
    for cores in ("1000", "900-901", "0"):
        with pytest.raises(Refused, match="this host has"):
            bed.driver.create(101, Limits(cores=cores), ROOT_UID)
    assert bed.driver.list_ids() == []
    assert [path for tree in trees(bed) for path in os.listdir(tree) if path == "101"] == []


def test_processor_time_is_limited_and_counted(bed: Bed) -> None:
    bed.need("cpu")
    child = bed.start(101, Limits(cpus=0.2, weight=50))
    before = bed.driver.usage(101).cpu_usec
    # One period's slack at either end: 0.2 of 0.6 s, plus a quota of 20 ms that was there at the start.
    limited_s = float(child.ask("burn 0.6"))
    assert limited_s < 0.3
    counted_usec = bed.driver.usage(101).cpu_usec - before
    # The program's own clock runs only while it burns; what it does before and after is counted too, and on
    # an emulated processor that is a tenth of a second.
    assert -20_000 < counted_usec - limited_s * 1e6 < 300_000
    bed.driver.set_limits(101, Limits())
    assert float(child.ask("burn 0.6")) > limited_s


def test_usage_leaves_out_what_does_not_run(bed: Bed) -> None:
    bed.driver.create(101, Limits(), ROOT_UID)
    bed.driver.create(102, Limits(), ROOT_UID)
    assert sorted(bed.driver.usage_all([101, 102, 103])) == [101, 102]
    # Counting comes before creating in a daemon that was restarted.
    assert open_driver(bed.layout).usage(101) == bed.driver.usage(101)
    with pytest.raises(NotFound):
        bed.driver.usage(103)


def test_a_frozen_container_stands_still(bed: Bed) -> None:
    child = bed.start(101)
    assert not bed.driver.is_frozen(101)
    bed.driver.freeze(101)
    assert bed.driver.is_frozen(101)
    child.order("ping")
    assert child.answer(timeout_s=0.1) is None
    bed.driver.thaw(101)
    assert child.answer() == "pong"
    assert not bed.driver.is_frozen(101)
    bed.driver.thaw(101)
    assert not bed.driver.is_frozen(999)


def test_a_frozen_container_can_be_killed(bed: Bed) -> None:
    child = bed.start(101)
    grandchild = int(child.ask("fork"))
    bed.driver.freeze(101)
    bed.driver.kill(101)
    assert child.ended() == -signal.SIGKILL
    assert bed.driver.wait_empty(101, 10)
    assert not alive(grandchild)
    assert bed.driver.wait_empty(999, 0)


def test_waiting_for_the_end_is_bounded(bed: Bed) -> None:
    bed.start(101)
    start = time.monotonic()
    assert not bed.driver.wait_empty(101, 0.05)
    assert time.monotonic() - start < 5


def test_destroy_kills_and_removes_what_the_container_made(bed: Bed) -> None:
    child = bed.start(101)
    payload = bed.driver.placement(101).into
    assert child.ask(f"become {ROOT_UID}") == str(ROOT_UID)
    for name in ("system.slice", "system.slice/a.service", "system.slice/a.service/deeper"):
        assert child.ask(f"mkdir {payload}/{name}") == "None"
    child.ask(f"write {payload}/system.slice/a.service/deeper/cgroup.procs 0")
    pids = [int(child.ask("fork")) for _ in range(3)]
    assert set(bed.driver.pids(101)) == {child.pid, *pids}
    bed.driver.destroy(101)
    assert not any(alive(pid) for pid in pids)
    assert child.ended() == -signal.SIGKILL
    assert bed.driver.list_ids() == []
    assert [path for tree in trees(bed) for path in os.listdir(tree) if path == "101"] == []
    bed.driver.destroy(101)


def test_a_container_cannot_touch_its_limits(bed: Bed) -> None:
    child = bed.start(101, Limits(pids=100, memory_bytes=64 * MIB))
    assert child.ask(f"become {ROOT_UID}") == str(ROOT_UID)
    payload = bed.driver.placement(101).into
    delegated = {f"{payload}/{name}" for name in files.read("/sys/kernel/cgroup/delegate").split()}
    tried = 0
    for tree in trees(bed):
        for path, _, names in os.walk(tree):
            assert child.ask(f"mkdir {path}/evil") == ("None" if path == payload else "errno 13")
            for name in names:
                target = f"{path}/{name}"
                if os.stat(target).st_mode & 0o222 and target not in delegated:
                    assert child.ask(f"write {target} 1") == "errno 13", target
                    tried += 1
    assert tried > 20
    # What it was given works: a sub-cgroup, and moving into it.
    assert child.ask(f"write {payload}/evil/cgroup.procs 0") == "None"
    # Not out of its own tree though, neither to where its limits are nor to the top.
    for directory in (os.path.dirname(payload), os.path.dirname(os.path.dirname(payload))):
        assert child.ask(f"write {directory}/cgroup.procs 0") == "errno 13"


def test_a_program_enters_beside_the_sub_cgroups_of_init(bed: Bed) -> None:
    child = bed.start(101)
    placement = bed.driver.placement(101)
    offered = files.read(f"{placement.into}/cgroup.controllers").split()
    if not offered:
        pytest.skip("no controller reaches the container on this host")
    os.mkdir(f"{placement.into}/init.scope")
    files.write(f"{placement.into}/init.scope/cgroup.procs", str(child.pid))
    files.write(f"{placement.into}/cgroup.subtree_control", f"+{offered[0]}")
    program = bed.child()
    with pytest.raises(SysctrError, match="busy"):
        bed.driver.place(placement, program.pid)
    entrance = bed.driver.exec_placement(101)
    assert os.stat(entrance.into).st_uid == ROOT_UID
    bed.driver.place(entrance, program.pid)
    assert f"/101/ns/{EXEC_LEAF}\n" in program.ask("groups") + "\n"
    assert bed.driver.exec_placement(101) == entrance
    assert set(bed.driver.pids(101)) == {child.pid, program.pid}
    with pytest.raises(NotFound):
        bed.driver.exec_placement(102)


def test_what_a_crash_left_is_replaced_unless_it_lives(bed: Bed) -> None:
    bed.driver.create(101, Limits(pids=5), ROOT_UID)
    assert bed.start(101).ask("fork") != "errno 11"
    with pytest.raises(WrongState, match="processes in it"):
        bed.driver.create(101, Limits(), ROOT_UID)
    assert len(bed.driver.pids(101)) == 2


def test_a_start_that_broke_off_between_the_trees_is_cleaned(bed: Bed) -> None:
    placement = bed.driver.create(101, Limits(), ROOT_UID)
    if not placement.tasks:
        pytest.skip("this host has no v1 hierarchies")
    child = bed.child()
    files.write(placement.tasks[0], str(child.pid))
    bed.driver.destroy(101)
    assert child.ended() == -signal.SIGKILL
    assert [path for tree in trees(bed) for path in os.listdir(tree) if path == "101"] == []


def test_the_tree_is_removed_only_when_it_is_empty(bed: Bed) -> None:
    bed.driver.create(101, Limits(), ROOT_UID)
    bed.driver.create(9999, Limits(), ROOT_UID)
    assert bed.driver.list_ids() == [101, 9999]
    with pytest.raises(WrongState, match="101, 9999"):
        bed.driver.destroy_root()
    for ct_id in (101, 9999):
        bed.driver.destroy(ct_id)
    bed.driver.destroy_root()
    assert trees(bed) == []
    # And it is made again by whoever comes next, with the same driver.
    assert bed.start(101).ask("ping") == "pong"


def test_cgroups_inside_are_bounded(bed: Bed) -> None:
    placement = bed.driver.create(101, Limits(), ROOT_UID)
    files.write(f"{os.path.dirname(placement.into)}/cgroup.max.descendants", "2")
    os.mkdir(f"{placement.into}/one")
    with pytest.raises(SysctrError, match="cannot make a cgroup for a program in 101"):
        bed.driver.exec_placement(101)


def test_processes_in_the_root_of_a_namespace_make_room(bed: Bed) -> None:
    """sysctr inside a container whose init does not manage cgroups: its processes are in the way."""
    child = bed.start(101)
    inner = Unified(bed.driver.placement(101).into, "inner")
    offered = set(files.read(f"{inner.mount}/cgroup.controllers").split())
    if not offered:
        pytest.skip("no controller reaches the container on this host")
    inner.prepare()
    assert set(files.read(f"{inner.root}/cgroup.subtree_control").split()) == offered
    assert child.ask("groups").rstrip().endswith("/101/ns/inner.init")
    nested = bed.child()
    inner.place(inner.create(7, Limits(), ROOT_UID), nested.pid)
    assert nested.ask("groups").rstrip().endswith("/101/ns/inner/7/ns")
