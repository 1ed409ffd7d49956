"""Replicas of containers on other hosts, brought up to date by themselves, and what to do after a loss."""

import time

from sysctr import errors
from sysctr.cli.command import Command, Selected, task_options, words
from sysctr.cli.migrate import known_peer, sending_fields, sending_options
from sysctr.cli.output import duration, print_json, print_table, size
from sysctr.cli.progress import Submitted, finish, submit
from sysctr.cli.table import Column
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from sysctr.client import Client

_COLUMNS = (
    Column("CONTAINER", flexible=True, narrowest=12),
    Column("WAY", flexible=True, narrowest=10),
    Column("EVERY", right=True),
    Column("LAST STATE", right=True),
    Column("ID", optional=True),
    Column("PROBLEM", flexible=True, narrowest=20, optional=True),
)


def _span(text: str) -> float:
    from sysctr.config.schedule import parse_span
    from sysctr.errors import ConfigError

    try:
        return parse_span(text)
    except ConfigError as error:
        import argparse

        raise argparse.ArgumentTypeError(error.message) from error


def _replicate_arguments(parser: "argparse.ArgumentParser") -> None:
    parser.usage = (
        "sysctr replicate CT PEER [--every TIME] [options]\n"
        "       sysctr replicate CT --stop [--force]\n"
        "       sysctr replicate --list [--json]"
    )
    words(parser.add_argument("container", metavar="CT", nargs="?", help="id or name"), "containers")
    words(parser.add_argument("peer", metavar="PEER", nargs="?", help="name of the other host"), "peers")
    parser.add_argument(
        "--every", metavar="TIME", type=_span, help="how often: 5m, 1h, 1d (default: 15m)"
    )
    sending_options(parser)
    parser.add_argument("--stop", action="store_true", help="end the replication and remove the replica")
    parser.add_argument(
        "--force", action="store_true", help="with --stop: even if the other host cannot be told"
    )
    parser.add_argument("--list", action="store_true", help="list the replicas, there and here")
    task_options(parser)


def _replicate(arguments: "argparse.Namespace", client: "Client") -> int:
    if arguments.list:
        _list(arguments, client)
        return 0
    if arguments.container is None or (arguments.peer is None) != arguments.stop:
        raise errors.UsageError(
            "cannot replicate: name a container and the other host, or a container and --stop",
            "`sysctr replicate --list` shows what there is",
        )
    one = Selected(arguments.container, arguments.container)
    if arguments.stop:
        body: dict[str, Any] = {"force": True} if arguments.force else {}
        where = path("containers", one.ref, "replicate")
        started = submit([one], lambda _one: client.request("DELETE", where, body))
        return finish(client, started, arguments, _stopped, single=True)
    body = {
        "peer": known_peer(client, arguments.peer, "replicate", [one]), **sending_fields(arguments),
        **({} if arguments.every is None else {"every_s": arguments.every}),
    }  # fmt: skip
    started = submit([one], lambda ct: client.post(path("containers", ct.ref, "replicate"), body))
    return finish(client, started, arguments, _done, single=True)


def _stopped(one: Submitted) -> str:
    return f"{one.label} has no replica any more"


def _done(one: Submitted) -> str:
    result = (one.task or {}).get("result") or {}
    return (
        f"replicated {one.label} to {result.get('peer')}: {size(result.get('sent_bytes'))} sent in "
        f"{result.get('seconds', 0):.1f}s; it is brought up to date by itself from now on"
    )


def _list(arguments: "argparse.Namespace", client: "Client") -> None:
    found = field(client.get(path("replicas")), "replicas")
    if arguments.json:
        print_json(found)
        return
    now_s = time.time()
    print_table(_COLUMNS, [_row(one, now_s) for one in found], if_empty="no replicas")


def _row(one: "dict[str, Any]", now_s: float) -> "list[str]":
    last = one.get("last")
    problem = str(one.get("error") or "-")
    if one.get("promoted"):
        problem = "promoted: it is a container here"
    return [
        f"{one['name']} ({one['container']})",
        f"to {one['peer']}" if one["role"] == "source" else f"from {one['peer']}",
        duration(one.get("every_s")) if one.get("every_s") else "-",
        f"{duration(int(max(0, now_s - last)))} ago" if last else "none yet",
        str(one["id"]),
        problem,
    ]


def _promote_arguments(parser: "argparse.ArgumentParser") -> None:
    parser.add_argument("replica", metavar="CT", help="name of the container, or its number here")
    parser.add_argument(
        "--i-fenced-it", action="store_true", dest="fenced",
        help="the other host does not answer, and you have made sure that it does not run the container: "
        "it is off, or cut off",
    )  # fmt: skip
    parser.add_argument("--start", action="store_true", help="start it at once")
    task_options(parser)


def _promote(arguments: "argparse.Namespace", client: "Client") -> int:
    body = {name: True for name in ("fenced", "start") if getattr(arguments, name)}
    one = Selected(arguments.replica, arguments.replica)
    started = submit([one], lambda ct: client.post(path("replicas", ct.ref, "promote"), body))

    def done(submitted: Submitted) -> str:
        result = (submitted.task or {}).get("result") or {}
        taken = result.get("state")
        ago = f", as it was {duration(int(max(0, time.time() - taken)))} ago" if taken else ""
        return f"promoted {result.get('name')} ({result.get('id')}): it is a container of this host now{ago}"

    return finish(client, started, arguments, done, single=True)


COMMANDS = {
    "replicate": Command(
        _replicate_arguments,
        _replicate,
        more=(
            "The first run sends all of it, each later one what has changed; the container goes on and is",
            "paused as for a snapshot. What counts over there is the last state that came completely. Its",
            "snapshots, and mount points with backup=no, stay here. While a container has a replica, it is",
            "started only after the other host was asked whether it was promoted.",
            "",
        ),
        examples=(
            "sysctr replicate web node2 --every 15m",
            "sysctr replicate --list",
            "sysctr replicate web --stop",
        ),
    ),
    "promote": Command(
        _promote_arguments,
        _promote,
        more=(
            "For the day on which the other host is lost. While that answers, this is refused: migrate it.",
            "When it comes back, it finds out that the container is here, and does not start its own.",
            "",
        ),
        examples=("sysctr promote web --i-fenced-it --start",),
    ),
}

