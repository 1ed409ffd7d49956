"""The two hosts that later tests stand on: alone with their links, and joined by a cable."""

import os

import pytest

from tests import leaks, node

pytestmark = [pytest.mark.root, pytest.mark.needs("veth", "ip")]

_ECHO = """
import socket, sys
server = socket.create_server(("192.0.2.2", 7007))
print("listening", flush=True)
connection, (peer, _port) = server.accept()
connection.sendall(peer.encode())
"""
_ASK = """
import socket
print(socket.create_connection(("192.0.2.2", 7007), 10).recv(100).decode())
"""


def test_two_hosts_reach_each_other_and_share_no_link() -> None:
    with node.two_nodes() as (left, right):
        echo = right.popen_program("/usr/bin/python3", "-I", "-c", _ECHO)
        assert echo.stdout.readline() == b"listening\n"
        assert left.shell("/usr/bin/python3", "-I", "-c", _ASK).out == "192.0.2.1\n"
        links = [set(one.shell("ls", "/sys/class/net").out.split()) for one in (left, right)]
        assert links[0] & links[1] == {"lo"}
        root = left.root
    assert not os.path.exists(root)


def test_what_a_node_leaves_is_seen() -> None:
    with node.Node() as one:
        before = leaks.picture()
        link = one.layout.veth(100, 0)
        one.shell("ip", "link", "add", link, "type", "bridge")
        left = leaks.left_behind(before, leaks.picture(), alone=False)
        assert left == [f"link {link}"]
    assert leaks.left_behind(before, leaks.picture(), alone=False) == [], "closing the node removes it"


def test_a_process_that_stays_is_seen() -> None:
    with node.Node() as one:
        before = leaks.picture()
        sleeper = one.popen_program("sleep", "1000")
        left = leaks.left_behind(before, leaks.picture(), alone=False)
        assert [line for line in left if line.startswith(f"process {sleeper.pid} ")]
    assert sleeper.returncode is not None
