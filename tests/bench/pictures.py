"""Draws the pictures of the README anew, from containers that run: docs/*.svg.

    packaging/test bench pictures
"""

import asyncio
import re
import subprocess
from functools import partial
from pathlib import Path

from textual.pilot import Pilot

from sysctr.client import Client
from sysctr.tui.app import Host, SysctrApp
from sysctr.tui.settings import Settings
from tests.node import Node, TemplateStore
from tests.system import peers

_DOCS = Path(__file__).parents[2] / "docs"
_SIZE = (130, 38)
# Until the graphs have something to show.
_WATCH_S = 75
_WORK = """
while :; do
    for i in 1 2 3 4 5 6 7 8 9; do head -c 20000000 /dev/zero | md5sum >/dev/null; sleep 0.$i; done
    dd if=/dev/zero of=/root/x bs=1M count=20 conv=fsync 2>/dev/null
done
"""
# A font is taken from the reader's machine, and from nobody else's.
_FOREIGN = re.compile(r",\s*url\([^)]*\) format\([^)]*\)")


def fill(one: Node, two: Node) -> None:
    """Make the containers of both hosts, and one with a tree of snapshots."""
    two.run("peer", "restrict", "node1", "--manage", "yes")
    for node, names in ((one, ("web-1", "web-2", "db-1", "mail", "build")), (two, ("dns", "backup"))):
        for name in names:
            node.run(
                "create", name, "--template", "debian-12", "--memory", "512M", "--cores", "1", "--start"
            )
            node.run("wait", name, "--state", "booted")
    one.run("stop", "mail")
    one.run("freeze", "build")
    one.run("snapshot", "web-1", "clean", "--description", "as it was installed")
    one.run("snapshot", "web-1", "nginx", "--description", "with nginx, before the site")
    one.run("rollback", "web-1", "clean", "--yes")
    one.run("wait", "web-1", "--state", "booted")
    one.run("snapshot", "web-1", "before-upgrade", "--description", "apt upgrade follows")


async def draw(one: Node) -> None:
    """Press keys, and keep what is on the screen."""

    def client(host: str = "") -> Client:
        return Client(one.layout, start=False, host=host)

    app = SysctrApp(
        [Host("node1", client)], Settings(refresh_s=1.0), "", lambda name: partial(client, name)
    )

    async def until(pilot: "Pilot[int]", fact: object) -> None:
        while not fact():  # type: ignore[operator]
            await pilot.pause(0.05)

    async def press(pilot: "Pilot[int]", *keys: str) -> None:
        await pilot.press(*keys)
        await app.typed.at_rest()
        await pilot.pause(1)

    def keep(name: str) -> None:
        text = _FOREIGN.sub("", app.export_screenshot(title="sysctr"))
        (_DOCS / f"{name}.svg").write_text(text, encoding="utf-8")

    async with app.run_test(size=_SIZE) as pilot:
        await until(pilot, lambda: len(app.store.containers()) == 7)
        key = next(one.key for one in app.store.containers() if one.name == "web-1")
        await until(pilot, lambda: app.pane("containers").table.go_to(key))
        await pilot.pause(_WATCH_S)
        keep("containers")
        await press(pilot, "T")
        keep("snapshots")
        await press(pilot, "escape", "n")
        await press(pilot, *"shop", "tab", "tab", "2", "tab", *"1G")
        keep("create")


def main(arguments: list[str]) -> int:
    """Draw them."""
    _DOCS.mkdir(exist_ok=True)
    wanted = dict.fromkeys(("node1", "node2"), ("tiny", "debian-12"))
    with Node() as builder, peers.acquainted(TemplateStore(builder), *wanted, wanted=wanted) as hosts:
        one, two = hosts.nodes.values()
        fill(one, two)
        work = one.popen("exec", "web-1", "--", "sh", "-c", _WORK, stdin=subprocess.DEVNULL)
        try:
            asyncio.run(draw(one))
        finally:
            work.terminate()
            work.wait()
    return 0
