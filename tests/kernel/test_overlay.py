"""The overlay driver on real file systems: full, read-only, split; what is kept of what runs; limits."""

import contextlib
import mmap
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sysctr.engine.trees import TreeWorker
from sysctr.errors import NoSpace, Refused, SysctrError
from sysctr.linux.mount import MNT_DETACH, MS_BIND, MS_RDONLY, MS_REMOUNT, mount, umount2
from sysctr.runtime.layers import MARKS
from sysctr.storage.base import Base, RootSpec
from sysctr.storage.overlay import OverlayDriver
from tests import storage
from tests.disk import fill, fill_inodes, small_disk
from tests.storage import MIB, Pool
from tests.trees import change_everything, describe, difference, everything
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.kernel, pytest.mark.needs("loop")]


@pytest.fixture
def small_pool(tmp_path) -> Iterator[str]:
    """A pool on a file system of its own: 4 MiB, so that it can be filled."""
    path = str(tmp_path / "pool")
    os.mkdir(path)
    with small_disk(path, 4096, "-N", "64"):
        yield path


@pytest.fixture
def pool(tmp_path, jobs) -> Iterator[Pool]:
    """A pool of 320 MiB with a template and real jobs."""
    with storage.pool("overlay", str(tmp_path), jobs) as made:
        yield made


def prepared(pool: str) -> OverlayDriver:
    driver = OverlayDriver(pool, f"{pool}.run")
    driver.prepare()
    os.makedirs(f"{driver.directory}/layers/base/rootfs/etc")
    return driver


def create(driver: OverlayDriver, jobs, volume: str = "101") -> None:
    driver.create(volume, Base("base", f"{driver.directory}/layers/base/rootfs"), TreeWorker(jobs))


def upper(driver: OverlayDriver, volume: str = "101") -> str:
    chain = driver.layers.chain(volume, driver.records.read(volume))
    return f"{driver.layers.path(volume, chain.upper)}/rootfs"


@pytest.mark.parametrize("filled", [fill, fill_inodes])
def test_on_a_full_disk_nothing_is_made_and_everything_can_be_destroyed(small_pool, jobs, filled) -> None:
    driver = prepared(small_pool)
    create(driver, jobs)
    filled(upper(driver))
    with pytest.raises(NoSpace, match="no space left"):
        create(driver, jobs, "102")
    assert os.listdir(driver.records.directory) == ["101"]
    driver.destroy("101")
    driver.empty_trash()
    create(driver, jobs, "102")
    assert driver.list() == ["102"]


def test_a_read_only_pool_is_named(small_pool, jobs) -> None:
    driver = prepared(small_pool)
    create(driver, jobs)
    mount("none", small_pool, None, MS_REMOUNT | MS_RDONLY)
    for action in (lambda: create(driver, jobs, "102"), lambda: driver.destroy("101"), driver.prepare):
        with pytest.raises(Refused) as caught:
            action()
        assert small_pool in caught.value.message
        assert "read-only" in caught.value.message
    assert driver.list() == ["101"]


def test_a_pool_over_two_file_systems_is_refused(small_pool) -> None:
    driver = prepared(small_pool)
    uppers = f"{driver.directory}/uppers"
    mount("tmpfs", uppers, "tmpfs", 0, "size=1m,mode=0700")
    try:
        with pytest.raises(Refused, match="another file system"):
            driver.prepare()
    finally:
        umount2(uppers)


def test_a_pool_without_extended_attributes_is_refused(tmp_path) -> None:
    # ramfs has none of the user's, as NFS and old file systems.
    path = str(tmp_path / "pool")
    os.mkdir(path)
    mount("ramfs", path, "ramfs", 0, None)
    try:
        with pytest.raises(Refused, match="extended attributes"):
            OverlayDriver(path, f"{path}.run").prepare()
        assert os.listdir(f"{path}/volumes") == []
    finally:
        umount2(path, MNT_DETACH)


def test_what_is_mounted_in_a_thrown_away_tree_survives(small_pool, jobs, tmp_path) -> None:
    driver = prepared(small_pool)
    create(driver, jobs)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    target = f"{upper(driver)}/mnt"
    os.mkdir(target)
    mount(str(precious), target, None, MS_BIND)
    driver.destroy("101")
    driver.empty_trash()
    assert (precious / "file").read_text() == "kept"
    (thrown,) = os.listdir(f"{small_pool}/.trash")
    umount2(f"{small_pool}/.trash/{thrown}/rootfs/mnt")
    driver.empty_trash()
    assert os.listdir(f"{small_pool}/.trash") == []


