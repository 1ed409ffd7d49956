"""Mount points of real containers: volumes, binds, shared ones, memory, devices; while they run too."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node import Node, TemplateStore, kill
from tests.system.guests import create, inside, new_name, refused, shell
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox")]

_MIB = 1024 * 1024


@pytest.fixture(scope="module")
def host(pytestconfig: pytest.Config, templates: TemplateStore, tmp_path_factory) -> Iterator[Node]:
    """A host with a second pool, `loops`, whose volumes have a size."""
    with Node(keep=pytestconfig.getoption("keep")) as one:
        templates.give(one, "tiny")
        one.run("pool", "add", "loops", "--driver", "loop", "--path", f"{one.root}/loops")
        yield one


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory of the host with a file of its user 1000; pytest's own directories let nobody in."""
    directory = tmp_path / "source"
    directory.mkdir()
    directory.chmod(0o755)
    (directory / "note").write_text("of the host\n")
    os.chown(directory / "note", 1000, 1000)
    return directory


def mounts(host: Node, ref: str) -> dict[str, dict]:
    """Return the mounts of a container by their keys, or kept volumes by their names."""
    return {row["key"] or row["volume"]: row for row in host.json("mount", "list", ref)}


def options(host: Node, ref: str, target: str) -> set[str]:
    """Return the options of what is mounted at a target, as the container sees them."""
    line = inside(host, ref, f"grep ' {target} ' /proc/mounts | tail -1")
    return set(line.split()[3].split(",")) if line else set()


@pytest.mark.parametrize("pool", ["default", "loops"])
def test_an_own_volume_lives_as_long_as_its_container(host: Node, pool: str) -> None:
    size = ",size=64M" if pool == "loops" else ""
    ref = create(host, "--mount", f"target=/data,pool={pool}{size}")
    shell(host, ref, "echo kept > /data/note && chown 7:8 /data/note && chmod 4755 /data/note")
    assert options(host, ref, "/data") >= {"rw", "nodev"}
    assert "nosuid" not in options(host, ref, "/data")
    number = host.json("info", ref)["id"]
    row = mounts(host, ref)["mount.0"]
    assert (row["source"], row["state"], row["kind"]) == (f"{pool}:{number}-disk0", "mounted", "volume")
    host.run("stop", ref, "--kill")
    host.run("start", ref)
    assert inside(host, ref, "cat /data/note; stat -c '%a %u %g' /data/note") == "kept\n4755 7 8"
    host.run("destroy", ref, "--force", "--yes")
    other = create(host, "--id", str(number), "--mount", f"target=/data,pool={pool}{size}")
    assert "note" not in inside(host, other, "ls -A /data")
    host.run("destroy", other, "--force", "--yes")


def test_a_volume_with_a_size_is_full_when_it_is_full(host: Node) -> None:
    ref = create(host, "--mount", "target=/data,pool=loops,size=32M")
    assert shell(host, ref, "dd if=/dev/zero of=/data/x bs=1M count=64", check=False).status != 0
    assert int(inside(host, ref, "stat -c %s /data/x")) < 32 * _MIB
    assert shell(host, ref, "dd if=/dev/zero of=/root/x bs=1M count=40", check=False).status == 0
    host.run("stop", ref, "--kill")
    host.run("set", ref, "mount.0.size=96M")
    host.run("start", ref)
    assert mounts(host, ref)["mount.0"]["size_bytes"] == 96 * _MIB
    assert shell(host, ref, "dd if=/dev/zero of=/data/x bs=1M count=64", check=False).status == 0
    host.run("destroy", ref, "--force", "--yes")


def test_a_bind_shows_the_hosts_directory_and_nobody_for_its_ids(host: Node, source: Path) -> None:
    ref = create(
        host, "--mount", f"source={source},target=/srv/deep/down", "--mount", f"{source}/note,mp=/note,ro"
    )
    assert (
        inside(host, ref, "cat /srv/deep/down/note; stat -c %u /srv/deep/down/note") == "of the host\n65534"
    )
    assert inside(host, ref, "cat /note") == "of the host"
    assert options(host, ref, "/srv/deep/down") >= {"rw", "nosuid", "nodev"}
    assert options(host, ref, "/note") >= {"ro", "nosuid", "nodev"}
    assert "Read-only" in shell(host, ref, "echo x > /note", check=False).err
    host.run("destroy", ref, "--force", "--yes")
    assert (source / "note").read_text() == "of the host\n"


