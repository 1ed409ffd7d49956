"""The result of a run: rows of samples of both sides, as a Markdown table and as JSON."""

import statistics
from dataclasses import dataclass, field


@dataclass
class Row:
    """One thing measured, in milliseconds or megabytes; `aim` is the highest ratio to LXC that is wanted."""

    name: str
    unit: str = "ms"
    aim: float | None = None
    aim_absolute: float | None = None
    # Another row whose LXC samples this one is compared with, where LXC has no such thing of its own.
    against: str = ""
    lxc: list[float] = field(default_factory=list)
    sysctr: list[float] = field(default_factory=list)


class Results:
    """Samples by row; a row exists once it has one."""

    def __init__(self, rows: tuple[Row, ...]) -> None:
        self._rows = {row.name: row for row in rows}

    def add(self, name: str, side: str, value: float) -> None:
        """Note one sample of the side "lxc" or "sysctr"."""
        getattr(self._rows[name], side).append(value)

    def ratio(self, row: Row) -> float | None:
        """Return sysctr's median over LXC's, None where one of them was not measured."""
        lxc = row.lxc or (self._rows[row.against].lxc if row.against else [])
        if not row.sysctr or not lxc:
            return None
        return statistics.median(row.sysctr) / statistics.median(lxc)

    def rows(self) -> list[Row]:
        """Return every row there can be."""
        return list(self._rows.values())

    def measured(self) -> list[Row]:
        """Return the rows that have a sample."""
        return [row for row in self._rows.values() if row.lxc or row.sysctr]

    def markdown(self) -> str:
        """Return the table: medians with the least and the greatest in brackets."""
        lines = [
            "| what | LXC | sysctr | ratio | aim | |",
            "|---|---|---|---|---|---|",
        ]
        for row in self.measured():
            ratio = self.ratio(row)
            lines.append(
                f"| {row.name} | {spread(row.lxc, row.unit)} | {spread(row.sysctr, row.unit)} "
                f"| {'' if ratio is None else f'{ratio:.2f}'} | {_aim(row)} | {self._verdict(row)} |"
            )
        return "\n".join(lines)

    def as_dict(self) -> list[dict]:
        """Return all samples and what was made of them, for JSON."""
        return [
            {
                "name": row.name, "unit": row.unit, "aim": row.aim, "aim_absolute": row.aim_absolute,
                "ratio": self.ratio(row), "lxc": row.lxc, "sysctr": row.sysctr,
            }
            for row in self.measured()
        ]  # fmt: skip

    def _verdict(self, row: Row) -> str:
        ratio = self.ratio(row)
        met = []
        if row.aim is not None and ratio is not None:
            met.append(ratio <= row.aim)
        if row.aim_absolute is not None and row.sysctr:
            met.append(statistics.median(row.sysctr) <= row.aim_absolute)
        return ("met" if all(met) else "missed") if met else ""


def _aim(row: Row) -> str:
    aims = []
    if row.aim is not None:
        aims.append(f"{row.aim:g} x")
    if row.aim_absolute is not None:
        aims.append(f"{row.aim_absolute:g} {row.unit}")
    return ", ".join(aims)


def spread(samples: list[float], unit: str) -> str:
    """Write samples as "median unit (min to max)".

    >>> spread([3.0, 1.0, 2.0], "ms"), spread([0.0424], "MB"), spread([], "ms")
    ('2.0 ms (1.0 to 3.0)', '0.042 MB', '')
    """
    if not samples:
        return ""
    middle = statistics.median(samples)
    digits = 0 if middle >= 1000 else 1 if middle >= 1 else 3
    text = f"{middle:.{digits}f} {unit}"
    if len(samples) == 1:
        return text
    return f"{text} ({min(samples):.{digits}f} to {max(samples):.{digits}f})"
