"""The host ids that containers get: one pool in /etc/subuid and /etc/subgid, and blocks of it by first fit.

The pool is registered where every tool for user namespaces looks, so that useradd, podman and other managers
keep off it. Which container has which block is in the containers' records and nowhere else.
"""

import contextlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sysctr.errors import NoSpace, Refused, SysctrError
from sysctr.linux import files
from sysctr.paths import Layout

BLOCK = 65536
LOWEST = 1_000_000
# Below 2^31, for the programs that keep an id in an int, and below systemd's ids of foreign file systems.
HIGHEST = 2_147_352_576
LOCK_TIMEOUT_S = 15.0

_LARGEST_FILE_BYTES = 16 * 2**20


@dataclass(frozen=True, order=True)
class IdRange:
    """Consecutive host ids."""

    first: int
    count: int

    @property
    def end(self) -> int:
        """Return the first id after the range."""
        return self.first + self.count

    def overlaps(self, other: "IdRange") -> bool:
        """Tell whether an id is in both."""
        return self.first < other.end and other.first < self.end


def default_count(layout: Layout) -> int:
    """Return how many ids an installation takes where its settings say nothing."""
    # Installations with a root of their own come in numbers on one machine: tests, hosts in one host.
    return (256 if layout.root else 1000) * BLOCK


