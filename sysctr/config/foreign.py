"""What the configuration of a container of another manager is to a restore, whichever manager wrote it."""

import re
from dataclasses import dataclass
from typing import Protocol

from sysctr.config import values
from sysctr.config.pct_convert import name_of
from sysctr.config.pct_reading import Reading
from sysctr.errors import ConfigError

_LONGEST_DESCRIPTION = 4096


@dataclass(frozen=True)
class ForeignSnapshot:
    """A state that there is beside the present one; `below` is the directory of its files in the archive."""

    name: str
    created: float
    description: str
    below: str


class Foreign(Protocol):
    """A container as its manager described it."""

    name: str  # the one that it gets here, empty where none can be made of its own
    uuid: str  # its identity, empty where its manager has none
    macs: frozenset[str]  # of its cards
    snapshots: tuple[ForeignSnapshot, ...]  # oldest first

    def convert(self, reading: Reading) -> None:
        """Take over what goes over, and note what does not; nothing that it says makes this fail."""


def set_name(reading: Reading, key: str, given: str, name: str) -> None:
    """Tell where a name is another one here."""
    if name and name != given:
        reading.changed(key, f"{values.shown(given)} is {name} here")


def name_from(text: str) -> str:
    """Return the name that a container of this name gets here, empty where none can be made of it.

    >>> name_from("Web_1.example.org")
    'web-1'
    """
    return name_of(text)


def set_description(reading: Reading, key: str, text: str) -> None:
    """Take a description over as the one line that it is here."""
    kept = one_line(text, _LONGEST_DESCRIPTION)
    if kept and reading.set(key, "description", kept) and kept != text:
        reading.changed(key, "it is one line here")


def one_line(text: str, longest_bytes: int) -> str:
    """Return a text as one line, cut where it is too long."""
    line = "".join(character if character.isprintable() else " " for character in text).strip()
    return line.encode("utf-8", "ignore")[:longest_bytes].decode("utf-8", "ignore")


def set_size(reading: Reading, key: str, name: str, text: str) -> None:
    """Set a limit that is a number of bytes or a size with a unit; what says "no limit" is none."""
    if text.strip() in ("", "max", "-1"):
        return
    try:
        size_bytes = size(text)
    except ConfigError as error:
        reading.dropped(key, error.message)
        return
    reading.set(key, name, values.format_size(size_bytes))


def size(text: str) -> int:
    """Read a size as LXC and Incus write it: binary units with iB or without, decimal ones as kB, MB, GB.

    >>> size("2GiB") == size("2G") == 2 << 30, size("5MB"), size("10")
    (True, 5000000, 10)
    """
    match = re.fullmatch(r"\s*([0-9]{1,15})\s*([kMGT])B\s*", text)
    if match:
        return int(match[1]) * 1000 ** ("kMGT".index(match[2]) + 1)
    return values.parse_size(text.strip())


def set_cores(reading: Reading, key: str, text: str, *, count: bool) -> None:
    """Set which processors; a lone number is how many where `count`, else the one of that number."""
    text = re.sub(r"\s+", "", text)
    if text.isascii() and text.isdigit() and not count:
        text = f"{text}-{text}"
    reading.set(key, "limits.cores", text)


def set_cpu(reading: Reading, key: str, quota: str, period: str) -> None:
    """Set processor time as the kernel counts it: so many microseconds of each period."""
    if quota in ("max", "-1"):
        return
    if not re.fullmatch(r"[0-9]{1,12}", quota) or not re.fullmatch(r"0*[1-9][0-9]{0,11}", period):
        reading.dropped(key, f"{values.shown(quota)} of {values.shown(period)} is no share of time")
        return
    reading.set(key, "limits.cpu", f"{int(quota) / int(period):.2f}")


def set_variable(reading: Reading, key: str, name: str, value: str) -> None:
    """Set a variable of init's environment."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
        reading.dropped(key, f"{values.shown(name)} is not the name of a variable")
    else:
        reading.set(key, f"environment.{name}", value)
