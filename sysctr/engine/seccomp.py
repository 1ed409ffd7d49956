"""The system calls that containers are refused: one table, compiled by libseccomp to a filter of bytes.

A deny list, as LXC and Incus have. systemd, Docker and package managers inside use most of the rest, the user
namespace has taken the host's powers from them already, and what is listed here is what it does not cover:
kernel code with a long record of holes, calls that are not namespaced, and doors to the host.

ENOSYS is the answer where programs have a second way for kernels without the call; another errno where the
field expects it (systemd-networkd gives up on EPERM from keyctl; PAM takes EAFNOSUPPORT for "no audit").

What is deliberately left alone: clone3 and unshare (nested containers), mount and the new mount calls, ptrace
and process_vm_* (same user namespace only), reboot (how a container reboots), setting the clock, swapon and
quotactl (one capability check in the host's user namespace, before anything else), name_to_handle_at (systemd
names cgroups by it), seccomp itself (filters stack), other ioctls of btrfs' letter (FICLONE is reflink).

Calls above `NEWEST_CALL` get ENOSYS: what came into the kernel after this table was last looked through has
not been judged. libseccomp cannot compare numbers by size, so this part is put before its program here.
"""

import errno
import functools
import platform
import struct
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass

from sysctr.errors import Refused

# file_setattr, Linux 6.17. From 424 on the numbers are the same on every architecture.
NEWEST_CALL = 469

_AF_NETLINK, _AF_ALG, _AF_VSOCK = 16, 38, 40
_NETLINK_AUDIT = 9
_MNT_FORCE = 1
_SYS_SOCKET = 1
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
# The numbers hold direction and size, and the kernel compares them whole. Matching only the letter 0x94 would
# take FICLONE and the label calls along; matching letter and number would take START_SYNC (24).
_BTRFS = {
    "SNAP_CREATE": 0x50009401,
    "SUBVOL_CREATE": 0x5000940E,
    "SNAP_DESTROY": 0x5000940F,
    "SNAP_CREATE_V2": 0x50009417,
    "SUBVOL_CREATE_V2": 0x50009418,
    "SUBVOL_SETFLAGS": 0x4008941A,
    "SET_RECEIVED_SUBVOL": 0xC0C89425,
    "SET_RECEIVED_SUBVOL (32 bit)": 0xC0C09425,
    "SNAP_DESTROY_V2": 0x5000943F,
}
# What the kernel leaves to the host's root today: one check of a capability each, and old code behind it.
_BTRFS_ADMINISTRATION = {
    "DEFAULT_SUBVOL": 0x40089413,
    "QUOTA_CTL": 0xC0109428,
    "QGROUP_ASSIGN": 0x40189429,
    "QGROUP_CREATE": 0x4010942A,
    "QGROUP_LIMIT": 0x8030942B,
    "QUOTA_RESCAN": 0x4040942C,
}

# An int in a 64-bit register: the kernel looks at the lower half alone, so the filter must too. Compared
# whole, AF_ALG + (1 << 32) would pass the filter and be AF_ALG to the kernel (flatpak's CVE-2019-10063).
_INT = 0xFFFF_FFFF


@dataclass(frozen=True)
class Condition:
    """`argument & mask == value`."""

    argument: int
    value: int
    text: str
    mask: int = _INT


@dataclass(frozen=True)
class Rule:
    """Calls that fail with `errno` if all conditions hold, unless the container has the feature `unless`."""

    calls: tuple[str, ...]
    errno: int
    reason: str
    conditions: tuple[Condition, ...] = ()
    unless: str = ""


