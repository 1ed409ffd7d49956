"""Replicas that peers keep here: the state of a container there, brought up to date now and then.

A replica is a reservation with volumes, as a migration's is until the end. Its last complete state is a
snapshot of them: what is being received meanwhile is no state at all. Promoted, it becomes the container.
"""

import logging
import secrets
import time
from typing import Any

from sysctr.engine.handover import Target
from sysctr.engine.host import Host
from sysctr.engine.migration_answers import read_answer
from sysctr.engine.migration_arrival import Arrival, draft_record
from sysctr.engine.migration_check import judge, refuse_blocked, volume_names
from sysctr.engine.migration_journal import MID, Entry, MigrationJournal
from sysctr.engine.migration_offer import MOST_GENERATIONS, parse_offer
from sysctr.engine.migration_target import Incoming
from sysctr.engine.peer_records import Peer
from sysctr.engine.peers import Peers
from sysctr.errors import NotFound, Refused, SysctrError, WrongState
from sysctr.linux import fault
from sysctr.peer.channel import Channel, PeerLost
from sysctr.peer.message import Anything, Real, Shape, Whole

log = logging.getLogger(__name__)

_STATE = "replica-"


class Replicas:
    """Keeps replicas, and makes containers of them."""

    def __init__(
        self, host: Host, journal: MigrationJournal, incoming: Incoming, peers: Peers
    ) -> None:
        self._host = host
        self._journal = journal
        self._incoming = incoming
        self._arrival = Arrival(host)
        self._peers = peers
        for op, fields, handler in (
            ("begin", {"offer": Anything()}, self._on_begin),
            ("keep", {"time": Real(0, 1e12), "generation": Whole(0, MOST_GENERATIONS)}, self._on_keep),
            ("status", {}, self._on_status),
            ("drop", {}, self._on_drop),
        ):
            peers.register(f"replica.{op}", Shape({"id": MID, **fields}), handler)

    # What a source may ask

    def _on_begin(self, peer: Peer, message: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Begin a replica, or to bring it up to date."""
        mid, offer = message["id"], parse_offer(message["offer"])
        entry = self._journal.get(mid)
        if entry is not None:
            self._check(entry, peer)
            self._incoming.take_over(mid, channel)
        with self._incoming.working(mid, channel):
            entry = self._journal.get(mid)
            if entry is None:
                entry = self._incoming.reserve(peer, mid, offer, "replica")
            else:
                self._check(entry, peer)
                if entry["phase"] != Target.RECEIVING:
                    raise WrongState(f"cannot replicate {offer.name}: it was promoted there")
                entry = self._renew(entry, peer, offer)
            return {
                "id": entry["number"], "name": entry["name"], "phase": entry["phase"], "kept": [],
            }  # fmt: skip

    def _renew(self, entry: Entry, peer: Peer, offer: Any) -> Entry:
        """Take a new offer of the same container: its settings and volumes may have changed."""
        verdict = judge(self._host, peer, offer, replaced=entry["number"])
        refuse_blocked(offer.name, verdict.blockers)
        names = volume_names(offer, entry["number"])
        volumes = {one.source: [one.pool, names[one.source], one.method] for one in verdict.volumes}
        for volume, place in entry["volumes"].items():
            if volume in volumes and volumes[volume][0] != place[0]:
                raise Refused(
                    f"cannot replicate {offer.name}: volume {volume} is in pool {place[0]} there",
                    "stop the replication and begin it anew to move it",
                )
        entry = self._journal.write(
            entry, offer=offer.as_dict(), text=verdict.text, volumes={**entry["volumes"], **volumes}
        )
        self._arrival.make_volumes(entry, offer)
        return entry

    def _on_keep(self, peer: Peer, message: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Let what was received be the state that the replica has."""
        with self._incoming.known(peer, message, channel) as (entry, session):
            entry = self._replica(entry)
            offer = parse_offer(entry["offer"])
            if session.complete != {one.name for one in offer.volumes}:
                raise WrongState(f"cannot keep the state of {offer.name}: not all of it was received")
            guest = self._arrival.settle(entry, offer)
            name = f"{_STATE}{secrets.token_hex(4)}"
            worker = self._host.worker(draft_record(entry))
            for one in offer.volumes:
                driver, volume = self._arrival.volume(entry, one.name)
                driver.snapshot(volume, name, {}, worker)
            fault.point("replica.in.kept")
            before = entry.get("state", "")
            entry = self._journal.write(
                entry, state=name, taken=message["time"], generation=message["generation"], guest=guest,
                state_text=entry["text"], state_volumes=[one.name for one in offer.volumes],
            )  # fmt: skip
            fault.point("replica.in.noted")
            self._drop_states(entry, name)
            if before:
                self._host.collect_soon()
            return {"number": entry["number"]}

    def _on_status(self, peer: Peer, message: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Say whether a replica was promoted."""
        with self._incoming.known(peer, message, channel) as (entry, _session):
            if entry is None or entry["role"] != "replica":
                return {"known": False, "promoted": False, "generation": 0}
            promoted = entry["phase"] == Target.COMMITTED
            return {"known": True, "promoted": promoted, "generation": int(entry.get("generation") or 0)}

    def _on_drop(self, peer: Peer, message: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Remove a replica; of one that was promoted only that it was one."""
        with self._incoming.known(peer, message, channel) as (entry, _session):
            if entry is not None and entry["role"] == "replica":
                self._drop(entry)
            return {}

    # What the administrator asks

    def list(self) -> "list[dict[str, Any]]":
        """Return every replica that is here."""
        return [
            {
                "id": entry["id"], "role": "replica", "container": entry["number"], "name": entry["name"],
                "peer": entry["peer_name"], "every_s": None, "last": entry.get("taken"), "error": "",
                "promoted": entry["phase"] == Target.COMMITTED,
            }
            for entry in self._journal.all("replica")
        ]  # fmt: skip

    def find(self, ref: str) -> Entry:
        """Return the replica of a container's name, number here, or id; raises NotFound."""
        found = [
            one for one in self._journal.all("replica")
            if ref in (one["id"], one["name"], str(one["number"]))
        ]  # fmt: skip
        if not found:
            raise NotFound(f"cannot find a replica of {ref[:64]}", "`sysctr replicate --list` shows them")
        return found[0]

    def promote(self, entry: Entry, *, fenced: bool) -> int:
        """Make the container of a replica's last state; returns its number.

        Refused while its source answers, and without `fenced` also where that does not: it may run there.
        """
        with self._incoming.working(entry["id"]):
            entry = self._replica(self._journal.get(entry["id"]))
            name = entry["name"]
            if entry["phase"] == Target.COMMITTED:
                raise WrongState(f"cannot promote {name}: it was promoted already")
            if not entry.get("state"):
                raise Refused(f"cannot promote {name}: not one state of it has come yet")
            self._ask_source(entry, fenced=fenced)
            for volume in entry["state_volumes"]:
                driver, here = self._arrival.volume(entry, volume)
                driver.rollback(here, entry["state"])
            entry = self._journal.write(
                entry, phase=Target.COMMITTED.value, text=entry["state_text"],
                generation=int(entry["generation"]) + 1, promoted=round(time.time(), 3),
            )  # fmt: skip
            fault.point("replica.promoted")
            self.finish(entry)
            return int(entry["number"])

    def _ask_source(self, entry: Entry, *, fenced: bool) -> None:
        name, peer = entry["name"], entry["peer_name"]
        try:
            with self._peers.connect(entry["peer"]) as channel:
                answer = channel.call("replica.source", id=entry["id"])
                told = read_answer(channel, "replica.source", answer)
        except PeerLost as error:
            if fenced:
                return
            raise Refused(
                f"cannot promote {name}: {peer} does not answer, and the container may run there",
                f"make sure that it does not and cannot, then --i-fenced-it ({error.message})",
            ) from error
        if told["known"]:
            raise Refused(
                f"cannot promote {name}: {peer} answers, and has the container",
                f"`sysctr migrate {name} …` there moves it",
            )

    def finish(self, entry: Entry) -> None:
        """Create the container of a promoted replica; twice is fine."""
        number = entry["number"]
        if number in self._host.store.reserved():
            self._arrival.create(entry, [])
        self._drop_states(entry, "")

    def drop(self, entry: Entry) -> None:
        """Remove a replica that nobody wants any more."""
        with self._incoming.working(entry["id"]):
            now = self._journal.get(entry["id"])
            if now is not None:
                self._drop(now)

    # Inside

    def _drop(self, entry: Entry) -> None:
        if entry["phase"] == Target.COMMITTED:
            self._journal.remove(entry["id"])
        else:
            self._incoming.discard(entry)

    def _drop_states(self, entry: Entry, but: str) -> None:
        for volume in entry["volumes"]:
            driver, name = self._arrival.volume(entry, volume)
            for one in driver.snapshots(name):
                if one.name.startswith(_STATE) and one.name != but:
                    try:
                        driver.delete_snapshot(name, one.name)
                    except SysctrError as error:
                        log.warning("%d: %s stays: %s", entry["number"], one.name, error.message)

    def _replica(self, entry: Entry | None) -> Entry:
        if entry is None or entry["role"] != "replica":
            raise NotFound("cannot go on with the replica: it is unknown here")
        return entry

    def _check(self, entry: Entry, peer: Peer) -> None:
        if entry["role"] != "replica" or peer.id != entry["peer"]:
            raise NotFound("cannot go on with the replica: it is unknown here")
