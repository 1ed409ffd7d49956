"""The API of another host, through the connection that both trust: what `sysctr --host` and the UI go by.

A peer that may manage this host may do all that root may here, so none may unless that is said. What it sends
reaches the API's own socket as if a program of this host had sent it; the log says whose it was.
"""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

from sysctr.engine.host import Host
from sysctr.engine.migration_streams import giving, taking
from sysctr.engine.peer_records import Peer
from sysctr.engine.peers import Peers
from sysctr.errors import Busy, NoDaemon, Refused
from sysctr.peer.channel import Channel
from sysctr.peer.message import Shape
from sysctr.runtime import wire

log = logging.getLogger(__name__)

_OP = "api.open"
_ANSWER_S = 30.0
# Fewer than a peer may have connections, and than all may (sysctr.peer.server): the rest is for moves.
_MOST_OF_ONE = 16
_MOST_OF_ALL = 40
# So many wait at once for peers that may not answer.
_MOST_REACHING = 16
_CONNECT_S = 10
# What the names of connections begin with that this process opens to its own API.
_OF_PEER = b"\0sysctr/peer/"


class Management:
    """Opens the APIs of peers to this host's programs, and this one's to peers that may manage it."""

    def __init__(self, host: Host, peers: Peers) -> None:
        self._host = host
        self._peers = peers
        self._lock = threading.Lock()
        self._open: dict[str, dict[Channel, socket.socket]] = {}
        self._reaching = threading.BoundedSemaphore(_MOST_REACHING)
        peers.register(_OP, Shape({}), self._serve)
        peers.on_restricted.append(self._restricted)

    def reach(self, ref: str) -> Channel:
        """Return a connection to a peer that goes on with its API; raises what speaks against it."""
        peer = self._peers.get(ref)
        if not self._reaching.acquire(blocking=False):
            raise Busy(f"cannot reach {peer.name}: {_MOST_REACHING} others wait for peers")
        try:
            channel = self._peers.connect(peer.id)
            try:
                channel.call(_OP, _ANSWER_S)
            except BaseException:
                channel.close()
                raise
            return channel
        finally:
            self._reaching.release()

    def exchange(self, channel: Channel, fd: int) -> None:
        """Let a program here, behind a descriptor, talk to the API behind a channel until one ends."""
        with contextlib.closing(channel), giving(channel) as exchange:
            exchange(fd, fd)

    def _serve(self, peer: Peer, _message: dict[str, Any], channel: Channel) -> dict[str, Any]:
        _check(peer)
        with self._connected(peer) as connection, self._kept(peer, channel, connection):
            # Who took the permission away meanwhile had it written down, or found this one in the list.
            _check(self._peers.get(peer.id))
            log.info("peer %s: uses the API", peer.name)
            with taking(channel, {}) as exchange:
                fd = os.dup(connection.fileno())
                exchange(fd, fd)
        return {}

    @contextlib.contextmanager
    def _connected(self, peer: Peer) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            try:
                connection.bind(_own_name(peer))
                wire.connect_to(connection, self._host.where.api_socket, _CONNECT_S)
            except OSError as error:
                raise NoDaemon(f"cannot open the API: {error.strerror or error}") from error
            yield connection

    @contextlib.contextmanager
    def _kept(self, peer: Peer, channel: Channel, connection: socket.socket) -> Iterator[None]:
        with self._lock:
            own = self._open.setdefault(peer.id, {})
            if len(own) >= _MOST_OF_ONE or sum(map(len, self._open.values())) >= _MOST_OF_ALL:
                raise Busy(f"cannot open the API: {peer.name} uses it {len(own)} times already")
            own[channel] = connection
        try:
            yield
        finally:
            with self._lock:
                own.pop(channel, None)

    def _restricted(self, peer: Peer) -> None:
        """End what a peer does here that may not any more."""
        if not peer.may_manage:
            with self._lock:
                for channel, connection in self._open.get(peer.id, {}).items():
                    channel.abort()
                    # What it had sent before would else be answered still, and so be done.
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)


def _own_name(peer: Peer) -> bytes:
    """Return a name for a connection to the API that says whose it is, for as long as anything is read of it.

    An abstract one (unix(7)). A list of who is connected would be too short-lived: what a peer sent before it
    hung up is answered after it.
    """
    return _OF_PEER + peer.name.encode() + b"/" + os.urandom(8).hex().encode()


def caller(pid: int, name: object) -> str:
    """Return the peer whose a connection to the API is, by the process and the name of its other end.

    Empty for all that this very process did not open for a peer.
    """
    if pid != os.getpid() or not isinstance(name, bytes) or not name.startswith(_OF_PEER):
        return ""
    return name.removeprefix(_OF_PEER).rpartition(b"/")[0].decode()


def _check(peer: Peer) -> None:
    if not peer.may_manage:
        raise Refused(
            f"cannot open the API: {peer.name} may not manage this host",
            f"`sysctr peer restrict {peer.name} --manage yes` here lets it do all that root may",
        )
