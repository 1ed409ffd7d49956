"""Snapshots of containers: take, list, delete, roll back, and what changed since."""

import sys
import time

from sysctr import errors
from sysctr.cli.command import Command, Selected, json_option, one_container, select, task_options, words
from sysctr.cli.output import duration, moment, notice, print_json, print_table
from sysctr.cli.progress import Submitted, finish, submit
from sysctr.cli.table import Column, neutralise
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from sysctr.client import Client

_COLUMNS = (
    Column("SNAPSHOT", flexible=True, narrowest=20),
    Column("AGE", right=True),
    Column("CREATED", optional=True),
    Column("EXPIRES", optional=True),
    Column("DESCRIPTION", flexible=True, narrowest=10),
)
_NOW = "now"


def _snapshot_arguments(parser: "argparse.ArgumentParser") -> None:
    action = parser.add_argument(
        "words", metavar="CT [NAME]", nargs="*",
        help="id or name of a container, and the snapshot's name (default: snap- and the time); with --all "
        "or --tag the name alone",
    )  # fmt: skip
    words(action, "containers")
    parser.add_argument("--all", action="store_true", help="all containers")
    parser.add_argument("--tag", metavar="T", help="all containers with this tag")
    parser.add_argument("--description", metavar="TEXT", help="one line for people")
    parser.add_argument(
        "--expires", metavar="TIME", help="delete it after this time: 30m, 12h, 7d, 4w (default: never)"
    )
    task_options(parser)


def _snapshot(arguments: "argparse.Namespace", client: "Client") -> int:
    by_rule = arguments.all or arguments.tag is not None
    least = 0 if by_rule else 1
    if not least <= len(arguments.words) <= least + 1:
        raise errors.UsageError(
            "cannot tell what to snapshot: give a container and a name, or --all or --tag T and a name",
            "several containers by name: one command for each",
        )
    arguments.containers = arguments.words[:least]
    name = arguments.words[least] if len(arguments.words) > least else None
    body = {"name": name, "expires": arguments.expires}
    if arguments.description is not None:
        body["description"] = arguments.description
    selected = select(client, arguments)
    if not selected and not arguments.quiet:
        notice("nothing to snapshot")
    started = submit(selected, lambda one: client.post(path("containers", one.ref, "snapshots"), body))

    def done(one: Submitted) -> str:
        result = _result(one)
        pause = result.get("pause_ms")
        paused = f", paused for {pause:g} ms" if pause is not None else ""
        return f"took snapshot {result.get('snapshot', '')} of {one.label}{paused}"

    return finish(client, started, arguments, done)


def _result(one: Submitted) -> "dict[str, Any]":
    result = (one.task or {}).get("result")
    return result if isinstance(result, dict) else {}


def _snapshots_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    json_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print names only")


def _snapshots(arguments: "argparse.Namespace", client: "Client") -> None:
    answer = client.get(path("containers", arguments.container, "snapshots"))
    found = field(answer, "snapshots")
    if arguments.json:
        print_json({"snapshots": found, "parent": answer.get("parent", "")})
    elif arguments.quiet:
        for one in found:
            print(one["name"])
    else:
        now_s = time.time()
        by_name = {one["name"]: one for one in found}
        rows = []
        for depth, name in tree(found, answer.get("parent", "")):
            one = by_name.get(name)
            shown = f"{'  ' * depth}{name}" if one is not None else f"{'  ' * depth}{_NOW}  <- you are here"
            rows.append([shown, *(_cells(one, now_s) if one is not None else ("", "", "", ""))])
        print_table(_COLUMNS, rows)


def tree(
    found: "list[dict[str, Any]]", parent: str, *, every_level: bool = False
) -> "list[tuple[int, str]]":
    """Return depth and name of each snapshot below the one it goes back to; the present state is "".

    A line of only children is not indented unless `every_level` is, so that a long history stays readable.

    >>> tree([{"name": "a", "parent": ""}, {"name": "b", "parent": "a"}, {"name": "c", "parent": "a"}], "b")
    [(0, 'a'), (1, 'b'), (1, ''), (1, 'c')]
    """
    known = {one["name"] for one in found}
    children: dict[str, list[str]] = {}
    for one in [*found, {"name": "", "parent": parent}]:
        above = one["parent"] if one["parent"] in known and one["parent"] != one["name"] else None
        children.setdefault("/" if above is None else above, []).append(one["name"])
    lines = []
    # Without recursion: a history may be hundreds of snapshots deep.
    waiting = [(0, name) for name in reversed(children.get("/", []))]
    while waiting:
        depth, name = waiting.pop()
        lines.append((depth, name))
        below = children.get(name, []) if name else []
        deeper = depth + (every_level or len(below) > 1)
        waiting += [(deeper, child) for child in reversed(below)]
    return lines


def _cells(one: "dict[str, Any]", now_s: float) -> "tuple[str, str, str, str]":
    text = f"damaged: {one['error']}" if one.get("error") else str(one.get("description") or "")
    expires = one.get("expires")
    return (
        duration(int(max(0, now_s - one["created"]))),
        moment(one["created"]),
        moment(expires) if expires else "-",
        text,
    )


