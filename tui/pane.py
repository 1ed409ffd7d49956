"""One tab: a list with its keys, its filter and its marks, and for containers the details beside it."""

from typing import TYPE_CHECKING, Any, ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widget import Widget
from textual.widgets import Input

from sysctr.tui.actions import BY_ID, HOSTS, Action, Target, of_scope
from sysctr.tui.columns import Filter, arranged
from sysctr.tui.hosts import LISTS
from sysctr.tui.listings import Listing
from sysctr.tui.table import ModelTable

if TYPE_CHECKING:
    from sysctr.tui.app import SysctrApp

LIST_BINDINGS: list[BindingType] = [
    Binding("x", "menu", "Menu", id="list.menu"),
    Binding("slash", "filter", "Filter", id="list.filter"),
    Binding("space", "mark", "Mark", show=False, id="list.mark"),
    Binding("V", "mark_all", "Mark all", show=False, id="list.mark-all"),
    Binding("less_than_sign", "sort(-1)", "Sort by the column before", show=False, id="list.sort-before"),
    Binding("greater_than_sign", "sort(1)", "Sort by the next column", show=False, id="list.sort-next"),
    Binding("I", "invert", "Other order", show=False, id="list.invert"),
    Binding("y", "copy", "Copy", show=False, id="list.copy"),
    Binding("escape", "back", "Back", show=False, id="list.back"),
]


def bindings(scope: str) -> list[BindingType]:
    """Return the keys of a list: those of all lists, and those of its actions."""
    return [
        *(
            Binding(action.key, f"do({action.id!r})", action.title, show=action.first, id=action.id)
            for action in of_scope(scope) if action.key
        ),
        *LIST_BINDINGS,
    ]  # fmt: skip


