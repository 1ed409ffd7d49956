"""Volumes brought up to date from another host: an rsync at each end, in a job with the container's ids.

Neither side hands the other an argument: what runs where is written here, and what a peer's rsync sends is
taken apart in a job that sees nothing but the volume. The bytes between them are moved by an `exchange`,
which gets both descriptors of the local rsync and closes them.
"""

import contextlib
import fcntl
import functools
import os
import re
import socket
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from sysctr.engine.job import SOURCE, JobRunner, Task
from sysctr.engine.supervisor import Fd
from sysctr.engine.trees import FORGIVE, GONE
from sysctr.errors import NoSpace, SysctrError
from sysctr.runtime import wire
from sysctr.storage import tree
from sysctr.storage.base import RootSpec

# Moves bytes between this descriptor to read and this one to write, and the other side, until both directions
# have ended. Both are its own: it closes each as its direction ends, and both whatever happens.
Exchange = Callable[[int, int], None]

# What the receiver's script ends with when the disk is full; else both end as rsync does.
_NO_SPACE = 28
# Something went away in the meantime.
_VANISHED = 24
# rsync's for a connection that broke (SOCKETIO, STREAMIO, MESSAGEIO, SIGNAL, TIMEOUT) and the shell's for
# SIGPIPE: not why it broke.
_CUT = frozenset({10, 12, 13, 20, 30, 128 + 13})
# How long an rsync may take to say why it ended after its connection did.
_LAST_WORDS_S = 3.0
_PIPE_BYTES = 1 << 20
_SO_SNDBUFFORCE = 32  # of asm-generic/socket.h; above net.core.wmem_max, for root
_STATISTICS_BYTES = 4096
_DIGEST_BYTES = 64

# An upper's past, which means nothing in a copy of it (sysctr.runtime.layers.MARKS).
_FILTERS = " ".join(f"--filter='-x user.overlay.{mark}'" for mark in ("origin", "impure", "uuid", "nlink"))
# What rsync 3.2.7's client asks a server for with the options below, taken down from one. Every version since
# 3.2.0 understands it, and a server goes by the capabilities after the dot, whatever its client can do more:
# without the "i" of incremental recursion all names of a file are known before the first is sent.
_SERVER_ALL = "rsync --server --sender -lHogDtpAXrxSe.LsfxCIvu --numeric-ids . /source/"
_SERVER_CONTENT = "rsync --server --sender -lHogDtpAXrcxSe.LsfxCIvu --numeric-ids . /source/"
_SERVER_LISTED = (
    "rsync --server --sender -lHogDtpAXIRSe.LsfxCIvu --numeric-ids --ignore-missing-args"
    " --files-from /tmp/changed --from0 . /source/"
)
_SERVER_PLACES = (
    "rsync --server --sender -ldHogDtpAXRSe.LsfxCIvu --numeric-ids --ignore-missing-args"
    " --files-from /tmp/places --from0 . /source/"
)
_CLIENT = (
    "rsync --archive --hard-links --acls --xattrs --numeric-ids --sparse --devices --specials"
    f" --modify-window=-1 --stats --no-human-readable {_FILTERS} --rsh='/usr/bin/python3 -I -S /tmp/connect'"
)
_CLIENT_ALL = f"{_CLIENT} --delete --one-file-system source:/source/ /volume/"
_CLIENT_CONTENT = f"{_CLIENT} --checksum --delete --one-file-system source:/source/ /volume/"
# A directory may have to make way for a file, and not even an old copy of the same size and time is right.
_CLIENT_LISTED = (
    f"{_CLIENT} --ignore-times --force --from0 --files-from=:/tmp/changed source:/source/ /volume/"
)
# Of a listed directory all names, and nothing below them.
_CLIENT_PLACES = (
    f"{_CLIENT} --no-recursive --dirs --delete --force --from0 --files-from=:/tmp/places"
    " source:/source/ /volume/"
)

# How a run finds out what differs: by size and time; by content, where the copy was not made by the passes of
# the same migration; not at all, for the files that the source lists; or by size and time, but only of what
# is in the directories that it lists.
MODES = ("all", "content", "listed", "places")
_CLIENTS = {
    "all": _CLIENT_ALL, "content": _CLIENT_CONTENT, "listed": _CLIENT_LISTED, "places": _CLIENT_PLACES,
}  # fmt: skip

