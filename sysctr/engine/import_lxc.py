"""A stopped container of LXC, read as an archive that is written of its directory.

That directory is only read, and only by a job that sees its files with the ids which they have inside. So all
that holds of archives from anywhere holds of it.
"""

import contextlib
import os
import re
import select
import stat
import subprocess
from collections.abc import Callable, Sequence

from sysctr.config import lxc
from sysctr.config.values import shown
from sysctr.engine.archive_head import Head
from sysctr.engine.archive_source import Source
from sysctr.engine.archive_writer import Content, Written, write_archive
from sysctr.engine.host import Host
from sysctr.engine.ids import BLOCK
from sysctr.engine.job import JobRunner
from sysctr.engine.plan import Shifted
from sysctr.engine.tasks import Task
from sysctr.errors import ConfigError, NotFound, Refused, SysctrError, UsageError, WrongState
from sysctr.linux import files

DIRECTORY = "/var/lib/lxc"
_CONFIG_LIMIT_BYTES = 1 << 20
_LOOK_S = 0.5


class LxcSource(Source):
    """A container of LXC as a restore reads it."""

    def __init__(self, host: Host, name: str, directory: str) -> None:
        doing = f"import {shown(name)[1:-1]} of LXC"
        super().__init__(-1, f"the LXC container {shown(name)[1:-1]}", doing, None)
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise UsageError(f"cannot {doing}: a container of LXC has no such name")
        if not directory.startswith("/") or "\0" in directory:
            raise UsageError(f"cannot {doing}: {shown(directory)} is no absolute path")
        self._host = host
        self._lxc_name = name
        self._directory = os.path.normpath(directory)
        self._config = _read_config(f"{self._directory}/{name}", name, doing)
        self._config.has_snapshots = _has_entries(f"{self._directory}/{name}/snaps")
        # Where LXC keeps its containers may be a link of the administrator's; below that none is followed.
        below = self._config.rootfs.removeprefix(f"{self._directory}/")
        moved = below != self._config.rootfs
        self._rootfs = f"{os.path.realpath(self._directory)}/{below}" if moved else below
        self._refuse_running()

    def peek(self, jobs: JobRunner) -> Head:
        """Return what its configuration says."""
        _check_directory(self._rootfs, self.doing)
        # Nothing that it says is looked at twice.
        self.codec = "none"
        return Head(foreign=self._config)

    def feed(self, fd: int, task: Task, saw: Callable[[bytes], None] | None = None) -> None:
        """Write its files as a plain tar archive."""
        self._refuse_running()
        users, groups = (_rows(ranges) for ranges in (self._config.users, self._config.groups))
        task.log("looking at the owners of its files")
        self._refuse_other_ids(users, groups, task)
        root = Shifted(self._rootfs, users, groups)
        try:
            written = write_archive(
                self._host.jobs_for_templates(), task, Content((), root), "none", fd, doing=self.doing
            )
        except SysctrError as error:
            if _is_broken(fd):
                # Who unpacks it ended first, and says why.
                raise BrokenPipeError from error
            raise
        self._judge(written, task)
        self._refuse_running()
        self._note_end()

    def _judge(self, written: Written, task: Task) -> None:
        for line in written.left_out:
            task.log(f"left out: {line}")
        if written.lost:
            raise SysctrError(f"cannot {self.doing}: {written.lost[0]}")

    def _refuse_running(self) -> None:
        if is_running(self._directory, self._lxc_name):
            raise WrongState(
                f"cannot {self.doing}: it is running", f"`lxc-stop -P {self._directory} -n {self._lxc_name}`"
            )

    def _refuse_other_ids(self, users: Sequence["Row"], groups: Sequence["Row"], task: Task) -> None:
        """Raise Refused where a file has an owner that no id inside is: it would become nobody's."""
        found = _first_other(self._rootfs, users, groups, task)
        if found is None:
            return
        owner, _, path = found.partition(" ")
        whose = ", ".join(f"{disk} to {disk + count - 1}" for disk, _, count in users)
        raise Refused(
            f"cannot {self.doing}: ./{shown(path)[1:-1]} belongs to {owner} on this host, and the ids of the "
            f"container are {whose} there",
            "an lxc.idmap of its configuration is missing, or chown gives it an owner",
        )


