"""A runbook that was written for Proxmox VE, line by line on a real host, and what its scripts parse."""

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from tests.node import CHECKOUT, Node, Result
from tests.system.guests import inside

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "nft", "busybox")]

CT, COPY = "181", "182"
_TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


def test_a_runbook_of_proxmox_works_as_it_is_typed(shared_host: Node, tmp_path: Path) -> None:
    host = shared_host

    def pct(*words: str, check: bool = True, stdin: bytes | None = None) -> Result:
        return host.run("pct", *words, check=check, stdin=stdin)

    # Made and started.
    (tmp_path / "keys.pub").write_text("ssh-ed25519 AAAAC3NzaC1lZDI1 ops@pve\n")
    made = pct(
        "create", CT, "local:vztmpl/tiny_1.0-1_amd64.tar.zst", "-hostname", "Runbook.example.org",
        "-memory", "256", "--cores=1", "-rootfs", "local:1", "-storage", "local-lvm",
        "-net0", "name=eth0,bridge=vmbr77,firewall=1,ip=dhcp", "-password", "s3cret words",
        "-ssh-public-keys", str(tmp_path / "keys.pub"), "-unprivileged", "1", "-features", "nesting=1",
        "-onboot", "0", "-description", "Made by the runbook", "-start", "1",
    )  # fmt: skip
    assert "+ sysctr create runbook --id 181 --template tiny" in made.err
    assert "there is no pool local here: the default one is used" in made.err
    assert "s3cret" not in made.err + made.out + host.logs()
    info = host.json("info", CT)
    assert (info["name"], info["state"], info["description"]) == ("runbook", "running", "Made by the runbook")
    assert (info["limits"]["memory"], info["disk_limit_bytes"]) == ("256M", 2**30)
    assert "ops@pve" in inside(host, CT, "cat /root/.ssh/authorized_keys")
    assert inside(host, CT, "grep -c '^root:[$]' /etc/shadow") == "1"

    # What scripts parse is Proxmox's, and nothing stands beside it.
    listed = pct("list")
    assert listed.err == ""
    header, *rows = listed.out.splitlines()
    assert header == "VMID       Status     Lock         Name                "
    assert "181        running                 runbook             " in rows
    status = pct("status", CT)
    assert (status.out, status.err) == ("status: running\n", "")
    verbose = dict(line.split(": ", 1) for line in pct("status", CT, "--verbose").out.splitlines())
    assert (verbose["vmid"], verbose["name"], verbose["type"]) == (CT, "runbook", "lxc")
    assert int(verbose["maxdisk"]) == 2**30
    config = dict(line.split(": ", 1) for line in pct("config", CT).out.splitlines())
    assert (config["hostname"], config["memory"], config["cores"]) == ("runbook", "256", "1")
    assert config["description"] == "Made by the runbook%0A"
    assert "name=eth0" in config["net0"]

    # Programs and files.
    assert pct("exec", CT, "--", "echo", "-n", "exact").out == "exact"
    assert pct("exec", CT, "--", "sh", "-c", "exit 7", check=False).status == 7
    assert pct("exec", CT, "cat", stdin=b"\0bytes\xff").stdout == b"\0bytes\xff"
    (tmp_path / "file").write_text("carried\n")
    pct("push", CT, str(tmp_path / "file"), "/srv/file", "-perms", "0640")
    assert inside(host, CT, "stat -c %a /srv/file") == "640"
    pct("pull", CT, "/srv/file", str(tmp_path / "back"))
    assert (tmp_path / "back").read_text() == "carried\n"

    # Changed while it runs; what waits is pending with both values.
    card = f"{config['net0']},mtu=1400"
    changed = pct("set", CT, "-memory", "128", "-mp0", "local:0.0625,mp=/data", "-net0", card)
    assert "pending until the next start: net.0.mtu" in changed.out
    assert inside(host, CT, "touch /data/file && echo ok") == "ok"
    assert host.json("info", CT)["limits"]["memory"] == "128M"
    waiting = pct("pending", CT).out.splitlines()
    assert "cur memory: 128" in waiting
    assert len([line for line in waiting if line.startswith("cur net0: ")]) == 1
    assert [line for line in waiting if line.startswith("new ")] == [
        f"new net0: {dict(line.split(': ', 1) for line in pct('config', CT).out.splitlines())['net0']}"
    ]
    assert "mtu=1400" not in pct("config", CT, "--current").out
    columns, root, data = (line.split() for line in pct("df", CT).out.splitlines())
    assert columns == ["MP", "Volume", "Size", "Used", "Avail", "Use%", "Path"]
    assert (root[0], root[2], root[6]) == ("rootfs", "1G", "/")
    assert (data[0], data[1], data[2], data[6]) == ("mp0", "default:181-disk0", "64M", "/data")
    assert re.search(r"^181: +\d", pct("cpusets").out, re.MULTILINE)

    # Snapshots: without --start a rollback leaves it stopped, as there.
    pct("snapshot", CT, "Before", "-description", "before the change")
    inside(host, CT, "echo changed > /srv/file")
    tree = pct("listsnapshot", CT).out.splitlines()
    assert re.fullmatch(rf"`-> before +{_TIME} +before the change", tree[0])
    assert re.fullmatch(r" `-> current +You are here!", tree[1])
    assert tree[0].index("before the change") == tree[1].index("You are here!")
    pct("rollback", CT, "Before")
    assert pct("status", CT).out == "status: stopped\n"
    # What is mounted grows only where root has CAP_SYS_RESOURCE.
    pct("resize", CT, "mp0", "+64M")
    assert host.json("config", CT)["config"]["mount"]["0"]["size"] == "128M"
    assert pct("resize", CT, "mp0", "100M", check=False).status == 255, "it only grows"
    pct("start", CT)
    assert inside(host, CT, "cat /srv/file") == "carried"
    pct("suspend", CT)
    assert host.state(CT) == "frozen"
    assert pct("status", CT).out == "status: running\n"
    pct("resume", CT)
    pct("delsnapshot", CT, "Before")

    # Backed up, lost, and back.
    dump = tmp_path / "dump"
    dump.mkdir()
    for _ in range(2):
        saved = host.run(
            "vzdump", CT, "-mode", "snapshot", "-compress", "gzip", "-dumpdir", str(dump), "-prune-backups",
            "keep-last=1", "-notes-template", r"{{guestname}}\nnightly", "-mailto", "root",
        )  # fmt: skip
        assert "+ sysctr backup 181 --mode snapshot --compress gzip" in saved.err
        assert "--mailto has no effect" in saved.err
    (archive,) = dump.glob("vzdump-lxc-181-*.tar.gz")
    assert Path(f"{archive}.notes").read_text() == "runbook\nnightly"
    assert pct("destroy", CT, check=False).status == 255, "it runs"
    pct("destroy", CT, "-force", "-purge", "1")
    assert pct("status", CT, check=False).status == 255
    pct("restore", CT, str(archive), "-storage", "local", "-start", "1")
    assert inside(host, CT, "cat /srv/file") == "carried"
    assert pct("clone", CT, COPY, "-hostname", "second").status == 0
    assert host.json("info", "second")["id"] == int(COPY)
    stream = host.run("vzdump", COPY, "--stdout", "--quiet").stdout
    assert pct("restore", COPY, "-", "-force", stdin=stream).status == 0
    pct("shutdown", CT, "-timeout", "30", "-forceStop", "1")
    assert pct("unlock", CT).status == 0
    for number in (CT, COPY):
        pct("destroy", number)
    assert not [row for row in pct("list").out.splitlines() if row.startswith((CT, COPY))]


def test_what_has_no_equal_is_refused_with_a_reason(shared_host: Node) -> None:
    for words in (["mount", "101"], ["fsck", "101"], ["remote-migrate", "101", "x"], ["rescan"]):
        done = shared_host.run("pct", *words, check=False)
        assert (done.status, done.out) == (255, "")
        assert done.err.startswith(f"sysctr: cannot run `pct {words[0]}`: "), done.err


def test_a_link_of_that_name_is_that_command(shared_host: Node, tmp_path: Path) -> None:
    program = tmp_path / "sysctr"
    program.write_text(f"#!/usr/bin/python3 -I\nimport sys\nsys.path.insert(0, {str(CHECKOUT)!r})\n"
                       "from sysctr.cli import program\nprogram()\n")  # fmt: skip
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    for name in ("pct", "vzdump"):
        (tmp_path / name).symlink_to("sysctr")

    def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(tmp_path / name), *words], env={**os.environ, "SYSCTR_ROOT": shared_host.root},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    shared_host.run("list")
    assert run("sysctr", "list").returncode == 0
    assert (run("pct", "list").returncode, run("pct", "start").returncode) == (0, 255)
    assert "sysctr backup" in run("vzdump", "--help").stdout
