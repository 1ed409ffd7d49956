"""What a container sees of its manager: the systemd Container Interface, and nothing of the host."""

import json
import os
import re
import sys
import uuid

import pytest

from tests.node import Node
from tests.system.guests import create, inside, lines, new_name, shell
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "overlay", "veth", "nft", "busybox")]
debian = pytest.mark.needs("mmdebstrap", "net")

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NODES = {"null", "zero", "full", "random", "urandom", "tty", "console"}
_LINKS = {"fd", "stdin", "stdout", "stderr", "ptmx"}


def variables(text: str, separator: str) -> dict[str, str]:
    return dict(item.split("=", 1) for item in text.split(separator) if item)


@debian
def test_debian_boots_and_says_running_with_no_failed_unit(debian_host: Node) -> None:
    assert inside(debian_host, "deb", "systemctl is-system-running") == "running"
    assert inside(debian_host, "deb", "systemctl list-units --failed --no-legend --plain") == ""
    assert inside(debian_host, "deb", "systemd-detect-virt --container") == "lxc"
    entry = debian_host.json("list")[0]
    assert (entry["state"], entry["booted"]) == ("running", True)


@debian
def test_a_container_counts_as_booted_when_its_own_init_says_so(debian_host: Node) -> None:
    name = create(debian_host, "--set", "init=/sbin/late", template="debian-12", start=False)
    script = b"#!/bin/sh\nuntil [ -e /run/go ]; do sleep 0.05; done\nexec /sbin/init\n"
    debian_host.run("push", "--mode", "0755", "-", f"{name}:/sbin/late", stdin=script)
    debian_host.run("start", name)
    assert debian_host.json("status", name)["booted"] is False
    assert "booting" in debian_host.run("list").out
    # What any other process says does not count.
    shell(debian_host, name, "NOTIFY_SOCKET=/run/host/notify systemd-notify --ready")
    assert debian_host.run("wait", name, "--timeout", "0.3", check=False).status == 4
    shell(debian_host, name, "touch /run/go")
    debian_host.wait(name, "booted")
    assert debian_host.json("status", name)["booted"] is True
    debian_host.run("destroy", "--yes", "--force", name)


@debian
def test_systemd_shuts_down_in_good_order_and_reboots_from_inside(debian_host: Node) -> None:
    name = create(debian_host, template="debian-12")
    debian_host.wait(name, "booted")
    before = debian_host.json("info", name)
    first = inside(debian_host, name, "cat /etc/machine-id /proc/sys/kernel/random/boot_id").split()
    shell(debian_host, name, "systemctl reboot", check=False)
    wait_until(lambda: debian_host.json("info", name)["pid"] not in (None, before["pid"]), 30, "it rebooted")
    debian_host.wait(name, "booted")
    second = inside(debian_host, name, "cat /etc/machine-id /proc/sys/kernel/random/boot_id").split()
    assert (second[0] == first[0], second[1] != first[1]) == (True, True)
    assert first[0] == before["uuid"].replace("-", "")
    boots = inside(debian_host, name, "journalctl --list-boots --quiet | wc -l")
    assert boots == "2", "each start is a boot of its own in the journal"
    debian_host.run("shutdown", name, "--timeout", "30")
    assert debian_host.json("status", name)["exit"]["reason"] == "halt"
    debian_host.run("destroy", "--yes", name)


@debian
def test_a_service_that_systemd_shuts_in_finds_its_sandbox(debian_host: Node) -> None:
    hardened = (
        "systemd-run --quiet --wait --pipe -p PrivateTmp=yes -p ProtectSystem=strict -p ProtectHome=yes "
        "-p PrivateDevices=yes -p InaccessiblePaths=/srv -p ProtectKernelTunables=yes "
        "/bin/sh -c 'ls /srv; touch /etc/x 2>&1; cat /proc/self/cgroup | tail -1'"
    )
    shell(debian_host, "deb", "touch /srv/hidden")
    said = inside(debian_host, "deb", hardened).split("\n")
    assert said[0] == "touch: cannot touch '/etc/x': Read-only file system"
    assert re.fullmatch(r"0::/system\.slice/run-u\d+\.service", said[1])


