"""The app with a daemon that only answers: what is shown, and what each key asks for."""

import threading

import pytest
from textual import events

from sysctr import errors
from sysctr.tui.actions import ACTIONS, CONTAINERS
from sysctr.tui.screens.ask import AskScreen
from sysctr.tui.screens.form import FormScreen
from sysctr.tui.screens.listed import ListScreen
from sysctr.tui.screens.text import TextScreen
from sysctr.tui.screens.zoom import ZoomScreen
from sysctr.tui.settings import Settings
from tests.tui.driving import Driver, driven, run
from tests.tui.fake import FakeDaemon, container, task


def three() -> FakeDaemon:
    return FakeDaemon(container(101), container(102, state="stopped"), container(110, "web-10"))


def test_containers_are_shown_and_sorted_naturally() -> None:
    async def work() -> None:
        async with driven(three()) as app:
            await app.shows("web-10")
            lines = app.text().splitlines()
            order = [
                next(i for i, line in enumerate(lines) if f" {name} " in line)
                for name in ("web-1", "web-2", "web-10")
            ]
            assert order == sorted(order)
            assert "2 of 3 run" in lines[0]

    run(work())


@pytest.mark.parametrize(
    ("state", "key", "where", "body"),
    [
        ("stopped", "s", "start", {}), ("running", "p", "protect", {"protected": True}),
    ],
)  # fmt: skip
def test_a_key_asks_at_once(state: str, key: str, where: str, body: dict) -> None:
    async def work() -> None:
        async with driven(FakeDaemon(container(101, state=state))) as app:
            await app.press(key)
            await app.until(app.daemon.changes, "a request")
            assert app.daemon.changes() == [("POST", f"/1/containers/101/{where}", body)]

    run(work())


@pytest.mark.parametrize(
    ("key", "where", "body"),
    [
        ("S", "stop", {}),
        ("K", "stop", {"kill": True}),
        ("r", "reboot", {}),
        ("f", "freeze", {}),
        ("ctrl+s", "shutdown", {}),
    ],
)
def test_what_stops_work_is_asked_for(key: str, where: str, body: dict) -> None:
    async def work() -> None:
        async with driven(FakeDaemon(container(101))) as app:
            await app.press(key)
            await app.until(lambda: isinstance(app.app.screen, AskScreen), "the question")
            await app.press("escape")
            assert app.daemon.changes() == []
            await app.press(key)
            await app.until(lambda: isinstance(app.app.screen, AskScreen), "the question")
            await app.press("y")
            await app.until(app.daemon.changes, "a request")
            assert app.daemon.changes() == [("POST", f"/1/containers/101/{where}", body)]

    run(work())


def test_destroying_needs_the_name_typed() -> None:
    async def work() -> None:
        async with driven(FakeDaemon(container(101))) as app:
            await app.press("d")
            await app.until(lambda: isinstance(app.app.screen, AskScreen), "the question")
            await app.press("y", "enter")
            assert app.daemon.changes() == []
            await app.press("backspace")
            await app.type("web-1")
            await app.press("enter")
            await app.until(app.daemon.changes, "a request")
            assert app.daemon.changes() == [("DELETE", "/1/containers/101", {"force": True})]

    run(work())


def test_rolling_back_names_what_is_lost() -> None:
    async def work() -> None:
        async with driven(FakeDaemon(container(101))) as app:
            await app.press("T")
            await app.shows("upgrade")
            await app.press("R")
            await app.shows("1 files and directories changed since then, and that is lost:")
            await app.shows("M /etc/motd")
            assert [where for _, where, _ in app.daemon.changes()] == ["/1/containers/101/diff"]

    run(work())


def test_keys_that_come_together_are_for_what_the_one_before_opened() -> None:
    async def work() -> None:
        async with driven(FakeDaemon(container(101))) as app:
            # As from a fast hand, or a slow terminal: all of them before the form is there.
            for key in ("n", *"db", "tab", "tab", "2", "ctrl+s"):
                app.app.post_message(events.Key(key, key if len(key) == 1 else None))
            await app.until(app.daemon.changes, "a request")
            ((method, where, body),) = app.daemon.changes()
            assert (method, where) == ("POST", "/1/containers")
            assert (body["name"], body["set"]["limits.cores"]) == ("db", "2")

    run(work())


def test_a_grey_key_says_why() -> None:
    async def work() -> None:
        async with driven(FakeDaemon(container(101, state="stopped"))) as app:
            await app.press("c")
            await app.until(lambda: app.app.messages, "a word")
            assert app.app.messages[-1][2] == "Console: it is stopped"

    run(work())


