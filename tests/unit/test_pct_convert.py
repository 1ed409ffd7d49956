"""Proxmox's settings become ours: golden files for every key, what is asked for by name, and any input.

A conversion that changed on purpose is written anew by `python -m tests.unit.test_pct_convert`; the
difference in the golden files is then what a reviewer reads.
"""

import dataclasses
import doctest
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sysctr.config import pct, pct_convert, pct_notes, pct_raw, pct_tables, toml
from sysctr.config.pct_convert import Converted, from_pct
from sysctr.config.pct_export import to_pct
from sysctr.config.pct_notes import DROPPED, NEEDS_PERMISSION, PERMISSIONS, Note
from sysctr.config.schema import Container, parse_config, plain_changes
from sysctr.errors import ConfigError, UsageError

GOLDEN = Path(__file__).parents[1] / "data" / "pct"
CONFS = sorted(GOLDEN.glob("*.conf"))
GIB = 2**30

# Every key of Proxmox 9.2, and every option of those that have some.
KEYS = (
    "lock", "onboot", "startup", "template", "arch", "ostype", "console", "tty", "cmode", "cores", "cpulimit",
    "cpuunits", "memory", "swap", "hostname", "description", "searchdomain", "nameserver", "timezone",
    "entrypoint", "rootfs", "mp", "unused", "net", "dev", "unprivileged", "features", "protection",
    "hookscript", "tags", "debug", "parent", "snaptime", "snapstate", "lxc.environment.runtime",
)  # fmt: skip
OPTIONS = {
    "mp": "volume mp size backup ro acl mountoptions quota replicate shared keepattrs idmap",
    "net": "name type bridge hwaddr mtu ip gw ip6 gw6 firewall tag trunks rate link_down host-managed",
    "dev": "path mode uid gid deny-write",
    "features": "nesting keyctl fuse mount mknod force_rw_sys",
    "startup": "order up down",
}


def convert(conf: Path, options: dict) -> Converted:
    """Convert a golden file as its JSON says."""
    return from_pct(pct.read(conf.read_bytes()), **options)


def container_of(converted: Converted) -> Container:
    """Return the container that a conversion makes, with a name where it has none."""
    text = toml.edit("schema = 1\n", {"name": "unnamed", **plain_changes(converted.changes)})
    return parse_config(toml.read_container(text))


