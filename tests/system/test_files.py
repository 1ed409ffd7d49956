"""push, pull and passwd on real containers, running and stopped; nothing a rootfs holds leads to the host."""

import hashlib
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.node import Node
from tests.system.guests import create, inside, refused, shell
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "overlay", "veth", "nft", "busybox")]

_CONTENT = bytes(range(256)) * 500


@pytest.fixture(params=["running", "stopped"])
def container(request: pytest.FixtureRequest, shared_host: Node) -> str:
    """A new container in each of the two states."""
    return create(shared_host, start=request.param == "running")


def look(host: Node, name: str, script: str) -> str:
    """Return what a script prints inside; the container is started if it was stopped."""
    if host.state(name) == "stopped":
        host.run("start", name)
    return inside(host, name, script)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with an odd name, modes, a symlink and a hard link."""
    top = tmp_path / "tree"
    (top / "sub dir").mkdir(parents=True)
    (top / "sub dir" / "file\nof two lines").write_bytes(_CONTENT)
    (top / "script").write_text("#!/bin/sh\n")
    (top / "script").chmod(0o750)
    (top / "link").symlink_to("script")
    os.link(top / "script", top / "hard")
    (top / "empty").mkdir(mode=0o700)
    return top


def picture(top: Path) -> dict[str, tuple]:
    """Return kind and mode, owner and content of everything in a tree."""
    seen = {}
    for path in sorted(top.rglob("*")):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        seen[str(path.relative_to(top))] = (oct(status.st_mode), status.st_uid, status.st_gid, content)
    return seen


def test_a_file_goes_in_and_comes_back(shared_host: Node, container: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(_CONTENT)
    (tmp_path / "in").chmod(0o640)
    shared_host.run("push", str(tmp_path / "in"), f"{container}:/srv/renamed")
    shared_host.run("pull", f"{container}:/srv/renamed", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == _CONTENT
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640
    shared_host.run("push", str(tmp_path / "in"), f"{container}:/srv/")
    digest = hashlib.sha256(_CONTENT).hexdigest()
    assert look(shared_host, container, "sha256sum /srv/in").split()[0] == digest
    assert look(shared_host, container, "stat -c '%a %u %g' /srv/in") == "640 0 0"


def test_a_tree_goes_in_and_comes_back_with_modes_and_links(
    shared_host: Node, container: str, tree: Path, tmp_path: Path
) -> None:
    shared_host.run("push", str(tree), f"{container}:/srv")
    (tmp_path / "back").mkdir()
    shared_host.run("pull", f"{container}:/srv/tree", str(tmp_path / "back"))
    assert picture(tmp_path / "back" / "tree") == picture(tree)
    # The copy is root's on both sides, whoever owned the original.
    os.chown(tree / "script", 33, 33)
    shared_host.run("push", str(tree), f"{container}:/srv/again")
    assert look(shared_host, container, "stat -c '%a %u %h' /srv/again/script") == "750 0 2"


def test_owner_group_and_mode_are_chosen_by_options(
    shared_host: Node, container: str, tmp_path: Path
) -> None:
    (tmp_path / "page").write_text("x")
    page = str(tmp_path / "page")
    chosen = ["--user", "www-data", "--group", "tty", "--mode", "0604"]
    shared_host.run("push", *chosen, page, f"{container}:/srv/a")
    shared_host.run("push", "--user", "7", "--group", "8", page, f"{container}:/srv/b")
    listed = look(shared_host, container, "stat -c '%a %u %g' /srv/a /srv/b").split("\n")
    assert listed == ["604 33 5", "644 7 8"]
    refused(shared_host, 1, "no-such-user", "push", "--user", "no-such-user", page, f"{container}:/srv/c")


def test_the_order_of_pct_is_understood(shared_host: Node, container: str, tmp_path: Path) -> None:
    (tmp_path / "page").write_text("as pct\n")
    shared_host.run("push", container, str(tmp_path / "page"), "/srv/page", "--perms", "0600")
    shared_host.run("pull", container, "/srv/page", str(tmp_path / "back"))
    assert (tmp_path / "back").read_text() == "as pct\n"


def test_a_relative_path_is_below_the_home_of_root(shared_host: Node, container: str, tmp_path: Path) -> None:
    (tmp_path / "page").write_text("as scp\n")
    shared_host.run("push", str(tmp_path / "page"), f"{container}:notes")
    shared_host.run("push", str(tmp_path / "page"), f"{container}:")
    shared_host.run("push", container, str(tmp_path / "page"), "as-pct")
    assert look(shared_host, container, "cd /root; cat notes page as-pct") == "as scp\n" * 2 + "as scp"
    shared_host.run("pull", f"{container}:notes", str(tmp_path / "back"))
    assert (tmp_path / "back").read_text() == "as scp\n"
    refused(shared_host, 3, "/root/nothing", "pull", f"{container}:nothing", str(tmp_path))


def test_standard_input_and_output_are_dashes(shared_host: Node, container: str) -> None:
    shared_host.run("push", "-", f"{container}:/srv/piped", stdin=_CONTENT)
    assert shared_host.run("pull", f"{container}:/srv/piped", "-").stdout == _CONTENT


def test_what_is_not_there_is_an_error_and_leaves_nothing(
    shared_host: Node, container: str, tmp_path: Path
) -> None:
    (tmp_path / "page").write_text("x")
    refused(shared_host, 3, "/no/such", "push", "/no/such", f"{container}:/srv/")
    refused(shared_host, 3, "/no/such", "push", str(tmp_path / "page"), f"{container}:/no/such/file")
    done = refused(shared_host, 3, "/no/such", "pull", f"{container}:/no/such", str(tmp_path / "out"))
    assert done.err.startswith("sysctr: cannot pull /no/such: no such file or directory"), done
    assert not (tmp_path / "out").exists()
    refused(shared_host, 3, "nowhere", "push", str(tmp_path / "page"), "nowhere:/srv/")


def test_a_symlink_inside_never_leads_to_the_host(shared_host: Node, container: str, tmp_path: Path) -> None:
    """The container's root links its own paths to files of the host; both ways stay inside."""
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    os.chmod(tmp_path, 0o777)
    os.chmod(secret, 0o666)
    traps = tmp_path / "traps"
    traps.mkdir()
    (traps / "file").symlink_to(secret)
    (traps / "directory").symlink_to(tmp_path)
    (traps / "up").symlink_to("../../../../../../../../.." + str(tmp_path))
    shared_host.run("push", str(traps), f"{container}:/srv")
    for trap in ("file", "directory/secret", "up/secret"):
        shared_host.run("push", "-", f"{container}:/srv/traps/{trap}", stdin=b"of the guest", check=False)
        shared_host.run("pull", f"{container}:/srv/traps/{trap}", str(tmp_path / "out"), check=False)
        assert secret.read_text() == "of the host", trap
        assert not (tmp_path / "out").exists() or (tmp_path / "out").read_text() != "of the host", trap
    for directory in ("directory", "up"):
        shared_host.run("push", "-", f"{container}:/srv/traps/{directory}/new", stdin=b"x", check=False)
    assert sorted(os.listdir(tmp_path)) in (["secret", "traps"], ["out", "secret", "traps"])


