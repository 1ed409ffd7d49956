"""The part of a plan that mounts a container's mount points and devices: pure, nothing is touched."""

from collections.abc import Sequence
from dataclasses import dataclass

from sysctr.config.mounts import Device, IdRange, Mount, idmap_ranges
from sysctr.linux import mount as flags
from sysctr.runtime import steps
from sysctr.runtime.steps_mounts import MountTree, OverlayTree, Sources, TmpfsTree
from sysctr.storage.base import RootSpec

_TMPFS_MODE = "1777"


@dataclass(frozen=True)
class Place:
    """A mount point or a device, and for a volume how it is mounted."""

    what: Mount | Device
    root: RootSpec | None = None


@dataclass(frozen=True)
class MountPlan:
    """What mounts need of a plan.

    `trees` the supervisor binds with the container's ids, `binds` are opened by a helper with their flags
    locked, `prepare` makes trees of them where that takes more than one, `attach` mounts those.
    """

    trees: tuple[dict, ...]
    binds: tuple[dict, ...]
    prepare: tuple[steps.Step, ...]
    attach: tuple[steps.Step, ...]

    @property
    def steps(self) -> "list[steps.Step]":
        """Return all steps in the order in which the container's first process takes them."""
        return [*([Sources()] if self.binds else []), *self.prepare, *self.attach]


def mount_plan(places: Sequence[Place], first_id: int) -> MountPlan:
    """Return the part of a plan for these mounts; one below another's target comes after it.

    `first_id` is the id of the host that the container's root has.
    """
    trees: list[dict] = []
    binds: list[dict] = []
    prepare: list[steps.Step] = []
    attach: list[steps.Step] = []
    for place in sorted(places, key=lambda place: target_of(place.what).count("/")):
        what = place.what
        if isinstance(what, Device):
            binds.append(_device(what, first_id))
        elif what.kind == "bind":
            binds.append(_bind(what, first_id))
        elif what.kind == "tmpfs":
            prepare.append(_tmpfs(what))
        else:
            assert place.root is not None, f"{what.key} has no volume"
            _volume(what, place.root, trees, binds, prepare)
        attach.append(MountTree(what.key, target_of(what)))
    return MountPlan(tuple(trees), tuple(binds), tuple(prepare), tuple(attach))


def target_of(what: Mount | Device) -> str:
    """Return where a mount point or a device is inside."""
    return what.place if isinstance(what, Device) else what.target


def _volume(
    what: Mount, root: RootSpec, trees: "list[dict]", binds: "list[dict]", prepare: "list[steps.Step]"
) -> None:
    attributes = _attributes(what, nodev=True, nosuid=what.kind == "shared" and not what.suid)
    if not root.lowers:
        tree = {"tree": what.key, "path": root.trees[0].path, "attributes": attributes}
        # What another container may write, or this one may not, has to stay so whatever its root does.
        if what.kind == "shared" or what.read_only:
            binds.append(tree)
        else:
            trees.append(tree)
        return
    names = {tree.name: f"{what.key}-{tree.name}" for tree in root.trees}
    for one in root.trees:
        read_only = flags.MOUNT_ATTR_RDONLY if one.read_only or what.read_only else 0
        trees.append(
            {"tree": names[one.name], "path": one.path, "attributes": flags.MOUNT_ATTR_NODEV | read_only}
        )
    prepare += [steps.Attach(name, name) for name in names.values()]
    lowers, upper, work = list(root.lowers), root.upper, root.work
    if what.read_only and upper:
        # What was the writable layer is one more lower: an overlay without an upper stays read-only.
        lowers, upper, work = [upper, *lowers], "", ""
    prepare.append(
        OverlayTree(
            what.key, [_renamed(low, names) for low in lowers], _renamed(upper, names), _renamed(work, names),
            attributes & ~flags.MOUNT_ATTR_RDONLY,
        )
    )  # fmt: skip


def _renamed(layer: str, names: "dict[str, str]") -> str:
    first, slash, rest = layer.partition("/")
    return names[first] + slash + rest if layer else ""


def _bind(what: Mount, first_id: int) -> dict:
    users, groups = idmap_ranges(what.idmap)
    maps = {"users": _rows(users, first_id), "groups": _rows(groups, first_id)} if what.idmap else False
    return {
        "tree": what.key, "path": what.source, "strict": True, "idmap": maps,
        "attributes": _attributes(what, nodev=not what.dev, nosuid=not what.suid),
    }  # fmt: skip


def _rows(ranges: Sequence[IdRange], first_id: int) -> "list[list[int]]":
    """Return the rows of an id map that shows ids on the disk as what the container's are on the host."""
    return [[ids.host, first_id + ids.inside, ids.count] for ids in ranges]


def _tmpfs(what: Mount) -> TmpfsTree:
    options = {"mode": what.mode or _TMPFS_MODE}
    if what.size_bytes is not None:
        options["size"] = str(what.size_bytes)
    return TmpfsTree(what.key, options, _attributes(what, nodev=True, nosuid=True))


def _device(what: Device, first_id: int) -> dict:
    return {
        "tree": what.key, "device": what.path, "mode": int(what.mode, 8),
        "uid": first_id + what.uid, "gid": first_id + what.gid,
    }  # fmt: skip


def _attributes(what: Mount, *, nodev: bool, nosuid: bool) -> int:
    wanted = (
        (nodev, flags.MOUNT_ATTR_NODEV), (nosuid, flags.MOUNT_ATTR_NOSUID),
        (what.noexec, flags.MOUNT_ATTR_NOEXEC), (what.read_only, flags.MOUNT_ATTR_RDONLY),
    )  # fmt: skip
    return sum(flag for holds, flag in wanted if holds)
