"""What the overlay driver has in use: the volumes that are active, and the images of those with a limit."""

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from sysctr.errors import WrongState
from sysctr.linux import files
from sysctr.storage import images, tree
from sysctr.storage.volumes import VolumeRecords

_WAIT_S = 60.0


class Active:
    """What is mounted, or may be: kept in files, so that the next daemon knows it too."""

    def __init__(self, run: str) -> None:
        # Not the name of any volume: the others here are where images are mounted.
        self.directory = f"{run}/ACTIVE"

    def volumes(self) -> frozenset[str]:
        """Return the volumes that are active."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return frozenset()
        return frozenset(name.removesuffix(".json") for name in names if not name.startswith("."))

    def layers(self, volume: str) -> "set[str]":
        """Return the layers an active volume stands on; raises ValueError where that cannot be read."""
        try:
            with open(f"{self.directory}/{volume}.json", encoding="utf-8") as file:
                return set(json.load(file)["layers"])
        except FileNotFoundError:
            return set()
        except (KeyError, TypeError) as error:
            raise ValueError(str(error)) from error

    def add(self, volume: str, layers: Iterable[str]) -> None:
        """Note that a volume is active on these layers, and on those that were noted before."""
        tree.ensure_directory(self.directory)
        try:
            every = {*layers, *self.layers(volume)}
        except ValueError:
            every = set(layers)
        data = json.dumps({"layers": sorted(every)})
        files.write_atomically(f"{self.directory}/{volume}.json", data.encode())

    def remove(self, volume: str) -> None:
        """Note that a volume is not active any more."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.directory}/{volume}.json")


class Disks:
    """The images of volumes with a limit, each mounted while somebody uses it or its volume is active."""

    def __init__(self, records: VolumeRecords, run: str, active: Active) -> None:
        self._records = records
        self._active = active
        self.directory = run
        self._users: Counter[str] = Counter()
        # Volumes whose images nobody may mount for the moment.
        self._closed: set[str] = set()
        self._changed = threading.Condition()

    def image(self, volume: str) -> str:
        """Return the path of a volume's image, whether there is one or not."""
        return f"{self._records.path(volume)}/disk.img"

    def exists(self, volume: str) -> bool:
        """Tell whether a volume has an image."""
        return os.path.exists(self.image(volume))

    def at(self, volume: str) -> str:
        """Return where a volume's image is mounted when it is."""
        return f"{self.directory}/{volume}"

    def hold(self, volume: str) -> None:
        """Mount a volume's image; it stays until `release` finds nobody who uses it."""
        with self._changed:
            self._mount(volume)

    def _mount(self, volume: str) -> None:
        self._wait(volume, lambda: volume not in self._closed)
        # Closed to all but root: the mount is not nosuid, because containers need theirs.
        tree.ensure_directory(self.directory)
        images.mount(self.image(volume), self.at(volume))

    @contextlib.contextmanager
    def used(self, volume: str) -> Iterator[str]:
        """Have a volume's image mounted while entered, and return where."""
        with self._changed:
            self._mount(volume)
            self._users[volume] += 1
        try:
            yield self.at(volume)
        finally:
            with self._changed:
                self._users[volume] -= 1
                self._release(volume)
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self, volume: str) -> Iterator[None]:
        """Have an inactive volume's image for oneself, not mounted, while entered."""
        with self._changed:
            self._wait(volume, lambda: not self._users[volume] and volume not in self._closed)
            self._closed.add(volume)
        try:
            # The namespace of a job, and what it has mounted, goes a moment after the job.
            deadline_s = time.monotonic() + _WAIT_S
            while self.exists(volume) and images.held(self.image(volume)):
                if time.monotonic() > deadline_s:
                    raise WrongState(f"cannot use the disk of volume {volume}: it is in use")
                time.sleep(0.02)
            yield
        finally:
            with self._changed:
                self._closed.remove(volume)
                self._changed.notify_all()

    def _wait(self, volume: str, fact: Callable[[], bool]) -> None:
        if not self._changed.wait_for(fact, _WAIT_S):
            raise WrongState(f"cannot use the disk of volume {volume}: it is in use")

    def release(self, volume: str) -> None:
        """Unmount a volume's image unless it is used or the volume is active."""
        with self._changed:
            self._release(volume)

    def _release(self, volume: str) -> None:
        if not self._users[volume] and volume not in self._active.volumes():
            images.unmount(self.at(volume))

    @contextlib.contextmanager
    def mounted_image(self, path: str) -> Iterator[str]:
        """Have an image that is no volume's yet mounted while entered, and return where."""
        tree.ensure_directory(self.directory)
        directory = f"{self.directory}/{tree.hidden_name('new', 'disk')}"
        images.mount(path, directory)
        try:
            yield directory
        finally:
            images.unmount(directory)

    def sweep(self) -> None:
        """Unmount what a daemon that died had mounted for itself."""
        with contextlib.suppress(FileNotFoundError):
            for name in set(os.listdir(self.directory)) - self._active.volumes():
                if images.mounted(f"{self.directory}/{name}"):
                    images.unmount(f"{self.directory}/{name}")
