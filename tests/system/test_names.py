"""Nonsense from users and hostile templates: a clear error with the right status, and nothing left behind."""

import io
import os
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests import rootfs
from tests.node import CHECKOUT, Node
from tests.system.guests import create, inside, new_name, refused

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "overlay", "veth", "nft", "busybox")]

_NAMES = ["", "UPPER", "a_b", "-a", "a-", "a\nb", "a/b", "..", "a b", "x" * 64, "123", "ä", "a.b", "\x1b[2J"]
_OPTIONS = {
    "a size": ["--memory", "lots"], "a negative size": ["--memory=-1M"],
    "no size": ["--memory", ""],
    "a size beyond all": ["--memory", "99999999999P"], "cores": ["--cores", "none"],
    "no core": ["--cores", "0"],
    "a range": ["--cores", "3-1"], "cpu": ["--cpu", "fast"], "not a number": ["--cpu", "nan"],
    "pids": ["--pids", "0"], "many pids": ["--pids", "1e3"],
    "a MAC": ["--net", "name=eth0,mac=02:00:00"],
    "a group MAC": ["--net", "name=eth0,mac=03:00:00:00:00:01"],
    "a NIC's name": ["--net", "name=much-too-long-for-a-nic"], "a path as NIC": ["--net", "name=a/b"],
    "two NICs of one name": ["--net", "name=eth0", "--net", "name=eth0"],
    "an address": ["--net", "name=eth0,ip=300.1.1.1/24"], "no prefix": ["--net", "name=eth0,ip=10.0.0.1"],
    "IPv6 nonsense": ["--net", "name=eth0,ip=::g/64"], "a gateway elsewhere": [
        "--net", "name=eth0,ip=10.9.9.2/24,gateway=10.9.8.1"
    ],
    "an MTU": ["--net", "name=eth0,mtu=1"], "a NIC's key": ["--net", "name=eth0,colour=red"],
    "no key": ["--net", "eth0,"], "a tag": ["--tag", "a b"], "an empty tag": ["--tag", ""],
    "a variable": ["--env", "A B=c"], "no variable": ["--env", "A"],
    "a variable's line": ["--env", "A=b\nC=d"],
    "an id": ["--id", "x"], "a low id": ["--id", "99"], "a high id": ["--id", "10000"],
    "a key": ["--set", "no.such=1"], "a description": ["--set", "description=two\nlines"],
    "an init": ["--set", "init=relative"], "a signal": ["--set", "stop_signal=SIGNONSENSE"],
    "a missing ssh key": ["--ssh-key", "/no/such/key"], "a ssh key": ["--ssh-key", "/etc/hostname"],
    "a password file": ["--password-file", "/no/such/file"],
}  # fmt: skip


@pytest.mark.parametrize("name", _NAMES, ids=repr)
def test_a_name_that_is_none_is_refused(shared_host: Node, name: str) -> None:
    before = shared_host.json("list")
    done = refused(shared_host, 2, "cannot", "create", "--template", "tiny", "--", name)
    assert "\x1b" not in done.err
    assert shared_host.json("list") == before


@pytest.mark.parametrize("what", _OPTIONS)
def test_a_value_that_is_none_is_refused_and_leaves_nothing(shared_host: Node, what: str) -> None:
    name = new_name("bad")
    done = refused(shared_host, 2, "", "create", name, "--template", "tiny", *_OPTIONS[what])
    assert done.err.startswith("sysctr: cannot "), done
    assert len(done.err.splitlines()) <= 3, done
    refused(shared_host, 3, name, "info", name)


def test_nothing_of_what_was_refused_was_reserved(shared_host: Node) -> None:
    assert shared_host.json("list") == []
    number = shared_host.json("info", create(shared_host, start=False))["id"]
    assert number == 100
    assert os.listdir(f"{shared_host.layout.pool}/volumes") == ["100"]
    shared_host.run("destroy", "--yes", "100")


