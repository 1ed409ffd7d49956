"""Being inside: exec, enter and console, through a ticket of the supervisor."""

import contextlib
import os
import sys

from sysctr import errors
from sysctr.cli.command import EXIT_CODES, Command, one_container, words
from sysctr.cli.output import notice, print_error
from sysctr.cli.pump import PATIENCE, Flow, RawTerminal, Signals, pump, window_size
from sysctr.cli.settings import assignment

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from sysctr.client import Client
    from sysctr.ticket import Ticket

_EXIT_CODES = (
    ("0-255", "that of the program; 1 to 6 also as below"),
    (125, "the program could not be started: no such user or directory, say"),
    (126, "the program cannot be executed"),
    (127, "no such program"),
    ("128+N", "the program was killed by signal N"),
    *EXIT_CODES[1:],
)
_EOF = b"\x04"
_VALUE_OPTIONS = ("-u", "--user", "-C", "--cwd", "-e", "--env", "--tag")


def split_line(argv: "list[str]") -> "tuple[list[str], list[str]]":
    """Split the words of exec into those of sysctr and those of the program.

    >>> split_line(["-u", "www", "demo", "ls", "-l"])
    (['-u', 'www', 'demo'], ['ls', '-l'])
    >>> split_line(["demo", "web", "--", "ls"]), split_line(["--all", "id"])
    ((['demo', 'web'], ['ls']), (['--all'], ['id']))
    """
    first = _first_word(argv)
    by_rule = any(word in ("--all", "--tag") or word.startswith("--tag=") for word in argv[:first])
    if "--" in argv:
        at = argv.index("--")
        return argv[:at], argv[at + 1 :]
    at = first if by_rule else first + 1
    return argv[:at], argv[at:]


def _first_word(argv: "list[str]") -> int:
    at = 0
    while at < len(argv) and argv[at].startswith("-") and argv[at] != "--":
        at += 2 if argv[at] in _VALUE_OPTIONS else 1
    return min(at, len(argv))


def _parse_exec(parser: "argparse.ArgumentParser", argv: "list[str]") -> "argparse.Namespace":
    own, program = split_line(argv)
    # The program's words were cut off, so what argparse sees as its own word list is empty.
    arguments = parser.parse_intermixed_args(own)
    arguments.program = program
    return arguments


def _exec_arguments(parser: "argparse.ArgumentParser") -> None:
    action = parser.add_argument(
        "containers", metavar="CT", nargs="*", help="id or name; after it the program, best behind --"
    )
    words(action, "containers")
    parser.usage = (
        "sysctr exec [options] CT [--] PROGRAM [ARGUMENT…]\n       sysctr exec [options] CT… -- PROGRAM …"
    )
    parser.add_argument(
        "--all", action="store_true", help="all running containers, output prefixed by their names"
    )
    parser.add_argument("--tag", metavar="T", help="all running containers with this tag")
    parser.add_argument("-u", "--user", metavar="U", help="user inside, by name or number (default: root)")
    parser.add_argument("-C", "--cwd", metavar="DIR", help="directory inside (default: the user's home)")
    parser.add_argument(
        "-e", "--env", metavar="K=V", action="append", default=[], help="environment variable"
    )
    parser.add_argument(
        "-t", "--tty", action="store_true", help="give the program a terminal (default: pipes, byte for byte)"
    )


def _exec(arguments: "argparse.Namespace", client: "Client") -> int:
    if not arguments.program:
        raise errors.UsageError("cannot exec: no program is given", "sysctr exec demo -- ls -l")
    request = exec_request(arguments.program, arguments)
    if arguments.all or arguments.tag is not None or len(arguments.containers) > 1:
        from sysctr.cli.fanout import exec_in_all

        return exec_in_all(client, arguments, request)
    if not arguments.containers:
        raise errors.UsageError("cannot exec: no container is named", "sysctr exec demo -- ls -l")
    return run_inside(client, arguments.containers[0], request, tty=arguments.tty)


def exec_request(argv: "list[str]", arguments: "argparse.Namespace") -> "dict[str, Any]":
    """Return the API's request for running a program."""
    return {
        "argv": argv,
        "environment": dict(assignment(text, "--env") for text in arguments.env),
        "cwd": arguments.cwd,
        "user": arguments.user,
        "tty": None,
    }


