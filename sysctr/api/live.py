"""The routes that wait or stream: events, long polls, logs that are followed, and the daemon itself."""

import asyncio
import functools
import json
import os
import threading
from typing import TYPE_CHECKING, Any

from aiohttp import web

from sysctr import __version__
from sysctr.errors import SysctrError

if TYPE_CHECKING:
    from sysctr.api.route import Call
    from sysctr.api.server import Api

HEARTBEAT_S = 15.0
LONG_POLL_S = 60.0
WAIT_SLICE_S = 5.0
FOLLOW_S = 0.5
_OVERLAP_BYTES = 1024


class Waker:
    """Lets any thread wake one coroutine; also woken when the server stops."""

    def __init__(self, api: "Api") -> None:
        self._api = api
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def __enter__(self) -> "Waker":
        self._api.wakers.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._api.wakers.discard(self)

    def wake(self) -> None:
        """Wake the coroutine; from any thread, and without an error when its loop has ended."""
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:
            pass

    async def wait(self, timeout_s: float | None) -> bool:
        """Wait to be woken; False at the time-out. A server that stops wakes at once."""
        if self._api.stopping:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True


async def events(api: "Api", request: web.BaseRequest, call: "Call") -> web.StreamResponse:
    """Send what happens until the client goes, or reads too slowly."""
    with Waker(api) as waker, api.engine.bus.subscribe(waker.wake) as subscription:
        response = await _stream(request, "text/event-stream")
        await response.write(b": from now on\n\n")
        while not api.stopping:
            if not await waker.wait(HEARTBEAT_S):
                await response.write(b": still here\n\n")
                continue
            lines = [
                f"event: {event['kind']}\ndata: {json.dumps(event)}\n\n" for event in subscription.take()
            ]
            if lines:
                await response.write("".join(lines).encode())
            if subscription.closed:
                await response.write(b": dropped, because it was read too slowly\n\n")
                break
    return response


async def task_wait(api: "Api", request: web.BaseRequest, call: "Call") -> dict[str, Any]:
    """Answer with the task when it has ended, or as it is after the time-out."""
    task = api.engine.tasks.get(call.path["id"])
    with Waker(api) as waker:
        task.on_end(waker.wake)
        try:
            await waker.wait(call.query.get("timeout", LONG_POLL_S))
        finally:
            task.forget(waker.wake)
    return {"task": task.as_dict()}


async def task_cancel(api: "Api", request: web.BaseRequest, call: "Call") -> dict[str, Any]:
    """Ask a task to stop."""
    task = api.engine.tasks.get(call.path["id"])
    await api.run(task.cancel)
    return {"task": task.as_dict()}


async def container_wait(api: "Api", request: web.BaseRequest, call: "Call") -> dict[str, Any]:
    """Answer with the container when it has reached the state or ends, or as it is after the time-out.

    The engine waits in a thread of a pool of its own, a slice at a time: so more clients than threads take
    turns, and a client who hangs up costs a thread for one slice at most.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + call.query.get("timeout", LONG_POLL_S)
    ran = False
    while True:
        slice_s = max(0.0, min(WAIT_SLICE_S, deadline_s - loop.time()))
        wait = functools.partial(api.engine.wait, call.ref, call.query["state"], slice_s, ran=ran)
        answer = await api.run_waiting(wait)
        ran = answer["container"]["pid"] is not None
        if answer["reached"] or answer["ended"] or api.stopping or loop.time() >= deadline_s:
            return answer


async def logs(api: "Api", request: web.BaseRequest, call: "Call") -> Any:
    """Send a log; followed, go on with what is added to it."""
    kind = call.query.get("kind", "console")
    content = await api.run(api.engine.logs, call.ref, kind)
    if not call.query.get("follow"):
        return content
    with Waker(api) as waker:
        response = await _stream(request, "application/octet-stream")
        await response.write(content)
        while not api.stopping:
            await waker.wait(FOLLOW_S)
            before, content = content, await api.run(api.engine.logs, call.ref, kind)
            added = _added(before, content)
            if added:
                await response.write(added)
    return response


def _added(before: bytes, now: bytes) -> bytes:
    """Return what a log that drops its beginning has got since.

    >>> _added(b"abc", b"abcd"), _added(b"abcdef", b"efgh"), _added(b"abc", b"xyz"), _added(b"ab", b"ab")
    (b'd', b'gh', b'xyz', b'')
    """
    if now.startswith(before):
        return now[len(before) :]
    for size in (_OVERLAP_BYTES, 64, 8, 2):
        overlap = before[-size:]
        at = now.rfind(overlap)
        if at >= 0:
            return now[at + len(overlap) :]
    return now


async def host(api: "Api", request: web.BaseRequest, call: "Call") -> dict[str, Any]:
    """Answer with the host and the version that runs on it."""
    return {"host": {"version": __version__, **await api.run(api.engine.host)}}


async def daemon_status(api: "Api", request: web.BaseRequest, call: "Call") -> dict[str, Any]:
    """Answer also where there is no supervisor: this is what one asks when something is wrong."""
    try:
        supervisor = await api.run(api.engine.supervisor)
    except SysctrError:
        supervisor = None
    return {
        "daemon": {
            "version": __version__,
            "pid": os.getpid(),
            "started": api.started,
            "threads": threading.active_count(),
            "connections": api.connections,
            "supervisor": supervisor,
        }
    }


async def daemon_stop(api: "Api", request: web.BaseRequest, call: "Call") -> dict[str, Any]:
    """End the daemon after this answer."""
    asyncio.get_running_loop().call_soon(api.stop)
    return {}


async def _stream(request: web.BaseRequest, media: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": media, "Cache-Control": "no-store"})
    await response.prepare(request)
    return response
