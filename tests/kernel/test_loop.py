"""What only the loop driver has: images with a size, and what is mounted on the host for them."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sysctr.engine.job import JobRunner
from sysctr.errors import Refused, SysctrError, UsageError
from sysctr.storage import images
from sysctr.storage.loop import DEFAULT_SIZE_BYTES
from tests import leaks, storage
from tests.disk import disk
from tests.node import Node
from tests.storage import MIB, Pool

pytestmark = [pytest.mark.root, pytest.mark.kernel, pytest.mark.needs("loop")]


@pytest.fixture(params=storage.parameters(["loop-xfs"]))
def pool(request, tmp_path, jobs: JobRunner) -> Iterator[Pool]:
    with storage.pool(request.param, str(tmp_path), jobs) as made:
        yield made


def image(pool: Pool, volume: str = "101") -> str:
    return pool.driver._disk(volume)


def test_without_a_size_a_volume_has_what_proxmox_gives(pool: Pool) -> None:
    pool.create("101", size_bytes=None)
    pool.driver.create("101-data", None, pool.worker)
    for volume in ("101", "101-data"):
        assert pool.driver.size(volume) == DEFAULT_SIZE_BYTES == os.stat(image(pool, volume)).st_size
        assert pool.driver.usage(volume) < 32 * MIB
    with pool.opened("101") as root:
        facts = os.statvfs(root)
        assert 7 << 30 < facts.f_bavail * facts.f_frsize < 8 << 30


def test_a_disk_without_a_size_and_one_too_small_are_refused(pool: Pool) -> None:
    pool.create("101")
    with pytest.raises(Refused, match="always has a size"):
        pool.driver.resize("101", None, pool.worker)
    with pytest.raises(UsageError, match="16 MiB"):
        pool.driver.resize("101", MIB, pool.worker)
    write_random(f"{pool.base.tree}/large", 40 * MIB)
    pool.forget_template()
    with pytest.raises(Refused, match=r"its files need \d+ MiB, which is more than 32 MiB"):
        pool.create("102", size_bytes=32 * MIB)
    pool.create("102", size_bytes=80 * MIB)
    assert pool.driver.size("102") == 80 * MIB


def test_a_mounted_volume_is_closed_to_the_hosts_users(pool: Pool) -> None:
    pool.create("101")
    with pool.opened("101") as root:
        argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "test", "-e", f"{root}/su"]
        assert subprocess.run(argv, check=False).returncode == 1
        assert os.stat(pool.run).st_mode & 0o777 == 0o700


def test_what_was_rolled_back_or_resized_is_whole(pool: Pool) -> None:
    pool.create("101")
    with pool.opened("101") as root:
        write_random(f"{root}/data", 10 * MIB)
        pool.driver.snapshot("101", "live", {}, pool.worker)
        os.unlink(f"{root}/data")
    pool.driver.rollback("101", "live")
    pool.driver.resize("101", 100 * MIB, pool.worker)
    pool.driver.resize("101", 50 * MIB, pool.worker)
    kept = f"{pool.directory}/volumes/101/snapshots/live.disk.img"
    for path in (image(pool), kept):
        subprocess.run(["e2fsck", "-f", "-n", path], check=True, capture_output=True)
    with pool.opened("101") as root:
        assert os.stat(f"{root}/data").st_size == 10 * MIB


def test_an_image_that_a_process_still_holds_is_copied_as_it_is(pool: Pool) -> None:
    pool.create("101")
    spec = pool.driver.activate("101")
    with open(f"{spec.trees[0].path}/state", "w") as file:
        file.write("held")
        file.flush()
        pool.driver.deactivate("101")
        assert images.held(image(pool))
        pool.clone("101", "", "102")
        pool.snapshot("101", "one")
    for path in (image(pool, "102"), f"{pool.directory}/volumes/101/snapshots/one.disk.img"):
        subprocess.run(["e2fsck", "-f", "-n", path], check=True, capture_output=True)
    assert pool.read("102", "state") == "held"
    assert pool.read("101", "state", snapshot="one") == "held"


def test_a_volume_of_a_host_that_crashed_is_repaired_when_it_is_used(pool: Pool) -> None:
    pool.create("101")
    with pool.opened("101") as root:
        Path(root, "state").write_text("written")
        subprocess.run(["sync", "--file-system", root], check=True)
        subprocess.run(["cp", "--sparse=always", image(pool), f"{pool.directory}/crashed"], check=True)
    os.rename(f"{pool.directory}/crashed", image(pool))
    with pool.driver.opened("101") as spec, storage.shown(spec) as root:
        assert Path(root, "state").read_text() == "written"
    pool.snapshot("101", "one")
    assert pool.read("101", "state", snapshot="one") == "written"


def test_a_damaged_image_stops_its_own_volume(pool: Pool) -> None:
    pool.create("101")
    pool.create("102")
    with open(image(pool), "r+b") as file:
        file.write(bytes(MIB))
    pool.restart()
    with pytest.raises(SysctrError, match="damaged"):
        pool.driver.activate("101")
    assert pool.driver.active() == frozenset()
    assert pool.read("102", "etc/motd") == "base"
    pool.driver.destroy("101")


def write_random(path: str, size_bytes: int) -> None:
    with open(path, "wb") as file:
        file.write(os.urandom(size_bytes))
        os.fsync(file.fileno())


@pytest.mark.needs("userns", "idmap", "mmdebstrap", "net")
@pytest.mark.parametrize(
    "fstype", [pytest.param(name, marks=pytest.mark.needs(name)) for name in ("ext4", "xfs")]
)
def test_debian_boots_from_an_image(make_node: Callable[..., Node], tmp_path, fstype: str) -> None:
    leaks.register(str(tmp_path))
    os.mkdir(tmp_path / "disk")
    with disk(str(tmp_path / "disk"), fstype, size_bytes=3 << 30):
        node = make_node("debian-12")
        try:
            node.run("pool", "add", "images", "--driver", "loop", "--path", f"{tmp_path}/disk/pool")
            node.run(
                "create", "deb", "--template", "debian-12", "--pool", "images", "--disk", "1G", "--start"
            )
            storage.check_debian(node, "deb")
            shown = node.run("exec", "deb", "--", "sh", "-c", "head -c 2G /dev/zero > /large", check=False)
            assert shown.status != 0
            assert "no space left" in shown.err.lower()
        finally:
            node.run("destroy", "--all", "--force", "--yes", check=False)
