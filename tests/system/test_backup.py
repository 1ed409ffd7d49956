"""Backup and restore on every storage driver: what goes into an archive comes out of it, all of it."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sysctr.storage.drivers import open_driver
from tests.node import Node, TemplateStore
from tests.storage import check_debian, shown
from tests.system.guests import inside, refused, shell
from tests.system.pools import Kept
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox", "loop")]

_SECOND_NS = 1_000_000_000
_ODD_NAMES = ("--exclude=x", "a\nb", "tar: x: y", "back\\slash", "ü" * 100, "x" * 255, " ", "@@7", "[a]*?")
# u::rw-, u:1000:r--, g::r--, m::rw-, o::---
_ACL = bytes.fromhex(
    "02000000" "01000600ffffffff" "02000400e8030000" "04000400ffffffff" "10000600ffffffff" "20000000ffffffff"
)
# cap_net_raw=ep
_CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")


@pytest.fixture(autouse=True)
def _empty(kept: Kept) -> Iterator[None]:
    yield
    assert kept.leftovers() == []
    kept.host.run("destroy", "--all", "--yes", "--force")
    backups = Path(kept.host.layout.backups)
    assert not list(backups.glob("*.dat"))
    assert not list(Path(kept.host.layout.backup_runs).glob("*.partial"))
    shutil.rmtree(backups, ignore_errors=True)


def archive_of(kept: Kept, ref: str, *options: str) -> str:
    """Back a container up and return the path of the archive."""
    before = {one["path"] for one in kept.host.json("backups")}
    kept.host.run("backup", ref, *options)
    (made,) = {one["path"] for one in kept.host.json("backups")} - before
    return made


@contextlib.contextmanager
def tree(kept: Kept, ref: str, *, write: bool = False) -> Iterator[str]:
    """Show the files of a stopped container with the host's eyes."""
    info = kept.host.json("info", ref)
    driver = open_driver(kept.kind, kept.directory, kept.host.layout.pool_run(kept.pool))
    if not write:
        with driver.opened(info["volume"]) as root, shown(root) as directory:
            yield directory
        return
    with shown(driver.activate(info["volume"])) as directory:
        yield directory
    driver.deactivate(info["volume"])


def fill(directory: str) -> None:
    """Make a file of every kind, with everything that a file can have."""
    place = f"{directory}/srv/all"
    os.makedirs(place)
    for number, name in enumerate(_ODD_NAMES):
        Path(place, name).write_text(name)
        os.chown(f"{place}/{name}", 1000 + number, 65534)
    for mode in (0o4755, 0o2711, 0o000, 0o640):
        Path(place, f"mode-{mode:o}").write_text("x")
        os.chmod(f"{place}/mode-{mode:o}", mode)
    os.mkdir(f"{place}/sticky")
    os.chmod(f"{place}/sticky", 0o1777)
    with open(f"{place}/sparse", "wb") as file:
        file.write(b"first")
        file.seek(40 << 20)
        file.write(b"last")
        file.truncate(50 << 20)
    os.mkfifo(f"{place}/fifo", 0o600)
    os.symlink("/nowhere/at all", f"{place}/link")
    os.symlink("x" * 4000, f"{place}/long-link")
    os.link(f"{place}/sparse", f"{place}/sticky/sparse-again")
    os.link(f"{place}/link", f"{place}/sticky/link-again", follow_symlinks=False)
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(place)  # a socket's path has 107 bytes
        try:
            listening.bind("socket")
        finally:
            os.chdir(here)
    Path(place, "attributes").write_text("x")
    os.setxattr(f"{place}/attributes", "user.note", b"\x00\xff\n=")
    os.setxattr(f"{place}/attributes", "system.posix_acl_access", _ACL)
    os.setxattr(f"{place}/sticky", "user.note", b"of a directory")
    os.setxattr(f"{place}/sticky", "system.posix_acl_default", _ACL)
    Path(place, "capable").write_text("x")
    os.setxattr(f"{place}/capable", "security.capability", _CAPABILITY)
    os.utime(f"{place}/attributes", ns=(0, 1234567890 * _SECOND_NS + 987654321))
    os.utime(f"{place}/link", ns=(0, 7 * _SECOND_NS + 1), follow_symlinks=False)
    os.utime(f"{place}/sticky", ns=(0, 3 * _SECOND_NS + 999999999))


