"""`sysctr config --format pct` and `sysctr import-pct`: what they ask of the daemon, and what they tell."""

import doctest
import io
import json

import pytest

from sysctr.cli import main
from sysctr.engine import proxmox
from sysctr.errors import UsageError
from tests.unit.cli_stub import Stub
from tests.unit.served import Served

CONF = "hostname: www\nmp0: /srv/www,mp=/srv/www\nstartup: order=1\n"
ANSWER = {
    "name": "www", "template": "tiny", "toml": 'schema = 1\nname = "www"\n', "kept": ["hostname", "memory"],
    "notes": [
        {"key": "mp0", "reason": "it shows /srv/www", "kind": "needs-permission", "permission": "bind"},
        {"key": "startup", "reason": "no delays", "kind": "dropped", "permission": ""},
        {"key": "net0.bridge", "reason": "no bridge\x1b[31m", "kind": "changed", "permission": ""},
    ],
}  # fmt: skip
TOLD = """\
kept: hostname, memory
changed: net0.bridge: no bridge\\x1b[31m
left out: startup: no delays
left out: mp0: it shows /srv/www (--allow bind)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    stub = Stub(tmp_path / "host")
    monkeypatch.setenv("SYSCTR_ROOT", stub.layout.root)
    stub.routes["POST", "/1/pct/check"] = ANSWER
    task = stub.task("create", 105, result={"id": 105, "name": "www", "notes": ANSWER["notes"]})
    stub.routes["POST", "/1/pct"] = (202, {"task": task})
    stub.routes["GET", "/1/containers/demo/pct"] = {
        "pct": "hostname: demo\nmemory: 512\n",
        "notes": [{"key": "limits.pids", "reason": "no such limit", "kind": "dropped", "permission": ""}],
    }
    yield stub
    stub.close()


@pytest.fixture
def conf(tmp_path):
    path = tmp_path / "107.conf"
    path.write_text(CONF)
    return str(path)


def asked(stub, where):
    return [body for _, path, _, body in stub.requests if path == where]


def test_a_container_is_printed_as_pct_conf_and_its_notes_apart(stub, capsys):
    assert main(["config", "demo", "--format", "pct"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "hostname: demo\nmemory: 512\n"
    assert shown.err == "left out: limits.pids: no such limit\n"
    assert main(["config", "demo", "--format", "pct", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pct"] == "hostname: demo\nmemory: 512\n"
    assert main(["config", "demo", "--format", "pct", "--pending"]) == 2
    assert main(["config", "demo", "--format", "xml"]) == 2


def test_a_container_is_made_and_what_stays_behind_is_told(stub, capsys, conf):
    options = ["--template", "tiny", "--allow", "raw, feature", "--allow", "device", "--set", "onboot=true"]
    assert main(["import-pct", conf, "--name", "web", "--id", "105", "--start", *options]) == 0
    shown = capsys.readouterr()
    assert shown.out == "created and started 105 (www)\n"
    assert shown.err == TOLD
    body = {
        "pct": CONF, "allow": ["raw", "feature", "device"], "set": {"onboot": "true"}, "start": True,
        "name": "web", "template": "tiny", "id": 105,
    }  # fmt: skip
    assert asked(stub, "/1/pct/check") == [body]
    assert asked(stub, "/1/pct") == [body]


def test_a_dry_run_prints_the_file_and_makes_nothing(stub, capsys, conf):
    assert main(["import-pct", conf, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (ANSWER["toml"], TOLD)
    assert main(["import-pct", conf, "--dry-run", "--json"]) == 0
    shown = capsys.readouterr()
    assert (json.loads(shown.out), shown.err) == (ANSWER, "")
    assert asked(stub, "/1/pct") == []


def test_a_program_gets_the_task_with_its_notes_and_a_script_the_number(stub, capsys, conf):
    assert main(["import-pct", conf, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["result"]["notes"] == ANSWER["notes"]
    assert main(["import-pct", conf, "-q"]) == 0
    quiet = capsys.readouterr()
    assert (quiet.out, quiet.err, shown.err) == ("105\n", "", "")


def test_the_file_may_come_from_a_pipe_and_hold_any_bytes(stub, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"#\xff\n")))
    assert main(["import-pct", "-", "--dry-run"]) == 0
    assert asked(stub, "/1/pct/check")[0]["pct"] == "#\udcff\n"


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 3, "no such file"),
        (b"a: 1\nb: \0", 2, "line 2: a zero byte is in it"),
        (b"#" * (256 << 10) + b"#", 2, "it is longer than 262144 bytes"),
    ],
)
def test_a_file_that_cannot_be_one_is_refused_here(stub, capsys, tmp_path, content, code, words):
    file = tmp_path / "x.conf"
    if content is not None:
        file.write_bytes(content)
    assert main(["import-pct", str(file)]) == code
    assert f"sysctr: cannot import {file}: {words}" in capsys.readouterr().err
    assert stub.requests == []


def test_what_the_daemon_refuses_is_told(stub, capsys, conf):
    stub.routes["POST", "/1/pct/check"] = UsageError("cannot import the pct.conf: it has no host name", "x")
    assert main(["import-pct", conf]) == 2
    assert capsys.readouterr().err == "sysctr: cannot import the pct.conf: it has no host name\nhint: x\n"


def test_the_api_passes_a_pct_conf_on_as_it_is(tmp_path):
    served = Served(str(tmp_path))
    try:
        spec = {"pct": "#\udcff\n", "allow": ["bind"], "set": {"onboot": True}, "id": None}
        assert served.request("POST", "/1/pct/check", spec) == (200, {"name": "www"})
        status, answer = served.request("POST", "/1/pct", {"pct": CONF})
        assert (status, answer["task"]["kind"]) == (202, "create")
        assert served.request("GET", "/1/containers/web/pct") == (200, {"pct": "", "notes": []})
        kept = {"pct": "#\udcff\n", "allow": ["bind"], "set": {"onboot": True}}
        assert [call for call in served.engine.calls if "pct" in call[0]] == [
            ("check_pct", kept), ("import_pct", {"pct": CONF}), ("export_pct", "web"),
        ]  # fmt: skip
        for wrong in ({}, {"pct": 1}, {"pct": "x" * (256 << 10) + "x"}, {"pct": "", "id": 1}):
            assert served.request("POST", "/1/pct", wrong)[0] == 400
    finally:
        served.close()


def test_the_examples_hold():
    assert doctest.testmod(proxmox).failed == 0