def _enter_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    parser.add_argument("-u", "--user", metavar="U", help="user inside, by name or number (default: root)")
    parser.add_argument("-C", "--cwd", metavar="DIR", help="directory inside (default: the user's home)")
    parser.add_argument(
        "-e", "--env", metavar="K=V", action="append", default=[], help="environment variable"
    )


def _enter(arguments: "argparse.Namespace", client: "Client") -> int:
    request = {**exec_request([], arguments), "login": True}
    return run_inside(client, arguments.container, request, tty=sys.stdin.isatty())


def run_inside(client: "Client", container: str, request: "dict[str, Any]", *, tty: bool) -> int:
    """Run a program in one container with our stdin, stdout and stderr, and return its exit code."""
    if tty:
        rows, columns = window_size(0)
        request["tty"] = {"rows": rows, "cols": columns}
        if term := os.environ.get("TERM"):
            request["environment"].setdefault("TERM", term)
    opened = client.open_exec(container, request)
    sys.stdout.flush()
    with opened as ticket:
        return Session(ticket, container, tty=tty).run()


class Session:
    """One program inside, from the ticket to its exit code."""

    def __init__(self, ticket: "Ticket", container: str, *, tty: bool) -> None:
        self.ticket = ticket
        self.container = container
        self.tty = tty
        self._status: int | None = None
        self._failure: errors.SysctrError | None = None
        self._interrupts = 0

    def run(self, stdin_fd: int = 0, stdout_fd: int = 1, stderr_fd: int = 2) -> int:
        """Move bytes until the program ended, and return its exit code."""
        import signal

        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT]
        if self.tty:
            numbers.append(signal.SIGWINCH)
            pty_fd = self.ticket.take("pty")
            flows = [
                Flow(pty_fd, stdout_fd, inward=False, shared=True),
                # A terminal has no half-close: an end of input is typed, as a person would.
                Flow(stdin_fd, pty_fd, inward=True, shared=True, at_end=b"" if os.isatty(stdin_fd) else _EOF),
            ]
        else:
            flows = [
                Flow(self.ticket.take("stdout"), stdout_fd, inward=False),
                Flow(self.ticket.take("stderr"), stderr_fd, inward=False),
                Flow(stdin_fd, self.ticket.take("stdin"), inward=True),
            ]
        with Signals(numbers) as signals:
            if self.tty and os.isatty(stdin_fd):
                with RawTerminal(stdin_fd):
                    pump(self.ticket, flows, self._message, signals=signals, on_signal=self._signal)
            else:
                pump(self.ticket, flows, self._message, signals=signals, on_signal=self._signal)
        if self._status is None:
            raise errors.NoDaemon(
                f"cannot follow the program in {self.container}: the supervisor closed the connection",
                "the program may still run",
            )
        if self._failure is not None:
            print_error(self._failure)
        return self._status

    def _message(self, message: "dict[str, Any] | None") -> bool:
        if message is None:
            return True
        if "exit" in message:
            self._status = int(message["exit"])
        if "error" in message:
            # With an exit code (126, 127) it is the program that could not run, and the code is its own.
            if self._status is None:
                raise errors.from_dict(message["error"])
            self._failure = errors.from_dict(message["error"])
        return self._status is not None

    def _signal(self, number: int) -> bool:
        import signal

        if number == signal.SIGWINCH:
            self.ticket.send({"resize": list(window_size(0))})
            return False
        self.ticket.send({"signal": number})
        self._interrupts += 1
        if number == signal.SIGHUP or self._interrupts >= PATIENCE:
            self._status = 128 + number
            return True
        return False


def _console_arguments(parser: "argparse.ArgumentParser") -> None:
    one_container(parser)
    parser.add_argument(
        "--escape",
        metavar="^X",
        default="^a",
        help="the key before q that detaches (default: ^a); none for no such key",
    )


def parse_escape(text: str) -> "int | None":
    """Return the byte of the escape key.

    >>> parse_escape("^a"), parse_escape("none")
    (1, None)
    """
    if text == "none":
        return None
    if len(text) == 2 and text[0] == "^" and "@" <= text[1].upper() <= "_":
        return ord(text[1].upper()) - 64
    raise errors.UsageError(f"cannot use the escape key {text}: give ^ and a letter, or none")


