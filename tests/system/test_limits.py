"""Limits: seen from inside, enforced by the kernel, changed while it runs, refused where they cannot be."""

import os

import pytest

from tests.node import Node
from tests.system.guests import create, inside, lines, new_name, refused, shell
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "overlay", "veth", "nft", "busybox")]
lxcfs = pytest.mark.needs("lxcfs")

_MIB = 1024 * 1024
# Fills a tmpfs, whose pages cannot be dropped: as much memory as is asked for, byte by byte accounted for.
_HOG = (
    "mkdir -p /root/hog && mount -t tmpfs -o size=1g none /root/hog && "
    "dd if=/dev/zero of=/root/hog/x bs=1M count={}"
)


def memory_inside(host: Node, name: str) -> int:
    """Return what the container believes to be all of its memory, in MiB."""
    total = next(line for line in lines(host, name, "cat /proc/meminfo") if line.startswith("MemTotal:"))
    return int(total.split()[1]) // 1024


def cores_inside(host: Node, name: str) -> int:
    return int(inside(host, name, "nproc"))


@lxcfs
def test_memory_and_cores_are_seen_inside(shared_host: Node) -> None:
    name = create(shared_host, "--memory", "200M", "--swap", "0", "--cores", "1")
    assert memory_inside(shared_host, name) == 200
    assert cores_inside(shared_host, name) == 1
    assert inside(shared_host, name, "grep -c ^processor /proc/cpuinfo") == "1"
    assert inside(shared_host, name, "cat /sys/devices/system/cpu/online") in ("0", "1")
    uptime_s = float(inside(shared_host, name, "cat /proc/uptime").split()[0])
    with open("/proc/uptime", encoding="ascii") as file:
        assert uptime_s < float(file.read().split()[0]) - 1
    assert shared_host.json("info", name)["memory_max_bytes"] == 200 * _MIB


@lxcfs
@pytest.mark.needs("mmdebstrap", "net")
def test_what_free_and_nproc_of_debian_say_are_the_limits(debian_host: Node) -> None:
    name = create(debian_host, "--memory", "300M", "--swap", "0", "--cores", "1", template="debian-12")
    debian_host.wait(name, "booted")
    assert inside(debian_host, name, "free -m").split("\n")[1].split()[1] == "300"
    assert inside(debian_host, name, "nproc") == "1"
    assert inside(debian_host, name, "uptime -p") in ("up 0 minutes", "up")
    debian_host.run("destroy", "--yes", "--force", name)


def test_more_memory_than_allowed_is_not_to_be_had(shared_host: Node) -> None:
    name = create(shared_host, "--memory", "64M", "--swap", "0")
    inside(shared_host, name, _HOG.format(20))
    assert inside(shared_host, name, "stat -c %s /root/hog/x") == str(20 * _MIB)
    done = shell(shared_host, name, "dd if=/dev/zero of=/root/hog/x bs=1M count=200", check=False)
    assert done.status == 137, "the one that wants too much is killed"
    assert int(inside(shared_host, name, "stat -c %s /root/hog/x")) < 64 * _MIB
    assert shared_host.state(name) == "running"
    assert shared_host.json("info", name)["memory_bytes"] <= 64 * _MIB


def test_more_processes_than_allowed_are_not_to_be_had(shared_host: Node) -> None:
    name = create(shared_host, "--set", "limits.pids=20")
    many = "for i in $(seq 40); do sleep 60 & done; echo started"
    done = shell(shared_host, name, many, check=False)
    assert "fork" in done.err, done
    assert shared_host.json("info", name)["pids"] <= 20
    other = create(shared_host)
    assert shell(shared_host, other, many).out == "started\n"


def test_the_share_of_the_processor_is_enforced(shared_host: Node) -> None:
    name = create(shared_host, "--cpu", "0.2")
    shell(shared_host, name, "(while :; do :; done) >/dev/null 2>&1 </dev/null &")
    start = shared_host.json("info", name)["usage"]

    def measured() -> dict | None:
        now = shared_host.json("info", name)["usage"]
        return now if now["time"] - start["time"] > 1.5 else None

    end = wait_until(measured, 10)
    used = (end["cpu_s"] - start["cpu_s"]) / (end["time"] - start["time"])
    assert 0.1 < used < 0.3
    shared_host.run("stop", "--kill", name)


