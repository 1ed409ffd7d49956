"""`sysctr pct` and `sysctr vzdump`: what was typed for Proxmox VE, and what is run for it."""

import doctest
import importlib
import os
import shlex
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr import cli, errors
from sysctr.cli import main
from sysctr.cli.command import build_parser
from sysctr.cli.pct_arguments import read
from sysctr.cli.pct_table import SUBCOMMANDS
from sysctr.cli.vzdump import TAKES
from tests.unit.cli_stub import Stub

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MODULES = (
    "pct", "pct_arguments", "pct_create", "pct_life", "pct_settings", "pct_shown", "pct_table", "vzdump"
)  # fmt: skip
HOST = {
    "name": "here", "bridge": "sysctr0", "subnet": "10.0.3.0/24", "bridges": ["vmbr9"], "cores": 4,
    "limits": ["cores", "cpu", "memory", "pids", "swap"],
}  # fmt: skip
CONFIG = {
    "name": "demo", "template": "debian-12",
    "limits": {"memory": "1G", "disk": "8G"},
    "net": {"0": {"name": "eth0", "ip": "10.0.3.9/24", "gateway": "10.0.3.1", "mac": "02:00:00:00:00:01"}},
    "mount": {"0": {"target": "/data", "size": "4G", "read_only": True, "pool": "local-lvm"},
              "1": {"target": "/srv", "source": "/srv", "idmap": "1000=1000"}},
    "device": {"0": {"path": "/dev/net/tun", "mode": "0600"}},
    "environment": {"A": "1"},
}  # fmt: skip
MOUNTS = [
    {"key": "mount.0", "kind": "volume", "target": "/data", "source": "default:101-disk0",
     "volume": "101-disk0", "size_bytes": 4 * 2**30, "used_bytes": 2**30, "state": "mounted", "options": []},
    {"key": "mount.1", "kind": "bind", "target": "/srv", "source": "/srv", "volume": "", "size_bytes": None,
     "used_bytes": None, "state": "mounted", "options": []},
]  # fmt: skip


@pytest.fixture
def stub(tmp_path, monkeypatch):
    stub = Stub(tmp_path / "host")
    monkeypatch.setenv("SYSCTR_ROOT", stub.layout.root)
    info = stub.container(disk_limit_bytes=8 * 2**30, disk_used_bytes=2**30, mounts=MOUNTS, volume="101",
                          pool="default")  # fmt: skip
    stopped = stub.container(102, "web", state="stopped", pid=None)
    stub.routes |= {
        ("GET", "/1/host"): {"host": HOST},
        ("GET", "/1/pools"): [{"name": "default", "free_bytes": 2**40}, {"name": "local-lvm"}],
        ("GET", "/1/templates"): [{"name": "debian-12", "arch": "amd64"}, {"name": "tiny", "arch": "amd64"}],
        ("GET", "/1/containers"): [info, stopped],
        ("GET", "/1/containers/101"): {"container": info},
        ("GET", "/1/containers/102"): {"container": stopped},
        ("GET", "/1/containers/101/config"): {"config": CONFIG, "pending": [], "in_force": None},
        ("GET", "/1/containers/101/mounts"): {"mounts": MOUNTS},
        ("GET", "/1/containers/101/snapshots"): {"snapshots": [{"name": "before"}], "parent": "before"},
        ("GET", "/1/tasks"): [],
    }
    yield stub
    stub.close()


@pytest.fixture
def ran(stub, monkeypatch):
    """The command lines that were run, instead of running them; each is one that our own parsers take."""
    lines = []

    def run(argv):
        if argv[0] in ("pct", "vzdump"):
            return whole(argv)
        name, rest = cli.split_command(argv)
        command = cli.load(name)
        command.parse(build_parser(name, cli.COMMANDS[name][2], command), rest)
        lines.append(shlex.join(argv))
        return 0

    whole = cli.run
    monkeypatch.setattr(cli, "run", run)
    return lines


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_modules_hold(name):
    assert doctest.testmod(importlib.import_module(f"sysctr.cli.{name}")).failed == 0


