"""Changes of a container's configuration: checked whole, applied where they can be, kept in its file."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from contextlib import ExitStack

from sysctr.cgroup.base import check_enforceable
from sysctr.config import schema, toml
from sysctr.config.mounts import Mount
from sysctr.engine.disks import disk_differs, fit_disk
from sysctr.engine.host import Host
from sysctr.engine.lifecycle import limits_of
from sysctr.engine.mounts import Volume, tables
from sysctr.engine.record import Record
from sysctr.errors import ConfigError, SysctrError, UsageError
from sysctr.network.addresses import random_mac

log = logging.getLogger(__name__)

_DISK = "limits.disk"
# How long a change waits for another one, or for a task, before it is refused.
_PATIENCE_S = 5.0


class Changes:
    """Shows and changes configurations."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def show(self, record: Record) -> dict:
        """Return the text, its values, its digest, what waits for a restart, and the values until then."""
        pending = self.pending(record)
        in_force = self._in_force(record) if pending else None
        return {
            "toml": record.config_text,
            "config": schema.dump_config(record.config) if record.config else None,
            "pending": pending,
            "in_force": schema.dump_config(in_force) if in_force else None,
            "digest": record.digest,
            "error": record.error,
        }

    def apply(self, record: Record, changes: dict) -> dict:
        """Set and unset keys; comments and order of the file stay."""
        wanted = schema.plain_changes(changes)
        with self._held(record) as now:
            return self._apply(now, wanted)

    def _apply(self, record: Record, wanted: dict) -> dict:
        try:
            # Also where the file has a mistake: it may be the very value that is set now.
            return self._replace(record, toml.edit(record.config_text, wanted), record.digest)
        except ConfigError:
            if record.error:
                record.usable("change")
            raise

    def rename(self, record: Record, name: str) -> dict:
        """Give the container another name."""
        return self.apply(record, {"name": name})

    def add_mount(self, record: Record, line: object, *, device: bool = False) -> dict:
        """Add a mount point or a device under a free number; at once where the container runs."""
        with self._held(record) as now:
            key, changes = self._host.mounts.changes_to_add(now, line, device=device)
            return {**self._apply(now, changes), "key": key}

    def remove_mount(self, record: Record, which: str, data: str | None) -> dict:
        """Remove what `find` finds; `data` is "keep" or "delete", and has to be said of a volume."""
        with self._held(record) as now:
            return self._remove_mount(now, which, data)

    def _remove_mount(self, record: Record, which: str, data: str | None) -> dict:
        mounts = self._host.mounts
        found = mounts.find(record, which)
        volume = found if isinstance(found, Volume) else None
        if isinstance(found, Mount) and found.kind in ("volume", "shared"):
            volume = mounts.volume_of(record, found)
        if volume is not None and data is None and (isinstance(found, Volume) or found.kind == "volume"):
            raise UsageError(
                f"cannot remove {which}: it has a volume with data, {volume.name}", "say --keep or --delete"
            )
        unwanted = volume if data == "delete" else None
        if unwanted is not None:
            mounts.refuse_deletion(record, found)
        answer: dict = {"applied": [], "pending": [], "notes": [], "key": ""}
        if not isinstance(found, Volume):
            answer = {**self._apply(record, {found.key: None}), "key": found.key}
        if unwanted is not None and answer["key"] in answer["pending"]:
            answer["notes"].append(f"the volume {unwanted.name} is kept, as it is still mounted")
            unwanted = None
        if unwanted is not None:
            mounts.discard(unwanted)
        return {**answer, "volume": volume.name if volume else "", "deleted": unwanted is not None}

    def replace(self, record: Record, text: str, digest: str) -> dict:
        """Take `text` as the whole configuration, apply what can be applied, and say what waits."""
        with self._held(record) as now:
            return self._replace(now, text, digest)

    @contextlib.contextmanager
    def _held(self, record: Record) -> Iterator[Record]:
        """Hold the container and give what is known of it then: another change may have come first."""
        with self._host.tasks.hold(record.id, "configure", timeout_s=_PATIENCE_S):
            yield self._host.store.load(record.id)

    def _replace(self, record: Record, text: str, digest: str) -> dict:
        host = self._host
        text = with_macs(text)
        new = schema.parse_config(toml.read_container(text))
        old = record.config
        if old is not None:
            schema.refuse_fixed(old, new)
        draft = dataclasses.replace(record, config=new, config_text=text)
        check_enforceable(record.id, limits_of(draft), host.cgroups.available)
        host.network.check(new.name, [nic for nic in new.nets if old is None or nic not in old.nets])
        changed = schema.TABLE.changed(old, new) if old is not None else ()
        waited = self.pending(record)
        in_force = self._in_force(record)
        # The file may have been edited by hand since: what is set is all of it, not the difference.
        limits_differ = in_force is not None and in_force.limits != new.limits
        with ExitStack() as undo:
            self._fit_disk(old, draft, undo)
            followed = host.mounts.follow(draft, old, in_force, undo)
            if limits_differ:
                host.cgroups.set_limits(record.id, limits_of(draft))
            saved = host.store.save_config(record.id, text, digest)
            undo.pop_all()
        if not host.live.running(record.id):
            host.network.forget_others(record.id, new.nets)
        if limits_differ:
            known = toml.edit(record.boot_config, _limits(new))
            saved = host.store.update(record.id, boot_config=known)
        if followed.done:
            known = toml.edit(saved.boot_config, tables(new, followed.done))
            saved = host.store.update(record.id, boot_config=known)
            host.mounts.release_shared()
        if old is None or old.name != new.name:
            host.register_name(saved)
        host.bus.publish("container", id=record.id, change="configured", keys=list(changed))
        pending = self.pending(saved)
        return {
            "applied": [key for key in dict.fromkeys((*changed, *waited)) if key not in pending],
            "pending": pending,
            "digest": saved.digest,
            "notes": list(followed.notes),
        }

    def pending(self, record: Record) -> "list[str]":
        """Return the keys that differ from what is in force and wait for a restart.

        A limit is among them when the file was edited by hand: nobody told the kernel.
        """
        in_force = None if record.boot_config == record.config_text else self._in_force(record)
        if record.config is None or in_force is None:
            return []
        live, waiting = schema.diff_live(in_force, record.config)
        limits = [key for key in live if key.startswith("limits.") and key != _DISK]
        # The disk itself knows its limit, whatever was last told to a cgroup.
        return [*waiting, *limits, *([_DISK] if disk_differs(self._host, record) else [])]

    def _fit_disk(self, old: schema.Container | None, draft: Record, undo: ExitStack) -> None:
        """Give the disk its new limit; where it stays as it is, a pool that is missing does not matter."""
        wanted = draft.config.limits.disk_bytes if draft.config else None
        same = old is not None and old.limits.disk_bytes == wanted
        if same and not disk_differs(self._host, draft):
            return
        before = fit_disk(self._host, draft)
        undo.callback(self._put_back, draft, before)

    def _put_back(self, draft: Record, size_bytes: int | None) -> None:
        try:
            driver = self._host.driver(draft)
            driver.resize(draft.volume, size_bytes, self._host.worker(draft))
        except SysctrError as error:
            # The container runs with a larger disk than it should have, and `info` shows that.
            log.error("%d: %s", draft.id, error.message)

    def _in_force(self, record: Record) -> schema.Container | None:
        """Return what a running container was started with, and its limits as they were set since."""
        if not record.boot_config or not self._host.live.running(record.id):
            return None
        try:
            return schema.parse_config(toml.read_container(record.boot_config))
        except ConfigError:
            return None


def _limits(config: schema.Container) -> dict:
    """Return the changes that make a file's limits those of `config`."""
    given = schema.dump_config(config).get("limits", {})
    names = [key.name for key in schema.KEYS if key.name.startswith("limits.")]
    return {name: given.get(name.partition(".")[2]) for name in names}


def with_macs(text: str) -> str:
    """Return a configuration in which every card has a MAC address, so that it keeps it for good."""
    config = schema.parse_config(toml.read_container(text))
    missing = {f"net.{nic.index}.mac": random_mac() for nic in config.nets if not nic.mac}
    return toml.edit(text, missing) if missing else text
