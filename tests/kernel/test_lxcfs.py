"""lxcfs as sysctr runs it: real limits seen through it, and an lxcfs that dies, hangs or is not there."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sysctr.cgroup import Limits, open_driver
from sysctr.engine import lxcfs
from sysctr.engine.lxcfs import Lxcfs
from sysctr.errors import SysctrError
from sysctr.paths import Layout
from tests import leaks
from tests.wait import wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.kernel,
    pytest.mark.skipif(not shutil.which("lxcfs", path=lxcfs.PROGRAM_PATH), reason="no lxcfs (package lxcfs)"),
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="no /dev/fuse"),
]

MIB = 1 << 20


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    leaks.register(str(tmp_path))
    return Layout(str(tmp_path))


@pytest.fixture
def own(layout: Layout) -> Iterator[Lxcfs]:
    """An installation on a host without the service."""
    own = Lxcfs(layout, service_mount="/nonexistent")
    yield own
    own.stop()


def server_pid(own: Lxcfs) -> int:
    return int(Path(own.pid_file).read_text())


def forget(own: Lxcfs) -> None:
    """Let the time pass for which an answer counts."""
    own._looked_at = float("-inf")


def read_inside(layout: Layout, limits: Limits, paths: list[str]) -> list[str]:
    """Return what the init of a container with these limits reads in each file."""
    driver = open_driver(layout)
    placement = driver.create(101, limits, 1_000_000)
    # The shell waits until it is in its place and only then makes the pid namespace: its child is its init.
    script = 'read go; exec unshare --pid --fork sh -c \'for f; do cat "$f"; echo ----; done\' sh "$@"'
    shell = subprocess.Popen(
        ["/bin/sh", "-c", script, "sh", *paths], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        driver.place(placement, shell.pid)
        text, _ = shell.communicate("go\n", timeout=20)
    finally:
        driver.destroy(101)
        driver.destroy_root()
        shell.wait()
    return text.split("----\n")[:-1]


def test_a_container_sees_its_own_limits(layout: Layout, own: Lxcfs) -> None:
    sources = {target: source for source, target in own.ensure()}
    assert {"/proc/meminfo", "/proc/cpuinfo", "/proc/stat", "/proc/uptime", "/proc/swaps"} <= sources.keys()
    limits = Limits(memory_bytes=96 * MIB, swap_bytes=0, cores="1")
    names = ["/proc/meminfo", "/proc/cpuinfo", "/proc/stat", "/proc/uptime"]
    meminfo, cpuinfo, stat, uptime = read_inside(layout, limits, [sources[name] for name in names])
    values = {line.split()[0]: line.split()[1] for line in meminfo.splitlines()}
    assert values["MemTotal:"] == str(96 * 1024)
    assert values["SwapTotal:"] == "0"
    assert cpuinfo.count("processor") == 1
    assert sum(line.startswith("cpu") and line[3:4].isdigit() for line in stat.splitlines()) == 1
    assert float(uptime.split()[0]) < 60
    # The control: a process of the host reads the host's figures in the same file.
    assert str(96 * 1024) not in Path(sources["/proc/meminfo"]).read_text().splitlines()[0]


def test_the_next_daemon_finds_the_process_of_the_last(layout: Layout, own: Lxcfs) -> None:
    binds = own.ensure()
    pid = server_pid(own)
    if _has_capability(24):  # CAP_SYS_RESOURCE: without it nobody may lower the score
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "-1000\n"
    again = Lxcfs(layout, service_mount="/nonexistent")
    assert again.ensure() == binds
    assert server_pid(again) == pid
    # What another daemon started can be ended, too.
    again.stop()
    wait_until(lambda: not _runs(pid), what="lxcfs ended")
    assert own.mount not in lxcfs._mounted()
    assert not os.path.exists(own.mount)
    assert not os.path.exists(own.pid_file)


def test_a_service_of_the_host_is_used_and_left_alone(tmp_path: Path, layout: Layout, own: Lxcfs) -> None:
    own.ensure()
    other = Lxcfs(Layout(str(tmp_path / "other")), service_mount=own.mount)
    assert other.ensure() == own.ensure()
    assert not os.path.exists(other.pid_file)
    other.stop()
    assert own.mount in lxcfs._mounted()
    assert Path(own.ensure()[0][0]).read_text()


def test_a_dead_lxcfs_is_replaced(own: Lxcfs) -> None:
    own.ensure()
    pid = server_pid(own)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not _runs(pid), what="lxcfs ended")
    # The mount stays behind, and every touch of it is an error.
    assert own.mount in lxcfs._mounted()
    forget(own)
    binds = own.ensure()
    assert server_pid(own) != pid
    assert Path(binds[0][0]).read_text()


def test_an_lxcfs_that_hangs_does_not_hold_up_the_daemon(own: Lxcfs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lxcfs, "_ANSWER_S", 0.2)
    own.ensure()
    pid = server_pid(own)
    _halt(pid)
    forget(own)
    start = time.monotonic()
    binds = own.ensure()
    assert time.monotonic() - start < 5
    assert server_pid(own) != pid
    assert not _runs(pid)
    assert Path(binds[0][0]).read_text()


def _halt(pid: int) -> None:
    """Stop a process and wait until each of its threads has: one may be in the middle of an answer."""
    os.kill(pid, signal.SIGSTOP)

    def stopped() -> bool:
        states = []
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/stat", encoding="ascii", errors="replace") as stat:
                states.append(stat.read().rpartition(")")[2].split()[0])
        return all(state == "T" for state in states)

    wait_until(stopped, what=f"{pid} stopped")


def test_a_hanging_service_is_passed_over(
    tmp_path: Path, own: Lxcfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lxcfs, "_ANSWER_S", 0.2)
    own.ensure()
    service_pid = server_pid(own)
    other = Lxcfs(Layout(str(tmp_path / "other")), service_mount=own.mount)
    _halt(service_pid)
    try:
        binds = other.ensure()
        assert all(source.startswith(other.mount) for source, _ in binds)
        assert _runs(service_pid)
    finally:
        os.kill(service_pid, signal.SIGCONT)
        other.stop()
    forget(own)
    assert own.ensure()[0][0].startswith(own.mount)
    assert server_pid(own) == service_pid


def test_a_pid_file_that_lies_kills_nobody(own: Lxcfs) -> None:
    os.makedirs(os.path.dirname(own.pid_file))
    with subprocess.Popen(["/bin/sleep", "1000"]) as bystander:
        Path(own.pid_file).write_text(f"{bystander.pid}\n")
        own.stop()
        assert bystander.poll() is None
        assert not os.path.exists(own.pid_file)
        bystander.kill()


def test_without_lxcfs_the_error_says_so_and_is_cheap(own: Lxcfs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lxcfs, "PROGRAM_PATH", "/nonexistent")
    with pytest.raises(SysctrError, match="not installed"):
        own.ensure()
    monkeypatch.undo()
    with pytest.raises(SysctrError, match="not installed"):
        own.ensure()
    forget(own)
    assert own.ensure()


def test_an_lxcfs_that_fails_says_why(own: Lxcfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "bin" / "lxcfs"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(lxcfs, "PROGRAM_PATH", f"{broken.parent}:/usr/bin:/bin")
    with pytest.raises(SysctrError, match="ended with 3: no such luck"):
        own.ensure()


def test_the_answer_is_kept_for_a_while(own: Lxcfs, monkeypatch: pytest.MonkeyPatch) -> None:
    first = own.ensure()
    monkeypatch.setattr(own, "_find", lambda: pytest.fail("looked again"))
    assert own.ensure() == first


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _has_capability(number: int) -> bool:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "CapEff" in line)
    return bool(int(line.split()[1], 16) >> number & 1)
