"""Tries what containers need of this kernel, in a process of its own, and prints what it found as JSON.

Started by the doctor as a program, because it enters namespaces and forks, which the daemon may not. It runs
before anything is installed: standard library and sysctr.linux only. All it makes is in private namespaces or
in one directory that it removes.
"""

import json
import os
import shutil
import socket
import struct
import tempfile

from sysctr.linux import mount, process

# Any range will do: the files made here live for milliseconds in a directory only root can enter.
_FIRST_ID = 1_000_000_000
_STAGE = "/mnt"

_RTM_NEWLINK = 16
_NLM_F_REQUEST_ACK_CREATE_EXCL = 0x1 | 0x4 | 0x400 | 0x200
_IFLA_IFNAME = 3
_IFLA_LINKINFO = 18
_IFLA_INFO_KIND = 1
_NETLINK_ROUTE = 0
_NETLINK_NETFILTER = 12
_NFT_MSG_GETGEN = (10 << 8) | 16
_NLMSG_ERROR = 2


def main(directory: str) -> None:
    """Print the facts about this kernel, with `directory` as the place where volumes would live."""
    facts = {}
    facts.update(_in_child(lambda: _file_systems(directory), ("userns", "idmap", "overlay")))
    facts.update(_in_child(_network, ("veth", "bridge", "nft")))
    print(json.dumps(facts))


def _in_child(probe, names: tuple[str, ...]) -> dict[str, str]:
    """Run `probe` in a child, so that its namespaces end with it; a name it leaves out was not reached."""
    reader, writer = os.pipe()
    pid, pidfd = process.clone(0)
    if pid == 0:
        status = 1
        try:
            os.write(writer, json.dumps(probe()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    os.close(pidfd)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    found = json.loads(answer) if answer else {}
    return {name: found.get(name, "not tried") for name in names}


def _file_systems(directory: str) -> dict[str, str]:
    """Do what the start of a container does: an overlay with an idmapped upper, mounted by mapped root."""
    facts: dict[str, str] = {}
    process.unshare(process.CLONE_NEWNS)
    mount.mount("", "/", None, mount.MS_REC | mount.MS_PRIVATE)
    home = tempfile.mkdtemp(prefix=".probe-", dir=directory)
    try:
        for name in ("lower", "upper", "work", "merged"):
            os.mkdir(f"{home}/{name}", 0o755)
        os.chmod(home, 0o755)
        child = _MappedRoot(facts)
        try:
            if "userns" in facts:
                return facts
            facts["userns"] = ""
            _idmapped_bind(home, child, facts)
            if facts["idmap"]:
                return facts
            facts["overlay"] = child.mount_overlay(f"{_STAGE}/pool")
            if not facts["overlay"]:
                owner = os.stat(f"{home}/upper/file").st_uid
                facts["overlay"] = "" if owner == 0 else f"a file was stored with owner {owner} instead of 0"
        finally:
            child.end()
    finally:
        shutil.rmtree(home)
    return facts


def _idmapped_bind(home: str, child: "_MappedRoot", facts: dict[str, str]) -> None:
    """Attach `home`, shifted by the child's map, at a place the child can reach."""
    try:
        # Above `home` everything is closed to other ids; a fresh tmpfs in this private namespace is not.
        mount.mount("tmpfs", _STAGE, "tmpfs", 0, "mode=0755")
        os.mkdir(f"{_STAGE}/pool", 0o755)
        tree_fd = mount.open_tree(home)
        userns_fd = os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        mount.mount_setattr(tree_fd, userns_fd=userns_fd)
        mount.move_mount(tree_fd, os.open(f"{_STAGE}/pool", os.O_PATH | os.O_CLOEXEC))
        facts["idmap"] = ""
    except OSError as error:
        facts["idmap"] = str(error)


class _MappedRoot:
    """A child that becomes root of a new user namespace, and can mount one overlay."""

    def __init__(self, facts: dict[str, str]) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = 0
        try:
            self.pid, pidfd = process.clone(process.CLONE_NEWUSER)
            if self.pid == 0:
                self.channel.close()
                _serve_as_root(theirs)
            os.close(pidfd)
            for name in ("uid_map", "gid_map"):
                with open(f"/proc/{self.pid}/{name}", "w", encoding="ascii") as file:
                    file.write(f"0 {_FIRST_ID} 65536")
        except OSError as error:
            facts["userns"] = str(error)
        finally:
            theirs.close()

    def mount_overlay(self, pool: str) -> str:
        """Return "" if the child could mount an overlay of `pool` and write to it, else the reason."""
        self.channel.send(pool.encode())
        answer = self.channel.recv(4096)
        return answer.decode()[1:] if answer else "the child died"

    def end(self) -> None:
        self.channel.close()
        if self.pid:
            os.waitpid(self.pid, 0)


def _serve_as_root(channel: socket.socket) -> None:
    pool = channel.recv(4096).decode()
    if pool:
        try:
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            process.unshare(process.CLONE_NEWNS)
            options = f"lowerdir={pool}/lower,upperdir={pool}/upper,workdir={pool}/work,userxattr"
            mount.mount("overlay", f"{pool}/merged", "overlay", 0, options)
            with open(f"{pool}/merged/file", "w", encoding="ascii") as file:
                file.write("x")
            answer = ""
        except OSError as error:
            answer = str(error)
        channel.send(b"=" + answer.encode())
    os._exit(0)


def _network() -> dict[str, str]:
    process.unshare(process.CLONE_NEWNET)
    return {
        "veth": _new_link("veth"),
        "bridge": _new_link("bridge"),
        "nft": _nftables(),
    }


def _attribute(kind: int, payload: bytes) -> bytes:
    padding = -len(payload) % 4
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(padding)


def _new_link(kind: str) -> str:
    """Return "" if the kernel made a link of this kind in our own network namespace, else the reason."""
    info = _attribute(_IFLA_INFO_KIND, kind.encode() + b"\0")
    body = bytes(16) + _attribute(_IFLA_IFNAME, f"p-{kind}\0".encode()) + _attribute(_IFLA_LINKINFO, info)
    return _ask(_NETLINK_ROUTE, _RTM_NEWLINK, _NLM_F_REQUEST_ACK_CREATE_EXCL, body)


def _nftables() -> str:
    """Return "" if nf_tables answers with its generation, else the reason."""
    return _ask(_NETLINK_NETFILTER, _NFT_MSG_GETGEN, 0x1, bytes(4))


def _ask(family: int, message: int, flags: int, body: bytes) -> str:
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family) as channel:
            channel.settimeout(10)
            channel.bind((0, 0))
            channel.send(struct.pack("=IHHII", 16 + len(body), message, flags, 1, 0) + body)
            answer = channel.recv(8192)
    except OSError as error:
        return str(error)
    if struct.unpack_from("=H", answer, 4)[0] == _NLMSG_ERROR:
        error_number = -struct.unpack_from("=i", answer, 16)[0]
        return os.strerror(error_number) if error_number else ""
    return ""
