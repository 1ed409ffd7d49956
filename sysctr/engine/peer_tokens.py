"""Tokens, each of which makes two hosts trust each other once.

lib/peer/tokens.json    the hash of each token's secret, until when it holds, and whether it was used

The text of a token says where this host is, which certificate it has, and the secret. It is shown once.
"""

import base64
import binascii
import hashlib
import hmac
import json
import logging
import os
import secrets
import threading
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from sysctr.errors import Refused, SysctrError, UsageError
from sysctr.linux import files, process
from sysctr.paths import Layout
from sysctr.peer.dial import format_address, parse_address
from sysctr.peer.message import Items, Mismatch, Real, Shape, Text, Whole

log = logging.getLogger(__name__)

PREFIX = "sysctr1."
TEXT_LIMIT = 8192
LEAST_EXPIRES_S = 1
MOST_EXPIRES_S = 30 * 86400
_LIMIT_BYTES = 1 << 20
_MOST_TOKENS = 256
# So long a token that is of no use any more is remembered, to say why.
_REMEMBERED_S = 7 * 86400
_SECRET_BYTES = 32

FINGERPRINT = Text(64, pattern="[0-9a-f]{64}")
ADDRESSES = Items(Text(300), 16)
_CONTENT = Shape(
    {
        "v": Whole(1, 1), "name": Text(255), "addresses": ADDRESSES, "fingerprint": FINGERPRINT,
        "secret": Text(64, pattern="[A-Za-z0-9_-]{43}"), "expires": Real(0, 1e12),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Token:
    """What the text of a token says."""

    name: str
    addresses: tuple[str, ...]
    fingerprint: str
    secret: str
    expires: float


@dataclass(frozen=True)
class _Kept:
    hash: str
    expires: float
    used: bool = False


class Tokens:
    """The tokens that this host has given out."""

    def __init__(self, where: Layout) -> None:
        self._path = f"{where.peer}/tokens.json"
        self._lock = threading.Lock()
        self._kept: list[_Kept] = []

    def load(self) -> None:
        """Read what is known; of a file with a mistake no token holds."""
        try:
            data, _ = files.read_bounded(self._path, _LIMIT_BYTES)
            kept = [
                _Kept(str(one["hash"]), float(one["expires"]), bool(one["used"]))
                for one in json.loads(data)["tokens"]
            ]
        except FileNotFoundError:
            kept = []
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            log.error("%s: %s", self._path, error)
            kept = []
        with self._lock:
            self._kept = kept

    def make(self, expires: float) -> str:
        """Return the secret of a new token."""
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        with self._lock:
            now_s = time.time()
            kept = [one for one in self._kept if one.expires > now_s - _REMEMBERED_S]
            if sum(_holds(one, now_s) for one in kept) >= _MOST_TOKENS:
                raise Refused(f"cannot make a token: {_MOST_TOKENS} are unused", "wait until they expire")
            self._write([*kept, _Kept(_hash(secret), expires)][-2 * _MOST_TOKENS :])
        return secret

    def next_expiry(self) -> float | None:
        """Return until when the last token that can be used holds; None where there is none."""
        with self._lock:
            now_s = time.time()
            return max((one.expires for one in self._kept if _holds(one, now_s)), default=None)

    def consume(self, secret: str) -> None:
        """Use a token up, on the disk when this returns; raises Refused for one that does not hold."""
        wanted = _hash(secret)
        with self._lock:
            # All are compared, so that the time says nothing.
            found = [one for one in self._kept if hmac.compare_digest(one.hash, wanted)]
            if not found:
                raise WrongToken("cannot join: the token is not one of this host", "make a new one there")
            if found[0].used:
                raise Refused("cannot join: the token was used already", "make a new one there")
            if found[0].expires <= time.time():
                raise Refused("cannot join: the token has expired", "make a new one there")
            self._write([replace(one, used=one.used or one == found[0]) for one in self._kept])

    def drop(self) -> None:
        """Let no token hold any more: they name a certificate that this host has no longer."""
        with self._lock:
            if self._kept:
                self._write([])

    def _write(self, kept: list[_Kept]) -> None:
        try:
            os.makedirs(os.path.dirname(self._path), 0o700, exist_ok=True)
            data = json.dumps({"schema": 1, "tokens": [asdict(one) for one in kept]}).encode() + b"\n"
            files.write_atomically(self._path, data)
        except OSError as error:
            raise SysctrError(f"cannot write {self._path}: {error.strerror}") from error
        self._kept = kept


class WrongToken(Refused):
    """The secret is not that of any token: somebody guesses, or mistook the host."""


def encode(token: Token) -> str:
    """Return the text of a token."""
    content = {"v": 1, **asdict(token)}
    data = json.dumps(content, separators=(",", ":")).encode()
    return PREFIX + base64.urlsafe_b64encode(data).decode().rstrip("=")


def decode(text: str) -> Token:
    """Read a token; UsageError never shows any of it."""
    text = "".join(text.split())
    if not text.startswith(PREFIX) or len(text) > TEXT_LIMIT:
        raise UsageError("cannot join: this is no token", "`sysctr peer token` on the other host prints one")
    body = text.removeprefix(PREFIX)
    try:
        data = base64.b64decode(body + "=" * (-len(body) % 4), b"-_", validate=True)
        content = _CONTENT.check(json.loads(data))
    except (binascii.Error, ValueError, RecursionError, Mismatch):
        # Without the cause, which would have the content.
        raise UsageError("cannot join: the token is not whole", "copy all of it") from None
    content.pop("v")
    return Token(**{**content, "addresses": tuple(content["addresses"])})


def check_expiry(expires_s: float) -> None:
    """Raise UsageError where a token cannot hold for so long."""
    if not LEAST_EXPIRES_S <= expires_s <= MOST_EXPIRES_S:
        raise UsageError(
            f"cannot make a token for {expires_s:g} s: it is from {LEAST_EXPIRES_S} to {MOST_EXPIRES_S} s"
        )


def own_addresses(port: int, bridge: str) -> tuple[str, ...]:
    """Return where this host may be reached: its global addresses, but for the one on our bridge.

    Those where its default route leads come first: the others may be for what is on this host alone.
    """
    try:
        links = json.loads(process.run(["ip", "-json", "address", "show", "up"], timeout_s=10).stdout)
        routes = json.loads(process.run(["ip", "-json", "route", "show", "default"], timeout_s=10).stdout)
    except (SysctrError, ValueError) as error:
        log.warning("cannot find the addresses of this host: %s", error)
        return ()
    outwards = {route.get("dev") for route in routes}
    found = [
        (link.get("ifname") not in outwards, address["family"] != "inet", address["local"])
        for link in links
        if link.get("ifname") != bridge
        for address in link.get("addr_info", ())
        if address.get("scope") == "global" and not address.get("temporary") and "local" in address
    ]
    return tuple(dict.fromkeys(format_address(local, port) for _, _, local in sorted(found)))[:16]


def with_port(addresses: "tuple[str, ...] | list[str]", port: int) -> tuple[str, ...]:
    """Return addresses that were given, each with a port; raises UsageError for what is none."""
    return tuple(dict.fromkeys(format_address(*parse_address(text, port)) for text in addresses))


def _holds(kept: _Kept, now_s: float) -> bool:
    return not kept.used and kept.expires > now_s


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def as_told(token: Token, text: str) -> dict[str, Any]:
    """Return a new token for the API."""
    return {
        "token": text, "expires": token.expires, "fingerprint": token.fingerprint,
        "addresses": list(token.addresses),
    }  # fmt: skip
