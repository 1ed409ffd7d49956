"""The filter loaded for real: every refused call is made, by the 64-bit and by the 32-bit entry."""

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import socket
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sysctr.engine import seccomp
from sysctr.linux import process, syscall

pytestmark = [pytest.mark.root, pytest.mark.kernel]

pytest.importorskip("pyseccomp")
X86_64 = platform.machine() == "x86_64"
only_x86_64 = pytest.mark.skipif(not X86_64, reason=f"call numbers of x86_64, this is {platform.machine()}")
needs_btrfs = pytest.mark.skipif(not os.path.exists("/sbin/mkfs.btrfs"), reason="no mkfs.btrfs")

# mov eax,edi; ebx,esi; ecx,edx; edx,ecx; esi,r8d; int 0x80: the i386 entry from a 64-bit process.
_INT_80 = bytes.fromhex("53 89f8 89f3 4189c9 89d1 4489ca 4489c6 cd80 5b c3")

HIGH = 0xDEAD << 32
BAD_FD = 9999
# Name: (number, arguments). None of them would do harm if it were let through.
CALLS_64 = {
    "kexec_load": (246, 0, 1, 1, 0xFFFFFFFF),
    "kexec_file_load": (320, BAD_FD, BAD_FD, 0, 0, 0),
    "init_module": (175, 0, 0, 0),
    "finit_module": (313, BAD_FD, 0, 0),
    "delete_module": (176, 0, 0),
    "open_by_handle_at": (304, BAD_FD, 0, 0),
    "keyctl": (250, 0, 0xFFFFFFFD, 0),
    "add_key": (248, 0, 0, 0, 0, 0),
    "request_key": (249, 0, 0, 0, 0),
    "bpf": (321, 0xFFFF, 0, 0),
    "perf_event_open": (298, 0, 0, 0, 0, 0),
    "userfaultfd": (323, 0xFFFF),
    "io_uring_setup": (425, 0, 0),
    "io_uring_enter": (426, BAD_FD, 0, 0, 0),
    "io_uring_register": (427, BAD_FD, 0xFFFF, 0, 0),
    "syslog": (103, 10, 0, 0),
    "umount2": (166, 0, 1),
    "socket": (41, 38, 5, 0),
    "socket vsock": (41, 40, 1, 0),
    "socket audit": (41, 16, 3, 9),
    "socket disguised": (41, HIGH | 38, 5, 0),
    "ioctl": (16, BAD_FD, 0x5412, 0),
    "ioctl linux": (16, BAD_FD, 0x541C, 0),
    "ioctl disguised": (16, BAD_FD, HIGH | 0x5412, 0),
    "newer": (seccomp.NEWEST_CALL + 1, 0, 0, 0, 0),
}
EXPECTED = {
    "umount2": errno.EACCES,
    "syslog": errno.EPERM,
    "bpf": errno.EPERM,
    "socket": errno.EAFNOSUPPORT,
    "ioctl": errno.EPERM,
}
CALLS_32 = {
    "kexec_load": (283, 0, 1, 1, 0x7FFFFFFF),
    "init_module": (128, 0, 0, 0),
    "delete_module": (129, 0, 0),
    "open_by_handle_at": (342, BAD_FD, 0, 0),
    "keyctl": (288, 0, 0x7FFFFFFF, 0),
    "add_key": (286, 0, 0, 0, 0),
    "bpf": (357, 0xFFFF, 0, 0),
    "perf_event_open": (336, 0, 0, 0, 0),
    "userfaultfd": (374, 0xFFFF),
    "io_uring_setup": (425, 0, 0),
    "syslog": (103, 10, 0, 0),
    "umount2": (52, 0, 1),
    "socket": (359, 38, 5, 0),
    "socketcall": (102, 1, 0),
    "ioctl": (54, BAD_FD, 0x5412, 0),
}
# What the kernel of the tests says of these without a filter cannot be told from the filter's answer.
_SAME_ANYWAY = {"newer"}


def in_child(probe: Callable[[], object], features: tuple[str, ...] | None = ()) -> object:
    """Return what `probe` returns in a process that loaded the filter (none, if features is None)."""
    program = None if features is None else seccomp.compile_filter(features)
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            if program is not None:
                process.load_seccomp(program)
            os.write(write_fd, json.dumps(probe()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as file:
        text = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the probe ended with {status}"
    return json.loads(text)


def errno_of(number: int, *arguments: int) -> int:
    ctypes.set_errno(0)
    result = syscall.call(number, *[a if a < 1 << 63 else a - (1 << 64) for a in arguments])
    if result >= 0:
        return 0
    return ctypes.get_errno()


def call_all_64() -> dict[str, int]:
    return {name: errno_of(*call) for name, call in CALLS_64.items()}


def call_all_32() -> dict[str, int]:
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(_INT_80)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    enter = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_uint] * 5)(address)
    found = {}
    for name, (number, *arguments) in CALLS_32.items():
        found[name] = max(0, -enter(number, *[*arguments, 0, 0, 0, 0][:4]))
    return found


