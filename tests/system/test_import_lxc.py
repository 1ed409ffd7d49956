"""Containers of Debian's LXC become ours: with the ids that they had inside, and LXC's own are only read."""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import foreign, rootfs
from tests.system.guests import inside, refused

pytestmark = [pytest.mark.root, pytest.mark.needs("lxc")]


@pytest.fixture(scope="module")
def busybox() -> str:
    path = rootfs.static_busybox()
    if path is None:
        pytest.skip("needs busybox: no static one (package busybox-static)")
    return path


@pytest.fixture(scope="module")
def lxc() -> Iterator[foreign.Lxc]:
    with foreign.open_directory() as directory, foreign.Lxc(str(directory)) as one:
        yield one


def fill(root: str, busybox: str, *, first: int) -> None:
    """Write a rootfs as LXC has it on the disk, with what is hard to carry over."""
    rootfs.write_tree(root, busybox)
    home = Path(root, "home")
    (home / "alice").write_text("alice's\n")
    (home / "hard").hardlink_to(home / "alice")
    (home / "link").symlink_to("/etc/passwd")
    with open(home / "sparse", "wb") as file:
        file.truncate(64 << 20)
    os.setxattr(home / "alice", "user.note", b"kept")
    os.chown(home / "alice", 1000, 33)
    os.utime(home / "alice", ns=(1_600_000_000_123_456_789,) * 2)
    if not first:
        return
    for directory, directories, names in os.walk(root):
        for path in (f"{directory}/{name}" for name in (*directories, *names)):
            status = os.lstat(path)
            if status.st_uid < first:
                os.lchown(path, status.st_uid + first, status.st_gid + first)
                if not os.path.islink(path):
                    os.chmod(path, status.st_mode & 0o7777)
    os.chown(root, first, first)
    os.setxattr(home / "alice", "user.note", b"kept")


def fingerprint(directory: str) -> str:
    """Return what changes when anything below a directory does."""
    argv = ["find", directory, "-printf", r"%P %U %G %m %s %T@ %C@ %l\0"]
    listed = subprocess.run(argv, check=True, capture_output=True).stdout
    return hashlib.sha256(b"\0".join(sorted(listed.split(b"\0")))).hexdigest()


@pytest.mark.parametrize("unprivileged", [True, False])
def test_a_container_of_lxc_boots_here_with_its_ids(shared_host, lxc, busybox, unprivileged) -> None:
    name = lxc.name("own" if unprivileged else "priv")
    mac = f"00:16:3e:00:00:{1 + unprivileged:02x}"
    settings = [
        "lxc.start.auto = 1", "lxc.environment = COLOUR=blue", "lxc.cgroup2.memory.max = 128M",
        "lxc.net.0.type = veth", "lxc.net.0.link = nosuchbr0", f"lxc.net.0.hwaddr = {mac}",
        "lxc.net.0.name = eth0", "lxc.mount.entry = /srv mnt none bind,ro 0 0",
        "lxc.hook.pre-start = /root/hook", "lxc.include = /etc/own.conf",
    ]  # fmt: skip
    root = lxc.define(name, settings, unprivileged=unprivileged)
    fill(root, busybox, first=foreign.FIRST_ID if unprivileged else 0)
    before = fingerprint(f"{lxc.directory}/{name}")
    done = shared_host.run("import", "lxc", name, "--lxcpath", lxc.directory, "--start")
    assert fingerprint(f"{lxc.directory}/{name}") == before
    assert "with its identity" in done.out
    assert "it shows" not in done.err
    assert "left out: lxc.mount.entry: it mounts '/srv' at '/mnt' (--allow bind)" in done.err
    assert "note: lxc.hook.pre-start: sysctr runs no hook scripts" in done.err
    assert "what '/etc/own.conf' says was not looked at" in done.err
    assert ("it was privileged" in done.err) is not unprivileged
    shown = shared_host.json("info", name)
    assert (shown["onboot"], shown["limits"]["memory"]) == (True, "128M")
    assert shown["nets"][0]["mac"] == mac
    assert shown["environment"] == {"COLOUR": "blue"}
    script = "cd /home; cat alice; stat -c '%u %g %h %Y' alice; readlink link; stat -c '%u %g' /bin/busybox; "
    assert inside(shared_host, name, f"{script} du -k sparse; hostname").split() == [
        "alice's", "1000", "33", "2", "1600000000", "/etc/passwd", "0", "0", "0", "sparse", name,
    ]  # fmt: skip
    shared_host.run("set", name, "onboot=false")
    shared_host.run("stop", name, "--kill")
    # A second one beside it is no second with its cards.
    twin = shared_host.run("import", "lxc", name, "--lxcpath", lxc.directory)
    assert "with an identity of its own" in twin.out
    assert shared_host.json("info", f"{name}-2")["nets"][0]["mac"] != mac