def test_what_comes_out_of_a_hostile_tree_stays_below_the_destination(
    shared_host: Node, tmp_path: Path
) -> None:
    name = create(shared_host)
    shell(
        shared_host, name,
        "mkdir -p /srv/tree/a && cd /srv/tree && echo x > \"$(printf 'new\\nline')\" && "
        "echo x > \"$(printf '\\033[2Jclear')\" && echo x > \"$(printf '\\377bytes')\" && echo x > -rf && "
        "ln -s /etc a/etc && mkfifo a/fifo && echo x > a/suid && chmod 4755 a/suid && "
        "ln -s ../../../../../../.. a/up",
    )  # fmt: skip
    destination = tmp_path / "here"
    destination.mkdir()
    done = shared_host.run("pull", f"{name}:/srv/tree", str(destination), check=False)
    assert "\x1b" not in done.err + done.out
    assert os.listdir(tmp_path) == ["here"]
    top = destination / "tree"
    assert {os.fsencode(entry) for entry in os.listdir(top)} == {
        b"new\nline", b"\x1b[2Jclear", b"\xffbytes", b"-rf", b"a",
    }  # fmt: skip
    assert sorted(os.listdir(top / "a")) == ["etc", "suid", "up"], "pipes are left out, and told"
    assert (os.readlink(top / "a/etc"), os.readlink(top / "a/up")) == ("/etc", "../../../../../../..")
    assert (done.status, done.err.count("skipped")) == (1, 1), done
    assert not (top / "a" / "suid").stat().st_mode & stat.S_ISUID, "a setuid file of a guest is none here"


