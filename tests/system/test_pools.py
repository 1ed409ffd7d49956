"""Pools as a user makes them: added, used, pulled out from under containers, and taken away again."""

import json
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sysctr.engine import removal
from sysctr.linux.mount import MNT_DETACH, umount2
from tests.disk import small_disk
from tests.node import Node
from tests.system.guests import Terminal, create, inside, new_name, refused
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "loop")]

_MIB = 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    """A directory on a disk of its own, of 128 MiB."""
    directory = str(tmp_path / "disk")
    os.mkdir(directory)
    with small_disk(directory, 128 << 10):
        yield directory


def add(host: Node, path: str, *options: str, driver: str = "loop") -> str:
    """Add a pool under a new name and return the name."""
    name = new_name("pool")
    host.run("pool", "add", name, "--driver", driver, "--path", path, *options)
    return name


def pools(host: Node) -> dict[str, dict]:
    return {pool["name"]: pool for pool in host.json("pool", "list")}


def test_every_host_has_the_default_pool(shared_host: Node) -> None:
    home = pools(shared_host)["default"]
    assert home["driver"] == "overlay"
    assert home["path"] == shared_host.layout.pool
    assert home["state"] == "ok"
    assert 0 < home["free_bytes"] < home["size_bytes"]
    shown = shared_host.json("pool", "show", "default")
    assert "tiny" in shown["templates"]


def test_a_pools_copy_of_a_template_goes_with_the_template(shared_host: Node, disk: str) -> None:
    host = shared_host
    pool = add(host, f"{disk}/copies")
    template = new_name("golden")
    host.run("template", "create", create(host, start=False), template)
    name = create(host, "--pool", pool, template=template, start=False)
    shown = host.json("pool", "show", pool)["templates"]
    assert [layer.partition(".")[0] for layer in shown] == [template]
    host.run("template", "remove", template)
    assert host.json("pool", "show", pool)["templates"] == []
    # What was made of it does not need it.
    host.run("start", name)
    host.run("destroy", name, "--yes", "--force")
    host.run("pool", "remove", pool)


def test_a_pool_keeps_containers_and_goes_when_it_is_empty(shared_host: Node, disk: str) -> None:
    host = shared_host
    pool = add(host, f"{disk}/a/b", "--low-space", "5%")
    listed = pools(host)[pool]
    assert (listed["driver"], listed["path"], listed["low_space"]) == ("loop", f"{disk}/a/b", "5%")
    assert listed["state"] == "ok"
    assert 100 * _MIB < listed["size_bytes"] < 128 * _MIB
    assert listed["count"] == 0
    name = create(host, "--pool", pool)
    inside(host, name, "echo kept > /root/note; sync")
    info = host.json("info", name)
    assert info["pool"] == pool
    assert f"pool:            {pool}" in host.run("info", name).out
    shown = host.json("pool", "show", pool)
    assert [(volume["container"], volume["name"]) for volume in shown["volumes"]] == [(info["id"], name)]
    assert [layer.partition(".")[0] for layer in shown["templates"]] == ["tiny"]
    assert name in host.run("pool", "show", pool).out
    refused(host, 4, f"cannot remove pool {pool}: {name} ({info['id']}) is in it", "pool", "remove", pool)
    host.run("stop", name, "--kill")
    host.run("destroy", name, "--yes")
    with open(f"{disk}/a/b/mine", "w"):
        pass
    removed = host.run("pool", "remove", pool).out
    assert f"removed {pool}; {disk}/a/b still has mine" in removed
    assert os.listdir(f"{disk}/a/b") == ["mine"]
    assert pool not in pools(host)
    refused(host, 3, f"cannot use pool {pool}", "pool", "show", pool)
    refused(host, 3, f"there is no pool {pool}", "create", "x", "--template", "tiny", "--pool", pool)


def test_a_pool_is_the_same_after_a_restart_of_the_daemon(shared_host: Node, disk: str) -> None:
    host = shared_host
    pool = add(host, disk)
    name = create(host, "--pool", pool, start=False)
    host.run("daemon", "restart")
    assert pools(host)[pool]["count"] == 1
    host.run("start", name)
    assert inside(host, name, "hostname") == name
    host.run("destroy", name, "--force", "--yes")
    host.run("pool", "remove", pool)


