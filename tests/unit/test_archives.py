"""The catalog of archives: their names, what hostile directories hold, and what pruning does to all of it."""

import doctest
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sysctr.config.host import parse_host
from sysctr.engine import archives
from sysctr.engine.archives import Archive, Catalog, Directory, judge, log_name, make_name, opened, parse_name
from sysctr.engine.retention import RULES
from sysctr.errors import NotFound, Refused, SysctrError, UsageError
from sysctr.paths import Layout

NOON = "vzdump-lxc-101-2026_01_31-12_00_00.tar.zst"


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A time zone with summer time."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with opened(str(tmp_path)) as one:
        yield one


def names(directory: Directory) -> list[str]:
    return [one.name for one in directory.list()]


def test_the_examples_hold() -> None:
    assert doctest.testmod(archives).failed == 0


@pytest.mark.parametrize(
    ("name", "type_", "number", "compress"),
    [
        (NOON, "lxc", 101, "zstd"),
        ("vzdump-lxc-101-2026_01_31-12_00_00.tar", "lxc", 101, "none"),
        ("vzdump-lxc-999999999-2026_01_31-12_00_00.tar.gz", "lxc", 999999999, "gzip"),
        ("vzdump-lxc-101-2026_01_31-12_00_00.tar.lzo", "lxc", 101, "lzo"),
        ("vzdump-lxc-101-2026_01_31-12_00_00.tar.bz2", "lxc", 101, "bzip2"),
        ("vzdump-lxc-101-2026_01_31-12_00_00.tgz", "lxc", 101, "gzip"),
        ("vzdump-openvz-101-2012_01_31-12_00_00.tgz", "openvz", 101, "gzip"),
        # Renamed, one way or another: nobody can tell whose they are.
        ("vzdump-lxc-101-before-upgrade.tar.zst", "", None, "zstd"),
        ("vzdump-lxc-101-2026_02_30-12_00_00.tar.zst", "", None, "zstd"),
        ("vzdump-lxc-101-2026_01_31-24_00_00.tar.zst", "", None, "zstd"),
        ("vzdump-lxc-0101-2026_01_31-12_00_00.tar.zst", "", None, "zstd"),
        ("vzdump-lxc-99-2026_01_31-12_00_00.tar.zst", "", None, "zstd"),
        ("vzdump-lxc-1234567890-2026_01_31-12_00_00.tar.zst", "", None, "zstd"),
        ("vzdump-lxc-\u0661\u0660\u0661-2026_01_31-12_00_00.tar.zst", "", None, "zstd"),
        ("vzdump-lxc-101-2026_01_31-12_00_00.tar.xz", "", None, "xz"),
        (f"{NOON}\n.tar", "", None, "none"),
        ("web.tar.gz", "", None, "gzip"),
        ("a\nb.txz", "", None, "xz"),
    ],
)
def test_a_name_is_an_archives(name: str, type_: str, number: int | None, compress: str) -> None:
    parsed = parse_name(name)
    assert parsed is not None
    assert (parsed.type, parsed.number, parsed.compress) == (type_, number, compress)
    assert (parsed.time is None) == (type_ == "")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".tar", ".hidden.tar.gz", f"{NOON}.dat", f"{NOON}.notes", f"{NOON}.protected",
     f"{NOON}\n", "vzdump-lxc-101-2026_01_31-12_00_00.log", "vzdump-qemu-101-2026_01_31-12_00_00.vma.zst",
     "vzdump-qemu-101-2026_01_31-12_00_00.tar", "web.TAR", "web.tar.zip", "webtar", "tgz"],
)  # fmt: skip
def test_a_name_is_no_archives(name: str) -> None:
    assert parse_name(name) is None


@given(st.integers(100, 999999999), st.integers(0, 4102444800), st.sampled_from(sorted(archives.SUFFIXES)))
def test_what_a_name_says_makes_the_name(number: int, made: int, compress: str) -> None:
    name = make_name(number, made, compress)
    parsed = parse_name(name)
    assert parsed is not None
    assert (parsed.type, parsed.number, parsed.compress) == ("lxc", number, compress)
    assert parsed.time is not None
    # In the hour that comes twice the name cannot tell which one it is.
    assert abs(parsed.time - made) in (0, 3600)
    assert make_name(number, parsed.time, compress) == name
    assert log_name(name) == name[: name.index(".tar")] + ".log"
    assert parse_name(f"{name}{archives.PARTIAL}") is None


