"""The tree of a template that needs no mirror: the host's static busybox and the directories around it."""

import os
import shutil
import tarfile
import time
from collections.abc import Iterator

from sysctr.errors import SysctrError
from sysctr.linux import process

_PT_INTERP = 3
_BUSYBOX_MAX_BYTES = 64 * 1024**2
_SEARCH = "/usr/bin:/bin:/usr/local/bin"

_DIRECTORIES = (
    ("", 0o755), ("bin", 0o755), ("sbin", 0o755), ("usr", 0o755), ("usr/bin", 0o755), ("usr/sbin", 0o755),
    ("etc", 0o755), ("etc/init.d", 0o755), ("dev", 0o755), ("proc", 0o555), ("sys", 0o555), ("run", 0o755),
    ("root", 0o700), ("home", 0o755), ("srv", 0o755), ("mnt", 0o755), ("tmp", 0o1777), ("var", 0o755),
    ("var/log", 0o755), ("var/tmp", 0o1777), ("var/spool", 0o755), ("var/spool/cron", 0o755),
    ("var/spool/cron/crontabs", 0o700), ("lib", 0o755),
)  # fmt: skip


def find_busybox(search: str = _SEARCH) -> str:
    """Return the path of the host's static busybox.

    Raises SysctrError when there is none, or a dynamic one, which would find no libraries in the template.
    """
    path = shutil.which("busybox", path=search)
    if path is None:
        raise SysctrError(
            "cannot make this template: no busybox on this host", hint="`apt-get install busybox-static`"
        )
    with open(path, "rb") as file:
        if not is_static(file.read(64 * 1024)):
            raise SysctrError(
                f"cannot make this template: {path} is not statically linked",
                hint="`apt-get install busybox-static`",
            )
    return path


def is_static(program: bytes) -> bool:
    """Tell whether a little-endian ELF program (its first 64 KiB suffice) runs without a dynamic linker."""
    if program[:4] != b"\x7fELF" or len(program) < 64 or program[5] != 1:
        return False
    wide = program[4] == 2
    start = int.from_bytes(program[32:40] if wide else program[28:32], "little")
    entry_size, count = (
        int.from_bytes(program[at : at + 2], "little") for at in ((54, 56) if wide else (42, 44))
    )  # fmt: skip
    kinds = [
        int.from_bytes(program[start + index * entry_size :][:4], "little") for index in range(count)
    ]
    return bool(kinds) and _PT_INTERP not in kinds


def members(busybox: str) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Return the tree as archive members: directories, busybox, and a symlink for each of its applets."""
    for path, mode in _DIRECTORIES:
        yield _member(f"./{path}", tarfile.DIRTYPE, mode), b""
    with open(busybox, "rb") as file:
        program = file.read(_BUSYBOX_MAX_BYTES)
    yield _member("./bin/busybox", tarfile.REGTYPE, 0o755, size=len(program)), program
    for path in applets(busybox):
        if path != "bin/busybox":
            above = "../" * path.count("/")
            yield _member(f"./{path}", tarfile.SYMTYPE, 0o777, link=f"{above}bin/busybox"), b""


def applets(busybox: str) -> list[str]:
    """Return where this busybox wants its applets, as `sbin/init`."""
    listed = process.run([busybox, "--list-full"]).stdout.decode().split("\n")
    known = {directory for directory, _ in _DIRECTORIES if directory}
    # Debian's list has one bare name, `linuxrc`, which would land in the root directory.
    found = sorted({path for path in listed if os.path.dirname(path) in known})
    if "sbin/init" not in found:
        raise SysctrError(
            f"cannot make this template: {busybox} has no init", hint="`apt-get install busybox-static`"
        )
    return found


def _member(name: str, kind: bytes, mode: int, *, size: int = 0, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.mtime = int(time.time())
    member.type, member.mode, member.size, member.linkname = kind, mode, size, link
    return member
