"""sysctr as services of a real systemd: what starts them, and what their end does to containers (nothing)."""

import json
from collections.abc import Iterator

import pytest

from tests.vm.guest import Container
from tests.vm.machine import Machine
from tests.wait import wait_until

DAEMON, SUPERVISOR = "sysctrd.service", "sysctr-supervisor.service"
CONTAINERS = "sysctr-containers.service"
DEADLINE_S = 300


@pytest.fixture(scope="module")
def container(installed: Machine) -> Iterator[Container]:
    """A running container of the template tiny."""
    one = Container(installed, "lasting")
    one.start("--template", "tiny")
    yield one
    one.destroy()


def main_pid(vm: Machine, unit: str) -> int:
    """Return the main process of a unit, 0 when there is none at the moment."""
    return int(vm.output(["systemctl", "show", "--property=MainPID", "--value", unit]))


def keepers(vm: Machine) -> list[int]:
    """Return the keepers that have taken their place: one that waits for it has not this name yet."""
    return [int(pid) for pid in vm.run(["pgrep", "-x", "sysctr-keeper"]).stdout.split()]


def supervisor(container: Container) -> int:
    """Return the supervisor, which is the parent of a container that it started."""
    [pid] = container.vm.output(["pgrep", "-f", "runtime.supervisor import"]).split()
    return int(pid)


def assert_it_went_on(container: Container, init: int) -> None:
    """The container still runs its first init, takes programs, and all that systemd has of us is well."""
    shown = container.info()
    assert (shown["state"], shown["pid"]) == ("running", init)
    assert container.exec("echo $PPID; exit 3").status == 3
    for unit in (DAEMON, SUPERVISOR):
        assert container.vm.output(["systemctl", "is-active", unit]) == "active"
    assert keepers(container.vm) == [main_pid(container.vm, SUPERVISOR)]


def test_systemd_finds_nothing_wrong_with_the_units(installed: Machine) -> None:
    paths = [f"/etc/systemd/system/{unit}" for unit in (DAEMON, SUPERVISOR, CONTAINERS)]
    result = installed.run(["systemd-analyze", "verify", *paths])
    assert (result.status, result.stdout + result.stderr) == (0, "")
    for unit in (DAEMON, SUPERVISOR, CONTAINERS):
        assert installed.output(["systemctl", "is-enabled", unit]) == "enabled"


def test_the_doctor_finds_nothing_to_mend_but_what_the_image_lacks(installed: Machine) -> None:
    result = installed.run(["/usr/local/bin/sysctr", "doctor", "--json"])
    checks = json.loads(result.stdout)
    assert [check for check in checks if check["state"] == "fail"] == []
    assert {check["check"] for check in checks if check["state"] == "warn"} <= {"mmdebstrap"}
    assert result.status == 0


@pytest.mark.parametrize("unit", [DAEMON, SUPERVISOR])
def test_a_restart_of_a_unit_does_not_touch_a_container(container: Container, unit: str) -> None:
    init = container.info()["pid"]
    before = {name: main_pid(container.vm, name) for name in (DAEMON, SUPERVISOR)}
    container.vm.output(["systemctl", "restart", unit], timeout_s=DEADLINE_S)
    after = {name: main_pid(container.vm, name) for name in (DAEMON, SUPERVISOR)}
    assert [name for name in after if after[name] != before[name]] == [unit]
    assert_it_went_on(container, init)


@pytest.mark.parametrize("victims", ["keeper", "keeper and supervisor"])
def test_a_killed_supervisor_comes_back_in_its_own_unit(container: Container, victims: str) -> None:
    vm, init, daemon = container.vm, container.info()["pid"], main_pid(container.vm, DAEMON)
    keeper, worker = main_pid(vm, SUPERVISOR), supervisor(container)
    if victims == "keeper":
        vm.output(["kill", "-KILL", str(keeper)])
        # The supervisor lives on, and the place is taken until it ends.
        wait_until(lambda: main_pid(vm, SUPERVISOR) not in (0, keeper), DEADLINE_S, "the next keeper")
        assert container.exec("true").status == 0
        vm.output(["kill", "-KILL", str(worker)])
    else:
        vm.output(["kill", "-KILL", str(keeper), str(worker)])
    wait_until(lambda: keepers(vm) == [main_pid(vm, SUPERVISOR)], DEADLINE_S, "a keeper that is the unit's")
    assert main_pid(vm, DAEMON) == daemon
    assert_it_went_on(container, init)


def test_commands_start_the_daemon_through_systemd(container: Container) -> None:
    init = container.info()["pid"]
    container.sysctr("daemon", "stop")
    assert container.vm.run(["systemctl", "is-active", DAEMON]).stdout == "inactive\n"
    assert_it_went_on(container, init)


def test_nothing_has_failed(container: Container) -> None:
    assert container.vm.output(["systemctl", "--failed", "--quiet", "--plain"]) == ""
