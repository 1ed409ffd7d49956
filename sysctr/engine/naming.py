"""Errors that name a container as people do: most layers know no more of it than its number."""

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

from sysctr.errors import SysctrError

_Method = TypeVar("_Method", bound=Callable[..., Any])


def title(name: str, number: int) -> str:
    """Return what errors and tasks call a container.

    >>> title("web", 100), title("", 100)
    ('web (100)', '100')
    """
    return f"{name} ({number})" if name else str(number)


def name_in(error: SysctrError, number: int, known_as: str) -> None:
    """Put the title of a container where an error has its number as the object of what cannot be done.

    >>> error = SysctrError("cannot limit 100 to 100 cores: this host has 2", "`sysctr start 100`")
    >>> name_in(error, 100, "web (100)")
    >>> error.message, error.hint
    ('cannot limit web (100) to 100 cores: this host has 2', '`sysctr start web`')
    """
    verb_and_object, colon, reason = error.message.partition(": ")
    if known_as not in error.message:
        named = re.sub(rf"(?<![\w./-]){number}(?![\w./-])", lambda _: known_as, verb_and_object, count=1)
        error.message = f"{named}{colon}{reason}"
        error.args = (error.message,)
    name = known_as.removesuffix(f" ({number})")
    command = rf"(`sysctr (?!task)[a-z -]+ ){number}(?!\w)"
    error.hint = re.sub(command, lambda found: found[1] + name, error.hint)


def naming(method: _Method) -> _Method:
    """Let the errors of a method name the container that its first argument refers to.

    The method's object has `_find(ref)`, which returns the record.
    """

    @functools.wraps(method)
    def call(self: Any, ref: str, *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, ref, *arguments, **options)
        except SysctrError as error:
            try:
                record = self._find(ref)
            except SysctrError:
                raise error from error.__cause__
            name_in(error, record.id, record.title)
            raise

    return call  # type: ignore[return-value]
