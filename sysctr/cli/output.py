"""What every command prints with: tables, JSON, errors, sizes and times, and whether colour is wanted."""

import json
import os
import sys

from sysctr import errors
from sysctr.cli.table import Column, neutralise, render

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any, TextIO

_UNITS = ("B", "K", "M", "G", "T", "P")
_BAD_COLOUR = "31"
_STATE_COLOURS = {"running": "32", "frozen": "36", "starting": "33", "stopping": "33", "booting": "33"}
# Words behind which stands where something is, and not what is wrong with it.
_PLACES = {"away": "36"}


def coloured(stream: "TextIO") -> bool:
    """Return whether escape sequences may be written there (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb":
        return False
    return stream.isatty()


def terminal_width(stream: "TextIO") -> "int | None":
    """Return the terminal's width in cells, or None where the output is not a terminal."""
    if not stream.isatty():
        return None
    try:
        columns = int(os.environ.get("COLUMNS", "0"))
    except ValueError:
        columns = 0
    if columns <= 0:
        try:
            columns = os.get_terminal_size(stream.fileno()).columns
        except OSError:
            columns = 0
    return columns or 80


def state_colour(state: str) -> str:
    """Return the SGR code in which a state is shown, or nothing; what stands behind it is bad news.

    >>> state_colour("running"), state_colour("stopped"), state_colour("stopped (exited 1)")
    ('32', '', '31')
    """
    word, _, note = state.partition(" ")
    if word in _PLACES and "," not in note:
        return _PLACES[word]
    return _BAD_COLOUR if note else _STATE_COLOURS.get(word, "")


def print_table(columns: "Sequence[Column]", rows: "Sequence[Sequence[str]]", *, if_empty: str = "") -> None:
    """Print a table: cut to the terminal, whole into a pipe; on a terminal say what to do if it is empty."""
    out = sys.stdout
    if if_empty and not rows and out.isatty():
        notice(if_empty)
        return
    mark = "…" if "utf" in (out.encoding or "").lower() else ">"
    lines = render(columns, rows, available=terminal_width(out), coloured=coloured(out), mark=mark)
    print("\n".join(lines))


def print_json(value: object) -> None:
    """Print a value as JSON; everything beyond ASCII and every control character comes out escaped."""
    print(json.dumps(value, indent=2).replace("\x7f", "\\u007f"))


def print_fields(fields: "Iterable[tuple[str, str]]") -> None:
    """Print `name: value` lines with the values below each other; empty values are left out."""
    for line in field_lines(fields):
        print(neutralise(line))


def field_lines(fields: "Iterable[tuple[str, str]]") -> "list[str]":
    """Return `name: value` lines with the values below each other; empty values are left out.

    >>> field_lines([("id", "101"), ("tags", ""), ("name", "web")])
    ['id:   101', 'name: web']
    """
    shown = [(name, value) for name, value in fields if value]
    wide = max((len(name) for name, _ in shown), default=0)
    return [f"{name + ':':<{wide + 1}} {value}" for name, value in shown]


def print_error(error: errors.SysctrError) -> None:
    """Print `sysctr: cannot …: reason` and the hint to stderr; an error without words was told already."""
    sys.stdout.flush()
    for number, line in enumerate(error.message.splitlines()):
        print(f"sysctr: {neutralise(line)}" if not number else f"  {neutralise(line)}", file=sys.stderr)
    for line in error.hint.splitlines():
        print(f"hint: {neutralise(line)}", file=sys.stderr)


def notice(text: str) -> None:
    """Print one line for the person at the terminal, apart from the results on stdout."""
    print(neutralise(text), file=sys.stderr, flush=True)


def size(size_bytes: "int | float | None") -> str:
    """Return a size for people, in binary units.

    >>> size(0), size(1536), size(512 * 1024**2), size(None)
    ('0B', '1.5K', '512M', '-')
    """
    if size_bytes is None:
        return "-"
    value = float(size_bytes)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{value:.1f}{unit}" if value < 10 and not value.is_integer() else f"{value:.0f}{unit}"


def duration(seconds: "int | float | None") -> str:
    """Return a duration for people, in its two largest units; a short one that was measured, exactly.

    >>> duration(5), duration(3725), duration(200000), duration(None), duration(0.18)
    ('5s', '1h 2m', '2d 7h', '-', '0.18s')
    """
    if seconds is None:
        return "-"
    if isinstance(seconds, float) and seconds < 10:
        return f"{seconds:.2f}s"
    left = int(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if left >= length or (unit == "s" and not parts):
            parts.append(f"{left // length}{unit}")
            left %= length
        elif parts:
            break
    return " ".join(parts[:2])


def moment(unix_s: "int | float | None") -> str:
    """Return a time of day as `2026-01-31 12:00:00`, in the local time zone."""
    if unix_s is None:
        return "-"
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))


def plain(value: "Any") -> str:
    """Return a value of the API as one would type it.

    >>> plain(True), plain(["a", "b"]), plain(None), plain({"a": 1})
    ('yes', 'a, b', '', 'a=1')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name}={plain(item)}" for name, item in value.items())
    return str(value)
