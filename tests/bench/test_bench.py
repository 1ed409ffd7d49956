"""The benchmark itself works: one round on a small rootfs gives a whole table, and nothing stays behind."""

import doctest

import pytest

from tests import leaks
from tests.bench import migrate, run
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


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.needs("overlay", "veth", "ip", "busybox", "lxc")
def test_one_round_of_migrations_fills_its_table() -> None:
    before = leaks.picture()
    options = migrate.parser().parse_args(
        ["--template", "tiny", "--rounds", "2", "--size", "20", "--size", "30", "--changing", "5"]
    )
    bench = migrate.measure(options)
    for row in (migrate.DOWN, migrate.REPORTED, migrate.WHOLE, migrate.SENT, migrate.SPEED, migrate.WRITTEN):
        for column, values in bench.samples[row].items():
            assert len(values) == 2, f"{row}, {column}"
            assert min(values) > 0, f"{row}, {column}"
    assert len(migrate.ratios(bench.samples, options.size)) == 8
    # The lxcfs of another host is that host's own business.
    new = [line.replace("lxcfs", "") for line in leaks.picture() - before]
    left = [line for line in new if "lxc" in line or "link lx" in line]
    assert left == []


def test_migrations_are_judged_by_medians() -> None:
    samples = {
        migrate.DOWN: {
            "sysctr, 100 MB": [0.5, 0.6, 9.0], "LXC, 100 MB": [3.0], "sysctr, 600 MB": [0.9],
        },
        migrate.REPORTED: {"sysctr, 100 MB": [0.5]}, migrate.WHOLE: {"LXC, 100 MB": [2.0]},
        migrate.SPEED: {"sysctr, first pass": [90.0], "plain rsync": [100.0]},
        migrate.SENT: {"sysctr, stopped": [105.0]}, migrate.WRITTEN: {"stopped": [100.0]},
    }  # fmt: skip
    assert migrate.ratios(samples, [100, 600]) == [
        "- 100 MB: down for 0.60 s (aim ≤ 2), 0.20 of LXC's (aim ≤ 0.3)",
        "- 100 MB, until init runs: 0.50 s, 0.25 of LXC's",
        "- down for the largest against the smallest: 1.50 (aim about 1)",
        "- speed of the first pass against plain rsync: 0.90 (aim ≥ 0.8)",
        "- sent against what the container wrote: 1.05 (aim ≤ 1.1)",
    ]
    assert doctest.testmod(migrate).failed == 0


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
