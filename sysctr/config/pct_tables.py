"""From pct.conf to our settings: the network cards and the mount points."""

import ipaddress
import posixpath
import re
from collections.abc import Collection, Mapping

from sysctr.config import addresses, values
from sysctr.config.mounts import idmap_ranges, parse_idmap
from sysctr.config.pct_notes import reason_of
from sysctr.config.pct_reading import HostPath, OwnVolume, Reading, flag
from sysctr.errors import ConfigError

_NET = (
    "name", "type", "bridge", "hwaddr", "mtu", "ip", "gw", "ip6", "gw6", "firewall", "tag", "trunks", "rate",
    "link_down", "host-managed",
)  # fmt: skip
_MOUNT = (
    "volume", "mp", "size", "backup", "ro", "acl", "mountoptions", "quota", "replicate", "shared", "idmap",
    "keepattrs",
)  # fmt: skip

_NEW_VOLUME = re.compile(r"(?:[^:\s]+:)?([0-9]+(?:\.[0-9]+)?)", re.ASCII)
_VOLUME = re.compile(r"[a-z][a-z0-9._-]*:.+", re.IGNORECASE | re.ASCII)
# Of an error about one key of a card.
_NAMED = re.compile(r"cannot accept net\.[0-9]+\.([a-z]+)")
# Our keys of a card that it can do without, and Proxmox's.
_DETAILS = {"gateway": "gw", "mac": "hwaddr", "ip": "ip", "mtu": "mtu"}
_LEAST_VOLUME_BYTES = 2**20

# Options of a card that say something only when they are not what a card has anyway, and what to say then.
_NET_NOTES = {
    "ip6": "sysctr gives a card no IPv6 address; its own init may",
    "gw6": "sysctr gives a card no IPv6 route; its own init may",
    "tag": "sysctr has no VLAN tags",
    "trunks": "sysctr has no VLAN trunks",
    "rate": "sysctr does not limit the rate of a card",
}
_MOUNT_NOTES = {
    "acl": "ACLs are always on",
    "quota": "sysctr has no quota of users inside",
    "shared": "sysctr takes a path to be of this host",
    "replicate": "sysctr does not replicate",
    "keepattrs": "sysctr keeps all attributes of files",
}
_HARMLESS_OPTIONS = ("discard", "lazytime", "noatime")


# Cards


def read_net(reading: Reading, key: str, text: str) -> None:
    """Take a card over: its bridge if this host has it, else that of sysctr."""
    given = reading.properties(key, text, _NET)
    if given is not None:
        read_card(reading, key, key.removeprefix("net"), given)


def read_card(reading: Reading, key: str, number: str, given: Mapping[str, str]) -> None:
    """Take the card over that these options of Proxmox describe; notes call it `key`."""
    columns: dict[str, object] = {"name": _card_name(reading, key, given.get("name", ""), f"eth{number}")}
    columns |= _net_address(reading, key, given)
    columns |= {
        mine: given[theirs] for theirs, mine in (("hwaddr", "mac"), ("mtu", "mtu")) if theirs in given
    }
    for name, reason in _NET_NOTES.items():
        if name in given and given[name] != "manual":
            reading.dropped(f"{key}.{name}", reason)
    if flag(given, "firewall"):
        reading.dropped(f"{key}.firewall", "sysctr does not filter a card by Proxmox's rules", "firewall")
    if flag(given, "link_down"):
        reading.dropped(f"{key}.link_down", "the card is connected here")
    if flag(given, "host-managed"):
        reading.dropped(f"{key}.host-managed", "no DHCP client of the host runs for the card")
    if given.get("type", "veth") != "veth":
        reading.changed(f"{key}.type", "every card is a veth")
    _set_net(reading, key, number, columns)


def _set_net(reading: Reading, key: str, number: str, columns: dict[str, object]) -> None:
    """Set a card; a detail of it that does not hold is left out, not the whole card."""
    try:
        table = f"net.{reading.place('net', number)}"
    except ConfigError as error:
        reading.dropped(key, error.message)
        return
    while True:
        try:
            reading.fit(table, columns)
            return
        except ConfigError as error:
            named = _NAMED.match(error.message)
            detail = named[1] if named else ""
            if detail not in _DETAILS or detail not in columns:
                reading.dropped(key, reason_of(error))
                return
            reading.dropped(f"{key}.{_DETAILS[detail]}", reason_of(error))
            del columns[detail]
            if detail == "ip":
                # On a bridge of the host nobody but the container can manage its address.
                columns.pop("gateway", None)
                columns |= {"ip": "manual"} if columns["bridge"] else {}


