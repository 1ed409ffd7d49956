"""Proxmox VE's container configuration, pct.conf, as text and as a document that loses nothing of it.

What a key means is the business of pct_convert and pct_export; here is only how one is written. Two laws
hold: `write(read(text)) == text` for what Proxmox itself writes, `read(write(document)) == document` for all.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from urllib.parse import quote_from_bytes, unquote_to_bytes

from sysctr.config.values import shown
from sysctr.errors import ConfigError

LONGEST_BYTES = 2**20

# What `\s` is to Proxmox, which reads bytes; str.strip and str.splitlines would know far more.
SPACE = " \t\r\f\v"
_SECTION = re.compile(r"\[(pve:pending|[a-z][a-z0-9_-]+)\][ \t\r\f\v]*", re.IGNORECASE | re.ASCII)
# Only the beginnings are matched: `(.*?)\s*$` takes quadratic time on a line of many spaces.
_RAW = re.compile(r"(lxc\.[a-z0-9_.-]+)(?::|[ \t\r\f\v]*=)")
_KEY = re.compile(r"([a-z][a-z_]*[0-9]*):")
_SNAPSHOT = re.compile(r"[a-z][a-z0-9_-]+", re.IGNORECASE | re.ASCII)
_RUNTIME = "lxc.environment.runtime"
_PENDING = "pve:pending"
# Printable ASCII without % and the colon, which Proxmox escapes too.
_UNESCAPED = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) not in "%:")


@dataclass(frozen=True)
class Section:
    """The keys of a container, or of one of its snapshots, as text; nothing says that their values hold.

    `raw` is what goes to LXC as it is, `lines` is what nobody can read.
    """

    description: str = ""
    values: dict[str, str] = field(default_factory=dict)
    environment: tuple[str, ...] = ()
    raw: tuple[tuple[str, str], ...] = ()
    lines: tuple[str, ...] = ()

    def is_empty(self) -> bool:
        """Tell whether nothing is said."""
        return self == Section()


@dataclass(frozen=True)
class Document:
    """A whole pct.conf; `problems` tells what was read but is not kept."""

    root: Section = field(default_factory=Section)
    pending: Section = field(default_factory=Section)
    snapshots: dict[str, Section] = field(default_factory=dict)
    problems: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        _check(self.root, "", "the container")
        _check(self.pending, _PENDING, "what is pending")
        for name, section in self.snapshots.items():
            if _SNAPSHOT.fullmatch(name) is None:
                raise ConfigError(f"cannot write {shown(name)} to pct.conf: it is not a snapshot's name")
            _check(section, name, f"the snapshot {name}")
        # A description may be three times as long as the text that it was read from.
        if len(write(self).encode("utf-8", "surrogateescape")) > LONGEST_BYTES:
            raise ConfigError(f"cannot write pct.conf: it is longer than {LONGEST_BYTES} bytes")


class _Draft:
    """A section while it is read."""

    def __init__(self) -> None:
        self.description: list[str] = []
        self.values: dict[str, str] = {}
        self.environment: list[str] = []
        self.raw: list[tuple[str, str]] = []
        self.lines: list[str] = []

    def section(self) -> Section:
        description = "\n".join(self.description).rstrip("\n")
        return Section(description, self.values, tuple(self.environment), tuple(self.raw), tuple(self.lines))


def read(text: str | bytes) -> Document:
    r"""Read a pct.conf. What is no UTF-8 is kept as os.fsdecode would.

    >>> document = read("#Web: %25\narch: amd64\nlxc.tty.max = 1\n\n[pve:pending]\ndelete: mp1\n")
    >>> document.root.description, document.root.values, document.root.raw
    ('Web: %', {'arch': 'amd64'}, (('lxc.tty.max', '1'),))
    >>> document.pending.values
    {'delete': 'mp1'}
    """
    drafts = {"": _Draft()}
    problems: list[str] = []
    name = ""
    for number, line in enumerate(_text(text).split("\n"), 1):
        if "\0" in line:
            raise ConfigError(f"cannot read pct.conf: line {number}: a zero byte is in it")
        kind, key, value = _parse_line(line, name)
        if kind == "section":
            # Its name tells a snapshot apart by case, the word for what is pending does not.
            name = _PENDING if key.lower() == _PENDING else key
            if name in drafts:
                raise ConfigError(f"cannot read pct.conf: line {number}: the section [{name}] is there twice")
            drafts[name] = _Draft()
        elif problem := _add(drafts[name], name, kind, key, value):
            problems.append(f"line {number}: {problem}")
    root, pending = drafts.pop(""), drafts.pop(_PENDING, _Draft())
    snapshots = {name: draft.section() for name, draft in drafts.items()}
    return Document(root.section(), pending.section(), snapshots, tuple(problems))


def write(document: Document) -> str:
    r"""Write a pct.conf as Proxmox does: keys sorted, raw lines in their order, snapshots by name.

    As bytes it is `.encode("utf-8", "surrogateescape")`.

    >>> write(read("onboot:  1\n#two\narch: amd64\nlxc.tty.max = 1"))
    '#two\narch: amd64\nonboot: 1\nlxc.tty.max: 1\n'
    """
    lines = _lines(document.root)
    named = [(_PENDING, document.pending)] if not document.pending.is_empty() else []
    for name, section in [*named, *sorted(document.snapshots.items())]:
        lines += ["", f"[{name}]", *_lines(section)]
    return "".join(f"{line}\n" for line in lines)


def parse_property_string(text: str, known: Collection[str], default_key: str = "") -> dict[str, str]:
    """Read `a=1,b=2` strictly: an unknown key is an error, and so is one that is there twice.

    >>> parse_property_string("local:8,size=8G", ("volume", "size"), "volume")
    {'volume': 'local:8', 'size': '8G'}
    """
    properties: dict[str, str] = {}
    for part in filter(None, (part.strip(SPACE) for part in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            key, value = default_key, part
        if not key or not value:
            raise ConfigError(f"{shown(part)} is not written key=value (in {shown(text)})")
        if key in properties:
            raise ConfigError(f"{shown(key)} is given twice in {shown(text)}")
        if key not in known:
            raise ConfigError(f"{shown(key)} is no key of {shown(text)}")
        properties[key] = value
    return properties


def parse_deleted(text: str) -> dict[str, bool]:
    """Read which keys the next start unsets; true for one whose volume is to be destroyed with it.

    >>> parse_deleted("mp1,!unused0")
    {'mp1': False, 'unused0': True}
    """
    names = filter(None, (part.strip(SPACE) for part in text.split(",")))
    return {name.removeprefix("!"): name.startswith("!") for name in names}


def _text(text: str | bytes) -> str:
    """Return the text in which a surrogate stands for a byte that is no UTF-8, and for nothing else."""
    try:
        raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        line = error.object.count("\n", 0, error.start) + 1
        raise ConfigError(f"cannot read pct.conf: line {line}: it is not text") from None
    if len(raw) > LONGEST_BYTES:
        raise ConfigError(f"cannot read pct.conf: it is longer than {LONGEST_BYTES} bytes")
    return raw.decode("utf-8", "surrogateescape")


def _parse_line(line: str, section: str) -> tuple[str, str, str]:
    """Return the kind of a line, its key and its value; the order of the tests is Proxmox's."""
    if not line.strip(SPACE):
        return "blank", "", ""
    if match := _SECTION.fullmatch(line):
        return "section", match[1], ""
    if line.startswith("#"):
        return "description", "", line[1:]
    if match := _RAW.match(line):
        value = line[match.end() :].strip(SPACE)
        return ("environment", "", value) if match[1] == _RUNTIME else ("raw", match[1], value)
    match = _KEY.match(line)
    value = line[match.end() :].strip(SPACE) if match else ""
    if not match or not value or (match[1] == "delete" and section != _PENDING):
        return "line", "", line
    if match[1] == "description":
        return "description", "", value
    if match[1] == "env":
        return "environment", "", value
    return "value", match[1], value