def expected(name: str) -> int:
    return EXPECTED.get(name.split()[0], errno.ENOSYS)


@only_x86_64
def test_every_refused_call_is_refused() -> None:
    assert in_child(call_all_64) == {name: expected(name) for name in CALLS_64}


@only_x86_64
def test_without_the_filter_the_kernel_answers_otherwise() -> None:
    """The control: else the test above proves nothing."""
    answers = in_child(call_all_64, None)
    same = {name for name, answer in answers.items() if answer == expected(name)} - _SAME_ANYWAY
    # A kernel may lack a family, the 64-bit bpf, or a call; most it must have.
    assert len(same) <= len(CALLS_64) // 3, same
    assert not same & {"keyctl", "open_by_handle_at", "umount2", "ioctl", "ioctl linux", "ioctl disguised"}


@only_x86_64
def test_the_32_bit_entry_is_no_way_round() -> None:
    try:
        free = in_child(call_all_32, None)
    except AssertionError as error:
        pytest.skip(f"this kernel has no 32-bit entry ({error})")
    assert in_child(call_all_32) == {name: expected(name) for name in CALLS_32}
    assert free["keyctl"] != errno.ENOSYS
    assert free["ioctl"] != errno.EPERM
    assert free["socketcall"] != errno.ENOSYS


@only_x86_64
def test_a_feature_lifts_its_rules_and_no_other() -> None:
    free = in_child(call_all_64, None)
    answers = in_child(call_all_64, ("keyctl", "userfaultfd", "io_uring"))
    lifted = {"keyctl", "add_key", "request_key", "userfaultfd"}
    lifted |= {"io_uring_setup", "io_uring_enter", "io_uring_register"}
    for name, answer in answers.items():
        assert answer == (free[name] if name in lifted else expected(name)), name


def test_the_daily_work_of_a_container_passes() -> None:
    def work() -> str:
        for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
            socket.socket(family, socket.SOCK_STREAM).close()
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()
        _master, slave = os.openpty()
        os.get_terminal_size(slave)
        process.unshare(process.CLONE_NEWUSER | process.CLONE_NEWNS)
        process.load_seccomp(seccomp.compile_filter())  # Docker inside: filters stack
        return subprocess.run(
            ["/bin/sh", "-c", "id | cat"], capture_output=True, text=True, check=True
        ).stdout

    assert "uid=" in in_child(work)


def test_setuid_programs_still_raise_privileges() -> None:
    """The filter is loaded with CAP_SYS_ADMIN and not by no_new_privs, which would break su and sudo."""

    def status() -> str:
        return Path("/proc/self/status").read_text()

    lines = in_child(status).splitlines()
    assert "NoNewPrivs:\t0" in lines
    assert "Seccomp:\t2" in lines


class _VolumeArguments(ctypes.Structure):
    _fields_ = [("fd", ctypes.c_int64), ("name", ctypes.c_char * 4088)]


@pytest.fixture
def btrfs(tmp_path: Path) -> Iterator[Path]:
    image, point = tmp_path / "image", tmp_path / "mnt"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(256 << 20)
    process.run(["/sbin/mkfs.btrfs", "-q", str(image)])
    mounted = subprocess.run(["mount", "-o", "loop", image, point], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount btrfs: {mounted.stderr.decode().strip()}")
    yield point
    subprocess.run(["umount", point], check=True)


@needs_btrfs
def test_subvolumes_are_refused_and_reflinks_are_not(btrfs: Path) -> None:
    (btrfs / "a").write_bytes(b"x" * 8192)

    def subvolume(name: str) -> str:
        fd = os.open(btrfs, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, 0x5000940E, bytearray(_VolumeArguments(0, name.encode())))
        except OSError as error:
            return errno.errorcode[error.errno]
        finally:
            os.close(fd)
        return "made"

    def reflink() -> str:
        with open(btrfs / "a", "rb") as source, open(btrfs / "b", "wb") as target:
            fcntl.ioctl(target.fileno(), 0x40049409, source.fileno())
        return (btrfs / "b").read_text()[:1]

    assert in_child(lambda: subvolume("one")) == "ENOTTY"
    assert not (btrfs / "one").exists()
    assert in_child(reflink) == "x"
    assert in_child(lambda: subvolume("two"), None) == "made"
    # systemd-tmpfiles' way: `v` lines make a directory where subvolumes are not.
    with contextlib.suppress(FileNotFoundError):
        done = in_child(
            lambda: (
                subprocess.run(
                    ["systemd-tmpfiles", "--create", "-"],
                    input=f"v {btrfs}/three 0755 - -\n",
                    text=True,
                    capture_output=True,
                    check=False,
                ).returncode
            )
        )
        assert done == 0
        assert (btrfs / "three").is_dir()
        assert (btrfs / "three").stat().st_ino != 256
