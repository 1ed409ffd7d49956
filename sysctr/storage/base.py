"""What every storage driver offers, and how its failures are told.

A driver keeps *volumes*, one for each container, in a pool. Callers ask its `traits`, never its name.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Traits:
    """What a driver can do without copying data."""

    shared_base: bool  # containers of one template share its tree
    cheap_snapshots: bool  # a snapshot costs the same whatever the size
    needs_freeze: bool  # a consistent snapshot of a running container needs it frozen
    enforces_size: bool  # a size limit is kept by the file system
    native_stream: bool  # send and receive have a format of their own


@dataclass(frozen=True)
class RootSpec:
    """How a volume becomes the root of a container: pure data for the plan, nothing is opened.

    The engine makes one idmapped bind of `layers_directory` for all `lowers` (relative to it, top first)
    and one of `volume_directory`, in which `upper` and `work` are.
    """

    pool_directory: str
    layers_directory: str
    lowers: tuple[str, ...]
    volume_directory: str
    upper: str
    work: str


class Driver(Protocol):
    """One way of keeping volumes. Everything stored has the container's own ids: its root is 0 on disk."""

    traits: Traits

    def create(self, volume: str, layers: tuple[str, ...]) -> None:
        """Make an empty volume over `layers` (top first). It exists completely or not at all."""

    def destroy(self, volume: str) -> None:
        """Take a volume away at once; the data may be deleted later. A volume that is not there is fine."""

    def exists(self, volume: str) -> bool:
        """Tell whether the volume is there."""

    def list(self) -> "list[str]":
        """Return the names of all volumes."""

    def mount_spec(self, volume: str) -> RootSpec:
        """Return how the volume is mounted as a root."""

    def usage(self, volume: str) -> int | None:
        """Return the bytes that belong to the volume alone as last measured; None before the first time."""

    def measure(self, volume: str) -> int:
        """Measure the same now, however long it takes."""

    def layer_users(self) -> "dict[str, tuple[str, ...]]":
        """Return for each layer in use the volumes that stand on it."""

    def sweep(self) -> None:
        """Take away what a crash left half-made; called once, before anything else, by the only daemon."""

    def empty_trash(self) -> None:
        """Delete the data of destroyed volumes; may be called again at any time, and after a crash."""