class Escape:
    """Look for the escape key in what is typed: with q it detaches, twice it is sent once."""

    def __init__(self, key: "int | None") -> None:
        self._key = key
        self._seen = False
        self.detached = False
        # The input came to its end, which detaches without a key.
        self.ended = False

    def __call__(self, typed: bytes) -> bytes:
        if self._key is None:
            return typed
        passed = bytearray()
        for byte in typed:
            if self._seen:
                self._seen = False
                if byte == ord("q"):
                    self.detached = True
                    break
                if byte != self._key:
                    passed.append(self._key)
                passed.append(byte)
            elif byte == self._key:
                self._seen = True
            else:
                passed.append(byte)
        return bytes(passed)


def _console(arguments: "argparse.Namespace", client: "Client") -> None:
    key = parse_escape(arguments.escape)
    with client.open_console(arguments.container) as ticket:
        how = (
            f"detach with ctrl-{chr(key + 96)} q" if key is not None else "no key detaches: end this process"
        )
        notice(f"attached to the console of {arguments.container}; {how}")
        attach(ticket, arguments.container, Escape(key))


def attach(ticket: "Ticket", container: str, escape: Escape, stdin_fd: int = 0, stdout_fd: int = 1) -> None:
    """Connect the terminal with a console until the user detaches or the container ends.

    An end of input (stdin is a file or /dev/null) detaches too, when all that the console kept is shown.
    """
    import signal
    import socket

    name = ticket.names[0] if ticket.names else "console"
    console_fd = ticket.take(name)
    inward = Flow(stdin_fd, console_fd, inward=True, shared=True, change=escape)
    outward = Flow(console_fd, stdout_fd, inward=False, shared=True)
    interactive = os.isatty(stdin_fd)
    line_end = "\r\n" if interactive else "\n"

    def on_message(message: "dict[str, Any] | None") -> bool:
        if message is not None and "error" in message:
            raise errors.from_dict(message["error"])
        if message is not None and "notice" in message:
            from sysctr.cli.table import neutralise

            sys.stderr.write(f"{line_end}[sysctr: {neutralise(message['notice'])}]{line_end}")
            sys.stderr.flush()
        return message is None

    def on_signal(number: int) -> bool:
        if number == signal.SIGWINCH:
            ticket.send({"resize": list(window_size(stdin_fd))})
            return False
        escape.detached = True
        return True

    def finished() -> bool:
        if inward.done and not inward.dead and not escape.ended:
            escape.ended = True
            # The supervisor closes its half when it has read ours to the end; what it sent until then comes.
            console = socket.socket(fileno=os.dup(console_fd))
            with contextlib.suppress(OSError), console:
                console.shutdown(socket.SHUT_WR)
        return escape.detached or outward.done

    with Signals([signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH]) as signals:
        options: dict[str, Any] = {"signals": signals, "on_signal": on_signal, "finished": finished}
        if interactive:
            ticket.send({"resize": list(window_size(stdin_fd))})
            with RawTerminal(stdin_fd):
                pump(ticket, (outward, inward), on_message, **options)
        else:
            pump(ticket, (outward, inward), on_message, **options)
    os.close(console_fd)
    sys.stderr.write("\n")
    left = escape.detached or escape.ended
    notice(f"detached from {container}" if left else f"the console of {container} was closed")


COMMANDS = {
    "exec": Command(
        _exec_arguments,
        _exec,
        examples=(
            "sysctr exec demo -- systemctl is-system-running",
            "sysctr exec -u www-data --cwd /srv demo -- ls -l",
            "tar c . | sysctr exec demo -- tar x -C /srv",
            "sysctr exec --all -- apt-get -y upgrade",
        ),
        exits=_EXIT_CODES,
        parse=_parse_exec,
    ),
    "enter": Command(
        _enter_arguments,
        _enter,
        examples=("sysctr enter demo", "sysctr enter demo --user admin"),
        exits=_EXIT_CODES,
    ),
    "console": Command(
        _console_arguments, _console, examples=("sysctr console demo", "sysctr console demo --escape ^b")
    ),
}
