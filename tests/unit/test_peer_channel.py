"""Messages and streams over real TLS: what honest ends do, and what no other end can make of them."""

import contextlib
import doctest
import hashlib
import os
import socket
import struct
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sysctr.errors import NoSpace, SysctrError
from sysctr.peer import dial, frame, message, stream
from sysctr.peer.channel import PeerLost
from tests.peering import channels, in_thread, make_identity, raw_and_channel

MESSAGE, PIECE, END, BROKEN = b"J", b"D", b"E", b"X"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return make_identity(tmp_path_factory.mktemp("own"))


@pytest.fixture(autouse=True)
def no_descriptor_left():
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def packed(kind, body=b""):
    return struct.pack(">cI", kind, len(body)) + body


def giver(data, chunk=1 << 20):
    """Return a descriptor that gives the data, as a program of ours would."""
    read_fd, write_fd = os.pipe()

    def give():
        view = memoryview(data)
        with contextlib.suppress(BrokenPipeError):
            while view:
                view = view[os.write(write_fd, view[:chunk]) :]
        os.close(write_fd)

    threading.Thread(target=give, daemon=True).start()
    return read_fd


def taker():
    """Return a descriptor that takes data, and the future of its hash and length."""
    read_fd, write_fd = os.pipe()

    def take():
        digest, count = hashlib.sha256(), 0
        while data := os.read(read_fd, 1 << 20):
            digest.update(data)
            count += len(data)
        os.close(read_fd)
        return digest.hexdigest(), count

    return write_fd, in_thread(take)


def nothing():
    """Return a descriptor that gives nothing and ends at once."""
    return giver(b"")


@pytest.mark.parametrize("module", [frame, message, dial])
def test_examples_of_the_modules_hold(module):
    assert doctest.testmod(module).failed == 0


def test_questions_are_answered_and_errors_come_as_they_were(own):
    with channels(own) as (left, right):
        asked = in_thread(lambda: left.call("begin", 10, container="web", big="ü" * 300_000))
        assert right.receive(10) == {"op": "begin", "container": "web", "big": "ü" * 300_000}
        right.send({"ok": {"id": 7}})
        assert asked.result(10) == {"id": 7}
        asked = in_thread(left.call, "begin", 10)
        right.receive(10)
        right.refuse(NoSpace("cannot receive 101: no room", "in /srv"))
        with pytest.raises(NoSpace, match="no room") as raised:
            asked.result(10)
        assert raised.value.hint == "in /srv"


@pytest.mark.parametrize(
    "answer",
    [{}, {"ok": 1}, {"ok": {}, "error": {}}, {"op": "begin"}, {"ok": None}],
)
def test_what_is_no_answer_is_none(own, answer):
    with channels(own) as (left, right):
        right.send(answer)
        with pytest.raises(PeerLost, match="no answer"):
            left.call("begin", 10)


@pytest.mark.parametrize(
    "error", [None, 1, "x", {}, {"code": 1, "message": []}, {"code": "A" * 99}, {"message": "x" * 99999}]
)
def test_whatever_stands_for_an_error_is_one(own, error):
    with channels(own) as (left, right):
        right.send({"error": error})
        with pytest.raises(SysctrError) as raised:
            left.call("begin", 10)
        assert len(raised.value.message) <= 4096


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n", packed(b"Z"), packed(END), packed(PIECE, b"x"), packed(MESSAGE, b"{"),
        packed(MESSAGE, b"[]"), packed(MESSAGE, b"\xff"), packed(MESSAGE, b'{"a":NaN}'),
        packed(MESSAGE, b'{"a":1,"a":2}'), packed(MESSAGE, b"[" * 100_000), packed(MESSAGE),
        struct.pack(">cI", MESSAGE, (16 << 20) + 1), struct.pack(">cI", PIECE, (1 << 20) + 1),
        struct.pack(">cI", BROKEN, (64 << 10) + 1), packed(PIECE) * 1001,
    ],
)  # fmt: skip
def test_what_is_no_message_ends_the_connection_at_once(own, data):
    with raw_and_channel(own) as (raw, channel):
        raw.sendall(data)
        began_s = time.monotonic()
        with pytest.raises(PeerLost):
            channel.receive(30)
        assert time.monotonic() - began_s < 10
        with pytest.raises(PeerLost):
            channel.send({})


def test_a_message_that_is_cut_off_or_slow_is_not_waited_for(own):
    whole = packed(MESSAGE, b'{"op":"x"}')
    for end in range(len(whole)):
        with raw_and_channel(own) as (raw, channel):
            raw.sendall(whole[:end])
            raw.close()
            with pytest.raises(PeerLost):
                channel.receive(10)
    with raw_and_channel(own) as (raw, channel):
        stop = threading.Event()

        def drip():
            for number in range(len(whole)):
                raw.send(whole[number : number + 1])
                if stop.wait(0.1):
                    return

        dripping = in_thread(drip)
        began_s = time.monotonic()
        # Each byte comes in time, but not all of them.
        with pytest.raises(PeerLost, match="does not answer in time"):
            channel.receive(0.5)
        assert time.monotonic() - began_s < 1
        stop.set()
        dripping.result(10)


