"""An export of Incus with snapshots: each state is there, on every storage."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests import foreign, rootfs
from tests.system.guests import new_name, refused
from tests.system.pools import Kept

pytestmark = [pytest.mark.root, pytest.mark.needs("btrfs", "loop")]


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, str]:
    """Three states of one container: one file changes, one goes, one turns into another kind."""
    busybox = rootfs.static_busybox()
    if busybox is None:
        pytest.skip("needs busybox: no static one (package busybox-static)")
    base = tmp_path_factory.mktemp("states")
    found = {}
    for number, name in enumerate(("snapshots/snap0", "snapshots/Snap_1", "container")):
        root = base / str(number)
        root.mkdir()
        rootfs.write_tree(str(root), busybox)
        (root / "home/state").write_text(f"state {number}\n")
        # As large and as old as the one before it.
        os.utime(root / "home/state", (1_700_000_000, 1_700_000_000))
        os.chown(root / "home/state", 1000 + number, 33)
        if number == 0:
            (root / "home/gone").write_text("gone")
            (root / "home/turns").mkdir()
        else:
            (root / "home/turns").symlink_to("state")
        found[name] = str(root)
    return found


def index_of(name: str) -> dict[str, Any]:
    index = foreign.incus_index(name, **{"volatile.uuid": "", "volatile.eth0.hwaddr": ""})
    # Not in the order of their times.
    index["snapshots"] = ["Snap_1", "snap0"]
    index["config"]["snapshots"] = [
        {"name": "Snap_1", "created_at": "2026-02-02T00:00:00Z", "description": "the second"},
        {"name": "snap0", "created_at": "2026-02-01T00:00:00Z"},
    ]
    return index


def restored(kept: Kept, trees: dict[str, str], path: Path, *, order: list[str]) -> str:
    name = new_name("incus")
    archive = foreign.incus_export(
        str(path / "a.tar.gz"), foreign.yaml_of(index_of(name)), {one: trees[one] for one in order}
    )
    size = ["--set", "limits.disk=128M"] if kept.kind == "loop" else []
    done = kept.host.run("restore", archive, "--pool", kept.pool, *size)
    assert "snapshot Snap_1 is snap_1 here" in done.err
    return name


ORDERS = (
    ["container", "snapshots/snap0", "snapshots/Snap_1"], ["snapshots/Snap_1", "container", "snapshots/snap0"]
)  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
def test_every_state_is_there(kept, trees, tmp_path, order) -> None:
    name = restored(kept, trees, tmp_path, order=order)
    listed = kept.host.json("snapshots", name)
    assert [one["name"] for one in listed["snapshots"]] == ["snap0", "snap_1"]
    assert [one["created"] for one in listed["snapshots"]] == [1769904000, 1769990400]
    assert [one["description"] for one in listed["snapshots"]] == ["", "the second"]
    for snapshot, number in (("", 2), ("snap0", 0), ("snap_1", 1)):
        if snapshot:
            kept.host.run("rollback", name, snapshot, "--yes")
        assert kept.read(name, "/home/state") == f"state {number}\n"
        assert (kept.read(name, "/home/gone") == "gone") == (number == 0)
        kept.host.run("start", name)
        script = "stat -c '%u %g %F' /home/state /home/turns"
        found = kept.host.run("exec", name, "--", "/bin/sh", "-c", script).out
        kind = "directory" if number == 0 else "symbolic link"
        assert found.split("\n")[0].startswith(f"{1000 + number} 33 ")
        assert found.split("\n")[1] == f"0 0 {kind}"
        kept.host.run("stop", name, "--kill")
    assert not [volume for volume in kept.volumes() if volume.endswith("-states")]
    assert kept.leftovers() == []
    kept.host.run("destroy", name, "--yes")


def test_a_state_that_is_no_directory_leaves_nothing(kept, trees, tmp_path) -> None:
    name = new_name("incus")
    source = tmp_path / "link"
    source.symlink_to("/")
    archive = str(tmp_path / "a.tar")
    # The directory of volumes is made by the first daemon.
    kept.host.run("list")
    before = kept.volumes()
    with tarfile.open(archive, "w") as out:
        index = tmp_path / "index.yaml"
        index.write_bytes(foreign.yaml_of(index_of(name)))
        out.add(index, "backup/index.yaml")
        out.add(trees["container"], "backup/container/rootfs")
        out.add(trees["snapshots/snap0"], "backup/snapshots/snap0/rootfs")
        out.add(source, "backup/snapshots/Snap_1/rootfs")
    size = ["--set", "limits.disk=128M"] if kept.kind == "loop" else []
    refused(kept.host, 1, "is no directory", "restore", "-q", archive, "--pool", kept.pool, *size)
    assert kept.volumes() == before
    assert name not in kept.host.run("list").out
    short = str(tmp_path / "short.tar")
    shutil.copyfile(archive, short)
    subprocess.run(["truncate", "--size=-2M", short], check=True)
    refused(kept.host, 1, "truncated", "restore", "-q", short, "--pool", kept.pool, *size)
    assert kept.volumes() == before


@pytest.mark.parametrize("point", ["restore.states.unpacked", "restore.state.kept:2"])
@pytest.mark.parametrize("replaces", [False, True])
def test_a_daemon_that_dies_between_states_leaves_nothing(host, trees, tmp_path, point, replaces) -> None:
    archive = foreign.incus_export(str(tmp_path / "a.tar"), foreign.yaml_of(index_of("states")), trees)
    host.run("create", "old", "--template", "tiny")
    number = str(host.json("info", "old")["id"])
    volumes = sorted(os.listdir(f"{host.layout.pool}/volumes"))
    host.run("daemon", "stop")
    host.run("daemon", "start", env={"SYSCTR_FAULT": point})
    died = host.run("restore", archive, *([number, "--force"] if replaces else []), check=False)
    assert died.status != 0
    host.run("daemon", "start", check=False)
    assert host.run("list", "-q").out.split() == [number]
    assert sorted(os.listdir(f"{host.layout.pool}/volumes")) == volumes
    host.run("start", "old")
    host.run("restore", archive, number, "--force")
    assert host.run("snapshots", number, "-q").out.split() == ["snap0", "snap_1"]
    assert host.state(number) == "running"
