"""The network for real: bridge, NICs, names and DHCP; every test has a host of its own."""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sysctr.errors import ConfigError, NotFound, Refused, SysctrError, UsageError
from sysctr.linux.process import CLONE_NEWNET, setns
from sysctr.network import names, nat
from sysctr.network.network import Network, Traffic
from sysctr.network.rtnl import Route
from tests.netns import OUTSIDE, TIMEOUT_S, Host, attach, ensure_is_cheap, link_names, nic, run
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("veth", "nft", "ip", "dnsmasq")]


def ask(sock: socket.socket, server: str, name: str) -> list[str]:
    """Return the IPv4 addresses that a DNS server gives for a name."""
    question = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"
    sock.sendto(struct.pack("!6H", 7, 0x0100, 1, 0, 0, 0) + question + struct.pack("!2H", 1, 1), (server, 53))
    answer = sock.recv(4096)
    count, offset, found = struct.unpack_from("!H", answer, 6)[0], 12 + len(question) + 4, []
    for _number in range(count):
        _name, kind, _class, _ttl, length = struct.unpack_from("!HHHIH", answer, offset)
        if kind == 1:
            found.append(socket.inet_ntoa(answer[offset + 12 : offset + 16]))
        offset += 12 + length
    return found


def server_pid(host: Host) -> int:
    with open(f"{host.layout.run}/dnsmasq.pid", encoding="ascii") as file:
        return int(file.read())


def test_a_container_reaches_the_world_under_the_address_of_its_host(host: Host, network: Network) -> None:
    outside, guest = host.outside(), host.guest()
    attached = attach(network, guest)
    assert (attached.host_name, attached.addresses) == (host.layout.veth(101, 0), ("10.9.8.2/24",))
    server, client = outside.udp(OUTSIDE, 7), guest.udp()
    client.sendto(b"hello", (OUTSIDE, 7))
    data, peer = server.recvfrom(100)
    assert (data, peer[0]) == (b"hello", "198.51.100.1")
    server.sendto(b"and back", peer)
    assert client.recv(100) == b"and back"


def test_containers_reach_each_other_without_translation(host: Host, network: Network) -> None:
    one, two = host.guest(), host.guest()
    attach(network, one, 101)
    attach(network, two, 102, mac="02:00:00:00:01:00")
    server, client = two.udp("10.9.8.3", 7), one.udp()
    client.sendto(b"x", ("10.9.8.3", 7))
    assert server.recvfrom(10)[1][0] == "10.9.8.2"


def test_the_nic_inside_is_ready(host: Host, network: Network) -> None:
    guest = host.guest()
    attach(network, guest, name="lan0", mac="02:11:22:33:44:55", mtu=1400)
    links = {link["ifname"]: link for link in json.loads(guest.run("ip", "-j", "address"))}
    assert links.keys() == {"lo", "lan0"}
    assert "UP" in links["lo"]["flags"]
    assert "UP" in links["lan0"]["flags"]
    assert (links["lan0"]["address"], links["lan0"]["mtu"]) == ("02:11:22:33:44:55", 1400)
    [route] = json.loads(guest.run("ip", "-j", "route", "show", "default"))
    assert (route["gateway"], route["dev"]) == ("10.9.8.1", "lan0")
    [end] = json.loads(run("ip", "-j", "-6", "address", "show", "dev", host.layout.veth(101, 0))) or [{}]
    assert not end.get("addr_info"), "the host's end has no address of its own"


def test_the_bridge_keeps_its_mac_whatever_joins_and_when_made_anew(host: Host, network: Network) -> None:
    def mac() -> str:
        return json.loads(run("ip", "-j", "link", "show", network.bridge))[0]["address"]

    before = mac()
    attach(network, host.guest(), mac="00:00:00:00:00:01")
    run("ip", "link", "add", "low0", "address", "00:00:00:00:00:02", "type", "veth", "peer", "name", "low1")
    run("ip", "link", "set", "low0", "master", network.bridge)
    assert mac() == before
    run("ip", "link", "delete", network.bridge)
    network.ensure()
    assert mac() == before


