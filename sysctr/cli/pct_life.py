"""From pct's arguments to ours: the life of a container, going in, files and snapshots."""

import sys

from sysctr import errors
from sysctr.cli.pct_arguments import Step, Typed, listed, note
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sysctr.client import Client

_SNAPSHOT_CHARACTERS = 40


def container(typed: Typed, client: "Client") -> "dict[str, Any]":
    """Return the container that the first word names."""
    found: dict[str, Any] = field(client.get(path("containers", typed.words[0])), "container")
    return found


def start(typed: Typed, client: "Client") -> "list[Step]":
    return [Step("start", typed.words[0])]


def stop(typed: Typed, client: "Client") -> "list[Step]":
    return [Step("stop", "--kill", typed.words[0])]


def _timeout(typed: Typed) -> "list[str]":
    return ["--timeout", typed.last("timeout")] if "timeout" in typed.options else []


def shutdown(typed: Typed, client: "Client") -> "list[Step]":
    timeout = _timeout(typed)
    if typed.flag("forceStop"):
        # What Proxmox waits if nothing is said; our own stop is less patient.
        return [Step("stop", *(timeout or ["--timeout", "60"]), typed.words[0])]
    return [Step("shutdown", *timeout, typed.words[0])]


def reboot(typed: Typed, client: "Client") -> "list[Step]":
    return [Step("reboot", *_timeout(typed), typed.words[0])]


def suspend(typed: Typed, client: "Client") -> "list[Step]":
    note("it is frozen in memory: nothing is written to disk, and a restart of the host ends it")
    return [Step("freeze", typed.words[0])]


def resume(typed: Typed, client: "Client") -> "list[Step]":
    return [Step("thaw", typed.words[0])]


def destroy(typed: Typed, client: "Client") -> "list[Step]":
    force = ["--force"] if typed.flag("force") else []
    # Proxmox does not ask.
    return [Step("destroy", "--yes", *force, typed.words[0])]


def execute(typed: Typed, client: "Client") -> "list[Step]":
    if not typed.trailing:
        raise typed.error("no program is given", "pct exec 101 -- ls -l")
    # lxc-attach has a terminal of its own there if it was started on one.
    terminal = ["--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    return [Step("exec", *terminal, typed.words[0], "--", *typed.trailing)]


def enter(typed: Typed, client: "Client") -> "list[Step]":
    return [Step("enter", typed.words[0])]


def console(typed: Typed, client: "Client") -> "list[Step]":
    escape = ["--escape", typed.last("escape")] if "escape" in typed.options else []
    return [Step("console", *escape, typed.words[0])]


def _owner(typed: Typed) -> "list[str]":
    names = (("user", "--user"), ("group", "--group"), ("perms", "--perms"))
    return [word for name, ours in names if name in typed.options for word in (ours, typed.last(name))]


def push(typed: Typed, client: "Client") -> "list[Step]":
    number, file, inside = typed.words
    return [Step("push", *_owner(typed), file, f"{number}:{inside}")]


def pull(typed: Typed, client: "Client") -> "list[Step]":
    number, inside, file = typed.words
    return [Step("pull", *_owner(typed), f"{number}:{inside}", file)]


def _pools(typed: Typed, client: "Client") -> "list[str]":
    found = container(typed, client)
    volumes = [mount["source"] for mount in found.get("mounts") or [] if mount.get("volume")]
    return list(dict.fromkeys([found["pool"], *(source.partition(":")[0] for source in volumes)]))


def migrate(typed: Typed, client: "Client") -> "list[Step]":
    options = ["--restart"] if typed.flag("restart") else []
    for pair in listed(typed.last("target-storage")):
        here, colon, there = pair.partition(":")
        # 1 is each of them to that of its name, which is what is done anyway; one alone is for all.
        if colon:
            options += ["--pool-map", f"{here}={there}"]
        elif pair != "1":
            options += [word for pool in _pools(typed, client) for word in ("--pool-map", f"{pool}={pair}")]
    if limit := typed.last("bwlimit"):
        if not (limit.isascii() and limit.isdigit()):
            raise typed.error(f"--bwlimit {limit} is not a number of KiB a second")
        options += ["--bwlimit", f"{int(limit)}K" if int(limit) else "0"]
    return [Step("migrate", *options, *typed.words)]


def _snapshot_name(typed: Typed) -> str:
    """Return what a snapshot of Proxmox's is called here: capital letters are small."""
    name = typed.words[1]
    if len(name) > _SNAPSHOT_CHARACTERS:
        raise typed.error(f"{name!r} is longer than {_SNAPSHOT_CHARACTERS} characters")
    if name.lower() != name:
        note(f"the snapshot {name} is {name.lower()} here")
    return name.lower()


def snapshot(typed: Typed, client: "Client") -> "list[Step]":
    text = " ".join(typed.last("description").split())
    described = [f"--description={text}"] if text else []
    return [Step("snapshot", *described, typed.words[0], _snapshot_name(typed))]


def delsnapshot(typed: Typed, client: "Client") -> "list[Step]":
    return [Step("delsnapshot", typed.words[0], _snapshot_name(typed))]


def rollback(typed: Typed, client: "Client") -> "list[Step]":
    number = typed.words[0]
    name = _snapshot_name(typed)
    back = Step("rollback", "--yes", number, name)
    running = container(typed, client)["state"] != "stopped"
    if typed.flag("start"):
        # A container that runs is started again by the rollback itself.
        return [back] if running else [back, Step("start", number)]
    if not running:
        return [back]
    known = field(client.get(path("containers", number, "snapshots")), "snapshots")
    if name not in [one["name"] for one in known]:
        # It must not be stopped in vain.
        raise errors.NotFound(
            f"cannot roll back {number}: there is no snapshot {name}",
            f"`sysctr snapshots {number}` lists them",
        )
    note("without --start it is stopped after a rollback, as Proxmox does it")
    return [Step("stop", "--kill", number), back]
