"""What runs now: the daemon's picture of its containers, kept true by the supervisor's events."""

import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from sysctr import errors
from sysctr.engine.events import Bus
from sysctr.engine.supervisor import Supervised, SupervisorClient
from sysctr.runtime import wire

log = logging.getLogger(__name__)

UNKNOWN_STATUS = -1


@dataclass(frozen=True)
class Live:
    """A container that runs, or ran since the host booted."""

    id: int
    pid: int
    start_time: int  # of pid, in clock ticks since boot: a number may come again, both together do not
    running: bool
    ready: bool
    started: float
    exit_status: int | None
    frozen: bool = False
    settled: bool = False  # after its end: links, cgroups and addresses are put away

    def is_run(self, pid: int, start_time: int) -> bool:
        """Tell whether this is the run of that init. (Of this boot, as the daemon itself is.)"""
        return (self.pid, self.start_time) == (pid, start_time)


def exit_reason(status: int) -> dict:
    """Say how an init ended: halt, reboot, killed, exited, or unknown, with the number where there is one.

    The kernel kills the init of a pid namespace with SIGINT for a halt or power-off asked for inside, and
    with SIGHUP for a reboot (reboot(2)).
    """
    if status == UNKNOWN_STATUS:
        return {"reason": "unknown", "status": None}
    if os.WIFEXITED(status):
        return {"reason": "exited", "status": os.WEXITSTATUS(status)}
    number = os.WTERMSIG(status)
    reason = {signal.SIGINT: "halt", signal.SIGHUP: "reboot"}.get(number, "killed")
    return {"reason": reason, "status": number}


