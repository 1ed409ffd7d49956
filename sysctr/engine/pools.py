"""The pools of a host: where volumes are kept, each with the driver its administrator chose.

etc/pools/NAME.toml      driver, path and id of a pool; the pool "default" needs none
lib/storage/default.id   the id of that one
POOL/.sysctr-pool        the same id, in the pool itself: without it the place is not the pool, only its path

Both are looked at whenever a pool is used, so one whose disk comes back needs no restart of the daemon.
"""

import contextlib
import json
import logging
import os
import threading
import uuid
from dataclasses import dataclass, field, replace

from sysctr.config import pool as pool_config
from sysctr.config import values
from sysctr.config.pool import Pool
from sysctr.engine.record import Record
from sysctr.errors import ConfigError, NotFound, SysctrError, WrongState
from sysctr.linux import files
from sysctr.paths import Layout
from sysctr.storage.base import Base, Driver
from sysctr.storage.drivers import open_driver
from sysctr.template.base import Template

log = logging.getLogger(__name__)

# The pool that every host has. Templates live in it; other pools get a copy of those that they need.
HOME = "default"
MARKER = ".sysctr-pool"
# Beside the directory of the default pool, which has no file that says its id.
_HOME_ID = ".id"

_LOW_SPACE_PERCENT = 10
_FILE_LIMIT_BYTES = 64 << 10
# A pool that was low is so until this much more is free: one file written and deleted is no news each time.
_AGAIN_PERCENT = 2


@dataclass(frozen=True)
class Problem:
    """Why a pool cannot be used now; `state` is missing, read-only or damaged."""

    state: str
    reason: str
    hint: str = ""


@dataclass(frozen=True)
class Room:
    """What the file system of a pool has; `inodes` is 0 for one that makes them as it needs them."""

    size_bytes: int
    used_bytes: int
    free_bytes: int  # to us: less than what is not used, where blocks are reserved
    inodes: int
    free_inodes: int

    def is_low(self, percent: int, *, was_low: bool = False) -> bool:
        """Tell whether less than a share of the space or of the inodes is free.

        >>> Room(1000, 800, 105, 0, 0).is_low(10), Room(1000, 800, 105, 0, 0).is_low(10, was_low=True)
        (False, True)
        """
        if was_low:
            percent += _AGAIN_PERCENT
        return (
            self.free_bytes * 100 < self.size_bytes * percent
            or self.free_inodes * 100 < self.inodes * percent
        )


