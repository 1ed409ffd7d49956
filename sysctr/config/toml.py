"""Configuration files as text: reading, versions, and changes that keep what an administrator wrote."""

import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import tomli

from sysctr.config import host, schema
from sysctr.config.schema import Container
from sysctr.config.table import Plain
from sysctr.config.values import shown
from sysctr.errors import ConfigError

LONGEST_FILE_BYTES = 256 * 1024

# MIGRATIONS[0] turns a mapping of schema 1 into one of schema 2 in place, and so on. It is given a plain dict
# or tomlkit's document, so that a file keeps its comments.
Migration = Callable[[MutableMapping[str, Any]], None]
MIGRATIONS: tuple[Migration, ...] = ()
HOST_MIGRATIONS: tuple[Migration, ...] = ()


def read_container(text: str) -> dict[str, object]:
    """Return the mapping of a container's file, in the present schema and without `schema` itself."""
    return read_versioned(text, schema.SCHEMA, MIGRATIONS)


def read_host(text: str) -> dict[str, object]:
    """Return the mapping of the host's file, in the present schema and without `schema` itself."""
    return read_versioned(text, host.SCHEMA, HOST_MIGRATIONS)


def read_versioned(text: str, current: int, migrations: Sequence[Migration]) -> dict[str, object]:
    """Return the mapping of a file that says its schema, migrated to the current one."""
    mapping = _parse(text)
    migrate(mapping, current, migrations)
    del mapping["schema"]
    return mapping


def migrate(mapping: MutableMapping[str, Any], current: int, migrations: Sequence[Migration]) -> None:
    """Bring a mapping of an older schema to the current one in place; refuse one of a newer sysctr."""
    if "schema" not in mapping:
        raise ConfigError(f"cannot accept a configuration without schema (now schema = {current})")
    version = mapping["schema"]
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ConfigError(f"cannot accept schema = {shown(version)}: expected a number from 1 to {current}")
    if version > current:
        raise ConfigError(
            f"cannot accept schema = {shown(version)}: a newer sysctr wrote it, this one knows {current}",
            hint="upgrade sysctr",
        )
    for number in range(version, current):
        migrations[number - 1](mapping)
        mapping["schema"] = number + 1


def edit(text: str, changes: Mapping[str, Plain | None]) -> str:
    """Return the text with dotted keys set, or unset where the value is None; comments and order stay.

    A key of a numbered table (`net.0`) that is unset goes with all below it. The result is not validated.
    """
    # tomlkit takes some text that is not TOML, so the strict reader goes first.
    expected = _parse(text)
    migrate(expected, schema.SCHEMA, MIGRATIONS)
    import tomlkit  # 40 ms and more: only for who changes a file
    from tomlkit.exceptions import TOMLKitError

    try:
        document = tomlkit.parse(text)
        migrate(document, schema.SCHEMA, MIGRATIONS)
        for name, value in changes.items():
            path = name.split(".")
            _set(document, path, value, _new_table)
            _set(expected, path, value, lambda above, is_super: {})
        edited = tomlkit.dumps(document)
        agreed = _without_empty(_parse(edited)) == _without_empty(expected)
    except (TOMLKitError, ConfigError, ValueError, TypeError, LookupError, AttributeError):
        agreed = False
    if not agreed:
        # Seen with tables that are written in several places. Better no change than another one.
        names = ", ".join(changes)
        raise ConfigError(
            f"cannot change {names}: the file is written in a way that sysctr cannot edit",
            hint="change it by hand with `sysctr edit`",
        )
    return edited


def new_text(container: Container) -> str:
    """Return the file of a new container: what differs from the defaults, and where to learn of the rest."""
    lines = [
        f"# Container {container.name} of sysctr. Yours to edit: `sysctr edit {container.name}` checks it.",
        "# What a running container cannot take at once waits for its restart; `sysctr config` shows that.",
        f"schema = {schema.SCHEMA}",
    ]
    return "\n".join(lines + _lines((), schema.dump_config(container))) + "\n"


def _parse(text: str) -> dict[str, Any]:
    # Measured in characters, which are no more than bytes; what counts is that the size is bounded.
    if len(text) > LONGEST_FILE_BYTES:
        raise ConfigError(f"cannot read the configuration: it is longer than {LONGEST_FILE_BYTES} bytes")
    try:
        return tomli.loads(text)
    except RecursionError:
        raise ConfigError("cannot read the configuration: it is nested too deeply") from None
    except ValueError as error:
        # The library quotes the offending key, which may hold anything.
        reason = "".join(part if part.isprintable() else " " for part in str(error)[:200])
        raise ConfigError(f"cannot read the configuration: {reason[:1].lower()}{reason[1:]}") from None


def _set(root: MutableMapping[str, Any], path: Sequence[str], value: Plain | None, table: Callable) -> None:
    where = root
    for depth, component in enumerate(path[:-1]):
        if component not in where:
            if value is None:
                return
            # `[net.0]` needs no `[net]` above it; a super table is one that writes no header.
            where[component] = table(where, depth < len(path) - 2)
        where = where[component]
        if not isinstance(where, MutableMapping):
            raise ConfigError(f"cannot change {'.'.join(path)}: {'.'.join(path[: depth + 1])} is not a table")
    if value is None:
        where.pop(path[-1], None)
    else:
        where[path[-1]] = value


def _without_empty(mapping: Mapping[str, Any]) -> dict[str, Any]:
    # `net` without cards says the same as no `net`, and tomlkit writes no header for it.
    return {name: value for name, value in mapping.items() if value != {}}


def _new_table(above: MutableMapping[str, Any], is_super: bool) -> MutableMapping[str, Any]:
    import tomlkit

    # Within `net = { … }` there can be no `[header]`.
    if isinstance(above, tomlkit.items.InlineTable):
        return tomlkit.inline_table()
    return tomlkit.table(is_super)


def _lines(path: tuple[str, ...], table: Mapping[str, Any]) -> list[str]:
    """Write a table: its own keys first, then the tables in it."""
    own = [f"{name} = {_value(value)}" for name, value in table.items() if not isinstance(value, Mapping)]
    tables = [(name, value) for name, value in table.items() if isinstance(value, Mapping)]
    # A header without keys is needed only for an empty table, such as a card that is all default.
    lines = ["", f"[{'.'.join(path)}]", *own] if path and (own or not tables) else own
    for name, value in tables:
        lines += _lines((*path, name), value)
    return lines


def _value(value: Plain) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    # A JSON string is a basic string of TOML as long as it has no DEL, and no text of ours has.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
