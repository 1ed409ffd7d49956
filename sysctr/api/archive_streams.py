"""Archives that go over the connection itself: a backup as the answer, a restore from the body."""

import asyncio
import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, Any

from aiohttp import web

from sysctr.api.archive_fields import STREAMED_BACKUP, STREAMED_RESTORE
from sysctr.api.fields import Object
from sysctr.errors import from_dict
from sysctr.linux.files import write_all

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
    read_fd, write_fd = _pipe()
    planned = asyncio.ensure_future(api.run_waiting(api.engine.archive.restore_stream, read_fd, spec))
    try:
        # An archive that is refused, or a task that fails, reads no further.
        with contextlib.suppress(BrokenPipeError):
            async for chunk in request.content.iter_any():
                await api.run_waiting(write_all, write_fd, chunk)
    finally:
        os.close(write_fd)
    return await planned


def _request(api: "Api", call: "Call", fields: Object) -> dict[str, Any]:
    """Return what the query asks for; the body, if there is one, is the archive."""
    given = fields.check(api.decode(call.query.get("request", "{}").encode()))
    return {name: value for name, value in given.items() if value is not None}


def _pipe() -> tuple[int, int]:
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    with contextlib.suppress(PermissionError):
        fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, _PIECE_BYTES)
    return read_fd, write_fd
