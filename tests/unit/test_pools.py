"""Pools without containers: when one is low on room, which file counts, and how a pool is known again."""

import doctest
import json
import os
from pathlib import Path

import pytest

from sysctr.engine import disks, doctor, pool_setup, pools
from sysctr.engine.pools import Pools, Room
from sysctr.errors import ConfigError, NotFound, WrongState
from sysctr.paths import Layout

ID = "0f8fad5b-d9cb-469f-a165-70867728950e"


@pytest.fixture
def where(tmp_path: Path) -> Layout:
    return Layout(str(tmp_path / "root"))


def write_file(where: Layout, name: str, path: str, id_: str = ID, extra: str = "") -> None:
    os.makedirs(where.pool_configs, exist_ok=True)
    text = f'schema = 1\ndriver = "overlay"\npath = "{path}"\nid = "{id_}"\n{extra}'
    Path(where.pool_configs, f"{name}.toml").write_text(text)


def write_marker(path: Path, id_: str = ID) -> None:
    path.mkdir(exist_ok=True)
    marker = {"schema": 1, "id": id_, "driver": "overlay", "name": "fast"}
    (path / pools.MARKER).write_text(json.dumps(marker))


@pytest.mark.parametrize(
    ("free", "inodes", "free_inodes", "was_low", "low"),
    [
        (100, 0, 0, False, False),
        (99, 0, 0, False, True),
        (119, 0, 0, True, True),
        (120, 0, 0, True, False),
        (500, 1000, 99, False, True),
        (500, 1000, 100, False, False),
        (500, 0, 0, True, False),
    ],
)
def test_low_is_less_than_a_share_and_ends_a_little_above(
    free: int, inodes: int, free_inodes: int, was_low: bool, low: bool
) -> None:
    assert Room(1000, 1000 - free, free, inodes, free_inodes).is_low(10, was_low=was_low) is low


def test_nothing_is_lower_than_no_share() -> None:
    assert not Room(1000, 1000, 0, 1000, 0).is_low(0)


def test_a_pool_is_known_by_its_mark_and_not_by_its_path(where: Layout, tmp_path: Path) -> None:
    place = tmp_path / "fast"
    write_file(where, "fast", str(place))
    known = Pools(where)
    assert known.names() == ["default", "fast"]
    problem = known.problem("fast")
    assert problem is not None
    assert (problem.state, problem.reason) == ("missing", f"pool fast is missing: {place} does not exist")
    place.mkdir()
    with pytest.raises(WrongState, match=f"cannot start 101: pool fast is missing: {place} is not mounted"):
        known.get("fast", "start 101")
    assert os.listdir(place) == [], "something was written where the pool is not"
    write_marker(place, ID.replace("0f", "ff"))
    assert "holds another pool" in known.problem("fast").reason
    (place / pools.MARKER).write_text("{")
    assert "holds another pool" in known.problem("fast").reason
    write_marker(place)
    assert known.problem("fast") is None
    assert known.get("fast").directory == str(place)


def test_files_that_come_change_and_go_are_noticed(where: Layout, tmp_path: Path) -> None:
    known = Pools(where)
    with pytest.raises(NotFound, match="cannot use pool fast: there is none of this name"):
        known.get("fast")
    with pytest.raises(NotFound, match="cannot start 101: there is no pool fast"):
        known.get("fast", "start 101")
    write_marker(tmp_path / "fast")
    write_file(where, "fast", str(tmp_path / "fast"))
    driver = known.get("fast")
    write_file(where, "fast", str(tmp_path / "fast"), extra='low_space = "3%"\n')
    assert known.settings("fast").low_space_percent == 3
    assert known.get("fast") is driver, "a driver in use was replaced"
    write_file(where, "fast", str(tmp_path / "fast"), extra='lowspace = "3%"\n')
    problem = known.problem("fast")
    assert problem.state == "damaged"
    assert "the nearest is low_space" in problem.reason
    os.unlink(f"{where.pool_configs}/fast.toml")
    assert known.names() == ["default"]


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("Fast", "{tmp}/fast", "a container name"),
        ("second", "{tmp}/first", "is that of pool first already"),
        ("second", "{tmp}/first/below", "it would lie in pool first"),
        ("second", "{tmp}", "would lie in it"),
    ],
)
def test_a_file_that_cannot_be_is_a_problem_of_its_own_pool(
    where: Layout, tmp_path: Path, name: str, path: str, words: str
) -> None:
    write_marker(tmp_path / "first")
    write_file(where, "first", str(tmp_path / "first"))
    known = Pools(where)
    assert known.problem("first") is None
    write_file(where, name, path.format(tmp=tmp_path), ID.replace("0f", "ff"))
    assert words in known.problem(name).reason
    assert known.problem("first") is None


