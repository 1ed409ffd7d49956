"""From the index of an export of Incus or LXD (backup/index.yaml) to our settings.

The index is all that is used: what the archive says elsewhere, in a backup.yaml, is never looked at.
"""

import ipaddress
import re
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from sysctr.config import addresses, plain_yaml, values
from sysctr.config.foreign import (
    ForeignSnapshot,
    name_from,
    one_line,
    set_cores,
    set_cpu,
    set_description,
    set_name,
    set_size,
    set_variable,
)
from sysctr.config.pct_raw import add_device
from sysctr.config.pct_reading import Reading
from sysctr.config.pct_tables import lax_path, read_card
from sysctr.errors import ConfigError, Refused, SysctrError

# Where the files are in such an archive, below a "./" or not.
ROOT = "backup/container/rootfs"
_MOST_SNAPSHOTS = 1000
_SNAPSHOT_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_TIME = re.compile(
    r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(\.\d{1,6})?\d*(Z|[+-]\d\d:\d\d)", re.ASCII
)  # fmt: skip
# Of which nobody needs to hear: facts of the image, of the last start, and of ids, which files have not.
_SILENT = re.compile(r"(image|volatile)\..*|security\.idmap\..*|migration\..*|cluster\..*|limits\.cpu\.nodes")
_KINDS = {
    "virtual-machine": "a virtual machine", "custom": "a volume without a container", "bucket": "a bucket"
}
_NIC_NOTES = {
    "ipv6.address": "sysctr gives a card no IPv6 address; its own init may",
    "limits.ingress": "sysctr does not limit the rate of a card",
    "limits.egress": "sysctr does not limit the rate of a card",
    "limits.max": "sysctr does not limit the rate of a card",
    "security.mac_filtering": "sysctr does not filter a card",
    "security.ipv4_filtering": "sysctr does not filter a card",
    "security.acls": "sysctr does not filter a card",
}  # fmt: skip


class IncusIndex:
    """An index that was read."""

    def __init__(self, found: Mapping[str, Any], doing: str, dot: str = "") -> None:
        _refuse_kind(found, doing)
        self._container = _table(_table(found.get("config")).get("container"))
        if not self._container:
            raise ConfigError(f"cannot {doing}: its index says nothing of a container")
        self._given_name = _text(found.get("name")) or _text(self._container.get("name"))
        self.name = name_from(self._given_name)
        profiles = _profiles(_table(found.get("config")), self._container)
        self.config = self._merged("config", profiles)
        self.devices = {
            name: {key: _text(value) for key, value in _table(device).items()}
            for name, device in self._merged("devices", profiles).items()
        }
        self.uuid = _uuid(_text(self.config.get("volatile.uuid")))
        self.snapshots = _snapshots(found, doing, dot)
        self.macs = frozenset(self._macs())

    def _merged(self, what: str, profiles: list[dict[str, Any]]) -> dict[str, Any]:
        """Return settings or devices as they hold: those of the profiles under the container's own."""
        expanded = _table(self._container.get(f"expanded_{what}"))
        own = _table(self._container.get(what))
        if expanded:
            return {**expanded, **own}
        merged: dict[str, Any] = {}
        for profile in profiles:
            merged |= _table(profile.get(what))
        return merged | own

    def _macs(self) -> list[str]:
        found = []
        for name, device in self.devices.items():
            mac = device.get("hwaddr") or _text(self.config.get(f"volatile.{name}.hwaddr"))
            try:
                found.append(addresses.parse_mac(mac))
            except ConfigError:
                continue
        return found

    def convert(self, reading: Reading) -> None:
        """Take over what goes over, and note what does not."""
        set_name(reading, "name", self._given_name, self.name)
        if description := _text(self._container.get("description")):
            set_description(reading, "description", description)
        for key in sorted(self.config):
            value = _text(self.config[key])
            if value:
                self._read_key(reading, key, value)
        for name in sorted(self.devices):
            _read_device(reading, name, self.devices[name], self.config)

    def _read_key(self, reading: Reading, key: str, value: str) -> None:
        name = values.shown(key)[1:-1]
        if key in _READERS:
            _READERS[key](reading, name, value)
        elif key.startswith("environment."):
            set_variable(reading, name, key.removeprefix("environment."), value)
        elif key.startswith("raw."):
            reading.dropped(name, "sysctr hands nothing past its own settings", "raw")
        elif key.startswith(("user.", "cloud-init.")):
            reading.dropped(name, "sysctr keeps no settings for programs inside")
        elif not _SILENT.fullmatch(key):
            reading.dropped(name, f"sysctr has no such setting ({values.shown(value)})")


