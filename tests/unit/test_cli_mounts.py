"""`sysctr mount`: what it asks of the daemon, and that no data is deleted unasked."""

import io
import json

import pytest

from sysctr.cli import main
from tests.unit.cli_stub import Stub

MOUNTS = "/1/containers/demo/mounts"
ROWS = [
    {"key": "mount.0", "kind": "volume", "target": "/data", "source": "default:101-disk0",
     "volume": "101-disk0", "size_bytes": 8 << 30, "used_bytes": 4096, "options": [], "state": "mounted"},
    {"key": "mount.1", "kind": "bind", "target": "/srv", "source": "/srv", "volume": "", "size_bytes": None,
     "used_bytes": None, "options": ["read_only"], "state": "pending"},
    {"key": "", "kind": "volume", "target": "", "source": "default:101-old", "volume": "101-old",
     "size_bytes": None, "used_bytes": None, "options": [], "state": "kept"},
]  # fmt: skip


@pytest.fixture
def stub(tmp_path, monkeypatch):
    stub = Stub(tmp_path / "host")
    monkeypatch.setenv("SYSCTR_ROOT", stub.layout.root)
    stub.routes["GET", MOUNTS] = {"mounts": ROWS}
    answer = {"applied": [], "pending": [], "notes": [], "key": "mount.0"}
    stub.routes["POST", MOUNTS] = answer
    stub.routes["DELETE", MOUNTS] = {**answer, "volume": "101-disk0", "deleted": True}
    yield stub
    stub.close()


def asked(stub, method):
    return [body for verb, _, _, body in stub.requests if verb == method]


def type_at_terminal(monkeypatch, text):
    terminal = io.StringIO(text)
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)


def test_the_list_is_a_table_or_json(stub, capsys):
    assert main(["mount", "list", "demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["KEY", "TARGET", "KIND", "SOURCE", "SIZE", "USED", "STATE", "OPTIONS"]
    assert lines[1].split() == ["mount.0", "/data", "volume", "default:101-disk0", "8G", "4K", "mounted", "-"]
    assert lines[3].split()[:4] == ["-", "-", "volume", "default:101-old"]
    assert main(["mount", "list", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ROWS


def test_each_mount_and_device_is_asked_for(stub, capsys):
    assert main(["mount", "add", "demo", "target=/a,size=1G", "--device", "fuse"]) == 0
    assert asked(stub, "POST") == [{"mount": "target=/a,size=1G"}, {"device": "fuse"}]
    assert capsys.readouterr().out.splitlines()[0] == "added mount.0: target=/a,size=1G"
    assert main(["mount", "add", "demo"]) == 2
    assert "none is named" in capsys.readouterr().err


def test_what_waits_is_said_with_its_reason(stub, capsys):
    stub.routes["POST", MOUNTS] = {
        "applied": [], "pending": ["mount.0"], "notes": ["cannot mount mount.0 now: x"], "key": "mount.0",
    }  # fmt: skip
    assert main(["mount", "add", "demo", "target=/a"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "added mount.0: target=/a (pending until the next start)\n"
    assert "cannot mount mount.0 now: x" in shown.err


@pytest.mark.parametrize("which", ["/data", "/data/", "mount.0", "0", "old", "101-old"])
def test_without_a_terminal_a_volume_is_not_removed_unasked(stub, capsys, which):
    assert main(["mount", "remove", "demo", which]) == 2
    assert "--keep or --delete" in capsys.readouterr().err
    assert asked(stub, "DELETE") == []


@pytest.mark.parametrize(
    ("typed", "code", "data"),
    [("yes\n", 0, "delete"), ("keep\n", 0, "keep"), ("y\n", 1, None), ("", 1, None)],
)
def test_a_terminal_is_asked_what_becomes_of_the_data(stub, monkeypatch, typed, code, data):
    type_at_terminal(monkeypatch, typed)
    assert main(["mount", "remove", "demo", "/data"]) == code
    assert asked(stub, "DELETE") == ([{"which": "/data", "data": data}] if data else [])


def test_options_answer_before_the_question(stub, capsys):
    assert main(["mount", "remove", "demo", "/data", "--delete"]) == 0
    assert main(["mount", "remove", "demo", "/data", "--keep"]) == 0
    assert main(["mount", "remove", "demo", "/data", "--keep", "--delete"]) == 2
    assert [body["data"] for body in asked(stub, "DELETE")] == ["delete", "keep"]
    assert "removed mount.0, the volume 101-disk0 is deleted\n" in capsys.readouterr().out


def test_a_bind_is_removed_without_a_question(stub):
    assert main(["mount", "remove", "demo", "/srv"]) == 0
    assert asked(stub, "DELETE") == [{"which": "/srv", "data": None}]