_FIRST = "create web --id 120 --template debian-12"
_TEMPLATE = "local:vztmpl/debian-12-standard_12.7-1_amd64.tar.zst"
TABLE = [
    ("pct start 101", ["start 101"]),
    ("pct start 101 -skiplock 1 --debug", ["start 101"]),
    ("pct stop 101 --overrule-shutdown 1", ["stop --kill 101"]),
    ("pct shutdown 101", ["shutdown 101"]),
    ("pct shutdown 101 --timeout 5", ["shutdown --timeout 5 101"]),
    ("pct shutdown 101 --forceStop 0", ["shutdown 101"]),
    ("pct shutdown 101 -forcestop --timeout=5", ["stop --timeout 5 101"]),
    ("pct shutdown 101 -forceStop 1", ["stop --timeout 60 101"]),
    ("pct reboot 101 -timeout 9", ["reboot --timeout 9 101"]),
    ("pct suspend 101", ["freeze 101"]),
    ("pct resume 101", ["thaw 101"]),
    ("pct destroy 101", ["destroy --yes 101"]),
    ("pct destroy 101 --force 1 --purge", ["destroy --yes --force 101"]),
    ("pct destroy --force 101", ["destroy --yes --force 101"]),
    ("pct exec 101 -- ls -la /", ["exec 101 -- ls -la /"]),
    ("pct exec 101 ls -la", ["exec 101 -- ls -la"]),
    ("pct exec 101 --keep-env 0 -- sh -c 'exit 3'", ["exec 101 -- sh -c 'exit 3'"]),
    ("pct enter 101", ["enter 101"]),
    ("pct console 101 -escape ^b", ["console --escape '^b' 101"]),
    ("pct push 101 /etc/hosts /tmp/hosts", ["push /etc/hosts 101:/tmp/hosts"]),
    ("pct push 101 a /b --user www --group 33 --perms 0640",
     ["push --user www --group 33 --perms 0640 a 101:/b"]),
    ("pct pull 101 /etc/hosts here", ["pull 101:/etc/hosts here"]),
    ("pct snapshot 101 before", ["snapshot 101 before"]),
    ("pct snapshot 101 Before_2 -description 'it is\n well'",
     ["snapshot '--description=it is well' 101 before_2"]),
    ("pct delsnapshot 101 before --force", ["delsnapshot 101 before"]),
    ("pct rollback 101 before", ["stop --kill 101", "rollback --yes 101 before"]),
    ("pct rollback 101 before --start", ["rollback --yes 101 before"]),
    ("pct rollback 102 before", ["rollback --yes 102 before"]),
    ("pct rollback 102 before -start 1", ["rollback --yes 102 before", "start 102"]),
    ("pct template 101", ["template create 101 demo"]),
    ("pct migrate 101 pve2", ["migrate 101 pve2"]),
    ("pct migrate 101 pve2 --restart --timeout 60 -bwlimit 1024 -target-storage 1",
     ["migrate --restart --bwlimit 1024K 101 pve2"]),
    ("pct migrate 101 pve2 --restart 0 --target-storage fast --bwlimit 0",
     ["migrate --pool-map default=fast --bwlimit 0 101 pve2"]),
    ("pct migrate 101 pve2 --target-storage local:fast,nas:slow",
     ["migrate --pool-map local=fast --pool-map nas=slow 101 pve2"]),
    ("pct clone 101 130", ["clone 101 ct130 --id 130"]),
    ("pct clone 101 130 --hostname Web.example.org -full -snapname S1 -storage local-lvm -description 'a b'",
     ["clone 101 web --id 130 --snapshot s1 --full --pool local-lvm --set 'description=a b'"]),
    ("pct resize 101 rootfs +2G", ["set 101 limits.disk=10G"]),
    ("pct resize 101 rootfs 16G", ["set 101 limits.disk=16G"]),
    ("pct resize 101 mp0 +512M", ["set 101 mount.0.size=4608M"]),
    # Restore.
    ("pct restore 120 local:backup/vzdump-lxc-101-2026_01_31-12_00_00.tar.zst",
     ["restore vzdump-lxc-101-2026_01_31-12_00_00.tar.zst 120"]),
    ("pct restore 120 /mnt/a.tar.gz --storage local-lvm --force 1 -unique --start -hostname web -memory 512",
     ["restore /mnt/a.tar.gz 120 --name web --pool local-lvm --force --unique --start "
      "--set limits.memory=512M"]),
    ("pct restore 120 - -rootfs local-lvm:8", ["restore - 120 --pool local-lvm --set limits.disk=8G"]),
    ("pct restore 120 - -net0 name=eth0,bridge=vmbr0,ip=dhcp",
     ["restore - 120 --set net.0.name=eth0 --set net.0.ip=managed --set net.0.bridge= --set net.0.gateway= "
      "--set net.0.mtu="]),
    ("pct create 120 /mnt/a.tar.gz -restore 1", ["restore /mnt/a.tar.gz 120"]),
    # Create.
    ("pct create 120 debian-12 -hostname web", [_FIRST]),
    (f"pct create 120 {_TEMPLATE}", ["create ct120 --id 120 --template debian-12"]),
    (f"pct create 120 {_TEMPLATE} --hostname web --memory 512 --swap 256 --cores 2 --cpulimit 1.5 "
     "--cpuunits 50 --rootfs local-lvm:8 --net0 name=eth0,bridge=vmbr0,ip=dhcp --unprivileged 1 "
     "--features nesting=1 --onboot 1 --start 1 --tags 'b;a' --nameserver '192.0.2.53 192.0.2.54' "
     "--searchdomain example.org --description 'Web front end' --protection 1 --ostype debian --arch amd64",
     [f"{_FIRST} --pool local-lvm --cores 2 --cpu 1.5 --memory 512M --swap 256M --disk 8G --net "
      "name=eth0,ip=managed --tag a --tag b --onboot --set protected=true --set limits.cpu_weight=50 "
      "--set dns.nameservers=192.0.2.53,192.0.2.54 --set dns.search=example.org "
      "--set 'description=Web front end' --start"]),
    ("pct create 120 tiny -hostname web -rootfs 4 -storage local-lvm -mp0 8,mp=/data,backup=1 "
     "-mp1 /srv/www,mp=/srv/www,ro=1 -mp5 local:2,mp=/more",
     ["create web --id 120 --template tiny --pool local-lvm --disk 4G "
      "--mount target=/data,backup=true,size=8G,pool=local-lvm "
      "--mount source=/srv/www,target=/srv/www,read_only=true "
      "--set mount.5=target=/more,backup=false,size=2G"]),
    ("pct create 120 tiny -hostname web -net0 name=eth0,bridge=vmbr9,ip=192.0.2.10/24,gw=192.0.2.1,"
     "hwaddr=BC:24:11:2E:5A:01 -dev0 /dev/fuse,mode=0666",
     ["create web --id 120 --template tiny --net name=eth0,bridge=vmbr9,ip=192.0.2.10/24,gateway=192.0.2.1,"
      "mac=bc:24:11:2e:5a:01 --device path=/dev/fuse,mode=0666"]),
    ("pct create 120 tiny -hostname web -env 'A=1\\0B=2' -ssh-public-keys /k.pub",
     ["create web --id 120 --template tiny --set environment.A=1 --set environment.B=2 --ssh-key /k.pub"]),
    # Set.
    ("pct set 101 -memory 1024 -cores 2", ["set 101 limits.cores=2 limits.memory=1G"]),
    ("pct set 101 --onboot 0 -protection yes", ["set 101 onboot=false protected=true"]),
    ("pct set 101 -mem 64", ["set 101 limits.memory=64M"]),
    ("pct set 101 -swap 0 -hostname other", ["set 101 name=other limits.swap=0"]),
    ("pct set 101 -net0 name=eth0,bridge=vmbr0,ip=dhcp",
     ["set 101 net.0.name=eth0 net.0.ip=managed --unset net.0.gateway"]),
    ("pct set 101 -net1 name=eth1,bridge=vmbr9,ip=manual",
     ["set 101 net.1.name=eth1 net.1.bridge=vmbr9 net.1.ip=manual"]),
    ("pct set 101 -mp0 local:subvol-101-disk-1,mp=/data,size=4G",
     ["set 101 mount.0.target=/data mount.0.backup=false mount.0.size=4G --unset mount.0.read_only"]),
    ("pct set 101 -mp0 local:subvol-101-disk-1,mp=/else,backup=1,ro=1",
     ["set 101 mount.0.target=/else mount.0.backup=true mount.0.read_only=true"]),
    ("pct set 101 -mp0 /srv/data,mp=/data",
     ["set 101 mount.0.source=/srv/data mount.0.target=/data --unset mount.0.size --unset mount.0.read_only "
      "--unset mount.0.pool"]),
    ("pct set 101 -mp2 local-lvm:8,mp=/new",
     ["set 101 mount.2.target=/new mount.2.backup=false mount.2.size=8G mount.2.pool=local-lvm"]),
    ("pct set 101 -mp1 /home,mp=/home",
     ["set 101 mount.1.source=/home mount.1.target=/home --unset mount.1.idmap"]),
    ("pct set 101 --delete mp0,net0 -delete nameserver",
     ["set 101 --unset net.0 --unset dns.nameservers", "mount remove 101 mount.0 --keep"]),
    ("pct set 101 -delete env -description ''", ["set 101 --unset description --unset environment.A"]),
    ("pct set 101 -features fuse=1", ["set 101 device.1.path=/dev/fuse"]),
    ("pct set 101 -features fuse=1 -dev1 /dev/kvm -dev2 /dev/tty0",
     ["set 101 device.1.path=/dev/kvm device.2.path=/dev/tty0 device.3.path=/dev/fuse"]),
    ("pct set 101 -dev0 /dev/kvm", ["set 101 device.0.path=/dev/kvm --unset device.0.mode"]),
    ("pct set 101 -startup order=1,up=30", []),
    ("pct unlock 101", []),
    # vzdump.
    ("vzdump 101", ["backup 101"]),
    ("vzdump 101 102", ["backup 101 102"]),
    ("vzdump 101,102 --exclude 102", ["backup 101"]),
    ("vzdump --all", ["backup --all"]),
    ("vzdump -all 1 -exclude 101", ["backup 102"]),
    ("vzdump 101 -mode stop -compress 0", ["backup 101 --mode stop --compress none"]),
    ("vzdump 101 --compress 1", ["backup 101 --compress lzo"]),
    ("vzdump 101 --compress gzip --dumpdir /mnt", ["backup 101 --compress gzip --dir /mnt"]),
    ("vzdump 101 --storage local --node localhost", ["backup 101"]),
    ("vzdump 101 --notes-template '{{guestname}}\\nof {{node}}' --protected 1",
     ["backup 101 '--notes={{guestname}}\nof {{node}}' --protected"]),
    ("vzdump 101 --exclude-path /tmp --exclude-path '*.log' --stdexcludes 0",
     ["backup 101 --exclude=/tmp '--exclude=*.log'"]),
    ("vzdump 101 --stdexcludes 1",
     ["backup 101 '--exclude=/tmp/?*' '--exclude=/var/tmp/?*' '--exclude=/var/run/?*.pid'"]),
    ("vzdump 101 --bwlimit 51200", ["backup 101 --bwlimit 51200K"]),
    ("vzdump 101 --bwlimit 0", ["backup 101 --bwlimit 0"]),
    ("vzdump 101 --stdout --quiet 1", ["backup 101 --stdout"]),
    ("vzdump 101 --prune-backups keep-last=3,keep-weekly=4 --dumpdir /mnt",
     ["backup 101 --dir /mnt", "backup prune 101 --keep-last 3 --keep-weekly 4 --dir /mnt"]),
    ("vzdump --all --maxfiles 2", ["backup --all", "backup prune --keep-last 2"]),
    ("vzdump 101 --prune-backups keep-last=3 --remove 0", ["backup 101"]),
    ("vzdump 101 --prune-backups keep-all=1 --remove 1", ["backup 101"]),
    ("vzdump 101 --mailto a@example.org --mailnotification failure --ionice 7 --lockwait 5 --script-x", None),
    ("vzdump 101 --mailto a@example.org --ionice 7 --zstd 1 --stopwait 3", ["backup 101"]),
    ("vzdump --stop", []),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "lines"), TABLE, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_typed_is_run_as_a_command_of_ours(ran, capsys, typed, lines):
    code = main(shlex.split(typed))
    shown = capsys.readouterr().err
    assert (code, ran) == ((255, []) if lines is None else (0, lines)), shown
    if lines is not None and "--quiet" not in typed and not typed.startswith("pct exec"):
        told = [line.removeprefix("+ sysctr ") for line in shown.splitlines() if line.startswith("+ ")]
        assert told == [line.replace("\n", "\\n") for line in lines]