@pytest.mark.parametrize(
    "ref",
    ["nowhere", "9999", "0", "-1", "a b", "../100", "\n", "ä", "x" * 300],
    ids=lambda ref: repr(ref[:9]),
)
def test_a_container_that_is_not_there_is_not_found(shared_host: Node, ref: str) -> None:
    for command in (["info"], ["start"], ["stop"], ["config"], ["destroy", "--yes"], ["logs"]):
        done = shared_host.run(*command, "--", ref, check=False)
        assert done.status in (2, 3), done
        assert done.err.startswith("sysctr: cannot "), done


def test_templates_that_are_not_there_are_not_found(shared_host: Node) -> None:
    refused(shared_host, 3, "nothing", "create", new_name(), "--template", "nothing")
    refused(shared_host, 2, "", "create", new_name(), "--template", "../tiny")
    refused(shared_host, 3, "nothing", "template", "show", "nothing")
    refused(shared_host, 3, "nothing", "template", "remove", "nothing")
    refused(shared_host, 3, "/no/such.tar", "template", "import", "/no/such.tar")
    done = shared_host.run("template", "build", "nothing", check=False)
    assert done.status in (2, 3), done


def test_a_command_that_does_not_exist_names_the_nearest(shared_host: Node) -> None:
    done = refused(shared_host, 2, "no such command", "strat")
    assert "sysctr start" in done.err
    done = refused(shared_host, 2, "no such command", "template", "lst")
    assert "sysctr template list" in done.err
    refused(shared_host, 2, "--nonsense", "list", "--nonsense")


