"""Submitting tasks, waiting for them with a bar or plain lines, and reporting how each one ended."""

import re
import sys
import time

from sysctr import errors
from sysctr.cli.output import coloured, duration, notice, print_error, print_json, size, terminal_width
from sysctr.cli.table import cut, neutralise
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
_BAR_CELLS = 20
_ENDED = ("done", "failed", "cancelled")


class Submitted:
    """A task that was started for one object, or the error that came instead."""

    __slots__ = ("error", "label", "task")

    def __init__(
        self, label: str, task: "dict[str, Any] | None" = None, error: "errors.SysctrError | None" = None
    ) -> None:
        self.label = label
        self.task = task
        self.error = error

    def answer(self) -> "dict[str, Any]":
        """Return what --json prints for it."""
        if self.task is not None:
            return self.task
        return {"error": self.error.as_dict()} if self.error is not None else {}


def submit(
    selected: "Sequence[Selected]", start: "Callable[[Selected], dict[str, Any]]"
) -> "list[Submitted]":
    """Start a task for each; one that cannot be started does not keep the others from starting."""
    submitted = []
    for one in selected:
        try:
            submitted.append(Submitted(one.label, field(start(one), "task")))
        except errors.NoDaemon:
            raise
        except errors.SysctrError as error:
            submitted.append(Submitted(one.label, error=error))
    return submitted


def finish(
    client: "Client",
    submitted: "Sequence[Submitted]",
    arguments: "argparse.Namespace",
    done: "Callable[[Submitted], str]",
    *,
    single: bool = False,
) -> int:
    """Wait for the tasks, report each, and return the worst exit code.

    `done` gives the line printed for a task that ended well; with -q it is the container's id instead.
    """
    worst = 0
    display = _display(arguments)
    for number, one in enumerate(submitted):
        if one.task is not None and not arguments.no_wait:
            if len(submitted) > 1:
                display.part = f"{number + 1}/{len(submitted)}"
            one.task = _wait(client, one, display)
            one.error = failure(one.task, one.label)
        if one.error is not None:
            print_error(_naming(one) if len(submitted) > 1 else one.error)
            worst = max(worst, one.error.exit_code)
        elif not arguments.json:
            print(_line(one, arguments, done))
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


def _line(one: Submitted, arguments: "argparse.Namespace", done: "Callable[[Submitted], str]") -> str:
    assert one.task is not None
    if arguments.no_wait:
        return str(one.task["id"])
    if arguments.quiet:
        container = one.task.get("container")
        return str(container if container is not None else one.label)
    return neutralise(done(one))


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
        while task["state"] not in _ENDED:
            interval_s = display.interval_s
            task = field(client.get(where, {"timeout": interval_s}, timeout_s=interval_s + 60), "task")
            if task["state"] not in _ENDED:
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


class _Lines:
    """Progress for a pipe or a log: a line when the step changes. Short tasks print nothing."""

    interval_s = _LINES_INTERVAL_S

    def __init__(self, *, silent: bool) -> None:
        self.silent = silent
        self.part = ""
        self._last: tuple[str, str] = ("", "")

    def show(self, label: str, task: "dict[str, Any]") -> None:
        step = task.get("step") or (task["state"] if task["state"] != "running" else "")
        if step and not self.silent and self._last != (label, step):
            notice(f"{label}: {step}")
        self._last = (label, step)

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
        line = bar_line(label, task.get("step") or _doing(task), done, total, self._rate(done))
        if self.part:
            line = f"[{self.part}] {line}"
        # One cell is left free: a full line would wrap, and the next \r would return to its second half.
        line = cut(line, (terminal_width(sys.stderr) or 80) - 1)
        sys.stderr.write(f"\r{line}\x1b[K" if coloured(sys.stderr) else f"\r{line}")
        sys.stderr.flush()
        self._shown = True

    def _rate(self, done: int) -> float:
        now = time.monotonic()
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


def bar_line(label: str, step: str, done: int, total: int, rate: float) -> str:
    """Return one line of progress.

    >>> bar_line("demo", "unpack", 50 * 1024**2, 100 * 1024**2, 10 * 1024**2)
    'demo: unpack  [##########----------]  50%  50M of 100M  10M/s  5s left'
    >>> bar_line("demo", "boot", 0, 0, 0.0)
    'demo: boot'
    """
    parts = [f"{neutralise(label)}: {neutralise(step)}"]
    if total > 0:
        share = min(1.0, done / total)
        full = int(share * _BAR_CELLS)
        parts += [
            f"[{'#' * full}{'-' * (_BAR_CELLS - full)}]",
            f"{share:3.0%}",
            f"{size(done)} of {size(total)}",
        ]
    elif done:
        parts.append(size(done))
    if rate > 0:
        parts.append(f"{size(int(rate))}/s")
    if rate > 0 and total > done:
        parts.append(f"{duration(int((total - done) / rate))} left")
    return "  ".join(parts)


def _display(arguments: "argparse.Namespace") -> _Lines:
    if arguments.quiet or arguments.json or not sys.stderr.isatty():
        return _Lines(silent=arguments.quiet or arguments.json)
    return _Bar()
