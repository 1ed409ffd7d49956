"""An API with a stub engine on a real unix socket, and the clients that tests need."""

import asyncio
import contextlib
import http.client
import json
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

from sysctr.api import server
from sysctr.engine.events import Bus
from sysctr.engine.tasks import TaskRunner
from sysctr.paths import Layout
from sysctr.runtime import wire
from tests.unit.stub_engine import Engine


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("sysctr", timeout=20)
        self.path = path

    def connect(self) -> None:
        self.sock = wire.connect(self.path, 20, socket.SOCK_STREAM)


class Served:
    """An API with a stub engine, on a loop in a thread of its own."""

    def __init__(self, root: str) -> None:
        self.where = Layout(root)
        for path in (self.where.lib, self.where.run):
            os.makedirs(path)
        bus = Bus()
        self.engine = Engine(self.where, bus, TaskRunner(self.where, bus))
        self.loop = asyncio.new_event_loop()
        self.stop_asked = threading.Event()
        self.api = server.Api(self.engine, self.stop_asked.set)
        self.thread = threading.Thread(target=self._run)
        self.ready = threading.Event()
        self.thread.start()
        assert self.ready.wait(10)

    def _run(self) -> None:
        sock = wire.listen(self.where.api_socket, 0o660, kind=socket.SOCK_STREAM)
        sock.setblocking(False)
        self.loop.run_until_complete(self.api.listen(sock))
        self.ready.set()
        self.loop.run_forever()
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()

    def close(self) -> None:
        self.engine.close()
        asyncio.run_coroutine_threadsafe(self.api.close(2), self.loop).result(20)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(20)
        assert self.engine.tasks.close(0) == []

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = UnixConnection(self.where.api_socket)
        with contextlib.closing(connection):
            content = body if isinstance(body, bytes | None) else json.dumps(body)
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            answer = response.read()
        if "json" in (response.getheader("Content-Type") or ""):
            answer = json.loads(answer)
        return response.status, answer

    def error(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, str]:
        status, answer = self.request(method, path, body, **headers)
        assert set(answer) == {"error"}, answer
        assert set(answer["error"]) == {"code", "message", "hint"}
        return status, answer["error"]["code"], answer["error"]["message"]

    def raw(self, data: bytes) -> bytes:
        with wire.connect(self.where.api_socket, 20, socket.SOCK_STREAM) as sock:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(data)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while part := sock.recv(65536):
                    received += part
            return received

    @contextlib.contextmanager
    def stream(self, path: str) -> Iterator[http.client.HTTPResponse]:
        with contextlib.closing(UnixConnection(self.where.api_socket)) as connection:
            connection.request("GET", path)
            with connection.getresponse() as response:
                yield response
