"""Hosts that trust each other, joined by cables, and what tests ask of two of them at once."""

import contextlib
import itertools
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sysctr.cgroup.detect import open_driver
from tests.disk import MADE_BY
from tests.node import Node, TemplateStore, cable, join
from tests.wait import wait_until

PORT = 8645
SUBNET = "10.77.0.0/24"
_NETWORKS = ("192.0.2", "198.51.100", "203.0.113")
_ENDED = ("done", "failed", "cancelled", "interrupted")

# Run in the user namespace of a container, whose eyes see owners, capabilities and access lists as it does.
_ENTERED = ("/usr/bin/python3", "-I", "-c")
_LOOK = """
import hashlib, json, os, stat, sys
found, groups = {}, {}
root = sys.argv[1]
def look(path):
    status = os.lstat(path)
    entry = [oct(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns]
    names = os.listxattr(path, follow_symlinks=False)
    entry.append({name: os.getxattr(path, name, follow_symlinks=False).hex() for name in sorted(names)})
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            entry += [status.st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    elif stat.S_ISLNK(status.st_mode):
        entry.append(os.readlink(path))
    elif not stat.S_ISDIR(status.st_mode):
        entry.append(status.st_rdev)
    relative = os.fsencode(os.path.relpath(path, root)).decode("ascii", "backslashreplace")
    if not stat.S_ISDIR(status.st_mode):
        entry.append(groups.setdefault((status.st_dev, status.st_ino), relative))
    found[relative] = entry
for name in sys.argv[2:]:
    top = root + name
    look(top)
    for directory, directories, names in os.walk(top):
        directories.sort()
        for one in sorted(directories + names):
            look(directory + "/" + one)
json.dump(found, sys.stdout)
"""
_EVERYTHING = """
import os, socket, struct, sys
os.chdir(sys.argv[1] + "/srv")
def write(name, text="x"):
    with open(name, "w") as file:
        file.write(text)
for name in ("plain", "new\\nline", "n" * 255, "-rf", "two words", os.fsdecode(b"not utf-8 \\xff\\xfe")):
    write(name, repr(name))
os.mkdir("dir")
os.chmod("dir", 0o2750)
def acl(*entries):
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in entries)
none = 0xFFFFFFFF
entries = ((1, 7, none), (2, 7, 33), (4, 5, none), (16, 7, none), (32, 0, none))
os.setxattr("dir", "system.posix_acl_access", acl(*entries))
os.setxattr("dir", "system.posix_acl_default", acl(*entries))
write("dir/ping")
os.setxattr("dir/ping", "security.capability", struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0))
write("owned")
os.chown("owned", 1000, 65534)
os.chmod("owned", 0o6711)
os.link("owned", "dir/other name")
with open("holes", "wb") as file:
    file.truncate(200 << 20)
    file.seek(100 << 20)
    file.write(b"in the middle")
os.setxattr("plain", "user.mine", bytes(range(256)))
os.symlink("/etc/shadow", "link")
os.mkfifo("pipe", 0o620)
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind("socket")
os.utime("plain", ns=(3, 1_000_000_000_000_000_007))
os.utime("link", ns=(4, 1_100_000_000_000_000_001), follow_symlinks=False)
os.mkdir("many")
for number in range(int(sys.argv[2])):
    write(f"many/{number}", str(number))
os.utime("many", ns=(5, 1_200_000_000_000_000_003))
# What a template has, and this container has not.
os.unlink("../bin/vi")
"""


class Hosts:
    """Some hosts, each known to the others by its name here."""

    def __init__(self, nodes: dict[str, Node]) -> None:
        self.nodes = nodes
        self._cables: list[dict[Node, str]] = []
        for number, (one, other) in enumerate(itertools.combinations(nodes.values(), 2)):
            join(one, other, _NETWORKS[number])
            self._cables.append(cable(one, other))

    def name(self, node: Node) -> str:
        """Return what the other hosts call a node."""
        return next(name for name, one in self.nodes.items() if one is node)

    def other(self, node: Node) -> Node:
        """Return the other host of two."""
        (found,) = (one for one in self.nodes.values() if one is not node)
        return found

    def acquaint(self) -> None:
        """Make all trust each other, with the two commands of the README."""
        for issuer, joiner in itertools.combinations(self.nodes, 2):
            trust(self.nodes[issuer], issuer, self.nodes[joiner], joiner)

    def cut(self, one: Node, other: Node, *, silently: bool = False) -> None:
        """Pull the cable between two hosts, and unless silently let their connections time out at once."""
        ends = self._ends(one, other)
        for node, link in ends.items():
            node.shell("ip", "link", "set", link, "down")
        for node in () if silently else ends:
            self.reset(node)

    def mend(self, one: Node, other: Node) -> None:
        """Plug the cable in again."""
        for node, link in self._ends(one, other).items():
            node.shell("ip", "link", "set", link, "up")

    @staticmethod
    def reset(node: Node) -> None:
        """End the connections of a host with its peers, as the kernel does when they have timed out."""
        node.shell("ss", "-K", "state", "established", f"( sport = :{PORT} or dport = :{PORT} )")

    def _ends(self, one: Node, other: Node) -> dict[Node, str]:
        return next(ends for ends in self._cables if ends.keys() == {one, other})


