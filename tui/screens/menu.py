"""Menus: what can be done with a row, what can be copied, which column sorts. A letter chooses at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from sysctr.cli.table import neutralise
from sysctr.tui.said import shown
from sysctr.tui.screens.above import Above


@dataclass(frozen=True)
class Entry:
    """One line of a menu; `prevented` says why it cannot be chosen."""

    id: str
    title: str
    key: str = ""
    note: str = ""
    prevented: str = ""


class MenuScreen(Above["str | None"]):
    """Lets one choose; returns the id of the entry, None for none."""

    BINDINGS = [Binding("escape,q", "dismiss(None)", "Close", id="menu.close")]

    def __init__(self, title: str, entries: Sequence[Entry], *, chosen: str = "") -> None:
        super().__init__()
        self._title = title
        self._entries = list(entries)
        self._chosen = chosen

    def compose(self) -> ComposeResult:
        wide = max((len(entry.title) for entry in self._entries), default=0)
        with Vertical(classes="dialog wide"):
            yield Static(shown(self._title), classes="dialog--title")
            yield OptionList(
                *(
                    Option(_line(entry, wide), id=entry.id, disabled=bool(entry.prevented))
                    for entry in self._entries
                ),
                id="entries",
            )

    def on_mount(self) -> None:
        box = self.query_one(OptionList)
        places = [place for place, entry in enumerate(self._entries) if not entry.prevented]
        wanted = [place for place in places if self._entries[place].id == self._chosen]
        box.highlighted = next(iter([*wanted, *places]), None)
        self.set_focus(box)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option.id)

    def key_for(self, key: str, character: str | None) -> str | None:
        """Return the entry that a key chooses."""
        for entry in self._entries:
            if entry.key and not entry.prevented and (key in entry.key.split(",") or character == entry.key):
                return entry.id
        return None

    def on_key(self, event) -> None:  # type: ignore[no-untyped-def]
        # Enter is for the entry under the cursor, whatever it does in the list.
        chosen = None if event.key == "enter" else self.key_for(event.key, event.character)
        if chosen is not None:
            event.stop()
            self.dismiss(chosen)


def _line(entry: Entry, wide: int) -> Text:
    line = Text(f"{entry.key.split(',')[0]:>6}  ", style="bold", no_wrap=True, overflow="ellipsis")
    line.append(neutralise(entry.title).ljust(wide))
    about = entry.prevented or entry.note
    if about:
        line.append(f"  {neutralise(about)}", style="dim")
    return line
