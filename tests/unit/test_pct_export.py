"""Our settings become Proxmox's: a whole container, what is noted, and the way back."""

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sysctr.config import pct, pct_export, schema, toml
from sysctr.config.pct_convert import Converted, from_pct
from sysctr.config.pct_export import to_pct
from sysctr.config.pct_notes import CHANGED, DROPPED, PERMISSIONS
from sysctr.config.schema import Container, parse_config, plain_changes
from sysctr.errors import ConfigError

GIB = 2**30


def container_of(converted: Converted) -> Container:
    """Return the container that a conversion makes."""
    text = toml.edit("schema = 1\n", plain_changes(converted.changes))
    return parse_config(toml.read_container(text))


FULL = parse_config(
    {
        "name": "web",
        "template": "debian-12",
        "description": "Front end: 100%",
        "tags": ["b", "a"],
        "onboot": True,
        "protected": True,
        "init": "/sbin/openrc-init",
        "stop_signal": "SIGTERM",
        "limits": {
            "cores": "0-2",
            "cpu": 1.5,
            "cpu_weight": 200,
            "memory": 2**30 + 1,
            "swap": 0,
            "pids": 512,
            "disk": "8G",
        },
        "environment": {"A": "1", "B": "x "},
        "net": {
            "0": {"mac": "02:00:00:00:00:01"},
            "1": {"bridge": "vmbr7", "ip": "192.0.2.10/24", "gateway": "192.0.2.1", "mtu": 1400},
            "2": {"bridge": "vmbr7", "ip": "manual"},
            "3": {"ip": "10.0.3.77/24", "bridge": "sysctr0"},
        },
        "dns": {"nameservers": ["192.0.2.53", "2001:db8::1"], "search": ["example.org"]},
        "snapshot": {"schedule": "daily"},
        "mount": {
            "0": {"target": "/srv", "size": "20G", "name": "data", "pool": "fast"},
            "1": {"target": "/var/cache", "backup": False, "read_only": True, "noexec": True},
            "2": {"target": "/media", "source": "/tank/media", "idmap": "1000-1009=2000", "read_only": True},
            "3": {"target": "/dev-ok", "source": "/srv/x", "dev": True, "suid": True},
            "4": {"target": "/shared", "volume": "media"},
            "5": {"target": "/tmp", "tmpfs": True},
            "6": {"target": "/a,b", "size": "1G"},
        },
        "device": {
            "0": {"path": "/dev/fuse"},
            "1": {"path": "/dev/ttyUSB0", "target": "/dev/modem", "mode": "660", "gid": 20},
        },
    }
)
FULL_CONF = """\
#Front end%3A 100%25
arch: amd64
cores: 3
cpulimit: 1.5
cpuunits: 200
dev0: /dev/fuse,mode=0666
dev1: /dev/ttyUSB0,gid=20,mode=0660
entrypoint: /sbin/openrc-init
hostname: web
memory: 1025
mp0: local:subvol-107-disk-1,backup=1,mp=/srv,size=20G
mp1: local:subvol-107-disk-2,mountoptions=noexec,mp=/var/cache,ro=1,size=3G
mp2: /tank/media,idmap=u:2000:1000:10;g:2000:1000:10,mountoptions=nodev;nosuid,mp=/media,ro=1
mp3: /srv/x,mp=/dev-ok
nameserver: 192.0.2.53 2001:db8::1
net0: bridge=vmbr0,hwaddr=02:00:00:00:00:01,ip=dhcp,name=eth0,type=veth
net1: bridge=vmbr7,gw=192.0.2.1,ip=192.0.2.10/24,mtu=1400,name=eth1,type=veth
net2: bridge=vmbr7,ip=manual,name=eth2,type=veth
net3: bridge=vmbr0,ip=10.0.3.77/24,name=eth3,type=veth
onboot: 1
ostype: debian
protection: 1
rootfs: local:subvol-107-disk-0,size=8G
searchdomain: example.org
swap: 0
tags: a;b
unprivileged: 1
lxc.environment.runtime: A=1
lxc.environment.runtime: B=x
"""


