"""Runs a function of a test as a process inside a container, with all that the container's root may do.

So an attack needs no compiler and no program in the template: it is Python, imported before the namespaces
are joined.
"""

import encodings.ascii
import encodings.idna  # noqa: F401 - both would be looked for in the container otherwise
import json
import os
import select
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

from sysctr.linux import process
from tests.node import Node

_NAMESPACES = (
    process.CLONE_NEWNS
    | process.CLONE_NEWPID
    | process.CLONE_NEWIPC
    | process.CLONE_NEWUTS
    | process.CLONE_NEWNET
    | process.CLONE_NEWCGROUP
)


def init_pid(node: Node, ref: str) -> int:
    """Return the pid of a running container's init, as the host numbers it."""
    return node.json("info", ref)["pid"]


class Inside:
    """One process of a container that runs `attack()`; leaving the context ends it."""

    def __init__(self, init: int, attack: Callable[[], object], *, uid: int = 0) -> None:
        self._reader, writer = os.pipe()
        groups = [line.split(":", 2) for line in Path(f"/proc/{init}/cgroup").read_text().splitlines()]
        init_fd = process.pidfd_open(init)
        middle = os.fork()
        if middle == 0:
            try:
                os.close(self._reader)
                _join_cgroup(groups)
                process.setns(init_fd, process.CLONE_NEWUSER)
                os.setgroups([])
                os.setresgid(0, 0, 0)
                os.setresuid(0, 0, 0)
                process.setns(init_fd, _NAMESPACES)
                os.close(init_fd)
                # The pid has to be the first line: the attack begins when the gate's last writer is gone.
                gate_reader, gate_writer = os.pipe()
                pid = os.fork()
                if pid == 0:
                    os.close(gate_writer)
                    os.read(gate_reader, 1)
                    os.close(gate_reader)
                    _attack(attack, uid, writer)
                os.write(writer, f"{pid}\n".encode())
                os._exit(0)
            except BaseException:
                os.write(writer, b"0\n" + json.dumps({"error": traceback.format_exc()}).encode())
                os._exit(1)
        os.close(init_fd)
        os.close(writer)
        os.waitpid(middle, 0)
        self._output = b""

    def __enter__(self) -> "Inside":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        os.close(self._reader)

    def kill(self) -> None:
        """End the process; its parent is the container's init, which reaps it."""
        while b"\n" not in self._output and self._read(10):
            pass
        pid = int(self._output.partition(b"\n")[0] or b"0")
        if pid:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def result(self, timeout_s: float = 30) -> object:
        """Return what the attack returned; fails when it raised or does not end."""
        while self._read(timeout_s):
            pass
        answer = json.loads(self._output.partition(b"\n")[2])
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _read(self, timeout_s: float) -> bool:
        ready, _, _ = select.select([self._reader], [], [], timeout_s)
        assert ready, f"the attack said nothing in {timeout_s} s"
        data = os.read(self._reader, 65536)
        self._output += data
        return bool(data)


def inside(init: int, attack: Callable[[], object], *, uid: int = 0) -> object:
    """Run `attack()` inside to its end and return its result (of JSON's types)."""
    with Inside(init, attack, uid=uid) as running:
        return running.result()


def _join_cgroup(groups: "list[list[str]]") -> None:
    # The unified tree is enough: that is where containers are killed, and what they see.
    path = next(path for number, _, path in groups if number == "0")
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        point = next(line.split()[1] for line in mounts if line.split()[2] == "cgroup2")
    Path(f"{point}{path}/cgroup.procs").write_text("0")


def _attack(attack: Callable[[], object], uid: int, writer: int) -> None:
    try:
        os.setsid()
        if uid:
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        answer = {"result": attack()}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    os.write(writer, json.dumps(answer).encode())
    os._exit(0)
