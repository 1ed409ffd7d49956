"""What storage does on a real host: a disk that grows while it is mounted, states kept and brought back."""

import re
import struct
from collections.abc import Iterator

import pytest

from tests.vm.guest import CGROUP, Container
from tests.vm.machine import Machine
from tests.wait import wait_until

_MIB = 1 << 20
_ACL = "system.posix_acl_access"


@pytest.fixture(scope="module")
def limited(installed: Machine) -> Iterator[Container]:
    """A running container with a small disk of its own; destroyed after."""
    one = Container(installed, "limited")
    one.start("--template", "tiny", "--disk", "64M")
    yield one
    one.destroy()


# An access list of one user beside those of the mode.
_LIST = """
import os, struct, sys
path = sys.argv[1] + "/srv/listed"
entries = ((1, 7, -1), (2, 7, 33), (4, 5, -1), (16, 7, -1), (32, 0, -1))
data = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *one) for one in entries)
os.mkdir(path)
os.setxattr(path, "system.posix_acl_access", data)
"""


def size_bytes(container: Container) -> int:
    """Return the size of the root as the container sees it."""
    return int(container.exec("df -P -k /").stdout.splitlines()[1].split()[1]) * 1024


def test_a_disk_is_full_at_its_limit(limited: Container) -> None:
    assert size_bytes(limited) < 64 * _MIB
    done = limited.exec("dd if=/dev/zero of=/root/fill bs=1M count=80 && echo fits")
    assert "fits" not in done.stdout
    assert "No space left" in done.stdout + done.stderr
    limited.exec("rm /root/fill")


def test_a_disk_grows_while_it_is_used(limited: Container) -> None:
    pid = limited.info()["pid"]
    limited.sysctr("set", limited.name, "limits.disk=160M")
    assert 128 * _MIB < size_bytes(limited) <= 160 * _MIB
    assert limited.exec("dd if=/dev/zero of=/root/more bs=1M count=80 && rm /root/more && echo fits").stdout
    assert limited.info()["pid"] == pid


def test_states_are_kept_and_brought_back(limited: Container) -> None:
    limited.exec("echo one > /root/state; ln /root/state /root/hard")
    said = limited.sysctr("snapshot", limited.name, "first")
    assert re.search(r"paused for [\d.]+ ms", said)
    limited.exec("echo two > /root/state; rm /root/hard")
    changed = limited.sysctr("diff", limited.name, "first").splitlines()
    assert {"M /root/state", "D /root/hard"} <= set(changed)
    limited.sysctr("rollback", "--yes", limited.name, "first")
    limited.sysctr("wait", limited.name, "--state", "running")
    assert limited.exec("cat /root/state /root/hard").stdout == "one\none\n"
    assert limited.sysctr("snapshots", limited.name, "-q").split() == ["first"]


def test_a_clone_is_another_container(limited: Container) -> None:
    clone = Container(limited.vm, "twin")
    limited.sysctr("clone", limited.name, clone.name, "--snapshot", "first", "--start")
    limited.sysctr("wait", clone.name, "--state", "booted")
    assert clone.exec("cat /root/state; hostname").stdout == "one\ntwin\n"
    assert clone.info()["uuid"] != limited.info()["uuid"]
    clone.destroy()


def test_a_directory_of_the_host_is_mounted_while_it_runs(limited: Container) -> None:
    limited.vm.output(["mkdir", "-p", "/srv/shared"])
    limited.sysctr("mount", "add", limited.name, "source=/srv/shared,target=/srv,ro")
    done = limited.exec("touch /srv/x; mount -o remount,rw /srv; touch /srv/x")
    assert limited.vm.run(["test", "-e", "/srv/shared/x"]).status == 1, done.stdout + done.stderr
    limited.sysctr("mount", "remove", limited.name, "/srv")
    assert limited.exec("grep -c ' /srv ' /proc/mounts").stdout.strip() == "0"


def test_work_on_files_has_bounds_and_leaves_no_cgroup(limited: Container) -> None:
    limited.sysctr("template", "create", limited.name, "made")
    assert "made" in limited.sysctr("template", "list")
    limited.sysctr("template", "remove", "made")
    left = limited.vm.output(["sh", "-c", f"find {CGROUP}/jobs -mindepth 1 -type d | wc -l"])
    assert left.strip() == "0"
    controllers = limited.vm.output(["cat", f"{CGROUP}/jobs/cgroup.subtree_control"]).split()
    assert {"memory", "pids"} <= set(controllers)


def test_access_lists_outlive_the_merging_of_layers(installed: Machine) -> None:
    # Linux 6.1 shows the users of a list as nobody to who reads it through an idmapped mount as Python does.
    one = Container(installed, "merged")
    one.start("--template", "tiny")
    number = one.info()["id"]
    one.python(_LIST)
    for name in ("first", "second"):
        # What runs is copied; of what is stopped the files themselves become a layer.
        one.exec(f"touch /srv/listed/{name}")
        one.sysctr("stop", one.name)
        one.sysctr("snapshot", one.name, name)
        one.sysctr("start", one.name)
    # Not ls: it looks at each name again, and merging takes names away meanwhile.
    layers = ["sh", "-c", f"printf '%s\\n' /var/lib/sysctr/storage/default/*/{number}.*"]
    before = set(installed.output(layers).split())
    one.sysctr("stop", one.name)
    one.sysctr("delsnapshot", one.name, "first")
    wait_until(lambda: len(installed.output(layers).split()) < len(before), 120, "a layer less")
    (merged,) = set(installed.output(layers).split()) - before
    read = f"import os; print(os.getxattr('{merged}/rootfs/srv/listed', '{_ACL}').hex())"
    data = bytes.fromhex(installed.output(["python3", "-c", read]))
    assert struct.unpack("<HHi", data[12:20]) == (2, 7, 33)
    one.sysctr("start", one.name)
    one.destroy()