@debian
def test_a_nested_user_namespace_may_mount_a_fresh_proc(debian_host: Node) -> None:
    assert inside(debian_host, "deb", "stat -c %a /dev/.sysctr") == "700"
    nested = "unshare --user --map-root-user --mount --pid --fork --mount-proc sh -c 'echo $$'"
    assert inside(debian_host, "deb", nested) == "1"


@debian
def test_refused_system_calls_are_not_implemented(debian_host: Node) -> None:
    # keyctl(KEYCTL_GET_KEYRING_ID, …) by its number on this machine; EPERM would stop systemd-networkd.
    number = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
    tried = inside(debian_host, "deb", f"perl -e 'print syscall({number}, 0, -3, 0), q( ), $! + 0'")
    assert tried == "-1 38"


def test_init_gets_the_environment_of_the_container_interface_and_nothing_else(
    shared_host: Node, tiny: str
) -> None:
    release = {}
    with open("/etc/os-release", encoding="utf-8") as file:
        release = {key: value.strip("\"'") for key, value in variables(file.read(), "\n").items()}
    expected = {
        "PATH": _PATH, "TERM": "linux", "container": "lxc",
        "container_uuid": shared_host.json("info", tiny)["uuid"], "NOTIFY_SOCKET": "/run/host/notify",
        "CREDENTIALS_DIRECTORY": "/run/host/credentials",
    }  # fmt: skip
    for key in ("ID", "BUILD_ID", "VARIANT_ID", "VERSION_ID"):
        if key in release:
            expected[f"container_host_{key.lower()}"] = release[key]
    assert variables(shell(shared_host, tiny, "cat /proc/1/environ").out, "\0") == expected


def test_a_program_gets_nothing_of_the_callers_environment(shared_host: Node, tiny: str) -> None:
    done = shared_host.run("exec", tiny, "--", "/bin/busybox", "env", env={"SECRET": "of the host"})
    assert variables(done.out, "\n") == {
        "PATH": _PATH, "HOME": "/root", "USER": "root", "LOGNAME": "root", "SHELL": "/bin/sh",
        "container": "lxc",
    }  # fmt: skip


def test_two_containers_have_two_uuids_which_they_can_read(shared_host: Node, tiny: str) -> None:
    other = create(shared_host)
    seen = [inside(shared_host, name, "cat /run/host/container-uuid") for name in (tiny, other)]
    assert len(set(seen)) == 2
    assert [str(uuid.UUID(text)) for text in seen] == seen
    assert seen[0] == shared_host.json("info", tiny)["uuid"]
    shared_host.run("destroy", "--yes", "--force", other)


def test_run_host_tells_who_manages_the_container(shared_host: Node, tiny: str) -> None:
    assert inside(shared_host, tiny, "cat /run/host/container-manager") == "lxc"
    with open("/etc/os-release", encoding="utf-8") as file:
        assert shell(shared_host, tiny, "cat /run/host/os-release").out == file.read()
    listed = lines(shared_host, tiny, "cd /run/host && stat -c '%A %n' * inaccessible/*")
    assert dict(reversed(line.split()) for line in listed) == {
        "container-manager": "-r--r--r--", "container-uuid": "-r--r--r--", "os-release": "-r--r--r--",
        "credentials": "dr-x------", "inaccessible": "drwxr-xr-x", "incoming": "drw-------",
        "notify": "srw-rw-rw-", "inaccessible/dir": "d---------", "inaccessible/fifo": "p---------",
        "inaccessible/reg": "----------", "inaccessible/sock": "s---------",
    }  # fmt: skip
    assert shell(shared_host, tiny, "touch /run/host/credentials/x", check=False).status == 1


