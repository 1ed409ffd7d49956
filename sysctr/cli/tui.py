"""The terminal UI. What it needs is imported when it is called, and is installed with the extra `tui`."""

import gc
import os
import sys

from sysctr import errors
from sysctr.cli.command import Command

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from sysctr.client import Client


def _arguments(parser: "argparse.ArgumentParser") -> None:
    parser.add_argument("--read-only", action="store_true", help="change nothing, whatever is pressed")
    parser.add_argument("--refresh", metavar="S", type=float, help="seconds from one look to the next (2)")
    parser.add_argument("--theme", metavar="T", help="colours: see the palette for the names")
    parser.add_argument("--ascii", action="store_true", help="draw with the characters of ASCII alone")
    parser.add_argument(
        "--serve", metavar="PORT", nargs="?", type=int, const=8000,
        help="show it in a browser of this machine instead (port 8000)",
    )  # fmt: skip
    parser.add_argument("--no-mouse", action="store_true", help="leave the mouse to the terminal")


def _run(arguments: "argparse.Namespace", client: "Client") -> int:
    if client.host:
        # What is done on this host would be led to the other one.
        raise errors.UsageError(
            "cannot open the terminal UI: it shows all hosts in one window",
            "leave --host and SYSCTR_HOST out",
        )
    try:
        if arguments.serve is not None:
            return _serve(arguments)
        # A browser's page is no terminal, and says so.
        if "TEXTUAL_DRIVER" not in os.environ and not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise errors.UsageError("cannot open the terminal UI: there is no terminal", "see `sysctr help`")
        # What is imported stays: to look through it for garbage is a tenth of the time to the first paint.
        # The app looks again from then on.
        gc.disable()
        from sysctr.tui import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("textual", "rich", "textual_serve", "aiohttp_jinja2", "jinja2"):
            raise
        option = "" if missing in ("textual", "rich") else " --web"
        raise errors.UsageError(
            f"cannot open the terminal UI: {missing} is not installed",
            f"packaging/quickstart{option} installs it",
        ) from error
    # As with every command: root finds a daemon, or starts one. Without one it is waited for.
    try:
        client.connect()
    except errors.NoDaemon:
        pass
    client.close()
    return run(
        client.layout, read_only=arguments.read_only, refresh_s=arguments.refresh, theme=arguments.theme,
        plain=arguments.ascii, mouse=not arguments.no_mouse,
    )  # fmt: skip


def _serve(arguments: "argparse.Namespace") -> int:
    from sysctr.tui.serve import serve

    options = ["--read-only"] if arguments.read_only else []
    options += ["--refresh", f"{arguments.refresh:g}"] if arguments.refresh is not None else []
    options += ["--theme", arguments.theme] if arguments.theme else []
    return serve(arguments.serve, options)


COMMANDS = {
    "tui": Command(
        _arguments,
        _run,
        examples=("sysctr tui", "sysctr tui --read-only", "sysctr tui --ascii --theme ansi-dark"),
        more=("? shows the keys, x what can be done with a row, ctrl+p all commands.", ""),
    ),
}
