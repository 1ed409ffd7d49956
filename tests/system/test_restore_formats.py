"""Archives that others wrote become containers that boot: every layout, every compression."""

import itertools
import subprocess

import pytest

from tests import rootfs
from tests.node import Node
from tests.system.guests import inside, refused

pytestmark = pytest.mark.root

_numbers = itertools.count(1)
PREFIXES = {"dot": "", "plain": "plain", "rootfs": "rootfs/", "dot rootfs": "./rootfs/"}


@pytest.fixture(scope="module")
def busybox() -> str:
    path = rootfs.static_busybox()
    if path is None:
        pytest.skip("needs busybox: no static one (package busybox-static)")
    return path


def boots(host: Node, name: str) -> None:
    """See that a container starts and runs programs, and let it end."""
    host.run("start", name)
    assert inside(host, name, "id -u; hostname") == f"0\n{name}"
    host.run("stop", name, "--kill")


@pytest.mark.parametrize("layout", PREFIXES)
def test_a_plain_rootfs_is_restored_from_where_it_is(shared_host, tmp_path, busybox, layout) -> None:
    path = rootfs.write_tarball(str(tmp_path / "a.tar"), busybox, prefix=PREFIXES[layout])
    name = f"plain-{next(_numbers)}"
    assert "can be restored" in shared_host.run("backup", "verify", path).out
    shared_host.run("restore", path, "--name", name)
    boots(shared_host, name)


@pytest.mark.parametrize("order", [("metadata.yaml", "rootfs", "templates"), ("rootfs", "metadata.yaml")])
def test_an_image_of_lxc_gives_its_rootfs_alone(shared_host, tmp_path, busybox, order) -> None:
    source = tmp_path / "source"
    (source / "templates").mkdir(parents=True)
    (source / "templates/hostname.tpl").write_text("{{ container.name }}\n")
    (source / "metadata.yaml").write_text("architecture: x86_64\ncreation_date: 1\n")
    (source / "rootfs").mkdir()
    rootfs.write_tree(str(source / "rootfs"), busybox)
    # What is a hard link, a link, and a directory of that name again inside.
    (source / "rootfs/rootfs").mkdir()
    (source / "rootfs/rootfs/one").write_text("1")
    (source / "rootfs/rootfs/two").hardlink_to(source / "rootfs/rootfs/one")
    (source / "rootfs/rootfs/link").symlink_to("/rootfs/one")
    (source / "rootfs/near").symlink_to("rootfs/one")
    (source / "rootfs").chmod(0o751)
    path = str(tmp_path / "image.tar.gz")
    subprocess.run(["tar", "-C", str(source), "-czf", path, *order], check=True)
    name = f"image-{next(_numbers)}"
    shared_host.run("restore", path, "--name", name, "--start")
    script = "cat /rootfs/link; readlink /near; stat -c ' %a' /; stat -c %h /rootfs/two"
    others = "ls -d /metadata.yaml /templates 2>/dev/null || :"
    assert inside(shared_host, name, f"{script}; {others}").split() == ["1rootfs/one", "751", "2"]
    shared_host.run("stop", name, "--kill")


def test_a_rootfs_that_is_a_symlink_is_not_followed(shared_host, tmp_path) -> None:
    (tmp_path / "rootfs").symlink_to("/")
    (tmp_path / "metadata.yaml").write_text("{}")
    path = str(tmp_path / "a.tar")
    subprocess.run(["tar", "-C", str(tmp_path), "-cf", path, "metadata.yaml", "rootfs"], check=True)
    refused(shared_host, 1, "no /sbin/init", "restore", "-q", path, "--name", f"link-{next(_numbers)}")
