"""Plans: a container's configuration and facts about the host turned into steps; nothing is touched."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from sysctr.engine.mount_plan import Place, mount_plan
from sysctr.linux import mount
from sysctr.runtime import steps
from sysctr.runtime.accounts import DEFAULT_PATH
from sysctr.runtime.steps_mounts import MountTree, OverlayTree, Sources
from sysctr.storage.base import RootSpec

CONTAINER_TYPE = "lxc"  # images of images.linuxcontainers.org look for exactly this
NOTIFY_SOCKET = "/run/host/notify"
CREDENTIALS = "/run/host/credentials"
# Over it lies what would hide proc and sysfs: the kernel lets a nested namespace mount fresh ones only while
# a fully visible pair exists.
HIDDEN = "/dev/.sysctr"

_NO_EXEC = mount.MOUNT_ATTR_NOSUID | mount.MOUNT_ATTR_NODEV | mount.MOUNT_ATTR_NOEXEC
_NO_DEV = mount.MOUNT_ATTR_NOSUID | mount.MOUNT_ATTR_NODEV
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}


@dataclass(frozen=True)
class Idmap:
    """`count` ids of a container from 0 up are the host's from `first` up, users and groups alike."""

    first: int
    count: int

    def as_map(self) -> "list[list[int]]":
        """Return the map as rows of uid_map: inside, outside, count."""
        return [[0, self.first, self.count]]


@dataclass(frozen=True)
class Shifted:
    """A directory of the host whose files have other ids on the disk than the container's own are there.

    Rows are the id on the disk, the one inside, and how many.
    """

    path: str
    users: tuple[tuple[int, int, int], ...]
    groups: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class GuestFile:
    """A file the host keeps current in the guest, written before every start where its text differs."""

    path: str
    text: str
    mode: int = 0o644


@dataclass(frozen=True)
class ContainerFacts:
    """All that a container's plan is made of."""

    name: str
    uuid: str
    idmap: Idmap
    root: RootSpec
    stage: str
    init: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    seccomp: bytes = b""
    host_os_release: str = ""
    # (path on the host, target inside): lxcfs files over /proc.
    overmounts: tuple[tuple[str, str], ...] = ()
    guest_files: tuple[GuestFile, ...] = ()
    shm_size: str = "50%"
    mounts: tuple[Place, ...] = ()


def container_plan(facts: ContainerFacts) -> dict:
    """Return the plan that starts a container."""
    mounts = mount_plan(facts.mounts, facts.idmap.first)
    prepare = [
        *root_steps(facts.root),
        *_device_steps(facts),
        *_kernel_steps(facts),
        *_run_steps(facts),
        *[steps.GuestFile(f.path, f.text, f.mode) for f in facts.guest_files],
        # After the guest's files: who mounts something on one of them means that.
        *mounts.steps,
        steps.Hostname(facts.name),
        steps.Keyring(),
    ]
    overmounts = [{"tree": f"over:{target}", "path": source, "optional": True}
                  for source, target in facts.overmounts]  # fmt: skip
    return {
        "uid_map": facts.idmap.as_map(),
        "gid_map": facts.idmap.as_map(),
        "stage": facts.stage,
        "network": True,
        "trees": [*root_trees(facts.root), *mounts.trees],
        "binds": list(mounts.binds),
        "sources": [*device_sources(), *overmounts],
        "prepare": [steps.to_json(step) for step in prepare],
        "enter": [steps.to_json(step) for step in (steps.CgroupView(), steps.PivotRoot())],
        "program": {
            "argv": list(facts.init),
            "environment": init_environment(facts),
            "cwd": "/",
            "seccomp": facts.seccomp.hex(),
            "clean": True,
        },
    }


def root_trees(root: RootSpec, prefix: str = "") -> "list[dict]":
    """Return the trees that a root stands on, bound with the container's id map.

    No device node in one of them is one here: the host's root made none, and nobody else can.
    """
    read_only = {True: mount.MOUNT_ATTR_RDONLY, False: 0}
    return [
        {
            "tree": prefix + tree.name, "path": tree.path,
            "attributes": mount.MOUNT_ATTR_NODEV | read_only[tree.read_only],
        }
        for tree in root.trees
    ]  # fmt: skip


def root_steps(root: RootSpec) -> list:
    """Return the steps from nothing to a mounted root."""
    if not root.lowers:
        return [steps.Stage(), steps.TreeRoot(root.trees[0].name)]
    return [
        steps.Stage(),
        *[steps.Attach(tree.name, tree.name) for tree in root.trees],
        steps.OverlayRoot(list(root.lowers), root.upper, root.work),
    ]


def view_steps(root: RootSpec, target: str, prefix: str) -> list:
    """Return the steps that show a volume, read-only, at a directory of a job's own root."""
    if not root.lowers:
        read_only = mount.MOUNT_ATTR_RDONLY
        return [steps.Bind(prefix + root.trees[0].name, target, directory=True, attributes=read_only)]
    # What was a writable layer is one more lower: a view mounts no upper, so any number may look.
    lowers = [root.upper, *root.lowers] if root.upper else root.lowers
    return [
        *[steps.Attach(prefix + tree.name, prefix + tree.name) for tree in root.trees],
        steps.OverlayView([prefix + low for low in lowers], target),
    ]


