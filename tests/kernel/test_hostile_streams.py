"""Hostile streams of btrfs-send (security.md S10, S13, S32): received by root, they make one subvolume."""

import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sysctr.engine.job import JobRunner
from sysctr.errors import SysctrError
from tests import storage
from tests.storage import Pool

pytestmark = [pytest.mark.root, pytest.mark.kernel, pytest.mark.needs("loop", "btrfs")]

_SUBVOL, _MKFILE, _MKDIR, _MKNOD, _SYMLINK, _RENAME, _LINK, _UNLINK = 1, 3, 4, 5, 8, 9, 10, 11
_SET_XATTR, _WRITE, _CHMOD, _CHOWN, _END = 13, 15, 18, 19, 21
_UUID, _CTRANSID, _INO, _MODE, _UID, _GID, _RDEV = 1, 2, 3, 5, 6, 7, 8
_NAME, _DATA_OF_XATTR, _PATH, _TO, _LINK_TO, _OFFSET, _DATA = 13, 14, 15, 16, 17, 18, 19
NAME = "first"


def _crc32c(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc


def command(number: int, **values: object) -> bytes:
    """Return a command of a stream; the names of values are those of attributes above, in small letters."""
    body = b""
    for name, value in values.items():
        kind = globals()[f"_{name.upper()}"]
        data = value if isinstance(value, bytes) else (
            value.encode() if isinstance(value, str) else struct.pack("<Q", value)
        )
        body += struct.pack("<HH", kind, len(data)) + data
    crc = _crc32c(struct.pack("<IHI", len(body), number, 0) + body)
    return struct.pack("<IHI", len(body), number, crc) + body


def stream(*commands: bytes, name: str = f"{NAME}.rootfs") -> bytes:
    """Return a stream that makes a subvolume with what the commands do to it."""
    first = command(_SUBVOL, path=name, uuid=b"u" * 16, ctransid=7)
    return b"btrfs-stream\0" + struct.pack("<I", 1) + first + b"".join(commands) + command(_END)


def file(path: str, data: bytes = b"evil") -> bytes:
    """Return the commands that make a file with content."""
    return command(_MKFILE, path=path, ino=300) + written(path, data)


def written(path: str, data: bytes = b"evil") -> bytes:
    return command(_WRITE, path=path, offset=0, data=data)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, jobs: JobRunner) -> Iterator[Pool]:
    with storage.pool("btrfs", str(tmp_path_factory.mktemp("pool")), jobs) as made:
        made.driver.create("101", None, made.worker)
        made.snapshot("101", "kept", of="us")
        yield made


@pytest.fixture
def outside(pool: Pool) -> Iterator[Path]:
    """A directory of the host, on the same file system as the pool, with a file that nobody may touch."""
    where = Path(pool.directory, "outside")
    where.mkdir()
    (where / "file").write_text("of the host")
    yield where
    assert sorted(path.name for path in where.iterdir()) == ["file"]
    assert (where / "file").read_text() == "of the host"
    facts = os.stat(where / "file")
    assert (stat.S_IMODE(facts.st_mode) & 0o6000, facts.st_nlink, facts.st_uid) == (0, 1, 0)
    assert os.listxattr(where / "file") == []
    (where / "file").unlink()
    where.rmdir()


def beside(pool: Pool) -> dict[str, object]:
    """Return what there is of the snapshots of the volume."""
    where = Path(pool.directory, "volumes/101/snapshots")
    shown = pool.driver.snapshots("101")
    files = {path.name: path.is_file() and path.read_bytes() for path in where.iterdir()}
    return {"shown": shown, "files": files, "kept": sorted(os.listdir(where / "kept.rootfs"))}


def receive(pool: Pool, data: bytes) -> SysctrError | None:
    """Receive a stream as a snapshot; return the error, and leave nothing."""
    read_fd, write_fd = os.pipe()

    def write() -> None:
        with open(write_fd, "wb") as out:
            try:
                out.write(data)
            except BrokenPipeError:
                pass

    thread = threading.Thread(target=write)
    thread.start()
    try:
        pool.driver.receive("101", NAME, read_fd, {})
    except SysctrError as error:
        return error
    finally:
        os.close(read_fd)
        thread.join()
    return None


def link(path: str, to: str) -> bytes:
    return command(_SYMLINK, path=path, ino=301, link_to=to)


# Of the directory outside, and the same as a way up from where a subvolume is.
ESCAPES: dict[str, Callable[[str, str], list[bytes]]] = {
    "dotdot": lambda _, up: [file(f"{up}/new")],
    "dotdot over a file": lambda _, up: [written(f"{up}/file")],
    "absolute": lambda out, _: [file(f"{out}/new"), written(f"{out}/file")],
    "symlink": lambda out, _: [link("out", out), file("out/new")],
    "symlink over a file": lambda out, _: [link("out", f"{out}/file"), written("out")],
    "relative symlink": lambda _, up: [link("out", up), file("out/new")],
    "hard link": lambda _, up: [
        command(_LINK, path="hard", link_to=f"{up}/file"), written("hard"),
    ],
    "rename out": lambda _, up: [
        file("in"), command(_RENAME, path="in", to=f"{up}/new"),
    ],
    "unlink": lambda out, _: [link("out", out), command(_UNLINK, path="out/file")],
    "mode": lambda out, _: [link("out", out), command(_CHMOD, path="out/file", mode=0o4755)],
    "owner": lambda out, _: [
        link("out", out), command(_CHOWN, path="out/file", uid=1000, gid=1000),
    ],
    "attribute": lambda out, _: [
        link("out", out),
        command(_SET_XATTR, path="out/file", name="user.evil", data_of_xattr=b"1"),
    ],
    "the name": lambda _, up: [command(_SUBVOL, path=f"{up}/new", uuid=b"v" * 16, ctransid=8)],
}  # fmt: skip


# What is written of another snapshot decides what its container may have of the host after a rollback.
BESIDE: dict[str, list[bytes]] = {
    "overwritten": [written("../kept.json")],
    "overwritten by a symlink": [link("out", "../kept.json"), written("out")],
    "removed": [command(_UNLINK, path="../kept.json")],
    "replaced": [file("../new"), command(_RENAME, path="../new", to="../kept.json")],
    "moved": [command(_RENAME, path="../kept.json", to="../other.json")],
    "invented": [file("../other.json")],
    "a directory": [command(_MKDIR, path="../other", ino=302), file("../other/file")],
    "another subvolume": [command(_SUBVOL, path="other", uuid=b"v" * 16, ctransid=8)],
    "in another one": [file("../kept.rootfs/new")],
    "a device node": [command(_MKNOD, path="disk", ino=303, mode=0o60666, rdev=0x700)],
}  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_a_stream_writes_nowhere_else(pool: Pool, outside: Path, name: str) -> None:
    before = beside(pool)
    error = receive(pool, stream(*ESCAPES[name](str(outside), f"{'../' * 30}{outside}")))
    assert error is not None
    assert beside(pool) == before


@pytest.mark.parametrize("name", BESIDE)
def test_a_stream_changes_no_other_snapshot(pool: Pool, name: str) -> None:
    before = beside(pool)
    error = receive(pool, stream(*BESIDE[name]))
    assert error is not None
    assert beside(pool) == before


def test_a_stream_makes_what_it_says(pool: Pool) -> None:
    assert receive(pool, stream(file("file"), link("link", "/etc/passwd"))) is None
    pool.driver.rollback("101", NAME)
    assert pool.read("101", "file") == "evil"
    pool.driver.delete_snapshot("101", NAME)
    assert NAME not in [one.name for one in pool.driver.snapshots("101")]
