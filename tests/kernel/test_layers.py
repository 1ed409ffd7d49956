"""Overlay layers merged by hard links show what they showed before, mounted for real."""

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sysctr.engine.trees import TreeWorker
from sysctr.linux.mount import mount, umount2
from sysctr.runtime import layers
from sysctr.storage.base import RootSpec, Tree
from tests.disk import disk
from tests.trees import describe, difference

pytestmark = [pytest.mark.root, pytest.mark.kernel, pytest.mark.needs("loop")]

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY

NAMES = ("a", "b", "with\nnewline", "ü" * 127)
# Few, so that what happens in one layer often meets what happened in another.
paths = st.one_of(
    st.lists(st.sampled_from(NAMES[:2]), min_size=1, max_size=3), st.lists(st.sampled_from(NAMES), min_size=1)
).map(lambda parts: "/".join(parts[:3]))
modes = st.sampled_from([0o755, 0o700, 0o4750, 0o1777, 0o000])
# What a container does to its files: most of it fails for one that is not there, as in life.
actions = st.one_of(
    st.tuples(st.just("write"), paths, st.sampled_from([b"", b"one", b"two"])),
    st.tuples(st.just("mkdir"), paths),
    *[st.tuples(st.just("remove"), paths)] * 3,
    *[st.tuples(st.just("replace"), paths)] * 2,
    st.tuples(st.just("chmod"), paths, modes),
    st.tuples(st.just("chown"), paths),
    st.tuples(st.just("mark"), paths, st.sampled_from([b"1", b"2"])),
    st.tuples(st.just("acl"), paths),
    st.tuples(st.just("link"), paths, paths),
    st.tuples(st.just("rename"), paths, paths),
    st.tuples(st.just("symlink"), paths, st.sampled_from(["a", "/etc/passwd", "../b"])),
    st.tuples(st.just("fifo"), paths),
    st.tuples(st.just("date"), paths, st.integers(1, 9)),
)
ACL = bytes.fromhex(
    "0200000001000700ffffffff020005002100000004000500ffffffff10000700ffffffff20000500ffffffff"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[str]:
    """A file system of its own, with names of 255 bytes and attributes."""
    path = str(tmp_path_factory.mktemp("layers") / "disk")
    os.mkdir(path)
    with disk(path, "ext4", size_bytes=128 << 20):
        yield path


def act(top: str, kind: str, name: str, *rest: Any) -> None:
    """Do one thing to a tree; raises OSError where that cannot be done."""
    path = f"{top}/{name}"
    if kind == "write":
        os.makedirs(os.path.dirname(path), exist_ok=True)
        # Not waiting for the reader of a FIFO.
        file_fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o644)
        os.write(file_fd, rest[0])
        os.close(file_fd)
    elif kind == "mkdir":
        os.makedirs(path)
    elif kind in ("remove", "replace"):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
            if kind == "replace":
                Path(path).write_bytes(b"was a directory")
        else:
            os.unlink(path)
            if kind == "replace":
                os.mkdir(path)
    elif kind == "chmod":
        os.chmod(path, rest[0])
    elif kind == "chown":
        os.chown(path, 1000, 1001, follow_symlinks=False)
    elif kind == "mark":
        os.setxattr(path, "user.mine", rest[0])
    elif kind == "acl":
        os.setxattr(path, "system.posix_acl_access", ACL)
        if os.path.isdir(path):
            os.setxattr(path, "system.posix_acl_default", ACL)
    elif kind == "link":
        os.link(path, f"{top}/{rest[0]}", follow_symlinks=False)
    elif kind == "rename":
        os.rename(path, f"{top}/{rest[0]}")
    elif kind == "symlink":
        os.symlink(rest[0], path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "date":
        os.utime(path, ns=(rest[0], rest[0]), follow_symlinks=False)


@contextmanager
def mounted(place: str, lowers: list[str], upper: str = "") -> Iterator[str]:
    target = f"{place}/mounted"
    os.makedirs(target, exist_ok=True)
    options = f"lowerdir={':'.join(lowers)},userxattr"
    if upper:
        os.makedirs(f"{upper}-work", exist_ok=True)
        options += f",upperdir={upper},workdir={upper}-work"
    mount("overlay", target, "overlay", 0, options)
    try:
        yield target
    finally:
        umount2(target)


def union(place: str, sources: list[str], target: str, below: list[str]) -> None:
    os.mkdir(target)
    os.makedirs(f"{place}/nothing", exist_ok=True)
    with mounted(
        place, [*below, f"{place}/nothing"] if len(below) != 0 else [f"{place}/nothing", place]
    ) as seen:
        below_fd = os.open(seen, DIRECTORY) if below else -1
        layers.union([os.open(each, DIRECTORY) for each in sources], os.open(target, DIRECTORY), below_fd)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    stack=st.lists(st.lists(actions, max_size=12), min_size=4, max_size=5),
    first=st.integers(0, 2),
    count=st.integers(2, 5),
)
def test_a_merged_chain_shows_the_same_tree(place, stack, first, count) -> None:
    before = len(os.listdir("/proc/self/fd"))
    top = f"{place}/example"
    try:
        chain = [f"{top}/bottom"]
        os.makedirs(chain[0])
        for name in NAMES[:2]:
            os.makedirs(f"{chain[0]}/{name}/{NAMES[2]}/a")
            Path(chain[0], name, "b").write_text("bottom")
            os.link(f"{chain[0]}/{name}/b", f"{chain[0]}/{name}/{NAMES[3]}")
        for number, doings in enumerate(stack):
            # The kernel makes the layers, with its own whiteouts and marks.
            upper = f"{top}/layer-{number}"
            os.mkdir(upper)
            with mounted(place, chain, upper) as root:
                for kind, *rest in doings:
                    with contextlib.suppress(OSError):
                        act(root, kind, *rest)
                os.chmod(root, 0o700 + number)
            chain.insert(0, upper)
        run = chain[:-1][first : first + count]
        union(place, run, f"{top}/merged", chain[first + len(run) :])
        with mounted(place, chain) as seen:
            wanted = describe(seen)
        with mounted(place, [*chain[:first], f"{top}/merged", *chain[first + len(run) :]]) as seen:
            assert difference(wanted, describe(seen)) == {}
        for path, entry in describe(f"{top}/merged").items():
            assert not stat.S_ISDIR(entry[0]) or not layers.MARKS & set(entry[5]), path
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        shutil.rmtree(top)


