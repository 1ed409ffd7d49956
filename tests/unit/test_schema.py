"""The table of a container's keys: defaults, errors with the nearest key, command lines and differences."""

import doctest
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.config import kinds, schema, table
from sysctr.config.schema import parse_config, plain_changes
from sysctr.config.table import Key, Section, Table
from sysctr.errors import ConfigError

MAC = "02:00:00:00:00:01"


def _refusal(function: Callable, *arguments: object) -> str:
    """Return the message of the ConfigError that a call ends with, else nothing; any other error passes."""
    try:
        function(*arguments)
    except ConfigError as error:
        return error.message
    return ""


def _refused(mapping: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "demo", **mapping})
    return caught.value.message


def test_a_container_needs_only_a_name() -> None:
    container = parse_config({"name": "demo"})
    assert container.limits.memory_bytes is None
    assert container.nets == ()
    assert container.environment == {}
    with pytest.raises(ConfigError, match="without name"):
        parse_config({})


def test_a_whole_file_becomes_values() -> None:
    container = parse_config(
        {
            "name": "demo",
            "tags": ["web", "db", "web"],
            "stop_signal": "rtmin+3",
            "limits": {"memory": "512M", "swap": 0, "cores": "0-1", "cpu": 2, "pids": 64},
            "environment": {"A": "", "B": "x=y"},
            "net": {"10": {}, "2": {"ip": "10.1.2.3/24", "gateway": "10.1.2.1", "mac": MAC.upper()}},
            "dns": {"nameservers": ["2001:DB8::0:1"], "search": ["Example.org."]},
            "features": {},
        }
    )
    assert container.tags == ("db", "web")
    assert container.stop_signal == "SIGRTMIN+3"
    assert container.limits.memory_bytes == 2**29
    assert container.limits.swap_bytes == 0
    assert container.limits.cores == (0, 1)
    assert container.limits.cpu == 2.0
    assert container.environment == {"A": "", "B": "x=y"}
    assert [(nic.index, nic.name) for nic in container.nets] == [(2, "eth2"), (10, "eth10")]
    assert container.nets[0].gateway == "10.1.2.1"
    assert container.nets[1].ip == "managed"
    assert container.dns.nameservers == ("2001:db8::1",)
    assert container.dns.search == ("example.org",)


