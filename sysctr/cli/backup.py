"""Making backups of containers, restoring them, and proving that they can be restored."""

import json
import os
import sys

from sysctr import errors
from sysctr.cli.backups import absolute, archive_ref, directory_option
from sysctr.cli.command import Command, Selected, containers, select, task_options, words
from sysctr.cli.create import container_number
from sysctr.cli.output import notice, size
from sysctr.cli.progress import Submitted, finish, submit
from sysctr.cli.settings import assignment
from sysctr.cli.table import neutralise
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from typing import Any

    from sysctr.client import Client

MODES = ("snapshot", "suspend", "stop")
CODECS = ("zstd", "gzip", "lzo", "none")
_PIECE_BYTES = 1 << 20
_SHOWN = 20


def _backup_arguments(parser: "argparse.ArgumentParser") -> None:
    containers(parser)
    parser.add_argument(
        "--mode", choices=MODES,
        help="how the state is taken: snapshot and suspend pause a running container for the last changes, "
        "stop shuts it down for it (default: snapshot, or what host.toml says)",
    )  # fmt: skip
    parser.add_argument(
        "--compress", choices=CODECS, help="how it is compressed (default: zstd, or what host.toml says)"
    )
    directory_option(parser, "directory of the archive (default: /var/lib/sysctr/backups)")
    parser.add_argument(
        "--notes", metavar="TEXT", help="notes; {{guestname}}, {{vmid}} and {{node}} are replaced"
    )
    parser.add_argument("--protected", action="store_true", help="protect the archive from being removed")
    parser.add_argument(
        "--exclude", metavar="GLOB", action="append", default=[],
        help="leave out what fits: /PATH from the root, else a name anywhere; again for more",
    )  # fmt: skip
    parser.add_argument(
        "--bwlimit", metavar="RATE", type=rate, help="read at most so much a second, such as 50M; 0: no limit"
    )
    parser.add_argument(
        "--stdout", action="store_true", help="write the archive to standard output; one container"
    )
    task_options(parser)


def rate(text: str) -> int:
    """Read a rate in bytes a second.

    >>> rate("50M"), rate("0")
    (52428800, 0)
    """
    from sysctr.config.values import parse_size

    return 0 if text == "0" else parse_size(text)


def _how(arguments: "argparse.Namespace") -> "dict[str, Any]":
    return {
        "mode": arguments.mode, "compress": arguments.compress, "exclude": arguments.exclude,
        "bwlimit_bytes": arguments.bwlimit,
    }  # fmt: skip


def _backup(arguments: "argparse.Namespace", client: "Client") -> int:
    selected = select(client, arguments)
    if arguments.stdout:
        return _to_stdout(arguments, client, selected)
    if not selected and not arguments.quiet:
        notice("nothing to back up")
    body = {
        **_how(arguments), "directory": absolute(arguments.directory, client), "notes": arguments.notes,
        "protected": arguments.protected,
    }  # fmt: skip
    started = submit(selected, lambda one: client.post(path("containers", one.ref, "backup"), body))
    worst = finish(client, started, arguments, _done)
    lost = [(one, _result(one).get("warnings") or ()) for one in started]
    return max(worst, _tell_lost([(one.label, warnings) for one, warnings in lost], arguments))


def _done(one: Submitted) -> str:
    result = _result(one)
    pause = result.get("pause_ms")
    paused = f", paused for {pause:g} ms" if pause is not None else ""
    return f"backed up {one.label} to {result.get('archive')} ({size(result.get('size_bytes') or 0)}{paused})"


def _result(one: Submitted) -> "dict[str, Any]":
    result = (one.task or {}).get("result")
    return result if isinstance(result, dict) else {}


def _tell_lost(lost: "list[tuple[str, Any]]", arguments: "argparse.Namespace") -> int:
    """Say what an archive lacks, and return the exit code for that."""
    code = 0
    for label, warnings in lost:
        if not warnings:
            continue
        code = 1
        notice(f"sysctr: the backup of {label} is not complete: {len(warnings)} could not be kept")
        for warning in warnings[:_SHOWN]:
            notice(f"  {neutralise(str(warning))}")
        if len(warnings) > _SHOWN:
            notice("  and more: the log beside the archive has them all")
    return code