def test_a_container_writes_to_its_upper_with_its_own_ids_and_never_to_the_layer(layout, jobs) -> None:
    driver = prepared(layout.pool)
    base = f"{driver.directory}/layers/base/rootfs"
    Path(base, "etc/hosts").write_text("from the template\n")
    create(driver, jobs)
    create(driver, jobs, "102")
    program = {
        "builtin": "setup",
        "append": [{"path": "/etc/hosts", "line": "mine", "mode": 0o644}],
        "files": [{"path": "/root/new", "text": "x", "mode": 0o600}],
    }
    jobs.run_builtin(101, driver.activate("101"), program)
    assert Path(upper(driver), "etc/hosts").read_text() == "from the template\nmine\n"
    status = os.stat(f"{upper(driver)}/root/new")
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 0, 0o600)
    assert Path(base, "etc/hosts").read_text() == "from the template\n"
    assert os.listdir(upper(driver, "102")) == []


def test_a_container_sees_its_newest_layer_first(layout, jobs) -> None:
    driver = prepared(layout.pool)
    create(driver, jobs)
    worker = TreeWorker(jobs)
    for number in range(3):
        program = {"builtin": "setup", "append": [{"path": "/etc/log", "line": f"{number}", "mode": 0o644}]}
        jobs.run_builtin(101, driver.activate("101"), program)
        driver.deactivate("101")
        driver.snapshot("101", f"s{number}", {}, worker)
    driver.compact("101", worker)
    program = {"builtin": "setup", "append": [{"path": "/etc/log", "line": "last", "mode": 0o644}]}
    jobs.run_builtin(101, driver.activate("101"), program)
    assert Path(upper(driver), "etc/log").read_text() == "0\n1\n2\nlast\n"


def test_a_destroyed_volume_leaves_no_thread_that_measures_it(small_pool, jobs) -> None:
    driver = prepared(small_pool)
    create(driver, jobs)
    driver.usage("101")
    driver.destroy("101")
    wait_until(lambda: all(thread.name != "volume-sizes" for thread in threading.enumerate()))


def test_a_setuid_file_in_an_upper_is_out_of_reach_of_the_hosts_users(layout, jobs) -> None:
    driver = prepared(layout.pool)
    create(driver, jobs)
    path = f"{upper(driver)}/su"
    Path(path).write_bytes(b"#!/bin/sh\n")
    os.chmod(path, 0o4755)
    argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "test", "-e", path]
    assert subprocess.run(argv, check=False).returncode == 1


# What runs.


class Between:
    """A worker that lets things happen before and after the first copy."""

    def __init__(self, worker: TreeWorker) -> None:
        self._worker = worker
        self.before = self.after = lambda: None

    def copy(
        self, source: RootSpec, target: str, *, in_use: bool = False, changed_since_s: float | None = None
    ) -> None:
        if changed_since_s is None:
            self.before()
        self._worker.copy(source, target, in_use=in_use, changed_since_s=changed_since_s)
        if changed_since_s is None:
            self.after()

    def merge(self, directory, layers, target, below=None) -> None:
        self._worker.merge(directory, layers, target, below)


def kept(driver: OverlayDriver, name: str = "one") -> str:
    layer = driver.layers.kept("101", driver.records.snapshot("101", name))[0]
    return f"{driver.layers.path('101', layer)}/rootfs"


def assert_same(driver: OverlayDriver) -> None:
    assert difference(describe(upper(driver), without=MARKS), describe(kept(driver))) == {}


def test_what_runs_is_kept_with_everything_that_can_be_in_it(pool) -> None:
    pool.create("101")
    pool.driver.activate("101")
    root = upper(pool.driver)
    everything(root)
    pool.driver.snapshot("101", "one", {}, pool.worker, contextlib.nullcontext)
    assert_same(pool.driver)
    assert os.stat(f"{kept(pool.driver)}/holes").st_blocks * 512 < MIB
    # And the volume goes on with the upper it had.
    assert upper(pool.driver) == root


def test_what_changes_while_it_is_copied_is_kept_as_it_is_in_the_pause(pool) -> None:
    pool.create("101")
    pool.driver.activate("101")
    root = upper(pool.driver)
    everything(root)
    worker = Between(pool.worker)
    worker.after = lambda: change_everything(root)
    pool.driver.snapshot("101", "one", {}, worker, contextlib.nullcontext)
    assert_same(pool.driver)


