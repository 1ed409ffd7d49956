"""What a peer is let have at once, and how one that never ends is ended (security.md S16, S32)."""

import contextlib
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sysctr.errors import SysctrError
from sysctr.peer.channel import Channel, PeerLost
from sysctr.peer.frame import MESSAGE, pack
from tests.attack.peers.besieged import (
    MID,
    Victim,
    add_other,
    begun,
)
from tests.attack.peers.rogue import (
    CONFIG,
    WISHES,
    Rogue,
    in_thread,
    network_of,
    offer,
    refused,
    snapshot,
)
from tests.node import Node
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox")]


def test_a_container_on_its_way_is_on_its_way_once(victim: Victim, rogue: Rogue, second: Rogue) -> None:
    begun(rogue.connect())
    other = offer(config='schema = 1\nname = "other"\n', number=777)
    error = refused(second.connect(), "migrate.begin", id="00000000000000bb", offer=other)
    assert "on its way here already" in error.message
    second.hang_up()


def test_two_connections_work_on_one_migration(victim: Victim, rogue: Rogue) -> None:
    """However they come in turn, there is one reservation."""

    def work(number: int) -> None:
        for turn in range(12):
            config = f'schema = 1\nname = "gift-{number}-{turn}"\n'
            # Who comes later ends the connection of who came before.
            with contextlib.suppress(PeerLost, SysctrError), rogue.connect() as channel:
                wanted = offer(config=config, number=200 + number)
                channel.call("migrate.begin", 60, id=MID, offer=wanted)
                channel.call("migrate.abort" if turn % 2 else "migrate.prepare", 60, id=MID)

    threads = [in_thread(lambda n=n: work(n)) for n in range(8)]
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()


def test_a_peer_has_so_many_migrations_at_most(victim: Victim, rogue: Rogue) -> None:
    channel = rogue.connect()

    def begin(number: int) -> dict[str, Any]:
        uuid = f"4a0e3f2c-93f1-4d4e-9c0e-6f3c6d6b8a{number:02x}"
        made = offer(config=f'schema = 1\nname = "gift-{number}"\n', number=300 + number, uuid=uuid)
        return {"id": f"{number:016x}", "offer": made}

    for number in range(16):
        channel.call("migrate.begin", 60, **begin(number))
    assert "are not finished" in refused(channel, "migrate.begin", **begin(16)).message


@pytest.mark.parametrize("how", ["restrict", "pools", "remove", "resolve"])
def test_a_peer_that_sends_without_end_is_stopped(
    victim: Victim, rogue: Rogue, second: Rogue, how: str
) -> None:
    node = victim.node
    channel = second.connect()
    begun(channel)
    channel.call("migrate.sync", 60, id=MID, volume="101", mode="all", still=False)
    ours, theirs = socket.socketpair()
    ended = threading.Event()

    def endless() -> None:
        with contextlib.suppress(SysctrError):
            fd = ours.detach()
            channel.exchange(fd, fd, idle_s=60)
        ended.set()

    thread = in_thread(endless)
    try:
        wait_until(lambda: node.json("migrations")[0]["state"] == "moving")
        if how == "remove":
            refusal = node.run("peer", "remove", "second", check=False)
            assert refusal.status == 4, refusal
            node.run("peer", "remove", "second", "--force")
            assert [one["name"] for one in node.json("peer", "list")] == ["rogue"]
        elif how == "resolve":
            node.run("migrate", "--resolve", "gift", "--there", "--yes")
        else:
            change = ["--send", "no"] if how == "restrict" else ["--pool", "other"]
            if how == "pools":
                add_other(node)
            node.run("peer", "restrict", "second", *change)
            theirs.close()
            wait_until(ended.is_set)
            late = second.connect()
            sync = {"volume": "101", "mode": "all", "still": False}
            for op, more in (("begin", {"offer": offer()}), ("sync", sync)):
                assert "any more" in refused(late, f"migrate.{op}", id=MID, **more).message
            blockers = late.call("migrate.check", offer=offer())["blockers"]
            assert {one["what"] for one in blockers} & {"peer", "pool"}
            assert late.call("migrate.abort", id=MID) == {"answer": "aborted"}
            assert refused(late, "migrate.begin", id=MID, offer=offer()).code == "blocked"
        wait_until(ended.is_set)
    finally:
        theirs.close()
        thread.join()
        second.hang_up()
        if how != "remove":
            node.run("peer", "restrict", "second", "--send", "yes", "--pool", "all")
        else:
            second.join(node.run("peer", "token").out.strip())


