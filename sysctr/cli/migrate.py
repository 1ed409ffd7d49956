"""Moving containers to another host and copying them there, and what of it is on its way or in doubt."""

import sys
import time

from sysctr import errors
from sysctr.cli.backup import rate
from sysctr.cli.command import Command, Selected, json_option, quiet_option, select, task_options, words
from sysctr.cli.create import container_number
from sysctr.cli.moved import arrived_lines, blocked_error, plan_lines, settled_line
from sysctr.cli.output import duration, notice, print_json, print_table
from sysctr.cli.progress import Submitted, finish, submit
from sysctr.cli.table import Column
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from sysctr.client import Client

# What a rule such as --all chooses: all but those that are away already.
_HERE = ("stopped", "starting", "running", "frozen", "stopping")
_FOREIGN = ("bind", "device")
_FINGERPRINT_CHARACTERS = 8
_STATE_COLOURS = {"moving": "33", "delivering": "33", "undoing": "33", "in-doubt": "31"}
_COLUMNS = (
    Column("CONTAINER", flexible=True, narrowest=12),
    Column("WAY", flexible=True, narrowest=10),
    Column("STATE", colour=lambda state: _STATE_COLOURS.get(state, "")),
    Column("PHASE"),
    Column("FOR", right=True),
    Column("ID", optional=True),
    Column("PROBLEM", flexible=True, narrowest=20, optional=True),
)


def _both_arguments(parser: "argparse.ArgumentParser", verb: str) -> None:
    action = parser.add_argument(
        "containers", metavar="CT... PEER", nargs="*",
        help="ids or names of containers, and last the name of the other host",
    )  # fmt: skip
    words(action, "containers peers")
    parser.add_argument("--all", action="store_true", help="all containers")
    parser.add_argument("--tag", metavar="T", help="all containers with this tag")
    parser.add_argument(
        "--as", metavar="ID", dest="id", type=container_number,
        help="number of the container there (default: the same, or the first free one)"
        if verb == "migrate" else "number of the copy (default: the first free one there)",
    )  # fmt: skip
    parser.add_argument(
        "--name", metavar="N",
        help=f"name of the {'container' if verb == 'migrate' else 'copy'} there (default: the same)",
    )  # fmt: skip
    sending_options(parser)
    parser.add_argument(
        "--dry-run", action="store_true",
        help="send nothing: say what would be sent, and all that is in the way",
    )  # fmt: skip
    parser.add_argument(
        "--parallel", action="store_true",
        help="all at once (default: one after the other; with --no-wait all at once)",
    )  # fmt: skip
    task_options(parser)


def sending_options(parser: "argparse.ArgumentParser") -> None:
    """Add what everything that is sent to another host has: where it goes there, without what, how fast."""
    for kind in ("pool", "bridge"):
        parser.add_argument(
            f"--{kind}-map", metavar="HERE=THERE", action="append", default=[], type=_pair,
            help=f"the {kind} there for a {kind} here; again for more (default: the one of the same name)",
        )  # fmt: skip
    parser.add_argument(
        "--leave-out", metavar="WHAT", action="append", default=[], type=_foreign,
        help="leave out what it has of this host: bind, device; or both with a comma",
    )  # fmt: skip
    parser.add_argument(
        "--bwlimit", metavar="RATE", type=rate, help="send at most so much a second, such as 50M; 0: no limit"
    )


def sending_fields(arguments: "argparse.Namespace") -> "dict[str, Any]":
    """Return what the API is told of these: only what was asked for."""
    wanted = {
        "pool_map": _mapping(arguments.pool_map, "--pool-map"),
        "bridge_map": _mapping(arguments.bridge_map, "--bridge-map"),
        "leave_out": sorted({kind for kinds in arguments.leave_out for kind in kinds}),
        # A rate of 0 is none.
        "bwlimit_bytes": arguments.bwlimit,
    }
    return {key: value for key, value in wanted.items() if value}


