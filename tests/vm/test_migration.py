"""A container moves from this machine to a host of another kernel and back, with the commands of the README.

Nothing is shared here that could hide a cheat: neither kernel nor disk, neither cgroups nor network. The two
reach each other as hosts behind NAT do, each at an address that is not its own.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.disk import disk
from tests.node import Node, TemplateStore
from tests.trees import difference
from tests.vm.conftest import free_port
from tests.vm.guest import SYSCTR, as_root_of
from tests.vm.machine import Machine
from tests.wait import wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox", "loop", "btrfs"),
]

NAME = "traveller"
# What QEMU's user-mode network gives a machine, and where that reaches the loopback device of this one.
GUEST, OUTSIDE = "10.0.2.15/24", "10.0.2.2"
DEADLINE_S = 280
HOLE_BYTES = 64 << 20

# Counts for as long as it runs, and says nothing that is not on the disk: a number that is missing was lost,
# one that is there twice was written by two of it.
SERVICE = """\
#!/bin/sh
case $1 in
start) ( n=$(wc -l </root/count)
    while n=$((n + 1)); do echo $n >>/root/count; sync -d /root/count; sleep 0.2; done ) & ;;
esac
"""
# Both run in the user namespace of the container, which alone sees its capabilities as they are inside.
MAKE = """
import os, struct, sys
os.chdir(sys.argv[1] + "/srv")
def write(name, text="x"):
    with open(name, "w") as file:
        file.write(text)
