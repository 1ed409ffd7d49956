"""What containers leave on disk beside their records: notes to rebuild those from, and what nobody owns.

The note of a container's root volume is its record and its configuration once more. So the volumes alone
are enough to have every container back when lib/containers or etc/containers is lost.
"""

import json
import logging
import re
import threading
from dataclasses import replace
from typing import Any

from sysctr.config import schema, toml
from sysctr.engine.host import Host, owner
from sysctr.engine.journal import Journal
from sysctr.engine.record import Record, Saved, format_record, parse_record
from sysctr.engine.snapshots import Snapshots
from sysctr.errors import ConfigError, NotFound, SysctrError
from sysctr.storage.base import Driver

log = logging.getLogger(__name__)

# A container's number, and behind it how often one was restored in the place of another.
_ROOT = re.compile(r"[0-9]+(-[0-9]+)?")

# What a start or an end changes says nothing about a container that is to be rebuilt.
_PASSING: dict[str, Any] = {"boot_config": "", "addresses": (), "exit": None}


class Notes:
    """Keeps the notes of the volumes current; a note that cannot be written is no failure of the action."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._lock = threading.Lock()
        self._known: dict[int, dict[str, Any]] = {}

    def keep(self, number: int) -> bool:
        """Write the note of a container whose record or configuration was written; tell if it differs."""
        try:
            record = self._host.store.load(number)
            if record.damaged or record.error:
                return False
            saved = Saved(**{name: getattr(record, name) for name in Saved.__dataclass_fields__})
            note = {
                "record": json.loads(format_record(replace(saved, **_PASSING))), "config": record.config_text
            }  # fmt: skip
            with self._lock:
                if self._known.get(number) == note:
                    return False
                driver = self._host.driver(record)
                if driver.note(record.volume) != note:
                    driver.set_note(record.volume, note)
                self._known[number] = note
                return True
        except NotFound:
            pass  # destroyed meanwhile
        except (SysctrError, OSError) as error:
            log.warning("%d: its volume's note is not current: %s", number, error)
        return False

    def keep_all(self) -> None:
        """Write what is missing, as on volumes that an earlier version made."""
        for record in self._host.store.list():
            self.keep(record.id)


class Recovery:
    """Rebuilds records from notes, and finds what belongs to nothing."""

    def __init__(self, host: Host, snapshots: Snapshots, journal: Journal) -> None:
        self._host = host
        self._snapshots = snapshots
        self._journal = journal

    def recover(self, *, dry_run: bool) -> dict[str, Any]:
        """Write the records and configurations that are missing; what exists is never touched.

        `recovered` has id, name and what was written; `problems` says of which volumes nothing can be made.
        """
        recovered: list[dict[str, Any]] = []
        problems: list[str] = []
        found: dict[int, list[tuple[str, Driver, str]]] = {}
        host = self._host
        whole = {record.id for record in host.store.list() if not record.error}
        for pool in host.pools.names():
            try:
                driver = host.pools.get(pool)
                volumes = driver.list()
            except SysctrError as error:
                problems.append(error.message)
                continue
            for volume in volumes:
                number = owner(volume)
                if _ROOT.fullmatch(volume) and number not in whole | host.store.reserved():
                    found.setdefault(number, []).append((pool, driver, volume))
        for number in sorted(found):
            # Of two, one has replaced the other, which a crash kept from being destroyed. One that was only
            # going to has no note yet.
            pool, driver, volume = max(found[number], key=lambda one: _generation(one[1].note(one[2])))
            try:
                recovered.append(self._rebuild(driver, volume, dry_run=dry_run))
            except SysctrError as error:
                problems.append(f"pool {pool}, volume {volume}: {error.message}")
        return {"recovered": recovered, "problems": problems, "dry_run": dry_run}

    def _rebuild(self, driver: Driver, volume: str, *, dry_run: bool) -> dict[str, Any]:
        host = self._host
        number = owner(volume)
        note = driver.note(volume)
        if not note:
            raise ConfigError("its note is missing or damaged")
        text = note.get("config")
        try:
            saved = parse_record(number, json.dumps(note.get("record")).encode())
            if not isinstance(text, str):
                raise ConfigError("it has no configuration")
            config = schema.parse_config(toml.read_container(text))
        except ConfigError as error:
            raise ConfigError(f"its note does not hold: {error.message}") from error
        written = host.store.restore(saved, text, dry_run=dry_run)
        if written and not dry_run:
            log.info("%d: rebuilt %s from the note of volume %s", number, " and ".join(written), volume)
            try:
                host.network.enroll(number, config.name, config.nets)
            except SysctrError as error:
                log.warning("%d: %s", number, error.message)
            host.bus.publish("container", id=number, change="created")
        return {"id": number, "name": config.name, "written": written}

    def orphans(self) -> list[str]:
        """Return, in words, what is on disk and belongs to no container and no action that is under way."""
        host = self._host
        records = host.store.list()
        known = {record.id for record in records} | host.store.reserved()
        found = []
        for pool in host.pools.names():
            try:
                volumes = host.pools.get(pool).list()
            except SysctrError:
                continue  # what is wrong with a pool is told as such
            found += [
                f"volume {volume} in pool {pool} belongs to no container"
                for volume in volumes
                if owner(volume) and owner(volume) not in known
            ]
        idle = [record for record in records if not record.error and host.tasks.current(record.id) is None]
        for record in idle:
            found += self._left_in(record)
        found += [
            f"{number}: a {entry['action']} was cut short and is not finished"
            for number, entry in self._journal.pending()
            if host.tasks.current(number) is None
        ]
        return found

    def _left_in(self, record: Record) -> list[str]:
        try:
            half = self._snapshots.half_made(record)
        except SysctrError:
            return []
        return [f"snapshot {name} of volume {volume} was made halfway" for _, volume, name in half]


def _generation(note: dict[str, Any]) -> int:
    """Return the generation in a volume's note, 0 for one without."""
    record = note.get("record")
    generation = record.get("generation") if isinstance(record, dict) else None
    return generation if isinstance(generation, int) else 0
