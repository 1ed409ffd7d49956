"""Who one is inside (security.md S5-S8, S23-S27, S33, S38, S39): nobody with a right on the host."""

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import stat
import sys
from pathlib import Path

import pytest

from sysctr.linux import mount, process
from tests.attack.inside import Inside, init_pid, inside
from tests.node import Node
from tests.system.guests import create, shell
from tests.system.guests import inside as output
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox")]

PTRACE_SEIZE, WALL = 0x4206, 0x40000000


def test_nothing_is_inherited(shared_host: Node, evil: str) -> None:
    host = shared_host
    environment = {"LD_PRELOAD": "/nowhere.so", "SECRET": "of the host"}
    script = "ls -l /proc/self/fd /proc/1/fd; id; env; cat /proc/self/status; cat /proc/1/environ"
    done = host.run("exec", evil, "--", "/bin/sh", "-c", script, env=environment)
    assert "SECRET" not in done.out
    assert "LD_PRELOAD" not in done.out
    targets = [line.partition(" -> ")[2] for line in done.out.splitlines() if " -> " in line]
    assert all(t.startswith(("pipe:", "/dev/pts/", "/dev/null", "/proc/")) or not t for t in targets), targets
    fields = dict(line.split(":\t", 1) for line in done.out.splitlines() if ":\t" in line)
    assert fields["Groups"].strip() == ""
    assert int(fields["CapInh"], 16) == 0
    assert int(fields["CapAmb"], 16) == 0
    assert fields["Seccomp"] == "2"
    for pid in (init_pid(host, evil),):
        assert len(os.listdir(f"/proc/{pid}/fd")) <= 4
        status = Path(f"/proc/{pid}/status").read_text()
        assert "Groups:\t \n" in status or "Groups:\t\n" in status
        assert "CapInh:\t0000000000000000" in status


def test_a_user_gets_its_groups_and_no_others(shared_host: Node, evil: str) -> None:
    script = "id; cat /proc/self/status"
    done = shared_host.run("exec", "--user", "www-data", evil, "--", "/bin/sh", "-c", script)
    assert "uid=33(www-data) gid=33(www-data)" in done.out
    assert "groups=33(www-data)" in done.out or "groups" not in done.out.splitlines()[0]
    assert "CapEff:\t0000000000000000" in done.out


def watch_for_newcomers() -> object:
    """Try to get hold of every process that appears in this pid namespace, until one is called "the end"."""
    libc = ctypes.CDLL(None, use_errno=True)
    got, seen = [], {pid for pid in os.listdir("/proc") if pid.isdigit()}
    while True:
        # Whom we trace we also have to reap, or its own parent waits.
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG | WALL)[0]:
                pass
        for pid in os.listdir("/proc"):
            if not pid.isdigit() or int(pid) == os.getpid() or pid in seen:
                continue
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"the-end" in command:
                    return got
                # Before its exec it still has the supervisor's memory, descriptors and environment.
                if b"runtime" in command or b"python" in command:
                    for name in ("mem", "environ", "maps", "cwd/", "fd/0", "root/"):
                        with contextlib.suppress(OSError):
                            os.close(os.open(f"/proc/{pid}/{name}", os.O_RDONLY))
                            if b"python" in Path(f"/proc/{pid}/cmdline").read_bytes():
                                got.append(f"opened {name}")
                    traced = libc.ptrace(PTRACE_SEIZE, int(pid), None, None) == 0
                    # Still the old program, so it was that which let itself be traced.
                    if traced and b"python" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        got.append("traced it")


def test_a_process_that_joins_cannot_be_taken_over(shared_host: Node) -> None:
    host = shared_host
    ref = create(host)
    with Inside(init_pid(host, ref), watch_for_newcomers) as attack:
        for _ in range(15):
            host.run("exec", ref, "--", "true", check=False, timeout_s=20)
        # The last command is not sleep: the shell, whose arguments say "the end", would become it.
        end = host.popen("exec", ref, "--", "sh", "-c", ": the-end; sleep 1000; :")
        assert attack.result(60) == []
    end.kill()
    host.run("destroy", ref, "--force", "--yes")