def test_one_directory_shows_as_the_right_user_in_several_containers(host: Node, source: Path) -> None:
    os.chown(source, 1000, 1000)
    left = create(host, "--mount", f"source={source},target=/srv,idmap=1000=1000")
    right = create(host, "--mount", f"source={source},target=/srv,idmap=u:1000=0;g:1000=0")
    for ref, owner in ((left, "1000 1000"), (right, "0 0")):
        assert inside(host, ref, "stat -c '%u %g' /srv/note") == owner
    inside(host, right, "echo of the right > /srv/new")
    written = (source / "new").stat()
    assert (written.st_uid, written.st_gid) == (1000, 1000)
    assert inside(host, left, "cat /srv/new; stat -c %u /srv/new") == "of the right\n1000"
    # Ids that have no place on the host's side cannot own anything there.
    assert "too large" in shell(host, left, "touch /srv/roots", check=False).err
    for ref in (left, right):
        host.run("destroy", ref, "--force", "--yes")


def test_memory_has_its_size_and_is_empty_after_a_start(host: Node) -> None:
    ref = create(host, "--mount", "tmpfs,target=/scratch,size=1M,mode=700,noexec")
    assert options(host, ref, "/scratch") >= {"nosuid", "nodev", "noexec", "size=1024k", "mode=700"}
    assert shell(host, ref, "dd if=/dev/zero of=/scratch/x bs=1M count=2", check=False).status != 0
    host.run("stop", ref, "--kill")
    host.run("start", ref)
    assert inside(host, ref, "ls -A /scratch") == ""
    host.run("destroy", ref, "--force", "--yes")


@pytest.mark.parametrize("pool", ["default", "loops"])
def test_a_shared_volume_is_one_for_all_its_containers(host: Node, pool: str) -> None:
    name = new_name("media")
    line = f"volume={name},pool={pool}" + (",size=32M" if pool == "loops" else "")
    writer = create(host, "--mount", f"{line},target=/media")
    reader = create(host, "--mount", f"{line},target=/mnt/in,ro")
    inside(host, writer, "echo shared > /media/note && chown 7 /media/note")
    assert inside(host, reader, "cat /mnt/in/note; stat -c %u /mnt/in/note") == "shared\n7"
    assert options(host, reader, "/mnt/in") >= {"ro", "nosuid", "nodev"}
    refused(host, 5, "has it too", "mount", "remove", writer, "/media", "--delete")
    host.run("destroy", writer, "--force", "--yes")
    assert inside(host, reader, "cat /mnt/in/note") == "shared"
    host.run("stop", reader, "--kill")
    assert f"/{name} " not in Path("/proc/self/mounts").read_text()
    host.run("start", reader)
    assert inside(host, reader, "cat /mnt/in/note") == "shared"
    host.run("mount", "remove", reader, "/mnt/in", "--delete")
    assert name not in [volume["volume"] for volume in host.json("pool", "show", pool)["volumes"]]
    host.run("destroy", reader, "--force", "--yes")


def test_devices_work_inside_and_are_the_containers(host: Node) -> None:
    ref = create(host, "--device", "fuse", "--device", "/dev/full,target=/dev/sub/brim,mode=640,uid=3,gid=4")
    assert inside(host, ref, "stat -c '%F %t:%T %a %u' /dev/fuse") == "character special file a:e5 666 0"
    assert inside(host, ref, "exec 3<>/dev/fuse && echo opened") == "opened"
    assert inside(host, ref, "stat -c '%a %u %g' /dev/sub/brim") == "640 3 4"
    assert "No space" in shell(host, ref, "echo x > /dev/sub/brim", check=False).err
    host.run("mount", "add", ref, "--device", "tun")
    assert inside(host, ref, "exec 3<>/dev/net/tun && echo opened") == "opened"
    host.run("mount", "remove", ref, "/dev/fuse")
    assert inside(host, ref, "ls /dev/fuse 2>&1 || true").endswith("No such file or directory")
    host.run("destroy", ref, "--force", "--yes")
    assert stat.S_IMODE(os.stat("/dev/full").st_mode) == 0o666


