"""The columns of the lists: what each shows of an item, how it sorts, and in which order columns give way."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sysctr.cli.container import ending
from sysctr.cli.output import duration, moment, size
from sysctr.cli.progress import ENDED
from sysctr.cli.table import cut, neutralise, width
from sysctr.tui.store import Container

T = TypeVar("T")

# What stands for a state, so that no colour is needed to tell them apart.
GLYPHS = {
    "running": "●", "booting": "◐", "starting": "◐", "stopping": "◑", "stopped": "○", "frozen": "❄",
    "away": "⇢", "done": "✓", "failed": "✗", "cancelled": "⊘", "queued": "…",
}  # fmt: skip
_BAR = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class Column(Generic[T]):
    """One column: `cell` gives its text, `sort` what it is sorted by, `style` the name of its colour."""

    key: str
    title: str
    cell: Callable[[T], str]
    sort: Callable[[T], Any]
    width: int
    right: bool = False
    # Takes what is left of the line.
    grows: bool = False
    # Before that, takes up to so many cells of at most half of what is left.
    most: int = 0
    # Those with the highest number go first where there is no room; 0 stays.
    gives_way: int = 0
    style: Callable[[T], str] = lambda item: ""


def fit(columns: "Sequence[Column[T]]", available: int, gap: int = 2) -> "list[tuple[Column[T], int]]":
    """Return the columns that have room, with their widths; a column that grows gets what is left.

    >>> one = Column("a", "A", str, str, 4)
    >>> two = Column("b", "B", str, str, 4, gives_way=1, grows=True)
    >>> [(column.key, cells) for column, cells in fit((one, two), 20)], len(fit((one, two), 9))
    ([('a', 4), ('b', 14)], 1)
    """
    shown = list(columns)
    while len(shown) > 1 and sum(one.width for one in shown) + gap * (len(shown) - 1) > available:
        weakest = max(shown, key=lambda one: one.gives_way)
        if not weakest.gives_way:
            break
        shown.remove(weakest)
    left = max(0, available - sum(one.width for one in shown) - gap * (len(shown) - 1))
    growing = [one for one in shown if one.grows] or shown[-1:]
    widths = {one.key: one.width for one in shown}
    for one in shown:
        wider = min(max(0, one.most - one.width), left // 2)
        widths[one.key] += wider
        left -= wider
    for place, one in enumerate(growing):
        widths[one.key] += left // len(growing) + (place < left % len(growing))
    return [(one, widths[one.key]) for one in shown]


def cell(text: str, cells: int, *, right: bool = False) -> str:
    """Return a text made harmless, cut and padded to so many cells of the terminal.

    >>> cell("web", 5), cell("web", 5, right=True), cell("a long name", 6)
    ('web  ', '  web', 'a lon…')
    """
    text = cut(neutralise(text), cells)
    space = " " * max(0, cells - width(text))
    return space + text if right else text + space


def bar(share: float, cells: int) -> str:
    """Return a bar that is filled to a share, of so many cells.

    >>> bar(0.5, 4), bar(2, 2)
    ('██  ', '██')
    """
    share = min(1.0, max(0.0, share))
    eighths = round(share * cells * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_BAR[rest] if rest else "")).ljust(cells)


def percent(cores: float | None) -> str:
    """Return a use of processors in percent of one core.

    >>> percent(0.124), percent(3.91), percent(None)
    ('12.4', '391', '-')
    """
    if cores is None:
        return "-"
    value = cores * 100
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def rate(bytes_s: float | None) -> str:
    """Return a rate for people.

    >>> rate(2 * 1024**2), rate(None)
    ('2M/s', '-')
    """
    return "-" if bytes_s is None else f"{size(bytes_s)}/s"


def memory(item: Container) -> str:
    """Return the memory of a container, and what it may have, where that is limited."""
    used, most = item.data.get("memory_bytes"), item.data.get("memory_max_bytes")
    if used is None:
        return "-"
    return f"{size(used)}/{size(most)}" if most else size(used)


def memory_share(item: Container) -> float:
    """Return which part of its memory a container has used; 0 where there is no limit."""
    used, most = item.data.get("memory_bytes"), item.data.get("memory_max_bytes")
    return used / most if used and most else 0.0


def state_style(state: str) -> str:
    """Return the name of the colour of a state."""
    return {
        "running": "success", "frozen": "accent", "booting": "warning", "starting": "warning",
        "stopping": "warning", "failed": "error", "away": "accent", "done": "success",
    }.get(state, "muted")  # fmt: skip


def container_state(item: Container) -> str:
    """Return a container's state: what a task does with it, or how it is and what is wrong with it."""
    if item.busy and item.state not in ("starting", "stopping"):
        return f"{GLYPHS['queued']} {item.busy}"
    words = [item.state]
    exit_ = item.data.get("exit") or {}
    if item.state == "away":
        words.append(f"at {(item.data.get('away') or {}).get('name') or '?'}")
    elif item.data.get("pool_error"):
        words.append("no pool")
    elif item.data.get("error"):
        words.append("damaged")
    elif item.state == "stopped" and exit_.get("reason") not in (None, "halt", "reboot"):
        words.append(ending(exit_))
    return f"{GLYPHS.get(item.state, '?')} {', '.join(words)}"