def test_the_table_has_every_subcommand_that_is_not_shown_or_refused():
    tried = {typed.split()[1] for typed, _ in TABLE if typed.startswith("pct ")}
    assert {name for name, takes in SUBCOMMANDS.items() if takes.plan} <= tried


def test_every_option_of_vzdump_is_tried():
    tried = " ".join(typed for typed, _ in TABLE if typed.startswith("vzdump"))
    missing = [name for name in (*TAKES.values, *TAKES.flags) if f"-{name}" not in tried]
    assert missing == []


REFUSED = [
    ("pct mount 101", "are never mounted"),
    ("pct unmount 101", "nothing is mounted"),
    ("pct fsck 101 --device rootfs", "checked when it is opened"),
    ("pct fstrim 101", "sysctr pool list"),
    ("pct rescan --dryrun", "sysctr recover"),
    ("pct migrate 101 pve2 --online", "processes do not move"),
    ("pct migrate 101 pve2 --bwlimit 5M", "KiB a second"),
    ("pct remote-migrate 101 201 host=x", "sysctr peer join TOKEN"),
    ("pct move-volume 101 rootfs local", "sysctr clone N"),
    ("pct move_volume 101 rootfs local", "sysctr clone N"),
    ("pct config 101 --snapshot before", "come back with a rollback"),
    ("pct set 101 --revert memory", "pct pending"),
    ("pct set 101 --digest 0123 -memory 1", "another digest"),
    ("pct set 101 --lock backup", "no locks"),
    ("pct set 101 -unprivileged 0", "no privileged containers"),
    ("pct set 101 -mp0 local:8,mp=/data", "it is there already"),
    ("pct set 101 -mp7 local:subvol-101-disk-9,mp=/data", "no volume of its own"),
    ("pct set 101 -delete unused0", "does not number"),
    ("pct set 101 -delete hostname", "always has its hostname"),
    ("pct set 101 -rootfs local:8", "pct resize 101 rootfs"),
    ("pct set 101", "nothing is to be set"),
    ("pct set 101 -memory lots", "'lots' is not a number of MiB"),
    ("pct set 101 -net0 bridge=vmbr0,colour=red", "'colour' is no key"),
    ("pct set 101 -net40 name=eth40", "they go to net31"),
    ("pct set 101 -t 1", "may be"),
    ("pct create 120 tiny -unprivileged 0", "no privileged containers"),
    ("pct create 120 fedora-41", "there are debian-12, tiny"),
    ("pct create 120 tiny -password", "no terminal"),
    ("pct create 120", "TEMPLATE is missing"),
    ("pct restore 120 a.tar -mp0 local:8,mp=/data", "its own mount points"),
    ("pct restore 120 a.tar -password x", "keeps the passwords"),
    ("pct clone 101 130 --target pve2", "sysctr copy 101 pve2"),
    ("pct resize 101 rootfs 4G", "only grows"),
    ("pct resize 101 mp1 +1G", "no volume of its own"),
    ("pct resize 101 rootfs huge", "not a size"),
    ("pct rollback 101 nosuch", "there is no snapshot nosuch"),
    ("pct exec 101", "no program"),
    ("pct start", "VMID is missing"),
    ("pct start 101 102", "one word too many"),
    ("pct start 101 --nope", "there is no option --nope"),
    ("pct strat 101", "did you mean `sysctr pct start`?"),
    ("pct", "no command is given"),
    ("vzdump", "no container is named"),
    ("vzdump 101 --all", "either containers or --all"),
    ("vzdump 101 --compress bzip2", "is none of"),
    ("vzdump 101 --storage nas", "--dumpdir DIR"),
    ("vzdump 101 --script /x", "no hook scripts"),
    ("vzdump 101 --pool prod", "--tag T"),
    ("vzdump 101 --node elsewhere", "this host is"),
    ("vzdump 101 --prune-backups keep=3", "no rule"),
    ("vzdump 101 --bwlimit 5M", "KiB a second"),
    ("vzdump --all --exclude 101 --dumpdir", "--dumpdir has no value"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "words"), REFUSED)
