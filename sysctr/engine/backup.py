"""Backups: the state of a container, kept for the moment that it takes, written as vzdump's archive.

The container is held only while its state is taken. What is archived then is a snapshot that nobody sees, so
a backup takes as long as it takes and keeps nobody waiting.
"""

import json
import time
from dataclasses import dataclass
from typing import Any

from sysctr import __version__
from sysctr.config import pct
from sysctr.config.backup import CODECS, MODES
from sysctr.engine import firewall, partial
from sysctr.engine.archive_head import CONFIG_MEMBER, FIREWALL_MEMBER, OWN_MEMBER, own_facts
from sysctr.engine.archive_writer import Content, Written, write_archive
from sysctr.engine.archiving import note_success
from sysctr.engine.backup_state import States
from sysctr.engine.host import Host
from sysctr.engine.journal import Journal
from sysctr.engine.lifecycle import Lifecycle
from sysctr.engine.proxmox import Proxmox
from sysctr.engine.record import Record
from sysctr.engine.snapshots import Snapshots
from sysctr.engine.tasks import Task
from sysctr.errors import UsageError
from sysctr.linux import fault

# Of files of a distribution the compressors leave a third to a half; less than this they never do.
_LEAST_SHARE = 0.2

@dataclass(frozen=True)
class BackupOptions:
    """How a backup is made; a rate of None is no limit."""

    directory: str
    mode: str = "snapshot"
    compress: str = "zstd"
    notes: str = ""
    protected: bool = False
    exclude: tuple[str, ...] = ()
    bwlimit_bytes: int | None = None

    def checked(self) -> "BackupOptions":
        """Return it, or raise UsageError."""
        if self.mode not in MODES:
            raise UsageError(f"cannot back up in mode {self.mode!r}: choose of {', '.join(MODES)}")
        if self.compress not in CODECS:
            raise UsageError(f"cannot compress by {self.compress!r}: choose of {', '.join(CODECS)}")
        for pattern in self.exclude:
            if not pattern or "\0" in pattern or "\n" in pattern:
                raise UsageError(f"cannot exclude {pattern!r}: it is no pattern of names")
        return self


class Backups:
    """Makes archives of containers."""

    def __init__(self, host: Host, lifecycle: Lifecycle, snapshots: Snapshots, journal: Journal) -> None:
        self._host = host
        self._lifecycle = lifecycle
        self._snapshots = snapshots
        self.states = States(host, lifecycle, snapshots, journal)

    def sweep(self) -> None:
        """Remove what a crash left of backups."""
        partial.sweep(self._host.where)
        self.states.sweep()

    def check(self, record: Record, options: BackupOptions) -> None:
        """Raise what can be told before anything is done."""
        options.checked()
        if record.damaged:
            record.usable("back up")
        self._snapshots.volumes(record)

    def backup(self, task: Task, number: int, options: BackupOptions) -> dict[str, Any]:
        """Write an archive into a directory; returns its path, its size and what could not be kept."""
        record = self._host.store.load(number)
        self.check(record, options)
        host = self._host
        with partial.writing(host.where, options.directory, number, options.compress) as out:
            expected = self._expected_bytes(record)
            share = 1.0 if options.compress == "none" else _LEAST_SHARE
            partial.check_space(options.directory, int(expected * share))
            with out.saying():
                written, pause_s = self._write(task, record, options, out.file_fd, expected)
            task.step("completing the archive")
            _tell(task, written, pause_s)
            out.complete_with(host.tasks.read_log(task.id), options.notes, protected=options.protected)
        note_success(host, number, out.path, written.archive_bytes)
        host.bus.publish("backup", container=number, archive=out.path, size_bytes=written.archive_bytes)
        return {"archive": out.path, **_result(number, written, pause_s)}

    def stream(self, task: Task, number: int, options: BackupOptions, out_fd: int) -> dict[str, Any]:
        """Write an archive to a descriptor."""
        record = self._host.store.load(number)
        self.check(record, options)
        written, pause_s = self._write(task, record, options, out_fd, self._expected_bytes(record))
        _tell(task, written, pause_s)
        return _result(number, written, pause_s)

    def _write(
        self, task: Task, record: Record, options: BackupOptions, out_fd: int, expected_bytes: int
    ) -> tuple[Written, float | None]:
        with self.states.of(task, record, stop=options.mode == "stop") as state:
            config = record.usable("back up")
            mounts = [
                (mount.target, state.mounts[mount.index])
                for mount in sorted(config.mounts, key=lambda one: one.target.count("/"))
                if mount.index in state.mounts
            ]
            task.step("archiving")
            for mount in config.mounts:
                if mount.index not in state.mounts:
                    task.log(f"not in the archive: {mount.key} ({mount.kind} at {mount.target})")
            content = Content(self._head(task, record), state.root, tuple(mounts), options.exclude)
            written = write_archive(
                self._host.jobs_for(record), task, content, options.compress, out_fd,
                doing=f"back up {record.id}", rate_bytes=options.bwlimit_bytes, total_bytes=expected_bytes,
            )  # fmt: skip
        fault.point("backup.written")
        return written, state.pause_s

    def _head(self, task: Task, record: Record) -> tuple[tuple[str, bytes], ...]:
        """Return the first members: Proxmox's configuration and firewall, and what only we know."""
        guest = self._host.guest_of(record)
        exported = Proxmox(self._host).export(record)
        for note in exported.notes:
            task.log(f"for Proxmox: {note.key}: {note.reason}")
        own = {
            **own_facts(record), "version": __version__, "time": int(time.time()),
            "arch": guest.arch, "os": guest.os_id,
        }  # fmt: skip
        return (
            (CONFIG_MEMBER, pct.write(exported.document).encode()),
            (FIREWALL_MEMBER, firewall.kept(self._host.where, record.id)),
            (OWN_MEMBER, json.dumps(own, indent=1).encode() + b"\n"),
        )

    def _root_bytes(self, record: Record) -> int:
        host = self._host
        used = host.driver(record).usage(record.volume) or 0
        template = host.template_of(record)
        return used + (template.size_bytes if template else 0)

    def _expected_bytes(self, record: Record) -> int:
        """Return about how much the files of a container are."""
        host = self._host
        total = self._root_bytes(record)
        for mount in record.usable("back up").mounts:
            if mount.kind == "volume" and mount.backup:
                volume = host.mounts.volume_of(record, mount)
                total += volume.driver.usage(volume.name) or 0
        return total



def _tell(task: Task, written: Written, pause_s: float | None) -> None:
    """Say in the log what the archive has, and what it lacks."""
    if pause_s is not None:
        task.log(f"paused for {pause_s * 1000:.1f} ms")
    share = f", {100 * written.archive_bytes / written.tar_bytes:.0f} %" if written.tar_bytes else ""
    task.log(f"{written.tar_bytes} bytes of tar, {written.archive_bytes} in the archive{share}")
    for line in written.left_out:
        task.log(f"left out: {line} (who listens there makes it again)")
    for line in (*written.lost, *written.messages):
        task.log(f"NOT KEPT: {line}")


def _result(number: int, written: Written, pause_s: float | None) -> dict[str, Any]:
    return {
        "id": number, "size_bytes": written.archive_bytes, "tar_bytes": written.tar_bytes,
        "pause_ms": None if pause_s is None else round(pause_s * 1000, 2),
        "warnings": [*written.lost, *written.messages],
    }  # fmt: skip

