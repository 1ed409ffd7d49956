"""Submitting tasks, waiting for them with a bar or plain lines, and reporting how each one ended."""

import functools
import re
import sys
import time

from sysctr import errors
from sysctr.cli.output import coloured, duration, notice, print_error, print_json, size, terminal_width
from sysctr.cli.table import cut, neutralise, width
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from typing import Any

    from sysctr.cli.command import Selected
    from sysctr.client import Client

# How long the daemon holds a question for a task's end before it answers with the state so far.
_BAR_INTERVAL_S = 0.2
_LINES_INTERVAL_S = 1.0
# How often a log is told of a step of which only the figures change.
_FIGURES_INTERVAL_S = 60.0
_FIGURE = re.compile(r"\d ?(?:[KMGT]?i?B?/s|[KMGT]?i?B\b|[KMGT]\b|s\b|%)")
_ASIDE = re.compile(r" \([^()]*\)")
_BAR_CELLS = 20
_NARROWEST_STEP = 12
# The states in which a task stays.
ENDED = ("done", "failed", "cancelled")


class Submitted:
    """A task that was started for one object, or the error that came instead."""

    __slots__ = ("_start", "error", "label", "task")

    def __init__(self, label: str, start: "Callable[[], dict[str, Any]]") -> None:
        self.label = label
        self.task: dict[str, Any] | None = None
        self.error: errors.SysctrError | None = None
        self._start = start

    @property
    def begun(self) -> bool:
        """Whether its turn came."""
        return self.task is not None or self.error is not None

    def begin(self) -> None:
        """Start the task, unless that was tried already."""
        if self.begun:
            return
        try:
            self.task = field(self._start(), "task")
        except errors.NoDaemon:
            raise
        except errors.SysctrError as error:
            self.error = error

    def answer(self) -> "dict[str, Any]":
        """Return what --json prints for it."""
        if self.task is not None:
            return self.task
        return {"error": self.error.as_dict()} if self.error is not None else {}


def submit(
    selected: "Sequence[Selected]",
    start: "Callable[[Selected], dict[str, Any]]",
    *,
    in_turn: bool = False,
) -> "list[Submitted]":
    """Start a task for each; one that cannot be started does not keep the others from starting.

    With `in_turn` nothing is started yet: `finish` starts each when the one before it has ended.
    """
    submitted = [Submitted(one.label, functools.partial(start, one)) for one in selected]
    for one in submitted if not in_turn else ():
        one.begin()
    return submitted


def finish(
    client: "Client",
    submitted: "Sequence[Submitted]",
    arguments: "argparse.Namespace",
    done: "Callable[[Submitted], str | list[str]]",
    *,
    single: bool = False,
    explain: "Callable[[Submitted], errors.SysctrError | None]" = lambda one: one.error,
) -> int:
    """Wait for the tasks, report each, and return the worst exit code.

    `done` gives what is printed for a task that ended well, with -q it is the container's id instead; and
    `explain` the error that is told for one that did not.
    """
    worst = 0
    display = _display(arguments)
    for number, one in enumerate(submitted):
        one.begin()
        if one.task is not None and not arguments.no_wait:
            if len(submitted) > 1:
                display.part = f"{number + 1}/{len(submitted)}"
            try:
                one.task = _wait(client, one, display)
            except Detached:
                if left := [other.label for other in submitted if not other.begun]:
                    notice(f"not begun: {', '.join(left)}")
                raise
            one.error = failure(one.task, one.label)
        if one.error is not None:
            one.error = explain(one) or one.error
            print_error(_naming(one) if len(submitted) > 1 else one.error)
            worst = max(worst, one.error.exit_code)
        elif not arguments.json:
            for line in _lines(one, arguments, done):
                print(neutralise(line), flush=True)
    if arguments.json:
        answers = [one.answer() for one in submitted]
        print_json(answers[0] if single and answers else answers)
    return worst


def _naming(one: Submitted) -> errors.SysctrError:
    """Return the error with the name that the user knows, where several could be meant."""
    error = one.error
    assert error is not None
    if one.label in re.split(r"[: ()]+", error.message):
        return error
    return errors.SysctrError(f"{one.label}: {error.message}", error.hint)


def _lines(
    one: Submitted, arguments: "argparse.Namespace", done: "Callable[[Submitted], str | list[str]]"
) -> "list[str]":
    assert one.task is not None
    if arguments.no_wait:
        return [str(one.task["id"])]
    if arguments.quiet:
        container = one.task.get("container")
        return [str(container if container is not None else one.label)]
    said = done(one)
    return [said] if isinstance(said, str) else said


def failure(task: "dict[str, Any]", label: str) -> "errors.SysctrError | None":
    """Return the error with which a task ended, or None if it ended well."""
    if task["state"] == "done":
        return None
    if task.get("error"):
        return errors.from_dict(task["error"])
    return errors.SysctrError(
        f"cannot {task['kind']} {label}: the task was {task['state']}", f"see `sysctr task show {task['id']}`"
    )


def _wait(client: "Client", one: Submitted, display: "_Lines") -> "dict[str, Any]":
    task = one.task
    assert task is not None
    where = path("tasks", task["id"], "wait")
    try:
        while task["state"] not in ENDED:
            interval_s = display.interval_s
            task = field(client.get(where, {"timeout": interval_s}, timeout_s=interval_s + 60), "task")
            if task["state"] not in ENDED:
                display.show(one.label, task)
    except KeyboardInterrupt:
        display.clear()
        # The container is the daemon's work, not ours: leaving does not undo it.
        print(file=sys.stderr)
        notice(f"no longer waiting: the task goes on (`sysctr task show {task['id']}`)")
        notice(f"hint: cancel it with `sysctr task cancel {task['id']}`")
        raise Detached from None
    finally:
        display.clear()
    return task


