"""What the other side of a migration may answer; none of it is believed before it was read here."""

from typing import Any

from sysctr import __version__
from sysctr.engine.handover import Target
from sysctr.errors import SysctrError
from sysctr.peer.channel import Channel
from sysctr.peer.message import Flag, Items, Maybe, Shape, Speakers, Table, Text, Whole

_LINE = Text(4096)
_NAME = Text(64)
_NUMBER = Maybe(Whole())
_ANSWER = Text(32)
_BLOCKER = Shape({"what": _NAME, "text": _LINE, "hint": _LINE})
_PLACED = Shape(
    {"source": _NAME, "pool": _NAME, "method": Text(choices=("rsync", "stream")), "expected_bytes": _NUMBER}
)
_NOTHING = Shape({})
_BEGUN = Shape({"phase": Text(choices=tuple(Target)), "kept": Items(_NAME, 1000)})

_ANSWERS = {
    "check": Shape(
        {
            "id": _NUMBER, "name": _NAME, "pool": _NAME, "volumes": Items(_PLACED), "addresses": Table(_NAME),
            "blockers": Items(_BLOCKER, 4096), "warnings": Items(_LINE, 4096), "template": Text(128),
        }
    ),
    "template": Shape({"have": Flag()}),
    "begin": _BEGUN,
    "sync": _NOTHING,
    "sync.end": Shape({}, {"digest": Text(64)}),
    "stream": _NOTHING,
    "stream.end": _NOTHING,
    "turn": _NOTHING,
    "keep": _NOTHING,
    "prepare": Shape({"answer": _ANSWER}),
    "commit": Shape(
        {"answer": _ANSWER},
        {
            "id": Whole(), "name": _NAME, "started": Flag(), "addresses": Items(_NAME),
            "notes": Items(_LINE, 4096), "error": _LINE,
        },
    ),
    "abort": Shape({"answer": _ANSWER}),
    "forget": Shape({"answer": _ANSWER}),
    "outcome": Shape({"outcome": Text(choices=("pending", "committed", "aborted")), "start": Flag()}),
    "replica.begin": _BEGUN,
    "replica.keep": Shape({"number": Whole()}),
    "replica.status": Shape({"known": Flag(), "promoted": Flag(), "generation": Whole()}),
    "replica.source": Shape({"known": Flag()}),
}  # fmt: skip


def read_answer(channel: Channel, op: str, told: dict[str, Any]) -> dict[str, Any]:
    """Return what a peer has answered to a question; a SysctrError says what is wrong with it.

    What a newer host says beyond that is left out: it was asked what this one asks.
    """
    shape = _ANSWERS[op.removeprefix("migrate.")]
    known = {key: value for key, value in told.items() if key in shape.required or key in shape.optional}
    speakers = Speakers(channel.name, str(channel.hello.get("version", "?")), __version__)
    return speakers.read(shape, known, f"the answer to {op}")


def read_verdict(channel: Channel, told: dict[str, Any], native: dict[str, bool]) -> dict[str, Any]:
    """Return what a peer would make of an offer; `native` are its volumes, and which can be streams."""
    verdict = read_answer(channel, "check", told)
    placed = {one["source"]: one["method"] for one in verdict["volumes"]}
    if placed.keys() != native.keys() or len(placed) != len(verdict["volumes"]):
        raise SysctrError(f"cannot understand {channel.name}: it speaks of other volumes")
    if any(method == "stream" and not native[name] for name, method in placed.items()):
        raise SysctrError(f"cannot understand {channel.name}: it wants streams that there are none of")
    return verdict
