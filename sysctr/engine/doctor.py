"""Checks whether this host can run containers, and says how to mend what is missing.

quickstart runs it before it changes anything, so it runs on a bare /usr/bin/python3: standard library and the
stdlib-only parts of sysctr, nothing that pip or apt would have to bring first.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sysctr.paths import Layout, layout

MINIMUM_KERNEL = (6, 1)
NEEDED_CONTROLLERS = ("cpu", "cpuset", "memory", "pids")
# The debian-12 template unpacked, the Python packages, and what apt keeps for a moment.
NEEDED_SPACE_BYTES = 2 * 1024**3
NEEDED_INODES = 60_000
# 40 Debian containers failed to boot with the kernel's default of 128, with 8192 there was room for 50.
NEEDED_INOTIFY = 8192
INOTIFY_PER_SYSTEMD = 4

TOOLS = {
    "nft": "nftables",
    "dnsmasq": "dnsmasq-base",
    "ip": "iproute2",
    "tar": "tar",
    "xz": "xz-utils",
    "zstd": "zstd",
}
# Without these something is missing, but containers run.
OPTIONAL_TOOLS = {
    "mmdebstrap": ("mmdebstrap", "templates of Debian and Ubuntu cannot be built"),
    "busybox": ("busybox-static", "the tiny template cannot be made"),
}
# What sysctr.runtime.probe says of what came after a failure; that module is run, not imported.
NOT_TRIED = "not tried"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Check:
    """One thing looked at: state is "ok", "warn" (containers run, something is missing) or "fail"."""

    name: str
    state: str
    detail: str
    hint: str = ""

    def as_dict(self) -> dict[str, object]:
        """Return the check as the API sends it."""
        return {
            "check": self.name, "ok": self.state != "fail", "state": self.state,
            "detail": self.detail, "hint": self.hint,
        }  # fmt: skip


def ok(name: str, detail: str) -> Check:
    return Check(name, "ok", detail)


def warn(name: str, detail: str, hint: str) -> Check:
    return Check(name, "warn", detail, hint)


def fail(name: str, detail: str, hint: str) -> Check:
    return Check(name, "fail", detail, hint)


def check_root() -> Check:
    if os.geteuid() != 0:
        return fail("root", f"running as uid {os.geteuid()}", "run it as root: `sudo …`")
    return ok("root", "running as root")


def check_kernel(release: str) -> Check:
    """Compare the release with the minimum: below it an upper cannot be idmapped safely, nor probed for.

    >>> check_kernel("6.1.0-18-amd64").state, check_kernel("5.15.0-91-generic").state
    ('ok', 'fail')
    """
    numbers = release.split("-")[0].split(".")
    wanted = ".".join(map(str, MINIMUM_KERNEL))
    try:
        version = (int(numbers[0]), int(numbers[1]))
    except (ValueError, IndexError):
        return warn("kernel", f"release {release} is not understood", f"Linux {wanted} or newer is needed")
    if version < MINIMUM_KERNEL:
        return fail(
            "kernel", f"Linux {release}, at least {wanted} is needed",
            "install a newer kernel (Debian 12 has 6.1) and boot it",
        )  # fmt: skip
    return ok("kernel", f"Linux {release} (at least {wanted})")


def check_outer_namespace(uid_map: str) -> Check:
    """Tell the host, or a container that owns all ids, from one that was given a range.

    >>> check_outer_namespace("         0          0 4294967295").state
    'ok'
    """
    rows = [tuple(map(int, line.split())) for line in uid_map.splitlines() if line.strip()]
    if rows == [(0, 0, 4294967295)]:
        return ok("ids", "all ids of the host are visible")
    mapped = sum(count for _inside, _outside, count in rows)
    return fail(
        "ids", f"this is an unprivileged container: only {mapped} ids are mapped here",
        "run sysctr on the host itself or in a virtual machine",
    )  # fmt: skip


def check_user_namespaces(max_user_namespaces: int | None) -> Check:
    if max_user_namespaces is None:
        return fail(
            "user namespaces", "the kernel has none", "boot a kernel built with CONFIG_USER_NS"
        )
    if max_user_namespaces < 1:
        return fail(
            "user namespaces", "switched off: user.max_user_namespaces is 0",
            "`sysctl -w user.max_user_namespaces=60000` and remove the setting in /etc/sysctl.d",
        )  # fmt: skip
    return ok("user namespaces", f"up to {max_user_namespaces}")


def check_probe(facts: Mapping[str, str], where: str) -> list[Check]:
    """Judge what sysctr.runtime.probe tried; an empty reason means that it works."""
    hints = {
        "userns": (
            "user namespace with a map",
            "run sysctr on the host: not in a chroot, nor in a container without nesting",
        ),
        "idmap": (
            f"idmapped mount on {where}", "use a file system that has them: ext4, xfs, btrfs, or tmpfs"
        ),
        "overlay": (
            f"overlay on {where}", "`modprobe overlay`; an overlay or a network share cannot hold an upper"
        ),
        "veth": ("veth pairs", "`modprobe veth`"),
        "bridge": ("bridges", "`modprobe bridge`"),
        "nft": ("nftables in the kernel", "`modprobe nf_tables`"),
    }  # fmt: skip
    checks = []
    for fact, (name, hint) in hints.items():
        reason = facts.get(fact)
        if reason == "":
            checks.append(ok(name, "tried, works"))
        elif reason is None or reason == NOT_TRIED:
            checks.append(fail(name, "not tried", "mend what failed before it"))
        else:
            checks.append(fail(name, reason, hint))
    return checks


def check_cgroups(mounts: str, unified_controllers: Callable[[str], str]) -> Check:
    """Look for every controller that limits need, in the unified hierarchy or in a v1 one."""
    found: dict[str, str] = {}
    unified = ""
    for line in mounts.splitlines():
        _source, point, fstype, options, *_rest = line.split()
        if fstype == "cgroup2" and not unified:
            unified = point
            for name in unified_controllers(f"{point}/cgroup.controllers").split():
                found[name] = "v2"
        elif fstype == "cgroup":
            for name in set(NEEDED_CONTROLLERS).intersection(options.split(",")):
                found.setdefault(name, "v1")
    if not unified:
        return fail(
            "cgroups", "no cgroup2 file system is mounted",
            "`mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`",
        )  # fmt: skip
    missing = [name for name in NEEDED_CONTROLLERS if name not in found]
    shown = ", ".join(f"{name} ({found[name]})" for name in NEEDED_CONTROLLERS if name in found)
    if missing:
        return warn(
            "cgroups", f"cgroup2 at {unified}; no controller for {', '.join(missing)}",
            "limits of these kinds will be refused; on a Raspberry Pi add `cgroup_enable=memory` to the "
            "kernel's command line",
        )  # fmt: skip
    return ok("cgroups", f"cgroup2 at {unified}; {shown}")


def check_seccomp(actions: str) -> Check:
    if "errno" not in actions.split():
        return fail("seccomp", "the kernel has no filters", "boot a kernel with CONFIG_SECCOMP_FILTER")
    return ok("seccomp", "filters are available")


def check_fuse(has_device: bool) -> Check:
    if not has_device:
        return warn(
            "fuse", "/dev/fuse is missing, so lxcfs cannot run",
            "`modprobe fuse`; without it `free` and `uptime` in a container show the host's figures",
        )  # fmt: skip
    return ok("fuse", "/dev/fuse is there")


def parse_subids(text: str) -> list[tuple[str, int, int]]:
    """Read /etc/subuid; lines that newuidmap would ignore are ignored.

    >>> parse_subids("root:100000:65536\\n# x\\n")
    [('root', 100000, 65536)]
    """
    entries = []
    for line in text.splitlines():
        parts = line.strip().split(":")
        if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit():
            entries.append((parts[0], int(parts[1]), int(parts[2])))
    return entries


def check_subids(file: str, text: str, owner: str) -> Check:
    """Refuse a range of ours that others hold too: their users could read the containers' files."""
    entries = parse_subids(text)
    ours = [entry for entry in entries if entry[0] == owner]
    for _owner, first, count in ours:
        for other, other_first, other_count in entries:
            if other != owner and first < other_first + other_count and other_first < first + count:
                return fail(
                    f"id range in {file}",
                    f"{owner}:{first}:{count} overlaps {other}:{other_first}:{other_count}",
                    f"move the range of {other}; the containers' files are stored with theirs",
                )  # fmt: skip
    if not ours:
        return ok(f"id range in {file}", "none registered yet, the first container takes a free one")
    return ok(f"id range in {file}", ", ".join(f"{first}+{count}" for _owner, first, count in ours))


