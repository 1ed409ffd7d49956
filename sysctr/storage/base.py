"""What every storage driver offers: volumes of containers in a pool, snapshots, and how they are mounted.

Callers ask a driver's `traits`, never its name. Everything stored has the container's own ids: its root is 0
on disk. A driver never walks what a container wrote: it renames whole trees, or lets a `Worker` do it in a
job that has the container's ids and no rights over the host.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Traits:
    """What a driver can do without copying data, and what it can do at all."""

    shared_base: bool  # containers of one template share its tree
    cheap_snapshots: bool  # a snapshot of a stopped container costs the same whatever the size
    cheap_clones: bool  # and so does a clone in the same pool
    needs_freeze: bool  # a snapshot of a running container copies: it is paused for the last changes
    enforces_size: bool  # a size limit is kept by the file system
    grows_live: bool  # a volume with a limit can grow while it is in use
    shrinks: bool  # a limit can be lowered, not below what is used
    native_stream: bool  # it is a Streams too


@dataclass(frozen=True)
class Tree:
    """A directory of the host that a plan binds with the container's id map, under a name of its own."""

    name: str
    path: str
    read_only: bool = False


@dataclass(frozen=True)
class RootSpec:
    """How a volume becomes a root: pure data for a plan, nothing is opened.

    With `lowers` it is an overlay: `lowers` (top first), `upper` and `work` begin with the name of a tree, as
    in "pool/layers/debian-12/rootfs"; an empty `upper` makes it read-only. Without, the single tree is the
    root itself.
    """

    trees: tuple[Tree, ...]
    lowers: tuple[str, ...] = ()
    upper: str = ""
    work: str = ""


@dataclass(frozen=True)
class Base:
    """A template as a driver sees it: the name of the layer it becomes in a pool, and its tree."""

    layer: str
    tree: str


@dataclass(frozen=True)
class Snapshot:
    """A state of a volume that was kept; `note` is what the caller wants to have kept with it."""

    name: str
    created: float
    parent: str = ""  # the snapshot before it; empty for the first
    note: Mapping[str, Any] = field(default_factory=dict)
    # Why its record cannot be read. It can be deleted all the same.
    error: str = ""


class Worker(Protocol):
    """Works on trees that containers wrote, in a job with one container's ids and no rights over the host."""

    def copy(
        self, source: RootSpec, target: str, *, in_use: bool = False, changed_since_s: float | None = None
    ) -> None:
        """Make the directory `target` a copy of `source`: owners, ACLs, capabilities, links, holes, times.

        Files are shared with the source (reflink) where the file system can. What is `in_use` may change
        under its hands, and needs the second copy. With `changed_since_s` (a time
        of the clock that file systems use) `target` is an earlier copy that is brought up to date: what
        differs or was written since then is copied again, what is gone is removed.
        """

    def merge(
        self, directory: str, layers: Sequence[str], target: str, below: RootSpec | None = None
    ) -> None:
        """Make `target` the union of overlay layers (top first) by hard links; all are below `directory`.

        What they hide of `below`, on which they stand, stays hidden.
        """


# Pauses a running container: entered for the moment in which its state is taken.
Pause = Callable[[], AbstractContextManager[None]]


