"""The daemon's way to its supervisor: each call is one conversation, safe from any thread."""

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from sysctr import errors, launch
from sysctr.paths import Layout
from sysctr.runtime import wire
from sysctr.runtime.begin import keeper_argv

_ANSWER_S = 60
_RESPAWN_S = 10


class Fd:
    """An owned descriptor: closed once, or handed over once with `take`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor, which stays owned here."""
        if self._fd < 0:
            raise ValueError("the descriptor is closed or was handed over")
        return self._fd

    def take(self) -> int:
        """Hand the descriptor over: the caller closes it now."""
        fd, self._fd = self.fileno(), -1
        return fd

    def close(self) -> None:
        """Close the descriptor if it is still owned."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "Fd":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Supervised:
    """What the supervisor knows of one container; `exit_status` is a wait status, -1 when it is unknown."""

    id: int
    pid: int
    start_time: int
    started: float
    running: bool
    ready: bool
    exit_status: int | None
    console: bool


class Starting:
    """A container between create and start: its namespaces exist and its child waits.

    Closing it without `start` ends the child; nothing of it stays.
    """

    def __init__(self, connection: socket.socket, pid: int, start_time: int, fds: "list[int]") -> None:
        self._connection = connection
        self.pid = pid
        self.start_time = start_time
        self.pidfd, self.netns, self.netlink = (Fd(fd) for fd in fds)

    def start(self) -> None:
        """Let the child run its last steps and execute init; raises SysctrError with the step that failed."""
        try:
            # A child that failed meanwhile has said so and is gone: sending fails then, and so may the first
            # look, but its last word is still to be read.
            with contextlib.suppress(wire.ConnectionClosed):
                wire.send(self._connection, {"op": "start"})
            try:
                answer = wire.receive_plain(self._connection)
            except wire.ConnectionClosed:
                answer = wire.receive_plain(self._connection)
        except TimeoutError as error:
            raise errors.SysctrError(f"the last steps took longer than {_ANSWER_S} s") from error
        except (wire.WireError, OSError) as error:
            raise errors.SysctrError("the supervisor died while it worked", "try again") from error
        if "error" in answer:
            raise errors.from_dict(answer["error"])

    def close(self) -> None:
        """Let go of the conversation and the descriptors."""
        for fd in (self.pidfd, self.netns, self.netlink):
            fd.close()
        self._connection.close()

    def __enter__(self) -> "Starting":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SupervisorClient:
    """Conversations with the supervisor of one installation."""

    def __init__(self, where: Layout) -> None:
        self._where = where

    def ensure(self) -> dict:
        """Return the supervisor's status, after starting keeper and supervisor where none answer."""
        # Held by the keeper, or by a supervisor that outlived it.
        if not launch.is_locked(self._where.keeper_lock):
            if launch.managed_by_systemd(self._where):
                # Started from here it would be in the daemon's cgroup, and its unit find its place taken.
                launch.systemctl("start", launch.SUPERVISOR_UNIT)
            else:
                _spawn_keeper(self._where)
        return self.hello()

    def hello(self) -> dict:
        """Return version, pid and counts of the running supervisor."""
        return self._ask({"op": "hello"}, again=True)

    def create(self, container_id: int, plan: dict) -> Starting:
        """Clone the container's first process and return it waiting."""
        connection = self._connect()
        try:
            wire.send(connection, {"op": "create", "id": container_id, "plan": plan})
            answer, fds = wire.receive(connection)
        except (wire.WireError, OSError) as error:
            connection.close()
            raise errors.NoDaemon(f"cannot start {container_id}: the supervisor: {error}") from error
        except BaseException:
            connection.close()
            raise
        if "error" in answer or len(fds) != 3:
            wire.close_all(fds)
            connection.close()
            raise errors.from_dict(answer.get("error", {"message": "the supervisor gave no descriptors"}))
        created = answer["created"]
        return Starting(connection, created["pid"], created["start_time"], fds)

    def signal(self, container_id: int, signal_number: int) -> None:
        """Send a signal to a container's init."""
        self._ask({"op": "signal", "id": container_id, "signal": signal_number})

    def forget(self, container_id: int) -> None:
        """Drop the record of a container that has ended."""
        self._ask({"op": "forget", "id": container_id}, again=True)

    def list(self) -> "dict[int, Supervised]":
        """Return every container the supervisor runs, or whose end was not forgotten yet."""
        answer = self._ask({"op": "list"}, again=True)["containers"]
        return {int(i): _supervised(int(i), state) for i, state in answer.items()}

    def pidfd(self, container_id: int) -> "tuple[int, Fd]":
        """Return pid and pidfd of a running container's init."""
        with self._connect() as connection:
            try:
                wire.send(connection, {"op": "pidfd", "id": container_id})
                answer, fds = wire.receive(connection)
            except (wire.WireError, OSError) as error:
                raise errors.NoDaemon(f"cannot reach the supervisor: {error}") from error
        if "error" in answer:
            wire.close_all(fds)
            raise errors.from_dict(answer["error"])
        return answer["pid"], Fd(fds[0])

    def ticket(self, request: dict) -> str:
        """Return a one-time ticket for the ticket socket."""
        return self._ask({"op": "ticket", "request": request}, again=True)["ticket"]

    def job(self, plan: dict, stdio: "tuple[int, ...]", check: Callable[[], None] | None = None) -> int:
        """Run a plan with the given descriptors from 0 on to its end and return its exit status.

        `check` is called several times a second and may raise to end the job. Raises SysctrError when the
        program was never reached.
        """
        with self._connect() as connection:
            connection.settimeout(None)
            wire.send(connection, {"op": "job", "plan": plan}, stdio)
            return _await_exit(connection, check)

    def working(self) -> "list[int]":
        """Return the stopped containers whose files are being worked on, or may be with an unused ticket."""
        return self._ask({"op": "working"}, again=True)["working"]

    def wait_idle(
        self, container_id: int, check: Callable[[], None] | None = None, *, end: bool = False
    ) -> None:
        """Wait until nothing works on a stopped container's files, over an upgrade of the supervisor too.

        With `end` what works on them is killed. `check` is called several times a second and may raise.
        """
        while True:
            with self._connect() as connection, contextlib.suppress(wire.WireError, ConnectionError):
                wire.send(connection, {"op": "idle", "id": container_id, "end": end})
                _await(connection, check)
                return

    def use_ticket(self, ticket: str, check: Callable[[], None] | None = None) -> None:
        """Redeem a ticket for work without streams and wait for its end; raises SysctrError if it failed."""
        with wire.connect(self._where.ticket_socket, _ANSWER_S) as connection:
            wire.send(connection, {"ticket": ticket})
            _await_exit(connection, check)

    def subscribe(self) -> socket.socket:
        """Return a connection on which the supervisor sends its events; read it with wire.receive_plain."""
        connection = self._connect()
        wire.send(connection, {"op": "subscribe"})
        wire.receive_plain(connection)
        connection.settimeout(None)
        return connection

    def upgrade(self) -> None:
        """Let the supervisor execute the code that is on disk now, as soon as nothing is being started."""
        deadline = time.monotonic() + _ANSWER_S
        while True:
            try:
                self._ask({"op": "upgrade"})
                return
            except errors.Busy:
                if time.monotonic() > deadline:
                    raise
            select.poll().poll(10)

    def quit(self) -> None:
        """End supervisor and keeper; refused while a container runs."""
        self._ask({"op": "quit"})

    def _connect(self) -> socket.socket:
        # One that died has a successor within a second: nobody needs to be told.
        deadline = time.monotonic() + _RESPAWN_S
        while True:
            try:
                return wire.connect(self._where.plan_socket, _ANSWER_S)
            except OSError as error:
                if time.monotonic() > deadline:
                    raise errors.NoDaemon(
                        f"cannot reach the supervisor: {error.strerror}", "see `sysctr doctor`"
                    ) from error
            select.poll().poll(10)

    def _ask(self, message: dict, *, again: bool = False) -> dict:
        """Ask and return the answer; `again` where asking twice does no harm.

        A supervisor that dies or executes itself anew resets what waits in its queue: such a question goes
        to the next one.
        """
        deadline = time.monotonic() + _RESPAWN_S
        while True:
            with self._connect() as connection:
                try:
                    wire.send(connection, message)
                    answer = wire.receive_plain(connection)
                    break
                except (wire.WireError, OSError) as error:
                    if not again or time.monotonic() > deadline:
                        raise errors.NoDaemon(f"cannot reach the supervisor: {error}") from error
        if "error" in answer:
            raise errors.from_dict(answer["error"])
        return answer


