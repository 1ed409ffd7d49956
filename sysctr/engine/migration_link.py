"""The conversation of one migration with its target, over as many connections as it takes."""

import contextlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sysctr.engine.migration_answers import read_answer
from sysctr.engine.migration_streams import giving
from sysctr.engine.peer_records import Peer
from sysctr.engine.peers import Peers
from sysctr.engine.tasks import Task
from sysctr.engine.tree_sync import Exchange
from sysctr.peer.channel import Channel, PeerLost

_AGAIN_S = 1.0
_CHECK_S = 0.1
# A target that makes an image, or waits for a disk, takes its time to answer.
_ANSWER_S = 120.0
# In a stream it shows that it lives more often than that, whatever its disk does.
_IDLE_S = 30.0

_Answer = TypeVar("_Answer")


class Link:
    """Talks about one migration; whoever gives it work may be called again after a broken connection."""

    def __init__(
        self,
        peers: Peers,
        peer: Peer,
        mid: str,
        offer: dict[str, Any],
        task: Task,
        begin: str = "migrate.begin",
    ) -> None:
        self.name = peer.name
        self._begin = begin
        # Its name may change.
        self._peer_id = peer.id
        self.mid = mid
        self.sent_bytes = 0
        self.rate_bytes: int | None = None
        # What the target said last of how far it is.
        self.begun: dict[str, Any] = {}
        self._peers = peers
        self._offer = offer
        self._task = task
        self._channel: Channel | None = None

    def close(self) -> None:
        """Hang up; twice is fine."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def open(self) -> dict[str, Any]:
        """Connect and begin, or go on with, the migration; raises PeerLost, or why the target refuses it."""
        self.close()
        channel = self._peers.connect(self._peer_id)
        try:
            told = channel.call(self._begin, _ANSWER_S, id=self.mid, offer=self._offer)
            self.begun = read_answer(channel, self._begin, told)
        except BaseException:
            channel.close()
            raise
        self._channel = channel
        return self.begun

    def call(self, op: str, timeout_s: float = _ANSWER_S, **fields: Any) -> dict[str, Any]:
        """Send a message about this migration and return the answer."""
        return self.call_as(f"migrate.{op}", timeout_s, **fields)

    def call_as(self, op: str, timeout_s: float = _ANSWER_S, **fields: Any) -> dict[str, Any]:
        """Send any message that names this migration, and return the answer."""
        if self._channel is None:
            self.open()
        assert self._channel is not None
        return read_answer(self._channel, op, self._channel.call(op, timeout_s, id=self.mid, **fields))

    def transfer(self, op: str, move: Callable[[Exchange], Any], **fields: Any) -> dict[str, Any]:
        """Ask the target to take a stream, and let `move` use what exchanges bytes with it.

        Returns what the target says of what it got.
        """
        self.call(op, **fields)
        channel = self._channel
        assert channel is not None
        try:
            with giving(
                channel, told=self._told, rate_bytes=self.rate_bytes, check=self._task.check, idle_s=_IDLE_S
            ) as exchange:
                move(exchange)
            return read_answer(channel, f"{op}.end", channel.answer(_ANSWER_S))
        except BaseException:
            # What is still on its way belongs to nobody now.
            self.close()
            raise

    def _told(self, count: int) -> None:
        self.sent_bytes += count
        self._task.progress(self.sent_bytes)

    def keep_trying(self, work: Callable[[], _Answer], patience_s: float) -> _Answer:
        """Do work that talks with the target, again and again where the connection breaks.

        Raises PeerLost when the target was not to be had for `patience_s`; Cancelled when the task is.
        """
        lost_since, moved_bytes = None, -1
        while True:
            try:
                return work()
            except PeerLost as error:
                self.close()
                now = time.monotonic()
                # What got on since the last time is lost anew.
                if lost_since is None or self.sent_bytes > moved_bytes:
                    lost_since, moved_bytes = now, self.sent_bytes
                if now - lost_since >= patience_s:
                    raise
                reason = error.message.partition(": ")[2] or error.message
                self._task.step(f"waiting for {self.name}: {reason}")
                self._pause()
            except BaseException:
                self.close()
                raise
            with contextlib.suppress(PeerLost):
                self.open()

    def _pause(self) -> None:
        until = time.monotonic() + _AGAIN_S
        while time.monotonic() < until:
            self._task.check()
            time.sleep(_CHECK_S)