@pytest.mark.parametrize(
    ("mapping", "key", "nearest"),
    [
        ({"memory": "1G"}, "memory", "limits.memory"),
        ({"limits": {"memry": "1G"}}, "limits.memry", "limits.memory"),
        ({"net": {"3": {"brigde": "br0"}}}, "net.3.brigde", "net.3.bridge"),
        ({"tag": []}, "tag", "tags"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(mapping: dict, key: str, nearest: str) -> None:
    message = _refused(mapping)
    assert message == f"cannot accept {key}: no such key, the nearest is {nearest}"


@pytest.mark.parametrize("mapping", [{"xyzzy": 1}, {"features": {"nesting": True}}, {"autostart": True}])
def test_an_unknown_key_with_none_near_names_where_the_keys_are(mapping: dict) -> None:
    with pytest.raises(ConfigError, match=r"no such key$") as caught:
        parse_config({"name": "demo", **mapping})
    assert caught.value.hint == "`sysctr set --help` lists the keys"


@pytest.mark.parametrize(
    ("mapping", "parts"),
    [
        ({"onboot": "yes"}, ("onboot = 'yes'", "true or false")),
        ({"onboot": 1}, ("onboot = 1", "true or false")),
        ({"limits": {"pids": True}}, ("limits.pids = True", "whole number")),
        ({"limits": {"pids": "64"}}, ("limits.pids = '64'", "whole number")),
        ({"limits": {"pids": 1}}, ("limits.pids", "1 is not", "from 16")),
        ({"limits": {"memory": 512}}, ("limits.memory", "512", "16M")),
        ({"limits": {"cpu": float("nan")}}, ("limits.cpu", "nan")),
        ({"limits": {"cpu": 10**400}}, ("limits.cpu",)),
        ({"limits": {"cores": 0}}, ("limits.cores", "0")),
        ({"limits": 5}, ("limits = 5", "a table")),
        ({"net": {"eth0": {}}}, ("net.eth0", "number from 0 to 31")),
        ({"net": {"32": {}}}, ("net.32", "number from 0 to 31")),
        ({"net": {"00": {}}}, ("net.00", "number from 0 to 31")),
        ({"net": {"0": 1}}, ("net.0 = 1", "a table")),
        ({"tags": ["a", 1]}, ("tags", "1 is not a tag")),
        ({"tags": "a"}, ("tags = 'a'", "a list of tags")),
        ({"environment": {"A": 1}}, ("environment.A = 1", "a text")),
        ({"environment": {"A-B": "x"}}, ("environment.A-B", "letters, digits and _")),
        ({"environment": {"A": "x\ny"}}, ("environment.A", "control characters")),
        ({"description": "a\tb"}, ("description", "control characters")),
        ({"a\nb" * 100: 1}, ("cannot accept 'a\\nb",)),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(mapping: dict, parts: tuple[str, ...]) -> None:
    message = _refused(mapping)
    assert all(part in message for part in parts), message
    assert message.isprintable()


@pytest.mark.parametrize(
    ("nets", "reason"),
    [
        ({"0": {}, "1": {"name": "eth0"}}, "net.1.name: eth0 is that of net.0.name"),
        ({"0": {"mac": MAC}, "1": {"mac": MAC.upper()}}, f"net.1.mac: {MAC} is that of net.0.mac"),
        ({"0": {"ip": "10.0.0.2/24"}, "1": {"ip": "10.0.0.2/8"}}, "net.1.ip: 10.0.0.2 is that of"),
        ({"0": {"gateway": "10.0.0.1"}}, "needs an address"),
        ({"0": {"ip": "10.0.0.2/24", "gateway": "10.0.1.1"}}, "is not in 10.0.0.0/24"),
        ({"0": {"ip": "10.0.0.2/24", "gateway": "10.0.0.2"}}, "own address"),
        ({"0": {"ip": "10.0.0.2/24", "gateway": "10.0.0.255"}}, "not an address of a host"),
    ],
)
def test_cards_that_contradict_are_refused(nets: dict, reason: str) -> None:
    assert reason in _refused({"net": nets})


def test_a_lone_address_may_have_its_gateway_on_the_link() -> None:
    container = parse_config({"name": "demo", "net": {"0": {"ip": "203.0.113.7/32", "gateway": "192.0.2.1"}}})
    assert container.nets[0].gateway == "192.0.2.1"


def test_two_managed_cards_are_no_contradiction() -> None:
    assert len(parse_config({"name": "demo", "net": {"0": {}, "1": {}}}).nets) == 2


def typed(line: str) -> dict:
    """Return what a line `key=value` of a command changes."""
    key, _, value = line.partition("=")
    return plain_changes({key: value})


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("limits.memory=1024M", {"limits.memory": "1G"}),
        ("limits.pids=99", {"limits.pids": 99}),
        ("limits.cores=2", {"limits.cores": 2}),
        ("limits.cores=0,1", {"limits.cores": "0-1"}),
        ("limits.cpu=2", {"limits.cpu": 2}),
        ("onboot=on", {"onboot": True}),
        ("tags=b, a,b", {"tags": ["a", "b"]}),
        ("tags=", {"tags": None}),
        ("environment.A=", {"environment.A": ""}),
        ("environment.A=b=c", {"environment.A": "b=c"}),
        ("net.0=eth1,hwaddr=" + MAC, {"net.0.name": "eth1", "net.0.mac": MAC}),
        ("net.0=", {"net.0": None}),
        ("net.0.ip=manual", {"net.0.ip": "manual"}),
    ],
)
def test_a_command_line_becomes_what_the_file_says(text: str, changes: dict) -> None:
    assert typed(text) == changes


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("limits=1", "no such key"),
        ("name=", "cannot unset name"),
        ("memory=1G", "the nearest is limits.memory"),
        ("net.0=bridg=br0", "net.0.bridge"),
        ("net.0=mac=a,hwaddr=b", "net.0"),
        ("net.0.ip=10.0.0.300/24", "net.0.ip"),
        ("limits.pids=many", "limits.pids"),
        ("=", "no such key"),
    ],
)
def test_a_wrong_command_line_is_refused(text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        typed(text)


def test_changes_of_an_api_client_are_checked() -> None:
    changes = {
        "onboot": True,
        "limits.memory": 2**30,
        "tags": ["a"],
        "net.1": {"ip": "manual"},
        "dns.search": None,
    }
    assert plain_changes(changes) == {
        "onboot": True,
        "limits.memory": "1G",
        "tags": ["a"],
        "net.1.ip": "manual",
        "dns.search": None,
    }
    for wrong in ({"onboot": 3}, {"net.0": 3}, {"name": None}, {"limits.pids": [1]}, {"x": None}):
        with pytest.raises(ConfigError):
            plain_changes(wrong)


@given(st.text(max_size=40))
def test_any_command_line_is_read_or_refused(text: str) -> None:
    for line in (
        text,
        f"limits.{text}",
        f"net.0={text}",
        f"net.0.{text}",
        f"environment.{text}",
        f"tags={text}",
    ):
        assert _refusal(typed, line).isprintable()


TREE = st.recursive(
    st.one_of(st.text(max_size=6), st.integers(), st.booleans(), st.floats(), st.none()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["0", "1", "ip", "mac", "memory", "A", "cores", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["net", "limits", "environment", "dns", "tags", "features", "y"]), TREE)
)
def test_any_mapping_is_read_or_refused(mapping: dict) -> None:
    assert _refusal(parse_config, {"name": "demo", **mapping}).isprintable()


def test_what_waits_for_a_restart_is_told_from_what_holds_at_once() -> None:
    old = parse_config(
        {"name": "demo", "limits": {"memory": "1G"}, "net": {"0": {}}, "environment": {"A": "1"}}
    )
    new = parse_config(
        {
            "name": "demo",
            "limits": {"memory": "2G"},
            "net": {"0": {"mtu": 1400}, "1": {}},
            "environment": {"B": "1"},
        }
    )
    applied, pending = schema.diff_live(old, new)
    assert applied == ("limits.memory",)
    assert pending == ("environment.A", "net.0.mtu", "environment.B", "net.1")
    assert schema.diff_live(new, new) == ((), ())


def test_the_template_is_settled_at_creation() -> None:
    old = parse_config({"name": "demo", "template": "debian-12"})
    schema.refuse_fixed(old, replace(old, description="another"))
    with pytest.raises(ConfigError, match="cannot change template"):
        schema.refuse_fixed(old, replace(old, template="debian-13"))


def test_a_card_is_read_from_one_line() -> None:
    text = "eth1,bridge=br0,gw=10.0.0.1,ip=10.0.0.2/24,hwaddr=02:00:00:00:00:01,mtu=1400"
    assert schema.parse_line("net.0", text) == {
        "name": "eth1", "bridge": "br0", "gateway": "10.0.0.1", "ip": "10.0.0.2/24",
        "mac": "02:00:00:00:00:01", "mtu": 1400,
    }  # fmt: skip


def test_every_key_is_documented_and_has_a_field() -> None:
    names = [key.name for key in schema.KEYS]
    assert len(names) == len(set(names))
    for key in schema.KEYS:
        assert key.doc
        assert not key.doc.endswith(".")
        assert key.live in table.LIVE
        assert key.usage.startswith(f"{key.name}=")
    numbered = {"net": {}, "mount": {"target": "/data"}, "device": {"path": "/dev/fuse"}}
    full = parse_config(
        {"name": "demo", "environment": {"A": "1"}, **{name: {"0": one} for name, one in numbered.items()}}
    )
    dotted = {
        name.replace(".0.", ".N.").replace("environment.A", "environment.NAME")
        for name in schema.TABLE.flat(full)
    }
    assert dotted == set(names)


def test_a_later_table_is_one_dataclass_and_its_keys() -> None:
    keys = (
        Key("name", kinds.NAME, "", "live", "name"),
        Key("mount.N.path", kinds.PATH, "", "live", "target"),
        Key("mount.N.size", kinds.DISK, None, "restart", "size"),
    )
    later = Table(keys, (Section("", "", dict), Section("mount.N", "mounts", dict)))
    read = later.read({"name": "a", "mount": {"1": {"path": "/srv", "size": "1G"}}})
    assert read == {"name": "a", "mounts": ({"index": 1, "path": "/srv", "size_bytes": 2**30},)}
    assert later.live("mount.3") == "restart"
    with pytest.raises(ConfigError, match=r"mount\.1\.pth: no such key, the nearest is mount\.1\.path"):
        later.read({"mount": {"1": {"pth": "/srv"}}})


@pytest.mark.parametrize("module", [table, schema], ids=lambda module: module.__name__)
def test_the_examples_hold(module) -> None:
    assert doctest.testmod(module).failed == 0
