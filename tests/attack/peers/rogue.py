"""A host that another one trusts, and that says what no sysctr would say."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sysctr.engine.peer_tokens import decode
from sysctr.engine.peers import _proof
from sysctr.errors import SysctrError
from sysctr.linux.process import CLONE_NEWNET, setns
from sysctr.peer import identity
from sysctr.peer.channel import Channel, PeerLost
from sysctr.peer.dial import dial
from sysctr.peer.server import Server
from tests.node import Node

PORT = 8700
UUID = "4a0e3f2c-93f1-4d4e-9c0e-6f3c6d6b8a01"
CONFIG = 'schema = 1\nname = "gift"\n'
ANSWER_S = 60.0


@contextlib.contextmanager
def network_of(node: Node) -> Iterator[None]:
    """Be in the network of a node; the sockets made meanwhile stay there."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(f"/proc/{node.netns_pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(there, CLONE_NEWNET)
        yield
    finally:
        setns(home, CLONE_NEWNET)
        os.close(home)
        os.close(there)


def hello(**changes: Any) -> dict[str, Any]:
    return {"op": "hello", "protocol": 1, "version": "0.1.0", "name": "rogue", **changes}


class Rogue:
    """The host; `answers` is what it says when it is asked something, by the name of the question."""

    def __init__(self, lives_in: Node, directory: Path, name: str = "rogue", port: int = PORT) -> None:
        self.node = lives_in
        self.name = name
        self.identity = identity.make(str(directory / name))
        self.answers: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []
        self.hello = hello(name=name)
        self._open: list[Channel] = []
        self._victims: list[str] = []
        self._address, self._port = "192.0.2.2", port
        self._server = Server(lambda: self.identity, lambda: self._victims, self._serve)
        with network_of(lives_in):
            self._server.listen(self._address, port)

    def close(self) -> None:
        self.hang_up()
        self._server.close()

    def hang_up(self) -> None:
        while self._open:
            self._open.pop().close()

    def join(self, token: str) -> None:
        """Make the host of a token trust this one."""
        told = decode(token)
        with network_of(self.node), dial(told.addresses, told.fingerprint, None) as channel:
            proof = self.identity.sign(_proof(told.secret, self.identity.fingerprint, told.fingerprint))
            answer = channel.call(
                "peer.join", 30, protocol=1, version="0.1.0", secret=told.secret, name=self.name,
                certificate=self.identity.certificate, addresses=[f"{self._address}:{self._port}"],
                proof=proof.hex(),
            )  # fmt: skip
        self._victims.append(answer["certificate"])
        self.trusted, self.addresses = told.fingerprint, told.addresses
        self.connect().call("peer.ping", 30)

    def dial(self) -> Channel:
        """Connect, and say nothing yet."""
        with network_of(self.node):
            channel = dial(self.addresses, self.trusted, self.identity, name="the victim")
        self._open.append(channel)
        return channel

    def connect(self, **said: Any) -> Channel:
        """Connect, and greet as a host does."""
        channel = self.dial()
        channel.receive(30)
        channel.send({**self.hello, **said})
        return channel

    def _serve(self, channel: Channel) -> None:
        channel.send(self.hello)
        channel.receive(30)
        while True:
            message = channel.receive(900)
            self.asked.append(message)
            said = self.answers.get(message["op"], {})
            if callable(said):
                said = said(message, channel)
            if said is not None:
                channel.send(said if said.keys() & {"ok", "error"} else {"ok": said})


def volume(name: str = "101", **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "pool": "default", "kind": "overlay", "root": True, "native": False,
        "size_bytes": None, "total_bytes": 1000, "own_bytes": 1000, **changes,
    }  # fmt: skip


def snapshot(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "created": 1.5, "parents": {"101": ""}, "config": "", "description": "",
        "expires": None, "automatic": False, "running": False, "generation": 1, **changes,
    }  # fmt: skip


WISHES: dict[str, Any] = {
    "number": None, "name": "", "pools": {}, "bridges": {}, "leave_out": [], "copy": False, "start": False
}  # fmt: skip


def offer(**changes: Any) -> dict[str, Any]:
    """Return the offer of a container that could be taken."""
    guest = dict.fromkeys(("init", "init_kind", "stop_signal", "arch", "os_id"), "")
    return {
        "number": 101, "uuid": UUID, "generation": 1, "created": 1.5, "config": CONFIG, "template": "tiny",
        "guest": guest, "arch": os.uname().machine, "running": False, "volumes": [volume()],
        "snapshots": [], "addresses": {}, "firewall": "", "wishes": dict(WISHES), **changes,
    }  # fmt: skip


def refused(channel: Channel, op: str, timeout_s: float = ANSWER_S, **fields: Any) -> SysctrError:
    """Ask for something that must be refused; return the error, in which nothing can harm a terminal."""
    with pytest.raises(SysctrError) as caught:
        channel.call(op, timeout_s, **fields)
    return sound(caught.value)


def sound(error: SysctrError) -> SysctrError:
    """Return an error that is an answer, and no bug that was found."""
    assert not isinstance(error, PeerLost), error
    assert "internal error" not in error.message, error
    return error


def asked(channel: Channel, op: Any, **fields: Any) -> dict[str, Any] | None:
    """Ask for anything; return the answer, None for an error that is one."""
    channel.send({"op": op, **fields})
    try:
        return channel.answer(ANSWER_S)
    except SysctrError as error:
        sound(error)
    return None


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
