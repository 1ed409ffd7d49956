"""Containers that work while they move: what was acknowledged is there afterwards, and the break is short.

A client on each host's network writes to a service inside, whose every answer says that the line is on the
disk. The address stays, so the one finds it before the move, and the other after.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.node import Node, TemplateStore
from tests.system import peers
from tests.system.guests import create, inside, shell
from tests.system.peers import Hosts, Watch, move
from tests.trees import named
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox")]

_PORT = 7000
# What is measured is not bounded tightly: the machine may be busy with other tests.
_LONGEST_BREAK_S = 15.0

# In tiny: a shell for each connection, and dd, the one program of busybox that syncs a single file.
_SERVE = """#!/bin/sh
while read -r line; do
    echo "$line" | dd of=/root/log oflag=append conv=notrunc,fsync 2>/dev/null && echo "ack $line"
done
"""
_SCRIPT = f"""#!/bin/sh
case $1 in
start) nc -ll -p {_PORT} -e /root/serve </dev/null >/dev/null 2>&1 & ;;
stop) killall nc ;;
esac
"""
# In Debian: a unit of systemd, in the language that every Debian has.
_PERL = f"""#!/usr/bin/perl
use strict; use warnings; use Socket; use IO::Handle;
$SIG{{CHLD}} = 'IGNORE';
socket(my $server, PF_INET, SOCK_STREAM, 0) or die;
setsockopt($server, SOL_SOCKET, SO_REUSEADDR, 1);
bind($server, sockaddr_in({_PORT}, INADDR_ANY)) or die;
listen($server, 5) or die;
while (1) {{
    my $address = accept(my $client, $server) or next;
    if (fork()) {{ close($client); next; }}
    $client->autoflush(1);
    while (my $line = <$client>) {{
        open(my $log, '>>', '/root/log') or die;
        print $log $line; $log->flush; $log->sync or die; close($log);
        print $client "ack $line";
    }}
    exit 0;
}}
"""
_UNIT = """[Service]
ExecStart=/root/serve
Restart=always
[Install]
WantedBy=multi-user.target
"""
# Writes lines as fast as they are acknowledged, and notes when each was.
_CLIENT = """
import itertools, socket, sys, threading, time
prefix, address, port, path = sys.argv[1:]
numbers = itertools.count(1)
never = threading.Event()
with open(path, "w", buffering=1) as noted:
    while True:
        try:
            with socket.create_connection((address, int(port)), 0.3) as connection:
                connection.settimeout(2)
                answers = connection.makefile("r")
                while True:
                    line = f"{prefix}-{next(numbers)}"
                    connection.sendall(line.encode() + b"\\n")
                    if answers.readline() != f"ack {line}\\n":
                        break
                    noted.write(f"{time.monotonic()} {line}\\n")
        except OSError:
            pass
        never.wait(0.01)
