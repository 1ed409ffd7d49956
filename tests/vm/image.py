"""Builds what a virtual host boots, from the host's own Debian archive: root disk, kernel and initramfs.

The image depends only on this file and on the host's apt sources, so it is built once and kept in the cache.
Nothing is installed on the host, and no loop device is needed: mke2fs fills the disk from a directory.
"""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# For what one run writes: gigabytes perhaps, so not /tmp, which may be memory.
SCRATCH = "/var/tmp"
# Where the second disk is mounted; tests/vm/payload.py fills it.
PAYLOAD = "/payload"
KERNEL_PACKAGE = "linux-image-cloud-amd64"
PACKAGES = (
    "apparmor", "busybox-static", "ca-certificates", "dbus", "dnsmasq-base", "e2fsprogs", "iproute2",
    "iputils-ping", "kmod", "libseccomp2", "lxcfs", "nftables", "procps", "python3", "rsync", "systemd-sysv",
    "tar", "udev", "uidmap", "xfsprogs", "xz-utils", "zstd",
)  # fmt: skip
# What building and booting need on the host, by program.
HOST_PACKAGES = {"qemu-system-x86_64": "qemu-system-x86", "mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs"}
# Units that a test never needs and that cost seconds when every instruction is translated.
MASKED = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer",
    "e2scrub_reap.service", "fstrim.timer", "getty@tty1.service", "modprobe@drm.service",
    "modprobe@efi_pstore.service", "serial-getty@ttyS0.service", "systemd-binfmt.service",
    "systemd-hwdb-update.service", "systemd-journal-catalog-update.service", "systemd-journal-flush.service",
    "systemd-pcrphase.service", "systemd-pcrphase-sysinit.service", "systemd-random-seed.service",
    "systemd-tmpfiles-clean.timer", "systemd-update-done.service", "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
)  # fmt: skip
# Drivers of the virtual hardware; ext4 is part of Debian's cloud kernel.
BOOT_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "virtio-rng")

AGENT_UNIT = f"""\
[Unit]
Description=Runs the commands of the test outside
BindsTo=dev-virtio\\x2dports-sysctr.device
After=dev-virtio\\x2dports-sysctr.device

[Service]
ExecStart=/usr/bin/python3 -I {PAYLOAD}/agent.py
# A command may leave a daemon running, as on a login shell, and may be limited only by what it sets itself.
KillMode=process
TasksMax=infinity
OOMPolicy=continue

[Install]
WantedBy=multi-user.target
"""

INIT = """\
#!/busybox sh
b=/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
for module in %(modules)s; do $b insmod /modules/$module || echo "cannot load $module"; done
$b mount -t ext4 -o noatime,noinit_itable /dev/vda /root || exec $b sh
$b mount -t ext4 -o ro,noatime,noload /dev/vdb /root%(payload)s || exec $b sh
$b umount /dev /sys /proc
exec $b switch_root /root /sbin/init
"""


class Missing(Exception):
    """A fact of this host that virtual machines need is not there; the text names it."""


@dataclass(frozen=True)
class Image:
    """What a machine boots; `release` is that of its kernel, `python` the name of its interpreter."""

    kernel: Path
    initramfs: Path
    root: Path
    release: str
    python: str


def missing_facts() -> list[str]:
    """Return what this host lacks to build and boot a virtual host, each as a short statement."""
    missing = [f"no {program} (package {package})" for program, package in HOST_PACKAGES.items()
               if not shutil.which(program)]  # fmt: skip
    if os.geteuid() != 0:
        missing.append("not root")
    if os.uname().machine != "x86_64":
        missing.append("not an x86_64 host")
    if not shutil.which("apt-get"):
        missing.append("no apt-get: the guest is made from the host's Debian sources")
    return missing


def cache_dir() -> Path:
    """Return the directory that keeps root images between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "sysctr-vm"


def root_image() -> Image:
    """Return the root image, building it when the cache has none for this file and these apt sources."""
    sources = debian_sources()
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for source in sources:
        digest.update(source.read_bytes())
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    place = cache / digest.hexdigest()[:16]
    # Two test sessions that start together build once.
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            for old in cache.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
            with tempfile.TemporaryDirectory(prefix="build.", dir=cache) as build:
                _build(Path(build), sources)
                os.rename(f"{build}/image", place)
    release, python = (place / "versions").read_text().split()
    ours = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if python != ours:
        raise Missing(f"the tests run on {ours}, and its packages do not fit the guest's {python}")
    return Image(place / "vmlinuz", place / "initramfs", place / "root.ext4", release, python)


def debian_sources() -> list[Path]:
    """Return the host's apt source files in which everything comes from Debian."""
    show = ["--format", "$(ORIGIN)|$(SOURCESENTRY)"]
    targets = run(["apt-get", "indextargets", *show, "Created-By: Packages"])
    origins: dict[str, set[str]] = {}
    for line in targets.splitlines():
        origin, entry = line.split("|")
        origins.setdefault(entry.rpartition(":")[0], set()).add(origin)
    files = [Path(file) for file, found in sorted(origins.items()) if found == {"Debian"}]
    if not files:
        raise Missing("no package lists of Debian (`apt-get update` fetches them)")
    return files


