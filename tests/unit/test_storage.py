"""Volumes of the overlay driver, as far as no mount is needed."""

import json
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sysctr.errors import NotFound, Refused, SysctrError, UsageError, WrongState
from sysctr.storage.base import Base, RootSpec
from sysctr.storage.overlay import OverlayDriver
from sysctr.storage.overlay_compact import oldest, replaced, together
from sysctr.storage.tree import Trash
from tests.wait import wait_until


class PlainWorker:
    """Copies our own files with our own ids, for tests that need no job."""

    def copy(
        self, source: RootSpec, target: str, *, in_use: bool = False, changed_since_s: float | None = None
    ) -> None:
        shutil.copytree(source.trees[0].path, target, dirs_exist_ok=True)

    def merge(
        self, directory: str, layers: Sequence[str], target: str, below: RootSpec | None = None
    ) -> None:
        for layer in reversed(layers):
            shutil.copytree(f"{directory}/{layer}", f"{directory}/{target}", dirs_exist_ok=True)


WORKER = PlainWorker()


@pytest.fixture
def driver(tmp_path) -> OverlayDriver:
    made = OverlayDriver(str(tmp_path / "pool"), str(tmp_path / "run"))
    made.prepare()
    os.makedirs(f"{made.directory}/layers/base/rootfs/etc")
    return made


def create(driver: OverlayDriver, volume: str = "101", layer: str = "base") -> None:
    driver.create(volume, Base(layer, f"{driver.directory}/layers/{layer}/rootfs"), WORKER)


def upper(driver: OverlayDriver, volume: str = "101") -> str:
    chain = driver.layers.chain(volume, driver.records.read(volume))
    return f"{driver.layers.path(volume, chain.upper)}/rootfs"


def uppers(driver: OverlayDriver) -> list[str]:
    return sorted(os.listdir(f"{driver.directory}/uppers"))


def test_a_volume_is_made_and_says_how_it_is_mounted(driver) -> None:
    umask = os.umask(0o077)
    try:
        create(driver)
    finally:
        os.umask(umask)
    spec = driver.activate("101")
    assert spec.lowers == ("pool/layers/base/rootfs",)
    trees = {tree.name: tree for tree in spec.trees}
    assert trees["pool"].path == driver.directory
    assert trees["pool"].read_only
    assert not trees["volume"].read_only
    assert os.stat(f"{trees['volume'].path}/rootfs").st_mode & 0o7777 == 0o755
    assert os.path.isdir(f"{trees['volume'].path}/work")
    assert driver.list() == ["101"]
    assert driver.active() == {"101"}
    assert driver.users_of("base") == ["101"]
    driver.deactivate("101")


def test_an_empty_volume_is_a_single_tree(driver) -> None:
    driver.create("media", None, WORKER)
    spec = driver.activate("media")
    assert spec.lowers == ()
    assert [tree.path for tree in spec.trees] == [upper(driver, "media")]


def test_nothing_above_an_upper_lets_others_in(driver) -> None:
    create(driver)
    above = os.path.dirname(upper(driver))
    for path in (driver.directory, f"{driver.directory}/uppers", f"{driver.directory}/layers", above):
        assert os.stat(path).st_mode & 0o777 == 0o700


@pytest.mark.parametrize("layer", ["gone", "../base", "", "a/b"])
def test_a_template_that_cannot_be_leaves_nothing(driver, layer) -> None:
    with pytest.raises((NotFound, UsageError)):
        create(driver, layer=layer)
    assert driver.list() == []
    driver.empty_trash()
    assert uppers(driver) == []


def test_a_template_that_goes_while_a_volume_is_made_takes_the_volume_with_it(driver, monkeypatch) -> None:
    rename = os.rename

    def remove_layer_first(source: str, target: str) -> None:
        if target == f"{driver.directory}/volumes/101":
            rename(f"{driver.directory}/layers/base", f"{driver.directory}/layers/.removed")
        rename(source, target)

    monkeypatch.setattr(os, "rename", remove_layer_first)
    with pytest.raises(NotFound, match="no layer layers/base"):
        create(driver)
    assert driver.list() == []


def test_another_pool_gets_a_copy_of_the_template_and_drops_it_when_unused(driver, tmp_path) -> None:
    (tmp_path / "template" / "etc").mkdir(parents=True)
    (tmp_path / "template" / "etc" / "motd").write_text("hello")
    base = Base("debian.5f", str(tmp_path / "template"))
    for volume in ("101", "102"):
        driver.create(volume, base, WORKER)
    assert Path(driver.directory, "layers/debian.5f/rootfs/etc/motd").read_text() == "hello"
    assert driver.users_of("debian.5f") == ["101", "102"]
    driver.destroy("101")
    driver.empty_trash()
    assert sorted(os.listdir(f"{driver.directory}/layers")) == ["base", "debian.5f"]
    driver.destroy("102")
    driver.empty_trash()
    # A template of the pool's own stays, used or not.
    assert os.listdir(f"{driver.directory}/layers") == ["base"]


