"""What the command line does for the UI: consoles, shells and editors on the terminal, and file copies."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sysctr import errors
from sysctr.tui.actions import Action, Target
from sysctr.tui.forms import PULL, PUSH, Form, Values
from sysctr.tui.terminal import can_hand_over, own_command, run_in_terminal

if TYPE_CHECKING:
    from sysctr.tui.app import SysctrApp


class TerminalFlows:
    """The part of the flows that runs programs."""

    def __init__(self, app: "SysctrApp") -> None:
        self.app = app
        # Two quick presses of a key are one.
        self._handed_over = False

    async def ask_form(self, form: Form, target: Target, send: Any, count: int = 1) -> Any:
        """Open a form about a target; returns what `send` made of it."""
        raise NotImplementedError

    def command_of(self, host: str, *words: str) -> list[str]:
        """Return the command line that does something on a host, as this very program."""
        peer = self.app.store.host(host).peer
        there = ["--host", peer] if peer else []
        return own_command(*there, *words)

    async def hand_over(self, host: str, words: Sequence[str], say: str = "") -> int | None:
        """Give the terminal to a command until it ends; None where there is no terminal to give."""
        if self._handed_over:
            return None
        if not can_hand_over(self.app):
            self.app.say(f"this needs a terminal of its own: sysctr {' '.join(words)}", severity="warning")
            return None
        self._handed_over = True
        try:
            return await run_in_terminal(self.app, self.command_of(host, *words), say=say)
        finally:
            self._handed_over = False
            # What was typed too early for the program is not for the list that comes back.
            self.app.typed.clear()

    async def flow_console(self, action: Action, targets: Sequence[Target]) -> None:
        """Attach to the console of a container."""
        target = targets[0]
        await self.hand_over(target.host, ["console", str(target.item["id"])])

    async def flow_shell(self, action: Action, targets: Sequence[Target]) -> None:
        """Open a login shell in a container."""
        target = targets[0]
        await self.hand_over(target.host, ["enter", str(target.item["id"])])

    async def flow_edit(self, action: Action, targets: Sequence[Target]) -> None:
        """Edit the configuration of a container in $EDITOR."""
        await self.hand_over(targets[0].host, ["edit", str(targets[0].item["id"])])

    async def flow_edit_job(self, action: Action, targets: Sequence[Target]) -> None:
        """Edit the file of a backup job in $EDITOR."""
        await self.hand_over(targets[0].host, ["backup", "job", "edit", targets[0].name])

    async def flow_push(self, action: Action, targets: Sequence[Target]) -> None:
        """Copy files of this machine into a container."""
        await self._copy_files(
            PUSH, targets[0], lambda v, number: ["push", "-r", "--", v["here"], f"{number}:{v['inside']}"]
        )

    async def flow_pull(self, action: Action, targets: Sequence[Target]) -> None:
        """Copy files of a container to this machine."""
        await self._copy_files(
            PULL, targets[0], lambda v, number: ["pull", "-r", "--", f"{number}:{v['inside']}", v["here"]]
        )

    async def _copy_files(
        self, form: Form, target: Target, words: "Callable[[Values, int], list[str]]"
    ) -> None:
        async def send(values: Values) -> Any:
            process = await asyncio.create_subprocess_exec(
                *self.command_of(target.host, *words(values, target.item["id"])),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
            try:
                said, _ = await process.communicate()
            except asyncio.CancelledError:
                process.terminate()
                raise
            text = said.decode("utf-8", "replace").strip()
            if process.returncode:
                raise errors.SysctrError(
                    text.removeprefix("sysctr: ") or f"it ended with {process.returncode}"
                )
            self.app.say(text or "copied")
            return {}

        await self.ask_form(form, target, send)
