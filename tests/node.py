"""A Node is a whole sysctr host below a directory of its own, run from this checkout as a user runs it.

Two of them on one machine share nothing; with `own_network` a node has a network and a mount namespace too,
and is then a second host as far as sysctr can tell.
"""

import contextlib
import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sysctr.engine import removal
from sysctr.paths import Layout
from tests import leaks

CHECKOUT = Path(__file__).parents[1]
_START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from sysctr.cli import main; sys.exit(main())"
_KEPT = ("PATH", "HOME", "LANG", "TERM", leaks.SESSION_VARIABLE, "http_proxy", "https_proxy", "no_proxy")


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: bytes

    @property
    def out(self) -> str:
        return self.stdout.decode(errors="replace")

    @property
    def err(self) -> str:
        return self.stderr.decode(errors="replace")

    def __str__(self) -> str:
        return f"sysctr {' '.join(self.argv)}: status {self.status}\n{self.out}{self.err}"


class Node:
    """One host of sysctr. Use it as a context manager: leaving it destroys everything it made."""

    def __init__(self, *, own_network: bool = False, keep: bool = False) -> None:
        # A socket's path has 108 characters at most, which pytest's tmp_path uses up.
        self.root = tempfile.mkdtemp(prefix="sc-", dir="/tmp")
        self.layout = Layout(self.root)
        self.keep = keep
        # What every command of this node is started with besides, and so its daemon.
        self.variables: dict[str, str] = {}
        leaks.register(self.root)
        self._enter: list[str] = []
        self._holder: subprocess.Popen[bytes] | None = None
        self._started: list[subprocess.Popen[bytes]] = []
        if own_network:
            self._make_namespaces()

    def __enter__(self) -> "Node":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def argv(self, *arguments: str) -> list[str]:
        """Return the command line of `sysctr ARGUMENTS` on this node."""
        return [*self._enter, sys.executable, "-I", "-c", _START, str(CHECKOUT), *arguments]

    def environment(self, extra: dict[str, str] | None = None) -> dict[str, str]:
        """Return what a command of this node is started with."""
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        return {**kept, "SYSCTR_ROOT": self.root, **self.variables, **(extra or {})}

    def run(
        self,
        *arguments: str,
        check: bool = True,
        stdin: bytes | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float = 300,
    ) -> Result:
        """Run `sysctr ARGUMENTS` to its end; with `check` a status other than 0 fails the test."""
        done = subprocess.run(
            self.argv(*arguments),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            env=self.environment(env),
            timeout=timeout_s,
            check=False,
        )
        result = Result(arguments, done.returncode, done.stdout, done.stderr)
        if check and result.status != 0:
            raise AssertionError(f"{result}{self.logs()}")
        return result

    def json(self, *arguments: str, **options: object):
        """Run a command with --json and return what it printed."""
        return json.loads(self.run(*arguments, "--json", **options).stdout)  # type: ignore[arg-type]

    def popen(self, *arguments: str, env: dict[str, str] | None = None, **options) -> subprocess.Popen[bytes]:
        """Start a command that goes on; whatever still runs is ended with the node."""
        process = subprocess.Popen(self.argv(*arguments), env=self.environment(env), **options)
        self._started.append(process)
        return process

    def popen_program(self, *argv: str) -> subprocess.Popen[bytes]:
        """Start any program as this host would, with pipes; it is ended with the node."""
        process = subprocess.Popen(
            [*self._enter, *argv], env=self.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._started.append(process)
        return process

    def shell(self, *argv: str, check: bool = True) -> Result:
        """Run any program as this host would: in its network and mount namespace."""
        done = subprocess.run(
            [*self._enter, *argv], capture_output=True, env=self.environment(), check=False, timeout=300
        )
        result = Result(argv, done.returncode, done.stdout, done.stderr)
        if check and result.status != 0:
            raise AssertionError(str(result))
        return result

    def wait(self, ref: str, state: str, deadline_s: float = 60) -> None:
        """Wait until a container is running, booted or stopped."""
        self.run("wait", ref, "--state", state, "--timeout", f"{deadline_s:g}", timeout_s=deadline_s + 30)

    def api(self, method: str, path: str, body: object = None) -> tuple[int, object]:
        """Make one request of the API without our own client; return the status and the JSON."""
        connection = http.client.HTTPConnection("localhost", timeout=300)
        connection.sock = socket.socket(socket.AF_UNIX)
        try:
            connection.sock.settimeout(300)
            connection.sock.connect(self.layout.api_socket)
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            data = answer.read()
            return answer.status, json.loads(data) if data else None
        finally:
            connection.close()

    def pids(self) -> dict[str, int]:
        """Return the "daemon", "supervisor" and "keeper" of this node that run."""
        return removal.service_pids(self.layout)

    def state(self, ref: str) -> str:
        """Return the state of a container in one word."""
        return self.json("info", ref)["state"]

    def logs(self) -> str:
        """Return the ends of the log files, for the message of a failed test."""
        texts = []
        for path in sorted(Path(self.layout.log).glob("*.log")):
            texts.append(f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}")
        return "\n".join(texts)

    def close(self) -> None:
        """Destroy the containers, end every process, and take the node's traces off the host."""
        try:
            for process in self._started:
                if process.poll() is None:
                    process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout, process.stderr):
                    if pipe is not None:
                        pipe.close()
            if os.path.exists(self.layout.api_socket):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.run("destroy", "--all", "--force", "--yes", check=False, timeout_s=120)
            stubborn = removal.stop_processes(self.layout)
            self._in_namespaces(removal.unmount_all)
            self._in_namespaces(removal.remove_network)
            removal.remove_cgroups(self.layout)
            removal.remove_id_ranges(self.layout)
            assert not stubborn, f"processes {stubborn} of {self.root} would not end"
        finally:
            if self._holder is not None:
                self._holder.stdin.close()
                self._holder.stdout.close()
                self._holder.wait()
            if not self.keep:
                _unmount_below(self.root)
                # A program that the daemon started to empty its trash may still be at it.
                shutil.rmtree(self.root, onerror=_unless_gone)

    def _make_namespaces(self) -> None:
        # sysfs shows the links of the network namespace it was mounted in; a file holds nothing open, a
        # process does: it ends when its standard input is closed, so with us whatever happens.
        script = (
            "mkdir -p $0/hostsys && mount --rbind /sys $0/hostsys && mount -t sysfs sysfs /sys "
            "&& mount --rbind $0/hostsys/fs/cgroup /sys/fs/cgroup && umount --lazy $0/hostsys "
            "&& rmdir $0/hostsys && ip link set lo up && echo ready && exec cat"
        )
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--net", "--propagation", "private", "sh", "-c", script, self.root],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment(),
        )  # fmt: skip
        assert self._holder.stdout.readline() == b"ready\n", "cannot make the namespaces of a node"
        self._enter = ["nsenter", "--target", str(self._holder.pid), "--mount", "--net", "--"]

    @property
    def netns_pid(self) -> int:
        """Return a process whose network namespace is this node's."""
        return self._holder.pid if self._holder else os.getpid()

    def path(self, path: str) -> str:
        """Return where the test finds what this node sees at a path, also below mounts of its own."""
        return f"/proc/{self._holder.pid}/root{path}" if self._holder else path

    def _in_namespaces(self, function) -> None:
        if self._holder is None:
            function(self.layout)
            return
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); from sysctr.engine import removal; "
            f"from sysctr.paths import Layout; removal.{function.__name__}(Layout(sys.argv[2]))"
        )
        self.shell(sys.executable, "-I", "-c", code, str(CHECKOUT), self.root)


