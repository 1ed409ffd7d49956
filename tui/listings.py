"""The lists: where their rows come from, in which columns they are shown, and what a row is to an action."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sysctr.cli.output import duration, moment, plain, size
from sysctr.cli.peer import may
from sysctr.cli.snapshot import tree
from sysctr.tui.actions import (
    BACKUPS,
    CONTAINERS,
    HOSTS,
    JOBS,
    MIGRATIONS,
    POOLS,
    REPLICAS,
    SNAPSHOTS,
    TASKS,
    TEMPLATES,
    Target,
)  # fmt: skip
from sysctr.tui.columns import (
    GLYPHS,
    Column,
    container_columns,
    container_words,
    state_style,
    task_columns,
    task_subject,
    task_words,
)  # fmt: skip
from sysctr.tui.store import HostView, Item, Store

Row = Any
# An item that has no life of its own here: the name of its host, and what the API says of it.
Pair = tuple[str, Item]


@dataclass(frozen=True)
class Listing:
    """One list. All of it works on the store, so it can be tried without a terminal."""

    scope: str
    title: str
    columns: "Sequence[Column[Row]]"
    rows: Callable[[Store, str], "list[Row]"]
    key: Callable[[Row], str]
    words: Callable[[Row], "dict[str, str]"]
    target: Callable[[Row], Target]
    sort: str
    descending: bool = False
    empty: str = ""
    # What has to be asked for while it is looked at.
    wants: tuple[str, ...] = ()
    token: "Callable[[Row], Any] | None" = None

    def shown_columns(self, *, several: bool) -> "Sequence[Column[Row]]":
        """Return the columns: with one host its name says nothing, with several it stays."""
        if several:
            return [replace(one, gives_way=1) if one.key == "host" else one for one in self.columns]
        return [one for one in self.columns if one.key != "host"]


def _pairs(name: str) -> Callable[[Store, str], "list[Pair]"]:
    def rows(store: Store, scope: str) -> "list[Pair]":
        return [
            (host.name, item) for host in store.hosts.values() if not scope or host.name == scope
            for item in host.lists.get(name, ())
        ]  # fmt: skip

    return rows


def _cell(key: str, show: Callable[[Any], str] = lambda value: plain(value) or "-") -> Callable[[Pair], str]:
    return lambda pair: show(pair[1].get(key))


def _sort(key: str) -> Callable[[Pair], Any]:
    def value(pair: Pair) -> Any:
        found = pair[1].get(key)
        return (found is not None, "" if found is None else found)

    return value


def _words_of(*keys: str) -> "Callable[[Pair], dict[str, str]]":
    return lambda pair: {"host": pair[0], **{key: plain(pair[1].get(key)) for key in keys}}


_HOST = Column("host", "HOST", lambda pair: pair[0], lambda pair: pair[0], 8, gives_way=9)


def _source(item: Item) -> str:
    source = item.get("source") or {}
    return f"{source.get('kind', '')} {source.get('name', '')}".strip() or "-"


def _used_by(pair: Pair, store: "Store | None") -> int:
    host = store.hosts.get(pair[0]) if store else None
    return sum(one.data.get("template") == pair[1]["name"] for one in host.containers.values()) if host else 0


def _templates(store: Store) -> Listing:
    columns = (
        Column("name", "NAME", _cell("name"), _sort("name"), 16, grows=True),
        Column("os", "OS", lambda p: plain(p[1].get("os_name") or p[1].get("os_id")) or "-", _sort("os_id"),
               16,
               gives_way=3),
        Column("version", "VERSION", _cell("version"), _sort("version"), 10, gives_way=4),
        Column("arch", "ARCH", _cell("arch"), _sort("arch"), 6, gives_way=5),
        Column("size", "SIZE", _cell("size_bytes", size), _sort("size_bytes"), 6, right=True),
        Column("used", "USED BY", lambda p: str(_used_by(p, store)), lambda p: _used_by(p, store), 7,
               right=True,
               gives_way=1),
        Column("created", "CREATED", _cell("created", lambda at: moment(at)[:10] if isinstance(at,
               int | float)
               else plain(at)[:10] or "-"), _sort("created"), 10, gives_way=2),
        Column("source", "SOURCE", lambda p: _source(p[1]), lambda p: _source(p[1]), 14, gives_way=6),
        _HOST,
    )  # fmt: skip
    return Listing(
        TEMPLATES, "Templates", columns, _pairs("templates"), lambda p: f"{p[0]}/{p[1]['name']}",
        _words_of("name", "os_name", "version", "arch"), lambda p: Target(p[0], p[1], p[1]["name"]), "name",
        empty="No templates. B builds one: debian-12, or tiny for a small one.", wants=("templates",),
    )  # fmt: skip


def _of(item: Item) -> str:
    if item.get("container") is None:
        return "-"
    number = str(item["container"])
    return f"{item['container_name']} ({number})" if item.get("container_name") else number


def _backups() -> Listing:
    columns = (
        Column("of", "CONTAINER", lambda p: _of(p[1]), lambda p: _of(p[1]), 16),
        Column("age", "AGE", _cell("time", lambda at: "-" if at is None else duration(int(max(0,
               time.time() - at)))),
               lambda p: -(p[1].get("time") or 0), 7, right=True),
        Column("size", "SIZE", _cell("size_bytes", size), _sort("size_bytes"), 6, right=True),
        Column("name", "ARCHIVE", _cell("name"), _sort("name"), 20, grows=True),
        Column("state", "STATE", lambda p: ", ".join(w for w in ("protected",
               "renamed") if p[1].get(w)) or "-",
               lambda p: (bool(p[1].get("protected")), bool(p[1].get("renamed"))), 9, gives_way=1),
        Column("notes", "NOTES", _cell("notes"), _sort("notes"), 14, gives_way=2),
        _HOST,
    )  # fmt: skip
    return Listing(
        BACKUPS, "Backups", columns, _pairs("backups"), lambda p: f"{p[0]}/{p[1]['path']}",
        _words_of("name", "container_name", "container", "notes", "directory"),
        lambda p: Target(p[0], p[1], p[1]["name"]), "age",
        empty="No backups. b on a container makes one.", wants=("backups",),
    )  # fmt: skip


def _tasks(now: Callable[[], float]) -> Listing:
    return Listing(
        TASKS, "Tasks", task_columns(now), lambda store, scope: store.tasks(scope),
        lambda t: f"{t[0]}/{t[1]['id']}", task_words,
        lambda t: Target(t[0], t[1], f"{t[1]['kind']} of {task_subject(t[1])}", str(t[1]["state"])), "",
        empty="No tasks yet.",
    )  # fmt: skip


def _containers() -> Listing:
    return Listing(
        CONTAINERS, "Containers", container_columns(), lambda store, scope: store.containers(scope),
        lambda c: c.key, container_words, lambda c: Target(c.host, c.data, c.name, c.state, c.busy), "name",
        empty="No containers. n creates one.", token=lambda c: c.version,
    )  # fmt: skip


@dataclass(frozen=True)
class HostRow:
    """A host that is connected, or a peer that one of them trusts."""

    view: "HostView | None"
    # The host that trusts it, for a peer.
    by: str
    item: Item

    @property
    def name(self) -> str:
        """Return what it is called."""
        return self.view.name if self.view else str(self.item["name"])


def host_rows(store: Store, scope: str) -> "list[HostRow]":
    """Return the hosts, and below each its peers, which may be hosts of the window themselves."""
    found = []
    for host in store.hosts.values():
        if host.link != "refused":
            found.append(HostRow(host, "", host.facts))
        peers = host.lists.get("peers", ())
        found += [HostRow(None, host.name, peer) for peer in peers]
    return found


def _host_state(row: HostRow) -> str:
    if row.view is None:
        return "peer"
    if row.view.link == "down":
        return f"down: {row.view.reason}"
    return row.view.link


def _running(row: HostRow) -> str:
    if row.view is None:
        return "-"
    states = [one.data["state"] for one in row.view.containers.values()]
    return f"{sum(state != 'stopped' for state in states)}/{len(states)}"


def _may(row: HostRow) -> str:
    if row.view is not None:
        return "read-only" if row.view.read_only else "-"
    return may(row.item)


def _seen(row: HostRow) -> str:
    if row.view is not None:
        return "now" if row.view.up else "-"
    return moment(row.item["last_seen"])[:16] if row.item.get("last_seen") else "never"


def _hosts() -> Listing:
    columns = (
        Column("name", "NAME", lambda r: r.name if r.view else f"  {r.name}", lambda r: r.name, 14,
               grows=True),
        Column("state", "STATE", _host_state, _host_state, 12,
               style=lambda r: {"up": "success", "down": "error"}.get(r.view.link,
               "warning") if r.view else "muted"),
        Column("version", "VERSION", lambda r: plain(r.item.get("version")) or "-",
               lambda r: plain(r.item.get("version")),
               8, gives_way=2),
        Column("ct", "RUN", _running, _running, 7, right=True),
        Column("may", "MAY", _may, _may, 17, gives_way=1),
        Column("seen", "SEEN", _seen, _seen, 16, gives_way=3),
        Column("addresses", "ADDRESSES", lambda r: plain(r.item.get("addresses")) or "-",
               lambda r: plain(r.item.get("addresses")), 16, gives_way=4),
    )  # fmt: skip
    return Listing(
        HOSTS, "Hosts", columns, host_rows, lambda r: f"{r.by}/{r.name}",
        lambda r: {"name": r.name, "state": _host_state(r)},
        lambda r: Target(r.by or r.name, r.item, r.name, "peer" if r.view is None else r.view.link), "",
        wants=("peers",),
    )  # fmt: skip


def _age(at: "float | None") -> str:
    return "-" if not at else duration(int(max(0, time.time() - at)))


def _simple(
    scope: str, title: str, key: str, columns: "Sequence[Column[Row]]", *, empty: str, name: str = "name"
) -> Listing:
    """Return a list of what the API has under the name of its scope."""
    return Listing(
        scope, title, columns, _pairs(scope), lambda p: f"{p[0]}/{p[1][key]}", _words_of(name),
        lambda p: Target(p[0], p[1], str(p[1][name]), str(p[1].get("state") or "")), columns[0].key,
        empty=empty,
        wants=(scope,),
    )  # fmt: skip


def _job_state(item: Item) -> str:
    return f"damaged: {item['error']}" if item.get("error") else "on" if item.get("enabled", True) else "off"


def _pool_state(item: Item) -> str:
    return "not there" if item.get("error") else "low" if item.get("low") else "ok"


def above(scope: str) -> Listing:
    """Return one of the lists that open above the others."""
    return _ABOVE[scope]


_ABOVE = {
    JOBS: _simple(JOBS, "Backup jobs", "name", (
        Column("name", "NAME", _cell("name"), _sort("name"), 14, grows=True),
        Column("state", "STATE", lambda p: _job_state(p[1]), lambda p: _job_state(p[1]), 8,
               style=lambda p: "error" if p[1].get("error") else ""),
        Column("when", "WHEN", _cell("schedule"), _sort("schedule"), 16),
        Column("next", "NEXT", _cell("next_run", lambda at: moment(at)[:16]), _sort("next_run"), 16),
        Column("last", "LAST SUCCESS", _cell("last_success", _age), _sort("last_success"), 12, gives_way=1),
    ), empty="No backup jobs. a makes one."),
    POOLS: _simple(POOLS, "Pools", "name", (
        Column("name", "NAME", _cell("name"), _sort("name"), 12),
        Column("driver", "DRIVER", _cell("driver"), _sort("driver"), 8),
        Column("state", "STATE", lambda p: _pool_state(p[1]), lambda p: _pool_state(p[1]), 9,
               style=lambda p: "error" if p[1].get("error") else ""),
        Column("size", "SIZE", _cell("size_bytes", size), _sort("size_bytes"), 6, right=True),
        Column("used", "USED", _cell("used_bytes", size), _sort("used_bytes"), 6, right=True),
        Column("free", "FREE", _cell("free_bytes", size), _sort("free_bytes"), 6, right=True),
        Column("count", "VOLUMES", _cell("count"), _sort("count"), 7, right=True, gives_way=2),
        Column("path", "PATH", _cell("path"), _sort("path"), 14, grows=True, gives_way=1),
    ), empty="No pools. a makes one."),
    MIGRATIONS: _simple(MIGRATIONS, "Migrations", "id", (
        Column("name", "CONTAINER", _cell("name"), _sort("name"), 14),
        Column("way", "WAY", lambda p: f"{'to' if p[1]['role'] == 'source' else 'from'} {p[1]['peer']}",
               _sort("peer"), 14),
        Column("state", "STATE", _cell("state"), _sort("state"), 9,
               style=lambda p: "error" if p[1].get("state") == "in-doubt" else ""),
        Column("phase", "PHASE", _cell("phase"), _sort("phase"), 10),
        Column("for", "FOR", _cell("since", _age), _sort("since"), 7, right=True),
        Column("error", "PROBLEM", _cell("error"), _sort("error"), 16, grows=True, gives_way=1),
    ), empty="Nothing is on its way, and nothing in doubt."),
    REPLICAS: _simple(REPLICAS, "Replicas", "id", (
        Column("name", "CONTAINER", _cell("name"), _sort("name"), 14),
        Column("way", "WAY", lambda p: f"{'on' if p[1]['role'] == 'source' else 'of'} {p[1]['peer']}",
               _sort("peer"), 14),
        Column("last", "LAST", _cell("last", _age), _sort("last"), 8, right=True),
        Column("every", "EVERY", _cell("every_s", duration), _sort("every_s"), 7, right=True, gives_way=2),
        Column("promoted", "PROMOTED", _cell("promoted"), _sort("promoted"), 8, gives_way=3),
        Column("error", "PROBLEM", _cell("error"), _sort("error"), 16, grows=True, gives_way=1),
    ), empty="No replicas. x on a container has Replicate."),
}  # fmt: skip


def snapshot_items(answer: Item, target: Target) -> "list[Item]":
    """Return the snapshots of a container as rows, from the oldest on, and how deep each is in the tree."""
    found = {one["name"]: one for one in answer.get("snapshots") or ()}
    return [
        {**found.get(name, {}), "name": name, "depth": depth, "container": target.item["id"]}
        for depth, name in tree(list(found.values()), answer.get("parent", ""), every_level=True)
    ]


def snapshots(target: Target) -> Listing:
    """Return the list of a container's snapshots: a tree, in which the present state has its place."""

    def name(pair: Pair) -> str:
        item = pair[1]
        return "  " * item["depth"] + (
            f"{GLYPHS['stopped']} {item['name']}" if item["name"] else f"{GLYPHS['running']} now"
        )

    columns = (
        Column("name", "SNAPSHOT", name, _sort("name"), 24, grows=True),
        Column("age", "AGE", _cell("created", _age), _sort("created"), 8, right=True),
        Column("created", "CREATED", _cell("created", lambda at: moment(at)[:16]), _sort("created"), 16,
               gives_way=2),
        Column("expires", "EXPIRES", _cell("expires", lambda at: moment(at)[:16] if isinstance(at,
               int | float) else plain(at) or "-"),
               _sort("expires"), 16, gives_way=1),
        Column("note", "NOTE", _cell("description"), _sort("description"), 16, grows=True),
    )  # fmt: skip
    return Listing(
        SNAPSHOTS, f"Snapshots of {target.name}", columns, _pairs(f"snapshots of {target.item['id']}"),
        lambda p: f"{p[0]}/{p[1]['name']}", _words_of("name", "description"),
        lambda p: Target(p[0], p[1], p[1]["name"], "" if p[1]["name"] else "now"), "",
        empty="No snapshots. t on the container makes one.",
    )  # fmt: skip


def listings(
    store: Store, now: Callable[[], float] = time.time,
    columns: "Mapping[str, Sequence[str]] | None" = None,
) -> "tuple[Listing, ...]":  # fmt: skip
    """Return the five lists, in the order of their tabs; `columns` are the keys that some are to show."""
    lists = (_containers(), _templates(store), _backups(), _tasks(now), _hosts())
    return tuple(_with_columns(one, (columns or {}).get(one.scope, ())) for one in lists)


def _with_columns(listing: Listing, keys: Sequence[str]) -> Listing:
    by_key = {column.key: column for column in listing.columns}
    chosen = tuple(by_key[key] for key in keys if key in by_key)
    return replace(listing, columns=chosen) if chosen else listing


__all__ = ["HostRow", "Listing", "host_rows", "listings", "state_style"]