def check_space(where: str, *, free_bytes: int, free_inodes: int, total_inodes: int) -> Check:
    """Judge the room on the pool's file system; one without an inode table reports a total of 0."""
    shown = f"{free_bytes / 1024**3:.1f} GiB and {free_inodes} inodes free at {where}"
    if free_bytes < NEEDED_SPACE_BYTES // 8:
        return fail("space", shown, "make room, or mount a larger file system there")
    if free_bytes < NEEDED_SPACE_BYTES or (total_inodes and free_inodes < NEEDED_INODES):
        return warn(
            "space", shown, f"{NEEDED_SPACE_BYTES // 1024**3} GiB and {NEEDED_INODES} inodes are comfortable"
        )
    return ok("space", shown if total_inodes else f"{free_bytes / 1024**3:.1f} GiB free at {where}")


def check_pool(pool: Mapping[str, Any]) -> Check:
    """Judge a pool as the daemon describes it: whether it can be used, and its room.

    >>> check_pool({"name": "fast", "state": "missing", "error": "it is gone", "hint": "mount it"}).state
    'fail'
    """
    name = f"pool {pool['name']}"
    if pool["state"] != "ok":
        return fail(name, pool["error"], pool["hint"] or "its containers cannot be started until then")
    shown = f"{pool['driver']} in {pool['path']}, {pool['free_bytes'] / 1024**3:.1f} GiB"
    if pool["inodes"]:
        shown += f" and {pool['free_inodes']} inodes"
    if pool["low"]:
        less = f"{shown} free, less than {pool['low_space']}"
        return warn(name, less, "`sysctr df` shows who takes it; make room, or add a pool")
    return ok(name, f"{shown} free")


