"""What goes wrong with backups and restores without a crash: cancels, full disks, directories that go away,
and others who want the same container."""

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disk import disk
from tests.node import Node
from tests.system.guests import create, inside, refused, shell
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox", "loop")]

MIB = 1 << 20


@pytest.fixture(scope="module")
def big(shared_host: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running container with 24 MiB that no compressor makes less of."""
    noise = tmp_path_factory.mktemp("noise") / "noise"
    noise.write_bytes(random.Random(1).randbytes(24 * MIB))
    ref = create(shared_host, word="big")
    shared_host.run("push", str(noise), f"{ref}:/root/noise")
    shell(shared_host, ref, "echo old > /root/file")
    yield ref
    assert shared_host.state(ref) == "running"
    logs = shared_host.logs()
    assert "Traceback" not in logs, logs


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    directory = tmp_path / "dump"
    directory.mkdir()
    return directory


@pytest.fixture(scope="module")
def archive(shared_host: Node, big: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("archive")
    shared_host.run("backup", big, "--dir", str(directory))
    (name,) = [name for name in os.listdir(directory) if name.endswith(".zst")]
    return f"{directory}/{name}"


def settled(host: Node) -> list[str]:
    """Return what is on a host that belongs to nothing: half-made volumes, states, reservations, journals."""
    _, listed = host.api("GET", "/1/containers")
    numbers = {str(one["id"]) for one in listed["containers"]}
    containers, pool = Path(host.layout.containers), Path(host.layout.pool)
    wait_until(lambda: not list(pool.glob(".trash/*")), what="an empty trash")
    left = [path.name for path in pool.glob("volumes/*") if path.name.split("-")[0] not in numbers]
    left += [str(path) for path in pool.glob("volumes/*/snapshots/*")]
    left += [str(path) for path in containers.glob("*/journal.json*")]
    left += [path.name for path in containers.iterdir() if path.name not in {*numbers, ".reserved"}]
    left += os.listdir(containers / ".reserved") + os.listdir(host.layout.backup_runs)
    _, answer = host.api("GET", "/1/doctor")
    checks = [one for one in answer["checks"] if one["check"] == "leftovers"]
    return left + [one["detail"] for one in checks if one["state"] != "ok"]


@pytest.fixture(autouse=True)
def nothing_left(shared_host: Node, big: str) -> Iterator[None]:
    yield
    assert settled(shared_host) == []


def running_task(host: Node, kind: str) -> str | None:
    _, answer = host.api("GET", "/1/tasks")
    found = [task["id"] for task in answer["tasks"] if task["kind"] == kind and task["state"] == "running"]
    return found[0] if found else None


@contextlib.contextmanager
def slowly(host: Node, ref: str, dump: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run a backup that would take a minute, and give it and its task; what is left of it is cancelled."""
    command = host.popen(
        "backup", ref, "--dir", str(dump), "--bwlimit", "400K", *options,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        wait_until(lambda: list(dump.glob("*.dat")) and running_task(host, "backup"), what="a backup")
        task = running_task(host, "backup")
        assert task
        wait_until(lambda: (host.api("GET", f"/1/tasks/{task}")[1]["task"]["progress_bytes"] or 0) > 0,
                   what="the archive grows")  # fmt: skip
        yield command, task
    finally:
        if command.poll() is None:
            host.run("task", "cancel", task, check=False)
        command.communicate(timeout=60)


def ended(command: subprocess.Popen[bytes]) -> str:
    """Wait for a command and return what it says about its failure."""
    _, err = command.communicate(timeout=60)
    assert command.returncode == 1, err
    return err.decode()


def fails(host: Node, words: str, *arguments: str) -> None:
    """Run a command that has to fail, after it may have told of its steps, and say certain words."""
    done = host.run(*arguments, check=False)
    assert done.status == 1, done
    errors = [line for line in done.err.splitlines() if line.startswith("sysctr: cannot ")]
    assert len(errors) == 1, done
    assert words in errors[0], done
    assert "Traceback" not in done.err, done


# Cancelled


def test_a_backup_that_is_cancelled_leaves_nothing(shared_host: Node, big: str, dump: Path) -> None:
    host = shared_host
    with slowly(host, big, dump) as (command, task):
        host.run("task", "cancel", task)
        assert "cancelled" in ended(command)
    assert os.listdir(dump) == []


def test_a_backup_that_nobody_reads_is_cancelled(shared_host: Node, big: str) -> None:
    host = shared_host
    command = host.popen("backup", big, "--stdout", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: running_task(host, "backup"), what="a backup")
    task = running_task(host, "backup")
    wait_until(lambda: (host.api("GET", f"/1/tasks/{task}")[1]["task"]["progress_bytes"] or 0) > 2 * MIB,
               what="the pipes are full")  # fmt: skip
    host.run("task", "cancel", str(task))
    wait_until(lambda: not running_task(host, "backup"), 20, "the end of the task")
    _, err = command.communicate(timeout=60)
    assert command.returncode != 0
    assert b"Traceback" not in err


def test_a_reader_that_goes_away_ends_its_backup(shared_host: Node, big: str) -> None:
    host = shared_host
    command = host.popen("backup", big, "--stdout", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout.read(100)
    command.stdout.close()
    err = command.stderr.read()
    command.wait(60)
    assert command.returncode not in (0, None)
    assert b"Traceback" not in err, err
    wait_until(lambda: not running_task(host, "backup"), 20, "the end of the task")


@pytest.mark.parametrize("in_place", [False, True])
def test_a_restore_that_is_cancelled_leaves_what_was(
    shared_host: Node, big: str, archive: str, in_place: bool
) -> None:
    host = shared_host
    shell(host, big, "echo new > /root/file")
    number = host.json("info", big)["id"]
    options = [str(number), "--force"] if in_place else ["--name", "cancelled"]
    with open(archive, "rb") as file:
        half = file.read(os.path.getsize(archive) // 2)
    command = host.popen("restore", "-", *options, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    command.stdin.write(half)
    command.stdin.flush()
    wait_until(lambda: running_task(host, "restore"), what="a restore")
    # Meanwhile it runs, and nobody else may work on it.
    if in_place:
        assert inside(host, big, "cat /root/file") == "new"
        refused(host, 4, "(restore) is running", "stop", big)
    host.run("task", "cancel", str(running_task(host, "restore")))
    wait_until(lambda: not running_task(host, "restore"), 20, "the end of the task")
    # It does not wait for more of what nobody wants.
    err = command.stderr.read()
    assert command.wait(60) == 1
    command.stdin.close()
    assert b"cancelled" in err
    assert inside(host, big, "cat /root/file") == "new"
    assert "cancelled" not in host.run("list", "-q").out.split()


# Full


def test_a_full_destination_is_told_before_and_while_writing(
    shared_host: Node, big: str, tmp_path: Path
) -> None:
    host = shared_host
    where = tmp_path / "full"
    where.mkdir()
    with disk(str(where), "ext4", size_bytes=20 * MIB):
        fails(host, "/full", "backup", big, "--dir", str(where), "--compress", "none")
        # By its compressed size it may fit, and then it does not.
        fails(host, "no space left", "backup", big, "--dir", str(where))
        assert [name for name in os.listdir(where) if name != "lost+found"] == []
        # What is written to a full disk by its reader is the reader's to tell.
        with open("/dev/full", "wb") as full:
            command = host.popen("backup", big, "--stdout", stdout=full, stderr=subprocess.PIPE)
            err = command.stderr.read()
            assert command.wait(60) == 1, err
        assert err.startswith(b"sysctr: cannot write the archive: no space left"), err
    wait_until(lambda: not running_task(host, "backup"), 20, "the end of the task")


def test_what_cannot_be_read_at_standard_input_is_told(shared_host: Node, big: str) -> None:
    with open("/dev/null", "wb") as null:
        command = shared_host.popen("restore", "-", stdin=null, stderr=subprocess.PIPE)
    assert command.stderr.read() == b"sysctr: cannot read the archive: bad file descriptor\n"
    assert command.wait(60) == 2


@pytest.mark.parametrize("in_place", [False, True])
def test_a_full_disk_of_its_own_fails_a_restore_and_nothing_else(
    shared_host: Node, big: str, archive: str, in_place: bool
) -> None:
    host = shared_host
    shell(host, big, "echo new > /root/file")
    options = [str(host.json("info", big)["id"]), "--force"] if in_place else ["--name", "full"]
    fails(host, "space", "restore", archive, *options, "--set", "limits.disk=16M")
    assert inside(host, big, "cat /root/file") == "new"
    assert "full" not in host.run("list", "-q").out.split()


# Destinations


def test_a_destination_that_cannot_be_one_is_told(shared_host: Node, big: str, tmp_path: Path) -> None:
    host = shared_host
    (tmp_path / "file").touch()
    (tmp_path / "only").mkdir()
    refused(host, 3, "does not exist", "backup", big, "--dir", f"{tmp_path}/nothing")
    refused(host, 2, "is no directory", "backup", big, "--dir", f"{tmp_path}/file")
    refused(host, 1, "cannot ", "backup", big, "--dir", "/proc")
    with disk(str(tmp_path / "only"), "ext4"):
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "only"], check=True)
        refused(host, 5, "read-only", "backup", big, "--dir", f"{tmp_path}/only")


def test_a_destination_that_disappears_fails_the_backup(shared_host: Node, big: str, dump: Path) -> None:
    host = shared_host
    with slowly(host, big, dump, "--compress", "none") as (command, _):
        for path in dump.iterdir():
            path.unlink()
        dump.rmdir()
        host.run("task", "cancel", str(running_task(host, "backup")))
        ended(command)
    dump.mkdir()
    # One that is moved is still the one that was opened.
    aside = dump.with_name("aside")
    command = host.popen(
        "backup", big, "--dir", str(dump), "--bwlimit", "20M", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_until(lambda: list(dump.glob("*.dat")), what="a partial file")
    dump.rename(aside)
    _, err = command.communicate(timeout=60)
    assert not list(aside.glob("*.dat"))
    assert command.returncode in (0, 1), err
    assert len(list(aside.glob("*.tar.zst"))) == (command.returncode == 0)


# Others


def test_a_second_backup_is_refused_and_other_work_goes_on(shared_host: Node, big: str, dump: Path) -> None:
    host = shared_host
    shell(host, big, "echo before > /root/file")
    with slowly(host, big, dump) as (command, task):
        refused(host, 4, "(backup) is running", "backup", big, "--dir", str(dump))
        # The archive is of the moment at which it was begun.
        shell(host, big, "echo after > /root/file")
        host.run("snapshot", big, "meanwhile")
        host.run("stop", big, "--kill")
        refused(host, 4, f"task {task} (backup) is running", "destroy", big, "--yes")
        host.run("start", big)
        host.run("rollback", big, "meanwhile", "--yes")
        host.run("delsnapshot", big, "meanwhile")
        assert running_task(host, "backup") == task
        host.run("task", "cancel", task)
        ended(command)
    assert os.listdir(dump) == []
    assert host.state(big) == "running"


def test_the_archive_is_of_one_moment(shared_host: Node, big: str, dump: Path) -> None:
    host = shared_host
    shell(host, big, "echo before > /root/file")
    command = host.popen("backup", big, "--dir", str(dump), "--bwlimit", "8M", stderr=subprocess.PIPE)
    wait_until(lambda: running_task(host, "backup"), what="a backup")
    task = running_task(host, "backup")
    path = f"/1/tasks/{task}"
    wait_until(lambda: host.api("GET", path)[1]["task"]["step"] == "archiving", what="the state is taken")
    shell(host, big, "echo after > /root/file")
    host.run("stop", big, "--kill")
    host.run("start", big)
    command.stderr.read()
    assert command.wait(60) == 0
    (name,) = [name for name in os.listdir(dump) if name.endswith(".zst")]
    host.run("restore", f"{dump}/{name}", "--name", "moment", "--start")
    assert inside(host, "moment", "cat /root/file") == "before"
    host.run("destroy", "moment", "--force", "--yes")
    host.wait(big, "running")


def test_force_ends_the_backup_of_what_is_destroyed(shared_host: Node, dump: Path) -> None:
    host = shared_host
    ref = create(host)
    shell(host, ref, "dd if=/dev/urandom of=/root/noise bs=1M count=8 2>/dev/null")
    with slowly(host, ref, dump) as (command, _):
        host.run("destroy", ref, "--force", "--yes")
        ended(command)
    assert os.listdir(dump) == []


def test_a_restore_over_a_running_container_ends_it_only_for_the_swap(
    shared_host: Node, big: str, archive: str
) -> None:
    host = shared_host
    shell(host, big, "echo new > /root/file")
    info = host.json("info", big)
    number = str(info["id"])
    refused(host, 4, "there is a container", "restore", archive, number)
    host.run("set", big, "protected=true")
    refused(host, 5, "is protected", "restore", archive, number, "--force")
    host.run("set", big, "protected=false")
    with open(archive, "rb") as file:
        data = file.read()
    command = host.popen("restore", "-", number, "--force", stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    command.stdin.write(data[:-1000])
    command.stdin.flush()
    wait_until(lambda: running_task(host, "restore"), what="a restore")
    assert host.json("info", big)["pid"] == info["pid"]
    assert inside(host, big, "cat /root/file") == "new"
    command.stdin.write(data[-1000:])
    command.stdin.close()
    err = command.stderr.read()
    assert command.wait(60) == 0, err
    after = host.json("info", big)
    assert after["state"] == "running"
    assert after["pid"] != info["pid"]
    assert inside(host, big, "cat /root/file") == "old"
    # One that was stopped stays so.
    host.run("stop", big, "--kill")
    host.run("restore", archive, number, "--force")
    assert host.state(big) == "stopped"
    host.run("start", big)
