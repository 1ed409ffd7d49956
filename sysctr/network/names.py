"""The DNS and DHCP server of a bridge: one dnsmasq that outlives the daemon, and the records it reads.

The allocator decides; dnsmasq only repeats it. Names are in a directory of hosts files, which it watches,
and DHCP gives a MAC the very address that the allocator holds, for guests that ask although their NIC is
set up already. It keeps no leases on disk, so there is no second truth that could differ.
"""

import contextlib
import errno
import grp
import os
import pwd
import re
import select
import shutil
import signal
import socket
import struct
import time
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network

from sysctr.errors import UsageError
from sysctr.linux.process import ProgramFailed, pidfd_open, pidfd_send_signal, run
from sysctr.linux.syscall import KernelError
from sysctr.network.addresses import Lease, gateway_of
from sysctr.network.nat import Problem
from sysctr.paths import Layout

_PROGRAM = "dnsmasq"
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# The user of Debian's package owns nothing; nobody is also who owns what is outside of an id map.
_USERS = ("dnsmasq", "nobody")
_NAME = re.compile(r"[a-z0-9-]{1,63}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_RETRY_S = 5
_STOP_S = 2
_RESOLV_CONF = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")
_RESOLVERS = 3  # MAXNS of resolv.conf(5)


class Names:
    """The dnsmasq of one bridge, and its records."""

    def __init__(self, layout: Layout, bridge: str, subnet: IPv4Network, domain: str) -> None:
        self._bridge = bridge
        self._subnet = subnet
        self._domain = domain
        self._run = layout.run
        self._pid_file = f"{layout.run}/dnsmasq.pid"
        self._records = f"{layout.run}/names"
        self._hosts = f"{self._records}/hosts"
        self._dhcp = f"{self._records}/dhcp"
        self._failure: Problem | None = None
        self._retry_at_s = 0.0

    def ensure(self, leases: Mapping[int, Lease]) -> None:
        """Adopt the server that runs, or start it; where it cannot run, problems() says why."""
        if self.running():
            self._failure = None
            return
        if time.monotonic() < self._retry_at_s:
            return
        self.stop()  # one that was started with other options
        self._make_directories()
        self._write_all(leases)
        try:
            if shutil.which(_PROGRAM, path=_PATH) is None:
                self._failure = Problem(
                    "dnsmasq is not installed: containers have no names for each other",
                    "apt-get install dnsmasq-base",
                )
                return
            # It goes into the background by itself, and the foreground waits until its sockets are open,
            # so a port that is taken is an error here and now.
            run(self._argv(), timeout_s=10)
        except ProgramFailed as error:
            self._failure = Problem(f"{error}", "who listens there: ss -lnup sport = :53")
            self._retry_at_s = time.monotonic() + _RETRY_S
        else:
            self._failure = None

    def running(self) -> bool:
        """Tell whether the server runs as we would start it now."""
        pid = self._pid()
        return pid is not None and _command_line(pid) == self._argv()

    def stop(self) -> None:
        """End the server and wait for its end."""
        text = _read(self._pid_file).strip()
        if text.isascii() and text.isdigit():
            # ESRCH: it ended long ago.
            with contextlib.suppress(KernelError):
                pidfd = pidfd_open(int(text))
                try:
                    if self._is_ours(_command_line(int(text))):
                        _end(pidfd)
                    elif _is_dying(int(text)):
                        # Its command line is gone, but maybe it still has the ports.
                        _wait(pidfd)
                finally:
                    os.close(pidfd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._pid_file)

    def remove(self) -> None:
        """End the server and remove all that it read and wrote."""
        self.stop()
        shutil.rmtree(self._records, ignore_errors=True)
        self._failure, self._retry_at_s = None, 0.0

    def publish(self, ct_id: int, lease: Lease) -> None:
        """Make names and DHCP answers of a container what the allocator holds for it."""
        hosts, dhcp = self._hosts_record(lease), self._dhcp_record(lease)
        if not os.path.isdir(self._hosts):
            return  # ensure() writes all records when it starts the server
        _replace(f"{self._hosts}/{ct_id}", hosts)
        before = _read(f"{self._dhcp}/{ct_id}")
        if not _replace(f"{self._dhcp}/{ct_id}", dhcp) or not before:
            return  # nothing new, or something new only, which the server reads by itself
        self._forget(sorted(_pairs(before) - _pairs(dhcp)))

    def problems(self) -> list[Problem]:
        """Return what keeps containers from having names."""
        found = [self._failure] if self._failure else []
        if self._user() == "root":
            detail = f"dnsmasq runs as root, because others cannot pass to {self._records}"
            found.append(Problem(detail, "give the directories above it the mode 0711"))
        return found

    def _argv(self) -> list[str]:
        netmask, user = self._subnet.netmask, self._user()
        return [
            _PROGRAM,
            "--conf-file=/dev/null",
            f"--pid-file={self._pid_file}",
            # To syslog, which limits the rate: a container that floods it would fill a file. And without
            # waiting for a syslog that hangs.
            "--log-async=20",
            f"--user={user}",
            f"--group={_group_of(user)}",
            # Also binds again to a bridge that was deleted and made anew.
            "--bind-dynamic",
            f"--interface={self._bridge}",
            "--except-interface=lo",
            "--no-hosts",
            f"--hostsdir={self._hosts}",
            f"--domain={self._domain}",
            # Neither our names nor bare ones are anything to ask the world for.
            f"--local=/{self._domain}/",
            "--domain-needed",
            "--resolv-file=/etc/resolv.conf",
            "--cache-size=1000",
            f"--dhcp-range={self._subnet.network_address},static,{netmask},1h",
            f"--dhcp-hostsdir={self._dhcp}",
            "--dhcp-authoritative",
            # A container could else take another's name, or lose its address with a new machine-id.
            "--dhcp-ignore-names",
            "--dhcp-ignore-clid",
            "--leasefile-ro",
            "--quiet-dhcp",
        ]

    def _user(self) -> str:
        """Return who the server runs as: root only where nobody else could reach the records."""
        path = self._run
        while path != "/":
            with contextlib.suppress(FileNotFoundError):
                if not os.stat(path).st_mode & 0o001:
                    return "root"
            path = os.path.dirname(path)
        for user in _USERS:
            with contextlib.suppress(KeyError):
                return pwd.getpwnam(user).pw_name
        return "root"

    def _pid(self) -> int | None:
        """Return the pid of a server of this bridge, None if there is none."""
        text = _read(self._pid_file).strip()
        if not text.isascii() or not text.isdigit():
            return None
        return int(text) if self._is_ours(_command_line(int(text))) else None

    def _is_ours(self, command_line: list[str]) -> bool:
        return command_line[:1] == [_PROGRAM] and f"--pid-file={self._pid_file}" in command_line

    def _make_directories(self) -> None:
        os.makedirs(self._run, 0o755, exist_ok=True)
        for path in (self._records, self._hosts, self._dhcp):
            os.makedirs(path, exist_ok=True)
            os.chmod(path, 0o755)  # whatever the umask of the daemon, another user reads here

    def _write_all(self, leases: Mapping[int, Lease]) -> None:
        for directory in (self._hosts, self._dhcp):
            for name in os.listdir(directory):
                if not name.isdigit() or int(name) not in leases:
                    os.unlink(f"{directory}/{name}")
        for ct_id, lease in leases.items():
            _replace(f"{self._hosts}/{ct_id}", self._hosts_record(lease))
            _replace(f"{self._dhcp}/{ct_id}", self._dhcp_record(lease))

    def _hosts_record(self, lease: Lease) -> str:
        name = check_name(lease.name)
        if not name:
            return ""
        return "".join(
            f"{IPv4Address(ip)} {name}.{self._domain} {name}\n" for _nic, ip, _mac in lease.nics if ip
        )

    def _dhcp_record(self, lease: Lease) -> str:
        lines, name = [], check_name(lease.name)
        for _nic, ip, mac in lease.nics:
            if ip and mac:
                if _MAC.fullmatch(mac) is None:
                    raise UsageError(f"cannot publish the MAC {mac!r}: it is not one")
                # A name can be given to one MAC only.
                lines.append(f"{mac},{IPv4Address(ip)}" + (f",{name}" if name and not lines else "") + "\n")
        return "".join(lines)

    def _forget(self, pairs: list[tuple[str, str]]) -> None:
        """Make the server forget answers it gave, so that the addresses are free for other MACs at once."""
        pid = self._pid()
        if pid is None:
            return
        # ESRCH: it ended meanwhile, and the next one reads everything.
        with contextlib.suppress(KernelError):
            pidfd = pidfd_open(pid)
            try:
                if self._is_ours(_command_line(pid)):
                    pidfd_send_signal(pidfd, signal.SIGHUP)  # read the DHCP records again
            finally:
                os.close(pidfd)
        server = gateway_of(self._subnet)
        for mac, ip in pairs:
            # No route: the bridge is down or gone, and with it the server's knowledge.
            with contextlib.suppress(OSError):
                _release_lease(self._bridge, server, mac, IPv4Address(ip))


def check_name(name: str) -> str:
    """Return the name of a container if it can stand in a hosts file ("" is no name yet).

    >>> check_name("demo")
    'demo'
    """
    if name and (_NAME.fullmatch(name) is None or name == "localhost"):
        raise UsageError(f"cannot publish the name {name!r}: only a-z, 0-9 and - can be in one")
    return name


def host_nameservers() -> tuple[str, ...]:
    """Return the resolvers of this host that a container can reach too."""
    for path in _RESOLV_CONF:
        found = []
        for line in _read(path).splitlines():
            words = line.split()
            if len(words) >= 2 and words[0] == "nameserver":
                with contextlib.suppress(ValueError):
                    address = IPv4Address(words[1])
                    if not address.is_loopback and not address.is_unspecified:
                        found.append(str(address))
        # Only a stub on 127.0.0.53: systemd-resolved keeps the real ones in the other file.
        if found:
            return tuple(found[:_RESOLVERS])
    return ()


def _command_line(pid: int) -> list[str]:
    """Return the command line of a process, [] when it ended."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return os.fsdecode(file.read()).split("\0")[:-1]
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            return []
        raise


def _is_dying(pid: int) -> bool:
    """Tell whether a process is a dnsmasq in the middle of its end."""
    return not _command_line(pid) and _read(f"/proc/{pid}/comm") == f"{_PROGRAM}\n"


def _end(pidfd: int) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        pidfd_send_signal(pidfd, number)
        if _wait(pidfd):
            return


def _wait(pidfd: int) -> bool:
    """Wait a moment for the end of a process; a pidfd is readable once its sockets are closed."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(_STOP_S * 1000))


def _group_of(user: str) -> str:
    """Return the group of a user: the names of these groups differ between distributions."""
    return grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name


def _pairs(record: str) -> set[tuple[str, str]]:
    """Return MAC and address of each line of a DHCP record."""
    return {(mac, ip) for mac, ip, *_name in (line.split(",") for line in record.splitlines())}


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _replace(path: str, text: str) -> bool:
    """Make `text` the content of a record; return whether it was not so already. Empty means no file."""
    if _read(path) == text:
        return False
    if not text:
        os.unlink(path)
        return True
    # Not synced: after a crash of the host everything below /run is written anew. The server ignores
    # names that begin with a dot.
    directory, name = os.path.split(path)
    temporary = f"{directory}/.{name}.{os.getpid()}"
    with open(temporary, "w", encoding="ascii") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(text)
    os.rename(temporary, path)
    return True


def _release_lease(bridge: str, server: IPv4Address, mac: str, ip: IPv4Address) -> None:
    """Send the DHCPRELEASE (RFC 2131) that the container itself would send when it gives up the address."""
    # op, htype, hlen, hops, xid, secs, flags, ciaddr, yiaddr, siaddr, giaddr, chaddr, sname, file.
    hardware = bytes.fromhex(mac.replace(":", ""))
    header = struct.pack("!BBBBIHH4s12x16s64x128x", 1, 1, 6, 0, 0, 0, 0, ip.packed, hardware)
    options = bytes([0x63, 0x82, 0x53, 0x63, 53, 1, 7, 54, 4, *server.packed, 255])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        # Sent to our own address, it still counts as received on the bridge, where the server listens.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, bridge.encode() + b"\0")
        sock.sendto(header + options, (str(server), 67))
