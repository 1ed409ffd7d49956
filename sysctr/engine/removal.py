"""Takes an installation's traces off the host: its processes, mounts, links, table, cgroups and id ranges.

packaging/uninstall runs it, and so do the tests after each host. It works on what it finds, whether or not
the daemon still runs, and gets by with the standard library. Containers' data is not touched.
"""

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import sys
import tomllib

from sysctr.engine import lxcfs
from sysctr.engine.ids import IdPool
from sysctr.errors import SysctrError
from sysctr.linux import mount, process
from sysctr.paths import Layout, layout

_NFT_FAMILIES = ("inet", "ip", "ip6", "bridge", "arp", "netdev")


def service_pids(where: Layout) -> dict[str, int]:
    """Return the processes of an installation that run: "daemon", "supervisor", "keeper"."""
    found = {}
    for name, path in (("daemon", where.api_socket), ("supervisor", where.plan_socket)):
        pid = _listener(path)
        if pid:
            found[name] = pid
    keeper = _parent(found["supervisor"]) if "supervisor" in found else 0
    keeper = keeper if keeper > 1 else _lock_holder(where.keeper_lock)
    if keeper > 1:
        found["keeper"] = keeper
    return found


def container_pids(where: Layout) -> list[int]:
    """Return every process inside a cgroup of the installation."""
    pids = set()
    for directory in cgroup_directories(where):
        for path, _directories, files in os.walk(directory):
            # In a v1 hierarchy the same process appears once for each controller.
            if "cgroup.procs" in files:
                with contextlib.suppress(OSError), open(f"{path}/cgroup.procs", encoding="ascii") as file:
                    pids.update(map(int, file.read().split()))
    return sorted(pids - {0, os.getpid()} - set(service_pids(where).values()))


def cgroup_directories(where: Layout) -> list[str]:
    """Return the installation's own directory of each cgroup hierarchy, and of its services' cgroups."""
    found = []
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        points = {line.split()[1] for line in mounts if line.split()[2] in ("cgroup", "cgroup2")}
    for point in sorted(points):
        for place in ("", "system.slice/sysctr-supervisor.service/", "system.slice/sysctrd.service/"):
            if place and where.tag:
                continue
            path = f"{point}/{place}{where.cgroup}"
            if os.path.isdir(path):
                found.append(path)
    return found


def stop_processes(where: Layout, deadline_s: float = 20) -> list[int]:
    """End the services, what runs in containers, and our lxcfs; return what would not end."""
    services = service_pids(where)
    inside = container_pids(where)
    # The keeper before the supervisor, else it starts another one.
    for name in ("daemon", "keeper", "supervisor"):
        if name in services:
            _end(services[name], signal.SIGTERM, deadline_s / 2)
    stubborn = [pid for pid in services.values() if not _end(pid, signal.SIGKILL, deadline_s / 2)]
    for pid in sorted(set(inside + container_pids(where))):
        if not _end(pid, signal.SIGKILL, deadline_s / 2):
            stubborn.append(pid)
    _end_dnsmasq(where)
    lxcfs.stop(where)
    return stubborn


def unmount_all(where: Layout) -> list[str]:
    """Unmount what is mounted below the run directory, such as disk images, and free their loop devices."""
    removed = []
    for point in mount.points_below(where.run):
        with contextlib.suppress(OSError):
            try:
                mount.umount2(point)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                # Somebody looks around in there; the file system goes when they leave.
                mount.umount2(point, mount.MNT_DETACH)
            removed.append(f"mount {point}")
    places = [where.lib, *(path for _name, path in pools_outside(where))]
    for device, image in _loop_devices():
        if any(image.startswith(f"{place}/") for place in places):
            # Those of a mount go with it; this is one whose mount never came to be.
            with contextlib.suppress(process.ProgramFailed):
                process.run(["losetup", "--detach", device])
                removed.append(f"loop device {device}")
    return removed


def pools_outside(where: Layout) -> list[tuple[str, str]]:
    """Return names and paths of the pools that are not among the installation's own files.

    Read by the standard library: a file that it cannot read names no pool.
    """
    found = []
    with contextlib.suppress(FileNotFoundError):
        for file_name in sorted(os.listdir(where.pool_configs)):
            name, dot, kind = file_name.rpartition(".")
            with contextlib.suppress(OSError, ValueError):
                if dot and kind == "toml":
                    with open(f"{where.pool_configs}/{file_name}", "rb") as file:
                        path = tomllib.load(file).get("path")
                    if isinstance(path, str) and not path.startswith(f"{where.lib}/"):
                        found.append((name, path))
    return found


