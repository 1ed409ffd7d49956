"""What the screens look like: texts in tests/data/tui, compared line by line.

SYSCTR_GOLDENS=write in the environment writes them anew; the difference is what a change did to the screen.
"""

import difflib
import os
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from sysctr.tui.settings import Settings
from tests.tui.driving import Driver, driven, run
from tests.tui.fake import BEGAN_S, FakeDaemon, container, task

_PLACE = Path(__file__).parents[1] / "data/tui"
_ERROR = {"code": "no-space", "message": "cannot back up mail: no space left on /dump", "hint": "see df"}


def full() -> FakeDaemon:
    daemon = FakeDaemon(
        container(101, "db-1", memory_bytes=1000 << 20, last_backup={"time": BEGAN_S}),
        container(102, "mail", state="stopped", exit={"reason": "exited", "status": 1}),
        container(103, "web-1", state="frozen"), container(104, "web-2", booted=False),
        container(105, "web-10", task={"id": "a", "kind": "backup"}),
        container(106, "gone", state="stopped", away={"name": "paris"}),
        container(107, "broken", state="stopped", error="limits.memory: 'much' is no size"),
    )  # fmt: skip
    # It would be measured by the clock, wherever a screen asks a second time.
    daemon.containers[0]["cpu_s"] = None
    daemon.tasks = [
        task("a", container=105, subject="web-10"),
        task("b", container=102, subject="mail", state="failed", ended=BEGAN_S + 9, error=_ERROR),
        task("c", kind="start", container=101, subject="db-1", state="done", ended=BEGAN_S + 0.4),
    ]
    return daemon


def odd() -> FakeDaemon:
    return FakeDaemon(
        container(101, "a" * 63), container(102, "日本語コンテナ"), container(103, "esc\x1b[2Jape\n"),
        container(104, "[bold]markup[/]"), container(105, tags=["x" * 40], addresses=["2001:db8::1234:5678"]),
    )  # fmt: skip


async def nothing(app: Driver) -> None:
    """Look at what is there first."""


def keys(*pressed: str, shows: str = "") -> Callable[[Driver], Awaitable[None]]:
    async def work(app: Driver) -> None:
        await app.press(*pressed)
        if shows:
            await app.shows(shows)
        await app.press()

    return work


async def disconnected(app: Driver) -> None:
    app.daemon.die("it was killed")
    await app.shows("it was killed")


_SCREENS: list = [
    ("containers-140x40", full, (140, 40), Settings(), keys(shows="uuid")),
    ("containers-100x30", full, (100, 30), Settings(), nothing),
    ("containers-80x24", full, (80, 24), Settings(), nothing),
    ("containers-40x10", full, (40, 10), Settings(), nothing),
    ("containers-ascii", full, (100, 24), Settings(plain=True), nothing),
    ("containers-ascii-wide", full, (140, 40), Settings(plain=True), keys("j", shows="uuid: ")),
    ("ask-ascii", full, (100, 24), Settings(plain=True), keys("d", shows="to go on")),
    ("form-ascii", full, (100, 30), Settings(plain=True), keys("n", shows="New container")),
    ("menu-ascii", full, (100, 30), Settings(plain=True), keys("x", shows="Copy out")),
    ("snapshots-ascii", full, (100, 24), Settings(plain=True), keys("T", shows="before")),
    ("tasks-ascii", full, (120, 24), Settings(plain=True), keys("4", shows="no space")),
    ("containers-read-only", full, (100, 24), Settings(read_only=True), nothing),
    ("containers-disconnected", full, (100, 24), Settings(), disconnected),
    ("containers-empty", FakeDaemon, (100, 24), Settings(), nothing),
    ("containers-odd-names", odd, (140, 24), Settings(), nothing),
    (
        "containers-1000",
        lambda: FakeDaemon(*(container(n) for n in range(100, 1100))),
        (100, 24),
        Settings(),
        keys("G"),
    ),
    ("containers-marked", full, (100, 24), Settings(), keys("space", "space")),
    ("containers-filtered", full, (100, 24), Settings(), keys("slash", "w", "e", "b")),
    ("menu", full, (100, 40), Settings(), keys("x", shows="Copy out")),
    ("menu-80x24", full, (80, 24), Settings(), keys("x", shows="Start")),
    ("copy", full, (100, 30), Settings(), keys("y", shows="sysctr start")),
    ("ask", full, (100, 24), Settings(), keys("j", "K", shows="not written")),
    ("ask-name", full, (100, 24), Settings(), keys("d", shows="to go on")),
    ("ask-several", full, (100, 30), Settings(), keys("V", "S", shows="Not")),
    ("form-create", full, (100, 30), Settings(), keys("n", shows="New container")),
    ("form-create-80x24", full, (80, 24), Settings(), keys("n", shows="New container")),
    ("help", full, (140, 40), Settings(), keys("question_mark", shows="sysctr start")),
    ("snapshots", full, (100, 24), Settings(), keys("T", shows="before")),
    ("templates", full, (120, 24), Settings(), keys("2", shows="Debian 12")),
    ("backups", full, (120, 24), Settings(), keys("3", shows="vzdump")),
    ("tasks", full, (120, 24), Settings(), keys("4", shows="no space")),
    ("hosts", full, (120, 24), Settings(), keys("5", shows="paris")),
    ("jobs", full, (100, 24), Settings(), keys("3", "J", shows="nightly")),
    ("pools", full, (120, 24), Settings(), keys("5", "p", shows="overlay")),
    ("task-log", full, (100, 24), Settings(), keys("4", "j", "l", shows="second line")),
]


@pytest.mark.parametrize(
    ("name", "make", "size", "settings", "work"), _SCREENS, ids=[screen[0] for screen in _SCREENS]
)
def test_a_screen_looks_as_it_did(
    name: str, make: Callable[[], FakeDaemon], size: tuple[int, int], settings: Settings,
    work: Callable[[Driver], Awaitable[None]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(time, "time", lambda: BEGAN_S + 7260)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()

    async def look() -> str:
        # Nothing is measured meanwhile: a graph would grow.
        settings.refresh_s = 3600
        async with driven(make(), size, settings) as app:
            await work(app)
            await app.pilot.pause()
            # When it is tried again is a matter of the clock.
            return re.sub(r"again in \d+ s, \S+ old", "again in 1 s, 1s old", app.text())

    seen = ""

    async def keep() -> None:
        nonlocal seen
        seen = await look()

    run(keep())
    assert not settings.plain or seen.isascii(), [line for line in seen.splitlines() if not line.isascii()]
    path = _PLACE / f"{name}.txt"
    if os.environ.get("SYSCTR_GOLDENS") == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(seen + "\n")
    known = path.read_text().removesuffix("\n")
    assert seen == known, "\n".join(
        difflib.unified_diff(known.splitlines(), seen.splitlines(), "known", "seen", lineterm="")
    )
