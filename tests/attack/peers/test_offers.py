"""What a hostile peer offers and asks (security.md S8, S13, S16, S17, S31, S32): refused, and nothing stays.

The host answers others within a second meanwhile.
"""

import contextlib
import copy
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from sysctr.errors import SysctrError
from sysctr.peer.channel import Channel, PeerLost
from sysctr.peer.frame import MESSAGE, pack
from tests.attack.hostile import MIB, forget_peak, peak, resident
from tests.attack.peers.besieged import (
    CARD,
    MID,
    Victim,
    begun,
    said,
    stranger,
)
from tests.attack.peers.rogue import (
    CONFIG,
    UUID,
    WISHES,
    Rogue,
    asked,
    offer,
    refused,
    snapshot,
    volume,
)
from tests.node import Node

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox")]


# What it offers

HARMFUL: dict[str, dict[str, Any]] = {
    "a volume's name goes up": {"volumes": [volume("../101")]},
    "a volume's name is absolute": {"volumes": [volume("/etc")]},
    "a volume's name has a line more": {"volumes": [volume("101\n")]},
    "a volume's name is an option": {"volumes": [volume("--help")]},
    "a volume of another number": {"volumes": [volume(), volume("102-disk0", root=False)]},
    "a volume goes up after the number": {"volumes": [volume(), volume("101-../x", root=False)]},
    "no root": {"volumes": [volume(root=False)]},
    "two roots": {"volumes": [volume(), volume("101-a")]},
    "no volume": {"volumes": []},
    "a volume twice": {"volumes": [volume(), volume(root=False)]},
    "10^4 volumes": {"volumes": [volume(), *[volume(f"101-{n}", root=False) for n in range(10_000)]]},
    "a pool goes up": {"volumes": [volume(pool="../../etc")]},
    "a pool with a line more": {"volumes": [volume(pool="default\n")]},
    "a pool by a map": {"wishes": {**WISHES, "pools": {"default": "../default"}}},
    "a negative size": {"volumes": [volume(size_bytes=-1)]},
    "a size beyond all": {"volumes": [volume(size_bytes=1 << 62)]},
    "a snapshot goes up": {"snapshots": [snapshot("../x")]},
    "a snapshot that is ours": {"snapshots": [snapshot("tmp-00000000")]},
    "a snapshot with a line more": {"snapshots": [snapshot("x\n")]},
    "a snapshot twice": {"snapshots": [snapshot("x"), snapshot("x")]},
    "a snapshot of nothing": {"snapshots": [snapshot("x", parents={})]},
    "a snapshot of another volume": {"snapshots": [snapshot("x", parents={"101": "", "102": ""})]},
    "a snapshot before itself": {"snapshots": [snapshot("x", parents={"101": "x"})]},
    "a snapshot's text with an escape": {"snapshots": [snapshot("x", description="\x1b[2J")]},
    "10^4 snapshots": {"snapshots": [snapshot(f"s{number}") for number in range(10_000)]},
    "a template goes up": {"template": "../../etc"},
    "a template with a line more": {"template": "tiny\n"},
    "a number below": {"number": 0},
    "a number beyond": {"number": 10_000},
    "a number far beyond": {"number": 1 << 40},
    "a number that is true": {"number": True},
    "a wished number beyond": {"wishes": {**WISHES, "number": 10_000}},
    "a wished name goes up": {"wishes": {**WISHES, "name": "../x"}},
    "a wished name with a line more": {"wishes": {**WISHES, "name": "x\n"}},
    "a name goes up": {"config": 'schema = 1\nname = "../x"\n'},
    "a name with a line more": {"config": 'schema = 1\nname = "x\\n"\n'},
    "a configuration of nothing": {"config": ""},
    "a configuration that is huge": {"config": CONFIG + "#" * (300 << 10)},
    "a configuration with unknown keys": {"config": CONFIG + 'hook = "/bin/sh"\n'},
    "raw settings": {"config": CONFIG + '[raw]\nlxc = "lxc.hook.start = /bin/sh"\n'},
    "a variable with a line more": {"config": CONFIG + '[environment]\n"A\\nB" = "x"\n'},
    "an interface with a slash": {"config": CONFIG + '[net.0]\nname = "../x"\n'},
    "another uuid": {"uuid": "x" * 36},
    "a uuid with a line more": {"uuid": f"{UUID}\n"},
    "a time that is none": {"created": 1e300},
    "a guest with an escape": {"guest": {**offer()["guest"], "os_id": "\x1b[2J"}},
    "a guest with a signal that is none": {"guest": {**offer()["guest"], "stop_signal": "SIGNONE"}},
    "a guest with an init that goes up": {"guest": {**offer()["guest"], "init": "/../sbin/init"}},
    "another architecture": {"arch": "\u202egnp.46_68x"},
    "a bridge goes up": {"wishes": {**WISHES, "bridges": {"": "../x"}}, "config": CARD},
    "leaving something else out": {"wishes": {**WISHES, "leave_out": ["everything"]}},
    "leaving out no text": {"wishes": {**WISHES, "leave_out": [["bind"]]}},
}  # fmt: skip


