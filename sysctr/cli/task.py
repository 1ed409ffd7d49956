"""Tasks: list, show, cancel."""

import sys

from sysctr import errors
from sysctr.cli.command import Command, Selected, for_each, json_option, quiet_option, words
from sysctr.cli.output import (
    duration,
    moment,
    notice,
    plain,
    print_fields,
    print_json,
    print_table,
    size,
)
from sysctr.cli.progress import finish, submit
from sysctr.cli.table import Column
from sysctr.cli.watch import print_log
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from sysctr.client import Client

_STATE_COLOURS = {"done": "32", "running": "33", "queued": "33", "failed": "31", "cancelled": "31"}
_COLUMNS = (
    Column("ID"),
    Column("KIND"),
    Column("CONTAINER", right=True),
    Column("STATE", colour=lambda state: _STATE_COLOURS.get(state, "")),
    Column("CREATED", optional=True),
    Column("TOOK", right=True),
    Column("STEP", flexible=True),
)


def _row(task: "dict[str, Any]") -> "list[str]":
    started, ended = task.get("started"), task.get("ended")
    return [
        task["id"],
        task["kind"],
        plain(task.get("container")) or "-",
        task["state"],
        moment(task.get("created")),
        duration(ended - started) if started is not None and ended is not None else "-",
        (task["error"]["message"] if task.get("error") else task.get("step")) or "-",
    ]


def _list_arguments(parser: "argparse.ArgumentParser") -> None:
    parser.add_argument(
        "--state",
        choices=("queued", "running", "done", "failed", "cancelled"),
        help="only tasks in this state",
    )
    json_option(parser)
    quiet_option(parser)


def _list(arguments: "argparse.Namespace", client: "Client") -> None:
    tasks = field(client.get(path("tasks"), {"state": arguments.state}), "tasks")
    if arguments.json:
        print_json(tasks)
    elif arguments.quiet:
        for task in tasks:
            print(task["id"])
    else:
        print_table(_COLUMNS, [_row(task) for task in tasks])


def _show_arguments(parser: "argparse.ArgumentParser") -> None:
    words(parser.add_argument("task", metavar="TASK", help="id of the task"), "tasks")
    parser.add_argument("--log", action="store_true", help="print only the log")
    json_option(parser)


def _show(arguments: "argparse.Namespace", client: "Client") -> None:
    log = path("tasks", arguments.task, "log")
    if arguments.log:
        print_log(client.stream(log), raw=False)
        return
    task = field(client.get(path("tasks", arguments.task)), "task")
    if arguments.json:
        print_json(task)
        return
    error = task.get("error") or {}
    total = task.get("total_bytes")
    print_fields(
        [
            ("id", task["id"]),
            ("kind", task["kind"]),
            ("container", plain(task.get("container"))),
            ("state", task["state"]),
            ("step", plain(task.get("step"))),
            ("progress", f"{size(task.get('progress_bytes') or 0)} of {size(total)}" if total else ""),
            ("created", moment(task.get("created"))),
            ("started", moment(task.get("started"))),
            ("ended", moment(task.get("ended"))),
            ("error", error.get("message", "")),
            ("hint", error.get("hint", "")),
            ("result", plain(task.get("result"))),
        ]
    )
    sys.stdout.flush()
    pieces = list(client.stream(log))
    if any(pieces):
        print("log:", flush=True)
        print_log(pieces, raw=False)


def _wait_arguments(parser: "argparse.ArgumentParser") -> None:
    words(parser.add_argument("tasks", metavar="TASK", nargs="+", help="id of a task"), "tasks")
    json_option(parser)
    quiet_option(parser)
    parser.set_defaults(no_wait=False)


def _wait(arguments: "argparse.Namespace", client: "Client") -> int:
    chosen = [Selected(task, task) for task in arguments.tasks]
    submitted = submit(chosen, lambda one: client.get(path("tasks", one.ref)))
    return finish(client, submitted, arguments, lambda one: f"{one.label} is done")


def _cancel_arguments(parser: "argparse.ArgumentParser") -> None:
    words(parser.add_argument("tasks", metavar="TASK", nargs="+", help="id of a task"), "tasks")


def _cancel(arguments: "argparse.Namespace", client: "Client") -> int:
    def cancel(task: str) -> None:
        known = field(client.request("DELETE", path("tasks", task)), "task")
        if known["state"] in ("done", "failed"):
            raise errors.WrongState(f"cannot cancel {task}: it has ended already, as {known['state']}")
        notice(f"asked {task} to stop; it undoes what it did")

    return for_each(arguments.tasks, cancel)


COMMANDS = {
    "task list": Command(_list_arguments, _list, examples=("sysctr task list --state running",)),
    "task show": Command(_show_arguments, _show, examples=("sysctr task show 7f3a09c1d2e4",)),
    "task wait": Command(_wait_arguments, _wait, examples=("sysctr task wait 7f3a09c1d2e4",)),
    "task cancel": Command(_cancel_arguments, _cancel, examples=("sysctr task cancel 7f3a09c1d2e4",)),
}
