"""The allocator of addresses: what it gives out, to whom, and what it refuses."""

import json
import subprocess
import sys
import threading
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.errors import NoSpace, SysctrError, UsageError
from sysctr.network.addresses import Addresses, Wanted, free_subnet, gateway_of, random_mac

SUBNET = IPv4Network("10.117.5.0/24")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def addresses(tmp_path: Path) -> Addresses:
    return Addresses(str(tmp_path / "network"))


def test_the_lowest_free_address_is_given(addresses: Addresses) -> None:
    assert [addresses.allocate(SUBNET, ct_id, 0).ip for ct_id in (103, 101, 102)] == [
        "10.117.5.2", "10.117.5.3", "10.117.5.4",
    ]  # fmt: skip
    addresses.release(101)
    given_again = addresses.allocate(SUBNET, 104, 0)
    assert (given_again.ip, given_again.prefix, given_again.gateway) == ("10.117.5.3", 24, "10.117.5.1")


def test_an_address_stays_with_its_nic(addresses: Addresses, tmp_path: Path) -> None:
    first, second = addresses.allocate(SUBNET, 101, 0), addresses.allocate(SUBNET, 101, 1)
    assert first != second
    another_daemon = Addresses(str(tmp_path / "network"))
    assert another_daemon.allocate(SUBNET, 101, 1) == second
    assert another_daemon.allocate(SUBNET, 101, 0) == first


def test_a_wanted_address_is_given_and_the_former_one_is_free_again(addresses: Addresses) -> None:
    assert addresses.allocate(SUBNET, 101, 0).ip == "10.117.5.2"
    assert addresses.allocate(SUBNET, 101, 0, "10.117.5.200/24").ip == "10.117.5.200"
    assert addresses.allocate(SUBNET, 101, 0).ip == "10.117.5.200", "what it has, it keeps"
    assert addresses.allocate(SUBNET, 102, 0).ip == "10.117.5.2"


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("10.117.6.2", "not in 10.117.5.0/24"),
        ("10.117.5.0", "network's"),
        ("10.117.5.1", "bridge's own"),
        ("10.117.5.255/24", "broadcast"),
        ("10.117.5.9/25", "a /24"),
        ("10.117.5.7", "100 has it"),
        ("10.117.5.7\n10.0.0.1 bank", "not an IPv4 address"),
        ("fd00::1", "not an IPv4 address"),
    ],
)
def test_an_address_that_cannot_be_is_refused(addresses: Addresses, wanted: str, reason: str) -> None:
    addresses.allocate(SUBNET, 100, 0, "10.117.5.7")
    before = addresses.leases()
    with pytest.raises(UsageError, match=reason):
        addresses.allocate(SUBNET, 101, 0, wanted)
    assert addresses.leases() == before


def test_an_exhausted_network_says_so(addresses: Addresses) -> None:
    small = IPv4Network("10.117.5.0/29")
    for ct_id in range(101, 106):
        addresses.allocate(small, ct_id, 0)
    with pytest.raises(NoSpace, match=r"all of 10\.117\.5\.0/29 are taken"):
        addresses.allocate(small, 106, 0)
    assert 106 not in addresses.leases()
    assert addresses.allocate(small, 105, 0).ip == "10.117.5.6", "who has one still starts"


def test_a_change_of_the_network_gives_new_addresses(addresses: Addresses) -> None:
    addresses.allocate(SUBNET, 101, 0)
    other = IPv4Network("172.29.0.0/24")
    assert addresses.allocate(other, 101, 0).ip == "172.29.0.2"
    assert [ip for _nic, ip, _mac in addresses.lease(101).nics] == ["172.29.0.2"]


def test_enrolling_gives_all_or_nothing(addresses: Addresses) -> None:
    addresses.allocate(SUBNET, 100, 0, "10.117.5.9")
    nics = (Wanted(0, "02:00:00:00:00:01"), Wanted(1, "02:00:00:00:00:02", "10.117.5.9"))
    with pytest.raises(UsageError):
        addresses.enroll(SUBNET, 101, "demo", nics)
    assert addresses.lease(101).nics == ()
    addresses.enroll(SUBNET, 101, "demo", nics[:1])
    assert addresses.lease(101).name == "demo"
    assert addresses.lease(101).nics == ((0, "10.117.5.2", "02:00:00:00:00:01"),)


