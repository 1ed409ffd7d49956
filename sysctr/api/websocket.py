"""exec and console over a websocket: bytes between it and the descriptors that the supervisor gave.

The daemon takes a ticket to the supervisor like any local client. A binary frame is one byte for the stream
(0 stdin, 1 stdout, 2 stderr; a pty and a console have 0 and 1) and data; stream 0 without data is the end of
stdin. Text frames are JSON: the exec request first, then {"resize": [rows, columns]} and {"signal": n}
inwards; {"notice": …}, {"error": …} and at last {"exit": n} outwards. A side that does not read stops the
other: nothing is kept here but what one read() returned.
"""

import asyncio
import contextlib
import json
import os
import select
import socket
from typing import TYPE_CHECKING, Any

from aiohttp import WSMsgType, web

from sysctr.api.fields import Array, Boolean, Field, Nullable, Number, Object, Table, Text
from sysctr.api.live import Waker
from sysctr.errors import NoDaemon, SysctrError, UsageError, from_dict
from sysctr.runtime import wire

if TYPE_CHECKING:
    from sysctr.api.route import Call
    from sysctr.api.server import Api

READ_BYTES = 32 << 10
FRAME_LIMIT_BYTES = 1 << 20
TICKET_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 30.0
GONE_CHECK_S = 5.0

_SIZE = Number(0, 65535)
EXEC_REQUEST = Object(
    (
        Field("argv", Array(Text(128 << 10, raw=True), 4096), "the program and its arguments", required=True),
        Field("environment", Table(Text(128 << 10, raw=True)), "environment variables"),
        Field("cwd", Nullable(Text(4096, raw=True)), "directory inside"),
        Field("user", Nullable(Text(256)), "user inside, by name or number (root)"),
        Field(
            "tty",
            Nullable(Object((Field("rows", _SIZE, "rows"), Field("cols", _SIZE, "columns")))),
            "a terminal of this size",
        ),
        Field("login", Boolean(), "the user's login shell; argv may be empty"),
    )
)
_MESSAGE = Object(
    (
        Field("resize", Array(_SIZE, 2, 2), "rows and columns"),
        Field("signal", Number(1, 64), "number of a signal"),
    )
)


async def exec_in(api: "Api", request: web.BaseRequest, call: "Call") -> web.StreamResponse:
    """Run the program that the first message asks for."""
    await api.run(api.engine.info, call.ref)  # a 404 is better than an upgrade and an error in it
    response = await _upgrade(request)
    with _told(response) as told:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            message = await response.receive()
        if message.type is not WSMsgType.TEXT:
            raise UsageError("cannot exec: the first message must be the request, as text")
        wanted = EXEC_REQUEST.check(api.decode(message.data.encode("utf-8", "surrogatepass")))
        ticket = await api.run(api.engine.exec_ticket, call.ref, wanted)
        with Waker(api) as stop:
            await _Session(request, response, *await _redeemed(api, ticket)).run(stop)
    await _close(response, told)
    return response


async def console(api: "Api", request: web.BaseRequest, call: "Call") -> web.StreamResponse:
    """Attach to the console."""
    ticket = await api.run(api.engine.console_ticket, call.ref)
    response = await _upgrade(request)
    with _told(response) as told, Waker(api) as stop:
        await _Session(request, response, *await _redeemed(api, ticket)).run(stop)
    await _close(response, told)
    return response


async def _upgrade(request: web.BaseRequest) -> web.WebSocketResponse:
    # No heartbeat: a session that waits for a stopped reader would be taken for a dead one.
    response = web.WebSocketResponse(max_msg_size=FRAME_LIMIT_BYTES, compress=False)
    if not response.can_prepare(request):
        raise UsageError("cannot open a websocket: this is not a websocket's request")
    await response.prepare(request)
    connection: Any = request.protocol
    connection.patient = True
    return response


class _told:
    """Keep the error that ends a session, to be sent as the last message."""

    def __init__(self, response: web.WebSocketResponse) -> None:
        self.error: SysctrError | None = None

    def __enter__(self) -> "_told":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> bool:
        if isinstance(error, TimeoutError):
            self.error = UsageError("cannot exec: the request did not come in time")
        elif isinstance(error, SysctrError):
            self.error = error
        elif isinstance(error, ConnectionError):
            return True
        return self.error is not None


async def _close(response: web.WebSocketResponse, told: _told) -> None:
    with contextlib.suppress(ConnectionError, RuntimeError):
        if told.error is not None:
            await response.send_str(json.dumps({"error": told.error.as_dict()}))
        await response.close(message=b"error" if told.error else b"ended")


async def _redeemed(api: "Api", ticket: dict[str, str]) -> tuple[socket.socket, list[str], list[int]]:
    """Redeem a ticket in a thread; for a client who goes meanwhile, what it gave is let go of."""
    redeeming = asyncio.ensure_future(api.run(_redeem, ticket))
    try:
        return await asyncio.shield(redeeming)
    except asyncio.CancelledError:
        redeeming.add_done_callback(_let_go)
        raise


def _let_go(redeeming: "asyncio.Future[tuple[socket.socket, list[str], list[int]]]") -> None:
    if not redeeming.cancelled() and redeeming.exception() is None:
        connection, _, fds = redeeming.result()
        wire.close_all(fds)
        connection.close()


def _redeem(ticket: dict[str, str]) -> tuple[socket.socket, list[str], list[int]]:
    try:
        connection = wire.connect(ticket["socket"], TICKET_TIMEOUT_S)
    except OSError as error:
        raise NoDaemon(f"cannot reach the supervisor: {error.strerror or error}") from error
    try:
        wire.send(connection, {"ticket": ticket["ticket"]})
        reply, fds = wire.receive(connection)
    except (wire.WireError, TimeoutError) as error:
        connection.close()
        raise NoDaemon(f"cannot use the ticket: {error}") from error
    names = reply.get("fds", [])
    if "error" in reply or len(names) != len(fds):
        wire.close_all(fds)
        connection.close()
        raise from_dict(reply.get("error") or {"message": "cannot use the ticket: descriptors are missing"})
    connection.setblocking(False)
    for fd in fds:
        os.set_blocking(fd, False)
    return connection, names, fds


