"""Changing a container: config, set, edit, rename, passwd, protect."""

import os
import sys

from sysctr import errors
from sysctr.cli.command import (
    Command,
    Selected,
    containers,
    for_each,
    json_option,
    one_container,
    select,
    task_options,
    words,
)
from sysctr.cli.keys import KEYS
from sysctr.cli.output import notice, plain, print_error, print_json
from sysctr.cli.progress import finish, submit
from sysctr.cli.table import neutralise
from sysctr.client import path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any

    from sysctr.client import Client

# The keys of [limits], which one may type without the name of their table.
_LIMITS = ("cores", "cpu", "cpu_weight", "memory", "swap", "pids", "disk")
_SECRET_LIMIT = 4096


def assignment(text: str, option: str) -> "tuple[str, str]":
    """Split `key=value` at the first `=`.

    >>> assignment("limits.memory=1G", "set")
    ('limits.memory', '1G')
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        form = "KEY=VALUE" if option == "set" else "NAME=VALUE"
        verb = "set" if option == "set" else f"use {option}"
        raise errors.UsageError(f"cannot {verb} {text}: it is not of the form {form}")
    return key.strip(), value


def read_secret(name: str, what: str = "password") -> str:
    """Return the first line of a file, or of stdin for `-`, as a password or another secret."""
    shown = "stdin" if name == "-" else name
    try:
        if name == "-":
            raw = sys.stdin.buffer.readline(_SECRET_LIMIT)
        else:
            with open(name, "rb") as source:
                raw = source.readline(_SECRET_LIMIT)
        password = raw.rstrip(b"\r\n").decode()
    except OSError as error:
        raise errors.UsageError(f"cannot read the {what} from {shown}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise errors.UsageError(f"cannot read the {what} from {shown}: it is not text") from error
    if not password:
        raise errors.UsageError(f"cannot read the {what} from {shown}: it is empty")
    return password


def _config_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--pending", action="store_true", help="print only what waits for the next start")
    kind.add_argument(
        "--format",
        choices=("toml", "pct"),
        default="toml",
        help="toml is the file itself, pct what `pct restore` of Proxmox VE takes (default: toml)",
    )
    json_option(parser)


def _config(arguments: "argparse.Namespace", client: "Client") -> None:
    if arguments.format == "pct":
        _print_pct(client.get(path("containers", arguments.container, "pct")), arguments.json)
        return
    answer = client.get(path("containers", arguments.container, "config"))
    if arguments.pending:
        _print_pending(answer["pending"], arguments.json)
    elif arguments.json:
        print_json(answer)
    else:
        # A description may hold what came with a template; the lines themselves are the file's.
        print("\n".join(neutralise(line.expandtabs()) for line in answer["toml"].rstrip("\n").split("\n")))
        sys.stdout.flush()
        for key in answer["pending"]:
            notice(f"pending until the next start: {key}")
        if answer.get("error"):
            notice(f"damaged: {answer['error']}")


def _print_pct(answer: "dict[str, Any]", as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    print("\n".join(neutralise(line) for line in answer["pct"].rstrip("\n").split("\n")))
    sys.stdout.flush()
    for note in answer["notes"]:
        notice(f"{'changed' if note['kind'] == 'changed' else 'left out'}: {note['key']}: {note['reason']}")


def _print_pending(pending: "Any", as_json: bool) -> None:
    if as_json:
        print_json(pending)
    elif isinstance(pending, dict):
        for key, value in pending.items():
            print(neutralise(f"{key} = {plain(value)}"))
    else:
        for key in pending:
            print(neutralise(str(key)))


def _key_lines() -> "list[str]":
    wide = max(len(usage) for usage, _, _ in KEYS)
    keys = [f"  {usage:<{wide}}  {doc}{'*' if when == 'restart' else ''}" for usage, when, doc in KEYS]
    return ["keys (* a running container takes it at its next start):", *keys, ""]


def _set_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    action = parser.add_argument(
        "changes",
        metavar="KEY=VALUE",
        nargs="*",
        help="limits.memory=1G, or short: memory=1G; an empty value goes back to the default",
    )
    words(action, "keys")
    parser.add_argument(
        "--unset", metavar="KEY", action="append", default=[], help="go back to the default of this key"
    )
    json_option(parser)


def changes(assignments: "list[str]", unset: "list[str]") -> "dict[str, str | None]":
    """Return the changes that `set` asks for; None unsets a key.

    >>> changes(["memory=1G", "tags=a,b"], ["limits.cpu"])
    {'limits.memory': '1G', 'tags': 'a,b', 'limits.cpu': None}
    """
    wanted: dict[str, str | None] = {}
    pairs: list[tuple[str, str | None]] = [assignment(text, "set") for text in assignments]
    pairs += [(key, None) for key in unset]
    for key, value in pairs:
        full = f"limits.{key}" if key in _LIMITS else key
        if full in wanted:
            raise errors.UsageError(f"cannot set {full}: it is given twice")
        wanted[full] = value
    if not wanted:
        raise errors.UsageError("cannot set anything: no KEY=VALUE is given", "sysctr set demo memory=1G")
    return wanted


def _set(arguments: "argparse.Namespace", client: "Client") -> None:
    where = path("containers", arguments.container, "config")
    wanted = {"changes": changes(arguments.changes, arguments.unset)}
    answer = client.request("PATCH", where, wanted)
    _report(answer, arguments.json)
    if not (answer.get("applied") or answer.get("pending")):
        notice("nothing was changed: it is so already")


def _report(answer: "dict[str, Any]", as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    for key in answer.get("applied") or []:
        print(f"applied: {neutralise(key)}")
    for key in answer.get("pending") or []:
        print(f"pending until the next start: {neutralise(key)}")
    for note in answer.get("notes") or []:
        notice(note)


def _edit_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)


def _edit(arguments: "argparse.Namespace", client: "Client") -> None:
    where = path("containers", arguments.container, "config")
    changed = edit_text(client, where, arguments.container)
    if changed is not None:
        _report(changed, False)


def edit_text(client: "Client", where: str, called: str) -> "dict[str, Any] | None":
    """Edit a text of the daemon's in $EDITOR until it is taken; return the answer, None without a change."""
    import tempfile

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise errors.UsageError("cannot edit: there is no terminal", "use `sysctr set` in scripts")
    answer = client.get(where)
    fd, draft = tempfile.mkstemp(prefix="sysctr-", suffix=".toml")
    with os.fdopen(fd, "w", encoding="utf-8") as out:
        out.write(answer["toml"])
    while True:
        _run_editor(draft, lambda: _draft_text(draft) != answer["toml"])
        text = _draft_text(draft)
        if text == answer["toml"]:
            os.unlink(draft)
            notice("nothing was changed")
            return None
        try:
            changed = client.request("PUT", where, {"toml": text, "digest": answer["digest"]})
        except errors.SysctrError as error:
            print_error(error)
            if error.exit_code == errors.UsageError.exit_code and _asked("edit it again? [Y/n] "):
                continue
            raise errors.UsageError(
                f"cannot change {called}: the edited text was not taken",
                f"it is kept in {draft}",
            ) from error
        os.unlink(draft)
        return dict(changed)


