"""What comes from Proxmox VE: `sysctr import-pct`, a container with the settings of a pct.conf."""

import sys

from sysctr import errors
from sysctr.cli.command import Command, Selected, task_options, words
from sysctr.cli.create import container_number
from sysctr.cli.output import notice, print_json
from sysctr.cli.progress import Submitted, finish, submit
from sysctr.cli.settings import assignment
from sysctr.cli.table import neutralise
from sysctr.client import path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from sysctr.client import Client

_LONGEST_BYTES = 256 << 10
_MORE = (
    "what of the host a file may give the container, if --allow says so:",
    "  bind     paths of the host (mpN: /srv/www,mp=…)",
    "  device   devices of the host (devN)",
    "  raw      lines for LXC that have an equal here (lxc.mount.entry, lxc.environment and others)",
    "  feature  what features= widens and has an equal here (fuse)",
    "",
)


def _arguments(parser: "argparse.ArgumentParser") -> None:
    file = parser.add_argument(
        "file", metavar="FILE", help="a pct.conf, such as /etc/pve/lxc/107.conf of the other host; - is stdin"
    )
    words(file, "files")
    parser.add_argument("--name", metavar="N", help="name of the container (default: the file's host name)")
    template = parser.add_argument(
        "--template", metavar="T", help="template to create it from (default: the host's setting, if any)"
    )
    words(template, "templates")
    pool = parser.add_argument(
        "--pool", metavar="P", help="storage pool to keep it in (default: the host's setting, default)"
    )
    words(pool, "pools")
    parser.add_argument(
        "--id",
        metavar="N",
        type=container_number,
        help="number of the container (default: the first free one from 100)",
    )
    parser.add_argument(
        "--allow",
        metavar="WHAT",
        action="append",
        default=[],
        help="let it have of the host what the file says: bind, device, raw, feature; several with commas",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a setting that is to be another one; an empty value leaves it out",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the configuration that it would have, and make nothing"
    )
    parser.add_argument("--start", action="store_true", help="start it at once")
    task_options(parser)


def _import(arguments: "argparse.Namespace", client: "Client") -> int:
    body = request(arguments)
    answer = client.post(path("pct", "check"), body)
    if arguments.dry_run and arguments.json:
        print_json(answer)
        return 0
    if not (arguments.quiet or arguments.json):
        _tell(answer)
    if arguments.dry_run:
        print("\n".join(neutralise(line) for line in answer["toml"].rstrip("\n").split("\n")))
        return 0
    name = answer["name"]
    submitted = submit([Selected(name, name)], lambda _: client.post(path("pct"), body))
    verb = "created and started" if arguments.start else "created"

    def done(one: Submitted) -> str:
        number = (one.task or {}).get("container")
        return f"{verb} {number} ({one.label})" if number is not None else f"{verb} {one.label}"

    return finish(client, submitted, arguments, done, single=True)


def request(arguments: "argparse.Namespace") -> "dict[str, Any]":
    """Return the body of the API's request for these arguments."""
    body: dict[str, Any] = {
        "pct": _read(arguments.file),
        "allow": [name.strip() for text in arguments.allow for name in text.split(",") if name.strip()],
        "set": dict(assignment(text, "--set") for text in arguments.set),
        "start": arguments.start,
    }
    for name in ("name", "template", "pool", "id"):
        if (value := getattr(arguments, name)) is not None:
            body[name] = value
    return body


def _read(name: str) -> str:
    shown = "stdin" if name == "-" else name
    try:
        if name == "-":
            raw = sys.stdin.buffer.read(_LONGEST_BYTES + 1)
        else:
            with open(name, "rb") as source:
                raw = source.read(_LONGEST_BYTES + 1)
    except FileNotFoundError as error:
        raise errors.NotFound(f"cannot import {shown}: no such file") from error
    except OSError as error:
        raise errors.UsageError(f"cannot import {shown}: {error.strerror}") from error
    if len(raw) > _LONGEST_BYTES:
        raise errors.UsageError(f"cannot import {shown}: it is longer than {_LONGEST_BYTES} bytes")
    if b"\0" in raw:
        line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        raise errors.UsageError(f"cannot import {shown}: line {line}: a zero byte is in it")
    return raw.decode("utf-8", "surrogateescape")


def _tell(answer: "dict[str, Any]") -> None:
    """Say on stderr what of the file is kept, what is not as it was, and what is left out."""
    if answer["kept"]:
        notice(f"kept: {', '.join(answer['kept'])}")
    for kind, said in (("changed", "changed"), ("dropped", "left out"), ("needs-permission", "left out")):
        for note in answer["notes"]:
            if note["kind"] == kind:
                asked = f" (--allow {note['permission']})" if kind == "needs-permission" else ""
                notice(f"{said}: {note['key']}: {note['reason']}{asked}")


COMMANDS = {
    "import-pct": Command(
        _arguments,
        _import,
        examples=(
            "sysctr import-pct 107.conf --template debian-12 --dry-run",
            "ssh pve cat /etc/pve/lxc/107.conf | sysctr import-pct - --template debian-12 --start",
            "sysctr import-pct 107.conf --name web2 --allow bind,device --set limits.memory=4G",
        ),
        more=_MORE,
    ),
}
