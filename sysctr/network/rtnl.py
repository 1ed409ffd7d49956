"""Talks NETLINK_ROUTE over a socket that is already open, in whichever network namespace it was opened.

pyroute2's own sockets are not used: for another namespace they fork, which the daemon must never do, and
one message takes them several times as long. Its message classes encode what is sent. Answers are read
here with struct, since decoding one link with all its attributes takes pyroute2 longer than creating one.
"""

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sysctr.linux.syscall import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyroute2.netlink import nlmsg

SOL_NETLINK = 270
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11

NLM_F_REQUEST = 0x001
NLM_F_ACK = 0x004
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_DUMP = 0x300

_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLM_F_CAPPED = 0x100
_NLM_F_ACK_TLVS = 0x200
_NLMSGERR_ATTR_MSG = 1

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
# NLA_F_NESTED and NLA_F_NET_BYTEORDER are flags in the type.
_TYPE_MASK = 0x3FFF
_RECEIVE_BYTES = 1 << 18


@dataclass(frozen=True)
class Request:
    """One message: what it does in words, the type and flags of its header, and pyroute2's message.

    Errors in `tolerated` are no errors: the thing is already so, or the kernel was built without it.
    """

    what: str
    type: int
    message: "nlmsg"
    flags: int = 0
    tolerated: frozenset[int] = frozenset()

    def encode(self, sequence: int) -> bytes:
        """Return the message as the kernel reads it."""
        header = self.message["header"]
        header["type"] = self.type
        header["flags"] = self.flags | NLM_F_REQUEST | (0 if self.is_dump else NLM_F_ACK)
        header["sequence_number"] = sequence
        self.message.encode()
        # Messages in one packet are aligned to four bytes; pyroute2 aligns attributes but not the end.
        data = bytes(self.message.data)
        return data + bytes(-len(data) % 4)

    @property
    def is_dump(self) -> bool:
        """Tell whether the answer is a list of messages that a DONE ends."""
        return self.flags & NLM_F_DUMP == NLM_F_DUMP


class Route:
    """A NETLINK_ROUTE socket, usable from several threads."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()
        self._sequence = 0
        for option in (NETLINK_EXT_ACK, NETLINK_CAP_ACK):
            sock.setsockopt(SOL_NETLINK, option, 1)

    @classmethod
    def open(cls) -> "Route":
        """Open a socket in our own network namespace."""
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        return cls(socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE))

    @classmethod
    def borrow(cls, netlink_fd: int) -> "Route":
        """Use a socket that somebody else opened, in another namespace, and will close."""
        # The numbers are given because Python would else ask the kernel for each of them.
        own_fd = os.dup(netlink_fd)
        return cls(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE, own_fd))

    def close(self) -> None:
        """Close our descriptor of the socket."""
        self._socket.close()

    def __enter__(self) -> "Route":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, requests: Sequence[Request]) -> list[list[bytes]]:
        """Send all requests in one packet; return for each the bodies of the answers it got.

        The kernel carries on with the requests after one that failed; the first failure is raised as a
        KernelError once all have been answered, so that nothing stays in the socket.
        """
        with self._lock:
            first = self._sequence + 1
            self._sequence += len(requests)
            packet = b"".join(request.encode(first + number) for number, request in enumerate(requests))
            self._socket.sendto(packet, (0, 0))
            answers: list[list[bytes]] = [[] for _ in requests]
            failures: dict[int, KernelError] = {}
            waiting = set(range(len(requests)))
            while waiting:
                for kind, flags, number, body in self._receive(first):
                    if not 0 <= number < len(requests):
                        continue  # the answer to a request whose caller was interrupted
                    if kind == _NLMSG_ERROR:
                        waiting.discard(number)
                        failure = _failure(requests[number], flags, body)
                        if failure is not None:
                            failures[number] = failure
                    elif kind == _NLMSG_DONE:
                        waiting.discard(number)
                    else:
                        answers[number].append(body)
        if failures:
            raise failures[min(failures)]
        return answers

    def _receive(self, first: int) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield type, flags, number of the request and body of each message in one packet of the kernel."""
        # rtnetlink answers inside sendto(), so what is not there now will never come: no need to block,
        # and a socket that belongs to a container can thus not hold a thread of the daemon.
        packet, _ancillary, flags, (port, _groups) = self._socket.recvmsg(
            _RECEIVE_BYTES, 0, socket.MSG_DONTWAIT
        )
        if flags & socket.MSG_TRUNC:
            raise KernelError(errno.EMSGSIZE, "netlink answer")
        if port != 0:
            return  # root of a container may send to its own socket; only the kernel has port 0
        offset = 0
        while offset + _HEADER.size <= len(packet):
            length, kind, message_flags, sequence, _port = _HEADER.unpack_from(packet, offset)
            if length < _HEADER.size:
                raise KernelError(errno.EBADMSG, "netlink answer")
            yield kind, message_flags, sequence - first, packet[offset + _HEADER.size : offset + length]
            offset += (length + 3) & ~3


def _failure(request: Request, flags: int, body: bytes) -> KernelError | None:
    """Return what an NLMSG_ERROR says, None if it is an acknowledgement."""
    number = -struct.unpack_from("=i", body)[0]
    if number == 0 or number in request.tolerated:
        return None
    why = ""
    if flags & _NLM_F_ACK_TLVS:
        # Behind the error stands the request: its header alone, or all of it where the kernel did not cap it.
        length = _HEADER.size if flags & _NLM_F_CAPPED else _HEADER.unpack_from(body, 4)[0]
        text = attributes(body, 4 + ((length + 3) & ~3)).get(_NLMSGERR_ATTR_MSG, b"")
        why = text.rstrip(b"\0").decode(errors="replace")
    error = KernelError(number, request.what)
    if why:
        error.strerror = f"{error.strerror} ({why})"
    return error


def attributes(body: bytes, offset: int) -> dict[int, bytes]:
    """Return the attributes that start at `offset`, by type; of two of one type the last.

    >>> attributes(bytes.fromhex("0600030041420000" "0500040043000000"), 0)
    {3: b'AB', 4: b'C'}
    """
    found = {}
    while offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = body[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found
