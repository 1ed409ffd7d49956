"""Backup jobs: what they select, when they are due, what they make up for, and whom they tell.

The maker of archives here is a small one of our own; all else is real: tasks, records, files, programs.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from sysctr.config.host import parse_host
from sysctr.engine import alarm, backup_jobs, backup_run
from sysctr.engine.archives import make_name
from sysctr.engine.archiving import Archiving, note_success
from sysctr.engine.backup import BackupOptions
from sysctr.engine.backup_jobs import BackupJobs
from sysctr.engine.events import Bus
from sysctr.engine.ids import IdRange
from sysctr.engine.job_state import JobState, read_state, write_state
from sysctr.engine.record import new_record
from sysctr.engine.state import Store
from sysctr.engine.tasks import ENDED, Task, TaskRunner
from sysctr.errors import Busy, ConfigError, NotFound, SysctrError, UsageError, WrongState
from sysctr.paths import Layout
from tests.wait import wait_until

HOUR_S = 3600.0


class Place:
    """A host with records, tasks and jobs, and a maker of archives that can be held or made to fail."""

    def __init__(self, root: Path) -> None:
        self.where = Layout(str(root))
        for path in (self.where.lib, self.where.run, self.where.etc):
            os.makedirs(path, exist_ok=True)
        self.bus = Bus()
        self.failing: dict[int, str] = {}
        self.made: list[tuple[int, BackupOptions]] = []
        self.hold = threading.Event()
        self.hold.set()
        self.dump = root / "dump"
        self.dump.mkdir(exist_ok=True)
        self.settings = parse_host({"backup": {"directory": str(self.dump)}})
        self.now_s = 0.0
        self.open()

    def open(self) -> None:
        self.tasks = TaskRunner(self.where, self.bus)
        self.store = Store(self.where)
        self.archiving = Archiving(self, lambda: self.jobs.directories())  # type: ignore[arg-type]
        self.jobs = BackupJobs(self, self.archiving, self.start)  # type: ignore[arg-type]

    def close(self, grace_s: float = 5.0) -> None:
        stuck = self.tasks.close(grace_s)
        self.jobs.close()
        assert stuck == []

    def add(self, number: int, name: str, *tags: str) -> None:
        self.store.reserve(name, number)
        text = f'schema = 1\nname = "{name}"\ntags = {json.dumps(list(tags))}\n'
        self.store.create(new_record(number, text, IdRange(10**6 + number * 65536, 65536)))

    def start(self, ref: str, options: BackupOptions) -> Task:
        record = self.store.find(ref)
        number = record.id

        def run(task: Task) -> dict:
            task.step("packing")
            while not self.hold.wait(0.01):
                task.check()
            if number in self.failing:
                raise SysctrError(f"cannot backup {number}: {self.failing[number]}")
            # Each in a second of its own, as names have no finer time.
            name = make_name(number, 1_770_000_000 + len(self.made), options.compress)
            (Path(options.directory) / name).write_bytes(b"x" * 10)
            self.made.append((number, options))
            note_success(self, number, f"{options.directory}/{name}", 10)  # type: ignore[arg-type]
            return {"archive": f"{options.directory}/{name}", "size_bytes": 10, "warnings": ["odd file"]}

        return self.tasks.submit("backup", number, run, subject=record.title)

    def job(self, name: str, **settings: object) -> dict:
        return self.jobs.add(name, settings)["job"]

    def run(self, name: str) -> Task:
        task = self.jobs.run(name)
        assert task.wait(20)
        return task

    def shown(self, name: str) -> dict:
        return self.jobs.show(name)["job"]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    one = Place(tmp_path)
    for number, name, tags in ((101, "web", ["prod"]), (102, "db", ["prod"]), (103, "test", [])):
        one.add(number, name, *tags)
    yield one
    one.hold.set()
    one.close()


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"all": True}, [101, 102, 103]),
        ({"all": True, "exclude": ["db", "103"]}, [101]),
        ({"tag": "prod"}, [101, 102]),
        ({"tag": "prod", "exclude": ["101"]}, [102]),
        ({"containers": ["test", "101", "103"]}, [103, 101]),
    ],
)
def test_a_job_backs_up_what_it_selects_one_after_the_other(
    place: Place, settings: dict, numbers: list[int]
) -> None:
    place.job("nightly", **settings)
    task = place.run("nightly")
    assert task.state == "done", task.error
    assert task.result == {"job": "nightly", "backed_up": sorted(numbers)}
    assert [number for number, _ in place.made] == numbers
    began = [one for one in place.tasks.list() if one.kind == "backup"]
    for before, after in pairwise(began):
        assert before.ended is not None
        assert after.created >= before.ended
    for number in numbers:
        last = place.store.load(number).last_backup
        assert last is not None
        assert os.path.exists(last["archive"])
    assert b"web (101): odd file" in place.tasks.read_log(task.id) or 101 not in numbers


def test_what_a_job_leaves_open_is_what_the_host_says(place: Place, tmp_path: Path) -> None:
    place.settings = parse_host(
        {"backup": {"directory": str(place.dump), "mode": "suspend", "bwlimit": "1M", "keep_last": 1}}
    )
    (tmp_path / "other").mkdir()
    place.job("plain", containers=["web"])
    place.job(
        "own", containers=["web"], directory=f"{tmp_path}/other", mode="stop", compress="gzip", bwlimit=0,
        notes="{{guestname}} {{vmid}}", protected=True, exclude_paths=["/var/cache/*"], keep_last=0,
    )  # fmt: skip
    for name in ("plain", "own", "plain", "own"):
        assert place.run(name).state == "done"
    plain, own = place.made[0][1], place.made[1][1]
    assert plain == BackupOptions(str(place.dump), "suspend", "zstd", "web", False, (), 1 << 20)
    assert own == BackupOptions(f"{tmp_path}/other", "stop", "gzip", "web 101", True, ("/var/cache/*",), None)
    # The host keeps one; the job says that it keeps all.
    assert len(os.listdir(place.dump)) == 1
    assert len(os.listdir(tmp_path / "other")) == 2
    assert [one["directory"] for one in place.archiving.list()["archives"]] == [
        str(place.dump), f"{tmp_path}/other", f"{tmp_path}/other"
    ]  # fmt: skip


def test_nothing_is_pruned_of_a_container_whose_backup_failed(place: Place) -> None:
    for number in (101, 102):
        for minute in range(3):
            (place.dump / make_name(number, 1_700_000_000 + 60 * minute, "zstd")).touch()
    place.job("nightly", containers=["web", "db"], keep_last=1)
    place.failing[101] = "the disk is full"
    task = place.run("nightly")
    assert task.state == "failed"
    assert task.error is not None
    assert task.error["message"] == (
        "cannot run backup job nightly: web (101): cannot backup web (101): the disk is full"
    )
    left = [one["container"] for one in place.archiving.list()["archives"]]
    assert left == [101, 101, 101, 102]
    shown = place.shown("nightly")
    assert (shown["state"], shown["done"], shown["last_success"]) == ("failed", [102], None)
    assert [(one["container"], one["title"]) for one in shown["failures"]] == [(101, "web (101)")]
    assert place.store.load(101).last_backup is None
    assert place.jobs.checks()[0]["state"] == "fail"
    assert "its last run failed" in place.jobs.notices()[0]
    place.failing.clear()
    assert place.run("nightly").state == "done"
    shown = place.shown("nightly")
    assert (shown["state"], shown["failures"]) == ("done", [])
    assert shown["last_success"] >= shown["last_run"]
    assert place.jobs.notices() == []


def test_failures_are_told_by_event_program_and_mail(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in (
        ("alarm", 'env | grep SYSCTR_ | sort > "$1.$SYSCTR_CONTAINER"; echo "$2" > "$1.words"'),
        ("sendmail", f'echo "$@" > {tmp_path}/options; cat > {tmp_path}/mail'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setattr(alarm, "_PATH", f"{programs}:{alarm._PATH}")
    words = [str(programs / "alarm"), f"{tmp_path}/told", "$(touch /tmp/x); 'two words'"]
    place.job("nightly", all=True, on_failure=words, mail_to=["root", "admin@example.org"])
    place.failing |= {101: "no\nspace \x1b[2J", 103: "gone"}
    with place.bus.subscribe() as events:
        task = place.run("nightly")
        heard = [event for event in events.take() if event["kind"] == "backup-failed"]
    assert [(event["job"], event["container"], event["title"]) for event in heard] == [
        ("nightly", 101, "web (101)"), ("nightly", 103, "test (103)"),
    ]  # fmt: skip
    told = dict(line.split("=", 1) for line in (tmp_path / "told.103").read_text().splitlines())
    assert told["SYSCTR_JOB"] == "nightly"
    assert told["SYSCTR_NAME"] == "test (103)"
    assert told["SYSCTR_ERROR"] == "cannot backup test (103): gone"
    assert place.tasks.get(told["SYSCTR_TASK"]).kind == "backup"
    assert (tmp_path / "told.words").read_text() == "$(touch /tmp/x); 'two words'\n"
    assert (tmp_path / "told.101").exists()
    assert not (tmp_path / "told.102").exists()
    assert (tmp_path / "options").read_text() == "-t -i\n"
    mail = (tmp_path / "mail").read_text()
    assert "To: root, admin@example.org\n" in mail
    assert f"Subject: sysctr on {os.uname().nodename}: backup of 2 containers failed\n" in mail
    assert "test (103): cannot backup test (103): gone" in mail
    assert f"`sysctr task show {task.id}`" in mail


def test_who_cannot_be_told_hides_no_failure(place: Place, tmp_path: Path) -> None:
    program = tmp_path / "alarm"
    program.write_text("#!/bin/sh\necho broken >&2; exit 3\n")
    program.chmod(0o755)
    place.job("nightly", containers=["web"], on_failure=[str(program)])
    place.failing[101] = "reason"
    task = place.run("nightly")
    assert task.error is not None
    assert "reason" in task.error["message"]
    assert b"on_failure: cannot run " in place.tasks.read_log(task.id)
    assert b"broken" in place.tasks.read_log(task.id)


def test_a_container_that_is_gone_and_a_directory_that_is_gone_are_failures(place: Place) -> None:
    place.job("nightly", containers=["web", "test"])
    place.store.delete(103)
    task = place.run("nightly")
    assert task.error is not None
    assert "there is no container test" in task.error["message"]
    assert [number for number, _ in place.made] == [101]
    place.dump.rename(place.dump.parent / "away")
    task = place.run("nightly")
    assert task.error is not None
    assert f"{place.dump}: it does not exist" in task.error["message"]
    assert [number for number, _ in place.made] == [101]


def test_a_job_waits_for_a_container_that_is_busy(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup_run, "_ASK_S", 0.01)
    place.job("nightly", containers=["web"])
    gate = threading.Event()
    place.tasks.submit("start", 101, lambda _: gate.wait(20), subject="web (101)")
    task = place.jobs.run("nightly")
    wait_until(lambda: task.step_text.startswith("waiting: cannot backup web (101): task"), 10)
    gate.set()
    assert task.wait(20)
    assert task.state == "done"
    monkeypatch.setattr(backup_run, "_PATIENCE_S", 0.05)
    gate.clear()
    place.tasks.submit("start", 101, lambda _: gate.wait(20), subject="web (101)")
    task = place.run("nightly")
    assert task.error is not None
    assert "is running" in task.error["message"]
    gate.set()


def test_a_job_that_runs_is_not_run_twice_nor_removed_and_another_waits(place: Place) -> None:
    place.job("one", containers=["web"])
    place.job("two", containers=["db"])
    place.hold.clear()
    first, second = place.jobs.run("one"), place.jobs.run("two")
    waiting, holding = sorted((first, second), key=lambda task: "packing" in task.step_text)
    wait_until(lambda: "waiting for another backup job" in (first.step_text, second.step_text), 10)
    wait_until(lambda: any("packing" in task.step_text for task in (first, second)), 10)
    with pytest.raises(Busy):
        place.jobs.run("one")
    with pytest.raises(Busy, match="cannot remove backup job one: it is running"):
        place.jobs.remove("one")
    assert place.shown("one")["state"] == "running"
    place.hold.set()
    for task in (waiting, holding):
        assert task.wait(20)
        assert task.state == "done"
    place.jobs.remove("one")
    assert place.jobs.list()[0]["name"] == "two"
    assert sorted(os.listdir(place.where.backup_runs)) == ["two.json"]


def test_cancelling_a_job_cancels_its_backup_and_tells_nobody(place: Place, tmp_path: Path) -> None:
    place.job("nightly", all=True, on_failure=["/usr/bin/touch", f"{tmp_path}/told"])
    place.hold.clear()
    task = place.jobs.run("nightly")
    wait_until(lambda: "packing" in task.step_text, 10)
    task.cancel()
    assert task.wait(20)
    assert task.state == "cancelled"
    backups = [one for one in place.tasks.list() if one.kind == "backup"]
    assert [one.state for one in backups] == ["cancelled"]
    assert place.shown("nightly")["state"] == "cancelled"
    assert not (tmp_path / "told").exists()
    assert place.made == []


def test_progress_and_steps_of_a_backup_are_those_of_the_job(place: Place) -> None:
    place.job("nightly", containers=["web", "db"])
    place.hold.clear()
    task = place.jobs.run("nightly")
    wait_until(lambda: task.step_text == "1 of 2: web (101): packing", 10)
    place.hold.set()
    assert task.wait(20)


# When


def at(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%d %H:%M"))


@pytest.fixture
def clock(place: Place, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Set the time and look: returns the jobs that were run then."""

    def look(text: str) -> list[str]:
        now_s = at(text)
        monkeypatch.setattr(backup_jobs, "time", SimpleNamespace(time=lambda: now_s))
        before = {task.id for task in place.tasks.list()}
        place.jobs._run_due(now_s)
        tasks = [task for task in place.tasks.list() if task.id not in before and task.kind == "backup-run"]
        for task in tasks:
            assert task.wait(20)
        return [task.subject.removeprefix("backup job ") for task in tasks]

    return look


