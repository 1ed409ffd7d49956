"""Makes a small rootfs from the host's static busybox: an init, a shell, and nothing else that could break.

Tests that need "some template" use this one: it costs some milliseconds, and only needs busybox-static.
"""

import io
import shutil
import subprocess
import tarfile

INITTAB = """\
::sysinit:/bin/hostname -F /etc/hostname
::respawn:-/bin/sh
::ctrlaltdel:/sbin/reboot
"""
APPLETS = (
    "sh", "ls", "cat", "echo", "true", "false", "sleep", "id", "env", "ps", "kill", "mkdir", "rm", "mv", "cp",
    "ln", "touch", "chmod", "chown", "stat", "dd", "test", "hostname", "mount", "umount", "ip", "ping", "nc",
    "wget", "tar", "head", "tail", "grep", "sed", "seq", "sync", "date", "df", "du", "find", "wc", "uname",
    "tty", "stty", "yes",
)  # fmt: skip
SBIN_APPLETS = ("init", "halt", "poweroff", "reboot", "getty")


def static_busybox() -> str | None:
    """Return the path of the host's busybox if it is statically linked."""
    path = shutil.which("busybox", path="/usr/bin:/bin")
    if path is None:
        return None
    # Without an interpreter entry the dynamic loader has nothing to do: readelf is not everywhere.
    listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=False)
    return path if listed.returncode != 0 else None


def entries(busybox: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Return what the rootfs holds, as archive members with root's ids."""
    found = []

    def add(name: str, kind: bytes, mode: int, data: bytes = b"", target: str = "") -> None:
        member = tarfile.TarInfo(name)
        member.type, member.mode, member.size, member.linkname = kind, mode, len(data), target
        member.uname = member.gname = "root"
        member.mtime = 1_700_000_000
        found.append((member, data))

    add("./", tarfile.DIRTYPE, 0o755)
    for name in ("bin", "sbin", "etc", "dev", "proc", "sys", "run", "root", "var", "home"):
        add(f"./{name}", tarfile.DIRTYPE, 0o700 if name == "root" else 0o755)
    add("./tmp", tarfile.DIRTYPE, 0o1777)
    with open(busybox, "rb") as file:
        add("./bin/busybox", tarfile.REGTYPE, 0o755, file.read())
    for applet in APPLETS:
        add(f"./bin/{applet}", tarfile.SYMTYPE, 0o777, target="busybox")
    for applet in SBIN_APPLETS:
        add(f"./sbin/{applet}", tarfile.SYMTYPE, 0o777, target="../bin/busybox")
    files = {
        "inittab": INITTAB,
        "hostname": "busybox\n",
        "passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        "group": "root:x:0:\nnogroup:x:65534:\n",
        "os-release": 'ID=busybox\nVERSION_ID=1\nPRETTY_NAME="busybox for tests"\n',
    }
    for name, text in files.items():
        add(f"./etc/{name}", tarfile.REGTYPE, 0o644, text.encode())
    return found


def write_tarball(path: str, busybox: str, *, compression: str = "", prefix: str = "") -> str:
    """Write the rootfs as an archive; `compression` is "", "gz", "xz" or "bz2"; `prefix` replaces `./`.

    The prefix "plain" stands for none at all: `bin/busybox`.
    """
    with tarfile.open(path, f"w:{compression}", format=tarfile.PAX_FORMAT) as archive:
        for member, data in entries(busybox):
            if prefix:
                member.name = ("" if prefix == "plain" else prefix) + member.name.removeprefix("./")
            if not member.name:
                continue
            archive.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return path


def write_tree(directory: str, busybox: str) -> str:
    """Write the rootfs as a tree owned by root; needs root."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, data in entries(busybox):
            archive.addfile(member, io.BytesIO(data) if member.isreg() else None)
    argv = ["tar", "--extract", "--same-owner", "--preserve-permissions", "--directory", directory]
    subprocess.run(argv, input=buffer.getvalue(), check=True)
    return directory
