"""Links and addresses by what sysctr does with them: a bridge, veth pairs, and a NIC set up from outside.

Everything made here carries an alias that begins with the mark of this installation. What has the name
but not the mark was made by somebody else (Proxmox VE calls its links veth101i0 too) and is left alone.
"""

import errno
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from sysctr.linux.syscall import KernelError
from sysctr.network.rtnl import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Request,
    Route,
    attributes,
)

IFF_UP = 1
_LOOPBACK_INDEX = 1  # the first link of every network namespace

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK, _RTM_SETLINK = 16, 17, 18, 19
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_RTM_NEWROUTE, _RTM_GETROUTE = 24, 26
_RTM_NEWNEIGH, _NUD_REACHABLE, _NTF_MASTER = 28, 2, 4
_RT_TABLE_MAIN, _RTPROT_STATIC, _RT_SCOPE_UNIVERSE, _RTN_UNICAST = 254, 4, 0, 1
_RTNH_F_ONLINK = 4
_RTN_TYPES_IN_USE = frozenset({1, 2})  # unicast and local; not broadcast, and not what admins block

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER = 1, 3, 4, 10
_IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_STATS64, _IFLA_INFO_KIND = 18, 20, 23, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST = 1
_RTEXT_FILTER_SKIP_STATS = 8
_IN6_ADDR_GEN_MODE_NONE = 1

_IFINFO = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_IFADDR = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, index
_RTMSG = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, dst_len, …, table, protocol, scope, type, flags

_GONE = frozenset({errno.ENODEV})
# A kernel that was booted without IPv6 knows no AF_INET6 attributes.
_NO_IPV6 = frozenset({errno.EAFNOSUPPORT, errno.EOPNOTSUPP})


@dataclass(frozen=True)
class Link:
    """What one link is; the byte counters are 0 in a listing."""

    index: int
    name: str
    kind: str
    alias: str
    mac: str
    mtu: int
    master: int
    up: bool
    rx_bytes: int
    tx_bytes: int
    rx_packets: int
    tx_packets: int


def find(route: Route, name: str) -> Link | None:
    """Return the link of that name, None if there is none."""
    return next(iter(find_all(route, [name])), None)


def find_all(route: Route, names: Sequence[str]) -> list[Link]:
    """Return those of the links that exist."""
    requests = [
        Request(f"find link {name}", _RTM_GETLINK, _link(attrs=[("IFLA_IFNAME", name)]), tolerated=_GONE)
        for name in names
    ]
    return [_parse_link(bodies[0]) for bodies in route.ask(requests) if bodies] if requests else []


def listing(route: Route) -> list[Link]:
    """Return all links of the namespace."""
    message = _link(attrs=[("IFLA_EXT_MASK", _RTEXT_FILTER_SKIP_STATS)])
    [bodies] = route.ask([Request("list links", _RTM_GETLINK, message, NLM_F_DUMP)])
    return [_parse_link(body) for body in bodies]


def create_bridge(route: Route, name: str, mac: str, alias: str) -> Link:
    """Create a bridge, down, and without an address of any kind."""
    # With a MAC that was set, the bridge does not take the lowest of its ports, which would change with
    # every container and leave the neighbours' ARP caches wrong. The same goes for the MTU, which would
    # become the smallest of all ports; but it only counts as set when it changes.
    info = {"attrs": [("IFLA_INFO_KIND", "bridge")]}
    route.ask(
        [
            Request(
                f"create bridge {name}",
                _RTM_NEWLINK,
                _link(attrs=[("IFLA_IFNAME", name), ("IFLA_ADDRESS", mac), ("IFLA_LINKINFO", info)]),
                NLM_F_CREATE | NLM_F_EXCL,
            ),
            _set_link(f"mark bridge {name}", name, [("IFLA_IFALIAS", alias), ("IFLA_MTU", 1499)]),
            _set_link(f"set the MTU of {name}", name, [("IFLA_MTU", 1500)]),
            _no_ipv6_address(name),
        ]
    )
    link = find(route, name)
    if link is None:
        raise KernelError(errno.ENODEV, f"find link {name}")
    return link


def set_up(route: Route, name: str) -> None:
    """Bring a link up."""
    route.ask([_set_link(f"bring up {name}", name, [], up=True)])


def set_mac(route: Route, name: str, mac: str) -> None:
    """Give a link the MAC."""
    route.ask([_set_link(f"set the MAC of {name}", name, [("IFLA_ADDRESS", mac)])])


