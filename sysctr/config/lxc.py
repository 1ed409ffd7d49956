"""From a configuration of LXC (lxc.container.conf(5)) to our settings, and what it says of its files."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from sysctr.config import addresses, values
from sysctr.config.foreign import (
    ForeignSnapshot,
    name_from,
    set_cores,
    set_cpu,
    set_name,
    set_size,
    set_variable,
)
from sysctr.config.pct_raw import read_entry
from sysctr.config.pct_reading import Reading
from sysctr.config.pct_tables import read_card
from sysctr.errors import ConfigError

_LINE = re.compile(r"[ \t]*(lxc\.[A-Za-z0-9_.-]+)[ \t]*=(.*)")
_NET = re.compile(r"lxc\.net\.([0-9]{1,4})\.([a-z0-9_.]+)")
_IDMAP = re.compile(r"([ugb])[ \t]+([0-9]{1,10})[ \t]+([0-9]{1,10})[ \t]+([0-9]{1,10})")
# What Debian and LXC itself ship: defaults of every container, which sysctr has its own of.
_STANDARD_INCLUDE = re.compile(r"/usr(/local)?/share/lxc/config/[a-z0-9.-]+\.conf(\.d/?)?")
_MOST_LINES = 10_000
_MOST_RANGES = 64
_HIGHEST_ID = 2**32 - 2
_MOST_WEIGHT = 10_000
# Of LXC 2 and before; lxc-update-config rewrites them.
_LEGACY = ("lxc.rootfs", "lxc.utsname", "lxc.id_map", "lxc.network.type", "lxc.mount")
_LONE_LIMITS = {
    "lxc.cgroup2.memory.max": "limits.memory",
    "lxc.cgroup.memory.limit_in_bytes": "limits.memory",
    "lxc.cgroup2.memory.swap.max": "limits.swap",
}
_SILENT = re.compile(
    r"lxc\.(rootfs\.path|uts\.name|idmap|arch|net\..*|tty\..*|pty\..*|console\..*|log\..*|mount\.auto|autodev"
    r"|cap\.drop|apparmor\.profile|start\.(delay|order)|monitor\..*|cgroup\.(relative|dir\..*)"
    r"|cgroup2?\.devices\..*|rootfs\.(managed|mount)|selinux\..*|namespace\..*|group)"
)


@dataclass(frozen=True)
class IdRange:
    """`count` ids from `inside` up are the disk's from `disk` up."""

    inside: int
    disk: int
    count: int


