"""The records of volumes and snapshots that all drivers share."""

import json
import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sysctr.errors import NotFound, Refused, SysctrError, UsageError, WrongState
from sysctr.storage.sizes import Sizes
from sysctr.storage.volumes import VolumeRecord, VolumeRecords, check_snapshot, check_volume
from tests.wait import wait_until


@pytest.fixture
def records(tmp_path) -> VolumeRecords:
    made = VolumeRecords(str(tmp_path / "pool"))
    made.prepare()
    return made


def make(records: VolumeRecords, volume: str = "101", **fields: object) -> None:
    with records.making(volume, f"create volume {volume}") as hidden:
        records.write_in(hidden, VolumeRecord(fields=fields))


def take(records: VolumeRecords, name: str, **fields: object) -> None:
    """Take a snapshot as a driver does: its record, then the volume goes back to it."""
    taken = records.new_snapshot("101", name, {"why": name}, fields)
    records.write_snapshot("101", taken)
    now = records.read("101")
    parents = ((name, taken.created), *taken.parents)
    records.write("101", VolumeRecord(now.size_bytes, parents, now.note, now.fields))


@settings(deadline=None)
@given(st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?", fullmatch=True))
def test_names_of_snapshots_are_also_names_of_files(name: str) -> None:
    if name == "now":
        with pytest.raises(UsageError):
            check_snapshot(name)
        return
    assert check_snapshot(name) == check_volume(name) == name
    assert os.path.basename(name) == name
    assert len(os.fsencode(f"{name}.json")) <= 255


@settings(deadline=None)
@given(st.text(max_size=80))
def test_what_could_lead_elsewhere_is_no_name(name: str) -> None:
    for check in (check_snapshot, check_volume):
        try:
            check(name)
        except UsageError:
            pass
        else:
            assert name.isascii()
            assert "/" not in name
            assert not name.startswith((".", "-", "_"))
            assert 0 < len(name) <= 63
            assert name == name.strip().lower()


@pytest.mark.parametrize("name", ["", "now", ".", "..", "a/b", "A", "a ", "a\n", "a.", "-a", "a" * 64, "ä"])
def test_a_name_that_no_snapshot_has_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        check_snapshot(name)


notes = st.dictionaries(
    st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)
)


@settings(deadline=None)
@given(note=notes, size=st.none() | st.integers(min_value=1, max_value=1 << 60))
def test_a_record_comes_back_as_it_was_written(tmp_path_factory, note: dict, size: int | None) -> None:
    records = VolumeRecords(str(tmp_path_factory.mktemp("pool")))
    records.prepare()
    record = VolumeRecord(size, (("first", 12.5),), note, {"layers": ["a", "b"]})
    with records.making("101", "create volume 101") as hidden:
        records.write_in(hidden, record)
    assert records.read("101") == record
    taken = records.new_snapshot("101", "one", note, {"x": [1]})
    records.write_snapshot("101", taken)
    assert records.snapshot("101", "one") == taken


@settings(deadline=None)
@given(st.binary(max_size=200) | st.sampled_from([b"[" * 100_000, b"1", b'{"schema":true}', b'{"schema":1}']))
def test_a_damaged_record_stops_only_its_own_snapshot(tmp_path_factory, content: bytes) -> None:
    records = VolumeRecords(str(tmp_path_factory.mktemp("pool")))
    records.prepare()
    make(records)
    take(records, "good")
    with open(f"{records.directory}/101/snapshots/bad.json", "wb") as file:
        file.write(content)
    listed = {each.name: each for each in records.snapshots("101")}
    assert listed.keys() == {"good", "bad"}
    assert listed["bad"].error
    assert not listed["good"].error
    with pytest.raises(SysctrError):
        records.snapshot("101", "bad")
    records.remove_snapshot("101", "bad")
    assert [each.name for each in records.snapshots("101")] == ["good"]


def test_a_record_that_is_a_directory_or_a_fifo_can_be_deleted(records) -> None:
    make(records)
    os.makedirs(f"{records.directory}/101/snapshots/odd.json/full")
    os.mkfifo(f"{records.directory}/101/snapshots/pipe.json")
    assert [each.name for each in records.snapshots("101") if each.error] == ["odd", "pipe"]
    for name in ("odd", "pipe"):
        records.remove_snapshot("101", name)
    assert records.snapshots("101") == []


def test_a_damaged_volume_is_named_and_can_be_destroyed(records) -> None:
    make(records)
    make(records, "102")
    with open(f"{records.directory}/101/volume.json", "w") as file:
        file.write("{")
    with pytest.raises(SysctrError, match=r"volume\.json is damaged"):
        records.read("101")
    assert records.note("101") == {}
    assert records.read("102") == VolumeRecord()
    records.remove("101")
    assert records.list() == ["102"]


def test_what_a_later_version_made_is_not_guessed_at(records) -> None:
    make(records)
    with open(f"{records.directory}/101/volume.json", "w") as file:
        json.dump({"schema": 2, "note": {}}, file)
    with pytest.raises(SysctrError, match="newer sysctr"):
        records.read("101")


