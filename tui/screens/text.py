"""Texts: logs that grow, differences, reports. Searched with /, copied with y, read with the keys of less."""

import contextlib
from collections.abc import AsyncGenerator, Callable

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.widgets import Input, Log, Static

from sysctr import errors
from sysctr.cli.table import neutralise
from sysctr.tui.said import shown
from sysctr.tui.screens.above import Above

_MOST_LINES = 20_000


class TextScreen(Above[None]):
    """Shows lines; `source` may go on to give them, and is stopped when the screen is closed."""

    BINDINGS = [
        Binding("escape,q", "close", "Close", id="text.close"),
        Binding("slash", "find", "Find", id="text.find"),
        Binding("N", "find_again(-1)", "Before", show=False, id="text.before"),
        Binding("n", "find_again(1)", "Next", id="text.next"),
        Binding("g,home", "log('scroll_home')", show=False),
        Binding("G,end", "log('scroll_end')", "End", id="text.end"),
        Binding("j,down", "log('scroll_down')", show=False),
        Binding("k,up", "log('scroll_up')", show=False),
        Binding("pagedown,space,ctrl+d", "log('scroll_page_down')", show=False),
        Binding("pageup,ctrl+u", "log('scroll_page_up')", show=False),
        Binding("y", "copy", "Copy", id="text.copy"),
    ]

    def __init__(
        self, title: str, source: "Callable[[], AsyncGenerator[list[str]]]", *, at_end: bool = False
    ) -> None:
        super().__init__()
        self._title = title
        self._source = source
        self._at_end = at_end
        self._lines: list[str] = []
        self._found = -1

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog full"):
            yield Static(shown(self._title), classes="dialog--title")
            yield Log(max_lines=_MOST_LINES, auto_scroll=self._at_end, id="lines")
            yield Input(placeholder="find", id="find", compact=True)
            yield Static("", id="about", classes="dialog--note")

    def on_mount(self) -> None:
        self.query_one("#find").display = False
        self.set_focus(self.query_one(Log))
        self.run_worker(self._read(), exclusive=True, exit_on_error=False)

    async def _read(self) -> None:
        log = self.query_one(Log)
        try:
            async with contextlib.aclosing(self._source()) as source:
                async for lines in source:
                    shown = [neutralise(line.replace("\t", "    ")) for line in lines]
                    self._lines = [*self._lines, *shown][-_MOST_LINES:]
                    log.write_lines(shown)
        except errors.SysctrError as error:
            log.write_line(f"[{neutralise(error.message)}]")
        except Exception as error:
            log.write_line(f"[a mistake in sysctr: {neutralise(repr(error))}]")
        if not self._lines:
            log.write_line("(nothing)")

    def action_close(self) -> None:
        """Close the screen, or first the line in which one searches."""
        if self.query_one("#find").display:
            self.query_one("#find").display = False
            self.query_one(Log).focus()
        else:
            self.dismiss(None)

    def action_log(self, what: str) -> None:
        """Scroll."""
        getattr(self.query_one(Log), what)(animate=False)

    def action_find(self) -> None:
        """Ask for a word to find."""
        box = self.query_one("#find", Input)
        box.display = True
        box.focus()

    def on_input_submitted(self) -> None:
        self.query_one("#find").display = False
        self.query_one(Log).focus()
        self._found = -1
        self.action_find_again(1)

    def action_find_again(self, way: int) -> None:
        """Go to the next line that has the word."""
        word = self.query_one("#find", Input).value.lower()
        if not word or not self._lines:
            return
        count = len(self._lines)
        for step in range(1, count + 1):
            place = (self._found + way * step) % count
            if word in self._lines[place].lower():
                self._found = place
                self.query_one(Log).scroll_to(y=place, animate=False)
                self.query_one("#about", Static).update(Text(f"line {place + 1} of {count}"))
                return
        self.query_one("#about", Static).update(Text(f"{word!r} is nowhere in it"))

    def action_copy(self) -> None:
        """Put all of it into the terminal's clipboard."""
        self.app.copy_to_clipboard("\n".join(self._lines))
        self.app.notify(f"{len(self._lines)} lines copied", markup=False)
