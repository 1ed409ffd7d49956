"""The configuration of a container: one table of its keys, and the values that a checked file becomes.

A new key is one line in KEYS and one field of the dataclass of its table; a new table is a dataclass and one
line in SECTIONS. Checks, defaults, help, completion and `set key=value` follow from that.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from sysctr.config import kinds
from sysctr.config.mounts import Device, Mount, check_mounts, device_properties, mount_properties
from sysctr.config.table import Key, Plain, Section, Table
from sysctr.config.values import parse_properties, shown
from sysctr.errors import ConfigError

SCHEMA = 1


@dataclass(frozen=True)
class Limits:
    """What a container may use of the host; None is no limit of its own."""

    cores: int | tuple[int, ...] | None
    cpu: float | None
    cpu_weight: int | None
    memory_bytes: int | None
    swap_bytes: int | None
    pids: int | None
    disk_bytes: int | None


@dataclass(frozen=True)
class Nic:
    """A network card of a container."""

    index: int
    name: str
    bridge: str
    mac: str
    ip: str
    gateway: str
    mtu: int | None


@dataclass(frozen=True)
class Dns:
    """What the container's resolv.conf says; empty means what the bridge offers."""

    nameservers: tuple[str, ...]
    search: tuple[str, ...]


@dataclass(frozen=True)
class SnapshotRules:
    """When snapshots are made by themselves, and how many of those are kept; None is no rule."""

    schedule: str
    keep_last: int | None
    keep_hourly: int | None
    keep_daily: int | None
    keep_weekly: int | None
    keep_monthly: int | None
    keep_yearly: int | None


@dataclass(frozen=True)
class Features:
    """What a container may do beyond the usual."""


@dataclass(frozen=True)
class Container:
    """A container as its administrator wants it."""

    name: str
    template: str
    description: str
    tags: tuple[str, ...]
    onboot: bool
    protected: bool
    init: str
    stop_signal: str
    limits: Limits
    environment: dict[str, str]
    nets: tuple[Nic, ...]
    dns: Dns
    snapshot: SnapshotRules
    features: Features
    mounts: tuple[Mount, ...]
    devices: tuple[Device, ...]


