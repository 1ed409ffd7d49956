"""Those kernel tests that pure cgroup v2, Debian's kernel or AppArmor could fail, run in a virtual host."""

from tests.vm.image import PAYLOAD
from tests.vm.machine import Machine

# The guest certainly has these: a kernel test that is skipped for want of one is a failure.
GUEST_FACTS = "root userns idmap overlay veth nft dnsmasq ip busybox lxcfs"
# Imports, say, are decompression and Python: slow here and the same on every kernel. Of the network, where
# each test makes a host of its own, those that need link, address, filter, names and DHCP at once.
CHOSEN = (
    "test_cgroup.py",
    "test_seccomp.py",
    "test_network.py::test_a_container_reaches_the_world_under_the_address_of_its_host",
    "test_network.py::test_dhcp_gives_what_the_allocator_holds",
    "test_nat.py::test_docker_on_the_host_does_not_cut_containers_off",
)


def test_the_kernel_tests_pass_in_the_guest(vm: Machine) -> None:
    result = vm.run(
        [f"{PAYLOAD}/venv/bin/python3", "-m", "pytest", "-q", "-rs", "--durations=10",
         "--basetemp=/var/tmp/pytest", *(f"tests/kernel/{name}" for name in CHOSEN)],
        cwd=f"{PAYLOAD}/checkout",
        env={"SYSCTR_REQUIRE": GUEST_FACTS, "PYTHONDONTWRITEBYTECODE": "1"},
        timeout_s=600,
    )  # fmt: skip
    print(result.stdout)
    assert result.status == 0, result.stdout + result.stderr
