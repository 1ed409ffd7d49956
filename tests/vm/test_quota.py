"""Project quotas, which need a kernel that has them: the kernel tests of them, and containers under them."""

import re
from collections.abc import Iterator

import pytest

from tests.projects import LEAVE, refused
from tests.vm.guest import SYSCTR, Container
from tests.vm.image import PAYLOAD
from tests.vm.machine import Machine

_MIB = 1 << 20
# The guest certainly has these: a test that is skipped for want of one is a failure.
GUEST_FACTS = "root userns idmap overlay loop ext4 xfs prjquota"
# Each on the file system where it could sooner fail, as all of them take minutes; what the containers below
# show is not among them. Where the host's kernel has quotas, all are run, with the contract and the crashes.
PROJECTS = "tests/kernel/test_projects.py"
CHOSEN = (
    f"{PROJECTS}::test_limits_are_set_and_told",
    f"{PROJECTS}::test_a_number_that_anybody_uses_is_not_taken",
    f"{PROJECTS}::test_a_limit_changes_while_it_is_used_but_not_below_what_is_used[quota-ext4]",
    f"{PROJECTS}::test_a_volume_with_content_gets_a_limit_at_once[quota-ext4]",
    f"{PROJECTS}::test_layers_of_several_projects_are_merged[quota-ext4]",
    f"{PROJECTS}::test_states_kept_while_stopped_count_and_copies_of_what_runs_do_not[quota-xfs]",
    f"{PROJECTS}::test_a_destroyed_volume_leaves_no_limit_though_others_stand_on_what_it_wrote[quota-xfs]",
    f"{PROJECTS}::test_what_is_full_is_kept_brought_back_and_started_again_but_not_for_ever[quota-xfs]",
)
MAKE = {"ext4": "mke2fs -q -t ext4 -O quota,project", "xfs": "mkfs.xfs -q"}
LIMITS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from sysctr.linux import quota
pool_fd, number = os.open(sys.argv[2], os.O_RDONLY), 1
while known := quota.next_quota(pool_fd, number):
    number = known.project + 1
    if known.limit_bytes:
        print(known.limit_bytes)
"""


@pytest.fixture(scope="module", params=MAKE)
def pool(request: pytest.FixtureRequest, installed: Machine) -> Iterator[str]:
    """The name of a pool on a file system that keeps quotas of projects."""
    name = f"quota-{request.param}"
    place = f"/srv/{name}"
    script = f"""
        mkdir {place} && truncate -s 512M {place}.image && {MAKE[request.param]} {place}.image
        mount -o loop,prjquota {place}.image {place} && mkdir {place}/pool
    """
    installed.output(["sh", "-ec", script])
    installed.output([SYSCTR, "pool", "add", name, "--driver", "overlay", "--path", f"{place}/pool"])
    yield name
    installed.output([SYSCTR, "pool", "remove", name])
    installed.output(["sh", "-ec", f"umount {place} && rmdir {place} && rm {place}.image"])


@pytest.fixture(scope="module")
def limited(pool: str, installed: Machine) -> Iterator[Container]:
    """A running container with a limit; destroyed after, and then its limit is gone."""
    one = Container(installed, f"{pool}-vm")
    one.start("--template", "tiny", "--pool", pool, "--disk", "32M")
    yield one
    one.destroy()
    assert limits(installed, pool) == []


# What only one file system need show: that of each container costs seconds.
xfs = pytest.mark.parametrize("pool", ["xfs"], indirect=True)


def limits(vm: Machine, pool: str) -> list[int]:
    """Return the limits of projects that a pool's file system keeps."""
    python = f"{PAYLOAD}/venv/bin/python3"
    out = vm.output([python, "-I", "-c", LIMITS, f"{PAYLOAD}/checkout", f"/srv/{pool}"])
    return [int(line) for line in out.split()]


def size_bytes(container: Container) -> int:
    """Return the size of the root as the container sees it."""
    return int(container.exec("df -P -k /").stdout.splitlines()[1].split()[1]) * 1024


def write(container: Container, file: str, mib: int) -> bool:
    """Tell whether so many MiB could be written; what says no is a full disk."""
    done = container.exec(f"dd if=/dev/zero of={file} bs=1M count={mib} && echo fits")
    if "fits" in done.stdout:
        return True
    assert re.search("No space left|quota exceeded", done.stdout + done.stderr)
    return False


def test_a_container_is_held_at_its_quota_and_sees_it(limited: Container, pool: str) -> None:
    assert size_bytes(limited) == 32 * _MIB
    assert limits(limited.vm, pool) == [32 * _MIB]
    assert not write(limited, "/root/fill", 40)
    assert limited.exec("rm /root/fill").status == 0
    assert write(limited, "/root/half", 12)


@xfs
def test_a_quota_changes_while_the_container_runs(limited: Container) -> None:
    pid = limited.info()["pid"]
    limited.sysctr("set", limited.name, "limits.disk=64M")
    assert size_bytes(limited) == 64 * _MIB
    assert write(limited, "/root/more", 30)
    refusal = limited.vm.run([SYSCTR, "set", limited.name, "limits.disk=32M"])
    assert refusal.status == 5
    assert "it uses 4" in refusal.stderr
    limited.exec("rm /root/more")
    limited.sysctr("set", limited.name, "limits.disk=32M")
    assert size_bytes(limited) == 32 * _MIB
    assert not write(limited, "/root/more", 30)
    limited.exec("rm /root/more")
    assert limited.info()["pid"] == pid


def test_a_container_cannot_leave_its_quota(limited: Container) -> None:
    # Its own root, which owns its user namespace, on its own files; only the interpreter is the host's.
    pid = str(limited.info()["pid"])
    enter = ["nsenter", "--target", pid, "--user", "--setuid", "0", "--setgid", "0"]
    argv = [*enter, "/usr/bin/python3", "-I", "-c", LEAVE, f"/proc/{pid}/root/root"]
    (project,) = refused(limited.vm.output(argv))
    assert project >= 1 << 30


@xfs
def test_states_under_a_quota_are_kept_and_brought_back(limited: Container) -> None:
    limited.exec("echo one >/root/state; ln /root/state /root/hard")
    limited.sysctr("snapshot", limited.name, "first")
    limited.exec("echo two >/root/state; rm /root/hard")
    limited.sysctr("rollback", "--yes", limited.name, "first")
    limited.sysctr("wait", limited.name, "--state", "running")
    assert limited.exec("cat /root/state /root/hard").stdout == "one\none\n"
    assert size_bytes(limited) == 32 * _MIB


def test_the_kernel_tests_of_quotas_pass_in_the_guest(vm: Machine) -> None:
    result = vm.run(
        [f"{PAYLOAD}/venv/bin/python3", "-m", "pytest", "-q", "-rs", "--durations=10",
         "--basetemp=/var/tmp/pytest-quota", *CHOSEN],
        cwd=f"{PAYLOAD}/checkout",
        env={"SYSCTR_REQUIRE": GUEST_FACTS, "PYTHONDONTWRITEBYTECODE": "1"},
        timeout_s=600,
    )  # fmt: skip
    print(result.stdout)
    assert result.status == 0, result.stdout + result.stderr
