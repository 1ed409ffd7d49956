"""A hostile peer (security.md S8, S10, S12, S13, S16, S17, S30-S33): trusted, with a key, and it means harm.

Whatever it says, the host goes on answering others within a second, and once the peer is gone and says that
it has aborted, nothing of what it began is left.
"""

import contextlib
import copy
import os
import select
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sysctr.errors import SysctrError
from sysctr.peer.channel import Channel, PeerLost
from sysctr.peer.dial import dial
from sysctr.peer.frame import MESSAGE, pack
from tests import node as nodes
from tests.attack.hostile import MIB, below, forget_peak, listing, peak, resident
from tests.attack.rogue import (
    CONFIG,
    UUID,
    WISHES,
    Rogue,
    asked,
    in_thread,
    network_of,
    offer,
    refused,
    snapshot,
    volume,
)
from tests.node import Node, TemplateStore
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox")]

CARD = CONFIG + '[net.0]\nname = "eth0"\n'
MID = "00000000000000aa"
# What rsync's sender is called with for a whole tree; see sysctr.engine.tree_sync.
SENDER = ("rsync", "--server", "--sender", "-lHogDtpAXrxSe.LsfxCIvu", "--numeric-ids", ".")


class Victim:
    """A host with a container of its own, and how fast it answers."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.slowest_s = 0.0
        self._ended = threading.Event()
        self._before = self.picture()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            began_s = time.monotonic()
            with contextlib.suppress(OSError):
                self.node.api("GET", "/1/containers")
            self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def picture(self) -> dict[str, object]:
        where = self.node.layout
        supervisor = self.node.pids()["supervisor"]
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        _, migrations = self.node.api("GET", "/1/migrations")
        return {
            "containers": [one["id"] for one in self.node.api("GET", "/1/containers")[1]["containers"]],
            "reserved": listing(f"{where.containers}/.reserved"),
            "state": listing(where.containers, where.container_configs, where.migrations),
            "volumes": listing(f"{where.pool}/volumes"),
            "uppers": listing(f"{where.pool}/uppers"),
            "mounts": below(where.root, f"/proc/{self.node.pids()['daemon']}/mountinfo", 4),
            "jobs": sorted(children),
            "migrations": migrations["migrations"],
            "tasks": [one for one in self.node.json("task", "list") if not one["ended"]],
        }  # fmt: skip

    def unharmed(self, deadline_s: float = 30) -> None:
        """Assert that nothing is here that was not before, soon."""
        def as_before() -> bool:
            # What goes away may do so in the middle of it.
            with contextlib.suppress(OSError):
                return self.picture() == self._before
            return False

        try:
            wait_until(as_before, deadline_s)
        except AssertionError:
            assert self.picture() == self._before
        logs = self.node.logs()
        assert "Traceback" not in logs, logs
        assert "\x1b" not in logs
        assert "\x9b" not in logs


@pytest.fixture(scope="module")
def hosts(templates: TemplateStore) -> Iterator[tuple[Node, Node]]:
    with nodes.two_nodes() as (left, right):
        templates.give(left, "tiny")
        yield left, right


@pytest.fixture(scope="module")
def rogue(hosts: tuple[Node, Node], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rogue]:
    one = Rogue(hosts[1], tmp_path_factory.mktemp("rogue"))
    one.join(hosts[0].run("peer", "token").out.strip())
    yield one
    one.close()


@pytest.fixture(scope="module")
def second(hosts: tuple[Node, Node], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rogue]:
    """Another peer, whose migrations are none of the first one's business."""
    one = Rogue(hosts[1], tmp_path_factory.mktemp("second"), "second", 8701)
    one.join(hosts[0].run("peer", "token").out.strip())
    yield one
    one.close()


@pytest.fixture(scope="module")
def neighbour(hosts: tuple[Node, Node]) -> dict:
    """A container of somebody else on the host that is attacked."""
    hosts[0].run("create", "neighbour", "--template", "tiny", "--start")
    return hosts[0].json("info", "neighbour")


