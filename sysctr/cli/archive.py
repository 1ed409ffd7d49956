"""Tar streams for push and pull: packing what is ours, and unpacking what a container sent.

What comes out of a container is hostile. It is unpacked below one directory by descriptors that never follow
a link, and links are made last, as they are: none is written through, wherever it leads. Devices are left
out, names that climb are refused, setuid bits are dropped.
"""

import contextlib
import os
import stat
import tarfile

from sysctr import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import IO, Any, BinaryIO

BUFFER_BYTES = 1024 * 1024
# Long names and pax headers are read into memory whole; a real one has some kilobytes.
HEADER_LIMIT_BYTES = 1024 * 1024
ENTRIES_LIMIT = 10_000_000
# tarfile meets the end of a whole archive a few times: behind its last block, and when it is closed.
_ENDS_LIMIT = 8
_HEADER_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
# What tarfile raises over a stream that is none: its own errors, and those of the numbers in pax headers and
# of headers that stand before headers without end.
_BAD_STREAM = (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError)


class Owner:
    """The owner and mode that a copy gets instead of what the archive says; None keeps the default."""

    def __init__(self, uid: "int | None" = None, gid: "int | None" = None, mode: "int | None" = None) -> None:
        self.uid = uid
        self.gid = gid
        self.mode = mode


def pack(
    sources: "list[tuple[str, str]]", sink: "BinaryIO", owner: Owner, warn: "Callable[[str], None]"
) -> None:
    """Write a tar stream of (path, name in the archive), owned by root unless `owner` says otherwise."""

    def prepare(member: tarfile.TarInfo) -> "tarfile.TarInfo | None":
        if member.isdev():
            warn(f"skipped {member.name}: it is a device or a pipe")
            return None
        member.uid, member.gid = owner.uid or 0, owner.gid or 0
        member.uname = member.gname = ""
        if owner.mode is not None and member.isreg():
            member.mode = owner.mode
        return member

    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT, bufsize=BUFFER_BYTES) as archive:
        for source, name in sources:
            archive.add(source, arcname=name, filter=prepare)


