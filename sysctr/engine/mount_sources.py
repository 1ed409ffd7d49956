"""What mounts and devices are made of, looked at when they are configured: errors come before a start does.

Who opens it at the start looks again: between the two anything may be exchanged.
"""

import os
import stat

from sysctr.config.mounts import Device, Mount, idmap_ranges
from sysctr.errors import ConfigError, NotFound, Refused, UsageError
from sysctr.linux import path as paths


def check_ids(mount: Mount, count: int) -> None:
    """Raise ConfigError where a map names ids that a container with `count` of them has not."""
    for ranges in idmap_ranges(mount.idmap):
        for ids in ranges:
            if ids.inside + ids.count > count:
                raise ConfigError(
                    f"cannot accept {mount.key}.idmap: the container has the ids 0 to {count - 1}, not "
                    f"{ids.inside + ids.count - 1}"
                )


def check_device(device: Device) -> None:
    """Raise NotFound or UsageError for what is no device of this host."""
    try:
        mode = os.lstat(device.path).st_mode
    except OSError as error:
        raise NotFound(
            f"cannot accept {device.key}: {device.path} does not exist on this host",
            "is its driver loaded?",
        ) from error
    if not (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)):
        raise UsageError(f"cannot accept {device.key}: {device.path} is not a device")


def check_source(mount: Mount) -> None:
    """Raise NotFound or Refused where a bind's source is missing, led to by a symlink, or no data."""
    source = mount.source
    parts = source.split("/")
    for depth in range(2, len(parts) + 1):
        part = "/".join(parts[:depth])
        if os.path.islink(part):
            raise Refused(
                f"cannot accept {mount.key}: {part} is a symlink, and what it points to may change",
                f"name the place itself: source={os.path.realpath(source)}",
            )
    try:
        source_fd = os.open(source, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise NotFound(f"cannot accept {mount.key}: {source}: {reason}") from error
    try:
        mode = os.fstat(source_fd).st_mode
        own = paths.kernels_own(source_fd)
    finally:
        os.close(source_fd)
    if own:
        raise Refused(f"cannot accept {mount.key}: {source} is on {own}, which is the kernel's own")
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise Refused(f"cannot accept {mount.key}: {source} is neither a directory nor a file")
