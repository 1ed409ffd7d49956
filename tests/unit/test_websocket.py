"""exec and console by websocket: every byte in order, back-pressure both ways, and an end in every case."""

import asyncio
import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sysctr.api import websocket
from sysctr.runtime import wire
from tests.unit.served import Served
from tests.unit.stub_engine import Supervisor
from tests.wait import wait_until


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(str(tmp_path))
    yield served
    served.close()


async def _websocket(served: Served, path: str, steps: Any) -> None:
    connector = aiohttp.UnixConnector(served.where.api_socket)
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        asyncio.timeout(20),
        session.ws_connect(f"http://sysctr{path}") as ws,
    ):
        await steps(ws)


def test_exec_by_websocket_carries_every_byte_and_the_exit_code(served: Served) -> None:
    supervisor = Supervisor(served.where)
    data = os.urandom(300_000)

    def program() -> bytes:
        ends = supervisor.serve("exec")
        with os.fdopen(os.dup(ends["stdin"]), "rb") as stdin:
            got = stdin.read()
        resize = wire.receive_plain(supervisor.connection)
        os.write(ends["stderr"], b"warning\n")
        for at in range(0, len(got), 4096):
            os.write(ends["stdout"], got[at : at + 4096])
        wire.send(supervisor.connection, {"exit": 3})
        return json.dumps(resize).encode()

    async def steps(ws: aiohttp.ClientWebSocketResponse) -> None:
        await ws.send_str(json.dumps({"argv": ["cat"], "user": None, "tty": None}))
        for at in range(0, len(data), 50_000):
            await ws.send_bytes(b"\0" + data[at : at + 50_000])
        await ws.send_bytes(b"\0")
        await ws.send_str('{"resize": [24, 80]}')
        streams = {1: b"", 2: b""}
        async for message in ws:
            if message.type is aiohttp.WSMsgType.TEXT:
                assert json.loads(message.data) == {"exit": 3}
            else:
                streams[message.data[0]] += message.data[1:]
        assert streams == {1: data, 2: b"warning\n"}

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(program)
        asyncio.run(_websocket(served, "/1/containers/web/exec/ws", steps))
        assert json.loads(running.result(10)) == {"resize": [24, 80]}
    assert served.engine.calls[-1] == ("exec", "web", {"argv": ["cat"], "user": None, "tty": None})
    supervisor.close()


def test_the_output_of_a_program_that_left_a_child_behind_is_whole_and_the_session_ends(
    served: Served,
) -> None:
    supervisor = Supervisor(served.where)

    def program() -> None:
        ends = supervisor.serve("exec")
        os.write(ends["stdout"], b"x" * 60_000)
        wire.send(supervisor.connection, {"exit": 0})  # and stdout stays open

    async def steps(ws: aiohttp.ClientWebSocketResponse) -> None:
        await ws.send_str('{"argv": ["daemon"]}')
        received = [message async for message in ws]
        assert json.loads(received[-1].data) == {"exit": 0}
        assert sum(len(message.data) - 1 for message in received[:-1]) == 60_000

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(program)
        asyncio.run(_websocket(served, "/1/containers/web/exec/ws", steps))
        running.result(10)
    supervisor.close()


def test_a_client_that_does_not_read_stops_the_program_and_nothing_is_kept(served: Served) -> None:
    supervisor = Supervisor(served.where)
    written = []

    def program() -> None:
        ends = supervisor.serve("exec")
        os.set_blocking(ends["stdout"], False)
        stalled_since = time.monotonic()
        while time.monotonic() - stalled_since < 0.5:
            try:
                written.append(os.write(ends["stdout"], b"x" * 65536))
                stalled_since = time.monotonic()
            except BlockingIOError:
                threading.Event().wait(0.005)

    async def steps(ws: aiohttp.ClientWebSocketResponse) -> None:
        await ws.send_str('{"argv": ["yes"]}')
        await asyncio.get_running_loop().run_in_executor(None, program)

    asyncio.run(_websocket(served, "/1/containers/web/exec/ws", steps))
    assert 0 < sum(written) < 4 << 20
    # The client is gone: so is our side of the program's connection, which hangs up on it.
    with pytest.raises(wire.ConnectionClosed):
        wire.receive_plain(supervisor.connection)
    supervisor.close()


