"""What a conversion between pct.conf and our settings has to tell: left out, altered, not allowed."""

from collections.abc import Iterable
from dataclasses import dataclass

from sysctr.errors import ConfigError, UsageError

# There is no equal, it has no effect here, or it does not hold.
DROPPED = "dropped"
# It is carried over, but not as it was.
CHANGED = "changed"
# It would be carried over if whoever converts allowed that by name.
NEEDS_PERMISSION = "needs-permission"

# What gives a container something of its host is never taken from a file unless it is asked for by name.
# What of these sysctr has no equal for (hook scripts, firewall rules) stays out even then.
PERMISSIONS = ("bind", "device", "raw", "hook", "feature", "firewall")


@dataclass(frozen=True)
class Note:
    """One thing that did not go over as it is: its key, the reason, and DROPPED, CHANGED or NEEDS_PERMISSION.

    `permission` is the one of PERMISSIONS that it is about, or empty.
    """

    key: str
    reason: str
    kind: str
    permission: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the note as the API sends it."""
        return {"key": self.key, "reason": self.reason, "kind": self.kind, "permission": self.permission}


def parse_permissions(texts: Iterable[str]) -> frozenset[str]:
    """Read the names of permissions, each text one or several with commas between them.

    >>> sorted(parse_permissions(["bind,device"]))
    ['bind', 'device']
    """
    names = {name.strip() for text in texts for name in text.split(",")} - {""}
    for name in sorted(names.difference(PERMISSIONS)):
        raise UsageError(f"cannot allow {name!r}: choose of {', '.join(PERMISSIONS)}")
    return frozenset(names)


def reason_of(error: ConfigError) -> str:
    """Return what an error says, without the key that the note names already.

    >>> reason_of(ConfigError("cannot accept limits.pids: 1 is not a whole number"))
    '1 is not a whole number'
    """
    if error.message.startswith("cannot accept "):
        return error.message.partition(": ")[2] or error.message
    return error.message
