"""Names and addresses of networks as text; parsing gives the one canonical spelling of each."""

import ipaddress
import re

from sysctr.config.values import parse_text, refuse, shown
from sysctr.errors import ConfigError

INTERFACE_NAME_BYTES = 15

_RESERVED_NAMES = frozenset({".", "..", "lo", "all", "default"})
_MAC = re.compile(r"[0-9a-f]{2}(?:([:-])[0-9a-f]{2})(?:\1[0-9a-f]{2}){4}", re.IGNORECASE)
_DOMAIN_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")

_ENDPOINT = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_.-]{1,253})(?::([0-9]{1,5}))?")


def parse_ifname(text: str) -> str:
    """Return the text if it can name a network interface; `lo`, `all` and `default` mean something else.

    >>> parse_ifname("eth0")
    'eth0'
    """
    allowed = text.isascii() and text.isprintable() and not set(text) & set("/:% \"'\\,=")
    if not allowed or not 1 <= len(text) <= INTERFACE_NAME_BYTES or text in _RESERVED_NAMES:
        raise refuse(text, f"an interface name of at most {INTERFACE_NAME_BYTES} characters, such as eth0")
    return text


def parse_mac(text: str) -> str:
    """Return a unicast MAC address in its usual spelling.

    >>> parse_mac("02-00-5E-10-00-01")
    '02:00:5e:10:00:01'
    """
    if _MAC.fullmatch(text) is None:
        raise refuse(text, "a MAC address such as 02:00:5e:10:00:01")
    mac = text.lower().replace("-", ":")
    if int(mac[:2], 16) & 1:
        raise refuse(text, "a unicast MAC address: its first byte is odd, which means a group")
    if mac == "00:00:00:00:00:00":
        raise refuse(text, "a MAC address that a card can have")
    return mac


def parse_ip(text: str) -> str:
    """Return an IPv4 or IPv6 address in its usual spelling.

    >>> parse_ip("2001:DB8::0:1")
    '2001:db8::1'
    """
    try:
        # A scope (fe80::1%eth0) is free text to the library.
        return str(ipaddress.ip_address(parse_text(text, 64)))
    except ValueError:
        raise refuse(text, "an IP address") from None


def parse_ip4(text: str) -> str:
    """Return an IPv4 address."""
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise refuse(text, "an IPv4 address such as 10.0.0.1") from None


def parse_cidr4(text: str) -> str:
    """Return an IPv4 address with its prefix, if a host can have it.

    >>> parse_cidr4("10.0.0.2/255.255.255.0")
    '10.0.0.2/24'
    """
    try:
        address = ipaddress.IPv4Interface(text)
    except ValueError:
        raise refuse(text, "an IPv4 address with its prefix, such as 10.0.0.2/24") from None
    if "/" not in text:
        raise ConfigError(f"{shown(text)} has no prefix, such as {text}/24")
    network = address.network
    # The properties of an interface of 3.11 compare it with its prefix, so ask the bare address.
    bare = address.ip
    if bare.is_multicast or bare.is_loopback or bare.is_unspecified or network.prefixlen == 0:
        raise refuse(text, "an address that a host can have")
    if network.prefixlen < 31 and bare in (network.network_address, network.broadcast_address):
        raise refuse(text, f"an address of a host: it is the first or the last one of {network}")
    return str(address)


def parse_subnet4(text: str) -> str:
    """Return an IPv4 network large enough for containers and small enough for one bridge.

    >>> parse_subnet4("10.0.3.0/24")
    '10.0.3.0/24'
    """
    try:
        network = ipaddress.IPv4Network(text)
    except ValueError:
        raise refuse(text, "an IPv4 network such as 10.0.3.0/24") from None
    unusable = network.is_multicast or network.is_loopback or network.is_link_local or network.is_unspecified
    if unusable or not 16 <= network.prefixlen <= 29:
        raise refuse(text, "a network of containers, whose prefix is from /16 to /29")
    return str(network)


def parse_domain(text: str) -> str:
    """Return a DNS domain in lower case, without the final dot.

    >>> parse_domain("Example.org.")
    'example.org'
    """
    domain = text.lower().removesuffix(".")
    if len(domain) > 253 or any(_DOMAIN_LABEL.fullmatch(label) is None for label in domain.split(".", 254)):
        raise refuse(text, "a domain such as example.org")
    return domain


def parse_endpoint(text: str) -> str:
    """Return where a host is called: a name or an address, an IPv6 one in brackets, and mostly a port.

    >>> parse_endpoint("[2001:db8::1]:8645"), parse_endpoint("ct.example.org")
    ('[2001:db8::1]:8645', 'ct.example.org')
    """
    found = _ENDPOINT.fullmatch(text)
    if found is None or not 0 < int(found[2] or 1) < 65536:
        raise refuse(text, "an address such as 192.0.2.1:8645 or [2001:db8::1]:8645")
    if found[1].startswith("["):
        parse_ip(found[1][1:-1])
    return text


def parse_listen(text: str) -> str:
    """Return where to listen: `off`, or an address of this host with its port.

    >>> parse_listen("off"), parse_listen("[::]:8645")
    ('off', '[::]:8645')
    """
    if text == "off":
        return text
    host, _, port = parse_endpoint(text).rpartition(":")
    if not host or not port.isdigit():
        raise refuse(text, "off, or an address with its port such as 10.0.0.1:8645")
    parse_ip(host.removeprefix("[").removesuffix("]"))
    return text
