"""What tests/bench/tui.py measures: the UI of a daemon whose containers all change, and an app of nothing."""

import asyncio
import gc
import json
import sys
import time

from textual.app import App, ComposeResult
from textual.widgets import Static


def blank() -> "App[int]":
    """Return an app of Textual's that shows nothing more than what is waited for."""

    class Blank(App[int]):
        def compose(self) -> ComposeResult:
            yield Static("Containers web-")

    return Blank()


def full(rows: int, report: str) -> "App[int]":
    """Return the UI before so many containers; how long its loop stood still at most goes into a file."""
    # As `sysctr tui` does.
    gc.disable()
    from sysctr.tui.app import Host, SysctrApp
    from sysctr.tui.settings import Settings
    from tests.tui.fake import FakeDaemon, container

    daemon = FakeDaemon(*(container(100 + number) for number in range(rows)))

    class Watched(SysctrApp):
        worst_s = 0.0

        def on_mount(self) -> None:
            self.set_interval(1.0, self.change)
            self.run_worker(self.watch())

        def change(self) -> None:
            for one in daemon.containers:
                one["cpu_s"] += one["id"] % 7 / 10
                one["memory_bytes"] += 4096 * (one["id"] % 5 + 1)

        async def watch(self) -> None:
            # What is imported and drawn for the first time is the first paint's.
            await asyncio.sleep(3)
            while True:
                began_s = time.perf_counter()
                await asyncio.sleep(0.05)
                self.worst_s = max(self.worst_s, time.perf_counter() - began_s - 0.05)

        def on_unmount(self) -> None:
            with open(report, "w", encoding="ascii") as file:
                json.dump({"stall_s": self.worst_s}, file)

    return Watched([Host("here", daemon.client)], Settings(refresh_s=1.0))  # type: ignore[arg-type]


if __name__ == "__main__":
    (full(int(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 2 else blank()).run()
