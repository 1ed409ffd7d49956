"""Archives go both ways between Proxmox VE and here, with the very commands that it runs.

None of this was tried on a Proxmox host: the tar commands are those of its sources, and Debian's LXC takes
the place of its own.
"""

import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import foreign, rootfs
from tests.node import Node
from tests.system.guests import create, inside, refused

pytestmark = pytest.mark.root

_numbers = itertools.count(300)
CONFIG = """\
#made by hand
arch: amd64
cores: 1
hostname: {name}
memory: 256
net0: name=eth0,bridge=vmbr0,firewall=1,hwaddr=BC:24:11:AA:{mac},ip=dhcp,type=veth
ostype: unmanaged
rootfs: local-lvm:vm-104-disk-0,size=1G
swap: 0
"""
RULES = "[OPTIONS]\nenable: 1\n\n[RULES]\nIN SSH(ACCEPT) -i net0\n"


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    with foreign.open_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def trees(base) -> dict[str, str]:
    """Two rootfs as Proxmox has them on its disks: of a privileged and of an unprivileged container."""
    busybox = rootfs.static_busybox()
    if busybox is None:
        pytest.skip("needs busybox: no static one (package busybox-static)")
    found = {}
    archive = rootfs.write_tarball(str(base / "rootfs.tar"), busybox)
    for kind, first in (("privileged", 0), ("unprivileged", foreign.FIRST_ID)):
        tree = base / kind
        tree.mkdir()
        os.chown(tree, first, first)
        with foreign.user_namespace(first) as enter:
            argv = [*enter, "tar", "-xpf", "-", "-C", str(tree), "--same-owner"]
            with open(archive, "rb") as file:
                subprocess.run(argv, stdin=file, check=True)
        (tree / "home/alice").write_text("alice's\n")
        os.chown(tree / "home/alice", first + 1000, first + 1000)
        (tree / "tmp/scratch").write_text("")
        (tree / "tmp/scratch").chmod(0o644)
        found[kind] = str(tree)
    return found


def archive_of(
    tree: str, base: Path, extension: str, *, first: int = foreign.FIRST_ID, firewall: str = ""
) -> tuple[int, str]:
    """Assemble an archive with a number of its own; returns the number and the path."""
    number = next(_numbers)
    config = CONFIG.format(name=f"pve{number}", mac=f"{number // 256:02X}:{number % 256:02X}")
    config += "unprivileged: 1\n" if first else ""
    path = str(base / f"vzdump-lxc-{number}-2026_03_01-02_03_04.{extension}")
    with foreign.user_namespace(first) as enter:
        foreign.vzdump(path, tree, str(base / f"work-{number}"), config, firewall=firewall, enter=enter)
    return number, path


def backed_up(host: Node, ref: str, directory: Path, codec: str) -> str:
    """Write an archive of a container and return its path."""
    host.run("backup", ref, "--dir", str(directory), "--compress", codec)
    (path,) = (str(path) for path in directory.iterdir() if path.suffix not in (".log", ".notes"))
    return path


@pytest.mark.parametrize("extension", foreign.COMPRESSORS)
def test_what_vzdump_writes_is_restored_and_boots(shared_host, trees, base, extension) -> None:
    number, path = archive_of(trees["unprivileged"], base, extension)
    done = shared_host.run("restore", path, "--start")
    assert f"restored pve{number} ({number})" in done.out
    assert "with its identity" in done.out
    shown = shared_host.json("info", str(number))
    assert shown["nets"][0]["mac"] == f"bc:24:11:aa:{number // 256:02x}:{number % 256:02x}"
    assert shown["limits"]["cores"] == 1
    script = "cd /home; cat alice; stat -c '%u %g' alice; echo /tmp/* /etc/vzdump*; stat -c %a /tmp; hostname"
    assert inside(shared_host, str(number), script).split() == [
        "alice's", "1000", "1000", "/tmp/*", "/etc/vzdump*", "1777", f"pve{number}",
    ]  # fmt: skip
    shared_host.run("stop", str(number), "--kill")