@pytest.fixture
def victim(
    hosts: tuple[Node, Node], rogue: Rogue, neighbour: dict, request: pytest.FixtureRequest
) -> Iterator[Victim]:
    rogue.answers = {"migrate.outcome": {"outcome": "pending", "start": False}}
    one = Victim(hosts[0])
    yield one
    one.close()
    rogue.hang_up()
    rogue.answers = {"migrate.outcome": {"outcome": "aborted", "start": False}}
    one.unharmed()
    assert hosts[0].json("info", "neighbour")["pid"] == neighbour["pid"]
    assert one.slowest_s < 1.0, f"the daemon took {one.slowest_s:.2f} s to answer"


def begun(channel: Channel, mid: str = MID, **changes: Any) -> dict[str, Any]:
    return channel.call("migrate.begin", 60, id=mid, offer=offer(**changes))


def stranger(rogue: Rogue) -> Channel:
    """Connect without a certificate."""
    with network_of(rogue.node):
        channel = dial(rogue.addresses, rogue.trusted, None)
    rogue._open.append(channel)
    return channel


def said(channel: Channel, data: bytes) -> None:
    """Send bytes, and wait for the end of the connection."""
    channel._wire.write(data, 60)
    while True:
        channel.receive(60)


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
@given(place=st.sampled_from(places(RICH)), value=JSON, removes=st.booleans())
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
@given(
    op=st.sampled_from([*OPS, "peer.rotate", "peer.nothing", "peer.join", "\x1b[2J", 7]),
    fields=st.dictionaries(
        st.sampled_from(["id", "offer", "volume", "mode", "snapshot", "start", "certificate", "x"]),
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
        ("sync", {"volume": "101", "mode": "all"}), ("turn", {"volume": "101", "snapshot": "x"}),
        ("keep", {"snapshot": "x"}), ("stream", {"volume": "101", "snapshot": "x"}),
    ):  # fmt: skip
        refused(channel, f"migrate.{op}", id=MID, **fields)
    assert channel.call("migrate.prepare", id=MID) == {"answer": "unknown"}
    assert channel.call("migrate.commit", id=MID, start=True) == {"answer": "unknown"}
    assert channel.call("migrate.abort", id=MID) == {"answer": "aborted"}
    assert channel.call("migrate.forget", id=MID) == {"answer": "forgotten"}

    begun(channel, snapshots=[snapshot("one")])
    refused(channel, "migrate.sync", id=MID, volume="102", mode="all")
    refused(channel, "migrate.sync", id=MID, volume="../101", mode="all")
    refused(channel, "migrate.sync", id=MID, volume="101", mode="--rsh=sh")
    refused(channel, "migrate.stream", id=MID, volume="101", snapshot="one")
    refused(channel, "migrate.stream", id=MID, volume="101", snapshot="tmp-00000000")
    refused(channel, "migrate.turn", id=MID, volume="101", snapshot="one")
    refused(channel, "migrate.turn", id=MID, volume="101", snapshot="../../x")
    refused(channel, "migrate.keep", id=MID, snapshot="one")
    refused(channel, "migrate.keep", id=MID, snapshot="two")
    for op in ("prepare", "forget"):
        assert channel.call(f"migrate.{op}", id=MID) == {"answer": "receiving"}
    assert channel.call("migrate.commit", id=MID, start=True) == {"answer": "receiving"}

    # Somebody else's migration, whose id was guessed.
    other = second.connect()
    assert other.call("migrate.abort", id=MID) == {"answer": "aborted"}
    assert other.call("migrate.commit", id=MID, start=True) == {"answer": "unknown"}
    refused(other, "migrate.begin", id=MID, offer=offer())
    refused(other, "migrate.sync", id=MID, volume="101", mode="all")
    second.hang_up()
    # It did not even break the connection.
    assert begun(channel)["phase"] == "receiving"


def test_a_migration_that_this_host_is_the_source_of_is_not_the_peers(
    victim: Victim, rogue: Rogue, hosts: tuple[Node, Node]
) -> None:
    asked_for: list[str] = []

    def check(message: dict, _channel: Channel) -> dict:
        placed = [{"source": "100", "pool": "default", "method": "rsync", "expected_bytes": 0}]
        return {"id": None, "name": "x", "pool": "default", "template": "", "volumes": placed,
                "addresses": {}, "blockers": [], "warnings": []}  # fmt: skip

    def begin(message: dict, _channel: Channel) -> dict:
        asked_for.append(message["id"])
        back = rogue.connect()
        assert asked(back, "migrate.begin", id=message["id"], offer=offer()) is None
        assert asked(back, "migrate.sync", id=message["id"], volume="100", mode="all") is None
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


# What it sends

def add_other(node: Node) -> None:
    """Make a second pool, unless there is one."""
    node.run(
        "pool", "add", "other", "--driver", "overlay", "--path", f"{node.root}/other", check=False
    )


class Sender:
    """A tree of the other host and the rsync that sends it."""

    def __init__(self, directory: Path) -> None:
        self.tree = directory / "tree"
        self.tree.mkdir()

    def command(self, *options: str) -> list[str]:
        return [*SENDER, *options, ".", f"{self.tree}/"]


def send(channel: Channel, argv: list[str], mode: str = "all", name: str = "101") -> None:
    """Let a program talk to the rsync of the host that is attacked."""
    channel.call("migrate.sync", 60, id=MID, volume=name, mode=mode)
    ours, theirs = socket.socketpair()
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL) as program:
        theirs.close()
        fd = ours.detach()
        try:
            channel.exchange(fd, fd, idle_s=60)
            channel.answer(60)
        finally:
            program.kill()


