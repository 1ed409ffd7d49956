"""Project quotas: what the kernel does, what a pool makes of it, and what nobody inside gets around."""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sysctr.engine.job import JobRunner
from sysctr.errors import Refused
from sysctr.linux import quota
from sysctr.storage import projects
from tests import storage
from tests.capabilities import CAP_SYS_RESOURCE, without_capability
from tests.disk import disk
from tests.projects import LEAVE, refused
from tests.storage import MIB, Pool

pytestmark = [pytest.mark.root, pytest.mark.kernel]

ONE, OTHER = 1 << 30, (1 << 30) + 2
# What xfs says, and what ext4 says.
FULL = r"No space left|quota exceeded"


@pytest.fixture(scope="module", params=storage.parameters(["quota-ext4", "quota-xfs"]))
def shared_pool(request, tmp_path_factory: pytest.TempPathFactory, jobs: JobRunner) -> Iterator[Pool]:
    """A pool whose file system keeps limits of projects."""
    with storage.pool(request.param, str(tmp_path_factory.mktemp("quota")), jobs) as made:
        yield made


@pytest.fixture
def pool(shared_pool: Pool) -> Iterator[Pool]:
    """The same, without volumes; what a test makes is destroyed after it, and then there are no limits."""
    yield shared_pool
    for volume in shared_pool.driver.list():
        shared_pool.driver.deactivate(volume)
        shared_pool.driver.destroy(volume)
    shared_pool.driver.empty_trash()
    assert limits(shared_pool) == {}


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def write(path: str, size_bytes: int) -> None:
    """Write a file as one does who may not use what is reserved for root; raises OSError."""
    content = os.urandom(MIB)  # zeros would become a hole in a copy
    with without_capability(CAP_SYS_RESOURCE), open(path, "wb", buffering=0) as file:
        for _ in range(size_bytes // MIB):
            file.write(content)
        os.fsync(file.fileno())


def project(pool: Pool, volume: str = "101") -> int:
    return json.loads(Path(pool.directory, f"volumes/{volume}/volume.json").read_text()).get("project", 0)


def limits(pool: Pool) -> dict[int, int]:
    return {each.project: each.limit_bytes for each in pool.quotas() if each.limit_bytes}


def upper(pool: Pool, volume: str = "101") -> str:
    """Return where a container writes: a full volume cannot be filled through a mount made at each write."""
    spec = pool.driver.activate(volume)
    return f"{spec.trees[-1].path}/rootfs"


# The calls, on any kernel with xfs: it keeps the number of a project without counting anything.


@pytest.fixture
def plain(tmp_path) -> Iterator[str]:
    """An xfs that keeps no quotas."""
    directory = str(tmp_path / "xfs")
    os.mkdir(directory)
    with disk(directory, "xfs"):
        yield directory


def enter(path: str, number: int) -> None:
    os.mkdir(path)
    projects.Projects(os.path.dirname(path)).enter(path, number)


@pytest.mark.needs("loop", "xfs")
def test_what_is_made_in_a_project_belongs_to_it_and_nothing_else_comes_in(plain: str) -> None:
    known = projects.Projects(plain)
    enter(f"{plain}/one", ONE)
    os.makedirs(f"{plain}/one/deep/deeper")
    assert [known.of(f"{plain}{path}") for path in ("", "/one", "/one/deep/deeper")] == [0, ONE, ONE]
    Path(plain, "one/deep/file").write_text("x")
    with opened(f"{plain}/one/deep/file") as file_fd:
        assert quota.fsgetxattr(file_fd).projid == ONE
    enter(f"{plain}/other", OTHER)
    Path(plain, "other/file").write_text("x")
    for call in (os.link, os.rename):
        with pytest.raises(OSError, match="cross-device"):
            call(f"{plain}/other/file", f"{plain}/one/file")
        # What is no project takes in everything: the trash, and merged layers.
        call(f"{plain}/one/deep/file", f"{plain}/{call.__name__}")
    assert known.of(f"{plain}/link") == known.of(f"{plain}/nothing") == 0


@pytest.mark.needs("loop", "xfs")
def test_a_file_system_that_is_mounted_without_keeps_no_limits(plain: str) -> None:
    with opened(plain) as plain_fd, opened("/proc") as proc_fd:
        assert quota.project_flags(plain_fd) == quota.project_flags(proc_fd) == 0
    known = projects.Projects(plain)
    assert not known.enforced()
    assert known.new() == 0
    assert not projects.Projects(f"{plain}/nothing").enforced()


def run_inside(jobs: JobRunner, directory: str, *argv: str) -> str:
    """Run a program of the host with a container's ids, for which a directory is the volume."""
    with tempfile.TemporaryFile() as output:
        assert jobs.run_tool(argv, volume=directory, stdout_fd=output.fileno()) == 0
        output.seek(0)
        return output.read().decode()


def leave(jobs: JobRunner, directory: str) -> set[int]:
    """Return the projects that the root of a container could not leave."""
    return refused(run_inside(jobs, directory, "/usr/bin/python3", "-I", "-c", LEAVE, "/volume"))


@pytest.mark.needs("loop", "xfs", "userns", "idmap")
def test_the_root_of_a_container_cannot_leave_a_project(plain: str, jobs: JobRunner) -> None:
    enter(f"{plain}/one", ONE)
    os.mkdir(f"{plain}/one/rootfs")
    assert leave(jobs, f"{plain}/one/rootfs") == {ONE}
    with opened(f"{plain}/one/rootfs") as directory_fd:
        quota.fssetxattr(directory_fd, quota.fsgetxattr(directory_fd)._replace(projid=OTHER))
    assert projects.Projects(plain).of(f"{plain}/one/rootfs") == OTHER, "the host's root can"


# Where limits are kept.


def test_limits_are_set_and_told(pool: Pool) -> None:
    assert limits(pool) == {}
    with opened(pool.directory) as pool_fd:
        assert quota.get_quota(pool_fd, ONE) == quota.Quota(ONE)
        quota.set_quota(pool_fd, ONE, 10 * MIB + 4095, 100)
        assert quota.get_quota(pool_fd, ONE) == quota.Quota(ONE, 10 * MIB + 4096, 0, 100, 0)
        assert quota.next_quota(pool_fd, OTHER) is None
        assert quota.next_quota(pool_fd, 1) == quota.get_quota(pool_fd, ONE)
        quota.set_quota(pool_fd, ONE, 0, 0)
        assert quota.get_quota(pool_fd, ONE) == quota.Quota(ONE)


def test_a_number_that_anybody_uses_is_not_taken(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projects, "_COUNT", 4)
    known = projects.Projects(pool.directory)
    known.limit(ONE, MIB)  # somebody's limit
    enter(f"{pool.directory}/files", ONE + 2)  # somebody's files
    known.limit(ONE + 5, MIB)  # the number that would be its neighbour
    assert {known.new() for _ in range(8)} == {ONE + 6}
    for number in (ONE, ONE + 5):
        known.limit(number, None)
    os.rmdir(f"{pool.directory}/files")


def test_what_is_inside_sees_its_limit_and_nothing_gets_around_it(pool: Pool, jobs: JobRunner) -> None:
    pool.create("101", size_bytes=32 * MIB + 1)
    directory = upper(pool)
    blocks, size, inodes = map(int, run_inside(jobs, directory, "stat", "-fc", "%b %S %c", "/volume").split())
    assert (blocks * size, inodes) == (32 * MIB, 32 * MIB // 8192)
    assert leave(jobs, directory) == {project(pool)}
    script = "dd if=/dev/zero of=/volume/made/here/big bs=1M count=40 2>&1; stat -c %s /volume/made/here/big"
    said = run_inside(jobs, directory, "sh", "-c", script)
    assert "No space left on device" in said or "quota exceeded" in said
    assert 30 * MIB < int(said.split()[-1]) <= 32 * MIB
    pool.driver.deactivate("101")


def test_a_limit_changes_while_it_is_used_but_not_below_what_is_used(pool: Pool) -> None:
    pool.create("101")
    directory = upper(pool)
    write(f"{directory}/data", 24 * MIB)
    with pytest.raises(Refused, match=r"it uses 2\d MiB"):
        pool.driver.resize("101", 20 * MIB, pool.worker)
    pool.driver.resize("101", 96 * MIB, pool.worker)
    write(f"{directory}/more", 50 * MIB)
    os.unlink(f"{directory}/more")
    pool.driver.resize("101", 28 * MIB, pool.worker)
    assert limits(pool) == {project(pool): 28 * MIB}
    with pytest.raises(OSError, match=FULL):
        write(f"{directory}/more", 8 * MIB)
    assert pool.driver.active() == {"101"}


def test_a_volume_with_content_gets_a_limit_at_once(pool: Pool) -> None:
    pool.create("101", size_bytes=None)
    directory = upper(pool)
    write(f"{directory}/data", 12 * MIB)
    assert limits(pool) == {}
    pool.driver.resize("101", 16 * MIB, pool.worker)
    with pytest.raises(OSError, match=FULL):
        write(f"{directory}/more", 8 * MIB)
    pool.driver.resize("101", None, pool.worker)
    write(f"{directory}/more", 8 * MIB)
    assert limits(pool) == {}
    assert sorted(os.listdir(f"{pool.directory}/volumes/101")) == ["snapshots", "volume.json"]


def test_states_kept_while_stopped_count_and_copies_of_what_runs_do_not(pool: Pool) -> None:
    pool.create("101")
    write(f"{upper(pool)}/one", 4 * MIB)
    pool.driver.snapshot("101", "copied", {}, pool.worker, contextlib.nullcontext)
    counted = projects.Projects(pool.directory)
    assert 4 * MIB <= counted.used_bytes(project(pool), settled=True) < 5 * MIB
    assert 8 * MIB <= pool.driver.measure("101") < 9 * MIB
    pool.driver.deactivate("101")
    pool.snapshot("101", "stopped")
    write(f"{upper(pool)}/two", 4 * MIB)
    assert 8 * MIB <= counted.used_bytes(project(pool), settled=True) < 9 * MIB
    pool.driver.deactivate("101")
    pool.driver.rollback("101", "copied")
    pool.driver.delete_snapshot("101", "stopped")
    pool.driver.empty_trash()
    assert counted.used_bytes(project(pool), settled=True) < MIB
    assert pool.driver.usage("101") == pool.driver.measure("101")
    assert 4 * MIB <= pool.driver.measure("101") < 5 * MIB


def test_a_destroyed_volume_leaves_no_limit_though_others_stand_on_what_it_wrote(pool: Pool) -> None:
    pool.create("101")
    pool.write("101", "state", "common")
    pool.clone("101", "", "102")
    mine, clones = project(pool), project(pool, "102")
    assert limits(pool) == {mine: 64 * MIB, clones: 64 * MIB}
    pool.driver.destroy("101")
    pool.driver.empty_trash()
    assert limits(pool) == {clones: 64 * MIB}
    pool.create("101")
    assert project(pool) not in (mine, clones)
    assert pool.read("102", "state") == "common"
    for volume in ("101", "102"):
        pool.driver.destroy(volume)
    pool.driver.empty_trash()
    assert limits(pool) == {}


def test_layers_of_several_projects_are_merged(pool: Pool) -> None:
    pool.create("101")
    for number in range(3):
        pool.write("101", f"first-{number}", str(number))
        pool.snapshot("101", f"s{number}")
    pool.clone("101", "", "102")
    pool.driver.destroy("101")
    for number in range(3):
        pool.write("102", f"second-{number}", str(number))
        with pool.opened("102") as root:
            os.makedirs(f"{root}/etc/deep/{number}")
        pool.snapshot("102", f"s{number}")
        pool.driver.delete_snapshot("102", f"s{number}")
    pool.driver.compact("102", pool.worker)
    pool.driver.empty_trash()
    with pool.opened("102") as root:
        assert len(os.listdir(f"{pool.directory}/uppers")) == 2, "all of it in one layer, and the upper"
        assert sorted(os.listdir(f"{root}/etc/deep")) == ["0", "1", "2"]
        for number in range(3):
            assert Path(root, f"first-{number}").read_text() == Path(root, f"second-{number}").read_text()


def test_what_is_full_is_kept_brought_back_and_started_again_but_not_for_ever(pool: Pool) -> None:
    pool.create("101", size_bytes=16 * MIB)
    pool.snapshot("101", "empty")

    def fill(root: str) -> None:
        with contextlib.suppress(OSError):
            write(f"{root}/full-{os.urandom(4).hex()}", 30 * MIB)
        with contextlib.suppress(OSError), without_capability(CAP_SYS_RESOURCE):
            for number in range(10_000):
                Path(root, f"small-{number}").write_text("x")

    with pool.opened("101") as root:
        fill(root)
    pool.snapshot("101", "full")
    # As often as it reboots it gets a little more, and never much.
    said = ""
    started = 0
    while not said and started < 20:
        try:
            with pool.opened("101") as root:
                Path(root, "probe").write_text("")  # not read-only
                fill(root)
        except Refused as error:
            said = error.message
        started += 1
    assert said.endswith("it has used up its limit")
    assert 2 <= started <= 10
    assert pool.driver.measure("101") <= 25 * MIB
    pool.restart()
    pool.driver.resize("101", 32 * MIB, pool.worker)
    assert pool.read("101", "probe", snapshot="empty") == ""
    pool.driver.rollback("101", "empty")
    pool.driver.delete_snapshot("101", "full")
    pool.driver.empty_trash()
    pool.driver.resize("101", 16 * MIB, pool.worker)
    with pool.opened("101") as root:
        write(f"{root}/data", 12 * MIB)
    assert limits(pool) == {project(pool): 16 * MIB}


@pytest.mark.parametrize("shared_pool", storage.parameters(["quota-ext4"]), indirect=True)
def test_a_pool_that_is_mounted_otherwise_keeps_the_limits_it_can(pool: Pool) -> None:
    pool.create("101", size_bytes=16 * MIB)
    pool.write("101", "state", "mine")
    assert limits(pool) == {project(pool): 16 * MIB}
    remount(pool, "")
    pool.restart()
    with pytest.raises(Refused, match="mounted without") as caught:
        pool.driver.activate("101")
    assert "prjquota" in caught.value.hint
    assert pool.driver.active() == frozenset()
    with pytest.raises(Refused, match="mounted without"):
        pool.driver.resize("101", 100 * MIB, pool.worker)
    pool.create("102", size_bytes=16 * MIB)
    assert os.path.exists(f"{pool.directory}/volumes/102/disk.img")
    pool.driver.resize("101", None, pool.worker)
    assert pool.read("101", "state") == "mine"
    # From no limit to one, without quotas: an image, which it keeps.
    pool.driver.resize("101", 16 * MIB, pool.worker)
    remount(pool, "prjquota")
    pool.restart()
    pool.create("103", size_bytes=16 * MIB)
    assert [project(pool, volume) for volume in ("101", "102")] == [0, 0]
    assert limits(pool) == {project(pool, "103"): 16 * MIB}
    for volume in ("101", "102", "103"):
        with pool.opened(volume) as root, pytest.raises(OSError, match=FULL):
            write(f"{root}/data", 20 * MIB)


def remount(pool: Pool, options: str) -> None:
    """Mount the disk of a pool anew, with or without quotas."""
    subprocess.run(["umount", pool.directory], check=True)
    how = ",".join(["loop", "noatime", *([options] if options else [])])
    subprocess.run(["mount", "-o", how, f"{pool.directory}.image", pool.directory], check=True)
