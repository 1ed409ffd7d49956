"""Every kind of storage there is, by the name an administrator chooses it with."""

from collections.abc import Callable

from sysctr.errors import UsageError
from sysctr.storage.base import Driver
from sysctr.storage.btrfs import BtrfsDriver
from sysctr.storage.loop import LoopDriver
from sysctr.storage.overlay import OverlayDriver
from sysctr.storage.zfs import ZfsDriver

DRIVERS: dict[str, Callable[[str, str], Driver]] = {
    "overlay": OverlayDriver,
    "btrfs": BtrfsDriver,
    "loop": LoopDriver,
    "zfs": ZfsDriver,
}


def open_driver(kind: str, directory: str, run_directory: str) -> Driver:
    """Return the driver of a pool in `directory`, with what lasts until the next boot in `run_directory`."""
    if kind not in DRIVERS:
        raise UsageError(f"cannot use the storage driver {kind!r}: choose one of {', '.join(DRIVERS)}")
    return DRIVERS[kind](directory, run_directory)
