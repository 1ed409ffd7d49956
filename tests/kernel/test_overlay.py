"""The overlay driver on real file systems: full, read-only, split; and what a mounted volume shows."""

import os
import stat
import subprocess
import threading
from collections.abc import Iterator

import pytest

from sysctr.errors import NoSpace, Refused, SysctrError
from sysctr.linux.mount import MNT_DETACH, MS_BIND, MS_RDONLY, MS_REMOUNT, mount, umount2
from sysctr.storage.overlay import OverlayDriver
from tests.disk import small_disk
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.kernel, pytest.mark.needs("loop")]


@pytest.fixture
def pool(tmp_path) -> Iterator[str]:
    """A pool on a file system of its own: 4 MiB, so that it can be filled."""
    path = str(tmp_path / "pool")
    os.mkdir(path)
    with small_disk(path, 4096):
        yield path


def prepared(pool: str) -> OverlayDriver:
    driver = OverlayDriver(pool)
    driver.prepare()
    os.makedirs(f"{driver.layers}/base/rootfs/etc")
    return driver


def fill(pool: str) -> None:
    with open(f"{pool}/filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def fill_inodes(directory: str) -> None:
    try:
        for number in range(100_000):
            open(f"{directory}/{number}", "x").close()
    except OSError:
        pass


@pytest.fixture
def small_pool(tmp_path) -> Iterator[str]:
    """A pool that can hold few files."""
    path = str(tmp_path / "pool")
    os.mkdir(path)
    with small_disk(path, 4096, "-N", "48"):
        yield path


def test_on_a_full_disk_nothing_is_made_and_everything_can_be_destroyed(pool) -> None:
    driver = prepared(pool)
    driver.create("101", ("base",))
    with open(f"{driver.volumes}/101/upper/data", "wb") as file:
        file.write(bytes(1024 * 1024))
    fill(pool)
    with pytest.raises(NoSpace, match="no space left"):
        driver.create("102", ("base",))
    assert os.listdir(driver.volumes) == ["101"]
    driver.destroy("101")
    driver.empty_trash()
    driver.create("102", ("base",))
    assert driver.list() == ["102"]


def test_without_inodes_nothing_is_made_and_everything_can_be_destroyed(small_pool) -> None:
    driver = prepared(small_pool)
    driver.create("101", ("base",))
    fill_inodes(f"{driver.volumes}/101/upper")
    with pytest.raises(NoSpace, match="no space left"):
        driver.create("102", ("base",))
    assert os.listdir(driver.volumes) == ["101"]
    driver.destroy("101")
    driver.empty_trash()
    driver.create("102", ("base",))


def test_a_read_only_pool_is_named(pool) -> None:
    driver = prepared(pool)
    driver.create("101", ("base",))
    mount("none", pool, None, MS_REMOUNT | MS_RDONLY)
    for action in (lambda: driver.create("102", ("base",)), lambda: driver.destroy("101"), driver.prepare):
        with pytest.raises(Refused) as caught:
            action()
        assert pool in caught.value.message
        assert "read-only" in caught.value.message
    assert driver.list() == ["101"]


def test_a_pool_over_two_file_systems_is_refused(pool) -> None:
    driver = prepared(pool)
    mount("tmpfs", driver.volumes, "tmpfs", 0, "size=1m,mode=0700")
    try:
        with pytest.raises(Refused, match="another file system"):
            driver.prepare()
    finally:
        umount2(driver.volumes)


def test_a_pool_without_extended_attributes_is_refused(tmp_path) -> None:
    # ramfs has none of the user's, as NFS and old file systems.
    path = str(tmp_path / "pool")
    os.mkdir(path)
    mount("ramfs", path, "ramfs", 0, None)
    try:
        with pytest.raises(Refused, match="extended attributes"):
            OverlayDriver(path).prepare()
        assert os.listdir(f"{path}/volumes") == []
    finally:
        umount2(path, MNT_DETACH)


def test_what_is_mounted_in_a_thrown_away_tree_survives(pool, tmp_path) -> None:
    driver = prepared(pool)
    driver.create("101", ("base",))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    target = f"{driver.volumes}/101/upper/mnt"
    os.mkdir(target)
    mount(str(precious), target, None, MS_BIND)
    driver.destroy("101")
    driver.empty_trash()
    assert (precious / "file").read_text() == "kept"
    (thrown,) = os.listdir(driver.trash.directory)
    umount2(f"{driver.trash.directory}/{thrown}/upper/mnt")
    driver.empty_trash()
    assert os.listdir(driver.trash.directory) == []


def test_a_container_writes_to_its_upper_with_its_own_ids_and_never_to_the_layer(layout, jobs) -> None:
    driver = prepared(layout.pool)
    with open(f"{driver.layers}/base/rootfs/etc/hosts", "w") as file:
        file.write("from the template\n")
    driver.create("101", ("base",))
    driver.create("102", ("base",))
    program = {
        "builtin": "setup",
        "append": [{"path": "/etc/hosts", "line": "mine", "mode": 0o644}],
        "files": [{"path": "/root/new", "text": "x", "mode": 0o600}],
    }
    jobs.run_builtin(101, driver.mount_spec("101"), program)
    upper = f"{driver.volumes}/101/upper"
    with open(f"{upper}/etc/hosts") as file:
        assert file.read() == "from the template\nmine\n"
    status = os.stat(f"{upper}/root/new")
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 0, 0o600)
    with open(f"{driver.layers}/base/rootfs/etc/hosts") as file:
        assert file.read() == "from the template\n"
    assert os.listdir(f"{driver.volumes}/102/upper") == []


def test_two_layers_show_the_upper_one_first(layout, jobs) -> None:
    driver = prepared(layout.pool)
    os.makedirs(f"{driver.layers}/top/rootfs/etc")
    for layer in ("base", "top"):
        with open(f"{driver.layers}/{layer}/rootfs/etc/which", "w") as file:
            file.write(f"{layer}\n")
    driver.create("101", ("top", "base"))
    # Appending copies the file up, and with it the text of the layer that is seen.
    program = {"builtin": "setup", "append": [{"path": "/etc/which", "line": "seen", "mode": 0o644}]}
    jobs.run_builtin(101, driver.mount_spec("101"), program)
    with open(f"{driver.volumes}/101/upper/etc/which") as file:
        assert file.read() == "top\nseen\n"


def test_a_destroyed_volume_leaves_no_thread_that_measures_it(pool) -> None:
    driver = prepared(pool)
    driver.create("101", ("base",))
    driver.usage("101")
    driver.destroy("101")
    wait_until(lambda: all(thread.name != "volume-sizes" for thread in threading.enumerate()))


def test_a_setuid_file_in_an_upper_is_out_of_reach_of_the_hosts_users(layout) -> None:
    driver = prepared(layout.pool)
    driver.create("101", ("base",))
    path = f"{driver.volumes}/101/upper/su"
    with open(path, "wb") as file:
        file.write(b"#!/bin/sh\n")
    os.chmod(path, 0o4755)
    argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "test", "-e", path]
    assert subprocess.run(argv, check=False).returncode == 1
    with pytest.raises(SysctrError):
        driver.create("101", ("base",))
