"""What is sent of a container: its volumes, pass by pass, and its snapshots, whoever asks for them."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from sysctr.engine.host import Host
from sysctr.engine.migration_check import Placed
from sysctr.engine.migration_link import Link
from sysctr.engine.migration_offer import Offer, OfferedSnapshot
from sysctr.engine.migration_streams import send_stream
from sysctr.engine.record import Record
from sysctr.engine.snapshots import Snapshots, Volume
from sysctr.engine.tasks import Task
from sysctr.engine.tree_sync import Exchange, PassMark, send_tree
from sysctr.errors import Refused, SysctrError
from sysctr.storage.base import Driver, RootSpec, Streams

_SETTLE_S = 30.0
# Whatever else works on a container has an end; a person who does not want to wait cancels the copy.
_HOLD_S = 24 * 3600.0


@dataclass
class Move:
    """One migration under way, and what the other side has of it."""

    record: Record
    offer: Offer
    link: Link
    volumes: list[Volume]
    placed: dict[str, Placed]
    # Of each volume, since when it may differ from what was sent; none for one that was not sent yet.
    marks: dict[str, PassMark] = field(default_factory=dict)
    # Those whose copy over there has files of ours alone, of this migration and of nothing older.
    plain: set[str] = field(default_factory=set)
    passes: list[dict[str, Any]] = field(default_factory=list)
    # The modes of the runs of rsync in this pass (sysctr.engine.tree_sync.MODES).
    runs: list[str] = field(default_factory=list)
    # The state that was sent last, where states are sent as streams.
    sent_state: str = ""

    @property
    def streams(self) -> bool:
        """Tell whether the volumes are sent as streams of their driver's own."""
        return any(one.method == "stream" for one in self.placed.values())


