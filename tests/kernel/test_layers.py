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
from tests.disk import disk
from tests.trees import describe, difference

pytestmark = [pytest.mark.root, pytest.mark.kernel, pytest.mark.needs("loop")]

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY

NAMES = ("a", "b", "with\nnewline", "ü" * 127)
paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
modes = st.sampled_from([0o755, 0o700, 0o4750, 0o1777, 0o000])
# What a container does to its files: most of it fails for one that is not there, as in life.
actions = st.one_of(
    st.tuples(st.just("write"), paths, st.sampled_from([b"", b"one", b"two"])),
    st.tuples(st.just("mkdir"), paths),
    st.tuples(st.just("remove"), paths),
    st.tuples(st.just("replace"), paths),
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
        Path(path).write_bytes(rest[0])
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


def union(sources: list[str], target: str) -> None:
    os.mkdir(target)
    layers.union([os.open(each, DIRECTORY) for each in sources], os.open(target, DIRECTORY))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
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
        union(run, f"{top}/merged")
        with mounted(place, chain) as seen:
            wanted = describe(seen)
        with mounted(place, [*chain[:first], f"{top}/merged", *chain[first + len(run) :]]) as seen:
            assert difference(wanted, describe(seen)) == {}
        for path, entry in describe(f"{top}/merged").items():
            assert not stat.S_ISDIR(entry[0]) or not layers.MARKS & set(entry[5]), path
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        shutil.rmtree(top)


def test_nothing_is_copied(place) -> None:
    for name, text in (("top", "x"), ("low", "y" * 8)):
        os.makedirs(f"{place}/{name}/d")
        Path(place, name, "d", name).write_text(text)
    union([f"{place}/top", f"{place}/low"], f"{place}/one")
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
    union([f"{place}/top", f"{place}/low"], f"{place}/one")
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
    os.mkdir(f"{place}/low")
    union([f"{place}/top", f"{place}/low"], f"{place}/one")
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
    worker.merge(f"{place}/uppers", ["101.aaaaaaaa/rootfs", "101.bbbbbbbb/rootfs"], "101.cccccccc/rootfs")
    got = describe(f"{place}/uppers/101.cccccccc/rootfs")
    wanted = describe(top)
    wanted["etc/low"] = describe(low)["etc/low"]
    assert difference(wanted, got) == {}
    shutil.rmtree(f"{place}/uppers")
