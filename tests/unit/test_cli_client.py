"""The client speaks enough HTTP for the daemon, notices when it is gone, and starts it."""

import doctest
import fcntl
import json
import os
import socket
import threading

import pytest

from sysctr import client as client_module
from sysctr import errors, launch
from sysctr.client import Client, path
from sysctr.paths import Layout
from tests.unit.cli_stub import Stub

DAEMON = """
import json, os, socket, sys
def main():
    ready_fd = int(sys.argv[sys.argv.index("--ready-fd") + 1])
    root = os.environ["SYSCTR_ROOT"]
    {before}
    os.makedirs(root + "/run", exist_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(root + "/run/api.sock")
    listener.listen()
    with open(root + "/facts", "w") as facts:
        fds = sorted(map(int, os.listdir("/proc/self/fd")))
        json.dump([os.getsid(0) == os.getpid(), os.getcwd(), sorted(os.environ), fds], facts)
    os.write(ready_fd, b"1")
    os.close(ready_fd)
    connection, _ = listener.accept()
    connection.recv(65536)
    head = b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: 2\\r\\n\\r\\n"
    connection.sendall(head + b"[]")
"""


@pytest.fixture
def stub(tmp_path):
    stub = Stub(tmp_path / "host")
    yield stub
    stub.close()


@pytest.fixture
def client(stub):
    with Client(stub.layout, start=False) as client:
        yield client


@pytest.mark.parametrize("module", [client_module, launch])
def test_examples_of_the_modules_hold(module):
    assert doctest.testmod(module).failed == 0


def test_one_connection_serves_many_requests(stub, client):
    stub.routes["GET", "/1/containers"] = [stub.container()]
    assert client.get("/1/containers") == [stub.container()]
    assert client.get("/1/containers", {"tag": "a b&c=d", "none": None}) == [stub.container()]
    assert len(stub.connections) == 1
    assert stub.requests[-1][2] == {"tag": "a b&c=d"}


def test_a_name_cannot_leave_its_segment_of_the_address(stub, client):
    with pytest.raises(errors.NotFound):
        client.get(path("containers", "../templates/x?y#z"))
    assert stub.requests[-1][1] == "/1/containers/../templates/x?y#z"
    with pytest.raises(errors.UsageError):
        path("containers", "")


def test_a_connection_that_the_daemon_closed_is_opened_again(stub, client):
    stub.routes["GET", "/1/host"] = {"version": "1"}
    client.get("/1/host")
    stub.hang_up()
    assert client.get("/1/host") == {"version": "1"}
    assert len(stub.connections) == 2


@pytest.mark.parametrize(
    ("code", "kind"), [("busy", errors.Busy), ("refused", errors.Refused), ("new-one", errors.SysctrError)]
)
def test_the_daemons_errors_keep_their_kind_and_the_connection_goes_on(stub, client, code, kind):
    error = {"code": code, "message": "cannot start 101: busy", "hint": "wait"}
    stub.routes["POST", "/1/containers/101/start"] = (409, {"error": error})
    stub.routes["GET", "/1/host"] = {}
    with pytest.raises(kind) as caught:
        client.post("/1/containers/101/start")
    assert (caught.value.message, caught.value.hint) == ("cannot start 101: busy", "wait")
    assert client.get("/1/host") == {}
    assert len(stub.connections) == 1


def test_an_error_that_is_not_ours_is_reported_by_its_status(stub, client):
    stub.routes["GET", "/1/host"] = (502, b"<html>")
    with pytest.raises(errors.SysctrError, match="answered 502"):
        client.get("/1/host")


def test_a_stream_comes_in_pieces_and_leaves_a_usable_client(stub, client):
    stub.routes["GET", "/1/containers/101/logs"] = (200, ["chunks", b"a" * 70000, b"\x00\xff", b"end"])
    stub.routes["GET", "/1/host"] = {}
    assert b"".join(client.stream("/1/containers/101/logs")) == b"a" * 70000 + b"\x00\xffend"
    assert client.get("/1/host") == {}