def test_a_snapshot_lets_the_upper_stand_and_changes_nothing_that_is_seen(driver) -> None:
    create(driver)
    before = upper(driver)
    Path(before, "file").write_text("kept")
    os.chmod(before, 0o751)
    os.chown(before, 5, 6)
    os.setxattr(before, "user.mine", b"1")
    os.setxattr(before, "user.overlay.impure", b"y")
    driver.snapshot("101", "one", {}, WORKER)
    after = upper(driver)
    assert after != before
    assert Path(before, "file").read_text() == "kept"
    status = os.stat(after)
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o751, 5, 6)
    assert os.listxattr(after) == ["user.mine"]
    assert status.st_mtime_ns == os.stat(before).st_mtime_ns


def test_layers_that_nobody_needs_go_and_the_others_stay(driver) -> None:
    create(driver)
    first = os.path.basename(os.path.dirname(upper(driver)))
    driver.snapshot("101", "one", {}, WORKER)
    driver.clone("101", "one", "102", WORKER)
    driver.rollback("101", "one")
    driver.empty_trash()
    assert len(uppers(driver)) == 3
    driver.destroy("101")
    driver.empty_trash()
    assert first in uppers(driver)
    assert driver.activate("102").lowers == (f"pool/uppers/{first}/rootfs", "pool/layers/base/rootfs")
    driver.deactivate("102")
    driver.destroy("102")
    driver.empty_trash()
    assert uppers(driver) == []


def test_what_is_mounted_is_kept_by_the_next_daemon_too(driver) -> None:
    create(driver)
    Path(upper(driver), "file").write_text("in use")
    driver.snapshot("101", "one", {}, WORKER)
    driver.activate("101")
    used = uppers(driver)
    # A merge, or damage by hand: whatever the record says later, what is mounted stays.
    record = Path(driver.records.path("101"), "volume.json")
    data = json.loads(record.read_text())
    record.write_text(json.dumps({**data, "layers": ["layers/base"]}))
    driver.delete_snapshot("101", "one")
    driver.empty_trash()
    again = OverlayDriver(driver.directory, os.path.dirname(driver.layers.active.directory))
    again.prepare()
    again.sweep()
    again.empty_trash()
    assert uppers(driver) == used
    again.deactivate("101")
    again.empty_trash()
    assert len(uppers(driver)) == 1


@pytest.mark.parametrize("damage", ["", "{", '{"schema":1}', '{"schema":1,"upper":"../x","layers":[]}'])
def test_what_a_damaged_record_may_have_named_is_kept(driver, damage) -> None:
    create(driver)
    create(driver, "103")
    driver.snapshot("101", "one", {}, WORKER)
    driver.clone("101", "one", "102", WORKER)
    before = uppers(driver)
    others = [name for name in before if name.startswith("103.")]
    Path(driver.records.path("102"), "volume.json").write_text(damage)
    driver.destroy("101")
    driver.destroy("103")
    driver.empty_trash()
    # The clone stands on the origin's first layer; the origin's own upper and what is others' may go.
    assert {name for name in before if name not in uppers(driver)} >= set(others)
    assert len([name for name in uppers(driver) if name.startswith("101.")]) == 1
    with pytest.raises(SysctrError):
        driver.activate("102")
    with pytest.raises(SysctrError, match="damaged"):
        driver.users_of("base")
    driver.destroy("102")
    driver.empty_trash()
    assert uppers(driver) == []


def test_a_damaged_snapshot_keeps_the_layers_of_its_volume(driver) -> None:
    create(driver)
    driver.snapshot("101", "one", {}, WORKER)
    driver.rollback("101", "one")
    Path(driver.records.snapshot_path("101", "one")).write_text("{")
    count = len(uppers(driver))
    driver.empty_trash()
    assert len(uppers(driver)) == count
    with pytest.raises(SysctrError, match="damaged"):
        driver.rollback("101", "one")
    driver.delete_snapshot("101", "one")
    driver.empty_trash()
    assert len(uppers(driver)) == 2


def test_the_layers_of_a_volume_being_made_are_not_collected(driver, monkeypatch) -> None:
    create(driver)
    driver.snapshot("101", "one", {}, WORKER)
    rename = os.rename
    during = []

    def collect_first(source: str, target: str) -> None:
        if target.endswith("/volumes/102"):
            during.append(uppers(driver))
            driver.layers.collect()
            during.append(uppers(driver))
        rename(source, target)

    monkeypatch.setattr(os, "rename", collect_first)
    driver.clone("101", "one", "102", WORKER)
    assert during[0] == during[1]


@pytest.mark.parametrize("name", ["", "..", "a/b", "../x", ".hidden", "A", "a\n"])
def test_a_name_that_is_a_path_is_refused(driver, name: str) -> None:
    for action in (driver.destroy, driver.activate, lambda name: create(driver, name)):
        with pytest.raises(UsageError):
            action(name)


def test_what_is_in_use_is_left_alone(driver) -> None:
    create(driver)
    driver.snapshot("101", "one", {}, WORKER)
    driver.activate("101")
    for action in (
        lambda: driver.destroy("101"),
        lambda: driver.rollback("101", "one"),
        lambda: driver.clone("101", "", "102", WORKER),
        lambda: driver.opened("101").__enter__(),
        lambda: driver.resize("101", 64 << 20, WORKER),
    ):
        with pytest.raises(WrongState, match="in use"):
            action()


