"""The client of the daemon: HTTP over its unix socket, and tickets for exec, console and files.

`sysctr list` and every other command pass through here, so this module imports os, socket and json and
nothing else that is not already loaded; what only one case needs is imported in that case.
"""

import json
import os
import socket
import sys

from sysctr import errors
from sysctr.paths import Layout, layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

REQUEST_TIMEOUT_S = 60.0
START_TIMEOUT_S = 30.0
LINE_LIMIT = 65536
# Error bodies and answers are read whole; the largest real one is the list of a full host.
BODY_LIMIT = 256 * 1024 * 1024
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def quote(text: str) -> str:
    """Percent-encode text for one path segment or one query value; urllib would cost 5 ms to import.

    >>> quote("a/b c"), quote("..")
    ('a%2Fb%20c', '%2E%2E')
    """
    if text in (".", ".."):
        return "%2E" * len(text)
    raw = text.encode("utf-8", "surrogateescape")
    return "".join(chr(byte) if byte in _UNRESERVED else f"%{byte:02X}" for byte in raw)


def path(*segments: "str | int") -> str:
    """Return the address of an API object, each segment quoted.

    >>> path("containers", 101, "start")
    '/1/containers/101/start'
    """
    for segment in segments:
        if segment == "":
            raise errors.UsageError("cannot name a container, task or template by an empty word")
    return "/1/" + "/".join(quote(str(segment)) for segment in segments)


def field(answer: "Any", name: str) -> "Any":
    """Return `answer[name]` where the answer wraps its one value, else the answer itself."""
    if isinstance(answer, dict) and name in answer:
        return answer[name]
    return answer


def not_permitted(where: Layout) -> errors.Refused:
    """Return the error for a user who may not use the API's socket."""
    return errors.Refused(
        f"cannot reach the daemon: permission denied on {where.api_socket}",
        "use sudo, or have an administrator add you to the group "
        f"{where.group} (its members are as powerful as root)",
    )


