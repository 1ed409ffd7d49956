"""Recipes: `templates/*.toml`, data and short scripts that say how a template is made.

    schema = 1
    name = "debian-12"             # of the template, unless asked for otherwise
    version = "1"
    description = "…"
    init = "/sbin/init"            # optional
    stop_signal = "SIGRTMIN+3"     # optional, else told by the init that is found

    [bootstrap]                    # where the tree comes from
    tool = "mmdebstrap"            # or "busybox": the host's static one
    variant = "minbase"
    components = ["main"]
    packages = ["systemd-sysv", …]
    keyring = "/usr/share/keyrings/…"
    [bootstrap.sources]            # suite = address, the release first; the host's own mirror is preferred
    bookworm = "http://…"

    [[files]]                      # in this order, over what the bootstrap made
    path = "/etc/motd"
    mode = "0644"                  # optional
    content = "…"                  # or: link = "target"

    [[run]]                        # in this order, inside the tree, in a job without rights over the host
    name = "locales"
    script = "locale-gen"

    [labels]
    family = "debian"
"""

import difflib
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import tomli

from sysctr.errors import ConfigError, NotFound, SysctrError
from sysctr.template.base import check_name

SCHEMA = 1
TOOLS = ("busybox", "mmdebstrap")
VARIANTS = ("minbase", "apt", "required", "important", "standard", "buildd", "essential", "custom")
_TEXT_MAX_BYTES = 1024 * 1024
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]*(:[a-z0-9-]+)?(/[a-z0-9-]+|=[A-Za-z0-9.+:~-]+)?")
_WORD = re.compile(r"[a-z0-9][a-z0-9._-]*")
_ADDRESS = re.compile(r"(mirror\+)?https?://[^\s\[\]\"]+")


@dataclass(frozen=True)
class Bootstrap:
    """Where a recipe's tree comes from."""

    tool: str
    variant: str = "minbase"
    components: tuple[str, ...] = ("main",)
    packages: tuple[str, ...] = ()
    keyring: str = ""
    sources: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class File:
    """A file of the tree, or a symlink where `link` is not empty."""

    path: str
    mode: int = 0o644
    content: str = ""
    link: str = ""


@dataclass(frozen=True)
class Run:
    """A script executed inside the tree."""

    name: str
    script: str


@dataclass(frozen=True)
class Recipe:
    """A recipe as it was read; `digest` changes with every change of it."""

    name: str
    version: str
    description: str
    bootstrap: Bootstrap
    digest: str
    init: str = ""
    stop_signal: str = ""
    files: tuple[File, ...] = ()
    run: tuple[Run, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()


def shipped_directory() -> str:
    """Return where the recipes that come with sysctr are."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    installed = f"{package}/templates"
    # In a checkout the package's directory of that name is its neighbour (pyproject.toml, package-dir).
    return installed if os.path.isdir(installed) else f"{os.path.dirname(package)}/templates"


def shipped(directory: str | None = None) -> list[str]:
    """Return the names of the recipes that come with sysctr."""
    names = os.listdir(directory or shipped_directory())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load(reference: str, changes: Mapping[str, str] | None = None, directory: str | None = None) -> Recipe:
    """Read a recipe by the name of a shipped one, or by its path (which has a `/` or ends in `.toml`)."""
    directory = directory or shipped_directory()
    path = reference
    if "/" not in reference and not reference.endswith(".toml"):
        names = shipped(directory)
        if reference not in names:
            near = difflib.get_close_matches(reference, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(names)}; or give a path"
            raise NotFound(f"cannot find recipe {reference}: there is none of this name", hint=hint)
        path = f"{directory}/{reference}.toml"
    try:
        with open(path, "rb") as file:
            data = file.read(_TEXT_MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise NotFound(f"cannot read recipe {path}: no such file") from error
    except OSError as error:
        raise SysctrError(f"cannot read recipe {path}: {(error.strerror or '').lower()}") from error
    if len(data) > _TEXT_MAX_BYTES:
        raise ConfigError(f"cannot read recipe {path}: it is larger than 1 MiB")
    try:
        return parse(data.decode(), changes)
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read recipe {path}: {error}", hint=getattr(error, "hint", "")) from error


def parse(text: str, changes: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe from TOML; `changes` replaces values by their dotted keys, lists as `a,b`.

    Raises ConfigError that names the key and the nearest known one.
    """
    try:
        data = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}") from error
    for key, value in (changes or {}).items():
        _change(data, key, value)
    schema = data.pop("schema", None)
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise ConfigError("schema: missing or no number", hint=f"write `schema = {SCHEMA}` at the top")
    if schema > SCHEMA:
        raise ConfigError(f"schema {schema} is newer than this sysctr", hint="upgrade sysctr")
    table = _Table(data, "")
    recipe = Recipe(
        name=check_name(table.text("name", required=True)),
        version=table.text("version", pattern=_WORD, required=True),
        description=table.text("description"),
        init=_path(table, "init", table.text("init")),
        stop_signal=table.text("stop_signal", pattern=re.compile(r"SIG[A-Z0-9]+(\+\d+)?|\d+")),
        bootstrap=_bootstrap(table.table("bootstrap")),
        files=tuple(_file(item) for item in table.tables("files")),
        run=tuple(_run(item) for item in table.tables("run")),
        labels=tuple(sorted(table.table("labels", required=False).texts().items())),
        digest=_digest(text, changes),
    )
    table.end()
    return recipe


