"""What others wrote, files of guests and records, is read or refused with the parser's own error."""

import contextlib
import doctest
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sysctr.engine.record import parse_record
from sysctr.errors import ConfigError, SysctrError
from sysctr.paths import Layout
from sysctr.runtime import accounts
from sysctr.template import rootfs_check
from sysctr.template.base import Source, Template, template_from_dict
from sysctr.template.registry import Registry

# A fixture's directory is written anew by each example.
_SHARED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

_LINES = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.lists(
            st.sampled_from(
                ["root", "www", "0", "33", "-1", "9" * 30, "\u00b2", "x", "", "/", "a,root,", "\f", "\u2028"]
            ),
            max_size=9,
        ).map(lambda fields: ":".join(fields).encode()),
    ),
    max_size=6,
).map(b"\n".join)
_NAMES = st.one_of(
    st.text(max_size=8), st.sampled_from(["root", "33", "\u00b2", "9" * 30, "www:33", ":", "0:", "a:\u0663"])
)


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The /etc of a guest, as its accounts are read."""
    monkeypatch.setattr(accounts, "_PASSWD", f"{tmp_path}/passwd")
    monkeypatch.setattr(accounts, "_GROUP", f"{tmp_path}/group")
    return tmp_path


@_SHARED
@given(passwd=_LINES, group=_LINES, name=_NAMES)
def test_any_accounts_of_a_guest_are_read_or_refused(
    guest: Path, passwd: bytes, group: bytes, name: str
) -> None:
    (guest / "passwd").write_bytes(passwd)
    (guest / "group").write_bytes(group)
    with contextlib.suppress(LookupError):
        found = accounts.find_user(name)
        assert all(0 <= number < 2**32 for number in (found["uid"], found["gid"], *found["groups"]))
        assert "\n" not in found["home"] + found["shell"]
    with contextlib.suppress(LookupError):
        assert 0 <= accounts.find_group(name) < 2**32


def test_a_user_is_what_the_guests_files_say(guest: Path) -> None:
    (guest / "passwd").write_text("broken\nroot:x:0:0::/root:/bin/sh\nwww:x:33:34:W\f:/srv:\n")
    (guest / "group").write_text("www:x:34:\ntty:x:5:root,www\nbad:x:y:www\n")
    found = accounts.find_user("www")
    assert (found["uid"], found["gid"], found["groups"]) == (33, 34, [5])
    assert (found["home"], found["shell"]) == ("/srv", "/bin/sh")
    assert accounts.find_user("33")["uid"] == 33
    assert accounts.find_user("77:tty")["gid"] == 5
    for stranger in ("nobody", "\u00b2", "9" * 10, "www:nowhere"):
        with pytest.raises(LookupError):
            accounts.find_user(stranger)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.tuples(
                st.sampled_from([b"ID", b"NAME", b"id", b"A B"]),
                st.sampled_from([b"=", b"==", b""]),
                st.binary(max_size=20),
            ).map(b"".join)
        ).map(b"\n".join),
    )
)
def test_any_os_release_is_read(data: bytes) -> None:
    for key, value in rootfs_check.parse_os_release(data).items():
        assert key.isupper()
        assert value.isprintable()
        assert len(value) <= 256


_TREE = st.recursive(
    st.one_of(st.text(max_size=6), st.integers(), st.booleans(), st.floats(), st.none()),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "name", "digest"]), inner)
    ),
    max_leaves=6,
)
_TEMPLATE = Template(
    name="tiny", layer="tiny", version="1", os_id="busybox", os_version="", os_name="", arch="amd64",
    created=1, source=Source("recipe", "tiny", "sha256:0"), size_bytes=1, init="/sbin/init",
    init_kind="busybox",
    stop_signal="SIGUSR2", description="", labels={"a": "b"}, packages=None,
).as_dict()  # fmt: skip
_RECORD = {
    "schema": 1, "id": 101, "uuid": "u", "name": "demo", "created": 1.0, "idmap_first": 1000,
    "idmap_count": 65536, "generation": 1, "template": "tiny", "volume": "101", "boot_config": "",
    "addresses": [], "exit": None,
}  # fmt: skip


def changed(record: dict) -> st.SearchStrategy[dict]:
    """Return records of which some fields are anything, or missing."""
    anything = st.dictionaries(st.sampled_from(sorted(record)), _TREE, max_size=3)
    missing = st.sets(st.sampled_from(sorted(record)), max_size=1)
    return st.tuples(anything, missing).map(
        lambda drawn: {k: v for k, v in (record | drawn[0]).items() if k not in drawn[1]}
    )


@settings(deadline=None)
@given(st.one_of(changed(_TEMPLATE), _TREE))
def test_any_record_of_a_template_is_read_or_refused(data) -> None:
    try:
        template = template_from_dict(data)
    except (ValueError, SysctrError):
        return
    # What was taken can be worked with, and is the same when it is written again.
    assert template_from_dict(template.as_dict()) == template
    assert template.name + template.layer + template.source.name is not None


_HUGE = {"nested": b"[" * 50_000, "digits": b'{"schema":' + b"1" * 5000 + b"}"}


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"NaN", b"\xff", *_HUGE.values()], ids=lambda data: str(data[:4])
)
def test_a_damaged_template_does_not_hide_the_others(tmp_path: Path, data: bytes) -> None:
    layout = Layout(str(tmp_path))
    layer = Path(layout.pool, "layers", "bad")
    layer.mkdir(parents=True, exist_ok=True)
    (layer / "template.json").write_bytes(data)
    registry = Registry(layout)
    assert registry.list() == []
    with pytest.raises(SysctrError, match="cannot use template bad: "):
        registry.get("bad")


@pytest.mark.parametrize("data", _HUGE.values(), ids=_HUGE)
def test_a_record_that_would_break_the_parser_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError):
        parse_record(101, data)


@settings(deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.sampled_from([b"1", b"NaN", b"\xff"]),
        changed(_RECORD).map(lambda record: json.dumps(record).encode()),
        _TREE.map(lambda tree: json.dumps(tree).encode()),
    )
)
def test_any_record_of_a_container_is_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        saved = parse_record(101, data)
        assert saved.id == 101
        assert saved.idmap_first > 0


def test_the_examples_of_os_release_hold() -> None:
    assert doctest.testmod(rootfs_check).failed == 0