def test_a_stream_in_both_directions_and_messages_after_it(own):
    data = os.urandom(1 << 20) * 200
    wanted = hashlib.sha256(data).hexdigest(), len(data)
    with channels(own) as (left, right):
        moved = [0, 0]

        def run(side, channel):
            def told(count):
                moved[side] += count

            write_fd, taken = taker()
            counts = channel.exchange(giver(data), write_fd, told=told)
            return counts, taken.result(10)

        began_s = time.monotonic()
        ends = [in_thread(run, 0, left), in_thread(run, 1, right)]
        for end in ends:
            assert end.result(120) == ((len(data), len(data)), wanted)
        seconds = time.monotonic() - began_s
        print(f"\n{2 * len(data) / seconds / 1e6:.0f} MB/s, both directions added, in one process")
        assert moved == [2 * len(data)] * 2
        left.send({"op": "next"})
        assert right.receive(10) == {"op": "next"}


@pytest.mark.parametrize("size", [0, 1, 4, 5, 16384 - 5, 16384, 262139, 262144, 1_000_003])
def test_every_length_arrives_whole_and_without_a_look_at_the_clock(own, size, monkeypatch):
    monkeypatch.setattr(stream, "_TELL_S", 60)
    data = os.urandom(size)
    with channels(own) as (left, right):
        write_fd, taken = taker()
        unused_fd, empty = taker()
        sent = in_thread(left.exchange, giver(data, 777), unused_fd)
        assert right.exchange(nothing(), write_fd) == (0, size)
        assert sent.result(10) == (size, 0)
        assert taken.result(10) == (hashlib.sha256(data).hexdigest(), size)
        assert empty.result(10)[1] == 0


def test_one_socket_may_be_both_descriptors(own):
    with channels(own) as (left, right):
        ours, theirs = socket.socketpair()

        def echo():
            with ours:
                total = b""
                while data := ours.recv(65536):
                    total += data
                ours.sendall(total[::-1])

        echoed = in_thread(echo)
        fd = theirs.detach()
        there = in_thread(right.exchange, fd, fd)
        write_fd, taken = taker()
        data = bytes(range(256)) * 1000
        assert left.exchange(giver(data), write_fd) == (len(data), len(data))
        assert there.result(10) == (len(data), len(data))
        echoed.result(10)
        assert taken.result(10)[0] == hashlib.sha256(data[::-1]).hexdigest()


def test_a_local_program_that_dies_ends_both_sides_and_leaves_the_connection_in_step(own):
    data = bytes(50 << 20)
    with channels(own) as (left, right):
        dead_read_fd, dead_write_fd = os.pipe()
        os.close(dead_read_fd)
        write_fd, taken = taker()
        there = in_thread(left.exchange, giver(data), write_fd)
        with pytest.raises(SysctrError, match="has ended") as raised:
            right.exchange(giver(data), dead_write_fd)
        assert not isinstance(raised.value, PeerLost)
        with pytest.raises(SysctrError, match="has ended"):
            there.result(20)
        taken.result(10)
        right.refuse(raised.value)
        with pytest.raises(SysctrError, match="has ended"):
            left.answer(10)
        left.send({"op": "again"})
        assert right.receive(10) == {"op": "again"}


def test_both_sides_may_break_a_stream_at_once(own):
    with channels(own) as (left, right):
        ends = []
        for channel in (left, right):
            dead_read_fd, dead_write_fd = os.pipe()
            os.close(dead_read_fd)
            ends.append(in_thread(channel.exchange, giver(bytes(5 << 20)), dead_write_fd))
        for end in ends:
            with pytest.raises(SysctrError, match="has ended"):
                end.result(20)
        left.send({"op": "again"})
        assert right.receive(10) == {"op": "again"}


class Stopped(SysctrError):
    """What a task that is cancelled raises."""

    code = "cancelled"


def test_a_cancelled_task_ends_both_sides(own):
    with channels(own) as (left, right):
        silent_fd, held_fd = os.pipe()
        write_fd, taken = taker()
        other_fd, other_taken = taker()
        cancelled = threading.Event()

        def check():
            if cancelled.is_set():
                raise Stopped("cannot go on: the task was cancelled")

        there = in_thread(right.exchange, nothing(), other_fd)
        here = in_thread(lambda: left.exchange(silent_fd, write_fd, check=check))
        cancelled.set()
        with pytest.raises(Stopped):
            here.result(10)
        with pytest.raises(SysctrError, match="was cancelled") as raised:
            there.result(10)
        assert raised.value.code == "cancelled"
        assert taken.result(10)[1] == other_taken.result(10)[1] == 0
        os.close(held_fd)