@pytest.fixture
def tree(hosts: tuple[Node, Node], tmp_path: Path) -> Sender:
    """The root of a container that could run."""
    layer = hosts[0].json("template", "show", "tiny")["layer"]
    sender = Sender(tmp_path)
    rootfs = f"{hosts[0].layout.pool}/layers/{layer}/rootfs"
    subprocess.run(["cp", "-a", f"{rootfs}/.", str(sender.tree)], check=True)
    return sender


def taken(channel: Channel, tree: Sender, *, start: bool = False, **changes: Any) -> None:
    """Hand a container over as a host does that means no harm."""
    begun(channel, **changes)
    for one in changes.get("snapshots", ()):
        send(channel, tree.command())
        channel.call("migrate.keep", 60, id=MID, snapshot=one["name"])
    send(channel, tree.command())
    assert channel.call("migrate.prepare", 60, id=MID) == {"answer": "prepared"}
    answer = channel.call("migrate.commit", 60, id=MID, start=start)
    assert (answer["answer"], answer["error"]) == ("created", ""), answer
    assert channel.call("migrate.forget", 60, id=MID) == {"answer": "forgotten"}


@pytest.fixture
def given(victim: Victim) -> Iterator[str]:
    """The name of what is handed over, which is destroyed afterwards."""
    yield "gift"
    victim.node.run("destroy", "gift", "--force", "--yes", check=False)


EVIL = CONFIG + """
[net.0]
name = "eth0"
mac = "{mac}"
ip = "{ip}/24"
[mount.0]
target = "/of-the-host"
source = "/etc"
[mount.1]
target = "/shared"
volume = "media"
[device.0]
path = "/dev/sda"
"""


