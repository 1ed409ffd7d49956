"""exec and console move exact bytes, end when they should, and give the terminal back as it was."""

import doctest
import fcntl
import hashlib
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time

import pytest

from sysctr.cli import pump, shell
from tests.unit.cli_stub import Stub, Tickets, run_program, send

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEADLINE_S = 30
BIG = os.urandom(1024 * 1024) * 10


@pytest.fixture
def stub(tmp_path):
    stub = Stub(tmp_path / "host")
    for ref, name in (("demo", "demo"), ("web", "web"), ("101", "demo"), ("102", "web")):
        answer = {"ticket": name, "socket": stub.layout.ticket_socket}
        stub.routes["POST", f"/1/containers/{ref}/exec"] = answer
        stub.routes["POST", f"/1/containers/{ref}/console"] = answer
    stub.routes["GET", "/1/containers"] = [stub.container(), stub.container(102, "web")]
    yield stub
    stub.close()


@pytest.fixture
def serve(stub):
    served = []

    def start(function):
        served.append(Tickets(stub.layout, function))

    yield start
    for tickets in served:
        tickets.close()


def command(*arguments):
    return [sys.executable, "-m", "sysctr", *arguments]


def environment(stub):
    return {**os.environ, "SYSCTR_ROOT": stub.layout.root, "PYTHONPATH": ROOT, "TERM": "xterm"}


def sysctr(stub, *arguments, **options):
    return subprocess.run(
        command(*arguments),
        env=environment(stub),
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
        **options,
    )


def programs(argv, **options):
    return lambda connection, _: run_program(connection, argv, **options)


def test_examples_of_the_modules_hold():
    assert doctest.testmod(shell).failed == 0


def test_ten_megabytes_go_both_ways_unchanged(stub, serve):
    serve(programs(["cat"]))
    done = sysctr(stub, "exec", "demo", "--", "cat", input=BIG)
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(BIG).digest()
    assert stub.requests[-1][3]["argv"] == ["cat"]


def test_stdout_and_stderr_stay_apart_and_the_exit_code_is_the_programs(stub, serve):
    serve(programs(["sh", "-c", "printf out; printf err >&2; exit 42"]))
    done = sysctr(stub, "exec", "demo", "sh", "-c", "whatever")
    assert (done.stdout, done.stderr, done.returncode) == (b"out", b"err", 42)
    assert stub.requests[-1][3]["argv"] == ["sh", "-c", "whatever"]


def test_the_options_of_the_program_are_not_ours(stub, serve):
    serve(programs(["true"]))
    sysctr(stub, "exec", "--user", "www", "--env", "A=b=c", "--cwd", "/srv", "demo", "ls", "--user", "-t")
    request = stub.requests[-1][3]
    assert request == {
        "argv": ["ls", "--user", "-t"], "environment": {"A": "b=c"}, "cwd": "/srv", "user": "www",
        "tty": None,
    }  # fmt: skip


def test_a_program_that_never_reads_does_not_hold_us(stub, serve):
    serve(programs(["sh", "-c", "exec <&-; echo done"]))
    done = sysctr(stub, "exec", "demo", "--", "x", input=BIG)
    assert (done.stdout, done.returncode) == (b"done\n", 0)


def test_a_reader_that_leaves_early_ends_the_program_by_sigpipe(stub, serve):
    serve(programs(["yes"]))
    read_fd, write_fd = os.pipe()
    with subprocess.Popen(
        command("exec", "demo", "--", "yes"), env=environment(stub), stdin=subprocess.DEVNULL, stdout=write_fd
    ) as process:
        os.close(write_fd)
        assert os.read(read_fd, 4) == b"y\ny\n"
        os.close(read_fd)
        assert process.wait(DEADLINE_S) == 128 + signal.SIGPIPE


def test_output_of_children_that_outlive_the_program_is_not_lost(stub, serve):
    serve(programs(["sh", "-c", "(sleep 0.3; echo late) & echo early"]))
    done = sysctr(stub, "exec", "demo", "--", "x", stdin=subprocess.DEVNULL)
    assert done.stdout == b"early\nlate\n"


