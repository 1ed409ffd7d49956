"""What the supervisor writes down of each container, so that the next one finds its way after a crash."""

import errno
import json
import os

from sysctr.linux import process


class Records:
    """One small file for each container in a directory below /run.

    A record holds pid, start time and boot id of an init: a pid alone may have been given to another process.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._boot_id = process.boot_id()

    def write(self, container_id: int, record: dict) -> None:
        """Store a record; it is complete or absent whenever the power goes."""
        target = f"{self._directory}/{container_id}.json"
        temporary = f"{target}.new"
        data = json.dumps({**record, "boot_id": self._boot_id}).encode()
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.write(fd, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), temporary)
        finally:
            os.close(fd)
        os.rename(temporary, target)

    def remove(self, container_id: int) -> None:
        """Forget a container; one that is unknown is no error."""
        try:
            os.unlink(f"{self._directory}/{container_id}.json")
        except FileNotFoundError:
            pass

    def read_all(self) -> "dict[int, dict]":
        """Return the records of this boot; a damaged one is left out."""
        found = {}
        for name in os.listdir(self._directory):
            stem, dot, suffix = name.partition(".")
            if not stem.isdigit() or dot + suffix != ".json":
                continue
            try:
                with open(f"{self._directory}/{name}", encoding="utf-8") as file:
                    record = json.load(file)
            except (OSError, ValueError):
                continue
            if isinstance(record, dict) and record.get("boot_id") == self._boot_id:
                found[int(stem)] = record
        return found


def open_if_alive(record: dict) -> int:
    """Return a pidfd of the process a record means, or -1 when it is gone."""
    pid = record.get("pid", 0)
    if not isinstance(pid, int) or pid <= 1:
        return -1
    try:
        pidfd = process.pidfd_open(pid)
    except OSError:
        return -1
    # Compared after the pidfd is open: now the pid cannot pass to another process unseen.
    try:
        if process.start_time(pid) == record.get("start_time"):
            return pidfd
    except OSError:
        pass
    os.close(pidfd)
    return -1
