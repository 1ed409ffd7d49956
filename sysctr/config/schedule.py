"""When something is done again and again: `hourly`, `daily 03:00`, `weekly sun 22:00`, in local time."""

import re
import time
from dataclasses import dataclass

from sysctr.config.values import refuse
from sysctr.errors import ConfigError

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WRITTEN = re.compile(
    rf"(?:(?P<hourly>hourly)|daily|weekly(?: (?P<day>{'|'.join(_DAYS)}))?)"
    r"(?: (?P<hour>[01][0-9]|2[0-3]):(?P<minute>[0-5][0-9]))?"
)
_EXPECTED = "off, hourly, daily, weekly, or a time such as daily 03:00 or weekly sun 22:00"


@dataclass(frozen=True)
class Schedule:
    """A moment of every hour, day or week."""

    every: str  # hour, day or week
    weekday: int = 0  # Monday is 0
    hour: int = 0
    minute: int = 0

    def last_due(self, now_s: float) -> float:
        """Return the last time that is not after `now_s` (seconds since 1970)."""
        if self.every == "hour":
            return now_s - (time.localtime(now_s).tm_min * 60 + now_s % 60)
        back = 0
        while (due_s := self._on(now_s, back)) > now_s or not self._fits(due_s):
            back += 1
        return due_s

    def next_due(self, now_s: float) -> float:
        """Return the first time after `now_s`."""
        if self.every == "hour":
            return self.last_due(now_s) + 3600
        ahead = 0
        while (due_s := self._on(now_s, ahead)) <= now_s or not self._fits(due_s):
            ahead -= 1
        return due_s

    def _on(self, now_s: float, days_back: int) -> float:
        day = time.localtime(now_s)
        # mktime knows how long each day was; a time that a change of the clock left out comes a little later.
        fields = (day.tm_year, day.tm_mon, day.tm_mday - days_back, self.hour, self.minute, 0, 0, 0, -1)
        return time.mktime(fields)

    def _fits(self, due_s: float) -> bool:
        return self.every == "day" or time.localtime(due_s).tm_wday == self.weekday


def parse_schedule(text: str) -> Schedule | None:
    """Read a schedule; None is `off`.

    >>> parse_schedule("weekly sun 22:00")
    Schedule(every='week', weekday=6, hour=22, minute=0)
    """
    if text == "off":
        return None
    match = _WRITTEN.fullmatch(text)
    if match is None or (match["hourly"] and match["hour"]):
        raise refuse(text, _EXPECTED)
    every = {"h": "hour", "d": "day", "w": "week"}[text[0]]
    day = _DAYS.index(match["day"]) if match["day"] else 0
    return Schedule(every, day, int(match["hour"] or 0), int(match["minute"] or 0))


def check_schedule(text: str) -> str:
    """Return the text if it is a schedule.

    >>> check_schedule("daily")
    'daily'
    """
    parse_schedule(text)
    return text


def parse_span(text: str) -> float:
    """Return the seconds that `90s`, `30m`, `12h`, `7d` or `4w` are.

    >>> parse_span("7d")
    604800.0
    """
    match = re.fullmatch(r"([1-9][0-9]{0,5})([smhdw])", text)
    if match is None:
        raise ConfigError(f"{text[:32]!r} is not a time such as 12h, 7d or 4w")
    return float(int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[match[2]])
