"""Containers that move between hosts which share nothing but a token, and copies of them."""

import contextlib
import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.node import Node, TemplateStore
from tests.system import peers
from tests.system.guests import create, inside, new_name, refused, shell
from tests.system.peers import Hosts, Stop, Watch, look, make_everything, move
from tests.wait import wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox", "loop", "btrfs"),
]

_MIB = 1 << 20
_PIPE = subprocess.PIPE
_OTHER_SUBNET = "10.78.0.0/24"
# All that is the container's own; the rest is made anew at each start.
_OWN = ("/bin", "/sbin", "/usr", "/home", "/lib", "/root", "/srv", "/var/spool", "/mnt")


def with_pool(node: Node) -> contextlib.AbstractContextManager[None]:
    """Give a host a btrfs for pools beside the one that it has."""
    return peers.disk_at(node, f"{node.root}/disk", "btrfs", 2 << 30)


@pytest.fixture(scope="module")
def hosts(pytestconfig: pytest.Config, templates: TemplateStore) -> Iterator[Hosts]:
    """Two hosts with the same subnet and pools `fast` (btrfs) and `images`; the third has little of that."""
    settings = {"third": f'[network]\nsubnet = "{_OTHER_SUBNET}"\n'}
    with peers.acquainted(
        templates, "left", "right", "third", keep=pytestconfig.getoption("keep"), settings=settings,
        wanted={"third": ()}, before={"left": with_pool, "right": with_pool},
    ) as three:  # fmt: skip
        for name in ("left", "right"):
            node = three.nodes[name]
            for pool, driver in (("fast", "btrfs"), ("images", "loop")):
                node.run("pool", "add", pool, "--driver", driver, "--path", f"{node.root}/disk/{pool}")
        yield three
        for node in three.nodes.values():
            assert peers.leftovers(node) == []


@pytest.fixture
def left(hosts: Hosts) -> Node:
    return hosts.nodes["left"]


@pytest.fixture
def right(hosts: Hosts) -> Node:
    return hosts.nodes["right"]


@pytest.fixture
def third(hosts: Hosts) -> Node:
    return hosts.nodes["third"]


@pytest.fixture(autouse=True)
def _nothing_stays(hosts: Hosts) -> Iterator[None]:
    """Leave every host as it was for the next test, and see that nothing but containers is left."""
    yield
    for node in hosts.nodes.values():
        assert peers.migrations(node) == []
        node.run("destroy", "--all", "--force", "--yes")
        wait_until(lambda one=node: peers.is_tidy(one), 10, f"that {node.root} is tidy")


def config(node: Node, ref: str) -> str:
    """Return the configuration of a container as it is written."""
    return Path(node.layout.container_config(node.json("info", ref)["id"])).read_text()


def sorted_lines(text: str) -> list[str]:
    return sorted(text.split("\n"))


def identity(node: Node, ref: str) -> tuple[Any, ...]:
    """Return what makes a container the one that it is."""
    info = node.json("info", ref)
    return info["uuid"], info["name"], info["id"], [nic["mac"] for nic in info["nets"]]


def digest(node: Node, ref: str, path: str) -> str:
    return inside(node, ref, f"sha256sum {path}").split()[0]


