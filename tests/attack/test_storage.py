"""Storage against a hostile root (security.md S1, S8, S16, S31, S40): what lies on disk stays the host's."""

import contextlib
import ctypes
import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sysctr.engine import trees
from sysctr.errors import SysctrError
from sysctr.linux import mount
from sysctr.storage.base import RootSpec, Tree
from tests.attack.inside import Inside, init_pid, inside
from tests.kernel.conftest import jobs  # noqa: F401 - a fixture
from tests.node import Node, TemplateStore
from tests.system.guests import create, new_name, shell
from tests.system.guests import inside as output
from tests.system.pools import Kept, host_keeping
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox", "loop")]

# The kernel refuses what it does not freeze after 10 s; all else that a snapshot does is over in a moment.
_FREEZE_LIMIT_S = 40


@pytest.fixture
def box(shared_host: Node) -> Iterator[str]:
    """A running container of the attacker's with a volume of its own, which no overlay stands before."""
    ref = create(shared_host, "--mount", "target=/own")
    yield ref
    shared_host.run("destroy", ref, "--force", "--yes")


def own_volume(host: Node, ref: str) -> Path:
    """Return where the host has the files of the volume that `box` mounts on /own."""
    number = host.json("info", ref)["id"]
    (upper,) = Path(f"{host.layout.pool}/uppers").glob(f"{number}-disk0.*")
    return upper / "rootfs"


# What overlay's marks in a guest's own files may do


def seen(host: Node, ref: str) -> list[str]:
    """Return what there is on /own; the kernel refuses files with marks that it does not know here."""
    return shell(host, ref, "find /own 2>/dev/null", check=False).out.split("\n")[:-1]


def test_marks_of_an_overlay_bring_nothing_foreign_up(shared_host: Node, box: str) -> None:
    """Written past any overlay, then mounted as a layer: the template's and the host's files stay away."""
    host = shared_host
    output(host, box, "mkdir -p /own/a /own/b /own/c; echo own > /own/a/file; echo hidden > /own/c/file")

    def plant() -> list[str]:
        for name, value in {
            "redirect": b"/../../../../etc",
            "metacopy": b"",
            "origin": b"\x00\xfb\x1d\x00\x01" + bytes(24),
            "opaque": b"x",
            "whiteouts": b"y",
            "protattr": b"i",
            "uuid": bytes(16),
            "verity": b"",
        }.items():
            for place in ("/own/a", "/own/a/file", "/own/c", "/own"):
                with contextlib.suppress(OSError):
                    os.setxattr(place, f"user.overlay.{name}", value)
        os.setxattr("/own/b", "user.overlay.redirect", b"../a")
        os.setxattr("/own/c/file", "user.overlay.whiteout", b"")
        os.mknod("/own/gone", stat.S_IFCHR, 0)
        return sorted(os.listxattr("/own/b"))

    assert inside(init_pid(host, box), plant) == ["user.overlay.redirect"]
    host.run("snapshot", box, "one")
    host.run("stop", box, "--kill")
    host.run("snapshot", box, "two")
    host.run("start", box)
    allowed = {"/own", "/own/a", "/own/a/file", "/own/b", "/own/c", "/own/c/file", "/own/gone"}
    assert set(seen(host, box)) <= allowed
    host.run("rollback", box, "one", "--yes")
    assert set(seen(host, box)) <= allowed


def test_marks_set_through_an_overlay_are_no_marks_of_it(shared_host: Node, box: str) -> None:
    def plant() -> None:
        os.makedirs("/root/marked")
        for directory in ("/root/marked", "/etc"):
            for name in ("opaque", "redirect"):
                with contextlib.suppress(OSError):
                    os.setxattr(directory, f"user.overlay.{name}", b"y")

    before = output(shared_host, box, "ls /etc")
    inside(init_pid(shared_host, box), plant)
    shared_host.run("restart", box, "--kill", check=False)
    assert output(shared_host, box, "ls /etc") == before
    number = shared_host.json("info", box)["id"]
    for upper in Path(f"{shared_host.layout.pool}/uppers").glob(f"{number}.*"):
        for directory in ("etc", "root/marked"):
            if (upper / "rootfs" / directory).exists():
                assert "user.overlay.redirect" not in os.listxattr(upper / "rootfs" / directory)


# A container that does not hold still


