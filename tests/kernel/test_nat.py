"""Rules of the host and containers: forwarding, Docker's filter, the filters of admins."""

import subprocess

import pytest

from sysctr.network import nat
from sysctr.network.network import Network
from tests.netns import OUTSIDE, Host, attach, ensure_is_cheap, received, run
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("veth", "nft", "ip", "dnsmasq")]


def docker_filter(*, user_chain: bool) -> None:
    """Filter as Docker does: nothing passes that its own rules do not let pass."""
    rules = ["add table ip filter"]
    rules.append("add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }")
    if user_chain:
        rules.append("add chain ip filter DOCKER-USER")
        rules.append("add rule ip filter DOCKER-USER counter return")
        rules.append("add rule ip filter FORWARD jump DOCKER-USER")
    subprocess.run(["nft", "-f", "-"], input="\n".join(rules), text=True, check=True)


def test_docker_on_the_host_does_not_cut_containers_off(host: Host, network: Network) -> None:
    outside, guest = host.outside(), host.guest()
    attach(network, guest)
    server, client = outside.udp(OUTSIDE, 7), guest.udp()
    wait_until(lambda: received(server, client, OUTSIDE))
    docker_filter(user_chain=True)
    assert not received(server, client, OUTSIDE), "an accept of our own table does not help"
    network.ensure()
    wait_until(lambda: received(server, client, OUTSIDE))
    assert network.problems() == []
    ensure_is_cheap(network)
    run("nft", "flush", "chain", "ip", "filter", "DOCKER-USER")
    network.ensure()
    wait_until(lambda: received(server, client, OUTSIDE))
    run("nft", "add", "rule", "ip", "filter", "DOCKER-USER", "counter", "comment", '"of the admin"')
    network.teardown()
    left = run("nft", "list", "ruleset")
    assert "of the admin" in left
    assert host.layout.nft_table not in left
    assert network.bridge not in left


def test_dockers_own_networks_stay_closed(host: Host, network: Network) -> None:
    docker_filter(user_chain=True)
    network.ensure()
    inside, guest = host.guest(), host.guest()
    for name in ("docker0", "br-0123456789ab"):
        run("ip", "link", "add", name, "type", "bridge")
    run("nft", "add", "chain", "ip", "filter", "DOCKER")  # as Docker does when it makes a network
    network.ensure()
    run("ip", "link", "add", "vethd", "type", "veth", "peer", "name", "eth0", "netns", inside.file)
    run("ip", "link", "set", "vethd", "master", "docker0", "up")
    run("ip", "address", "add", "172.17.0.1/16", "dev", "docker0")
    run("ip", "link", "set", "docker0", "up")
    inside.run("ip", "address", "add", "172.17.0.2/16", "dev", "eth0")
    inside.run("ip", "link", "set", "eth0", "up")
    attach(network, guest)
    server, client = inside.udp("172.17.0.2", 7), guest.udp()
    assert not received(server, client, "172.17.0.2"), "a port that was not published"
    rules = run("nft", "list", "chain", "ip", "filter", "DOCKER-USER")
    assert rules.index('oifname "br-0123456789ab" return') < rules.index(f'iifname "{network.bridge}" accept')


@pytest.mark.parametrize("hook", ["forward", "input"])
def test_a_filter_of_the_admins_is_reported_and_not_changed(host: Host, network: Network, hook: str) -> None:
    run("nft", "add", "table", "ip", "filter")
    chain = ("ip", "filter", hook.upper())
    run("nft", "add", "chain", *chain, f"{{ type filter hook {hook} priority 0; policy drop; }}")
    before = run("nft", "list", "table", "ip", "filter")
    network.ensure()
    [problem] = network.problems()
    assert f"ip filter {hook.upper()} drops" in problem.detail
    assert run("nft", "list", "table", "ip", "filter") == before
    run("nft", "insert", "rule", *chain, "iifname", network.bridge, "accept")
    assert network.problems() == []


def test_a_filter_that_drops_names_the_commands_that_mend_it(host: Host, network: Network) -> None:
    outside, guest = host.outside(), host.guest()
    attach(network, guest)
    docker_filter(user_chain=False)
    network.ensure()
    server, client = outside.udp(OUTSIDE, 7), guest.udp()
    assert not received(server, client, OUTSIDE)
    [problem] = network.problems()
    for command in problem.hint.partition("else: ")[2].split("; "):
        run(*command.split())
    wait_until(lambda: received(server, client, OUTSIDE))


def test_forwarding_stays_on_where_it_was_on_or_others_need_it(host: Host) -> None:
    nat.set_forwarding(on=True)
    first = host.network()
    first.ensure()
    first.teardown()
    assert nat.forwarding(), "it was on before us"
    nat.set_forwarding(on=False)
    first.ensure()
    docker_filter(user_chain=True)
    first.teardown()
    assert nat.forwarding(), "Docker relies on it"
