"""What comes of a volume that is brought up to date from another host: exactly the same, or an error."""

import contextlib
import mmap
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sysctr.engine.job import JobRunner
from sysctr.runtime.layers import MARKS
from sysctr.storage.base import RootSpec
from tests import storage
from tests.disk import small_disk
from tests.storage import MIB, Pool
from tests.syncing import Pair, plain, runner_with
from tests.trees import change_everything, describe, difference, everything
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.kernel, pytest.mark.needs("loop", "userns", "idmap")]

_THEIR_FIRST = 1_900_200_000
# How a pass ends that comes when the first has been made, and nobody writes any more.
_later = pytest.mark.parametrize("later", ["all", "places"])


@pytest.fixture
def there(jobs: JobRunner) -> JobRunner:
    """What works with the ids that the container has on the other host."""
    return runner_with(jobs, _THEIR_FIRST)


@pytest.fixture
def pair(jobs: JobRunner, there: JobRunner, tmp_path: Path) -> Pair:
    """Two plain directories."""
    for name in ("source", "target"):
        os.mkdir(tmp_path / name, 0o755)
    return Pair(jobs, there, plain(tmp_path / "source"), plain(tmp_path / "target"))


def source_of(pair: Pair) -> str:
    return pair.source.trees[0].path


def target_of(pair: Pair) -> str:
    return pair.target.trees[0].path


def assert_same(pair: Pair, without: frozenset[str] = frozenset()) -> None:
    with storage.shown(pair.source) as source, storage.shown(pair.target) as target:
        assert difference(describe(source, without=without), describe(target, without=without)) == {}


def settle(pair: Pair) -> None:
    """Make another pass, to whose mark what was changed until now is long past."""
    assert pair.since is not None
    before_s = pair.since._wall_s
    wait_until(lambda: time.time() > before_s + 0.1, what="another time")
    pair.pass_()


@contextlib.contextmanager
def volume(kind: str, place: Path, jobs: JobRunner) -> Iterator[tuple[Pool, RootSpec]]:
    os.makedirs(place)
    with storage.pool(kind, str(place), jobs) as pool:
        pool.create("101")
        try:
            yield pool, pool.driver.activate("101")
        finally:
            pool.driver.deactivate("101")


_WAYS = [
    ("overlay", "overlay"), ("overlay", "btrfs"), ("btrfs", "overlay"), ("btrfs", "btrfs"),
    ("overlay-limited", "quota-xfs"), ("loop-xfs", "zfs"),
]  # fmt: skip


def _ways() -> list:
    known = {str(one.values[0]): one.marks for one in storage.parameters()}
    return [pytest.param(*way, marks=[*known[way[0]], *known[way[1]]], id="-".join(way)) for way in _WAYS]


@pytest.mark.parametrize(("one", "other"), _ways())
@_later
def test_everything_is_there_whatever_keeps_it(
    jobs: JobRunner, there: JobRunner, tmp_path: Path, one: str, other: str, later: str
) -> None:
    with (
        volume(one, tmp_path / "here", jobs) as (_, source),
        volume(other, tmp_path / "there", there) as (_, target),
    ):
        pair = Pair(jobs, there, source, target)
        # An overlay has no whiteouts of its own making, nor attributes that are the kernel's.
        layer = not source.lowers and not target.lowers
        with storage.shown(source) as directory:
            Path(directory, "etc/motd").unlink()
            everything(directory, layer=layer)
        pair.pass_()
        assert_same(pair, MARKS)
        with storage.shown(target) as directory:
            assert os.stat(f"{directory}/holes").st_blocks * 512 < MIB
        with storage.shown(source) as directory:
            change_everything(directory, layer=layer)
        pair.pass_(later, still=True)
        assert_same(pair, MARKS)
        assert pair.same == (later == "places")


@_later
def test_a_layer_stays_one_but_loses_its_past(pair: Pair, later: str) -> None:
    everything(source_of(pair))
    pair.pass_()
    assert difference(describe(source_of(pair), without=MARKS), describe(target_of(pair))) == {}
    assert "gone" in os.listdir(target_of(pair))
    change_everything(source_of(pair))
    pair.pass_(later, still=True)
    assert difference(describe(source_of(pair), without=MARKS), describe(target_of(pair))) == {}


