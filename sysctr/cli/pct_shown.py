"""What `pct` prints for scripts to read, in Proxmox's own format: list, status, config, df and others."""

import os
import sys
import time

from sysctr import errors
from sysctr.cli.output import notice, size
from sysctr.cli.pct_arguments import Typed
from sysctr.cli.pct_life import container
from sysctr.cli.snapshot import tree
from sysctr.cli.table import neutralise
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sysctr.client import Client

_LIST = "{:<10} {:<10} {:<12} {:<20}"
# What Proxmox's lock says while a task of ours holds a container.
_LOCKS = {
    "backup": "backup", "create": "create", "restore": "create", "clone": "create", "destroy": "destroyed",
    "snapshot": "snapshot", "delsnapshot": "snapshot-delete", "rollback": "rollback", "migrate": "migrate",
}  # fmt: skip
_TIME = "%Y-%m-%d %H:%M:%S"
_NAME_CELLS = 30
_DF = ("MP", "Volume", "Size", "Used", "Avail", "Use%", "Path")
# Ours, as pct calls them; numbered ones and those of [limits] follow rules.
_CALLED = {
    "name": "hostname", "protected": "protection", "init": "entrypoint", "dns.nameservers": "nameserver",
    "dns.search": "searchdomain", "limits.cpu": "cpulimit", "limits.cpu_weight": "cpuunits",
    "limits.disk": "rootfs",
}  # fmt: skip
_TABLES = {"net": "net", "mount": "mp", "device": "dev"}
_RUNTIME = "lxc.environment.runtime"
_SIZED = 2**30


def state(found: "dict[str, Any]") -> str:
    """Return the state as Proxmox has it, which knows two.

    >>> state({"state": "frozen"}), state({"state": "starting"})
    ('running', 'stopped')
    """
    return "running" if found["state"] in ("running", "frozen", "stopping") else "stopped"


def lock(found: "dict[str, Any]") -> str:
    """Return what Proxmox's column Lock has for a container that a task holds."""
    return _LOCKS.get((found.get("task") or {}).get("kind", ""), "")


def listing(typed: Typed, client: "Client") -> None:
    containers = field(client.get(path("containers")), "containers")
    if containers:
        print(_LIST.format("VMID", "Status", "Lock", "Name"))
    for found in sorted(containers, key=lambda one: one["id"]):
        print(_LIST.format(found["id"], state(found), lock(found), neutralise(found["name"])))


def status(typed: Typed, client: "Client") -> None:
    found = container(typed, client)
    if not typed.flag("verbose"):
        print(f"status: {state(found)}")
        return
    usage = {**found, **(found.get("usage") or {})}
    limits = found.get("limits") or {}
    facts = {
        "cpus": limits.get("cpu") or limits.get("cores"), "disk": found.get("disk_used_bytes"),
        "diskread": usage.get("io_read_bytes"), "diskwrite": usage.get("io_write_bytes"),
        "lock": lock(found), "maxdisk": found.get("disk_limit_bytes"),
        "maxmem": usage.get("memory_max_bytes"), "mem": usage.get("memory_bytes"), "name": found["name"],
        "netin": usage.get("net_received_bytes"), "netout": usage.get("net_sent_bytes"),
        "pid": found.get("pid"), "status": state(found), "swap": usage.get("swap_bytes"),
        "tags": ";".join(found.get("tags") or ()), "type": "lxc", "uptime": found.get("uptime_s") or 0,
        "vmid": found["id"],
    }  # fmt: skip
    for name, value in facts.items():
        if value not in (None, ""):
            print(neutralise(f"{name}: {value}"))


# The configuration


def config(typed: Typed, client: "Client") -> None:
    answer = client.get(path("containers", typed.words[0], "config"))
    said = _Said(typed, client)
    before = answer.get("in_force") if typed.flag("current") else None
    lines, left_out = said.lines(before or answer["config"])
    for key in sorted(lines, key=_order):
        print(neutralise(f"{_shown(key)}: {lines[key]}"))
    sys.stdout.flush()
    if left_out:
        notice(
            f"note: pct has no words for {', '.join(left_out)}: `sysctr config {typed.words[0]}` shows all"
        )


