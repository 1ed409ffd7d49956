"""The life of containers through the command line: create, start, stop, reboot, freeze, destroy."""

import json
import os
import select
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.node import Node
from tests.system.guests import create, inside, new_name, refused, shell
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "overlay", "veth", "nft", "busybox")]

# Identity: what a reboot keeps.
_KEPT = ("uuid", "addresses", "nets", "idmap")
# Told apart in the process list from everything else inside.
_STUBBORN = "trap '' TERM INT HUP PWR USR1 USR2; while :; do sleep 1000 & wait $!; done"


def boot_id(host: Node, ref: str) -> str:
    return inside(host, ref, "cat /proc/sys/kernel/random/boot_id")


def end_of(host: Node, ref: str) -> dict:
    """Return how a container ended, once that is known."""
    return wait_until(lambda: host.json("status", ref)["exit"], 20, f"{ref} has ended")


def stubborn(host: Node, word: str = "stubborn") -> str:
    """Return a running container whose init takes no notice of any signal it could."""
    name = create(host, "--set", "init=/sbin/stubborn", start=False, word=word)
    script = f"#!/bin/sh\n{_STUBBORN}\n".encode()
    host.run("push", "--mode", "0755", "-", f"{name}:/sbin/stubborn", stdin=script)
    host.run("start", name)
    wait_until(lambda: "sleep 1000" in inside(host, name, "ps"), what="its init runs")
    return name


