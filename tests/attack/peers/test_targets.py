"""A host that is asked to take a container, and that answers anything (security.md S17, S26, S32)."""

import socket
import subprocess
from typing import Any

import pytest

from sysctr.peer.channel import Channel
from tests.attack.peers.besieged import Victim
from tests.attack.peers.rogue import Rogue
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox")]


# A host that is asked to take a container


def verdict(**changes: Any) -> dict[str, Any]:
    placed = [{"source": "100", "pool": "default", "method": "rsync", "expected_bytes": 0}]
    return {
        "id": None, "name": "x", "pool": "default", "template": "tiny", "volumes": placed, "addresses": {},
        "blockers": [], "warnings": [], **changes,
    }  # fmt: skip


VERDICTS: dict[str, Any] = {
    "nothing": {},
    "a list where a text is": verdict(name=["x"]),
    "no volumes": verdict(volumes=[]),
    "another volume": verdict(volumes=[{**verdict()["volumes"][0], "source": "../x"}]),
    "a stream that there is none of": verdict(volumes=[{**verdict()["volumes"][0], "method": "stream"}]),
    "another method": verdict(volumes=[{**verdict()["volumes"][0], "method": "--rsh"}]),
    "blockers that are none": verdict(blockers=["x"]),
    "blockers with an escape": verdict(
        blockers=[{"what": "\x1b[2J", "text": "\x9b2J\n\rx", "hint": "\x1b]0;x"}], warnings=["\x1b[2J\r"]
    ),
    "warnings without end": verdict(
        warnings=["x" * 4000] * 3000, blockers=[{"what": "x", "text": "x", "hint": ""}]
    ),
    "a number beyond": verdict(id=1 << 80),
    "addresses that are none": verdict(addresses=[1]),
    "an error that is none": {"error": 7},
    "an error with an escape": {"error": {"code": "\x1b[2J", "message": "a\x1b[2J\rb\x9b", "hint": ["x"]}},
}  # fmt: skip


@pytest.mark.parametrize("name", VERDICTS)
def test_a_target_that_answers_anything(victim: Victim, rogue: Rogue, name: str) -> None:
    rogue.answers |= {"migrate.check": VERDICTS[name], "migrate.abort": {"answer": "aborted"}}
    for more in (["--dry-run"], []):
        done = victim.node.run("migrate", "neighbour", "rogue", "--restart", *more, check=False)
        assert done.status != 0 or more, done
        assert "internal error" not in done.err, done
        assert not {"\x1b", "\x9b", "\r"} & {*(done.out + done.err)}


LATER: dict[str, dict[str, Any]] = {
    "no phase": {"begin": {}},
    "another phase": {"begin": {"phase": "ready", "kept": []}},
    "kept without end": {"begin": {"phase": "receiving", "kept": ["x"] * 100_000}},
    "a phase of another type": {"begin": {"phase": 7, "kept": []}},
    "prepared at once": {"begin": {"phase": "prepared", "kept": []}, "prepare": {"answer": 7}},
    "committed at once": {"begin": {"phase": "committed", "kept": []}, "prepare": {"answer": "committed"}},
    "no answer to sync": {"begin": {"phase": "receiving", "kept": []}, "sync": {"error": 1}},
}  # fmt: skip


@pytest.mark.parametrize("name", LATER)
def test_a_target_that_answers_anything_later(victim: Victim, rogue: Rogue, name: str) -> None:
    rogue.answers |= {"migrate.check": verdict(), "migrate.abort": {"answer": "aborted"}}
    rogue.answers |= {f"migrate.{op}": said_ for op, said_ in LATER[name].items()}
    node = victim.node
    node.run("create", "goes", "--template", "tiny")
    number = str(node.json("info", "goes")["id"])
    placed = [{"source": number, "pool": "default", "method": "rsync", "expected_bytes": 0}]
    rogue.answers["migrate.check"] = verdict(volumes=placed)
    try:
        done = node.run("migrate", "goes", "rogue", check=False)
        assert done.status != 0, done
        assert "internal error" not in done.err, done
        assert node.state("goes") == "stopped"
        wait_until(lambda: not node.json("migrations"))
    finally:
        node.run("destroy", "goes", "--yes")


