"""The steps a plan is made of: values that can be printed, compared, sent, and executed in the child.

A step runs after the id maps are written, as uid 0 of the new user namespace, in its own mount namespace,
before pivot_root. Targets are resolved beneath the new root without following a symlink, so nothing a
rootfs holds can lead a mount outside (the kernel interfaces are those of `sysctr.linux.mount`).
"""

import contextlib
import errno
import os
import socket
import stat

from sysctr.linux import mount, path, process, tty

_REGISTRY: dict[str, type["Step"]] = {}


class Step:
    """A step's fields are its class's annotations, in order, with the defaults given there.

    Dataclasses would do this too, at 25 ms of every supervisor's start and 4 MB of its memory.
    """

    fields: "tuple[str, ...]" = ()

    def __init_subclass__(cls) -> None:
        cls.fields = tuple(cls.__annotations__)
        _REGISTRY[cls.__name__.lower()] = cls

    def __init__(self, *values: object, **named: object) -> None:
        given = dict(zip(self.fields, values, strict=False)) | named
        missing = [name for name in self.fields if name not in given and not hasattr(type(self), name)]
        if missing or len(values) > len(self.fields) or not set(given) <= set(self.fields):
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.fields) or 'no fields'}")
        vars(self).update(given)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and to_json(other) == to_json(self)

    __hash__ = None

    def describe(self) -> str:
        """Say in a few words what the step does, for errors."""
        raise TypeError(f"{type(self).__name__} does not describe itself")

    def execute(self, context: "Context") -> None:
        """Do it; raises OSError."""
        raise TypeError(f"{type(self).__name__} does nothing")


class Context:
    """What the steps of one child share: descriptors by name, and what is to be handed to the supervisor."""

    def __init__(self, trees: dict[str, int], stage_fd: int) -> None:
        self.trees = trees
        self.stage_fd = stage_fd
        self.root_fd = -1
        self.handed: dict[str, int] = {}
        self.console_fd = -1
        # Where the one sends who opens what an administrator wants mounted.
        self.helper_fd = -1


def to_json(value: Step) -> dict:
    """Return a step as a JSON object."""
    return {"do": type(value).__name__.lower(), **{name: getattr(value, name) for name in value.fields}}


def from_json(data: dict) -> Step:
    """Read a step back; raises KeyError for an unknown step and TypeError for unknown fields."""
    fields = dict(data)
    return _REGISTRY[fields.pop("do")](**fields)


def _text(value: str) -> bytes:
    return value.encode("utf-8", "surrogateescape")


class Stage(Step):
    """A tmpfs that only this child sees, where trees are attached and the root is put together."""

    def describe(self) -> str:
        return "private staging directory"

    def execute(self, context: Context) -> None:
        # Before any mount of ours: nothing may propagate to the host, or from it (attack S37).
        mount.mount("none", "/", None, mount.MS_REC | mount.MS_PRIVATE)
        tmpfs_fd = mount.new_mount("tmpfs", {"mode": "0755", "size": "1m"})
        mount.move_mount(tmpfs_fd, context.stage_fd)
        os.close(context.stage_fd)
        os.fchdir(tmpfs_fd)
        os.close(tmpfs_fd)


