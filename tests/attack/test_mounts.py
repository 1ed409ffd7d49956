"""Mounts (security.md S1-S4, S14, S36, S37): nothing in a rootfs leads one outside, none can be widened."""

import json
import os
import stat
from pathlib import Path

import pytest

from sysctr.linux import mount, process
from tests.attack.inside import init_pid, inside
from tests.node import Node
from tests.system.guests import create, shell
from tests.system.guests import inside as output

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox")]


def upper_of(host: Node, ref: str) -> Path:
    """Return where the files of a stopped container are, as its root could have left them."""
    record = Path(f"{host.layout.pool}/volumes/{host.json('info', ref)['id']}/volume.json")
    return Path(f"{host.layout.pool}/{json.loads(record.read_text())['upper']}/rootfs")


def picture(directory: Path) -> list[tuple]:
    """Return everything below a directory of the host, to compare."""
    return sorted(
        (str(path), path.lstat().st_mode, path.lstat().st_uid, path.read_bytes() if path.is_file() else b"")
        for path in directory.rglob("*")
    )


def mounts_at(directory: Path) -> list[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(directory) in line]


@pytest.mark.parametrize("target", ["dev", "proc", "sys", "run"])
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_a_mount_target_that_is_a_symlink_stops_the_start(
    shared_host: Node, tmp_path: Path, target: str, relative: bool
) -> None:
    host = shared_host
    outside = tmp_path / "outside"
    (outside / "host").mkdir(parents=True)
    ref = create(host, start=False)
    upper = upper_of(host, ref)
    points_to = "../" * 20 + str(outside)[1:] if relative else str(outside)
    (upper / target).symlink_to(points_to)
    before = picture(outside)
    done = host.run("start", ref, check=False)
    assert done.status == 1
    assert target in done.err
    assert "Traceback" not in done.err
    assert picture(outside) == before
    assert mounts_at(outside) == []
    assert host.state(ref) == "stopped"
    (upper / target).unlink()
    host.run("start", ref)
    host.run("destroy", ref, "--force", "--yes")


def test_the_guests_own_files_are_never_written_through_a_link(shared_host: Node, tmp_path: Path) -> None:
    host = shared_host
    precious = tmp_path / "precious"
    precious.write_text("the host's\n")
    directory = tmp_path / "etc"
    directory.mkdir()
    before = picture(tmp_path)
    ref = create(host, start=False)
    upper = upper_of(host, ref)
    (upper / "etc").mkdir(exist_ok=True)
    os.setxattr(upper / "etc", "user.overlay.opaque", b"n")
    for name in ("hostname", "hosts", "resolv.conf", ".hostname.sysctr-new", ".hosts.sysctr-new"):
        (upper / "etc" / name).unlink(missing_ok=True)
        (upper / "etc" / name).symlink_to(precious)
    host.run("start", ref)
    assert output(host, ref, "cat /etc/hostname") == ref
    assert picture(tmp_path) == before
    host.run("stop", ref, "--kill")

    # The directory itself leads out.
    (upper / "etc").rename(upper / "etc.old")
    (upper / "etc").symlink_to(directory)
    host.run("start", ref, check=False)
    assert picture(tmp_path) == before
    host.run("destroy", ref, "--force", "--yes")


def test_devices_of_the_rootfs_are_not_those_of_dev(shared_host: Node, tmp_path: Path) -> None:
    host = shared_host
    precious = tmp_path / "precious"
    precious.write_text("the host's\n")
    ref = create(host, start=False)
    dev = upper_of(host, ref) / "dev"
    dev.mkdir(exist_ok=True)
    for name in ("console", "null", "ptmx", "tty", "pts", "shm"):
        (dev / name).symlink_to(precious)
    # A device node in the tree, as an image could bring it: the host's own memory.
    os.mknod(dev.parent / "mem", 0o666 | stat.S_IFCHR, os.makedev(1, 1))
    host.run("start", ref)
    script = "stat -c '%t %T' /dev/null; echo lost > /dev/null; echo seen > /dev/console; head -c 1 /mem"
    done = shell(host, ref, script, check=False)
    assert done.out == "1 3\n"
    assert done.status != 0
    assert "can't open '/mem': " in done.err or "/mem: " in done.err
    assert precious.read_text() == "the host's\n"
    assert b"seen" in host.run("logs", ref).stdout
    host.run("destroy", ref, "--force", "--yes")


