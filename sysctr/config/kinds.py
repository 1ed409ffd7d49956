"""The kinds of value that the tables of keys are made of."""

import math
from collections.abc import Callable
from typing import Any

from sysctr.config import addresses, mounts, schedule, values
from sysctr.config.table import Kind
from sysctr.errors import ConfigError


def text_kind(
    placeholder: str,
    expected: str,
    parse: Callable[[str], str],
    choices: tuple[str, ...] = (),
    *,
    may_be_empty: bool = True,
    keeps_empty: bool = False,
) -> Kind:
    """Return the kind of a text that has one canonical spelling; empty means that nothing is said."""

    def read(text: str) -> str:
        return "" if not text and may_be_empty else parse(text)

    return Kind(placeholder, expected, (str,), read, read, str, choices, keeps_empty=keeps_empty)


def whole_kind(lowest: int, highest: int) -> Kind:
    """Return the kind of a whole number within bounds."""
    expected = f"a whole number from {lowest} to {highest}"

    def read(number: int) -> int:
        if not lowest <= number <= highest:
            raise ConfigError(f"{values.shown(number)} is not {expected}")
        return number

    def parse(text: str) -> int:
        return read(values.parse_whole(text))

    return Kind("NUMBER", expected, (int,), parse, read, int)


def size_kind(lowest_bytes: int) -> Kind:
    """Return the kind of a size of at least so much; TOML may also say it as a number of bytes."""

    least = values.format_size(lowest_bytes)

    def read(size: str | int) -> int:
        size_bytes = values.parse_size(size) if isinstance(size, str) else size
        if not lowest_bytes <= size_bytes <= values.LARGEST_SIZE_BYTES:
            hint = "a number without a unit is in bytes" if 0 < size_bytes < 2**20 else ""
            raise ConfigError(f"{values.shown(size)} is not a size of {least} or more", hint)
        return size_bytes

    expected = "a size such as 512M or 8G"
    return Kind("SIZE", expected, (str, int), read, read, values.format_size, unit="bytes")


def list_kind(item: Kind, expected: str, most: int, *, unordered: bool = False) -> Kind:
    """Return the kind of a list of texts without repetition; on a command line commas separate them."""

    def read(items: list[object]) -> tuple[str, ...]:
        if len(items) > most:
            raise ConfigError(f"{len(items)} items are more than {most}")
        read_items = []
        for given in items:
            if not isinstance(given, str) or not given:
                raise ConfigError(f"{values.shown(given)} is not {item.expected}")
            read_items.append(item.read(given))
        unique = tuple(dict.fromkeys(read_items))
        return tuple(sorted(unique)) if unordered else unique

    def parse(text: str) -> tuple[str, ...]:
        return read([part.strip() for part in text.split(",")])

    return Kind(f"{item.placeholder},...", expected, (list,), parse, read, list, item.choices)


def _address(text: str) -> str:
    return text if text in ("managed", "manual") else addresses.parse_cidr4(text)


def _cores(value: str | int) -> int | tuple[int, ...]:
    return values.parse_cores(value) if isinstance(value, str) else values.check_cores(value)


def _dump_cores(cores: int | tuple[int, ...]) -> str | int:
    return cores if isinstance(cores, int) else values.format_cores(cores)


def _cpu(value: float) -> float:
    # An integer of TOML may be larger than any float, which math.isfinite refuses to look at.
    if isinstance(value, int) and value > values.MOST_CPUS:
        return values.check_cpu(math.inf)
    return values.check_cpu(value)


def _dump_cpu(cpus: float) -> float | int:
    return int(cpus) if cpus.is_integer() else cpus


def _level(text: str) -> str:
    if text not in LOG_LEVELS:
        raise values.refuse(text, f"one of {', '.join(LOG_LEVELS)}")
    return text


def _same(value: Any) -> Any:
    return value


LOG_LEVELS = ("debug", "info", "warning", "error")

