"""The commands of migration: what they ask of the daemon, what they print, and with which code they end."""

import doctest
import io
import json

import pytest

from sysctr import errors
from sysctr.cli import main, moved
from sysctr.cli.help import whole_parser
from sysctr.cli.progress import bar_line
from tests.unit.cli_stub import Stub
from tests.unit.served import Served

NOW_S = 1_769_900_000.0
MID = "0123456789abcdef"
MB = 1 << 20

PLAN = {
    "id": 101, "name": "web", "peer": "node2", "blockers": [], "snapshots": 2,
    "warnings": ["eth0 gets another address: 10.0.3.2 is not of node2's network"],
    "there": {
        "id": 204, "name": "web", "pool": "fast",
        "addresses": {
            "eth0": {"before": "10.0.3.2", "after": "10.0.4.7"},
            "eth1": {"before": "192.0.2.5", "after": "192.0.2.5"},
            "eth2": {"before": None, "after": None},
        },
    },
    "volumes": [
        {"name": "rootfs", "there": "fast", "method": "rsync", "total_bytes": 600 * MB,
         "expected_bytes": 52 * MB},
        {"name": "data", "there": "slow", "method": "stream", "total_bytes": 1024 * MB,
         "expected_bytes": 1024 * MB},
    ],
}  # fmt: skip
REPORT = {
    **PLAN, "warnings": [], "sent_bytes": 61 * MB, "seconds": 12.4, "downtime_s": 0.84, "started": True,
    "kept": False, "notes": ["node2 has no name server for web"],
    "passes": [
        {"pass": 1, "seconds": 11.0, "sent_bytes": 52 * MB, "rate_bytes_s": 4.7 * MB},
        {"pass": 2, "seconds": 0.41, "sent_bytes": 9 * MB, "rate_bytes_s": 22 * MB},
    ],
}  # fmt: skip
IN_THE_WAY = [
    {"what": "space", "text": "pool fast of node2 has 1G left, 5G are to be sent",
     "hint": "free some there, or take another pool with --pool-map"},
    {"what": "bridge", "text": "node2 has no bridge vm\x1b[2Jbr0", "hint": "--bridge-map vmbr0=BRIDGE"},
]  # fmt: skip


@pytest.fixture
def stub(tmp_path, monkeypatch):
    stub = Stub(tmp_path / "host")
    monkeypatch.setenv("SYSCTR_ROOT", stub.layout.root)
    monkeypatch.setattr("time.time", lambda: NOW_S)
    known = {"node2": "ab12cd34" * 8, "rack-b": "f" * 64}
    peers = [{"name": name, "fingerprint": fingerprint} for name, fingerprint in known.items()]
    stub.routes["GET", "/1/peers"] = {"peers": peers}
    yield stub
    stub.close()


def goes(stub, ref, verb="migrate", **fields):
    """Let a container be sent with one task, which ends at once."""
    fields = {"state": "done", "result": REPORT, **fields}
    task = stub.task(verb, 101, id=f"t-{ref}", **fields)
    stub.routes["POST", f"/1/containers/{ref}/{verb}"] = (202, {"task": task})
    return task


def asked(stub, method="POST"):
    return [(where, body) for verb, where, _, body in stub.requests if verb == method]


def answering(monkeypatch, typed):
    """Put a person at the terminal, who types this."""
    terminal = io.StringIO(typed)
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)


def test_examples_of_the_texts_hold():
    assert doctest.testmod(moved).failed == 0


