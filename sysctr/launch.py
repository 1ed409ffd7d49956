"""Starting the daemon from a command of the user, as tmux starts its server."""

import os
import select
import sys
import time

from sysctr import errors
from sysctr.paths import Layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

UNIT = "sysctrd.service"
SUPERVISOR_UNIT = "sysctr-supervisor.service"
_UNIT_DIRS = ("/etc/systemd/system", "/lib/systemd/system", "/usr/lib/systemd/system")
# -I ignores PYTHONPATH and the current directory, so the child is told where the package is; it goes in
# front only if it is not on the path already, because site-packages in front would hide the standard library.
_PROGRAM = """\
import os, sys
os.chdir("/")
os.umask(0o022)
where = sys.argv.pop(1)
where in sys.path or sys.path.insert(0, where)
from sysctr.api.daemon import main
sys.exit(main())
"""
_PROXIES = ("http_proxy", "https_proxy", "no_proxy")
_KEPT_ENVIRONMENT = (
    "SYSCTR_ROOT", "SYSCTR_FAULT", "SYSCTR_FAULT_WAIT", *_PROXIES, *(name.upper() for name in _PROXIES),
)  # fmt: skip
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


def package_parent() -> str:
    """Return the directory from which this package was imported."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def managed_by_systemd(where: Layout) -> bool:
    """Return whether the daemon of this installation is a unit of the running systemd."""
    if where.root or not os.path.isdir("/run/systemd/system"):
        return False
    return any(os.path.exists(f"{directory}/{UNIT}") for directory in _UNIT_DIRS)


def systemctl(verb: str, unit: str = UNIT) -> None:
    """Run `systemctl VERB UNIT` and wait for it."""
    what = "daemon" if unit == UNIT else "supervisor"
    argv = ["systemctl", verb, unit]
    try:
        pid = os.posix_spawnp("systemctl", argv, os.environ)
    except OSError as error:
        raise errors.NoDaemon(f"cannot {verb} the {what}: systemctl: {error.strerror}") from error
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise errors.NoDaemon(
            f"cannot {verb} the {what}: systemctl failed with {status}", f"see `journalctl -u {unit}`"
        )


def start(where: Layout, timeout_s: float, answers: "Callable[[], bool]") -> None:
    """Start the daemon and return when it is ready, or raise NoDaemon with the end of its log."""
    if managed_by_systemd(where):
        systemctl("start")
        return
    ready_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            pid = _spawn(where, write_fd)
        finally:
            os.close(write_fd)
        _await_ready(where, pid, ready_fd, timeout_s, answers)
    finally:
        os.close(ready_fd)


def _spawn(where: Layout, write_fd: int) -> int:
    log_path = f"{where.log}/daemon.log"
    try:
        os.makedirs(where.log, mode=0o750, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        log_fd = os.open(log_path, flags, 0o640)
    except OSError as error:
        raise errors.NoDaemon(f"cannot start the daemon: {log_path}: {error.strerror}") from error
    try:
        null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            # Copies that lie above every target, so that no dup2 of the child overwrites one of its sources.
            sources = [_high(fd) for fd in (null_fd, log_fd, log_fd, write_fd)]
        finally:
            os.close(null_fd)
        try:
            actions: list[tuple[int, ...]] = [(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in enumerate(sources)]
            actions += [(os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable(above=3)]
            argv = [sys.executable, "-I", "-c", _PROGRAM, package_parent(), "--ready-fd", "3"]
            kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
            environment = {**_ENVIRONMENT, **kept}
            return os.posix_spawn(sys.executable, argv, environment, file_actions=actions, setsid=True)
        finally:
            for fd in sources:
                os.close(fd)
    except OSError as error:
        raise errors.NoDaemon(f"cannot start the daemon: {error.strerror}") from error
    finally:
        os.close(log_fd)


def _high(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)


def _inheritable(above: int) -> "list[int]":
    # What the user's shell left open (a lock, a pipe to a parent) must not stay open for the daemon's life.
    fds = []
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if fd > above and os.get_inheritable(fd):
                fds.append(fd)
        except OSError:
            continue
    return fds


def _await_ready(
    where: Layout, pid: int, ready_fd: int, timeout_s: float, answers: "Callable[[], bool]"
) -> None:
    deadline = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(ready_fd, select.POLLIN)
    hint = f"its log is {where.log}/daemon.log"
    if not poll.poll(timeout_s * 1000):
        raise errors.NoDaemon(f"cannot start the daemon: it was not ready after {timeout_s:.0f} s", hint)
    if os.read(ready_fd, 1):
        return
    # It ended before it was ready. Either it failed, or another command's daemon was first: then that one
    # holds the lock, and answers soon.
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    while is_locked(where.daemon_lock) and time.monotonic() < deadline:
        if answers():
            return
        time.sleep(0.02)
    if answers():
        return
    raise errors.NoDaemon(f"cannot start the daemon: it ended with {status}{_last_line(where)}", hint)


def is_locked(path: str) -> bool:
    """Tell whether a process holds the lock at `path`."""
    import fcntl

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _last_line(where: Layout) -> str:
    try:
        with open(f"{where.log}/daemon.log", "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 4096))
            lines = log.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return f": {lines[-1]}" if lines else ""
