"""A small disk: an ext4 of its own on a loop device, to be filled, with all that a real one has.

Not tmpfs, which has neither user attributes before Linux 6.6 nor idmapped mounts before 6.3.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from sysctr.linux.mount import MNT_DETACH, umount2


@contextmanager
def small_disk(directory: str, size_kib: int, *options: str) -> Iterator[None]:
    """Mount a fresh file system over a directory, closed to all but root; `options` are those of mke2fs."""
    image = f"{directory}.ext4"
    with open(image, "wb") as sparse:
        sparse.truncate(size_kib * 1024)
    subprocess.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-b", "1024", "-m", "0", *options, image],
        check=True,
    )
    # The loop device goes with the last user of the mount.
    subprocess.run(["mount", "-o", "loop,noatime,noinit_itable", image, directory], check=True)
    try:
        os.rmdir(f"{directory}/lost+found")
        os.chmod(directory, 0o700)
        yield
    finally:
        umount2(directory, MNT_DETACH)
        os.unlink(image)
