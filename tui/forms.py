"""What is asked for before something is done: fields as data, and what was typed as the body of a request.

A form is drawn by sysctr.tui.screens.form. What it cannot know the daemon judges,
and its words are shown there.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sysctr import errors
from sysctr.config.schedule import parse_span
from sysctr.config.values import parse_size
from sysctr.tui.store import Item

Values = dict[str, Any]


class Kind(Enum):
    """What is typed into a field, and what is made of it."""

    TEXT = "text"
    SECRET = "secret"
    NUMBER = "number"
    SIZE = "size"
    TIME = "time"
    FLAG = "flag"
    # One of `choices`, or of what the daemon lists under `source`.
    CHOICE = "choice"
    # Several words with commas between them.
    WORDS = "words"
    # Several things that may have commas themselves, with semicolons between them.
    LIST = "list"
    # a=b with commas between them.
    MAP = "map"


class Wrong(Exception):
    """A field that cannot be read: which one, and why."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


@dataclass(frozen=True)
class Field:
    """One line of a form; its key is that of the request, `a.b` one inside a table."""

    key: str
    label: str
    kind: Kind = Kind.TEXT
    # Shown while nothing is typed.
    hint: str = ""
    required: bool = False
    value: "str | bool" = ""
    choices: tuple[str, ...] = ()
    source: str = ""
    # Takes the value from the item, where that has it.
    initial: "Callable[[Item], str | bool] | None" = None
    # Sent also where nothing was typed.
    always: bool = False


@dataclass(frozen=True)
class Form:
    """Fields with a title, and the word on the button."""

    title: str
    button: str
    fields: tuple[Field, ...]
    note: str = ""
    # Returns what is lost for good with these values, and the word that has to be typed for that; or nothing.
    grave: "Callable[[Item, Values], tuple[str, str]]" = lambda item, values: ("", "")

    def initial(self, item: Item) -> "dict[str, str | bool]":
        """Return what stands in the fields when it is opened."""
        return {one.key: one.initial(item) if one.initial and item else one.value for one in self.fields}

    def read(self, typed: "Mapping[str, str | bool]") -> Values:
        """Return the body of the request; raises Wrong for the first field that cannot be read.

        >>> SNAPSHOT.read({"name": "before", "description": "", "expires": ""})
        {'name': 'before'}
        >>> Form("", "", (Field("set.limits.memory", "Memory"),)).read({"set.limits.memory": "2G"})
        {'set': {'limits.memory': '2G'}}
        """
        body: Values = {}
        for field in self.fields:
            value = convert(field, typed.get(field.key, field.value))
            if value is None:
                if field.required:
                    raise Wrong(field.key, "it is needed")
                continue
            table, dot, key = field.key.partition(".")
            if dot:
                body.setdefault(table, {})[key] = value
            else:
                body[field.key] = value
        return body


def convert(field: Field, typed: "str | bool") -> Any:
    """Return the value of a field as the API takes it, None where there is none; raises Wrong."""
    if isinstance(typed, bool):
        return typed if typed or field.always else None
    # A password may begin or end with a space.
    text = typed if field.kind is Kind.SECRET else typed.strip()
    if not text:
        return "" if field.always else None
    return _READERS.get(field.kind, lambda field, text: text)(field, text)


