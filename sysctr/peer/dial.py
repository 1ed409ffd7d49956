"""Calling another host: the first of its addresses that answers, if it is the host that we mean."""

import contextlib
import hmac
import re
import socket
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from sysctr.errors import SysctrError, UsageError
from sysctr.peer.channel import Channel, NotTrusted, PeerLost
from sysctr.peer.identity import Identity
from sysctr.peer.wire import handshake, tune

if TYPE_CHECKING:
    import ssl

DEFAULT_PORT = 8645
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([^:\[\]\s/@]{1,253}))(?::([0-9]{1,5}))?")
_CONNECT_S = 5.0


def parse_address(text: str, port: int = DEFAULT_PORT) -> tuple[str, int]:
    """Read where a host is called; `port` is that of an address without one.

    >>> parse_address("[2001:db8::1]:8700"), parse_address("192.0.2.1")
    (('2001:db8::1', 8700), ('192.0.2.1', 8645))
    """
    found = _ADDRESS.fullmatch(text)
    port = int((found and found[3]) or port)
    if found is None or not 0 < port < 65536:
        shown = ascii(text[:80])
        raise UsageError(f"cannot use address {shown}: it is not written HOST:PORT or [IPV6]:PORT")
    return found[1] or found[2], port


def format_address(host: str, port: int) -> str:
    """Write where a host is called.

    >>> format_address("2001:db8::1", 8645)
    '[2001:db8::1]:8645'
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def dial(
    addresses: Iterable[str],
    fingerprints: "str | Iterable[str]",
    identity: Identity | None,
    timeout_s: float = 20.0,
    *,
    name: str = "",
) -> Channel:
    """Return a connection to the host that has one of these fingerprints; nothing is said to another one.

    Without an identity we show no certificate. Raises PeerLost when it cannot be reached, and NotTrusted when
    another host answers.
    """
    known = (fingerprints,) if isinstance(fingerprints, str) else tuple(fingerprints)
    deadline_s = time.monotonic() + timeout_s
    failures: list[SysctrError] = []
    where = tuple(addresses)
    for address in where:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            break
        try:
            return _dial_one(address, known, identity, left_s, name)
        except SysctrError as error:
            failures.append(error)
    who = name or "the other host"
    if not where:
        raise PeerLost(f"cannot reach {who}: no address of it is known")
    # That somebody answers, but the wrong one, says more than that nobody does elsewhere.
    for error in failures:
        if isinstance(error, NotTrusted):
            raise error
    reasons = "; ".join(error.message for error in failures) or "no time was left"
    raise PeerLost(f"cannot reach {who}: {reasons}", "is its daemon running, and may its port be reached?")


def _dial_one(
    address: str, known: tuple[str, ...], identity: Identity | None, left_s: float, name: str
) -> Channel:
    host, port = parse_address(address)
    try:
        plain = socket.create_connection((host, port), min(left_s, _CONNECT_S))
    except (OSError, UnicodeError) as error:
        reason = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None)
        raise PeerLost(f"{address}: {str(reason or error).lower()}") from error
    try:
        tune(plain)
        secure = client_context(identity).wrap_socket(plain, do_handshake_on_connect=False)
        plain = secure
        handshake(secure, time.monotonic() + min(left_s, 2 * _CONNECT_S))
    except (OSError, ValueError) as error:
        plain.close()
        reason = str(getattr(error, "reason", None) or error).replace("_", " ").lower()
        raise PeerLost(f"{address}: {reason}") from error
    try:
        # The handshake has proved that it has the key of this certificate.
        found = certificate_fingerprint(secure)
        if not any(hmac.compare_digest(found, one) for one in known):
            raise NotTrusted(
                f"cannot talk to {name or 'the other host'}: another host answers at {address}",
                "its certificate is not the one that is trusted",
            )
        return Channel(secure, found, name or address)
    except BaseException:
        with contextlib.suppress(OSError):
            secure.close()
        raise


def client_context(identity: Identity | None) -> "ssl.SSLContext":
    """Return how we call others."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    # There is no authority to ask: the certificate is compared with the one that we know.
    context.verify_mode = ssl.CERT_NONE
    if identity is not None:
        context.load_cert_chain(identity.path)
    return context


def certificate_fingerprint(sock: "ssl.SSLSocket") -> str:
    """Return the fingerprint of the other side's certificate; empty where it has shown none."""
    import hashlib

    der = sock.getpeercert(binary_form=True)
    return hashlib.sha256(der).hexdigest() if der else ""
