"""What differs between two states of a container's files: two lists made in jobs, sorted and compared."""

import os
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from sysctr.engine.job import SOURCE, JobRunner
from sysctr.engine.tasks import Task
from sysctr.errors import SysctrError
from sysctr.storage.base import RootSpec
from sysctr.storage.tree import ensure_directory

# A path has no two slashes in a row, so they end it; records end with a null byte, which no name has. The
# time of a directory changes with every entry, and its size means nothing.
_LIST = r"""
set -eu
cd /source
find . -xdev -mindepth 1 \( -type d -printf '%P//d %m %U %G 0 0 \0' -o \
    -printf '%P//%y %m %U %G %s %T@ %l\0' \) > /tmp/list
LC_ALL=C exec sort --zero-terminated /tmp/list
"""
_MOST_SHOWN = 20000
_END = b"//"


def compare(jobs: JobRunner, before: RootSpec, after: RootSpec, scratch: str, task: Task) -> dict[str, Any]:
    """Return what was added, modified, deleted, or became a thing of another type ("A", "M", "D", "T").

    `changes` are [letter, path], sorted, at most some thousands; `counts` counts all of them. `scratch` is a
    directory of the host for the two lists.
    """
    counts = {"A": 0, "M": 0, "D": 0, "T": 0}
    changes: list[list[str]] = []
    with _listed(jobs, before, scratch, task) as old, _listed(jobs, after, scratch, task) as new:
        for letter, path in _differences(_records(old), _records(new)):
            counts[letter] += 1
            if len(changes) < _MOST_SHOWN:
                changes.append([letter, f"/{os.fsdecode(path)}"])
    return {"changes": changes, "counts": counts, "truncated": sum(counts.values()) > len(changes)}


def _listed(jobs: JobRunner, view: RootSpec, scratch: str, task: Task) -> IO[bytes]:
    """Return a file with one record for each thing in a view, sorted; the caller closes it."""
    volume = f"{scratch}/empty"
    ensure_directory(volume)
    # Without a name: it is gone with the daemon, whatever happens.
    listed = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - the caller's
    try:
        status = jobs.run_tool(
            ["sh", "-c", _LIST, "list"], volume=volume, views={SOURCE: view}, stdout_fd=listed.fileno(),
            task=task,
        )  # fmt: skip
        if status:
            raise SysctrError(
                f"cannot list files: the job ended with {status}",
                "the task's log says why; are there too many?",
            )
        listed.seek(0)
    except BaseException:
        listed.close()
        raise
    return listed


def _records(listed: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Yield path and facts of each record."""
    rest = b""
    while piece := listed.read(1 << 20):
        *records, rest = (rest + piece).split(b"\0")
        for record in records:
            path, _, facts = record.partition(_END)
            yield path + _END, facts


def _differences(
    old: Iterator[tuple[bytes, bytes]], new: Iterator[tuple[bytes, bytes]]
) -> Iterator[tuple[str, bytes]]:
    """Merge two sorted lists and yield what is not the same in both.

    >>> a = [(b"a//", b"f 644"), (b"b//", b"f 644"), (b"c//", b"f 644"), (b"e//", b"f 1")]
    >>> b = [(b"b//", b"f 600"), (b"c//", b"d 644"), (b"d//", b"f 644"), (b"e//", b"f 1")]
    >>> list(_differences(iter(a), iter(b)))
    [('D', b'a'), ('M', b'b'), ('T', b'c'), ('A', b'd')]
    """
    nothing = (None, b"")
    left, right = next(old, nothing), next(new, nothing)
    while left[0] is not None or right[0] is not None:
        if right[0] is None or (left[0] is not None and left[0] < right[0]):
            yield "D", left[0].removesuffix(_END)
            left = next(old, nothing)
        elif left[0] is None or right[0] < left[0]:
            yield "A", right[0].removesuffix(_END)
            right = next(new, nothing)
        else:
            if left[1] != right[1]:
                yield ("M" if left[1][:1] == right[1][:1] else "T"), left[0].removesuffix(_END)
            left, right = next(old, nothing), next(new, nothing)
