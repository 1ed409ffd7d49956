"""Containers that the tests of one module share: booting Debian is the slow part."""

from collections.abc import Iterator

import pytest

from tests.node import Node, TemplateStore
from tests.system.pools import KINDS, Kept, host_keeping


@pytest.fixture(scope="module")
def debian_host(pytestconfig: pytest.Config, templates: TemplateStore) -> Iterator[Node]:
    """A host with tiny and debian-12, and a booted debian-12 container `deb`."""
    with Node(keep=pytestconfig.getoption("keep")) as one:
        templates.give(one, "tiny", "debian-12")
        one.run("create", "deb", "--template", "debian-12", "--start")
        one.wait("deb", "booted")
        yield one


@pytest.fixture(scope="module")
def tiny(shared_host: Node) -> str:
    """A running tiny container of the module's host, which no test stops or changes for good."""
    shared_host.run("create", "shared", "--template", "tiny", "--start")
    return "shared"


@pytest.fixture(scope="module", params=KINDS)
def kept(
    request: pytest.FixtureRequest, templates: TemplateStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kept]:
    """A host for the tests of this module, once for each storage driver."""
    directory = tmp_path_factory.mktemp(request.param)
    keep = request.config.getoption("keep")
    with host_keeping(request.param, templates, directory, keep=keep) as one:
        yield one
        logs = one.host.logs()
        assert "Traceback" not in logs, logs
