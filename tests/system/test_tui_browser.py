"""The terminal UI in a browser: what `sysctr tui --serve` shows, and to whom."""

import asyncio
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests import chromium
from tests.node import Node

pytestmark = [
    pytest.mark.root,
    pytest.mark.needs("userns", "idmap", "overlay", "busybox", "chromium"),
]
_PORT = 8765


def test_it_is_shown_in_a_browser_to_whoever_has_the_key(shared_host: Node, tmp_path: Path) -> None:
    shared_host.run("create", "browsed", "--template", "tiny", "--start")
    server = shared_host.popen("tui", "--serve", str(_PORT), stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    address = server.stdout.readline().strip()
    assert address.startswith(f"http://127.0.0.1:{_PORT}/#")

    async def look(port: int) -> bytes:
        async with chromium.opened(port, address) as page:
            await page.shows("Containers")
            await page.shows("browsed")
            await page.click(300, 300)
            await page.press("x")
            await page.shows("keep its present state")
            return await page.picture()

    with chromium.browser() as port:
        (tmp_path / "browser.png").write_bytes(asyncio.run(look(port)))
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"http://127.0.0.1:{_PORT}/ws/guess")
    server.terminate()
    assert server.wait(30) == 0
    shared_host.run("destroy", "browsed", "--yes", "--force")
