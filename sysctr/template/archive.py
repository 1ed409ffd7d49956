"""Makes a template of a rootfs archive: tar, as it is or compressed by gzip, xz, zstd or bzip2.

The archive is hostile until proven otherwise. Decompressing and unpacking happen in one job that has no
rights over the host and sees nothing but the new tree, so that no member can reach outside by construction;
this side only feeds the file, hashes it, counts, and reads what tar says.
"""

import hashlib
import os
import re
import stat
from dataclasses import dataclass, field

from sysctr.errors import NoSpace, NotFound, SysctrError, UsageError
from sysctr.storage import tree
from sysctr.template.base import Made, RunJob, Source, Task, Template, check_name
from sysctr.template.jobs import StopReading, run_lines
from sysctr.template.registry import Registry

GIB = 1024**3
_CHUNK_BYTES = 1024 * 1024
_RESERVE_BYTES = 256 * 1024**2
_LEFT_OUT_SHOWN = 20

_MAGIC = (
    (0, b"\x1f\x8b", "gzip"),
    (0, b"\xfd7zXZ\x00", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"BZh", "bzip2"),
    (257, b"ustar", "none"),
)
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
_OTHER_FORMATS = (
    (b"hsqs", "a squashfs image"), (b"PK\x03\x04", "a zip file"), (b"7z\xbc\xaf", "a 7-zip file"),
)  # fmt: skip

# $1: the most bytes to unpack; $2: how to decompress; the rest: tar and its arguments. `head` cuts an
# archive that unpacks to more, and the decompressor then dies of SIGPIPE (141), which tells it from one that
# is merely damaged.
_PIPELINE = """\
limit=$1; codec=$2; shift 2
case $codec in none) unpack=(cat);; *) unpack=("$codec" --decompress --stdout);; esac
exec 2>&1
"${unpack[@]}" | head --bytes="$limit" | "$@"
echo "status ${PIPESTATUS[*]}"
"""
_TAR = (
    "tar", "--extract", "--file=-", "--directory=/volume",
    "--numeric-owner", "--same-owner", "--preserve-permissions", "--delay-directory-restore",
    # trusted.*, security.selinux and ima belong to the host; user.overlay.* would be read as our own marks.
    "--acls", "--xattrs", "--xattrs-include=user.*", "--xattrs-include=security.capability",
    "--xattrs-exclude=user.overlay.*",
    # One line for each member, and no name can look like a message: newlines are escaped.
    "--verbose", "--block-number", "--quoting-style=escape",
    "--warning=no-timestamp", "--warning=no-unknown-keyword",
)  # fmt: skip

_MEMBER = re.compile(r"block \d+: (?!tar: |\*\* )")
_LEFT_OUT = re.compile(r"tar: (?P<name>.*): Cannot mknod: Operation not permitted")
# tar says of a write that the disk cut short only how much of it was written.
_NO_SPACE = re.compile(r"No space left on device|Disk quota exceeded|: Wrote only \d+ of \d+ bytes")
_CLOSING = "tar: Exiting with failure status due to previous errors"


@dataclass(frozen=True)
class Limits:
    """How much an archive may unpack to."""

    unpacked_bytes: int = 64 * GIB
    entries: int = 2_000_000


@dataclass
class _Outcome:
    """What the job said."""

    entries: int = 0
    left_out: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    end_marker: bool = False
    statuses: tuple[int, ...] = ()
    too_many: bool = False


def import_archive(
    registry: Registry, path: str, name: str, *, run_job: RunJob, task: Task, limits: Limits | None = None
) -> Template:
    """Make the template `name` of the archive at `path`; nothing is left if it fails.

    Raises UsageError for a file that is no such archive, NoSpace, NotARootfs, and SysctrError for a damaged
    one or one beyond `limits`.
    """
    check_name(name)
    archive_fd = _open_archive(path)
    try:
        codec = detect(os.pread(archive_fd, 512, 0), path)

        def build(building: str) -> Made:
            return _unpack(building, archive_fd, path, codec, run_job, task, limits or Limits())

        return registry.add(name, build, log_line=task.step)
    finally:
        os.close(archive_fd)


