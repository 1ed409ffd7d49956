"""Host ids: the pool takes no id that is somebody's, blocks never overlap, foreign lines stay as they are."""

import doctest
import itertools
import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.engine import ids
from sysctr.engine.ids import BLOCK, HIGHEST, LOWEST, IdPool, IdRange, first_fit
from sysctr.errors import NoSpace, Refused, SysctrError
from sysctr.paths import Layout

FOREIGN = b"# kept\nalice:100000:65536\n\nbob:1048576:65536\nbroken:x:1\nlatin\xe9:5:5\nlast:200000:10"


@pytest.fixture
def etc(tmp_path) -> str:
    for name in ("subuid", "subgid", "passwd", "group"):
        (tmp_path / name).write_bytes(b"")
    return str(tmp_path)


def _pool(etc: str, owner: str = "sysctr") -> IdPool:
    return IdPool(owner, f"{etc}/subuid", f"{etc}/subgid", f"{etc}/passwd", f"{etc}/group")


def _write(etc: str, name: str, data: bytes) -> None:
    with open(f"{etc}/{name}", "wb") as file:
        file.write(data)


def _read(etc: str, name: str) -> bytes:
    with open(f"{etc}/{name}", "rb") as file:
        return file.read()


def test_a_pool_is_registered_once_in_both_files(etc: str) -> None:
    (block,) = _pool(etc).register(4 * BLOCK)
    assert block.first >= LOWEST
    assert block.count == 4 * BLOCK
    line = b"sysctr:%d:%d\n" % (block.first, block.count)
    assert _read(etc, "subuid") == _read(etc, "subgid") == line
    assert _pool(etc).register(4 * BLOCK) == (block,)
    assert _read(etc, "subuid") == line
    assert sorted(os.listdir(etc)) == ["group", "passwd", "subgid", "subuid"]


def test_missing_files_are_made_readable_for_all(tmp_path) -> None:
    _pool(str(tmp_path)).register(BLOCK)
    assert (tmp_path / "subuid").stat().st_mode & 0o777 == 0o644


def test_foreign_lines_stay_byte_by_byte(etc: str) -> None:
    _write(etc, "subuid", FOREIGN)
    os.chmod(f"{etc}/subuid", 0o640)
    (block,) = _pool(etc).register(BLOCK)
    assert block.first >= 1048576 + 65536
    assert _read(etc, "subuid").startswith(FOREIGN + b"\nsysctr:")
    assert os.stat(f"{etc}/subuid").st_mode & 0o777 == 0o640
    _pool(etc).unregister()
    assert _read(etc, "subuid") == FOREIGN + b"\n"
    assert _read(etc, "subgid") == b""


def test_only_the_owners_lines_are_taken_out(etc: str) -> None:
    _pool(etc, "sysctr").register(BLOCK)
    kept = _pool(etc, "sysctr-0a0b0c").register(BLOCK)
    _pool(etc, "sysctr").unregister()
    assert _pool(etc, "sysctr-0a0b0c").ranges() == kept
    assert _pool(etc, "sysctr").ranges() == ()


