"""What this machine lets the tests try; a fact that does not hold has a reason, which the skip shows."""

import functools
import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import urllib.parse
from collections.abc import Callable

from sysctr.engine import doctor

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _program(name: str, package: str) -> Callable[[], str]:
    return lambda: "" if shutil.which(name, path=_PATH) else f"no {name} (package {package})"


def _module(name: str) -> Callable[[], str]:
    return lambda: "" if importlib.util.find_spec(name) else f"no Python package {name}"


def _root() -> str:
    return "" if os.geteuid() == 0 else f"uid is {os.geteuid()}, not 0"


@functools.cache
def _probed() -> dict[str, str]:
    if _root():
        return {}
    return doctor.probe(doctor.nearest_directory("/tmp"))


def _probe(fact: str) -> Callable[[], str]:
    return lambda: _root() or _probed().get(fact, "not tried")


def _lxcfs() -> str:
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        return "" if " fuse.lxcfs " in mounts.read() else "lxcfs is not mounted"


def _loop() -> str:
    return "" if os.path.exists("/dev/loop-control") else "no loop devices"


def _zfs() -> str:
    with open("/proc/filesystems", encoding="ascii") as known:
        if "zfs" not in known.read().split():
            return "no ZFS in this kernel"
    return _program("zpool", "zfsutils-linux")()


@functools.cache
def _prjquota() -> str:
    reason = _root() or _loop() or _program("mke2fs", "e2fsprogs")()
    if reason:
        return reason
    # Of xfs nothing tells but a mount of 300 MiB; a kernel that is built with the one is with the other.
    with tempfile.TemporaryDirectory(prefix="sc-") as directory, open(f"{directory}/image", "wb") as image:
        image.truncate(1 << 20)
        make = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "quota,project", f"{directory}/image"]
        subprocess.run(make, check=True, capture_output=True)
        mount = ["mount", "-o", "loop,prjquota", f"{directory}/image", directory]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            return "this kernel has no project quotas"
        subprocess.run(["umount", directory], check=True)
    return ""


@functools.cache
def mirror() -> str:
    """Return the address of the archive that the host's own apt takes Debian from, "" where it has none."""
    wanted = ("Created-By: Packages", "Component: main", "Origin: Debian")
    argv = ["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return next((line.rstrip("/") for line in done.stdout.splitlines() if "security" not in line), "")


def _net() -> str:
    address = urllib.parse.urlsplit(mirror())
    if not address.hostname:
        return "the host's apt has no Debian mirror"
    try:
        socket.create_connection((address.hostname, address.port or 80), 10).close()
    except OSError as error:
        return f"{address.hostname} cannot be reached: {error}"
    return ""


def _vm() -> str:
    return _root() or _program("qemu-system-x86_64", "qemu-system-x86")()


FACTS: dict[str, Callable[[], str]] = {
    "root": _root,
    "userns": _probe("userns"),
    "idmap": _probe("idmap"),
    "overlay": _probe("overlay"),
    "veth": _probe("veth"),
    "nft": _program("nft", "nftables"),
    "dnsmasq": _program("dnsmasq", "dnsmasq-base"),
    "ip": _program("ip", "iproute2"),
    "busybox": _program("busybox", "busybox-static"),
    "mmdebstrap": _program("mmdebstrap", "mmdebstrap"),
    "bzip2": _program("bzip2", "bzip2"),
    "ext4": _program("mke2fs", "e2fsprogs"),
    "btrfs": _program("mkfs.btrfs", "btrfs-progs"),
    "xfs": _program("mkfs.xfs", "xfsprogs"),
    "loop": _loop,
    "prjquota": _prjquota,
    "zfs": _zfs,
    "lxcfs": _lxcfs,
    "net": _net,
    "vm": _vm,
    "lxc": _program("lxc-start", "lxc"),
    "ssh": _program("ssh", "openssh-client"),
    "tmux": _program("tmux", "tmux"),
    "chromium": _program("chromium", "chromium"),
    "textual": _module("textual"),
    "ruff": _module("ruff"),
    "shellcheck": _program("shellcheck", "shellcheck"),
}


@functools.cache
def missing(fact: str) -> str:
    """Return why `fact` does not hold here, "" if it does.

    >>> missing("no such fact")
    Traceback (most recent call last):
    KeyError: 'no such fact'
    """
    return FACTS[fact]()


def required() -> frozenset[str]:
    """Return the facts whose absence is a failure: the words of SYSCTR_REQUIRE, `all` for every one."""
    words = os.environ.get("SYSCTR_REQUIRE", "").split()
    unknown = set(words) - FACTS.keys() - {"all"}
    if unknown:
        raise ValueError(f"SYSCTR_REQUIRE names {', '.join(sorted(unknown))}, known are {', '.join(FACTS)}")
    return frozenset(FACTS) if "all" in words else frozenset(words)


def header() -> list[str]:
    """Return the lines that say what can be tried here and what not."""
    reasons = {fact: missing(fact) for fact in FACTS}
    lines = ["enabled: " + " ".join(fact for fact, reason in reasons.items() if not reason)]
    disabled = [f"{fact} ({reason})" for fact, reason in reasons.items() if reason]
    if disabled:
        lines.append("disabled: " + ", ".join(disabled))
    return lines
