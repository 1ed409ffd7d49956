"""Handing a container over to a peer: copies while it runs, a short stop, a commit that both ends survive.

Until the record says that the container is away, it is ours: whatever fails before is undone, and it runs
again if it ran. From then on it is the peer's, and what is left to do is done until the peer has answered.
"""

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from sysctr.engine import handover
from sysctr.engine.creation import Creation
from sysctr.engine.handover import Action, Source, Target
from sysctr.engine.host import Host
from sysctr.engine.lifecycle import Lifecycle
from sysctr.engine.migration_check import Placed, refuse_blocked
from sysctr.engine.migration_journal import Entry, MigrationJournal
from sysctr.engine.migration_link import Link
from sysctr.engine.migration_offer import Offer, OfferedSnapshot
from sysctr.engine.migration_streams import send_stream
from sysctr.engine.migration_survey import Options, Survey
from sysctr.engine.peer_records import Peer
from sysctr.engine.peers import Peers
from sysctr.engine.record import Record
from sysctr.engine.snapshots import Snapshots, Volume
from sysctr.engine.tasks import Task
from sysctr.engine.tree_sync import PassMark, send_tree
from sysctr.errors import Refused, SysctrError, WrongState
from sysctr.linux import fault
from sysctr.peer.channel import PeerLost
from sysctr.storage.base import Driver, RootSpec, Streams

log = logging.getLogger(__name__)

# How long its init may take to end, as Proxmox gives it, before it is killed.
_STOP_TIMEOUT_S = 60.0
# A pass that takes no longer than this leaves little to do while it stands still.
_QUICK_S = 1.0
_MOST_PASSES = 8
# One that takes this share of the pass before does not catch up with what is written.
_SHRINKING = 0.7
_PATIENCE_S = 300.0
# Nobody is served while it stands still: rather let it run here again.
_PATIENCE_STOPPED_S = 30.0
_SETTLE_S = 30.0


