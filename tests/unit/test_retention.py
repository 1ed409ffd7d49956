"""Which snapshots the keep rules keep, and when a schedule is due."""

import doctest
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.cli import snapshot
from sysctr.config import schedule
from sysctr.config.schedule import parse_schedule
from sysctr.engine import differences, retention, snapshots
from sysctr.engine.retention import RULES, surplus
from sysctr.errors import ConfigError


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A time zone with summer time."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("module", [schedule, retention, snapshots, differences, snapshot])
def test_examples_of_the_modules_hold(module) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


def at(text: str) -> float:
    return time.mktime(time.strptime(f"{text}:00", "%Y-%m-%d %H:%M:%S"))


def kept(texts: list[str], **keep: int) -> list[str]:
    gone = surplus([at(text) for text in texts], keep)
    return sorted((text for text in texts if at(text) not in gone), reverse=True)


def test_without_a_rule_everything_is_kept() -> None:
    assert surplus([1.0, 2.0], {}) == []
    assert surplus([1.0, 2.0], dict.fromkeys(RULES, 0)) == []


def test_the_last_ones_are_kept() -> None:
    assert surplus([3.0, 1.0, 2.0], {"last": 1}) == [2.0, 1.0]


def test_of_each_day_the_newest_is_kept() -> None:
    texts = ["2026-03-03 09:00", "2026-03-03 08:00", "2026-03-02 23:59", "2026-03-01 12:00"]
    assert kept(texts, daily=2) == ["2026-03-03 09:00", "2026-03-02 23:59"]


def test_a_period_that_an_earlier_rule_holds_does_not_count() -> None:
    texts = ["2026-03-03 09:00", "2026-03-03 08:00", "2026-03-02 12:00", "2026-03-01 12:00"]
    # The day of the 3rd is held by `last`, so the two days are the 2nd and the 1st.
    assert kept(texts, last=1, daily=2) == ["2026-03-03 09:00", "2026-03-02 12:00", "2026-03-01 12:00"]


def test_weeks_are_those_of_iso() -> None:
    # 2027-01-03 is the Sunday of week 53 of 2026, and 2026-12-28 its Monday.
    texts = ["2027-01-03 12:00", "2026-12-28 12:00", "2026-12-27 12:00"]
    assert kept(texts, weekly=2) == ["2027-01-03 12:00", "2026-12-27 12:00"]


def test_what_a_rule_removes_no_later_rule_takes_back() -> None:
    texts = ["2026-02-01 12:00", "2026-01-31 12:00", "2026-01-20 12:00"]
    # Both first ones are of one ISO week; January is kept by the 20th.
    assert kept(texts, weekly=1, monthly=1) == ["2026-02-01 12:00", "2026-01-20 12:00"]


@given(
    st.lists(st.integers(0, 10**9).map(float), unique=True, max_size=40),
    st.dictionaries(st.sampled_from(RULES), st.integers(0, 5)),
)
def test_no_rule_keeps_more_than_it_says(times: list[float], keep: dict[str, int]) -> None:
    gone = surplus(times, keep)
    left = [one for one in times if one not in gone]
    if not any(keep.values()):
        assert left == times
    else:
        assert len(left) <= sum(keep.values())
        assert len(left) >= min(len(times), keep.get("last", 0))
        # Twice is the same: pruning again takes nothing more.
        assert surplus(left, keep) == []


@pytest.mark.parametrize(
    ("schedule", "now", "due"),
    [
        ("hourly", "2026-05-05 10:20", "2026-05-05 10:00"),
        ("daily", "2026-05-05 10:20", "2026-05-05 00:00"),
        ("daily 03:30", "2026-05-05 03:30", "2026-05-05 03:30"),
        ("daily 03:30", "2026-05-05 03:29", "2026-05-04 03:30"),
        ("weekly", "2026-05-06 10:00", "2026-05-04 00:00"),
        ("weekly sun 22:00", "2026-05-06 10:00", "2026-05-03 22:00"),
        # The clocks go forward on 2026-03-29 at 02:00.
        ("daily 01:00", "2026-03-29 12:00", "2026-03-29 01:00"),
        ("daily 12:00", "2026-03-29 11:00", "2026-03-28 12:00"),
    ],
)
def test_a_schedule_was_due_last(schedule: str, now: str, due: str) -> None:
    parsed = parse_schedule(schedule)
    assert parsed is not None
    assert parsed.last_due(at(now)) == at(due)
    following = parsed.next_due(at(now))
    assert following > at(now)
    assert parsed.last_due(following) == following


def test_off_is_no_schedule() -> None:
    assert parse_schedule("off") is None


@pytest.mark.parametrize("text", ["", "sometimes", "daily 24:00", "daily 3", "weekly foo", "hourly 03:00"])
def test_what_is_no_schedule_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_schedule(text)
