"""Kills at every step of a backup and of a restore: the container is as it was or as it becomes, whole."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disk import disk
from tests.node import Node, TemplateStore, kill
from tests.system.guests import inside, shell
from tests.system.pools import Kept, host_keeping

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox", "loop")]

_BACKUP = ("backup.begun", "snapshot.temporary", "backup.written", "backup.beside.written", "backup.renamed")
_STOP = ("backup.stopped", "snapshot.temporary", "backup.written")
_NEW = ("restore.volumes.made", "restore.unpacked", "restore.enrolled", "restore.created")
_REPLACE = (
    "restore.journal.written", "restore.volumes.made", "restore.unpacked", "restore.journal.written:2",
    "restore.stopped", "restore.record.written", "restore.config.written", "restore.old.destroyed",
)  # fmt: skip


class Subject:
    """A running container with a volume of its own, and an archive from when all of it said "old"."""

    def __init__(self, kept: Kept, directory: Path) -> None:
        self.kept = kept
        self.host = kept.host
        self.directory = directory
        self.ref = kept.create()
        self.host.run("set", self.ref, kept.mount(0, "/data"))
        self.host.run("start", self.ref)
        self.mark("old")
        self.host.run("backup", self.ref, "--dir", str(directory))
        self.archive = f"{directory}/{self.archives()[0]}"

    def mark(self, word: str) -> None:
        """Write a word into all that the container has."""
        files = " ".join(f"/{where}/file" for where in ("root", "data", "etc"))
        shell(self.host, self.ref, f"for file in {files}; do echo {word} > $file; done")
        self.host.run("set", self.ref, f"description={word}")

    def says(self, ref: str = "") -> str:
        """Return the one word that all of a container says."""
        ref = ref or self.ref
        words = set(inside(self.host, ref, "cat /root/file /data/file /etc/file").split())
        words.add(self.host.api("GET", f"/1/containers/{ref}")[1]["container"]["description"])
        assert len(words) == 1, f"{ref} is of two times: {words}"
        return words.pop()

    def archives(self) -> list[str]:
        """Return the archives in the directory, where nothing else may be but what belongs to one."""
        names = sorted(os.listdir(self.directory))
        assert not [name for name in names if name.endswith((".dat", ".unfinished"))], names
        return [name for name in names if name.endswith(".tar.zst")]

    def is_whole(self, *others: str) -> None:
        """Assert that it runs and, with others, is all there is, down to volumes, journals, reservations."""
        host, refs = self.host, {self.ref, *others}
        for ref in refs:
            host.wait(ref, "running")
        _, listed = host.api("GET", "/1/containers")
        assert {one["name"] for one in listed["containers"]} == refs
        numbers = {str(one["id"]) for one in listed["containers"]}
        for ref in refs:
            assert host.api("GET", f"/1/containers/{ref}/snapshots")[1]["snapshots"] == []
        assert self.kept.leftovers() == []
        assert {name.split("-")[0] for name in self.kept.volumes()} == numbers, self.kept.volumes()
        where = Path(host.layout.containers)
        assert {path.name for path in where.iterdir()} - {".reserved"} == numbers
        assert os.listdir(where / ".reserved") == []
        assert not list(where.glob("*/journal.json*"))
        assert os.listdir(host.layout.backup_runs) == []

    def die_at(self, point: str, *arguments: str) -> None:
        """Run a command in which the daemon dies at a named place; another is there afterwards."""
        host = self.host
        kill(host.pids()["daemon"])
        done = host.run(*arguments, check=False, env={"SYSCTR_FAULT": point})
        # It failed since its daemon was gone, and not for a reason of its own.
        assert done.status != 0, f"{point} was not reached: {done}"
        assert "daemon" in done.err, done
        # The command may have started one for itself, which would die, too.
        if "daemon" in host.pids():
            kill(host.pids()["daemon"])
        host.run("daemon", "start")

    # The deaths

    def dies_in_a_backup(self, point: str) -> None:
        self.mark("new")
        self.die_at(point, "backup", self.ref, "--dir", str(self.directory), "--notes", "x", "--protected")
        made = [name for name in self.archives() if not self.archive.endswith(name)]
        assert len(made) == (point == "backup.renamed")
        for name in made:
            self.host.run("backup", "verify", f"{self.directory}/{name}")
            self.host.run("backup", "protect", "--off", f"{self.directory}/{name}")
            self.host.run("backup", "remove", f"{self.directory}/{name}")
        self.is_whole()
        assert self.says() == "new"

    def dies_while_stopped(self, point: str) -> None:
        self.mark("new")
        self.die_at(point, "backup", self.ref, "--mode", "stop", "--dir", str(self.directory))
        assert len(self.archives()) == 1
        self.is_whole()
        assert self.says() == "new"

    def dies_in_a_restore(self, point: str) -> None:
        host, restore = self.host, ("restore", self.archive, "--name", "second", "--pool", self.kept.pool)
        self.die_at(point, *restore)
        made = [one["name"] for one in host.json("list") if one["name"] == "second"]
        assert made == (["second"] if point == "restore.created" else [])
        if not made:
            self.is_whole()
            host.run(*restore)
        host.run("start", "second")
        assert self.says("second") == "old"
        self.is_whole("second")
        host.run("destroy", "second", "--force", "--yes")

    def dies_in_a_restore_in_place(self, point: str) -> None:
        host = self.host
        self.mark("new")
        before = host.json("info", self.ref)
        self.die_at(point, "restore", self.archive, str(before["id"]), "--force")
        self.is_whole()
        after = host.json("info", self.ref)
        there = _REPLACE.index(point) >= _REPLACE.index("restore.record.written")
        assert self.says() == ("old" if there else "new")
        assert after["uuid"] == before["uuid"]
        assert (after["generation"] > before["generation"]) == there
        assert [nic["mac"] for nic in after["nets"]] == [nic["mac"] for nic in before["nets"]]


@contextlib.contextmanager
def without_snapshots(templates: TemplateStore, directory: Path, *, keep: bool) -> Iterator[Kept]:
    """Give a host with a pool of images on ext4, which shares no blocks between files."""
    with disk(str(directory), "ext4", size_bytes=2 << 30), Node(keep=keep) as host:
        templates.give(host, "tiny")
        host.run("pool", "add", "kept", "--driver", "loop", "--path", f"{directory}/pool")
        yield Kept(host, "loop", "kept", f"{directory}/pool")


@contextlib.contextmanager
def subject_on(
    kind: str, templates: TemplateStore, make: pytest.TempPathFactory, *, keep: bool
) -> Iterator[Subject]:
    """Give a subject on one kind of storage."""
    giving = without_snapshots if kind == "loop-ext4" else host_keeping
    arguments = (templates,) if kind == "loop-ext4" else (kind, templates)
    with giving(*arguments, make.mktemp(kind), keep=keep) as kept:  # type: ignore[operator]
        yield Subject(kept, make.mktemp("dump"))
        logs = kept.host.logs()
        assert "Traceback" not in logs, logs


@pytest.fixture(scope="module")
def subject(
    pytestconfig: pytest.Config, templates: TemplateStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Subject]:
    """One on the storage that every host has."""
    with subject_on("overlay", templates, tmp_path_factory, keep=pytestconfig.getoption("keep")) as one:
        yield one


@pytest.mark.parametrize("point", _BACKUP)
def test_a_daemon_killed_in_a_backup(subject: Subject, point: str) -> None:
    subject.dies_in_a_backup(point)


@pytest.mark.parametrize("point", _STOP)
def test_a_container_that_was_stopped_for_a_backup_runs_again(subject: Subject, point: str) -> None:
    subject.dies_while_stopped(point)


@pytest.mark.parametrize("point", _NEW)
def test_a_daemon_killed_in_a_restore(subject: Subject, point: str) -> None:
    subject.dies_in_a_restore(point)


@pytest.mark.parametrize("point", _REPLACE)
def test_a_daemon_killed_in_a_restore_in_place(subject: Subject, point: str) -> None:
    subject.dies_in_a_restore_in_place(point)


@pytest.mark.parametrize("kind", ["btrfs", "loop-ext4"])
def test_other_storage_keeps_as_well_what_a_crash_interrupts(
    kind: str,
    pytestconfig: pytest.Config,
    templates: TemplateStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with subject_on(kind, templates, tmp_path_factory, keep=pytestconfig.getoption("keep")) as one:
        # Images on ext4 have no snapshots: their volumes are copied, or read while nobody uses them.
        if kind == "btrfs":
            one.dies_in_a_backup("snapshot.temporary")
        one.dies_in_a_backup("backup.written")
        one.dies_while_stopped("backup.stopped")
        one.dies_while_stopped("backup.written")
        one.dies_in_a_restore("restore.unpacked")
        one.dies_in_a_restore_in_place("restore.unpacked")
        one.dies_in_a_restore_in_place("restore.record.written")
