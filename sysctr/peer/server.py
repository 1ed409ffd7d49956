"""Being called by other hosts: a thread for each connection, and little for those who do not prove a thing.

Whoever has no certificate that we know gets one of few places and little time, and when these are taken the
oldest one gives way, of the address that has most of them. So a flood keeps nobody else from getting through.
"""

import collections
import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from sysctr.errors import SysctrError
from sysctr.peer.channel import Channel
from sysctr.peer.dial import certificate_fingerprint, format_address
from sysctr.peer.identity import Identity
from sysctr.peer.wire import handshake, tune

if TYPE_CHECKING:
    import ssl

log = logging.getLogger(__name__)

HANDSHAKE_S = 10.0
MOST_STRANGERS = 16
MOST_KNOWN = 64
MOST_OF_ONE = 24
_BACKLOG = 128
# Out of descriptors, accept() fails at once and would be tried again at once.
_PAUSE_S = 0.2
_CLOSE_S = 5.0


class _Guest:
    """One connection: who it is from, and whether it has shown who that is."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.sock = sock
        self.address = address
        self.fingerprint = ""
        self.thread: threading.Thread | None = None

    def turn_out(self) -> None:
        """End the connection from another thread, which may not touch its TLS."""
        with contextlib.suppress(OSError):
            # A TLS socket's own shutdown() would let its owner go on without TLS.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)


class Server:
    """Listens at one address while it is wanted; `serve` gets each connection after its handshake."""

    def __init__(
        self,
        identity: Callable[[], Identity],
        certificates: Callable[[], list[str]],
        serve: Callable[[Channel], None],
    ) -> None:
        self._identity = identity
        self._certificates = certificates
        self._serve = serve
        self._lock = threading.Lock()
        self._guests: list[_Guest] = []
        self._listening: socket.socket | None = None
        self._accepting: threading.Thread | None = None
        self._context: tuple[object, ssl.SSLContext] | None = None
        self.address: tuple[str, int] | None = None

    def listen(self, host: str, port: int) -> None:
        """Listen here; raises SysctrError where that cannot be."""
        sock = _listener(host, port)
        self._listening = sock
        self.address = (host, sock.getsockname()[1])
        self._accepting = threading.Thread(
            target=self._accept, args=(sock,), name="peers", daemon=True
        )
        self._accepting.start()

    def close(self) -> None:
        """Listen no more and end all connections."""
        with self._lock:
            sock, self._listening, self.address = self._listening, None, None
            guests = list(self._guests)
        if sock is None:
            return
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        for guest in guests:
            guest.turn_out()
        deadline_s = time.monotonic() + _CLOSE_S
        for thread in (self._accepting, *(guest.thread for guest in guests)):
            if thread is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline_s - time.monotonic()))
        sock.close()

    def turn_out(self, fingerprint: str) -> None:
        """End the connections of a host that is not trusted any more, but for the one that asks for it."""
        with self._lock:
            guests = [one for one in self._guests if one.fingerprint == fingerprint]
        for guest in guests:
            if guest.thread is not threading.current_thread():
                guest.turn_out()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                sock, address = listening.accept()
            except OSError as error:
                if self._listening is not listening:
                    return
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    log.error("cannot take a connection of another host: %s", error.strerror)
                    time.sleep(_PAUSE_S)
                continue
            guest = _Guest(sock, address[0].removeprefix("::ffff:"))
            guest.thread = threading.Thread(
                target=self._attend, args=(guest,), name=f"peer {guest.address}", daemon=True
            )
            with self._lock:
                out = _one_too_many([one for one in self._guests if not one.fingerprint], guest)
                self._guests.append(guest)
            if out is not None:
                out.turn_out()
            try:
                guest.thread.start()
            except RuntimeError:
                # Out of threads; whoever comes later must find somebody who accepts.
                log.error("cannot take a connection of another host: no thread can be started")
                with self._lock:
                    self._guests.remove(guest)
                sock.close()
                time.sleep(_PAUSE_S)

    def _attend(self, guest: _Guest) -> None:
        try:
            sock = guest.sock
            tune(sock)
            context = self._server_context()
            guest.sock = secure = context.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False
            )
            handshake(secure, time.monotonic() + HANDSHAKE_S)
            fingerprint = certificate_fingerprint(secure)
            if not self._let_in(guest, fingerprint):
                return
            channel = Channel(secure, fingerprint, guest.address)
            try:
                self._serve(channel)
            finally:
                channel.close()
        except (OSError, ValueError) as error:
            # Whatever scans the network comes along here, too.
            reason = str(getattr(error, "reason", None) or error).replace("_", " ").lower()
            log.debug("a connection from %s: %s", guest.address, reason)
        except SysctrError as error:
            log.info("a connection from %s: %s", guest.address, error.message)
        except Exception:
            log.exception("a connection from %s", guest.address)
        finally:
            with self._lock:
                self._guests.remove(guest)
            with contextlib.suppress(OSError):
                guest.sock.close()

    def _let_in(self, guest: _Guest, fingerprint: str) -> bool:
        """Give a host that has shown who it is a place of its own, if it has not too many."""
        if not fingerprint:
            return True
        with self._lock:
            of_it = sum(one.fingerprint == fingerprint for one in self._guests)
            known = sum(bool(one.fingerprint) for one in self._guests)
            if of_it >= MOST_OF_ONE or known >= MOST_KNOWN:
                log.warning("turned a connection from %s away: there are %d", guest.address, known)
                return False
            guest.fingerprint = fingerprint
            return True

    def _server_context(self) -> "ssl.SSLContext":
        """Return how others are received; made anew when those whom we know have changed."""
        import ssl

        identity, certificates = self._identity(), tuple(self._certificates())
        made_of = (identity, certificates)
        with self._lock:
            if self._context is None or self._context[0] != made_of:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.minimum_version = ssl.TLSVersion.TLSv1_3
                # A ticket would let a host go on that was removed meanwhile.
                context.num_tickets = 0
                context.load_cert_chain(identity.path)
                context.verify_mode = ssl.CERT_OPTIONAL
                if certificates:
                    context.load_verify_locations(cadata="".join(certificates))
                self._context = (made_of, context)
            return self._context[1]


def _one_too_many(strangers: list[_Guest], new: _Guest) -> _Guest | None:
    """Return the one that has to give way to a new one, if all places are taken."""
    if len(strangers) < MOST_STRANGERS:
        return None
    counts = collections.Counter(one.address for one in strangers)
    most = max(counts.values())
    # Where all have one, and the new one's address has another: that one.
    address = next(one.address for one in strangers if counts[one.address] == most)
    if counts[new.address] == most:
        address = new.address
    return next(one for one in strangers if one.address == address)


def _listener(host: str, port: int) -> socket.socket:
    where = format_address(host, port)
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICHOST
        )
        family, address = found[0][0], found[0][4]
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        except OSError:
            if host != "::":
                raise
            # A kernel without IPv6: everywhere is then all of IPv4.
            family, address = socket.AF_INET, ("0.0.0.0", port)
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
            sock.bind(address)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise SysctrError(
            f"cannot listen for other hosts at {where}: {(error.strerror or str(error)).lower()}",
            "see [peer] listen in host.toml",
        ) from error
    return sock
