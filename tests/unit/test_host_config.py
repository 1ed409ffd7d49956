"""The settings of a host: defaults, errors as good as a container's, and a file that documents itself."""

import doctest
from dataclasses import replace

import pytest
import tomli

from sysctr.config import backup, host, toml
from sysctr.errors import ConfigError


def test_no_file_gives_the_defaults() -> None:
    settings = host.parse_host({})
    assert settings.network.domain == "sysctr"
    assert settings.ids.count is None
    assert settings.defaults.pids == 4096
    assert (settings.backup.mode, settings.backup.compress) == ("snapshot", "zstd")
    assert not settings.backup.keep.says_anything
    assert settings.log.level == "info"


def test_all_settings_are_read() -> None:
    text = """
        schema = 1
        [network]
        bridge = "vmbr0"
        subnet = "10.9.0.0/24"
        domain = "Example.org"
        [ids]
        first = 2000000
        count = 655360
        [defaults]
        template = "debian-12"
        memory = "1G"
        cores = "0-1"
        [backup]
        directory = "/srv/backups"
        compress = "gzip"
        bwlimit = "50M"
        keep_last = 3
        keep_weekly = 4
        [peer]
        listen = "[::1]:8700"
        addresses = ["ct1.example.org", "192.0.2.1:8700"]
        [log]
        level = "debug"
    """
    settings = host.parse_host(toml.read_host(text))
    assert settings.network == host.NetworkSettings("vmbr0", "10.9.0.0/24", "example.org")
    assert settings.ids == host.IdSettings(2000000, 655360)
    assert host.creation_changes(settings) == {
        "template": "debian-12",
        "limits.cores": "0-1",
        "limits.memory": "1G",
        "limits.pids": 4096,
    }
    assert (settings.backup.directory, settings.backup.mode) == ("/srv/backups", "snapshot")
    assert (settings.backup.compress, settings.backup.bwlimit_bytes) == ("gzip", 50 << 20)
    assert settings.backup.keep.rules == {"last": 3, "weekly": 4}
    assert settings.peer == host.PeerSettings("[::1]:8700", ("ct1.example.org", "192.0.2.1:8700"))
    assert settings.log.level == "debug"


@pytest.mark.parametrize(
    ("mapping", "part"),
    [
        ({"netwrk": {}}, "the nearest is network"),
        ({"network": {"brige": "a"}}, "the nearest is network.bridge"),
        ({"network": {"subnet": "10.0.0.1/24"}}, "network.subnet: '10.0.0.1/24' is not"),
        ({"ids": {"count": 65537}}, "ids.count: 65537 is not a multiple of 65536"),
        ({"ids": {"first": 2**31 - 65536, "count": 131072}}, "ids.first"),
        ({"ids": {"first": 0}}, "ids.first"),
        ({"log": {"level": "loud"}}, "one of debug, info"),
        ({"peer": {"listen": "8645"}}, "peer.listen: '8645' is not off, or an address with its port"),
        ({"peer": {"listen": "ct1.example.org:8645"}}, "peer.listen: 'ct1.example.org' is not an IP"),
        ({"peer": {"listen": "[::]:0"}}, "peer.listen: '[::]:0' is not"),
        ({"peer": {"addresses": ["a b"]}}, "peer.addresses: 'a b' is not an address"),
        ({"backup": {"mode": "fast"}}, "backup.mode: 'fast' is not one of snapshot, suspend, stop"),
        ({"backup": {"mode": ""}}, "backup.mode: '' is not"),
        ({"backup": {"compress": "xz"}}, "backup.compress: 'xz' is not one of zstd, gzip, lzo, none"),
        ({"backup": {"directory": "nas"}}, "backup.directory: 'nas' is not an absolute path"),
        ({"backup": {"keep_last": -1}}, "backup.keep_last: -1 is not a whole number from 0"),
        ({"backup": {"keep-last": 1}}, "the nearest is backup.keep_last"),
        ({"backup": {"bwlimit": 50}}, "backup.bwlimit: 50 is not 0 or a rate of 64K or more"),
        ({"defaults": {"memory": "lots"}}, "defaults.memory: 'lots' is not a size"),
        ({"xyzzy": 1}, "cannot accept xyzzy: no such key"),
        ({"net": {"0": {}}}, "cannot accept net"),
    ],
)
def test_a_wrong_setting_is_named(mapping: dict, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        host.parse_host(mapping)
    assert part in caught.value.message


def test_a_newer_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="newer"):
        toml.read_host("schema = 2\n")


def test_the_file_that_shows_all_keys_changes_none() -> None:
    text = host.new_text()
    assert host.parse_host(toml.read_host(text)) == host.parse_host({})
    assert all(f"# {key.name.rpartition('.')[2]} = " in text for key in host.KEYS)
    # With the examples that are defaults in force, nothing changes either.
    shown = [
        line[2:] if line.startswith("# ") and line[2:].split(" ")[0] in ("domain", "pids", "level") else line
        for line in text.splitlines()
    ]
    mapping = tomli.loads("\n".join(shown))
    assert mapping.pop("schema") == host.SCHEMA
    assert mapping["defaults"] == {"pids": 4096}
    assert host.parse_host(mapping) == host.parse_host({})


def test_what_a_job_says_goes_before_what_the_host_says_and_rules_go_together() -> None:
    ours = host.parse_host({"backup": {"keep_last": 3, "keep_daily": 7, "bwlimit": "1M"}}).backup
    nothing = backup.BackupSettings("", "", "", None, *[None] * 6)
    assert backup.in_force(nothing, ours) == ours
    own = replace(nothing, directory="/nas", mode="stop", bwlimit_bytes=0, keep_weekly=2)
    merged = backup.in_force(own, ours)
    assert (merged.directory, merged.mode, merged.compress) == ("/nas", "stop", "zstd")
    assert merged.bwlimit_bytes == 0
    assert merged.keep.rules == {"weekly": 2}
    # A rule of nothing is what keeps all.
    assert backup.in_force(replace(nothing, keep_last=0), ours).keep.rules == {}


@pytest.mark.parametrize("module", [host, backup])
def test_the_examples_hold(module) -> None:
    assert doctest.testmod(module).failed == 0
