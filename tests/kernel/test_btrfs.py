"""What only the btrfs driver has: subvolumes, quota groups, and the calls that containers are refused."""

import errno
import os
import platform
import subprocess
from collections.abc import Callable, Iterator

import pytest

from sysctr.engine import seccomp
from sysctr.engine.job import JobRunner
from sysctr.errors import Refused, SysctrError
from sysctr.storage import btrfs
from sysctr.storage.btrfs import BtrfsDriver
from tests import leaks, storage
from tests.disk import disk
from tests.node import Node
from tests.storage import MIB, Pool
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.kernel, pytest.mark.needs("loop", "btrfs")]

SUBVOL_CREATE = 0x5000940E
# open(2) and ioctl(2), by their numbers on x86_64; the argument is a struct btrfs_ioctl_vol_args.
ATTACK = """
my $path = "/root";
my $fd = syscall(2, $path, 0);
for my $number (@ARGV) {
    my $argument = "\\0" x 8 . "mine" . "\\0" x 4084;
    print syscall(16, $fd, $number + 0, $argument) < 0 ? $! + 0 : 0, "\\n";
}
"""


@pytest.fixture
def pool(tmp_path, jobs: JobRunner) -> Iterator[Pool]:
    with storage.pool("btrfs", str(tmp_path), jobs) as made:
        yield made


@pytest.fixture
def place(tmp_path) -> Iterator[str]:
    """A btrfs for the pool of a host."""
    leaks.register(str(tmp_path))
    os.mkdir(tmp_path / "disk")
    with disk(str(tmp_path / "disk"), "btrfs", size_bytes=2 << 30):
        yield str(tmp_path / "disk")


def subvolumes(directory: str) -> list[str]:
    argv = ["btrfs", "subvolume", "list", directory]
    lines = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(line.split(" path ")[1] for line in lines)


def test_a_directory_that_is_not_on_btrfs_is_refused(tmp_path) -> None:
    os.mkdir(tmp_path / "disk")
    with disk(str(tmp_path / "disk"), "ext4"):
        driver = BtrfsDriver(f"{tmp_path}/disk/pool", f"{tmp_path}/run")
        with pytest.raises(Refused, match="it is not on btrfs") as caught:
            driver.prepare()
    assert "overlay or loop" in caught.value.hint


def test_without_its_program_the_driver_names_the_package(pool: Pool, monkeypatch) -> None:
    pool.create("101")
    real = btrfs.tree.run_tool
    monkeypatch.setattr(
        btrfs.tree, "run_tool", lambda argv, *rest: real(["no-such-program", *argv[1:]], *rest)
    )
    with pytest.raises(SysctrError, match="not installed") as caught:
        pool.create("102")
    assert caught.value.hint == "install the package btrfs-progs"
    assert pool.driver.list() == ["101"]


def test_subvolumes_that_an_administrator_made_inside_go_with_the_volume(pool: Pool) -> None:
    pool.create("101")
    before = subvolumes(pool.directory)
    pool.create("102")
    with pool.opened("102") as root:
        for path in ("one", "one/two", "etc/three"):
            subprocess.run(["btrfs", "-q", "subvolume", "create", f"{root}/{path}"], check=True)
    pool.snapshot("102", "kept")
    pool.driver.rollback("102", "kept")
    pool.driver.destroy("102")
    pool.driver.empty_trash()
    assert subvolumes(pool.directory) == before
    assert os.listdir(f"{pool.directory}/.trash") == []


def test_a_snapshot_and_a_template_cannot_be_written(pool: Pool) -> None:
    pool.create("101")
    pool.snapshot("101", "kept")
    for path in ("layers/base/rootfs", "volumes/101/snapshots/kept.rootfs"):
        with pytest.raises(OSError, match="Read-only"):
            os.mkdir(f"{pool.directory}/{path}/new")


def test_a_limit_that_a_crash_left_wrong_is_put_right(pool: Pool) -> None:
    pool.create("101", size_bytes=64 * MIB)
    disk_path = pool.driver._disk("101")
    subprocess.run(["btrfs", "qgroup", "limit", "none", disk_path], check=True)
    pool.restart()
    assert pool.driver._number(disk_path, "max_referenced") == 64 * MIB
    pool.driver.resize("101", None, pool.worker)
    assert pool.driver.size("101") is None
    assert pool.driver._number(disk_path, "max_referenced") is None


def test_the_quota_groups_of_what_is_gone_go_too(pool: Pool) -> None:
    pool.create("101")
    number = btrfs._subvolume_id(pool.driver._disk("101"))
    pool.driver.destroy("101")
    pool.driver.empty_trash()

    def gone() -> bool:
        # The kernel drops a subvolume after a commit, which comes every 30 s by itself.
        subprocess.run(["btrfs", "filesystem", "sync", pool.directory], check=True)
        pool.restart()
        return not os.path.exists(f"{pool.driver._groups}/0_{number}")

    wait_until(gone)


