"""A text that is drawn only when it says something else: a new layout costs more than all lists."""

from rich.text import Text
from textual.widgets import Static

from sysctr.cli.table import neutralise


def shown(text: str) -> Text:
    """Return a text of somebody's, of one line or several, as it may be drawn: no signs that do something."""
    return Text("\n".join(neutralise(line) for line in text.split("\n")))


class Said(Static):
    """Shows a text that is given again and again."""

    def __init__(self, id: str | None = None, classes: str | None = None) -> None:  # noqa: A002 - Textual's name
        super().__init__("", id=id, classes=classes)
        self._said = Text()

    def say(self, text: Text, *, hide: bool = False) -> None:
        """Show a text; with `hide` an empty one takes no place."""
        if hide and self.display != bool(text.plain):
            self.display = bool(text.plain)
        if text == self._said:
            return
        grown = (
            text.plain.count("\n") != self._said.plain.count("\n") or not text.plain or not self._said.plain
        )
        self._said = text
        self.update(text, layout=grown)
