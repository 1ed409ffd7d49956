"""The UI in a browser of this machine, by textual-serve: on 127.0.0.1, for whoever has its key.

A port of this machine is open to all of its users, and this UI can do all that root can. So each start makes
a key, which opens the terminal's websocket. It comes in the part of the address that no browser sends, and is
kept for this address and port alone: a cookie would go to every port here, whoever listens on it.
"""

import hmac
import os
import secrets
import shlex
import sys
from collections.abc import Awaitable, Callable

from aiohttp import web
from textual_serve.server import Server

from sysctr.tui.terminal import own_command

_HOST = "127.0.0.1"
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Guarded(Server):
    """Serves the UI to whoever has the key."""

    def __init__(self, command: str, port: int) -> None:
        here = os.path.dirname(os.path.abspath(__file__))
        # Of its own: the library's page asks for a font of another host.
        super().__init__(command, host=_HOST, port=port, title="sysctr", templates_path=f"{here}/web")
        self.key = secrets.token_urlsafe(24)

    @property
    def address(self) -> str:
        """Return what is to be opened in a browser."""
        return f"{self.public_url}/#{self.key}"

    async def _make_app(self) -> web.Application:
        app = await super()._make_app()
        app.router.add_get("/ws/{key}", self.handle_websocket)
        app.middlewares.append(self._guard())
        return app

    def _guard(self) -> "Callable[[web.Request, _Handler], Awaitable[web.StreamResponse]]":
        here = f"{_HOST}:{self.port}"

        @web.middleware
        async def guard(request: web.Request, handler: _Handler) -> web.StreamResponse:
            origin = request.headers.get("Origin")
            # A page of elsewhere may have our address, or a name that leads here.
            if request.host != here or origin not in (None, f"http://{here}"):
                raise web.HTTPForbidden(text="this is not the address that was printed")
            if request.path.startswith("/ws"):
                told = request.match_info.get("key", "")
                if not hmac.compare_digest(told.encode("utf-8", "replace"), self.key.encode()):
                    raise web.HTTPForbidden(text="open the address that `sysctr tui --serve` printed")
            answer = await handler(request)
            if not answer.prepared:
                # The page itself holds no secret; nobody else's page is to hold it.
                answer.headers["Content-Security-Policy"] = "frame-ancestors 'none'"
                answer.headers["Referrer-Policy"] = "no-referrer"
            return answer

        return guard

    def initialize_logging(self) -> None:
        """Say nothing: the address was printed."""


def serve(port: int, options: list[str]) -> int:
    """Serve until interrupted; returns the exit code. Each page is a process of its own."""
    server = Guarded(shlex.join(own_command("tui", *options)), port)
    print(server.address, flush=True)
    print("Ctrl-C ends it. From another machine: ssh -L, never an open port.", file=sys.stderr)
    server.serve()
    return 0
