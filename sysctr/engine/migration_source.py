"""Handing a container over to a peer: copies while it runs, a short stop, a commit that both ends survive.

Until the record says that the container is away, it is ours: whatever fails before is undone, and it runs
again if it ran. From then on it is the peer's, and what is left to do is done until the peer has answered.
"""

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sysctr.engine import handover
from sysctr.engine.creation import Creation
from sysctr.engine.handover import Action, Source, Target
from sysctr.engine.host import Host
from sysctr.engine.lifecycle import Lifecycle
from sysctr.engine.migration_answers import read_answer
from sysctr.engine.migration_check import Placed, refuse_blocked
from sysctr.engine.migration_journal import Entry, MigrationJournal
from sysctr.engine.migration_link import Link
from sysctr.engine.migration_sender import Move, Sender
from sysctr.engine.migration_survey import Options, Survey
from sysctr.engine.migration_template import Templates
from sysctr.engine.peer_records import Peer
from sysctr.engine.peers import Peers
from sysctr.engine.record import Record, away_facts
from sysctr.engine.snapshots import Snapshots
from sysctr.engine.tasks import Task
from sysctr.errors import Refused, SysctrError, WrongState
from sysctr.linux import fault
from sysctr.peer.channel import PeerLost

log = logging.getLogger(__name__)

# How long its init may take to end, as Proxmox gives it, before it is killed.
_STOP_TIMEOUT_S = 60.0
# A pass that takes no longer than this leaves little to do while it stands still.
_QUICK_S = 0.3
_MOST_PASSES = 8
# One that takes this share of the pass before does not catch up with what is written.
_SHRINKING = 0.7
# What a stop, the hand-over and a start take besides.
_STOP_S = 0.7
_PATIENCE_S = 300.0
# Nobody is served while it stands still: rather let it run here again.
_PATIENCE_STOPPED_S = 30.0
_SETTLE_S = 30.0


