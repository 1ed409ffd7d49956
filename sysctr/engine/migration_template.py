"""Templates that go along: what containers stand on is sent once, and then only what differs from it."""

import threading
from contextlib import closing
from typing import Any

from sysctr.engine.host import Host
from sysctr.engine.migration_link import why
from sysctr.engine.migration_streams import taking
from sysctr.engine.peer_records import Peer
from sysctr.engine.peers import Peers
from sysctr.engine.tasks import Task
from sysctr.engine.tree_sync import receive_tree, send_tree
from sysctr.errors import Blocked, SysctrError
from sysctr.peer.channel import Channel
from sysctr.peer.message import Shape, Text
from sysctr.storage.base import RootSpec, Tree
from sysctr.template.base import Made, Source, check_name

_SHORT = Text(256)
_ANSWER_S = 600.0
SHAPE = Shape(
    {
        "name": Text(64), "version": _SHORT, "description": Text(1024), "init": _SHORT,
        "stop_signal": Text(32),
    }
)  # fmt: skip


class Templates:
    """Sends templates to peers, and takes those that peers send."""

    def __init__(self, host: Host, peers: Peers) -> None:
        self._host = host
        self._peers = peers
        self._lock = threading.Lock()
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
            answer = channel.call(
                "migrate.template", name=name, version=template.version,
                description=template.description, init=template.init, stop_signal=template.stop_signal,
            )  # fmt: skip
            if answer.get("have"):
                return 0

            def exchange(read_fd: int, write_fd: int) -> None:
                channel.exchange(read_fd, write_fd, told=told, check=task.check, rate_bytes=rate_bytes)

            try:
                send_tree(host.jobs_for_templates(), task, view, exchange, "all")
            except SysctrError as error:
                raise why(channel, error) from error
            channel.answer(_ANSWER_S)
        return sent_bytes

    def _take(self, peer: Peer, message: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Take a template that a peer sends; one of this name that is here already is good enough."""
        host = self._host
        name = check_name(message["name"])
        if not peer.may_send or (peer.pools and "default" not in peer.pools):
            raise Blocked(f"cannot take template {name}: {peer.name} may not put any here")
        # Two containers of one template come at the same time.
        with self._lock:
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