def pending(typed: Typed, client: "Client") -> None:
    answer = client.get(path("containers", typed.words[0], "config"))
    said = _Said(typed, client)
    new, _ = said.lines(answer["config"])
    before = answer.get("in_force")
    old = said.lines(before)[0] if before else new
    waiting = {_called(name) for name in answer["pending"]}
    for key in sorted({*new, *(old.keys() & waiting)}, key=_order):
        waits = key in waiting and old.get(key) != new.get(key)
        current = old.get(key) if key in waiting else new[key]
        if current is not None:
            deleted = waits and key not in new
            print(neutralise(f"{'del' if deleted else 'cur'} {_shown(key)}: {current}"))
        if waits and key in new:
            print(neutralise(f"new {_shown(key)}: {new[key]}"))


class _Said:
    """Settings as pct.conf has them, with the bridge, the pools and the volumes of this host."""

    def __init__(self, typed: Typed, client: "Client") -> None:
        self._found = container(typed, client)
        self._bridge = field(client.get(path("host")), "host")["bridge"]
        self._facts = self._guest(typed, client)

    def _guest(self, typed: Typed, client: "Client") -> "dict[str, str]":
        from sysctr.config import pct

        try:
            text = client.get(path("containers", typed.words[0], "pct"))["pct"]
        except errors.SysctrError:
            # Its pool is missing, and who looks at the configuration wants to see it all the more.
            return {}
        values = pct.read(text).root.values
        return {key: values[key] for key in ("arch", "ostype") if key in values}

    def lines(self, values: "dict[str, Any] | None") -> "tuple[dict[str, str], list[str]]":
        """Return the keys of pct with their values, and which of ours it has no words for."""
        from sysctr.config import pct, schema
        from sysctr.config.pct_export import to_pct
        from sysctr.config.pct_notes import DROPPED

        if values is None:
            raise errors.WrongState(
                f"cannot show the configuration of {self._found['id']}: {self._found.get('error')}"
            )
        parsed = schema.parse_config(values)
        limit = parsed.limits.disk_bytes
        exported = to_pct(
            parsed,
            number=self._found["id"],
            rootfs_size_bytes=limit or _SIZED,
            volume_sizes={mount.index: mount.size_bytes or _SIZED for mount in parsed.mounts},
            memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            default_bridge=self._bridge,
            managed_bridge=self._bridge,
        )
        root = exported.document.root
        said = {**root.values, **self._facts}
        if parsed.limits.swap_bytes is None:
            # Without the line Proxmox would have a limit; with a number it would be a lie.
            said.pop("swap", None)
        pool = self._found.get("pool") or "default"
        volume = self._found.get("volume") or self._found["id"]
        said["rootfs"] = _with_volume(said["rootfs"], f"{pool}:{volume}", sized=limit is not None)
        for mount in parsed.mounts:
            key, name = f"mp{mount.index}", f"{self._found['id']}-{mount.name}"
            if mount.kind == "volume" and key in said:
                sized = mount.size_bytes is not None
                said[key] = _with_volume(said[key], f"{mount.pool or pool}:{name}", sized=sized)
        if root.description:
            # In a file it is on lines of its own; here it is one, and encoded.
            encoded = pct.write(pct.Document(pct.Section(root.description))).splitlines()
            said["description"] = "".join(f"{line.removeprefix('#')}%0A" for line in encoded)
        said |= {f"{_RUNTIME}: {item.partition('=')[0]}": item for item in root.environment}
        left_out = [note.key for note in exported.notes if note.kind == DROPPED]
        return said, [key for key in left_out if not key.endswith((".name", ".pool")) and key != "template"]


def _with_volume(line: str, volume: str, *, sized: bool) -> str:
    """Return the line of a volume with another name, and without a size that it does not have.

    >>> _with_volume("local:subvol-101-disk-0,mp=/data,size=1G", "default:101-disk0", sized=False)
    'default:101-disk0,mp=/data'
    """
    rest = [item for item in line.split(",")[1:] if sized or not item.startswith("size=")]
    return ",".join([volume, *rest])


def _shown(key: str) -> str:
    # Each variable of the environment is a line of the same name.
    return key.partition(":")[0]


def _order(key: str) -> "tuple[bool, str]":
    # Lines for LXC come last.
    return key.startswith("lxc."), key


