"""The host that is attacked, and what a peer can do to it without harm or with it."""

import contextlib
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from sysctr.peer.channel import Channel
from sysctr.peer.dial import dial
from tests.attack.hostile import below, listing
from tests.attack.peers.rogue import CONFIG, Rogue, network_of, offer
from tests.node import Node
from tests.wait import wait_until

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


class Sender:
    """A tree of the other host and the rsync that sends it."""

    def __init__(self, directory: Path) -> None:
        self.tree = directory / "tree"
        self.tree.mkdir()

    def command(self, *options: str) -> list[str]:
        return [*SENDER, *options, ".", f"{self.tree}/"]


def send(channel: Channel, argv: list[str], mode: str = "all", name: str = "101") -> None:
    """Let a program talk to the rsync of the host that is attacked."""
    channel.call("migrate.sync", 60, id=MID, volume=name, mode=mode, still=False)
    ours, theirs = socket.socketpair()
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL) as program:
        theirs.close()
        fd = ours.detach()
        try:
            channel.exchange(fd, fd, idle_s=60)
            channel.answer(60)
        finally:
            program.kill()


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


def add_other(node: Node) -> None:
    """Make a second pool, unless there is one."""
    node.run(
        "pool", "add", "other", "--driver", "overlay", "--path", f"{node.root}/other", check=False
    )