def test_what_has_no_equal_is_refused_and_nothing_is_run(ran, monkeypatch, capsys, typed, words):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert main(shlex.split(typed)) == 255
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.err.startswith(("sysctr: cannot ", "note: "))
    assert (shown.out, ran) == ("", [])


def test_what_has_no_effect_is_named(ran, capsys):
    assert main(shlex.split(
        "pct create 120 tiny -hostname web -features nesting=1 -startup order=2 -storage ceph -bwlimit 5 "
        "-cores 64 -ha-managed -hookscript local:snippets/x "
        "-net0 name=eth0,bridge=vmbr0,firewall=1,tag=5,ip=dhcp"
    )) == 0  # fmt: skip
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    for words in (
        "--bwlimit has no effect", "--ha-managed has no effect", "features.nesting has no effect",
        "net0.firewall has no effect", "net0.tag has no effect", "net0.bridge is not the same here",
        "startup has no effect", "hookscript has no effect", "cores has no effect: this host has 4",
        "there is no pool ceph here: the default one is used",
    ):  # fmt: skip
        assert sum(words in note for note in notes) == 1, (words, notes)
    assert len(notes) == 10
    assert ran == ["create web --id 120 --template tiny --net name=eth0,ip=managed"]


def test_a_password_is_neither_shown_nor_an_argument(stub, capsys):
    stub.routes["POST", "/1/containers"] = (202, {"task": stub.task("create", container=120)})
    assert main(["pct", "create", "120", "tiny", "-hostname", "web", "-password", "s3cret words"]) == 0
    shown = capsys.readouterr()
    assert "s3cret" not in shown.err + shown.out
    assert "--password-file -" in shown.err
    (body,) = [body for verb, _, _, body in stub.requests if verb == "POST"]
    assert (body["password"], body["id"], body["template"]) == ("s3cret words", 120, "tiny")


