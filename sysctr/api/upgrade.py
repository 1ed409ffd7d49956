"""A client's connection that goes on as one to the API of another host."""

import asyncio
import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any

from aiohttp import web

from sysctr.api.live import Waker
from sysctr.api.websocket import GONE_CHECK_S, hung_up
from sysctr.errors import Refused, SysctrError, UsageError

if TYPE_CHECKING:
    from sysctr.api.route import Call
    from sysctr.api.server import Api

PROTOCOL = "sysctr-api"


async def peer_api(api: "Api", request: web.BaseRequest, call: "Call") -> web.StreamResponse:
    """Let the client talk to the API of a peer, on this very connection, until one of both ends it."""
    if request.headers.get("Upgrade", "").lower() != PROTOCOL:
        raise UsageError(
            f"cannot open the API of {call.path['name']}: this is no request to upgrade",
            f"Upgrade: {PROTOCOL}",
        )
    management = api.engine.management
    connection: Any = request.protocol
    if asks := connection.of_peer:
        # What others allow this host they do not allow its peers.
        raise Refused(
            f"cannot open the API of {call.path['name']}: peer {asks} asks for it",
            "it has to be allowed to manage that host itself",
        )
    channel = await api.run_waiting(management.reach, call.path["name"])
    transport = request.transport
    if transport is None:
        channel.close()
        raise ConnectionResetError("the client is gone")
    # From here on the thread reads, and the client sends nothing before it has the answer.
    transport.pause_reading()
    response = web.StreamResponse(status=101, headers={"Upgrade": PROTOCOL, "Connection": "upgrade"})
    response.force_close()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        await response.prepare(request)
        fd = os.dup(transport.get_extra_info("socket").fileno())
    except BaseException:
        channel.close()
        raise

    def work() -> None:
        # Whoever reads sees the end of the connection; the loop may have ended before it.
        try:
            with contextlib.suppress(RuntimeError, SysctrError):
                management.exchange(channel, fd)
        finally:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(ended.set)

    try:
        threading.Thread(target=work, name="api of a peer", daemon=True).start()
    except RuntimeError:
        os.close(fd)
        channel.close()
        transport.abort()
        raise
    with Waker(api) as stop:
        waiting = {asyncio.ensure_future(ended.wait()), asyncio.ensure_future(stop.wait(None))}
        try:
            # Nothing is read here, so nothing else tells that the client has gone; a peer might never.
            done: set[asyncio.Future[Any]] = set()
            while not done and not (transport.is_closing() or hung_up(transport)):
                done, _ = await asyncio.wait(
                    waiting, timeout=GONE_CHECK_S, return_when=asyncio.FIRST_COMPLETED
                )
        finally:
            for one in waiting:
                one.cancel()
            channel.abort()
            transport.abort()
    return response
