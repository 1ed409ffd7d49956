"""What a tree is, down to the last attribute, so that two can be compared."""

import os
import stat
from typing import Any


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