@pytest.mark.parametrize("where", ["now", "in a snapshot"])
def test_a_container_has_nothing_of_the_host(
    victim: Victim, rogue: Rogue, neighbour: dict, tree: Sender, given: str, where: str
) -> None:
    card = victim.node.api("GET", "/1/containers/neighbour/config")[1]["config"]["net"]["0"]
    [ip] = victim.node.json("info", "neighbour")["addresses"]
    evil = EVIL.format(mac=card["mac"], ip=ip)
    channel = rogue.connect()
    blocked = refused(channel, "migrate.begin", id=MID, offer=offer(config=evil))
    assert blocked.code == "blocked"
    for word in ("bind", "device"):
        assert word in blocked.message
    wishes = {**WISHES, "leave_out": ["bind", "device"]}
    if where == "now":
        taken(channel, tree, config=evil, wishes=wishes)
    else:
        taken(channel, tree, config=CONFIG, snapshots=[snapshot("one", config=evil)])
        victim.node.run("rollback", given, "one", "--yes")
    text = victim.node.api("GET", f"/1/containers/{given}/config")[1]["toml"]
    for word in ("/dev/sda", "source", "media", card["mac"], f"{ip}/"):
        assert word not in text, text
    victim.node.run("start", given)
    assert victim.node.json("info", given)["addresses"] != [ip]
    assert "/of-the-host" not in victim.node.run("exec", given, "--", "cat", "/proc/mounts").out
    assert victim.node.json("info", "neighbour")["addresses"] == [ip]


def test_odd_facts_harm_nobody(victim: Victim, rogue: Rogue, tree: Sender, given: str) -> None:
    odd = {"init": "", "init_kind": "x", "stop_signal": "", "arch": "x", "os_id": "\u202e"}
    far = 1e12
    one = snapshot("one", created=far, expires=far, description="\u202e\x9b2J")
    facts = {"created": far, "guest": odd, "generation": 1 << 53, "firewall": "\x1b[2J"}
    taken(rogue.connect(), tree, snapshots=[one], **facts)
    node = victim.node
    for command in (["list"], ["info", given], ["snapshots", given], ["df"], ["config", given], ["doctor"]):
        done = node.run(*command, check=False)
        assert "internal error" not in done.err, done
        assert "Traceback" not in done.err, done
        assert not {"\x1b", "\x9b", "\u202e"} & {*(done.out + done.err)}, done
    node.run("start", given, check=False)
    if node.state(given) == "running":
        node.run("stop", given)
    node.run("snapshot", given, "--name", "two", check=False)
    node.run("rollback", given, "one", "--yes")


def test_what_others_have_by_now_is_not_taken_at_the_end(
    victim: Victim, rogue: Rogue, tree: Sender, given: str
) -> None:
    mac, uuid = "02:00:00:00:00:77", UUID
    channel = rogue.connect()
    begun(channel, config=CARD + f'mac = "{mac}"\n')
    send(channel, tree.command())
    assert channel.call("migrate.prepare", 60, id=MID) == {"answer": "prepared"}
    # It waits, and a container comes whose address it knows.
    victim.node.run("create", "late", "--template", "tiny", "--net", f"eth0,mac={mac}")
    try:
        channel.call("migrate.commit", 60, id=MID, start=False)
        channel.call("migrate.forget", 60, id=MID)
        config = victim.node.api("GET", f"/1/containers/{given}/config")[1]["config"]
        assert config["net"]["0"]["mac"] not in ("", mac)
        # The very same container once more.
        again = refused(channel, "migrate.begin", id="00000000000000bb", offer=offer(uuid=uuid))
        assert again.code == "blocked"
    finally:
        victim.node.run("destroy", "late", "--yes")


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
    channel.call("migrate.sync", 60, id=MID, volume="101", mode="all")
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
            for op, more in (("begin", {"offer": offer()}), ("sync", {"volume": "101", "mode": "all"})):
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


def forged(argv: list[str], changes: dict[bytes, bytes], out: socket.socket) -> None:
    """Pass on what a program and the other side say, with other names of the same length."""
    near, far = socket.socketpair()
    with near, subprocess.Popen(argv, stdin=far, stdout=far, stderr=subprocess.DEVNULL) as program:
        far.close()
        poller = select.poll()
        for one in (near, out):
            poller.register(one, select.POLLIN)
        until_s = time.monotonic() + 20
        with contextlib.suppress(OSError):
            while time.monotonic() < until_s and program.poll() is None:
                for fd, _ in poller.poll(200):
                    source, target = (near, out) if fd == near.fileno() else (out, near)
                    data = source.recv(1 << 20)
                    if not data:
                        until_s = 0.0
                    for old, new in changes.items() if source is near else ():
                        data = data.replace(old, new)
                    target.sendall(data)
        program.kill()
        with contextlib.suppress(OSError):
            out.shutdown(socket.SHUT_RDWR)