def test_what_only_the_target_has_goes(pair: Pair) -> None:
    Path(source_of(pair), "kept").write_text("x")
    os.makedirs(f"{target_of(pair)}/old/deep")
    Path(target_of(pair), "old/deep/file").write_text("x")
    os.mkdir(f"{target_of(pair)}/kept")
    Path(target_of(pair), "kept/file").write_text("x")
    (done,) = pair.pass_()
    assert_same(pair)
    assert (done.files, done.bytes, done.deleted) == (1, 1, 4)


@pytest.mark.parametrize("kind", storage.parameters(["overlay", "overlay-limited", "loop-xfs", "btrfs"]))
def test_a_later_pass_looks_at_no_more_than_what_changed(
    jobs: JobRunner, there: JobRunner, tmp_path: Path, kind: str
) -> None:
    os.mkdir(tmp_path / "target", 0o755)
    with volume(kind, tmp_path / "here", jobs) as (_, source):
        pair = Pair(jobs, there, source, plain(tmp_path / "target"))
        with storage.shown(source) as directory:
            for place in ("etc/one", "etc/two", "three"):
                os.makedirs(f"{directory}/{place}")
                for number in range(10):
                    Path(directory, place, f"file-{number}").write_text("x")
        pair.pass_()
        settle(pair)
        with storage.shown(source) as directory:
            Path(directory, "etc/two/file-3").write_text("y")
        listed, general = pair.pass_()
        assert (listed.files, general.files) == (1, 0)
        assert_same(pair)


def test_nothing_is_sent_of_what_is_the_same(pair: Pair) -> None:
    Path(source_of(pair), "large").write_bytes(random.Random(1).randbytes(4 * MIB))
    os.utime(f"{source_of(pair)}/large", ns=(0, 5))
    pair.pass_()
    pair.since, pair.bytes = None, 0
    (done,) = pair.pass_()
    assert done.files == 0
    assert pair.bytes < 4096


def test_a_later_attempt_takes_what_is_there_for_what_it_is(pair: Pair) -> None:
    for name in ("same", "other"):
        Path(source_of(pair), name).write_bytes(bytes(5 * MIB))
    pair.pass_()
    path = f"{source_of(pair)}/other"
    same_look(path, bytes(2 * MIB) + b"x" + bytes(3 * MIB - 1))
    pair.since, pair.bytes = None, 0
    (done,) = pair.pass_("content")
    assert_same(pair)
    assert done.files == 1
    assert pair.bytes < MIB


# What sizes and times do not tell.


def same_look(path: str, content: bytes) -> None:
    """Write a file anew such that its size and times are what they were."""
    before = os.stat(path)
    assert before.st_size == len(content)
    Path(path).write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@_later
def test_times_that_were_set_back_hide_nothing(pair: Pair, later: str) -> None:
    # Nothing but the list of what was changed has it, whatever its name does to a script.
    name = "a\nname, \udcff\\"
    path = f"{source_of(pair)}/{name}"
    Path(path).write_bytes(b"one")
    pair.pass_()
    same_look(path, b"two")
    pair.pass_(later, still=True)
    assert Path(target_of(pair), name).read_bytes() == b"two"
    assert_same(pair)
    same_look(path, b"six")
    pair.pass_(later, still=True)
    assert Path(target_of(pair), name).read_bytes() == b"six"


def test_times_in_whole_seconds_hide_nothing(pair: Pair) -> None:
    # The small inodes of ext4 have no room for parts of a second, nor for a time of birth.
    with small_disk(source_of(pair), 1024, "-I", "128"):
        path = f"{source_of(pair)}/file"
        Path(path).write_bytes(b"one")
        assert os.stat(path).st_ctime_ns % 1_000_000_000 == 0
        pair.pass_()
        for content in (b"two", b"six", b"ten"):
            same_look(path, content)
            pair.pass_("places", still=True)
            assert Path(target_of(pair), "file").read_bytes() == content


@_later
def test_a_page_that_is_written_again_is_sent_though_no_time_changes(pair: Pair, later: str) -> None:
    path = Path(source_of(pair), "mapped")
    path.write_bytes(bytes(8192))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 8192) as mapping:
        mapping[0:3] = b"one"
        before = os.stat(path)
        pair.pass_()
        mapping[0:3] = b"two"
        # The whole point: but for the sync in the pass, this write would have left no trace.
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        mapping[4096:4099] = b"too"
        pair.pass_(later, still=True)
        assert Path(target_of(pair), "mapped").read_bytes() == path.read_bytes()
        mapping[0:3] = b"six"
        pair.pass_(later, still=True)
        assert Path(target_of(pair), "mapped").read_bytes()[:3] == b"six"