def test_what_cannot_be_a_pool_is_refused_and_nothing_is_left(shared_host: Node, tmp_path: Path) -> None:
    host = shared_host
    good = str(tmp_path / "good")

    def cannot(status: int, words: str, name: str, path: str, *options: str, driver: str = "overlay") -> None:
        refused(host, status, words, "pool", "add", name, "--driver", driver, "--path", path, *options)

    before = sorted(pools(host))
    cannot(2, "there is no storage driver 'zip'", "fast", good, driver="zip")
    cannot(2, "is not a pool name", "Fast", good)
    cannot(2, "is not a pool name", "../fast", good)
    cannot(2, "low_space: '90%' is not a share", "fast", good, "--low-space", "90%")
    cannot(4, "there is a pool of this name", "default", good)
    cannot(2, "it would lie in pool default", "fast", f"{host.layout.pool}/layers/x")
    cannot(5, "where sysctr has its own files", "fast", f"{host.layout.run}/pool")
    cannot(5, "is among the files of sysctr", "fast", f"{host.layout.lib}/tasks/pool")
    cannot(5, "where sysctr has its own files", "fast", host.root, "--force")
    (tmp_path / "file").touch()
    cannot(5, "it is a symlink or a file", "fast", str(tmp_path / "file"))
    (tmp_path / "link").symlink_to(tmp_path)
    cannot(5, "it is a symlink or a file", "fast", str(tmp_path / "link"))
    full = tmp_path / "full"
    full.mkdir(mode=0o755)
    for number in range(5):
        (full / f"{number}.txt").touch()
    cannot(5, f"{full} is not empty, it has 0.txt, 1.txt, 2.txt and 2 more", "fast", str(full))
    assert not os.path.exists(good)
    assert full.stat().st_mode & 0o777 == 0o755
    assert sorted(pools(host)) == before
    assert os.listdir(host.layout.pool_configs) == [] or not before
    pool = add(host, str(full), "--force")
    cannot(2, f"it would lie in pool {pool}", "fast", str(full / "below"))
    assert not (full / "below").exists()
    host.run("pool", "remove", pool)
    assert len(os.listdir(full)) == 5


def test_a_file_system_without_what_the_driver_needs_is_refused(shared_host: Node, disk: str) -> None:
    path = f"{disk}/new/pool"
    missing = {"btrfs": "it is not on btrfs", "zfs": "no dataset of ZFS is mounted there"}
    for driver, reason in missing.items():
        words = ("pool", "add", "fast", "--driver", driver, "--path", path)
        refused(shared_host, 5, f"cannot add pool fast: {reason}", *words)
        assert os.listdir(disk) == []
    assert "fast" not in pools(shared_host)
    full = f"{disk}/full"
    os.mkdir(full, 0o755)
    os.mkdir(f"{full}/layers")
    # The driver makes some of its directories before it finds this one to be a file.
    Path(full, "volumes").touch()
    words = ("pool", "add", "fast", "--driver", "loop", "--path", full, "--force")
    refused(shared_host, 5, "cannot add pool fast: ", *words)
    assert sorted(os.listdir(full)) == ["layers", "volumes"]
    assert os.stat(full).st_mode & 0o777 == 0o755


