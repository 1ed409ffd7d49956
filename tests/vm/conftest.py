"""The virtual host that the tests in here share: built when the cache has none, booted once."""

from collections.abc import Iterator

import pytest

from tests import facts
from tests.vm.image import Image, Missing, missing_facts, root_image
from tests.vm.machine import Machine


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = config.rootpath / "tests/vm"
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def vm_image() -> Image:
    """The root image of a virtual host; without one the tests are skipped, unless SYSCTR_REQUIRE names vm."""
    try:
        if missing := missing_facts():
            raise Missing(", ".join(missing))
        return root_image()
    except Missing as fact:
        if "vm" in facts.required():
            pytest.fail(f"needs vm: {fact} (SYSCTR_REQUIRE forbids to skip)", pytrace=False)
        pytest.skip(f"needs vm: {fact}")


@pytest.fixture(scope="session")
def vm(vm_image: Image) -> Iterator[Machine]:
    """A virtual host with pure cgroup v2, systemd and AppArmor, as Debian ships them."""
    with Machine(vm_image) as machine:
        yield machine
