"""The two that are compared, with the same methods: Debian's LXC and sysctr, each on the same rootfs.

Both stand on an overlay of the same template tree, in a user namespace, with a veth on a bridge of their
own and a static address. LXC's lower is a copy of the tree with shifted owners, because it cannot shift the
lower of an overlay; sysctr shifts the template itself.
"""

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.node import CHECKOUT, Node
from tests.wait import wait_until

_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
# Far above what /etc/subuid gives away by itself: these ids exist only while the benchmark runs.
_LXC_FIRST_ID = 1_900_000_000
_ID_COUNT = 65536
# Python ignores these, and what it starts would inherit that.
_OF_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
_INOTIFY_INSTANCES = 8192
_BOOT_DEADLINE_S = 120
_READY_PATH = "run/systemd/private"


class Failed(Exception):
    """A command that was to be measured failed."""


def timed_ms(argv: list[str], env: dict[str, str] | None = None) -> float:
    """Run a command to its end and return how long that took; Failed has what it wrote to stderr."""
    with tempfile.TemporaryFile() as errors, open(os.devnull, "r+b") as null:
        actions = [
            (os.POSIX_SPAWN_DUP2, null.fileno(), 0),
            (os.POSIX_SPAWN_DUP2, null.fileno(), 1),
            (os.POSIX_SPAWN_DUP2, errors.fileno(), 2),
        ]
        begin = time.perf_counter()
        pid = os.posix_spawnp(
            argv[0], argv, _ENVIRONMENT if env is None else env, file_actions=actions, setsigdef=_OF_PYTHON
        )
        _, status = os.waitpid(pid, 0)
        spent_ms = (time.perf_counter() - begin) * 1000
        if status != 0:
            errors.seek(0)
            text = errors.read().decode(errors="replace").strip()
            raise Failed(f"{' '.join(argv)}: status {os.waitstatus_to_exitcode(status)}: {text}")
    return spent_ms


def run(*argv: str) -> str:
    """Run a command and return its output."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=_ENVIRONMENT)
    if done.returncode != 0:
        raise Failed(f"{' '.join(argv)}: status {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()


class Guest:
    """What init of the template is, and how to see from outside that it is up: the same way for both."""

    def __init__(self, tree: str, stop_signal: str) -> None:
        self.tree = tree
        self.stop_signal = stop_signal
        init = os.path.join(tree, "sbin/init")
        self.is_systemd = os.path.islink(init) and os.readlink(init).endswith("systemd/systemd")

    def wait_booted(self, pid: int) -> None:
        """Return when systemd has finished starting up, or another init shows its login."""
        if not self.is_systemd:
            wait_until(lambda: _has_login(pid), _BOOT_DEADLINE_S, f"login on the console of {pid}")
            return
        path = f"/proc/{pid}/root/{_READY_PATH}"
        wait_until(lambda: os.path.exists(path), _BOOT_DEADLINE_S, f"systemd's socket in {pid}")
        # It answers "degraded" with a failing status where a unit failed: booted all the same.
        subprocess.run(
            [*_enter(pid), "systemctl", "is-system-running", "--wait"], env=_ENVIRONMENT, check=False,
            capture_output=True, timeout=_BOOT_DEADLINE_S,
        )  # fmt: skip

    def boot_times_ms(self, pid: int) -> tuple[float, float]:
        """Return when systemd's main began and when it had started all, on the monotonic clock."""
        names = ("UserspaceTimestampMonotonic", "FinishTimestampMonotonic")
        text = run(*_enter(pid), "systemctl", "show", f"--property={','.join(names)}")
        values = dict(line.split("=", 1) for line in text.splitlines())
        begin, end = (int(values[name]) / 1000 for name in names)
        if not end:
            raise Failed(f"systemd of {pid} has not finished starting up")
        return begin, end


def _enter(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), "--all", "--"]


def _has_login(pid: int) -> bool:
    """Return whether a child of init has a controlling terminal: the login on the console."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{child}/stat").read_bytes()
            if int(status.rpartition(b")")[2].split()[4]) != 0:
                return True
    return False


def pss_mb(pid: int) -> float:
    """Return the proportional set size of a process."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise Failed(f"process {pid} has no Pss")


