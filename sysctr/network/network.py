"""The network of an installation: its bridge with all that belongs to it, and the NICs of containers."""

import contextlib
import errno
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from sysctr.config.schema import Nic
from sysctr.errors import NotFound, Refused, SysctrError
from sysctr.linux.syscall import KernelError
from sysctr.network import links
from sysctr.network.addresses import Address, Addresses, Wanted, gateway_of, random_mac
from sysctr.network.announce import Announcer
from sysctr.network.bridge import Bridge
from sysctr.network.links import Link
from sysctr.network.names import Names, check_name, host_nameservers
from sysctr.network.nat import Nat, Problem
from sysctr.network.rtnl import Route
from sysctr.paths import Layout

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What an admin may choose; an empty bridge or subnet ("auto" as well) leaves it to sysctr."""

    bridge: str = ""
    subnet: str = ""
    domain: str = "sysctr"
    dns: bool = True


@dataclass(frozen=True)
class Attached:
    """What attach() made: our end of the pair and its bridge, and what the container's end was given."""

    host_name: str
    bridge: str
    mac: str
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Traffic:
    """What went through all NICs of a container since they were attached, as the container sees it."""

    rx_bytes: int = 0
    tx_bytes: int = 0
    rx_packets: int = 0
    tx_packets: int = 0