def send_forged(channel: Channel, argv: list[str], changes: dict[bytes, bytes]) -> None:
    channel.call("migrate.sync", 60, id=MID, volume="101", mode="all")
    ours, theirs = socket.socketpair()
    thread = in_thread(lambda: forged(argv, changes, theirs))
    try:
        fd = ours.detach()
        channel.exchange(fd, fd, idle_s=60)
        channel.answer(60)
    finally:
        with contextlib.suppress(OSError):
            theirs.shutdown(socket.SHUT_RDWR)
        thread.join()
        theirs.close()


FORGED: dict[str, tuple[list[str], dict[bytes, bytes]]] = {
    "dotdot": (["QQQQQQQQQQQevil"], {b"QQQQQQQQQQQevil": b"../../../.xevil"}),
    "dotdot inside": (["QQ/QQQQQQevil"], {b"QQQQQQevil": b"../../evil"}),
    "absolute": (["QQQQQQQQQevil"], {b"QQQQQQQQQevil": b"/volume/.evil"}),
    "absolute elsewhere": (["QQQQQevil"], {b"QQQQQevil": b"/tmp/evil"}),
    "symlink, then a file in it": (["QQ/evil", "QA -> /tmp"], {b"QQ": b"QA"}),
    "symlink up, then a file in it": (["QQ/evil", "QA -> ../../../../tmp"], {b"QQ": b"QA"}),
    "an empty name": (["Q"], {b"Q": b"\0"}),
    "a line more": (["QQQevil"], {b"QQQevil": b"a\nbevil"}),
    "an escape": (["QQQQevil"], {b"QQQQevil": b"\x1b[2Jevil"}),
}


def upper(victim: Victim, number: int = 101) -> Path:
    """Return where the files are that a container on its way has."""
    [found] = Path(victim.node.layout.pool).glob(f"uppers/{number}.*")
    return found / "rootfs"


@pytest.mark.parametrize("name", FORGED)
def test_names_that_a_sender_forges(
    victim: Victim, rogue: Rogue, tree: Sender, tmp_path: Path, name: str
) -> None:
    files, changes = FORGED[name]
    for one in files:
        path, _, target = one.partition(" -> ")
        (tree.tree / path).parent.mkdir(exist_ok=True)
        if target:
            (tree.tree / path).symlink_to(target)
        else:
            (tree.tree / path).write_text("evil")
    channel = rogue.connect()
    begun(channel)
    with contextlib.suppress(SysctrError):
        send_forged(channel, tree.command(), changes)
    assert not [*Path("/tmp").glob("*evil"), *Path("/").glob("*evil")]
    assert not list(upper(victim).parent.glob("*evil"))
    owned(victim)


def owned(victim: Victim, number: int = 101) -> None:
    """Assert that all files of a container on its way have ids that it has, where no host user gets."""
    # On the disk they begin at 0; where it is mounted, at those of the container.
    _, count = map(int, Path(victim.node.layout.container_dir(number), "idmap").read_text().split())
    assert stat.S_IMODE(os.stat(victim.node.layout.pool).st_mode) & 0o077 == 0
    for path in [upper(victim), *upper(victim).rglob("*")]:
        facts = os.lstat(path)
        assert facts.st_uid < count, path
        assert facts.st_gid < count, path
        assert not stat.S_ISBLK(facts.st_mode), path
        assert not stat.S_ISCHR(facts.st_mode) or facts.st_rdev == 0, path
        assert not [key for key in os.listxattr(path, follow_symlinks=False) if key.startswith("trusted.")]


