"""What the overlay driver has to copy: the upper of what runs, and layers into images and out of them."""

import contextlib
import errno
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from sysctr.errors import NoSpace, Refused
from sysctr.linux import fault
from sysctr.storage import images, tree
from sysctr.storage.base import Pause, Worker
from sysctr.storage.overlay_layers import Chain, Layers
from sysctr.storage.volumes import VolumeRecord


def mib(size_bytes: int) -> str:
    """Return a size as the errors say it.

    >>> mib(64 << 20)
    '64 MiB'
    """
    return f"{size_bytes / (1 << 20):.0f} MiB"


def make(layers: Layers, volume: str, doing: str, below: tuple[str, ...], size_bytes: int | None) -> None:
    """Make a volume with an empty upper on layers that all volumes may stand on."""
    records = layers.records
    if size_bytes is not None:
        images.check_size(doing, size_bytes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(records.explained(doing))
        project = layers.projects.new()
        in_image = size_bytes is not None and not project
        if not in_image:
            # Before the volume's directory, so that it is kept until that is published.
            upper = stack.enter_context(layers.fresh(volume, "uppers", project=project))
            _limit(layers, project, size_bytes)
        hidden = stack.enter_context(records.making(volume, doing))
        if in_image:
            upper = layers.new_name(volume, "disk")
            with _new_image(layers, f"{hidden}/disk.img", size_bytes) as directory:
                layers.make(f"{directory}/uppers/{upper.partition('/')[2]}")
        fault.point("overlay.create.made")
        record = VolumeRecord(size_bytes, fields=_fields(Chain(upper, below), project))
        records.write_in(hidden, record)
        fault.point("overlay.create.recorded")


def _limit(layers: Layers, project: int, size_bytes: int | None) -> None:
    if project and size_bytes is not None:
        layers.projects.limit(project, size_bytes)
        fault.point("overlay.project.limited")


def _fields(chain: Chain, project: int) -> "dict[str, Any]":
    return {**chain.fields(), "project": project} if project else chain.fields()


@contextlib.contextmanager
def _new_image(layers: Layers, path: str, size_bytes: int) -> Iterator[str]:
    images.make(path, size_bytes)
    with layers.disks.mounted_image(path) as directory:
        yield directory


@contextlib.contextmanager
def live(layers: Layers, volume: str, doing: str, worker: Worker, pause: Pause) -> Iterator[tuple[str, ...]]:
    """Copy the upper of a volume in use, paused for the last changes; return the copy and what is below it.

    The copy is never in the volume's image, or in the project that has the limit: it would take from that
    what the container did not write.
    """
    record = layers.records.read(volume)
    chain, project = layers.chain(volume, record), layers.project(record)
    kept = layers.new_name(volume, "uppers")
    path = layers.path(volume, kept)
    with (
        layers.pinned(volume, [kept, *chain.all]),
        layers.mounted(volume, chain.all),
        layers.records.explained(doing),
        contextlib.ExitStack() as undo,
    ):
        undo.callback(tree.delete, path)
        os.mkdir(path, 0o700)
        os.mkdir(f"{path}/rootfs", 0o755)
        if project and layers.projects.enforced():
            layers.projects.enter(f"{path}/rootfs", project + 1)
        source = layers.raw(volume, chain.upper)
        upper = source.trees[0].path
        began_s = time.time()
        # A page that was written to before is clean after this, so that the next write to it through a
        # mapping changes the file's times again; one that is written to after `began_s` has changed them.
        tree.sync_file_system(upper)
        worker.copy(source, f"{path}/rootfs", in_use=True)
        fault.point("overlay.live.copied")
        # What is to be written now need not be written while nothing runs.
        tree.sync_file_system(upper)
        tree.sync_file_system(path)
        with pause():
            fault.point("overlay.live.paused")
            worker.copy(source, f"{path}/rootfs", changed_since_s=began_s)
        fault.point("overlay.live.caught_up")
        tree.sync_file_system(path)
        undo.pop_all()
        yield (kept, *chain.layers)


@contextlib.contextmanager
def _copied(
    layers: Layers,
    volume: str,
    wanted: Sequence[str],
    owner: str,
    directory: str,
    kind: str,
    worker: Worker,
    project: int = 0,
) -> Iterator["dict[str, str]"]:
    """Copy layers of a volume, marks and all, below `directory`, and return the names of the copies."""
    copies = {layer: layers.new_name(owner, kind) for layer in wanted}
    with layers.pinned(owner, copies.values()), contextlib.ExitStack() as undo:
        for layer, copy in copies.items():
            path = f"{directory}/uppers/{copy.partition('/')[2]}"
            undo.callback(tree.delete, path)
            os.makedirs(path, mode=0o700)
            os.mkdir(f"{path}/rootfs", 0o755)
            if project:
                layers.projects.enter(f"{path}/rootfs", project)
            worker.copy(layers.raw(volume, layer), f"{path}/rootfs")
            fault.point("overlay.layer.copied")
        tree.sync_file_system(directory)
        # From here on a record may name them; what none names is collected later.
        undo.pop_all()
        yield copies


def clone(
    layers: Layers,
    volume: str,
    target: str,
    doing: str,
    wanted: tuple[str, ...],
    size_bytes: int | None,
    worker: Worker,
) -> None:
    """Make a volume on layers of another; those in the other's image are copied.

    The upper of the other is among them only if it cannot be a layer for both. What both stand on counts
    against neither's limit but that of the volume which wrote it.
    """
    records = layers.records
    if size_bytes is not None:
        images.check_size(doing, size_bytes)
    apart = [layer for layer in wanted if layer.startswith("disk/")]
    if apart and wanted[0] not in apart:
        apart.insert(0, wanted[0])
    top = f"{layers.path(volume, wanted[0])}/rootfs"
    with contextlib.ExitStack() as stack:
        project = layers.projects.new()
        in_image = size_bytes is not None and not project
        if not in_image:
            # Before the volume's directory, so that they are kept until that is published. The limit comes
            # with the upper, as nothing else would tell of it after a crash.
            upper = stack.enter_context(layers.fresh(target, "uppers", top, project))
            _limit(layers, project, size_bytes)
            with _fitting(doing, size_bytes):
                copies = stack.enter_context(
                    _copied(layers, volume, apart, target, layers.pool, "uppers", worker, project)
                )
        hidden = stack.enter_context(records.making(target, doing))
        if in_image:
            directory = stack.enter_context(_new_image(layers, f"{hidden}/disk.img", size_bytes))
            with _fitting(doing, size_bytes):
                copies = stack.enter_context(
                    _copied(layers, volume, apart, target, directory, "disk", worker)
                )
                upper = layers.new_name(target, "disk")
                layers.make(f"{directory}/uppers/{upper.partition('/')[2]}", top)
        below = tuple(copies.get(layer, layer) for layer in wanted)
        for layer in below:
            if layer.startswith("uppers/"):
                layers.add_owners(layers.path(target, layer), [target])
        records.write_in(hidden, VolumeRecord(size_bytes, fields=_fields(Chain(upper, below), project)))
        fault.point("overlay.clone.recorded")


@contextlib.contextmanager
def _fitting(doing: str, size_bytes: int | None) -> Iterator[None]:
    """Say of an image or a project that is full that its limit is too small."""
    try:
        yield
    except (NoSpace, OSError) as error:
        full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        if size_bytes is None or not full:
            raise
        raise Refused(
            f"cannot {doing}: its files do not fit into {mib(size_bytes)}", "choose more, or delete files"
        ) from error


def move_in(layers: Layers, volume: str, doing: str, size_bytes: int, worker: Worker) -> None:
    """Give an idle volume without a limit one: all but its template is copied into a new image."""
    records = layers.records
    images.check_size(doing, size_bytes)
    chain = layers.chain(volume, records.read(volume))
    apart = [layer for layer in chain.all if layer.startswith("uppers/")]
    _drop_old_image(layers, volume, doing)
    path = records.path(volume)
    image = f"{path}/{tree.hidden_name('new', 'disk')}"
    with layers.pinned(volume, chain.all), records.explained(doing), contextlib.ExitStack() as undo:
        used_bytes = tree.size_bytes(*[f"{layers.path(volume, layer)}/rootfs" for layer in apart])
        if used_bytes > size_bytes:
            raise Refused(
                f"cannot {doing}: it uses {mib(used_bytes)}", "choose more, or delete files and snapshots"
            )
        undo.callback(_remove_file, image)
        directory = undo.enter_context(_new_image(layers, image, size_bytes))
        with _fitting(doing, size_bytes):
            copies = undo.enter_context(_copied(layers, volume, apart, volume, directory, "disk", worker))
            upper = layers.new_name(volume, "disk")
            top = f"{layers.path(volume, chain.upper)}/rootfs"
            layers.make(f"{directory}/uppers/{upper.partition('/')[2]}", top)
        below = tuple(copies.get(layer, layer) for layer in chain.all)
        tree.sync_file_system(directory)
        fault.point("overlay.resize.copied")
        with records.lock:
            os.rename(image, layers.disks.image(volume))
            tree.sync_directory(path)
            fault.point("overlay.resize.placed")
            _record(layers, volume, Chain(upper, below), size_bytes)


def move_out(layers: Layers, volume: str, doing: str, worker: Worker) -> None:
    """Take the limit of an idle volume away: what its image holds is copied out; snapshots may stay there."""
    records = layers.records
    chain = layers.chain(volume, records.read(volume))
    apart = [layer for layer in chain.all if layer.startswith("disk/")]
    with (
        layers.pinned(volume, chain.all),
        layers.mounted(volume, chain.all),
        records.explained(doing),
        _copied(layers, volume, apart, volume, layers.pool, "uppers", worker) as copies,
        layers.fresh(volume, "uppers", f"{layers.path(volume, chain.upper)}/rootfs") as upper,
    ):
        fault.point("overlay.resize.copied")
        below = tuple(copies.get(layer, layer) for layer in chain.all)
        _record(layers, volume, Chain(upper, below), None)


def _record(layers: Layers, volume: str, chain: Chain, size_bytes: int | None) -> None:
    with layers.records.lock:
        record = layers.records.read(volume)
        fields = {**record.fields, **chain.fields()}
        # What is in an image now, or was, has no project.
        fields.pop("project", None)
        layers.records.write(volume, replace(record, size_bytes=size_bytes, fields=fields))
    fault.point("overlay.resize.recorded")


def _drop_old_image(layers: Layers, volume: str, doing: str) -> None:
    """Throw away the image of an earlier limit; raises Refused where snapshots lie in it."""
    with layers.records.lock:
        if not layers.disks.exists(volume):
            return
        inside = [
            record.name for record in layers.records.snapshot_records(volume)
            if record.error or any(layer.startswith("disk/") for layer in layers.kept(volume, record))
        ]  # fmt: skip
        if inside:
            raise Refused(
                f"cannot {doing}: snapshots of its earlier disk are kept in that: {', '.join(inside)}",
                "delete them first",
            )
        layers.records.trash.throw(layers.disks.image(volume))


def limit(layers: Layers, volume: str, doing: str, size_bytes: int | None) -> None:
    """Change the limit that a volume has by its project, in use or not; raises Refused below what it uses."""
    records, projects = layers.records, layers.projects
    with records.lock, records.explained(doing), contextlib.ExitStack() as undo:
        record = records.read(volume)
        project, fields = layers.project(record), dict(record.fields)
        if size_bytes is not None:
            images.check_size(doing, size_bytes)
            layers.check_limit(volume, record, doing)
            used_bytes = projects.used_bytes(project)
            if used_bytes > size_bytes:
                used_bytes = projects.used_bytes(project, settled=True)
            if used_bytes > size_bytes:
                raise Refused(
                    f"cannot {doing}: it uses {mib(used_bytes)}", "choose more, or delete files and snapshots"
                )
        elif not layers.in_project(volume, record):
            del fields["project"]
        undo.callback(projects.limit, project, record.size_bytes)
        try:
            projects.limit(project, size_bytes)
        except OSError:
            # Where there are no quotas any more, there is no limit to take away.
            if size_bytes is not None or projects.enforced():
                raise
            undo.pop_all()
        fault.point("overlay.project.limited")
        records.write(volume, replace(record, size_bytes=size_bytes, fields=fields))
        undo.pop_all()


def grow(layers: Layers, volume: str, size_bytes: int) -> None:
    """Make the image of a volume larger, in use or not."""
    image = layers.disks.image(volume)
    try:
        # Mounted, the kernel does it: a crash in the middle costs nothing.
        with layers.disks.used(volume) as directory:
            images.grow(image, directory, size_bytes)
    except Refused:
        if volume in layers.active.volumes():
            raise
        with layers.disks.alone(volume):
            images.grow(image, None, size_bytes)
    fault.point("overlay.resize.grown")
    with layers.records.lock:
        record = layers.records.read(volume)
        layers.records.write(volume, replace(record, size_bytes=size_bytes))


def shrink(layers: Layers, volume: str, doing: str, size_bytes: int) -> None:
    """Make the image of an idle volume smaller; the one it has is replaced when the new one is complete."""
    records = layers.records
    images.check_size(doing, size_bytes)
    copy = f"{records.path(volume)}/{tree.hidden_name('new', 'disk')}"
    with records.explained(doing), contextlib.ExitStack() as undo:
        undo.callback(_remove_file, copy)
        undo.enter_context(layers.disks.alone(volume))
        images.copy(layers.disks.image(volume), copy)
        try:
            images.shrink(copy, size_bytes)
        except Refused as error:
            raise Refused(f"cannot {doing}: {error.message.partition(': ')[2]}", error.hint) from error
        fault.point("overlay.resize.shrunk")
        with records.lock:
            os.rename(copy, layers.disks.image(volume))
            tree.sync_directory(records.path(volume))
            fault.point("overlay.resize.placed")
            records.write(volume, replace(records.read(volume), size_bytes=size_bytes))


def _remove_file(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
