"""The daemon, sysctrd: one per installation; it may end at any time without touching a container.

It has threads, so it never forks Python. Start-up is kept short, because a user's first command may wait for
it: everything heavy is imported once the lock is held.
"""

import argparse
import asyncio
import contextlib
import ctypes
import fcntl
import gc
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from sysctr import __version__
from sysctr.errors import Refused, SysctrError
from sysctr.linux import process
from sysctr.paths import Layout, layout

log = logging.getLogger(__name__)

REQUEST_GRACE_S = 5.0
TASK_GRACE_S = 20.0
LOCK_PATIENCE_S = 0.3
# Enough for 150 containers; the hard limit may be a million, and the programs we start inherit this one:
# some of them close every possible descriptor one by one.
OPEN_FILES = 65536
OOM_SCORE_ADJUST = -500
LOG_LIMIT_BYTES = 16 << 20
_M_ARENA_MAX = -8


def main(argv: list[str] | None = None) -> int:
    """Run the daemon and return its exit code."""
    started_s = time.monotonic()
    arguments = _arguments(argv)
    where = layout()
    os.umask(0o077)
    process.set_name("sysctrd")
    try:
        _make_directories(where)
        with _lock(where) as locked:
            if not locked:
                print(f"sysctrd: a daemon runs already (pid {_holder(where)})", file=sys.stderr)
                return 0
            _set_up_logging(where, foreground=arguments.foreground)
            _tune()
            stuck = _serve(where, arguments, started_s)
    except SysctrError as error:
        print(f"sysctrd: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    if stuck:
        # A thread that does not end would keep the interpreter from ending.
        logging.shutdown()
        os._exit(0)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sysctrd", description="The daemon of sysctr.")
    parser.add_argument("--foreground", action="store_true", help="log to stderr")
    parser.add_argument(
        "--ready-fd", metavar="N", type=int, default=-1, help="write a byte to this descriptor when ready"
    )
    parser.add_argument("--version", action="version", version=f"sysctrd {__version__}")
    return parser.parse_args(argv)


def _make_directories(where: Layout) -> None:
    # What lies in lib has setuid files with the containers' own ids: no host user may get there. Run is
    # passed through by the members of the group on their way to the sockets.
    wanted = (
        (where.root, 0o711), (where.etc, 0o755), (where.container_configs, 0o700), (where.lib, 0o700),
        (where.run, 0o711), (where.log, 0o750), (where.tasks, 0o700),
    )  # fmt: skip
    for path, mode in wanted:
        if not path:
            continue
        try:
            try:
                os.makedirs(path, mode)
            except FileExistsError:
                if path == where.root:
                    continue
            status = os.stat(path)
            if status.st_uid != os.geteuid():
                raise Refused(f"cannot start the daemon: {path} belongs to uid {status.st_uid}")
            os.chmod(path, mode)
        except OSError as error:
            raise SysctrError(f"cannot start the daemon: {path}: {error.strerror}") from error


@contextlib.contextmanager
def _lock(where: Layout) -> Iterator[bool]:
    """Hold the lock that says who is the daemon; yields False if another one holds it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    lock_fd = os.open(where.daemon_lock, flags, 0o600)
    try:
        deadline_s = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # A command that looks whether a daemon runs holds it for a moment.
                if time.monotonic() > deadline_s:
                    yield False
                    return
                time.sleep(0.01)
        os.ftruncate(lock_fd, 0)
        os.pwrite(lock_fd, f"{os.getpid()}\n".encode(), 0)
        yield True
    finally:
        os.close(lock_fd)


def _holder(where: Layout) -> str:
    with open(where.daemon_lock, encoding="ascii", errors="replace") as file:
        return file.read(32).strip() or "unknown"


class _LogFile(logging.FileHandler):
    """A log file that keeps one older part, and is opened again on SIGHUP for a rotation from outside."""

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        if self.stream is not None and self.stream.tell() > LOG_LIMIT_BYTES:
            self.reopen(lambda: os.rename(self.baseFilename, f"{self.baseFilename}.1"))

    def reopen(self, before: Callable[[], None] = lambda: None) -> None:
        """Close the file, do something to it, and open it again with the next line."""
        self.acquire()
        try:
            if self.stream is not None:
                self.stream.close()
                self.stream = None
            with contextlib.suppress(OSError):
                before()
        finally:
            self.release()


class _Formatter(logging.Formatter):
    """One line for each message: what somebody else has said in it is no line of its own, and no escape."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line of a message, without the traceback that may follow."""
        if not record.message.isprintable():
            record.message = "".join(
                each if each.isprintable() else each.encode("unicode_escape").decode()
                for each in record.message
            )
        return super().formatMessage(record)


class _JournalFormatter(_Formatter):
    """Lines with the <priority> that systemd reads from stderr."""

    def format(self, record: logging.LogRecord) -> str:
        priority = 7 if record.levelno < logging.INFO else 6 if record.levelno < logging.WARNING else 3
        priority = 4 if record.levelno == logging.WARNING else priority
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def _set_up_logging(where: Layout, *, foreground: bool) -> None:
    # These would be looked up for every line, and nothing prints them.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler: logging.Handler
    if "JOURNAL_STREAM" in os.environ:
        handler = logging.StreamHandler()
        handler.setFormatter(_JournalFormatter("%(message)s"))
    elif foreground:
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    else:
        # Beyond ASCII whatever a client sent comes out escaped.
        handler = _LogFile(f"{where.log}/daemon.log", encoding="utf-8", errors="backslashreplace")
        os.chmod(f"{where.log}/daemon.log", 0o640)
        handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # It says at level info what we say better ourselves.
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _tune() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(OOM_SCORE_ADJUST))
    except OSError as error:
        log.debug("the kernel may end the daemon when memory is short: %s", error.strerror)
    # Each thread would get a heap of its own, and what is freed in it would stay there.
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def _serve(where: Layout, arguments: argparse.Namespace, started_s: float) -> bool:
    """Serve until asked to stop; return whether a task did not end."""
    from sysctr.engine.engine import Engine
    from sysctr.engine.events import Bus
    from sysctr.engine.tasks import TaskRunner

    bus = Bus()
    tasks = TaskRunner(where, bus)
    engine = Engine(where, bus, tasks)
    engine.open()
    try:
        asyncio.run(_run(where, engine, arguments, started_s))
    finally:
        stuck = tasks.close(TASK_GRACE_S)
        for task in stuck:
            log.error("task %s (%s) did not end in time", task.id, task.doing)
        engine.close()
        log.info("the daemon has stopped")
    return bool(stuck) or _threads_left()


