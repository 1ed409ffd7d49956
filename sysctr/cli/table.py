"""Tables for a terminal or a pipe, and text from inside containers made harmless."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

# A column that gives way is mostly still readable with this many characters.
NARROWEST = 6
GAP = "  "
_NAMED = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def neutralise(text: str) -> str:
    r"""Make every character visible that could move the cursor, reorder or hide text.

    Control characters of C0 and C1, format characters (bidirectional controls, zero-width ones, tags), line
    and paragraph separators, lone surrogates and private use become escapes.

    >>> neutralise("a\x1b[2Jb\n")
    'a\\x1b[2Jb\\n'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if _harmless(char) else _escape(char) for char in text)


def _harmless(char: str) -> bool:
    # isprintable() is false for the categories Other and Separator (but for the space): Cc, Cf, Cs, Co, Cn,
    # Zl, Zp and Zs, so also for no-break spaces, which could make two names look alike.
    return char.isprintable()


def _escape(char: str) -> str:
    if char in _NAMED:
        return _NAMED[char]
    code = ord(char)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def width(text: str) -> int:
    """Return how many terminal cells the text takes.

    >>> width("web"), width("日本"), width("e\u0301")
    (3, 4, 1)
    """
    if text.isascii():
        return len(text)
    from unicodedata import category, east_asian_width

    cells = 0
    for char in text:
        if category(char) in ("Mn", "Me"):
            continue
        cells += 2 if east_asian_width(char) in "WF" else 1
    return cells


def cut(text: str, cells: int, mark: str = "…") -> str:
    """Shorten text to at most so many cells, with a mark where something is missing.

    >>> cut("debian-12", 6)
    'debia…'
    """
    if width(text) <= cells:
        return text
    room = cells - width(mark)
    kept, used = [], 0
    for char in text:
        size = width(char)
        if used + size > room:
            break
        kept.append(char)
        used += size
    return ("".join(kept) + mark) if room >= 0 else "".join(kept)


class Column:
    """One column: its title, whether and to which width it may be cut, and how it stands and is coloured.

    An optional column is left out where the terminal is too narrow for all of them, the last one first.
    """

    __slots__ = ("colour", "flexible", "narrowest", "optional", "right", "title")

    def __init__(
        self,
        title: str,
        *,
        flexible: bool = False,
        narrowest: int = NARROWEST,
        optional: bool = False,
        right: bool = False,
        colour: "Callable[[str], str] | None" = None,
    ) -> None:
        self.title = title
        self.flexible = flexible
        self.narrowest = narrowest
        self.optional = optional
        self.right = right
        self.colour = colour


def fit(widths: "Sequence[int]", narrowest: "Sequence[int]", available: int) -> "list[int]":
    """Narrow the widest columns, one cell at a time, until the row fits or none can give more.

    >>> fit([3, 20, 10], [3, 6, 6], 25)
    [3, 9, 9]
    """
    fitted = list(widths)
    over = _row_width(fitted) - available
    while over > 0:
        candidates = [at for at, least in enumerate(narrowest) if fitted[at] > least]
        if not candidates:
            break
        widest = max(candidates, key=lambda at: fitted[at])
        fitted[widest] -= 1
        over -= 1
    return fitted


def _row_width(widths: "Sequence[int]") -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _chosen(columns: "Sequence[Column]", narrowest: "Sequence[int]", available: int) -> "list[int]":
    """Return which columns are shown, by their place."""
    chosen = list(range(len(columns)))
    for at in reversed(range(len(columns))):
        if columns[at].optional and _row_width([narrowest[kept] for kept in chosen]) > available:
            chosen.remove(at)
    return chosen


def render(
    columns: "Sequence[Column]",
    rows: "Iterable[Sequence[str]]",
    *,
    available: "int | None" = None,
    coloured: bool = False,
    mark: str = "…",
) -> "list[str]":
    """Return the lines of a table; `available` cells if it must fit, None if nothing may be cut."""
    cells = [[neutralise(text) for text in row] for row in rows]
    table = [[column.title for column in columns], *cells]
    widths = [max(map(width, texts)) for texts in zip(*table, strict=True)]
    if available is not None:
        narrowest = [
            min(cells, column.narrowest) if column.flexible else cells
            for cells, column in zip(widths, columns, strict=True)
        ]
        chosen = _chosen(columns, narrowest, available)
        columns = [columns[at] for at in chosen]
        table = [[row[at] for at in chosen] for row in table]
        widths = fit([widths[at] for at in chosen], [narrowest[at] for at in chosen], available)
    lines = []
    for number, row in enumerate(table):
        parts = []
        for at, (column, text) in enumerate(zip(columns, row, strict=True)):
            shown = text
            if available is not None and column.flexible:
                shown = cut(text, widths[at], mark)
            space = " " * (widths[at] - width(shown))
            if coloured and number and column.colour and (code := column.colour(text)):
                shown = f"\x1b[{code}m{shown}\x1b[0m"
            if column.right:
                parts.append(space + shown)
            else:
                parts.append(shown + (space if at < len(columns) - 1 else ""))
        line = GAP.join(parts)
        lines.append(f"\x1b[1m{line}\x1b[0m" if coloured and not number else line)
    return lines
