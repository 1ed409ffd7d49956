"""From pct's options to our settings: `pct set` and `pct resize`, and what create and restore need too.

The values are read by the converter of whole files, so one key means the same in both. Here they were typed,
so one that does not hold is an error, and what a file must be allowed (a bind, a device) was asked for.
"""

import re

from sysctr import errors
from sysctr.cli.pct_arguments import Step, Typed, listed, note, truth
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from sysctr.client import Client

# Keys of Proxmox with an equal here; those of cards, mount points and devices have it too.
_EQUALS = {
    "hostname": "name", "memory": "limits.memory", "swap": "limits.swap", "cores": "limits.cores",
    "cpulimit": "limits.cpu", "cpuunits": "limits.cpu_weight", "description": "description", "tags": "tags",
    "nameserver": "dns.nameservers", "searchdomain": "dns.search", "onboot": "onboot",
    "protection": "protected", "entrypoint": "init", "rootfs": "limits.disk",
}  # fmt: skip
_TABLES = {"net": "net", "mp": "mount", "dev": "device"}
_NUMBERED = re.compile(r"(net|mp|dev|unused)([0-9]+)")
_FLAGS = ("onboot", "protection")
# They are no part of what a pct.conf says.
_NOT_CONFIG = (
    "storage", "password", "ssh-public-keys", "start", "restore", "force", "unique", "delete", "bwlimit",
    "pool", "ha-managed", "arch", "ostype", "ignore-unpack-errors", "unprivileged",
)  # fmt: skip
_MOUNT = (
    "volume", "mp", "size", "backup", "ro", "acl", "mountoptions", "quota", "replicate", "shared", "idmap",
    "keepattrs",
)  # fmt: skip
_NEW_VOLUME = re.compile(r"(?:([^:\s/]+):)?[0-9]+(?:\.[0-9]+)?", re.ASCII)
_SIZE = re.compile(r"\+?[0-9]+(\.[0-9]+)?[KMGT]?")
# What of a table stays where a new value does not name it: a card's MAC, and which volume it is.
_STAYS = {"net": ("name", "mac"), "mount": ("name", "pool"), "device": ()}


