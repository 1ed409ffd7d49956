"""Containers on btrfs that move to a btrfs as streams of it: all their states, the present one, and cuts."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.node import Node, TemplateStore, kill
from tests.system import peers
from tests.system.guests import create, inside, lines, new_name, shell
from tests.system.peers import acquainted, begin, disk_at, ended, migrations, task
from tests.wait import wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox", "loop", "btrfs"),
]

_MIB = 1 << 20
_NAMES = ("left", "right")
# Counts without an end, and says no number before it is on the disk.
_COUNT = "n=0; while n=$((n + 1)); do echo $n >>/root/count; sync -d /root/count; sleep 0.05; done"
_SERVICE = f"#!/bin/sh\n[ $1 = start ] && ( {_COUNT.replace('n=0', 'n=$(wc -l </root/count)', 1)} ) &\n"


def with_btrfs(host: Node) -> contextlib.AbstractContextManager[None]:
    """Give a host a btrfs."""
    return disk_at(host, place(host), "btrfs", 1 << 30)


def place(host: Node) -> str:
    """Return where a host has its btrfs."""
    return f"{host.root}/disk"


@pytest.fixture(scope="module")
def pair(pytestconfig: pytest.Config, templates: TemplateStore) -> Iterator[dict[str, Node]]:
    """Two hosts that trust each other, each with a btrfs for the pool `fast`."""
    with acquainted(
        templates, *_NAMES, keep=pytestconfig.getoption("keep"), before=dict.fromkeys(_NAMES, with_btrfs)
    ) as hosts:
        for host in hosts.nodes.values():
            host.run("pool", "add", "fast", "--driver", "btrfs", "--path", f"{place(host)}/pool")
        yield hosts.nodes


@pytest.fixture(scope="module")
def archive(pair: dict[str, Node], tmp_path_factory: pytest.TempPathFactory) -> str:
    """An archive of the left host: what is restored of it has no template, which would be sent alone."""
    directory, ref = tmp_path_factory.mktemp("archives"), create(pair["left"], start=False)
    pair["left"].run("set", ref, "mount.0.target=/mnt/data", "mount.0.pool=fast")
    pair["left"].run("backup", ref, "--dir", str(directory))
    pair["left"].run("destroy", ref, "--yes")
    (found,) = directory.glob("*.tar.zst")
    return str(found)


@pytest.fixture
def ref(pair: dict[str, Node], archive: str) -> str:
    """A container of the left host on btrfs, with a volume of its own on /mnt/data; it is stopped."""
    name = new_name()
    pair["left"].run("restore", archive, "--name", name, "--pool", "fast")
    return name


@pytest.fixture
def left(pair: dict[str, Node]) -> Node:
    return pair["left"]


@pytest.fixture
def right(pair: dict[str, Node]) -> Node:
    return pair["right"]


@pytest.fixture(autouse=True)
def _nothing_stays(pair: dict[str, Node]) -> Iterator[None]:
    """See that neither host has more subvolumes, or anything under way, than its containers account for."""
    yield
    for host in pair.values():
        wait_until(lambda one=host: migrations(one) == [], 30, "the end of what is under way")
        host.run("destroy", "--all", "--force", "--yes")
        wait_until(lambda one=host: subvolumes(one) == [], 30, "the end of all subvolumes")


def subvolumes(host: Node) -> list[str]:
    """Return the subvolumes of volumes and their snapshots, half-made ones too."""
    found = host.shell("btrfs", "subvolume", "list", place(host)).out
    return sorted(line.split()[-1] for line in found.splitlines() if "/layers/" not in line)


def temporary(host: Node) -> list[str]:
    """Return the subvolumes that stand for a state which was only kept to be sent."""
    return [path for path in subvolumes(host) if "tmp-" in path]


def move(host: Node, ref: str, *options: str, verb: str = "migrate") -> dict[str, Any]:
    """Move a container to the right host and return the report; it has to have gone as streams."""
    report = peers.move(host, ref, "right", *options, verb=verb)
    assert {one["method"] for one in report["volumes"]} == {"stream"}
    return report


def result(host: Node, number: str) -> dict[str, Any]:
    """Wait for the end of a migration and return its report; it has to have gone well."""
    found = ended(host, number, 90)
    assert found["state"] == "done", found
    return found["result"]


def history(host: Node, ref: str) -> None:
    """Make a history with branches: one, two, back to one, three, and four is the present."""
    for state, back in (("one", ""), ("two", ""), ("three", "one"), ("four", "")):
        if back:
            host.run("rollback", ref, back, "--yes")
        host.run("start", ref)
        shell(host, ref, f"echo {state} | tee /root/state > /mnt/data/state; rm -rf /etc/dir")
        shell(host, ref, f"mkdir -p /etc/dir/{state}; head -c 300000 /dev/urandom > /srv/{state}")
        host.run("stop", ref)
        if state != "four":
            host.run("snapshot", ref, state)


def tree(host: Node, ref: str) -> list[tuple[str, str]]:
    """Return the snapshots, and what each goes back to."""
    return [(one["name"], one["parent"]) for one in host.json("snapshots", ref)["snapshots"]]


def counted(host: Node, ref: str) -> int:
    """Return how far the service has counted; every number has to be there, and once."""
    numbers = lines(host, ref, "cat /root/count")
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    return len(numbers)


def serve(host: Node, ref: str) -> None:
    """Let a running container count from now on, and again when it starts."""
    host.run("push", "-", f"{ref}:/etc/init.d/S50count", stdin=_SERVICE.encode())
    shell(host, ref, "chmod 755 /etc/init.d/S50count; touch /root/count; /etc/init.d/S50count start")
    wait_until(lambda: counted(host, ref) > 0, 30, "a first number")


def test_every_state_of_a_stopped_container_goes_as_a_stream(left: Node, right: Node, ref: str) -> None:
    history(left, ref)
    before = tree(left, ref)
    left.run("start", ref)
    shell(left, ref, "chown 1000:1000 /mnt/data/state; ln /mnt/data/state /mnt/data/two; mkfifo /mnt/pipe")
    digest = inside(left, ref, "cat /srv/one /srv/four | sha256sum")
    left.run("stop", ref)

    report = move(left, ref)

    assert report["snapshots"] == 3
    assert left.json("list") == []
    assert subvolumes(left) == []
    assert temporary(right) == []
    assert tree(right, ref) == before
    right.run("start", ref)
    assert inside(right, ref, "test -p /mnt/pipe && cat /srv/one /srv/four | sha256sum") == digest
    assert inside(right, ref, "stat -c %u:%g:%h /mnt/data/two") == "1000:1000:2"
    right.run("stop", ref)
    for state in ("two", "three", "one"):
        right.run("rollback", ref, state, "--yes")
        right.run("start", ref)
        assert inside(right, ref, "cat /root/state /mnt/data/state; ls /etc/dir").split() == [state] * 3
        right.run("stop", ref)
    # The history goes on, and all of it goes back.
    right.run("snapshot", ref, "five")
    right.run("delsnapshot", ref, "two")
    peers.move(right, ref, "left")
    assert [name for name, _ in tree(left, ref)] == ["one", "three", "five"]
    assert temporary(left) == temporary(right) == subvolumes(right) == []


def test_a_running_container_is_sent_as_what_differs_from_pass_to_pass(
    left: Node, right: Node, ref: str
) -> None:
    left.run("start", ref)
    shell(left, ref, "head -c 30000000 /dev/urandom > /root/large")
    digest = inside(left, ref, "sha256sum /root/large")
    left.run("snapshot", ref, "one")
    serve(left, ref)
    seen = counted(left, ref)

    report = move(left, ref, "--restart")

    assert report["started"]
    (root,) = (one for one in report["volumes"] if one["expected_bytes"] >= 30_000_000)
    assert root["total_bytes"] == root["expected_bytes"] < 60_000_000
    assert counted(right, ref) >= seen
    wait_until(lambda: counted(right, ref) > seen, 30, "that it counts on")
    assert inside(right, ref, "sha256sum /root/large") == digest
    # The snapshot has what is large, and so nothing that comes after.
    assert max(one["sent_bytes"] for one in report["passes"]) < 10 * _MIB, report
    assert report["downtime_s"] < 10, report
    assert left.json("list") == []
    assert subvolumes(left) == temporary(right) == []
    right.run("rollback", ref, "one", "--yes")


def test_a_copy_of_a_running_container(left: Node, right: Node, ref: str) -> None:
    name = new_name("copy")
    left.run("start", ref)
    serve(left, ref)
    seen = counted(left, ref)
    move(left, ref, "--name", name, "--start", verb="copy")
    assert counted(right, name) >= seen
    assert counted(left, ref) >= seen
    assert temporary(left) == temporary(right) == []


@pytest.mark.parametrize(
    "point", ["migrate.in.synced:4", "btrfs.receive.received:3", "btrfs.receive.recorded:4"]
)
def test_a_pass_that_the_target_has_and_nobody_knows_of_does_no_harm(
    left: Node, right: Node, ref: str, point: str
) -> None:
    left.run("start", ref)
    serve(left, ref)
    shell(left, ref, "head -c 3000000 /dev/urandom > /mnt/data/large")
    digest = inside(left, ref, "sha256sum /mnt/data/large")
    right.run("daemon", "stop")
    right.run("daemon", "start", env={"SYSCTR_FAULT": point})
    first = right.pids()["daemon"]

    number = begin(left, ref, "right", restart=True)
    wait_until(lambda: right.pids().get("daemon") != first, 60, f"the end of the daemon at {point}")
    right.run("daemon", "start")
    report = result(left, number)

    assert report["started"]
    seen = counted(right, ref)
    wait_until(lambda: counted(right, ref) > seen, 30, "that it counts on")
    assert inside(right, ref, "sha256sum /mnt/data/large") == digest
    assert left.json("list") == []
    assert subvolumes(left) == temporary(right) == []


@pytest.mark.parametrize("which", _NAMES)
def test_a_stream_that_is_cut_is_sent_again_or_undone(pair: dict[str, Node], ref: str, which: str) -> None:
    left, right = pair["left"], pair["right"]
    left.run("start", ref)
    shell(left, ref, "head -c 40000000 /dev/urandom > /root/large")
    digest = inside(left, ref, "sha256sum /root/large")
    left.run("snapshot", ref, "one")

    number = begin(left, ref, "right", restart=True, bwlimit_bytes=10 * _MIB)
    wait_until(lambda: (task(left, number)["progress_bytes"] or 0) > 5 * _MIB, 60, "5 MiB that were sent")
    kill(pair[which].pids()["daemon"])
    pair[which].run("daemon", "start")

    if which == "right":
        assert result(left, number)["started"]
    else:
        # The source's own end undoes it: what it is, it stays, and over there is nothing.
        wait_until(lambda: migrations(left) == migrations(right) == [], 60, "the undoing")
        assert left.state(ref) == "running"
        assert (right.json("list"), subvolumes(right), temporary(left)) == ([], [], [])
        move(left, ref, "--restart")
    assert inside(right, ref, "sha256sum /root/large") == digest
    assert (left.json("list"), subvolumes(left), temporary(right)) == ([], [], [])
    assert [name for name, _ in tree(right, ref)] == ["one"]