class CheckedInfo(tarfile.TarInfo):
    """A member whose header cannot make us allocate without limit or go backwards in the stream."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _HEADER_TYPES and self.size > HEADER_LIMIT_BYTES:
            raise tarfile.ReadError("a header of the archive is too large")
        return super()._proc_member(archive)  # type: ignore[misc, no-any-return]

    def _block(self, count: int) -> int:
        # Before CPython 3.13.6 a negative size made tarfile read the same header again for ever.
        if count < 0:
            raise tarfile.ReadError("a member of the archive has a negative size")
        return super()._block(count)  # type: ignore[misc, no-any-return]


class _Ending:
    """A stream whose end is an error for who goes on reading.

    tarfile reads over the content of a member block by block, to the end of its size and not of the stream: a
    header that promises 10^30 bytes would keep it busy for ever.
    """

    def __init__(self, stream: "BinaryIO") -> None:
        self._stream = stream
        self._ends = 0

    def read(self, count: int) -> bytes:
        content = self._stream.read(count)
        self._ends += not content
        if self._ends > _ENDS_LIMIT:
            raise tarfile.ReadError("the stream ended early")
        return content


def _open(stream: "BinaryIO") -> tarfile.TarFile:
    source: Any = _Ending(stream)
    return tarfile.open(fileobj=source, mode="r|", tarinfo=CheckedInfo, bufsize=BUFFER_BYTES)


def unpack(
    stream: "BinaryIO",
    directory_fd: int,
    name: str,
    owner: Owner,
    warn: "Callable[[str], None]",
) -> None:
    """Unpack one tree as `name` in a directory; with `name` "" its content goes there itself."""
    extraction = _Extraction(directory_fd, name, owner, warn)
    try:
        with _open(stream) as archive:
            for member in archive:
                extraction.add(archive, member)
                # tarfile keeps every member for getmembers(); a stream of millions would fill the memory.
                archive.members = []  # type: ignore[attr-defined]
        extraction.make_links()
    except _BAD_STREAM as error:
        raise errors.SysctrError(f"cannot unpack what the container sent: {error}") from error
    finally:
        extraction.close()


def parts_of(name: str) -> "tuple[str, ...]":
    """Split the name of a member; one that is absolute or climbs is refused.

    >>> parts_of("./etc//hosts")
    ('etc', 'hosts')
    """
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise errors.Refused(f"cannot unpack {name}: the name leads out of the destination")
    return parts


class _Extraction:
    """One tree on its way to the disk."""

    def __init__(self, directory_fd: int, name: str, owner: Owner, warn: "Callable[[str], None]") -> None:
        self._root_fd = directory_fd
        self._name = name
        self._owner = owner
        self._warn = warn
        self._top = ""
        self._entries = 0
        self._files: set[tuple[str, ...]] = set()
        self._links: list[tuple[tuple[str, ...], str]] = []
        # The directory of the last member, because members of one directory follow each other.
        self._parent: tuple[tuple[str, ...], int] | None = None

    def close(self) -> None:
        if self._parent is not None:
            os.close(self._parent[1])
            self._parent = None

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self._entries += 1
        if self._entries > ENTRIES_LIMIT:
            raise errors.Refused(f"cannot unpack what came: it has more than {ENTRIES_LIMIT} entries")
        parts = self._placed(member.name)
        with _saying(parts):
            if member.isdir():
                self._make_directory(parts, member)
            elif member.isreg() and not member.issparse():
                self._make_file(parts, member, archive.extractfile(member))
            elif member.issym():
                self._note_link(parts, member.linkname)
            elif member.islnk():
                self._make_hard_link(parts, self._placed(member.linkname))
            else:
                self._warn(f"skipped {member.name}: neither file, directory nor link")

    def make_links(self) -> None:
        """Make the symbolic links, when nothing is left that could be written through them."""
        for parts, target in self._links:
            with _saying(parts):
                parent_fd = self._open_parent(parts)
                _make_room(parts[-1], parent_fd)
                os.symlink(target, parts[-1], dir_fd=parent_fd)
                self._chown(parts[-1], parent_fd)

    def _placed(self, name: str) -> "tuple[str, ...]":
        # The first component is the archive's name for the tree; the user decided what it is called here.
        parts = parts_of(name) or (".",)
        if not self._top:
            self._top = parts[0]
        if self._top != ".":
            if parts[0] != self._top:
                raise errors.Refused(f"cannot unpack {name}: it is not part of what was asked for")
            parts = parts[1:]
        elif parts == (".",):
            parts = ()
        return (self._name or ".", *parts)

    def _open_parent(self, parts: "tuple[str, ...]") -> int:
        wanted = parts[:-1]
        if self._parent is not None:
            if self._parent[0] == wanted:
                return self._parent[1]
            self.close()
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(".", flags, dir_fd=self._root_fd)
        for part in wanted:
            try:
                below_fd = os.open(part, flags, dir_fd=fd)
            except FileNotFoundError:
                os.mkdir(part, 0o755, dir_fd=fd)
                below_fd = os.open(part, flags, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below_fd
        self._parent = (wanted, fd)
        return fd

    def _note_link(self, parts: "tuple[str, ...]", target: str) -> None:
        if len(parts) == 1:
            # The sender follows a link that it is asked for. One in place of what the user named would lead
            # the next pull to the same place wherever the container wants it.
            raise errors.Refused(f"cannot unpack {parts[0]}: it is a link in place of what was asked for")
        if not target or "\0" in target:
            raise errors.Refused(f"cannot unpack {'/'.join(parts)}: a link to nowhere")
        self._links.append((parts, target))

    def _make_directory(self, parts: "tuple[str, ...]", member: tarfile.TarInfo) -> None:
        parent_fd = self._open_parent(parts)
        try:
            os.mkdir(parts[-1], 0o700 | (member.mode & 0o755), dir_fd=parent_fd)
        except FileExistsError:
            mode = os.stat(parts[-1], dir_fd=parent_fd, follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                raise errors.SysctrError(
                    f"cannot write {'/'.join(parts)}: there is a link, and none is written through",
                    "remove it, or pull to where it leads",
                ) from None
            if not stat.S_ISDIR(mode):
                raise
        else:
            self._chown(parts[-1], parent_fd)

    def _make_file(self, parts: "tuple[str, ...]", member: tarfile.TarInfo, content: "Any") -> None:
        parent_fd = self._open_parent(parts)
        # A new file that takes the old one's place: what is there is not lost half way, and if it is a link
        # it is replaced, not followed.
        draft = f".sysctr-{os.urandom(6).hex()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(draft, flags, 0o600, dir_fd=parent_fd)
        try:
            try:
                _copy(content, fd)
                mode = self._owner.mode if self._owner.mode is not None else 0o600 | (member.mode & 0o755)
                os.utime(fd, (max(0, member.mtime), max(0, member.mtime)))
                self._chown(draft, parent_fd)
                os.fchmod(fd, mode)
            finally:
                os.close(fd)
            os.rename(draft, parts[-1], src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
        except BaseException:
            os.unlink(draft, dir_fd=parent_fd)
            raise
        self._files.add(parts)

    def _chown(self, name: str, parent_fd: int) -> None:
        if self._owner.uid is not None or self._owner.gid is not None:
            uid = -1 if self._owner.uid is None else self._owner.uid
            gid = -1 if self._owner.gid is None else self._owner.gid
            os.chown(name, uid, gid, dir_fd=parent_fd, follow_symlinks=False)

    def _make_hard_link(self, parts: "tuple[str, ...]", existing: "tuple[str, ...]") -> None:
        if existing not in self._files:
            raise errors.Refused(
                f"cannot unpack {'/'.join(parts)}: a hard link to what was not in the archive"
            )
        source_fd = os.dup(self._open_parent(existing))
        try:
            parent_fd = self._open_parent(parts)
            _make_room(parts[-1], parent_fd)
            os.link(
                existing[-1], parts[-1], src_dir_fd=source_fd, dst_dir_fd=parent_fd, follow_symlinks=False
            )
        finally:
            os.close(source_fd)
        self._files.add(parts)


@contextlib.contextmanager
def _saying(parts: "tuple[str, ...]") -> "Iterator[None]":
    try:
        yield
    except OSError as error:
        raise errors.SysctrError(f"cannot write {'/'.join(parts)}: {error.strerror}") from error


def _make_room(name: str, parent_fd: int) -> None:
    try:
        os.unlink(name, dir_fd=parent_fd)
    except FileNotFoundError:
        pass


def _copy(content: "IO[bytes]", fd: int) -> None:
    while piece := content.read(BUFFER_BYTES):
        view = memoryview(piece)
        while view:
            view = view[os.write(fd, view) :]


def copy_single(stream: "BinaryIO", fd: int) -> None:
    """Write the content of the one file in a tar stream to a descriptor."""
    try:
        with _open(stream) as archive:
            member = archive.next()
            content = archive.extractfile(member) if member is not None and member.isreg() else None
            if content is None or (member is not None and member.issparse()):
                raise errors.Refused("cannot pull to a stream: it is not a regular file")
            _copy(content, fd)
            # What follows is drained, so that the sender sees no broken pipe.
            while archive.next() is not None:
                archive.members = []  # type: ignore[attr-defined]
    except _BAD_STREAM as error:
        raise errors.SysctrError(f"cannot unpack what the container sent: {error}") from error