def create_pair(
    route: Route, host_name: str, *, alias: str, netns_fd: int, guest_name: str, mac: str, mtu: int
) -> None:
    """Create a veth pair: our end here and down, the other in the namespace with its final name and MAC."""
    peer = [("IFLA_IFNAME", guest_name), ("IFLA_ADDRESS", mac), ("IFLA_MTU", mtu)]
    peer.append(("IFLA_NET_NS_FD", netns_fd))
    info = [
        ("IFLA_INFO_KIND", "veth"),
        ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", {"index": 0, "attrs": peer})]}),
    ]
    attrs = [
        ("IFLA_IFNAME", host_name),
        # fe:… is higher than any MAC of a physical card, for bridges that do take the lowest.
        ("IFLA_ADDRESS", "fe" + mac[2:]),
        ("IFLA_MTU", mtu),
        ("IFLA_LINKINFO", {"attrs": info}),
    ]
    route.ask(
        [
            Request(f"create veth {host_name}", _RTM_NEWLINK, _link(attrs=attrs), NLM_F_CREATE | NLM_F_EXCL),
            _set_link(f"mark {host_name}", host_name, [("IFLA_IFALIAS", alias)]),
            _no_ipv6_address(host_name),
        ]
    )


def join_bridge(route: Route, host_name: str, bridge: Link) -> None:
    """Make our end a port of the bridge and bring it up."""
    route.ask(
        [
            _set_link(f"join {host_name} to {bridge.name}", host_name, [("IFLA_MASTER", bridge.index)]),
            _set_link(f"bring up {host_name}", host_name, [], up=True),
        ]
    )


def point(route: Route, host_name: str, mac: str) -> None:
    """Let the bridge of a port know that a MAC is behind it, though nothing came from there yet."""
    from pyroute2.netlink.rtnl.ndmsg import ndmsg

    message = ndmsg()
    message["family"] = socket.AF_BRIDGE
    message["ifindex"] = socket.if_nametoindex(host_name)
    # One that was learned, so that it ages and moves as any other.
    message["state"] = _NUD_REACHABLE
    message["flags"] = _NTF_MASTER
    message["attrs"] = [("NDA_LLADDR", mac)]
    route.ask([Request(f"find {mac} at {host_name}", _RTM_NEWNEIGH, message, NLM_F_CREATE | NLM_F_REPLACE)])


def configure_guest(
    route: Route, name: str, addresses: Sequence[IPv4Interface], gateway: IPv4Address | None
) -> None:
    """Bring up the loopback and the NIC of a container, through a socket of its namespace."""
    answers = route.ask(
        [
            _set_link("bring up lo", "", [], up=True, index=_LOOPBACK_INDEX),
            Request(f"find link {name}", _RTM_GETLINK, _link(attrs=[("IFLA_IFNAME", name)])),
        ]
    )
    index = _parse_link(answers[1][0]).index
    requests = [_add_address(name, index, address) for address in addresses]
    requests.append(_set_link(f"bring up {name}", "", [], up=True, index=index))
    if gateway is not None:
        requests.append(_add_default_route(index, gateway, addresses))
    route.ask(requests)


def add_address(route: Route, link: Link, address: IPv4Interface) -> None:
    """Give a link the address; having it already is no error."""
    route.ask([_add_address(link.name, link.index, address)])


def remove_address(route: Route, link: Link, address: IPv4Interface) -> None:
    """Take an address from a link."""
    what = f"remove {address} from {link.name}"
    route.ask([Request(what, _RTM_DELADDR, _address(link.index, address))])


def addresses(route: Route) -> list[tuple[int, IPv4Interface]]:
    """Return the IPv4 addresses of the namespace with the index of their link."""
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

    message = ifaddrmsg()
    message["family"] = socket.AF_INET
    [bodies] = route.ask([Request("list addresses", _RTM_GETADDR, message, NLM_F_DUMP)])
    found = []
    for body in bodies:
        _family, prefix, _flags, _scope, index = _IFADDR.unpack_from(body)
        attrs = attributes(body, _IFADDR.size)
        raw = attrs.get(_IFA_LOCAL) or attrs.get(_IFA_ADDRESS)
        if raw:
            found.append((index, IPv4Interface((raw, prefix))))
    return found


def routed(route: Route) -> list[IPv4Network]:
    """Return the networks that some route of the namespace leads to; default routes are left out."""
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

    message = rtmsg()
    message["family"] = socket.AF_INET
    [bodies] = route.ask([Request("list routes", _RTM_GETROUTE, message, NLM_F_DUMP)])
    found = []
    for body in bodies:
        prefix, kind = body[1], body[7]
        raw = attributes(body, _RTMSG.size).get(_RTA_DST)
        if raw and prefix and kind in _RTN_TYPES_IN_USE:
            found.append(IPv4Network((raw, prefix)))
    return found