def test_destroying_is_a_rename_and_may_be_repeated(driver) -> None:
    create(driver)
    driver.destroy("101")
    assert driver.list() == []
    driver.destroy("101")
    driver.empty_trash()
    assert os.listdir(f"{driver.directory}/.trash") == []


def test_the_trash_takes_trees_deeper_than_any_path(driver) -> None:
    create(driver)
    fd = os.open(upper(driver), os.O_RDONLY)
    for _ in range(2500):
        os.mkdir("deep", dir_fd=fd)
        below = os.open("deep", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    assert driver.measure("101") > 2500 * 4096
    driver.destroy("101")
    driver.empty_trash()
    assert uppers(driver) == []
    assert os.listdir(f"{driver.directory}/.trash") == []


def test_emptying_the_trash_never_follows_a_symlink(driver, tmp_path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("")
    create(driver)
    os.symlink(tmp_path / "precious", f"{upper(driver)}/link")
    driver.destroy("101")
    driver.empty_trash()
    assert (tmp_path / "precious" / "file").exists()


def test_a_missing_trash_does_not_keep_a_tree(tmp_path) -> None:
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    Trash(str(tmp_path / "gone")).throw(str(tmp_path / "tree"))
    assert not (tmp_path / "tree").exists()


def test_a_file_in_the_place_of_a_directory_is_named(tmp_path) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "uppers").write_text("")
    with pytest.raises(Refused, match="uppers"):
        OverlayDriver(str(tmp_path / "pool"), str(tmp_path / "run")).prepare()


def test_usage_is_what_belongs_to_the_volume_alone(driver) -> None:
    create(driver)
    Path(upper(driver), "file").write_bytes(b"x" * 1_000_000)
    assert driver.usage("101") is None
    assert wait_until(lambda: driver.usage("101")) >= 1_000_000
    driver.snapshot("101", "one", {}, WORKER)
    assert driver.measure("101") >= 1_000_000
    driver.clone("101", "one", "102", WORKER)
    assert driver.measure("101") < 1_000_000
    assert driver.measure("102") < 1_000_000
    driver.destroy("102")
    assert driver.usage("102") is None
    with pytest.raises(NotFound):
        driver.measure("102")


def test_two_snapshots_at_once_do_not_lose_one(driver) -> None:
    create(driver)
    threads = [
        threading.Thread(target=driver.snapshot, args=("101", f"s{number}", {}, WORKER))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {each.name for each in driver.snapshots("101")} == {f"s{number}" for number in range(8)}
    driver.empty_trash()
    lowers = driver.activate("101").lowers
    assert len(lowers) == len(set(lowers)) == 9


lists = st.lists(
    st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=8).map(
        lambda names: (*(f"uppers/{name}" for name in names), "layers/base")
    ),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(deadline=None)
@given(lists)
def test_a_run_that_is_merged_is_in_every_list_whole_or_not_at_all(everyone) -> None:
    run = together(everyone[:2], everyone)
    assert len(run) != 1
    for layers in everyone:
        parts = set(run) & set(layers)
        assert parts in (set(), set(run))
        if parts:
            first = layers.index(run[0])
            assert layers[first : first + len(run)] == run
            assert "M" in replaced(layers, run, "M")
        else:
            assert not run or replaced(layers, run, "M") == layers
    assert "layers/base" not in run


@settings(deadline=None)
@given(st.integers(min_value=17, max_value=40), st.lists(st.integers(0, 3), min_size=40, max_size=40))
def test_of_a_long_list_the_oldest_of_the_lowest_level_are_merged(length: int, numbers: list[int]) -> None:
    layers = (*[f"uppers/{number}" for number in range(length)], "layers/base")
    levels = dict(zip(layers, numbers, strict=False))
    run = oldest(layers, levels)
    assert len(run) == 8
    assert "layers/base" not in run
    level = max(levels[layer] for layer in run)
    first = layers.index(run[0])
    for other in range(length - 7):
        window = max(levels[layer] for layer in layers[other : other + 8])
        assert window > level or (window == level and other <= first)


def test_the_number_of_layers_stays_bounded_with_snapshots_kept_and_dropped(driver) -> None:
    create(driver)
    for number in range(60):
        Path(upper(driver), f"file-{number}").write_text(str(number))
        driver.snapshot("101", f"s{number}", {}, WORKER)
        driver.compact("101", WORKER)
    driver.empty_trash()
    for number in range(60):
        with driver.opened("101", f"s{number}") as view:
            assert len(view.lowers) <= 16
            seen = set()
            for lower in view.lowers:
                seen |= set(os.listdir(f"{driver.directory}{lower.removeprefix('pool')}")) - {"etc"}
            assert seen == {f"file-{each}" for each in range(number + 1)}
    for number in range(59):
        driver.delete_snapshot("101", f"s{number}")
    driver.compact("101", WORKER)
    driver.empty_trash()
    # What only the last snapshot and the volume share is one layer now.
    assert len(uppers(driver)) == 2