@pytest.mark.parametrize("middle", ["whiteout", "file"])
def test_what_a_directory_hid_stays_hidden_though_it_is_not_marked(place, middle) -> None:
    layer = {name: f"{place}/{name}" for name in ("top", "middle", "bottom", "merged")}
    os.makedirs(f"{layer['top']}/a")
    os.mkdir(layer["middle"])
    if middle == "file":
        Path(layer["middle"], "a").write_text("")
    else:
        os.mknod(f"{layer['middle']}/a", 0o20000, 0)
    os.makedirs(f"{layer['bottom']}/a/hidden")
    with mounted(place, [layer["top"], layer["middle"], layer["bottom"]]) as seen:
        assert os.listdir(f"{seen}/a") == []
    union(place, [layer["top"], layer["middle"]], layer["merged"], [layer["bottom"]])
    with mounted(place, [layer["merged"], layer["bottom"]]) as seen:
        assert os.listdir(f"{seen}/a") == []
    for path in layer.values():
        shutil.rmtree(path)


def test_what_came_and_went_within_a_run_leaves_no_name(place) -> None:
    chain = [f"{place}/bottom"]
    os.makedirs(f"{chain[0]}/a")
    for kind in ("write", "remove"):
        upper = f"{place}/{kind}"
        os.mkdir(upper)
        with mounted(place, chain, upper) as root:
            act(root, kind, "a/new/deep/file", *[b""] * (kind == "write"))
        chain.insert(0, upper)
    union(place, chain[:2], f"{place}/merged", chain[2:])
    with mounted(place, [f"{place}/merged", chain[-1]]) as seen:
        assert os.listdir(f"{seen}/a/new/deep") == []
    for path in (*chain, f"{place}/merged", f"{place}/write-work", f"{place}/remove-work"):
        shutil.rmtree(path)