def test_a_job_runs_when_it_is_due_and_makes_up_for_what_was_missed_once(
    place: Place, clock: Callable[[str], list[str]]
) -> None:
    place.job("nightly", containers=["web"], schedule="daily 02:00")
    # Not at once: its time today was before it was made.
    assert clock("2026-03-02 12:00") == []
    assert clock("2026-03-03 01:59") == []
    assert clock("2026-03-03 02:00") == ["nightly"]
    assert clock("2026-03-03 02:01") == []
    # The host was off for four days.
    assert clock("2026-03-07 09:00") == ["nightly"]
    assert clock("2026-03-07 09:01") == []
    assert clock("2026-03-08 02:00") == ["nightly"]


def test_what_was_run_by_hand_counts_and_what_is_disabled_is_not_run(
    place: Place, clock: Callable[[str], list[str]]
) -> None:
    place.job("nightly", containers=["web"], schedule="daily 02:00")
    place.job("never", containers=["web"], enabled=False)
    place.job("off", containers=["web"], schedule="off")
    assert clock("2026-03-02 12:00") == []
    assert place.run("nightly").state == "done"
    assert place.run("never").state == "done"
    assert clock("2026-03-02 13:00") == []
    assert clock("2026-03-03 02:00") == ["nightly"]
    assert [place.shown(name)["next_run"] for name in ("never", "off")] == [None, None]
    assert place.shown("nightly")["next_run"] == at("2026-03-04 02:00")


