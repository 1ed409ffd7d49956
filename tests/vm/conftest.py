"""The virtual host that the tests in here share: built when the cache has none, booted once."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import facts
from tests.node import Node, TemplateStore
from tests.vm.image import PAYLOAD, Image, Missing, missing_facts, root_image
from tests.vm.machine import Machine

# quickstart, but for what a host without a network cannot do and the image has already: packages, the venv,
# a template. Its last line runs it all, and the units are found beside it.
INSTALL = f"""\
set -euo pipefail
mkdir -p /root/install
cp -r {PAYLOAD}/checkout/packaging {PAYLOAD}/checkout/sysctr /root/install
ln -s {PAYLOAD} /opt/sysctr
cd /root/install
sed -i '${{/^main /d}}' packaging/quickstart
set --
. packaging/quickstart
mkdir -p "$LIB" "$LOG"
LOGFILE=$LOG/quickstart.log NEW_VERSION=
: >"$LOGFILE"
trap 'cat "$LOGFILE"' EXIT
make_group_and_directories
raise_kernel_limits
install_launcher
start_services
"""


def install(vm: Machine) -> None:
    """Install sysctr, or what an uninstall took away of it."""
    vm.put("/root/install.sh", INSTALL.encode())
    vm.output(["bash", "/root/install.sh"], timeout_s=300)


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
def vm_port() -> int:
    """The port of this machine's loopback device that leads to the port of the virtual host for its peers."""
    return free_port()


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def vm(vm_image: Image, vm_port: int) -> Iterator[Machine]:
    """A virtual host with pure cgroup v2, systemd and AppArmor, as Debian ships them.

    Its network is down until a test wants it.
    """
    with Machine(vm_image, nics=[f"user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:{vm_port}-:8645"]) as one:
        yield one


@pytest.fixture(scope="session")
def template() -> str:
    """The template of the main path: debian-12, or tiny where no mirror can be reached."""
    for fact in ("mmdebstrap", "net"):
        if reason := facts.missing(fact):
            if fact in facts.required():
                pytest.fail(f"needs {fact}: {reason} (SYSCTR_REQUIRE forbids to skip)", pytrace=False)
            return "tiny"
    return "debian-12"


# What an installation leaves its traces in, one trace on each line. Of the files those that come and go by
# themselves are left out: systemd's, and the copies that the tools for groups make of what they change.
PICTURE = """\
find /etc /opt /usr/local /usr/share/bash-completion /run/sysctr* /var/lib /var/log -xdev 2>/dev/null \
    | grep -vE '^/var/lib/systemd/|-$'
sed 's/^/entry /' /etc/group /etc/subuid /etc/subgid
nft list tables
ls /sys/class/net | sed 's/^/link /'
find /sys/fs/cgroup -name '*sysctr*' ! -name 'sysctr-agent*' ! -name '*.mount'
systemctl list-unit-files --no-legend 'sysctr*' | grep -v ^sysctr-agent
grep sysctr /proc/mounts
pgrep -l 'sysctr|dnsmasq' | sed 's/^[0-9]* /process /'
cd /proc/sys
grep '' fs/inotify/max_user_instances fs/inotify/max_user_watches kernel/keys/maxkeys net/ipv4/ip_forward
"""


def picture(vm: Machine) -> set[str]:
    """Return all of what sysctr could leave on a virtual host, each trace as a line."""
    return set(vm.output(["sh", "-c", PICTURE]).splitlines())


@pytest.fixture(scope="session")
def untouched(vm: Machine) -> set[str]:
    """What picture saw before the installation."""
    return picture(vm)


@pytest.fixture(scope="session")
def installed(vm: Machine, untouched: set[str], templates: TemplateStore, template: str) -> Machine:
    """The virtual host with sysctr as quickstart installs it, its units running, and templates injected."""
    with Node() as node:
        templates.give(node, *{"tiny", template})
        vm.mount(Path(node.layout.pool), "/var/lib/sysctr/storage/default")
    install(vm)
    return vm
