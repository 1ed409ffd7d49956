"""What a template is: a tree that containers share, and the record beside it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Protocol

from sysctr.errors import SysctrError, UsageError

SCHEMA = 1
# What the fields of a record are that are no texts.
_TYPES: dict[str, tuple[type, ...]] = {
    "created": (int,),
    "source": (dict,),
    "size_bytes": (int,),
    "labels": (dict,),
    "packages": (int, type(None)),
}
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Source:
    """Where a template came from, exactly enough to know whether another one is the same."""

    kind: str  # "recipe" or "archive"
    name: str  # of the recipe or the file
    digest: str  # "sha256:…" of the recipe's text or of the file


@dataclass(frozen=True)
class Made:
    """What a builder says about the tree it made; the registry finds out the rest itself."""

    source: Source
    version: str = ""
    description: str = ""
    init: str = ""
    stop_signal: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    packages: int | None = None


@dataclass(frozen=True)
class Template:
    """One template as it is recorded in template.json; `layer` is its directory in the pool's layers."""

    name: str
    layer: str
    version: str
    os_id: str
    os_version: str
    os_name: str
    arch: str
    created: int  # seconds since 1970
    source: Source
    size_bytes: int
    init: str  # as seen inside
    init_kind: str  # systemd, busybox, sysvinit, openrc, runit or other
    stop_signal: str
    description: str
    labels: dict[str, str]
    packages: int | None

    def as_dict(self) -> dict[str, object]:
        """Return the template as it is written to disk and sent by the API."""
        return {"schema": SCHEMA, **asdict(self)}


def template_from_dict(data: dict[str, object]) -> Template:
    """Read a record back; raises ValueError when it is not one."""
    if not isinstance(data, dict) or type(data.get("schema")) is not int:
        raise ValueError("no schema number")
    if data["schema"] > SCHEMA:
        raise SysctrError(
            f"cannot use template {data.get('name')}: a newer sysctr made it (schema {data['schema']})",
            hint="upgrade sysctr",
        )
    try:
        values = {known.name: data[known.name] for known in fields(Template)}
        for name, value in values.items():
            if type(value) not in _TYPES.get(name, (str,)):
                raise ValueError(f"field {name!r}")
        values["source"] = Source(**values["source"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"field {error}") from error
    texts = (*asdict(values["source"]).values(), *values["labels"].values())
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("field 'source' or 'labels'")
    return Template(**values)


def check_name(name: str) -> str:
    """Return `name` if it can be a template's.

    >>> check_name("debian-12")
    'debian-12'
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"cannot use template name {name!r}: not 1 to 63 of a-z, 0-9, '.', '_' and '-'",
            hint="begin with a letter or a digit",
        )
    return name


class RunJob(Protocol):
    """Runs a program with a container's ids, rooted beside the tree `volume`, without rights over the host.

    The job sees the host's /usr read-only, `volume` writable at /volume with ids shifted so that its root
    owns as 0 on disk, and `binds` (host path, path inside) read-only. `volumes` (path below /volume, tree)
    are further trees that it may write. Without `network` it has none.
    """

    def __call__(
        self,
        argv: list[str],
        *,
        volume: str,
        stdin_fd: int | None = None,
        stdout_fd: int | None = None,
        network: bool = False,
        host_view: bool = False,
        binds: Sequence[tuple[str, str]] = (),
        environment: Mapping[str, str] | None = None,
        volumes: Sequence[tuple[str, str]] = (),
        task: "Task | None" = None,
    ) -> int:
        """Run to the end and return the exit status."""


class Task(Protocol):
    """What a builder tells of its progress; `check` raises when the task was cancelled."""

    def check(self) -> None:
        """Raise if the task is to stop."""

    def step(self, text: str) -> None:
        """Say what begins."""

    def progress(self, done: int, total: int) -> None:
        """Say how many bytes of how many are done."""

    def log(self, text: str) -> None:
        """Add a line to the task's log."""