def test_a_failure_is_not_repeated_before_the_next_time(
    place: Place, clock: Callable[[str], list[str]]
) -> None:
    place.job("nightly", containers=["web"], schedule="daily 02:00")
    place.failing[101] = "reason"
    assert clock("2026-03-02 12:00") == []
    assert clock("2026-03-03 02:00") == ["nightly"]
    assert clock("2026-03-03 02:01") == []
    assert clock("2026-03-04 02:00") == ["nightly"]


def test_another_schedule_makes_up_for_nothing(place: Place, clock: Callable[[str], list[str]]) -> None:
    place.job("nightly", containers=["web"], schedule="daily 02:00")
    assert clock("2026-03-03 00:00") == []
    assert clock("2026-03-03 02:00") == ["nightly"]
    shown = place.jobs.show("nightly")
    text = shown["toml"] + 'schedule = "daily 11:00"\n'
    place.jobs.replace("nightly", text, shown["digest"])
    assert clock("2026-03-03 12:00") == []
    assert clock("2026-03-04 11:00") == ["nightly"]


def test_a_clock_that_was_ahead_stops_no_job(place: Place, clock: Callable[[str], list[str]]) -> None:
    place.job("nightly", containers=["web"], schedule="daily 02:00")
    assert clock("2030-01-01 12:00") == []
    assert clock("2030-01-02 02:00") == ["nightly"]
    assert clock("2026-03-03 12:00") == []
    assert clock("2026-03-04 02:00") == ["nightly"]


