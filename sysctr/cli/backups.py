"""The backups that there are: list, show, remove, protect, describe and prune them."""

import os
import sys
import time

from sysctr import errors
from sysctr.cli.command import Command, Selected, for_each, json_option, task_options, words
from sysctr.cli.output import duration, moment, notice, plain, print_fields, print_json, print_table, size
from sysctr.cli.progress import Submitted, finish, submit
from sysctr.cli.table import Column, neutralise
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from sysctr.client import Client

RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
_UNITS = {"hourly": "hours", "daily": "days", "weekly": "weeks", "monthly": "months", "yearly": "years"}
# A name as vzdump gives it, which is how an archive is called.
_NAME_CELLS = 42
_COLUMNS = (
    Column("CONTAINER", flexible=True),
    Column("AGE", right=True),
    Column("SIZE", right=True),
    Column("ARCHIVE", flexible=True, narrowest=_NAME_CELLS),
    Column("STATE", optional=True),
    Column("NOTES", flexible=True, narrowest=10, optional=True),
)
_SUMMARY = (
    Column("ID", right=True),
    Column("NAME", flexible=True),
    Column("LAST BACKUP"),
    Column("AGE", right=True),
    Column("ARCHIVES", right=True),
    Column("SIZE", right=True),
)
_VERDICTS = (
    Column("MARK", colour=lambda mark: "31" if mark == "remove" else ""),
    Column("CONTAINER", flexible=True),
    Column("AGE", right=True),
    Column("SIZE", right=True),
    Column("ARCHIVE", flexible=True, narrowest=_NAME_CELLS),
)


def archive_ref(text: str, client: "Client") -> str:
    """Return how the API is asked for an archive: by its absolute path, or by a name that is no file here."""
    if text and ("/" in text or (not client.host and os.path.lexists(text))):
        return client.whole_path(text)
    return text


def directory_option(parser: "argparse.ArgumentParser", meaning: str) -> None:
    """Add --dir, the directory of archives."""
    words(parser.add_argument("--dir", metavar="D", dest="directory", help=meaning), "files")


def absolute(directory: "str | None", client: "Client") -> "str | None":
    """Return a directory as the API takes it."""
    return None if directory is None else client.whole_path(directory)


def keep_options(parser: "argparse.ArgumentParser") -> None:
    """Add --keep-last to --keep-yearly."""
    for rule in RULES:
        unit = f"{_UNITS[rule]} of which the last one is kept" if rule in _UNITS else "archives to keep"
        parser.add_argument(f"--keep-{rule}", metavar="N", type=_count, help=unit)


def keep_rules(arguments: "argparse.Namespace") -> "dict[str, int] | None":
    """Return the rules that were given, None where none was."""
    given = {f"keep_{rule}": getattr(arguments, f"keep_{rule}") for rule in RULES}
    return {name: count for name, count in given.items() if count is not None} or None


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 1000):
        import argparse

        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1000")
    return int(text)


def _of(archive: "dict[str, Any]") -> str:
    if archive["container"] is None:
        return "-"
    number = str(archive["container"])
    return f"{archive['container_name']} ({number})" if archive.get("container_name") else number


def _age(made: "float | None", now_s: float) -> str:
    return "-" if made is None else duration(int(max(0, now_s - made)))


def _state(archive: "dict[str, Any]") -> str:
    states = [word for word in ("protected", "renamed") if archive[word]]
    return ", ".join(states) or "-"


def _backups_arguments(parser: "argparse.ArgumentParser") -> None:
    action = parser.add_argument(
        "containers", metavar="CT", nargs="*", help="only those of this container: its id or name"
    )
    words(action, "containers")
    directory_option(parser, "only those in this directory (default: the host's own, and those of all jobs)")
    parser.add_argument(
        "--summary", action="store_true", help="a line for each container: its last backup, and what it takes"
    )
    json_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print paths only")


