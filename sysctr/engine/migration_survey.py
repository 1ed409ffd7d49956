"""What is asked before a container is moved: what it has, what its peer makes of that, what is in the way."""

import contextlib
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sysctr.engine import firewall
from sysctr.engine.host import Host
from sysctr.engine.migration_answers import read_verdict
from sysctr.engine.migration_offer import Offer, OfferedSnapshot, OfferedVolume, Wishes
from sysctr.engine.peer_records import Peer
from sysctr.engine.peers import Peers
from sysctr.engine.record import Record
from sysctr.engine.snapshots import Snapshots, Volume
from sysctr.errors import WrongState
from sysctr.storage.base import Snapshot


@dataclass(frozen=True)
class Options:
    """How a container is moved, or copied."""

    peer: str
    copy: bool = False
    restart: bool = False
    keep: bool = False
    start: bool = False
    number: int | None = None
    name: str = ""
    pools: Mapping[str, str] = field(default_factory=dict)
    bridges: Mapping[str, str] = field(default_factory=dict)
    leave_out: tuple[str, ...] = ()
    rate_bytes: int | None = None
    patience_s: float | None = None
    dry_run: bool = False


class Survey:
    """Looks at a container and asks a peer about it; changes nothing."""

    def __init__(self, host: Host, snapshots: Snapshots, peers: Peers) -> None:
        self._host = host
        self._snapshots = snapshots
        self._peers = peers

    def offer(self, record: Record, options: Options) -> Offer:
        """Return what a peer is told of a container."""
        host = self._host
        volumes = self._snapshots.volumes(record)
        own = host.network.bridge
        wishes = Wishes(
            number=options.number, name=options.name, pools=dict(options.pools),
            bridges={"" if name == own else name: there for name, there in options.bridges.items()},
            leave_out=options.leave_out, copy=options.copy, start=options.start,
        )  # fmt: skip
        return Offer(
            number=record.id, uuid=record.uuid, generation=record.generation, created=record.created,
            config=record.config_text, template=record.template, guest=host.guest_of(record),
            arch=platform.machine(), running=host.live.running(record.id) is not None,
            volumes=tuple(self._offered(record, *one) for one in volumes),
            snapshots=() if options.copy else tuple(self._states(record, volumes)),
            addresses={str(index): ip for index, ip in host.network.by_card(record.id).items()},
            firewall=firewall.kept(host.where, record.id).decode("utf-8", "replace"), wishes=wishes,
        )  # fmt: skip

    def _offered(self, record: Record, driver: Any, volume: str) -> OfferedVolume:
        root = volume == record.volume
        native = driver.traits.native_stream
        own = None if native else driver.usage(volume)
        if own is None:
            own = driver.measure(volume)
        template = self._host.template_of(record) if root else None
        shared = template.size_bytes if template and driver.traits.shared_base else 0
        total = own + shared
        if native:
            # What a snapshot of it has too is not its own as such a pool counts.
            total = max(total, driver.filled(volume) or 0)
            own = max(own, total - shared)
        return OfferedVolume(
            name=volume, pool=self._snapshots.pool_of(driver), kind=driver.kind, root=root,
            native=native, size_bytes=driver.size(volume), own_bytes=own, total_bytes=total,
        )  # fmt: skip

    def _states(self, record: Record, volumes: list[Volume]) -> Iterator[OfferedSnapshot]:
        per_volume: dict[str, dict[str, Snapshot]] = {
            volume: {one.name: one for one in driver.snapshots(volume)} for driver, volume in volumes
        }
        known: set[str] = set()
        for one in self._snapshots.all(record):
            if one.error:
                raise WrongState(
                    f"cannot move {record.title}: its snapshot {one.name} is damaged: {one.error}",
                    f"`sysctr delsnapshot {record.name} {one.name}` takes it away",
                )
            note = one.note
            parents = {
                volume: kept[one.name].parent if kept[one.name].parent in known else ""
                for volume, kept in per_volume.items() if one.name in kept
            }  # fmt: skip
            known.add(one.name)
            expires = note.get("expires")
            yield OfferedSnapshot(
                name=one.name, created=float(note.get("taken") or one.created), parents=parents,
                config=str(note.get("config") or ""), description=str(note.get("description") or ""),
                expires=None if expires is None else float(expires), automatic=bool(note.get("automatic")),
                running=bool(note.get("running")), generation=int(note.get("generation") or 1),
            )  # fmt: skip

    def examine(self, record: Record, options: Options) -> dict[str, Any]:
        """Ask the peer what it would make of a container, and return the beginning of the report."""
        peer = self._peers.get(options.peer)
        offer = self.offer(record, options)
        with contextlib.closing(self._peers.connect(peer.name)) as channel:
            told = channel.call("migrate.check", offer=offer.as_dict())
            verdict = read_verdict(channel, told, {one.name: one.native for one in offer.volumes})
        blockers = [*self._own_blockers(record, peer, offer, options), *verdict["blockers"]]
        cards = record.config.nets if record.config is not None else ()
        before = {nic.name: offer.addresses.get(str(nic.index), "") for nic in cards}
        return {
            "id": record.id, "name": record.name, "peer": peer.name, "blockers": blockers,
            "warnings": verdict["warnings"],
            "there": {
                "id": verdict["id"], "name": verdict["name"], "pool": verdict["pool"],
                "addresses": {
                    name: {"before": before.get(name, ""), "after": after}
                    for name, after in verdict["addresses"].items()
                },
            },
            "volumes": [
                {
                    "name": one["source"], "there": one["pool"], "method": one["method"],
                    "total_bytes": next(v.total_bytes for v in offer.volumes if v.name == one["source"]),
                    "expected_bytes": one["expected_bytes"],
                }
                for one in verdict["volumes"]
            ],
            "snapshots": len(offer.snapshots), "placed": verdict["volumes"], "offer": offer,
            "template": verdict["template"],
        }  # fmt: skip

    def _own_blockers(
        self, record: Record, peer: Peer, offer: Offer, options: Options
    ) -> list[dict[str, str]]:
        found = []

        def block(what: str, text: str, hint: str = "") -> None:
            found.append({"what": what, "text": text, "hint": hint})

        if record.replica is not None and not options.copy:
            block("replica", f"its replica on {record.replica['name']} would be left alone",
                  f"`sysctr replicate {record.name} --stop` first")  # fmt: skip
        if not peer.may_receive:
            block("peer", f"no containers may be sent to {peer.name}", "`sysctr peer restrict` allows it")
        if offer.running and not (options.restart or options.copy):
            block("running", "it is running", "--restart moves it with a short stop")
        return found