def _to_stdout(arguments: "argparse.Namespace", client: "Client", selected: "list[Selected]") -> int:
    if len(selected) != 1:
        raise errors.UsageError("cannot write several archives to standard output", "name one container")
    if sys.stdout.isatty():
        raise errors.UsageError(
            "cannot write an archive to a terminal", f"sysctr backup {selected[0].label} --stdout > FILE"
        )
    request = {key: value for key, value in _how(arguments).items() if value not in (None, [])}
    headers: dict[str, str] = {}
    try:
        for piece in client.stream(
            path("containers", selected[0].ref, "archive"), {"request": json.dumps(request)}, headers=headers
        ):
            _write(piece)
    except errors.NoDaemon as error:
        if "sysctr-task" not in headers:
            raise
        task = field(client.get(path("tasks", headers["sysctr-task"])), "task")
        raise (errors.from_dict(task["error"]) if task.get("error") else error) from error
    task = field(client.get(path("tasks", headers["sysctr-task"], "wait"), {"timeout": 60}), "task")
    result = task.get("result") or {}
    return _tell_lost([(selected[0].label, result.get("warnings") or ())], arguments)


def _restore_arguments(parser: "argparse.ArgumentParser") -> None:
    action = parser.add_argument(
        "archive", metavar="ARCHIVE",
        help="a file, the name of one that `sysctr backups` lists, or - for standard input; "
        "with --all a directory",
    )  # fmt: skip
    words(action, "archives")
    parser.add_argument(
        "id", metavar="ID", nargs="?", type=container_number,
        help="number of the container (default: the archive's, or the first free one)",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="the newest archive of each container in ARCHIVE")
    parser.add_argument(
        "--force", action="store_true",
        help="replace the container that has the number, when all is unpacked beside it",
    )  # fmt: skip
    made_options(parser)
    task_options(parser)


def made_options(parser: "argparse.ArgumentParser") -> None:
    """Add the options of what becomes of an archive, or of a container of another manager."""
    parser.add_argument("--name", metavar="N", help="name of the container (default: the one that it had)")
    parser.add_argument("--pool", metavar="P", help="pool to keep it in (default: the host's)")
    parser.add_argument(
        "--unique", action="store_true", help="give it an identity of its own: uuid, MACs, keys"
    )
    parser.add_argument("--start", action="store_true", help="start it at once")
    parser.add_argument(
        "--allow", metavar="WHAT", action="append", default=[],
        help="let the archive have of this host what it asks for: bind, device, raw, feature; or several "
        "with commas",
    )  # fmt: skip
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[],
        help="a setting that differs; `sysctr set --help` lists them",
    )  # fmt: skip


def made_request(arguments: "argparse.Namespace") -> "dict[str, Any]":
    """Return what the API is told of these options."""
    return {
        "id": arguments.id, "name": arguments.name, "pool": arguments.pool, "unique": arguments.unique,
        "start": arguments.start,
        "allow": [one.strip() for text in arguments.allow for one in text.split(",") if one.strip()],
        "set": dict(assignment(text, "--set") for text in arguments.set),
    }  # fmt: skip


def _restore(arguments: "argparse.Namespace", client: "Client") -> int:
    body: dict[str, Any] = {**made_request(arguments), "force": arguments.force}
    if arguments.all:
        return _restore_all(arguments, client, body)
    if arguments.archive == "-":
        if sys.stdin.isatty():
            raise errors.UsageError(
                "cannot read an archive from a terminal", "give a file, or sysctr restore - < FILE"
            )
        selected = [Selected("-", "the archive")]

        def start(_one: Selected) -> "dict[str, Any]":
            given = {key: value for key, value in body.items() if value not in (None, False, [], {})}
            return client.upload(path("restore"), _pieces(client), {"request": json.dumps(given)})

    else:
        selected = [Selected(archive_ref(arguments.archive, client), arguments.archive)]

        def start(_one: Selected) -> "dict[str, Any]":
            return client.post(path("restore"), {**body, "archive": _one.ref})

    return finish(client, submit(selected, start), arguments, restored, single=True)