class Client:
    """One connection to the daemon, kept open between requests; not to be shared by threads."""

    def __init__(self, where: "Layout | None" = None, *, start: bool = True) -> None:
        self.layout = where if where is not None else layout()
        self.start = start
        self._socket: socket.socket | None = None
        self._reader: Any = None

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._reader is not None:
            self._reader.close()
        if self._socket is not None:
            self._socket.close()
        self._socket = self._reader = None

    def get(self, where: str, query: "Mapping[str, object] | None" = None, **options: "Any") -> "Any":
        """GET a value; `None` in the query means that it is left out."""
        return self.request("GET", where, None, query, **options)

    def post(self, where: str, body: object = None, **options: "Any") -> "Any":
        """POST a request and return the answer, for long work {"task": {…}}."""
        return self.request("POST", where, {} if body is None else body, **options)

    def request(
        self,
        method: str,
        where: str,
        body: object = None,
        query: "Mapping[str, object] | None" = None,
        *,
        timeout_s: "float | None" = REQUEST_TIMEOUT_S,
    ) -> "Any":
        """Send one request and return the decoded answer; an error of the daemon is raised as it was.

        A question is asked once more where the daemon ends before it answers: the next one knows the answer.
        """
        try:
            return self._request(method, where, body, query, timeout_s)
        except errors.NoDaemon as error:
            # What is not a question may have been begun, and must not be begun twice.
            if method != "GET" or not isinstance(error.__cause__, (BrokenPipeError, ConnectionResetError)):
                raise
            return self._request(method, where, body, query, timeout_s)

    def _request(
        self,
        method: str,
        where: str,
        body: object,
        query: "Mapping[str, object] | None",
        timeout_s: "float | None",
    ) -> "Any":
        with _Lost(self):
            status, headers = self._exchange(method, where, body, query, timeout_s)
            content = b"".join(self._body(headers))
            if headers.get("connection", "").lower() == "close":
                self.close()
        if status >= 400:
            raise _error(status, content, where)
        if "json" in headers.get("content-type", ""):
            return json.loads(content) if content else None
        return content

    def upload(
        self, where: str, pieces: "Iterator[bytes]", query: "Mapping[str, object] | None" = None
    ) -> "Any":
        """PUT a body of any length, given in pieces, and return the decoded answer."""
        with _Lost(self):
            self._ask("PUT", where, ["Transfer-Encoding: chunked"], b"", query, None)
            assert self._socket is not None
            try:
                for piece in pieces:
                    if piece:
                        self._socket.sendall(b"%x\r\n%b\r\n" % (len(piece), piece), socket.MSG_NOSIGNAL)
                self._socket.sendall(b"0\r\n\r\n", socket.MSG_NOSIGNAL)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it was refused before all of it was there: the answer says why
            status, headers = self._head()
            content = b"".join(self._body(headers))
        self.close()
        if status >= 400:
            raise _error(status, content, where)
        return json.loads(content)

    def answers_before(self, fd: int) -> bool:
        """Wait until a descriptor can be read; True where the daemon has answered by then."""
        import select

        assert self._socket is not None
        poller = select.poll()
        for one in (fd, self._socket.fileno()):
            poller.register(one, select.POLLIN)
        return self._socket.fileno() in dict(poller.poll())

    def stream(
        self,
        where: str,
        query: "Mapping[str, object] | None" = None,
        *,
        timeout_s: "float | None" = None,
        headers: "dict[str, str] | None" = None,
    ) -> "Iterator[bytes]":
        """GET an answer of any length and yield its pieces as they come; its headers go into `headers`."""
        with _Lost(self):
            status, answered = self._exchange("GET", where, None, query, timeout_s)
            if status >= 400:
                raise _error(status, b"".join(self._body(answered)), where)
        if headers is not None:
            headers.update(answered)
        try:
            with _Lost(self):
                yield from self._body(answered)
        finally:
            # What was not read would be taken for the next answer.
            self.close()

    def events(self, query: "Mapping[str, object] | None" = None) -> "Iterator[tuple[str, Any]]":
        """Yield (kind, data) of every event from now on."""
        kind = "message"
        data: list[str] = []
        for line in _lines(self.stream("/1/events", query)):
            if not line:
                if data:
                    text = "\n".join(data)
                    try:
                        yield kind, json.loads(text)
                    except ValueError:
                        yield kind, text
                kind, data = "message", []
                continue
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "event":
                kind = value
            elif name == "data":
                data.append(value)

    def reachable(self) -> bool:
        """Return whether a daemon answers, without starting one."""
        try:
            self._connect_once().close()
        except OSError:
            return False
        return True

    def connect(self) -> None:
        """Open the connection; as root, start the daemon if none answers."""
        try:
            self._use(self._connect_once())
            return
        except PermissionError as error:
            raise not_permitted(self.layout) from error
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if not self.start or os.geteuid() != 0:
                raise errors.NoDaemon(
                    f"cannot reach the daemon: nothing listens on {self.layout.api_socket}",
                    "start it with `sysctr daemon start` as root",
                ) from error
        except OSError as error:
            raise errors.NoDaemon(f"cannot reach the daemon: {error.strerror or error}") from error
        from sysctr import launch

        launch.start(self.layout, START_TIMEOUT_S, self.reachable)
        try:
            self._use(self._connect_once())
        except OSError as error:
            raise errors.NoDaemon(
                f"cannot reach the daemon: it was started, and {error.strerror or error}",
                f"its log is {self.layout.log}/daemon.log",
            ) from error

    def _connect_once(self) -> "socket.socket":
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # A full backlog makes a non-blocking connect on a unix socket fail with EAGAIN at once, which
            # settimeout() would bring about; a blocking one waits, and SO_SNDTIMEO limits the wait.
            seconds = int(REQUEST_TIMEOUT_S)
            timeval = seconds.to_bytes(8, sys.byteorder) + bytes(8)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
            connection.connect(self.layout.api_socket)
        except BaseException:
            connection.close()
            raise
        return connection

    def _use(self, connection: "socket.socket") -> None:
        self.close()
        self._socket = connection
        self._reader = connection.makefile("rb")

    def _exchange(
        self,
        method: str,
        where: str,
        body: object,
        query: "Mapping[str, object] | None",
        timeout_s: "float | None",
    ) -> "tuple[int, dict[str, str]]":
        content, about = b"", []
        if body is not None:
            content = json.dumps(body).encode()
            about = ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        self._ask(method, where, about, content, query, timeout_s)
        return self._head()

    def _ask(
        self,
        method: str,
        where: str,
        about: "list[str]",
        content: bytes,
        query: "Mapping[str, object] | None",
        timeout_s: "float | None",
    ) -> None:
        if query:
            items = [f"{name}={quote(_text(value))}" for name, value in query.items() if value is not None]
            where = f"{where}?{'&'.join(items)}" if items else where
        if self._socket is None or self._stale():
            self.connect()
        assert self._socket is not None
        self._socket.settimeout(timeout_s)
        head = [f"{method} {where} HTTP/1.1", "Host: sysctr", "Accept: */*", *about]
        self._socket.sendall("\r\n".join([*head, "", ""]).encode("ascii") + content, socket.MSG_NOSIGNAL)

    def _stale(self) -> bool:
        # The daemon closes what was idle for long; anything readable before a request is that.
        assert self._socket is not None
        self._socket.settimeout(0)
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def _head(self) -> "tuple[int, dict[str, str]]":
        status_line = self._line()
        if not status_line:
            raise ConnectionResetError("closed before an answer")
        try:
            status = int(status_line.split(" ", 2)[1])
        except (IndexError, ValueError):
            raise ConnectionError(f"not an HTTP answer: {status_line[:40]!r}") from None
        headers = {}
        while line := self._line():
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        return status, headers

    def _line(self) -> str:
        line: bytes = self._reader.readline(LINE_LIMIT)
        if len(line) >= LINE_LIMIT:
            raise ConnectionError("a line of the answer is too long")
        return line.decode("latin-1").rstrip("\r\n")

    def _body(self, headers: "dict[str, str]") -> "Iterator[bytes]":
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while size := self._chunk_size():
                yield self._exactly(size)
                self._line()
            while self._line():
                pass
        elif "content-length" in headers:
            left = int(headers["content-length"])
            if left > BODY_LIMIT:
                raise ConnectionError("the answer is too large")
            if left:
                yield self._exactly(left)
        else:
            while piece := self._reader.read1(LINE_LIMIT):
                yield piece
            self.close()

    def _chunk_size(self) -> int:
        line = self._line()
        try:
            size = int(line.split(";", 1)[0], 16)
        except ValueError:
            raise ConnectionResetError("closed in the middle of an answer") from None
        if not 0 <= size <= BODY_LIMIT:
            raise ConnectionError("a piece of the answer is too large")
        return size

    def _exactly(self, size: int) -> bytes:
        content: bytes = self._reader.read(size)
        if len(content) != size:
            raise ConnectionResetError("closed in the middle of an answer")
        return content


