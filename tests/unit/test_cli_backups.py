"""The commands of backups: what they ask of the daemon, and what they print."""

import io
import json
import os

import pytest

from sysctr import errors
from sysctr.cli import backups, main
from sysctr.cli.help import whole_parser
from tests.unit.cli_stub import Stub

NOON = "vzdump-lxc-101-2026_01_31-12_00_00.tar.zst"


@pytest.fixture
def stub(tmp_path, monkeypatch):
    stub = Stub(tmp_path / "host")
    monkeypatch.setenv("SYSCTR_ROOT", stub.layout.root)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.time", lambda: 1_769_900_000.0)
    yield stub
    stub.close()


def archive(name=NOON, directory="/var/lib/sysctr/backups", **fields):
    told = {
        "path": f"{directory}/{name}", "name": name, "directory": directory, "type": "lxc", "container": 101,
        "container_name": "web", "time": 1_769_857_200.0, "size_bytes": 120 << 20, "compress": "zstd",
        "protected": False, "renamed": False, "notes": "",
    }  # fmt: skip
    return {**told, **fields}


def told_of(*archives, problems=()):
    made = {"time": 1_769_813_600.0, "archive": "/x", "size_bytes": 1}
    containers = [
        {"id": 101, "name": "web", "exists": True, "last_backup": made, "archives": 2, "size_bytes": 3 << 20,
         "newest": 1_769_800_000.0},
        {"id": 102, "name": "db", "exists": True, "last_backup": None, "archives": 0, "size_bytes": 0,
         "newest": None},
        {"id": 900, "name": "", "exists": False, "last_backup": None, "archives": 1, "size_bytes": 1 << 20,
         "newest": 1_769_800_000.0},
    ]  # fmt: skip
    return {"archives": list(archives), "containers": containers, "problems": list(problems)}