# What an rsync says ends up in /tmp/words, and its end in `status`.
_BEGIN = rf"""{FORGIVE}
set -eu
export LC_ALL=C.UTF-8
command -v rsync >/dev/null || {{ echo 'rsync is not installed' >&2; exit 127; }}
status=0
end() {{
    tail -c 60000 /tmp/words >&2
    exit "$status"
}}
"""
_SERVE = rf"""
serve() {{
    "$@" 2>/tmp/words || status=$?
    forgive '{GONE}'
    end
}}
look() {{
    find "$@" 2>/tmp/words && return
    ! grep -v -e ': No such file or directory$' -e ': Not a directory$' \
        -e ': Too many levels of symbolic links$' -e ': Stale file handle$' /tmp/words >&2
}}
"""
# What rsync compares by, of everything, and how many names each file has: two trees of which this is the same
# need no rsync that walks both. What it leaves out (content, and attributes and devices that were changed in
# place) has a new time of the kind that nobody can set.
_LOOK_ALL = r"""
look_all() {
    find . -xdev -type d -printf '%P %y %T@ %m %U %G\0' -o -printf '%P %y %n %s %T@ %m %U %G %l\0' |
        LC_ALL=C sort -z | sha256sum | cut -d ' ' -f 1
}
"""
# Descriptor 4, where it is wanted, gets which inode each directory is now.
_SEND = rf"""{_BEGIN}{_SERVE}
cd /source
if [ "$1" = first ]; then
    look . -xdev -type d -fprintf /tmp/now '%i %p\0'
    sort -z /tmp/now >&4
fi
if [ "$2" = content ]; then
    serve {_SERVER_CONTENT}
else
    serve {_SERVER_ALL}
fi
"""
# rsync tells changes by size and time of a name. That misses a write through a mapping to a page that was
# written to before (no time changes until it is clean again), times that were set back, and directories that
# changed places. So what was changed since then, by the time that nobody can set, and what is in directories
# that have another inode than before (descriptor 3 tells), is sent again whatever it looks like.
# Some file systems keep whole seconds: of the second before $1, from $2 on, those of such a time count too.
# Descriptor 5 gets the directories whose names may have changed, and what changed that is no file.
_SEND_LISTED = rf"""{_BEGIN}{_SERVE}
cd /source
look . -xdev -type d -fprintf /tmp/now '%i %p\0' , \
    -newerct "@$1" -fprintf /tmp/newer '0.0 %y %p\0' -o -newerct "@$2" -fprintf /tmp/newer '%C@ %y %p\0'
sort -z /tmp/now >/tmp/sorted
cat /tmp/sorted >&4
cat <&3 >/tmp/before
comm -z -23 /tmp/sorted /tmp/before >/tmp/new
cut -z -d ' ' -f 2- /tmp/new >/tmp/moved
pick() {{ LC_ALL=C sed -z -n "s,^[0-9]*\.0* $1 \(.*\),\1${{2-}},p" /tmp/newer; }}
pick f >/tmp/changed
look -files0-from /tmp/moved -maxdepth 1 -type f -print0 >>/tmp/changed
{{ printf './\0'; pick d /; LC_ALL=C sed -z 's,$,/,' /tmp/moved; pick '[^df]'; }} >&5
serve {_SERVER_LISTED}
"""
# Descriptor 4 gets how all of it looks where $1 says so.
_SEND_PLACES = rf"""{_BEGIN}{_SERVE}{_LOOK_ALL}
cd /source
cat <&3 >/tmp/places
if [ "$1" = look ]; then
    look_all >&4 &
    trap wait EXIT
fi
serve {_SERVER_PLACES}
"""
# The remote shell of the rsync client: hands rsync's two ends to this daemon and ends. It must not stay until
# they are done with: rsync waits for its shell before it closes them.
_CONNECT = """
import socket
socket.send_fds(socket.socket(fileno=3), [b"{}"], [0, 1])
"""
# What an rsync says that gets such things. Whoever sends judges its own errors; an old one says them here.
_THEIRS = (
    r"^rsync: \[sender\] \|^ERROR: .* failed verification -- update discarded\.$"
    r"\|ACL_TYPE_DEFAULT): Permission denied (13)$"
)
_RECEIVE = rf"""{_BEGIN}{_LOOK_ALL}
printf %s "$2" >/tmp/connect
eval "$1" >/tmp/stats 2>/tmp/words </dev/null || status=$?
tail -c {_STATISTICS_BYTES} /tmp/stats >&4
forgive '{_THEIRS}'
! grep -q -e 'No space left' -e 'quota exceeded' /tmp/words || status={_NO_SPACE}
if [ "$3" = look ] && [ "$status" = 0 ]; then
    look_all >&5
fi
end
"""
_TOTALS = {
    "files": re.compile(rb"^Number of regular files transferred: (\d{1,18})$", re.MULTILINE),
    "bytes": re.compile(rb"^Total transferred file size: (\d{1,18}) bytes$", re.MULTILINE),
    "deleted": re.compile(rb"^Number of deleted files: (\d{1,18})", re.MULTILINE),
}


@dataclass(frozen=True)
class Received:
    """What one run changed at the receiver: regular files, how long these are together, and deletions.

    Of a run of the mode "places" also the digest of what is there now, to be compared with the sender's.
    """

    files: int
    bytes: int
    deleted: int
    digest: str = ""