def check_stale_mounts(points: Sequence[str]) -> Check:
    """Judge what is mounted for volumes that nothing uses."""
    if points:
        return warn("mounts", f"left over: {', '.join(points)}", f"`umount {' '.join(points)}`")
    return ok("mounts", "nothing is left over")


def check_tools(find: Callable[[str], str | None]) -> list[Check]:
    missing = [package for tool, package in TOOLS.items() if not find(tool)]
    if missing:
        checks = [fail("tools", f"missing: {', '.join(missing)}", f"`apt-get install {' '.join(missing)}`")]
    else:
        checks = [ok("tools", ", ".join(TOOLS))]
    for tool, (package, consequence) in OPTIONAL_TOOLS.items():
        if not find(tool):
            checks.append(warn(tool, f"missing, {consequence}", f"`apt-get install {package}`"))
    return checks


def check_inotify(max_user_instances: int | None) -> Check:
    """Judge how many systemds can run: each takes some, and all containers share the host root's number."""
    if max_user_instances is None:
        return ok("inotify", "this kernel has no limit of its own")
    shown = f"{max_user_instances} instances for all containers together"
    if max_user_instances < NEEDED_INOTIFY:
        return warn(
            "inotify", f"{shown}: enough for {max_user_instances // INOTIFY_PER_SYSTEMD} systemds or so",
            f"`sysctl fs.inotify.max_user_instances={NEEDED_INOTIFY}`, and a line in /etc/sysctl.d",
        )  # fmt: skip
    return ok("inotify", shown)


def check_lxcfs(mounts: str) -> Check:
    for line in mounts.splitlines():
        _source, point, fstype, *_rest = line.split()
        if fstype == "fuse.lxcfs":
            return ok("lxcfs", f"mounted at {point}")
    return warn(
        "lxcfs", "not mounted: `free` and `nproc` in a container show the host's figures",
        "`systemctl start lxcfs`, or without systemd `service lxcfs start`; then restart the containers",
    )  # fmt: skip


def check_group(name: str, groups: str) -> Check:
    for line in groups.splitlines():
        if line.startswith(f"{name}:"):
            members = line.rpartition(":")[2] or "nobody"
            return ok("group", f"{name} exists; members, who equal root: {members}")
    return warn("group", f"{name} does not exist, only root may use sysctr", f"`groupadd --system {name}`")


def check_versions(versions: Mapping[str, str]) -> Check:
    """Compare what runs: keys are "daemon", "supervisor" and so on, values their versions."""
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    if len(set(versions.values())) > 1:
        return warn("versions", f"they differ: {shown}", "`sysctr daemon restart`")
    return ok("versions", shown)