@pytest.mark.parametrize("kind", storage.parameters(["overlay", "overlay-limited", "loop-xfs", "btrfs"]))
def test_directories_that_changed_places_are_sent(
    jobs: JobRunner, there: JobRunner, tmp_path: Path, kind: str
) -> None:
    os.mkdir(tmp_path / "target", 0o755)
    with volume(kind, tmp_path / "here", jobs) as (_, root):
        pair = Pair(jobs, there, root, plain(tmp_path / "target"))
        with storage.shown(root) as source:
            for name in ("a", "b"):
                os.makedirs(f"{source}/{name}/sub/deeper")
                for place in ("", "/sub", "/sub/deeper"):
                    path = f"{source}/{name}{place}/file\n\udcff"
                    Path(path).write_text(f"this is {name}")
                    os.utime(path, ns=(7, 7))
        pair.pass_()
        settle(pair)
        with storage.shown(root) as source:
            os.rename(f"{source}/a", f"{source}/c")
            os.rename(f"{source}/b", f"{source}/a")
            os.rename(f"{source}/c", f"{source}/b")
        listed, general = pair.pass_()
        assert_same(pair)
        assert (listed.files, general.files) == (6, 0)


@_later
def test_a_hard_link_that_was_broken_up_is_two_files(pair: Pair, later: str) -> None:
    source = source_of(pair)
    for name in ("one", "two"):
        os.mkdir(f"{source}/{name}")
    Path(source, "one/file").write_text("same")
    os.link(f"{source}/one/file", f"{source}/two/file")
    os.link(f"{source}/one/file", f"{source}/two/third")
    pair.pass_()
    assert os.stat(f"{target_of(pair)}/one/file").st_nlink == 3
    shutil.copy2(f"{source}/two/file", f"{source}/two/new")
    os.rename(f"{source}/two/new", f"{source}/two/file")
    pair.pass_(later, still=True)
    assert_same(pair)
    assert os.stat(f"{target_of(pair)}/one/file").st_nlink == 2
    # And together again.
    os.unlink(f"{source}/two/file")
    os.link(f"{source}/two/third", f"{source}/two/file")
    pair.pass_(later, still=True)
    assert_same(pair)


@_later
def test_what_became_something_else_makes_way(pair: Pair, later: str) -> None:
    source = source_of(pair)
    os.makedirs(f"{source}/tree/deep")
    Path(source, "tree/deep/file").write_text("x")
    Path(source, "file").write_text("x")
    os.symlink("tree", f"{source}/link")
    pair.pass_()
    shutil.rmtree(f"{source}/tree")
    Path(source, "tree").write_text("a file now")
    os.unlink(f"{source}/file")
    os.makedirs(f"{source}/file/deep")
    Path(source, "file/deep/file").write_text("x")
    os.unlink(f"{source}/link")
    os.mkdir(f"{source}/link", 0o700)
    os.chown(f"{source}/link", 7, 8)
    Path(source, "link/file").write_text("in a directory now")
    pair.pass_(later, still=True)
    assert_same(pair)


@_later
def test_a_mark_that_was_made_before_the_clock_went_back_sees_everything(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, later: str
) -> None:
    Path(source_of(pair), "file").write_text("one")
    wall = time.time
    # It was an hour fast.
    monkeypatch.setattr(time, "time", lambda: wall() + 3600)
    pair.pass_()
    monkeypatch.setattr(time, "time", wall)
    same_look(f"{source_of(pair)}/file", b"two")
    pair.pass_(later, still=True)
    assert Path(target_of(pair), "file").read_text() == "two"


def test_the_names_of_a_moved_file_are_not_all_listed_and_it_is_noticed(pair: Pair) -> None:
    source = source_of(pair)
    for name in ("one", "two"):
        os.mkdir(f"{source}/{name}")
    Path(source, "one/file").write_text("same")
    os.link(f"{source}/one/file", f"{source}/two/file")
    pair.pass_()
    settle(pair)
    os.rename(f"{source}/two", f"{source}/three")
    pair.pass_("places", still=True)
    assert not pair.same
    pair.pass_()
    assert_same(pair)