def trust(issuer: Node, issuer_name: str, joiner: Node, joiner_name: str) -> None:
    """Make two hosts trust each other, and let each call the other by a name of the test."""
    token = issuer.json("peer", "token")["token"]
    joiner.run("peer", "join", "-", "--name", issuer_name, stdin=f"{token}\n".encode())
    # Both are on one machine and say that they are called as it is.
    (arrived,) = (
        one["name"] for one in issuer.json("peer", "list") if one["name"] not in ("left", "right", "third")
    )
    issuer.run("peer", "rename", arrived, joiner_name)


@contextlib.contextmanager
def acquainted(
    templates: TemplateStore | None,
    *names: str,
    keep: bool = False,
    settings: dict[str, str] | None = None,
    wanted: dict[str, tuple[str, ...]] | None = None,
    before: "dict[str, Callable[[Node], AbstractContextManager[None]]] | None" = None,
) -> Iterator[Hosts]:
    """Give hosts that trust each other.

    By the name of a host: `settings` is what stands in its host.toml, `wanted` its templates instead of tiny,
    and `before` is entered before its daemon runs.
    """
    with contextlib.ExitStack() as stack:
        hosts = Hosts({name: stack.enter_context(Node(own_network=True, keep=keep)) for name in names})
        for name, node in hosts.nodes.items():
            if before and name in before:
                stack.enter_context(before[name](node))
            if templates is not None:
                templates.give(node, *(wanted or {}).get(name, ("tiny",)))
            os.makedirs(node.layout.etc, exist_ok=True)
            own = (settings or {}).get(name, f'[network]\nsubnet = "{SUBNET}"\n')
            Path(node.layout.host_config).write_text(f"schema = 1\n{own}")
            points = f"{node.root}/points"
            os.mkdir(points)
            node.variables["SYSCTR_FAULT_WAIT"] = points
        hosts.acquaint()
        yield hosts
        for node in hosts.nodes.values():
            logs = node.logs()
            assert "Traceback" not in logs, logs


@contextlib.contextmanager
def disk_at(node: Node, directory: str, fstype: str, size_bytes: int) -> Iterator[None]:
    """Mount a fresh file system at a directory of a node, which alone sees it."""
    image = f"{node.root}-{fstype}.img"
    argv, _ = MADE_BY[fstype]
    try:
        with open(image, "wb") as file:
            file.truncate(size_bytes)
        subprocess.run([*argv, image], check=True, stdout=subprocess.DEVNULL)
        node.shell("mkdir", "-p", directory)
        node.shell("mount", "-o", "loop", image, directory)
        node.shell("chmod", "700", directory)
        yield
    finally:
        os.unlink(image)


class Stop:
    """A point at which a daemon of a node stops when it comes there; a context manager."""

    def __init__(self, node: Node, point: str) -> None:
        self.point = point
        self._path = f"{node.variables['SYSCTR_FAULT_WAIT']}/{point}"
        self._fd = -1

    def __enter__(self) -> "Stop":
        os.mkfifo(self._path)
        return self

    def __exit__(self, *_error: object) -> None:
        Path(self._path).unlink(missing_ok=True)
        self.release()

    def reached(self) -> bool:
        """Tell whether it stands there now; the next one who comes does not stop any more."""
        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        os.unlink(self._path)
        return True

    def wait(self, node: Node, number: str, deadline_s: float = 30) -> None:
        """Wait until it stands there; it is on the way there as long as a task goes on."""

        def there() -> bool:
            over = task(node, number)["state"] in _ENDED
            if self.reached():
                return True
            assert not over, f"{self.point} was not come to: {task(node, number)}{node.logs()}"
            return False

        wait_until(there, deadline_s, f"a daemon at {self.point}")

    def release(self) -> None:
        """Let it go on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Watch(threading.Thread):
    """Looks again and again which hosts have processes of containers; two at once is what must not be."""

    def __init__(self, *nodes: Node) -> None:
        super().__init__(daemon=True)
        self._drivers = [open_driver(node.layout) for node in nodes]
        self._ended = threading.Event()
        self.looks = 0
        # How often more than one host was seen to run something.
        self.doubles = 0

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.wait(0.01):
            # The first again, for it may have ended before the second began.
            if sum(_runs(driver) for driver in self._drivers) > 1 and _runs(self._drivers[0]):
                self.doubles += 1
            self.looks += 1


def _runs(driver: Any) -> bool:
    for number in driver.list_ids():
        with contextlib.suppress(OSError):
            if driver.pids(number):
                return True
    return False


def runs_anything(node: Node) -> bool:
    """Tell whether any container of a host has a process, whatever its daemon thinks."""
    return _runs(open_driver(node.layout))


# What tests ask of one host


def containers(node: Node) -> dict[str, dict[str, Any]]:
    """Return the containers of a host by their names, as its API lists them."""
    status, answer = node.api("GET", "/1/containers")
    assert status == 200, answer
    return {one["name"]: one for one in answer["containers"]}  # type: ignore[index]


def migrations(node: Node) -> list[dict[str, Any]]:
    """Return what is on its way on a host."""
    status, answer = node.api("GET", "/1/migrations")
    assert status == 200, answer
    return answer["migrations"]  # type: ignore[index]


def begin(node: Node, ref: str, peer: str, verb: str = "migrate", **options: object) -> str:
    """Begin to move a container and return the task's id."""
    status, answer = node.api("POST", f"/1/containers/{ref}/{verb}", {"peer": peer, **options})
    assert status == 202, answer
    return answer["task"]["id"]  # type: ignore[index]