def writable_steps(root: RootSpec, target: str, prefix: str) -> list:
    """Return the steps that mount a volume, to be written to, at a directory of a job's own root.

    Whoever carries them out sees that nothing else has its upper mounted: the kernel only warns of that.
    """
    if not root.lowers:
        return [steps.Bind(prefix + root.trees[0].name, target, directory=True)]
    lowers = [prefix + low for low in root.lowers]
    return [
        *[steps.Attach(prefix + tree.name, prefix + tree.name) for tree in root.trees],
        OverlayTree(f"{prefix}overlay", lowers, prefix + root.upper, prefix + root.work),
        MountTree(f"{prefix}overlay", target),
    ]


def upper_of(root: RootSpec) -> str:
    """Return the path of the directory that a volume's overlay writes to; "" for one that is no overlay."""
    name, slash, rest = root.upper.partition("/")
    return next((tree.path + slash + rest for tree in root.trees if root.upper and tree.name == name), "")


def device_sources() -> "list[dict]":
    """Return the host's device nodes that every container gets."""
    return [{"tree": f"dev:{name}", "path": f"/dev/{name}"} for name in _DEVICES]


def _device_nodes() -> list:
    tmpfs = {"mode": "0755", "size": "512k"}
    return [
        steps.Filesystem("tmpfs", "/dev", tmpfs, mount.MOUNT_ATTR_NOSUID | mount.MOUNT_ATTR_NOEXEC),
        *[steps.Bind(f"dev:{name}", f"/dev/{name}") for name in _DEVICES],
        *[steps.Symlink(f"/dev/{name}", target) for name, target in _DEVICE_LINKS.items()],
    ]


def _device_steps(facts: ContainerFacts) -> list:
    return [
        *_device_nodes(),
        steps.Console(),
        steps.Filesystem("tmpfs", "/dev/shm", {"mode": "1777", "size": facts.shm_size}, _NO_DEV),
        steps.Filesystem("mqueue", "/dev/mqueue", {}, _NO_EXEC, optional=True),
        steps.Directory(HIDDEN, 0o700),
        steps.Filesystem("proc", f"{HIDDEN}/proc", {}, _NO_EXEC),
        steps.Filesystem("sysfs", f"{HIDDEN}/sys", {}, _NO_EXEC),
    ]


def _kernel_steps(facts: ContainerFacts) -> list:
    boot_id = f"{HIDDEN}/boot_id"
    return [
        steps.Filesystem("proc", "/proc", {}, _NO_EXEC),
        # Read-only /sys is systemd-udevd's sign not to run; the network part stays writable, as in LXC.
        steps.Filesystem("sysfs", "/sys", {}, _NO_EXEC | mount.MOUNT_ATTR_RDONLY),
        steps.Rebind(f"{HIDDEN}/sys/devices/virtual/net", "/sys/devices/virtual/net", optional=True),
        # Without a boot id of their own the journals of all containers seem to be of one boot.
        steps.File(boot_id, f"{uuid.uuid4()}\n", 0o444),
        steps.Rebind(boot_id, "/proc/sys/kernel/random/boot_id", _NO_EXEC | mount.MOUNT_ATTR_RDONLY),
        *[steps.Bind(f"over:{target}", target, optional=True) for _, target in facts.overmounts],
    ]


def _run_steps(facts: ContainerFacts) -> list:
    """The systemd container interface below /run/host (systemd.io/CONTAINER_INTERFACE)."""
    return [
        steps.Filesystem("tmpfs", "/run", {"mode": "0755", "size": "20%"}, _NO_DEV),
        steps.File("/run/host/container-manager", f"{CONTAINER_TYPE}\n", 0o444),
        steps.File("/run/host/container-uuid", f"{facts.uuid}\n", 0o444),
        steps.File("/run/host/os-release", facts.host_os_release, 0o444),
        steps.Directory("/run/host/incoming", 0o600),
        steps.InaccessibleNodes("/run/host/inaccessible"),
        steps.NotifySocket(NOTIFY_SOCKET),
        steps.Filesystem(
            "tmpfs", CREDENTIALS, {"mode": "0500", "size": "1m"}, _NO_EXEC | mount.MOUNT_ATTR_RDONLY
        ),
    ]


def init_environment(facts: ContainerFacts) -> "dict[str, str]":
    """Return the whole environment of init: nothing of the host's own leaks in."""
    environment = {
        "PATH": DEFAULT_PATH,
        "TERM": "linux",
        "container": CONTAINER_TYPE,
        "container_uuid": facts.uuid,
        "NOTIFY_SOCKET": NOTIFY_SOCKET,
        "CREDENTIALS_DIRECTORY": CREDENTIALS,
    }
    fields = {"ID": "id", "BUILD_ID": "build_id", "VARIANT_ID": "variant_id", "VERSION_ID": "version_id"}
    for line in facts.host_os_release.splitlines():
        key, equals, value = line.partition("=")
        if equals and key in fields:
            environment[f"container_host_{fields[key]}"] = value.strip().strip("\"'")
    return {**environment, **facts.environment}


