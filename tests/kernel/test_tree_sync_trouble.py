"""A synchronisation that cannot go well ends soon, says why, and leaves nothing that the next one minds."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from sysctr.cgroup import detect
from sysctr.engine import tree_sync
from sysctr.engine.job import JobRunner
from sysctr.engine.supervisor import SupervisorClient
from sysctr.engine.tree_sync import receive_tree, send_tree
from sysctr.engine.trees import TreeWorker
from sysctr.errors import Busy, NoSpace, SysctrError, WrongState
from sysctr.runtime import wire
from sysctr.storage.base import Base
from sysctr.storage.overlay import OverlayDriver
from tests import storage
from tests.disk import fill, fill_inodes, small_disk
from tests.kernel.conftest import JOB_IDMAP
from tests.node import Node
from tests.storage import MIB
from tests.syncing import Cancelled, Outcome, Pair, connected, over, plain, runner_with
from tests.trees import describe, difference
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.kernel, pytest.mark.needs("loop", "userns", "idmap")]

# Of this process alone: what has these ids is looked for, and killed.
_FIRST = 2_000_000_000 + os.getpid() % 10_000 * 2 * 65536


@pytest.fixture
def here(jobs: JobRunner) -> JobRunner:
    """What works with the ids that the container has."""
    return runner_with(jobs, _FIRST)


@pytest.fixture
def there(jobs: JobRunner) -> JobRunner:
    """What works with the ids that the container has on the other host."""
    return runner_with(jobs, _FIRST + 65536)


@pytest.fixture
def pair(here: JobRunner, there: JobRunner, tmp_path: Path) -> Iterator[Pair]:
    """A directory with 8 MiB to send, and an empty one; no process of either end is left in the end."""
    for name in ("source", "target"):
        os.mkdir(tmp_path / name, 0o755)
    for number in range(8):
        Path(tmp_path, "source", f"file-{number}").write_bytes(random.Random(number).randbytes(MIB))
    yield Pair(here, there, plain(tmp_path / "source"), plain(tmp_path / "target"))
    for runner in (here, there):
        wait_until(lambda ids=runner.idmap: not processes(ids.first), what="the end of all jobs")


def processes(first_id: int, name: str = "") -> list[int]:
    """Return the processes of a job with these ids, the oldest first."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and os.stat(f"/proc/{entry}").st_uid == first_id:
                words = Path(f"/proc/{entry}/comm").read_text().strip()
                found += [int(entry)] if words.startswith(name) else []
    return sorted(found)


