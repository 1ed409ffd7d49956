"""What a child of the supervisor does between its birth and its program.

Everything is imported before a namespace is entered: inside, the host's Python tree is out of sight. A
failure is sent to the supervisor as the number and the description of the step; success is the end of the
file, because the socket is close-on-exec.
"""

import errno
import fcntl
import gc
import os
import resource
import signal
import socket
import stat
import sys

from sysctr.linux import mount, process, tty
from sysctr.runtime import steps, steps_mounts, wire
from sysctr.runtime.accounts import DEFAULT_PATH, find_user
from sysctr.runtime.binds import open_locked

JOIN_NAMESPACES = (
    process.CLONE_NEWNS
    | process.CLONE_NEWPID
    | process.CLONE_NEWIPC
    | process.CLONE_NEWUTS
    | process.CLONE_NEWNET
    | process.CLONE_NEWCGROUP
)


_OPEN_FILES = 1024
# Above every descriptor that a program is given.
_OUT_OF_THE_WAY = 64


class StepFailed(Exception):
    """A step of a plan failed; carries its number, the number of steps, its description and the reason."""


def run_plan(sync: socket.socket, plan: dict) -> None:
    """Carry out a plan in a freshly cloned child and execute its program; never returns."""
    try:
        _reset_process()
        if "stdio" in plan:
            # Its number may be one that the program is to get, and it has to live until the exec.
            sync = socket.socket(fileno=_out_of_the_way(sync.fileno()))
        process.close_all_but([sync.fileno(), *plan.get("stdio", ()), *plan.get("helper", ())])
        _enter_cgroups(plan)
        program = plan["program"]
        builtin = _load_builtin(program) if "builtin" in program else None
        message, fds = wire.receive(sync)
        trees = dict(zip(message["trees"], fds, strict=True))
        trees |= _open_sources(plan.get("sources", ()))
        # A path of the host: after this process became the container's root it could not walk there.
        context = steps.Context(trees, os.open(plan["stage"], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        context.helper_fd = plan["helper"][0] if "helper" in plan else -1
        if plan.get("network"):
            _enter_network(sync)
        _become_root()
        if "stdio" in plan:
            # A job ends with the supervisor, which alone knows that its upper is mounted. After the change of
            # ids, which takes it back; a supervisor that died before is found out at the socket.
            process.prctl(process.PR_SET_PDEATHSIG, signal.SIGKILL)
        _close_imports()
        every = [steps.from_json(step) for step in (*plan["prepare"], *plan.get("enter", ()))]
        prepare = len(plan["prepare"])
        _execute(every, range(prepare), context)
        wire.send(sync, {"prepared": list(context.handed)}, list(context.handed.values()))
        for fd in context.handed.values():
            os.close(fd)
        wire.receive_plain(sync)  # the supervisor says when cgroups and network are in place
        _execute(every, range(prepare, len(every)), context)
        if "stdio" in plan:
            _set_stdio(plan["stdio"])
        else:
            _set_stdio([context.console_fd] * 3)
        if builtin:
            builtin(sync, program)
            os._exit(0)
        _start_program(program)
    except BaseException as error:
        _report(sync, error, plan["program"])
    os._exit(125)


def join_container(sync: socket.socket, pidfd: int, request: dict, stdio: "list[int]") -> None:
    """Enter a running container and execute a program there; never returns.

    The caller's descriptors are gone before the first namespace is joined, and this process is not dumpable
    until its exec, so the container's root can neither ptrace it nor read its memory.
    """
    try:
        _reset_process()
        process.close_all_but([sync.fileno(), pidfd, *stdio])
        process.prctl(process.PR_SET_DUMPABLE, 0)
        _enter_cgroups(request)
        program = request["program"]
        builtin = _load_builtin(program) if "builtin" in program else None
        process.setns(pidfd, process.CLONE_NEWUSER)
        _become_root()
        process.prctl(process.PR_SET_DUMPABLE, 0)
        _close_imports()
        if builtin:
            process.setns(pidfd, process.CLONE_NEWNS)
            _set_stdio(stdio)
            wire.send(sync, {"started": os.getpid()})
            builtin(sync, program)
            os._exit(0)
        process.setns(pidfd, JOIN_NAMESPACES)
        os.close(pidfd)
        if request.get("tty"):
            stdio = [_open_terminal(sync, request["tty"])] * 3
        # Only a child is inside the pid namespace; as the supervisor's own child its end is waited for there.
        pid, child_fd = process.clone(process.CLONE_PARENT)
        if pid:
            wire.send(sync, {"started": pid}, [child_fd])
            os._exit(0)
        os.setsid()
        process.join_new_session_keyring()
        _set_stdio(stdio)
        if request.get("tty"):
            tty.make_controlling(0)
        _start_program(program)
    except BaseException as error:
        _report(sync, error, request["program"])
    os._exit(125)


def change_mounts(sync: socket.socket, pidfd: int, request: dict) -> None:
    """Attach mounts in a running container and take others off; never returns.

    request["mounts"]: binds (see open_locked), prepare and attach (steps), stage. What is mounted is prepared
    before the container's mount namespace is entered; no other descriptor of the host comes along.
    """
    work = request["mounts"]
    try:
        _reset_process()
        process.close_all_but([sync.fileno(), pidfd])
        userns_fd = _user_namespace(pidfd)
        try:
            trees = open_locked(work["binds"], userns_fd, work["stage"])
        except (OSError, ValueError) as error:
            total = len(work["prepare"]) + len(work["attach"])
            what = steps_mounts.Sources().describe()
            raise StepFailed(1, total, what, str(error), _errno(error)) from error
        os.close(userns_fd)
        _become_root()
        process.prctl(process.PR_SET_DUMPABLE, 0)
        _close_imports()
        every = [steps.from_json(step) for step in (*work["prepare"], *work["attach"])]
        prepare = len(work["prepare"])
        # A staging directory in which this root may write, over the one that the trees came from.
        context = steps.Context(trees, os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        steps.Stage().execute(context)
        _execute(every, range(prepare), context)
        process.setns(pidfd, process.CLONE_NEWNS)
        context.root_fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        _execute(every, range(prepare, len(every)), context)
        wire.send(sync, {"started": os.getpid()})
        os._exit(0)
    except BaseException as error:
        _report(sync, error, request["program"])
    os._exit(125)


def _user_namespace(pidfd: int) -> int:
    """Return the user namespace of a process that is known by its pidfd."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
        pid = next(int(line.split()[1]) for line in file if line.startswith("Pid:"))
    if pid <= 0:
        raise LookupError("the container ended")
    userns_fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    # The number may be another process's by now; but if the first one lives still, it was its own.
    process.pidfd_send_signal(pidfd, 0)
    return userns_fd


def _reset_process() -> None:
    """Take back what the supervisor set for itself, and what a plain process does not inherit."""
    gc.disable()
    # Python ignores SIGPIPE and SIGXFSZ, and an ignored signal stays ignored over exec.
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # The soft limit every distribution's init expects; more makes old programs close a million descriptors.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(_OPEN_FILES, hard), hard))
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:
        score.write("0")  # the daemon's own is lower, and descends through keeper and supervisor


def _close_imports() -> None:
    """Let nothing be imported from here on: the files below sys.path are the container's now, not ours."""
    sys.meta_path.clear()
    sys.path.clear()


def _enter_cgroups(request: dict) -> None:
    # As a single thread that moves itself, still root of the host: such a write waits for no grace period
    # (kernel commit 9a3284fad42f), a write of the pid from outside does, 4 to 17 ms.
    for tasks in request.get("cgroup", {}).get("tasks", ()):
        with open(tasks, "w", encoding="ascii") as file:
            file.write("0")


def _become_root() -> None:
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _open_sources(sources: "list[dict]") -> "dict[str, int]":
    """Open host paths while the file system still sees the host's uid.

    The copies come from this mount namespace, whose owner is the new user namespace: the flags of the host's
    mounts are locked on them, so no remount inside can make them wider.
    """
    opened = {}
    for source in sources:
        try:
            opened[source["tree"]] = mount.open_tree(source["path"])
        except OSError:
            if not source.get("optional"):
                raise
    return opened


def _enter_network(sync: socket.socket) -> None:
    # After the user namespace, so that the container owns its network (and may mount its own sysfs).
    process.unshare(process.CLONE_NEWNET)
    # The daemon configures addresses through this socket from outside, without a process entering.
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as netlink:
        wire.send(sync, {"network": True}, [netlink.fileno()])


def _execute(every: list, numbers: range, context: steps.Context) -> None:
    for number in numbers:
        step = every[number]
        try:
            step.execute(context)
        except (OSError, ValueError) as error:
            raise StepFailed(number + 1, len(every), step.describe(), str(error), _errno(error)) from error


def _set_stdio(fds: "list[int]") -> None:
    """Give the program these descriptors as 0, 1, 2 and, for a job, from 3 on."""
    for target, fd in enumerate([_out_of_the_way(fd) for fd in fds]):
        os.dup2(fd, target, inheritable=True)


def _out_of_the_way(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _OUT_OF_THE_WAY)


def _open_terminal(sync: socket.socket, size: dict) -> int:
    master_fd, slave_fd, number = tty.open_pty()
    tty.set_window_size(master_fd, size.get("rows", 24), size.get("cols", 80))
    os.fchmod(slave_fd, 0o620)
    wire.send(sync, {"terminal": number}, [master_fd])
    os.close(master_fd)
    return slave_fd


def _start_program(program: dict) -> None:
    if program.get("clean"):
        # Init: its environment is all in the plan, and no file of the guest has a say in how it starts.
        user = {"uid": 0, "gid": 0, "groups": [], "home": "/", "shell": "/bin/sh", "environment": {}}
    else:
        user = find_user(program.get("user", "root"))
    environment = {"PATH": DEFAULT_PATH, **user["environment"], **program.get("environment", {})}
    argv = program["argv"] or [user["shell"]]
    executable = argv[0]
    if not program["argv"] or program.get("login"):
        argv = ["-" + os.path.basename(executable), *argv[1:]]
    os.umask(program.get("umask", 0o022))
    _change_directory(program.get("cwd") or user["home"], required=bool(program.get("cwd")))
    if program.get("seccomp"):
        # Before the ids change: without no_new_privs, loading a filter needs CAP_SYS_ADMIN here.
        process.load_seccomp(bytes.fromhex(program["seccomp"]))
    if user["uid"] or user["gid"] or user["groups"]:
        _give_stdio(user["uid"])
        os.setgroups(user["groups"])
        os.setresgid(user["gid"], user["gid"], user["gid"])
        os.setresuid(user["uid"], user["uid"], user["uid"])
    _exec(executable, argv, environment)


def _give_stdio(uid: int) -> None:
    """Let the user open /dev/stdout and the terminal by their names, as login does; /dev/null stays."""
    for fd in range(3):
        if os.isatty(fd) or stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.fchown(fd, uid, -1)


def _exec(executable: str, argv: "list[str]", environment: "dict[str, str]") -> None:
    if "/" in executable:
        os.execve(executable, argv, environment)
    denied = None
    for directory in environment.get("PATH", DEFAULT_PATH).split(":"):
        try:
            os.execve(f"{directory or '.'}/{executable}", argv, environment)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            denied = error
    raise denied or FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), executable)


def _change_directory(directory: str, *, required: bool) -> None:
    try:
        os.chdir(directory)
    except OSError as error:
        if required:
            # Without its number, which would say of the program that it is missing.
            reason = _reason(OSError(error.errno, error.strerror))
            raise LookupError(f"working directory {directory}: {reason}") from error
        os.chdir("/")


def _load_builtin(program: dict):
    from sysctr.runtime import files  # tarfile is 15 ms and 2 MB: paid by the child that needs it, not by all

    return files.BUILTINS[program["builtin"]]


def _errno(error: BaseException) -> int:
    return getattr(error, "errno", None) or 0


def _purpose(program: dict) -> str:
    if "builtin" not in program:
        return f"execute {program['argv'][0] if program['argv'] else 'the login shell'}"
    where = program.get("path") or ", ".join(program.get("paths", ()))
    return {"untar": f"push to {where}", "tar": f"pull {where}"}.get(program["builtin"], "change its files")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        named = f": {error.filename}" if error.filename else ""
        return f"{error.strerror[:1].lower()}{error.strerror[1:]}{named}"
    return str(error) if isinstance(error, LookupError) else f"{type(error).__name__}: {error}"


def _report(sync: socket.socket, error: BaseException, program: dict) -> None:
    if isinstance(error, StepFailed):
        number, total, description, reason, code = error.args
        message = {"step": number, "of": total, "description": description, "reason": reason, "errno": code}
    else:
        purpose, reason = _purpose(program), _reason(error)
        if isinstance(error, OSError) and error.filename and purpose.endswith(f" {error.filename}"):
            reason = reason.removesuffix(f": {error.filename}")  # it is named already
        message = {"reason": f"cannot {purpose}: {reason}", "errno": _errno(error)}
    try:
        wire.send(sync, {"failed": message})
    except (OSError, wire.WireError):
        pass  # nobody listens any more; the exit status says that it failed