def test_what_was_busy_is_looked_at_again_before_it_is_refused() -> None:
    async def work() -> None:
        daemon = FakeDaemon(container(101, task={"id": "a", "kind": "backup"}))
        async with driven(daemon, settings=Settings(refresh_s=3600)) as app:
            await app.press("S")
            await app.until(lambda: app.app.messages, "a refusal")
            # It ends, and no event has come yet.
            daemon.containers[0]["task"] = None
            await app.press("S")
            await app.until(lambda: isinstance(app.app.screen, AskScreen), "the question")

    run(work())


def test_several_are_done_together_and_what_cannot_be_is_named() -> None:
    async def work() -> None:
        async with driven(three()) as app:
            await app.press("V", "S")
            await app.until(lambda: isinstance(app.app.screen, AskScreen), "the question")
            await app.shows("web-2: it is stopped")
            await app.press("y")
            await app.until(lambda: len(app.daemon.changes()) == 2, "two requests")
            assert {where for _, where, _ in app.daemon.changes()} == {
                "/1/containers/101/stop", "/1/containers/110/stop",
            }  # fmt: skip

    run(work())


def test_nothing_is_changed_where_all_is_read_only() -> None:
    async def work() -> None:
        daemon = FakeDaemon(container(101))
        async with driven(daemon, settings=Settings(read_only=True)) as app:
            await app.shows("READ-ONLY")
            for action in ACTIONS:
                if action.scope == CONTAINERS and action.mutates and action.key:
                    await app.press(action.key.split(",")[0])
            assert daemon.changes() == []
            assert len(app.app.screen_stack) == 1

    run(work())


def test_a_filter_follows_what_is_typed_and_escape_takes_it_away() -> None:
    async def work() -> None:
        async with driven(three()) as app:
            await app.press("slash")
            await app.type("state:stop")
            await app.until(lambda: "web-10" not in app.text(), "a shorter list")
            await app.press("enter", "escape")
            await app.shows("web-10")

    run(work())


def test_a_form_is_filled_in_and_its_errors_can_be_mended() -> None:
    async def work() -> None:
        daemon = FakeDaemon(container(101))
        async with driven(daemon) as app:
            await app.press("o")
            await app.until(lambda: isinstance(app.app.screen, FormScreen), "the form")
            await app.press("ctrl+s")
            await app.shows("Name: it is needed")
            daemon.fails["POST", "/1/containers/101/clone"] = errors.Refused(
                "cannot clone web-1: the name is taken"
            )
            await app.type("web-7")
            await app.press("ctrl+s")
            await app.shows("the name is taken")
            daemon.fails.clear()
            await app.press("ctrl+s")
            await app.until(lambda: len(app.app.screen_stack) == 1, "the end of the form")
            assert daemon.changes()[-1] == ("POST", "/1/containers/101/clone", {"name": "web-7"})

    run(work())


def test_a_daemon_that_goes_away_dims_its_rows_and_comes_back() -> None:
    async def work() -> None:
        daemon = three()
        async with driven(daemon) as app:
            daemon.die("it was killed")
            await app.shows("it was killed")
            assert "web-10" in app.text()
            await app.press("s")
            assert daemon.changes() == []
            daemon.gone = ""
            await app.press("R")
            await app.until(lambda: app.app.store.host("here").up, "the daemon again")
            await app.until(lambda: "it was killed" not in app.text(), "the end of the complaint")

    run(work())


def test_without_a_daemon_it_says_so_and_goes_on() -> None:
    async def work() -> None:
        daemon = three()
        daemon.gone = "nothing listens"
        async with driven(daemon) as app:
            await app.shows("nothing listens")
            daemon.gone = ""
            await app.press("R")
            await app.shows("web-10")

    run(work())


def test_events_change_rows_and_tell_of_tasks() -> None:
    async def work() -> None:
        daemon = three()
        async with driven(daemon) as app:
            daemon.containers[0]["state"] = "stopped"
            daemon.tell("container", id=101, change="stopped")
            await app.shows("1 of 3 run")
            daemon.tell("task", task=task("a"))
            await app.shows("25M of 100M")
            failed = {
                "code": "no-space",
                "message": "cannot back up web-1: no space left on /dump",
                "hint": "see df",
            }
            daemon.tell("task", task=task("a", state="failed", ended=1.0, error=failed))
            await app.shows("no space left on /dump")
            await app.shows("1 failed")
            await app.press("4")
            await app.until(lambda: "1 failed" not in app.text(), "a look at the failure")

    run(work())


