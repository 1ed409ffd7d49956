"""Jobs on foreign trees are bounded: what runs in one can neither fork nor fill the host to death."""

import os
from pathlib import Path

import pytest

from sysctr.cgroup import base
from sysctr.cgroup.base import Bounds
from sysctr.engine.job import JobRunner
from sysctr.engine.removal import cgroup_directories
from sysctr.errors import SysctrError
from sysctr.paths import Layout
from tests.wait import wait_until

pytestmark = [pytest.mark.kernel, pytest.mark.needs("root", "userns", "idmap")]

_PYTHON = ["/usr/bin/python3", "-I", "-c"]
_FORKS = """
import os, signal
count = 0
try:
    while count < 100:
        if os.fork() == 0:
            signal.pause()
        count += 1
except BlockingIOError:
    pass
os._exit(count)
"""


@pytest.fixture
def volume(tmp_path: Path) -> str:
    return str(tmp_path)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that are reached before the machine feels it."""
    monkeypatch.setattr(base, "job_bounds", lambda meminfo: Bounds(64 << 20, 12))


def where_of(jobs: JobRunner) -> Layout:
    return Layout(jobs._stage.removesuffix("/run/stage"))


def groups(jobs: JobRunner) -> list[str]:
    """Return the cgroups of jobs that exist in any hierarchy."""
    found = []
    for directory in cgroup_directories(where_of(jobs)):
        if os.path.isdir(f"{directory}/jobs"):
            found += [entry.path for entry in os.scandir(f"{directory}/jobs") if entry.is_dir()]
    return found


def test_a_job_has_a_cgroup_of_its_own_which_goes_with_it(jobs: JobRunner, volume: str) -> None:
    assert jobs.run_tool(["sh", "-c", "cat /proc/self/cgroup > /volume/told"], volume=volume) == 0
    told = Path(f"{volume}/told").read_text()
    assert f"0::/{where_of(jobs).cgroup}/jobs/" in told
    assert cgroup_directories(where_of(jobs))
    wait_until(lambda: not groups(jobs), what="no cgroup of a job")


@pytest.mark.usefixtures("narrow")
def test_a_fork_bomb_ends_at_the_bound(jobs: JobRunner, volume: str) -> None:
    forked = jobs.run_tool([*_PYTHON, _FORKS], volume=volume)
    assert 5 <= forked <= 11
    wait_until(lambda: not groups(jobs), what="no cgroup of a job")


@pytest.mark.usefixtures("narrow")
def test_a_program_that_eats_memory_is_killed(jobs: JobRunner, volume: str) -> None:
    assert jobs.run_tool([*_PYTHON, "x = bytearray(256 << 20)"], volume=volume) == 128 + 9
    wait_until(lambda: not groups(jobs), what="no cgroup of a job")


def test_a_job_that_cannot_begin_leaves_no_cgroup(jobs: JobRunner, volume: str) -> None:
    with pytest.raises(SysctrError):
        jobs.run_tool(["true"], volume=f"{volume}/missing")
    wait_until(lambda: not groups(jobs), what="no cgroup of a job")
