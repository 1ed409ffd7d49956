"""LXC's configurations become our settings: what goes over, what does not, and that nothing breaks it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.config import schema
from sysctr.config.lxc import IdRange, LxcConfig, parse
from sysctr.config.pct_reading import Reading, _nested
from sysctr.errors import ConfigError

ROOT = "lxc.rootfs.path = dir:/var/lib/lxc/web/rootfs\n"


def converted(text: str, *allow: str, bridges: tuple[str, ...] = ()) -> Reading:
    reading = Reading(allow, bridges, "10.7.0.0/24")
    parse(ROOT + text, "web", "import web").convert(reading)
    return reading


def notes(text: str, *allow: str) -> list[str]:
    """Return the notes, without the quotation marks around what was given."""
    return [f"{note.key}: {note.reason}".replace("'", "") for note in converted(text, *allow).notes]


UNPRIVILEGED = "lxc.idmap = u 0 100000 65536\nlxc.idmap = g 0 100000 65536\n"


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("lxc.start.auto = 1", "onboot", True),
        ("lxc.cgroup2.memory.max = 2G", "limits.memory", "2G"),
        ("lxc.cgroup.memory.limit_in_bytes = 536870912", "limits.memory", "512M"),
        ("lxc.cgroup2.memory.swap.max=0", "limits.swap", "0"),
        ("lxc.cgroup2.cpu.max = 150000 100000", "limits.cpu", 1.5),
        ("lxc.cgroup2.cpu.max = 50000", "limits.cpu", 0.5),
        ("lxc.cgroup.cpu.cfs_quota_us = 200000", "limits.cpu", 2),
        ("lxc.cgroup2.cpu.weight = 50", "limits.cpu_weight", 50),
        ("lxc.cgroup.cpu.shares = 1024", "limits.cpu_weight", 39),
        ("lxc.cgroup2.cpuset.cpus = 0-1", "limits.cores", "0-1"),
        ("lxc.cgroup2.pids.max = 500", "limits.pids", 500),
        ("lxc.environment = A=b=c", "environment.A", "b=c"),
        ("lxc.init.cmd = /lib/systemd/systemd", "init", "/lib/systemd/systemd"),
        ("lxc.signal.halt = SIGUSR1", "stop_signal", "SIGUSR1"),
        ("lxc.net.0.type = veth\nlxc.net.0.hwaddr = 00:16:3E:01:02:03", "net.0.mac", "00:16:3e:01:02:03"),
        ("lxc.net.3.type = veth\nlxc.net.3.link = br0\nlxc.net.3.mtu = 1400", "net.3.mtu", 1400),
        ("lxc.net.1.type = veth\nlxc.net.1.link = br0\nlxc.net.1.ipv4.address = 192.0.2.5/24",
         "net.1.ip", "192.0.2.5/24"),
    ],
)  # fmt: skip
def test_what_has_an_equal_goes_over(line: str, key: str, value: object) -> None:
    assert converted(UNPRIVILEGED + line, bridges=("br0",)).changes[key] == value


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lxc.hook.pre-start = /x", "lxc.hook.pre-start: sysctr runs no hook scripts"),
        ("lxc.include = /etc/mine.conf", "what /etc/mine.conf says was not looked at"),
        ("lxc.mount.entry = /srv srv none bind 0 0", "it mounts /srv at /srv"),
        ("lxc.mount.entry = /dev/fuse dev/fuse none bind,create=file 0 0", "it mounts /dev/fuse"),
        ("lxc.net.0.type = none", "no container here has the network of its host"),
        ("lxc.net.0.type = phys", "no cards of type phys"),
        ("lxc.net.0.ipv6.address = 2001:db8::1/64", "no IPv6 address"),
        ("lxc.sysctl.net.ipv4.ip_forward = 1", "no such setting"),
        ("lxc.cgroup2.devices.allow = c 10:200 rwm", "a device is given by device.N alone"),
        ("lxc.mount.fstab = /x/fstab", "lxc.mount.fstab: sysctr has no such setting"),
        ("lxc.include = /usr/share/lxc/config/nesting.conf", "no nesting"),
        ("lxc.environment = PATH", "PATH was the hosts"),
        ("lxc.init.cmd = /sbin/init splash", "without arguments"),
        ("lxc.uts.name = web.example.org", "web.example.org is web here"),
        ("", "it was privileged"),
    ],
)
def test_what_has_none_is_told(line: str, words: str) -> None:
    assert any(words in note for note in notes(line)), notes(line)


def test_nothing_of_the_host_is_given_without_leave() -> None:
    text = "lxc.mount.entry = /srv srv none bind,ro 0 0\nlxc.mount.entry = /dev/fuse dev/fuse none bind 0 0\n"
    assert not [key for key in converted(text).changes if key.startswith(("mount.", "device."))]
    given_it = converted(text, "bind", "device").changes
    assert given_it["mount.0.source"] == "/srv"
    assert given_it["mount.0.read_only"] is True
    assert given_it["device.0.path"] == "/dev/fuse"


def test_a_target_may_be_named_by_its_place_on_the_host() -> None:
    text = "lxc.mount.entry = /srv /var/lib/lxc/web/rootfs/data none bind 0 0\n"
    assert converted(text, "bind").changes["mount.0.target"] == "/data"


def test_defaults_and_what_lxc_ships_are_no_news() -> None:
    text = (
        "# a comment\n\nlxc.include = /usr/share/lxc/config/common.conf\nlxc.arch = linux64\n"
        "lxc.tty.max = 4\nlxc.apparmor.profile = generated\nlxc.cap.drop = sys_time\n"
        "lxc.mount.auto = proc:mixed\nlxc.mount.entry = shm dev/shm tmpfs defaults,create=dir 0 0\n"
        "lxc.net.0.type = empty\n"
    )
    assert notes(UNPRIVILEGED + text) == []


def test_an_empty_value_takes_back_what_was_said() -> None:
    text = "lxc.net.0.type = veth\nlxc.net =\nlxc.environment = A=1\nlxc.environment =\n"
    assert converted(UNPRIVILEGED + text).changes == {}


def test_ids_are_those_of_the_map() -> None:
    def ranges(text: str) -> LxcConfig:
        return parse(ROOT + text, "web", "import web")

    assert ranges("").users == (IdRange(0, 0, 65536),)
    mapped = ranges("lxc.idmap = u 0 100000 1000\nlxc.idmap = b 1000 1000 1\nlxc.idmap = g 0 200000 1000\n")
    assert mapped.users == (IdRange(0, 100000, 1000), IdRange(1000, 1000, 1))
    assert mapped.groups == (IdRange(1000, 1000, 1), IdRange(0, 200000, 1000))
    assert ranges(f"{UNPRIVILEGED}lxc.rootfs.options = idmap=container\n").users == (IdRange(0, 0, 65536),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lxc.rootfs = /x\n", "that of LXC 2"),
        ("lxc.uts.name = x\n", "names no lxc.rootfs.path"),
        ("lxc.rootfs.path = zfs:tank/web\n", "only directories"),
        ("lxc.rootfs.path = dir:relative\n", "absolute"),
        (f"{ROOT}lxc.idmap = u 0 100000\n", "no range of ids"),
        (f"{ROOT}lxc.idmap = u 0 100000 65536\n", "no ids of groups"),
        (f"{ROOT}lxc.idmap = b 0 4294967295 65536\n", "has no ids"),
    ],
)
def test_what_cannot_be_read_says_why(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(text, "web", "import web")


KEYS = st.sampled_from(
    [
        "lxc.uts.name", "lxc.net.0.type", "lxc.net.0.hwaddr", "lxc.net.0.ipv4.address",
        "lxc.net.0.ipv4.gateway", "lxc.net.0.mtu", "lxc.net.0.name", "lxc.net.0.link", "lxc.mount.entry",
        "lxc.environment", "lxc.cgroup2.memory.max", "lxc.cgroup2.cpu.max", "lxc.cgroup.cpu.shares",
        "lxc.cgroup2.cpuset.cpus", "lxc.cgroup.memory.memsw.limit_in_bytes", "lxc.init.cmd",
        "lxc.signal.halt", "lxc.hook.mount", "lxc.other",
    ]
)  # fmt: skip
VALUES = st.text(max_size=40) | st.sampled_from(["1", "veth", "-1", "999999999999999999", "0-3", "a b c d"])


@given(st.lists(st.tuples(KEYS, VALUES), max_size=20))
def test_nothing_that_it_says_breaks_the_configuration(lines: list[tuple[str, str]]) -> None:
    text = "".join(f"{key} = {value}\n" for key, value in lines)
    reading = converted(text, "bind", "device", "raw")
    schema.parse_config(_nested({"name": "web", **reading.changes}))