def check_that_no_subvolume_can_be_made(node: Node, ref: str, place: str) -> None:
    """Make the calls as the container's root; without the filter SUBVOL_CREATE succeeds."""
    if platform.machine() != "x86_64":
        return
    before = subvolumes(place)
    # The last is past the lower 32 bits, which are all that the kernel looks at.
    numbers = [*seccomp._BTRFS.values(), *seccomp._BTRFS_ADMINISTRATION.values(), SUBVOL_CREATE | 1 << 40]
    answer = node.run("exec", ref, "--", "perl", "-e", ATTACK, *map(str, numbers)).out.split()
    assert answer == [str(errno.ENOTTY)] * len(numbers)
    assert subvolumes(place) == before
    node.run("exec", ref, "--", "cp", "--reflink=always", "/etc/os-release", "/shared")


@pytest.mark.needs("userns", "idmap", "mmdebstrap", "net")
def test_debian_boots_from_a_subvolume(make_node: Callable[..., Node], place: str) -> None:
    node = make_node("debian-12")
    node.run("pool", "add", "fast", "--driver", "btrfs", "--path", f"{place}/pool")
    node.run("create", "deb", "--template", "debian-12", "--pool", "fast", "--disk", "1G", "--start")
    storage.check_debian(node, "deb")
    check_that_no_subvolume_can_be_made(node, "deb", place)
    shown = node.run("exec", "deb", "--", "sh", "-c", "head -c 2G /dev/zero > /large", check=False)
    assert shown.status != 0
    assert "quota exceeded" in shown.err.lower()


@pytest.fixture
def other(tmp_path, jobs: JobRunner) -> Iterator[Pool]:
    """A second pool, on a file system of its own."""
    with storage.pool("btrfs", f"{tmp_path}/other", jobs) as made:
        yield made


def sent(pool: Pool, path: str, *arguments: str) -> str:
    with open(path, "wb") as file:
        pool.driver.send(arguments[0], arguments[1], file.fileno(), *arguments[2:])
    return path


def received(pool: Pool, path: str, volume: str, name: str) -> None:
    with open(path, "rb") as file:
        pool.driver.receive(volume, name, file.fileno(), {"of": "a peer"})


def test_snapshots_go_to_another_pool_as_streams_and_then_what_differs(pool, other, tmp_path) -> None:
    assert pool.driver.traits.native_stream
    pool.create("101")
    pool.write("101", "big", "x" * 3_000_000)
    with pool.opened("101") as directory:
        os.chown(f"{directory}/big", 1000, 1001)
        os.setxattr(f"{directory}/big", "user.note", b"kept")
    pool.snapshot("101", "one")
    pool.write("101", "small", "new")
    pool.snapshot("101", "two")
    first = sent(pool, f"{tmp_path}/first", "101", "one")
    second = sent(pool, f"{tmp_path}/second", "101", "two", "one")
    assert os.path.getsize(second) < 100_000 < 3_000_000 < os.path.getsize(first)
    other.driver.create("205", None, other.worker)
    received(other, first, "205", "one")
    received(other, second, "205", "two")
    assert [one.name for one in other.driver.snapshots("205")] == ["one", "two"]
    assert other.driver.snapshots("205")[0].note == {"of": "a peer"}
    assert other.read("205", "small") == ""
    other.driver.rollback("205", "two")
    assert other.read("205", "small") == "new"
    with other.opened("205") as directory:
        state = os.stat(f"{directory}/big")
        assert (state.st_size, state.st_uid, state.st_gid) == (3_000_000, 1000, 1001)
        assert os.getxattr(f"{directory}/big", "user.note") == b"kept"


def test_a_stream_that_is_cut_or_of_something_else_leaves_nothing(pool, other, tmp_path) -> None:
    pool.create("101")
    pool.write("101", "big", "x" * 3_000_000)
    pool.snapshot("101", "one")
    whole = sent(pool, f"{tmp_path}/whole", "101", "one")
    other.driver.create("205", None, other.worker)
    before = subvolumes(other.directory)
    with open(whole, "rb") as file:
        data = file.read()
    for damaged, name in ((data[:1_000_000], "one"), (b"", "one"), (b"nonsense", "one"), (data, "another")):
        path = f"{tmp_path}/damaged"
        with open(path, "wb") as file:
            file.write(damaged)
        with pytest.raises(SysctrError):
            received(other, path, "205", name)
        assert other.driver.snapshots("205") == []
        assert subvolumes(other.directory) == before
    received(other, whole, "205", "one")
    with pytest.raises(SysctrError, match="already"):
        received(other, whole, "205", "one")
