"""Two ends of a real TLS connection in one process, and raw ends that say whatever a test wants."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import Future

from sysctr.peer import identity
from sysctr.peer.channel import Channel
from sysctr.peer.dial import client_context
from sysctr.peer.identity import Identity


def server_context(own: Identity, *trusted: Identity) -> ssl.SSLContext:
    """Return a context as the server of a host has it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.load_cert_chain(own.path)
    context.verify_mode = ssl.CERT_OPTIONAL
    if trusted:
        context.load_verify_locations(cadata="".join(one.certificate for one in trusted))
    return context


def in_thread(function, *arguments) -> Future:
    """Run a function in a thread and return what will have its result."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def tls_pair(own: Identity) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    """Return the two ends of a TLS connection after the handshake, both blocking."""
    left, right = _tcp_pair()
    accepted = in_thread(lambda: server_context(own).wrap_socket(right, server_side=True))
    secure = client_context(None).wrap_socket(left)
    return secure, accepted.result(10)


@contextlib.contextmanager
def channels(own: Identity) -> Iterator[tuple[Channel, Channel]]:
    """Two channels that are the ends of one connection."""
    first, second = tls_pair(own)
    left, right = Channel(first, "", "right"), Channel(second, "", "left")
    try:
        yield left, right
    finally:
        left.close()
        right.close()


@contextlib.contextmanager
def raw_and_channel(own: Identity) -> Iterator[tuple[ssl.SSLSocket, Channel]]:
    """A TLS socket that a test writes to, and the channel at its other end."""
    raw, sock = tls_pair(own)
    channel = Channel(sock, "", "the raw end")
    try:
        yield raw, channel
    finally:
        channel.close()
        raw.close()


def make_identity(directory: object) -> Identity:
    """Return a new identity below a directory."""
    return identity.make(str(directory))


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    # Not socketpair(): the options of TCP are part of what is tried.
    with socket.create_server(("127.0.0.1", 0)) as listening:
        left = socket.create_connection(listening.getsockname())
        right, _ = listening.accept()
    return left, right
