"""What crosses a SEQPACKET socket arrives as it was sent, or as an error without a descriptor left open."""

import array
import contextlib
import fcntl
import os
import socket
import stat
import tempfile
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sysctr.runtime import wire


@contextlib.contextmanager
def pair():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        right.settimeout(10)
        yield left, right


@contextlib.contextmanager
def no_fd_leaks():
    before = set(os.listdir("/proc/self/fd"))
    yield
    after = set(os.listdir("/proc/self/fd"))
    assert len(after) <= len(before), f"descriptors left open: {sorted(after - before)}"


def send_raw(sock: socket.socket, data: bytes, fds=()) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(message=st.dictionaries(st.text() | st.just("_memfd"), JSON), fds=st.integers(0, wire.FDS_LIMIT))
def test_what_is_received_is_what_was_sent(message: dict, fds: int) -> None:
    with no_fd_leaks(), pair() as (left, right), open(os.devnull) as null:
        wire.send(left, message, [null.fileno()] * fds)
        received, received_fds = wire.receive(right)
        wire.close_all(received_fds)
    assert received == message
    assert len(received_fds) == fds


@pytest.mark.parametrize("size", [59_000, 60_000, 61_000, 300_000, wire.MEMFD_LIMIT_BYTES - 100])
def test_a_message_of_any_allowed_size_arrives_with_its_descriptors_in_order(size: int) -> None:
    with no_fd_leaks(), pair() as (left, right), open(os.devnull) as null, open("/proc/self/maps") as maps:
        wire.send(left, {"text": "x" * size}, (null.fileno(), maps.fileno()))
        message, fds = wire.receive(right)
        names = [os.readlink(f"/proc/self/fd/{fd}") for fd in fds]
        assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in fds)
        wire.close_all(fds)
    assert len(message["text"]) == size
    assert names == [os.devnull, f"/proc/{os.getpid()}/maps"]


def test_names_of_files_that_are_not_unicode_survive() -> None:
    with pair() as (left, right):
        wire.send(left, {"path": os.fsdecode(b"/srv/\xff")})
        assert os.fsencode(wire.receive_plain(right)["path"]) == b"/srv/\xff"


@pytest.mark.parametrize(
    "message",
    [{"text": "x" * wire.MEMFD_LIMIT_BYTES}, {"number": float("nan")}, {"bytes": b""}],
    ids=["too long", "nan", "bytes"],
)
def test_what_cannot_be_a_message_is_not_sent(message: dict) -> None:
    with no_fd_leaks(), pair() as (left, right):
        with pytest.raises(wire.WireError):
            wire.send(left, message)
        right.setblocking(False)
        with pytest.raises(BlockingIOError):
            wire.receive(right)


def test_too_many_descriptors_are_refused_by_both_ends() -> None:
    with no_fd_leaks(), pair() as (left, right), open(os.devnull) as null:
        with pytest.raises(wire.WireError, match="descriptors"):
            wire.send(left, {}, [null.fileno()] * (wire.FDS_LIMIT + 1))
        for count in (wire.FDS_LIMIT + 1, wire.FDS_LIMIT + 2, 200):
            send_raw(left, b"{}", [null.fileno()] * count)
            with pytest.raises(wire.WireError, match="descriptors"):
                wire.receive(right)


@pytest.mark.parametrize(
    "data",
    [b"[]", b"1", b"null", b'"x"', b"{", b"\xff\xfe", b'{"a":NaN}', b"[" * 50_000, b'{"a":' * 9_000,
     b"x" * 60_001, b'{"_memfd":true}', b'{"a":' + b"9" * 50_000 + b"}"],
    ids=lambda data: repr(data[:8]),
)  # fmt: skip
def test_hostile_bytes_are_a_wire_error_and_their_descriptor_is_closed(data: bytes) -> None:
    with no_fd_leaks(), pair() as (left, right), open(os.devnull) as null:
        send_raw(left, data, [null.fileno()])
        with pytest.raises(wire.WireError):
            wire.receive(right)


@settings(max_examples=200)
@given(data=st.binary(min_size=1, max_size=200), fds=st.integers(0, 3))
def test_any_bytes_are_a_message_or_a_wire_error(data: bytes, fds: int) -> None:
    with no_fd_leaks(), pair() as (left, right), open(os.devnull) as null:
        send_raw(left, data, [null.fileno()] * fds)
        with contextlib.suppress(wire.WireError):
            message, received = wire.receive(right)
            wire.close_all(received)
            assert isinstance(message, dict)


def envelope_fds() -> dict[str, int]:
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.write(unsealed, b"{}")
    big = os.memfd_create("big", os.MFD_ALLOW_SEALING)
    os.ftruncate(big, wire.MEMFD_LIMIT_BYTES + 1)
    fcntl.fcntl(big, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    reader, writer = os.pipe()
    os.close(writer)
    zero = os.open("/dev/zero", os.O_RDONLY)
    path = os.open("/", os.O_PATH)
    return {"unsealed": unsealed, "big": big, "pipe": reader, "zero": zero, "path": path}


@pytest.mark.parametrize("kind", ["unsealed", "big", "pipe", "zero", "path"])
def test_an_envelope_with_anything_but_a_sealed_memfd_is_refused_without_reading_it(kind: str) -> None:
    with no_fd_leaks(), pair() as (left, right):
        fds = envelope_fds()
        send_raw(left, b'{"_memfd":true}', [fds[kind]])
        wire.close_all(list(fds.values()))
        with pytest.raises(wire.WireError, match="envelope"):
            wire.receive(right)


def test_an_envelope_inside_an_envelope_is_an_ordinary_message() -> None:
    with no_fd_leaks(), pair() as (left, right):
        wire.send(left, {"_memfd": True, "more": 1})
        assert wire.receive(right) == ({"_memfd": True, "more": 1}, [])


def test_the_end_of_a_connection_is_its_own_error() -> None:
    with pair() as (left, right):
        left.close()
        with pytest.raises(wire.ConnectionClosed):
            wire.receive(right)
        with pytest.raises(wire.ConnectionClosed):
            wire.send(right, {})


def test_a_full_socket_is_a_blocking_error_that_keeps_the_connection() -> None:
    with pair() as (left, right):
        left.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 100_000:
                wire.send(left, {"n": sent})
                sent += 1
        assert 0 < sent < 100_000
        assert [wire.receive_plain(right)["n"] for _ in range(sent)] == list(range(sent))


@pytest.mark.parametrize("depth", [0, 150], ids=["short", "longer than sun_path"])
def test_listening_gives_exactly_the_mode_and_takes_the_place_of_an_old_socket(depth: int) -> None:
    old = os.umask(0o077)
    try:
        with tempfile.TemporaryDirectory() as directory:
            directory = os.path.join(directory, "d" * depth)
            os.makedirs(directory, exist_ok=True)
            path = f"{directory}/s.sock"
            with wire.listen(path, 0o660), wire.listen(path, 0o660) as server:
                assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
                assert os.listdir(directory) == ["s.sock"]
                with wire.connect(path, 10) as client:
                    accepted, _ = server.accept()
                    with accepted:
                        assert wire.peer_credentials(accepted) == (os.getpid(), os.getuid(), os.getgid())
                        answer = threading.Thread(target=wire.send, args=(accepted, {"hello": wire.PROTOCOL}))
                        answer.start()
                        assert wire.receive_plain(client) == {"hello": wire.PROTOCOL}
                        answer.join()
    finally:
        os.umask(old)
