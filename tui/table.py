"""A table that draws only the lines on the screen: thousands of rows may change every second.

Textual's DataTable draws all visible cells anew for each cell that changes; this one keeps each drawn line
until its item, its width or its cursor changes. The cursor and the marks belong to items, not to lines.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import ClassVar, Generic, TypeVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from sysctr.tui.columns import Column, cell, fit

T = TypeVar("T")

_GAP = 2
_MOST_KEPT = 4000


class ModelTable(ScrollView, Generic[T], can_focus=True):
    """Shows items in columns; whoever has them gives them anew, sorted and filtered, when they change."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "table--header", "table--sorted", "table--cursor", "table--mark", "table--old", "table--success",
        "table--warning", "table--error", "table--accent", "table--muted",
    }  # fmt: skip
    BINDINGS = [
        Binding("down,j", "move(1)", "Down", show=False, id="list.down"),
        Binding("up,k", "move(-1)", "Up", show=False, id="list.up"),
        Binding("pagedown,ctrl+d", "page(1)", "Page down", show=False, id="list.page-down"),
        Binding("pageup,ctrl+u", "page(-1)", "Page up", show=False, id="list.page-up"),
        Binding("home,g", "move_to(0)", "First", show=False, id="list.first"),
        Binding("end,G", "move_to(-1)", "Last", show=False, id="list.last"),
        Binding("enter", "open", "Open", show=False, id="list.open"),
    ]

    class Moved(Message):
        """The cursor is on another item, or on none."""

        def __init__(self, table: "ModelTable", key: str) -> None:
            super().__init__()
            self.table = table
            self.key = key

        @property
        def control(self) -> "ModelTable":
            return self.table

    class Opened(Moved):
        """An item was chosen: by enter, or by a second click."""

    class MenuWanted(Moved):
        """What can be done with an item was asked for, with the other button of the mouse."""

    class SortWanted(Message):
        """The title of a column was clicked."""

        def __init__(self, table: "ModelTable", column: str) -> None:
            super().__init__()
            self.table = table
            self.column = column

        @property
        def control(self) -> "ModelTable":
            return self.table

    def __init__(
        self,
        columns: "Sequence[Column[T]]",
        key_of: Callable[[T], str],
        *,
        token: "Callable[[T], Hashable] | None" = None,
        old: Callable[[T], bool] = lambda item: False,
        empty: str = "",
        id: str | None = None,  # noqa: A002 - Textual's name
    ) -> None:
        super().__init__(id=id)
        self.table_columns = tuple(columns)
        self.empty = empty
        self.marks: set[str] = set()
        self.sorted_by, self.descending = "", False
        self._key_of = key_of
        # What a drawn line depends on besides the item itself; without it lines are drawn each time.
        self._token = token
        self._old = old
        self._rows: list[T] = []
        self._keys: list[str] = []
        self._at: dict[str, int] = {}
        self._cursor = 0
        self._drawn: dict[Hashable, Strip] = {}
        # How wide the columns are in so many cells.
        self._widths: tuple[int, list[tuple[Column[T], int]]] = (0, [])
        self._styles: dict[str, Style] = {}

    # What is shown

    def show_columns(self, columns: "Sequence[Column[T]]") -> None:
        """Show these columns from now on."""
        if self.table_columns != tuple(columns):
            self.table_columns = tuple(columns)
            self._widths = 0, []
            self._drawn.clear()
            self.refresh()

    def _fitted(self, cells: int) -> "list[tuple[Column[T], int]]":
        if self._widths[0] != cells:
            self._widths = cells, fit(self.table_columns, cells - 2, _GAP)
        return self._widths[1]

    @property
    def rows(self) -> "list[T]":
        """Return the items, in the order in which they are shown."""
        return self._rows

    @property
    def cursor_key(self) -> str:
        """Return the key of the item under the cursor, empty where there is none."""
        return self._keys[self._cursor] if self._keys else ""

    @property
    def current(self) -> "T | None":
        """Return the item under the cursor."""
        return self._rows[self._cursor] if self._rows else None

    def show_rows(self, rows: Iterable[T]) -> None:
        """Show these items; the cursor stays on its item, or where that was."""
        before = self.cursor_key
        self._rows = list(rows)
        self._keys = [self._key_of(row) for row in self._rows]
        self._at = {key: place for place, key in enumerate(self._keys)}
        self._cursor = self._at.get(before, min(self._cursor, max(0, len(self._rows) - 1)))
        self._resized()
        self.refresh()
        if self.cursor_key != before:
            self.post_message(self.Moved(self, self.cursor_key))

    def go_to(self, key: str) -> bool:
        """Put the cursor on an item; False where it is not shown."""
        if key not in self._at:
            return False
        self._put(self._at[key])
        return True

    def marked(self) -> "list[T]":
        """Return the items that are marked and shown."""
        return [row for row, key in zip(self._rows, self._keys, strict=True) if key in self.marks]

    def toggle_mark(self) -> None:
        """Mark the item under the cursor, or take its mark away, and go on to the next one."""
        if self._keys:
            self.marks ^= {self.cursor_key}
            self.refresh()
            self.action_move(1)

    def mark_all(self) -> None:
        """Mark all that is shown, or take the marks away where all have one."""
        shown = set(self._keys)
        self.marks = self.marks - shown if shown <= self.marks else self.marks | shown
        self.refresh()

    # Moving

    def action_move(self, by: int) -> None:
        """Move the cursor by so many lines."""
        self._put(self._cursor + by)

    def action_page(self, by: int) -> None:
        """Move the cursor by so many screens."""
        self._put(self._cursor + by * max(1, self.scrollable_content_region.height - 2))

    def action_move_to(self, place: int) -> None:
        """Move the cursor to the first line, or for -1 to the last."""
        self._put(place if place >= 0 else len(self._rows) - 1)

    def action_open(self) -> None:
        """Say that the item under the cursor was chosen."""
        if self._rows:
            self.post_message(self.Opened(self, self.cursor_key))

    def _put(self, place: int) -> None:
        place = min(max(0, place), max(0, len(self._rows) - 1))
        if place == self._cursor:
            return
        before, self._cursor = self._cursor, place
        for line in (before, place):
            self._refresh_row(line)
        self._into_view()
        self.post_message(self.Moved(self, self.cursor_key))

    def _into_view(self) -> None:
        height = max(1, self.scrollable_content_region.height - 1)
        top = round(self.scroll_offset.y)
        if self._cursor < top:
            self.scroll_to(y=self._cursor, animate=False)
        elif self._cursor >= top + height:
            self.scroll_to(y=self._cursor - height + 1, animate=False)

    def _refresh_row(self, row: int) -> None:
        y = row - round(self.scroll_offset.y) + 1
        if 0 < y < self.size.height:
            self.refresh(Region(0, y, self.size.width, 1))

    # Drawing

    def on_resize(self) -> None:
        self._resized()
        self._into_view()

    def notify_style_update(self) -> None:
        """Forget all drawn lines: the colours have changed."""
        super().notify_style_update()
        self._drawn.clear()
        self._styles.clear()

    def _resized(self) -> None:
        self.virtual_size = Size(self.scrollable_content_region.width, len(self._rows) + 1)

    def render_line(self, y: int) -> Strip:
        """Return one line of the screen: the titles, an item, or nothing."""
        cells = self.scrollable_content_region.width
        if y == 0:
            return self._header(cells)
        row = y - 1 + round(self.scroll_offset.y)
        if row < len(self._rows):
            return self._line(row, cells)
        if not self._rows and y == 1 and self.empty:
            return Strip([Segment(cell(self.empty, cells), self._style("muted"))], cells)
        return Strip.blank(cells, self.rich_style)

    def _style(self, name: str) -> Style:
        """Return the style of a part of a line, or with an empty name of the whole table."""
        if (style := self._styles.get(name)) is None:
            partial = bool(name)
            style = (
                self.get_component_rich_style(f"table--{name}", partial=True) if partial else self.rich_style
            )
            self._styles[name] = style
        return style

    def _header(self, cells: int) -> Strip:
        base = self.get_component_rich_style("table--header")
        segments = [Segment("  ", base)]
        for place, (column, wide) in enumerate(self._fitted(cells)):
            if place:
                segments.append(Segment(" " * _GAP, base))
            title, style = column.title, base
            if column.key == self.sorted_by and title:
                title += "▼" if self.descending else "▲"
                style = base + self._style("sorted")
            segments.append(Segment(cell(title, wide, right=column.right), style))
        return Strip(segments).adjust_cell_length(cells, base)

    def _line(self, row: int, cells: int) -> Strip:
        item, key = self._rows[row], self._keys[row]
        here, marked, old = row == self._cursor, key in self.marks, self._old(item)
        kept = None
        if self._token is not None:
            kept = (key, self._token(item), cells, here and self.has_focus, here, marked, old)
            if (strip := self._drawn.get(kept)) is not None:
                return strip
        strip = self._draw(item, cells, here=here, marked=marked, old=old)
        if kept is not None:
            if len(self._drawn) > _MOST_KEPT:
                self._drawn.clear()
            self._drawn[kept] = strip
        return strip

    def _draw(self, item: T, cells: int, *, here: bool, marked: bool, old: bool) -> Strip:
        base = self._style("")
        over = self._style("cursor") if here else Style.null()
        if marked:
            base += self._style("mark")
        if old:
            base += self._style("old")
        segments = [Segment(("▶" if here else " ") + ("*" if marked else " "), base + over)]
        for place, (column, wide) in enumerate(self._fitted(cells)):
            if place:
                segments.append(Segment(" " * _GAP, base + over))
            style = base
            if not old and not here and (name := column.style(item)):
                style += self._style(name)
            segments.append(Segment(cell(column.cell(item), wide, right=column.right), style + over))
        return Strip(segments).adjust_cell_length(cells, base + over)

    # The mouse

    async def on_click(self, event: events.Click) -> None:
        if event.y == 0:
            if (column := self._column_at(event.x)) is not None:
                self.post_message(self.SortWanted(self, column.key))
            return
        row = event.y - 1 + round(self.scroll_offset.y)
        if row >= len(self._rows):
            return
        self._put(row)
        if event.button == 3:
            self.post_message(self.MenuWanted(self, self.cursor_key))
        elif event.chain > 1:
            self.action_open()

    def _column_at(self, x: int) -> "Column[T] | None":
        left = 2
        for column, wide in self._fitted(self.scrollable_content_region.width):
            if left <= x < left + wide + _GAP:
                return column
            left += wide + _GAP
        return None
