"""A list above the others: snapshots, jobs, pools, migrations, replicas, with keys of their own."""

from collections.abc import Awaitable, Callable

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.widgets import Footer, Static

from sysctr import errors
from sysctr.tui.listings import Listing
from sysctr.tui.pane import pane_class
from sysctr.tui.said import shown
from sysctr.tui.screens.above import Above


class ListScreen(Above[None]):
    """Shows a list until it is closed; `load` brings what it shows into the store."""

    BINDINGS = [
        Binding("q", "close", "Close", id="above.close"), Binding("question_mark", "app.help", "Help",
        show=False),
    ]  # fmt: skip

    def __init__(self, listing: Listing, load: Callable[[], Awaitable[object]], host: str) -> None:
        super().__init__()
        self._host = host
        self._listing = listing
        self._load = load

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog full"):
            yield Static(shown(self._listing.title), classes="dialog--title")
            self.pane = pane_class(self._listing.scope)(self._listing)
            self.pane.host = self._host
            yield self.pane
            yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        self.set_focus(self.pane.table)
        self.reload()

    def reload(self) -> None:
        """Ask again for what is shown."""
        self.run_worker(self._reload, exclusive=True, group="reload", exit_on_error=False)

    async def _reload(self) -> None:
        try:
            await self._load()
        except errors.SysctrError as error:
            self.pane.problem = error.message
        except Exception as error:
            self.pane.problem = f"a mistake in sysctr: {error!r}"
        else:
            self.pane.problem = ""
        self.pane.update()

    def action_close(self) -> None:
        """Close it."""
        self.dismiss(None)