class ListPane(Vertical):
    """A list of one kind of thing. What is done with its items is the app's business."""

    scope: ClassVar[str] = ""
    app: "SysctrApp"

    def __init__(self, listing: Listing) -> None:
        super().__init__(id=f"pane-{listing.scope}", classes="pane")
        self.listing = listing
        # The one host whose items are listed, where it is not that of the window.
        self.host = ""
        # What keeps the list from being known.
        self.problem = ""
        self.wanted = Filter("")
        self.sort_key, self.descending = listing.sort, listing.descending
        self.table: ModelTable[Any] = ModelTable(
            listing.columns, listing.key, token=listing.token, old=self._old, empty=listing.empty,
            id=f"table-{listing.scope}",
        )  # fmt: skip

        self.box = Input(placeholder="words, !word, key:word", classes="pane--filter", compact=True)
        self.box.display = False

    def compose(self) -> ComposeResult:
        with Horizontal(classes="pane--lists"):
            yield self.table
            if (beside := self.beside()) is not None:
                yield beside
        yield self.box

    def beside(self) -> Widget | None:
        """Return what is shown beside the list."""
        return None

    def on_mount(self) -> None:
        self.update()

    def _old(self, row: Any) -> bool:
        host = self.app.store.hosts.get(self.listing.target(row).host)
        return host is not None and not host.up

    # What is shown

    def update(self) -> None:
        """Show what is known now."""
        listing = self.listing
        rows = arranged(
            listing.rows(self.app.store, self.host or self.app.scope_host), listing.columns, self.sort_key,
            reverse=self.descending, wanted=self.wanted, words=listing.words,
        )  # fmt: skip
        self.table.show_columns(listing.shown_columns(several=len(self.app.store.reached()) > 1))
        self.table.sorted_by, self.table.descending = self.sort_key, self.descending
        self.table.empty = self._why_empty()
        self.table.show_rows(rows)

    def _why_empty(self) -> str:
        if self.problem:
            return self.problem
        if self.wanted:
            return f"Nothing matches {self.wanted.text!r}."
        hosts = self.app.store.shown_hosts(self.host or self.app.scope_host)
        wants = {name for name in self.listing.wants if name in LISTS}
        for host in hosts:
            for name in wants & host.problems.keys():
                return host.problems[name]
        if any(host.link == "connecting" or (host.up and not wants <= host.lists.keys()) for host in hosts):
            return "…"
        return self.listing.empty

    @property
    def count(self) -> str:
        """Return how many rows are shown and marked, for the line below."""
        marked = len(self.table.marked())
        words = [f"{len(self.table.rows)} shown"] if self.wanted else []
        return ", ".join([*words, f"{marked} marked"] if marked else words)

    def current(self) -> Target | None:
        """Return the row under the cursor as a target."""
        row = self.table.current
        return None if row is None else self.listing.target(row)

    def targets(self) -> "list[Target]":
        """Return what an action is done to: the marked rows, else the one under the cursor."""
        rows = self.table.marked() or ([self.table.current] if self.table.current is not None else [])
        return [self.listing.target(row) for row in rows]

    def free_host(self, targets: "list[Target]") -> str:
        """Return the host on which something is done that needs no row: that of the list, or the first."""
        if self.host:
            return self.host
        if self.listing.scope == HOSTS and targets:
            return targets[0].host
        return self.app.scope_host or next(iter(self.app.store.hosts))

    def keep_marked(self, targets: "list[Target]") -> None:
        """Take the marks away, but for those of these."""
        names = {(one.host, one.name) for one in targets}
        kept = set()
        for row in self.table.marked():
            target = self.listing.target(row)
            if (target.host, target.name) in names:
                kept.add(self.listing.key(row))
        self.table.marks = kept
        self.table.refresh()
        self._marked()

    # Keys

    def check_action(self, action: str, parameters: "tuple[object, ...]") -> bool | None:
        """Tell whether a key does something now; None greys it."""
        if action != "do":
            return True
        possible = self.why_not(BY_ID[str(parameters[0])])
        return True if not possible else None

    def why_not(self, action: Action) -> str:
        """Return why an action cannot be done to what is chosen, empty where it can be done to any of it."""
        targets = self.targets()
        if not targets or action.free:
            read_only = self.app.read_only_at(self.free_host(targets))
            return action.possible(targets[0] if targets else None, read_only=read_only)
        reasons = [action.possible(one, read_only=self.app.read_only_at(one.host)) for one in targets]
        return "" if not all(reasons) else reasons[0]

    def on_key(self, event: events.Key) -> None:
        """Say of a key that is grey why it is; Textual would not even run it."""
        for action in of_scope(self.listing.scope):
            keys = self.app.options.keys.get(action.id, action.key).split(",")
            if (event.key in keys or event.character in keys) and self.why_not(action):
                event.stop()
                self.app.perform(action, self)

    def action_do(self, action: str) -> None:
        """Do one of the actions."""
        self.app.perform(BY_ID[action], self)

    def action_filter(self) -> None:
        """Ask for the words of a filter; the list follows while they are typed."""
        box = self.box
        box.display = True
        box.value = self.wanted.text
        box.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        self.wanted = Filter(event.value)
        self.update()
        self.app.show_line()

    def on_input_submitted(self) -> None:
        self.box.display = bool(self.wanted)
        self.table.focus()

    def action_mark(self) -> None:
        """Mark a row, or take its mark away."""
        self.table.toggle_mark()
        self._marked()

    def action_mark_all(self) -> None:
        """Mark all rows that are shown, or none."""
        self.table.mark_all()
        self._marked()

    def _marked(self) -> None:
        self.app.show_line()
        self.refresh_bindings()

    def action_menu(self) -> None:
        """Show all that can be done with what is chosen."""
        self.app.open_menu(self)

    def action_copy(self) -> None:
        """Show what can be copied of a row."""
        self.app.open_copy(self)

    def action_sort(self, by: int) -> None:
        """Sort by another column."""
        keys = [column.key for column in self.listing.columns]
        place = keys.index(self.sort_key) if self.sort_key in keys else -1
        self.sort_by(keys[(place + by) % len(keys)])

    def sort_by(self, key: str) -> None:
        """Sort by a column; by the same one again in the other order."""
        self.descending = not self.descending if key == self.sort_key else False
        self.sort_key = key
        self.update()
        self.app.remember()

    def action_invert(self) -> None:
        """Sort in the other order."""
        self.sort_by(self.sort_key)

    def action_back(self) -> None:
        """Close the filter, then take the marks away, then show all hosts."""
        box = self.box
        if box.display or self.wanted:
            box.value = ""
            box.display = False
            self.wanted = Filter("")
            self.update()
        elif self.table.marks:
            self.table.marks = set()
            self.table.refresh()
        elif self.screen.is_modal:
            self.screen.dismiss(None)
            return
        elif self.app.scope_host:
            self.app.set_scope("")
        self.table.focus()
        self._marked()

    # The mouse, and the cursor

    def on_model_table_sort_wanted(self, event: ModelTable.SortWanted) -> None:
        self.sort_by(event.column)

    def on_model_table_menu_wanted(self) -> None:
        self.action_menu()

    def on_model_table_moved(self, event: ModelTable.Moved) -> None:
        event.stop()
        self.refresh_bindings()
        self.moved()

    def on_model_table_opened(self, event: ModelTable.Opened) -> None:
        event.stop()
        self.app.open_row(self)

    def moved(self) -> None:
        """Show what belongs to the row under the cursor."""


def pane_class(scope: str, base: type[ListPane] = ListPane) -> type[ListPane]:
    """Return the class of a tab: Textual reads keys from the class."""
    return type(f"{scope.title()}Pane", (base,), {"BINDINGS": bindings(scope), "scope": scope})
