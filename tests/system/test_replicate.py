"""Replicas: brought up to date by themselves, promoted after a loss, and never in two places."""

import os
import signal

import pytest

from tests.node import Node
from tests.trees import named
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.kernel]


def joined(left: Node, right: Node) -> None:
    """Let two hosts trust each other; the first calls the other "right", and is called "left"."""
    token = left.json("peer", "token", "--address", "192.0.2.1:8645")["token"]
    right.run("peer", "join", "-", "--name", "left", "--address", "192.0.2.2:8645", stdin=token.encode())
    left.run("peer", "rename", left.json("peer", "list")[0]["name"], "right")


def write(node: Node, text: str) -> None:
    node.run("exec", "web", "--", "sh", "-c", f"echo {text} >/root/state; sync")


def read(node: Node) -> str:
    return node.run("exec", "web", "--", "cat", "/root/state").out.strip()


def lost(node: Node) -> None:
    """End a host's daemon, as the loss of the host would; its containers are on their own then."""
    with open(node.layout.daemon_lock, encoding="ascii") as file:
        os.kill(int(file.read()), signal.SIGKILL)


def states(node: Node) -> dict[str, str]:
    return {one["name"]: one["state"] for one in node.json("list")}


def test_a_replica_takes_over_and_the_source_comes_back_to_find_that_out(
    two_nodes: tuple[Node, Node],
) -> None:
    left, right = two_nodes
    joined(left, right)
    left.run("create", "web", "--template", "tiny", "--start")
    write(left, "one")
    assert "replicated web to right" in left.run("replicate", "web", "right", "--every", "1h").out
    write(left, "two")
    left.run("replicate", "web", "right")
    write(left, "three")
    assert states(right) == {}
    assert [one["role"] for one in right.json("replicate", "--list")] == ["replica"]
    # While the source answers there is nothing to promote, and no name to be had.
    refused = right.run("promote", "web", "--i-fenced-it", check=False)
    assert (refused.status, "left answers, and has the container" in refused.err) == (5, True)
    assert "in the making" in right.run("create", "web", "--template", "tiny", check=False).err
    uuid = left.json("info", "web")["uuid"]
    lost(left)
    refused = right.run("promote", "web", check=False)
    assert (refused.status, "--i-fenced-it" in refused.err) == (5, True)
    assert "promoted web" in right.run("promote", "web", "--i-fenced-it", "--start").out
    assert read(right) == "two"
    info = right.json("info", "web")
    assert (info["uuid"], info["generation"]) == (uuid, 2)
    # It runs there still; the daemon that comes back ends it, and gives it up.
    wait_until(lambda: states(left) == {"web": "away"}, deadline_s=30)
    refused = left.run("start", "web", check=False)
    assert (refused.status, "right has it now" in refused.err) == (4, True)
    assert left.json("replicate", "--list") == right.json("replicate", "--list") == []
    left.run("destroy", "web", "--yes")
    assert os.listdir(right.layout.migrations) == []


def test_a_source_that_cannot_ask_does_not_start(two_nodes: tuple[Node, Node]) -> None:
    left, right = two_nodes
    joined(left, right)
    left.run("create", "web", "--template", "tiny", "--start")
    left.run("replicate", "web", "right", "--every", "1h")
    lost(right)
    # This daemon has heard that there is no other.
    left.run("stop", "web", "--kill")
    left.run("start", "web")
    left.run("stop", "web", "--kill")
    left.run("daemon", "stop")
    refused = left.run("start", "web", check=False)
    assert (refused.status, "may have promoted it" in refused.err) == (5, True)
    refused = left.run("replicate", "web", "--stop", check=False)
    assert (refused.status, "--force" in refused.err) == (1, True)
    left.run("replicate", "web", "--stop", "--force")
    left.run("start", "web")
    assert states(left) == {"web": "running"}
    # What is over there is removed by hand.
    right.run("replicate", "web", "--stop")
    assert right.json("replicate", "--list") == []
    assert os.listdir(f"{right.layout.containers}/.reserved") == []
    assert right.json("list") == []


def test_it_is_brought_up_to_date_by_itself(two_nodes: tuple[Node, Node]) -> None:
    left, right = two_nodes
    joined(left, right)
    left.run("create", "web", "--template", "tiny", "--start")
    left.run("replicate", "web", "right", "--every", "10s")

    def last() -> float:
        return right.json("replicate", "--list")[0]["last"]

    first = last()
    wait_until(lambda: last() > first, deadline_s=40)
    # A container that is gone leaves its replica: that is what it is for.
    left.run("destroy", "web", "--force", "--yes")
    right.run("promote", "web", "--start")
    assert states(right) == {"web": "running"}


@pytest.mark.parametrize("point", ["replica.in.kept", "replica.in.noted", "migrate.in.synced"])
def test_a_target_that_dies_keeps_the_last_complete_state(two_nodes: tuple[Node, Node], point: str) -> None:
    left, right = two_nodes
    joined(left, right)
    left.run("create", "web", "--template", "tiny", "--start")
    write(left, "one")
    left.run("replicate", "web", "right", "--every", "1h")
    write(left, "two")
    right.run("daemon", "stop")
    right.run("list", env={"SYSCTR_FAULT": point})
    with open(right.layout.daemon_lock, encoding="ascii") as file:
        pid = int(file.read())
    sending = left.popen("replicate", "web", "right")
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), deadline_s=30)
    lost(left)
    sending.kill()
    sending.wait()
    right.run("promote", "web", "--i-fenced-it", "--start")
    # Noted or not, it is one of the two, and whole.
    assert read(right) in ("one", "two")
    assert read(right) == "two" or point != "replica.in.noted"
    assert named(right.layout.pool, "replica-*.json") == []
