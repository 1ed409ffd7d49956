"""What a host would make of a container that it is offered, and all that stands in the way, told at once."""

import contextlib
import dataclasses
import platform
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Interface
from typing import Any

from sysctr.cgroup.base import check_enforceable
from sysctr.config import schema, toml, values
from sysctr.config.schema import Container
from sysctr.engine.archive_head import Head
from sysctr.engine.changes import with_macs
from sysctr.engine.host import Host
from sysctr.engine.ids import IdRange
from sysctr.engine.lifecycle import limits_of
from sysctr.engine.migration_offer import Offer, OfferedVolume
from sysctr.engine.peer_records import Peer
from sysctr.engine.record import Record, new_record
from sysctr.engine.restore_config import Draft, Wishes, draft, give_up_macs, here_of
from sysctr.errors import Blocked, Refused, SysctrError
from sysctr.template.base import Template

# What the rest of the pool's users must have left.
_RESERVE_BYTES = 64 << 20


@dataclass(frozen=True)
class Placed:
    """Where a volume of the source goes to, and how: by rsync, or as a stream of its driver's own."""

    source: str
    pool: str
    method: str = "rsync"
    expected_bytes: int | None = None


@dataclass
class Verdict:
    """What becomes of an offer here; with blockers nothing does."""

    number: int | None
    name: str
    pool: str = ""
    template: str = ""
    text: str = ""
    volumes: list[Placed] = field(default_factory=list)
    addresses: dict[str, str] = field(default_factory=dict)
    blockers: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def block(self, what: str, text: str, hint: str = "") -> None:
        """Add a reason why it cannot be."""
        self.blockers.append({"what": what, "text": text, "hint": hint})

    def as_dict(self) -> dict[str, Any]:
        """Return what the source is told."""
        return {
            "id": self.number, "name": self.name, "pool": self.pool, "template": self.template,
            "volumes": [dataclasses.asdict(one) for one in self.volumes], "addresses": self.addresses,
            "blockers": self.blockers, "warnings": self.warnings,
        }  # fmt: skip


def refuse_blocked(title: str, blockers: "list[dict[str, str]]") -> None:
    """Raise Blocked with every reason, one on each line."""
    if blockers:
        lines = "\n".join(f"  {one['what']}: {one['text']}" for one in blockers)
        hints = "\n".join(dict.fromkeys(one["hint"] for one in blockers if one.get("hint")))
        raise Blocked(f"cannot move {title}: {_count(blockers)} in the way\n{lines}", hints)


def _count(blockers: "list[dict[str, str]]") -> str:
    return "one thing is" if len(blockers) == 1 else f"{len(blockers)} things are"


def judge(host: Host, peer: Peer, offer: Offer, *, replaced: int | None = None) -> Verdict:
    """Say what becomes of an offer, and find everything that stands in the way. Nothing is changed.

    `replaced` is the number of an earlier copy that it brings up to date.
    """
    wishes = offer.wishes
    verdict = Verdict(replaced or _number(host, offer), wishes.name or offer.name)
    if not peer.may_send:
        verdict.block("peer", f"{peer.name} may not send containers here", "`sysctr peer restrict` there")
    if offer.arch != platform.machine():
        verdict.block("architecture", f"it is {offer.arch}, and this host is {platform.machine()}")
    if replaced is None:
        _judge_identity(host, offer, verdict)
    _judge_pools(host, peer, offer, verdict)
    _judge_mounts(host, peer, offer, verdict)
    _judge_devices(host, offer, verdict)
    try:
        _judge_settings(host, offer, verdict)
    except SysctrError as error:
        verdict.block("configuration", error.message.partition(": ")[2] or error.message, error.hint)
    return verdict


def _number(host: Host, offer: Offer) -> int | None:
    """Return the number that it would get: as asked, its own where that is free, or the first free one."""
    taken = {record.id for record in host.store.list()} | host.store.reserved()
    wanted = offer.wishes.number
    if wanted is None and not offer.wishes.copy:
        wanted = offer.number if offer.number not in taken else None
    return wanted


def _judge_identity(host: Host, offer: Offer, verdict: Verdict) -> None:
    records = host.store.list()
    if verdict.number is None and not offer.wishes.copy:
        verdict.warnings.append(f"the number {offer.number} is taken there: it gets another one")
    if offer.wishes.number is not None and (
        offer.wishes.number in host.store.reserved() | {record.id for record in records}
    ):
        verdict.block("id", f"the number {offer.wishes.number} is taken there", "leave --as out")
    if any(record.name == verdict.name for record in records):
        hint = "`sysctr rename` gives one of them another name"
        verdict.block("name", f"a container there is called {verdict.name}", hint)
    same = next((record for record in records if record.uuid == offer.uuid), None)
    if same is not None and not offer.wishes.copy:
        words = "has handed over" if same.away else "is the same container"
        hint = f"there: `sysctr destroy {same.name}`"
        verdict.block("identity", f"{same.title} there {words} (uuid {offer.uuid})", hint)