def test_mounts_come_and_go_while_the_container_runs(host: Node, source: Path) -> None:
    ref = create(host)
    pid = host.json("info", ref)["pid"]
    lines = (
        f"source={source},target=/srv,ro", "target=/data", "target=/big,pool=loops,size=32M",
        "tmpfs,target=/scratch", f"volume={new_name('shared')},target=/media",
    )  # fmt: skip
    host.run("mount", "add", ref, *lines)
    rows = mounts(host, ref)
    assert {row["state"] for row in rows.values()} == {"mounted"}
    assert len(rows) == len(lines)
    assert host.json("config", ref, "--pending") == []
    assert (
        inside(host, ref, "cat /srv/note && echo 1 > /data/x && echo 2 > /big/x && echo 3 > /media/x") != ""
    )
    assert options(host, ref, "/srv") >= {"ro", "nosuid", "nodev"}
    host.run("reboot", ref)
    assert inside(host, ref, "cat /srv/note /data/x /big/x /media/x") == "of the host\n1\n2\n3"
    pid = host.json("info", ref)["pid"]
    for target in ("/srv", "/data", "/big", "/scratch", "/media"):
        host.run(
            "mount",
            "remove",
            ref,
            target,
            *(["--delete"] if target != "/srv" and target != "/scratch" else []),
        )
    assert mounts(host, ref) == {}
    assert (
        inside(host, ref, "grep -c -e /srv -e /data -e /big -e /scratch -e /media /proc/mounts || true")
        == "0"
    )
    assert host.json("info", ref)["pid"] == pid
    assert host.json("config", ref, "--pending") == []
    host.run("destroy", ref, "--force", "--yes")


def test_a_mount_of_a_frozen_container_does_not_wait_for_it(host: Node) -> None:
    ref = create(host)
    host.run("freeze", ref)
    host.run("mount", "add", ref, "tmpfs,target=/scratch", timeout_s=20)
    host.run("thaw", ref)
    assert "nodev" in options(host, ref, "/scratch")
    host.run("destroy", ref, "--force", "--yes")


def test_what_is_in_use_waits_and_says_why(host: Node) -> None:
    ref = create(host, "--mount", "target=/data")
    shell(host, ref, "cd /data && (sleep 300 >/dev/null 2>&1 </dev/null & echo $! > /root/pid)")
    done = host.run("mount", "remove", ref, "/data", "--delete")
    assert "pending until the next start" in done.out
    assert "busy" in done.err
    number = host.json("info", ref)["id"]
    assert mounts(host, ref)["mount.0"]["state"] == "leaving"
    assert host.json("config", ref, "--pending") == ["mount.0"]
    host.run("stop", ref, "--kill")
    assert mounts(host, ref) == {f"{number}-disk0": mounts(host, ref)[f"{number}-disk0"]}
    host.run("start", ref)
    assert inside(host, ref, "ls -A /data") == ""
    host.run("mount", "remove", ref, "disk0", "--delete")
    assert mounts(host, ref) == {}
    host.run("destroy", ref, "--force", "--yes")


def test_a_change_of_a_mounted_one_waits(host: Node, source: Path) -> None:
    ref = create(host, "--mount", f"source={source},target=/srv")
    host.run("set", ref, "mount.0.read_only=yes")
    assert host.json("config", ref, "--pending") == ["mount.0.read_only"]
    assert "rw" in options(host, ref, "/srv")
    host.run("reboot", ref)
    assert "ro" in options(host, ref, "/srv")
    host.run("destroy", ref, "--force", "--yes")


def test_a_mount_that_would_hide_another_waits(host: Node) -> None:
    ref = create(host, "--mount", "tmpfs,target=/a/b")
    inside(host, ref, "echo seen > /a/b/x")
    done = host.run("mount", "add", ref, "tmpfs,target=/a")
    assert "it would hide mount.0" in done.err
    assert inside(host, ref, "cat /a/b/x") == "seen"
    host.run("reboot", ref)
    assert len(options(host, ref, "/a")) > 1
    assert len(options(host, ref, "/a/b")) > 1
    assert {row["state"] for row in mounts(host, ref).values()} == {"mounted"}
    host.run("destroy", ref, "--force", "--yes")


