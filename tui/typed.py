"""Keys, one after the other: each meets the screen that the one before it made.

Textual 8.2 gives a key to what has the focus when it comes in, and runs what it is bound to later: of keys
that come together, as from a fast hand while the machine is busy, those after tab go to the field before it,
and those after a key that opens a form go to the list behind it, where each of them does something else.
"""

import asyncio
from collections.abc import Awaitable, Callable

from textual import events
from textual.app import App
from textual.dom import DOMNode
from textual.message_pump import MessagePump

Input = events.Key | events.Paste
# What takes longer than this holds up no key, or a host that hangs would take the keyboard with it.
_PATIENCE_S = 2.0


class Typed:
    """Gives an app its keys, each after `prepare`; `deliver` does with one what the app itself would have."""

    def __init__(
        self, app: App, prepare: Callable[[], None], deliver: Callable[[Input], Awaitable[None]]
    ) -> None:
        self._app = app
        self._prepare = prepare
        self._deliver = deliver
        self._keys: asyncio.Queue[Input] = asyncio.Queue()
        self._at_rest = asyncio.Event()
        self._at_rest.set()
        # Set while nothing is about to open that the keys to come are meant for.
        self._opened = asyncio.Event()
        self._opened.set()

    def put(self, key: Input) -> None:
        """Take a key that came in."""
        self._at_rest.clear()
        self._keys.put_nowait(key)

    def clear(self) -> None:
        """Forget the keys that were typed for something that is not there any more."""
        while not self._keys.empty():
            self._keys.get_nowait()

    def opening(self) -> None:
        """Note that something was begun which may open a screen: the keys that follow are for that."""
        self._opened.clear()

    def opened(self) -> None:
        """Note that it has opened, or that it needs none."""
        self._opened.set()

    async def at_rest(self) -> None:
        """Wait until all keys are dealt with."""
        await self._at_rest.wait()

    async def run(self) -> None:
        """Deliver keys for as long as the app runs."""
        while True:
            key = await self._keys.get()
            self._prepare()
            target = self._app.focused or self._app.screen
            await self._deliver(key)
            try:
                await asyncio.wait_for(self._settled(target), _PATIENCE_S)
            except TimeoutError:
                if not self._opened.is_set():
                    # They are for what has not opened, and would do something else where one is.
                    self.clear()
            self._opened.set()
            if self._keys.empty():
                self._at_rest.set()

    async def _settled(self, target: DOMNode) -> None:
        # Up to the app, which runs what the key is bound to; and once more for what that told the target.
        for _ in range(2):
            for node in (*target.ancestors_with_self, self._app):
                await _caught_up(node)
        await self._opened.wait()
        # A screen that has come has its focus when it has dealt with its first events.
        await _caught_up(self._app.screen)


async def _caught_up(node: MessagePump) -> None:
    """Wait until a part of the app has dealt with all that it was told until now."""
    done = asyncio.Event()
    if node.is_running and node.call_later(done.set):
        await done.wait()