def _storm() -> None:
    """Swap directories and links to the host's files, and make what is hard to copy, for ever."""
    os.makedirs("/own/pit/real", exist_ok=True)
    Path("/own/pit/real/shadow").write_text("own\n")
    os.symlink("../../../../../../../../../../etc", "/own/pit/link")
    os.mkfifo("/own/fifo")
    os.truncate(os.open("/own/sparse", os.O_RDWR | os.O_CREAT), 1 << 40)
    for number in range(1000):
        os.link("/own/pit/real/shadow", f"/own/pit/{number}")
    grown = os.open("/own/grows", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for turn in itertools.count():
        with contextlib.suppress(OSError):
            os.rename("/own/pit/real", "/own/pit/aside")
            os.rename("/own/pit/link", "/own/pit/real")
            os.write(grown, bytes(4096))
            os.rename("/own/pit/real", "/own/pit/link")
            os.rename("/own/pit/aside", "/own/pit/real")
        if turn % 1000 == 0:
            os.ftruncate(grown, 0)


def test_a_snapshot_of_a_storm_holds_nothing_of_the_host(shared_host: Node, box: str) -> None:
    host = shared_host
    with Inside(init_pid(host, box), _storm):
        wait_until(lambda: (own_volume(host, box) / "grows").exists())
        for name in ("one", "two"):
            began_s = time.monotonic()
            done = host.run("snapshot", box, name, check=False, timeout_s=120)
            assert time.monotonic() - began_s < _FREEZE_LIMIT_S
            assert done.status == 0 or f"cannot snapshot {box}" in done.err, done
            assert host.state(box) == "running"
    number = host.json("info", box)["id"]
    secret = Path("/etc/shadow").read_bytes()
    for upper in Path(f"{host.layout.pool}/uppers").glob(f"{number}-disk0.*/rootfs"):
        for path in upper.rglob("*"):
            if stat.S_ISREG(path.lstat().st_mode) and path.name != "sparse":
                assert not secret or secret not in path.read_bytes()
        assert (upper / "sparse").lstat().st_blocks < 1 << 20
    output(host, box, "rm -rf /own/*")


@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="no /dev/fuse here")
def test_a_process_that_cannot_be_frozen_holds_nobody_up(shared_host: Node) -> None:
    """One waits for a FUSE file system that never answers: nothing hangs on it but what goes there."""
    host = shared_host
    ref = create(host, "--device", "fuse")

    def hang() -> None:
        os.makedirs("/mnt/hung")
        fd = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other"
        mount.mount("none", "/mnt/hung", "fuse", 0, options)
        if os.fork() == 0:
            Path("/root/ready").write_text(str(os.getpid()))
            os.stat("/mnt/hung/x")
        while True:
            signal.pause()

    with Inside(init_pid(host, ref), hang):
        wait_until(
            lambda: shell(host, ref, "grep State:.D /proc/$(cat /root/ready)/status", check=False).status == 0
        )
        began_s = time.monotonic()
        done = host.run("snapshot", ref, "one", check=False)
        assert done.status == 0 or "cannot freeze" in done.err, done
        assert output(host, ref, "echo on") == "on"
        done = host.run("mount", "add", ref, "tmpfs,target=/mnt/hung/x", check=False)
        assert done.status == 1
        assert "it was not done within" in done.err
        assert time.monotonic() - began_s < _FREEZE_LIMIT_S
        host.run("mount", "add", ref, "tmpfs,target=/root/x")
        host.run("stop", ref, "--kill", timeout_s=30)
    host.run("destroy", ref, "--yes")