def test_a_pool_that_is_only_in_the_configuration(victim: Victim, rogue: Rogue, second: Rogue) -> None:
    node = victim.node
    add_other(node)
    node.run("peer", "restrict", "second", "--pool", "default")
    elsewhere = CONFIG + '[mount.0]\ntarget = "/x"\npool = "{}"\n'
    channel = second.connect()
    try:
        for changes in (
            {"config": elsewhere.format("other")},
            {"config": elsewhere.format("x"), "wishes": {**WISHES, "pools": {"x": "other"}}},
            {"snapshots": [snapshot("one", config=elsewhere.format("other"))]},
        ):
            error = refused(channel, "migrate.begin", id=MID, offer=offer(**changes))
            assert "may not use pool other" in error.message
        nowhere = refused(channel, "migrate.begin", id=MID, offer=offer(config=elsewhere.format("none")))
        assert "there is no pool none" in nowhere.message or "may not use" in nowhere.message
    finally:
        second.hang_up()
        node.run("peer", "restrict", "second", "--pool", "all")


def test_floods(victim: Victim, rogue: Rogue, second: Rogue, hosts: tuple[Node, Node]) -> None:
    with network_of(rogue.node):
        address = ("192.0.2.1", 8645)
        half_open = [socket.create_connection(address) for _ in range(100)]
    began_s = time.monotonic()
    good = second.connect()
    assert good.call("peer.ping") == {}
    assert time.monotonic() - began_s < 5

    ping = pack(MESSAGE, b'{"op":"peer.ping"}')
    channels = [rogue.connect() for _ in range(20)]

    def flood(channel: Channel) -> None:
        with contextlib.suppress(SysctrError):
            for _ in range(100):
                channel._wire.write(ping * 100, 60)
                for _ in range(100):
                    channel.answer(60)

    threads = [in_thread(lambda c=c: flood(c)) for c in channels]
    while any(thread.is_alive() for thread in threads):
        began_s = time.monotonic()
        assert good.call("peer.ping", 10) == {}
        assert time.monotonic() - began_s < 5
    for one in half_open:
        one.close()
    second.hang_up()


TEMPLATE = {
    "name": "unsent", "version": "1", "description": "", "init": "/sbin/init", "stop_signal": "SIGTERM"
}  # fmt: skip


def test_a_template_that_never_comes_to_its_end(victim: Victim, rogue: Rogue, second: Rogue) -> None:
    channel = rogue.connect()
    assert channel.call("migrate.template", **TEMPLATE) == {"have": False}
    # The one that is never sent keeps no other from being.
    began_s = time.monotonic()
    assert second.connect().call("migrate.template", 30, **{**TEMPLATE, "name": "tiny"}) == {"have": True}
    assert time.monotonic() - began_s < 10
    second.hang_up()
    rogue.hang_up()
    wait_until(lambda: not list(Path(victim.node.layout.lib).rglob("*unsent*")), 30)
    assert [one["name"] for one in victim.node.json("template", "list")] == ["tiny"]


@pytest.mark.parametrize(
    "changes",
    [{"name": "../x"}, {"name": "x\n"}, {"name": ""}, {"init": "../x"}, {"init": "/x\n"},
     {"stop_signal": "NONE"}, {"description": "\x1b[2J"},
     {"version": "\x9b2J"}, {"version": 7}, {"digest": "x"}],
    ids=str,
)  # fmt: skip
def test_what_a_template_must_not_say(victim: Victim, rogue: Rogue, changes: dict[str, Any]) -> None:
    refused(rogue.connect(), "migrate.template", **{**TEMPLATE, **changes})


def test_a_daemon_ends_while_a_stream_does_not(victim: Victim, rogue: Rogue) -> None:
    node = victim.node
    channel = rogue.connect()
    begun(channel)
    channel.call("migrate.sync", 60, id=MID, volume="101", mode="all", still=False)
    ours, theirs = socket.socketpair()

    def endless() -> None:
        with contextlib.suppress(SysctrError):
            fd = ours.detach()
            channel.exchange(fd, fd, idle_s=60)

    thread = in_thread(endless)
    wait_until(lambda: node.json("migrations")[0]["state"] == "moving")
    began_s = time.monotonic()
    node.run("daemon", "restart")
    assert time.monotonic() - began_s < 20
    theirs.close()
    thread.join(30)
    assert not thread.is_alive()
    # What had come is kept until its source says what became of it.
    assert [one["phase"] for one in node.json("migrations")] == ["receiving"]
    assert begun(rogue.connect())["phase"] == "receiving"
    victim.slowest_s = 0.0