def test_a_file_becomes_a_template_first_unless_it_is_one(ran, tmp_path):
    archive = tmp_path / "alpine-rootfs.tar.xz"
    archive.touch()
    assert main(["pct", "create", "120", str(archive), "-hostname", "web"]) == 0
    assert ran == [
        f"template import {archive} --name alpine-rootfs",
        "create web --id 120 --template alpine-rootfs",
    ]
    # What begins like a template of ours is not that, if it is a file.
    (tmp_path / "debian-12-ours.tar.gz").touch()
    for name in ("debian-12-ours.tar.gz", "tiny.tar"):
        assert main(["pct", "create", "120", f"{tmp_path}/{name}", "-hostname", "web"]) == 0
    assert ran[2:] == [
        f"template import {tmp_path}/debian-12-ours.tar.gz --name debian-12-ours",
        "create web --id 120 --template debian-12-ours",
        "create web --id 120 --template tiny",
    ]


@pytest.mark.parametrize(("error", "code"), [(errors.WrongState("cannot start 101: x"), 255), (None, 0)])
def test_the_exit_code_is_that_of_proxmox(stub, error, code):
    stub.routes["POST", "/1/containers/101/start"] = error or (202, {"task": stub.task()})
    assert main(["pct", "start", "101"]) == code
    assert main(["start", "101"]) == (4 if error else 0)