def test_the_hosts_interpreter_cannot_be_reached_as_ones_own(shared_host: Node) -> None:
    """CVE-2019-5736: the program that is executed inside is a link to the one that executes it."""
    host = shared_host
    ref = create(host)
    shell(host, ref, "ln -s /proc/self/exe /bin/loop; echo '#!/proc/self/exe' > /bin/script")
    shell(host, ref, "chmod 755 /bin/script")

    def interpreter() -> tuple[int, int, int]:
        found = os.stat(os.path.realpath(sys.executable))
        return found.st_ino, found.st_size, found.st_mtime_ns

    before = interpreter()
    for program in ("/bin/loop", "/bin/script", "/proc/self/exe"):
        host.run("exec", ref, "--", program, "-c", "open('/proc/self/exe', 'r+b')", check=False)

    def attack() -> list[str]:
        got = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            for flags in (os.O_WRONLY, os.O_RDWR):
                with contextlib.suppress(OSError):
                    os.close(os.open(f"/proc/{pid}/exe", flags))
                    got.append(pid)
        return got

    assert inside(init_pid(host, ref), attack) == []
    assert interpreter() == before
    host.run("destroy", ref, "--force", "--yes")


def test_abstract_sockets_of_the_host_are_out_of_reach(shared_host: Node, evil: str) -> None:
    name = f"\0sysctr-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()

        def attack() -> bool:
            with socket.socket(socket.AF_UNIX) as sock:
                try:
                    sock.connect(name)
                except OSError:
                    return False
                return True

        assert inside(init_pid(shared_host, evil), attack) is False


def test_sockets_and_state_are_roots_alone(shared_host: Node) -> None:
    where = shared_host.layout
    modes = {path: stat.S_IMODE(os.stat(path).st_mode) for path in (
        where.plan_socket, where.ticket_socket, where.api_socket, where.consoles, where.supervised, where.lib,
        where.pool, where.containers, where.container_configs,
    )}  # fmt: skip
    assert modes[where.plan_socket] == 0o600
    assert modes[where.ticket_socket] == modes[where.api_socket] == 0o660
    for path in (where.consoles, where.supervised, where.lib, where.pool, where.containers):
        assert modes[path] == 0o700, path
    for path in modes:
        assert os.stat(path).st_uid == 0


def test_no_hierarchy_shows_the_hosts_cgroups(shared_host: Node) -> None:
    """Its root may mount every v1 hierarchy, and sees it from the root of its cgroup namespace."""
    host = shared_host
    ref = create(host)
    program = host.popen("exec", ref, "--", "sleep", "1000")
    init = init_pid(host, ref)
    wait_until(lambda: len(processes(init)) > 1, what="a program beside init")
    for pid in processes(init):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            assert line.split(":", 2)[2].startswith(f"/{host.layout.cgroup}"), (pid, line)
    program.kill()
    host.run("destroy", ref, "--force", "--yes")


def processes(init: int) -> list[int]:
    """Return the processes in the pid namespace of an init."""
    namespace = os.readlink(f"/proc/{init}/ns/pid")
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{entry}/ns/pid") == namespace:
                found.append(int(entry))
    return found