def differences(left: str, right: str) -> list[str]:
    """Return what rsync would change to make `right` what `left` is: contents, owners, links, times, all."""
    done = subprocess.run(
        [
            "rsync", "-aHAXn", "--numeric-ids", "--checksum", "--delete", "--itemize-changes",
            "--modify-window=-1", f"{left}/", f"{right}/",
        ],
        capture_output=True, text=True, errors="replace", check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.parametrize("codec", ["zstd", "gzip", "lzo", "none"])
def test_everything_that_a_file_can_have_comes_back(kept: Kept, codec: str, tmp_path: Path) -> None:
    ref = kept.create()
    number = kept.host.json("info", ref)["id"]
    with tree(kept, ref, write=True) as directory:
        fill(directory)
    before = tmp_path / "before"
    with tree(kept, ref) as directory:
        # Without the window rsync leaves a time alone that differs by less than a second.
        copy = ["rsync", "-aHAX", "--sparse", "--modify-window=-1", f"{directory}/", f"{before}/"]
        subprocess.run(copy, check=True)
    # Sockets have no content, and no archive has them; who listens makes it again.
    (before / "srv/all/socket").unlink()
    info = kept.host.json("info", ref)
    archive = archive_of(kept, ref, "--compress", codec)
    log_text = Path(archive.partition(".tar")[0] + ".log").read_text()
    assert "left out: ./srv/all/socket: socket ignored" in log_text
    assert "NOT KEPT" not in log_text
    assert kept.host.run("backup", "verify", archive).status == 0
    kept.host.run("destroy", ref, "--yes")
    kept.host.run("restore", archive, "--pool", kept.pool)
    after = kept.host.json("info", ref)
    # What nobody else has any more, it still is.
    assert (after["id"], after["uuid"], after["nets"][0]["mac"]) == (
        number, info["uuid"], info["nets"][0]["mac"]
    )  # fmt: skip
    with tree(kept, ref) as directory:
        # The time of a directory whose socket is gone is that of its going.
        os.utime(before / "srv/all", ns=(0, os.stat(f"{directory}/srv/all").st_mtime_ns))
        assert differences(str(before), directory) == []
        assert os.stat(f"{directory}/srv/all/sparse").st_blocks < 1000
    kept.host.run("start", ref)
    assert inside(kept.host, ref, "echo on") == "on"


def test_an_archive_is_what_vzdump_writes(kept: Kept, tmp_path: Path) -> None:
    ref = kept.create("--memory", "64M", "--set", kept.mount(0, "/srv/data"), start=True)
    shell(kept.host, ref, "echo in > /srv/data/file; mkdir -p /tmp/x; touch /tmp/x/y /root/z")
    archive = archive_of(
        kept, ref, "--compress", "none", "--notes", "of {{guestname}}", "--protected", "--exclude", "/tmp/*",
        "--exclude", "z",
    )  # fmt: skip
    number = kept.host.json("info", ref)["id"]
    name = os.path.basename(archive)
    assert name.startswith(f"vzdump-lxc-{number}-2")
    assert Path(f"{archive}.notes").read_text() == f"of {ref}"
    assert Path(f"{archive}.protected").read_bytes() == b""
    listed = subprocess.run(
        ["tar", "--list", "--verbose", "--numeric-owner", "--file", archive],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    names = [line.split(maxsplit=5)[5] for line in listed]
    assert names[:4] == ["./etc/vzdump/pct.conf", "./etc/vzdump/pct.fw", "./dev/.sysctr.json", "./"]
    assert {line.split()[1] for line in listed} == {"0/0"}
    assert names.index("./srv/data/file") > names.index("./root/")
    assert "./srv/data/" in names
    assert "./tmp/" in names
    assert not [one for one in names if one.startswith("./tmp/x") or one.endswith("/z")]
    with tarfile.open(archive) as members:
        pct = members.extractfile("./etc/vzdump/pct.conf").read().decode()
    assert f"hostname: {ref}\n" in pct
    assert "memory: 64\n" in pct
    assert "unprivileged: 1\n" in pct
    assert re.search("^mp0: .*backup=1,mp=/srv/data,size=", pct, re.MULTILINE)
    # The command that Proxmox extracts with leaves nothing of what is ours alone (proxmox.md 2.5).
    (tmp_path / "out").mkdir()
    with open(archive, "rb") as file:
        subprocess.run(
            [
                "tar", "xpf", "-", "--totals", "--one-file-system", "-p", "--sparse", "--numeric-owner",
                "--acls", "--xattrs", "--xattrs-include=user.*", "--xattrs-include=security.capability",
                "--warning=no-file-ignored", "--warning=no-xattr-write", "-C", str(tmp_path / "out"),
                "--skip-old-files", "--anchored", "--exclude", "./dev/*",
            ],
            stdin=file, capture_output=True, check=True,
        )  # fmt: skip
    assert (tmp_path / "out/srv/data/file").read_text() == "in\n"
    assert not (tmp_path / "out/dev/.sysctr.json").exists()
    refused(kept.host, 5, "protected", "backup", "remove", archive)
    refused(kept.host, 2, "is not a variable of notes", "backup", ref, "--notes", "{{who}}")
    kept.host.run("backup", "protect", "--off", archive)


@pytest.mark.parametrize("mode", ["snapshot", "suspend", "stop"])
def test_a_running_container_is_backed_up_and_runs_on(kept: Kept, mode: str) -> None:
    ref = kept.create("--set", kept.mount(0, "/srv"), start=True)
    shell(kept.host, ref, "echo one > /root/file; echo two > /srv/file; sync")
    before = kept.host.json("info", ref)
    archive = archive_of(kept, ref, "--mode", mode)
    after = kept.host.json("info", ref)
    assert after["state"] == "running"
    assert (after["pid"] == before["pid"]) == (mode != "stop")
    assert kept.names(ref) == []
    copy = kept.host.run("restore", archive, "--pool", kept.pool, "--start", "-q").out.strip()
    assert inside(kept.host, copy, "cat /root/file /srv/file") == "one\ntwo"
    # Beside the original: nothing of its identity.
    other = kept.host.json("info", copy)
    assert other["uuid"] != after["uuid"]
    assert other["name"] == f"{ref}-2"
    assert other["nets"][0]["mac"] != after["nets"][0]["mac"]


def test_a_restore_in_place_keeps_what_the_container_is(kept: Kept) -> None:
    ref = kept.create("--set", kept.mount(0, "/srv"), "--set", "mount.1=target=/keep,size=64M,backup=no",
                      start=True)  # fmt: skip
    shell(kept.host, ref, "echo then > /root/file; echo then > /srv/file; echo then > /keep/file")
    archive = archive_of(kept, ref)
    shell(kept.host, ref, "echo now > /root/file; echo now > /srv/file; echo now > /keep/file")
    before = kept.host.json("info", ref)
    refused(kept.host, 4, "--force", "restore", archive, str(before["id"]))
    for _ in range(2):  # and once more, over what was restored
        kept.host.run("restore", archive, str(before["id"]), "--force")
        after = kept.host.json("info", ref)
        assert after["state"] == "running"
        assert [after[key] for key in ("uuid", "name", "addresses", "idmap")] == [
            before[key] for key in ("uuid", "name", "addresses", "idmap")
        ]
        assert after["nets"][0]["mac"] == before["nets"][0]["mac"]
        assert inside(kept.host, ref, "cat /root/file /srv/file /keep/file") == "then\nthen\nnow"
        shell(kept.host, ref, "echo now > /root/file; echo now > /srv/file")
    volumes = [name for name in kept.volumes() if name.startswith(str(before["id"]))]
    assert len(volumes) == 3
    # The new volumes are a container's like any other.
    kept.host.run("snapshot", ref, "s") if kept.kind != "loop" else None
    kept.host.run("reboot", ref)
    assert inside(kept.host, ref, "cat /root/file") == "now"


def test_what_an_archive_wants_of_the_host_is_asked_for_by_name(kept: Kept, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of the host")
    os.chmod(tmp_path, 0o755)
    ref = kept.create("--set", f"mount.0=source={tmp_path},target=/mnt/host", "--device", "fuse")
    archive = archive_of(kept, ref)
    done = kept.host.run("restore", archive, "--pool", kept.pool, "--name", "without", "--start")
    assert re.search(r"left out: mount\.0.*--allow bind", done.err)
    assert re.search(r"left out: device\.0.*--allow device", done.err)
    assert kept.host.json("info", "without")["mounts"] == []
    allowed = ("--allow", "bind,device")
    kept.host.run("restore", archive, "--pool", kept.pool, "--name", "with", *allowed, "--start")
    assert inside(kept.host, "with", "cat /mnt/host/file; ls /dev/fuse") == "of the host/dev/fuse"
    # What the replaced container has of the host already, it may have again.
    number = kept.host.json("info", ref)["id"]
    assert "left out" not in kept.host.run("restore", archive, str(number), "--force").err


def test_an_archive_goes_through_pipes(kept: Kept, tmp_path: Path) -> None:
    ref = kept.create(start=True)
    shell(kept.host, ref, "head -c 3000000 /dev/urandom > /root/file")
    digest = inside(kept.host, ref, "sha256sum /root/file")
    environment = kept.host.environment(None)
    with open(tmp_path / "archive", "wb") as out:
        subprocess.run(kept.host.argv("backup", ref, "--stdout", "--compress", "gzip"), stdout=out,
                       env=environment, check=True)  # fmt: skip
    with open(tmp_path / "archive", "rb") as archive:
        subprocess.run(
            kept.host.argv("restore", "-", "--name", "piped", "--pool", kept.pool, "--set", "limits.pids=99",
                           "--start"),
            stdin=archive, env=environment, check=True, capture_output=True,
        )  # fmt: skip
    assert inside(kept.host, "piped", "sha256sum /root/file") == digest
    assert kept.host.json("info", "piped")["limits"]["pids"] == 99
    assert kept.host.json("backups") == []


def test_all_containers_of_a_lost_host_come_back_as_they_were(kept: Kept, tmp_path: Path) -> None:
    refs = [kept.create(), kept.create()]
    for ref in refs:
        kept.write(ref, "/root/file", ref)
    kept.host.run("backup", refs[0], "--dir", str(tmp_path))
    kept.write(refs[0], "/root/file", f"{refs[0]} later")
    before = {ref: kept.host.json("info", ref) for ref in refs}
    kept.host.run("backup", "--all", "--dir", str(tmp_path))
    kept.host.run("destroy", "--all", "--yes")
    kept.host.run("restore", "--all", str(tmp_path), "--pool", kept.pool)
    assert kept.read(refs[0], "/root/file") == f"{refs[0]} later"
    assert kept.read(refs[1], "/root/file") == refs[1]
    for ref in refs:
        after = kept.host.json("info", ref)
        assert [after[key] for key in ("id", "uuid", "nets")] == [
            before[ref][key] for key in ("id", "uuid", "nets")
        ]
    done = kept.host.run("restore", "--all", str(tmp_path))
    assert "not restored, it is here" in done.err


def test_a_container_can_be_used_while_its_archive_is_written(kept: Kept, tmp_path: Path) -> None:
    ref = kept.create(start=True)
    shell(kept.host, ref, "head -c 6000000 /dev/urandom > /root/big; echo then > /root/file")
    # More than fits into all pipes on the way: it is being written until somebody reads it.
    writing = kept.host.popen("backup", ref, "--stdout", "--compress", "none", stdout=subprocess.PIPE)

    def archiving() -> bool:
        tasks = kept.host.api("GET", "/1/tasks?state=running")[1]["tasks"]
        return any((one["kind"], one["step"]) == ("backup", "archiving") for one in tasks)

    wait_until(archiving, what="the archive to be written")
    refused(kept.host, 4, "(backup) is running", "backup", ref)
    shell(kept.host, ref, "echo now > /root/file")
    kept.host.run("stop", ref)
    refused(kept.host, 4, "(backup) is running", "destroy", ref, "--yes")
    kept.host.run("start", ref)
    assert inside(kept.host, ref, "cat /root/file") == "now"
    archive = tmp_path / "archive.tar"
    archive.write_bytes(writing.stdout.read())
    writing.stdout.close()
    assert writing.wait(timeout=60) == 0
    assert kept.names(ref) == []
    copy = kept.host.run("restore", str(archive), "--pool", kept.pool, "--start", "-q").out.strip()
    assert inside(kept.host, copy, "cat /root/file") == "then"


@pytest.mark.slow
@pytest.mark.needs("mmdebstrap", "net")
def test_a_copy_of_debian_boots_with_an_identity_of_its_own(
    templates: TemplateStore, kept: Kept, tmp_path: Path
) -> None:
    if kept.kind != "overlay":
        pytest.skip("one driver is enough: the archive is the same")
    templates.give(kept.host, "debian-12")
    kept.host.run("create", "deb", "--template", "debian-12", "--start")
    kept.host.wait("deb", "booted")
    archive = archive_of(kept, "deb", "--compress", "gzip")
    kept.host.run("restore", archive, "--name", "copy", "--start")
    check_debian(kept.host, "copy")

    def identity(ref: str) -> list[str]:
        return inside(kept.host, ref, "cat /etc/machine-id /etc/ssh/ssh_host_ed25519_key.pub").splitlines()

    assert not set(identity("deb")) & set(identity("copy"))
    number = kept.host.json("info", "deb")["id"]
    before = identity("deb")
    kept.host.run("restore", archive, str(number), "--force")
    kept.host.wait("deb", "booted")
    assert identity("deb") == before
    assert json.loads(kept.host.run("info", "deb", "--json").out)["state"] == "running"


def test_of_a_plain_rootfs_a_container_is_made(kept: Kept, tmp_path: Path) -> None:
    if kept.kind == "loop":
        pytest.skip("an image needs a size, which a plain rootfs does not have")
    host: Node = kept.host
    ref = kept.create()
    archive = archive_of(kept, ref, "--compress", "none")
    plain = tmp_path / "my-rootfs.tar"
    (tmp_path / "root").mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", tmp_path / "root", "--exclude=./dev/*",
                    "--exclude=./etc/vzdump"], check=True)  # fmt: skip
    subprocess.run(["tar", "-cf", plain, "-C", tmp_path / "root", "."], check=True)
    host.run("restore", str(plain), "--pool", kept.pool, "--start")
    assert inside(host, "my-rootfs", "ip -4 -o addr show eth0 | wc -l") == "1"
