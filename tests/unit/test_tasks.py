"""Tasks run one at a time for a container, tell what they do, end in one state and leave a record."""

import doctest
import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sysctr.engine import naming, task_files, tasks
from sysctr.engine.events import Bus
from sysctr.engine.tasks import Task, TaskRunner, as_error
from sysctr.errors import Busy, NoDaemon, NoSpace, NotFound, SysctrError, WrongState
from sysctr.paths import Layout
from tests.wait import wait_until


class Gate:
    """A task's function that waits until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, task: Task) -> str:
        self.reached.set()
        while not self.open.wait(0.005):
            task.check()
        return "passed"


@pytest.fixture
def where(tmp_path: Path) -> Layout:
    layout = Layout(str(tmp_path))
    os.makedirs(layout.lib, mode=0o700)
    return layout


@pytest.fixture
def bus() -> Bus:
    return Bus()


@pytest.fixture
def runner(where: Layout, bus: Bus):
    runner = TaskRunner(where, bus)
    yield runner
    assert runner.close(grace_s=0) == []


def settled(where: Layout, task: Task) -> dict:
    """Wait for the record that is written after everybody was told."""
    path = Path(where.tasks, f"{task.id}.json")
    wait_until(path.exists, what="the record")
    return json.loads(path.read_text())


def fails(error: BaseException):
    def function(task: Task) -> None:
        raise error

    return function


def test_a_task_ends_with_its_result_and_a_record(runner: TaskRunner, where: Layout) -> None:
    task = runner.submit("start", 101, lambda task: {"pid": 7})
    assert task.wait(10)
    assert (task.state, task.result, task.error) == ("done", {"pid": 7}, None)
    assert settled(where, task) == task.as_dict()
    assert runner.get(task.id) is runner.get(task.id[:6]) is task


def test_the_files_are_for_root_alone(runner: TaskRunner, where: Layout) -> None:
    task = runner.submit("start", 101, lambda task: task.log("hello"))
    task.wait(10)
    settled(where, task)
    assert stat.S_IMODE(os.stat(where.tasks).st_mode) == 0o700
    assert {stat.S_IMODE(os.stat(f"{where.tasks}/{task.id}.{end}").st_mode) for end in ("json", "log")} == {
        0o600
    }


def test_a_second_exclusive_task_is_refused_and_told_which_one_holds_the_container(
    runner: TaskRunner,
) -> None:
    gate = Gate()
    first = runner.submit("stop", 101, gate)
    with pytest.raises(Busy, match=f"^cannot start 101: task {first.id} \\(stop\\) is running$") as caught:
        runner.submit("start", 101, gate)
    assert first.id in caught.value.hint
    assert runner.current(101) is first
    others = [runner.submit("start", 102, gate), runner.submit("look", 101, gate, exclusive=False)]
    gate.open.set()
    assert all(task.wait(10) and task.state == "done" for task in [first, *others])
    assert runner.current(101) is None
    assert runner.submit("start", 101, gate).wait(10)


def test_whoever_hears_of_the_end_can_act_on_the_container_at_once(runner: TaskRunner, bus: Bus) -> None:
    with bus.subscribe() as events:
        for _ in range(200):
            task = runner.submit("start", 101, lambda task: None)
            task.wait(10)
        states = [event["task"]["state"] for event in events.take()]
    assert states.count("done") >= 199


def test_others_wait_for_a_task_that_asks_for_patience_but_not_for_ever(runner: TaskRunner) -> None:
    gate = Gate()
    brief = runner.submit("reboot", 101, gate, patience_s=10)
    assert gate.reached.wait(10)
    with pytest.raises(Busy):
        runner.submit("reboot", 101, gate, waits=False)
    threading.Timer(0.05, gate.open.set).start()
    next_one = runner.submit("stop", 101, lambda _task: brief.state)
    assert next_one.wait(10)
    assert next_one.result == "done"
    slow = Gate()
    held = runner.submit("reboot", 101, slow, patience_s=0.05)
    with pytest.raises(Busy, match=f"^cannot stop 101: task {held.id} \\(reboot\\) is running$"):
        runner.submit("stop", 101, lambda _task: None)
    runner.wait_for_brief(101)
    assert held.state == "running"
    slow.open.set()
    assert held.wait(10)


def test_who_takes_over_cancels_the_holder_and_waits_for_its_end(runner: TaskRunner) -> None:
    gate = Gate()
    first = runner.submit("start", 101, gate)
    assert gate.reached.wait(10)
    second = runner.submit("destroy", 101, lambda _task: "gone", takes_over=True)
    assert second.wait(10)
    assert (first.state, second.state, second.result) == ("cancelled", "done", "gone")
    assert f"cancelling task {first.id} (start)" in runner.read_log(second.id).decode()
    assert runner.current(101) is None


def test_who_takes_over_gives_up_at_the_time_out_and_when_cancelled(
    runner: TaskRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runner.hold(101, "configure"):
        waiting = runner.submit("destroy", 101, lambda _task: None, takes_over=True)
        waiting.cancel()
        assert waiting.wait(10)
        assert waiting.state == "cancelled"
        monkeypatch.setattr(tasks, "TAKE_OVER_S", 0.01)
        late = runner.submit("destroy", 101, lambda _task: None, subject="web (101)", takes_over=True)
        assert late.wait(10)
    assert late.error["code"] == "busy"
    assert late.error["message"] == "cannot destroy web (101): configure is running"


def test_an_error_names_the_container_as_people_do(
    runner: TaskRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_HOLD_PATIENCE_S", 0.01)

    def fail(_task: Task) -> None:
        raise WrongState("cannot freeze 101: 101 is frozen", "`sysctr thaw 101` lets it go on")

    task = runner.submit("freeze", 101, fail, subject="web (101)")
    assert task.wait(10)
    assert task.error["message"] == "cannot freeze web (101): 101 is frozen"
    assert task.error["hint"] == "`sysctr thaw web` lets it go on"
    with runner.hold(101, "x"), pytest.raises(Busy, match=r"cannot stop web \(101\): x is running"):
        runner.submit("stop", 101, fail, subject="web (101)")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("start", "start web (101)"), ("rollback", "roll back web (101)"),
        ("template-create", "make a template of web (101)"), ("delsnapshot", "delete snapshots of web (101)"),
        ("shutdown", "shut down web (101)"),
    ],
)  # fmt: skip
def test_a_message_says_what_a_task_does_in_words(runner: TaskRunner, kind: str, words: str) -> None:
    gate = Gate()
    task = runner.submit(kind, 101, gate, subject="web (101)")
    with pytest.raises(Busy):
        runner.submit("start", 101, gate)
    task.cancel()
    assert task.wait(10)
    assert task.error["message"] == f"cannot {words}: the task was cancelled"


def test_a_subject_is_held_like_a_container(runner: TaskRunner) -> None:
    gate = Gate()
    runner.submit("build", None, gate, subject="template debian-12")
    with pytest.raises(Busy, match=r"^cannot remove template debian-12: task"):
        runner.submit("remove", None, gate, subject="template debian-12")
    unnamed = [runner.submit("sweep", None, gate) for _ in range(2)]
    gate.open.set()
    assert all(task.wait(10) for task in unnamed)


def test_a_short_action_holds_the_container_too_and_can_wait_for_it(
    runner: TaskRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    holding, changed = threading.Event(), threading.Event()

    def change() -> None:
        with runner.hold(101, "rename"):
            holding.set()
            assert changed.wait(10)

    changing = threading.Thread(target=change)
    changing.start()
    assert holding.wait(10)
    threading.Timer(0.05, changed.set).start()
    assert runner.submit("stop", 101, lambda _task: None).wait(10)
    changing.join()
    monkeypatch.setattr(tasks, "_HOLD_PATIENCE_S", 0.01)
    with runner.hold(101, "rename"), pytest.raises(Busy, match=r"^cannot start 101: rename is running$"):
        runner.submit("start", 101, gate)
    task = runner.submit("start", 101, gate)
    with pytest.raises(Busy, match=f"cannot rename 101: task {task.id}"), runner.hold(101, "rename", 0.01):
        pass
    gate.reached.wait(10)
    threading.Timer(0.02, gate.open.set).start()
    with runner.hold(101, "rename", timeout_s=10):
        assert task.wait(10)


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (WrongState("cannot start 101: it runs", "look"), "wrong-state", "cannot start 101: it runs"),
        (OSError(28, "No space left", "/x"), "no-space", "cannot start 101: /x: No space left"),
        (OSError(5, "Input/output error"), "failed", "cannot start 101: Input/output error"),
        (ZeroDivisionError("secret"), "bug", "cannot start 101: an internal error"),
    ],
)  # fmt: skip
def test_a_failure_is_told_as_what_it_is(
    runner: TaskRunner, raised: Exception, code: str, message: str
) -> None:
    task = runner.submit("start", 101, fails(raised))
    assert task.wait(10)
    assert task.state == "failed"
    assert (task.error["code"], task.error["message"]) == (code, message)
    assert runner.current(101) is None


def test_the_traceback_of_a_bug_is_in_the_log_and_not_in_the_error(runner: TaskRunner, where: Layout) -> None:
    task = runner.submit("start", 101, fails(ZeroDivisionError("secret")))
    task.wait(10)
    settled(where, task)
    assert "ZeroDivisionError: secret" in runner.read_log(task.id).decode()
    assert "secret" not in json.dumps(task.as_dict())


def test_a_result_that_is_not_json_is_a_bug_and_not_a_broken_record(
    runner: TaskRunner, where: Layout
) -> None:
    task = runner.submit("start", 101, lambda task: object())
    task.wait(10)
    assert (task.error["code"], task.result) == ("bug", None)
    assert settled(where, task)["state"] == "failed"


def test_a_cancelled_task_stops_at_its_next_check(runner: TaskRunner) -> None:
    gate = Gate()
    task = runner.submit("start", 101, gate)
    gate.reached.wait(10)
    task.cancel()
    assert task.wait(10)
    assert (task.state, task.error["code"]) == ("cancelled", "cancelled")


def test_a_task_that_is_past_its_last_check_is_done_although_cancelled(runner: TaskRunner) -> None:
    cancelled = threading.Event()
    task = runner.submit("start", 101, lambda task: cancelled.wait(10))
    task.cancel()
    cancelled.set()
    assert task.wait(10)
    assert task.state in ("done", "cancelled")


def test_tasks_begin_in_the_order_of_their_submission_and_a_queued_one_can_be_cancelled(
    where: Layout, bus: Bus
) -> None:
    runner = TaskRunner(where, bus, threads=1)
    gate, order = Gate(), []
    first = runner.submit("start", 100, gate)
    rest = [runner.submit("start", 101 + n, lambda task: order.append(task.container)) for n in range(5)]
    assert {task.state for task in rest} == {"queued"}
    rest[2].cancel()
    gate.open.set()
    assert all(task.wait(10) for task in [first, *rest])
    assert order == [101, 102, 104, 105]
    assert rest[2].state == "cancelled"
    runner.close(0)


def test_steps_and_progress_are_published_and_progress_not_more_than_ten_times_a_second(
    runner: TaskRunner, bus: Bus
) -> None:
    def copy(task: Task) -> None:
        for number in range(2000):
            task.progress(number, 2000)
        task.step("unpack")

    with bus.subscribe() as events:
        started = time.monotonic()
        task = runner.submit("create", 101, copy)
        task.wait(10)
        took_s = time.monotonic() - started
        settled_states = []
        while "done" not in settled_states:
            settled_states.append(events.get(10)["task"]["state"])
    assert 4 <= len(settled_states) <= 6 + took_s * 10
    assert (task.progress_bytes, task.total_bytes, task.step_text) == (1999, 2000, "unpack")


def test_the_log_holds_steps_and_lines_and_its_end_survives_the_limit(
    runner: TaskRunner, where: Layout
) -> None:
    def noisy(task: Task) -> None:
        task.step("first step")
        for _ in range(40):
            task.log("x" * 50_000)
        raise SysctrError("cannot build: the last word")

    task = runner.submit("build", None, noisy)
    task.wait(10)
    settled(where, task)
    text = runner.read_log(task.id).decode()
    assert len(text) <= task_files.LOG_LIMIT_BYTES
    assert "Z first step\n" in text
    assert "reached its limit" in text
    assert text.endswith("cannot build: the last word\n")


def test_a_log_is_never_written_through_a_link(runner: TaskRunner, where: Layout, tmp_path: Path) -> None:
    victim = tmp_path / "victim"

    def linked(task: Task) -> None:
        os.symlink(victim, f"{where.tasks}/{task.id}.log")
        task.log("hello")

    task = runner.submit("start", 101, linked)
    task.wait(10)
    assert task.state == "done"
    assert not victim.exists()


def test_a_full_disk_costs_the_record_and_not_the_task(
    runner: TaskRunner, where: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: str, flags: int, record: dict) -> None:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(task_files, "_write", full)
    task = runner.submit("destroy", 101, lambda task: task.log("hello"))
    assert task.wait(10)
    assert task.state == "done"


def test_any_number_can_wait_without_a_thread_each(runner: TaskRunner) -> None:
    gate, woken = Gate(), []
    task = runner.submit("start", 101, gate)
    gate.reached.wait(10)
    threads = threading.active_count()
    callbacks = [lambda n=n: woken.append(n) for n in range(100)]
    for callback in callbacks:
        task.on_end(callback)
    task.forget(callbacks[0])
    assert threading.active_count() == threads
    gate.open.set()
    task.wait(10)
    assert woken == list(range(1, 100))
    task.on_end(lambda: woken.append("late"))
    assert woken[-1] == "late"


CRASH = """
import os, sys, threading
from sysctr.engine.events import Bus
from sysctr.engine.tasks import TaskRunner
from sysctr.paths import Layout
from tests.wait import wait_until
running = threading.Event()
def function(task):
    task.log("begun")
    running.set()
    threading.Event().wait()