def _await_exit(connection: socket.socket, check: Callable[[], None] | None) -> int:
    while True:
        try:
            answer = _await(connection, check)
        except wire.WireError as error:
            raise errors.SysctrError("the supervisor died while it worked", "try again") from error
        if "exit" in answer:
            return answer["exit"]


def _await(connection: socket.socket, check: Callable[[], None] | None) -> dict:
    """Return the next answer, calling `check` several times a second until it comes."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    while True:
        if check is not None:
            check()
        if poll.poll(200):
            break
    answer = wire.receive_plain(connection)
    if "error" in answer:
        raise errors.from_dict(answer["error"])
    return answer


def _supervised(container_id: int, state: dict) -> Supervised:
    return Supervised(
        container_id, state["pid"], state["start_time"], state["started"], state["running"], state["ready"],
        state["exit"], state["console"],
    )  # fmt: skip


def _spawn_keeper(where: Layout) -> None:
    os.makedirs(where.log, mode=0o750, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    log_fd = os.open(f"{where.log}/supervisor.log", flags, 0o640)
    null_fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        if where.root:
            environment["SYSCTR_ROOT"] = where.root
        actions = [(os.POSIX_SPAWN_DUP2, null_fd, 0)]
        actions += [(os.POSIX_SPAWN_DUP2, log_fd, 1), (os.POSIX_SPAWN_DUP2, log_fd, 2)]
        argv = keeper_argv()
        pid = os.posix_spawn(argv[0], argv, environment, file_actions=actions)
        os.waitpid(pid, 0)
    finally:
        os.close(log_fd)
        os.close(null_fd)