def test_the_bridge_takes_no_advertised_router(host: Host, network: Network) -> None:
    for key in ("accept_ra", "autoconf"):
        with open(f"/proc/sys/net/ipv6/conf/{network.bridge}/{key}", encoding="ascii") as file:
            assert file.read() == "0\n", key
    assert "inet6" not in run("ip", "address", "show", network.bridge)


@pytest.mark.parametrize(
    "damage",
    [
        "ip link set {bridge} down",
        "ip address flush dev {bridge}",
        "ip link delete {bridge}",
        "nft flush ruleset",
        "nft flush chain inet {table} postrouting",
        "sh -c 'echo 0 >/proc/sys/net/ipv4/ip_forward'",
    ],
)
def test_ensure_mends_what_was_damaged(host: Host, network: Network, damage: str) -> None:
    outside = host.outside()
    run("sh", "-c", damage.format(bridge=network.bridge, table=host.layout.nft_table))
    network.ensure()
    ensure_is_cheap(network)
    guest = host.guest()
    attach(network, guest)
    server, client = outside.udp(OUTSIDE, 7), guest.udp()
    client.sendto(b"hello", (OUTSIDE, 7))
    assert server.recvfrom(100)[1][0] == "198.51.100.1"
    assert wait_until(lambda: answer(guest.udp, "10.9.8.1", "nobody.sysctr") == [], what="an answer")


def answer(make_socket: Callable[[], socket.socket], server: str, name: str) -> list[str] | None:
    """Ask a server that may be starting; None where it did not answer yet."""
    with contextlib.suppress(OSError), make_socket() as sock:
        sock.settimeout(0.2)
        return ask(sock, server, name)
    return None


def test_names_are_answered_and_follow_a_rename(host: Host, network: Network) -> None:
    guest = host.guest()
    attach(network, guest)
    assert network.nameservers() == ("10.9.8.1",)
    network.register(101, "demo", {})
    sock = guest.udp()
    wait_until(lambda: ask(sock, "10.9.8.1", "demo.sysctr") == ["10.9.8.2"], what="the name")
    assert ask(sock, "10.9.8.1", "demo") == ["10.9.8.2"]
    network.register(101, "other", {})
    wait_until(lambda: ask(sock, "10.9.8.1", "other.sysctr") == ["10.9.8.2"], what="the new name")
    wait_until(lambda: ask(sock, "10.9.8.1", "demo.sysctr") == [], what="the end of the old name")
    network.release(101)
    wait_until(lambda: ask(sock, "10.9.8.1", "other.sysctr") == [], what="the end of the name")


@pytest.mark.parametrize("name", ["two\n10.9.8.66 bank", "a b", "a.b", "Upper", "x" * 64, "localhost", "ü"])
def test_a_name_that_would_forge_a_record_is_refused(host: Host, network: Network, name: str) -> None:
    network.allocate(101, 0)
    with pytest.raises(UsageError, match="cannot publish the name"):
        network.register(101, name, {})
    with pytest.raises(UsageError, match="cannot publish the name"):
        network.enroll(102, name, [nic()])
    assert os.listdir(f"{host.layout.run}/names/hosts") == []


def test_a_mac_that_would_forge_a_record_is_refused(host: Host, network: Network) -> None:
    with pytest.raises(UsageError, match="cannot publish the MAC"):
        network.enroll(101, "demo", [nic(mac="02:00:00:00:00:01,10.9.8.66\n")])
    assert os.listdir(f"{host.layout.run}/names/dhcp") == []


