"""What a message of another host may contain: types that check a value, and say which side is too old.

Nothing that another host can send makes a check raise anything but Mismatch. What is not named is refused: a
newer host may mean something by it that must not be left out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sysctr.errors import SysctrError

_DEPTH_LIMIT = 16
_LARGEST = 2**63 - 1
_NUMBERS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6}){0,3}")


class Mismatch(Exception):
    """A value is not what it should be; `unknown` names a field that is not known here."""

    def __init__(self, reason: str, unknown: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.unknown = unknown


@dataclass(frozen=True)
class Text:
    """A string of valid Unicode without NUL; `pattern` has to match all of it."""

    limit: int = 256
    pattern: str = ""
    choices: tuple[str, ...] = ()

    def check(self, value: object, where: str) -> str:
        """Return the value if it is such a string."""
        if not isinstance(value, str) or len(value) > self.limit:
            raise Mismatch(f"{where} is not a text of at most {self.limit} characters")
        if "\0" in value or not _encodable(value):
            raise Mismatch(f"{where} has characters that no text has")
        if self.choices and value not in self.choices:
            raise Mismatch(f"{where} is not one of {', '.join(self.choices)}")
        if self.pattern and re.fullmatch(self.pattern, value) is None:
            raise Mismatch(f"{where} is not written as it should be")
        return value


@dataclass(frozen=True)
class Whole:
    """A whole number within bounds."""

    least: int = 0
    most: int = _LARGEST

    def check(self, value: object, where: str) -> int:
        """Return the value if it is such a number."""
        if isinstance(value, bool) or not isinstance(value, int) or not self.least <= value <= self.most:
            raise Mismatch(f"{where} is not a whole number from {self.least} to {self.most}")
        return value


@dataclass(frozen=True)
class Real:
    """A finite number within bounds, whole or not."""

    least: float = -1e300
    most: float = 1e300

    def check(self, value: object, where: str) -> float:
        """Return the value if it is such a number."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # A NaN is in no range.
        if not number or not self.least <= value <= self.most:  # type: ignore[operator]
            raise Mismatch(f"{where} is not a number from {self.least:g} to {self.most:g}")
        return value  # type: ignore[return-value]


@dataclass(frozen=True)
class Flag:
    """true or false."""

    def check(self, value: object, where: str) -> bool:
        """Return the value if it is one."""
        if not isinstance(value, bool):
            raise Mismatch(f"{where} is not true or false")
        return value


@dataclass(frozen=True)
class Items:
    """A list of values of one type."""

    of: "Type"
    limit: int = 256

    def check(self, value: object, where: str) -> list[Any]:
        """Return the value if it is such a list."""
        if not isinstance(value, list) or len(value) > self.limit:
            raise Mismatch(f"{where} is not a list of at most {self.limit} items")
        return [self.of.check(item, f"{where}[{number}]") for number, item in enumerate(value)]


@dataclass(frozen=True)
class Table:
    """An object whose keys are not fixed, with values of one type."""

    of: "Type"
    limit: int = 256
    key: Text = field(default_factory=Text)

    def check(self, value: object, where: str) -> dict[str, Any]:
        """Return the value if it is such an object."""
        if not isinstance(value, dict) or len(value) > self.limit:
            raise Mismatch(f"{where} is not an object of at most {self.limit} keys")
        return {
            self.key.check(name, f"a key of {where}"): self.of.check(item, f"{where}.{shown(name)}")
            for name, item in value.items()
        }


@dataclass(frozen=True)
class Maybe:
    """A value of a type, or null."""

    of: "Type"

    def check(self, value: object, where: str) -> Any:
        """Return the value if it is one of the type, or None."""
        return None if value is None else self.of.check(value, where)


@dataclass(frozen=True)
class Anything:
    """Any JSON, for what another part checks: every number, key and text in it is sound, nothing is deep."""

    text_limit: int = 256 << 10

    def check(self, value: object, where: str) -> Any:
        """Return the value if every part of it is sound."""
        return self._check(value, where, _DEPTH_LIMIT)

    def _check(self, value: object, where: str, depth: int) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return Text(self.text_limit).check(value, where)
        if isinstance(value, int):
            return Whole(-_LARGEST, _LARGEST).check(value, where)
        if isinstance(value, float):
            return Real().check(value, where)
        if depth and isinstance(value, list):
            return [self._check(item, where, depth - 1) for item in value]
        if depth and isinstance(value, dict):
            below = depth - 1
            return {Text().check(name, where): self._check(one, where, below) for name, one in value.items()}
        raise Mismatch(f"{where} is nested too deeply")


@dataclass(frozen=True)
class Shape:
    """An object with these fields and no others; as a field's type, an object within an object."""

    required: Mapping[str, "Type"]
    optional: Mapping[str, "Type"] = field(default_factory=dict)

    def check(self, value: object, where: str = "") -> dict[str, Any]:
        """Return the fields that were given."""
        if not isinstance(value, dict):
            raise Mismatch(f"{where or 'it'} is not an object")
        prefix = f"{where}." if where else ""
        for name in value:
            if name not in self.required and name not in self.optional:
                unknown = f"{prefix}{shown(name)}"
                raise Mismatch(f"unknown field {unknown}", unknown)
        for name in self.required:
            if name not in value:
                raise Mismatch(f"the field {prefix}{name} is missing")
        return {
            name: (self.required.get(name) or self.optional[name]).check(item, f"{prefix}{name}")
            for name, item in value.items()
        }


Type = Text | Whole | Real | Flag | Items | Table | Maybe | Anything | Shape


@dataclass(frozen=True)
class Speakers:
    """Two hosts that talk: how the other one is called, and which sysctr each of them runs."""

    peer: str
    there: str
    here: str

    def read(self, shape: Shape, value: object, what: str) -> dict[str, Any]:
        """Return what the other host sent; a SysctrError says what is wrong with it, and who should upgrade.

        >>> Speakers("rio", "0.2", "0.1").read(Shape({}), {"x": 1}, "begin")
        Traceback (most recent call last):
        ...
        sysctr.errors.SysctrError: cannot understand begin of rio: unknown field x: rio runs 0.2, here is 0.1
        """
        try:
            return shape.check(value)
        except Mismatch as error:
            reason = f"cannot understand {what} of {self.peer}: {error.reason}"
            if not error.unknown:
                raise SysctrError(reason) from error
            raise SysctrError(f"{reason}: {self._versions()}", self.advice("here")) from error

    def unknown(self, op: str) -> SysctrError:
        """Return the error for a question that is not known here."""
        return SysctrError(
            f"cannot do {shown(op)} for {self.peer}: it is not known here: {self._versions()}",
            self.advice("here"),
        )

    def advice(self, side: str) -> str:
        """Return which side to upgrade: the older one, and if that cannot be told, `side`."""
        there, here = version(self.there), version(self.here)
        if there != here:
            side = "here" if there > here else self.peer
        return "upgrade sysctr here" if side == "here" else f"upgrade sysctr on {side}"

    def _versions(self) -> str:
        return f"{self.peer} runs {self.there}, here is {self.here}"


def version(text: str) -> tuple[int, ...]:
    """Return a version to be compared.

    >>> version("0.10.0") > version("0.9.1")
    True
    """
    found = _NUMBERS.match(text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def shown(name: object) -> str:
    """Return a name of another's choice for a message: short, and without anything that could be escaped."""
    text = str(name)[:64]
    return text if text.isprintable() else ascii(text)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
