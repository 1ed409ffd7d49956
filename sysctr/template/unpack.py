"""Unpacks a tar archive that nobody trusts, as it is or compressed, into a tree.

Decompressing and unpacking happen in one job that has no rights over the host and sees nothing but the new
tree, so that no member can reach outside by construction; this side only feeds the archive, counts, and reads
what tar says.
"""

import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sysctr.errors import NoSpace, NotFound, SysctrError, UsageError
from sysctr.template.base import RunJob, Task
from sysctr.template.jobs import StopReading, run_lines

GIB = 1024**3
CHUNK_BYTES = 1024 * 1024
HEAD_BYTES = 512
RESERVE_BYTES = 256 * 1024**2
_LEFT_OUT_SHOWN = 20
_SHOWN = 200
_LAST_ID = 65_535
_FOREIGN = f"ids above {_LAST_ID} cannot be represented in a container"
# What tar says of other things than members.
_OTHER_LINES = 1000

_MAGIC = (
    (0, b"\x1f\x8b", "gzip"),
    (0, b"\xfd7zXZ\x00", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"BZh", "bzip2"),
    (0, b"\x89LZO\x00\r\n\x1a\n", "lzop"),
    (257, b"ustar", "none"),
)
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
_OTHER_FORMATS = (
    (b"hsqs", "a squashfs image"), (b"PK\x03\x04", "a zip file"), (b"7z\xbc\xaf", "a 7-zip file"),
    (b"VMA\x00", "the backup of a virtual machine"),
)  # fmt: skip

