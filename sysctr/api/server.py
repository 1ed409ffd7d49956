"""The HTTP server: finds the route, checks the request, calls the engine in a thread, and tells errors.

It stands on aiohttp's low-level server; a table with checked fields leaves nothing for aiohttp's application
and router to do, and here every answer, an error too, is JSON of one shape.
"""

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

from aiohttp import web

from sysctr.api.fields import check_query
from sysctr.api.live import Waker
from sysctr.api.route import Call, Route, find, tree
from sysctr.api.routes import ROUTES
from sysctr.engine.peer_manage import caller
from sysctr.engine.tasks import Task, as_error
from sysctr.errors import NoDaemon, NotFound, Refused, SysctrError, UsageError
from sysctr.runtime import wire

log = logging.getLogger(__name__)

BODY_LIMIT_BYTES = 1 << 20
HEADER_TIMEOUT_S = 15.0
BODY_TIMEOUT_S = 30.0
WRITE_TIMEOUT_S = 30.0
KEEPALIVE_S = 75.0
CONNECTIONS_LIMIT = 1000
THREADS = 16
WAITING_THREADS = 32


class TooLarge(UsageError):
    """The body is larger than any request can be."""

    http_status = 413


class TooSlow(UsageError):
    """The body did not come in time."""

    http_status = 408


class WrongMethod(UsageError):
    """The path exists, and not with this method."""

    http_status = 405


