"""Makes a template of a rootfs archive: tar, as it is or compressed by gzip, xz, zstd, lzop or bzip2."""

import hashlib
import os
import stat

from sysctr.linux.files import write_all
from sysctr.storage import tree
from sysctr.template.base import Made, RunJob, Source, Task, Template, check_name
from sysctr.template.registry import Registry
from sysctr.template.unpack import CHUNK_BYTES, HEAD_BYTES, Limits, detect, open_archive, unpack


def import_archive(
    registry: Registry, path: str, name: str, *, run_job: RunJob, task: Task, limits: Limits | None = None
) -> Template:
    """Make the template `name` of the archive at `path`; nothing is left if it fails.

    Raises UsageError for a file that is no such archive, NoSpace, NotARootfs, and SysctrError for a damaged
    one or one beyond `limits`.
    """
    check_name(name)
    archive_fd = open_archive(path, f"import {path}")
    try:
        codec = detect(os.pread(archive_fd, HEAD_BYTES, 0), f"import {path}")

        def build(building: str) -> Made:
            return _unpack(building, archive_fd, path, codec, run_job, task, limits)

        return registry.add(name, build, log_line=task.step)
    finally:
        os.close(archive_fd)


def _unpack(
    building: str, archive_fd: int, path: str, codec: str, run_job: RunJob, task: Task, limits: Limits | None
) -> Made:
    unpacked = f"{building}/unpacked"
    os.mkdir(unpacked, 0o755)
    os.chmod(unpacked, 0o755)
    file_name = os.path.basename(path)
    task.step(f"unpacking {file_name}")
    digest = hashlib.sha256()
    unpack(
        unpacked, codec, lambda fd: _feed(archive_fd, fd, digest, task),
        doing=f"import {path}", run_job=run_job, task=task, limits=limits,
    )  # fmt: skip
    _take_root(unpacked, f"{building}/rootfs")
    return Made(
        source=Source(kind="archive", name=file_name, digest=f"sha256:{digest.hexdigest()}"),
        description=f"imported from {file_name}",
    )


def _feed(archive_fd: int, fd: int, digest: "hashlib._Hash", task: Task) -> None:
    """Write the archive to the job, hash all of it, and tell how far it is."""
    total = os.fstat(archive_fd).st_size
    done = 0
    listening = True
    while data := os.pread(archive_fd, CHUNK_BYTES, done):
        task.check()
        digest.update(data)
        done += len(data)
        try:
            if listening:
                write_all(fd, data)
        except BrokenPipeError:
            # Whatever follows the end of the archive is not unpacked, but belongs to the file's digest.
            listening = False
        task.progress(done, total)


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
