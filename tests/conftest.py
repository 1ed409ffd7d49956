"""What all tests share: options, the facts of this machine, hosts to try things on, and the final sweep."""

import contextlib
import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest
from hypothesis import HealthCheck, settings

from tests import facts, leaks, node
from tests.node import Node, TemplateStore
from tests.wait import wait_until

_PARTS = ("lint", "unit", "tui", "kernel", "attack", "system", "vm")
_INOTIFY = "/proc/sys/fs/inotify/max_user_instances"
_ENOUGH_INOTIFY = 8192
# A marker that implies facts, so that `@pytest.mark.root` alone skips where there is no root.
_IMPLIED = {"root": ("root",), "kernel": ("root",), "vm": ("vm",), "net": ("net",)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep", action="store_true", help="keep the directories of the hosts that tests made")
    parser.addoption(
        "--in-parts", action="store_true", help="lint, unit, kernel, …: stop after a part that is red"
    )


# A machine that is busy with something else makes no test wrong. And what decides whether a change may land
# tries the same examples each time; everybody else goes on looking for new ones.
hypothesis.settings.register_profile("sysctr", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("sysctr")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*facts): facts of this machine, see tests/facts.py")
    # How long an example takes is that of a busy machine here, and no property of the code.
    settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("here")
    leaks.start_session()
    config.stash[_BEFORE] = leaks.picture()


def pytest_report_header() -> list[str]:
    return facts.header()


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = {fact: None for mark in item.iter_markers("needs") for fact in mark.args}
    for name, implied in _IMPLIED.items():
        if item.get_closest_marker(name):
            wanted.update(dict.fromkeys(implied))
    for fact in wanted:
        reason = facts.missing(fact)
        if reason and fact in facts.required():
            pytest.fail(f"needs {fact}: {reason} (SYSCTR_REQUIRE forbids to skip)", pytrace=False)
        if reason:
            pytest.skip(f"needs {fact}: {reason}")


def _part(item: pytest.Item) -> str:
    if item.path.name == "test_linters.py":
        return "lint"
    return item.path.relative_to(item.config.rootpath / "tests").parts[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("in_parts"):
        items.sort(key=lambda item: _PARTS.index(_part(item)) if _part(item) in _PARTS else len(_PARTS))


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or not item.config.getoption("in_parts") or _part(item) == _part(nextitem):
        return
    if item.session.testsfailed:
        item.session.shouldfail = f"part {_part(item)} is red, the parts after it were not tried"


def pytest_unconfigure(config: pytest.Config) -> None:
    """End with one plain line that a machine can read."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not config.getoption("in_parts"):
        return
    count = {name: len(reporter.stats.get(name, [])) for name in ("passed", "failed", "error", "skipped")}
    failed = count["failed"] + count["error"]
    reporter.write_line(f"{count['passed']} passed, {failed} failed, {count['skipped']} skipped")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session if it left a trace; the kernel deletes links and cgroups a moment later than asked."""
    base = getattr(session.config, "_tmp_path_factory", None)
    if base is not None:
        leaks.register_directory(str(base.getbasetemp()))
    before = session.config.stash[_BEFORE]
    alone = bool(facts.required())
    left: list[str] = []

    def clean() -> bool:
        left[:] = leaks.left_behind(before, leaks.picture(), alone=alone)
        return not left

    try:
        wait_until(clean, 5)
    except AssertionError:
        _report(session, left)


def _report(session: pytest.Session, left: list[str]) -> None:
    session.exitstatus = pytest.ExitCode.TESTS_FAILED
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        text = "this session left behind:\n" + "\n".join(f"  {line}" for line in left)
        # As an error, so that the line pytest ends with counts it.
        report = pytest.CollectReport("leak sweep", "failed", text, None)
        reporter.stats.setdefault("error", []).append(report)


_BEFORE: pytest.StashKey[frozenset[str]] = pytest.StashKey()


@pytest.fixture(scope="session")
def templates(pytestconfig: pytest.Config) -> Iterator[TemplateStore]:
    """The templates of this session: each is built when a test first asks for it."""
    with _room_for_systemds(), Node(keep=pytestconfig.getoption("keep")) as builder:
        yield TemplateStore(builder)


@contextlib.contextmanager
def _room_for_systemds() -> Iterator[None]:
    """Raise the number of inotify instances, which all containers of the machine share, and put it back."""
    with open(_INOTIFY, encoding="ascii") as file:
        before = int(file.read())
    if os.geteuid() != 0 or before >= _ENOUGH_INOTIFY:
        yield
        return
    _write(_INOTIFY, _ENOUGH_INOTIFY)
    try:
        yield
    finally:
        _write(_INOTIFY, before)


def _write(path: str, number: int) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(str(number))


@pytest.fixture
def make_node(pytestconfig: pytest.Config, templates: TemplateStore) -> Iterator[Callable[..., Node]]:
    """A function that makes hosts: make_node("tiny", "debian-12", own_network=True)."""
    made: list[Node] = []

    def make(*names: str, own_network: bool = False) -> Node:
        host = Node(own_network=own_network, keep=pytestconfig.getoption("keep"))
        made.append(host)
        templates.give(host, *names)
        return host

    yield make
    _close(made)


@pytest.fixture
def host(make_node: Callable[..., Node]) -> Node:
    """A fresh host with the tiny template."""
    return make_node("tiny")


@pytest.fixture(scope="module")
def shared_host(pytestconfig: pytest.Config, templates: TemplateStore) -> Iterator[Node]:
    """A host that the tests of one module share, with the tiny template; names and ids must be fresh."""
    with Node(keep=pytestconfig.getoption("keep")) as one:
        templates.give(one, "tiny")
        yield one


@pytest.fixture
def two_nodes(pytestconfig: pytest.Config, templates: TemplateStore) -> Iterator[tuple[Node, Node]]:
    """Two hosts with their own networks, joined by a cable: 192.0.2.1 and 192.0.2.2; both have tiny."""
    with node.two_nodes(keep=pytestconfig.getoption("keep")) as (left, right):
        templates.give(left, "tiny")
        templates.give(right, "tiny")
        yield left, right


def _close(nodes: list[Node]) -> None:
    """Close every one, whatever the first does, and then say what went wrong."""
    problems = []
    for one in nodes:
        try:
            one.close()
        except (AssertionError, OSError) as error:
            problems.append(str(error))
    assert not problems, "\n".join(problems)
