"""What an action of several steps is about to do to a container, on disk, for the daemon after a crash.

lib/containers/101/journal.json    there while such an action is under way; one at a time, as is the action
"""

import contextlib
import json
import logging
import os
from typing import Any

from sysctr.engine.state import Store
from sysctr.errors import SysctrError
from sysctr.linux import fault, files
from sysctr.storage.tree import explain

log = logging.getLogger(__name__)

SCHEMA = 1
_LARGEST_BYTES = 1 << 20


class Journal:
    """Writes down what begins and forgets what has ended. Who writes holds the container."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, number: int, action: str, **facts: Any) -> None:
        """Note that an action begins; it is on the disk when this returns."""
        entry = json.dumps({"schema": SCHEMA, "action": action, **facts})
        path = self._path(number)
        try:
            files.write_atomically(path, entry.encode() + b"\n")
        except OSError as error:
            raise explain(error, f"{action} {number}", os.path.dirname(path)) from error
        fault.point(f"{action}.journal.written")

    def clear(self, number: int) -> None:
        """Forget the action: it is finished or undone. A container that is gone has no journal either."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(number))
            files.sync_directory(self._store.layout.container_dir(number))

    def pending(self) -> list[tuple[int, dict[str, Any]]]:
        """Return what was under way when the last daemon died; a damaged entry is logged and removed."""
        found = []
        for record in self._store.list():
            try:
                data, _ = files.read_bounded(self._path(record.id), _LARGEST_BYTES)
                entry = json.loads(data)
                if entry["schema"] > SCHEMA or not isinstance(entry["action"], str):
                    raise ValueError(f"schema {entry['schema']}")
                found.append((record.id, entry))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.error("%d: its journal cannot be read: %s", record.id, error)
                self.drop(record.id)
        return found

    def drop(self, number: int) -> None:
        """Set a journal that is of no use aside, where a person can still read it."""
        try:
            os.rename(self._path(number), f"{self._path(number)}.damaged")
        except OSError as error:
            raise SysctrError(f"cannot set aside {self._path(number)}: {error.strerror}") from error

    def _path(self, number: int) -> str:
        return f"{self._store.layout.container_dir(number)}/journal.json"