def test_a_stopped_container_moves_with_all_that_it_is(left: Node, right: Node) -> None:
    ref = create(left, "--tag", "web", "--env", "A=b", start=False)
    left.run("set", ref, "mount.0.target=/mnt/data", "limits.memory=256M", "description=moves")
    left.run("start", ref)
    make_everything(left, ref, 2000)
    shell(
        left,
        ref,
        "echo data > /mnt/data/file; chown 1000:1000 /mnt/data/file; ln /mnt/data/file /mnt/data/two",
    )
    machine_id = inside(left, ref, "cat /etc/machine-id || true")
    before, who, text = look(left, ref, *_OWN), identity(left, ref), config(left, ref)
    (address,) = left.json("info", ref)["addresses"]
    refused(left, 5, "running", "migrate", ref, "right")
    left.run("stop", ref)

    report = move(left, ref, "right")

    assert (report["name"], report["peer"], report["blockers"], report["warnings"]) == (ref, "right", [], [])
    assert report["downtime_s"] is None
    assert not report["started"]
    assert report["sent_bytes"] > 0
    assert [one["method"] for one in report["volumes"]] == ["rsync", "rsync"]
    assert peers.containers(left) == {}
    assert right.state(ref) == "stopped"
    assert identity(right, ref) == who
    assert sorted_lines(config(right, ref)) == sorted_lines(text)
    right.run("start", ref)
    assert right.json("info", ref)["addresses"] == [address]
    assert inside(right, ref, "cat /etc/machine-id || true") == machine_id
    assert inside(right, ref, "echo $A; cat /mnt/data/two") == "b\ndata"
    after = look(right, ref, *_OWN)
    assert {path: (before.get(path), after.get(path)) for path in {*before, *after}
            if before.get(path) != after.get(path)} == {}  # fmt: skip
    assert "bin/vi" not in after
    assert int(inside(right, ref, "du -k /srv/holes").split()[0]) < 1024
    refused(left, 3, f"cannot find container {ref}", "start", ref)


def test_the_template_is_not_sent_again(left: Node, right: Node) -> None:
    ref = create(left)
    shell(left, ref, "head -c 3000000 /dev/urandom > /root/own")
    left.run("stop", ref)
    report = move(left, ref, "right")
    assert report["sent_bytes"] < 1.1 * 3_000_000, report
    assert right.json("info", ref)["template"] == "tiny"


def test_a_container_moves_there_and_back_and_its_ids_differ_on_both_hosts(left: Node, right: Node) -> None:
    ref = create(left)
    shell(left, ref, "echo 1 > /root/file; chown 1000:1001 /root/file")
    who = identity(left, ref)
    first = inside(left, ref, "cat /proc/self/uid_map").split()[1]
    move(left, ref, "right", "--restart")
    assert inside(right, ref, "cat /proc/self/uid_map").split()[1] != first
    assert inside(right, ref, "stat -c %u:%g /root/file; cat /root/file") == "1000:1001\n1"
    shell(right, ref, "echo 2 > /root/file; rm /bin/vi")
    move(right, ref, "left", "--restart")
    assert inside(left, ref, "cat /root/file; ls /bin/vi 2>&1 | wc -l; stat -c %u /root/file") == "2\n1\n1000"
    assert identity(left, ref) == who


# What it is kept on, and its snapshots

_WAYS = {
    "overlay to overlay": ("default", "default"), "overlay to btrfs": ("default", "fast"),
    "btrfs to btrfs": ("fast", "fast"), "btrfs to overlay": ("fast", "default"),
    "loop to overlay": ("images", "default"), "overlay to loop": ("default", "images"),
}  # fmt: skip


@pytest.mark.parametrize("way", _WAYS, ids=[way.replace(" ", "-") for way in _WAYS])
def test_snapshots_travel_with_their_configuration_and_branches(left: Node, right: Node, way: str) -> None:
    here, there = _WAYS[way]
    size = ["--disk", "128M"] if "loop" in way else []
    volume = "mount.0=target=/mnt/data" + (",size=64M" if "loop" in way else "")
    ref = create(left, "--pool", here, *size, start=False)
    left.run("set", ref, volume)
    _history(left, ref)
    tree = left.json("snapshots", ref)

    report = move(left, ref, "right", *([] if here == there else ["--pool-map", f"{here}={there}"]))

    assert report["snapshots"] == 3
    assert right.json("info", ref)["pool"] == there
    assert _told(right.json("snapshots", ref)) == _told(tree)
    for name, state in (("", "four"), ("two", "two"), ("three", "three"), ("one", "one")):
        if name:
            right.run("rollback", ref, name, "--yes")
        for path in ("/root/state", "/mnt/data/state", f"/root/only-{state}"):
            assert peers.pulled(right, ref, path) == state, (name, path)
        for other in {"one", "two", "three", "four"} - {state}:
            assert peers.pulled(right, ref, f"/root/only-{other}") is None
        assert right.api("GET", f"/1/containers/{ref}")[1]["container"]["description"] == state
    right.run("start", ref)
    assert inside(right, ref, "cat /root/state /mnt/data/state; ls /etc/dir") == "one\none\none"
    right.run("stop", ref)
    # And the history goes on.
    right.run("snapshot", ref, "five")
    right.run("delsnapshot", ref, "two")


