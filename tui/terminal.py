"""The terminal handed over to a program and taken back unharmed, whatever that did to it.

Textual's `suspend` alone is not enough: a child that is killed in raw mode leaves raw mode behind, ctrl-c in
it would end this program too, and a frame that is drawn meanwhile blocks the loop for ever (Textual 8.2).
"""

import asyncio
import contextlib
import os
import signal
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence

from textual.app import App

from sysctr.launch import package_parent

# What ends sooner than this has not begun.
_AT_ONCE_S = 2.0
# What a program in a container may have left switched on: attributes, character set, the alternate screen, a
# hidden cursor, no wrapping, application keys, the mouse, bracketed paste, a scroll region.
_RESET = (
    "\x1b[0m\x1b(B\x1b[?1049l\x1b[?25h\x1b[?7h\x1b[?1l\x1b>\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l"
    "\x1b[?2004l\x1b[r"
)


def own_command(*words: str) -> list[str]:
    """Return the argument list of a command of this very program.

    -I: the current directory, which may be anybody's, would come before the standard library.
    """
    parent = package_parent()
    program = f"import sys; sys.path.insert(0, {parent!r}); from sysctr.cli import program; program()"
    return [sys.executable, "-I", "-c", program, *words]


def can_hand_over(app: App) -> bool:
    """Tell whether there is a terminal to hand over: there is none in a browser, and none in a test."""
    driver = app._driver
    return driver is not None and driver.can_suspend and not app.is_web


async def run_in_terminal(
    app: App, argv: Sequence[str], *, say: str = "", environment: "Mapping[str, str] | None" = None
) -> int:
    """Run a program that has the terminal for as long as it runs; return its exit status.

    What follows on the screen is this program again. Where the program fails, what it said is left to be read
    until enter is pressed.
    """
    status, failure = 0, None
    # Nothing is drawn meanwhile: a frame would wait for a writer that has stopped.
    with app.suspend(), app.batch_update():
        began_s = time.monotonic()
        try:
            with _kept():
                if say:
                    print(f"\r\n{say}\r\n", flush=True)
                variables = {**os.environ, **(environment or {})}
                process = await asyncio.create_subprocess_exec(*argv, env=variables)
                status = await process.wait()
            if status > 0 and time.monotonic() - began_s < _AT_ONCE_S:
                # It says why it could not even begin, and that would be gone at once.
                print(f"\r\n[it ended with {status}: press enter]", flush=True)
                await asyncio.to_thread(sys.stdin.readline)
        except Exception as error:  # it must not leave the block: the terminal would stay as it is
            failure = error
    if failure is not None:
        raise failure
    return status


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """Bring the terminal back to how it was, and take its foreground from whoever has it."""
    descriptor = sys.__stdin__.fileno() if sys.__stdin__ else 0
    saved = termios.tcgetattr(descriptor)
    # A handler, and not SIG_IGN, which the program would inherit.
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGINT, signal.SIGQUIT)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        stopping = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        try:
            with contextlib.suppress(OSError):
                os.tcsetpgrp(descriptor, os.getpgrp())
            with contextlib.suppress(OSError, termios.error):
                os.write(1, _RESET.encode())
                termios.tcsetattr(descriptor, termios.TCSADRAIN, saved)
        finally:
            signal.signal(signal.SIGTTOU, stopping)
