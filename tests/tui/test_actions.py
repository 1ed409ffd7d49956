"""The one list of actions: complete against the API, without clashes, and guarded."""

import re
from collections import Counter

import pytest
from textual.binding import Binding

from sysctr.api.routes import ROUTES
from sysctr.config import schema
from sysctr.tui import columns, forms, settings, store
from sysctr.tui.actions import ACTIONS, BY_ID, NOT_HERE, Ask, Target
from sysctr.tui.pane import LIST_BINDINGS
from sysctr.tui.table import ModelTable
from tests.tui.fake import container

_TARGETS = [
    Target("here", container(101, state=state), "web-1", state)
    for state in ("running", "stopped", "frozen", "starting", "stopping")
]


def test_every_change_that_the_api_can_make_is_an_action() -> None:
    there = {f"{route.method} {route.path}" for route in ROUTES if route.method != "GET"}
    known = {route for action in ACTIONS for route in action.routes}
    assert there - known - NOT_HERE.keys() == set()
    assert known | NOT_HERE.keys() <= there


def test_ids_and_keys_are_used_once() -> None:
    assert len(BY_ID) == len(ACTIONS)
    keys = Counter((action.scope, key) for action in ACTIONS for key in action.key.split(",") if key)
    assert [key for key, count in keys.items() if count > 1] == []
    lists = {
        key for binding in (*LIST_BINDINGS, *ModelTable.BINDINGS) if isinstance(binding, Binding)
        for key in binding.key.split(",")
    } - {"enter"}  # fmt: skip
    assert [(scope, key) for scope, key in keys if key in lists] == []


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.id)
def test_an_action_is_whole(action) -> None:
    assert action.help
    assert action.help[0].islower()
    assert bool(action.flow) or action.request is not None
    # Nothing that is gone for good goes with one key.
    if action.key.startswith("d") and action.mutates:
        assert action.ask is not Ask.NOTHING
    if action.mutates:
        for target in (*_TARGETS, None):
            assert action.possible(target, read_only=True) == "read-only"


def test_examples_in_forms_are_values_of_the_configuration() -> None:
    forms_there = [value for value in vars(forms).values() if isinstance(value, forms.Form)]
    tried = 0
    for field in (one for form in forms_there for one in form.fields):
        key = {"nets": "net.0", "mount": "mount.0"}.get(field.key, field.key.removeprefix("set."))
        if not key.startswith(("limits.", "net.", "mount.")):
            continue
        # What is before a semicolon says what an empty field means.
        _, semicolon, examples = field.hint.rpartition("; ")
        for example in re.split(", | or ", examples) if semicolon or key == "mount.0" else ():
            schema.plain_changes({key: example})
            tried += 1
    assert tried > 8


@pytest.mark.parametrize("module", [columns, forms, settings, store], ids=lambda module: module.__name__)
def test_examples_hold(module) -> None:
    import doctest

    assert doctest.testmod(module).failed == 0
