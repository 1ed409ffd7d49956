"""What a hostile peer hands over (security.md S10, S13-S16): contained in the volume, with its ids alone."""

import contextlib
import os
import select
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest

from sysctr.errors import NoSpace, SysctrError
from sysctr.peer.channel import Channel, PeerLost
from tests.attack.peers.besieged import (
    CARD,
    MID,
    Sender,
    Victim,
    begun,
    send,
    taken,
)
from tests.attack.peers.rogue import (
    CONFIG,
    UUID,
    WISHES,
    Rogue,
    in_thread,
    offer,
    refused,
    snapshot,
)
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox")]


EVIL = CONFIG + """
[net.0]
name = "eth0"
mac = "{mac}"
ip = "{ip}/24"
[mount.0]
target = "/of-the-host"
source = "/etc"
[mount.1]
target = "/shared"
volume = "media"
[device.0]
path = "/dev/sda"
"""


@pytest.mark.parametrize("where", ["now", "in a snapshot"])
def test_a_container_has_nothing_of_the_host(
    victim: Victim, rogue: Rogue, neighbour: dict, tree: Sender, given: str, where: str
) -> None:
    card = victim.node.api("GET", "/1/containers/neighbour/config")[1]["config"]["net"]["0"]
    [ip] = victim.node.json("info", "neighbour")["addresses"]
    evil = EVIL.format(mac=card["mac"], ip=ip)
    channel = rogue.connect()
    blocked = refused(channel, "migrate.begin", id=MID, offer=offer(config=evil))
    assert blocked.code == "blocked"
    for word in ("bind", "device"):
        assert word in blocked.message
    wishes = {**WISHES, "leave_out": ["bind", "device"]}
    if where == "now":
        taken(channel, tree, config=evil, wishes=wishes)
    else:
        taken(channel, tree, config=CONFIG, snapshots=[snapshot("one", config=evil)])
        victim.node.run("rollback", given, "one", "--yes")
    text = victim.node.api("GET", f"/1/containers/{given}/config")[1]["toml"]
    for word in ("/dev/sda", "source", "media", card["mac"], f"{ip}/"):
        assert word not in text, text
    victim.node.run("start", given)
    assert victim.node.json("info", given)["addresses"] != [ip]
    assert "/of-the-host" not in victim.node.run("exec", given, "--", "cat", "/proc/mounts").out
    assert victim.node.json("info", "neighbour")["addresses"] == [ip]


def test_odd_facts_harm_nobody(victim: Victim, rogue: Rogue, tree: Sender, given: str) -> None:
    odd = {"init": "", "init_kind": "x", "stop_signal": "", "arch": "x", "os_id": "\u202e"}
    far = 1e12
    one = snapshot("one", created=far, expires=far, description="\u202e\x9b2J")
    facts = {"created": far, "guest": odd, "generation": 1 << 53, "firewall": "\x1b[2J"}
    taken(rogue.connect(), tree, snapshots=[one], **facts)
    node = victim.node
    for command in (["list"], ["info", given], ["snapshots", given], ["df"], ["config", given], ["doctor"]):
        done = node.run(*command, check=False)
        assert "internal error" not in done.err, done
        assert "Traceback" not in done.err, done
        assert not {"\x1b", "\x9b", "\u202e"} & {*(done.out + done.err)}, done
    node.run("start", given, check=False)
    if node.state(given) == "running":
        node.run("stop", given)
    node.run("snapshot", given, "--name", "two", check=False)
    node.run("rollback", given, "one", "--yes")


def test_what_others_have_by_now_is_not_taken_at_the_end(
    victim: Victim, rogue: Rogue, tree: Sender, given: str
) -> None:
    mac, uuid = "02:00:00:00:00:77", UUID
    channel = rogue.connect()
    begun(channel, config=CARD + f'mac = "{mac}"\n')
    send(channel, tree.command())
    assert channel.call("migrate.prepare", 60, id=MID) == {"answer": "prepared"}
    # It waits, and a container comes whose address it knows.
    victim.node.run("create", "late", "--template", "tiny", "--net", f"eth0,mac={mac}")
    try:
        channel.call("migrate.commit", 60, id=MID, start=False)
        channel.call("migrate.forget", 60, id=MID)
        config = victim.node.api("GET", f"/1/containers/{given}/config")[1]["config"]
        assert config["net"]["0"]["mac"] not in ("", mac)
        # The very same container once more.
        again = refused(channel, "migrate.begin", id="00000000000000bb", offer=offer(uuid=uuid))
        assert again.code == "blocked"
    finally:
        victim.node.run("destroy", "late", "--yes")