class LxcConfig:
    """A configuration that was read; `rootfs` is the directory of its files."""

    def __init__(self, lines: list[tuple[str, str]], directory_name: str, doing: str) -> None:
        self._lines = lines
        self._directory_name = directory_name
        # Of keys that have one value the last one holds.
        self._values = dict(lines)
        for key in _LEGACY:
            if key in self._values and "lxc.rootfs.path" not in self._values:
                raise ConfigError(
                    f"cannot {doing}: its configuration is that of LXC 2",
                    "`lxc-update-config -c FILE` rewrites it",
                )
        self.host_name = self._values.get("lxc.uts.name", "") or directory_name
        self.name = name_from(self.host_name)
        self.uuid = ""
        self.snapshots: tuple[ForeignSnapshot, ...] = ()
        # Those that lxc-snapshot made lie beside the configuration, which does not name them.
        self.has_snapshots = False
        self.rootfs = self._rootfs(doing)
        self.users, self.groups = self._id_ranges(doing)
        self.macs = frozenset(self._macs())

    @property
    def privileged(self) -> bool:
        """Tell whether it has the host's ids."""
        return "lxc.idmap" not in self._values

    def convert(self, reading: Reading) -> None:
        """Take over what goes over, and note what does not."""
        set_name(reading, "lxc.uts.name", self.host_name, self.name)
        if self.privileged:
            reading.changed("lxc.idmap", "it was privileged; here its root is nobody on the host")
        if self.has_snapshots:
            reading.dropped("snapshots", "snapshots stay behind")
        for key, value in self._lines:
            if key in _READERS:
                _READERS[key](reading, key, value)
            elif key in _LONE_LIMITS:
                set_size(reading, key, _LONE_LIMITS[key], value)
            else:
                self._read_other(reading, key, value)
        self._read_cpu(reading)
        self._read_memory_and_swap(reading)
        self._read_nets(reading)

    # What its files are

    def _rootfs(self, doing: str) -> str:
        text = self._values.get("lxc.rootfs.path", "")
        if not text:
            raise ConfigError(f"cannot {doing}: its configuration names no lxc.rootfs.path")
        kind, colon, path = text.partition(":")
        if text.startswith("/"):
            kind, colon, path = "dir", ":", text
        if kind != "dir" or not colon:
            raise ConfigError(
                f"cannot {doing}: its rootfs is {values.shown(text)}, and only directories (dir:) are read",
                "`lxc-copy -B dir` makes a container of it whose rootfs is one",
            )
        return values.parse_path(path.rstrip("/") or "/")

    def _id_ranges(self, doing: str) -> tuple[tuple[IdRange, ...], tuple[IdRange, ...]]:
        """Return how ids inside are stored, of users and of groups."""
        users: list[IdRange] = []
        groups: list[IdRange] = []
        for key, value in self._lines:
            if key != "lxc.idmap":
                continue
            match = _IDMAP.fullmatch(value)
            if match is None:
                raise ConfigError(f"cannot {doing}: lxc.idmap = {values.shown(value)} is no range of ids")
            one = IdRange(*(int(match[part]) for part in (2, 3, 4)))
            if not one.count or max(one.inside, one.disk) + one.count > _HIGHEST_ID:
                raise ConfigError(f"cannot {doing}: lxc.idmap = {values.shown(value)} has no ids")
            users += [one] if match[1] in "ub" else []
            groups += [one] if match[1] in "gb" else []
        if max(len(users), len(groups)) > _MOST_RANGES:
            raise ConfigError(f"cannot {doing}: lxc.idmap has more than {_MOST_RANGES} ranges")
        # Files that such a rootfs was mounted with have the ids inside.
        options = self._values.get("lxc.rootfs.options", "").split(",")
        if self.privileged or "idmap=container" in options:
            whole = (IdRange(0, 0, 65536),)
            return whole, whole
        for kind, ranges in (("users", users), ("groups", groups)):
            if not ranges:
                raise ConfigError(f"cannot {doing}: lxc.idmap has no ids of {kind}")
        return tuple(users), tuple(groups)

    def _macs(self) -> list[str]:
        found = []
        for key, value in self._values.items():
            if key.startswith("lxc.net.") and key.endswith(".hwaddr"):
                try:
                    found.append(addresses.parse_mac(value))
                except ConfigError:
                    continue
        return found

    # Settings

    def _read_other(self, reading: Reading, key: str, value: str) -> None:
        if key == "lxc.mount.entry":
            target = [*value.split(), "", ""][1].removeprefix(self.rootfs).strip("/")
            if target in _OWN_MOUNTS:
                return
            if f" {self.rootfs}/" in value:
                value = value.replace(f" {self.rootfs}/", " ", 1)
            read_entry(reading, key, value)
        elif key == "lxc.include":
            if not _STANDARD_INCLUDE.fullmatch(value):
                reading.dropped(key, f"what {values.shown(value)} says was not looked at")
            elif value.endswith("nesting.conf"):
                reading.dropped(key, "sysctr has no nesting", "feature")
        elif key.startswith("lxc.hook."):
            reading.dropped(key, f"sysctr runs no hook scripts ({values.shown(value)})", "hook")
        elif key.endswith(".devices.allow"):
            reading.dropped(key, f"a device is given by device.N alone ({values.shown(value)})")
        elif not _SILENT.fullmatch(key) and key not in _TOGETHER:
            reading.dropped(key, f"sysctr has no such setting ({values.shown(value)})")

    def _read_cpu(self, reading: Reading) -> None:
        found = self._values
        if text := found.get("lxc.cgroup2.cpu.max", ""):
            quota, _, period = text.partition(" ")
            set_cpu(reading, "lxc.cgroup2.cpu.max", quota, period.strip() or "100000")
        elif text := found.get("lxc.cgroup.cpu.cfs_quota_us", ""):
            period = found.get("lxc.cgroup.cpu.cfs_period_us", "") or "100000"
            set_cpu(reading, "lxc.cgroup.cpu.cfs_quota_us", text, period)
        weight = found.get("lxc.cgroup2.cpu.weight", "")
        shares = found.get("lxc.cgroup.cpu.shares", "")
        if weight:
            reading.set("lxc.cgroup2.cpu.weight", "limits.cpu_weight", weight)
        elif re.fullmatch(r"[0-9]{1,9}", shares):
            # As runc and systemd turn the shares of v1 into weights.
            scaled = 1 + (max(int(shares), 2) - 2) * (_MOST_WEIGHT - 1) // 262142
            reading.set("lxc.cgroup.cpu.shares", "limits.cpu_weight", str(min(scaled, _MOST_WEIGHT)))

    def _read_memory_and_swap(self, reading: Reading) -> None:
        """Take over what v1 counts together."""
        key = "lxc.cgroup.memory.memsw.limit_in_bytes"
        both, memory = self._values.get(key, ""), reading.changes.get("limits.memory")
        if not both or "limits.swap" in reading.changes:
            return
        if not isinstance(memory, str):
            reading.dropped(key, "there is no limit of memory that it goes with")
            return
        try:
            swap_bytes = values.parse_size(both) - values.parse_size(memory)
        except ConfigError as error:
            reading.dropped(key, error.message)
            return
        reading.set(key, "limits.swap", values.format_size(max(swap_bytes, 0)))

    def _read_nets(self, reading: Reading) -> None:
        cards: dict[int, dict[str, str]] = {}
        for key, value in self._lines:
            if match := _NET.fullmatch(key):
                cards.setdefault(int(match[1]), {})[match[2]] = value
        for number in sorted(cards):
            _read_net(reading, number, cards[number])