def _digest(text: str, changes: Mapping[str, str] | None) -> str:
    digest = hashlib.sha256(text.encode())
    for key, value in sorted((changes or {}).items()):
        digest.update(f"\0{key}\0{value}".encode())
    return f"sha256:{digest.hexdigest()}"


def _change(data: dict, key: str, value: str) -> None:
    *parents, last = key.split(".")
    table = data
    for name in parents:
        table = table.get(name) if isinstance(table, dict) else None
    if not isinstance(table, dict) or not last:
        raise ConfigError(f"{key}: no such key in the recipe")
    if isinstance(table.get(last), list):
        table[last] = [item for item in value.split(",") if item]
    else:
        table[last] = value


class _Table:
    """A TOML table that is read key by key; what was not asked for is unknown."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: must be a table")
        self._data = dict(data)
        self._where = where
        self._known: list[str] = []

    def key(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def _take(self, name: str, required: bool) -> object:
        self._known.append(name)
        if name not in self._data and required:
            raise ConfigError(f"{self.key(name)}: missing")
        return self._data.pop(name, None)

    def text(
        self,
        name: str,
        *,
        default: str = "",
        pattern: "re.Pattern[str] | None" = None,
        required: bool = False,
    ) -> str:
        value = self._take(name, required)
        if value is None:
            return default
        if not isinstance(value, str) or "\0" in value:
            raise ConfigError(f"{self.key(name)}: must be text")
        if pattern and value and not pattern.fullmatch(value):
            raise ConfigError(f"{self.key(name)}: {value!r} is not possible here")
        if required and not value:
            raise ConfigError(f"{self.key(name)}: must not be empty")
        return value

    def words(self, name: str, pattern: "re.Pattern[str]", default: tuple[str, ...] = ()) -> tuple[str, ...]:
        value = self._take(name, required=False)
        if value is None:
            return default
        if not isinstance(value, list):
            raise ConfigError(f"{self.key(name)}: must be a list of words")
        for item in value:
            if not isinstance(item, str) or not pattern.fullmatch(item):
                raise ConfigError(f"{self.key(name)}: {item!r} is not possible here")
        return tuple(value)

    def texts(self) -> dict[str, str]:
        for name, value in self._data.items():
            if not isinstance(value, str):
                raise ConfigError(f"{self.key(name)}: must be text")
        return self._data

    def table(self, name: str, *, required: bool = True) -> "_Table":
        value = self._take(name, required)
        return _Table({} if value is None else value, self.key(name))

    def tables(self, name: str) -> "list[_Table]":
        value = self._take(name, required=False) or []
        if not isinstance(value, list):
            raise ConfigError(f"{self.key(name)}: must be written as [[{name}]]")
        return [_Table(item, f"{self.key(name)}[{index}]") for index, item in enumerate(value)]

    def end(self) -> None:
        for name in self._data:
            near = difflib.get_close_matches(name, self._known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(self._known))}"
            raise ConfigError(f"{self.key(name)}: unknown key", hint=hint)


def _bootstrap(table: _Table) -> Bootstrap:
    tool = table.text("tool", required=True)
    if tool not in TOOLS:
        raise ConfigError(f"{table.key('tool')}: {tool!r} is none of {', '.join(TOOLS)}")
    if tool == "busybox":
        table.end()
        return Bootstrap(tool)
    variant = table.text("variant", default="minbase")
    if variant not in VARIANTS:
        raise ConfigError(f"{table.key('variant')}: {variant!r} is none of {', '.join(VARIANTS)}")
    sources = table.table("sources")
    addresses = tuple(sources.texts().items())
    if not addresses:
        raise ConfigError(f"{table.key('sources')}: must name at least one suite")
    for suite, address in addresses:
        if not _WORD.fullmatch(suite) or (address and not _ADDRESS.fullmatch(address)):
            raise ConfigError(f"{sources.key(suite)}: {address!r} is not an http address")
    keyring = _path(table, "keyring", table.text("keyring", required=True))
    bootstrap = Bootstrap(
        tool=tool,
        variant=variant,
        components=table.words("components", _WORD, ("main",)),
        packages=table.words("packages", _PACKAGE),
        keyring=keyring,
        sources=addresses,
    )
    table.end()
    return bootstrap


def _path(table: _Table, key: str, value: str) -> str:
    if value and (not value.startswith("/") or {"..", ".", ""} & set(value[1:].split("/")) or "\n" in value):
        raise ConfigError(f"{table.key(key)}: {value!r} must be an absolute path without `.` and `..`")
    return value


def _file(table: _Table) -> File:
    path = _path(table, "path", table.text("path", required=True))
    mode = table.text("mode", default="0644", pattern=re.compile(r"0[0-7]{3,4}"))
    content, link = table.text("content"), table.text("link")
    if content and link:
        raise ConfigError(f"{table.key('link')}: a file has a content or is a link, not both")
    table.end()
    return File(path=path, mode=int(mode, 8), content=content, link=link)


def _run(table: _Table) -> Run:
    run = Run(name=table.text("name", required=True), script=table.text("script", required=True))
    table.end()
    return run
