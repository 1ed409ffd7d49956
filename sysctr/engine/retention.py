"""Which of many snapshots or backups are kept: the keep rules of Proxmox, on times alone."""

import time
from collections.abc import Callable, Iterable, Mapping

_PERIODS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("last", repr),
    ("hourly", lambda at: time.strftime("%Y-%m-%d %H", time.localtime(at))),
    ("daily", lambda at: time.strftime("%Y-%m-%d", time.localtime(at))),
    ("weekly", lambda at: time.strftime("%G-%V", time.localtime(at))),
    ("monthly", lambda at: time.strftime("%Y-%m", time.localtime(at))),
    ("yearly", lambda at: time.strftime("%Y", time.localtime(at))),
)
RULES = tuple(name for name, _ in _PERIODS)


def surplus(times: Iterable[float], keep: Mapping[str, int]) -> list[float]:
    """Return which of the times (seconds since 1970) no rule keeps, newest first.

    `keep` says how many of each rule of RULES; where all are 0 everything is kept. A rule keeps the newest
    of each of its periods, and a period in which an earlier rule keeps something does not count for it.

    >>> surplus([1.0, 2.0, 3.0], {"last": 2}), surplus([1.0, 2.0], {})
    ([1.0], [])
    """
    newest_first = sorted(times, reverse=True)
    if not any(keep.get(name) for name in RULES):
        return []
    # True: kept, False: another one of its period was.
    marks: list[bool | None] = [None] * len(newest_first)
    for name, period in _PERIODS:
        if keep.get(name):
            _mark(newest_first, marks, keep[name], period)
    return [at for at, mark in zip(newest_first, marks, strict=True) if not mark]


def _mark(
    newest_first: list[float], marks: list[bool | None], count: int, period: Callable[[float], str]
) -> None:
    held = {period(at) for at, mark in zip(newest_first, marks, strict=True) if mark}
    used: set[str] = set()
    for index, at in enumerate(newest_first):
        which = period(at)
        if marks[index] is not None or which in held:
            continue
        if which in used:
            marks[index] = False
        elif len(used) < count:
            used.add(which)
            marks[index] = True
        else:
            break
