"""Mount points and device nodes of a container's configuration: their values, one-line form and rules."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from sysctr.config.values import parse_text, refuse, shown
from sysctr.errors import ConfigError

# Of volumes: a shared one never begins with a digit, so that it cannot pass for a container's own.
_VOLUME = re.compile(r"[a-z][a-z0-9-]{0,30}")
_POOL = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_MODE = re.compile(r"[0-7]{1,4}")
_IDMAP_ITEM = re.compile(r"(?:([ug]):)?([0-9]{1,10})(?:-([0-9]{1,10}))?=([0-9]{1,10})")
# As Proxmox writes it: [ug]:CONTAINER:HOST:COUNT.
_IDMAP_PROXMOX = re.compile(r"([ug]):([0-9]{1,10}):([0-9]{1,10}):([0-9]{1,10})")
_LAST_ID = 2**32 - 2
_MOST_RANGES = 64
_BARE_SIZE = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_ALIASES = {"mp": "target", "ro": "read_only"}
PRESETS = {"fuse": "/dev/fuse", "tun": "/dev/net/tun"}

# What the kernel and the guest's own init mount there would hide it, or be hidden.
_TAKEN = {
    "/proc": "the kernel shows its processes there",
    "/sys": "the kernel shows its devices there",
    "/dev": "the container's devices are there",
    "/run": "the container mounts a file system of its own there",
}
_NO_SOURCES = ("/proc", "/sys", "/dev")


@dataclass(frozen=True)
class Mount:
    """A mount point of a container: a volume of its own, a shared one, a host's path, or memory."""

    index: int
    target: str
    source: str
    volume: str
    tmpfs: bool
    name: str
    pool: str
    size_bytes: int | None
    backup: bool
    read_only: bool
    dev: bool
    suid: bool
    noexec: bool
    idmap: str
    host_root: bool
    mode: str

    @property
    def key(self) -> str:
        """Return its table in the file, such as `mount.0`."""
        return f"mount.{self.index}"

    @property
    def kind(self) -> str:
        """Return volume, shared, bind or tmpfs."""
        if self.source:
            return "bind"
        if self.volume:
            return "shared"
        return "tmpfs" if self.tmpfs else "volume"


@dataclass(frozen=True)
class Device:
    """A device node of the host that the container gets."""

    index: int
    path: str
    target: str
    mode: str
    uid: int
    gid: int

    kind = "device"

    @property
    def key(self) -> str:
        """Return its table in the file, such as `device.0`."""
        return f"device.{self.index}"

    @property
    def place(self) -> str:
        """Return where the node is inside."""
        return self.target or self.path


@dataclass(frozen=True)
class IdRange:
    """`count` ids of the host from `host` up show as those of the container from `inside` up."""

    host: int
    inside: int
    count: int


def parse_volume(text: str) -> str:
    """Return the text if it can name a volume.

    >>> parse_volume("media")
    'media'
    """
    if _VOLUME.fullmatch(text) is None:
        raise refuse(text, "a volume's name, which begins with a letter and has a-z, 0-9 and -, 31 at most")
    return text


def parse_pool(text: str) -> str:
    """Return the text if it can name a pool."""
    if _POOL.fullmatch(text) is None:
        raise refuse(text, "the name of a pool")
    return text


def parse_mode(text: str) -> str:
    """Read the permissions of a file, in octal.

    >>> parse_mode("755")
    '0755'
    """
    if _MODE.fullmatch(text) is None:
        raise refuse(text, "a file's permissions in octal, such as 0755")
    return f"{int(text, 8):04o}"


def parse_idmap(text: str) -> str:
    """Read which ids of the host show as which inside: HOST=INSIDE or HOST-LAST=INSIDE, `;` between them.

    With u: or g: before it a pair is for users or groups only. Proxmox's u:INSIDE:HOST:COUNT is understood.

    >>> parse_idmap("1000=1000"), parse_idmap("u:33=1000; g:100-109=100"), parse_idmap("u:0:1000:1")
    ('1000=1000', 'u:33=1000;g:100-109=100', 'u:1000=0')
    """
    canonical = []
    for item in parse_text(text, 4096).replace(";", " ").split():
        kinds, ids = _idmap_item(item, text)
        last = f"-{ids.host + ids.count - 1}" if ids.count > 1 else ""
        canonical.append(f"{f'{kinds}:' if kinds else ''}{ids.host}{last}={ids.inside}")
    if not canonical or len(canonical) > _MOST_RANGES:
        raise refuse(text, f"1 to {_MOST_RANGES} pairs of ids such as 1000=1000")
    written = ";".join(canonical)
    for ranges in idmap_ranges(written):
        _check_apart(text, [(ids.host, ids.count) for ids in ranges])
        _check_apart(text, [(ids.inside, ids.count) for ids in ranges])
    return written