Row = tuple[int, int, int]


def is_running(directory: str, name: str) -> bool:
    """Tell whether LXC runs the container, by its monitor and by its monitor's socket."""
    title = os.fsencode(f"[lxc monitor] {directory} {name}")
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/cmdline", "rb") as file:
                if file.read(8192).rstrip(b"\0 ") == title:
                    return True
    socket = os.fsencode(f"@{directory}/{name}/command")
    with open("/proc/net/unix", "rb") as file:
        return any(line.split(None, 7)[-1].rstrip(b"\n") == socket for line in file)


def _read_config(home: str, name: str, doing: str) -> lxc.LxcConfig:
    path = f"{home}/config"
    try:
        status = os.stat(home)
        data, file_status = files.read_bounded(path, _CONFIG_LIMIT_BYTES)
    except FileNotFoundError as error:
        raise NotFound(
            f"cannot {doing}: there is no {path}", "`lxc-ls` lists them; --lxcpath says where else they are"
        ) from error
    except OSError as error:
        raise SysctrError(f"cannot {doing}: {path}: {(error.strerror or str(error)).lower()}") from error
    if status.st_uid or file_status.st_uid or file_status.st_mode & stat.S_IWOTH:
        raise Refused(
            f"cannot {doing}: {home} belongs to another user than root, who could name any file of this host",
            f"as that user: lxc-usernsexec -- tar --numeric-owner -C {home}/rootfs -c . | sysctr restore - "
            f"--name {name}",
        )
    try:
        return lxc.parse(data.decode("utf-8", "surrogateescape"), name, doing)
    except ConfigError as error:
        raise UsageError(error.message, error.hint) from error


def _has_entries(directory: str) -> bool:
    try:
        return bool(os.listdir(directory))
    except OSError:
        return False


def _check_directory(rootfs: str, doing: str) -> None:
    try:
        mode = os.lstat(rootfs).st_mode
    except OSError as error:
        raise SysctrError(f"cannot {doing}: its rootfs {rootfs}: {(error.strerror or '').lower()}") from error
    if not stat.S_ISDIR(mode):
        raise Refused(f"cannot {doing}: its rootfs {rootfs} is no directory")


def _rows(ranges: Sequence[lxc.IdRange]) -> tuple[Row, ...]:
    """Return the ids on the disk, those inside, and how many; a container here has no others."""
    rows = []
    for one in ranges:
        count = min(one.count, BLOCK - one.inside)
        if count > 0:
            rows.append((one.disk, one.inside, count))
    return tuple(rows)


def _first_other(rootfs: str, users: Sequence[Row], groups: Sequence[Row], task: Task) -> str | None:
    """Return owner and path of the first file whose user or group is none of these; nothing is opened."""
    other = [*_not_among("-uid", users), "-o", *_not_among("-gid", groups)]
    argv = ["find", rootfs, "-xdev", "(", *other, ")", "-printf", r"%U:%G %P\n", "-quit"]
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as find:
        try:
            while True:
                task.check()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    found, _ = find.communicate(timeout=_LOOK_S)
                    break
        except BaseException:
            find.kill()
            raise
    text = found.decode("utf-8", "surrogateescape").partition("\n")[0]
    return re.sub(r"[\x00-\x1f\x7f]", "?", text) if text else None


def _not_among(test: str, rows: Sequence[Row]) -> list[str]:
    parts: list[str] = []
    for disk, _, count in rows:
        # +N is more than N, and -N less.
        lowest = [test, f"+{disk - 1}"] if disk else []
        parts += ["-o", "(", *lowest, test, f"-{disk + count}", ")"]
    return ["!", "(", *parts[1:], ")"]


def _is_broken(fd: int) -> bool:
    """Tell whether nobody reads from a pipe any more."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))
