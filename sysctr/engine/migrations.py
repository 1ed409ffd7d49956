"""What the API offers on moving containers between hosts, and what goes on of it by itself.

Every migration has an entry in a journal at both ends until both know its outcome. One that no task and no
connection works on is finished or undone here, as soon as its peer can be talked to.
"""

import contextlib
import logging
import threading
from collections.abc import Mapping
from typing import Any

from sysctr.engine import handover
from sysctr.engine.creation import Creation
from sysctr.engine.handover import Action, Side, Source, Target
from sysctr.engine.host import Host
from sysctr.engine.lifecycle import Lifecycle
from sysctr.engine.migration_answers import read_answer
from sysctr.engine.migration_journal import ARRIVING, MID, Entry, MigrationJournal
from sysctr.engine.migration_source import Outgoing
from sysctr.engine.migration_survey import Options
from sysctr.engine.migration_target import Incoming
from sysctr.engine.naming import naming
from sysctr.engine.peer_records import Peer
from sysctr.engine.peer_workers import PeerWorkers
from sysctr.engine.peers import Peers
from sysctr.engine.record import Record, away_facts
from sysctr.engine.snapshots import Snapshots
from sysctr.engine.tasks import Task
from sysctr.engine.tree_sync import MODES
from sysctr.errors import NotFound, Refused, SysctrError, UsageError, WrongState
from sysctr.peer.channel import Channel, PeerLost
from sysctr.peer.message import Anything, Flag, Shape, Text

log = logging.getLogger(__name__)

# How soon the peer of an open migration is tried again, and how seldom at last.
_SOON_S = 0.5
_SELDOM_S = 15.0
# How long one peer that answers slowly keeps the others from being asked again.
_ROUND_S = 1.0
_HOLD_S = 60.0
_CLOSE_S = 5.0
_NAME = Text(64)