class Settings:
    """What was typed, as changes by our keys in the order of ours; `notes` is for whoever typed it."""

    def __init__(self, typed: Typed, client: "Client") -> None:
        self.typed = typed
        self.notes: list[str] = []
        self.changes: dict[str, Any] = {}
        # Mount points by their number: what was typed for each.
        self.mounts: dict[str, dict[str, str]] = {}
        self.cleared: list[str] = []
        self._client = client
        self._host: dict[str, Any] = {}
        self._pools: list[str] | None = None
        self._missing: set[str] = set()
        if "unprivileged" in typed.options and not typed.flag("unprivileged"):
            raise errors.Refused(
                f"cannot run `{typed.shown} --unprivileged 0`: there are no privileged containers here",
                "leave it out: its root is nobody on the host",
            )
        self._convert()

    def _convert(self) -> None:
        given = {name: values[-1] for name, values in self.typed.options.items() if name not in _NOT_CONFIG}
        self.cleared = [name for name, value in given.items() if not value]
        given = {name: value for name, value in given.items() if value}
        for name in _FLAGS:
            if name in given:
                self.changes[_EQUALS[name]] = truth(given.pop(name))
        for name in ("console", "debug"):
            if name in given:
                given[name] = str(int(truth(given[name])))
        if given:
            self._read(given)
        for index, mount in self.mounts.items():
            self._place(index, mount)

    def tell(self) -> None:
        """Say what is not as Proxmox would have it, each once."""
        for text in self.notes:
            note(text)
        self.notes = []

    def _read(self, given: "dict[str, str]") -> None:
        from sysctr.config import pct, pct_notes
        from sysctr.config.pct_convert import from_pct
        from sysctr.config.table import HIGHEST_NUMBER

        for name in given:
            match = _NUMBERED.fullmatch(name)
            if match and match[1] == "unused":
                raise self.typed.error(
                    f"--{name} names a volume that is not mounted", "`sysctr mount list` shows them"
                )
            if match and int(match[2]) > HIGHEST_NUMBER:
                raise self.typed.error(f"--{name}: they go to {match[1]}{HIGHEST_NUMBER} here")
        here = self.host()
        values = {name: text for name, text in given.items() if name not in ("description", "env")}
        # What nobody typed must not be told of; Proxmox has defaults for these.
        filled = {"memory": "512", "swap": "512", "unprivileged": "1", **values}
        try:
            text = given.get("description", "").rstrip("\n")
            section = pct.Section(text, filled, _variables(given.get("env", "")))
            converted = from_pct(
                pct.Document(section),
                bridges=frozenset(here["bridges"]),
                allow=pct_notes.PERMISSIONS,
                managed_subnet=here["subnet"],
            )
        except errors.ConfigError as error:
            raise self.typed.error(error.message) from error
        for told in converted.notes:
            self._note(told, given)
        for key in ("memory", "swap"):
            if key not in given:
                converted.changes.pop(f"limits.{key}", None)
        self._fit(converted.changes, here)
        self.changes |= converted.changes
        for name in given:
            if name.startswith("mp"):
                parsed = pct.parse_property_string(given[name], _MOUNT, "volume")
                self.mounts[name.removeprefix("mp")] = parsed

    def _note(self, told: "Any", given: "Mapping[str, str]") -> None:
        from sysctr.config.pct_notes import DROPPED

        key = told.key
        card, _, column = key.partition(".")
        own = f"bridge={self.host()['bridge']}"
        if column == "bridge" and own in given.get(card, "").split(","):
            # The bridge of sysctr was asked for by name, as `pct config` shows it.
            return
        if told.kind == DROPPED and key in given and (key in _EQUALS or _NUMBERED.fullmatch(key)):
            raise self.typed.error(f"--{key} {given[key]}: {told.reason}")
        word = "has no effect" if told.kind == DROPPED else "is not the same here"
        self.notes.append(f"{key} {word}: {told.reason}")

    def _fit(self, changes: "dict[str, Any]", here: "dict[str, Any]") -> None:
        """Take out what this host cannot enforce, as it is done with a whole file."""
        if "limits.swap" in changes and "swap" not in here["limits"]:
            del changes["limits.swap"]
            self.notes.append("swap has no effect: this host does not count swap")
        cores = changes.get("limits.cores")
        if isinstance(cores, int) and cores > here["cores"]:
            del changes["limits.cores"]
            self.notes.append(f"cores has no effect: this host has {here['cores']}")

    def host(self) -> "dict[str, Any]":
        """Return what is to be known of this host."""
        if not self._host:
            self._host = field(self._client.get(path("host")), "host")
        return self._host

    # Storage

    def pool(self, storage: str) -> str:
        """Return the pool of a storage's name, or nothing and a note, once."""
        if self._pools is None:
            self._pools = [pool["name"] for pool in field(self._client.get(path("pools")), "pools")]
        if storage in self._pools:
            return storage
        if storage and storage not in self._missing:
            self._missing.add(storage)
            self.notes.append(f"there is no pool {storage} here: the default one is used")
        return ""

    def _place(self, index: str, mount: "Mapping[str, str]") -> None:
        new = _NEW_VOLUME.fullmatch(mount.get("volume", ""))
        if new and (pool := self.pool(new[1] or self.typed.last("storage"))):
            self.changes[f"mount.{index}.pool"] = pool

    def storage_of_root(self) -> str:
        """Return the storage that the root file system was asked for on."""
        volume = self.typed.last("rootfs").partition(",")[0].removeprefix("volume=")
        match = _NEW_VOLUME.fullmatch(volume)
        return (match[1] if match and match[1] else "") or self.typed.last("storage")

    # As ours are typed

    def assignments(self, skip: "Sequence[str]" = ()) -> "list[str]":
        """Return the changes as KEY=VALUE, but for those whose key begins with one of `skip`."""
        return [
            f"{name}={as_text(value)}"
            for name, value in self.changes.items()
            if not any(name == one or name.startswith(f"{one}.") for one in skip)
        ]

    def lines(self, table: str) -> "list[tuple[int, str]]":
        """Return the number and the one line of each card, mount point or device."""
        found: dict[int, list[str]] = {}
        for name, value in self.changes.items():
            top, _, rest = name.partition(".")
            if top == table:
                index, _, column = rest.partition(".")
                found.setdefault(int(index), []).append(f"{column}={as_text(value)}")
        return [(index, ",".join(found[index])) for index in sorted(found)]


