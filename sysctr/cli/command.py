"""What a command is: its options, what it does, its examples and its exit codes."""

import argparse
import os

from sysctr import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any, NoReturn

    from sysctr.client import Client

EXIT_CODES = (
    (0, "done"),
    (1, "failed"),
    (2, "wrong usage"),
    (3, "no such container, template or task"),
    (4, "wrong state, or busy"),
    (5, "refused"),
    (6, "no daemon"),
)

_DAY_S = 86400


class Command:
    """One command: how its parser is filled, and the function that does it and returns the exit code."""

    __slots__ = ("arguments", "examples", "exits", "more", "parse", "run")

    def __init__(
        self,
        arguments: "Callable[[argparse.ArgumentParser], None]",
        run: "Callable[[argparse.Namespace, Client], int | None]",
        *,
        examples: "Sequence[str]",
        exits: "Sequence[tuple[int | str, str]]" = EXIT_CODES,
        more: "Sequence[str]" = (),
        parse: "Callable[[argparse.ArgumentParser, list[str]], argparse.Namespace] | None" = None,
    ) -> None:
        self.arguments = arguments
        self.run = run
        self.examples = examples
        self.exits = exits
        self.more = more
        self.parse = parse or argparse.ArgumentParser.parse_intermixed_args


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The formatter of --help; argparse makes one for every option that is declared, wanted or not."""

    def __init__(self, prog: str) -> None:
        # Without a width argparse asks shutil, which imports every compressor there is: 5 ms.
        try:
            columns = os.get_terminal_size(1).columns
        except (OSError, ValueError):
            columns = 0
        super().__init__(prog, width=min(max(columns, 60), 110) - 2 if columns else 98)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one line, a hint, exit code 2."""

    def error(self, message: str) -> "NoReturn":
        raise errors.UsageError(f"cannot run `{self.prog}`: {message}", f"see `{self.prog} --help`")


def build_parser(name: str, summary: str, command: Command) -> Parser:
    """Return the parser of one command."""
    parser = Parser(
        prog=f"sysctr {name}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=_epilog(command),
        formatter_class=HelpFormatter,
        # An abbreviated option means another thing after the next release.
        allow_abbrev=False,
    )
    command.arguments(parser)
    return parser


def _epilog(command: Command) -> str:
    lines = [*command.more, "examples:", *(f"  {example}" for example in command.examples), "", "exit codes:"]
    lines += [f"  {code:<5} {meaning}" for code, meaning in command.exits]
    return "\n".join(lines)


def words(action: argparse.Action, kind: str) -> None:
    """Let the shells complete this argument with `containers`, `peers`, `files`, or with several of them."""
    action.complete_words = kind  # type: ignore[attr-defined]


def one_container(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names one container."""
    action = parser.add_argument("container", metavar="CT", help="id or name of the container")
    words(action, "containers")


def containers(parser: argparse.ArgumentParser, which: str = "") -> None:
    """Add the arguments that choose containers: names, --all, --tag."""
    action = parser.add_argument("containers", metavar="CT", nargs="*", help="id or name of a container")
    words(action, "containers")
    parser.add_argument("--all", action="store_true", help=f"all containers{which}")
    parser.add_argument("--tag", metavar="T", help=f"all containers with this tag{which}")


def json_option(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def quiet_option(parser: argparse.ArgumentParser) -> None:
    """Add -q."""
    parser.add_argument("-q", "--quiet", action="store_true", help="print ids only")


def task_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command has that starts a task."""
    parser.add_argument("--no-wait", action="store_true", help="print the task's id and do not wait for it")
    json_option(parser)
    quiet_option(parser)


def for_each(items: "Iterable[Any]", act: "Callable[[Any], object]") -> int:
    """Do one thing to each; print what fails, go on, and return the worst exit code."""
    from sysctr.cli.output import print_error

    worst = 0
    for item in items:
        try:
            act(item)
        except errors.NoDaemon:
            raise
        except errors.SysctrError as error:
            print_error(error)
            worst = max(worst, error.exit_code)
    return worst


def seconds(text: str) -> float:
    """Read the value of an option that is a time; argparse puts its name before the error.

    >>> seconds("90"), seconds("0.5")
    (90.0, 0.5)
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    # A NaN is in no range.
    if not 0 <= value <= _DAY_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to {_DAY_S}")
    return value


class Selected:
    """A container that a command works on: how the API is asked for it, and how the user knows it."""

    __slots__ = ("label", "ref")

    def __init__(self, ref: str, label: str) -> None:
        self.ref = ref
        self.label = label


def select(client: "Client", arguments: argparse.Namespace, states: "Sequence[str]" = ()) -> "list[Selected]":
    """Return the containers that the arguments choose; a rule as --all chooses only those in `states`."""
    from sysctr.client import field, path

    onboot = getattr(arguments, "onboot", False)
    by_rule = arguments.all or arguments.tag is not None or onboot
    if by_rule and arguments.containers:
        raise errors.UsageError("cannot take names together with --all, --tag or --onboot")
    if not by_rule:
        if not arguments.containers:
            raise errors.UsageError(
                "cannot choose a container: none is named", "give an id or a name, --all or --tag T"
            )
        return [Selected(ref, ref) for ref in dict.fromkeys(arguments.containers)]
    found: list[dict[str, Any]] = field(client.get(path("containers"), {"tag": arguments.tag}), "containers")
    return [
        Selected(str(container["id"]), container["name"])
        for container in found
        if (not states or container["state"] in states) and (container["onboot"] or not onboot)
    ]