def test_a_pause_ends_even_if_every_file_is_held(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease keeps the one who copies waiting for 45 s, and a container has as many as it likes."""
    monkeypatch.setattr(trees, "_LONGEST_PAUSE_S", 1)
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    file = tmp_path / "source" / "held"
    file.write_text("old\n")
    worker = trees.TreeWorker(request.getfixturevalue("jobs"))
    source = RootSpec((Tree("source", f"{tmp_path}/source", read_only=True),))
    worker.copy(source, f"{tmp_path}/target")
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        with open(file, "r+") as held:
            held.write("new\n")
            held.flush()
            fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            began_s = time.monotonic()
            with pytest.raises(SysctrError, match="took more than 1 s"):
                worker.copy(source, f"{tmp_path}/target", changed_since_s=0)
            assert time.monotonic() - began_s < 20
    finally:
        signal.signal(signal.SIGIO, before)


def test_no_depth_and_no_name_stops_the_host(shared_host: Node, box: str) -> None:
    """A copy that cannot be made is an error; constant-time actions and deletion do not care."""
    host = shared_host

    def dig() -> None:
        os.chdir("/own")
        name = "\x1b]0;a\x07\n" + "x" * 240
        for _ in range(2000):
            os.mkdir(name)
            os.chdir(name)

    inside(init_pid(host, box), dig)
    done = host.run("snapshot", box, "one", check=False)
    assert done.status == 0 or f"cannot snapshot {box}" in done.err, done
    assert output(host, box, "echo on") == "on"
    host.run("stop", box, "--kill")
    host.run("snapshot", box, "two")
    host.run("clone", box, "deep-copy")
    host.run("destroy", "deep-copy", "--yes")


# Calls on the file system that containers share with the host


_IOCTLS = {
    "FS_IOC_FSSETXATTR": (0x401C5820, struct.pack("=5I8x", 0, 0, 0, 4711, 0)),  # another project
    "FIFREEZE": (0xC0045877, bytes(4)),
    "FITHAW": (0xC0045878, bytes(4)),
    "FITRIM": (0xC0185879, struct.pack("=3Q", 0, 2**64 - 1, 0)),
    "FS_IOC_SHUTDOWN": (0x8004587D, struct.pack("=I", 2)),
    "FS_IOC_SETFSLABEL": (0x41009432, b"owned".ljust(256, b"\0")),
    "EXT4_IOC_SETFSUUID": (0x4008662C, struct.pack("=2I", 16, 0) + bytes(16)),
    "EXT4_IOC_SWAP_BOOT": (0x6611, b""),
    "EXT4_IOC_RESIZE_FS": (0x40086610, struct.pack("=Q", 1 << 20)),
    "EXT4_IOC_GROUP_EXTEND": (0x40086607, struct.pack("=Q", 1 << 20)),
    "EXT4_IOC_CHECKPOINT": (0x4004662B, struct.pack("=I", 1)),
    "EXT4_IOC_SET_TUNE_SB_PARAM": (0x40E8662E, bytes(232)),
    "BTRFS_IOC_RESIZE": (0x50009403, bytes(8) + b"1:-16m".ljust(4088, b"\0")),
    "BTRFS_IOC_ADD_DEV": (0x5000940A, bytes(8) + b"/dev/loop0".ljust(4088, b"\0")),
    "BTRFS_IOC_RM_DEV": (0x5000940B, bytes(8) + b"1".ljust(4088, b"\0")),
    "BTRFS_IOC_BALANCE_V2": (0xC4009420, bytes(1024)),
    "BTRFS_IOC_SCRUB": (0xC400941B, bytes(1024)),
    "BTRFS_IOC_TREE_SEARCH": (0xD0009411, bytes(4096)),
    "BTRFS_IOC_SEND": (0x40489426, bytes(72)),
    "BTRFS_IOC_INO_PATHS": (0xC0389423, bytes(56)),
    "BTRFS_IOC_LOGICAL_INO": (0xC0389424, bytes(56)),
    "BTRFS_IOC_ENCODED_READ": (0x80809440, bytes(128)),
    "BTRFS_IOC_SET_FEATURES": (0x40309439, struct.pack("=6Q", 0, 0, 1, 0, 0, 1)),
    "BTRFS_IOC_DEV_REPLACE": (0xCA289435, bytes(2600)),
}  # fmt: skip


def _calls() -> list[str]:
    """As the container's root, without the filter of system calls; return what was not refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.makedirs("/root/d", exist_ok=True)
    fd = os.open("/root/f", os.O_RDWR | os.O_CREAT)
    os.write(fd, bytes(65536))
    got = []
    for name, (number, argument) in _IOCTLS.items():
        for place in (fd, os.open("/root/d", os.O_RDONLY)):
            try:
                fcntl.ioctl(place, number, bytearray(argument or bytes(8)), True)
                got.append(name)
            except OSError as error:
                if error.errno not in (
                    errno.EPERM, errno.ENOTTY, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF
                ):  # fmt: skip
                    got.append(f"{name}: {error.strerror}")
    for bit in (0x10, 0x20, 0x4000):  # immutable, append only, journal its data
        flags = bytearray(8)
        fcntl.ioctl(fd, 0x80086601, flags, True)
        try:
            fcntl.ioctl(fd, 0x40086602, struct.pack("=Q", struct.unpack("=Q", flags)[0] | bit))
            got.append(f"flag {bit:#x}")
        except OSError:
            pass
    for kind in (0, 1, 2):  # quotactl_fd(2), number 443: Q_SETQUOTA, Q_QUOTAON, Q_QUOTAOFF
        for command in (0x800008, 0x800002, 0x800003):
            if libc.syscall(443, fd, command << 8 | kind, 0, bytes(72)) == 0:
                got.append(f"quotactl {command:#x}")
    return sorted(set(got))


@pytest.fixture(scope="module", params=["overlay", "loop", "btrfs"])
def kept(
    request: pytest.FixtureRequest, templates: TemplateStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kept]:
    """A host for each storage driver."""
    with host_keeping(request.param, templates, tmp_path_factory.mktemp(request.param)) as one:
        yield one


def test_no_call_on_its_files_reaches_the_file_system(kept: Kept) -> None:
    ref = kept.create("--disk", "128M", *mount_option(kept), start=True)
    assert inside(init_pid(kept.host, ref), _calls) == []
    output(kept.host, ref, "echo on > /root/f")
    kept.host.run("destroy", ref, "--force", "--yes")


def mount_option(kept: Kept) -> tuple[str, str]:
    return ("--mount", f"target=/own{',size=64M' if kept.kind == 'loop' else ''}")


def _eat() -> dict:
    """Take as much of the disk as there is, in ways that are easily forgotten; return what was got."""
    got = {"blocks": 0, "deleted": 0, "attributes": 0}
    held = []
    for turn in range(4):  # written, deleted, and still open
        with contextlib.suppress(OSError):
            held.append(os.open(f"/root/held-{turn}", os.O_RDWR | os.O_CREAT))
            os.unlink(f"/root/held-{turn}")
            while got["deleted"] < 1 << 30:
                got["deleted"] += os.write(held[-1], os.urandom(1 << 20))
    with contextlib.suppress(OSError):
        for number in range(200_000):
            fd = os.open(f"/root/x-{number}", os.O_RDWR | os.O_CREAT)
            os.close(fd)
            os.setxattr(f"/root/x-{number}", "user.much", os.urandom(3000))
            got["attributes"] += 3000
    with contextlib.suppress(OSError):
        fd = os.open("/root/holes", os.O_RDWR | os.O_CREAT)
        for block in range(0, 1 << 30, 8192):
            os.pwrite(fd, os.urandom(4096), block)
            got["blocks"] += 4096
        os.fsync(fd)
    return got


def test_a_limit_holds_whatever_the_room_is_taken_with(kept: Kept) -> None:
    ref = kept.create("--disk", "128M", start=True)
    before = os.statvfs(kept.directory)
    with Inside(init_pid(kept.host, ref), _eat) as eater:
        got = eater.result(timeout_s=120)
    os.sync()
    after = os.statvfs(kept.directory)
    assert got["deleted"] > 32 << 20, got
    assert sum(got.values()) < 400 << 20, got
    if kept.kind != "overlay":  # its pool is the disk that all tests share
        assert (before.f_bfree - after.f_bfree) * after.f_frsize < 200 << 20, got
    output(kept.host, ref, "echo on")
    kept.host.run("destroy", ref, "--force", "--yes")


# Copies of what leads out


def test_what_is_made_of_a_container_never_follows_its_links(shared_host: Node, tmp_path: Path) -> None:
    """Templates and clones are cleaned of an identity, in directories that the attacker made into links."""
    host = shared_host
    ref = create(host)
    for name in ("log", "machine-id", "hostname", "x.gz"):
        (tmp_path / name).write_text("the host's\n")

    def lead_out() -> None:
        for place in ("/var/log", "/tmp", "/root", "/etc"):
            shutil.rmtree(place, ignore_errors=True)
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.symlink("../" * 10 + str(tmp_path)[1:], place)

    inside(init_pid(host, ref), lead_out)
    host.run("template", "create", ref, "evil")
    done = host.run("clone", ref, "led-out", check=False)
    assert done.status == 0 or "/etc" in done.err, done
    host.run("create", "of-evil", "--template", "evil")
    host.run("start", "of-evil", check=False)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("log", "machine-id", "hostname", "x.gz"), "the host's\n"
    )
    for name in (ref, "of-evil"):
        host.run("destroy", name, "--force", "--yes")
    host.run("template", "remove", "evil")