# Prints an archive as tar. ISA-L's igzip reads what every gzip wrote at three times the speed, where it is
# installed.
DECOMPRESS = """\
decompress() {
    case $1 in
    none) cat ;;
    gzip) $(command -v igzip gzip | head --lines=1) --decompress --stdout ;;
    *) "$1" --decompress --stdout ;;
    esac
}
"""
# $1: the most bytes to unpack; $2: how to decompress; the rest: tar and its arguments. `head` cuts an
# archive that unpacks to more, and the decompressor then dies of SIGPIPE (141), which tells it from one that
# is merely damaged.
_PIPELINE = f"""\
{DECOMPRESS}
limit=$1; codec=$2; shift 2
exec 2>&1
decompress "$codec" | head --bytes="$limit" | "$@"
echo "status ${{PIPESTATUS[*]}}"
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
_LIST = (
    "tar", "--list", "--verbose", "--numeric-owner", "--file=-", "--block-number", "--quoting-style=escape",
    "--warning=no-timestamp", "--warning=no-unknown-keyword",
)  # fmt: skip

_MEMBER = re.compile(r"block \d+: (?!tar: |\*\* )")
# Its type and mode, its owners, size or numbers of a device, date and time, name and where a link points to.
_LISTED = re.compile(r"block \d+: (.)\S+ (-?\d+)/(-?\d+) +\S+ \S+ \S+ (.*)")
_POINTS = {"l": " -> ", "h": " link to "}
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
class Outcome:
    """What the job said. `left_out` has the first names only, `nodes` is how many there were."""

    entries: int = 0
    lines: int = 0
    nodes: int = 0
    left_out: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    end_marker: bool = False
    statuses: tuple[int, ...] = ()
    too_many: bool = False


def open_archive(path: str, doing: str) -> int:
    """Return a descriptor of the file at `path`; raises NotFound, or UsageError for what is no file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"cannot {doing}: no such file") from error
    except OSError as error:
        raise SysctrError(f"cannot {doing}: {(error.strerror or '').lower()}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"cannot {doing}: it is not a file", hint="give a tar archive of a rootfs")
    return fd


def detect(head: bytes, doing: str) -> str:
    """Return the program that decompresses an archive beginning with `head`, "none" for plain tar.

    >>> detect(bytes.fromhex("1f8b08"), "import a.tar.xz")
    'gzip'
    """
    for offset, magic, codec in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return codec
    if _ZSTD_SKIPPABLE.match(head):
        return "zstd"
    for magic, what in _OTHER_FORMATS:
        if head.startswith(magic):
            raise UsageError(f"cannot {doing}: it is {what}", hint="give a tar archive of a rootfs")
    raise UsageError(
        f"cannot {doing}: it is no tar archive",
        hint="plain tar, or tar compressed by gzip, xz, zstd, lzop or bzip2; its name does not matter",
    )


def unpack(
    directory: str,
    codec: str,
    feed: Callable[[int], None],
    *,
    doing: str,
    run_job: RunJob,
    task: Task,
    limits: Limits | None = None,
    options: Sequence[str] = (),
    volumes: Sequence[tuple[str, str]] = (),
    reserve_bytes: int = RESERVE_BYTES,
) -> Outcome:
    """Unpack what `feed` writes into `directory`; device nodes are left out, and the task's log says which.

    `options` are further ones of tar, `volumes` (path inside, directory) are mounted in the tree meanwhile.
    So much as `reserve_bytes` stays free for others.
    Raises NoSpace, and SysctrError for a damaged archive or one beyond `limits`; what was unpacked stays.
    """
    limits = limits or Limits()
    # Volumes may share a file system, whose space counts once.
    places = {os.stat(one).st_dev: one for one in (directory, *(path for _, path in volumes))}
    space = sum(_free_bytes(one, reserve_bytes) for one in places.values())
    outcome = Outcome()
    status = run_lines(
        run_job,
        ["bash", "-c", _PIPELINE, "unpack", str(min(limits.unpacked_bytes, space)), codec, *_TAR, *options],
        volume=directory,
        on_line=lambda line: _take_line(line, outcome, limits),
        feed=feed,
        environment={"LC_ALL": "C.UTF-8"},
        volumes=volumes,
        task=task,
    )
    task.check()
    _judge(outcome, status, codec, doing, limits, directory if space < limits.unpacked_bytes else "")
    _tell_left_out(outcome, task)
    return outcome


def examine(
    codec: str,
    feed: Callable[[int], None],
    *,
    doing: str,
    run_job: RunJob,
    task: Task,
    on_member: Callable[[str], None],
    limits: Limits | None = None,
) -> Outcome:
    """Read what `feed` writes as `unpack` would and write nothing; each member's name goes to `on_member`."""
    limits = limits or Limits()
    outcome = Outcome()
    foreign: list[str] = []

    def take(line: str) -> None:
        _take_line(line, outcome, limits)
        if found := _LISTED.fullmatch(line):
            name = found[4].rpartition(_POINTS[found[1]])[0] if found[1] in _POINTS else found[4]
            on_member(name)
            if not (0 <= int(found[2]) <= _LAST_ID and 0 <= int(found[3]) <= _LAST_ID) and not foreign:
                foreign.append(_shortened(f"{name} belongs to {found[2]}/{found[3]}"))

    status = run_lines(
        run_job,
        ["bash", "-c", _PIPELINE, "examine", str(limits.unpacked_bytes), codec, *_LIST],
        volume="",
        on_line=take,
        feed=feed,
        environment={"LC_ALL": "C.UTF-8"},
        task=task,
    )
    task.check()
    _judge(outcome, status, codec, doing, limits, "")
    if foreign:
        raise SysctrError(f"cannot {doing}: {foreign[0]}", _FOREIGN)
    return outcome


def _free_bytes(directory: str, reserve_bytes: int) -> int:
    status = os.statvfs(directory)
    return max(status.f_bavail * status.f_frsize - reserve_bytes, 1)


def _take_line(line: str, outcome: Outcome, limits: Limits) -> None:
    outcome.lines += 1
    # A device node has two, and a member may be called so that its line looks like one of tar's own.
    if outcome.entries > limits.entries or outcome.lines > 2 * limits.entries + _OTHER_LINES:
        outcome.too_many = True
        raise StopReading
    if _MEMBER.match(line):
        outcome.entries += 1
    elif found := _LEFT_OUT.fullmatch(line):
        outcome.nodes += 1
        if len(outcome.left_out) < _LEFT_OUT_SHOWN:
            outcome.left_out.append(found["name"])
    elif line.endswith(": ** Block of NULs **"):
        outcome.end_marker = True
    elif line.startswith("status "):
        outcome.statuses = tuple(int(number) for number in line.split()[1:])
    elif line != _CLOSING and not line.endswith(": ** End of File **") and len(outcome.messages) < 100:
        outcome.messages.append(_shortened(re.sub(r"^block \d+: ", "", line)))


def _shortened(line: str) -> str:
    """Return what people read of a line in which a name of many kilobytes may be."""
    return line if len(line) <= 2 * _SHOWN else f"{line[:_SHOWN]}…{line[-_SHOWN:]}"


def _judge(
    outcome: Outcome, job_status: int, codec: str, doing: str, limits: Limits, short_of_space: str
) -> None:
    """Raise the error that says why the archive was not unpacked whole."""
    if outcome.too_many:
        raise SysctrError(f"cannot {doing}: it holds more than {limits.entries} files")
    if len(outcome.statuses) != 3:
        words = outcome.messages[-1] if outcome.messages else f"exit status {job_status}"
        raise SysctrError(f"cannot {doing}: unpacking was interrupted ({words})")
    decompressor, cutter, tar = outcome.statuses
    if decompressor == 141 and cutter == 0:
        if short_of_space:
            raise NoSpace(f"cannot {doing}: it unpacks to more than there is space in {short_of_space}")
        raise SysctrError(f"cannot {doing}: it unpacks to more than {limits.unpacked_bytes // GIB} GiB")
    words = next((line for line in outcome.messages), "")
    if any(_NO_SPACE.search(line) for line in outcome.messages):
        raise NoSpace(f"cannot {doing}: no space left")
    if any("Cannot change ownership" in line for line in outcome.messages):
        raise SysctrError(f"cannot {doing}: {words}", _FOREIGN)
    if decompressor not in (0, 141):
        raise SysctrError(f"cannot {doing}: it is truncated or damaged{f' ({words})' if words else ''}")
    # tar ends with 2 for device nodes it may not make, and says one line for each.
    if tar != 0 and (tar != 2 or outcome.messages or not outcome.nodes):
        raise SysctrError(f"cannot {doing}: it is truncated or damaged ({words or f'tar: status {tar}'})")
    if not outcome.end_marker:
        # Cut between two members it looks whole; so does gzip, to igzip, cut between two of its own.
        raise SysctrError(f"cannot {doing}: it is truncated (no end-of-archive mark)")


def _tell_left_out(outcome: Outcome, task: Task) -> None:
    task.log(f"{outcome.entries} files unpacked")
    for name in outcome.left_out:
        task.log(f"left out: {name}, a device node (containers get theirs from the host)")
    if outcome.nodes > len(outcome.left_out):
        task.log(f"left out: {outcome.nodes - len(outcome.left_out)} more device nodes")
    for message in outcome.messages:
        task.log(message)
