"""The network of real containers: there before init runs, names, the world outside, ssh, and nothing left."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.node import Node
from tests.system.guests import create, inside, lines, new_name, refused, shell
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "overlay", "veth", "nft", "busybox", "ip")]

_NO_DEFAULT = ["--net", "name=eth0,ip=manual"]


def address(host: Node, name: str) -> str:
    (first,) = host.json("info", name)["addresses"]
    return first


def gateway(host: Node, name: str) -> str:
    (route,) = [line for line in lines(host, name, "ip route") if line.startswith("default ")]
    assert route.split()[1:5:2] == ["via", "dev"], route
    return route.split()[2]


def free_address(host: Node, last: int) -> str:
    """Return an address of the host's own network by its last byte."""
    shown = json.loads(host.shell("ip", "-json", "address", "show", "dev", host.layout.bridge).out)
    (own,) = [entry["local"] for entry in shown[0]["addr_info"] if entry["family"] == "inet"]
    return own.rpartition(".")[0] + f".{last}"


def test_address_and_default_route_are_there_before_init_runs(shared_host: Node) -> None:
    name = create(shared_host, "--set", "init=/sbin/early", start=False)
    script = (
        b"#!/bin/sh\n(ip -4 -o addr show eth0; ip route; cat /sys/class/net/eth0/address; "
        b"cat /sys/class/net/*/operstate; cat /etc/resolv.conf) > /root/early 2>&1\nexec /sbin/init\n"
    )
    shared_host.run("push", "--mode", "0755", "-", f"{name}:/sbin/early", stdin=script)
    shared_host.run("start", name)
    seen = wait_until(lambda: shell(shared_host, name, "cat /root/early", check=False).out)
    own = address(shared_host, name)
    assert f"inet {own}/24" in seen
    assert f"default via {own.rpartition('.')[0]}.1 dev eth0" in seen
    assert shared_host.json("info", name)["nets"][0]["mac"] in seen
    assert f"nameserver {own.rpartition('.')[0]}.1" in seen


def test_mac_and_address_are_the_same_after_every_start(shared_host: Node) -> None:
    name = create(shared_host)

    def now() -> tuple[str, str, str]:
        return (
            inside(shared_host, name, "cat /sys/class/net/eth0/address"), address(shared_host, name),
            inside(shared_host, name, "ip -4 -o addr show eth0").split()[3],
        )  # fmt: skip

    first = now()
    assert first[2].partition("/")[0] == first[1]
    assert f"mac = \"{first[0]}\"" in shared_host.run("config", name).out
    for how in (["stop"], ["stop", "--kill"]):
        shared_host.run(*how, name)
        shared_host.run("start", name)
        assert now() == first
    shared_host.run("daemon", "restart")
    shared_host.run("reboot", name)
    assert now() == first


def test_containers_find_each_other_by_name(shared_host: Node) -> None:
    one, two = create(shared_host), create(shared_host)
    shell(shared_host, two, "httpd -p 80 -h /srv/www")
    assert "It works" in inside(shared_host, one, f"wget -q -O - http://{two}/")
    found = inside(shared_host, one, f"nslookup {two}")
    assert address(shared_host, two) in found
    shared_host.run("rename", two, f"{two}-new")
    wait_until(
        lambda: address(shared_host, f"{two}-new") in inside(shared_host, one, f"nslookup {two}-new || true"),
        what="the new name is known",
    )
    assert shell(shared_host, one, f"nslookup {two}", check=False).status != 0
    shared_host.run("destroy", "--yes", "--force", f"{two}-new")
    wait_until(
        lambda: shell(shared_host, one, f"nslookup {two}-new", check=False).status != 0,
        what="the name of a destroyed container is forgotten",
    )


def test_the_host_reaches_containers_and_they_reach_it(shared_host: Node) -> None:
    name = create(shared_host)
    shell(shared_host, name, "httpd -p 80 -h /srv/www")
    done = shared_host.shell("busybox", "wget", "-q", "-O", "-", f"http://{address(shared_host, name)}/")
    assert "It works" in done.out
    assert "0% packet loss" in inside(shared_host, name, f"ping -c 1 {gateway(shared_host, name)}")


def test_a_static_address_is_kept_and_cannot_be_given_twice(shared_host: Node) -> None:
    create(shared_host)
    wanted = free_address(shared_host, 77)
    name = create(shared_host, "--net", f"name=eth0,ip={wanted}/24")
    assert address(shared_host, name) == wanted
    assert f"inet {wanted}/24" in inside(shared_host, name, "ip -4 -o addr show eth0")
    again = new_name()
    argv = ["create", again, "--template", "tiny", "--net", f"name=eth0,ip={wanted}/24"]
    done = shared_host.run(*argv, check=False)
    assert done.status in (2, 4, 5), done
    assert wanted in done.err, done
    refused(shared_host, 3, again, "info", again)
    shared_host.run("destroy", "--yes", "--force", name)
    create(shared_host, "--net", f"name=eth0,ip={wanted}/24")


