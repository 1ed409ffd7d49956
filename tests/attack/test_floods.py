"""Floods (security.md S40): what one container pours out, others do not feel."""

import array
import os
import signal
import socket
import struct
import time
from pathlib import Path

import pytest

from sysctr.engine.supervisor import SupervisorClient
from tests.attack.inside import Inside, init_pid
from tests.node import Node
from tests.system.guests import create, shell
from tests.system.guests import inside as output
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox")]

NOTIFY = "/run/host/notify"


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def undisturbed(host: Node, victim: str) -> None:
    """Assert that others are served at once, and that the flood costs the supervisor little."""
    supervisor = host.pids()["supervisor"]
    began, before = time.monotonic(), cpu_s(supervisor)
    for _ in range(5):
        one = time.monotonic()
        assert host.run("list").status == 0
        assert output(host, victim, "echo on") == "on"
        assert time.monotonic() - one < 2
    elapsed_s = time.monotonic() - began
    assert cpu_s(supervisor) - before < 0.6 * elapsed_s + 0.2
    assert host.pids()["supervisor"] == supervisor


def test_a_flood_on_the_console(shared_host: Node, victim: str) -> None:
    host = shared_host
    ref = create(host)

    def attack() -> None:
        fd = os.open("/dev/console", os.O_WRONLY | os.O_NOCTTY)
        data = b"flood " * 10000
        while True:
            os.write(fd, data)

    with Inside(init_pid(host, ref), attack):
        wait_until(lambda: b"flood" in host.run("logs", ref).stdout, what="the flood")
        undisturbed(host, victim)
        assert len(host.run("logs", ref).stdout) <= 256 * 1024
    host.run("destroy", ref, "--force", "--yes")


def test_a_flood_on_the_notify_socket(shared_host: Node, victim: str) -> None:
    host = shared_host
    ref = create(host)
    assert host.json("info", ref)["booted"] in (None, True, False)

    def attack() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(NOTIFY)
            while True:
                sock.send(b"READY=1\n" + b"X=1\n" * 100)

    with Inside(init_pid(host, ref), attack):
        undisturbed(host, victim)
        # Only init may say it.
        assert not SupervisorClient(host.layout).list()[host.json("info", ref)["id"]].ready
    host.run("destroy", ref, "--force", "--yes")


def lingering() -> socket.socket:
    """Return a socket whose closing waits for a peer that does not read."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    sock = socket.socket()
    sock.connect(listener.getsockname())
    kept.append((listener, listener.accept()))
    sock.setblocking(False)
    try:
        while True:
            sock.send(bytes(65536))
    except BlockingIOError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
    return sock


kept: list = []


def send_lingering() -> None:
    sock = lingering()
    fds = array.array("i", [sock.fileno()])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(NOTIFY)
        for _ in range(3):
            notify.sendmsg([b"X=1"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    sock.close()  # not the last copy: who closes that waits for an hour
    Path("/run/sent").write_text("yes")
    signal.pause()


def test_descriptors_on_the_notify_socket_stop_nobody(shared_host: Node, victim: str) -> None:
    host = shared_host
    ref = create(host)
    init, supervisor = init_pid(host, ref), host.pids()["supervisor"]
    # Held still, so that the last copies are those in the socket.
    os.kill(supervisor, signal.SIGSTOP)
    try:
        attack = Inside(init, send_lingering)
        wait_until(lambda: os.path.exists(f"/proc/{init}/root/run/sent"), what="the descriptors were sent")
    finally:
        os.kill(supervisor, signal.SIGCONT)
    with attack:
        undisturbed(host, victim)
    keeper = host.pids()["keeper"]
    host.run("stop", ref, "--kill", timeout_s=20)
    host.run("start", ref, timeout_s=20)
    assert host.pids()["keeper"] == keeper
    host.run("destroy", ref, "--force", "--yes")
    inits = {str(init_pid(host, victim))}

    def children() -> set[str]:
        return set(Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()) - inits

    # What waited in our place is gone when its container is.
    wait_until(lambda: not children(), what="no helper left")


def test_ptys_are_bounded_and_each_containers_own(shared_host: Node, victim: str) -> None:
    host = shared_host
    ref = create(host)

    def attack() -> int:
        count = 0
        try:
            while count < 5000:
                os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
                count += 1
        except OSError:
            pass
        return count

    with Inside(init_pid(host, ref), attack) as running:
        assert running.result() <= 1024
    shell(host, victim, "true")
    with os.fdopen(os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY), "wb"):
        pass  # the host's own are untouched
    host.run("destroy", ref, "--force", "--yes")


def test_a_fork_bomb_stays_inside(shared_host: Node, victim: str) -> None:
    host = shared_host
    ref = create(host)
    limit = host.json("info", ref)["limits"]["pids"]
    assert limit, "a container has a limit of processes by default"
    host.run("set", ref, "limits.pids=200")
    shell(host, ref, "for i in $(seq 300); do sleep 1000 & done", check=False)
    assert host.json("info", ref)["pids"] <= 200
    assert output(host, victim, "echo on") == "on"
    host.run("stop", ref, "--kill")
    host.run("destroy", ref, "--yes")
