"""Times migrations between two hosts on a cable against stop, rsync and start of LXC, and plain rsync.

    packaging/test bench migrate --rounds 3
    packaging/test bench migrate --only downtime --size 600 --templates /var/tmp/templates

How long a container is down is measured inside it: a service of it notes the time over and over, and the
longest pause between two notes is what whoever uses it had to wait. Both sides move the same data over the
same cable; LXC's rsync goes without encryption, to an rsync daemon. Needs root, and Debian's lxc and rsync.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from tests.bench.sides import Failed, Guest, InstalledNode, Lxc, both, run, timed_ms
from tests.bench.table import spread
from tests.node import Node, join
from tests.storage import shown
from tests.wait import wait_until

PARTS = ("downtime", "stopped")
SIZES_MB = (100, 600, 2048)
_MB = 1 << 20
_PORT = 8730
_FILE_MB = 10
_TICKS = os.sysconf("SC_CLK_TCK")
_BEAT_DEADLINE_S = 120
_RSYNC = ("rsync", "-aHAX", "--numeric-ids", "--sparse", "--delete")

DOWN = "down, between beats (s)"
REPORTED = "down, as the report says (s)"
WHOLE = "whole command (s)"
PASSES = "passes"
SENT = "sent (MB)"
SPEED = "throughput (MB/s)"
WRITTEN = "written by the container (MB)"

# The start of the process that writes it, in ticks since the host booted: a clock that no container has of
# its own (lxcfs shows another uptime), and that every shell can read.
_BEAT = "while :; do cut -d' ' -f22 /proc/self/stat >>/root/beats; sleep 0.02; done"
_INSTALL_UNIT = """
cat >/etc/systemd/system/beat.service <<'EOF'
[Service]
ExecStart=/bin/sh /root/beat
[Install]
WantedBy=multi-user.target
EOF
systemctl enable -q beat
"""
_INSTALL_SCRIPT = """
cat >/etc/init.d/S90beat <<'EOF'
#!/bin/sh
case $1 in
start) sh /root/beat </dev/null >/dev/null 2>&1 & echo $! >/run/beat.pid ;;
stop) kill "$(cat /run/beat.pid)" ;;
esac
EOF
chmod 755 /etc/init.d/S90beat
"""
_PREPARE = """
set -e
cat >/root/beat <<'EOF'
{beat}
EOF
{install}
mkdir -p /root/fill /root/churn
cd /root/fill
i=0; while [ $i -lt {files} ]; do head -c {file_bytes} /dev/urandom >$i; i=$((i+1)); done
cd /root/churn
i=0; while [ $i -lt {changing} ]; do head -c 1048576 /dev/urandom >$i; i=$((i+1)); done
sync
"""
# All of it at once, then on and on at less than 10 MB a second.
_CHURN = """
cd /root/churn || exit 1
pause=:
while :; do
    i=0
    while [ $i -lt {changing} ]; do head -c 1048576 /dev/urandom >$i; $pause; i=$((i+1)); done
    pause='sleep 0.1'
done
"""
_DIGEST = "cd /root/fill && cat * | sha256sum"

Samples = dict[str, dict[str, list[float]]]


def ticks_now() -> int:
    """Return the host's time as /proc/PID/stat has it."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS)


def longest_pause_s(beats: str, since: int) -> float | None:
    """Return the longest time between two beats, None until there is one at or after `since`, in ticks.

    >>> longest_pause_s("100\\n102\\n350\\n352", 340), longest_pause_s("100\\n102", 340)
    (2.48, None)
    """
    ticks = [int(line) for line in beats.split()]
    if len(ticks) < 2 or ticks[-1] < since:
        return None
    return max(after - before for before, after in itertools.pairwise(ticks)) / _TICKS


def acquaint(left: Node, right: Node) -> dict[Node, str]:
    """Let two hosts trust each other; return what each calls the other."""
    for node in (left, right):
        node.run("list")
    status, told = left.api("POST", "/1/peers/token", {})
    assert status == 200, told
    status, joined = right.api("POST", "/1/peers/join", {"token": told["token"]})
    assert status == 200, joined
    names = {}
    for node in (left, right):
        _, known = node.api("GET", "/1/peers")
        (peer,) = known["peers"]
        names[node] = peer["name"]
    return names


