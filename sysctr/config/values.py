"""Values as text: `parse_x` reads what a human or a file says, `format_x` writes it back; both are inverse.

A parse function accepts any text and raises nothing but ConfigError. Where the value is itself a text (a MAC,
an address, a name) parsing gives its one canonical spelling, so there is nothing left to format.
"""

import math
import re
import signal
import unicodedata
from collections.abc import Iterable, Mapping
from fractions import Fraction

from sysctr.errors import ConfigError

FIRST_CONTAINER_ID = 100
# The host's end of a NIC is named after the container, and an interface name has 15 characters.
LAST_CONTAINER_ID = 9999
LARGEST_SIZE_BYTES = 2**63 - 1
MOST_CPUS = 8192

_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,9})?)(?:([KMGTP])(?:iB|i|B)?|B)?", re.IGNORECASE)
_SIZE_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_TAG = re.compile(r"[a-z0-9_][a-z0-9_.+-]{0,62}")
_TEMPLATE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_PROPERTY_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_CPU_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_SIGNAL = re.compile(r"(?:SIG)?(RTMIN|RTMAX|[A-Z0-9]{1,8})(?:([+-])([0-9]{1,2}))?")
# Control characters, lone surrogates and the two Unicode line ends: each can break a line-oriented file or a
# terminal further on, and none belongs to a value.
_BROKEN = frozenset({"Cc", "Cs", "Zl", "Zp"})


def shown(value: object) -> str:
    """Return a value as an error message quotes it: escaped, and cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        # An int of thousands of digits (a hexadecimal one gets that far), or a list in a list in a list.
        return "what is given"
    return text if len(text) <= 80 else text[:76] + "..."


def refuse(value: object, what: str) -> ConfigError:
    """Return the error that says what a value is not."""
    return ConfigError(f"{shown(value)} is not {what}")


def parse_text(text: str, longest_bytes: int = 4096) -> str:
    """Return the text itself if it is one line without control characters.

    >>> parse_text("Web front end")
    'Web front end'
    """
    if any(unicodedata.category(character) in _BROKEN for character in text):
        raise refuse(text, "one line of text without control characters")
    if len(text.encode()) > longest_bytes:
        raise ConfigError(f"{shown(text)} is longer than {longest_bytes} bytes")
    return text


def parse_bool(text: str) -> bool:
    """Read a truth value the way Proxmox writes it, or TOML.

    >>> parse_bool("on"), parse_bool("0")
    (True, False)
    """
    lowered = text.lower()
    if lowered in ("true", "yes", "on", "1"):
        return True
    if lowered in ("false", "no", "off", "0"):
        return False
    raise refuse(text, "true or false")


def parse_whole(text: str) -> int:
    """Read a whole number in decimal."""
    if re.fullmatch(r"-?[0-9]{1,20}", text) is None:
        raise refuse(text, "a whole number")
    return int(text)


def parse_size(text: str) -> int:
    """Read a size in bytes; units are binary, with or without `iB`.

    >>> parse_size("512M"), parse_size("1.5GiB"), parse_size("4096")
    (536870912, 1610612736, 4096)
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise refuse(text, "a size, which is a number with K, M, G or T, such as 512M")
    size_bytes = int(Fraction(match[1]) * _SIZE_UNITS.get((match[2] or "").upper(), 1))
    if size_bytes > LARGEST_SIZE_BYTES:
        raise refuse(text, "a size that a computer has")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """Write a size exactly, in the largest unit that leaves no fraction.

    >>> format_size(536870912), format_size(1000)
    ('512M', '1000')
    """
    for unit, factor in reversed(_SIZE_UNITS.items()):
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return str(size_bytes)


def parse_cpu(text: str) -> float:
    """Read how much processor time a container may use, in processors.

    >>> parse_cpu("1.5")
    1.5
    """
    if re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,9})?", text) is None:
        raise refuse(text, "a number of processors such as 1.5")
    return check_cpu(float(text))


def check_cpu(cpus: float) -> float:
    """Return the number of processors if the kernel can enforce it; its finest step is a hundredth."""
    if not math.isfinite(cpus) or not 0.01 <= cpus <= MOST_CPUS:
        raise ConfigError(f"{shown(cpus)} processors are outside 0.01 to {MOST_CPUS}")
    return round(float(cpus), 2)


def parse_cores(text: str) -> int | tuple[int, ...]:
    """Read which processors: a number says how many, ranges say which ones.

    >>> parse_cores("2"), parse_cores("0-2,5"), parse_cores("3-3")
    (2, (0, 1, 2, 5), (3,))
    """
    if re.fullmatch(r"[0-9]{1,5}", text):
        return check_cores(int(text))
    cpus: set[int] = set()
    for part in text.split(",", MOST_CPUS):
        match = _CPU_RANGE.fullmatch(part)
        first = int(match[1]) if match else 0
        last = int(match[2] or match[1]) if match else -1
        if not first <= last < MOST_CPUS:
            raise refuse(text, "a number of processors such as 2, or a list such as 0-3,5")
        cpus.update(range(first, last + 1))
    return tuple(sorted(cpus))


def check_cores(count: int) -> int:
    """Return a count of processors if there can be so many."""
    if not 1 <= count <= MOST_CPUS:
        raise ConfigError(f"{shown(count)} processors are outside 1 to {MOST_CPUS}")
    return count


def format_cores(cores: int | tuple[int, ...]) -> str:
    """Write a number of processors, or the list of them; a list of one is a range, to tell it from a number.

    >>> format_cores(2), format_cores((0, 1, 2, 5)), format_cores((3,))
    ('2', '0-2,5', '3-3')
    """
    if isinstance(cores, int):
        return str(cores)
    written = format_cpu_list(cores)
    return f"{written}-{written}" if len(cores) == 1 else written