def idmap_ranges(idmap: str) -> tuple[tuple[IdRange, ...], tuple[IdRange, ...]]:
    """Return the ranges of a checked map for users and for groups.

    >>> idmap_ranges("u:33=1000")
    ((IdRange(host=33, inside=1000, count=1),), ())
    """
    items = [_idmap_item(item, idmap) for item in idmap.split(";") if item]
    return (
        tuple(ids for kinds, ids in items if kinds in ("", "u")),
        tuple(ids for kinds, ids in items if kinds in ("", "g")),
    )


def _idmap_item(item: str, text: str) -> tuple[str, IdRange]:
    if match := _IDMAP_PROXMOX.fullmatch(item):
        kinds, ids = match[1], IdRange(int(match[3]), int(match[2]), int(match[4]))
    elif match := _IDMAP_ITEM.fullmatch(item):
        first = int(match[2])
        kinds, ids = match[1] or "", IdRange(first, int(match[4]), int(match[3] or first) - first + 1)
    else:
        raise refuse(text, "a map of ids such as 1000=1000, the host's first")
    if ids.count < 1 or max(ids.host, ids.inside) + ids.count - 1 > _LAST_ID:
        raise refuse(text, "a map of ids that exist")
    return kinds, ids


def _check_apart(text: str, ranges: Sequence[tuple[int, int]]) -> None:
    end = -1
    for first, count in sorted(ranges):
        if first <= end:
            raise ConfigError(f"{shown(text)} has the id {first} twice")
        end = first + count - 1


def mount_properties(text: str) -> dict[str, str]:
    """Read a mount point as `target=/data,size=8G` or `source=/srv/www,target=/srv/www,ro`.

    As Proxmox writes it, a path or POOL:GIGABYTES may come first, and the target is `mp`.

    >>> mount_properties("/srv/www,mp=/srv/www,ro=1")
    {'source': '/srv/www', 'target': '/srv/www', 'read_only': '1'}
    """
    properties: dict[str, str] = {}
    for number, item in enumerate(parse_text(text, 8192).split(",")):
        name, equals, value = item.partition("=")
        if equals:
            _give(properties, _ALIASES.get(name, name), value, text)
        elif number == 0 and item.startswith("/"):
            _give(properties, "source", item, text)
        elif number == 0 and _BARE_SIZE.fullmatch(item.rpartition(":")[2]):
            pool, _, size = item.rpartition(":")
            if pool:
                _give(properties, "pool", pool, text)
            _give(properties, "size", f"{size}G", text)
        else:
            _give(properties, _ALIASES.get(item, item), "true", text)
    return properties


def device_properties(text: str) -> dict[str, str]:
    """Read a device as `fuse`, `/dev/kvm,mode=0660` or `path=/dev/ttyUSB0,target=/dev/modem`.

    >>> device_properties("tun"), device_properties("/dev/kvm,gid=104")
    ({'path': '/dev/net/tun'}, {'path': '/dev/kvm', 'gid': '104'})
    """
    properties: dict[str, str] = {}
    for number, item in enumerate(parse_text(text, 8192).split(",")):
        name, equals, value = item.partition("=")
        if not equals and number == 0:
            name, value = "path", item
        _give(properties, name, PRESETS.get(value, value) if name == "path" else value, text)
    return properties


def _give(properties: dict[str, str], name: str, value: str, text: str) -> None:
    if not name:
        raise ConfigError(f"{shown(text)} is not written key=value,key=value")
    if name in properties:
        raise ConfigError(f"{name} is given twice in {shown(text)}")
    properties[name] = value


