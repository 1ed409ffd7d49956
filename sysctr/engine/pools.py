"""The pools of a host: where volumes are kept, each with the driver its administrator chose."""

import logging

from sysctr.engine.record import Record
from sysctr.errors import NotFound, SysctrError
from sysctr.paths import Layout
from sysctr.storage.base import Base, Driver
from sysctr.storage.drivers import open_driver
from sysctr.template.base import Template

log = logging.getLogger(__name__)

# The pool that every host has. Templates live in it; other pools get a copy of those that they need.
HOME = "default"


class Pools:
    """All pools by name. One that cannot be used says why to whoever needs it, and stops nobody else."""

    def __init__(self, where: Layout) -> None:
        self._where = where
        self._drivers: dict[str, Driver] = {HOME: open_driver("overlay", where.pool, where.pool_run(HOME))}
        self._errors: dict[str, SysctrError] = {}

    @property
    def home(self) -> Driver:
        """Return the driver of the pool that templates live in."""
        return self._drivers[HOME]

    def names(self) -> "list[str]":
        """Return the names of all pools, the one that every host has first."""
        return sorted(self._drivers, key=lambda name: (name != HOME, name))

    def get(self, name: str) -> Driver:
        """Return the driver of a pool; raises NotFound, or why the pool cannot be used."""
        if name not in self._drivers:
            known = ", ".join(self.names())
            raise NotFound(f"cannot use pool {name}: there is none of this name", f"there is {known}")
        if name in self._errors:
            raise self._errors[name]
        return self._drivers[name]

    def of(self, record: Record) -> Driver:
        """Return the driver that keeps a container's rootfs."""
        return self.get(record.pool)

    def base(self, template: Template, tree: str, pool: str) -> Base:
        """Return a template as the driver of a pool takes it."""
        if pool == HOME:
            return Base(template.layer, tree)
        # Another template may get the name later, and the copies of this one have to stay apart from its.
        return Base(f"{template.layer}.{int(template.created):x}", tree)

    def prepare(self) -> None:
        """Make every pool usable and clean up after a crash; what fails is kept for who asks for the pool."""
        for name, driver in self._drivers.items():
            self._errors.pop(name, None)
            try:
                driver.prepare()
                driver.sweep()
            except SysctrError as error:
                if name == HOME:
                    raise
                log.error("pool %s: %s", name, error)
                self._errors[name] = error

    def empty_trash(self) -> None:
        """Delete what was destroyed, in every pool."""
        for name, driver in self._drivers.items():
            try:
                driver.empty_trash()
            except (SysctrError, OSError) as error:
                log.warning("pool %s: cannot delete what was destroyed: %s", name, error)