def test_limits_cannot_be_raised_from_inside(shared_host: Node) -> None:
    host = shared_host
    ref = create(host, "--memory", "64M", "--set", "limits.pids=100", start=True)

    def attack() -> list[str]:
        got = []
        os.makedirs("/mnt/cg", exist_ok=True)
        roots = ["/sys/fs/cgroup"]
        for controller in ("memory", "pids", "cpu", "cpuset", "freezer", "devices", "blkio"):
            path = f"/mnt/cg/{controller}"
            os.makedirs(path, exist_ok=True)
            with contextlib.suppress(OSError):
                mount.mount("cgroup", path, "cgroup", 0, controller)
                roots.append(path)
        wanted = {
            "memory.max": "max", "memory.limit_in_bytes": "-1", "pids.max": "max", "cpu.max": "max",
            "cpuset.cpus": "0-1", "release_agent": "/evil", "notify_on_release": "1", "cgroup.freeze": "0",
            "cgroup.max.descendants": "max", "cgroup.clone_children": "1", "devices.allow": "a",
        }  # fmt: skip
        for root in roots:
            for base in (root, f"{root}/.sysctr", f"{root}/..", f"{root}/../.."):
                for name, value in wanted.items():
                    with contextlib.suppress(OSError):
                        fd = os.open(f"{base}/{name}", os.O_WRONLY)
                        os.write(fd, value.encode())
                        got.append(f"{base}/{name}")
        return got

    init = init_pid(host, ref)
    assert inside(init, attack) == []
    assert host.json("info", ref)["memory_max_bytes"] == 64 << 20
    # Everybody inside may read the tree, as systemd's user sessions do.
    assert host.run("exec", "--user", "www-data", ref, "--", "ls", "/sys/fs/cgroup").out.strip()
    host.run("destroy", ref, "--force", "--yes")


def test_no_process_can_be_moved_or_signalled_outside(shared_host: Node, evil: str, victim: str) -> None:
    other = init_pid(shared_host, victim)
    services = list(shared_host.pids().values())

    def attack() -> list[str]:
        got = []
        for pid in (*services, other):
            with contextlib.suppress(OSError):
                Path("/sys/fs/cgroup/cgroup.procs").write_text(str(pid))
                got.append(f"moved {pid}")
        # To the process group and to everybody: the supervisor and other containers may be in either.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        for group in (0, -1):
            with contextlib.suppress(OSError):
                os.kill(group, signal.SIGUSR2)
        return got

    assert inside(init_pid(shared_host, evil), attack) == []
    assert list(shared_host.pids().values()) == services
    assert output(shared_host, victim, "echo on") == "on"


def test_ranges_of_ids_do_not_overlap(shared_host: Node, evil: str, victim: str) -> None:
    host = shared_host
    maps = []
    for ref in (evil, victim):
        for kind in ("uid_map", "gid_map"):
            text = Path(f"/proc/{init_pid(host, ref)}/{kind}").read_text()
            rows = [[int(word) for word in line.split()] for line in text.splitlines()]
            assert all(first >= 65536 for _, first, _ in rows)
        maps += [range(first, first + count) for _, first, count in rows]
    maps.sort(key=lambda ids: ids.start)
    assert all(before.stop <= after.start for before, after in itertools.pairwise(maps))


def test_a_keyring_of_its_own(shared_host: Node, evil: str) -> None:
    def attack() -> int:
        return ctypes.CDLL(None).syscall(ctypes.c_long(process.syscall.old_number("keyctl")), 0, -3, 0)

    # The session keyring of the host's shell is not ours (the filter is for init's own children only).
    keys = inside(init_pid(shared_host, evil), attack)
    assert keys == -1 or keys != ctypes.CDLL(None).syscall(ctypes.c_long(250), 0, -3, 0)


def test_pid_one_cannot_be_frozen_against_a_stop(shared_host: Node) -> None:
    host = shared_host
    ref = create(host)

    def attack() -> int:
        os.mkdir("/sys/fs/cgroup/trap")
        Path("/sys/fs/cgroup/trap/cgroup.procs").write_text("1")
        return Path("/sys/fs/cgroup/trap/cgroup.freeze").write_text("1")

    assert inside(init_pid(host, ref), attack) == 1
    host.run("stop", ref, "--timeout", "1", timeout_s=20)
    wait_until(lambda: host.state(ref) == "stopped", what="stopped")
    host.run("destroy", ref, "--yes")
