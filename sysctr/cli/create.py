"""`sysctr create`: a container from a template, with its limits, network, keys and environment."""

import argparse

from sysctr import errors
from sysctr.cli.command import Command, Selected, task_options, words
from sysctr.cli.progress import Submitted, finish, submit
from sysctr.cli.settings import assignment, read_secret
from sysctr.client import path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sysctr.client import Client

_LIMITS = (
    ("cores", "N|LIST", "how many cores, such as 2, or which, such as 0-3,5 (default: all)"),
    ("cpu", "N", "how much CPU time, in cores, such as 1.5 (default: no limit)"),
    ("memory", "SIZE", "most memory, such as 512M or 2G (default: no limit)"),
    ("swap", "SIZE", "most swap, such as 512M (default: no limit)"),
    ("pids", "N", "most processes and threads (default: the host's setting, 4096)"),
    ("disk", "SIZE", "most disk space, such as 8G (default: no limit)"),
)
_FIRST_ID, _LAST_ID = 100, 9999


def container_number(text: str) -> int:
    """Read the value of an option that is a container's number."""
    if not (text.isdecimal() and text.isascii() and _FIRST_ID <= int(text[:9]) <= _LAST_ID):
        raise argparse.ArgumentTypeError(f"{text!r} is not a container number from {_FIRST_ID} to {_LAST_ID}")
    return int(text)


def _arguments(parser: "argparse.ArgumentParser") -> None:
    parser.add_argument(
        "name", metavar="NAME", help="name of the new container: lower-case letters, digits, -"
    )
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
    for limit, metavar, meaning in _LIMITS:
        parser.add_argument(f"--{limit}", metavar=metavar, help=meaning)
    parser.add_argument(
        "--net",
        metavar="NIC",
        action="append",
        default=[],
        help="a network card: [name=]eth0[,bridge=B][,ip=A/N|managed|manual][,gw=A][,mac=M][,mtu=N]; may be "
        "repeated (default: eth0 on the bridge of sysctr, ip=managed)",
    )
    parser.add_argument(
        "--mount",
        metavar="MOUNT",
        action="append",
        default=[],
        help="a mount point: target=T with size=S for a volume of its own, source=PATH for one of the host, "
        "volume=NAME or tmpfs; may be repeated, `sysctr mount add --help` shows all",
    )
    parser.add_argument(
        "--device", metavar="DEVICE", action="append", default=[], help="fuse, tun, or a path below /dev"
    )
    key = parser.add_argument(
        "--ssh-key", metavar="F", action="append", default=[], help="public keys that may log in as root"
    )
    words(key, "files")
    password = parser.add_argument(
        "--password-file", metavar="F", help="file with root's password (- is stdin; default: none, no login)"
    )
    words(password, "files")
    parser.add_argument("--env", metavar="K=V", action="append", default=[], help="environment of the init")
    parser.add_argument("--tag", metavar="T", action="append", default=[], help="tag, may be repeated")
    parser.add_argument("--onboot", action="store_true", help="start it when the host starts")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="any other setting; `sysctr set --help` lists them",
    )
    parser.add_argument("--start", action="store_true", help="start it at once")
    task_options(parser)


def _create(arguments: "argparse.Namespace", client: "Client") -> int:
    body = request(arguments)
    submitted = submit(
        [Selected(arguments.name, arguments.name)], lambda _: client.post(path("containers"), body)
    )
    verb = "created and started" if arguments.start else "created"

    def done(one: Submitted) -> str:
        number = (one.task or {}).get("container")
        return f"{verb} {number} ({one.label})" if number is not None else f"{verb} {one.label}"

    return finish(client, submitted, arguments, done, single=True)


def request(arguments: "argparse.Namespace") -> "dict[str, Any]":
    """Return the body of the API's request for these arguments."""
    settings = dict(assignment(text, "--set") for text in arguments.set)
    for limit, _, _ in _LIMITS:
        if (value := getattr(arguments, limit)) is not None:
            if not value:
                # An empty value unsets a key; here it is a shell's variable that was not set.
                raise errors.UsageError(f"cannot create {arguments.name}: the value of --{limit} is empty")
            settings[f"limits.{limit}"] = value
    body: dict[str, Any] = {
        "name": arguments.name,
        "set": settings,
        "ssh_keys": [key for name in arguments.ssh_key for key in read_keys(name)],
        "environment": dict(assignment(text, "--env") for text in arguments.env),
        "tags": arguments.tag,
        "nets": arguments.net,
        "mounts": arguments.mount,
        "devices": arguments.device,
        "onboot": arguments.onboot,
        "start": arguments.start,
    }
    if arguments.template is not None:
        body["template"] = arguments.template
    if arguments.pool is not None:
        body["pool"] = arguments.pool
    if arguments.id is not None:
        body["id"] = arguments.id
    if arguments.password_file is not None:
        body["password"] = read_secret(arguments.password_file)
    return body


def read_keys(name: str) -> "list[str]":
    """Return the public keys of an ssh key file, one for each line that is not empty or a comment."""
    try:
        with open(name, encoding="utf-8") as source:
            lines = [line.strip() for line in source]
    except OSError as error:
        raise errors.UsageError(f"cannot read the ssh key {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise errors.UsageError(f"cannot read the ssh key {name}: it is not text") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if any("PRIVATE KEY" in key for key in keys):
        raise errors.UsageError(f"cannot use the ssh key {name}: it is a private key", f"give {name}.pub")
    if not keys:
        raise errors.UsageError(f"cannot use the ssh key {name}: no key is in it")
    return keys


COMMANDS = {
    "create": Command(
        _arguments,
        _create,
        examples=(
            "sysctr create demo --template debian-12 --start",
            "sysctr create web --template debian-12 --id 120 --memory 1G --cores 2 \\",
            "    --net name=eth0,ip=managed --ssh-key ~/.ssh/id_ed25519.pub --tag prod --onboot",
        ),
    ),
}
