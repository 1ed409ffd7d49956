"""The commands of backup jobs: what they ask of the daemon, and what they print."""

import json
import os

import pytest

from sysctr import errors
from sysctr.cli import main
from sysctr.cli.help import whole_parser
from sysctr.config.backup_job import parse_job
from tests.unit.cli_stub import Stub

NOW_S = 1_769_900_000.0


@pytest.fixture
def stub(tmp_path, monkeypatch):
    stub = Stub(tmp_path / "host")
    monkeypatch.setenv("SYSCTR_ROOT", stub.layout.root)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.time", lambda: NOW_S)
    yield stub
    stub.close()


def job(name="nightly", **fields):
    told = {
        "name": name, "file": f"/etc/sysctr/backup-jobs/{name}.toml", "error": "", "state": "done",
        "task": "7f3a09c1d2e4", "last_run": NOW_S - 7200, "last_end": NOW_S - 7000,
        "last_success": NOW_S - 7000, "failures": [], "done": [101], "next_run": NOW_S + 3600,
        "enabled": True, "schedule": "daily 02:00", "settings": {"all": True, "exclude": ["db"]},
        "directory": "/mnt/nas/dump", "mode": "snapshot", "compress": "zstd", "bwlimit_bytes": 50 << 20,
        "keep": {"last": 3, "weekly": 4},
    }  # fmt: skip
    return {**told, **fields}


FAILED = job(
    state="failed", last_success=None,
    failures=[{"container": 102, "title": "db (102)", "error": "no \x1b[2Jspace", "task": "aa"}],
)  # fmt: skip
MISTAKE = job(
    "bad", error="/x.toml: al: no such key", state="", settings={}, enabled=False, next_run=None,
    schedule="", last_run=None, last_success=None,
)  # fmt: skip


