"""Templates: list, show, build, import, remove."""

import os

from sysctr import errors
from sysctr.cli.command import Command, Selected, json_option, task_options, words
from sysctr.cli.output import moment, plain, print_fields, print_json, print_table, size
from sysctr.cli.progress import Submitted, finish, submit
from sysctr.cli.settings import assignment
from sysctr.cli.table import Column
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from sysctr.client import Client

_COLUMNS = (
    Column("NAME", flexible=True),
    Column("OS", flexible=True),
    Column("VERSION", flexible=True),
    Column("ARCH"),
    Column("SIZE", right=True),
    Column("CREATED"),
    Column("SOURCE", flexible=True, optional=True),
)


def _created(template: "dict[str, Any]") -> str:
    created = template.get("created")
    return moment(created) if isinstance(created, int | float) else plain(created) or "-"


def _source(template: "dict[str, Any]") -> str:
    source = template.get("source") or {}
    return f"{source.get('kind', '')} {source.get('name', '')}".strip() or "-"


def _row(template: "dict[str, Any]") -> "list[str]":
    return [
        template["name"],
        plain(template.get("os_name")) or plain(template.get("os_id")) or "-",
        plain(template.get("version")) or "-",
        plain(template.get("arch")) or "-",
        size(template.get("size_bytes")),
        _created(template),
        _source(template),
    ]


def _list_arguments(parser: "argparse.ArgumentParser") -> None:
    json_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print names only")


def _list(arguments: "argparse.Namespace", client: "Client") -> None:
    templates = field(client.get(path("templates")), "templates")
    if arguments.json:
        print_json(templates)
    elif arguments.quiet:
        for template in templates:
            print(template["name"])
    else:
        print_table(
            _COLUMNS,
            [_row(template) for template in templates],
            if_empty="no templates; `sysctr template build debian-12` builds one, `… build tiny` a small one",
        )


def _show_arguments(parser: "argparse.ArgumentParser") -> None:
    words(parser.add_argument("template", metavar="TEMPLATE", help="name of the template"), "templates")
    json_option(parser)


def _show(arguments: "argparse.Namespace", client: "Client") -> None:
    template = field(client.get(path("templates", arguments.template)), "template")
    if arguments.json:
        print_json(template)
        return
    shown = {**template, "size": size(template.get("size_bytes")), "created": _created(template)}
    shown |= {"source": _source(template), "used_by": ", ".join(template.get("used_by") or ())}
    for key in ("size_bytes", "schema", "layer"):
        shown.pop(key, None)
    print_fields([(name.replace("_", " "), plain(value)) for name, value in shown.items()])


def _build_arguments(parser: "argparse.ArgumentParser") -> None:
    recipe = parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or a file NAME.toml")
    words(recipe, "files")
    parser.add_argument("--name", metavar="N", help="name of the template (default: the recipe's)")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="a value the recipe asks for"
    )
    task_options(parser)


def _build(arguments: "argparse.Namespace", client: "Client") -> int:
    recipe = arguments.recipe
    if "/" in recipe or recipe.endswith(".toml"):
        recipe = _existing(recipe, "build a template from", client)
    body: dict[str, Any] = {
        "recipe": recipe,
        "set": dict(assignment(text, "--set") for text in arguments.set),
    }
    return _make(client, arguments, "build", body, arguments.name or arguments.recipe, "built")


def _import_arguments(parser: "argparse.ArgumentParser") -> None:
    archive = parser.add_argument("file", metavar="FILE", help="a tar archive of a root file system")
    words(archive, "files")
    parser.add_argument("--name", metavar="N", help="name of the template (default: the file's)")
    task_options(parser)


def _import(arguments: "argparse.Namespace", client: "Client") -> int:
    body: dict[str, Any] = {"path": _existing(arguments.file, "import", client)}
    return _make(client, arguments, "import", body, arguments.name or arguments.file, "imported")


def _existing(name: str, verb: str, client: "Client") -> str:
    whole = client.whole_path(name)
    # Another host says itself whether it is there.
    if not client.host and not os.path.isfile(name):
        reason = "it is not a file" if os.path.exists(name) else "no such file"
        raise errors.NotFound(f"cannot {verb} {name}: {reason}")
    return whole


def _make(
    client: "Client",
    arguments: "argparse.Namespace",
    verb: str,
    body: "dict[str, Any]",
    label: str,
    past: str,
) -> int:
    if arguments.name is not None:
        body["name"] = arguments.name
    submitted = submit([Selected(label, label)], lambda _: client.post(path("templates", verb), body))

    def done(one: Submitted) -> str:
        result = (one.task or {}).get("result")
        return f"{past} {result['name'] if isinstance(result, dict) and 'name' in result else one.label}"

    return finish(client, submitted, arguments, done, single=True)


def _remove_arguments(parser: "argparse.ArgumentParser") -> None:
    action = parser.add_argument("templates", metavar="TEMPLATE", nargs="+", help="name of a template")
    words(action, "templates")
    task_options(parser)


def _remove(arguments: "argparse.Namespace", client: "Client") -> int:
    chosen = [Selected(template, template) for template in arguments.templates]
    submitted = submit(chosen, lambda one: client.request("DELETE", path("templates", one.ref)))
    return finish(client, submitted, arguments, lambda one: f"removed {one.label}")


COMMANDS = {
    "template list": Command(_list_arguments, _list, examples=("sysctr template list",)),
    "template show": Command(_show_arguments, _show, examples=("sysctr template show debian-12",)),
    "template build": Command(
        _build_arguments,
        _build,
        examples=("sysctr template build debian-12", "sysctr template build ./mine.toml --name mine"),
    ),
    "template import": Command(
        _import_arguments, _import, examples=("sysctr template import alpine-rootfs.tar.gz --name alpine",)
    ),
    "template remove": Command(_remove_arguments, _remove, examples=("sysctr template remove alpine",)),
}