@dataclass
class _Move:
    """One migration under way."""

    record: Record
    options: Options
    offer: Offer
    link: Link
    volumes: list[Volume]
    placed: dict[str, Placed]
    # Of each volume, since when it may differ from what was sent; none for one that was not sent yet.
    marks: dict[str, PassMark] = field(default_factory=dict)
    # Those whose copy over there has files of ours alone, of this migration and of nothing older.
    plain: set[str] = field(default_factory=set)
    passes: list[dict[str, Any]] = field(default_factory=list)
    # The state that was sent last, where states are sent as streams.
    sent_state: str = ""

    @property
    def streams(self) -> bool:
        """Tell whether the volumes are sent as streams of their driver's own."""
        return any(one.method == "stream" for one in self.placed.values())


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
        self._alive: set[str] = set()
        # Held where it is decided, or told, whose a container is.
        self.deciding = threading.Lock()

    # Doing it

    def migrate(self, task: Task, number: int, options: Options) -> dict[str, Any]:
        """Move a container to a peer, or copy it there; returns the report."""
        began_s = time.monotonic()
        record = self._host.store.load(number)
        record.usable("copy" if options.copy else "migrate")
        report = self._survey.examine(record, options)
        offer, placed = report.pop("offer"), report.pop("placed")
        if options.dry_run:
            return report
        refuse_blocked(record.title, report["blockers"])
        mid = secrets.token_hex(8)
        peer = self._peers.get(options.peer)
        link = Link(self._peers, peer.name, mid, offer.as_dict(), task)
        link.rate_bytes = options.rate_bytes
        move = _Move(
            record, options, offer, link, self._snapshots.volumes(record),
            {one["source"]: Placed(**one) for one in placed},
        )  # fmt: skip
        self._journal.write(
            {
                "id": mid, "role": "source", "phase": Source.SENDING.value, "number": number,
                "name": record.name, "uuid": record.uuid, "peer": peer.id, "peer_name": peer.name,
                "copy": options.copy, "keep": options.keep, "ran": False, "start": options.start,
                "decided": None, "claimed": False, "since": round(time.time(), 3),
            }
        )  # fmt: skip
        self._alive.add(mid)
        fault.point("migrate.begun")
        self._host.bus.publish("migration", id=mid, change="sending", container=number, peer=peer.name)
        try:
            stopped_s = self._transfer(task, move)
            entry = self._decide(move)
        except BaseException:
            self._alive.discard(mid)
            self.undo(task, mid)
            raise
        finally:
            self._alive.discard(mid)
            link.close()
            self._forget_state(move)
        task.step("handing over")
        answer = self._deliver_or_tell(task, entry, options)
        down_s = None if stopped_s is None else round(time.monotonic() - stopped_s, 3)
        task.step("removing it here" if not (options.keep or options.copy) else "noting it here")
        with contextlib.suppress(PeerLost):  # what is left to say is said later
            self.complete(mid)
        return self._reported(task, report, move, answer, down_s, time.monotonic() - began_s)

    def _reported(
        self, task: Task, report: dict[str, Any], move: _Move, answer: dict[str, Any],
        down_s: float | None, seconds: float,
    ) -> dict[str, Any]:  # fmt: skip
        there = {**report["there"], "id": answer["id"], "name": answer["name"]}
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
            "started": bool(answer.get("started")), "kept": move.options.keep or move.options.copy,
            "notes": notes,
        }  # fmt: skip

    def _transfer(self, task: Task, move: _Move) -> float | None:
        """Send everything; returns when the container was asked to stop, None if it did not run."""
        link, options, number = move.link, move.options, move.record.id
        patience_s = _PATIENCE_S if options.patience_s is None else options.patience_s
        total = sum(one.expected_bytes or 0 for one in move.placed.values())
        task.progress(0, total or None)
        link.keep_trying(link.open, patience_s)
        for snapshot in move.offer.snapshots:
            task.step(f"copying snapshot {snapshot.name}")
            link.keep_trying(lambda one=snapshot: self._send_state(task, move, one), patience_s)
        if options.copy:
            with self._copied_state(task, move) as name:
                self._turn(move, patience_s)
                self._prepare(move, lambda: self._pass(task, move, self._views(move, name)), patience_s)
            return None
        self._turn(move, patience_s)
        if self._host.live.running(number) is not None:
            self._copy_running(task, move, patience_s)
        stopped_s = self._stop(task, move)
        patience_s = min(patience_s, _PATIENCE_STOPPED_S) if stopped_s is not None else patience_s
        task.step("copying the last changes" if stopped_s is not None else "copying")

        self._prepare(move, lambda: self._pass(task, move, self._views(move, "")), patience_s)
        return stopped_s

    def _prepare(self, move: _Move, last_pass: Callable[[], None], patience_s: float) -> None:
        """Send what is left, and let the target get ready; both again where the connection breaks."""
        link = move.link

        def finish() -> dict[str, Any]:
            # The target may have got ready before the connection broke.
            if link.begun["phase"] == Target.RECEIVING:
                last_pass()
                fault.point("migrate.final.done")
            return link.call("prepare")

        answer = link.keep_trying(finish, patience_s)
        if answer["answer"] != "prepared":
            words = f"{link.peer} says that it is {answer['answer']}"
            raise SysctrError(f"cannot move {move.record.title}: {words}")
        fault.point("migrate.prepared")

    def _copy_running(self, task: Task, move: _Move, patience_s: float) -> None:
        """Send what a running container has until little changes from pass to pass."""
        before_s = 0.0
        while len(move.passes) < _MOST_PASSES:
            number = len(move.passes) + 1
            task.step(_words(move.passes, number))
            move.link.keep_trying(lambda: self._pass(task, move, self._live_views(move)), patience_s)
            fault.point("migrate.pass.done")
            seconds = move.passes[-1]["seconds"]
            if seconds <= _QUICK_S or (number > 2 and seconds > _SHRINKING * before_s):
                return
            before_s = seconds
            if self._host.live.running(move.record.id) is None:
                return

    @contextlib.contextmanager
    def _live_views(self, move: _Move) -> Iterator[dict[str, RootSpec]]:
        # It runs, so they are active already, and stay so.
        yield {volume: driver.activate(volume) for driver, volume in move.volumes}

    @contextlib.contextmanager
    def _views(self, move: _Move, snapshot: str) -> Iterator[dict[str, RootSpec]]:
        with contextlib.ExitStack() as views:
            yield {
                volume: views.enter_context(driver.opened(volume, snapshot))
                for driver, volume in move.volumes
            }

    @contextlib.contextmanager
    def _copied_state(self, task: Task, move: _Move) -> Iterator[str]:
        """Give the name of the state that a copy is made of."""
        record = move.record
        if move.streams:
            yield ""
        elif self._host.live.running(record.id) is None:
            self._host.live.wait_settled(record.id, _SETTLE_S)
            self._host.release(record.id)
            yield ""
        else:
            with self._snapshots.temporary(task, record) as name:
                yield name

    def _pass(
        self, task: Task, move: _Move, views: "contextlib.AbstractContextManager[dict[str, RootSpec]]"
    ) -> None:
        began_s, sent_before = time.monotonic(), move.link.sent_bytes
        if move.streams:
            self._send_streams(task, move)
        else:
            with views as shown:
                for volume, view in shown.items():
                    self._send(task, move, volume, view)
        seconds = time.monotonic() - began_s
        sent = move.link.sent_bytes - sent_before
        move.passes.append(
            {
                "pass": len(move.passes) + 1, "seconds": round(seconds, 3), "sent_bytes": sent,
                "rate_bytes_s": round(sent / seconds) if seconds else None,
            }
        )  # fmt: skip

    def _send(self, task: Task, move: _Move, volume: str, view: RootSpec, *, kept: bool = False) -> None:
        """Make the copy of a volume over there what the view shows; what is `kept` never changes."""
        jobs = self._host.jobs_for(move.record)
        mark = None if kept else PassMark(view)
        since = move.marks.get(volume)
        if mark is not None:
            # A pass that is cut short has sent some of what it saw: what changes from here on is listed next.
            move.marks.setdefault(volume, mark)
        if since is not None:
            self._run(move, volume, "listed", partial(send_tree, jobs, task, view, since=since, mark=mark))
        # What stands there already is of another build of the template, or of another time, and may look the
        # same without being it.
        mode = "all" if volume in move.plain else "content"
        first = mark if since is None else None
        self._run(move, volume, mode, partial(send_tree, jobs, task, view, mark=first))
        move.plain.add(volume)
        if mark is not None:
            move.marks[volume] = mark

    def _run(self, move: _Move, volume: str, mode: str, send: Callable[..., None]) -> None:
        move.link.transfer(
            "sync", lambda exchange: send(exchange=exchange, mode=mode), volume=volume, mode=mode
        )

    def _send_state(self, task: Task, move: _Move, snapshot: OfferedSnapshot) -> None:
        if snapshot.name in move.link.begun["kept"]:
            return
        for driver, volume in move.volumes:
            if volume not in snapshot.parents:
                continue
            parent = snapshot.parents[volume]
            if parent:
                move.link.call("turn", volume=volume, snapshot=parent)
            if move.streams:
                self._stream(move, driver, volume, snapshot.name, parent or self._last_kept(move, volume))
                continue
            move.marks.pop(volume, None)
            move.plain.discard(volume)
            with driver.opened(volume, snapshot.name) as view:
                self._send(task, move, volume, view, kept=True)
        move.link.call("keep", snapshot=snapshot.name)
        move.link.begun["kept"].append(snapshot.name)

    def _last_kept(self, move: _Move, volume: str) -> str:
        """Return the last snapshot that the target has of a volume, empty for none."""
        kept = [one.name for one in move.offer.snapshots if volume in one.parents]
        return next((name for name in reversed(kept) if name in move.link.begun["kept"]), "")

    def _send_streams(self, task: Task, move: _Move) -> None:
        """Send the present state of all volumes, as of one moment, as what differs from the last one."""
        name, _ = self._snapshots.take_temporary(task, move.record)
        try:
            for driver, volume in move.volumes:
                self._stream(move, driver, volume, name, move.sent_state or self._last_kept(move, volume))
        except BaseException:
            self._snapshots.forget_temporary(move.record, name)
            raise
        self._forget_state(move)
        move.sent_state = name

    def _forget_state(self, move: _Move) -> None:
        if move.sent_state:
            # The container may be gone by now, and this with it.
            with contextlib.suppress(SysctrError):
                self._snapshots.forget_temporary(move.record, move.sent_state)
            move.sent_state = ""

    def _stream(self, move: _Move, driver: Driver, volume: str, snapshot: str, base: str) -> None:
        streams = cast(Streams, driver)
        move.link.transfer(
            "stream", lambda exchange: send_stream(streams, volume, snapshot, base, exchange),
            volume=volume, snapshot=snapshot,
        )  # fmt: skip

    def _turn(self, move: _Move, patience_s: float) -> None:
        """Let the copies of all volumes stand on the snapshot that the originals go back to."""
        known = {one.name for one in move.offer.snapshots}
        for driver, volume in move.volumes:
            move.marks.pop(volume, None)
            if known:
                move.plain.discard(volume)
            parent = driver.parent(volume)
            if parent in known:
                move.link.keep_trying(
                    lambda v=volume, p=parent: move.link.call("turn", volume=v, snapshot=p), patience_s
                )

    def _stop(self, task: Task, move: _Move) -> float | None:
        """End the container; returns when that began, None for one that did not run."""
        host, number = self._host, move.record.id
        ran = host.live.running(number) is not None
        again = self._lifecycle.reboots(number)
        start = move.options.start or ran or again
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

    def _decide(self, move: _Move) -> Entry:
        """Give the container up: the commit point. From here on it is the target's."""
        host, number, mid = self._host, move.record.id, move.link.mid
        with self.deciding:
            entry = self._entry(mid)
            runs = host.live.running(number) is not None
            if not handover.may_commit(
                entry["phase"], alive=mid in self._alive, answer="prepared", runs_now=runs,
                copy=move.options.copy,
            ):  # fmt: skip
                raise WrongState(f"cannot move {move.record.title}: it is {entry['phase']} by now")
            if move.options.copy:
                return self._journal.write(entry, phase=Source.COMMITTED.value)
            host.store.update(number, away=away_facts(entry))
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
        if not entry["copy"] and self.is_away(entry):
            if entry["keep"]:
                self._host.network.release(number)
            else:
                self._creation.remove(number)
                fault.point("migrate.destroyed")
        # Not before it is known over there that this is known here.
        answer = self._say(entry, "forget")
        if handover.source_on_answer(entry["phase"], False, "forget", answer["answer"]) is Action.FORGET:
            self._journal.remove(mid)
            self._host.bus.publish("migration", id=mid, change="delivered", container=number)

    def undo(self, task: Task | None, mid: str) -> None:
        """Keep the container: let it run again if it ran, and tell the target to remove its copy."""
        entry = self._entry(mid)
        recovery = handover.recover_source(
            entry["phase"], self.is_away(entry), bool(entry["ran"]),
            self._host.live.running(entry["number"]) is not None, copy=bool(entry["copy"]),
        )  # fmt: skip
        if recovery.action is not Action.UNDO:
            return
        # Without it, it is undone by the next daemon too.
        with contextlib.suppress(SysctrError), self.deciding:
            entry = self._journal.write(entry, phase=Source.ABORTED.value)
        if recovery.start:
            self._start_again(task, entry["number"])
        if entry["ran"]:
            with contextlib.suppress(SysctrError):
                entry = self._journal.write(entry, ran=False)
        with contextlib.suppress(SysctrError):
            self.tell_aborted(entry)

    def _start_again(self, task: Task | None, number: int) -> None:
        try:
            if task is not None:
                task.log("starting it again")
                self._lifecycle.start(task, number)
        except SysctrError as error:
            log.error("%d: cannot start it again: %s", number, error.message)

    def tell_aborted(self, entry: Entry) -> bool:
        """Tell the target to remove its copy; True where it has answered. Raises PeerLost."""
        answer = self._say(entry, "abort")
        action = handover.source_on_answer(entry["phase"], self.is_away(entry), "abort", answer["answer"])
        if action is Action.FORGET:
            self._journal.remove(entry["id"])
            return True
        words = f"{entry['peer_name']} says that it is {answer['answer']} there"
        self._journal.write(entry, error=words, claimed=answer["answer"] == Target.COMMITTED)
        return False

    def outcome(self, peer: Peer, mid: str) -> dict[str, Any]:
        """Say what became of a migration to a peer that asks."""
        with self.deciding:
            entry = self._journal.get(mid)
            if entry is None or entry["role"] != "source" or peer.id != entry["peer"]:
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
            return channel.call(f"migrate.{op}", id=entry["id"], **fields)

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


def away_facts(entry: Entry) -> dict[str, Any]:
    """Return what the record of a container says that a migration took away."""
    return {
        "id": entry["id"], "peer": entry["peer"], "name": entry["peer_name"], "time": round(time.time(), 3)
    }  # fmt: skip


def _words(passes: list[dict[str, Any]], number: int) -> str:
    """Return what is shown of a pass that begins."""
    if not passes:
        return f"copying, pass {number}"
    last = passes[-1]
    rate = (last["rate_bytes_s"] or 0) / 1e6
    return f"copying, pass {number} ({last['sent_bytes'] / 1e6:.1f} MB in the last one, {rate:.0f} MB/s)"

