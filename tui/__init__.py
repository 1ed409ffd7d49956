"""The terminal UI: `sysctr tui`."""

from collections.abc import Callable
from functools import partial

from sysctr.client import Client
from sysctr.paths import Layout
from sysctr.tui import settings
from sysctr.tui.app import Host, SysctrApp


def run(
    where: Layout, *, read_only: bool = False, refresh_s: float | None = None, theme: str | None = None,
    plain: bool = False, mouse: bool = True,
) -> int:  # fmt: skip
    """Show the UI until it is left; returns the exit code."""
    import socket

    chosen = settings.read(settings.config_file())
    chosen.read_only |= read_only
    chosen.plain |= plain
    chosen.mouse &= mouse
    chosen.theme = theme or chosen.theme
    if refresh_s is not None:
        chosen.refresh_s = max(1.0, refresh_s)
    here = Host(socket.gethostname().partition(".")[0] or "here", partial(Client, where, start=False))

    def remote(name: str) -> "Callable[[], Client]":
        return partial(Client, where, start=False, host=name)

    app = SysctrApp([here], chosen, settings.state_file(), remote)
    app.run(mouse=chosen.mouse)
    return app.return_code or 0
