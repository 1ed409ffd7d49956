"""Storage: the pools of this host, and what containers take of them."""

import os

from sysctr import errors
from sysctr.cli.command import Command, Selected, json_option, task_options, words
from sysctr.cli.output import plain, print_fields, print_json, print_table, size
from sysctr.cli.progress import Submitted, finish, submit
from sysctr.cli.table import Column
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from sysctr.client import Client

_BAD_COLOUR = "31"
_WARNING_COLOUR = "33"


def _state_colour(state: str) -> str:
    return {"ok": "", "low": _WARNING_COLOUR}.get(state, _BAD_COLOUR)


_COLUMNS = (
    Column("NAME", flexible=True),
    Column("DRIVER"),
    Column("STATE", colour=_state_colour),
    Column("SIZE", right=True),
    Column("USED", right=True),
    Column("FREE", right=True),
    Column("VOLUMES", right=True),
    Column("WARN AT", right=True, optional=True),
    Column("PATH", flexible=True, narrowest=12),
)
_VOLUMES = (
    Column("VOLUME", flexible=True),
    Column("CONTAINER", flexible=True),
    Column("USED", right=True),
    Column("LIMIT", right=True),
    Column("SNAPSHOTS", right=True),
)
_DISKS = (
    Column("ID", right=True),
    Column("NAME", flexible=True),
    Column("POOL", flexible=True),
    Column("USED", right=True),
    Column("LIMIT", right=True),
    Column("USE%", right=True),
    Column("SNAPSHOTS", right=True),
)


def _count(number: "int | None") -> str:
    return "-" if number is None else str(number)


def _state(pool: "dict[str, Any]") -> str:
    return "low" if pool["state"] == "ok" and pool["low"] else str(pool["state"])


def _row(pool: "dict[str, Any]") -> "list[str]":
    return [
        pool["name"],
        pool["driver"] or "-",
        _state(pool),
        size(pool["size_bytes"]),
        size(pool["used_bytes"]),
        size(pool["free_bytes"]),
        _count(pool["count"]),
        pool["low_space"],
        pool["path"] or "-",
    ]


def _list_arguments(parser: "argparse.ArgumentParser") -> None:
    json_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print names only")


def _list(arguments: "argparse.Namespace", client: "Client") -> None:
    from sysctr.cli.output import notice

    pools = field(client.get(path("pools")), "pools")
    if arguments.json:
        print_json(pools)
    elif arguments.quiet:
        for pool in pools:
            print(pool["name"])
    else:
        print_table(_COLUMNS, [_row(pool) for pool in pools])
        for pool in pools:
            if pool["error"]:
                notice(pool["error"])


def _one_pool(parser: "argparse.ArgumentParser") -> None:
    words(parser.add_argument("pool", metavar="POOL", help="name of the pool"), "pools")


def _show_arguments(parser: "argparse.ArgumentParser") -> None:
    _one_pool(parser)
    json_option(parser)


def _show(arguments: "argparse.Namespace", client: "Client") -> None:
    pool = field(client.get(path("pools", arguments.pool)), "pool")
    if arguments.json:
        print_json(pool)
        return
    inodes = pool.get("inodes")
    print_fields(
        [
            ("name", pool["name"]),
            ("driver", pool["driver"]),
            ("path", pool["path"]),
            ("state", _state(pool)),
            ("problem", pool["error"]),
            ("size", size(pool["size_bytes"])),
            ("used", size(pool["used_bytes"])),
            ("free", size(pool["free_bytes"])),
            ("free inodes", f"{pool['free_inodes']} of {inodes}" if inodes else ""),
            ("warns below", pool["low_space"]),
            ("templates", plain(pool["templates"])),
            ("volumes", str(len(pool["volumes"]))),
        ]
    )
    if pool["volumes"]:
        print()
        print_table(_VOLUMES, [_volume_row(volume) for volume in pool["volumes"]])


def _volume_row(volume: "dict[str, Any]") -> "list[str]":
    number = volume["container"]
    whose = f"{volume['name']} ({number})" if volume["name"] else ("nobody's" if number else "-")
    sizes = [size(volume["used_bytes"]), size(volume["limit_bytes"])]
    return [volume["volume"], whose, *sizes, _count(volume["snapshots"])]


