"""The life of containers: start, stop, shutdown, reboot, freeze, thaw, destroy, wait."""

import sys
import time

from sysctr import errors
from sysctr.cli.command import Command, Selected, containers, one_container, seconds, select, task_options
from sysctr.cli.container import ending
from sysctr.cli.output import notice
from sysctr.cli.progress import finish, submit
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from sysctr.client import Client

_ACTIVE = ("starting", "running", "frozen", "stopping")
# An init that never says READY counts as booted as soon as it runs. The daemon waits for the word; so the
# question is asked again from time to time.
_WAIT_ROUNDS_S = {"booted": 10.0, "running": 10.0, "stopped": 600.0}


def _act(
    client: "Client",
    arguments: "argparse.Namespace",
    verb: str,
    past: str,
    states: "tuple[str, ...]",
    body: "dict[str, Any] | None" = None,
) -> int:
    selected = select(client, arguments, states)
    if not selected and not arguments.quiet:
        notice(f"nothing to {verb}")
    started = submit(selected, lambda one: client.post(path("containers", one.ref, verb), body))
    return finish(client, started, arguments, lambda one: f"{past} {one.label}")


def _timeout_option(parser: "argparse.ArgumentParser", meaning: str) -> None:
    parser.add_argument("--timeout", metavar="SECONDS", type=seconds, dest="timeout_s", help=meaning)


def _start_arguments(parser: "argparse.ArgumentParser") -> None:
    containers(parser, " that are stopped")
    parser.add_argument(
        "--onboot", action="store_true", help="all containers that start with the host, if they are stopped"
    )
    task_options(parser)


def _start(arguments: "argparse.Namespace", client: "Client") -> int:
    return _act(client, arguments, "start", "started", ("stopped",))


def _stop_arguments(parser: "argparse.ArgumentParser") -> None:
    containers(parser, " that run")
    _timeout_option(parser, "how long the init may take before it is killed (default: 10)")
    parser.add_argument(
        "--kill", action="store_true", help="kill at once, as `pct stop` does; data may be lost"
    )
    task_options(parser)


def _stop(arguments: "argparse.Namespace", client: "Client") -> int:
    body = _given(timeout_s=arguments.timeout_s, kill=arguments.kill or None)
    return _act(client, arguments, "stop", "stopped", _ACTIVE, body)


def _shutdown_arguments(parser: "argparse.ArgumentParser") -> None:
    containers(parser, " that run")
    _timeout_option(
        parser, "how long to wait (default: 60); then the command fails and the container runs on"
    )
    task_options(parser)


def _reboot_arguments(parser: "argparse.ArgumentParser") -> None:
    containers(parser, " that run")
    _timeout_option(parser, "how long the init may take before it is killed (default: 60)")
    task_options(parser)


def _shutdown(arguments: "argparse.Namespace", client: "Client") -> int:
    body = _given(timeout_s=arguments.timeout_s)
    return _act(client, arguments, "shutdown", "shut down", _ACTIVE, body)


def _reboot(arguments: "argparse.Namespace", client: "Client") -> int:
    body = _given(timeout_s=arguments.timeout_s)
    return _act(client, arguments, "reboot", "rebooted", _ACTIVE, body)


def _freeze_arguments(parser: "argparse.ArgumentParser") -> None:
    containers(parser, " that run")
    task_options(parser)


def _freeze(arguments: "argparse.Namespace", client: "Client") -> int:
    return _act(client, arguments, "freeze", "froze", ("running",))


def _thaw_arguments(parser: "argparse.ArgumentParser") -> None:
    containers(parser, " that are frozen")
    task_options(parser)


def _thaw(arguments: "argparse.Namespace", client: "Client") -> int:
    return _act(client, arguments, "thaw", "thawed", ("frozen",))


def _given(**values: "Any") -> "dict[str, Any]":
    return {name: value for name, value in values.items() if value is not None}


def _destroy_arguments(parser: "argparse.ArgumentParser") -> None:
    containers(parser)
    parser.add_argument("--force", action="store_true", help="kill it first if it runs")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    task_options(parser)


