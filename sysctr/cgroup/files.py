"""Reading and writing the small files of a cgroup, in as few system calls as they take."""

import contextlib
import errno
import os
import select
import time

from sysctr.cgroup import base


def read(path: str) -> str:
    """Return the text of one control file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Most files fit the first read; io.stat, cgroup.procs and memory.stat may be longer.
        text = os.read(fd, 4096)
        part = text
        while len(part) == 4096:
            part = os.read(fd, 4096)
            text += part
        return text.decode()
    finally:
        os.close(fd)


def write(path: str, text: str) -> None:
    """Write one value; the kernel takes a whole value with one write(2) or refuses it."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def make_directory(path: str, mode: int) -> None:
    """Make a cgroup with this mode whatever the umask is; FileExistsError when it is there.

    Linux 6.1 lets only those mount cgroup2 in a cgroup namespace who may search every directory above its
    root, and the daemon has a umask of 077.
    """
    os.mkdir(path, mode)
    os.chmod(path, mode)


def prepare_jobs(path: str) -> None:
    """Make the directory of the jobs' cgroups, or remove what a supervisor that died left in it."""
    try:
        make_directory(path, 0o755)
    except FileExistsError:
        with os.scandir(path) as entries:
            left = [entry.path for entry in entries if entry.is_dir()]
        for job in left:
            with contextlib.suppress(OSError):  # it has processes: a job runs
                os.rmdir(job)


def remove_root(path: str) -> None:
    """Remove an installation's directory with that of the jobs in it; no error when it is not there."""
    for directory in (f"{path}/{base.JOBS}", path):
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(directory)


def number(text: str) -> int | None:
    """Return the number a limit file holds, None for "max".

    >>> number("4096"), number("max")
    (4096, None)
    """
    text = text.strip()
    return None if text == "max" else int(text)


def flat(text: str) -> dict[str, int]:
    r"""Return a flat keyed file (`key value` lines) as a mapping.

    >>> flat("populated 1\nfrozen 0\n")
    {'populated': 1, 'frozen': 0}
    """
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}


def wait_for_event(directory: str, key: str, value: int, timeout_s: float) -> bool:
    """Wait until cgroup.events of a cgroup2 directory says `key value`; False when it did not in time."""
    deadline = time.monotonic() + timeout_s
    fd = os.open(f"{directory}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    try:
        poller = select.poll()
        poller.register(fd, select.POLLPRI | select.POLLERR)
        while True:
            # Reading arms the notification: a change after this read makes poll return.
            if flat(os.pread(fd, 4096, 0).decode()).get(key) == value:
                return True
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return False
            poller.poll(remaining_s * 1000)
    finally:
        os.close(fd)


def remove_tree(directory: str, timeout_s: float) -> None:
    """Remove a cgroup and all below it, innermost first; OSError(EBUSY) when processes stay.

    A process that was killed leaves its cgroup a moment after it was reaped, without an event in v1; so
    a busy directory is tried again until the time is over.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            for path, _, _ in os.walk(directory, topdown=False):
                os.rmdir(path)
            return
        except FileNotFoundError:
            if not os.path.isdir(directory):
                return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.001)
