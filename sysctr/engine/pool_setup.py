"""Adding a pool and removing one: it is there completely, or nothing of it is."""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Callable
from contextlib import ExitStack

from sysctr.config import pool as pool_config
from sysctr.config import values
from sysctr.config.pool import Pool
from sysctr.engine.pools import (
    HOME,
    MARKER,
    Pools,
    config_path,
    is_below,
    read_marker,
    refuse_overlap,
    write_marker,
)
from sysctr.errors import ConfigError, Refused, SysctrError, UsageError, WrongState
from sysctr.linux import files
from sysctr.paths import Layout
from sysctr.storage import tree
from sysctr.storage.base import Driver
from sysctr.storage.drivers import DRIVERS, open_driver

_DEFAULT_LOW_SPACE = "10%"
# What mke2fs puts into every file system.
_NOT_FOREIGN = {"lost+found"}


def add_pool(
    where: Layout,
    pools: Pools,
    name: str,
    kind: str,
    path: str,
    *,
    low_space: str | None = None,
    force: bool = False,
    check: Callable[[Driver], None],
) -> None:
    """Make a directory a pool, or take up one that is a pool already; `check` may refuse what is in it.

    Raises UsageError, Refused, WrongState and what the driver says; nothing is left behind then.
    """
    doing = f"add pool {values.shown(name)[1:-1]}"
    settings = _settings(doing, name, kind, path, low_space)
    if name in pools.names():
        raise WrongState(f"cannot {doing}: there is a pool of this name", "`sysctr pool list` shows it")
    _refuse_place(where, pools, doing, name, path)
    with ExitStack() as undo:
        try:
            _make_directory(path, undo)
            settings = _taken_up(doing, settings, force=force)
            _refuse_twice(pools, doing, settings)
            driver = open_driver(kind, path, where.pool_run(name))
            # First: what a crash leaves of this can be added again.
            if not os.path.lexists(f"{path}/{MARKER}"):
                undo.callback(_unlink, f"{path}/{MARKER}")
                write_marker(name, settings)
            _prepare(driver, path, undo)
            check(driver)
            os.makedirs(where.pool_configs, mode=0o755, exist_ok=True)
            text = pool_config.new_text(name, settings)
            files.write_atomically(config_path(where, name), text.encode(), 0o644)
            undo.callback(_unlink, config_path(where, name))
            problem = pools.problem(name)
            if problem is not None:
                raise WrongState(f"cannot {doing}: {problem.reason}", problem.hint)
        except OSError as error:
            raise tree.explain(error, doing, path) from error
        except SysctrError as error:
            if error.message.startswith(f"cannot {doing}: "):
                raise
            reason = error.message.partition(": ")[2] or error.message
            raise type(error)(f"cannot {doing}: {reason}", error.hint) from error
        undo.pop_all()


def remove_pool(where: Layout, pools: Pools, name: str, users: "list[str]", *, force: bool = False) -> str:
    """Forget a pool that nobody uses, and remove what was made in its directory; returns what stays there.

    One that cannot be used is forgotten only with `force`; what is in it stays as it is.
    """
    doing = f"remove pool {name}"
    if name == HOME:
        raise Refused(f"cannot {doing}: every host has it, and the templates are in it")
    problem = pools.problem(name, doing)
    if users:
        raise WrongState(
            f"cannot {doing}: {', '.join(users)} {'is' if len(users) == 1 else 'are'} in it",
            "`sysctr destroy` them first",
        )
    if problem is not None and not force:
        raise WrongState(
            f"cannot {doing}: {problem.reason}", "--force forgets the pool and leaves what is in it"
        )
    left = ""
    if problem is None:
        driver = pools.get(name, doing)
        volumes = driver.list()
        if volumes:
            raise WrongState(
                f"cannot {doing}: volume{'s' * (len(volumes) > 1)} {', '.join(volumes)} would be lost",
                "`sysctr doctor` says whose they are",
            )
        left = _dismantle(doing, driver)
    _unlink(config_path(where, name))
    with contextlib.suppress(OSError):
        files.sync_directory(where.pool_configs)
    pools.forget(name)
    return left


