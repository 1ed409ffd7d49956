"""What a host says of a container that it wants to hand over: pure data, and hostile until it was read here.

    {"uuid": …, "number": 101, "config": "the text of its file", "volumes": […], "snapshots": […], …}

Both sides speak of volumes by the names that the source has; what they are called here is the target's own
business.
"""

import json
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sysctr.config import schema, toml, values
from sysctr.engine.record import Guest
from sysctr.errors import ConfigError, UsageError
from sysctr.storage.volumes import check_snapshot, check_volume

# More than a container can have; each costs the target at least a file.
_MOST_VOLUMES = 64
_MOST_SNAPSHOTS = 1000
MOST_GENERATIONS = 1 << 53
_LARGEST_BYTES = 1 << 60
_TEXT = re.compile(r"[^\x00-\x1f\x7f]{0,256}")
_FIREWALL_LIMIT = 1 << 20
LEAVABLE = ("bind", "device")


@dataclass(frozen=True)
class Wishes:
    """What whoever moves a container wants of the target, which may refuse it."""

    number: int | None = None
    name: str = ""
    pools: Mapping[str, str] = field(default_factory=dict)
    bridges: Mapping[str, str] = field(default_factory=dict)
    leave_out: tuple[str, ...] = ()
    # A copy gets an identity of its own, and the original stays what it is.
    copy: bool = False
    start: bool = False


@dataclass(frozen=True)
class OfferedVolume:
    """A volume of the container; `pool` and `kind` (its driver's) are those of the source."""

    name: str
    pool: str
    kind: str
    root: bool = False
    native: bool = False
    size_bytes: int | None = None
    # All its files together, and those that are not the template's; None where nobody counted.
    total_bytes: int | None = None
    own_bytes: int | None = None


@dataclass(frozen=True)
class OfferedSnapshot:
    """A state that is kept, of the volumes named; its configuration is judged as the present one is."""

    name: str
    created: float
    parents: Mapping[str, str] = field(default_factory=dict)  # of each volume, what it goes back to
    config: str = ""
    description: str = ""
    expires: float | None = None
    automatic: bool = False
    running: bool = False
    generation: int = 1


@dataclass(frozen=True)
class Offer:
    """A container as it is offered."""

    number: int
    uuid: str
    generation: int
    created: float
    config: str
    template: str
    guest: Guest
    arch: str
    running: bool
    volumes: tuple[OfferedVolume, ...]
    snapshots: tuple[OfferedSnapshot, ...] = ()
    # By the index of the card.
    addresses: Mapping[str, str] = field(default_factory=dict)
    firewall: str = ""
    wishes: Wishes = field(default_factory=Wishes)

    @property
    def name(self) -> str:
        """Return what the container is called at its source."""
        return schema.parse_config(toml.read_container(self.config)).name

    @property
    def root(self) -> OfferedVolume:
        """Return the volume of its root."""
        return next(one for one in self.volumes if one.root)

    def as_dict(self) -> dict[str, Any]:
        """Return the offer as it is sent, and as `parse_offer` takes it."""
        # A message has lists, not tuples.
        sent: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return sent

    def own_part(self, name: str) -> str:
        """Return what follows the number in the name of a volume, empty for the root.

        A root that was restored in place has another name than its number, and is called by that again.
        """
        return "" if name == self.root.name else name.removeprefix(str(self.number))


