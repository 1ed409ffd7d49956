"""The steps of mount points: where the trees come from, overlays of volumes, attaching, and taking off again.

Like all steps they run as the container's root. Sources of the host were opened by somebody else, with their
flags locked (see `binds`); targets are resolved beneath the root, and a symlink on the way is an error.
"""

import errno
import os
import socket
import stat

from sysctr.linux import mount, path
from sysctr.runtime import wire
from sysctr.runtime.steps import Context, Step, refuse_read_only


class Sources(Step):
    """The trees of mounts, opened by the supervisor's helper and received with their flags locked."""

    def describe(self) -> str:
        return "open what is mounted"

    def execute(self, context: Context) -> None:
        with socket.socket(fileno=context.helper_fd) as helper:
            try:
                message, fds = wire.receive(helper)
            except wire.WireError as error:
                raise OSError(errno.EIO, "the one who opens it died") from error
        if "failed" in message:
            raise ValueError(message["failed"])
        context.trees |= dict(zip(message["trees"], fds, strict=True))


class OverlayTree(Step):
    """An overlay that becomes a tree of its own; without an upper it is read-only for good."""

    tree: str
    lower: list[str]
    upper: str = ""
    work: str = ""
    attributes: int = 0

    def describe(self) -> str:
        return f"overlay of {len(self.lower)} layers for {self.tree}"

    def execute(self, context: Context) -> None:
        name = f"overlay-{self.tree}"
        os.mkdir(name, 0o755)
        options = f"lowerdir={':'.join(self.lower)},userxattr"
        if self.upper:
            options += f",upperdir={self.upper},workdir={self.work}"
        mount.mount("overlay", name, "overlay", 0, options)
        tree_fd = mount.open_tree(name)
        mount.umount2(name, mount.MNT_DETACH)
        if self.upper:
            refuse_read_only(tree_fd, self.upper)
        if self.attributes:
            mount.mount_setattr(tree_fd, attributes=self.attributes)
        context.trees[self.tree] = tree_fd


class TmpfsTree(Step):
    """A new tmpfs that becomes a tree of its own."""

    tree: str
    options: dict = {}
    attributes: int = 0

    def describe(self) -> str:
        return f"tmpfs for {self.tree}"

    def execute(self, context: Context) -> None:
        context.trees[self.tree] = mount.new_mount("tmpfs", self.options, self.attributes)


class MountTree(Step):
    """A tree attached on a path of the root, a directory on a directory and a file on a file."""

    tree: str
    target: str

    def describe(self) -> str:
        return f"{self.tree} on {self.target}"

    def execute(self, context: Context) -> None:
        tree_fd = context.trees.pop(self.tree)
        directory = stat.S_ISDIR(os.fstat(tree_fd).st_mode)
        make = path.make_directory if directory else path.make_file
        try:
            target_fd = make(context.root_fd, self.target)
        except OSError as error:
            raise _explained(error, self.target) from error
        if not directory and stat.S_ISDIR(os.fstat(target_fd).st_mode):
            raise ValueError(f"{self.target} is a directory there, and what is mounted on it is none")
        mount.move_mount(tree_fd, target_fd)
        os.close(tree_fd)
        os.close(target_fd)


class Unmount(Step):
    """What is mounted on a path of the root taken off; nothing mounted there is fine.

    With `remove` the empty file that a device was mounted on goes too.
    """

    target: str
    remove: bool = False

    def describe(self) -> str:
        return f"unmount {self.target}"

    def execute(self, context: Context) -> None:
        parent, _, name = self.target.rpartition("/")
        try:
            parent_fd = path.open_without_links(context.root_fd, parent, os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        # By its name in the working directory: a descriptor of the mount itself would keep it busy.
        os.fchdir(parent_fd)
        os.close(parent_fd)
        try:
            mount.umount2(name, mount.UMOUNT_NOFOLLOW)
        except OSError as error:
            # Not a mount point, or nothing at all: its root took it off already.
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                raise
        if self.remove:
            _remove_empty(name)
        os.chdir("/")


def _remove_empty(name: str) -> None:
    try:
        status = os.lstat(name)
        if stat.S_ISREG(status.st_mode) and not status.st_size:
            os.unlink(name)
    except OSError:
        pass  # its root did something else with it


def _explained(error: OSError, target: str) -> Exception:
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return ValueError(f"a symlink or a file is in the way of {target}")
    return error
