"""Frames: what a connection between hosts is cut into. One byte of kind, four of length, and the body."""

import json
import re
import struct
from typing import Any

from sysctr.errors import SysctrError, from_dict

HEADER = struct.Struct(">cI")

MESSAGE = b"J"
PIECE = b"D"  # of a stream; an empty one is a sign of life
END = b"E"  # of that direction of a stream
BROKEN = b"X"  # both directions of a stream end, for the reason in it

MESSAGE_LIMIT_BYTES = 16 << 20
# Of who has not shown yet that it is somebody: a token, or a greeting.
FIRST_LIMIT_BYTES = 64 << 10
PIECE_LIMIT_BYTES = 1 << 20
BROKEN_LIMIT_BYTES = 64 << 10
LIMITS = {MESSAGE: MESSAGE_LIMIT_BYTES, PIECE: PIECE_LIMIT_BYTES, END: 0, BROKEN: BROKEN_LIMIT_BYTES}

# Each value of a message takes up to a hundred bytes of memory, and may have been two in the message.
_MOST_VALUES = 400_000
_TEXT_LIMIT = 4096
_CODE = re.compile(r"[a-z][a-z-]{0,31}")


class Garbled(Exception):
    """What came is no frame, or not one that may come now."""


def parse_header(data: "bytes | memoryview", allowed: bytes) -> tuple[bytes, int]:
    """Return kind and length of a frame, if it is one of those allowed.

    >>> parse_header(b"E" + bytes(4), b"DE")
    (b'E', 0)
    """
    kind, length = HEADER.unpack(data)
    if kind not in LIMITS or kind not in allowed:
        raise Garbled("it sends what is no frame" if kind not in LIMITS else "it sends what is not expected")
    if length > LIMITS[kind]:
        raise Garbled(f"it sends {length} bytes at once")
    return kind, length


def pack(kind: bytes, body: bytes = b"") -> bytes:
    """Return a frame."""
    return HEADER.pack(kind, len(body)) + body


def encode(message: dict[str, Any]) -> bytes:
    """Return a message as a frame; ValueError for one that no JSON can hold, or that is too long."""
    body = json.dumps(message, separators=(",", ":"), allow_nan=False).encode("ascii")
    if len(body) > MESSAGE_LIMIT_BYTES:
        raise ValueError(f"a message of {len(body)} bytes")
    return pack(MESSAGE, body)


def decode(body: bytes) -> dict[str, Any]:
    """Return the message in a frame's body; Garbled for what is no JSON object."""
    # Every value but the first of each list and object has a comma before it.
    if sum(map(body.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise Garbled("it sends a message of too many values")
    try:
        message = json.loads(body.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise Garbled("it sends what is no message") from error
    if not isinstance(message, dict):
        raise Garbled("it sends what is no message")
    return message


def encode_error(error: BaseException) -> bytes:
    """Return the frame that breaks a stream off for a reason."""
    told = error.as_dict() if isinstance(error, SysctrError) else {"message": "the stream was broken off"}
    return pack(BROKEN, json.dumps(told).encode("ascii")[:BROKEN_LIMIT_BYTES])


def read_error(told: object) -> SysctrError:
    """Return the error that the other side tells of, whatever it put there.

    >>> read_error({"code": "no-space", "message": "cannot receive 101: no room"}).http_status
    507
    """
    if not isinstance(told, dict):
        return from_dict({})
    words = {name: text[:_TEXT_LIMIT] for name, text in told.items() if isinstance(text, str)}
    if not _CODE.fullmatch(words.get("code", "")):
        words["code"] = SysctrError.code
    return from_dict({name: words[name] for name in ("code", "message", "hint") if name in words})


def decode_error(body: bytes) -> SysctrError:
    """Return the error in the frame that broke a stream off."""
    try:
        return read_error(decode(body))
    except Garbled:
        return from_dict({})


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found