def test_silence_is_the_end_and_a_sign_of_life_is_none(own):
    with channels(own) as (left, right):
        silent = [os.pipe() for _ in range(2)]
        ends = []
        for channel, (read_fd, _) in zip((left, right), silent, strict=True):
            write_fd, _taken = taker()
            ends.append(in_thread(lambda c=channel, r=read_fd, w=write_fd: c.exchange(r, w, idle_s=0.4)))
        # Both have nothing to say for several times as long, but live.
        threading.Event().wait(1.5)
        assert not any(end.done() for end in ends)
        for _, held_fd in silent:
            os.close(held_fd)
        assert [end.result(10) for end in ends] == [(0, 0), (0, 0)]

    with raw_and_channel(own) as (raw, channel):
        write_fd, taken = taker()
        raw.sendall(packed(PIECE, b"begin"))
        read_fd, held_fd = os.pipe()
        began_s = time.monotonic()
        with pytest.raises(PeerLost, match=r"nothing came for 0\.4 s"):
            channel.exchange(read_fd, write_fd, idle_s=0.4)
        assert time.monotonic() - began_s < 3
        assert taken.result(10)[1] == 5
        os.close(held_fd)


def test_a_program_that_takes_its_time_is_waited_for(own):
    data = bytes(32 << 20)
    with channels(own) as (left, right):
        read_fd, write_fd = os.pipe()
        unused_fd, _ = taker()
        ends = [
            in_thread(lambda: left.exchange(giver(data), unused_fd, idle_s=0.4)),
            in_thread(lambda: right.exchange(nothing(), write_fd, idle_s=0.4)),
        ]
        threading.Event().wait(1.5)
        assert not any(end.done() for end in ends)
        count = 0
        while got := len(os.read(read_fd, 1 << 20)):
            count += got
        os.close(read_fd)
        assert [end.result(10) for end in ends] == [(len(data), 0), (0, len(data))]
        assert count == len(data)


def test_the_other_side_may_vanish_at_any_time(own):
    for data in (b"", packed(PIECE, b"x" * 9)[:7], packed(END), packed(BROKEN, b"{}")[:6]):
        with raw_and_channel(own) as (raw, channel):
            raw.sendall(data)
            raw.close()
            write_fd, taken = taker()
            read_fd, held_fd = os.pipe()
            with pytest.raises(PeerLost):
                channel.exchange(read_fd, write_fd, idle_s=10)
            taken.result(10)
            os.close(held_fd)


@pytest.mark.parametrize(
    "data",
    [
        packed(MESSAGE, b"{}"), packed(END) * 2, packed(END) + packed(PIECE, b"x"), packed(END, b"x"),
        struct.pack(">cI", PIECE, (1 << 20) + 1), b"Z" * 99,
    ],
)  # fmt: skip
def test_what_does_not_belong_into_a_stream_ends_the_connection(own, data):
    with raw_and_channel(own) as (raw, channel):
        raw.sendall(data)
        write_fd, taken = taker()
        read_fd, held_fd = os.pipe()
        with pytest.raises(PeerLost):
            channel.exchange(read_fd, write_fd, idle_s=10)
        taken.result(10)
        os.close(held_fd)
        with pytest.raises(PeerLost):
            channel.send({})


def test_a_rate_holds(own):
    data = bytes(1 << 20)
    with channels(own) as (left, right):
        write_fd, taken = taker()
        unused_fd, _ = taker()
        there = in_thread(right.exchange, nothing(), write_fd)
        began_s = time.monotonic()
        left.exchange(giver(data), unused_fd, rate_bytes=2 << 20)
        seconds = time.monotonic() - began_s
        there.result(10)
        assert taken.result(10)[1] == len(data)
        assert 0.35 < seconds < 3, seconds


FRAMES = st.one_of(
    st.binary(max_size=64),
    st.builds(
        packed,
        st.sampled_from([MESSAGE, PIECE, END, BROKEN, b"Q"]),
        st.binary(max_size=64) | st.sampled_from([b"{}", b'{"message":"m"}', b'{"op":"x"}']),
    ),
)


@settings(max_examples=150)
@given(data=st.lists(FRAMES, max_size=6).map(b"".join), streams=st.booleans())
def test_no_bytes_make_it_hang_or_fail_otherwise(own, data, streams):
    with raw_and_channel(own) as (raw, channel):
        raw.sendall(data)
        raw.close()
        began_s = time.monotonic()
        if streams:
            write_fd, taken = taker()
            with contextlib.suppress(SysctrError):
                channel.exchange(nothing(), write_fd, idle_s=5)
            taken.result(10)
        with contextlib.suppress(SysctrError):
            for _ in range(9):
                assert isinstance(channel.receive(5), dict)
        assert time.monotonic() - began_s < 4