def test_a_shared_volume_has_each_ones_own_ids(shared_host: Node) -> None:
    host = shared_host
    one, two = (create(host, "--mount", "volume=lent,target=/lent") for _ in range(2))

    def plant() -> str:
        shutil.copy("/bin/busybox", "/lent/su")
        os.chmod("/lent/su", 0o4755)
        try:
            os.mknod("/lent/sda", 0o666 | stat.S_IFBLK, os.makedev(8, 0))
        except PermissionError:
            return "refused"
        return "made"

    assert inside(init_pid(host, one), plant) == "refused"
    assert output(host, two, "stat -c %u:%a /lent/su") == "0:4755"
    # On the disk it is the host's root's and setuid: nobody else may come near it.
    assert stat.S_IMODE(os.stat(host.layout.pool).st_mode) == 0o700
    # The other's mount has no setuid at all.
    assert output(host, two, "grep ' /lent ' /proc/self/mounts | grep -c nosuid") == "1"
    for ref in (one, two):
        host.run("destroy", ref, "--force", "--yes")


# Names and places


_NAMES = (
    "../x", "..", ".", "a/b", "a\n", "\nb", "a\0b", "\u202eevil", "-rf", "a b", "A", "x" * 64, "a" * 5000,
    "$(id)", "a;b", "\x1b[31m", "é", ".hidden",
)  # fmt: skip