class Driver(Protocol):
    """One way of keeping volumes. What does not say otherwise is over in constant time.

    Every method raises SysctrError: NotFound for what is missing, WrongState for what exists already or is in
    use, NoSpace on a full disk, Refused for what this driver or this pool cannot do, with the reason. What
    fails leaves what was there before; what a crash cuts short is finished or undone by `sweep`.
    """

    kind: str
    traits: Traits
    directory: str

    def prepare(self) -> None:
        """Make the pool's directories, and see that its file system can hold volumes."""

    def sweep(self) -> None:
        """Finish or undo what a crash left; called once, before anything else, by the only daemon."""

    def empty_trash(self) -> None:
        """Delete the data of what was destroyed and of layers that nobody uses; takes as long as it takes."""

    def create(
        self, volume: str, base: Base | None, worker: Worker, *, size_bytes: int | None = None
    ) -> None:
        """Make a volume with the content of `base`, or an empty one. It exists completely or not at all.

        An empty one is mounted as a single tree as long as it has no snapshots: containers may share it.
        """

    def destroy(self, volume: str) -> None:
        """Take a volume and its snapshots away; one that is not there is fine. Works on a full disk."""

    def exists(self, volume: str) -> bool:
        """Tell whether the volume is there."""

    def list(self) -> "list[str]":
        """Return the names of all volumes, sorted."""

    def activate(self, volume: str) -> RootSpec:
        """Make a volume mountable, mount what has to be mounted on the host, and return how to mount it.

        It stays so, over a restart of the daemon too, until `deactivate`; twice is fine.
        """

    def deactivate(self, volume: str) -> None:
        """Take back `activate`; nothing uses the volume any more. One that is not active is fine."""

    def active(self) -> "frozenset[str]":
        """Return the volumes that are active."""

    def snapshot(
        self, volume: str, name: str, note: Mapping[str, Any], worker: Worker, pause: Pause | None = None
    ) -> None:
        """Keep the volume's state under a name; `pause` is given for one in use."""

    def rollback(self, volume: str, name: str) -> None:
        """Give a volume that is not active the content of a snapshot; all snapshots stay. Twice is fine."""

    def delete_snapshot(self, volume: str, name: str) -> None:
        """Forget a snapshot, a damaged one too; works on a full disk."""

    def snapshots(self, volume: str) -> "list[Snapshot]":
        """Return the snapshots of a volume, oldest first; damaged ones are among them and say so."""

    def parent(self, volume: str) -> str:
        """Return the snapshot that the volume's content goes back to, empty for none."""

    def set_snapshot_note(self, volume: str, name: str, note: Mapping[str, Any]) -> None:
        """Replace what is kept with a snapshot."""

    def note(self, volume: str) -> "dict[str, Any]":
        """Return what was kept with the volume itself; {} where there is nothing or it is damaged."""

    def set_note(self, volume: str, note: Mapping[str, Any]) -> None:
        """Keep something with the volume: it is there when all that is known of a container is its volume."""

    def clone(
        self,
        volume: str,
        snapshot: str,
        target: str,
        worker: Worker,
        *,
        size_bytes: int | None = None,
    ) -> None:
        """Make a new volume in this pool with the content of a snapshot, or of an inactive volume ("").

        Constant time where the traits say `cheap_clones`, else as long as copying takes.
        """

    def opened(self, volume: str, snapshot: str = "") -> "AbstractContextManager[RootSpec]":
        """Return a read-only view of a snapshot, or of the volume where it is not active, while entered."""

    def size(self, volume: str) -> int | None:
        """Return the limit of a volume in bytes; None without one."""

    def resize(self, volume: str, size_bytes: int | None, worker: Worker) -> None:
        """Change a volume's limit; None takes it away. One that grows may be in use where traits say so."""

    def usage(self, volume: str) -> int | None:
        """Return the bytes that belong to the volume alone as last measured; None before the first time."""

    def filled(self, volume: str) -> int | None:
        """Return the bytes that count towards the volume's limit, what it shares with others among them."""

    def measure(self, volume: str) -> int:
        """Measure the same now, however long it takes."""

    def users_of(self, layer: str) -> "list[str]":
        """Return the volumes that stand on the layer of a template and would break without it."""

    def drop_bases(self, keep: "frozenset[str]") -> None:
        """Take away the copies of templates that are not among the layers `keep` and that no volume needs."""

    def compact(self, volume: str, worker: Worker) -> None:
        """Merge layers that nobody needs one by one; takes as long as it takes, volumes in use stay so."""


class Streams(Protocol):
    """What a driver with the trait `native_stream` offers besides: snapshots as streams of its own format."""

    def send(self, volume: str, snapshot: str, out_fd: int, base: str = "") -> None:
        """Write a snapshot to a descriptor, or what of it differs from the snapshot `base`."""

    def receive(self, volume: str, name: str, in_fd: int, note: Mapping[str, Any]) -> None:
        """Make a snapshot of a volume, under the name that it was sent under, of what `send` wrote.

        The volume stays as it is: `rollback` gives it the content. With a base, that was received before. Of
        trusted peers only. What fails, as for a stream that is cut, leaves nothing.
        """
