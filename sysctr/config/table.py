"""A declarative table of keys, and what follows from it: checks, defaults, dotted names, help, differences.

A table lists every key once, by its dotted pattern: `limits.memory`, `net.N.ip` (N is a number),
`environment.NAME` (NAME is free). A nested mapping, as TOML gives it, becomes a tree of frozen dataclasses.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from sysctr.config.values import parse_environment_name, shown
from sysctr.errors import ConfigError

# When a change takes effect: at once, at the next start, or never after the creation.
LIVE = ("live", "restart", "fixed")

# What TOML can say that a key of ours takes.
Plain = str | int | float | bool | list[str]

NUMBER = "N"
FREE = "NAME"
HIGHEST_NUMBER = 31
_NUMBER = re.compile(r"0|[1-9][0-9]?")
# Below this a name has nothing to do with the nearest key, and to name that would mislead.
_LEAST_LIKENESS = 0.6


@dataclass(frozen=True)
class Kind:
    """A type of value: how it is read from a command's text and from TOML, and written back."""

    placeholder: str
    expected: str
    types: tuple[type, ...]
    parse: Callable[[str], Any]
    read: Callable[[Any], Any]
    dump: Callable[[Any], Plain]
    # What completion offers; not all that is allowed.
    choices: tuple[str, ...] = ()
    # Appended to the name of the dataclass field, so that names carry units.
    unit: str = ""
    # `key=` on a command line means an empty text here; for every other kind it means the default.
    keeps_empty: bool = False


@dataclass(frozen=True)
class Key:
    """One key of a configuration file."""

    name: str
    kind: Kind
    default: Any
    live: str
    doc: str
    # Written into a new file even where it has its default, because a reader looks for it there.
    written: bool = False

    @property
    def field(self) -> str:
        """Return the name of the dataclass field that holds the value."""
        last = self.name.rpartition(".")[2]
        return f"{last}_{self.kind.unit}" if self.kind.unit else last

    @property
    def usage(self) -> str:
        """Return how a command writes it, such as `limits.memory=SIZE`."""
        return f"{self.name}={self.kind.placeholder}"

    @property
    def default_text(self) -> str:
        """Return the default for help texts; empty where there is none."""
        if self.default in (None, "", ()):
            return ""
        plain = self.kind.dump(self.default)
        if isinstance(plain, bool):
            return str(plain).lower()
        return ",".join(plain) if isinstance(plain, list) else str(plain)

    def default_in(self, path: Sequence[str]) -> Any:
        """Return the default at a path; in a numbered table its text may contain the number.

        >>> from sysctr.config import kinds
        >>> Key("net.N.name", kinds.INTERFACE, "eth{N}", "restart", "").default_in(("net", "1", "name"))
        'eth1'
        """
        if isinstance(self.default, str) and "{N}" in self.default:
            return self.default.replace("{N}", path[1])
        return self.default

    def read(self, name: str, value: object) -> Any:
        """Check a value from TOML and return it as the program uses it."""
        # By the exact type: a bool is an int to Python.
        if type(value) not in self.kind.types:
            raise ConfigError(f"cannot accept {name} = {shown(value)}: expected {self.kind.expected}")
        try:
            return self.kind.read(value)
        except ConfigError as error:
            raise ConfigError(f"cannot accept {name}: {error.message}", error.hint) from None

    def parse(self, name: str, text: str) -> Plain | None:
        """Check a value from a command line and return what the file will say; None unsets the key."""
        if not text and not self.kind.keeps_empty:
            return None
        try:
            return self.kind.dump(self.kind.parse(text))
        except ConfigError as error:
            raise ConfigError(f"cannot accept {name}: {error.message}", error.hint) from None


@dataclass(frozen=True)
class Section:
    """A table of the file and the field it becomes; its pattern may end in N (numbered) or NAME (free)."""

    pattern: str
    field: str
    factory: Callable[..., Any]