def _called(name: str) -> str:
    """Return what pct calls one of our keys.

    >>> _called("net.0.ip"), _called("limits.memory"), _called("onboot")
    ('net0', 'memory', 'onboot')
    """
    if name in _CALLED:
        return _CALLED[name]
    top, _, rest = name.partition(".")
    if top in _TABLES:
        return f"{_TABLES[top]}{rest.partition('.')[0]}"
    if top == "environment":
        return f"{_RUNTIME}: {rest}"
    return rest if top == "limits" else name


# Snapshots, disks, processors


def snapshots(typed: Typed, client: "Client") -> None:
    answer = client.get(path("containers", typed.words[0], "snapshots"))
    found = field(answer, "snapshots")
    by_name = {one["name"]: one for one in found}
    for depth, name in tree(found, answer.get("parent", ""), every_level=True):
        prefix = f"{' ' * depth}`->"
        if name:
            one = by_name[name]
            made = time.strftime(_TIME, time.localtime(one["created"]))
            text = str(one.get("description") or "no-description").splitlines()[0]
        else:
            name, made, text = "current", "", "You are here!"
        cells = max(10, _NAME_CELLS - len(prefix))
        print(f"{prefix} {neutralise(name):<{cells}} {made:<23} {neutralise(text)}")


def disks(typed: Typed, client: "Client") -> None:
    found = container(typed, client)
    pools = {pool["name"]: pool for pool in field(client.get(path("pools")), "pools")}
    pool = found.get("pool") or "default"
    root = {
        "source": f"{pool}:{found.get('volume') or found['id']}", "used_bytes": found.get("disk_used_bytes"),
        "size_bytes": found.get("disk_limit_bytes"), "target": "/",
    }  # fmt: skip
    rows = [list(_DF), _disk_row("rootfs", root, pools)]
    for mount in found.get("mounts") or []:
        if mount["kind"] == "volume" and mount["key"]:
            rows.append(_disk_row(mount["key"].replace("mount.", "mp"), mount, pools))
    widths = [max(len(row[at]) for row in rows) for at in range(len(_DF))]
    for row in rows:
        cells = (f"{cell:<{wide}}" for cell, wide in zip(row, widths, strict=True))
        print(neutralise(" ".join(cells).rstrip()))


def _disk_row(name: str, disk: "dict[str, Any]", pools: "dict[str, Any]") -> "list[str]":
    used, limit = disk["used_bytes"], disk["size_bytes"]
    free = pools.get(disk["source"].partition(":")[0], {}).get("free_bytes")
    if limit is None and None not in (used, free):
        # Without a limit it may have all that is free.
        limit = used + free
    left = None if None in (used, limit) else max(0, limit - used)
    share = f"{100 * used / limit:.1f}" if limit and used is not None else "-"
    return [name, disk["source"], size(limit), size(used), size(left), share, disk["target"]]


def cpusets(typed: Typed, client: "Client") -> None:
    containers = field(client.get(path("containers")), "containers")
    rows = [(str(one["id"]), _processors(one["pid"])) for one in containers if one.get("pid")]
    if not rows:
        return
    every = sorted({number for _, numbers in rows for number in numbers})
    wide = max(len(name) for name, _ in rows) + 1
    cells = len(str(every[-1])) if every else 1
    lines = []
    for name, numbers in rows:
        shown = (f"{number if number in numbers else '':>{cells}}" for number in every)
        lines.append(f"{name + ':':<{wide}} {' '.join(shown)}")
    rule = "-" * max(len(line) for line in lines)
    print("\n".join([rule, *(line.rstrip() for line in lines), rule]))


def _processors(pid: int) -> "list[int]":
    """Return the processors that a process may run on; none where it has ended meanwhile."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            found = [line.split()[1] for line in file if line.startswith("Cpus_allowed_list:")]
    except (OSError, IndexError):
        return []
    return _numbers(found[0]) if found else []


def _numbers(text: str) -> "list[int]":
    """Read a list of processors.

    >>> _numbers("0-2,5")
    [0, 1, 2, 5]
    """
    numbers = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def unlock(typed: Typed, client: "Client") -> None:
    task = container(typed, client).get("task")
    if task:
        raise errors.Busy(
            f"cannot unlock {typed.words[0]}: task {task['id']} ({task['kind']}) holds it",
            f"wait for it, or `sysctr task cancel {task['id']}`, which undoes what it did",
        )
    notice(f"note: nothing holds {typed.words[0]}: sysctr's locks end with their tasks")
