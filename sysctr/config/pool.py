"""The file of one pool, `/etc/sysctr/pools/NAME.toml`: which driver keeps volumes in which directory."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sysctr.config import kinds, values
from sysctr.config.table import Key, Section, Table
from sysctr.config.toml import Migration, read_versioned
from sysctr.errors import ConfigError

SCHEMA = 1
MIGRATIONS: tuple[Migration, ...] = ()
# A pool that warned at more than half its space free would always warn.
_MOST_PERCENT = 50
_DRIVER = re.compile(r"[a-z][a-z0-9]{0,15}")
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Pool:
    """A pool as its administrator wants it."""

    driver: str
    path: str
    id: str
    low_space_percent: int


def parse_percent(text: str) -> int:
    """Read a share of the space in whole percent; 0% is never reached.

    >>> parse_percent("10%")
    10
    """
    match = re.fullmatch(r"([0-9]{1,3})%", text)
    if match is None or int(match[1]) > _MOST_PERCENT:
        raise values.refuse(text, f"a share from 0% to {_MOST_PERCENT}%, such as 10%")
    return int(match[1])


def _driver(text: str) -> str:
    # Which drivers there are is for the storage to say.
    if _DRIVER.fullmatch(text) is None:
        raise values.refuse(text, "the name of a storage driver, such as overlay")
    return text


def _id(text: str) -> str:
    if _ID.fullmatch(text) is None:
        raise values.refuse(text, "the id that `sysctr pool add` gave to the pool")
    return text


_PERCENT = kinds.Kind(
    "PERCENT",
    "a share such as 10%",
    (str,),
    parse_percent,
    parse_percent,
    lambda percent: f"{percent}%",
    unit="percent",
)

KEYS = (
    Key("driver", kinds.text_kind("DRIVER", "a storage driver", _driver), "", "fixed", "who keeps volumes"),
    Key("path", kinds.PATH, "", "fixed", "the directory they are in"),
    Key("id", kinds.text_kind("ID", "an id", _id), "", "fixed", "what the pool itself is marked with"),
    Key("low_space", _PERCENT, 10, "live", "warn when less than this is free of space or inodes"),
)
TABLE = Table(KEYS, (Section("", "", Pool),))


def parse_pool(mapping: Mapping[str, object]) -> Pool:
    """Return the pool that a mapping (a file's, without `schema`) describes, all of it checked."""
    pool: Pool = TABLE.read(mapping)
    for name in ("driver", "path", "id"):
        if not getattr(pool, name):
            raise ConfigError(f"cannot accept a pool without {name}")
    return pool


def parse_default(mapping: Mapping[str, object]) -> int:
    """Return what the file of the pool that every host has may say: its low_space, in percent."""
    pool: Pool = TABLE.read(mapping)
    for name in ("driver", "path", "id"):
        if getattr(pool, name):
            raise ConfigError(
                f"cannot accept {name}: the default pool is where it is", "only low_space can be set"
            )
    return pool.low_space_percent


def read_pool(text: str) -> Pool:
    """Return the pool of a file's text."""
    return parse_pool(read_versioned(text, SCHEMA, MIGRATIONS))


def read_default(text: str) -> int:
    """Return the low_space of the default pool's file, in percent."""
    return parse_default(read_versioned(text, SCHEMA, MIGRATIONS))


def new_text(name: str, pool: Pool) -> str:
    """Return the file of a new pool; `read_pool` gives the pool back."""
    given = {"driver": pool.driver, "path": pool.path, "id": pool.id}
    given["low_space"] = f"{pool.low_space_percent}%"
    lines = [f"# Pool {name} of sysctr. Its driver, path and id stay as they are.", f"schema = {SCHEMA}"]
    # A JSON string is a basic string of TOML as long as it has no DEL, and no text of ours has.
    lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]
    return "\n".join(lines) + "\n"
