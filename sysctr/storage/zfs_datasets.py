"""The datasets below one: made, cloned, limited and destroyed by the programs of ZFS.

A name is what follows PARENT/: of a file system, as 101-89abcdef, or of a snapshot, as 101-89abcdef@kept.
Sources: zfs(8), zfsprops(7), zpool-sync(8).
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from sysctr.errors import NoSpace, NotFound, Refused, SysctrError, UsageError, WrongState
from sysctr.linux import mount as mounts
from sysctr.storage import tree

# Below, the metadata of an empty system does not fit.
MIN_SIZE_BYTES = 1 << 20

# What is `legacy` is mounted by hand only, and by us. The others may be otherwise at PARENT: without `posix`
# a file has no ACL, with `sa` its attributes are no files of their own, and a `.zfs` that is visible would be
# copied with the rest. Hidden, it is there for who looks: a container finds the names of its own snapshots,
# each an empty directory, since what the kernel mounts there is mounted in the host's namespace alone.
_PROPERTIES = ("mountpoint=legacy", "acltype=posix", "xattr=sa", "snapdir=hidden")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9][A-Za-z0-9._-]*)?")
_PACKAGE = "zfsutils-linux"


def is_name(text: str) -> bool:
    """Tell whether a text is the name of a dataset right below PARENT.

    >>> is_name("101-89abcdef@kept"), is_name("other/101"), is_name("-r")
    (True, False, False)
    """
    return bool(_NAME.fullmatch(text))


@dataclass(frozen=True)
class Dataset:
    """A file system or a snapshot; `clones` are full names where they are not below PARENT."""

    name: str
    written_bytes: int  # since its last snapshot
    clones: tuple[str, ...]
    marked: bool  # a snapshot that goes with its last clone


class Datasets:
    """What is below the dataset that is mounted at a directory; `find` looks for that."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.parent = ""

    def find(self) -> bool:
        """Tell whether a dataset is mounted at the directory, and remember its name."""
        self.parent = _mounted_at(self.directory)
        return bool(self.parent)

    def full(self, name: str) -> str:
        """Return the name by which the programs of ZFS and mount(2) know a dataset."""
        return f"{self.parent}/{name}"

    def create(self, name: str, size_bytes: int | None, doing: str) -> None:
        """Make an empty file system with a limit."""
        self.run(["zfs", "create", *_options(size_bytes), self.full(name)], doing)

    def snapshot(self, name: str, doing: str) -> None:
        """Take a snapshot."""
        self.run(["zfs", "snapshot", self.full(name)], doing)

    def clone(self, snapshot: str, name: str, size_bytes: int | None, doing: str) -> None:
        """Make a file system of a snapshot, with a limit of its own."""
        self.run(["zfs", "clone", *_options(size_bytes), self.full(snapshot), self.full(name)], doing)

    def promote(self, name: str, doing: str) -> None:
        """Make a clone the owner of the snapshot that it stands on, and the former owner its clone."""
        self.run(["zfs", "promote", self.full(name)], doing)

    def rollback(self, snapshot: str, doing: str) -> None:
        """Drop what was written after the newest snapshot of a file system."""
        self.run(["zfs", "rollback", self.full(snapshot)], doing)

    def destroy(self, name: str) -> None:
        """Destroy a file system without snapshots, or a snapshot as soon as no clone stands on it."""
        mark = ["-d"] if "@" in name else []
        with contextlib.suppress(NotFound):
            self.run(["zfs", "destroy", *mark, self.full(name)], f"delete {name}")

    def limit(self, name: str, size_bytes: int | None, doing: str) -> None:
        """Set what a file system may refer to, what it shares with others too."""
        self.run(["zfs", "set", _refquota(size_bytes), self.full(name)], doing)

    def check_size(self, name: str, size_bytes: int, doing: str) -> None:
        """Raise UsageError for a limit that cannot be, Refused for one that is below what is there."""
        if size_bytes < MIN_SIZE_BYTES:
            raise UsageError(f"cannot {doing}: a limit of {size_bytes} bytes is less than 1 MiB")
        (used_bytes,) = self.numbers("referenced", [name], doing)
        if used_bytes > size_bytes:
            raise Refused(
                f"cannot {doing}: its files take {_mib(used_bytes)}, which is more than {_mib(size_bytes)}",
                hint="delete files in it first",
            )

    def numbers(self, what: str, names: "list[str]", doing: str) -> "list[int]":
        """Return a property of some datasets, in bytes."""
        shown = ["zfs", "list", "-H", "-p", "-o", what, *map(self.full, names)]
        return [int(number) for number in self.run(shown, doing).split()]

    def settle(self, doing: str) -> None:
        """Make the numbers those of now: what was written counts from the next transaction group on."""
        self.run(["zpool", "sync", self.parent.partition("/")[0]], doing)

    def reserve(self, size_bytes: int, doing: str) -> None:
        """Keep room for PARENT's own files, unless more is kept; a disk that is full already has none."""
        shown = ["zfs", "list", "-H", "-p", "-o", "refreservation", self.parent]
        if int(self.run(shown, doing)) < size_bytes:
            with contextlib.suppress(NoSpace):
                self.run(["zfs", "set", f"refreservation={size_bytes}", self.parent], doing)

    def has_snapshots(self, name: str) -> bool:
        """Tell whether a file system has snapshots; one that is not there has none."""
        shown = ["zfs", "list", "-H", "-d", "1", "-t", "snapshot", "-o", "name", self.full(name)]
        with contextlib.suppress(NotFound):
            return bool(self.run(shown, f"delete {name}").strip())
        return False

    def limits(self) -> "dict[str, int | None]":
        """Return the limits of all file systems."""
        return {name: int(limit) or None for name, limit in self._list("filesystem", "refquota")}

    def all(self) -> Iterator[Dataset]:
        """Yield all file systems and snapshots, in the order in which they were made."""
        shown = self._list("filesystem,snapshot", "written", "clones", "defer_destroy")
        for name, written, clones, marked in shown:
            clones_ = [each.removeprefix(f"{self.parent}/") for each in clones.split(",")]
            yield Dataset(
                name, int(written), tuple(each for each in clones_ if each not in ("", "-")), marked == "on"
            )

    def _list(self, kinds: str, *properties: str) -> Iterator["list[str]"]:
        columns = ",".join(("name", *properties))
        shown = ["zfs", "list", "-H", "-p", "-d", "2", "-t", kinds, "-s", "createtxg", "-o", columns]
        for line in self.run([*shown, self.parent], "list datasets").splitlines():
            name, *values = line.split("\t")
            if name.startswith(f"{self.parent}/"):
                yield [name.removeprefix(f"{self.parent}/"), *values]

    def run(self, argv: "list[str]", doing: str) -> str:
        """Run a program of ZFS and return its output.

        Raises NotFound for a dataset that is not there, WrongState for one that is in use, NoSpace, or
        SysctrError with the program's last words.
        """
        try:
            return tree.run_tool(argv, doing, self.directory, _PACKAGE).stdout.decode()
        except SysctrError as error:
            # There is one exit status for all that goes wrong.
            if "does not exist" in error.message or "could not find any snapshots" in error.message:
                raise NotFound(error.message) from error
            if "dataset is busy" in error.message:
                raise WrongState(error.message, "somebody looks around in there") from error
            raise


def _options(size_bytes: int | None) -> Iterator[str]:
    for each in (*_PROPERTIES, _refquota(size_bytes)):
        yield from ("-o", each)


def _refquota(size_bytes: int | None) -> str:
    return f"refquota={'none' if size_bytes is None else size_bytes}"


def _mounted_at(directory: str) -> str:
    """Return the dataset that is mounted at a directory, "" where none is."""
    real = os.path.realpath(directory)
    found = ""
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            fields = line.split()
            fstype, source = fields[fields.index(b"-") + 1 :][:2]
            if mounts.unescaped(fields[4]) == real:
                # The last is on top.
                found = mounts.unescaped(source) if (fstype, fields[3]) == (b"zfs", b"/") else ""
    return found


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"
