"""The commands of one host for the containers of another: allowed by it, and as at its own prompt."""

import contextlib
import json
import subprocess
from collections.abc import Iterator

import pytest

from sysctr.client import Client
from tests.node import Node, TemplateStore
from tests.system import peers
from tests.system.peers import Hosts
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox")]


@pytest.fixture(scope="module")
def hosts(pytestconfig: pytest.Config, templates: TemplateStore) -> Iterator[Hosts]:
    """Two hosts that trust each other; the right one has a container."""
    with peers.acquainted(templates, "left", "right", keep=pytestconfig.getoption("keep")) as found:
        found.nodes["right"].run("create", "web", "--template", "tiny", "--start")
        yield found


@pytest.fixture
def managed(hosts: Hosts) -> Iterator[Node]:
    """The left host, which may manage the right one."""
    hosts.nodes["right"].run("peer", "restrict", "left", "--manage", "yes")
    yield hosts.nodes["left"]
    hosts.nodes["right"].run("peer", "restrict", "left", "--manage", "no")


def test_nobody_may_unless_it_is_said(hosts: Hosts) -> None:
    left = hosts.nodes["left"]
    refused = left.run("--host", "right", "list", check=False)
    assert refused.status == 5
    assert "may not manage this host" in refused.err
    assert "peer restrict left --manage yes" in refused.err
    assert left.run("--host", "nobody", "list", check=False).status == 3


def test_commands_do_there_what_they_do_here(hosts: Hosts, managed: Node) -> None:
    right = hosts.nodes["right"]
    assert [one["name"] for one in managed.json("--host", "right", "list")] == ["web"]
    managed.run("--host", "right", "create", "new", "--template", "tiny", "--start")
    assert {one["name"]: one["state"] for one in right.json("list")} == {"web": "running", "new": "running"}
    assert managed.json("list") == []
    managed.run("snapshot", "new", "first", env={"SYSCTR_HOST": "right"})
    assert [one["name"] for one in right.json("snapshots", "new")["snapshots"]] == ["first"]
    failed = managed.run("--host", "right", "destroy", "new", "--yes", check=False)
    assert failed.status == right.run("destroy", "new", "--yes", check=False).status == 4
    managed.run("--host", "right", "destroy", "new", "--yes", "--force")
    assert [one["name"] for one in right.json("list")] == ["web"]


def test_what_is_meant_for_another_host_is_never_done_here(hosts: Hosts, managed: Node) -> None:
    managed.run("create", "own", "--template", "tiny")
    # A variable that is not set must not make it this host.
    for words in (("--host", ""), ("--host=",)):
        assert managed.run(*words, "destroy", "own", "--yes", "--force", check=False).status == 2
    pid = managed.json("daemon", "status")["pid"]
    for verb in ("start", "stop", "restart", "status"):
        refused = managed.run("--host", "right", "daemon", verb, check=False)
        assert (refused.status, "on the host itself" in refused.err) == (5, True)
    assert managed.json("daemon", "status")["pid"] == pid
    # What is called the same in this directory here is no file of the other host.
    for words in (
        ("backups", "--dir", "here"), ("backup", "verify", "./a.tar.gz"), ("template", "import", "README.md"),
        ("pool", "add", "fast", "--driver", "overlay", "--path", "here"),
    ):  # fmt: skip
        refused = managed.run("--host", "right", *words, check=False)
        assert (refused.status, "needs its whole path" in refused.err) == (2, True), words
    hosts.nodes["right"].run("peer", "restrict", "left", "--manage", "no")
    assert managed.run("--host", "right", "doctor", check=False).status == 5
    assert managed.run("tui", check=False, env={"SYSCTR_HOST": "right"}).status == 2
    managed.run("destroy", "own", "--yes")


def test_the_log_says_whose_it_was(hosts: Hosts, managed: Node) -> None:
    right = hosts.nodes["right"]
    managed.run("--host", "right", "set", "web", "tags=seen")
    managed.run("--host", "right", "exec", "web", "--", "true")
    assert "PATCH /1/containers/web/config by peer left: 200" in right.logs()
    wait_until(lambda: "/exec/ws by peer left: " in right.logs(), what="who ran a program")
    wait_until(lambda: "GET /1/peers/right/api by uid 0" in managed.logs(), what="who went there")
    right.run("set", "web", "tags=")
    assert "PATCH /1/containers/web/config by uid 0" in right.logs()


def test_who_manages_a_host_does_not_get_on_from_there_to_others(hosts: Hosts, managed: Node) -> None:
    left, right = hosts.nodes["left"], hosts.nodes["right"]
    left.run("peer", "restrict", "right", "--manage", "yes")
    try:
        # Right itself may.
        assert right.json("--host", "left", "list") == []
        with contextlib.closing(Client(left.layout, start=False, host="right")) as client:
            client.connect()
            client._ask("GET", "/1/peers/left/api", ["Upgrade: sysctr-api"], b"", None, None)
            assert client._head()[0] == 403
    finally:
        left.run("peer", "restrict", "right", "--manage", "no")


def test_programs_run_there_with_their_streams_and_their_end(hosts: Hosts, managed: Node) -> None:
    def inside(*argv: str, **options):
        return managed.run("--host", "right", "exec", *argv, check=False, **options)

    done = inside("web", "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.status, done.out, done.err) == (3, "out\n", "err\n")
    data = bytes(range(256)) * 4000
    assert inside("web", "--", "cat", stdin=data).stdout == data
    assert inside("-e", "WORD=two words", "web", "--", "sh", "-c", 'echo "$WORD"').out == "two words\n"
    assert inside("web", "--", "/no/such").status == 127
    assert inside("nobody", "--", "true").status == 3
    assert inside("--all", "--", "hostname").status == 0
    refused = managed.run("--host", "right", "pull", "web:/etc/hostname", "/dev/null", check=False)
    assert (refused.status, "is on right" in refused.err) == (5, True)


def test_events_are_followed_and_end_with_the_permission(hosts: Hosts, managed: Node) -> None:
    right = hosts.nodes["right"]
    follower = managed.popen("--host", "right", "events", "--json", stdout=subprocess.PIPE)
    assert follower.stdout is not None
    seen = []

    def told() -> bool:
        right.run("set", "web", "tags=a")
        right.run("set", "web", "tags=")
        seen.append(json.loads(follower.stdout.readline()))  # type: ignore[union-attr]
        return any(one.get("change") == "configured" for one in seen)

    wait_until(told, 30, "an event of the other host")
    right.run("peer", "restrict", "left", "--manage", "no")
    assert follower.wait(30) != 0
    assert managed.run("--host", "right", "list", check=False).status == 5


def test_a_peer_that_goes_away_is_said_and_leaves_nothing(hosts: Hosts, managed: Node) -> None:
    right = hosts.nodes["right"]

    def threads() -> int:
        return managed.api("GET", "/1/daemon")[1]["daemon"]["threads"]

    before = threads()
    right.run("daemon", "stop")
    lost = managed.run("--host", "right", "list", check=False)
    assert (lost.status, "right" in lost.err) == (1, True)
    right.run("list")
    assert [one["name"] for one in managed.json("--host", "right", "list")] == ["web"]
    wait_until(lambda: threads() <= before + 1, 30, "fewer threads")
