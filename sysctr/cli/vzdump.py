"""`sysctr vzdump`: the arguments of Proxmox VE's vzdump as they are typed, run as `sysctr backup`."""

import contextlib
import io
import os

from sysctr import errors
from sysctr.cli.command import Command
from sysctr.cli.output import notice
from sysctr.cli.pct import FAILED, arguments_of, as_proxmox, parse, run_steps, tell_idle
from sysctr.cli.pct_arguments import Step, Subcommand, Typed, listed, note, read
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from sysctr.client import Client

_COMPRESSORS = {"0": "none", "1": "lzo", "gzip": "gzip", "lzo": "lzo", "zstd": "zstd"}
_NAMES_A_LINE = 4
_KEEP = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
_STANDARD_EXCLUDES = ("/tmp/?*", "/var/tmp/?*", "/var/run/?*.pid")
TAKES = Subcommand(
    "VMID…", "sysctr backup, and sysctr backup prune after it",
    values="exclude mode compress storage dumpdir notes-template exclude-path bwlimit prune-backups maxfiles "
    "node",
    flags="all protected stdout remove stop quiet stdexcludes",
    idle={
        **dict.fromkeys(
            ("mailto=", "mailnotification=", "notification-mode=", "notification-policy=",
             "notification-target="),
            "only jobs send mail (`sysctr backup job add --mail-to`); here the exit code says how it went",
        ),
        "stopwait=": "a container is waited for as `sysctr stop` does it",
        "lockwait=": "a backup waits for nothing but the task that holds its container",
        "ionice=": "sysctr has no priorities of its own",
        "tmpdir=": "there is no temporary copy",
        "pigz=": "gzip is fast without it",
        "zstd=": "zstd takes several processors by itself",
        "performance=": "there is nothing to tune",
        "fleecing=": "it is for virtual machines",
        "job-id=": "it is of no job",
        "size=": "archives have no such limit",
        "pbs-change-detection-mode=": "archives go to a directory",
    },
    refused={
        "script": "sysctr runs no hook scripts",
        "pool": "sysctr knows no pools of Proxmox's permissions; `sysctr backup --tag T` chooses by tag",
    },
)  # fmt: skip
# option: what becomes of it, for the help
_TABLE = (
    ("VMID… or --all", "CT… or --all"),
    ("--exclude 101,102", "all but these, by their numbers"),
    ("--mode snapshot|suspend|stop", "--mode"),
    ("--compress 0|1|gzip|lzo|zstd", "--compress none|lzo|gzip|lzo|zstd; without it what host.toml says"),
    ("--dumpdir D", "--dir D"),
    ("--storage S", "local is the default directory; others are refused: give --dumpdir"),
    ("--notes-template T", "--notes T"),
    ("--protected 1", "--protected"),
    ("--exclude-path P", "--exclude P"),
    ("--stdexcludes 1", "--exclude '/tmp/?*' and the others of Proxmox"),
    ("--bwlimit KIB", "--bwlimit KIBK"),
    ("--stdout", "--stdout"),
    ("--prune-backups keep-last=3", "sysctr backup prune --keep-last 3, when it went well"),
    ("--maxfiles N", "the same with --keep-last N"),
    ("--remove 0", "nothing is pruned"),
    ("--stop", "sysctr task cancel, for backups that run"),
    ("--quiet 1", "prints nothing but errors"),
)


def _run(arguments: "argparse.Namespace", client: "Client") -> int:
    return as_proxmox(lambda: _translate(arguments.typed, client))


def _translate(argv: "list[str]", client: "Client") -> int:
    typed = read("vzdump", "", TAKES, argv)
    quiet = typed.flag("quiet")
    if not quiet:
        tell_idle(typed, TAKES)
    steps = plan(typed, client)
    # An archive on standard output is no chatter.
    silent = quiet and not typed.flag("stdout")
    with contextlib.redirect_stdout(io.StringIO()) if silent else contextlib.nullcontext():
        return run_steps(steps, client, quiet=quiet)


def plan(typed: Typed, client: "Client") -> "list[Step]":
    """Return the command lines of ours."""
    node = typed.last("node")
    if node not in ("", "localhost", os.uname().nodename):
        raise errors.Refused(f"cannot run `vzdump --node {node}`: this host is {os.uname().nodename}")
    if typed.flag("stop"):
        return _stop(client)
    chosen = _chosen(typed, client)
    if not chosen:
        notice("nothing to back up")
        return []
    options = _options(typed)
    where = _directory(typed)
    if typed.flag("stdout"):
        return [Step("backup", *chosen, *options, "--stdout")]
    text = _unescaped(typed.last("notes-template"))
    notes = [f"--notes={text}"] if text else []
    protected = ["--protected"] if typed.flag("protected") else []
    steps = [Step("backup", *chosen, *options, *where, *notes, *protected)]
    if keep := _rules(typed):
        steps.append(Step("backup", "prune", *([] if chosen == ["--all"] else chosen), *keep, *where))
    return steps


