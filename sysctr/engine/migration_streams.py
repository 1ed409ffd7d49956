"""Snapshots that go to a peer as streams of the storage driver's own format, where both ends have it."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sysctr.errors import SysctrError
from sysctr.peer.channel import Channel
from sysctr.storage.base import Streams

# Moves bytes between this descriptor to read and this one to write, and the other side; closes both.
Exchange = Callable[[int, int], None]


def send_stream(driver: Streams, volume: str, snapshot: str, base: str, exchange: Exchange) -> None:
    """Send a snapshot, or what of it differs from `base`; raises what broke it."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    null_fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)

    def produce() -> None:
        try:
            driver.send(volume, snapshot, write_fd, base)
        finally:
            os.close(write_fd)

    _both(produce, lambda: exchange(read_fd, null_fd))


def receive_stream(
    driver: Streams, volume: str, snapshot: str, note: Mapping[str, Any], exchange: Exchange
) -> None:
    """Make a snapshot of what a peer sends; nothing of it stays if that fails."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    null_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def consume() -> None:
        try:
            driver.receive(volume, snapshot, read_fd, note)
        finally:
            os.close(read_fd)

    _both(consume, lambda: exchange(null_fd, write_fd))


@contextlib.contextmanager
def taking(channel: Channel, answer: dict[str, Any]) -> Iterator[Exchange]:
    """Tell the other side to send, and give what moves the bytes; it hears why, if it comes to nothing."""
    begun = False

    def exchange(read_fd: int, write_fd: int) -> None:
        nonlocal begun
        begun = True
        channel.exchange(read_fd, write_fd)

    channel.send({"ok": answer})
    try:
        yield exchange
    except SysctrError as error:
        if not begun:
            channel.decline(error)
        raise


def _both(work: Callable[[], None], exchange: Callable[[], None]) -> None:
    """Run the driver's work in a thread of its own beside the exchange, and raise what failed."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="stream", daemon=True)
    thread.start()
    broke: BaseException | None = None
    try:
        exchange()
    except BaseException as error:
        broke = error
    thread.join()
    # What the driver says of a stream that ends too soon is not why it ended.
    if broke is not None and not (failed and _says_more(broke)):
        raise broke
    if failed:
        raise failed[0]


def _says_more(broke: BaseException) -> bool:
    """Tell whether an exchange only broke because the program behind it had ended."""
    cause = broke.__cause__
    return isinstance(broke, SysctrError) and isinstance(cause, BrokenPipeError)

