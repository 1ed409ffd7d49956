"""Times the terminal UI in a real terminal: the first paint, what it costs while all rows change, its memory.

    packaging/test bench tui --rounds 3

The daemon behind it answers from tables within the same process, so its work counts against the UI; the
floor, an app of Textual's that shows nothing, is measured in the same way.
"""

import argparse
import json
import os
import pty
import select
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path

from tests.bench.table import spread

ROWS = (200, 1000)
_COLUMNS, _LINES = 140, 45
_WARM_S, _WATCH_S = 3.0, 10.0
_PAINT_DEADLINE_S = 30.0
_TICKS = os.sysconf("SC_CLK_TCK")
_CHECKOUT = Path(__file__).parents[2]
# What is painted first, and what is painted when the daemon has answered.
_SKELETON, _FULL = b"Containers", b"web-"

Samples = dict[str, list[float]]


class App:
    """An app in a terminal of its own, whose output is read all the time."""

    def __init__(self, *arguments: str) -> None:
        self._terminal_fd, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", _LINES, _COLUMNS, 0, 0))
        environment = {
            **os.environ, "PYTHONPATH": str(_CHECKOUT), "TERM": "xterm-256color", "COLORTERM": "truecolor"
        }  # fmt: skip
        self.began_s = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.tui_app", *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=_CHECKOUT,
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self._seen = b""

    def painted(self, what: bytes) -> float:
        """Wait until a text was painted; return the seconds since the start."""
        while what not in self._seen:
            if not self._read(_PAINT_DEADLINE_S):
                raise RuntimeError(f"nothing with {what!r} was painted: {self._seen[-2000:]!r}")
        return time.perf_counter() - self.began_s

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self._terminal_fd], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self._terminal_fd, 1 << 20)
        except OSError:
            return False
        self._seen = (self._seen + data)[-200_000:]
        return bool(data)

    def watch(self, seconds: float) -> float:
        """Read what it paints for so long; return the share of one processor that it took."""
        before, began_s = self._ticks(), time.perf_counter()
        while (left := began_s + seconds - time.perf_counter()) > 0:
            self._read(left)
        return (self._ticks() - before) / _TICKS / (time.perf_counter() - began_s)

    def _ticks(self) -> int:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def memory_mb(self) -> float:
        """Return its memory that is its own, in MB."""
        for line in Path(f"/proc/{self._process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
        return 0.0

    def close(self) -> None:
        """End it, and wait for it."""
        os.write(self._terminal_fd, b"\x11")  # ctrl+q
        while self._process.poll() is None:
            if not self._read(5):
                self._process.send_signal(signal.SIGTERM)
        self._process.wait()
        os.close(self._terminal_fd)


@contextmanager
def shown(*arguments: str) -> Iterator[App]:
    """Give an app that is ended afterwards."""
    app = App(*arguments)
    try:
        yield app
    finally:
        app.close()


def measure(rows: tuple[int, ...], rounds: int) -> Samples:
    """Return all samples."""
    found: Samples = {}

    def note(what: str, value: float) -> None:
        found.setdefault(what, []).append(value)

    for _ in range(rounds):
        with shown() as blank:
            note("blank app: first paint (s)", blank.painted(_SKELETON))
            blank.watch(_WARM_S)
            note("blank app: CPU (% of one core)", 100 * blank.watch(_WATCH_S))
            note("blank app: memory (MB, PSS)", blank.memory_mb())
        for count in rows:
            with tempfile.TemporaryDirectory() as directory:
                report = f"{directory}/report.json"
                with shown(str(count), report) as app:
                    note(f"{count} rows: first paint (s)", app.painted(_SKELETON))
                    note(f"{count} rows: rows painted (s)", app.painted(_FULL))
                    app.watch(_WARM_S)
                    note(f"{count} rows, all changing: CPU (% of one core)", 100 * app.watch(_WATCH_S))
                    note(f"{count} rows: memory (MB, PSS)", app.memory_mb())
                note(f"{count} rows: longest stall (ms)",
                1000 * json.loads(Path(report).read_text())["stall_s"])
    return found


def main(arguments: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench tui", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="samples of each figure (default 3)")
    parser.add_argument("--rows", type=int, action="append", help=f"how many containers (default {ROWS})")
    options = parser.parse_args(arguments)
    found = measure(tuple(options.rows or ROWS), options.rounds)
    print("| what | median (least to greatest) |\n|---|---|")
    for what, values in found.items():
        print(f"| {what} | {spread(values, '').strip()} |")
    paint = statistics.median(found[f"{(options.rows or ROWS)[0]} rows: first paint (s)"])
    print(f"\n- first paint: {paint:.2f} s (aim ≤ 0.4)")
    return 0