def _history(node: Node, ref: str) -> None:
    """Make a history with branches: one, two, back to one, three, and four is the present; it is stopped."""
    node.run("start", ref)
    for state, back in (("one", ""), ("two", ""), ("three", "one"), ("four", "")):
        if back:
            node.run("rollback", ref, back, "--yes")
            node.wait(ref, "running")
        script = "rm -f /root/only-*; echo {0} | tee /root/state /root/only-{0} > /mnt/data/state"
        shell(node, ref, f"{script}; rm -rf /etc/dir; mkdir -p /etc/dir/{{0}}".format(state))
        node.run("set", ref, f"description={state}")
        if state != "four":
            node.run("snapshot", ref, state, "--description", f"this is {state}")
    node.run("stop", ref)


def _told(tree: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (tree["parent"]),
        *((one["name"], one["description"], one["parent"]) for one in tree["snapshots"]),
    ]


def test_btrfs_goes_as_streams_where_no_template_is_shared(left: Node, right: Node, tmp_path: Path) -> None:
    origin, ref = create(left, start=False), new_name()
    left.run("backup", origin, "--dir", str(tmp_path))
    (archive,) = tmp_path.glob("*.tar*")
    left.run("restore", str(archive), "--name", ref, "--pool", "fast")
    left.run("set", ref, "mount.0=target=/mnt/data")
    _history(left, ref)
    left.run("start", ref)
    make_everything(left, ref, 500)
    before = look(left, ref, *_OWN)
    report = move(left, ref, "right", "--restart")
    assert [one["method"] for one in report["volumes"]] == ["stream", "stream"]
    assert report["started"]
    after = look(right, ref, *_OWN)
    assert {path for path in {*before, *after} if before.get(path) != after.get(path)} == set()
    right.run("stop", ref)
    right.run("rollback", ref, "two", "--yes")
    right.run("start", ref)
    assert inside(right, ref, "cat /root/state /mnt/data/state") == "two\ntwo"


def test_a_host_without_the_template_gets_all_of_it(left: Node, third: Node) -> None:
    ref = create(left)
    make_everything(left, ref)
    before = look(left, ref, *_OWN)
    tried = move(left, ref, "third", "--restart", "--dry-run")
    assert any("template tiny" in one for one in tried["warnings"]), tried
    report = move(left, ref, "third", "--restart")
    assert report["sent_bytes"] > _MIB
    after = look(third, ref, *_OWN)
    assert {path for path in {*before, *after} if before.get(path) != after.get(path)} == set()


# What it is called, and where it is found


def test_the_address_stays_where_the_network_has_it_and_else_the_new_one_is_told(
    left: Node, third: Node
) -> None:
    ref = create(left)
    (address,) = left.json("info", ref)["addresses"]
    tried = left.run("migrate", ref, "third", "--restart", "--dry-run").out
    assert address in tried
    done = left.run("migrate", ref, "third", "--restart")
    (new,) = third.json("info", ref)["addresses"]
    assert new.startswith("10.78.0.")
    assert address in done.out, done
    assert new in done.out, done
    assert inside(third, ref, "ip -4 -o address show eth0").split()[3] == f"{new}/24"
    # The names of both networks follow.
    other = create(third)
    assert new in inside(third, other, f"nslookup {ref}")
    there = create(left)
    assert address not in shell(left, there, f"nslookup {ref}", check=False).out