def _draft_text(draft: str) -> str:
    with open(draft, encoding="utf-8", errors="surrogateescape") as source:
        return source.read()


def _run_editor(name: str, changed: "Callable[[], bool]") -> None:
    import shlex

    try:
        editor = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "editor")
        pid = os.posix_spawnp(editor[0], [*editor, name], os.environ)
    except (OSError, ValueError, IndexError) as error:
        os.unlink(name)
        reason = (
            f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else "no program is named"
        )
        raise errors.UsageError(f"cannot edit: the editor does not start: {reason}", "set EDITOR") from error
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        if not changed():
            os.unlink(name)
            raise errors.SysctrError(f"cannot edit: the editor ended with {status}, and nothing was changed")
        raise errors.SysctrError(
            f"cannot edit: the editor ended with {status}", f"the text is kept in {name}"
        )


def _asked(question: str) -> bool:
    print(question, end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    return answer != "" and answer.strip().lower() in ("", "y", "yes")


def _rename_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    parser.add_argument("name", metavar="NAME", help="the new name")
    json_option(parser)


def _rename(arguments: "argparse.Namespace", client: "Client") -> None:
    answer = client.post(path("containers", arguments.container, "rename"), {"name": arguments.name})
    if arguments.json:
        print_json({"name": arguments.name, **answer})
        return
    print(neutralise(f"renamed {arguments.container} to {arguments.name}"))


def _passwd_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    parser.add_argument("--user", metavar="U", default="root", help="whose password (default: root)")
    source = parser.add_mutually_exclusive_group()
    secret = source.add_argument("--password-file", metavar="F", help="read the password from a file")
    words(secret, "files")
    source.add_argument("--stdin", action="store_true", help="read the password from stdin")
    task_options(parser)


def _passwd(arguments: "argparse.Namespace", client: "Client") -> int:
    if arguments.stdin:
        password = read_secret("-")
    elif arguments.password_file is not None:
        password = read_secret(arguments.password_file)
    else:
        password = _ask_password(arguments.user, arguments.container)
    body = {"user": arguments.user, "password": password}
    submitted = submit(
        [Selected(arguments.container, arguments.container)],
        lambda one: client.post(path("containers", one.ref, "passwd"), body),
    )
    done = f"set the password of {arguments.user} in {arguments.container}"
    return finish(client, submitted, arguments, lambda _: done, single=True)


def _ask_password(user: str, container: str) -> str:
    import getpass

    if not sys.stdin.isatty():
        raise errors.UsageError(
            "cannot ask for a password: there is no terminal", "use --stdin or --password-file"
        )
    password = getpass.getpass(f"new password of {neutralise(user)} in {neutralise(container)}: ")
    if not password:
        raise errors.UsageError("cannot set an empty password")
    if getpass.getpass("again: ") != password:
        raise errors.UsageError("cannot set the password: the two are not the same")
    return password


def _protect_arguments(parser: "argparse.ArgumentParser") -> None:
    containers(parser)
    parser.add_argument("--off", action="store_true", help="let them be destroyed again")
    json_option(parser)


def _protect(arguments: "argparse.Namespace", client: "Client") -> int:
    body = {"protected": not arguments.off}
    chosen = select(client, arguments)
    answers = []

    def protect(one: Selected) -> None:
        answer = client.post(path("containers", one.ref, "protect"), body)
        answers.append({"name": one.label, **body, **answer})
        if not arguments.json:
            print(neutralise(f"{'no longer protected' if arguments.off else 'protected'}: {one.label}"))

    status = for_each(chosen, protect)
    if arguments.json:
        print_json(answers)
    return status


COMMANDS = {
    "config": Command(
        _config_arguments,
        _config,
        examples=(
            "sysctr config demo",
            "sysctr config demo --pending",
            "sysctr config demo --format pct > 107.conf",
        ),
    ),
    "set": Command(
        _set_arguments,
        _set,
        examples=(
            "sysctr set demo memory=1G cores=2",
            "sysctr set demo limits.memory= --unset limits.cpu",
            "sysctr set demo net.1=eth1,bridge=vmbr0,ip=192.0.2.10/24",
        ),
        more=_key_lines(),
    ),
    "edit": Command(_edit_arguments, _edit, examples=("EDITOR=nano sysctr edit demo",)),
    "rename": Command(_rename_arguments, _rename, examples=("sysctr rename demo web",)),
    "passwd": Command(
        _passwd_arguments,
        _passwd,
        examples=("sysctr passwd demo", "sysctr passwd demo --user admin --stdin < secret"),
    ),
    "protect": Command(
        _protect_arguments, _protect, examples=("sysctr protect demo", "sysctr protect --off demo")
    ),
}
