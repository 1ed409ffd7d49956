"""Templates that go along: what containers stand on is sent once, and then only what differs from it."""

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from sysctr.config import values
from sysctr.engine.host import Host
from sysctr.engine.migration_answers import read_answer
from sysctr.engine.migration_streams import giving, taking
from sysctr.engine.peer_records import Peer
from sysctr.engine.peers import Peers
from sysctr.engine.tasks import Task
from sysctr.engine.tree_sync import receive_tree, send_tree
from sysctr.errors import Blocked, Busy, ConfigError, UsageError
from sysctr.peer.channel import Channel
from sysctr.peer.message import Shape, Text
from sysctr.storage.base import RootSpec, Tree
from sysctr.template.base import Made, Source, check_name

_LINE = r"[^\x00-\x1f\x7f-\x9f]*"
_SHORT = Text(256, _LINE)
_ANSWER_S = 600.0
# Less than the other side waits for an answer.
_PATIENCE_S = 45.0
SHAPE = Shape(
    {
        "name": Text(64), "version": _SHORT, "description": Text(1024, _LINE), "init": _SHORT,
        "stop_signal": Text(32),
    }
)  # fmt: skip


class Templates:
    """Sends templates to peers, and takes those that peers send."""

    def __init__(self, host: Host, peers: Peers) -> None:
        self._host = host
        self._peers = peers
        self._free = threading.Condition()
        # The names of those that are being received; a stream may take as long as its peer likes.
        self._coming: set[str] = set()
        peers.register("migrate.template", SHAPE, self._take)

    def send(self, task: Task, peer: str, name: str, rate_bytes: int | None) -> int:
        """Send a template of this host that a peer does not have; returns the bytes that were sent."""
        host = self._host
        template = host.templates.get(name)
        sent_bytes = 0

        def told(count: int) -> None:
            nonlocal sent_bytes
            sent_bytes += count
            task.progress(sent_bytes, template.size_bytes)

        task.step(f"sending the template {name}")
        view = RootSpec((Tree("template", host.templates.rootfs(name), read_only=True),))
        with closing(self._peers.connect(peer)) as channel:
            told_there = channel.call(
                "migrate.template", name=name, version=template.version,
                description=template.description, init=template.init, stop_signal=template.stop_signal,
            )  # fmt: skip
            if read_answer(channel, "template", told_there)["have"]:
                return 0
            with giving(channel, told=told, check=task.check, rate_bytes=rate_bytes) as exchange:
                send_tree(host.jobs_for_templates(), task, view, exchange, "all")
            channel.answer(_ANSWER_S)
        return sent_bytes

    def _take(self, peer: Peer, message: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Take a template that a peer sends; one of this name that is here already is good enough."""
        host = self._host
        name = check_name(message["name"])
        if not peer.may_send or (peer.pools and "default" not in peer.pools):
            raise Blocked(f"cannot take template {name}: {peer.name} may not put any here")
        _check(name, message)
        with self._receiving(name):
            if any(one.name == name for one in host.templates.list()):
                return {"have": True}

            def build(building: str) -> Made:
                root = RootSpec((Tree("volume", f"{building}/rootfs"),))
                with taking(channel, {"have": False}) as exchange:
                    receive_tree(host.jobs_for_templates(), None, root, exchange, "all", still=True)
                return Made(
                    source=Source(kind="peer", name=peer.name, digest=""), version=message["version"],
                    description=message["description"], init=message["init"],
                    stop_signal=message["stop_signal"],
                )  # fmt: skip

            made = host.templates.add(name, build)
        host.bus.publish("template", name=name, change="created", peer=peer.name)
        return {"size_bytes": made.size_bytes}

    @contextmanager
    def _receiving(self, name: str) -> Iterator[None]:
        """Let one at a time send a template of a name; whoever comes meanwhile waits a little."""
        with self._free:
            if not self._free.wait_for(lambda: name not in self._coming, _PATIENCE_S):
                raise Busy(f"cannot take template {name}: another host is sending it", "try again later")
            self._coming.add(name)
        try:
            yield
        finally:
            with self._free:
                self._coming.discard(name)
                self._free.notify_all()


def _check(name: str, message: dict[str, Any]) -> None:
    """Raise UsageError for what a template must not say: its containers could not be started or stopped."""
    try:
        if message["init"]:
            values.parse_path(message["init"])
        if message["stop_signal"]:
            values.parse_signal(message["stop_signal"])
    except ConfigError as error:
        raise UsageError(f"cannot take template {name}: {error.message}") from error
