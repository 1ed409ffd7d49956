"""Archives and recipes become templates in jobs without rights: what they attack with stays in the tree."""

import gzip
import io
import os
import socket
import stat
import subprocess
import tarfile
import time

import pytest

from sysctr.errors import NoSpace, NotFound, SysctrError, UsageError
from sysctr.template import apt, build, recipe, unpack
from sysctr.template.archive import import_archive
from sysctr.template.build import MirrorUnreachable
from sysctr.template.registry import Registry
from sysctr.template.rootfs_check import NotARootfs
from sysctr.template.unpack import Limits
from tests import facts, rootfs
from tests.disk import small_disk

pytestmark = [pytest.mark.root, pytest.mark.kernel]

COMPRESSIONS = ["", "gz", "xz", pytest.param("bz2", marks=pytest.mark.needs("bzip2")), "zst", "lzo"]
_PROGRAMS = {"zst": "zstd", "lzo": "lzop"}


class CancelledError(Exception):
    """What a cancelled task raises."""


class Log:
    """A task that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[str] = []
        self.last = (0, 0)
        self.cancel_after: int | None = None

    def check(self) -> None:
        if self.cancel_after is not None:
            self.cancel_after -= 1
            if self.cancel_after < 0:
                raise CancelledError

    def step(self, text: str) -> None:
        self.steps.append(text)

    def progress(self, done: int, total: int) -> None:
        self.last = (done, total)

    def log(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def registry(layout) -> Registry:
    made = Registry(layout)
    made.prepare()
    return made


@pytest.fixture(scope="session")
def busybox() -> str:
    path = rootfs.static_busybox()
    if path is None:
        pytest.skip("needs busybox: no static one (package busybox-static)")
    return path


@pytest.fixture
def task() -> Log:
    return Log()


def nothing_left(registry: Registry) -> bool:
    return os.listdir(registry.directory) == []


def write(path: str, members: list[tuple[tarfile.TarInfo, bytes]], base: str = "") -> str:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as out:
        for member, data in [*(rootfs.entries(base) if base else []), *members]:
            member.size = len(data)
            out.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return path


def pack(path: str, busybox: str, compression: str, prefix: str = "") -> str:
    if compression not in _PROGRAMS:
        return rootfs.write_tarball(path, busybox, compression=compression, prefix=prefix)
    rootfs.write_tarball(path, busybox, prefix=prefix)
    subprocess.run([_PROGRAMS[compression], "--quiet", path, "-o", f"{path}.z"], check=True)
    return f"{path}.z"


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **values: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o755
    for key, value in values.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize("prefix", ["dot", "rootfs", "plain"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_compression_and_layout_is_read(
    tmp_path, registry, jobs, task, busybox, compression, prefix
) -> None:
    path = str(tmp_path / "some.archive")
    path = pack(path, busybox, compression, {"dot": "", "plain": "plain", "rootfs": "rootfs/"}[prefix])
    template = import_archive(registry, path, "one", run_job=jobs.run_tool, task=task)
    assert (template.os_id, template.init_kind, template.stop_signal) == ("busybox", "busybox", "SIGUSR2")
    assert template.source.kind == "archive"
    digest = subprocess.run(["sha256sum", path], check=True, capture_output=True, text=True).stdout.split()[0]
    assert template.source.digest == f"sha256:{digest}"
    assert task.last == (os.path.getsize(path),) * 2
    tree = registry.rootfs("one")
    assert os.stat(f"{tree}/bin/busybox").st_uid == 0
    assert stat.S_IMODE(os.stat(f"{tree}/tmp").st_mode) == 0o1777
    assert stat.S_IMODE(os.stat(tree).st_mode) == 0o755
    assert sorted(os.listdir(os.path.dirname(tree))) == ["rootfs", "template.json"]


def test_owners_modes_links_and_attributes_survive(tmp_path, registry, jobs, task, busybox) -> None:
    source = tmp_path / "source"
    source.mkdir()
    rootfs.write_tree(str(source), busybox)
    (source / "home/file").write_text("x")
    os.chown(source / "home/file", 1000, 33)
    os.chmod(source / "home/file", 0o640)
    os.link(source / "home/file", source / "home/hard")
    os.setxattr(source / "home/file", "user.note", b"kept")
    os.setxattr(source / "home/file", "user.overlay.opaque", b"y")
    (source / "bin/ping").unlink()
    (source / "bin/ping").write_bytes(b"#!/bin/sh\n")
    # cap_net_raw=ep, revision 2
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    os.setxattr(source / "bin/ping", "security.capability", capability)
    path = str(tmp_path / "a.tar")
    subprocess.run(
        ["tar", "--create", "--xattrs", "--xattrs-include=*", f"--directory={source}", f"--file={path}", "."],
        check=True,
    )
    import_archive(registry, path, "one", run_job=jobs.run_tool, task=task)
    file = f"{registry.rootfs('one')}/home/file"
    status = os.stat(file)
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1000, 33, 0o640)
    assert os.stat(f"{registry.rootfs('one')}/home/hard").st_ino == status.st_ino
    assert os.listxattr(file) == ["user.note"]
    assert os.getxattr(f"{registry.rootfs('one')}/bin/ping", "security.capability") == capability


def test_device_nodes_are_left_out_and_told(tmp_path, registry, jobs, task, busybox) -> None:
    nodes = [
        (member("./dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3), b""),
        (member("./dev/sda: Cannot open\nx", tarfile.BLKTYPE, devmajor=8, devminor=0), b""),
        (member("./home/after"), b"x"),
    ]
    path = write(str(tmp_path / "a.tar"), nodes, busybox)
    import_archive(registry, path, "one", run_job=jobs.run_tool, task=task)
    tree = registry.rootfs("one")
    assert os.listdir(f"{tree}/dev") == []
    assert os.path.exists(f"{tree}/home/after")
    told = [line for line in task.lines if line.startswith("left out: ")]
    assert len(told) == 2
    assert "./dev/null" in told[0]


def test_a_node_that_is_left_out_hides_no_other_failure(tmp_path, registry, jobs, task, busybox) -> None:
    members = [
        (member("./dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3), b""),
        (member("./home/hard", tarfile.LNKTYPE, "./home/gone"), b""),
    ]
    path = write(str(tmp_path / "a.tar"), members, busybox)
    with pytest.raises(SysctrError, match="Cannot hard link"):
        import_archive(registry, path, "one", run_job=jobs.run_tool, task=task)
    assert nothing_left(registry)


ATTACKS = {
    "absolute": [(member("/tmp/sysctr-escape"), b"x")],
    "dotdot": [(member("../../../../../tmp/sysctr-escape"), b"x")],
    "symlink": [(member("./out", tarfile.SYMTYPE, "/tmp"), b""), (member("./out/sysctr-escape"), b"x")],
    "relative symlink": [
        (member("./out", tarfile.SYMTYPE, "../../../../../../../../tmp"), b""),
        (member("./out/sysctr-escape"), b"x"),
    ],
    "volume": [
        (member("./out", tarfile.SYMTYPE, "/volume/../../tmp"), b""),
        (member("./out/sysctr-escape"), b"x"),
    ],
    "hard link": [
        (member("./link", tarfile.LNKTYPE, "/etc/shadow"), b""),
        (member("./link"), b"sysctr-escape"),
    ],
    "hard link to symlink": [
        (member("./out", tarfile.SYMTYPE, "/etc/hostname"), b""),
        (member("./hard", tarfile.LNKTYPE, "./out"), b""),
        (member("./hard"), b"sysctr-escape"),
    ],
}


@pytest.mark.parametrize("name", ATTACKS)
def test_no_archive_reaches_outside(tmp_path, registry, jobs, task, busybox, name) -> None:
    watched = ("/etc/shadow", "/etc/hostname", "/etc/passwd")
    before = [os.stat(path).st_mtime_ns if os.path.exists(path) else None for path in watched]
    path = write(str(tmp_path / "a.tar"), ATTACKS[name], busybox)
    try:
        import_archive(registry, path, "one", run_job=jobs.run_tool, task=task)
    except SysctrError:
        assert nothing_left(registry)
    assert not os.path.lexists("/tmp/sysctr-escape")
    assert [os.stat(path).st_mtime_ns if os.path.exists(path) else None for path in watched] == before


def test_a_rootfs_that_is_a_symlink_is_not_followed(tmp_path, registry, jobs, task) -> None:
    members = [(member("metadata.yaml"), b"{}"), (member("rootfs", tarfile.SYMTYPE, "/"), b"")]
    path = write(str(tmp_path / "a.tar"), members)
    with pytest.raises(NotARootfs, match="no /sbin/init"):
        import_archive(registry, path, "one", run_job=jobs.run_tool, task=task)
    assert nothing_left(registry)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_truncated_archive_leaves_nothing(
    tmp_path, registry, jobs, task, busybox, compression, part
) -> None:
    path = str(tmp_path / "a")
    path = pack(path, busybox, compression)
    os.truncate(path, int(os.path.getsize(path) * part))
    with pytest.raises(SysctrError, match=r"truncated or damaged($| \([^)])"):
        import_archive(registry, path, "one", run_job=jobs.run_tool, task=task)
    assert nothing_left(registry)


def test_plain_tar_cut_between_two_members_is_truncated(tmp_path, registry, jobs, task, busybox) -> None:
    path = write(str(tmp_path / "a.tar"), [(member("./last"), b"")], busybox)
    with tarfile.open(path) as opened:
        os.truncate(path, opened.getmember("./last").offset)
    with pytest.raises(SysctrError, match="truncated"):
        import_archive(registry, path, "one", run_job=jobs.run_tool, task=task)
    assert nothing_left(registry)


def test_a_damaged_archive_leaves_nothing(tmp_path, registry, jobs, task, busybox) -> None:
    path = str(tmp_path / "a.tar.gz")
    rootfs.write_tarball(path, busybox, compression="gz")
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        file.write(bytes(4096))
    with pytest.raises(SysctrError, match="damaged"):
        import_archive(registry, path, "one", run_job=jobs.run_tool, task=task)
    assert nothing_left(registry)


def test_a_bomb_stops_at_the_bound(tmp_path, registry, jobs, task) -> None:
    path = str(tmp_path / "bomb")
    with gzip.open(path, "wb", compresslevel=1) as out:
        big = member("./zeros")
        big.size = 256 * 1024**2
        out.write(big.tobuf())
        for _ in range(256):
            out.write(bytes(1024**2))
        out.write(bytes(1024))
    limits = Limits(unpacked_bytes=unpack.GIB // 16)
    with pytest.raises(SysctrError, match="unpacks to more than"):
        import_archive(registry, path, "one", run_job=jobs.run_tool, task=task, limits=limits)
    assert nothing_left(registry)


def test_too_many_files_stop_at_the_bound(tmp_path, registry, jobs, task) -> None:
    path = write(str(tmp_path / "a.tar"), [(member(f"./{number}"), b"") for number in range(20_000)])
    with pytest.raises(SysctrError, match="more than 1000 files"):
        import_archive(
            registry, path, "one", run_job=jobs.run_tool, task=task, limits=Limits(entries=1000)
        )
    assert nothing_left(registry)


def test_an_id_no_container_has_is_told(tmp_path, registry, jobs, task, busybox) -> None:
    path = write(str(tmp_path / "a.tar"), [(member("./file", uid=100_000), b"")], busybox)
    with pytest.raises(SysctrError) as caught:
        import_archive(registry, path, "one", run_job=jobs.run_tool, task=task)
    assert "65535" in caught.value.hint
    assert nothing_left(registry)


@pytest.mark.needs("loop")
def test_a_full_disk_leaves_nothing(tmp_path, registry, jobs, task, busybox, monkeypatch) -> None:
    path = write(str(tmp_path / "a.tar"), [(member("./big"), bytes(8 * 1024**2))], busybox)
    with small_disk(registry.directory, 6144):
        # As if another writer took the space after it was looked at.
        monkeypatch.setattr(unpack, "_free_bytes", lambda directory, reserve_bytes: unpack.GIB)
        with pytest.raises(NoSpace):
            import_archive(registry, path, "one", run_job=jobs.run_tool, task=task)
        assert nothing_left(registry)
        monkeypatch.undo()
        with pytest.raises(NoSpace):
            import_archive(registry, path, "one", run_job=jobs.run_tool, task=task)
        assert nothing_left(registry)


def test_a_cancelled_import_leaves_nothing(tmp_path, registry, jobs, task, busybox) -> None:
    path = write(str(tmp_path / "a.tar"), [(member("./big"), bytes(8 * 1024**2))], busybox)
    task.cancel_after = 3
    with pytest.raises(CancelledError):
        import_archive(registry, path, "one", run_job=jobs.run_tool, task=task)
    assert nothing_left(registry)


def test_what_is_no_archive_is_refused_before_anything_is_made(tmp_path, registry, jobs, task) -> None:
    (tmp_path / "text.tar.gz").write_text("hello")
    (tmp_path / "empty").write_text("")
    (tmp_path / "squash").write_bytes(b"hsqs" + bytes(100))
    os.mkfifo(tmp_path / "fifo")
    for name in ("text.tar.gz", "empty", "squash", "fifo", "."):
        with pytest.raises(UsageError):
            import_archive(registry, str(tmp_path / name), "one", run_job=jobs.run_tool, task=task)
    with pytest.raises(NotFound):
        import_archive(registry, str(tmp_path / "gone"), "one", run_job=jobs.run_tool, task=task)
    assert nothing_left(registry)


def test_tiny_is_made_in_less_than_a_second_without_a_mirror(registry, jobs, task, busybox) -> None:
    took_s = []
    # The fastest counts: on a busy machine any one may wait for its turn.
    for _ in range(3):
        if took_s:
            registry.remove("tiny", lambda: ())
        started = time.monotonic()
        template = build.build_template(registry, recipe.load("tiny"), run_job=jobs.run_tool, task=task)
        took_s.append(time.monotonic() - started)
    assert min(took_s) < 1
    assert (template.init_kind, template.stop_signal) == ("busybox", "SIGINT")
    tree = registry.rootfs("tiny")
    assert os.path.realpath(f"{tree}/sbin/init") == f"{tree}/bin/busybox"
    assert os.stat(f"{tree}/bin/busybox").st_uid == 0
    assert stat.S_IMODE(os.stat(f"{tree}/etc/shadow").st_mode) == 0o600
    started_with = b"#!/bin/sh\n"
    with open(f"{tree}/etc/init.d/rcS", "rb") as file:
        assert file.read(len(started_with)) == started_with


def test_a_failing_step_is_named_with_its_words_and_leaves_nothing(registry, jobs, task, busybox) -> None:
    text = """
        schema = 1
        name = "broken"
        version = "1"
        [bootstrap]
        tool = "busybox"
        [[run]]
        name = "fine"
        script = "echo hello; test -c /dev/null; test -d /proc/self; id -u"
        [[run]]
        name = "second"
        script = "echo error: out of luck; exit 3"
    """
    with pytest.raises(SysctrError, match=r"step 'second' failed: error: out of luck"):
        build.build_template(registry, recipe.parse(text), run_job=jobs.run_tool, task=task)
    assert {"hello", "0"} <= set(task.lines)
    assert nothing_left(registry)


def test_a_step_has_no_rights_over_the_host(registry, jobs, task, busybox) -> None:
    text = """
        schema = 1
        name = "nosy"
        version = "1"
        [bootstrap]
        tool = "busybox"
        [[run]]
        name = "look around"
        script = '''
        echo "map $(cat /proc/self/uid_map)"
        ls -l /proc/1/root/ > /dev/null
        ! mknod /disk b 254 0 || exit 9
        ! mount -t ext4 /dev/vda /mnt || exit 9
        ! hostname -F /etc/passwd 2>/dev/null
        echo "links $(ls /sys 2>/dev/null | wc -l) $(ip -o link | wc -l)"
        '''
    """
    build.build_template(registry, recipe.parse(text), run_job=jobs.run_tool, task=task)
    (found,) = [line for line in task.lines if line.startswith("map ")]
    assert found.split()[1:3] == ["0", str(1_900_000_000)]
    assert "links 0 1" in task.lines
    assert socket.gethostname() != "root:x:0:0:root:/root:/bin/sh"


FAR = """
schema = 1
name = "far"
version = "1"
[bootstrap]
tool = "mmdebstrap"
keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
[bootstrap.sources]
bookworm = "http://127.0.0.1:9/debian"
"""


@pytest.mark.needs("mmdebstrap")
def test_an_unreachable_mirror_is_told_apart(registry, jobs, task, monkeypatch) -> None:
    # Nothing listens on the discard port; the host's own mirrors are not asked.
    source = apt.AptSource("http://127.0.0.1:9/debian", "bookworm", ("main",))
    monkeypatch.setattr(apt, "read_host", lambda *_, **__: apt.HostApt((source,)))
    with pytest.raises(MirrorUnreachable) as caught:
        build.build_template(registry, recipe.parse(FAR), run_job=jobs.run_tool, task=task)
    assert "http://127.0.0.1:9/debian" in caught.value.message
    assert "tiny" in caught.value.hint
    assert nothing_left(registry)


@pytest.mark.net
@pytest.mark.needs("mmdebstrap")
def test_a_suite_that_is_not_there_is_told_in_apts_words(registry, jobs, task) -> None:
    text = FAR.replace("bookworm =", "nosuchsuite =").replace("http://127.0.0.1:9/debian", facts.mirror())
    with pytest.raises(SysctrError, match="nosuchsuite Release' does not have a Release file"):
        build.build_template(registry, recipe.parse(text), run_job=jobs.run_tool, task=task)
    assert nothing_left(registry)
