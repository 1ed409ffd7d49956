"""Hostile contents and streams of archives (security.md S14-S16, S30): bombs, names, damage, bad senders.

What an archive holds may be strange, as long as it stays in its volume; what it costs is bounded.
"""

import contextlib
import gzip
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.attack.hostile import (
    MIB,
    Member,
    Scene,
    archive,
    forget_peak,
    hard_link,
    member,
    own,
    pack,
    pax,
    peak,
    raw,
    resident,
    root,
    symlink,
)
from tests.disk import disk
from tests.wait import wait_until

pytestmark = [
    pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox", "loop"),
]  # fmt: skip

CODECS = {
    "none": ["cat"], "gzip": ["gzip", "-1"], "zstd": ["zstd", "-1", "--quiet"], "xz": ["xz", "-0"],
    "lzop": ["lzop", "-1"],
}  # fmt: skip


def compressed(data: bytes, codec: str) -> bytes:
    return subprocess.run(CODECS[codec], input=data, stdout=subprocess.PIPE, check=True).stdout


@pytest.fixture(autouse=True)
def nothing_stays(scene: Scene) -> Iterator[None]:
    yield
    scene.destroy()
    scene.unharmed()


@pytest.fixture(scope="module")
def small(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A pool on a disk where little fits: 256 MiB stay free of what an archive unpacks to."""
    directory = tmp_path_factory.mktemp("small")
    with disk(str(directory), "ext4", size_bytes=400 * MIB):
        scene.host.run("pool", "add", "small", "--driver", "overlay", "--path", f"{directory}/pool")
        yield "small"
        scene.host.run("pool", "remove", "small")


def tree_of(scene: Scene, ref: str) -> Path:
    """Return where the files of a container that was made of an archive lie."""
    number = scene.host.json("info", ref)["id"]
    (found,) = Path(scene.host.layout.pool).glob(f"uppers/{number}.*/rootfs")
    return found


def both(scene: Scene, data: bytes, *, fits: bool) -> None:
    """Verify and restore: the one says what becomes of the other."""
    verified, restored = scene.verify(data), scene.restore(data)
    assert (restored.status == 0) is fits, restored
    assert (verified.status == 0) is fits, verified
    if not fits:
        scene.refused(restored)


NAMES: dict[str, list[Member]] = {
    "newlines": [member("./a\nblock 1: ** Block of NULs **\nstatus 0 0 0"), member("./b\n")],
    "escapes": [member("./\x1b[2J\x1b]0;evil\x07"), member("./\r./ok")],
    "options": [member("--checkpoint-action=exec=touch new"), member("-rf"), member("./--to-command=sh")],
    "tar's own words": [
        member("tar: x: Cannot mknod: Operation not permitted"), member("** Block of NULs **"),
        member("status 0 0 0"), member("tar: Exiting with failure status due to previous errors"),
    ],
    "not text": [pax("./\udcff\udcfe", b"x"), member("./\udc80")],
    "components of 255 bytes": [member(f"./{'n' * 255}/{'m' * 255}")],
    "a path of nearly 4 KiB": [member(f"./{'/'.join(['d' * 99] * 38)}/file")],
    "a thousand levels": [member(f"./{'/'.join('d' * 1000)}/file")],
    "many levels by symbolic links": [
        member(f"./{'/'.join('d' * 1100)}/", kind=tarfile.DIRTYPE), symlink("./s", "/".join("d" * 1100)),
        member(f"./s/{'/'.join('e' * 1100)}/", kind=tarfile.DIRTYPE),
    ],
    "links to links": [
        symlink("./1", "2"), symlink("./2", "1"), hard_link("./3", "./1"), symlink("./4", "x" * 4000),
    ],
    "members twice": [member("./f", b"1"), member("./f", kind=tarfile.DIRTYPE), member("./f/g")],
    "sparse of 8 EiB less one": [
        pax("./sparse", b"1\n0\n512\n".ljust(512, b"\0") + b"x" * 512, GNU_sparse_major="1",
            GNU_sparse_minor="0", GNU_sparse_name="sparse", GNU_sparse_realsize=str((1 << 63) - 1)),
    ],
    "fifos and sockets": [member("./fifo", kind=tarfile.FIFOTYPE), member("./x", kind=b"s")],
    "times of other ages": [member("./old", mtime=0), pax("./far", mtime="99999999999")],
}  # fmt: skip


@pytest.mark.parametrize("attack", NAMES)
def test_strange_members_stay_in_their_volume(scene: Scene, attack: str) -> None:
    data = archive(*NAMES[attack])
    restored = scene.restore(data, stdin=bool(len(attack) % 2))
    assert len(scene.made()) == (restored.status == 0)
    assert scene.verify(data).status in (0, 1)
    assert not os.path.exists("new")


def test_nodes_attributes_and_setuid_give_nothing(scene: Scene) -> None:
    # cap_sys_admin=ep, revision 3, of an id that this container has not.
    foreign = bytes.fromhex("0100000300002000000000000000000000000000") + (100_000).to_bytes(4, "little")

    def text(data: bytes) -> str:
        return data.decode("utf-8", "surrogateescape")

    done = scene.restore(
        archive(
            member("./node", kind=tarfile.CHRTYPE, devmajor=1, devminor=5),
            member("./disk", kind=tarfile.BLKTYPE, devmajor=7, devminor=0),
            member("./setuid", b"x", mode=0o6755),
            pax("./plain", b"x", SCHILY_xattr_trusted_evil="x", SCHILY_xattr_security_selinux="x",
                SCHILY_xattr_security_ima="x", SCHILY_xattr_user_overlay_opaque="y",
                SCHILY_xattr_trusted_overlay_redirect="/etc"),
        ),
    )  # fmt: skip
    assert done.status == 0, done
    made = tree_of(scene, "hostile")
    assert not os.path.lexists(made / "node")
    assert not os.path.lexists(made / "disk")
    assert stat.S_IMODE(os.stat(made / "setuid").st_mode) == 0o6755
    assert stat.S_IMODE(os.stat(scene.host.layout.pool).st_mode) & 0o077 == 0
    assert os.listxattr(made / "plain") == []
    scene.destroy()
    scene.restore(archive(pax("./able", b"x", SCHILY_xattr_security_capability=text(foreign))))
    for one in scene.made():
        assert "security.capability" not in os.listxattr(tree_of(scene, one["name"]) / "able")


def test_ids_that_no_container_has_are_refused(scene: Scene) -> None:
    for more in ({"uid": 65_536}, {"gid": 100_000}, {"uid": 2**33}):
        both(scene, archive(member("./file", b"x", **more)), fits=False)
    both(scene, archive(member("./file", b"x", uid=65_535, gid=65_535)), fits=True)


def test_what_is_no_root_is_neither_restored_nor_verified(scene: Scene) -> None:
    both(scene, pack([own(), member("./etc/passwd", b"x")]), fits=False)
    both(scene, pack([*root()[:-2], member("./sbin/init", kind=tarfile.DIRTYPE)]), fits=False)
    # Without unpacking it nobody knows what is in an init.
    for init in (member("./sbin/init", b"text"), symlink("./sbin/init", "../gone")):
        scene.refused(scene.restore(pack([*root()[:-2], init])))


def test_nodes_with_long_names_are_counted_and_not_kept(scene: Scene) -> None:
    header = member("./n", kind=tarfile.CHRTYPE, devmajor=1)[0].tobuf(tarfile.GNU_FORMAT)

    def node(number: int) -> bytes:
        name = f"./{'/'.join(['n' * 250] * 15)}/{number}".encode()
        return raw("././@LongLink", b"L", name + b"\0") + header

    bomb = pack(root(), end=False) + b"".join(node(number) for number in range(3000)) + bytes(10240)
    done = scene.restore(compressed(bomb, "gzip"))
    assert done.status == 0, done
    assert json.loads(done.stdout)["devices"] == 3000
    assert len(done.stdout) < 4096


def test_many_entries_are_bounded_in_memory_and_time(scene: Scene) -> None:
    members = b"".join(raw(f"./{number % 500}-{number}", b"0") for number in range(30_000))
    began_s = time.monotonic()
    done = scene.restore(compressed(pack(root(), end=False) + members + bytes(10240), "gzip"))
    assert done.status == 0, done
    assert time.monotonic() - began_s < 30


def bomb_of(scene: Scene, codec: str) -> Path:
    """Write a small archive with a file of zeros of 16 GiB in it, or for those that compress badly 2 GiB."""
    path = scene.directory / "archives" / f"bomb-{codec}"
    path.parent.mkdir(exist_ok=True)
    size = {"xz": 1 << 30, "gzip": 1 << 31}.get(codec, 16 << 30)
    with open(path, "wb") as file:
        packer = subprocess.Popen(CODECS[codec], stdin=subprocess.PIPE, stdout=file)
        packer.stdin.write(pack(root(), end=False) + raw("./zeros", b"0", size=size))
        # Frames and members that follow one another are one stream: the same again costs nothing to make.
        packer.stdin.write(bytes(16 * MIB))
        packer.stdin.close()
        assert packer.wait() == 0
    piece = compressed(bytes(64 * MIB), codec)
    with open(path, "ab") as file:
        for _ in range(size // (64 * MIB)):
            file.write(piece)
    return path


@pytest.mark.parametrize("codec", ["gzip", "zstd", "xz"])
def test_a_bomb_ends_at_the_bound(scene: Scene, small: str, codec: str) -> None:
    path = bomb_of(scene, codec)
    forget_peak(scene.daemon)
    before = resident(scene.daemon)
    done = scene.host.run("restore", str(path), "--pool", small, check=False, timeout_s=60)
    scene.plain(done)
    scene.refused(done, "it unpacks to more than there is space")
    assert peak(scene.daemon) - before < 48 * MIB


def test_a_full_disk_is_told_and_leaves_nothing(scene: Scene, small: str) -> None:
    big = member("./big", random.Random(1).randbytes(MIB) * 180)
    done = scene.restore(archive(big), "--pool", small)
    scene.refused(done, "space")


# Damage


@pytest.fixture(scope="module")
def packed() -> dict[str, bytes]:
    """The same archive by every codec, so large that its head is not all of it."""
    noise = random.Random(7).randbytes(3 * MIB)
    data = archive(member("./noise", noise), member("./last", b"x"), head=[own()])
    return {codec: compressed(data, codec) for codec in CODECS}


@pytest.mark.parametrize("codec", CODECS)
def test_an_archive_that_is_cut_is_refused(scene: Scene, packed: dict[str, bytes], codec: str) -> None:
    data = packed[codec]
    for cut in (1, 5, 100, 700, 3000, len(data) // 2, len(data) - 12_000, len(data) - 3):
        piece = data[:cut]
        # Blocks of zeros follow the end of plain tar.
        if codec == "none" and cut > len(data) - 10_000:
            continue
        scene.refused(scene.restore(piece, stdin=cut == 3000, name="hostile.tar.zst"))
        scene.refused(scene.verify(piece))


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "none"])
def test_flipped_bits_are_noticed(scene: Scene, packed: dict[str, bytes], codec: str) -> None:
    data = packed[codec]
    source = random.Random(3)
    for at in (source.randrange(2000, len(data) - 20) for _ in range(4)):
        broken = bytearray(data)
        broken[at] ^= 1 << source.randrange(8)
        scene.refused(scene.restore(bytes(broken)))
        scene.refused(scene.verify(bytes(broken)))


def test_names_do_not_say_what_an_archive_is(scene: Scene, packed: dict[str, bytes]) -> None:
    for codec, name in (("xz", "a.tar.gz"), ("none", "a.tar.zst"), ("gzip", "a.tar"), ("zstd", "-rf.tar")):
        done = scene.restore(packed[codec], name=name)
        assert done.status == 0, done
        scene.destroy()


NO_ARCHIVES: dict[str, Callable[[], bytes]] = {
    "empty": bytes,
    "one byte": lambda: b"x",
    "random": lambda: random.Random(1).randbytes(2 * MIB),
    "zeros": lambda: bytes(2 * MIB),
    "text": lambda: b"hello\n" * 1000,
    "gzip of nothing": lambda: gzip.compress(b""),
    "gzip of random": lambda: gzip.compress(random.Random(1).randbytes(MIB)),
    "gzip of gzip": lambda: gzip.compress(gzip.compress(archive())),
    "magic alone": lambda: b"\x28\xb5\x2f\xfd",
    "a skippable frame without end": lambda: b"\x50\x2a\x4d\x18\xff\xff\xff\xff" + bytes(1000),
    "a squashfs": lambda: b"hsqs" + bytes(1000),
    "two archives": lambda: archive() + archive(head=[own('schema = 1\nname = "second"\n')]),
    "garbage after the end": lambda: compressed(archive(), "zstd") + random.Random(1).randbytes(1000),
    "no root": lambda: pack([member("./file", b"x")]),
    "no end": lambda: pack(root(), end=False),
    "a program for another machine": lambda: pack(
        [*root(), member("./sbin/init", b"\x7fELF\x02\x02\x01" + bytes(11) + b"\0\x16" + bytes(300))]
    ),
}


@pytest.mark.parametrize("attack", NO_ARCHIVES)
def test_what_is_no_archive_is_refused(scene: Scene, attack: str) -> None:
    data = NO_ARCHIVES[attack]()
    for stdin in (False, True):
        done = scene.restore(data, stdin=stdin)
        if attack == "two archives":
            # tar ends where the first one does.
            assert [one["name"] for one in scene.made()] in (["hostile"], [])
            scene.destroy()
        else:
            scene.refused(done)


def test_what_is_no_file_is_refused(scene: Scene) -> None:
    directory = scene.directory / "archives"
    os.mkfifo(directory / "fifo.tar")
    (directory / "link.tar").symlink_to("/dev/zero")
    (directory / "loop.tar").symlink_to("loop.tar")
    names = ("fifo.tar", "link.tar", "loop.tar", ".", "gone.tar", "a\nb.tar", "\x1b[2J.tar")
    for path in (*(f"{directory}/{name}" for name in names), "/dev/zero", "/proc/self/mem", "/dev/mem"):
        for command in (("restore",), ("backup", "verify")):
            done = scene.host.run(*command, path, check=False, timeout_s=30)
            scene.plain(done)
            scene.refused(done)
    done = scene.host.run("restore", "../../etc/shadow", check=False)
    scene.plain(done)
    scene.refused(done)


def test_a_file_of_exabytes_without_content_is_refused_at_once(scene: Scene, small: str) -> None:
    path = Path(scene.file(archive(), "huge.tar"))
    os.truncate(path, 8 << 40)
    began_s = time.monotonic()
    done = scene.host.run("restore", str(path), "--pool", small, check=False, timeout_s=60)
    scene.plain(done)
    scene.refused(done)
    assert time.monotonic() - began_s < 20
    path.unlink()


def test_an_archive_that_changes_while_it_is_read(scene: Scene) -> None:
    good = archive(member("./noise", random.Random(7).randbytes(30 * MIB)), head=[own()])
    path = Path(scene.file(good))
    ended = threading.Event()

    def change() -> None:
        source = random.Random(5)
        with open(path, "r+b") as file:
            while not ended.is_set():
                file.seek(source.randrange(len(good) // 512) * 512)
                file.write(source.randbytes(512))
                file.flush()
                file.truncate(len(good) - source.randrange(1000))

    changing = threading.Thread(target=change)
    changing.start()
    try:
        for _ in range(3):
            done = scene.host.run("restore", str(path), check=False, timeout_s=60)
            scene.plain(done)
            scene.destroy()
            scene.unharmed()
    finally:
        ended.set()
        changing.join()


# Streams


class Upload:
    """An upload that its sender does not end, made by hand: `restore -` without the command."""

    def __init__(self, scene: Scene, data: bytes = b"") -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(scene.host.layout.api_socket)
        self.sock.sendall(b"PUT /1/restore HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        if data:
            self.send(data)

    def __enter__(self) -> "Upload":
        return self

    def __exit__(self, *_error: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(b"%x\r\n%b\r\n" % (len(data), data))

    def answer(self) -> bytes:
        return self.sock.recv(65536)


def running(scene: Scene) -> list[dict]:
    _, answer = scene.host.api("GET", "/1/tasks")
    return [task for task in answer["tasks"] if task["state"] in ("running", "queued")]


def ended(scene: Scene, task: dict) -> dict:
    """Wait for the end of a task."""
    wait_until(lambda: not running(scene), 20, "the task has ended")
    _, answer = scene.host.api("GET", f"/1/tasks/{task['id']}")
    return answer["task"]


def test_a_sender_that_stalls_and_is_cut_leaves_nothing(scene: Scene, packed: dict[str, bytes]) -> None:
    # All of it has come, but for the end of the body: who was cut there may have had more to say.
    for data in (packed["none"][: 2 * MIB], packed["zstd"]):
        with Upload(scene, data):
            wait_until(lambda: running(scene), what="a task")
            (task,) = running(scene)
        error = ended(scene, task)["error"]
        assert "its sender was cut off" in error["message"], error
        scene.unharmed()
    with Upload(scene, b"x" * 100):
        pass
    scene.unharmed()


def test_a_sender_that_stalls_keeps_no_task_from_being_cancelled(scene: Scene, packed: dict) -> None:
    with Upload(scene, packed["none"][: 2 * MIB]):
        wait_until(lambda: running(scene), what="a task")
        (task,) = running(scene)
        scene.host.run("task", "cancel", task["id"])
        assert ended(scene, task)["state"] == "cancelled"
    scene.unharmed()


def test_a_body_that_is_broken_is_no_archive(scene: Scene, packed: dict[str, bytes]) -> None:
    def begun() -> int:
        return len(scene.host.api("GET", "/1/tasks")[1]["tasks"])

    # Of the second there is enough for a task, which begins some time after that.
    for sent, tasks in ((b"", 0), (packed["none"][: 2 * MIB], 1)):
        before = begun()
        with Upload(scene, sent) as upload:
            upload.sock.sendall(b"no number\r\n")
        wait_until(lambda n=before + tasks: begun() == n and not running(scene), 20, "its task has ended")
        scene.unharmed()


def test_who_is_refused_hears_it_without_sending_more(scene: Scene) -> None:
    noise = random.Random(2).randbytes(2 * MIB)
    with Upload(scene, noise) as upload:
        assert b"it is no tar archive" in upload.answer()
    command = scene.host.popen("restore", "-", stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    with contextlib.suppress(BrokenPipeError):
        command.stdin.write(noise)
        command.stdin.flush()
    assert b"it is no tar archive" in command.stderr.read()
    assert command.wait(30) == 2


def test_senders_that_stall_keep_nobody_waiting(scene: Scene, packed: dict[str, bytes]) -> None:
    stalled = [Upload(scene, b"x" * 1000) for _ in range(40)]
    try:
        done = scene.restore(packed["zstd"], stdin=True)
        assert done.status == 0, done
        assert len(scene.made()) == 1
    finally:
        for one in stalled:
            one.sock.close()


@pytest.mark.parametrize("after", ["a whole archive", "a member without end", "noise"])
def test_a_stream_without_end_is_ended(scene: Scene, small: str, after: str) -> None:
    begin, endless = {
        "a whole archive": (archive(), "/dev/zero"),
        "a member without end": (pack(root(), end=False) + raw("./x", b"0", size=1 << 60), "/dev/urandom"),
        "noise": (archive()[:4096], "/dev/urandom"),
    }[after]
    scene.file(begin)
    feeder = subprocess.Popen(
        ["cat", str(scene.directory / "archives" / "hostile.tar"), endless], stdout=subprocess.PIPE
    )
    try:
        done = scene.host.popen(
            "restore", "-", "--pool", small,
            stdin=feeder.stdout, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        out, err = done.communicate(timeout=60)
        assert done.returncode == 1, (out, err)
        assert err.startswith(b"sysctr: cannot "), err
    finally:
        feeder.kill()
        feeder.stdout.close()
        feeder.wait()
    scene.unharmed()


def test_nothing_of_the_archives_is_kept(scene: Scene) -> None:
    shutil.rmtree(scene.directory / "archives", ignore_errors=True)
    scene.unharmed()