def test_a_restart_forgets_nothing(place: Place, clock: Callable[[str], list[str]]) -> None:
    place.job("nightly", containers=["web"], schedule="daily 02:00")
    assert clock("2026-03-02 12:00") == []
    assert clock("2026-03-03 02:00") == ["nightly"]
    place.close()
    place.open()
    assert clock("2026-03-03 03:00") == []
    assert place.shown("nightly")["last_success"] == at("2026-03-03 02:00")
    place.close()
    place.open()
    assert clock("2026-03-04 03:00") == ["nightly"]


def cut_short(place: Place, clock: Callable[[str], list[str]], *, killed: bool) -> None:
    """Leave a run behind that the end of the daemon cut short after the first of its containers."""
    place.job("nightly", containers=["web", "db"], schedule="daily 02:00")
    assert clock("2026-03-02 12:00") == []
    started = place.start
    second = threading.Event()

    def start(ref: str, options: BackupOptions) -> Task:
        if ref == "102":
            place.hold.clear()
            second.set()
        return started(ref, options)

    place.jobs._runner._start = start
    place.jobs.run("nightly")
    assert second.wait(10)
    state = Path(place.where.backup_runs) / "nightly.json"
    left = state.read_bytes()
    place.close(0)
    if killed:
        state.write_bytes(left)
    place.hold.set()
    place.open()


