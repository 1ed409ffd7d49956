"""Taking over the containers that another manager keeps on this host."""

from sysctr.cli.backup import made_options, made_request, restored
from sysctr.cli.backups import absolute
from sysctr.cli.command import Command, Selected, task_options
from sysctr.cli.create import container_number
from sysctr.cli.progress import finish, submit
from sysctr.client import path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from sysctr.client import Client


def _lxc_arguments(parser: "argparse.ArgumentParser") -> None:
    parser.add_argument("container", metavar="NAME", help="its name in LXC; it must be stopped")
    parser.add_argument(
        "--lxcpath", "-P", metavar="DIR", help="where LXC keeps its containers (default: /var/lib/lxc)"
    )
    parser.add_argument(
        "--id", metavar="ID", type=container_number,
        help="number of the container (default: the first free one)",
    )  # fmt: skip
    made_options(parser)
    task_options(parser)


def _lxc(arguments: "argparse.Namespace", client: "Client") -> int:
    body = {**made_request(arguments), "directory": absolute(arguments.lxcpath, client)}
    selected = [Selected(arguments.container, arguments.container)]
    started = submit(selected, lambda one: client.post(path("import", "lxc"), {**body, "container": one.ref}))
    return finish(client, started, arguments, restored, single=True)


COMMANDS = {
    "import lxc": Command(
        _lxc_arguments,
        _lxc,
        more=(
            "Its files are copied with the ids that they have inside, and LXC's own are only read. It keeps",
            "its MACs and host keys: start one of the two only, or give this one --unique.",
            "",
        ),
        examples=(
            "sysctr import lxc web --start",
            "sysctr import lxc db --name db2 --unique --allow bind",
            "sysctr import lxc old --lxcpath /mnt/disk/var/lib/lxc",
        ),
    ),
}