class _Session:
    """One program or console: a task for each stream, the control connection, and the websocket."""

    def __init__(
        self,
        request: web.BaseRequest,
        response: web.WebSocketResponse,
        connection: socket.socket,
        names: list[str],
        fds: list[int],
    ) -> None:
        self._client = request.transport
        self._response = response
        self._connection = connection
        self._fds = set(fds)
        by_name = dict(zip(names, fds, strict=True))
        self._end: dict[str, Any] = {}
        self._outputs: dict[int, int] = {}
        self._stdin_fd: int | None = None
        if "stdin" in by_name or "stdout" in by_name:
            self._stdin_fd = by_name.get("stdin")
            self._outputs = {
                number: by_name[name] for number, name in ((1, "stdout"), (2, "stderr")) if name in by_name
            }
        elif fds:
            # A pty or the stream of a console goes both ways.
            self._stdin_fd = fds[0]
            self._outputs = {1: fds[0]}

    async def run(self, stop: Waker) -> None:
        """Pump until the program has ended and its output is sent, the client goes, or the daemon stops."""
        pumps = [asyncio.create_task(self._pump_out(number, fd)) for number, fd in self._outputs.items()]
        control = asyncio.create_task(self._control())
        inward = asyncio.create_task(self._pump_in())
        stopping = asyncio.create_task(stop.wait(None))
        try:
            await asyncio.wait([control, inward, stopping], return_when=asyncio.FIRST_COMPLETED)
            if control.done() and not inward.done():
                await control
                # What the program wrote is in the pipes by now. A child that it left behind may hold them
                # open for ever, so they are emptied, not read to their end.
                await self._finish(pumps)
                await self._response.send_str(json.dumps(self._end))
            elif inward.done():
                await inward
            else:
                raise NoDaemon("the daemon is being stopped", "try again in a moment")
        finally:
            tasks = [*pumps, control, inward, stopping]
            for task in tasks:
                task.cancel()
            try:
                await asyncio.gather(*tasks, return_exceptions=True)
            finally:
                # Also where this is cancelled a second time: the client goes, and then the daemon is stopped.
                wire.close_all([*self._fds])
                self._connection.close()

    async def _finish(self, pumps: list[asyncio.Task]) -> None:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for number, fd in self._outputs.items():
            with contextlib.suppress(BlockingIOError):
                while data := _read(fd):
                    await self._response.send_bytes(bytes([number]) + data)

    async def _pump_out(self, number: int, fd: int) -> None:
        while True:
            await _ready(fd, writing=False)
            # Between the read and the end of send_bytes() this may be cancelled at the send's first await
            # only, when the frame is in the transport already.
            try:
                data = _read(fd)
            except BlockingIOError:
                continue
            if not data:
                return
            await self._response.send_bytes(bytes([number]) + data)

    async def _control(self) -> None:
        while True:
            await _ready(self._connection.fileno(), writing=False)
            try:
                message = wire.receive_plain(self._connection)
            except BlockingIOError:
                continue
            except wire.ConnectionClosed:
                # A console has no exit: its container stopped. For a program the supervisor is gone.
                self._end = {"exit": None}
                return
            except wire.WireError as error:
                raise NoDaemon(f"cannot read from the supervisor: {error}") from error
            if "exit" in message or "error" in message:
                self._end = message
                return
            await self._response.send_str(json.dumps(message))

    async def _pump_in(self) -> None:
        async for message in self._response:
            if message.type is WSMsgType.BINARY:
                if message.data[:1] != b"\0":
                    raise UsageError("cannot read the frame: only stream 0 can be written")
                await self._write(message.data[1:])
            elif message.type is WSMsgType.TEXT:
                await self._pass_on(message.data)

    async def _pass_on(self, text: str) -> None:
        try:
            wanted = json.loads(text)
        except (ValueError, RecursionError):
            raise UsageError("cannot read the message: it is not JSON") from None
        try:
            wire.send(self._connection, _MESSAGE.check(wanted))
        except (BlockingIOError, wire.WireError):
            pass  # the size of a window is not worth waiting for

    async def _write(self, data: bytes) -> None:
        fd = self._stdin_fd
        if fd is None:
            return
        if not data:
            self._stdin_fd = None
            if fd not in self._outputs.values():
                self._fds.discard(fd)
                os.close(fd)
            return
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:
                await self._writable(fd)
            except OSError:
                # The program closed its stdin or ended; what is sent to it is lost, as in a pipe of a shell.
                self._stdin_fd = None
                return

    async def _writable(self, fd: int) -> None:
        while True:
            try:
                async with asyncio.timeout(GONE_CHECK_S):
                    await _ready(fd, writing=True)
                return
            except TimeoutError:
                # While nothing is read from the client, its end is not noticed either.
                if self._client is None or self._client.is_closing() or hung_up(self._client):
                    raise ConnectionResetError from None


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, READ_BYTES)
    except BlockingIOError:
        raise
    except OSError:
        return b""  # EIO is how a pty says that nobody has its other side open


def hung_up(transport: asyncio.BaseTransport) -> bool:
    """Tell whether the other end of a connection that is not read is gone."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))


async def _ready(fd: int, *, writing: bool) -> None:
    """Wait until a descriptor can be read or written."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    add, remove = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
    add(fd, wake)
    try:
        await ready
    finally:
        remove(fd)
