"""What sysctr knows of one container beyond its configuration, and the text of it, record.json."""

import hashlib
import json
import time
import uuid
from dataclasses import dataclass, fields
from typing import Any

from sysctr.config import toml, values
from sysctr.config.schema import Container, parse_config
from sysctr.config.values import shown
from sysctr.engine.ids import IdRange
from sysctr.engine.naming import title
from sysctr.errors import ConfigError, WrongState

SCHEMA = 1

_TYPES: dict[str, tuple[type, ...]] = {
    "id": (int,),
    "uuid": (str,),
    "name": (str,),
    "created": (int, float),
    "idmap_first": (int,),
    "idmap_count": (int,),
    "generation": (int,),
    "template": (str,),
    "pool": (str,),
    "volume": (str,),
    "boot_config": (str,),
    "addresses": (list,),
    "exit": (dict, type(None)),
    "guest": (dict, type(None)),
    "last_backup": (dict, type(None)),
    "away": (dict, type(None)),
    "replica": (dict, type(None)),
}
_REQUIRED = ("id", "uuid", "name", "created", "idmap_first", "idmap_count")


@dataclass(frozen=True)
class Saved:
    """What record.json holds: every field, by its name."""

    id: int
    uuid: str
    name: str
    created: float
    idmap_first: int
    idmap_count: int
    generation: int = 1
    template: str = ""
    pool: str = "default"
    volume: str = ""
    # The configuration that the container was last started with: what differs now waits for a restart.
    boot_config: str = ""
    addresses: tuple[str, ...] = ()
    # How it ended last: {"reason": "halt", "status": 0}.
    exit: dict[str, Any] | None = None
    # What is in a rootfs that was made of no template here: the fields of Guest.
    guest: dict[str, Any] | None = None
    # Its last backup that was made: {"time": …, "archive": path, "size_bytes": …}.
    last_backup: dict[str, Any] | None = None
    # Another host has it, and here it must not run: {"id": of the migration, "peer": that host's id,
    # "name": how it is called here, "time": …}.
    away: dict[str, Any] | None = None
    # Its copy on another host that is brought up to date now and then: see engine/replication.py.
    replica: dict[str, Any] | None = None


@dataclass(frozen=True)
class Guest:
    """What is known of the distribution inside: its init, how that is shut down, and what it is called."""

    init: str = ""
    init_kind: str = ""
    stop_signal: str = ""
    arch: str = ""
    os_id: str = ""


@dataclass(frozen=True)
class Record(Saved):
    """A container as the state has it: what was saved, and its configuration as the file says now."""

    config: Container | None = None
    config_text: str = ""
    # Why this container cannot be used; it is listed and can be destroyed all the same.
    error: str = ""

    @property
    def damaged(self) -> bool:
        """Tell whether record.json cannot be read, so that only number and name are known."""
        return not self.uuid

    @property
    def title(self) -> str:
        """Return what errors and tasks call this container: its name and its number."""
        return title(self.name, self.id)

    @property
    def digest(self) -> str:
        """Return what tells whether the configuration was edited meanwhile."""
        return config_digest(self.config_text)

    def usable(self, verb: str) -> Container:
        """Return the configuration, or raise an error that says why the container cannot be worked on."""
        if self.away is not None:
            raise WrongState(
                f"cannot {verb} {self.id}: {values.shown(self.away.get('name', ''))[1:-1]} has it now",
                f"work on it there; `sysctr migrate --resolve {self.id}` says how far its move is",
            )
        if self.error or self.config is None:
            raise WrongState(
                f"cannot {verb} {self.id}: {self.error}", hint=f"mend it with `sysctr edit {self.id}`"
            )
        return self.config


def config_digest(text: str) -> str:
    """Return the digest of a configuration's text."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def away_facts(migration: str, peer: str, peer_name: str) -> dict[str, Any]:
    """Return what a record says from now on of a container that a migration, or a replica, took away."""
    return {"id": migration, "peer": peer, "name": peer_name, "time": round(time.time(), 3)}


def new_record(
    number: int,
    config_text: str,
    idmap: IdRange,
    *,
    template: str = "",
    pool: str = "default",
    volume: str = "",
) -> Record:
    """Return the record of a container that is being created, with an identity of its own."""
    config = parse_config(toml.read_container(config_text))
    return Record(
        id=number,
        uuid=str(uuid.uuid4()),
        name=config.name,
        created=round(time.time(), 3),
        idmap_first=idmap.first,
        idmap_count=idmap.count,
        template=template or config.template,
        pool=pool,
        volume=volume or str(number),
        config=config,
        config_text=config_text,
    )


def format_record(record: Saved) -> bytes:
    """Write what record.json says."""
    saved = {field.name: getattr(record, field.name) for field in fields(Saved)}
    return json.dumps({"schema": SCHEMA, **saved}, indent=1).encode() + b"\n"


def parse_record(number: int, data: bytes) -> Saved:
    """Read a record.json; ConfigError where it is damaged, another container's, or of a newer sysctr."""
    try:
        mapping = json.loads(data)
    except (ValueError, RecursionError):
        raise ConfigError("it is not JSON") from None
    if not isinstance(mapping, dict) or type(mapping.get("schema")) is not int:
        raise ConfigError("it is not a record")
    version = mapping.pop("schema")
    if version > SCHEMA:
        raise ConfigError(f"a newer sysctr wrote it (schema {shown(version)}, this one knows {SCHEMA})")
    known: dict[str, Any] = {}
    for name, types in _TYPES.items():
        # A field that came later is missing in an older record, and has its default.
        if name in mapping:
            if type(mapping[name]) not in types:
                raise ConfigError(f"{name} is {shown(mapping[name])}")
            known[name] = mapping[name]
    missing = [name for name in _REQUIRED if name not in known]
    if missing:
        raise ConfigError(f"it lacks {', '.join(missing)}")
    if known["id"] != number:
        raise ConfigError(f"it is that of {shown(known['id'])}")
    if not known["uuid"] or known["idmap_first"] <= 0 or known["idmap_count"] <= 0:
        raise ConfigError("it has no identity")
    guest = known.get("guest") or {}
    if not guest.keys() <= Guest.__dataclass_fields__.keys() or not all(
        isinstance(value, str) for value in guest.values()
    ):
        raise ConfigError(f"guest is {shown(guest)}")
    addresses = known.get("addresses", [])
    if not all(isinstance(address, str) for address in addresses):
        raise ConfigError(f"addresses is {shown(addresses)}")
    return Saved(**known | {"addresses": tuple(addresses)})
