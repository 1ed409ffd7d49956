"""Pools of every driver for tests, each on a disk of its own, and the files of their volumes."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sysctr.engine.job import JobRunner
from sysctr.engine.trees import TreeWorker
from sysctr.linux import quota
from sysctr.linux.mount import MNT_DETACH, mount, umount2
from sysctr.linux.quota import Quota
from sysctr.storage import images
from sysctr.storage.base import Base, Driver, RootSpec
from sysctr.storage.drivers import open_driver
from tests.capabilities import CAP_SYS_RESOURCE, without_capability
from tests.disk import disk
from tests.node import Node

MIB = 1 << 20
CHECKOUT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Kind:
    """A driver on a file system, and the limit its volumes are made with."""

    driver: str
    fstype: str
    size_bytes: int | None = None
    quotas: bool = False  # its file system keeps limits of projects


KINDS = {
    "overlay": Kind("overlay", "ext4"),
    "overlay-limited": Kind("overlay", "ext4", 64 * MIB),
    "quota-ext4": Kind("overlay", "ext4", 64 * MIB, quotas=True),
    "quota-xfs": Kind("overlay", "xfs", 64 * MIB, quotas=True),
    "btrfs": Kind("btrfs", "btrfs"),
    "btrfs-limited": Kind("btrfs", "btrfs", 64 * MIB),
    "loop-xfs": Kind("loop", "xfs", 64 * MIB),
    "loop-ext4": Kind("loop", "ext4", 64 * MIB),
    "zfs": Kind("zfs", "zfs"),
    "zfs-limited": Kind("zfs", "zfs", 64 * MIB),
}

# Where there is no reflink, a snapshot of an image is refused.
WITH_SNAPSHOTS = tuple(name for name in KINDS if name != "loop-ext4")
LIMITED = tuple(name for name, kind in KINDS.items() if kind.size_bytes)


def parameters(names: Iterable[str] = KINDS) -> list:
    """Return these of KINDS as parameters of a test, each skipped where its file system cannot be made."""

    def facts(name: str) -> tuple[str, ...]:
        # A pool of ZFS takes a file as it is.
        if KINDS[name].fstype == "zfs":
            return ("zfs",)
        return ("loop", KINDS[name].fstype, *(["prjquota"] if KINDS[name].quotas else []))

    return [pytest.param(name, marks=pytest.mark.needs(*facts(name))) for name in names]


_CALL = """
import json, sys
sys.path.insert(0, sys.argv[1])
from sysctr.cgroup import detect
from sysctr.engine.job import JobRunner
from sysctr.engine.plan import Idmap
from sysctr.engine.supervisor import SupervisorClient
from sysctr.engine.trees import TreeWorker
from sysctr.paths import Layout
from sysctr.storage.base import Base
from sysctr.storage.drivers import open_driver
kind, pool, run, root, stage, first, count, layer, tree, method, arguments = json.loads(sys.argv[2])
where = Layout(root)
cgroup = detect.open_driver(where).job_plan
worker = TreeWorker(JobRunner(SupervisorClient(where), stage, Idmap(first, count), b"", cgroup))
driver = open_driver(kind, pool, run)
driver.prepare()
known = {"$worker": worker, "$base": Base(layer, tree)}
values = [known.get(one, one) if isinstance(one, str) else one for one in arguments[0]]
getattr(driver, method)(*values, **arguments[1])
"""


class Pool:
    """A pool that is ready, with a template; `driver` is that of the daemon that runs now."""

    def __init__(self, kind: Kind, directory: str, run: str, base: Base, jobs: JobRunner) -> None:
        self.kind = kind
        self.directory = directory
        self.run = run
        self.base = base
        self.worker = TreeWorker(jobs)
        self._jobs = jobs
        # The supervisor's, which serves the processes that tests kill too.
        self._stage = jobs._stage
        self.driver = self._open()

    def _open(self) -> Driver:
        driver = open_driver(self.kind.driver, self.directory, self.run)
        driver.prepare()
        return driver

    def restart(self) -> Driver:
        """Do what a daemon does that starts after another one died."""
        self.driver = self._open()
        self.driver.sweep()
        self.driver.empty_trash()
        return self.driver

    def create(self, volume: str, **options: int) -> None:
        """Make a volume of the template, with the limit that this kind of pool is tried with."""
        self.driver.create(volume, self.base, self.worker, **{"size_bytes": self.kind.size_bytes, **options})

    def snapshot(self, volume: str, name: str, **note: str) -> None:
        """Take a snapshot of a volume that is not in use."""
        self.driver.snapshot(volume, name, note, self.worker)

    def clone(self, volume: str, snapshot: str, target: str) -> None:
        """Clone a snapshot, or a volume that is not in use ("")."""
        self.driver.clone(volume, snapshot, target, self.worker)

    @contextlib.contextmanager
    def opened(self, volume: str) -> Iterator[str]:
        """Activate a volume and show it at a directory, as its container sees it."""
        # A container's root has it over nothing that is the host's, and ext4 keeps no limit for who has it.
        with without_capability(CAP_SYS_RESOURCE), shown(self.driver.activate(volume)) as directory:
            yield directory
        self.driver.deactivate(volume)

    def write(self, volume: str, name: str, text: str) -> None:
        """Write a file of a volume."""
        with self.opened(volume) as directory:
            Path(directory, name).write_text(text)

    def read(self, volume: str, name: str, snapshot: str | None = None) -> str:
        """Return the content of a file of a volume or of a snapshot; "" for one that is not there."""
        with contextlib.ExitStack() as stack:
            if snapshot is None:
                directory = stack.enter_context(self.opened(volume))
            else:
                spec = stack.enter_context(self.driver.opened(volume, snapshot))
                directory = stack.enter_context(shown(spec))
            path = Path(directory, name)
            return path.read_text() if path.exists() else ""

    def quotas(self) -> list[Quota]:
        """Return all that the pool's file system knows of projects: limits, and what is used."""
        found: list[Quota] = []
        directory_fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            while known := quota.next_quota(directory_fd, found[-1].project + 1 if found else 1):
                found.append(known)
        finally:
            os.close(directory_fd)
        return found

    def forget_template(self) -> None:
        """Take the template's copy out of the pool, as before the first volume of it."""
        layer = f"{self.directory}/layers/{self.base.layer}"
        if os.path.exists(layer):
            os.rename(layer, f"{self.directory}/.trash/layer")
        self.driver.empty_trash()

    def call(self, method: str, *arguments: object, **options: object) -> None:
        """Call the driver, with $base and $worker in the arguments."""
        known = {"$worker": self.worker, "$base": self.base}
        values = [known.get(one, one) if isinstance(one, str) else one for one in arguments]
        getattr(self.driver, method)(*values, **options)

    def process(self, method: str, *arguments: object, fault: str = "", **options: object) -> int:
        """Call the driver in a process of its own and return its exit status; `fault` may kill it."""
        idmap = self._jobs.idmap
        request = [
            self.kind.driver, self.directory, self.run, self._stage.removesuffix("/run/stage"), self._stage,
            idmap.first, idmap.count, self.base.layer, self.base.tree, method, [arguments, options],
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CALL, str(CHECKOUT), json.dumps(request)],
            env={**os.environ, "SYSCTR_FAULT": fault}, check=False,
        )  # fmt: skip
        return done.returncode