def retire(route: Route, link: Link, name: str) -> None:
    """Take a link out of service at once, and its name, so that the slow deletion can happen later.

    `name` may hold `%d`, for which the kernel puts a number that is free.
    """
    # Down first: before 6.2 a link that is up cannot be renamed. ENODEV: it died with its namespace.
    route.ask(
        [
            _set_link(f"bring down {link.name}", "", [], up=False, index=link.index, tolerated=_GONE),
            _set_link(f"rename {link.name}", "", [("IFLA_IFNAME", name)], index=link.index, tolerated=_GONE),
        ]
    )


def delete(route: Route, link: Link) -> None:
    """Delete a link; this takes the kernel 14 ms and more. Being gone already is no error."""
    # By index, not by name: a new link may have got the name, but an index is not soon used again.
    message = _link(index=link.index)
    route.ask([Request(f"delete {link.name}", _RTM_DELLINK, message, tolerated=_GONE)])


def _link(*, index: int = 0, up: bool | None = None, attrs: Sequence[tuple[str, object]] = ()):
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    message = ifinfmsg()
    message["index"] = index
    message["flags"] = IFF_UP if up else 0
    message["change"] = 0 if up is None else IFF_UP
    message["attrs"] = list(attrs)
    return message


def _set_link(
    what: str, name: str, attrs: list[tuple[str, object]], *, up: bool | None = None, index: int = 0,
    tolerated: frozenset[int] = frozenset(),
) -> Request:  # fmt: skip
    named = [("IFLA_IFNAME", name)] if name else []
    return Request(what, _RTM_SETLINK, _link(index=index, up=up, attrs=[*named, *attrs]), tolerated=tolerated)


def _no_ipv6_address(name: str) -> Request:
    """Return the request that keeps a link from giving itself a link-local address when it comes up."""
    mode = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _IN6_ADDR_GEN_MODE_NONE)]}
    spec = ("IFLA_AF_SPEC", {"attrs": [("AF_INET6", mode)]})
    return _set_link(f"keep {name} without IPv6 addresses", name, [spec], tolerated=_NO_IPV6)


def _address(index: int, address: IPv4Interface):
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

    message = ifaddrmsg()
    message["family"] = socket.AF_INET
    message["prefixlen"] = address.network.prefixlen
    message["index"] = index
    message["attrs"] = [("IFA_LOCAL", str(address.ip)), ("IFA_ADDRESS", str(address.ip))]
    return message


def _add_address(name: str, index: int, address: IPv4Interface) -> Request:
    message = _address(index, address)
    if address.network.prefixlen < 31:
        message["attrs"].append(("IFA_BROADCAST", str(address.network.broadcast_address)))
    return Request(f"add {address} to {name}", _RTM_NEWADDR, message, NLM_F_CREATE | NLM_F_REPLACE)


def _add_default_route(index: int, gateway: IPv4Address, addresses: Sequence[IPv4Interface]) -> Request:
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

    message = rtmsg()
    message["family"] = socket.AF_INET
    message["table"] = _RT_TABLE_MAIN
    message["proto"] = _RTPROT_STATIC
    message["scope"] = _RT_SCOPE_UNIVERSE
    message["type"] = _RTN_UNICAST
    # Hosters give out single addresses (/32) with a gateway outside; it is on the link all the same.
    message["flags"] = 0 if any(gateway in one.network for one in addresses) else _RTNH_F_ONLINK
    message["attrs"] = [("RTA_GATEWAY", str(gateway)), ("RTA_OIF", index)]
    # Of two NICs with a gateway the first keeps the default route.
    return Request(
        f"route by {gateway}", _RTM_NEWROUTE, message, NLM_F_CREATE | NLM_F_EXCL, frozenset({errno.EEXIST})
    )


def _parse_link(body: bytes) -> Link:
    _family, _type, index, flags, _change = _IFINFO.unpack_from(body)
    attrs = attributes(body, _IFINFO.size)
    info = attributes(attrs.get(_IFLA_LINKINFO, b""), 0)
    # struct rtnl_link_stats64 begins with rx_packets, tx_packets, rx_bytes, tx_bytes.
    counters = struct.unpack_from("=4Q", attrs.get(_IFLA_STATS64, bytes(32)))
    return Link(
        index=index,
        name=_text(attrs.get(_IFLA_IFNAME, b"")),
        kind=_text(info.get(_IFLA_INFO_KIND, b"")),
        alias=_text(attrs.get(_IFLA_IFALIAS, b"")),
        mac=attrs.get(_IFLA_ADDRESS, b"").hex(":"),
        mtu=_number(attrs.get(_IFLA_MTU, b"")),
        master=_number(attrs.get(_IFLA_MASTER, b"")),
        up=bool(flags & IFF_UP),
        rx_packets=counters[0],
        tx_packets=counters[1],
        rx_bytes=counters[2],
        tx_bytes=counters[3],
    )


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")


def _number(raw: bytes) -> int:
    return struct.unpack("=I", raw)[0] if len(raw) == 4 else 0