def test_a_missing_pool_stops_only_its_own_containers(make_node: Callable[..., Node], tmp_path: Path) -> None:
    host = make_node("tiny")
    directory = str(tmp_path / "fast")
    os.mkdir(directory)
    with loop_device(f"{directory}.img") as device:
        subprocess.run(["mount", device, directory], check=True)
        host.run("pool", "add", "fast", "--driver", "loop", "--path", directory)
        host.run("create", "web", "--template", "tiny", "--pool", "fast")
        host.run("create", "other", "--template", "tiny", "--start")
        umount2(directory)
        why = f"pool fast is missing: {directory} is not mounted"
        done = refused(host, 4, f"cannot start web (100): {why}", "start", "web")
        assert "hint: mount it" in done.err
        _check_missing(host, why)
        # A daemon that starts without the pool does all the rest.
        host.run("daemon", "restart")
        _check_missing(host, why)
        assert inside(host, "other", "hostname") == "other"
        refused(host, 4, f"cannot create new: {why}", "create", "new", "--template", "tiny", "--pool", "fast")
        refused(host, 4, f"cannot destroy web (100): {why}", "destroy", "web", "--yes")
        refused(host, 4, "web (100) is in it", "pool", "remove", "fast", "--force")
        # What belongs to no disk can be changed all the same.
        host.run("set", "web", "tags=a")
        assert os.listdir(directory) == [], "something was written below the mount point"
        subprocess.run(["mount", device, directory], check=True)
        try:
            # No restart of the daemon.
            assert pools(host)["fast"]["state"] == "ok"
            host.run("start", "web")
            assert inside(host, "web", "hostname") == "web"
            assert host.json("info", "web")["error"] == ""
            host.run("destroy", "web", "--force", "--yes")
            host.run("pool", "remove", "fast")
        finally:
            umount2(directory, MNT_DETACH)


@contextmanager
def loop_device(image: str) -> Iterator[str]:
    """Make an ext4 of 128 MiB on a loop device that stays when it is unmounted, as a real disk does."""
    with open(image, "wb") as file:
        file.truncate(128 * _MIB)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", image], check=True)
    made = subprocess.run(
        ["losetup", "--find", "--show", image], check=True, stdout=subprocess.PIPE, text=True
    )
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def _check_missing(host: Node, why: str) -> None:
    containers = {one["name"]: one for one in host.json("list")}
    assert containers["web"]["error"] == why
    assert containers["other"]["error"] == ""
    listed = pools(host)
    assert (listed["fast"]["state"], listed["fast"]["error"]) == ("missing", why)
    assert listed["default"]["state"] == "ok"
    checks = {check["check"]: check for check in doctor(host)}
    assert checks["pool fast"]["state"] == "fail"
    assert checks["pool fast"]["detail"] == why
    assert checks["pool default"]["ok"]


def test_a_host_whose_default_pool_is_not_mounted_starts_and_writes_nothing_there(
    make_node: Callable[..., Node], disk: str
) -> None:
    host = make_node("tiny")
    home = host.layout.pool
    host.run("pool", "add", "fast", "--driver", "loop", "--path", disk)
    host.run("create", "web", "--template", "tiny")
    host.run("create", "other", "--template", "tiny", "--pool", "fast")
    host.run("daemon", "stop")
    os.rename(home, f"{home}.away")
    os.mkdir(home)
    why = f"pool default is missing: {home} is not mounted"
    refused(host, 4, f"cannot start web (100): {why}", "start", "web")
    assert {one["name"]: one["error"] for one in host.json("list")} == {"web": why, "other": ""}
    host.run("start", "other")
    assert inside(host, "other", "hostname") == "other"
    assert {check["check"]: check["state"] for check in doctor(host)}["pool default"] == "fail"
    assert os.listdir(home) == []
    os.rmdir(home)
    os.rename(f"{home}.away", home)
    host.run("start", "web")
    assert inside(host, "web", "hostname") == "web"
    host.run("create", "more", "--template", "tiny")


def test_another_pool_at_the_path_is_not_taken_for_the_pool(shared_host: Node, tmp_path: Path) -> None:
    host = shared_host
    directory = str(tmp_path / "swap")
    os.mkdir(directory)
    pool = add(host, directory)
    os.rename(directory, f"{directory}.away")
    refused(host, 4, f"pool {pool} is missing: {directory} does not exist", "pool", "remove", pool)
    os.mkdir(directory)
    with open(f"{directory}/.sysctr-pool", "w") as marker:
        json.dump({"schema": 1, "id": "x", "driver": "overlay", "name": "foreign"}, marker)
    assert "holds another pool, 'foreign'" in pools(host)[pool]["error"]
    host.run("pool", "remove", pool, "--force")
    assert os.listdir(directory) == [".sysctr-pool"], "what is not the pool was touched"
    assert os.path.exists(f"{directory}.away/.sysctr-pool")