def _judge_pools(host: Host, peer: Peer, offer: Offer, verdict: Verdict) -> None:
    wanted: dict[str, int] = defaultdict(int)
    base = template_here(host, offer)
    verdict.template = base.name if base else ""
    if offer.template and base is None:
        verdict.warnings.append(f"the template {offer.template} is not there: it is sent too, once")
    missing: set[str] = set()
    streams = True
    for one in offer.volumes:
        pool = offer.wishes.pools.get(one.pool, one.pool)
        expected = one.own_bytes if one.root and base else one.total_bytes
        verdict.volumes.append(Placed(one.name, pool, expected_bytes=expected))
        if one.root:
            verdict.pool = pool
        if pool in missing:
            continue
        if peer.pools and pool not in peer.pools:
            missing.add(pool)
            hint = _pool_hint(one.pool, peer.pools)
            verdict.block("pool", f"{peer.name} may not use pool {pool} there", hint)
            continue
        try:
            driver = host.pools.get(pool)
        except SysctrError as error:
            missing.add(pool)
            verdict.block("pool", error.message.partition(": ")[2] or error.message,
                          _pool_hint(one.pool, host.pools.names()))  # fmt: skip
            continue
        if one.size_bytes is not None and not driver.traits.enforces_size:
            verdict.block("disk", f"pool {pool} there ({driver.kind}) cannot enforce the size of {one.name}",
                          f"`sysctr set {offer.name} limits.disk=` takes the limit off")  # fmt: skip
        streams = streams and one.native and driver.traits.native_stream and driver.kind == one.kind
        wanted[pool] += expected or 0
    # A root that stands on a template here has only to be told what differs from that. What is sent as
    # streams is of one moment, in all volumes.
    if streams and not base and not missing:
        verdict.volumes = [dataclasses.replace(one, method="stream") for one in verdict.volumes]
    for pool, needed in wanted.items():
        with contextlib.suppress(OSError):
            free = host.pools.room(pool).free_bytes - _RESERVE_BYTES
            if needed > free:
                verdict.block(
                    "space",
                    f"it needs {_mib(needed)} in pool {pool} there, and {_mib(max(free, 0))} are free",
                    "make room there, or choose another with --pool-map",
                )  # fmt: skip


def _judge_mounts(host: Host, peer: Peer, offer: Offer, verdict: Verdict) -> None:
    """Find pools that only a configuration names: a volume that is missing is made at the next start."""
    known = {verdict.pool, *(one.pool for one in verdict.volumes)}
    kept = {one.config for one in offer.snapshots if one.config} - {offer.config}
    for text in (offer.config, *sorted(kept)):
        for mount in schema.parse_config(toml.read_container(text)).mounts:
            if mount.kind != "volume" or not mount.pool:
                continue
            pool = offer.wishes.pools.get(mount.pool, mount.pool)
            if pool in known:
                continue
            known.add(pool)
            if peer.pools and pool not in peer.pools:
                hint = _pool_hint(mount.pool, peer.pools)
                verdict.block("pool", f"{peer.name} may not use pool {pool} there, as {mount.key} does", hint)
            elif text == offer.config and pool not in host.pools.names():
                hint = _pool_hint(mount.pool, host.pools.names())
                verdict.block("pool", f"there is no pool {pool} there, which {mount.key} is in", hint)


def _pool_hint(source: str, pools: "tuple[str, ...] | list[str]") -> str:
    return f"--pool-map {source}=POOL; there is {', '.join(pools)}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB"


def template_here(host: Host, offer: Offer) -> Template | None:
    """Return the template of this host that the root can stand on, None for none.

    It need not be the very same: whatever differs is sent.
    """
    if not offer.template:
        return None
    with contextlib.suppress(SysctrError):
        found = host.templates.get(offer.template)
        return found if found.arch in ("", offer.arch, offer.guest.arch) else None
    return None


def _judge_devices(host: Host, offer: Offer, verdict: Verdict) -> None:
    """Find what belongs to the source's host and to no container."""
    config = schema.parse_config(toml.read_container(offer.config))
    for mount in config.mounts:
        if mount.kind in ("bind", "shared") and "bind" not in offer.wishes.leave_out:
            what = f"the host's {mount.source}" if mount.source else f"the shared volume {mount.volume}"
            hint = "--leave-out bind moves it without"
            verdict.block("bind", f"{mount.key} is {what} at {mount.target}", hint)
    for device in config.devices:
        if "device" not in offer.wishes.leave_out:
            hint = "--leave-out device moves it without"
            verdict.block("device", f"{device.key} is the host's {device.path}", hint)
    bridges = host.network.host_bridges() | {host.network.bridge}
    for nic in config.nets:
        wanted = offer.wishes.bridges.get(nic.bridge, nic.bridge)
        if wanted and wanted not in bridges:
            hint = f"--bridge-map {nic.bridge}=BRIDGE; there is {', '.join(sorted(bridges))}"
            verdict.block("bridge", f"{nic.name} is on {wanted}, which is not there", hint)