def test_an_address_that_is_taken_over_there_is_not_taken_from_its_owner(left: Node, right: Node) -> None:
    ref, owner = create(left), create(right)
    assert left.json("info", ref)["addresses"] == right.json("info", owner)["addresses"]
    report = move(left, ref, "right", "--restart")
    (taken,), (new,) = right.json("info", owner)["addresses"], right.json("info", ref)["addresses"]
    assert new != taken
    assert report["there"]["addresses"]["eth0"] == {"before": taken, "after": new}
    # And the number too, as both were the first.
    assert report["there"]["id"] == right.json("info", ref)["id"] != report["id"]


def test_it_gets_another_number_and_name_where_that_is_wished(left: Node, right: Node) -> None:
    ref = create(left)
    report = move(left, ref, "right", "--restart", "--as", "777", "--name", "elsewhere")
    assert (report["there"]["id"], report["there"]["name"]) == (777, "elsewhere")
    info = right.json("info", "777")
    assert (info["name"], info["state"]) == ("elsewhere", "running")
    assert inside(right, "elsewhere", "hostname") == "elsewhere"


def test_two_containers_move_with_one_command(left: Node, right: Node) -> None:
    refs = [create(left), create(left, start=False)]
    done = left.run("migrate", *refs, "right", "--restart")
    assert "2 of 2" in done.err, done
    assert {name: one["state"] for name, one in peers.containers(right).items()} == {
        refs[0]: "running", refs[1]: "stopped"
    }  # fmt: skip
    assert peers.containers(left) == {}


# What is in the way


def test_a_trial_changes_nothing_on_either_host(left: Node, right: Node) -> None:
    ref = create(left)
    before = [peers.traces(node) for node in (left, right)]
    pid = left.json("info", ref)["pid"]
    told = left.run("migrate", ref, "right", "--restart", "--dry-run").out
    assert "nothing is in the way" in told
    report = move(left, ref, "right", "--restart", "--dry-run")
    assert report["there"]["name"] == ref
    assert "passes" not in report or not report["passes"]
    assert [peers.traces(node) for node in (left, right)] == before
    assert left.json("info", ref)["pid"] == pid


def test_everything_that_is_in_the_way_is_said_at_once(left: Node, right: Node, tmp_path: Path) -> None:
    ref = create(left, "--pool", "fast", start=False)
    create_there = right.run("create", ref, "--template", "tiny")
    assert create_there.status == 0
    taken = str(right.json("info", ref)["id"])
    left.shell("ip", "link", "add", "br9", "type", "bridge")
    try:
        left.run(
            "set",
            ref,
            f"mount.0=source={tmp_path},target=/mnt/host",
            "device.0=path=/dev/full,target=/dev/sub/brim",
        )
        left.run("set", ref, "net.1=bridge=br9,ip=manual")
        left.run("start", ref)
        right.run("peer", "restrict", "left", "--pool", "default")
        wanted = ("migrate", ref, "right", "--as", taken, "--pool-map", "fast=images")
        before = [peers.traces(node) for node in (left, right)]
        done = refused(left, 5, "in the way", *wanted)
        for words in ("running", "bind", "device", "/dev/full", "br9", f"number {taken}", ref, "images"):
            assert words in done.err, (words, done)
        tried = left.run(*wanted, "--dry-run", check=False)
        assert tried.status == 5, tried
        (task,) = left.json(*wanted, "--dry-run", check=False)
        kinds = {one["what"] for one in task["result"]["blockers"]}
        assert kinds >= {"running", "bind", "device", "bridge", "id", "name", "pool"}, task
        assert [peers.traces(node) for node in (left, right)] == before

        right.run("peer", "restrict", "left", "--pool", "all")
        right.run("destroy", ref, "--force", "--yes")
        report = move(
            left, ref, "right", "--restart", "--leave-out", "bind,device", "--bridge-map",
            f"br9={right.layout.bridge}",
        )  # fmt: skip
        assert report["started"]
        assert right.json("info", ref)["pool"] == "fast"
        assert "mount.0" not in config(right, ref)
        assert shell(right, ref, "ls /dev/sub/brim /mnt/host", check=False).status != 0
        bridges = [nic["bridge"] for nic in right.json("info", ref)["nets"]]
        assert bridges == [right.layout.bridge, right.layout.bridge]
    finally:
        left.run("destroy", "--all", "--force", "--yes")
        left.shell("ip", "link", "del", "br9")