os.mkdir("dir", 0o2750)
none = 0xFFFFFFFF
entries = ((1, 7, none), (2, 7, 33), (4, 5, none), (16, 7, none), (32, 0, none))
acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in entries)
os.setxattr("dir", "system.posix_acl_access", acl)
os.setxattr("dir", "system.posix_acl_default", acl)
write("dir/ping")
os.setxattr("dir/ping", "security.capability", struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0))
write("owned")
os.chown("owned", 1000, 65534)
os.chmod("owned", 0o6711)
os.link("owned", "dir/two words")
with open("holes", "wb") as file:
    file.truncate(int(sys.argv[2]))
    file.seek(int(sys.argv[2]) // 2)
    file.write(b"in the middle")
write("plain")
os.setxattr("plain", "user.mine", bytes(range(256)))
os.utime("plain", ns=(3, 1_000_000_000_000_000_007))
os.symlink("/nowhere", "link")
os.mkfifo("pipe", 0o620)
# What the template has, and this container has not.
os.unlink("../bin/vi")
os.chdir("../etc/init.d")
write("S50count", sys.argv[3])
os.chmod("S50count", 0o755)
"""
LOOK = """
import ctypes, hashlib, json, os, stat, sys
libc = ctypes.CDLL(None, use_errno=True)
def attribute(path, name):
    # As sysctr.linux.attributes, which says why.
    size = libc.lgetxattr(os.fsencode(path), name.encode(), None, ctypes.c_size_t(0))
    buffer = ctypes.create_string_buffer(size)
    assert libc.lgetxattr(os.fsencode(path), name.encode(), buffer, ctypes.c_size_t(size)) == size
    return buffer.raw.hex()
found, groups = {}, {}
for top in ("/srv", "/bin", "/etc/init.d"):
    for directory, directories, files in os.walk(sys.argv[1] + top):
        directories.sort()
        for path in [directory, *(directory + "/" + one for one in sorted(files))]:
            status = os.lstat(path)
            entry = [oct(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns]
            names = sorted(os.listxattr(path, follow_symlinks=False))
            entry.append({name: attribute(path, name) for name in names})
            relative = os.path.relpath(path, sys.argv[1])
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    entry += [status.st_size, hashlib.file_digest(file, "sha256").hexdigest()]
                entry.append(status.st_blocks * 512 <= status.st_size + 8192)
            if stat.S_ISLNK(status.st_mode):
                entry.append(os.readlink(path))
            if not stat.S_ISDIR(status.st_mode):
                entry.append(groups.setdefault((status.st_dev, status.st_ino), relative))
            found[relative] = entry
json.dump(found, sys.stdout)
"""


class Side:
    """One of the two hosts as its administrator sees it: commands of sysctr, and the container."""

    def __init__(self, run: Callable[[list[str]], str], sysctr: list[str], peer: str) -> None:
        self.run = run
        self.peer = peer
        self._sysctr = sysctr

    def sysctr(self, *arguments: str) -> str:
        """Run `sysctr ARGUMENTS` and return what it prints."""
        return self.run([*self._sysctr, *arguments])

    def json(self, *arguments: str) -> Any:
        """Return what a command says with --json."""
        return json.loads(self.sysctr(*arguments, "--json"))

    def shell(self, script: str) -> str:
        """Run a script in the container and return what it prints."""
        return self.sysctr("exec", NAME, "--", "sh", "-c", script)

    def python(self, code: str, *arguments: str) -> str:
        """Run Python of the host as the container's root; the first argument is the container's /."""
        pid = self.json("info", NAME)["pid"]
        python = [*as_root_of(pid), "/usr/bin/python3", "-I", "-c"]
        return self.run([*python, code, f"/proc/{pid}/root", *arguments])

    def files(self) -> dict[str, Any]:
        """Return what the container has that a service does not change, down to the last attribute."""
        return json.loads(self.python(LOOK))

    def count(self) -> int:
        """Return how far the service has counted; every number has to be there, and once."""
        numbers = self.shell("cat /root/count").split()
        assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
        return len(numbers)

    def counts_on(self, seen: int) -> int:
        """Wait until the service has counted further than it was seen to before, and return how far."""
        return wait_until(lambda: (now := self.count()) > seen and now, DEADLINE_S, f"more than {seen}")

    def hand_over(self, *options: str) -> dict[str, Any]:
        """Move the running container to the other host and return the report."""
        (done,) = self.json("migrate", NAME, self.peer, "--restart", *options)
        assert done["state"] == "done", done
        return done["result"]


@pytest.fixture(scope="module")
def here(templates: TemplateStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A host on this machine that listens on loopback alone and has a btrfs for the pool `fast`."""
    directory = tmp_path_factory.mktemp("fast")
    with disk(str(directory), "btrfs", size_bytes=1 << 30), Node() as node:
        templates.give(node, "tiny")
        port = free_port()
        Path(node.layout.etc).mkdir(parents=True)
        Path(node.layout.host_config).write_text(
            f'schema = 1\n[peer]\nlisten = "127.0.0.1:{port}"\naddresses = ["{OUTSIDE}:{port}"]\n'
        )
        node.run("pool", "add", "fast", "--driver", "btrfs", "--path", f"{directory}/pool")
        yield node
        assert "Traceback" not in node.logs(), node.logs()


@pytest.fixture(scope="module")
def sides(here: Node, installed: Machine, vm_port: int) -> Iterator[tuple[Side, Side]]:
    """The host on this machine and the virtual one; they trust each other."""
    installed.output(["ip", "address", "add", GUEST, "dev", "eth0"])
    installed.output(["ip", "link", "set", "eth0", "up"])
    home = Side(lambda argv: here.shell(*argv).out, here.argv(), "away")
    away = Side(lambda argv: installed.output(argv, timeout_s=DEADLINE_S), [SYSCTR], "home")
    token = away.sysctr("peer", "token", "--address", f"127.0.0.1:{vm_port}").strip()
    home.sysctr("peer", "join", token, "--name", "away")
    (joined,) = away.json("peer", "list")
    away.sysctr("peer", "rename", joined["name"], "home")
    try:
        yield home, away
    finally:
        # The tests that follow share the virtual host.
        installed.run([SYSCTR, "destroy", NAME, "--force", "--yes"])
        away.sysctr("peer", "remove", "home", "--force")
        installed.output(["ip", "link", "set", "eth0", "down"])
        installed.output(["ip", "address", "flush", "dev", "eth0"])


def test_a_container_goes_to_a_host_of_another_kernel_and_comes_back(sides: tuple[Side, Side]) -> None:
    home, away = sides
    home.sysctr("create", NAME, "--template", "tiny", "--pool", "fast", "--start")
    home.python(MAKE, str(HOLE_BYTES), SERVICE)
    home.shell("echo one >/root/state; touch /root/count; /etc/init.d/S50count start")
    home.sysctr("snapshot", NAME, "before")
    home.shell("echo two >/root/state")
    files, identity = home.files(), identity_of(home)
    assert files["srv/owned"][-1] == files["srv/dir/two words"][-1]
    seen = home.counts_on(0)

    report = home.hand_over("--pool-map", "fast=default")

    assert report["started"]
    assert (report["snapshots"], report["blockers"]) == (1, [])
    seen = away.counts_on(seen)
    assert identity_of(away) == identity
    assert not (changed := difference(files, away.files())), changed
    assert away.shell("cat /root/state").strip() == "two"
    assert away.sysctr("snapshots", NAME, "-q").split() == ["before"]
    assert away.shell("uname -r") != home.run(["uname", "-r"])
    assert (home.json("list"), home.json("migrations")) == ([], [])

    away.shell("echo three >/root/state; rm /srv/plain; cp /bin/cat /srv/cat")
    files = away.files()
    report = away.hand_over()

    assert report["started"]
    seen = home.counts_on(seen)
    assert identity_of(home) == identity
    assert not (changed := difference(files, home.files())), changed
    assert home.shell("cat /root/state").strip() == "three"
    assert NAME not in {one["name"] for one in away.json("list")}
    assert away.json("migrations") == []
    home.sysctr("rollback", NAME, "before", "--yes")
    home.sysctr("wait", NAME, "--state", "running")
    assert home.shell("cat /root/state; ls /srv/plain; ls /srv").split()[:2] == ["one", "/srv/plain"]


def identity_of(side: Side) -> tuple[Any, ...]:
    """Return what makes a container the one that it is."""
    info = side.json("info", NAME)
    return info["uuid"], [nic["mac"] for nic in info["nets"]]