def _migrate_arguments(parser: "argparse.ArgumentParser") -> None:
    parser.usage = (
        "sysctr migrate CT... PEER [options]\n"
        "       sysctr migrate --resolve CT [--here | --there] [--yes]"
    )
    parser.add_argument(
        "--restart", action="store_true",
        help="move one that runs: it runs on while it is copied, is stopped for what changed last, and is "
        "started there",
    )  # fmt: skip
    parser.add_argument("--start", action="store_true", help="start it there, also if it is stopped here")
    parser.add_argument(
        "--keep", action="store_true", help="keep its files here; it is not started here while it is away"
    )
    _both_arguments(parser, "migrate")
    parser.add_argument(
        "--resolve", action="store_true",
        help="end a migration that is in doubt: ask the other host again, or decide without it",
    )  # fmt: skip
    parser.add_argument("--here", action="store_true", help="with --resolve: decide that this host has it")
    parser.add_argument(
        "--there", action="store_true", help="with --resolve: decide that the other host has it"
    )
    parser.add_argument("-y", "--yes", action="store_true", help="with --resolve: do not ask")


def _copy_arguments(parser: "argparse.ArgumentParser") -> None:
    parser.usage = "sysctr copy CT... PEER [options]"
    _both_arguments(parser, "copy")
    parser.add_argument("--start", action="store_true", help="start the copy at once")


def _pair(text: str) -> "tuple[str, str]":
    """Read HERE=THERE."""
    here, _, there = text.partition("=")
    if not here or not there or "=" in there:
        import argparse

        raise argparse.ArgumentTypeError(f"{text!r} is not HERE=THERE, such as default=fast")
    return here, there


def _foreign(text: str) -> "list[str]":
    """Read what of the host can be left out."""
    kinds = [kind.strip() for kind in text.split(",")]
    if not all(kind in _FOREIGN for kind in kinds):
        import argparse

        raise argparse.ArgumentTypeError(f"{text!r} is not bind, device or bind,device")
    return kinds


def _mapping(pairs: "list[tuple[str, str]]", option: str) -> "dict[str, str]":
    """Return what is mapped to what; nothing is mapped twice."""
    mapping: dict[str, str] = {}
    for here, there in pairs:
        if mapping.setdefault(here, there) != there:
            raise errors.UsageError(f"cannot map {here} twice: {option} says {mapping[here]} and {there}")
    return mapping


def _body(arguments: "argparse.Namespace", peer: str) -> "dict[str, Any]":
    """Return what the API is told: only what was asked for."""
    wanted = {
        "id": arguments.id, "name": arguments.name, "start": arguments.start, "dry_run": arguments.dry_run,
        "restart": getattr(arguments, "restart", False), "keep": getattr(arguments, "keep", False),
    }  # fmt: skip
    given = {key: value for key, value in wanted.items() if value not in (None, False)}
    return {"peer": peer, **given, **sending_fields(arguments)}


def _migrate(arguments: "argparse.Namespace", client: "Client") -> int:
    if arguments.resolve:
        return _resolve(arguments, client)
    for option in ("here", "there", "yes"):
        if getattr(arguments, option):
            raise errors.UsageError(
                f"cannot take --{option} without --resolve", "sysctr migrate --resolve CT [--here | --there]"
            )
    return _send(arguments, client, "migrate")


def _copy(arguments: "argparse.Namespace", client: "Client") -> int:
    return _send(arguments, client, "copy")


