"""The main path on a real host: create, start, exec, limits enforced and seen, stop, destroy."""

import json
import re
from collections.abc import Iterator

import pytest

from tests.vm.guest import Container
from tests.vm.machine import Machine

MEMORY_MB = 256
CPU = 0.5
PIDS = 96
# So that the processes which fill a container can be named, and ended, from outside.
SLEEP = "sleep 86397"


@pytest.fixture(scope="module")
def container(installed: Machine, template: str) -> Iterator[Container]:
    """A running container, created with all limits; destroyed, and proven gone, after."""
    one = Container(installed, f"{template}-vm")
    limits = ["--cores", "1", "--cpu", f"{CPU}", "--memory", f"{MEMORY_MB}M", "--pids", f"{PIDS}"]
    one.start("--template", template, *limits)
    yield one
    one.destroy()


def test_it_runs_and_answers_from_its_own_namespaces(container: Container) -> None:
    shown = {one["name"]: one for one in json.loads(container.sysctr("list", "--json"))}
    assert shown[container.name]["state"] == "running"
    result = container.exec("id -u; hostname; cat; exit 7")
    assert (result.status, result.stdout.split()) == (7, ["0", container.name])
    outside = container.vm.output(["readlink", f"/proc/{container.info()['pid']}/ns/user"])
    assert outside != container.vm.output(["readlink", "/proc/self/ns/user"])


def test_systemd_inside_runs_without_a_failed_unit(container: Container) -> None:
    if "debian" not in container.name:
        # Not a missing fact but another init: the state of the init is what `wait` has seen.
        assert container.info()["booted"] is not False
        return
    assert container.exec("systemctl is-system-running --wait").stdout.strip() == "running"
    assert container.exec("systemctl --failed --quiet --plain").stdout == ""


def test_host_and_container_reach_each_other(container: Container) -> None:
    address = container.info()["addresses"][0]
    container.vm.output(["ping", "-c", "1", "-W", "20", address])
    gateway = container.exec("ip route show default").stdout.split()[2]
    assert container.exec(f"ping -c 1 -W 20 {gateway}").status == 0


def test_the_limits_are_those_of_the_kernel(container: Container) -> None:
    assert container.cgroup("memory.max") == str(MEMORY_MB << 20)
    quota, period = container.cgroup("cpu.max").split()
    assert int(quota) / int(period) == CPU
    assert container.cgroup("pids.max") == str(PIDS)
    assert re.fullmatch(r"\d+", container.cgroup("cpuset.cpus")), "one core"


def test_the_limits_are_seen_inside(container: Container) -> None:
    inside = container.exec("grep MemTotal /proc/meminfo; grep -c ^processor /proc/cpuinfo; nproc")
    assert inside.stdout.split() == ["MemTotal:", str(MEMORY_MB << 10), "kB", "1", "1"]


def test_too_much_memory_kills_the_program_and_not_the_container(container: Container) -> None:
    before = oom_kills(container)
    # A line without an end, which tail must keep in memory.
    assert container.exec("tail -n 1 /dev/zero; echo ended $?").stdout.split() == ["ended", "137"]
    assert oom_kills(container) > before
    assert container.sysctr("status", container.name) == "running"
    assert int(container.cgroup("memory.peak")) <= MEMORY_MB << 20


def oom_kills(container: Container) -> int:
    return int(re.search(r"^oom_kill (\d+)$", container.cgroup("memory.events"), re.MULTILINE)[1])


def test_cpu_time_is_held_back(container: Container) -> None:
    def seen() -> tuple[float, float, int]:
        stat = dict(line.split() for line in container.cgroup("cpu.stat").splitlines())
        now_s = float(container.vm.output(["cat", "/proc/uptime"]).split()[0])
        return now_s, int(stat["usage_usec"]) / 1e6, int(stat["nr_throttled"])

    start_s, used_before_s, throttled_before = seen()
    busy = "i=0; while [ $i -lt 2 ]; do timeout 5 sh -c 'while :; do :; done' & i=$((i+1)); done; wait"
    container.exec(busy)
    end_s, used_s, throttled = seen()
    share = (used_s - used_before_s) / (end_s - start_s)
    assert share <= CPU * 1.1, f"{share:.2f} of a core"
    assert used_s - used_before_s > 1, "it did work"
    assert throttled > throttled_before


def test_more_processes_than_allowed_are_refused(container: Container) -> None:
    try:
        filled = container.exec(f"i=0; while [ $i -lt {2 * PIDS} ]; do {SLEEP} & i=$((i+1)); done")
        assert re.search("fork", filled.stderr, re.IGNORECASE), filled.stderr
        assert int(container.cgroup("pids.current")) <= PIDS
        assert int(container.cgroup("pids.current")) > PIDS // 2
    finally:
        container.vm.run(["pkill", "-KILL", "-fx", SLEEP])
    assert container.exec("true").status == 0, "usable again"


def test_limits_change_while_it_runs(container: Container) -> None:
    container.sysctr("set", container.name, "limits.memory=320M")
    assert container.cgroup("memory.max") == str(320 << 20)
    assert container.exec("grep MemTotal /proc/meminfo").stdout.split()[1] == str(320 << 10)
    assert container.info()["pending"] == []
    container.sysctr("set", container.name, f"limits.memory={MEMORY_MB}M")
