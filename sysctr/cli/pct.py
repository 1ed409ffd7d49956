"""`sysctr pct`: the arguments of Proxmox VE's pct as they are typed, run as commands of sysctr."""

import argparse
import sys

from sysctr import cli, errors
from sysctr.cli.command import Command, words
from sysctr.cli.output import notice, print_error
from sysctr.cli.pct_arguments import Step, Subcommand, Typed, note, read
from sysctr.cli.pct_table import ALIASES, SUBCOMMANDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from sysctr.client import Client

# Proxmox knows two ends of a command; why it failed is on standard error.
FAILED = 255
# Those of a user who stopped waiting and of a reader who left, which are nobody's failure.
_PASSED_ON = (0, 130, 141)
_EXITS = (
    (0, "done"),
    (255, "failed, for whatever reason: standard error says it"),
    ("0-255", "of exec and enter: that of the program"),
)


def arguments_of(parser: argparse.ArgumentParser, known: "Sequence[str]" = ()) -> None:
    """Declare what the help and the shells show; what was typed is read by the tables."""
    if known:
        parser.usage = "sysctr pct COMMAND [VMID …] [options as for Proxmox VE]"
        parser.add_argument("command", metavar="COMMAND", choices=known, help="what to do, see below")
        words(parser.add_argument("rest", metavar="…", nargs="*", help="as for Proxmox VE"), "numbers")
    else:
        parser.usage = "sysctr vzdump [VMID …] [options as for Proxmox VE]"
        words(parser.add_argument("rest", metavar="VMID", nargs="*", help="containers"), "numbers")


def parse(parser: argparse.ArgumentParser, argv: "list[str]") -> argparse.Namespace:
    """Keep the words as they are; help that is asked for is printed at once."""
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    if argv[:1] in (["-h"], ["--help"], ["-help"]):
        parser.print_help()
        raise SystemExit(0)
    return argparse.Namespace(typed=argv)


def as_proxmox(act: "Callable[[], int | None]") -> int:
    """Do something and return the exit code that Proxmox has for how it went."""
    try:
        code = act() or 0
    except errors.SysctrError as error:
        print_error(error)
        code = error.exit_code
    return code if code in _PASSED_ON else FAILED


def load(name: str) -> "Any":
    """Return a function by its module and name below sysctr.cli."""
    module, _, function = name.partition(".")
    __import__(f"sysctr.cli.{module}")
    return getattr(sys.modules[f"sysctr.cli.{module}"], function)


def run_steps(steps: "Sequence[Step]", client: "Client", *, quiet: bool = False) -> int:
    """Run command lines of ours one after the other, to the first that fails; each is told before."""
    # The steps connect by themselves.
    client.close()
    for step in steps:
        if not quiet:
            notice(str(step))
        sys.stdout.flush()
        code = cli.run(step.argv)
        if code:
            return code
    return 0


def tell_idle(typed: Typed, takes: Subcommand) -> None:
    """Name the options that were given and have no effect."""
    for option in typed.options:
        if option in takes.idle:
            note(f"--{option} has no effect: {takes.idle[option]}")


def _run(arguments: argparse.Namespace, client: "Client") -> int:
    argv: list[str] = arguments.typed
    name = ALIASES.get(argv[0], argv[0]) if argv else ""
    takes = SUBCOMMANDS.get(name)
    # What follows the words of exec is the program's.
    own = argv[1:2] if takes is not None and takes.trailing else argv[1:]
    if takes is not None and not {"-h", "-help", "--help"}.isdisjoint(own):
        print(help_of("pct", name, takes))
        return 0
    if name in ("exec", "enter") and takes is not None:
        return _run_inside(name, takes, argv[1:], client)
    return as_proxmox(lambda: _translate(name, takes, argv[1:], client))


def _run_inside(name: str, takes: Subcommand, argv: "list[str]", client: "Client") -> int:
    try:
        return _translate(name, takes, argv, client)
    except errors.SysctrError as error:
        print_error(error)
        return FAILED


def _translate(name: str, takes: "Subcommand | None", argv: "list[str]", client: "Client") -> int:
    if takes is None:
        raise _unknown(name)
    if takes.reason:
        raise errors.Refused(f"cannot run `pct {name}`: {takes.reason}")
    typed = read("pct", name, takes, argv)
    tell_idle(typed, takes)
    if takes.show:
        return int(load(takes.show)(typed, client) or 0)
    steps: list[Step] = load(takes.plan)(typed, client)
    # Standard error of exec is the program's too, and scripts read it.
    return run_steps(steps, client, quiet=name == "exec" and not sys.stderr.isatty())


def _unknown(name: str) -> errors.UsageError:
    import difflib

    if not name:
        return errors.UsageError("cannot run `pct`: no command is given", "see `sysctr pct --help`")
    near = difflib.get_close_matches(name, SUBCOMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean `sysctr pct {near[0]}`?" if near else "see `sysctr pct --help`"
    return errors.UsageError(f"cannot run `pct {name}`: no such command", hint)


def help_of(program: str, name: str, takes: Subcommand) -> str:
    """Return what is to be known of one subcommand."""
    lines = [f"usage: sysctr {' '.join([program, *([name] if name else []), *takes.words])} [options]", ""]
    lines.append(f"  runs: {takes.runs}")
    if takes.reason:
        lines.append(f"  why: {takes.reason}")
    named = [f"--{option}" for option in takes.values] + [f"--{option} [1|0]" for option in takes.flags]
    named += [f"--{option}N" for option in ("net", "mp", "dev") if takes.numbered]
    if named and not takes.reason:
        lines += ["", "options, with one dash or two:", *(f"  {option}" for option in sorted(named))]
    for title, table in (("have no effect", takes.idle), ("are refused", takes.refused)):
        if table:
            lines += ["", f"these {title}:", *(f"  --{option}: {why}" for option, why in table.items())]
    return "\n".join(lines)


def _more() -> "list[str]":
    rows = [(" ".join([name, *takes.words]), takes) for name, takes in SUBCOMMANDS.items()]
    wide = max(len(usage) for usage, _ in rows)
    lines = ["what is run (`sysctr pct COMMAND --help` has the options):"]
    lines += [f"  {usage:<{wide}}  {takes.runs}" for usage, takes in rows]
    return [
        *lines,
        "",
        "What is run is told on standard error, for exec only on a terminal. What only looks prints in",
        "Proxmox's format.",
        "A storage is the pool of its name, or else the default one. A template is found by its name:",
        "local:vztmpl/debian-12-standard_12.7-1_amd64.tar.zst is debian-12; a file is imported first.",
        "With a link to sysctr that is called pct (ln -s sysctr /usr/local/bin/pct) `pct` alone does it.",
        "",
    ]


COMMANDS = {
    "pct": Command(
        lambda parser: arguments_of(parser, tuple(SUBCOMMANDS)),
        _run,
        examples=(
            "sysctr pct create 101 local:vztmpl/debian-12-standard_12.7-1_amd64.tar.zst -hostname web \\",
            "    -memory 1024 -rootfs local:8 -net0 name=eth0,bridge=vmbr0,ip=dhcp -start 1",
            "sysctr pct set 101 -memory 2048 -mp0 local:8,mp=/data",
            "sysctr pct exec 101 -- systemctl is-system-running",
        ),
        exits=_EXITS,
        more=_more(),
        parse=parse,
    ),
}
