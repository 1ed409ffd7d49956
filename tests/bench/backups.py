"""Times backup and restore against the pipeline that Proxmox VE runs, on the same rootfs in one run.

    packaging/test bench backup --rounds 3
    packaging/test bench backup --only gzip --megabytes 600

The other side is `tar … | COMPRESSOR` and `tar -x` on the container's own tree, with as many threads as the
machine has. Needs root, and Debian's pigz. What it makes goes away with it.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys

from tests.bench.sides import InstalledNode, run, timed_ms
from tests.bench.table import spread
from tests.storage import shown

PARTS = ("gzip", "zstd", "restore", "memory")
_MB = 1 << 20
# What vzdump gives to tar (proxmox.md 2.2), less what it says of exclusions.
_TAR = (
    "tar cpf - --one-file-system -p --sparse --numeric-owner --acls --xattrs --xattrs-include=user.* "
    "--xattrs-include=security.capability --warning=no-file-ignored --warning=no-xattr-write"
)
_EXTRACT = (
    "tar xpf {archive} {how} --numeric-owner --acls --xattrs --xattrs-include=user.* "
    "--xattrs-include=security.capability -C {target}"
)
_GROW = (
    "apt-get -q -q update && DEBIAN_FRONTEND=noninteractive apt-get -q -q install -y --no-install-recommends "
    "python3 perl git vim gcc >/dev/null 2>&1; "
    # Up to the size with what the packages brought: it compresses as a distribution does.
    "i=0; while [ $(du -sxm / | cut -f1) -lt {megabytes} ]; do "
    "i=$((i+1)); cp -a /usr/lib/gcc /root/copy-$i; done; "
    "rm -rf /var/cache/apt/archives/*.deb; sync"
)

Samples = dict[str, dict[str, list[float]]]


class Bench:
    """One run: a host with one stopped container, and its tree for the other side."""

    def __init__(self, node: InstalledNode, options: argparse.Namespace, tree: str) -> None:
        self.node = node
        self.options = options
        self.tree = tree
        self.out = f"{node.root}/out"
        self.samples: Samples = {}
        os.makedirs(self.out)

    def note(self, row: str, column: str, value: float) -> None:
        """Keep one sample."""
        self.samples.setdefault(row, {}).setdefault(column, []).append(value)

    def ours(self, codec: str) -> str:
        """Write an archive with sysctr, note time and size, and return its path."""
        _empty(self.out)
        os.sync()
        milliseconds = timed_ms(
            self.node.argv("backup", "bench", "--compress", codec, "--dir", self.out), self.node.environment()
        )
        (name,) = (name for name in os.listdir(self.out) if ".tar" in name)
        column = f"sysctr {codec}"
        self.note("backup (s)", column, milliseconds / 1000)
        self.note("size (MB)", column, os.path.getsize(f"{self.out}/{name}") / 1e6)
        return f"{self.out}/{name}"

    def theirs(self, column: str, compressor: str) -> None:
        """Write an archive with tar and a compressor, and note time and size."""
        path = f"{self.out}/theirs"
        _empty(self.out)
        os.sync()
        script = f"{_TAR} --directory={shlex.quote(self.tree)} . | {compressor} > {path} && sync -d {path}"
        self.note("backup (s)", column, timed_ms(["sh", "-c", script]) / 1000)
        self.note("size (MB)", column, os.path.getsize(path) / 1e6)

    def gzip(self) -> None:
        """Compare tgz archives."""
        self.ours("gzip")
        self.theirs("tar, pigz -6", f"pigz -6 -p {os.cpu_count()}")
        self.theirs("tar, gzip -6", "gzip -6")

    def zstd(self) -> None:
        """Compare zstd archives."""
        self.ours("zstd")
        self.theirs("tar, zstd -T", f"zstd -q -T{os.cpu_count()}")

    def restore(self) -> None:
        """Compare the unpacking of one archive."""
        for codec, how in (("gzip", "-z"), ("zstd", "--zstd")):
            archive = self.ours(codec)
            os.sync()
            milliseconds = timed_ms(
                self.node.argv("restore", archive, "--name", "restored", "--unique"), self.node.environment()
            )
            self.note("restore (s)", f"sysctr {codec}", milliseconds / 1000)
            self.node.run("destroy", "--yes", "restored")
            target = f"{self.node.layout.pool}/bench-target"
            os.mkdir(target)
            os.sync()
            script = _EXTRACT.format(archive=archive, how=how, target=target)
            self.note("restore (s)", f"tar x {codec}", timed_ms(["sh", "-c", script]) / 1000)
            os.sync()
            shutil.rmtree(target)

    def memory(self) -> None:
        """Note the most memory that the daemon ever had, by now."""
        with open(f"/proc/{self.node.pids()['daemon']}/status", encoding="ascii") as file:
            peak_kb = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
        self.note("peak memory of the daemon (MB)", "after all of it", peak_kb / 1024)

    def markdown(self) -> str:
        """Return the table, and the ratios that the aims are about."""
        lines = ["| what | median [least to greatest] |", "|---|---|"]
        for row, columns in self.samples.items():
            for column, values in columns.items():
                lines.append(f"| {row}, {column} | {spread(values, '').strip()} |")
        return "\n".join([*lines, "", *self.ratios()])

    def ratios(self) -> list[str]:
        """Return what is faster or smaller than what, by medians."""
        aims = (
            ("backup (s)", "tar, pigz -6", "sysctr gzip", "tgz: times faster than pigz -6 (aim ≥ 4)"),
            ("backup (s)", "tar, gzip -6", "sysctr gzip", "tgz: times faster than gzip -6 (aim ≥ 8)"),
            ("size (MB)", "sysctr gzip", "tar, gzip -6", "tgz: size against gzip -6 (aim ≤ 1.15)"),
            ("backup (s)", "tar, zstd -T", "sysctr zstd", "zstd: times faster than zstd -T (aim ≥ 1.0)"),
            ("restore (s)", "tar x gzip", "sysctr gzip", "restore of tgz: speed against tar x (aim ≥ 0.95)"),
            ("restore (s)", "tar x zstd", "sysctr zstd", "restore of zstd: speed against tar x (aim ≥ 0.95)"),
        )
        found = []
        for row, over, under, words in aims:
            columns = self.samples.get(row, {})
            if over in columns and under in columns:
                ratio = statistics.median(columns[over]) / statistics.median(columns[under])
                found.append(f"- {words}: {ratio:.2f}")
        return found


def _empty(directory: str) -> None:
    for name in os.listdir(directory):
        os.unlink(f"{directory}/{name}")


def say(text: str) -> None:
    """Tell the user, apart from the table."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Measure and print."""
    from sysctr.storage.drivers import open_driver

    parser = argparse.ArgumentParser(prog="bench backup", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="samples of each figure (default 3)")
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--megabytes", type=int, default=600, help="size of the rootfs (default 600)")
    parser.add_argument("--json", metavar="FILE", help="write all samples there")
    options = parser.parse_args(arguments)
    with InstalledNode() as node:
        node.run("template", "build", "debian-12", timeout_s=900)
        node.run("create", "bench", "--template", "debian-12", "--start")
        node.wait("bench", "booted", 120)
        say("filling")
        grow = _GROW.format(megabytes=options.megabytes)
        node.run("exec", "bench", "--", "sh", "-c", grow, timeout_s=900)
        node.run("stop", "bench")
        driver = open_driver("overlay", node.layout.pool, node.layout.pool_run("default"))
        with driver.opened(str(node.json("info", "bench")["volume"])) as root, shown(root) as tree:
            say(f"{int(run('du', '-sxm', tree).split()[0])} MB")
            bench = Bench(node, options, tree)
            for turn in range(options.rounds):
                for part in options.only or PARTS:
                    say(f"round {turn + 1}: {part}")
                    getattr(bench, part)()
            print(bench.markdown())
            if options.json:
                with open(options.json, "w", encoding="utf-8") as file:
                    json.dump(bench.samples, file, indent=1)
    return 0
