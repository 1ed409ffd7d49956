"""The archives in backup directories: what they are called, what lies beside them, and which are pruned.

vzdump-lxc-101-2026_01_31-12_00_00.tar.zst            an archive, its name in local time
vzdump-lxc-101-2026_01_31-12_00_00.tar.zst.notes      what somebody wrote about it
vzdump-lxc-101-2026_01_31-12_00_00.tar.zst.protected  it must not be removed, whatever this holds
vzdump-lxc-101-2026_01_31-12_00_00.log                how it was made

The names are those of Proxmox VE, so that both can share a directory. One that is being written ends in .dat
and is none. A directory is its administrator's, but who else writes there is unknown: every name is looked up
below a descriptor of the directory, no link is followed, and nothing but regular files is touched.
"""

import contextlib
import datetime
import errno
import os
import re
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sysctr.config import values
from sysctr.config.backup import BackupSettings
from sysctr.engine.retention import kept
from sysctr.errors import NoSpace, NotFound, Refused, SysctrError, UsageError
from sysctr.linux import files
from sysctr.paths import Layout
from sysctr.storage import tree

SUFFIXES = {"none": ".tar", "gzip": ".tar.gz", "lzo": ".tar.lzo", "zstd": ".tar.zst"}
PARTIAL = ".dat"
NOTES = ".notes"
PROTECTED = ".protected"
LOG = ".log"
NOTES_LIMIT_BYTES = 64 << 10
_SHOWN_NOTES = 200

_COMPRESSED = {
    ".tar": "none", ".tar.gz": "gzip", ".tgz": "gzip", ".tar.lzo": "lzo", ".tar.zst": "zstd",
    ".tar.bz2": "bzip2", ".tar.xz": "xz", ".txz": "xz",
}  # fmt: skip
_STANDARD = re.compile(
    r"vzdump-(?P<type>lxc|openvz)-(?P<number>[1-9][0-9]{2,8})-"
    r"([0-9]{4})_([0-9]{2})_([0-9]{2})-([0-9]{2})_([0-9]{2})_([0-9]{2})"
    r"(?P<suffix>\.tgz|\.tar(?:\.(?:gz|lzo|zst|bz2))?)"
)
_ANY = re.compile(r"[^.].*?(?P<suffix>\.tgz|\.txz|\.tar(?:\.(?:gz|lzo|zst|bz2|xz))?)", re.DOTALL)
# Those of virtual machines may lie in the same directory, and are nothing to us.
_FOREIGN = "vzdump-qemu-"

# Between the look whether an archive is protected and its removal nobody may protect it.
_changing = threading.Lock()


@dataclass(frozen=True)
class Name:
    """What the name of an archive says; `type` and `time` are empty for one that somebody renamed."""

    type: str
    number: int | None
    time: float | None
    suffix: str

    @property
    def compress(self) -> str:
        """Return what it is compressed with, as far as the name tells."""
        return _COMPRESSED[self.suffix]