class LiveTable:
    """Every container's Live, and the thread that follows the supervisor.

    `on_exit(live)` is called in a thread of its own once for each end; the container counts as settled when
    it has returned. Waiting callers are woken by every change.
    """

    def __init__(self, supervisor: SupervisorClient, bus: Bus, on_exit: Callable[[Live], None]) -> None:
        self._supervisor = supervisor
        self._bus = bus
        self._on_exit = on_exit
        self._changed = threading.Condition()
        self._live: dict[int, Live] = {}
        self._settling: set[int] = set()
        self._stop_reader, self._stop_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread: threading.Thread | None = None
        self._connection: socket.socket | None = None

    def open(self, is_frozen: Callable[[int], bool]) -> None:
        """Learn what runs; nothing is done about it before `follow`."""
        self._connection = self._supervisor.subscribe()
        for known in self._supervisor.list().values():
            self._adopt(known, frozen=known.running and is_frozen(known.id))

    def follow(self) -> None:
        """Put away what ended while nobody looked, and follow the supervisor from now on."""
        for live in [live for live in self._live.values() if not live.running]:
            self._settle(live)
        self._thread = threading.Thread(
            target=self._follow, args=(self._connection,), name="supervisor", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop following; containers are not touched."""
        os.write(self._stop_writer, b"x")
        if self._thread is not None:
            self._thread.join(5)

    def get(self, container_id: int) -> Live | None:
        """Return what is known of a container, None when it never ran since boot."""
        return self._live.get(container_id)

    def running(self, container_id: int) -> Live | None:
        """Return the container's Live if it runs."""
        live = self._live.get(container_id)
        return live if live is not None and live.running else None

    def ids(self) -> "list[int]":
        """Return every container that is known here."""
        return list(self._live)

    def note_started(self, container_id: int, pid: int, start_time: int) -> None:
        """Note a start that the caller itself carried out, without waiting for the event."""
        with self._changed:
            known = self._live.get(container_id)
            # The event, or even the end, may have come first.
            if known is None or not known.is_run(pid, start_time):
                self._live[container_id] = _begun(container_id, pid, start_time)
            self._changed.notify_all()

    def note_frozen(self, container_id: int, *, frozen: bool) -> None:
        """Note that a container was frozen or thawed."""
        with self._changed:
            if container_id in self._live:
                self._live[container_id] = replace(self._live[container_id], frozen=frozen)
            self._changed.notify_all()

    def forget(self, container_id: int) -> None:
        """Drop what is known of a container that is destroyed."""
        with self._changed:
            self._live.pop(container_id, None)

    def wait(self, container_id: int, fact: Callable[[Live | None], bool], timeout_s: float) -> bool:
        """Wait until fact(live) holds; False when the time is over first."""
        with self._changed:
            return self._changed.wait_for(lambda: fact(self._live.get(container_id)), timeout_s)

    def wait_settled(self, container_id: int, timeout_s: float) -> bool:
        """Wait until a container has ended and all of its end is put away."""
        return self.wait(
            container_id, lambda live: live is None or (not live.running and live.settled), timeout_s
        )

    def _adopt(self, known: Supervised, *, frozen: bool = False) -> None:
        live = Live(
            known.id, known.pid, known.start_time, known.running, known.ready, known.started,
            known.exit_status, frozen,
        )  # fmt: skip
        with self._changed:
            before = self._live.get(known.id)
            if before is not None and before.is_run(known.pid, known.start_time):
                if not before.running:
                    return  # its end is known already
                live = replace(live, frozen=before.frozen)
            self._live[known.id] = live
            self._changed.notify_all()
        if not known.running and self._thread is not None:
            self._settle(live)

    def _settle(self, live: Live) -> None:
        with self._changed:
            if live.id in self._settling:
                return
            self._settling.add(live.id)

        def settle() -> None:
            try:
                self._on_exit(live)
            except Exception:
                log.exception("%d: cannot put away what its end left", live.id)
            with self._changed:
                self._settling.discard(live.id)
                known = self._live.get(live.id)
                if known is not None and known.is_run(live.pid, live.start_time):
                    self._live[live.id] = replace(known, settled=True)
                self._changed.notify_all()

        threading.Thread(target=settle, name=f"exit-{live.id}", daemon=True).start()

    def _on_event(self, event: dict) -> None:
        container_id = event["id"]
        ended = None
        with self._changed:
            before = self._live.get(container_id)
            if event["event"] == "started":
                # A supervisor that was not upgraded yet does not tell the start time.
                known_start = before.start_time if before is not None else 0
                run = event["pid"], event.get("start_time", known_start)
                if before is None or not before.is_run(*run):
                    self._live[container_id] = _begun(container_id, *run)
            elif event["event"] == "ready" and before is not None:
                self._live[container_id] = replace(before, ready=True)
            elif event["event"] == "exited" and before is not None and before.running:
                ended = replace(before, running=False, frozen=False, exit_status=event["status"])
                self._live[container_id] = ended
            self._changed.notify_all()
        if ended is not None:
            self._settle(ended)
        else:
            self._bus.publish("container", id=container_id, change=event["event"])

    def _follow(self, connection: socket.socket) -> None:
        poll = select.poll()
        poll.register(self._stop_reader, select.POLLIN)
        while True:
            poll.register(connection.fileno(), select.POLLIN)
            try:
                while True:
                    ready = [fd for fd, _ in poll.poll()]
                    if self._stop_reader in ready:
                        connection.close()
                        return
                    self._on_event(wire.receive_plain(connection))
            except (wire.WireError, OSError) as error:
                log.warning("the supervisor is gone (%s), looking for the next one", error)
            poll.unregister(connection.fileno())
            connection.close()
            found = self._find_again(poll)
            if found is None:
                return
            connection = found

    def _find_again(self, poll: "select.poll") -> socket.socket | None:
        """Return a subscription at the supervisor that comes next; None when this daemon stops."""
        while True:
            try:
                self._supervisor.ensure()
                connection = self._supervisor.subscribe()
                # What happened while nobody told: every end is found here.
                for known in self._supervisor.list().values():
                    self._adopt(known)
                return connection
            except (errors.SysctrError, OSError, wire.WireError) as error:
                log.error("cannot reach the supervisor: %s", error)
                if poll.poll(500):
                    return None


def _begun(container_id: int, pid: int, start_time: int) -> Live:
    return Live(container_id, pid, start_time, True, False, time.time(), None)
