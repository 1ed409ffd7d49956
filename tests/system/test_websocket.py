"""exec and console over the API's websockets, against real containers."""

import asyncio
import json

import aiohttp
import pytest

DEADLINE_S = 30


@pytest.fixture(scope="module")
def container(shared_host):
    shared_host.run("create", "ws", "--template", "tiny", "--start")
    return shared_host


def talk(host, path, conversation):
    """Run `await conversation(websocket)` on a websocket of the API and return what it returns."""

    async def run():
        connector = aiohttp.UnixConnector(host.layout.api_socket)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.ws_connect(f"http://localhost{path}", timeout=aiohttp.ClientWSTimeout(DEADLINE_S)) as ws,
        ):
            return await asyncio.wait_for(conversation(ws), DEADLINE_S)

    return asyncio.run(run())


async def collect(ws):
    """Return what came on each stream, and the exit status."""
    streams = {1: b"", 2: b""}
    async for message in ws:
        if message.type is aiohttp.WSMsgType.BINARY:
            streams[message.data[0]] += message.data[1:]
        elif message.type is aiohttp.WSMsgType.TEXT:
            said = json.loads(message.data)
            if "exit" in said:
                return streams[1], streams[2], said["exit"]
    raise AssertionError(f"no exit status came, only {streams}")


def test_exec_passes_streams_and_the_exit_status(container):
    async def conversation(ws):
        await ws.send_str(json.dumps({"argv": ["sh", "-c", "cat; echo wrong >&2; exit 7"]}))
        await ws.send_bytes(b"\0" + bytes(range(256)) * 100)
        await ws.send_bytes(b"\0")
        return await collect(ws)

    out, err, status = talk(container, "/1/containers/ws/exec/ws", conversation)
    assert (out, err, status) == (bytes(range(256)) * 100, b"wrong\n", 7)


def test_a_program_that_does_not_exist_is_127(container):
    async def conversation(ws):
        await ws.send_str(json.dumps({"argv": ["no-such-program"]}))
        return await collect(ws)

    assert talk(container, "/1/containers/ws/exec/ws", conversation)[2] == 127


def test_the_console_shows_its_ring_and_takes_input(container):
    async def conversation(ws):
        await ws.send_bytes(b"\0echo to-$((40+2))\n")
        seen = b""
        async for message in ws:
            if message.type is aiohttp.WSMsgType.BINARY:
                seen += message.data[1:]
                if b"to-42" in seen:
                    return seen
        raise AssertionError(f"the console closed after {seen!r}")

    assert b"BusyBox" in talk(container, "/1/containers/ws/console/ws", conversation)