def task(node: Node, number: str) -> dict[str, Any]:
    """Return a task as the API tells of it."""
    status, answer = node.api("GET", f"/1/tasks/{number}")
    assert status == 200, answer
    return answer["task"]  # type: ignore[index]


def ended(node: Node, number: str, deadline_s: float = 60) -> dict[str, Any]:
    """Wait for the end of a task and return it."""

    def over() -> dict[str, Any] | None:
        found = task(node, number)
        return found if found["state"] in _ENDED else None

    return wait_until(over, deadline_s, f"the end of task {number}")


def move(node: Node, *arguments: str, verb: str = "migrate", **options: Any) -> dict[str, Any]:
    """Move one container with the command and return its report."""
    (done,) = node.json(verb, *arguments, **options)
    assert done["state"] == "done", done
    return done["result"]


def traces(node: Node) -> dict[str, Any]:
    """Return what a host has on its disk of containers, of any time, and of what was on its way."""

    def names(path: str) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(os.listdir(node.path(path)))
        return []

    where = node.layout
    return {
        "containers": [name for name in names(where.containers) if name != ".reserved"],
        "reserved": names(f"{where.containers}/.reserved"), "volumes": names(f"{where.pool}/volumes"),
        "configs": names(where.container_configs), "migrations": names(f"{where.lib}/migrations"),
        "cgroups": open_driver(where).list_ids(),
    }  # fmt: skip


def leftovers(node: Node) -> list[str]:
    """Return what doctor finds that belongs to nothing."""
    _, answer = node.api("GET", "/1/doctor")
    checks = [check for check in answer["checks"] if check["check"] == "leftovers"]  # type: ignore[index]
    assert checks
    return [check["detail"] for check in checks if check["state"] != "ok"]


def is_tidy(node: Node) -> bool:
    """Tell whether a host has nothing on its disk but its containers."""
    found = traces(node)
    numbers = set(found["containers"])
    return (
        not found["reserved"] and not found["migrations"]
        and {name.split("-")[0] for name in found["volumes"]} <= numbers
        and {name.removesuffix(".toml") for name in found["configs"]} == numbers
        and {str(number) for number in found["cgroups"]} <= numbers
    )  # fmt: skip


# What tests ask of one container


def _enter(node: Node, ref: str, code: str, *arguments: str) -> bytes:
    pid = node.json("info", ref)["pid"]
    done = subprocess.run(
        ["nsenter", "--user", "--target", str(pid), "-S", "0", "-G", "0", "--",
         *_ENTERED, code, f"/proc/{pid}/root", *arguments],
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def make_everything(node: Node, ref: str, many: int = 100) -> None:
    """Put every kind of file into /srv of a running container, and so many small ones."""
    _enter(node, ref, _EVERYTHING, str(many))


def look(node: Node, ref: str, *directories: str) -> dict[str, Any]:
    """Return all that a running container sees of files below directories, down to the last attribute."""
    return json.loads(_enter(node, ref, _LOOK, *directories))


def pulled(node: Node, ref: str, path: str) -> str | None:
    """Return a file of a container, running or stopped; None where there is none."""
    with tempfile.TemporaryDirectory() as directory:
        done = node.run("pull", f"{ref}:{path}", f"{directory}/file", check=False)
        return Path(f"{directory}/file").read_text().strip() if done.status == 0 else None


def seconds_since(began: float) -> float:
    """Return how long ago that was."""
    return round(time.monotonic() - began, 1)
