"""The default bridge of an installation: its link, its network, chosen once, and forwarding on the host."""

import contextlib
import json
import os
import zlib
from dataclasses import dataclass, replace
from ipaddress import IPv4Interface, IPv4Network

from sysctr.config.addresses import parse_subnet4
from sysctr.errors import Refused, SysctrError
from sysctr.linux.files import locked, write_atomically
from sysctr.linux.process import boot_id
from sysctr.linux.syscall import KernelError
from sysctr.network import links, nat
from sysctr.network.addresses import free_subnet, gateway_of, random_mac
from sysctr.network.links import Link
from sysctr.network.names import host_nameservers
from sysctr.network.nat import Problem
from sysctr.network.rtnl import Route
from sysctr.paths import Layout

_CHOOSE = ("", "auto")


@dataclass(frozen=True)
class _Record:
    """What has to outlive the link: network, MAC, and whether forwarding was on before us in this boot."""

    subnet: str
    mac: str
    boot: str = ""
    forwarding_before: bool = True


class Bridge:
    """The bridge `name`; the caller holds a lock around every call."""

    def __init__(self, layout: Layout, name: str, wanted_subnet: str, route: Route) -> None:
        self.name = name
        self._mark = f"{layout.nft_table}:bridge"
        self._nft_table = layout.nft_table
        self._tag = layout.tag
        self._wanted_subnet = wanted_subnet
        self._directory = layout.network
        self._path = f"{layout.network}/bridge.json"
        self._route = route
        self._record: _Record | None = None

    @property
    def subnet(self) -> IPv4Network:
        """The network of the bridge; the first time in the life of an installation it is chosen now."""
        return IPv4Network(self._known().subnet)

    @property
    def exists(self) -> bool:
        """Tell whether the bridge was ever made, or chosen a network for, and not removed."""
        return self._load() is not None

    def ensure(self) -> None:
        """Make the link, its address and forwarding what they should be."""
        record = self._known()
        address = _own_address(IPv4Network(record.subnet))
        link = links.find(self._route, self.name)
        if link is None:
            link = links.create_bridge(self._route, self.name, record.mac, self._mark)
        elif link.alias != self._mark:
            raise Refused(
                f"cannot set up the bridge {self.name}: a link of that name exists that sysctr did not make",
                "choose another network.bridge in host.toml",
            )
        if link.mac != record.mac:
            links.set_mac(self._route, self.name, record.mac)
        if not link.up:
            # Before it is up: a container could else become the host's IPv6 router.
            _refuse_router_advertisements(self.name)
            links.set_up(self._route, self.name)
        if (link.index, address) not in links.addresses(self._route):
            links.add_address(self._route, link, address)
        self._ensure_forwarding()

    def remove(self, *, keep_network: bool) -> None:
        """Delete the link and restore forwarding; the choice of the network stays if it is still needed."""
        link = self._link()
        if link is not None:
            links.delete(self._route, link)
        record = self._known()
        before_us = record.boot != boot_id() or record.forwarding_before
        if not before_us and not nat.others_forward(self._nft_table):
            nat.set_forwarding(on=False)
        if keep_network:
            self._save(replace(record, boot="", forwarding_before=True))
        else:
            self._record = None
            os.unlink(self._path)

    def problems(self) -> list[Problem]:
        """Return what of the host is in the way of the bridge."""
        subnet = self.subnet
        found = [
            Problem(
                f"{subnet}, the network of {self.name}, overlaps {other} of this host",
                "choose another network.subnet in host.toml",
            )
            for other in dict.fromkeys(self._taken())
            if other.overlaps(subnet)
        ]
        if not nat.forwarding():
            found.append(Problem("this host does not forward IPv4", "sysctl net.ipv4.ip_forward=1"))
        return found

    def _link(self) -> Link | None:
        """Return the link if it exists and is ours."""
        link = links.find(self._route, self.name)
        return link if link is not None and link.alias == self._mark else None

    def _taken(self) -> list[IPv4Network]:
        """Return the networks in use on this host, other than by the bridge itself."""
        link = self._link()
        index = link.index if link is not None else -1
        own = [address.network for owner, address in links.addresses(self._route) if owner == index]
        routed = links.routed(self._route)
        taken = [network for network in routed if not any(network.subnet_of(mine) for mine in own)]
        # Resolvers are reached by the default route, so the routes do not tell their networks.
        return taken + [IPv4Network(server) for server in host_nameservers()]

    def _ensure_forwarding(self) -> None:
        record, boot, on = self._known(), boot_id(), nat.forwarding()
        # What was before us is asked once in each boot: an admin may have switched it on for good since.
        if record.boot != boot:
            self._save(replace(record, boot=boot, forwarding_before=on))
        if not on:
            nat.set_forwarding(on=True)

    def _known(self) -> _Record:
        record = self._load()
        if record is not None and self._wanted_subnet in (*_CHOOSE, record.subnet):
            return record
        if self._wanted_subnet not in _CHOOSE:
            subnet = IPv4Network(parse_subnet4(self._wanted_subnet))
        else:
            # Installations that choose at the same moment begin at different places.
            subnet = free_subnet(self._taken(), zlib.crc32(self._tag.encode()) if self._tag else 0)
        link = self._link()
        if record is None:
            return self._save(_Record(str(subnet), random_mac()))
        if link is not None:
            with contextlib.suppress(KernelError):
                links.remove_address(self._route, link, _own_address(IPv4Network(record.subnet)))
        return self._save(replace(record, subnet=str(subnet)))

    def _load(self) -> _Record | None:
        if self._record is None:
            try:
                with open(self._path, encoding="utf-8") as file:
                    self._record = _Record(**json.load(file))
            except FileNotFoundError:
                return None
            except (ValueError, TypeError) as error:
                raise SysctrError(f"cannot read {self._path}: {error}", "restore it, or remove it") from error
        return self._record

    def _save(self, record: _Record) -> _Record:
        os.makedirs(self._directory, 0o700, exist_ok=True)
        with locked(f"{self._directory}/lock"):
            write_atomically(self._path, (json.dumps(vars(record), indent=1) + "\n").encode(), 0o600)
        self._record = record
        return record


def _own_address(subnet: IPv4Network) -> IPv4Interface:
    return IPv4Interface((gateway_of(subnet), subnet.prefixlen))


def _refuse_router_advertisements(bridge: str) -> None:
    for key in ("accept_ra", "autoconf"):
        path = f"/proc/sys/net/ipv6/conf/{bridge}/{key}"
        # A kernel without IPv6 has no such files.
        with contextlib.suppress(FileNotFoundError), open(path, "w", encoding="ascii") as file:
            file.write("0\n")
