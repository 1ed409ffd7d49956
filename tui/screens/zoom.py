"""The details of a container on the whole screen: where there is no place beside the list, or to see more."""

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.widgets import Footer

from sysctr.tui.detail import Detail
from sysctr.tui.screens.above import Above


class ZoomScreen(Above["str | None"]):
    """Shows the details; a key of the list closes it and is done to the container."""

    BINDINGS = [
        Binding("escape,q,enter", "close", "Back", id="zoom.close"),
        Binding("x", "menu", "Menu", id="zoom.menu"),
    ]

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog full"):
            yield Detail()
            yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        self.set_focus(self.query_one(Detail))

    def action_close(self) -> None:
        """Go back to the list."""
        self.dismiss(None)

    def action_menu(self) -> None:
        """Go back, and show all that can be done."""
        self.dismiss("menu")