@pytest.mark.needs("busybox")
def test_dhcp_gives_what_the_allocator_holds(host: Host, network: Network) -> None:
    network.enroll(101, "demo", [nic()])
    assert dhcp(host, network, 101) == "10.9.8.2 10.9.8.1 10.9.8.1 sysctr"
    network.allocate(101, 0, "10.9.8.77")
    network.register(101, "demo", {})
    assert dhcp(host, network, 101) == "10.9.8.77 10.9.8.1 10.9.8.1 sysctr"
    # The address goes to another MAC at once, though the lease of the first would last an hour.
    network.release(101)
    network.enroll(102, "next", [nic(mac="02:00:00:00:02:00", ip="10.9.8.77/24")])
    assert dhcp(host, network, 102, mac="02:00:00:00:02:00") == "10.9.8.77 10.9.8.1 10.9.8.1 sysctr"
    assert dhcp(host, network, 103, mac="02:00:00:00:03:00") == "", "who is not known gets nothing"


def dhcp(host: Host, network: Network, ct_id: int, **changes: object) -> str:
    """Return address, router, resolver and domain that a DHCP client in a new guest is given."""
    guest = host.guest()
    attached = network.attach(
        ct_id, nic(**changes, ip="manual"), netns_fd=guest.netns_fd, netlink_fd=guest.netlink.fileno()
    )
    script = f"{host.root}/dhcp"
    with open(script, "w", encoding="ascii") as file:
        file.write(f'#!/bin/sh\n[ "$1" != bound ] || echo $ip $router $dns $domain >{host.root}/bound\n')
    os.chmod(script, 0o755)
    argv = ["busybox", "udhcpc", "-i", "eth0", "-q", "-n", "-t", "4", "-T", "1", "-s", script]
    with guest.entered():
        subprocess.run(argv, capture_output=True, check=False)
    network.detach(ct_id)
    assert attached.addresses == ()
    with contextlib.suppress(FileNotFoundError):
        with open(f"{host.root}/bound", encoding="ascii") as file:
            found = file.read().strip()
        os.unlink(f"{host.root}/bound")
        return found
    return ""


def test_dnsmasq_is_adopted_by_the_next_daemon(host: Host, network: Network) -> None:
    before = server_pid(host)
    network.register(101, "demo", {})
    network.close()
    second = host.network(subnet="10.9.8.0/24")
    second.ensure()
    assert server_pid(host) == before
    ensure_is_cheap(second)


def test_a_killed_dnsmasq_is_started_again_with_all_names(host: Host, network: Network) -> None:
    guest = host.guest()
    attach(network, guest)
    network.register(101, "demo", {})
    before = server_pid(host)
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: network.nameservers() != ("10.9.8.1",), what="its end")
    network.register(101, "renamed", {})
    network.ensure()
    assert server_pid(host) != before
    assert network.nameservers() == ("10.9.8.1",)
    assert ask(guest.udp(), "10.9.8.1", "renamed.sysctr") == ["10.9.8.2"]


def test_a_pid_file_that_names_another_process_harms_nobody(host: Host, network: Network) -> None:
    pidfd = os.pidfd_open(server_pid(host))
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    select.select([pidfd], [], [], TIMEOUT_S)
    os.close(pidfd)
    with subprocess.Popen(["sleep", "1000"]) as bystander:
        with open(f"{host.layout.run}/dnsmasq.pid", "w", encoding="ascii") as file:
            file.write(f"{bystander.pid}\n")
        try:
            network.ensure()
            assert network.nameservers() == ("10.9.8.1",)
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_dnsmasq_runs_as_nobody_of_importance(host: Host, network: Network) -> None:
    assert os.stat(f"/proc/{server_pid(host)}").st_uid != 0
    assert network.problems() == []
    network.teardown()
    os.chmod(host.root, 0o700)
    network.ensure()
    assert network.nameservers() == ("10.9.8.1",), "behind a closed door it works too, but as root"
    assert ["runs as root" in problem.detail for problem in network.problems()] == [True]


def test_without_dnsmasq_there_is_a_network_and_a_problem(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "_PROGRAM", "no-such-dnsmasq")
    network, guest = host.network(), host.guest()
    network.ensure()
    attach(network, guest)
    assert [problem.hint for problem in network.problems()] == ["apt-get install dnsmasq-base"]
    assert network.nameservers() == names.host_nameservers()


