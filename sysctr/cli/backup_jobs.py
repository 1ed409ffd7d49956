"""Backup jobs: make, list, show, edit, run and remove them."""

import time

from sysctr import errors
from sysctr.cli.backups import absolute, directory_option, keep_options, keep_rules
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

_BAD_COLOUR = "31"
_COLOURS = {"failed": _BAD_COLOUR, "mistake": _BAD_COLOUR, "interrupted": _BAD_COLOUR, "running": "33"}
_COLUMNS = (
    Column("NAME", flexible=True),
    Column("STATE", colour=lambda state: _COLOURS.get(state, "")),
    Column("SCHEDULE"),
    Column("NEXT RUN", optional=True),
    Column("LAST SUCCESS"),
    Column("CONTAINERS", flexible=True, narrowest=10),
    Column("KEEP", flexible=True, narrowest=8, optional=True),
)
_FAILURES = (Column("CONTAINER", flexible=True), Column("TASK"), Column("ERROR", flexible=True, narrowest=20))


def _selection(settings: "dict[str, Any]") -> str:
    if settings.get("containers"):
        return plain(settings["containers"])
    shown = "all" if settings.get("all") else f"tag {settings.get('tag', '')}"
    return f"{shown} but {plain(settings['exclude'])}" if settings.get("exclude") else shown


def _keep(job: "dict[str, Any]") -> str:
    rules = job.get("keep") or {}
    return ", ".join(f"{count} {rule}" for rule, count in rules.items()) or "all"


def _state(job: "dict[str, Any]") -> str:
    if job["error"]:
        return "mistake"
    if job["state"] in ("", "done", "cancelled") and not job["enabled"]:
        return "disabled"
    return job["state"] or "new"


def _ago(then_s: "float | None", now_s: float) -> str:
    return "never" if then_s is None else f"{duration(int(max(0, now_s - then_s)))} ago"


def _row(job: "dict[str, Any]", now_s: float) -> "list[str]":
    if job["error"]:
        return [job["name"], _state(job), "-", "-", _ago(job["last_success"], now_s), "-", "-"]
    next_run = moment(job["next_run"])[:16]
    success = _ago(job["last_success"], now_s)
    return [
        job["name"], _state(job), job["schedule"], next_run, success, _selection(job["settings"]), _keep(job)
    ]  # fmt: skip


def _list_arguments(parser: "argparse.ArgumentParser") -> None:
    json_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print names only")


def _list(arguments: "argparse.Namespace", client: "Client") -> None:
    jobs = field(client.get(path("backup-jobs")), "jobs")
    if arguments.json:
        print_json(jobs)
    elif arguments.quiet:
        for job in jobs:
            print(job["name"])
    else:
        now_s = time.time()
        print_table(
            _COLUMNS,
            [_row(job, now_s) for job in jobs],
            if_empty="no backup jobs; `sysctr backup job add NAME --all --keep-last 3` makes one",
        )
        for job in jobs:
            if job["error"]:
                notice(job["error"])


def _one_job(parser: "argparse.ArgumentParser") -> None:
    words(parser.add_argument("job", metavar="JOB", help="name of the job"), "jobs")


def _several_jobs(parser: "argparse.ArgumentParser") -> None:
    words(parser.add_argument("jobs", metavar="JOB", nargs="+", help="name of a job"), "jobs")


def _show_arguments(parser: "argparse.ArgumentParser") -> None:
    _one_job(parser)
    json_option(parser)


