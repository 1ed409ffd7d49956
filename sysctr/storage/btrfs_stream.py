"""Snapshots of btrfs as streams: btrfs-send(8) writes one, btrfs-receive(8) makes it again in another pool.

Receiving needs rights over the file system that no job has, so it is done by the host's root: in a mount
namespace of its own, with the capabilities that it needs and no others, and of trusted peers only.
"""

import os
import re

from sysctr.errors import SysctrError
from sysctr.storage import tree

# What receiving says of each subvolume that it makes.
_MADE = re.compile(r"^At (?:subvol|snapshot) (.+)$", re.MULTILINE)
# Owners, modes, device nodes, capabilities of files, and the calls of btrfs that make a subvolume.
_NEEDED = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "mknod", "setfcap", "sys_admin",
)  # fmt: skip
_APART = [
    "unshare", "--mount", "--propagation", "private", "--", "setpriv", "--no-new-privs", "--inh-caps=-all",
    f"--bounding-set=-all,{','.join(f'+{name}' for name in _NEEDED)}", "--",
]  # fmt: skip


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
    path = f"{directory}/{name}"
    try:
        done = tree.run_tool(
            [*_APART, "btrfs", "receive", "-f", f"/proc/self/fd/{in_fd}", directory],
            doing, directory, "btrfs-progs", pass_fds=(in_fd,),
        )  # fmt: skip
    except BaseException:
        _delete(path, doing)
        raise
    made = _MADE.findall((done.stderr + done.stdout).decode(errors="replace"))
    if made != [name]:
        for other in made:
            _delete(f"{directory}/{os.path.basename(other)}", doing)
        raise SysctrError(f"cannot {doing}: the stream is of something else")


def _delete(path: str, doing: str) -> None:
    if os.path.isdir(path):
        tree.run_tool(["btrfs", "subvolume", "delete", path], doing, os.path.dirname(path), "btrfs-progs")
