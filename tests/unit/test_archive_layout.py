"""Where the root is in an archive, told by what it begins with."""

import contextlib
import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.engine.archive_head import parse_head
from sysctr.errors import SysctrError
from sysctr.template.layout import find_root, first_members, tar_arguments


def tar_of(*names: str, link: str = "") -> bytes:
    """Return an archive of directories (named with a slash) and empty files; `link` is a symlink instead."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            member = tarfile.TarInfo(name.rstrip("/"))
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            if name == link:
                member.type, member.linkname = tarfile.SYMTYPE, "/"
            archive.addfile(member)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("names", "below"),
    [
        (("metadata.yaml", "rootfs/", "rootfs/bin/", "templates/"), "rootfs"),
        (("./", "./templates/", "./rootfs/", "./metadata.yaml"), "./rootfs"),
        (("rootfs/etc/passwd",), "rootfs"),
        (("./", "./bin/", "./rootfs/"), ""),
        (("rootfs/", "rootfs/a", "usr/"), ""),
        (("bin/", "etc/"), ""),
        (("metadata.yaml", "templates/"), ""),
        ((), ""),
    ],
)
def test_the_root_is_where_the_first_members_say(names: tuple[str, ...], below: str) -> None:
    assert find_root(tar_of(*names)) == below


def test_a_link_is_no_root() -> None:
    assert find_root(tar_of("metadata.yaml", "rootfs", "rootfs/x", link="rootfs")) == ""


def test_an_archive_that_ends_anywhere_is_read_as_far_as_it_goes() -> None:
    data = tar_of("metadata.yaml", "rootfs/", "rootfs/bin/")
    assert [member.name for member in first_members(data[:1100])] == ["metadata.yaml", "rootfs"]


def test_tar_takes_each_root_to_its_place() -> None:
    arguments = tar_arguments({"backup/snapshots/a.b/rootfs": "0", "rootfs": ""}, ["dev/*"])
    assert arguments == [
        "--exclude=backup/snapshots/a.b/rootfs/dev/*", "--exclude=rootfs/dev/*",
        "--transform=s,^backup/snapshots/a\\.b/rootfs\\(/\\|$\\),./0\\1,rSh",
        "--transform=s,^rootfs\\(/\\|$\\),./\\1,rSh", "backup/snapshots/a.b/rootfs", "rootfs",
    ]  # fmt: skip


@given(st.binary(max_size=3000) | st.binary(max_size=600).map(lambda junk: tar_of("rootfs/", "a") + junk))
def test_no_beginning_breaks_it(data: bytes) -> None:
    find_root(data)
    with contextlib.suppress(SysctrError):
        parse_head(data, "restore it")
