"""The socket on which a container's init says that it is ready, and on which everything inside may write.

A message may carry descriptors, and closing a descriptor may wait: a TCP socket with SO_LINGER waits for its
peer as long as its owner chose. So a message that carries some is never received here. A child does that,
which may wait instead of us.
"""

import os
import socket
import struct
from collections.abc import Callable

from sysctr.linux import process
from sysctr.runtime.loop import Budget, Loop

_MESSAGE_BYTES = 4096
_CREDENTIALS_BYTES = struct.calcsize("iII")
# Room for the sender's credentials and nothing else: descriptors show as a control part that was cut off.
_CONTROL_BYTES = socket.CMSG_SPACE(_CREDENTIALS_BYTES)
# systemd reports every unit that starts, some hundreds at boot.
_MESSAGES_PER_S = 1000


class NotifySocket:
    """Calls on_ready() for a READY=1 of the process `init` (as the host numbers it)."""

    def __init__(self, loop: Loop, fd: int, init: int, on_ready: Callable[[], None]) -> None:
        self._loop = loop
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._init = init
        self._on_ready = on_ready
        self._budget = Budget(_MESSAGES_PER_S, 1.0)
        self._closed = False
        loop.watch(fd, self._on_message)

    def close(self) -> None:
        """Take nothing more and let go."""
        if self._closed:
            return
        self._closed = True
        self._loop.forget(self._socket.fileno())
        discard(self._loop, self._socket.detach())

    def _on_message(self, _events: int) -> None:
        try:
            _, _, flags, _ = self._socket.recvmsg(1, _CONTROL_BYTES, socket.MSG_PEEK)
            if flags & socket.MSG_CTRUNC:
                self._loop.forget(self._socket.fileno())
                _receive_in_child(self._loop, self._socket.fileno(), self._go_on)
                return
            data, ancillary, _, _ = self._socket.recvmsg(_MESSAGE_BYTES, _CONTROL_BYTES)
        except OSError:
            return
        sender = 0
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                sender = struct.unpack("iII", content[:_CREDENTIALS_BYTES])[0]
        # Any process inside can write here; only init speaks for the container.
        if sender == self._init and b"READY=1" in data.split(b"\n"):
            self._on_ready()
        pause_s = self._budget.spend(1)
        if pause_s and not self._closed:
            self._loop.forget(self._socket.fileno())
            self._loop.after(pause_s, self._go_on)

    def _go_on(self) -> None:
        if not self._closed:
            self._loop.watch(self._socket.fileno(), self._on_message)


def discard(loop: Loop, fd: int) -> None:
    """Close a notify socket; if anything is still in it, a child receives that and has the last copy."""
    with socket.socket(fileno=fd) as receiver:
        receiver.setblocking(False)
        try:
            receiver.shutdown(socket.SHUT_RD)  # from now on nobody can add to it
            waiting = bool(receiver.recv(1, socket.MSG_PEEK))
        except OSError:
            waiting = False
        if waiting:
            _receive_in_child(loop, fd, None)


def _receive_in_child(loop: Loop, fd: int, then: Callable[[], None] | None) -> None:
    """Let a child receive one message and call `then()` when it has; without `then`, all that are there."""
    pid, pidfd = process.clone(0)
    if pid == 0:
        try:
            process.close_all_but([fd])
            with socket.socket(fileno=fd) as receiver:
                while receiver.recvmsg(1)[0] and then is None:
                    pass
        finally:
            os._exit(0)
    reap_later(loop, pid, pidfd, then)


def reap_later(loop: Loop, pid: int, pidfd: int, then: Callable[[], None] | None = None) -> None:
    """Reap a child when it ends, without waiting for it; the pidfd becomes this function's."""
    loop.strays[pid] = pidfd

    def on_end(_events: int) -> None:
        try:
            ended, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            ended = pid
        if ended:
            del loop.strays[pid]
            loop.forget(pidfd)
            os.close(pidfd)
            if then is not None:
                then()

    loop.watch(pidfd, on_end)