def read(data: bytes, doing: str, dot: str = "") -> IncusIndex:
    """Read an index; ConfigError says why it cannot be, Refused what the archive is instead.

    `dot` is what the names of members begin with.
    """
    try:
        found = plain_yaml.read(data)
    except ConfigError as error:
        raise ConfigError(f"cannot {doing}: its index.yaml is damaged: {error.message}") from error
    return IncusIndex(found, doing, dot)


def refuse_optimized(doing: str) -> SysctrError:
    """Return the error for an archive that has streams of a file system instead of files."""
    return Refused(
        f"cannot {doing}: it was exported with --optimized-storage, as a stream of one file system that is "
        "not read here",
        "`incus export` without --optimized-storage writes files",
    )


def _refuse_kind(found: Mapping[str, Any], doing: str) -> None:
    kind = _text(found.get("type")) or "container"
    if kind != "container":
        raise Refused(f"cannot {doing}: it is {_KINDS.get(kind, values.shown(kind))}, not a container")
    if _text(found.get("optimized")).lower() == "true":
        raise refuse_optimized(doing)


def _profiles(config: Mapping[str, Any], container: Mapping[str, Any]) -> list[dict[str, Any]]:
    listed = config.get("profiles")
    by_name = {
        _text(_table(one).get("name")): _table(one) for one in (listed if isinstance(listed, list) else ())
    }
    names = container.get("profiles")
    return [by_name[name] for name in map(_text, names if isinstance(names, list) else ()) if name in by_name]


def _snapshots(found: Mapping[str, Any], doing: str, dot: str) -> tuple[ForeignSnapshot, ...]:
    """Return the snapshots, oldest first."""
    names = found.get("snapshots") or []
    listed = _table(found.get("config")).get("snapshots") or []
    if not isinstance(names, list) or not isinstance(listed, list) or len(names) > _MOST_SNAPSHOTS:
        raise ConfigError(f"cannot {doing}: its index.yaml lists no usable snapshots")
    details = {_text(_table(one).get("name")).rpartition("/")[2]: _table(one) for one in listed}
    snapshots = []
    for name in map(_text, names):
        if _SNAPSHOT_NAME.fullmatch(name) is None:
            raise ConfigError(f"cannot {doing}: no snapshot can be called {values.shown(name)}")
        detail = details.get(name, {})
        created, description = _text(detail.get("created_at")), _text(detail.get("description"))
        below = f"{dot}backup/snapshots/{name}/rootfs"
        snapshots.append(ForeignSnapshot(name, _time(created), one_line(description, 1024), below))
    if len({one.name for one in snapshots}) != len(snapshots):
        raise ConfigError(f"cannot {doing}: its index.yaml lists a snapshot twice")
    return tuple(sorted(snapshots, key=lambda one: one.created))


def _time(text: str) -> float:
    """Return a time as Go writes it, 0 where it is none.

    >>> _time("2026-01-02T03:04:05.123456789Z")
    1767323045.123456
    """
    match = _TIME.fullmatch(text)
    if match is None:
        return 0.0
    fraction, zone = (match[2] or ".0").ljust(7, "0"), match[3].replace("Z", "+00:00")
    try:
        return max(datetime.fromisoformat(f"{match[1]}{fraction}{zone}").timestamp(), 0)
    except (ValueError, OverflowError):
        return 0.0