def _delsnapshot_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    action = parser.add_argument("names", metavar="NAME", nargs="*", help="name of a snapshot")
    words(action, "snapshots")
    parser.add_argument("--all", action="store_true", help="every snapshot of the container")
    task_options(parser)


def _delsnapshot(arguments: "argparse.Namespace", client: "Client") -> int:
    if arguments.all == bool(arguments.names):
        raise errors.UsageError(
            f"cannot delete snapshots of {arguments.container}: give names, or --all",
            f"`sysctr snapshots {arguments.container}` shows what there is",
        )
    body = {"names": list(dict.fromkeys(arguments.names)), "all": arguments.all}
    where = path("containers", arguments.container, "snapshots")
    chosen = [Selected(arguments.container, arguments.container)]
    started = submit(chosen, lambda _: client.request("DELETE", where, body))

    def done(one: Submitted) -> str:
        names = _result(one).get("snapshots") or []
        return f"deleted {', '.join(names) if len(names) <= 5 else f'{len(names)} snapshots'} of {one.label}"

    return finish(client, started, arguments, done, single=True)


def _rollback_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    words(parser.add_argument("name", metavar="NAME", help="name of the snapshot"), "snapshots")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    task_options(parser)


def _rollback(arguments: "argparse.Namespace", client: "Client") -> int:
    ref = arguments.container
    if not arguments.yes:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise errors.UsageError(
                "cannot roll back without asking: there is no terminal to ask on", "add --yes"
            )
        if not _confirmed(client, ref, arguments.name):
            return 1
    chosen = [Selected(ref, ref)]
    body = {"snapshot": arguments.name}
    started = submit(chosen, lambda _: client.post(path("containers", ref, "rollback"), body))

    def done(one: Submitted) -> str:
        result = _result(one)
        for note in result.get("notes") or ():
            notice(f"note: {note}")
        again = " and started it again" if result.get("started") else ""
        return f"rolled {one.label} back to {arguments.name}{again}"

    return finish(client, started, arguments, done, single=True)


def _confirmed(client: "Client", ref: str, wanted: str) -> bool:
    container = field(client.get(path("containers", ref)), "container")
    found = field(client.get(path("containers", ref, "snapshots")), "snapshots")
    chosen = next((one for one in found if one["name"] == wanted), None)
    # Nobody should type a name to be told then that it was in vain.
    if chosen is None:
        raise errors.NotFound(
            f"cannot roll back {ref}: there is no snapshot {wanted}", f"`sysctr snapshots {ref}` lists them"
        )
    if container.get("protected"):
        raise errors.Refused(
            f"cannot roll back {ref}: it is protected", f"`sysctr protect --off {ref}` first"
        )
    name, now_s = container["name"], time.time()
    running = ", which is running and is killed for it," if container["state"] != "stopped" else ""
    notice(
        f"this brings {name} ({container['id']}){running} back to {wanted}, "
        f"{duration(int(now_s - chosen['created']))} old, with the configuration of then"
    )
    newest = max(found, key=lambda one: one["created"])
    notice(
        f"what was written in the last {duration(int(now_s - newest['created']))}, after the newest snapshot "
        f"({newest['name']}), is lost"
    )
    print("type its name to go on: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip() == name:
        return True
    notice(f"not rolled back: {name}")
    return False


def _diff_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    action = parser.add_argument(
        "snapshot", metavar="SNAPSHOT", nargs="?", help="compare with this one (default: with the template)"
    )
    words(action, "snapshots")
    task_options(parser)


def _diff(arguments: "argparse.Namespace", client: "Client") -> int:
    ref = arguments.container
    body = {"snapshot": arguments.snapshot}
    started = submit([Selected(ref, ref)], lambda _: client.post(path("containers", ref, "diff"), body))

    def done(one: Submitted) -> str:
        result = _result(one)
        for letter, name in result.get("changes") or ():
            print(f"{letter} {neutralise(name)}")
        counts = result.get("counts") or {}
        more = ", of which the first are shown" if result.get("truncated") else ""
        return (
            f"since {result.get('before')}: {counts.get('A', 0)} added, {counts.get('M', 0)} modified, "
            f"{counts.get('D', 0)} deleted, {counts.get('T', 0)} of another type{more}"
        )

    return finish(client, started, arguments, done, single=True)


COMMANDS = {
    "snapshot": Command(
        _snapshot_arguments,
        _snapshot,
        examples=(
            "sysctr snapshot web",
            'sysctr snapshot web before-upgrade --description "Debian 12 to 13" --expires 7d',
            "sysctr snapshot --tag prod nightly",
        ),
    ),
    "snapshots": Command(_snapshots_arguments, _snapshots, examples=("sysctr snapshots web",)),
    "delsnapshot": Command(
        _delsnapshot_arguments,
        _delsnapshot,
        examples=("sysctr delsnapshot web before-upgrade", "sysctr delsnapshot web --all"),
    ),
    "rollback": Command(
        _rollback_arguments,
        _rollback,
        examples=("sysctr rollback web before-upgrade", "sysctr rollback web before-upgrade --yes"),
    ),
    "diff": Command(_diff_arguments, _diff, examples=("sysctr diff web", "sysctr diff web before-upgrade")),
}
