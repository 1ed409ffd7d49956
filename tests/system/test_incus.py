"""Exports of Incus and LXD become containers; hostile ones are refused or contained."""

import itertools
import os
import tarfile
from pathlib import Path

import pytest

from tests import foreign, rootfs
from tests.system.guests import inside, refused

pytestmark = pytest.mark.root

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> str:
    busybox = rootfs.static_busybox()
    if busybox is None:
        pytest.skip("needs busybox: no static one (package busybox-static)")
    root = tmp_path_factory.mktemp("incus") / "rootfs"
    root.mkdir()
    rootfs.write_tree(str(root), busybox)
    (root / "home/alice").write_text("alice's\n")
    os.chown(root / "home/alice", 1000, 33)
    return str(root)


def fresh() -> tuple[str, dict[str, str]]:
    """Return a name, and settings by which its export is no copy of another."""
    number = next(_numbers)
    return f"incus-{number}", {
        "volatile.uuid": f"00000000-0000-4000-8000-{number:012d}",
        "volatile.eth0.hwaddr": f"00:16:3e:00:02:{number:02x}",
    }


@pytest.mark.parametrize("extension", ["tar", "tar.gz"])
def test_an_export_boots_with_its_settings_and_identity(shared_host, tree, tmp_path, extension) -> None:
    name, identity = fresh()
    index = foreign.incus_index(
        name, **identity, **{"limits.memory": "64MiB", "environment.COLOUR": "blue", "raw.lxc": "lxc.x = y"},
        srv={"type": "disk", "source": "/srv", "path": "/mnt"},
    )  # fmt: skip
    path = foreign.incus_export(
        str(tmp_path / f"export.{extension}"), foreign.yaml_of(index), {"container": tree}
    )
    done = shared_host.run("restore", path, "--start")
    assert "with its identity" in done.out
    assert "note: raw.lxc: sysctr hands nothing past its own settings" in done.err
    assert "left out: device srv: it shows '/srv' of the host at '/mnt' (--allow bind)" in done.err
    shown = shared_host.json("info", name)
    assert (shown["limits"]["memory"], shown["description"]) == ("64M", "from Incus")
    assert (shown["uuid"], shown["nets"][0]["mac"]) == tuple(identity.values())
    script = "cat /home/alice; stat -c '%u %g' /home/alice; echo $(ls / | grep -c -e backup -e metadata)"
    assert inside(shared_host, name, script).split() == ["alice's", "1000", "33", "0"]
    shared_host.run("stop", name, "--kill")
    # Again, beside the first: one of its own.
    twin = shared_host.run("restore", path)
    assert "with an identity of its own" in twin.out
    assert shared_host.json("info", f"{name}-2")["uuid"] != shown["uuid"]
    with open(path, "rb") as stream:
        piped = shared_host.run("restore", "-", "--name", f"{name}-3", "--allow", "bind", stdin=stream.read())
    assert "left out" not in piped.err
    assert "/mnt" in [mount["target"] for mount in shared_host.json("info", f"{name}-3")["mounts"]]
    shown = shared_host.run("backup", "verify", path)
    assert "can be restored" in shown.out


def test_what_has_no_files_says_what_to_do(shared_host, tree, tmp_path) -> None:
    name, identity = fresh()
    index = foreign.incus_index(name, **identity)
    binary = tarfile.TarInfo("backup/container.bin")
    cases = {
        "optimized": ({**index, "optimized": True}, "--optimized-storage", [(binary, b"btrfs-stream")]),
        "unsaid": ({**index, "optimized": False}, "--optimized-storage", [(binary, b"btrfs-stream")]),
        "machine": ({**index, "type": "virtual-machine"}, "a virtual machine, not a container", []),
        "nothing": (index, "backup/container/rootfs: Not found in archive", []),
    }
    for case, (said, words, members) in cases.items():
        path = foreign.incus_export(str(tmp_path / f"{case}.tar"), foreign.yaml_of(said), {}, members)
        refused(shared_host, 1 if case == "nothing" else 5, words, "restore", "-q", path)
    assert name not in shared_host.run("list").out


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **values: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o755
    for key, value in values.items():
        setattr(info, key, value)
    return info