def _uuid(text: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return ""


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _is_true(value: str) -> bool:
    return value.lower() in ("true", "1", "yes", "on")


# Settings


def _read_autostart(reading: Reading, key: str, value: str) -> None:
    if _is_true(value):
        reading.set(key, "onboot", True)


def _read_protection(reading: Reading, key: str, value: str) -> None:
    if _is_true(value):
        reading.set(key, "protected", True)


def _read_nesting(reading: Reading, key: str, value: str) -> None:
    if _is_true(value):
        reading.dropped(key, "sysctr has no nesting", "feature")


def _read_privileged(reading: Reading, key: str, value: str) -> None:
    if _is_true(value):
        reading.changed(key, "it was privileged; here its root is nobody on the host")


def _read_memory(reading: Reading, key: str, value: str) -> None:
    if value.endswith("%"):
        reading.dropped(key, f"{values.shown(value)} is of a host's memory, and this is another host")
    else:
        set_size(reading, key, "limits.memory", value)


def _read_swap(reading: Reading, key: str, value: str) -> None:
    if value.lower() in ("false", "0", "no", "off"):
        reading.set(key, "limits.swap", "0")
    elif not _is_true(value):
        set_size(reading, key, "limits.swap", value)


def _read_allowance(reading: Reading, key: str, value: str) -> None:
    """A percentage is a share of a busy processor, two times are a limit."""
    if match := re.fullmatch(r"([0-9]{1,3})%", value):
        reading.set(key, "limits.cpu_weight", str(max(int(match[1]), 1)))
    elif match := re.fullmatch(r"([0-9]{1,9})ms/([0-9]{1,9})ms", value):
        set_cpu(reading, key, match[1], match[2])
    else:
        reading.dropped(key, f"{values.shown(value)} is no share of time")


def _read_cpu(reading: Reading, key: str, value: str) -> None:
    set_cores(reading, key, value, count=True)


def _read_processes(reading: Reading, key: str, value: str) -> None:
    reading.set(key, "limits.pids", value)


_READERS: dict[str, Callable[[Reading, str, str], None]] = {
    "boot.autostart": _read_autostart,
    "security.protection.delete": _read_protection,
    "security.nesting": _read_nesting,
    "security.privileged": _read_privileged,
    "limits.memory": _read_memory,
    "limits.memory.swap": _read_swap,
    "limits.cpu": _read_cpu,
    "limits.cpu.allowance": _read_allowance,
    "limits.processes": _read_processes,
}


# Devices


def _read_device(reading: Reading, name: str, device: Mapping[str, str], config: Mapping[str, Any]) -> None:
    key, kind = f"device {values.shown(name)[1:-1]}", device.get("type", "")
    if kind == "nic":
        _read_nic(reading, key, name, device, config)
    elif kind == "disk":
        _read_disk(reading, key, device)
    elif kind in ("unix-char", "unix-block"):
        _read_node(reading, key, device)
    elif kind != "none":
        reading.dropped(key, f"sysctr has no devices of type {values.shown(kind)}", "device")


def _read_nic(
    reading: Reading, key: str, name: str, device: Mapping[str, str], config: Mapping[str, Any]
) -> None:
    kind = device.get("nictype", "bridged")
    if kind != "bridged":
        reading.dropped(key, f"sysctr has no cards of type {values.shown(kind)}")
        return
    card = {
        "bridge": device.get("parent") or device.get("network", ""),
        "name": device.get("name") or _text(config.get(f"volatile.{name}.name")),
        "hwaddr": device.get("hwaddr") or _text(config.get(f"volatile.{name}.hwaddr")),
        "mtu": device.get("mtu", ""), "tag": device.get("vlan", ""), "type": "veth",
        "ip": _leased(reading, device.get("ipv4.address", "")),
    }  # fmt: skip
    for option, reason in _NIC_NOTES.items():
        if device.get(option, "") not in ("", "none", "false"):
            reading.dropped(f"{key}.{option}", reason)
    number = str(sum(1 for known in reading.changes if re.fullmatch(r"net\.[0-9]+\.name", known)))
    read_card(reading, key, number, {option: value for option, value in card.items() if value})


def _leased(reading: Reading, address: str) -> str:
    """Return the address that Incus's own DHCP gave, with the length of the network that it is in here."""
    try:
        if reading.subnet is not None and ipaddress.ip_address(address) in reading.subnet:
            return f"{address}/{reading.subnet.prefixlen}"
    except ValueError:
        pass
    return "dhcp"


def _read_disk(reading: Reading, key: str, device: Mapping[str, str]) -> None:
    path, source, pool = device.get("path", ""), device.get("source", ""), device.get("pool", "")
    if path == "/":
        if size := device.get("size", ""):
            set_size(reading, f"{key}.size", "limits.disk", size)
        return
    if pool:
        volume = f"volume {values.shown(source)} of pool {values.shown(pool)}"
        reading.dropped(key, f"{volume} is not in the archive")
        return
    if not source.startswith("/"):
        reading.dropped(key, f"sysctr mounts no {values.shown(source)}")
        return
    shown = f"it shows {values.shown(source)} of the host at {values.shown(path)}"
    if not reading.allowed(key, shown, "bind"):
        return
    columns: dict[str, object] = {"source": lax_path(source), "target": lax_path(path)}
    if _is_true(device.get("readonly", "")):
        columns["read_only"] = "true"
    if reading.set_table(key, "mount", "", columns) is not None and _is_true(device.get("shift", "")):
        reading.changed(key, "which ids its files show as is said by mount.N.idmap")


def _read_node(reading: Reading, key: str, device: Mapping[str, str]) -> None:
    path = device.get("source") or device.get("path", "")
    if not path:
        reading.dropped(key, "it has no path")
        return
    if not reading.allowed(key, f"it gives the container {values.shown(path)} of the host", "device"):
        return
    if set(device) <= {"type", "path", "source"} and device.get("path", path) == path:
        add_device(reading, key, path)
        return
    columns = {"path": path, "target": device.get("path", path), "mode": device.get("mode", "0660")}
    columns |= {option: device[option] for option in ("uid", "gid") if option in device}
    reading.set_table(key, "device", "", columns)