def test_what_the_target_lost_or_got_by_itself_is_noticed(pair: Pair) -> None:
    os.mkdir(f"{source_of(pair)}/directory")
    for name in ("one", "two"):
        Path(source_of(pair), "directory", name).write_text("x")
    pair.pass_()
    settle(pair)
    pair.pass_("places", still=True)
    assert pair.same
    os.unlink(f"{target_of(pair)}/directory/one")
    pair.pass_("places", still=True)
    assert not pair.same
    pair.pass_()
    Path(target_of(pair), "directory/more").write_text("x")
    pair.pass_("places", still=True)
    assert not pair.same
    pair.pass_()
    assert_same(pair)


def test_the_last_pass_looks_at_no_more_than_where_names_changed(pair: Pair) -> None:
    source = source_of(pair)
    for name in ("one", "two"):
        os.makedirs(f"{source}/{name}/below")
        for place in (name, f"{name}/below"):
            for number in range(10):
                Path(source, place, f"file-{number}").write_text("x")
    pair.pass_()
    settle(pair)
    Path(source, "one/file-1").unlink()
    os.symlink("file-1", f"{source}/one/file-2.link")
    Path(source, "two/below/file-3").write_text("other")
    os.chmod(f"{source}/two/file-4", 0o600)
    os.mkfifo(f"{source}/two/below/fifo")
    listed, places = pair.pass_("places", still=True)
    assert pair.same
    assert (places.files, places.deleted) == (0, 1)
    assert listed.files == 2
    assert_same(pair)


class Busybody(threading.Thread):
    """Changes a tree all the time, in every way that a container has."""

    def __init__(self, root: str, seed: int) -> None:
        super().__init__(daemon=True)
        self._root = root
        self._chance = random.Random(seed)
        self._enough = threading.Event()
        self.done = 0

    def __enter__(self) -> "Busybody":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self.join()

    def run(self) -> None:
        while not self._enough.is_set():
            with contextlib.suppress(OSError):
                self._act(self._chance.randrange(9))
                self.done += 1
            self._enough.wait(0.0001)

    def _somewhere(self) -> str:
        depth = self._chance.randrange(1, 4)
        return "/".join([self._root, *(f"n{self._chance.randrange(6)}" for _ in range(depth))])

    def _act(self, what: int) -> None:
        one, other = self._somewhere(), self._somewhere()
        if what == 0:
            os.mkdir(one, self._chance.choice([0o700, 0o755, 0o2775]))
        elif what == 1:
            os.rename(one, other)
        elif what == 2:
            os.unlink(one) if self._chance.random() < 0.7 else shutil.rmtree(one)
        elif what == 3:
            os.link(one, other, follow_symlinks=False)
        elif what == 4:
            os.symlink("n1", one)
        elif what == 5:
            os.chown(one, self._chance.randrange(3), 0, follow_symlinks=False)
        elif what == 6 and os.path.isfile(one) and not os.path.islink(one):
            same_look(one, self._chance.randbytes(os.stat(one).st_size))
        else:
            # Few sizes and times, so that many look the same.
            size_bytes = self._chance.choice([0, 10, 5000])
            Path(one).write_bytes(self._chance.randbytes(size_bytes))
            os.utime(one, ns=(5, 5))


@pytest.mark.parametrize("kind", storage.parameters(["overlay", "overlay-limited", "btrfs"]))
@pytest.mark.parametrize("seed", range(2))
@_later
def test_what_never_stands_still_is_the_same_when_it_does(
    jobs: JobRunner, there: JobRunner, tmp_path: Path, kind: str, seed: int, later: str
) -> None:
    os.mkdir(tmp_path / "target", 0o755)
    with volume(kind, tmp_path / "here", jobs) as (_, root), storage.shown(root) as source:
        pair = Pair(jobs, there, root, plain(tmp_path / "target"))
        with Busybody(source, seed) as busybody:
            wait_until(lambda: busybody.done > 500, what="a tree")
            for live in ("all", "all", later, later):
                before = busybody.done
                pair.pass_(live)
                assert busybody.done > before
        pair.pass_("places", still=True)
        if not pair.same:
            # A directory changed places while rsync walked there: what no list has is for a run of all.
            pair.pass_(still=True)
        assert difference(describe(source), describe(target_of(pair))) == {}