def test_no_device_can_be_made_and_none_of_the_hosts_changed(shared_host: Node, evil: str) -> None:
    def attack() -> list[str]:
        got = []
        for path in ("/root/sda", "/dev/sda", "/dev/shm/sda"):
            try:
                os.mknod(path, 0o666 | stat.S_IFBLK, os.makedev(8, 0))
                got.append(f"made {path}")
            except PermissionError:
                pass
        for call in (os.chmod, os.truncate):
            try:
                call("/dev/null", 0)
                got.append(f"{call.__name__} /dev/null")
            except OSError:
                pass
        try:
            os.chown("/dev/null", 0, 0)
            got.append("chown /dev/null")
        except OSError:
            pass
        return got

    before = os.stat("/dev/null")
    assert inside(init_pid(shared_host, evil), attack) == []
    after = os.stat("/dev/null")
    assert (before.st_mode, before.st_uid) == (after.st_mode, after.st_uid)


KERNEL_FILES = (
    "/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe",
    "/proc/sys/kernel/hotplug", "/proc/sys/vm/panic_on_oom", "/proc/sys/fs/binfmt_misc/register",
    "/proc/sys/kernel/panic", "/proc/sys/vm/drop_caches", "/proc/sys/fs/file-max", "/proc/irq/0/smp_affinity",
    "/proc/mtrr", "/sys/kernel/uevent_helper", "/sys/power/state", "/sys/power/mem_sleep",
    "/sys/kernel/mm/ksm/run",
    "/sys/module/nf_conntrack/parameters/hashsize", "/sys/firmware/efi/efivars", "/sys/kernel/profiling",
)  # fmt: skip
SECRETS = (
    "/proc/kcore", "/proc/kmsg", "/proc/timer_list", "/proc/kpageflags", "/proc/kpagecount",
    "/proc/vmallocinfo",
    "/sys/kernel/debug/sched", "/sys/kernel/debug/tracing/trace", "/sys/firmware/dmi/tables/DMI",
    "/sys/kernel/security/apparmor/policy",
)  # fmt: skip


def test_the_kernels_files_are_neither_writable_nor_telling(shared_host: Node, evil: str) -> None:
    def attack() -> list[str]:
        got = []
        for point in ("/proc", "/sys"):
            try:
                mount.mount("none", point, None, mount.MS_REMOUNT | mount.MS_BIND)  # without read-only
            except OSError:
                pass
        for path in KERNEL_FILES:
            for prefix in ("", "/dev/.sysctr"):
                try:
                    os.close(os.open(f"{prefix}{path}", os.O_WRONLY))
                    got.append(f"opened {prefix}{path} for writing")
                except OSError:
                    pass
        for path in SECRETS:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                if os.read(fd, 1):
                    got.append(f"read {path}")
                os.close(fd)
            except OSError:
                pass
        with open("/proc/kallsyms", encoding="ascii") as symbols:
            if int(symbols.readline().split()[0], 16):
                got.append("kallsyms has addresses")
        return got

    assert inside(init_pid(shared_host, evil), attack) == []


def test_what_is_shown_read_only_changes_nothing_outside(shared_host: Node, evil: str, victim: str) -> None:
    """Its root may remount its own read-only file systems; what it writes then is its own."""

    def attack() -> str:
        boot_id = "/proc/sys/kernel/random/boot_id"
        mount.mount("none", boot_id, None, mount.MS_REMOUNT | mount.MS_BIND)
        Path(boot_id).write_text("00000000-0000-0000-0000-000000000000\n")
        return Path(boot_id).read_text()

    host_boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
    other = output(shared_host, victim, "cat /proc/sys/kernel/random/boot_id")
    assert inside(init_pid(shared_host, evil), attack).startswith("0000")
    assert Path("/proc/sys/kernel/random/boot_id").read_text() == host_boot_id
    assert output(shared_host, victim, "cat /proc/sys/kernel/random/boot_id") == other
    assert other != host_boot_id.strip()