def _card_name(reading: Reading, key: str, name: str, fallback: str) -> str:
    try:
        return addresses.parse_ifname(name or fallback)
    except ConfigError as error:
        reading.changed(f"{key}.name", f"{error.message}: it is {fallback} here")
        return fallback


def _net_address(reading: Reading, key: str, given: Mapping[str, str]) -> dict[str, object]:
    """Return bridge, ip and gateway of a card."""
    bridge = given.get("bridge", "")
    own = bridge not in reading.bridges or "tag" in given
    if own:
        was = f"this host has no bridge {values.shown(bridge)}" if bridge else "no bridge is named"
        if bridge in reading.bridges:
            # Without its tag the card would be in a network that it was kept out of.
            was = f"without its VLAN tag it would be in another network of {bridge}"
        reading.changed(f"{key}.bridge", f"{was}: the card is on that of sysctr")
        bridge = ""
    ip = given.get("ip", "manual")
    if ip == "dhcp":
        if not own:
            reading.changed(
                f"{key}.ip", "manual: on a bridge of the host the container asks for an address itself"
            )
        ip = "managed" if own else "manual"
    if ip in ("manual", "managed"):
        if "gw" in given:
            reading.dropped(f"{key}.gw", "only a card with an address of its own has a gateway")
        return {"bridge": bridge, "ip": ip}
    try:
        ip = addresses.parse_cidr4(ip)
    except ConfigError as error:
        reading.changed(f"{key}.ip", f"{error.message}: it is {'managed' if own else 'manual'} here")
        return {"bridge": bridge, "ip": "managed" if own else "manual"}
    if own and not _in_subnet(reading, ip):
        reading.changed(f"{key}.ip", f"managed: {ip} is not of the network of sysctr's bridge")
        return {"bridge": bridge, "ip": "managed"}
    columns: dict[str, object] = {"bridge": bridge, "ip": ip}
    if gateway := given.get("gw"):
        columns["gateway"] = gateway
    return columns


def _in_subnet(reading: Reading, ip: str) -> bool:
    return reading.subnet is not None and ipaddress.ip_interface(ip).ip in reading.subnet


# Mount points


def read_rootfs(reading: Reading, text: str) -> int | None:
    """Take the size of the root file system over and return it."""
    given = reading.properties("rootfs", text, _MOUNT, "volume")
    if given is None:
        return None
    for name in ("mp", "backup", "ro", "idmap"):
        if name in given and given[name] != "0":
            reading.dropped(f"rootfs.{name}", "a root file system has no such option here")
    _note_options(reading, "rootfs", given, ("nodev", *_HARMLESS_OPTIONS))
    size_bytes = _size(reading, "rootfs", given)
    if size_bytes and reading.set("rootfs.size", "limits.disk", values.format_size(size_bytes)):
        return size_bytes
    return None


def read_mount(reading: Reading, key: str, text: str) -> None:
    """Take a mount point over: a volume becomes one of the container's own, a path is a bind."""
    given = reading.properties(key, text, _MOUNT, "volume")
    if given is None:
        return
    volume, target = given.get("volume", ""), lax_path(given.get("mp", ""))
    if volume.startswith("/dev/"):
        reading.host_paths.append(HostPath(key, "device", volume, target, False))
        reading.dropped(key, f"sysctr mounts no device of the host ({values.shown(volume)})", "device")
    elif volume.startswith("/"):
        _read_bind(reading, key, given, lax_path(volume), target)
    elif _VOLUME.fullmatch(volume) or _NEW_VOLUME.fullmatch(volume):
        _read_volume(reading, key, given, target)
    else:
        reading.dropped(key, f"{values.shown(volume)} is neither a volume nor a path")


def _read_volume(reading: Reading, key: str, given: Mapping[str, str], target: str) -> None:
    size_bytes, backup = _size(reading, key, given), flag(given, "backup")
    columns: dict[str, object] = {"target": target, "backup": backup, **_common(given)}
    if size_bytes is not None:
        columns["size"] = values.format_size(size_bytes)
    if "idmap" in given:
        reading.dropped(f"{key}.idmap", "a volume has the container's own ids")
    # Devices never work on a volume of ours.
    _note_options(reading, key, given, ("nodev", "noexec", *_HARMLESS_OPTIONS))
    index = reading.set_table(key, "mount", key.removeprefix("mp"), columns)
    if index is not None:
        reading.volumes.append(OwnVolume(key, index, target, size_bytes, backup))


