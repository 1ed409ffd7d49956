"""The settings of a host, `/etc/sysctr/host.toml`: one table of keys, as for containers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from sysctr.config import backup, kinds, schema, values
from sysctr.config.backup import BackupSettings
from sysctr.config.table import Key, Plain, Section, Table
from sysctr.errors import ConfigError

SCHEMA = 1
# What one container without nesting gets; the pool is counted in these.
IDS_PER_CONTAINER = 65536


@dataclass(frozen=True)
class NetworkSettings:
    """The bridge that containers are on unless they say otherwise; empty means that sysctr chooses."""

    bridge: str
    subnet: str
    domain: str


@dataclass(frozen=True)
class IdSettings:
    """The range of host ids that containers get theirs from; None means that sysctr chooses."""

    first: int | None
    count: int | None


@dataclass(frozen=True)
class Defaults(schema.Limits):
    """What a new container has where its creator says nothing: its limits, its template and its pool."""

    template: str
    pool: str


@dataclass(frozen=True)
class PeerSettings:
    """Where other hosts reach this one; empty means everywhere, and all its addresses."""

    listen: str
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class LogSettings:
    """What the daemon writes to its log."""

    level: str


@dataclass(frozen=True)
class Host:
    """All settings of a host."""

    network: NetworkSettings
    ids: IdSettings
    defaults: Defaults
    backup: BackupSettings
    peer: PeerSettings
    log: LogSettings


# A fork bomb in one container must not exhaust the process ids of all.
_LIMITS = {"pids": 4096}


def _default_limits() -> Iterator[Key]:
    for key in schema.TABLE.columns("limits").values():
        last = key.name.rpartition(".")[2]
        default = _LIMITS.get(last, key.default)
        yield replace(key, name=f"defaults.{last}", default=default, live="live")


_IDS = kinds.whole_kind(65536, 2**31 - 1)
_POOL = kinds.text_kind("POOL", "a pool name", values.parse_name, may_be_empty=False)
_BACKUP = {"mode": "snapshot", "compress": "zstd"}

KEYS = (
    Key("network.bridge", kinds.INTERFACE, "", "restart", "bridge that sysctr makes; empty: sysctr0"),
    Key("network.subnet", kinds.SUBNET, "", "restart", "its network; empty: a free private /24"),
    Key("network.domain", kinds.DOMAIN, "sysctr", "restart", "domain of the containers' names"),
    Key("ids.first", _IDS, None, "restart", "first id of the pool in /etc/subuid"),
    Key("ids.count", _IDS, None, "restart", "ids in the pool, 65536 a container"),
    Key("defaults.template", kinds.TEMPLATE, "", "live", "template of a new container"),
    Key("defaults.pool", _POOL, "default", "live", "pool that a new container is kept in"),
    *_default_limits(),
    *backup.storing_keys("backup.", _BACKUP),
    Key("peer.listen", kinds.LISTEN, "", "restart", "for hosts to migrate to; empty: [::]:8645, or off"),
    Key("peer.addresses", kinds.ENDPOINTS, (), "live", "of this host, for others; empty: all it has"),
    Key("log.level", kinds.LEVEL, "info", "live", "least level that the daemon logs"),
)

SECTIONS = (
    Section("", "", Host),
    Section("network", "network", NetworkSettings),
    Section("ids", "ids", IdSettings),
    Section("defaults", "defaults", Defaults),
    Section("backup", "backup", BackupSettings),
    Section("peer", "peer", PeerSettings),
    Section("log", "log", LogSettings),
)

TABLE = Table(KEYS, SECTIONS)


def keys() -> tuple[Key, ...]:
    """Return all keys, in the order of the documentation."""
    return TABLE.keys


def parse_host(mapping: Mapping[str, object]) -> Host:
    """Return the settings that a mapping (a file's, without `schema`) describes; {} gives the defaults."""
    host: Host = TABLE.read(mapping)
    first, count = host.ids.first, host.ids.count
    if count is not None and count % IDS_PER_CONTAINER:
        raise ConfigError(f"cannot accept ids.count: {count} is not a multiple of {IDS_PER_CONTAINER}")
    if first is not None and first + (count or IDS_PER_CONTAINER) > 2**31:
        raise ConfigError(f"cannot accept ids.first: a pool at {first} would pass 2147483648")
    return host


def creation_changes(host: Host) -> dict[str, Plain]:
    """Return the keys of a container that the defaults set, as the file of a new container says them.

    >>> creation_changes(parse_host({"defaults": {"memory": "1G"}}))
    {'limits.memory': '1G', 'limits.pids': 4096}
    """
    changes: dict[str, Plain] = {}
    for last, key in TABLE.columns("defaults").items():
        if last == "pool":
            # Where a container is kept is no setting of it that could be changed in its file.
            continue
        value = getattr(host.defaults, key.field)
        if value not in (None, ""):
            name = last if last == "template" else f"limits.{last}"
            changes[schema.TABLE.find(name).name] = key.kind.dump(value)
    return changes


def new_text() -> str:
    """Return a file that sets nothing and shows every key with its meaning and default."""
    lines = ["# Settings of this host for sysctr. Every key is shown with its default.", f"schema = {SCHEMA}"]
    above = ""
    for key in KEYS:
        table, _, last = key.name.rpartition(".")
        if table != above:
            lines += ["", f"[{table}]"]
            above = table
        value = f'"{key.default_text}"' if isinstance(key.default, str) else key.default_text
        example = f"{last} = {value if key.default_text else key.kind.placeholder}"
        lines.append(f"# {example:<24} # {key.doc}")
    return "\n".join(lines) + "\n"
