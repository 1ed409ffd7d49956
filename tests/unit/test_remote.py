"""exec and console over a websocket: what goes through the descriptors and messages of a remote ticket."""

import json
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from sysctr.remote import RemoteTicket, masked

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class Daemon:
    """The other side of the websocket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = connection.makefile("rb")

    def send(self, kind: int, data: bytes) -> None:
        size = len(data)
        if size < 126:
            head = bytes([0x80 | kind, size])
        elif size < 65536:
            head = bytes([0x80 | kind, 126]) + struct.pack("!H", size)
        else:
            head = bytes([0x80 | kind, 127]) + struct.pack("!Q", size)
        self._connection.sendall(head + data)

    def receive(self) -> tuple[int, bytes]:
        first, size = self._reader.read(2)
        assert first & 0x80
        assert size & 0x80, "a client's frames are masked"
        size &= 0x7F
        if size == 126:
            (size,) = struct.unpack("!H", self._reader.read(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self._reader.read(8))
        key = self._reader.read(4)
        return first & 0x0F, masked(self._reader.read(size), key)

    def close(self) -> None:
        self._reader.close()
        self._connection.close()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Daemon]]:
    """A connection whose handshake is done."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(20)
    daemon = Daemon(theirs)
    with ours:
        yield ours, daemon
    daemon.close()


def ticket(ours: socket.socket, *names: str, request: dict | None = None) -> RemoteTicket:
    return RemoteTicket(ours, ours.makefile("rb"), names, request)


def test_the_request_comes_first_and_streams_go_where_they_belong(ends: tuple[socket.socket, Daemon]) -> None:
    ours, daemon = ends
    with ticket(ours, "stdin", "stdout", "stderr", request={"argv": ["cat"]}) as one:
        assert daemon.receive() == (TEXT, b'{"argv": ["cat"]}')
        fds = {name: one.take(name) for name in one.names}
        os.write(fds["stdin"], b"typed")
        assert daemon.receive() == (BINARY, b"\0typed")
        daemon.send(BINARY, b"\1out")
        daemon.send(BINARY, b"\2err")
        assert os.read(fds["stdout"], 99) == b"out"
        assert os.read(fds["stderr"], 99) == b"err"
        # Its end is an empty piece.
        os.close(fds["stdin"])
        assert daemon.receive() == (BINARY, b"\0")
        daemon.send(TEXT, b'{"exit": 3}')
        assert one.receive() == {"exit": 3}
        assert os.read(fds["stdout"], 99) == b""
        assert one.receive() is None
        for name in ("stdout", "stderr"):
            os.close(fds[name])


def test_a_terminal_goes_both_ways_and_has_a_size(ends: tuple[socket.socket, Daemon]) -> None:
    ours, daemon = ends
    with ticket(ours, "pty", request={}) as one:
        daemon.receive()
        fd = one.take("pty")
        one.send({"resize": [24, 80]})
        kind, data = daemon.receive()
        assert (kind, json.loads(data)) == (TEXT, {"resize": [24, 80]})
        daemon.send(PING, b"there?")
        assert daemon.receive() == (PONG, b"there?")
        daemon.send(BINARY, b"\1" + b"x" * 100_000)
        got = b""
        while len(got) < 100_000:
            got += os.read(fd, 65536)
        os.write(fd, b"y" * 70_000)
        sent = b""
        while len(sent) < 70_000:
            _, piece = daemon.receive()
            sent += piece[1:]
        assert sent == b"y" * 70_000
        os.close(fd)


@pytest.mark.parametrize("end", ["close", "cut", "fragment", "huge"])
def test_a_connection_that_breaks_ends_everything(end: str, ends: tuple[socket.socket, Daemon]) -> None:
    ours, daemon = ends
    with ticket(ours, "console") as one:
        fd = one.take("console")
        if end == "close":
            daemon.send(CLOSE, b"")
        elif end == "fragment":
            daemon._connection.sendall(bytes([BINARY, 1]) + b"x")
        elif end == "huge":
            daemon._connection.sendall(bytes([0x80 | BINARY, 127]) + struct.pack("!Q", 1 << 40))
        else:
            daemon._connection.shutdown(socket.SHUT_RDWR)
        assert os.read(fd, 99) == b""
        assert one.receive() is None
        os.close(fd)


def test_closing_it_ends_the_threads(ends: tuple[socket.socket, Daemon]) -> None:
    ours, _ = ends
    before = set(threading.enumerate())
    one = ticket(ours, "console")
    new = set(threading.enumerate()) - before
    one.close()
    for thread in new:
        thread.join(20)
        assert not thread.is_alive()