def test_pages_written_again_are_kept_though_no_time_of_their_file_changes(pool) -> None:
    pool.create("101")
    pool.driver.activate("101")
    root = upper(pool.driver)
    files = {}
    for name in ("before", "during"):
        Path(root, name).write_bytes(bytes(8192))
        file_fd = os.open(f"{root}/{name}", os.O_RDWR)
        files[name] = mmap.mmap(file_fd, 8192)
        os.close(file_fd)
    # Dirty since long before all begins.
    files["before"][0:5] = b"early"
    dirty_s = os.stat(f"{root}/before").st_ctime
    wait_until(lambda: _now_s(root) > dirty_s + 3, 10)
    worker = Between(pool.worker)

    def dirty() -> None:
        files["during"][0:5] = b"early"

    times = []

    def again() -> None:
        times.append(os.stat(f"{root}/during").st_mtime_ns)
        for mapping in files.values():
            mapping[4096:4100] = b"late"
            mapping[0:5] = b"late!"

    worker.before, worker.after = dirty, again
    pool.driver.snapshot("101", "one", {}, worker, contextlib.nullcontext)
    # The first page of this one stayed dirty: writing to it again left the time alone, at least once.
    assert times
    for name in files:
        assert Path(kept(pool.driver), name).read_bytes()[:5] == b"late!", name
        assert Path(kept(pool.driver), name).read_bytes()[4096:4100] == b"late", name
    assert_same(pool.driver)
    for mapping in files.values():
        mapping.close()


def test_files_whose_size_and_time_say_nothing_are_kept_as_they_are(pool) -> None:
    pool.create("101")
    pool.driver.activate("101")
    root = upper(pool.driver)
    for directory in ("old", "new"):
        os.makedirs(f"{root}/{directory}/deep")
        for path in ("file", "deep/file"):
            Path(root, directory, path).write_text(directory)
            os.utime(f"{root}/{directory}/{path}", ns=(1, 1))
    Path(root, "back").write_text("one")
    os.utime(f"{root}/back", ns=(1, 1))
    # So that none of it has changed in the second in which the copy begins.
    began_s = os.stat(f"{root}/back").st_ctime
    wait_until(lambda: _now_s(root) > began_s + 3, 10)

    def swap() -> None:
        os.rename(f"{root}/old", f"{root}/other")
        os.rename(f"{root}/new", f"{root}/old")
        os.rename(f"{root}/other", f"{root}/new")
        Path(root, "back").write_text("two")
        os.utime(f"{root}/back", ns=(1, 1))

    worker = Between(pool.worker)
    worker.after = swap
    pool.driver.snapshot("101", "one", {}, worker, contextlib.nullcontext)
    assert Path(kept(pool.driver), "old/deep/file").read_text() == "new"
    assert_same(pool.driver)


def _now_s(root: str) -> float:
    Path(root, "clock").write_text("")
    return os.stat(f"{root}/clock").st_ctime


def test_files_that_come_and_go_do_not_stop_a_copy(pool) -> None:
    pool.create("101")
    pool.driver.activate("101")
    root = upper(pool.driver)
    os.mkdir(f"{root}/busy")
    stopped = threading.Event()

    def churn() -> None:
        number = 0
        while not stopped.is_set():
            number += 1
            Path(root, f"busy/{number}").write_text("x" * 100)
            if number > 200:
                os.unlink(f"{root}/busy/{number - 200}")

    thread = threading.Thread(target=churn)
    thread.start()

    @contextlib.contextmanager
    def pause() -> Iterator[None]:
        stopped.set()
        thread.join()
        yield

    try:
        pool.driver.snapshot("101", "one", {}, pool.worker, pause)
    finally:
        stopped.set()
        thread.join()
    assert_same(pool.driver)


def test_a_copy_that_does_not_fit_leaves_nothing(pool) -> None:
    pool.create("101")
    pool.driver.activate("101")
    root = upper(pool.driver)
    Path(root, "large").write_bytes(os.urandom(200 * MIB))
    with pytest.raises(NoSpace):
        pool.driver.snapshot("101", "one", {}, pool.worker, contextlib.nullcontext)
    assert pool.driver.snapshots("101") == []
    assert len(os.listdir(f"{pool.directory}/uppers")) == 1
    assert os.stat(f"{root}/large").st_size == 200 * MIB


# Limits.