class Migrations:
    """Moves containers to peers, takes those that peers hand over, and settles what was cut short."""

    def __init__(
        self, host: Host, lifecycle: Lifecycle, creation: Creation, snapshots: Snapshots, peers: Peers
    ) -> None:
        self._host = host
        self._lifecycle = lifecycle
        self._peers = peers
        self.journal = MigrationJournal(host.where)
        self.journal.on_new = self.look
        self._outgoing = Outgoing(host, lifecycle, creation, snapshots, peers, self.journal)
        self.incoming = self._incoming = Incoming(host, lifecycle, self.journal, creation.discard_volumes)
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._settling = PeerWorkers("settling", self._settle_all)
        host.guards.append(self._guard)
        peers.guards.append(self._refuse_forgetting)
        peers.on_forced.append(self._give_up)
        peers.register("migrate.check", Shape({"offer": Anything()}), self._incoming.check)
        for op, fields, handler in (
            ("begin", {"offer": Anything()}, self._incoming.begin),
            (
                "sync", {"volume": _NAME, "mode": Text(16, choices=MODES), "still": Flag()},
                self._incoming.sync,
            ),
            ("stream", {"volume": _NAME, "snapshot": _NAME, "base": _NAME}, self._incoming.stream),
            ("turn", {"volume": _NAME, "snapshot": _NAME}, self._incoming.turn),
            ("keep", {"snapshot": _NAME}, self._incoming.keep),
            ("prepare", {}, self._incoming.prepare),
            ("commit", {"start": Flag()}, self._incoming.commit),
            ("abort", {}, self._incoming.abort),
            ("forget", {}, self._incoming.forget),
            ("outcome", {}, self._outcome),
        ):
            peers.register(f"migrate.{op}", Shape({"id": MID, **fields}), handler)

    # Over the life of the daemon

    def load(self) -> frozenset[int]:
        """Read what was under way; returns the numbers that are reserved for containers on their way here."""
        self.journal.load()
        return frozenset(entry["number"] for entry in self.journal.all(*ARRIVING))

    def settle(self) -> None:
        """Hold again what was on its way here when the last daemon died."""
        self._incoming.recover()

    def open(self) -> None:
        """Begin to settle what is open, when everything that runs is known."""
        self._thread = threading.Thread(target=self._follow, name="migrations", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End what goes on by itself."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
        self._settling.wait(_CLOSE_S)

    def look(self) -> None:
        """Look at once for what can be settled: a peer has spoken, or a task has ended."""
        self._wake.set()

    def _follow(self) -> None:
        wait_s = _SOON_S
        while not self._closing:
            self._settling.begin({one["peer"] for one in self._unworked()})
            self._settling.wait(_ROUND_S)
            left = self._unworked()
            any_at_all = bool(self._open())
            if self._wake.wait(wait_s if any_at_all else None):
                self._wake.clear()
                wait_s = _SOON_S
            elif left:
                wait_s = min(wait_s * 1.5, _SELDOM_S)

    def _open(self) -> "list[Entry]":
        return self.journal.all("source", "target")

    def _settle_all(self, peer: str) -> None:
        """Settle what is open with a peer."""
        for entry in self._unworked():
            if entry["peer"] == peer and not self._closing:
                self._settle(entry)

    def _unworked(self) -> "list[Entry]":
        return [entry for entry in self._open() if not self._worked_on(entry)]

    def _worked_on(self, entry: Entry) -> bool:
        if entry["role"] == "source":
            return self._outgoing.alive(entry["id"])
        return self._incoming.talking(entry["id"])

    def _settle(self, entry: Entry) -> None:
        try:
            if entry["role"] == "source":
                self._settle_source(entry["id"])
            else:
                self._settle_target(entry["id"])
        except SysctrError as error:
            log.debug("migration %s: %s", entry["id"], error.message)
        except Exception:
            log.exception("migration %s", entry["id"])

    def _settle_source(self, mid: str) -> None:
        entry = self.journal.get(mid)
        if entry is None or self._outgoing.alive(mid):
            return
        recovery = self._outgoing.recovery(entry)
        if recovery.action is Action.UNDO:
            self._outgoing.undo(mid, self._start)
            return
        if recovery.action is Action.DELIVER:
            self._outgoing.deliver(mid)
        with self._host.tasks.hold(entry["number"], "migrate", _HOLD_S):
            self._outgoing.complete(mid)

    def _settle_target(self, mid: str) -> None:
        entry = self.journal.get(mid)
        if entry is None:
            return
        if entry["phase"] == Target.ABORTED:
            self._incoming.undo(mid)
            return
        with contextlib.closing(self._peers.connect(entry["peer"])) as channel:
            told = read_answer(channel, "outcome", channel.call("migrate.outcome", id=mid))
        self._incoming.told(mid, told["outcome"], bool(told["start"]))

    def _start(self, number: int) -> None:
        with contextlib.suppress(SysctrError):
            self._lifecycle.submit_start(number).wait(_HOLD_S)

    def _outcome(self, peer: Peer, message: dict[str, Any], _channel: Channel) -> dict[str, Any]:
        return self._outgoing.outcome(peer, str(message["id"]))

    def _guard(self, verb: str, record: Record) -> None:
        """Raise what speaks against an action on a container that is on its way."""
        entry = self.journal.of(record.id)
        if entry is None or entry.get("copy") or entry.get("uuid", record.uuid) != record.uuid:
            return
        waiting = WrongState(
            f"cannot {verb} {record.id}: {entry['peer_name']} has not confirmed yet that it is not its own",
            f"wait until both hosts talk again, or `sysctr migrate --resolve {record.name}` decides",
        )
        if entry["role"] == "target":
            if not handover.may_start_target(entry["phase"], self._incoming.is_confirmed(entry["id"])):
                raise waiting
        elif verb == "destroy" and not handover.may_destroy_source(record.away is not None, entry["phase"]):
            raise waiting

    def _refuse_forgetting(self, peer: Peer) -> None:
        """Raise WrongState where a peer has, or waits for, a container that nobody could ask about then."""
        for entry in self.journal.all():
            if entry["peer"] == peer.id:
                raise WrongState(
                    f"cannot remove peer {peer.name}: the move of {entry['name']} is not finished",
                    "`sysctr migrations` shows how far it is",
                )

    def _give_up(self, peer: Peer) -> None:
        """Remove what a peer has not handed over whole: nothing over there depends on that."""
        for entry in self.journal.all("target"):
            if entry["peer"] == peer.id and entry["phase"] == Target.RECEIVING:
                self._incoming.decide_there(entry["id"])

    # What the API offers

    @naming
    def migrate(self, ref: str, spec: Mapping[str, Any]) -> Task:
        """Move a container to a peer."""
        return self._submit("migrate", ref, _options(spec, copy=False))

    @naming
    def copy(self, ref: str, spec: Mapping[str, Any]) -> Task:
        """Make a copy of a container on a peer, with an identity of its own."""
        return self._submit("copy", ref, _options(spec, copy=True))

    def _submit(self, kind: str, ref: str, options: Options) -> Task:
        record = self._find(ref)
        record.usable(kind)
        self._peers.get(options.peer)

        def run(task: Task) -> dict[str, Any]:
            try:
                return self._outgoing.migrate(task, record.id, options)
            finally:
                self.look()

        # A copy leaves the container alone, but for the moment that its state takes.
        holds = f"copy of {record.id}" if options.copy else ""
        return self._host.tasks.submit(kind, record.id, run, subject=record.title, holds=holds)

    def list(self) -> "list[dict[str, Any]]":
        """Return every migration that is under way or in doubt."""
        return [self._shown(entry) for entry in self._open()]

    def _shown(self, entry: Entry) -> dict[str, Any]:
        phase, worked_on = entry["phase"], self._worked_on(entry)
        if phase == Source.ABORTED:
            state = "undoing"
        elif worked_on or phase in (Source.SENDING, Target.RECEIVING):
            state = "moving"
        elif entry["role"] == "source" and phase in (Source.COMMITTED, Source.DELIVERED):
            state = "delivering"
        else:
            state = "in-doubt"
        return {
            "id": entry["id"], "role": entry["role"], "container": entry["number"], "name": entry["name"],
            "copy": bool(entry.get("copy")), "peer": entry["peer_name"], "phase": phase, "state": state,
            "since": entry["since"], "error": entry.get("error", ""),
        }  # fmt: skip

    def resolve(self, ref: str, keep: Side | None = None) -> Task:
        """Settle a migration now: by talking to the peer, or as the administrator decides."""
        entry = self._entry_of(ref)
        mid = entry["id"]
        # What a peer sends may never end; what is not whole can be removed at any time.
        breaks_off = keep == "there" and (entry["role"], entry["phase"]) == ("target", Target.RECEIVING)
        if self._worked_on(entry) and not breaks_off:
            raise WrongState(f"cannot resolve the migration of {entry['name']}: it goes on")

        def run(_task: Task) -> dict[str, Any]:
            if keep is not None:
                decide = self._decide_source if entry["role"] == "source" else self._decide_target
                decide(self.journal.get(mid) or entry, keep)
            elif entry["phase"] is not None:
                settle = self._settle_source if entry["role"] == "source" else self._settle_target
                settle(mid)
            now = self.journal.get(mid)
            return {"migration": self._shown(now) if now else None, "settled": now is None}

        return self._host.tasks.submit(
            "resolve", entry["number"], run, subject=f"the migration of {entry['name']}",
            holds=f"migration {mid}",
        )  # fmt: skip

    def _entry_of(self, ref: str) -> Entry:
        found = [
            entry for entry in self._open()
            if ref in (entry["id"], str(entry["number"]), entry["name"])
        ]  # fmt: skip
        if found:
            return found[0]
        # One that was moved and kept here: nothing is open, and what its record says can be taken back.
        with contextlib.suppress(SysctrError):
            record = self._find(ref)
            if record.away is not None:
                return {
                    "id": record.away["id"], "role": "source", "phase": None, "number": record.id,
                    "name": record.name, "uuid": record.uuid, "peer": record.away["peer"],
                    "peer_name": record.away["name"], "copy": False, "since": record.away["time"],
                }  # fmt: skip
        raise NotFound(
            f"cannot find a migration of {ref[:64]}: none is open", "`sysctr migrations` shows them"
        )

    def _decide_source(self, entry: Entry, side: Side) -> None:
        mid, number = entry["id"], entry["number"]
        host = self._host
        if side == "here" and entry["phase"] == Source.COMMITTED:
            # Perhaps it can be told after all, and then there is nothing to decide.
            with contextlib.suppress(PeerLost):
                self._outgoing.deliver(mid)
                entry = self.journal.get(mid) or entry
        with host.tasks.hold(number, "resolve", _HOLD_S), self._outgoing.deciding:
            decision = handover.resolve_source(
                entry["phase"], self._outgoing.is_away(entry), host.live.running(number) is not None, side,
                claimed=bool(entry.get("claimed")), copy=bool(entry["copy"]),
            )  # fmt: skip
            if decision.refused:
                raise Refused(f"cannot resolve the migration of {entry['name']}: {decision.refused}")
            if decision.phase is not None:
                keep = bool(entry["keep"] or decision.keeps)
                entry = self.journal.write(
                    entry, phase=decision.phase.value, decided=side, keep=keep, error=""
                )
            if not entry["copy"]:
                self._set_away(entry, decision)
            if decision.phase is None:
                self.journal.remove(mid)
        self.look()

    def _set_away(self, entry: Entry, decision: handover.Decision) -> None:
        host, number = self._host, entry["number"]
        record = host.store.load(number)
        if record.uuid != entry.get("uuid", record.uuid):
            return  # another one that has got its number
        generation = record.generation + (1 if decision.raises_generation else 0)
        away = record.away
        if not decision.away:
            away = None
        elif away is None:
            away = away_facts(entry["id"], entry["peer"], entry["peer_name"])
        host.store.update(number, away=away, generation=generation)

    def _decide_target(self, entry: Entry, side: Side) -> None:
        mid = entry["id"]
        running = self._host.live.running(entry["number"]) is not None
        decision = handover.resolve_target(entry["phase"], running, side)
        if decision.refused:
            raise Refused(f"cannot resolve the migration of {entry['name']}: {decision.refused}")
        if side == "here":
            self._incoming.decide_here(mid, raises_generation=decision.raises_generation)
        elif decision.away:
            self._set_away(entry, decision)
            self.journal.remove(mid)
        else:
            self._incoming.decide_there(mid)

    def _find(self, ref: str) -> Record:
        return self._host.store.find(ref)


def _options(spec: Mapping[str, Any], *, copy: bool) -> Options:
    if not spec.get("peer"):
        raise UsageError("cannot move a container: no peer is named", "`sysctr peer list` shows them")
    return Options(
        peer=spec["peer"], copy=copy, restart=bool(spec.get("restart")), keep=bool(spec.get("keep")),
        start=bool(spec.get("start")), number=spec.get("id"), name=spec.get("name") or "",
        pools=dict(spec.get("pool_map") or {}), bridges=dict(spec.get("bridge_map") or {}),
        leave_out=tuple(spec.get("leave_out") or ()), rate_bytes=spec.get("bwlimit_bytes"),
        patience_s=spec.get("patience_s"), dry_run=bool(spec.get("dry_run")),
    )  # fmt: skip
