"""Which of many snapshots or backups are kept: the keep rules of Proxmox, on times alone."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

_PERIODS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("last", repr),
    ("hourly", lambda at: time.strftime("%Y-%m-%d %H", time.localtime(at))),
    ("daily", lambda at: time.strftime("%Y-%m-%d", time.localtime(at))),
    ("weekly", lambda at: time.strftime("%G-%V", time.localtime(at))),
    ("monthly", lambda at: time.strftime("%Y-%m", time.localtime(at))),
    ("yearly", lambda at: time.strftime("%Y", time.localtime(at))),
)
RULES = tuple(name for name, _ in _PERIODS)


def kept(times: Sequence[float], keep: Mapping[str, int]) -> list[bool]:
    """Return of each of the times (seconds since 1970), which come newest first, whether a rule keeps it.

    `keep` says how many of each rule of RULES; where all are 0 everything is kept. A rule keeps the newest
    of each of its periods, and a period in which an earlier rule keeps something does not count for it. Of
    two equal times the first counts as the newer one, and the same moment is one period.

    >>> kept([3.0, 2.0, 2.0, 1.0], {"last": 2}), kept([2.0, 1.0], {})
    ([True, True, False, False], [True, True])
    """
    if not any(keep.get(name) for name in RULES):
        return [True] * len(times)
    # True: kept, False: another one of its period was.
    marks: list[bool | None] = [None] * len(times)
    for name, period in _PERIODS:
        if keep.get(name):
            _mark(times, marks, keep[name], period)
    return [bool(mark) for mark in marks]


def surplus(times: Iterable[float], keep: Mapping[str, int]) -> list[float]:
    """Return which of the times no rule keeps, newest first; all of them are different.

    >>> surplus([1.0, 2.0, 3.0], {"last": 2}), surplus([1.0, 2.0], {})
    ([1.0], [])
    """
    newest_first = sorted(times, reverse=True)
    return [at for at, stays in zip(newest_first, kept(newest_first, keep), strict=True) if not stays]


def _mark(
    newest_first: Sequence[float], marks: list[bool | None], count: int, period: Callable[[float], str]
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