def check_mounts(mounts: Iterable[Mount], devices: Iterable[Device]) -> None:
    """Raise ConfigError for mount points and devices that do not go, alone or together."""
    places: dict[str, str] = {}
    volumes: dict[tuple[str, str], Mount] = {}
    for mount in mounts:
        _check_target(mount)
        _check_kind(mount)
        _check_place(places, mount.target, mount.key)
        if mount.kind == "volume":
            other = volumes.setdefault(("", mount.name), mount)
            if other is not mount:
                raise ConfigError(
                    f"cannot accept {mount.key}.name: {mount.name} is that of {other.key} already"
                )
        elif mount.kind == "shared":
            other = volumes.setdefault((mount.pool, mount.volume), mount)
            if _is_below(mount.target, other.target) or _is_below(other.target, mount.target):
                raise ConfigError(
                    f"cannot accept {mount.key}: it would show the volume {mount.volume} inside itself"
                )
    for device in devices:
        if not device.path:
            raise ConfigError(
                f"cannot accept {device.key}: it has no path",
                f"{device.key} = fuse, tun, or the path of a device of this host",
            )
        if not _is_below(device.path, "/dev"):
            raise ConfigError(f"cannot accept {device.key}.path: {device.path} is not below /dev")
        if not _is_below(device.place, "/dev") or device.place in _OWN_DEVICES or _in_own(device.place):
            raise ConfigError(f"cannot accept {device.key}.target: {device.place} is not free below /dev")
        _check_place(places, device.place, device.key)


_OWN_DEVICES = frozenset(
    f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "console", "ptmx", "fd",
                                "stdin", "stdout", "stderr", "shm", "pts", "mqueue", ".sysctr")
)  # fmt: skip


def _in_own(place: str) -> bool:
    return any(_is_below(place, taken) for taken in _OWN_DEVICES)


def _check_target(mount: Mount) -> None:
    if not mount.target:
        raise ConfigError(f"cannot accept {mount.key}: it has no target", "target=/data says where it goes")
    for taken, reason in _TAKEN.items():
        if mount.target == taken or _is_below(mount.target, taken):
            raise ConfigError(f"cannot accept {mount.key}.target: {mount.target} is not free: {reason}")


def _check_kind(mount: Mount) -> None:
    kinds = [name for name in ("source", "volume", "tmpfs") if getattr(mount, name)]
    if len(kinds) > 1:
        raise ConfigError(
            f"cannot accept {mount.key}: it has {' and '.join(kinds)}, which exclude each other"
        )
    fits = {
        "size": mount.size_bytes is None or mount.kind != "bind",
        "pool": not mount.pool or mount.kind in ("volume", "shared"),
        "mode": not mount.mode or mount.kind == "tmpfs",
        "idmap": not mount.idmap or mount.kind == "bind",
        "host_root": not mount.host_root or bool(mount.idmap),
        "dev": not mount.dev or mount.kind == "bind",
        "suid": not mount.suid or mount.kind in ("bind", "shared"),
    }
    wrong = [name for name, right in fits.items() if not right]
    if wrong:
        raise ConfigError(f"cannot accept {mount.key}.{wrong[0]}: {_ONLY_FOR[wrong[0]]}")
    if mount.kind == "bind":
        _check_source(mount)


_ONLY_FOR = {
    "size": "a directory of the host has no size of its own",
    "pool": "only a volume is kept in a pool",
    "mode": "only a tmpfs takes its permissions from here",
    "idmap": "only a bind of a host's path (source) has one, volumes have the container's own ids",
    "host_root": "there is no idmap that it could be about",
    "dev": "only a bind of a host's path (source) can have devices; `device.N` gives single ones",
    "suid": "only a bind and a shared volume take it, a volume of the container's own keeps setuid anyway",
}


def _check_source(mount: Mount) -> None:
    for kept in _NO_SOURCES:
        if mount.source == kept or _is_below(mount.source, kept):
            raise ConfigError(
                f"cannot accept {mount.key}.source: {mount.source} is the kernel's, not a directory to share",
                "`device.N` gives a container a device" if kept == "/dev" else "",
            )
    mapped = [ids for ranges in idmap_ranges(mount.idmap) for ids in ranges]
    if any(ids.host == 0 for ids in mapped) and not mount.host_root:
        raise ConfigError(
            f"cannot accept {mount.key}.idmap: it would give the container the files of the host's root (0)",
            f"with {mount.key}.host_root = true it is taken",
        )
    if mount.host_root and mount.suid:
        raise ConfigError(
            f"cannot accept {mount.key}.suid: with host_root a setuid program would be one of the host's root"
        )


def _check_place(places: dict[str, str], place: str, key: str) -> None:
    other = places.setdefault(place, key)
    if other != key:
        raise ConfigError(f"cannot accept {key}: {other} is on {place} already")


def _is_below(path: str, directory: str) -> bool:
    return path.startswith(f"{directory}/")


def free_index(taken: Collection[int], most: int) -> int:
    """Return the lowest number that no table of the kind has; ConfigError when all are taken."""
    for index in range(most + 1):
        if index not in taken:
            return index
    raise ConfigError(f"cannot add another one: {most + 1} are the most")
