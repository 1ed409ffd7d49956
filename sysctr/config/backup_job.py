"""The file of one backup job, `/etc/sysctr/backup-jobs/NAME.toml`: which containers, when and how."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sysctr.config import kinds, values
from sysctr.config.backup import BackupSettings, storing_keys
from sysctr.config.table import Key, Kind, Section, Table
from sysctr.config.toml import Migration, read_versioned
from sysctr.errors import ConfigError

SCHEMA = 1
MIGRATIONS: tuple[Migration, ...] = ()
VARIABLES = ("guestname", "vmid", "node")
_MOST_ARGUMENTS = 64
# No more than a mail system takes without quotes; an address must not be an option of sendmail's.
_ADDRESS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=~-]{0,63}(@[A-Za-z0-9][A-Za-z0-9.-]{0,253})?")
_VARIABLE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_ESCAPES = {"n": "\n", "\\": "\\"}


@dataclass(frozen=True)
class Job(BackupSettings):
    """A backup job as its administrator wants it; empty settings are those of the host."""

    containers: tuple[str, ...]
    tag: str
    all: bool
    exclude: tuple[str, ...]
    exclude_paths: tuple[str, ...]
    schedule: str
    enabled: bool
    notes: str
    protected: bool
    on_failure: tuple[str, ...]
    mail_to: tuple[str, ...]


def check_notes(text: str) -> str:
    r"""Return a template of notes if each of its variables is known.

    >>> check_notes("{{guestname}} on {{node}}")
    '{{guestname}} on {{node}}'
    """
    values.parse_text(text)
    for name in _VARIABLE.findall(text):
        _check_variable(name)
    return text


def _check_variable(name: str) -> str:
    if name not in VARIABLES:
        known = ", ".join(f"{{{{{one}}}}}" for one in VARIABLES)
        raise values.refuse(f"{{{{{name}}}}}", f"a variable of notes, which are {known}")
    return name


def expand_notes(template: str, facts: Mapping[str, str]) -> str:
    r"""Return the notes of one archive; `\n` in the template is a new line. ConfigError for other variables.

    >>> expand_notes(r"{{guestname}}\nby {{node}}", {"guestname": "web", "vmid": "101", "node": "a"})
    'web\nby a'
    """
    # In one pass: what a fact says is no template.
    both = re.compile(rf"{_VARIABLE.pattern}|\\([n\\])", re.DOTALL)

    def replace(found: re.Match[str]) -> str:
        return _ESCAPES[found[2]] if found[2] else facts[_check_variable(found[1])]

    return both.sub(replace, template)


def _ref(text: str) -> str:
    return str(values.parse_ref(text))


def _address(text: str) -> str:
    if _ADDRESS.fullmatch(text) is None:
        raise values.refuse(text, "a mail address such as admin@example.org")
    return text


def _pattern(text: str) -> str:
    values.parse_text(text)
    # As tar has it: a slash at the end would make it fit nothing.
    if text.endswith("/"):
        raise values.refuse(text, "a pattern of paths such as /var/cache/* or *.iso, without / at its end")
    return text


def _arguments(given: list[Any]) -> tuple[str, ...]:
    if len(given) > _MOST_ARGUMENTS:
        raise ConfigError(f"{len(given)} words are more than {_MOST_ARGUMENTS}")
    for word in given:
        if not isinstance(word, str):
            raise values.refuse(word, "a text")
        values.parse_text(word)
    if given and not given[0]:
        raise ConfigError("the name of the program is empty")
    return tuple(given)


_REFS = kinds.list_kind(
    kinds.text_kind("CT", "an id or a name", _ref, may_be_empty=False), "a list of ids or names", 10_000
)
_PATTERNS = kinds.list_kind(
    kinds.text_kind("PATH", "a pattern of paths", _pattern, may_be_empty=False), "a list of patterns", 256
)
_ADDRESSES = kinds.list_kind(
    kinds.text_kind("ADDRESS", "a mail address", _address, may_be_empty=False), "a list of mail addresses", 32
)
_COMMAND = Kind(
    "WORD,...", "a list of words, the program first", (list,), lambda text: _arguments([text]), _arguments,
    list,
)  # fmt: skip
_NOTES = kinds.text_kind("TEXT", "a text", check_notes)

KEYS = (
    Key("containers", _REFS, (), "live", "these containers, by id or name"),
    Key("tag", kinds.text_kind("TAG", "a tag", values.parse_tag), "", "live", "or all with this tag"),
    Key("all", kinds.BOOL, False, "live", "or all there are"),
    Key("exclude", _REFS, (), "live", "but not these"),
    Key("exclude_paths", _PATTERNS, (), "live", "what is left out of the archives"),
    Key("schedule", kinds.SCHEDULE, "daily 02:00", "live", "when, in local time"),
    Key("enabled", kinds.BOOL, True, "live", "false: only when it is asked for"),
    *storing_keys("", {}),
    Key("notes", _NOTES, "{{guestname}}", "live", "template of the archives' notes"),
    Key("protected", kinds.BOOL, False, "live", "protect the archives from being removed and pruned"),
    Key("on_failure", _COMMAND, (), "live", "program to run for each container that failed"),
    Key("mail_to", _ADDRESSES, (), "live", "who gets a mail when a container failed"),
)
TABLE = Table(KEYS, (Section("", "", Job),))


def parse_job(mapping: Mapping[str, object]) -> Job:
    """Return the job that a mapping (a file's, without `schema`) describes, all of it checked."""
    job: Job = TABLE.read(mapping)
    if bool(job.containers) + bool(job.tag) + job.all != 1:
        raise ConfigError("cannot accept a backup job that names not exactly one of containers, tag and all")
    if job.exclude and job.containers:
        raise ConfigError("cannot accept exclude: the containers are listed one by one")
    return job


def read_job(text: str) -> Job:
    """Return the job of a file's text."""
    return parse_job(read_versioned(text, SCHEMA, MIGRATIONS))


def new_text(name: str, job: Job) -> str:
    """Return the file of a new job, with what differs from the defaults; `read_job` gives the job back."""
    lines = [
        f"# Backup job {name} of sysctr. Yours to edit: `sysctr backup job edit {name}` checks it.",
        f"schema = {SCHEMA}",
    ]
    # JSON of texts, numbers, truth values and lists of texts is TOML too as long as there is no DEL in it.
    lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in TABLE.dump(job).items()]
    return "\n".join(lines) + "\n"
