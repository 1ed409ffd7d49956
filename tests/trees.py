"""What a tree is, to the last attribute, so that two can be compared; and trees with all there can be."""

import contextlib
import fnmatch
import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

from sysctr.runtime.layers import MARKS

MIB = 1 << 20


def named(top: str, pattern: str) -> list[Path]:
    """Return the files below a directory whose name fits; a tree that changes meanwhile is no error.

    `Path.rglob` of Python 3.11 raises FileNotFoundError for a directory that goes while it looks.
    """
    return [
        Path(directory, name)
        for directory, _, names in os.walk(top)
        for name in sorted(fnmatch.filter(names, pattern))
    ]


def describe(top: str, *, without: frozenset[str] = frozenset(), times: bool = True) -> dict[str, Any]:
    """Return everything below (and with) a directory by its path: kind, rights, times, attributes, content.

    Names of one file are a group, told by the first of them. Attributes in `without` are left out. The root's
    own eyes see it: nothing is followed.
    """
    found: dict[str, Any] = {}
    groups: dict[tuple[int, int], str] = {}
    for directory, directories, names in sorted(os.walk(top)):
        entries = [directory] if directory == top else []
        entries += [f"{directory}/{name}" for name in sorted(directories + names)]
        for path in entries:
            status = os.lstat(path)
            attributes = {
                name: os.getxattr(path, name, follow_symlinks=False)
                for name in os.listxattr(path, follow_symlinks=False)
                if name not in without
            }
            entry = [
                stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid,
                status.st_mtime_ns if times else 0, attributes,
            ]  # fmt: skip
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    entry.append(file.read())
            elif stat.S_ISLNK(status.st_mode):
                entry.append(os.readlink(path))
            elif not stat.S_ISDIR(status.st_mode):
                entry.append(status.st_rdev)
            relative = os.path.relpath(path, top)
            if not stat.S_ISDIR(status.st_mode):
                entry.append(groups.setdefault((status.st_dev, status.st_ino), relative))
            found[relative] = entry
    return found


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return what differs between two trees, for a message that can be read."""
    return {
        path: (one.get(path), other.get(path))
        for path in sorted({*one, *other})
        if one.get(path) != other.get(path)
    }


def everything(root: str, *, layer: bool = True) -> None:
    """Fill a directory with all that can be in one; what only a layer of an overlay has if it is one."""
    for name in ("plain", "new\nline", "n" * 255, "-rf", "two words"):
        Path(root, name).write_text(name)
    os.mkdir(f"{root}/dir")
    os.chmod(f"{root}/dir", 0o2750)
    subprocess.run(["setfacl", "-m", "u:33:rwx,d:u:34:rx", f"{root}/dir"], check=True)
    Path(root, "dir/ping").write_bytes(b"x")
    subprocess.run(["setcap", "cap_net_raw+ep", f"{root}/dir/ping"], check=True)
    Path(root, "owned").write_bytes(b"y")
    os.chown(f"{root}/owned", 1000, 65535)
    os.chmod(f"{root}/owned", 0o6711)
    os.link(f"{root}/owned", f"{root}/dir/other name")
    with open(f"{root}/holes", "wb") as file:
        file.truncate(200 * MIB)
        file.seek(100 * MIB)
        file.write(b"in the middle")
    os.setxattr(f"{root}/plain", "user.mine", bytes(range(256)))
    os.symlink("/etc/shadow", f"{root}/link")
    os.mkfifo(f"{root}/pipe", 0o620)
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(root):
        listener.bind("socket")
    os.mkdir(f"{root}/opaque")
    if layer:
        os.mknod(f"{root}/gone", 0o20000, 0)
        os.setxattr(f"{root}/opaque", "user.overlay.opaque", b"y")
        for mark in MARKS:
            os.setxattr(f"{root}/dir", mark, b"\0")
            os.setxattr(f"{root}/plain", mark, b"\0")
    os.utime(f"{root}/plain", ns=(3, 1_000_000_000_000_000_007))


def change_everything(root: str, *, layer: bool = True) -> None:
    """Do what a container may do while `everything` of it is copied."""
    os.unlink(f"{root}/new\nline")
    os.rename(f"{root}/plain", f"{root}/dir/plain")
    os.mkdir(f"{root}/plain")
    Path(root, "plain/inside").write_text("a directory now")
    shutil.rmtree(f"{root}/opaque")
    Path(root, "opaque").write_text("a file now")
    os.unlink(f"{root}/dir/other name")
    os.link(f"{root}/holes", f"{root}/dir/other name")
    os.chmod(f"{root}/two words", 0o600)
    subprocess.run(["setfacl", "-b", f"{root}/dir"], check=True)
    subprocess.run(["setcap", "-r", f"{root}/dir/ping"], check=True)
    os.mkdir(f"{root}/dir/new")
    if layer:
        os.unlink(f"{root}/gone")
        os.mknod(f"{root}/dir/newly gone", 0o20000, 0)
        os.setxattr(f"{root}/dir/new", "user.overlay.opaque", b"y")
    Path(root, "gone").write_text("here again")
    os.unlink(f"{root}/link")
    os.symlink("elsewhere", f"{root}/link")
    os.mkfifo(f"{root}/another pipe")