def _show(arguments: "argparse.Namespace", client: "Client") -> None:
    job = field(client.get(path("backup-jobs", arguments.job)), "job")
    if arguments.json:
        print_json(job)
        return
    now_s, settings = time.time(), job["settings"]
    print_fields(
        [
            ("name", job["name"]),
            ("file", job["file"]),
            ("problem", job["error"]),
            ("state", _state(job)),
            ("containers", _selection(settings) if settings else ""),
            ("left out", plain(settings.get("exclude_paths"))),
            ("schedule", job["schedule"]),
            ("next run", moment(job["next_run"]) if job["next_run"] else ""),
            ("directory", plain(job.get("directory"))),
            ("mode", plain(job.get("mode"))),
            ("compress", plain(job.get("compress"))),
            ("rate", f"{size(job['bwlimit_bytes'])}/s" if job.get("bwlimit_bytes") else ""),
            ("keep", "" if job["error"] else _keep(job)),
            ("notes", plain(settings.get("notes"))),
            ("protected", plain(settings.get("protected"))),
            ("on failure", plain(settings.get("on_failure"))),
            ("mail to", plain(settings.get("mail_to"))),
            ("last run", f"{moment(job['last_run'])} ({job['task']})" if job["last_run"] else ""),
            ("took", _took(job)),
            ("last success", _ago(job["last_success"], now_s)),
        ]
    )
    if job["failures"]:
        print()
        rows = [[one["title"] or "-", one["task"] or "-", one["error"]] for one in job["failures"]]
        print_table(_FAILURES, rows)


def _took(job: "dict[str, Any]") -> str:
    begun, ended = job["last_run"], job["last_end"]
    return duration(int(ended - begun)) if begun and ended else ""


def _add_arguments(parser: "argparse.ArgumentParser") -> None:
    parser.add_argument("job", metavar="NAME", help="name of the new job: lower-case letters, digits, -")
    action = parser.add_argument("containers", metavar="CT", nargs="*", help="id or name of a container")
    words(action, "containers")
    parser.add_argument("--all", action="store_true", help="all containers that there are then")
    parser.add_argument("--tag", metavar="T", help="all that have this tag then")
    without = parser.add_argument(
        "--except", metavar="CT", action="append", dest="exclude", help="but not this one; repeatable"
    )
    words(without, "containers")
    parser.add_argument(
        "--schedule", metavar="WHEN", help="hourly, daily 02:00, weekly sun 22:00, off (default: daily 02:00)"
    )
    directory_option(parser, "where the archives go (default: the host's own directory)")
    parser.add_argument("--mode", metavar="M", help="snapshot, suspend or stop (default: the host's)")
    parser.add_argument("--compress", metavar="C", help="zstd, gzip, lzo or none (default: the host's)")
    parser.add_argument("--bwlimit", metavar="RATE", help="most bytes read a second, such as 50M")
    parser.add_argument(
        "--notes", metavar="TEXT",
        help="notes of the archives, with {{guestname}}, {{vmid}} and {{node}} (default: {{guestname}})",
    )  # fmt: skip
    parser.add_argument("--protected", action="store_true", help="let nobody remove or prune the archives")
    parser.add_argument(
        "--exclude", metavar="PATH", action="append", dest="exclude_paths",
        help="leave out what is there inside, such as '/var/cache/*'; repeatable",
    )  # fmt: skip
    keep_options(parser)
    parser.add_argument(
        "--on-failure", metavar="COMMAND",
        help="program to run for each container that failed, with SYSCTR_JOB, SYSCTR_CONTAINER, SYSCTR_NAME "
        "and SYSCTR_ERROR in its environment; no shell reads it",
    )  # fmt: skip
    parser.add_argument(
        "--mail-to", metavar="ADDRESS", action="append", help="who gets a mail when one failed; repeatable"
    )
    parser.add_argument("--disabled", action="store_true", help="run it only when it is asked for")
    json_option(parser)


def _add(arguments: "argparse.Namespace", client: "Client") -> None:
    settings = _settings(arguments, client)
    chosen = [word for word in ("containers", "all", "tag") if settings.get(word)]
    if len(chosen) != 1:
        raise errors.UsageError(
            f"cannot add backup job {arguments.job}: name containers, or give --all or --tag T",
            "one of the three",
        )
    answer = client.post(path("backup-jobs"), {"name": arguments.job, "settings": settings})
    if arguments.json:
        print_json(answer["job"])
        return
    _say(answer, "added")