def test_the_first_step_that_fails_is_the_last(stub, capsys):
    stub.routes["POST", "/1/containers/101/stop"] = errors.Busy("cannot stop 101: task 1 backs it up")
    assert main(["pct", "rollback", "101", "before"]) == 255
    assert [where for verb, where, _, _ in stub.requests if verb == "POST"] == ["/1/containers/101/stop"]
    assert "+ sysctr rollback" not in capsys.readouterr().err


# What is read by scripts


def out(capsys, *argv):
    assert main(["pct", *argv]) == 0
    return capsys.readouterr().out


def test_the_list_has_the_columns_of_pct(stub, capsys):
    task = {"id": "t1", "kind": "backup"}
    stub.routes["GET", "/1/containers"] = [
        stub.container(102, "web", state="stopped"), stub.container(101, "demo", state="frozen", task=task)
    ]  # fmt: skip
    assert out(capsys, "list") == (
        "VMID       Status     Lock         Name                \n"
        "101        running    backup       demo                \n"
        "102        stopped                 web                 \n"
    )
    stub.routes["GET", "/1/containers"] = []
    assert out(capsys, "list") == ""


def test_the_status_is_one_line_or_all_lines(stub, capsys):
    assert out(capsys, "status", "101") == "status: running\n"
    lines = out(capsys, "status", "101", "-verbose").splitlines()
    assert "vmid: 101" in lines
    assert "maxdisk: 8589934592" in lines
    assert lines == sorted(lines, key=lambda line: line.partition(":")[0])
    assert main(["pct", "status", "999"]) == 255


def test_the_configuration_is_printed_as_pct_prints_it(stub, capsys):
    facts = "arch: arm64\nostype: debian\nmemory: 1\n"
    stub.routes["GET", "/1/containers/101/pct"] = {"pct": facts, "notes": []}
    config = {
        "name": "demo", "template": "debian-12", "description": "Web: 100%", "onboot": True,
        "limits": {"memory": "512M", "pids": 99},
        "net": {"0": {"name": "eth0", "ip": "managed", "mac": "02:00:00:00:00:01"}},
        "mount": {"0": {"target": "/data"}, "3": {"target": "/x", "size": "1G", "pool": "fast", "name": "x"}},
        "environment": {"B": "2", "A": "1"},
    }  # fmt: skip
    stub.routes["GET", "/1/containers/101/config"] = {"config": config, "pending": [], "in_force": None}
    assert main(["pct", "config", "101"]) == 0
    shown = capsys.readouterr()
    assert shown.out == (
        "arch: arm64\ndescription: Web%3A 100%25%0A\nhostname: demo\nmemory: 512\n"
        "mp0: default:101-disk0,backup=1,mp=/data\nmp3: fast:101-x,backup=1,mp=/x,size=1G\n"
        "net0: bridge=sysctr0,hwaddr=02:00:00:00:00:01,ip=dhcp,name=eth0,type=veth\nonboot: 1\n"
        "ostype: debian\nrootfs: default:101\nunprivileged: 1\n"
        "lxc.environment.runtime: A=1\nlxc.environment.runtime: B=2\n"
    )
    assert shown.err == "note: pct has no words for limits.pids: `sysctr config 101` shows all\n"