@dataclass(frozen=True)
class Archive:
    """An archive as it lies in its directory."""

    directory: str
    name: str
    type: str
    number: int | None
    time: float  # of one that was renamed: when the file was changed last
    size_bytes: int
    compress: str
    protected: bool
    notes: str  # in a list only their beginning

    @property
    def path(self) -> str:
        """Return the absolute path."""
        return os.path.join(self.directory, self.name)

    @property
    def renamed(self) -> bool:
        """Tell whether the name does not say whose it is; such a one is never pruned."""
        return not self.type

    def as_dict(self) -> dict[str, object]:
        """Return it as the API sends it."""
        return {
            "path": self.path, "name": self.name, "directory": self.directory, "type": self.type or None,
            "container": self.number, "time": round(self.time, 3), "size_bytes": self.size_bytes,
            "compress": self.compress, "protected": self.protected, "renamed": self.renamed,
            "notes": self.notes,
        }  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What pruning does with one archive: keep, remove, protected or renamed; `error` says what failed."""

    archive: Archive
    mark: str
    error: str = ""


def make_name(number: int, time_s: float, compress: str) -> str:
    """Return the name of an archive of a container, in local time; while it is written, PARTIAL follows.

    >>> make_name(101, time.mktime((2026, 1, 31, 12, 0, 0, 0, 0, -1)), "zstd")
    'vzdump-lxc-101-2026_01_31-12_00_00.tar.zst'
    """
    written = time.strftime("%Y_%m_%d-%H_%M_%S", time.localtime(time_s))
    return f"vzdump-lxc-{number}-{written}{SUFFIXES[compress]}"


def parse_name(name: str) -> Name | None:
    """Return what a file's name says, None for one that is no archive's.

    >>> parse_name("vzdump-lxc-101-2026_01_31-12_00_00.tar.gz").number
    101
    >>> parse_name("web.tar.gz"), parse_name("web.tar.gz.dat")
    (Name(type='', number=None, time=None, suffix='.tar.gz'), None)
    """
    match = _STANDARD.fullmatch(name)
    if match is not None and (made := _moment([int(part) for part in match.groups()[2:8]])) is not None:
        return Name(match["type"], int(match["number"]), made, match["suffix"])
    match = _ANY.fullmatch(name)
    if match is None or name.startswith(_FOREIGN):
        return None
    return Name("", None, None, match["suffix"])


def log_name(name: str) -> str:
    """Return the name of the log beside an archive.

    >>> log_name("vzdump-lxc-101-2026_01_31-12_00_00.tar.zst")
    'vzdump-lxc-101-2026_01_31-12_00_00.log'
    """
    parsed = parse_name(name)
    assert parsed is not None, f"{name} is no archive"
    return f"{name.removesuffix(parsed.suffix)}{LOG}"


def judge(archives: Iterable[Archive], rules: Mapping[str, int]) -> list[Verdict]:
    """Return what the keep rules mean for each of the archives, in their order.

    The rules hold for each type and number by itself. What is protected or was renamed stays, and counts
    for no rule.
    """
    archives = list(archives)
    marks: dict[str, str] = {}
    groups: dict[tuple[str, int | None], list[Archive]] = {}
    for one in archives:
        if one.renamed or one.protected:
            marks[one.path] = "renamed" if one.renamed else "protected"
        else:
            groups.setdefault((one.type, one.number), []).append(one)
    for group in groups.values():
        group.sort(key=lambda one: (one.time, one.name), reverse=True)
        for one, stays in zip(group, kept([one.time for one in group], rules), strict=True):
            marks[one.path] = "keep" if stays else "remove"
    return [Verdict(one, marks[one.path]) for one in archives]


def refuse_protected(archive: Archive) -> None:
    """Raise Refused for an archive that may not be removed."""
    if archive.protected:
        raise Refused(
            f"cannot remove {values.shown(archive.name)[1:-1]}: it is protected",
            f"`sysctr backup protect --off {archive.path}` first",
        )


class Directory:
    """A backup directory that is open; `opened` gives one."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd

    def list(self) -> list[Archive]:
        """Return every archive in it: by type, number and time, those that were renamed last."""
        return self._list(self._names())

    def _names(self) -> "set[str]":
        with os.scandir(self._fd) as entries:
            return {entry.name for entry in entries}

    def _list(self, names: "set[str]") -> "list[Archive]":
        found = []
        for name in names:
            # One look at each file; its neighbours are known by their names already.
            archive = self._look(name, names)
            if archive is not None:
                found.append(archive)
        found.sort(key=lambda one: (one.renamed, one.type, one.number or 0, one.time, one.name))
        return found

    def get(self, name: str) -> Archive:
        """Return one archive with all of its notes; NotFound where there is none of this name."""
        archive = self._look(name, None)
        if archive is None:
            raise NotFound(
                f"cannot find archive {values.shown(name)[1:-1]}: there is none in {self.path}",
                "`sysctr backups` lists them",
            )
        return archive

    def open(self, name: str) -> int:
        """Return a descriptor to read an archive; NotFound where there is none of this name."""
        self.get(name)
        with _saying(f"read archive {name}", self.path):
            return self._open_regular(name)

    def read_log(self, name: str, most_bytes: int = 1 << 20) -> bytes:
        """Return the end of the log beside an archive; nothing where there is none."""
        try:
            log_fd = self._open_regular(log_name(name))
        except OSError:
            return b""
        with open(log_fd, "rb") as file:
            file.seek(max(0, os.fstat(log_fd).st_size - most_bytes))
            return file.read(most_bytes)

    def remove(self, name: str) -> Archive:
        """Remove an archive with what lies beside it; Refused for one that is protected."""
        with _changing:
            archive = self.get(name)
            refuse_protected(archive)
            self._remove(archive, self._names())
        return archive

    def protect(self, name: str, protected: bool) -> Archive:
        """Protect an archive from being removed and pruned, or no longer."""
        doing = f"{'protect' if protected else 'unprotect'} {values.shown(name)[1:-1]}"
        mark = f"{name}{PROTECTED}"
        with _changing, _saying(doing, self.path):
            archive = self.get(name)
            if protected and not archive.protected:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                os.close(os.open(mark, flags, 0o600, dir_fd=self._fd))
            elif archive.protected and not protected:
                os.unlink(mark, dir_fd=self._fd)
            files.sync_directory(self._own)
        return self.get(name)

    def set_notes(self, name: str, text: str) -> Archive:
        """Write down something about an archive; nothing removes what was written."""
        doing = f"note something on {values.shown(name)[1:-1]}"
        data = text.encode("utf-8", "surrogateescape")
        if len(data) > NOTES_LIMIT_BYTES:
            raise UsageError(f"cannot {doing}: the text has more than {NOTES_LIMIT_BYTES >> 10} KiB")
        with _changing, _saying(doing, self.path):
            self.get(name)
            if data:
                # A link in its place is replaced and not followed.
                files.write_atomically(f"{self._own}/{name}{NOTES}", data)
            else:
                self._unlink(f"{name}{NOTES}")
        return self.get(name)

    def prune(
        self, rules: Mapping[str, int], numbers: Iterable[int] | None = None, *, dry_run: bool = False
    ) -> "list[Verdict]":
        """Remove what the rules do not keep, of these containers or of all; returns what became of each.

        One that cannot be removed does not keep the others.
        """
        wanted = None if numbers is None else set(numbers)
        with _changing:
            names = self._names()
            archives = [one for one in self._list(names) if wanted is None or one.number in wanted]
            verdicts = judge(archives, rules)
            if dry_run:
                return verdicts
            return [self._carry_out(one, names) if one.mark == "remove" else one for one in verdicts]

    def _carry_out(self, verdict: Verdict, names: "set[str]") -> Verdict:
        # Another host that has this directory too may have protected it a moment ago.
        if self._exists(f"{verdict.archive.name}{PROTECTED}"):
            return Verdict(verdict.archive, "protected")
        try:
            self._remove(verdict.archive, names)
            names.discard(verdict.archive.name)
        except SysctrError as error:
            return Verdict(verdict.archive, verdict.mark, error.message)
        return verdict

    def _remove(self, archive: Archive, names: "set[str]") -> None:
        name = archive.name
        with _saying(f"remove {values.shown(name)[1:-1]}", self.path):
            # First the archive: without it the rest is nothing, and it may be what cannot be removed.
            self._unlink(name)
            self._unlink(f"{name}{NOTES}")
            if not archive.renamed:
                base = log_name(name).removesuffix(LOG)
                twins = {f"{base}{suffix}" for suffix in _COMPRESSED} - {name}
                if not twins & names:
                    self._unlink(f"{base}{LOG}")

    def _look(self, name: str, names: "set[str] | None") -> Archive | None:
        """Return the archive of that name; `names`, where given, are all in the directory."""
        parsed = None if "/" in name or "\0" in name else parse_name(name)
        if parsed is None:
            return None
        try:
            state = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return None
            raise _explained(error, f"look at {values.shown(name)[1:-1]}", self.path) from error
        if not stat.S_ISREG(state.st_mode):
            return None
        notes = ""
        if names is None:
            notes = self._read_notes(name)
        elif f"{name}{NOTES}" in names:
            notes = self._read_notes(name).strip().partition("\n")[0][:_SHOWN_NOTES]
        mark = f"{name}{PROTECTED}"
        return Archive(
            directory=self.path, name=name, type=parsed.type, number=parsed.number,
            time=state.st_mtime if parsed.time is None else parsed.time, size_bytes=state.st_size,
            compress=parsed.compress, protected=self._exists(mark) if names is None else mark in names,
            notes=notes,
        )  # fmt: skip

    def _read_notes(self, name: str) -> str:
        try:
            notes_fd = self._open_regular(f"{name}{NOTES}")
        except OSError:
            return ""
        with open(notes_fd, "rb") as file:
            return file.read(NOTES_LIMIT_BYTES).decode("utf-8", "replace")

    def _open_regular(self, name: str) -> int:
        """Return a descriptor of a regular file; OSError for anything else, which is not waited for."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        file_fd = os.open(name, flags, dir_fd=self._fd)
        if not stat.S_ISREG(os.fstat(file_fd).st_mode):
            os.close(file_fd)
            raise OSError(errno.EINVAL, "not a regular file", name)
        return file_fd

    def _exists(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            # Where its name would be too long there is none. Whatever else hides it: better it stays.
            return error.errno != errno.ENAMETOOLONG
        return True

    def _unlink(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            # The archive's own name leaves no room for what would lie beside it.
            if error.errno != errno.ENAMETOOLONG:
                raise

    @property
    def _own(self) -> str:
        # A path to what is open, whatever its own path leads to meanwhile.
        return f"/proc/self/fd/{self._fd}"


@contextlib.contextmanager
def opened(path: str) -> Iterator[Directory]:
    """Open a backup directory; NotFound where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"cannot open the backup directory {path}: it does not exist") from error
    except NotADirectoryError as error:
        raise UsageError(f"cannot open the backup directory {path}: it is no directory") from error
    except OSError as error:
        raise _explained(error, f"open the backup directory {path}", path) from error
    try:
        with _saying(f"read the backup directory {path}", path):
            yield Directory(path, fd)
    finally:
        os.close(fd)