class Sender:
    """Sends volumes over a link."""

    def __init__(self, host: Host, snapshots: Snapshots) -> None:
        self._host = host
        self._snapshots = snapshots

    @contextlib.contextmanager
    def live_views(self, move: Move) -> Iterator[dict[str, RootSpec]]:
        # It runs, so they are active already, and stay so.
        yield {volume: driver.activate(volume) for driver, volume in move.volumes}

    @contextlib.contextmanager
    def views(self, move: Move, snapshot: str) -> Iterator[dict[str, RootSpec]]:
        with contextlib.ExitStack() as views:
            yield {
                volume: views.enter_context(driver.opened(volume, snapshot))
                for driver, volume in move.volumes
            }

    @contextlib.contextmanager
    def copied_state(self, task: Task, move: Move) -> Iterator[str]:
        """Give the name of the state that a copy is made of, empty for the volumes of a stopped container.

        The container itself is held only for the moment that this takes, where its pool keeps states.
        """
        host, record = self._host, move.record
        with contextlib.ExitStack() as kept, contextlib.ExitStack() as hold:
            hold.enter_context(host.tasks.hold(record.id, "copy", _HOLD_S, task))
            stopped = host.live.running(record.id) is None
            if stopped:
                host.live.wait_settled(record.id, _SETTLE_S)
                host.release(record.id)
            try:
                name, _ = self._snapshots.take_temporary(task, host.store.load(record.id))
            except Refused:
                if not stopped:
                    raise
                # Nobody starts it before it is copied.
                yield ""
                return
            kept.callback(self._forget, record, name)
            hold.close()
            yield name

    def _forget(self, record: Record, name: str) -> None:
        # It may be gone by now, and this with it.
        with contextlib.suppress(SysctrError), self._host.tasks.hold(record.id, "copy", _HOLD_S):
            self._snapshots.forget_temporary(record, name)
        self._host.collect_soon()

    def send_pass(
        self,
        task: Task,
        move: Move,
        views: "contextlib.AbstractContextManager[dict[str, RootSpec]]",
        *,
        live: bool = False,
        kept: bool = False,
        state: str = "",
    ) -> None:
        """Send all volumes once; views that are `kept` never change, and no pass follows.

        Of `live` ones, which change meanwhile, what vanishes is left to the next pass.

        `state` is the snapshot that they are of, where there is one that can be sent as a stream.
        """
        began_s, sent_before = time.monotonic(), move.link.sent_bytes
        move.runs.clear()
        if move.streams and state:
            for driver, volume in move.volumes:
                self._stream(move, driver, volume, state, self._last_kept(move, volume))
        elif move.streams:
            self._send_streams(task, move)
        else:
            with views as shown:
                for volume, view in shown.items():
                    self._send(task, move, volume, view, live=live, kept=kept)
        seconds = time.monotonic() - began_s
        sent = move.link.sent_bytes - sent_before
        move.passes.append(
            {
                "pass": len(move.passes) + 1, "seconds": round(seconds, 3), "sent_bytes": sent,
                "rate_bytes_s": round(sent / seconds) if seconds else None,
                "runs": list(move.runs),
            }
        )  # fmt: skip

    def _send(
        self, task: Task, move: Move, volume: str, view: RootSpec, *, live: bool = False, kept: bool = False
    ) -> None:
        """Make the copy of a volume over there what the view shows; what is `kept` never changes."""
        jobs = self._host.jobs_for(move.record)
        mark = None if kept else PassMark(view)
        since = move.marks.get(volume)
        if mark is not None:
            # A pass that is cut short has sent some of what it saw: what changes from here on is listed next.
            move.marks.setdefault(volume, mark)
        send = partial(send_tree, jobs, task, view)
        if since is not None:
            self._run(move, volume, "listed", partial(send, since=since, mark=mark), still=not live)
        places = partial(self._places, task, move, volume, partial(send, mark=mark), live=live)
        if since is None or not since.copied or not places():
            # What stands there already is of another build of the template, or of another time, and may look
            # the same without being it.
            mode = "all" if volume in move.plain else "content"
            first = mark if since is None else None
            self._run(move, volume, mode, partial(send, mark=first), still=not live)
            move.plain.add(volume)
        if mark is not None:
            mark.copied = True
            move.marks[volume] = mark

    def _places(
        self, task: Task, move: Move, volume: str, send: Callable[..., str], *, live: bool
    ) -> bool:
        """Bring names up to date where they changed; tell whether that is enough.

        A run of all would walk all of both sides, for as long as the container stands still.
        """
        here, there = self._run(move, volume, "places", send, still=not live)
        if live or (here and here == there):
            return True
        task.log(f"volume {volume} looks otherwise on {move.link.name}: comparing all of it")
        return False

    def _run(
        self, move: Move, volume: str, mode: str, send: Callable[..., str], *, still: bool
    ) -> tuple[str, str]:
        """Do one run and return the digests that both ends have made of all that they see, if they have."""
        digest = ""

        def work(exchange: Exchange) -> None:
            nonlocal digest
            digest = send(exchange=exchange, mode=mode, still=still)

        move.runs.append(mode)
        told = move.link.transfer("sync", work, volume=volume, mode=mode, still=still)
        return digest, str(told.get("digest", ""))

    def send_state(self, task: Task, move: Move, snapshot: OfferedSnapshot) -> None:
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

    def _last_kept(self, move: Move, volume: str) -> str:
        """Return the last snapshot that the target has of a volume, empty for none."""
        kept = [one.name for one in move.offer.snapshots if volume in one.parents]
        return next((name for name in reversed(kept) if name in move.link.begun["kept"]), "")

    def _send_streams(self, task: Task, move: Move) -> None:
        """Send the present state of all volumes, as of one moment, as what differs from the last one."""
        name, _ = self._snapshots.take_temporary(task, move.record)
        try:
            for driver, volume in move.volumes:
                self._stream(move, driver, volume, name, move.sent_state or self._last_kept(move, volume))
        except BaseException:
            self._snapshots.forget_temporary(move.record, name)
            raise
        self.forget_state(move)
        move.sent_state = name

    def forget_state(self, move: Move) -> None:
        if move.sent_state:
            # The container may be gone by now, and this with it.
            with contextlib.suppress(SysctrError):
                self._snapshots.forget_temporary(move.record, move.sent_state)
            move.sent_state = ""

    def _stream(self, move: Move, driver: Driver, volume: str, snapshot: str, base: str) -> None:
        streams = cast(Streams, driver)
        move.link.transfer(
            "stream", lambda exchange: send_stream(streams, volume, snapshot, base, exchange),
            volume=volume, snapshot=snapshot, base=base,
        )  # fmt: skip

    def turn(self, move: Move, patience_s: float) -> None:
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
