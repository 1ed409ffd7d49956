"""A headless Chromium of Debian, driven by its own protocol (chromedevtools.github.io/devtools-protocol)."""

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp

from tests.wait import wait_until

_DEADLINE_S = 60.0
# What moves the cursor or changes colours, and is no text.
_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[PX^_][^\x1b]*\x1b\\|.)")


class Page:
    """One page: what it shows is what came through its websocket, for it is painted and has no text."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._came = b""
        self._more = asyncio.Event()
        self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            data = json.loads(message.data)
            if "id" in data:
                self._answers.pop(data["id"]).set_result(data)
            elif data["method"] == "Network.webSocketFrameReceived":
                frame = data["params"]["response"]
                payload = frame["payloadData"]
                self._came += base64.b64decode(payload) if frame["opcode"] == 2 else payload.encode()
                self._more.set()

    async def call(self, method: str, **parameters: Any) -> Any:
        """Ask for something and return the answer."""
        self._number += 1
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        await self._socket.send_str(json.dumps({"id": self._number, "method": method, "params": parameters}))
        async with asyncio.timeout(_DEADLINE_S):
            data = await answer
        assert "error" not in data, data
        return data["result"]

    def text(self) -> str:
        """Return all text that has come."""
        return _ESCAPES.sub("", self._came.decode("utf-8", "replace"))

    async def shows(self, wanted: str) -> None:
        """Wait until a text has come."""
        try:
            async with asyncio.timeout(_DEADLINE_S):
                while wanted not in self.text():
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            raise AssertionError(f"no {wanted!r} in {self.text()[-3000:]}") from None

    async def press(self, key: str) -> None:
        """Press a key that stands for a character."""
        for kind in ("keyDown", "keyUp"):
            text = key if kind == "keyDown" else ""
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text)

    async def click(self, x: int, y: int) -> None:
        """Click somewhere."""
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def picture(self) -> bytes:
        """Return what it looks like, as PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot"))["data"])


@contextlib.contextmanager
def browser() -> Iterator[int]:
    """Start Chromium and give the port of its protocol; all of its processes end with it."""
    home = tempfile.mkdtemp(prefix="chromium-")
    process = subprocess.Popen(
        [
            "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--remote-debugging-port=0", "--window-size=1200,700", f"--user-data-dir={home}", "about:blank",
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, env={**os.environ, "TMPDIR": home},
    )  # fmt: skip
    said = Path(home, "DevToolsActivePort")
    try:
        wait_until(lambda: said.read_text().count("\n"), _DEADLINE_S, "a Chromium that listens")
        yield int(said.read_text().splitlines()[0])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # Those of its processes that end last may still have written something.
        wait_until(lambda: not shutil.rmtree(home, ignore_errors=True) and not os.path.exists(home))


@contextlib.asynccontextmanager
async def opened(port: int, url: str) -> AsyncIterator[Page]:
    """Give a page of a browser that shows an address."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            (target,) = [one for one in await answer.json() if one["type"] == "page"]
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            page = Page(socket)
            for part in ("Network", "Page"):
                await page.call(f"{part}.enable")
            await page.call("Page.navigate", url=url)
            yield page
