"""What the user has set, and what is kept from one time to the next.

    $XDG_CONFIG_HOME/sysctr/tui.toml    theme, refresh_s, icons, mouse, read_only, the tables keys, confirm,
                                        columns, hosts.NAME
    $XDG_STATE_HOME/sysctr/tui.json     the tab, and how the lists are sorted

A mistake in the first is told and costs that one setting; the second is thrown away if it cannot be read.
"""

import contextlib
import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sysctr.tui.actions import BY_ID, Ask

CONFIRM = ("always", "bulk", "never")
# Keys of the lists and of the app, which have no action.
OTHER_KEYS = frozenset(
    {
        "list.down", "list.up", "list.page-down", "list.page-up", "list.first", "list.last", "list.open",
        "list.filter", "list.mark", "list.mark-all", "list.menu", "list.sort-before", "list.sort-next",
        "list.invert", "list.copy", "list.back", "app.help", "app.palette", "app.messages", "app.refetch",
        "app.redraw", "app.suspend", "app.quit",
    }
)  # fmt: skip
_NAMES = ("mouse", "read_only", "theme", "icons", "refresh_s", "keys", "confirm", "columns", "hosts")
_LEAST_REFRESH_S, _MOST_REFRESH_S = 1.0, 60.0


@dataclass
class Settings:
    """How it is to look and behave. `problems` are the mistakes in the file, a line each."""

    theme: str = ""
    refresh_s: float = 2.0
    plain: bool = False
    mouse: bool = True
    read_only: bool = False
    keys: dict[str, str] = field(default_factory=dict)
    # By the id of an action: always, bulk (only for several at once) or never.
    confirm: dict[str, str] = field(default_factory=dict)
    read_only_hosts: frozenset[str] = frozenset()
    # By the name of a list: the keys of its columns, in the order in which they are shown.
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def asks(self, action: str, count: int) -> bool:
        """Tell whether an action that asks for a yes does so for so many items."""
        wanted = self.confirm.get(action, "always")
        return wanted == "always" or (wanted == "bulk" and count > 1)


def config_file() -> str:
    """Return where the settings are."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return f"{base}/sysctr/tui.toml"


def state_file() -> str:
    """Return where is kept what the program notes by itself."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return f"{base}/sysctr/tui.json"


def read(path: str) -> Settings:
    """Read the settings; a file that is not there means that nothing was set."""
    try:
        with open(path, "rb") as file:
            data = tomllib.load(file)
    except FileNotFoundError:
        return Settings()
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return Settings(problems=(f"{path}: {error}",))
    return parse(data, path)


def parse(data: Mapping[str, Any], path: str = "tui.toml") -> Settings:
    """Return the settings that a file makes.

    >>> parse({"refresh_s": 5, "keys": {"ct.start": "S"}}).keys, parse({"colour": 1}).problems
    ({'ct.start': 'S'}, ('tui.toml: there is no setting colour',))
    """
    made, problems = Settings(), []

    def wrong(what: str) -> None:
        problems.append(f"{path}: {what}")

    for name, value in data.items():
        if name in ("mouse", "read_only") and isinstance(value, bool):
            setattr(made, name, value)
        elif name == "theme" and isinstance(value, str):
            made.theme = value
        elif name == "icons" and value in ("unicode", "ascii"):
            made.plain = value == "ascii"
        elif name == "refresh_s" and isinstance(value, int | float) and not isinstance(value, bool):
            made.refresh_s = min(_MOST_REFRESH_S, max(_LEAST_REFRESH_S, float(value)))
        elif name == "keys" and isinstance(value, dict):
            for action, key in value.items():
                if action not in BY_ID and action not in OTHER_KEYS:
                    wrong(f"[keys] there is no action {action}")
                elif not isinstance(key, str) or not key:
                    wrong(f"[keys] {action} needs a key")
                else:
                    made.keys[action] = key
        elif name == "confirm" and isinstance(value, dict):
            for action, when in value.items():
                known = BY_ID.get(action)
                if known is None or known.ask is not Ask.YES:
                    wrong(f"[confirm] {action} is no action that asks for a yes")
                elif when not in CONFIRM:
                    wrong(f"[confirm] {action} is always, bulk or never")
                else:
                    made.confirm[action] = when
        elif name == "columns" and isinstance(value, dict):
            for scope, wanted in value.items():
                if isinstance(wanted, list) and wanted and all(isinstance(one, str) for one in wanted):
                    made.columns[scope] = tuple(wanted)
                else:
                    wrong(f"[columns] {scope} is a list of columns")
        elif name == "hosts" and isinstance(value, dict):
            made.read_only_hosts = frozenset(
                host for host, one in value.items() if isinstance(one, dict) and one.get("read_only") is True
            )
        elif name in _NAMES:
            wrong(f"{name} cannot be {value!r}")
        else:
            wrong(f"there is no setting {name}")
    made.problems = tuple(problems)
    return made


def read_state(path: str) -> dict[str, Any]:
    """Return what was kept; nothing where that cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def write_state(path: str, data: Mapping[str, Any]) -> None:
    """Keep something for the next time; where that is not possible it is not kept."""
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        draft = f"{path}.{os.getpid()}"
        with open(draft, "w", encoding="utf-8") as file:
            json.dump(data, file)
        os.replace(draft, path)