def _add_arguments(parser: "argparse.ArgumentParser") -> None:
    parser.add_argument("pool", metavar="NAME", help="name of the new pool: lower-case letters, digits, -")
    parser.add_argument(
        "--driver", metavar="D", required=True,
        help="overlay (any directory), btrfs (a directory on btrfs), loop (a disk image per container) "
        "or zfs (where a dataset is mounted)",
    )  # fmt: skip
    directory = parser.add_argument(
        "--path", metavar="P", required=True, help="its directory, which is made and closed to all but root"
    )
    words(directory, "files")
    parser.add_argument(
        "--low-space", metavar="PERCENT", help="warn when less than this is free (default: 10%%)"
    )
    parser.add_argument("--force", action="store_true", help="even if other files are in the directory")
    json_option(parser)


def _add(arguments: "argparse.Namespace", client: "Client") -> None:
    body: dict[str, Any] = {
        "name": arguments.pool,
        "driver": arguments.driver,
        "path": os.path.abspath(client.whole_path(arguments.path)),
        "force": arguments.force,
    }
    if arguments.low_space is not None:
        body["low_space"] = arguments.low_space
    pool = field(client.post(path("pools"), body), "pool")
    if arguments.json:
        print_json(pool)
        return
    count = len(pool["volumes"])
    held = f"; {count} volume{'s' * (count != 1)} in it" if count else ""
    print(f"added {pool['name']}: {size(pool['free_bytes'])} free in {pool['path']}{held}")


def _remove_arguments(parser: "argparse.ArgumentParser") -> None:
    words(parser.add_argument("pools", metavar="POOL", nargs="+", help="name of a pool"), "pools")
    parser.add_argument("--force", action="store_true", help="forget one that cannot be reached, too")
    task_options(parser)


def _remove(arguments: "argparse.Namespace", client: "Client") -> int:
    chosen = [Selected(pool, pool) for pool in arguments.pools]
    body = {"force": arguments.force}
    submitted = submit(chosen, lambda one: client.request("DELETE", path("pools", one.ref), body))

    def done(one: Submitted) -> str:
        result = (one.task or {}).get("result") or {}
        stays = f"; {result['path']} still has {result['left']}" if result.get("left") else ""
        return f"removed {one.label}{stays}"

    return finish(client, submitted, arguments, done)


def _df_arguments(parser: "argparse.ArgumentParser") -> None:
    action = parser.add_argument("containers", metavar="CT", nargs="*", help="id or name of a container")
    words(action, "containers")
    json_option(parser)


def _df(arguments: "argparse.Namespace", client: "Client") -> None:
    disks = field(client.get(path("df")), "disks")
    if arguments.containers:
        disks = [_named(disks, ref) for ref in dict.fromkeys(arguments.containers)]
    if arguments.json:
        print_json(disks)
        return
    print_table(
        _DISKS,
        [row for disk in disks for row in _disk_rows(disk)],
        if_empty="no containers; `sysctr create NAME --template T` makes one",
    )


def _named(disks: "list[dict[str, Any]]", ref: str) -> "dict[str, Any]":
    for disk in disks:
        if ref in (str(disk["id"]), disk["name"]):
            return disk
    raise errors.NotFound(f"cannot find container {ref}", "`sysctr list` shows what there is")


def _disk_rows(disk: "dict[str, Any]") -> "list[list[str]]":
    """Return a line for each volume of a container: its root first, then those of mount points."""
    number = str(disk["id"])
    if not disk["volumes"]:
        return [
            [number, disk["name"], f"{disk['pool']} ({'missing' if disk['error'] else 'empty'})", *"----"]
        ]
    rows = []
    for volume in sorted(disk["volumes"], key=lambda one: (one["volume"] != number, one["volume"])):
        limit = volume["limit_bytes"]
        # Beside a limit, what counts towards it: that may be shared with snapshots and clones.
        used = volume["used_bytes"] if limit is None else volume["filled_bytes"]
        share = f"{100 * used // limit}%" if limit and used is not None else "-"
        below = volume["volume"].removeprefix(number).replace("-", " ", 1)
        row = [number, f"{disk['name']}{below}", volume["pool"], size(used), size(limit), share]
        rows.append([*row, _count(volume["snapshots"])])
    return rows


COMMANDS = {
    "pool list": Command(_list_arguments, _list, examples=("sysctr pool list",)),
    "pool show": Command(_show_arguments, _show, examples=("sysctr pool show default",)),
    "pool add": Command(
        _add_arguments,
        _add,
        examples=(
            "sysctr pool add fast --driver btrfs --path /srv/fast",
            "sysctr pool add big --driver loop --path /mnt/big/sysctr --low-space 5%",
            "sysctr pool add tank --driver zfs --path /tank/ct",
        ),
    ),
    "pool remove": Command(_remove_arguments, _remove, examples=("sysctr pool remove fast",)),
    "df": Command(_df_arguments, _df, examples=("sysctr df", "sysctr df web --json")),
}