def _judge_settings(host: Host, offer: Offer, verdict: Verdict) -> None:
    made = drafted(host, offer, offer.config, verdict.name)
    record = _record(made.config, made.text)
    try:
        check_enforceable(record.id, limits_of(record), host.cgroups.available)
    except SysctrError as error:
        verdict.block("limits", error.message.partition(": ")[2] or error.message, error.hint)
    verdict.warnings += made.notes
    # What was asked to be left out needs no more words; nothing else is.
    verdict.text = made.text
    verdict.addresses = _addresses(host, offer, made.config)
    if offer.wishes.copy:
        return
    for nic in made.config.nets:
        before = offer.addresses.get(str(nic.index), "")
        if before and not verdict.addresses.get(nic.name, before):
            verdict.warnings.append(f"{nic.name} cannot keep {before} there: it gets another address")


def _record(config: Container, text: str) -> Record:
    """Return a record that only serves to look at the limits of a configuration."""
    return new_record(values.FIRST_CONTAINER_ID, text, IdRange(1, 1), pool=config.name)


def _addresses(host: Host, offer: Offer, config: Container) -> dict[str, str]:
    """Return which address each managed card would have; empty where that is not known before."""
    network = host.network
    taken = _taken(host)
    found = {}
    for nic in config.nets:
        if nic.ip == "manual" or (nic.bridge or network.bridge) != network.bridge:
            continue
        wanted = nic.ip.partition("/")[0] if nic.ip != "managed" else offer.addresses.get(str(nic.index), "")
        kept = wanted and not offer.wishes.copy and fits(host, wanted) and wanted not in taken
        found[nic.name] = wanted if kept else ""
    return found


def _taken(host: Host, but: int = 0) -> set[str]:
    """Return the addresses that containers have here, all but one of them."""
    return {ip for number, ips in host.network.all_addresses().items() for ip in ips if number != but}


def fits(host: Host, ip: str) -> bool:
    """Tell whether an address is one that this host's network gives out."""
    try:
        address = IPv4Interface(ip).ip
    except ValueError:
        return False
    subnet = host.network.subnet
    return address in subnet and address not in (
        subnet.network_address, subnet.network_address + 1, subnet.broadcast_address,
    )  # fmt: skip


def drafted(host: Host, offer: Offer, text: str, name: str) -> Draft:
    """Return a configuration of the offer as this host takes it: the present one, or that of a snapshot."""
    wishes = offer.wishes
    config = schema.parse_config(toml.read_container(text))
    edits: dict[str, Any] = {}
    for nic in config.nets:
        # The empty name is the source's own bridge, as it is this host's where nothing else is asked for.
        if nic.bridge in wishes.bridges:
            edits[f"net.{nic.index}.bridge"] = wishes.bridges[nic.bridge]
    for mount in config.mounts:
        if mount.kind == "volume" and mount.pool in wishes.pools:
            edits[f"{mount.key}.pool"] = wishes.pools[mount.pool]
    edited = toml.edit(text, edits) if edits else text
    head = Head(own={"config": edited, "uuid": offer.uuid, "id": offer.number, "generation": 0})
    made = draft(
        head, f"move {offer.name}", Wishes(name, frozenset(), {}, wishes.copy), here_of(host), None
    )
    if config.template and template_here(host, offer) is not None:
        # An archive's is left out, for nothing of it stands on one: this does.
        made.edit({"template": config.template})
    if not wishes.copy:
        _fit_addresses(host, made)
    return made


def _fit_addresses(host: Host, made: Draft, number: int = 0) -> None:
    """Take an address off a card that this host's network cannot give it, or another container has."""
    network, taken = host.network, _taken(host, number)
    for nic in made.config.nets:
        if "/" not in nic.ip or (nic.bridge or network.bridge) != network.bridge:
            continue
        ip = nic.ip.partition("/")[0]
        if not fits(host, ip) or ip in taken:
            made.edit({f"net.{nic.index}.ip": "managed", f"net.{nic.index}.gateway": None})
            made.notes.append(f"{nic.name} cannot keep the address {nic.ip} there: it is given another one")


def made_unique(host: Host, text: str, number: int, *, copy: bool) -> Draft:
    """Return a configuration without what others have here by now: it was judged when it was offered."""
    made = Draft(text)
    give_up_macs(made, here_of(host))
    if not copy:
        _fit_addresses(host, made, number)
    made.text = with_macs(made.text)
    return made


def volume_names(offer: Offer, number: int) -> Mapping[str, str]:
    """Return what each volume of the source is called here."""
    return {one.name: f"{number}{offer.own_part(one.name)}" for one in offer.volumes}


def own_of(offer: Offer, name: str) -> OfferedVolume:
    """Return the volume of a name; raises Refused for one that was not offered."""
    found = next((one for one in offer.volumes if one.name == name), None)
    if found is None:
        raise Refused(f"cannot take volume {values.shown(name)}: it was not offered")
    return found