def test_every_option_is_sent_and_nothing_that_was_not_said(stub):
    goes(stub, "web")
    typed = [
        "migrate", "web", "node2", "--restart", "--keep", "--start", "--as", "204", "--name", "web-2",
        "--pool-map", "default=fast", "--pool-map", "slow=slow-2", "--bridge-map", "vmbr0=vmbr1",
        "--bwlimit", "50M", "--leave-out", "device,bind", "--leave-out", "bind",
    ]  # fmt: skip
    assert main(typed) == 0
    assert asked(stub)[-1] == (
        "/1/containers/web/migrate",
        {
            "peer": "node2", "restart": True, "keep": True, "start": True, "id": 204, "name": "web-2",
            "pool_map": {"default": "fast", "slow": "slow-2"}, "bridge_map": {"vmbr0": "vmbr1"},
            "bwlimit_bytes": 50 * MB, "leave_out": ["bind", "device"],
        },
    )  # fmt: skip
    assert main(["migrate", "web", "node2", "--bwlimit", "0"]) == 0
    assert asked(stub)[-1][1] == {"peer": "node2"}
    goes(stub, "web", "copy")
    assert main(["copy", "web", "node2", "--name", "web-test", "--as", "300", "--start"]) == 0
    assert asked(stub)[-1] == (
        "/1/containers/web/copy", {"peer": "node2", "name": "web-test", "id": 300, "start": True}
    )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["migrate"], ["copy"], ["migrate", "web"], ["migrate", "--all"], ["migrate", "--tag", "x"],
        ["migrate", "--all", "web", "node2"], ["migrate", "web", "db", "node2", "--as", "204"],
        ["migrate", "web", "db", "node2", "--name", "x"], ["migrate", "web", "node2", "--here"],
        ["migrate", "web", "node2", "--yes"], ["migrate", "--resolve"],
        ["migrate", "--resolve", "web", "--here", "--there"], ["copy", "web", "node2", "--restart"],
        ["migrate", "web", "node2", "--pool-map", "default"], ["migrate", "web", "node2", "--pool-map", "=a"],
        ["migrate", "web", "node2", "--pool-map", "a=b=c"],
        ["migrate", "web", "node2", "--pool-map", "a=b", "--pool-map", "a=c"],
        ["migrate", "web", "node2", "--leave-out", "disk"], ["migrate", "web", "node2", "--as", "12"],
    ],
)  # fmt: skip
def test_wrong_usage_moves_nothing(stub, capsys, words):
    assert main(words) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.startswith("sysctr: cannot ")) == ("", True)
    assert asked(stub) == []


def test_a_rate_is_one_of_backups(stub):
    assert main(["migrate", "web", "node2", "--bwlimit", "fast"]) == 2
    assert asked(stub) == []


@pytest.mark.parametrize("verb", ["migrate", "replicate"])
def test_where_it_goes_and_how_fast_is_told_alike(stub, verb):
    goes(stub, "web", verb)
    options = ["--pool-map", "a=b", "--bridge-map", "vmbr0=vmbr1", "--leave-out", "device,bind"]
    assert main([verb, "web", "node2", *options, "--bwlimit", "50M", "--no-wait"]) == 0
    assert asked(stub)[-1][1] == {
        "peer": "node2", "pool_map": {"a": "b"}, "bridge_map": {"vmbr0": "vmbr1"},
        "leave_out": ["bind", "device"], "bwlimit_bytes": 50 * MB,
    }  # fmt: skip
    assert main([verb, "web", "node2", "--bwlimit", "0", "--no-wait"]) == 0
    assert asked(stub)[-1][1] == {"peer": "node2"}


def test_the_report_says_what_became_of_it(stub, capsys):
    goes(stub, "web")
    assert main(["migrate", "web", "node2", "--restart"]) == 0
    assert capsys.readouterr().out == (
        "migrated web (101) to node2: down for 0.84s, 61M sent in 12s\n"
        "  there: web (204) in pool fast, started\n"
        "  eth0: 10.0.4.7 there, 10.0.3.2 before\n"
        "  passes: 52M in 11s, 9M in 0.41s\n"
        "  note: node2 has no name server for web\n"
    )
    assert main(["migrate", "web", "node2", "-q"]) == 0
    assert capsys.readouterr().out == "101\n"
    assert main(["migrate", "web", "node2", "--json"]) == 0
    (task,) = json.loads(capsys.readouterr().out)
    assert task["result"] == REPORT
    kept = {"downtime_s": None, "started": False, "kept": True, "notes": ["odd\n\x1b[2J"]}
    there = {**PLAN["there"], "addresses": {}}
    goes(stub, "web", result={**REPORT, **kept, "passes": REPORT["passes"][:1], "there": there})
    assert main(["migrate", "web", "node2", "--keep"]) == 0
    assert capsys.readouterr().out == (
        "migrated web (101) to node2: 61M sent in 12s\n"
        "  there: web (204) in pool fast, stopped\n"
        "  here: its files are kept, and it is not started while it is away\n"
        "  note: odd\\n\\x1b[2J\n"
    )
    there = {"id": 300, "name": "w", "pool": "p"}
    goes(stub, "web", "copy", result={**REPORT, "downtime_s": 0.02, "there": there})
    assert main(["copy", "web", "node2", "--start"]) == 0
    assert capsys.readouterr().out.startswith(
        "copied web (101) to node2: held for 0.02s, 61M sent in 12s\n  there: w (300) in pool p, started\n"
    )


