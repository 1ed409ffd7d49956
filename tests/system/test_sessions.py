"""Programs that enter containers: what they leave behind, what stands in their way, and what they outlive."""

import fcntl
import os
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sysctr.engine.removal import cgroup_directories
from sysctr.engine.supervisor import SupervisorClient
from sysctr.runtime import wire
from tests.attack.inside import Inside, init_pid
from tests.node import Node
from tests.system.guests import Terminal, create, freeze_the_door, shell
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox")]


_V1_MEMORY = "memory.limit_in_bytes"


@pytest.fixture
def busy(shared_host: Node) -> Iterator[str]:
    """A running container of the shared host, destroyed afterwards."""
    ref = create(shared_host)
    yield ref
    shared_host.run("destroy", ref, "--force", "--yes")


def task_done(host: Node, answer: "tuple[int, dict]") -> None:
    status, body = answer
    assert status == 202, body
    _, task = host.api("GET", f"/1/tasks/{body['task']['id']}/wait?timeout=60")
    assert task["task"]["state"] == "done", task


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def zombies(host: Node) -> list[str]:
    """Return the dead children of the host's services that nobody has reaped."""
    parents = {str(pid) for pid in host.pids().values()}
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] == "Z" and fields[1] in parents:
            found.append(entry)
    return found


def test_no_descriptor_and_no_zombie_is_left_by_starts_and_execs(shared_host: Node, busy: str) -> None:
    host = shared_host
    restarted = create(host, start=False)
    supervisor = SupervisorClient(host.layout)
    pids = host.pids()

    def work(times: int) -> None:
        for _ in range(times):
            task_done(host, host.api("POST", f"/1/containers/{restarted}/start", {}))
            task_done(host, host.api("POST", f"/1/containers/{restarted}/stop", {"kill": True}))
            for argv in (["true"], ["no-such-program"]):
                _, ticket = host.api("POST", f"/1/containers/{busy}/exec", {"argv": argv})
                with wire.connect(ticket["socket"], 10) as connection:
                    wire.send(connection, {"ticket": ticket["ticket"]})
                    while True:
                        answer, fds = wire.receive(connection)
                        wire.close_all(fds)
                        if "exit" in answer:
                            break
            with pytest.raises(Exception, match="unknown"):
                supervisor.use_ticket("0" * 32)

    def quiet() -> bool:
        return supervisor.hello()["sessions"] == 0 and not zombies(host)

    work(2)
    wait_until(quiet, what="no session, no zombie")
    before = {name: descriptors(pids[name]) for name in ("supervisor", "keeper")}
    work(50)
    wait_until(quiet, what="no session, no zombie")
    # The keeper's are closed a message later. No more than before: the connection that asked for the number
    # of sessions may have been counted then.
    wait_until(
        lambda: all(descriptors(pids[name]) <= count for name, count in before.items()),
        what="the descriptors of before",
    )
    assert host.pids() == pids


def test_a_failed_exec_leaks_nothing(shared_host: Node, busy: str) -> None:
    """The container's root can make every exec fail: by a cgroup that takes no process."""
    host = shared_host
    shell(host, busy, "true")

    def spoil() -> str:
        # A threaded cgroup beside it makes ours a "domain invalid".
        os.mkdir("/sys/fs/cgroup/spoilt")
        Path("/sys/fs/cgroup/spoilt/cgroup.type").write_text("threaded")
        return Path("/sys/fs/cgroup/.sysctr/cgroup.type").read_text()

    supervisor = host.pids()["supervisor"]
    with Inside(init_pid(host, busy), spoil) as attack:
        assert attack.result() == "domain invalid\n"
        wait_until(lambda: SupervisorClient(host.layout).hello()["sessions"] == 0, what="no session")
        before = descriptors(supervisor)
        for _ in range(5):
            failed = host.run("exec", busy, "--", "true", check=False)
            assert failed.status == 1, failed
            assert "cannot" in failed.err, failed
    # No more than before: the connection that asked for the number of sessions may have been counted then.
    wait_until(lambda: descriptors(supervisor) <= before, what="the descriptors of before")
    assert host.pids()["supervisor"] == supervisor