def test_describing_changes_name_and_macs_only(addresses: Addresses) -> None:
    addresses.allocate(SUBNET, 101, 0)
    addresses.describe(101, "demo", {0: "02:00:00:00:00:01", 7: "02:00:00:00:00:07"})
    addresses.describe(101, "renamed", {})
    lease = addresses.lease(101)
    assert (lease.name, lease.nics) == ("renamed", ((0, "10.117.5.2", "02:00:00:00:00:01"),))


def test_releasing_twice_and_one_nic_only(addresses: Addresses) -> None:
    addresses.allocate(SUBNET, 101, 0)
    addresses.allocate(SUBNET, 101, 1)
    addresses.release(101, 0)
    assert [nic for nic, _ip, _mac in addresses.lease(101).nics] == [1]
    addresses.release(101)
    addresses.release(101)
    assert addresses.leases() == {}


def test_threads_never_share_an_address(tmp_path: Path) -> None:
    def work(first: int) -> None:
        allocator = Addresses(str(tmp_path / "network"))
        for ct_id in range(first, first + 10):
            given = allocator.allocate(SUBNET, ct_id, 0)
            assert given.ip not in seen
            seen.append(given.ip)

    seen: list[str] = []
    threads = [threading.Thread(target=work, args=(100 + 10 * number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 60


def test_processes_never_share_an_address(tmp_path: Path) -> None:
    script = (
        "import sys; from ipaddress import IPv4Network; from sysctr.network.addresses import Addresses\n"
        "first = int(sys.argv[2]); allocator = Addresses(sys.argv[1]); net = IPv4Network('10.117.5.0/24')\n"
        "print(*(allocator.allocate(net, n, 0).ip for n in range(first, first + 15)))\n"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "network"), str(first)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for first in (100, 200, 300, 400)
    ]  # fmt: skip
    given_out = [ip for worker in workers for ip in worker.communicate()[0].split()]
    assert len(given_out) == len(set(given_out)) == 60


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 99, "containers": {}}'])
def test_a_record_that_cannot_be_read_is_not_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / "addresses.json").write_text(text)
    with pytest.raises(SysctrError, match="cannot read"):
        Addresses(str(tmp_path)).allocate(SUBNET, 101, 0)
    assert (tmp_path / "addresses.json").read_text() == text


def test_a_record_is_private_and_names_its_version(addresses: Addresses, tmp_path: Path) -> None:
    addresses.allocate(SUBNET, 101, 0)
    record = tmp_path / "network" / "addresses.json"
    assert record.stat().st_mode & 0o777 == 0o600
    assert json.loads(record.read_text())["version"] == 1


_NETWORKS = st.builds(
    lambda number, prefix: IPv4Network((number, prefix), strict=False),
    st.integers(int(IPv4Address("10.0.0.0")), int(IPv4Address("10.255.255.255"))),
    st.integers(9, 32),
)


@given(st.lists(_NETWORKS, max_size=20), st.integers(0, 2**32))
def test_the_chosen_network_is_private_and_free(taken: list[IPv4Network], start: int) -> None:
    chosen = free_subnet(taken, start)
    assert chosen.prefixlen == 24
    assert chosen.is_private
    assert not any(chosen.overlaps(other) for other in taken)
    assert gateway_of(chosen) in chosen


def test_no_free_network_is_an_error_that_says_what_to_do() -> None:
    private = [IPv4Network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")]
    with pytest.raises(NoSpace) as caught:
        free_subnet(private)
    assert "network.subnet" in caught.value.hint


def test_macs_are_unicast_local_and_different() -> None:
    macs = {random_mac() for _ in range(100)}
    assert len(macs) == 100
    assert {int(mac[:2], 16) & 3 for mac in macs} == {2}
