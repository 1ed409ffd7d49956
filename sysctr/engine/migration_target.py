"""Taking a container that a peer hands over: a reservation with volumes until the peer has given it up.

Every message may come again, after a broken connection or a restart of either daemon. What a message asks for
is on the disk before it is answered.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

from sysctr.engine import handover
from sysctr.engine.handover import Action, Target
from sysctr.engine.host import Host
from sysctr.engine.lifecycle import Lifecycle
from sysctr.engine.migration_arrival import PRESENT, Arrival, draft_record, drop_present
from sysctr.engine.migration_check import (
    judge,
    own_of,
    refuse_blocked,
    volume_names,
)
from sysctr.engine.migration_journal import ARRIVING, Entry, MigrationJournal
from sysctr.engine.migration_offer import Offer, OfferedSnapshot, parse_offer
from sysctr.engine.migration_streams import Exchange, receive_stream, taking
from sysctr.engine.peer_records import Peer
from sysctr.engine.tree_sync import receive_tree
from sysctr.errors import NotFound, Refused, SysctrError, WrongState
from sysctr.linux import fault
from sysctr.peer.channel import Channel
from sysctr.storage import tree
from sysctr.storage.base import Streams

log = logging.getLogger(__name__)

_HANDOVER_S = 60.0
# Each holds a number, a block of ids and room on the disk until its source speaks again.
_MOST = {"target": 16, "replica": 256}


class _Session:
    """One migration as its connections go on: at most one works on it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # Who works on it or waits for that.
        self.users = 0
        self.channel: Channel | None = None
        # The volumes whose last pass ended well, since this daemon began.
        self.complete: set[str] = set()
        # The source, or the administrator, has said since this daemon began that the container is ours.
        self.confirmed = False