def test_nothing_is_copied(place) -> None:
    for name, text in (("top", "x"), ("low", "y" * 8)):
        os.makedirs(f"{place}/{name}/d")
        Path(place, name, "d", name).write_text(text)
    union(place, [f"{place}/top", f"{place}/low"], f"{place}/one", [f"{place}/low"])
    for name in ("top", "low"):
        assert os.stat(f"{place}/one/d/{name}").st_ino == os.stat(f"{place}/{name}/d/{name}").st_ino
    for name in ("top", "low", "one"):
        shutil.rmtree(f"{place}/{name}")


def deep(top: str, depth: int) -> None:
    """Make directories deeper than any path, with a file in the last."""
    fd = os.open(top, DIRECTORY)
    for _ in range(depth):
        os.mkdir("deep", dir_fd=fd)
        below = os.open("deep", DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open(f"of-{os.path.basename(top)}", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


def test_no_depth_is_too_much(place) -> None:
    for name, depth in (("top", 3000), ("low", 4000)):
        os.mkdir(f"{place}/{name}")
        deep(f"{place}/{name}", depth)
    union(place, [f"{place}/top", f"{place}/low"], f"{place}/one", [f"{place}/low"])
    found = subprocess.run(
        ["find", f"{place}/one", "-type", "f", "-printf", "%d %f\n"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(found.stdout.splitlines()) == {"3001 of-top", "4001 of-low"}
    subprocess.run(["rm", "-rf", *(f"{place}/{name}" for name in ("top", "low", "one"))], check=True)


def test_a_file_with_as_many_names_as_can_be_is_copied(place) -> None:
    os.makedirs(f"{place}/top/many")
    Path(place, "top/file").write_text("content")
    os.chmod(f"{place}/top/file", 0o4711)
    os.setxattr(f"{place}/top/file", "user.mine", b"1")
    os.mknod(f"{place}/top/gone", 0o20000, 0)
    for name in ("file", "gone"):
        for number in range(64_998):
            os.link(f"{place}/top/{name}", f"{place}/top/many/{name}-{number}")
    os.makedirs(f"{place}/low/many")
    union(place, [f"{place}/top", f"{place}/low"], f"{place}/one", [f"{place}/low"])
    wanted, got = describe(f"{place}/top"), describe(f"{place}/one")
    # Which of them are one file has changed, and nothing else.
    for tree in (wanted, got):
        for entry in tree.values():
            if not stat.S_ISDIR(entry[0]):
                entry.pop()
    for path in [path for path in wanted if "gone" in path]:
        wanted[path][4] = got[path][4]
    assert difference(wanted, got) == {}
    for name in ("top", "low", "one"):
        shutil.rmtree(f"{place}/{name}")


def test_a_job_merges_with_the_containers_ids(place, jobs) -> None:
    for name in ("101.aaaaaaaa", "101.bbbbbbbb", "101.cccccccc"):
        os.makedirs(f"{place}/uppers/{name}/rootfs")
    top = f"{place}/uppers/101.aaaaaaaa/rootfs"
    os.mkdir(f"{top}/etc")
    Path(top, "etc/shadow").write_text("secret")
    os.chown(f"{top}/etc/shadow", 0, 42)
    os.chmod(f"{top}/etc/shadow", 0o640)
    Path(top, "ping").write_bytes(b"")
    subprocess.run(["setcap", "cap_net_raw+ep", f"{top}/ping"], check=True)
    subprocess.run(["setfacl", "-m", "u:33:rwx,d:u:34:rx", f"{top}/etc"], check=True)
    os.mknod(f"{top}/gone", 0o20000, 0)
    low = f"{place}/uppers/101.bbbbbbbb/rootfs"
    os.makedirs(f"{low}/etc")
    Path(low, "etc/low").write_text("low")
    Path(low, "gone").write_text("gone")
    worker = TreeWorker(jobs)
    os.makedirs(f"{place}/base")
    below = RootSpec((Tree("base", f"{place}/base", read_only=True),))
    worker.merge(
        f"{place}/uppers", ["101.aaaaaaaa/rootfs", "101.bbbbbbbb/rootfs"], "101.cccccccc/rootfs", below
    )
    got = describe(f"{place}/uppers/101.cccccccc/rootfs")
    wanted = describe(top)
    wanted["etc/low"] = describe(low)["etc/low"]
    assert difference(wanted, got) == {}
    shutil.rmtree(f"{place}/uppers")