class PlainRsync:
    """An rsync daemon on one end of the cable and its client on the other, as root and without encryption."""

    def __init__(self, client: Node, server: Node, address: str, directory: str) -> None:
        self._client = ["nsenter", "--target", str(client.netns_pid), "--net", "--"]
        self._address = address
        self.target = f"{directory}/to"
        os.mkdir(self.target)
        config = f"{directory}/rsyncd.conf"
        with open(config, "w", encoding="utf-8") as file:
            file.write(
                "uid = root\ngid = root\nuse chroot = no\nreverse lookup = no\n"
                f"[to]\npath = {self.target}\nread only = no\n"
            )
        self._process = subprocess.Popen(
            ["nsenter", "--target", str(server.netns_pid), "--net", "--", "rsync", "--daemon", "--no-detach",
             f"--config={config}", f"--address={address}", f"--port={_PORT}", "--log-file=/dev/null"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_until(self._answers, what="the rsync daemon")
        except AssertionError:
            self.close()
            raise

    def _answers(self) -> bool:
        listing = [*self._client, "rsync", f"rsync://{self._address}:{_PORT}/"]
        return subprocess.run(listing, capture_output=True, check=False).returncode == 0

    def close(self) -> None:
        """End the daemon."""
        self._process.terminate()
        self._process.wait()

    def send(self, source: str, name: str) -> float:
        """Copy a tree into a directory of the target, which is empty or not there; return the seconds."""
        where = f"rsync://{self._address}:{_PORT}/to/{name}/"
        return timed_ms([*self._client, *_RSYNC, f"{source}/", where]) / 1000

    @contextlib.contextmanager
    def into(self, directory: str, name: str) -> Iterator[None]:
        """Let a name of the target be a directory elsewhere."""
        point = f"{self.target}/{name}"
        os.mkdir(point)
        run("mount", "--bind", directory, point)
        try:
            yield
        finally:
            run("umount", point)
            os.rmdir(point)


class Bench:
    """One run: two hosts on a cable, LXC beside them, and what was measured."""

    def __init__(
        self, left: Node, right: Node, lxc: Lxc, guest: Guest, plain: PlainRsync, options: argparse.Namespace
    ) -> None:
        self.left, self.right = left, right
        self.lxc = lxc
        self.guest = guest
        self.plain = plain
        self.options = options
        self.names = acquaint(left, right)
        self.samples: Samples = {}

    def note(self, row: str, column: str, value: float) -> None:
        """Keep one sample."""
        self.samples.setdefault(row, {}).setdefault(column, []).append(value)

    def _make(self, name: str, megabytes: int) -> None:
        """Make a container on the left that runs, has written so much, and beats."""
        self.left.run("create", name, "--template", self.options.template, "--start")
        self.left.wait(name, "booted", 120)
        self.left.run("exec", name, "--", "sh", "-c", self._script(megabytes), timeout_s=600)
        self.left.run("stop", name)

    def _script(self, megabytes: int) -> str:
        files = max(1, megabytes // _FILE_MB)
        return _PREPARE.format(
            beat=_BEAT, install=_INSTALL_UNIT if self.guest.is_systemd else _INSTALL_SCRIPT, files=files,
            file_bytes=megabytes * _MB // files, changing=self.options.changing,
        )  # fmt: skip

    def _digest(self, node: Node, name: str) -> str:
        return node.run("exec", name, "--", "sh", "-c", _DIGEST, timeout_s=600).out

    def downtime(self) -> None:
        """Measure how long a running container is down, by its size."""
        for megabytes in self.options.size:
            column, name = f"{megabytes} MB", f"m{megabytes}"
            say(f"{column}: filling")
            self._make(name, megabytes)
            self.left.run("start", name)
            before = self._digest(self.left, name)
            theirs = [f"{name}a", f"{name}b"]
            self._fill_lxc(theirs, megabytes)
            here, there = self.left, self.right
            for turn in range(self.options.rounds):
                say(f"{column}: round {turn + 1}")
                self._migrate(here, there, name, column)
                here, there = there, here
                self._move_lxc(theirs[turn % 2], theirs[(turn + 1) % 2], column)
            after = self._digest(here, name)
            if after != before:
                raise Failed(f"{name} has other files than before: {before} {after}")
            here.run("destroy", "--yes", "--force", name)
            for one in theirs:
                self.lxc.empty(one)

    def _migrate(self, here: Node, there: Node, name: str, column: str) -> None:
        def beats(node: Node) -> str:
            done = node.run("exec", name, "--", "cat", "/root/beats", check=False)
            return done.out if done.status == 0 else ""

        _await(lambda: beats(here))
        here.run("exec", name, "--", "sh", "-c", ": >/root/beats")
        _await(lambda: beats(here))
        os.sync()
        churn = _CHURN.format(changing=self.options.changing)
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        writer = here.popen("exec", name, "--", "sh", "-c", churn, **silent)
        begin = time.perf_counter()
        (task,) = here.json("migrate", name, self.names[here], "--restart", timeout_s=600)
        whole_s = time.perf_counter() - begin
        writer.wait()
        down_s = _await(lambda: beats(there))
        report, column = task["result"], f"sysctr, {column}"
        self.note(DOWN, column, down_s)
        self.note(REPORTED, column, report["downtime_s"])
        self.note(WHOLE, column, whole_s)
        self.note(PASSES, column, len(report["passes"]))
        self.note(SENT, column, report["sent_bytes"] / _MB)

    def _fill_lxc(self, names: list[str], megabytes: int) -> None:
        self.lxc.define(names)
        self.lxc.start(names[0])
        self.guest.wait_booted(self.lxc.init_pid(names[0]))
        self.lxc.shell(names[0], self._script(megabytes))
        self.lxc.stop(names[0])

    def _move_lxc(self, old: str, new: str, column: str) -> None:
        """Do what one does without sysctr: stop, rsync to the other host, start there."""
        self.lxc.start(old)
        self.guest.wait_booted(self.lxc.init_pid(old))
        self.lxc.shell(old, ": >/root/beats")
        _await(lambda: self.lxc.shell(old, "cat /root/beats"))
        self.lxc.empty(new)
        os.sync()
        with self.plain.into(self.lxc.upper(new), new):
            begin = time.perf_counter()
            self.lxc.stop(old)
            self.plain.send(self.lxc.upper(old), new)
            self.lxc.start(new)
            whole_s = time.perf_counter() - begin
        down_s = _await(lambda: self.lxc.shell(new, "cat /root/beats"))
        self.lxc.stop(new)
        self.note(DOWN, f"LXC, {column}", down_s)
        self.note(WHOLE, f"LXC, {column}", whole_s)

    def stopped(self) -> None:
        """Measure the first pass against plain rsync, and what is sent against what the container wrote."""
        name, megabytes = "still", max(self.options.size)
        say(f"stopped, {megabytes} MB: filling")
        self._make(name, megabytes)
        here, there = self.left, self.right
        for turn in range(self.options.rounds):
            say(f"stopped: round {turn + 1}")
            self._plain(here, str(here.json("info", name)["volume"]))
            os.sync()
            (task,) = here.json("migrate", name, self.names[here], timeout_s=600)
            here, there = there, here
            report = task["result"]
            first = report["passes"][0]
            self.note(SPEED, "sysctr, first pass", first["sent_bytes"] / first["seconds"] / _MB)
            self.note(SPEED, "sysctr, whole migration", report["sent_bytes"] / report["seconds"] / _MB)
            self.note(SENT, "sysctr, stopped", report["sent_bytes"] / _MB)
        here.run("destroy", "--yes", name)

    def _plain(self, node: Node, volume: str) -> None:
        """Copy with rsync alone the largest directory of a stopped container; note what all is its own."""
        from sysctr.storage.drivers import open_driver

        driver = open_driver("overlay", node.layout.pool, node.layout.pool_run("default"))
        self.note(WRITTEN, "stopped", driver.measure(volume) / _MB)
        with driver.opened(volume) as root, shown(root) as tree:
            source = f"{tree}/root/fill"
            filled_mb = sum(entry.stat().st_size for entry in os.scandir(source)) / _MB
            os.sync()
            copied_s = self.plain.send(source, "plain")
            begin = time.perf_counter()
            run("sync", "-f", self.plain.target)
            synced_s = copied_s + time.perf_counter() - begin
        shutil.rmtree(f"{self.plain.target}/plain")
        self.note(SPEED, "plain rsync", filled_mb / copied_s)
        self.note(SPEED, "plain rsync, then sync", filled_mb / synced_s)

    def markdown(self) -> str:
        """Return the table, and the ratios that the aims are about."""
        lines = ["| what | median (least to greatest) |", "|---|---|"]
        for row, columns in self.samples.items():
            for column, values in columns.items():
                lines.append(f"| {row}, {column} | {spread(values, '').strip()} |")
        return "\n".join([*lines, "", *ratios(self.samples, self.options.size)])


def _await(beats: Callable[[], str]) -> float:
    """Wait for a beat from now on; return the longest pause there was until then."""
    since = ticks_now()
    what = "a beat of the container"
    return wait_until(lambda: longest_pause_s(beats(), since), _BEAT_DEADLINE_S, what)


def ratios(samples: Samples, sizes_mb: list[int]) -> list[str]:
    """Return what the aims are about, by medians."""

    def median(row: str, column: str) -> float:
        values = samples.get(row, {}).get(column)
        return statistics.median(values) if values else 0.0

    found = []
    for megabytes in sizes_mb:
        ours, theirs = (median(DOWN, f"{side}, {megabytes} MB") for side in ("sysctr", "LXC"))
        if ours and theirs:
            ratio = f"{ours / theirs:.2f} of LXC's (aim ≤ 0.3)"
            found.append(f"- {megabytes} MB: down for {ours:.2f} s (aim ≤ 2), {ratio}")
        # Both end when init runs there: how long its services take to come up is neither's doing.
        ours, theirs = median(REPORTED, f"sysctr, {megabytes} MB"), median(WHOLE, f"LXC, {megabytes} MB")
        if ours and theirs:
            found.append(f"- {megabytes} MB, until init runs: {ours:.2f} s, {ours / theirs:.2f} of LXC's")
    least, most = (median(DOWN, f"sysctr, {size} MB") for size in (min(sizes_mb), max(sizes_mb)))
    if least and most and len(sizes_mb) > 1:
        found.append(f"- down for the largest against the smallest: {most / least:.2f} (aim about 1)")
    for column in ("plain rsync", "plain rsync, then sync"):
        ours, theirs = median(SPEED, "sysctr, first pass"), median(SPEED, column)
        if ours and theirs:
            found.append(f"- speed of the first pass against {column}: {ours / theirs:.2f} (aim ≥ 0.8)")
    sent, written = median(SENT, "sysctr, stopped"), median(WRITTEN, "stopped")
    if sent and written:
        found.append(f"- sent against what the container wrote: {sent / written:.2f} (aim ≤ 1.1)")
    return found


def say(text: str) -> None:
    """Tell the user, apart from the table."""
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(prog="bench migrate", description=__doc__.splitlines()[0])
    result.add_argument("--rounds", type=int, default=3, help="samples of each figure (default 3)")
    result.add_argument("--only", choices=PARTS, action="append", help="only this part; may be repeated")
    result.add_argument(
        "--size", type=int, action="append", metavar="MB",
        help=f"what a container has written; may be repeated (default {', '.join(map(str, SIZES_MB))})",
    )  # fmt: skip
    result.add_argument("--changing", type=int, default=50, metavar="MB", help="of which change (default 50)")
    result.add_argument("--template", default="debian-12", help="what the containers are made of")
    result.add_argument("--templates", metavar="DIR", help="keep the built template here for the next run")
    result.add_argument("--json", metavar="FILE", help="write all samples there")
    return result


@contextlib.contextmanager
def opened(options: argparse.Namespace) -> Iterator[Bench]:
    """Make two hosts that trust each other, with one template, and LXC; leaving it takes everything back."""
    with (
        both(options.template, options.templates) as (lxc, sysctr, guest),
        InstalledNode(own_network=True) as left,
        InstalledNode(own_network=True) as right,
        tempfile.TemporaryDirectory(prefix="sb-", dir="/tmp") as directory,
    ):
        layer = sysctr.node.json("template", "show", options.template)["layer"]
        for node in (left, right):
            os.makedirs(f"{node.layout.pool}/layers", mode=0o700)
            os.chmod(node.layout.pool, 0o700)
            run("cp", "-al", f"{sysctr.node.layout.pool}/layers/{layer}", f"{node.layout.pool}/layers")
        addresses = join(left, right)
        plain = PlainRsync(left, right, addresses[right], directory)
        try:
            yield Bench(left, right, lxc, guest, plain, options)
        finally:
            plain.close()


def measure(options: argparse.Namespace) -> Bench:
    """Measure what is wanted, and take everything back."""
    options.size = options.size or list(SIZES_MB)
    with opened(options) as bench:
        try:
            for part in options.only or PARTS:
                getattr(bench, part)()
        except (Failed, AssertionError):
            for node in (bench.left, bench.right):
                say(node.logs())
            raise
        return bench


def main(arguments: list[str]) -> int:
    """Measure and print."""
    options = parser().parse_args(arguments)
    bench = measure(options)
    print(bench.markdown())
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(bench.samples, file, indent=1)
    return 0