def forged(argv: list[str], changes: dict[bytes, bytes], out: socket.socket) -> None:
    """Pass on what a program and the other side say, with other names of the same length."""
    near, far = socket.socketpair()
    with near, subprocess.Popen(argv, stdin=far, stdout=far, stderr=subprocess.DEVNULL) as program:
        far.close()
        poller = select.poll()
        for one in (near, out):
            poller.register(one, select.POLLIN)
        until_s = time.monotonic() + 20
        with contextlib.suppress(OSError):
            while time.monotonic() < until_s and program.poll() is None:
                for fd, _ in poller.poll(200):
                    source, target = (near, out) if fd == near.fileno() else (out, near)
                    data = source.recv(1 << 20)
                    if not data:
                        until_s = 0.0
                    for old, new in changes.items() if source is near else ():
                        data = data.replace(old, new)
                    target.sendall(data)
        program.kill()
        with contextlib.suppress(OSError):
            out.shutdown(socket.SHUT_RDWR)


def send_forged(channel: Channel, argv: list[str], changes: dict[bytes, bytes]) -> None:
    channel.call("migrate.sync", 60, id=MID, volume="101", mode="all", still=False)
    ours, theirs = socket.socketpair()
    thread = in_thread(lambda: forged(argv, changes, theirs))
    try:
        fd = ours.detach()
        channel.exchange(fd, fd, idle_s=60)
        channel.answer(60)
    finally:
        with contextlib.suppress(OSError):
            theirs.shutdown(socket.SHUT_RDWR)
        thread.join()
        theirs.close()


FORGED: dict[str, tuple[list[str], dict[bytes, bytes]]] = {
    "dotdot": (["QQQQQQQQQQQevil"], {b"QQQQQQQQQQQevil": b"../../../.xevil"}),
    "dotdot inside": (["QQ/QQQQQQevil"], {b"QQQQQQevil": b"../../evil"}),
    "absolute": (["QQQQQQQQQevil"], {b"QQQQQQQQQevil": b"/volume/.evil"}),
    "absolute elsewhere": (["QQQQQevil"], {b"QQQQQevil": b"/tmp/evil"}),
    "symlink, then a file in it": (["QQ/evil", "QA -> /tmp"], {b"QQ": b"QA"}),
    "symlink up, then a file in it": (["QQ/evil", "QA -> ../../../../tmp"], {b"QQ": b"QA"}),
    "an empty name": (["Q"], {b"Q": b"\0"}),
    "a line more": (["QQQevil"], {b"QQQevil": b"a\nbevil"}),
    "an escape": (["QQQQevil"], {b"QQQQevil": b"\x1b[2Jevil"}),
}


def upper(victim: Victim, number: int = 101) -> Path:
    """Return where the files are that a container on its way has."""
    [found] = Path(victim.node.layout.pool).glob(f"uppers/{number}.*")
    return found / "rootfs"


@pytest.mark.parametrize("name", FORGED)
def test_names_that_a_sender_forges(
    victim: Victim, rogue: Rogue, tree: Sender, tmp_path: Path, name: str
) -> None:
    files, changes = FORGED[name]
    for one in files:
        path, _, target = one.partition(" -> ")
        (tree.tree / path).parent.mkdir(exist_ok=True)
        if target:
            (tree.tree / path).symlink_to(target)
        else:
            (tree.tree / path).write_text("evil")
    channel = rogue.connect()
    begun(channel)
    with contextlib.suppress(SysctrError):
        send_forged(channel, tree.command(), changes)
    assert not [*Path("/tmp").glob("*evil"), *Path("/").glob("*evil")]
    assert not list(upper(victim).parent.glob("*evil"))
    owned(victim)


