"""Every key of every list does something: asks, opens, or says why it cannot."""

import pytest

from sysctr.tui.actions import ACTIONS, Action
from tests.tui.driving import Driver, driven, run
from tests.tui.fake import FakeDaemon, container, task

_WAYS = {
    "containers": ("1",), "templates": ("2",), "backups": ("3",), "tasks": ("4",), "hosts": ("5",),
    "snapshots": ("1", "T"), "backup-jobs": ("3", "J"), "pools": ("5", "p"), "migrations": ("5", "m"),
    "replicas": ("5", "c"),
}  # fmt: skip
# What a container has to be for an action, where it is not running.
_STATES = {"ct.start": "stopped"}
_KEYED = [(action, key) for action in ACTIONS for key in action.key.split(",") if key]


def daemon_for(action: Action) -> FakeDaemon:
    daemon = FakeDaemon(container(101, state=_STATES.get(action.id, "running")))
    daemon.tasks = [task("a")]
    daemon.containers[0]["task"] = None
    return daemon


async def opened(app: Driver, scope: str) -> None:
    """Open a list, and wait until it has a row and the keys."""
    for key in _WAYS[scope]:
        await app.press(key)
        await app.until(lambda: app.app.active_pane().table.rows, "a row")
        await app.until(lambda: app.app.active_pane().table.has_focus, "the focus")
    assert app.app.active_pane().listing.scope == scope


def happened(app: Driver) -> tuple[object, ...]:
    """Return what a key can change: what was sent, opened, told, or shown alone."""
    ui = app.app
    return len(app.daemon.changes()), len(ui.screen_stack), len(ui.messages), ui.scope_host


@pytest.mark.parametrize(("action", "key"), _KEYED, ids=[f"{action.id}-{key}" for action, key in _KEYED])
def test_a_key_does_something(action: Action, key: str) -> None:
    async def work() -> None:
        daemon = daemon_for(action)
        async with driven(daemon) as app:
            await opened(app, action.scope)
            before = happened(app)
            await app.press(key)
            await app.until(lambda: happened(app) != before, f"something for {key}")
            assert not [text for _, severity, text in app.app.messages if severity == "error"]

    run(work())