def test_a_read_only_pool_is_named(shared_host: Node, disk: str) -> None:
    host = shared_host
    pool = add(host, f"{disk}/pool")
    name = create(host, "--pool", pool, start=False)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        refused(host, 4, f"pool {pool} is read-only: {disk}/pool is mounted so", "start", name)
        assert pools(host)[pool]["state"] == "read-only"
        assert pools(host)[pool]["count"] == 1
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    host.run("start", name)
    host.run("destroy", name, "--force", "--yes")
    host.run("pool", "remove", pool)


def test_a_file_with_a_mistake_stops_that_pool_alone(shared_host: Node, disk: str) -> None:
    host = shared_host
    pool = add(host, f"{disk}/pool")
    file = Path(host.layout.pool_configs, f"{pool}.toml")
    good = file.read_text()
    file.write_text(good.replace("driver", "drver"))
    listed = pools(host)
    assert listed[pool]["state"] == "damaged"
    assert "drver: no such key, the nearest is driver" in listed[pool]["error"]
    assert listed["default"]["state"] == "ok"
    host.run("daemon", "restart")
    refused(host, 4, "the nearest is driver", "create", "x", "--template", "tiny", "--pool", pool)
    file.write_text(good)
    assert pools(host)[pool]["state"] == "ok"
    host.run("pool", "remove", pool)


def test_a_pool_of_another_installation_is_taken_up_with_what_is_in_it(
    make_node: Callable[..., Node], disk: str
) -> None:
    first, second = make_node("tiny"), make_node("tiny")
    first.run("pool", "add", "fast", "--driver", "loop", "--path", disk)
    first.run("create", "web", "--template", "tiny", "--pool", "fast", "--id", "150")
    adding = ("pool", "add", "fast", "--path", disk, "--driver")
    refused(second, 5, "is a pool of the driver loop", *adding, "overlay")
    second.run("create", "mine", "--template", "tiny", "--id", "150")
    refused(second, 5, "its volume 150 would be", *adding, "loop")
    second.run("destroy", "mine", "--yes")
    assert "1 volume in it" in second.run("pool", "add", "old", "--driver", "loop", "--path", disk).out
    assert [volume["volume"] for volume in second.json("pool", "show", "old")["volumes"]] == ["150"]
    refused(second, 4, "volume 150 would be lost", "pool", "remove", "old")


def test_the_host_says_where_new_containers_are_kept(make_node: Callable[..., Node], disk: str) -> None:
    host = make_node("tiny")
    os.makedirs(host.layout.etc, exist_ok=True)
    Path(host.layout.host_config).write_text('schema = 1\n[defaults]\npool = "fast"\n')
    refused(host, 3, "there is no pool fast", "create", "web", "--template", "tiny")
    host.run("pool", "add", "fast", "--driver", "loop", "--path", disk)
    host.run("create", "web", "--template", "tiny")
    host.run("create", "home", "--template", "tiny", "--pool", "default")
    assert {one["name"]: one["pool"] for one in host.json("list")} == {"web": "fast", "home": "default"}
    assert "pool" not in host.run("config", "web").out


