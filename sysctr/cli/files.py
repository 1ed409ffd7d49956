"""Copying: push and pull, as tar streams through the supervisor's files ticket."""

import os
import posixpath
import re
import sys
import time

from sysctr import errors
from sysctr.cli.archive import Owner, copy_single, pack, unpack
from sysctr.cli.command import Command, words
from sysctr.cli.output import coloured, notice, terminal_width
from sysctr.cli.progress import bar_line
from sysctr.cli.table import cut

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any, BinaryIO

    from sysctr.client import Client
    from sysctr.ticket import Ticket

# An id or a name as the schema has them; then the path. A host file that looks so is named ./101:file.
_REMOTE = re.compile(r"([a-z0-9][a-z0-9-]*):(.*)", re.DOTALL)
_HOME = "/root"
_METER_AFTER_S = 0.5
_METER_EVERY_S = 0.2


def remote(text: str) -> "tuple[str, str] | None":
    """Split CT:PATH; a path that is not absolute is below root's home, as with scp.

    >>> remote("demo:/etc/hosts"), remote("demo:notes"), remote("./demo:x")
    (('demo', '/etc/hosts'), ('demo', '/root/notes'), None)
    """
    match = _REMOTE.fullmatch(text)
    if not match:
        return None
    container, inside = match.groups()
    return container, inside if inside.startswith("/") else f"{_HOME}/{inside}"


def push_order(arguments: "list[str]") -> "tuple[list[str], str, str]":
    """Return (sources, container, destination) of `SRC… CT:PATH`, or of `CT SRC PATH` as pct has it."""
    if len(arguments) >= 2 and (found := remote(arguments[-1])):
        return arguments[:-1], *found
    if len(arguments) == 3:
        container, source, destination = arguments
        return [source], container, destination if destination.startswith("/") else f"{_HOME}/{destination}"
    raise errors.UsageError("cannot push: no CT:PATH is given", "sysctr push FILE… demo:/srv/")


def pull_order(arguments: "list[str]") -> "tuple[list[tuple[str, str]], str]":
    """Return ([(container, path)], destination) of `CT:PATH… DST`, or of `CT PATH DST` as pct has it."""
    if len(arguments) >= 2:
        sources = [remote(text) for text in arguments[:-1]]
        found = [source for source in sources if source is not None]
        if len(found) == len(sources):
            return found, arguments[-1]
        if len(arguments) == 3 and not found:
            inside = arguments[1] if arguments[1].startswith("/") else f"{_HOME}/{arguments[1]}"
            return [(arguments[0], inside)], arguments[2]
    raise errors.UsageError("cannot pull: no CT:PATH is given", "sysctr pull demo:/etc/hosts .")


def _owner_options(parser: "argparse.ArgumentParser", where: str) -> None:
    parser.add_argument("--user", metavar="U", help=f"owner of the copy {where}, by name or number")
    parser.add_argument("--group", metavar="G", help=f"group of the copy {where}, by name or number")
    parser.add_argument(
        "--mode",
        "--perms",
        metavar="OCTAL",
        type=_mode,
        help="mode of the copied files, such as 0644 (default: kept)",
    )
    parser.add_argument(
        "-r", "--recursive", action="store_true", help="allowed for habit; trees are always copied"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")


def _mode(text: str) -> int:
    if not re.fullmatch("[0-7]{3,4}", text):
        raise errors.UsageError(f"cannot use the mode {text}: give three or four octal digits")
    return int(text, 8)


def _push_arguments(parser: "argparse.ArgumentParser") -> None:
    parser.usage = "sysctr push [options] SRC… CT:PATH\n       sysctr push [options] CT SRC PATH"
    action = parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="files and trees, - for stdin; last CT:PATH, a directory or a new name; without a / in front "
        "it is below /root",
    )
    words(action, "files")
    _owner_options(parser, "inside")


