"""Sizes of volumes are fresh where measuring is quick, and never waited for where it is not."""

import threading

import pytest

from sysctr.storage import sizes
from sysctr.storage.sizes import Sizes
from tests.wait import wait_until


def test_a_volume_that_is_quick_to_measure_is_told_as_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "_QUICK_S", 10.0)
    monkeypatch.setattr(sizes, "_QUICK_AGAIN_S", -1.0)
    now = [1]
    known = Sizes(lambda _volume: now[0])
    assert known.measure("101") == 1
    now[0] = 2
    assert known.usage("101") == 2


def test_a_volume_that_takes_long_is_measured_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "_QUICK_S", -1.0)
    monkeypatch.setattr(sizes, "_MEASURE_AGAIN_S", -1.0)
    walked, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def walk(_volume: str) -> int:
        walked.release()
        assert go_on.acquire(timeout=10)
        return 7

    known = Sizes(walk)
    assert known.usage("101") is None
    assert walked.acquire(timeout=10)
    assert known.usage("101") is None
    go_on.release()
    wait_until(lambda: known.usage("101") == 7, what="the measurement")
    go_on.release()  # for the one that this question may have begun
