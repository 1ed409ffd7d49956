"""Disk limits on every storage driver: seen inside, kept at the last byte, and raised while it runs."""

from collections.abc import Iterator

import pytest

from tests.node import TemplateStore
from tests.system.guests import inside, refused, shell
from tests.system.pools import Kept, host_keeping

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "loop")]

_MIB = 2**20
_CAP_SYS_RESOURCE = 24
# Its quota is no size of the file system, which df shows; and at it the error is that of a quota.
_SIZE_UNSEEN = ("btrfs",)


@pytest.fixture(scope="module", params=["overlay", "btrfs", "loop"])
def kept(
    request: pytest.FixtureRequest,
    pytestconfig: pytest.Config,
    templates: TemplateStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Kept]:
    """A host whose containers are kept by one of the drivers."""
    directory = tmp_path_factory.mktemp(request.param)
    with host_keeping(request.param, templates, directory, keep=pytestconfig.getoption("keep")) as one:
        yield one


def limited(kept: Kept, size: str, *, start: bool = True) -> str:
    return kept.create("--disk", size, start=start)


def fill(kept: Kept, name: str, file: str, mib: int) -> tuple[int, int]:
    """Write so many MiB inside; return the status and how many arrived."""
    script = f"dd if=/dev/zero of={file} bs=1M count={mib}; status=$?; sync; exit $status"
    done = shell(kept.host, name, script, check=False)
    if done.status:
        assert "No space left on device" in done.err or "Disk quota exceeded" in done.err
        assert kept.kind in _SIZE_UNSEEN or "No space left" in done.err
    return done.status, taken_mib(kept, name, file)


def taken_mib(kept: Kept, name: str, file: str) -> int:
    """Return how many whole MiB a file takes; one in many pieces takes some blocks for their list."""
    return int(inside(kept.host, name, f"du -k {file}").split()[0]) // 1024


def grow(kept: Kept, name: str, size: str) -> None:
    """Raise the limit of a running container; where the kernel does not let root, of the stopped one."""
    if kept.kind != "btrfs" and not _may_use_reserves():
        # As in a container, or in a sandbox: ext4 wants CAP_SYS_RESOURCE to grow what is mounted.
        done = refused(kept.host, 5, "CAP_SYS_RESOURCE", "set", name, f"disk={size}")
        assert "stop the container first" in done.err
        kept.host.run("stop", name, "--kill")
        kept.host.run("set", name, f"disk={size}")
        kept.host.run("start", name)
        return
    assert kept.host.json("set", name, f"disk={size}")["applied"] == ["limits.disk"]


def _may_use_reserves() -> bool:
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        effective = next(line.split()[1] for line in status if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_SYS_RESOURCE & 1)


def size_inside(kept: Kept, name: str) -> int:
    return int(inside(kept.host, name, "df -k / | tail -n 1").split()[1]) * 1024


def limit_of(kept: Kept, name: str) -> int | None:
    return kept.host.json("info", name)["disk_limit_bytes"]


def test_a_limit_is_kept_and_grows_while_the_container_runs(kept: Kept) -> None:
    name = limited(kept, "64M")
    assert limit_of(kept, name) == 64 * _MIB
    assert "of 64M" in kept.host.run("info", name).out
    if kept.kind not in _SIZE_UNSEEN:
        assert 40 * _MIB < size_inside(kept, name) <= 64 * _MIB
    status, arrived = fill(kept, name, "/root/one", 200)
    assert status != 0
    assert 30 <= arrived <= 64
    grow(kept, name, "192M")
    assert limit_of(kept, name) == 192 * _MIB
    if kept.kind not in _SIZE_UNSEEN:
        assert 150 * _MIB < size_inside(kept, name) <= 192 * _MIB
    status, arrived = fill(kept, name, "/root/two", 60)
    assert (status, arrived) == (0, 60)
    assert fill(kept, name, "/root/three", 200)[0] != 0
    kept.host.run("reboot", name)
    assert taken_mib(kept, name, "/root/two") == 60
    assert limit_of(kept, name) == 192 * _MIB
    (disk,) = kept.host.json("df", name)
    (volume,) = disk["volumes"]
    assert volume["limit_bytes"] == 192 * _MIB
    assert volume["used_bytes"] > 30 * _MIB  # as last measured
    kept.host.run("destroy", name, "--force", "--yes")


