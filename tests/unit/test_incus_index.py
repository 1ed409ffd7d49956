"""The index of an export of Incus becomes our settings; a hostile one becomes an error."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.config import incus, plain_yaml, schema
from sysctr.config.pct_reading import Reading, _nested
from sysctr.errors import ConfigError, SysctrError
from tests.foreign import incus_index, yaml_of


def converted(index: dict[str, Any], *allow: str, bridges: tuple[str, ...] = ()) -> Reading:
    reading = Reading(allow, bridges, "10.7.0.0/24")
    incus.read(yaml_of(index), "restore it").convert(reading)
    schema.parse_config(_nested({"name": "web", **reading.changes}))
    return reading


def notes(index: dict[str, Any]) -> list[str]:
    return [f"{note.key}: {note.reason}".replace("'", "") for note in converted(index).notes]


@pytest.mark.parametrize(
    ("setting", "value", "key", "expected"),
    [
        ("limits.cpu", "2", "limits.cores", 2),
        ("limits.cpu", "0-1", "limits.cores", "0-1"),
        ("limits.memory", "1GiB", "limits.memory", "1G"),
        ("limits.memory", "512MB", "limits.memory", "500000K"),
        ("limits.memory.swap", "false", "limits.swap", "0"),
        ("limits.cpu.allowance", "25ms/100ms", "limits.cpu", 0.25),
        ("limits.cpu.allowance", "50%", "limits.cpu_weight", 50),
        ("limits.processes", "500", "limits.pids", 500),
        ("boot.autostart", "true", "onboot", True),
        ("security.protection.delete", "true", "protected", True),
        ("environment.COLOUR", "blue", "environment.COLOUR", "blue"),
        ("root", {"type": "disk", "path": "/", "pool": "default", "size": "5GiB"}, "limits.disk", "5G"),
        ("eth0", {"type": "nic", "nictype": "bridged", "parent": "br0"}, "net.0.bridge", "br0"),
        ("eth0", {"type": "nic", "hwaddr": "00:16:3e:00:00:01"}, "net.0.mac", "00:16:3e:00:00:01"),
        ("eth0", {"type": "nic", "network": "x", "ipv4.address": "10.7.0.9"}, "net.0.ip", "10.7.0.9/24"),
        ("eth0", {"type": "nic", "network": "x", "mtu": "1400"}, "net.0.mtu", 1400),
        ("eth0", {"type": "nic", "network": "x"}, "net.0.mac", "00:16:3e:11:22:33"),
    ],
)  # fmt: skip
def test_what_has_an_equal_goes_over(setting: str, value: object, key: str, expected: object) -> None:
    assert converted(incus_index(**{setting: value}), bridges=("br0",)).changes[key] == expected


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("raw.lxc", "lxc.mount.entry = / host none bind", "raw.lxc: sysctr hands nothing past"),
        ("security.nesting", "true", "security.nesting: sysctr has no nesting"),
        ("security.privileged", "true", "it was privileged"),
        ("user.user-data", "#cloud-config", "no settings for programs inside"),
        ("limits.memory", "50%", "this is another host"),
        ("limits.hugepages.2MB", "1", "no such setting"),
        ("srv", {"type": "disk", "source": "/srv", "path": "/srv"}, "it shows /srv of the host"),
        ("data", {"type": "disk", "source": "data", "pool": "fast", "path": "/data"}, "not in the archive"),
        ("fuse", {"type": "unix-char", "path": "/dev/fuse"}, "it gives the container /dev/fuse"),
        ("gpu", {"type": "gpu"}, "no devices of type gpu"),
        ("eth1", {"type": "nic", "nictype": "macvlan", "parent": "eth0"}, "no cards of type macvlan"),
    ],
)
def test_what_has_none_is_told(setting: str, value: object, words: str) -> None:
    found = notes(incus_index(**{setting: value}))
    assert any(words in note for note in found), found


def test_nothing_of_the_host_is_given_without_leave() -> None:
    index = incus_index(
        srv={"type": "disk", "source": "/srv", "path": "/srv", "readonly": "true"},
        kvm={"type": "unix-char", "source": "/dev/kvm", "path": "/dev/kvm", "mode": "0660", "gid": "100"},
    )
    assert not [key for key in converted(index).changes if key.startswith(("mount.", "device."))]
    changes = converted(index, "bind", "device").changes
    assert (changes["mount.0.source"], changes["mount.0.read_only"]) == ("/srv", True)
    assert (changes["device.0.path"], changes["device.0.gid"]) == ("/dev/kvm", 100)


def test_profiles_hold_where_nothing_was_expanded() -> None:
    index = incus_index(**{"limits.cpu": "1"})
    container = index["config"]["container"]
    del container["expanded_config"], container["expanded_devices"]
    index["config"]["profiles"] = [
        {"name": "default", "config": {"limits.cpu": "4", "limits.memory": "1GiB"},
         "devices": {"eth0": {"type": "nic", "network": "x", "name": "lan0"}}},
        {"name": "other", "config": {"limits.processes": "7"}, "devices": {}},
    ]  # fmt: skip
    changes = converted(index).changes
    assert changes["limits.cores"] == 1
    assert changes["limits.memory"] == "1G"
    assert changes["net.0.name"] == "lan0"
    assert "limits.pids" not in changes


def test_name_identity_and_snapshots_are_read() -> None:
    index = incus_index("Web.example.org")
    index["snapshots"] = ["new", "old"]
    index["config"]["snapshots"] = [
        {"name": "new", "created_at": "2026-03-01T00:00:00.5+01:00", "description": "second"},
        {"name": "old", "created_at": "2026-02-01T00:00:00Z"},
    ]
    found = incus.read(yaml_of(index), "restore it")
    assert (found.name, found.uuid) == ("web", "5f3c6b1e-9f5e-4b67-8a4e-0d9b2e0f1c11")
    assert found.macs == {"00:16:3e:11:22:33"}
    assert [(one.name, one.created) for one in found.snapshots] == [
        ("old", 1769904000.0), ("new", 1772319600.5),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["../x", "a/b", "a\nb", "", ".hidden", "x" * 80])
def test_a_snapshot_with_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    index = incus_index()
    index["snapshots"] = [name]
    with pytest.raises(ConfigError, match="no snapshot can be called"):
        incus.read(yaml_of(index), "restore it")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimized": True}, "--optimized-storage"), ({"type": "virtual-machine"}, "a virtual machine"),
        ({"type": "custom"}, "a volume without a container"), ({"config": {}}, "nothing of a container"),
        ({"config": None}, "nothing of a container"), ({"config": [1]}, "nothing of a container"),
        ({"snapshots": {"a": 1}}, "no usable snapshots"), ({"snapshots": ["a", "a"]}, "twice"),
    ],
)  # fmt: skip
def test_what_is_none_says_why(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SysctrError, match=words):
        incus.read(yaml_of({**incus_index(), **changes}), "restore it")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "anchors or aliases"), ("a: 1\na: 2\n", "a key twice"),
        ("[" * 100 + "]" * 100, "nested deeper"),
        ("? [a]\n: b\n", "a key that is no text"), ("a: !!python/object:os.system x\n", "tags"),
        ("a: 1\n---\nb: 2\n", "more than one document"), ("- a\n", "no mapping"), ("", "no mapping"),
        ("a: [", "no YAML"), ("a: \x00", "no YAML"), ("x: '" + "y" * plain_yaml.LIMIT_BYTES + "'", "1 MiB"),
        ("x: [" + "1," * 300_000 + "]", "values"),
    ],
)  # fmt: skip
def test_yaml_that_attacks_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plain_yaml.read(text.encode())


PLAIN = st.recursive(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text("abcé-. ", max_size=9), inner, max_size=4),
    max_leaves=15,
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=5), PLAIN, min_size=1))
def test_what_pyyaml_writes_is_read_back(value: dict[str, Any]) -> None:
    assert plain_yaml.read(yaml_of(value)) == value


KEYS = st.sampled_from([*sorted(incus._READERS), "environment.A B", "raw.lxc", "o", "volatile.eth0.hwaddr"])
TEXTS = st.text(max_size=30) | st.sampled_from(["true", "1GiB", "0-3", "50%", "10ms/0ms", "-1", "9" * 30])
DEVICE = st.dictionaries(
    st.sampled_from(["type", "path", "source", "pool", "size", "nictype", "parent", "hwaddr", "mtu", "name",
                     "ipv4.address", "vlan", "mode", "uid"]),
    TEXTS | st.sampled_from(["nic", "disk", "unix-char", "/", "/dev/null", "bridged"]),
)  # fmt: skip


@given(st.dictionaries(KEYS, TEXTS), st.dictionaries(st.text(max_size=9), DEVICE, max_size=4))
def test_nothing_that_it_says_breaks_the_configuration(
    config: dict[str, str], devices: dict[str, dict[str, str]]
) -> None:
    container = {"name": "c1", "expanded_config": config, "expanded_devices": devices}
    found = incus.IncusIndex({"name": "c1", "config": {"container": container}}, "restore it")
    reading = Reading(("bind", "device"), (), "10.7.0.0/24")
    found.convert(reading)
    schema.parse_config(_nested({"name": "web", **reading.changes}))