def first_fit(pool: Iterable[IdRange], used: Iterable[IdRange], count: int) -> int | None:
    """Return the first id of the lowest free block, a whole number of blocks from its range's start.

    >>> first_fit([IdRange(1000000, 4 * BLOCK)], [IdRange(1000000, BLOCK)], 2 * BLOCK) == 1000000 + BLOCK
    True
    """
    taken = sorted(used)
    for available in sorted(pool):
        first = available.first
        for other in taken:
            if first + count <= other.first:
                break
            if other.end > first:
                first += -(-(other.end - first) // BLOCK) * BLOCK
        if first + count <= available.end:
            return first
    return None


class IdPool:
    """The ranges registered for one owner, which is one installation."""

    def __init__(
        self,
        owner: str,
        subuid: str = "/etc/subuid",
        subgid: str = "/etc/subgid",
        passwd: str = "/etc/passwd",
        group: str = "/etc/group",
    ) -> None:
        self.owner = owner
        self.subuid = subuid
        self.subgid = subgid
        self.passwd = passwd
        self.group = group

    def ranges(self) -> tuple[IdRange, ...]:
        """Return the ranges that are the owner's in both files."""
        ours = [set(_entries(_read(path), self.owner)) for path in (self.subuid, self.subgid)]
        return tuple(sorted(ours[0] & ours[1]))

    def register(self, count: int, first: int | None = None) -> tuple[IdRange, ...]:
        """See to it that the pool has this many ids, and return its ranges; a larger pool stays as it is.

        `first` asks for a place, and counts only where nothing is registered yet.
        """
        # The usual case, at each start of the daemon: nothing to do, so no lock to wait for.
        present = [set(_entries(_read(path), self.owner)) for path in (self.subuid, self.subgid)]
        if present[0] == present[1] and sum(entry.count for entry in present[0]) >= count:
            return tuple(sorted(present[0]))
        with self._locked("register"):
            texts = [_read(self.subuid), _read(self.subgid)]
            ours = [set(_entries(text, self.owner)) for text in texts]
            pool = ours[0] | ours[1]
            self._check_halves(texts, ours)
            missing = count - sum(entry.count for entry in pool)
            if missing > 0:
                pool.add(self._free_block(texts, -(-missing // BLOCK) * BLOCK, first if not pool else None))
            for path, text, known in zip((self.subuid, self.subgid), texts, ours, strict=True):
                lines = "".join(f"{self.owner}:{new.first}:{new.count}\n" for new in sorted(pool - known))
                if lines:
                    _write(path, (text + "\n" if text and not text.endswith("\n") else text) + lines)
        return tuple(sorted(pool))

    def unregister(self) -> None:
        """Take the owner's lines out of both files and leave all others as they are."""
        with self._locked("unregister"):
            for path in (self.subuid, self.subgid):
                text = _read(path)
                kept = "".join(line for line in text.splitlines(True) if _owner(line) != self.owner)
                if kept != text:
                    _write(path, kept)

    def template_block(self) -> IdRange:
        """Return the block that no container gets: templates are unpacked and built with it."""
        last = max(self._registered())
        return IdRange(last.end - BLOCK, BLOCK)

    def allocate(self, used: Iterable[IdRange], count: int = BLOCK) -> IdRange:
        """Return a block that overlaps nothing that is used; the caller records it under the state lock."""
        if count <= 0 or count % BLOCK:
            raise ValueError(f"{count} ids are not whole blocks of {BLOCK}")
        pool = self._registered()
        first = first_fit(pool, [*used, self.template_block()], count)
        if first is None:
            blocks = sum(entry.count for entry in pool) // BLOCK
            raise NoSpace(
                f"cannot allocate {count} ids: the {blocks} blocks of {self.owner} are used up",
                hint="raise ids.count in host.toml, or destroy containers that are not needed",
            )
        return IdRange(first, count)

    def _registered(self) -> tuple[IdRange, ...]:
        pool = self.ranges()
        if not pool:
            raise SysctrError(
                f"cannot allocate ids: {self.owner} has none in {self.subuid} and {self.subgid}",
                hint="the daemon registers them when it starts; see its log",
            )
        return pool

    def _check_halves(self, texts: Sequence[str], ours: Sequence[set[IdRange]]) -> None:
        """Refuse to complete an entry that only one file has (a crash between the two) where it collides."""
        for path, text, missing in (
            (self.subuid, texts[0], ours[1] - ours[0]),
            (self.subgid, texts[1], ours[0] - ours[1]),
        ):
            for wanted in missing:
                for owner, entry in _all_entries(text):
                    if entry.overlaps(wanted):
                        raise Refused(
                            f"cannot register ids {wanted.first}-{wanted.end - 1} in {path}: "
                            f"{owner} has {entry.first}-{entry.end - 1}",
                            hint=f"give {self.owner} the same ranges in {self.subuid} and {self.subgid}",
                        )

    def _free_block(self, texts: Sequence[str], count: int, wanted: int | None) -> IdRange:
        taken = [named for text in texts for named in _all_entries(text)]
        for path in (self.passwd, self.group):
            taken += [(name, IdRange(number, 1)) for name, number in _accounts(_read(path))]
        if wanted is not None:
            block = IdRange(wanted, count)
            for owner, entry in taken:
                if entry.overlaps(block):
                    raise Refused(
                        f"cannot register ids {wanted}-{block.end - 1}: {owner} has {entry.first}",
                        hint="choose another ids.first in host.toml",
                    )
            if block.end > HIGHEST:
                raise NoSpace(f"cannot register ids {wanted}-{block.end - 1}: they pass {HIGHEST}")
            return block
        # On a multiple of the block, so that an id of the host shows in hex which one it is inside.
        lowest = -(-LOWEST // BLOCK) * BLOCK
        first = first_fit([IdRange(lowest, HIGHEST - lowest)], (entry for _, entry in taken), count)
        if first is None:
            raise NoSpace(
                f"cannot register {count} ids in {self.subuid}: no free range is large enough",
                hint="lower ids.count in host.toml",
            )
        return IdRange(first, count)

    @contextlib.contextmanager
    def _locked(self, verb: str) -> Iterator[None]:
        # Installations share these files, and no lock of one of them would keep off another: so the
        # directory's flock, and the lock files of useradd and its kin for those.
        paths = sorted({os.path.realpath(path) for path in (self.subuid, self.subgid)})
        try:
            with contextlib.ExitStack() as held:
                for directory in sorted({os.path.dirname(path) for path in paths}):
                    held.enter_context(files.locked(directory))
                for path in paths:
                    held.enter_context(_shadow_lock(path))
                yield
        except OSError as error:
            raise SysctrError(f"cannot {verb} ids in {self.subuid}: {error.strerror or error}") from error


@contextlib.contextmanager
def _shadow_lock(path: str) -> Iterator[None]:
    """Hold the lock of shadow's tools: `PATH.lock`, a hard link of a file with our pid (lib/commonio.c)."""
    lock = f"{path}.lock"
    own = f"{path}.{os.getpid()}.{secrets.token_hex(4)}"
    deadline_s = time.monotonic() + LOCK_TIMEOUT_S
    with open(own, "xb") as file:
        file.write(b"%d\0" % os.getpid())
    try:
        while True:
            try:
                os.link(own, lock)
                break
            except FileExistsError:
                holder = _lock_holder(lock)
            if holder is None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(lock)
            elif time.monotonic() > deadline_s:
                raise SysctrError(
                    f"cannot lock {path}: process {holder} holds {lock}", hint="wait for it, or end it"
                )
            else:
                time.sleep(0.02)
    finally:
        os.unlink(own)
    try:
        yield
    finally:
        os.unlink(lock)


def _lock_holder(lock: str) -> int | None:
    """Return the living process that holds a lock file; None where it died or let go."""
    try:
        with open(lock, "rb") as file:
            pid = int(file.read(32).rstrip(b"\0\n"))
        os.kill(pid, 0)
    except (FileNotFoundError, ValueError, ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    return pid


def _read(path: str) -> str:
    try:
        data, _ = files.read_bounded(path, _LARGEST_FILE_BYTES)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise SysctrError(f"cannot read {path}: {error.strerror or error}") from error
    # Bytes that are no UTF-8 belong to somebody else's line, and go back as they came.
    return data.decode("utf-8", "surrogateescape")


def _write(path: str, text: str) -> None:
    path = os.path.realpath(path)
    mode = os.stat(path).st_mode & 0o777 if os.path.exists(path) else 0o644
    files.write_atomically(path, text.encode("utf-8", "surrogateescape"), mode)


def _owner(line: str) -> str:
    return line.partition(":")[0]


def _all_entries(text: str) -> Iterator[tuple[str, IdRange]]:
    """Read the lines that are entries; shadow too ignores what is none."""
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) == 3 and all(_is_number(field) for field in fields[1:]):
            yield fields[0], IdRange(int(fields[1]), int(fields[2]))


def _entries(text: str, owner: str) -> Iterator[IdRange]:
    return (entry for name, entry in _all_entries(text) if name == owner and entry.count)


def _accounts(text: str) -> Iterator[tuple[str, int]]:
    """Read names and ids of /etc/passwd or /etc/group."""
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) >= 3 and _is_number(fields[2]):
            yield fields[0], int(fields[2])


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10
