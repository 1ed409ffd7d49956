"""The daemon and the host: daemon start|stop|restart|status, doctor, version."""

import os
import socket
import sys

from sysctr import __version__, errors, launch
from sysctr.cli.command import Command, json_option
from sysctr.cli.output import coloured, notice, print_fields, print_json
from sysctr.cli.table import neutralise
from sysctr.client import START_TIMEOUT_S, field, not_permitted, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any, NoReturn

    from sysctr.client import Client
    from sysctr.paths import Layout

_STOP_TIMEOUT_S = 30.0
_CHECK_COLOURS = {"ok": "32", "warn": "33", "fail": "31"}
_ALONE = """\
import json, sys
where = sys.argv[1]
where in sys.path or sys.path.insert(0, where)
from sysctr.engine import doctor
from sysctr.paths import layout
checks = doctor.run(layout(), layout().bridge)
as_json = sys.argv[2] == "json"
print(json.dumps([check.as_dict() for check in checks], indent=2) if as_json else doctor.report(checks))
sys.exit(any(check.state == "fail" for check in checks))
"""


def daemon_pid(where: "Layout") -> "int | None":
    """Return the process that listens on the API's socket, or None if nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(where.api_socket)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except PermissionError as error:
            raise not_permitted(where) from error
        except OSError as error:
            raise errors.NoDaemon(
                f"cannot reach the daemon: {error.strerror} on {where.api_socket}"
            ) from error
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(peer[:4], sys.byteorder)


def _no_arguments(parser: "argparse.ArgumentParser") -> None:
    pass


def _here(client: "Client", what: str) -> None:
    if client.host:
        raise errors.Refused(
            f"cannot {what} of {client.host}: this is done on the host itself",
            "leave --host and SYSCTR_HOST out",
        )


def _start(arguments: "argparse.Namespace", client: "Client") -> None:
    _here(client, "start the daemon")
    _require_root("start")
    if client.reachable():
        notice("the daemon runs already")
        return
    launch.start(client.layout, START_TIMEOUT_S, client.reachable)


def _stop(arguments: "argparse.Namespace", client: "Client") -> None:
    _here(client, "stop the daemon")
    _require_root("stop")
    pid = daemon_pid(client.layout)
    if launch.managed_by_systemd(client.layout):
        launch.systemctl("stop")
    elif pid is None:
        notice("the daemon does not run")
    else:
        _terminate(pid)


def _restart(arguments: "argparse.Namespace", client: "Client") -> None:
    _here(client, "restart the daemon")
    _require_root("restart")
    if daemon_pid(client.layout) is not None:
        _stop(arguments, client)
    launch.start(client.layout, START_TIMEOUT_S, client.reachable)


def _require_root(verb: str) -> None:
    if os.geteuid() != 0:
        raise errors.Refused(f"cannot {verb} the daemon: only root may", "use sudo")


def _terminate(pid: int) -> None:
    import select
    import signal

    try:
        pid_fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(pid_fd, signal.SIGTERM)
        poll = select.poll()
        poll.register(pid_fd, select.POLLIN)
        if not poll.poll(_STOP_TIMEOUT_S * 1000):
            raise errors.SysctrError(
                f"cannot stop the daemon: process {pid} runs after {_STOP_TIMEOUT_S:.0f} s"
            )
    except ProcessLookupError:
        pass
    finally:
        os.close(pid_fd)


def _status_arguments(parser: "argparse.ArgumentParser") -> None:
    json_option(parser)


def _status(arguments: "argparse.Namespace", client: "Client") -> int:
    _here(client, "look at the daemon")
    pid = daemon_pid(client.layout)
    client.start = False
    host = field(client.get(path("host")), "host") if pid is not None else {}
    if arguments.json:
        print_json({"running": pid is not None, "pid": pid, "socket": client.layout.api_socket, "host": host})
    else:
        print_fields(
            [
                ("daemon", "runs" if pid is not None else "does not run"),
                ("pid", str(pid or "")),
                ("version", str(host.get("version", ""))),
                ("socket", client.layout.api_socket),
                (
                    "log",
                    "the journal"
                    if launch.managed_by_systemd(client.layout)
                    else f"{client.layout.log}/daemon.log",
                ),
            ]
        )
    return 0 if pid is not None else errors.NoDaemon.exit_code


def _doctor_arguments(parser: "argparse.ArgumentParser") -> None:
    json_option(parser)


def _doctor(arguments: "argparse.Namespace", client: "Client") -> int:
    # Looking starts no daemon: quickstart asks before anything is installed that a daemon would need.
    client.start = False
    try:
        checks = field(client.get(path("doctor")), "checks")
    except (errors.NoDaemon, errors.Refused):
        if client.host:
            raise
        _doctor_alone(as_json=arguments.json)
    if arguments.json:
        print_json(checks)
    else:
        for check in checks:
            _print_check(check)
    return 0 if all(check["ok"] for check in checks) else 1


def _doctor_alone(*, as_json: bool) -> "NoReturn":
    # The checks belong to the engine, which no command may import; so this process becomes them.
    sys.stdout.flush()
    argv = [sys.executable, "-I", "-c", _ALONE, launch.package_parent(), "json" if as_json else "text"]
    os.execv(sys.executable, argv)


def _print_check(check: "dict[str, Any]") -> None:
    state = check.get("state") or ("ok" if check["ok"] else "fail")
    mark = f"{state:<4}"
    if coloured(sys.stdout):
        mark = f"\x1b[{_CHECK_COLOURS.get(state, '0')}m{mark}\x1b[0m"
    detail = check.get("detail") or ""
    print(f"{mark}  {neutralise(check['check'])}{': ' if detail else ''}{neutralise(detail)}")
    if state != "ok" and check.get("hint"):
        print(f"      hint: {neutralise(check['hint'])}")


def _version_arguments(parser: "argparse.ArgumentParser") -> None:
    json_option(parser)


def _version(arguments: "argparse.Namespace", client: "Client") -> None:
    client.start = False
    try:
        daemon = field(client.get(path("host")), "host").get("version")
    except errors.SysctrError:
        daemon = None
    if arguments.json:
        print_json({"version": __version__, "daemon": daemon})
        return
    print(f"sysctr {__version__}")
    if daemon is not None and daemon != __version__:
        print(
            f"the daemon that runs is {neutralise(daemon)}: `sysctr daemon restart` changes to this version"
        )


COMMANDS = {
    "daemon status": Command(_status_arguments, _status, examples=("sysctr daemon status",)),
    "daemon start": Command(_no_arguments, _start, examples=("sysctr daemon start",)),
    "daemon stop": Command(_no_arguments, _stop, examples=("sysctr daemon stop",)),
    "daemon restart": Command(_no_arguments, _restart, examples=("sysctr daemon restart",)),
    "doctor": Command(_doctor_arguments, _doctor, examples=("sysctr doctor", "sysctr doctor --json")),
    "version": Command(_version_arguments, _version, examples=("sysctr version",)),
}
