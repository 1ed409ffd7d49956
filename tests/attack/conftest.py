"""Hosts and containers that the attacks are tried on."""

from collections.abc import Iterator

import pytest

from tests.attack.hostile import Scene
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


@pytest.fixture(scope="module")
def scene(shared_host: Node, victim: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A host with a running container of somebody else, and files beside that nobody may touch."""
    one = Scene(shared_host, tmp_path_factory.mktemp("hostile"), victim)
    yield one
    one.unharmed()
    logs = shared_host.logs()
    assert "Traceback" not in logs, logs
    _, answer = shared_host.api("GET", "/1/doctor")
    left = [check for check in answer["checks"] if check["check"] in ("leftovers", "mounts", "containers")]
    assert [check["detail"] for check in left if check["state"] != "ok"] == []
