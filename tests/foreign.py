"""What other container managers write, made as they make it: archives of vzdump, and containers of LXC."""

import contextlib
import io
import os
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.wait import wait_until

# As Proxmox VE and Debian's LXC have it; the ids are free on the machines that tests run on.
FIRST_ID, ID_COUNT = 100_000, 65536
# proxmox.md 2.2: what vzdump and pct restore tell tar alike.
COMMON_TAR_FLAGS = (
    "--one-file-system", "-p", "--sparse", "--numeric-owner", "--acls", "--xattrs", "--xattrs-include=user.*",
    "--xattrs-include=security.capability", "--warning=no-file-ignored", "--warning=no-xattr-write",
)  # fmt: skip
Member = tuple[tarfile.TarInfo, bytes]
_CREATED = "2026-01-02T03:04:05.123456789Z"
STANDARD_EXCLUDES = ("/tmp/?*", "/var/tmp/?*", "/var/run/?*.pid")
COMPRESSORS = {
    "tar": (), "tar.lzo": ("lzop",), "tar.gz": ("gzip", "--rsyncable"), "tar.zst": ("zstd", "--threads=1"),
    "tar.bz2": ("bzip2",),
}  # fmt: skip
DECOMPRESSING = {"tar": (), "tar.gz": ("-z",), "tar.lzo": ("--lzop",), "tar.zst": ("--zstd",)}


