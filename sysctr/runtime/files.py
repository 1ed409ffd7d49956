"""Work on a container's files, done by a process with the container's ids whose root is the container's.

So no symlink and no archive can reach the host, and nothing of the container's own is executed or loaded. The
functions run in a child of the supervisor, in a running container's mount namespace or in a job of their own.
"""

import bz2  # noqa: F401 - tarfile imports these three when it meets such a stream, which is too late
import errno
import functools
import io
import lzma  # noqa: F401
import os
import socket
import stat
import tarfile
import zlib  # noqa: F401

from sysctr.runtime import layers, wire
from sysctr.runtime.accounts import find_group, find_user

# It would ask the C library for the names of owners, and that loads the libraries which the container's
# nsswitch.conf names (CVE-2019-14271). Members carry numbers; names are looked up in `accounts`.
tarfile.pwd = tarfile.grp = None  # type: ignore[attr-defined]

_SHADOW_LIMIT_BYTES = 4 << 20
_MODE_BITS = 0o7777


def untar(sync: socket.socket, program: dict) -> None:
    """Unpack the tar stream on standard input at program["path"], as cp would place what it holds.

    An existing directory receives the members; any other path becomes the name of the single top member.
    program: path, names (of the top members), user and group (names or numbers of the new owner, or null: as
    in the stream), mode (octal text for files, or null).
    """
    destination = program["path"]
    into = _is_directory(destination)
    if not into and (destination.endswith("/") or len(program.get("names") or ()) > 1):
        raise NotADirectoryError(errno.ENOTDIR, "not a directory", destination)
    rename = "" if into else os.path.basename(destination)
    directory = destination if into else os.path.dirname(destination) or "/"
    if not _is_directory(directory):
        raise FileNotFoundError(errno.ENOENT, "no such directory", directory)
    owner = _owner(program)
    mode = int(program["mode"], 8) & _MODE_BITS if program.get("mode") else None
    count = 0
    with tarfile.open(fileobj=io.FileIO(0, closefd=False), mode="r|*") as archive:
        # The root around us is what keeps a member inside; from 3.14 on the default would drop owners too.
        archive.extraction_filter = lambda member, _path: member
        for member in archive:
            member.name = _placed(member.name, rename)
            if member.islnk():
                member.linkname = _placed(member.linkname, rename)
            member.uid = member.uid if owner[0] is None else owner[0]
            member.gid = member.gid if owner[1] is None else owner[1]
            if mode is not None and member.isfile():
                member.mode = mode
            archive.extract(member, directory, numeric_owner=True)
            count += 1
    wire.send(sync, {"files": count})


def _owner(program: dict) -> "tuple[int | None, int | None]":
    user, group = program.get("user"), program.get("group")
    found = find_user(user) if user else None
    return (
        found["uid"] if found else None,
        find_group(group) if group else found["gid"] if found else None,
    )


def _placed(name: str, rename: str) -> str:
    """Return where a member goes, below the directory and with the top one renamed."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or not parts:
        raise ValueError(f"a member is called {name!r}")
    return "/".join([rename, *parts[1:]] if rename else parts)


def tar(sync: socket.socket, program: dict) -> None:
    """Write program["paths"] as a tar stream to standard output, each under its base name.

    A path that is a symlink itself is followed, inside this root; links below it stay links. What lies on
    another file system than its start (proc, a volume) is left out, and so are sockets.
    """
    # A path that is missing is told before a byte of the stream is written.
    tops = [(path, os.path.realpath(path, strict=True)) for path in program["paths"]]
    with tarfile.open(fileobj=io.FileIO(1, "w", closefd=False), mode="w|", format=tarfile.PAX_FORMAT) as out:
        for path, real in tops:
            name = os.path.basename(os.path.normpath(path)) or "rootfs"
            keep = functools.partial(_same_device, real, os.lstat(real).st_dev)
            out.add(real, arcname=name, filter=keep)


def _same_device(top: str, device: int, info: tarfile.TarInfo) -> "tarfile.TarInfo | None":
    _, _, rest = info.name.partition("/")
    try:
        return info if os.lstat(os.path.join(top, rest) if rest else top).st_dev == device else None
    except FileNotFoundError:
        return None


def setup(sync: socket.socket, program: dict) -> None:
    """Write what makes a container its owner's: files, keys, passwords.

    program: files ([{path, text, mode}]), append ([{path, line, mode}]), passwords ({user: hash}), remove
    ([path], a `*` at its end stands for anything); every part is optional. Running it twice changes nothing
    more.
    """
    for path in program.get("remove", ()):
        for found in _named(path):
            try:
                os.unlink(found)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                pass
    for entry in program.get("files", ()):
        _write(entry["path"], entry["text"], entry.get("mode", 0o644))
    for entry in program.get("append", ()):
        _append_line(entry["path"], entry["line"], entry.get("mode", 0o600))
    if program.get("passwords"):
        _set_passwords(program["passwords"])


def _named(path: str) -> "list[str]":
    """Return the path, or where it ends in `*` those of its directory that begin as it does."""
    if not path.endswith("*"):
        return [path]
    directory, _, beginning = path[:-1].rpartition("/")
    try:
        return [f"{directory}/{name}" for name in os.listdir(directory) if name.startswith(beginning)]
    except OSError:
        return []


def _is_directory(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError:
        return False


def _write(path: str, text: str, mode: int) -> None:
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    temporary = f"{path}.sysctr-new"
    try:
        os.unlink(temporary)
    except FileNotFoundError:
        pass
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.fchmod(fd, mode)
        os.write(fd, text.encode("utf-8", "surrogateescape"))
    finally:
        os.close(fd)
    os.rename(temporary, path)


def _read(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    try:
        return os.read(fd, _SHADOW_LIMIT_BYTES).decode("utf-8", "surrogateescape")
    finally:
        os.close(fd)


def _append_line(path: str, line: str, mode: int) -> None:
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        os.makedirs(directory, mode=0o700)
    text = _read(path)
    if line in text.splitlines():
        return
    if text and not text.endswith("\n"):
        text += "\n"
    _write(path, f"{text}{line}\n", mode)


def _set_passwords(passwords: "dict[str, str]") -> None:
    rows = [line.split(":") for line in _read("/etc/shadow").splitlines()]
    known = {line.split(":")[0] for line in _read("/etc/passwd").splitlines()}
    for user, hashed in passwords.items():
        if user not in known:
            raise LookupError(f"no user {user!r} in the container")
        row = next((row for row in rows if row[0] == user), None)
        if row is None or len(row) < 2:
            rows = [row for row in rows if row[0] != user]
            rows.append([user, hashed, "", "0", "99999", "7", "", "", ""])
        else:
            row[1] = hashed
    try:
        mode = stat.S_IMODE(os.stat("/etc/shadow").st_mode)
        group = os.stat("/etc/shadow").st_gid
    except FileNotFoundError:
        mode, group = 0o600, 0
    _write("/etc/shadow", "".join(":".join(row) + "\n" for row in rows), mode)
    os.chown("/etc/shadow", 0, group)


BUILTINS = {"untar": untar, "tar": tar, "setup": setup, "merge": layers.merge, "strip": layers.strip}