def test_a_privileged_one_is_unprivileged_here_with_the_same_ids(shared_host, trees, base) -> None:
    number, path = archive_of(trees["privileged"], base, "tar.zst", first=0)
    done = shared_host.run("restore", path, "--start")
    assert "it was privileged; here its root is nobody on the host" in done.err
    assert inside(shared_host, str(number), "stat -c '%u %g' /home/alice /bin/busybox").split() == [
        "1000", "1000", "0", "0",
    ]  # fmt: skip
    first = int(inside(shared_host, str(number), "cat /proc/self/uid_map").split()[1])
    assert first > foreign.FIRST_ID
    shared_host.run("stop", str(number), "--kill")


def test_firewall_rules_are_kept_told_and_put_into_backups(shared_host, trees, base, tmp_path) -> None:
    number, path = archive_of(trees["unprivileged"], base, "tar", firewall=RULES)
    done = shared_host.run("restore", path)
    assert "pct.fw: its firewall rules are kept as pct.fw beside the container's record" in done.err
    kept = Path(shared_host.layout.container_dir(number), "pct.fw")
    assert kept.read_text() == RULES
    archive = backed_up(shared_host, str(number), tmp_path, "none")
    rules = subprocess.run(["tar", "-xOf", archive, "./etc/vzdump/pct.fw"], check=True, capture_output=True)
    assert rules.stdout.decode() == RULES
    # In place of one with rules comes one without.
    _, other = archive_of(trees["unprivileged"], base, "tar")
    shared_host.run("restore", other, str(number), "--force")
    assert not kept.exists()


def test_openvz_is_refused_with_the_reason(shared_host, tmp_path) -> None:
    (tmp_path / "etc/vzdump").mkdir(parents=True)
    (tmp_path / "etc/vzdump/vps.conf").write_text('HOSTNAME="old"\n')
    path = str(tmp_path / "vzdump-openvz-101-2012_01_01-00_00_00.tar")
    subprocess.run(["tar", "-C", str(tmp_path), "-cf", path, "./etc/vzdump/vps.conf"], check=True)
    refused(shared_host, 1, "it is the backup of an OpenVZ container", "restore", path)
    refused(shared_host, 1, "it is the backup of an OpenVZ container", "backup", "verify", path)


@pytest.mark.needs("lxc")
@pytest.mark.parametrize("codec", ["gzip", "lzo", "zstd", "none"])
def test_proxmoxs_restore_takes_our_archives_and_lxc_boots_them(shared_host, base, tmp_path, codec) -> None:
    ref = create(shared_host, "--memory", "64M", start=True)
    inside(shared_host, ref, "echo kept > /root/file; chown 1000:33 /root/file")
    archive = backed_up(shared_host, ref, tmp_path, codec)
    shared_host.run("stop", ref, "--kill")
    listed = subprocess.run(["tar", "-tf", archive], check=True, capture_output=True, text=True).stdout
    assert listed.split("\n")[:2] == ["./etc/vzdump/pct.conf", "./etc/vzdump/pct.fw"]
    config = subprocess.run(
        ["tar", "-xOf", archive, "./etc/vzdump/pct.conf"], check=True, capture_output=True, text=True
    ).stdout
    assert {"memory: 64", f"hostname: {ref}", "unprivileged: 1"} <= set(config.split("\n"))

    lxc_directory = base / f"lxc-{codec}"
    lxc_directory.mkdir()
    with foreign.Lxc(str(lxc_directory)) as lxc, foreign.user_namespace() as enter:
        name = lxc.name("back")
        root = lxc.define(name, ["lxc.net.0.type = empty", "lxc.signal.halt = SIGINT"])
        foreign.pct_restore(archive, root, enter)
        # Proxmox takes both files out of the new root.
        for member in ("pct.conf", "pct.fw"):
            os.unlink(f"{root}/etc/vzdump/{member}")
        assert not os.path.exists(f"{root}/dev/.sysctr.json")
        assert os.stat(f"{root}/root/file").st_uid == foreign.FIRST_ID + 1000
        lxc.start(name)
        assert lxc.attach(name, "cat /root/file; id -u").split() == ["kept", "0"]
