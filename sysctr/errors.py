"""The errors a user can act on, with the exit code and the HTTP state each one means everywhere.

SysctrError           1 / 500   something failed
├── UsageError        2 / 400   the request itself is wrong
│   └── ConfigError             a configuration that does not hold
├── NotFound          3 / 404   no such container, template, task
├── WrongState        4 / 409   running, stopped, or changing
│   └── Busy                    another task holds the container
├── Refused           5 / 403   protected, or not enforceable here
│   └── Blocked                 a migration that something stands in the way of
├── NoDaemon          6 / 503   the daemon or the supervisor does not answer
└── NoSpace           1 / 507   the disk or a range is exhausted

This module is imported by every front end, so it imports nothing.
"""


class SysctrError(Exception):
    """Something failed for a reason the user can understand: `cannot VERB OBJECT: reason`."""

    code = "failed"
    exit_code = 1
    http_status = 500

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def as_dict(self) -> "dict[str, str]":
        """Return the error as the API and the supervisor send it."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class UsageError(SysctrError):
    """The request is malformed: a name, a number, an address or an option that cannot be right."""

    code = "usage"
    exit_code = 2
    http_status = 400


class ConfigError(UsageError):
    """A configuration has an unknown key or a value that does not hold."""

    code = "config"


class NotFound(SysctrError):
    """The container, template or task named does not exist."""

    code = "not-found"
    exit_code = 3
    http_status = 404


class WrongState(SysctrError):
    """The container is running, stopped or changing, and the action needs another state."""

    code = "wrong-state"
    exit_code = 4
    http_status = 409


class Busy(WrongState):
    """Another task holds the container; the message names that task."""

    code = "busy"


class Refused(SysctrError):
    """The action is understood and will not be done: protected, forbidden, or not enforceable here."""

    code = "refused"
    exit_code = 5
    http_status = 403


class Blocked(Refused):
    """Something stands in the way; the message has a line for each thing, after the first."""

    code = "blocked"


class NoDaemon(SysctrError):
    """The daemon or the supervisor does not answer."""

    code = "no-daemon"
    exit_code = 6
    http_status = 503


class NoSpace(SysctrError):
    """A disk, an id range or an address range is exhausted."""

    code = "no-space"
    http_status = 507


_CLASSES = (
    SysctrError, UsageError, ConfigError, NotFound, WrongState, Busy, Refused, Blocked, NoDaemon, NoSpace
)  # fmt: skip
_BY_CODE = {cls.code: cls for cls in _CLASSES}


def from_dict(error: "dict[str, str]") -> SysctrError:
    """Rebuild an error that crossed a socket; an unknown code becomes a plain SysctrError of that code.

    >>> from_dict({"code": "busy", "message": "cannot start 101: task 7f3a stops it"}).exit_code
    4
    """
    code = error.get("code", "")
    known = _BY_CODE.get(code, SysctrError)(error.get("message", "unknown error"), error.get("hint", ""))
    # A kind that only its own module knows keeps its code, for whoever reads that.
    known.code = code or known.code
    return known