def join(left: Node, right: Node, network: str = "192.0.2") -> dict[Node, str]:
    """Lay a cable between two nodes with their own networks; return each one's address on it."""
    names = cable(left, right)
    addresses = {left: f"{network}.1", right: f"{network}.2"}
    subprocess.run(
        ["ip", "link", "add", names[left], "netns", str(left.netns_pid), "type", "veth",
         "peer", "name", names[right], "netns", str(right.netns_pid)],
        check=True,
    )  # fmt: skip
    for node, name in names.items():
        node.shell("ip", "address", "add", f"{addresses[node]}/24", "dev", name)
        node.shell("ip", "link", "set", name, "up")
    return addresses


def cable(left: Node, right: Node) -> dict[Node, str]:
    """Return what the ends of the cable between two nodes are called."""
    # Of both tags, for a node may have several: 15 characters at most.
    tags = {left: left.layout.tag, right: right.layout.tag}
    return {left: f"sl{tags[left]}{tags[right][:4]}", right: f"sr{tags[right]}{tags[left][:4]}"}


def _unless_gone(_function: object, _path: str, raised: tuple) -> None:
    if not isinstance(raised[1], FileNotFoundError):
        raise raised[1]


def _unmount_below(root: str) -> None:
    """Detach what is mounted below the root, or rmtree would walk into it."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        points = [line.split()[4] for line in file]
    for point in sorted(points, key=len, reverse=True):
        if point.startswith(f"{root}/"):
            subprocess.run(["umount", "--lazy", point], check=True)


class TemplateStore:
    """Templates built once in a session and given to every node by hard links: the trees never change."""

    def __init__(self, builder: Node) -> None:
        self.builder = builder
        self._layers: dict[str, str] = {}

    def give(self, node: Node, *names: str) -> None:
        """Make the templates exist on a node whose daemon does not run yet."""
        for name in names:
            if name not in self._layers:
                self.builder.run("template", "build", name, timeout_s=900)
                self._layers[name] = self.builder.json("template", "show", name)["layer"]
            target = f"{node.layout.pool}/layers"
            os.makedirs(target, mode=0o700, exist_ok=True)
            os.chmod(node.layout.pool, 0o700)
            source = f"{self.builder.layout.pool}/layers/{self._layers[name]}"
            subprocess.run(["cp", "-al", source, target], check=True)


def kill(pid: int) -> None:
    """Kill one process of a node and wait until it is gone, with all its threads and what they had open."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], 10)[0], f"process {pid} does not end"
    finally:
        os.close(pidfd)


@contextlib.contextmanager
def two_nodes(*, keep: bool = False) -> Iterator[tuple[Node, Node]]:
    """Two hosts with their own networks and a cable between them (192.0.2.1 and 192.0.2.2)."""
    with Node(own_network=True, keep=keep) as left, Node(own_network=True, keep=keep) as right:
        join(left, right)
        yield left, right
