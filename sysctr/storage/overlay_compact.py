"""Fewer layers: runs of them that nobody needs one by one become one, by hard links.

A list of layers is what a volume or a snapshot stands on, top first. A merged layer shows what its run shows,
so each list may have the one or the other: they are rewritten one by one, and a crash leaves some of each.
"""

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sysctr.errors import SysctrError
from sysctr.linux import fault, files
from sysctr.storage import tree
from sysctr.storage.base import Worker
from sysctr.storage.overlay_layers import Chain, Layers

log = logging.getLogger(__name__)

# Lookup costs about 1 µs for each layer and file.
MOST_LAYERS = 16
# So many old layers become one more, of the next level: every file is linked anew once for each level only.
_RUN = 8


def together(mine: Sequence[tuple[str, ...]], everyone: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return a longest run of layers that every list has whole or not at all; () where there is none.

    >>> together([("u/c", "u/b", "u/a")], [("u/c", "u/b", "u/a"), ("u/b", "u/a")])
    ('u/b', 'u/a')
    """
    above: dict[str, set[str]] = {}
    below: dict[str, set[str]] = {}
    for layers in everyone:
        for upper, lower in zip(("", *layers), (*layers, ""), strict=True):
            below.setdefault(upper, set()).add(lower)
            above.setdefault(lower, set()).add(upper)
    best: tuple[str, ...] = ()
    for layers in mine:
        run: tuple[str, ...] = ()
        for layer in layers:
            joined = run and below[run[-1]] == {layer} and above[layer] == {run[-1]}
            run = (*run, layer) if joined and _alike(run[-1], layer) else (layer,)
            if len(run) > max(1, len(best)) and not layer.startswith("layers/"):
                best = run
    return best


def oldest(layers: tuple[str, ...], levels: Mapping[str, int]) -> tuple[str, ...]:
    """Return the run of a list to merge where it is too long: of the lowest level, and the oldest of those.

    >>> oldest(("u/d", "u/c", "u/b", "u/a", "layers/base"), {"u/a": 1})
    ('u/d', 'u/c', 'u/b', 'u/a')
    """
    best: tuple[str, ...] = ()
    for length in range(_RUN, 1, -1):
        for first in range(len(layers) - length, -1, -1):
            run = layers[first : first + length]
            same = all(_alike(run[0], layer) and not layer.startswith("layers/") for layer in run)
            if same and (not best or _level(run, levels) < _level(best, levels)):
                best = run
        if best:
            break
    return best


def replaced(layers: tuple[str, ...], run: tuple[str, ...], merged: str) -> tuple[str, ...]:
    """Return a list with a merged layer in the place of its run, where the list has it.

    >>> replaced(("d", "c", "b", "a"), ("c", "b"), "M")
    ('d', 'M', 'a')
    """
    for first in range(len(layers) - len(run) + 1):
        if layers[first : first + len(run)] == run:
            return (*layers[:first], merged, *layers[first + len(run) :])
    return layers


def _alike(one: str, other: str) -> bool:
    """Tell whether layers lie in one file system, so that there can be hard links between them."""
    return one.partition("/")[0] == other.partition("/")[0]


def _level(run: Sequence[str], levels: Mapping[str, int]) -> int:
    return max(levels.get(layer, 0) for layer in run)


def compact(layers: Layers, volume: str, worker: Worker) -> bool:
    """Merge what can be merged of a volume's layers; tell whether there was anything."""
    with layers.mounted(volume, ["disk/"] if layers.disks.exists(volume) else []):
        return _compact(layers, volume, worker)


def _compact(layers: Layers, volume: str, worker: Worker) -> bool:
    done = False
    while True:
        with layers.records.lock, contextlib.ExitStack() as pins:
            run, level, below = _choose(layers, volume)
            if not run:
                return done
            merged = layers.new_name(volume, run[0].partition("/")[0])
            pins.enter_context(layers.pinned(volume, [*run, merged, *below]))
            held = pins.pop_all()
        with held, layers.records.explained(f"merge layers of volume {volume}"):
            _merge(layers, volume, run, merged, level, below, worker)
            with layers.records.lock:
                _rewrite(layers, volume, run, merged)
        done = True


def _choose(layers: Layers, volume: str) -> tuple[tuple[str, ...], int, tuple[str, ...]]:
    """Return the next run to merge, empty for none, the level of what comes out, and what it stands on."""
    records = layers.records
    mine = _lists(layers, volume)
    everyone = list(mine)
    for other in records.list():
        if other != volume:
            # Of what cannot be read nothing is known: its layers stay as they are, beside merged ones.
            with contextlib.suppress(SysctrError):
                everyone += _lists(layers, other)
    levels = {layer: _read_level(layers, volume, layer) for each in mine for layer in each}
    run = together(mine, everyone)
    if run:
        return run, _level(run, levels), _below(run, mine)
    for each in sorted(mine, key=len, reverse=True):
        if len(each) > MOST_LAYERS and (run := oldest(each, levels)):
            return run, _level(run, levels) + 1, _below(run, mine)
    return (), 0, ()


def _below(run: tuple[str, ...], lists: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the layers below a run, in the first list that has it: in all they show the same."""
    each = next(each for each in lists if run[-1] in each)
    return each[each.index(run[-1]) + 1 :]


def _lists(layers: Layers, volume: str) -> "list[tuple[str, ...]]":
    """Return the lists of a volume and of those of its snapshots that can be read."""
    found = [layers.chain(volume, layers.records.read(volume)).layers]
    for record in layers.records.snapshot_records(volume):
        with contextlib.suppress(SysctrError):
            found.append(layers.kept(volume, record))
    return found


def _read_level(layers: Layers, volume: str, layer: str) -> int:
    try:
        content, _ = files.read_bounded(f"{layers.path(volume, layer)}/level", 16)
        return int(content)
    except (OSError, ValueError):
        return 0


def _merge(
    layers: Layers,
    volume: str,
    run: tuple[str, ...],
    merged: str,
    level: int,
    below: tuple[str, ...],
    worker: Worker,
) -> None:
    path = layers.path(volume, merged)
    directory, name = os.path.split(path)
    with contextlib.ExitStack() as undo:
        undo.callback(tree.delete, path)
        os.mkdir(path, 0o700)
        os.mkdir(f"{path}/rootfs", 0o755)
        tree.write_file(f"{path}/level", f"{level}\n")
        for layer in run:
            layers.add_owners(path, layers.owners(layers.path(volume, layer)))
        names = [layer.partition("/")[2] for layer in run]
        view = layers.view(volume, below) if below else None
        worker.merge(directory, [f"{each}/rootfs" for each in names], f"{name}/rootfs", view)
        tree.sync_file_system(directory)
        fault.point("overlay.compact.merged")
        undo.pop_all()


def _rewrite(layers: Layers, volume: str, run: tuple[str, ...], merged: str) -> None:
    """Put a merged layer into all lists that have its run; layers in an image are in one volume's only."""
    records = layers.records
    for other in [volume] if run[0].startswith("disk/") else records.list():
        try:
            for record in records.snapshot_records(other):
                if not record.error:
                    before = layers.kept(other, record)
                    after = replaced(before, run, merged)
                    if after != before:
                        fields = {**record.fields, "layers": list(after)}
                        records.write_snapshot(other, replace(record, fields=fields))
                        fault.point("overlay.compact.snapshot")
            now = records.read(other)
            chain = layers.chain(other, now)
            below = replaced(chain.layers, run, merged)
            if below != chain.layers:
                fields = {**now.fields, **Chain(chain.upper, below).fields()}
                records.write(other, replace(now, fields=fields))
                fault.point("overlay.compact.volume")
        except SysctrError as error:
            # What it stands on stays, because it still names it.
            log.warning("%s", error)
