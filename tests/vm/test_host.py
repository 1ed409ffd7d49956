"""What only a real host has, proven in QEMU: Debian's kernel, systemd as init, pure cgroup v2, AppArmor."""

import os
import tempfile

import pytest

from tests.vm.image import SCRATCH, Image
from tests.vm.machine import Machine, MachineError, TimedOut, scratch

PROFILE = """\
profile sysctr-probe /run/probe/busybox {
  / r,
  /** mrix,
  deny /run/probe/secret r,
}
"""


def test_kernel_is_the_one_that_debian_ships(vm: Machine, vm_image: Image) -> None:
    release = vm.output(["uname", "-r"])
    assert release == vm_image.release
    assert tuple(map(int, release.split(".")[:2])) >= (6, 1), "older than the kernels sysctr supports"


def test_systemd_is_running_and_no_unit_failed(vm: Machine) -> None:
    assert vm.output(["cat", "/proc/1/comm"]) == "systemd"
    state = vm.run(["systemctl", "is-system-running", "--wait"], timeout_s=300).stdout.strip()
    assert state == "running", vm.output(["systemctl", "--failed", "--no-pager"])


def test_cgroups_are_v2_alone_with_every_controller(vm: Machine) -> None:
    controllers = vm.output(["cat", "/sys/fs/cgroup/cgroup.controllers"]).split()
    assert {"cpu", "cpuset", "io", "memory", "pids"} <= set(controllers)
    types = {line.split()[2] for line in vm.output(["cat", "/proc/mounts"]).splitlines()}
    assert "cgroup2" in types
    assert "cgroup" not in types


def test_apparmor_enforces_a_profile(vm: Machine) -> None:
    assert vm.output(["cat", "/sys/module/apparmor/parameters/enabled"]) == "Y"
    vm.put("/run/probe/secret", b"told\n")
    vm.put("/run/probe/profile", PROFILE.encode())
    vm.output(["cp", "/usr/bin/busybox", "/run/probe/busybox"])
    read = ["/run/probe/busybox", "cat", "/run/probe/secret"]
    assert vm.output(read) == "told"
    vm.output(["apparmor_parser", "--replace", "--skip-cache", "/run/probe/profile"])
    try:
        refused = vm.run(read)
    finally:
        vm.output(["apparmor_parser", "--remove", "/run/probe/profile"])
    assert refused.status != 0
    assert "Permission denied" in refused.stderr
    assert vm.output(read) == "told"


def test_lxcfs_is_mounted(vm: Machine) -> None:
    assert vm.output(["findmnt", "--noheadings", "--output", "FSTYPE", "/var/lib/lxcfs"]) == "fuse.lxcfs"


def test_a_program_brings_back_status_and_both_outputs(vm: Machine) -> None:
    result = vm.run(["sh", "-c", "cat; echo bad >&2; exit 7"], stdin=b"good\0")
    assert (result.status, result.stdout, result.stderr) == (7, "good\0", "bad\n")
    with pytest.raises(MachineError, match="no-such-program"):
        vm.run(["/no-such-program"])


def test_a_program_that_leaves_a_daemon_is_not_waited_for(vm: Machine) -> None:
    pid = vm.output(["sh", "-c", "setsid sleep 1000 & echo $!"], timeout_s=30)
    vm.output(["kill", pid])


def test_a_program_is_ended_at_its_deadline(vm: Machine) -> None:
    with pytest.raises(TimedOut, match="begun"):
        vm.run(["sh", "-c", "echo begun; exec sleep 1000"], timeout_s=2)
    assert vm.run(["pgrep", "-fx", "sleep 1000"]).status == 1, "it still runs"


def test_what_a_killed_run_left_goes_with_the_next_start() -> None:
    left = tempfile.mkdtemp(prefix="sysctr-vm.", dir=SCRATCH)
    with scratch() as one, scratch() as other:
        assert os.path.isdir(one), "somebody uses it"
        assert os.path.isdir(other)
        assert not os.path.exists(left)
    assert not os.path.exists(one)