def parse(text: str, directory_name: str, doing: str) -> LxcConfig:
    """Read a configuration of the container in the directory of that name; ConfigError says why it cannot be.

    >>> parse("lxc.rootfs.path = dir:/var/lib/lxc/web/rootfs", "web", "import it").rootfs
    '/var/lib/lxc/web/rootfs'
    """
    lines: list[tuple[str, str]] = []
    for line in text.split("\n")[:_MOST_LINES]:
        if match := _LINE.fullmatch(line.rstrip("\r")):
            value = match[2].strip()
            if len(value) > 1 and value[0] in "\"'" and value[-1] == value[0]:
                value = value[1:-1]
            if not value:
                # It takes back what was said before, all that is below it too.
                cleared = match[1]
                lines = [one for one in lines if one[0] != cleared and not one[0].startswith(f"{cleared}.")]
            else:
                lines.append((match[1], value))
    return LxcConfig(lines, directory_name, doing)


def _read_net(reading: Reading, number: int, given: dict[str, str]) -> None:
    key = f"lxc.net.{number}"
    kind = given.get("type", "veth")
    if kind == "empty":
        return
    if kind == "none":
        reading.dropped(key, "no container here has the network of its host")
        return
    if kind != "veth":
        reading.dropped(key, f"sysctr has no cards of type {values.shown(kind)}")
        return
    card = {"type": "veth", "bridge": given.get("link", ""), "name": given.get("name", "")}
    # In an address that new containers get, x stands for any digit.
    if "hwaddr" in given and "x" not in given["hwaddr"].lower():
        card["hwaddr"] = given["hwaddr"]
    if "mtu" in given:
        card["mtu"] = given["mtu"]
    card["ip"] = given.get("ipv4.address", "").split()[0] if given.get("ipv4.address") else "dhcp"
    if given.get("ipv4.gateway", "auto") != "auto" and card["ip"] != "dhcp":
        card["gw"] = given["ipv4.gateway"]
    for name in ("ipv6.address", "ipv6.gateway"):
        if given.get(name, "auto") != "auto":
            reading.dropped(f"{key}.{name}", "sysctr gives a card no IPv6 address; its own init may")
    for name in ("script.up", "script.down", "vlan.id", "veth.vlan.id", "veth.ipv4.route"):
        if name in given:
            reading.dropped(f"{key}.{name}", f"sysctr has no such setting ({values.shown(given[name])})")
    read_card(reading, key, str(number), {name: value for name, value in card.items() if value})


def _read_start(reading: Reading, key: str, value: str) -> None:
    if value == "1":
        reading.set(key, "onboot", True)


def _read_environment(reading: Reading, key: str, value: str) -> None:
    name, equals, text = value.partition("=")
    if equals:
        set_variable(reading, key, name.strip(), text)
    else:
        reading.dropped(key, f"{values.shown(name)} was the host's")


def _read_init(reading: Reading, key: str, value: str) -> None:
    if re.search(r"\s", value):
        reading.dropped(key, f"an init is started without arguments ({values.shown(value)})")
    elif value != "/sbin/init":
        reading.set(key, "init", value)


def _read_halt(reading: Reading, key: str, value: str) -> None:
    reading.set(key, "stop_signal", value)


def _read_pids(reading: Reading, key: str, value: str) -> None:
    if value != "max":
        reading.set(key, "limits.pids", value)


def _read_cpuset(reading: Reading, key: str, value: str) -> None:
    set_cores(reading, key, value, count=False)


_READERS: dict[str, Callable[[Reading, str, str], None]] = {
    "lxc.start.auto": _read_start,
    "lxc.environment": _read_environment,
    "lxc.init.cmd": _read_init,
    "lxc.signal.halt": _read_halt,
    "lxc.cgroup2.pids.max": _read_pids,
    "lxc.cgroup.pids.max": _read_pids,
    "lxc.cgroup2.cpuset.cpus": _read_cpuset,
    "lxc.cgroup.cpuset.cpus": _read_cpuset,
}
# Every container here has them anyway.
_OWN_MOUNTS = ("dev/shm", "dev/mqueue", "proc", "sys")
# Those that are read together with others.
_TOGETHER = (
    "lxc.cgroup2.cpu.max", "lxc.cgroup2.cpu.weight", "lxc.cgroup.cpu.cfs_quota_us",
    "lxc.cgroup.cpu.cfs_period_us", "lxc.cgroup.cpu.shares", "lxc.cgroup.memory.memsw.limit_in_bytes",
    "lxc.rootfs.options",
)  # fmt: skip