@pytest.mark.parametrize("name", _NAMES, ids=ascii)
def test_names_that_could_be_paths_reach_no_pool(shared_host: Node, evil: str, name: str) -> None:
    host = shared_host
    before = sorted(str(path) for path in Path(host.layout.pool).glob("*/*"))
    base = f"/1/containers/{evil}"
    for method, path, body in (
        ("POST", f"{base}/snapshots", {"name": name}),
        ("DELETE", f"{base}/snapshots", {"names": [name]}),
        ("POST", f"{base}/rollback", {"snapshot": name}),
        ("POST", f"{base}/clone", {"name": "copy", "snapshot": name}),
        ("POST", f"{base}/template", {"name": name}),
        ("POST", f"{base}/diff", {"snapshot": name}),
        ("POST", f"{base}/mounts", {"mount": f"volume={name},target=/x"}),
        ("POST", f"{base}/mounts", {"mount": {"volume": name, "target": "/x"}}),
        ("POST", f"{base}/mounts", {"mount": {"name": name, "target": "/x"}}),
        ("POST", f"{base}/mounts", {"mount": {"pool": name, "target": "/x"}}),
        ("POST", "/1/pools", {"name": name, "driver": "overlay", "path": f"{host.root}/elsewhere"}),
        ("POST", "/1/containers", {"name": "copy", "template": "tiny", "pool": name}),
    ):
        status, answer = host.api(method, path, body)
        if status == 202:
            _, waited = host.api("GET", f"/1/tasks/{answer['task']['id']}/wait")
            assert waited["task"]["state"] == "failed", (method, path, body, waited)
            status = 400
        assert 400 <= status < 500, (method, path, body, status, answer)
    assert sorted(str(path) for path in Path(host.layout.pool).glob("*/*")) == before
    assert not os.path.exists(f"{host.root}/elsewhere")


def test_no_pool_where_the_host_or_another_pool_is(shared_host: Node, evil: str, tmp_path: Path) -> None:
    host = shared_host
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    (tmp_path / "file").write_text("own\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("own\n")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for path in (
        "/", "/proc", "/proc/1/root", "/proc/self/cwd", "/sys", "/sys/fs/cgroup", "/dev",
        "/dev/shm/../../proc",
        str(link), f"{tmp_path}/file", f"{tmp_path}/full", f"{host.layout.pool}",
        f"{host.layout.pool}/uppers", f"{host.layout.pool}/volumes/x", os.path.dirname(host.layout.pool),
        "relative", f"{tmp_path}/a\nb", f"{tmp_path}/../x\0",
    ):  # fmt: skip
        body = {"name": "bad", "driver": "overlay", "path": path}
        status, answer = host.api("POST", "/1/pools", body)
        assert status >= 400, (path, answer)
        assert "Traceback" not in json.dumps(answer)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert [pool["name"] for pool in host.json("pool", "list")] == ["default"]