@pytest.mark.parametrize(
    ("tab", "key", "screen", "text"),
    [
        ("1", "n", FormScreen, "New container"), ("1", "L", FormScreen, "Limits of web-1"),
        ("1", "t", FormScreen, "Snapshot of web-1"), ("1", "b", FormScreen, "Backup of web-1"),
        ("1", "m", FormScreen, "Migrate web-1"), ("1", "f2", FormScreen, "Rename web-1"),
        ("1", "T", ListScreen, "Snapshots of web-1"), ("1", "l", TextScreen, "login:"),
        ("1", "D", TextScreen, "/etc/motd"), ("2", "n", FormScreen, "New container"),
        ("2", "B", FormScreen, "Build a template"), ("2", "i", FormScreen, "Import a template"),
        ("2", "d", AskScreen, "Remove debian-12?"), ("3", "r", FormScreen, "Restore"), ("3", "N", FormScreen,
        "Notes of"),
        ("3", "P", FormScreen, "Prune backups"), ("3", "J", ListScreen, "nightly"), ("4", "l", TextScreen,
        "second line"),
        ("5", "D", TextScreen, "kernel"), ("5", "t", FormScreen, "Token for"), ("5", "a", FormScreen,
        "Trust another"),
        ("5", "m", ListScreen, "in-doubt"), ("5", "p", ListScreen, "overlay"), ("5", "c", ListScreen,
        "Replicas"),
        ("1", "exclamation_mark", TextScreen, "Messages"), ("1", "question_mark", TextScreen,
        "Keys: Containers"),
    ],
)  # fmt: skip
def test_a_key_opens_what_it_is_for(tab: str, key: str, screen: type, text: str) -> None:
    async def work() -> None:
        daemon = FakeDaemon(container(101))
        daemon.tasks = [task("a", state="done", ended=2.0)]
        async with driven(daemon) as app:
            await ready(app, tab)
            await app.press(key)
            await app.until(lambda: isinstance(app.app.screen, screen), screen.__name__)
            await app.shows(text)
            await app.press("escape")
            await app.until(lambda: len(app.app.screen_stack) == 1, "the list again")
            assert all(
                "dry_run" in (body or {}) or where.endswith("/diff") for _, where, body in daemon.changes()
            )

    run(work())


@pytest.mark.parametrize("size", [(140, 40), (80, 24)])
def test_enter_shows_everything_about_a_container(size: tuple[int, int]) -> None:
    async def work() -> None:
        async with driven(FakeDaemon(container(101)), size) as app:
            await app.press("enter")
            await app.until(lambda: isinstance(app.app.screen, ZoomScreen), "the details")
            await app.shows("uuid:      u-1")
            await app.press("end")
            await app.shows("before")
            await app.press("x")
            await app.shows("end it at once")

    run(work())


async def ready(app: Driver, tab: str) -> None:
    """Open a tab, and wait for a row in it."""
    await app.press(tab)
    pane = app.app.active_pane()
    await app.until(lambda: pane.table.rows, "a row")
    await app.until(lambda: pane.table.has_focus, "the focus")


def test_what_failed_stays_marked_and_alone_is_tried_again() -> None:
    async def work() -> None:
        daemon = three()
        where = "/1/containers/110/backup"
        daemon.fails["POST", where] = errors.Busy("cannot back up web-10: it is busy")
        async with driven(daemon) as app:
            await app.press("V", "b")
            await app.press("ctrl+s")
            await app.shows("1 of 3 failed")
            assert len(daemon.changes()) == 3
            await app.press("ctrl+s")
            await app.until(lambda: len(daemon.changes()) == 4, "another try")
            assert daemon.changes()[-1][1] == where
            await app.press("escape")
            await app.until(lambda: app.app.active_pane().table.marks == {"here/110"}, "one mark")
            await app.press("b")
            daemon.fails.clear()
            await app.press("ctrl+s")
            await app.until(lambda: app.app.active_pane().table.marks == set(), "no mark")
            assert [one for _, one, _ in daemon.changes()[4:]] == [where]

    run(work())


def test_a_form_that_is_given_up_takes_no_mark_away() -> None:
    async def work() -> None:
        async with driven(three()) as app:
            await app.press("V", "b", "escape")
            await app.until(lambda: len(app.app.screen_stack) == 1, "the list")
            assert len(app.app.active_pane().table.marks) == 3

    run(work())


def test_a_form_left_while_it_is_sent_ends_nothing() -> None:
    async def work() -> None:
        daemon = FakeDaemon(container(101))
        daemon.held = threading.Event()
        async with driven(daemon) as app:
            await app.press("n")
            await app.type("db")
            await app.press("ctrl+s", "escape")
            await app.until(lambda: len(app.app.screen_stack) == 1, "the list")
            daemon.held.set()
            await app.until(daemon.changes, "the request")
            await app.press("x")
            await app.shows("Copy out")

    run(work())


