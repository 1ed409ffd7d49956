"""The app driven without a terminal: keys go in, text comes out, and nothing is waited for by the clock."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from textual.pilot import Pilot

from sysctr.tui.app import Host, SysctrApp
from sysctr.tui.settings import Settings
from tests.tui.fake import FakeDaemon

_DEADLINE_S = 20.0


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test that is a coroutine."""
    asyncio.run(work)


class Driver:
    """An app under test, its daemon, and the pilot that presses its keys."""

    def __init__(self, app: SysctrApp, daemon: FakeDaemon, pilot: Pilot) -> None:
        self.app = app
        self.daemon = daemon
        self.pilot = pilot

    def text(self) -> str:
        """Return what is on the screen."""
        # Private, and the only way to see what is drawn (Textual 8.2).
        strips = self.app.screen._compositor.render_strips()
        return "\n".join("".join(segment.text for segment in strip).rstrip() for strip in strips)

    async def press(self, *keys: str) -> None:
        """Press keys, and let all come to rest that follows at once."""
        await self.pilot.press(*keys)
        await self.app.typed.at_rest()
        await self.pilot.pause()

    async def type(self, text: str) -> None:
        """Type a text."""
        names = {"-": "minus", "/": "slash", " ": "space", "_": "underscore", ".": "full_stop", ":": "colon"}
        await self.press(*(names.get(char, char) for char in text))

    async def until(self, fact: Callable[[], object], what: str = "it") -> None:
        """Wait until something holds."""
        deadline_s = time.monotonic() + _DEADLINE_S
        while not fact():
            assert time.monotonic() < deadline_s, f"{what} did not come about:\n{self.text()}"
            await self.pilot.pause(0.01)

    async def shows(self, text: str) -> None:
        """Wait until a text is on the screen."""
        await self.until(lambda: text in self.text(), repr(text))


@contextlib.asynccontextmanager
async def driven(
    daemon: FakeDaemon, size: tuple[int, int] = (140, 40), settings: Settings | None = None,
    there: FakeDaemon | None = None,
) -> AsyncIterator[Driver]:  # fmt: skip
    """Give an app that shows a daemon's containers, and those of a second host."""
    hosts = [Host("here", daemon.client), *([Host("there", there.client)] if there else [])]
    app = SysctrApp(hosts, settings)
    async with app.run_test(size=size, notifications=True) as pilot:
        driver = Driver(app, daemon, pilot)
        if not daemon.gone:
            known = app.store.hosts.values()
            await driver.until(lambda: known and all(one.up for one in known), "the daemons' answers")
            await pilot.pause()
        yield driver
