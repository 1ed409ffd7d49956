"""What is remembered of a backup job between its runs, and over the end of the daemon."""

import json
import logging
import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sysctr.linux import files

log = logging.getLogger(__name__)

_LIMIT_BYTES = 4 << 20


@dataclass
class JobState:
    """When a job ran last, and what became of that; times are seconds since 1970."""

    # The schedule that counts, and since when: what it would have been due for before is not made up for.
    schedule: str = ""
    since: float = 0.0
    begun: float | None = None
    ended: float | None = None  # None with `begun`: it runs, or was cut short
    state: str = ""  # done, failed or cancelled
    task: str = ""
    done: list[int] = field(default_factory=list)
    # It goes on after it was cut short once, and no more: a backup might be what ends the daemon.
    resumed: bool = False
    failures: list[dict[str, Any]] = field(default_factory=list)
    last_success: float | None = None

    @property
    def cut_short(self) -> bool:
        """Tell whether a run has begun and not ended; of a job that runs too."""
        return self.begun is not None and self.ended is None

    def due_after(self, schedule: str, now_s: float) -> float:
        """Return the time after which it is due again, having learnt of a new schedule or clock."""
        if schedule != self.schedule:
            self.schedule, self.since = schedule, now_s
        # The clock was ahead. Without this the job would wait until that time comes again.
        self.since = min(self.since, now_s)
        self.begun = None if self.begun is None else min(self.begun, now_s)
        return max(self.since, self.begun or 0.0)


def read_state(path: str) -> JobState:
    """Return what was remembered; nothing where that cannot be read."""
    try:
        data, _ = files.read_bounded(path, _LIMIT_BYTES)
        told = json.loads(data)
        known = {one.name: told[one.name] for one in fields(JobState) if one.name in told}
        state = JobState(**known)
        for name in ("since", "begun", "ended", "last_success"):
            if not isinstance(getattr(state, name), int | float | None):
                raise TypeError(name)
        if not (isinstance(state.failures, list) and all(isinstance(one, int) for one in state.done)):
            raise TypeError("done")
        return state
    except FileNotFoundError:
        return JobState()
    except (OSError, ValueError, TypeError, RecursionError) as error:
        log.warning("%s: %s", path, error)
        return JobState()


def write_state(path: str, state: JobState) -> None:
    """Remember it; a disk that takes nothing more keeps no backup from being made."""
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        files.write_atomically(path, json.dumps({"schema": 1, **asdict(state)}).encode() + b"\n")
    except OSError as error:
        log.error("cannot write %s: %s", path, error.strerror or error)