def test_a_peer_does_what_it_may(left: Node, right: Node) -> None:
    ref = create(left, start=False)
    right.run("peer", "restrict", "left", "--send", "no")
    try:
        done = refused(left, 5, "in the way", "migrate", ref, "right")
        assert "may not send" in done.err
    finally:
        right.run("peer", "restrict", "left", "--send", "yes")
    left.run("peer", "restrict", "right", "--receive", "no")
    try:
        refused(left, 5, "in the way", "migrate", ref, "right")
    finally:
        left.run("peer", "restrict", "right", "--receive", "yes")
    move(left, ref, "right")


def test_a_peer_without_room_is_not_begun_with(left: Node, right: Node) -> None:
    ref = create(left, "--pool", "fast")
    free = right.json("pool", "list")
    size = next(one for one in free if one["name"] == "fast")
    shell(left, ref, f"head -c {64 << 20} /dev/urandom > /root/big; sync")
    left.run("stop", ref)
    filler = right.path(f"{right.root}/disk/filler")
    subprocess.run(["fallocate", "-l", str(size["free_bytes"] - (80 << 20)), filler], check=True)
    try:
        done = refused(left, 5, "space", "migrate", ref, "right")
        assert "MiB" in done.err
        assert peers.traces(right)["reserved"] == []
    finally:
        Path(filler).unlink()
        right.shell("sync", "--file-system", f"{right.root}/disk")
    move(left, ref, "right")


def test_what_is_wrong_is_said_and_nothing_begins(left: Node, right: Node) -> None:
    ref = create(left, start=False)
    refused(left, 3, "there is no peer nowhere", "migrate", ref, "nowhere")
    refused(left, 3, "cannot find", "migrate", "nothing", "right")
    status, answer = left.api("POST", f"/1/containers/{ref}/migrate", {"peer": "nowhere"})
    assert (status, answer["error"]["code"]) == (404, "not-found")
    assert refused(left, 2, "name", "migrate", ref, "right", "--name", "new\nline")
    status, answer = left.api("POST", f"/1/containers/{ref}/migrate", {"peer": "right", "name": "new\nline"})
    if status == 202:
        ended = peers.ended(left, answer["task"]["id"])
        assert ended["state"] == "failed"
        assert "\n" not in ended["error"]["message"].split("cannot", 1)[0]
    else:
        assert status == 400
    status, answer = left.api("POST", f"/1/containers/{ref}/migrate", {"peer": "right", "unknown": 1})
    assert status == 400
    assert [peers.containers(node).keys() for node in (left, right)] == [{ref}, set()]


def test_a_host_that_is_away_is_told_in_time(hosts: Hosts, left: Node, right: Node) -> None:
    ref = create(left, start=False)
    right.run("daemon", "stop")
    done = left.run("migrate", ref, "right", check=False)
    assert done.status == 1, done
    assert "right" in done.err
    assert done.err.startswith("sysctr: "), done
    right.run("daemon", "start")
    move(left, ref, "right")


# What else can be wished


