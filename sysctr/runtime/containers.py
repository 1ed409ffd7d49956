"""Containers as the supervisor sees them: from the clone to the exec, then a pid, a console and an end."""

import os
import socket
import time

from sysctr.linux import process
from sysctr.runtime import wire
from sysctr.runtime.begin import log
from sysctr.runtime.children import Child, clone_for_plan
from sysctr.runtime.console import Console, Ring
from sysctr.runtime.notify import NotifySocket, discard
from sysctr.runtime.records import open_if_alive
from sysctr.runtime.sessions import failure_error

TYPE_CHECKING = False  # typing.TYPE_CHECKING costs 3 ms and 0.3 MB to import
if TYPE_CHECKING:
    from sysctr.runtime.supervisor import Supervisor

UNKNOWN_STATUS = -1
_SIGKILL = 9
# How long the keeper may take to tell how a process ended that a dead supervisor had started.
_KEEPER_GRACE_S = 2.0


class Container:
    """A running or ended container: its init, console and notify socket."""

    def __init__(
        self, supervisor: "Supervisor", container_id: int, pid: int, pidfd: int, start_time: int
    ) -> None:
        self._supervisor = supervisor
        self.id = container_id
        self.pid = pid
        self.pidfd = pidfd
        self.start_time = start_time
        self.started = time.time()
        self.running = True
        self.ready = False
        self.exit_status: int | None = None
        self.console: Console | None = None
        self._notify: NotifySocket | None = None

    @classmethod
    def adopt(cls, supervisor: "Supervisor", container_id: int, record: dict, kept: "dict[str, int]") -> None:
        """Take over what an earlier supervisor started, or note that it ended."""
        pid = record.get("pid", 0)
        pidfd = open_if_alive(record)
        container = cls(supervisor, container_id, pid, pidfd, record.get("start_time", 0))
        container.started = record.get("started", 0.0)
        container.ready = bool(record.get("ready"))
        supervisor.containers[container_id] = container
        if record.get("exit") is not None:
            container.running = False
            container.exit_status = record["exit"]
            container.let_go(kept)
        elif pidfd < 0:
            container.let_go(kept)
            container.on_exit(supervisor.exit_of(pid))
        else:
            try:
                container.take_descriptors(kept, fresh=False)
            except OSError as error:
                log(f"{container_id}: its console is lost: {error}", 3)
            supervisor.loop.watch(pidfd, container._on_pidfd)

    def take_descriptors(self, fds: "dict[str, int]", *, fresh: bool) -> None:
        """Serve the console and the notify socket from now on; raises OSError, and has closed them then."""
        supervisor = self._supervisor
        if "console" in fds:
            try:
                ring = Ring(f"{supervisor.where.consoles}/{self.id}.ring", fresh=fresh)
            except OSError:
                self.let_go(fds)
                raise
            self.console = Console(supervisor.loop, fds["console"], ring)
        if "notify" in fds:
            self._notify = NotifySocket(supervisor.loop, fds["notify"], self.pid, self._on_ready)
        if fresh:
            supervisor.tell_keeper({"keep": self.id, "names": list(fds)}, list(fds.values()))

    def let_go(self, fds: "dict[str, int]") -> None:
        """Close the descriptors of a container that has ended."""
        if "notify" in fds:
            discard(self._supervisor.loop, fds.pop("notify"))
        wire.close_all(list(fds.values()))

    def state(self) -> dict:
        """Return what the daemon is told about this container."""
        return {
            "pid": self.pid, "start_time": self.start_time, "started": self.started, "running": self.running,
            "ready": self.ready, "exit": self.exit_status, "console": self.console is not None,
        }  # fmt: skip

    def write_record(self) -> None:
        """Write down what a next supervisor needs; raises OSError."""
        self._supervisor.records.write(self.id, self.state())

    def _note_change(self) -> None:
        try:
            self.write_record()
        except OSError as error:
            log(f"{self.id}: cannot write its record: {error}", 3)

    def kill(self, signal_number: int) -> None:
        """Send a signal to init."""
        process.pidfd_send_signal(self.pidfd, signal_number)

    def on_exit(self, status: int) -> None:
        """Note the end of init: with it the kernel ended every process of its pid namespace."""
        if not self.running:
            return
        self.running = False
        self.exit_status = status
        self.release()
        self._note_change()
        self._supervisor.tell_keeper({"drop": self.id})
        self._supervisor.publish({"event": "exited", "id": self.id, "status": status})

    def release(self) -> None:
        """Close what is held for this container."""
        if self.console is not None:
            self.console.close()
            self.console = None
        if self._notify is not None:
            self._notify.close()
            self._notify = None
        if self.pidfd >= 0:
            self._supervisor.loop.forget(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1

    def _on_pidfd(self, _events: int) -> None:
        """See the end of an adopted init: our own child after an upgrade, else the keeper's to reap."""
        try:
            status = process.ended_status(self.pid)
            if status is not None:
                self.on_exit(status)
                process.reap(self.pid)
            return
        except ChildProcessError:
            pass
        # With the keeper dead too, its parent is whoever the kernel chose. As long as that one has not reaped
        # it, the dead process itself tells how it ended.
        status = process.zombie_status(self.pid, self.start_time)
        if status is not None:
            self.on_exit(status)
            return
        self._supervisor.loop.forget(self.pidfd)
        grace_s = _KEEPER_GRACE_S if self._supervisor.keeper is not None else 0.0
        self._supervisor.loop.after(grace_s, lambda: self.on_exit(UNKNOWN_STATUS))

    def _on_ready(self) -> None:
        if not self.ready:
            self.ready = True
            self._note_change()
            self._supervisor.publish({"event": "ready", "id": self.id})


class Creation:
    """The conversation that creates and starts one container; it owns its connection.

    {"created"} with pidfd, network namespace and netlink socket goes out as soon as they exist; the child
    prepares its mounts meanwhile. {"op": "start"} lets it run; {"started"} means that the exec succeeded.
    """

    def __init__(
        self, supervisor: "Supervisor", connection: socket.socket, container_id: int, plan: dict
    ) -> None:
        self._supervisor = supervisor
        self._connection = connection
        self._id = container_id
        self._fds: dict[str, int] | None = None
        self._start_wanted = False
        self._failure: dict | None = None
        pid, pidfd, sync = clone_for_plan(plan, [])
        self._start_time = process.start_time(pid)
        self._child = Child(
            supervisor.loop, pid, pidfd, sync, self._on_message, self._on_exec, self._on_exit
        )
        self._container: Container | None = None
        supervisor.loop.watch(connection.fileno(), self._on_request)

    def _on_message(self, kind: str, message: dict, fds: "list[int]") -> None:
        if kind == "failed":
            self._failure = message["failed"]
        elif kind == "network" and len(fds) == 1:
            self._on_network(fds[0])
        elif kind == "prepared":
            self._fds, fds[:] = dict(zip(message["prepared"], fds, strict=True)), []
            self._go_on()
        wire.close_all(fds)

    def _on_network(self, netlink_fd: int) -> None:
        try:
            netns_fd = os.open(f"/proc/{self._child.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return  # it was killed meanwhile; its exit tells
        created = {"pid": self._child.pid, "start_time": self._start_time}
        self._send({"created": created}, (self._child.pidfd, netns_fd, netlink_fd))
        os.close(netns_fd)

    def _on_request(self, _events: int) -> None:
        try:
            message = wire.receive_plain(self._connection)
        except (OSError, wire.WireError):
            # The daemon died between create and start: the container does not exist yet, so it never will.
            self._supervisor.loop.forget(self._connection.fileno())
            self._child.kill(_SIGKILL)
            return
        if message.get("op") == "start":
            self._start_wanted = True
            self._go_on()

    def _go_on(self) -> None:
        if not self._start_wanted or self._fds is None or self._container is not None:
            return
        # Served from before the exec: what init prints first must not be lost, nor its READY.
        supervisor = self._supervisor
        container = Container(
            supervisor, self._id, self._child.pid, os.dup(self._child.pidfd), self._start_time
        )
        self._container = container
        try:
            # On record before it runs: a supervisor that died in between would leave a container that runs
            # and that nobody knows of, to be started a second time.
            container.write_record()
            fds, self._fds = self._fds, None
            container.take_descriptors(fds, fresh=True)
        except OSError as error:
            self._failure = {"reason": f"cannot keep its record and console: {error}"}
            self._child.kill(_SIGKILL)
            return
        self._child.proceed()

    def _on_exec(self) -> None:
        if self._container is None or self._child.pidfd < 0:
            return
        supervisor = self._supervisor
        supervisor.containers[self._id] = self._container
        supervisor.creations.pop(self._id, None)
        supervisor.publish(
            {"event": "started", "id": self._id, "pid": self._child.pid, "start_time": self._start_time}
        )
        self._send({"started": self._container.state()})
        self._finish()

    def _on_exit(self, status: int) -> None:
        container = self._container
        if container is not None and self._supervisor.containers.get(self._id) is container:
            container.on_exit(status)
            return
        self._supervisor.creations.pop(self._id, None)
        if container is not None:
            container.release()
            self._supervisor.records.remove(self._id)
            self._supervisor.tell_keeper({"drop": self._id})
        wire.close_all(list((self._fds or {}).values()))
        error = failure_error(self._failure or {"reason": f"it ended with wait status {status}"})
        self._send({"error": error})
        self._finish()

    def _send(self, message: dict, fds: "tuple[int, ...]" = ()) -> None:
        try:
            wire.send(self._connection, message, fds)
        except (OSError, wire.WireError):
            self._child.kill(_SIGKILL)

    def _finish(self) -> None:
        if self._connection.fileno() >= 0:
            self._supervisor.loop.forget(self._connection.fileno())
            self._connection.close()