def _push(arguments: "argparse.Namespace", client: "Client") -> int:
    sources, container, destination = push_order(arguments.paths)
    warnings = _Warnings()
    with _Sources(sources, destination) as packed:
        request: dict[str, Any] = {
            "op": "push",
            "path": destination,
            "names": [name for _, name in packed],
        }
        # Numbers and the mode are in the stream; only names have to be looked up inside.
        for kind in ("user", "group"):
            if getattr(arguments, kind) is not None and _number(getattr(arguments, kind)) is None:
                request[kind] = getattr(arguments, kind)
        owner = Owner(_number(arguments.user), _number(arguments.group), arguments.mode)
        with client.open_files(container, request) as ticket:
            meter = Meter(f"push to {container}", quiet=arguments.quiet)
            try:
                with os.fdopen(ticket.take("stdin"), "wb", buffering=0) as sink:
                    pack(packed, Metered(sink, meter), owner, warnings)  # type: ignore[arg-type]
            except BrokenPipeError:
                # The other side gave up; it says why below.
                pass
            except OSError as error:
                raise errors.SysctrError(
                    f"cannot push {error.filename or ''}: {error.strerror or error}"
                ) from error
            finally:
                meter.clear()
            _conclude(ticket, f"push to {container}")
    return warnings.exit_code


def _number(text: "str | None") -> "int | None":
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


class _Sources:
    """The (path, name) pairs of a push; stdin goes through a file, because tar says a size first."""

    def __init__(self, sources: "list[str]", destination: str) -> None:
        self._sources = sources
        self._destination = destination
        self._held: list[Any] = []

    def __enter__(self) -> "list[tuple[str, str]]":
        pairs = []
        for source in self._sources:
            if source == "-":
                pairs.append((self._spool(), posixpath.basename(self._destination.rstrip("/")) or "stdin"))
                continue
            if not os.path.exists(source):
                raise errors.NotFound(f"cannot push {source}: no such file or directory")
            # What the user names is followed, as cp does; links inside of a tree stay links.
            pairs.append((os.path.realpath(source), os.path.basename(os.path.abspath(source)) or "rootfs"))
        names = [name for _, name in pairs]
        if len(set(names)) != len(names):
            raise errors.UsageError("cannot push: two of the files have the same name")
        return pairs

    def _spool(self) -> str:
        import shutil
        import tempfile

        spool = tempfile.NamedTemporaryFile(prefix="sysctr-")  # noqa: SIM115 - closed by __exit__
        self._held.append(spool)
        shutil.copyfileobj(sys.stdin.buffer, spool)
        spool.flush()
        os.chmod(spool.name, 0o644)
        return spool.name

    def __exit__(self, *_: object) -> None:
        for spool in self._held:
            spool.close()


class _Warnings:
    """Print what was left out; a copy that is not whole exits with 1."""

    exit_code = 0

    def __call__(self, text: str) -> None:
        notice(f"sysctr: {text}")
        self.exit_code = errors.SysctrError.exit_code


def _conclude(ticket: "Ticket", what: str) -> None:
    message = ticket.receive()
    if message is None:
        raise errors.NoDaemon(f"cannot {what}: the supervisor closed the connection")
    if "error" in message:
        raise errors.from_dict(message["error"])
    if message.get("exit"):
        raise errors.SysctrError(f"cannot {what}: the job inside ended with {message['exit']}")


def _pull_arguments(parser: "argparse.ArgumentParser") -> None:
    parser.usage = "sysctr pull [options] CT:PATH… DST\n       sysctr pull [options] CT PATH DST"
    action = parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="CT:PATH… (without a / in front: in /root), and last a directory, a new name, or - for stdout",
    )
    words(action, "files")
    _owner_options(parser, "here")