def test_who_is_not_root_is_told_so(tmp_path: Path) -> None:
    """As nobody, from a copy of the checkout that nobody can read, where no daemon runs."""
    copy = Path("/tmp") / f"sysctr-copy-{os.getpid()}"
    shutil.copytree(CHECKOUT / "sysctr", copy / "sysctr", ignore=shutil.ignore_patterns("__pycache__"))
    try:
        done = subprocess.run(
            ["/usr/bin/python3", "-c", "from sysctr.cli import main; raise SystemExit(main())", "list"],
            user=65534, group=65534, extra_groups=[], cwd=copy, capture_output=True, text=True, check=False,
            env={"SYSCTR_ROOT": f"{copy}/root", "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    finally:
        shutil.rmtree(copy)
    assert done.returncode in (5, 6), done.stderr
    assert done.stderr.startswith("sysctr: cannot "), done.stderr
    assert "root" in done.stderr, done.stderr


def test_a_template_of_a_tarball_boots(shared_host: Node, tmp_path: Path) -> None:
    path = str(tmp_path / "Small_Box-1.tar.gz")
    archive = rootfs.write_tarball(path, rootfs.static_busybox(), compression="gz")
    shared_host.run("template", "import", archive)
    shown = shared_host.json("template", "show", "small_box-1")
    assert (shown["os_id"], shown["used_by"]) == ("busybox", [])
    name = create(shared_host, template="small_box-1")
    assert inside(shared_host, name, "cat /etc/os-release | head -1") == "ID=busybox"
    assert [entry["name"] for entry in shared_host.json("template", "list")] == ["small_box-1", "tiny"]
    refused(shared_host, 4, name, "template", "remove", "small_box-1")
    refused(shared_host, 4, "small_box-1", "template", "import", archive)
    shared_host.run("destroy", "--yes", "--force", name)
    shared_host.run("template", "remove", "small_box-1")
    assert [entry["name"] for entry in shared_host.json("template", "list")] == ["tiny"]


def _without(*gone: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [entry for entry in rootfs.entries(rootfs.static_busybox()) if entry[0].name not in gone]


def _member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", data: bytes = b"") -> tuple:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size, member.mode = kind, target, len(data), 0o755
    return member, data


def _foreign_init() -> bytes:
    """Return the head of a program for BPF, which no machine of ours is."""
    return b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, 0xF7) + bytes(100)


_BAD = {
    "no init": (lambda: _without("./sbin/init"), "/sbin/init"),
    "a dangling init": (
        lambda: [*_without("./sbin/init"), _member("./sbin/init", tarfile.SYMTYPE, "/no/such")], "/sbin/init",
    ),
    "an init of another architecture": (
        lambda: [*_without("./sbin/init"), _member("./sbin/init", data=_foreign_init())], "is a program for",
    ),
    "an init that is text": (
        lambda: [*_without("./sbin/init"), _member("./sbin/init", data=b"hello")], "is not a program",
    ),
    "dev a symlink": (
        lambda: [*_without("./dev"), _member("./dev", tarfile.SYMTYPE, "/tmp")], "/dev is a symlink",
    ),
    "proc a symlink": (
        lambda: [*_without("./proc"), _member("./proc", tarfile.SYMTYPE, "etc")], "/proc is a symlink",
    ),
    "sys a file": (lambda: [*_without("./sys"), _member("./sys", data=b"x")], "/sys is not a directory"),
    "empty": (lambda: _without()[:1], "/sbin/init"),
}  # fmt: skip


@pytest.mark.parametrize("kind", _BAD)
def test_a_rootfs_that_cannot_boot_is_refused_and_leaves_nothing(
    shared_host: Node, tmp_path: Path, kind: str
) -> None:
    entries, words = _BAD[kind]
    with tarfile.open(tmp_path / "bad.tar", "w") as out:
        for member, data in entries():
            out.addfile(member, io.BytesIO(data) if member.isreg() else None)
    before = shared_host.json("template", "list")
    layers = sorted(os.listdir(f"{shared_host.layout.pool}/layers"))
    done = refused(shared_host, 1, words, "template", "import", str(tmp_path / "bad.tar"))
    assert "cannot" in done.err
    assert sorted(os.listdir(f"{shared_host.layout.pool}/layers")) == layers
    assert shared_host.json("template", "list") == before


def test_an_archive_that_is_none_or_is_cut_is_refused(shared_host: Node, tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("not an archive\n" * 1000)
    whole = rootfs.write_tarball(str(tmp_path / "whole.tar.gz"), rootfs.static_busybox(), compression="gz")
    (tmp_path / "cut.tar.gz").write_bytes(Path(whole).read_bytes()[:100_000])
    for name in ("text.tar", "cut.tar.gz"):
        before = shared_host.json("template", "list")
        done = shared_host.run("template", "import", str(tmp_path / name), check=False)
        assert done.status in (1, 2), done
        assert done.err.startswith("sysctr: cannot "), done
        assert shared_host.json("template", "list") == before


def test_missing_mount_points_of_a_rootfs_are_made(shared_host: Node, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bare.tar", "w") as out:
        for member, data in _without("./dev", "./proc", "./sys", "./run"):
            out.addfile(member, io.BytesIO(data) if member.isreg() else None)
    shared_host.run("template", "import", str(tmp_path / "bare.tar"))
    name = create(shared_host, template="bare")
    assert inside(shared_host, name, "cat /run/host/container-manager") == "lxc"
    shared_host.run("destroy", "--yes", "--force", name)
    shared_host.run("template", "remove", "bare")


def test_what_a_guest_puts_in_the_way_of_a_mount_is_not_followed(shared_host: Node, tmp_path: Path) -> None:
    """The container's root replaces /dev and others by symlinks: the next start says no, or copes."""
    for target in ("/dev", "/proc", "/sys", "/run", "/etc/hostname", "/etc"):
        name = create(shared_host)
        replace = f"mv .{target} .{target}.old; ln -s {tmp_path} .{target}"
        inside(shared_host, name, f"mkdir /below && mount --bind / /below && cd /below && {replace}")
        shared_host.run("stop", "--kill", name)
        done = shared_host.run("start", name, check=False)
        assert done.status in (0, 1), done
        assert done.status == 0 or "cannot start" in done.err, done
        assert os.listdir(tmp_path) == [], target
        shared_host.run("destroy", "--yes", "--force", name)


def test_the_names_of_hostile_guests_do_not_reach_the_terminal(shared_host: Node) -> None:
    name = create(shared_host, "--set", "description=quiet")
    inside(shared_host, name, "hostname $(printf 'a\\033[2Jb')")
    for command in (["list"], ["info", name], ["status", name], ["config", name]):
        assert b"\x1b" not in shared_host.run(*command).stdout
