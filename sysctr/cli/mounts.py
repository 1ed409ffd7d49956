"""Mount points and devices of a container: list, add, remove."""

import sys

from sysctr import errors
from sysctr.cli.command import Command, json_option, one_container
from sysctr.cli.output import notice, plain, print_json, print_table, size
from sysctr.cli.table import Column, neutralise
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from sysctr.client import Client

_STATE_COLOURS = {"mounted": "32", "pending": "33", "leaving": "33"}
_COLUMNS = (
    Column("KEY"),
    Column("TARGET", flexible=True),
    Column("KIND"),
    Column("SOURCE", flexible=True),
    Column("SIZE", right=True),
    Column("USED", right=True),
    Column("STATE", colour=lambda state: _STATE_COLOURS.get(state, "")),
    Column("OPTIONS", flexible=True, optional=True),
)
_GRAMMAR = (
    "a MOUNT is KEY=VALUE,KEY=VALUE with these keys (and ro for read_only, mp for target):",
    "  target=/data,size=8G                 a volume of its own, destroyed with the container",
    "  target=/data,size=8G,pool=P,backup=no",
    "  source=/srv/www,target=/srv/www,ro   a directory or file of the host; also dev, suid, noexec,",
    "  …,idmap=1000=1000;33=33              host user 1000 shows as 1000 inside; others show as nobody",
    "  volume=media,target=/media           a volume that containers share, made at its first use",
    "  tmpfs,target=/scratch,size=64M       memory, empty at each start",
    "a DEVICE is fuse, tun, or a path below /dev with target=, mode=0666, uid=, gid=",
    "",
)


def _list_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    json_option(parser)


def _row(mount: "dict[str, Any]") -> "list[str]":
    used = mount.get("used_bytes")
    return [
        mount["key"] or "-",
        mount["target"] or "-",
        mount["kind"],
        mount["source"] or "-",
        "-" if mount.get("size_bytes") is None else size(mount["size_bytes"]),
        "-" if used is None else size(used),
        mount["state"] or "-",
        plain(mount["options"]) or "-",
    ]


def _list(arguments: "argparse.Namespace", client: "Client") -> None:
    mounts = field(client.get(path("containers", arguments.container, "mounts")), "mounts")
    if arguments.json:
        print_json(mounts)
    else:
        empty = f"no mounts; `sysctr mount add {arguments.container} target=/data,size=8G` adds one"
        print_table(_COLUMNS, [_row(mount) for mount in mounts], if_empty=empty)


def _add_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    parser.add_argument("mounts", metavar="MOUNT", nargs="*", help="a mount point, on one line")
    parser.add_argument("--device", metavar="DEVICE", action="append", default=[], help="a device node")
    json_option(parser)


def _add(arguments: "argparse.Namespace", client: "Client") -> None:
    bodies = [{"mount": line} for line in arguments.mounts] + [{"device": line} for line in arguments.device]
    if not bodies:
        raise errors.UsageError(
            "cannot add a mount: none is named",
            f"sysctr mount add {arguments.container} target=/data,size=8G",
        )
    where = path("containers", arguments.container, "mounts")
    answers = []
    for body in bodies:
        answer = client.post(where, body)
        answers.append(answer)
        if not arguments.json:
            line = next(iter(body.values()))
            _report(answer, f"added {answer['key']}: {line}")
    if arguments.json:
        print_json(answers)


def _report(answer: "dict[str, Any]", done: str) -> None:
    pending = answer.get("key") in (answer.get("pending") or [])
    print(neutralise(f"{done} (pending until the next start)" if pending else done))
    sys.stdout.flush()
    for note in answer.get("notes") or []:
        notice(note)


def _remove_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    parser.add_argument("which", metavar="MOUNT", help="its target, its key or number, or a kept volume")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--keep", action="store_true", help="keep the volume and its data")
    data.add_argument("--delete", action="store_true", help="delete the volume and all data in it")
    json_option(parser)


def _remove(arguments: "argparse.Namespace", client: "Client") -> int:
    where = path("containers", arguments.container, "mounts")
    data = "keep" if arguments.keep else "delete" if arguments.delete else None
    if data is None:
        volume = _own_volume(field(client.get(where), "mounts"), arguments.which)
        data = _asked(volume) if volume else None
        if data == "":
            notice(f"not removed: {arguments.which}")
            return 1
    answer = client.request("DELETE", where, {"which": arguments.which, "data": data})
    if arguments.json:
        print_json(answer)
        return 0
    words = f"removed {answer['key'] or answer['volume']}"
    if answer.get("volume"):
        words += f", the volume {answer['volume']} is {'deleted' if answer['deleted'] else 'kept'}"
    _report(answer, words)
    return 0


def _own_volume(mounts: "list[dict[str, Any]]", which: str) -> str:
    """Return the volume of the container's own that a removal would be about; empty for none."""
    for mount in mounts:
        number = mount["key"].removeprefix("mount.")
        volume = mount.get("volume") or ""
        names = {mount["key"], number, mount["target"]} - {""}
        if mount["state"] == "kept":
            names = {volume, volume.partition("-")[2]}
        if which in names or (which.rstrip("/") or which) in names:
            return volume if mount["kind"] == "volume" else ""
    return ""


def _asked(volume: str) -> str:
    """Ask what becomes of a volume and return keep, delete, or nothing for neither."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise errors.UsageError(
            f"cannot remove the mount without asking what becomes of the volume {volume}: there is no "
            "terminal to ask on",
            "add --keep or --delete",
        )
    print(
        neutralise(f"delete the volume {volume} and all data in it? [yes, or keep] "),
        end="", file=sys.stderr, flush=True,
    )  # fmt: skip
    answer = sys.stdin.readline().strip().lower()
    return {"yes": "delete", "keep": "keep", "k": "keep"}.get(answer, "")


COMMANDS = {
    "mount list": Command(_list_arguments, _list, examples=("sysctr mount list demo",)),
    "mount add": Command(
        _add_arguments,
        _add,
        examples=(
            "sysctr mount add demo target=/var/lib/docker,size=20G,backup=no",
            "sysctr mount add demo source=/srv/www,target=/srv/www,ro",
            "sysctr mount add demo 'source=/home/ann,target=/home/ann,idmap=1000=1000'",
            "sysctr mount add demo volume=media,target=/media --device fuse",
        ),
        more=_GRAMMAR,
    ),
    "mount remove": Command(
        _remove_arguments,
        _remove,
        examples=("sysctr mount remove demo /srv/www", "sysctr mount remove demo /data --delete"),
    ),
}