TaskRunner(Layout(sys.argv[1]), Bus()).submit("start", 101, function)
running.wait()
os.kill(os.getpid(), 9)
"""


def test_a_task_that_a_crash_ended_is_failed_at_the_next_start(where: Layout, bus: Bus) -> None:
    subprocess.run([sys.executable, "-c", CRASH, where.root], check=False, timeout=30)
    runner = TaskRunner(where, bus)
    (task,) = runner.list()
    assert task.state == "failed"
    assert task.error["code"] == "interrupted"
    assert "interrupted: the daemon was stopped" in task.error["message"]
    assert task.wait(0)
    assert runner.current(101) is None
    text = runner.read_log(task.id).decode()
    assert "begun" in text
    assert "interrupted" in text
    assert settled(where, task) == task.as_dict()
    runner.close(0)
    again = TaskRunner(where, bus)
    assert [one.as_dict() for one in again.list()] == [task.as_dict()]
    again.close(0)


def test_only_the_newest_are_kept_and_survive_a_restart(where: Layout, bus: Bus) -> None:
    runner = TaskRunner(where, bus, kept=5)
    tasks = [runner.submit("start", 101 + n, lambda task: task.log("x")) for n in range(12)]
    for task in tasks:
        task.wait(10)
    runner.close(10)
    Path(where.tasks, "running").write_text('{"id": "0123456789ab", "crea\n[]\n1\n' + "[" * 9000)
    Path(where.tasks, "0123456789ab.json").write_text('{"id": "0123456789ab"')
    Path(where.tasks, "ffffffffffff.log").write_text("of no task")
    Path(where.tasks, ".aaaaaaaaaaaa.new").write_text("half")
    again = TaskRunner(where, bus, kept=3)
    kept = [task.id for task in again.list()]
    assert len(kept) == 3
    assert set(kept) <= {task.id for task in tasks}
    assert {name.split(".")[0] for name in os.listdir(where.tasks)} == {*kept, "running"}
    again.close(0)


def test_closing_gives_a_grace_then_cancels_and_names_what_is_stuck(where: Layout, bus: Bus) -> None:
    runner = TaskRunner(where, bus, threads=3)
    stuck, never, gate = threading.Event(), threading.Event(), Gate()
    deaf = runner.submit("build", None, lambda task: stuck.set() or never.wait(30))
    willing = runner.submit("start", 101, gate)
    short = runner.submit("start", 102, lambda task: threading.Event().wait(0.05) and None)
    late = runner.submit("start", 103, lambda task: None)
    stuck.wait(10)
    assert runner.close(grace_s=0.5, cancel_s=0.5) == [deaf]
    assert [task.state for task in (deaf, willing, short, late)] == ["failed", "cancelled", "done", "done"]
    assert deaf.error["code"] == "interrupted"
    with pytest.raises(NoDaemon):
        runner.submit("start", 104, gate)
    never.set()


def test_an_unknown_or_ambiguous_id_is_not_found(runner: TaskRunner) -> None:
    for task_id in ("", "7f3a", "../../etc/passwd", "0" * 12):
        with pytest.raises(NotFound):
            runner.get(task_id)


def test_submitting_is_cheap(runner: TaskRunner) -> None:
    times = []
    for _ in range(50):
        started = time.perf_counter()
        task = runner.submit("start", 101, lambda task: None)
        times.append(time.perf_counter() - started)
        task.wait(10)
    # 0.1 ms here; the bound is wide because the machine may be busy.
    assert sorted(times)[10] < 0.003


def test_errors_of_the_disk_keep_their_kind() -> None:
    assert isinstance(as_error(OSError(122, "Disk quota exceeded"), "start 101"), NoSpace)
    assert as_error(KeyError("x"), "start 101") is None


def test_the_examples_of_naming_hold() -> None:
    assert doctest.testmod(naming).failed == 0