def as_json(converted: Converted, options: dict) -> str:
    """Return all but the settings, for a golden file."""
    whole = {
        "options": options,
        "mounts": [dataclasses.asdict(mount) for mount in converted.mounts],
        "host_paths": [dataclasses.asdict(one) for one in converted.host_paths],
        "rootfs_size_bytes": converted.rootfs_size_bytes,
        "arch": converted.arch, "ostype": converted.ostype, "unprivileged": converted.unprivileged,
        "notes": [list(note.as_dict().values()) for note in converted.notes],
    }  # fmt: skip
    # A line for each note and each mount point, so that a difference is read at a glance.
    lines = []
    for name, value in whole.items():
        if isinstance(value, list) and value:
            shown = "[\n" + ",\n".join(f"    {json.dumps(item)}" for item in value) + "\n  ]"
        else:
            shown = json.dumps(value)
        lines.append(f"  {json.dumps(name)}: {shown}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


@pytest.mark.parametrize("conf", CONFS, ids=lambda conf: conf.stem)
def test_a_golden_file_becomes_these_settings_and_notes(conf: Path) -> None:
    golden = json.loads(conf.with_suffix(".json").read_text())
    converted = convert(conf, golden["options"])
    assert toml.new_text(container_of(converted)) == conf.with_suffix(".toml").read_text()
    assert json.loads(as_json(converted, golden["options"])) == golden


@pytest.mark.parametrize("conf", CONFS, ids=lambda conf: conf.stem)
def test_a_golden_file_comes_back_or_settles(conf: Path) -> None:
    text = conf.read_text()
    document = pct.read(text)
    assert pct.read(pct.write(document)) == document
    if conf.stem in ("reference", "general", "defaults"):
        assert pct.write(document) == text


def test_the_golden_files_have_every_key_and_every_option() -> None:
    text = "".join(conf.read_text() for conf in CONFS)
    for key in KEYS:
        assert re.search(rf"^{re.escape(key)}[0-9]*: ", text, re.MULTILINE), key
    for key, options in OPTIONS.items():
        lines = "\n".join(re.findall(rf"^{key}[0-9]*: (.*)$", text, re.MULTILINE))
        for option in options.split():
            assert re.search(rf"(^|,){option}=", lines, re.MULTILINE), f"{key}: {option}"


def read(text: str, **options: object) -> Converted:
    return from_pct(pct.read(text), **options)  # type: ignore[arg-type]


def notes_of(converted: Converted, key: str) -> list[tuple[str, str]]:
    return [(note.kind, note.permission) for note in converted.notes if note.key == key]


# What widens is asked for

WIDENING = """\
dev0: /dev/fuse
features: fuse=1
mp0: /srv/www,mp=/srv/www
lxc.init.cmd: /bin/evil
lxc.mount.entry: /etc etc none bind
lxc.mount.entry: /dev/sda dev/sda none bind,create=file
"""


def test_nothing_of_the_host_is_given_unless_it_is_allowed_by_name() -> None:
    converted = read(WIDENING)
    given = [name for name in converted.changes if not name.startswith("limits.")]
    assert given == []
    asked = {note.permission for note in converted.notes if note.kind == NEEDS_PERMISSION}
    assert asked == {"bind", "device", "raw", "feature"}
    assert not any(one.allowed for one in converted.host_paths)


@pytest.mark.parametrize(
    ("allow", "keys"),
    [
        ({"bind"}, {"mount.0"}),
        ({"device"}, {"device.0"}),
        ({"feature"}, {"device.0"}),
        ({"raw"}, {"init"}),
        ({"raw", "bind"}, {"init", "mount.0", "mount.1"}),
        ({"raw", "device"}, {"init", "device.0", "device.1"}),
        ({"hook", "firewall"}, set()),
    ],
)
def test_what_is_allowed_is_taken_and_nothing_else(allow: set, keys: set) -> None:
    converted = read(WIDENING, allow=allow)
    changed = {name for name in converted.changes if not name.startswith("limits.")}
    assert {".".join(name.split(".")[:2]) for name in changed} == keys


def test_what_sysctr_cannot_do_stays_out_even_if_it_is_allowed() -> None:
    text = "hookscript: local:snippets/x\nfeatures: keyctl=1\nmp0: /dev/sdb1,mp=/x\nlxc.cap.keep: all\n"
    converted = read(text, allow=PERMISSIONS, firewall="[OPTIONS]\nenable: 1\n")
    assert notes_of(converted, "hookscript") == [(DROPPED, "hook")]
    assert notes_of(converted, "features.keyctl") == [(DROPPED, "feature")]
    assert notes_of(converted, "mp0") == [(DROPPED, "device")]
    assert notes_of(converted, "lxc.cap.keep") == [(DROPPED, "")]
    assert notes_of(converted, "pct.fw") == [(DROPPED, "firewall")]
    assert notes_of(read(text, firewall=" \n"), "pct.fw") == []


def test_a_file_never_gets_the_files_of_the_hosts_root() -> None:
    for idmap in ("u:0:0:1", "g:5:0:1", "u:0:0:65536;g:0:0:65536", "passthrough"):
        converted = read(f"mp0: /srv,mp=/srv,idmap={idmap}", allow={"bind"})
        assert "mount.0.host_root" not in converted.changes
        mount = container_of(converted).mounts[0]
        assert mount.idmap in ("", "1-65535=1")
        assert not mount.suid
        assert not mount.dev


def test_permissions_are_named() -> None:
    assert pct_notes.parse_permissions(["bind, device", "raw"]) == {"bind", "device", "raw"}
    with pytest.raises(UsageError, match="cannot allow 'everything': choose of bind, device"):
        pct_notes.parse_permissions(["everything"])


# Cards

OWN = "net0: name=eth0,bridge=vmbr0,ip=10.0.3.7/24,gw=10.0.3.1"


def test_a_card_stays_on_a_bridge_that_is_here() -> None:
    net = container_of(read(OWN, bridges={"vmbr0"})).nets[0]
    assert (net.bridge, net.ip, net.gateway) == ("vmbr0", "10.0.3.7/24", "10.0.3.1")


def test_on_sysctrs_own_bridge_an_address_stays_only_where_it_can_be() -> None:
    net = container_of(read(OWN)).nets[0]
    assert (net.bridge, net.ip, net.gateway) == ("", "managed", "")
    net = container_of(read(OWN, managed_subnet="10.0.3.0/24")).nets[0]
    assert (net.bridge, net.ip, net.gateway) == ("", "10.0.3.7/24", "10.0.3.1")


def test_who_asks_by_dhcp_is_managed_here_or_asks_on() -> None:
    text = "net0: name=eth0,bridge=vmbr0,ip=dhcp"
    assert container_of(read(text)).nets[0].ip == "managed"
    assert container_of(read(text, bridges={"vmbr0"})).nets[0].ip == "manual"


@pytest.mark.parametrize(
    "line", ["mp{}: a:1,mp=/x", "net{}: name=e,bridge=b", "dev{}: /dev/a", "lxc.mount.entry: /a{} a n bind"]
)
def test_a_file_that_is_built_to_take_long_does_not(line: str) -> None:
    text = "".join(f"{line.format(number)}\n" for number in range(30_000))
    converted = read(text, allow=PERMISSIONS)
    # Each that is tried costs the check of the whole configuration.
    assert len(converted.changes) < 200
    assert len(converted.notes) > 1000


def test_more_cards_than_there_can_be_are_told() -> None:
    text = "".join(f"net{number}: name=e{number},bridge=b\n" for number in range(40))
    converted = read(text)
    assert len(container_of(converted).nets) == 32
    assert {note.key for note in converted.notes if note.kind == DROPPED} == {
        f"net{n}" for n in range(32, 40)
    }


@pytest.mark.parametrize(
    ("hostname", "name"),
    [
        ("web", "web"), ("Web-1", "web-1"), ("www.example.org", "www"), ("a_b", "a-b"), ("-a-", "a"),
        ("x" * 80, "x" * 63), ("101", "ct101"), ("1" * 80, "ct" + "1" * 61), ("\u00fcber", "ber"),
        ("...", ""), ("a" * 62 + "-b", "a" * 62), ("\udcff", ""),
    ],
)  # fmt: skip
def test_a_name_is_made_of_any_host_name(hostname: str, name: str) -> None:
    assert pct_convert.name_of(hostname) == name
    if name:
        assert parse_config({"name": name}).name == name


# Any document is converted

_VALUES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "1",
            "0",
            "-1",
            "9" * 30,
            "local:8,mp=/x",
            "/srv,mp=/x",
            "/dev/sda,mp=/x",
            "name=eth0,bridge=vmbr0",
            "name=eth0,ip=10.0.3.1/24,gw=10.0.3.1",
            "local:x,size=1P,mp=/",
            "a,b",
            "=,",
            "nesting=1,fuse=1",
            "\udcff",
            "/dev/fuse,mode=9",
            "path=/dev/../etc",
            "u:0:0:1",
            "local:x,mp=" + "/a" * 3000,
        ]
    ),
)
_SECTION = st.dictionaries(
    st.sampled_from(
        [key for key in KEYS if "." not in key] + ["net0", "net1", "mp0", "mp1", "mp255", "dev0", "odd"]
    ),
    _VALUES,
    max_size=6,
)
_RAW = st.lists(
    st.tuples(
        st.sampled_from(
            ["lxc.mount.entry", "lxc.environment", "lxc.init.cmd", "lxc.cgroup2.pids.max", "lxc.x"]
        ),
        _VALUES
        | st.sampled_from(["/a a none bind", "/dev/a dev/a none bind", "t t tmpfs size=1,mode=9", "\\777"]),
    ),
    max_size=4,
)


