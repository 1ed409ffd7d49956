"""Times snapshot, rollback and clone against the size of what they act on, and files inside against the host.

    packaging/test bench storage --rounds 5
    packaging/test bench storage --only files

Needs root, and Debian's packages btrfs-progs and fio. What it makes goes away with it.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from tests.bench.sides import Failed, InstalledNode, run, timed_ms
from tests.bench.table import spread
from tests.disk import disk

PARTS = ("sizes", "files", "chain")
POOLS = ("overlay", "btrfs")
_MB = 1 << 20
_FILE_MB = 10
_CHAIN = 200
_DISK_BYTES = 16 << 30

Samples = dict[str, dict[str, list[float]]]


class Bench:
    """One run: a host of its own with a pool on the directory's file system and one on btrfs."""

    def __init__(self, node: InstalledNode, options: argparse.Namespace) -> None:
        self.node = node
        self.options = options
        # Row → column → samples; a row's unit is in its name.
        self.samples: Samples = {}

    def note(self, row: str, column: str, value: float) -> None:
        """Keep one sample."""
        self.samples.setdefault(row, {}).setdefault(column, []).append(value)

    def timed(self, *arguments: str) -> float:
        """Run a command of sysctr and return its milliseconds."""
        return timed_ms(self.node.argv(*arguments), self.node.environment())

    def make(self, name: str, pool: str, *options: str) -> None:
        """Create and boot a container in a pool; the first one there pays for the copy of the template."""
        where = () if pool == "overlay" else ("--pool", pool)
        self.node.run("create", name, "--template", self.options.template, *where, *options)
        self.node.run("start", name)
        self.node.wait(name, "booted", 120)

    def sizes(self) -> None:
        """Measure what should not depend on the size."""
        for pool in POOLS:
            for size_mb in (100, 2048):
                name, column = f"s{size_mb}-{pool}", f"{pool}, {size_mb} MB"
                say(f"{column}: filling")
                self.make(name, pool)
                fill = "mkdir /root/fill && cd /root/fill && for i in $(seq $1); do " \
                    "head -c $2 /dev/urandom > $i; done && sync"  # fmt: skip
                count = str(size_mb // _FILE_MB)
                self.node.run("exec", name, "--", "sh", "-c", fill, "sh", count, str(_FILE_MB * _MB))
                for turn in range(self.options.rounds):
                    self.note("snapshot, running (ms)", column, self.timed("snapshot", name, f"live{turn}"))
                    self.note("pause of the container in it (ms)", column, self._last_pause_ms("snapshot"))
                self.node.run("stop", name)
                os.sync()
                for turn in range(self.options.rounds):
                    self.note("snapshot, stopped (ms)", column, self.timed("snapshot", name, f"still{turn}"))
                    self.note(
                        "rollback (ms)", column, self.timed("rollback", "--yes", name, f"still{turn}")
                    )
                    clone = f"c{turn}-{name}"
                    self.note(
                        "clone of a snapshot (ms)", column,
                        self.timed("clone", name, clone, "--snapshot", f"still{turn}"),
                    )  # fmt: skip
                    self.node.run("destroy", "--yes", clone)
                self.node.run("destroy", "--yes", name)

    def files(self) -> None:
        """Measure files inside a container against the same on the host, on the same file system."""
        for pool in POOLS:
            name = f"files-{pool}"
            self.make(name, pool)
            self.node.run("exec", name, "--", "sh", "-c", _INSTALL_FIO, timeout_s=600)
            host_directory = tempfile.mkdtemp(prefix="bench-", dir=self._directory(pool))
            try:
                for turn in range(self.options.rounds):
                    order = ("host", "inside") if turn % 2 == 0 else ("inside", "host")
                    for side in order:
                        self._files_once(name, host_directory, pool, side)
            finally:
                shutil.rmtree(host_directory)
            self.node.run("destroy", "--yes", "--force", name)

    def _files_once(self, name: str, host_directory: str, pool: str, side: str) -> None:
        def shell(script: str) -> str:
            if side == "inside":
                return self.node.run("exec", "-C", "/root", name, "--", "sh", "-c", script).out
            return run("sh", "-c", f"cd {host_directory} && {script}")

        for mode in ("write", "read"):
            os.sync()
            job = json.loads(shell(_FIO.format(mode=mode)))["jobs"][0][mode]
            self.note(f"large file, {mode} (MB/s)", f"{pool}, {side}", job["bw_bytes"] / 1e6)
        os.sync()
        begin = time.perf_counter()
        shell(_SMALL_FILES)
        self.note("20,000 small files, tar in and out (s)", f"{pool}, {side}", time.perf_counter() - begin)

    def chain(self) -> None:
        """Measure what a long line of snapshots costs."""
        for pool in POOLS:
            name = f"chain-{pool}"
            self.make(name, pool)
            self.node.run("stop", name)
            for number in range(1, _CHAIN + 1):
                self._touch(name, number)
                self.node.run("snapshot", name, f"n{number}")
                if number in (1, _CHAIN):
                    column = f"{pool}, {number} snapshots"
                    for _ in range(self.options.rounds):
                        self.note("list of snapshots (ms)", column, self.timed("snapshots", name))
                        self.note("rollback to the last (ms)", column,
                                  self.timed("rollback", "--yes", name, f"n{number}"))  # fmt: skip
                        self.note("start after it (ms)", column, self.timed("start", name))
                        self.node.run("stop", "--kill", name)
            self.node.run("destroy", "--yes", name)

    def _touch(self, name: str, number: int) -> None:
        source = os.path.join(self.node.root, "touched")
        with open(source, "w", encoding="ascii") as file:
            file.write(f"{number}\n" * 1000)
        self.node.run("push", source, f"{name}:/root/touched-{number % 50}")

    def _directory(self, pool: str) -> str:
        return self.node.layout.pool if pool == "overlay" else f"{self.node.root}/btrfs"

    def _last_pause_ms(self, kind: str) -> float:
        _, answer = self.node.api("GET", "/1/tasks")
        tasks = answer["tasks"] if isinstance(answer, dict) else answer
        last = max((task for task in tasks if task["kind"] == kind), key=lambda task: task["created"])
        return last["result"]["pause_ms"]

    def markdown(self) -> str:
        """Return a table of each part: medians with the least and the greatest in brackets."""
        blocks = []
        for columns in dict.fromkeys(tuple(by_column) for by_column in self.samples.values()):
            rows = [row for row, by_column in self.samples.items() if tuple(by_column) == columns]
            lines = [f"| what | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            for row in rows:
                cells = [spread(self.samples[row][column], "").strip() for column in columns]
                lines.append(f"| {row} | {' | '.join(cells)} |")
            blocks.append("\n".join(lines))
        return "\n\n".join(blocks)

    def medians(self) -> dict[str, dict[str, float]]:
        """Return the median of every cell."""
        return {
            row: {column: statistics.median(values) for column, values in by_column.items()}
            for row, by_column in self.samples.items()
        }


_INSTALL_FIO = (
    "apt-get -q -q update && DEBIAN_FRONTEND=noninteractive apt-get -q -q install -y fio >/dev/null 2>&1"
)
_FIO = (
    "fio --name=bench --rw={mode} --bs=1M --size=1G --ioengine=psync --direct=0 --end_fsync=1 --invalidate=1 "
    "--filename=bench.dat --output-format=json"
)
_SMALL_FILES = (
    "rm -rf small && mkdir small && cd small && "
    "for d in $(seq 200); do mkdir $d; for f in $(seq 100); do echo $d $f > $d/$f; done; done; "
    "tar cf ../small.tar . && cd .. && rm -rf copy && mkdir copy && tar xf small.tar -C copy && sync"
)


@contextlib.contextmanager
def opened(options: argparse.Namespace) -> Iterator[Bench]:
    """Make a host with both pools ready; leaving it takes everything back."""
    with InstalledNode() as node:
        directory = f"{node.root}/btrfs"
        os.mkdir(directory)
        with disk(directory, "btrfs", size_bytes=_DISK_BYTES):
            node.run("template", "build", options.template, timeout_s=900)
            node.run("pool", "add", "btrfs", "--driver", "btrfs", "--path", f"{directory}/pool")
            yield Bench(node, options)


def say(text: str) -> None:
    """Tell the user, apart from the table."""
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(prog="bench storage", description=__doc__.splitlines()[0])
    result.add_argument("--rounds", type=int, default=5, help="samples of each figure (default 5)")
    result.add_argument("--only", choices=PARTS, action="append", help="only this part; may be repeated")
    result.add_argument("--template", default="debian-12", help="what the containers are made of")
    result.add_argument("--json", metavar="FILE", help="write all samples there")
    return result


def main(arguments: list[str]) -> int:
    """Measure and print."""
    options = parser().parse_args(arguments)
    with opened(options) as bench:
        parts: dict[str, Callable[[], None]] = {
            "sizes": bench.sizes, "files": bench.files, "chain": bench.chain,
        }  # fmt: skip
        try:
            for part in options.only or PARTS:
                say(f"part {part}")
                parts[part]()
        except (Failed, AssertionError):
            say(bench.node.logs())
            raise
        print(bench.markdown())
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(bench.samples, file, indent=1)
    return 0