def owned(victim: Victim, number: int = 101) -> None:
    """Assert that all files of a container on its way have ids that it has, where no host user gets."""
    # On the disk they begin at 0; where it is mounted, at those of the container.
    _, count = map(int, Path(victim.node.layout.container_dir(number), "idmap").read_text().split())
    assert stat.S_IMODE(os.stat(victim.node.layout.pool).st_mode) & 0o077 == 0
    for path in [upper(victim), *upper(victim).rglob("*")]:
        facts = os.lstat(path)
        assert facts.st_uid < count, path
        assert facts.st_gid < count, path
        assert not stat.S_ISBLK(facts.st_mode), path
        assert not stat.S_ISCHR(facts.st_mode) or facts.st_rdev == 0, path
        assert not [key for key in os.listxattr(path, follow_symlinks=False) if key.startswith("trusted.")]


def test_what_a_tree_must_not_bring(victim: Victim, rogue: Rogue, tree: Sender) -> None:
    nodes_of = {
        "block": (stat.S_IFBLK, 7, 0), "memory": (stat.S_IFCHR, 1, 1), "whiteout": (stat.S_IFCHR, 0, 0)
    }  # fmt: skip
    channel = rogue.connect()
    begun(channel)
    (tree.tree / "shell").write_bytes(b"x")
    os.chmod(tree.tree / "shell", 0o6755)
    (tree.tree / "capable").write_bytes(b"x")
    # cap_sys_admin, for every user namespace.
    everything = bytes.fromhex("0100000200002000000000000000000000000000")
    os.setxattr(tree.tree / "capable", "security.capability", everything)
    (tree.tree / "up").symlink_to("../../../../../../../../etc/shadow")
    send(channel, tree.command())
    owned(victim)
    assert stat.S_IMODE(os.lstat(upper(victim) / "shell").st_mode) == 0o6755
    (tree.tree / "far").write_bytes(b"x")
    os.chown(tree.tree / "far", 4_000_000_000, 4_000_000_000)
    for name, (kind, major, minor) in nodes_of.items():
        os.mknod(tree.tree / name, kind | 0o666, os.makedev(major, minor))
    os.setxattr(tree.tree / "far", "trusted.evil", b"1")
    os.setxattr(tree.tree / "far", "trusted.overlay.opaque", b"y")
    with contextlib.suppress(SysctrError):
        send(channel, tree.command())
    owned(victim)


def test_rsync_that_is_none(victim: Victim, rogue: Rogue) -> None:
    channel = rogue.connect()
    begun(channel)
    for argv in (
        ["true"], ["sh", "-c", "echo hello"], ["head", "-c", "1000000", "/dev/urandom"],
        ["sh", "-c", "printf '\\040\\0\\0\\0'; head -c 100000 /dev/urandom"],
        ["sh", "-c", "printf '\\377\\377\\377\\177'; cat /dev/zero | head -c 10000000"],
        ["sh", "-c", "printf '\\037\\0\\0\\0\\0\\0\\0\\0\\0'; yes '\033[2J' | head -c 1000000"],
    ):  # fmt: skip
        with pytest.raises(SysctrError) as caught:
            send(channel, argv)
        if isinstance(caught.value, PeerLost):
            channel = rogue.connect()
            begun(channel)
    assert channel.call("migrate.prepare", id=MID) == {"answer": "receiving"}


def test_a_disk_that_fills_up(victim: Victim, rogue: Rogue, tree: Sender) -> None:
    node = victim.node
    small = f"{node.root}/small"
    node.shell("mkdir", small)
    node.shell("mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", small)
    node.run("pool", "add", "small", "--driver", "overlay", "--path", f"{small}/pool")
    try:
        with open(tree.tree / "bomb", "wb") as file:
            file.truncate(1 << 40)
        (tree.tree / "full").write_bytes(os.urandom(96 << 20))
        channel = rogue.connect()
        wishes = {**WISHES, "pools": {"default": "small"}}
        begun(channel, wishes=wishes)
        with pytest.raises(SysctrError):
            send(channel, ["timeout", "5", *tree.command()])
        (tree.tree / "bomb").unlink()
        channel = rogue.connect()
        begun(channel, wishes=wishes)
        with pytest.raises(SysctrError) as caught:
            send(channel, tree.command())
        if not isinstance(caught.value, PeerLost):
            with pytest.raises(NoSpace):
                channel.answer(60)
        assert rogue.connect().call("migrate.abort", id=MID) == {"answer": "aborted"}
    finally:
        rogue.hang_up()
        wait_until(lambda: not node.json("migrations"))
        node.run("pool", "remove", "small", "--force", "--yes", check=False)
        wait_until(lambda: not node.shell("umount", small, check=False).status, what=f"umount of {small}")