def _add(draft: _Draft, section: str, kind: str, key: str, value: str) -> str:
    """Put what a line says into its section, and return what is wrong with it."""
    if kind == "description":
        draft.description.append(_decode(value))
    elif kind == "environment":
        draft.environment.append(value)
    elif kind == "raw":
        draft.raw.append((key, value))
    elif kind == "line":
        draft.lines.append(value)
    elif kind == "value":
        # It is about a snapshot, and Proxmox forgets it where there is none.
        if key == "snapstate" and not section:
            return "snapstate is of snapshots only"
        before = draft.values.get(key, value)
        draft.values[key] = value
        if before != value:
            return f"{key} is there twice: this one counts"
    return ""


def _lines(section: Section) -> list[str]:
    lines = [f"#{_encode(line)}" for line in section.description.split("\n")] if section.description else []
    lines += [f"{key}: {section.values[key]}" for key in sorted(section.values)]
    lines += [f"{_RUNTIME}: {item}" for item in section.environment]
    lines += [f"{key}: {value}" for key, value in section.raw]
    return [*lines, *section.lines]


def _decode(text: str) -> str:
    return unquote_to_bytes(text.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


def _encode(text: str) -> str:
    return quote_from_bytes(text.encode("utf-8", "surrogateescape"), _UNESCAPED)


def _check(section: Section, name: str, what: str) -> None:
    """Raise ConfigError for a section that would not be read as it was written."""
    if section.description.endswith("\n"):
        raise ConfigError(f"cannot write the description of {what} to pct.conf: its last line is empty")
    said: Mapping[str, tuple[str, str, str]] = {
        **{f"{key}: {value}": ("value", key, value) for key, value in section.values.items()},
        **{f"{_RUNTIME}: {item}": ("environment", "", item) for item in section.environment},
        **{f"{key}: {value}": ("raw", key, value) for key, value in section.raw},
        **{line: ("line", "", line) for line in section.lines},
    }
    for line, expected in said.items():
        if "\n" in line or "\0" in line or _parse_line(line, name) != expected:
            raise ConfigError(
                f"cannot write {shown(line)} of {what} to pct.conf: it would not be read as that"
            )
    if not name and "snapstate" in section.values:
        raise ConfigError("cannot write snapstate to pct.conf: it is of snapshots only")
    for text in (section.description, *said):
        try:
            same = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") == text
        except UnicodeEncodeError:
            same = False
        if not same:
            raise ConfigError(f"cannot write {shown(text)} of {what} to pct.conf: it is not text")
