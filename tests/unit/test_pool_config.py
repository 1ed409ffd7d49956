"""The file of a pool: its keys, its errors, and that what is written is read back."""

import doctest

import pytest

from sysctr.config import pool
from sysctr.errors import ConfigError

ID = "0f8fad5b-d9cb-469f-a165-70867728950e"
GOOD = {"driver": "btrfs", "path": "/srv/fast", "id": ID}


def test_a_pool_is_read_with_its_default() -> None:
    assert pool.parse_pool(GOOD) == pool.Pool("btrfs", "/srv/fast", ID, 10)


@pytest.mark.parametrize("path", ["/srv/fast", '/srv/a "quoted" one', "/srv/ünï\\code"])
@pytest.mark.parametrize("percent", [0, 10, 50])
def test_what_is_written_is_read_back(path: str, percent: int) -> None:
    wanted = pool.Pool("overlay", path, ID, percent)
    assert pool.read_pool(pool.new_text("fast", wanted)) == wanted


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"drver": "x"}, "drver: no such key, the nearest is driver"),
        ({"low_spce": "1%"}, "the nearest is low_space"),
        ({"driver": "Over lay"}, "driver: 'Over lay' is not the name of a storage driver"),
        ({"driver": 7}, "cannot accept driver = 7"),
        ({"driver": ""}, "a pool without driver"),
        ({"path": "srv"}, "path: 'srv' is not an absolute path"),
        ({"path": "/srv/../etc"}, "path: "),
        ({"path": ""}, "a pool without path"),
        ({"id": "fast"}, "id: 'fast' is not the id that"),
        ({"id": ""}, "a pool without id"),
        ({"low_space": "60%"}, "low_space: '60%' is not a share from 0% to 50%"),
        ({"low_space": "10"}, "low_space: '10' is not a share"),
        ({"low_space": 10}, "cannot accept low_space = 10"),
    ],
)
def test_a_mistake_is_named(changes: dict, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pool.parse_pool(GOOD | changes)
    assert part in caught.value.message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("schema = 2\n", "a newer sysctr wrote it"),
        ('driver = "overlay"\n', "without schema"),
        ("schema = 1\ndriver = ", "cannot read the configuration"),
    ],
)
def test_a_file_that_is_not_ours_is_refused(text: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pool.read_pool(text)
    assert part in caught.value.message


def test_the_file_of_the_default_pool_moves_nothing() -> None:
    assert pool.read_default('schema = 1\nlow_space = "5%"\n') == 5
    assert pool.read_default("schema = 1\n") == 10
    for line in ('driver = "btrfs"', 'path = "/srv"', f'id = "{ID}"'):
        with pytest.raises(ConfigError, match="the default pool is where it is"):
            pool.read_default(f"schema = 1\n{line}\n")


def test_the_examples_hold() -> None:
    assert doctest.testmod(pool).failed == 0
