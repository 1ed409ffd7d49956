"""The state of a container that a backup is made of: taken in a moment, kept while the archive is written.

What storage offers decides: a snapshot that nobody sees; where there are none, copies beside the volumes of a
running container, or the volumes themselves while nobody uses them.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sysctr.engine.host import Host
from sysctr.engine.journal import Journal
from sysctr.engine.lifecycle import Lifecycle
from sysctr.engine.pause import Pause
from sysctr.engine.record import Record
from sysctr.engine.snapshots import Snapshots, Volume
from sysctr.engine.tasks import Task
from sysctr.errors import NotFound, Refused, SysctrError
from sysctr.linux import fault
from sysctr.storage import tree
from sysctr.storage.base import RootSpec, Tree

log = logging.getLogger(__name__)

# As Proxmox waits: one that does not stop in this time is killed for its backup.
STOP_TIMEOUT_S = 600.0
# Whatever else works on a container has an end; a person who does not want to wait cancels the backup.
_HOLD_S = 24 * 3600.0
# Volumes that hold a state where the storage keeps none; those of containers begin with a number.
_SCRATCH = "tmp-backup-"


@dataclass(frozen=True)
class State:
    """Read-only views of a container's root, and of mount points by their index; and its pause, if any."""

    root: RootSpec
    mounts: dict[int, RootSpec]
    pause_s: float | None


class _Hold:
    """The container, held until its state is kept; closing it twice is fine."""

    def __init__(self, host: Host, number: int, task: Task) -> None:
        self._host = host
        self._number = number
        self._task = task
        self._stack = contextlib.ExitStack()
        self._held = False

    def __enter__(self) -> "_Hold":
        self._stack.enter_context(self._taken())
        self._held = True
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def enter(self, context: contextlib.AbstractContextManager[None]) -> None:
        """Enter something that ends just before the container is let go."""
        self._stack.enter_context(context)

    def close(self) -> None:
        """Let the container go."""
        try:
            self._stack.close()
        finally:
            self._held = False

    def again(self) -> contextlib.AbstractContextManager[None]:
        """Return what holds the container for a moment, if it is not held anyway."""
        return contextlib.nullcontext() if self._held else self._taken()

    def _taken(self) -> contextlib.AbstractContextManager[None]:
        return self._host.tasks.hold(self._number, "back up", _HOLD_S, self._task)