def test_a_guest_that_swaps_its_files_while_they_are_pulled_gains_nothing(
    shared_host: Node, tmp_path: Path
) -> None:
    """A directory that turns into a symlink to the host's root, over and over, during the copy."""
    (tmp_path / "marker").write_text("of the host")
    name = create(shared_host)
    swapping = f"while :; do mv d e; ln -s {tmp_path} d; rm d; mv e d; done"
    shell(shared_host, name, f"mkdir -p /srv/tree/d; cd /srv/tree; ({swapping}) >/dev/null 2>&1 </dev/null &")
    for number in range(10):
        destination = tmp_path / f"out{number}"
        destination.mkdir()
        shared_host.run("pull", f"{name}:/srv/tree", str(destination), check=False)
        found = [path for path in destination.rglob("*") if path.is_file() and not path.is_symlink()]
        assert found == []
    assert (tmp_path / "marker").read_text() == "of the host"


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Path]:
    """An archive as no client of ours writes it: members that climb, and links to climb by."""
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as out:
        for name, kind, link in (
            ("top", tarfile.SYMTYPE, "/"), ("../../../../../../tmp/sysctr-climbed", tarfile.REGTYPE, ""),
            ("/tmp/sysctr-absolute", tarfile.REGTYPE, ""),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            out.addfile(member)
    yield path
    for climbed in ("/tmp/sysctr-climbed", "/tmp/sysctr-absolute"):
        assert not os.path.exists(climbed)


def test_a_hostile_archive_unpacked_inside_stays_inside(shared_host: Node, hostile: Path) -> None:
    name = create(shared_host)
    shared_host.run("push", str(hostile), f"{name}:/srv/x.tar")
    shell(shared_host, name, "tar xf /srv/x.tar -C /srv", check=False)


def test_two_copies_into_a_stopped_container_do_not_meet(shared_host: Node, tmp_path: Path) -> None:
    name = create(shared_host, start=False)
    (tmp_path / "big").write_bytes(bytes(20 * 1024 * 1024))
    first = shared_host.popen("push", "-", f"{name}:/srv/first", stdin=-1)
    second = shared_host.popen("push", str(tmp_path / "big"), f"{name}:/srv/second")
    first.communicate(b"x", timeout=60)
    # The second may be told to try again, never anything worse.
    assert (first.returncode, second.wait(60)) in ((0, 0), (0, 4), (4, 0))
    wait_until(lambda: shared_host.run("start", name, check=False).status == 0, what="its files are free")


def test_files_on_their_way_hold_a_stopped_container(make_node: Callable[..., Node], tmp_path: Path) -> None:
    """Nobody starts, snapshots or rolls it back meanwhile, over a restart of the daemon too."""
    host = make_node("tiny")
    name = create(host, "--disk", "64M", start=False)
    host.run("snapshot", name, "before")
    (tmp_path / "big").write_bytes(_CONTENT * 80)
    host.run("push", str(tmp_path / "big"), f"{name}:/root/big")
    # More than a pipe holds: the copy waits for whoever reads it.
    pulling = host.popen("pull", f"{name}:/root/big", "-", stdout=subprocess.PIPE)
    assert pulling.stdout.read(1) == _CONTENT[:1]
    refused(host, 4, "(pull) is running", "snapshot", name, "between")
    host.run("daemon", "restart")
    for words in (("start", name), ("rollback", "--yes", name, "before")):
        refused(host, 4, "(push) is running", *words)
    assert pulling.stdout.read() == (_CONTENT * 80)[1:]
    assert pulling.wait(60) == 0
    # Its disk is let go of, and everything is possible again.
    host.run("rollback", "--yes", name, "before")
    # What the rollback replaced is deleted within that disk, in the background.
    mounts = Path("/proc/self/mounts")
    wait_until(lambda: f" {host.layout.run}/storage/" not in mounts.read_text(encoding="utf-8"))
    host.run("start", name)


def test_a_copy_is_ended_by_its_task(shared_host: Node, tmp_path: Path) -> None:
    name = create(shared_host, start=False)
    (tmp_path / "big").write_bytes(_CONTENT * 80)
    shared_host.run("push", str(tmp_path / "big"), f"{name}:/root/big")
    pulling = shared_host.popen(
        "pull", f"{name}:/root/big", "-", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert pulling.stdout.read(1) == _CONTENT[:1]
    running = [task for task in shared_host.json("task", "list") if task["kind"] == "pull"][-1]
    shared_host.run("task", "cancel", running["id"])
    shared_host.run("start", name)
    pulling.stdout.read()
    assert pulling.wait(60) == 1


def test_a_password_is_set_running_and_stopped(shared_host: Node, container: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("correct horse\n")
    shared_host.run("passwd", container, "--password-file", str(tmp_path / "secret"))
    shared_host.run("passwd", container, "--user", "www-data", "--stdin", stdin=b"battery staple\n")
    shadow = look(shared_host, container, "cat /etc/shadow").split("\n")
    hashes = {line.split(":")[0]: line.split(":")[1] for line in shadow}
    assert hashes["root"].startswith("$6$")
    assert hashes["www-data"].startswith("$6$")
    assert hashes["nobody"] == "*"
    assert look(shared_host, container, "stat -c %a /etc/shadow") == "600"
    salt = hashes["root"].split("$")[2]
    made = look(shared_host, container, f"mkpasswd -m sha512 -S {salt} 'correct horse'")
    assert made == hashes["root"]
    stranger = ["passwd", container, "--user", "nobody-here", "--stdin"]
    refused(shared_host, 1, "no user 'nobody-here'", *stranger, stdin=b"x\n")
    refused(shared_host, 2, "it is empty", "passwd", container, "--stdin", stdin=b"\n")
