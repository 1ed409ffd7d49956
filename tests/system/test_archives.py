"""Archives as an administrator keeps them: listed, described, protected and pruned, on a real host."""

import os
import stat
import time
from pathlib import Path

import pytest

from sysctr.engine.archives import make_name
from tests.node import Node
from tests.system.guests import create, refused

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "busybox")]

_DAY_S = 86400


def put(directory: Path, number: int, days_ago: int, content: bytes = b"x") -> str:
    """Put what looks like an archive of a container into a directory, as another tool may."""
    name = make_name(number, time.time() - days_ago * _DAY_S, "gzip")
    (directory / name).write_bytes(content)
    return name


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    directory = tmp_path / "dump"
    directory.mkdir()
    return directory


def names(host: Node, dump: Path) -> list[str]:
    return [one["name"] for one in host.json("backups", "--dir", str(dump))]


def test_a_host_without_backups_says_so(shared_host: Node) -> None:
    assert shared_host.json("backups") == []
    ref = create(shared_host, start=False)
    summary = {one["name"]: one for one in shared_host.json("backups", "--summary")}
    assert (summary[ref]["last_backup"], summary[ref]["archives"]) == (None, 0)
    assert shared_host.json("info", ref)["last_backup"] is None
    assert [one["last_backup"] for one in shared_host.json("list") if one["name"] == ref] == [None]


def test_archives_are_listed_shown_described_protected_and_removed(shared_host: Node, dump: Path) -> None:
    host = shared_host
    ref = create(host, start=False)
    number = host.json("info", ref)["id"]
    old, new = put(dump, number, 3, b"12345"), put(dump, number, 1)
    (dump / new.replace(".tar.gz", ".log")).write_text("how it went\n")
    (dump / "readme.txt").touch()
    (dump / "link.tar").symlink_to(dump / new)
    assert names(host, dump) == [old, new]
    shown = host.run("backups", "--dir", str(dump), ref)
    assert f"{ref} ({number})" in shown.out
    path = f"{dump}/{old}"
    host.run("backup", "notes", path, "before the upgrade")
    assert host.run("backup", "notes", path).out == "before the upgrade\n"
    host.run("backup", "protect", path)
    told = host.json("backup", "show", path)
    assert (told["size_bytes"], told["protected"], told["notes"]) == (5, True, "before the upgrade")
    assert (told["container"], told["container_name"], told["log"]) == (number, ref, "")
    assert host.run("backup", "show", f"{dump}/{new}", "--log").out == "how it went\n"
    refused(host, 5, f"cannot remove {old}: it is protected", "backup", "remove", path)
    host.run("backup", "protect", "--off", path)
    assert host.run("backup", "remove", path).out == f"removed {path}\n"
    assert names(host, dump) == [new]
    assert sorted(os.listdir(dump)) == sorted([new, new.replace(".tar.gz", ".log"), "readme.txt", "link.tar"])
    refused(host, 3, "cannot find archive", "backup", "remove", path)
    refused(host, 3, "cannot find archive", "backup", "show", f"{dump}/link.tar")
    refused(host, 3, "it does not exist", "backups", "--dir", f"{dump}/nothing")
    refused(host, 2, "it is no directory", "backups", "--dir", f"{dump}/readme.txt")


def test_pruning_keeps_what_the_rules_say_and_tells_before(shared_host: Node, dump: Path) -> None:
    host = shared_host
    ref = create(host, start=False)
    number = host.json("info", ref)["id"]
    mine = [put(dump, number, days) for days in (4, 3, 2, 1)]
    gone = [put(dump, 9000, days) for days in (2, 1)]
    (dump / f"{mine[0]}.protected").touch()
    where = ["--dir", str(dump)]
    refused(host, 2, "no rule says which to keep", "backup", "prune", *where)
    tried = host.run("backup", "prune", ref, "--keep-last", "1", "--dry-run", *where).out
    assert [line.split()[0] for line in tried.splitlines()[1:-1]] == ["protected", "remove", "remove", "keep"]
    assert "would remove 2 archives" in tried
    assert names(host, dump) == [*mine, *gone]
    assert "removed 2 archives" in host.run("backup", "prune", ref, "--keep-last", "1", *where).out
    assert names(host, dump) == [mine[0], mine[3], *gone]
    # Those of a container that is no more, by its number; and with the rules of the host.
    host.run("backup", "prune", "9000", "--keep-daily", "1", *where)
    assert names(host, dump) == [mine[0], mine[3], gone[1]]
    later = put(dump, number, 0)
    Path(host.layout.host_config).write_text("schema = 1\n[backup]\nkeep_last = 1\n")
    host.run("daemon", "restart")
    host.run("backup", "prune", *where)
    assert names(host, dump) == [mine[0], later, gone[1]]


def test_names_in_the_hosts_own_directory_need_no_path(host: Node, tmp_path: Path) -> None:
    assert host.json("backups") == []
    own = Path(host.layout.backups)
    own.mkdir(mode=0o700)
    name = put(own, 101, 1)
    assert [one["path"] for one in host.json("backups")] == [f"{own}/{name}"]
    host.run("backup", "notes", name, "mine")
    assert host.run("_words", "archives").out == f"{name}\n"
    assert stat.S_IMODE(os.stat(own / f"{name}.notes").st_mode) == 0o600
    Path(host.layout.host_config).write_text(f'schema = 1\n[backup]\ndirectory = "{tmp_path}"\n')
    host.run("daemon", "restart")
    assert host.json("backups") == []
    refused(host, 3, f"there is none in {tmp_path}", "backup", "show", name)
