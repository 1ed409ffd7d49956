"""Says whether a tree can be a container's root, and what is in it; the tree may be hostile.

Every path is resolved by the kernel as if the tree were the root directory, each file is opened once and
judged by its descriptor, and nothing is read beyond a bound.
"""

import errno
import os
import platform
import re
import stat
import struct
from dataclasses import dataclass

from sysctr.errors import SysctrError
from sysctr.linux.path import open_in_root

DEFAULT_INIT = "/sbin/init"
_OS_RELEASE_MAX_BYTES = 64 * 1024
_OS_VALUE_MAX_CHARACTERS = 200
_NEEDED_DIRECTORIES = ("dev", "proc", "sys")

# (ELF class, e_machine, little-endian) by Debian's names; elf.h.
_ARCHITECTURES = {
    (2, 62, True): "amd64",
    (1, 62, True): "x32",
    (1, 3, True): "i386",
    (2, 183, True): "arm64",
    (1, 40, True): "armhf",
    (2, 243, True): "riscv64",
    (2, 21, True): "ppc64el",
    (2, 22, False): "s390x",
    (2, 258, True): "loong64",
}
_MACHINES = {
    "x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64", "ppc64le": "ppc64el", "s390x": "s390x",
    "i686": "i386", "armv7l": "armhf", "loongarch64": "loong64",
}  # fmt: skip

# What an init understands as "shut down and power off"; sources: systemd(1) SIGNALS, busybox init/init.c,
# sysvinit init(8) with pf:: lines of the distributions, openrc-init.c, runit-init(8).
_STOP_SIGNALS = {
    "systemd": "SIGRTMIN+3",
    "busybox": "SIGUSR2",
    "sysvinit": "SIGPWR",
    "openrc": "SIGINT",
    "runit": "SIGCONT",
    "other": "SIGPWR",
}
_KINDS_BY_TARGET = (
    ("systemd", "systemd"), ("busybox", "busybox"), ("openrc-init", "openrc"), ("runit-init", "runit"),
)  # fmt: skip


class NotARootfs(SysctrError):
    """The tree cannot be the root of a container here; the message names what is wrong with it."""

    code = "not-a-rootfs"
    http_status = 422


@dataclass(frozen=True)
class Rootfs:
    """What was found in a usable tree."""

    init: str
    init_kind: str
    stop_signal: str
    arch: str
    os_id: str
    os_version: str
    os_name: str


def host_architecture() -> str:
    """Return this machine's architecture by Debian's name."""
    machine = platform.machine()
    return _MACHINES.get(machine, machine)


def check_rootfs(rootfs: str, init: str = "", stop_signal: str = "") -> Rootfs:
    """Judge the tree at `rootfs`; /dev, /proc and /sys are made where they are missing.

    Raises NotARootfs. `init` and `stop_signal` are what the builder knows better than the tree tells.
    """
    init = init or DEFAULT_INIT
    try:
        root_fd = os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise NotARootfs(f"cannot use this rootfs: it is no directory ({error.strerror})") from error
    try:
        arch, target = _check_init(root_fd, init)
        for name in _NEEDED_DIRECTORIES:
            _need_directory(root_fd, name)
        release = read_os_release(root_fd)
    finally:
        os.close(root_fd)
    kind = init_kind(target)
    return Rootfs(
        init=init,
        init_kind=kind,
        stop_signal=stop_signal or _STOP_SIGNALS[kind],
        arch=arch,
        os_id=release.get("ID", "unknown"),
        os_version=release.get("VERSION_ID", ""),
        os_name=release.get("PRETTY_NAME") or release.get("NAME", ""),
    )


def init_kind(target: str) -> str:
    """Tell which init program a resolved path is.

    >>> init_kind("/usr/lib/systemd/systemd"), init_kind("/usr/sbin/init")
    ('systemd', 'sysvinit')
    """
    name = os.path.basename(target)
    for program, kind in _KINDS_BY_TARGET:
        if name == program:
            return kind
    return "sysvinit" if name == "init" else "other"


