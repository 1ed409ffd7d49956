"""Disks for tests: file systems of their own on loop devices, to be filled, with all that real ones have.

Not tmpfs, which has neither user attributes before Linux 6.6 nor idmapped mounts before 6.3.
"""

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from sysctr.linux.mount import MNT_DETACH, umount2
from tests.wait import wait_until

# The smallest that each mkfs makes, or nearly.
MADE_BY = {
    "ext4": (["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0"], 64 << 20),
    "xfs": (["mkfs.xfs", "-q", "-f"], 320 << 20),
    "btrfs": (["mkfs.btrfs", "-q", "-f"], 256 << 20),
}


@contextmanager
def small_disk(directory: str, size_kib: int, *options: str) -> Iterator[None]:
    """Mount a fresh small ext4 over a directory, closed to all but root; `options` are those of mke2fs."""
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-b", "1024", "-m", "0", *options]
    with _mounted(directory, argv, size_kib * 1024, "loop,noatime,noinit_itable"):
        os.rmdir(f"{directory}/lost+found")
        yield


@contextmanager
def disk(
    directory: str, fstype: str, *options: str, size_bytes: int = 0, quotas: bool = False
) -> Iterator[None]:
    """Mount a fresh ext4, xfs, btrfs or dataset over a directory; `options` are those of its mkfs.

    With `quotas` it keeps limits of projects.
    """
    if fstype == "zfs":
        with _zpool(directory, size_bytes):
            yield
        return
    argv, least_bytes = MADE_BY[fstype]
    features = ["-O", "quota,project"] if quotas and fstype == "ext4" else []
    how = "loop,noatime,prjquota" if quotas else "loop,noatime"
    with _mounted(directory, [*argv, *features, *options], size_bytes or least_bytes, how):
        yield


@contextmanager
def _mounted(directory: str, argv: list[str], size_bytes: int, options: str) -> Iterator[None]:
    image = f"{directory}.image"
    with open(image, "wb") as sparse:
        sparse.truncate(size_bytes)
    subprocess.run([*argv, image], check=True, stdout=subprocess.DEVNULL)
    # The loop device goes with the last user of the mount.
    subprocess.run(["mount", "-o", options, image, directory], check=True)
    try:
        os.chmod(directory, 0o700)
        yield
    finally:
        umount2(directory, MNT_DETACH)
        os.unlink(image)


@contextmanager
def _zpool(directory: str, size_bytes: int) -> Iterator[None]:
    image, name = f"{directory}.image", f"sctest-{secrets.token_hex(4)}"
    with open(image, "wb") as sparse:
        sparse.truncate(size_bytes)
    # Compressed, zeros would take nothing. The file would have the host import it again at its next boot.
    options = ["-O", "compression=off", "-o", "cachefile=none", "-m", directory]
    subprocess.run(["zpool", "create", *options, name, image], check=True)
    try:
        os.chmod(directory, 0o700)
        yield
    finally:
        # What was just unmounted can be busy for a moment.
        destroy = ["zpool", "destroy", "-f", name]
        wait_until(lambda: subprocess.run(destroy, capture_output=True, check=False).returncode == 0)
        os.unlink(image)


def fill(directory: str) -> None:
    """Write files until there is no block left, for small records neither."""
    for chunk in (1 << 20, 4096, 1):
        with contextlib.suppress(OSError), open(f"{directory}/filler-{chunk}", "ab", buffering=0) as file:
            while True:
                file.write(bytes(chunk))
                os.fsync(file.fileno())
    with contextlib.suppress(OSError):
        for number in range(10_000):
            with open(f"{directory}/filler-{number}-small", "xb", buffering=0) as file:
                file.write(b"x")


def fill_inodes(directory: str) -> None:
    """Make files until there is no inode left."""
    with contextlib.suppress(OSError):
        for number in range(100_000):
            with open(f"{directory}/inode-{number}", "x"):
                pass
