"""The supervisor: parent of every init, holder of consoles, gate into containers; it decides nothing.

Two sockets: on the first the daemon alone sends plans, signals and questions; the second takes a one-time
ticket that the daemon got, from anyone who may connect. One thread; a conversation that creates a container
lives as long as its connection, so a daemon that dies half-way leaves nothing half-made.
"""

import gc
import json
import os
import resource
import signal
import socket
import sys
import time

from sysctr import __version__
from sysctr.errors import Busy, NotFound, SysctrError, UsageError, WrongState
from sysctr.linux import process
from sysctr.paths import Layout, layout
from sysctr.runtime import wire
from sysctr.runtime.begin import descriptor_argument, log, supervisor_argv
from sysctr.runtime.containers import UNKNOWN_STATUS, Container, Creation
from sysctr.runtime.loop import Loop
from sysctr.runtime.notify import discard, reap_later
from sysctr.runtime.records import Records
from sysctr.runtime.sessions import Session

_TICKET_LIFE_S = 30
_TICKETS_LIMIT = 4096


class Supervisor:
    """Everything this process knows; see the module's sentence."""

    def __init__(self, where: Layout, keeper: "socket.socket | None") -> None:
        self.where = where
        self.loop = Loop()
        self.records = Records(where.supervised)
        self.containers: dict[int, Container] = {}
        self.creations: dict[int, Creation] = {}
        self.started = time.time()
        self.keeper = keeper
        self._sessions: set[Session] = set()
        self._subscribers: list[socket.socket] = []
        self._tickets: dict[str, tuple[float, dict]] = {}
        # Who wants to be told when nothing works on a stopped container's files any more.
        self._waiting: list[tuple[int, socket.socket]] = []
        # What the keeper told at our start: wait statuses by pid of processes an earlier supervisor had.
        self.exits: dict[int, int] = {}
        os.makedirs(where.consoles, mode=0o700, exist_ok=True)
        os.makedirs(f"{where.run}/stage", mode=0o755, exist_ok=True)

    def serve(self) -> None:
        """Adopt what runs, then answer until told to quit."""
        kept = self._kept_by_keeper()
        for container_id, record in self.records.read_all().items():
            Container.adopt(self, container_id, record, kept.pop(container_id, {}))
        self.tell_keeper({"claimed": list(self.exits)})
        for fds in kept.values():
            if "notify" in fds:
                discard(self.loop, fds.pop("notify"))
            wire.close_all(list(fds.values()))
        if self.keeper is not None:
            self.loop.watch(self.keeper.fileno(), self._on_keeper)
        for path, mode, handler in (
            (self.where.plan_socket, 0o600, self._on_plan_message),
            (self.where.ticket_socket, 0o660, self._on_ticket_message),
        ):
            listener = wire.listen(path, mode)
            if mode == 0o660:
                _give_to_group(path, self.where.group)
            listener.setblocking(False)
            self.loop.watch(listener.fileno(), self._acceptor(listener, handler))
        self.loop.run()

    def publish(self, event: dict) -> None:
        """Send an event to every subscriber; one that is gone is forgotten."""
        for subscriber in list(self._subscribers):
            try:
                wire.send(subscriber, event)
            except (OSError, wire.WireError):
                self._forget_subscriber(subscriber)

    def tell_keeper(self, message: dict, fds: "list[int] | tuple[int, ...]" = ()) -> None:
        """Let the keeper hold copies of descriptors, or let go of them."""
        if self.keeper is None:
            return
        try:
            wire.send(self.keeper, message, fds)
        except (OSError, wire.WireError):
            log(f"cannot tell the keeper {sorted(message)}")

    # Conversations

    def _acceptor(self, listener: socket.socket, handler):
        def accept(_events: int) -> None:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            # A peer that does not read loses its connection; nobody waits for it.
            connection.setblocking(False)
            self._watch(connection, handler)

        return accept

    def _watch(self, connection: socket.socket, handler) -> None:
        self.loop.watch(connection.fileno(), lambda _events: self._on_connection(connection, handler))

    def _on_connection(self, connection: socket.socket, handler) -> None:
        try:
            message, fds = wire.receive(connection)
        except (OSError, wire.WireError):
            self.drop(connection)
            return
        try:
            handler(connection, message, fds)
        except SysctrError as error:
            self._answer(connection, {"error": error.as_dict()})
        except (OSError, wire.WireError, KeyError, TypeError, ValueError) as error:
            log(f"cannot carry out {message.get('op', 'a request')}: {error!r}")
            text = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)
            self._answer(connection, {"error": {"code": "failed", "message": text, "hint": ""}})
        finally:
            wire.close_all(fds)

    def _answer(self, connection: socket.socket, message: dict, fds: "tuple[int, ...]" = ()) -> None:
        try:
            wire.send(connection, message, fds)
        except (OSError, wire.WireError):
            self.drop(connection)

    def drop(self, connection: socket.socket) -> None:
        """Close a connection that no conversation owns any more."""
        if connection.fileno() >= 0:
            self._forget_subscriber(connection)
            self._waiting = [entry for entry in self._waiting if entry[1] is not connection]
            self.loop.forget(connection.fileno())
            connection.close()

    def _forget_subscriber(self, connection: socket.socket) -> None:
        self._subscribers = [other for other in self._subscribers if other is not connection]

    def _on_plan_message(self, connection: socket.socket, message: dict, fds: "list[int]") -> None:
        operation = message.get("op")
        if operation == "create":
            container_id = message["id"]
            if container_id in self.creations:
                raise Busy(f"cannot start {container_id}: it is being started already")
            self.refuse_second_mount(container_id, "start")
            # From here on the conversation owns the connection.
            self.creations[container_id] = Creation(self, connection, container_id, message["plan"])
        elif operation == "job":
            self._refuse_second_job(message["plan"])
            stdio, fds[:] = list(fds), []
            self._start_session(
                connection, self._on_plan_message, lambda session: session.run_plan(message["plan"], stdio)
            )
        elif operation == "ticket":
            self._answer(connection, {"ticket": self._new_ticket(message["request"])})
        elif operation == "working":
            self._answer(connection, {"working": sorted(self._worked_on())})
        elif operation == "idle":
            if message.get("end"):
                self._end_work(message["id"])
            self._waiting.append((message["id"], connection))
            self._tell_idle()
        elif operation == "signal":
            self._container(message["id"]).kill(message["signal"])
            self._answer(connection, {"ok": True})
        elif operation == "forget":
            container = self.containers.get(message["id"])
            if container and container.running:
                raise WrongState(f"cannot forget {message['id']}: it is running")
            self.containers.pop(message["id"], None)
            self.records.remove(message["id"])
            self._answer(connection, {"ok": True})
        elif operation == "list":
            states = {str(i): container.state() for i, container in self.containers.items()}
            self._answer(connection, {"containers": states})
        elif operation == "pidfd":
            container = self._container(message["id"])
            self._answer(connection, {"pid": container.pid}, (container.pidfd,))
        elif operation == "subscribe":
            self._subscribers.append(connection)
            self._answer(connection, {"ok": True})
        elif operation == "hello":
            self._answer(connection, self._status())
        elif operation == "upgrade":
            self._upgrade(connection)
        elif operation == "quit":
            self._quit(connection)
        else:
            raise UsageError(f"unknown operation {operation!r}", "daemon and supervisor differ in version")

    def _refuse_second_job(self, plan: dict) -> None:
        """Raise if what a job is to write to is in use; its plan tells the upper, the container or both."""
        upper = plan.get("upper", "")
        if upper and any(session.upper == upper for session in self._sessions):
            raise Busy(f"cannot work on {upper}: another job does", "try again in a moment")
        if "container" in plan:
            self.refuse_second_mount(plan["container"], "work on the files of", upper)

    def refuse_second_mount(self, container_id: int, verb: str, upper: str = "") -> None:
        """Raise if a container's upper is in use: the kernel only warns of a second overlay on it.

        Who wants but one of its uppers, and says which, may have it beside jobs that have another.
        """
        container = self.containers.get(container_id)
        if (container and container.running) or container_id in self.creations:
            raise WrongState(f"cannot {verb} {container_id}: it is running")
        if any(
            session.volume_of == container_id and not (upper and session.upper)
            for session in self._sessions
        ):  # fmt: skip
            raise Busy(
                f"cannot {verb} {container_id}: its files are being worked on", "try again in a moment"
            )

    def _worked_on(self) -> "set[int]":
        """Return the stopped containers whose files are being worked on, or may be with an unused ticket."""
        now = time.monotonic()
        tickets = [request for expires, request in self._tickets.values() if expires > now]
        promised = {request["plan"]["container"] for request in tickets if request.get("plan")}
        return promised | {session.volume_of for session in self._sessions if session.volume_of is not None}

    def _tell_idle(self) -> None:
        busy = self._worked_on() if self._waiting else ()
        for container_id, connection in list(self._waiting):
            if container_id not in busy:
                self._waiting.remove((container_id, connection))
                self._answer(connection, {"idle": container_id})

    def _end_work(self, container_id: int) -> None:
        """Take back the tickets for a stopped container's files, and kill what works on them."""
        for ticket, (_, request) in list(self._tickets.items()):
            if request.get("plan", {}).get("container") == container_id:
                del self._tickets[ticket]
        for session in self._sessions:
            if session.volume_of == container_id:
                session.kill()

    def _end_session(self, session: Session) -> None:
        self._sessions.discard(session)
        self._tell_idle()

    def _status(self) -> dict:
        return {
            "version": __version__, "protocol": wire.PROTOCOL, "pid": os.getpid(), "started": self.started,
            "keeper": self.keeper is not None, "containers": sum(c.running for c in self.containers.values()),
            "sessions": len(self._sessions),
        }  # fmt: skip

    def _container(self, container_id: int) -> Container:
        container = self.containers.get(container_id)
        if container is None or not container.running:
            raise WrongState(f"cannot reach {container_id}: it is not running")
        return container

    # Tickets

    def _new_ticket(self, request: dict) -> str:
        now = time.monotonic()
        self._tickets = {t: entry for t, entry in self._tickets.items() if entry[0] > now}
        if len(self._tickets) >= _TICKETS_LIMIT:
            raise Busy("cannot give a ticket: too many are unused", "try again in half a minute")
        ticket = os.urandom(16).hex()
        self._tickets[ticket] = (now + _TICKET_LIFE_S, request)
        if request.get("plan"):
            self.loop.after(_TICKET_LIFE_S, self._tell_idle)
        return ticket

    def _on_ticket_message(self, connection: socket.socket, message: dict, _fds: "list[int]") -> None:
        # Taken out before anything else happens: a ticket works once, whatever comes of it.
        expires, request = self._tickets.pop(str(message.get("ticket")), (0.0, {}))
        if expires < time.monotonic():
            raise NotFound("cannot use the ticket: it is unknown, used or expired")
        if request["kind"] == "console":
            self._attach_console(connection, self._container(request["id"]), request)
        elif request.get("plan"):
            self.refuse_second_mount(request["plan"]["container"], "work on the files of")
            streams = {"streams": request["streams"]}
            self._start_session(
                connection,
                self._on_ticket_message,
                lambda session: session.run_plan(request["plan"], [], streams),
            )
        else:
            container = self._container(request["id"])
            self._start_session(
                connection,
                self._on_ticket_message,
                lambda session: session.join(container.pidfd, request["request"]),
            )

    def _start_session(self, connection: socket.socket, handler, start) -> None:
        self.loop.forget(connection.fileno())
        session = Session(self.loop, connection, self._end_session)
        self._sessions.add(session)
        try:
            start(session)
        except BaseException:
            self._end_session(session)
            session.let_go()
            self._watch(connection, handler)
            raise

    def _attach_console(self, connection: socket.socket, container: Container, request: dict) -> None:
        if container.console is None:
            raise WrongState(
                f"cannot attach to the console of {container.id}: it was lost with an earlier supervisor",
                "restart the container, or use `sysctr enter`",
            )

        def notify(message: dict) -> None:
            self._answer(connection, message)

        def on_message(_events: int) -> None:
            try:
                size = wire.receive_plain(connection).get("resize")
                if isinstance(size, list) and len(size) == 2 and container.console is not None:
                    container.console.resize(int(size[0]) & 0xFFFF, int(size[1]) & 0xFFFF)
            except (OSError, wire.WireError):
                self.drop(connection)
            except (ValueError, TypeError):
                pass

        theirs = container.console.attach(notify)
        with theirs:
            wire.send(connection, {"ok": True, "fds": ["stream"]}, (theirs.fileno(),))
        if container.console.is_shared:
            notify({"notice": "another client is attached to this console too"})
        self.loop.watch(connection.fileno(), on_message)

    # The keeper

    def _kept_by_keeper(self) -> "dict[int, dict[str, int]]":
        """Return the descriptors an earlier supervisor left with the keeper, by container and name."""
        kept: dict[int, dict[str, int]] = {}
        if self.keeper is None:
            return kept
        wire.send(self.keeper, {"hello": os.getpid()})
        while True:
            message, fds = wire.receive(self.keeper)
            if "kept" in message:
                kept[message["kept"]] = dict(zip(message["names"], fds, strict=True))
                continue
            wire.close_all(fds)
            if "reaped" in message:
                self.exits[message["reaped"]] = message["status"]
            elif "end" in message:
                return kept

    def exit_of(self, pid: int) -> int:
        """Return how a process ended that is gone, as far as the keeper knows."""
        if pid not in self.exits and self.keeper is not None:
            # It may have gone since the keeper told what it knows. Being gone it was reaped before, so the
            # keeper, who does one thing at a time, tells now or never knew it.
            try:
                for fds in self._kept_by_keeper().values():
                    wire.close_all(list(fds.values()))
            except (OSError, wire.WireError) as error:
                log(f"the keeper does not answer: {error}")
        return self.exits.get(pid, UNKNOWN_STATUS)

    def _on_keeper(self, _events: int) -> None:
        try:
            message = wire.receive_plain(self.keeper)
        except (OSError, wire.WireError):
            # Without a keeper this process serves on; what is lost is the rescue of its own death.
            log("the keeper is gone")
            self.loop.forget(self.keeper.fileno())
            self.keeper.close()
            self.keeper = None
            return
        if "reaped" in message:
            pid = message["reaped"]
            for container in self.containers.values():
                if container.pid == pid and container.running:
                    container.on_exit(message["status"])
            # Only now that it is on record: the keeper tells every supervisor until one has said this.
            self.tell_keeper({"claimed": [pid]})
        elif "terminate" in message:
            self.loop.stopping = True

    # Life of the supervisor itself

    def _upgrade(self, connection: socket.socket) -> None:
        """Execute the code that is on disk now; every child stays a child of this very process."""
        if self.creations:
            raise Busy(
                f"cannot upgrade the supervisor: {len(self.creations)} containers are being started",
                "try again in a moment",
            )
        self._answer(connection, {"ok": True})
        sessions = [session.state() for session in self._sessions]
        state = {"sessions": sessions, "tickets": self._tickets, "strays": self.loop.strays}
        fds = [fd for session in sessions for fd in Session.fds(session)] + list(self.loop.strays.values())
        state_fd = os.memfd_create("sysctr-state", os.MFD_CLOEXEC)
        with open(state_fd, "w", encoding="ascii", closefd=False) as file:
            json.dump(state, file)
        fds.append(state_fd)
        if self.keeper is not None:
            fds.append(self.keeper.fileno())
        for fd in fds:
            os.set_inheritable(fd, True)
        try:
            keeper_fd = self.keeper.fileno() if self.keeper is not None else -1
            os.execv(sys.executable, supervisor_argv(keeper_fd, state_fd))
        finally:
            for fd in fds:
                os.set_inheritable(fd, False)
            os.close(state_fd)

    def take_over(self, state_fd: int) -> None:
        """Go on with the sessions, tickets and strays of the image of this process that executed us."""
        with open(state_fd, encoding="ascii") as file:
            file.seek(0)
            state = json.load(file)
        self._tickets = {ticket: tuple(entry) for ticket, entry in state["tickets"].items()}
        self.loop.after(_TICKET_LIFE_S, self._tell_idle)
        strays = {int(pid): pidfd for pid, pidfd in state["strays"].items()}
        for fd in (*strays.values(), *(fd for session in state["sessions"] for fd in Session.fds(session))):
            os.set_inheritable(fd, False)
        for session in state["sessions"]:
            self._sessions.add(Session.resume(self.loop, session, self._end_session))
        for pid, pidfd in strays.items():
            reap_later(self.loop, pid, pidfd)

    def _quit(self, connection: socket.socket) -> None:
        running = sorted(i for i, container in self.containers.items() if container.running)
        if running or self.creations:
            raise WrongState(
                f"cannot end the supervisor: {len(running) + len(self.creations)} containers run",
                "stop them first with `sysctr stop --all`",
            )
        self.tell_keeper({"quit": True})
        self._answer(connection, {"ok": True})
        self.loop.stopping = True


def _give_to_group(path: str, name: str) -> None:
    import grp

    try:
        os.chown(path, 0, grp.getgrnam(name).gr_gid)
    except KeyError:
        pass  # no such group: root alone


def main() -> int:
    """Run the supervisor of the installation that SYSCTR_ROOT names."""
    keeper_fd, state_fd = descriptor_argument("--keeper-fd"), descriptor_argument("--state-fd")
    keeper = None
    if keeper_fd >= 0:
        keeper = socket.socket(fileno=keeper_fd)
        os.set_inheritable(keeper_fd, False)
    os.umask(0o022)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process.set_name("sysctr-superv")
    # pidfd, console, notify socket and connections: some six descriptors for each container.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # What lives on is not looked at again, so that no collection in a child copies its pages.
    gc.freeze()
    try:
        supervisor = Supervisor(layout(), keeper)
        if state_fd >= 0:
            supervisor.take_over(state_fd)
        supervisor.serve()
    except OSError as error:
        log(f"ends: {error}", 3)
        return 1
    return 0

