"""Following what happens: logs and events."""

import json
import re
import sys

from sysctr import errors
from sysctr.cli.command import Command, json_option, one_container
from sysctr.cli.output import moment, plain
from sysctr.cli.table import neutralise
from sysctr.client import path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator
    from typing import Any

    from sysctr.client import Client

# Colours and cursor movements of a boot, which say nothing once the text is a log.
_SEQUENCES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]{0,256}(?:\x07|\x1b\\)|[()][0-9A-Z]|[=>78c])"
)
_TIME_KEYS = ("time", "at", "when")


def readable(line: str) -> str:
    """Return one line of a console as text: colours and movements dropped, what is left made harmless.

    >>> readable("[\\x1b[0;32m  OK  \\x1b[0m] Started\\r")
    '[  OK  ] Started'
    """
    return neutralise(_SEQUENCES.sub("", line).rstrip("\r").expandtabs())


def readable_lines(pieces: "Iterable[bytes]") -> "Iterator[str]":
    """Yield the readable lines of a stream, also the last one if it has no end."""
    pending = b""
    for piece in pieces:
        pending += piece
        *complete, pending = pending.split(b"\n")
        for line in complete:
            yield readable(line.decode("utf-8", "replace"))
        # A console that never ends its line would grow without end.
        if len(pending) > 65536:
            yield readable(pending.decode("utf-8", "replace"))
            pending = b""
    if pending:
        yield readable(pending.decode("utf-8", "replace"))


def print_log(pieces: "Iterable[bytes]", *, raw: bool) -> None:
    """Print a log: made harmless on a terminal, byte for byte into a pipe or if asked."""
    if raw or not sys.stdout.isatty():
        for piece in pieces:
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        return
    for line in readable_lines(pieces):
        print(line, flush=True)


def _logs_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is written from now on")
    parser.add_argument("--kind", metavar="K", default="console", help="which log (console)")
    parser.add_argument(
        "--raw", action="store_true", help="every byte as it is, on a terminal too (dangerous)"
    )


def _logs(arguments: "argparse.Namespace", client: "Client") -> None:
    query = {"kind": arguments.kind, "follow": True if arguments.follow else None}
    print_log(client.stream(path("containers", arguments.container, "logs"), query), raw=arguments.raw)
    if arguments.follow:
        raise _cut_off(f"the log of {arguments.container}")


def _cut_off(what: str) -> errors.NoDaemon:
    return errors.NoDaemon(f"cannot follow {what} any longer: the daemon was stopped", "run it again")


def _events_arguments(parser: "argparse.ArgumentParser") -> None:
    json_option(parser)


def _events(arguments: "argparse.Namespace", client: "Client") -> None:
    for kind, data in client.events():
        if arguments.json:
            print_event(kind, data)
        else:
            print(event_line(kind, data), flush=True)
    raise _cut_off("the events")


def print_event(kind: str, data: "Any") -> None:
    """Print an event as one line of JSON."""
    value = data if isinstance(data, dict) else {"data": data}
    print(json.dumps({"event": kind, **value}), flush=True)


def event_line(kind: str, data: "Any") -> str:
    """Return an event as a line for people: time, kind, and what it is about.

    >>> event_line("state", {"container": 101, "state": "running", "time": None})
    'state container=101 state=running'
    >>> event_line("task", {"task": {"id": "7f", "kind": "stop", "subject": "web (101)", "state": "done"}})
    'task task=stop id=7f subject="web (101)" state=done'
    """
    if not isinstance(data, dict):
        return neutralise(f"{kind} {data}")
    if isinstance(data.get("task"), dict):
        # What a task has beyond this is for `task show`.
        task = data["task"]
        error = (task.get("error") or {}).get("message")
        kept = {key: task.get(key) for key in ("id", "subject", "state", "step")}
        data = {**data, "task": task.get("kind"), **kept, "error": error}
    stamp = next((data[key] for key in _TIME_KEYS if isinstance(data.get(key), int | float)), None)
    parts = [] if stamp is None else [moment(stamp)]
    parts.append(str(data.get("kind", kind)) if kind == "message" else kind)
    for name, value in data.items():
        if name not in (*_TIME_KEYS, "kind") and value not in (None, "", [], {}):
            shown = plain(value)
            # With its quotes a value of several words is still one, for cut and for the eye.
            parts.append(f"{name}={json.dumps(shown, ensure_ascii=False) if ' ' in shown else shown}")
    return neutralise(" ".join(parts))


COMMANDS = {
    "logs": Command(_logs_arguments, _logs, examples=("sysctr logs demo", "sysctr logs -f demo")),
    "events": Command(
        _events_arguments, _events, examples=("sysctr events", "sysctr events --json | jq .event")
    ),
}