def test_the_list_shows_each_archive_and_fits_a_terminal(stub, capsys, monkeypatch):
    stub.routes["GET", "/1/backups"] = told_of(
        archive(), archive("odd\x1b[2J.tar", container=None, container_name="", renamed=True, notes="mine"),
        problems=["cannot open the backup directory /nas: it does not exist"],
    )  # fmt: skip
    assert main(["backups"]) == 0
    shown = capsys.readouterr()
    header, first, second = shown.out.splitlines()
    assert header.split() == ["CONTAINER", "AGE", "SIZE", "ARCHIVE", "STATE", "NOTES"]
    assert first.split() == ["web", "(101)", "11h", "53m", "120M", NOON, "-", "-"]
    assert second.split() == ["-", "11h", "53m", "120M", "odd\\x1b[2J.tar", "renamed", "mine"]
    assert shown.err == "cannot open the backup directory /nas: it does not exist\n"
    monkeypatch.setattr("sysctr.cli.output.terminal_width", lambda _: 80)
    assert main(["backups"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    # What one needs to go on.
    assert NOON in lines[1]


def test_only_those_of_a_container_or_a_directory(stub, capsys):
    other = archive("vzdump-lxc-900-2026_01_31-12_00_00.tar", container=900, container_name="")
    stub.routes["GET", "/1/backups"] = told_of(archive(), other)
    for words, found in ((["web"], [NOON]), (["101"], [NOON]), (["900"], [other["name"]]), (["902"], []),
                         (["900", "web"], [NOON, other["name"]])):  # fmt: skip
        assert main(["backups", *words, "--json"]) == 0
        assert [one["name"] for one in json.loads(capsys.readouterr().out)] == found
    assert main(["backups", "nobody"]) == 3
    assert "cannot find container nobody" in capsys.readouterr().err
    assert main(["backups", "-q", "--dir", "dump"]) == 0
    assert capsys.readouterr().out.splitlines() == [archive()["path"], other["path"]]
    assert stub.requests[-1][2] == {"directory": f"{os.getcwd()}/dump"}


def test_archives_of_several_directories_are_shown_with_their_paths(stub, capsys):
    stub.routes["GET", "/1/backups"] = told_of(archive(), archive(directory="/nas"))
    assert main(["backups"]) == 0
    assert f" /nas/{NOON} " in capsys.readouterr().out


def test_the_summary_has_a_line_for_each_container(stub, capsys):
    stub.routes["GET", "/1/backups"] = told_of()
    assert main(["backups", "--summary"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1][:2] == ["101", "web"]
    assert lines[1][4:] == ["1d", "2", "3M"]
    assert lines[2] == ["102", "db", "never", "-", "0", "0B"]
    assert lines[3][:2] == ["900", "(gone)"]
    assert main(["backups", "--summary", "--json", "db"]) == 0
    assert [one["id"] for one in json.loads(capsys.readouterr().out)] == [102]


def test_an_archive_is_shown_with_its_notes_made_harmless(stub, capsys):
    told = archive(notes="before\nthe \x1b[2Jupgrade\n", log="line\nodd \x07\n", protected=True)
    stub.routes["GET", "/1/backups/archive"] = {"archive": told}
    assert main(["backup", "show", NOON]) == 0
    shown = capsys.readouterr().out
    assert "protected:  yes\n" in shown
    assert "web (101)" in shown
    assert shown.endswith("\nbefore\nthe \\x1b[2Jupgrade\n")
    assert main(["backup", "show", NOON, "--log"]) == 0
    assert capsys.readouterr().out == "line\nodd \\x07\n"
    assert main(["backup", "notes", NOON]) == 0
    assert capsys.readouterr().out == "before\nthe \\x1b[2Jupgrade\n"
    assert main(["backup", "show", NOON, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == told
    assert stub.requests[-1][2] == {"archive": NOON}


def test_a_path_or_a_file_here_is_asked_for_by_its_whole_path(stub, tmp_path):
    stub.routes["GET", "/1/backups/archive"] = {"archive": archive(log="")}
    (tmp_path / "here.tar").touch()
    for typed, asked in (
        ("here.tar", f"{tmp_path}/here.tar"), ("there.tar", "there.tar"),
        ("./there.tar", f"{tmp_path}/./there.tar"), ("/nas/x.tar", "/nas/x.tar"),
    ):  # fmt: skip
        assert main(["backup", "show", typed]) == 0
        assert stub.requests[-1][2] == {"archive": asked}


def test_what_cannot_be_removed_does_not_keep_the_others(stub, capsys):
    refused = errors.Refused(f"cannot remove {NOON}: it is protected", "unprotect it")

    def answer(_, body):
        return refused if body["archive"] == NOON else (202, {"task": stub.task("backup-remove", None)})

    stub.routes["DELETE", "/1/backups/archive"] = answer
    assert main(["backup", "remove", NOON, "old.tar", "old.tar"]) == 5
    shown = capsys.readouterr()
    assert shown.out == "removed old.tar\n"
    assert f"sysctr: cannot remove {NOON}: it is protected\nhint: unprotect it\n" in shown.err
    assert [body for _, _, _, body in stub.requests] == [{"archive": NOON}, {"archive": "old.tar"}]


def test_protect_and_notes_send_what_was_typed(stub, capsys, monkeypatch):
    stub.routes["POST", "/1/backups/protect"] = {"archive": archive()}
    stub.routes["POST", "/1/backups/notes"] = {"archive": archive()}
    assert main(["backup", "protect", NOON]) == 0
    assert main(["backup", "protect", "--off", NOON, "b.tar"]) == 0
    assert capsys.readouterr().out == (
        f"protected: {NOON}\nno longer protected: {NOON}\nno longer protected: b.tar\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("from\nstdin\n"))
    for text in ("before the upgrade", "", "-"):
        assert main(["backup", "notes", NOON, text]) == 0
    bodies = [body for _, _, _, body in stub.requests]
    assert [body.get("protected") for body in bodies] == [True, False, False, None, None, None]
    assert [body.get("notes") for body in bodies[3:]] == ["before the upgrade", "", "from\nstdin\n"]


def test_prune_sends_its_rules_and_says_what_went(stub, capsys):
    verdicts = [{**archive(), "mark": "remove"}, {**archive("b.tar"), "mark": "renamed"}]
    result = {"removed": 1, "freed_bytes": 120 << 20, "archives": verdicts, "truncated": False}
    stub.routes["POST", "/1/backups/prune"] = (202, {"task": stub.task("backup-prune", None, result=result)})
    assert main(["backup", "prune", "web", "--keep-last", "3", "--keep-yearly", "0", "--dir", "/nas"]) == 0
    assert capsys.readouterr().out == "removed 1 archive, 120M\n"
    assert stub.requests[-1][3] == {
        "directory": "/nas", "keep": {"keep_last": 3, "keep_yearly": 0}, "containers": ["web"],
        "dry_run": False,
    }  # fmt: skip
    assert main(["backup", "prune", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["remove", "web", "(101)", "11h", "53m", "120M", NOON]
    assert lines[-1] == "would remove 1 archive, 120M"
    assert stub.requests[-1][3] == {"directory": None, "keep": None, "containers": [], "dry_run": True}
    for wrong in ("-1", "x", "1001", "1.5"):
        assert main(["backup", "prune", f"--keep-last={wrong}"]) == 2


def test_the_help_of_the_family_lists_its_commands(capsys):
    for typed in (["backup", "--help"], ["help", "backup"]):
        assert main(typed) == 0
        shown = capsys.readouterr().out
        assert "  backup prune " in shown
        assert "  backups " not in shown
    assert main(["help", "backup", "prune"]) == 0
    assert "Protected and renamed archives stay" in capsys.readouterr().out


def test_archives_are_completed_by_name(stub, capsys):
    stub.routes["GET", "/1/backups"] = told_of(archive(), archive("a\nb.tar"))
    assert main(["_words", "archives"]) == 0
    assert capsys.readouterr().out == f"{NOON}\n"
    parser = whole_parser()
    arguments = parser.parse_args(["backup", "protect", "--off", NOON])
    assert (arguments.off, arguments.archives) == (True, [NOON])


def test_the_rules_are_those_of_the_configuration():
    from sysctr.config.backup import RULES

    assert backups.RULES == RULES