def _stop(client: "Client") -> "list[Step]":
    tasks = [
        task["id"]
        for state in ("running", "queued")
        for task in field(client.get(path("tasks"), {"state": state}), "tasks")
        if task["kind"] == "backup"
    ]
    if not tasks:
        notice("no backup runs")
    return [Step("task", "cancel", *tasks)] if tasks else []


def _chosen(typed: Typed, client: "Client") -> "list[str]":
    """Return the containers, or --all."""
    named = [item for word in typed.words for item in listed(word)]
    left_out = {item for text in typed.options.get("exclude", []) for item in listed(text)}
    if named and typed.flag("all"):
        raise typed.error("it is either containers or --all")
    if not named and not typed.flag("all") and not left_out:
        raise typed.error("no container is named", "vzdump 101, or vzdump --all")
    if named:
        return [one for one in named if one not in left_out]
    if not left_out:
        return ["--all"]
    found = field(client.get(path("containers")), "containers")
    return [str(one["id"]) for one in found if left_out.isdisjoint((str(one["id"]), one["name"]))]


def _options(typed: Typed) -> "list[str]":
    """Return what is said of any archive, wherever it goes."""
    options: list[str] = []
    if mode := typed.last("mode"):
        options += ["--mode", mode]
    if compress := typed.last("compress"):
        if compress not in _COMPRESSORS:
            raise typed.error(f"--compress {compress} is none of {', '.join(_COMPRESSORS)}")
        options += ["--compress", _COMPRESSORS[compress]]
    if typed.flag("stdexcludes"):
        options += [f"--exclude={pattern}" for pattern in _STANDARD_EXCLUDES]
    options += [f"--exclude={pattern}" for pattern in typed.options.get("exclude-path", [])]
    if limit := typed.last("bwlimit"):
        if not (limit.isascii() and limit.isdigit()):
            raise typed.error(f"--bwlimit {limit} is not a number of KiB a second")
        options += ["--bwlimit", f"{int(limit)}K" if int(limit) else "0"]
    return options


def _directory(typed: Typed) -> "list[str]":
    if "dumpdir" in typed.options:
        if "storage" in typed.options:
            raise typed.error("it is either --storage or --dumpdir")
        return ["--dir", typed.last("dumpdir")]
    storage = typed.last("storage")
    if storage not in ("", "local"):
        raise errors.Refused(
            f"cannot run `vzdump --storage {storage}`: sysctr writes archives to directories",
            f"vzdump --dumpdir DIR, such as where {storage} is mounted",
        )
    if storage and not typed.flag("quiet"):
        note("the storage local is the directory of [backup] in host.toml, or /var/lib/sysctr/backups")
    return []


def _rules(typed: Typed) -> "list[str]":
    """Return the rules by which archives are pruned afterwards; none where nothing is."""
    if "remove" in typed.options and not typed.flag("remove"):
        return []
    text = typed.last("prune-backups")
    if count := typed.last("maxfiles"):
        if text:
            raise typed.error("it is either --maxfiles or --prune-backups")
        text = f"keep-last={count}" if count != "0" else "keep-all=1"
    keep: list[str] = []
    for item in listed(text):
        name, _, count = item.partition("=")
        if name == "keep-all" and count == "1":
            return []
        if name.removeprefix("keep-") not in _KEEP or not (count.isascii() and count.isdigit()):
            raise typed.error(f"{item!r} is no rule such as keep-last=3")
        keep += [f"--{name}", count] if int(count) else []
    if typed.flag("remove") and not text:
        note("--remove has no effect without rules: give --prune-backups, or run `sysctr backup prune`")
    return keep


def _unescaped(text: str) -> str:
    r"""Return notes with the line ends that are written as \n.

    >>> _unescaped(r"a\nb\\n")
    'a\nb\\n'
    """
    return "\\".join(part.replace("\\n", "\n") for part in text.split("\\\\"))


def _idle_lines() -> "list[str]":
    names = [f"--{name}" for name in TAKES.idle]
    return [f"  {' '.join(names[at : at + _NAMES_A_LINE])}" for at in range(0, len(names), _NAMES_A_LINE)]


def _more() -> "list[str]":
    wide = max(len(typed) for typed, _ in _TABLE)
    return [
        "what is run, told on standard error (one dash does as well as two):",
        *(f"  {typed:<{wide}}  {ours}" for typed, ours in _TABLE),
        *("", "have no effect, and are named:", *_idle_lines()),
        *("", "are refused:", *(f"  --{name}: {why}" for name, why in TAKES.refused.items())),
        "",
    ]


COMMANDS = {
    "vzdump": Command(
        arguments_of,
        _run,
        examples=(
            "sysctr vzdump 101 -mode snapshot -compress zstd -dumpdir /mnt/backups",
            "sysctr vzdump --all --exclude 105 --prune-backups keep-daily=7,keep-weekly=4",
            "sysctr vzdump 101 --stdout | ssh other sysctr pct restore 101 -",
        ),
        exits=((0, "done"), (FAILED, "failed, or not all could be kept: standard error says it")),
        more=_more(),
        parse=parse,
    ),
}
