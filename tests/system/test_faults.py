"""Full disks, two commands at once, damaged files: a clear error, nothing left behind, and a way out."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sysctr.cgroup.detect import open_driver
from sysctr.runtime import wire
from tests.node import Node, kill
from tests.system.guests import create, inside, refused, shell
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox")]

DISK_BYTES = 24 << 20


@pytest.fixture
def small_disk(pytestconfig: pytest.Config) -> Iterator[Node]:
    """A host whose whole SYSCTR_ROOT lies on a disk of 24 MB, with tiny and a container `one`."""
    with Node(keep=pytestconfig.getoption("keep")) as host:
        image = f"{host.root}.img"
        try:
            with open(image, "wb") as file:
                file.truncate(DISK_BYTES)
            subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
            for directory in ("etc", "lib", "run", "log"):
                os.makedirs(f"{host.root}/{directory}", exist_ok=True)
            os.mkdir(f"{host.root}/disk")
            subprocess.run(["mount", "-o", "loop", image, f"{host.root}/disk"], check=True)
            for directory in ("etc", "lib", "run"):
                os.mkdir(f"{host.root}/disk/{directory}")
                argv = ["mount", "--bind", f"{host.root}/disk/{directory}", f"{host.root}/{directory}"]
                subprocess.run(argv, check=True)
            host.run("template", "build", "tiny")
            host.run("create", "one", "--template", "tiny")
            yield host
        finally:
            os.unlink(image)


def fill(host: Node) -> Path:
    """Leave not a byte free."""
    filler = Path(f"{host.root}/disk/filler")
    with open(filler, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass
    return filler


def traces(host: Node) -> dict:
    def names(path: str) -> list[str]:
        return sorted(os.listdir(path)) if os.path.isdir(path) else []

    return {
        "containers": names(host.layout.containers), "reserved": names(f"{host.layout.containers}/.reserved"),
        "volumes": names(f"{host.layout.pool}/volumes"), "layers": names(f"{host.layout.pool}/layers"),
        "configs": names(host.layout.container_configs), "cgroups": open_driver(host.layout).list_ids(),
        "links": [n for n in os.listdir("/sys/class/net") if n.startswith(f"v{host.layout.tag}")],
    }  # fmt: skip


def test_a_full_disk_is_told_and_leaves_nothing(small_disk: Node, tmp_path: Path) -> None:
    host = small_disk
    host.run("create", "runs", "--template", "tiny", "--start")
    archive = tmp_path / "rootfs.tar"
    layer = next(Path(f"{host.layout.pool}/layers").iterdir())
    subprocess.run(["tar", "-C", str(layer / "rootfs"), "-cf", str(archive), "."], check=True)
    # Once each, so that what is made only the first time is there.
    shell(host, "runs", "echo > /root/file")
    filler = fill(host)
    before = traces(host)

    refused(host, 1, "o space left", "create", "two", "--template", "tiny")
    assert traces(host) == before
    failed = host.run("template", "import", str(archive), "--name", "second", check=False)
    assert failed.status == 1
    assert "Traceback" not in failed.err
    assert traces(host) == before
    started = host.run("start", "one", check=False)
    if started.status:
        assert "o space left" in started.err, f"{started}{host.logs()}"
        assert traces(host) == before
    big = tmp_path / "big"
    big.write_bytes(b"x" * 4096 * 16)
    refused(host, 1, "o space left", "push", str(big), "runs:/root/big")
    assert "o space left" in shell(host, "runs", "echo more > /root/more", check=False).err
    assert inside(host, "runs", "echo on") == "on"
    assert {c["name"] for c in host.json("list")} == {"one", "runs"}

    host.run("stop", "--all", check=False)
    host.run("destroy", "one", "--yes")
    host.run("destroy", "runs", "--yes", "--force")
    assert host.json("list") == []
    filler.unlink()
    host.run("create", "after", "--template", "tiny", "--start")
    assert inside(host, "after", "echo on") == "on"
    logs = host.logs()
    assert "Traceback" not in logs, logs


def test_a_daemon_comes_up_on_a_full_disk(small_disk: Node) -> None:
    host = small_disk
    host.run("start", "one")
    filler = fill(host)
    host.run("daemon", "restart")
    assert inside(host, "one", "echo on") == "on"
    host.run("stop", "one")
    host.run("destroy", "one", "--yes")
    filler.unlink()


def test_two_starts_and_two_stops_at_once(shared_host: Node) -> None:
    host = shared_host
    ref = create(host, start=False)
    for verb, state in (("start", "running"), ("stop", "stopped")):
        for _ in range(3):
            host.run(verb if host.state(ref) != state else "status", ref)
            host.run({"start": "stop", "stop": "start"}[verb], ref)
            both = [
                host.popen(verb, ref, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)
            ]
            words = [one.communicate(timeout=60)[1] for one in both]
            assert sorted(one.returncode for one in both) == [0, 4], words
            assert host.state(ref) == state
    host.run("destroy", ref, "--yes")


def open_push(host: Node, ref: str) -> "tuple[object, int]":
    """Begin to push files into a container; returns the connection and where the tar stream goes."""
    status, ticket = host.api("POST", f"/1/containers/{ref}/files", {"op": "push", "path": "/root/"})
    assert status == 200, ticket
    connection = wire.connect(ticket["socket"], 10)
    wire.send(connection, {"ticket": ticket["ticket"]})
    answer, fds = wire.receive(connection)
    assert answer.get("ok"), answer
    return connection, fds[0]


def test_files_and_a_start_exclude_each_other(shared_host: Node) -> None:
    """The upper of an overlay must never be mounted twice: the kernel only warns."""
    host = shared_host
    ref = create(host, start=False)
    number = host.json("info", ref)["id"]
    connection, stream_fd = open_push(host, ref)
    refused(host, 4, "(push) is running", "start", ref)
    assert number not in open_driver(host.layout).list_ids()
    status, answer = host.api("POST", f"/1/containers/{ref}/files", {"op": "push", "path": "/root/"})
    assert (status, answer["error"]["code"]) == (409, "busy")
    os.write(stream_fd, bytes(10240))
    os.close(stream_fd)
    assert wire.receive_plain(connection)["exit"] == 0
    connection.close()
    host.run("start", ref)

    # A ticket that nobody has used yet holds it too; taken back, it is worth nothing.
    host.run("stop", ref)
    status, ticket = host.api("POST", f"/1/containers/{ref}/files", {"op": "push", "path": "/root/"})
    assert status == 200
    refused(host, 4, "(push) is running", "start", ref)
    holder = next(task for task in host.json("task", "list") if task["state"] == "running")
    host.run("task", "cancel", holder["id"])
    host.run("start", ref)
    with wire.connect(ticket["socket"], 10) as late:
        wire.send(late, {"ticket": ticket["ticket"]})
        assert wire.receive_plain(late)["error"]["code"] == "not-found"
    host.run("destroy", ref, "--yes", "--force")


def test_a_client_who_leaves_ends_the_work_on_files(shared_host: Node) -> None:
    host = shared_host
    ref = create(host, start=False)
    connection, stream_fd = open_push(host, ref)
    connection.close()
    os.close(stream_fd)
    wait_until(lambda: host.run("start", ref, check=False).status == 0, what="the start")
    host.run("destroy", ref, "--yes", "--force")


def test_work_on_files_ends_with_its_supervisor(shared_host: Node) -> None:
    """The next supervisor does not know of it, and would mount the upper a second time."""
    host = shared_host
    ref = create(host, start=False)
    connection, stream_fd = open_push(host, ref)
    kill(host.pids()["supervisor"])

    def nobody_reads() -> bool:
        try:
            os.write(stream_fd, b"x")
        except BrokenPipeError:
            return True
        return False

    wait_until(nobody_reads, what="the end of the job")
    os.close(stream_fd)
    connection.close()
    host.run("start", ref)
    host.run("destroy", ref, "--yes", "--force")


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00garbage", b"schema = 1\nname = [", b"{}"])
@pytest.mark.parametrize("which", ["config", "record"])
def test_a_damaged_container_is_listed_and_can_be_destroyed(
    shared_host: Node, damage: bytes, which: str
) -> None:
    host = shared_host
    good, bad = create(host), create(host, start=False)
    number = host.json("info", bad)["id"]
    path = {
        "config": host.layout.container_config(number),
        "record": f"{host.layout.container_dir(number)}/record.json",
    }[which]
    Path(path).write_bytes(damage)
    listed = {c["id"]: c for c in host.json("list")}
    assert set(listed) >= {number}
    assert inside(host, good, "echo on") == "on"
    done = host.run("start", str(number), check=False)
    assert done.status != 0
    assert "Traceback" not in done.err
    host.run("daemon", "restart")
    assert inside(host, good, "echo on") == "on"
    host.run("destroy", str(number), "--yes")
    assert number not in {c["id"] for c in host.json("list")}
    host.run("destroy", good, "--yes", "--force")
    logs = host.logs()
    assert "Traceback" not in logs, logs


def without_init(tree: Path) -> None:
    (tree / "sbin/init").unlink()


def wrong_machine(tree: Path) -> None:
    program = tree / "bin/busybox"
    data = bytearray(program.read_bytes())
    data[18:20] = (0xF7).to_bytes(2, "little")  # e_machine: BPF
    program.write_bytes(data)


def linked_dev(tree: Path) -> None:
    (tree / "dev").rmdir()
    (tree / "dev").symlink_to("/dev")


@pytest.mark.parametrize(
    ("change", "words"),
    [(without_init, "init"), (wrong_machine, "this machine is"), (linked_dev, "dev")],
    ids=["no init", "other machine", "dev is a symlink"],
)
def test_a_rootfs_that_cannot_boot_is_refused_at_import(
    shared_host: Node, tmp_path: Path, change, words: str
) -> None:
    host = shared_host
    tree = tmp_path / "rootfs"
    source = next(Path(f"{host.layout.pool}/layers").iterdir()) / "rootfs"
    subprocess.run(["cp", "-a", str(source), str(tree)], check=True)
    change(tree)
    archive = tmp_path / "rootfs.tar"
    subprocess.run(["tar", "-C", str(tree), "-cf", str(archive), "."], check=True)
    before = sorted(os.listdir(f"{host.layout.pool}/layers"))
    done = host.run("template", "import", str(archive), "--name", "broken", check=False)
    assert done.status not in (0, 70)
    assert words in done.err, done
    assert "Traceback" not in done.err
    assert sorted(os.listdir(f"{host.layout.pool}/layers")) == before
