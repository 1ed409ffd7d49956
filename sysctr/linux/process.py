"""Processes: namespaces, clone3, pidfds, credentials, and the one way external programs are run."""

import contextlib
import ctypes
import errno
import os
import signal
import struct

from sysctr.errors import SysctrError
from sysctr.linux import syscall
from sysctr.linux.syscall import bind, check

CLONE_NEWTIME = 0x00000080
CLONE_PIDFD = 0x00001000
CLONE_PARENT = 0x00008000
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_INTO_CGROUP = 0x200000000

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36

SECCOMP_MODE_FILTER = 2
_KEYCTL_JOIN_SESSION_KEYRING = 1
_PIDFD_SIGNAL_PROCESS_GROUP = 1 << 2

_setns = bind("setns", ctypes.c_int, ctypes.c_int)
_unshare = bind("unshare", ctypes.c_int)
_prctl = bind("prctl", ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)


def setns(fd: int, flags: int) -> None:
    """Join the namespaces `flags` of the pidfd or namespace file `fd`."""
    check(_setns(fd, flags), "setns")


def unshare(flags: int) -> None:
    """Move this process into new namespaces."""
    check(_unshare(flags), "unshare")


def prctl(option: int, argument: int = 0, second: int = 0) -> int:
    """Call prctl with up to two integer arguments."""
    return check(_prctl(option, argument, second, 0, 0), "prctl")


def clone(flags: int, cgroup_fd: int = -1) -> tuple[int, int]:
    """Fork with clone3 and return (pid, pidfd); in the child (0, -1).

    With `cgroup_fd`, a directory of cgroup2, the child is born in that cgroup.

    Only a single-threaded process may call this. The three PyOS calls are what os.fork itself does around
    fork(); without the parent's and the first one Python 3.13 crashes in the child.
    """
    pidfd = ctypes.c_int(-1)
    # struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid,
    # set_tid_size, cgroup. With CLONE_PARENT the exit signal is the caller's own and must be 0.
    exit_signal = 0 if flags & CLONE_PARENT else signal.SIGCHLD
    if cgroup_fd >= 0:
        flags |= CLONE_INTO_CGROUP
    arguments = struct.pack(
        "=11Q", flags | CLONE_PIDFD, ctypes.addressof(pidfd), 0, 0, exit_signal, 0, 0, 0, 0, 0,
        max(cgroup_fd, 0),
    )
    buffer = ctypes.create_string_buffer(arguments, len(arguments))
    api = ctypes.pythonapi
    api.PyOS_BeforeFork()
    pid = _raw_syscall(
        ctypes.c_long(syscall.CLONE3), ctypes.byref(buffer), ctypes.c_size_t(len(arguments))
    )
    if pid == 0:
        api.PyOS_AfterFork_Child()
        return 0, -1
    number = ctypes.get_errno()
    api.PyOS_AfterFork_Parent()
    if pid < 0:
        raise syscall.KernelError(number, "clone3")
    return pid, pidfd.value


# PyDLL keeps the interpreter lock during the call: another thread of the parent could not exist, but the
# child must not find the lock given away at the moment of its birth.
_raw_syscall = ctypes.PyDLL(None, use_errno=True)["syscall"]
_raw_syscall.restype = ctypes.c_long


def pidfd_open(pid: int) -> int:
    """Return a pidfd of `pid`."""
    return check(syscall.call(syscall.PIDFD_OPEN, pid, 0), "pidfd_open", str(pid))


def pidfd_send_signal(pidfd: int, signal_number: int) -> None:
    """Send a signal to exactly the process the pidfd stands for."""
    check(syscall.call(syscall.PIDFD_SEND_SIGNAL, pidfd, signal_number, None, 0), "pidfd_send_signal")


def signal_group(leader_fd: int, leader: int, signal_number: int) -> None:
    """Send a signal to every process of the group that a child of ours leads; OSError when it leads none.

    The child may have ended, but must not be reaped: its number is nobody else's until then. All in its group
    descend from it, because setpgid(2) does not join a group of another session.
    """
    try:
        result = syscall.call(
            syscall.PIDFD_SEND_SIGNAL, leader_fd, signal_number, None, _PIDFD_SIGNAL_PROCESS_GROUP
        )
        check(result, "pidfd_send_signal")
    except OSError as error:
        if error.errno != errno.EINVAL:  # the flag came with Linux 6.9
            raise
        os.killpg(leader, signal_number)


