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
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    from sysctr.remote import RemoteTicket
    from sysctr.ticket import Ticket

REQUEST_TIMEOUT_S = 60.0
START_TIMEOUT_S = 30.0
HEADERS_LIMIT = 100
EVENTS_TIMEOUT_S = 50.0
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

    def __init__(self, where: "Layout | None" = None, *, start: bool = True, host: str = "") -> None:
        self.layout = where if where is not None else layout()
        self.start = start
        # A peer of this host, whose API is meant; empty for this host's own.
        self.host = host
        self._socket: socket.socket | None = None
        self._reader: Any = None
        self._hung_up = False

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

    def hang_up(self) -> None:
        """End the connection under another thread that waits for it, or is about to open it, for good."""
        import contextlib

        self._hung_up = True
        connection = self._socket
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

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
            content = self._whole(headers)
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
            content = self._whole(headers)
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
                raise _error(status, self._whole(answered), where)
        if headers is not None:
            headers.update(answered)
        try:
            with _Lost(self):
                yield from self._body(answered)
        finally:
            # What was not read would be taken for the next answer.
            self.close()

    def events(
        self, query: "Mapping[str, object] | None" = None, begun: "Callable[[], None] | None" = None
    ) -> "Iterator[tuple[str, Any]]":
        """Yield (kind, data) of every event from now on; `begun` is called when that is."""
        kind = "message"
        data: list[str] = []
        # A daemon that lives tells so every 15 s.
        for line in _lines(self.stream("/1/events", query, timeout_s=EVENTS_TIMEOUT_S)):
            if begun is not None:
                begun()
                begun = None
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

    def whole_path(self, name: str) -> str:
        """Return the path of a file of the host that is meant: its daemon has another current directory."""
        if self.host and not name.startswith("/"):
            raise errors.UsageError(f"cannot use {name}: {self.host} needs its whole path")
        return os.path.join(os.getcwd(), name)

    def open_exec(self, ref: str, request: "Mapping[str, Any]") -> "Ticket | RemoteTicket":
        """Run a program in a container; what is returned has its descriptors, and tells how it ends."""
        if not self.host:
            return self._redeem(path("containers", ref, "exec"), request)
        names = ("pty",) if request.get("tty") else ("stdin", "stdout", "stderr")
        return self._open_remote(path("containers", ref, "exec", "ws"), names, dict(request))

    def open_files(self, ref: str, request: "Mapping[str, Any]") -> "Ticket":
        """Push files into a container or pull them out of it; raises Refused for one of another host."""
        if self.host:
            raise errors.Refused(
                f"cannot copy files: {ref} is on {self.host}",
                "`sysctr --host … exec` with tar at both ends does it"
            )
        return self._redeem(path("containers", ref, "files"), request)

    def open_console(self, ref: str) -> "Ticket | RemoteTicket":
        """Attach to the console of a container."""
        if not self.host:
            return self._redeem(path("containers", ref, "console"))
        return self._open_remote(path("containers", ref, "console", "ws"), ("console",), None)

    def _redeem(self, where: str, request: "Mapping[str, Any] | None" = None) -> "Ticket":
        from sysctr.ticket import Ticket

        answer = self.post(where, request)
        # What comes of it may take hours.
        self.close()
        return Ticket(answer, self.layout.ticket_socket)

    def _open_remote(
        self, where: str, names: "tuple[str, ...]", request: "dict[str, Any] | None"
    ) -> "RemoteTicket":
        from base64 import b64encode

        from sysctr.remote import RemoteTicket

        # Of its own: it is not for requests any more.
        own = Client(self.layout, start=self.start, host=self.host)
        own.connect()
        key = b64encode(os.urandom(16)).decode()
        about = ["Connection: upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {key}"]
        with _Lost(own):
            own._ask("GET", where, about, b"", None, REQUEST_TIMEOUT_S)
            status, headers = own._head()
            content = b"" if status == 101 else own._whole(headers)
        if status != 101:
            own.close()
            raise _error(status, content, where)
        assert own._socket is not None
        own._socket.settimeout(None)
        return RemoteTicket(own._socket, own._reader, names, request)

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
        if self._hung_up:
            self.close()
            raise ConnectionResetError("nobody wants it any more")
        self._reader = connection.makefile("rb")
        if self.host:
            self._go_on_to(self.host)

    def _go_on_to(self, host: str) -> None:
        """Let the connection go on to the API of a peer; raises what speaks against it."""
        assert self._socket is not None
        where = path("peers", host, "api")
        head = [f"GET {where} HTTP/1.1", "Host: sysctr", "Connection: upgrade", "Upgrade: sysctr-api", "", ""]
        with _Lost(self):
            self._socket.settimeout(REQUEST_TIMEOUT_S)
            self._socket.sendall("\r\n".join(head).encode("ascii"), socket.MSG_NOSIGNAL)
            status, headers = self._head()
            if status == 101:
                return
            content = self._whole(headers)
        self.close()
        raise _error(status, content, where)

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
        headers: dict[str, str] = {}
        while line := self._line():
            if len(headers) >= HEADERS_LIMIT:
                raise ConnectionError("the answer has too many headers")
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
            told = headers["content-length"]
            left = int(told) if told.isdecimal() and len(told) < 20 else BODY_LIMIT + 1
            if left > BODY_LIMIT:
                raise ConnectionError("the answer is too large")
            if left:
                yield self._exactly(left)
        else:
            while piece := self._reader.read1(LINE_LIMIT):
                yield piece
            self.close()

    def _whole(self, headers: "dict[str, str]") -> bytes:
        """Return a body that is not to be larger than one that has its length before it."""
        pieces, size_bytes = [], 0
        for piece in self._body(headers):
            size_bytes += len(piece)
            if size_bytes > BODY_LIMIT:
                raise ConnectionError("the answer is too large")
            pieces.append(piece)
        return b"".join(pieces)

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