def test_a_service_that_keeps_stdout_open_does_not_hold_us(stub, serve):
    children = []

    def run(connection, _):
        read_fd, write_fd = os.pipe()
        # The stub itself keeps the write end, as a daemon that the program left behind would.
        children.append(write_fd)
        null_fd = os.open(os.devnull, os.O_RDWR)
        send(connection, {"ok": True, "fds": ["stdin", "stdout", "stderr"]}, [null_fd, read_fd, null_fd])
        os.close(read_fd)
        os.close(null_fd)
        os.write(write_fd, b"started\n")
        send(connection, {"exit": 3})

    serve(run)
    began = time.monotonic()
    done = sysctr(stub, "exec", "demo", "--", "x", stdin=subprocess.DEVNULL)
    os.close(children[0])
    assert (done.stdout, done.returncode) == (b"started\n", 3)
    assert time.monotonic() - began < 10


def wait_until_caught(pid, number):
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        with open(f"/proc/{pid}/status") as status:
            mask = next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt"))
        if mask & 1 << (number - 1):
            break


def test_an_interrupt_is_passed_on_and_shows_in_the_exit_code(stub, serve):
    serve(programs(["sleep", "100"], wait_for_signal=True))
    with subprocess.Popen(
        command("exec", "demo", "--", "sleep", "100"), env=environment(stub), stdin=subprocess.PIPE
    ) as process:
        wait_until_caught(process.pid, signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM


def test_the_supervisors_error_comes_out_with_its_exit_code(stub, serve):
    error = {"code": "wrong-state", "message": "cannot exec in 101: it is stopped", "hint": "start it"}
    serve(lambda connection, _: send(connection, {"error": error}))
    done = sysctr(stub, "exec", "demo", "--", "true", stdin=subprocess.DEVNULL)
    assert done.returncode == 4
    assert done.stderr == b"sysctr: cannot exec in 101: it is stopped\nhint: start it\n"


def test_a_program_that_is_not_there_keeps_its_exit_code_and_its_reason(stub, serve):
    def refuse(connection, _):
        null_fd = os.open(os.devnull, os.O_RDWR)
        send(connection, {"ok": True, "fds": ["stdin", "stdout", "stderr"]}, [null_fd] * 3)
        os.close(null_fd)
        error = {"code": "not-found", "message": "cannot exec nope: no such file", "hint": ""}
        send(connection, {"exit": 127, "error": error})

    serve(refuse)
    done = sysctr(stub, "exec", "demo", "nope", stdin=subprocess.DEVNULL)
    assert done.returncode == 127
    assert done.stderr == b"sysctr: cannot exec nope: no such file\n"


def test_a_supervisor_that_dies_is_no_success(stub, serve):
    def vanish(connection, _):
        null_fd = os.open(os.devnull, os.O_RDWR)
        send(connection, {"ok": True, "fds": ["stdin", "stdout", "stderr"]}, [null_fd] * 3)
        os.close(null_fd)

    serve(vanish)
    done = sysctr(stub, "exec", "demo", "--", "true", stdin=subprocess.DEVNULL)
    assert done.returncode == 6
    assert b"supervisor closed the connection" in done.stderr


def test_several_containers_print_with_their_names_and_the_worst_code_wins(stub, serve):
    serve(
        lambda connection, ticket: run_program(
            connection, ["sh", "-c", f"echo in {ticket}; exit {len(ticket)}"]
        )
    )
    done = sysctr(stub, "exec", "--all", "--", "x", stdin=subprocess.DEVNULL)
    assert sorted(done.stdout.splitlines()) == [b"demo: in demo", b"web: in web"]
    assert done.returncode == 4


def test_a_signal_reaches_the_programs_in_all_containers(stub, serve):
    serve(programs(["sleep", "100"], wait_for_signal=True))
    with subprocess.Popen(
        command("exec", "--all", "--", "sleep", "100"), env=environment(stub), stderr=subprocess.PIPE
    ) as process:
        wait_until_caught(process.pid, signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=DEADLINE_S)[1]
        assert said.count(b"exit code 143") == 2, said
        assert process.returncode == 128 + signal.SIGTERM


def test_nothing_runs_anywhere_if_one_of_the_names_is_none(stub, serve):
    ran = []
    serve(lambda connection, ticket: ran.append(ticket))
    done = sysctr(stub, "exec", "demo", "git", "log", "--", "file", stdin=subprocess.DEVNULL)
    assert done.returncode == 3
    assert b"cannot exec in git: no such container" in done.stderr
    assert ran == []


class Terminal:
    """A command on a pty of its own."""

    def __init__(self, stub, *arguments):
        self.fd, slave_fd = pty.openpty()
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
        self.before = termios.tcgetattr(slave_fd)
        self.slave_fd = slave_fd
        self.process = subprocess.Popen(
            command(*arguments), env=environment(stub), stdin=slave_fd, stdout=slave_fd, stderr=slave_fd,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self.seen = b""

    def read_until(self, text):
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.seen!r}"
            self.seen += os.read(self.fd, 65536)

    def type(self, content):
        os.write(self.fd, content)

    def end(self):
        code = self.process.wait(DEADLINE_S)
        assert termios.tcgetattr(self.slave_fd) == self.before
        os.close(self.slave_fd)
        os.close(self.fd)
        return code


def pty_program(argv, seen=None):
    """Be the supervisor of one program on a pty; remember the messages that came."""

    def run(connection, _):
        master_fd, slave_fd = pty.openpty()
        with subprocess.Popen(
            argv, stdin=slave_fd, stdout=slave_fd, stderr=slave_fd, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        ) as process:  # fmt: skip
            os.close(slave_fd)
            send(connection, {"ok": True, "fds": ["pty"]}, [master_fd])
            connection.setblocking(True)
            connection.settimeout(0.05)
            while process.poll() is None:
                try:
                    content = connection.recv(65536)
                except TimeoutError:
                    continue
                if not content:
                    process.kill()
                    break
                message = json.loads(content)
                if seen is not None:
                    seen.append(message)
                if "resize" in message:
                    fcntl.ioctl(master_fd, termios.TIOCSWINSZ, struct.pack("HHHH", *message["resize"], 0, 0))
            status = process.wait()
        # The last output must be read before the master goes: the client holds its own copy.
        os.close(master_fd)
        try:
            send(connection, {"exit": status if status >= 0 else 128 - status})
        except BrokenPipeError:
            pass

    return run


def test_a_shell_on_a_terminal_gets_its_keys_raw_and_the_terminal_comes_back(stub, serve):
    serve(pty_program(["sh", "-c", "echo ready; read line; echo got:$line; exit 7"]))
    terminal = Terminal(stub, "enter", "demo")
    terminal.read_until(b"ready")
    terminal.type(b"typed\r")
    terminal.read_until(b"got:typed")
    assert terminal.end() == 7
    request = stub.requests[-1][3]
    assert request["tty"] == {"rows": 33, "cols": 99}
    assert (request["argv"], request["login"], request["environment"]) == ([], True, {"TERM": "xterm"})


def test_ctrl_c_on_a_terminal_reaches_the_program_and_not_us(stub, serve):
    serve(
        pty_program(["sh", "-c", "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.05; done"])
    )
    terminal = Terminal(stub, "exec", "-t", "demo", "--", "x")
    terminal.read_until(b"ready")
    terminal.type(b"\x03")
    terminal.read_until(b"caught")
    assert terminal.end() == 5


def test_the_terminal_comes_back_when_we_are_terminated(stub, serve):
    messages = []
    serve(pty_program(["sh", "-c", "echo ready; exec sleep 100"], messages))
    terminal = Terminal(stub, "exec", "-t", "demo", "--", "x")
    terminal.read_until(b"ready")
    terminal.process.send_signal(signal.SIGHUP)
    assert terminal.end() == 128 + signal.SIGHUP
    assert {"signal": signal.SIGHUP} in messages


def test_a_new_size_of_the_window_reaches_the_program(stub, serve):
    serve(
        pty_program(
            ["sh", "-c", "echo ready; while [ \"$(stty size)\" != '40 120' ]; do :; done; echo resized"]
        )
    )
    terminal = Terminal(stub, "exec", "-t", "demo", "--", "x")
    terminal.read_until(b"ready")
    fcntl.ioctl(terminal.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    terminal.read_until(b"resized")
    assert terminal.end() == 0


def console(received, ring=b"old output\r\n"):
    def run(connection, _):
        ours, theirs = socket.socketpair()
        with ours:
            send(connection, {"ok": True, "fds": ["console"]}, [theirs.fileno()])
            theirs.close()
            ours.sendall(ring)
            send(connection, {"notice": "a second client attached"})
            while content := ours.recv(65536):
                received.append(content)
                ours.sendall(content)
                if b"poweroff" in b"".join(received):
                    return

    return run


def test_the_console_shows_what_was_there_and_detaches_by_its_key(stub, serve):
    received = []
    serve(console(received))
    terminal = Terminal(stub, "console", "demo")
    terminal.read_until(b"detach with ctrl-a q")
    terminal.read_until(b"old output")
    terminal.read_until(b"a second client attached")
    # ctrl-a twice is ctrl-a once; before another key it is passed on with it.
    terminal.type(b"x\x01\x01y\x01z")
    terminal.read_until(b"z")
    terminal.type(b"\x01q")
    terminal.read_until(b"detached from demo")
    assert terminal.end() == 0
    assert b"".join(received) == b"x\x01y\x01z"


def test_the_console_ends_with_the_container(stub, serve):
    serve(console([]))
    terminal = Terminal(stub, "console", "demo", "--escape", "^b")
    terminal.read_until(b"ctrl-b q")
    terminal.type(b"poweroff\r")
    terminal.read_until(b"was closed")
    assert terminal.end() == 0


@pytest.mark.parametrize("typed", [b"", b"some input"])
def test_the_console_detaches_at_the_end_of_its_input(stub, serve, typed):
    received = []
    ring = bytes(range(32, 127)) * 2500
    serve(console(received, ring))
    done = sysctr(stub, "console", "demo", input=typed)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ring + typed, "all that the console kept is shown first"
    assert b"detached from demo" in done.stderr
    assert b"".join(received) == typed


@pytest.mark.parametrize("pieces", [(b"\x01q",), (b"\x01", b"q"), (b"ab\x01", b"qcd")])
def test_the_escape_key_works_across_reads(pieces):
    escape = shell.Escape(1)
    passed = b"".join(escape(piece) for piece in pieces)
    assert escape.detached
    assert passed == pieces[0].replace(b"\x01", b"").replace(b"q", b"")


def test_a_full_stdout_does_not_stop_stdin():
    """A reader that writes all of its input before it reads our output must not wait for ever."""
    stdin_read, stdin_write = os.pipe()
    stdout_read, stdout_write = os.pipe()
    inside_in, inside_in_write = os.pipe()
    inside_out_read, inside_out = os.pipe()
    inward = pump.Flow(stdin_read, inside_in_write, inward=True)
    outward = pump.Flow(inside_out_read, stdout_write, inward=False)
    os.set_blocking(stdout_write, False)
    while True:
        try:
            os.write(stdout_write, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(stdout_write, True)
    os.write(inside_out, b"output")
    os.write(stdin_write, b"input")
    for _ in range(8):
        interests = {}
        for flow in (inward, outward):
            for fd, events in flow.interests():
                interests[fd] = interests.get(fd, 0) | events
        ready = pump._poll(interests, 100)
        for flow in (inward, outward):
            flow.advance(ready)
    assert os.read(inside_in, 10) == b"input"
    assert outward.pending == b"output"
    inward.kill()
    outward.kill()
    for fd in (stdin_read, stdin_write, stdout_read, stdout_write, inside_in, inside_out):
        os.close(fd)