def _pull(arguments: "argparse.Namespace", client: "Client") -> int:
    sources, destination = pull_order(arguments.paths)
    into_directory = os.path.isdir(destination)
    if len(sources) > 1 and not into_directory and destination != "-":
        raise errors.UsageError(f"cannot pull several into {destination}: it is not a directory")
    if destination.endswith("/") and not into_directory:
        raise errors.NotFound(f"cannot pull into {destination}: no such directory")
    owner = Owner(_host_id(arguments.user, "user"), _host_id(arguments.group, "group"), arguments.mode)
    warnings = _Warnings()
    for container, inside in sources:
        what = f"pull {inside} from {container}"
        with client.open_files(container, {"op": "pull", "path": inside}) as ticket:
            meter = Meter(f"pull from {container}", quiet=arguments.quiet)
            with os.fdopen(ticket.take("stdout"), "rb", buffering=0) as stream:
                try:
                    _receive(Metered(stream, meter), inside, destination, owner, warnings)
                except errors.SysctrError as error:
                    # If the job failed, an empty stream is only what followed from that.
                    stream.close()
                    if not isinstance(error, errors.Refused):
                        _conclude(ticket, what)
                    raise
                finally:
                    meter.clear()
            _conclude(ticket, what)
    return warnings.exit_code


def _receive(stream: "Metered", inside: str, destination: str, owner: Owner, warnings: _Warnings) -> None:
    source: BinaryIO = stream  # type: ignore[assignment]
    if destination == "-":
        sys.stdout.flush()
        copy_single(source, 1)
        return
    name = posixpath.basename(posixpath.normpath(inside))
    if not os.path.isdir(destination):
        parent, name = os.path.split(os.path.abspath(destination))
        if os.path.exists(destination) and not os.path.isfile(destination):
            # A pipe or a device such as /dev/stdout is written to, never replaced.
            fd = os.open(destination, os.O_WRONLY | os.O_CLOEXEC)
            try:
                copy_single(source, fd)
            finally:
                os.close(fd)
            return
    else:
        parent = destination
    try:
        directory_fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise errors.NotFound(f"cannot pull into {parent}: {error.strerror}") from error
    try:
        unpack(source, directory_fd, name, owner, warnings)
    finally:
        os.close(directory_fd)


def _host_id(text: "str | None", kind: str) -> "int | None":
    if text is None or text.isdigit():
        return _number(text)
    import grp
    import pwd

    try:
        return pwd.getpwnam(text).pw_uid if kind == "user" else grp.getgrnam(text).gr_gid
    except KeyError as error:
        raise errors.UsageError(f"cannot give the copy to {text}: no such {kind} on this host") from error


class Meter:
    """Bytes so far on one line of a terminal, once a copy takes long enough to ask."""

    def __init__(self, label: str, *, quiet: bool) -> None:
        self._label = label
        self._on = not quiet and coloured(sys.stderr)
        self._start = self._last = time.monotonic()
        self._bytes = 0
        self._shown = False

    def add(self, count: int) -> None:
        self._bytes += count
        if not self._on:
            return
        now = time.monotonic()
        if now - self._start < _METER_AFTER_S or now - self._last < _METER_EVERY_S:
            return
        self._last = now
        line = bar_line(self._label, "copying", self._bytes, 0, self._bytes / (now - self._start))
        sys.stderr.write(f"\r{cut(line, (terminal_width(sys.stderr) or 80) - 1)}\x1b[K")
        sys.stderr.flush()
        self._shown = True

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


class Metered:
    """A stream that counts; short reads and writes of a pipe are made whole, as tarfile expects."""

    def __init__(self, stream: "Any", meter: Meter) -> None:
        self._stream = stream
        self._meter = meter

    def write(self, content: bytes) -> int:
        view = memoryview(content)
        while view:
            written = self._stream.write(view)
            self._meter.add(written)
            view = view[written:]
        return len(content)

    def read(self, count: int) -> bytes:
        pieces = []
        while count > 0 and (piece := self._stream.read(count)):
            self._meter.add(len(piece))
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)


COMMANDS = {
    "push": Command(
        _push_arguments,
        _push,
        examples=(
            "sysctr push site.conf demo:/etc/nginx/conf.d/",
            "sysctr push --user www-data ./htdocs demo:/srv",
            "date | sysctr push - demo:/etc/built",
        ),
    ),
    "pull": Command(
        _pull_arguments,
        _pull,
        examples=(
            "sysctr pull demo:/var/log/syslog .",
            "sysctr pull demo:/etc demo-etc",
            "sysctr pull demo:/etc/hosts -",
        ),
    ),
}
