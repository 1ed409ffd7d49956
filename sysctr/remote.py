"""exec and console on another host: a websocket that looks like a ticket to this host's supervisor.

What is behind a ticket are descriptors of the program, and messages. Here they are the ends of local sockets,
and two threads carry what goes through them in frames (RFC 6455; sysctr.api.websocket says what is in them).
"""

import contextlib
import json
import os
import socket
import threading

from sysctr import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO

_TEXT, _BINARY, _CLOSE, _PING, _PONG = 1, 2, 8, 9, 10
_PIECE_BYTES = 32 << 10
_LIMIT_BYTES = 1 << 20
# How long a thread may take to see that all is over.
_LAST_S = 5.0
_SHARED = ("pty", "console")


def masked(data: bytes, key: bytes) -> bytes:
    """Return data under the mask that a client's frames have.

    >>> masked(masked(b"sysctr", b"1234"), b"1234")
    b'sysctr'
    """
    if not data:
        return data
    count = len(data)
    repeated = (key * (count // 4 + 1))[:count]
    mixed = int.from_bytes(data, "big") ^ int.from_bytes(repeated, "big")
    return mixed.to_bytes(count, "big")


class WebSocket:
    """The client's side of a websocket on a connection whose handshake is done."""

    def __init__(self, connection: socket.socket, reader: "BinaryIO") -> None:
        self._connection = connection
        self._reader = reader
        self._lock = threading.Lock()

    def send(self, kind: int, data: bytes) -> None:
        """Send one frame; a side that is gone shows when it is read from."""
        size = len(data)
        if size < 126:
            head = bytes([0x80 | kind, 0x80 | size])
        elif size < 65536:
            head = bytes([0x80 | kind, 0x80 | 126]) + size.to_bytes(2, "big")
        else:
            head = bytes([0x80 | kind, 0x80 | 127]) + size.to_bytes(8, "big")
        key = os.urandom(4)
        with self._lock, contextlib.suppress(OSError):
            self._connection.sendall(head + key + masked(data, key), socket.MSG_NOSIGNAL)

    def receive(self) -> "tuple[int, bytes] | None":
        """Return the next message, None at the end; raises ConnectionError for what is none."""
        while True:
            head = self._reader.read(2)
            if len(head) < 2:
                return None
            kind, size = head[0] & 0x0F, head[1] & 0x7F
            if not head[0] & 0x80 or head[1] & 0x80:
                raise ConnectionError("a frame that no daemon sends")
            if size >= 126:
                size = int.from_bytes(self._reader.read(2 if size == 126 else 8), "big")
            if size > _LIMIT_BYTES:
                raise ConnectionError("a frame that is too large")
            data = self._reader.read(size)
            if len(data) < size or kind == _CLOSE:
                return None
            if kind == _PING:
                self.send(_PONG, data)
            elif kind in (_TEXT, _BINARY):
                return kind, data

    def close(self) -> None:
        """End it under whoever waits for it."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Let go of the connection, when nobody waits for it any more."""
        self._reader.close()
        self._connection.close()


class RemoteTicket:
    """What a Ticket is on this host: descriptors by name, and messages. The caller closes what it takes."""

    def __init__(
        self,
        connection: socket.socket,
        reader: "BinaryIO",
        names: "tuple[str, ...]",
        request: "dict[str, Any] | None",
    ) -> None:
        self.names = list(names)
        self._web = WebSocket(connection, reader)
        self._connection = connection
        self._messages, self._told = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._theirs: dict[str, socket.socket] = {}
        self._ours: dict[str, socket.socket] = {}
        for name in names:
            self._theirs[name], self._ours[name] = socket.socketpair()
        if request is not None:
            self._web.send(_TEXT, json.dumps(request).encode())
        inward = next(name for name in names if name in (*_SHARED, "stdin"))
        self._threads = [
            threading.Thread(target=self._read, name="remote output", daemon=True),
            threading.Thread(target=self._write, args=(self._ours[inward],), name="remote keys", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "RemoteTicket":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the descriptor to poll for messages."""
        return self._messages.fileno()

    def take(self, name: str) -> int:
        """Hand over the descriptor of that name."""
        if name not in self._theirs:
            raise errors.SysctrError(f"cannot use the connection: there is no {name}")
        return self._theirs.pop(name).detach()

    def send(self, message: "dict[str, Any]") -> None:
        """Send one message."""
        self._web.send(_TEXT, json.dumps(message).encode())

    def receive(self) -> "dict[str, Any] | None":
        """Return the next message, or None at the end of the connection."""
        content = self._messages.recv(_LIMIT_BYTES)
        return json.loads(content) if content else None

    def close(self) -> None:
        """End it, and close every descriptor that nobody took."""
        self._web.close()
        for one in (*self._ours.values(), self._messages):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(_LAST_S)
        for one in (*self._ours.values(), *self._theirs.values(), self._messages, self._told):
            one.close()
        self._web.release()

    def _read(self) -> None:
        """Bring what comes to where it belongs."""
        outputs = {1: self._ours.get("stdout"), 2: self._ours.get("stderr")}
        shared = next((self._ours[name] for name in _SHARED if name in self._ours), None)
        try:
            while (message := self._web.receive()) is not None:
                kind, data = message
                if kind == _TEXT:
                    self._told.sendall(data)
                    if "exit" in json.loads(data):
                        break
                elif (where := shared or outputs.get(data[0] if data else 0)) is not None:
                    with contextlib.suppress(OSError):  # nobody wants to read it
                        where.sendall(data[1:])
        except (OSError, ValueError):
            pass
        finally:
            # What was written is read to its end before the end is.
            for name, one in self._ours.items():
                if name != "stdin":
                    with contextlib.suppress(OSError):
                        one.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                self._told.shutdown(socket.SHUT_WR)

    def _write(self, source: socket.socket) -> None:
        """Send what is typed."""
        with contextlib.suppress(OSError):
            while data := source.recv(_PIECE_BYTES):
                self._web.send(_BINARY, b"\0" + data)
            self._web.send(_BINARY, b"\0")
