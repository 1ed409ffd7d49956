"""The app: hosts, tabs and the lines around them. What can be done is in sysctr.tui.actions, how in flows."""

import asyncio
import contextlib
import gc
import signal
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.text import Text
from textual import events
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding
from textual.css.query import NoMatches
from textual.filter import LineFilter
from textual.markup import escape
from textual.screen import Screen
from textual.widgets import Footer, TabbedContent, TabPane
from textual.worker import Worker, WorkerState

from sysctr import errors
from sysctr.cli.output import duration
from sysctr.cli.progress import ENDED
from sysctr.cli.table import neutralise
from sysctr.client import Client
from sysctr.tui.actions import ACTIONS, CONTAINERS, HOSTS, TASKS, Action
from sysctr.tui.ascii import Ascii
from sysctr.tui.columns import task_progress, task_subject
from sysctr.tui.detail import Detail
from sysctr.tui.flows import Flows
from sysctr.tui.hosts import Connection
from sysctr.tui.listings import Listing, listings
from sysctr.tui.pane import ListPane, pane_class
from sysctr.tui.said import Said
from sysctr.tui.screens.listed import ListScreen
from sysctr.tui.screens.zoom import ZoomScreen
from sysctr.tui.settings import Settings, read_state, write_state
from sysctr.tui.store import HostView, Item, Store
from sysctr.tui.typed import Typed

# With less than this the details have no place beside the list.
_WIDE = 110
_IDLE_REFRESH_S = 10.0
_MOST_IN_DOCK = 3
_MOST_MESSAGES = 500


@dataclass(frozen=True)
class Host:
    """A host of the window: its name, and how to reach it."""

    name: str
    make_client: Callable[[], Client]


def harmless(text: str) -> str:
    """Return a text for the palette, which takes markup."""
    return escape(neutralise(text))


class ContainersPane(ListPane):
    """The list of containers, with the details of the one under the cursor beside it."""

    def beside(self) -> Detail:
        return Detail()

    def moved(self) -> None:
        self.app.look_closer()