def check_network(
    has_bridge: bool, bridge: str, ip_forward: str, problems: Iterable[tuple[str, str]]
) -> list[Check]:
    """Judge the default network; `problems` are the network's own words: what is wrong and how to mend it."""
    if not has_bridge:
        return [ok("network", f"{bridge} is made when the first container starts")]
    checks = [fail("network", detail, hint) for detail, hint in problems]
    if ip_forward.strip() != "1":
        checks.append(fail("forwarding", "net.ipv4.ip_forward is 0", "`sysctl -w net.ipv4.ip_forward=1`"))
    else:
        checks.append(ok("forwarding", "on"))
    return [ok("network", f"bridge {bridge} is up"), *checks]


def before_install(where: Layout) -> list[Check]:
    """Return the checks that need nothing installed and change nothing."""
    checks = [
        check_root(),
        check_kernel(os.uname().release),
        check_outer_namespace(_read("/proc/self/uid_map")),
        check_user_namespaces(_number("/proc/sys/user/max_user_namespaces")),
    ]
    pool = nearest_directory(where.pool)
    if all(check.state != "fail" for check in checks):
        checks.extend(check_probe(probe(pool), pool))
    room = os.statvfs(pool)
    checks += [
        check_cgroups(_read("/proc/self/mounts"), _read),
        check_seccomp(_read("/proc/sys/kernel/seccomp/actions_avail")),
        check_fuse(os.path.exists("/dev/fuse")),
        check_subids("/etc/subuid", _read("/etc/subuid"), where.subid_owner),
        check_subids("/etc/subgid", _read("/etc/subgid"), where.subid_owner),
        check_space(
            pool, free_bytes=room.f_bavail * room.f_frsize, free_inodes=room.f_favail,
            total_inodes=room.f_files,
        ),
    ]  # fmt: skip
    return checks


def installed(
    where: Layout,
    bridge: str,
    problems: Iterable[tuple[str, str]] = (),
    versions: Mapping[str, str] | None = None,
) -> list[Check]:
    """Return the checks of what the installation brought; the engine passes what only it knows."""
    checks = check_tools(lambda tool: shutil.which(tool, path=_PATH))
    checks.append(check_inotify(_number("/proc/sys/fs/inotify/max_user_instances")))
    checks += [check_lxcfs(_read("/proc/self/mounts")), check_group(where.group, _read("/etc/group"))]
    has_bridge = os.path.exists(f"/sys/class/net/{bridge}")
    checks += check_network(has_bridge, bridge, _read("/proc/sys/net/ipv4/ip_forward"), problems)
    if versions:
        checks.append(check_versions(versions))
    return checks


def run(
    where: Layout,
    bridge: str,
    problems: Iterable[tuple[str, str]] = (),
    versions: Mapping[str, str] | None = None,
) -> list[Check]:
    """Return all checks."""
    return before_install(where) + installed(where, bridge, problems, versions)


def nearest_directory(path: str) -> str:
    """Return the path itself or the nearest directory above it that exists."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def probe(directory: str) -> dict[str, str]:
    """Return what sysctr.runtime.probe found, run as a program: the daemon has threads and must not fork."""
    checkout = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "from sysctr.runtime.probe import main; main(sys.argv[2])"
    )
    # -B: before an installation this is the user's checkout, which gets no __pycache__ from us.
    argv = [sys.executable, "-I", "-S", "-B", "-c", code, checkout, directory]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True, text=True
        )
        return json.loads(done.stdout)
    except subprocess.CalledProcessError as error:
        return {"userns": error.stderr.strip().splitlines()[-1] if error.stderr.strip() else str(error)}
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        return {"userns": f"the probe failed: {error}"}


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _number(path: str) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def report(checks: Iterable[Check]) -> str:
    """Return the checks as lines for people: the hint below what is not well."""
    lines = []
    for check in checks:
        lines.append(f"  {check.state:<4}  {check.name}: {check.detail}")
        if check.hint:
            lines.append(f"        → {check.hint}")
    return "\n".join(lines)


def main() -> int:
    """Check what needs nothing installed, for quickstart; 1 when containers cannot run here."""
    checks = before_install(layout())
    print(report(checks))
    return 1 if any(check.state == "fail" for check in checks) else 0
