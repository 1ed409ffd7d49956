"""Replication: a copy of a container on a peer, brought up to date now and then, for the day of a loss.

What is known of it stands in the container's record:

    replica = {"id": …, "peer": id, "name": how the peer is called, "every_s": 900, "last": …, "error": ""}

A container that has a replica may have been promoted over there while this host was down. So whoever starts
it asks first; where the peer does not answer, only what this daemon has confirmed before is started.
"""

import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import closing, nullcontext
from typing import Any

from sysctr.engine.backup_state import State, States
from sysctr.engine.host import Host
from sysctr.engine.lifecycle import Lifecycle
from sysctr.engine.migration_answers import read_answer
from sysctr.engine.migration_check import Placed, refuse_blocked
from sysctr.engine.migration_journal import MID
from sysctr.engine.migration_link import Link
from sysctr.engine.migration_offer import Offer
from sysctr.engine.migration_sender import Move, Sender
from sysctr.engine.migration_survey import Options, Survey
from sysctr.engine.naming import naming
from sysctr.engine.peer_records import Peer
from sysctr.engine.peer_workers import PeerWorkers
from sysctr.engine.peers import Peers
from sysctr.engine.record import Record, away_facts
from sysctr.engine.replica import Replicas
from sysctr.engine.snapshots import Snapshots
from sysctr.engine.tasks import Task
from sysctr.errors import Busy, NoDaemon, NotFound, Refused, SysctrError, WrongState
from sysctr.peer.channel import Channel, PeerLost
from sysctr.peer.message import Shape
from sysctr.storage.base import RootSpec

log = logging.getLogger(__name__)

LEAST_EVERY_S = 10.0
_PATIENCE_S = 30.0
_ASK_S = 5.0
_RETRY_S = 60.0
_LOOK_S = 30.0
# What is done with peers that answer takes no longer; the others are not waited for.
_ROUND_S = 1.0
_CLOSE_S = 5.0