class Outgoing:
    """Sends containers."""

    def __init__(
        self,
        host: Host,
        lifecycle: Lifecycle,
        creation: Creation,
        snapshots: Snapshots,
        peers: Peers,
        journal: MigrationJournal,
    ) -> None:
        self._host = host
        self._creation = creation
        self._lifecycle = lifecycle
        self._snapshots = snapshots
        self._peers = peers
        self._journal = journal
        self._survey = Survey(host, snapshots, peers)
        self._sender = Sender(host, snapshots)
        self._templates = Templates(host, peers)
        self._alive: set[str] = set()
        # Held where it is decided, or told, whose a container is.
        self.deciding = threading.Lock()

    # Doing it

    def migrate(self, task: Task, number: int, options: Options) -> dict[str, Any]:
        """Move a container to a peer, or copy it there; returns the report."""
        began_s, template_bytes = time.monotonic(), 0
        record = self._host.store.load(number)
        record.usable("copy" if options.copy else "migrate")
        report = self._survey.examine(record, options)
        offer, placed = report.pop("offer"), report.pop("placed")
        if options.dry_run:
            del report["template"]
            return report
        refuse_blocked(record.title, report["blockers"])
        if offer.template and not report["template"] and self._has_template(offer.template):
            template_bytes = self._templates.send(task, options.peer, offer.template, options.rate_bytes)
            report = self._survey.examine(record, options)
            offer, placed = report.pop("offer"), report.pop("placed")
            refuse_blocked(record.title, report["blockers"])
        template = report.pop("template")
        mid = secrets.token_hex(8)
        peer = self._peers.get(options.peer)
        link = Link(self._peers, peer, mid, offer.as_dict(), task)
        link.rate_bytes, link.sent_bytes = options.rate_bytes, template_bytes
        move = Move(
            record, offer, link, self._snapshots.volumes(record),
            {one["source"]: Placed(**one) for one in placed},
            # What stands on no template is empty over there.
            plain={one.name for one in offer.volumes if not (one.root and template)},
        )  # fmt: skip
        self._alive.add(mid)
        try:
            self._journal.write(
                {
                    "id": mid, "role": "source", "phase": Source.SENDING.value, "number": number,
                    "name": record.name, "uuid": record.uuid, "peer": peer.id, "peer_name": peer.name,
                    "copy": options.copy, "keep": options.keep, "ran": False, "start": options.start,
                    "decided": None, "claimed": False, "told": False, "since": round(time.time(), 3),
                }
            )  # fmt: skip
            fault.point("migrate.begun")
            self._host.bus.publish("migration", id=mid, change="sending", container=number, peer=peer.name)
            stopped_s = self._transfer(task, move, options)
            entry = self._decide(task, move, options)
        except BaseException:
            self._alive.discard(mid)
            link.close()
            with contextlib.suppress(SysctrError):  # what is left to say is said later
                self.undo(mid, partial(self._start_again, task))
            raise
        finally:
            link.close()
            self._sender.forget_state(move)
        try:
            return self._hand_over(task, report, move, options, entry, stopped_s, began_s)
        finally:
            self._alive.discard(mid)

    def _has_template(self, name: str) -> bool:
        with contextlib.suppress(SysctrError):
            return self._host.templates.get(name) is not None
        return False

    def _hand_over(
        self, task: Task, report: dict[str, Any], move: Move, options: Options, entry: Entry,
        stopped_s: float | None, began_s: float,
    ) -> dict[str, Any]:  # fmt: skip
        """Do what follows the decision, and return the report."""
        mid = entry["id"]
        task.step("handing over")
        answer = self._deliver_or_tell(task, entry, options)
        down_s = None if stopped_s is None else round(time.monotonic() - stopped_s, 3)
        task.step("removing it here" if not (options.keep or options.copy) else "noting it here")
        with contextlib.suppress(PeerLost):  # what is left to say is said later
            self.complete(mid)
        return self._reported(task, report, move, options, answer, down_s, time.monotonic() - began_s)

    def _reported(
        self, task: Task, report: dict[str, Any], move: Move, options: Options, answer: dict[str, Any],
        down_s: float | None, seconds: float,
    ) -> dict[str, Any]:  # fmt: skip
        there = {**report["there"], **{key: answer[key] for key in ("id", "name") if key in answer}}
        after = list(answer.get("addresses", ()))
        for (_, card), ip in zip(there["addresses"].items(), after, strict=False):
            card["after"] = ip
        notes = [*answer.get("notes", ())]
        if answer.get("error"):
            notes.append(f"it does not run there: {answer['error']}")
        for note in notes:
            task.log(note)
        return {
            **report, "there": there, "passes": move.passes, "sent_bytes": move.link.sent_bytes,
            "seconds": round(seconds, 3), "downtime_s": down_s if answer.get("started") else None,
            "started": bool(answer.get("started")), "kept": options.keep,
            "notes": notes,
        }  # fmt: skip

    def _transfer(self, task: Task, move: Move, options: Options) -> float | None:
        """Send everything; returns when the container was asked to stop, None if it did not run."""
        link, number = move.link, move.record.id
        patience_s = _PATIENCE_S if options.patience_s is None else options.patience_s
        total = sum(one.expected_bytes or 0 for one in move.placed.values())
        task.progress(0, total or None)
        link.keep_trying(link.open, patience_s)
        for snapshot in move.offer.snapshots:
            task.step(f"copying snapshot {snapshot.name}")
            link.keep_trying(lambda one=snapshot: self._sender.send_state(task, move, one), patience_s)
        if options.copy:
            with self._sender.copied_state(task, move) as name:
                self._sender.turn(move, patience_s)
                self._prepare(task, move, name, patience_s)
            return None
        self._sender.turn(move, patience_s)
        if self._host.live.running(number) is not None:
            self._copy_running(task, move, patience_s)
        stopped_s = self._stop(task, move, options)
        patience_s = min(patience_s, _PATIENCE_STOPPED_S) if stopped_s is not None else patience_s
        task.step("copying the last changes" if stopped_s is not None else "copying")
        self._prepare(task, move, "", patience_s)
        return stopped_s

    def _prepare(self, task: Task, move: Move, state: str, patience_s: float) -> None:
        """Send what is left of a state, and let the target get ready; both again where it is lost."""
        link = move.link

        def finish() -> dict[str, Any]:
            # The target may have got ready before the connection broke.
            if link.begun["phase"] == Target.RECEIVING:
                views = self._sender.views(move, state)
                self._sender.send_pass(task, move, views, kept=bool(state), state=state)
                fault.point("migrate.final.done")
            return link.call("prepare")

        answer = link.keep_trying(finish, patience_s)
        if answer["answer"] != "prepared":
            words = f"{link.name} says that it is {answer['answer']}"
            raise SysctrError(f"cannot move {move.record.title}: {words}")
        fault.point("migrate.prepared")

    def _copy_running(self, task: Task, move: Move, patience_s: float) -> None:
        """Send what a running container has until little changes from pass to pass."""
        before_s = 0.0
        while len(move.passes) < _MOST_PASSES:
            number = len(move.passes) + 1
            task.step(_words(move.passes, number))
            move.link.keep_trying(
                lambda: self._sender.send_pass(task, move, self._sender.live_views(move), live=True),
                patience_s,
            )
            fault.point("migrate.pass.done")
            seconds = move.passes[-1]["seconds"]
            if seconds <= _QUICK_S or (number > 2 and seconds > _SHRINKING * before_s):
                return
            before_s = seconds
            if self._host.live.running(move.record.id) is None:
                return

    def _stop(self, task: Task, move: Move, options: Options) -> float | None:
        """End the container; returns when that began, None for one that did not run."""
        host, number = self._host, move.record.id
        ran = host.live.running(number) is not None
        again = self._lifecycle.reboots(number)
        start = options.start or ran or again
        entry = self._entry(move.link.mid)
        self._journal.write(entry, phase=Source.STOPPED.value, ran=ran or again, start=start)
        fault.point("migrate.stopping")
        began_s = time.monotonic()
        if ran or again:
            task.step("stopping")
            with contextlib.suppress(WrongState):  # it ended by itself just now
                self._lifecycle.stop(task, number, _STOP_TIMEOUT_S)
        if not host.live.wait_settled(number, _SETTLE_S):
            raise WrongState(f"cannot move {number}: its end is still being put away")
        host.release(number)
        fault.point("migrate.stopped")
        return began_s if ran or again else None

    def _decide(self, task: Task, move: Move, options: Options) -> Entry:
        """Give the container up: the commit point. From here on it is the target's."""
        host, number, mid = self._host, move.record.id, move.link.mid
        with self.deciding:
            task.check()
            entry = self._entry(mid)
            runs = host.live.running(number) is not None
            if not handover.may_commit(
                entry["phase"], alive=mid in self._alive, answer="prepared", runs_now=runs,
                copy=options.copy,
            ):  # fmt: skip
                raise WrongState(f"cannot move {move.record.title}: it is {entry['phase']} by now")
            if options.copy:
                return self._journal.write(entry, phase=Source.COMMITTED.value)
            host.store.update(number, away=away_facts(mid, entry["peer"], entry["peer_name"]))
            fault.point("migrate.away")
            # For the list of migrations: the record is what counts.
            return self._journal.write(entry, phase=Source.COMMITTED.value)

    def _deliver_or_tell(self, task: Task, entry: Entry, options: Options) -> dict[str, Any]:
        patience_s = _PATIENCE_STOPPED_S if options.patience_s is None else options.patience_s
        until = time.monotonic() + patience_s
        while True:
            try:
                return self.deliver(entry["id"])
            except PeerLost as error:
                if time.monotonic() > until or task.cancelling or self._host.tasks.closing:
                    name, peer = entry["name"], entry["peer_name"]
                    raise SysctrError(
                        f"cannot tell {peer} that {name} is its own now: {error.message}",
                        "it goes on there as soon as both hosts talk again; if that one is lost for good, "
                        f"`sysctr migrate --resolve {name} --here` takes it back",
                    ) from error
                time.sleep(0.2)

    # What both the task and the daemon after a crash do

    def deliver(self, mid: str) -> dict[str, Any]:
        """Tell the target that the container is its own; returns its answer. Raises PeerLost."""
        entry = self._entry(mid)
        answer = self._say(entry, "commit", start=bool(entry["start"]))
        action = handover.source_on_answer(
            entry["phase"], self.is_away(entry), "commit", answer["answer"]
        )
        if action is not Action.FINISH:
            words = f"{entry['peer_name']} says that it is {answer['answer']} there"
            self._journal.write(entry, error=words)
            raise WrongState(
                f"cannot hand {entry['name']} over: {words}",
                f"`sysctr migrate --resolve {entry['name']}` with --here or --there decides",
            )
        self._journal.write(entry, phase=Source.DELIVERED.value, error="")
        fault.point("migrate.delivered")
        return answer

    def complete(self, mid: str) -> None:
        """Do what is left when the target has the container: destroy ours, unless it is kept."""
        entry = self._entry(mid)
        number = entry["number"]
        # First it has to say that it knows: as long as it does not, what is here may be the last of it.
        answer = self._say(entry, "forget")
        action = handover.source_on_answer(entry["phase"], False, "forget", answer["answer"])
        if action is not Action.FORGET:
            words = f"{entry['peer_name']} says that it is {answer['answer']} there"
            self._journal.write(entry, error=words)
            raise WrongState(f"cannot finish the migration of {entry['name']}: {words}")
        if not entry["copy"] and self.is_away(entry):
            if entry["keep"]:
                self._host.network.release(number)
            else:
                self._creation.remove(number)
                fault.point("migrate.destroyed")
        self._journal.remove(mid)
        self._host.bus.publish("migration", id=mid, change="delivered", container=number)

    def undo(self, mid: str, start: Callable[[int], None]) -> None:
        """Keep the container: let it run again if it ran, and tell the target to remove its copy.

        Called until both is done; then the journal is gone. Raises PeerLost. `start` raises nothing.
        """
        entry = self._entry(mid)
        recovery = self.recovery(entry)
        if recovery.action is not Action.UNDO:
            return
        if entry["phase"] != Source.ABORTED:
            # Without it, it is undone by the next daemon too.
            with contextlib.suppress(SysctrError), self.deciding:
                entry = self._journal.write(entry, phase=Source.ABORTED.value)
        self._take_back(entry)
        if entry["ran"]:
            gone = self._record(entry) is None
            if recovery.start and not gone:
                start(entry["number"])
            # Not before: what is not noted here any more is not started by anybody.
            if gone or self._host.live.running(entry["number"]) is not None:
                entry = self._journal.write(entry, ran=False)
        if not entry["told"]:
            entry = self._tell_aborted(entry)
        if entry["told"] and not entry["ran"]:
            self._journal.remove(mid)

    def _start_again(self, task: Task, number: int) -> None:
        task.log("starting it again")
        try:
            self._lifecycle.start(task, number)
        except SysctrError as error:
            log.error("%d: cannot start it again: %s", number, error.message)

    def recovery(self, entry: Entry) -> handover.Recovery:
        """Return what is to be done about a migration that no task works on."""
        return handover.recover_source(
            entry["phase"], self.is_away(entry), bool(entry["ran"]),
            self._host.live.running(entry["number"]) is not None, copy=bool(entry["copy"]),
        )  # fmt: skip

    def _take_back(self, entry: Entry) -> None:
        """Finish what the administrator decided: a container that this migration took away is ours again."""
        if self.is_away(entry):
            record = self._host.store.load(entry["number"])
            self._host.store.update(record.id, away=None, generation=record.generation + 1)

    def _tell_aborted(self, entry: Entry) -> Entry:
        """Tell the target to remove its copy; returns the entry with what it has answered."""
        answer = self._say(entry, "abort")
        action = handover.source_on_answer(entry["phase"], self.is_away(entry), "abort", answer["answer"])
        if action is Action.FORGET:
            return self._journal.write(entry, told=True)
        words = f"{entry['peer_name']} says that it is {answer['answer']} there"
        return self._journal.write(entry, error=words, claimed=answer["answer"] == Target.COMMITTED)

    def outcome(self, peer: Peer, mid: str) -> dict[str, Any]:
        """Say what became of a migration to a peer that asks."""
        with self.deciding:
            entry = self._journal.get(mid)
            if entry is not None and (entry["role"] != "source" or peer.id != entry["peer"]):
                # Nobody else's business, and nothing to act on.
                return {"outcome": "pending", "start": False}
            if entry is None:
                return {"outcome": handover.outcome(None, False, False), "start": False}
            told = handover.outcome(
                entry["phase"], self.is_away(entry), mid in self._alive, entry["decided"]
            )
            return {"outcome": told, "start": bool(entry["start"])}

    def alive(self, mid: str) -> bool:
        """Tell whether a task works on a migration."""
        return mid in self._alive

    def _say(self, entry: Entry, op: str, **fields: Any) -> dict[str, Any]:
        with contextlib.closing(self._peers.connect(entry["peer"])) as channel:
            return read_answer(channel, op, channel.call(f"migrate.{op}", id=entry["id"], **fields))

    def _entry(self, mid: str) -> Entry:
        entry = self._journal.get(mid)
        if entry is None:
            raise Refused(f"cannot go on with migration {mid}: it was decided already")
        return entry

    def _record(self, entry: Entry) -> Record | None:
        with contextlib.suppress(SysctrError):
            record = self._host.store.load(entry["number"])
            return record if record.uuid == entry["uuid"] else None
        return None

    def is_away(self, entry: Entry) -> bool:
        """Tell whether the record of the container says that this migration took it away."""
        record = self._record(entry)
        return record is not None and record.away is not None and record.away.get("id") == entry["id"]


def _words(passes: list[dict[str, Any]], number: int) -> str:
    """Return what is shown of a pass that begins: how fast it goes, and what that means for the stop.

    >>> first = {"seconds": 4.0, "sent_bytes": 400e6, "rate_bytes_s": 100_000_000}
    >>> _words([first, {"seconds": 1.5, "sent_bytes": 8e6, "rate_bytes_s": 5_333_333}], 3)
    'copying, pass 3 (5 MB/s, 2.0 MB/s of changes, about 2 s down)'
    """
    if not passes:
        return f"copying, pass {number}"
    last = passes[-1]
    words = f"{(last['rate_bytes_s'] or 0) / 1e6:.0f} MB/s"
    if len(passes) > 1:
        # What the last one sent had been written while the one before it was under way.
        words += f", {last['sent_bytes'] / max(passes[-2]['seconds'], 0.001) / 1e6:.1f} MB/s of changes"
        words += f", about {last['seconds'] + _STOP_S:.0f} s down"
    return f"copying, pass {number} ({words})"
