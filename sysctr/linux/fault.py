"""Places at which a test can have the process killed, to see what the next one makes of what is left.

SYSCTR_FAULT=NAME kills it when it comes to the point of that name, NAME:3 when it comes there for the third
time. Without the variable a point costs one look at a global.

SYSCTR_FAULT_WAIT=DIRECTORY stops it (the thread, and not the whole daemon) at every point that has a fifo of
its name in the directory, until somebody who has the fifo open for writing writes to it or closes it. Opening
it for writing without blocking fails until it is reached, so a test knows where the process is, and can kill
another one, or cut the network, at that very step.
"""

import contextlib
import os
import signal

_wanted, _, _count = os.environ.get("SYSCTR_FAULT", "").partition(":")
_left = int(_count or 1)
_stops = os.environ.get("SYSCTR_FAULT_WAIT", "")


def point(name: str) -> None:
    """Die here by SIGKILL if this is the point that SYSCTR_FAULT names; wait if SYSCTR_FAULT_WAIT says so."""
    global _left
    if _stops:
        _wait(f"{_stops}/{name}")
    if name != _wanted:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def _wait(path: str) -> None:
    with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=0) as fifo:
        fifo.read(1)