def ended_status(pid: int) -> int | None:
    """Return the wait status of a child that ended, which stays to be reaped; None while it runs.

    Raises ChildProcessError for a process that is not our child.
    """
    info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if info is None:
        return None
    if info.si_code == os.CLD_EXITED:
        return (info.si_status & 0xFF) << 8
    return info.si_status | (0x80 if info.si_code == os.CLD_DUMPED else 0)


def reap(pid: int) -> None:
    """Let go of a child that ended; one that is not (or no longer) ours is no error."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def close_range(first: int, last: int = 0xFFFFFFFF) -> None:
    """Close every descriptor from first to last."""
    check(syscall.call(syscall.CLOSE_RANGE, first, last, 0), "close_range")


def close_all_but(keep: list[int]) -> None:
    """Close every descriptor above 2 that is not in `keep`."""
    next_fd = 3
    for fd in sorted(set(keep)):
        if fd > next_fd:
            close_range(next_fd, fd - 1)
        next_fd = max(next_fd, fd + 1)
    close_range(next_fd)


def set_name(name: str) -> None:
    """Set the name that ps shows for this process (at most 15 bytes; proc_pid_comm(5))."""
    with open("/proc/self/comm", "w", encoding="ascii") as comm:
        comm.write(name)


def join_new_session_keyring() -> None:
    """Leave the session keyring that was inherited, so that the host's keys are out of reach.

    A kernel without keyrings, or a filter that refuses them, leaves nothing to inherit.
    """
    syscall.call(syscall.old_number("keyctl"), _KEYCTL_JOIN_SESSION_KEYRING, None)


def load_seccomp(program: bytes) -> None:
    """Install a compiled filter (an array of struct sock_filter) on this process for good."""
    instructions = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: unsigned short length, pointer.
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    buffer = ctypes.create_string_buffer(header, len(header))
    result = _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(buffer), 0, 0)
    check(result, "prctl(PR_SET_SECCOMP)")


def start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot (proc_pid_stat(5), field 22)."""
    with open(f"/proc/{pid}/stat", "rb") as stat:
        return int(stat.read().rpartition(b")")[2].split()[19])


def zombie_status(pid: int, begun: int) -> int | None:
    """Return the wait status of a process that ended, whoever its parent is, until that has reaped it.

    None for one that runs, is gone, or is another than the one that started at `begun`. Field 52 of
    proc_pid_stat(5), which root may read; of a pid namespace's init it tells halt and reboot like wait does.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[49]) if fields[0] == b"Z" and int(fields[19]) == begun else None


def boot_id() -> str:
    """Return the id of the running boot of this machine."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


class ProgramFailed(SysctrError):
    """An external program exited with a status other than 0; the message holds its own last words."""


class Completed:
    """What an external program left: its exit status and output."""

    def __init__(self, returncode: int, stdout: bytes, stderr: bytes) -> None:
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr


def run(
    argv: list[str],
    *,
    input: bytes | None = None,  # noqa: A002 - the name subprocess uses
    env: dict[str, str] | None = None,
    timeout_s: float | None = 60,
    stdout_fd: int | None = None,
    pass_fds: tuple[int, ...] = (),
    accept: tuple[int, ...] = (0,),
) -> Completed:
    """Run a program to its end, without a shell and with an environment made from nothing.

    Raises ProgramFailed when it is missing, does not end within `timeout_s`, or ends with a status that
    is not in `accept`.
    """
    import subprocess  # the supervisor imports this module and runs no programs: 10 ms and 1 MB saved

    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
    environment.update(env or {})
    try:
        done = subprocess.run(
            argv,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            stdout=subprocess.PIPE if stdout_fd is None else stdout_fd,
            stderr=subprocess.PIPE,
            env=environment,
            timeout=timeout_s,
            pass_fds=pass_fds,
            check=False,
        )
    except FileNotFoundError as error:
        raise ProgramFailed(f"cannot run {argv[0]}: it is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise ProgramFailed(f"cannot run {argv[0]}: it did not end within {timeout_s:g} s") from error
    if done.returncode not in accept:
        words = done.stderr.decode(errors="replace").strip()[-2000:] or f"exit status {done.returncode}"
        raise ProgramFailed(f"cannot run {argv[0]}: {words}")
    return Completed(done.returncode, done.stdout or b"", done.stderr)