def test_low_space_is_told_in_the_list_by_doctor_and_once_as_an_event(
    make_node: Callable[..., Node], disk: str
) -> None:
    host = make_node("tiny")
    host.run("pool", "add", "fast", "--driver", "loop", "--path", f"{disk}/pool", "--low-space", "20%")
    assert not pools(host)["fast"]["low"]
    host.run("create", "web", "--template", "tiny")
    with Heard(host) as heard:
        with open(f"{disk}/filler", "wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, 110 * _MIB)
        assert pools(host)["fast"]["low"]
        checks = {check["check"]: check for check in doctor(host)}
        assert checks["pool fast"]["state"] == "warn"
        assert "less than 20%" in checks["pool fast"]["detail"]
        with Terminal(host, "list") as terminal:
            terminal.expect("pool fast is nearly full: ")
            assert terminal.end() == 0
        assert "nearly full" not in host.run("list").err, "a script is not talked to"
        (low,) = heard.until_now("pool-low")
        assert low["pool"] == "fast"
        assert low["free_bytes"] < 0.2 * low["size_bytes"]
        os.unlink(f"{disk}/filler")
        wait_until(lambda: not pools(host)["fast"]["low"], 10)
        host.run("list")
        assert heard.until_now("pool-low") == []
        with open(f"{disk}/filler", "wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, 110 * _MIB)
        host.run("list")
        assert [event["pool"] for event in heard.until_now("pool-low")] == ["fast"]


class Heard:
    """`sysctr events` of a host, read up to a mark that the test itself makes."""

    def __init__(self, host: Node) -> None:
        self._host = host
        # Unbuffered, so that select knows of every line that is still to be read.
        self._process = host.popen("events", "--json", stdout=subprocess.PIPE, bufsize=0)
        self._marks = 0

    def __enter__(self) -> "Heard":
        # Its first event says that it listens.
        wait_until(self._listens, 20)
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()

    def _listens(self) -> bool:
        self._host.run("set", "web", f"description={time.monotonic_ns()}")
        return bool(select.select([self._process.stdout], [], [], 0.2)[0])

    def until_now(self, kind: str) -> list[dict]:
        """Return the events of a kind that came since this was asked last."""
        self._marks += 1
        name = f"mark-{self._marks}"
        self._host.run("rename", "web", name)
        self._host.run("rename", name, "web")
        found, renamed = [], 0
        while renamed < 2:
            assert select.select([self._process.stdout], [], [], 20)[0], "no event came"
            event = json.loads(self._process.stdout.readline())
            found += [event] if event["event"] == kind else []
            renamed += event.get("change") == "configured" and event.get("keys") == ["name"]
        return found


def doctor(host: Node) -> list[dict]:
    return json.loads(host.run("doctor", "--json", check=False).out)


def test_what_is_left_mounted_is_told_and_taken_away(make_node: Callable[..., Node]) -> None:
    host = make_node("tiny")
    host.run("list")
    point = f"{host.layout.run}/storage/gone/101"
    os.makedirs(point)
    subprocess.run(["mount", "-t", "tmpfs", "left", point], check=True)
    (told,) = [check for check in doctor(host) if check["check"] == "mounts"]
    assert (told["state"], told["detail"]) == ("warn", f"left over: {point}")
    assert f"mount {point}" in removal.unmount_all(host.layout)
    assert not os.path.ismount(point)
    (told,) = [check for check in doctor(host) if check["check"] == "mounts"]
    assert told["state"] == "ok"


def test_removal_frees_loop_devices_and_keeps_what_is_elsewhere(
    make_node: Callable[..., Node], disk: str
) -> None:
    host = make_node("tiny")
    host.run("pool", "add", "fast", "--driver", "loop", "--path", f"{disk}/fast")
    host.run("pool", "add", "near", "--driver", "loop", "--path", f"{host.layout.lib}/storage/near")
    host.run("create", "web", "--template", "tiny", "--pool", "fast", "--start")
    (image,) = Path(disk, "fast", "volumes").glob("*/disk.img*")
    assert _loops_of(image)
    removal.stop_processes(host.layout)
    removal.unmount_all(host.layout)
    wait_until(lambda: not _loops_of(image), 10)
    assert image.exists()
    assert removal.pools_outside(host.layout) == [("fast", f"{disk}/fast")]
    host.run("start", "web")
    assert inside(host, "web", "hostname") == "web"


def _loops_of(image: Path) -> list[str]:
    done = subprocess.run(
        ["losetup", "--associated", str(image)], check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.split()


def test_df_shows_what_containers_take(shared_host: Node) -> None:
    name = create(shared_host)
    inside(shared_host, name, "dd if=/dev/zero of=/root/big bs=1M count=20 2>/dev/null; sync")
    (disk,) = shared_host.json("df", name)
    assert disk["name"] == name
    (volume,) = disk["volumes"]
    assert (volume["volume"], volume["pool"]) == (str(disk["id"]), "default")
    assert volume["used_bytes"] >= 20 * _MIB
    assert volume["limit_bytes"] is None
    assert name in shared_host.run("df").out
    refused(shared_host, 3, "cannot find container nobody", "df", "nobody")
