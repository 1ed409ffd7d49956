"""The state on disk: numbers, names and ids are one container's; damage stays put, crashes are seen."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.config import schema, toml, values
from sysctr.engine.ids import BLOCK, IdPool
from sysctr.engine.record import Record, Saved, format_record, new_record, parse_record
from sysctr.engine.state import Store
from sysctr.errors import ConfigError, NoSpace, NotFound, SysctrError, UsageError, WrongState
from sysctr.linux import files
from sysctr.paths import Layout

ROOT = Path(__file__).resolve().parents[2]


def _store(root: Path) -> Store:
    (root / "ids").mkdir(exist_ok=True)
    names = (f"{root}/ids/{name}" for name in ("subuid", "subgid", "passwd", "group"))
    pool = IdPool("sysctr-test", *names)
    pool.register(64 * BLOCK)
    return Store(Layout(str(root)), pool)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = _store(tmp_path)
    yield made
    made.close()


def _text(name: str, **more: object) -> str:
    return toml.new_text(schema.parse_config({"name": name, "template": "debian-12", **more}))


def _make(store: Store, name: str, wanted_id: int | None = None) -> Record:
    number = store.reserve(name, wanted_id)
    store.create(new_record(number, _text(name), store.allocate_ids(number)))
    return store.load(number)


def _config_path(store: Store, number: int) -> Path:
    return Path(store.layout.container_config(number))


def _record_path(store: Store, number: int) -> Path:
    return Path(store.layout.container_dir(number), "record.json")


def _nothing_is_left(store: Store) -> bool:
    left = [os.listdir(store.layout.container_configs), os.listdir(store.layout.containers)]
    return left == [[], [".reserved"]] and not os.listdir(f"{store.layout.containers}/.reserved")


def test_a_container_is_there_for_another_store(store: Store, tmp_path: Path) -> None:
    made = _make(store, "web")
    assert made.id == 100
    assert made.name == "web"
    assert made.generation == 1
    assert made.template == "debian-12"
    assert made.idmap_count == BLOCK
    assert not made.error
    again = _store(tmp_path)
    assert again.list() == (made,)
    assert again.find("web") == again.find("100") == again.find(100) == made
    assert _config_path(store, 100).stat().st_mode & 0o777 == 0o600
    assert os.stat(store.layout.containers).st_mode & 0o777 == 0o700


def test_numbers_are_the_lowest_free_ones(store: Store) -> None:
    assert [_make(store, name).id for name in ("a", "b", "c")] == [100, 101, 102]
    store.delete(101)
    assert store.next_id() == 101
    assert _make(store, "d", 300).id == 300
    assert _make(store, "e").id == 101


def test_what_is_taken_is_refused(store: Store) -> None:
    _make(store, "web", 150)
    with pytest.raises(WrongState, match="the number is taken"):
        store.reserve("other", 150)
    with pytest.raises(WrongState, match="container 150 has it"):
        store.reserve("web")
    held = store.reserve("soon")
    with pytest.raises(WrongState, match="in the making"):
        store.reserve("soon")
    with pytest.raises(WrongState, match="the number is taken"):
        store.reserve("other", held)
    for name, number in (("UPPER", None), ("ok", 99), ("ok", 10000)):
        with pytest.raises(ConfigError):
            store.reserve(name, number)


def test_numbers_can_be_used_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "LAST_CONTAINER_ID", 101)
    _make(store, "a")
    _make(store, "b")
    with pytest.raises(NoSpace, match="all numbers up to 101"):
        store.reserve("c")


def test_a_reservation_is_not_listed_and_leaves_nothing(store: Store) -> None:
    number = store.reserve("web")
    store.allocate_ids(number)
    assert store.list() == ()
    with pytest.raises(NotFound):
        store.load(number)
    store.release(number)
    assert _nothing_is_left(store)
    assert _make(store, "web").id == number


def test_a_failed_creation_is_released_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    number = store.reserve("web")
    record = new_record(number, _text("web"), store.allocate_ids(number))
    real = files.write_atomically

    def full(path: str, data: bytes, mode: int = 0o600) -> None:
        if path.endswith(".toml"):
            raise OSError(28, "No space left on device")
        real(path, data, mode)

    monkeypatch.setattr(files, "write_atomically", full)
    with pytest.raises(NoSpace, match=f"cannot create {number}: No space left"):
        store.create(record)
    assert store.list() == ()
    store.release(number)
    assert _nothing_is_left(store)


def test_only_what_is_reserved_is_created_or_released(store: Store) -> None:
    made = _make(store, "web")
    with pytest.raises(ValueError, match="not reserved"):
        store.create(made)
    with pytest.raises(WrongState, match="not reserved"):
        store.release(made.id)
    assert store.load(made.id) == made


def test_a_living_holder_keeps_its_reservation(store: Store, tmp_path: Path) -> None:
    number = store.reserve("web")
    other = _store(tmp_path)
    assert other.stale_reservations() == ()
    with pytest.raises(WrongState, match="another process"):
        other.release(number)
    with pytest.raises(WrongState):
        other.reserve("web")
    store.close()
    assert [(stale.id, stale.name) for stale in other.stale_reservations()] == [(number, "web")]
    other.release(number)
    assert other.stale_reservations() == ()
    assert _nothing_is_left(other)


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.unit import test_state as this
store = this._store(Path(sys.argv[2]))
exec(sys.argv[3])
"""