def container_style(item: Container) -> str:
    """Return the name of the colour of a container's state."""
    if item.data.get("error"):
        return "error"
    exit_ = item.data.get("exit") or {}
    if item.state == "stopped" and exit_.get("reason") not in (None, "halt", "reboot"):
        return "error"
    return "warning" if item.busy else state_style(item.state)


def by_address(text: str) -> "tuple[int, ...]":
    """Return what an address sorts by.

    >>> sorted(["10.0.0.10", "10.0.0.9", ""], key=by_address)
    ['', '10.0.0.9', '10.0.0.10']
    """
    return tuple(int(part) for part in re.findall(r"\d+", text)) if text else ()


def naturally(text: str) -> "list[tuple[bool, int, str]]":
    """Return what a name sorts by, so that web-2 comes before web-10.

    >>> sorted(["web-10", "db", "web-2"], key=naturally)
    ['db', 'web-2', 'web-10']
    """
    return [
        (not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", text)
    ]


def _none_last(value: "float | None") -> "tuple[bool, float]":
    return (value is not None, value or 0.0)


def _hot(item: Container) -> str:
    return "error" if memory_share(item) > 0.95 else "warning" if memory_share(item) > 0.85 else ""


def _address(item: Container) -> str:
    return next(iter(item.data.get("addresses") or ()), "")


def container_columns() -> "tuple[Column[Container], ...]":
    """Return the columns of the list of containers."""
    return (
        Column("id", "ID", lambda c: str(c.id), lambda c: c.id, 4, right=True),
        Column("name", "NAME", lambda c: c.name, lambda c: naturally(c.name), 14, grows=True),
        Column(
            "state", "STATE", container_state, lambda c: (c.state, naturally(c.name)),
            13, most=18,
            style=container_style,
        ),
        Column("cpu", "CPU%", lambda c: percent(c.cpu), lambda c: _none_last(c.cpu), 5, right=True),
        Column(
            "memory", "MEMORY", memory, lambda c: _none_last(c.data.get("memory_bytes")), 10, right=True,
            style=_hot,
        ),
        Column("address", "ADDRESS", lambda c: _address(c) or "-", lambda c: by_address(_address(c)), 15,
               gives_way=2),
        Column(
            "up", "UP", lambda c: duration(c.data.get("uptime_s")),
            lambda c: _none_last(c.data.get("uptime_s")),
            7, right=True, gives_way=3,
        ),
        Column("template", "TEMPLATE", lambda c: c.data.get("template") or "-",
               lambda c: c.data.get("template") or "", 12, gives_way=5),
        Column("tags", "TAGS", lambda c: ", ".join(c.data.get("tags") or ()) or "-",
               lambda c: c.data.get("tags") or [], 10, gives_way=6),
        Column("host", "HOST", lambda c: c.host, lambda c: (c.host, naturally(c.name)), 8, gives_way=4),
    )  # fmt: skip


Task = tuple[str, dict[str, Any]]


def task_progress(task: "dict[str, Any]", cells: int = 10) -> str:
    """Return how far a task is: a bar and a share where its end is known, its step, or how it ended."""
    if task["state"] in ENDED:
        error = task.get("error") or {}
        return str(error.get("message") or task["state"])
    step = str(task.get("step") or task["state"])
    total, done = task.get("total_bytes"), task.get("progress_bytes") or 0
    if total:
        share = min(1.0, done / total)
        return f"{bar(share, cells)} {share:4.0%} {size(done)} of {size(total)}  {step}"
    return f"{step}, {size(done)}" if done else step


def task_subject(task: "dict[str, Any]") -> str:
    """Return what a task is about."""
    return str(task.get("subject") or task.get("container") or "-")


def task_took(task: "dict[str, Any]", now_s: float) -> float | None:
    """Return for how long a task has worked, in seconds."""
    if task.get("started") is None:
        return None
    return max(0.0, float(task.get("ended") or now_s) - float(task["started"]))


def task_columns(now: Callable[[], float]) -> "tuple[Column[Task], ...]":
    """Return the columns of the list of tasks."""

    def state(task: Task) -> str:
        word = str(task[1]["state"])
        return GLYPHS.get("starting" if word == "running" else word, "?")

    def took(task: Task) -> str:
        seconds = task_took(task[1], now())
        return duration(seconds if seconds is None or seconds < 10 else int(seconds))

    return (
        Column("state", "", state, lambda t: t[1]["state"], 1,
               style=lambda t: state_style(str(t[1]["state"]))),
        Column("created", "BEGUN", lambda t: moment(t[1]["created"])[-8:], lambda t: t[1]["created"], 8),
        Column("kind", "TASK", lambda t: str(t[1]["kind"]), lambda t: t[1]["kind"], 11),
        Column("subject", "OF", lambda t: task_subject(t[1]), lambda t: task_subject(t[1]), 14),
        Column("progress", "PROGRESS", lambda t: task_progress(t[1]), lambda t: t[1]["state"],
               20, grows=True),
        Column("took", "TOOK", took, lambda t: task_took(t[1], now()) or 0.0, 7, right=True, gives_way=1),
        Column("host", "HOST", lambda t: t[0], lambda t: t[0], 8, gives_way=2),
    )  # fmt: skip


class Filter:
    """What is typed after /: words that all have to be found, `!word` for what must not be, `key:word`.

    >>> Filter("web !old").matches({"name": "web-1"}), Filter("!web").matches({"name": "web-1"})
    (True, False)
    >>> Filter("state:run").matches({"state": "running"}), Filter("tag:a").matches({"tag": "b"})
    (True, False)
    """

    def __init__(self, text: str) -> None:
        self.text = text.strip()
        self._words = [word.lower() for word in self.text.split()]

    def __bool__(self) -> bool:
        return bool(self._words)

    def matches(self, words: "dict[str, str]") -> bool:
        """Tell whether an item is shown, by the words that it can be found by, each with its key."""
        return all(self._holds(word, words) for word in self._words)

    def _holds(self, word: str, words: "dict[str, str]") -> bool:
        if word.startswith("!") and len(word) > 1:
            return not self._holds(word[1:], words)
        key, colon, rest = word.partition(":")
        if colon and key in words:
            return rest in words[key].lower()
        return any(word in text.lower() for text in words.values())


def container_words(item: Container) -> "dict[str, str]":
    """Return by what a container can be found."""
    return {
        "id": str(item.id), "name": item.name, "state": item.state, "host": item.host,
        "address": " ".join(item.data.get("addresses") or ()), "tag": " ".join(item.data.get("tags") or ()),
        "template": item.data.get("template") or "", "task": item.busy,
    }  # fmt: skip


def task_words(task: Task) -> "dict[str, str]":
    """Return by what a task can be found."""
    host, data = task
    return {
        "kind": str(data["kind"]), "state": str(data["state"]), "of": task_subject(data), "host": host,
        "error": str((data.get("error") or {}).get("message") or ""),
    }  # fmt: skip


def arranged(
    items: Iterable[T], columns: "Sequence[Column[T]]", key: str, *, reverse: bool,
    wanted: Filter, words: "Callable[[T], dict[str, str]]",
) -> "list[T]":  # fmt: skip
    """Return the items that a filter lets through, in the order of a column, or as they come."""
    kept = [item for item in items if not wanted or wanted.matches(words(item))]
    column = next((one for one in columns if one.key == key), None)
    return sorted(kept, key=column.sort, reverse=reverse) if column is not None else kept
