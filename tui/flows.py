"""What an action does beyond its one request: questions before, texts after, the terminal handed over."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sysctr import errors
from sysctr.cli.output import moment
from sysctr.cli.progress import ENDED
from sysctr.cli.table import neutralise
from sysctr.client import path
from sysctr.tui.actions import (
    BY_ID,
    CONTAINERS,
    HOSTS,
    JOBS,
    MIGRATIONS,
    POOLS,
    REPLICAS,
    SNAPSHOTS,
    TASKS,
    Action,
    Ask,
    Target,
    of_scope,
)  # fmt: skip
from sysctr.tui.forms import Form, Values
from sysctr.tui.listings import above, snapshot_items, snapshots
from sysctr.tui.looking_flows import LookingFlows
from sysctr.tui.screens.ask import AskScreen, Question
from sysctr.tui.screens.form import FormScreen
from sysctr.tui.screens.listed import ListScreen
from sysctr.tui.screens.menu import Entry, MenuScreen
from sysctr.tui.screens.text import TextScreen
from sysctr.tui.screens.zoom import ZoomScreen
from sysctr.tui.store import Item

if TYPE_CHECKING:
    from sysctr.tui.app import SysctrApp
    from sysctr.tui.pane import ListPane

# So many are done at once, as the command line does.
_AT_ONCE = 4
_LOOK_S = 0.5
_CONNECT_S = 2.0


@dataclass
class Outcome:
    """What became of an action: whether anything was sent, and for which targets that failed."""

    begun: bool = False
    failed: list[Target] = field(default_factory=list)


class Flows(LookingFlows):
    """Does the actions; each of these methods runs in a worker of the app."""

    def __init__(self, app: "SysctrApp") -> None:
        super().__init__(app)

    async def perform(self, action: Action, chosen: Sequence[Target], pane: "ListPane | None" = None) -> None:
        """Do an action to what was chosen, after what has to be asked was answered."""
        try:
            await self._perform(action, chosen, pane)
        except errors.SysctrError as error:
            self.app.complain(error)

    async def _perform(self, action: Action, chosen: Sequence[Target], pane: "ListPane | None") -> None:
        if action.free and (not chosen or action.scope == HOSTS):
            host = pane.free_host(list(chosen)) if pane is not None else self._some_host()
            chosen = [Target(host, {}, host)]
        elif not action.bulk:
            chosen = chosen[:1]
        if pane is not None and any(self._why_not(action, one) for one in chosen):
            chosen = await self._afresh(chosen, pane)
        able = [one for one in chosen if not self._why_not(action, one)]
        skipped = [(one.name, reason) for one in chosen if (reason := self._why_not(action, one))]
        if not able:
            reason = skipped[0][1] if skipped else "nothing is chosen"
            self.app.say(f"{action.title}: {reason}", severity="warning")
            return
        for host in {one.host: None for one in able}:
            if not await self._answers(host):
                self.app.say(f"{action.title}: {host} does not answer", severity="warning")
                return
        if not await self._agreed(action, able, skipped):
            return
        outcome = Outcome()
        try:
            if action.flow:
                outcome.begun = await getattr(self, f"flow_{action.flow}")(action, able) is not None
            elif action.form is not None:
                await self.fill_in(action, able, outcome)
            else:
                await self.send_all(action, able, {}, outcome)
        finally:
            if pane is not None and action.bulk and outcome.begun:
                # What failed stays marked, to be tried again.
                pane.keep_marked(outcome.failed)

    def _why_not(self, action: Action, target: Target) -> str:
        return action.possible(target, read_only=self.app.read_only_at(target.host))

    async def _afresh(self, chosen: Sequence[Target], pane: "ListPane") -> list[Target]:
        """Return the chosen containers as their hosts see them now: what kept one busy may have ended."""
        if pane.listing.scope != CONTAINERS:
            return list(chosen)
        for host in {one.host for one in chosen}:
            if self.app.connections[host].view.up:
                await self.app.connections[host].refresh_containers()
        known = [pane.listing.target(row) for row in self.app.store.containers()]
        by_id = {(one.host, one.item.get("id")): one for one in known}
        return [by_id.get((one.host, one.item.get("id")), one) for one in chosen]

    def _some_host(self) -> str:
        return self.app.scope_host or next(iter(self.app.store.hosts))

    async def _answers(self, host: str) -> bool:
        connection = self.app.connections.get(host)
        if connection is None:
            return False
        # In the first moments that is not known yet.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(connection.tried.wait(), _CONNECT_S)
        return connection.view.up

    async def _agreed(
        self, action: Action, able: Sequence[Target], skipped: Sequence[tuple[str, str]]
    ) -> bool:
        asks = action.ask is Ask.NAME or (
            action.ask is Ask.YES and self.app.options.asks(action.id, len(able))
        )
        if not asks and not (skipped and len(able) > 1):
            return True
        word = ""
        if action.ask is Ask.NAME:
            word = neutralise(able[0].name) if len(able) == 1 else str(len(able))
        named = able[0].name if len(able) == 1 else f"{len(able)}"
        warning = action.warning
        if action.loses:
            warning = await getattr(self, f"loses_{action.loses}")(able[0]) or warning
        question = Question(
            f"{action.title} {named}?",
            [one.name for one in able],
            skipped,
            warning,
            action.title,
            word,
        )
        return bool(await self.app.push_screen_wait(AskScreen(question)))

    # Requests

    async def send_all(
        self, action: Action, targets: Sequence[Target], values: Values, outcome: Outcome
    ) -> None:
        """Send the request of an action for each target, some at a time; the failures are told together."""
        limit = asyncio.Semaphore(_AT_ONCE)
        failures: list[tuple[Target, errors.SysctrError]] = []

        async def one(target: Target) -> None:
            async with limit:
                try:
                    await self.send(action, target, values)
                except errors.SysctrError as error:
                    failures.append((target, error))

        outcome.begun = True
        await asyncio.gather(*(one(target) for target in targets))
        outcome.failed = [target for target, _ in failures]
        if failures:
            error = failures[0][1]
            if len(targets) > 1:
                error = errors.SysctrError(
                    f"{len(failures)} of {len(targets)} failed: {error.message}", error.hint
                )
            raise error

    async def send(self, action: Action, target: Target, values: Values) -> Any:
        """Send the request of an action, and note the task that comes of it."""
        assert action.request is not None
        method, where, body = action.request(target.item, dict(values))
        return await self.request(target.host, method, where, body)

    async def request(self, host: str, method: str, where: str, body: object = None) -> Any:
        """Send a request to a host, and note the task that comes of it."""
        connection = self.app.connections[host]
        answer = await connection.request(method, where, body)
        if isinstance(answer, dict) and isinstance(answer.get("task"), dict):
            connection.view.set_task(answer["task"])
            self.app._seen_running.add(f"{host}/{answer['task']['id']}")
            self.app.show_dock()
        return answer

    # Forms

    async def fill_in(self, action: Action, targets: Sequence[Target], outcome: Outcome) -> None:
        """Ask for what an action needs, and do it."""
        assert action.form is not None
        left = list(targets)

        async def send(values: Values) -> Any:
            if len(targets) == 1:
                answer = await self.send(action, targets[0], values)
                outcome.begun = True
                return answer or {}
            try:
                await self.send_all(action, left, values, outcome)
            finally:
                # Where it is tried once more, it is not for those for which it is done.
                left[:] = outcome.failed
            return {}

        await self.ask_form(action.form, targets[0], send, len(targets))

    async def ask_form(self, form: Form, target: Target, send: Any, count: int = 1) -> Any:
        """Open a form about a target; returns what `send` made of it."""
        name = target.name if count == 1 else f"{count} containers"
        title = form.title.format(name=name)
        if "{name}" not in form.title and len(self.app.store.reached()) > 1:
            title = f"{title} on {target.host}"

        async def carefully(values: Values) -> Any:
            warning, word = form.grave(target.item, values)
            question = Question(f"{title}?", (), warning=warning, button=form.button, word=word)
            if warning and not await self.app.push_screen_wait(AskScreen(question)):
                raise errors.Refused("nothing was done")
            return await send(values)

        choices = await self._choices(form, target.host)
        return await self.app.push_screen_wait(
            FormScreen(form, title, form.initial(target.item), choices, carefully)
        )

    async def _choices(self, form: Form, host: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for source in {one.source for one in form.fields if one.source}:
            answer = await self.app.connections[host].get(source)
            found[source] = [str(one["name"]) for one in answer[source]]
        return found

    # Texts

    def show_text(self, title: str, lines: Sequence[str]) -> None:
        """Show lines that are there already."""

        async def source() -> AsyncGenerator[list[str]]:
            yield list(lines)

        self.app.push_screen(TextScreen(title, source))

    def show_messages(self) -> None:
        """Show all that was told."""
        lines = []
        for at, severity, text in reversed(self.app.messages):
            first, *rest = text.splitlines()
            lines += [
                f"{moment(at)} {severity if severity != 'information' else ''} {first}",
                *(f"    {one}" for one in rest),
            ]
        self.show_text("Messages", lines)

    def show_help(self, pane: "ListPane") -> None:
        """Show all keys of a list, with the commands that do the same."""
        lines = []
        for action in of_scope(pane.listing.scope):
            command = f"sysctr {action.command}" if action.command else ""
            lines.append(f"{action.key.split(',')[0]:>8}  {action.title:<18} {action.help:<55} {command}")
        lines += ["", *(f"{key:>8}  {words}" for key, words in _GENERAL)]
        self.show_text(f"Keys: {pane.listing.title}", lines)

    # Menus

    async def menu(self, pane: "ListPane") -> None:
        """Let one choose among all that can be done with what is chosen."""
        entries = [
            Entry(action.id, action.title, action.key, action.help, pane.why_not(action))
            for action in of_scope(pane.listing.scope)
        ]
        targets = pane.targets()
        title = targets[0].name if len(targets) == 1 else f"{len(targets)} marked"
        chosen = await self.app.push_screen_wait(MenuScreen(title, entries))
        if chosen is not None:
            await self.perform(BY_ID[chosen], targets, pane)

    async def copy(self, pane: "ListPane") -> None:
        """Let one choose what of a row to copy: its names, and the commands that do something to it."""
        target = pane.current()
        if target is None:
            return
        entries = [Entry(str(value), str(value), note=key) for key, value in _copyable(target.item)]
        for action in of_scope(pane.listing.scope):
            if action.command and not action.free:
                command = _command(action, target)
                entries.append(Entry(command, command, note=action.title))
        seen: dict[str, Entry] = {entry.id: entry for entry in reversed(entries)}
        chosen = await self.app.push_screen_wait(MenuScreen("Copy", list(reversed(seen.values()))))
        if chosen is not None:
            self.app.copy_to_clipboard(chosen)
            self.app.say(f"copied: {chosen}")

    async def open_row(self, pane: "ListPane") -> None:
        """Show more of a row: its details, its log, or what is on a host."""
        target = pane.current()
        if target is None:
            return
        if pane.listing.scope == TASKS:
            await self.flow_task_log(BY_ID["task.log"], [target])
        elif pane.listing.scope == HOSTS:
            await self.flow_scope(BY_ID["host.scope"], [target])
        elif pane.listing.scope == CONTAINERS:
            screen = ZoomScreen()
            self.app.call_after_refresh(self.app.look_closer)
            if await self.app.push_screen_wait(screen) == "menu":
                await self.menu(pane)
        else:
            lines = [f"{key:<22} {value}" for key, value in target.item.items()]
            self.show_text(target.name, lines)

    # The flows that actions name

    async def flow_logs(self, action: Action, targets: Sequence[Target]) -> None:
        """Show what a container wrote to its console, and go on with it."""
        target = targets[0]

        def source() -> AsyncGenerator[list[str]]:
            where = path("containers", target.item["id"], "logs")
            return self.app.connections[target.host].follow(where, {"kind": "console", "follow": True})

        await self.app.push_screen_wait(TextScreen(f"Log of {target.name}", source, at_end=True))

    async def flow_task_log(self, action: Action, targets: Sequence[Target]) -> None:
        """Show the log of a task, and go on with it until the task has ended."""
        target = targets[0]
        connection = self.app.connections[target.host]

        async def source() -> AsyncGenerator[list[str]]:
            seen = 0
            while True:
                known = connection.view.tasks.get(target.item["id"], target.item)
                answer = await connection.request("GET", path("tasks", target.item["id"], "log"))
                text = answer.decode("utf-8", "replace") if isinstance(answer, bytes) else str(answer)
                lines = text.splitlines()
                if len(lines) > seen:
                    yield lines[seen:]
                    seen = len(lines)
                if known["state"] in ENDED:
                    error = known.get("error") or {}
                    if error:
                        yield ["", str(error.get("message")), str(error.get("hint") or "")]
                    return
                await asyncio.sleep(_LOOK_S)

        await self.app.push_screen_wait(TextScreen(target.name, source, at_end=True))

    async def flow_diff(self, action: Action, targets: Sequence[Target]) -> None:
        """List what changed in a container since a snapshot, or since it was created."""
        target = targets[0]
        number = target.item.get("container", target.item.get("id"))
        body = {"snapshot": target.name} if action.scope == SNAPSHOTS else {}
        result = await self.result_of(target.host, "POST", path("containers", number, "diff"), body)
        lines = [f"{letter} {name}" for letter, name in result.get("changes") or ()]
        if result.get("truncated"):
            lines.append("… and more")
        self.show_text(f"Changed since {result.get('before')}: {target.name}", lines)

    async def flow_snapshots(self, action: Action, targets: Sequence[Target]) -> None:
        """Open the tree of a container's snapshots."""
        target = targets[0]
        connection = self.app.connections[target.host]
        where = f"snapshots of {target.item['id']}"

        async def load() -> None:
            answer = await connection.refresh_snapshots(target.item["id"])
            connection.view.lists[where] = snapshot_items(answer, target)

        await self.app.push_screen_wait(ListScreen(snapshots(target), load, target.host))
        connection.view.lists.pop(where, None)

    async def flow_jobs(self, action: Action, targets: Sequence[Target]) -> None:
        """Open the list of backup jobs."""
        await self._open_list(JOBS, targets)

    async def flow_pools(self, action: Action, targets: Sequence[Target]) -> None:
        """Open the list of pools."""
        await self._open_list(POOLS, targets)

    async def flow_migrations(self, action: Action, targets: Sequence[Target]) -> None:
        """Open the list of what is on its way."""
        await self._open_list(MIGRATIONS, targets)

    async def flow_replicas(self, action: Action, targets: Sequence[Target]) -> None:
        """Open the list of replicas."""
        await self._open_list(REPLICAS, targets)

    async def _open_list(self, scope: str, targets: Sequence[Target]) -> None:
        connection = self.app.connections[targets[0].host]
        before = connection.wanted_lists
        connection.wanted_lists = before | {scope}
        try:
            await self.app.push_screen_wait(
                ListScreen(above(scope), lambda: connection.refresh_list(scope), targets[0].host)
            )
        finally:
            connection.wanted_lists = before

    async def flow_limits(self, action: Action, targets: Sequence[Target]) -> None:
        """Change limits: only what was changed in the form is sent."""
        target, connection = targets[0], self.app.connections[targets[0].host]
        info = (await connection.get("containers", target.item["id"]))["container"]
        known = Target(target.host, info, target.name)
        assert action.form is not None
        before = action.form.initial(known.item)

        async def send(values: Values) -> Any:
            typed = {f"{table}.{key}": value for table, keys in values.items() for key, value in keys.items()}
            changes = {key: value or None for key, value in typed.items() if value != before[key]}
            if not changes:
                return {}
            return await self.request(
                target.host, "PATCH", path("containers", target.item["id"], "config"), {"changes": changes}
            )

        await self.ask_form(action.form, known, send)

    async def flow_add_mount(self, action: Action, targets: Sequence[Target]) -> None:
        """Add a mount point or a device."""
        target = targets[0]
        assert action.form is not None

        async def send(values: Values) -> Any:
            where = path("containers", target.item["id"], "mounts")
            return await self.request(target.host, "POST", where, values) or {}

        await self.ask_form(action.form, target, send)

    async def flow_token(self, action: Action, targets: Sequence[Target]) -> None:
        """Make a token, and show it once: it is kept nowhere."""
        assert action.form is not None

        async def send(values: Values) -> Any:
            return await self.request(targets[0].host, "POST", path("peers", "token"), values)

        made = await self.ask_form(action.form, targets[0], send)
        if made is not None:
            self.app.copy_to_clipboard(str(made["token"]))
            lines = [
                "On the other host, within the time that it holds:",
                "",
                f"sysctr peer join {made['token']}",
                "",
                "It was copied to the clipboard, where the terminal has one, and is shown only here.",
            ]
            self.show_text("Token", lines)

    async def flow_scope(self, action: Action, targets: Sequence[Target]) -> None:
        """Show what is on one host alone, and with the same key all again."""
        name = targets[0].host
        self.app.set_scope("" if self.app.scope_host == name else name)

    async def flow_doctor(self, action: Action, targets: Sequence[Target]) -> None:
        """Show what doctor finds."""
        answer = await self.app.connections[targets[0].host].get("doctor")
        lines = []
        for check in answer["checks"]:
            lines.append(f"{check['state']:<6} {check['check']}: {check['detail']}")
            if check["hint"] and not check["ok"]:
                lines.append(f"       {check['hint']}")
        self.show_text(f"Doctor of {targets[0].host}", lines)


def _copyable(item: Item) -> list[tuple[str, Any]]:
    keys = ("name", "id", "path", "uuid", "fingerprint")
    found = [(key, item[key]) for key in keys if item.get(key) not in (None, "")]
    return [*found, *(("address", one) for one in item.get("addresses") or ())]


def _command(action: Action, target: Target) -> str:
    class Known(dict):
        def __missing__(self, key: str) -> str:
            return key.upper()

    return "sysctr " + action.command.format_map(Known(target.item, name=target.name))


_GENERAL = (
    ("1 to 5", "the tabs"), ("/", "filter: words, !word for what must not be, key:word"), ("space",
    "mark a row"),
    ("V", "mark all rows that are shown"), ("x", "all that can be done"), ("< >", "sort by another column"),
    ("I", "sort in the other order"), ("y", "copy a name, an address, or the command that does the same"),
    ("enter", "more of a row"), ("escape", "close, then clear the filter, then the marks"),
    (": ctrl+p", "command palette"), ("!", "all messages so far"), ("R", "ask all hosts again"),
    ("ctrl+z", "to the shell; fg comes back"), ("q", "quit; what the daemon does goes on"),
)  # fmt: skip
