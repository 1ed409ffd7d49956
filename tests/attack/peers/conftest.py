"""A host, two peers of it that mean harm, and a container of somebody else."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import node as nodes
from tests.attack.peers.besieged import Sender, Victim
from tests.attack.peers.rogue import Rogue
from tests.node import Node, TemplateStore


@pytest.fixture(scope="module")
def hosts(templates: TemplateStore) -> Iterator[tuple[Node, Node]]:
    with nodes.two_nodes() as (left, right):
        templates.give(left, "tiny")
        yield left, right


@pytest.fixture(scope="module")
def rogue(hosts: tuple[Node, Node], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rogue]:
    one = Rogue(hosts[1], tmp_path_factory.mktemp("rogue"))
    one.join(hosts[0].run("peer", "token").out.strip())
    yield one
    one.close()


@pytest.fixture(scope="module")
def second(hosts: tuple[Node, Node], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rogue]:
    """Another peer, whose migrations are none of the first one's business."""
    one = Rogue(hosts[1], tmp_path_factory.mktemp("second"), "second", 8701)
    one.join(hosts[0].run("peer", "token").out.strip())
    yield one
    one.close()


@pytest.fixture(scope="module")
def neighbour(hosts: tuple[Node, Node]) -> dict:
    """A container of somebody else on the host that is attacked."""
    hosts[0].run("create", "neighbour", "--template", "tiny", "--start")
    return hosts[0].json("info", "neighbour")


@pytest.fixture
def victim(
    hosts: tuple[Node, Node], rogue: Rogue, neighbour: dict, request: pytest.FixtureRequest
) -> Iterator[Victim]:
    rogue.answers = {"migrate.outcome": {"outcome": "pending", "start": False}}
    one = Victim(hosts[0])
    yield one
    one.close()
    rogue.hang_up()
    rogue.answers = {"migrate.outcome": {"outcome": "aborted", "start": False}}
    one.unharmed()
    assert hosts[0].json("info", "neighbour")["pid"] == neighbour["pid"]
    assert one.slowest_s < 1.0, f"the daemon took {one.slowest_s:.2f} s to answer"


@pytest.fixture
def tree(hosts: tuple[Node, Node], tmp_path: Path) -> Sender:
    """The root of a container that could run."""
    layer = hosts[0].json("template", "show", "tiny")["layer"]
    sender = Sender(tmp_path)
    rootfs = f"{hosts[0].layout.pool}/layers/{layer}/rootfs"
    subprocess.run(["cp", "-a", f"{rootfs}/.", str(sender.tree)], check=True)
    return sender


@pytest.fixture
def given(victim: Victim) -> Iterator[str]:
    """The name of what is handed over, which is destroyed afterwards."""
    yield "gift"
    victim.node.run("destroy", "gift", "--force", "--yes", check=False)
