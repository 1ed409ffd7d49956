"""Volumes of the overlay driver, as far as no mount is needed."""

import os
import threading

import pytest

from sysctr.errors import NotFound, Refused, SysctrError, UsageError, WrongState
from sysctr.storage.overlay import OverlayDriver
from sysctr.storage.tree import Trash
from tests.wait import wait_until


@pytest.fixture
def driver(tmp_path) -> OverlayDriver:
    made = OverlayDriver(str(tmp_path / "pool"))
    made.prepare()
    os.makedirs(f"{made.layers}/base/rootfs/etc")
    os.makedirs(f"{made.layers}/more/rootfs")
    return made


def left(driver: OverlayDriver) -> set[str]:
    return set(os.listdir(driver.volumes))


def test_a_volume_is_made_and_says_how_it_is_mounted(driver) -> None:
    umask = os.umask(0o077)
    try:
        driver.create("101", ("more", "base"))
    finally:
        os.umask(umask)
    spec = driver.mount_spec("101")
    assert spec.lowers == ("more/rootfs", "base/rootfs")
    assert spec.layers_directory == driver.layers
    assert os.stat(f"{spec.volume_directory}/{spec.upper}").st_mode & 0o7777 == 0o755
    assert os.path.isdir(f"{spec.volume_directory}/{spec.work}")
    assert driver.list() == ["101"]
    assert driver.exists("101")
    assert driver.layer_users() == {"more": ("101",), "base": ("101",)}


def test_nothing_above_an_upper_lets_others_in(driver) -> None:
    driver.create("101", ("base",))
    for path in (driver.pool, driver.volumes, driver.layers, f"{driver.volumes}/101"):
        assert os.stat(path).st_mode & 0o777 == 0o700


def test_a_volume_is_never_made_twice(driver) -> None:
    driver.create("101", ("base",))
    with pytest.raises(WrongState, match="exists already"):
        driver.create("101", ("base",))
    assert left(driver) == {"101"}


def test_of_many_makers_of_one_volume_one_wins(driver) -> None:
    outcomes = []
    gate = threading.Barrier(8)

    def make() -> None:
        gate.wait()
        try:
            driver.create("101", ("base",))
            outcomes.append("made")
        except WrongState:
            outcomes.append("refused")

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["made"] + ["refused"] * 7
    assert left(driver) == {"101"}


@pytest.mark.parametrize("layers", [(), ("gone",), ("../base",), ("base", "gone"), ("base",) * 501])
def test_layers_that_cannot_be_leave_nothing(driver, layers) -> None:
    with pytest.raises(SysctrError):
        driver.create("101", layers)
    assert left(driver) == set()


def test_a_layer_that_goes_while_a_volume_is_made_takes_the_volume_with_it(driver, monkeypatch) -> None:
    rename = os.rename

    def remove_layer_first(source: str, target: str) -> None:
        if target == f"{driver.volumes}/101":
            rename(f"{driver.layers}/base", f"{driver.layers}/.removed")
        rename(source, target)

    monkeypatch.setattr(os, "rename", remove_layer_first)
    with pytest.raises(NotFound, match="no layer base"):
        driver.create("101", ("base",))
    assert left(driver) == set()


@pytest.mark.parametrize("name", ["", "..", "a/b", "../x", ".hidden", "A", "a\n"])
def test_a_name_that_is_a_path_is_refused(driver, name: str) -> None:
    for action in (driver.destroy, driver.mount_spec, lambda name: driver.create(name, ("base",))):
        with pytest.raises(UsageError):
            action(name)


def test_destroying_is_a_rename_and_may_be_repeated(driver) -> None:
    driver.create("101", ("base",))
    driver.destroy("101")
    assert driver.list() == []
    assert len(os.listdir(driver.trash.directory)) == 1
    driver.destroy("101")
    driver.empty_trash()
    assert os.listdir(driver.trash.directory) == []


def test_a_volume_is_destroyed_though_its_record_is_damaged(driver) -> None:
    driver.create("101", ("base",))
    with open(f"{driver.volumes}/101/volume.json", "w") as file:
        file.write("{")
    with pytest.raises(SysctrError, match="damaged"):
        driver.mount_spec("101")
    with pytest.raises(SysctrError, match="damaged"):
        driver.layer_users()
    driver.destroy("101")
    assert driver.layer_users() == {}


def test_the_trash_takes_trees_deeper_than_any_path(driver) -> None:
    driver.create("101", ("base",))
    fd = os.open(f"{driver.volumes}/101/upper", os.O_RDONLY)
    for _ in range(2500):
        os.mkdir("deep", dir_fd=fd)
        below = os.open("deep", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    assert driver.measure("101") > 2500 * 4096
    driver.destroy("101")
    driver.empty_trash()
    assert os.listdir(driver.trash.directory) == []


def test_emptying_the_trash_never_follows_a_symlink(driver, tmp_path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("")
    driver.create("101", ("base",))
    os.symlink(tmp_path / "precious", f"{driver.volumes}/101/upper/link")
    driver.destroy("101")
    driver.empty_trash()
    assert (tmp_path / "precious" / "file").exists()


def test_a_missing_trash_does_not_keep_a_tree(tmp_path) -> None:
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    Trash(str(tmp_path / "gone")).throw(str(tmp_path / "tree"))
    assert not (tmp_path / "tree").exists()


def test_what_a_crash_left_half_made_is_swept(driver) -> None:
    driver.create("101", ("base",))
    os.makedirs(f"{driver.volumes}/.new-102-abcd/upper")
    driver.sweep()
    assert left(driver) == {"101"}


def test_a_pool_that_is_a_symlink_is_refused(tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pool").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="symlink"):
        OverlayDriver(str(tmp_path / "pool")).prepare()
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_file_in_the_place_of_a_directory_is_named(tmp_path) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "volumes").write_text("")
    with pytest.raises(Refused, match="volumes"):
        OverlayDriver(str(tmp_path / "pool")).prepare()


def test_usage_is_told_from_memory_and_measured_in_the_background(driver) -> None:
    driver.create("101", ("base",))
    with open(f"{driver.volumes}/101/upper/file", "wb") as file:
        file.write(b"x" * 1_000_000)
    assert driver.usage("101") is None
    assert wait_until(lambda: driver.usage("101")) >= 1_000_000
    driver.destroy("101")
    assert driver.usage("101") is None
    with pytest.raises(NotFound):
        driver.measure("101")
