"""What is looked at before one is asked: what a roll back loses, a prune removes, what is in a move's way."""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sysctr import errors
from sysctr.cli.migrate import plan_lines
from sysctr.cli.moved import blocker_lines
from sysctr.cli.progress import ENDED
from sysctr.cli.table import neutralise
from sysctr.client import path
from sysctr.tui.actions import Action, Target
from sysctr.tui.forms import Values
from sysctr.tui.screens.ask import AskScreen, Question
from sysctr.tui.store import Item
from sysctr.tui.terminal_flows import TerminalFlows

_WAIT_S = 30
# So long what is lost is looked for before one is asked; and so much of it is named.
_LOOK_FIRST_S = 1.2
_MOST_CHANGES = 8


class LookingFlows(TerminalFlows):
    """The part of the flows that looks first."""

    async def request(self, host: str, method: str, where: str, body: object = None) -> Any:
        """Send a request to a host, and note the task that comes of it."""
        raise NotImplementedError

    async def send(self, action: Action, target: Target, values: Values) -> Any:
        """Send the request of an action, and note the task that comes of it."""
        raise NotImplementedError

    def show_text(self, title: str, lines: Sequence[str]) -> None:
        """Show lines that are there already."""
        raise NotImplementedError

    async def loses_changes(self, target: Target) -> str:
        """Return what changed since a snapshot, as far as that is found out while one waits."""
        connection, number = self.app.connections[target.host], target.item["container"]
        task: Item = {"state": "queued"}
        with contextlib.suppress(TimeoutError, errors.SysctrError):
            async with asyncio.timeout(_LOOK_FIRST_S):
                answer = await connection.request(
                    "POST", path("containers", number, "diff"), {"snapshot": target.name}
                )
                task = answer["task"]
                if task["state"] not in ENDED:
                    task = (await connection.get("tasks", task["id"], "wait", timeout=_WAIT_S))["task"]
        if task["state"] not in ENDED and "id" in task:
            # It holds the container, which is to be rolled back.
            cancel = partial(self._cancel, target.host, task["id"])
            self.app.run_worker(cancel, group="cancel", exit_on_error=False)
        result = task.get("result") or {}
        changes = result.get("changes")
        if task["state"] != "done" or changes is None:
            return ""
        if not changes:
            return "No file changed since then."
        more = " or more" if result.get("truncated") else ""
        said = [f"{len(changes)}{more} files and directories changed since then, and that is lost:"]
        said += [f"  {letter} {neutralise(name)}" for letter, name in changes[:_MOST_CHANGES]]
        return "\n".join([*said, *(["  …"] if len(changes) > _MOST_CHANGES else [])])

    async def _cancel(self, host: str, task: str) -> None:
        with contextlib.suppress(errors.SysctrError):
            await self.app.connections[host].request("DELETE", path("tasks", task))

    async def flow_prune(self, action: Action, targets: Sequence[Target]) -> None:
        """Show what would be removed, and remove it when that was seen."""
        host = targets[0].host
        assert action.form is not None
        values: Values = {}

        async def look(typed: Values) -> Any:
            values.clear()
            values.update(typed)
            return await self.result_of(host, "POST", path("backups", "prune"), {**typed, "dry_run": True})

        report = await self.ask_form(action.form, targets[0], look)
        if report is None:
            return
        gone = [one["name"] for one in report.get("archives") or () if one["mark"] == "remove"]
        if not gone:
            self.app.say("nothing would be removed")
            return
        question = Question(f"Remove {len(gone)} archives?", gone, button="Remove", word=str(len(gone)))
        if await self.app.push_screen_wait(AskScreen(question)):
            await self.request(host, "POST", path("backups", "prune"), values)

    async def flow_migrate(self, action: Action, targets: Sequence[Target]) -> "bool | None":
        """Say what is in the way of a move, and move when that was read."""
        host = targets[0].host
        if any(one.host != host for one in targets):
            # A peer's name means something on one host alone.
            raise errors.UsageError("cannot migrate: what is marked is on several hosts", "mark those of one")
        assert action.form is not None
        values: Values = {}

        async def look(typed: Values) -> Any:
            values.clear()
            values.update(typed)
            reports = []
            for target in targets:
                where = path("containers", target.item["id"], "migrate")
                reports.append(await self.result_of(host, "POST", where, {**typed, "dry_run": True}))
            return reports

        reports = await self.ask_form(action.form, targets[0], look, len(targets))
        if reports is None:
            return None
        said: list[str] = []
        blocked, hints = [], []
        for target, report in zip(targets, reports, strict=True):
            if report.get("blockers"):
                blocked.append((target.name, "; ".join(one["text"] for one in report["blockers"])))
                hints += [f"{target.name}:", *blocker_lines(report["blockers"])]
            else:
                said += plan_lines("migrate", target.name, report)
        going = [one for one, report in zip(targets, reports, strict=True) if not report.get("blockers")]
        if not going:
            self.show_text("In the way", hints)
            return None
        question = Question(f"Migrate {len(going)} to {values['peer']}?", said, blocked, button="Migrate")
        if not await self.app.push_screen_wait(AskScreen(question)):
            return None
        failures = []
        for target in going:
            try:
                await self.request(host, "POST", path("containers", target.item["id"], "migrate"), values)
            except errors.SysctrError as error:
                failures.append(error)
        if failures:
            error = failures[0]
            raise errors.SysctrError(
                f"{len(failures)} of {len(going)} were not begun: {error.message}", error.hint
            )
        return True

    async def flow_notes(self, action: Action, targets: Sequence[Target]) -> None:
        """Change the notes of an archive, as it has them: the list shows only their first line."""
        target = targets[0]
        connection = self.app.connections[target.host]
        answer = await connection.get("backups", "archive", archive=target.item["path"])
        notes = str(answer["archive"].get("notes") or "").rstrip("\n")
        if neutralise(notes) != notes:
            raise errors.Refused(
                "cannot change these notes here: they have several lines", "`sysctr backup notes` can"
            )
        known = replace(target, item={**target.item, "notes": notes})
        assert action.form is not None

        async def send(values: Values) -> Any:
            return await self.send(action, target, values) or {}

        await self.ask_form(action.form, known, send)

    async def result_of(self, host: str, method: str, where: str, body: object) -> Any:
        """Send a request that becomes a task, wait for its end and return its result; raises its error."""
        answer = await self.app.connections[host].request(method, where, body)
        task = answer["task"]
        while task["state"] not in ENDED:
            answer = await self.app.connections[host].get("tasks", task["id"], "wait", timeout=_WAIT_S)
            task = answer["task"]
        if task["state"] != "done":
            raise errors.from_dict(
                task["error"] or {"code": "error", "message": f"the task was {task['state']}"}
            )
        return task["result"] or {}
