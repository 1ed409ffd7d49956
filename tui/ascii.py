"""The screen in nothing but ASCII: what is drawn is translated on its way out, so nothing else need know."""

from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

# States, marks, lines, edges of buttons and boxes, bars and graphs; each is one cell wide, before and after.
_ASCII = str.maketrans(
    "●◐◑○❄⇢✓✗⊘…▶▲▼·•" "─━│┃╭╮╰╯┌┐└┘├┤╸╺╴╶" "▔▏▎▍▌▋▊▉▐▕" "▁▂▃▄▅▆▇█▀",
    "*+-o#>vx/.>^v.*" "--||++++++++||----" "-|||||||||" "_..-=+*##",
)  # fmt: skip


class Ascii(LineFilter):
    """Turns the signs that the UI draws into such as every terminal has; names and texts of users stay."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """Return the segments translated."""
        return [Segment(text.translate(_ASCII), style, control) for text, style, control in segments]
