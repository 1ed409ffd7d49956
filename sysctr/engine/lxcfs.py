"""lxcfs: the file system that shows a container its own limits in /proc/meminfo, cpuinfo, uptime and so on.

One that is mounted already (Debian's lxcfs.service, at /var/lib/lxcfs) is used. Where none is, a process of
our own is started, with its mount point below the installation's run directory; it outlives the daemon, and
the next daemon finds it by its pid file.

lxcfs decides by the cgroups of the reader's init (the first process of the reader's pid namespace), so that
one has to be in the container's v1 memory, cpuset and cpuacct directories where those are v1.

A FUSE file system whose process hangs makes whoever touches it hang, beyond reach of a signal. So nothing in
the daemon does: what is mounted is read from mountinfo, and what is in it is asked for by a program that may
be given up. Files that a container has bound stay those of the process it was started with: after lxcfs died
they are errors ("Transport endpoint is not connected") until the container is restarted.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import threading
import time

from sysctr.errors import SysctrError
from sysctr.linux import mount, process
from sysctr.paths import Layout

SERVICE_MOUNT = "/var/lib/lxcfs"
PROGRAM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# Of what lxcfs offers below proc/: these, in every version. pressure/ (lxcfs 6) needs per-cgroup pressure.
PROC_FILES = ("cpuinfo", "diskstats", "loadavg", "meminfo", "slabinfo", "stat", "swaps", "uptime")
_CPU_ONLINE = "/sys/devices/system/cpu/online"

_ANSWER_S = 2.0
_START_S = 5.0
# How long an answer counts. Looking costs 3 ms of a container's start; an lxcfs that died less than this ago
# makes a start fail with the reason, and the next one finds another.
_FRESH_S = 5.0
_FAILURE_FRESH_S = 60.0


def ensure(layout: Layout) -> list[tuple[str, str]]:
    """Return (path on the host, target inside) for every file that lxcfs shows; starts it if need be.

    Raises SysctrError when there is none and none can be started, within a bounded time, and for a minute
    after that at once.
    """
    return _of(layout.root).ensure()


def stop(layout: Layout) -> None:
    """End the process that ensure started, if it did, and unmount; the service of the host is left alone."""
    _of(layout.root).stop()


@functools.cache
def _of(root: str) -> "Lxcfs":
    return Lxcfs(Layout(root))


class Lxcfs:
    """The lxcfs of one installation."""

    def __init__(self, layout: Layout, service_mount: str = SERVICE_MOUNT) -> None:
        self.mount = f"{layout.run}/lxcfs"
        self.pid_file = f"{layout.run}/lxcfs.pid"
        self.log_file = f"{layout.log}/lxcfs.log"
        self._root = layout.root
        self._service_mount = service_mount
        self._lock = threading.Lock()
        self._binds: list[tuple[str, str]] = []
        self._failure: SysctrError | None = None
        self._looked_at = float("-inf")
        self._given_up: dict[str, subprocess.Popen[bytes]] = {}
        self._server: subprocess.Popen[bytes] | None = None

    def ensure(self) -> list[tuple[str, str]]:
        """Return the binds, as the function of this name."""
        with self._lock:
            age_s = time.monotonic() - self._looked_at
            if self._failure and age_s < _FAILURE_FRESH_S:
                raise self._failure
            if not self._binds or age_s > _FRESH_S:
                self._binds, self._failure = [], None
                try:
                    self._binds = self._find() or self._start()
                except SysctrError as error:
                    self._failure = error
                    raise
                finally:
                    self._looked_at = time.monotonic()
            return list(self._binds)

    def _find(self) -> list[tuple[str, str]]:
        mounted = _mounted()
        for directory in (self._service_mount, self.mount):
            if directory in mounted and (binds := self._ask(directory)):
                return binds
        return []

    def _ask(self, directory: str) -> list[tuple[str, str]]:
        """Return what a mounted lxcfs offers; nothing when it is dead or does not answer in time."""
        given_up = self._given_up.get(directory)
        if given_up and given_up.poll() is None:
            return []  # the last asker still hangs in there
        asker = subprocess.Popen(
            ["/bin/ls", f"{directory}/proc", f"{directory}{_CPU_ONLINE}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": PROGRAM_PATH, "LC_ALL": "C"},
        )
        try:
            text, _ = asker.communicate(timeout=_ANSWER_S)
        except subprocess.TimeoutExpired:
            # Not waited for: if its request is in the hands of a stuck lxcfs, it cannot even die.
            asker.kill()
            if asker.stdout:
                asker.stdout.close()
            self._given_up[directory] = asker
            return []
        self._given_up.pop(directory, None)
        lines = text.decode(errors="replace").split("\n")
        binds = [(f"{directory}/proc/{name}", f"/proc/{name}") for name in PROC_FILES if name in lines]
        if binds and f"{directory}{_CPU_ONLINE}" in lines:
            binds.append((f"{directory}{_CPU_ONLINE}", _CPU_ONLINE))
        return binds

    def _start(self) -> list[tuple[str, str]]:
        program = shutil.which("lxcfs", path=PROGRAM_PATH)
        if program is None:
            raise SysctrError("cannot start lxcfs: it is not installed", hint="apt-get install lxcfs")
        self._clear()
        for directory in (self.mount, os.path.dirname(self.log_file)):
            os.makedirs(directory, mode=0o755, exist_ok=True)
        environment = {"PATH": PROGRAM_PATH, "LC_ALL": "C"}
        if self._root:
            environment["SYSCTR_ROOT"] = self._root
        with open(self.log_file, "wb") as log:
            server = subprocess.Popen(
                [program, f"--pidfile={self.pid_file}", self.mount],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment,
                start_new_session=True,
            )
        self._server = server  # kept to be reaped when it ends
        # Every container reads through it: it should be the last that a host without memory kills.
        with contextlib.suppress(OSError), open(f"/proc/{server.pid}/oom_score_adj", "w") as file:
            file.write("-1000")
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = server.wait(timeout=0.01)
                raise SysctrError(f"cannot start lxcfs: it ended with {status}: {self._last_words()}")
            if self.mount in _mounted() and (binds := self._ask(self.mount)):
                return binds
        self._clear()
        raise SysctrError(
            f"cannot start lxcfs: it did not answer within {_START_S:g} s: {self._last_words()}"
        )

    def _last_words(self) -> str:
        with open(self.log_file, encoding="utf-8", errors="replace") as file:
            lines = file.read().strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def stop(self) -> None:
        """End our own process and unmount, as the function of this name."""
        with self._lock:
            self._clear()
            with contextlib.suppress(OSError):
                os.rmdir(self.mount)
            for asker in self._given_up.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    asker.wait(timeout=_ANSWER_S)
            self._binds, self._failure, self._looked_at = [], None, float("-inf")

    def _clear(self) -> None:
        """Remove what is left of an lxcfs of ours: a process that hangs, or a mount without one."""
        self._kill_server()
        while self.mount in _mounted():
            mount.umount2(self.mount, mount.MNT_DETACH)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.pid_file)

    def _kill_server(self) -> None:
        # SIGKILL and not SIGTERM: it may be stuck or stopped, and unmounting is done here.
        if self._server:
            self._server.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(timeout=_ANSWER_S)
            self._server = None
        pid = self._pid()
        if pid is None:
            return
        try:
            pidfd = process.pidfd_open(pid)
        except OSError:
            return
        try:
            # Again, now that the number cannot become another's: is it ours?
            if self._pid() == pid:
                process.pidfd_send_signal(pidfd, signal.SIGKILL)
        except OSError:
            pass  # it ended meanwhile
        finally:
            os.close(pidfd)

    def _pid(self) -> int | None:
        """Return the pid of our own lxcfs, None when the pid file does not lead to one."""
        try:
            with open(self.pid_file, encoding="ascii") as file:
                pid = int(file.read())
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                argv = file.read().rstrip(b"\0").split(b"\0")
        except (OSError, ValueError):
            return None
        ours = os.path.basename(argv[0]) == b"lxcfs" and argv[-1] == os.fsencode(self.mount)
        return pid if ours else None


def _mounted() -> set[str]:
    """Return where lxcfs is mounted, in the words of the kernel and not of the file system itself."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        lines = [line for line in file if " - fuse.lxcfs " in line]
    return {line.split(" ")[4].encode().decode("unicode_escape") for line in lines}
