"""Hosts and containers that the attacks are tried on."""

from collections.abc import Iterator

import pytest

from tests.attack.inside import init_pid
from tests.node import Node


@pytest.fixture(scope="module")
def victim(shared_host: Node) -> Iterator[str]:
    """A running container of another tenant on the same host, which has to go on undisturbed."""
    shared_host.run("create", "victim", "--template", "tiny", "--start")
    init = init_pid(shared_host, "victim")
    yield "victim"
    assert init_pid(shared_host, "victim") == init


@pytest.fixture(scope="module")
def evil(shared_host: Node) -> str:
    """A running container whose root is the attacker; no test may stop it."""
    shared_host.run("create", "evil", "--template", "tiny", "--start")
    return "evil"
