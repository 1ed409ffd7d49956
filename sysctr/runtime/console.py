"""A container's console: what init printed last is kept in a ring file, and passed on to who is attached."""

import os
import socket
import struct
from collections.abc import Callable

from sysctr.runtime import wire
from sysctr.runtime.loop import Budget, Loop

RING_BYTES = 256 * 1024
_HEADER_BYTES = 16
# What one turn of the loop reads of one console, and what it may say in a second: a flood on one leaves time
# for the others, and its writer waits, as at a serial line.
_TURN_BYTES = 64 * 1024
_BYTES_PER_S = 8 << 20
_WINDOW_S = 0.1


class Ring:
    """The last RING_BYTES of output in a file, where a new supervisor or the daemon reads on."""

    def __init__(self, path: str, *, fresh: bool = False) -> None:
        if fresh:
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
        # Written by calls and not mapped: on a full disk a call fails, and a mapping is a SIGBUS.
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(self._fd, _HEADER_BYTES + RING_BYTES)
            self._total = struct.unpack("=Q", os.pread(self._fd, 8, 0))[0]
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, data: bytes) -> None:
        """Append data, over the oldest; raises OSError on a full disk."""
        total = self._total + len(data)
        data = data[-RING_BYTES:]
        position = (total - len(data)) % RING_BYTES
        first = data[: RING_BYTES - position]
        os.pwrite(self._fd, first, _HEADER_BYTES + position)
        if len(first) < len(data):
            os.pwrite(self._fd, data[len(first) :], _HEADER_BYTES)
        os.pwrite(self._fd, struct.pack("=Q", total), 0)
        self._total = total

    def read(self) -> bytes:
        """Return what is kept, oldest first."""
        return ring_content(os.pread(self._fd, _HEADER_BYTES + RING_BYTES, 0))

    def close(self) -> None:
        """Close the file, which stays."""
        os.close(self._fd)


def ring_content(image: bytes) -> bytes:
    """Return the output that the bytes of a ring file hold, oldest first."""
    if len(image) < _HEADER_BYTES + RING_BYTES:
        return b""
    (total,) = struct.unpack_from("=Q", image, 0)
    body = bytes(image[_HEADER_BYTES : _HEADER_BYTES + RING_BYTES])
    position = total % RING_BYTES
    return body[:total] if total <= RING_BYTES else body[position:] + body[:position]


class Console:
    """One console master, its ring, and the clients that look at it."""

    def __init__(self, loop: Loop, master_fd: int, ring: Ring) -> None:
        self._loop = loop
        self.master_fd = master_fd
        self._ring = ring
        self._clients: list[tuple[socket.socket, Callable[[dict], None]]] = []
        self._budget = Budget(int(_BYTES_PER_S * _WINDOW_S), _WINDOW_S)
        os.set_blocking(master_fd, False)
        loop.watch(master_fd, self._on_output)

    def attach(self, notify: Callable[[dict], None]) -> socket.socket:
        """Return the client's end of a byte stream: the ring's content first, then what comes, both ways."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, RING_BYTES * 4)
        for _, other in self._clients:
            other({"notice": "another client attached to this console"})
        self._pass_on(ours, self._ring.read())
        self._clients.append((ours, notify))
        self._loop.watch(ours.fileno(), lambda _events: self._on_input(ours))
        return theirs

    @property
    def is_shared(self) -> bool:
        """Tell whether more than one client is attached."""
        return len(self._clients) > 1

    def resize(self, rows: int, columns: int) -> None:
        """Tell the console's programs the size of the terminal that looks at it."""
        from sysctr.linux import tty  # the daemon reads rings through this module and needs no terminals

        tty.set_window_size(self.master_fd, rows, columns)

    def close(self) -> None:
        """Let go of the master, the ring and every client."""
        if self.master_fd < 0:
            return
        self._read_output()
        self._loop.forget(self.master_fd)
        os.close(self.master_fd)
        self.master_fd = -1
        for client, _ in list(self._clients):
            self._drop(client)
        self._ring.close()

    def _on_output(self, _events: int) -> None:
        count = self._read_output()
        # None is EIO: no slave is open. Init may open it again, so this is the end only when init ends; until
        # then polling would spin, so the descriptor is looked at again in a while.
        pause_s = 0.2 if count is None else self._budget.spend(count)
        if pause_s:
            self._loop.forget(self.master_fd)
            self._loop.after(pause_s, self._look_again)

    def _look_again(self) -> None:
        if self.master_fd >= 0:
            self._loop.watch(self.master_fd, self._on_output)

    def _read_output(self) -> int | None:
        """Take what is there and return how much that was; None when the slave side is closed."""
        try:
            data = os.read(self.master_fd, _TURN_BYTES)
        except BlockingIOError:
            return 0
        except OSError:
            return None
        if not data:
            return None
        try:
            self._ring.write(data)
        except OSError:
            pass  # a full disk: what is said now cannot be kept, but who looks on still sees it
        for client, _ in list(self._clients):
            self._pass_on(client, data)
        return len(data)

    def _pass_on(self, client: socket.socket, data: bytes) -> None:
        try:
            client.send(data)
        except BlockingIOError:
            pass  # a client that does not read misses output; the container never waits for it
        except OSError:
            self._drop(client)

    def _on_input(self, client: socket.socket) -> None:
        try:
            data = client.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
            return
        try:
            os.write(self.master_fd, data)
        except OSError:
            pass  # nobody reads the console: typed characters are lost, as on a real one

    def _drop(self, client: socket.socket) -> None:
        self._clients = [entry for entry in self._clients if entry[0] is not client]
        self._loop.forget(client.fileno())
        client.close()


def notifier(connection: socket.socket) -> Callable[[dict], None]:
    """Return a function that sends a message to a client and does not mind when that is gone."""

    def send(message: dict) -> None:
        try:
            wire.send(connection, message)
        except (OSError, wire.WireError):
            pass

    return send
