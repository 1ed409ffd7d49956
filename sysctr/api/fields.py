"""What a request may contain: types that check a value, and describe themselves as JSON Schema.

A check returns the value or raises UsageError with the field's name. Nothing a client can send makes it raise
anything else; that is what the property tests hold it to.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sysctr.errors import UsageError

_DEPTH_LIMIT = 8
_INTEGER_LIMIT = 2**63
# One request is 1 MiB at most; a single text has no reason to come near it.
_TEXT_LIMIT = 256 << 10


def _refuse(where: str, wanted: str) -> UsageError:
    return UsageError(f"cannot read the request: {where} must be {wanted}")


@dataclass(frozen=True)
class Text:
    """A string; `raw` allows the surrogates in which bytes that are no UTF-8 travel (paths, arguments)."""

    limit: int = 1024
    raw: bool = False
    choices: tuple[str, ...] = ()

    def check(self, value: object, where: str) -> str:
        """Return the value if it is such a string."""
        if not isinstance(value, str):
            raise _refuse(where, "a string")
        if self.choices and value not in self.choices:
            raise _refuse(where, f"one of {', '.join(self.choices)}")
        if len(value) > self.limit:
            raise _refuse(where, f"at most {self.limit} characters long")
        if "\0" in value:
            raise _refuse(where, "without NUL characters")
        try:
            value.encode("utf-8", "surrogateescape" if self.raw else "strict")
        except UnicodeEncodeError:
            raise _refuse(where, "valid Unicode") from None
        return value

    def from_query(self, text: str, where: str) -> str:
        """Return the value of a query parameter."""
        return self.check(text, where)

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema."""
        choices = {"enum": list(self.choices)} if self.choices else {}
        return {"type": "string", "maxLength": self.limit, **choices}


@dataclass(frozen=True)
class Number:
    """A finite number, or a whole one, within bounds."""

    least: float
    most: float
    whole: bool = True

    def check(self, value: object, where: str) -> Any:
        """Return the value if it is such a number."""
        kind = "a whole number" if self.whole else "a number"
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            raise _refuse(where, kind)
        # A NaN is in no range, and an int of 300 digits compares with a float without an overflow.
        if not self.least <= value <= self.most:
            raise _refuse(where, f"{kind} from {self.least} to {self.most}")
        return value

    def from_query(self, text: str, where: str) -> Any:
        """Return the value of a query parameter."""
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            raise _refuse(where, "a whole number" if self.whole else "a number") from None
        return self.check(value, where)

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema."""
        kind = "integer" if self.whole else "number"
        return {"type": kind, "minimum": self.least, "maximum": self.most}


@dataclass(frozen=True)
class Boolean:
    """true or false."""

    def check(self, value: object, where: str) -> bool:
        """Return the value if it is one."""
        if not isinstance(value, bool):
            raise _refuse(where, "true or false")
        return value

    def from_query(self, text: str, where: str) -> bool:
        """Return the value of a query parameter."""
        if text not in ("true", "false", "1", "0"):
            raise _refuse(where, "true or false")
        return text in ("true", "1")

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema."""
        return {"type": "boolean"}


@dataclass(frozen=True)
class Array:
    """A list of values of one type."""

    of: "Type"
    limit: int = 256
    least: int = 0

    def check(self, value: object, where: str) -> list[Any]:
        """Return the value if it is such a list."""
        if not isinstance(value, list):
            raise _refuse(where, "a list")
        if not self.least <= len(value) <= self.limit:
            raise _refuse(where, f"a list of {self.least} to {self.limit} items")
        return [self.of.check(item, f"{where}[{number}]") for number, item in enumerate(value)]

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema."""
        return {"type": "array", "items": self.of.schema(), "minItems": self.least, "maxItems": self.limit}


@dataclass(frozen=True)
class Table:
    """An object whose keys are not fixed, with values of one type."""

    of: "Type"
    limit: int = 256

    def check(self, value: object, where: str) -> dict[str, Any]:
        """Return the value if it is such an object."""
        if not isinstance(value, dict):
            raise _refuse(where, "an object")
        if len(value) > self.limit:
            raise _refuse(where, f"an object of at most {self.limit} keys")
        key = Text(256, raw=True)
        return {
            key.check(name, f"a key of {where}"): self.of.check(item, f"{where}.{_shown(name)}")
            for name, item in value.items()
        }

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema."""
        return {"type": "object", "additionalProperties": self.of.schema(), "maxProperties": self.limit}