class States:
    """Takes states for backups."""

    def __init__(self, host: Host, lifecycle: Lifecycle, snapshots: Snapshots, journal: Journal) -> None:
        self._host = host
        self._lifecycle = lifecycle
        self._snapshots = snapshots
        self._journal = journal

    def sweep(self) -> None:
        """Remove the copies that a crash left."""
        for name, driver in self._host.pools.opened():
            with contextlib.suppress(SysctrError):
                for volume in driver.list():
                    if volume.startswith(_SCRATCH):
                        log.info("pool %s: removing %s, which a crash left", name, volume)
                        driver.deactivate(volume)
                        driver.destroy(volume)

    @contextlib.contextmanager
    def of(self, task: Task, record: Record, *, stop: bool) -> Iterator[State]:
        """Give a state of the container that does not change while entered.

        With `stop` a running one is shut down for it, and runs again as soon as that is possible, whatever
        happens.
        """
        host, number = self._host, record.id
        with contextlib.ExitStack() as kept, contextlib.ExitStack() as stack:
            # In this order they end: views, the hold, and what the views are of.
            hold = stack.enter_context(_Hold(host, number, task))
            views = stack.enter_context(contextlib.ExitStack())
            task.check()
            record = host.store.load(number)
            running = host.live.running(number) is not None
            if running and stop:
                hold.enter(self._stopped(task, record))
            elif not running:
                host.live.wait_settled(number, 30)
                host.release(number)
            alive = running and not stop
            try:
                facts = {"start": True} if running and stop else {}
                name, pause_s = self._snapshots.take_temporary(task, record, **facts)
            except Refused as error:
                task.log(error.message)
                if alive:
                    root, mounts, pause_s = self._copies(task, record, kept)
                    hold.close()
                else:
                    task.log("so the container is not started before the archive is written")
                    if facts:
                        self._journal.write(number, "snapshot", name="", frozen=False, **facts)
                    root, mounts, pause_s = *self._views(record, "", views), None
            else:
                kept.callback(self._forget, record, name, hold)
                hold.close()
                root, mounts = self._views(record, name, views)
            yield State(root, mounts, pause_s)

    @contextlib.contextmanager
    def _stopped(self, task: Task, record: Record) -> Iterator[None]:
        """Shut the container down while entered; a daemon that dies then leaves the start to the next."""
        number = record.id
        self._journal.write(number, "snapshot", name="", frozen=False, start=True)
        try:
            task.step("stopping")
            self._lifecycle.stop(task, number, STOP_TIMEOUT_S)
            fault.point("backup.stopped")
            yield
        finally:
            if self._host.live.running(number) is None:
                # Not a step of the task: one that was cancelled has to do this all the same.
                task.log("starting it again")
                self._lifecycle.start(task, number)
            self._journal.clear(number)

    def _forget(self, record: Record, name: str, hold: _Hold) -> None:
        try:
            with hold.again():
                self._snapshots.forget_temporary(self._host.store.load(record.id), name)
        except NotFound:
            pass  # destroyed meanwhile, with all its states
        except SysctrError as error:
            log.error("%d: the state that was kept for a backup stays: %s", record.id, error.message)
        self._host.collect_soon()

    def _archived(self, record: Record) -> list[tuple[int | None, Volume]]:
        """Return the volumes that a backup has, by the index of their mount points; None is the root."""
        config = record.usable("back up")
        names = {
            self._host.mounts.volume_of(record, mount).name: mount.index
            for mount in config.mounts
            if mount.kind == "volume" and mount.backup
        }
        *mounts, root = self._snapshots.volumes(record)
        return [(None, root), *((names[volume[1]], volume) for volume in mounts if volume[1] in names)]

    def _views(
        self, record: Record, snapshot: str, stack: contextlib.ExitStack
    ) -> tuple[RootSpec, dict[int, RootSpec]]:
        views = {
            index: stack.enter_context(driver.opened(volume, snapshot))
            for index, (driver, volume) in self._archived(record)
        }
        return views.pop(None), views  # type: ignore[arg-type, return-value]

    def _copies(
        self, task: Task, record: Record, kept: contextlib.ExitStack
    ) -> tuple[RootSpec, dict[int, RootSpec], float]:
        """Copy the volumes of a running container; it is paused for what changed meanwhile."""
        task.step("copying")
        archived = self._archived(record)
        pause = Pause(self._host, record.id, len(archived))
        live = self._host.live.running(record.id)
        # A daemon that dies while the container is frozen leaves it to the next to let it go on.
        self._journal.write(record.id, "snapshot", name="", frozen=live is not None and live.frozen)
        try:
            with ThreadPoolExecutor(len(archived), "backup") as pool:
                copies = {
                    index: pool.submit(self._copy, task, record, volume, number, pause, kept)
                    for number, (index, volume) in enumerate(archived)
                }
            views = {index: copy.result() for index, copy in copies.items()}
        finally:
            self._journal.clear(record.id)
        return views.pop(None), views, pause.length_s  # type: ignore[arg-type, return-value]

    def _copy(
        self, task: Task, record: Record, of: Volume, index: int, pause: Pause, kept: contextlib.ExitStack
    ) -> RootSpec:
        driver, volume = of
        scratch = f"{_SCRATCH}{record.id}-{index}"
        worker = self._host.worker(record, task)
        view = RootSpec(())

        def take() -> None:
            nonlocal view
            source = driver.activate(volume)
            driver.create(scratch, None, worker, size_bytes=driver.size(volume))
            kept.callback(driver.destroy, scratch)
            target = driver.activate(scratch).trees[-1].path
            kept.callback(driver.deactivate, scratch)
            began_s = time.time()
            # A page that is clean after this changes its file's times when it is written to again.
            tree.sync_file_system(source.trees[-1].path)
            worker.copy(source, target, in_use=True)
            tree.sync_file_system(target)
            with pause():
                worker.copy(source, target, changed_since_s=began_s)
            view = RootSpec((Tree("copy", target, read_only=True),))

        pause.run(take)
        return view