def format_cpu_list(cpus: Iterable[int]) -> str:
    """Write processors as the kernel's `cpuset.cpus` takes them.

    >>> format_cpu_list((0, 1, 2, 5))
    '0-2,5'
    """
    ranges: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def parse_name(text: str) -> str:
    """Return the text if it can name a container: it is the host name inside, so it follows DNS.

    >>> parse_name("web-1")
    'web-1'
    """
    if _NAME.fullmatch(text) is None or text.isdigit():
        rule = "lower-case letters, digits and inner hyphens, 63 at most and not digits alone"
        raise refuse(text, f"a container name, which has {rule}")
    return text


def parse_container_id(text: str) -> int:
    """Read the number of a container.

    >>> parse_container_id("101")
    101
    """
    if re.fullmatch(r"[0-9]{1,9}", text) is None:
        raise refuse(text, f"a container number from {FIRST_CONTAINER_ID} to {LAST_CONTAINER_ID}")
    return check_container_id(int(text))


def check_container_id(number: int) -> int:
    """Return the number if it can be that of a container."""
    if not FIRST_CONTAINER_ID <= number <= LAST_CONTAINER_ID:
        raise refuse(number, f"a container number from {FIRST_CONTAINER_ID} to {LAST_CONTAINER_ID}")
    return number


def parse_ref(text: str) -> int | str:
    """Read what a command calls a container: its number, else its name.

    >>> parse_ref("101"), parse_ref("demo")
    (101, 'demo')
    """
    return parse_container_id(text) if text.isascii() and text.isdigit() else parse_name(text)


def parse_tag(text: str) -> str:
    """Return the text if it is a tag as Proxmox has them."""
    if _TAG.fullmatch(text) is None:
        raise refuse(text, "a tag, which has lower-case letters, digits, _ . + and -, 63 at most")
    return text


def parse_template(text: str) -> str:
    """Return the text if it can name a template, which is also a directory's name."""
    if _TEMPLATE.fullmatch(text) is None:
        raise refuse(text, "a template name, which has letters, digits, . _ + and -, 128 at most")
    return text


def parse_path(text: str) -> str:
    """Return an absolute path of which no component steps back or does nothing.

    >>> parse_path("/sbin/init")
    '/sbin/init'
    """
    parse_text(text, 4095)
    if not text.startswith("/") or any(part in ("", ".", "..") for part in text[1:].split("/")):
        raise refuse(text, "an absolute path without . and .., such as /sbin/init")
    return text


def parse_signal(text: str) -> str:
    """Return the usual name of a signal that is given by name or number.

    >>> parse_signal("term"), parse_signal("37")
    ('SIGTERM', 'SIGRTMIN+3')
    """
    return format_signal(signal_number(text))


def signal_number(text: str) -> int:
    """Return the number of a signal that is given by name or number.

    >>> signal_number("SIGRTMIN+3")
    37
    """
    lowest, highest = int(signal.SIGRTMIN), int(signal.SIGRTMAX)
    number = 0
    match = _SIGNAL.fullmatch(text.upper()) if text.isascii() else None
    if match is not None and match[1] in ("RTMIN", "RTMAX"):
        offset = int(f"{match[2] or '+'}{match[3] or 0}")
        number = (lowest if match[1] == "RTMIN" else highest) + offset
        number = number if lowest <= number <= highest else 0
    elif match is not None and not match[2]:
        named = signal.Signals.__members__.get(f"SIG{match[1]}")
        number = int(named or 0) or (int(text) if text.isdigit() else 0)
    if not 1 <= number < signal.NSIG or signal.SIGSYS < number < lowest:
        raise refuse(text, "a signal such as SIGTERM or SIGRTMIN+3")
    return number


def format_signal(number: int) -> str:
    """Write a signal's number as its usual name."""
    offset = number - int(signal.SIGRTMIN)
    if offset > 0:
        return f"SIGRTMIN+{offset}"
    return "SIGRTMIN" if offset == 0 else signal.Signals(number).name


def parse_environment_name(text: str) -> str:
    """Return the text if every shell can name a variable so."""
    if _ENVIRONMENT_NAME.fullmatch(text) is None:
        raise refuse(text, "a variable's name, which has letters, digits and _")
    return text


def parse_properties(text: str, default_key: str = "") -> dict[str, str]:
    """Read `a=1,b=2` as Proxmox writes it. One item without `=` is the value of `default_key`.

    >>> parse_properties("local-zfs:subvol-104-disk-0,size=8G", "volume")
    {'volume': 'local-zfs:subvol-104-disk-0', 'size': '8G'}
    """
    properties: dict[str, str] = {}
    for item in parse_text(text, 8192).split(","):
        key, equals, value = item.partition("=")
        if not equals:
            key, value = default_key, item
        if not item or _PROPERTY_NAME.fullmatch(key) is None:
            raise ConfigError(f"{shown(item)} is not written key=value (in {shown(text)})")
        if key in properties:
            raise ConfigError(f"{key} is given twice in {shown(text)}")
        properties[key] = value
    return properties


def format_properties(properties: Mapping[str, str], default_key: str = "") -> str:
    """Write properties: the default one first and without its key, the others sorted.

    >>> format_properties({"size": "8G", "volume": "pool:1"}, "volume")
    'pool:1,size=8G'
    """
    written = []
    for key in sorted(properties, key=lambda key: (key != default_key, key)):
        value = properties[key]
        if "," in value:
            raise ConfigError(f"cannot write {key}={value}: a comma would end the value")
        # Without its key a value that has an equals sign would be read as another key.
        bare = key == default_key and value and "=" not in value
        written.append(value if bare else f"{key}={value}")
    return ",".join(written)
