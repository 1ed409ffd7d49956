"""Bringing a container back to one of its snapshots: volumes and configuration, all of it or nothing.

From the first volume on there is no way back, so a crash is finished by the next daemon: every step can be
done twice.
"""

import logging
from typing import Any

from sysctr.config import schema, toml, values
from sysctr.engine.host import Host
from sysctr.engine.journal import Journal
from sysctr.engine.lifecycle import Lifecycle
from sysctr.engine.record import Record
from sysctr.engine.snapshots import Snapshots
from sysctr.engine.tasks import Task
from sysctr.errors import ConfigError, Refused, SysctrError, WrongState
from sysctr.linux import fault
from sysctr.storage.base import Snapshot

log = logging.getLogger(__name__)


class Rollback:
    """Rolls containers back."""

    def __init__(self, host: Host, lifecycle: Lifecycle, snapshots: Snapshots, journal: Journal) -> None:
        self._host = host
        self._lifecycle = lifecycle
        self._snapshots = snapshots
        self._journal = journal

    def check(self, record: Record, name: str) -> Snapshot:
        """Return the snapshot; raises where the container cannot be rolled back to it."""
        if record.config is not None and record.config.protected:
            raise Refused(
                f"cannot roll back {record.id}: it is protected", f"`sysctr protect {record.id} --off` first"
            )
        if record.damaged:
            record.usable("roll back")
        snapshot = self._snapshots.get(record, name)
        if snapshot.error:
            raise SysctrError(
                f"cannot roll back {record.id}: snapshot {name} is damaged: {snapshot.error}",
                f"`sysctr delsnapshot {record.id} {name}` takes it away",
            )
        _configuration(record, snapshot)
        self._volumes(record, snapshot)
        return snapshot

    def carry_out(self, task: Task, number: int, name: str) -> dict[str, Any]:
        """Roll a container back; one that runs is killed for it and runs again afterwards."""
        host = self._host
        record = host.store.load(number)
        snapshot = self.check(record, name)
        live = host.live.running(number)
        generation = record.generation + 1
        if live is not None:
            task.step("stopping")
            self._lifecycle.note_restart(number, 0)
            try:
                # Nothing that it could still write in its own volumes would be kept.
                self._lifecycle.stop(task, number, kill=True)
                fault.point("rollback.stopped")
            except BaseException:
                self._journal.clear(number)
                raise
        elif not host.live.wait_settled(number, 30):
            raise WrongState(f"cannot roll back {number}: its end is still being put away")
        task.step(f"going back to {name}")
        restored: list[str] = []
        try:
            self._journal.write(number, "rollback", name=name, generation=generation, start=live is not None)
            notes = self._restore(record, snapshot, generation, restored)
        except BaseException as error:
            if not restored:
                self._journal.clear(number)
                if live is not None:
                    self._lifecycle.quietly(self._lifecycle.start, task, number)
            elif isinstance(error, SysctrError):
                error.hint = (
                    f"`sysctr rollback {number} {name}` again, else the next start of the daemon does it"
                )
            raise
        self._journal.clear(number)
        for note in notes:
            task.log(note)
        host.bus.publish("container", id=number, change="rollback", snapshot=name)
        host.collect_soon()
        if live is not None:
            task.step("starting")
            self._lifecycle.start(task, number)
        return {"id": number, "snapshot": name, "started": live is not None, "notes": notes}

    def finish(self, record: Record, entry: dict[str, Any]) -> bool:
        """Finish what a crash cut short; True if the container has to be started then."""
        name = str(entry["name"])
        log.info("%d: finishing the rollback to %s that a crash cut short", record.id, name)
        snapshot = self._snapshots.get(record, name)
        self._restore(record, snapshot, int(entry["generation"]), [])
        self._journal.clear(record.id)
        return bool(entry.get("start"))

    def _restore(self, record: Record, snapshot: Snapshot, generation: int, restored: list[str]) -> list[str]:
        """Do the steps from the journal on; returns what an administrator should know."""
        host = self._host
        host.release(record.id)
        for driver, volume in self._volumes(record, snapshot):
            driver.rollback(volume, snapshot.name)
            restored.append(volume)
            fault.point("rollback.volume.restored")
        rolled = {record.volume, *(volume for _, volume in snapshot.note.get("mounts", []))}
        notes = [
            f"volume {volume} is no part of the snapshot and is kept as it is"
            for _, volume in self._snapshots.volumes(record)
            if volume not in rolled
        ]
        text = self._text(record, snapshot, notes)
        saved = host.store.save_config(record.id, text)
        fault.point("rollback.config.written")
        saved = host.store.update(record.id, generation=generation, boot_config="")
        fault.point("rollback.record.written")
        self._enroll(record, saved, notes)
        fault.point("rollback.network.done")
        return notes

    def _text(self, record: Record, snapshot: Snapshot, notes: list[str]) -> str:
        """Return the configuration of the snapshot, with what cannot be as it was then."""
        host = self._host
        text = _configuration(record, snapshot)
        config = schema.parse_config(toml.read_container(text))
        changes: dict[str, Any] = {}
        taken = {other.name for other in host.store.list() if other.id != record.id}
        if config.name in taken:
            notes.append(
                f"the name {config.name} is another container's now: this one is still {record.name}"
            )
            changes["name"] = record.name
        # A volume's limit is what it is: changing it later was no change of the container's state.
        size_bytes = host.driver(record).size(record.volume)
        if config.limits.disk_bytes != size_bytes:
            changes["limits.disk"] = None if size_bytes is None else values.format_size(size_bytes)
        return toml.edit(text, changes) if changes else text

    def _enroll(self, before: Record, after: Record, notes: list[str]) -> None:
        host = self._host
        if before.config is not None and before.config.nets == after.config.nets:
            host.register_name(after)
            return
        kept = {nic.index for nic in after.config.nets}
        for nic in before.config.nets if before.config is not None else ():
            if nic.index not in kept:
                host.network.release(after.id, nic.index)
        try:
            host.network.enroll(after.id, after.name, after.config.nets)
        except SysctrError as error:
            notes.append(f"the network is not as it was: {error.message}")

    def _volumes(self, record: Record, snapshot: Snapshot) -> list:
        """Return the volumes that the snapshot has, the root first; raises where one is gone."""
        wanted = {volume for _, volume in snapshot.note.get("mounts", [])} | {record.volume}
        found = [
            (driver, volume)
            for driver, volume in reversed(self._snapshots.volumes(record))
            if volume in wanted
        ]
        having = {
            volume
            for driver, volume in found
            if any(one.name == snapshot.name for one in driver.snapshots(volume))
        }
        missing = sorted(wanted - having)
        if missing:
            raise Refused(
                f"cannot roll back {record.id}: the volume {missing[0]}, a part of snapshot {snapshot.name}, "
                "is gone, or its pool is",
                f"`sysctr clone {record.id} NAME --snapshot {snapshot.name}` makes a container of the rest",
            )
        return found


def _configuration(record: Record, snapshot: Snapshot) -> str:
    """Return the text of the configuration that was kept with a snapshot; raises SysctrError."""
    text = snapshot.note.get("config")
    try:
        if not isinstance(text, str):
            raise ConfigError("none was kept")
        schema.parse_config(toml.read_container(text))
    except ConfigError as error:
        raise SysctrError(
            f"cannot roll back {record.id}: the configuration kept with {snapshot.name} does not hold: "
            f"{error.message}",
            f"`sysctr clone {record.id} NAME --snapshot {snapshot.name}` makes a container of its files",
        ) from error
    return text