def test_a_kept_volume_is_not_taken_by_the_next_mount(host: Node) -> None:
    ref = create(host, "--mount", "target=/data")
    inside(host, ref, "echo old > /data/x")
    number = host.json("info", ref)["id"]
    refused(host, 2, "--keep or --delete", "mount", "remove", ref, "/data")
    host.run("mount", "remove", ref, "/data", "--keep")
    assert mounts(host, ref)[f"{number}-disk0"]["state"] == "kept"
    host.run("mount", "add", ref, "target=/data")
    assert inside(host, ref, "ls -A /data") == ""
    assert mounts(host, ref)["mount.0"]["volume"] == f"{number}-disk1"
    host.run("mount", "add", ref, "target=/old,name=disk0")
    assert inside(host, ref, "cat /old/x") == "old"
    host.run("protect", ref)
    refused(host, 5, "protected", "mount", "remove", ref, "/old", "--delete")
    host.run("protect", "--off", ref)
    host.run("destroy", ref, "--force", "--yes")


def test_a_volume_that_is_gone_is_not_replaced_by_an_empty_one(host: Node) -> None:
    ref = create(host, "--mount", "target=/data,pool=loops,size=32M")
    number = host.json("info", ref)["id"]
    host.run("stop", ref, "--kill")
    volume = Path(f"{host.root}/loops/volumes/{number}-disk0")
    aside = volume.with_name("aside")
    volume.rename(aside)
    refused(host, 3, f"its volume {number}-disk0 is not in pool loops", "start", ref)
    aside.rename(volume)
    host.run("start", ref)
    host.run("destroy", ref, "--force", "--yes")


def test_files_are_pushed_into_the_volume_of_a_stopped_container(host: Node, tmp_path: Path) -> None:
    ref = create(host, "--mount", "target=/data", start=False)
    (tmp_path / "file").write_text("pushed\n")
    host.run("push", ref, str(tmp_path / "file"), "/data/file")
    host.run("start", ref)
    assert inside(host, ref, "cat /data/file") == "pushed"
    host.run("destroy", ref, "--force", "--yes")


def test_a_hand_edited_file_makes_what_it_asks_for_at_the_next_start(host: Node) -> None:
    ref = create(host, start=False)
    path = Path(host.json("info", ref)["config_file"])
    path.write_text(f'{path.read_text()}\n[mount.0]\ntarget = "/data"\n')
    host.run("start", ref)
    assert mounts(host, ref)["mount.0"]["state"] == "mounted"
    host.run("destroy", ref, "--force", "--yes")


def test_a_daemon_that_dies_leaves_every_mount_in_place(host: Node) -> None:
    name = new_name("media")
    ref = create(
        host, "--mount", f"volume={name},pool=loops,size=32M,target=/media", "--mount", "target=/data"
    )
    inside(host, ref, "echo 1 > /media/x && echo 2 > /data/x")
    kill(host.pids()["daemon"])
    assert {row["state"] for row in mounts(host, ref).values()} == {"mounted"}
    assert f"/{name} " in Path("/proc/self/mounts").read_text()
    host.run("reboot", ref)
    assert inside(host, ref, "cat /media/x /data/x") == "1\n2"
    host.run("stop", ref, "--kill")
    wait_until(lambda: f"/{name} " not in Path("/proc/self/mounts").read_text(), what="the end of a mount")
    host.run("mount", "remove", ref, "/media", "--delete")
    host.run("destroy", ref, "--yes")