def _send(arguments: "argparse.Namespace", client: "Client", verb: str) -> int:
    by_rule = arguments.all or arguments.tag is not None
    if not arguments.containers or (len(arguments.containers) == 1 and not by_rule):
        what = arguments.containers[0] if arguments.containers else "a container"
        raise errors.UsageError(
            f"cannot {verb} {what}: no other host is named",
            f"sysctr {verb} CT... PEER; `sysctr peer list` shows the hosts that are known",
        )
    typed = arguments.containers.pop()
    selected = select(client, arguments, _HERE)
    if len(selected) > 1 and (arguments.id is not None or arguments.name is not None):
        raise errors.UsageError(
            f"cannot {verb} several containers with one {'--as' if arguments.id is not None else '--name'}",
            "leave it out, or take them one by one",
        )
    body = _body(arguments, known_peer(client, typed, verb, selected))
    if not selected and not arguments.quiet:
        notice(f"nothing to {verb}")
    # One disk and one wire are no faster for two.
    in_turn = not (arguments.parallel or arguments.no_wait)
    started = submit(
        selected, lambda one: client.post(path("containers", one.ref, verb), body), in_turn=in_turn
    )
    refs = {one.label: one.ref for one in selected}

    def explain(one: Submitted) -> "errors.SysctrError | None":
        assert one.error is not None
        if one.error.code != errors.Blocked.code:
            return one.error
        # An error is a text; what to do about each thing is in the report of a dry run.
        try:
            answer = client.post(path("containers", refs[one.label], verb), {**body, "dry_run": True})
            task = field(answer, "task")
            where = path("tasks", task["id"], "wait")
            report = field(client.get(where, {"timeout": 60}, timeout_s=120), "task").get("result")
        except errors.SysctrError:
            return one.error
        return blocked_error(verb, one.label, report or {}, one.error)

    def done(one: Submitted) -> "list[str]":
        report = (one.task or {}).get("result") or {}
        lines = plan_lines if arguments.dry_run else arrived_lines
        return lines(verb, one.label, report)

    worst = finish(client, started, arguments, done, explain=explain)
    if not arguments.no_wait:
        worst = max(worst, _sum_up(started, arguments, verb))
    return worst


def _sum_up(started: "list[Submitted]", arguments: "argparse.Namespace", verb: str) -> int:
    """Say how many went, where there were several; return the code for what a dry run found in the way."""
    blocked = [one.label for one in started if ((one.task or {}).get("result") or {}).get("blockers")]
    failed = [one.label for one in started if one.error is not None or one.label in blocked]
    if len(started) > 1 and not (arguments.json or arguments.quiet):
        past = {"migrate": "migrated", "copy": "copied"}[verb]
        said = "nothing is in the way of" if arguments.dry_run else past
        left = f"; not: {', '.join(failed)}" if failed else ""
        notice(f"{said} {len(started) - len(failed)} of {len(started)}{left}")
    return errors.Blocked.exit_code if blocked else 0


def known_peer(client: "Client", typed: str, verb: str, selected: "list[Selected]") -> str:
    """Return the peer as the API is asked for it; one that there is not is an error before anything moves."""
    peers: list[dict[str, Any]] = field(client.get(path("peers")), "peers")
    names = [str(peer["name"]) for peer in peers]
    if typed in names:
        return typed
    if len(typed) >= _FINGERPRINT_CHARACTERS and any(
        str(peer.get("fingerprint", "")).startswith(typed.lower()) for peer in peers
    ):
        return typed
    import difflib

    what = selected[0].label if len(selected) == 1 else f"{len(selected)} containers"
    near = difflib.get_close_matches(typed, names, n=1, cutoff=0.5)
    hints = [f"did you mean {near[0]}?" if near else "the last word is the other host"]
    if names:
        hints.append("`sysctr peer list` shows the hosts that are known")
    else:
        hints.append("no host is known yet: `sysctr peer token` there, `sysctr peer join TOKEN` here")
    if verb == "copy" and not near:
        hints.append("on this host, `sysctr clone` copies a container, and push and pull copy files")
    raise errors.NotFound(f"cannot {verb} {what}: there is no peer {typed}", "\n".join(hints))


def _migrations_arguments(parser: "argparse.ArgumentParser") -> None:
    json_option(parser)
    quiet_option(parser)


def _migrations(arguments: "argparse.Namespace", client: "Client") -> None:
    found = field(client.get(path("migrations")), "migrations")
    if arguments.json:
        print_json(found)
    elif arguments.quiet:
        for one in found:
            print(one["id"])
    else:
        now_s = time.time()
        rows = [_row(one, now_s) for one in found]
        print_table(_COLUMNS, rows, if_empty="nothing is on its way, and nothing in doubt")
        if sys.stdout.isatty() and any(one["state"] == "in-doubt" for one in found):
            notice("what is in doubt ends by itself as soon as the hosts can talk")
            notice("`sysctr migrate --resolve CT` asks at once; with --here or --there you decide")