def test_a_whole_container_becomes_a_pct_conf_and_notes() -> None:
    exported = to_pct(
        FULL,
        number=107,
        ostype="debian",
        rootfs_size_bytes=8 * GIB,
        volume_sizes={1: 3 * GIB - 5, 6: GIB},
        managed_bridge="sysctr0",
    )
    assert pct.write(exported.document) == FULL_CONF
    assert {(note.key, note.kind) for note in exported.notes} == {
        ("template", DROPPED),
        ("stop_signal", DROPPED),
        ("snapshot", DROPPED),
        ("limits.cores", CHANGED),
        ("limits.memory", CHANGED),
        ("limits.pids", DROPPED),
        ("environment.B", CHANGED),
        ("features", CHANGED),
        ("net.0.bridge", CHANGED),
        ("net.3.bridge", CHANGED),
        ("mount.0.name", DROPPED),
        ("mount.0.pool", DROPPED),
        ("mount.1.size", CHANGED),
        ("mount.3", CHANGED),
        ("mount.3.idmap", CHANGED),
        ("mount.4", DROPPED),
        ("mount.5", DROPPED),
        ("mount.6", DROPPED),
        ("device.1.target", CHANGED),
    }


def test_every_volume_has_a_size_for_proxmox() -> None:
    container = parse_config({"name": "a", "mount": {"0": {"target": "/srv"}}})
    with pytest.raises(
        ConfigError, match=r"cannot write mp0 to pct\.conf: the size of mount\.0 is not known"
    ):
        to_pct(container, number=100, rootfs_size_bytes=GIB)
    exported = to_pct(
        container, number=100, rootfs_size_bytes=GIB, volume_sizes={0: 5 * GIB}, memory_bytes=4 * GIB
    )
    assert exported.document.root.values["mp0"] == "local:subvol-100-disk-1,backup=1,mp=/srv,size=5G"
    assert exported.document.root.values["memory"] == "4096"
    assert exported.document.root.values["swap"] == "512"
    assert "features" not in exported.document.root.values
    nested = to_pct(FULL, number=100, rootfs_size_bytes=GIB, volume_sizes={1: GIB, 6: GIB}, nesting=True)
    assert nested.document.root.values["features"] == "nesting=1"


def test_there_and_back_gives_the_container_again_but_for_what_was_noted() -> None:
    exported = to_pct(
        FULL,
        number=107,
        rootfs_size_bytes=8 * GIB,
        volume_sizes={1: 3 * GIB, 6: GIB},
        managed_bridge="sysctr0",
    )
    back = container_of(round_trip(FULL))
    noted = {note.key for note in exported.notes}
    changed = {key for key in schema.TABLE.changed(FULL, back) if not is_noted(key, noted)}
    assert changed == set()


def round_trip(container: Container) -> Converted:
    sizes = {mount.index: mount.size_bytes or 3 * GIB for mount in container.mounts}
    disk_bytes = container.limits.disk_bytes or 8 * GIB
    exported = to_pct(
        container, number=107, rootfs_size_bytes=disk_bytes, volume_sizes=sizes, managed_bridge="sysctr0"
    )
    document = pct.read(pct.write(exported.document))
    assert document == exported.document
    return from_pct(document, bridges={"vmbr7"}, allow=PERMISSIONS, managed_subnet="10.0.3.0/24")


def is_noted(key: str, noted: set[str]) -> bool:
    """Tell whether a key, or the table that it is in, was noted."""
    return key in noted or any(key.startswith(f"{name}.") for name in noted)