def nothing_left_on_the_host(host: Node, number: int) -> bool:
    """no link, cgroup or process of the container is left"""
    prefix = f"v{host.layout.tag}{number}i"
    links = [name for name in os.listdir("/sys/class/net") if name.startswith(prefix)]
    groups = subprocess.run(
        ["find", "/sys/fs/cgroup", "-type", "d", "-path", f"*/{host.layout.cgroup}/{number}"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    return not links and not groups


def test_a_created_container_is_stopped_and_a_started_one_runs(shared_host: Node) -> None:
    name = create(shared_host, start=False)
    assert shared_host.run("status", name).out == "stopped\n"
    shared_host.run("start", name)
    assert shared_host.run("status", name).out == "running\n"
    assert inside(shared_host, name, "hostname") == name
    refused(shared_host, 4, "it is running", "start", name)


def test_power_off_inside_stops_it_with_the_reason_halt(shared_host: Node) -> None:
    name = create(shared_host)
    shell(shared_host, name, "poweroff -f", check=False)
    shared_host.wait(name, "stopped")
    assert end_of(shared_host, name)["reason"] == "halt"
    number = shared_host.json("info", name)["id"]
    wait_until(lambda: nothing_left_on_the_host(shared_host, number), what="the host is clean")


def test_reboot_inside_restarts_it_with_the_same_identity_and_a_fresh_boot_id(shared_host: Node) -> None:
    name = create(shared_host)
    shell(shared_host, name, "echo kept > /root/kept; echo gone > /run/gone")
    before, boot_before = shared_host.json("info", name), boot_id(shared_host, name)
    shell(shared_host, name, "reboot -f", check=False)

    def restarted() -> bool:
        info = shared_host.json("info", name)
        return info["state"] == "running" and info["pid"] != before["pid"]

    wait_until(restarted, 20, "it runs again")
    after = shared_host.json("info", name)
    assert {key: after[key] for key in _KEPT} == {key: before[key] for key in _KEPT}
    assert boot_id(shared_host, name) != boot_before
    assert inside(shared_host, name, "cat /root/kept; ls /run/gone 2>&1 | tail -1").startswith("kept\nls:")
    mac = before["nets"][0]["mac"]
    assert mac in inside(shared_host, name, "cat /sys/class/net/eth0/address")


# What an init does, what its end is recorded as, and what the failed start says of it.
_EARLY_ENDS = {
    "exits": ("echo one >&2; echo last words >&2; exit 7", ("exited", 7),
              "exited with status 7 as soon as it ran, and said: one / last words"),
    "has worked for a moment": ("sleep 0.02; exit 1", ("exited", 1), "exited with status 1"),
    "has nothing to do": ("exit 0", ("exited", 0), "exited with status 0 as soon as it ran, and said noth"),
    "halts": ("exec halt -f", ("halt", 2), "asked for a halt"),
}  # fmt: skip


@pytest.mark.parametrize("case", _EARLY_ENDS)
def test_an_init_that_dies_at_once_is_reported_with_status_and_console(shared_host: Node, case: str) -> None:
    does, end, words = _EARLY_ENDS[case]
    name = create(shared_host, "--set", "init=/sbin/failing", start=False)
    script = f"#!/bin/sh\n{does}\n".encode()
    shared_host.run("push", "--mode", "0755", "-", f"{name}:/sbin/failing", stdin=script)
    number = shared_host.json("info", name)["id"]
    failed = refused(shared_host, 1, f"cannot start {name} ({number}): its init {words}", "start", name)
    assert f"`sysctr logs {name}`" in failed.err
    assert nothing_left_on_the_host(shared_host, number)
    info = shared_host.json("info", name)
    assert (info["state"], info["exit"]["reason"], info["exit"]["status"]) == ("stopped", *end)
    if case == "exits":
        assert shared_host.run("logs", name).out.replace("\r", "") == "one\nlast words\n"
    shared_host.run("set", name, "--unset", "init")
    shared_host.run("start", name)
    assert shared_host.json("info", name)["exit"] is None


def test_a_create_whose_init_dies_at_once_keeps_the_container_and_says_so(shared_host: Node) -> None:
    name = new_name()
    settings = ["--template", "tiny", "--set", "init=/bin/false"]
    failed = shared_host.run("create", name, *settings, "--start", check=False)
    assert failed.status == 1, failed
    assert "its init exited with status 1" in failed.err, failed
    assert "was created and is kept" in failed.err, failed
    assert shared_host.state(name) == "stopped"


def test_an_init_that_listens_to_no_signal_starts_all_the_same(shared_host: Node) -> None:
    name = create(shared_host, "--set", "init=/sbin/plain", start=False)
    script = b"#!/bin/sh\nexec sleep 1000\n"
    shared_host.run("push", "--mode", "0755", "-", f"{name}:/sbin/plain", stdin=script)
    shared_host.run("start", name)
    assert shared_host.state(name) == "running"
    shared_host.run("stop", "--kill", name)


def test_who_waits_for_a_boot_is_told_at_once_of_the_end(host: Node) -> None:
    name = create(host)

    def threads() -> int:
        return len(os.listdir(f"/proc/{host.pids()['daemon']}/task"))

    with ThreadPoolExecutor(1) as pool:
        before = threads()
        # "frozen" is never reached here, as "booted" is not by an init that ends before it is ready.
        waiting = pool.submit(host.api, "GET", f"/1/containers/{name}/wait?state=frozen&timeout=120")
        wait_until(lambda: threads() > before, what="a thread of the daemon that waits")
        shell(host, name, "poweroff -f", check=False)
        status, answer = waiting.result(30)
    assert (status, answer["reached"], answer["container"]["state"]) == (200, False, "stopped")
    assert answer["container"]["exit"]["reason"] == "halt"


def test_an_init_that_is_no_program_is_an_error_that_names_it(shared_host: Node) -> None:
    name = create(shared_host, "--set", "init=/etc/hostname", start=False)
    refused(shared_host, 1, "cannot start", "start", name)
    assert shared_host.state(name) == "stopped"
    number = shared_host.json("info", name)["id"]
    wait_until(lambda: nothing_left_on_the_host(shared_host, number), what="the host is clean")
    # Of another architecture: the header of a program for s390, and no more.
    foreign = bytes.fromhex("7f454c4602020100" + "00" * 8 + "00020016") + bytes(200)
    shared_host.run("push", "--mode", "0755", "-", f"{name}:/sbin/other", stdin=foreign)
    shared_host.run("push", "--mode", "0755", "-", f"{name}:/sbin/script", stdin=b"#!/no/such/shell\n")
    for init, words in {
        "/no/such/init": "no such file", "/sbin/other": "exec format error", "/sbin/script": "no such file",
    }.items():  # fmt: skip
        shared_host.run("set", name, f"init={init}")
        done = refused(shared_host, 1, "cannot start", "start", name)
        assert words in done.err, done


def test_a_shutdown_that_is_not_obeyed_leaves_it_running(shared_host: Node) -> None:
    name = stubborn(shared_host)
    refused(shared_host, 4, "did not end within 0.5 s", "shutdown", name, "--timeout", "0.5")
    assert shared_host.state(name) == "running"
    assert inside(shared_host, name, "echo here") == "here"
    shared_host.run("stop", "--kill", name)


def test_stop_kills_what_does_not_end_in_time(shared_host: Node) -> None:
    name = stubborn(shared_host)
    shared_host.run("stop", name, "--timeout", "0.5")
    assert shared_host.state(name) == "stopped"
    assert end_of(shared_host, name) | {"ended": 0} == {"reason": "killed", "status": 9, "ended": 0}


def test_stop_kill_asks_nobody(shared_host: Node) -> None:
    name = create(shared_host)
    shared_host.run("stop", "--kill", name)
    assert end_of(shared_host, name)["reason"] == "killed"
    assert "pct stop" in shared_host.run("stop", "--help").out
    refused(shared_host, 4, "it is not running", "stop", name)


def test_shutdown_ends_it_in_good_order(shared_host: Node) -> None:
    name = create(shared_host)
    script = b"#!/bin/sh\n[ $1 = stop ] && date > /root/stopped\n"
    shared_host.run("push", "--mode", "0755", "-", f"{name}:/etc/init.d/S10test", stdin=script)
    shared_host.run("shutdown", name)
    assert end_of(shared_host, name)["reason"] == "halt"
    shared_host.run("start", name)
    assert inside(shared_host, name, "cat /root/stopped") != ""


def test_a_container_that_was_just_started_is_stopped_at_once(shared_host: Node) -> None:
    name = create(shared_host, start=False)
    for _ in range(3):
        shared_host.run("start", name)
        shared_host.run("shutdown", name, "--timeout", "20")
        assert end_of(shared_host, name)["reason"] == "halt"


def test_reboot_from_outside_keeps_the_identity(shared_host: Node) -> None:
    name = create(shared_host)
    before, boot_before = shared_host.json("info", name), boot_id(shared_host, name)
    shared_host.run("reboot", name)
    after = shared_host.json("info", name)
    assert {key: after[key] for key in _KEPT} == {key: before[key] for key in _KEPT}
    assert (after["state"], after["pid"] != before["pid"]) == ("running", True)
    assert boot_id(shared_host, name) != boot_before


def test_a_frozen_container_stands_still_until_it_is_thawed(shared_host: Node) -> None:
    name = create(shared_host)
    shared_host.run("freeze", name)
    assert shared_host.run("status", name).out == "frozen\n"
    refused(shared_host, 4, "it is frozen", "freeze", name)
    refused(shared_host, 4, "it is frozen", "exec", name, "--", "true")
    shared_host.run("thaw", name)
    assert shared_host.run("status", name).out == "running\n"
    assert inside(shared_host, name, "echo here") == "here"
    refused(shared_host, 4, "it is not frozen", "thaw", name)


@pytest.mark.parametrize("how", [["stop"], ["stop", "--kill"], ["shutdown"]], ids=" ".join)
def test_a_frozen_container_can_be_stopped(shared_host: Node, how: list[str]) -> None:
    name = create(shared_host)
    shared_host.run("freeze", name)
    shared_host.run(*how, name, timeout_s=30)
    assert end_of(shared_host, name)["reason"] == ("killed" if "--kill" in how else "halt")


def test_destroy_refuses_what_runs_unless_it_is_forced(shared_host: Node) -> None:
    name = create(shared_host)
    info = shared_host.json("info", name)
    refused(shared_host, 4, "it is running", "destroy", "--yes", name)
    assert shared_host.state(name) == "running"
    shared_host.run("destroy", "--yes", "--force", name)
    refused(shared_host, 3, name, "info", name)
    assert not os.path.exists(info["config_file"])
    assert not os.path.exists(f"{shared_host.layout.pool}/volumes/{info['volume']}")
    wait_until(lambda: nothing_left_on_the_host(shared_host, info["id"]), what="the host is clean")


def test_destroy_asks_only_at_a_terminal(shared_host: Node) -> None:
    name = create(shared_host, start=False)
    refused(shared_host, 2, "there is no terminal to ask on", "destroy", name)
    assert shared_host.state(name) == "stopped"


def test_a_protected_container_is_not_destroyed_even_by_force(shared_host: Node) -> None:
    name = create(shared_host)
    shared_host.run("protect", name)
    refused(shared_host, 5, "it is protected", "destroy", "--yes", "--force", name)
    assert shared_host.state(name) == "running"
    shared_host.run("protect", "--off", name)
    shared_host.run("destroy", "--yes", "--force", name)


def test_a_frozen_container_is_destroyed_by_force(shared_host: Node) -> None:
    name = create(shared_host)
    shared_host.run("freeze", name)
    shared_host.run("destroy", "--yes", "--force", name, timeout_s=30)
    refused(shared_host, 3, name, "status", name)


def test_all_and_several_at_once(host: Node) -> None:
    names = [create(host, "--tag", "web" if number else "db", start=False) for number in range(3)]
    done = host.run("start", "--all")
    assert sorted(done.out.split()) == sorted(["started"] * 3 + names)
    assert [entry["state"] for entry in host.json("list")] == ["running"] * 3
    assert host.run("start", "--all").err == "nothing to start\n"
    host.run("stop", "--tag", "web")
    assert [entry["state"] for entry in host.json("list")] == ["running", "stopped", "stopped"]
    # One that cannot be done does not keep the others from being done.
    done = host.run("stop", *names, check=False)
    assert (done.status, done.out) == (4, f"stopped {names[0]}\n"), done
    assert done.err.count("it is not running") == 2, done
    assert [entry["state"] for entry in host.json("list")] == ["stopped"] * 3


def test_of_two_creates_of_one_name_at_once_exactly_one_wins(host: Node) -> None:
    host.run("daemon", "start")
    racers = [
        host.popen("create", "one", "--template", "tiny", stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(6)
    ]
    ends = [(racer.communicate(timeout=60), racer.returncode) for racer in racers]
    statuses = sorted(status for _, status in ends)
    assert statuses[0] == 0, ends
    assert all(status in (2, 4) for status in statuses[1:]), ends
    assert all(b"one" in err for (_, err), status in ends if status), ends
    listed = host.json("list")
    assert [entry["name"] for entry in listed] == ["one"]
    assert os.listdir(f"{host.layout.pool}/volumes") == [str(listed[0]["id"])]
    assert os.listdir(host.layout.container_configs) == [f"{listed[0]['id']}.toml"]


def test_the_first_free_number_is_taken_unless_one_is_given(host: Node) -> None:
    first = create(host, start=False)
    create(host, "--id", "120", start=False)
    second = create(host, start=False)
    numbers = {entry["name"]: entry["id"] for entry in host.json("list")}
    assert (numbers[first], numbers[second]) == (100, 101)
    refused(host, 4, "120", "create", new_name(), "--template", "tiny", "--id", "120")
    host.run("destroy", "--yes", "100")
    assert host.json("info", create(host, start=False))["id"] == 100


def test_wait_returns_when_the_state_is_reached_and_fails_when_it_is_not(shared_host: Node) -> None:
    name = create(shared_host, start=False)
    shared_host.run("wait", name, "--state", "stopped")
    refused(shared_host, 4, "it is stopped", "wait", name, "--state", "running", "--timeout", "0.2")
    shared_host.run("start", name)
    shared_host.run("wait", name)  # an init that never says READY counts as booted when it runs
    in_vain = ["wait", name, "--state", "stopped", "--timeout", "0.2"]
    refused(shared_host, 4, "it is running after 0.2 s", *in_vain)
    waiting = shared_host.popen("wait", name, "--state", "stopped")
    shared_host.run("stop", name)
    assert waiting.wait(20) == 0


def test_events_tell_the_life_of_a_container(shared_host: Node) -> None:
    name = create(shared_host, start=False)
    number = shared_host.json("info", name)["id"]
    listener = shared_host.popen("events", "--json", stdout=subprocess.PIPE)
    seen: list[dict] = []

    def follow(wanted: str) -> None:
        while line := listener.stdout.readline():
            event = json.loads(line)
            seen.append(event)
            if event.get("id") == number and event.get("change") == wanted:
                return
        raise AssertionError(f"no {wanted} in {seen}")

    def heard() -> bool:
        shared_host.run("set", name, "description=is anybody there")
        return bool(select.select([listener.stdout], [], [], 0.2)[0])

    wait_until(heard, what="the listener is subscribed")
    shared_host.run("start", name)
    follow("started")
    shared_host.run("freeze", name)
    follow("frozen")
    shared_host.run("thaw", name)
    follow("thawed")
    shared_host.run("stop", name)
    follow("stopped")
    assert seen[-1]["reason"] == "halt"
    shared_host.run("destroy", "--yes", name)
    follow("destroyed")


def test_start_on_boot_is_kept_in_the_configuration(shared_host: Node) -> None:
    name = create(shared_host, "--onboot", start=False)
    assert shared_host.json("info", name)["onboot"] is True
    assert "onboot = true" in shared_host.run("config", name).out


def test_errors_name_a_container_by_name_and_number_whichever_was_typed(shared_host: Node) -> None:
    name = create(shared_host, start=False)
    number = str(shared_host.json("info", name)["id"])
    for ref in (name, number):
        for verb in ("stop", "freeze", "thaw", "reboot"):
            refused(shared_host, 4, f"cannot {verb} {name} ({number}): it is not running", verb, ref)
        done = refused(shared_host, 4, f"cannot execute in {name} ({number}): ", "exec", ref, "--", "true")
        assert f"`sysctr start {name}`" in done.err
        refused(shared_host, 4, f"console of {name} ({number}): it is not running", "console", ref)
    shared_host.run("protect", name)
    done = refused(shared_host, 5, f"cannot destroy {name} ({number}): it is protected",
                   "destroy", "--yes", number)  # fmt: skip
    assert f"`sysctr protect {name} --off`" in done.err
    shared_host.run("protect", "--off", name)
    shared_host.run("start", name)
    done = refused(shared_host, 4, f"cannot destroy {name} ({number}): it is running",
                   "destroy", "--yes", name)  # fmt: skip
    refused(shared_host, 4, f"cannot start {name} ({number}): it is running", "start", number)
    refused(shared_host, 3, "cannot attach eth1 of", "set", name, "net.1=eth1,bridge=nope,ip=manual")
    shared_host.run("destroy", "--yes", "--force", name)


def test_a_bridge_that_is_not_there_is_told_at_creation(shared_host: Node) -> None:
    name = new_name()
    done = refused(
        shared_host, 3, f"cannot attach eth0 of {name}: there is no bridge nope",
        "create", name, "--template", "tiny", "--net", "name=eth0,bridge=nope,ip=manual",
    )  # fmt: skip
    assert "hint: bridges of this host: " in done.err
    assert shared_host.layout.bridge in done.err
    refused(shared_host, 3, name, "info", name)


def test_a_container_is_destroyed_by_force_while_something_is_done_to_it(shared_host: Node) -> None:
    for _ in range(3):
        name = create(shared_host, start=False)
        shared_host.run("start", "--no-wait", name)
        shared_host.run("destroy", "--force", "--yes", name, timeout_s=60)
        refused(shared_host, 3, name, "info", name)
    name = stubborn(shared_host)
    waiting = shared_host.run("shutdown", "--timeout", "250", "--no-wait", name).out.strip()
    shared_host.run("destroy", "--force", "--yes", name, timeout_s=60)
    assert shared_host.json("task", "show", waiting)["state"] == "cancelled"


def test_several_containers_are_destroyed_by_name_and_by_tag(shared_host: Node) -> None:
    tag = new_name("tag")
    one, two = (create(shared_host, "--tag", tag) for _ in range(2))
    three, four = (create(shared_host) for _ in range(2))
    done = refused(shared_host, 4, f"cannot destroy {one} (", "destroy", "--yes", "--tag", tag)
    assert f"cannot destroy {two} (" in done.err, "each is reported"
    shared_host.run("destroy", "--yes", "--force", "--tag", tag)
    done = shared_host.run("destroy", "--yes", "--force", three, "nowhere-at-all", four, check=False)
    assert done.status == 3, done
    left = {entry["name"] for entry in shared_host.json("list")}
    assert left.isdisjoint({one, two, three, four})
