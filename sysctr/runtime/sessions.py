"""Programs run for a caller: exec and files in a running container, jobs in namespaces of their own.

The caller gets the far ends of fresh pipes or of a pty that was opened inside, never the other way round: no
descriptor of a caller ever enters a container. (A job takes the daemon's pipes: it is the daemon's own hand.)
"""

import errno
import os
import socket
from collections.abc import Callable

from sysctr.linux import tty
from sysctr.runtime import wire
from sysctr.runtime.begin import log
from sysctr.runtime.children import Child, clone_for_plan, clone_to_join
from sysctr.runtime.console import notifier
from sysctr.runtime.loop import Loop

_NOT_FOUND = 127
_NOT_EXECUTABLE = 126
_NOT_STARTED = 125
_GROUP_PAUSE_S = 0.05
_SIGHUP = 1
_SIGKILL = 9


class Session:
    """One program and the connection of the caller who waits for its end.

    The connection carries {"resize": [rows, columns]} and {"signal": n} inwards; {"ok": true, "fds": [...]}
    with the descriptors and at last {"exit": n} (with "error", where it did not run) outwards. A caller who
    goes away hangs up on the program.
    """

    def __init__(self, loop: Loop, connection: socket.socket, on_end: "Callable[[Session], None]") -> None:
        self._loop = loop
        self._connection = connection
        self._notify = notifier(connection)
        self._on_end = on_end
        self._child: Child | None = None
        self._client_fds: dict[str, int] = {}
        self._terminal_fd = -1
        self._failure: dict | None = None
        self._hangup_signal = _SIGHUP
        self._handed_over = False
        # The stopped container whose upper this job has mounted.
        self.volume_of: int | None = None
        # The one upper that it has, where it is not all of that container's.
        self.upper = ""
        # Cgroups that were made for this job and go with it.
        self._groups: list[str] = []

    @classmethod
    def resume(cls, loop: Loop, state: dict, on_end: "Callable[[Session], None]") -> "Session":
        """Go on with a session of the image of this process that executed us."""
        connection = socket.socket(fileno=state["connection"])
        connection.setblocking(False)
        session = cls(loop, connection, on_end)
        session._client_fds = state["clients"]
        session._terminal_fd = state["terminal"]
        session._failure = state["failure"]
        session._hangup_signal = state["hangup"]
        session._handed_over = state["handed_over"]
        session.volume_of = state["volume_of"]
        session.upper = state.get("upper", "")  # none from before there was such a thing
        session._groups = state["groups"]
        sync = socket.socket(fileno=state["sync"]) if state["sync"] >= 0 else None
        session._adopt((state["pid"], state["pidfd"], sync))
        session._child.failed = state["failure"] is not None
        return session

    def state(self) -> dict:
        """Return what `resume` needs; the descriptors in it are those of `fds`."""
        return {
            "connection": self._connection.fileno(), "clients": self._client_fds,
            "terminal": self._terminal_fd, "failure": self._failure, "hangup": self._hangup_signal,
            "handed_over": self._handed_over, "volume_of": self.volume_of, "pid": self._child.pid,
            "pidfd": self._child.pidfd, "sync": self._child.sync_fd, "groups": self._groups,
            "upper": self.upper,
        }  # fmt: skip

    @staticmethod
    def fds(state: dict) -> "list[int]":
        """Return the descriptors of a session's state."""
        held = [state["connection"], state["terminal"], state["pidfd"], state["sync"]]
        return [fd for fd in (*held, *state["clients"].values()) if fd >= 0]

    def join(self, pidfd: int, request: dict) -> None:
        """Run the request's program inside the container of `pidfd`."""
        ours = self._make_pipes(request)
        try:
            self._adopt(clone_to_join(pidfd, request, ours))
        finally:
            wire.close_all(ours)

    def run_plan(self, plan: dict, stdio: "list[int]", request: "dict | None" = None) -> None:
        """Run a job: a plan in new namespaces, with the given stdio or with pipes for the caller."""
        self.volume_of = plan.get("container")
        self.upper = plan.get("upper", "")
        if not stdio:
            stdio = self._make_pipes(request or {})
        else:
            self._hangup_signal = _SIGKILL
        try:
            for path, values in plan.get("cgroup", {}).get("make", ()):
                self._groups.append(path)
                _make_group(path, values)
            self._adopt(clone_for_plan(plan, stdio))
        except BaseException:
            _remove_groups(self._loop, self._groups)
            raise
        finally:
            wire.close_all(stdio)

    def _adopt(self, born: "tuple[int, int, socket.socket | None]") -> None:
        self._child = Child(self._loop, *born, self._on_message, self._on_exec, self._on_exit)
        self._loop.watch(self._connection.fileno(), self._on_request)

    def _make_pipes(self, request: dict) -> "list[int]":
        if request.get("tty"):
            return [os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC) for _ in range(3)]
        wanted = request.get("streams", ["stdin", "stdout", "stderr"])
        ours = []
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            if name not in wanted:
                ours.append(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
                continue
            reader, writer = os.pipe2(os.O_CLOEXEC)
            inside, outside = (reader, writer) if number == 0 else (writer, reader)
            if "owner" in request:
                # Else opening /dev/stdout, as log files are led there, would be refused inside.
                os.fchown(inside, request["owner"], request["owner"])
            ours.append(inside)
            self._client_fds[name] = outside
        return ours

    def _on_message(self, kind: str, message: dict, fds: "list[int]") -> None:
        if kind == "failed":
            self._failure = message["failed"]
        elif kind == "terminal":
            self._terminal_fd = fds.pop()
            self._client_fds = {"pty": os.dup(self._terminal_fd)}
        elif kind == "started":
            if fds:
                self._child.watch_other(message["started"], fds.pop())
            self._hand_over()
        elif kind == "prepared":
            self._child.proceed()
            self._hand_over()
        wire.close_all(fds)

    def _hand_over(self) -> None:
        self._handed_over = True
        names = list(self._client_fds)
        fds = list(self._client_fds.values())
        self._client_fds = {}
        try:
            wire.send(self._connection, {"ok": True, "fds": names}, fds)
        except (OSError, wire.WireError):
            self._child.kill(self._hangup_signal)
            self._close_terminal()
        finally:
            wire.close_all(fds)

    def _on_exec(self) -> None:
        """Nothing to do: the caller has its descriptors already."""

    def _on_request(self, _events: int) -> None:
        try:
            message = wire.receive_plain(self._connection)
        except (OSError, wire.WireError):
            self._loop.forget(self._connection.fileno())
            self._child.kill_group(self._hangup_signal)
            # The last master closes: the kernel hangs up on all that have this terminal.
            self._close_terminal()
            return
        size = message.get("resize")
        if self._terminal_fd >= 0 and isinstance(size, list) and len(size) == 2:
            try:
                tty.set_window_size(self._terminal_fd, int(size[0]) & 0xFFFF, int(size[1]) & 0xFFFF)
            except (OSError, ValueError, TypeError):
                pass  # a nonsensical size changes nothing
        number = message.get("signal")
        if isinstance(number, int) and 0 < number < 65:
            self._child.kill_group(number)

    def _on_exit(self, status: int) -> None:
        message: dict = {"exit": exit_code(status)}
        if self._failure is None and not self._handed_over:
            self._failure = {"reason": "it was killed before its program ran"}
        if self._failure is not None:
            message = {"exit": _failure_code(self._failure), "error": failure_error(self._failure)}
        self._notify(message)
        self.close()
        # A moment later: the job's first process is reaped when this returns.
        self._loop.after(0, lambda: _remove_groups(self._loop, self._groups))
        self._on_end(self)

    def kill(self) -> None:
        """End the program at once; its caller is told as of any other end."""
        self._child.kill_group(_SIGKILL)

    def close(self) -> None:
        """Let go of the connection and of what the caller was to get."""
        self.let_go()
        self._loop.forget(self._connection.fileno())
        self._connection.close()

    def let_go(self) -> None:
        """Close the descriptors that were made for the caller; the connection stays."""
        wire.close_all(list(self._client_fds.values()))
        self._client_fds = {}
        self._close_terminal()

    def _close_terminal(self) -> None:
        if self._terminal_fd >= 0:
            os.close(self._terminal_fd)
            self._terminal_fd = -1


def _make_group(path: str, values: "dict[str, str]") -> None:
    os.mkdir(path, 0o755)
    for name, value in values.items():
        with open(f"{path}/{name}", "w", encoding="ascii") as file:
            file.write(value)


def _remove_groups(loop: Loop, paths: "list[str]", tries: int = 100) -> None:
    """Remove the cgroups of a job that has ended; v1 lets go of its last process a moment after that."""
    left = []
    for path in paths:
        try:
            os.rmdir(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            left.append(path)
            if not tries:
                log(f"cannot remove {path}: {error}", 4)
    if left and tries:
        loop.after(_GROUP_PAUSE_S, lambda: _remove_groups(loop, left, tries - 1))


def exit_code(status: int) -> int:
    """Return what a shell would: the exit status, or 128 + the signal's number."""
    if status < 0:
        return _NOT_STARTED
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def failure_error(failure: dict) -> dict:
    """Return a child's failure as an error for people."""
    reason = failure.get("reason", "unknown reason")
    if "step" in failure:
        reason = f"step {failure['step']} of {failure['of']}, {failure['description']}: {reason}"
    code = "failed"
    if failure.get("errno") in (errno.ENOSPC, errno.EDQUOT):
        code = "no-space"
    elif "step" not in failure and failure.get("errno") == errno.ENOENT:
        code = "not-found"
    return {"code": code, "message": reason, "hint": ""}


def _failure_code(failure: dict) -> int:
    if "step" in failure:
        return _NOT_STARTED
    code = failure.get("errno")
    if code in (errno.ENOENT, errno.ENOTDIR):
        return _NOT_FOUND
    if code in (errno.EACCES, errno.EPERM, errno.ENOEXEC, errno.EISDIR):
        return _NOT_EXECUTABLE
    return _NOT_STARTED
