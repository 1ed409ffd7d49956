"""Trees of the host for a container's mounts: opened once, checked, and with their flags locked.

A flag (read-only, nosuid, nodev) of a detached mount can be taken back by the root of the container that
attaches it. The kernel locks the flags of mounts that a less privileged mount namespace copies from its
parent. So a process of the host's attaches the trees where nobody sees them, joins the container's user
namespace, copies its mount namespace and hands over mounts of that copy. A hung file system (NFS) keeps only
that process waiting.
"""

import errno
import os
import signal
import socket
import stat

from sysctr.linux import mount, path, process
from sysctr.linux.syscall import KernelError
from sysctr.runtime import wire
from sysctr.runtime.steps import Context, Stage

_KINDS = {
    stat.S_IFSOCK: "a socket", stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip
# An id map needs a range for users and one for groups; this one is nobody's.
_NOBODYS = [[2**32 - 2, 2**32 - 2, 1]]


def write_maps(pid: int, uid_map: "list[list[int]]", gid_map: "list[list[int]]") -> None:
    """Write the id maps of a process's new user namespace; rows are inside, outside, count."""
    for name, ranges in (("uid_map", uid_map), ("gid_map", gid_map)):
        text = "".join(f"{inside} {outside} {count}\n" for inside, outside, count in ranges)
        # One write: the kernel takes the whole map in a single call.
        fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def start_helper(binds: "list[dict]", userns_fd: int, stage: str, near: socket.socket) -> None:
    """Let a process of its own open the trees and send them over `near` to whoever has the other end.

    It is the keeper's child: nobody here waits for it, whatever it meets.
    """
    pid, pidfd = process.clone(process.CLONE_PARENT)
    if pid == 0:
        _serve(binds, userns_fd, stage, near)
    os.close(pidfd)


def _serve(binds: "list[dict]", userns_fd: int, stage: str, near: socket.socket) -> None:
    try:
        process.close_all_but([near.fileno(), userns_fd])
        try:
            trees = open_locked(binds, userns_fd, stage)
        except (OSError, ValueError) as error:
            wire.send(near, {"failed": str(error)})
        else:
            wire.send(near, {"trees": list(trees)}, list(trees.values()))
    finally:
        os._exit(0)


def open_locked(binds: "list[dict]", userns_fd: int, stage: str) -> "dict[str, int]":
    """Return detached mounts by name whose flags nobody in the user namespace can take back.

    The calling process is in that user namespace afterwards, with all rights there, and in a private mount
    namespace whose working directory is an empty tmpfs. Raises OSError, and ValueError that says in words
    what is wrong with a source.

    A bind is {"tree", "path", "attributes", "idmap", "strict"}: `idmap` is true for the container's own,
    false for none, or {"users", "groups"} with rows as of uid_map; `strict` is for what an administrator
    names. Or it is {"tree", "device", "mode", "uid", "gid"}: a node like that of the host.
    """
    process.prctl(process.PR_SET_DUMPABLE, 0)
    opened = [(bind["tree"], _open(bind, userns_fd)) for bind in binds]
    process.unshare(process.CLONE_NEWNS)
    stage_fd = os.open(stage, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    Stage().execute(Context({}, stage_fd))
    for number, (_, tree_fd) in enumerate(opened):
        _attach(tree_fd, str(number))
    process.setns(userns_fd, process.CLONE_NEWUSER)
    process.unshare(process.CLONE_NEWNS)
    return {name: mount.open_tree(str(number)) for number, (name, _) in enumerate(opened)}


def _attach(tree_fd: int, name: str) -> None:
    if stat.S_ISDIR(os.fstat(tree_fd).st_mode):
        os.mkdir(name, 0o755)
    else:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    target_fd = os.open(name, os.O_PATH | os.O_CLOEXEC)
    mount.move_mount(tree_fd, target_fd)
    os.close(target_fd)
    os.close(tree_fd)


def _open(bind: dict, userns_fd: int) -> int:
    if "device" in bind:
        return _make_node(bind)
    if bind.get("strict"):
        source_fd = _open_source(bind["path"])
        # Of what was looked at, not of what the path means by now.
        tree_fd = mount.open_tree("", dir_fd=source_fd)
        os.close(source_fd)
    else:
        tree_fd = mount.open_tree(bind["path"])
    idmap = bind.get("idmap", True)
    map_fd = userns_fd if idmap is True else _map_namespace(idmap) if idmap else -1
    try:
        mount.mount_setattr(
            tree_fd, attributes=bind.get("attributes", 0), userns_fd=map_fd, propagation=mount.MS_PRIVATE
        )
    except KernelError as error:
        if map_fd >= 0 and error.errno in (errno.EINVAL, errno.EPERM):
            raise ValueError(f"{bind['path']}: its file system cannot show files under other ids") from error
        raise
    if map_fd not in (-1, userns_fd):
        os.close(map_fd)
    return tree_fd


def _open_source(source: str) -> int:
    """Return a descriptor of a directory or file that the administrator named; no symlink is followed."""
    try:
        resolve = path.RESOLVE_NO_SYMLINKS | path.RESOLVE_NO_MAGICLINKS
        source_fd = path.openat2(mount.AT_FDCWD, source, os.O_PATH, resolve)
    except KernelError as error:
        if error.errno == errno.ENOENT:
            raise ValueError(f"{source} does not exist") from None
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{_first_link(source)} is a symlink: name what it points to") from None
    kind = stat.S_IFMT(os.fstat(source_fd).st_mode)
    if kind in _KINDS:
        raise ValueError(f"{source} is {_KINDS[kind]}, neither a directory nor a file")
    own = path.kernels_own(source_fd)
    if own:
        raise ValueError(f"{source} is on {own}, which is the kernel's and not to be shared")
    return source_fd


def _first_link(source: str) -> str:
    parts = source.split("/")
    steps = ["/".join(parts[:depth]) for depth in range(2, len(parts) + 1)]
    return next((step for step in steps if os.path.islink(step)), source)


def _make_node(bind: dict) -> int:
    """Return a mount of a new device node with the owner's ids as the host has them."""
    try:
        like = os.stat(bind["device"], follow_symlinks=False)
    except FileNotFoundError:
        raise ValueError(f"{bind['device']} does not exist on this host: is its driver loaded?") from None
    if not (stat.S_ISCHR(like.st_mode) or stat.S_ISBLK(like.st_mode)):
        raise ValueError(f"{bind['device']} is not a device")
    # On a tmpfs of the host's: on one that the container's root mounts, no device works.
    tmpfs_fd = mount.new_mount(
        "tmpfs", {"mode": "0755", "size": "16k"}, mount.MOUNT_ATTR_NOSUID | mount.MOUNT_ATTR_NOEXEC
    )
    os.mknod("node", stat.S_IFMT(like.st_mode) | 0o600, like.st_rdev, dir_fd=tmpfs_fd)
    os.chown("node", bind["uid"], bind["gid"], dir_fd=tmpfs_fd)
    os.chmod("node", bind["mode"], dir_fd=tmpfs_fd)
    node_fd = mount.open_tree("node", dir_fd=tmpfs_fd)
    mount.mount_setattr(node_fd, propagation=mount.MS_PRIVATE)
    os.close(tmpfs_fd)
    return node_fd


def _map_namespace(idmap: dict) -> int:
    """Return a user namespace that is nothing but a map of ids."""
    pid, pidfd = process.clone(process.CLONE_NEWUSER)
    if pid == 0:
        while True:
            signal.pause()
    try:
        write_maps(pid, idmap["users"] or _NOBODYS, idmap["groups"] or _NOBODYS)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        process.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(pidfd)
