"""Restoring an archive that has snapshots: the volume is brought from state to state, and each is kept.

All states come out of one pass over the archive, whose order is anybody's. So they lie beside each other for
as long as that takes, in a volume that is the container's and goes with it if a crash cuts that short.
"""

import contextlib
import os
import re
import stat
from collections.abc import Sequence
from typing import Any

from sysctr.config.foreign import ForeignSnapshot
from sysctr.engine.archive_source import Source
from sysctr.engine.host import Host
from sysctr.engine.record import Record
from sysctr.engine.tasks import Task
from sysctr.errors import Refused, SysctrError
from sysctr.linux import fault
from sysctr.storage.base import Driver, RootSpec, Tree
from sysctr.template.layout import tar_arguments
from sysctr.template.unpack import Outcome, unpack

_PRESENT = "present"
_OF_SYSCTR = re.compile(r"tmp-.*|now")


def states_of(record: Record) -> str:
    """Return the volume in which the states lie meanwhile."""
    return f"{record.volume}-states"


def unpack_states(
    host: Host,
    task: Task,
    source: Source,
    record: Record,
    path: str,
    below: str,
    snapshots: Sequence[ForeignSnapshot],
    options: Sequence[str],
    left_out: Sequence[str],
) -> tuple[Outcome, list[str]]:
    """Unpack the states of an archive, oldest first, into the empty active volume at `path`, and keep each.

    `below` is the directory of the present one. Returns what was unpacked, and notes.
    """
    driver = host.driver(record)
    beside = states_of(record)
    limit = record.usable("restore").limits.disk_bytes
    worker = host.worker(record, task)
    with contextlib.ExitStack() as undo:
        driver.create(
            beside, None, worker, size_bytes=None if limit is None else limit * (len(snapshots) + 1)
        )
        undo.callback(_destroy, driver, beside)
        directory = driver.activate(beside).trees[-1].path
        places = {one.below: str(number) for number, one in enumerate(snapshots)} | {below: _PRESENT}
        outcome = unpack(
            directory, source.codec, lambda fd: source.feed(fd, task), doing=source.doing,
            run_job=host.jobs_for(record).run_tool, task=task,
            options=[*options, *tar_arguments(places, left_out)],
        )  # fmt: skip
        fault.point("restore.states.unpacked")
        notes: list[str] = []
        names: set[str] = set()
        for number, one in enumerate(snapshots):
            task.step(f"keeping snapshot {one.name}")
            _bring(host, task, record, f"{directory}/{number}", path, source.doing)
            name = _free_name(one.name, names)
            names.add(name)
            try:
                driver.snapshot(record.volume, name, _note(record, one), worker, contextlib.nullcontext)
            except Refused as error:
                notes.append(f"snapshots stay behind: {error.message}")
                break
            if name != one.name:
                notes.append(f"snapshot {one.name} is {name} here")
            fault.point("restore.state.kept")
        task.step("restoring the present state")
        _bring(host, task, record, f"{directory}/{_PRESENT}", path, source.doing)
    return outcome, notes


def _bring(host: Host, task: Task, record: Record, state: str, path: str, doing: str) -> None:
    """Make the tree at `path` that of a state, whatever it has."""
    try:
        mode = os.lstat(state).st_mode
    except FileNotFoundError:
        mode = 0
    # An archive decides what it is.
    if not stat.S_ISDIR(mode):
        raise SysctrError(f"cannot {doing}: the root of one of its states is no directory")
    argv = ["find", "/volume", "-xdev", "-mindepth", "1", "-delete"]
    status = host.jobs_for(record).run_tool(argv, volume=path, task=task)
    if status:
        raise SysctrError(f"cannot {doing}: the volume cannot be emptied for the next state")
    host.worker(record, task).copy(RootSpec((Tree("state", state),)), path)


def _destroy(driver: Driver, volume: str) -> None:
    driver.deactivate(volume)
    driver.destroy(volume)


def _note(record: Record, one: ForeignSnapshot) -> dict[str, Any]:
    """Return what is kept with a snapshot, as one that was taken here has it."""
    return {
        "description": one.description, "automatic": False, "expires": None, "config": record.config_text,
        "generation": record.generation, "running": False, "mounts": [], "taken": one.created,
    }  # fmt: skip


def _free_name(name: str, taken: set[str]) -> str:
    """Return the name that a snapshot gets here.

    >>> _free_name("Before_Upgrade", set()), _free_name("now", set()), _free_name("a", {"a"})
    ('before_upgrade', 'now-1', 'a-1')
    """
    stem = re.sub(r"[^a-z0-9._-]", "-", name.lower())[:58].strip("._-") or "snapshot"
    names = (stem if not number else f"{stem}-{number}" for number in range(len(taken) + 2))
    if stem.startswith("tmp-"):
        names = (f"was-{stem}-{number}" for number in range(len(taken) + 2))
    return next(one for one in names if one not in taken and not _OF_SYSCTR.fullmatch(one))