def as_text(value: "Any") -> str:
    """Return a value as one types it.

    >>> as_text(True), as_text(["a", "b"]), as_text(3)
    ('true', 'a,b', '3')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _variables(text: str) -> "tuple[str, ...]":
    # No argument can hold the zero bytes that Proxmox puts between them.
    return tuple(filter(None, text.replace("\\0", "\0").split("\0")))


# pct set


def change(typed: Typed, client: "Client") -> "list[Step]":
    """Return what `pct set` does."""
    number = typed.words[0]
    if "rootfs" in typed.options:
        raise typed.error("the options of a root file system are settled", f"pct resize {number} rootfs +2G")
    if not typed.options:
        raise typed.error("nothing is to be set", "pct set 101 -memory 1024")
    settings = Settings(typed, client)
    known = field(client.get(path("containers", number, "config")), "config") or {}
    deleted = [key.lstrip("!") for text in typed.options.get("delete", []) for key in listed(text)]
    _make_room(settings, known)
    unset: list[str] = []
    removed: list[str] = []
    for name in [*settings.cleared, *deleted]:
        _unset(settings, name, known, unset, removed)
    for name in typed.options:
        if (match := _NUMBERED.fullmatch(name)) and name not in settings.cleared:
            unset += _replaced(settings, _TABLES[match[1]], match[2], known)
    settings.tell()
    assigned = settings.assignments()
    options = [word for key in unset for word in ("--unset", key)]
    steps = [Step("set", number, *assigned, *options)] if assigned or options else []
    return steps + [Step("mount", "remove", number, key, "--keep") for key in removed]


def _make_room(settings: Settings, known: "Mapping[str, Any]") -> None:
    """Give a device that `features` asks for a number that no device of the container has."""
    had: Mapping[str, Any] = known.get("device", {})
    for index in {name.split(".")[1] for name in settings.changes if name.startswith("device.")}:
        if f"dev{index}" in settings.typed.options or index not in had:
            continue
        path_ = settings.changes.pop(f"device.{index}.path")
        if path_ not in [device.get("path") for device in had.values()]:
            taken = {*had, *(name.split(".")[1] for name in settings.changes if name.startswith("device."))}
            free = next(str(number) for number in range(len(taken) + 1) if str(number) not in taken)
            settings.changes[f"device.{free}.path"] = path_


def _unset(
    settings: Settings, name: str, known: "Mapping[str, Any]", unset: "list[str]", removed: "list[str]"
) -> None:
    match = _NUMBERED.fullmatch(name)
    if match and match[1] == "unused":
        raise errors.Refused(
            f"cannot delete {name}: sysctr does not number volumes that are not mounted",
            "`sysctr mount list` shows them, `sysctr mount remove CT VOLUME --delete` destroys one",
        )
    if match:
        table = f"{_TABLES[match[1]]}.{match[2]}"
        (removed if match[1] == "mp" else unset).append(table)
    elif name == "env":
        unset += [f"environment.{key}" for key in known.get("environment", {})]
    elif name in ("hostname", "rootfs"):
        raise settings.typed.error(f"a container always has its {name}")
    elif name in _EQUALS:
        unset.append(_EQUALS[name])
    else:
        settings.notes.append(f"{name} has no equal here, so there is nothing to delete")


def _replaced(settings: Settings, table: str, index: str, known: "Mapping[str, Any]") -> "list[str]":
    """Return the columns that a table has and the new value does not name: it replaces the whole."""
    had: Mapping[str, Any] = known.get(table, {}).get(index, {})
    stays: tuple[str, ...] = _STAYS[table]
    if table == "mount":
        volume = settings.mounts[index].get("volume", "")
        own = bool(had) and not any(had.get(key) for key in ("source", "volume", "tmpfs"))
        if _NEW_VOLUME.fullmatch(volume) and had:
            raise errors.Refused(
                f"cannot make mp{index} of {settings.typed.words[0]}: it is there already",
                f"pct set {settings.typed.words[0]} --delete mp{index} first",
            )
        if not volume.startswith("/") and not _NEW_VOLUME.fullmatch(volume):
            if not own:
                raise errors.NotFound(
                    f"cannot mount {volume}: mp{index} of {settings.typed.words[0]} is no volume of its own",
                    f"STORAGE:SIZE makes one, such as --mp{index} local:8,mp=/data; `sysctr mount list` has "
                    "those that were kept",
                )
            name = had.get("name", f"disk{index}")
            if not volume.endswith(f"-{name}"):
                settings.notes.append(f"mp{index} keeps the volume that it has, {name}, whatever {volume} is")
            if "size" not in settings.mounts[index]:
                stays = (*stays, "size")
        elif volume.startswith("/"):
            # A path has neither a name nor a pool.
            stays = ()
    return [
        f"{table}.{index}.{column}"
        for column in had
        if column not in stays and f"{table}.{index}.{column}" not in settings.changes
    ]


# pct resize


def resize(typed: Typed, client: "Client") -> "list[Step]":
    """Return what `pct resize` does: a volume grows, by so much or to so much."""
    from sysctr.config.values import format_size, parse_size

    number, disk, size = typed.words
    if _SIZE.fullmatch(size) is None:
        raise typed.error(f"{size!r} is not a size such as 8G or +2G")
    if disk == "rootfs":
        container = field(client.get(path("containers", number)), "container")
        key, now = "limits.disk", container.get("disk_limit_bytes")
    else:
        match = _NUMBERED.fullmatch(disk)
        mounts = field(client.get(path("containers", number, "mounts")), "mounts")
        known = {mount["key"]: mount for mount in mounts if mount["kind"] == "volume" and mount["key"]}
        key = f"mount.{match[2]}" if match and match[1] == "mp" else ""
        if key not in known:
            raise errors.NotFound(f"cannot resize {disk} of {number}: it is no volume of its own")
        now = known[key]["size_bytes"]
        key = f"{key}.size"
    if now is None:
        raise errors.WrongState(
            f"cannot resize {disk} of {number}: it has no limit and grows with what is in it",
            f"`sysctr set {number} {key}=SIZE` gives it one",
        )
    wanted = parse_size(size.removeprefix("+")) + (now if size.startswith("+") else 0)
    if wanted < now:
        raise errors.Refused(
            f"cannot resize {disk} of {number}: it has {format_size(now)}, and pct only grows one",
            f"`sysctr set {number} {key}={format_size(wanted)}`, where it is stopped and its files fit",
        )
    return [Step("set", number, f"{key}={format_size(wanted)}")]