def test_a_dry_run_shows_the_plan(stub, capsys):
    goes(stub, "web", result=PLAN)
    assert main(["migrate", "web", "node2", "--dry-run"]) == 0
    assert asked(stub)[-1][1] == {"peer": "node2", "dry_run": True}
    assert capsys.readouterr().out == (
        "migrate:       web (101)\n"
        "to:            node2, as web (204) in pool fast\n"
        "volume rootfs: about 52M of 600M, by rsync\n"
        "volume data:   about 1G of 1G, as a stream of snapshots, to pool slow\n"
        "to send:       about 1.1G of 1.6G\n"
        "snapshots:     2, with their settings\n"
        "address eth0:  10.0.4.7 there, 10.0.3.2 before\n"
        "address eth1:  192.0.2.5 stays\n"
        "address eth2:  none\n"
        "note:          eth0 gets another address: 10.0.3.2 is not of node2's network\n"
        "nothing is in the way\n"
    )


def test_a_dry_run_lists_all_that_is_in_the_way_and_its_code_says_so(stub, capsys):
    short = {"id": 101, "name": "web", "peer": "node2", "blockers": IN_THE_WAY, "warnings": []}
    goes(stub, "web", result=short)
    assert main(["migrate", "web", "node2", "--dry-run"]) == 5
    assert capsys.readouterr().out == (
        "migrate: web (101)\n"
        "to:      node2\n"
        "2 things are in the way:\n"
        "  space: pool fast of node2 has 1G left, 5G are to be sent\n"
        "    free some there, or take another pool with --pool-map\n"
        "  bridge: node2 has no bridge vm\\x1b[2Jbr0\n"
        "    --bridge-map vmbr0=BRIDGE\n"
    )
    assert main(["migrate", "web", "node2", "--dry-run", "--json"]) == 5
    assert json.loads(capsys.readouterr().out)[0]["result"]["blockers"] == IN_THE_WAY


def test_what_is_blocked_says_what_to_do_about_each_thing(stub, capsys):
    message = "cannot migrate 101: 2 things\nspace: full\nbridge: none"
    told = {"code": "blocked", "message": message, "hint": ""}
    failed = stub.task("migrate", id="t1", state="failed", error=told)
    report = {"id": 101, "name": "web", "peer": "node2", "blockers": IN_THE_WAY, "warnings": []}
    stub.routes["GET", "/1/tasks/t2/wait"] = {"task": stub.task("migrate", id="t2", result=report)}

    def answer(_, body):
        dry = stub.task("migrate", id="t2", state="running")
        return (202, {"task": dry if body.get("dry_run") else failed})

    stub.routes["POST", "/1/containers/web/migrate"] = answer
    assert main(["migrate", "web", "node2", "--restart"]) == 5
    assert capsys.readouterr().err == (
        "sysctr: cannot migrate web (101) to node2: 2 things are in the way\n"
        "  space: pool fast of node2 has 1G left, 5G are to be sent\n"
        "    free some there, or take another pool with --pool-map\n"
        "  bridge: node2 has no bridge vm\\x1b[2Jbr0\n"
        "    --bridge-map vmbr0=BRIDGE\n"
    )
    # Where nothing is in the way any more, or nobody answers, what the task said is still true of then.
    for later in ({**report, "blockers": []}, None):
        stub.routes["GET", "/1/tasks/t2/wait"] = {"task": stub.task("migrate", id="t2", result=later)}
        assert main(["migrate", "web", "node2"]) == 5
        assert capsys.readouterr().err == (
            "sysctr: cannot migrate 101: 2 things\n  space: full\n  bridge: none\n"
        )