def test_a_form_ends_itself_and_nothing_that_is_open_above_it() -> None:
    async def work() -> None:
        daemon = FakeDaemon(container(101))
        daemon.held = threading.Event()
        async with driven(daemon) as app:
            await app.press("n")
            await app.type("db")
            await app.press("ctrl+s", "ctrl+p")
            await app.until(lambda: len(app.app.screen_stack) == 3, "the palette")
            daemon.held.set()
            await app.until(daemon.changes, "the request")
            await app.press("escape")
            await app.until(lambda: len(app.app.screen_stack) == 1, "the list")
            assert len(daemon.changes()) == 1

    run(work())


def test_a_host_can_be_read_only_by_itself() -> None:
    async def work() -> None:
        daemon = FakeDaemon(container(101))
        async with driven(daemon, settings=Settings(read_only_hosts=frozenset({"here"}))) as app:
            for key in ("d", "S", "c", "n"):
                await app.press(key)
                await app.until(lambda: app.app.messages, "a word")
                assert app.app.messages.pop()[2].endswith(": read-only")
            assert (daemon.changes(), len(app.app.screen_stack)) == ([], 1)

    run(work())


def test_notes_of_several_lines_are_not_cut_to_one() -> None:
    async def work() -> None:
        daemon = FakeDaemon(container(101))
        daemon.notes = "first\nsecond\n"
        async with driven(daemon) as app:
            await ready(app, "3")
            await app.press("N")
            await app.shows("they have several lines")
            assert (daemon.changes(), len(app.app.screen_stack)) == ([], 1)

    run(work())


def test_prune_forgets_what_was_typed_before() -> None:
    async def work() -> None:
        daemon = FakeDaemon(container(101))
        where = "/1/backups/prune"
        daemon.fails["POST", where] = errors.NotFound("cannot find wbe")
        async with driven(daemon) as app:
            await ready(app, "3")
            await app.press("P", "tab", "1", "ctrl+s")
            await app.shows("cannot find wbe")
            daemon.fails.clear()
            daemon.result = {"archives": [{"name": "old", "mark": "remove"}]}
            await app.press("backspace", "tab", "2", "ctrl+s")
            await app.shows("Remove 1 archives?")
            await app.press("1", "enter")
            await app.until(lambda: len(daemon.changes()) == 3, "the request")
            assert daemon.changes()[-1] == ("POST", where, {"keep": {"keep_daily": 2}})

    run(work())


@pytest.mark.parametrize("word", ["replace", "no"])
def test_what_replaces_a_container_asks_for_a_word(word: str) -> None:
    async def work() -> None:
        daemon = FakeDaemon(container(101))
        async with driven(daemon) as app:
            await ready(app, "3")
            await app.press("r", "tab", "tab", "tab", "space", "ctrl+s")
            await app.shows("Type replace to go on:")
            assert daemon.changes() == []
            await app.type(word)
            await app.press("enter")
            if word == "replace":
                await app.until(daemon.changes, "the request")
                assert daemon.changes()[0][2]["force"] is True
            else:
                await app.press("escape")
                await app.shows("nothing was done")
                assert daemon.changes() == []

    run(work())


def test_names_in_the_palette_are_no_markup_and_no_escapes() -> None:
    async def work() -> None:
        daemon = FakeDaemon(container(101))
        daemon.lists["backups"][0]["name"] = "a[/b]\x1b]52;c;x\x07[@click=app.quit]c.tar"
        async with driven(daemon) as app:
            await ready(app, "3")
            await app.press("ctrl+p")
            await app.type("verify")
            await app.shows("prove that it can be restored (a[/b]")
            assert "\x1b" not in app.text()
            await app.press("escape", "r")
            await app.shows("Restore a[/b]")
            assert "\x1b" not in app.text()

    run(work())


def test_keys_for_a_question_that_takes_too_long_do_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysctr.tui.typed._PATIENCE_S", 0.05)

    async def work() -> None:
        daemon = FakeDaemon(container(101))
        async with driven(daemon) as app:
            await app.press("T")
            await app.shows("upgrade")
            daemon.held = threading.Event()
            for key in ("R", *"dy"):
                app.app.post_message(events.Key(key, key))
            await app.app.typed.at_rest()
            daemon.held.set()
            await app.shows("and that is lost")
            assert len(app.app.screen_stack) == 3
            assert [one for one in daemon.changes() if one[0] == "DELETE"] == []

    run(work())


def test_settings_change_keys_columns_and_questions() -> None:
    async def work() -> None:
        settings = Settings(
            keys={"ct.stop": "z"}, columns={"containers": ("name", "state")}, confirm={"ct.stop": "never"}
        )
        async with driven(FakeDaemon(container(101)), settings=settings) as app:
            assert "ADDRESS" not in app.text()
            await app.press("z")
            await app.until(app.daemon.changes, "a request")
            assert app.daemon.changes() == [("POST", "/1/containers/101/stop", {})]

    run(work())
