"""The conversation of a migration over real TLS: what becomes of a stream that one of both sides refuses."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sysctr.engine.migration_link import Link
from sysctr.engine.migration_streams import taking
from sysctr.errors import NoSpace, Refused, SysctrError
from sysctr.peer.channel import Channel
from tests.peering import channels, in_thread, make_identity

MID = "0123456789abcdef"
# Less than either side waits for the other by itself.
SOON_S = 20


def ends() -> tuple[int, int]:
    """Return a descriptor that gives a little and ends, and one that takes anything."""
    read_fd, write_fd = os.pipe()
    os.write(write_fd, b"x" * 1000)
    os.close(write_fd)
    return read_fd, os.open(os.devnull, os.O_WRONLY)


def nowhere() -> tuple[int, int]:
    """Return a descriptor that gives nothing, and one that takes anything."""
    return os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Link, Channel]]:
    with channels(make_identity(tmp_path)) as (left, right):
        task = SimpleNamespace(check=lambda: None, progress=lambda done: None, step=lambda text: None)
        peers = SimpleNamespace(connect=lambda peer: left)
        peer = SimpleNamespace(name="rio", id="f" * 64)
        link = Link(cast("Any", peers), cast("Any", peer), MID, {}, cast("Any", task))
        opened = in_thread(link.open)
        assert right.receive(SOON_S)["op"] == "migrate.begin"
        right.send({"ok": {"phase": "receiving", "kept": []}})
        assert opened.result(SOON_S)["phase"] == "receiving"
        yield link, right
        link.close()


def take(right: Channel, then: Callable[[], None]) -> None:
    """Take a stream as a target does, and answer as `then` says."""
    assert right.receive(SOON_S)["op"] == "migrate.sync"
    try:
        with taking(right, {}) as exchange:
            exchange(*nowhere())
        then()
    except SysctrError as error:
        right.refuse(error)
        raise
    right.send({"ok": {}})


def full() -> None:
    raise NoSpace("cannot write it out: no space left", "make room")


def test_what_a_target_says_after_a_whole_stream_is_not_waited_for_twice(both: tuple[Link, Channel]) -> None:
    link, right = both
    taken = in_thread(take, right, full)
    sent = in_thread(link.transfer, "sync", lambda exchange: exchange(*ends()))
    with pytest.raises(NoSpace, match="write it out") as raised:
        sent.result(SOON_S)
    assert raised.value.hint == "make room"
    with pytest.raises(NoSpace):
        taken.result(SOON_S)


def test_a_target_is_told_at_once_of_a_stream_that_does_not_begin(both: tuple[Link, Channel]) -> None:
    link, right = both

    def fail(_exchange: object) -> None:
        raise Refused("cannot begin: rsync is not there")

    taken = in_thread(take, right, lambda: None)
    with pytest.raises(Refused, match="rsync is not there"):
        in_thread(link.transfer, "sync", fail).result(SOON_S)
    with pytest.raises(SysctrError, match="rsync is not there"):
        taken.result(SOON_S)


def test_a_stream_that_went_well_leaves_the_connection_for_the_next(both: tuple[Link, Channel]) -> None:
    link, right = both
    for round_ in (1, 2):
        taken = in_thread(take, right, lambda: None)
        in_thread(link.transfer, "sync", lambda exchange: exchange(*ends())).result(SOON_S)
        taken.result(SOON_S)
        assert link.sent_bytes == 1000 * round_
