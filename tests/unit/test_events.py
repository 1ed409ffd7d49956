"""Whoever listens hears every event in order; whoever does not read is dropped and delays nobody."""

import threading

from hypothesis import given
from hypothesis import strategies as st

from sysctr.engine.events import Bus


@given(kinds=st.lists(st.sampled_from(["task", "container"]), max_size=50))
def test_every_listener_gets_every_event_in_order(kinds: list[str]) -> None:
    bus = Bus()
    with bus.subscribe() as first, bus.subscribe() as second:
        for number, kind in enumerate(kinds):
            bus.publish(kind, number=number)
        taken = first.take()
        got = [second.get(timeout_s=1) for _ in kinds]
        assert second.get(timeout_s=0) is None
    assert taken == got
    assert [(event["number"], event["kind"]) for event in taken] == list(enumerate(kinds))


def test_a_listener_hears_nothing_of_before_and_after() -> None:
    bus = Bus()
    bus.publish("task", number=1)
    with bus.subscribe() as subscription:
        bus.publish("task", number=2)
    bus.publish("task", number=3)
    assert [event["number"] for event in subscription.take()] == [2]
    assert not bus.heard


def test_a_listener_that_does_not_read_is_dropped_and_the_others_stay() -> None:
    bus = Bus()
    with bus.subscribe(limit=10) as slow, bus.subscribe() as quick:
        for number in range(20):
            bus.publish("task", number=number)
        assert slow.closed
        assert slow.overflowed
        assert len(slow.take()) == 10
        assert slow.get() is None, "get() on a closed subscription must not wait"
        assert len(quick.take()) == 20
        assert not quick.closed


def test_the_listener_is_woken_once_for_a_burst_and_at_the_end() -> None:
    woken = []
    bus = Bus()
    subscription = bus.subscribe(wake=lambda: woken.append(1))
    for _ in range(5):
        bus.publish("task")
    assert len(woken) == 1
    subscription.take()
    bus.publish("task")
    assert len(woken) == 2
    subscription.close()
    assert len(woken) == 3


def test_nothing_is_lost_between_threads() -> None:
    bus = Bus()
    with bus.subscribe(limit=10_000) as subscription:
        threads = [
            threading.Thread(target=lambda: [bus.publish("task") for _ in range(500)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        got = sum(1 for _ in range(2000) if subscription.get(timeout_s=10) is not None)
        for thread in threads:
            thread.join()
    assert got == 2000


def test_closing_wakes_a_thread_that_waits() -> None:
    subscription = Bus().subscribe()
    got = []
    thread = threading.Thread(target=lambda: got.append(subscription.get(timeout_s=30)))
    thread.start()
    subscription.close()
    thread.join(10)
    assert got == [None]