class Incoming:
    """Receives containers."""

    def __init__(
        self, host: Host, lifecycle: Lifecycle, journal: MigrationJournal, discard: Callable[[int], None]
    ) -> None:
        self._host = host
        self._lifecycle = lifecycle
        self._journal = journal
        self._discard = discard
        self._arrival = Arrival(host)
        self._lock = threading.Lock()
        self._sessions: dict[str, _Session] = {}
        # Held from the last look at what is here until what is new is written down.
        self._reserving = threading.Lock()

    # What a source may ask

    def check(self, peer: Peer, message: dict[str, Any], _channel: Channel) -> dict[str, Any]:
        """Say what would become of an offer."""
        return judge(self._host, peer, parse_offer(message["offer"])).as_dict()

    def begin(self, peer: Peer, message: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Reserve what a container needs and make its volumes; one that was begun already goes on."""
        mid: str = message["id"]
        entry = self._journal.get(mid)
        if entry is not None:
            self._check(entry, peer)
            self.take_over(mid, channel)
        with self.working(mid, channel):
            entry = self._journal.get(mid)
            if entry is None:
                entry = self.reserve(peer, mid, parse_offer(message["offer"]))
            else:
                self._check(entry, peer)
                _refuse_unwelcome(peer, entry)
                verdict = handover.target_accepts(entry["phase"], "begin")
                if not verdict.allowed:
                    raise WrongState(f"cannot begin migration {mid}: it is {verdict.answer} already")
                if entry["phase"] == Target.RECEIVING:
                    self._arrival.make_volumes(entry, parse_offer(entry["offer"]))
            return {"id": entry["number"], "name": entry["name"], "phase": entry["phase"],
                    "kept": entry["kept"]}  # fmt: skip

    def sync(self, peer: Peer, message: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Make a volume what the source sends, by rsync."""
        with self._receiving(peer, message, channel) as (entry, session):
            volume = own_of(parse_offer(entry["offer"]), str(message["volume"])).name
            driver, name = self._arrival.volume(entry, volume)
            with self._taking(session, volume, channel) as exchange:
                try:
                    root = driver.activate(name)
                    received = receive_tree(
                        self._host.jobs_for(draft_record(entry)), None, root, exchange,
                        mode=str(message["mode"]), still=bool(message["still"]),
                    )  # fmt: skip
                    # Not when the container stands still: by then there is little left to write.
                    tree.sync_root(root)
                finally:
                    driver.deactivate(name)
            return {"digest": received.digest}

    def stream(self, peer: Peer, message: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Make a snapshot of a volume of a stream of its driver's own: an offered one, or the present."""
        with self._receiving(peer, message, channel) as (entry, session):
            offer, snapshot = parse_offer(entry["offer"]), str(message["snapshot"])
            volume = own_of(offer, str(message["volume"])).name
            present = PRESENT.fullmatch(snapshot) is not None
            note: dict[str, Any] = {}
            if not present:
                offered = _offered(offer, snapshot)
                if volume == offer.root.name:
                    note = self._arrival.note(entry, offer, offered)
            driver, name = self._arrival.volume(entry, volume)
            if entry["volumes"][volume][2] != "stream" or not driver.traits.native_stream:
                raise Refused(f"cannot take volume {volume} as a stream: that was not agreed")
            if any(one.name == snapshot for one in driver.snapshots(name)):
                # It came before a connection broke, and nobody knows of it.
                driver.delete_snapshot(name, snapshot)
            # The one that this is sent from stays until the source goes by another: it may never learn that
            # this one came.
            drop_present(driver, name, but=str(message["base"]))
            with self._taking(session, volume, channel) as exchange:
                receive_stream(cast(Streams, driver), name, snapshot, note, exchange)
                if present:
                    self._journal.write(entry, present={**entry["present"], volume: snapshot})
            return {}

    @contextlib.contextmanager
    def _taking(self, session: _Session, volume: str, channel: Channel) -> Iterator[Exchange]:
        """Let the source send a stream to a volume; it is complete when that has ended well."""
        session.complete.discard(volume)
        with taking(channel, {}) as exchange:
            yield exchange
        fault.point("migrate.in.synced")
        session.complete.add(volume)

    def turn(self, peer: Peer, message: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Bring a volume back to a snapshot that it has here, as what comes next goes back to that."""
        with self._receiving(peer, message, channel) as (entry, session):
            volume = own_of(parse_offer(entry["offer"]), str(message["volume"])).name
            snapshot = str(message["snapshot"])
            if snapshot not in entry["kept"]:
                raise NotFound(f"cannot go back to snapshot {snapshot[:64]!r}: it is not kept here")
            driver, name = self._arrival.volume(entry, volume)
            session.complete.discard(volume)
            driver.rollback(name, snapshot)
            return {}

    def keep(self, peer: Peer, message: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Keep the present state of the volumes as one of the snapshots that were offered."""
        with self._receiving(peer, message, channel) as (entry, session):
            offer = parse_offer(entry["offer"])
            wanted = str(message["snapshot"])
            snapshot = _offered(offer, wanted)
            if wanted not in entry["kept"]:
                if not snapshot.parents.keys() <= session.complete:
                    raise WrongState(f"cannot keep snapshot {wanted}: not all of it was received")
                self._arrival.keep(entry, offer, snapshot)
                self._journal.write(entry, kept=[*entry["kept"], wanted])
            session.complete.clear()
            fault.point("migrate.in.kept")
            return {}

    def prepare(self, peer: Peer, message: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Get ready to own the container: all of it is on the disk, and now only the source decides."""
        with self.known(peer, message, channel) as (entry, session):
            if entry is None or entry["role"] != "target":
                return {"answer": "unknown"}
            offer = parse_offer(entry["offer"])
            complete = session.complete == {one.name for one in offer.volumes} and all(
                one.name in entry["kept"] for one in offer.snapshots
            )
            verdict = handover.target_accepts(entry["phase"], "prepare", complete=complete)
            if verdict.allowed and entry["phase"] == Target.RECEIVING:
                guest = self._arrival.settle(entry, offer)
                entry = self._journal.write(entry, phase=Target.PREPARED.value, guest=guest)
                self._arrival.drop_present(entry)
                fault.point("migrate.in.prepared")
            return {"answer": verdict.answer}

    def commit(self, peer: Peer, message: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Own the container: make it, and start it where that is wished."""
        with self.known(peer, message, channel) as (entry, session):
            verdict = handover.target_accepts(entry["phase"] if entry else None, "commit")
            if not verdict.allowed or entry is None:
                return {"answer": verdict.answer}
            session.confirmed = True
            return {"answer": verdict.answer, **self._finish(entry, start=bool(message["start"]))}

    def abort(self, peer: Peer, message: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Remove all that was received; one that is unknown was removed already."""
        entry = self._journal.get(message["id"])
        if entry is not None and peer.id == entry["peer"]:
            self.take_over(entry["id"], channel)
        with self.known(peer, message, channel) as (entry, _session):
            verdict = handover.target_accepts(entry["phase"] if entry else None, "abort")
            if entry is not None and verdict.allowed:
                self.discard(entry)
            return {"answer": verdict.answer}

    def forget(self, peer: Peer, message: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Drop the journal of a container that was taken: its source knows."""
        with self.known(peer, message, channel) as (entry, session):
            verdict = handover.target_accepts(entry["phase"] if entry else None, "forget")
            if entry is not None and verdict.allowed:
                # It may have to be started still: this daemon may not be the one that took it.
                session.confirmed = True
                self._finish(entry, start=bool(entry["start"]))
                self._journal.remove(entry["id"])
            return {"answer": verdict.answer}

    # What goes on by itself, and what the administrator decides

    def recover(self) -> None:
        """Hold again what was being received when the last daemon died, and finish what is ours."""
        for entry in self._journal.all(*ARRIVING):
            number = entry["number"]
            reserved = number in self._host.store.reserved() and self._host.store.adopt(number)
            action = handover.recover_target(entry["phase"])
            if action is Action.FINISH and reserved:
                self._arrival.create(entry, [])
            elif action is Action.DISCARD:
                self.discard(entry)
            elif action is Action.WAIT and not reserved:
                # Its reservation is lost, and what it had with it.
                log.error("migration %s: nothing is left here of container %d", entry["id"], number)
                self._journal.remove(entry["id"])

    def told(self, mid: str, outcome: handover.Outcome, start: bool) -> None:
        """Act on what the source says became of a migration."""
        with self.working(mid) as session:
            entry = self._journal.get(mid)
            if entry is None:
                return
            action = handover.target_on_outcome(entry["phase"], outcome)
            if action is Action.DISCARD:
                log.info("%d: removing what %s did not hand over", entry["number"], entry["peer_name"])
                self.discard(entry)
            elif action in (Action.CREATE, Action.FINISH):
                session.confirmed = True
                self._finish(entry, start=start)
            elif action is Action.CONFLICT:
                words = f"{entry['peer_name']} says that it is {outcome}, and it is {entry['phase']} here"
                self._journal.write(entry, error=words)

    def decide_here(self, mid: str, *, raises_generation: bool) -> None:
        """Own the container because the administrator says so."""
        with self.working(mid) as session:
            entry = self._journal.get(mid)
            if entry is not None:
                session.confirmed = True
                entry = self._journal.write(entry, decided="here")
                self._finish(entry, start=bool(entry["start"]))
                if raises_generation:
                    record = self._host.store.load(entry["number"])
                    self._host.store.update(record.id, generation=record.generation + 1)

    def decide_there(self, mid: str) -> None:
        """Remove the copy because the administrator says so."""
        self.take_over(mid, None)
        with self.working(mid):
            entry = self._journal.get(mid)
            if entry is not None:
                # It may be the last whole one: nothing of it goes before that is decided for good.
                self._journal.write(entry, phase=Target.ABORTED.value)
                self.discard(entry)

    def undo(self, mid: str) -> None:
        """Remove what is left of a copy that is not wanted."""
        with self.working(mid):
            entry = self._journal.get(mid)
            if entry is not None:
                self.discard(entry)

    def is_confirmed(self, mid: str) -> bool:
        """Tell whether it is known, since this daemon began, that a container is ours."""
        entry = self._journal.get(mid)
        decided = entry is not None and entry.get("decided") == "here"
        return decided or self._session(mid).confirmed

    def talking(self, mid: str) -> bool:
        """Tell whether a connection works on a migration now."""
        with self._lock:
            session = self._sessions.get(mid)
        return session is not None and session.lock.locked()

    # Inside

    def reserve(self, peer: Peer, mid: str, offer: Offer, role: str = "target") -> Entry:
        """Reserve what a container needs, and make its volumes."""
        host = self._host
        verdict = judge(host, peer, offer)
        refuse_blocked(offer.name, verdict.blockers)
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as looking:
            looking.enter_context(self._reserving)
            self._refuse_another(peer, offer, role)
            number = host.store.reserve(verdict.name, verdict.number)
            undo.callback(host.store.release, number)
            idmap = host.store.allocate_ids(number)
            names = volume_names(offer, number)
            entry: Entry = {
                "id": mid, "role": role, "phase": Target.RECEIVING.value, "number": number,
                "name": verdict.name, "peer": peer.id, "peer_name": peer.name,
                "offer": offer.as_dict(), "text": verdict.text, "template": verdict.template,
                "pool": verdict.pool, "idmap": [idmap.first, idmap.count], "kept": [], "guest": None,
                "present": {},
                "volumes": {one.source: [one.pool, names[one.source], one.method] for one in verdict.volumes},
                # As far as is known here: the source says it when it gives it up, an administrator does not.
                "start": offer.wishes.start or (offer.running and not offer.wishes.copy),
                "started": False, "since": round(time.time(), 3),
            }  # fmt: skip
            undo.callback(self._discard, number)
            entry = self._journal.write(entry)
            undo.callback(self._journal.remove, mid)
            looking.close()
            fault.point("migrate.in.reserved")
            self._arrival.make_volumes(entry, offer)
            undo.pop_all()
        host.bus.publish("migration", id=mid, change="receiving", container=number, peer=peer.name)
        return entry

    def _refuse_another(self, peer: Peer, offer: Offer, role: str) -> None:
        """Raise an error where a peer has too many on their way, or this very container is on its way."""
        others = self._journal.all(role)
        if sum(one["peer"] == peer.id for one in others) >= _MOST[role]:
            raise Refused(
                f"cannot take {offer.name}: {_MOST[role]} from there are not finished",
                "`sysctr migrations` shows what is on its way",
            )
        if not offer.wishes.copy and any(
            one["offer"]["uuid"] == offer.uuid and not one["offer"]["wishes"]["copy"] for one in others
        ):
            raise WrongState(f"cannot take {offer.name}: it is on its way here already (uuid {offer.uuid})")

    def _finish(self, entry: Entry, *, start: bool) -> dict[str, Any]:
        """Make the container of what was received, and start it where that is wished; twice is fine."""
        host, number = self._host, entry["number"]
        if entry["phase"] != Target.COMMITTED:
            entry = self._journal.write(entry, phase=Target.COMMITTED.value, start=start, error="")
            fault.point("migrate.in.committed")
        notes: list[str] = []
        if number in host.store.reserved():
            self._arrival.create(entry, notes)
            fault.point("migrate.in.created")
        error = ""
        if entry["start"] and not entry["started"]:
            error = self._start(number)
            self._journal.write(entry, started=True)
        fault.point("migrate.in.started")
        return {
            "id": number, "name": entry["name"], "started": host.live.running(number) is not None,
            "addresses": list(host.network.addresses(number)), "notes": notes, "error": error,
        }  # fmt: skip

    def _start(self, number: int) -> str:
        """Start what was taken; returns why that failed, if it did: the container is here all the same."""
        try:
            task = self._lifecycle.submit_start(number)
        except SysctrError as error:
            return error.message
        task.wait(_HANDOVER_S)
        return "" if task.state == "done" else (task.error or {}).get("message", "it takes very long")

    def discard(self, entry: Entry) -> None:
        """Remove all that was received of a container; twice is fine."""
        host, number = self._host, entry["number"]
        with contextlib.suppress(SysctrError):  # on a full disk the room comes from what is removed
            # Half a copy must not look like a prepared one.
            entry = self._journal.write(entry, phase=Target.ABORTED.value)
        if number in host.store.reserved():
            self._discard(number)
            host.network.release(number)
            host.store.release(number)
        self._journal.remove(entry["id"])
        host.collect_soon()
        host.bus.publish("migration", id=entry["id"], change="undone", container=number)

    def _session(self, mid: str) -> _Session:
        with self._lock:
            return self._sessions.setdefault(mid, _Session())

    def _leave(self, mid: str, session: _Session) -> None:
        """Forget a session that nobody else waits for, of a migration that is over."""
        with self._lock:
            session.users -= 1
            if not session.users and self._journal.get(mid) is None:
                self._sessions.pop(mid, None)

    def take_over(self, mid: str, channel: Channel | None) -> None:
        """End the connection that works on a migration: that it broke may not be known here yet."""
        with self._lock:
            session = self._sessions.get(mid)
        stale = session.channel if session is not None else None
        if stale is not None and stale is not channel:
            stale.abort()

    @contextlib.contextmanager
    def working(self, mid: str, channel: Channel | None = None) -> Iterator[_Session]:
        """Give what is known of a migration since this daemon began, to one at a time."""
        with self._lock:
            session = self._sessions.setdefault(mid, _Session())
            session.users += 1
        try:
            if not session.lock.acquire(timeout=_HANDOVER_S):
                raise WrongState(f"cannot go on with migration {mid}: something works on it")
            try:
                session.channel = channel
                yield session
            finally:
                session.channel = None
                session.lock.release()
        finally:
            self._leave(mid, session)

    @contextlib.contextmanager
    def known(
        self, peer: Peer, message: dict[str, Any], channel: Channel
    ) -> Iterator[tuple[Entry | None, _Session]]:
        """Give the entry that a message is about, None where it is unknown."""
        mid: str = message["id"]
        with self.working(mid, channel) as session:
            entry = self._journal.get(mid)
            # Of others' migrations nobody is told.
            known = entry is not None and entry["role"] in ARRIVING and peer.id == entry["peer"]
            yield (entry if known else None), session

    @contextlib.contextmanager
    def _receiving(
        self, peer: Peer, message: dict[str, Any], channel: Channel
    ) -> Iterator[tuple[Entry, _Session]]:
        """Give the entry that a message is about, where its volumes may be changed."""
        with self.known(peer, message, channel) as (entry, session):
            verdict = handover.target_accepts(entry["phase"] if entry else None, "sync")
            if entry is None or not verdict.allowed:
                raise WrongState(f"cannot go on with migration {message['id']}: it is {verdict.answer} there")
            _refuse_unwelcome(peer, entry)
            yield entry, session

    def _check(self, entry: Entry, peer: Peer) -> None:
        if entry["role"] not in ARRIVING or peer.id != entry["peer"]:
            # As if there were none: of others' migrations nobody is told.
            raise NotFound(f"cannot go on with migration {entry['id']}: it is unknown here")


def _refuse_unwelcome(peer: Peer, entry: Entry) -> None:
    """Raise Refused for what a peer has not handed over yet, and may not hand over any more."""
    if entry["phase"] != Target.RECEIVING:
        return
    if not peer.may_send:
        raise Refused(f"cannot take {entry['name']}: {peer.name} may not send containers here any more")
    pools = {pool for pool, _, _ in entry["volumes"].values()}
    if peer.pools and not pools <= {*peer.pools}:
        raise Refused(f"cannot take {entry['name']}: {peer.name} may not use these pools any more")


def _offered(offer: Offer, name: str) -> OfferedSnapshot:
    found = next((one for one in offer.snapshots if one.name == name), None)
    if found is None:
        raise Refused(f"cannot keep snapshot {name[:64]!r}: it was not offered")
    return found