@settings(deadline=None)
@given(
    _SECTION, _RAW, st.lists(_VALUES, max_size=3), st.sets(st.sampled_from(PERMISSIONS)), st.text(max_size=8)
)
def test_whatever_a_file_says_becomes_settings_that_hold(
    values: dict, raw: list, environment: list, allow: set, description: str
) -> None:
    text = "".join(f"{key}: {value}\n" for key, value in values.items())
    text += "".join(f"{key}: {value}\n" for key, value in raw)
    text += "".join(f"lxc.environment.runtime: {item}\n" for item in environment)
    try:
        document = pct.read(text + f"#{description}")
    except ConfigError:
        return
    converted = from_pct(document, allow=allow, bridges={"vmbr0"}, managed_subnet="10.0.3.0/24")
    container = container_of(converted)
    assert (converted.name or "unnamed") == container.name
    if not allow:
        assert not container.devices
        assert all(mount.kind == "volume" for mount in container.mounts)
        assert container.init == "" or "entrypoint" in values
    # And the container can be told to Proxmox again.
    sizes = {mount.index: GIB for mount in container.mounts}
    to_pct(container, number=100, rootfs_size_bytes=GIB, volume_sizes=sizes)
    assert all(isinstance(note, Note) for note in converted.notes)


@pytest.mark.parametrize(
    "module", [pct_convert, pct_notes, pct_raw, pct_tables], ids=lambda module: module.__name__
)
def test_the_examples_hold(module) -> None:
    assert doctest.testmod(module).failed == 0


if __name__ == "__main__":
    for golden_conf in CONFS:
        known = golden_conf.with_suffix(".json")
        golden_options = json.loads(known.read_text())["options"] if known.exists() else {}
        made = convert(golden_conf, golden_options)
        golden_conf.with_suffix(".toml").write_text(toml.new_text(container_of(made)))
        known.write_text(as_json(made, golden_options))