RULES = (
    Rule(("kexec_load", "kexec_file_load"), errno.ENOSYS, "replaces the host's kernel"),
    Rule(
        ("init_module", "finit_module", "delete_module"), errno.ENOSYS, "modules belong to the host's kernel"
    ),
    Rule(
        ("open_by_handle_at",),
        errno.ENOSYS,
        "opens files by inode number, outside the container's root too (the 2014 Docker escape)",
    ),
    Rule(
        ("keyctl", "add_key", "request_key"),
        errno.ENOSYS,
        "keyrings are not namespaced as a whole, and had many holes; networkd stops at EPERM",
        unless="keyctl",
    ),
    Rule(
        ("bpf",),
        errno.EPERM,
        "the verifier had many holes; EPERM is what a user namespace gets anyway, and what runc expects",
        unless="bpf",
    ),
    Rule(
        ("perf_event_open",),
        errno.ENOSYS,
        "counters see the host, and the code had many holes; Docker and nspawn refuse it too",
        unless="perf",
    ),
    Rule(
        ("userfaultfd",),
        errno.ENOSYS,
        "holds the kernel in a copy for as long as one likes: the tool of most race exploits",
        unless="userfaultfd",
    ),
    Rule(
        ("io_uring_setup", "io_uring_enter", "io_uring_register"),
        errno.ENOSYS,
        "does calls that no filter sees, and had many holes; Docker refuses it, programs fall back to epoll",
        unless="io_uring",
    ),
    Rule(("syslog",), errno.EPERM, "the kernel's log is the host's; what dmesg_restrict answers"),
    Rule(
        ("umount2",),
        errno.EACCES,
        "breaks off the host's requests to a network file system that both have mounted",
        (Condition(1, _MNT_FORCE, "MNT_FORCE", mask=_MNT_FORCE),),
    ),
    # Before the rules for socket: from each of them libseccomp derives one for socketcall(SYS_SOCKET) that
    # looks at no family, and the first of them counts.
    #
    # LXC, Incus and nspawn let socketcall pass, and with it every family. Docker refused it from moby#52494
    # on and gave that up within a week, for programs of 32 bits, in favour of AppArmor's "deny network alg"
    # (moby#52552). Not every host of ours has AppArmor, and what AF_ALG wrote to were pages that all
    # containers of a template share. Guests of 32 bits cannot be made here (a template has the host's
    # architecture), so what this costs is the network of old 32-bit programs in a 64-bit guest: it stays.
    Rule(
        ("socketcall",),
        errno.ENOSYS,
        "32-bit x86 hides the family behind a pointer, which no filter can follow; musl and programs for "
        "kernels from 4.3 on call socket itself, old 32-bit glibc programs need the feature",
        (Condition(0, _SYS_SOCKET, "SYS_SOCKET"),),
        unless="socketcall",
    ),
    Rule(
        ("socket",),
        errno.EAFNOSUPPORT,
        "the kernel's crypto is not namespaced; by CVE-2026-31431 it wrote to pages of shared templates",
        (Condition(0, _AF_ALG, "AF_ALG"),),
    ),
    Rule(
        ("socket",),
        errno.EAFNOSUPPORT,
        "vsock is not namespaced: the host's own line to its hypervisor or its virtual machines",
        (Condition(0, _AF_VSOCK, "AF_VSOCK"),),
    ),
    Rule(
        ("socket",),
        errno.EAFNOSUPPORT,
        "audit is not namespaced; PAM and sshd take this answer for a kernel without audit",
        (Condition(0, _AF_NETLINK, "AF_NETLINK"), Condition(2, _NETLINK_AUDIT, "NETLINK_AUDIT")),
    ),
    Rule(
        ("ioctl",),
        errno.EPERM,
        "types into a terminal, as its user",
        (Condition(1, _TIOCSTI, "TIOCSTI"),),
    ),
    Rule(
        ("ioctl",),
        errno.EPERM,
        "pastes into the host's text console",
        (Condition(1, _TIOCLINUX, "TIOCLINUX"),),
    ),
    *(
        Rule(
            ("ioctl",),
            errno.ENOTTY,
            "a nested subvolume is lost in snapshots and outside the container's quota; after ENOTTY "
            "systemd-tmpfiles makes a directory",
            (Condition(1, number, f"BTRFS_IOC_{name}"),),
        )
        for name, number in _BTRFS.items()
    ),
    *(
        Rule(
            ("ioctl",),
            errno.ENOTTY,
            "the file system that containers share, and its quotas, are the host's to administer",
            (Condition(1, number, f"BTRFS_IOC_{name}"),),
        )
        for name, number in _BTRFS_ADMINISTRATION.items()
    ),
)

FEATURES = frozenset(rule.unless for rule in RULES if rule.unless)


@dataclass(frozen=True)
class _Architecture:
    """One set of call numbers of a machine; `private` are those outside the common table."""

    name: str
    audit: int
    private: tuple[int, int] | None = None
    socketcall: int | None = None


# x32 has no row: it is x86_64 with numbers from 0x40000000 on, all of them above the newest known. Kernels of
# today have it off unless booted with syscall.x32=y.
_MACHINES = {
    "x86_64": (_Architecture("X86_64", 0xC000003E), _Architecture("X86", 0x40000003, socketcall=102)),
    # set_tls, cacheflush and their like: __ARM_NR_BASE and the next few.
    "aarch64": (
        _Architecture("AARCH64", 0xC00000B7),
        _Architecture("ARM", 0x40000028, private=(0x0F0000, 0x0F0010)),
    ),
}