def _backups(arguments: "argparse.Namespace", client: "Client") -> None:
    answer = client.get(path("backups"), {"directory": absolute(arguments.directory, client)})
    archives, containers = answer["archives"], answer["containers"]
    if arguments.containers:
        numbers = {_number(ref, containers) for ref in arguments.containers}
        archives = [one for one in archives if one["container"] in numbers]
        containers = [one for one in containers if one["id"] in numbers]
    if arguments.json:
        print_json(containers if arguments.summary else archives)
    elif arguments.quiet:
        for one in containers if arguments.summary else archives:
            print(neutralise(str(one["id"] if arguments.summary else one["path"])))
    elif arguments.summary:
        now_s = time.time()
        print_table(_SUMMARY, [_summary_row(one, now_s) for one in containers])
    else:
        now_s, elsewhere = time.time(), len({one["directory"] for one in archives}) > 1
        rows = [_row(one, now_s, elsewhere=elsewhere) for one in archives]
        print_table(_COLUMNS, rows, if_empty="no backups; `sysctr backup CT` makes one")
    for problem in answer["problems"]:
        notice(problem)


def _number(ref: str, containers: "list[dict[str, Any]]") -> int:
    for one in containers:
        if ref in (str(one["id"]), one["name"]):
            return int(one["id"])
    if ref.isascii() and ref.isdigit():
        return int(ref)
    raise errors.NotFound(f"cannot find container {ref}", "`sysctr list` shows what there is")


def _row(archive: "dict[str, Any]", now_s: float, *, elsewhere: bool) -> "list[str]":
    called = archive["path"] if elsewhere else archive["name"]
    age, its_size = _age(archive["time"], now_s), size(archive["size_bytes"])
    return [_of(archive), age, its_size, called, _state(archive), archive["notes"] or "-"]


def _summary_row(one: "dict[str, Any]", now_s: float) -> "list[str]":
    made = (one["last_backup"] or {}).get("time") or one["newest"]
    shown = moment(made) if made else "never"
    name = one["name"] if one["exists"] else "(gone)"
    return [str(one["id"]), name, shown, _age(made, now_s), str(one["archives"]), size(one["size_bytes"])]


def _archive_argument(parser: "argparse.ArgumentParser", *, several: bool = False) -> None:
    action = parser.add_argument(
        "archives" if several else "archive", metavar="ARCHIVE", nargs="+" if several else None,
        help="name or path of an archive",
    )  # fmt: skip
    words(action, "archives")


def _show_arguments(parser: "argparse.ArgumentParser") -> None:
    _archive_argument(parser)
    parser.add_argument("--log", action="store_true", help="print only the log of its making")
    json_option(parser)


def _show(arguments: "argparse.Namespace", client: "Client") -> None:
    query = {"archive": archive_ref(arguments.archive, client)}
    archive = field(client.get(path("backups", "archive"), query), "archive")
    if arguments.json:
        print_json(archive)
        return
    if not arguments.log:
        print_fields(
            [
                ("archive", archive["name"]),
                ("directory", archive["directory"]),
                ("container", _of(archive)),
                ("made", f"{moment(archive['time'])} ({_age(archive['time'], time.time())} ago)"),
                ("size", f"{size(archive['size_bytes'])} ({archive['size_bytes']} bytes)"),
                ("compressed", archive["compress"]),
                ("protected", plain(archive["protected"])),
                ("renamed", "yes: it is never pruned" if archive["renamed"] else ""),
                ("log", f"{len(archive['log'].splitlines())} lines (--log)" if archive["log"] else ""),
            ]
        )
        _print_notes(archive, "\n")
    else:
        for line in archive["log"].splitlines():
            print(neutralise(line))


def _print_notes(archive: "dict[str, Any]", before: str = "") -> None:
    if archive["notes"]:
        print(before, end="")
        for line in archive["notes"].rstrip("\n").split("\n"):
            print(neutralise(line))


def _remove_arguments(parser: "argparse.ArgumentParser") -> None:
    _archive_argument(parser, several=True)
    task_options(parser)


def _remove(arguments: "argparse.Namespace", client: "Client") -> int:
    chosen = [Selected(archive_ref(one, client), one) for one in dict.fromkeys(arguments.archives)]
    where = path("backups", "archive")
    submitted = submit(chosen, lambda one: client.request("DELETE", where, {"archive": one.ref}))
    return finish(client, submitted, arguments, lambda one: f"removed {one.label}")


def _protect_arguments(parser: "argparse.ArgumentParser") -> None:
    _archive_argument(parser, several=True)
    parser.add_argument("--off", action="store_true", help="let them be removed and pruned again")