def test_the_boot_id_is_the_containers_own_and_cannot_be_removed(shared_host: Node, tiny: str) -> None:
    path = "/proc/sys/kernel/random/boot_id"
    with open(path, encoding="ascii") as file:
        of_the_host = file.read().strip()
    first = inside(shared_host, tiny, f"cat {path}")
    assert first == inside(shared_host, tiny, f"cat {path}") != of_the_host
    assert str(uuid.UUID(first)) == first
    assert shell(shared_host, tiny, f"echo x > {path}", check=False).status == 1


def test_no_descriptor_of_the_host_is_open_in_init_or_in_a_program(shared_host: Node, tiny: str) -> None:
    of_init = lines(shared_host, tiny, "cd /proc/1/fd; for n in *; do echo $n $(readlink $n); done")
    assert of_init == ["0 /dev/pts/0", "1 /dev/pts/0", "2 /dev/pts/0"]
    # A program of its own, so that no shell has opened anything.
    done = shared_host.run("exec", tiny, "--", "ls", "-l", "/proc/self/fd")
    open_ones = [line.split(" -> ") for line in done.out.splitlines() if " -> " in line or line.endswith("3")]
    assert [head[0].split()[-1] for head in open_ones] == ["0", "1", "2", "3"]
    assert all(target.startswith("pipe:") for _, target in open_ones[:3]), "3 is the directory ls reads"


def test_the_ids_inside_are_not_those_of_the_host(shared_host: Node, tiny: str) -> None:
    info = shared_host.json("info", tiny)
    first, count = info["idmap"]["first"], info["idmap"]["count"]
    assert inside(shared_host, tiny, "cat /proc/self/uid_map").split() == ["0", str(first), str(count)]
    assert inside(shared_host, tiny, "cat /proc/self/gid_map").split() == ["0", str(first), str(count)]
    assert first >= 65536
    with open(f"/proc/{info['pid']}/status", encoding="ascii") as status:
        ids = [line.split()[1:] for line in status if line.startswith(("Uid:", "Gid:"))]
    assert ids == [[str(first)] * 4] * 2
    other = create(shared_host)
    theirs = shared_host.json("info", other)["idmap"]["first"]
    assert abs(theirs - first) >= count
    shared_host.run("destroy", "--yes", "--force", other)


def test_root_inside_has_its_capabilities_a_filter_and_no_power_over_the_host(
    shared_host: Node, tiny: str
) -> None:
    for pid in ("1", "self"):
        status = variables(inside(shared_host, tiny, f"sed 's/:[[:space:]]*/=/' /proc/{pid}/status"), "\n")
        effective = int(status["CapEff"], 16)
        assert effective >> 21 & 1, "CAP_SYS_ADMIN: an init needs it"
        assert effective >> 27 & 1, "CAP_MKNOD: software asks for it"
        assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "0")
    for forbidden in (
        "mknod /root/disk b 8 0", "mount -t ext4 /dev/sda1 /mnt", "echo h > /proc/sysrq-trigger",
        "echo x > /proc/sys/kernel/core_pattern", "insmod /bin/busybox",
    ):  # fmt: skip
        assert shell(shared_host, tiny, forbidden, check=False).status != 0, forbidden


def test_the_hosts_keys_are_not_to_be_found_inside(host: Node) -> None:
    # The daemon and all that it starts descend from this program, and so inherit its session keyring.
    name = new_name("sysctr-key")
    script = (
        "import ctypes, json, subprocess, sys\n"
        "libkeyutils = ctypes.CDLL(None, use_errno=True)\n"
        f"assert libkeyutils.syscall({ {'x86_64': 250, 'aarch64': 219}[os.uname().machine] }, 1, 0) >= 0\n"
        f"assert libkeyutils.syscall({ {'x86_64': 248, 'aarch64': 217}[os.uname().machine] }, b'user', "
        f"{name!r}.encode(), b'secret', 6, -3) > 0\n"
        f"assert {name!r} in open('/proc/keys').read()\n"
        "sys.exit(subprocess.run(json.loads(sys.argv[1])).returncode)"
    )
    argv = host.argv("create", "keys", "--template", "tiny", "--start")
    host.shell(sys.executable, "-I", "-c", script, json.dumps(argv))
    for keys in (inside(host, "keys", "cat /proc/keys"), inside(host, "keys", "cat /proc/1/root/proc/keys")):
        assert "_ses" in keys, "it has a keyring of its own"
        assert name not in keys


