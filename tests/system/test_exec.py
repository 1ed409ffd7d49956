"""exec and enter against a real container: exact bytes, exit codes, users, terminals."""

import hashlib
import os
import signal
import subprocess

import pytest

from tests.node import Node
from tests.system.guests import Terminal, inside, refused, shell
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "overlay", "veth", "nft", "busybox")]

_BIG = os.urandom(5 * 1024 * 1024)
_EVERY_BYTE = bytes(range(256)) * 3


def test_every_byte_goes_in_and_out_unchanged(shared_host: Node, tiny: str) -> None:
    done = shared_host.run("exec", tiny, "--", "cat", stdin=_EVERY_BYTE)
    assert (done.stdout, done.stderr) == (_EVERY_BYTE, b"")
    done = shared_host.run("exec", tiny, "--", "/bin/sh", "-c", "cat >&2", stdin=_EVERY_BYTE)
    assert (done.stdout, done.stderr) == (b"", _EVERY_BYTE)


def test_five_megabytes_go_in_and_out_at_the_same_time(shared_host: Node, tiny: str) -> None:
    done = shared_host.run("exec", tiny, "--", "tee", "/dev/stderr", stdin=_BIG, timeout_s=60)
    digest = hashlib.sha256(_BIG).digest()
    assert hashlib.sha256(done.stdout).digest() == digest
    assert hashlib.sha256(done.stderr).digest() == digest


def test_what_was_written_before_the_end_is_not_lost(shared_host: Node, tiny: str) -> None:
    done = shared_host.run("exec", tiny, "--", "head", "-c", "1000000", "/dev/zero")
    assert done.stdout == bytes(1_000_000)


def test_a_program_that_does_not_read_its_input_ends_all_the_same(shared_host: Node, tiny: str) -> None:
    assert shared_host.run("exec", tiny, "--", "echo", "done", stdin=_BIG, timeout_s=30).out == "done\n"


def test_a_closed_output_ends_the_program(shared_host: Node, tiny: str) -> None:
    reader = shared_host.popen("exec", tiny, "--", "yes", "closed", stdout=subprocess.PIPE)
    assert reader.stdout.readline() == b"closed\n"
    reader.stdout.close()
    reader.wait(20)
    wait_until(lambda: "yes closed" not in inside(shared_host, tiny, "ps"), what="yes has ended")


@pytest.mark.parametrize(
    ("script", "status"),
    [("true", 0), ("exit 1", 1), ("exit 255", 255), ("kill -TERM $$", 143), ("kill -9 $$", 137)],
)
def test_the_exit_code_is_the_programs_own(shared_host: Node, tiny: str, script: str, status: int) -> None:
    done = shell(shared_host, tiny, script, check=False)
    assert (done.status, done.out, done.err) == (status, "", "")


@pytest.mark.parametrize(
    ("program", "status"),
    [("no-such-program", 127), ("/no/such/program", 127), ("/etc/passwd", 126), ("/etc", 126)],
)
def test_what_cannot_be_executed_is_126_and_what_is_not_there_127(
    shared_host: Node, tiny: str, program: str, status: int
) -> None:
    done = shared_host.run("exec", tiny, "--", program, check=False)
    assert done.status == status, done
    assert done.err.startswith(f"sysctr: cannot execute {program}: "), done
    assert done.err.count("\n") == 1, done


def test_the_arguments_arrive_as_they_are(shared_host: Node, tiny: str) -> None:
    odd = ["", " ", "$HOME", "a\nb", "--all", "*", "ü", "'\"\\"]
    done = shared_host.run("exec", tiny, "--", "printf", "[%s]", *odd)
    assert done.out == "".join(f"[{word}]" for word in odd)


def test_user_directory_and_environment_are_chosen_by_options(shared_host: Node, tiny: str) -> None:
    script = 'id -u; id -g; pwd; echo "$HOME $USER $GREETING"; cat /proc/self/status | grep CapEff'
    done = shared_host.run(
        "exec", "--user", "www-data", "--cwd", "/var", "--env", "GREETING=hi there", tiny, "--",
        "/bin/sh", "-c", script,
    )  # fmt: skip
    assert done.out.splitlines() == [
        "33", "33", "/var", "/srv/www www-data hi there", "CapEff:\t0000000000000000",
    ]  # fmt: skip
    by_number = shared_host.run("exec", "--user", "12345", tiny, "--", "id", "-u")
    assert by_number.out == "12345\n"
    refused(shared_host, 125, "nobody-here", "exec", "--user", "nobody-here", tiny, "--", "id")
    # 126 and 127 speak of the program, which is there.
    for directory, reason in (("/no/such", "no such file or directory"), ("/etc/passwd", "not a directory")):
        done = refused(shared_host, 125, directory, "exec", "--cwd", directory, tiny, "--", "id")
        assert done.err == f"sysctr: cannot execute id: working directory {directory}: {reason}\n"


def test_a_program_may_open_its_output_by_name_whoever_runs_it(shared_host: Node, tiny: str) -> None:
    for user in ("root", "nobody"):
        done = shell(shared_host, tiny, "echo a > /dev/stdout; echo b > /dev/stderr", user=user)
        assert (done.out, done.err) == ("a\n", "b\n")