def own_directory(where: Layout, settings: BackupSettings) -> str:
    """Return the directory that archives go to where nobody names another."""
    return settings.directory or where.backups


def prepare(where: Layout, path: str) -> None:
    """Make the directory that every host has, closed to all but root; any other one has to be there."""
    # What an administrator named may be a mount point whose file system is not there at the moment.
    if path == where.backups:
        tree.ensure_directory(path)


class Catalog:
    """All archives that this host knows of: those of its backup directory, and of others."""

    def __init__(self, directories: Sequence[str]) -> None:
        self.directories = tuple(dict.fromkeys(directories))

    def list(self) -> tuple[list[Archive], list[str]]:
        """Return all archives, and why a directory could not be read; one that is to be made has none."""
        found: list[Archive] = []
        problems = []
        for path in self.directories:
            try:
                with opened(path) as directory:
                    found += directory.list()
            except NotFound as error:
                # The first one is made with the first backup.
                if path != self.directories[0]:
                    problems.append(error.message)
            except SysctrError as error:
                problems.append(error.message)
        return found, problems

    @contextlib.contextmanager
    def find(self, ref: str) -> Iterator[tuple[Directory, str]]:
        """Open the directory of an archive that is called by its path, or by its name alone.

        Raises NotFound, and UsageError where several directories have one of that name.
        """
        path, slash, name = ref.rpartition("/")
        if slash:
            if not ref.startswith("/") or "\0" in ref:
                raise UsageError(f"cannot find archive {values.shown(ref)}: it is no absolute path")
        else:
            path, name = self._directory_of(name), ref
        with opened(path or "/") as directory:
            directory.get(name)
            yield directory, name

    def _directory_of(self, name: str) -> str:
        having = []
        for path in self.directories:
            with contextlib.suppress(SysctrError), opened(path) as directory:
                directory.get(name)
                having.append(path)
        if len(having) == 1:
            return having[0]
        shown = values.shown(name)[1:-1]
        if having:
            raise UsageError(
                f"cannot tell which {shown} is meant: {' and '.join(having)} have one", "give its path"
            )
        raise NotFound(
            f"cannot find archive {shown}: there is none in {' and '.join(self.directories)}",
            "`sysctr backups` lists them; one in another directory is named by its path",
        )


def _moment(fields: "list[int]") -> float | None:
    """Return the local time of year, month, day, hour, minute, second; None where there is no such day."""
    try:
        datetime.datetime(*fields)  # type: ignore[arg-type]
        return time.mktime((*fields, 0, 0, -1))  # type: ignore[arg-type]
    except (ValueError, OverflowError):
        return None


def _explained(error: OSError, doing: str, path: str) -> SysctrError:
    reason = (error.strerror or str(error)).lower()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"cannot {doing}: no space left on {path}", f"see `df {path}`")
    if error.errno == errno.EROFS:
        return Refused(f"cannot {doing}: {path} is read-only")
    return SysctrError(f"cannot {doing}: {reason}")


@contextlib.contextmanager
def _saying(doing: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _explained(error, doing, path) from error
