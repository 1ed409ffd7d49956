"""A container that starts tells the network where its address is now: seen from another host."""

import sys

import pytest

from sysctr.network.announce import announcements
from tests.node import Node, cable
from tests.system.guests import create
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "overlay", "veth", "nft", "busybox", "ip")]

MAC, ADDRESS = "02:00:5e:00:07:01", "192.0.2.50"
_CAPTURE = """
import socket, sys
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
sock.bind((sys.argv[1], 0x0806))
sock.settimeout(30)
print("listening", flush=True)
while True:
    print(sock.recv(1500).hex(), flush=True)
"""


@pytest.fixture
def lan(two_nodes: tuple[Node, Node]) -> tuple[Node, str, Node]:
    """Return a neighbour and its card, and a host whose own bridge lan0 has the other end of the cable."""
    neighbour, host = two_nodes
    card, port = cable(neighbour, host).values()
    host.shell("ip", "link", "add", "lan0", "type", "bridge")
    host.shell("ip", "address", "flush", "dev", port)
    host.shell("ip", "link", "set", port, "master", "lan0")
    host.shell("ip", "link", "set", "lan0", "up")
    return neighbour, card, host


def test_the_neighbours_of_a_container_learn_where_it_is(lan: tuple[Node, str, Node]) -> None:
    neighbour, card, host = lan
    options = ["--net", f"name=eth0,bridge=lan0,mac={MAC},ip={ADDRESS}/24"]
    name = create(host, *options, start=False)
    before = "02:00:5e:00:99:99"
    neighbour.shell("ip", "neigh", "add", ADDRESS, "lladdr", before, "dev", card, "nud", "reachable")
    capture = neighbour.popen_program(sys.executable, "-I", "-c", _CAPTURE, card)
    assert capture.stdout.readline() == b"listening\n"
    host.run("start", name)
    heard = [capture.stdout.readline().strip().decode() for _ in range(2)]
    assert heard == [frame.hex() for frame in announcements(MAC, ADDRESS)]
    wait_until(
        lambda: MAC in neighbour.shell("ip", "neigh", "show", ADDRESS).out, 2, "the neighbour has the new MAC"
    )
    neighbour.shell("ping", "-c", "1", "-W", "2", ADDRESS)
