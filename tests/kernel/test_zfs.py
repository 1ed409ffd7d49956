"""What only the zfs driver has: datasets that clones stand on, and what becomes of them.

No machine of ours has ZFS. These tests, those of the contract and of crashes, and tests/vm/test_zfs.py were
run once in the virtual host of tests/vm: Linux 6.1.0-56-cloud-amd64, ZFS 2.3.2-2~bpo12+2, in November 2026.
To do it again takes some minutes: build the module from the source in Debian's zfs-dkms (backports) against
the headers of that kernel (`./configure --with-config=kernel`, make); put spl.ko and zfs.ko, and what is in
zfsutils-linux and its libraries, into the root that tests/vm/image.py makes; depmod there, modprobe inside.
"""

import os
import subprocess
from collections.abc import Iterator

import pytest

from sysctr.engine.job import JobRunner
from sysctr.errors import Refused, SysctrError
from sysctr.linux import fault
from sysctr.storage import tree
from sysctr.storage.zfs import ZfsDriver
from tests import storage
from tests.disk import disk, fill
from tests.storage import MIB, Pool

pytestmark = [pytest.mark.root, pytest.mark.kernel]

zfs = pytest.mark.needs("zfs")


@pytest.fixture
def pool(tmp_path, jobs: JobRunner) -> Iterator[Pool]:
    with storage.pool("zfs", str(tmp_path), jobs) as made:
        yield made


def datasets(pool: Pool, kind: str = "filesystem") -> list[str]:
    """Return the names of what is below the pool's dataset, as far as they are not random."""
    return sorted(name.rpartition("-")[0] or name for name in storage.datasets(pool, kind))


def held(pool: Pool) -> list[str]:
    return os.listdir(f"{pool.directory}/held")


def set_aside(pool: Pool) -> None:
    """Empty the trash, and see that what nobody names is what something stands on."""
    pool.driver.empty_trash()
    assert os.listdir(f"{pool.directory}/.trash") == []
    assert storage.stray_datasets(pool) == []


# Which directories can be a pool.


@pytest.mark.needs("loop", "ext4")
def test_a_directory_where_no_dataset_is_mounted_is_refused(tmp_path) -> None:
    os.mkdir(tmp_path / "disk")
    with disk(str(tmp_path / "disk"), "ext4"):
        for directory in (f"{tmp_path}/disk", f"{tmp_path}/disk/below"):
            with pytest.raises(Refused, match="no dataset of ZFS is mounted there") as caught:
                ZfsDriver(directory, f"{tmp_path}/run").prepare()
            assert f"mountpoint={directory} " in caught.value.hint
        assert "below" not in os.listdir(f"{tmp_path}/disk")


@zfs
def test_a_directory_in_a_dataset_is_refused(pool: Pool) -> None:
    with pytest.raises(Refused, match="no dataset of ZFS is mounted there"):
        ZfsDriver(f"{pool.directory}/volumes", pool.run).prepare()


def test_whether_mounts_can_have_id_maps_is_tried(tmp_path) -> None:
    driver = ZfsDriver(str(tmp_path), str(tmp_path))
    assert driver._why_no_id_maps() == ""
    # The kernel has none there: FS_ALLOW_IDMAP is missing, as in ZFS before 2.2.
    driver.directory = "/sys/kernel"
    assert driver._why_no_id_maps() == "invalid argument"
    assert os.listdir(tmp_path) == []


@zfs
def test_without_its_program_the_driver_names_the_package(pool: Pool, monkeypatch) -> None:
    pool.create("101")
    real = tree.run_tool
    monkeypatch.setattr(tree, "run_tool", lambda argv, *rest: real(["no-such-program", *argv[1:]], *rest))
    with pytest.raises(SysctrError, match="not installed") as caught:
        pool.create("102")
    assert caught.value.hint == "install the package zfsutils-linux"
    assert pool.driver.list() == ["101"]


# What clones stand on.


@zfs
def test_what_is_rolled_back_frees_its_space_at_once_and_the_rest_with_its_snapshots(pool: Pool) -> None:
    pool.create("101")
    for name in ("one", "two"):
        pool.write("101", "state", name)
        pool.snapshot("101", name)
    write(pool, "101", 20 * MIB)
    before = pool.driver.measure("101")
    pool.driver.rollback("101", "one")
    set_aside(pool)
    assert len(held(pool)) == 1
    assert datasets(pool) == ["101", "101", "base"]
    assert pool.driver.measure("101") < before - 19 * MIB
    for name in ("one", "two"):
        assert pool.read("101", "state", snapshot=name) == name
    pool.driver.delete_snapshot("101", "one")
    set_aside(pool)
    # The second is of the old dataset still.
    assert (len(held(pool)), datasets(pool)) == (1, ["101", "101", "base"])
    pool.driver.delete_snapshot("101", "two")
    set_aside(pool)
    assert (held(pool), datasets(pool)) == ([], ["101", "base"])
    assert datasets(pool, "snapshot") == ["base"]
    assert pool.read("101", "state") == "one"


