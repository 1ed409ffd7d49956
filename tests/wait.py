"""The one place where tests wait: for a fact, with a deadline."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_never = threading.Event()


def wait_until(fact: Callable[[], T], deadline_s: float = 10, what: str = "") -> T:
    """Return the first true value of `fact`; an AssertionError names what did not come true in time.

    A file that goes away under the eyes of `fact`, as what a daemon works on does, is not yet true.
    """
    end = time.monotonic() + deadline_s
    pause_s = 0.002
    while True:
        try:
            value = fact()
            if value:
                return value
            seen: object = value
        except FileNotFoundError as error:
            seen = error
        if time.monotonic() > end:
            named = what or fact.__doc__ or getattr(fact, "__name__", "the fact")
            raise AssertionError(f"not within {deadline_s:g} s: {named} (last seen: {seen!r})")
        _never.wait(pause_s)
        pause_s = min(pause_s * 1.5, 0.1)