class PassMark:
    """The state of a source at the begin of a pass, from which the next pass can tell what changed since.

    Its time comes before what was written through a mapping is written out: from then on each such write
    gives a new time. It counts from the first attempt of a pass on, also if that came to nothing.
    """

    def __init__(self, view: RootSpec) -> None:
        # Whether the copy has all that was there then; whoever makes the passes knows.
        self.copied = False
        self._wall_s = time.time()
        self._boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        # Which inode each directory was: a list as long as there are directories, sorted.
        self.directories: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the mark
        # Where a name was made or taken away between the mark before and this one.
        self.places: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        tree.sync_root(view)
        self.close = weakref.finalize(self, _close_both, self.directories, self.places)

    def since(self) -> tuple[str, str]:
        """Return the time for find(1) after which what was changed may not be in the copy.

        With it comes the one for a file system that keeps whole seconds.
        """
        # A clock that was set back meanwhile gave later changes an earlier time.
        passed_s = time.clock_gettime(time.CLOCK_BOOTTIME) - self._boot_s
        wall_s = min(self._wall_s, time.time() - passed_s)
        # The clock that file systems use lags behind by up to a tick, and find asks for what is newer, not
        # for what is as new.
        wall_s -= 0.05
        return f"{wall_s:.6f}", f"{int(wall_s) - 1}.999999"


def _close_both(*files: IO[bytes]) -> None:
    for file in files:
        file.close()


def send_tree(
    jobs: JobRunner, task: Task | None, view: RootSpec, exchange: Exchange, mode: str, *,
    since: PassMark | None = None, mark: PassMark | None = None, still: bool = False,
) -> str:  # fmt: skip
    """Send what differs of a volume, or of a snapshot's view, to a `receive_tree` of the same mode.

    A pass over what changes meanwhile has a `mark`, made just before it. The first one sends all. Each later
    one has two runs, both with its mark: "listed", which sends what was changed `since` the mark of the pass
    before, and "places", which looks at no more than where names were made or taken away.

    What changes places while it is walked through is in no list, so the last pass needs to know: "places"
    returns a digest of how all looks if it is `still`. Where the receiver's is another one, a run of all,
    without the mark, makes the copy right. Other runs return an empty string.

    With `still` nobody writes to the volume meanwhile, as to a snapshot, and nothing may be left out; else
    what vanishes, or becomes something else as it is read, is left to the next pass.

    Raises what `exchange` raised, where that was the cause, or SysctrError.
    """
    with contextlib.ExitStack() as stack:
        digest = stack.enter_context(tempfile.TemporaryFile())
        if mode == "listed":
            assert since is not None
            assert mark is not None
            since.directories.seek(0)
            mark.places.truncate(0)
            mark.places.seek(0)
            script, arguments = _SEND_LISTED, [*since.since()]
            fds = [since.directories.fileno(), mark.directories.fileno(), mark.places.fileno()]
        elif mode == "places":
            assert mark is not None
            mark.places.seek(0)
            script, arguments = _SEND_PLACES, [_looks(mode, still=still)]
            fds = [mark.places.fileno(), digest.fileno()]
        else:
            script, arguments = _SEND, ["again" if mark is None else "first", mode]
            fds = [] if mark is None else [mark.directories.fileno()] * 2
        theirs_in, ours_in = _pipe(stack)
        ours_out, theirs_out = _pipe(stack)
        run = functools.partial(
            jobs.run_tool, ["sh", "-c", script, "send", *arguments], views={SOURCE: view}, more_fds=fds,
            stdin_fd=theirs_in.fileno(), stdout_fd=theirs_out.fileno(),
        )  # fmt: skip
        connected = _Connected(task, lambda: exchange(ours_out.take(), ours_in.take()))
        still = still or all(one.read_only for one in view.trees)
        connected.run(run, (theirs_in, theirs_out), still=still)
        return _digest(digest)


def receive_tree(
    jobs: JobRunner, task: Task | None, root: RootSpec, exchange: Exchange, mode: str, *,
    still: bool = False, container: int | None = None,
) -> Received:  # fmt: skip
    """Bring a volume up to date with what a `send_tree` of the same mode, and as `still`, sends.

    `root` is what its driver's `activate` returned. With `container` it is refused while that runs; while
    another job writes to the volume it always is.

    Raises NoSpace on a full disk, what `exchange` raised, where that was the cause, or SysctrError. Where the
    job could not begin `exchange` was not called, and it is the caller who has to tell the other side.
    """
    with contextlib.ExitStack() as stack:
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair(type=socket.SOCK_SEQPACKET))
        told, digest = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        argv = ["sh", "-c", _RECEIVE, "receive", _CLIENTS[mode], _CONNECT, _looks(mode, still=still)]
        run = functools.partial(
            jobs.run_tool, argv, root=root, container=container,
            more_fds=(theirs.fileno(), told.fileno(), digest.fileno()),
        )  # fmt: skip
        connected = _Connected(task, lambda: _pass_on(ours, exchange))
        try:
            connected.run(run, (theirs,), still=still)
        except NoSpace as error:
            if error is connected.error:
                raise  # the other side's
            # Where it was noticed decides about the words.
            doing = task.doing if task else "copy files"
            raise NoSpace(f"cannot {doing}: no space left on {root.trees[-1].path}") from error
        told.seek(0)
        return _received(told.read(_STATISTICS_BYTES), _digest(digest))