def _read_bind(reading: Reading, key: str, given: Mapping[str, str], source: str, target: str) -> None:
    shown = f"it shows {values.shown(source)} of the host at {values.shown(target)}"
    allowed = reading.allowed(key, shown, "bind")
    if allowed:
        columns: dict[str, object] = {"source": source, "target": target, **_common(given)}
        if idmap := _idmap(reading, key, given):
            columns["idmap"] = idmap
        allowed = reading.set_table(key, "mount", key.removeprefix("mp"), columns) is not None
    if allowed:
        options = given.get("mountoptions", "").split(";")
        if not {"nosuid", "nodev"} <= set(options):
            reading.changed(
                key, "setuid programs and device nodes do not work there (mount.N.suid, mount.N.dev)"
            )
        if "idmap" not in given:
            reading.changed(key, "the ids of its files are not translated (mount.N.idmap does that)")
        _note_options(reading, key, given, ("nosuid", "nodev", "noexec", *_HARMLESS_OPTIONS))
    reading.host_paths.append(HostPath(key, "bind", source, target, allowed))


def _common(given: Mapping[str, str]) -> dict[str, object]:
    """Return what a volume and a bind have alike."""
    columns: dict[str, object] = {}
    if flag(given, "ro"):
        columns["read_only"] = True
    if "noexec" in given.get("mountoptions", "").split(";"):
        columns["noexec"] = True
    return columns


def _note_options(reading: Reading, key: str, given: Mapping[str, str], known: Collection[str]) -> None:
    for option in filter(None, given.get("mountoptions", "").split(";")):
        if option not in known:
            reading.dropped(f"{key}.mountoptions", f"{values.shown(option)} has no equal there")
        elif option in _HARMLESS_OPTIONS:
            reading.dropped(f"{key}.mountoptions", f"{option}: the pool decides that")
    for name, reason in _MOUNT_NOTES.items():
        # `acl=1` and `replicate=1` are what Proxmox has anyway.
        usual = name in ("acl", "replicate", "keepattrs")
        if name in given and flag(given, name, default=usual) != usual:
            reading.dropped(f"{key}.{name}", reason)


def _size(reading: Reading, key: str, given: Mapping[str, str]) -> int | None:
    """Return the size of a volume; None is no limit, which is what a size of 0 is to Proxmox too."""
    text = given.get("size", "")
    if not text and (match := _NEW_VOLUME.fullmatch(given.get("volume", ""))):
        # STORAGE:GIGABYTES asks for a new one.
        text = f"{match[1]}G"
    if not text:
        reading.changed(f"{key}.size", "no size is said: it has no limit")
        return None
    try:
        size_bytes = values.parse_size(text)
    except ConfigError as error:
        reading.changed(f"{key}.size", f"{error.message}: it has no limit")
        return None
    if 0 < size_bytes < _LEAST_VOLUME_BYTES:
        reading.changed(f"{key}.size", "it is 1M, the least that a volume of sysctr has")
    return max(size_bytes, _LEAST_VOLUME_BYTES) if size_bytes else None


def lax_path(text: str) -> str:
    """Return a path without what means nothing, such as a slash at its end."""
    if not text.startswith("/") or ".." in text.split("/"):
        return text
    return posixpath.normpath(f"/{text.lstrip('/')}")


def _idmap(reading: Reading, key: str, given: Mapping[str, str]) -> str:
    text = given.get("idmap", "")
    if text == "passthrough":
        reading.changed(f"{key}.idmap", "the files of the host's root are nobody's inside")
        return "1-65535=1"
    if not text:
        return ""
    try:
        idmap = merged_idmap(text)
    except ConfigError as error:
        reading.dropped(f"{key}.idmap", error.message)
        return ""
    if any(ids.host == 0 for ranges in idmap_ranges(idmap) for ids in ranges):
        reading.dropped(f"{key}.idmap", "it would give the container the files of the host's root")
        return ""
    return idmap


def merged_idmap(text: str) -> str:
    """Return a map of ids in our spelling, users and groups in one where they are the same.

    >>> merged_idmap("u:0:1000:2;g:0:1000:2"), merged_idmap("u:33:1000:1")
    ('1000-1001=0', 'u:1000=33')
    """
    idmap = parse_idmap(text)
    users, groups = idmap_ranges(idmap)
    if users != groups:
        return idmap
    return parse_idmap(";".join(item[2:] for item in idmap.split(";") if item.startswith("u:")) or idmap)