class Table:
    """All keys of one kind of file."""

    def __init__(
        self,
        keys: Sequence[Key],
        sections: Sequence[Section],
        required: Sequence[str] = (),
        listing: str = "",
    ) -> None:
        self.keys = tuple(keys)
        self.required = tuple(required)
        self._listing = listing or f"the keys are {', '.join(key.name for key in keys)}"
        self._keys = {tuple(key.name.split(".")): key for key in keys}
        self._sections = {tuple(filter(None, section.pattern.split("."))): section for section in sections}
        # `environment.NAME` is the table `environment` with free keys.
        self._free = {pattern[:-1] for pattern in self._sections if pattern and pattern[-1] == FREE}
        self._tables = {p[:-1] if p and p[-1] == FREE else p for p in self._sections}
        self._above = {pattern[:depth] for pattern in self._tables for depth in range(len(pattern))}

    def read(self, mapping: Mapping[str, object]) -> Any:
        """Return the dataclass that a nested mapping describes."""
        found: dict[tuple[str, ...], dict[str, Any]] = {}
        self._collect((), mapping, found)
        for name in self.required:
            if self._keys[(name,)].field not in found[()]:
                raise ConfigError(f"cannot accept a configuration without {name}")
        fields: dict[str, Any] = {}
        for pattern, section in self._sections.items():
            if not pattern:
                continue
            if pattern[-1] == FREE:
                fields[section.field] = section.factory(found.get(pattern[:-1], {}))
            elif pattern[-1] == NUMBER:
                numbers = sorted(int(path[-1]) for path in found if path[:-1] == pattern[:-1] and path)
                paths = [(*pattern[:-1], str(number)) for number in numbers]
                fields[section.field] = tuple(
                    section.factory(index=int(path[-1]), **self._filled(path, found[path])) for path in paths
                )
            else:
                fields[section.field] = section.factory(**self._filled(pattern, found.get(pattern, {})))
        return self._sections[()].factory(**self._filled((), found[()]), **fields)

    def dump(self, value: Any) -> dict[str, Any]:
        """Return the nested mapping of what differs from the defaults; `read` gives the value back."""
        mapping: dict[str, Any] = {}
        for path, key, item in self._walk(value):
            table = mapping
            for component in path[:-1]:
                table = table.setdefault(component, {})
            # A numbered table exists even if all in it is default, so it is made before this.
            if key.written or item != key.default_in(path):
                table[path[-1]] = key.kind.dump(item)
        return {name: item for name, item in mapping.items() if item != {}}

    def flat(self, value: Any) -> dict[str, Any]:
        """Return every value under its dotted name."""
        return {".".join(path): item for path, _, item in self._walk(value)}

    def find(self, name: str) -> Key:
        """Return the key of a dotted name such as `net.0.ip`, or raise an error with the nearest one."""
        path = tuple(name.split("."))
        pattern = self._pattern(path)
        if pattern not in self._keys:
            raise self._unknown(path)
        return self._keys[pattern]

    def is_table(self, name: str) -> bool:
        """Tell whether a dotted name is a whole numbered table, such as `net.0`."""
        pattern = self._pattern(tuple(name.split(".")))
        return pattern in self._tables and pattern[-1] == NUMBER

    def columns(self, name: str) -> dict[str, Key]:
        """Return the keys of a table by their last component."""
        above = self._pattern(tuple(name.split(".")))
        return {pattern[-1]: key for pattern, key in self._keys.items() if pattern[:-1] == above}

    def changed(self, old: Any, new: Any) -> tuple[str, ...]:
        """Return the dotted names that differ; a numbered table that came or went is one name."""
        before, after = self.flat(old), self.flat(new)
        names = []
        for name in dict.fromkeys([*before, *after]):
            if name in before and name in after:
                if before[name] != after[name]:
                    names.append(name)
            else:
                above = name.rpartition(".")[0]
                names.append(above if self.is_table(above) else name)
        return tuple(dict.fromkeys(names))

    def live(self, name: str) -> str:
        """Return when a change of a key, or of a whole numbered table, takes effect."""
        if self.is_table(name):
            return max((key.live for key in self.columns(name).values()), key=LIVE.index)
        return self.find(name).live

    def _collect(self, path: tuple[str, ...], mapping: Mapping[str, object], found: dict) -> None:
        pattern = self._pattern(path)
        if pattern in self._tables:
            found.setdefault(path, {})
        for component, value in mapping.items():
            below = (*path, component)
            pattern = self._pattern(below)
            if pattern in self._tables or pattern in self._above:
                if not isinstance(value, Mapping):
                    raise ConfigError(f"cannot accept {_dotted(below)} = {shown(value)}: expected a table")
                self._collect(below, value, found)
            elif pattern in self._keys:
                key = self._keys[pattern]
                field = component if pattern[-1] == FREE else key.field
                found[path][field] = key.read(_dotted(below), value)
            else:
                raise self._unknown(below)

    def _filled(self, path: tuple[str, ...], values: dict[str, Any]) -> dict[str, Any]:
        above = self._pattern(path)
        keys = [(pattern[-1], key) for pattern, key in self._keys.items() if pattern[:-1] == above]
        return {key.field: key.default_in((*path, last)) for last, key in keys} | values

    def _walk(self, value: Any) -> Iterator[tuple[tuple[str, ...], Key, Any]]:
        # In the order of the table of keys, so that a file reads as its documentation does.
        for pattern, key in self._keys.items():
            if pattern[-1] == FREE:
                items = getattr(value, self._sections[pattern].field)
                yield from (((*pattern[:-1], name), key, item) for name, item in items.items())
            elif NUMBER not in pattern:
                section = self._sections[pattern[:-1]]
                owner = getattr(value, section.field) if section.field else value
                yield pattern, key, getattr(owner, key.field)
        for pattern, section in self._sections.items():
            if pattern and pattern[-1] == NUMBER:
                for owner in getattr(value, section.field):
                    path = (*pattern[:-1], str(owner.index))
                    for last, key in self.columns(".".join(path)).items():
                        yield (*path, last), key, getattr(owner, key.field)

    def _pattern(self, path: tuple[str, ...]) -> tuple[str, ...]:
        """Return the pattern that a path fits, or the path itself."""
        if path[:-1] in self._free:
            try:
                parse_environment_name(path[-1])
            except ConfigError:
                return path
            return (*path[:-1], FREE)
        if len(path) > 1 and (path[0], NUMBER) in self._sections:
            if _NUMBER.fullmatch(path[1]) and int(path[1]) <= HIGHEST_NUMBER:
                return (path[0], NUMBER, *path[2:])
            # The pattern itself must not pass for a path.
            return (path[0], "", *path[2:])
        return path

    def _unknown(self, path: tuple[str, ...]) -> ConfigError:
        name = _dotted(path)
        if len(path) > 1 and (path[0], NUMBER) in self._sections and self._pattern(path)[1] == "":
            return ConfigError(f"cannot accept {name}: {path[0]}.N has a number from 0 to {HIGHEST_NUMBER}")
        if path[:-1] in self._free:
            return ConfigError(f"cannot accept {name}: a variable's name has letters, digits and _")
        known = [self._concrete(pattern, path) for pattern in self._keys]
        nearest = max(known, key=lambda other: _likeness(name, other))
        if _likeness(name, nearest) < _LEAST_LIKENESS:
            return ConfigError(f"cannot accept {name}: no such key", self._listing)
        return ConfigError(f"cannot accept {name}: no such key, the nearest is {nearest}")

    @staticmethod
    def _concrete(pattern: tuple[str, ...], path: tuple[str, ...]) -> str:
        number = path[1] if len(path) > 1 and path[0] == pattern[0] else NUMBER
        return ".".join(number if component == NUMBER else component for component in pattern)


def _dotted(path: Sequence[str]) -> str:
    # A key comes from a file too: quoted where it is not plain, and short in an error message.
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", part) else shown(part) for part in path[:8])


def _likeness(name: str, known: str) -> float:
    whole = SequenceMatcher(None, name, known).ratio()
    # Who writes `memory` means limits.memory, however little the whole names have in common.
    last = SequenceMatcher(None, name.rpartition(".")[2], known.rpartition(".")[2]).ratio()
    return max(whole, 0.95 * last)