def test_dev_has_the_usual_nodes_and_no_others(shared_host: Node, tiny: str) -> None:
    listed = dict(
        reversed(line.split()) for line in lines(shared_host, tiny, "cd /dev && stat -c '%A %n' *")
    )
    assert {name for name, mode in listed.items() if mode[0] in "cb"} == _NODES
    assert {name for name, mode in listed.items() if mode[0] == "l"} == _LINKS
    assert {name for name, mode in listed.items() if mode[0] == "d"} == {"shm", "mqueue", "pts"}
    assert {listed[name][1:] for name in _NODES - {"console"}} == {"rw-rw-rw-"}
    assert (listed["shm"], listed["mqueue"]) == ("drwxrwxrwt", "drwxrwxrwt")
    used = inside(
        shared_host, tiny,
        "echo x > /dev/null && head -c 3 /dev/zero | wc -c && head -c 2 /dev/urandom | wc -c && "
        "echo x > /dev/shm/a && cat /dev/shm/a && touch /dev/mqueue/q && ls /dev/mqueue && "
        "echo from a program > /dev/stdout && rm /dev/shm/a /dev/mqueue/q",
    ).split()  # fmt: skip
    assert used == ["3", "2", "x", "q", "from", "a", "program"]


def test_the_umask_is_the_usual_one(shared_host: Node, tiny: str) -> None:
    assert inside(shared_host, tiny, "umask") == "0022"


def test_the_cgroup_tree_is_a_pure_v2_one_of_its_own(shared_host: Node, tiny: str) -> None:
    mounts = lines(shared_host, tiny, "grep cgroup /proc/mounts")
    assert [line.split()[1:3] for line in mounts] == [["/sys/fs/cgroup", "cgroup2"]]
    assert "0::/.sysctr" in lines(shared_host, tiny, "cat /proc/self/cgroup")
    assert "0::/" in lines(shared_host, tiny, "cat /proc/1/cgroup")
    made = inside(
        shared_host, tiny,
        "cd /sys/fs/cgroup && mkdir mine && echo $$ > mine/cgroup.procs && grep 0:: /proc/self/cgroup && "
        "echo $$ > .sysctr/cgroup.procs && rmdir mine",
    )  # fmt: skip
    assert made == "0::/mine"


def test_sys_is_read_only_but_for_the_network(shared_host: Node, tiny: str) -> None:
    assert shell(shared_host, tiny, "echo 1 > /sys/kernel/uevent_seqnum", check=False).status != 0
    options = inside(shared_host, tiny, "grep ' /sys sysfs' /proc/mounts").split()[3].split(",")
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(options)
    inside(shared_host, tiny, "echo 65000 > /sys/class/net/lo/mtu")


def test_only_the_containers_processes_and_its_name_are_seen(shared_host: Node, tiny: str) -> None:
    commands = lines(shared_host, tiny, "cat /proc/[0-9]*/comm")
    assert set(commands) <= {"init", "sh", "getty", "cat", "rcS"}
    assert inside(shared_host, tiny, "hostname; cat /etc/hostname").split() == [tiny, tiny]
    assert tiny in inside(shared_host, tiny, "cat /etc/hosts")
    assert inside(shared_host, tiny, "ls /dev/.sysctr/sys/class/net") == "eth0\nlo"