class _Lost:
    """Turn a connection that breaks during a request into NoDaemon, and drop the connection."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: "Any", error: "BaseException | None", _: object) -> None:
        if error is not None:
            self.client.close()
        if isinstance(error, TimeoutError):
            raise errors.NoDaemon("cannot talk to the daemon: it did not answer in time") from error
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise errors.NoDaemon(
                f"cannot talk to the daemon: {reason}", "see `sysctr daemon status`"
            ) from error


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _error(status: int, content: bytes, where: str) -> errors.SysctrError:
    try:
        return errors.from_dict(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return errors.SysctrError(f"cannot do {where}: the daemon answered {status}")


def _lines(pieces: "Iterator[bytes]") -> "Iterator[str]":
    pending = b""
    for piece in pieces:
        pending += piece
        *complete, pending = pending.split(b"\n")
        for line in complete:
            yield line.removesuffix(b"\r").decode("utf-8", "replace")


class Ticket:
    """A connection to the supervisor for one exec, console or files job, with the descriptors it gave."""

    def __init__(self, answer: "dict[str, str]", default_socket: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.fds: list[int] = []
        try:
            self._socket.connect(answer.get("socket") or default_socket)
            self.send({"ticket": answer["ticket"]})
            reply, self.fds = self._receive()
            if reply is None:
                raise errors.NoDaemon("cannot use the ticket: the supervisor closed the connection")
            if "error" in reply:
                raise errors.from_dict(reply["error"])
            self.names: list[str] = reply.get("fds", [])
            if len(self.names) != len(self.fds):
                raise errors.SysctrError(
                    f"cannot use the ticket: {len(self.names)} descriptors announced, {len(self.fds)} came"
                )
        except OSError as error:
            self.close()
            raise errors.NoDaemon(
                f"cannot reach the supervisor: {error.strerror or error}", "see `sysctr daemon status`"
            ) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the descriptor to poll for messages."""
        return self._socket.fileno()

    def take(self, name: str) -> int:
        """Hand over the descriptor of that name; the caller closes it."""
        index = self.names.index(name) if name in self.names else -1
        if index < 0 or self.fds[index] < 0:
            raise errors.SysctrError(f"cannot use the ticket: the supervisor gave no {name}")
        taken_fd, self.fds[index] = self.fds[index], -1
        return taken_fd

    def send(self, message: "dict[str, Any]") -> None:
        """Send one message; a supervisor that is gone shows in receive()."""
        try:
            self._socket.send(json.dumps(message).encode(), socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def receive(self) -> "dict[str, Any] | None":
        """Return the next message, or None at the end of the connection."""
        try:
            message, stray_fds = self._receive()
        except ConnectionResetError:
            return None
        for fd in stray_fds:
            os.close(fd)
        return message

    def _receive(self) -> "tuple[dict[str, Any] | None, list[int]]":
        # socket.recv_fds() loses its flags, and the descriptors would be inherited by $EDITOR or $PAGER.
        content, ancillary, _, _ = self._socket.recvmsg(
            LINE_LIMIT, socket.CMSG_SPACE(4 * 8), socket.MSG_CMSG_CLOEXEC
        )
        fds = []
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                for at in range(0, len(data) - len(data) % 4, 4):
                    fds.append(int.from_bytes(data[at : at + 4], sys.byteorder))
        return (json.loads(content) if content else None), fds

    def close(self) -> None:
        """Close the connection and every descriptor that nobody took."""
        self._socket.close()
        for fd in self.fds:
            if fd >= 0:
                os.close(fd)
        self.fds = []
