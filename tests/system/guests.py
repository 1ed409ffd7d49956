"""What the system tests do with containers again and again: make one, look inside, type at a terminal."""

import fcntl
import itertools
import os
import pty
import select
import struct
import subprocess
import termios
import time
from pathlib import Path

from tests.node import Node, Result

_numbers = itertools.count(1)


def new_name(word: str = "ct") -> str:
    """Return a name that no other container of this session has."""
    return f"{word}-{next(_numbers)}"


def create(host: Node, *options: str, template: str = "tiny", start: bool = True, word: str = "ct") -> str:
    """Create a container under a new name, start it unless told otherwise, and return the name."""
    name = new_name(word)
    starting = ["--start"] if start else []
    host.run("create", name, "--template", template, *options, *starting)
    return name


def shell(host: Node, ref: str, script: str, *, user: str | None = None, check: bool = True) -> Result:
    """Run a script with the container's own shell; with `check` a status other than 0 fails the test."""
    who = ["--user", user] if user else []
    return host.run("exec", *who, ref, "--", "/bin/sh", "-c", script, check=check)


def inside(host: Node, ref: str, script: str, *, user: str | None = None) -> str:
    """Return what a script prints inside, without the white space around it."""
    return shell(host, ref, script, user=user).out.strip()


def lines(host: Node, ref: str, script: str) -> list[str]:
    """Return the lines a script prints inside."""
    return inside(host, ref, script).split("\n")


def refused(host: Node, status: int, words: str, *arguments: str, **options) -> Result:
    """Run a command that has to fail with a status and say certain words, and never a traceback."""
    done = host.run(*arguments, check=False, **options)
    assert done.status == status, done
    assert words in done.err, done
    assert done.err.startswith("sysctr: "), done
    assert "Traceback" not in done.err, done
    return done


def freeze_the_door() -> int:
    """As the container's root, freeze the cgroup that programs enter through."""
    # The files of the one we made belong to the host's root; of one in its place, to the container's.
    os.rmdir("/sys/fs/cgroup/.sysctr")
    os.mkdir("/sys/fs/cgroup/.sysctr")
    return Path("/sys/fs/cgroup/.sysctr/cgroup.freeze").write_text("1")


class Terminal:
    """A command of sysctr at a terminal of its own; a context manager that ends it."""

    def __init__(
        self, host: Node, *arguments: str, size: tuple[int, int] = (24, 80), env: dict[str, str] | None = None
    ) -> None:
        self._master_fd, slave_fd = pty.openpty()
        os.set_blocking(self._master_fd, False)
        fcntl.ioctl(slave_fd, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        self.process = subprocess.Popen(
            host.argv(*arguments), env=host.environment({"TERM": "xterm", **(env or {})}),
            stdin=slave_fd, stdout=slave_fd, stderr=slave_fd, start_new_session=True,
        )  # fmt: skip
        os.close(slave_fd)
        self.seen = b""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master_fd)

    def fileno(self) -> int:
        """Return our end of the terminal."""
        return self._master_fd

    def type(self, text: str) -> None:
        """Type text; a line ends with \\r."""
        os.write(self._master_fd, text.encode())

    def expect(self, words: str, deadline_s: float = 20) -> bytes:
        """Read until the words come, and return what came up to their end; they count once."""
        end = time.monotonic() + deadline_s
        while words.encode() not in self.seen:
            left_s = end - time.monotonic()
            assert left_s > 0, f"no {words!r} within {deadline_s:g} s in {self.seen!r}"
            if not self._read(left_s):
                raise AssertionError(f"it ended without {words!r}: {self.seen!r}")
        head, words_found, self.seen = self.seen.partition(words.encode())
        return head + words_found

    def end(self, deadline_s: float = 20) -> int:
        """Read until the command ends and return its status."""
        end = time.monotonic() + deadline_s
        while self._read(max(0.0, end - time.monotonic())):
            assert time.monotonic() < end, f"it did not end: {self.seen!r}"
        return self.process.wait(max(0.1, end - time.monotonic()))

    def _read(self, timeout_s: float) -> bool:
        select.select([self._master_fd], [], [], timeout_s)
        try:
            piece = os.read(self._master_fd, 65536)
        except BlockingIOError:
            return True
        except OSError:  # EIO: the last one who had the terminal open is gone
            return False
        self.seen += piece
        return bool(piece)
