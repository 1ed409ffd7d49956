"""A supervisor that finds a container gone knows how it ended, whenever its keeper reaped it."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from sysctr.linux import process
from sysctr.paths import Layout
from sysctr.runtime import wire
from sysctr.runtime.records import Records
from sysctr.runtime.supervisor import supervisor_argv
from tests.wait import wait_until

KILLED = int(signal.SIGKILL)


def gone() -> dict:
    """Return the record of a process that has ended and was reaped."""
    child = subprocess.Popen([sys.executable, "-I", "-c", "input()"], stdin=subprocess.PIPE)
    start_time = process.start_time(child.pid)
    child.communicate()
    return {"pid": child.pid, "start_time": start_time, "started": 1.0}


def test_an_init_that_ended_while_the_keeper_told_is_asked_for_again(tmp_path: Path) -> None:
    where = Layout(str(tmp_path))
    os.makedirs(where.run)
    Records(where.supervised).write(100, gone())
    pid = Records(where.supervised).read_all()[100]["pid"]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.set_inheritable(True)
    argv = supervisor_argv(theirs.fileno())
    environment = {**os.environ, "SYSCTR_ROOT": str(tmp_path)}
    with ours, subprocess.Popen(argv, pass_fds=(theirs.fileno(),), env=environment) as supervisor:
        theirs.close()
        ours.settimeout(10)
        try:
            assert "hello" in wire.receive_plain(ours)
            wire.send(ours, {"end": True})
            # The process is gone by now, but nothing was told of it.
            assert "hello" in wire.receive_plain(ours)
            wire.send(ours, {"reaped": pid, "status": KILLED})
            wire.send(ours, {"end": True})
            told = [wire.receive_plain(ours), wire.receive_plain(ours)]
            assert {"claimed": [pid]} in told
            record = wait_until(lambda: Records(where.supervised).read_all().get(100), what="its record")
            assert (record["running"], record["exit"]) == (False, KILLED)
        finally:
            supervisor.kill()
