"""Looking at containers: list, status, info. `list` is the command whose imports are counted."""

import sys

from sysctr.cli.command import Command, json_option, one_container, quiet_option
from sysctr.cli.output import (
    duration,
    moment,
    notice,
    plain,
    print_fields,
    print_json,
    print_table,
    size,
    state_colour,
)
from sysctr.cli.table import Column
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from sysctr.client import Client

_COLUMNS = (
    Column("ID", right=True),
    Column("NAME", flexible=True),
    Column("STATE", colour=state_colour),
    Column("ADDRESS", flexible=True, narrowest=15),
    Column("MEMORY", right=True),
    Column("UPTIME", right=True),
    Column("TEMPLATE", flexible=True, optional=True),
    Column("TAGS", flexible=True, optional=True),
)


def shown_state(container: "dict[str, Any]") -> str:
    """Return the state as people see it: away where another host has it, booting until it said READY."""
    if container.get("away"):
        return "away"
    if container["state"] == "running" and container.get("booted") is False:
        return "booting"
    return str(container["state"])


def ending(exit_: "dict[str, Any] | None") -> str:
    """Return how a container ended, as people say it.

    >>> ending({"reason": "exited", "status": 255}), ending({"reason": "halt", "status": 2})
    ('exited 255', 'halt')
    """
    if not exit_:
        return ""
    if exit_["reason"] == "killed":
        return f"killed by signal {exit_['status']}"
    return f"exited {exit_['status']}" if exit_["reason"] == "exited" else str(exit_["reason"])


def _state_cell(container: "dict[str, Any]") -> str:
    # Where it is, and what one has to look at: a file with a mistake, an end that nobody asked for inside.
    notes = [f"at {container['away'].get('name') or '?'}"] if container.get("away") else []
    if container.get("pool_error"):
        notes.append("no pool")
    elif container.get("error"):
        notes.append("damaged")
    state, exit_ = shown_state(container), container.get("exit") or {}
    if state == "stopped" and exit_.get("reason") not in (None, "halt", "reboot"):
        notes.append(f"exited {exit_['status']}" if exit_["reason"] == "exited" else exit_["reason"])
    return f"{state} ({', '.join(notes)})" if notes else state


def _row(container: "dict[str, Any]") -> "list[str]":
    return [
        str(container["id"]),
        container["name"],
        _state_cell(container),
        plain(container.get("addresses")) or "-",
        size(container.get("memory_bytes")),
        duration(container.get("uptime_s")),
        container.get("template") or "-",
        plain(container.get("tags")) or "-",
    ]


def _list_arguments(parser: "argparse.ArgumentParser") -> None:
    parser.add_argument("--tag", metavar="T", help="only containers with this tag")
    parser.add_argument("--running", action="store_true", help="only containers that are not stopped")
    json_option(parser)
    quiet_option(parser)


def _list(arguments: "argparse.Namespace", client: "Client") -> None:
    answer = client.get(path("containers"), {"tag": arguments.tag})
    containers = field(answer, "containers")
    if arguments.running:
        containers = [one for one in containers if shown_state(one) not in ("stopped", "away")]
    if arguments.json:
        print_json(containers)
    elif arguments.quiet:
        for container in containers:
            print(container["id"])
    else:
        print_table(
            _COLUMNS,
            [_row(container) for container in containers],
            if_empty="no containers; `sysctr create NAME --template T` makes one",
        )
        if sys.stdout.isatty():
            for line in answer.get("notices", ()):
                notice(line)


def _status_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    json_option(parser)


def _status(arguments: "argparse.Namespace", client: "Client") -> None:
    container = field(client.get(path("containers", arguments.container)), "container")
    if arguments.json:
        told = ("id", "name", "state", "booted", "exit", "task", "away")
        print_json({name: container.get(name) for name in told})
    else:
        # One word of the API's, which knows no booting.
        print("away" if container.get("away") else container["state"])


def _info_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    json_option(parser)


def _info(arguments: "argparse.Namespace", client: "Client") -> None:
    container = field(client.get(path("containers", arguments.container)), "container")
    if arguments.json:
        print_json(container)
        return
    print_fields(_fields(container))


