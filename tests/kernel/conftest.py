"""Hosts of which only a part is there: the supervisor for what needs jobs, or a network namespace."""

import os
from collections.abc import Iterator

import pytest

from sysctr.cgroup.detect import open_driver
from sysctr.engine import removal
from sysctr.engine.job import JobRunner
from sysctr.engine.plan import Idmap
from sysctr.engine.supervisor import SupervisorClient
from sysctr.network.network import Network
from sysctr.paths import Layout
from tests import leaks
from tests.netns import Host, hosted
from tests.wait import wait_until

# Far above every range that a tool registers.
JOB_IDMAP = Idmap(1_900_000_000, 65536)


@pytest.fixture
def layout(tmp_path) -> Layout:
    """The paths of a host of this test's own."""
    leaks.register(str(tmp_path))
    return Layout(str(tmp_path))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobRunner]:
    """A runner of jobs under a supervisor of the module's own, which is gone afterwards."""
    root = str(tmp_path_factory.mktemp("supervisor"))
    leaks.register(root)
    where = Layout(root)
    os.makedirs(f"{where.run}/stage")
    supervisor = SupervisorClient(where)
    supervisor.ensure()
    yield JobRunner(supervisor, f"{where.run}/stage", JOB_IDMAP, b"", open_driver(where).job_plan)
    supervisor.quit()
    wait_until(lambda: not removal.service_pids(where), what="the end of the supervisor")
    removal.remove_cgroups(where)


@pytest.fixture
def host() -> Iterator[Host]:
    """A host that has nothing but a network."""
    with hosted() as host:
        yield host


@pytest.fixture
def network(host: Host) -> Network:
    """The network of that host, set up."""
    network = host.network(subnet="10.9.8.0/24")
    network.ensure()
    return network
