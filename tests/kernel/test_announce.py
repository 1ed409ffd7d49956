"""Announcements on a real bridge: what leaves by its uplink, and where it looks for a silent guest then."""

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest

from sysctr.network.announce import ETH_P_ARP, announcements
from sysctr.network.network import Attached
from tests.netns import TIMEOUT_S, Host, Namespace, attach, hosted, run
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("veth", "ip")]

MAC, ADDRESS = "02:00:5e:00:07:01", "198.51.100.7"


@pytest.fixture
def host() -> Iterator[Host]:
    with hosted() as host:
        yield host


@pytest.fixture
def outside(host: Host) -> Namespace:
    """Another host, at the other end of the uplink of the bridge lan0."""
    other = host.outside()
    run("ip", "link", "add", "lan0", "type", "bridge")
    run("ip", "link", "set", "uplink0", "master", "lan0")
    run("ip", "link", "set", "lan0", "up")
    return other


@contextlib.contextmanager
def raw_socket(namespace: Namespace, link: str) -> Iterator[socket.socket]:
    """Give a socket that hears all ARP which comes to a link, and sends any frame."""
    with namespace.entered():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sock.bind((link, ETH_P_ARP))
    with sock:
        sock.settimeout(TIMEOUT_S)
        yield sock


def silent_guest(host: Host) -> tuple[Namespace, Attached]:
    """Attach a guest that sends nothing by itself, as IPv6 would."""
    guest = host.guest()
    guest.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
    return guest, attach(host.network(), guest, bridge="lan0", mac=MAC, ip=f"{ADDRESS}/24")


def port_of(mac: str) -> str:
    """Return behind which port lan0 believes a MAC to be."""
    entries = json.loads(run("bridge", "-json", "fdb", "show", "br", "lan0"))
    return next((entry["ifname"] for entry in entries if entry["mac"] == mac), "")


def test_everybody_on_the_bridge_hears_it(host: Host, outside: Namespace) -> None:
    _, attached = silent_guest(host)
    with raw_socket(outside, "far0") as far:
        host.networks[0].announce([attached])
        heard = [far.recv(1500) for _ in range(2)]
    assert heard == list(announcements(MAC, ADDRESS))


def test_a_neighbour_follows_an_address_to_another_mac(host: Host, outside: Namespace) -> None:
    _, attached = silent_guest(host)
    before = "02:00:5e:00:99:99"
    outside.run("ip", "neigh", "add", ADDRESS, "lladdr", before, "dev", "far0", "nud", "reachable")
    host.networks[0].announce([attached])
    wait_until(lambda: MAC in outside.run("ip", "neigh", "show", ADDRESS), 2, "the neighbour has the new MAC")


def test_a_bridge_that_saw_the_mac_at_its_uplink_looks_for_it_here(host: Host, outside: Namespace) -> None:
    guest, attached = silent_guest(host)
    with raw_socket(outside, "far0") as far:
        # As if the guest had run over there until now.
        far.send(announcements(MAC, ADDRESS)[0])
    wait_until(lambda: port_of(MAC) == "uplink0", what="the bridge learns")
    host.networks[0].announce([attached])
    assert port_of(MAC) == attached.host_name
    outside.run("ip", "neigh", "replace", ADDRESS, "lladdr", MAC, "dev", "far0", "nud", "permanent")
    server, client = guest.udp(ADDRESS, 7), outside.udp()
    client.sendto(b"found", (ADDRESS, 7))
    assert server.recv(100) == b"found"


def test_a_bridge_that_is_gone_is_only_logged(
    host: Host, outside: Namespace, caplog: pytest.LogCaptureFixture
) -> None:
    _, attached = silent_guest(host)
    run("ip", "link", "delete", "lan0")
    host.networks[0].announce([attached])
    assert f"cannot announce {ADDRESS} on lan0: " in caplog.text
