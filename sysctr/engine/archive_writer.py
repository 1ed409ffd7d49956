"""Writes a container's files as an archive: what vzdump's tar writes, compressed, as a stream.

tar and the compressor run in one job with the container's ids, so owners in the archive are those inside,
and nothing that is in the files reaches the host. The stream passes through this side, which bounds its rate
and counts, and never keeps it.
"""

import errno
import io
import os
import re
import select
import stat
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from sysctr.engine.job import JobRunner
from sysctr.engine.plan import Shifted
from sysctr.engine.tasks import Task
from sysctr.errors import SysctrError
from sysctr.linux.files import wait_ready, write_all
from sysctr.storage.base import RootSpec
from sysctr.template.jobs import line_reader, run_connected

CODECS = ("zstd", "gzip", "lzo", "none")

_PIECE_BYTES = 1 << 20
_RECORD_BYTES = 10240
_CHECKPOINT_RECORDS = 64
# $1: how to compress; the rest: tar and its arguments. What comes first is unpacked from standard input.
_SCRIPT = r"""
set -u
codec=$1; shift
mkdir /tmp/head
tar --extract --file=- --directory=/tmp/head --no-same-owner || exit 90
compress() {
    case $codec in
    none) cat ;;
    lzo) lzop --stdout ;;
    zstd) zstd --quiet --threads=0 --stdout ;;
    gzip) if command -v igzip >/dev/null; then igzip -2 --stdout; else gzip -1 --stdout; fi ;;
    esac
}
"$@" | compress
echo "status ${PIPESTATUS[*]}" >&2
"""
# proxmox.md 2.2, without --one-file-system: what is seen here has no other file system in it. Names of
# access and change times would make two archives of the same files differ, and nobody restores those.
_TAR = (
    "tar", "--create", "--file=-", "--format=posix", "--pax-option=exthdr.name=%d/PaxHeaders/%f",
    "--pax-option=delete=atime,delete=ctime", "--sparse", "--numeric-owner", "--acls", "--xattrs",
    "--xattrs-include=user.*", "--xattrs-include=security.capability", "--quoting-style=escape",
    f"--checkpoint={_CHECKPOINT_RECORDS}", "--checkpoint-action=echo=@@%u", "--totals",
)  # fmt: skip
# An upper's past, which means nothing in a copy of it (sysctr.runtime.layers.MARKS).
MARKS = ("origin", "impure", "uuid", "nlink")

_CHECKPOINT = re.compile(r"tar: @@([0-9]+)")
_TOTAL = re.compile(r"Total bytes written: ([0-9]+) \(.*")
# Of one file: the archive lacks it, or part of it. A name begins with ./ and is escaped.
_OF_A_FILE = re.compile(r"tar: (?:Warning: )?(\./.*?|Cannot [a-z]+ for (?:file )?'\./.*'): (.+)")
_CLOSING = "tar: Exiting with failure status due to previous errors"
_MOST_MESSAGES = 1000


