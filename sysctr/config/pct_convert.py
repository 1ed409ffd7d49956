"""From pct.conf to our settings: what each key of Proxmox is here, and a note on all that has no equal.

Nothing that a file says makes this fail. What gives the container something of its host is left out unless it
is allowed by name, see PERMISSIONS.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from sysctr.config import schema, values
from sysctr.config.pct import SPACE, Document, Section, parse_property_string
from sysctr.config.pct_notes import Note
from sysctr.config.pct_raw import add_device, read_device, read_raw
from sysctr.config.pct_reading import HostPath, OwnVolume, Reading, flag
from sysctr.config.pct_tables import read_mount, read_net, read_rootfs
from sysctr.config.table import Plain
from sysctr.errors import ConfigError

ARCHITECTURES = ("amd64", "i386", "arm64", "armhf", "riscv32", "riscv64")
OSTYPES = (
    "debian", "devuan", "ubuntu", "centos", "fedora", "opensuse", "archlinux", "alpine", "gentoo", "nixos",
    "openeuler", "unmanaged",
)  # fmt: skip

# What Proxmox gives a container of which nothing else is said.
_DEFAULT_MIB = {"memory": 512, "swap": 512}
_LEAST_MEMORY_MIB = 16
_MOST_WEIGHT = 10000
_LONGEST_DESCRIPTION_BYTES = 4096
_LONGEST_NAME = 63
_MOST = {"tags": 64, "dns.nameservers": 3, "dns.search": 6}
_NUMBERED = re.compile(r"(net|mp|dev|unused)([0-9]{1,3})")
# How far Proxmox counts. Beyond it a hostile file could keep us busy for minutes.
_HIGHEST = {"net": 31, "mp": 255, "dev": 255, "unused": 255}
_MOST_RAW = 1024
_FEATURES = ("nesting", "keyctl", "fuse", "mount", "mknod", "force_rw_sys")

# Keys of which there is no equal, what a reader wants to know of that, and the value that needs no note.
_NO_EQUAL: dict[str, tuple[str, str]] = {
    "startup": ("containers start in the order of their numbers, without delays", ""),
    "console": ("a container always has its console", "1"),
    "tty": ("a container has one console and no further terminals", "2"),
    "cmode": ("the console is what the init makes of it", "tty"),
    "timezone": ("the container keeps its own time zone", ""),
    "debug": ("`sysctr logs` shows the console", "0"),
    "template": ("it was a template there; here it is a container, which can be started", "0"),
    "lock": ("an action of Proxmox was going on", ""),
    "parent": ("snapshots stay behind", ""),
    "snaptime": ("snapshots stay behind", ""),
    "snapstate": ("snapshots stay behind", ""),
    "snapname": ("snapshots stay behind", ""),
    "digest": ("it is about the file of Proxmox", ""),
}


@dataclass(frozen=True)
class Converted:
    """What a pct.conf is here: changes by dotted key for a new container, and notes on the rest.

    `mounts` are the mount points that become volumes of the container's own (they are among the changes),
    `host_paths` the binds and devices that it asks for, allowed or not. `rootfs_size_bytes` is limits.disk.
    """

    changes: dict[str, Plain]
    mounts: tuple[OwnVolume, ...]
    host_paths: tuple[HostPath, ...]
    rootfs_size_bytes: int | None
    arch: str
    ostype: str
    unprivileged: bool
    notes: tuple[Note, ...]

    @property
    def name(self) -> str:
        """Return the name, which is empty if the file has none."""
        return str(self.changes.get("name", ""))


def from_pct(
    document: Document,
    *,
    bridges: Collection[str] = frozenset(),
    allow: Collection[str] = frozenset(),
    managed_subnet: str = "",
    firewall: str = "",
) -> Converted:
    """Return our settings for a Proxmox container, as it is now: not what is pending, nor its snapshots.

    `bridges` are those of this host that a card may stay on, `allow` names of PERMISSIONS; an address stays
    on sysctr's own bridge only within `managed_subnet`. `firewall` is the text of pct.fw, if there is one.
    """
    reading = Reading(allow, bridges, managed_subnet)
    root = document.root
    _read_keys(reading, root)
    for key, value in root.raw[:_MOST_RAW]:
        read_raw(reading, key, value)
    if len(root.raw) > _MOST_RAW:
        reading.dropped("lxc", f"{len(root.raw) - _MOST_RAW} further raw lines")
    for item in root.environment:
        _read_variable(reading, item)
    for line in root.lines:
        reading.dropped(values.shown(line), "it cannot be read")
    for problem in document.problems:
        key, _, reason = problem.partition(": ")
        reading.changed(key, reason)
    _note_rest(reading, document, firewall)
    return Converted(
        reading.changes,
        tuple(reading.volumes),
        tuple(reading.host_paths),
        _disk_bytes(reading),
        _one_of(reading, root, "arch", ARCHITECTURES, "amd64"),
        _one_of(reading, root, "ostype", OSTYPES, "unmanaged"),
        flag(root.values, "unprivileged"),
        tuple(reading.notes),
    )


def name_of(hostname: str) -> str:
    """Return a container's name made of a host name, or nothing where none can be made.

    >>> name_of("www.example.org"), name_of("My_Server"), name_of("42"), name_of("---")
    ('www', 'my-server', 'ct42', '')
    """
    label = hostname.strip(SPACE).lower().partition(".")[0]
    name = re.sub(r"[^a-z0-9-]+", "-", label).strip("-")[:_LONGEST_NAME].rstrip("-")
    return f"ct{name}"[:_LONGEST_NAME] if name.isdigit() else name


def _read_keys(reading: Reading, root: Section) -> None:
    # Numbered ones in the order of their numbers, so that each finds its own free.
    for key in sorted(root.values, key=_order):
        value = root.values[key]
        numbered = _NUMBERED.fullmatch(key)
        if numbered and int(numbered[2]) > _HIGHEST[numbered[1]]:
            numbered = None
        if key in _READERS:
            _READERS[key](reading, key, value)
        elif key in _NO_EQUAL:
            reason, unless = _NO_EQUAL[key]
            if value != unless:
                reading.dropped(key, reason)
        elif numbered:
            _TABLES[numbered[1]](reading, key, value)
        elif key not in ("arch", "ostype", "unprivileged"):
            reading.dropped(key, f"sysctr does not know this key ({values.shown(value)})")
    if root.description:
        _read_description(reading, root.description)
    for key, default in _DEFAULT_MIB.items():
        if key not in root.values:
            reading.set(key, f"limits.{key}", f"{default}M")
            reading.changed(key, f"nothing is said: Proxmox gives {default}M")
    if not flag(root.values, "unprivileged"):
        reading.changed(
            "unprivileged", "it was privileged; here its root is nobody on the host, as every container's"
        )


def _order(key: str) -> tuple[str, int]:
    numbered = _NUMBERED.fullmatch(key)
    return (numbered[1], int(numbered[2])) if numbered else (key, 0)


def _note_rest(reading: Reading, document: Document, firewall: str) -> None:
    pending = document.pending
    for key in sorted(pending.values):
        reading.dropped(
            f"pending {key}", f"{values.shown(pending.values[key])} waited for the next start there"
        )
    further = len(pending.environment) + len(pending.raw) + len(pending.lines) + bool(pending.description)
    if further:
        reading.dropped("pending", f"{further} more that waited for the next start there")
    for name in sorted(document.snapshots):
        reading.dropped(f"[{name}]", "snapshots stay behind")
    if firewall.strip():
        reading.dropped("pct.fw", "sysctr does not enforce Proxmox's firewall rules", "firewall")


def _disk_bytes(reading: Reading) -> int | None:
    disk = reading.changes.get("limits.disk")
    return values.parse_size(disk) if isinstance(disk, str) else None


def _one_of(reading: Reading, root: Section, key: str, known: Collection[str], default: str) -> str:
    value = root.values.get(key, default)
    if value in known:
        return value
    reading.changed(key, f"{values.shown(value)} is taken as {default}")
    return default


# One function for each kind of key


def _read_bool(reading: Reading, key: str, value: str) -> None:
    if flag({key: value}, key):
        reading.set(key, {"onboot": "onboot", "protection": "protected"}[key], True)


def _read_hostname(reading: Reading, key: str, value: str) -> None:
    name = name_of(value)
    if not name:
        reading.dropped(key, f"no name can be made of {values.shown(value)}")
    elif reading.set(key, "name", name) and name != value:
        reading.changed(key, f"{values.shown(value)} is {name} here")


def _read_description(reading: Reading, text: str) -> None:
    one_line = " ".join(filter(None, (line.strip() for line in text.split("\n")))) if "\n" in text else text
    kept = "".join(
        character if _fits(character) else " " for character in one_line[:_LONGEST_DESCRIPTION_BYTES]
    )
    kept = kept.encode()[:_LONGEST_DESCRIPTION_BYTES].decode("utf-8", "ignore")
    if kept != text:
        reading.changed("description", "it is one line here")
    if kept:
        reading.set("description", "description", kept)


def _fits(character: str) -> bool:
    try:
        values.parse_text(character)
    except ConfigError:
        return False
    return True


def _read_cores(reading: Reading, key: str, value: str) -> None:
    if value.isascii() and value.isdigit():
        reading.set(key, "limits.cores", value)
    else:
        # A list means something else to us, and nothing to Proxmox.
        reading.dropped(key, f"{values.shown(value)} is not a number of processors")


def _read_cpulimit(reading: Reading, key: str, value: str) -> None:
    if re.fullmatch(r"0{1,9}(\.0{1,9})?", value) is None:
        reading.set(key, "limits.cpu", value)


def _read_cpuunits(reading: Reading, key: str, value: str) -> None:
    if re.fullmatch(r"[0-9]{1,9}", value) is None:
        reading.dropped(key, f"{values.shown(value)} is not a weight")
        return
    weight = min(max(int(value), 1), _MOST_WEIGHT)
    if weight != int(value):
        reading.changed(key, f"{weight}, which is what Linux makes of {value}")
    reading.set(key, "limits.cpu_weight", weight)


def _read_mib(reading: Reading, key: str, value: str) -> None:
    if re.fullmatch(r"[0-9]{1,12}", value) is None:
        reading.dropped(key, f"{values.shown(value)} is not a number of MiB")
        return
    size_mib = int(value)
    if key == "memory" and size_mib < _LEAST_MEMORY_MIB:
        reading.changed(key, f"{_LEAST_MEMORY_MIB}M, the least that works")
        size_mib = _LEAST_MEMORY_MIB
    reading.set(key, f"limits.{key}", f"{size_mib}M")


def _read_list(reading: Reading, key: str, value: str) -> None:
    name = {"tags": "tags", "nameserver": "dns.nameservers", "searchdomain": "dns.search"}[key]
    kept: list[str] = []
    for item in filter(None, re.split(r"[;,\s]+", value)):
        item = item.lower()
        try:
            schema.plain_changes({name: [item]})
        except ConfigError as error:
            reading.dropped(key, error.message.partition(": ")[2])
            continue
        if len(kept) == _MOST[name]:
            reading.dropped(key, f"{values.shown(item)}: {_MOST[name]} are the most")
        else:
            kept.append(item)
    if kept:
        reading.set(key, name, kept)


def _read_entrypoint(reading: Reading, key: str, value: str) -> None:
    if re.search(r"\s", value):
        reading.dropped(key, f"an init is started without arguments ({values.shown(value)})")
    elif value != "/sbin/init":
        reading.set(key, "init", value)


def _read_variable(reading: Reading, item: str) -> None:
    name, equals, value = item.partition("=")
    key = f"environment {values.shown(name)}"
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        reading.dropped(key, "it is not of the form NAME=VALUE")
    else:
        reading.set(key, f"environment.{name}", value)


def _read_features(reading: Reading, key: str, value: str) -> None:
    try:
        given = parse_property_string(value, _FEATURES)
    except ConfigError as error:
        reading.dropped(key, error.message)
        return
    ours = {known.name for known in schema.KEYS if known.name.startswith("features.")}
    for name, wanted in given.items():
        feature = f"features.{name}"
        if name != "mount" and not flag(given, name):
            continue
        if name == "fuse":
            if reading.allowed(feature, "it gives the container /dev/fuse", "feature"):
                add_device(reading, feature, "/dev/fuse")
        elif feature in ours and name != "mount":
            if reading.allowed(feature, "it widens what the container may do", "feature"):
                reading.set(feature, feature, True)
        else:
            reading.dropped(feature, f"sysctr has no such feature ({values.shown(wanted)})", "feature")


def _read_hookscript(reading: Reading, key: str, value: str) -> None:
    reading.dropped(key, f"sysctr runs no hook scripts ({values.shown(value)})", "hook")


def _read_rootfs(reading: Reading, _key: str, value: str) -> None:
    read_rootfs(reading, value)


def _read_unused(reading: Reading, key: str, value: str) -> None:
    reading.dropped(key, f"{values.shown(value)} was not mounted")


_READERS: dict[str, Callable[[Reading, str, str], None]] = {
    "onboot": _read_bool,
    "protection": _read_bool,
    "hostname": _read_hostname,
    "cores": _read_cores,
    "cpulimit": _read_cpulimit,
    "cpuunits": _read_cpuunits,
    "memory": _read_mib,
    "swap": _read_mib,
    "tags": _read_list,
    "nameserver": _read_list,
    "searchdomain": _read_list,
    "entrypoint": _read_entrypoint,
    "features": _read_features,
    "hookscript": _read_hookscript,
    "rootfs": _read_rootfs,
}
_TABLES: dict[str, Callable[[Reading, str, str], None]] = {
    "net": read_net,
    "mp": read_mount,
    "dev": read_device,
    "unused": _read_unused,
}
