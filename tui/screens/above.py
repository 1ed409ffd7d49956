"""What opens above the lists."""

from typing import TypeVar

from textual.await_complete import AwaitComplete
from textual.screen import ModalScreen

T = TypeVar("T")


class Above(ModalScreen[T]):
    """A screen above the lists: it ends once, and only while it is the one on top.

    Textual 8.2 ends whatever is on top, and ends the app where a screen gives its result twice. Each gives
    the focus itself, in on_mount and by set_focus(): the first that can have it would get keys meanwhile.
    """

    AUTO_FOCUS = ""

    def dismiss(self, result: "T | None" = None) -> AwaitComplete:
        """End with a result."""
        return super().dismiss(result) if self.is_active else AwaitComplete.nothing()
