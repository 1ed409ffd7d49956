"""One program in several containers: some at a time, every line of output behind the container's name."""

import os
import select
import signal
import sys

from sysctr import errors
from sysctr.cli.command import Selected
from sysctr.cli.command import select as select_containers
from sysctr.cli.output import notice, print_error
from sysctr.cli.pump import PATIENCE, Signals
from sysctr.cli.table import neutralise
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Any

    from sysctr.client import Client
    from sysctr.ticket import Ticket

AT_ONCE = 8
_BUFFER_BYTES = 65536
# A line longer than this is printed in pieces: a program that never ends its line must not fill our memory.
_LINE_BYTES = 65536


class _Run:
    """The program in one container: its descriptors and the unfinished line of each."""

    def __init__(self, one: Selected, ticket: "Ticket") -> None:
        self.label = one.label
        self.ticket = ticket
        self.status: int | None = None
        self.ended = False
        os.close(ticket.take("stdin"))
        self.streams = {ticket.take("stdout"): sys.stdout, ticket.take("stderr"): sys.stderr}
        self._lines = dict.fromkeys(self.streams, b"")
        for fd in self.streams:
            os.set_blocking(fd, False)

    def fds(self) -> "list[int]":
        return [*self.streams, *([] if self.ended else [self.ticket.fileno()])]

    def advance(self, fd: int) -> None:
        if fd in self.streams:
            self._read(fd)
        elif not self.ended:
            message = self.ticket.receive()
            self.ended = message is None or "exit" in message or "error" in message
            if message and "error" in message:
                print_error(errors.from_dict(message["error"]))
                self.status = errors.from_dict(message["error"]).exit_code
            if message and "exit" in message:
                self.status = int(message["exit"])
            if self.ended:
                # The program's own output is in the pipes by now; who writes after it, is not waited for.
                for stream_fd in list(self.streams):
                    while stream_fd in self.streams and self._read(stream_fd):
                        pass
                    self._end(stream_fd)

    def _read(self, fd: int) -> bool:
        try:
            content = os.read(fd, _BUFFER_BYTES)
        except BlockingIOError:
            return False
        if not content:
            self._end(fd)
            return False
        *complete, rest = (self._lines[fd] + content).split(b"\n")
        if len(rest) > _LINE_BYTES:
            complete, rest = [*complete, rest], b""
        self._lines[fd] = rest
        for line in complete:
            self._print(fd, line)
        return True

    def _end(self, fd: int) -> None:
        if fd in self.streams:
            if self._lines[fd]:
                self._print(fd, self._lines[fd])
            del self.streams[fd]
            os.close(fd)

    def _print(self, fd: int, line: bytes) -> None:
        stream = self.streams[fd]
        if stream.isatty():
            print(f"{self.label}: {neutralise(line.decode('utf-8', 'replace').rstrip(chr(13)))}", file=stream)
        else:
            stream.flush()
            stream.buffer.write(self.label.encode() + b": " + line + b"\n")
            stream.buffer.flush()

    def close(self) -> None:
        for fd in list(self.streams):
            self._end(fd)
        self.ticket.close()


def exec_in_all(client: "Client", arguments: "argparse.Namespace", request: "dict[str, Any]") -> int:
    """Run the program in every chosen container and return the worst exit code."""
    if arguments.tty:
        raise errors.UsageError("cannot exec with a terminal in several containers at once")
    chosen = select_containers(client, arguments, ("running",))
    if not (arguments.all or arguments.tag is not None):
        _require_known(client, chosen)
    with Signals([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]) as signals:
        return _run_all(client, chosen, request, signals)


def _run_all(
    client: "Client", chosen: "Sequence[Selected]", request: "dict[str, Any]", signals: Signals
) -> int:
    waiting = list(reversed(chosen))
    runs: list[_Run] = []
    worst = 0
    taken = b""
    try:
        while waiting or runs:
            while waiting and len(runs) < AT_ONCE:
                one = waiting.pop()
                try:
                    runs.append(_Run(one, client.open_exec(one.ref, request)))
                except errors.NoDaemon:
                    raise
                except errors.SysctrError as error:
                    print_error(error)
                    worst = max(worst, error.exit_code)
            _advance(runs, signals.fd)
            for number in signals.take():
                # As in one container: it is for the program, and whoever repeats it in vain means us.
                taken += bytes([number])
                waiting.clear()
                for run in runs:
                    run.ticket.send({"signal": number})
                if len(taken) >= PATIENCE:
                    return 128 + number
            for run in [run for run in runs if run.ended]:
                runs.remove(run)
                run.close()
                worst = max(worst, _report(run))
        worst = max([worst, *(128 + number for number in taken[:1])])
    finally:
        for run in runs:
            run.close()
    return worst


def _advance(runs: "Sequence[_Run]", signals_fd: int) -> None:
    poll = select.poll()
    owners = {fd: run for run in runs for fd in run.fds()}
    for fd in (*owners, signals_fd):
        poll.register(fd, select.POLLIN)
    if owners:
        for fd, _ in poll.poll():
            if fd in owners:
                owners[fd].advance(fd)


def _report(run: _Run) -> int:
    if run.status is None:
        notice(f"{run.label}: the supervisor closed the connection; the program may still run")
        return errors.NoDaemon.exit_code
    if run.status:
        notice(f"{run.label}: exit code {run.status}")
    return run.status


def _require_known(client: "Client", chosen: "Sequence[Selected]") -> None:
    # `sysctr exec demo git log -- file` names three containers by our grammar. Nothing may run in the first
    # before it is known that the others are none.
    found = field(client.get(path("containers")), "containers")
    known = {str(container["id"]) for container in found} | {container["name"] for container in found}
    for one in chosen:
        if one.ref not in known:
            raise errors.NotFound(
                f"cannot exec in {one.ref}: no such container",
                "the program and its arguments come after the first --",
            )
