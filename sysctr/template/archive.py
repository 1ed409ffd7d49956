"""Makes a template of a rootfs archive: tar, as it is or compressed by gzip, xz, zstd, lzop or bzip2."""

import hashlib
import os

from sysctr.linux.files import write_all
from sysctr.template.base import Made, RunJob, Source, Task, Template, check_name
from sysctr.template.layout import PEEKED_BYTES, find_root, tar_arguments, unpacked_head
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
    rootfs = f"{building}/rootfs"
    file_name = os.path.basename(path)
    task.step(f"unpacking {file_name}")
    head = unpacked_head(run_job, codec, os.pread(archive_fd, PEEKED_BYTES, 0))
    digest = hashlib.sha256()
    unpack(
        rootfs, codec, lambda fd: _feed(archive_fd, fd, digest, task),
        doing=f"import {path}", run_job=run_job, task=task, limits=limits,
        options=tar_arguments({find_root(head): ""}),
    )  # fmt: skip
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
