"""Finding out which kind of cgroup trees this host has, from what is mounted."""

from dataclasses import dataclass

from sysctr.cgroup.base import Driver
from sysctr.cgroup.hybrid import Hybrid
from sysctr.cgroup.unified import Unified
from sysctr.cgroup.v1 import WANTED, Hierarchy
from sysctr.errors import Refused

_V1_CONTROLLERS = WANTED | {
    "devices", "freezer", "net_cls", "net_prio", "perf_event", "hugetlb", "rdma", "misc",
}  # fmt: skip


@dataclass(frozen=True)
class Mounts:
    """Where the cgroup file systems are."""

    unified: str | None
    # By mount point; the name of a hierarchy without controllers stands for one ("name=systemd").
    v1: tuple[tuple[str, frozenset[str]], ...]


def find_mounts(mountinfo: str) -> Mounts:
    r"""Read the cgroup mounts out of /proc/self/mountinfo.

    >>> find_mounts("30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n")
    Mounts(unified='/sys/fs/cgroup', v1=())
    """
    unified = None
    v1: dict[frozenset[str], str] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fstype, _, options = after.split(" ", 2) if after.count(" ") >= 2 else ("", "", "")
        if fstype not in ("cgroup", "cgroup2"):
            continue
        target = before.split(" ")[4].encode().decode("unicode_escape")
        if fstype == "cgroup2":
            # Some host tools mount a second one; the first is the one that everybody uses.
            unified = unified or target
            continue
        given = options.split(",")
        named = [option for option in given if option in _V1_CONTROLLERS or option.startswith("name=")]
        if named and fstype == "cgroup":
            v1.setdefault(frozenset(named), target)
    return Mounts(unified, tuple((path, controllers) for controllers, path in v1.items()))


def open_driver(layout) -> Driver:
    """Return the driver for this host; changes nothing on it.

    Raises Refused when no cgroup2 is mounted: without it nothing can be frozen or killed for certain.
    """
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mounts = find_mounts(file.read())
    if mounts.unified is None:
        raise Refused(
            "cannot use control groups: no cgroup2 file system is mounted",
            hint="mount -t cgroup2 none /sys/fs/cgroup (or /sys/fs/cgroup/unified beside v1 hierarchies)",
        )
    unified = Unified(mounts.unified, layout.cgroup)
    hierarchies = [
        Hierarchy(path, controllers, layout.cgroup) for path, controllers in mounts.v1 if controllers & WANTED
    ]
    others = [f"{path}/{layout.cgroup}" for path, controllers in mounts.v1 if not controllers & WANTED]
    return Hybrid(unified, hierarchies, others) if mounts.v1 else unified
