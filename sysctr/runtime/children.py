"""Children of the supervisor: cloned, mapped, given their trees, and listened to until they run or fail."""

import os
import socket
from collections.abc import Callable

from sysctr.errors import SysctrError
from sysctr.linux import mount, process
from sysctr.runtime import child, wire
from sysctr.runtime.binds import start_helper, write_maps
from sysctr.runtime.loop import Loop
from sysctr.runtime.notify import reap_later

_NAMESPACES = (
    process.CLONE_NEWUSER
    | process.CLONE_NEWNS
    | process.CLONE_NEWPID
    | process.CLONE_NEWIPC
    | process.CLONE_NEWUTS
)


class Child:
    """A process that carries out a plan or enters a container, and what it says on its way.

    `on_message(kind, content, fds)` is called with kind network, prepared, terminal, started, running or
    failed; `on_exec()` when the socket closed without a failure, which is the exec (or the end of a builtin);
    `on_exit(status)` with the wait status. Descriptors passed to on_message become the callee's.
    """

    def __init__(
        self,
        loop: Loop,
        pid: int,
        pidfd: int,
        sync: "socket.socket | None",
        on_message: "Callable[[str, dict, list[int]], None]",
        on_exec: Callable[[], None],
        on_exit: Callable[[int], None],
    ) -> None:
        self._loop = loop
        self.pid = pid
        self.pidfd = pidfd
        self._sync = sync
        self._on_message = on_message
        self._on_exec = on_exec
        self._on_exit = on_exit
        self.failed = False
        # Nothing that happens in a container may make this process wait: its root can freeze a child that is
        # about to enter it, as its cgroup is delegated.
        if sync is not None:
            sync.setblocking(False)
            loop.watch(sync.fileno(), self._on_sync)
        loop.watch(pidfd, self._on_pidfd)

    def proceed(self) -> None:
        """Let a prepared child go on to its program."""
        if self._sync is not None:
            try:
                wire.send(self._sync, {"start": True})
            except (OSError, wire.WireError):
                pass  # it died meanwhile; its exit tells

    def kill(self, signal_number: int = 9) -> None:
        """Send a signal; a child that is gone already is no error."""
        try:
            process.pidfd_send_signal(self.pidfd, signal_number)
        except OSError:
            pass

    def kill_group(self, signal_number: int) -> None:
        """Send a signal to the process group that the child leads, as a terminal would; or to it alone."""
        try:
            process.signal_group(self.pidfd, self.pid, signal_number)
        except OSError:
            self.kill(signal_number)  # it leads none (yet)

    @property
    def sync_fd(self) -> int:
        """The socket on which it still talks to us, -1 when it has gone on to its program."""
        return self._sync.fileno() if self._sync is not None else -1

    def watch_other(self, pid: int, pidfd: int) -> None:
        """Wait for another process instead: the one that was born inside the pid namespace."""
        self._loop.forget(self.pidfd)
        reap_later(self._loop, self.pid, self.pidfd)
        self.pid, self.pidfd = pid, pidfd
        self._loop.watch(pidfd, self._on_pidfd)

    def _on_sync(self, _events: int) -> None:
        self._take_message()

    def _take_message(self) -> bool:
        """Take what the child said; False when there is nothing (more)."""
        if self._sync is None:
            return False
        try:
            message, fds = wire.receive(self._sync)
        except BlockingIOError:
            return False
        except (wire.WireError, OSError):
            self._close_sync()
            if not self.failed:
                self._on_exec()
            return False
        kind = next((k for k in ("failed", "network", "prepared", "terminal", "started", "running")
                     if k in message), "")  # fmt: skip
        if kind == "failed":
            self.failed = True
        self._on_message(kind, message, fds)
        return True

    def _on_pidfd(self, _events: int) -> None:
        pid = self.pid
        try:
            status = process.ended_status(pid)
        except ChildProcessError:
            status = -1
        if status is None:
            return
        # What it said last may still lie in the socket: a failure is read before the exit is told.
        while self._take_message():
            pass
        if self.pid != pid:
            return  # its last word was that another process is the one to wait for
        self._close_sync()
        self._loop.forget(self.pidfd)
        os.close(self.pidfd)
        self.pidfd = -1
        # Reaped when its end is on record: if we die in between, the keeper reaps it and tells the next one.
        try:
            self._on_exit(status)
        finally:
            process.reap(pid)

    def _close_sync(self) -> None:
        if self._sync is not None:
            self._loop.forget(self._sync.fileno())
            self._sync.close()
            self._sync = None


def clone_for_plan(plan: dict, stdio: "list[int]") -> "tuple[int, int, socket.socket]":
    """Clone a child into new namespaces, write its maps, and give it its trees; return pid, pidfd and socket.

    Raises OSError with the call that failed; no child is left then.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    helper: list[socket.socket] = []
    if stdio:
        plan = {**plan, "stdio": stdio}
    if plan.get("binds"):
        # Whoever opens them talks to the child alone: a source that hangs keeps only that start waiting.
        helper = list(socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        plan = {**plan, "helper": [helper[1].fileno()]}
    pid, pidfd = _clone_into(_NAMESPACES, plan)
    if pid == 0:
        child.run_plan(theirs, plan)
    theirs.close()
    tree_fds: list[int] = []
    try:
        write_maps(pid, plan["uid_map"], plan["gid_map"])
        userns_fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for tree in plan["trees"]:
                tree_fds.append(_prepare_tree(tree, userns_fd))
            if helper:
                start_helper(plan["binds"], userns_fd, plan["stage"], helper[0])
        finally:
            os.close(userns_fd)
        wire.send(ours, {"trees": [tree["tree"] for tree in plan["trees"]]}, tree_fds)
    except BaseException:
        process.pidfd_send_signal(pidfd, 9)
        os.waitpid(pid, 0)
        os.close(pidfd)
        ours.close()
        raise
    finally:
        wire.close_all(tree_fds)
        for end in helper:
            end.close()
    return pid, pidfd, ours


def clone_to_join(pidfd: int, request: dict, stdio: "list[int]") -> "tuple[int, int, socket.socket]":
    """Fork a child that enters the container of `pidfd`; return pid, pidfd and socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid, child_fd = _clone_into(0, request)
    if pid == 0:
        if "mounts" in request:
            child.change_mounts(theirs, pidfd, request)
        child.join_container(theirs, pidfd, request, stdio)
    theirs.close()
    return pid, child_fd, ours


def _clone_into(flags: int, request: dict) -> "tuple[int, int]":
    """Clone into the cgroup2 directory request["cgroup"]["into"], which costs no grace period."""
    into = request.get("cgroup", {}).get("into")
    if not into:
        return process.clone(flags)
    cgroup_fd = os.open(into, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return process.clone(flags, cgroup_fd)
    except OSError as error:
        # A container's root can make its own cgroups such that they take no process.
        raise SysctrError(
            f"cannot start a process in the cgroup {into}: {os.strerror(error.errno).lower()}",
            "a restart of the container gives it fresh cgroups",
        ) from error
    finally:
        os.close(cgroup_fd)


def _prepare_tree(tree: dict, userns_fd: int) -> int:
    tree_fd = mount.open_tree(tree["path"])
    try:
        mount.mount_setattr(
            tree_fd,
            attributes=tree.get("attributes", 0),
            userns_fd=userns_fd if tree.get("idmap", True) else -1,
            propagation=mount.MS_PRIVATE,
        )
    except BaseException:
        os.close(tree_fd)
        raise
    return tree_fd