def _fields(container: "dict[str, Any]") -> "list[tuple[str, str]]":
    usage = {**container, **(container.get("usage") or {})}
    exit_ = container.get("exit")
    task = container.get("task")
    pending = container.get("pending")
    fields = [
        ("id", str(container["id"])),
        ("name", container["name"]),
        ("state", shown_state(container)),
        ("away", _away(container.get("away"))),
        ("problem", plain(container.get("error"))),
        ("task", f"{task['kind']} ({task['id']})" if task else ""),
        ("last end", f"{ending(exit_)}{_at(exit_.get('ended'))}" if exit_ else ""),
        ("template", plain(container.get("template"))),
        ("description", plain(container.get("description"))),
        ("tags", plain(container.get("tags"))),
        ("addresses", plain(container.get("addresses"))),
    ]
    for number, nic in enumerate(container.get("nets") or []):
        fields.append((f"net {number}", plain({key: value for key, value in nic.items() if value})))
    fields += [
        ("init", plain(container.get("init"))),
        ("pid", plain(container.get("pid"))),
        ("uptime", _unless_none(container.get("uptime_s"), duration)),
        ("cpu time", _unless_none(usage.get("cpu_s"), duration)),
        ("memory", _memory(usage)),
        ("swap used", _unless_none(usage.get("swap_bytes") or None, size)),
        ("pool", plain(container.get("pool"))),
        ("disk used", _disk(container)),
        ("traffic", _traffic(usage)),
        ("processes", plain(usage.get("pids"))),
        ("snapshots", plain(container.get("snapshots") or None)),
        ("last backup", _last_backup(container.get("last_backup"))),
        *((_mount_label(mount), _mount(mount)) for mount in container.get("mounts") or []),
        ("limits", plain(container.get("limits"))),
        ("environment", plain(container.get("environment"))),
        ("start on boot", plain(container.get("onboot"))),
        ("protected", plain(container.get("protected"))),
        ("pending", f"{plain(sorted(pending))} (until the next start)" if pending else ""),
        ("created", _unless_none(container.get("created"), _moment)),
        ("ids on the host", _ids(container.get("idmap"))),
        ("uuid", plain(container.get("uuid"))),
        ("configuration", plain(container.get("config_file"))),
    ]
    return fields


def _away(away: "dict[str, Any] | None") -> str:
    if not away:
        return ""
    since = f" since {moment(away['time'])}" if isinstance(away.get("time"), int | float) else ""
    return f"at {away.get('name') or '?'}{since} (migration {away.get('id')}); it is not started here"


def _at(ended: "Any") -> str:
    return f" at {moment(ended)}" if isinstance(ended, int | float) else ""


def _ids(idmap: "dict[str, int] | None") -> str:
    return f"{idmap['first']} to {idmap['first'] + idmap['count'] - 1}" if idmap else ""


def _mount_label(mount: "dict[str, Any]") -> str:
    return str(mount["key"]).replace(".", " ") or "kept volume"


def _mount(mount: "dict[str, Any]") -> str:
    # A tmpfs has no source, and a kept volume no target.
    source = mount["source"] or mount["kind"]
    shown = f"{source} on {mount['target']}" if mount["target"] else source
    notes = [*mount["options"], *([mount["state"]] if mount["state"] in ("pending", "leaving") else [])]
    return f"{shown} ({', '.join(notes)})" if notes else shown


def _traffic(usage: "dict[str, Any]") -> str:
    if usage.get("net_received_bytes") is None:
        return ""
    return f"{size(usage['net_received_bytes'])} received, {size(usage.get('net_sent_bytes'))} sent"


def _moment(created: "Any") -> str:
    return moment(created) if isinstance(created, int | float) else str(created)


def _unless_none(value: "Any", show: "Any") -> str:
    return "" if value is None else show(value)


def _last_backup(made: "dict[str, Any] | None") -> str:
    if not made:
        return ""
    import time

    ago = duration(int(max(0, time.time() - made["time"])))
    return f"{moment(made['time'])}, {ago} ago, {size(made.get('size_bytes'))} in {made.get('archive')}"


def _disk(container: "dict[str, Any]") -> str:
    limit = container.get("disk_limit_bytes")
    if limit is None:
        return _unless_none(container.get("disk_used_bytes"), size)
    return f"{size(container.get('disk_filled_bytes'))} of {size(limit)}"


def _memory(usage: "dict[str, Any]") -> str:
    if usage.get("memory_bytes") is None:
        return ""
    most = usage.get("memory_max_bytes")
    return f"{size(usage['memory_bytes'])} of {size(most)}" if most else size(usage["memory_bytes"])


COMMANDS = {
    "list": Command(_list_arguments, _list, examples=("sysctr list", "sysctr list --tag web -q")),
    "status": Command(_status_arguments, _status, examples=("sysctr status demo",)),
    "info": Command(_info_arguments, _info, examples=("sysctr info demo", "sysctr info 101 --json")),
}
