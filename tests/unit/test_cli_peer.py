"""The commands of peers: what they ask of the daemon, what they print, and where a token does not stay."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sysctr.cli import main
from sysctr.cli.help import whole_parser
from tests.unit.cli_stub import Stub

ROOT = Path(__file__).parents[2]
NOW_S = 1_769_900_000.0


@pytest.fixture
def stub(tmp_path, monkeypatch):
    stub = Stub(tmp_path / "host")
    monkeypatch.setenv("SYSCTR_ROOT", stub.layout.root)
    yield stub
    stub.close()


def peer(name="paris", **fields):
    told = {
        "name": name, "id": "a" * 64, "fingerprint": "a" * 64, "addresses": ["192.0.2.1:8645"],
        "created": NOW_S, "last_seen": 0.0, "may_send": True, "may_receive": True, "may_pull": True,
        "may_manage": False, "pools": [], "version": "0.1.0", "state": "",
    }  # fmt: skip
    return {**told, **fields}


def sent(stub, method):
    return [(where, body) for verb, where, _, body in stub.requests if verb == method]


def test_the_list_shows_what_each_may(stub, capsys):
    stub.routes["GET", "/1/peers"] = {
        "peers": [peer(), peer("rio", may_send=False, may_pull=False, pools=["fast"], addresses=[])],
        "here": {"fingerprint": "", "listen": "", "problem": "cannot listen: \x1b[2J"},
    }
    assert main(["peer", "list"]) == 0
    shown = capsys.readouterr()
    _, first, second = shown.out.splitlines()
    assert first.split() == ["paris", "192.0.2.1:8645", "send,receive,pull", "all", "0.1.0", "never"]
    assert second.split()[:4] == ["rio", "-", "receive", "fast"]
    assert "cannot listen" in shown.err
    assert "\x1b" not in shown.err
    assert main(["peer", "list", "-q"]) == 0
    assert capsys.readouterr().out == "paris\nrio\n"
    assert main(["_words", "peers"]) == 0
    assert capsys.readouterr().out == "paris\nrio\n"


def test_a_token_is_all_that_stdout_has(stub, capsys):
    stub.routes["POST", "/1/peers/token"] = {
        "token": "sysctr1.abc", "expires": NOW_S, "fingerprint": "f", "addresses": ["192.0.2.1:8645"]
    }  # fmt: skip
    assert main(["peer", "token", "--expires", "10m", "--address", "a:1", "--listen", "192.0.2.1:1"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "sysctr1.abc\n"
    assert "sysctr peer join" in shown.err
    body = {"expires_s": 600, "addresses": ["a:1"], "listen": "192.0.2.1:1"}
    assert sent(stub, "POST") == [("/1/peers/token", body)]
    assert main(["peer", "token", "--expires", "soon"]) == 2


def test_a_token_is_read_from_where_it_is_said(stub, capsys, tmp_path, monkeypatch):
    stub.routes["POST", "/1/peers/join"] = {"peer": peer()}
    (tmp_path / "token").write_text("sysctr1.file\n")
    assert main(["peer", "join", "--token-file", str(tmp_path / "token"), "--name", "paris"]) == 0
    assert "joined paris" in capsys.readouterr().out
    with open(tmp_path / "token") as file:
        monkeypatch.setattr("sys.stdin", file)
        assert main(["peer", "join", "-"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert [body for _, body in sent(stub, "POST")] == [
        {"token": "sysctr1.file", "name": "paris"}, {"token": "sysctr1.file"}
    ]  # fmt: skip
    assert main(["peer", "join", "x", "--token-file", "y"]) == 2
    assert main(["peer", "join"]) == 2
    assert "no terminal" in capsys.readouterr().err


def test_a_typed_token_is_not_in_the_command_line_any_more(stub):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from sysctr.cli.peer import wipe_argument\n"
        "wipe_argument(sys.argv[1])\n"
        "print(open('/proc/self/cmdline').read().replace(chr(0), ' '))\n"
    )
    argv = [sys.executable, "-I", "-c", code, "sysctr1.sécret", "x", "sysctr1.sécret", "last"]
    line = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert "cret" not in line
    assert line.rstrip().endswith(f"{'x' * 15} x {'x' * 15} last"), line


def test_what_is_changed_and_ended(stub, capsys):
    stub.routes["PATCH", "/1/peers/paris"] = {"peer": peer(may_send=False)}
    stub.routes["DELETE", "/1/peers/paris"] = {}
    stub.routes["POST", "/1/peers/rotate"] = {"fingerprint": "", "next": "x", "waits_for": ["rio"]}
    assert main(["peer", "restrict", "paris", "--send", "no", "--pull", "yes", "--pool", "all"]) == 0
    assert capsys.readouterr().out == "paris may receive,pull; pools: all\n"
    assert main(["peer", "restrict", "paris"]) == 2
    assert main(["peer", "rename", "paris", "rio"]) == 0
    assert main(["peer", "remove", "paris", "--force"]) == 0
    assert main(["peer", "rotate"]) == 0
    assert "when rio can be told" in capsys.readouterr().out
    assert sent(stub, "PATCH") == [
        ("/1/peers/paris", {"may_send": False, "may_pull": True, "pools": []}),
        ("/1/peers/paris", {"name": "rio"}),
    ]
    assert sent(stub, "DELETE") == [("/1/peers/paris", {"force": True})]


def test_a_peer_that_cannot_be_reached_is_shown_with_the_reason(stub, capsys):
    stub.routes["GET", "/1/peers/paris"] = {
        "peer": peer(reachable=False, error="cannot reach paris: connection refused")
    }
    assert main(["peer", "show", "paris"]) == 0
    shown = capsys.readouterr().out
    assert "cannot reach paris" in shown
    assert main(["peer", "show", "paris", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reachable"] is False


def test_the_family_is_in_the_help_and_in_completion(capsys):
    assert main(["peer"]) == 0
    shown = capsys.readouterr().out
    assert "peer token" in shown
    assert "peer rotate" in shown
    assert "peer" in whole_parser().format_help()
