"""Streams between hosts, and snapshots that go as such in their driver's own format where both have it."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from sysctr.engine.tree_sync import Exchange
from sysctr.errors import NoSpace, SysctrError
from sysctr.peer.channel import Channel, PeerLost
from sysctr.storage.base import Streams

# How long the other side may take to say why it ended a stream.
_WHY_S = 120.0


def send_stream(driver: Streams, volume: str, snapshot: str, base: str, exchange: Exchange) -> None:
    """Send a snapshot, or what of it differs from `base`; raises what broke it."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    null_fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    produce = partial(driver.send, volume, snapshot, write_fd, base)
    _both(produce, write_fd, partial(exchange, read_fd, null_fd))


def receive_stream(
    driver: Streams, volume: str, snapshot: str, note: Mapping[str, Any], exchange: Exchange
) -> None:
    """Make a snapshot of what a peer sends; nothing of it stays if that fails."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    null_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    consume = partial(driver.receive, volume, snapshot, read_fd, note)
    _both(consume, read_fd, partial(exchange, null_fd, write_fd))


@contextlib.contextmanager
def giving(channel: Channel, **options: Any) -> Iterator[Exchange]:
    """Give what moves a stream that the other side waits for; raises why it came to nothing.

    `options` are those of `Channel.exchange`. The answer to the question that the stream belongs to is still
    to come where it went well, and has come where it did not.
    """
    try:
        with _streaming(channel, options) as exchange:
            yield exchange
    except PeerLost:
        raise
    except SysctrError as error:
        cause = _why(channel, error)
        raise cause from (None if cause is error else error)


@contextlib.contextmanager
def taking(channel: Channel, answer: dict[str, Any]) -> Iterator[Exchange]:
    """Tell the other side to send, and give what moves the bytes; it hears why, if it comes to nothing."""
    channel.send({"ok": answer})
    with _streaming(channel, {}) as exchange:
        yield exchange


@contextlib.contextmanager
def _streaming(channel: Channel, options: Mapping[str, Any]) -> Iterator[Exchange]:
    begun = False

    def exchange(read_fd: int, write_fd: int) -> None:
        nonlocal begun
        begun = True
        channel.exchange(read_fd, write_fd, **options)

    try:
        yield exchange
    except SysctrError as error:
        if not begun:
            # The other side waits for a stream, and would for long.
            channel.decline(error)
        raise


def _why(channel: Channel, error: SysctrError) -> SysctrError:
    """Return why a stream came to nothing: what this side saw, unless the other side knows better."""
    try:
        channel.answer(_WHY_S)
    except PeerLost:
        return error
    except SysctrError as theirs:
        # Of a disk that is full over there, this side has only seen that the stream ended.
        return theirs if isinstance(theirs, NoSpace) or error.code == SysctrError.code else error
    return error


def _both(work: Callable[[], None], own_fd: int, exchange: Callable[[], None]) -> None:
    """Run the driver's work, which alone has `own_fd`, in a thread beside the exchange; raise what failed."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)
        finally:
            os.close(own_fd)

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
