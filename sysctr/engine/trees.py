"""Copies and merges of what containers wrote, each in a job with the container's ids and no others."""

import contextlib
import math
import tempfile
import weakref
from collections.abc import Sequence
from typing import IO

from sysctr.engine.job import SOURCE, JobRunner, Task
from sysctr.errors import NoSpace, SysctrError
from sysctr.storage.base import RootSpec

# What the scripts below end with when the disk is full; else they end as rsync does.
_NO_SPACE = 28
# What timeout(1) ends with. A container that stands still must go on, whatever it did to its files: a lease
# (fcntl(2)) on one keeps who opens it waiting for 45 s.
_TIMED_OUT = 124
_LONGEST_PAUSE_S = 120
# What became something else, or shorter, under its hands is to an rsync an error, and to us as good as gone:
# ENOENT, ENOTDIR, EISDIR, EINVAL of readlink(2), ELOOP, ENODATA for what is too short, ESTALE of an overlay.
GONE = r"^rsync: .* (\(2\|20\|21\|22\|40\|61\|116\))$"
# What an rsync said is in /tmp/words, and its end in `status`. Errors that are all like $1 are none.
FORGIVE = r"""
forgive() {
    [ "$status" = 23 ] && [ -s /tmp/words ] || return 0
    grep -q -v -e '^file has vanished: ' -e '^rsync error: ' -e '^IO error encountered -- skipping' -e "$1" \
        /tmp/words || status=24
}
"""
# An upper's past, which means nothing in a copy of it (sysctr.runtime.layers.MARKS).
_FILTERS = " ".join(f"--filter='-x user.overlay.{mark}'" for mark in ("origin", "impure", "uuid", "nlink"))
_RSYNC = rf"""{FORGIVE}
set -eu
export LC_ALL=C.UTF-8
# $1 is not empty where what is copied is in use.
bring_up_to_date() {{
    command -v rsync >/dev/null || {{ echo 'rsync is not installed' >&2; exit 127; }}
    status=0
    rsync --archive --hard-links --acls --xattrs --numeric-ids --sparse --devices --specials --delete \
        --modify-window=-1 --whole-file --one-file-system {_FILTERS} \
        /source/ /volume/ >/tmp/words 2>&1 || status=$?
    [ -z "${{1-}}" ] || forgive '{GONE}'
    # What went away in the meantime need not be copied.
    [ "$status" != 0 ] && [ "$status" != 24 ] || exit 0
    cat /tmp/words >&2
    ! grep -q -e 'No space left' -e 'quota exceeded' /tmp/words || exit {_NO_SPACE}
    exit "$status"
}}
"""
# cp knows reflinks, and is faster where there are none; but what changes under its hands makes it fail, and
# then rsync completes what it left, and tells why if that fails too. Standard output lists the directories.
# What is in use may change meanwhile, for it is brought up to date later.
_COPY = rf"""{_RSYNC}
find /source -xdev -type d -printf '%i %P\0' | sort -z
if cp --archive --preserve=mode,ownership,timestamps,links,xattr --reflink=auto --sparse=auto \
    --no-target-directory /source /volume >/tmp/words 2>&1; then
    exit 0
fi
bring_up_to_date "$1"
"""
# rsync tells changes by size and time of a name. That misses a write through a mapping to a page that was
# written to before (no time changes until it is clean again), times that were set back, and directories that
# changed places. So what was changed since then, by the time that nobody can set, and what is in directories
# that have another inode than when the copy was made, is removed from the copy first.
#
# rsync also reads holes, and the container stands still meanwhile: two hours for a file of 16 TiB of them. So
# large files are cp's, which skips holes.
_LARGE = "+16M"
_UPDATE = rf"""{_RSYNC}
cd /source
find . -xdev -type f -newerct "@$1" -printf '%P\0' >/tmp/changed
find . -xdev -type d -printf '%i %P\0' >/tmp/now
sort -z /tmp/now >/tmp/sorted
cat >/tmp/before
comm -z -23 /tmp/sorted /tmp/before >/tmp/new
cut -z -d ' ' -f 2- /tmp/new >/tmp/moved
find . -xdev -type f -newerct "@$1" -size {_LARGE} -printf '%P\0' >/tmp/large
find -files0-from /tmp/moved -maxdepth 1 -type f -size {_LARGE} -print0 >>/tmp/large 2>/dev/null || :
cd /volume
# Names that are not there, or not as files, are no error: rsync sees that by itself.
xargs -0 -r rm -f -- </tmp/changed 2>/dev/null || :
find -files0-from /tmp/moved -maxdepth 1 -type f -delete 2>/dev/null || :
cd /source
# What fails here is tried once more by rsync, which also gives the files their attributes.
xargs -0 -r cp --parents --no-dereference --preserve=mode,ownership,timestamps --reflink=auto --sparse=auto \
    --target-directory=/volume -- </tmp/large >/dev/null 2>&1 || :
bring_up_to_date
"""