def _check_init(root_fd: int, init: str) -> tuple[str, str]:
    """Return (architecture, resolved path) of the init program."""
    fd = _open_program(root_fd, init, f"no {init}")
    try:
        target = _path_below(root_fd, fd)
        head = os.read(fd, 256)
    finally:
        os.close(fd)
    if head.startswith(b"#!"):
        interpreter = os.fsdecode(head[2:].split(b"\n")[0].strip().split(b" ")[0])
        fd = _open_program(root_fd, interpreter, f"{init} is a script and its {interpreter!r} is missing")
        try:
            head = os.read(fd, 256)
        finally:
            os.close(fd)
    arch = elf_architecture(head)
    if not arch:
        raise NotARootfs(f"cannot use this rootfs: its {init} is not a program")
    here = host_architecture()
    if arch != here:
        raise NotARootfs(
            f"cannot use this rootfs: its {init} is a program for {arch}, this machine is {here}",
            hint=f"get the template for {here}",
        )
    return arch, target


def _open_program(root_fd: int, path: str, missing: str) -> int:
    try:
        # O_NONBLOCK: opening a fifo or a device of the tree must neither hang nor do anything.
        fd = open_in_root(root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise NotARootfs(
                f"cannot use this rootfs: {missing}",
                hint="a system container needs an init; a dangling or looping symlink is none",
            ) from error
        raise NotARootfs(f"cannot use this rootfs: {path}: {error.strerror}") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or not status.st_mode & 0o111:
        os.close(fd)
        raise NotARootfs(f"cannot use this rootfs: its {path} is not an executable file")
    return fd


def _path_below(root_fd: int, fd: int) -> str:
    root, path = os.readlink(f"/proc/self/fd/{root_fd}"), os.readlink(f"/proc/self/fd/{fd}")
    return path[len(root) :] if path.startswith(root + "/") else path


def elf_architecture(head: bytes) -> str:
    """Return the architecture an ELF header is for, "" if it is no ELF header.

    >>> elf_architecture(bytes.fromhex("7f454c4602010100" + "00" * 8 + "02003e00"))
    'amd64'
    """
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return ""
    little = head[5] == 1
    (machine,) = struct.unpack_from("<H" if little else ">H", head, 18)
    known = _ARCHITECTURES.get((head[4], machine, little))
    return known or f"unknown (class {head[4]}, machine {machine})"


def _need_directory(root_fd: int, name: str) -> None:
    try:
        mode = os.stat(name, dir_fd=root_fd, follow_symlinks=False).st_mode
    except FileNotFoundError:
        os.mkdir(name, 0o755, dir_fd=root_fd)
        return
    if stat.S_ISLNK(mode):
        raise NotARootfs(
            f"cannot use this rootfs: its /{name} is a symlink", hint="it must be a directory to mount on"
        )
    if not stat.S_ISDIR(mode):
        raise NotARootfs(f"cannot use this rootfs: its /{name} is not a directory")


def read_os_release(root_fd: int) -> dict[str, str]:
    """Return what /etc/os-release says, or /usr/lib/os-release; {} where there is none or it is nonsense."""
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        try:
            fd = open_in_root(root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            continue
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return parse_os_release(os.read(fd, _OS_RELEASE_MAX_BYTES))
        finally:
            os.close(fd)
    return {}


def parse_os_release(data: bytes) -> dict[str, str]:
    r"""Read the KEY=value lines of os-release(5); whatever else is there is passed over.

    >>> parse_os_release(b'ID=debian\nVERSION_ID="12"\nPRETTY_NAME="evil\x1b[2J"\nrubbish')
    {'ID': 'debian', 'VERSION_ID': '12', 'PRETTY_NAME': 'evil[2J'}
    """
    values = {}
    for line in data[:_OS_RELEASE_MAX_BYTES].decode(errors="replace").split("\n"):
        key, separator, value = line.strip().partition("=")
        if not separator or not re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", key):
            continue
        if len(value) >= 2 and value[0] in "\"'" and value[-1] == value[0]:
            value = re.sub(r'\\(["$`\\])', r"\1", value[1:-1]) if value[0] == '"' else value[1:-1]
        values[key] = "".join(c for c in value if c.isprintable())[:_OS_VALUE_MAX_CHARACTERS]
    return values
