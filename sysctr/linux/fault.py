"""Places at which a test can have the process killed, to see what the next one makes of what is left.

SYSCTR_FAULT=NAME kills it when it comes to the point of that name, NAME:3 when it comes there for the third
time. Without the variable a point costs one look at a global.
"""

import os
import signal

_wanted, _, _count = os.environ.get("SYSCTR_FAULT", "").partition(":")
_left = int(_count or 1)


def point(name: str) -> None:
    """Die here by SIGKILL if this is the point that SYSCTR_FAULT names."""
    global _left
    if name != _wanted:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
