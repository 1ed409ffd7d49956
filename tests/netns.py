"""A host in a network namespace of its own, with guests in others, for tests of the network alone.

Only the thread of the tests moves between namespaces; sockets and programs stay where they were made.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator

import pytest

from sysctr.config.schema import Nic
from sysctr.linux.process import CLONE_NEWNET, setns, unshare
from sysctr.network import names, nat
from sysctr.network.network import Attached, Network, Settings
from sysctr.paths import Layout
from tests import leaks

OUTSIDE = "198.51.100.2"
TIMEOUT_S = 5


class Namespace:
    """A network namespace, as a container's init would leave it to us: a file and a netlink socket."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        unshare(CLONE_NEWNET)
        try:
            self.netns_fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            self.netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        finally:
            setns(home, CLONE_NEWNET)
            os.close(home)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        setns(self.netns_fd, CLONE_NEWNET)
        try:
            yield
        finally:
            setns(home, CLONE_NEWNET)
            os.close(home)

    @property
    def file(self) -> str:
        """The namespace as a path that `ip` takes."""
        return f"/proc/{os.getpid()}/fd/{self.netns_fd}"

    def run(self, *argv: str) -> str:
        with self.entered():
            return run(*argv)

    def udp(self, address: str = "", port: int = 0) -> socket.socket:
        with self.entered():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sockets.append(sock)
        sock.settimeout(TIMEOUT_S)
        sock.bind((address, port))
        return sock

    def close(self) -> None:
        for sock in (*self._sockets, self.netlink):
            sock.close()
        os.close(self.netns_fd)


class Host(Namespace):
    """A namespace that is the host of one installation."""

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.mkdtemp(prefix="sysctr-network-")
        os.chmod(self.root, 0o711)  # dnsmasq's user passes through, as through /run/sysctr
        leaks.register(self.root)
        self.layout = Layout(self.root)
        self.networks: list[Network] = []
        self.guests: list[Namespace] = []

    def network(self, **settings: object) -> Network:
        network = Network(self.layout, Settings(**settings))
        self.networks.append(network)
        return network

    def guest(self) -> Namespace:
        guest = Namespace()
        self.guests.append(guest)
        return guest

    def outside(self) -> Namespace:
        """Connect another host, which knows nothing of the containers' network."""
        other = self.guest()
        run("ip", "link", "add", "uplink0", "type", "veth", "peer", "name", "far0", "netns", other.file)
        for where, name, address in ((self, "uplink0", "198.51.100.1/24"), (other, "far0", f"{OUTSIDE}/24")):
            where.run("ip", "address", "add", address, "dev", name)
            where.run("ip", "link", "set", name, "up")
        return other

    def close(self) -> None:
        for network in self.networks:
            network.close()
        last = Network(self.layout, Settings())
        last.teardown()
        last.close()
        for guest in self.guests:
            guest.close()
        super().close()
        shutil.rmtree(self.root)


def run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


@contextlib.contextmanager
def hosted() -> Iterator[Host]:
    """Be on a fresh host, where nothing is set up yet and nothing is forwarded."""
    host = Host()
    with host.entered():
        # A new namespace inherits what the machine says.
        nat.set_forwarding(on=False)
        run("ip", "link", "set", "lo", "up")
        try:
            yield host
        finally:
            host.close()


def nic(index: int = 0, **changes: object) -> Nic:
    values = {"name": f"eth{index}", "bridge": "", "mac": f"02:00:00:00:00:{index:02x}", "ip": "managed"}
    return Nic(**{"index": index, "gateway": "", "mtu": None, **values, **changes})


def attach(network: Network, guest: Namespace, ct_id: int = 101, **changes: object) -> Attached:
    return network.attach(
        ct_id, nic(**changes), netns_fd=guest.netns_fd, netlink_fd=guest.netlink.fileno()
    )


def link_names() -> set[str]:
    return {link["ifname"] for link in json.loads(run("ip", "-j", "link"))}


def received(server: socket.socket, client: socket.socket, address: str) -> bool:
    """Tell whether a datagram gets through within a moment."""
    # Unlike any other, for one that was sent before may be late.
    data = os.urandom(16)
    client.sendto(data, (address, server.getsockname()[1]))
    server.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        while server.recv(100) != data:
            pass
        return True
    return False


def ensure_is_cheap(network: Network) -> None:
    """Check that ensure() found nothing to do: it would start nft or dnsmasq otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (nat, names):
            patch.setattr(module, "run", lambda argv, **_: pytest.fail(f"ensure() ran {argv}"))
        network.ensure()