def test_two_cards_a_chosen_mac_and_one_that_is_left_alone(shared_host: Node) -> None:
    name = create(
        shared_host, "--net", "name=eth0,mac=02:00:5e:10:00:01,mtu=1400", "--net", "name=lan0,ip=manual"
    )
    links = dict(
        line.split(" ", 1)
        for line in lines(
            shared_host, name,
            'for n in eth0 lan0; do echo $n $(cat /sys/class/net/$n/address /sys/class/net/$n/mtu); done',
        )
    )  # fmt: skip
    assert links["eth0"] == "02:00:5e:10:00:01 1400"
    assert set(inside(shared_host, name, "ls /sys/class/net").split()) == {"lo", "eth0", "lan0"}
    assert inside(shared_host, name, "ip -4 -o addr show lan0") == ""
    hosts = [nic["host_name"] for nic in shared_host.json("info", name)["nets"]]
    assert all(os.path.exists(f"/sys/class/net/{link}") for link in hosts)
    shared_host.run("stop", name)
    wait_until(lambda: not any(os.path.exists(f"/sys/class/net/{link}") for link in hosts), what="links go")


def test_the_small_packets_of_one_container_are_not_those_of_the_others(shared_host: Node) -> None:
    create(shared_host, "--net", "name=eth0,mtu=1300")
    other = create(shared_host)
    assert inside(shared_host, other, "cat /sys/class/net/eth0/mtu") == "1500"
    with open(f"/sys/class/net/{shared_host.layout.bridge}/mtu", encoding="ascii") as file:
        assert file.read() == "1500\n"


def test_a_container_without_an_address_of_ours_has_none(shared_host: Node) -> None:
    name = create(shared_host, *_NO_DEFAULT)
    assert shared_host.json("info", name)["addresses"] == []
    assert inside(shared_host, name, "ip -4 -o addr show eth0; ip route") == ""


def test_each_container_has_ports_of_its_own(shared_host: Node) -> None:
    names = [create(shared_host) for _ in range(2)]
    for name in names:
        shell(shared_host, name, f"echo page of {name} > /srv/www/index.html; httpd -p 80 -h /srv/www")
    for name in names:
        page = shared_host.shell("busybox", "wget", "-q", "-O", "-", f"http://{address(shared_host, name)}/")
        assert page.out == f"page of {name}\n"


def test_a_reboot_inside_keeps_the_network(shared_host: Node) -> None:
    name = create(shared_host)
    before = (address(shared_host, name), shared_host.json("info", name)["pid"])
    shell(shared_host, name, "reboot -f", check=False)
    wait_until(lambda: shared_host.json("info", name)["pid"] not in (None, before[1]), 20, "it runs again")
    assert f"inet {before[0]}/24" in inside(shared_host, name, "ip -4 -o addr show eth0")
    assert "0% packet loss" in inside(shared_host, name, f"ping -c 1 {gateway(shared_host, name)}")


@pytest.mark.net
@pytest.mark.needs("mmdebstrap")
def test_debian_updates_its_package_lists_through_nat(debian_host: Node) -> None:
    done = shell(debian_host, "deb", "apt-get update", check=False)
    assert done.status == 0, done
    assert "Get:" in done.out or "Hit:" in done.out, done
    assert "W:" not in done.err, done


@pytest.mark.net
@pytest.mark.needs("mmdebstrap", "ssh")
def test_ssh_logs_in_with_the_key_given_at_creation(debian_host: Node, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    name = create(debian_host, "--ssh-key", f"{key}.pub", template="debian-12")
    debian_host.wait(name, "booted")
    ssh = [
        "ssh", "-i", str(key), "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no",
        "-o", "LogLevel=ERROR", "-o", f"UserKnownHostsFile={tmp_path}/known",
        f"root@{address(debian_host, name)}",
    ]  # fmt: skip
    wait_until(lambda: debian_host.shell(*ssh, "true", check=False).status == 0, 20, "sshd answers")
    assert debian_host.shell(*ssh, "hostname; id -u; tty -s || echo none").out == f"{name}\n0\nnone\n"
    other = create(debian_host, template="debian-12")
    debian_host.wait(other, "booted")
    elsewhere = [*ssh[:-1], f"root@{address(debian_host, other)}"]
    wait_until(lambda: "Permission denied" in debian_host.shell(*elsewhere, "id", check=False).err, 20)
    keys = [inside(debian_host, one, "cat /etc/ssh/ssh_host_ed25519_key.pub") for one in (name, other)]
    assert keys[0].split()[1] != keys[1].split()[1], "each container makes host keys of its own"
    for one in (name, other):
        debian_host.run("destroy", "--yes", "--force", one)