def test_a_taken_port_is_a_problem_and_no_failure(host: Host) -> None:
    with host.udp("0.0.0.0", 53):
        network = host.network(subnet="10.9.8.0/24")
        network.ensure()
        assert ["in use" in problem.detail for problem in network.problems()] == [True]


def test_resolvers_of_the_host_are_those_a_guest_can_reach(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub, real = tmp_path / "resolv.conf", tmp_path / "real.conf"
    stub.write_text("search lan\nnameserver 127.0.0.53\noptions edns0\n")
    real.write_text("nameserver 192.0.2.53\nnameserver fe80::1%eth0\nnameserver\nnameserver 192.0.2.54\n")
    monkeypatch.setattr(names, "_RESOLV_CONF", (str(stub), str(real)))
    assert names.host_nameservers() == ("192.0.2.53", "192.0.2.54")
    monkeypatch.setattr(names, "_RESOLV_CONF", (str(tmp_path / "none"),))
    assert names.host_nameservers() == ()


def test_teardown_leaves_the_host_as_it_was(host: Host) -> None:
    run("nft", "add", "table", "inet", "admin")
    before = (link_names(), run("nft", "list", "ruleset"), run("ip", "route", "show", "table", "all"))
    network = host.network()
    network.ensure()
    assert nat.forwarding()
    attach(network, host.guest())
    pid = server_pid(host)
    network.release(101)
    network.teardown()
    network.teardown()
    assert (link_names(), run("nft", "list", "ruleset"), run("ip", "route", "show", "table", "all")) == before
    assert not nat.forwarding()
    assert not names._command_line(pid)
    files = {name for _directory, _names, found in os.walk(host.root) for name in found}
    assert files <= {"lock", "addresses.json"}
    network.ensure()
    attach(network, host.guest())


def test_the_network_survives_a_teardown_while_containers_have_addresses(host: Host) -> None:
    network = host.network()
    network.ensure()
    given = network.allocate(101, 0)
    network.teardown()
    run("ip", "link", "add", "new0", "type", "bridge")  # now the first choice would be another
    assert host.network().allocate(101, 0) == given
    assert host.network().subnet == network.subnet


def test_the_chosen_network_overlaps_nothing_of_the_host(host: Host) -> None:
    run("ip", "link", "add", "lan0", "type", "bridge")
    run("ip", "link", "set", "lan0", "up")
    run("ip", "address", "add", "10.117.3.1/17", "dev", "lan0")
    run("ip", "route", "add", "10.117.128.0/17", "via", "10.117.3.2")
    network = host.network()
    assert str(network.subnet).startswith("172.29.")
    network.ensure()
    assert network.problems() == []
    run("ip", "route", "add", str(network.subnet.supernet(4)), "via", "10.117.3.2")
    assert ["overlaps" in problem.detail for problem in network.problems()] == [True]


def test_another_subnet_in_the_settings_moves_the_bridge(host: Host, network: Network) -> None:
    network.allocate(101, 0)
    run("ip", "address", "add", "192.0.2.77/32", "dev", network.bridge)
    network.close()
    moved = host.network(subnet="10.9.9.0/24")
    moved.ensure()
    addresses = run("ip", "-4", "-o", "address", "show", network.bridge)
    assert "10.9.9.1/24" in addresses
    assert "10.9.8.1/24" not in addresses
    assert "192.0.2.77" in addresses, "what an admin added stays"
    guest = host.guest()
    assert attach(moved, guest).addresses == ("10.9.9.2/24",)
    moved.register(101, "demo", {})
    wait_until(lambda: answer(guest.udp, "10.9.9.1", "demo.sysctr") == ["10.9.9.2"], what="the name")


@pytest.mark.parametrize("subnet", ["10.0.0.1/24", "10.0.0.0/30", "10.0.0.0/8", "fd00::/64", "x"])
def test_a_subnet_that_cannot_be_is_refused(host: Host, subnet: str) -> None:
    before = link_names()
    with pytest.raises(ConfigError):
        host.network(subnet=subnet).ensure()
    assert link_names() == before


def test_what_sysctr_did_not_make_is_not_touched(host: Host, network: Network) -> None:
    foreign = host.layout.veth(101, 0)
    run("ip", "link", "add", foreign, "type", "bridge")
    with pytest.raises(Refused, match="sysctr did not make it"):
        attach(network, host.guest())
    network.detach(101)
    assert network.sweep([]) == []
    network.teardown()
    assert foreign in link_names()
    run("ip", "link", "add", network.bridge, "type", "bridge")
    with pytest.raises(Refused, match="that sysctr did not make"):
        network.ensure()
    network.teardown()
    assert network.bridge in link_names()
    run("ip", "link", "delete", network.bridge)


def test_detach_is_immediate_and_may_be_repeated(host: Host, network: Network) -> None:
    guest = host.guest()
    attach(network, guest)
    attach(network, guest, index=1, gateway="")
    network.detach(101, 1)
    assert host.layout.veth(101, 0) in link_names()
    assert host.layout.veth(101, 1) not in link_names()
    network.detach(101)
    network.detach(101)
    assert host.layout.veth(101, 0) not in link_names(), "the name is free at once"
    attach(network, host.guest())
    network.settle()
    assert host.layout.veth(101, 0) in link_names(), "what is deleted late is not the new one"
    assert not [name for name in link_names() if name.startswith("x")]
    assert guest.run("ip", "-o", "link").count("\n") == 1, "the other end is gone too"


def test_a_restart_replaces_what_the_former_life_left(host: Host, network: Network) -> None:
    first, second = host.guest(), host.guest()
    attach(network, first)
    assert attach(network, second).addresses == ("10.9.8.2/24",)
    network.settle()
    assert "eth0" in second.run("ip", "-o", "link")
    assert "eth0" not in first.run("ip", "-o", "link")


def test_the_next_daemon_knows_and_sweeps_the_links(host: Host, network: Network) -> None:
    for ct_id in (101, 102):
        attach(network, host.guest(), ct_id, mac=f"02:00:00:00:00:{ct_id:02x}")
    network.close()
    second = host.network(subnet="10.9.8.0/24")
    second.ensure()
    assert second.sweep([102]) == [host.layout.veth(101, 0)]
    second.detach(102)
    second.settle()
    assert not link_names() & {host.layout.veth(101, 0), host.layout.veth(102, 0)}


def test_a_container_is_not_enrolled_for_a_bridge_that_is_not_there(host: Host, network: Network) -> None:
    run("ip", "link", "add", "vmbr0", "type", "bridge")
    with pytest.raises(NotFound, match="cannot attach eth0 of demo: there is no bridge nope") as caught:
        network.enroll(101, "demo", [nic(bridge="nope", ip="192.0.2.5/24")])
    assert caught.value.hint == f"bridges of this host: {', '.join(sorted([network.bridge, 'vmbr0']))}"
    with pytest.raises(Refused, match="cannot attach eth1 of demo: lo is not a bridge"):
        network.enroll(101, "demo", [nic(), nic(1, bridge="lo", ip="manual")])
    with pytest.raises(Refused, match="addresses on vmbr0 are not managed here"):
        network.enroll(101, "demo", [nic(bridge="vmbr0")])
    assert network.all_addresses() == {}
    assert network.enroll(101, "demo", [nic(bridge="vmbr0", ip="192.0.2.5/24")]) == {}
    # Gone since: the start says so.
    run("ip", "link", "delete", "vmbr0")
    with pytest.raises(NotFound, match="cannot attach eth0 of 101: there is no bridge vmbr0"):
        attach(network, host.guest(), 101, bridge="vmbr0", ip="192.0.2.5/24")


def test_an_attach_that_fails_leaves_nothing(host: Host, network: Network) -> None:
    guest = host.guest()
    attach(network, guest)
    before = link_names()
    with pytest.raises(SysctrError, match="cannot attach eth0 of 102"):
        attach(network, guest, 102)  # the name is taken inside
    with pytest.raises(NotFound, match="there is no bridge vmbr9"):
        attach(network, guest, 103, bridge="vmbr9", ip="192.0.2.5/24")
    with pytest.raises(Refused, match="lo is not a bridge"):
        attach(network, guest, 104, bridge="lo", ip="192.0.2.5/24")
    with pytest.raises(SysctrError, match=r"gateway|route"):
        attach(network, host.guest(), 105, gateway="0.0.0.0")
    network.settle()
    assert link_names() == before


def test_a_foreign_bridge_takes_what_it_is_told(host: Host, network: Network) -> None:
    run("ip", "link", "add", "vmbr0", "mtu", "1450", "type", "bridge")
    guest = host.guest()
    with pytest.raises(Refused, match="not managed here"):
        attach(network, guest, bridge="vmbr0")
    attach(network, guest, bridge="vmbr0", ip="192.0.2.5/32", gateway="192.0.2.1")
    [route] = json.loads(guest.run("ip", "-j", "route", "show", "default"))
    assert (route["gateway"], route["flags"]) == ("192.0.2.1", ["onlink"])
    assert json.loads(guest.run("ip", "-j", "link", "show", "eth0"))[0]["mtu"] == 1450
    assert network._addresses.leases() == {}


def test_the_first_of_two_gateways_is_the_default_route(host: Host, network: Network) -> None:
    guest = host.guest()
    attach(network, guest)
    attach(network, guest, index=1, gateway="10.9.8.9")
    [route] = json.loads(guest.run("ip", "-j", "route", "show", "default"))
    assert route["gateway"] == "10.9.8.1"


def test_many_threads_attach_at_once(host: Host, network: Network) -> None:
    guests = [host.guest() for _number in range(12)]
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        setns(home, CLONE_NEWNET)
        try:
            for _life in range(3):
                attach(network, guests[number], 100 + number, mac=f"02:00:00:00:01:{number:02x}")
                network.ensure()
                network.detach(100 + number)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(guests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(home)
    assert failures == []
    network.settle()
    assert not [name for name in link_names() if name.startswith(("v", "x"))]


def test_traffic_is_counted_as_the_container_sees_it(host: Host, network: Network) -> None:
    guest = host.guest()
    attach(network, guest)
    before = network.statistics(101)
    sock = guest.udp()
    for _number in range(10):
        sock.sendto(bytes(1000), ("10.9.8.1", 9))
    # The datagrams wait for the answer to the first ARP request.
    wait_until(lambda: network.statistics(101).tx_bytes - before.tx_bytes >= 3_000, what="the traffic")
    after = network.statistics(101)
    assert after.tx_packets - before.tx_packets >= 3
    assert after.rx_bytes < after.tx_bytes, "what came back are short ICMP messages"
    assert network.statistics(999) == Traffic()


def test_a_forged_answer_on_the_socket_of_a_container_is_ignored(host: Host, network: Network) -> None:
    guest = host.guest()
    with guest.entered(), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as forger:
        # Root of the container says: your first ten requests failed with EPERM.
        guest.netlink.bind((0, 0))
        for sequence in range(1, 11):
            message = struct.pack("=IHHIIi", 36, 2, 0, sequence, 0, -1) + bytes(16)
            forger.sendto(message, (guest.netlink.getsockname()[0], 0))
    assert attach(network, guest).addresses == ("10.9.8.2/24",)


def test_an_error_of_the_kernel_says_what_was_asked(host: Host) -> None:
    from sysctr.network import links

    with Route.open() as route:
        run("ip", "link", "add", "one0", "type", "bridge")
        link = links.find(route, "one0")
        with pytest.raises(OSError, match="join one0 to one0") as caught:
            links.join_bridge(route, "one0", link)
        assert caught.value.errno
        assert links.find(route, "one0").up, "the requests after one that failed are carried out"
