"""What a target makes of a container that is handed over: volumes, snapshots, and at last the container."""

import contextlib
import dataclasses
import re
import uuid
from typing import Any

from sysctr.config import schema, toml
from sysctr.engine import firewall
from sysctr.engine.cloning import renew
from sysctr.engine.host import Host
from sysctr.engine.ids import IdRange
from sysctr.engine.migration_check import drafted, fits, made_unique
from sysctr.engine.migration_journal import Entry
from sysctr.engine.migration_offer import Offer, OfferedSnapshot, parse_offer
from sysctr.engine.record import Record, new_record
from sysctr.errors import SysctrError
from sysctr.linux import fault
from sysctr.storage import tree
from sysctr.storage.base import Driver
from sysctr.template.rootfs_check import check_rootfs

# What a source calls the state that it sends of what changes on.
PRESENT = re.compile(r"tmp-[0-9a-f]{8}")


class Arrival:
    """Works on what a journal's entry describes; every step can be done twice."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def make_volumes(self, entry: Entry, offer: Offer) -> None:
        """Make those that are missing: a daemon may have died in the middle."""
        host = self._host
        record = draft_record(entry)
        template = host.templates.get(entry["template"]) if entry["template"] else None
        for one in offer.volumes:
            pool, name, method = entry["volumes"][one.name]
            driver = host.pools.get(pool)
            if driver.exists(name):
                continue
            base = None
            if one.root and template is not None and method == "rsync":
                base = host.pools.base(template, host.templates.rootfs(template.name), pool)
            driver.create(name, base, host.worker(record), size_bytes=one.size_bytes)
            fault.point("migrate.in.volume")

    def keep(self, entry: Entry, offer: Offer, snapshot: OfferedSnapshot) -> None:
        """Keep the present state of the volumes as a snapshot."""
        host = self._host
        record = draft_record(entry)
        worker = host.worker(record)
        volumes = [one for one in offer.volumes if one.name in snapshot.parents]
        # The root's last: it decides whether there is a snapshot.
        for one in sorted(volumes, key=lambda one: one.root):
            driver, name = self.volume(entry, one.name)
            if any(kept.name == snapshot.name for kept in driver.snapshots(name)):
                continue
            note = self.note(entry, offer, snapshot) if one.root else {}
            driver.snapshot(name, snapshot.name, note, worker)

    def note(self, entry: Entry, offer: Offer, snapshot: OfferedSnapshot) -> dict[str, Any]:
        """Return what is kept with a snapshot; its configuration is judged as the present one was."""
        text = entry["text"]
        if snapshot.config:
            text = drafted(self._host, offer, snapshot.config, entry["name"]).text
        mounts = [
            entry["volumes"][one.name][:2]
            for one in offer.volumes if one.name in snapshot.parents and not one.root
        ]  # fmt: skip
        return {
            "description": snapshot.description, "automatic": snapshot.automatic,
            "expires": snapshot.expires, "config": text, "generation": snapshot.generation,
            "running": snapshot.running, "mounts": mounts, "taken": snapshot.created,
        }  # fmt: skip

    def settle(self, entry: Entry, offer: Offer) -> dict[str, str]:
        """Write all volumes to the disk, and return what is found in the root."""
        config = schema.parse_config(toml.read_container(entry["text"]))
        guest = dataclasses.asdict(offer.guest)
        for one in offer.volumes:
            driver, name = self.volume(entry, one.name)
            # A stream can bring what was not offered, with a configuration that nobody has judged.
            wanted = {*entry["kept"], entry.get("state", "")}
            for state in driver.snapshots(name):
                if state.name not in wanted and PRESENT.fullmatch(state.name) is None:
                    driver.delete_snapshot(name, state.name)
            if one.name in entry["present"]:
                driver.rollback(name, entry["present"][one.name])
            try:
                root = driver.activate(name)
                tree.sync_root(root)
                if one.root and not root.lowers:
                    found = check_rootfs(root.trees[-1].path, config.init)
                    guest = {
                        "init": found.init, "init_kind": found.init_kind, "stop_signal": found.stop_signal,
                        "arch": found.arch, "os_id": found.os_id,
                    }  # fmt: skip
            finally:
                driver.deactivate(name)
        return guest

    def drop_present(self, entry: Entry) -> None:
        """Delete the states that stood for the present while it was sent."""
        for volume in entry["present"]:
            drop_present(*self.volume(entry, volume))

    def create(self, entry: Entry, notes: list[str]) -> None:
        """Turn the reservation into a container with its addresses; what cannot be as it was is noted."""
        try:
            self._create(entry, notes)
        except OSError as error:
            raise tree.explain(error, f"make container {entry['number']}", self._host.where.lib) from error

    def _create(self, entry: Entry, notes: list[str]) -> None:
        host, number = self._host, entry["number"]
        offer = parse_offer(entry["offer"])
        unique = made_unique(host, entry["text"], number, copy=offer.wishes.copy)
        notes += unique.notes
        record = draft_record({**entry, "text": unique.text})
        if any(one.uuid == record.uuid for one in host.store.list()):
            notes.append("another container has its uuid by now: it gets a new one")
            record = dataclasses.replace(record, uuid=str(uuid.uuid4()))
        config = record.usable("take")
        host.network.ensure()
        own = host.network.bridge
        for nic in config.nets:
            wanted = offer.addresses.get(str(nic.index), "")
            if nic.ip == "managed" and (nic.bridge or own) == own and wanted and not offer.wishes.copy:
                with contextlib.suppress(SysctrError):
                    if fits(host, wanted):
                        host.network.allocate(number, nic.index, wanted)
        try:
            host.network.enroll(number, record.name, config.nets)
        except SysctrError as error:
            notes.append(f"the network is not as it was: {error.message}")
        if offer.wishes.copy:
            renew(host, record, None)
        self.drop_present(entry)
        firewall.keep(host.where, number, offer.firewall)
        host.store.create(record)
        host.bus.publish("container", id=number, change="created", peer=entry["peer_name"])

    def volume(self, entry: Entry, name: str) -> tuple[Driver, str]:
        """Return the driver and the name here of a volume of the source."""
        pool, here, _ = entry["volumes"][name]
        return self._host.pools.get(pool), here


def draft_record(entry: Entry) -> Record:
    """Return the record that the container gets."""
    offer = parse_offer(entry["offer"])
    record = new_record(
        entry["number"], entry["text"], IdRange(*entry["idmap"]), template=entry["template"],
        pool=entry["pool"],
    )  # fmt: skip
    # What is known of what is inside stays: the template here may be another one of the same name.
    guest = entry["guest"] or dataclasses.asdict(offer.guest)
    record = dataclasses.replace(record, guest=guest)
    if offer.wishes.copy:
        return record
    # A promoted replica has a higher one than what may come back of its source.
    generation = int(entry.get("generation") or offer.generation)
    return dataclasses.replace(
        record, uuid=offer.uuid, generation=generation, created=offer.created
    )


def drop_present(driver: Driver, volume: str, but: str = "") -> None:
    """Delete the states of a volume that stood for the present, but for one."""
    for one in driver.snapshots(volume):
        if PRESENT.fullmatch(one.name) and one.name != but:
            driver.delete_snapshot(volume, one.name)
