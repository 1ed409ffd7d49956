"""A tree is judged without trusting it: links, fifos and nonsense change nothing outside and hang nothing."""

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.template import rootfs_check
from sysctr.template.rootfs_check import NotARootfs, check_rootfs

_KNOWN = rootfs_check._ARCHITECTURES
_HERE = next(key for key, name in _KNOWN.items() if name == rootfs_check.host_architecture())


def program(key: tuple[int, int, bool] = _HERE) -> bytes:
    word, machine, little = key
    head = b"\x7fELF" + bytes([word, 1 if little else 2, 1]) + bytes(9)
    return head + struct.pack("<HH" if little else ">HH", 2, machine) + bytes(44)


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "rootfs"
    for name in ("sbin", "bin", "etc", "dev", "proc", "sys", "usr/lib/systemd"):
        (root / name).mkdir(parents=True)
    init = root / "usr/lib/systemd/systemd"
    init.write_bytes(program())
    init.chmod(0o755)
    # Absolute: it must be resolved inside the tree, where the host's own would be something else.
    (root / "sbin/init").symlink_to("/usr/lib/systemd/systemd")
    (root / "etc/os-release").write_text('ID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian 12"\n')
    return root


def replace_init(root, data: bytes, mode: int = 0o755) -> None:
    (root / "sbin/init").unlink()
    (root / "sbin/init").write_bytes(data)
    (root / "sbin/init").chmod(mode)


def test_a_usable_tree_tells_what_it_is(tree) -> None:
    found = check_rootfs(str(tree))
    assert (found.init, found.init_kind, found.stop_signal) == ("/sbin/init", "systemd", "SIGRTMIN+3")
    assert (found.os_id, found.os_version, found.os_name) == ("debian", "12", "Debian 12")
    assert found.arch == rootfs_check.host_architecture()


def test_what_the_builder_knows_comes_first(tree) -> None:
    (tree / "bin/own").write_bytes(program())
    (tree / "bin/own").chmod(0o755)
    found = check_rootfs(str(tree), "/bin/own", "SIGUSR2")
    assert (found.init, found.init_kind, found.stop_signal) == ("/bin/own", "other", "SIGUSR2")


def test_directories_to_mount_on_are_made_where_they_are_missing(tree) -> None:
    (tree / "sys").rmdir()
    check_rootfs(str(tree))
    assert (tree / "sys").is_dir()


@pytest.mark.parametrize("name", ["dev", "proc", "sys"])
def test_a_symlink_to_mount_on_is_refused(tree, name: str) -> None:
    (tree / name).rmdir()
    (tree / name).symlink_to("/etc")
    with pytest.raises(NotARootfs, match=f"/{name} is a symlink"):
        check_rootfs(str(tree))


def test_a_file_to_mount_on_is_refused(tree) -> None:
    (tree / "proc").rmdir()
    (tree / "proc").write_text("")
    with pytest.raises(NotARootfs, match="/proc is not a directory"):
        check_rootfs(str(tree))


OUTSIDE = ("/nowhere", "../../../../../../../../bin/sh", "/sbin/init", "/proc/self/exe")


@pytest.mark.parametrize("target", OUTSIDE)
def test_an_init_that_is_only_outside_is_none(tree, target: str) -> None:
    (tree / "sbin/init").unlink()
    (tree / "sbin/init").symlink_to(target)
    with pytest.raises(NotARootfs, match="no /sbin/init"):
        check_rootfs(str(tree))


def test_a_fifo_as_init_neither_hangs_nor_passes(tree) -> None:
    (tree / "sbin/init").unlink()
    os.mkfifo(tree / "sbin/init", 0o755)
    with pytest.raises(NotARootfs, match="not an executable file"):
        check_rootfs(str(tree))


def test_an_init_that_may_not_be_executed_is_refused(tree) -> None:
    replace_init(tree, program(), 0o644)
    with pytest.raises(NotARootfs, match="not an executable file"):
        check_rootfs(str(tree))


def test_another_architecture_is_named_with_this_one(tree) -> None:
    other = next(key for key in _KNOWN if key != _HERE)
    replace_init(tree, program(other))
    with pytest.raises(NotARootfs) as caught:
        check_rootfs(str(tree))
    assert _KNOWN[other] in caught.value.message
    assert rootfs_check.host_architecture() in caught.value.message


def test_a_script_counts_by_its_interpreter(tree) -> None:
    replace_init(tree, b"#!/bin/sh -e\nexec true\n")
    with pytest.raises(NotARootfs, match="'/bin/sh' is missing"):
        check_rootfs(str(tree))
    (tree / "bin/sh").write_bytes(program())
    (tree / "bin/sh").chmod(0o755)
    assert check_rootfs(str(tree)).init_kind == "sysvinit"


def test_text_is_no_program(tree) -> None:
    replace_init(tree, b"hello")
    with pytest.raises(NotARootfs, match="not a program"):
        check_rootfs(str(tree))


def test_a_tree_that_is_a_symlink_is_refused(tree, tmp_path) -> None:
    (tmp_path / "link").symlink_to(tree)
    with pytest.raises(NotARootfs):
        check_rootfs(str(tmp_path / "link"))


def test_an_os_release_outside_the_tree_is_not_read(tree, tmp_path) -> None:
    (tmp_path / "secret").write_text("ID=secret\n")
    (tree / "etc/os-release").unlink()
    (tree / "etc/os-release").symlink_to("../../secret")
    assert check_rootfs(str(tree)).os_id == "unknown"


def test_an_os_release_that_is_a_fifo_or_huge_is_harmless(tree) -> None:
    release = tree / "etc/os-release"
    release.unlink()
    os.mkfifo(release)
    assert check_rootfs(str(tree)).os_id == "unknown"
    release.unlink()
    release.write_bytes(b"#" * 70_000 + b"\nID=late\n")
    assert check_rootfs(str(tree)).os_id == "unknown"


@given(st.binary(max_size=400))
def test_no_os_release_breaks_a_terminal(data: bytes) -> None:
    for value in rootfs_check.parse_os_release(b"PRETTY_NAME=" + data).values():
        assert value.isprintable() or value == ""
        assert len(value) <= 200


@given(st.binary(max_size=64))
def test_no_header_makes_the_check_fail(head: bytes) -> None:
    assert isinstance(rootfs_check.elf_architecture(b"\x7fELF" + head), str)
