"""Which container has which IPv4 address: the one allocator, and the choice of the network it gives out.

The record is one JSON file. Every change reads it, changes it and replaces it under a lock that holds
against threads (each opens the lock file anew) and against other processes alike.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from itertools import chain

from sysctr.errors import NoSpace, SysctrError, UsageError
from sysctr.linux.files import locked, write_atomically

_VERSION = 1
_NOTHING: dict = {"name": "", "nics": {}}  # the record of a container that has no addresses; never changed
_CONTAINERS = "containers"

# Networks that others like as well come last: 10.0.0.0/24 is every second office, 10.0.3.0/24 is LXC's,
# 172.17.0.0/16 is Docker's, 192.168.0.0/24 is at home, 192.168.122.0/24 is libvirt's.
_CANDIDATES = (
    "10.117.0.0/16", "172.29.0.0/16", "192.168.128.0/17", "10.128.0.0/9", "172.16.0.0/12", "10.0.0.0/9",
)  # fmt: skip


@dataclass(frozen=True)
class Address:
    """An address as a NIC is given it."""

    ip: str
    prefix: int
    gateway: str

    @property
    def interface(self) -> IPv4Interface:
        """Return the address with its network."""
        return IPv4Interface(f"{self.ip}/{self.prefix}")


@dataclass(frozen=True)
class Wanted:
    """What a NIC of a new container is to have; an empty address is any."""

    index: int
    mac: str
    ip: str = ""


@dataclass(frozen=True)
class Lease:
    """What the allocator holds for one container: its name and, by NIC, address and MAC ("" unknown)."""

    name: str
    nics: tuple[tuple[int, str, str], ...]


def free_subnet(taken: Iterable[IPv4Network], start: int = 0) -> IPv4Network:
    """Return the first private /24 that overlaps none of `taken`.

    `start` turns the first block of candidates, so that two installations that choose at the same moment
    are unlikely to choose the same one.

    >>> free_subnet([IPv4Network("10.117.0.0/24"), IPv4Network("10.117.1.128/25")])
    IPv4Network('10.117.2.0/24')
    """
    taken = list(taken)
    first = list(IPv4Network(_CANDIDATES[0]).subnets(new_prefix=24))
    start %= len(first)
    others = (IPv4Network(block).subnets(new_prefix=24) for block in _CANDIDATES[1:])
    for candidate in chain(first[start:], first[:start], *others):
        if not any(candidate.overlaps(other) for other in taken):
            return candidate
    raise NoSpace(
        "cannot choose a network for the bridge: routes of this host cover all private ones",
        "name one with network.subnet in host.toml",
    )


def random_mac() -> str:
    """Return a MAC for a new NIC or bridge: unicast, locally administered."""
    return f"02:{secrets.token_bytes(5).hex(':')}"


def gateway_of(subnet: IPv4Network) -> IPv4Address:
    """Return the address of the bridge itself: the first of the network."""
    return subnet.network_address + 1


class Addresses:
    """The record of addresses below `directory`."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._path = f"{directory}/addresses.json"
        self._seen: tuple[tuple[int, int, int], dict] | None = None

    def allocate(self, subnet: IPv4Network, ct_id: int, nic: int, wanted: str | None = None) -> Address:
        """Give NIC `nic` of a container the address wanted, or the one it has, or the lowest free one."""
        demanded = _parse_wanted(wanted, subnet) if wanted else None
        held = self._read().get(str(ct_id), _NOTHING)["nics"].get(str(nic), {}).get("ip", "")
        if held and _fits(held, subnet) and (demanded is None or held == str(demanded)):
            return _address(held, subnet)  # the way of every start: nothing changes, so no lock
        with self._change() as containers:
            return _give(containers, subnet, ct_id, nic, demanded)

    def enroll(
        self, subnet: IPv4Network, ct_id: int, name: str, nics: Iterable[Wanted]
    ) -> dict[int, Address]:
        """Give all NICs of a container what allocate() and describe() would, in one write to the disk."""
        demands = [(nic, _parse_wanted(nic.ip, subnet) if nic.ip else None) for nic in nics]
        with self._change() as containers:
            given = {}
            for nic, demanded in demands:
                given[nic.index] = _give(containers, subnet, ct_id, nic.index, demanded)
                containers[str(ct_id)]["nics"][str(nic.index)]["mac"] = nic.mac
            if given:
                containers[str(ct_id)]["name"] = name
        return given

    def describe(self, ct_id: int, name: str, macs: dict[int, str]) -> None:
        """Record the name of a container and the MACs of those of its NICs that have an address."""

        def described(record: dict) -> dict:
            nics = {
                number: {**entry, "mac": macs.get(int(number), entry["mac"])}
                for number, entry in record["nics"].items()
            }
            return {"name": name or record["name"], "nics": nics}

        known = self._read().get(str(ct_id), _NOTHING)
        if known == described(known):
            return
        with self._change() as containers:
            containers[str(ct_id)] = described(containers.get(str(ct_id), _NOTHING))

    def release(self, ct_id: int, nic: int | None = None) -> None:
        """Give back the addresses of a container, or of one of its NICs; without any it does nothing."""
        if str(ct_id) not in self._read():
            return
        with self._change() as containers:
            if nic is None:
                containers.pop(str(ct_id), None)
            elif str(ct_id) in containers:
                containers[str(ct_id)]["nics"].pop(str(nic), None)

    def lease(self, ct_id: int) -> Lease:
        """Return what a container holds."""
        return _lease(self._read().get(str(ct_id), _NOTHING))

    def leases(self) -> dict[int, Lease]:
        """Return what every container holds."""
        return {int(ct_id): _lease(record) for ct_id, record in self._read().items()}

    def _read(self) -> dict:
        """Return the containers of the record; the caller must not change them."""
        try:
            with open(self._path, encoding="utf-8") as file:
                state = os.fstat(file.fileno())
                stamp = (state.st_ino, state.st_mtime_ns, state.st_size)
                seen = self._seen
                if seen is not None and seen[0] == stamp:
                    return seen[1]
                containers = _decode(file.read(), self._path)
        except FileNotFoundError:
            return {}
        self._seen = (stamp, containers)
        return containers

    @contextlib.contextmanager
    def _change(self) -> Iterator[dict]:
        """Yield a copy of the containers, under the lock, and replace the record if the block succeeds."""
        os.makedirs(self._directory, 0o700, exist_ok=True)
        with locked(f"{self._directory}/lock"):
            before = json.dumps(self._read())
            containers = json.loads(before)
            yield containers
            if json.dumps(containers) != before:
                text = json.dumps({"version": _VERSION, _CONTAINERS: containers}, indent=1) + "\n"
                write_atomically(self._path, text.encode(), 0o600)