def test_the_file_of_the_default_pool_says_when_to_warn_only(where: Layout) -> None:
    os.makedirs(where.pool_configs)
    file = Path(where.pool_configs, "default.toml")
    known = Pools(where)
    file.write_text('schema = 1\nlow_space = "4%"\n')
    known.names()
    assert known.settings("default").low_space_percent == 4
    file.write_text('schema = 1\nlow_space = "40%"\npath = "/srv"\n')
    known.names()
    assert (known.settings("default").path, known.settings("default").low_space_percent) == (where.pool, 10)


@pytest.mark.root
def test_the_default_pool_is_known_by_its_mark_once_it_was_made(where: Layout) -> None:
    first = Pools(where)
    first.prepare()
    assert first.problem("default") is None
    id_ = first.settings("default").id
    assert pools.read_marker(where.pool)["id"] == id_
    again = Pools(where)
    again.prepare()
    assert again.settings("default").id == id_
    os.rename(where.pool, f"{where.pool}.away")
    os.mkdir(where.pool)
    for known in (again, Pools(where)):
        known.prepare()
        assert known.problem("default").state == "missing"
        assert os.listdir(where.pool) == []
    os.rmdir(where.pool)
    os.rename(f"{where.pool}.away", where.pool)
    assert known.problem("default") is None
    # The state of the host was lost, and its pool was not.
    os.unlink(f"{where.pool}.id")
    last = Pools(where)
    last.prepare()
    assert last.settings("default").id == id_


def test_a_newer_or_strange_file_stops_nothing_else(where: Layout, tmp_path: Path) -> None:
    write_marker(tmp_path / "fast")
    write_file(where, "fast", str(tmp_path / "fast"))
    Path(where.pool_configs, "newer.toml").write_text("schema = 2\n")
    Path(where.pool_configs, "bytes.toml").write_bytes(b"\xff\xfe")
    Path(where.pool_configs, "directory.toml").mkdir()
    Path(where.pool_configs, ".hidden.toml").write_text("?")
    Path(where.pool_configs, "fast.toml~").write_text("?")
    known = Pools(where)
    assert known.names() == ["default", "bytes", "directory", "fast", "newer"]
    assert "a newer sysctr wrote it" in known.problem("newer").reason
    assert known.problem("bytes").state == known.problem("directory").state == "damaged"
    assert known.problem("fast") is None


def test_pools_never_overlap(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(ConfigError, match="is that of pool one already"):
        pools.refuse_overlap("two", str(tmp_path / "link"), "one", str(tmp_path / "real"))
    pools.refuse_overlap("two", str(tmp_path / "real2"), "one", str(tmp_path / "real"))


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({}, "ok"),
        ({"low": True}, "warn"),
        ({"state": "missing", "error": "gone"}, "fail"),
        ({"state": "read-only", "error": "no"}, "fail"),
    ],
)
def test_doctor_judges_a_pool(facts: dict, state: str) -> None:
    pool = {
        "name": "fast", "driver": "loop", "path": "/srv", "state": "ok", "error": "", "hint": "",
        "low": False, "free_bytes": 5 << 30, "inodes": 1000, "free_inodes": 500, "low_space": "10%",
    }  # fmt: skip
    check = doctor.check_pool(pool | facts)
    assert (check.name, check.state) == ("pool fast", state)
    assert bool(check.hint) == (state != "ok")


@pytest.mark.parametrize("module", [pools, pool_setup, disks])
def test_the_examples_hold(module: object) -> None:
    assert doctest.testmod(module).failed == 0