def test_how_full_a_disk_is_counts_what_it_shares_with_snapshots(kept: Kept) -> None:
    name = limited(kept, "64M")
    assert fill(kept, name, "/root/file", 30) == (0, 30)
    kept.host.run("stop", name)
    kept.host.run("snapshot", name, "one")
    (disk,) = kept.host.json("df", name)
    assert 30 * _MIB <= disk["volumes"][0]["filled_bytes"] < 64 * _MIB
    share = kept.host.run("df", name).out.splitlines()[1].split()[5]
    assert 45 <= int(share.rstrip("%")) < 100
    kept.host.run("destroy", name, "--yes")


def test_a_limit_below_what_is_used_is_refused_with_numbers(kept: Kept) -> None:
    name = limited(kept, "192M")
    assert fill(kept, name, "/root/big", 100) == (0, 100)
    kept.host.run("stop", name, "--kill")
    before = kept.host.run("config", name).out
    done = refused(kept.host, 5, "to 64M: ", "set", name, "disk=64M")
    assert done.err.startswith(f"sysctr: cannot limit the disk of {name} (")
    assert "MiB" in done.err
    assert kept.host.run("config", name).out == before
    assert limit_of(kept, name) == 192 * _MIB
    kept.host.run("start", name)
    assert taken_mib(kept, name, "/root/big") == 100
    inside(kept.host, name, "rm /root/big; sync")
    kept.host.run("stop", name, "--kill")
    kept.host.run("set", name, "disk=64M")
    assert limit_of(kept, name) == 64 * _MIB
    kept.host.run("start", name)
    assert fill(kept, name, "/root/big", 100)[0] != 0
    kept.host.run("destroy", name, "--force", "--yes")


def test_what_cannot_be_while_it_runs_is_refused_and_changes_nothing(kept: Kept) -> None:
    if kept.kind == "btrfs":
        pytest.skip("a quota of btrfs is lowered while the container runs")
    name = limited(kept, "192M")
    before = kept.host.run("config", name).out
    done = refused(kept.host, 4, "it is in use", "set", name, "disk=64M")
    assert "to 64M: it is in use" in done.err
    assert kept.host.run("config", name).out == before
    assert limit_of(kept, name) == 192 * _MIB
    assert size_inside(kept, name) > 100 * _MIB
    kept.host.run("destroy", name, "--force", "--yes")


def test_a_limit_that_is_edited_into_the_file_holds_after_the_next_start(kept: Kept) -> None:
    name = limited(kept, "64M", start=False)
    file = kept.host.json("info", name)["config_file"]
    with open(file, encoding="utf-8") as config:
        text = config.read()
    assert 'disk = "64M"' in text
    with open(file, "w", encoding="utf-8") as config:
        config.write(text.replace('disk = "64M"', 'disk = "128M"'))
    assert limit_of(kept, name) == 64 * _MIB
    kept.host.run("start", name)
    assert limit_of(kept, name) == 128 * _MIB
    assert fill(kept, name, "/root/big", 80) == (0, 80)
    kept.host.run("destroy", name, "--force", "--yes")


def test_a_limit_comes_and_goes_where_the_driver_can_be_without_one(kept: Kept) -> None:
    if kept.kind == "loop":
        name = limited(kept, "64M", start=False)
        refused(kept.host, 5, "an image always has a size", "set", name, "disk=")
        kept.host.run("destroy", name, "--yes")
        return
    name = kept.create()
    assert limit_of(kept, name) is None
    kept.write(name, "/root/note", "kept\n")
    kept.host.run("set", name, "disk=64M")
    assert limit_of(kept, name) == 64 * _MIB
    kept.host.run("start", name)
    assert inside(kept.host, name, "cat /root/note") == "kept"
    assert fill(kept, name, "/root/big", 100)[0] != 0
    inside(kept.host, name, "rm /root/big; sync")
    kept.host.run("stop", name, "--kill")
    kept.host.run("set", name, "disk=")
    assert limit_of(kept, name) is None
    kept.host.run("start", name)
    assert fill(kept, name, "/root/big", 100) == (0, 100)
    assert inside(kept.host, name, "cat /root/note") == "kept"
    kept.host.run("destroy", name, "--force", "--yes")


@pytest.mark.parametrize("size", ["1", "0", "-5G", "lots", "8X"])
def test_a_size_that_is_none_is_refused(kept: Kept, size: str) -> None:
    refused(kept.host, 2, "cannot accept limits.disk", "create", "x", "--template", "tiny", f"--disk={size}")
