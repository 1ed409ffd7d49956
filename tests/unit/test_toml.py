"""Configuration files as text: what is written is read back, changes keep comments, versions are minded."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sysctr.config import toml
from sysctr.config.schema import Container, parse_config, plain_changes
from sysctr.errors import ConfigError

ADMINS = """\
# my web server
schema = 1
name = "web"   # do not rename
tags = [
  "prod",  # billed
]

[net.0]
ip = "10.0.0.2/24"
# the router
gateway = "10.0.0.1"

[limits]
memory = "1G" # enough since March
"""

TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12)
LABEL = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)
VARIABLE = st.from_regex(r"[A-Z_][A-Z0-9_]{0,8}", fullmatch=True)
SIZE = st.integers(2**24, 2**40)
LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "memory": SIZE,
        "swap": st.integers(0, 2**40),
        "pids": st.integers(16, 9999),
        "cpu": st.integers(1, 9999).map(lambda n: n / 100),
        "cores": st.one_of(st.integers(1, 64), st.just("0-3,5"), st.just("7-7")),
    },
)
NIC = st.fixed_dictionaries(
    {},
    optional={"bridge": LABEL, "ip": st.sampled_from(["managed", "manual"]), "mtu": st.integers(576, 9000)},
)
MAPPINGS = st.fixed_dictionaries(
    {"name": LABEL},
    optional={
        "template": LABEL,
        "description": TEXT,
        "tags": st.lists(LABEL, max_size=3),
        "onboot": st.booleans(),
        "limits": LIMITS,
        "environment": st.dictionaries(VARIABLE, TEXT, max_size=3),
        "net": st.dictionaries(st.integers(0, 31).map(str), NIC, max_size=3),
        "dns": st.fixed_dictionaries({}, optional={"search": st.lists(LABEL, max_size=2)}),
    },
)
CONTAINERS = MAPPINGS.map(parse_config)

VALUES = {
    "description": TEXT.filter(bool),
    "onboot": st.booleans(),
    "tags": st.just(["a", "b"]),
    "limits.memory": st.just("3G"),
    "limits.pids": st.just(77),
    "environment.A": TEXT,
    "environment.B": TEXT,
    "net.0": st.none(),
    "net.0.bridge": LABEL,
    "net.1.ip": st.just("manual"),
    "net.7.mtu": st.just(1400),
    "dns.search": st.just(["x.y"]),
}
CHANGES = st.lists(st.sampled_from(sorted(VALUES)), unique=True, max_size=4).flatmap(
    lambda names: st.fixed_dictionaries({name: st.one_of(st.none(), VALUES[name]) for name in names})
)


def _refusal(function: Callable, *arguments: object) -> str:
    """Return the message of the ConfigError that a call ends with, else nothing; any other error passes."""
    try:
        function(*arguments)
    except ConfigError as error:
        return error.message
    return ""


def _apply(mapping: dict, changes: dict) -> dict:
    """Say plainly what an edit should come to."""
    for name, value in changes.items():
        *above, last = name.split(".")
        where = mapping
        for component in above:
            where = where.get(component, {}) if value is None else where.setdefault(component, {})
        if value is None:
            where.pop(last, None)
        else:
            where[last] = value
    return {name: value for name, value in mapping.items() if value != {}}


def _read(text: str) -> dict:
    return _apply(toml.read_container(text), {})


def _container(text: str) -> Container:
    return parse_config(toml.read_container(text))


@given(CONTAINERS)
def test_a_new_file_is_read_back(container: Container) -> None:
    assert _container(toml.new_text(container)) == container


def test_a_new_file_is_nice_to_read() -> None:
    container = parse_config(
        {"name": "demo", "template": "debian-12", "limits": {"memory": "512M"}, "net": {"0": {}}}
    )
    header, _, body = toml.new_text(container).partition("schema = 1\n")
    assert all(line.startswith("# ") for line in header.splitlines())
    assert body == (
        'name = "demo"\ntemplate = "debian-12"\n\n[limits]\nmemory = "512M"\n\n'
        '[net.0]\nname = "eth0"\nip = "managed"\n'
    )


@settings(deadline=None)
@given(CONTAINERS, CHANGES)
def test_a_change_changes_what_it_says_and_nothing_else(container: Container, changes: dict) -> None:
    text = toml.new_text(container)
    assert _read(toml.edit(text, changes)) == _apply(toml.read_container(text), changes)


@settings(deadline=None)
@given(CHANGES)
def test_a_change_keeps_an_admins_comments(changes: dict) -> None:
    edited = toml.edit(ADMINS, changes)
    assert _read(edited) == _apply(toml.read_container(ADMINS), changes)
    assert edited.startswith("# my web server\nschema = 1\n")
    assert "# do not rename" in edited
    assert "# the router" in edited or "net.0" in changes


def test_a_change_keeps_the_order_of_lines() -> None:
    changes = {"limits.memory": "2G", "net.1.ip": "manual", "onboot": True}
    edited = toml.edit(ADMINS, changes).splitlines()
    assert [line for line in edited if line in ADMINS.splitlines()] == [
        line for line in ADMINS.splitlines() if line != 'memory = "1G" # enough since March'
    ]
    assert 'memory = "2G" # enough since March' in edited
    assert toml.edit(ADMINS, {}) == ADMINS


def test_unsetting_what_is_not_there_changes_nothing() -> None:
    assert toml.edit(ADMINS, {"dns.search": None, "net.5": None, "onboot": None}) == ADMINS


@pytest.mark.parametrize(
    "text",
    [
        'schema = 1\nname = "a"\nlimits = { memory = "1G" }\nnet = { 0 = { ip = "manual" } }\n',
        'schema = 1\nname = "a"\nlimits.memory = "1G"\nnet.0.ip = "manual"\n',
        'schema = 1\nname = "a"\n[net]\n[net.0]\nip = "manual"\n[limits]\nmemory = "1G"\n[net.1]\n',
    ],
)
def test_tables_are_changed_however_they_are_written(text: str) -> None:
    changes = {"limits.memory": "2G", "net.0.mtu": 1400, "net.2.ip": "manual", "environment.A": "1"}
    edited = toml.edit(text, changes)
    assert _read(edited) == _apply(toml.read_container(text), changes)


def test_a_key_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"limits\.memory"):
        toml.edit('schema = 1\nname = "a"\nlimits = 3\n', {"limits.memory": "1G"})


@given(st.one_of(st.text(), st.text("[]{}=\"a1.\n#,'", max_size=60)))
def test_any_text_is_read_or_refused(text: str) -> None:
    for given_text in (text, f"schema = 1\n{text}"):
        for read in (toml.read_container, lambda known: toml.edit(known, {"onboot": True})):
            assert _refusal(read, given_text).isprintable()


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 5000, "schema = 1\nx = 0x" + "f" * 20000, "x" * 300_000, "schema = 1\nd = 1979-05-27\n"],
)
def test_what_is_built_to_break_a_reader_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _container(text)
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("", "without schema"),
        ("schema = 2", "a newer sysctr wrote it"),
        ("schema = 0", "expected a number"),
        ('schema = "1"', "expected a number"),
        ("schema = true", "expected a number"),
    ],
)
def test_a_file_says_its_schema(line: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        toml.read_container(f'{line}\nname = "a"\n')


def _rename_ram(mapping: dict) -> None:
    if "ram" in mapping:
        mapping["memory"] = mapping.pop("ram")


def _memory_in_limits(mapping: dict) -> None:
    mapping.setdefault("limits", {})["memory"] = mapping.pop("memory")


def test_an_older_file_is_migrated_step_by_step() -> None:
    steps = (_rename_ram, _memory_in_limits)
    migrated = {"name": "a", "limits": {"memory": "1G"}}
    assert toml.read_versioned('schema = 1\nname = "a"\nram = "1G"\n', 3, steps) == migrated
    assert toml.read_versioned('schema = 2\nname = "a"\nmemory = "1G"\n', 3, steps) == migrated
    with pytest.raises(ConfigError, match="newer"):
        toml.read_versioned("schema = 4\n", 3, steps)


def test_a_change_of_an_older_file_brings_it_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toml, "MIGRATIONS", (_rename_ram,))
    monkeypatch.setattr(toml.schema, "SCHEMA", 2)
    edited = toml.edit('schema = 1 # first\nname = "a" # mine\nram = "1G"\n', {"onboot": True})
    assert "# mine" in edited
    assert toml.read_container(edited) == {"name": "a", "memory": "1G", "onboot": True}


def test_changes_from_a_command_line_end_in_a_file_that_holds() -> None:
    changes = plain_changes({"limits.cores": "0-1", "net.0": "ip=10.0.0.9/24,gw=10.0.0.1", "tags": "b,a"})
    container = _container(toml.edit(ADMINS, changes))
    assert container.limits.cores == (0, 1)
    assert container.nets[0].ip == "10.0.0.9/24"
    assert container.tags == ("a", "b")