class Replication:
    """Keeps the replicas of this host's containers up to date, and promotes those of others."""

    def __init__(
        self,
        host: Host,
        lifecycle: Lifecycle,
        snapshots: Snapshots,
        states: States,
        peers: Peers,
        replicas: Replicas,
    ) -> None:
        self._host = host
        self._lifecycle = lifecycle
        self._snapshots = snapshots
        self._states = states
        self._peers = peers
        self._replicas = replicas
        self._survey = Survey(host, snapshots, peers)
        self._sender = Sender(host, snapshots)
        # Those of which a peer has said, since this daemon began, that it has not promoted them.
        self._confirmed: set[str] = set()
        self._not_before: dict[str, float] = {}
        self._wanted = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._workers = PeerWorkers("replicas", self._look_at_all)
        host.guards.append(self._guard)
        peers.guards.append(self._refuse_forgetting)
        peers.register("replica.source", Shape({"id": MID}), self._on_source)

    # Over the life of the daemon

    def open(self) -> None:
        """Begin to bring up to date what is due."""
        self._thread = threading.Thread(target=self._follow, name="replication", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End that; what is being sent is broken off."""
        self._closing = True
        self._wanted.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
        self._workers.wait(_CLOSE_S)

    def notices(self) -> "list[str]":
        """Return what whoever looks at the containers should know."""
        return [
            f"the replica of {record.name} on {record.replica['name']} is not up to date: "
            f"{record.replica['error']}"
            for record in self._replicated()
            if record.replica and record.replica.get("error")
        ]

    def _replicated(self) -> "list[Record]":
        return [one for one in self._host.store.list() if one.replica is not None and one.away is None]

    def _follow(self) -> None:
        while not self._closing:
            self._workers.begin({one.replica["peer"] for one in self._replicated() if one.replica})
            self._workers.wait(_ROUND_S)
            self._wanted.wait(self._pause_s())
            self._wanted.clear()

    def _pause_s(self) -> float | None:
        due = [self._due(record) for record in self._replicated()]
        return min(_LOOK_S, max(0.5, min(due) - time.time())) if due else None

    def _due(self, record: Record) -> float:
        assert record.replica is not None
        last = float(record.replica.get("last") or 0.0)
        return max(last + float(record.replica["every_s"]), self._not_before.get(record.replica["id"], 0.0))

    def _look_at_all(self, peer: str) -> None:
        """Do what is due with the replicas that a peer has."""
        answers = True
        for record in self._replicated():
            if self._closing or record.replica is None or record.replica["peer"] != peer:
                continue
            if answers and record.replica["id"] not in self._confirmed:
                # One that runs already may run over there, too.
                try:
                    self._confirm(record)
                except WrongState as error:
                    log.info("%d: %s", record.id, error.message)
                    continue
                except SysctrError as error:
                    log.info("%d: %s", record.id, error.message)
                    answers = False
            self._look_at(record)

    def _look_at(self, record: Record) -> None:
        """Begin to bring a replica up to date if it is time for that."""
        replica = record.replica
        assert replica is not None
        if time.time() < self._due(record):
            return
        self._not_before[replica["id"]] = time.time() + min(_RETRY_S, float(replica["every_s"]))
        try:
            self._submit(record)
        except (Busy, NoDaemon):
            pass
        except SysctrError as error:
            log.warning("%d: %s", record.id, error.message)

    # Whose it is

    def _guard(self, verb: str, record: Record) -> None:
        """Raise what speaks against the start of a container that may run on another host."""
        if verb != "start" or record.replica is None:
            return
        try:
            self._confirm(record)
        except PeerLost as error:
            if record.replica["id"] in self._confirmed:
                return
            raise Refused(
                f"cannot start {record.id}: {record.replica['name']} has its replica, does not answer, and "
                "may have promoted it since this host was up last",
                f"wait for it; or, if the container runs nowhere else, `sysctr replicate {record.id} --stop "
                f"--force` forgets the replica ({error.message})",
            ) from error

    def _confirm(self, record: Record) -> None:
        """Ask the peer whether it has promoted the replica; then the container is its own."""
        replica = record.replica
        assert replica is not None
        with closing(self._peers.connect(replica["peer"], _ASK_S)) as channel:
            answer = channel.call("replica.status", id=replica["id"])
            told = read_answer(channel, "replica.status", answer)
            if not told["promoted"]:
                self._confirmed.add(replica["id"])
                return
            log.error("%d: %s has promoted its replica: it is its own now", record.id, replica["name"])
            away = away_facts(replica["id"], replica["peer"], replica["name"])
            self._host.store.update(record.id, away=away, replica=None)
            self._end(record.id)
            self._host.network.release(record.id)
            channel.call("replica.drop", id=replica["id"])
        raise WrongState(
            f"cannot start {record.id}: {replica['name']} has promoted its replica, and has it now",
            f"what is here is kept: `sysctr destroy {record.id}` removes it",
        )

    def _end(self, number: int) -> None:
        """Kill a container that runs here though another host has it."""
        if self._host.live.running(number) is None:
            return
        try:
            task = self._host.tasks.submit(
                "stop", number, lambda task: self._lifecycle.stop(task, number, kill=True), takes_over=True
            )
            task.wait(_PATIENCE_S)
        except SysctrError as error:
            log.error("%d: cannot stop what runs elsewhere: %s", number, error.message)

    def _on_source(self, peer: Peer, message: dict[str, Any], _channel: Channel) -> dict[str, Any]:
        """Say whether this host still has the container of a replica."""
        known = any(
            one.replica is not None and (one.replica["id"], one.replica["peer"]) == (message["id"], peer.id)
            for one in self._replicated()
        )
        return {"known": known}

    def _refuse_forgetting(self, peer: Peer) -> None:
        for record in self._replicated():
            if record.replica and record.replica["peer"] == peer.id:
                raise WrongState(
                    f"cannot remove peer {peer.name}: it has the replica of {record.name}",
                    f"`sysctr replicate {record.name} --stop` first",
                )

    # What the API offers

    @naming
    def replicate(self, ref: str, spec: Mapping[str, Any]) -> Task:
        """Keep a replica of a container on a peer from now on, and make it now."""
        record = self._find(ref)
        record.usable("replicate")
        peer = self._peers.get(spec["peer"])
        if record.replica is not None and record.replica["peer"] != peer.id:
            raise WrongState(
                f"cannot replicate {record.id}: it has a replica on {record.replica['name']}",
                f"`sysctr replicate {record.name} --stop` first",
            )
        known = record.replica or {"id": secrets.token_hex(8), "last": None}
        replica = {
            **known, "peer": peer.id, "name": peer.name, "error": "",
            "every_s": float(spec.get("every_s") or known.get("every_s") or 900.0),
            "pools": dict(spec.get("pool_map") or {}), "bridges": dict(spec.get("bridge_map") or {}),
            "leave_out": list(spec.get("leave_out") or ()), "rate_bytes": spec.get("bwlimit_bytes") or None,
        }  # fmt: skip
        # Whoever asks for it anew has to be told what is in the way before anything is noted.
        report = self._survey.examine(record, self._options(replica))
        refuse_blocked(record.title, _real(report["blockers"], record))
        self._confirmed.add(replica["id"])
        # What is asked for here is the first run, and no second one at the same time.
        self._not_before[replica["id"]] = time.time() + replica["every_s"]
        record = self._host.store.update(record.id, replica=replica)
        try:
            return self._submit(record)
        except Busy:
            running = self._host.tasks.current(_held(record.id))
            if running is None:
                raise
            return running
        finally:
            self._wanted.set()

    @naming
    def stop(self, ref: str, *, force: bool = False) -> Task:
        """End the replication of a container and remove the replica; or a replica that is here."""
        try:
            record = self._find(ref)
        except NotFound:
            record = None
        if record is None or record.replica is None:
            entry = self._replicas.find(ref)
            return self._host.tasks.submit(
                "unreplicate", None, lambda _task: self._replicas.drop(entry),
                subject=f"the replica of {entry['name']}",
            )  # fmt: skip
        number, replica = record.id, record.replica

        def run(_task: Task) -> None:
            try:
                with closing(self._peers.connect(replica["peer"])) as channel:
                    channel.call("replica.drop", id=replica["id"])
            except SysctrError as error:
                if not force:
                    error.hint = "--force forgets it here, and it has to be removed there by hand"
                    raise
            self._host.store.update(number, replica=None)

        return self._host.tasks.submit(
            "unreplicate", number, run, subject=record.title, holds=_held(number)
        )

    def list(self) -> "list[dict[str, Any]]":
        """Return the replicas of this host's containers on others, and those of others here."""
        ours = [
            {
                "id": record.replica["id"], "role": "source", "container": record.id, "name": record.name,
                "peer": record.replica["name"], "every_s": record.replica["every_s"],
                "last": record.replica.get("last"), "error": record.replica.get("error", ""),
                "promoted": False,
            }
            for record in self._replicated() if record.replica
        ]  # fmt: skip
        return [*ours, *self._replicas.list()]

    def promote(self, ref: str, *, fenced: bool = False, start: bool = False) -> Task:
        """Make the container of a replica that is here."""
        entry = self._replicas.find(ref)

        def run(task: Task) -> dict[str, Any]:
            number = self._replicas.promote(entry, fenced=fenced)
            record = self._host.store.load(number)
            if start:
                self._lifecycle.start_new(task, record)
            return {"id": number, "name": record.name, "state": entry.get("taken")}

        return self._host.tasks.submit(
            "promote", None, run, subject=f"the replica of {entry['name']}"
        )

    # Doing it

    def _submit(self, record: Record) -> Task:
        number = record.id

        def run(task: Task) -> dict[str, Any]:
            error = ""
            try:
                return self._run(task, number)
            except SysctrError as raised:
                error = raised.message
                raise
            finally:
                self._note(number, error)

        return self._host.tasks.submit(
            "replicate", number, run, subject=record.title, holds=_held(number)
        )

    def _note(self, number: int, error: str) -> None:
        try:
            record = self._host.store.load(number)
            if record.replica is not None and record.replica.get("error", "") != error:
                self._host.store.update(number, replica={**record.replica, "error": error})
        except SysctrError as failed:
            log.warning("%d: %s", number, failed.message)

    def _run(self, task: Task, number: int) -> dict[str, Any]:
        """Bring the replica of a container up to date."""
        began_s, now = time.monotonic(), time.time()
        record = self._host.store.load(number)
        record.usable("replicate")
        replica = record.replica
        if replica is None:
            raise NotFound(f"cannot replicate {number}: it has no replica")
        peer = self._peers.get(replica["peer"])
        self._confirm(record)
        offer = self._offer(record, replica)
        link = Link(self._peers, peer, replica["id"], offer.as_dict(), task, "replica.begin")
        link.rate_bytes = replica.get("rate_bytes")
        try:
            link.keep_trying(link.open, _PATIENCE_S)
            with self._states.of(task, record, stop=False) as state:
                views = self._views(record, state)
                volumes = [one for one in self._snapshots.volumes(record) if one[1] in views]
                move = Move(record, offer, link, volumes, {v: Placed(v, "") for v in views})
                task.step("sending what has changed")
                link.keep_trying(
                    lambda: self._sender.send_pass(task, move, nullcontext(views), kept=True), _PATIENCE_S
                )
            answer = link.keep_trying(
                lambda: link.call_as("replica.keep", time=now, generation=record.generation), _PATIENCE_S
            )
        finally:
            link.close()
        current = self._host.store.load(number).replica
        if current is not None:
            self._host.store.update(number, replica={**current, "last": round(now, 3), "error": ""})
        return {
            "id": number, "peer": peer.name, "there": answer["number"], "sent_bytes": link.sent_bytes,
            "seconds": round(time.monotonic() - began_s, 3),
        }  # fmt: skip

    def _options(self, replica: Mapping[str, Any]) -> Options:
        return Options(
            peer=replica["name"], restart=True, pools=replica["pools"], bridges=replica["bridges"],
            leave_out=tuple(replica["leave_out"]),
        )  # fmt: skip

    def _offer(self, record: Record, replica: Mapping[str, Any]) -> Offer:
        offer = self._survey.offer(record, self._options(replica))
        sent = {name for name, _ in self._sent(record)}
        # One state of them counts, and by rsync what has to be kept here between two runs is nothing.
        volumes = tuple(
            dataclasses.replace(one, native=False) for one in offer.volumes if one.name in sent
        )
        return dataclasses.replace(offer, volumes=volumes, snapshots=())

    def _sent(self, record: Record) -> "list[tuple[str, int | None]]":
        """Return the volumes that a replica has, by the index of their mount points; None is the root."""
        config = record.usable("replicate")
        mounts = [
            (self._host.mounts.volume_of(record, mount).name, mount.index)
            for mount in config.mounts if mount.kind == "volume" and mount.backup
        ]  # fmt: skip
        return [(record.volume, None), *mounts]

    def _views(self, record: Record, state: State) -> dict[str, RootSpec]:
        return {
            name: state.root if index is None else state.mounts[index]
            for name, index in self._sent(record)
            if index is None or index in state.mounts
        }

    def _find(self, ref: str) -> Record:
        return self._host.store.find(ref)


def _held(number: int) -> str:
    """Return what a run holds: the container itself is held only for the moment that its state takes."""
    return f"replication of {number}"


def _real(blockers: "list[dict[str, str]]", record: Record) -> "list[dict[str, str]]":
    """Return what is in the way of a replica: its own earlier one is not."""
    return [one for one in blockers if record.replica is None or one["what"] not in ("name", "replica")]