def _destroy(arguments: "argparse.Namespace", client: "Client") -> int:
    selected = select(client, arguments)
    if not arguments.yes:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise errors.UsageError(
                "cannot destroy without asking: there is no terminal to ask on", "add --yes"
            )
        selected = [one for one in selected if _confirmed(client, one, force=arguments.force)]
        if not selected:
            return 1
    body = {"force": arguments.force}
    started = submit(selected, lambda one: client.request("DELETE", path("containers", one.ref), body))
    return finish(client, started, arguments, lambda one: f"destroyed {one.label}")


def _confirmed(client: "Client", one: Selected, *, force: bool) -> bool:
    container = field(client.get(path("containers", one.ref)), "container")
    name = container["name"]
    away = container.get("away")
    state = "" if container["state"] in ("stopped", "away") else f", which is {container['state']}"
    # Nobody should type a name to be told then that it was in vain.
    if container.get("protected"):
        raise errors.Refused(
            f"cannot destroy {one.label}: it is protected", f"`sysctr protect --off {one.label}` first"
        )
    if state and not force:
        raise errors.WrongState(
            f"cannot destroy {one.label}: it is {container['state']}",
            "stop it first, or destroy it with --force",
        )
    if away:
        state = f" here, which is at {away.get('name') or 'another host'} now"
    notice(f"this destroys container {container['id']} ({name}){state}, with all its files")
    print("type its name to go on: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip() == name:
        return True
    notice(f"not destroyed: {name}")
    return False


def _wait_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    parser.add_argument(
        "--state",
        choices=("running", "booted", "stopped"),
        default="booted",
        help="what to wait for (default: booted)",
    )
    _timeout_option(parser, "give up after this time (default: never)")


def _wait(arguments: "argparse.Namespace", client: "Client") -> None:
    where = path("containers", arguments.container, "wait")
    deadline = None if arguments.timeout_s is None else time.monotonic() + arguments.timeout_s
    round_s = 0.0
    while True:
        query = {"state": arguments.state, "timeout": round_s}
        container = field(client.get(where, query, timeout_s=round_s + 60), "container")
        if _reached(container, arguments.state):
            return
        at_rest = container["state"] in ("stopped", "away") and not container.get("task")
        if arguments.state != "stopped" and at_rest:
            end = ending(container.get("exit"))
            raise errors.WrongState(
                f"cannot wait for {arguments.container} to be {arguments.state}: it is {container['state']}"
                + (f", its last end was: {end}" if end else ""),
                f"`sysctr logs {arguments.container}` shows what it said last",
            )
        round_s = _WAIT_ROUNDS_S[arguments.state]
        if deadline is not None:
            round_s = min(round_s, max(0.0, deadline - time.monotonic()))
        if deadline is not None and time.monotonic() >= deadline:
            raise errors.WrongState(
                f"cannot wait for {arguments.container} to be {arguments.state}: "
                f"it is {container['state']} after {arguments.timeout_s:g} s"
            )


def _reached(container: "dict[str, Any]", state: str) -> bool:
    if state == "booted":
        return container["state"] == "running" and container.get("booted") is not False
    return bool(container["state"] == state)


COMMANDS = {
    "start": Command(
        _start_arguments,
        _start,
        examples=("sysctr start demo", "sysctr start --tag web"),
    ),
    "stop": Command(
        _stop_arguments,
        _stop,
        examples=("sysctr stop demo", "sysctr stop --timeout 5 101 102", "sysctr stop --kill demo"),
    ),
    "shutdown": Command(_shutdown_arguments, _shutdown, examples=("sysctr shutdown demo --timeout 60",)),
    "reboot": Command(_reboot_arguments, _reboot, examples=("sysctr reboot demo",)),
    "freeze": Command(_freeze_arguments, _freeze, examples=("sysctr freeze demo",)),
    "thaw": Command(_thaw_arguments, _thaw, examples=("sysctr thaw --all",)),
    "destroy": Command(
        _destroy_arguments,
        _destroy,
        examples=("sysctr destroy demo", "sysctr destroy --force --yes 101 102"),
    ),
    "wait": Command(
        _wait_arguments,
        _wait,
        examples=("sysctr wait demo", "sysctr wait demo --state stopped --timeout 30"),
    ),
}
