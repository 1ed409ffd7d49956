"""A picture of what a session of tests could leave on the host, and the comparison of two such pictures.

What carries the name of a root that this session made is always its own. The rest of a difference counts
only where nothing else works on the machine meanwhile (CI says so with SYSCTR_REQUIRE).
"""

import contextlib
import json
import os
import re
import subprocess
import uuid
from collections.abc import Iterable

from sysctr.paths import Layout

SESSION_VARIABLE = "SYSCTR_TEST_SESSION"
# Beside the tests a live installation may run, and a service manager that starts and ends what it likes. A
# cgroup of ours has a part with our name and a tag.
_NOT_OURS = re.compile(
    r"cgroup (?!\S*/sysctr-)"
    r"|link (sysctr0|veth\d+i\d+)$"
    r"|mount \S+ /run/(user|credentials)/"
)
_names: set[str] = set()


def start_session() -> None:
    """Mark this process, and so all that it starts, as one session of tests."""
    os.environ.setdefault(SESSION_VARIABLE, uuid.uuid4().hex)
    _names.add(os.environ[SESSION_VARIABLE])


def register(root: str) -> None:
    """Make whatever carries the names of this SYSCTR_ROOT, or lies below it, this session's own."""
    where = Layout(root)
    _names.update({f"{where.root}/", where.subid_owner, where.nft_table, where.bridge, f" v{where.tag}"})


def register_directory(directory: str) -> None:
    """Make what is mounted or backed by files below the directory this session's own."""
    _names.add(f"{directory}/")


def picture() -> frozenset[str]:
    """Return everything of the kinds that tests could leave, one line each."""
    return frozenset(
        [
            *_mounts(), *_cgroups(), *_links(), *_namespaces(), *_tables(), *_loops(), *_accounts(),
            *_processes(),
        ]
    )  # fmt: skip


def left_behind(before: frozenset[str], after: frozenset[str], *, alone: bool) -> list[str]:
    """Return what is new and ours; `alone` means that all that is new must be ours."""
    new = after - before
    return sorted(
        line for line in new
        if any(name in line for name in _names) or (alone and not _NOT_OURS.match(line))
    )  # fmt: skip


def _mounts() -> Iterable[str]:
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        for line in file:
            fields = line.split()
            yield f"mount {fields[fields.index('-') + 1]} {fields[4]}"


def _cgroups() -> Iterable[str]:
    with open("/proc/self/mounts", encoding="utf-8") as file:
        points = [line.split()[1] for line in file if line.split()[2] in ("cgroup", "cgroup2")]
    for point in points:
        for path, _directories, _files in os.walk(point):
            yield f"cgroup {path}"


def _links() -> Iterable[str]:
    return (f"link {name}" for name in os.listdir("/sys/class/net"))


def _namespaces() -> Iterable[str]:
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir("/run/netns"):
            yield f"netns {name}"


def _tables() -> Iterable[str]:
    with contextlib.suppress(OSError):
        done = subprocess.run(["nft", "-j", "list", "tables"], capture_output=True, check=False)
        if done.returncode == 0:
            for entry in json.loads(done.stdout)["nftables"]:
                if "table" in entry:
                    yield f"nft table {entry['table']['family']} {entry['table']['name']}"


def _loops() -> Iterable[str]:
    for name in os.listdir("/sys/block"):
        with contextlib.suppress(OSError), open(f"/sys/block/{name}/loop/backing_file") as file:
            yield f"loop {name} of {file.read().strip()}"


def _accounts() -> Iterable[str]:
    for path in ("/etc/subuid", "/etc/subgid", "/etc/group"):
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
            for line in file:
                yield f"{path} {line.strip()}"


def _processes() -> Iterable[str]:
    """Find processes by what they inherited from us: this session's mark or one of its roots."""
    marks = [name.rstrip("/").encode() for name in _names if "/" in name or len(name) == 32]
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            with open(f"/proc/{entry}/environ", "rb") as file:
                environment = file.read().split(b"\0")
            values = {item.partition(b"=")[2] for item in environment if item.startswith(b"SYSCTR_")}
            if values.intersection(marks):
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    command = os.fsdecode(file.read().replace(b"\0", b" ")).strip()
                root = next((os.fsdecode(value) for value in values if b"/" in value), "")
                yield f"process {entry} {command[:80]} {root}/ {os.environ.get(SESSION_VARIABLE, '')}"