def test_what_config_prints_can_be_set_again(ran, stub, capsys):
    shown = dict(line.split(": ", 1) for line in out(capsys, "config", "101").splitlines())
    assert shown["net0"].startswith("bridge=sysctr0,gw=10.0.3.1,")
    assert main(["pct", "set", "101", "-net0", shown["net0"], "-mp0", shown["mp0"]]) == 0
    assert ran == [
        "set 101 mount.0.target=/data mount.0.backup=true mount.0.read_only=true mount.0.size=4G "
        "net.0.name=eth0 net.0.ip=10.0.3.9/24 net.0.gateway=10.0.3.1 net.0.mac=02:00:00:00:00:01"
    ]
    assert "note: " not in capsys.readouterr().err
    assert main(["pct", "set", "101", "-mp0", "local:subvol-101-disk-1,mp=/data"]) == 0
    assert "note: mp0 keeps the volume that it has, disk0" in capsys.readouterr().err


def test_what_is_pending_has_both_values(stub, capsys):
    stub.routes["GET", "/1/containers/101/config"] = {
        "config": {"name": "demo", "init": "/bin/new", "mount": {"0": {"target": "/srv", "source": "/srv"}}},
        "pending": ["init", "mount.0.source", "mount.0.target", "environment.OLD"],
        "in_force": {"name": "demo", "init": "/bin/old", "environment": {"OLD": "1"}},
    }  # fmt: skip
    lines = out(capsys, "pending", "101").splitlines()
    assert [line for line in lines if not line.startswith("cur ")] == [
        "new entrypoint: /bin/new", "new mp0: /srv,mountoptions=nodev;nosuid,mp=/srv",
        "del lxc.environment.runtime: OLD=1",
    ]  # fmt: skip
    assert lines.index("new entrypoint: /bin/new") == lines.index("cur entrypoint: /bin/old") + 1
    assert {"cur hostname: demo", "cur rootfs: default:101", "cur unprivileged: 1"} <= set(lines)
    current = out(capsys, "config", "101", "--current").splitlines()
    assert {"entrypoint: /bin/old", "lxc.environment.runtime: OLD=1"} <= set(current)
    assert not [line for line in current if line.startswith("mp0")]
    assert "entrypoint: /bin/new" in out(capsys, "config", "101").splitlines()


def test_snapshots_are_a_tree_that_ends_at_the_present(stub, capsys, monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    stub.routes["GET", "/1/containers/101/snapshots"] = {
        "snapshots": [
            {"name": "first", "parent": "", "created": 0, "description": "one\ntwo"},
            {"name": "second", "parent": "first", "created": 86400, "description": ""},
            {"name": "other", "parent": "first", "created": 90000, "description": ""},
        ],
        "parent": "second",
    }  # fmt: skip
    lines = out(capsys, "listsnapshot", "101").splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["`->", "first"], ["`->", "second"], ["`->", "current"], ["`->", "other"]
    ]  # fmt: skip
    assert [line.index("`") for line in lines] == [0, 1, 2, 1]
    assert lines[0].endswith(" one")
    assert lines[1].endswith(" no-description")
    assert lines[2].endswith(" You are here!")
    words = zip(lines, ("one", "no-", "You", "no-"), strict=True)
    assert len({line.index(word) for line, word in words}) == 1


def test_the_disks_have_the_columns_of_pct(stub, capsys):
    assert [line.split() for line in out(capsys, "df", "101").splitlines()] == [
        ["MP", "Volume", "Size", "Used", "Avail", "Use%", "Path"],
        ["rootfs", "default:101", "8G", "1G", "7G", "12.5", "/"],
        ["mp0", "default:101-disk0", "4G", "1G", "3G", "25.0", "/data"],
    ]


