"""Which containers are on their way, on disk, at both ends: read again by the daemon after a crash.

lib/migrations/MID.json    one migration: whose it is, how far it is, and all that is needed to go on or back

What decides is not here alone: that a container is another host's stands in its own record (`away`).
"""

import contextlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable
from typing import Any

from sysctr.errors import Refused, SysctrError
from sysctr.linux import files
from sysctr.paths import Layout
from sysctr.peer.message import Text
from sysctr.storage.tree import explain

log = logging.getLogger(__name__)

SCHEMA = 1
_MID = "[0-9a-f]{16}"
# The id of a migration in a message.
MID = Text(16, pattern=_MID)
_LARGEST_BYTES = 16 << 20

# Roles in which this host has what was received, and a number that is reserved for it.
ARRIVING = ("target", "replica")

Entry = dict[str, Any]


class MigrationJournal:
    """Keeps an entry for each migration until both ends know its outcome."""

    def __init__(self, where: Layout) -> None:
        self._directory = where.migrations
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        # Told of every migration that is new here.
        self.on_new: Callable[[], None] = lambda: None

    def load(self) -> None:
        """Read what the last daemon left; an entry that is damaged is set aside and logged."""
        with contextlib.suppress(FileNotFoundError):
            files.remove_unfinished(self._directory)
            for name in sorted(os.listdir(self._directory)):
                mid, dot, kind = name.partition(".")
                if dot and kind == "json" and re.fullmatch(_MID, mid):
                    self._load(mid)

    def _load(self, mid: str) -> None:
        path = self._path(mid)
        try:
            data, _ = files.read_bounded(path, _LARGEST_BYTES)
            entry = json.loads(data)
            if entry["schema"] > SCHEMA:
                raise ValueError(f"a newer sysctr wrote it (schema {entry['schema']})")
            if entry["id"] != mid or entry["role"] not in ("source", *ARRIVING):
                raise ValueError("it is that of another migration")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.error("migration %s: its journal cannot be read: %s", mid, error)
            with contextlib.suppress(OSError):
                os.rename(path, f"{path}.damaged")
            return
        self._entries[mid] = entry

    def write(self, entry: Entry, **changes: Any) -> Entry:
        """Keep an entry with changes; it is on the disk when this returns, and is returned."""
        kept = {**entry, **changes, "schema": SCHEMA}
        data = json.dumps(kept).encode() + b"\n"
        if len(data) > _LARGEST_BYTES:
            # The next daemon would not read it, and take what belongs to it for nobody's.
            raise Refused(f"cannot note how far the migration is: that takes {len(data)} bytes")
        try:
            os.makedirs(self._directory, 0o700, exist_ok=True)
            files.write_atomically(self._path(kept["id"]), data)
        except OSError as error:
            raise explain(error, "note how far the migration is", self._directory) from error
        with self._lock:
            new = kept["id"] not in self._entries
            self._entries[kept["id"]] = kept
        if new:
            self.on_new()
        return kept

    def remove(self, mid: str) -> None:
        """Forget a migration whose outcome both ends know."""
        with self._lock:
            self._entries.pop(mid, None)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(mid))
                files.sync_directory(self._directory)
        except OSError as error:
            raise SysctrError(f"cannot forget migration {mid}: {error.strerror}") from error

    def get(self, mid: str) -> Entry | None:
        """Return an entry, None where there is none."""
        with self._lock:
            return self._entries.get(mid)

    def all(self, *roles: str) -> list[Entry]:
        """Return every entry, or those in which this host has one of these roles."""
        with self._lock:
            return [entry for entry in self._entries.values() if not roles or entry["role"] in roles]

    def of(self, number: int) -> Entry | None:
        """Return the entry of a container here, None where it is not on its way."""
        return next((entry for entry in self.all("source", "target") if entry["number"] == number), None)

    def _path(self, mid: str) -> str:
        return f"{self._directory}/{mid}.json"