def _say(answer: "dict[str, Any]", what: str) -> None:
    job = answer["job"]
    following = f", next run {moment(job['next_run'])}" if job["next_run"] else ""
    print(neutralise(f"{what} {job['name']}{following}"))
    for note in answer["notes"]:
        notice(f"note: {note}")


def _settings(arguments: "argparse.Namespace", client: "Client") -> "dict[str, Any]":
    """Return what the file of the job says."""
    on_failure = None
    if arguments.on_failure:
        import shlex

        try:
            on_failure = shlex.split(arguments.on_failure)
        except ValueError as error:
            raise errors.UsageError(f"cannot read --on-failure: {str(error).lower()}") from error
    given = {
        "containers": list(dict.fromkeys(arguments.containers)), "tag": arguments.tag, "all": arguments.all,
        "exclude": arguments.exclude, "exclude_paths": arguments.exclude_paths,
        "schedule": arguments.schedule, "directory": absolute(arguments.directory, client),
        "mode": arguments.mode, "compress": arguments.compress, "bwlimit": arguments.bwlimit,
        "notes": arguments.notes, "protected": arguments.protected, "on_failure": on_failure,
        "mail_to": arguments.mail_to,
        **(keep_rules(arguments) or {}),
    }  # fmt: skip
    # Empty notes say something, and so does a rule of 0.
    settings = {
        name: value
        for name, value in given.items()
        if value is not None and value is not False and value != []
    }
    return {**settings, "enabled": False} if arguments.disabled else settings


def _edit_arguments(parser: "argparse.ArgumentParser") -> None:
    _one_job(parser)


def _edit(arguments: "argparse.Namespace", client: "Client") -> None:
    from sysctr.cli.settings import edit_text

    changed = edit_text(client, path("backup-jobs", arguments.job), f"backup job {arguments.job}")
    if changed is not None:
        _say(changed, "changed")


def _run_arguments(parser: "argparse.ArgumentParser") -> None:
    _several_jobs(parser)
    task_options(parser)


def _run(arguments: "argparse.Namespace", client: "Client") -> int:
    chosen = [Selected(job, job) for job in dict.fromkeys(arguments.jobs)]
    submitted = submit(chosen, lambda one: client.post(path("backup-jobs", one.ref, "run")))

    def done(one: Submitted) -> str:
        count = len(((one.task or {}).get("result") or {}).get("backed_up") or [])
        return f"ran {one.label}: {count} container{'s' * (count != 1)} backed up"

    return finish(client, submitted, arguments, done)


def _remove(arguments: "argparse.Namespace", client: "Client") -> int:
    def act(job: str) -> None:
        client.request("DELETE", path("backup-jobs", job))
        print(neutralise(f"removed {job}"))

    return for_each(dict.fromkeys(arguments.jobs), act)


COMMANDS = {
    "backup job list": Command(_list_arguments, _list, examples=("sysctr backup job list",)),
    "backup job show": Command(_show_arguments, _show, examples=("sysctr backup job show nightly",)),
    "backup job add": Command(
        _add_arguments,
        _add,
        more=(
            "What the options leave open is what [backup] in host.toml says then. Containers are backed up",
            "one after the other; after each that succeeded its older archives are pruned. A run that was",
            "missed because the host was off is made up for once.",
            "",
        ),
        examples=(
            "sysctr backup job add nightly --all --keep-last 3 --keep-weekly 4",
            "sysctr backup job add often web db --schedule hourly --dir /mnt/nas/dump --keep-hourly 24",
            "sysctr backup job add prod --tag prod --mail-to admin@example.org --on-failure 'logger lost'",
        ),
    ),
    "backup job edit": Command(
        _edit_arguments, _edit, examples=("EDITOR=nano sysctr backup job edit nightly",)
    ),
    "backup job run": Command(_run_arguments, _run, examples=("sysctr backup job run nightly",)),
    "backup job remove": Command(_several_jobs, _remove, examples=("sysctr backup job remove nightly",)),
}  # fmt: skip
