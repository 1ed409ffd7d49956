"""Users and groups of a container, read from its files by a process whose root is the container's.

The C library's getpwnam is not used: it would load the container's own libraries into a process of ours.
"""

import os

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LIMIT_BYTES = 4 << 20
_PASSWD = "/etc/passwd"
_GROUP = "/etc/group"


def find_user(name: str) -> dict:
    """Look a user up by name or number, optionally as `user:group`; raises LookupError for an unknown one."""
    wanted, _, wanted_group = name.partition(":")
    by_number = _is_id(wanted)
    entry = next((e for e in _passwd() if e[0] == wanted or (by_number and e[2] == wanted)), None)
    if entry is None and not by_number and wanted != "root":
        raise LookupError(f"no user {wanted!r} in the container")
    uid = int(entry[2]) if entry else int(wanted) if by_number else 0
    gid = int(entry[3]) if entry else uid
    account = entry[0] if entry else wanted
    groups = [int(g[2]) for g in _group() if account in g[3].split(",")]
    if wanted_group:
        gid, groups = find_group(wanted_group), []
    home = (entry[5] if entry else "") or ("/root" if uid == 0 else "/")
    shell = (entry[6] if entry else "") or "/bin/sh"
    return {
        "uid": uid, "gid": gid, "groups": groups, "home": home, "shell": shell,
        "environment": {"HOME": home, "USER": account, "LOGNAME": account, "SHELL": shell},
    }  # fmt: skip


def find_group(name: str) -> int:
    """Look a group up by name or number; raises LookupError for an unknown name."""
    if _is_id(name):
        return int(name)
    for row in _group():
        if row[0] == name:
            return int(row[2])
    raise LookupError(f"no group {name!r} in the container")


def _passwd() -> "list[list[str]]":
    return [row for row in _read_table(_PASSWD, 7) if _is_id(row[3])]


def _group() -> "list[list[str]]":
    return _read_table(_GROUP, 4)


def _is_id(text: str) -> bool:
    # Not isdigit() alone: that is true of ² too, of which int() makes nothing.
    return text.isascii() and text.isdigit() and len(text) < 10


def _read_table(path: str, columns: int) -> "list[list[str]]":
    try:
        # Not blocking, for a FIFO in the place of the file; bounded, for a device or a bomb.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        text = os.read(fd, _LIMIT_BYTES).decode("utf-8", "surrogateescape")
    except OSError:
        return []
    finally:
        os.close(fd)
    # A line ends where the C library ends it; splitlines() would see one in a form feed, too.
    rows = [line.split(":") for line in text.split("\n")]
    return [row for row in rows if len(row) >= columns and _is_id(row[2])]
