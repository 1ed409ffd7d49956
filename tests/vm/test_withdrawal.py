"""A reboot, an uninstall, an uninstall with --purge. Sorts last, as it takes sysctr off the shared host."""

import json

from tests.vm.conftest import install, picture
from tests.vm.guest import SYSCTR, Container
from tests.vm.machine import Machine

UNINSTALL = "/root/install/packaging/uninstall"
POOL = "/var/lib/sysctr/storage/default"
DEADLINE_S = 300


def states(vm: Machine) -> dict[str, str]:
    """Return the state of each container."""
    return {one["name"]: one["state"] for one in json.loads(vm.output([SYSCTR, "list", "--json"]))}


def test_a_reboot_brings_services_limits_and_containers_back(installed: Machine) -> None:
    lasting, resting = Container(installed, "lasting"), Container(installed, "resting")
    lasting.start("--template", "tiny", "--onboot")
    resting.sysctr("create", resting.name, "--template", "tiny")
    lasting.exec("echo kept >/root/note; sync")
    limits = installed.output(["cat", "/etc/sysctl.d/90-sysctr.conf"])
    before = installed.output(["cat", "/proc/sys/kernel/random/boot_id"])
    installed.reboot()
    assert installed.output(["cat", "/proc/sys/kernel/random/boot_id"]) != before
    assert installed.run(["systemctl", "is-system-running", "--wait"]).stdout == "running\n"
    lasting.sysctr("wait", lasting.name, "--state", "booted", "--timeout", f"{DEADLINE_S - 20}")
    assert states(installed) == {lasting.name: "running", resting.name: "stopped"}
    assert lasting.exec("cat /root/note").stdout == "kept\n"
    for line in limits.splitlines():
        key, value = line.split(" = ")
        assert installed.output(["sysctl", "-n", key]) == value


def test_uninstall_refuses_while_containers_run(installed: Machine) -> None:
    refused = installed.run([UNINSTALL], timeout_s=DEADLINE_S)
    assert refused.status == 1
    assert "containers are running" in refused.stderr
    assert states(installed)["lasting"] == "running"


def test_uninstall_keeps_the_containers_and_nothing_else(installed: Machine, untouched: set[str]) -> None:
    done = installed.run([UNINSTALL, "--force"], timeout_s=DEADLINE_S)
    assert done.status == 0, done.stdout + done.stderr
    kept = ("/var/lib/sysctr", "/etc/sysctr", "/var/log/sysctr", "entry sysctr:")
    left = {line for line in picture(installed) - untouched if not line.startswith(kept)}
    assert left == {f"/dev/vdc {POOL} ext4 rw,noatime,noinit_itable 0 0"}
    install(installed)
    Container(installed, "lasting").sysctr("wait", "lasting", "--state", "booted", "--timeout", "280")
    assert states(installed) == {"lasting": "running", "resting": "stopped"}
    assert Container(installed, "lasting").exec("cat /root/note").stdout == "kept\n"


def test_uninstall_purge_leaves_nothing(installed: Machine, untouched: set[str]) -> None:
    # What is mounted below its directories is not its to empty: somebody may use that disk elsewhere.
    refused = installed.run([UNINSTALL, "--purge"], timeout_s=DEADLINE_S)
    assert refused.status == 1
    assert "not removed: what is mounted" in refused.stderr
    installed.output(["umount", POOL])
    done = installed.run([UNINSTALL, "--purge"], timeout_s=DEADLINE_S)
    assert done.status == 0, done.stdout + done.stderr
    now = picture(installed)
    assert (now - untouched, untouched - now) == (set(), set())