def test_ids_of_local_accounts_are_avoided(etc: str) -> None:
    first = -(-LOWEST // BLOCK) * BLOCK
    _write(etc, "passwd", b"root:x:0:0::/:/bin/sh\nldap:x:%d:5::/:\n" % (first + 17))
    _write(etc, "group", b"root:x:0:\nbig:x:%d:\n" % (first + BLOCK))
    (block,) = _pool(etc).register(BLOCK)
    assert block.first == first + 2 * BLOCK


def test_a_wanted_place_is_taken_or_refused(etc: str) -> None:
    _write(etc, "subgid", b"alice:3000000:65536\n")
    with pytest.raises(Refused, match="alice"):
        _pool(etc).register(BLOCK, 3000000 - BLOCK + 1)
    assert _pool(etc).register(BLOCK, 3000000 - BLOCK) == (IdRange(3000000 - BLOCK, BLOCK),)


def test_a_pool_that_is_too_small_grows_beside_itself(etc: str) -> None:
    (first,) = _pool(etc).register(2 * BLOCK)
    ranges = _pool(etc).register(5 * BLOCK)
    assert first in ranges
    assert sum(block.count for block in ranges) == 5 * BLOCK
    assert not ranges[0].overlaps(ranges[1])
    assert _pool(etc).register(BLOCK) == ranges


def test_no_pool_reaches_the_ids_that_programs_cannot_hold(etc: str) -> None:
    with pytest.raises(NoSpace):
        _pool(etc).register(HIGHEST)
    _write(etc, "subuid", b"all:0:%d\n" % (HIGHEST - BLOCK))
    (block,) = _pool(etc).register(BLOCK)
    assert block.end <= HIGHEST < 2**31
    with pytest.raises(NoSpace):
        _pool(etc, "other").register(BLOCK)


def test_half_a_registration_is_completed(etc: str) -> None:
    _write(etc, "subuid", b"sysctr:2000000:131072\n")
    assert _pool(etc).ranges() == ()
    assert _pool(etc).register(BLOCK) == (IdRange(2000000, 131072),)
    assert _read(etc, "subgid") == b"sysctr:2000000:131072\n"


def test_half_a_registration_that_collides_is_refused(etc: str) -> None:
    _write(etc, "subuid", b"sysctr:2000000:131072\n")
    _write(etc, "subgid", b"alice:2000001:1\n")
    with pytest.raises(Refused, match="alice has 2000001"):
        _pool(etc).register(BLOCK)
    assert _read(etc, "subgid") == b"alice:2000001:1\n"


def test_installations_registering_at_once_get_ranges_of_their_own(etc: str) -> None:
    owners = [f"sysctr-{number}" for number in range(8)]
    threads = [threading.Thread(target=_pool(etc, owner).register, args=(BLOCK,)) for owner in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    blocks = sorted(block for owner in owners for block in _pool(etc, owner).ranges())
    assert len(blocks) == len(owners)
    assert all(one.end <= two.first for one, two in itertools.pairwise(blocks))
    assert sorted(os.listdir(etc)) == ["group", "passwd", "subgid", "subuid"]


def test_the_lock_of_useradd_is_respected(etc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "LOCK_TIMEOUT_S", 0.0)
    _write(etc, "subuid.lock", b"%d\0" % os.getpid())
    with pytest.raises(SysctrError, match=f"process {os.getpid()} holds"):
        _pool(etc).register(BLOCK)
    assert _read(etc, "subuid") == b""


def test_the_lock_of_a_dead_useradd_is_taken_over(etc: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    _write(etc, "subuid.lock", ended.stdout.strip() + b"\0")
    _write(etc, "subgid.lock", b"nonsense")
    assert _pool(etc).register(BLOCK)
    assert not os.path.exists(f"{etc}/subuid.lock")


def test_no_container_gets_the_block_of_the_templates(etc: str) -> None:
    pool = _pool(etc)
    pool.register(3 * BLOCK)
    used: list[IdRange] = []
    for _ in range(2):
        used.append(pool.allocate(used))
    assert not any(block.overlaps(pool.template_block()) for block in used)
    with pytest.raises(NoSpace, match="used up"):
        pool.allocate(used)


def test_allocating_without_a_pool_says_so(etc: str) -> None:
    with pytest.raises(SysctrError, match="sysctr has none"):
        _pool(etc).allocate([])


def test_blocks_are_whole(etc: str) -> None:
    pool = _pool(etc)
    pool.register(BLOCK)
    for count in (0, -BLOCK, BLOCK + 1):
        with pytest.raises(ValueError):
            pool.allocate([], count)


STEPS = st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.integers(0, 40)), max_size=60)


@given(STEPS)
def test_blocks_never_overlap_whatever_comes_and_goes(steps: list[tuple[bool, int, int]]) -> None:
    pool = [IdRange(LOWEST, 12 * BLOCK), IdRange(LOWEST + 20 * BLOCK, 5 * BLOCK)]
    used: list[IdRange] = []
    for allocate, blocks, which in steps:
        if not allocate and used:
            used.pop(which % len(used))
            continue
        first = first_fit(pool, used, blocks * BLOCK)
        grid = [
            IdRange(start, blocks * BLOCK)
            for known in pool
            for start in range(known.first, known.end - blocks * BLOCK + 1, BLOCK)
        ]
        free = [block for block in grid if not any(block.overlaps(other) for other in used)]
        # The lowest free place of all, and none only where there is none.
        assert first == (free[0].first if free else None)
        if first is not None:
            used.append(IdRange(first, blocks * BLOCK))


@given(
    st.lists(st.tuples(st.integers(0, 30 * BLOCK), st.integers(0, 9 * BLOCK)), max_size=8), st.integers(1, 3)
)
def test_a_block_avoids_ranges_of_any_shape(taken: list[tuple[int, int]], blocks: int) -> None:
    used = [IdRange(first, count) for first, count in taken]
    first = first_fit([IdRange(BLOCK, 40 * BLOCK)], used, blocks * BLOCK)
    if first is not None:
        block = IdRange(first, blocks * BLOCK)
        assert block.first >= BLOCK
        assert block.end <= 41 * BLOCK
        assert not any(block.overlaps(other) for other in used)


@given(st.binary(max_size=80))
def test_any_foreign_file_is_kept(tmp_path_factory, data: bytes) -> None:
    etc = str(tmp_path_factory.mktemp("etc"))
    _write(etc, "subuid", data)
    _pool(etc).register(BLOCK)
    assert _read(etc, "subuid").startswith(data)
    _pool(etc).unregister()
    assert _read(etc, "subuid") in (data, data + b"\n")


def test_an_installation_of_its_own_root_takes_less() -> None:
    assert ids.default_count(Layout("")) == 1000 * BLOCK
    assert ids.default_count(Layout("/tmp/a")) == 256 * BLOCK


def test_the_examples_hold() -> None:
    assert doctest.testmod(ids).failed == 0