def test_the_list_shows_when_each_ran_and_will_and_fits_a_terminal(stub, capsys, monkeypatch):
    stub.routes["GET", "/1/backup-jobs"] = {
        "jobs": [
            job(), FAILED | {"name": "web"}, MISTAKE,
            job("old", enabled=False, next_run=None, settings={"containers": ["web", "db"]}, keep={}),
            job("first", state="", last_success=None, settings={"tag": "prod"}),
        ]
    }  # fmt: skip
    assert main(["backup", "job", "list"]) == 0
    shown = capsys.readouterr()
    header, *lines = [line.split("  ") for line in shown.out.splitlines()]
    lines = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert "LAST SUCCESS" in header
    assert lines[0][:3] == ["nightly", "done", "daily 02:00"]
    assert lines[0][4:] == ["1h 56m ago", "all but db", "3 last, 4 weekly"]
    assert (lines[1][1], lines[1][4]) == ("failed", "never")
    assert lines[2] == ["bad", "mistake", "-", "-", "never", "-", "-"]
    assert (lines[3][1], lines[3][3:]) == ("disabled", ["-", "1h 56m ago", "web, db", "all"])
    assert (lines[4][1], lines[4][5]) == ("new", "tag prod")
    assert shown.err == "/x.toml: al: no such key\n"
    monkeypatch.setattr("sysctr.cli.output.terminal_width", lambda _: 80)
    assert main(["backup", "job", "list"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    assert main(["backup", "job", "list", "-q"]) == 0
    assert capsys.readouterr().out.split() == ["nightly", "web", "bad", "old", "first"]


def test_a_job_is_shown_with_what_failed(stub, capsys):
    stub.routes["GET", "/1/backup-jobs/nightly"] = {"job": FAILED, "toml": "", "digest": ""}
    assert main(["backup", "job", "show", "nightly"]) == 0
    shown = capsys.readouterr().out
    assert "containers:   all but db\n" in shown
    assert "rate:         50M/s\n" in shown
    assert "took:         3m 20s\n" in shown
    assert shown.splitlines()[-1].split() == ["db", "(102)", "aa", "no", "\\x1b[2Jspace"]
    stub.routes["GET", "/1/backup-jobs/bad"] = {"job": MISTAKE, "toml": "", "digest": ""}
    assert main(["backup", "job", "show", "bad"]) == 0
    assert "problem:      /x.toml: al: no such key\n" in capsys.readouterr().out
    assert main(["backup", "job", "show", "bad", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == MISTAKE


def test_add_sends_every_option_as_the_file_says_it(stub, capsys):
    stub.routes["POST", "/1/backup-jobs"] = {"job": job(), "notes": ["all are kept"]}
    typed = [
        "backup", "job", "add", "nightly", "web", "101", "web", "--schedule", "weekly sun 22:00",
        "--dir", "dump", "--mode", "stop", "--compress", "gzip", "--bwlimit", "0", "--notes", "",
        "--protected", "--exclude", "/var/cache/*", "--exclude", "/tmp/*", "--keep-last", "0",
        "--keep-yearly", "2", "--on-failure", "/usr/bin/page 'two words' -a -a", "--mail-to", "root",
        "--mail-to", "a@example.org", "--disabled",
    ]  # fmt: skip
    assert main(typed) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("added nightly, next run 20")
    assert shown.err == "note: all are kept\n"
    body = stub.requests[-1][3]
    assert body == {
        "name": "nightly",
        "settings": {
            "containers": ["web", "101"], "schedule": "weekly sun 22:00", "directory": f"{os.getcwd()}/dump",
            "mode": "stop", "compress": "gzip", "bwlimit": "0", "notes": "", "protected": True,
            "exclude_paths": ["/var/cache/*", "/tmp/*"], "keep_last": 0, "keep_yearly": 2,
            "on_failure": ["/usr/bin/page", "two words", "-a", "-a"], "mail_to": ["root", "a@example.org"],
            "enabled": False,
        },
    }  # fmt: skip
    assert parse_job(body["settings"]).keep.says_anything
    assert main(["backup", "job", "add", "x", "--all", "--except", "db", "--except", "web"]) == 0
    assert stub.requests[-1][3]["settings"] == {"all": True, "exclude": ["db", "web"]}
    assert main(["backup", "job", "add", "x", "--tag", "prod", "--json"]) == 0
    assert stub.requests[-1][3]["settings"] == {"tag": "prod"}


@pytest.mark.parametrize(
    "words",
    [["x"], ["x", "web", "--all"], ["x", "--all", "--tag", "t"], [], ["x", "--all", "--keep-last", "many"],
     ["x", "--all", "--on-failure", "'open"]],
)  # fmt: skip
def test_wrong_usage_asks_nothing_of_the_daemon(stub, words, capsys):
    assert main(["backup", "job", "add", *words]) == 2
    assert capsys.readouterr().err.startswith("sysctr: cannot ")
    assert stub.requests == []


def test_jobs_are_run_and_removed(stub, capsys):
    running = stub.task("backup-run", None, result={"job": "a", "backed_up": [101, 102]})
    stub.routes["POST", "/1/backup-jobs/a/run"] = (202, {"task": running})
    stub.routes["POST", "/1/backup-jobs/b/run"] = errors.NotFound("cannot find backup job b: none")
    assert main(["backup", "job", "run", "a", "b"]) == 3
    shown = capsys.readouterr()
    assert shown.out == "ran a: 2 containers backed up\n"
    assert "cannot find backup job b: none" in shown.err
    stub.routes["DELETE", "/1/backup-jobs/a"] = {}
    stub.routes["DELETE", "/1/backup-jobs/b"] = errors.Busy("cannot remove backup job b: it is running")
    assert main(["backup", "job", "remove", "b", "a"]) == 4
    assert capsys.readouterr().out == "removed a\n"


def test_the_help_of_the_family_within_the_family(capsys):
    for typed in (["backup", "job"], ["backup", "job", "--help"], ["help", "backup", "job"]):
        assert main(typed) == 0
        shown = capsys.readouterr().out
        assert "  backup job run " in shown
        assert "  backup prune " not in shown
    assert main(["backup", "job", "rum", "nightly"]) == 2
    assert "did you mean `sysctr backup job run`?" in capsys.readouterr().err


def test_jobs_are_completed_by_name(stub, capsys):
    stub.routes["GET", "/1/backup-jobs"] = {"jobs": [job(), MISTAKE]}
    assert main(["_words", "jobs"]) == 0
    assert capsys.readouterr().out == "nightly\nbad\n"
    assert whole_parser().parse_args(["backup", "job", "run", "a", "b"]).jobs == ["a", "b"]