def _number(field: Field, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise Wrong(field.key, f"{text!r} is no number") from None


def _size(field: Field, text: str) -> int:
    try:
        return parse_size(text)
    except errors.ConfigError as error:
        raise Wrong(field.key, error.message) from None


def _time(field: Field, text: str) -> int:
    try:
        return int(parse_span(text))
    except errors.ConfigError as error:
        raise Wrong(field.key, error.message) from None


def _words(field: Field, text: str) -> list[str]:
    return [word for word in (one.strip() for one in text.split(",")) if word]


def _list(field: Field, text: str) -> list[str]:
    return [one for one in (part.strip() for part in text.split(";")) if one]


def _map(field: Field, text: str) -> dict[str, str]:
    pairs = {}
    for word in _words(field, text):
        name, equals, value = word.partition("=")
        if not equals or not name or not value:
            raise Wrong(field.key, f"{word!r} is not of the form here=there")
        pairs[name] = value
    return pairs


_READERS: "Mapping[Kind, Callable[[Field, str], Any]]" = {
    Kind.NUMBER: _number, Kind.SIZE: _size, Kind.TIME: _time, Kind.WORDS: _words, Kind.LIST: _list,
    Kind.MAP: _map,
}  # fmt: skip


def _of(*keys: str, otherwise: str = "") -> "Callable[[Item], str | bool]":
    def initial(item: Item) -> str:
        value: Any = item
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return otherwise if value is None else str(value)

    return initial


def _now(item: Item) -> str:
    return time.strftime("before-%Y%m%d-%H%M")


def _deletes(item: Item, values: Values) -> tuple[str, str]:
    if values.get("data") != "delete":
        return "", ""
    return "The volume and all that is in it are gone after that.", "delete"


def _replaces(item: Item, values: Values) -> tuple[str, str]:
    if not values.get("force"):
        return "", ""
    return "The container of that number, its files and its snapshots are gone after that.", "replace"


_NAME = Field("name", "Name", required=True, hint="lower-case letters, digits, -")
_ID = Field("id", "Number", Kind.NUMBER, hint="the first free one")
_POOL = Field("pool", "Pool", Kind.CHOICE, source="pools", hint="the host's default")
_START = Field("start", "Start it", Kind.FLAG)
_PEER = Field("peer", "To", Kind.CHOICE, source="peers", required=True)
_POOLS = Field("pool_map", "Pools", Kind.MAP, hint="here=there")
_BRIDGES = Field("bridge_map", "Bridges", Kind.MAP, hint="here=there")
_LEAVE_OUT = Field("leave_out", "Do without", Kind.WORDS, hint="bind, device")
_RATE = Field("bwlimit_bytes", "Most bytes a second", Kind.SIZE, hint="no limit")
_ALLOW = Field("allow", "Allow", Kind.WORDS, hint="bind, device, raw, hook, feature, firewall")

CREATE = Form(
    "New container", "Create",
    (
        _NAME,
        Field("template", "Template", Kind.CHOICE, source="templates", hint="the host's default",
              initial=lambda item: str(item["name"]) if "arch" in item else ""),
        Field("set.limits.cores", "Cores", hint="all; 2, 0-3"),
        Field("set.limits.memory", "Memory", hint="no limit; 512M, 2G"),
        Field("set.limits.swap", "Swap", hint="no limit"),
        Field("set.limits.disk", "Disk", hint="no limit; 8G"),
        Field("nets", "Network cards", Kind.LIST, hint="as the host says; name=eth0,bridge=vmbr0,ip=manual"),
        Field("password", "Password of root", Kind.SECRET, hint="none"),
        Field("ssh_keys", "Keys for root", Kind.LIST, hint="ssh-ed25519 …"),
        Field("tags", "Tags", Kind.WORDS),
        _POOL, _ID,
        Field("onboot", "Start it with the host", Kind.FLAG),
        Field("start", "Start it now", Kind.FLAG, value=True),
    ),
)  # fmt: skip
CLONE = Form("Clone {name}", "Clone", (
    _NAME, _POOL, _ID, Field("full", "Copy all data", Kind.FLAG),
    Field("keep_addresses", "Keep its addresses", Kind.FLAG), _START,
))  # fmt: skip
LIMITS = Form("Limits of {name}", "Change", (
    Field("limits.cores", "Cores", initial=_of("limits", "cores"), hint="all; 2, 0-3", always=True),
    Field("limits.cpu", "Processor time", initial=_of("limits", "cpu"), hint="no limit; 0.5", always=True),
    Field("limits.memory", "Memory", initial=_of("limits", "memory"), hint="no limit; 512M", always=True),
    Field("limits.swap", "Swap", initial=_of("limits", "swap"), hint="no limit", always=True),
    Field("limits.pids", "Processes", initial=_of("limits", "pids"), hint="no limit", always=True),
    Field("limits.disk", "Disk", initial=_of("limits", "disk"), hint="no limit", always=True),
))  # fmt: skip
RENAME = Form("Rename {name}", "Rename", (Field("name", "New name", required=True, initial=_of("name")),))
PASSWORD = Form("Password inside {name}", "Set", (
    Field("user", "Of", value="root", required=True), Field("password", "Password", Kind.SECRET,
          required=True),
))  # fmt: skip
MOUNT = Form("Add a mount point to {name}", "Add", (
    Field("mount", "Mount point", hint="target=/data,size=8G or source=/srv,target=/srv"),
    Field("device", "Device", hint="fuse, tun or a path"),
), note="One of both; the keys are those of [mount.N] and [device.N].")  # fmt: skip
UNMOUNT = Form("Remove a mount point of {name}", "Remove", (
    Field("which", "Mount point", required=True, hint="its target or number"),
    Field("data", "What becomes of a volume", Kind.CHOICE, choices=("keep", "delete")),
), grave=_deletes)  # fmt: skip
PUSH = Form("Copy into {name}", "Copy", (
    Field("here", "File or directory here", required=True), Field("inside", "Path inside", required=True,
          value="/root/"),
))  # fmt: skip
PULL = Form("Copy out of {name}", "Copy", (
    Field("inside", "Path inside", required=True), Field("here", "Where to", required=True, value="."),
))  # fmt: skip
SNAPSHOT = Form("Snapshot of {name}", "Keep", (
    Field("name", "Name", initial=_now, hint="one of the time"), Field("description", "Note"),
    Field("expires", "Delete it after", hint="never; 12h, 7d"),
))  # fmt: skip
NAME_TEMPLATE = Form("Make a template of {name}", "Make", (
    Field("name", "Name of the template", required=True), Field("description", "Note"),
))  # fmt: skip
BACKUP = Form("Backup of {name}", "Back up", (
    Field("mode", "Mode", Kind.CHOICE, choices=("snapshot", "suspend", "stop"), hint="as the host says"),
    Field("compress", "Compression", Kind.CHOICE, choices=("zstd", "gzip", "lzo", "none"),
          hint="as the host says"),
    Field("directory", "Directory", hint="the host's own"),
    Field("notes", "Notes", hint="{{guestname}} and {{vmid}} are filled in"),
    Field("exclude", "Leave out", Kind.WORDS, hint="*.tmp, /var/cache/*"), _RATE,
    Field("protected", "Protect the archive", Kind.FLAG),
))  # fmt: skip
MIGRATE = Form("Migrate {name}", "Look at what is in the way", (
    _PEER, Field("restart", "Stop it for the last changes, start it there", Kind.FLAG, value=True),
    Field("keep", "Keep what is here", Kind.FLAG), Field("id", "Number there", Kind.NUMBER, hint="the same"),
    Field("name", "Name there", hint="the same"), _POOLS, _BRIDGES, _LEAVE_OUT, _RATE,
))  # fmt: skip
COPY = Form("Copy of {name}", "Copy", (
    _PEER, Field("name", "Name there", hint="the same"), Field("id", "Number there", Kind.NUMBER,
    hint="the same"),
    _POOLS, _BRIDGES, _LEAVE_OUT, _RATE, Field("start", "Start it there", Kind.FLAG),
))  # fmt: skip
REPLICATE = Form("Replica of {name}", "Replicate", (
    _PEER, Field("every_s", "Every", Kind.TIME, value="15m"), _POOLS, _BRIDGES, _LEAVE_OUT, _RATE,
))  # fmt: skip
PROMOTE = Form("Promote the replica of {name}", "Promote", (
    Field("fenced", "Its host does not answer, and is off for certain", Kind.FLAG), _START,
))  # fmt: skip
BUILD = Form("Build a template", "Build", (
    Field("recipe", "Recipe", required=True, hint="its name, or the path of a file"),
    Field("name", "Name of the template", hint="the recipe's"), Field("set", "Settings", Kind.MAP,
          hint="key=value"),
))  # fmt: skip
IMPORT_TEMPLATE = Form("Import a template", "Import", (
    Field("path", "Archive", required=True, hint="absolute path on the host"),
    Field("name", "Name", hint="the file's"),
))  # fmt: skip
RESTORE = Form("Restore {name}", "Restore", (
    Field("name", "Name", hint="the archive's"), Field("id", "Number", Kind.NUMBER, hint="the archive's"),
          _POOL,
    Field("force", "Replace the container of that number", Kind.FLAG),
    Field("unique", "Give it an identity of its own", Kind.FLAG), _ALLOW, _START,
), grave=_replaces)  # fmt: skip
NOTES = Form("Notes of {name}", "Write", (Field("notes", "Notes", initial=_of("notes"), always=True),))
PRUNE = Form("Prune backups", "Show what would go", (
    Field("directory", "Directory", hint="the host's own"),
    Field("keep.keep_last", "Keep the last", Kind.NUMBER), Field("keep.keep_daily", "Of days", Kind.NUMBER),
    Field("keep.keep_weekly", "Of weeks", Kind.NUMBER), Field("keep.keep_monthly", "Of months", Kind.NUMBER),
    Field("containers", "Only of", Kind.WORDS, hint="all"),
), note="Without rules those of the host's settings hold.")  # fmt: skip
JOB = Form("New backup job", "Make", (
    _NAME, Field("settings.schedule", "When", required=True, value="daily 02:30", hint="daily 02:30"),
    Field("settings.containers", "Containers", Kind.WORDS, hint="ids or names"),
    Field("settings.tag", "Or all with the tag"), Field("settings.all", "Or all there are", Kind.FLAG),
    Field("settings.mode", "Mode", Kind.CHOICE, choices=("snapshot", "suspend", "stop")),
    Field("settings.keep_last", "Keep the last", Kind.NUMBER), Field("settings.keep_daily", "Of days",
          Kind.NUMBER),
))  # fmt: skip
TOKEN = Form("Token for another host", "Make", (
    Field("expires_s", "Holds for", Kind.TIME, value="1h"),
    Field("addresses", "This host is reached at", Kind.WORDS, hint="its addresses"),
    Field("listen", "Listen at", hint="as the host says"),
))  # fmt: skip
JOIN = Form("Trust another host", "Join", (
    Field("token", "Token", Kind.SECRET, required=True), Field("name", "Name", hint="as it calls itself"),
    Field("addresses", "This host is reached at", Kind.WORDS, hint="its addresses"),
))  # fmt: skip
PEER_RIGHTS = Form("Peer {name}", "Change", (
    Field("name", "Name", initial=_of("name")),
    Field("may_send", "May send containers here", Kind.FLAG, always=True,
          initial=lambda item: bool(item.get("may_send"))),
    Field("may_receive", "May get containers of this host", Kind.FLAG, always=True,
          initial=lambda item: bool(item.get("may_receive"))),
    Field("may_manage", "May do here all that root may", Kind.FLAG, always=True,
          initial=lambda item: bool(item.get("may_manage"))),
    Field("may_pull", "May fetch templates", Kind.FLAG, always=True,
          initial=lambda item: bool(item.get("may_pull"))),
    Field("pools", "Pools that it may use", Kind.WORDS, hint="all",
          initial=lambda item: ", ".join(item.get("pools") or ())),
))  # fmt: skip
POOL = Form("New pool", "Make", (
    _NAME, Field("driver", "Driver", Kind.CHOICE, choices=("overlay", "btrfs", "loop", "zfs"), required=True),
    Field("path", "Directory", required=True, hint="absolute path"), Field("low_space", "Warn below",
          hint="10%"),
))  # fmt: skip
IMPORT_LXC = Form("Import from LXC", "Import", (
    Field("container", "Its name in LXC", required=True), Field("directory", "Directory",
          hint="/var/lib/lxc"),
    Field("name", "Name here", hint="the same"), _POOL, _ID, _ALLOW, _START,
))  # fmt: skip
