"""Limits as values: core lists, who gets which cores, v1 and v2 numbers, and what is mounted where."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.cgroup import base, detect, files, unified, v1
from sysctr.cgroup.base import Cores, Limits
from sysctr.errors import ConfigError, Refused

EVERYTHING = frozenset({"cpu", "cpuset", "memory", "swap", "pids", "io", "freeze", "kill"})

PURE = """\
22 28 0:21 / /sys rw,nosuid - sysfs sysfs rw
30 22 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate
31 22 0:26 / /run/other/cgroup rw - cgroup2 cgroup2 rw
"""
SYSTEMD_HYBRID = """\
32 22 0:28 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755
33 32 0:29 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw,nsdelegate
34 32 0:30 / /sys/fs/cgroup/systemd rw shared:11 - cgroup cgroup rw,xattr,name=systemd
37 32 0:33 / /sys/fs/cgroup/cpu,cpuacct rw shared:15 - cgroup cgroup rw,cpu,cpuacct
38 32 0:34 / /sys/fs/cgroup/me\\040mory rw shared:16 - cgroup cgroup rw,memory
39 32 0:34 / /again rw shared:16 - cgroup cgroup rw,memory
40 32 0:35 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
"""


class Layout:
    cgroup = "sysctr-test"


def cores(count: int) -> Cores:
    return Cores(lambda: frozenset(range(count)))


def test_a_pure_v2_host_has_one_tree() -> None:
    assert detect.find_mounts(PURE) == detect.Mounts("/sys/fs/cgroup", ())


def test_a_hybrid_host_has_a_tree_for_each_v1_hierarchy() -> None:
    mounts = detect.find_mounts(SYSTEMD_HYBRID)
    assert mounts.unified == "/sys/fs/cgroup/unified"
    assert dict(mounts.v1) == {
        "/sys/fs/cgroup/cpu,cpuacct": {"cpu", "cpuacct"},
        "/sys/fs/cgroup/me mory": {"memory"},
        "/sys/fs/cgroup/freezer": {"freezer"},
        "/sys/fs/cgroup/systemd": {"name=systemd"},
    }


def test_a_host_without_cgroups_has_no_trees() -> None:
    assert detect.find_mounts("22 28 0:21 / /sys rw - sysfs sysfs rw\ngarbage\n") == detect.Mounts(None, ())


@given(st.frozensets(st.integers(0, 300), max_size=40))
def test_core_lists_survive_writing_and_reading(cpus: frozenset[int]) -> None:
    assert base.parse_cpu_list(base.format_cpu_list(cpus)) == cpus


@given(st.text(max_size=20))
def test_a_core_list_is_read_or_refused(text: str) -> None:
    try:
        cpus = base.parse_cpu_list(text)
    except ConfigError:
        return
    assert all(0 <= cpu <= 0xFFFF for cpu in cpus)


@pytest.mark.parametrize("text", ["3-1", "a", "1-", "-1", "1--2", "0,x", "0-99999999999", "99999", "²"])
def test_a_bad_core_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        base.parse_cpu_list(text)


def test_cores_are_spread_over_the_containers() -> None:
    four = cores(4)
    assert [four.give(ct_id, "2") for ct_id in (101, 102, 103)] == ["0-1", "2-3", "0-1"]
    four.release(102)
    assert four.give(104, "1") == "2"
    assert four.give(105, "2") == "2-3"


def test_a_list_names_the_very_cores() -> None:
    four = cores(4)
    assert four.give(101, "1,3") == "1,3"
    assert four.give(102, "3-3") == "3"
    assert four.give(103, "2") == "0,2"


def test_a_container_keeps_its_cores_when_asked_again() -> None:
    four = cores(4)
    four.give(101, "2")
    four.give(102, "2")
    four.release(101)
    assert four.give(102, "2") == "2-3"
    assert four.give(102, "1") == "0"


def test_containers_that_run_already_are_counted() -> None:
    two = cores(2)
    two.adopt(101, frozenset({0}))
    two.adopt(102, frozenset({0, 1}))  # all there are: not pinned
    assert two.give(103, "1") == "1"


@pytest.mark.parametrize("wanted", ["3", "0", "0-5", "7-7", ""])
def test_cores_that_are_not_there_are_refused(wanted: str) -> None:
    with pytest.raises(Refused, match="this host has"):
        cores(2).give(101, wanted)


@given(st.lists(st.integers(1, 4), max_size=30))
def test_no_core_is_given_twice_as_long_as_one_is_idle(counts: list[int]) -> None:
    four = cores(4)
    used = dict.fromkeys(range(4), 0)
    for ct_id, count in enumerate(counts):
        chosen = base.parse_cpu_list(four.give(ct_id, str(count)))
        assert len(chosen) == count
        assert max(used[cpu] for cpu in chosen) <= min(
            (used[cpu] for cpu in range(4) if cpu not in chosen), default=len(counts)
        )
        for cpu in chosen:
            used[cpu] += 1


@pytest.mark.parametrize(
    ("limits", "missing"),
    [
        (Limits(cpus=1), "cpu"),
        (Limits(weight=50), "cpu"),
        (Limits(cores="1"), "cpuset"),
        (Limits(memory_bytes=1 << 20), "memory"),
        (Limits(swap_bytes=0), "swap"),
        (Limits(pids=5), "pids"),
    ],
)
def test_a_limit_without_its_controller_is_refused_by_name(limits: Limits, missing: str) -> None:
    base.check_enforceable(101, limits, EVERYTHING)
    with pytest.raises(Refused, match=rf"cannot give 101 .*`{missing}`"):
        base.check_enforceable(101, limits, EVERYTHING - {missing})


@pytest.mark.parametrize(("cpus", "usec"), [(1, 100_000), (0.5, 50_000), (0.001, 1000), (2.25, 225_000)])
def test_a_quota_is_in_microseconds_of_a_period(cpus: float, usec: int) -> None:
    assert base.quota_usec(cpus) == usec


def test_v1_shares_keep_the_proportions_of_the_weights() -> None:
    assert base.shares_from_weight(200) == 2 * base.shares_from_weight(100) == 2048
    assert base.shares_from_weight(1) >= 2


def test_limit_files_are_read() -> None:
    assert files.number("max\n") is None
    assert files.number("512\n") == 512
    assert v1.memory_limit("9223372036854771712\n") is None
    assert v1.memory_limit("1048576\n") == 1 << 20


def test_counters_are_summed_over_the_devices() -> None:
    assert unified.io_bytes("8:0 rbytes=1 wbytes=2 rios=9 dbytes=7\n8:16 rbytes=10 wbytes=20\n") == (11, 22)
    assert unified.io_bytes("") == (0, 0)
    assert v1.blkio_bytes("8:0 Read 1\n8:0 Write 2\n8:0 Total 3\n8:16 Read 10\nTotal 13\n") == (11, 2)
    assert unified.cpu_usec("usage_usec 77\nuser_usec 1\nsystem_usec 2\n") == 77


def test_a_host_without_cgroup2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "find_mounts", lambda text: detect.Mounts(None, ()))
    with pytest.raises(Refused, match="no cgroup2"):
        detect.open_driver(Layout)


def test_the_driver_follows_the_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "find_mounts", lambda text: detect.Mounts("/sys/fs/cgroup", ()))
    assert type(detect.open_driver(Layout)).__name__ == "Unified"
    # No limits there, but a root that containers must not see.
    v1_freezer = (("/sys/fs/cgroup/freezer", frozenset({"freezer"})),)
    monkeypatch.setattr(detect, "find_mounts", lambda text: detect.Mounts("/sys/fs/cgroup", v1_freezer))
    assert type(detect.open_driver(Layout)).__name__ == "Hybrid"
