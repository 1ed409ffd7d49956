"""The containers of a host on disk: configurations, records, and who may have which number and name.

etc/containers/101.toml        what the administrator wants; edited by hand at any time
lib/containers/101/record.json what sysctr knows of it beyond that
lib/containers/101/idmap       its block of host ids again, for when the record is damaged
lib/containers/.reserved/101   held while a container is created or removed: not listed meanwhile, and where
                               its holder died, known by the flock that nobody holds any more

What hands out numbers, names and ids, or takes them back, holds the state lock; readers need none.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sysctr.config import toml, values
from sysctr.config.schema import Container, parse_config
from sysctr.engine.ids import BLOCK, IdPool, IdRange
from sysctr.engine.record import Record, Saved, format_record, parse_record
from sysctr.errors import ConfigError, NoSpace, NotFound, SysctrError, UsageError, WrongState
from sysctr.linux import files
from sysctr.paths import Layout

_LARGEST_RECORD_BYTES = 1024 * 1024
# Two writes within one tick of the file system's clock may look alike, so what is so young is not remembered.
_TICK_NS = 20_000_000

Signature = tuple[int, int, int]


@dataclass(frozen=True)
class Reservation:
    """A number and a name that a creation or a removal holds."""

    id: int
    name: str


class Store:
    """The containers of one installation. Safe for threads, and for several processes at once."""

    def __init__(self, layout: Layout, pool: IdPool | None = None) -> None:
        self.layout = layout
        self.pool = pool or IdPool(layout.subid_owner)
        self._reserved = f"{layout.containers}/.reserved"
        # The descriptors that hold our own reservations; a dead process's are closed, which tells.
        self._held: dict[int, int] = {}
        self._configs: dict[int, tuple[Signature, str, Container | None, str]] = {}
        self._saved: dict[int, tuple[Signature, Saved]] = {}
        # Told of every container whose record or configuration was written, when no lock is held any more.
        self.on_saved: Callable[[int], None] = lambda number: None
        with _saying("make the state directories"):
            for path in (layout.container_configs, layout.containers, self._reserved):
                os.makedirs(path, 0o700, exist_ok=True)
            for path in (layout.container_configs, layout.containers):
                files.remove_unfinished(path)

    def close(self) -> None:
        """Let go of all reservations, as the end of the process does; they are stale then."""
        while self._held:
            os.close(self._held.popitem()[1])

    def list(self) -> tuple[Record, ...]:
        """Return all containers by number; a damaged one is among them and says so in `error`."""
        reserved = _numbers(self._reserved)
        numbers = self._present() - reserved
        records = [record for number in sorted(numbers) if (record := self._read(number))]
        return self._settle_names(records)

    def load(self, number: int) -> Record:
        """Return one container, or raise NotFound."""
        record = None if os.path.lexists(self._mark(number)) else self._read(number)
        if record is None:
            raise NotFound(
                f"cannot find container {number}: there is none of this number",
                hint="`sysctr list` shows what there is",
            )
        if self._renamed_by_hand(record):
            return next((other for other in self.list() if other.id == number), record)
        return record

    def find(self, ref: str | int) -> Record:
        """Return the container of a number or a name."""
        try:
            wanted = ref if isinstance(ref, int) else values.parse_ref(ref)
        except ConfigError as error:
            raise UsageError(f"cannot find a container: {error.message}") from error
        if isinstance(wanted, int):
            return self.load(wanted)
        found = [record for record in self.list() if record.name == wanted]
        if not found:
            raise NotFound(
                f"cannot find container {wanted}: there is none of this name",
                hint="`sysctr list` shows what there is",
            )
        if len(found) > 1:
            numbers = " and ".join(str(record.id) for record in found)
            raise UsageError(f"cannot tell which container is {wanted}: {numbers} have this name")
        return found[0]

    def next_id(self) -> int:
        """Return the lowest free number; only a reservation keeps it free."""
        taken = self._present() | _numbers(self._reserved)
        for number in range(values.FIRST_CONTAINER_ID, values.LAST_CONTAINER_ID + 1):
            if number not in taken:
                return number
        raise NoSpace(f"cannot create a container: all numbers up to {values.LAST_CONTAINER_ID} are taken")

    def reserve(self, name: str, wanted_id: int | None = None) -> int:
        """Take a number and a name for a container to be created; `create` or `release` ends it."""
        values.parse_name(name)
        with self._locked("reserve a number"):
            self._refuse_name(name)
            if wanted_id is None:
                number = self.next_id()
            else:
                number = values.check_container_id(wanted_id)
                if number in self._present() | _numbers(self._reserved):
                    raise WrongState(f"cannot create {number}: the number is taken")
            self._hold(number, name)
            try:
                os.mkdir(self.layout.container_dir(number), 0o700)
            except OSError:
                self._let_go(number)
                raise
        return number

    def allocate_ids(self, number: int, count: int = BLOCK) -> IdRange:
        """Give a reserved container its block of host ids; it has it until it is released or deleted."""
        with self._locked("allocate ids"):
            block = self.pool.allocate(self._used_ids(number), count)
            # Before anything uses the block; not synced, because a host that crashes keeps no reservation.
            with open(f"{self.layout.container_dir(number)}/idmap", "w", encoding="ascii") as file:
                file.write(f"{block.first} {block.count}\n")
        return block

    def create(self, record: Record) -> None:
        """Turn a reservation into a container: from now on it is listed."""
        if record.id not in self._held:
            raise ValueError(f"{record.id} is not reserved here")
        with self._locked(f"create {record.id}"):
            self._refuse_name(record.name, record.id)
            self._write_record(record)
            self._write_config(record.id, record.config_text)
            self._let_go(record.id)
        self.on_saved(record.id)

    def restore(self, saved: Saved, text: str, *, dry_run: bool = False) -> "list[str]":
        """Write what is missing of a container that only its volume remembers; return what that is.

        What exists is not changed. It keeps its block of ids unless another has got that meanwhile.
        """
        number, path = saved.id, f"{self.layout.container_dir(saved.id)}/record.json"
        with self._locked(f"recover {number}"):
            has_record = os.path.lexists(path)
            has_config = os.path.lexists(self.layout.container_config(number))
            missing = [name for name, there in (("record", has_record), ("config", has_config)) if not there]
            if missing and not dry_run:
                self._refuse_name(parse_config(toml.read_container(text)).name, number)
                os.makedirs(self.layout.container_dir(number), 0o700, exist_ok=True)
                if not has_config:
                    self._write_config(number, text)
                if not has_record:
                    self._write_record(self._with_free_ids(saved))
        return missing

    def release(self, number: int) -> None:
        """Undo a reservation, ours or a stale one, with all that was recorded under it."""
        with self._locked(f"release {number}"):
            if number not in self._held and not self._take_over(number):
                raise WrongState(f"cannot release {number}: it is not reserved, or by another process")
            self._remove(number)

    def stale_reservations(self, but: frozenset[int] = frozenset()) -> tuple[Reservation, ...]:
        """Return what creations and removals hold whose process died; `release` takes each back.

        Those in `but` are somebody's to `adopt`.
        """
        stale = []
        with self._locked("read the reservations"):
            for number in sorted(_numbers(self._reserved) - set(self._held) - but):
                if self._take_over(number):
                    stale.append(Reservation(number, self._reserved_name(number)))
                    os.close(self._held.pop(number))
        return tuple(stale)

    def adopt(self, number: int) -> bool:
        """Hold a reservation whose process died, with all that was made under it; False for none."""
        with self._locked(f"adopt {number}"):
            return number in self._held or self._take_over(number)

    def delete(self, number: int) -> None:
        """Forget a container, damaged or not, and free its number, name and ids."""
        with self._locked(f"delete {number}"):
            record = self.load(number)
            # Hidden first, so that nobody lists half of it, and a crash leaves a stale reservation. A full
            # disk may refuse that; deleting must work there too.
            with contextlib.suppress(OSError):
                self._hold(number, record.name)
            try:
                self._remove(number)
            except OSError:
                # What is left of it is listed again, and can be deleted again.
                self._let_go(number)
                raise

    def update(self, number: int, **changes: Any) -> Record:
        """Change fields of a container's record, and lose no change that another thread makes meanwhile."""
        with self._locked(f"save {number}"):
            record = self.load(number)
            if record.damaged:
                record.usable("change")
            record = replace(record, **changes)
            self._write_record(record)
        self.on_saved(number)
        return record

    def save_config(self, number: int, text: str, digest: str | None = None) -> Record:
        """Replace a container's configuration by a text that holds, if it is still the one of the digest."""
        config = parse_config(toml.read_container(text))
        with self._locked(f"change {number}"):
            record = self.load(number)
            if digest is not None and digest != record.digest:
                raise WrongState(
                    f"cannot change {number}: its configuration was changed meanwhile", hint="try again"
                )
            if config.name != record.name or record.error:
                self._refuse_name(config.name, number)
            self._write_config(number, text)
            saved = self._saved_record(number)
            if saved and saved.name != config.name:
                self._write_record(replace(saved, name=config.name))
        self.on_saved(number)
        return self.load(number)

    def reserved(self) -> "set[int]":
        """Return the numbers that creations and removals hold."""
        return _numbers(self._reserved)

    @contextlib.contextmanager
    def _locked(self, action: str) -> Iterator[None]:
        with _saying(action), files.locked(self.layout.state_lock):
            yield

    def _present(self) -> set[int]:
        return _numbers(self.layout.containers) | _numbers(self.layout.container_configs, ".toml")

    def _mark(self, number: int) -> str:
        return f"{self._reserved}/{number}"

    def _hold(self, number: int, name: str) -> None:
        mark_fd = os.open(self._mark(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(mark_fd, fcntl.LOCK_EX)
            os.write(mark_fd, name.encode())
            # The mark is the journal of a creation: it is on disk before anything it answers for.
            os.fsync(mark_fd)
            files.sync_directory(self._reserved)
        except OSError:
            os.unlink(self._mark(number))
            os.close(mark_fd)
            raise
        self._held[number] = mark_fd

    def _take_over(self, number: int) -> bool:
        """Hold a reservation whose holder is gone; False where it lives or there is none."""
        try:
            mark_fd = os.open(self._mark(number), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(mark_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(mark_fd)
            return False
        self._held[number] = mark_fd
        return True

    def _let_go(self, number: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._mark(number))
        held_fd = self._held.pop(number, None)
        if held_fd is not None:
            os.close(held_fd)

    def _reserved_name(self, number: int) -> str:
        try:
            data, _ = files.read_bounded(self._mark(number), 255)
        except OSError:
            return ""
        return data.decode("utf-8", "replace")

    def _refuse_name(self, name: str, own: int | None = None) -> None:
        for record in self.list():
            if name in (record.name, record.config.name if record.config else "") and record.id != own:
                raise WrongState(f"cannot use the name {name}: container {record.id} has it")
        for number in _numbers(self._reserved) - {own}:
            if self._reserved_name(number) == name:
                raise WrongState(f"cannot use the name {name}: container {number}, in the making, has it")

    def _used_ids(self, but: int) -> Iterator[IdRange]:
        for number in _numbers(self.layout.containers) - {but}:
            saved = self._saved_record(number)
            if saved:
                yield IdRange(saved.idmap_first, saved.idmap_count)
            elif block := self._noted_ids(number):
                yield block

    def _with_free_ids(self, saved: Saved) -> Saved:
        own = IdRange(saved.idmap_first, saved.idmap_count)
        used = [*self._used_ids(saved.id)]
        inside = any(r.first <= own.first and own.end <= r.end for r in self.pool.ranges())
        if not inside or any(own.overlaps(other) for other in used):
            own = self.pool.allocate(used, saved.idmap_count)
        with open(f"{self.layout.container_dir(saved.id)}/idmap", "w", encoding="ascii") as file:
            file.write(f"{own.first} {own.count}\n")
        return replace(saved, idmap_first=own.first)

    def _noted_ids(self, number: int) -> IdRange | None:
        try:
            data, _ = files.read_bounded(f"{self.layout.container_dir(number)}/idmap", 64)
            first, count = data.split()
            return IdRange(int(first), int(count))
        except (OSError, ValueError):
            return None

    def _remove(self, number: int) -> None:
        """Remove what is recorded of a container: its ids late, the mark last."""
        directory = self.layout.container_dir(number)
        _remove_tree(self.layout.container_config(number))
        for entry in os.scandir(directory) if os.path.isdir(directory) else ():
            if entry.name not in ("record.json", "idmap"):
                _remove_tree(entry.path)
        _remove_tree(directory)
        self._configs.pop(number, None)
        self._saved.pop(number, None)
        self._let_go(number)

    def _write_record(self, record: Saved) -> None:
        files.write_atomically(f"{self.layout.container_dir(record.id)}/record.json", format_record(record))
        self._saved.pop(record.id, None)

    def _write_config(self, number: int, text: str) -> None:
        files.write_atomically(self.layout.container_config(number), text.encode())
        self._configs.pop(number, None)

    def _renamed_by_hand(self, record: Record) -> bool:
        saved = self._saved_record(record.id)
        return saved is not None and saved.name != record.name

    def _settle_names(self, records: Sequence[Record]) -> tuple[Record, ...]:
        """Mark those whose name, edited by hand, is another's: nobody could tell which one is meant."""
        counts = Counter(record.name for record in records)
        settled = []
        for record in records:
            if counts[record.name] > 1 and not record.error and self._renamed_by_hand(record):
                error = f"{self.layout.container_config(record.id)}: the name {record.name} is another's"
                settled.append(replace(record, error=error))
            else:
                settled.append(record)
        return tuple(settled)

    def _read(self, number: int) -> Record | None:
        """Return a container, whole or damaged; None where there is nothing of it, or it is being removed."""
        text, config, error = self._config(number)
        try:
            saved = self._saved_record(number, strict=True)
        except ConfigError as damage:
            saved, error = None, "; ".join(filter(None, (error, damage.message)))
        if error and (number not in self._present() or os.path.lexists(self._mark(number))):
            return None
        if saved is None:
            # All that can be known; enough to list it and to destroy it.
            block = self._noted_ids(number) or IdRange(0, 0)
            name = config.name if config else ""
            saved = Saved(number, "", name, 0.0, block.first, block.count, volume=str(number))
        values_of = dict(vars(saved))
        if config:
            values_of["name"] = config.name
        return Record(**values_of, config=config, config_text=text, error=error)

    def _config(self, number: int) -> tuple[str, Container | None, str]:
        """Return text, configuration and what is wrong with it."""
        path = self.layout.container_config(number)
        try:
            signature = _signature(os.stat(path))
            cached = self._configs.get(number)
            if cached and cached[0] == signature:
                return cached[1:]
            data, state = files.read_bounded(path, toml.LONGEST_FILE_BYTES)
        except FileNotFoundError:
            return "", None, f"{path} is missing"
        except OSError as error:
            return "", None, f"cannot read {path}: {error.strerror or error}"
        text, config, wrong = data.decode("utf-8", "surrogateescape"), None, ""
        try:
            config = parse_config(toml.read_container(data.decode()))
        except UnicodeDecodeError:
            wrong = f"{path} is not UTF-8"
        except ConfigError as error:
            wrong = f"{path}: {error.message}"
        self._remember(self._configs, number, state, (text, config, wrong))
        return text, config, wrong

    def _saved_record(self, number: int, *, strict: bool = False) -> Saved | None:
        """Return what the record holds; None, or ConfigError if strict, where it is damaged or missing."""
        path = f"{self.layout.container_dir(number)}/record.json"
        try:
            signature = _signature(os.stat(path))
            cached = self._saved.get(number)
            if cached and cached[0] == signature:
                return cached[1]
            data, state = files.read_bounded(path, _LARGEST_RECORD_BYTES)
            saved = parse_record(number, data)
        except OSError as error:
            if strict:
                raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
            return None
        except ConfigError as error:
            if strict:
                raise ConfigError(f"{path}: {error.message}") from error
            return None
        self._remember(self._saved, number, state, (saved,))
        return saved

    @staticmethod
    def _remember(cache: dict, number: int, state: os.stat_result, entry: tuple) -> None:
        if time.time_ns() - state.st_mtime_ns > _TICK_NS:
            cache[number] = (_signature(state), *entry)


def _signature(state: os.stat_result) -> Signature:
    return state.st_mtime_ns, state.st_size, state.st_ino


def _numbers(directory: str, suffix: str = "") -> set[int]:
    """Return the container numbers that a directory's entries are named after."""
    names = [name.removesuffix(suffix) for name in os.listdir(directory) if name.endswith(suffix)]
    numbers = {int(name) for name in names if name.isascii() and name.isdigit() and name[0] != "0"}
    return {n for n in numbers if values.FIRST_CONTAINER_ID <= n <= values.LAST_CONTAINER_ID}


def _remove_tree(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


@contextlib.contextmanager
def _saying(action: str) -> Iterator[None]:
    """Turn what the file system refuses into an error that says what was being done."""
    try:
        yield
    except OSError as error:
        kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else SysctrError
        raise kind(f"cannot {action}: {error.strerror or error}") from error