@contextlib.contextmanager
def open_directory() -> Iterator[Path]:
    """Give a directory that any user can reach, which pytest's are not."""
    with tempfile.TemporaryDirectory(prefix="sf-", dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


@contextlib.contextmanager
def user_namespace(first: int = FIRST_ID, count: int = ID_COUNT) -> Iterator[list[str]]:
    """Give what runs a command as root of a user namespace, as lxc-usernsexec does."""
    holder = subprocess.Popen(
        ["unshare", "--user", "sh", "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"ready\n"
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{holder.pid}/{name}").write_text(f"0 {first} {count}\n", encoding="ascii")
        yield ["nsenter", "--target", str(holder.pid), "--user", "--setuid", "0", "--setgid", "0", "--"]
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


def vzdump(
    path: str, tree: str, work: str, config: str, *, firewall: str = "", enter: Sequence[str] = ()
) -> str:
    """Write an archive of the rootfs `tree` as vzdump's snapshot mode does; the compressor is the name's."""
    head = Path(work, "head/etc/vzdump")
    head.mkdir(parents=True, exist_ok=True)
    (head / "pct.conf").write_text(config, encoding="utf-8")
    (head / "pct.fw").write_text(firewall, encoding="utf-8")
    excluded = [f"--exclude=.{pattern}" for pattern in STANDARD_EXCLUDES]
    tar = [
        *enter, "tar", "cpf", "-", "--totals", *COMMON_TAR_FLAGS, "--one-file-system",
        "--warning=no-file-ignored", f"--directory={work}/head", "./etc/vzdump/pct.conf",
        "./etc/vzdump/pct.fw", f"--directory={tree}", "--no-anchored", "--exclude=lost+found", "--anchored",
        *excluded, "./",
    ]  # fmt: skip
    compressor = COMPRESSORS[Path(path).name.partition(".")[2]]
    with open(path, "wb") as out, subprocess.Popen(
        tar, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as packer:
        subprocess.run(compressor or ("cat",), stdin=packer.stdout, stdout=out, check=True)
    assert packer.returncode == 0
    return path


def pct_restore(archive: str, root: str, enter: Sequence[str]) -> None:
    """Extract an archive with the tar command of Proxmox's restore (proxmox.md 2.5)."""
    flags = DECOMPRESSING[Path(archive).name.partition(".")[2]]
    argv = [
        *enter, "tar", "xpf", "-", *flags, "--totals", *COMMON_TAR_FLAGS, "-C", root, "--skip-old-files",
        "--anchored", "--exclude", "./dev/*",
    ]  # fmt: skip
    with open(archive, "rb") as file:
        done = subprocess.run(argv, stdin=file, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Lxc:
    """Debian's LXC with a directory of containers; a context manager that ends those that run."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        os.chmod(directory, 0o755)
        self._pivots_before = _pivots()
        # Of names that the sweep at the end of a session takes for its own.
        self._tag = f"{time.monotonic_ns() & 0xFFFFFF:06x}"

    def __enter__(self) -> "Lxc":
        return self

    def __exit__(self, *_error: object) -> None:
        running = self.run("lxc-ls", "--running", "-1").split()
        for name in running:
            self.run("lxc-stop", "-n", name, "-k")
        # The first lxc-start makes a cgroup to move itself to, which nobody takes back.
        for path in _pivots() - self._pivots_before:
            with contextlib.suppress(OSError):
                os.rmdir(path)

    def run(self, program: str, *arguments: str) -> str:
        """Run one of LXC's commands and return what it printed."""
        done = subprocess.run(
            [program, "-P", self.directory, *arguments], capture_output=True, text=True, check=False,
            preexec_fn=_plain_signals,
        )  # fmt: skip
        assert done.returncode == 0, f"{program} {arguments}: {done.stderr}"
        return done.stdout.strip()

    def name(self, word: str) -> str:
        """Return a container's name that is this test's alone."""
        return f"sysctr-{self._tag}-{word}"

    def define(self, name: str, lines: Sequence[str], *, unprivileged: bool = True) -> str:
        """Write a container's file, and return the path of its rootfs, which is made."""
        home = f"{self.directory}/{name}"
        os.makedirs(f"{home}/rootfs")
        text = [
            "lxc.include = /usr/share/lxc/config/common.conf",
            *(["lxc.include = /usr/share/lxc/config/userns.conf"] if unprivileged else []),
            "lxc.apparmor.profile = unconfined",
            f"lxc.rootfs.path = dir:{home}/rootfs",
            f"lxc.uts.name = {name}",
            *(f"lxc.idmap = {kind} 0 {FIRST_ID} {ID_COUNT}" for kind in ("u", "g") if unprivileged),
            *lines,
        ]
        Path(f"{home}/config").write_text("\n".join(text) + "\n", encoding="utf-8")
        os.chmod(home, 0o755)
        if unprivileged:
            os.chown(f"{home}/rootfs", FIRST_ID, FIRST_ID)
        return f"{home}/rootfs"

    def start(self, name: str) -> None:
        """Start a container, and wait until it runs."""
        self.run("lxc-start", "-n", name, "-d")
        wait_until(lambda: self.run("lxc-info", "-n", name, "-sH") == "RUNNING", 20)

    def attach(self, name: str, script: str) -> str:
        """Run a script in a container."""
        return self.run("lxc-attach", "-n", name, "--clear-env", "--", "/bin/sh", "-c", script)


def _plain_signals() -> None:
    # Python ignores these, and what it starts would inherit that.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)


def _pivots() -> set[str]:
    patterns = ("lxc.pivot", "*/lxc.pivot")
    return {str(path) for pattern in patterns for path in Path("/sys/fs/cgroup").glob(pattern)}


def incus_index(name: str = "c1", **changes: object) -> dict[str, Any]:
    """Return the index of an export as Incus 6 writes it; `changes` are of the container's configuration."""
    config = {
        "image.os": "Busybox", "volatile.uuid": "5f3c6b1e-9f5e-4b67-8a4e-0d9b2e0f1c11",
        "volatile.eth0.hwaddr": "00:16:3e:11:22:33", "volatile.last_state.power": "STOPPED",
    }  # fmt: skip
    devices = {
        "eth0": {"name": "eth0", "network": "incusbr0", "type": "nic"},
        "root": {"path": "/", "pool": "default", "type": "disk"},
    }  # fmt: skip
    config |= {key: value for key, value in changes.items() if isinstance(value, str)}
    devices |= {key: value for key, value in changes.items() if isinstance(value, dict)}
    container = {
        "name": name, "description": "from Incus", "architecture": "x86_64", "created_at": _CREATED,
        "config": config, "devices": {}, "expanded_config": config, "expanded_devices": devices,
        "ephemeral": False, "profiles": ["default"], "stateful": False, "status": "Stopped",
    }  # fmt: skip
    return {
        "name": name, "backend": "dir", "pool": "default", "optimized": False, "optimized_header": False,
        "type": "container", "snapshots": [], "config": {"container": container, "snapshots": []},
    }  # fmt: skip


def yaml_of(value: object) -> bytes:
    """Write YAML as Go's library does: in the order given, and without anchors."""

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True).encode()


def incus_export(path: str, index: bytes, trees: dict[str, str], extra: Sequence[Member] = ()) -> str:
    """Write an export: the index, then trees by the names that they have below backup/, in their order."""
    mode = "w:gz" if path.endswith(".gz") else "w"
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as archive:
        _add_file(archive, "backup/index.yaml", index)
        for name, tree in trees.items():
            # A trap: what it says is another container's, and is not to be looked at.
            _add_file(archive, f"backup/{name}/backup.yaml", b"container: {config: {limits.memory: 1GiB}}\n")
            _add_file(archive, f"backup/{name}/metadata.yaml", b"architecture: x86_64\n")
            archive.add(tree, f"backup/{name}/rootfs")
        for member, data in extra:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return path


def _add_file(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