TEXT = text_kind("TEXT", "a text", values.parse_text)
VARIABLE = text_kind(
    "TEXT", "a text", lambda text: values.parse_text(text, 32768), may_be_empty=False, keeps_empty=True
)
NAME = text_kind("NAME", "a container name", values.parse_name, may_be_empty=False)
TEMPLATE = text_kind("TEMPLATE", "a template name", values.parse_template)
PATH = text_kind("PATH", "an absolute path", values.parse_path)
SIGNAL = text_kind("SIGNAL", "a signal such as SIGTERM", values.parse_signal, ("SIGTERM", "SIGRTMIN+3"))
INTERFACE = text_kind("NAME", "an interface name", addresses.parse_ifname)
CARD = text_kind("NAME", "an interface name", addresses.parse_ifname, ("eth0",), may_be_empty=False)
MAC = text_kind("MAC", "a MAC address", addresses.parse_mac)
ADDRESS = text_kind(
    "ADDRESS",
    "managed, manual, or an address with its prefix such as 10.0.0.2/24",
    _address,
    ("managed", "manual"),
    may_be_empty=False,
)
GATEWAY = text_kind("IP", "an IPv4 address", addresses.parse_ip4)
SUBNET = text_kind("SUBNET", "an IPv4 network such as 10.0.3.0/24", addresses.parse_subnet4)
DOMAIN = text_kind("DOMAIN", "a domain", addresses.parse_domain)
LEVEL = text_kind("LEVEL", f"one of {', '.join(LOG_LEVELS)}", _level, LOG_LEVELS, may_be_empty=False)

ENDPOINT = text_kind(
    "ADDRESS", "HOST:PORT, or [IPV6]:PORT", addresses.parse_endpoint, may_be_empty=False
)
ENDPOINTS = list_kind(ENDPOINT, "a list of addresses such as 192.0.2.1:8645", 16)
LISTEN = text_kind(
    "ADDRESS", "off, or an address with its port such as 10.0.0.1:8645", addresses.parse_listen, ("off",)
)

SCHEDULE = text_kind(
    "WHEN",
    "off, hourly, daily, weekly, or a time such as daily 03:00 or weekly sun 22:00",
    schedule.check_schedule,
    ("off", "hourly", "daily", "weekly"),
    may_be_empty=False,
)

BOOL = Kind("BOOL", "true or false", (bool,), values.parse_bool, _same, bool, ("true", "false"))
CORES = Kind(
    "CORES",
    "a number of processors, or a list such as 0-3,5",
    (str, int),
    values.parse_cores,
    _cores,
    _dump_cores,
)
CPU = Kind("NUMBER", "a number of processors such as 1.5", (int, float), values.parse_cpu, _cpu, _dump_cpu)
WEIGHT = whole_kind(1, 10000)
# The kernel's own bound on process ids; fewer than some ten leave no room for an init and a shell.
PIDS = whole_kind(16, 4194304)
MTU = whole_kind(576, 65535)
KEEP = whole_kind(0, 1000)
MEMORY = size_kind(16 * 2**20)
SWAP = size_kind(0)
DISK = size_kind(16 * 2**20)
VOLUME_SIZE = size_kind(2**20)
VOLUME = text_kind("NAME", "a volume's name", mounts.parse_volume)
POOL = text_kind("POOL", "the name of a pool", mounts.parse_pool)
MODE = text_kind("MODE", "a file's permissions in octal", mounts.parse_mode)
IDMAP = text_kind("HOST=INSIDE", "a map of ids such as 1000=1000", mounts.parse_idmap)
# An id inside; a container with more than 65536 of them is checked when it starts.
ID = whole_kind(0, 2**32 - 2)

TAGS = list_kind(
    text_kind("TAG", "a tag", values.parse_tag, may_be_empty=False), "a list of tags", 64, unordered=True
)
NAMESERVERS = list_kind(text_kind("IP", "an IP address", addresses.parse_ip), "a list of IP addresses", 3)
DOMAINS = list_kind(text_kind("DOMAIN", "a domain", addresses.parse_domain), "a list of domains", 6)
