"""Archives that go over the connection itself: a backup as the answer, a restore from the body."""

import asyncio
import contextlib
import fcntl
import os
import threading
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from aiohttp import web

from sysctr.api.archive_fields import STREAMED_BACKUP, STREAMED_RESTORE
from sysctr.api.fields import Object
from sysctr.engine.archive_source import PEEKED_BYTES
from sysctr.engine.tasks import Task
from sysctr.errors import SysctrError, UsageError, from_dict

if TYPE_CHECKING:
    from sysctr.api.route import Call
    from sysctr.api.server import Api

_PIECE_BYTES = 1 << 20


async def download(api: "Api", request: web.BaseRequest, call: "Call") -> web.StreamResponse:
    """Answer with an archive as it is written; a connection that breaks says that it is not whole."""
    spec = _request(api, call, STREAMED_BACKUP)
    read_fd, write_fd = _pipe()
    try:
        task = await api.run(api.engine.archive.stream, call.ref, spec, write_fd)
        # Before the first byte an error can still be told as one.
        piece = await api.run_waiting(os.read, read_fd, _PIECE_BYTES)
        if not piece:
            await api.run_waiting(task.wait)
            raise from_dict(task.error or {"message": f"cannot {task.doing}: it came to nothing"})
        # How long its reader takes is the reader's business.
        request.protocol.patient = True  # type: ignore[attr-defined]
        response = web.StreamResponse(
            headers={"Content-Type": "application/octet-stream", "Sysctr-Task": task.id}
        )
        await response.prepare(request)
        while piece:
            await response.write(piece)
            piece = await api.run_waiting(os.read, read_fd, _PIECE_BYTES)
        await api.run_waiting(task.wait)
        if task.state != "done" and request.transport is not None:
            request.transport.abort()
        return response
    finally:
        os.close(read_fd)


async def upload(api: "Api", request: web.BaseRequest, call: "Call") -> Any:
    """Restore the archive that the body is; answers with the task when all of it was taken."""
    spec = _request(api, call, STREAMED_RESTORE)
    pieces = request.content.iter_any()
    planned: asyncio.Future[Task] | None = None
    try:
        # No thread waits for a client: it gets one when there is so much that its head can be judged.
        head = bytearray()
        while len(head) < PEEKED_BYTES and (piece := await anext(pieces, b"")):
            head += piece
        whole = threading.Event()
        read_fd, write_fd = _pipe()
        os.set_blocking(write_fd, False)
        planned = asyncio.ensure_future(
            api.run_waiting(api.engine.archive.restore_stream, read_fd, spec, whole.is_set)
        )
        sent = asyncio.ensure_future(_send(write_fd, bytes(head), pieces, whole))
        try:
            await asyncio.wait({planned, sent}, return_when=asyncio.FIRST_COMPLETED)
            if planned.done() and planned.exception() is None:
                await _until_ended(planned.result(), sent)
            if sent.done():
                await sent
        finally:
            sent.cancel()
            await asyncio.wait({sent})
            os.close(write_fd)
            planned.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return await planned
    except web.RequestPayloadError as error:
        if planned is not None:
            # It has lost its sender and ends by itself. Whoever is answered must find nothing of it any more.
            with contextlib.suppress(SysctrError):
                await api.run_waiting((await planned).wait)
        raise UsageError(f"cannot read the request: its body is broken: {error}") from None


async def _until_ended(task: Task, sent: asyncio.Future[None]) -> None:
    """Wait until all of a body was sent, or its task has ended and wants no more of it."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def wake() -> None:
        loop.call_soon_threadsafe(ended.set)

    task.on_end(wake)
    waiting = asyncio.ensure_future(ended.wait())
    try:
        await asyncio.wait({sent, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        task.forget(wake)


async def _send(fd: int, head: bytes, pieces: AsyncIterator[bytes], whole: threading.Event) -> None:
    """Write a body to a pipe until nobody wants more of it: it was refused, or its task has failed."""
    with contextlib.suppress(BrokenPipeError):
        await _write(fd, head)
        async for piece in pieces:
            await _write(fd, piece)
        whole.set()


async def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            ready = asyncio.Event()
            asyncio.get_running_loop().add_writer(fd, ready.set)
            try:
                await ready.wait()
            finally:
                asyncio.get_running_loop().remove_writer(fd)


def _request(api: "Api", call: "Call", fields: Object) -> dict[str, Any]:
    """Return what the query asks for; the body, if there is one, is the archive."""
    given = fields.check(api.decode(call.query.get("request", "{}").encode()))
    return {name: value for name, value in given.items() if value is not None}


def _pipe() -> tuple[int, int]:
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    with contextlib.suppress(PermissionError):
        fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, _PIECE_BYTES)
    return read_fd, write_fd