@given(st.text(max_size=60))
def test_any_name_is_read_or_is_none(name: str) -> None:
    parse_name(name)
    parse_name(f"vzdump-lxc-101-{name}.tar.gz")


# Retention, against a direct reading of how Proxmox describes it (reference 2.4).

_PERIOD = {
    "last": lambda t: t,
    "hourly": lambda t: time.localtime(t)[:4],
    "daily": lambda t: time.localtime(t)[:3],
    "weekly": lambda t: time.strftime("%G %V", time.localtime(t)),
    "monthly": lambda t: time.localtime(t)[:2],
    "yearly": lambda t: time.localtime(t)[:1],
}  # fmt: skip


def as_proxmox_says(newest_first: list[float], rules: dict[str, int]) -> list[str]:
    mark: dict[int, str] = {}
    if not any(rules.values()):
        return ["keep"] * len(newest_first)
    for rule in ("last", "hourly", "daily", "weekly", "monthly", "yearly"):
        count = rules.get(rule, 0)
        if count == 0:
            continue
        period = _PERIOD[rule]
        already = {period(newest_first[i]) for i in mark if mark[i] == "keep"}
        newly = set()
        for i, made in enumerate(newest_first):
            if i in mark or period(made) in already:
                continue
            if period(made) in newly:
                mark[i] = "remove"
                continue
            if len(newly) >= count:
                break
            newly.add(period(made))
            mark[i] = "keep"
    return [mark.get(i, "remove") for i in range(len(newest_first))]


def archive(made: float, number: int = 101, type_: str = "lxc", **fields: object) -> Archive:
    name = make_name(number, made, "zstd").replace("-lxc-", f"-{type_}-") if type_ else f"old-{made}.tar"
    given_fields = {"protected": False, "notes": "", "compress": "zstd", "size_bytes": 1, **fields}
    return Archive("/srv", name, type_, number if type_ else None, made, **given_fields)  # type: ignore[arg-type]


# Dense enough that periods meet, and where they cross: at a change of the clock, and where a week has days of
# two months or years.
_SPANS = [(1761100000, 1761600000), (1766900000, 1767700000), (1772000000, 1772600000), (10**9, 2 * 10**9)]
_TIMES = st.sampled_from(_SPANS).flatmap(lambda span: st.lists(st.integers(*span).map(float), max_size=40))
_KEEP = st.dictionaries(st.sampled_from(RULES), st.integers(0, 4))


@given(_TIMES, _KEEP)
@settings(max_examples=300)
def test_pruning_is_as_proxmox_describes_it(times: list[float], rules: dict[str, int]) -> None:
    # The same moment twice is possible: as .tar.gz and as .tar.zst.
    found = []
    for index, made in enumerate(times):
        one = archive(made)
        found.append(Archive(**{**vars(one), "name": f"{one.name}.{index:03}"}))
    newest_first = sorted(found, key=lambda one: (one.time, one.name), reverse=True)
    expected = as_proxmox_says([one.time for one in newest_first], rules)
    marks = {one.archive.name: one.mark for one in judge(found, rules)}
    assert [marks[one.name] for one in newest_first] == expected


@given(
    st.lists(
        st.tuples(
            st.integers(*_SPANS[1]).map(float), st.integers(100, 102),
            st.sampled_from(["lxc", "openvz", ""]), st.booleans(),
        ),
        unique_by=lambda one: one[:3], max_size=40,
    ),
    _KEEP,
)  # fmt: skip
def test_each_container_is_pruned_by_itself_and_what_is_protected_or_renamed_counts_for_nothing(
    told: list[tuple[float, int, str, bool]], rules: dict[str, int]
) -> None:
    found = [archive(made, number, type_, protected=protected) for made, number, type_, protected in told]
    marks = judge(found, rules)
    assert [one.archive for one in marks] == found
    for one in marks:
        assert (one.mark == "renamed") == (one.archive.type == "")
        assert (one.mark == "protected") == (one.archive.protected and one.archive.type != "")
    for type_ in ("lxc", "openvz"):
        for number in (100, 101, 102):
            group = [one for one in found if (one.type, one.number, one.protected) == (type_, number, False)]
            group.sort(key=lambda one: one.time, reverse=True)
            expected = as_proxmox_says([one.time for one in group], rules)
            shown = {one.archive.path: one.mark for one in marks}
            assert [shown[one.path] for one in group] == expected
            if group and any(rules.values()):
                # The last archive of a container never goes, whatever the rules are.
                assert expected[0] == "keep"


# Directories