@dataclass
class _Known:
    """A pool as its file describes it, and what this daemon has found out."""

    name: str
    settings: Pool
    driver: Driver | None
    mistake: str = ""
    signature: tuple[int, ...] = ()
    ready: bool = False
    swept: bool = False
    low: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Pools:
    """All pools by name. One that cannot be used says why to whoever needs it, and stops nobody else."""

    def __init__(self, where: Layout) -> None:
        self._where = where
        home = open_driver("overlay", where.pool, where.pool_run(HOME))
        self._known = {HOME: _Known(HOME, Pool("overlay", where.pool, "", _LOW_SPACE_PERCENT), home)}
        self._lock = threading.RLock()
        self._home_signature: tuple[int, ...] = ()

    @property
    def home(self) -> Driver:
        """Return the driver of the pool that templates live in."""
        driver = self._known[HOME].driver
        assert driver is not None
        return driver

    def names(self) -> "list[str]":
        """Return the names of all pools, the one that every host has first."""
        self._read_files()
        with self._lock:
            return sorted(self._known, key=lambda name: (name != HOME, name))

    def get(self, name: str, doing: str = "") -> Driver:
        """Return the driver of a pool; raises NotFound, or WrongState that says why it cannot be used.

        `doing` is what the pool is wanted for, as in "start 101".
        """
        problem = self.problem(name, doing)
        if problem is not None:
            raise WrongState(f"cannot {doing or f'use pool {name}'}: {problem.reason}", problem.hint)
        driver = self._find(name, doing).driver
        assert driver is not None
        return driver

    def of(self, record: Record, doing: str = "") -> Driver:
        """Return the driver that keeps a container's rootfs."""
        return self.get(record.pool, doing)

    def opened(self) -> "list[tuple[str, Driver]]":
        """Return every pool that has a driver, one that cannot be used at the moment too.

        For what is done in memory and below the run directory, such as unmounting.
        """
        with self._lock:
            return [(name, one.driver) for name, one in self._known.items() if one.driver is not None]

    def settings(self, name: str) -> Pool:
        """Return what the file of a pool says; of one whose file has a mistake, next to nothing."""
        return self._find(name).settings

    def problem(self, name: str, doing: str = "") -> Problem | None:
        """Look at a pool and return why it cannot be used, None where it can; raises NotFound."""
        one = self._find(name, doing)
        if one.driver is None:
            path = config_path(self._where, name)
            return Problem("damaged", f"the file of pool {name} has a mistake: {one.mistake}", f"mend {path}")
        found = _look(name, one.settings)
        if found is not None and found.state == "missing":
            one.ready = False
        if found is not None or one.ready:
            return found
        with one.lock:
            return None if one.ready else self._make_ready(one)

    def room(self, name: str) -> Room:
        """Return how much room the file system of a pool has; raises OSError."""
        facts = os.statvfs(self._find(name).settings.path)
        block = facts.f_frsize
        used_bytes = (facts.f_blocks - facts.f_bfree) * block
        return Room(
            facts.f_blocks * block, used_bytes, facts.f_bavail * block, facts.f_files, facts.f_favail
        )

    def is_low(self, name: str) -> bool:
        """Tell whether a pool has less room than its low_space says."""
        try:
            return self.room(name).is_low(self.settings(name).low_space_percent)
        except OSError:
            return False

    def became_low(self) -> "list[str]":
        """Return the pools that have run low since this was asked last."""
        news = []
        for name in self.names():
            with contextlib.suppress(OSError, NotFound):
                one = self._find(name)
                was_low = one.low
                one.low = self.room(name).is_low(one.settings.low_space_percent, was_low=was_low)
                if one.low and not was_low:
                    news.append(name)
        return news

    def base(self, template: Template, tree: str, pool: str) -> Base:
        """Return a template as the driver of a pool takes it."""
        if pool == HOME:
            return Base(template.layer, tree)
        # Another template may get the name later, and the copies of this one have to stay apart from its.
        return Base(f"{template.layer}.{int(template.created):x}", tree)

    def prepare(self) -> None:
        """Make every pool usable and clean up after a crash; what fails is told to who asks for the pool."""
        self._prepare_home()
        for name in self.names():
            problem = self.problem(name)
            if problem is not None:
                log.error("%s", problem.reason)

    def _prepare_home(self) -> None:
        """Make the pool that every host has, unless it was made before and its disk is not there now."""
        home, path = self._known[HOME], self._where.pool
        try:
            home.settings = replace(home.settings, id=_read_home_id(path))
            if home.settings.id and _look(HOME, home.settings) is not None:
                return
            self.home.prepare()
            self.home.sweep()
            home.ready = home.swept = True
            if not home.settings.id:
                home.settings = replace(home.settings, id=_mark_home(path))
        except (SysctrError, OSError) as error:
            # Whoever needs it is told; containers in other pools do not.
            log.error("pool %s: %s", HOME, error)

    def drop_bases(self, templates: "list[Template]") -> None:
        """Take away what other pools have of templates that are gone."""
        for name, driver in self.opened():
            if name == HOME or self.problem(name):
                continue
            try:
                driver.drop_bases(frozenset(self.base(one, "", name).layer for one in templates))
            except (SysctrError, OSError) as error:
                log.warning("pool %s: %s", name, error)

    def empty_trash(self) -> None:
        """Delete what was destroyed, in every pool that can be used."""
        for name in self.names():
            try:
                self.get(name).empty_trash()
            except (SysctrError, OSError) as error:
                log.warning("pool %s: cannot delete what was destroyed: %s", name, error)

    def forget(self, name: str) -> None:
        """Take a pool whose file was removed off the list."""
        with self._lock:
            self._known.pop(name, None)

    def _find(self, name: str, doing: str = "") -> _Known:
        if name != HOME:
            self._read_files()
        with self._lock:
            if name in self._known:
                return self._known[name]
            known = ", ".join(sorted(self._known, key=lambda other: (other != HOME, other)))
        what = "cannot use pool" if not doing else f"cannot {doing}: there is no pool"
        reason = f"{what} {values.shown(name)[1:-1]}" + ("" if doing else ": there is none of this name")
        raise NotFound(reason, f"there is {known}; `sysctr pool add` makes one")

    def _make_ready(self, one: _Known) -> Problem | None:
        assert one.driver is not None
        try:
            one.driver.prepare()
            # Only at first: what comes back may have work of this very daemon in it.
            if not one.swept:
                one.driver.sweep()
        except SysctrError as error:
            return Problem("damaged", f"pool {one.name} cannot be used: {_reason(error)}", error.hint)
        one.ready = one.swept = True
        log.info("pool %s: %s in %s", one.name, one.settings.driver, one.settings.path)
        return None

    def _read_files(self) -> None:
        """Learn of every file that came, changed or went; costs some system calls where none did."""
        found = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self._where.pool_configs) as entries:
            for entry in entries:
                name, dot, kind = entry.name.rpartition(".")
                if dot and kind == "toml" and not name.startswith("."):
                    with contextlib.suppress(FileNotFoundError):
                        state = entry.stat()
                        found[name] = (state.st_ino, state.st_mtime_ns, state.st_size)
        with self._lock:
            self._read_home(found.pop(HOME, ()))
            for name in self._known.keys() - found.keys() - {HOME}:
                del self._known[name]
            for name, signature in sorted(found.items()):
                if name not in self._known or self._known[name].signature != signature:
                    self._known[name] = self._read_file(name, signature)

    def _read_file(self, name: str, signature: tuple[int, ...]) -> _Known:
        before = self._known.get(name)
        path = config_path(self._where, name)
        try:
            values.parse_name(name)
            settings = pool_config.read_pool(_text(path))
            for other in self._known.values():
                if other.name != name and other.driver is not None:
                    refuse_overlap(name, settings.path, other.name, other.settings.path)
            if before is not None and before.driver is not None and _same_place(before.settings, settings):
                before.settings, before.signature = settings, signature
                return before
            driver = open_driver(settings.driver, settings.path, self._where.pool_run(name))
        except (SysctrError, OSError, UnicodeDecodeError) as error:
            mistake = error.message if isinstance(error, SysctrError) else str(error)
            log.error("%s: %s", path, mistake)
            nothing = Pool("", "", "", _LOW_SPACE_PERCENT)
            return _Known(name, nothing, None, mistake, signature)
        return _Known(name, settings, driver, "", signature)

    def _read_home(self, signature: tuple[int, ...]) -> None:
        if signature == self._home_signature:
            return
        self._home_signature = signature
        percent = _LOW_SPACE_PERCENT
        if signature:
            try:
                percent = pool_config.read_default(_text(config_path(self._where, HOME)))
            except (ConfigError, OSError, UnicodeDecodeError) as error:
                # All that it could say is when to warn.
                log.error("%s: %s", config_path(self._where, HOME), error)
        home = self._known[HOME]
        home.settings = replace(home.settings, low_space_percent=percent)


