"""Messages between daemon, supervisor and their clients: one JSON object and some descriptors per SEQPACKET.

The supervisor imports this, so it stays with the light part of the standard library. Both ends may be
hostile: what arrives is either a message and its descriptors, or an exception and no descriptor left open.
"""

import fcntl
import json
import os
import socket
import stat
import struct
from array import array

PROTOCOL = 1

# A message above the socket's send buffer fails with EMSGSIZE; 60 kB passes with every default.
MESSAGE_LIMIT_BYTES = 60_000
MEMFD_LIMIT_BYTES = 4 << 20
FDS_LIMIT = 16

_FD_BYTES = array("i").itemsize
# One more than the limit for the memfd of a large message.
_ANCILLARY_BYTES = socket.CMSG_SPACE((FDS_LIMIT + 1) * _FD_BYTES)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_ENVELOPE = "_memfd"


class WireError(Exception):
    """A message that cannot be sent, or what arrived is not a message."""


class ConnectionClosed(WireError):
    """The other end is gone."""


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode


def send(sock: socket.socket, message: dict, fds: "tuple[int, ...] | list[int]" = ()) -> None:
    """Send one message; the descriptors are duplicated by the kernel and stay the caller's.

    On a non-blocking socket whose buffer is full BlockingIOError is raised and nothing was sent.
    """
    if len(fds) > FDS_LIMIT:
        raise WireError(f"{len(fds)} descriptors in a message, {FDS_LIMIT} are allowed")
    try:
        data = _encode(message).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"not a message: {error}") from error
    # A message that itself has the envelope's key must not be taken for one.
    if len(data) <= MESSAGE_LIMIT_BYTES and _ENVELOPE not in message:
        _send_packet(sock, data, fds)
        return
    memfd = _seal(data)
    try:
        _send_packet(sock, b'{"%s":true}' % _ENVELOPE.encode(), (*fds, memfd))
    finally:
        os.close(memfd)


def receive(sock: socket.socket) -> "tuple[dict, list[int]]":
    """Return the next message and its descriptors (close-on-exec), which are the caller's to close.

    BlockingIOError and TimeoutError pass, as the socket is set.
    """
    try:
        data, ancillary, flags, _ = sock.recvmsg(
            MESSAGE_LIMIT_BYTES,
            _ANCILLARY_BYTES,
            socket.MSG_CMSG_CLOEXEC,  # recv_fds() drops its flags
        )
    except ConnectionError as error:
        raise ConnectionClosed(str(error)) from error
    fds = _received_fds(ancillary)
    try:
        if flags & socket.MSG_CTRUNC:
            raise WireError(f"a message has more than {FDS_LIMIT} descriptors, or no descriptor is free here")
        if flags & socket.MSG_TRUNC:
            raise WireError(f"a message is longer than {MESSAGE_LIMIT_BYTES} bytes")
        if not data:
            raise ConnectionClosed("the other end closed the connection")
        message = _parse(data)
        if _ENVELOPE in message:
            message = _parse(_unseal(fds))
        if len(fds) > FDS_LIMIT:
            raise WireError(f"a message has more than {FDS_LIMIT} descriptors")
    except BaseException:
        close_all(fds)
        raise
    return message, fds


def receive_plain(sock: socket.socket) -> dict:
    """Return the next message where no descriptor is expected; those that came are closed."""
    message, fds = receive(sock)
    close_all(fds)
    return message