def test_cpusets_are_those_of_the_inits(stub, capsys):
    stub.routes["GET", "/1/containers"] = [stub.container(pid=os.getpid()), stub.container(102, pid=None)]
    rule, line, last = out(capsys, "cpusets").splitlines()
    assert rule == last == "-" * len(rule)
    assert line.split() == ["101:", *map(str, sorted(os.sched_getaffinity(0)))]


def test_a_lock_is_a_task_and_is_named(stub, capsys):
    held = stub.container(task={"id": "t77", "kind": "backup"})
    stub.routes["GET", "/1/containers/101"] = {"container": held}
    assert main(["pct", "unlock", "101"]) == 255
    assert "sysctr task cancel t77" in capsys.readouterr().err


def test_running_backups_are_stopped(ran, stub):
    stub.routes["GET", "/1/tasks"] = lambda query, _: (
        [stub.task("backup", id="b1"), stub.task("start")] if query["state"] == "running" else []
    )
    assert main(["vzdump", "--stop"]) == 0
    assert ran == ["task cancel b1"]


def test_quiet_is_quiet(stub, capsys):
    stub.routes["POST", "/1/containers/101/backup"] = (202, {"task": stub.task("backup", result={})})
    assert main(["vzdump", "101", "--quiet", "1", "-mailto", "root", "-storage", "local"]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


# Help, completion, names


def test_the_help_is_a_table_and_each_subcommand_has_one(capsys):
    assert main(["pct", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in SUBCOMMANDS)
    assert main(["pct", "help", "set"]) == 0
    assert "--memory" in capsys.readouterr().out
    for name in SUBCOMMANDS:
        assert main(["pct", name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: sysctr pct {name}")
    assert main(["vzdump", "-h"]) == 0
    assert "--prune-backups" in capsys.readouterr().out


def test_no_option_is_in_two_lists_and_every_reason_is_one():
    for name, takes in {**SUBCOMMANDS, "vzdump": TAKES}.items():
        assert len(takes.names()) == len(set(takes.names())), name
        assert bool(takes.plan) + bool(takes.show) + bool(takes.reason) == (name != "vzdump"), name


def test_completion_knows_subcommands_and_numbers(stub, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "sysctr _words numbers" in script
    press = 'COMP_WORDS=(sysctr pct listsn); COMP_CWORD=2; _shtab_sysctr; printf %s "$COMPREPLY"'
    done = subprocess.run(["bash", "-c", f"{script}\n{press}"], capture_output=True, text=True, check=True)
    assert done.stdout == "listsnapshot"
    assert main(["_words", "numbers"]) == 0
    assert capsys.readouterr().out == "101\n102\n"


@pytest.mark.parametrize(("name", "code"), [("pct", 0), ("vzdump", 255), ("sysctr", 2)])
def test_a_link_stands_for_the_command_of_its_name(stub, name, code):
    script = f"import sys; sys.path.insert(0, {ROOT!r}); sys.argv[0] = '/usr/local/bin/{name}'; " \
        "from sysctr.cli import main; sys.exit(main())"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, "unlock", "101"],
        env={"SYSCTR_ROOT": stub.layout.root}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr


@given(
    st.sampled_from(["set", "create", "exec", "destroy", "start"]),
    st.lists(st.text(max_size=8) | st.sampled_from(["-net0", "--force", "--memory=1", "-", "--", "1"])),
)
def test_nothing_that_is_typed_is_read_as_anything_but_words_and_options(name, argv):
    takes = SUBCOMMANDS[name]
    try:
        typed = read("pct", name, takes, argv)
    except errors.SysctrError:
        return
    assert len(typed.words) == len(takes.words)
    assert set(typed.options) <= {*takes.names(), "net0"}
    count = len(typed.words) + len(typed.trailing) + sum(len(values) for values in typed.options.values())
    assert count <= 2 * len(argv)


def test_words_are_read_as_proxmox_reads_them():
    takes = SUBCOMMANDS["set"]
    typed = read("pct", "set", takes, ["101", "-DESCRIPTION", "-x", "--onboot", "-tags=a", "--tags", "b"])
    assert typed.options == {"description": ["-x"], "onboot": ["1"], "tags": ["a", "b"]}
    with pytest.raises(errors.UsageError, match="maybe' is one word too many"):
        read("pct", "set", takes, ["101", "-onboot", "maybe"])
    with pytest.raises(errors.UsageError, match="true or false"):
        read("pct", "set", takes, ["101", "--onboot=maybe"])