def _decode(text: str, path: str) -> dict:
    try:
        record = json.loads(text)
        version, containers = record["version"], record[_CONTAINERS]
    except (ValueError, KeyError, TypeError) as error:
        raise SysctrError(
            f"cannot read {path}: {error}", "restore it, or remove it: containers then get new addresses"
        ) from error
    if version > _VERSION:
        raise SysctrError(f"cannot read {path}: a newer sysctr wrote it (version {version})")
    return containers


def _lease(record: dict) -> Lease:
    nics = ((int(number), nic["ip"], nic["mac"]) for number, nic in record["nics"].items())
    return Lease(record["name"], tuple(sorted(nics)))


def _parse_wanted(text: str, subnet: IPv4Network) -> IPv4Address:
    try:
        interface = IPv4Interface(text)
    except ValueError as error:
        raise UsageError(f"cannot give address {text!r}: it is not an IPv4 address") from error
    where = f"cannot give address {text}"
    if interface.ip not in subnet:
        raise UsageError(f"{where}: it is not in {subnet}, the network of the bridge")
    if "/" in text and interface.network.prefixlen != subnet.prefixlen:
        raise UsageError(f"{where}: the network of the bridge is a /{subnet.prefixlen}")
    if interface.ip in (subnet.network_address, subnet.broadcast_address, gateway_of(subnet)):
        raise UsageError(f"{where}: it is the network's, its broadcast or the bridge's own address")
    return interface.ip


def _give(
    containers: dict, subnet: IPv4Network, ct_id: int, nic: int, demanded: IPv4Address | None
) -> Address:
    """Put an address for the NIC into the record; the caller holds the lock."""
    used = {
        entry["ip"]: (int(other), int(number))
        for other, record in containers.items()
        for number, entry in record["nics"].items()
    }
    holder = used.get(str(demanded), (ct_id, nic))
    if holder != (ct_id, nic):
        raise UsageError(f"cannot give {demanded} to {ct_id}: {holder[0]} has it")
    record = containers.setdefault(str(ct_id), {"name": "", "nics": {}})
    entry = record["nics"].setdefault(str(nic), {"ip": "", "mac": ""})
    if demanded is not None:
        entry["ip"] = str(demanded)
    elif not _fits(entry["ip"], subnet):
        entry["ip"] = _lowest_free(subnet, used)
    return _address(entry["ip"], subnet)


def _fits(ip: str, subnet: IPv4Network) -> bool:
    """Tell whether an address given out earlier is still one of the network."""
    return bool(ip) and IPv4Address(ip) in subnet and IPv4Address(ip) != gateway_of(subnet)


def _lowest_free(subnet: IPv4Network, used: Iterable[str]) -> str:
    used = set(used)
    for number in range(int(subnet.network_address) + 2, int(subnet.broadcast_address)):
        ip = str(IPv4Address(number))
        if ip not in used:
            return ip
    raise NoSpace(
        f"cannot give an address: all of {subnet} are taken",
        "destroy what is not needed, or set a larger network.subnet in host.toml",
    )


def _address(ip: str, subnet: IPv4Network) -> Address:
    return Address(ip, subnet.prefixlen, str(gateway_of(subnet)))