ROOT = "backup/container/rootfs"
CONTAINED = {
    "a second index": [(member("backup/index.yaml"), b"name: evil\ntype: container\n")],
    "an index that is a link": [(member("backup/index.yaml", tarfile.SYMTYPE, "/etc/shadow"), b"")],
    "a snapshot that leads away": [(member("backup/snapshots/../../../../tmp/sysctr-escape"), b"x")],
    "members above": [(member("/tmp/sysctr-escape"), b"x"), (member("../../tmp/sysctr-escape"), b"x")],
    "a link, and a file through it": [
        (member(f"{ROOT}/out", tarfile.SYMTYPE, "/tmp"), b""), (member(f"{ROOT}/out/sysctr-escape"), b"x"),
    ],
    "a rootfs that is a link": [(member(ROOT, tarfile.SYMTYPE, "/"), b"")],
    "a rootfs that is a link, and files": [
        (member(ROOT, tarfile.SYMTYPE, "/tmp"), b""), (member(f"{ROOT}/sysctr-escape"), b"x"),
    ],
    "a hard link to the index": [(member(f"{ROOT}/home/stolen", tarfile.LNKTYPE, "backup/index.yaml"), b"")],
    "a step back": [(member(f"{ROOT}/../../../tmp/sysctr-escape"), b"x")],
    "a name with a newline": [(member(f"{ROOT}/home/a\nblock 0: tar: x: Cannot mknod"), b"x")],
    "a device": [(member(f"{ROOT}/home/disk", tarfile.BLKTYPE, devmajor=8, devminor=0), b"")],
}  # fmt: skip


@pytest.mark.parametrize("case", CONTAINED)
def test_a_hostile_export_is_refused_or_contained(shared_host, tree, tmp_path, case) -> None:
    name, identity = fresh()
    watched = [Path(path) for path in ("/etc/shadow", "/etc/passwd", "/tmp")]
    before = [(os.stat(path).st_mode, os.stat(path).st_ino) for path in watched]
    path = foreign.incus_export(
        str(tmp_path / "a.tar"), foreign.yaml_of(foreign.incus_index(name, **identity)), {"container": tree},
        CONTAINED[case],
    )  # fmt: skip
    done = shared_host.run("restore", path, check=False)
    assert "Traceback" not in done.err
    assert done.status in (0, 1), done
    assert not os.path.lexists("/tmp/sysctr-escape")
    assert [(os.stat(path).st_mode, os.stat(path).st_ino) for path in watched] == before
    listed = shared_host.run("list").out
    assert "evil" not in listed
    assert (name in listed) == (done.status == 0)
    if done.status == 0:
        assert shared_host.json("info", name)["uuid"] == identity["volatile.uuid"]


def test_a_hostile_index_is_an_error_in_words(shared_host, tree, tmp_path) -> None:
    name, _ = fresh()
    bomb = b"a: &a [x,x]\nb: [*a,*a]\n"
    named = foreign.incus_index(name)
    named["snapshots"] = ["../../x"]
    large = tarfile.TarInfo("backup/index.yaml")
    cases = {
        "bomb": (bomb, "anchors or aliases"), "nothing": (b"\0\0", "no YAML"),
        "snapshot": (foreign.yaml_of(named), "no snapshot can be called '../../x'"),
        "large": (b"a: " + b"x" * (1 << 20), "is no small file"),
    }  # fmt: skip
    for case, (index, words) in cases.items():
        path = foreign.incus_export(str(tmp_path / f"{case}.tar"), index, {"container": tree})
        refused(shared_host, 1, words, "restore", "-q", path)
    path = str(tmp_path / "link.tar")
    with tarfile.open(path, "w") as archive:
        large.type, large.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(large)
        archive.add(tree, ROOT)
    refused(shared_host, 1, "is no small file", "restore", "-q", path)
