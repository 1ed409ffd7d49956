"""The daemon as a process: one at a time, ready soon, gone when asked, its directories closed to others."""

import fcntl
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sysctr.paths import Layout
from sysctr.runtime import wire
from tests.wait import wait_until

ROOT = Path(__file__).parents[2]
# The real daemon with the stub engine in the place of the real one.
PROGRAM = f"""
import sys, types
sys.path.insert(0, {str(ROOT)!r})
from tests.unit import stub_engine
module = types.ModuleType("sysctr.engine.engine")
module.Engine = stub_engine.Engine
sys.modules["sysctr.engine.engine"] = module
from sysctr.api.daemon import main
sys.exit(main())
"""


class Daemon:
    def __init__(self, root: str, *arguments: str, **environment: str) -> None:
        self.where = Layout(root)
        ready_fd, write_fd = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", PROGRAM, "--ready-fd", str(write_fd), *arguments],
            env={"PATH": "/usr/bin:/bin", "SYSCTR_ROOT": root, "LANG": "C.UTF-8", **environment},
            pass_fds=[write_fd],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        os.close(write_fd)
        with os.fdopen(ready_fd, "rb") as ready:
            self.ready = ready.read()

    def request(self, head: str, body: bytes = b"") -> dict:
        with wire.connect(self.where.api_socket, 20, socket.SOCK_STREAM) as sock:
            sock.sendall(
                f"{head} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            answer = b""
            while part := sock.recv(65536):
                answer += part
        return json.loads(answer.partition(b"\r\n\r\n")[2])

    def log(self) -> str:
        return Path(self.where.log, "daemon.log").read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        try:
            code = self.process.wait(30)
        finally:
            self.process.kill()
            self.errors = self.process.communicate()[1].decode()
        return code


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(str(tmp_path))
    assert daemon.ready == b"ready\n"
    yield daemon
    if daemon.process.returncode is None:
        daemon.end()


def test_it_is_ready_soon_and_says_what_it_is(daemon: Daemon) -> None:
    told = daemon.request("GET /1/daemon")["daemon"]
    assert told["pid"] == daemon.process.pid
    assert "is ready after" in daemon.log()


def test_directories_and_socket_have_their_modes_whatever_the_umask(daemon: Daemon) -> None:
    where = daemon.where
    modes = {
        path: stat.S_IMODE(os.stat(path).st_mode) for path in (where.lib, where.run, where.etc, where.log)
    }
    assert modes == {where.lib: 0o700, where.run: 0o711, where.etc: 0o755, where.log: 0o750}
    assert stat.S_IMODE(os.stat(where.api_socket).st_mode) == 0o660
    assert stat.S_IMODE(os.stat(f"{where.log}/daemon.log").st_mode) == 0o640
    assert stat.S_IMODE(os.stat(where.daemon_lock).st_mode) == 0o600


def test_limits_are_raised(daemon: Daemon) -> None:
    soft, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
    assert soft == min(hard, 65536)


def test_a_second_daemon_goes_and_says_why(daemon: Daemon) -> None:
    second = Daemon(daemon.where.root)
    assert (second.ready, second.wait()) == (b"", 0)
    assert f"a daemon runs already (pid {daemon.process.pid})" in second.errors
    assert daemon.request("GET /1/host")["host"]["name"] == "here"


def test_of_two_that_start_at_once_one_serves(tmp_path: Path) -> None:
    started: list[Daemon] = []
    threads = [threading.Thread(target=lambda: started.append(Daemon(str(tmp_path)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(daemon.ready for daemon in started) == [b"", b"ready\n"]
    (serving,) = [daemon for daemon in started if daemon.ready]
    assert serving.request("GET /1/daemon")["daemon"]["pid"] == serving.process.pid
    assert [daemon.end() if daemon.ready else daemon.wait() for daemon in started] == [0, 0]


def test_a_look_at_the_lock_does_not_turn_a_daemon_away(tmp_path: Path) -> None:
    where = Layout(str(tmp_path))
    os.makedirs(where.run)
    lock_fd = os.open(where.daemon_lock, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock_fd, fcntl.LOCK_SH)
    timer = threading.Timer(0.2, os.close, (lock_fd,))
    timer.start()
    daemon = Daemon(str(tmp_path))
    timer.join()
    assert daemon.ready
    assert daemon.end() == 0


def test_a_socket_that_a_killed_daemon_left_is_taken_over(daemon: Daemon) -> None:
    daemon.end(signal.SIGKILL)
    assert os.path.exists(daemon.where.api_socket)
    again = Daemon(daemon.where.root)
    assert again.request("GET /1/host")["host"]["name"] == "here"
    assert again.end() == 0


def test_it_ends_when_asked_and_leaves_no_socket(daemon: Daemon) -> None:
    with wire.connect(daemon.where.api_socket, 20, socket.SOCK_STREAM) as idle:
        started = time.monotonic()
        assert daemon.end() == 0
        assert idle.recv(1) == b""
    assert time.monotonic() - started < 5
    assert not os.path.exists(daemon.where.api_socket)
    assert daemon.log().rstrip().endswith("the daemon has stopped")


def test_it_ends_over_the_api(daemon: Daemon) -> None:
    assert daemon.request("POST /1/daemon/stop") == {}
    assert daemon.wait() == 0


def test_a_running_task_may_end_before_the_daemon_does(daemon: Daemon) -> None:
    task = daemon.request("POST /1/containers/held/start")["task"]
    daemon.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not os.path.exists(daemon.where.api_socket))
    assert daemon.process.poll() is None
    Path(daemon.where.root, "open").touch()  # the stub's gate
    assert daemon.wait() == 0
    assert json.loads(Path(daemon.where.tasks, f"{task['id']}.json").read_text())["state"] == "done"


def test_sighup_reads_the_settings_again_and_opens_the_log_again(daemon: Daemon) -> None:
    log = f"{daemon.where.log}/daemon.log"
    os.rename(log, f"{log}.old")
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: os.path.exists(log) and "read the host's settings again" in daemon.log())


def test_a_secret_is_nowhere_in_log_or_records(daemon: Daemon) -> None:
    daemon.request("POST /1/containers/web/passwd", b'{"password": "hunter2"}')
    assert daemon.end() == 0
    texts = [path.read_text() for path in Path(daemon.where.root).rglob("*") if path.is_file()]
    assert "POST /1/containers/web/passwd by uid" in "".join(texts)
    assert "hunter2" not in "".join(texts)


def test_systemd_is_told_and_gets_priorities(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(f"{tmp_path}/notify")
        notified.settimeout(20)
        daemon = Daemon(str(tmp_path), NOTIFY_SOCKET=f"{tmp_path}/notify", JOURNAL_STREAM="1:1")
        assert notified.recv(100) == b"READY=1"
        assert daemon.end() == 0
        assert notified.recv(100) == b"STOPPING=1"
    assert daemon.errors.startswith("<6>sysctrd ")


@pytest.mark.root
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    where = Layout(str(tmp_path))
    os.makedirs(where.lib)
    os.chown(where.lib, 12345, 12345)
    daemon = Daemon(str(tmp_path))
    assert (daemon.ready, daemon.wait()) == (b"", 5)
    assert "belongs to uid 12345" in daemon.errors
