"""A container made of Proxmox's pct.conf runs as it says, and comes out as a pct.conf again."""

from pathlib import Path

import pytest

from sysctr.config import pct
from tests.node import Node
from tests.system.guests import create, inside, new_name, refused

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "overlay", "veth", "nft", "busybox")]

CONF = """\
#Front end: 100%25
arch: amd64
cores: 1
hostname: NAME
memory: 128
mp0: local-zfs:subvol-107-disk-1,mp=/srv/data,backup=1,size=64M
mp1: /proc,mp=/never
mp2: HOST,mp=/shared,ro=1
net0: name=eth0,bridge=vmbr77,firewall=1,hwaddr=BC:24:11:2E:5A:01,ip=192.0.2.10/24,gw=192.0.2.1,type=veth
ostype: debian
rootfs: local-zfs:subvol-107-disk-0,size=256M
swap: 64
tags: prod;web
unprivileged: 1
lxc.environment.runtime: GREETING=hi = there
lxc.mount.entry: /dev/fuse dev/fuse none bind,create=file

[pve:pending]
memory: 4096
"""


def conf(tmp_path: Path, name: str) -> str:
    """Return a file for a container of this name; it asks for a directory that the test owns."""
    (tmp_path / "shared").mkdir(exist_ok=True)
    (tmp_path / "shared" / "file").write_text("of the host\n")
    file = tmp_path / "107.conf"
    file.write_text(CONF.replace("NAME", name).replace("HOST", str(tmp_path / "shared")))
    return str(file)


def test_a_container_of_proxmox_runs_with_its_settings(shared_host: Node, tmp_path: Path) -> None:
    name = new_name("pve")
    done = shared_host.run("import-pct", conf(tmp_path, name), "--template", "tiny", "--start")
    info = shared_host.json("info", name)
    assert done.out == f"created and started {info['id']} ({name})\n"
    kept = "description, cores, hostname, memory, mp0, net0, rootfs, swap, tags, environment GREETING"
    for line in (
        f"kept: {kept}\n",
        "changed: net0.bridge: this host has no bridge 'vmbr77': the card is on that of sysctr",
        "left out: net0.firewall:",
        f"left out: mp2: it shows '{tmp_path}/shared' of the host at '/shared' (--allow bind)",
        "left out: lxc.mount.entry: it mounts '/dev/fuse' at '/dev/fuse' (--allow raw)",
        "left out: pending memory:",
    ):
        assert line in done.err, done.err
    assert info["state"] == "running"
    assert info["limits"] == {
        "cores": 1, "memory": "128M", "swap": "64M", "pids": 4096, "disk": "256M",
    }  # fmt: skip
    assert info["description"] == "Front end: 100%"
    assert info["tags"] == ["prod", "web"]
    assert info["nets"][0]["mac"] == "bc:24:11:2e:5a:01"
    assert inside(shared_host, name, "hostname") == name
    assert inside(shared_host, name, "echo $GREETING") == "hi = there"
    assert inside(shared_host, name, "cat /sys/class/net/eth0/address") == "bc:24:11:2e:5a:01"
    kib = int(inside(shared_host, name, "df -k /srv/data | tail -1 | awk '{print $2}'"))
    assert kib <= 64 * 1024
    assert inside(shared_host, name, "ls -d /shared /never /dev/fuse 2>/dev/null || true") == ""


def test_what_is_allowed_by_name_is_there_too(shared_host: Node, tmp_path: Path) -> None:
    name = new_name("pve")
    file = conf(tmp_path, "other-name")
    options = ["--template", "tiny", "--name", name, "--set", "limits.disk=", "--set", "net.0=", "--start"]
    shared_host.run("import-pct", file, "--allow", "bind,device,raw", *options)
    assert inside(shared_host, name, "cat /shared/file") == "of the host"
    assert inside(shared_host, name, "touch /shared/new 2>&1 || true").endswith("Read-only file system")
    assert inside(shared_host, name, "stat -c %F /dev/fuse") == "character special file"
    assert "disk" not in shared_host.json("info", name)["limits"]
    assert "eth0" not in inside(shared_host, name, "ls /sys/class/net")


def test_a_dry_run_and_a_refusal_make_nothing(shared_host: Node, tmp_path: Path) -> None:
    file = conf(tmp_path, new_name("pve"))
    before = shared_host.json("list")
    done = shared_host.run("import-pct", file, "--template", "tiny", "--dry-run")
    assert done.out.startswith("# Container pve-")
    assert '[mount.0]\ntarget = "/srv/data"\nsize = "64M"\n' in done.out
    taken = create(shared_host, start=False)
    refused(shared_host, 4, taken, "import-pct", "-q", file, "--template", "tiny", "--name", taken)
    refused(shared_host, 3, "no-such", "import-pct", file, "--template", "no-such")
    refused(shared_host, 2, "cannot allow 'all'", "import-pct", file, "--template", "tiny", "--allow", "all")
    refused(shared_host, 2, "line 2", "import-pct", "-", "--template", "tiny", stdin=b"[x1]\n[x1]\n")
    refused(shared_host, 2, "no host name", "import-pct", "-", "--template", "tiny", stdin=b"memory: 64\n")
    shared_host.run("destroy", taken, "--yes")
    assert [one["id"] for one in shared_host.json("list")] == [one["id"] for one in before]


def test_a_container_comes_out_as_a_pct_conf_that_makes_it_again(shared_host: Node) -> None:
    mounts = ["--mount", "target=/data,size=64M", "--mount", "target=/unlimited"]
    name = create(
        shared_host, "--memory", "128M", "--swap", "0", "--cores", "1", "--env", "A=b c", "--tag", "x",
        *mounts, start=False,
    )  # fmt: skip
    number = shared_host.json("info", name)["id"]
    done = shared_host.run("config", name, "--format", "pct")
    values = pct.read(done.out).root.values
    assert pct.write(pct.read(done.out)) == done.out
    assert values["hostname"] == name
    assert (values["memory"], values["swap"], values["cores"]) == ("128", "0", "1")
    assert values["mp0"] == f"local:subvol-{number}-disk-1,backup=1,mp=/data,size=64M"
    assert values["mp1"] == f"local:subvol-{number}-disk-2,backup=1,mp=/unlimited,size=2G"
    # Both hold some kilobytes: half as much again, in whole GiB, and one more.
    assert values["rootfs"] == f"local:subvol-{number}-disk-0,size=2G"
    assert values["net0"].startswith("bridge=vmbr0,hwaddr=")
    assert values["ostype"] == "unmanaged"
    assert "changed: limits.disk:" in done.err
    assert "left out: template:" in done.err
    again = new_name("again")
    shared_host.run(
        "import-pct", "-", "--name", again, "--template", "tiny", "--set", "limits.disk=", "--set",
        "net.0.mac=", stdin=done.stdout,
    )  # fmt: skip
    first, second = (shared_host.json("info", one) for one in (name, again))
    for key in ("limits", "environment", "tags", "description"):
        assert first[key] == second[key]
    assert [mount["target"] for mount in second["mounts"]] == ["/data", "/unlimited"]
    shared_host.run("start", again)
    assert inside(shared_host, again, "echo $A") == "b c"