def _pass_on(control: socket.socket, exchange: Exchange) -> None:
    """Take rsync's two descriptors from its remote shell, and let bytes pass."""
    try:
        _, fds = wire.receive(control)
    except wire.ConnectionClosed:
        return  # rsync never got so far, and says why
    kinds = {stat.S_IFMT(os.fstat(fd).st_mode) for fd in fds}
    # From a job that a peer's rsync talks to: nothing of a kind that could keep this daemon waiting.
    if len(fds) != 2 or not kinds <= {stat.S_IFSOCK, stat.S_IFIFO}:
        wire.close_all(fds)
        raise SysctrError("cannot connect rsync: its remote shell sent something else")
    for fd in fds:
        os.set_blocking(fd, True)  # as the sender's are
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            # So much as the sender's pipes hold: each wait for the other takes a turn of the processor.
            with socket.socket(fileno=os.dup(fd)) as same:
                same.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _PIPE_BYTES)
    exchange(*fds)


class _Gone(Exception):
    """Ends a job whose connection has ended."""


class _Connected:
    """A job and, in a thread, the exchange of what it reads and writes; for the job it is its task."""

    def __init__(self, task: Task | None, exchange: Callable[[], None]) -> None:
        self._task = task
        self._exchange = exchange
        self.error: BaseException | None = None
        self._broke_s = 0.0

    def check(self) -> None:
        """Raise if the task was cancelled, or some time after the exchange failed."""
        if self._task is not None:
            self._task.check()
        if self._broke_s and time.monotonic() > self._broke_s + _LAST_WORDS_S:
            raise _Gone

    def log(self, text: str) -> None:
        """Add a line to the task's log."""
        if self._task is not None:
            self._task.log(text)

    def run(
        self, job: Callable[..., int], theirs: "Sequence[Fd | socket.socket]", *, still: bool
    ) -> None:
        """Run the job and wait for both; `theirs` are the descriptors that only the job is to have.

        Raises the error that was the cause, where it did not go well.
        """
        thread = threading.Thread(target=self._work, name="exchange", daemon=True)
        thread.start()
        status = None
        try:
            with contextlib.suppress(_Gone):
                status = job(task=self)
        finally:
            # Our copies of the job's ends: only now can the exchange see that the job is gone.
            for end in theirs:
                end.close()
            thread.join()
        self._judge(status, {0} if still else {0, _VANISHED})

    def _work(self) -> None:
        try:
            self._exchange()
        except BaseException as error:
            self.error = error
            self._broke_s = time.monotonic()

    def _judge(self, status: int | None, good: "set[int]") -> None:
        doing = f"cannot {self._task.doing if self._task else 'copy files'}"
        if status == _NO_SPACE:
            raise NoSpace(f"{doing}: no space left on device")
        if self.error is not None and (status is None or status in good | _CUT):
            raise self.error
        if status not in good:
            raise SysctrError(
                f"{doing}: the copy of its files ended with {status}", "the task's log says why"
            ) from self.error


def _received(words: bytes, digest: str) -> Received:
    found = {name: pattern.search(words) for name, pattern in _TOTALS.items()}
    totals = {name: int(match[1]) if match else 0 for name, match in found.items()}
    return Received(**totals, digest=digest)


def _looks(mode: str, *, still: bool) -> str:
    """Return what a script is told: whether it is to say how all looks."""
    return "look" if mode == "places" and still else ""


def _digest(file: IO[bytes]) -> str:
    """Return what a job has said of all that it sees, empty if it said nothing that can be one."""
    file.seek(0)
    words = file.read(_DIGEST_BYTES + 1).decode("ascii", "replace").strip()
    return words if re.fullmatch(rf"[0-9a-f]{{{_DIGEST_BYTES}}}", words) else ""


def _pipe(stack: contextlib.ExitStack) -> "tuple[Fd, Fd]":
    read_fd, write_fd = (stack.enter_context(Fd(fd)) for fd in os.pipe2(os.O_CLOEXEC))
    with contextlib.suppress(OSError):  # who is no root may have only so much in pipes
        fcntl.fcntl(write_fd.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return read_fd, write_fd