class Detached(errors.SysctrError):
    """The user stopped waiting; everything was said already."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("")


def wording(step: str) -> str:
    """Return a step without its figures, which change from second to second.

    >>> wording("copying, pass 2, 41 MB/s, 1.2 MB/s change, about 0.8 s down")
    'copying, pass 2'
    >>> wording("copying, pass 3 (50.1 MB in the last one, 41 MB/s)")
    'copying, pass 3'
    """
    plain = _ASIDE.sub(lambda aside: "" if _FIGURE.search(aside[0]) else aside[0], step)
    return ", ".join(part for part in plain.split(", ") if not _FIGURE.search(part))


class _Lines:
    """Progress for a pipe or a log: a line when the step changes. Short tasks print nothing.

    Where only the figures in a step change there is a line a minute.
    """

    interval_s = _LINES_INTERVAL_S

    def __init__(self, *, silent: bool) -> None:
        self.silent = silent
        self.part = ""
        self._last: tuple[str, str] = ("", "")
        self._again_s = 0.0

    def show(self, label: str, task: "dict[str, Any]") -> None:
        step = task.get("step") or (task["state"] if task["state"] != "running" else "")
        now, said = time.monotonic(), (label, wording(step) or step)
        if step and not self.silent and (self._last != said or now >= self._again_s > 0):
            notice(f"{label}: {step}")
            self._again_s = now + _FIGURES_INTERVAL_S if said[1] != step else 0.0
        self._last = said

    def clear(self) -> None:
        pass


class _Bar(_Lines):
    """Progress for a terminal: one line that is written over."""

    interval_s = _BAR_INTERVAL_S

    def __init__(self) -> None:
        super().__init__(silent=False)
        self._shown = False
        self._samples: list[tuple[float, int]] = []

    def show(self, label: str, task: "dict[str, Any]") -> None:
        done, total = task.get("progress_bytes") or 0, task.get("total_bytes") or 0
        if self._last != (label, ""):
            self._samples = []
            self._last = (label, "")
        part = f"[{self.part}] " if self.part else ""
        # One cell is left free: a full line would wrap, and the next \r would return to its second half.
        cells = (terminal_width(sys.stderr) or 80) - 1
        step = task.get("step") or _doing(task)
        line = part + bar_line(label, step, done, total, self._rate(done), cells - len(part))
        line = cut(line, cells)
        sys.stderr.write(f"\r{line}\x1b[K" if coloured(sys.stderr) else f"\r{line}")
        sys.stderr.flush()
        self._shown = True

    def _rate(self, done: int) -> float:
        now = time.monotonic()
        # A task that begins with another part counts from nothing again.
        if self._samples and done < self._samples[-1][1]:
            self._samples = []
        self._samples = [*self._samples[-24:], (now, done)]
        first_s, first = self._samples[0]
        return (done - first) / (now - first_s) if now > first_s and done > first else 0.0

    def clear(self) -> None:
        if self._shown:
            erase = (
                "\r\x1b[K"
                if coloured(sys.stderr)
                else "\r" + " " * ((terminal_width(sys.stderr) or 80) - 1) + "\r"
            )
            sys.stderr.write(erase)
            sys.stderr.flush()
        self._shown = False


def _doing(task: "dict[str, Any]") -> str:
    return str(task["kind"] if task["state"] == "running" else task["state"])


def bar_line(
    label: str, step: str, done: int, total: int, rate: float, cells: "int | None" = None
) -> str:
    """Return one line of progress. Where it has too few cells the bar goes first, then the end of the step.

    >>> bar_line("demo", "unpack", 50 * 1024**2, 100 * 1024**2, 10 * 1024**2)
    'demo: unpack  [##########----------]  50%  50M of 100M  10M/s  5s left'
    >>> bar_line("demo", "boot", 0, 0, 0.0)
    'demo: boot'
    >>> bar_line("demo", "copying, pass 2, 9 MB/s", 50 * 1024**2, 100 * 1024**2, 10 * 1024**2, 65)
    'demo: copying, pass 2, 9 MB/s  50%  50M of 100M  10M/s  5s left'
    """
    label, step = neutralise(label), neutralise(step)
    bar, figures = "", []
    if total > 0:
        share = min(1.0, done / total)
        full = int(share * _BAR_CELLS)
        bar = f"[{'#' * full}{'-' * (_BAR_CELLS - full)}]"
        figures += [f"{share:3.0%}", f"{size(done)} of {size(total)}"]
    elif done:
        figures.append(size(done))
    if rate > 0:
        figures.append(f"{size(int(rate))}/s")
    if rate > 0 and total > done:
        figures.append(f"{duration(int((total - done) / rate))} left")
    line = "  ".join([f"{label}: {step}", *([bar] if bar else []), *figures])
    if cells is not None and width(line) > cells:
        rest = "  ".join(figures)
        room = cells - width(f"{label}:   ") - width(rest)
        line = "  ".join([f"{label}: {cut(step, max(room, _NARROWEST_STEP))}", *figures])
    return line


def _display(arguments: "argparse.Namespace") -> _Lines:
    if arguments.quiet or arguments.json or not sys.stderr.isatty():
        return _Lines(silent=arguments.quiet or arguments.json)
    return _Bar()