KEYS = (
    Key("name", kinds.NAME, "", "live", "unique name, and the host name inside"),
    Key("template", kinds.TEMPLATE, "", "fixed", "template the rootfs was made from", written=True),
    Key("description", kinds.TEXT, "", "live", "one line for people"),
    Key("tags", kinds.TAGS, (), "live", "words to select containers by"),
    Key("onboot", kinds.BOOL, False, "live", "start when the host starts"),
    Key("protected", kinds.BOOL, False, "live", "refuse to destroy it"),
    Key("init", kinds.PATH, "", "restart", "program to run as init; empty: /sbin/init"),
    Key("stop_signal", kinds.SIGNAL, "", "live", "signal that shuts init down; empty: the one it expects"),
    Key("limits.cores", kinds.CORES, None, "live", "how many processors, or which ones"),
    Key("limits.cpu", kinds.CPU, None, "live", "processor time, in processors"),
    Key("limits.cpu_weight", kinds.WEIGHT, None, "live", "share of a busy processor; others have 100"),
    Key("limits.memory", kinds.MEMORY, None, "live", "most memory"),
    Key("limits.swap", kinds.SWAP, None, "live", "most swap, beside the memory"),
    Key("limits.pids", kinds.PIDS, None, "live", "most processes and threads"),
    Key("limits.disk", kinds.DISK, None, "live", "most disk space of the rootfs"),
    Key("environment.NAME", kinds.VARIABLE, None, "restart", "variable of init's environment"),
    Key("net.N.name", kinds.CARD, "eth{N}", "restart", "name of the card inside", written=True),
    Key("net.N.bridge", kinds.INTERFACE, "", "restart", "bridge of the host; empty: the one of sysctr"),
    Key("net.N.mac", kinds.MAC, "", "restart", "MAC address; empty: chosen at creation"),
    Key("net.N.ip", kinds.ADDRESS, "managed", "restart", "managed, manual, or ADDRESS/PREFIX", written=True),
    Key("net.N.gateway", kinds.GATEWAY, "", "restart", "default route of a card whose ip is an address"),
    Key("net.N.mtu", kinds.MTU, None, "restart", "largest packet in bytes"),
    Key("dns.nameservers", kinds.NAMESERVERS, (), "restart", "name servers; empty: the bridge's"),
    Key("dns.search", kinds.DOMAINS, (), "restart", "domains to look short names up in"),
    Key("snapshot.schedule", kinds.SCHEDULE, "off", "live", "when to make a snapshot, the first one at once"),
    Key("snapshot.keep_last", kinds.KEEP, None, "live", "automatic snapshots to keep; without rules: all"),
    Key("snapshot.keep_hourly", kinds.KEEP, None, "live", "hours of which the last one is kept"),
    Key("snapshot.keep_daily", kinds.KEEP, None, "live", "days of which the last one is kept"),
    Key("snapshot.keep_weekly", kinds.KEEP, None, "live", "weeks of which the last one is kept"),
    Key("snapshot.keep_monthly", kinds.KEEP, None, "live", "months of which the last one is kept"),
    Key("snapshot.keep_yearly", kinds.KEEP, None, "live", "years of which the last one is kept"),
    Key("mount.N.target", kinds.PATH, "", "restart", "where it is mounted inside", written=True),
    Key("mount.N.source", kinds.PATH, "", "restart", "path of the host to show there (a bind)"),
    Key("mount.N.volume", kinds.VOLUME, "", "restart", "volume that containers share"),
    Key("mount.N.tmpfs", kinds.BOOL, False, "restart", "memory, empty at each start"),
    Key("mount.N.name", kinds.VOLUME, "disk{N}", "restart", "name of the container's own volume"),
    Key("mount.N.pool", kinds.POOL, "", "restart", "pool of the volume; empty: the container's"),
    Key("mount.N.size", kinds.VOLUME_SIZE, None, "restart", "most that fits into it"),
    Key("mount.N.backup", kinds.BOOL, True, "live", "a backup has the container's own volume too"),
    Key("mount.N.read_only", kinds.BOOL, False, "restart", "nobody inside can write there"),
    Key("mount.N.dev", kinds.BOOL, False, "restart", "device nodes of a bind work"),
    Key("mount.N.suid", kinds.BOOL, False, "restart", "setuid of a bind or a shared volume works"),
    Key("mount.N.noexec", kinds.BOOL, False, "restart", "no program there can be run"),
    Key("mount.N.idmap", kinds.IDMAP, "", "restart", "ids of a bind, the host's first: 1000=1000;5-9=500"),
    Key("mount.N.host_root", kinds.BOOL, False, "restart", "idmap may give out the files of the host's root"),
    Key("mount.N.mode", kinds.MODE, "", "restart", "permissions of a tmpfs; empty: 1777"),
    Key("device.N.path", kinds.PATH, "", "restart", "device of the host", written=True),
    Key("device.N.target", kinds.PATH, "", "restart", "where it is inside; empty: the same path"),
    Key("device.N.mode", kinds.MODE, "0666", "restart", "permissions"),
    Key("device.N.uid", kinds.ID, 0, "restart", "owner inside"),
    Key("device.N.gid", kinds.ID, 0, "restart", "group inside"),
)

SECTIONS = (
    Section("", "", Container),
    Section("limits", "limits", Limits),
    Section("environment.NAME", "environment", dict),
    Section("net.N", "nets", Nic),
    Section("dns", "dns", Dns),
    Section("snapshot", "snapshot", SnapshotRules),
    Section("features", "features", Features),
    Section("mount.N", "mounts", Mount),
    Section("device.N", "devices", Device),
)

TABLE = Table(KEYS, SECTIONS, ("name",), listing="`sysctr set --help` lists the keys")

# How Proxmox calls two of a card's keys.
_NET_ALIASES = {"hwaddr": "mac", "gw": "gateway"}


def keys() -> tuple[Key, ...]:
    """Return all keys, in the order of the documentation."""
    return TABLE.keys


def parse_config(mapping: Mapping[str, object]) -> Container:
    """Return the container that a mapping (a file's, without its `schema`) describes, all of it checked."""
    container: Container = TABLE.read(mapping)
    _check_nets(container.nets)
    check_mounts(container.mounts, container.devices)
    return container


def dump_config(container: Container) -> dict[str, object]:
    """Return the mapping of what differs from the defaults; `parse_config` gives the container back."""
    return TABLE.dump(container)


def plain_changes(changes: Mapping[str, object]) -> dict[str, Plain | None]:
    """Check changes by dotted key, as a command or an API client gives them; return what the file will say.

    A text is read as a command line would be, None unsets a key, and `net.0` stands for a whole card.

    >>> plain_changes({"limits.pids": "512", "tags": ""})
    {'limits.pids': 512, 'tags': None}
    >>> plain_changes({"net.0": "name=eth0,ip=10.0.0.2/24"})
    {'net.0.name': 'eth0', 'net.0.ip': '10.0.0.2/24'}
    """
    plain: dict[str, Plain | None] = {}
    for name, value in changes.items():
        if TABLE.is_table(name):
            plain.update(_table_changes(name, value))
            continue
        key = TABLE.find(name)
        if value in (None, "") and name in TABLE.required:
            raise ConfigError(f"cannot unset {name}: a container has one")
        if value is None:
            plain[name] = None
        elif isinstance(value, str):
            plain[name] = key.parse(name, value)
        else:
            plain[name] = key.kind.dump(key.read(name, value))
    return plain


