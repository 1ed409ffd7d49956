"""The benchmark itself works: one round on a small rootfs gives a whole table, and nothing stays behind."""

import pytest

from tests import leaks
from tests.bench import run
from tests.bench.table import Results, Row


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.needs("overlay", "veth", "ip", "busybox", "lxc")
def test_one_round_fills_the_table() -> None:
    before = leaks.picture()
    options = run.parser().parse_args(
        ["--template", "tiny", "--rounds", "1", "--count", "2", "--listed", "3"]
    )
    results = run.measure(options)
    rows = {row.name: row for row in results.measured()}
    systemd_only = {run.READY.name, run.UP.name, "start 2 → all READY"}
    assert rows.keys() == {row.name for row in results.rows()} - systemd_only
    for name, row in rows.items():
        assert row.sysctr, name
        assert row.lxc or row.against, name
    lines = results.markdown().splitlines()
    assert len(lines) == len(rows) + 2
    assert {line.count("|") for line in lines} == {7}
    left = [line for line in leaks.picture() - before if "lxc" in line or "link lx" in line]
    assert left == []


def test_a_ratio_is_of_medians_and_judged_by_its_aim() -> None:
    results = Results(
        (Row("start", aim=1.3), Row("task", aim=0.9, against="start"), Row("list", aim_absolute=40))
    )
    for side, samples in (("lxc", (10, 20, 90)), ("sysctr", (26, 1, 30))):
        for value in samples:
            results.add("start", side, value)
    results.add("task", "sysctr", 19)
    results.add("list", "sysctr", 41)
    assert results.markdown().splitlines()[2:] == [
        "| start | 20.0 ms (10.0 to 90.0) | 26.0 ms (1.0 to 30.0) | 1.30 | 1.3 x | met |",
        "| task |  | 19.0 ms | 0.95 | 0.9 x | missed |",
        "| list |  | 41.0 ms |  | 40 ms | missed |",
    ]
