"""Several hosts in one window: what is done is done on the host that is meant."""

from sysctr.tui.screens.ask import AskScreen
from sysctr.tui.screens.menu import MenuScreen
from tests.tui.driving import Driver, driven, run
from tests.tui.fake import FakeDaemon, container


def two() -> tuple[FakeDaemon, FakeDaemon]:
    """Return two daemons whose containers have the same number."""
    return FakeDaemon(container(101, "web")), FakeDaemon(container(101, "db"))


async def at(app: Driver, name: str) -> None:
    """Put the cursor on the line of that name in the list that is open."""
    pane = app.app.active_pane()
    await app.until(lambda: pane.table.rows, "rows")
    await app.press("home")
    for _ in pane.table.rows:
        if (current := pane.current()) is not None and current.name == name:
            return
        await app.press("down")
    raise AssertionError(f"no {name} in {app.text()}")


async def opened(app: Driver, *keys: str) -> None:
    for key in keys:
        await app.press(key)
        await app.until(lambda: app.app.active_pane().table.has_focus, "the focus")


def test_each_container_is_asked_of_on_its_own_host() -> None:
    async def work() -> None:
        here, there = two()
        async with driven(here, there=there) as app:
            await app.shows("HOST")
            await at(app, "db")
            await app.press("p")
            await app.until(there.changes, "a request")
            assert (here.changes(), there.changes()[0][1]) == ([], "/1/containers/101/protect")

    run(work())


def test_what_is_on_several_hosts_does_not_move_together() -> None:
    async def work() -> None:
        here, there = two()
        async with driven(here, there=there) as app:
            await app.press("V", "m")
            await app.shows("what is marked is on several hosts")
            assert (here.changes(), there.changes()) == ([], [])

    run(work())


def test_what_needs_no_row_is_done_on_the_host_under_the_cursor() -> None:
    async def work() -> None:
        here, there = two()
        async with driven(here, there=there) as app:
            await opened(app, "5")
            await at(app, "there")
            await app.press("t")
            await app.shows("Token for another host on there")
            await app.press("ctrl+s")
            await app.until(there.changes, "a request")
            assert (here.changes(), there.changes()[0][1]) == ([], "/1/peers/token")

    run(work())


def test_a_list_above_belongs_to_the_host_that_it_was_opened_on() -> None:
    async def work() -> None:
        here, there = two()
        here.lists["pools"][0]["name"] = "mine"
        there.lists["pools"][0]["name"] = "theirs"
        async with driven(here, there=there) as app:
            await opened(app, "5")
            for name, own, other in (("here", "mine", "theirs"), ("there", "theirs", "mine")):
                await at(app, name)
                await opened(app, "p")
                await app.shows(own)
                assert other not in app.text()
                await app.press("a")
                await app.shows(f"New pool on {name}")
                await app.press("escape", "escape")
                await app.until(lambda: len(app.app.screen_stack) == 1, "the hosts")

    run(work())


def test_a_host_is_no_peer_of_itself() -> None:
    async def work() -> None:
        here, there = two()
        async with driven(here, there=there) as app:
            await opened(app, "5")
            for name in ("here", "there"):
                await at(app, name)
                await app.press("d")
                await app.until(lambda: app.app.messages, "a word")
                assert "it is a host" in app.app.messages.pop()[2]
            await at(app, "paris")
            await app.press("d")
            await app.until(lambda: isinstance(app.app.screen, AskScreen), "the question")

    run(work())


def test_enter_in_a_menu_takes_the_entry_under_the_cursor() -> None:
    async def work() -> None:
        async with driven(FakeDaemon(container(101))) as app:
            await opened(app, "5")
            await app.press("x")
            await app.until(lambda: isinstance(app.app.screen, MenuScreen), "the menu")
            await app.press("end", "enter")
            await app.until(lambda: not isinstance(app.app.screen, MenuScreen), "what was chosen")
            assert app.app.scope_host == ""

    run(work())


def test_a_host_that_hangs_takes_nothing_from_the_others() -> None:
    async def work() -> None:
        here, there = two()
        async with driven(here, there=there) as app:
            there.hangs.clear()
            for _ in range(40):
                app.app.run_worker(
                    app.app.connections["there"].get("tasks"), exit_on_error=False, group="hung"
                )
            await at(app, "web")
            await app.press("p")
            await app.until(here.changes, "a request")
            there.hangs.set()

    run(work())