def test_what_lxc_create_makes_boots_here(shared_host, lxc, busybox) -> None:
    name = lxc.name("made")
    lxc.run("lxc-create", "-n", name, "-t", "busybox")
    done = shared_host.run("import", "lxc", name, "--lxcpath", lxc.directory, "--start")
    # Its template shows the host's libraries to a busybox that needs none.
    assert "it mounts '/usr/lib' at '/usr/lib' (--allow bind)" in done.err
    assert "/dev/shm" not in done.err
    assert inside(shared_host, name, "id -u; hostname").split() == ["0", name]
    assert "mounts" not in shared_host.run("config", name).out
    shared_host.run("stop", name, "--kill")


def test_a_running_one_is_refused_until_it_is_stopped(shared_host, lxc, busybox, tmp_path) -> None:
    name = lxc.name("runs")
    root = lxc.define(name, ["lxc.net.0.type = empty", "lxc.signal.halt = SIGINT"])
    fill(root, busybox, first=foreign.FIRST_ID)
    lxc.start(name)
    done = refused(shared_host, 4, "it is running", "import", "lxc", name, "--lxcpath", lxc.directory)
    assert "lxc-stop" in done.err
    lxc.run("lxc-stop", "-n", name, "-k")
    # Where they are may be a link, and what lxc-snapshot made stays there.
    os.makedirs(f"{lxc.directory}/{name}/snaps/snap0")
    link = tmp_path / "lxc"
    link.symlink_to(lxc.directory)
    config = Path(lxc.directory, name, "config")
    config.write_text(config.read_text().replace(lxc.directory, str(link)))
    done = shared_host.run("import", "lxc", name, "--lxcpath", f"{link}/./", "--name", "ran", "--unique")
    assert "snapshots stay behind" in done.err
    assert shared_host.json("info", "ran")["nets"] == []


def test_an_owner_that_is_nobody_inside_is_refused(shared_host, lxc, busybox) -> None:
    name = lxc.name("ids")
    root = lxc.define(name, [])
    fill(root, busybox, first=foreign.FIRST_ID)
    os.chown(f"{root}/home/alice", foreign.FIRST_ID + 70_000, foreign.FIRST_ID)
    done = refused(shared_host, 5, "home/", "import", "lxc", "-q", name, "--lxcpath", lxc.directory)
    assert f"belongs to {foreign.FIRST_ID + 70_000}:{foreign.FIRST_ID} on this host" in done.err
    assert name not in shared_host.run("list").out
    os.chown(f"{root}/home/alice", foreign.FIRST_ID, 0)
    whose = f"belongs to {foreign.FIRST_ID}:0"
    refused(shared_host, 5, whose, "import", "lxc", "-q", name, "-P", lxc.directory)


def test_what_is_no_container_of_lxc_is_refused_with_the_reason(shared_host, lxc, busybox, tmp_path) -> None:
    def taken(status: int, words: str, name: str, *more: str) -> None:
        refused(shared_host, status, words, "import", "lxc", "-q", name, "--lxcpath", lxc.directory, *more)

    taken(3, "there is no", "gone")
    taken(2, "has no such name", "../../etc")
    for number, (path, words) in enumerate(
        {
            "overlay:/a:/b": "only directories (dir:) are read", "dir:/nosuch": "no such file",
            f"dir:{tmp_path}/link": "is no directory", "": "names no lxc.rootfs.path",
        }.items()
    ):
        name = lxc.name(f"bad{number}")
        lxc.define(name, [f"lxc.rootfs.path = {path}"])
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to("/")
        taken({"only": 2, "name": 2, "is n": 5}.get(words[:4], 1), words, name)
    name = lxc.name("users")
    lxc.define(name, [])
    os.chown(f"{lxc.directory}/{name}", 1000, 1000)
    taken(5, "belongs to another user than root", name)