class Attach(Step):
    """A tree the supervisor prepared, attached in the staging directory."""

    tree: str
    name: str

    def describe(self) -> str:
        return f"attach {self.tree}"

    def execute(self, context: Context) -> None:
        os.mkdir(self.name, 0o755)
        target_fd = os.open(self.name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        mount.move_mount(context.trees[self.tree], target_fd)
        os.close(target_fd)


class OverlayRoot(Step):
    """An overlay of shared lower layers and this container's upper, which becomes the root."""

    lower: list[str]
    upper: str
    work: str

    def describe(self) -> str:
        return f"overlay of {len(self.lower)} layers"

    def execute(self, context: Context) -> None:
        os.mkdir("root", 0o755)
        # Mounted by the container's root in its own namespace: the work directory of an idmapped upper
        # cannot be made by the host's root (EOVERFLOW), and the kernel would fall back to read-only.
        options = f"lowerdir={':'.join(self.lower)},upperdir={self.upper},workdir={self.work},userxattr"
        mount.mount("overlay", "root", "overlay", 0, options)
        context.root_fd = os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        refuse_read_only(context.root_fd, self.upper)


def refuse_read_only(overlay_fd: int, upper: str) -> None:
    """Raise OSError for an overlay that the kernel cannot write to, and silently mounted without that."""
    # It would be found much later, by the guest.
    if os.fstatvfs(overlay_fd).f_flag & os.ST_RDONLY:
        disk = os.statvfs(upper)
        if not disk.f_bavail or not disk.f_favail:
            raise OSError(errno.ENOSPC, "no space left on the disk of its files")
        raise OSError(errno.EROFS, "the kernel mounted the overlay read-only")


class OverlayView(Step):
    """Overlay layers shown read-only on a directory of the root, for a job that looks at a volume."""

    lower: list[str]
    target: str

    def describe(self) -> str:
        return f"view of {len(self.lower)} layers on {self.target}"

    def execute(self, context: Context) -> None:
        target_fd = path.make_directory(context.root_fd, self.target)
        if len(self.lower) > 1:
            os.mkdir("view", 0o755)
            options = f"lowerdir={':'.join(self.lower)},userxattr"
            if len({os.stat(low).st_dev for low in self.lower}) > 1:
                # Else the directories have numbers in the order in which they are come upon, and two that
                # changed places have the same again. Of one file system the kernel's log would say no thanks.
                options += ",xino=on"
            mount.mount("overlay", "view", "overlay", 0, options)
            tree_fd = mount.open_tree("view")
            mount.umount2("view", mount.MNT_DETACH)
            os.rmdir("view")
        else:
            # An overlay of one layer and no upper is an error to the kernel.
            tree_fd = mount.open_tree(self.lower[0])
            mount.mount_setattr(tree_fd, attributes=mount.MOUNT_ATTR_RDONLY)
        mount.move_mount(tree_fd, target_fd)
        for fd in (tree_fd, target_fd):
            os.close(fd)


class TreeRoot(Step):
    """A prepared tree as the root itself."""

    tree: str

    def describe(self) -> str:
        return f"{self.tree} as root"

    def execute(self, context: Context) -> None:
        Attach(self.tree, "root").execute(context)
        context.root_fd = os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


class TmpfsRoot(Step):
    """An empty tmpfs as the root, for jobs."""

    size: str = "64m"

    def describe(self) -> str:
        return "tmpfs as root"

    def execute(self, context: Context) -> None:
        os.mkdir("root", 0o755)
        target_fd = os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        context.root_fd = mount.new_mount("tmpfs", {"mode": "0755", "size": self.size})
        mount.move_mount(context.root_fd, target_fd)
        os.close(target_fd)


class Filesystem(Step):
    """A new file system mounted on a directory of the root."""

    fstype: str
    target: str
    options: dict = {}
    attributes: int = 0
    optional: bool = False

    def describe(self) -> str:
        return f"{self.fstype} on {self.target}"

    def execute(self, context: Context) -> None:
        target_fd = path.make_directory(context.root_fd, self.target)
        try:
            mount_fd = mount.new_mount(self.fstype, self.options, self.attributes)
        except OSError:
            if self.optional:
                return
            raise
        mount.move_mount(mount_fd, target_fd)
        os.close(mount_fd)
        os.close(target_fd)


class Bind(Step):
    """A source that was opened before the user namespace's root took over, bound on a path of the root."""

    tree: str
    target: str
    directory: bool = False
    attributes: int = 0
    optional: bool = False

    def describe(self) -> str:
        return f"bind {self.tree} on {self.target}"

    def execute(self, context: Context) -> None:
        if self.tree not in context.trees and self.optional:
            return
        make = path.make_directory if self.directory else path.make_file
        try:
            target_fd = make(context.root_fd, self.target)
        except OSError:
            if self.optional:
                return
            raise
        tree_fd = context.trees[self.tree]
        if self.attributes:
            mount.mount_setattr(tree_fd, attributes=self.attributes)
        mount.move_mount(tree_fd, target_fd)
        os.close(target_fd)


class HostBind(Step):
    """A source of the host bound on a path of the root, as a directory or a file after its own kind."""

    tree: str
    target: str
    attributes: int = 0

    def describe(self) -> str:
        return f"bind {self.tree} on {self.target}"

    def execute(self, context: Context) -> None:
        if self.tree in context.trees:
            directory = stat.S_ISDIR(os.fstat(context.trees[self.tree]).st_mode)
            Bind(self.tree, self.target, directory, self.attributes).execute(context)


class Rebind(Step):
    """A path of the new root bound on another path of it."""

    source: str
    target: str
    attributes: int = 0
    optional: bool = False

    def describe(self) -> str:
        return f"bind {self.source} on {self.target}"

    def execute(self, context: Context) -> None:
        try:
            source_fd = path.open_without_links(context.root_fd, self.source, os.O_PATH)
            target_fd = path.open_without_links(context.root_fd, self.target, os.O_PATH)
        except OSError:
            if self.optional:
                return
            raise
        tree_fd = mount.open_tree("", dir_fd=source_fd)
        if self.attributes:
            mount.mount_setattr(tree_fd, attributes=self.attributes)
        mount.move_mount(tree_fd, target_fd)
        for fd in (source_fd, target_fd, tree_fd):
            os.close(fd)


class Directory(Step):
    """A directory of the root."""

    target: str
    mode: int = 0o755

    def describe(self) -> str:
        return f"directory {self.target}"

    def execute(self, context: Context) -> None:
        directory_fd = path.make_directory(context.root_fd, self.target)
        # An O_PATH descriptor takes no fchmod; its magic link does, and cannot be led elsewhere.
        os.chmod(f"/proc/self/fd/{directory_fd}", self.mode)
        os.close(directory_fd)


class File(Step):
    """A small file with the given text; an existing one is replaced, a symlink is an error."""

    target: str
    text: str = ""
    mode: int = 0o644

    def describe(self) -> str:
        return f"file {self.target}"

    def execute(self, context: Context) -> None:
        parent, _, name = self.target.rpartition("/")
        parent_fd = path.make_directory(context.root_fd, parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        file_fd = os.open(name, flags, self.mode, dir_fd=parent_fd)
        os.write(file_fd, _text(self.text))
        os.fchmod(file_fd, self.mode)
        os.close(file_fd)
        os.close(parent_fd)


class GuestFile(Step):
    """A file of the guest's own that the host keeps current; it is left alone where it is right already.

    A symlink in its place is replaced by a file, and a parent that is a symlink means that the guest manages
    the file by itself: nothing is done then.
    """

    target: str
    text: str
    mode: int = 0o644

    def describe(self) -> str:
        return f"guest file {self.target}"

    def execute(self, context: Context) -> None:
        parent, _, name = self.target.rpartition("/")
        try:
            parent_fd = path.make_directory(context.root_fd, parent)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                return
            raise
        try:
            if self._is_current(parent_fd, name):
                return
            temporary = f".{name}.sysctr-new"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=parent_fd)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file_fd = os.open(temporary, flags, self.mode, dir_fd=parent_fd)
            try:
                os.write(file_fd, _text(self.text))
                os.fchmod(file_fd, self.mode)
            finally:
                os.close(file_fd)
            os.rename(temporary, name, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
        finally:
            os.close(parent_fd)

    def _is_current(self, parent_fd: int, name: str) -> bool:
        wanted = _text(self.text)
        try:
            # Not blocking, for a FIFO in the file's place.
            file_fd = os.open(
                name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent_fd
            )
        except OSError:
            return False
        try:
            return os.read(file_fd, len(wanted) + 1) == wanted
        except OSError:
            return False
        finally:
            os.close(file_fd)


class Symlink(Step):
    """A symlink of the root; one that exists already is left alone."""

    target: str
    points_to: str

    def describe(self) -> str:
        return f"symlink {self.target}"

    def execute(self, context: Context) -> None:
        parent, _, name = self.target.rpartition("/")
        parent_fd = path.make_directory(context.root_fd, parent)
        try:
            os.symlink(self.points_to, name, dir_fd=parent_fd)
        except FileExistsError:
            pass
        finally:
            os.close(parent_fd)


class InaccessibleNodes(Step):
    """The six objects without rights that systemd binds over what a service must not see."""

    target: str

    def describe(self) -> str:
        return f"inaccessible nodes in {self.target}"

    def execute(self, context: Context) -> None:
        parent_fd = path.make_directory(context.root_fd, self.target)
        os.close(os.open("reg", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o000, dir_fd=parent_fd))
        os.mkdir("dir", 0o000, dir_fd=parent_fd)
        os.mkfifo("fifo", 0o000, dir_fd=parent_fd)
        # chr and blk need mknod, which a user namespace has not; systemd then takes sock, and reg last.
        os.mknod("sock", 0o140000, dir_fd=parent_fd)
        os.close(parent_fd)


class Console(Step):
    """A devpts of the container's own, its first pty on /dev/console, the master handed to the supervisor."""

    max_ptys: int = 1024
    gid: int = 5

    def describe(self) -> str:
        return "devpts and console"

    def execute(self, context: Context) -> None:
        options = {
            "newinstance": None, "ptmxmode": "0666", "mode": "0620",
            "gid": str(self.gid), "max": str(self.max_ptys),
        }  # fmt: skip
        pts_fd = mount.new_mount("devpts", options, mount.MOUNT_ATTR_NOSUID | mount.MOUNT_ATTR_NOEXEC)
        target_fd = path.make_directory(context.root_fd, "/dev/pts")
        mount.move_mount(pts_fd, target_fd)
        os.close(target_fd)
        # A pty of the host's devpts cannot be bound here (EINVAL: another mount namespace), and the host's
        # own terminals stay out of reach this way.
        master_fd, slave_fd, number = tty.open_pty(f"/proc/self/fd/{pts_fd}/ptmx")
        console_fd = path.make_file(context.root_fd, "/dev/console", 0o600)
        tree_fd = mount.open_tree(str(number), dir_fd=pts_fd)
        mount.move_mount(tree_fd, console_fd)
        for fd in (console_fd, tree_fd, pts_fd):
            os.close(fd)
        context.console_fd = slave_fd
        context.handed["console"] = master_fd


class NotifySocket(Step):
    """The socket on which init says that it is ready; its receiving end goes to the supervisor."""

    target: str

    def describe(self) -> str:
        return f"notify socket {self.target}"

    def execute(self, context: Context) -> None:
        parent, _, name = self.target.rpartition("/")
        parent_fd = path.make_directory(context.root_fd, parent)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as receiver:
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            receiver.bind(f"/proc/self/fd/{parent_fd}/{name}")
            os.chmod(name, 0o666, dir_fd=parent_fd)
            context.handed["notify"] = receiver.detach()
        os.close(parent_fd)


class Hostname(Step):
    """The host name of the new UTS namespace."""

    name: str

    def describe(self) -> str:
        return f"host name {self.name}"

    def execute(self, context: Context) -> None:
        socket.sethostname(self.name)


class CgroupView(Step):
    """A cgroup namespace rooted where the container was placed, shown as a pure cgroup2 tree."""

    target: str = "/sys/fs/cgroup"

    def describe(self) -> str:
        return f"cgroup2 on {self.target}"

    def execute(self, context: Context) -> None:
        # The root of a cgroup namespace is where its creator stands: only now, after the placing.
        process.unshare(process.CLONE_NEWCGROUP)
        flags = mount.MOUNT_ATTR_NOSUID | mount.MOUNT_ATTR_NODEV | mount.MOUNT_ATTR_NOEXEC
        Filesystem("cgroup2", self.target, {}, flags).execute(context)


class PivotRoot(Step):
    """The new root takes the place of the old one, which is gone with everything on it."""

    shared: bool = True

    def describe(self) -> str:
        return "pivot root"

    def execute(self, context: Context) -> None:
        # The overlay has its own clones of the trees below it: nothing of the staging area stays visible.
        os.fchdir(context.root_fd)
        mount.pivot_root(".", ".")
        mount.umount2(".", mount.MNT_DETACH)
        os.chdir("/")
        if self.shared:
            # systemd expects a shared root; the peer group is new, it reaches nobody outside.
            mount.mount("none", "/", None, mount.MS_REC | mount.MS_SHARED)


class Keyring(Step):
    """A new session keyring, so that the host's is not inherited."""

    def describe(self) -> str:
        return "session keyring"

    def execute(self, context: Context) -> None:
        process.join_new_session_keyring()
