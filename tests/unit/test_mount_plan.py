"""What mount points become in a plan: whose trees, with which flags and ids, and in which order."""

from sysctr.config import schema, toml
from sysctr.engine.mount_plan import MountPlan, Place, mount_plan
from sysctr.linux import mount as flags
from sysctr.storage.base import RootSpec, Tree

FIRST = 1_000_000
TREE = RootSpec(trees=(Tree("volume", "/pool/volumes/101-disk0/rootfs"),))
LAYERS = RootSpec(
    trees=(Tree("pool", "/pool", read_only=True), Tree("volume", "/pool/uppers/101-disk0.2")),
    lowers=("pool/uppers/101-disk0.1/rootfs",), upper="volume/rootfs", work="volume/work",
)  # fmt: skip
SAFE = flags.MOUNT_ATTR_NODEV | flags.MOUNT_ATTR_NOSUID


def planned(*lines: str, devices: tuple[str, ...] = (), root: RootSpec = TREE) -> MountPlan:
    changes = {f"mount.{index}": line for index, line in enumerate(lines)}
    changes |= {f"device.{index}": line for index, line in enumerate(devices)}
    text = toml.edit('schema = 1\nname = "demo"\n', schema.plain_changes(changes))
    config = schema.parse_config(toml.read_container(text))
    roots = {"volume": root, "shared": root}
    places = [Place(one, roots.get(one.kind)) for one in (*config.mounts, *config.devices)]
    return mount_plan(places, FIRST)


def test_a_bind_is_nodev_and_nosuid_and_shows_the_hosts_ids() -> None:
    plan = planned("/srv,mp=/srv,ro,noexec")
    everything = SAFE | flags.MOUNT_ATTR_RDONLY | flags.MOUNT_ATTR_NOEXEC
    assert plan.binds == (
        {"tree": "mount.0", "path": "/srv", "strict": True, "idmap": False, "attributes": everything},
    )
    assert plan.trees == ()


def test_what_is_asked_for_is_given() -> None:
    (bind,) = planned("/srv,mp=/srv,dev,suid,idmap=1000=5;u:7-9=100").binds
    assert bind["attributes"] == 0
    assert bind["idmap"] == {
        "users": [[1000, FIRST + 5, 1], [7, FIRST + 100, 3]], "groups": [[1000, FIRST + 5, 1]],
    }  # fmt: skip


def test_an_own_volume_keeps_setuid_but_has_no_devices() -> None:
    plan = planned("target=/data,size=1G")
    assert plan.binds == ()
    assert [tree["attributes"] for tree in plan.trees] == [flags.MOUNT_ATTR_NODEV]
    assert [step.describe() for step in plan.steps] == ["mount.0 on /data"]


def test_a_shared_volume_and_a_read_only_one_are_locked() -> None:
    (shared,) = planned("volume=media,target=/media").binds
    assert shared["attributes"] == SAFE
    assert "strict" not in shared
    (suid,) = planned("volume=media,target=/media,suid").binds
    assert suid["attributes"] == flags.MOUNT_ATTR_NODEV
    plan = planned("target=/data,size=1G,ro")
    assert plan.trees == ()
    assert plan.binds[0]["attributes"] == flags.MOUNT_ATTR_NODEV | flags.MOUNT_ATTR_RDONLY


def test_a_volume_of_layers_becomes_an_overlay() -> None:
    plan = planned("target=/data,size=1G", root=LAYERS)
    assert [tree["tree"] for tree in plan.trees] == ["mount.0-pool", "mount.0-volume"]
    overlay = plan.prepare[-1]
    assert overlay.lower == ["mount.0-pool/uppers/101-disk0.1/rootfs"]
    assert (overlay.upper, overlay.work) == ("mount.0-volume/rootfs", "mount.0-volume/work")
    assert overlay.attributes == flags.MOUNT_ATTR_NODEV


def test_a_read_only_volume_of_layers_has_no_upper() -> None:
    plan = planned("target=/data,size=1G,ro", root=LAYERS)
    assert all(tree["attributes"] & flags.MOUNT_ATTR_RDONLY for tree in plan.trees)
    overlay = plan.prepare[-1]
    assert overlay.lower == ["mount.0-volume/rootfs", "mount.0-pool/uppers/101-disk0.1/rootfs"]
    assert (overlay.upper, overlay.work) == ("", "")


def test_a_mount_below_another_comes_after_it() -> None:
    plan = planned("tmpfs,target=/a/b/c", "tmpfs,target=/a", "tmpfs,target=/a/b", devices=("tun",))
    assert [step.target for step in plan.attach] == ["/a", "/a/b", "/a/b/c", "/dev/net/tun"]


def test_a_tmpfs_has_its_size_and_mode() -> None:
    step = planned("tmpfs,target=/t,size=1M,mode=700").prepare[0]
    assert step.options == {"mode": "0700", "size": "1048576"}
    assert step.attributes == SAFE
    assert planned("tmpfs,target=/t").prepare[0].options == {"mode": "1777"}


def test_a_device_is_the_containers() -> None:
    assert planned(devices=("/dev/kvm,uid=7,gid=8,mode=660",)).binds == (
        {"tree": "device.0", "device": "/dev/kvm", "mode": 0o660, "uid": FIRST + 7, "gid": FIRST + 8},
    )