@dataclass(frozen=True)
class Content:
    """What goes into an archive, in its order.

    `head` are small files by their names, `mounts` the views of mount points by their targets inside.
    `exclude` are patterns as vzdump has them: those that begin with / are of whole paths.
    """

    head: tuple[tuple[str, bytes], ...]
    root: RootSpec | Shifted
    mounts: tuple[tuple[str, RootSpec], ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass
class Written:
    """What became of it. `lost` could not be kept, or not as it was; `left_out` never is: sockets."""

    archive_bytes: int = 0
    tar_bytes: int = 0
    lost: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    statuses: tuple[int, ...] = ()


def write_archive(
    jobs: JobRunner,
    task: Task,
    content: Content,
    codec: str,
    out_fd: int,
    *,
    doing: str,
    rate_bytes: int | None = None,
    total_bytes: int | None = None,
) -> Written:
    """Write the archive to `out_fd`; raises SysctrError where it is not whole, OSError of the destination.

    At most `rate_bytes` a second are read. `total_bytes` is about how much tar will write.
    """
    written = Written()
    # No file of the container has such a name: it could not know it.
    token = f".sysctr-{os.urandom(8).hex()}"
    views: dict[str, RootSpec | Shifted] = {"/source": content.root}
    views |= {f"/mounts/{token}-{number}": view for number, (_, view) in enumerate(content.mounts)}
    status = run_connected(
        jobs.run_tool,
        ["bash", "-c", _SCRIPT, "archive", codec, *_tar_arguments(content, token)],
        stdin=lambda fd: _feed_head(content.head, fd),
        stdout=lambda fd: _pump(fd, out_fd, written, rate_bytes, task),
        stderr=line_reader(lambda line: _take_line(line, written, task, total_bytes)),
        views=views,
        environment={"LC_ALL": "C.UTF-8"},
        task=task,
    )
    task.check()
    _name_mounts(written, content, token)
    _judge(written, status, doing)
    return written


def _tar_arguments(content: Content, token: str) -> list[str]:
    arguments = [*_TAR, *(f"--xattrs-exclude=user.overlay.{mark}" for mark in MARKS)]
    for number, (target, _) in enumerate(content.mounts):
        # Neither symbolic links' targets nor anything but what is below this directory has such a name.
        place = re.sub(r"([\\&,])", r"\\\1", f".{target}")
        arguments.append(f"--transform=s,^\\./\\{token}-{number},{place},rSh")
        # What the mount point hides of the root.
        arguments += ["--anchored", f"--exclude=.{_literal(target)}/*"]
    arguments += ["--anchored", "--exclude=./lost+found"]
    for pattern in content.exclude:
        absolute = pattern.startswith("/")
        arguments += ["--anchored" if absolute else "--no-anchored", f"--exclude={'.' * absolute}{pattern}"]
    arguments += ["--directory=/tmp/head", *(name for name, _ in content.head), "--directory=/source", "./"]
    if content.mounts:
        arguments.append("--directory=/mounts")
        arguments += [f"./{token}-{number}" for number in range(len(content.mounts))]
    return arguments


def _literal(path: str) -> str:
    """Return the pattern that only this path fits.

    >>> _literal("/srv/[a]*")
    '/srv/\\\\[a\\\\]\\\\*'
    """
    return re.sub(r"([\\*?\[\]])", r"\\\1", path)


def _feed_head(head: Sequence[tuple[str, bytes]], fd: int) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as out:
        for name, data in head:
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = len(data), 0o644, int(time.time())
            out.addfile(member, io.BytesIO(data))
    write_all(fd, packed.getvalue())


def _pump(from_fd: int, to_fd: int, written: Written, rate_bytes: int | None, task: Task) -> None:
    """Hand the stream on; without a rate the kernel moves it, to a file system that can take it so."""
    began_s = time.monotonic()
    splices = True
    # So much goes into a pipe that is ready without waiting; what a file takes, it takes at once.
    whole_bytes = select.PIPE_BUF if stat.S_ISFIFO(os.fstat(to_fd).st_mode) else _PIECE_BYTES
    while not task.cancelling:
        count = -1
        # A reader that stalls must not keep the task from being cancelled.
        wait_ready(to_fd, select.POLLOUT, task.check)
        if rate_bytes is None and splices:
            try:
                count = os.splice(from_fd, to_fd, _PIECE_BYTES)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                splices = False
        if count < 0:
            data = os.read(from_fd, min(_PIECE_BYTES, max(4096, (rate_bytes or _PIECE_BYTES) // 8)))
            count = len(data)
            for start in range(0, count, whole_bytes):
                wait_ready(to_fd, select.POLLOUT, task.check)
                write_all(to_fd, data[start : start + whole_bytes])
        if not count:
            return
        written.archive_bytes += count
        if rate_bytes is not None:
            _keep_to_rate(began_s, written, rate_bytes, task)


def _keep_to_rate(began_s: float, written: Written, rate_bytes: int, task: Task) -> None:
    """Take nothing for as long as tar has read too much; it waits when the pipes on the way are full."""
    while not task.cancelling:
        count = max(written.tar_bytes, written.archive_bytes)
        ahead_s = began_s + count / rate_bytes - time.monotonic()
        if ahead_s <= 0:
            return
        time.sleep(min(ahead_s, 0.2))


def _take_line(line: str, written: Written, task: Task, total_bytes: int | None) -> None:
    if found := _CHECKPOINT.fullmatch(line):
        written.tar_bytes = int(found[1]) * _RECORD_BYTES
        task.progress(written.tar_bytes, total_bytes and max(total_bytes, written.tar_bytes))
    elif found := _TOTAL.fullmatch(line):
        written.tar_bytes = int(found[1])
    elif line.startswith("status "):
        written.statuses = tuple(int(number) for number in line.split()[1:])
    elif found := _OF_A_FILE.fullmatch(line):
        where = written.left_out if found[2] == "socket ignored" else written.lost
        if len(where) < _MOST_MESSAGES:
            where.append(f"{found[1]}: {found[2]}")
    elif line != _CLOSING and len(written.messages) < _MOST_MESSAGES:
        written.messages.append(line)


def _name_mounts(written: Written, content: Content, token: str) -> None:
    for lines in (written.lost, written.left_out):
        for number, (target, _) in enumerate(content.mounts):
            lines[:] = [line.replace(f"./{token}-{number}", f".{target}") for line in lines]


def _judge(written: Written, job_status: int, doing: str) -> None:
    """Raise the error that says why the stream is no whole archive."""
    words = written.messages[-1] if written.messages else ""
    if len(written.statuses) != 2:
        raise SysctrError(f"cannot {doing}: the job was interrupted ({words or f'status {job_status}'})")
    tar, compressor = written.statuses
    if compressor:
        raise SysctrError(f"cannot {doing}: compressing ended with {compressor} ({words})")
    # 1: a file changed while it was read. 2: also that a file cannot be read, and then the rest is whole.
    if tar not in (0, 1) and (tar != 2 or written.messages or not written.lost):
        raise SysctrError(f"cannot {doing}: tar ended with {tar} ({words})")