@pytest.mark.parametrize("killed", [True, False])
def test_what_the_end_of_the_daemon_cut_short_goes_on_where_it_was(
    place: Place, clock: Callable[[str], list[str]], killed: bool
) -> None:
    cut_short(place, clock, killed=killed)
    assert place.shown("nightly")["state"] == "interrupted"
    assert clock("2026-03-02 13:00") == ["nightly"]
    assert [number for number, _ in place.made] == [101, 102]
    assert place.shown("nightly")["state"] == "done"
    assert clock("2026-03-02 14:00") == []


def test_a_run_that_ends_the_daemon_again_is_not_taken_up_for_ever(
    place: Place, clock: Callable[[str], list[str]]
) -> None:
    cut_short(place, clock, killed=True)
    path = f"{place.where.backup_runs}/nightly.json"
    state = read_state(path)
    state.resumed = True
    write_state(path, state)
    assert clock("2026-03-02 13:00") == []
    assert place.shown("nightly")["state"] == "interrupted"
    assert clock("2026-03-03 02:00") == ["nightly"]
    assert [number for number, _ in place.made] == [101, 101, 102]


def test_a_daemon_that_is_restarted_again_and_again_ends_no_run(
    place: Place, clock: Callable[[str], list[str]], tmp_path: Path
) -> None:
    told = ["/usr/bin/touch", f"{tmp_path}/told"]
    place.job("nightly", containers=["web"], schedule="daily 02:00", on_failure=told)
    for turn in range(3):
        place.hold.clear()
        if turn == 0:
            place.jobs.run("nightly")
        else:
            place.jobs._run_due(time.time())
        wait_until(lambda: any(one.kind == "backup" for one in place.tasks.list("running")), 10)
        place.close(0)
        assert place.shown("nightly")["state"] == "interrupted"
        place.open()
    place.hold.set()
    assert clock("2026-03-02 13:00") == ["nightly"]
    assert place.shown("nightly")["state"] == "done"
    assert not (tmp_path / "told").exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"begun": "x"}', '{"done": [[]]}', '{"done": 1}', "[" * 100_000]
)
def test_a_damaged_state_is_a_new_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    assert read_state(f"{tmp_path}/x.json") == JobState()


def test_a_disk_that_takes_no_state_keeps_no_job_from_running_nor_lets_it_run_for_ever(
    place: Place, clock: Callable[[str], list[str]]
) -> None:
    place.job("nightly", containers=["web"], schedule="daily 02:00")
    Path(place.where.backup_runs).touch()
    assert clock("2026-03-02 12:00") == []
    assert clock("2026-03-03 02:00") == ["nightly"]
    assert clock("2026-03-03 02:01") == []
    os.unlink(place.where.backup_runs)


# Files