@dataclass(frozen=True)
class Nullable:
    """A value of a type, or null."""

    of: "Type"

    def check(self, value: object, where: str) -> Any:
        """Return the value if it is one of the type, or None."""
        return None if value is None else self.of.check(value, where)

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema."""
        return {"anyOf": [self.of.schema(), {"type": "null"}]}


@dataclass(frozen=True)
class Anything:
    """Any JSON a configuration value can be: what it must be is for the configuration's own schema to say."""

    def check(self, value: object, where: str) -> Any:
        """Return the value if every part of it is sound."""
        return self._check(value, where, _DEPTH_LIMIT)

    def _check(self, value: object, where: str, depth: int) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return Text(_TEXT_LIMIT).check(value, where)
        if isinstance(value, int):
            return Number(-_INTEGER_LIMIT, _INTEGER_LIMIT - 1).check(value, where)
        if isinstance(value, float):
            if not math.isfinite(value):
                raise _refuse(where, "a finite number")
            return value
        if depth == 0:
            raise _refuse(where, "nested less deeply")
        if isinstance(value, list):
            return [self._check(item, f"{where}[{number}]", depth - 1) for number, item in enumerate(value)]
        if isinstance(value, dict):
            key = Text(256)
            return {
                key.check(name, f"a key of {where}"): self._check(item, f"{where}.{_shown(name)}", depth - 1)
                for name, item in value.items()
            }
        raise _refuse(where, "JSON")

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema."""
        return {}


@dataclass(frozen=True)
class Field:
    """One field of a body, or one parameter of a query."""

    name: str
    type: "Type"
    doc: str
    required: bool = False


@dataclass(frozen=True)
class Object:
    """An object with these fields and no others; as a field's type, an object within an object."""

    fields: tuple[Field, ...]

    def check(self, value: object, where: str = "") -> dict[str, Any]:
        """Return the fields that were given."""
        if not isinstance(value, dict):
            raise _refuse(where or "the body", "a JSON object")
        known = {field.name: field for field in self.fields}
        prefix = f"{where}." if where else ""
        for name in value:
            if name not in known:
                raise UsageError(
                    f"cannot read the request: there is no field {prefix}{_shown(name)}",
                    f"the fields are {', '.join(known)}" if known else "no field is taken here",
                )
        for field in self.fields:
            if field.required and field.name not in value:
                raise UsageError(f"cannot read the request: the field {prefix}{field.name} is missing")
        return {name: known[name].type.check(item, f"{prefix}{name}") for name, item in value.items()}

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema."""
        properties = {field.name: {**field.type.schema(), "description": field.doc} for field in self.fields}
        required = [field.name for field in self.fields if field.required]
        schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
        return {**schema, "required": required} if required else schema


Type = Text | Number | Boolean | Array | Table | Nullable | Anything | Object


def check_query(fields: tuple[Field, ...], query: Mapping[str, str]) -> dict[str, Any]:
    """Return the parameters of a query, converted; a parameter given twice or unknown is an error."""
    known = {field.name: field for field in fields}
    values: dict[str, Any] = {}
    for name, text in query.items():
        if name not in known:
            hint = f"the parameters are {', '.join(known)}" if known else "no parameter is taken here"
            raise UsageError(f"cannot read the request: there is no parameter {_shown(name)}", hint)
        if name in values:
            raise UsageError(f"cannot read the request: the parameter {name} is there twice")
        type_ = known[name].type
        assert isinstance(type_, Text | Number | Boolean), f"the parameter {name} cannot be read from text"
        values[name] = type_.from_query(text, name)
    for field in fields:
        if field.required and field.name not in values:
            raise UsageError(f"cannot read the request: the parameter {field.name} is missing")
    return values


def _shown(name: str) -> str:
    # A name of the client's choice goes into a message: short, and without anything that could be escaped.
    return name[:64] if name.isprintable() else ascii(name[:64])
