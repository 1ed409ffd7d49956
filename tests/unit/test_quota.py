"""The structures of project quotas, and file systems that have none."""

import doctest
import struct
from pathlib import Path

import pytest

from sysctr.errors import SysctrError
from sysctr.linux import quota
from sysctr.storage import projects
from sysctr.storage.overlay_layers import Layers
from sysctr.storage.projects import Projects
from sysctr.storage.volumes import VolumeRecord, VolumeRecords


def test_the_examples_hold() -> None:
    assert doctest.testmod(projects).failed == 0


@pytest.mark.parametrize(
    ("number", "layout"),
    [
        (quota._FS_IOC_FSGETXATTR, quota._FSXATTR),
        (quota._FS_IOC_FSSETXATTR, quota._FSXATTR),
        (quota._XFS_IOC_FREE_EOFBLOCKS, quota._EOFBLOCKS),
    ],
)
def test_a_structure_is_as_long_as_the_number_of_its_ioctl_says(number: int, layout: str) -> None:
    assert struct.calcsize(layout) == number >> 16 & 0x3FFF


def test_what_the_kernel_says_of_a_project_is_read() -> None:
    # Limits of space are in KiB, what is used in bytes; inodes are inodes.
    data = struct.pack("=8QII", 64 << 10, 1, 4096, 100, 2, 7, 3, 4, 63, 1 << 30)
    assert quota._quota(1 << 30, data) == quota.Quota(1 << 30, 64 << 20, 4096, 100, 7)


def test_what_has_no_quotas_says_so() -> None:
    with open("/proc/self/status") as file:
        assert quota.project_flags(file.fileno()) == 0
        with pytest.raises(OSError):
            quota.fsgetxattr(file.fileno())
    for place in ("/proc", "/nowhere"):
        assert not Projects(place).enforced()
        assert Projects(place).new() == 0
        assert Projects(place).of(f"{place}/self") == 0


@pytest.mark.parametrize("number", [7, -1, "1073741824", True, 1 << 31, (1 << 30) + 1])
def test_a_record_with_another_number_is_damaged(tmp_path: Path, number: object) -> None:
    layers = Layers(VolumeRecords(str(tmp_path)), str(tmp_path / "run"))
    with pytest.raises(SysctrError, match="damaged"):
        layers.where(VolumeRecord(64 << 20, fields={"project": number}))
    assert layers.where(VolumeRecord(64 << 20)) == "disk"
    assert layers.where(VolumeRecord(64 << 20, fields={"project": 1 << 30})) == "uppers"