class Gate:
    """Holds the bytes back, from some number on, until something was done."""

    def __init__(self, after_bytes: int) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self._left = after_bytes

    def __call__(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            self.reached.set()
            assert self.open.wait(60)


def run_until(pair: Pair, then: Callable[[], None], after_bytes: int = 2 * MIB) -> tuple[object, object]:
    """Do one run, and something in its middle, while no byte moves; return what came of it at either end."""
    gate = Gate(after_bytes)
    done = Outcome(lambda: pair.run(told=gate))
    try:
        wait_until(gate.reached.is_set, 20, "the middle of the run")
        then()
    finally:
        gate.open.set()
    return done.wait(20)


def assert_same(pair: Pair) -> None:
    paths = (pair.source.trees[0].path, pair.target.trees[0].path)
    assert difference(*map(describe, paths)) == {}


# Full disks.


def test_a_full_disk_is_told_and_room_is_all_it_takes(pair: Pair, tmp_path: Path) -> None:
    pair.target = plain(tmp_path / "small")
    os.mkdir(tmp_path / "small")
    with small_disk(str(tmp_path / "small"), 6 * 1024):
        os.chmod(tmp_path / "small", 0o755)
        sent, received = pair.run()
        assert isinstance(received, NoSpace)
        assert str(received) == f"cannot migrate 101: no space left on {tmp_path}/small"
        assert any("No space left on device" in line for line in pair.their_task.lines)
        # Whoever sends cannot know; it was told that the other side broke.
        assert isinstance(sent, SysctrError)
        for number in range(5):
            os.unlink(f"{pair.source.trees[0].path}/file-{number}")
        pair.pass_()
        assert_same(pair)


def test_a_disk_without_room_for_names_is_full_too(pair: Pair, tmp_path: Path) -> None:
    for number in range(100):
        Path(pair.source.trees[0].path, f"empty-{number}").touch()
    pair.target = plain(tmp_path / "small")
    os.mkdir(tmp_path / "small")
    with small_disk(str(tmp_path / "small"), 20 * 1024, "-N", "64"):
        _, received = pair.run()
        assert isinstance(received, NoSpace)


@pytest.mark.parametrize("full", [lambda directory: None, fill, fill_inodes], ids=["soon", "bytes", "names"])
def test_an_overlay_on_a_full_disk_says_so_too(
    jobs: JobRunner, pair: Pair, tmp_path: Path, full: Callable[[str], None]
) -> None:
    directory = str(tmp_path / "pool")
    os.mkdir(directory)
    with small_disk(directory, 6 * 1024):
        driver = OverlayDriver(directory, f"{directory}.run")
        driver.prepare()
        os.makedirs(f"{directory}/layers/base/rootfs")
        driver.create("101", Base("base", f"{directory}/layers/base/rootfs"), TreeWorker(jobs))
        pair.target = driver.activate("101")
        full(directory)
        _, received = pair.run()
        driver.deactivate("101")
    assert isinstance(received, NoSpace), received
    assert str(received).startswith(f"cannot migrate 101: no space left on {directory}/")


# Ends.


@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("name", ["rsync", "sh"])
@pytest.mark.parametrize("end", ["sender", "receiver"])
def test_whatever_is_killed_both_ends_say_so(
    here: JobRunner, there: JobRunner, pair: Pair, end: str, name: str, which: int
) -> None:
    first = (here if end == "sender" else there).idmap.first
    victims: list[int] = []

    def kill() -> None:
        victims.append(processes(first, name)[which])
        os.kill(victims[0], signal.SIGKILL)

    sent, received = run_until(pair, kill)
    assert victims
    assert isinstance(sent, SysctrError)
    assert isinstance(received, SysctrError)
    if name == "sh" or (end, which) == ("sender", 0):
        assert "ended with 137" in str(sent if end == "sender" else received)
    pair.pass_()
    assert_same(pair)


@pytest.mark.parametrize("end", ["sender", "receiver"])
def test_cancelling_ends_it_at_either_end(here: JobRunner, there: JobRunner, pair: Pair, end: str) -> None:
    runner, task = (here, pair.task) if end == "sender" else (there, pair.their_task)

    def cancel() -> None:
        assert processes(runner.idmap.first)
        task.cancelled = True
        wait_until(lambda: not processes(runner.idmap.first), what="the end of the job")

    outcome = run_until(pair, cancel)
    assert isinstance(outcome[end == "receiver"], Cancelled)
    assert isinstance(outcome[end == "sender"], SysctrError)
    task.cancelled = False
    pair.pass_()
    assert_same(pair)


class PeerLost(SysctrError):
    """What an exchange raises when the connection broke."""


@pytest.mark.parametrize("stopped", [False, True], ids=["alive", "stopped"])
@pytest.mark.parametrize("end", ["sender", "receiver"])
def test_a_broken_connection_is_the_cause_and_not_what_rsync_says_of_it(
    here: JobRunner, there: JobRunner, pair: Pair, end: str, stopped: bool
) -> None:
    runner, task = (here, pair.task) if end == "sender" else (there, pair.their_task)

    def breaking(read_fd: int, write_fd: int) -> None:
        # As soon as rsync has said its first word.
        os.read(read_fd, 1)
        if stopped:
            for pid in processes(runner.idmap.first, "rsync"):
                os.kill(pid, signal.SIGSTOP)
        os.close(read_fd)
        os.close(write_fd)
        raise PeerLost("cannot reach the other host")

    def work() -> None:
        if end == "sender":
            send_tree(runner, task, pair.source, breaking, "all")
        else:
            receive_tree(runner, task, pair.target, breaking, "all")

    assert isinstance(Outcome(work).wait(20), PeerLost)


def test_what_vanishes_meanwhile_is_no_error(pair: Pair) -> None:
    source = pair.source.trees[0].path
    sent, received = run_until(pair, lambda: os.unlink(f"{source}/file-7"), after_bytes=MIB)
    assert not isinstance(sent, BaseException)
    assert not isinstance(received, BaseException)
    pair.pass_()
    assert_same(pair)


def test_a_job_that_cannot_begin_is_told_and_nobody_waits(pair: Pair) -> None:
    pair.target = plain("/nowhere/at/all")
    sent, received = pair.run()
    assert isinstance(sent, SysctrError)
    assert "No such file" in str(received)


# One upper, one job.


def test_an_upper_is_never_mounted_twice(jobs: JobRunner, tmp_path: Path) -> None:
    with storage.pool("overlay", str(tmp_path), jobs) as pool, contextlib.ExitStack() as stack:
        for volume in ("101", "101-data"):
            pool.create(volume)
            stack.callback(pool.driver.deactivate, volume)
        root, data = pool.driver.activate("101"), pool.driver.activate("101-data")
        read_fd, write_fd = os.pipe()
        holding = Outcome(
            lambda: jobs.run_tool(
                ["sh", "-c", "touch /volume/held; cat"], root=root, container=101, stdin_fd=read_fd
            )
        )
        held = f"{root.trees[-1].path}/rootfs/held"
        wait_until(lambda: os.path.exists(held), what="the job")
        for attempt in (
            lambda: jobs.run_tool(["true"], root=root),
            lambda: jobs.run_tool(["true"], root=root, container=101),
            lambda: receive_tree(jobs, None, root, over(None), "all"),
            lambda: jobs.run_builtin(101, root, {"builtin": "setup"}),
        ):
            with pytest.raises(Busy):
                attempt()
        # Another one of the same container is nobody's yet, and looking is always allowed.
        assert jobs.run_tool(["true"], root=data, container=101) == 0
        assert jobs.run_tool(["ls", "/source/held"], views={"/source": root}) == 0
        os.close(write_fd)
        assert holding.wait() == 0
        os.close(read_fd)
        assert jobs.run_tool(["true"], root=root, container=101) == 0


def test_the_volume_of_what_runs_is_not_written_to(make_node: Callable[..., Node], tmp_path: Path) -> None:
    host = make_node("tiny")
    host.run("create", "one", "--template", "tiny")
    number = host.json("info", "one")["id"]
    host.run("start", "one")
    cgroup = detect.open_driver(host.layout).job_plan
    jobs = JobRunner(SupervisorClient(host.layout), f"{host.layout.run}/stage", JOB_IDMAP, b"", cgroup)
    root = plain(tmp_path)
    with pytest.raises(WrongState, match="it is running"):
        jobs.run_tool(["true"], root=root, container=number)
    host.run("stop", "one")
    read_fd, write_fd = os.pipe()
    argv = ["sh", "-c", "touch /volume/held; cat"]
    holding = Outcome(lambda: jobs.run_tool(argv, root=root, container=number, stdin_fd=read_fd))
    wait_until((tmp_path / "held").exists, what="the job")
    # And the other way round.
    assert "its files are being worked on" in host.run("start", "one", check=False).err
    os.close(write_fd)
    assert holding.wait() == 0
    os.close(read_fd)
    host.run("start", "one")


# Who speaks to a receiver may be anybody.


@contextlib.contextmanager
def outside(tmp_path: Path) -> Iterator[str]:
    """Give a directory that whoever gets out of its volume could write to."""
    path = tmp_path / "outside"
    path.mkdir()
    path.chmod(0o777)
    yield str(path)
    assert list(path.iterdir()) == []


def receive_from(pair: Pair, speak: Callable[[socket.socket], None]) -> object:
    """Let something else than a sender talk to the receiver, and return what came of that."""
    with connected() as (ours, theirs):
        speaking = Outcome(lambda: speak(ours))
        outcome = Outcome(
            lambda: receive_tree(pair.there, pair.their_task, pair.target, over(theirs), "all")
        ).wait(30)
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)
        speaking.wait(30)
    return outcome


