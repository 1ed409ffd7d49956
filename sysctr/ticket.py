"""A connection to the supervisor that the API gave a ticket for: descriptors of a program, and messages."""

import json
import os
import socket
import sys

from sysctr import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MESSAGE_LIMIT = 65536


class Ticket:
    """A connection to the supervisor for one exec, console or files job, with the descriptors it gave."""

    def __init__(self, answer: "dict[str, str]", default_socket: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.fds: list[int] = []
        try:
            self._socket.connect(answer.get("socket") or default_socket)
            self.send({"ticket": answer["ticket"]})
            reply, self.fds = self._receive()
            if reply is None:
                raise errors.NoDaemon("cannot use the ticket: the supervisor closed the connection")
            if "error" in reply:
                raise errors.from_dict(reply["error"])
            self.names: list[str] = reply.get("fds", [])
            if len(self.names) != len(self.fds):
                raise errors.SysctrError(
                    f"cannot use the ticket: {len(self.names)} descriptors announced, {len(self.fds)} came"
                )
        except OSError as error:
            self.close()
            raise errors.NoDaemon(
                f"cannot reach the supervisor: {error.strerror or error}", "see `sysctr daemon status`"
            ) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the descriptor to poll for messages."""
        return self._socket.fileno()

    def take(self, name: str) -> int:
        """Hand over the descriptor of that name; the caller closes it."""
        index = self.names.index(name) if name in self.names else -1
        if index < 0 or self.fds[index] < 0:
            raise errors.SysctrError(f"cannot use the ticket: the supervisor gave no {name}")
        taken_fd, self.fds[index] = self.fds[index], -1
        return taken_fd

    def send(self, message: "dict[str, Any]") -> None:
        """Send one message; a supervisor that is gone shows in receive()."""
        try:
            self._socket.send(json.dumps(message).encode(), socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def receive(self) -> "dict[str, Any] | None":
        """Return the next message, or None at the end of the connection."""
        try:
            message, stray_fds = self._receive()
        except ConnectionResetError:
            return None
        for fd in stray_fds:
            os.close(fd)
        return message

    def _receive(self) -> "tuple[dict[str, Any] | None, list[int]]":
        # socket.recv_fds() loses its flags, and the descriptors would be inherited by $EDITOR or $PAGER.
        content, ancillary, _, _ = self._socket.recvmsg(
            _MESSAGE_LIMIT, socket.CMSG_SPACE(4 * 8), socket.MSG_CMSG_CLOEXEC
        )
        fds = []
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                for at in range(0, len(data) - len(data) % 4, 4):
                    fds.append(int.from_bytes(data[at : at + 4], sys.byteorder))
        return (json.loads(content) if content else None), fds

    def close(self) -> None:
        """Close the connection and every descriptor that nobody took."""
        self._socket.close()
        for fd in self.fds:
            if fd >= 0:
                os.close(fd)
        self.fds = []
