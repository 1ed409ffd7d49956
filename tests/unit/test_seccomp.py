"""The compiled filter, run here by an interpreter of classic BPF: every architecture, without its machine."""

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysctr.engine import seccomp
from sysctr.errors import Refused

pytest.importorskip("pyseccomp")

X86_64, I386, AARCH64, ARM = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028
MACHINE = {X86_64: "x86_64", I386: "x86_64", AARCH64: "aarch64", ARM: "aarch64"}
X32 = 0x40000000
NUMBERS = {
    X86_64: {
        "kexec_load": 246, "kexec_file_load": 320, "init_module": 175, "finit_module": 313,
        "delete_module": 176, "open_by_handle_at": 304, "keyctl": 250, "add_key": 248, "request_key": 249,
        "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426,
        "io_uring_register": 427, "syslog": 103, "umount2": 166, "socket": 41, "ioctl": 16,
    },
    I386: {
        "kexec_load": 283, "init_module": 128, "finit_module": 350, "delete_module": 129,
        "open_by_handle_at": 342, "keyctl": 288, "add_key": 286, "request_key": 287, "bpf": 357,
        "perf_event_open": 336, "userfaultfd": 374, "io_uring_setup": 425, "io_uring_enter": 426,
        "io_uring_register": 427, "syslog": 103, "umount2": 52, "socket": 359, "ioctl": 54, "socketcall": 102,
    },
    AARCH64: {
        "kexec_load": 104, "kexec_file_load": 294, "init_module": 105, "finit_module": 273,
        "delete_module": 106, "open_by_handle_at": 265, "keyctl": 219, "add_key": 217, "request_key": 218,
        "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "io_uring_setup": 425, "io_uring_enter": 426,
        "io_uring_register": 427, "syslog": 116, "umount2": 39, "socket": 198, "ioctl": 29,
    },
    ARM: {
        "kexec_load": 347, "init_module": 128, "finit_module": 379, "delete_module": 129,
        "open_by_handle_at": 371, "keyctl": 311, "add_key": 309, "request_key": 310, "bpf": 386,
        "perf_event_open": 364, "userfaultfd": 388, "io_uring_setup": 425, "io_uring_enter": 426,
        "io_uring_register": 427, "syslog": 103, "umount2": 52, "socket": 281, "ioctl": 54,
    },
}  # fmt: skip
# What systemd, Docker and package managers live on.
LEFT = {
    X86_64: {
        "clone3": 435, "clone": 56, "unshare": 272, "mount": 165, "fsopen": 430, "openat2": 437,
        "reboot": 169, "ptrace": 101, "name_to_handle_at": 303, "seccomp": 317, "setns": 308, "read": 0,
        "fchmodat2": 452, "mseal": 462, "settimeofday": 164, "execve": 59, "pidfd_open": 434,
        "landlock_create_ruleset": 444,
    },
    I386: {"clone3": 435, "mount": 21, "clock_gettime64": 403, "umount": 22, "open": 5},
    AARCH64: {"clone3": 435, "mount": 40, "reboot": 142, "io_setup": 0},
    ARM: {"clone3": 435, "mount": 21, "cacheflush": 0x0F0002, "set_tls": 0x0F0005},
}  # fmt: skip