class Connection(web.RequestHandler):
    """One client: who it is, and how long it may keep us waiting."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.peer = (-1, -1, -1)
        # The host that this process itself opened the connection for.
        self.of_peer = ""
        # A websocket may stop reading for as long as it likes: that is a terminal with ctrl-S pressed.
        self.patient = False
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note who connects; wait for the first request for a limited time."""
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        self.peer = wire.peer_credentials(transport.get_extra_info("socket"))
        self.of_peer = caller(self.peer[0], transport.get_extra_info("peername"))
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(HEADER_TIMEOUT_S, transport.abort)
        if self._manager is not None and len(self._manager.connections) > CONNECTIONS_LIMIT:
            log.warning("dropped a connection of uid %d: there are %d", self.peer[1], CONNECTIONS_LIMIT)
            transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the deadlines."""
        self.heard()
        self._stop_write_deadline()
        super().connection_lost(exc)

    def heard(self) -> None:
        """The first request has come; from now on the time-out of an idle connection holds."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def pause_writing(self) -> None:
        """The client does not read: it gets a while, then its connection is dropped."""
        super().pause_writing()
        if not self.patient and self.transport is not None:
            loop = asyncio.get_running_loop()
            self._write_deadline = loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        self._stop_write_deadline()
        super().resume_writing()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is not HTTP, in the same shape as every other error, and without a traceback."""
        log.info("pid %d sent what is not HTTP: %s", self.peer[0], str(message)[:200])
        if request.writer.output_size > 0:
            raise ConnectionError("an answer was begun already")
        text = (message or "it cannot be understood").strip().splitlines()[0][:200]
        response = _error(UsageError(f"cannot read the request: {text}"), status)
        response.force_close()
        return response

    def _stop_write_deadline(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return Connection(self, loop=asyncio.get_running_loop(), **self._kwargs)


class Api:
    """The API of one engine on one listening socket."""

    def __init__(self, engine: Any, stop: Callable[[], None]) -> None:
        self.engine = engine
        self.stop = stop
        self.started = time.time()
        self.stopping = False
        self.wakers: set[Waker] = set()
        self._tree = tree(ROUTES)
        self._pool = ThreadPoolExecutor(THREADS, "api")
        self._waiting = ThreadPoolExecutor(WAITING_THREADS, "wait")
        self._decode = json.JSONDecoder(parse_constant=_no_constant).decode
        self._server: _Server | None = None
        self._listening: asyncio.Server | None = None

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._server.connections) if self._server else 0

    async def listen(self, sock: socket.socket) -> None:
        """Begin to answer on a listening socket."""
        self._server = _Server(
            self.handle,
            # A client who hangs up ends its long poll or stream; work in threads goes on to its end.
            handler_cancellation=True,
            keepalive_timeout=KEEPALIVE_S,
            access_log=None,
            auto_decompress=False,
            lingering_time=2.0,
            tcp_keepalive=False,
        )
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_unix_server(self._server, sock=sock)

    async def close(self, grace_s: float) -> None:
        """Listen no more, end what waits, let requests finish, and drop what does not."""
        self.stopping = True
        for waker in tuple(self.wakers):
            waker.wake()
        if self._listening:
            self._listening.close()
        if self._server:
            # A connection that was accepted in this very turn of the loop begins to wait for its request in
            # the next ones; pre_shutdown() ends only what waits already.
            for _ in range(3):
                await asyncio.sleep(0)
            self._server.pre_shutdown()
            await self._server.shutdown(grace_s)
        for pool in (self._pool, self._waiting):
            pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of the engine in a worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def run_waiting(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that mostly waits; such calls must not keep others from a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._waiting, function, *arguments)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        connection: Any = request.protocol
        connection.heard()
        response = None
        # The path alone: a query could hold anything, a body passwords.
        shown = f"{request.method} {request.raw_path.partition('?')[0][:200]}"
        try:
            response = await self._answer(request, shown)
        finally:
            # A GET that is upgraded runs programs, has a console, or is root on another host.
            if request.method != "GET" or "Upgrade" in request.headers:
                status = response.status if response is not None else "hung up"
                log.info("%s by %s: %s", shown, self._who(connection), status)
        return response

    def _who(self, connection: Any) -> str:
        pid, uid, _ = connection.peer
        return f"peer {connection.of_peer}" if connection.of_peer else f"uid {uid}, pid {pid}"

    def decode(self, body: bytes) -> Any:
        """Read JSON, strictly."""
        try:
            return self._decode(body.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise UsageError(f"cannot read the request: the body is not JSON: {reason[:200]}") from None

    async def _answer(self, request: web.BaseRequest, shown: str) -> web.StreamResponse:
        try:
            route, call = await self._read(request)
            if self.stopping:
                raise NoDaemon("cannot answer: the daemon is being stopped", "try again in a moment")
            if route.waits:
                result = await route.action(self, request, call)
            else:
                result = await self.run(route.action, self.engine, call)
            return result if isinstance(result, web.StreamResponse) else _response(result)
        except WrongMethod as error:
            response = _error(error)
            response.headers["Allow"] = error.hint
            return response
        except SysctrError as error:
            return _error(error)
        except ConnectionError:
            raise
        except Exception as error:
            known = as_error(error, f"answer {shown}")
            number = os.urandom(4).hex()
            log.exception("error %s: %s", number, shown)
            if known is None:
                known = SysctrError(
                    f"cannot answer {shown}: an internal error", f"the log has it as error {number}"
                )
                known.code = "bug"
            return _error(known)

    async def _read(self, request: web.BaseRequest) -> tuple[Route, Call]:
        if "Origin" in request.headers:
            # Only a browser sends it, and a page that reaches this socket by some proxy is not its user.
            raise Refused("cannot answer: the request comes from a web page")
        path, _, query = request.raw_path.partition("?")
        segments = [_unquoted(segment) for segment in path.split("/")[1:]]
        methods, variables = find(self._tree, segments) if path.startswith("/") else ({}, {})
        if not methods:
            raise NotFound("cannot answer: there is no such path", "GET /1/openapi.json shows all paths")
        route = methods.get(request.method)
        if route is None:
            raise WrongMethod("cannot answer: this path has other methods", ", ".join(sorted(methods)))
        parameters = check_query(route.query, _parameters(query))
        body = {} if route.streams else await self._body(request)
        return route, Call(variables, parameters, route.fields.check(body))

    async def _body(self, request: web.BaseRequest) -> Any:
        if not request.body_exists:
            return {}
        if "Content-Encoding" in request.headers:
            raise UsageError("cannot read the request: its body is compressed")
        if (request.content_length or 0) > BODY_LIMIT_BYTES:
            raise TooLarge(f"cannot read the request: its body is larger than {BODY_LIMIT_BYTES} bytes")
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in request.content.iter_any():
                    body += chunk
                    if len(body) > BODY_LIMIT_BYTES:
                        raise TooLarge(
                            f"cannot read the request: its body is larger than {BODY_LIMIT_BYTES} bytes"
                        )
        except TimeoutError:
            raise TooSlow(f"cannot read the request: its body took more than {BODY_TIMEOUT_S:g} s") from None
        except web.RequestPayloadError as error:
            raise UsageError(f"cannot read the request: its body is broken: {error}") from None
        return self.decode(bytes(body)) if body.strip() else {}


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _unquoted(segment: str) -> str:
    text = unquote_to_bytes(segment).decode("utf-8", "backslashreplace") if "%" in segment else segment
    if len(text) > 256 or not text.isprintable():
        raise NotFound(f"cannot find {text[:64]!a}: there is nothing of this name")
    return text


def _parameters(query: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=32)
    except ValueError as error:
        raise UsageError(f"cannot read the request: the query is malformed: {str(error)[:100]}") from None
    parameters = dict(pairs)
    if len(parameters) != len(pairs):
        raise UsageError("cannot read the request: a parameter is there twice")
    return parameters


def _response(result: Any) -> web.Response:
    if isinstance(result, Task):
        return _json({"task": result.as_dict()}, 202)
    if isinstance(result, bytes):
        return web.Response(body=result, content_type="application/octet-stream")
    return _json({} if result is None else result, 200)


def _error(error: SysctrError, status: int | None = None) -> web.Response:
    return _json({"error": error.as_dict()}, status or error.http_status)


def _json(value: Any, status: int) -> web.Response:
    return web.Response(body=json.dumps(value).encode(), status=status, content_type="application/json")
