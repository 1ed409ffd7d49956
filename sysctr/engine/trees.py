"""Copies and merges of what containers wrote, each in a job with the container's ids and no others."""

import math
import os
from collections.abc import Sequence

from sysctr.engine.job import JobRunner, Task
from sysctr.errors import NoSpace, SysctrError
from sysctr.storage.base import RootSpec

_COPY = ("cp", "--archive", "--reflink=auto", "--sparse=auto", "--no-target-directory", "/source", "/volume")
# rsync tells changes by size and time. Writes through a mapping change no time while a page stays dirty, so
# what was written since the first copy began is made to look old there, and is copied again whatever it says.
_UPDATE = r"""
set -eu
find /volume -xdev -type f -newermt "@$1" -exec touch --no-create --date=@0 -- {} +
exec rsync --archive --hard-links --acls --xattrs --numeric-ids --sparse --devices --specials --delete \
    --modify-window=-1 --whole-file --one-file-system /source/ /volume/
"""


class TreeWorker:
    """The storage drivers' `Worker`: does what they ask with the ids of one container."""

    def __init__(self, jobs: JobRunner, task: Task | None = None) -> None:
        self._jobs = jobs
        self._task = task

    def copy(self, source: RootSpec, target: str, *, changed_since_s: float | None = None) -> None:
        """Make the directory `target` a copy of `source`, or bring an earlier copy up to date."""
        argv = _COPY
        if changed_since_s is not None:
            argv = ("sh", "-c", _UPDATE, "update", str(math.floor(changed_since_s)))
        status = self._jobs.run_tool(argv, volume=target, source=source, task=self._task)
        if status:
            raise _failure(status, target)

    def merge(self, directory: str, layers: Sequence[str], target: str) -> None:
        """Make `target` the union of overlay layers (top first) by hard links; all are below `directory`."""
        program = {"builtin": "merge", "layers": list(layers), "target": target}
        self._jobs.run_builtin_on(directory, program, self._task)


def _failure(status: int, target: str) -> SysctrError:
    disk = os.statvfs(target)
    if not disk.f_bavail or not disk.f_favail:
        return NoSpace(f"cannot copy files: no space left on {target}")
    return SysctrError(f"cannot copy files: the job ended with {status}", "the task's log says why")
