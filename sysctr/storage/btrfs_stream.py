"""Snapshots of btrfs as streams: btrfs-send(8) writes one, btrfs-receive(8) makes it again in another pool.

Receiving needs rights over the file system that no job has, so it is done by the host's root: in a mount
namespace and a root directory of its own, with the capabilities that it needs and no others. What is in a
stream are paths to write to, and btrfs-receive(8) goes by them without a look, over symlinks and `..` too.
"""

import os
import re
import stat

from sysctr.errors import SysctrError
from sysctr.storage import tree

# What receiving says of each subvolume that it makes.
_MADE = re.compile(r"^At (?:subvol|snapshot) (.+)$", re.MULTILINE)
_SUBVOLUME_INODE = 256
# Owners, modes, capabilities of files, the calls of btrfs that make a subvolume, and the way into a root of
# its own. No device nodes: a stream could make one and then write to it. Overlay whiteouts need no right.
_NEEDED = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "setfcap", "sys_admin", "sys_chroot",
)  # fmt: skip
# What is beside the new subvolume can be reached with `..`: what is written of other snapshots, as what their
# container may have of the host. These are subvolumes that are read-only already, and files that become so.
_APART = r"""
set -eu
for record in "$1"/*.json; do
    [ -e "$record" ] || continue
    mount --bind -- "$record" "$record"
    mount -o remount,bind,ro -- "$record"
done
directory=$1
shift
# Whoever outlived the daemon would make a subvolume after the next daemon has looked for such.
exec setpriv --pdeathsig KILL --no-new-privs --inh-caps=-all --bounding-set="$@" "$directory"
"""
_CAPABILITIES = f"-all,{','.join(f'+{name}' for name in _NEEDED)}"


def send(disk: str, out_fd: int, doing: str, base: str = "") -> None:
    """Write a read-only subvolume to a descriptor, or what differs from another one that the receiver has."""
    since = ["-p", base] if base else []
    tree.run_tool(
        ["btrfs", "send", "--quiet", *since, disk], doing, os.path.dirname(disk), "btrfs-progs",
        stdout_fd=out_fd,
    )  # fmt: skip


def receive(directory: str, name: str, in_fd: int, doing: str) -> None:
    """Make the subvolume `name` in a directory of a stream; nothing of it stays if that fails.

    It has to come under the very name: one that is read-only cannot be renamed, and what it was received
    from, which the next stream goes by, is forgotten when that is changed.
    """
    before = set(os.listdir(directory))
    try:
        done = tree.run_tool(
            ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", _APART, "sh", directory,
             _CAPABILITIES, "--", "btrfs", "receive", "--chroot", "-f", f"/proc/self/fd/{in_fd}"],
            doing, directory, "btrfs-progs", pass_fds=(in_fd,),
        )  # fmt: skip
        made = _MADE.findall((done.stderr + done.stdout).decode(errors="replace"))
        if made != [name] or set(os.listdir(directory)) - before != {name}:
            raise SysctrError(f"cannot {doing}: the stream is of something else")
    except BaseException:
        for other in set(os.listdir(directory)) - before:
            _delete(f"{directory}/{other}", doing)
        raise


def _delete(path: str, doing: str) -> None:
    state = os.lstat(path)
    argv = ["rm", "-rf", "--one-file-system", "--", path]
    if stat.S_ISDIR(state.st_mode) and state.st_ino == _SUBVOLUME_INODE:
        argv = ["btrfs", "subvolume", "delete", path]
    tree.run_tool(argv, doing, os.path.dirname(path), "btrfs-progs")
