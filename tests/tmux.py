"""A terminal that a test can type into and read: tmux, with a server of its own that ends with the test."""

import os
import re
import secrets
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence

from tests.wait import wait_until

_DEADLINE_S = 60.0


class Terminal:
    """One terminal with a shell in it. Use it as a context manager."""

    def __init__(
        self, columns: int = 120, lines: int = 36, environment: "Mapping[str, str] | None" = None
    ) -> None:
        self._name = f"sysctr-{secrets.token_hex(4)}"
        # No configuration of whoever runs the test, and a prompt that nothing else prints.
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self._environment = {**kept, "PS1": "ready> ", "TERM": "xterm-256color", **(environment or {})}
        self._tmux(
            "-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", str(lines),
            "env", "-i", *(f"{name}={value}" for name, value in self._environment.items()),
            "TERM=tmux-256color", "sh",
        )  # fmt: skip
        self.shows("ready>")

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self._tmux("kill-server", check=False)

    def _tmux(self, *words: str, check: bool = True) -> str:
        argv = ["tmux", "-L", self._name, *words]
        done = subprocess.run(
            argv, capture_output=True, text=True, check=False, env=self._environment, timeout=60
        )
        assert not check or done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def text(self) -> str:
        """Return what is on the screen."""
        return self._tmux("capture-pane", "-p")

    def asks(self, what: str) -> str:
        """Return what tmux knows of the terminal: alternate_on, mouse_any_flag, scroll_region_lower."""
        return self._tmux("display-message", "-p", f"#{{{what}}}").strip()

    def keys(self, *names: str) -> None:
        """Press keys by their names: Enter, Escape, C-c, F2."""
        self._tmux("send-keys", *names)

    def type(self, text: str) -> None:
        """Type a text."""
        self._tmux("send-keys", "-l", text)

    def command(self, argv: Sequence[str]) -> None:
        """Type a command for the shell, and after it its exit status."""
        self.type(f"{shlex.join(argv)}; echo ended=$?")
        self.keys("Enter")

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size."""
        self._tmux("resize-window", "-x", str(columns), "-y", str(lines))

    def shows(self, wanted: str, deadline_s: float = _DEADLINE_S) -> str:
        """Wait until a text is on the screen, and return the screen."""
        return self.until(lambda text: wanted in text, repr(wanted), deadline_s)

    def matches(self, pattern: str, deadline_s: float = _DEADLINE_S) -> str:
        """Wait until a line of the screen matches a pattern, and return the screen."""
        return self.until(lambda text: re.search(pattern, text, re.MULTILINE), pattern, deadline_s)

    def until(self, fact: Callable[[str], object], what: str, deadline_s: float = _DEADLINE_S) -> str:
        """Wait until something holds of the screen, and return the screen."""
        seen = ""

        def look() -> bool:
            nonlocal seen
            seen = self.text()
            return bool(fact(seen))

        try:
            wait_until(look, deadline_s, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{seen}") from error
        return seen