def run(program: bytes, arch: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """Return the errno that the filter answers, 0 when it lets the call pass."""
    data = struct.pack("=IIQ6Q", number & 0xFFFFFFFF, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    code = list(struct.iter_unpack("=HBBI", program))
    accumulator = at = 0
    while True:
        kind, if_true, if_false, operand = code[at]
        at += 1
        if kind == 0x20:
            accumulator = struct.unpack_from("=I", data, operand)[0]
        elif kind == 0x54:
            accumulator &= operand
        elif kind == 0x05:
            at += operand
        elif kind in (0x15, 0x25, 0x35):
            holds = {0x15: accumulator == operand, 0x25: accumulator > operand, 0x35: accumulator >= operand}
            at += if_true if holds[kind] else if_false
        elif kind == 0x06:
            return {0x7FFF0000: 0}.get(operand, operand & 0xFFFF if operand >> 16 == 5 else -1)
        else:
            raise AssertionError(f"instruction {kind:#x} is unknown here")


def answer(arch: int, call: str | int, *arguments: int, features: tuple[str, ...] = ()) -> int:
    number = call if isinstance(call, int) else (NUMBERS[arch] | LEFT[arch])[call]
    return run(seccomp.compile_filter(features, MACHINE[arch]), arch, number, arguments)


@pytest.mark.parametrize("arch", NUMBERS)
@pytest.mark.parametrize("rule", seccomp.RULES, ids=lambda rule: f"{rule.calls[0]}-{rule.conditions}")
def test_every_rule_holds_on_every_architecture(rule: seccomp.Rule, arch: int) -> None:
    arguments = [0] * 6
    for condition in rule.conditions:
        arguments[condition.argument] = condition.value
    for call in rule.calls:
        if call not in NUMBERS[arch]:
            assert (call, arch) in {("kexec_file_load", I386), ("kexec_file_load", ARM)} or (
                call == "socketcall" and arch != I386
            )
            continue
        assert answer(arch, call, *arguments) == rule.errno
        if rule.conditions:
            assert answer(arch, call) == 0
        if rule.unless:
            assert answer(arch, call, *arguments, features=(rule.unless,)) == 0


@pytest.mark.parametrize(("arch", "call"), [(arch, call) for arch, calls in LEFT.items() for call in calls])
def test_the_calls_that_containers_live_on_pass(arch: int, call: str) -> None:
    assert answer(arch, call) == 0
    assert answer(arch, call, *[0xFFFFFFFFFFFFFFFF] * 6) == 0


@pytest.mark.parametrize("arch", [X86_64, AARCH64])
def test_the_upper_half_of_an_int_does_not_hide_it(arch: int) -> None:
    high = 0xDEAD << 32
    assert answer(arch, "socket", high | 38, 5) == errno.EAFNOSUPPORT
    assert answer(arch, "socket", high | 16, 3, high | 9) == errno.EAFNOSUPPORT
    assert answer(arch, "ioctl", 0, high | 0x5412) == errno.EPERM
    assert answer(arch, "umount2", 0, high | 1) == errno.EACCES


@pytest.mark.parametrize("arch", NUMBERS)
def test_near_misses_pass(arch: int) -> None:
    assert answer(arch, "socket", 1, 2) == 0
    assert answer(arch, "socket", 16, 3, 0) == 0  # NETLINK_ROUTE
    assert answer(arch, "socket", 2, 3, 9) == 0  # a protocol 9 that is not netlink's
    assert answer(arch, "umount2", 0, 2) == 0  # MNT_DETACH
    assert answer(arch, "umount2", 0, 3) == errno.EACCES
    for reflink in (0x40049409, 0x4020940D, 0xC0189436, 0x81009431, 0x80089418):
        assert answer(arch, "ioctl", 3, reflink) == 0
    assert answer(arch, "ioctl", 3, 0x5413) == 0  # TIOCGWINSZ


def test_32_bit_sockets_through_the_multiplexer() -> None:
    assert answer(I386, "socketcall", 1) == errno.ENOSYS
    assert answer(I386, "socketcall", 3) == 0  # connect
    assert answer(I386, "socketcall", 1, features=("socketcall",)) == 0


@given(st.integers(seccomp.NEWEST_CALL + 1, 0xFFFFFFFE), st.sampled_from(list(NUMBERS)))
def test_what_is_newer_than_the_table_is_not_there(number: int, arch: int) -> None:
    private = arch == ARM and 0x0F0000 <= number < 0x0F0010
    assert answer(arch, number) == (0 if private else errno.ENOSYS)


@pytest.mark.parametrize("arch", NUMBERS)
def test_the_newest_known_call_passes_and_so_does_a_tracers_skip(arch: int) -> None:
    assert answer(arch, seccomp.NEWEST_CALL) == 0
    assert answer(arch, -1) == 0
    assert answer(arch, seccomp.NEWEST_CALL + 1, features=tuple(seccomp.FEATURES)) == errno.ENOSYS


@pytest.mark.parametrize("arch", NUMBERS)
def test_listns_of_linux_6_19_is_not_there_yet(arch: int) -> None:
    assert answer(arch, 470) == errno.ENOSYS


def test_x32_is_not_there() -> None:
    for number in (0, 41, 246, 515):
        assert answer(X86_64, X32 | number) == errno.ENOSYS


def test_an_architecture_of_another_machine_is_not_there() -> None:
    assert run(seccomp.compile_filter((), "x86_64"), AARCH64, 0) == errno.ENOSYS
    assert run(seccomp.compile_filter((), "aarch64"), X86_64, 0) == errno.ENOSYS


def test_a_machine_without_a_table_is_refused() -> None:
    with pytest.raises(Refused, match="riscv64"):
        seccomp.compile_filter((), "riscv64")


def test_the_bytes_are_kept_for_each_set_of_features() -> None:
    plain = seccomp.compile_filter(())
    assert seccomp.compile_filter(["nesting"]) is plain
    assert seccomp.compile_filter(["keyctl"]) is seccomp.compile_filter({"keyctl", "fuse"})
    assert seccomp.compile_filter(["keyctl"]) != plain
    assert len(plain) % 8 == 0


def test_the_filter_uses_what_the_kernel_can_evaluate_beforehand() -> None:
    """Else every call of a container runs the filter (seccomp_is_const_allow in kernel/seccomp.c)."""
    kinds = {kind for kind, *_ in struct.iter_unpack("=HBBI", seccomp.compile_filter())}
    assert kinds <= {0x20, 0x54, 0x05, 0x15, 0x25, 0x35, 0x06}


def test_the_table_can_be_printed() -> None:
    lines = seccomp.describe()
    assert sum(line.startswith("ioctl (BTRFS_IOC_SNAP_CREATE, ") for line in lines) == 1
    assert any(line.startswith("keyctl, add_key, request_key: ENOSYS, allowed by") for line in lines)
    assert any("AF_NETLINK and NETLINK_AUDIT" in line for line in lines)
    assert not any(line.startswith("keyctl") for line in seccomp.describe(["keyctl"]))
    assert lines[-1].startswith(f"every call above number {seccomp.NEWEST_CALL}")