def test_a_target_that_says_it_has_what_it_has_not(victim: Victim, rogue: Rogue) -> None:
    """It is trusted in that: the container is gone, as its copy would be on a host that was lost then."""
    node = victim.node
    node.run("create", "goes", "--template", "tiny")
    number = str(node.json("info", "goes")["id"])
    placed = [{"source": number, "pool": "default", "method": "rsync", "expected_bytes": 0}]
    rogue.answers |= {
        "migrate.check": verdict(volumes=placed), "migrate.begin": {"phase": "prepared", "kept": []},
        "migrate.prepare": {"answer": "prepared"}, "migrate.forget": {"answer": "forgotten"},
        # Of what it says with it nothing is believed.
        "migrate.commit": {"answer": "created", "id": -1, "notes": {"x": 1}},
    }  # fmt: skip
    done = node.run("migrate", "goes", "rogue", check=False)
    assert done.status != 0
    assert "internal error" not in done.err, done
    # It is nobody's for now, and nobody starts it.
    assert node.run("start", "goes", check=False).status == 4
    rogue.answers["migrate.commit"] = {"answer": "created"}
    wait_until(lambda: not node.json("migrations"), 30)
    assert node.run("info", "goes", check=False).status == 3


def test_a_holder_of_a_replica_that_answers_anything(victim: Victim, rogue: Rogue, second: Rogue) -> None:
    node = victim.node
    node.run("create", "goes", "--template", "tiny")
    number = str(node.json("info", "goes")["id"])
    placed = [{"source": number, "pool": "default", "method": "rsync", "expected_bytes": 0}]
    rogue.answers |= {
        "migrate.check": verdict(volumes=placed), "replica.begin": {"error": {"message": "cannot: no"}},
        "replica.status": {"known": True, "promoted": False, "generation": 0}, "replica.drop": {},
    }  # fmt: skip
    try:
        assert node.run("replicate", "goes", "rogue", check=False).status != 0
        mid = next(one["id"] for one in node.json("replicate", "--list") if one["name"] == "goes")
        assert rogue.connect().call("replica.source", id=mid) == {"known": True}
        # Of others' replicas nobody is told.
        assert second.connect().call("replica.source", id=mid) == {"known": False}
        second.hang_up()
        for said_ in ({}, {"promoted": "no"}, {"known": 1, "promoted": [], "generation": -1}, {"error": 7}):
            rogue.answers["replica.status"] = said_
            done = node.run("start", "goes", check=False)
            assert done.status != 0, done
            assert "internal error" not in done.err, done
        rogue.answers["replica.status"] = {"known": True, "promoted": False, "generation": 0}
        node.run("start", "goes")
    finally:
        node.run("replicate", "goes", "--stop", "--force", check=False)
        node.run("destroy", "goes", "--force", "--yes")


@pytest.mark.parametrize("how", ["cancel", "destroy", "restart"])
def test_an_exchange_that_never_ends_is_ended(victim: Victim, rogue: Rogue, how: str) -> None:
    """How long a target takes is its own business; who waits for it can stop at any time."""
    node = victim.node
    node.run("create", "goes", "--template", "tiny", "--start")
    number = str(node.json("info", "goes")["id"])
    placed = [{"source": number, "pool": "default", "method": "rsync", "expected_bytes": 0}]
    ends: list[socket.socket] = []

    def never(_message: dict, channel: Channel) -> None:
        channel.send({"ok": {}})
        ours, theirs = socket.socketpair()
        ends.append(theirs)
        fd = ours.detach()
        channel.exchange(fd, fd, idle_s=60)

    rogue.answers |= {
        "migrate.check": verdict(volumes=placed), "migrate.begin": {"phase": "receiving", "kept": []},
        "migrate.sync": never, "migrate.abort": {"answer": "aborted"},
    }  # fmt: skip
    try:
        waiting = node.popen("migrate", "goes", "rogue", "--restart", stderr=subprocess.DEVNULL)
        wait_until(lambda: ends, 30, "a stream")
        [task] = [one for one in node.json("task", "list") if one["kind"] == "migrate" and not one["ended"]]
        if how == "cancel":
            node.run("task", "cancel", task["id"])
        elif how == "destroy":
            node.run("destroy", "goes", "--force", "--yes")
            node.run("create", "goes", "--template", "tiny", "--id", number)
        else:
            # It lets tasks go on for a while.
            node.run("daemon", "restart", timeout_s=60)
            victim.slowest_s = 0.0
        assert waiting.wait(30) != 0
        wait_until(lambda: not node.json("migrations"), 30)
        # A new container of the same number is none that has to run again.
        assert node.state("goes") == ("stopped" if how == "destroy" else "running")
    finally:
        for one in ends:
            one.close()
        node.run("destroy", "goes", "--force", "--yes")
