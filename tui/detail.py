"""The details of a container: what it is, what it uses, its snapshots, and what was done with it last."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Sparkline, Static

from sysctr.cli.output import duration, field_lines, moment, plain, size
from sysctr.cli.snapshot import tree
from sysctr.cli.table import neutralise
from sysctr.tui.columns import container_state, percent, rate, task_progress
from sysctr.tui.said import Said
from sysctr.tui.store import HISTORY, Container, Item, Sample

_GRAPHS = (
    ("cpu", "cpu", lambda one: one.cpu, lambda value: f"{percent(value)} %"),
    ("memory", "memory", lambda one: one.memory_bytes, size),
    ("in", "network in", lambda one: one.received, rate),
    ("out", "network out", lambda one: one.sent, rate),
    ("disk", "disk", lambda one: (one.read or 0) + (one.written or 0) if one.read is not None else None,
    rate),
)  # fmt: skip


def facts(one: Container, info: "Item | None") -> list[str]:
    """Return what is said of a container, a line each."""
    data = {**one.data, **(info or {})}
    nets = [f"{net['name']} {net['mac']} on {net['bridge']}" for net in data.get("nets") or ()]
    limits = ", ".join(
        f"{key} {plain(value)}" for key, value in (data.get("limits") or {}).items() if value is not None
    )
    backup = data.get("last_backup") or {}
    return field_lines(
        [
            ("state", container_state(one)), ("up",
            duration(data["uptime_s"]) if data.get("uptime_s") else ""),
            ("problem", plain(data.get("error"))), ("template", plain(data.get("template"))),
            ("addresses", plain(data.get("addresses"))), ("network", ", ".join(nets)), ("limits", limits),
            ("disk", _disk(data)), ("pool", plain(data.get("pool"))), ("tags", plain(data.get("tags"))),
            ("starts", "with the host" if data.get("onboot") else ""),
            ("protected", "yes" if data.get("protected") else ""),
            ("pending", plain(data.get("pending"))), ("backup",
            moment(backup["time"]) if backup.get("time") else ""),
            ("created", moment(data["created"]) if data.get("created") else ""), ("uuid",
            plain(data.get("uuid"))),
        ]
    )  # fmt: skip


def _disk(data: Item) -> str:
    used = data.get("disk_bytes", data.get("used_bytes"))
    limit = data.get("disk_limit_bytes")
    if used is None and limit is None:
        return ""
    return f"{size(used)} of {size(limit)}" if limit else size(used)


def snapshot_lines(answer: Item, now_s: float) -> list[str]:
    """Return the snapshots as a tree, and where the present state stands."""
    found = answer.get("snapshots") or []
    by_name = {one["name"]: one for one in found}
    lines = []
    for depth, name in tree(found, answer.get("parent", ""), every_level=True):
        if not name:
            lines.append(f"{'  ' * depth}● now")
            continue
        one = by_name[name]
        age = duration(int(max(0, now_s - one["created"]))) if one.get("created") else ""
        note = f"  {one['description']}" if one.get("description") else ""
        lines.append(f"{'  ' * depth}○ {name}  {age}{note}")
    return lines


def task_lines(tasks: Iterable[Item], number: int, most: int = 6) -> list[str]:
    """Return the last tasks of a container."""
    own = sorted(
        (one for one in tasks if one.get("container") == number), key=lambda one: -float(one["created"])
    )
    lines = []
    for one in own[:most]:
        lines.append(f"{moment(one['created'])[5:16]} {one['kind']} {task_progress(one)}")
    return lines or ["none"]


def series(samples: "Sequence[Sample]", read: Any) -> list[float]:
    """Return one value of the samples, without those that are not known."""
    return [float(value) for value in map(read, samples) if value is not None]


class Detail(VerticalScroll):
    """Beside the list: everything about the container under the cursor."""

    can_focus = True

    def compose(self) -> ComposeResult:
        yield Said(id="detail-title", classes="heading")
        yield Said(id="detail-facts")
        for key, _, _, _ in _GRAPHS:
            yield Said(id=f"about-{key}", classes="graph--title")
            yield Sparkline([], id=f"graph-{key}", classes="graph")
        yield Static(Text("snapshots"), classes="heading")
        yield Said(id="detail-snapshots")
        yield Static(Text("tasks"), classes="heading")
        yield Said(id="detail-tasks")

    def show(
        self, one: "Container | None", info: "Item | None", snapshots: "Item | None", tasks: Iterable[Item],
        samples: "Sequence[Sample]", now_s: float,
    ) -> None:  # fmt: skip
        """Show a container, or nothing."""
        self._say("title", [f"{one.name} ({one.id}) on {one.host}"] if one else [])
        self._say("facts", facts(one, info) if one else [])
        for key, title, read, show in _GRAPHS:
            values = series(samples, read)
            graph = self.query_one(f"#graph-{key}", Sparkline)
            if graph.display != bool(values):
                graph.display = bool(values)
            said = ""
            if values:
                # The newest is at the right end, and all are drawn from 0 up.
                drawn = [0.0] * (HISTORY + 1 - len(values)) + values
                if graph.data != drawn:
                    graph.data = drawn
                mean = sum(values) / len(values)
                said = f"{title}: {show(values[-1])} now, {show(mean)} mean, {show(max(values))} most"
            self.query_one(f"#about-{key}", Said).say(Text(said), hide=True)
        self._say("snapshots", snapshot_lines(snapshots, now_s) if snapshots else [])
        self._say("tasks", task_lines(tasks, one.id) if one else [])

    def _say(self, what: str, lines: Sequence[str]) -> None:
        self.query_one(f"#detail-{what}", Said).say(Text("\n".join(neutralise(line) for line in lines)))