def _child(root: Path, code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(ROOT), str(root), code], stdout=subprocess.PIPE)


def test_a_reservation_of_a_killed_process_is_found_and_taken_back(store: Store, tmp_path: Path) -> None:
    code = (
        "n = store.reserve('web'); store.allocate_ids(n); print(n, flush=True); import signal; signal.pause()"
    )
    with _child(tmp_path, code) as child:
        number = int(child.stdout.readline())
        assert store.stale_reservations() == ()
        child.send_signal(signal.SIGKILL)
    assert [stale.id for stale in store.stale_reservations()] == [number]
    # Not cleaned up yet, so its ids are not another's.
    mine = _make(store, "mine")
    stale_first = int(Path(store.layout.container_dir(number), "idmap").read_text().split()[0])
    assert mine.idmap_first != stale_first
    store.release(number)
    assert [record.id for record in store.list()] == [mine.id]


def test_threads_and_processes_share_nothing(store: Store, tmp_path: Path) -> None:
    code = "[this._make(store, f'p{n}') for n in range(8)]"
    made: list[Record] = []
    refused: list[str] = []

    def create(thread: int) -> None:
        for turn in range(4):
            made.append(_make(store, f"t{thread}-{turn}"))
        try:
            _make(store, "wanted-by-all", 500)
        except WrongState as error:
            refused.append(error.message)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(3)]
    with _child(tmp_path, code) as child:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        child.communicate()
    assert child.returncode == 0
    records = store.list()
    assert len(records) == 3 * 4 + 8 + 1
    assert len(refused) == 2
    assert len({record.name for record in records}) == len(records)
    assert len({record.idmap_first for record in records}) == len(records)
    assert not any(record.error for record in records)