def config_path(where: Layout, name: str) -> str:
    """Return the path of a pool's file."""
    return f"{where.pool_configs}/{name}.toml"


def read_marker(path: str) -> "dict[str, str]":
    """Return what marks the directory as a pool; raises OSError, FileNotFoundError for one that is none."""
    data, _state = files.read_bounded(f"{path}/{MARKER}", _FILE_LIMIT_BYTES)
    try:
        marker = json.loads(data)
        return {"id": str(marker["id"]), "driver": str(marker["driver"]), "name": str(marker["name"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {"id": "", "driver": "", "name": ""}


def _read_home_id(path: str) -> str:
    try:
        return _text(f"{path}{_HOME_ID}").strip()
    except FileNotFoundError:
        return ""


def _mark_home(path: str) -> str:
    """Mark the pool of a host that has just been made, or that is an older one's, and note its id beside."""
    try:
        id_ = read_marker(path)["id"]
    except FileNotFoundError:
        id_ = ""
    if not id_:
        id_ = str(uuid.uuid4())
        write_marker(HOME, Pool("overlay", path, id_, _LOW_SPACE_PERCENT))
    files.write_atomically(f"{path}{_HOME_ID}", f"{id_}\n".encode())
    return id_


def write_marker(name: str, settings: Pool) -> None:
    """Mark a directory as a pool."""
    marker = {"schema": 1, "id": settings.id, "driver": settings.driver, "name": name}
    files.write_atomically(f"{settings.path}/{MARKER}", json.dumps(marker).encode() + b"\n")


def refuse_overlap(name: str, path: str, other: str, other_path: str) -> None:
    """Raise ConfigError where a pool lies in another, or another in it."""
    mine, its = os.path.realpath(path), os.path.realpath(other_path)
    if mine == its:
        raise ConfigError(f"cannot accept path of pool {name}: {path} is that of pool {other} already")
    if is_below(mine, its) or is_below(its, mine):
        inner, outer = ("it", f"pool {other}") if is_below(mine, its) else (f"pool {other}", "it")
        raise ConfigError(f"cannot accept path of pool {name}: {inner} would lie in {outer}, at {other_path}")


def is_below(path: str, directory: str) -> bool:
    """Tell whether a normal path is the directory or below it.

    >>> is_below("/srv/a/b", "/srv/a"), is_below("/srv/ab", "/srv/a")
    (True, False)
    """
    return f"{path}/".startswith(f"{directory.rstrip('/')}/")


def _same_place(old: Pool, new: Pool) -> bool:
    return (old.driver, old.path, old.id) == (new.driver, new.path, new.id)


def _look(name: str, settings: Pool) -> Problem | None:
    """Return why a path is not its pool at the moment; some system calls."""
    path = settings.path
    try:
        # The first pool of a host has no id before it was made.
        if settings.id:
            marker = read_marker(path)
            if marker["id"] != settings.id:
                return Problem(
                    "missing", f"pool {name} is missing: {path} holds another pool, {marker['name']!r}",
                    f"mount the file system of pool {name} there",
                )  # fmt: skip
        read_only = os.statvfs(path).f_flag & os.ST_RDONLY
    except (FileNotFoundError, NotADirectoryError):
        return Problem("missing", f"pool {name} is missing: {_absence(path)}", _absence_hint(path))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        return Problem("missing", f"pool {name} is missing: {path} cannot be read: {reason}", "see `dmesg`")
    if read_only:
        return Problem(
            "read-only", f"pool {name} is read-only: {path} is mounted so",
            "see `dmesg` for the reason, then remount it",
        )  # fmt: skip
    return None


def _absence(path: str) -> str:
    if not os.path.isdir(path):
        return f"{path} does not exist"
    return f"{path} holds another file system" if os.path.ismount(path) else f"{path} is not mounted"


def _absence_hint(path: str) -> str:
    return f"mount it; it is known by its file {path}/{MARKER}"


def _reason(error: SysctrError) -> str:
    return error.message.partition(": ")[2] or error.message


def _text(path: str) -> str:
    data, _state = files.read_bounded(path, _FILE_LIMIT_BYTES)
    return data.decode("utf-8")