class SysctrApp(App[int]):
    """All containers of all hosts, and everything that can be done with them."""

    CSS_PATH = str(Path(__file__).with_name("app.tcss"))
    TITLE = "sysctr"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS = [
        *(Binding(str(place), f"tab({place - 1})", f"Tab {place}", show=False) for place in range(1, 6)),
        Binding("question_mark", "help", "Help", id="app.help"),
        Binding("colon", "command_palette", "Command", show=False, id="app.palette"),
        # Also while something is typed.
        Binding("ctrl+p", "command_palette", "Command", show=False, priority=True, id="app.palette-above"),
        Binding("exclamation_mark", "messages", "Messages", show=False, id="app.messages"),
        Binding("R", "refetch", "Ask again", show=False, id="app.refetch"),
        Binding("ctrl+l", "redraw", "Draw again", show=False, id="app.redraw"),
        Binding("ctrl+z", "suspend_process", "To the shell", show=False, id="app.suspend"),
        Binding("q", "quit", "Quit", id="app.quit"),
    ]

    def __init__(
        self, hosts: Iterable[Host], options: Settings | None = None, kept_in: str = "",
        make_remote: "Callable[[str], Callable[[], Client]] | None" = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.options = options or Settings()
        self._kept_in = kept_in
        self._kept = read_state(kept_in) if kept_in else {}
        self.store = Store()
        self.scope_host = ""
        self.messages: list[tuple[float, str, str]] = []
        self.failed_tasks: set[str] = set()
        self.flows = Flows(self)
        self.typed = Typed(self, self._focus_list, super().on_event)
        self.connections: dict[str, Connection] = {}
        self._hosts = list(hosts)
        self._filter = [Ascii()] if self.options.plain else []
        self._lines = {name: Said(id=name) for name in ("top", "dock", "line")}
        self._details: dict[str, tuple[Item | None, Item | None]] = {}
        self._usage: dict[str, Item] = {}
        self._seen_running: set[str] = set()
        # The hosts, and the container, of which an answer is waited for.
        self._measured: set[str] = set()
        self._looked_at = ""
        # How a peer of the first host is reached.
        self._make_remote = make_remote

    def read_only_at(self, host: str) -> bool:
        """Tell whether nothing may be changed on a host."""
        view = self.store.hosts.get(host)
        return self.read_only or (view is not None and view.read_only)

    @property
    def read_only(self) -> bool:
        """Tell whether nothing may be changed."""
        return self.options.read_only

    # What there is

    def compose(self) -> ComposeResult:
        yield self._lines["top"]
        scopes = [listing.scope for listing in self._listings()]
        first = kept if (kept := self._kept.get("tab")) in scopes else CONTAINERS
        with TabbedContent(id="tabs", initial=f"tab-{first}"):
            for place, listing in enumerate(self._listings(), 1):
                with TabPane(f"{place} {listing.title}", id=f"tab-{listing.scope}"):
                    # The others come after the first paint.
                    if listing.scope == first:
                        yield self._make_pane(listing)
        yield self._lines["dock"]
        yield self._lines["line"]
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        # The terminal is to be as it was, also for whoever ends it from outside.
        for number in (signal.SIGTERM, signal.SIGHUP):
            leave = partial(self.exit, return_code=128 + number)
            asyncio.get_running_loop().add_signal_handler(number, leave)
        self.set_keymap(self.options.keys)
        theme = self.options.theme or str(self._kept.get("theme", ""))
        if theme in self.available_themes:
            self.theme = theme
        elif theme:
            self.say(f"there is no theme {theme}", severity="warning")
        for problem in self.options.problems:
            self.say(problem, severity="warning")
        for host in self._hosts:
            self.add_host(host)
        self.set_interval(self.options.refresh_s, self._tick)
        self.set_interval(1.0, self.show_top)
        self.show_top()
        self.call_after_refresh(lambda: self.run_worker(self._work_up, group="keys"))

    async def _work_up(self) -> None:
        """Make the lists that are not looked at yet, and then give out the keys that were typed."""
        if not gc.isenabled():
            gc.freeze()
            gc.enable()
        made = {pane.scope for pane in self.panes()}
        for listing in self._listings():
            tab = self.query_one(f"#tab-{listing.scope}", TabPane)
            if listing.scope not in made and tab.is_attached:
                await tab.mount(self._make_pane(listing))
        await self.typed.run()

    def _make_pane(self, listing: Listing) -> ListPane:
        base = ContainersPane if listing.scope == CONTAINERS else ListPane
        pane: ListPane = pane_class(listing.scope, base)(listing)
        sorts = self._kept.get("sort")
        kept = sorts.get(listing.scope) if isinstance(sorts, dict) else None
        if isinstance(kept, list) and len(kept) == 2 and kept[0] in {one.key for one in listing.columns}:
            pane.sort_key, pane.descending = str(kept[0]), bool(kept[1])
        return pane

    def exit(self, *arguments: Any, **options: Any) -> None:
        """Leave, and keep how it looks for the next time."""
        self.remember()
        super().exit(*arguments, **options)

    def on_unmount(self) -> None:
        for connection in self.connections.values():
            connection.close()

    def _listings(self) -> "tuple[Listing, ...]":
        return listings(self.store, time.time, self.options.columns)

    def get_line_filters(self) -> "Sequence[LineFilter]":
        """Return what all that is drawn goes through."""
        return [*super().get_line_filters(), *self._filter]

    def panes(self) -> list[ListPane]:
        """Return the tabs' lists."""
        return list(self.screen_stack[0].query(ListPane))

    def pane(self, scope: str) -> ListPane:
        """Return one of them."""
        return self.screen_stack[0].query_one(f"#pane-{scope}", ListPane)

    def active_pane(self) -> ListPane:
        """Return the list that is looked at: the tab's, or one that is open above it."""
        for screen in reversed(self.screen_stack):
            if isinstance(screen, ListScreen) and screen.is_mounted:
                return screen.query_one(ListPane)
        return self.pane(
            self.screen_stack[0].query_one(TabbedContent).active.removeprefix("tab-") or CONTAINERS
        )

    # What happens

    def _changer(self, host: str) -> Callable[[str], None]:
        def changed(what: str) -> None:
            with contextlib.suppress(Exception):  # on the way out nothing is there to be drawn
                self._host_changed(host, what)

        return changed

    def _host_changed(self, host: str, what: str) -> None:
        if not self.is_mounted or not self.screen_stack:
            return
        if what == "peers" and host == self._hosts[0].name:
            self._add_peers(self.store.host(host).lists.get("peers", ()))
        active = self.active_pane()
        if what in ("containers", "link") and isinstance(self.screen, ListScreen):
            self.screen.reload()
        if what == "tasks":
            self._look_at_tasks(host)
            self.show_dock()
        if what == "link":
            self.show_top()
            self.show_dock()
        wants = {"containers": (CONTAINERS, HOSTS), "tasks": (TASKS,), "peers": (HOSTS,)}.get(what, (what,))
        if what == "link" or active.listing.scope in wants or what in active.listing.wants:
            active.update()
            self.show_line()
        if active.listing.scope == CONTAINERS and what in ("containers", "tasks", "link"):
            self.look_closer()

    def _add_peers(self, peers: Iterable[Item]) -> None:
        """Connect with the peers too: those that let this host manage them are hosts of this window."""
        known = {host.peer for host in self.store.hosts.values()}
        for peer in peers:
            name = str(peer["name"])
            if name not in known and self._make_remote is not None:
                # It may be called like this machine.
                shown = f"peer {name}" if name in self.connections else name
                self.add_host(Host(shown, self._make_remote(name)), name)

    def add_host(self, host: Host, peer: str = "") -> None:
        """Connect with one more host."""
        view = self.store.host(host.name)
        view.peer = peer
        view.read_only = self.options.read_only or host.name in self.options.read_only_hosts
        connection = self.connections[host.name] = Connection(
            view, host.make_client, self._changer(host.name)
        )
        self.run_worker(connection.run(), group="hosts", exit_on_error=False)

    def _look_at_tasks(self, host: str) -> None:
        """Tell of tasks that have ended while one looked."""
        for task in self.store.host(host).tasks.values():
            key = f"{host}/{task['id']}"
            if task["state"] not in ENDED:
                self._seen_running.add(key)
            elif key in self._seen_running:
                self._seen_running.discard(key)
                about = f"{task['kind']} of {task_subject(task)}"
                if task["state"] == "failed":
                    error = task.get("error") or {}
                    self.failed_tasks.add(key)
                    self.say(
                        str(error.get("message") or f"{about} failed"), str(error.get("hint") or ""), "error"
                    )
                elif task["state"] == "cancelled":
                    self.say(f"{about} was cancelled", severity="warning")
                else:
                    self.say(f"{about}: done")

    async def _tick(self) -> None:
        """Ask for what is measured, where it is looked at."""
        try:
            scope = self.active_pane().listing.scope
        except NoMatches:
            return  # on the way out
        above = len(self.screen_stack) > 1 and not isinstance(self.screen, ZoomScreen)
        if above or not self.app_focus or scope != CONTAINERS:
            return
        for name, connection in self.connections.items():
            # One that does not answer is not asked again and again.
            if connection.view.up and name not in self._measured:
                self._measured.add(name)
                measure = partial(self._measure, connection)
                self.run_worker(measure, group=f"tick {name}", exit_on_error=False)

    async def _measure(self, connection: Connection) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self._measured.discard, connection.view.name)
            stack.enter_context(contextlib.suppress(errors.SysctrError))  # the events say it, if it is gone
            await connection.refresh_containers()
            one = self.pane(CONTAINERS).table.current
            if (
                one is not None
                and one.host == connection.view.name
                and one.state != "stopped"
                and self._detail()
            ):
                usage = (await connection.get("containers", one.id, "usage"))["usage"]
                connection.view.add_usage(one.id, usage, self._usage.get(one.key))
                self._usage[one.key] = usage
                self.look_closer()

    @property
    def is_wide(self) -> bool:
        """Tell whether the details have a place beside the list."""
        return self.size.width >= _WIDE

    def look_closer(self) -> None:
        """Show the details of the container under the cursor, and ask for what is not known of it."""
        pane = self.pane(CONTAINERS)
        pane.query_one(Detail).display = self.is_wide
        detail = self._detail()
        if detail is None:
            return
        one = pane.table.current
        info, snapshots = self._details.get(one.key, (None, None)) if one else (None, None)
        host = self.store.hosts.get(one.host) if one else None
        samples = list(host.history.get(one.id, ())) if host and one else []
        detail.show(
            one, info, snapshots, host.tasks.values() if host else (), samples, time.time()
        )
        # What is asked for already comes: tasks tell of their progress more often than that.
        if one is not None and host is not None and host.up and self._looked_at != one.key:
            self._looked_at = one.key
            look_up = partial(self._look_up, one.host, one.id, one.key)
            self.run_worker(look_up, group="detail", exclusive=True, exit_on_error=False)

    def _detail(self) -> Detail | None:
        """Return where details are shown now: on the whole screen, or beside the list."""
        if isinstance(self.screen, ZoomScreen) and self.screen.is_mounted:
            return self.screen.query_one(Detail)
        return self.pane(CONTAINERS).query_one(Detail) if self.is_wide else None

    async def _look_up(self, host: str, number: int, key: str) -> None:
        connection = self.connections[host]
        with contextlib.ExitStack() as stack:
            stack.callback(self._looked_up, key)
            stack.enter_context(contextlib.suppress(errors.SysctrError))
            # Not for each row that the cursor only passes.
            await asyncio.sleep(0.15)
            info = (await connection.get("containers", number))["container"]
            snapshots = await connection.get("containers", number, "snapshots")
            changed = self._details.get(key) != (info, snapshots)
            self._details[key] = (info, snapshots)
            current = self.pane(CONTAINERS).table.current
            detail = self._detail()
            if changed and detail is not None and current is not None and current.key == key:
                view = self.store.hosts[host]
                detail.show(current, info, snapshots, view.tasks.values(), list(view.history.get(number, ())),
                            time.time())  # fmt: skip

    def _looked_up(self, key: str) -> None:
        if self._looked_at == key:
            self._looked_at = ""

    # The lines around the lists

    def show_top(self) -> None:
        """Draw the first line: the hosts, and how many containers run."""
        line = Text(" sysctr ", style="bold")
        for host in self.store.hosts.values():
            if host.link == "refused":
                continue
            glyph = {"up": "●", "connecting": "◐", "down": "✗"}[host.link]
            style = {"up": "green", "connecting": "yellow", "down": "red"}[host.link]
            line.append(f" {glyph} ", style=style)
            line.append(neutralise(host.name), style="bold" if self.scope_host == host.name else "")
            if host.link == "down":
                line.append(f" {neutralise(host.reason)}, {self._again_in(host)}", style="red")
        found = self.store.containers(self.scope_host)
        runs = sum(one.data["state"] not in ("stopped",) for one in found)
        line.append(f"   {runs} of {len(found)} run")
        if self.read_only:
            line.append("   READ-ONLY", style="bold yellow")
        self._draw("top", line)

    def _draw(self, name: str, text: Text, *, hide: bool = False) -> None:
        # While the app closes, its timers still come: then the line is not there any more.
        if self._lines[name].is_attached:
            self._lines[name].say(text, hide=hide)

    def _again_in(self, host: HostView) -> str:
        left = max(0, round(host.retry_at_s - time.monotonic()))
        age = f", {duration(int(time.monotonic() - host.heard_s))} old" if host.heard_s else ""
        return f"again in {left} s{age}"

    def show_dock(self) -> None:
        """Draw the tasks that go on now, above the keys."""
        going = [(host, task) for host, task in self.store.tasks() if task["state"] not in ENDED]
        lines = []
        for _, task in going[:_MOST_IN_DOCK]:
            about = f"{task['kind']} {task_subject(task)}"
            lines.append(neutralise(f" {about:<24.24} {task_progress(task, 20)}"))
        if len(going) > _MOST_IN_DOCK:
            lines.append(f" … and {len(going) - _MOST_IN_DOCK} more: 4 shows them")
        self._draw("dock", Text("\n".join(lines)), hide=True)
        self.show_line()

    def show_line(self) -> None:
        """Draw the line above the keys: what is chosen, and what went wrong."""
        going = sum(task["state"] not in ENDED for _, task in self.store.tasks())
        words = [self.active_pane().count]
        if self.scope_host:
            words.append(f"only {self.scope_host}")
        if going:
            words.append(f"{going} running")
        if self.failed_tasks:
            words.append(f"{len(self.failed_tasks)} failed: 4 shows them")
        text = " · ".join(word for word in words if word)
        line = Text(f" {neutralise(text)}" if text else "", style="red" if self.failed_tasks else "")
        self._draw("line", line, hide=True)

    def say(self, text: str, hint: str = "", severity: str = "information") -> None:
        """Tell something; all that was told can be read again."""
        self.messages = [
            *self.messages[1 - _MOST_MESSAGES :],
            (time.time(), severity, "\n".join(p for p in (text, hint) if p)),
        ]
        self.notify(
            neutralise(text) + (f"\n{neutralise(hint)}" if hint else ""), severity=severity,  # type: ignore[arg-type]
            timeout=8 if severity == "error" else 4, markup=False,
        )  # fmt: skip

    def complain(self, error: errors.SysctrError) -> None:
        """Tell what went wrong."""
        self.say(error.message, error.hint, "error")

    # Keys

    def action_tab(self, place: int) -> None:
        """Show a tab."""
        tabs = self.screen_stack[0].query_one(TabbedContent)
        tabs.active = f"tab-{list(listings(self.store))[place].scope}"

    def on_tabbed_content_tab_activated(self) -> None:
        pane = self.active_pane()
        if pane.listing.scope == TASKS:
            self.failed_tasks.clear()
        wanted = set(pane.listing.wants)
        for connection in self.connections.values():
            connection.wanted_lists = wanted
            for name in wanted:
                if connection.view.up:
                    self.run_worker(self._fetch(connection, name), group=f"list {name}", exit_on_error=False)
        pane.update()
        pane.table.focus()
        self.show_line()

    async def _fetch(self, connection: Connection, name: str) -> None:
        with contextlib.suppress(errors.SysctrError):
            await connection.refresh_list(name)

    def action_refetch(self) -> None:
        """Ask all hosts again, also those that do not answer."""
        for connection in self.connections.values():
            connection.try_now()
            if connection.view.up:
                self.run_worker(self._refetch(connection), group="refetch", exit_on_error=False)

    async def _refetch(self, connection: Connection) -> None:
        with contextlib.suppress(errors.SysctrError):
            await connection.refresh()

    def action_redraw(self) -> None:
        """Draw the whole screen again."""
        self.refresh(layout=True)

    def action_messages(self) -> None:
        """Show all that was told."""
        self.flows.show_messages()

    def action_help(self) -> None:
        """Show all keys."""
        self.flows.show_help(self.active_pane())

    def _begin(self, flow: Coroutine[Any, Any, None]) -> None:
        async def work() -> None:
            try:
                await flow
            finally:
                self.typed.opened()

        # What is typed from now on is for what opens.
        self.typed.opening()
        self.run_worker(work(), group="action", exit_on_error=False)

    def _focus_list(self) -> None:
        # In the first moments nothing has the focus yet.
        if self.focused is None and len(self.screen_stack) == 1:
            self.screen.set_focus(self.active_pane().table)

    def push_screen(self, *arguments: Any, **options: Any) -> Any:
        """Open a screen above the others."""
        opened = super().push_screen(*arguments, **options)
        self.typed.opened()
        return opened

    def on_worker_state_changed(self, event: Worker.StateChanged) -> None:
        """Tell of a mistake of this program, which ends no more than what met it."""
        if event.state is WorkerState.ERROR:
            self.say(f"a mistake in sysctr: {event.worker.error!r}", "please report it", "error")

    async def on_event(self, event: events.Event) -> None:
        """Let what is typed wait for its turn."""
        if isinstance(event, (events.Key, events.Paste)) and not event.is_forwarded:
            self.typed.put(event)
        else:
            await super().on_event(event)

    def perform(self, action: Action, pane: ListPane) -> None:
        """Do an action to what is chosen in a list."""
        self._begin(self.flows.perform(action, pane.targets(), pane))

    def open_menu(self, pane: ListPane) -> None:
        """Let one choose among all that can be done."""
        self._begin(self.flows.menu(pane))

    def open_copy(self, pane: ListPane) -> None:
        """Let one choose what to copy."""
        self._begin(self.flows.copy(pane))

    def open_row(self, pane: ListPane) -> None:
        """Show more of a row."""
        self._begin(self.flows.open_row(pane))

    def set_scope(self, host: str) -> None:
        """Show what is on one host alone, or with an empty name on all."""
        self.scope_host = host
        for pane in self.panes():
            pane.update()
        self.show_top()
        self.show_line()

    def remember(self) -> None:
        """Keep the tab, the theme and how the lists are sorted for the next time."""
        if self._kept_in:
            sorts = {pane.listing.scope: [pane.sort_key, pane.descending] for pane in self.panes()}
            write_state(self._kept_in, {"tab": self.pane_scope, "theme": self.theme, "sort": sorts})

    @property
    def pane_scope(self) -> str:
        """Return which tab is open."""
        return self.screen_stack[0].query_one(TabbedContent).active.removeprefix("tab-")

    def get_system_commands(self, screen: Screen) -> Iterable[SystemCommand]:
        """Offer all actions in the palette, and one line for each container to go to."""
        pane = self.active_pane()
        for action in ACTIONS:
            if action.scope == pane.listing.scope and not pane.why_not(action):
                current = pane.current()
                of = f" ({harmless(current.name)})" if current and not action.free else ""
                about = f"{action.help}{of}"
                yield SystemCommand(action.title, about, lambda one=action: self.perform(one, pane))
        for one in self.store.containers():
            yield SystemCommand(
                f"go {harmless(one.name)}", f"{one.state} on {harmless(one.host)}",
                lambda key=one.key: self.go_to(key),
            )  # fmt: skip
        yield from super().get_system_commands(screen)

    def go_to(self, key: str) -> None:
        """Show a container in its list."""
        self.screen_stack[0].query_one(TabbedContent).active = f"tab-{CONTAINERS}"
        pane = self.pane(CONTAINERS)
        if not pane.table.go_to(key):
            pane.action_back()
            pane.table.go_to(key)
