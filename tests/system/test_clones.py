"""Clones of containers and templates made of them: the same files, and nothing of the identity."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.system.guests import inside, new_name, refused, shell
from tests.system.pools import Kept

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox", "loop")]

_IDENTITY = {
    "/etc/machine-id": "0123456789abcdef0123456789abcdef\n",
    "/etc/ssh_host_key_of_nobody": "stays\n",
    "/root/data": "data\n",
}


def original(kept: Kept, *options: str) -> str:
    """Return a running container that has something of everything."""
    ref = kept.create(*options, start=True)
    for path, text in _IDENTITY.items():
        shell(kept.host, ref, f"printf %s '{text}' > {path}")
    shell(kept.host, ref, "mkdir -p /etc/ssh /var/log /var/cache/apt; echo key > /etc/ssh/ssh_host_rsa_key")
    shell(
        kept.host, ref, "echo said > /var/log/messages; echo ls > /root/.ash_history; adduser -D joe || true"
    )
    shell(
        kept.host,
        ref,
        "mkdir /home/joe; chown 1000:1000 /home/joe; ln /root/data /root/linked; mkfifo /root/p",
    )
    return ref


def test_a_container_that_was_restored_in_place_can_be_cloned(kept: Kept, tmp_path: Path) -> None:
    host, ref, name = kept.host, kept.create(start=True), new_name("clone")
    shell(host, ref, "echo data > /root/data")
    host.run("backup", ref, "--dir", str(tmp_path))
    (archive,) = tmp_path.glob("vzdump-lxc-*.tar.zst")
    host.run("restore", str(archive), str(host.json("info", ref)["id"]), "--force")
    host.run("clone", ref, name, "--start")
    assert inside(host, name, "cat /root/data") == "data"
    host.run("destroy", ref, name, "--yes", "--force")


@pytest.mark.parametrize("options", [(), ("--full",)])
def test_a_clone_of_a_running_container_is_another_one(kept: Kept, options: tuple[str, ...]) -> None:
    host, ref, name = kept.host, original(kept), new_name("clone")
    host.run("clone", ref, name, "--start", *options)
    before, after = host.json("info", ref), host.json("info", name)
    assert before["state"] == after["state"] == "running"
    assert after["pool"] == kept.pool
    for key in ("uuid", "id", "idmap", "addresses"):
        assert before[key] != after[key], key
    assert before["nets"][0]["mac"] != after["nets"][0]["mac"]
    assert after["generation"] == 1
    assert inside(host, name, "cat /root/data /etc/ssh_host_key_of_nobody; hostname").split() == [
        "data", "stays", name,
    ]  # fmt: skip
    assert inside(host, name, "cat /etc/machine-id; ls /etc/ssh") == ""
    assert inside(host, name, "stat -c %u:%g:%F /home/joe /root/p; stat -c %h /root/data").split("\n") == [
        "1000:1000:directory", "0:0:fifo", "2",
    ]  # fmt: skip
    # Each has its own from now on.
    shell(host, name, "echo clone > /root/data")
    assert inside(host, ref, "cat /root/data; cat /etc/ssh/ssh_host_rsa_key").split() == ["data", "key"]
    assert kept.names(ref) == []
    host.run("destroy", ref, "--yes", "--force")
    assert inside(host, name, "cat /root/data") == "clone"
    host.run("stop", name, "--kill")
    host.run("start", name)
    assert inside(host, name, "cat /root/data") == "clone"
    host.run("destroy", name, "--yes", "--force")
    assert kept.leftovers() == []


def test_a_clone_of_a_snapshot_has_its_files_and_its_configuration(kept: Kept) -> None:
    ref, name = kept.create("--memory", "100M"), new_name("clone")
    kept.write(ref, "/root/file", "then")
    kept.host.run("snapshot", ref, "then")
    kept.write(ref, "/root/file", "now")
    kept.host.run("set", ref, "limits.memory=50M")
    kept.host.run("protect", ref)
    kept.host.run("clone", ref, name, "--snapshot", "then", "--set", "limits.pids=99", "--id", "777")
    assert kept.read(name, "/root/file") == "then"
    made = kept.host.json("info", name)
    assert made["id"] == 777
    assert made["limits"]["memory"] == "100M"
    assert made["limits"]["pids"] == 99
    second = new_name("clone")
    kept.host.run("clone", ref, second)
    assert kept.read(second, "/root/file") == "now"
    assert kept.host.json("info", second)["protected"] is False
    # The snapshot is in use by nobody in a way that would keep it from being deleted.
    kept.host.run("protect", ref, "--off")
    kept.host.run("delsnapshot", ref, "then")
    assert kept.read(name, "/root/file") == "then"


def test_a_clone_goes_into_another_pool_by_a_copy(kept: Kept, tmp_path: os.PathLike) -> None:
    if kept.pool == "default":
        kept.host.run("pool", "add", "other", "--driver", "overlay", "--path", f"{tmp_path}/other")
    target = "other" if kept.pool == "default" else "default"
    ref, name = original(kept), new_name("clone")
    setting = ["--set", "limits.disk="] if kept.kind == "loop" else []
    kept.host.run("clone", ref, name, "--pool", target, "--start", *setting)
    assert kept.host.json("info", name)["pool"] == target
    assert inside(kept.host, name, "cat /root/data; stat -c %u /home/joe; stat -c %h /root/data").split() == [
        "data", "1000", "2",
    ]  # fmt: skip
    kept.host.run("destroy", name, "--yes", "--force")
    kept.host.run("destroy", ref, "--yes", "--force")
    if kept.pool == "default":
        kept.host.run("pool", "remove", "other")


def test_an_address_set_by_hand_stays_with_the_original(kept: Kept) -> None:
    host = kept.host
    prefix = host.json("info", kept.create())["addresses"][0].rpartition(".")[0]
    ref, name, second = kept.create(), new_name("clone"), new_name("clone")
    host.run("set", ref, f"net.0.ip={prefix}.222/24", f"net.0.gateway={prefix}.1")
    done = host.run("clone", ref, name)
    assert f"has not the address {prefix}.222/24" in done.err
    nic = host.json("info", name)["nets"][0]
    assert (nic["ip"], nic["gateway"]) == ("managed", "")
    before = host.json("list")
    kept_address = host.run("clone", ref, second, "--keep-addresses", check=False)
    if kept_address.status:
        assert host.json("list") == before
    else:
        assert host.json("info", second)["nets"][0]["ip"] == f"{prefix}.222/24"
    assert kept.leftovers() == []


def test_a_clone_that_fails_leaves_nothing(kept: Kept) -> None:
    host, ref = kept.host, kept.create()
    before, volumes = host.json("list"), kept.volumes()
    refused(host, 4, "has it", "clone", ref, ref)
    refused(host, 2, "cannot clone", "clone", ref, "Not_A_Name")
    refused(host, 3, "pool nowhere", "clone", ref, "free", "--pool", "nowhere")
    refused(host, 3, "cannot find snapshot", "clone", ref, "free", "--snapshot", "none")
    refused(host, 2, "no such key", "clone", ref, "free", "--set", "limits.colour=1")
    refused(
        host, 3, "no bridge nowhere0",
        "clone", ref, "free", "--set", "net.1=name=eth1,bridge=nowhere0,ip=manual",
    )  # fmt: skip
    assert host.json("list") == before
    assert kept.volumes() == volumes
    assert kept.leftovers() == []
    host.run("create", "free", "--template", "tiny")
    host.run("destroy", "free", "--yes")


def test_a_template_of_a_running_container_has_nothing_of_it(kept: Kept) -> None:
    host, ref, name = kept.host, original(kept), new_name("made")
    pid = host.json("info", ref)["pid"]
    host.run("template", "create", ref, name, "--description", "mine")
    assert host.json("info", ref)["pid"] == pid
    assert inside(host, ref, "cat /etc/ssh/ssh_host_rsa_key /root/.ash_history").split() == ["key", "ls"]
    shown = host.json("template", "show", name)
    assert shown["description"] == "mine"
    assert shown["source"]["kind"] == "container"
    assert shown["init"] == host.json("template", "show", "tiny")["init"]
    rootfs = f"{host.layout.pool}/layers/{name}/rootfs"
    found = subprocess.run(["find", rootfs, "-type", "f", "-size", "+0", "-printf", "/%P\n"],
                           check=True, capture_output=True, text=True)  # fmt: skip
    files = set(found.stdout.split())
    assert {"/root/data", "/root/linked", "/etc/ssh_host_key_of_nobody"} <= files
    gone = {"/etc/machine-id", "/etc/ssh/ssh_host_rsa_key", "/var/log/messages", "/root/.ash_history"}
    assert not files & gone
    assert os.path.exists(f"{rootfs}/etc/machine-id")
    made = new_name()
    host.run("create", made, "--template", name, "--start")
    assert inside(host, made, "cat /root/data; stat -c %u /home/joe").split() == ["data", "1000"]
    refused(host, 4, "exists already", "template", "create", ref, name)
    refused(host, 3, "cannot find snapshot", "template", "create", ref, "x", "--snapshot", "none")
    assert kept.names(ref) == []
    assert kept.leftovers() == []