def volume_job_plan(
    container_id: int,
    root: RootSpec,
    idmap: Idmap,
    stage: str,
    program: dict,
    mounts: "tuple[Place, ...]" = (),
) -> dict:
    """Return the plan of a job whose root is a stopped container's own, for work on its files.

    The program is a builtin: nothing of the container is executed. `container` lets the supervisor see that
    no upper is mounted twice.
    """
    mounted = mount_plan(mounts, idmap.first)
    prepare = (*root_steps(root), *mounted.steps, steps.PivotRoot(shared=False))
    return {
        "container": container_id,
        "uid_map": idmap.as_map(), "gid_map": idmap.as_map(), "stage": stage, "network": True,
        "trees": [*root_trees(root), *mounted.trees], "binds": list(mounted.binds), "sources": [],
        "prepare": [steps.to_json(step) for step in prepare],
        "program": program,
    }  # fmt: skip


def tool_job_plan(
    *,
    idmap: Idmap,
    stage: str,
    volume: str,
    program: dict,
    binds: "tuple[tuple[str, str], ...]" = (),
    network: bool = False,
    tmp_size: str = "256m",
    volumes: "tuple[tuple[str, str], ...]" = (),
    views: "Mapping[str, RootSpec | Shifted] | None" = None,
    root: "RootSpec | None" = None,
    container: "int | None" = None,
) -> dict:
    """Return the plan of a job that runs the host's tools on a directory, seen at /volume.

    `root` is a volume in its place, to be written to. The supervisor sees by `upper` that no other job has
    it, and by `container`, which may be one that does not exist yet, that whose it is does not run.

    `volumes` are further directories, mounted at paths below it, the outer ones first; those paths are made,
    so they must be of a tree that nobody else has written to. `views` are seen read-only at the paths that
    they name.

    Its root is a tmpfs with the host's /usr read-only: host tools, never a rootfs's own libraries. `binds`
    are further host paths (read-only) and their targets. With `network` it shares the host's network.
    """
    sources = [{"tree": "usr", "path": "/usr"}, *device_sources()]
    sources += [{"tree": f"bind:{target}", "path": path, "optional": True} for path, target in binds]
    read_only = mount.MOUNT_ATTR_RDONLY | _NO_DEV
    places = [("volume", "/volume", volume)] if volume else []
    places += [
        (f"volume-{number}", f"/volume/{target.strip('/')}", path)
        for number, (target, path) in enumerate(volumes)
    ]
    trees = [{"tree": name, "path": path} for name, _, path in places]
    shown = []
    foreign = []
    guard: dict = {} if container is None else {"container": container}
    if root is not None:
        trees += root_trees(root, "root-")
        shown += writable_steps(root, "/volume", "root-")
        guard |= {"upper": upper_of(root)} if root.upper else {}
    for target, view in (views or {}).items():
        prefix = f"{target.strip('/').replace('/', '-')}-"
        if isinstance(view, Shifted):
            foreign.append(_shifted(view, prefix, idmap.first))
            shown.append(MountTree(prefix, target))
            continue
        trees += root_trees(view, prefix)
        shown += view_steps(view, target, prefix)
    prepare = [
        steps.Stage(),
        *([Sources()] if foreign else []),
        steps.TmpfsRoot(),
        steps.Bind("usr", "/usr", directory=True, attributes=read_only),
        *[steps.Symlink(f"/{name}", f"usr/{name}") for name in ("bin", "sbin", "lib", "lib32", "lib64")],
        *_device_nodes(),
        steps.Filesystem("proc", "/proc", {}, _NO_EXEC),
        steps.Filesystem("tmpfs", "/tmp", {"mode": "1777", "size": tmp_size}, _NO_DEV),
        *[steps.Directory(path) for path in ("/etc", "/var/tmp", "/root", "/run")],
        *[
            steps.HostBind(f"bind:{target}", target, attributes=read_only)
            for _, target in binds
        ],
        *[steps.Bind(name, target, directory=True) for name, target, _ in places],
        *shown,
        steps.PivotRoot(shared=False),
    ]  # fmt: skip
    return {
        "uid_map": idmap.as_map(), "gid_map": idmap.as_map(), "stage": stage, "network": not network,
        "trees": trees, "sources": sources, **({"binds": foreign} if foreign else {}), **guard,
        "prepare": [steps.to_json(step) for step in prepare],
        "program": program,
    }  # fmt: skip


def _shifted(view: Shifted, name: str, first_id: int) -> dict:
    """Return the bind that shows a foreign tree, read-only, with the ids inside."""
    rows = [
        [[disk, first_id + inside, count] for disk, inside, count in ranges]
        for ranges in (view.users, view.groups)
    ]
    return {
        "tree": name, "path": view.path, "strict": True, "idmap": {"users": rows[0], "groups": rows[1]},
        "attributes": mount.MOUNT_ATTR_RDONLY | _NO_EXEC,
    }  # fmt: skip