def put(directory: Path, name: str, content: bytes = b"x") -> Path:
    path = directory / name
    path.write_bytes(content)
    return path


def test_the_list_has_archives_alone_in_order_with_what_lies_beside_them(
    tmp_path: Path, directory: Directory
) -> None:
    later = "vzdump-lxc-101-2026_01_31-13_00_00.tar"
    other = "vzdump-lxc-100-2026_02_01-00_00_00.tar.gz"
    for name in (later, NOON, other, "web.tar.gz", "readme.txt", f"{NOON}.dat"):
        put(tmp_path, name, b"12345")
    put(tmp_path, f"{NOON}.notes", b"vor dem Upgrade\nzweite Zeile\n")
    put(tmp_path, f"{NOON}.protected", b"")
    put(tmp_path, "vzdump-lxc-101-2026_01_31-12_00_00.log")
    found = directory.list()
    assert [one.name for one in found] == [other, NOON, later, "web.tar.gz"]
    noon = found[1]
    assert (noon.notes, noon.protected, noon.size_bytes) == ("vor dem Upgrade", True, 5)
    assert noon.time == time.mktime((2026, 1, 31, 12, 0, 0, 0, 0, -1))
    assert found[3].renamed
    assert found[3].time == (tmp_path / "web.tar.gz").stat().st_mtime
    assert directory.get(NOON).notes == "vor dem Upgrade\nzweite Zeile\n"
    assert directory.get(NOON).as_dict()["path"] == f"{tmp_path}/{NOON}"


def test_what_is_no_regular_file_is_no_archive_and_no_link_is_followed(
    tmp_path: Path, directory: Directory
) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.write_bytes(b"secret")
    (tmp_path / NOON).symlink_to(outside)
    (tmp_path / "dir.tar").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "gone.tar.gz").symlink_to("nowhere")
    real = "vzdump-lxc-101-2026_01_31-13_00_00.tar"
    put(tmp_path, real)
    (tmp_path / f"{real}.notes").symlink_to(outside)
    (tmp_path / log_name(real)).symlink_to(outside)
    assert [(one.name, one.notes) for one in directory.list()] == [(real, "")]
    assert directory.get(real).notes == ""
    assert directory.read_log(real) == b""
    for name in (NOON, "dir.tar", "pipe.tar", "gone.tar.gz", "../x.tar", "/etc/x.tar", "x\0.tar", ""):
        with pytest.raises(NotFound):
            directory.get(name)
        with pytest.raises(NotFound):
            directory.remove(name)
        with pytest.raises(NotFound):
            directory.open(name)
    # A link in the place of the notes is replaced, and one that protects does.
    directory.set_notes(real, "mine")
    assert outside.read_bytes() == b"secret"
    assert directory.get(real).notes == "mine"
    (tmp_path / f"{real}.protected").symlink_to("nowhere")
    assert directory.get(real).protected
    assert directory.list()[0].protected
    with pytest.raises(Refused):
        directory.remove(real)
    directory.protect(real, False)
    directory.remove(real)
    assert sorted(os.listdir(tmp_path)) == sorted([NOON, "dir.tar", "gone.tar.gz", "pipe.tar"])
    assert outside.read_bytes() == b"secret"


def test_notes_that_are_a_pipe_or_a_directory_hang_nobody(tmp_path: Path, directory: Directory) -> None:
    put(tmp_path, NOON)
    os.mkfifo(tmp_path / f"{NOON}.notes")
    assert directory.get(NOON).notes == ""
    (tmp_path / f"{NOON}.notes").unlink()
    (tmp_path / f"{NOON}.notes").mkdir()
    assert directory.list()[0].notes == ""
    with pytest.raises(SysctrError, match="cannot note something on"):
        directory.set_notes(NOON, "x")
    assert names(directory) == [NOON]


def test_odd_names_are_listed_and_can_be_removed(tmp_path: Path, directory: Directory) -> None:
    odd = ["a\nb.tar.gz", "-rf.tar", "\udcff\udcfe.tar", " .tgz", "\x1b[2J.tar.zst", "x" * 251 + ".tar"]
    for name in odd:
        put(tmp_path, name)
    assert sorted(names(directory)) == sorted(odd)
    for name in odd:
        if len(name) < 200:
            directory.set_notes(name, "odd")
            directory.protect(name, True)
            with pytest.raises(Refused) as caught:
                directory.remove(name)
            assert caught.value.message.isprintable()
            directory.protect(name, False)
        else:
            assert not directory.get(name).protected
            with pytest.raises(SysctrError, match="file name too long"):
                directory.protect(name, True)
        directory.remove(name)
    assert os.listdir(tmp_path) == []


