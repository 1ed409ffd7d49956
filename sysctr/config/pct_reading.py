"""The changes and the notes of a conversion from pct.conf while they come together.

Each is taken only if the whole configuration still holds with it, so nothing that a file says makes the
conversion fail: what does not hold is left out, and a note says why.
"""

import ipaddress
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sysctr.config import schema, values
from sysctr.config.pct import parse_property_string
from sysctr.config.pct_notes import CHANGED, DROPPED, NEEDS_PERMISSION, Note, reason_of
from sysctr.config.table import HIGHEST_NUMBER, Plain
from sysctr.errors import ConfigError


@dataclass(frozen=True)
class OwnVolume:
    """A mount point that becomes a volume of the container's own: mount.INDEX, which was `key` there."""

    key: str
    index: int
    target: str
    size_bytes: int | None
    backup: bool


@dataclass(frozen=True)
class HostPath:
    """A bind or a device that the file asks for; it is among the changes only if that was allowed."""

    key: str
    kind: str
    path: str
    target: str
    allowed: bool


class Reading:
    """What has been taken over and what has been noted so far."""

    def __init__(self, allow: Collection[str], bridges: Collection[str], managed_subnet: str) -> None:
        self.allow = frozenset(allow)
        self.bridges = frozenset(bridges)
        self.subnet = ipaddress.ip_network(managed_subnet) if managed_subnet else None
        self.changes: dict[str, Plain] = {}
        self.notes: list[Note] = []
        self.volumes: list[OwnVolume] = []
        self.host_paths: list[HostPath] = []

    def dropped(self, key: str, reason: str, permission: str = "") -> None:
        """Note what is left out."""
        self.notes.append(Note(key, reason, DROPPED, permission))

    def changed(self, key: str, reason: str) -> None:
        """Note what is carried over in another form."""
        self.notes.append(Note(key, reason, CHANGED))

    def allowed(self, key: str, reason: str, *permissions: str) -> bool:
        """Tell whether something may be taken; note the permission that is missing."""
        for permission in permissions:
            if permission not in self.allow:
                self.notes.append(Note(key, reason, NEEDS_PERMISSION, permission))
                return False
        return True

    def set(self, key: str, name: str, value: object) -> bool:
        """Set one of our keys if its value holds."""
        try:
            self._add(schema.plain_changes({name: value}))
        except ConfigError as error:
            self.dropped(key, reason_of(error))
            return False
        return True

    def set_table(self, key: str, kind: str, number: str, columns: Mapping[str, object]) -> int | None:
        """Set a whole mount point or device if it holds, and return its number."""
        try:
            index = self.place(kind, number)
            self.fit(f"{kind}.{index}", columns)
        except ConfigError as error:
            self.dropped(key, reason_of(error))
            return None
        return index

    def place(self, kind: str, number: str = "") -> int:
        """Return the number that a card, mount point or device gets: its own where that is free."""
        taken = {int(name.split(".")[1]) for name in self.changes if name.startswith(f"{kind}.")}
        if number and int(number[:9]) <= HIGHEST_NUMBER and int(number[:9]) not in taken:
            return int(number[:9])
        free = [index for index in range(HIGHEST_NUMBER + 1) if index not in taken]
        if not free:
            raise ConfigError(f"{HIGHEST_NUMBER + 1} of {kind}.N are the most that a container has")
        return free[0]

    def fit(self, table: str, columns: Mapping[str, object]) -> None:
        """Set a whole card, mount point or device; ConfigError where the configuration would not hold."""
        plain = schema.plain_changes({table: columns})
        whole = {
            "name": "draft",
            **self.changes,
            **{name: value for name, value in plain.items() if value is not None},
        }
        schema.parse_config(_nested(whole))
        self._add(plain)

    def _add(self, plain: Mapping[str, Plain | None]) -> None:
        self.changes |= {name: value for name, value in plain.items() if value is not None}

    def properties(
        self, key: str, text: str, known: Collection[str], default: str = ""
    ) -> dict[str, str] | None:
        """Return the options of a key, or None and a note where they are not as Proxmox writes them."""
        try:
            return parse_property_string(text, known, default)
        except ConfigError as error:
            self.dropped(key, error.message)
            return None


def flag(properties: Mapping[str, str], name: str, *, default: bool = False) -> bool:
    """Return an option that is true or false; what does not say either is as if it were not there."""
    try:
        return values.parse_bool(properties.get(name, str(default)))
    except ConfigError:
        return default


def _nested(flat: Mapping[str, Plain]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        table = nested
        *above, last = name.split(".")
        for component in above:
            table = table.setdefault(component, {})
        table[last] = value
    return nested