def test_a_limit_comes_and_goes_with_all_that_is_there(pool) -> None:
    pool.create("101")
    everything(upper(pool.driver))
    pool.snapshot("101", "free")
    pool.write("101", "later", "x")
    with pool.driver.opened("101") as view, storage.shown(view) as root:
        wanted = describe(root)
    pool.driver.resize("101", 64 * MIB, pool.worker)
    assert pool.driver.size("101") == 64 * MIB
    with pool.driver.opened("101") as view, storage.shown(view) as root:
        assert difference(wanted, describe(root)) == {}
    with pool.opened("101") as root, pytest.raises(OSError, match="No space left"):
        Path(root, "large").write_bytes(os.urandom(80 * MIB))
    with pool.opened("101") as root:
        os.unlink(f"{root}/large")
        os.utime(root, ns=(1, wanted["."][4]))
    pool.snapshot("101", "limited")
    pool.driver.resize("101", None, pool.worker)
    assert pool.driver.size("101") is None
    pool.restart()
    for snapshot, name in (("free", "plain"), ("limited", "later")):
        assert pool.read("101", name, snapshot=snapshot)
    with pool.driver.opened("101") as view, storage.shown(view) as root:
        assert difference(wanted, describe(root)) == {}
    with pytest.raises(Refused, match="limited"):
        pool.driver.resize("101", 64 * MIB, pool.worker)
    # The image goes with the last snapshot that lies in it.
    image = f"{pool.directory}/volumes/101/disk.img"
    assert os.path.exists(image)
    pool.driver.rollback("101", "limited")
    assert pool.read("101", "later") == "x"
    pool.driver.rollback("101", "free")
    pool.driver.delete_snapshot("101", "limited")
    pool.driver.empty_trash()
    assert not os.path.exists(image)
    pool.driver.resize("101", 64 * MIB, pool.worker)
    assert pool.read("101", "plain") == "plain"


def test_a_limit_below_what_is_there_is_refused_with_numbers(pool) -> None:
    pool.create("101")
    Path(upper(pool.driver), "large").write_bytes(os.urandom(60 * MIB))
    with pytest.raises(Refused, match=r"it uses 60 MiB"):
        pool.driver.resize("101", 32 * MIB, pool.worker)
    with pytest.raises(Refused, match=r"do not fit into 62 MiB"):
        pool.driver.resize("101", 62 * MIB, pool.worker)
    assert pool.driver.size("101") is None
    assert sorted(os.listdir(f"{pool.directory}/volumes/101")) == ["snapshots", "volume.json"]
    pool.driver.resize("101", 128 * MIB, pool.worker)
    with pytest.raises(Refused, match=r"need \d+ MiB"):
        pool.driver.resize("101", 32 * MIB, pool.worker)
    assert pool.driver.size("101") == 128 * MIB
    assert len(pool.read("101", "etc/motd")) == 4


def test_a_clone_may_have_a_limit_that_its_origin_has_not(pool) -> None:
    pool.create("101")
    pool.write("101", "state", "common")
    pool.driver.clone("101", "", "102", pool.worker, size_bytes=32 * MIB)
    assert pool.read("102", "state") == "common"
    with pool.opened("102") as root, pytest.raises(OSError, match="No space left"):
        Path(root, "large").write_bytes(os.urandom(48 * MIB))
    pool.driver.destroy("101")
    pool.restart()
    assert pool.read("102", "state") == "common"


def test_garbage_in_an_image_is_given_back(pool) -> None:
    pool.create("101", size_bytes=64 * MIB)
    with pool.opened("101") as root:
        Path(root, "large").write_bytes(os.urandom(40 * MIB))
    pool.snapshot("101", "one")
    pool.driver.rollback("101", "one")
    pool.driver.delete_snapshot("101", "one")
    pool.driver.create("102", pool.base, pool.worker, size_bytes=64 * MIB)
    pool.driver.snapshot("102", "empty", {}, pool.worker)
    with pool.opened("102") as root:
        Path(root, "large").write_bytes(os.urandom(40 * MIB))
    pool.driver.rollback("102", "empty")
    pool.driver.empty_trash()
    with pool.opened("102") as root:
        Path(root, "large").write_bytes(os.urandom(40 * MIB))
    # What a volume still stands on is no garbage, whatever became of its snapshots.
    with pool.opened("101") as root:
        assert os.stat(f"{root}/large").st_size == 40 * MIB


def test_layers_in_an_image_are_merged_there(pool) -> None:
    pool.create("101", size_bytes=64 * MIB)
    for number in range(20):
        pool.write("101", f"file-{number}", str(number))
        pool.snapshot("101", f"s{number}")
    pool.driver.compact("101", pool.worker)
    pool.driver.empty_trash()
    assert len(pool.driver.activate("101").lowers) <= 16
    pool.driver.deactivate("101")
    for number in range(20):
        assert pool.read("101", f"file-{number}") == str(number)
        assert pool.read("101", f"file-{number}", snapshot=f"s{number}") == str(number)
        assert pool.read("101", f"file-{number + 1}", snapshot=f"s{number}") == ""
    with pytest.raises(SysctrError):
        pool.driver.snapshot("101", "s1", {}, pool.worker)