_LABEL = st.from_regex(r"[a-z]([a-z0-9-]{0,5}[a-z0-9])?", fullmatch=True)
_TEXT = st.text("abc %:#=,;[]\u00e9/", max_size=10)
_SIZE = st.integers(16, 2**22).map(lambda mib: mib * 2**20) | st.integers(2**24, 2**40)
_MOUNTS = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {}, optional={"size": _SIZE, "backup": st.booleans(), "read_only": st.booleans()}
        ),
        st.fixed_dictionaries(
            {"source": st.sampled_from(["/srv/a", "/srv/b c", "/srv/d=e", "/srv/f,g"])},
            optional={
                "read_only": st.booleans(),
                "noexec": st.booleans(),
                "suid": st.booleans(),
                "idmap": st.sampled_from(["1000=1000", "u:5-9=5", "u:1=1;g:2=2"]),
            },
        ),
        st.just({"tmpfs": True}),
    ),
    max_size=4,
).map(lambda mounts: {str(number): {"target": f"/m/{number}", **one} for number, one in enumerate(mounts)})
_NETS = st.lists(
    st.one_of(
        st.just({}),
        st.fixed_dictionaries({"bridge": st.sampled_from(["vmbr7", "sysctr0", ""]), "ip": st.just("manual")}),
        st.fixed_dictionaries({"bridge": st.just("vmbr7")}, optional={"mtu": st.integers(576, 65535)}),
        st.sampled_from(["vmbr7", ""]).map(
            lambda bridge: {"bridge": bridge, "ip": "10.0.3.N/24", "gateway": "10.0.3.1"}
        ),
    ),
    max_size=4,
).map(
    lambda nets: {
        str(number): {
            key: value.replace("N", str(number + 9)) if key == "ip" else value for key, value in net.items()
        }
        for number, net in enumerate(nets)
    }
)
CONTAINERS = st.fixed_dictionaries(
    {"name": _LABEL},
    optional={
        "description": _TEXT,
        "tags": st.lists(_LABEL, max_size=3),
        "onboot": st.booleans(),
        "protected": st.booleans(),
        "init": st.sampled_from(["/sbin/init", "/sbin/my init", "/init"]),
        "limits": st.fixed_dictionaries(
            {},
            optional={
                "cores": st.integers(1, 64) | st.just("0-3,5"),
                "cpu": st.floats(0.01, 8192),
                "memory": _SIZE,
                "swap": _SIZE,
                "cpu_weight": st.integers(1, 10000),
                "disk": _SIZE,
                "pids": st.just(64),
            },
        ),
        "environment": st.dictionaries(st.sampled_from(["A", "B_1"]), _TEXT, max_size=2),
        "net": _NETS,
        "mount": _MOUNTS,
        "dns": st.fixed_dictionaries({}, optional={"search": st.lists(_LABEL, max_size=2)}),
        "device": st.dictionaries(
            st.just("0"), st.just({"path": "/dev/kvm", "mode": "0600", "uid": 5}), max_size=1
        ),
    },
).map(parse_config)


@settings(deadline=None)
@given(CONTAINERS)
def test_any_container_comes_back_but_for_what_was_noted(container: Container) -> None:
    sizes = {mount.index: mount.size_bytes or 3 * GIB for mount in container.mounts}
    disk_bytes = container.limits.disk_bytes or 8 * GIB
    exported = to_pct(
        container, number=107, rootfs_size_bytes=disk_bytes, volume_sizes=sizes, managed_bridge="sysctr0"
    )
    noted = {note.key for note in exported.notes}
    converted = round_trip(container)
    back = container_of(converted)
    # What comes back differently has a note on the way there or on the way back.
    names = {"mp": "mount.", "net": "net."}
    for note in converted.notes:
        key = note.key.partition(".")[0]
        noted |= {name + key.removeprefix(kind) for kind, name in names.items() if key.startswith(kind)}
    unnoted = {key for key in schema.TABLE.changed(container, back) if not is_noted(key, noted)}
    # `/sbin/init` is what is run anyway.
    if container.init == "/sbin/init":
        unnoted.discard("init")
    assert unnoted == set()


def test_the_examples_hold() -> None:
    assert doctest.testmod(pct_export).failed == 0