@pytest.mark.parametrize("seed", range(6))
def test_garbage_is_an_error(pair: Pair, seed: int) -> None:
    noise = random.Random(seed)
    # Half of it behind a greeting that is right.
    begin = b"\x1f\0\0\0" if seed % 2 else b""

    def speak(connection: socket.socket) -> None:
        connection.sendall(begin + noise.randbytes(64 * 1024))
        connection.shutdown(socket.SHUT_WR)

    assert isinstance(receive_from(pair, speak), SysctrError)
    assert os.listdir(pair.target.trees[0].path) == []


def lying(argv: Sequence[str], replace: "dict[bytes, bytes]") -> Callable[[socket.socket], None]:
    """Return a real server that says other names, of the same length, than it means."""

    def speak(connection: socket.socket) -> None:
        with subprocess.Popen(argv, stdin=connection, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            with contextlib.suppress(OSError):
                while data := os.read(server.stdout.fileno(), 65536):
                    for one, other in replace.items():
                        assert len(one) == len(other)
                        data = data.replace(one, other)
                    connection.sendall(data)
            server.kill()
        connection.shutdown(socket.SHUT_WR)

    return speak


def test_a_receiver_hands_on_a_connection_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    before = len(os.listdir("/proc/self/fd"))
    for opened in ([path], [path, path], [path, path, path], ["/dev/zero", "/dev/zero"], []):
        ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with ours, theirs, contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(each, "rb")) for each in opened]
            wire.send(theirs, {}, [file.fileno() for file in files])
            with pytest.raises(SysctrError, match="something else"):
                tree_sync._pass_on(ours, over(theirs))
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_name_leads_out_of_the_volume(pair: Pair, tmp_path: Path) -> None:
    evil = tmp_path / "evil"
    for name in ("aaaaaa", "bbbbbb"):
        (evil / name).mkdir(parents=True)
    with outside(tmp_path) as place:
        directory = b"D" * len(os.fsencode(place))
        (evil / os.fsdecode(directory)).mkdir()
        (evil / os.fsdecode(directory) / "file").write_text("out")
        (evil / "bbbbbb/file").write_text("out")
        (evil / "UUUUUUUUfile").write_text("out")
        os.symlink(place, evil / "cccccc")
        argv = ["rsync", "--server", "--sender", "-lHogDtpAXrxSe.LsfxCIvu", "--numeric-ids", ".", f"{evil}/"]
        relative = [*argv[:-2], "--relative", ".", f"{evil}/aaaaaa"]
        for server, lies in (
            (argv, {directory: os.fsencode(place)}),
            (argv, {b"UUUUUUUU": b"../../.."[:8]}),
            (argv, {b"UUUUUUUUf": b"../tmp/uf"}),
            # A directory's name that is that of the symlink.
            (argv, {b"bbbbbb": b"cccccc"}),
            (relative, {}),
            ([*argv[:-1], "/proc/self/cmdline"], {}),
        ):
            outcome = receive_from(pair, lying(server, lies))
            # It is refused, or it comes down inside.
            assert isinstance(outcome, SysctrError) or os.listdir(pair.target.trees[0].path), lies
