"""Recipes are read strictly: a wrong one is refused with the key that is wrong, never half understood."""

import contextlib
import unittest.mock

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from sysctr.errors import ConfigError, NotFound, SysctrError, UsageError
from sysctr.template import recipe

MINIMAL = """
schema = 1
name = "mine"
version = "1"
[bootstrap]
tool = "mmdebstrap"
keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
packages = ["systemd-sysv", "less"]
[bootstrap.sources]
bookworm = "http://mirror.example/debian"
"""


def with_line(line: str, before: str = "[bootstrap]") -> str:
    return MINIMAL.replace(before, f"{line}\n{before}")


@pytest.mark.parametrize("name", recipe.shipped())
def test_a_shipped_recipe_is_named_like_its_file_and_says_what_it_is(name: str) -> None:
    loaded = recipe.load(name)
    assert loaded.name == name
    assert loaded.description
    assert all(step.script.strip() for step in loaded.run)


def test_both_templates_of_quickstart_are_shipped() -> None:
    assert {"debian-12", "tiny"} <= set(recipe.shipped())
    assert recipe.load("debian-12").stop_signal == "SIGRTMIN+3"


def test_an_unknown_recipe_names_the_nearest_one() -> None:
    with pytest.raises(NotFound) as caught:
        recipe.load("debian12")
    assert "debian-12" in caught.value.hint


def test_a_recipe_is_found_by_its_path(tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL)
    assert recipe.load(str(path)).bootstrap.packages == ("systemd-sysv", "less")
    with pytest.raises(NotFound):
        recipe.load(str(tmp_path / "gone.toml"))
    with pytest.raises(SysctrError):
        recipe.load(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        (with_line('descripton = "x"'), "descripton", "description"),
        (MINIMAL.replace("packages", "pakages"), "bootstrap.pakages", "packages"),
        (MINIMAL + '[[files]]\npath = "/a"\nmod = "0644"\n', "files[0].mod", "mode"),
        (MINIMAL + '[[run]]\nname = "a"\nscript = "b"\nshell = "c"\n', "run[0].shell", "name, script"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(text: str, key: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe.parse(text)
    assert caught.value.message.startswith(f"{key}: unknown key")
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (MINIMAL.replace("schema = 1", ""), "schema"),
        (MINIMAL.replace("schema = 1", "schema = true"), "schema"),
        (MINIMAL.replace('name = "mine"', 'name = "../mine"'), "mine"),
        (MINIMAL.replace('name = "mine"', "name = 3"), "name"),
        (MINIMAL.replace('version = "1"', ""), "version"),
        (MINIMAL.replace('"less"', '"--option"'), "bootstrap.packages"),
        (MINIMAL.replace('"less"', '"a,b"'), "bootstrap.packages"),
        (MINIMAL.replace("http://mirror.example/debian", "file:///srv"), "bootstrap.sources.bookworm"),
        (MINIMAL.replace("http://mirror.example/debian", "http://a b"), "bootstrap.sources.bookworm"),
        (MINIMAL.replace('tool = "mmdebstrap"', 'tool = "curl"'), "bootstrap.tool"),
        (MINIMAL.replace('bookworm = "http', '"--x" = "http'), "bootstrap.sources.--x"),
        (MINIMAL + '[[files]]\npath = "/etc/../../x"\n', "files[0].path"),
        (MINIMAL + '[[files]]\npath = "etc/x"\n', "files[0].path"),
        (MINIMAL + '[[files]]\npath = "/x"\nmode = "644"\n', "files[0].mode"),
        (MINIMAL + '[[files]]\npath = "/x"\ncontent = "a"\nlink = "b"\n', "files[0].link"),
        (MINIMAL + '[run]\nname = "a"\n', "run"),
        (with_line('stop_signal = "INT; reboot"'), "stop_signal"),
        (with_line("labels = 3"), "labels"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_key(text: str, key: str) -> None:
    with pytest.raises(SysctrError) as caught:
        recipe.parse(text)
    assert key in caught.value.message
    assert caught.value.exit_code == 2


def test_a_newer_schema_says_to_upgrade() -> None:
    with pytest.raises(ConfigError) as caught:
        recipe.parse(MINIMAL.replace("schema = 1", "schema = 2"))
    assert "upgrade" in caught.value.hint


def test_changes_replace_values_and_give_another_digest() -> None:
    plain = recipe.parse(MINIMAL)
    changed = recipe.parse(MINIMAL, {"bootstrap.packages": "nginx,curl", "version": "2"})
    assert changed.bootstrap.packages == ("nginx", "curl")
    assert changed.version == "2"
    assert changed.digest != plain.digest
    assert plain.digest == recipe.parse(MINIMAL).digest


def test_a_change_of_what_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bootstrp\.packages"):
        recipe.parse(MINIMAL, {"bootstrp.packages": "x"})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.text(max_size=200))
def test_no_text_makes_the_reader_fail_otherwise_than_by_refusing(text: str) -> None:
    with contextlib.suppress(UsageError):
        recipe.parse(text)


@given(st.sampled_from(["name", "version", "init", "bootstrap", "files", "run", "labels", "schema"]), VALUES)
def test_no_value_makes_the_reader_fail_otherwise_than_by_refusing(key: str, value: object) -> None:
    data = {**tomli.loads(MINIMAL), key: value}
    with unittest.mock.patch.object(tomli, "loads", return_value=data), contextlib.suppress(UsageError):
        recipe.parse("")