@pytest.mark.needs("lxcfs")
def test_the_files_of_lxcfs_stay_as_they_are(shared_host: Node, evil: str, victim: str) -> None:
    def attack() -> list[str]:
        got = []
        for path in ("/proc/meminfo", "/proc/stat"):
            try:
                fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
                os.write(fd, b"MemTotal: 1 kB")
                got.append(f"wrote {path}")
            except OSError:
                pass
            # The flags of the host's mount are locked on the copy.
            try:
                mount.mount("none", path, None, mount.MS_REMOUNT | mount.MS_BIND)
                got.append(f"{path} without nosuid and nodev")
            except OSError:
                pass
        return got

    assert inside(init_pid(shared_host, evil), attack) == []


def test_mounts_do_not_propagate_either_way(shared_host: Node, evil: str, tmp_path: Path) -> None:
    def attack() -> bool:
        os.makedirs("/mnt/inside", exist_ok=True)
        mount.mount("none", "/", None, mount.MS_REC | mount.MS_SHARED)
        mount.mount("tmpfs", "/mnt/inside", "tmpfs")
        return "/mnt/inside" in Path("/proc/self/mounts").read_text()

    init = init_pid(shared_host, evil)
    assert inside(init, attack)
    assert "/mnt/inside" not in Path("/proc/self/mounts").read_text()
    mount.mount("tmpfs", str(tmp_path), "tmpfs")
    try:
        assert str(tmp_path) not in Path(f"/proc/{init}/mounts").read_text()
    finally:
        mount.umount2(str(tmp_path))
    # And nothing of the host's tree is left to be found in there.
    points = Path(f"/proc/{init}/mountinfo").read_text()
    assert shared_host.root not in points


def test_shared_layers_cannot_be_written(shared_host: Node, evil: str, victim: str) -> None:
    def attack() -> str:
        Path("/etc/profile").write_text("echo owned\n")
        with open("/etc/udhcpc/default.script", "r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(b"owned")
        return Path("/etc/profile").read_text()

    layer = next(Path(f"{shared_host.layout.pool}/layers").iterdir()) / "rootfs"
    before = picture(layer / "etc")
    assert inside(init_pid(shared_host, evil), attack) == "echo owned\n"
    assert picture(layer / "etc") == before
    assert "owned" not in output(shared_host, victim, "cat /etc/profile")


def test_a_tmpfs_filled_inside_is_bounded(shared_host: Node, evil: str, victim: str) -> None:
    def attack() -> int:
        count = 0
        fd = os.open("/dev/full-of-it", os.O_WRONLY | os.O_CREAT)
        try:
            while count < 1 << 30:
                count += os.write(fd, bytes(65536))
        except OSError:
            pass  # ENOSPC
        os.close(fd)
        os.unlink("/dev/full-of-it")
        return count

    assert inside(init_pid(shared_host, evil), attack) <= 1 << 20
    assert output(shared_host, victim, "echo on") == "on"


def test_a_nested_user_namespace_gains_nothing(shared_host: Node, evil: str) -> None:
    def attack() -> list[str]:
        got = []
        process.unshare(process.CLONE_NEWUSER | process.CLONE_NEWNS | process.CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            for path in KERNEL_FILES:
                try:
                    os.close(os.open(path, os.O_WRONLY))
                    os._exit(1)
                except OSError:
                    pass
            for kind in ("debugfs", "tracefs", "securityfs", "bpf", "ext4"):
                try:
                    mount.mount("none", "/mnt", kind)
                    os._exit(2 if kind != "bpf" else 0)
                except OSError:
                    pass
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return got if status == 0 else [f"nested: {status}"]

    assert inside(init_pid(shared_host, evil), attack) == []