@pytest.mark.parametrize("name", ["a:b,lowerdir=", "a b\\040", "--help", "é"], ids=ascii)
def test_a_pool_of_an_odd_name_is_just_a_directory(shared_host: Node, tmp_path: Path, name: str) -> None:
    host = shared_host
    pool = new_name("odd")
    body = {"name": pool, "driver": "overlay", "path": f"{tmp_path}/{name}"}
    status, answer = host.api("POST", "/1/pools", body)
    if status == 400:
        return  # said so
    assert status == 200, answer
    ref = create(host, "--pool", pool)
    output(host, ref, "echo on > /root/x")
    host.run("snapshot", ref, "one")
    host.run("destroy", ref, "--force", "--yes")
    host.run("pool", "remove", pool)
    assert [path.name for path in tmp_path.iterdir()] == [name]


# What is shown of it


def test_names_of_files_are_told_and_never_obeyed(shared_host: Node, box: str) -> None:
    host = shared_host
    names = [
        b"\x1b]0;owned\x07",
        b"two\nlines",
        b"\xff\xfe",
        "\u202egpj.exe".encode(),
        b"-rf",
        b"x" * 255,
        b"\r",
    ]

    def plant() -> None:
        os.mkdir("/root/named")
        for name in names:
            with open(b"/root/named/" + name, "wb"):
                pass

    inside(init_pid(host, box), plant)
    done = host.run("diff", box)
    shown = [line for line in done.stdout.split(b"\n") if b"/root/named/" in line]
    assert len(shown) == len(names)
    assert not set(done.stdout) & set(b"\x1b\x07\r")
    assert "\u202e" not in done.out
    told = {os.fsencode(path) for _, path in host.json("diff", box)["result"]["changes"]}
    assert {b"/root/named/" + name for name in names} <= told


# Records


_DAMAGED = {
    "deep": "[" * 100_000,
    "deep note": '{"schema":1,"name":"one","created":1,"note":' + '{"a":' * 50_000 + "1" + "}" * 50_001,
    "huge": '{"schema":1,"note":{"x":"' + "x" * (17 << 20) + '"}}',
    "huge number": '{"schema":1,"name":"one","created":1' + "0" * 400 + ',"layers":["layers/x"]}',
    "digits": '{"schema":1,"name":"one","created":1' + "0" * 5000 + "}",
    "huge parent": '{"schema":1,"name":"one","created":1.0,"parents":[["x",1' + "0" * 400 + ']]}',
    "infinite": '{"schema":1,"name":"one","created":1e999}',
    "not one": '{"schema":1,"name":"one","created":NaN}',
    "another name": '{"schema":1,"name":"../one","created":1.0}',
    "paths": '{"schema":1,"name":"one","created":1.0,"upper":"../../etc","layers":["../../../etc"]}',
    "layer": '{"schema":1,"name":"one","created":1.0,"layers":["layers/../../../etc", "uppers/..\\u0000"]}',
    "binary": "\x00\x01",
    "empty": "",
    "surrogates": '{"schema":1,"name":"\\ud800","created":1.0,"note":{"\\udfff":"\\ud800"}}',
}  # fmt: skip


@pytest.mark.parametrize("what", _DAMAGED)
def test_a_damaged_record_stops_only_what_it_is_of(shared_host: Node, what: str) -> None:
    host = shared_host
    ref = create(host, start=False)
    number = host.json("info", ref)["id"]
    host.run("snapshot", ref, "one")
    directory = Path(f"{host.layout.pool}/volumes/{number}")
    (directory / "snapshots" / "one.json").write_text(_DAMAGED[what])
    shown = host.json("snapshots", ref)["snapshots"]
    assert [one["name"] for one in shown] == ["one"]
    assert host.run("rollback", ref, "one", "--yes", check=False).status != 0
    host.run("delsnapshot", ref, "one")
    (directory / "volume.json").write_text(_DAMAGED[what])
    done = host.run("start", ref, check=False)
    assert done.status != 0
    assert "Traceback" not in done.err
    for arguments in (("df",), ("list",), ("pool", "list"), ("recover", "--dry-run")):
        host.run(*arguments)
    status, answer = host.api("GET", "/1/doctor")
    assert status == 200, answer
    host.run("destroy", ref, "--force", "--yes")
    assert "Traceback" not in host.logs()