def test_a_volume_with_layers_is_mounted_at_the_start_and_while_it_runs(host: Node) -> None:
    ref = create(host, "--mount", "target=/data")
    inside(host, ref, "echo before > /data/x && mkdir /data/dir && echo old > /data/dir/y")
    host.run("stop", ref, "--kill")
    host.run("snapshot", ref, "one")
    host.run("start", ref)
    assert inside(
        host, ref, "cat /data/x; findmnt -n -o FSTYPE /data || grep ' /data ' /proc/mounts"
    ).startswith("before\noverlay")
    assert options(host, ref, "/data") >= {"rw", "nodev"}
    inside(host, ref, "echo after > /data/x && rm -r /data/dir && echo new > /data/z")
    host.run("mount", "remove", ref, "/data", "--keep")
    host.run("mount", "add", ref, "target=/again,name=disk0")
    assert inside(host, ref, "cat /again/x /again/z; ls /again") == "after\nnew\nx\nz"
    inside(host, ref, "echo more > /again/more")
    host.run("mount", "remove", ref, "/again", "--keep")
    host.run("mount", "add", ref, "target=/look,name=disk0,ro")
    assert inside(host, ref, "cat /look/more; ls /look") == "more\nmore\nx\nz"
    assert "Read-only" in shell(host, ref, "touch /look/q", check=False).err
    host.run("stop", ref, "--kill")
    host.run("rollback", ref, "one", "--yes")
    host.run("start", ref)
    assert inside(host, ref, "cat /data/x /data/dir/y; ls /data") == "before\nold\ndir\nx"
    host.run("destroy", ref, "--force", "--yes")


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ("source=/no/such/place,target=/x", 3, "/no/such/place: no such file or directory"),
        ("source={link},target=/x", 5, "is a symlink"),
        ("source={link}/below,target=/x", 5, "is a symlink"),
        ("source={socket},target=/x", 5, "neither a directory nor a file"),
        ("source={fifo},target=/x", 5, "neither a directory nor a file"),
        ("source=/srv,target=/x,idmap=1000=65536", 2, "has the ids 0 to 65535"),
        ("target=/x,pool=nowhere", 3, "nowhere"),
    ],
)
def test_a_source_that_does_not_go_is_told_and_nothing_is_kept(
    host: Node, tmp_path: Path, line: str, status: int, words: str
) -> None:
    link, sock, fifo = tmp_path / "link", tmp_path / "socket", tmp_path / "fifo"
    (tmp_path / "below").mkdir()
    link.symlink_to(tmp_path)
    os.mkfifo(fifo)
    os.mknod(sock, 0o600 | stat.S_IFSOCK)
    spec = line.format(link=link, socket=sock, fifo=fifo)
    ref = create(host)
    refused(host, status, words, "mount", "add", ref, spec)
    assert mounts(host, ref) == {}
    name = new_name()
    refused(host, status, words, "create", name, "--template", "tiny", "--mount", spec)
    refused(host, 3, name, "info", name)
    host.run("destroy", ref, "--force", "--yes")


def test_two_on_one_target_are_refused(host: Node) -> None:
    ref = create(host, "--mount", "tmpfs,target=/x")
    refused(host, 2, "mount.0 is on /x already", "mount", "add", ref, "target=/x")
    assert list(mounts(host, ref)) == ["mount.0"]
    host.run("destroy", ref, "--force", "--yes")


def test_a_failed_hot_plug_leaves_nothing(host: Node) -> None:
    ref = create(host)
    inside(host, ref, "ln -s /etc /trap && echo file > /file")
    refused(
        host,
        1,
        "a symlink or a file is in the way of /trap/below",
        "mount",
        "add",
        ref,
        "target=/trap/below",
    )
    refused(host, 1, "a symlink or a file is in the way of /file", "mount", "add", ref, "target=/file")
    assert mounts(host, ref) == {}
    assert host.json("config", ref, "--pending") == []
    host.run("destroy", ref, "--force", "--yes")


@pytest.mark.needs("mmdebstrap", "net")
def test_debian_boots_with_every_kind_of_mount(debian_host: Node, source: Path) -> None:
    host = debian_host
    ref = create(
        host, "--mount", "target=/var/lib/data", "--mount", f"source={source},target=/srv/www,idmap=1000=33",
        "--mount", "tmpfs,target=/scratch", "--device", "fuse", template="debian-12",
    )  # fmt: skip
    host.wait(ref, "booted")
    assert inside(host, ref, "stat -c %U /srv/www/note") == "www-data"
    assert {row["state"] for row in mounts(host, ref).values()} == {"mounted"}
    host.run("mount", "add", ref, "target=/opt/more")
    # A service with a mount namespace of its own sees what is plugged in as well.
    assert inside(host, ref, "findmnt -n -o TARGET /opt/more") == "/opt/more"
    seen = "systemd-run --wait --pipe -q -p PrivateTmp=yes findmnt -n -o TARGET /opt/more"
    assert inside(host, ref, seen) == "/opt/more"
    assert (
        inside(host, ref, "systemctl is-system-running --wait || systemctl --failed --no-legend") == "running"
    )
    host.run("destroy", ref, "--force", "--yes")