def test_what_a_tree_must_not_bring(victim: Victim, rogue: Rogue, tree: Sender) -> None:
    nodes_of = {
        "block": (stat.S_IFBLK, 7, 0), "memory": (stat.S_IFCHR, 1, 1), "whiteout": (stat.S_IFCHR, 0, 0)
    }  # fmt: skip
    channel = rogue.connect()
    begun(channel)
    (tree.tree / "shell").write_bytes(b"x")
    os.chmod(tree.tree / "shell", 0o6755)
    (tree.tree / "capable").write_bytes(b"x")
    # cap_sys_admin, for every user namespace.
    everything = bytes.fromhex("0100000200002000000000000000000000000000")
    os.setxattr(tree.tree / "capable", "security.capability", everything)
    (tree.tree / "up").symlink_to("../../../../../../../../etc/shadow")
    send(channel, tree.command())
    owned(victim)
    assert stat.S_IMODE(os.lstat(upper(victim) / "shell").st_mode) == 0o6755
    (tree.tree / "far").write_bytes(b"x")
    os.chown(tree.tree / "far", 4_000_000_000, 4_000_000_000)
    for name, (kind, major, minor) in nodes_of.items():
        os.mknod(tree.tree / name, kind | 0o666, os.makedev(major, minor))
    os.setxattr(tree.tree / "far", "trusted.evil", b"1")
    os.setxattr(tree.tree / "far", "trusted.overlay.opaque", b"y")
    with contextlib.suppress(SysctrError):
        send(channel, tree.command())
    owned(victim)


def test_rsync_that_is_none(victim: Victim, rogue: Rogue) -> None:
    channel = rogue.connect()
    begun(channel)
    for argv in (
        ["true"], ["sh", "-c", "echo hello"], ["head", "-c", "1000000", "/dev/urandom"],
        ["sh", "-c", "printf '\\040\\0\\0\\0'; head -c 100000 /dev/urandom"],
        ["sh", "-c", "printf '\\377\\377\\377\\177'; cat /dev/zero | head -c 10000000"],
        ["sh", "-c", "printf '\\037\\0\\0\\0\\0\\0\\0\\0\\0'; yes '\033[2J' | head -c 1000000"],
    ):  # fmt: skip
        with pytest.raises(SysctrError) as caught:
            send(channel, argv)
        if isinstance(caught.value, PeerLost):
            channel = rogue.connect()
            begun(channel)
    assert channel.call("migrate.prepare", id=MID) == {"answer": "receiving"}


def test_a_disk_that_fills_up(victim: Victim, rogue: Rogue, tree: Sender) -> None:
    node = victim.node
    small = f"{node.root}/small"
    node.shell("mkdir", small)
    node.shell("mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", small)
    node.run("pool", "add", "small", "--driver", "overlay", "--path", f"{small}/pool")
    try:
        with open(tree.tree / "bomb", "wb") as file:
            file.truncate(1 << 40)
        (tree.tree / "full").write_bytes(os.urandom(96 << 20))
        channel = rogue.connect()
        wishes = {**WISHES, "pools": {"default": "small"}}
        begun(channel, wishes=wishes)
        with pytest.raises(SysctrError):
            send(channel, ["timeout", "5", *tree.command()])
        (tree.tree / "bomb").unlink()
        channel = rogue.connect()
        begun(channel, wishes=wishes)
        with pytest.raises(SysctrError):
            send(channel, tree.command())
        again = rogue.connect().call("migrate.begin", 60, id=MID, offer=offer(wishes=wishes))
        assert again["failure"]["code"] == "no-space", again
        assert rogue.connect().call("migrate.abort", id=MID) == {"answer": "aborted"}
    finally:
        rogue.hang_up()
        wait_until(lambda: not node.json("migrations"))
        node.run("pool", "remove", "small", "--force", "--yes", check=False)
        wait_until(lambda: not node.shell("umount", small, check=False).status, what=f"umount of {small}")


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


# A host that is asked to take a container


def verdict(**changes: Any) -> dict[str, Any]:
    placed = [{"source": "100", "pool": "default", "method": "rsync", "expected_bytes": 0}]
    return {
        "id": None, "name": "x", "pool": "default", "template": "", "volumes": placed, "addresses": {},
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
    "a failure that is none": {"begin": {"phase": "receiving", "kept": [], "failure": 7}},
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