def _settings(doing: str, name: str, kind: str, path: str, low_space: str | None) -> Pool:
    try:
        values.parse_name(name)
    except ConfigError as error:
        reason = error.message.replace("a container name", "a pool name")
        raise UsageError(f"cannot {doing}: {reason}") from error
    if kind not in DRIVERS:
        reason = f"there is no storage driver {values.shown(kind)}"
        raise UsageError(f"cannot {doing}: {reason}", f"there is {', '.join(DRIVERS)}")
    mapping = {
        "driver": kind, "path": path, "id": str(uuid.uuid4()), "low_space": low_space or _DEFAULT_LOW_SPACE,
    }  # fmt: skip
    try:
        return pool_config.parse_pool(mapping)
    except ConfigError as error:
        raise UsageError(
            f"cannot {doing}: {error.message.removeprefix('cannot accept ')}", error.hint
        ) from error


def _refuse_place(where: Layout, pools: Pools, doing: str, name: str, path: str) -> None:
    """Raise where a pool would be lost with something else, or something else with it."""
    try:
        real = os.path.realpath(path)
    except OSError as error:  # links of /proc, even to root
        raise Refused(f"cannot {doing}: {path}: {(error.strerror or str(error)).lower()}") from error
    for place in (where.etc, where.run, where.log):
        if is_below(real, place) or is_below(place, real):
            raise Refused(f"cannot {doing}: {path} and {place}, where sysctr has its own files, would mix")
    storage = f"{where.lib}/storage"
    if is_below(real, where.lib) and (real == storage or not is_below(real, storage)):
        raise Refused(f"cannot {doing}: {path} is among the files of sysctr", f"choose {storage}/{name}")
    for other in pools.names():
        its = pools.settings(other).path
        if its:
            refuse_overlap(name, path, other, its)


def _make_directory(path: str, undo: ExitStack) -> None:
    missing = []
    parent = path
    while not os.path.lexists(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    for directory in reversed(missing):
        os.mkdir(directory, 0o700 if directory == path else 0o755)
        undo.callback(_rmdir, directory)
    state = os.lstat(path)
    if not stat.S_ISDIR(state.st_mode):
        raise Refused(f"cannot use {path}: it is a symlink or a file", "name a directory")
    # The driver closes it to all but root.
    undo.callback(os.chmod, path, stat.S_IMODE(state.st_mode))


def _taken_up(doing: str, settings: Pool, *, force: bool) -> Pool:
    """Return the settings with the id of the pool that the directory is already, if it is one."""
    path = settings.path
    try:
        marker = read_marker(path)
    except FileNotFoundError:
        foreign = sorted(set(os.listdir(path)) - _NOT_FOREIGN)
        if foreign and not force:
            shown = ", ".join(values.shown(name)[1:-1] for name in foreign[:3])
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise Refused(
                f"cannot {doing}: {path} is not empty, it has {shown}{more}",
                "choose a directory of its own below, or --force: then only root can reach it any more",
            ) from None
        return settings
    if marker["driver"] != settings.driver:
        raise Refused(
            f"cannot {doing}: {path} is a pool of the driver {marker['driver'] or 'unknown'}",
            f"add it with --driver {marker['driver']}" if marker["driver"] else "empty the directory",
        )
    return Pool(settings.driver, path, marker["id"], settings.low_space_percent)


def _refuse_twice(pools: Pools, doing: str, settings: Pool) -> None:
    # The same file system may be mounted at two places, which no comparison of paths finds out.
    for other in pools.names():
        if pools.settings(other).id == settings.id:
            raise Refused(f"cannot {doing}: {settings.path} is pool {other}, at another path")


def _prepare(driver: Driver, path: str, undo: ExitStack) -> None:
    before = set(os.listdir(path))

    def take_back() -> None:
        for name in set(os.listdir(path)) - before:
            # It was made a moment ago, for a pool that never came to be.
            tree.delete(f"{path}/{name}")

    undo.callback(take_back)
    driver.prepare()


def _dismantle(doing: str, driver: Driver) -> str:
    """Take away the directories of a pool without volumes; returns the names of what else is there."""
    path = driver.directory
    # By way of the trash, because only the driver knows how its copies of templates are deleted.
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(f"{path}/layers"):
            tree.Trash(f"{path}/.trash").throw(f"{path}/layers/{name}")
    driver.empty_trash()
    ours = {"layers", "volumes", "uppers", "held", ".trash"}
    for name in sorted(os.listdir(path)):
        if name in ours:
            try:
                os.rmdir(f"{path}/{name}")
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.ENOTDIR, errno.EBUSY):
                    raise tree.explain(error, doing, path) from error
    _unlink(f"{path}/{MARKER}")
    return ", ".join(values.shown(name)[1:-1] for name in sorted(set(os.listdir(path)) - _NOT_FOREIGN))


def _rmdir(path: str) -> None:
    # Somebody may have put something into it meanwhile, and that stays.
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