def _protect(arguments: "argparse.Namespace", client: "Client") -> int:
    def act(archive: str) -> None:
        body = {"archive": archive_ref(archive, client), "protected": not arguments.off}
        client.post(path("backups", "protect"), body)
        print(neutralise(f"{'no longer protected' if arguments.off else 'protected'}: {archive}"))

    return for_each(dict.fromkeys(arguments.archives), act)


def _notes_arguments(parser: "argparse.ArgumentParser") -> None:
    _archive_argument(parser)
    parser.add_argument(
        "text", metavar="TEXT", nargs="?",
        help="what to write down; - takes it from standard input, an empty one removes what there is "
        "(default: print the notes)",
    )  # fmt: skip


def _notes(arguments: "argparse.Namespace", client: "Client") -> None:
    ref = archive_ref(arguments.archive, client)
    if arguments.text is None:
        _print_notes(field(client.get(path("backups", "archive"), {"archive": ref}), "archive"))
        return
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    client.post(path("backups", "notes"), {"archive": ref, "notes": text})


def _prune_arguments(parser: "argparse.ArgumentParser") -> None:
    action = parser.add_argument(
        "containers", metavar="CT", nargs="*", help="only those of this container: its id or name"
    )
    words(action, "containers")
    directory_option(parser, "in this directory (default: the host's own)")
    keep_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="remove nothing, only say what would be")
    task_options(parser)


def _prune(arguments: "argparse.Namespace", client: "Client") -> int:
    body = {
        "directory": absolute(arguments.directory, client), "keep": keep_rules(arguments),
        "containers": list(dict.fromkeys(arguments.containers)), "dry_run": arguments.dry_run,
    }  # fmt: skip
    label = arguments.directory or "backups"
    submitted = submit([Selected(label, label)], lambda _: client.post(path("backups", "prune"), body))

    def done(one: Submitted) -> str:
        result = (one.task or {}).get("result") or {}
        if arguments.dry_run:
            now_s = time.time()
            print_table(_VERDICTS, [_verdict_row(verdict, now_s) for verdict in result["archives"]])
            if result.get("truncated"):
                notice(f"only the first {len(result['archives'])} are shown")
        count = result.get("removed", 0)
        word = "would remove" if arguments.dry_run else "removed"
        return f"{word} {count} archive{'s' * (count != 1)}, {size(result.get('freed_bytes', 0))}"

    return finish(client, submitted, arguments, done, single=True)


def _verdict_row(archive: "dict[str, Any]", now_s: float) -> "list[str]":
    age, its_size = _age(archive["time"], now_s), size(archive["size_bytes"])
    return [archive["mark"], _of(archive), age, its_size, archive["name"]]


_NAMED = "vzdump-lxc-101-2026_01_31-12_00_00.tar.zst"

COMMANDS = {
    "backups": Command(
        _backups_arguments,
        _backups,
        examples=("sysctr backups", "sysctr backups web --dir /mnt/nas/dump", "sysctr backups --summary"),
    ),
    "backup show": Command(_show_arguments, _show, examples=(f"sysctr backup show {_NAMED}",)),
    "backup remove": Command(
        _remove_arguments,
        _remove,
        examples=(f"sysctr backup remove {_NAMED}", "sysctr backup remove ./*.tgz"),
    ),
    "backup protect": Command(
        _protect_arguments,
        _protect,
        examples=(f"sysctr backup protect {_NAMED}", f"sysctr backup protect --off {_NAMED}"),
    ),
    "backup notes": Command(
        _notes_arguments,
        _notes,
        examples=(f'sysctr backup notes {_NAMED} "before the upgrade"', f"sysctr backup notes {_NAMED}"),
    ),
    "backup prune": Command(
        _prune_arguments,
        _prune,
        more=(
            "Of each container the newest archive of each period is kept; a period in which an earlier rule",
            "keeps one does not count. Protected and renamed archives stay, and count for no rule. Without",
            "options the rules are those of [backup] in host.toml.",
            "",
        ),
        examples=(
            "sysctr backup prune --keep-last 3 --keep-weekly 4 --dry-run",
            "sysctr backup prune web db --keep-last 1 --dir /mnt/nas/dump",
        ),
    ),
}  # fmt: skip