def close_all(fds: "tuple[int, ...] | list[int]") -> None:
    """Close every descriptor of the list, whatever one of them says."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            # An error of close() is about written data (a full disk); the descriptor is gone all the same.
            pass


def listen(path: str, mode: int, backlog: int = 128, kind: int = socket.SOCK_SEQPACKET) -> socket.socket:
    """Return a socket listening at `path`, taking the place of what is there; never wider open than `mode`.

    The caller holds the lock that says who may listen here.
    """
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        # bind() takes the inode's mode from the unbound socket, less the umask; the chmod afterwards gives
        # back what the umask took. So there is no moment with a wider mode, and no umask changed under the
        # other threads.
        os.fchmod(sock.fileno(), mode)
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        _at(path, sock.bind)
        os.chmod(path, mode)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def connect(path: str, timeout_s: "float | None" = None, kind: int = socket.SOCK_SEQPACKET) -> socket.socket:
    """Return a socket connected to `path`; OSError as connect() gives it when nobody listens."""
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        connect_to(sock, path, timeout_s)
        sock.settimeout(timeout_s)
    except BaseException:
        sock.close()
        raise
    return sock


def connect_to(sock: socket.socket, path: str, timeout_s: "float | None" = None) -> None:
    """Connect a socket to `path`; TimeoutError where nobody accepts it in time, else OSError as connect()."""
    # By the kernel's own timer: a socket that Python gave a timeout does not block, and its connect() fails
    # with EAGAIN as soon as many others wait to be accepted.
    limit_s = timeout_s or 0.0
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", *_seconds(limit_s)))
    try:
        _at(path, sock.connect)
    except BlockingIOError as error:
        raise TimeoutError(error.errno, f"no answer within {limit_s:g} s") from error
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 0, 0))


def peer_credentials(sock: socket.socket) -> "tuple[int, int, int]":
    """Return pid, uid and gid of the process that connected (or listened), as the kernel recorded them."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    return struct.unpack("iII", data)


def _seconds(duration_s: float) -> "tuple[int, int]":
    return int(duration_s), int(duration_s % 1 * 1e6)


def _at(path: str, call) -> None:
    if len(os.fsencode(path)) < 108:
        call(path)
        return
    # sun_path holds 107 bytes; a deep SYSCTR_ROOT is reached through a descriptor of the directory.
    directory_fd = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        call(f"/proc/self/fd/{directory_fd}/{os.path.basename(path)}")
    finally:
        os.close(directory_fd)


def _send_packet(sock: socket.socket, data: bytes, fds: "tuple[int, ...] | list[int]") -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
    try:
        sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
    except ConnectionError as error:
        raise ConnectionClosed(str(error)) from error


def _received_fds(ancillary: list) -> "list[int]":
    fds = array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _FD_BYTES])
    return list(fds)


def _parse(data: bytes) -> dict:
    try:
        message = _decode(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # thousands of "[" are a RecursionError
        raise WireError(f"a message is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise WireError("a message is not a JSON object")
    return message


def _seal(data: bytes) -> int:
    if len(data) > MEMFD_LIMIT_BYTES:
        raise WireError(f"a message of {len(data)} bytes, {MEMFD_LIMIT_BYTES} are allowed")
    memfd = os.memfd_create("sysctr-message", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(memfd, view) :]
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(memfd)
        raise
    return memfd


def _unseal(fds: "list[int]") -> bytes:
    if not fds:
        raise WireError("a message has an envelope without a memfd")
    memfd = fds.pop()
    try:
        # Only a memfd has seals. So a file of a FUSE that never answers is refused before it is read,
        # and what is read cannot change or shrink meanwhile.
        try:
            seals = fcntl.fcntl(memfd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise WireError("an envelope's descriptor is not a memfd") from error
        if seals & _SEALS != _SEALS:
            raise WireError("an envelope's memfd is not sealed")
        status = os.fstat(memfd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MEMFD_LIMIT_BYTES:
            raise WireError(f"an envelope's memfd of {status.st_size} bytes, {MEMFD_LIMIT_BYTES} are allowed")
        try:
            data = bytearray()
            while len(data) < status.st_size:
                part = os.pread(memfd, status.st_size - len(data), len(data))
                if not part:
                    break
                data += part
        except OSError as error:  # opened with O_PATH or for writing only
            raise WireError("an envelope's memfd cannot be read") from error
        return bytes(data)
    finally:
        os.close(memfd)