def test_a_frozen_door_stops_nobody_else(shared_host: Node, busy: str) -> None:
    """The container's root freezes the cgroup that programs enter through."""
    host = shared_host
    other = create(host)
    shell(host, busy, "true")

    with Inside(init_pid(host, busy), freeze_the_door) as attack:
        assert attack.result()
    stuck = [
        host.popen("exec", busy, "--", "true", stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(3)
    ]  # fmt: skip
    began = time.monotonic()
    for _ in range(5):
        assert shell(host, other, "echo on").out == "on\n"
    assert time.monotonic() - began < 5
    host.run("stop", busy, "--kill")
    for client in stuck:
        assert b"killed before its program ran" in client.stderr.read()
        assert client.wait(10) == 1
    host.run("start", busy)
    host.run("destroy", other, "--force", "--yes")


def test_upgrade_of_the_supervisor_keeps_sessions(shared_host: Node, busy: str) -> None:
    host = shared_host
    stopped = create(host, start=False)
    pids = host.pids()
    plain = host.popen(
        "exec", busy, "--", "/bin/sh", "-c", "cat; exit 7", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    plain.stdin.write(b"before\n")
    plain.stdin.flush()
    assert plain.stdout.readline() == b"before\n"
    _, unused = host.api("POST", f"/1/containers/{busy}/exec", {"argv": ["true"]})
    _, ticket = host.api("POST", f"/1/containers/{stopped}/files", {"op": "push", "path": "/root/"})
    with (
        Terminal(host, "exec", "--tty", busy, "--", "/bin/sh") as typed,
        wire.connect(ticket["socket"], 10) as push,
    ):
        wire.send(push, {"ticket": ticket["ticket"]})
        _, fds = wire.receive(push)
        typed.expect("# ")
        status, answer = host.api("POST", "/1/supervisor/upgrade")
        assert status == 200, answer
        assert host.pids() == pids
        # The work on the stopped container's files goes on, and is known of.
        status, refusal = host.api("POST", f"/1/containers/{stopped}/start", {})
        assert (status, refusal["error"]["code"]) == (409, "busy")
        assert "(push) is running" in refusal["error"]["message"]
        os.write(fds[0], bytes(10240))  # an archive of nothing
        wire.close_all(fds)
        answer = wire.receive_plain(push)
        assert answer["exit"] == 0, answer
        fcntl.ioctl(typed.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
        typed.process.send_signal(signal.SIGWINCH)
        typed.type("until [ \"$(stty size)\" = '33 99' ]; do :; done; echo re''sized; exit 3\r")
        typed.expect("resized")
        assert typed.end() == 3
    plain.stdin.write(b"after\n")
    plain.stdin.close()
    assert plain.stdout.read() == b"after\n"
    assert plain.wait(10) == 7
    with wire.connect(unused["socket"], 10) as connection:
        wire.send(connection, {"ticket": unused["ticket"]})
        assert wire.receive_plain(connection).get("ok")
        assert wire.receive_plain(connection)["exit"] == 0
    host.run("start", stopped)
    wait_until(lambda: not zombies(host), what="no zombie")
    host.run("destroy", stopped, "--force", "--yes")


def test_work_on_a_stopped_containers_files_is_bounded(shared_host: Node) -> None:
    """A tar stream is unpacked in a cgroup of its own, which goes with the job."""
    host = shared_host
    stopped = create(host, start=False)

    def jobs() -> list[str]:
        found = [f"{path}/jobs" for path in cgroup_directories(host.layout)]
        return [f"{path}/{name}" for path in found if os.path.isdir(path) for name in next(os.walk(path))[1]]

    assert not jobs()
    _, ticket = host.api("POST", f"/1/containers/{stopped}/files", {"op": "push", "path": "/root/"})
    with wire.connect(ticket["socket"], 10) as push:
        wire.send(push, {"ticket": ticket["ticket"]})
        _, fds = wire.receive(push)
        files = [f"{path}/{name}" for path in jobs() for name in ("pids.max", "memory.max", _V1_MEMORY)]
        bounds = [Path(file).read_text() for file in files if os.path.exists(file)]
        assert len(bounds) == 2, jobs()
        assert "max\n" not in bounds
        assert all(Path(f"{path}/cgroup.procs").read_text() for path in jobs())
        wire.close_all(fds)
        assert "exit" in wire.receive_plain(push)
    wait_until(lambda: not jobs(), what="no cgroup of a job")
    host.run("destroy", stopped, "--yes")
