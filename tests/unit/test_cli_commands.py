"""What the commands ask of the daemon, what they print, and with which code they end."""

import doctest
import io
import json
import os
import re
import subprocess
import sys
import threading

import pytest

from sysctr import cli, errors
from sysctr.cli import command, container, create, main, output, progress, settings, watch
from sysctr.cli.command import build_parser
from sysctr.cli.keys import KEYS
from sysctr.config import schema
from tests.unit.cli_stub import Stub

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
VISIBLE = [name for name in cli.COMMANDS if not name.startswith("_")]


@pytest.fixture
def stub(tmp_path, monkeypatch):
    stub = Stub(tmp_path / "host")
    monkeypatch.setenv("SYSCTR_ROOT", stub.layout.root)
    yield stub
    stub.close()


def asked(stub, method):
    return [(where, body) for verb, where, _, body in stub.requests if verb == method]


@pytest.mark.parametrize("module", [cli, command, container, create, output, progress, settings, watch])
def test_examples_of_the_modules_hold(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", VISIBLE)
def test_every_help_has_an_example_that_parses_and_exit_codes(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert "exit codes:" in shown
    command = cli.load(name)
    for example in command.examples:
        assert f"sysctr {name}" in example or example.startswith("    ")


def test_nothing_typed_shows_the_daily_commands_and_help_shows_all(capsys):
    assert main([]) == 0
    short = capsys.readouterr().out
    assert "create" in short
    assert "template build" not in short
    assert main(["help"]) == 0
    whole = capsys.readouterr().out
    assert all(f"  {name} " in whole for name in VISIBLE)
    assert "_words" not in whole


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lst", "list"),
        ("destory", "destroy"),
        ("template biuld", "template build"),
        ("task lits", "task list"),
    ],
)
def test_an_unknown_command_is_usage_and_the_nearest_is_named(typed, meant, capsys):
    assert main(typed.split()) == 2
    assert f"did you mean `sysctr {meant}`?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["list", "--nope"], ["start"], ["start", "--all", "demo"], ["start", "--onboot", "demo"],
     ["set", "demo"], ["set", "demo", "x"],
     ["wait"], ["create", "x", "--id", "99"], ["create", "x", "--id", "many"],
     ["stop", "x", "--timeout", "nan"], ["wait", "x", "--timeout", "-1"],
     ["console", "x", "--escape", "a"]],
)  # fmt: skip
def test_wrong_usage_is_one_error_line_and_code_two(stub, arguments, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("sysctr: cannot ")
    assert stub.requests == []


def test_the_list_shows_what_a_container_is_and_neutralises_it(stub, capsys):
    stub.routes["GET", "/1/containers"] = [
        stub.container(tags=["a\x1b[2J", "b"], booted=False),
        stub.container(102, "web", state="stopped", addresses=[], memory_bytes=None, uptime_s=None),
    ]
    assert main(["list"]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["ID", "NAME", "STATE", "ADDRESS", "MEMORY", "UPTIME", "TEMPLATE", "TAGS"]
    assert first.split(maxsplit=7) == [
        "101", "demo", "booting", "10.0.3.2", "10M", "1m", "1s", "debian-12  a\\x1b[2J, b",
    ]  # fmt: skip
    assert second.split() == ["102", "web", "stopped", "-", "-", "-", "debian-12", "-"]
    assert main(["list", "-q"]) == 0
    assert capsys.readouterr().out == "101\n102\n"
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["tags"] == ["a\x1b[2J", "b"]


def test_several_containers_start_before_the_first_is_waited_for_and_the_worst_code_wins(stub, capsys):
    for number in (101, 102, 103):
        running = stub.task(id=f"t{number}", container=number, state="running")
        stub.routes["POST", f"/1/containers/{number}/start"] = (202, {"task": running})
        stub.routes["GET", f"/1/tasks/t{number}/wait"] = {"task": {**running, "state": "done"}}
    busy = errors.Busy("cannot start 102: task 1 stops it", "wait")
    stub.routes["POST", "/1/containers/102/start"] = busy
    failed = stub.task(
        id="t103", container=103, state="failed", error={"code": "failed", "message": "no init"}
    )
    stub.routes["GET", "/1/tasks/t103/wait"] = {"task": failed}
    assert main(["start", "101", "102", "103", "101"]) == 4
    shown = capsys.readouterr()
    assert shown.out == "started 101\n"
    assert "cannot start 102: task 1 stops it\nhint: wait\n" in shown.err
    assert "sysctr: 103: no init" in shown.err
    assert [verb for verb, _, _, _ in stub.requests] == ["POST", "POST", "POST", "GET", "GET"]


@pytest.mark.parametrize(
    ("command", "numbers"),
    [
        ("start", [102]),
        ("stop", [101, 103]),
        ("freeze", [101]),
        ("thaw", [103]),
        ("destroy", [101, 102, 103]),
    ],
)
def test_all_means_those_to_which_the_verb_applies(stub, command, numbers, capsys):
    states = {101: "running", 102: "stopped", 103: "frozen"}
    stub.routes["GET", "/1/containers"] = [
        stub.container(number, f"n{number}", state=state) for number, state in states.items()
    ]
    for number in states:
        done = (202, {"task": stub.task(container=number)})
        stub.routes["POST", f"/1/containers/{number}/{command}"] = done
        stub.routes["DELETE", f"/1/containers/{number}"] = done
    options = ["--yes"] if command == "destroy" else []
    assert main([command, "--all", "-q", *options]) == 0
    assert capsys.readouterr().out.split() == [str(number) for number in numbers]


def test_onboot_starts_what_is_stopped_and_meant_to_run(stub, capsys):
    states = {101: ("stopped", True), 102: ("stopped", False), 103: ("running", True)}
    stub.routes["GET", "/1/containers"] = [
        stub.container(number, f"n{number}", state=state, onboot=onboot)
        for number, (state, onboot) in states.items()
    ]
    stub.routes["POST", "/1/containers/101/start"] = (202, {"task": stub.task(container=101)})
    assert main(["start", "--onboot", "-q"]) == 0
    assert capsys.readouterr().out.split() == ["101"]
    assert [where for where, _ in asked(stub, "POST")] == ["/1/containers/101/start"]
    stub.routes["GET", "/1/containers"] = []
    assert main(["start", "--onboot"]) == 0


def test_without_waiting_the_tasks_id_is_printed(stub, capsys):
    stub.routes["POST", "/1/containers/demo/stop"] = (202, {"task": stub.task("stop", state="running")})
    assert main(["stop", "--no-wait", "--timeout", "3", "demo"]) == 0
    assert capsys.readouterr().out == "7f3a09c1d2e4\n"
    assert asked(stub, "POST") == [("/1/containers/demo/stop", {"timeout_s": 3.0})]


def test_stop_with_kill_asks_for_it(stub):
    stub.routes["POST", "/1/containers/demo/stop"] = (202, {"task": stub.task("stop")})
    assert main(["stop", "--kill", "demo"]) == 0
    assert asked(stub, "POST")[0][1] == {"kill": True}


def test_the_steps_of_a_long_task_are_plain_lines_off_a_terminal(stub, capsys):
    steps = iter(["unpack", "unpack", "boot"])

    def wait(query, _):
        step = next(steps, None)
        return {"task": stub.task(state="running" if step else "done", step=step or "")}

    stub.routes["POST", "/1/containers/demo/start"] = (202, {"task": stub.task(state="queued")})
    stub.routes["GET", "/1/tasks/7f3a09c1d2e4/wait"] = wait
    assert main(["start", "demo"]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("started demo\n", "demo: unpack\ndemo: boot\n")


def test_an_interrupted_wait_leaves_the_task_and_says_how_to_cancel_it(stub, monkeypatch, capsys):
    def interrupt(self, *_, **__):
        raise KeyboardInterrupt

    stub.routes["POST", "/1/containers/demo/start"] = (202, {"task": stub.task(state="running")})
    monkeypatch.setattr("sysctr.client.Client.get", interrupt)
    assert main(["start", "demo"]) == 130
    shown = capsys.readouterr().err
    assert "the task goes on" in shown
    assert "sysctr task cancel 7f3a09c1d2e4" in shown
    assert asked(stub, "DELETE") == []


def test_cancelling_what_has_ended_says_so(stub, capsys):
    ids = {"running": "aaaa", "cancelled": "bbbb", "done": "cccc"}
    for state, task in ids.items():
        stub.routes["DELETE", f"/1/tasks/{task}"] = {"task": stub.task(state=state)}
    assert main(["task", "cancel", *ids.values()]) == 4
    shown = capsys.readouterr().err
    assert "asked aaaa to stop" in shown
    assert "asked bbbb to stop" in shown
    assert "cannot cancel cccc: it has ended already, as done" in shown


def test_create_sends_every_option(stub, tmp_path, capsys):
    stub.routes["POST", "/1/containers"] = (202, {"task": stub.task("create", container=120)})
    key, password = tmp_path / "key.pub", tmp_path / "password"
    key.write_text("# mine\nssh-ed25519 AAAA me\n\n")
    password.write_text("secret\nnot this\n")
    typed = [
        "create", "web", "--template", "debian-12", "--id", "120", "--cores", "2", "--memory", "1G",
        "--net", "name=eth0,ip=10.0.0.2/24", "--ssh-key", str(key), "--password-file", str(password),
        "--env", "A=b=c", "--tag", "x", "--tag", "y", "--onboot", "--set", "stop_signal=SIGINT", "--start",
        "--mount", "target=/data,size=8G", "--mount", "/srv,mp=/srv", "--device", "fuse",
    ]  # fmt: skip
    assert main(typed) == 0
    assert capsys.readouterr().out == "created and started 120 (web)\n"
    assert asked(stub, "POST")[0][1] == {
        "name": "web", "id": 120, "template": "debian-12", "onboot": True, "start": True, "tags": ["x", "y"],
        "set": {"stop_signal": "SIGINT", "limits.cores": "2", "limits.memory": "1G"},
        "nets": ["name=eth0,ip=10.0.0.2/24"], "environment": {"A": "b=c"}, "password": "secret",
        "mounts": ["target=/data,size=8G", "/srv,mp=/srv"], "devices": ["fuse"],
        "ssh_keys": ["ssh-ed25519 AAAA me"],
    }  # fmt: skip


def test_a_private_key_is_never_sent(stub, tmp_path):
    key = tmp_path / "key"
    key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nx\n")
    assert main(["create", "web", "--ssh-key", str(key)]) == 2
    assert stub.requests == []


def test_destroy_refuses_to_guess_without_a_terminal(stub, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("demo\n"))
    assert main(["destroy", "demo"]) == 2
    assert "--yes" in capsys.readouterr().err
    assert asked(stub, "DELETE") == []
    stub.routes["DELETE", "/1/containers/demo"] = (202, {"task": stub.task("destroy")})
    assert main(["destroy", "--yes", "--force", "demo"]) == 0
    assert asked(stub, "DELETE") == [("/1/containers/demo", {"force": True})]


@pytest.mark.parametrize(("typed", "code"), [("demo\n", 0), ("101\n", 1), ("\n", 1), ("", 1)])
def test_destroy_on_a_terminal_wants_the_name(stub, monkeypatch, typed, code):
    stub.routes["GET", "/1/containers/101"] = stub.container(state="stopped")
    stub.routes["DELETE", "/1/containers/101"] = (202, {"task": stub.task("destroy")})
    terminal = io.StringIO(typed)
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(["destroy", "101"]) == code
    assert len(asked(stub, "DELETE")) == (1 if code == 0 else 0)


@pytest.mark.parametrize(("facts", "code"), [({"state": "running"}, 4), ({"protected": True}, 5)])
def test_destroy_does_not_ask_for_what_the_daemon_will_refuse(stub, monkeypatch, capsys, facts, code):
    stub.routes["GET", "/1/containers/101"] = stub.container(**facts)
    terminal = io.StringIO("demo\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(["destroy", "101"]) == code
    assert "type its name" not in capsys.readouterr().err
    assert asked(stub, "DELETE") == []


def test_the_list_marks_an_end_that_nobody_asked_for_inside_and_a_file_with_a_mistake(stub, capsys):
    ends = [("exited", 255), ("killed", 9), ("halt", 2)]
    stub.routes["GET", "/1/containers"] = [
        stub.container(number, f"c{number}", state="stopped", exit={"reason": reason, "status": status})
        for number, (reason, status) in enumerate(ends, 101)
    ] + [stub.container(104, "c104", booted=True, error="cannot accept onbot: no such key")]
    assert main(["list"]) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    shown = [row[11:].split("  ")[0] for row in rows]
    assert shown == ["stopped (exited 255)", "stopped (killed)", "stopped", "running (damaged)"]


def test_info_says_when_and_how_it_ended(stub, capsys):
    stub.routes["GET", "/1/containers/demo"] = stub.container(
        state="stopped", exit={"reason": "killed", "status": 9, "ended": 0},
        idmap={"first": 100000, "count": 65536},
    )  # fmt: skip
    assert main(["info", "demo"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^last end: +killed by signal 9 at 19(69|70)-", shown, re.MULTILINE)
    assert re.search(r"^ids on the host: 100000 to 165535$", shown, re.MULTILINE)


def test_nothing_is_waited_for_that_cannot_come(stub, capsys):
    answers = [
        stub.container(state="stopped", task={"id": "t1", "kind": "start"}),
        stub.container(state="stopped", exit={"reason": "exited", "status": 255}),
    ]
    stub.routes["GET", "/1/containers/demo/wait"] = lambda *_: answers.pop(0)
    assert main(["wait", "demo"]) == 4
    assert "it is stopped, its last end was: exited 255\nhint: `sysctr logs demo`" in capsys.readouterr().err


def test_the_keys_of_the_help_are_those_of_the_schema():
    wanted = [(key.usage, key.live, key.doc) for key in schema.KEYS if key.live != "fixed"]
    assert list(KEYS) == wanted


def test_config_says_on_stderr_what_waits_and_leaves_stdout_the_file(stub, capsys):
    stub.routes["GET", "/1/containers/demo/config"] = {
        "toml": "schema = 1\n",
        "pending": ["init"],
        "error": "",
    }
    assert main(["config", "demo"]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("schema = 1\n", "pending until the next start: init\n")


def test_set_reports_what_waits_for_the_next_start(stub, capsys):
    answer = {"applied": ["limits.memory"], "pending": ["init"]}
    stub.routes["PATCH", "/1/containers/demo/config"] = answer
    assert main(["set", "demo", "memory=1G", "init=/bin/x=y", "--unset", "cpu"]) == 0
    assert capsys.readouterr().out == "applied: limits.memory\npending until the next start: init\n"
    changes = {"limits.memory": "1G", "init": "/bin/x=y", "limits.cpu": None}
    assert asked(stub, "PATCH") == [("/1/containers/demo/config", {"changes": changes})]


def test_the_password_comes_from_stdin_and_goes_into_the_body(stub, monkeypatch):
    stub.routes["POST", "/1/containers/demo/passwd"] = (202, {"task": stub.task("passwd")})
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"s\xc3\xa4cret\n")))
    assert main(["passwd", "demo", "--user", "admin", "--stdin"]) == 0
    assert asked(stub, "POST")[0][1] == {"user": "admin", "password": "säcret"}


@pytest.mark.parametrize(
    ("state", "answers", "code"),
    [
        ("booted", [("starting", None), ("running", False), ("running", True)], 0),
        ("stopped", [("running", True)], 4),
    ],
)
def test_wait_asks_until_the_state_is_there_or_the_time_is_over(stub, state, answers, code):
    left = list(answers)

    def wait(query, _):
        reached, booted = left.pop(0) if len(left) > 1 else left[0]
        if code:
            # As the daemon does: the answer comes when the time is over.
            threading.Event().wait(float(query["timeout"]))
        return stub.container(state=reached, booted=booted)

    stub.routes["GET", "/1/containers/demo/wait"] = wait
    timeout = ["--timeout", "0.1"] if code else []
    assert main(["wait", "demo", "--state", state, *timeout]) == code


def test_edit_keeps_what_the_server_refuses_and_offers_another_round(stub, monkeypatch, capsys, tmp_path):
    stub.routes["GET", "/1/containers/demo/config"] = {"toml": "a = 1\n", "digest": "d1", "pending": {}}
    answers = [errors.ConfigError("cannot use a: no such key"), {"applied": [], "pending": ["b"]}]
    stub.routes["PUT", "/1/containers/demo/config"] = lambda *_: answers.pop(0)
    monkeypatch.setenv("VISUAL", "sed -i s/[12]$/&2/")
    terminal = io.StringIO("y\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["edit", "demo"]) == 0
    bodies = [body for _, body in asked(stub, "PUT")]
    assert bodies == [{"toml": "a = 12\n", "digest": "d1"}, {"toml": "a = 122\n", "digest": "d1"}]
    assert [name for name in os.listdir(tmp_path) if name.endswith(".toml")] == []
    answers.append(errors.WrongState("cannot change demo: it was changed meanwhile"))
    assert main(["edit", "demo"]) == 2
    kept = [name for name in os.listdir(tmp_path) if name.endswith(".toml")]
    assert (tmp_path / kept[0]).read_text() == "a = 12\n"
    assert kept[0] in capsys.readouterr().err


def test_logs_are_exact_in_a_pipe(stub, capfdbinary):
    content = b"\x1b[32mok\x1b[0m\r\n\xff\x00"
    stub.routes["GET", "/1/containers/demo/logs"] = (200, ["chunks", content[:5], content[5:]])
    assert main(["logs", "demo"]) == 0
    assert capfdbinary.readouterr().out == content


def test_logs_on_a_terminal_are_text():
    pieces = [b"\x1b]0;owned\x07[\x1b[0;32m  O", b"K  \x1b[0m] up\r\n\x9b\xc2\x9b2J\x1bPq\n", b"rest"]
    assert list(watch.readable_lines(pieces)) == ["[  OK  ] up", "\ufffd\\x9b2J\\x1bPq", "rest"]


def test_events_are_lines(stub, capsys):
    stub.routes["GET", "/1/events"] = (
        200,
        ["chunks", b'data: {"kind": "container", "id": 101, "note": "\\u001b"}\n\n'],
    )
    # A stream that ends is a daemon that ended: who follows has to know.
    assert main(["events"]) == 6
    assert capsys.readouterr().out == "container id=101 note=\\x1b\n"
    assert main(["events", "--json"]) == 6
    assert json.loads(capsys.readouterr().out)["id"] == 101


def test_doctor_fails_if_a_check_does_and_shows_the_hint(stub, capsys):
    stub.routes["GET", "/1/doctor"] = [
        {"check": "kernel", "ok": True, "detail": "6.1", "hint": ""},
        {"check": "lxcfs", "ok": True, "state": "warn", "detail": "absent", "hint": "install it"},
    ]
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "ok    kernel: 6.1\nwarn  lxcfs: absent\n      hint: install it\n"
    stub.routes["GET", "/1/doctor"] = [
        {"check": "nft", "ok": False, "detail": "missing", "hint": "install nftables"}
    ]
    assert main(["doctor"]) == 1
    assert "fail  nft: missing\n      hint: install nftables" in capsys.readouterr().out


def test_templates_are_built_of_a_name_or_of_a_file_by_its_absolute_path(stub, tmp_path, monkeypatch):
    stub.routes["POST", "/1/templates/build"] = (202, {"task": stub.task("build", container=None)})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("")
    assert main(["template", "build", "debian-12", "--set", "suite=trixie"]) == 0
    assert main(["template", "build", "mine.toml", "--name", "mine"]) == 0
    assert [body for _, body in asked(stub, "POST")] == [
        {"recipe": "debian-12", "set": {"suite": "trixie"}},
        {"recipe": str(tmp_path / "mine.toml"), "set": {}, "name": "mine"},
    ]
    assert main(["template", "import", "absent.tar"]) == 3


def test_the_words_of_completion_start_no_daemon(stub, tmp_path, monkeypatch, capsys):
    stub.routes["GET", "/1/containers"] = [stub.container(), stub.container(102, "web")]
    assert main(["_words", "containers"]) == 0
    assert capsys.readouterr().out == "demo\nweb\n"
    monkeypatch.setenv("SYSCTR_ROOT", str(tmp_path / "absent"))
    assert main(["_words", "containers"]) == 6
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_asks_for_the_names_of_containers(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "sysctr _words containers" in script
    assert "--template" in script or "template" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_one_parser_of_everything_can_be_built():
    from sysctr.cli.help import whole_parser

    whole = whole_parser()
    assert whole.parse_args(["template", "import", "f"]).file == "f"
    for name in VISIBLE:
        build_parser(name, cli.COMMANDS[name][2], cli.load(name)).format_help()


def test_a_reader_that_leaves_is_no_error(stub):
    stub.routes["GET", "/1/containers"] = [
        stub.container(number, f"n{number}") for number in range(100, 3000)
    ]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    with subprocess.Popen(
        [sys.executable, "-m", "sysctr", "list"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_a_socket_one_may_not_use_is_refused_with_the_group(stub, monkeypatch, capsys):
    def forbidden(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sysctr.client.Client._connect_once", forbidden)
    assert main(["list"]) == 5
    assert "group sysctr" in capsys.readouterr().err


def test_what_prints_prints_json_too(stub, capsys):
    answer = {"applied": ["name"], "pending": [], "notes": [], "digest": "x"}
    stub.routes["POST", "/1/containers/demo/rename"] = answer
    stub.routes["POST", "/1/containers/demo/protect"] = answer
    assert main(["rename", "demo", "web", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "web", **answer}
    assert main(["protect", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"name": "demo", "protected": True, **answer}]