def test_several_go_one_after_the_other_and_the_worst_code_wins(stub, capsys):
    for ref in ("web", "mail"):
        running = goes(stub, ref, state="running", result=None)
        stub.routes["GET", f"/1/tasks/t-{ref}/wait"] = {
            "task": {**running, "state": "done", "result": {**REPORT, "name": ref}}
        }
    busy = errors.Busy("cannot migrate db: task 1 stops it", "wait")
    stub.routes["POST", "/1/containers/db/migrate"] = busy
    assert main(["migrate", "web", "db", "mail", "web", "node2"]) == 4
    shown = capsys.readouterr()
    assert [line for line in shown.out.splitlines() if line[0] != " "] == [
        "migrated web (101) to node2: down for 0.84s, 61M sent in 12s",
        "migrated mail (101) to node2: down for 0.84s, 61M sent in 12s",
    ]
    assert "sysctr: cannot migrate db: task 1 stops it\nhint: wait\n" in shown.err
    assert shown.err.endswith("migrated 2 of 3; not: db\n")
    ways = [where.rpartition("/")[2] for _, where, _, _ in stub.requests]
    assert ways == ["peers", "migrate", "wait", "migrate", "migrate", "wait"]
    stub.requests.clear()
    assert main(["migrate", "web", "mail", "node2", "--parallel"]) == 0
    assert [where.rpartition("/")[2] for _, where, _, _ in stub.requests[1:]] == [
        "migrate", "migrate", "wait", "wait",
    ]  # fmt: skip
    assert capsys.readouterr().err.endswith("migrated 2 of 2\n")
    assert main(["migrate", "web", "mail", "node2", "--no-wait"]) == 0
    assert capsys.readouterr().out == "t-web\nt-mail\n"


def test_who_stops_waiting_is_told_what_was_not_begun(stub, monkeypatch, capsys):
    from sysctr.client import Client

    goes(stub, "web", state="running")
    get = Client.get

    def interrupted(self, where, *rest, **options):
        if "tasks" in where:
            raise KeyboardInterrupt
        return get(self, where, *rest, **options)

    monkeypatch.setattr(Client, "get", interrupted)
    assert main(["migrate", "web", "db", "mail", "node2"]) == 130
    assert "the task goes on" in (shown := capsys.readouterr().err)
    assert "not begun: db, mail\n" in shown
    assert [where for where, _ in asked(stub)] == ["/1/containers/web/migrate"]


def test_all_are_those_that_are_here(stub, capsys):
    states = {101: "running", 102: "stopped", 103: "away", 104: "frozen"}
    stub.routes["GET", "/1/containers"] = [
        stub.container(number, f"n{number}", state=state) for number, state in states.items()
    ]
    for number in states:
        goes(stub, number)
    assert main(["migrate", "--all", "node2", "--restart", "-q"]) == 0
    assert [where for where, _ in asked(stub)] == [f"/1/containers/{n}/migrate" for n in (101, 102, 104)]
    stub.routes["GET", "/1/containers"] = []
    assert main(["migrate", "--tag", "x", "node2"]) == 0
    assert "nothing to migrate" in capsys.readouterr().err


def test_a_peer_that_there_is_not_is_an_error_before_anything_moves(stub, capsys):
    goes(stub, "web")
    assert main(["migrate", "web", "nod2"]) == 3
    assert capsys.readouterr().err == (
        "sysctr: cannot migrate web: there is no peer nod2\nhint: did you mean node2?\n"
        "hint: `sysctr peer list` shows the hosts that are known\n"
    )
    # The word that was forgotten is the last one.
    assert main(["copy", "web", "db", "test"]) == 3
    shown = capsys.readouterr().err
    assert "cannot copy 2 containers: there is no peer test\nhint: the last word is the other host\n" in shown
    assert "`sysctr clone` copies a container" in shown
    stub.routes["GET", "/1/peers"] = {"peers": []}
    assert main(["migrate", "web", "node2"]) == 3
    assert "`sysctr peer token` there, `sysctr peer join TOKEN` here" in capsys.readouterr().err
    assert asked(stub) == []