def _restore_all(arguments: "argparse.Namespace", client: "Client", body: "dict[str, Any]") -> int:
    for option in ("id", "name"):
        if getattr(arguments, option) is not None:
            raise errors.UsageError(f"cannot restore all with one {option}", "leave it out")
    directory = absolute(arguments.archive, client)
    found = client.get(path("backups"), {"directory": directory})
    here = {one["id"] for one in field(client.get(path("containers")), "containers")}
    newest: dict[int, dict[str, Any]] = {}
    for one in found["archives"]:
        if one["type"] == "lxc" and one["time"] >= newest.get(one["container"], one)["time"]:
            newest[one["container"]] = one
    selected = []
    for number, one in sorted(newest.items()):
        if number in here and not arguments.force:
            notice(f"{number}: not restored, it is here (--force replaces it)")
        else:
            selected.append(Selected(one["path"], one["name"]))
    if not selected and not arguments.quiet:
        notice("nothing to restore")
    started = submit(selected, lambda one: client.post(path("restore"), {**body, "archive": one.ref}))
    return finish(client, started, arguments, restored)


def _write(piece: bytes) -> None:
    try:
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is buffered still would be tried again at exit, and fail there with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise errors.SysctrError(f"cannot write the archive: {(error.strerror or '').lower()}") from error


def _pieces(client: "Client") -> "Iterator[bytes]":
    """Yield what standard input has, until the daemon wants no more of it."""
    try:
        while not client.answers_before(0) and (piece := os.read(0, _PIECE_BYTES)):
            yield piece
    except OSError as error:
        raise errors.UsageError(f"cannot read the archive: {(error.strerror or '').lower()}") from error


def restored(one: Submitted) -> str:
    """Say what became of an archive, with its notes."""
    result = _result(one)
    for note in result.get("notes") or ():
        notice(f"note: {neutralise(str(note))}")
    for left in result.get("left_out") or ():
        notice(f"left out: {neutralise(str(left))}")
    devices = result.get("devices") or 0
    if devices:
        notice(f"left out: {devices} device nodes (containers get theirs from the host)")
    kept = "with an identity of its own" if result.get("new_identity") else "with its identity"
    verb = "restored in place" if result.get("replaced") else "restored"
    return f"{verb} {result.get('name')} ({result.get('id')}), {result.get('files')} files, {kept}"


def _verify_arguments(parser: "argparse.ArgumentParser") -> None:
    action = parser.add_argument(
        "archives", metavar="ARCHIVE", nargs="+", help="a file, or the name of one in `sysctr backups`"
    )
    words(action, "archives")
    task_options(parser)


def _verify(arguments: "argparse.Namespace", client: "Client") -> int:
    selected = [Selected(archive_ref(text, client), text) for text in arguments.archives]
    started = submit(selected, lambda one: client.post(path("backups", "verify"), {"archive": one.ref}))

    def done(one: Submitted) -> str:
        result = _result(one)
        for left in result.get("left_out") or ():
            notice(f"a restore leaves out: {neutralise(str(left))}")
        return f"{one.label} can be restored: {result.get('members')} files, sha256 {result.get('sha256')}"

    return finish(client, started, arguments, done)


_MORE = (
    "Read are archives of sysctr and of Proxmox VE, exports of Incus and LXD with their snapshots (but for",
    "those with --optimized-storage), images of LXC, and plain tarballs of a rootfs, compressed or not.",
    "",
    "Restored under its own number while the original is gone, a container keeps its identity: uuid, MACs,",
    "host keys. Restored beside the original, or with --unique, it gets one of its own.",
    "",
)
COMMANDS = {
    "backup": Command(
        _backup_arguments,
        _backup,
        examples=(
            "sysctr backup web",
            "sysctr backup --all --dir /mnt/backups --compress gzip",
            "sysctr backup db --mode stop --notes 'before the upgrade of {{guestname}}' --protected",
            "sysctr backup web --stdout | ssh other sysctr restore - --unique",
        ),
        more=(
            "Archives are those of Proxmox VE: its restore takes them. Beside one lie its log and its notes.",
            "",
        ),
    ),
    "backup verify": Command(
        _verify_arguments,
        _verify,
        examples=("sysctr backup verify vzdump-lxc-101-2026_01_31-12_00_00.tar.zst",),
    ),
    "restore": Command(
        _restore_arguments,
        _restore,
        more=_MORE,
        examples=(
            "sysctr restore vzdump-lxc-101-2026_01_31-12_00_00.tar.zst",
            "sysctr restore /mnt/dump/vzdump-lxc-104-2026_01_31-12_00_00.tar.gz 204 --name web2 --start",
            "sysctr restore vzdump-lxc-101-2026_01_31-12_00_00.tar.zst 101 --force",
            "sysctr restore --all /mnt/backups",
            "sysctr restore debian-rootfs.tar.xz --name web",
            "sysctr restore incus-export.tar.gz --start",
        ),
    ),
}