def test_a_snapshot_goes_back_to_the_nearest_that_exists(records) -> None:
    make(records)
    for name in ("one", "two", "three"):
        take(records, name)
    assert [(each.name, each.parent) for each in records.snapshots("101")] == [
        ("one", ""), ("two", "one"), ("three", "two"),
    ]  # fmt: skip
    assert records.parent("101") == "three"
    records.remove_snapshot("101", "two")
    assert [(each.name, each.parent) for each in records.snapshots("101")] == [("one", ""), ("three", "one")]


def test_a_name_that_is_used_again_is_not_the_old_snapshot(records) -> None:
    make(records)
    for name in ("one", "two", "three"):
        take(records, name)
    records.remove_snapshot("101", "one")
    take(records, "one")
    assert {each.name: each.parent for each in records.snapshots("101")} == {
        "two": "", "three": "two", "one": "three",
    }  # fmt: skip


def test_notes_are_replaced_and_the_rest_is_kept(records) -> None:
    make(records, layers=["x"])
    take(records, "one", layers=["y"])
    records.set_note("101", {"a": 1})
    records.set_snapshot_note("101", "one", {"b": 2})
    assert records.note("101") == {"a": 1}
    assert records.read("101").fields == {"layers": ["x"]}
    assert records.parent("101") == "one"
    (one,) = records.snapshots("101")
    assert one.note == {"b": 2}
    assert records.snapshot("101", "one").fields == {"layers": ["y"]}


def test_what_is_missing_is_named(records) -> None:
    for action in (
        lambda: records.read("101"),
        lambda: records.write("101", VolumeRecord()),
        lambda: records.snapshots("101"),
        lambda: records.snapshot("101", "one"),
        lambda: records.remove_snapshot("101", "one"),
        lambda: records.check_new_snapshot("101", "one"),
        lambda: records.set_note("101", {}),
    ):
        with pytest.raises(NotFound, match="no such volume"):
            action()
    make(records)
    for action in (
        lambda: records.snapshot("101", "one"),
        lambda: records.remove_snapshot("101", "one"),
        lambda: records.set_snapshot_note("101", "one", {}),
    ):
        with pytest.raises(NotFound, match="snapshot one of volume 101"):
            action()
    os.rename(records.pool, f"{records.pool}.away")
    with pytest.raises(NotFound, match=r"pool .* is missing"):
        make(records)


def test_no_snapshot_is_taken_twice(records) -> None:
    make(records)
    records.check_new_snapshot("101", "one")
    take(records, "one")
    with pytest.raises(WrongState, match="exists already"):
        records.check_new_snapshot("101", "one")


def test_of_many_makers_of_one_volume_one_wins(records) -> None:
    outcomes = []
    gate = threading.Barrier(8)

    def try_it() -> None:
        gate.wait()
        try:
            make(records)
            outcomes.append("made")
        except WrongState:
            outcomes.append("refused")

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["made"] + ["refused"] * 7
    assert os.listdir(records.directory) == ["101"]


def test_a_volume_whose_making_fails_is_not_there(records) -> None:
    cannot = pytest.raises(SysctrError, match="cannot create volume 101: ")
    with cannot, records.making("101", "create volume 101") as hidden:
        os.mkdir(hidden)
    assert os.listdir(records.directory) == []


def test_what_a_crash_left_is_swept(records) -> None:
    make(records)
    take(records, "one")
    os.makedirs(f"{records.directory}/.new-102-abcd/upper")
    for place in ("", "/snapshots"):
        with open(f"{records.directory}/101{place}/.x.json.0123456789ab.unfinished", "w"):
            pass
    records.sweep()
    assert os.listdir(records.directory) == ["101"]
    assert sorted(os.listdir(f"{records.directory}/101")) == ["snapshots", "volume.json"]
    assert os.listdir(f"{records.directory}/101/snapshots") == ["one.json"]


def test_a_pool_that_is_a_symlink_is_refused(tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pool").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="symlink"):
        VolumeRecords(str(tmp_path / "pool")).prepare()
    assert os.listdir(tmp_path / "elsewhere") == []


def test_nothing_above_a_volume_lets_others_in(records) -> None:
    umask = os.umask(0)
    try:
        make(records)
    finally:
        os.umask(umask)
    for path in (records.pool, records.directory, records.trash.directory, f"{records.directory}/101"):
        assert os.stat(path).st_mode & 0o777 == 0o700


def test_usage_is_told_from_memory_and_measured_in_the_background() -> None:
    asked = []

    def walk(volume: str) -> int:
        asked.append(volume)
        if volume == "bad":
            raise OSError("input/output error")
        return 7

    sizes = Sizes(walk)
    assert sizes.usage("101") is None
    assert sizes.usage("bad") is None
    assert wait_until(lambda: sizes.usage("101")) == 7
    assert asked.count("101") == 1
    sizes.forget("101")
    assert sizes.usage("101") is None
    wait_until(lambda: all(thread.name != "volume-sizes" for thread in threading.enumerate()))