def test_what_cannot_be_a_job_is_refused_and_leaves_nothing(place: Place, tmp_path: Path) -> None:
    def refused(kind: type[SysctrError], words: str, name: str = "x", **settings: object) -> None:
        with pytest.raises(kind) as caught:
            place.jobs.add(name, settings)
        assert words in caught.value.message
        assert caught.value.message.startswith("cannot add backup job ")

    refused(UsageError, "not exactly one of containers, tag and all")
    refused(UsageError, "a job's name has lower-case", name="../x", all=True)
    refused(UsageError, "a job's name has lower-case", name="101", all=True)
    refused(UsageError, "mode: 'fast' is not one of", all=True, mode="fast")
    refused(NotFound, "there is no container nobody", containers=["web", "nobody"])
    refused(NotFound, "there is no container 999", all=True, exclude=["999"])
    refused(UsageError, "on_failure: there is no program /no/such", all=True, on_failure=["/no/such"])
    refused(NotFound, f"backup directory {tmp_path}/none: it does not exist", all=True,
            directory=f"{tmp_path}/none")  # fmt: skip
    assert not os.path.exists(place.where.backup_jobs)
    place.job("x", all=True)
    refused(WrongState, "there is one of this name", all=True)


def test_mail_needs_a_mail_system(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alarm, "_PATH", str(tmp_path))
    with pytest.raises(UsageError, match="mail_to: this host has no program sendmail"):
        place.job("nightly", all=True, mail_to=["root"])


def test_a_new_job_says_what_one_may_not_expect(place: Place) -> None:
    assert place.jobs.add("a", {"all": True})["notes"] == [
        "no rule says how many archives to keep: all of them are"
    ]
    assert place.jobs.add("b", {"all": True, "keep_last": 1, "schedule": "off"})["notes"] == [
        "it is run by `sysctr backup job run b` only"
    ]


def test_a_file_with_a_mistake_is_listed_and_not_run(place: Place) -> None:
    place.job("good", containers=["web"])
    (Path(place.where.backup_jobs) / "bad.toml").write_text("schema = 1\nal = true\n")
    (Path(place.where.backup_jobs) / "bytes.toml").write_bytes(b"\xff")
    (Path(place.where.backup_jobs) / "Odd Name.toml").write_text("schema = 1\nall = true\n")
    (Path(place.where.backup_jobs) / "dir.toml").mkdir()
    shown = {one["name"]: one["error"] for one in place.jobs.list()}
    assert list(shown) == ["bad", "bytes", "good"]
    assert "al: no such key, the nearest is all" in shown["bad"]
    assert shown["bytes"].endswith("is not UTF-8")
    assert shown["good"] == ""
    with pytest.raises(ConfigError, match="cannot run backup job bad: "):
        place.jobs.run("bad")
    for name in ("none", "../good", "Odd Name", ""):
        with pytest.raises(NotFound):
            place.jobs.show(name)
    assert [check["state"] for check in place.jobs.checks()] == ["fail", "fail", "ok"]
    place.jobs._run_due(time.time())
    assert ["al: no such key" in notice for notice in place.jobs.notices()] == [True, False]
    (Path(place.where.backup_jobs) / "bad.toml").unlink()
    (Path(place.where.backup_jobs) / "bytes.toml").write_text("schema = 1\nall = true\n")
    place.jobs._run_due(time.time())
    assert place.jobs.notices() == []


def test_an_edit_is_checked_and_loses_no_other_edit(place: Place) -> None:
    place.job("nightly", containers=["web"])
    shown = place.jobs.show("nightly")
    with pytest.raises(UsageError, match="cannot change backup job nightly: schedule: "):
        place.jobs.replace("nightly", shown["toml"] + 'schedule = "x"\n', shown["digest"])
    mine = "# mine\n" + shown["toml"]
    place.jobs.replace("nightly", mine, shown["digest"])
    with pytest.raises(WrongState, match="changed meanwhile"):
        place.jobs.replace("nightly", shown["toml"], shown["digest"])
    assert place.jobs.show("nightly")["toml"] == mine


def test_the_thread_runs_what_is_due_by_itself(place: Place) -> None:
    place.job("hourly", containers=["web"], schedule="hourly")
    state = JobState("hourly", since=time.time() - 2 * HOUR_S)
    write_state(f"{place.where.backup_runs}/hourly.json", state)
    place.close()
    place.open()
    place.jobs.open()
    wait_until(lambda: place.shown("hourly")["state"] == "done", 20)
    assert [number for number, _ in place.made] == [101]
    assert all(task.state in ENDED for task in place.tasks.list())
