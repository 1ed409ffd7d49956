#!/usr/bin/env python3
"""Compares sysctr with Debian's LXC on the same rootfs, alternating, and prints a Markdown table.

    packaging/test bench --rounds 10 --json /tmp/bench.json
    packaging/test bench --only start,exec
    packaging/test bench storage            what storage costs, against the size and against the host
    packaging/test bench backup             backup and restore, against tar and its compressors
    packaging/test bench migrate            moving to another host, against LXC and against plain rsync

Needs root and Debian's packages lxc and mmdebstrap. What it makes goes away with it.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench import backups, migrate, pictures, storage, tui
from tests.bench.sides import Failed, Guest, Lxc, Sysctr, both, pss_mb, run
from tests.bench.table import Results, Row

Side = Lxc | Sysctr
PARTS = ("create", "start", "exec", "list", "kill", "many")
_ONE = "one"

CREATE = Row("create from a template (LXC: unpack a tar archive)", aim_absolute=50)
DESTROY = Row("destroy")
START = Row("start, whole command, with veth", aim=1.3)
TASK = Row("start, the daemon's task alone", aim=0.9, against=START.name)
READY = Row("systemd's main → READY", aim=0.9)
UP = Row("start command → READY")
EXEC = Row("exec /bin/true")
LIST_ONE = Row("list, 1 running")
STOP = Row("stop, clean", aim=0.3)
KILL = Row("stop --kill", aim=0.2)


def _many_rows(count: int, listed: int) -> dict[str, Row]:
    return {
        "memory_one": Row("memory of the managers, 1 running (PSS)", "MB"),
        "start": Row(f"start {count}: one command, {count} x lxc-start", aim=0.6),
        "up": Row(f"start {count} → all READY"),
        "list": Row(f"list, {count} of {count} running"),
        "memory": Row(f"memory of the managers, {count} running (PSS)", "MB"),
        "memory_each": Row("memory for one more container (PSS)", "MB", aim_absolute=0.05),
        "kill": Row(f"stop --kill of {count}"),
        "listed": Row(f"list, {count} of {listed} running", aim=0.2, aim_absolute=40),
    }


class Bench:
    """One run: both sides, the parts that are wanted, and what was measured."""

    def __init__(self, options: argparse.Namespace, lxc: Lxc, sysctr: Sysctr, guest: Guest) -> None:
        self.options = options
        self.sides: tuple[Side, ...] = (lxc, sysctr)
        self._sysctr = sysctr
        self._guest = guest
        self._many = _many_rows(options.count, options.listed)
        rows = (CREATE, DESTROY, START, TASK, READY, UP, EXEC, LIST_ONE, STOP, KILL)
        self.results = Results((*rows, *self._many.values()))

    def run(self) -> None:
        """Measure everything that is wanted."""
        wanted = self.options.only
        if wanted.intersection(("start", "exec", "list", "kill")):
            for side in self.sides:
                side.define([_ONE])
                # The first boot makes keys and ids, the first of anything fills caches: not counted.
                self._life(side, lambda _row, _value: None)
        for turn in range(self.options.rounds):
            say(f"round {turn + 1} of {self.options.rounds}")
            for side in self._in_turn(turn):
                if "create" in wanted:
                    # What the other side unpacked last must not be written out on this one's time.
                    os.sync()
                    self.results.add(CREATE.name, side.name, side.create("new"))
                    self.results.add(DESTROY.name, side.name, side.destroy("new"))
                if wanted.intersection(("start", "exec", "list", "kill")):
                    self._life(side, functools.partial(self._note, side))
        if "many" in wanted:
            for turn in range(self.options.many_rounds):
                for side in self._in_turn(turn):
                    say(f"{self.options.count} containers of {side.name}")
                    self._crowd(side)

    def _note(self, side: Side, row: Row, value: float) -> None:
        self.results.add(row.name, side.name, value)

    def _in_turn(self, turn: int) -> tuple[Side, ...]:
        return self.sides if turn % 2 == 0 else self.sides[::-1]

    def _boot(self, side: Side, name: str) -> tuple[float, float] | None:
        """Wait for a started container; return when systemd began and was done, if it is systemd."""
        pid = side.init_pid(name)
        self._guest.wait_booted(pid)
        return self._guest.boot_times_ms(pid) if self._guest.is_systemd else None

    def _life(self, side: Side, note: Callable[[Row, float], None]) -> None:
        wanted = self.options.only
        begin_ms = time.monotonic() * 1000
        started_ms = side.start(_ONE)
        booted = self._boot(side, _ONE)
        if "start" in wanted:
            note(START, started_ms)
            if side is self._sysctr:
                note(TASK, self._sysctr.last_task_ms("start"))
            if booted:
                note(READY, booted[1] - booted[0])
                note(UP, booted[1] - begin_ms)
        for _ in range(3 if "exec" in wanted else 0):
            note(EXEC, side.true(_ONE))
        for _ in range(3 if "list" in wanted else 0):
            note(LIST_ONE, side.list_all())
        if "start" in wanted:
            note(STOP, side.stop(_ONE))
        if "kill" in wanted:
            if "start" in wanted:
                side.start(_ONE)
                self._boot(side, _ONE)
            note(KILL, side.kill(_ONE))
        elif "start" not in wanted:
            side.kill(_ONE)

    def _crowd(self, side: Side) -> None:
        options, rows = self.options, self._many
        names = [f"m{number}" for number in range(options.count)]
        if not side.many_defined:
            side.define(names)
            side.many_defined = True

        def note(row: str, value: float) -> None:
            self.results.add(rows[row].name, side.name, value)

        side.start(names[0])
        self._boot(side, names[0])
        one_mb = _memory_mb(side)
        note("memory_one", one_mb)
        side.kill(names[0])
        # From half to all, since a first crowd also costs what is paid once: threads, caches, a larger heap.
        half = names[: options.count // 2]
        side.start_all(half)
        for name in half:
            self._boot(side, name)
        half_mb = _memory_mb(side)
        side.kill_all(half)

        begin_ms = time.monotonic() * 1000
        note("start", side.start_all(names))
        booted = [self._boot(side, name) for name in names]
        if booted[0]:
            note("up", max(times[1] for times in booted if times) - begin_ms)
        all_mb = _memory_mb(side)
        note("memory", all_mb)
        note("memory_each", (all_mb - half_mb) / (len(names) - len(half)))
        for _ in range(5):
            note("list", side.list_all())
        if options.listed > options.count and not side.listed_defined:
            side.define([f"l{number}" for number in range(options.listed - options.count)])
            side.listed_defined = True
        for _ in range(5 if options.listed > options.count else 0):
            note("listed", side.list_all())
        note("kill", side.kill_all(names))


def _memory_mb(side: Side) -> float:
    return sum(pss_mb(pid) for pid in side.manager_pids())


def say(text: str) -> None:
    """Tell the user, apart from the table."""
    print(text, file=sys.stderr, flush=True)


def facts() -> dict[str, object]:
    """Return what the figures depend on."""
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "lxc": run("lxc-start", "--version"),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "cgroups": "unified" if os.path.exists("/sys/fs/cgroup/cgroup.controllers") else "hybrid",
    }


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    result.add_argument("--rounds", type=int, default=10, help="samples of each figure (default 10)")
    result.add_argument(
        "--only", type=_parts, default=set(PARTS), metavar="PART,…", help=f"only some of: {', '.join(PARTS)}"
    )
    result.add_argument("--count", type=int, default=50, help="containers at once in part many (default 50)")
    result.add_argument("--listed", type=int, default=200, help="length of the longest list (default 200)")
    result.add_argument("--many-rounds", type=int, default=1, help="rounds of the part many (default 1)")
    result.add_argument("--template", default="debian-12", help="the rootfs of both (default debian-12)")
    result.add_argument("--templates", metavar="DIR", help="keep the built template here for the next run")
    result.add_argument("--json", metavar="FILE", help="write all samples there")
    return result


def _parts(text: str) -> set[str]:
    parts = set(text.split(","))
    if unknown := parts.difference(PARTS):
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(sorted(unknown))}")
    return parts


def measure(options: argparse.Namespace) -> Results:
    """Set up both sides, measure, and take everything back."""
    with both(options.template, options.templates) as (lxc, sysctr, guest):
        bench = Bench(options, lxc, sysctr, guest)
        try:
            bench.run()
        except (Failed, AssertionError):
            say(sysctr.node.logs())
            raise
        return bench.results


def main() -> int:
    """Measure and print."""
    of_its_own = {
        "storage": storage.main, "backup": backups.main, "migrate": migrate.main, "tui": tui.main,
        "pictures": pictures.main,
    }  # fmt: skip
    if sys.argv[1:2] and sys.argv[1] in of_its_own:
        return of_its_own[sys.argv[1]](sys.argv[2:])
    options = parser().parse_args()
    if os.geteuid() != 0:
        print("bench: this is not root", file=sys.stderr)
        return 1
    before = facts()
    results = measure(options)
    print(
        f"LXC {before['lxc']} and sysctr, Linux {before['kernel']}, Python {before['python']}, "
        f"{before['cores']} cores (load {before['load']:.1f}), {before['cgroups']} cgroups; "
        f"{options.template}, both on an overlay of the same tree; {options.rounds} rounds, "
        "medians (least to greatest)\n"
    )
    print(results.markdown())
    if options.json:
        text = json.dumps({"facts": before, "rounds": options.rounds, "rows": results.as_dict()}, indent=1)
        Path(options.json).write_text(f"{text}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