def test_the_files_can_be_kept_and_nobody_starts_them(left: Node, right: Node) -> None:
    ref = create(left)
    (address,) = left.json("info", ref)["addresses"]
    report = move(left, ref, "right", "--restart", "--keep")
    assert report["kept"]
    assert left.run("status", ref).out.strip() == "away"
    assert "right" in left.run("info", ref).out
    refused(left, 4, "right has it", "start", ref)
    left.run("daemon", "restart")
    refused(left, 4, "right has it", "start", ref)
    assert not peers.runs_anything(left)
    # What is kept is in the way of its own return, and is destroyed like any other container.
    done = refused(right, 5, "in the way", "migrate", ref, "left", "--restart")
    assert "destroy" in done.err
    # Its address is free meanwhile.
    other = create(left)
    assert left.json("info", other)["addresses"] == [address]
    left.run("destroy", ref, "--yes")
    move(right, ref, "left", "--restart")
    assert left.state(ref) == "running"


def test_a_copy_has_an_identity_of_its_own_and_both_run(left: Node, right: Node) -> None:
    ref = create(left)
    left.run("set", ref, "mount.0=target=/mnt/data")
    shell(left, ref, "echo before > /root/file; echo data > /mnt/data/file")
    left.run("snapshot", ref, "mine")
    pid = left.json("info", ref)["pid"]
    with Watch(left, right) as watch:
        report = move(left, ref, "right", "--start", "--name", "double", verb="copy")
        wait_until(lambda: watch.doubles, what="that both run at once")
    assert report["started"]
    assert left.json("info", ref)["pid"] == pid
    assert inside(right, "double", "cat /root/file /mnt/data/file") == "before\ndata"
    mine, copy = identity(left, ref), identity(right, "double")
    assert mine[0] != copy[0]
    assert not set(mine[3]) & set(copy[3])
    assert left.run("snapshots", ref, "-q").out.split() == ["mine"]
    assert right.run("snapshots", "double", "-q").out.split() == []
    shell(left, ref, "echo after > /root/file")
    assert inside(right, "double", "cat /root/file") == "before"
    # A second one, and one of the copy here.
    move(left, ref, "right", "--name", "second", verb="copy")
    assert right.state("second") == "stopped"
    move(right, "double", "left", "--name", "third", verb="copy")
    assert {*peers.containers(left)} == {ref, "third"}


def test_no_more_is_sent_in_a_second_than_was_said(left: Node, right: Node) -> None:
    ref = create(left)
    shell(left, ref, "head -c 6000000 /dev/urandom > /root/own")
    left.run("stop", ref)
    report = move(left, ref, "right", "--bwlimit", "3M")
    assert report["seconds"] > 1.4, report
    assert report["sent_bytes"] / report["seconds"] < 3.3e6 * 1.05


@pytest.mark.parametrize(
    "point", ["migrate.begun", "migrate.pass.done", "migrate.stopped", "migrate.final.done"]
)
def test_a_migration_that_is_cancelled_leaves_nothing(left: Node, right: Node, point: str) -> None:
    ref = create(left)
    shell(left, ref, "echo mine > /root/file")
    before = peers.traces(right)
    with Watch(left, right) as watch:
        with Stop(left, point) as stop:
            task = peers.begin(left, ref, "right", restart=True)
            stop.wait(left, task)
            left.run("task", "cancel", task)
        assert peers.ended(left, task)["state"] == "cancelled"
        left.wait(ref, "running")
        assert inside(left, ref, "cat /root/file") == "mine"
        wait_until(lambda: not peers.migrations(left) and not peers.migrations(right), 20, "the end of it")
        wait_until(lambda: peers.traces(right) == before, 10, "that nothing is left there")
    assert not watch.doubles
    move(left, ref, "right", "--restart")
    assert inside(right, ref, "cat /root/file") == "mine"