def parse_line(table: str, text: str) -> dict[str, Plain | None]:
    """Read a numbered table that is written on one line, as `net.0`, `mount.0` and `device.0` can be.

    Of a card Proxmox's `hwaddr` and `gw` are understood.

    >>> parse_line("net.0", "eth0,gw=10.0.0.1")
    {'name': 'eth0', 'gateway': '10.0.0.1'}
    >>> parse_line("mount.0", "target=/data,size=8G"), parse_line("device.0", "fuse")
    ({'target': '/data', 'size': '8G'}, {'path': '/dev/fuse'})
    """
    columns = TABLE.columns(table)
    read: dict[str, Plain | None] = {}
    for given, value in _PROPERTIES[table.partition(".")[0]](text).items():
        name = _NET_ALIASES.get(given, given)
        # The error of an unknown one should name what was typed and the nearest key.
        key = columns.get(name) or TABLE.find(f"{table}.{name}")
        if name in read:
            raise ConfigError(f"{name} is given twice in {shown(text)}")
        read[name] = key.parse(given, value)
    return read


def _net_properties(text: str) -> dict[str, str]:
    return parse_properties(text, "name")


_PROPERTIES = {"net": _net_properties, "mount": mount_properties, "device": device_properties}
_LINES = {"net": "name=…,ip=…", "mount": "target=…,size=…", "device": "path=…,mode=…"}


def diff_live(old: Container, new: Container) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the keys that differ: those that hold at once, and those that wait for a restart."""
    changed = TABLE.changed(old, new)
    applied = tuple(name for name in changed if TABLE.live(name) == "live")
    return applied, tuple(name for name in changed if name not in applied)


def refuse_fixed(old: Container, new: Container) -> None:
    """Raise an error if a change touches what is settled when a container is created."""
    for name in TABLE.changed(old, new):
        if TABLE.live(name) == "fixed":
            raise ConfigError(
                f"cannot change {name}: it is settled when the container is created",
                hint="create another container from the other template",
            )


def _table_changes(name: str, value: object) -> dict[str, Plain | None]:
    """Return the changes of a whole card, mount point or device.

    None or an empty text removes it, anything else replaces parts.
    """
    if value is None or value == "":
        return {name: None}
    if isinstance(value, str):
        try:
            value = parse_line(name, value)
        except ConfigError as error:
            raise ConfigError(f"cannot accept {name}: {error.message}", error.hint) from None
    if not isinstance(value, Mapping):
        usage = _LINES[name.partition(".")[0]]
        raise ConfigError(f"cannot accept {name} = {shown(value)}: expected {usage} or a table")
    return plain_changes({f"{name}.{key}": item for key, item in value.items()})


def _check_nets(nets: tuple[Nic, ...]) -> None:
    seen: dict[str, str] = {}
    for nic in nets:
        static = "/" in nic.ip
        claims = [("name", nic.name), ("mac", nic.mac), ("ip", nic.ip.partition("/")[0] if static else "")]
        for key, value in claims:
            name = f"net.{nic.index}.{key}"
            other = seen.setdefault(f"{key} {value}", name) if value else name
            if other != name:
                raise ConfigError(f"cannot accept {name}: {value} is that of {other} already")
        if nic.gateway:
            _check_gateway(nic)


def _check_gateway(nic: Nic) -> None:
    name = f"net.{nic.index}.gateway"
    if "/" not in nic.ip:
        raise ConfigError(f"cannot accept {name}: it needs an address in net.{nic.index}.ip, not {nic.ip}")
    address = ipaddress.IPv4Interface(nic.ip)
    gateway = ipaddress.IPv4Address(nic.gateway)
    network = address.network
    if gateway == address.ip:
        raise ConfigError(f"cannot accept {name}: {gateway} is the container's own address")
    # A lone address (/32) has its gateway on the link and outside of any network, as hosters do it.
    if network.prefixlen < 32 and gateway not in network:
        raise ConfigError(f"cannot accept {name}: {gateway} is not in {network}")
    if network.prefixlen < 31 and gateway in (network.network_address, network.broadcast_address):
        raise ConfigError(f"cannot accept {name}: {gateway} is not an address of a host in {network}")
    if gateway.is_multicast or gateway.is_loopback or gateway.is_unspecified:
        raise ConfigError(f"cannot accept {name}: {gateway} is not an address of a host")