def test_a_terminal_is_given_on_demand(shared_host: Node, tiny: str) -> None:
    assert shell(shared_host, tiny, "tty", check=False).out == "not a tty\n"
    argv = ["exec", "--tty", "--user", "nobody", tiny, "--", "/bin/sh"]
    with Terminal(shared_host, *argv, size=(31, 97)) as one:
        one.type("stty size; echo term=$TERM; tty; echo by name > $(tty); echo again > /dev/tty\r")
        for words in ("31 97", "term=xterm", "/dev/pts/", "by name\r\n", "again\r\n"):
            one.expect(words)
        one.type("exit 9\r")
        assert one.end() == 9


def test_control_c_reaches_the_program_and_not_us(shared_host: Node, tiny: str) -> None:
    with Terminal(shared_host, "exec", "--tty", tiny, "--", "/bin/sh") as one:
        one.type("trap 'echo caught' INT; echo rea''dy; sleep 1000\r")
        one.expect("ready")
        wait_until(lambda: "sleep 1000" in inside(shared_host, tiny, "ps"), what="it sleeps")
        one.type("\x03")
        one.expect("caught")
        one.type("exit\r")
        one.end()


def test_a_signal_to_the_command_reaches_the_program(shared_host: Node, tiny: str) -> None:
    script = "trap 'echo got it; exit 3' TERM; echo ready; while :; do sleep 0.1; done"
    one = shared_host.popen("exec", tiny, "--", "/bin/sh", "-c", script, stdout=subprocess.PIPE)
    assert one.stdout.readline() == b"ready\n"
    one.send_signal(signal.SIGTERM)
    assert one.stdout.read() == b"got it\n"
    assert one.wait(20) == 3


def test_a_signal_reaches_what_the_program_started_too(shared_host: Node, tiny: str) -> None:
    # A shell that waits for its child takes no notice of SIGINT until the child has ended of it.
    script = "echo ready; sleep 1234; echo goes on"
    one = shared_host.popen("exec", tiny, "--", "/bin/sh", "-c", script, stdout=subprocess.PIPE)
    assert one.stdout.readline() == b"ready\n"
    wait_until(lambda: "sleep 1234" in ps_without_shells(shared_host, tiny), what="the child runs")
    one.send_signal(signal.SIGINT)
    assert one.wait(20) == 128 + signal.SIGINT
    assert one.stdout.read() == b""
    assert "sleep 1234" not in ps_without_shells(shared_host, tiny)


def ps_without_shells(host: Node, ref: str) -> str:
    listed = inside(host, ref, "ps").splitlines()
    return "\n".join(line for line in listed if "/bin/sh" not in line)


def test_a_caller_who_is_killed_hangs_up_on_the_program(shared_host: Node, tiny: str) -> None:
    one = shared_host.popen(
        "exec", tiny, "--", "/bin/sh", "-c", "echo ready; exec sleep 4321", stdout=subprocess.PIPE
    )
    assert one.stdout.readline() == b"ready\n"
    one.kill()
    wait_until(lambda: "sleep 4321" not in inside(shared_host, tiny, "ps"), what="the program has ended")


def test_twenty_five_at_once_get_each_its_own_answer(shared_host: Node, tiny: str) -> None:
    running = [
        shared_host.popen(
            "exec", tiny, "--", "/bin/sh", "-c", f"cat; exit {number}",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for number in range(25)
    ]  # fmt: skip
    for number, one in enumerate(running):
        out, _ = one.communicate(f"input of {number}".encode(), timeout=60)
        assert (out, one.returncode) == (f"input of {number}".encode(), number)


def test_the_output_of_several_containers_is_told_apart(host: Node) -> None:
    for name in ("one", "two"):
        host.run("create", name, "--template", "tiny", "--start")
    done = host.run("exec", "--all", "--", "/bin/sh", "-c", "hostname; [ $(hostname) = one ]", check=False)
    assert sorted(done.out.splitlines()) == ["one: one", "two: two"]
    assert done.status == 1


def test_programs_count_against_the_containers_cgroup(shared_host: Node, tiny: str) -> None:
    one = shared_host.popen("exec", tiny, "--", "/bin/sh", "-c", "echo ready; read x", stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE)  # fmt: skip
    assert one.stdout.readline() == b"ready\n"
    # A program is where init is; only in the pure v2 tree it has a leaf of its own.
    places = inside(shared_host, tiny, "cat /proc/self/cgroup").replace("0::/.sysctr", "0::/")
    assert places == inside(shared_host, tiny, "cat /proc/1/cgroup")
    before = shared_host.json("info", tiny)["pids"]
    one.communicate(b"\n", timeout=20)
    wait_until(lambda: shared_host.json("info", tiny)["pids"] < before, what="one process less is counted")


def test_enter_is_a_login_shell(shared_host: Node, tiny: str) -> None:
    with Terminal(shared_host, "enter", tiny) as one:
        one.expect("# ")
        one.type("echo $0 $HOME $PWD; umask; tty\r")
        one.expect("-sh /root /root")
        one.expect("/dev/pts/")
        one.type("exit 5\r")
        assert one.end() == 5


def test_enter_without_a_terminal_reads_its_input(shared_host: Node, tiny: str) -> None:
    assert shared_host.run("enter", tiny, stdin=b"echo $0; pwd\n").out == "-sh\n/root\n"


def test_a_stopped_or_unknown_container_is_an_error_before_anything_runs(shared_host: Node) -> None:
    shared_host.run("create", "asleep", "--template", "tiny")
    refused(shared_host, 4, "it is not running", "exec", "asleep", "--", "true")
    refused(shared_host, 4, "it is not running", "enter", "asleep")
    refused(shared_host, 3, "nowhere", "exec", "nowhere", "--", "true")
    refused(shared_host, 2, "no program is given", "exec", "asleep")