def test_ten_thousand_archives_are_listed_in_a_moment(tmp_path: Path, directory: Directory) -> None:
    for number in range(10_000):
        os.close(os.open(tmp_path / make_name(101, 1_700_000_000 + number, "gzip"), os.O_CREAT, 0o600))
    begun = time.process_time()
    found = directory.list()
    verdicts = judge(found, {"last": 3, "daily": 7, "weekly": 4})
    assert time.process_time() - begun < 2
    assert len(found) == 10_000
    assert found == sorted(found, key=lambda one: one.time)
    # The last three are of one day; of the day before, in the same week, the last one.
    assert sum(one.mark == "keep" for one in verdicts) == 4


def test_removing_takes_what_lies_beside_and_nothing_else(tmp_path: Path, directory: Directory) -> None:
    twin = NOON.replace(".zst", ".gz")
    log = log_name(NOON)
    for name in (NOON, f"{NOON}.notes", log, twin, "web.tar", "web.tar.notes", "web.log"):
        put(tmp_path, name)
    directory.remove(NOON)
    # The log is that of the other one too.
    assert sorted(os.listdir(tmp_path)) == sorted([log, twin, "web.tar", "web.tar.notes", "web.log"])
    directory.remove(twin)
    # A log of that name need not be that of an archive that somebody renamed.
    directory.remove("web.tar")
    assert os.listdir(tmp_path) == ["web.log"]


def test_a_protected_archive_is_not_removed_and_protecting_twice_is_no_error(
    tmp_path: Path, directory: Directory
) -> None:
    put(tmp_path, NOON)
    assert directory.protect(NOON, True).protected
    assert directory.protect(NOON, True).protected
    # As Proxmox makes it.
    assert (tmp_path / f"{NOON}.protected").read_bytes() == b""
    with pytest.raises(Refused) as caught:
        directory.remove(NOON)
    assert caught.value.message == f"cannot remove {NOON}: it is protected"
    assert f"`sysctr backup protect --off {tmp_path}/{NOON}`" in caught.value.hint
    assert not directory.protect(NOON, False).protected
    assert not directory.protect(NOON, False).protected
    assert os.listdir(tmp_path) == [NOON]


def test_notes_are_written_read_and_taken_away(tmp_path: Path, directory: Directory) -> None:
    put(tmp_path, NOON)
    text = "über allem\nzwei Zeilen\n"
    assert directory.set_notes(NOON, text).notes == text
    assert (tmp_path / f"{NOON}.notes").read_text() == text
    assert stat.S_IMODE((tmp_path / f"{NOON}.notes").stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="more than 64 KiB"):
        directory.set_notes(NOON, "x" * 65537)
    assert directory.get(NOON).notes == text
    assert directory.set_notes(NOON, "").notes == ""
    assert os.listdir(tmp_path) == [NOON]


def daily(directory: Path, number: int, days: int, type_: str = "lxc") -> list[str]:
    made = [time.mktime((2026, 3, day, 3, 0, 0, 0, 0, -1)) for day in range(1, days + 1)]
    found = [make_name(number, one, "zstd").replace("-lxc-", f"-{type_}-") for one in made]
    for name in found:
        put(directory, name)
        put(directory, log_name(name))
    return found


def test_pruning_removes_what_no_rule_keeps_of_those_containers(tmp_path: Path, directory: Directory) -> None:
    mine, other = daily(tmp_path, 101, 5), daily(tmp_path, 102, 3)
    put(tmp_path, "vzdump-lxc-101-keep-this.tar")
    put(tmp_path, "vzdump-qemu-101-2020_01_01-00_00_00.vma.zst")
    directory.protect(mine[0], True)
    before = sorted(os.listdir(tmp_path))
    tried = directory.prune({"last": 2}, [101], dry_run=True)
    assert sorted(os.listdir(tmp_path)) == before
    done = directory.prune({"last": 2}, [101])
    assert done == tried
    assert [(one.archive.name, one.mark) for one in done] == [
        (mine[0], "protected"), (mine[1], "remove"), (mine[2], "remove"),
        (mine[3], "keep"), (mine[4], "keep"),
    ]  # fmt: skip
    gone = {*mine[1:3], *map(log_name, mine[1:3])}
    assert sorted(os.listdir(tmp_path)) == sorted(set(before) - gone)
    assert directory.prune({}, None) == directory.prune({"last": 0})
    directory.prune({"last": 1})
    assert names(directory) == [mine[0], mine[4], other[2], "vzdump-lxc-101-keep-this.tar"]