def _apt_options() -> list[str]:
    """Return the host's settings of how to reach and to check a mirror, as options of mmdebstrap."""
    wanted = re.compile(r"Acquire::(http|https|ftp|Check-Valid-Until|Check-Date|Retries|ForceIPv[46])\b")
    lines = run(["apt-config", "dump"]).splitlines()
    return [f"--aptopt={line}" for line in lines if wanted.match(line) and not line.endswith(' "";')]


def _codename() -> str:
    return platform.freedesktop_os_release()["VERSION_CODENAME"]


def _build(build: Path, sources: list[Path]) -> None:
    image, root = build / "image", build / "root"
    image.mkdir()
    release = _fetch_kernel(build / "kernel")
    exclude = [f"path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info", "lintian")]
    # In namespaces of its own: what mmdebstrap mounts and starts ends with it, however it ends.
    run([
        "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc",
        "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}",
        *(f"--dpkgopt={option}" for option in exclude), *_apt_options(), "--skip=check/qemu",
        _codename(), str(root), *map(str, sources),
    ])  # fmt: skip
    modules = root / "usr/lib/modules" / release
    shutil.copytree(build / "kernel/lib/modules" / release, modules, symlinks=True)
    run(["chroot", str(root), "depmod", release])
    _configure(root)
    shutil.copyfile(build / f"kernel/boot/vmlinuz-{release}", image / "vmlinuz")
    (image / "initramfs").write_bytes(_initramfs(root, modules))
    (image / "versions").write_text(f"{release} {os.readlink(root / 'usr/bin/python3')}\n")
    make_ext4(root, image / "root.ext4", size_bytes=8 << 30)


def _fetch_kernel(target: Path) -> str:
    """Unpack Debian's newest cloud kernel to a directory, installing nothing, and return its release."""
    show = run(["apt-cache", "show", "--no-all-versions", KERNEL_PACKAGE])
    package = re.search(r"^Depends: (linux-image-(\S+))", show, re.MULTILINE)
    if not package:
        raise Missing(f"no package {KERNEL_PACKAGE} in the host's apt sources")
    target.mkdir()
    run(["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package[1]], cwd=target)
    (deb,) = target.glob("*.deb")
    run(["dpkg-deb", "-x", str(deb), str(target)])
    return package[2]


def _configure(root: Path) -> None:
    for unit in MASKED:
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")
    (root / "etc/systemd/system/sysctr-agent.service").write_text(AGENT_UNIT)
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "sysctr-agent.service").symlink_to("../sysctr-agent.service")
    default = root / "etc/systemd/system/default.target"
    default.unlink(missing_ok=True)
    default.symlink_to("/lib/systemd/system/multi-user.target")
    # An empty machine-id would make every boot a first boot, which presets all units again.
    (root / "etc/machine-id").write_text(hashlib.md5(b"sysctr-vm").hexdigest() + "\n")
    (root / "etc/hostname").write_text("sysctr-vm\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n127.0.1.1 sysctr-vm\n")
    (root / "etc/fstab").write_text("")
    (root / PAYLOAD.lstrip("/")).mkdir()
    # The journal stays in memory: the disk is thrown away, and the flush costs a second.
    (root / "etc/systemd/journald.conf").write_text("[Journal]\nStorage=volatile\n")


def _initramfs(root: Path, modules: Path) -> bytes:
    """Return an archive whose init loads the disk drivers, mounts the disks and hands over to systemd."""
    needs = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, dependencies = line.partition(":")
        needs[Path(path).stem] = [path, *dependencies.split()]
    order: list[str] = []
    for name in BOOT_MODULES:
        # modules.dep lists the dependencies of a module in the reverse of the order of loading.
        order += [path for path in reversed(needs[name]) if path not in order]
    directories = ("dev", "proc", "sys", "root", "modules")
    entries: dict[str, tuple[int, bytes]] = dict.fromkeys(directories, (stat.S_IFDIR | 0o755, b""))
    entries["busybox"] = (stat.S_IFREG | 0o755, (root / "usr/bin/busybox").read_bytes())
    script = INIT % {"modules": " ".join(os.path.basename(path) for path in order), "payload": PAYLOAD}
    entries["init"] = (stat.S_IFREG | 0o755, script.encode())
    for path in order:
        entries[f"modules/{os.path.basename(path)}"] = (stat.S_IFREG | 0o644, (modules / path).read_bytes())
    members = [_newc(number, name, *entry) for number, (name, entry) in enumerate(entries.items(), 1)]
    return b"".join([*members, _newc(0, "TRAILER!!!", 0, b"")])


def _newc(inode: int, name: str, mode: int, data: bytes) -> bytes:
    """Return one member of a cpio archive in the format the kernel unpacks.

    >>> _newc(1, "a", 0o100644, b"xy")[:6], len(_newc(1, "a", 0o100644, b"xy"))
    (b'070701', 116)
    """
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return header + b"\0" * (-len(header) % 4) + data + b"\0" * (-len(data) % 4)


def make_ext4(tree: Path, file: Path, size_bytes: int) -> None:
    """Make a sparse ext4 file system that holds a directory's content, with owners, links and attributes."""
    with open(file, "wb") as sparse:
        sparse.truncate(size_bytes)
    # Nothing is kept after a crash of the machine, so it needs no journal.
    run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", str(tree), str(file)])


def run(argv: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(
        argv, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )  # fmt: skip
    if done.returncode:
        output = done.stdout + done.stderr
        raise RuntimeError(f"cannot run {' '.join(argv)}: status {done.returncode}\n{output}")
    return done.stdout