@pytest.mark.skipif(os.cpu_count() < 2, reason="needs two processors")
def test_certain_cores_can_be_named(shared_host: Node) -> None:
    name = create(shared_host, "--cores", "1-1")
    assert "Cpus_allowed_list:\t1" in lines(shared_host, name, "cat /proc/self/status /proc/1/status")
    refused(
        shared_host, 5, "this host has", "create", new_name(), "--template", "tiny", "--cores", "900-901",
        "--start",
    )  # fmt: skip


@lxcfs
def test_limits_change_while_it_runs(shared_host: Node) -> None:
    name = create(shared_host, "--memory", "100M", "--swap", "0", "--cores", "1")
    pid = shared_host.json("info", name)["pid"]
    done = shared_host.run("set", name, "memory=150M", "pids=77", "cores=2", "cpu=1.5")
    assert sorted(done.out.split("\n")[:-1]) == [
        "applied: limits.cores", "applied: limits.cpu", "applied: limits.memory", "applied: limits.pids",
    ]  # fmt: skip
    # lxcfs keeps some answers for a moment.
    wait_until(lambda: memory_inside(shared_host, name) == 150, what="the memory is seen")
    wait_until(lambda: cores_inside(shared_host, name) == 2, what="the cores are seen")
    inside(shared_host, name, _HOG.format(120))
    shared_host.run("set", name, *[f"--unset=limits.{key}" for key in ("memory", "swap", "cores")])
    with open("/proc/meminfo", encoding="ascii") as file:
        all_of_it = int(file.readline().split()[1]) // 1024
    wait_until(lambda: memory_inside(shared_host, name) == all_of_it, what="the limit is gone")
    assert shared_host.json("info", name)["pid"] == pid
    assert shared_host.json("info", name)["pending"] == []


def test_a_limit_below_what_is_used_leaves_it_running(shared_host: Node) -> None:
    name = create(shared_host, "--memory", "200M", "--swap", "0")
    inside(shared_host, name, _HOG.format(100))
    shared_host.run("set", name, "memory=32M", check=False)
    assert shared_host.state(name) == "running"
    assert inside(shared_host, name, "echo here") == "here"


def test_a_limit_edited_by_hand_waits_and_the_next_set_applies_it(shared_host: Node) -> None:
    name = create(shared_host, "--set", "limits.pids=200")
    path = shared_host.json("info", name)["config_file"]
    with open(path, encoding="utf-8") as file:
        text = file.read()
    with open(path, "w", encoding="utf-8") as file:
        file.write(text.replace("pids = 200", "pids = 150"))
    assert shared_host.json("info", name)["pending"] == ["limits.pids"]
    done = shared_host.run("set", name, "description=x")
    assert sorted(done.out.split("\n")[:-1]) == ["applied: description", "applied: limits.pids"]
    assert shared_host.json("info", name)["pending"] == []
    with open(path, "a", encoding="utf-8") as file:
        file.write("nonsense[\n")
    assert inside(shared_host, name, "echo here") == "here", "a mistake in the file locks nobody out"
    refused(shared_host, 4, "cannot change", "set", name, "description=y")
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    shared_host.run("set", name, "memory=64M")
    assert shared_host.json("info", name)["pending"] == []


def test_limits_hold_again_after_a_restart(shared_host: Node) -> None:
    name = create(shared_host, "--memory", "64M", "--swap", "0")
    shared_host.run("set", name, "memory=96M")
    shared_host.run("reboot", name)
    assert shared_host.json("info", name)["memory_max_bytes"] == 96 * _MIB


def test_usage_is_counted(shared_host: Node) -> None:
    name = create(shared_host)
    before = shared_host.json("info", name)["usage"]
    inside(shared_host, name, "i=0; while [ $i -lt 200000 ]; do i=$((i + 1)); done")
    inside(shared_host, name, "ping -c 3 -i 0.1 $(ip route | grep default | cut -d ' ' -f 3)")
    after = shared_host.json("info", name)["usage"]
    assert after["cpu_s"] > before["cpu_s"] + 0.02
    assert after["net_sent_bytes"] >= before["net_sent_bytes"] + 3 * 84
    assert after["net_received_bytes"] >= before["net_received_bytes"] + 3 * 84
    assert after["pids"] >= 1
    shared_host.run("stop", name)
    assert shared_host.json("info", name)["memory_bytes"] is None