class Network:
    """The default bridge of an installation and the containers on it; all methods may run in any thread."""

    def __init__(self, layout: Layout, settings: Settings) -> None:
        self.bridge = settings.bridge or layout.bridge
        self.domain = settings.domain
        self._layout = layout
        self._dns = settings.dns
        self._mark = layout.nft_table
        self._addresses = Addresses(layout.network)
        self._lock = threading.RLock()
        self._route = Route.open()
        self._bridge = Bridge(layout, self.bridge, settings.subnet, self._route)
        self._nat: Nat | None = None
        self._names: Names | None = None
        # NICs by container, None until the links were listed once: those of a daemon before us count too.
        self._nics: dict[int, set[int]] | None = None
        self._deleter = _Deleter()
        self._announcer = Announcer()

    # The bridge

    def ensure(self) -> None:
        """Make bridge, address, forwarding, rules and DNS server what they should be; cheap if they are."""
        with self._lock, _failing(f"set up the bridge {self.bridge}"):
            self._bridge.ensure()
            self._rules().ensure()
            if self._dns:
                self._server().ensure(self._addresses.leases())

    def teardown(self) -> None:
        """Remove everything that ensure() and attach() made; addresses stay with their containers."""
        with self._lock, _failing(f"remove the bridge {self.bridge}"):
            if not self._bridge.exists:
                return
            self._server().remove()
            self._rules().remove()
            for link in self._our_links():
                links.delete(self._route, link)
            self._bridge.remove(keep_network=bool(self._addresses.leases()))
            self._nat = self._names = self._nics = None

    def sweep(self, live_ids: Iterable[int]) -> list[str]:
        """Delete in the background what a crash left of containers that do not run; return the names."""
        live = set(live_ids)
        with self._lock, _failing("sweep the links"):
            dead = [link for link in self._our_links() if self._owner(link) not in live]
        for link in dead:
            log.info("%s is left over from a container that does not run: deleting it", link.name)
            self._deleter.put(link)
        return [link.name for link in dead]

    def problems(self) -> list[Problem]:
        """Return what is not as it should be, with the remedy, for doctor."""
        with self._lock, _failing("look at the network"):
            if not self._bridge.exists:
                return []
            found = [*self._bridge.problems(), *self._rules().problems()]
            if self._dns:
                found += self._server().problems()
            return found

    def nameservers(self) -> tuple[str, ...]:
        """Return the resolvers that guests should use: the bridge, or the host's if no DNS server runs."""
        with self._lock:
            if self._dns and self._server().running():
                return (str(gateway_of(self.subnet)),)
        return host_nameservers()

    @property
    def subnet(self) -> IPv4Network:
        """The network of the bridge."""
        with self._lock, _failing("choose a network"):
            return self._bridge.subnet

    # Addresses and names

    def allocate(self, ct_id: int, nic: int, wanted: str | None = None) -> Address:
        """Give a NIC on our bridge an address: the one wanted, the one it has, or the lowest free one."""
        return self._addresses.allocate(self.subnet, ct_id, nic, wanted)

    def register(self, ct_id: int, name: str, macs: dict[int, str]) -> None:
        """Publish name and MACs of a container that has its addresses; also after a rename."""
        check_name(name)
        self._addresses.describe(ct_id, name, macs)
        self._publish(ct_id)

    def enroll(self, ct_id: int, name: str, nics: Iterable[Nic]) -> dict[int, Address]:
        """Give a new container its addresses on our bridge and publish its name, in one write to disk.

        Before that every NIC is checked: a container that could not start is better not made.
        """
        check_name(name)
        nics = tuple(nics)
        self.check(name, nics)
        wanted = [
            Wanted(nic.index, nic.mac, "" if nic.ip == "managed" else nic.ip)
            for nic in nics
            if nic.ip != "manual" and (nic.bridge or self.bridge) == self.bridge
        ]
        given = self._addresses.enroll(self.subnet, ct_id, name, wanted)
        self._publish(ct_id)
        return given

    def check(self, owner: object, nics: Iterable[Nic]) -> None:
        """Raise an error for a NIC that could not be attached now: its bridge is missing, or its address."""
        for nic in nics:
            if nic.bridge and nic.bridge != self.bridge:
                with self._lock, _failing(f"look for the bridge {nic.bridge}"):
                    self._find_bridge(owner, nic)
                self._refuse_unmanaged(owner, nic)

    def host_bridges(self) -> frozenset[str]:
        """Return the names of the host's bridges but that of sysctr."""
        with self._lock, _failing("list the bridges"):
            return self._bridges() - {self.bridge}

    def _bridges(self) -> frozenset[str]:
        return frozenset(link.name for link in links.listing(self._route) if link.kind == "bridge")

    def release(self, ct_id: int, nic: int | None = None) -> None:
        """Give back the addresses of a container, or of one of its NICs, and forget its names."""
        self._addresses.release(ct_id, nic)
        self._publish(ct_id)

    def forget_others(self, ct_id: int, nics: Iterable[Nic]) -> None:
        """Give back what a container holds for cards that were taken out, or need no address of ours now."""
        kept = {
            nic.index for nic in nics if nic.ip != "manual" and (nic.bridge or self.bridge) == self.bridge
        }
        for index, _, _ in self._addresses.lease(ct_id).nics:
            if index not in kept:
                self.release(ct_id, index)

    def addresses(self, ct_id: int) -> tuple[str, ...]:
        """Return the addresses that a container's NICs hold, by the NICs' order."""
        return tuple(ip for _, ip, _ in self._addresses.lease(ct_id).nics)

    def by_card(self, ct_id: int) -> dict[int, str]:
        """Return the same by the index of the NIC."""
        return {index: ip for index, ip, _ in self._addresses.lease(ct_id).nics}

    def all_addresses(self) -> dict[int, tuple[str, ...]]:
        """Return the same of every container that holds any."""
        leases = self._addresses.leases()
        return {ct_id: tuple(ip for _, ip, _ in lease.nics) for ct_id, lease in leases.items()}

    def _publish(self, ct_id: int) -> None:
        if self._dns:
            with self._lock:
                self._server().publish(ct_id, self._addresses.lease(ct_id))

    # NICs

    def attach(self, ct_id: int, nic: Nic, *, netns_fd: int, netlink_fd: int) -> Attached:
        """Connect a NIC: a veth pair from a bridge into the network namespace, set up there and ready.

        `netlink_fd` is a NETLINK_ROUTE socket that was opened in the namespace `netns_fd`.
        """
        host_name, mac = self._layout.veth(ct_id, nic.index), nic.mac or random_mac()
        addresses, gateway = self._addressing(ct_id, nic, mac)
        with _failing(f"attach {nic.name} of {ct_id}"), contextlib.ExitStack() as undo:
            bridge = self._find_bridge(ct_id, nic)

            def create() -> None:
                links.create_pair(
                    self._route,
                    host_name,
                    alias=f"{self._mark}:{ct_id}",
                    netns_fd=netns_fd,
                    guest_name=nic.name,
                    mac=mac,
                    mtu=nic.mtu or bridge.mtu,
                )

            undo.callback(self._retire, host_name)
            self._replacing(host_name, create)
            links.join_bridge(self._route, host_name, bridge)
            with Route.borrow(netlink_fd) as inside:
                links.configure_guest(inside, nic.name, addresses, gateway)
            undo.pop_all()
        with self._lock:
            if self._nics is not None:
                self._nics.setdefault(ct_id, set()).add(nic.index)
        return Attached(host_name, bridge.name, mac, tuple(str(address) for address in addresses))

    def announce(self, attached: Iterable[Attached]) -> None:
        """Tell those on a bridge that a container's addresses are here now; what fails is logged."""
        for card in attached:
            try:
                # Our frames do not come through the port. A bridge that saw the MAC on its uplink, where the
                # container was before, would drop all that comes for it from there.
                links.point(self._route, card.host_name, card.mac)
            except OSError as error:
                log.warning("cannot tell %s where %s is: %s", card.bridge, card.mac, error)
            self._announcer.announce(
                card.bridge, card.mac, [address.partition("/")[0] for address in card.addresses]
            )

    def detach(self, ct_id: int, nic: int | None = None) -> None:
        """Disconnect the NICs of a container, or one: out of service now, deleted in the background."""
        with _failing(f"detach the network of {ct_id}"):
            with self._lock:
                attached = self._nics_of(ct_id)
                indices = set(attached) if nic is None else {nic}
                attached -= indices
            for index in sorted(indices):
                self._retire(self._layout.veth(ct_id, index))

    def statistics(self, ct_id: int) -> Traffic:
        """Return the traffic of a container; zero if it is not attached."""
        with _failing(f"count the traffic of {ct_id}"):
            with self._lock:
                names = [self._layout.veth(ct_id, index) for index in sorted(self._nics_of(ct_id))]
            found = [link for link in links.find_all(self._route, names) if self._owner(link) == ct_id]
        # What our end received, the container sent.
        return Traffic(
            rx_bytes=sum(link.tx_bytes for link in found),
            tx_bytes=sum(link.rx_bytes for link in found),
            rx_packets=sum(link.tx_packets for link in found),
            tx_packets=sum(link.rx_packets for link in found),
        )

    def settle(self) -> None:
        """Wait until the deletions under way are done."""
        self._deleter.finish()

    def close(self) -> None:
        """Settle and close the sockets; the network itself stays for the next daemon."""
        self.settle()
        self._announcer.close()
        self._route.close()

    # Inside

    def _addressing(self, ct_id: int, nic: Nic, mac: str) -> tuple[list[IPv4Interface], IPv4Address | None]:
        """Return the addresses of a NIC and its gateway."""
        if nic.ip == "manual":
            return [], None
        gateway = IPv4Address(nic.gateway) if nic.gateway else None
        if (nic.bridge or self.bridge) != self.bridge:
            self._refuse_unmanaged(ct_id, nic)
            return [IPv4Interface(nic.ip)], gateway
        address = self.allocate(ct_id, nic.index, None if nic.ip == "managed" else nic.ip)
        if (nic.index, address.ip, mac) not in self._addresses.lease(ct_id).nics:
            self._addresses.describe(ct_id, "", {nic.index: mac})
            self._publish(ct_id)
        # The one NIC with a default route is the first; others get one only where they ask for it.
        own = IPv4Address(address.gateway) if nic.index == 0 else None
        return [address.interface], gateway or own

    def _refuse_unmanaged(self, owner: object, nic: Nic) -> None:
        if nic.ip == "managed":
            raise Refused(
                f"cannot attach {nic.name} of {owner}: addresses on {nic.bridge} are not managed here",
                "give the NIC an address, or ip=manual",
            )

    def _find_bridge(self, owner: object, nic: Nic) -> Link:
        name = nic.bridge or self.bridge
        bridge = links.find(self._route, name)
        if bridge is not None and bridge.kind == "bridge":
            return bridge
        known = sorted(self._bridges())
        hint = f"bridges of this host: {', '.join(known)}" if known else "this host has no bridge"
        if bridge is None:
            raise NotFound(f"cannot attach {nic.name} of {owner}: there is no bridge {name}", hint)
        raise Refused(f"cannot attach {nic.name} of {owner}: {name} is not a bridge", hint)

    def _replacing(self, host_name: str, create: Callable[[], None]) -> None:
        """Call `create`, having put aside what a former life of the container left under the name."""
        try:
            create()
        except KernelError as error:
            if error.errno != errno.EEXIST:
                raise
            if links.find(self._route, host_name) is None:
                # It is the name inside that exists: of a NIC that was detached just now, or for good.
                self.settle()
            self._retire(host_name)
            if links.find(self._route, host_name) is not None:
                raise Refused(
                    f"cannot make {host_name}: a link of that name exists, and sysctr did not make it"
                ) from error
            create()

    def _retire(self, host_name: str) -> None:
        """Put a link of ours out of service and free its name; nothing happens if it is not ours."""
        link = links.find(self._route, host_name)
        if link is not None and self._is_ours(link):
            links.retire(self._route, link, f"x{self._layout.tag or self._mark}%d")
            self._deleter.put(link)

    def _nics_of(self, ct_id: int) -> set[int]:
        """Return the record of a container's NICs; the first call finds those of all containers."""
        if self._nics is None:
            nics: dict[int, set[int]] = {}
            for link in self._our_links():
                owner = self._owner(link)
                if owner is not None:
                    nics.setdefault(owner, set()).add(int(link.name.rpartition("i")[2]))
            self._nics = nics
        return self._nics.setdefault(ct_id, set())

    def _our_links(self) -> list[Link]:
        """Return the host's ends of all pairs that we made, those whose deletion is under way too."""
        return [link for link in links.listing(self._route) if self._is_ours(link)]

    def _is_ours(self, link: Link) -> bool:
        mark, _, number = link.alias.rpartition(":")
        return link.kind == "veth" and mark == self._mark and number.isdigit()

    def _owner(self, link: Link) -> int | None:
        """Return the container of a link, None if it is not ours or was retired."""
        if not self._is_ours(link):
            return None
        number = int(link.alias.rpartition(":")[2])
        return number if link.name.startswith(self._layout.veth(number, 0)[:-1]) else None

    def _rules(self) -> Nat:
        if self._nat is None:
            self._nat = Nat(self._layout.nft_table, self.bridge, self.subnet)
        return self._nat

    def _server(self) -> Names:
        if self._names is None:
            self._names = Names(self._layout, self.bridge, self.subnet, self.domain)
        return self._names


class _Deleter:
    """Deletes links in a thread of its own, since the kernel takes its time for each."""

    def __init__(self) -> None:
        self._links: queue.SimpleQueue[Link | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, link: Link) -> None:
        """Delete a link soon."""
        with self._lock:
            self._links.put(link)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="link deleter", daemon=True)
                self._thread.start()

    def finish(self) -> None:
        """Wait until all that was put is deleted; the next put() begins again."""
        with self._lock:
            if self._thread is not None:
                self._links.put(None)
                self._thread.join()
                self._thread = None

    def _work(self) -> None:
        with Route.open() as route:
            while (link := self._links.get()) is not None:
                try:
                    links.delete(route, link)
                except OSError as error:
                    log.warning("cannot delete the link %s: %s", link.name, error)


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Turn what the kernel says into an error for people."""
    try:
        yield
    except OSError as error:
        raise SysctrError(f"cannot {what}: {error}") from error
