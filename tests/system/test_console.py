"""The console of a container: kept, shown, typed into, shared with notice, readable after the end."""

import pytest

from tests.node import Node
from tests.system.guests import Terminal, create, refused, shell
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "overlay", "veth", "nft", "busybox")]

_PROMPT = ":~# "


def test_what_was_printed_before_is_shown_and_typing_works(shared_host: Node) -> None:
    name = create(shared_host)
    wait_until(lambda: _PROMPT in shared_host.run("logs", name).out, what="the console has a prompt")
    with Terminal(shared_host, "console", name) as one:
        one.expect("detach with ctrl-a q")
        one.expect(f"root@{name}{_PROMPT}")
        one.type("echo mark-$((40 + 2)); tty\r")
        one.expect("mark-42")
        one.expect("/dev/")
        one.type("\x01q")
        one.expect(f"detached from {name}")
        assert one.end() == 0
    # The shell of the console lives on, and the next one who attaches sees what was said.
    with Terminal(shared_host, "console", name) as again:
        again.expect("mark-42")


def test_a_script_without_input_sees_what_was_said_and_is_let_go(shared_host: Node) -> None:
    name = create(shared_host)
    shell(shared_host, name, "seq 1 20000 > /dev/console; echo the end > /dev/console")
    wait_until(lambda: "the end" in shared_host.run("logs", name).out, what="the console kept it")
    done = shared_host.run("console", name, timeout_s=20)
    assert "\r\n20000\r\nthe end" in done.out
    assert f"detached from {name}" in done.err
    shared_host.run("console", name, stdin=b"echo typed-$((1 + 1))\r", timeout_s=20)
    wait_until(lambda: "typed-2" in shared_host.run("logs", name).out, what="what was typed arrived")


def test_the_detach_key_can_be_another_and_typed_twice_it_is_sent(shared_host: Node) -> None:
    name = create(shared_host)
    with Terminal(shared_host, "console", "--escape", "^b", name) as one:
        one.expect("detach with ctrl-b q")
        one.expect(_PROMPT)
        one.type("head -c 2 | od -c\r")
        one.type("\x01\x02\x02\r")
        one.expect("001 002")
        one.type("\x02q")
        assert one.end() == 0


def test_a_second_client_is_announced_and_both_see_the_output(shared_host: Node) -> None:
    name = create(shared_host)
    with Terminal(shared_host, "console", name) as first:
        first.expect(_PROMPT)
        with Terminal(shared_host, "console", name) as second:
            second.expect("[sysctr: another client is attached to this console too]")
            first.expect("[sysctr: another client attached to this console]")
            second.type("echo both-$((1 + 1))\r")
            second.expect("both-2")
            first.expect("both-2")
            first.type("echo back-$((2 + 2))\r")
            second.expect("back-4")


def test_the_size_of_the_terminal_follows_who_attaches(shared_host: Node) -> None:
    name = create(shared_host)
    with Terminal(shared_host, "console", name, size=(33, 99)) as one:
        one.expect(_PROMPT)
        one.type("stty size\r")
        one.expect("33 99")


def test_the_console_is_readable_after_the_end(shared_host: Node) -> None:
    name = create(shared_host)
    shell(shared_host, name, "echo last words of $(hostname) > /dev/console")
    shared_host.run("stop", name)
    assert f"last words of {name}" in shared_host.run("logs", name).out
    refused(shared_host, 4, "it is not running", "console", name)
    shared_host.run("start", name)
    assert "last words" not in shared_host.run("logs", name).out, "each start begins a new one"


def test_a_console_ends_with_its_container(shared_host: Node) -> None:
    name = create(shared_host)
    with Terminal(shared_host, "console", name) as one:
        one.expect(_PROMPT)
        shared_host.run("stop", "--kill", name)
        one.expect(f"the console of {name} was closed")
        assert one.end() == 0


def test_only_the_last_part_of_a_flood_is_kept_and_nobody_waits_for_it(shared_host: Node) -> None:
    name = create(shared_host)
    shell(shared_host, name, "seq 1 200000 > /dev/console; echo the end > /dev/console")
    wait_until(lambda: "the end" in shared_host.run("logs", name).out, what="the flood was read")
    kept = shared_host.run("logs", name).out
    assert "\n199999\r\n200000\r\nthe end" in kept
    assert len(kept) <= 256 * 1024


def test_hostile_output_is_made_harmless_on_a_terminal(shared_host: Node) -> None:
    name = create(shared_host)
    shell(shared_host, name, r"printf '\033]0;owned\007\033[2Jplain\n' > /dev/console")
    with Terminal(shared_host, "logs", name) as one:
        one.end()
        shown = one.seen
    assert b"plain" in shown
    assert b"\x1b" not in shown
    assert b"\x1b]0;owned" in shared_host.run("logs", name).stdout, "a pipe gets the bytes as they are"


def test_logs_can_be_followed(shared_host: Node) -> None:
    name = create(shared_host)
    with Terminal(shared_host, "logs", "-f", name) as one:
        one.expect("busybox on sysctr")
        shell(shared_host, name, "echo later > /dev/console")
        one.expect("later")
    refused(shared_host, 2, "there is only the console's", "logs", "--kind", "x", name)
