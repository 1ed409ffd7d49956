"""Signals to groups, and what a dead process tells of its end."""

import os
import signal
import subprocess
import sys

import pytest

from sysctr.linux import process
from tests.wait import wait_until

pytestmark = pytest.mark.kernel

_LEADER = "import os, signal; os.setsid(); os.fork(); print(end='.', flush=True); signal.pause()"


# The second is no flag at all: a kernel before 6.9 knows none, and answers the same.
@pytest.mark.parametrize("flag", [process._PIDFD_SIGNAL_PROCESS_GROUP, 1 << 30], ids=["6.9", "6.1"])
def test_a_signal_reaches_a_whole_group(monkeypatch: pytest.MonkeyPatch, flag: int) -> None:
    monkeypatch.setattr(process, "_PIDFD_SIGNAL_PROCESS_GROUP", flag)
    leader = subprocess.Popen([sys.executable, "-c", _LEADER], stdout=subprocess.PIPE)
    pidfd = os.pidfd_open(leader.pid)
    try:
        assert leader.stdout.read(2) == b".."
        process.signal_group(pidfd, leader.pid, signal.SIGTERM)
        assert leader.wait(10) == -signal.SIGTERM
        assert leader.stdout.read() == b""  # the other one has let go of it, too
    finally:
        os.close(pidfd)
        leader.stdout.close()


@pytest.mark.parametrize("flag", [process._PIDFD_SIGNAL_PROCESS_GROUP, 1 << 30], ids=["6.9", "6.1"])
def test_who_leads_no_group_is_told_as_such(monkeypatch: pytest.MonkeyPatch, flag: int) -> None:
    monkeypatch.setattr(process, "_PIDFD_SIGNAL_PROCESS_GROUP", flag)
    child = subprocess.Popen(["sleep", "1000"])
    pidfd = os.pidfd_open(child.pid)
    try:
        with pytest.raises(OSError, match="No such process"):
            process.signal_group(pidfd, child.pid, signal.SIGTERM)
        assert child.poll() is None
    finally:
        os.close(pidfd)
        child.kill()
        child.wait()


def test_a_zombie_tells_its_status_until_it_is_reaped() -> None:
    child = subprocess.Popen(["sh", "-c", "read x; exit 3"], stdin=subprocess.PIPE)
    begun = process.start_time(child.pid)
    assert process.zombie_status(child.pid, begun) is None
    child.stdin.close()
    assert wait_until(lambda: process.zombie_status(child.pid, begun), what="its end") == 3 << 8
    assert process.zombie_status(child.pid, begun + 1) is None
    assert child.wait(10) == 3
    assert process.zombie_status(child.pid, begun) is None
