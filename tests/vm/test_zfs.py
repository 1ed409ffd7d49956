"""Containers on ZFS, on a virtual host that has it; that of Debian's packages has not.

Run once by hand, as told in tests/kernel/test_zfs.py.
"""

from collections.abc import Iterator

import pytest

from tests.vm.guest import SYSCTR, Container
from tests.vm.machine import Machine


@pytest.fixture
def pool(installed: Machine) -> Iterator[str]:
    """A pool on a dataset; nothing is left of it afterwards but what was there before."""
    if installed.run(["modprobe", "zfs"]).status:
        pytest.skip("needs zfs: the kernel of the virtual host has no ZFS")
    installed.output(["truncate", "--size=1G", "/root/tank.image"])
    installed.output(["zpool", "create", "-o", "cachefile=none", "tank", "/root/tank.image"])
    installed.output(["zfs", "create", "tank/ct"])
    installed.output([SYSCTR, "pool", "add", "tank", "--driver", "zfs", "--path", "/tank/ct"])
    yield "tank"
    installed.output([SYSCTR, "pool", "remove", "tank"])
    assert datasets(installed) == ["tank", "tank/ct"]
    assert installed.output(["ls", "-A", "/tank/ct"]) == ""
    assert installed.output(["grep", "-c", "^tank", "/proc/mounts"]) == "2"
    installed.output(["zpool", "destroy", "tank"])


def datasets(vm: Machine) -> list[str]:
    return vm.output(["zfs", "list", "-H", "-r", "-t", "all", "-o", "name", "tank"]).split()


def test_a_container_lives_on_a_dataset(installed: Machine, pool: str) -> None:
    web, twin = Container(installed, "web"), Container(installed, "twin")
    web.start("--template", "tiny", "--pool", pool, "--disk", "64M")

    def says(container: Container, script: str) -> str:
        return container.exec(f"{{ {script}; }} 2>&1").stdout.strip()

    assert says(web, "stat -c %u:%g / /bin/busybox") == "0:0\n0:0"
    assert says(web, "echo kept > /root/mine; stat -c %u /root/mine") == "0"
    assert "Operation not permitted" in says(web, "mknod /null c 1 3")
    assert "64000" in says(web, "df -k /")
    assert "paused for" in web.sysctr("snapshot", "web", "before")
    # The names of its own snapshots are all that is to be seen of them.
    assert says(web, "ls -A /.zfs/snapshot/*") == ""
    assert "Permission denied" in says(web, "mkdir /.zfs/snapshot/more")
    assert "quota exceeded" in says(web, "dd if=/dev/urandom of=/large bs=1M count=80; rm /large")
    assert says(web, "echo changed > /root/mine") == ""
    web.sysctr("set", "web", "limits.disk=96M")
    assert "98304" in says(web, "df -k /")
    web.sysctr("clone", "web", "twin", "--snapshot", "before", "--start")
    web.sysctr("rollback", "web", "before", "--yes")
    for container in (web, twin):
        container.sysctr("wait", container.name, "--state", "booted", "--timeout", "280")
        state = says(container, "hostname; cat /root/mine; stat -c %u /root/mine")
        assert state.split() == [container.name, "kept", "0"]
    for container in (web, twin):
        container.destroy()
