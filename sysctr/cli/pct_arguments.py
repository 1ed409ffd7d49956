"""What was typed after `pct` and `vzdump`, read as Proxmox reads it: -memory 512, --memory=512, --start.

A table of what a subcommand takes decides; nothing of Proxmox's is unknown by accident, so what is in no list
is an error, as it is there.
"""

import re
import shlex

from sysctr import errors
from sysctr.cli.output import notice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TRUE = ("1", "on", "yes", "true")
_FALSE = ("0", "off", "no", "false")
_NUMBERED = re.compile(r"(net|mp|dev|unused)(0|[1-9][0-9]{0,2})", re.IGNORECASE)
_LIST = re.compile(r"[,;\s\0]+")


class Subcommand:
    """What one subcommand takes: its words, its options by kind, and what it becomes.

    `plan` names the function (module.function below sysctr.cli) that returns the steps, `show` the one that
    prints; with neither it is refused for `reason`. An option in `idle` is taken and has no effect (with `=`
    at its end it has a value), one in `refused` is an error; both say why.
    """

    __slots__ = (
        "flags", "idle", "numbered", "plan", "reason", "refused", "runs", "show", "trailing", "valued",
        "values", "words",
    )  # fmt: skip

    def __init__(
        self,
        words: str,
        runs: str,
        *,
        plan: str = "",
        show: str = "",
        reason: str = "",
        values: str = "",
        flags: str = "",
        numbered: bool = False,
        trailing: bool = False,
        idle: "Mapping[str, str] | None" = None,
        refused: "Mapping[str, str] | None" = None,
    ) -> None:
        self.words = words.split()
        self.runs = runs
        self.plan = plan
        self.show = show
        self.reason = reason
        self.values = values.split()
        self.flags = flags.split()
        self.numbered = numbered
        self.trailing = trailing
        self.idle = {name.rstrip("="): why for name, why in (idle or {}).items()}
        self.valued = [*self.values, *(name[:-1] for name in idle or {} if name.endswith("="))]
        self.refused = dict(refused or {})

    def names(self) -> "list[str]":
        """Return every option by its full name; those with a number (net0) are not among them."""
        return [*self.values, *self.flags, *self.idle, *self.refused]


class Typed:
    """One command line: its words by name, its options, and what was learned about it."""

    __slots__ = ("name", "options", "program", "trailing", "words")

    def __init__(self, program: str, name: str) -> None:
        self.program = program
        self.name = name
        self.words: list[str] = []
        self.options: dict[str, list[str]] = {}
        self.trailing: list[str] = []

    @property
    def shown(self) -> str:
        """Return how the command is called, for messages."""
        return f"{self.program} {self.name}".strip()

    def last(self, option: str, default: str = "") -> str:
        """Return what was given last for an option."""
        return self.options.get(option, [default])[-1]

    def flag(self, option: str, *, default: bool = False) -> bool:
        """Return an option that is true or false."""
        return truth(self.last(option, str(int(default))))

    def error(self, reason: str, hint: str = "") -> errors.UsageError:
        """Return the error of a wrong command line."""
        return errors.UsageError(
            f"cannot run `{self.shown}`: {reason}", hint or f"see `sysctr {self.shown} --help`"
        )


class Step:
    """One command line of ours; `shown` is what is printed of it where the line itself says too much."""

    __slots__ = ("argv", "shown")

    def __init__(self, *argv: str, shown: "Sequence[str]" = ()) -> None:
        self.argv = list(argv)
        self.shown = list(shown or argv)

    def __str__(self) -> str:
        return f"+ sysctr {shlex.join(self.shown)}"


def note(text: str) -> None:
    """Tell whoever typed it what is not as Proxmox would have it."""
    notice(f"note: {text}")


def truth(text: str) -> bool:
    """Read a truth value as Proxmox writes it.

    >>> truth("1"), truth("off")
    (True, False)
    """
    lowered = text.lower()
    if lowered in _TRUE or lowered in _FALSE:
        return lowered in _TRUE
    raise errors.UsageError(f"cannot tell whether {text!r} is true or false", "say 1 or 0")


def listed(text: str) -> "list[str]":
    """Split a list, which may have commas, semicolons or spaces between its items.

    >>> listed("101, 102;103")
    ['101', '102', '103']
    """
    return [item for item in _LIST.split(text) if item]


def read(program: str, name: str, takes: Subcommand, argv: "Sequence[str]") -> Typed:
    """Read a command line; UsageError for what Proxmox would not take.

    >>> takes = Subcommand("VMID", "", values="memory", flags="start", numbered=True)
    >>> typed = read("pct", "set", takes, ["101", "-memory", "512", "--start", "-net0=name=eth0"])
    >>> typed.words, typed.options
    (['101'], {'memory': ['512'], 'start': ['1'], 'net0': ['name=eth0']})
    """
    typed = Typed(program, name)
    many = takes.words[-1:] == ["VMID…"]
    left = list(argv)
    while left:
        word = left.pop(0)
        if word == "--" or (takes.trailing and len(typed.words) == len(takes.words) and not _option(word)):
            rest = left if word == "--" else [word, *left]
            if takes.trailing:
                typed.trailing = rest
            else:
                typed.words += rest
            break
        if not _option(word):
            typed.words.append(word)
            continue
        given, equals, value = word.lstrip("-").partition("=")
        option = _full_name(typed, takes, given)
        if option in takes.refused:
            raise errors.Refused(f"cannot run `{typed.shown} --{option}`: {takes.refused[option]}")
        if not equals:
            value = _value(typed, takes, option, left)
        typed.options.setdefault(option, []).append(value)
    if len(typed.words) < len(takes.words) - many:
        raise typed.error(f"{takes.words[len(typed.words)]} is missing")
    if len(typed.words) > len(takes.words) and not many:
        raise typed.error(f"{typed.words[len(takes.words)]!r} is one word too many")
    for option in typed.options:
        if option in takes.flags:
            typed.flag(option)
    return typed


def _option(word: str) -> bool:
    return word.startswith("-") and word != "-"


def _full_name(typed: Typed, takes: Subcommand, given: str) -> str:
    """Return an option by its whole name: Proxmox minds no case, and takes what is short and clear."""
    lowered = given.lower()
    if takes.numbered and _NUMBERED.fullmatch(given):
        return lowered
    known = takes.names()
    for name in known:
        if name.lower() == lowered:
            return name
    near = sorted({name for name in known if lowered and name.lower().startswith(lowered)})
    if len(near) == 1:
        return near[0]
    if near:
        raise typed.error(f"--{given} may be {' or '.join(f'--{name}' for name in near)}")
    raise typed.error(f"there is no option --{given}")


def _value(typed: Typed, takes: Subcommand, option: str, left: "list[str]") -> str:
    """Take the value of an option from the words that follow it."""
    if option not in takes.valued and not _NUMBERED.fullmatch(option):
        return left.pop(0) if left and left[0].lower() in (*_TRUE, *_FALSE) else "1"
    if option == "password" and (not left or _option(left[0])):
        # Proxmox asks for one then.
        return ""
    if not left:
        raise typed.error(f"--{option} has no value")
    return left.pop(0)