def test_events_are_read_across_pieces(stub, client):
    pieces = [b": hello\n\nevent: ta", b'sk\ndata: {"id": 1}\n', b"\nda", b'ta: {"kind": "x"}\r\n\r\n']
    stub.routes["GET", "/1/events"] = (200, ["chunks", *pieces])
    assert list(client.events()) == [("task", {"id": 1}), ("message", {"kind": "x"})]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100000,
    ],
)
def test_a_broken_answer_is_no_daemon_and_not_a_result(tmp_path, answer):
    layout = Layout(str(tmp_path))
    os.makedirs(layout.run)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(layout.api_socket)
        listener.listen()

        def serve():
            connection, _ = listener.accept()
            listener.close()  # as that of a daemon that is gone: a question that is asked again is refused
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with Client(layout, start=False) as client, pytest.raises(errors.NoDaemon):
            client.get("/1/host")
        thread.join()


def test_a_daemon_that_does_not_answer_is_not_waited_for(tmp_path):
    layout = Layout(str(tmp_path))
    os.makedirs(layout.run)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(layout.api_socket)
        listener.listen()
        with Client(layout, start=False) as client, pytest.raises(errors.NoDaemon, match="in time"):
            client.get("/1/host", timeout_s=0.05)


def test_without_a_daemon_and_without_root_the_hint_says_how_to_start_it(tmp_path):
    with pytest.raises(errors.NoDaemon) as caught:
        Client(Layout(str(tmp_path)), start=False).get("/1/host")
    assert "sysctr daemon start" in caught.value.hint


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """Let launch start a daemon of ours: a package that stands where the real one would."""
    monkeypatch.setenv("SYSCTR_ROOT", str(tmp_path / "host"))
    monkeypatch.setenv("SECRET", "x")

    def make(before="pass"):
        package = tmp_path / "package" / "sysctr"
        (package / "api").mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "api" / "__init__.py").write_text("")
        (package / "api" / "daemon.py").write_text(DAEMON.replace("{before}", before))
        monkeypatch.setattr(launch, "package_parent", lambda: str(tmp_path / "package"))
        return Layout(str(tmp_path / "host"))

    return make


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_first_command_starts_the_daemon_detached_and_with_nothing_of_ours(fake_package):
    layout = fake_package()
    # An inheritable descriptor, as a shell has it that holds a lock.
    stray_fd = fcntl.fcntl(0, fcntl.F_DUPFD, 200)
    with Client(layout) as client:
        assert client.get("/1/containers") == []
    os.wait()
    os.close(stray_fd)
    with open(f"{layout.root}/facts") as facts:
        leader, cwd, names, fds = json.load(facts)
    assert (leader, cwd) == (True, "/")
    assert "SYSCTR_ROOT" in names
    assert "SECRET" not in names
    assert fds[:4] == [0, 1, 2, 3]
    assert stray_fd not in fds


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_daemon_that_fails_is_reported_with_the_end_of_its_log(fake_package):
    layout = fake_package("sys.exit('cannot serve: the disk is full')")
    with pytest.raises(errors.NoDaemon, match="cannot serve: the disk is full") as caught:
        Client(layout).get("/1/containers")
    assert caught.value.hint == f"its log is {layout.log}/daemon.log"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_daemon_that_is_never_ready_is_given_up(fake_package):
    # It ends by itself when nobody holds the other end of its readiness pipe any more.
    wait = "import select; p = select.poll(); p.register(ready_fd, 0); p.poll(); sys.exit(1)"
    layout = fake_package(wait)
    with pytest.raises(errors.NoDaemon, match=r"not ready after 0 s"):
        launch.start(layout, 0.3, lambda: False)
    os.wait()


def test_a_question_is_asked_again_when_the_daemon_dies_before_it_answers(tmp_path):
    where = Layout(str(tmp_path))
    os.makedirs(where.run)
    asked = []

    def serve(listener):
        for _ in range(3):
            connection, _ = listener.accept()
            with connection:
                asked.append(connection.recv(65536).split(b" ")[0].decode())
                if len(asked) == 2:
                    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
                    connection.sendall(head + b"Connection: close\r\n\r\n[]")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(where.api_socket)
        listener.listen()
        dying = threading.Thread(target=serve, args=(listener,))
        dying.start()
        with Client(where, start=False) as client:
            assert client.get("/1/containers") == []
            # What may have been begun is not begun twice.
            with pytest.raises(errors.NoDaemon, match="cannot talk to the daemon"):
                client.post("/1/containers/101/start")
        dying.join(10)
    assert asked == ["GET", "GET", "POST"]
