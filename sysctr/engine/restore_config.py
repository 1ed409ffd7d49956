"""The configuration that a restored container gets: what its archive says, as far as that is allowed here.

An archive may come from anybody. What gives a container something of this host is left out unless it is asked
for by name, and judged in what would be written, not where it came from.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sysctr.config import pct, pct_convert, schema, toml
from sysctr.config.pct_notes import NEEDS_PERMISSION, Note
from sysctr.config.pct_reading import Reading
from sysctr.config.schema import Container
from sysctr.config.values import parse_name
from sysctr.engine import firewall
from sysctr.engine.archive_head import Head
from sysctr.engine.changes import with_macs
from sysctr.engine.host import Host
from sysctr.engine.identity import cloned_config
from sysctr.engine.proxmox import unfit
from sysctr.engine.record import Record
from sysctr.errors import ConfigError, SysctrError

# What a plain rootfs gets: a card, as any container that is created.
_PLAIN = {"net.0.name": "eth0"}
# Of each kind; a container has 32 of what can be left out at most.
_MOST_LINES = 200


@dataclass
class Draft:
    """A configuration, and what people should know of it: notes, and what was left out."""

    text: str
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def config(self) -> Container:
        """Return its values."""
        return schema.parse_config(toml.read_container(self.text))

    def edit(self, changes: Mapping[str, Any]) -> None:
        """Change keys."""
        if changes:
            self.text = toml.edit(self.text, dict(changes))


@dataclass(frozen=True)
class Wishes:
    """What whoever restores wants: permissions, a name (empty: the archive's), settings, a new identity."""

    name: str
    allow: frozenset[str]
    changes: Mapping[str, Any]
    renew: bool


@dataclass(frozen=True)
class Here:
    """What this host has: bridges that a card may be on, its own bridge and subnet, MACs of containers."""

    bridges: frozenset[str]
    own_bridge: str
    subnet: str
    # Of limits for swap and cores: which it cannot give, and why.
    unfit: Callable[[object, object], Mapping[str, str]]
    # Those of the cards of other containers.
    macs: frozenset[str] = frozenset()


def archived_name(head: Head, file_name: str, doing: str) -> str:
    """Return the name that an archive's container had, or for a plain rootfs one made of the file's."""
    if head.own is not None:
        return schema.parse_config(toml.read_container(head.own["config"])).name
    if head.foreign is not None:
        return head.foreign.name
    if head.pct:
        try:
            named = pct_convert.from_pct(pct.read(head.pct)).name
        except ConfigError as error:
            raise SysctrError(f"cannot {doing}: {error.message}", error.hint) from error
        if named:
            return named
    return pct_convert.name_of(file_name.partition(".")[0])


def draft(
    head: Head, doing: str, wishes: Wishes, here: Here, known: Container | None = None
) -> Draft:
    """Return the configuration of a container restored from an archive with this head.

    `known` is that of the container which it replaces: what that has of the host, it may have again. Raises
    SysctrError where the archive's own cannot be read.
    """
    try:
        made = _from_archive(head, wishes, here)
        made.notes += firewall.note(head.firewall)
        # The template is where it was made, and nothing of this one stands on it.
        made.edit({"name": parse_name(wishes.name), "template": None})
        _restrict(made, wishes.allow, known)
        _keep_to_bridges(made, here)
        _fit(made, here)
        give_up_macs(made, here)
        if wishes.renew:
            made.text, notes = cloned_config(
                made.text, wishes.name, here.own_bridge, wishes.changes, keep_addresses=False
            )
            made.notes += notes
        else:
            made.edit(schema.plain_changes(wishes.changes))
            made.text = with_macs(made.text)
        schema.parse_config(toml.read_container(made.text))
    except ConfigError as error:
        raise SysctrError(f"cannot {doing}: {error.message}", error.hint) from error
    made.notes, made.left_out = _few(made.notes), _few(made.left_out)
    return made


def _few(lines: list[str]) -> list[str]:
    """Return as many lines as anybody reads: an archive can have a hundred thousand."""
    return lines if len(lines) <= _MOST_LINES else [*lines[:_MOST_LINES], f"{len(lines) - _MOST_LINES} more"]


def _from_archive(head: Head, wishes: Wishes, here: Here) -> Draft:
    if head.own is not None:
        return Draft(head.own["config"])
    start = f"schema = {schema.SCHEMA}\n"
    if head.foreign is not None:
        reading = Reading(wishes.allow, here.bridges, here.subnet)
        head.foreign.convert(reading)
        return _drafted(start, reading.changes, reading.notes, wishes)
    if not head.pct:
        return Draft(toml.edit(start, {"name": wishes.name, **_PLAIN}))
    converted = pct_convert.from_pct(
        pct.read(head.pct), bridges=here.bridges, allow=wishes.allow, managed_subnet=here.subnet
    )  # fmt: skip
    return _drafted(start, converted.changes, converted.notes, wishes)


def _drafted(start: str, changes: Mapping[str, Any], notes: Iterable[Note], wishes: Wishes) -> Draft:
    made = Draft(toml.edit(start, {**changes, "name": wishes.name}))
    for note in notes:
        where = made.left_out if note.kind == NEEDS_PERMISSION else made.notes
        where.append(_words(note))
    return made


def _words(note: Note) -> str:
    text = f"{note.key}: {note.reason}"
    if note.kind == NEEDS_PERMISSION:
        text += f" (--allow {note.permission})"
    return text


def _restrict(made: Draft, allow: Collection[str], known: Container | None) -> None:
    """Take out what has something of the host, unless it is allowed or the replaced container has it."""
    config = made.config
    had = [*known.mounts, *known.devices] if known else []
    edits: dict[str, None] = {}
    for mount in config.mounts:
        if mount.kind in ("bind", "shared") and "bind" not in allow and mount not in had:
            edits[mount.key] = None
            what = f"the host's {mount.source}" if mount.source else f"the shared volume {mount.volume}"
            made.left_out.append(f"{mount.key}: {what} at {mount.target} (--allow bind)")
    for device in config.devices:
        if "device" not in allow and device not in had:
            edits[device.key] = None
            made.left_out.append(f"{device.key}: the host's device {device.path} (--allow device)")
    made.edit(edits)


def give_up_macs(made: Draft, here: Here) -> None:
    """Take out the MACs that others have here: who has the same gets what is sent to them."""
    for nic in made.config.nets:
        if nic.mac and nic.mac in here.macs:
            made.edit({f"net.{nic.index}.mac": None})
            made.notes.append(f"{nic.name}: another container has its MAC {nic.mac}: it gets a new one")


def _keep_to_bridges(made: Draft, here: Here) -> None:
    """Put cards whose bridge this host has not on sysctr's own."""
    edits: dict[str, Any] = {}
    for nic in made.config.nets:
        if nic.bridge and nic.bridge not in here.bridges | {here.own_bridge}:
            prefix = f"net.{nic.index}"
            edits |= {f"{prefix}.bridge": None, f"{prefix}.ip": "managed", f"{prefix}.gateway": None}
            made.notes.append(f"{nic.name}: there is no bridge {nic.bridge} here: it is on {here.own_bridge}")
    made.edit(edits)


def _fit(made: Draft, here: Here) -> None:
    """Take out the limits that this host cannot give: what is restored after a loss must run."""
    limits = made.config.limits
    found = here.unfit(limits.swap_bytes, limits.cores)
    made.edit(dict.fromkeys(found))
    made.notes += [f"{key}: {reason}" for key, reason in found.items()]


def here_of(host: Host, replaced: Record | None = None) -> Here:
    """Return what a host has, but for the container that is replaced."""
    network = host.network
    others = [one.config for one in host.store.list() if replaced is None or one.id != replaced.id]
    return Here(
        network.host_bridges(), network.bridge, str(network.subnet),
        lambda swap, cores: unfit(host, swap, cores),
        frozenset(nic.mac for config in others if config is not None for nic in config.nets),
    )  # fmt: skip
