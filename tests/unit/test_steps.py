"""Steps as values: every kind goes through JSON unchanged, compares by content, and says what it does."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.runtime import steps

KINDS = sorted((cls for cls in steps.Step.__subclasses__()), key=lambda cls: cls.__name__)
# What each field may hold, by its annotation.
VALUES = {
    "str": st.text(max_size=20), "int": st.integers(0, 2**31), "bool": st.booleans(),
    "list[str]": st.lists(st.text(max_size=8), max_size=3),
    "dict": st.dictionaries(st.text(max_size=5), st.none() | st.text(max_size=5), max_size=3),
}  # fmt: skip


def values_of(cls: type[steps.Step]) -> st.SearchStrategy[dict]:
    """Return a strategy of the fields of one kind."""
    named = {}
    for name, kind in cls.__annotations__.items():
        text = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
        named[name] = VALUES[str(kind) if "[" in str(kind) else text]
    return st.fixed_dictionaries(named)


@pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)
def test_a_step_goes_through_json_unchanged(cls: type[steps.Step]) -> None:
    @given(values_of(cls))
    def check(values: dict) -> None:
        step = cls(**values)
        sent = json.loads(json.dumps(steps.to_json(step)))
        back = steps.from_json(sent)
        assert type(back) is cls
        assert back == step
        assert steps.to_json(back) == steps.to_json(step)

    check()


@pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)
def test_a_step_says_what_it_does(cls: type[steps.Step]) -> None:
    fields = {name: "x" if name not in ("lower",) else ["x"] for name in cls.fields}
    described = cls(**fields).describe()
    assert described == described.strip() != ""


def test_fields_are_given_in_order_or_by_name_and_have_defaults() -> None:
    assert steps.Symlink("/dev/fd", "x") == steps.Symlink(points_to="x", target="/dev/fd")
    assert steps.File("/etc/x").mode == 0o644
    assert steps.Directory("/a") != steps.Directory("/b")
    assert steps.Directory("/a", 0o700) != steps.Directory("/a")


@pytest.mark.parametrize("wrong", [{}, {"target": "/a", "mod": 1}, {"target": "/a", "mode": 1, "x": 2}])
def test_fields_that_are_missing_or_unknown_are_an_error(wrong: dict) -> None:
    with pytest.raises(TypeError):
        steps.Directory(**wrong)
    with pytest.raises(TypeError):
        steps.Directory("/a", 0o700, "more")


def test_an_unknown_step_is_an_error() -> None:
    with pytest.raises(KeyError):
        steps.from_json({"do": "format-the-disk"})
    with pytest.raises(TypeError):
        steps.from_json({"do": "directory", "target": "/a", "colour": "red"})


def test_defaults_are_not_shared_by_what_changes_them() -> None:
    first = steps.Filesystem("tmpfs", "/a", {"size": "1m"})
    assert steps.Filesystem("tmpfs", "/b").options == {}
    assert first.options == {"size": "1m"}