"""


@dataclass
class Client:
    """A program beside a container that writes to the service in it."""

    node: Node
    path: Path

    def acknowledged(self) -> list[tuple[float, str]]:
        """Return what the service said it has, and when."""
        whole = self.path.read_text().rpartition("\n")[0]
        return [(float(line.split()[0]), line.split()[1]) for line in whole.split("\n") if line]


@contextlib.contextmanager
def clients(hosts: Hosts, address: str, directory: Path) -> Iterator[dict[str, Client]]:
    """Have a client on every host."""
    programs, found = [], {}
    try:
        for name, node in hosts.nodes.items():
            path = directory / f"acknowledged-{name}"
            path.touch()
            programs.append(
                node.popen_program(
                    "/usr/bin/python3", "-I", "-c", _CLIENT, name, address, str(_PORT), str(path)
                )
            )
            found[name] = Client(node, path)
        yield found
    finally:
        for program in programs:
            program.kill()
            program.wait()


@pytest.fixture(scope="module")
def hosts(pytestconfig: pytest.Config, templates: TemplateStore) -> Iterator[Hosts]:
    with peers.acquainted(templates, "left", "right", keep=pytestconfig.getoption("keep")) as two:
        yield two


@pytest.fixture(autouse=True)
def _nothing_stays(hosts: Hosts) -> Iterator[None]:
    yield
    for node in hosts.nodes.values():
        node.run("destroy", "--all", "--force", "--yes")
        wait_until(lambda one=node: peers.is_tidy(one), 10, f"that {node.root} is tidy")


def write(node: Node, ref: str, path: str, text: str, mode: str = "755") -> None:
    """Write a file of a container."""
    node.run("exec", ref, "--", "sh", "-c", f"cat > {path}; chmod {mode} {path}", stdin=text.encode())


def serving(node: Node) -> str:
    """Return a container of tiny with the service."""
    ref = create(node)
    write(node, ref, "/root/serve", _SERVE)
    write(node, ref, "/etc/init.d/S90serve", _SCRIPT)
    shell(node, ref, "/etc/init.d/S90serve start")
    return ref


def moves_without_a_loss(
    hosts: Hosts, ref: str, directory: Path, *options: str, longest_s: float = _LONGEST_BREAK_S
) -> dict:
    """Move a container that is written to, and check every line that was acknowledged."""
    left, right = hosts.nodes["left"], hosts.nodes["right"]
    (address,) = left.json("info", ref)["addresses"]
    with clients(hosts, address, directory) as found, Watch(left, right) as watch:
        wait_until(lambda: len(found["left"].acknowledged()) > 20, 30, "lines that are acknowledged")
        report = move(left, ref, "right", "--restart", *options)
        wait_until(lambda: len(found["right"].acknowledged()) > 20, 60, "lines that are acknowledged there")
    assert not watch.doubles
    # While it stood still nobody walked through all of it.
    assert report["passes"][-1]["runs"] == ["listed", "places"]
    assert right.json("info", ref)["addresses"] == [address]
    before, after = found["left"].acknowledged(), found["right"].acknowledged()
    assert before[-1][0] < after[0][0]
    break_s = after[0][0] - before[-1][0]
    written = inside(right, ref, "cat /root/log").split("\n")
    lost = {line for _, line in (*before, *after)} - set(written)
    count = len(before) + len(after)
    assert not lost, f"{len(lost)} of {count} acknowledged lines are lost: {sorted(lost)[:5]}"
    print(f"\n{ref}: {break_s:.2f} s between two answers, reported {report['downtime_s']:.2f} s; "
          f"{len(report['passes'])} passes, {count} lines")  # fmt: skip
    assert break_s < longest_s
    # The report counts from the stop to the start; the service is silent for longer.
    assert 0 < report["downtime_s"] < break_s + 2
    return report


def test_every_acknowledged_write_is_there_after_the_move(hosts: Hosts, tmp_path: Path) -> None:
    ref = serving(hosts.nodes["left"])
    report = moves_without_a_loss(hosts, ref, tmp_path)
    assert report["started"]
    assert len(report["passes"]) > 1


def test_it_is_written_to_while_it_goes_to_and_fro(hosts: Hosts, tmp_path: Path) -> None:
    left, right = hosts.nodes.values()
    ref = serving(left)
    (address,) = left.json("info", ref)["addresses"]
    with clients(hosts, address, tmp_path) as found, Watch(left, right) as watch:
        ways = itertools.cycle(((left, right), (right, left)))
        for here, there in itertools.islice(ways, 4):
            client = found[hosts.name(here)]
            seen = len(client.acknowledged())
            wait_until(lambda c=client, n=seen: len(c.acknowledged()) > n + 10, 30, "lines")
            move(here, ref, hosts.name(there), "--restart")
    assert not watch.doubles
    written = set(inside(left, ref, "cat /root/log").split("\n"))
    for client in found.values():
        assert {line for _, line in client.acknowledged()} <= written


@pytest.mark.slow
def test_a_big_file_that_changes_all_the_time_arrives_whole(hosts: Hosts, tmp_path: Path) -> None:
    """A gigabyte in which something is always written, and the time of it set back."""
    left, right = hosts.nodes.values()
    ref = serving(left)
    write(left, ref, "/root/churn", """#!/bin/sh
i=0
while :; do
    at=$(( (i * 7919) % 1024 ))
    head -c 1048576 /dev/urandom | dd of=/srv/big bs=1048576 seek=$at conv=notrunc 2>/dev/null
    touch -d @1000000000 /srv/big
    i=$((i + 1))
    usleep 20000
done
""")  # fmt: skip
    shell(left, ref, "dd if=/dev/urandom of=/srv/big bs=1048576 count=1024 2>/dev/null")
    shell(left, ref, "/root/churn </dev/null >/dev/null 2>&1 &")
    # Both ends read all of it again while it stands still.
    report = moves_without_a_loss(hosts, ref, tmp_path, "--keep", longest_s=90)
    assert len(report["passes"]) > 2
    # What is kept over here stands still since then.
    assert digest(right, "big") == digest(left, "big")


def digest(node: Node, name: str) -> str:
    """Return the digest of the only file of a name that a host's containers wrote."""
    (path,) = named(f"{node.layout.pool}/uppers", name)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.slow
@pytest.mark.needs("net")
def test_a_debian_with_a_service_moves(
    pytestconfig: pytest.Config, templates: TemplateStore, tmp_path: Path
) -> None:
    wanted = {"left": ("debian-12",), "right": ("debian-12",)}
    with peers.acquainted(
        templates, "left", "right", keep=pytestconfig.getoption("keep"), wanted=wanted
    ) as hosts:
        left, right = hosts.nodes.values()
        ref = create(left, template="debian-12")
        left.wait(ref, "booted")
        write(left, ref, "/root/serve", _PERL)
        write(left, ref, "/etc/systemd/system/serve.service", _UNIT, "644")
        shell(left, ref, "systemctl enable --now serve")
        machine_id = inside(left, ref, "cat /etc/machine-id")
        report = moves_without_a_loss(hosts, ref, tmp_path)
        right.wait(ref, "booted")
        assert inside(right, ref, "cat /etc/machine-id") == machine_id
        assert inside(right, ref, "systemctl is-system-running") == "running"
        # Of a template that both have, its own changes are all that is sent.
        assert report["sent_bytes"] < 64 << 20, report