def _titled(one: "dict[str, Any]") -> str:
    """Return the container of a migration as people see it; on its way here it may have no number yet."""
    return f"{one['name']} ({one['container']})" if one.get("container") is not None else str(one["name"])


def _row(one: "dict[str, Any]", now_s: float) -> "list[str]":
    since = one.get("since")
    return [
        _titled(one),
        f"to {one['peer']}" if one["role"] == "source" else f"from {one['peer']}",
        str(one["state"]),
        str(one["phase"]),
        "-" if since is None else duration(int(max(0, now_s - since))),
        str(one["id"]),
        str(one.get("error") or "-"),
    ]


def _resolve(arguments: "argparse.Namespace", client: "Client") -> int:
    if arguments.here and arguments.there:
        raise errors.UsageError("cannot decide for --here and --there", "take one, or none to ask again")
    if not arguments.containers:
        raise errors.UsageError(
            "cannot resolve a migration: no container is named", "`sysctr migrations` lists what is in doubt"
        )
    keep = "here" if arguments.here else "there" if arguments.there else None
    found: list[dict[str, Any]] = field(client.get(path("migrations")), "migrations")
    chosen = {ref: _migration(client, found, ref) for ref in dict.fromkeys(arguments.containers)}
    if keep is not None and not arguments.yes:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise errors.UsageError(
                "cannot decide without asking: there is no terminal to ask on", "add --yes"
            )
        chosen = {ref: one for ref, one in chosen.items() if _confirmed(one, keep)}
        if not chosen:
            return 1
    body = {} if keep is None else {"keep": keep}
    selected = [Selected(str(one["id"]), ref) for ref, one in chosen.items()]
    started = submit(selected, lambda one: client.post(path("migrations", one.ref, "resolve"), body))

    def done(one: Submitted) -> str:
        migration = chosen[one.label]
        left = field(client.get(path("migrations")), "migrations")
        still = next((other for other in left if other["id"] == migration["id"]), None)
        if still is not None:
            return _still(still)
        here = field(client.get(path("containers")), "containers")
        return settled_line(_titled(migration), migration, here)

    return finish(client, started, arguments, done)


def _still(one: "dict[str, Any]") -> str:
    problem = f": {one['error']}" if one.get("error") else ""
    return f"{_titled(one)} is still {str(one['state']).replace('-', ' ')} ({one['phase']}){problem}"


def _migration(client: "Client", found: "list[dict[str, Any]]", ref: str) -> "dict[str, Any]":
    """Return the migration of a container, by its id or name, or by the id of the migration."""
    meant = [one for one in found if ref in (str(one["id"]), str(one.get("container")), one["name"])]
    if not meant:
        meant = [one for one in _kept(client) if ref in (str(one["container"]), one["name"])]
    if not meant:
        raise errors.NotFound(
            f"cannot resolve {ref}: it is in no migration", "`sysctr migrations` lists what is in doubt"
        )
    if len(meant) > 1:
        raise errors.UsageError(
            f"cannot resolve {ref}: it is in {len(meant)} migrations",
            f"name one: {', '.join(str(one['id']) for one in meant)}",
        )
    return meant[0]


def _kept(client: "Client") -> "list[dict[str, Any]]":
    """Return the containers that are away and kept here: nothing is open, but that can be taken back."""
    return [
        {
            "id": one["name"], "role": "kept", "container": one["id"], "name": one["name"],
            "peer": one["away"].get("name") or "another host",
        }
        for one in field(client.get(path("containers")), "containers") if one.get("away")
    ]  # fmt: skip