@contextlib.contextmanager
def shown(root: RootSpec) -> Iterator[str]:
    """Show a root at a directory, for a look with the host's eyes: our own files, without an id map."""
    paths = {tree.name: tree.path for tree in root.trees}
    if not root.lowers:
        yield root.trees[0].path
        return

    def path(below: str) -> str:
        name, slash, rest = below.partition("/")
        return paths[name] + slash + rest

    lowers = [path(lower) for lower in root.lowers]
    if not root.upper and len(lowers) == 1:
        yield lowers[0]
        return
    options = f"lowerdir={':'.join(lowers)},userxattr"
    if root.upper:
        options += f",upperdir={path(root.upper)},workdir={path(root.work)}"
    with tempfile.TemporaryDirectory(prefix="sc-") as directory:
        mount("overlay", directory, "overlay", 0, options)
        try:
            yield directory
        finally:
            umount2(directory)


@contextlib.contextmanager
def pool(name: str, place: str, jobs: JobRunner, *options: str) -> Iterator[Pool]:
    """Make a pool of one of KINDS in a directory; `options` are those of its disk's mkfs."""
    kind = KINDS[name]
    directory, run = f"{place}/pool", f"{place}/run/storage"
    os.makedirs(directory)
    with disk(directory, kind.fstype, *options, size_bytes=320 * MIB, quotas=kind.quotas):
        # In a pool of overlay a template is where its layer is; other drivers make a layer of it.
        tree = f"{directory}/layers/base/rootfs" if kind.driver == "overlay" else f"{place}/template"
        os.makedirs(f"{tree}/etc")
        os.chmod(tree, 0o755)
        Path(tree, "etc/motd").write_text("base")
        Path(tree, "su").write_text("")
        os.chmod(f"{tree}/su", 0o4755)
        try:
            yield Pool(kind, directory, run, Base("base", tree), jobs)
        finally:
            if os.path.isdir(run):
                for entry in os.listdir(run):
                    if os.path.ismount(f"{run}/{entry}"):
                        with contextlib.suppress(OSError):
                            images.thaw(f"{run}/{entry}")
                        umount2(f"{run}/{entry}", MNT_DETACH)