def _threads_left() -> bool:
    import threading

    return threading.active_count() > 1


async def _run(where: Layout, engine: Any, arguments: argparse.Namespace, started_s: float) -> None:
    from sysctr.api.server import Api

    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    api = Api(engine, stopped.set)
    reloads: set[asyncio.Future] = set()

    def reload() -> None:
        future = asyncio.ensure_future(_reload(api))
        reloads.add(future)
        future.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    await api.listen(_listen(where))
    # What was made until now stays for the daemon's life; collections need not look at it.
    gc.collect()
    gc.freeze()
    log.info("sysctrd %s is ready after %.0f ms", __version__, (time.monotonic() - started_s) * 1000)
    _notify("READY=1")
    _say_ready(arguments)
    await stopped.wait()
    _notify("STOPPING=1")
    log.info("the daemon is being stopped; containers go on running")
    # Still under the lock, so it is our socket; the next command finds none and starts a daemon.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(where.api_socket)
    await api.close(REQUEST_GRACE_S)


async def _reload(api: Any) -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _LogFile):
            handler.reopen()
    try:
        await api.run(api.engine.reload)
        log.info("read the host's settings again")
    except Exception as error:
        message = error.message if isinstance(error, SysctrError) else repr(error)
        log.error("the settings stay as they were: %s", message)


def _listen(where: Layout) -> socket.socket:
    import grp

    from sysctr.runtime import wire

    sock = wire.listen(where.api_socket, 0o660, kind=socket.SOCK_STREAM)
    with contextlib.suppress(KeyError, PermissionError):
        os.chown(where.api_socket, -1, grp.getgrnam(where.group).gr_gid)
    sock.setblocking(False)
    return sock


def _say_ready(arguments: argparse.Namespace) -> None:
    if arguments.ready_fd >= 0:
        with contextlib.suppress(OSError):
            os.write(arguments.ready_fd, b"ready\n")
            os.close(arguments.ready_fd)


def _notify(state: str) -> None:
    """Tell systemd, as sd_notify(3) does."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("\0" + address[1:] if address[0] == "@" else address)
        sock.send(state.encode())


if __name__ == "__main__":
    sys.exit(main())