# By role and decision: what is decided, and what is lost where the other host decided otherwise.
_DECISIONS = {
    ("source", "here"): (
        "this decides that {what} stays on this host: it can be started here again",
        "if {peer} took it over after all, there are two of it, and what {peer}'s wrote since is not here",
    ),
    ("source", "there"): (
        "this decides that {peer} has {what}: it is given up here, with its files unless --keep was said",
        "if {peer} did not take it over after all, what is given up here was the last of it",
    ),
    ("copy", "here"): (
        "this decides that there is no copy of {what} at {peer}: {peer} is to remove what it got",
        "{what} itself stays as it is; if {peer} made the copy after all, it is one of its own",
    ),
    ("copy", "there"): (
        "this decides that {peer} has its copy of {what}: nobody is asked about it any longer",
        "{what} itself stays as it is; if {peer} did not make the copy after all, there is none",
    ),
    ("kept", "here"): (
        "this decides that {what} is on this host again, with the files of the day that it was moved",
        "{peer} took it over: there are two of it then, and what {peer}'s wrote since is not here",
    ),
    ("kept", "there"): (
        "this decides that {peer} has {what}, which is so already",
        "nothing is lost by it",
    ),
    ("target", "here"): (
        "this decides that {what} is on this host now: it is made of what arrived from {peer}",
        "if {peer} kept it after all, there are two of it, and what {peer}'s writes from now on is not here",
    ),
    ("target", "there"): (
        "this decides that {peer} keeps {what}: what arrived of it here is removed",
        "if {peer} gave it up after all, what is removed here was the last of it",
    ),
}


def _confirmed(one: "dict[str, Any]", keep: str) -> bool:
    role = "copy" if one["role"] == "source" and one.get("copy") else one["role"]
    for line in _DECISIONS[role, keep]:
        notice(line.format(what=_titled(one), peer=one["peer"]))
    print("type its name to go on: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip() == one["name"]:
        return True
    notice(f"not decided: {one['name']}")
    return False


_EXITS = (
    (0, "done"),
    (1, "failed, or the other host does not answer"),
    (2, "wrong usage"),
    (3, "no such container, peer or migration"),
    (4, "wrong state, or busy"),
    (5, "something is in the way, also in a dry run"),
    (6, "no daemon"),
)
_TOGETHER = (
    "The hosts know each other once `sysctr peer token` was run on one and `sysctr peer join TOKEN` on the",
    "other. All that is in the way is said at once, before anything is sent; --dry-run says it and the plan.",
    "",
)
COMMANDS = {
    "migrate": Command(
        _migrate_arguments,
        _migrate,
        exits=_EXITS,
        more=(
            *_TOGETHER,
            "A container keeps uuid, MACs, snapshots and settings, and its address where the other network",
            "has it. It is on one host at every moment: here until the hand-over, then there. Until then",
            "`sysctr task cancel` ends it, and it runs on here. After a crash or a cut of the network the",
            "hosts finish or undo it when they can talk again; `sysctr migrations` shows what is in doubt.",
            "",
        ),
        examples=(
            "sysctr migrate web node2 --dry-run",
            "sysctr migrate web node2 --restart",
            "sysctr migrate web db node2 --restart --pool-map default=fast --bridge-map vmbr0=vmbr1",
            "sysctr migrate --all node2 --restart --bwlimit 50M --keep",
            "sysctr migrate web node2 --as 204 --leave-out bind,device",
            "sysctr migrate --resolve web",
            "sysctr migrate --resolve web --here",
        ),
    ),
    "copy": Command(
        _copy_arguments,
        _copy,
        exits=_EXITS,
        more=(
            *_TOGETHER,
            "The copy gets an identity of its own: uuid, MACs, keys, an address. The original is not changed",
            "and runs on. On this host `sysctr clone` makes one; `sysctr push` and `sysctr pull` copy files.",
            "",
        ),
        examples=(
            "sysctr copy web node2 --name web-test --start",
            "sysctr copy web db node2 --pool-map default=fast",
            "sysctr copy --tag prod backup-host --bwlimit 20M",
        ),
    ),
    "migrations": Command(
        _migrations_arguments,
        _migrations,
        more=(
            "`moving` goes on; `delivering` is handed over and is told to the other host; `undoing` is taken",
            "back; `in-doubt` waits until the hosts can talk, or for `sysctr migrate --resolve CT`.",
            "",
        ),
        examples=("sysctr migrations", "sysctr migrations --json"),
    ),
}