class TreeWorker:
    """The storage drivers' `Worker`: does what they ask with the ids of one container."""

    def __init__(self, jobs: JobRunner, task: Task | None = None) -> None:
        self._jobs = jobs
        self._task = task
        # By target: which directories the source had, and which inodes they were.
        self._seen: dict[str, IO[bytes]] = {}
        # Whether there will be a second copy is not known at the first.
        self._files = contextlib.ExitStack()
        weakref.finalize(self, self._files.close)

    def copy(
        self, source: RootSpec, target: str, *, in_use: bool = False, changed_since_s: float | None = None
    ) -> None:
        """Make the directory `target` a copy of `source`, or bring an earlier copy up to date."""
        if changed_since_s is not None:
            with self._seen.pop(target, None) or tempfile.TemporaryFile() as seen:
                seen.seek(0)
                # The clock that file systems use lags behind by up to a tick, and some keep whole seconds.
                since = str(math.floor(changed_since_s - 0.05))
                argv = ("timeout", str(_LONGEST_PAUSE_S), "sh", "-c", _UPDATE, "update", since)
                self._run(argv, source, target, stdin_fd=seen.fileno())
            return
        # Not beside the target: an image in which a file is open cannot be unmounted.
        seen = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - closed with self
        argv = ("sh", "-c", _COPY, "copy", "yes" if in_use else "")
        self._run(argv, source, target, stdout_fd=seen.fileno())
        self._seen[target] = seen
        if not source.lowers:
            self._jobs.run_builtin_on(target, {"builtin": "strip"}, self._task)

    def merge(
        self, directory: str, layers: Sequence[str], target: str, below: RootSpec | None = None
    ) -> None:
        """Make `target` the union of overlay layers (top first) by hard links; all are below `directory`."""
        program = {
            "builtin": "merge", "layers": list(layers), "target": target, "below": below is not None,
        }  # fmt: skip
        self._jobs.run_builtin_on(directory, program, self._task, below)

    def _run(
        self,
        argv: Sequence[str],
        source: RootSpec,
        target: str,
        *,
        stdin_fd: int | None = None,
        stdout_fd: int | None = None,
    ) -> None:
        status = self._jobs.run_tool(
            argv, volume=target, views={SOURCE: source}, task=self._task, stdin_fd=stdin_fd,
            stdout_fd=stdout_fd,
        )  # fmt: skip
        # Whoever gave the command knows what it was for, and nothing of copies.
        doing = f"cannot {self._task.doing if self._task else 'copy files'}"
        if status == _NO_SPACE:
            raise NoSpace(f"{doing}: no space left on {target}")
        if status == _TIMED_OUT:
            raise SysctrError(
                f"{doing}: what changed meanwhile took more than {_LONGEST_PAUSE_S} s",
                "try again when the container writes less, or stop it",
            )
        if status:
            raise SysctrError(
                f"{doing}: the copy of its files ended with {status}", "the task's log says why"
            )