def test_a_peer_is_named_by_its_fingerprint_too(stub):
    goes(stub, "web")
    assert main(["migrate", "web", "AB12CD34"]) == 0
    assert asked(stub)[-1][1] == {"peer": "AB12CD34"}
    assert main(["migrate", "web", "ab12cd3"]) == 3


def migration(**fields):
    told = {
        "id": MID, "role": "source", "container": 101, "name": "web", "peer": "node2", "phase": "stopped",
        "state": "in-doubt", "since": NOW_S - 3725, "error": "cannot reach node2: time-out",
    }  # fmt: skip
    return {**told, **fields}


COMING = {"id": "f" * 16, "role": "target", "container": None, "name": "db", "state": "moving", "error": ""}


def test_the_list_shows_what_is_on_its_way_and_fits_a_terminal(stub, capsys, monkeypatch):
    stub.routes["GET", "/1/migrations"] = {
        "migrations": [migration(), migration(**COMING, phase="receiving", since=None)]
    }
    assert main(["migrations"]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["CONTAINER", "WAY", "STATE", "PHASE", "FOR", "ID", "PROBLEM"]
    assert first.split("  ")[0] == "web (101)"
    assert "to node2" in first
    assert f"in-doubt  stopped    1h 2m  {MID}  cannot reach node2: time-out" in first
    assert second.split() == ["db", "from", "node2", "moving", "receiving", "-", "f" * 16, "-"]
    assert main(["migrations", "-q"]) == 0
    assert capsys.readouterr().out.split() == [MID, "f" * 16]
    assert main(["migrations", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == migration()
    monkeypatch.setattr("sysctr.cli.output.terminal_width", lambda _: 80)
    assert main(["migrations"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def resolves(stub, *left, found=None):
    """Let a migration be resolved; `left` is what is listed afterwards."""
    answers = [{"migrations": found or [migration()]}]
    stub.routes["GET", "/1/migrations"] = lambda *_: answers.pop(0) if answers else {"migrations": list(left)}
    stub.routes["POST", f"/1/migrations/{MID}/resolve"] = (202, {"task": stub.task("resolve", 101)})


def test_resolving_asks_the_other_host_and_says_where_it_is(stub, capsys):
    stub.routes["GET", "/1/containers"] = [stub.container(101, "web")]
    resolves(stub)
    assert main(["migrate", "--resolve", "web"]) == 0
    assert asked(stub) == [(f"/1/migrations/{MID}/resolve", {})]
    assert capsys.readouterr().out == "settled web (101): it is here, running\n"
    away = {"id": MID, "peer": "ab", "name": "node2", "time": NOW_S}
    for there in ([], [stub.container(101, "web", away=away)], [stub.container(101, "other")]):
        stub.routes["GET", "/1/containers"] = there
        resolves(stub)
        assert main(["migrate", "--resolve", "101"]) == 0
        assert capsys.readouterr().out == "settled web (101): node2 has it\n"
    resolves(stub, migration())
    assert main(["migrate", MID, "--resolve"]) == 0
    assert capsys.readouterr().out == (
        "web (101) is still in doubt (stopped): cannot reach node2: time-out\n"
    )
    stub.routes["GET", "/1/containers"] = []
    resolves(stub)
    assert main(["migrate", "--resolve", "nobody"]) == 3
    resolves(stub, found=[migration(), migration(id="b" * 16)])
    assert main(["migrate", "--resolve", "web"]) == 2
    assert f"name one: {MID}, {'b' * 16}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("role", "option", "decided", "lost"),
    [
        ("source", "--here", "web (101) stays on this host", "if node2 took it over after all, there"),
        ("source", "--there", "node2 has web (101)", "if node2 did not take it over after all"),
        ("copy", "--here", "there is no copy of web (101) at node2", "web (101) itself stays as it is;"),
        ("copy", "--there", "node2 has its copy of web (101)", "web (101) itself stays as it is;"),
        ("target", "--here", "web (101) is on this host now", "if node2 kept it after all, there are two"),
        ("target", "--there", "node2 keeps web (101)", "if node2 gave it up after all"),
    ],
)
def test_a_decision_is_explained_and_wants_the_name(stub, capsys, monkeypatch, role, option, decided, lost):
    stub.routes["GET", "/1/containers"] = []
    resolves(stub, found=[migration(role=role.replace("copy", "source"), copy=role == "copy")])
    answering(monkeypatch, "web\n")
    assert main(["migrate", "--resolve", "101", option]) == 0
    assert asked(stub) == [(f"/1/migrations/{MID}/resolve", {"keep": option[2:]})]
    first, second, question = capsys.readouterr().err.splitlines()
    assert first.startswith(f"this decides that {decided}")
    assert second.startswith(lost)
    assert question == "type its name to go on: "


def test_what_is_kept_here_can_be_taken_back(stub, capsys, monkeypatch):
    away = {"id": MID, "peer": "ab12", "name": "node2", "time": 0}
    answers = [[stub.container(101, "web", state="stopped", **fields)] for fields in ({"away": away}, {})]
    stub.routes["GET", "/1/containers"] = lambda *_: {"containers": answers.pop(0)}
    stub.routes["GET", "/1/migrations"] = {"migrations": []}
    stub.routes["POST", "/1/migrations/web/resolve"] = (202, {"task": stub.task("resolve", 101)})
    answering(monkeypatch, "web\n")
    assert main(["migrate", "--resolve", "101", "--here"]) == 0
    assert asked(stub) == [("/1/migrations/web/resolve", {"keep": "here"})]
    shown = capsys.readouterr()
    assert "node2 took it over: there are two of it then" in shown.err
    assert shown.out == "settled web (101): it is here, stopped\n"


@pytest.mark.parametrize("typed", ["", "\n", "101\n", "yes\n"])
def test_nothing_is_decided_without_the_name(stub, capsys, monkeypatch, typed):
    resolves(stub)
    answering(monkeypatch, typed)
    assert main(["migrate", "--resolve", "web", "--here"]) == 1
    assert capsys.readouterr().err.endswith("not decided: web\n")
    assert asked(stub) == []


def test_without_a_terminal_a_decision_needs_yes(stub, capsys, monkeypatch):
    stub.routes["GET", "/1/containers"] = []
    monkeypatch.setattr("sys.stdin", io.StringIO("web\n"))
    resolves(stub)
    assert main(["migrate", "--resolve", "web", "--there"]) == 2
    assert "--yes" in capsys.readouterr().err
    resolves(stub)
    assert main(["migrate", "--resolve", "web", "--there", "--yes"]) == 0
    assert asked(stub) == [(f"/1/migrations/{MID}/resolve", {"keep": "there"})]


@pytest.mark.parametrize("state", ["away", "stopped"])
def test_what_is_away_says_where_it_is(stub, capsys, state):
    away = {"id": MID, "peer": "ab12", "name": "node2", "time": 0}
    exit_ = {"reason": "exited", "status": 1, "ended": 0}
    told = stub.container(101, "web", state=state, booted=None, addresses=[], away=away, exit=exit_)
    stub.routes["GET", "/1/containers"] = [told]
    stub.routes["GET", "/1/containers/web"] = told
    assert main(["list"]) == 0
    assert "  away (at node2)  " in capsys.readouterr().out
    assert main(["list", "--running", "-q"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["status", "web"]) == 0
    assert capsys.readouterr().out == "away\n"
    assert main(["status", "web", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["away"] == away
    assert main(["info", "web"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":", 1)[1].strip() for line in shown if line.startswith("state:")] == ["away"]
    (where,) = [line for line in shown if line.startswith("away:")]
    assert where.split(":", 1)[1].strip().startswith("at node2 since ")
    assert MID in where


def test_what_is_away_can_be_destroyed_here_by_its_name(stub, capsys, monkeypatch):
    away = {"id": MID, "peer": "ab12", "name": "node2", "time": 0}
    stub.routes["GET", "/1/containers/web"] = stub.container(101, "web", state="away", away=away)
    stub.routes["DELETE", "/1/containers/web"] = (202, {"task": stub.task("destroy")})
    answering(monkeypatch, "web\n")
    assert main(["destroy", "web"]) == 0
    assert "destroys container 101 (web) here, which is at node2 now," in capsys.readouterr().err


def test_the_figures_of_a_step_are_no_news_in_a_log(stub, capsys):
    steps = iter(
        [
            "copying, pass 1, 41 MB/s", "copying, pass 1, 39.5 MB/s, 1.2 MB/s change, about 0.8 s down",
            "copying, pass 2 (50.1 MB in the last one, 39 MB/s)", "copying, pass 2 (9 MB in it, 4 MB/s)",
            "stopping", "copying, the rest, 40 MB/s",
        ]
    )  # fmt: skip

    def wait(query, _):
        step = next(steps, None)
        return {"task": {**task, "state": "running" if step else "done", "step": step or ""}}

    task = goes(stub, "web", state="running")
    stub.routes["GET", "/1/tasks/t-web/wait"] = wait
    assert main(["migrate", "web", "node2"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "web: copying, pass 1, 41 MB/s", "web: copying, pass 2 (50.1 MB in the last one, 39 MB/s)",
        "web: stopping", "web: copying, the rest, 40 MB/s",
    ]  # fmt: skip


def test_the_line_of_progress_keeps_its_figures_on_a_narrow_terminal():
    step = "copying, pass 2, 41 MB/s, 1.2 MB/s change, about 0.8 s down"
    whole = bar_line("web", step, 30 * MB, 90 * MB, 10 * MB)
    assert whole == f"web: {step}  [######--------------]  33%  30M of 90M  10M/s  6s left"
    for cells in (79, 60):
        line = bar_line("web", step, 30 * MB, 90 * MB, 10 * MB, cells)
        assert len(line) <= cells
        assert line.startswith("web: copying, pass 2")
        assert line.endswith(" 33%  30M of 90M  10M/s  6s left")


def test_peers_are_completed_beside_containers(stub, capsys):
    stub.routes["GET", "/1/containers"] = [stub.container(101, "web")]
    assert main(["_words", "containers", "peers"]) == 0
    assert capsys.readouterr().out.split() == ["web", "node2", "rack-b"]
    arguments = whole_parser().parse_args(["migrate", "web", "node2", "--restart"])
    assert (arguments.containers, arguments.restart) == (["web", "node2"], True)


def test_the_api_takes_what_is_asked_of_it(tmp_path, monkeypatch, capsys):
    served = Served(str(tmp_path / "host"))
    try:
        monkeypatch.setenv("SYSCTR_ROOT", served.where.root)
        served.engine.peers.list = lambda: [{"name": "node2", "fingerprint": "a" * 64}]
        options = [
            "--start", "--as", "204", "--name", "web-2", "--pool-map", "default=fast", "--bridge-map", "a=b",
            "--bwlimit", "50M", "--leave-out", "device,bind",
        ]  # fmt: skip
        assert main(["migrate", "web", "node2", "--restart", "--keep", *options]) == 0, capsys.readouterr()
        assert main(["migrate", "web", "node2", "--dry-run", "--bwlimit", "0"]) == 0
        assert main(["copy", "web", "node2", *options]) == 0
        assert main(["migrations"]) == 0
        served.engine.migrations.list = lambda: [migration()]
        for decided in ([], ["--here", "--yes"], ["--there", "--yes"]):
            assert main(["migrate", "--resolve", "web", *decided]) == 0, capsys.readouterr()
        calls = [call for call in served.engine.calls if call[0] in ("migrate", "copy", "resolve")]
        both = {
            "peer": "node2", "start": True, "id": 204, "name": "web-2", "pool_map": {"default": "fast"},
            "bridge_map": {"a": "b"}, "bwlimit_bytes": 50 * MB, "leave_out": ["bind", "device"],
        }  # fmt: skip
        assert calls == [
            ("migrate", "web", {**both, "restart": True, "keep": True}),
            ("migrate", "web", {"peer": "node2", "dry_run": True}), ("copy", "web", both),
            *(("resolve", MID, {"keep": keep}) for keep in (None, "here", "there")),
        ]  # fmt: skip
    finally:
        served.close()
