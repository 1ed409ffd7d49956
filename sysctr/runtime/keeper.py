"""The keeper: the supervisor's parent, which respawns it, reaps its orphans, and holds copies of consoles.

So a supervisor may die without a container noticing, and how an init ended meanwhile (halt or reboot, which
only the wait status tells) is not lost. It does nothing else, so that it has no reason to die.
"""

import fcntl
import os
import select
import signal
import socket
import time

from sysctr.linux import process
from sysctr.paths import layout
from sysctr.runtime import wire
from sysctr.runtime.begin import log, supervisor_argv

# A supervisor that dies at once is started again after this long, so that the machine stays usable.
_RESPAWN_PAUSE_S = 1.0


class Keeper:
    """What outlives a supervisor: descriptors by container, and wait statuses no supervisor has on record."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[list[str], list[int]]] = {}
        self._reaped: dict[int, int] = {}
        self._supervisor_pid = 0
        self._link: socket.socket | None = None
        self._quitting = False

    def serve(self) -> None:
        """Keep a supervisor alive until it says that it quits, or until a SIGTERM."""
        process.prctl(process.PR_SET_CHILD_SUBREAPER, 1)
        wake_reader, wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_writer)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self._terminate())
        poll = select.poll()
        poll.register(wake_reader, select.POLLIN)
        self._spawn(poll)
        while not (self._quitting and self._supervisor_pid == 0):
            for fd, _ in poll.poll():
                if fd == wake_reader:
                    _drain(wake_reader)
                elif self._link is not None and fd == self._link.fileno():
                    self._on_supervisor(poll)
            self._reap(poll)

    def _spawn(self, poll: "select.poll") -> None:
        self._started = time.monotonic()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.set_inheritable(True)
        argv = supervisor_argv(theirs.fileno())
        while not self._supervisor_pid:
            try:
                self._supervisor_pid = os.posix_spawn(argv[0], argv, os.environ)
            except OSError as error:
                # An upgrade may be replacing the interpreter, or memory is short: no reason to give up.
                log(f"keeper: cannot start the supervisor: {error}", 3)
                time.sleep(_RESPAWN_PAUSE_S)
        theirs.close()
        self._link = ours
        poll.register(ours.fileno(), select.POLLIN)

    def _terminate(self) -> None:
        self._quitting = True
        if self._supervisor_pid:
            self._send({"terminate": True})

    def _on_supervisor(self, poll: "select.poll") -> None:
        try:
            message, fds = wire.receive(self._link)
        except (OSError, wire.WireError):
            poll.unregister(self._link.fileno())
            self._link.close()
            self._link = None
            return
        if "hello" in message:
            for container_id, (names, held) in self._kept.items():
                self._send({"kept": container_id, "names": names}, held)
            for pid, status in self._reaped.items():
                self._send({"reaped": pid, "status": status})
            self._send({"end": True})
        elif "keep" in message:
            self._drop(message["keep"])
            self._kept[message["keep"]] = (message["names"], fds)
            return
        elif "claimed" in message:
            for pid in message["claimed"]:
                self._reaped.pop(pid, None)
        elif "drop" in message:
            self._drop(message["drop"])
        elif "quit" in message:
            self._quitting = True
        wire.close_all(fds)

    def _drop(self, container_id: int) -> None:
        wire.close_all(self._kept.pop(container_id, ([], []))[1])

    def _send(self, message: dict, fds: "list[int] | tuple[int, ...]" = ()) -> None:
        try:
            wire.send(self._link, message, fds)
        except (OSError, AttributeError, wire.WireError):
            log("keeper: the supervisor does not listen", 4)

    def _reap(self, poll: "select.poll") -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid != self._supervisor_pid:
                # Kept until a supervisor says that it is on record: the one that we tell may be dying.
                self._reaped[pid] = status
                if self._link is not None:
                    self._send({"reaped": pid, "status": status})
                continue
            self._supervisor_pid = 0
            if self._link is not None:
                poll.unregister(self._link.fileno())
                self._link.close()
                self._link = None
            if not self._quitting:
                log(f"keeper: the supervisor ended with wait status {status}, starting another", 3)
                if time.monotonic() - self._started < _RESPAWN_PAUSE_S:
                    time.sleep(_RESPAWN_PAUSE_S)
                self._spawn(poll)


def _drain(fd: int) -> None:
    try:
        while os.read(fd, 512):
            pass
    except BlockingIOError:
        pass


def main() -> int:
    """Run the keeper of the installation that SYSCTR_ROOT names; a second one ends, or waits as a unit."""
    where = layout()
    process.close_range(3)  # whatever the command that started us had open
    os.umask(0o077)
    os.makedirs(where.run, mode=0o755, exist_ok=True)
    # Inherited by the supervisor: while either of them lives, there is no place for another pair.
    lock_fd = os.open(where.keeper_lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if "INVOCATION_ID" not in os.environ:
            log("keeper: another one runs")
            return 0
        # A unit whose program ends is started again and again, then given up. So it waits until the other
        # pair, or the supervisor that outlived its keeper, is gone: then it takes over.
        log("keeper: another one runs, waiting for its end")
        fcntl.flock(lock_fd, fcntl.LOCK_EX)
    os.set_inheritable(lock_fd, True)
    process.set_name("sysctr-keeper")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Keeper().serve()
    return 0