def test_one_that_cannot_be_removed_does_not_keep_the_others(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = daily(tmp_path, 101, 4)
    unlink = os.unlink

    def refuse(name: str, **options: int) -> None:
        if name == mine[1]:
            raise PermissionError(1, "Operation not permitted", name)
        unlink(name, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    done = directory.prune({"last": 1})
    assert [one.error for one in done] == [
        "", f"cannot remove {mine[1]}: operation not permitted", "", ""
    ]  # fmt: skip
    assert names(directory) == [mine[1], mine[3]]


# Several directories


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path, Catalog]:
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    return first, second, Catalog([str(first), str(second), str(second)])


def test_a_catalog_lists_all_and_says_what_it_cannot_read(two: tuple[Path, Path, Catalog]) -> None:
    first, second, catalog = two
    put(second, NOON)
    # The host's own directory is made with the first backup.
    assert [[one.path for one in catalog.list()[0]], catalog.list()[1]] == [[f"{second}/{NOON}"], []]
    first.mkdir()
    put(first, "web.tar")
    assert [one.name for one in catalog.list()[0]] == ["web.tar", NOON]
    broken = Catalog([str(first), str(second / "gone"), str(first / "web.tar")])
    assert broken.list()[1] == [
        f"cannot open the backup directory {second}/gone: it does not exist",
        f"cannot open the backup directory {first}/web.tar: it is no directory",
    ]


def test_an_archive_is_called_by_its_name_or_its_path(two: tuple[Path, Path, Catalog]) -> None:
    first, second, catalog = two
    put(second, NOON)

    def found(ref: str) -> str:
        with catalog.find(ref) as (directory, name):
            return directory.get(name).path

    assert found(NOON) == found(f"{second}/{NOON}") == f"{second}/{NOON}"
    elsewhere = second / "below"
    elsewhere.mkdir()
    put(elsewhere, "old.tgz")
    assert found(f"{elsewhere}/old.tgz") == f"{elsewhere}/old.tgz"
    first.mkdir()
    put(first, NOON)
    with pytest.raises(UsageError, match="cannot tell which"):
        found(NOON)
    for ref, kind in (("none.tar", NotFound), (f"./{NOON}", UsageError), (f"{second}/", NotFound),
                      (f"{second}/{NOON}.notes", NotFound), ("", NotFound)):  # fmt: skip
        with pytest.raises(kind):
            found(ref)


def test_a_directory_that_is_moved_away_meanwhile_is_still_the_one_that_was_opened(tmp_path: Path) -> None:
    place, other = tmp_path / "place", tmp_path / "other"
    place.mkdir()
    put(place, NOON)
    with opened(str(place)) as directory:
        place.rename(tmp_path / "moved")
        other.mkdir()
        put(other, NOON, b"not this")
        place.symlink_to(other)
        directory.set_notes(NOON, "mine")
        directory.protect(NOON, True)
        os.close(directory.open(NOON))
    assert sorted(os.listdir(other)) == [NOON]
    assert (tmp_path / "moved" / f"{NOON}.notes").read_text() == "mine"


def test_only_the_hosts_own_directory_is_made(tmp_path: Path) -> None:
    where = Layout(str(tmp_path / "host"))
    nothing_said = parse_host({}).backup
    own = archives.own_directory(where, nothing_said)
    archives.prepare(where, own)
    assert own == f"{tmp_path}/host/lib/backups"
    assert stat.S_IMODE(os.stat(own).st_mode) == 0o700
    other = archives.own_directory(where, parse_host({"backup": {"directory": f"{tmp_path}/nas"}}).backup)
    archives.prepare(where, other)
    assert other == f"{tmp_path}/nas"
    assert not os.path.exists(other)


@pytest.mark.parametrize("fail", ["write", "fsync"])
def test_a_full_disk_keeps_the_notes_that_were(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch, fail: str
) -> None:
    put(tmp_path, NOON)
    directory.set_notes(NOON, "old")

    def full(*_: object) -> Callable[..., int]:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, fail, full)
        with pytest.raises(SysctrError, match="no space left on"):
            directory.set_notes(NOON, "new")
    assert directory.get(NOON).notes == "old"
    assert sorted(os.listdir(tmp_path)) == [NOON, f"{NOON}.notes"]
