"""The part of a driver that is only its records: which volumes and snapshots there are, and what is noted."""

from collections.abc import Mapping
from typing import Any

from sysctr.storage.base import Snapshot
from sysctr.storage.volumes import VolumeRecords


class KeepsRecords:
    """Answers from `records` what the protocol of drivers asks about volumes and snapshots."""

    records: VolumeRecords

    def exists(self, volume: str) -> bool:
        """Tell whether the volume is there."""
        return self.records.exists(volume)

    def list(self) -> "list[str]":
        """Return the names of all volumes, sorted."""
        return self.records.list()

    def snapshots(self, volume: str) -> "list[Snapshot]":
        """Return the snapshots of a volume, oldest first; damaged ones are among them and say so."""
        return self.records.snapshots(volume)

    def parent(self, volume: str) -> str:
        """Return the snapshot that the volume's content goes back to, empty for none."""
        return self.records.parent(volume)

    def set_snapshot_note(self, volume: str, name: str, note: Mapping[str, Any]) -> None:
        """Replace what is kept with a snapshot."""
        self.records.set_snapshot_note(volume, name, note)

    def note(self, volume: str) -> "dict[str, Any]":
        """Return what was kept with the volume itself; {} where there is nothing or it is damaged."""
        return self.records.note(volume)

    def set_note(self, volume: str, note: Mapping[str, Any]) -> None:
        """Keep something with the volume."""
        self.records.set_note(volume, note)

    def size(self, volume: str) -> int | None:
        """Return the limit of a volume in bytes; None without one."""
        return self.records.size(volume)
