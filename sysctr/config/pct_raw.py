"""From pct.conf to our settings: devices, and the lines that Proxmox hands to LXC as they are."""

import re

from sysctr.config import values
from sysctr.config.pct import SPACE
from sysctr.config.pct_reading import HostPath, Reading, flag
from sysctr.config.pct_tables import lax_path

_DEVICE = ("path", "mode", "uid", "gid", "deny-write")
_OCTAL = re.compile(rb"\\([0-7]{3})")
# Raw keys of which we have an equal.
_RAW_KEYS = {
    "lxc.signal.halt": "stop_signal",
    "lxc.init.cmd": "init",
    "lxc.cgroup2.pids.max": "limits.pids",
    "lxc.cgroup.pids.max": "limits.pids",
}


def read_device(reading: Reading, key: str, text: str) -> None:
    """Take a device over, if that is allowed."""
    given = reading.properties(key, text, _DEVICE, "path")
    if given is None:
        return
    path = given.get("path", "")
    if not path:
        reading.dropped(key, "it has no path")
        return
    allowed = reading.allowed(key, f"it gives the container {values.shown(path)} of the host", "device")
    if allowed and flag(given, "deny-write"):
        reading.dropped(key, "sysctr cannot keep a device from being written to")
        allowed = False
    if allowed:
        columns = {name: given[name] for name in ("path", "mode", "uid", "gid") if name in given}
        allowed = reading.set_table(key, "device", key.removeprefix("dev"), columns) is not None
    reading.host_paths.append(HostPath(key, "device", path, path, allowed))


def add_device(reading: Reading, key: str, path: str) -> None:
    """Give the container a device that another key implies, unless it has it."""
    if path not in [value for name, value in reading.changes.items() if name.startswith("device.")]:
        reading.set_table(key, "device", "", {"path": path})


def read_raw(reading: Reading, key: str, value: str) -> None:
    """Take a raw line over where sysctr has an equal of it, and it is allowed."""
    if key == "lxc.mount.entry":
        read_entry(reading, key, value, "raw")
    elif key in ("lxc.cgroup2.devices.allow", "lxc.cgroup.devices.allow"):
        reading.dropped(key, f"a device is given by device.N alone ({values.shown(value)})")
    elif key == "lxc.init.cmd" and re.search(r"\s", value):
        reading.dropped(key, f"an init is started without arguments ({values.shown(value)})")
    elif key in _RAW_KEYS or key == "lxc.environment":
        if reading.allowed(key, f"it is set to {values.shown(value)}, past Proxmox", "raw"):
            name, _, text = value.partition("=")
            mine = f"environment.{name.strip(SPACE)}" if key == "lxc.environment" else _RAW_KEYS[key]
            reading.set(key, mine, text if key == "lxc.environment" else value)
    else:
        reading.dropped(key, f"sysctr has no such setting ({values.shown(value)})")


def read_entry(reading: Reading, key: str, value: str, *permissions: str) -> None:
    """Take a line of fstab over: a bind, a device, or memory; `permissions` are needed for any of them."""
    fields = [_unescaped(part) for part in re.split(r"[ \t]+", value)]
    if len(fields) < 4:
        reading.dropped(key, f"{values.shown(value)} is not a line of fstab")
        return
    source, target = lax_path(fields[0]), lax_path(f"/{fields[1]}")
    file_system, options = fields[2], fields[3].split(",")
    bind = bool({"bind", "rbind"} & set(options))
    shown = f"it mounts {values.shown(fields[0])} at {values.shown(target)}"
    if bind and source.startswith("/dev/") and "create=dir" not in options:
        allowed = reading.allowed(key, shown, *permissions, "device")
        if allowed:
            columns = {"path": source, **({"target": target} if target != source else {})}
            allowed = reading.set_table(key, "device", "", columns) is not None
        reading.host_paths.append(HostPath(key, "device", source, target, allowed))
    elif bind:
        allowed = reading.allowed(key, shown, *permissions, "bind")
        if allowed:
            columns = {"source": source, "target": target}
            extra = {"read_only": "ro" in options, "noexec": "noexec" in options}
            columns |= {name: "true" for name, given in extra.items() if given}
            allowed = reading.set_table(key, "mount", "", columns) is not None
        reading.host_paths.append(HostPath(key, "bind", source, target, allowed))
    elif file_system == "tmpfs":
        if reading.allowed(key, shown, *permissions):
            columns = {"target": target, "tmpfs": "true"}
            columns |= dict(part.split("=", 1) for part in options if part.startswith(("size=", "mode=")))
            reading.set_table(key, "mount", "", columns)
    else:
        reading.dropped(key, f"sysctr mounts no {values.shown(file_system)} ({values.shown(value)})")


def _unescaped(text: str) -> str:
    r"""Return a field of an fstab, in which a space is written as its number.

    >>> _unescaped("/srv/a\\040b")
    '/srv/a b'
    """
    raw = text.encode("utf-8", "surrogateescape")
    raw = _OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), raw)
    return raw.decode("utf-8", "surrogateescape")
