"""Help and shell completion: the only commands that build the parsers of all others."""

import argparse
import sys

from sysctr import cli, errors
from sysctr.cli.command import Command, Parser, build_parser, words
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sysctr.client import Client

_GROUPS = (
    ("daily", "every day"),
    ("look", "look"),
    ("change", "change"),
    ("host", "this host"),
    ("help", "help"),
)
_NAME_CELLS = 17
_SHELLS = ("bash", "zsh", "fish")
_KINDS = ("containers", "templates", "pools", "peers", "tasks")


def overview(groups: "tuple[str, ...]") -> str:
    """Return the commands of these groups with what each does."""
    lines = ["usage: sysctr COMMAND [options]"]
    for group, title in _GROUPS:
        if group not in groups:
            continue
        lines += ["", f"{title}:"]
        lines += [
            f"  {name:<{_NAME_CELLS}} {summary}"
            for name, (_, of, summary) in cli.COMMANDS.items()
            if of == group
        ]
    return "\n".join(lines)


def print_short() -> None:
    """Print what `sysctr` alone shows: the daily commands, and where the others are."""
    print(overview(("daily",)))
    print("\n`sysctr help` lists all commands, `sysctr COMMAND --help` shows options and examples")


def _help_arguments(parser: argparse.ArgumentParser) -> None:
    action = parser.add_argument("words", metavar="COMMAND", nargs="*", help="a command; none lists them all")
    words(action, "commands")


def _help(arguments: argparse.Namespace, client: "Client") -> None:
    name = " ".join(arguments.words)
    if not name:
        print(overview(tuple(group for group, _ in _GROUPS)))
        print("\n`sysctr COMMAND --help` shows options, examples and exit codes")
    elif name in cli.COMMANDS or name in cli.FAMILIES:
        if name in cli.COMMANDS:
            build_parser(name, cli.COMMANDS[name][2], cli.load(name)).print_help()
            print()
        if name in cli.FAMILIES:
            _print_family(name)
    else:
        raise cli.unknown(arguments.words[0], arguments.words[1:])


def _print_family(name: str) -> None:
    print(f"usage: sysctr {name} COMMAND [options]\n")
    for known, (_, _, summary) in cli.COMMANDS.items():
        if known.startswith(f"{name} "):
            print(f"  {known:<{_NAME_CELLS}} {summary}")


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=_SHELLS, help="the shell that will read the script")


def _completion(arguments: argparse.Namespace, client: "Client") -> None:
    try:
        import shtab
    except ImportError as error:
        raise errors.SysctrError(
            "cannot make a completion script: the Python package shtab is missing", "install it with pip"
        ) from error
    parser = whole_parser()
    _mark(parser, shtab)
    sys.stdout.write(shtab.complete(parser, shell=arguments.shell))


def whole_parser() -> argparse.ArgumentParser:
    """Return one parser of all commands, for completion and for manual pages."""
    whole = Parser(prog="sysctr", description="System containers.")
    families = {"": whole.add_subparsers(dest="command", metavar="COMMAND")}
    for family in cli.FAMILIES:
        above, _, word = family.rpartition(" ")
        parser = families[above].add_parser(word, help=f"the commands of {family}", add_help=True)
        if family in cli.COMMANDS:
            _add_options(parser, family)
        families[family] = parser.add_subparsers(dest=f"{word} command", metavar="COMMAND")
    for name, (_, _, summary) in cli.COMMANDS.items():
        if name.startswith("_") or name in cli.FAMILIES:
            continue
        family, _, below = name.rpartition(" ")
        command = cli.load(name)
        made = build_parser(name, summary, command)
        families[family].add_parser(
            below,
            help=summary,
            parents=[made],
            add_help=False,
            prog=made.prog,
            usage=made.usage,
            description=made.description,
            epilog=made.epilog,
            formatter_class=made.formatter_class,
        )
    return whole


def _add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Give a family the options of the command of the same name, whose arguments would pass for commands."""
    for action in build_parser(name, cli.COMMANDS[name][2], cli.load(name))._actions:
        if action.option_strings and action.dest != "help":
            parser._add_action(action)


def _mark(parser: argparse.ArgumentParser, shtab) -> None:  # type: ignore[no-untyped-def]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _mark(below, shtab)
        kind = getattr(action, "complete_words", "")
        if kind == "files":
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif kind:
            action.complete = shtab.cmd(f"sysctr _words {kind} 2>/dev/null")  # type: ignore[attr-defined]


def _words_arguments(parser: argparse.ArgumentParser) -> None:
    others = ("commands", "keys", "snapshots", "archives", "jobs", "numbers")
    parser.add_argument("kinds", metavar="KIND", nargs="+", choices=(*_KINDS, *others))


def _words(arguments: argparse.Namespace, client: "Client") -> None:
    for kind in arguments.kinds:
        _print_words(kind, client)


def _print_words(kind: str, client: "Client") -> None:
    if kind == "commands":
        print("\n".join(dict.fromkeys(name.split(" ")[0] for name in cli.COMMANDS if name[0] != "_")))
        return
    if kind == "keys":
        from sysctr.cli.keys import KEYS

        print("\n".join(f"{usage.partition('=')[0]}=" for usage, _, _ in KEYS))
        return
    # A press of the tab key starts no daemon.
    client.start = False
    if kind == "snapshots":
        # Of all containers: each shell has a way of its own to tell what stands before on the line.
        names = set()
        for container in field(client.get(path("containers"), timeout_s=2.0), "containers"):
            answer = client.get(path("containers", str(container["id"]), "snapshots"), timeout_s=2.0)
            names.update(one["name"] for one in field(answer, "snapshots"))
        print("\n".join(sorted(names)))
        return
    if kind == "jobs":
        print("\n".join(one["name"] for one in field(client.get(path("backup-jobs"), timeout_s=2.0), "jobs")))
        return
    if kind == "archives":
        found = field(client.get(path("backups"), timeout_s=2.0), "archives")
        print("\n".join(one["name"] for one in found if one["name"].isprintable()))
        return
    if kind == "numbers":
        for one in field(client.get(path("containers"), timeout_s=2.0), "containers"):
            print(one["id"])
        return
    found = field(client.get(path(kind), timeout_s=2.0), kind)
    for one in found:
        print(one["id"] if kind == "tasks" else one["name"])


COMMANDS = {
    "help": Command(_help_arguments, _help, examples=("sysctr help", "sysctr help create")),
    "completion": Command(
        _completion_arguments,
        _completion,
        examples=(
            "sysctr completion bash > /etc/bash_completion.d/sysctr",
            "sysctr completion zsh > /usr/share/zsh/vendor-completions/_sysctr",
        ),
    ),
    "_words": Command(_words_arguments, _words, examples=("sysctr _words containers",)),
}