@zfs
def test_a_long_row_of_rollbacks_and_deletions_leaves_nothing_behind(pool: Pool) -> None:
    pool.create("101")
    for number in range(4):
        pool.write("101", "state", str(number))
        pool.snapshot("101", "again")
        pool.driver.rollback("101", "again")
        pool.driver.delete_snapshot("101", "again")
    assert pool.read("101", "state") == "3"
    set_aside(pool)
    assert (held(pool), datasets(pool)) == ([], ["101", "base"])
    assert pool.read("101", "state") == "3"


@zfs
def test_an_origin_is_destroyed_when_one_clone_is_left_to_take_it_over(pool: Pool) -> None:
    pool.create("101")
    pool.write("101", "state", "common")
    pool.snapshot("101", "one")
    for clone in ("102", "103"):
        pool.clone("101", "one", clone)
    pool.driver.activate("103")
    pool.driver.destroy("101")
    set_aside(pool)
    assert datasets(pool) == ["101", "102", "103", "base"]
    pool.driver.destroy("102")
    set_aside(pool)
    assert (held(pool), datasets(pool)) == ([], ["103", "base"])
    pool.driver.deactivate("103")
    assert pool.read("103", "state") == "common"


@zfs
def test_a_copy_of_a_template_goes_with_the_last_volume_but_one_that_stands_on_it(pool: Pool) -> None:
    pool.create("101")
    pool.create("102")
    assert pool.driver.users_of("base") == []
    pool.driver.drop_bases(frozenset())
    set_aside(pool)
    assert datasets(pool) == ["101", "102", "base"]
    # The next volume of it brings it anew.
    pool.create("103")
    pool.driver.drop_bases(frozenset({"base"}))
    pool.driver.destroy("101")
    set_aside(pool)
    assert datasets(pool) == ["102", "103", "base"]
    assert held(pool) == []
    for volume in ("102", "103"):
        assert pool.read(volume, "etc/motd") == "base"


@zfs
def test_what_others_keep_of_a_volume_is_not_theirs_to_lose(pool: Pool) -> None:
    pool.create("101")
    name = storage.dataset(pool, pool.driver._dataset("101"))
    subprocess.run(["zfs", "snapshot", f"{name}@autosnap_daily"], check=True)
    pool.snapshot("101", "mine")
    pool.driver.rollback("101", "mine")
    pool.driver.destroy("101")
    pool.driver.empty_trash()
    assert os.listdir(f"{pool.directory}/.trash") == []
    assert datasets(pool) == ["101", "base"]
    subprocess.run(["zfs", "destroy", f"{name}@autosnap_daily"], check=True)
    set_aside(pool)
    assert (held(pool), datasets(pool)) == ([], ["base"])


@zfs
def test_a_crash_at_any_step_of_deleting_leaves_the_rest_for_the_next_time(pool: Pool, monkeypatch) -> None:
    def begin() -> None:
        for volume in pool.driver.list():
            pool.driver.destroy(volume)
        pool.driver.empty_trash()
        pool.create("101")
        pool.write("101", "state", "one")
        pool.snapshot("101", "one")
        pool.clone("101", "one", "102")
        pool.snapshot("102", "two")
        pool.driver.rollback("102", "two")
        pool.driver.delete_snapshot("102", "two")
        pool.driver.destroy("101")

    points: list[str] = []
    begin()
    with monkeypatch.context() as recording:
        recording.setattr(fault, "point", points.append)
        pool.driver.empty_trash()
    assert {"zfs.trash.destroyed", "zfs.trash.promoted", "zfs.trash.let_go"} <= set(points)
    for at, name in enumerate(points):
        point = f"{name}:{points[: at + 1].count(name)}"
        begin()
        assert pool.process("empty_trash", fault=point) == -9, point
        pool.restart()
        set_aside(pool)
        assert (held(pool), datasets(pool)) == ([], ["102", "base"]), point
        assert pool.read("102", "state") == "one", point


# Limits and room.


@zfs
def test_a_limit_that_a_crash_left_wrong_is_put_right(pool: Pool) -> None:
    pool.create("101", size_bytes=64 * MIB)
    name = storage.dataset(pool, pool.driver._dataset("101"))
    subprocess.run(["zfs", "set", "refquota=none", name], check=True)
    pool.restart()
    assert storage.property_of(name, "refquota") == str(64 * MIB)
    pool.driver.resize("101", None, pool.worker)
    assert pool.driver.size("101") is None
    assert storage.property_of(name, "refquota") == "0"


@zfs
def test_records_have_room_when_volumes_fill_the_disk(pool: Pool) -> None:
    pool.create("101")
    pool.snapshot("101", "one")
    pool.clone("101", "one", "102")
    with pool.opened("102") as root:
        fill(root)
    # What a clone stands on is noted before it is taken away.
    pool.driver.destroy("101")
    pool.driver.set_note("102", {"text": "x" * MIB})
    pool.driver.empty_trash()
    pool.driver.destroy("102")
    set_aside(pool)
    assert datasets(pool) == ["base"]
    pool.create("103")


def write(pool: Pool, volume: str, size_bytes: int) -> None:
    """Write a file to the disk."""
    with pool.opened(volume) as root, open(f"{root}/data", "wb", buffering=0) as file:
        file.write(os.urandom(size_bytes))
        os.fsync(file.fileno())