def test_a_stream_that_is_slow_is_cancelled_at_once(left: Node, right: Node) -> None:
    ref = create(left)
    shell(left, ref, "head -c 20000000 /dev/urandom > /root/own")
    task = peers.begin(left, ref, "right", restart=True, bwlimit_bytes=1_000_000)
    wait_until(lambda: (peers.task(left, task).get("progress_bytes") or 0) > 100_000, 20, "its progress")
    assert [one["state"] for one in peers.migrations(right)] == ["moving"]
    left.run("task", "cancel", task)
    assert peers.ended(left, task, 5)["state"] == "cancelled"
    assert left.state(ref) == "running"
    wait_until(lambda: peers.is_tidy(right) and not peers.containers(right), 20, "that nothing is left there")


def test_many_move_in_both_directions_at_once(left: Node, right: Node) -> None:
    going, coming = [create(left) for _ in range(3)], [create(right) for _ in range(3)]
    for node, refs in ((left, going), (right, coming)):
        for ref in refs:
            shell(node, ref, f"echo {ref} > /root/file; head -c 2000000 /dev/urandom > /root/data")
    digests = {ref: digest(node, ref, "/root/data")
               for node, refs in ((left, going), (right, coming)) for ref in refs}  # fmt: skip
    with contextlib.ExitStack() as stack:
        commands = [
            stack.enter_context(
                node.popen("migrate", *refs, peer, "--restart", "--parallel", stdout=_PIPE, stderr=_PIPE)
            )
            for node, refs, peer in ((left, going, "right"), (right, coming, "left"))
        ]  # fmt: skip
        for command in commands:
            words = command.communicate(timeout=120)
            assert command.returncode == 0, words
    for node, refs in ((right, going), (left, coming)):
        assert {name: one["state"] for name, one in peers.containers(node).items()} == dict.fromkeys(
            refs, "running"
        )
        for ref in refs:
            assert inside(node, ref, "cat /root/file") == ref
            assert digest(node, ref, "/root/data") == digests[ref]


def test_what_is_on_its_way_is_shown_and_nobody_else_changes_it(left: Node, right: Node) -> None:
    ref = create(left)
    with Stop(left, "migrate.pass.done") as stop:
        task = peers.begin(left, ref, "right", restart=True)
        stop.wait(left, task)
        for node, way in ((left, "to right"), (right, "from left")):
            shown = node.run("migrations").out
            assert ref in shown
            assert way in shown
            assert "moving" in shown
        refused(left, 4, "migrate", "stop", ref)
        refused(left, 4, "migrate", "snapshot", ref)
        # It is no container over there yet, but its name and number are taken.
        assert peers.containers(right) == {}
        number = str(left.json("info", ref)["id"])
        taken = right.run("create", "other", "--template", "tiny", "--id", number, check=False)
        assert taken.status != 0, taken
        refused(left, 4, "migrat", "peer", "remove", "right")
    assert peers.ended(left, task)["state"] == "done"
    assert peers.migrations(left) == peers.migrations(right) == []


@pytest.mark.slow
def test_many_small_files_move(left: Node, right: Node) -> None:
    ref = create(left)
    make_everything(left, ref, 100_000)
    before = look(left, ref, "/srv")
    report = move(left, ref, "right", "--restart")
    after = look(right, ref, "/srv")
    assert len(after) > 100_000
    assert {path for path in {*before, *after} if before.get(path) != after.get(path)} == set()
    print(f"\n{len(after)} files: {report['seconds']} s, {report['downtime_s']} s down, {report['passes']}")
    assert report["downtime_s"] < 30


def test_the_key_that_was_pinned_is_what_counts(left: Node, right: Node) -> None:
    """Whoever else answers at that address gets not a byte of the container."""
    fingerprint = next(one["fingerprint"] for one in left.json("peer", "list") if one["name"] == "right")
    assert len(fingerprint) == len(hashlib.sha256().hexdigest())
    ref = create(left, start=False)
    right.run("peer", "rotate")
    move(left, ref, "right")
    after = next(one["fingerprint"] for one in left.json("peer", "list") if one["name"] == "right")
    assert after != fingerprint