class Sysctr:
    """sysctr on a host of its own below SYSCTR_ROOT, started as an installed one is."""

    name = "sysctr"
    many_defined = listed_defined = False

    def __init__(self, node: Node, template: str) -> None:
        self.node = node
        self.template = template
        self._environment = {**_ENVIRONMENT, "SYSCTR_ROOT": node.root}

    def argv(self, *arguments: str) -> list[str]:
        return self.node.argv(*arguments)

    def _timed(self, *arguments: str) -> float:
        return timed_ms(self.argv(*arguments), self._environment)

    def create(self, name: str) -> float:
        return self._timed("create", name, "--template", self.template)

    def destroy(self, name: str) -> float:
        return self._timed("destroy", "--yes", name)

    def start(self, name: str) -> float:
        return self._timed("start", name)

    def last_task_ms(self, kind: str) -> float:
        """Return how long the daemon had the last task of a kind, from accepting it to its end."""
        _, answer = self.node.api("GET", "/1/tasks")
        tasks = answer["tasks"] if isinstance(answer, dict) else answer
        last = max((t for t in tasks if t["kind"] == kind), key=lambda task: task["created"])
        return (last["ended"] - last["created"]) * 1000

    def start_all(self, names: list[str]) -> float:
        return self._timed("start", *names)

    def stop(self, name: str) -> float:
        return self._timed("stop", name)

    def kill(self, name: str) -> float:
        return self._timed("stop", "--kill", name)

    def kill_all(self, names: list[str]) -> float:
        return self._timed("stop", "--kill", *names)

    def true(self, name: str) -> float:
        return self._timed("exec", name, "/bin/true")

    def list_all(self) -> float:
        return self._timed("list")

    def init_pid(self, name: str) -> int:
        _, answer = self.node.api("GET", f"/1/containers/{name}")
        found = answer.get("container", answer)
        return found["pid"]

    def manager_pids(self) -> list[int]:
        """Return keeper, supervisor and daemon."""
        return sorted(self.node.pids().values())

    def define(self, names: list[str]) -> None:
        """Make containers without measuring it."""
        for name in names:
            self.create(name)


class InstalledNode(Node):
    """A Node whose commands go through the launcher of an installation, and not through the checkout."""

    def __init__(self, **options: bool) -> None:
        super().__init__(**options)
        self._launcher = _install(self.root)

    def argv(self, *arguments: str) -> list[str]:
        return [*self._enter, self._launcher, *arguments]


def _install(root: str) -> str:
    """Lay out an installation below the root as quickstart does, but with this Python's own packages."""
    prefix = f"{root}/opt"
    site = f"{prefix}/current/site-packages"
    os.makedirs(f"{prefix}/current/bin")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "sysctr", f"{site}/sysctr", ignore=ignored)
    shutil.copytree(CHECKOUT / "templates", f"{site}/sysctr/templates", ignore=ignored)
    subprocess.run([sys.executable, "-I", "-m", "compileall", "-q", site], check=True)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    text = (CHECKOUT / "packaging/sysctr").read_text(encoding="utf-8")
    text = text.replace("@PREFIX@/current/bin/python3", sys.executable)
    text = text.replace("@PREFIX@", prefix)
    # Where its own packages are, and where this Python's: an installation has both in one directory.
    text = text.replace("# @ROOT@", f'sys.path[-1:] = ["{site}", "{sys.prefix}/lib/{version}/site-packages"]')
    launcher = f"{prefix}/current/bin/sysctr"
    Path(launcher).write_text(text, encoding="utf-8")
    os.chmod(launcher, 0o755)
    return launcher


