"""Work with peers: whoever keeps one waiting keeps nobody else waiting."""

import threading

import pytest

from sysctr.engine.peer_workers import PeerWorkers
from tests.wait import wait_until


def test_one_that_never_answers_holds_up_nobody_and_is_not_asked_twice_at_once() -> None:
    asked: list[str] = []
    released = threading.Event()

    def work(peer: str) -> None:
        asked.append(peer)
        if peer == "dead":
            assert released.wait(30)

    workers = PeerWorkers("test", work)
    for count in range(1, 4):
        workers.begin(["dead", "well"])
        workers.wait(0.01)
        wait_until(lambda: not workers._threads["well"].is_alive(), what="the one that answers")
        assert (asked.count("dead"), asked.count("well")) == (1, count)
    released.set()
    workers.wait(30)
    workers.begin(["dead"])
    workers.wait(30)
    assert asked.count("dead") == 2


def test_a_mistake_is_seen_and_the_next_round_is_made(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[str] = []

    def work(peer: str) -> None:
        asked.append(peer)
        raise KeyError(peer)

    workers = PeerWorkers("replicas", work)
    for _ in range(2):
        workers.begin(["rio"])
        workers.wait(30)
    assert asked == ["rio", "rio"]
    assert [record.getMessage() for record in caplog.records] == ["replicas: peer rio"] * 2