def _open_archive(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"cannot import {path}: no such file") from error
    except OSError as error:
        raise SysctrError(f"cannot import {path}: {(error.strerror or '').lower()}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"cannot import {path}: it is not a file", hint="give a tar archive of a rootfs")
    return fd


def detect(head: bytes, path: str) -> str:
    """Return the program that decompresses an archive beginning with `head`, "none" for plain tar.

    >>> detect(bytes.fromhex("1f8b08"), "a.tar.xz")
    'gzip'
    """
    for offset, magic, codec in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return codec
    if _ZSTD_SKIPPABLE.match(head):
        return "zstd"
    for magic, what in _OTHER_FORMATS:
        if head.startswith(magic):
            raise UsageError(f"cannot import {path}: it is {what}", hint="give a tar archive of a rootfs")
    raise UsageError(
        f"cannot import {path}: it is no tar archive",
        hint="plain tar, or tar compressed by gzip, xz, zstd or bzip2; its name does not matter",
    )


def _unpack(
    building: str, archive_fd: int, path: str, codec: str, run_job: RunJob, task: Task, limits: Limits
) -> Made:
    unpacked = f"{building}/unpacked"
    os.mkdir(unpacked, 0o755)
    os.chmod(unpacked, 0o755)
    file_name = os.path.basename(path)
    task.step(f"unpacking {file_name}")
    space = _free_bytes(building)
    most_bytes = min(limits.unpacked_bytes, space)
    digest = hashlib.sha256()
    outcome = _Outcome()
    status = run_lines(
        run_job,
        ["bash", "-c", _PIPELINE, "unpack", str(most_bytes), codec, *_TAR],
        volume=unpacked,
        on_line=lambda line: _take_line(line, outcome, limits),
        feed=lambda fd: _feed(archive_fd, fd, digest, task),
        environment={"LC_ALL": "C.UTF-8"},
        task=task,
    )
    task.check()
    _judge(outcome, status, codec, path, limits, building if space < limits.unpacked_bytes else "")
    _tell_left_out(outcome, task)
    _take_root(unpacked, f"{building}/rootfs")
    return Made(
        source=Source(kind="archive", name=file_name, digest=f"sha256:{digest.hexdigest()}"),
        description=f"imported from {file_name}",
    )


def _free_bytes(directory: str) -> int:
    status = os.statvfs(directory)
    return max(status.f_bavail * status.f_frsize - _RESERVE_BYTES, 1)


def _feed(archive_fd: int, fd: int, digest: "hashlib._Hash", task: Task) -> None:
    """Write the archive to the job, hash all of it, and tell how far it is."""
    total = os.fstat(archive_fd).st_size
    done = 0
    listening = True
    while data := os.pread(archive_fd, _CHUNK_BYTES, done):
        task.check()
        digest.update(data)
        done += len(data)
        if listening:
            listening = _write_all(fd, data)
        task.progress(done, total)


def _write_all(fd: int, data: bytes) -> bool:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except BrokenPipeError:
        # Whatever follows the end of the archive is not unpacked, but belongs to the file's digest.
        return False
    return True


def _take_line(line: str, outcome: _Outcome, limits: Limits) -> None:
    if _MEMBER.match(line):
        outcome.entries += 1
        if outcome.entries > limits.entries:
            outcome.too_many = True
            raise StopReading
    elif found := _LEFT_OUT.fullmatch(line):
        outcome.left_out.append(found["name"])
    elif line.endswith(": ** Block of NULs **"):
        outcome.end_marker = True
    elif line.startswith("status "):
        outcome.statuses = tuple(int(number) for number in line.split()[1:])
    elif line != _CLOSING and not line.endswith(": ** End of File **") and len(outcome.messages) < 100:
        outcome.messages.append(re.sub(r"^block \d+: ", "", line))


def _judge(
    outcome: _Outcome, job_status: int, codec: str, path: str, limits: Limits, short_of_space: str
) -> None:
    """Raise the error that says why the archive was not unpacked whole."""
    doing = f"cannot import {path}"
    if outcome.too_many:
        raise SysctrError(f"{doing}: it holds more than {limits.entries} files")
    if len(outcome.statuses) != 3:
        words = outcome.messages[-1] if outcome.messages else f"exit status {job_status}"
        raise SysctrError(f"{doing}: unpacking was interrupted ({words})")
    decompressor, cutter, tar = outcome.statuses
    if decompressor == 141 and cutter == 0:
        if short_of_space:
            raise NoSpace(f"{doing}: it unpacks to more than there is space in {short_of_space}")
        raise SysctrError(f"{doing}: it unpacks to more than {limits.unpacked_bytes // GIB} GiB")
    words = next((line for line in outcome.messages), "")
    if any(_NO_SPACE.search(line) for line in outcome.messages):
        raise NoSpace(f"{doing}: no space left")
    if any("Cannot change ownership" in line for line in outcome.messages):
        raise SysctrError(f"{doing}: {words}", hint="ids above 65535 cannot be represented in a container")
    if decompressor not in (0, 141):
        raise SysctrError(f"{doing}: it is truncated or damaged ({words})")
    # tar ends with 2 for device nodes it may not make, and says one line for each.
    if tar != 0 and (tar != 2 or outcome.messages or not outcome.left_out):
        raise SysctrError(f"{doing}: it is truncated or damaged ({words or f'tar: status {tar}'})")
    if codec == "none" and not outcome.end_marker:
        # Compressed formats have an end of their own; plain tar cut between two members looks whole.
        raise SysctrError(f"{doing}: it is truncated (no end-of-archive mark)")


def _tell_left_out(outcome: _Outcome, task: Task) -> None:
    task.log(f"{outcome.entries} files unpacked")
    for name in outcome.left_out[:_LEFT_OUT_SHOWN]:
        task.log(f"left out: {name}, a device node (containers get theirs from the host)")
    if len(outcome.left_out) > _LEFT_OUT_SHOWN:
        task.log(f"left out: {len(outcome.left_out) - _LEFT_OUT_SHOWN} more device nodes")
    for message in outcome.messages:
        task.log(message)


def _take_root(unpacked: str, rootfs: str) -> None:
    """Move the tree to its place: what was unpacked, or the `rootfs` in it of an LXC or Incus archive."""
    names = set(os.listdir(unpacked))
    inner = f"{unpacked}/rootfs"
    # lstat: a `rootfs` that is a symlink points to somebody else's tree.
    if (
        "rootfs" in names
        and not names & {"sbin", "bin", "usr", "etc"}
        and stat.S_ISDIR(os.lstat(inner).st_mode)
    ):
        os.rename(inner, rootfs)
        tree.delete(unpacked)
    else:
        os.rename(unpacked, rootfs)
