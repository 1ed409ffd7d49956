"""Mount points and devices in a configuration: how they are written, and what is refused with which words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.config import mounts, schema, toml
from sysctr.errors import ConfigError


def parse(text: str) -> schema.Container:
    return schema.parse_config(toml.read_container(f'schema = 1\nname = "demo"\n{text}'))


def of_lines(*lines: str, devices: tuple[str, ...] = ()) -> schema.Container:
    """Return the container that `--mount` and `--device` options describe."""
    changes = {f"mount.{index}": line for index, line in enumerate(lines)}
    changes |= {f"device.{index}": line for index, line in enumerate(devices)}
    text = toml.edit('schema = 1\nname = "demo"\n', schema.plain_changes(changes))
    return schema.parse_config(toml.read_container(text))


@pytest.mark.parametrize(
    ("line", "kind", "values"),
    [
        ("target=/data,size=8G", "volume", {"target": "/data", "size_bytes": 8 << 30, "name": "disk0"}),
        ("target=/data,size=8G,backup=no,pool=fast", "volume", {"backup": False, "pool": "fast"}),
        ("source=/srv/www,target=/srv/www,ro", "bind", {"source": "/srv/www", "read_only": True}),
        ("/srv/www,mp=/srv/www,ro=1", "bind", {"source": "/srv/www", "read_only": True, "suid": False}),
        ("fast:8,mp=/data,backup=1", "volume", {"pool": "fast", "size_bytes": 8 << 30, "backup": True}),
        ("0.5,mp=/data", "volume", {"size_bytes": 1 << 29}),
        ("tmpfs,target=/scratch,size=64M,mode=700", "tmpfs", {"mode": "0700", "size_bytes": 64 << 20}),
        ("volume=media,target=/media,ro,noexec", "shared", {"volume": "media", "noexec": True}),
        ("/srv,mp=/srv,idmap=1000=1000;u:5-6=9", "bind", {"idmap": "1000=1000;u:5-6=9"}),
        ("/srv,mp=/srv,idmap=0=0,host_root", "bind", {"host_root": True}),
        ("/srv,mp=/srv,dev,suid", "bind", {"dev": True, "suid": True}),
    ],
)
def test_one_line_is_a_mount_point(line: str, kind: str, values: dict) -> None:
    (mount,) = of_lines(line).mounts
    assert mount.kind == kind
    assert {name: getattr(mount, name) for name in values} == values


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("fuse", {"path": "/dev/fuse", "place": "/dev/fuse", "mode": "0666", "uid": 0}),
        ("tun", {"path": "/dev/net/tun", "place": "/dev/net/tun"}),
        ("path=tun,gid=5", {"path": "/dev/net/tun", "gid": 5}),
        ("/dev/kvm,target=/dev/virt,mode=660,uid=7", {"place": "/dev/virt", "mode": "0660", "uid": 7}),
    ],
)
def test_one_line_is_a_device(line: str, values: dict) -> None:
    (device,) = of_lines(devices=(line,)).devices
    assert {name: getattr(device, name) for name in values} == values


def test_what_is_written_is_read_again() -> None:
    one = of_lines("target=/data,size=8G,backup=no", "/srv,mp=/srv,ro", "tmpfs,target=/t", devices=("fuse",))
    assert schema.parse_config(schema.dump_config(one)) == one
    assert parse(toml.new_text(one).partition("schema = 1\n")[2].partition("\n")[2]) == one


@pytest.mark.parametrize(
    "target", ["/proc", "/proc/sys", "/sys", "/sys/fs/x", "/dev", "/dev/shm", "/run", "/run/lock"]
)
def test_what_the_kernel_or_the_guest_mounts_over_is_no_target(target: str) -> None:
    with pytest.raises(ConfigError, match=f"{target} is not free: the "):
        of_lines(f"target={target},size=8G")


@pytest.mark.parametrize("target", ["/", "/a/../b", "a", "/a//b", "/a/", "/a/.", "", "/a\n"])
def test_a_target_is_an_absolute_path_in_its_one_spelling(target: str) -> None:
    with pytest.raises(ConfigError):
        of_lines(f"target={target},size=8G")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("target=/data", "/srv,mp=/data"), "cannot accept mount.1: mount.0 is on /data already"),
        (("target=/a,name=x", "target=/b,name=x"), "cannot accept mount.1.name: x is that of mount.0"),
        (("/srv,mp=/srv,tmpfs",), "it has source and tmpfs, which exclude each other"),
        (("/srv,mp=/srv,volume=x",), "it has source and volume, which exclude each other"),
        (("/srv,mp=/srv,size=8G",), "mount.0.size: a directory of the host has no size"),
        (("target=/a,idmap=1=1",), "mount.0.idmap: only a bind"),
        (("target=/a,dev",), "mount.0.dev: only a bind"),
        (("target=/a,suid",), "mount.0.suid: only a bind and a shared volume"),
        (("target=/a,mode=755",), "mount.0.mode: only a tmpfs"),
        (("tmpfs,target=/a,pool=x",), "mount.0.pool: only a volume"),
        (("/srv,mp=/srv,host_root",), "mount.0.host_root: there is no idmap"),
        (("/srv,mp=/srv,idmap=0=0",), "files of the host's root"),
        (("/srv,mp=/srv,idmap=0-9=1000",), "files of the host's root"),
        (("/srv,mp=/srv,idmap=g:0=0",), "files of the host's root"),
        (("/srv,mp=/srv,idmap=0=0,host_root,suid",), "mount.0.suid: with host_root"),
        (("/proc/sys,mp=/x",), "mount.0.source: /proc/sys is the kernel's"),
        (("/sys,mp=/x",), "mount.0.source: /sys is the kernel's"),
        (("/dev/sda,mp=/x",), "mount.0.source: /dev/sda is the kernel's"),
        (("source=/srv/../etc,mp=/x",), "absolute path without"),
        (("volume=m,target=/a", "volume=m,target=/a/b"), "show the volume m inside itself"),
        (("volume=m,target=/a/b", "volume=m,target=/a"), "show the volume m inside itself"),
        (("volume=101-x,target=/a",), "a volume's name, which begins with a letter"),
        (("target=/a,sice=8G",), "no such key, the nearest is mount.0.size"),
        (("target=/a,ro,read_only=1",), "read_only is given twice"),
        (("size=8G",), "cannot accept mount.0: it has no target"),
        (("target=/a,size=8",), "is not a size"),
        (("target=/a,,",), "is not written key=value"),
    ],
)
def test_what_does_not_go_is_refused_by_name(lines: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        of_lines(*lines)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (("/etc/passwd",), "/etc/passwd is not below /dev"),
        (("fuse,target=/etc/x",), "/etc/x is not free below /dev"),
        (("fuse,target=/dev/null",), "/dev/null is not free below /dev"),
        (("fuse,target=/dev/pts/5",), "/dev/pts/5 is not free below /dev"),
        (("fuse", "/dev/kvm,target=/dev/fuse"), "device.1: device.0 is on /dev/fuse already"),
        (("fuse,mode=999",), "permissions in octal"),
        (("fuse,uid=-1",), "is not a whole number from 0"),
        (("mode=0666",), "device.0: it has no path"),
        (("fuse,path=tun",), "path is given twice"),
    ],
)
def test_a_device_that_does_not_go_is_refused(devices: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        of_lines(devices=devices)
    assert words in caught.value.message


@pytest.mark.parametrize(
    "text",
    ["", "1000", "1000=", "=1", "a=b", "1=2=3", "5-4=1", "1=1;1=2", "1=5;2=5", "1-9=1;5=90",
     "4294967295=1", "1=4294967295", "0-4294967295=0", "u:1:1:0", "x:1=1", "1=1,2=2"],
)  # fmt: skip
def test_a_map_of_ids_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        mounts.parse_idmap(text)


def test_users_and_groups_may_be_mapped_apart() -> None:
    users, groups = mounts.idmap_ranges(mounts.parse_idmap("u:1000=0 g:1000=5 33=33"))
    assert [(ids.host, ids.inside) for ids in users] == [(1000, 0), (33, 33)]
    assert [(ids.host, ids.inside) for ids in groups] == [(1000, 5), (33, 33)]


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    for table in ("mount.0", "device.0"):
        try:
            schema.parse_line(table, text)
        except ConfigError:
            pass


@given(st.lists(st.tuples(st.sampled_from(["", "u:", "g:"]), st.integers(0, 2**32), st.integers(0, 2**32))))
def test_a_maps_one_spelling_stays(items: list[tuple[str, int, int]]) -> None:
    text = ";".join(f"{kinds}{host}={inside}" for kinds, host, inside in items)
    try:
        written = mounts.parse_idmap(text)
    except ConfigError:
        return
    assert mounts.parse_idmap(written) == written


def test_the_lowest_free_number_is_taken() -> None:
    assert mounts.free_index({0, 2}, 31) == 1
    with pytest.raises(ConfigError, match="32 are the most"):
        mounts.free_index(range(32), 31)