def _loop_devices() -> list[tuple[str, str]]:
    """Return every loop device that is in use with the file behind it; one that is being freed has none."""
    found = []
    for name in os.listdir("/sys/block"):
        with contextlib.suppress(OSError), open(f"/sys/block/{name}/loop/backing_file") as file:
            found.append((f"/dev/{name}", file.read().strip()))
    return found


def remove_network(where: Layout) -> list[str]:
    """Delete the bridge, the host ends of veth pairs and the nft table; return what was deleted."""
    removed = []
    try:
        # It knows more than names: its marks on links, and whether forwarding was on before it.
        from sysctr.engine.host import read_settings
        from sysctr.network.network import Network, Settings

        settings = read_settings(where).network
        network = Network(where, Settings(settings.bridge, settings.subnet, settings.domain))
        network.teardown()
        network.close()
    except ImportError:
        pass  # The packages went with an earlier uninstall, and so did what only they can undo.
    except SysctrError as error:
        print(f"  network: {error}; removing what carries our names", file=sys.stderr)
    for name in sorted(os.listdir("/sys/class/net")):
        if name == where.bridge or _is_our_veth(where, name):
            with contextlib.suppress(process.ProgramFailed):
                process.run(["ip", "link", "delete", name])
                removed.append(f"link {name}")
    for family in _NFT_FAMILIES:
        with contextlib.suppress(process.ProgramFailed):
            process.run(["nft", "delete", "table", family, where.nft_table])
            removed.append(f"nft table {family} {where.nft_table}")
    return removed


def _is_our_veth(where: Layout, name: str) -> bool:
    prefix = f"v{where.tag}" if where.tag else "veth"
    numbers = name.removeprefix(prefix).split("i")
    if not name.startswith(prefix) or len(numbers) != 2 or not all(part.isdigit() for part in numbers):
        return False
    if where.tag:
        return True
    # Without a tag the name is the one Proxmox uses too: ours are those on our bridge.
    return os.path.basename(os.path.realpath(f"/sys/class/net/{name}/master")) == where.bridge


def remove_cgroups(where: Layout) -> list[str]:
    """Remove the installation's cgroups, children first; return those that were removed."""
    removed = []
    for directory in cgroup_directories(where):
        for path, _directories, _files in os.walk(directory, topdown=False):
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(path)
        removed.append(f"cgroup {directory}")
    return removed


def remove_id_ranges(where: Layout) -> list[str]:
    """Take the installation's lines out of /etc/subuid and /etc/subgid."""
    pool = IdPool(where.subid_owner)
    removed = [f"ids {entry.first}+{entry.count}" for entry in pool.ranges()]
    pool.unregister()
    return removed


def main(*, keep_ids: bool = False) -> int:
    """Remove all traces and say which; `packaging/uninstall` calls it after its own questions.

    With `keep_ids` the id ranges stay reserved for containers whose data is kept.
    """
    where = layout()
    for pid in stop_processes(where):
        print(f"process {pid} would not end", file=sys.stderr)
    outside = pools_outside(where)
    removed = unmount_all(where) + remove_network(where) + remove_cgroups(where)
    if not keep_ids:
        removed += remove_id_ranges(where)
    for line in removed:
        print(f"  removed {line}")
    for name, path in outside:
        # Its disk may be another one, with other things: only its administrator can tell.
        print(f"  kept pool {name} in {path} with all that is in it: delete it yourself if nobody needs it")
    return 0


def _listener(path: str) -> int:
    """Return the process that listens on a unix socket, 0 if none does."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC) as channel:
            try:
                channel.settimeout(2)
                channel.connect(path)
            except OSError:
                continue
            credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return struct.unpack("=iII", credentials)[0]
    return 0


def _lock_holder(path: str) -> int:
    """Return the process that took the flock on a file, 0 if none holds it (proc_locks(5))."""
    try:
        inode = os.stat(path).st_ino
    except OSError:
        return 0
    with open("/proc/locks", encoding="ascii") as locks:
        for line in locks:
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
                return int(fields[4])
    return 0


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return int(stat.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def _end(pid: int, signal_number: int, deadline_s: float) -> bool:
    """Send a signal and wait for the end; True if the process is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        signal.pidfd_send_signal(pidfd, signal_number)
        return bool(select.select([pidfd], [], [], deadline_s)[0])
    except ProcessLookupError:
        return True
    finally:
        os.close(pidfd)


def _end_dnsmasq(where: Layout) -> None:
    """End the dnsmasq of this installation, known by its command line naming our directories."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                argv = os.fsdecode(file.read()).split("\0")
            names = (where.bridge, f"{where.run}/", f"{where.network}/")
            if os.path.basename(argv[0]) == "dnsmasq" and any(
                name == argument.rpartition("=")[2] or (name.endswith("/") and name in argument)
                for argument in argv
                for name in names
            ):
                _end(int(entry), signal.SIGTERM, 5)
