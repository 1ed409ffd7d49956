"""What is made of containers: clones, templates; and of volumes: the containers that were lost."""

from sysctr.cli.command import Command, Selected, json_option, one_container, task_options
from sysctr.cli.create import container_number
from sysctr.cli.output import notice, print_json
from sysctr.cli.progress import Submitted, finish, submit
from sysctr.cli.settings import assignment
from sysctr.cli.table import neutralise
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from sysctr.client import Client


def _clone_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    parser.add_argument("name", metavar="NEWNAME", help="name of the new container")
    parser.add_argument("--snapshot", metavar="S", help="of this snapshot (default: of the present state)")
    parser.add_argument(
        "--id",
        metavar="N",
        type=container_number,
        help="number of the new container (default: the first free one)",
    )
    parser.add_argument(
        "--full", action="store_true", help="copy all data, also where the storage could share it"
    )
    parser.add_argument("--pool", metavar="P", help="pool to keep it in (default: the original's)")
    parser.add_argument(
        "--keep-addresses", action="store_true",
        help="keep addresses that are set by hand (default: new ones are chosen)",
    )  # fmt: skip
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[],
        help="a setting that differs; `sysctr set --help` lists them",
    )  # fmt: skip
    parser.add_argument("--start", action="store_true", help="start it at once")
    task_options(parser)


def _clone(arguments: "argparse.Namespace", client: "Client") -> int:
    body: dict[str, Any] = {
        "name": arguments.name, "full": arguments.full, "start": arguments.start,
        "keep_addresses": arguments.keep_addresses,
        "set": dict(assignment(text, "--set") for text in arguments.set),
        "id": arguments.id, "snapshot": arguments.snapshot, "pool": arguments.pool,
    }  # fmt: skip
    started = submit(
        [Selected(arguments.name, arguments.name)],
        lambda _: client.post(path("containers", arguments.container, "clone"), body),
    )

    def done(one: Submitted) -> str:
        result = (one.task or {}).get("result") or {}
        for note in result.get("notes") or ():
            notice(f"note: {note}")
        of = f"{arguments.container}{f' at {arguments.snapshot}' if arguments.snapshot else ''}"
        return f"cloned {of} as {one.label} ({result.get('id')})"

    return finish(client, started, arguments, done, single=True)


def _template_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    parser.add_argument("name", metavar="NAME", help="name of the template")
    parser.add_argument("--snapshot", metavar="S", help="of this snapshot (default: of the present state)")
    parser.add_argument("--description", metavar="TEXT", help="one line for people")
    task_options(parser)


def _template(arguments: "argparse.Namespace", client: "Client") -> int:
    body: dict[str, Any] = {"name": arguments.name, "snapshot": arguments.snapshot}
    if arguments.description is not None:
        body["description"] = arguments.description
    started = submit(
        [Selected(arguments.name, arguments.name)],
        lambda _: client.post(path("containers", arguments.container, "template"), body),
    )
    return finish(
        client, started, arguments, lambda one: f"made template {one.label} of {arguments.container}",
        single=True,
    )  # fmt: skip


def _recover_arguments(parser: "argparse.ArgumentParser") -> None:
    parser.add_argument("--dry-run", action="store_true", help="only say what would be rebuilt")
    json_option(parser)


def _recover(arguments: "argparse.Namespace", client: "Client") -> int:
    answer = client.post(path("recover"), {"dry_run": arguments.dry_run})
    recovered, problems = field(answer, "recovered"), field(answer, "problems")
    if arguments.json:
        print_json(answer)
        return 1 if problems else 0
    verb = "would rebuild" if arguments.dry_run else "rebuilt"
    for one in recovered:
        print(neutralise(f"{verb} {one['name']} ({one['id']}): {' and '.join(one['written'])}"))
    for problem in problems:
        notice(f"sysctr: {problem}")
    if not recovered and not problems:
        notice("nothing is missing")
    return 1 if problems else 0


COMMANDS = {
    "clone": Command(
        _clone_arguments,
        _clone,
        examples=(
            "sysctr clone web web-test --start",
            "sysctr clone web web-old --snapshot before-upgrade --set limits.memory=512M",
            "sysctr clone web web-2 --full --pool fast",
        ),
    ),
    "template create": Command(
        _template_arguments,
        _template,
        examples=(
            "sysctr template create web my-web",
            'sysctr template create web my-web --snapshot tested --description "nginx, ours"',
        ),
    ),
    "recover": Command(
        _recover_arguments,
        _recover,
        more=(
            "Where /var/lib/sysctr/containers or /etc/sysctr/containers is lost, this writes what is missing",
            "from what the volumes in the pools say. Nothing that exists is changed.",
            "",
        ),
        examples=("sysctr recover --dry-run", "sysctr recover"),
    ),
}