def dataset(pool: Pool, name: str = "") -> str:
    """Return the full name of a dataset of a pool of ZFS, without a name that of the pool's own."""
    shown = ["zfs", "list", "-H", "-o", "name", pool.directory]
    parent = subprocess.run(shown, capture_output=True, text=True, check=True).stdout.strip()
    return f"{parent}/{name}" if name else parent


def property_of(name: str, what: str) -> str:
    """Return a property of a dataset, in bytes if it is a size."""
    get = ["zfs", "get", "-H", "-p", "-o", "value", what, name]
    return subprocess.run(get, capture_output=True, text=True, check=True).stdout.strip()


def datasets(pool: Pool, kind: str = "filesystem,snapshot") -> list[str]:
    """Return the names of all datasets below that of a pool."""
    parent = dataset(pool)
    shown = ["zfs", "list", "-H", "-r", "-t", kind, "-o", "name", parent]
    names = subprocess.run(shown, capture_output=True, text=True, check=True).stdout.split()
    return [name.removeprefix(f"{parent}/") for name in names if name != parent]


def stray_datasets(pool: Pool) -> list[str]:
    """Return the datasets of a pool of ZFS that no file of it names and that do not go by themselves."""
    noted = set()
    for directory in ("layers", "volumes", "held"):
        for path in Path(pool.directory, directory).rglob("*"):
            if path.is_file() and path.suffix != ".json":
                noted.update(path.read_text().split())
    return [
        name for name in datasets(pool)
        if name not in noted
        and not ("@" in name and property_of(dataset(pool, name), "defer_destroy") == "on")
    ]  # fmt: skip


def check_debian(node: Node, ref: str) -> None:
    """See that a container with Debian is up, has no device nodes of its own, and that setuid works in it."""
    node.wait(ref, "booted")

    def says(script: str) -> str:
        return node.run("exec", ref, "--", "sh", "-c", script).out.strip()

    assert says("systemctl is-system-running") == "running"
    assert "nodev" in says("findmnt -no OPTIONS /").split(",")
    assert says("mknod /null c 1 3 2>&1 || true").endswith("Operation not permitted")
    as_user = "setpriv --reuid=1000 --regid=1000 --clear-groups"
    assert says(f"cp /usr/bin/id /id && chmod 4755 /id && {as_user} /id -u && rm /id") == "0"