@pytest.mark.parametrize("name", HARMFUL)
def test_what_is_offered_is_refused(victim: Victim, rogue: Rogue, name: str) -> None:
    channel = rogue.connect()
    if name.startswith("another arch") or "template" in HARMFUL[name]:
        with contextlib.suppress(SysctrError):
            begun(channel, **HARMFUL[name])
            assert channel.call("migrate.abort", id=MID)["answer"] == "aborted"
    else:
        refused(channel, "migrate.begin", id=MID, offer=offer(**HARMFUL[name]))
    # What is only asked for may be answered with what is in the way.
    with contextlib.suppress(SysctrError):
        blockers = channel.call("migrate.check", offer=offer(**HARMFUL[name]))["blockers"]
        assert blockers or "template" in HARMFUL[name]
    assert channel.call("peer.ping") == {}


RICH = offer(
    volumes=[volume(), volume("101-disk0", root=False)],
    snapshots=[snapshot("one", config=CONFIG), snapshot("two", parents={"101": "one"})],
    addresses={"0": "10.0.0.5"}, firewall="x", config=CARD,
)  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Return where there is something in a value, as a way to it."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below_ in items:
        found += places(below_, (*path, key))
    return found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=40) | st.sampled_from(["../x", "a\nb", "\x1b[2J", "\x00", "-x", "tmp-00000000"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@hypothesis.given(place=st.sampled_from(places(RICH)), value=JSON, removes=st.booleans())
def test_every_field_of_an_offer_may_be_anything(
    victim: Victim, rogue: Rogue, place: tuple, value: Any, removes: bool
) -> None:
    changed = copy.deepcopy(RICH)
    where = changed
    for key in place[:-1]:
        where = where[key]
    if removes:
        del where[place[-1]]
    else:
        where[place[-1]] = value
    channel = _standing(rogue)
    asked(channel, "migrate.check", offer=changed)


def _standing(rogue: Rogue) -> Channel:
    """Return a connection that was made before."""
    if not rogue._open:
        rogue.connect()
    return rogue._open[0]


OPS = [
    f"migrate.{name}" for name in ("check", "begin", "sync", "stream", "turn", "keep", "prepare", "commit",
                                   "abort", "forget", "outcome")
]  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@hypothesis.given(
    op=st.sampled_from([*OPS, "peer.rotate", "peer.nothing", "peer.join", "\x1b[2J", 7]),
    fields=st.dictionaries(
        st.sampled_from(["id", "offer", "volume", "mode", "still", "snapshot", "start", "certificate", "x"]),
        JSON | st.just(MID), max_size=4,
    ),
)  # fmt: skip
def test_every_question_may_be_anything(victim: Victim, rogue: Rogue, op: Any, fields: dict) -> None:
    channel = _standing(rogue)
    asked(channel, op, **fields)


def test_who_says_too_much_is_hung_up_on(victim: Victim, rogue: Rogue, hosts: tuple[Node, Node]) -> None:
    many = [snapshot(f"s{number}") for number in range(100_000)]
    with pytest.raises(PeerLost):
        rogue.connect().call("migrate.check", 60, offer=offer(snapshots=many))
    forget_peak(hosts[0].pids()["daemon"])
    before = resident(hosts[0].pids()["daemon"])
    lists, text = b'{"op":' + b"[[]," * (2 << 20) + b"0", b'{"op":"' + b"x" * (8 << 20) + b'"}'
    for body in (b"[" * (8 << 20), lists, text):
        # Before it has said who it is.
        for channel in (rogue.dial(), stranger(rogue)):
            with pytest.raises(PeerLost):
                said(channel, pack(MESSAGE, body))
    assert peak(hosts[0].pids()["daemon"]) - before < 32 * MIB


def test_a_greeting_ends_in_no_terminal(victim: Victim, rogue: Rogue, hosts: tuple[Node, Node]) -> None:
    for words in (
        {"version": "\x1b[2J"}, {"kernel": "6.1\n2026-11-27 ERROR lies"}, {"arch": "\x9b2J"},
        {"rsync": "\u202e"}, {"name": 7}, {"protocol": 2}, {"protocol": -1}, {"op": "bye"},
    ):  # fmt: skip
        with pytest.raises(SysctrError):
            rogue.connect(**words).call("peer.ping")
    for op in ("\x1b[2J", "x\n2026-11-27 10:00:00,000 ERROR lies", "\x9b2J"):
        refused(rogue.connect(), op)
    assert "\n2026-11-27 10:00:00,000 ERROR lies" not in hosts[0].logs()


# What it says in which order


def test_messages_come_in_any_order(victim: Victim, rogue: Rogue, second: Rogue) -> None:
    channel = rogue.connect()
    for op, fields in (
        ("sync", {"volume": "101", "mode": "all", "still": False}),
        ("turn", {"volume": "101", "snapshot": "x"}), ("keep", {"snapshot": "x"}),
        ("stream", {"volume": "101", "snapshot": "x"}),
    ):  # fmt: skip
        refused(channel, f"migrate.{op}", id=MID, **fields)
    assert channel.call("migrate.prepare", id=MID) == {"answer": "unknown"}
    assert channel.call("migrate.commit", id=MID, start=True) == {"answer": "unknown"}
    assert channel.call("migrate.abort", id=MID) == {"answer": "aborted"}
    assert channel.call("migrate.forget", id=MID) == {"answer": "forgotten"}

    begun(channel, snapshots=[snapshot("one")])
    refused(channel, "migrate.sync", id=MID, volume="102", mode="all", still=False)
    refused(channel, "migrate.sync", id=MID, volume="../101", mode="all", still=False)
    refused(channel, "migrate.sync", id=MID, volume="101", mode="--rsh=sh", still=False)
    refused(channel, "migrate.stream", id=MID, volume="101", snapshot="one")
    refused(channel, "migrate.stream", id=MID, volume="101", snapshot="tmp-00000000")
    refused(channel, "migrate.turn", id=MID, volume="101", snapshot="one")
    refused(channel, "migrate.turn", id=MID, volume="101", snapshot="../../x")
    refused(channel, "migrate.keep", id=MID, snapshot="one")
    refused(channel, "migrate.keep", id=MID, snapshot="two")
    for op in ("prepare", "forget"):
        assert channel.call(f"migrate.{op}", id=MID) == {"answer": "receiving"}
    assert channel.call("migrate.commit", id=MID, start=True) == {"answer": "receiving"}

    assert "not finished" in refused(channel, "peer.remove").message
    # Somebody else's migration, whose id was guessed.
    other = second.connect()
    assert other.call("migrate.abort", id=MID) == {"answer": "aborted"}
    assert other.call("migrate.commit", id=MID, start=True) == {"answer": "unknown"}
    refused(other, "migrate.begin", id=MID, offer=offer())
    refused(other, "migrate.sync", id=MID, volume="101", mode="all", still=False)
    second.hang_up()
    # It did not even break the connection.
    assert begun(channel)["phase"] == "receiving"


def test_a_migration_that_this_host_is_the_source_of_is_not_the_peers(
    victim: Victim, rogue: Rogue, hosts: tuple[Node, Node]
) -> None:
    asked_for: list[str] = []

    def check(message: dict, _channel: Channel) -> dict:
        placed = [{"source": "100", "pool": "default", "method": "rsync", "expected_bytes": 0}]
        return {"id": None, "name": "x", "pool": "default", "template": "tiny", "volumes": placed,
                "addresses": {}, "blockers": [], "warnings": []}  # fmt: skip

    def begin(message: dict, _channel: Channel) -> dict:
        asked_for.append(message["id"])
        back = rogue.connect()
        assert asked(back, "migrate.begin", id=message["id"], offer=offer()) is None
        assert asked(back, "migrate.sync", id=message["id"], volume="100", mode="all", still=False) is None
        for op in ("abort", "commit", "forget", "prepare"):
            asked(back, f"migrate.{op}", id=message["id"], **({"start": True} if op == "commit" else {}))
        assert back.call("migrate.outcome", id=message["id"])["outcome"] == "pending"
        words = "cannot take it: \x1b[2J\x9b31mno"
        return {"error": {"code": "refused", "message": words, "hint": "\x1b[1m"}}

    rogue.answers |= {"migrate.check": check, "migrate.begin": begin, "migrate.abort": {"answer": "aborted"}}
    done = hosts[0].run("migrate", "neighbour", "rogue", "--restart", check=False)
    assert asked_for
    assert done.status == 5, done
    assert "\x1b" not in done.out + done.err
    assert "\x9b" not in done.out + done.err