def test_ids_come_back_with_the_container_and_not_before(store: Store) -> None:
    one, two = _make(store, "one"), _make(store, "two")
    store.delete(one.id)
    number = store.reserve("three")
    assert store.allocate_ids(number).first == one.idmap_first
    other = store.reserve("four")
    assert store.allocate_ids(other, 2 * BLOCK).first == two.idmap_first + BLOCK


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "config-is-no-toml": lambda config, record: config.write_text("= broken"),
    "config-is-binary": lambda config, record: config.write_bytes(b"schema = 1\nname = '\xff'\n"),
    "config-has-an-unknown-key": lambda config, record: config.write_text(
        'schema = 1\nname = "bad"\nx = 1\n'
    ),
    "config-is-newer": lambda config, record: config.write_text('schema = 99\nname = "bad"\n'),
    "config-is-gone": lambda config, record: config.unlink(),
    "config-is-a-directory": lambda config, record: (config.unlink(), config.mkdir()),
    "config-is-a-fifo": lambda config, record: (config.unlink(), os.mkfifo(config)),
    "config-is-a-dangling-link": lambda config, record: (config.unlink(), config.symlink_to("nowhere")),
    "record-is-empty": lambda config, record: record.write_text(""),
    "record-is-gone": lambda config, record: record.unlink(),
    "record-is-a-directory": lambda config, record: (record.unlink(), record.mkdir()),
    "record-is-another-ones": lambda config, record: record.write_text(
        json.dumps(json.loads(record.read_text()) | {"id": 7})
    ),
    "record-is-newer": lambda config, record: record.write_text('{"schema": 99}'),
    "both-are-gone": lambda config, record: (config.unlink(), record.unlink()),
    "directory-is-gone": lambda config, record: (
        record.unlink(),
        (record.parent / "idmap").unlink(),
        record.parent.rmdir(),
    ),
    "directory-is-a-file": lambda config, record: (
        record.unlink(),
        (record.parent / "idmap").unlink(),
        record.parent.rmdir(),
        record.parent.write_text(""),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_container_is_listed_beside_the_others_and_can_be_deleted(store: Store, damage) -> None:
    good, bad, last = _make(store, "good"), _make(store, "bad"), _make(store, "last")
    damage(_config_path(store, bad.id), _record_path(store, bad.id))
    listed = store.list()
    assert [record.id for record in listed] == [good.id, bad.id, last.id]
    assert [bool(record.error) for record in listed] == [False, True, False]
    assert listed[1].error.isprintable()
    with pytest.raises(WrongState, match=f"cannot start {bad.id}: "):
        listed[1].usable("start")
    # Its number and its ids stay its own meanwhile.
    more = _make(store, "more")
    assert more.id == 103
    if listed[1].idmap_first:
        assert more.idmap_first not in (good.idmap_first, bad.idmap_first, last.idmap_first)
    store.delete(bad.id)
    assert [record.id for record in store.list()] == [good.id, last.id, more.id]
    assert not os.path.lexists(_config_path(store, bad.id))
    assert _make(store, "bad").id == bad.id


def test_the_ids_of_a_damaged_record_are_not_given_away(store: Store) -> None:
    bad = _make(store, "bad")
    _record_path(store, bad.id).write_text("{")
    assert store.load(bad.id).idmap_first == bad.idmap_first
    assert _make(store, "other").idmap_first == bad.idmap_first + BLOCK


def test_a_damaged_record_is_never_written_over(store: Store) -> None:
    bad = _make(store, "bad")
    _record_path(store, bad.id).write_text("{")
    with pytest.raises(WrongState, match="not JSON"):
        store.update(bad.id, generation=2)
    assert _record_path(store, bad.id).read_text() == "{"


def test_an_administrators_edit_is_seen_at_once(store: Store) -> None:
    made = _make(store, "web")
    for pids in range(16, 40):
        # Rewritten in place, with the same size: only the time tells.
        _config_path(store, made.id).write_text(_text("web", limits={"pids": pids}))
        assert store.load(made.id).usable("start").limits.pids == pids


def test_two_edits_within_a_tick_of_the_clock_are_both_seen(store: Store) -> None:
    made = _make(store, "web")
    # As young as it can be, so that the test needs no luck: same inode, size and time for every edit.
    tick_ns = time.time_ns() + 10**9
    for pids in (20, 30, 40):
        _config_path(store, made.id).write_text(_text("web", limits={"pids": pids}))
        os.utime(_config_path(store, made.id), ns=(tick_ns, tick_ns))
        assert store.load(made.id).usable("start").limits.pids == pids


def test_a_file_that_did_not_change_is_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _make(store, "web")
    past = time.time() - 60
    for path in (_config_path(store, made.id), _record_path(store, made.id)):
        os.utime(path, (past, past))
    first = store.list()

    def refuse(*_: object) -> None:
        raise AssertionError("a file was read again")

    monkeypatch.setattr(files, "read_bounded", refuse)
    assert store.list() == first
    assert store.load(made.id) == first[0]


def test_a_name_that_was_edited_into_anothers_is_told(store: Store) -> None:
    one, two = _make(store, "one"), _make(store, "two")
    _config_path(store, one.id).write_text(_text("two"))
    assert "the name two is another's" in store.list()[0].error
    assert "the name two is another's" in store.load(one.id).error
    assert not store.load(two.id).error
    with pytest.raises(UsageError, match="100 and 101 have this name"):
        store.find("two")
    store.save_config(one.id, _text("three"))
    assert [(record.name, record.error) for record in store.list()] == [("three", ""), ("two", "")]


def test_a_configuration_is_replaced_only_where_nobody_else_changed_it(store: Store) -> None:
    made = _make(store, "web")
    changed = store.save_config(made.id, _text("web", onboot=True), made.digest)
    assert changed.config.onboot
    with pytest.raises(WrongState, match="changed meanwhile"):
        store.save_config(made.id, _text("web"), made.digest)
    with pytest.raises(ConfigError):
        store.save_config(made.id, "schema = 1\nname = 3\n")
    assert store.load(made.id) == changed


def test_a_damaged_configuration_is_mended_by_saving_one(store: Store) -> None:
    made = _make(store, "web")
    _config_path(store, made.id).write_text("=")
    store.save_config(made.id, _text("web"))
    assert store.load(made.id).error == ""


def test_a_rename_takes_the_new_name_and_frees_the_old(store: Store) -> None:
    one, two = _make(store, "one"), _make(store, "two")
    with pytest.raises(WrongState, match="container 101 has it"):
        store.save_config(one.id, _text("two"))
    store.save_config(one.id, _text("three"))
    assert store.find("three").id == one.id
    assert json.loads(_record_path(store, one.id).read_text())["name"] == "three"
    assert _make(store, "one").id == 102
    assert store.find("two").id == two.id


def test_changes_of_a_record_by_many_threads_all_stay(store: Store) -> None:
    made = _make(store, "web")
    changes = [
        {"generation": 5},
        {"boot_config": "x"},
        {"addresses": ("10.0.0.2",)},
        {"exit": {"reason": "halt", "status": 0}},
        {"volume": "v"},
    ]
    threads = [threading.Thread(target=store.update, args=(made.id,), kwargs=change) for change in changes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = store.load(made.id)
    assert all(getattr(record, key) == value for change in changes for key, value in change.items())


def test_what_is_gone_is_not_found(store: Store) -> None:
    made = _make(store, "web")
    store.delete(made.id)
    assert _nothing_is_left(store)
    for call in (store.load, store.delete, store.update, store.find):
        with pytest.raises(NotFound):
            call(made.id)
    with pytest.raises(NotFound):
        store.save_config(made.id, _text("web"))
    with pytest.raises(NotFound):
        store.find("web")


def test_deleting_takes_all_that_lies_beside_the_record(store: Store, tmp_path: Path) -> None:
    made = _make(store, "web")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    directory = Path(store.layout.container_dir(made.id))
    (directory / "log").mkdir()
    (directory / "log" / "console").write_text("")
    (directory / "link").symlink_to(outside)
    store.delete(made.id)
    assert not directory.exists()
    assert (outside / "kept").exists()


def test_deleting_works_on_a_full_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _make(store, "web")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    store.delete(made.id)
    assert _nothing_is_left(store)


def test_a_deletion_that_fails_can_be_tried_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _make(store, "web")

    def broken(path: str) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("sysctr.engine.state._remove_tree", broken)
        with pytest.raises(SysctrError, match="cannot delete 100: Input/output error"):
            store.delete(made.id)
    assert [record.id for record in store.list()] == [made.id]
    store.delete(made.id)
    assert _nothing_is_left(store)


def test_a_record_without_later_fields_has_their_defaults() -> None:
    saved = Saved(101, "u", "web", 1.5, 1000000, BLOCK)
    mapping = json.loads(format_record(saved))
    for name in ("generation", "template", "volume", "boot_config", "addresses", "exit"):
        del mapping[name]
    assert parse_record(101, json.dumps(mapping).encode()) == saved


@given(
    st.builds(
        Saved,
        st.just(101),
        st.text(min_size=1),
        st.text(),
        st.floats(0, 2**40),
        st.integers(1, 2**31),
        st.just(BLOCK),
        st.integers(),
        st.text(),
        st.text(),
        st.text(),
        st.text(),
        st.lists(st.text()).map(tuple),
        st.none() | st.fixed_dictionaries({"reason": st.text(), "status": st.integers()}),
    )
)
def test_records_go_there_and_back(saved: Saved) -> None:
    assert parse_record(101, format_record(saved)) == saved


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.dictionaries(
    st.sampled_from(["id", "uuid", "name", "created", "idmap_first", "idmap_count", "addresses", "exit"]),
    JSON,
)


@given(st.binary(max_size=40) | FIELDS.map(lambda known: json.dumps({"schema": 1, **known}).encode()))
def test_any_record_is_read_or_refused(data: bytes) -> None:
    try:
        parsed = parse_record(101, data)
    except ConfigError:
        return
    assert parsed.id == 101