def describe(features: Iterable[str] = ()) -> list[str]:
    """Return what a container with these features is refused, a line for each rule."""
    given = frozenset(features)
    # Rules that differ only in the value of an argument are one line.
    objects: dict[tuple[str, str, str, str], list[str]] = {}
    for rule in RULES:
        if rule.unless not in given:
            what = ", ".join(rule.calls), errno.errorcode[rule.errno], rule.reason, rule.unless
            objects.setdefault(what, []).append(" and ".join(c.text for c in rule.conditions))
    lines = []
    for (calls, answer, reason, feature), conditions in objects.items():
        shown = f"{calls} ({', '.join(conditions)})" if conditions[0] else calls
        lifted = f", allowed by the feature {feature}" if feature else ""
        lines.append(f"{shown}: {answer}{lifted}; {reason}")
    return [*lines, f"every call above number {NEWEST_CALL}: ENOSYS; newer than this table"]


def compile_filter(features: Iterable[str] = (), machine: str = "") -> bytes:
    """Return the filter as an array of struct sock_filter, for PR_SET_SECCOMP or seccomp(2).

    Features that do not concern system calls are ignored. The bytes are kept: compiling takes milliseconds,
    and all containers of a host have one of a few sets.
    """
    return _compile(FEATURES.intersection(features), machine or platform.machine())


@functools.cache
def _compile(features: frozenset[str], machine: str) -> bytes:
    import pyseccomp  # loads the library: in a function, so that importing the engine does not need it

    if machine not in _MACHINES:
        raise Refused(
            f"cannot filter the system calls of {machine}: only {', '.join(_MACHINES)} are known",
            hint="sysctr runs on amd64 and arm64",
        )
    architectures = _MACHINES[machine]
    program = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    program.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.ERRNO(errno.ENOSYS))
    # A binary tree. For the calls it always allows the kernel keeps a bitmap and does not run the filter at
    # all (5.11); the tree is for ioctl and socket, whose arguments are looked at.
    program.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)
    native = pyseccomp.system_arch()
    wanted = [getattr(pyseccomp.Arch, architecture.name) for architecture in architectures]
    for arch in wanted:
        if arch != native:
            program.add_arch(arch)
    if native not in wanted:
        program.remove_arch(native)
    for rule in RULES:
        if rule.unless in features:
            continue
        arguments = [pyseccomp.Arg(c.argument, pyseccomp.MASKED_EQ, c.mask, c.value) for c in rule.conditions]
        for call in rule.calls:
            # Not "exactly": a call that one of the architectures has not (socketcall) is no error.
            program.add_rule(pyseccomp.ERRNO(rule.errno), call, *arguments)
    with tempfile.TemporaryFile() as file:
        program.export_bpf(file)
        file.seek(0)
        return _prologue(architectures, features) + file.read()


# Classic BPF: struct sock_filter is code, distance if true, distance if false, operand.
_LOAD, _RETURN = 0x20, 0x06
_JUMP_EQUAL, _JUMP_GREATER, _JUMP_GREATER_OR_EQUAL = 0x15, 0x25, 0x35
_NUMBER, _ARCHITECTURE = 0, 4
_RET_ERRNO, _RET_ALLOW = 0x0005_0000, 0x7FFF_0000
_TRACER_SKIPPED = 0xFFFF_FFFF


def _prologue(architectures: tuple[_Architecture, ...], features: frozenset[str]) -> bytes:
    """Return instructions that answer ENOSYS above NEWEST_CALL, and else go on with what comes after them.

    They are of the few kinds that the kernel evaluates for its bitmap.
    """
    program = [(_LOAD, 0, 0, _ARCHITECTURE)]
    for architecture in architectures:
        judged: list[tuple[int, int, int, int]] = []
        if architecture.private:
            low, high = architecture.private
            judged = [(_JUMP_GREATER_OR_EQUAL, 0, 1, low), (_JUMP_GREATER_OR_EQUAL, 0, 1, high)]
        rest = len(judged) + 1  # up to and with the answer
        passed: list[tuple[int, int, int, int]] = []
        if architecture.socketcall and "socketcall" in features:
            # Leaving our rule out is not enough, as libseccomp makes its own from those for socket.
            passed = [(_JUMP_EQUAL, 0, 1, architecture.socketcall), (_RETURN, 0, 0, _RET_ALLOW)]
        program += [
            (_JUMP_EQUAL, 0, 4 + len(passed) + rest, architecture.audit),
            (_LOAD, 0, 0, _NUMBER),
            *passed,
            # A tracer that swallows a call sets its number to -1, and the result is the tracer's.
            (_JUMP_EQUAL, 1 + rest, 0, _TRACER_SKIPPED),
            (_JUMP_GREATER, 0, rest, NEWEST_CALL),
            *judged,
            (_RETURN, 0, 0, _RET_ERRNO | errno.ENOSYS),
            (_LOAD, 0, 0, _ARCHITECTURE),
        ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