def test_a_client_that_goes_while_its_program_does_not_read_is_noticed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket, "GONE_CHECK_S", 0.05)
    supervisor = Supervisor(served.where)

    async def steps(ws: aiohttp.ClientWebSocketResponse) -> None:
        await ws.send_str('{"argv": ["sleep"]}')
        await asyncio.get_running_loop().run_in_executor(None, supervisor.serve, "exec")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                while True:
                    await ws.send_bytes(b"\0" + b"x" * 65536)
        ws._response.connection.transport.abort()

    asyncio.run(_websocket(served, "/1/containers/web/exec/ws", steps))
    with pytest.raises(wire.ConnectionClosed):
        wire.receive_plain(supervisor.connection)
    supervisor.close()


@pytest.mark.parametrize(
    ("first", "code"),
    [("[]", "usage"), ("{}", "usage"), ("\ud800", "usage"), ('{"argv": ["x"], "uid": 0}', "usage"),
     ('{"argv": ["x"]}', "not-found"), (b"x", "usage")],
)  # fmt: skip
def test_an_exec_that_cannot_be_ends_with_an_error(served: Served, first: Any, code: str) -> None:
    supervisor = Supervisor(served.where)

    async def steps(ws: aiohttp.ClientWebSocketResponse) -> None:
        if first == "\ud800":
            await ws.send_frame(b"\xed\xa0\x80{", aiohttp.WSMsgType.TEXT)
            async for message in ws:
                assert "exit" not in message.data
            return
        await (ws.send_bytes(first) if isinstance(first, bytes) else ws.send_str(first))
        (message,) = [message async for message in ws]
        assert json.loads(message.data)["error"]["code"] == code

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(supervisor.serve, "refuse") if code == "not-found" else None
        asyncio.run(_websocket(served, "/1/containers/web/exec/ws", steps))
        if running:
            running.result(10)
    supervisor.close()


def test_the_console_by_websocket_goes_both_ways_and_ends_with_the_container(served: Served) -> None:
    supervisor = Supervisor(served.where)

    async def steps(ws: aiohttp.ClientWebSocketResponse) -> None:
        ends = await serving
        wire.send(supervisor.connection, {"notice": "another client is attached"})
        assert json.loads((await ws.receive()).data) == {"notice": "another client is attached"}
        os.write(ends["stream"], b"login: ")
        assert (await ws.receive()).data == b"\x01login: "
        await ws.send_bytes(b"\0root\r")
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(None, os.read, ends["stream"], 100) == b"root\r"
        os.write(ends["stream"], b"bye")
        supervisor.connection.close()
        left = [message async for message in ws]
        assert [left[0].data, json.loads(left[-1].data)] == [b"\x01bye", {"exit": None}]

    async def run() -> None:
        nonlocal serving
        serving = asyncio.get_running_loop().run_in_executor(None, supervisor.serve, "console")
        await _websocket(served, "/1/containers/web/console/ws", steps)

    serving: Any = None
    asyncio.run(run())
    supervisor.close()


def test_closing_ends_streams_and_polls_and_lets_requests_finish(tmp_path: Path) -> None:
    served = Served(str(tmp_path))
    supervisor = Supervisor(served.where)
    server_grace_s = 2

    async def last_message(ws: aiohttp.ClientWebSocketResponse) -> None:
        (message,) = [message async for message in ws]
        assert json.loads(message.data)["error"]["code"] == "no-daemon"

    with served.stream("/1/events") as events, ThreadPoolExecutor(2) as pool:
        events.readline()
        task = served.request("POST", "/1/containers/held/start")[1]["task"]
        polling = pool.submit(served.request, "GET", f"/1/tasks/{task['id']}/wait?timeout=600")
        console = pool.submit(asyncio.run, _websocket(served, "/1/containers/web/console/ws", last_message))
        supervisor.serve("console")
        wait_until(lambda: len(served.api.wakers) == 3)
        started = time.monotonic()
        served.close()
        console.result(10)
        assert polling.result(10)[0] == 200
        assert events.read().endswith(b"\n\n"), "the stream ends between two events"
    assert time.monotonic() - started < server_grace_s, "it must not wait for the grace of requests"
    supervisor.close()
