"""Proxmox's pct.conf at the door: a container's settings written as one, and settings read from one."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sysctr.cgroup.base import host_cores
from sysctr.config import host as host_settings
from sysctr.config import pct, schema, toml, values
from sysctr.config.mounts import Mount
from sysctr.config.pct_convert import Converted, from_pct
from sysctr.config.pct_export import Exported, proxmox_arch, proxmox_ostype, to_pct
from sysctr.config.pct_notes import CHANGED, Note, parse_permissions
from sysctr.config.table import Plain
from sysctr.engine.host import Host
from sysctr.engine.record import Record
from sysctr.errors import ConfigError, UsageError
from sysctr.storage.base import Driver

_GIB = 2**30
# What is neither a setting of ours nor one that is missed.
_FACTS = ("arch", "ostype", "unprivileged")


@dataclass(frozen=True)
class Imported:
    """A pct.conf as a container of this host would have it."""

    config: schema.Container
    changes: dict[str, Plain]
    kept: tuple[str, ...]
    notes: tuple[Note, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it as the API sends it, with the text of the file that the container would have."""
        return {
            "name": self.config.name, "template": self.config.template, "toml": toml.new_text(self.config),
            "kept": list(self.kept), "notes": [note.as_dict() for note in self.notes],
        }  # fmt: skip


class Proxmox:
    """Translates; containers are made by those who always make them."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def export(self, record: Record) -> Exported:
        """Return a container's pct.conf, every volume with a size that Proxmox can make it in."""
        config = record.usable("write a pct.conf of")
        guest = self._host.guest_of(record)
        own = [mount for mount in config.mounts if mount.kind == "volume"]
        return to_pct(
            config,
            number=record.id,
            rootfs_size_bytes=self.rootfs_size_bytes(record),
            volume_sizes={mount.index: self.volume_size_bytes(record, mount) for mount in own},
            arch=proxmox_arch(guest.arch or os.uname().machine),
            ostype=proxmox_ostype(guest.os_id),
            memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            managed_bridge=self._host.network.bridge,
        )

    def rootfs_size_bytes(self, record: Record) -> int:
        """Return how large the root file system has to be elsewhere: its limit, or what is in it and more."""
        driver = self._host.pools.of(record, f"look at the disk of {record.id}")
        limit = driver.size(record.volume)
        if limit is not None:
            return limit
        template = self._host.template_of(record)
        # The volume alone is what differs from the template, which the other host has not.
        return room_for(_used_bytes(driver, record.volume) + (template.size_bytes if template else 0))

    def volume_size_bytes(self, record: Record, mount: Mount) -> int:
        """Return the same of a mount point's own volume, which may not be there before the first start."""
        volume = self._host.mounts.volume_of(record, mount)
        if mount.size_bytes is not None:
            return mount.size_bytes
        return room_for(_used_bytes(volume.driver, volume.name) if volume.driver.exists(volume.name) else 0)

    def convert(self, spec: Mapping[str, Any]) -> Imported:
        """Return the settings of a pct.conf for a container of this host, checked; nothing is made."""
        host = self._host
        document = pct.read(spec["pct"])
        converted = from_pct(
            document,
            bridges=host.network.host_bridges(),
            allow=parse_permissions(spec.get("allow") or ()),
            managed_subnet=str(host.network.subnet),
        )
        name = spec.get("name") or converted.name
        if not name:
            raise UsageError("cannot import the pct.conf: it has no host name", "say --name NAME")
        try:
            values.parse_name(name)
        except ConfigError as error:
            raise UsageError(f"cannot import the pct.conf: {error.message}") from error
        changes: dict[str, Plain] = {**host_settings.creation_changes(host.settings), **converted.changes}
        template = spec.get("template") or changes.get("template")
        if not template:
            raise UsageError(
                f"cannot create {name}: no template is named", "`sysctr template list` shows them"
            )
        changes |= {"name": name, "template": template}
        notes = [*converted.notes, *self._host_notes(converted, str(template)), *self._fit(changes)]
        # Every MAC that the file leaves open is chosen when the container is made.
        changes = _changed(changes, schema.plain_changes(spec.get("set") or {}))
        text = toml.edit(f"schema = {schema.SCHEMA}\n", changes)
        config = schema.parse_config(toml.read_container(text))
        return Imported(config, changes, _kept(document.root, notes), tuple(notes))

    def _host_notes(self, converted: Converted, template_name: str) -> list[Note]:
        """Return what the template decides and not the file."""
        template = self._host.templates.get(template_name)
        facts = {
            "arch": (converted.arch, proxmox_arch(template.arch)),
            "ostype": (converted.ostype, proxmox_ostype(template.os_id)),
        }
        return [
            Note(key, f"it was {there}; the template {template.name} is {here}", CHANGED)
            for key, (there, here) in facts.items()
            if there != here
        ]

    def _fit(self, changes: dict[str, Plain]) -> list[Note]:
        """Take out the limits that every Proxmox container has and this host may be unable to give."""
        found = unfit(self._host, changes.get("limits.swap"), changes.get("limits.cores"))
        for key in found:
            del changes[key]
        return [Note(key.removeprefix("limits."), reason, CHANGED) for key, reason in found.items()]


def unfit(host: Host, swap: object, cores: object) -> dict[str, str]:
    """Return which of two limits of a container from elsewhere this host cannot give, and why."""
    found = {}
    if swap is not None and "swap" not in host.cgroups.available:
        found["limits.swap"] = "this host does not count swap: there is no limit"
    here = host_cores()
    if (isinstance(cores, int) and cores > len(here)) or (
        isinstance(cores, tuple) and not frozenset(cores) <= frozenset(here)
    ):
        found["limits.cores"] = f"this host has {len(here)}: there is no limit"
    return found


def room_for(used_bytes: int) -> int:
    """Return a size in whole GiB that holds so much, and half of it and a GiB more.

    >>> room_for(0) // 2**30, room_for(600 * 2**20) // 2**30, room_for(10 * 2**30) // 2**30
    (1, 2, 16)
    """
    return (-(-used_bytes * 3 // (2 * _GIB)) + 1) * _GIB


def _changed(changes: Mapping[str, Plain], by: Mapping[str, Plain | None]) -> dict[str, Plain]:
    """Return changes that others were added to; None takes a key away, or a whole table.

    >>> _changed({"net.0.ip": "managed", "onboot": True}, {"net.0": None, "onboot": False})
    {'onboot': False}
    """
    changed = dict(changes)
    for key, value in by.items():
        if value is None:
            changed = {name: kept for name, kept in changed.items() if not f"{name}.".startswith(f"{key}.")}
        else:
            changed[key] = value
    return changed


def _used_bytes(driver: Driver, volume: str) -> int:
    used_bytes = driver.usage(volume)
    return driver.measure(volume) if used_bytes is None else used_bytes


def _kept(root: pct.Section, notes: list[Note]) -> tuple[str, ...]:
    """Return the keys of a file that go over, if not as they are: all that no note leaves out."""
    left_out = {note.key for note in notes if note.kind != CHANGED}
    keys = [*(["description"] if root.description else []), *sorted(root.values)]
    keys += [f"environment {item.partition('=')[0]}" for item in root.environment]
    keys += dict.fromkeys(key for key, _ in root.raw)
    return tuple(key for key in keys if key not in left_out and key not in _FACTS)