class Lxc:
    """Debian's LXC with its state in a directory of its own and a bridge that goes with it."""

    name = "lxc"
    many_defined = listed_defined = False

    def __init__(self, directory: str, tag: str, guest: Guest) -> None:
        self.directory = directory
        self.bridge = f"lx{tag}"
        self._guest = guest
        # Names that the sweep at the end of a session of tests takes for its own.
        self._prefix = f"sysctr-{tag}-"
        self._network = _free_network(tag)
        self._numbers: dict[str, int] = {}
        self._pivots_before = _pivots()
        self.lower = f"{directory}/lower"
        self.tarball = f"{directory}/rootfs.tar"

    def open(self) -> None:
        """Make what containers need: the archive, the tree with shifted owners, the bridge."""
        os.chmod(self.directory, 0o755)
        run("tar", "-C", self._guest.tree, *_TAR, "-cf", self.tarball, ".")
        self._unpack(self.lower)
        for directory, directories, files in os.walk(self.lower):
            links = [name for name in directories if os.path.islink(os.path.join(directory, name))]
            for path in (directory, *(os.path.join(directory, name) for name in (*files, *links))):
                _shift(path)
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "address", "add", f"{self._network}.1/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")

    def close(self) -> None:
        """Take everything back."""
        for name in run("lxc-ls", "-P", self.directory, "--running", "-1").split():
            run("lxc-stop", "-P", self.directory, "-n", name, "-k")
        subprocess.run(["ip", "link", "delete", self.bridge], check=False, stderr=subprocess.DEVNULL)
        # The first lxc-start makes a cgroup to move itself to, which nobody takes back.
        for path in _pivots() - self._pivots_before:
            with contextlib.suppress(OSError):
                os.rmdir(path)

    def _full(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def _command(self, program: str, name: str, *arguments: str) -> list[str]:
        return [program, "-P", self.directory, "-n", self._full(name), *arguments]

    def _unpack(self, target: str) -> float:
        os.makedirs(target)
        return timed_ms(["tar", "-C", target, *_TAR, "-xpf", self.tarball])

    def _write_config(self, name: str) -> None:
        """Define a container by its file: lxc-create would want one directory as the rootfs."""
        number = self._numbers.setdefault(name, len(self._numbers) + 2)
        volume = f"{self.directory}/volumes/{name}"
        signals = [] if self._guest.is_systemd else [f"lxc.signal.halt = {self._guest.stop_signal}"]
        text = "\n".join(
            [
                "lxc.include = /usr/share/lxc/config/common.conf",
                "lxc.include = /usr/share/lxc/config/userns.conf",
                # The host's profile, where it has AppArmor: compiling one is not what is compared here.
                "lxc.apparmor.profile = unconfined",
                f"lxc.uts.name = {name}",
                f"lxc.rootfs.path = overlay:{self.lower}:{volume}/upper",
                "lxc.rootfs.options = userxattr",
                f"lxc.idmap = u 0 {_LXC_FIRST_ID} {_ID_COUNT}",
                f"lxc.idmap = g 0 {_LXC_FIRST_ID} {_ID_COUNT}",
                "lxc.net.0.type = veth",
                f"lxc.net.0.link = {self.bridge}",
                f"lxc.net.0.veth.pair = {self.bridge}p{number}",
                "lxc.net.0.flags = up",
                "lxc.net.0.name = eth0",
                f"lxc.net.0.ipv4.address = {self._network}.{number}/24",
                f"lxc.net.0.ipv4.gateway = {self._network}.1",
                *signals,
            ]
        )
        home = f"{self.directory}/{self._full(name)}"
        os.makedirs(home)
        Path(f"{home}/config").write_text(f"{text}\n", encoding="ascii")

    def create(self, name: str) -> float:
        """Do what lxc-create's templates do: unpack an archive for this container."""
        unpacked_ms = self._unpack(f"{self.directory}/unpacked/{name}")
        begin = time.perf_counter()
        self._write_config(name)
        return unpacked_ms + (time.perf_counter() - begin) * 1000

    def destroy(self, name: str) -> float:
        """Remove what create made."""
        del self._numbers[name]
        home = f"{self.directory}/{self._full(name)}"
        return timed_ms(["rm", "-rf", home, f"{self.directory}/unpacked/{name}"])

    def define(self, names: list[str]) -> None:
        """Make containers on an overlay of the shared tree, without measuring it."""
        for name in names:
            self._write_config(name)
            self._make_volume(name)

    def _make_volume(self, name: str) -> None:
        # Container root makes the overlay's work directory beside the upper.
        for path in (f"{self.directory}/volumes/{name}", self.upper(name)):
            os.makedirs(path)
            os.chown(path, _LXC_FIRST_ID, _LXC_FIRST_ID)

    def start(self, name: str) -> float:
        return timed_ms(self._command("lxc-start", name, "-d"))

    def start_all(self, names: list[str]) -> float:
        begin = time.perf_counter()
        for name in names:
            self.start(name)
        return (time.perf_counter() - begin) * 1000

    def stop(self, name: str) -> float:
        return timed_ms(self._command("lxc-stop", name))

    def kill(self, name: str) -> float:
        return timed_ms(self._command("lxc-stop", name, "-k"))

    def kill_all(self, names: list[str]) -> float:
        return sum(self.kill(name) for name in names)

    def true(self, name: str) -> float:
        return timed_ms(self._command("lxc-attach", name, "--clear-env", "--", "/bin/true"))

    def shell(self, name: str, script: str) -> str:
        """Run a script in a container that runs, and return its output."""
        return run(*self._command("lxc-attach", name, "--clear-env", "--", "/bin/sh", "-c", script))

    def upper(self, name: str) -> str:
        """Return the directory of what a container wrote."""
        return f"{self.directory}/volumes/{name}/upper"

    def empty(self, name: str) -> None:
        """Forget what a stopped container wrote."""
        shutil.rmtree(f"{self.directory}/volumes/{name}")
        self._make_volume(name)

    def list_all(self) -> float:
        return timed_ms(["lxc-ls", "-P", self.directory, "-f"])

    def init_pid(self, name: str) -> int:
        return int(run(*self._command("lxc-info", name, "-p", "-H")))

    def manager_pids(self) -> list[int]:
        """Return the monitors: one process for each running container."""
        title = f"[lxc monitor] {self.directory} ".encode()
        pids = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{entry}/cmdline").read_bytes().startswith(title):
                        pids.append(int(entry))
        return sorted(pids)


_TAR = ("--xattrs", "--xattrs-include=*", "--numeric-owner")


def _pivots() -> set[str]:
    patterns = ("lxc.pivot", "*/lxc.pivot")
    return {str(path) for pattern in patterns for path in Path("/sys/fs/cgroup").glob(pattern)}


def _shift(path: str) -> None:
    """Add the first id to a path's owners and keep its mode (ping's capability goes)."""
    status = os.lstat(path)
    if status.st_uid >= _LXC_FIRST_ID:
        return
    os.lchown(path, status.st_uid + _LXC_FIRST_ID, status.st_gid + _LXC_FIRST_ID)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(path, stat.S_IMODE(status.st_mode))


def _free_network(tag: str) -> str:
    """Return the first three numbers of a /24 that nothing on this host routes."""
    routes = run("ip", "-4", "route", "show", "table", "all")
    begin = int(tag, 16)
    for step in range(256):
        network = f"10.{200 + begin % 50}.{(begin + step) % 256}"
        if f"{network}." not in routes:
            return network
    raise Failed("no free network for LXC's bridge")


@contextlib.contextmanager
def _many_watchers() -> Iterator[None]:
    """Let 50 systemds run: they share root's inotify instances, 128 by default, whoever starts them."""
    limit = Path("/proc/sys/fs/inotify/max_user_instances")
    before = limit.read_text(encoding="ascii")
    if int(before) < _INOTIFY_INSTANCES:
        limit.write_text(str(_INOTIFY_INSTANCES), encoding="ascii")
    try:
        yield
    finally:
        limit.write_text(before, encoding="ascii")


@contextlib.contextmanager
def both(template: str, templates: str | None = None) -> Iterator[tuple[Lxc, Sysctr, Guest]]:
    """Make both sides ready with one template; `templates` is a directory that keeps it for the next run."""
    # What ends us must not leave containers and bridges behind.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with (
            _many_watchers(),
            InstalledNode() as node,
            tempfile.TemporaryDirectory(prefix="sl-", dir="/tmp") as directory,
        ):
            layers = f"{node.layout.pool}/layers"
            kept = f"{templates}/{template}" if templates else ""
            if kept and os.path.isdir(kept):
                os.makedirs(layers, mode=0o700)
                os.chmod(node.layout.pool, 0o700)
                run("cp", "-a", kept, layers)
            else:
                node.run("template", "build", template, timeout_s=900)
            shown = node.json("template", "show", template)
            if kept and not os.path.isdir(kept):
                os.makedirs(templates or "", exist_ok=True)
                run("cp", "-a", f"{layers}/{shown['layer']}", kept)
            guest = Guest(f"{layers}/{shown['layer']}/rootfs", shown["stop_signal"])
            lxc = Lxc(directory, node.layout.tag, guest)
            try:
                lxc.open()
                yield lxc, Sysctr(node, template), guest
            finally:
                lxc.close()
    finally:
        signal.signal(signal.SIGTERM, before)