def parse_offer(data: object) -> Offer:
    """Read what a peer offers; raises UsageError that says what of it does not hold."""
    try:
        offer = _read(Offer, data, "offer", _OFFER)
        values.check_container_id(offer.number)
        if str(uuid.UUID(offer.uuid)) != offer.uuid:
            raise ValueError("its uuid does not hold")
        if offer.guest.init:
            values.parse_path(offer.guest.init)
        if offer.guest.stop_signal:
            values.parse_signal(offer.guest.stop_signal)
        _check_volumes(offer)
        _check_snapshots(offer)
        schema.parse_config(toml.read_container(offer.config))
        if offer.wishes.number is not None:
            values.check_container_id(offer.wishes.number)
        if offer.wishes.name:
            values.parse_name(offer.wishes.name)
    except (ConfigError, UsageError) as error:
        raise UsageError(f"cannot accept the container that is offered: {error.message}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"cannot accept the container that is offered: {error}") from error
    return offer


def _check_volumes(offer: Offer) -> None:
    names = [check_volume(one.name) for one in offer.volumes]
    if len(set(names)) != len(names) or sum(one.root for one in offer.volumes) != 1:
        raise ValueError("its volumes do not hold")
    for one in offer.volumes:
        own = offer.own_part(one.name)
        if not one.root and not re.fullmatch(r"-[a-z0-9][a-z0-9._-]{0,50}", own):
            raise ValueError(f"{values.shown(one.name)} is no volume of {offer.number}")


def _check_snapshots(offer: Offer) -> None:
    volumes = {one.name for one in offer.volumes}
    known: set[str] = set()
    for one in offer.snapshots:
        check_snapshot(one.name)
        if one.name in known or one.name.startswith("tmp-"):
            raise ValueError(f"snapshot {one.name} is there twice, or is none")
        if offer.root.name not in one.parents or not one.parents.keys() <= volumes:
            raise ValueError(f"snapshot {one.name} is of other volumes")
        if not set(one.parents.values()) <= known | {""}:
            raise ValueError(f"snapshot {one.name} goes back to one that does not come before it")
        if one.config:
            schema.parse_config(toml.read_container(one.config))
        known.add(one.name)


def _text(limit: int = 256, *, lines: bool = False) -> Callable[[object, str], Any]:
    def check(value: object, name: str) -> str:
        if not isinstance(value, str) or len(value) > limit or not (lines or _TEXT.fullmatch(value)):
            raise ValueError(f"its {name} does not hold")
        return value

    return check


def _number(low: float, high: float, *, whole: bool = True, optional: bool = False) -> Callable:
    kinds = (int,) if whole else (int, float)

    def check(value: object, name: str) -> Any:
        if optional and value is None:
            return None
        if type(value) not in kinds or not low <= value <= high:  # type: ignore[operator]
            raise ValueError(f"its {name} does not hold")
        return value if whole else float(value)  # type: ignore[arg-type]

    return check


def _flag(value: object, name: str) -> bool:
    if type(value) is not bool:
        raise ValueError(f"its {name} does not hold")
    return value


def _names(value: object, name: str) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > _MOST_VOLUMES:
        raise ValueError(f"its {name} does not hold")
    check = _text(64)
    return {check(key, name): check(one, name) for key, one in value.items()}


def _leave_out(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not set(map(str, value)) <= set(LEAVABLE):
        raise ValueError(f"its {name} does not hold")
    return tuple(map(str, value))


def _many(kind: type, checks: Mapping[str, Callable], most: int) -> Callable[[object, str], tuple]:
    def check(value: object, name: str) -> tuple:
        if not isinstance(value, list) or len(value) > most:
            raise ValueError(f"its {name} are not a list of at most {most}")
        return tuple(_read(kind, one, name, checks) for one in value)

    return check


def _one(kind: type, checks: Mapping[str, Callable]) -> Callable[[object, str], Any]:
    return lambda value, name: _read(kind, value, name, checks)


def _read(kind: type, data: object, what: str, checks: Mapping[str, Callable]) -> Any:
    """Make a dataclass of what a peer sent; it has to have every field and no other."""
    if not isinstance(data, dict):
        raise ValueError(f"its {what} is no object")
    wanted = {one.name for one in fields(kind)}
    for name in data.keys() - wanted:
        raise ValueError(f"unknown field {values.shown(name)} in its {what}: upgrade sysctr here")
    for name in sorted(wanted - data.keys()):
        raise ValueError(f"field {name} is missing in its {what}: upgrade sysctr there")
    return kind(**{name: checks[name](data[name], name) for name in wanted})


_BYTES = _number(0, _LARGEST_BYTES, optional=True)
_TIME = _number(0, 1e12, whole=False)
_CONFIG = _text(toml.LONGEST_FILE_BYTES, lines=True)
_GENERATION = _number(0, MOST_GENERATIONS)
_VOLUME = {
    "name": _text(64), "pool": _text(64), "kind": _text(32), "root": _flag, "native": _flag,
    "size_bytes": _number(1, _LARGEST_BYTES, optional=True), "total_bytes": _BYTES, "own_bytes": _BYTES,
}  # fmt: skip
_SNAPSHOT = {
    "name": _text(64), "created": _TIME, "parents": _names, "config": _CONFIG, "description": _text(1024),
    "expires": _number(0, 1e12, whole=False, optional=True), "automatic": _flag, "running": _flag,
    "generation": _GENERATION,
}  # fmt: skip
_WISHES = {
    "number": _number(0, 1 << 31, optional=True), "name": _text(64), "pools": _names, "bridges": _names,
    "leave_out": _leave_out, "copy": _flag, "start": _flag,
}  # fmt: skip
_GUEST = {one.name: _text() for one in fields(Guest)}
_OFFER = {
    "number": _number(0, 1 << 31), "uuid": _text(64), "generation": _GENERATION, "created": _TIME,
    "config": _CONFIG, "template": _text(128), "guest": _one(Guest, _GUEST), "arch": _text(32),
    "running": _flag, "volumes": _many(OfferedVolume, _VOLUME, _MOST_VOLUMES),
    "snapshots": _many(OfferedSnapshot, _SNAPSHOT, _MOST_SNAPSHOTS), "addresses": _names,
    "firewall": _text(_FIREWALL_LIMIT, lines=True), "wishes": _one(Wishes, _WISHES),
}  # fmt: skip
