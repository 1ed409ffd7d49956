"""What the API offers on making archives and on making containers of them; each is a task."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from sysctr.config import values
from sysctr.config.backup_job import expand_notes
from sysctr.config.pct_notes import parse_permissions
from sysctr.engine import archives
from sysctr.engine.archive_source import Source
from sysctr.engine.archiving import Archiving
from sysctr.engine.backup import BackupOptions, Backups
from sysctr.engine.host import Host
from sysctr.engine.import_lxc import DIRECTORY, LxcSource
from sysctr.engine.naming import naming, title
from sysctr.engine.record import Record
from sysctr.engine.restore import RestoreOptions, Restoring
from sysctr.engine.tasks import Task
from sysctr.engine.verify import verify
from sysctr.errors import Busy, ConfigError, UsageError


class ArchiveActions:
    """Backup, restore and verify."""

    def __init__(
        self, host: Host, backups: Backups, restoring: Restoring, archiving: Archiving
    ) -> None:
        self._host = host
        self._archiving = archiving
        self._backups = backups
        self._restoring = restoring

    def options(self, record: Record, spec: Mapping[str, Any]) -> BackupOptions:
        """Return how a backup is made: as asked, else as the host's settings say."""
        settings = self._host.settings.backup
        rate = spec.get("bwlimit_bytes")
        if rate is None:
            rate = settings.bwlimit_bytes
        try:
            notes = expand_notes(spec.get("notes") or "", _variables(record))
        except ConfigError as error:
            raise UsageError(f"cannot back up {record.id}: {error.message}") from error
        directory = spec.get("directory") or archives.own_directory(self._host.where, settings)
        if not directory.startswith("/") or "\0" in directory:
            raise UsageError(f"cannot back up to {directory!r}: it is no absolute path")
        return BackupOptions(
            directory=directory.rstrip("/") or "/",
            mode=spec.get("mode") or settings.mode,
            compress=spec.get("compress") or settings.compress,
            notes=notes,
            protected=bool(spec.get("protected")),
            exclude=tuple(spec.get("exclude") or ()),
            bwlimit_bytes=rate or None,
        ).checked()

    @naming
    def backup(self, ref: str, spec: Mapping[str, Any]) -> Task:
        """Write an archive of a container into a directory."""
        record = self._find(ref)
        options = self.options(record, spec)
        self._backups.check(record, options)
        return self._submit(record, lambda task: self._backups.backup(task, record.id, options))

    @naming
    def start(self, ref: str, options: BackupOptions) -> Task:
        """Write an archive of a container as the options say."""
        record = self._find(ref)
        self._backups.check(record, options)
        return self._submit(record, lambda task: self._backups.backup(task, record.id, options))

    @naming
    def stream(self, ref: str, spec: Mapping[str, Any], out_fd: int) -> Task:
        """Write an archive of a container to a descriptor, which is closed afterwards."""
        try:
            record = self._find(ref)
            options = self.options(record, spec)
            self._backups.check(record, options)
        except BaseException:
            os.close(out_fd)
            raise

        def run(task: Task) -> dict[str, Any]:
            return self._backups.stream(task, record.id, options, out_fd)

        try:
            task = self._submit(record, run)
        except BaseException:
            os.close(out_fd)
            raise
        task.on_end(lambda: os.close(out_fd))
        return task

    def refuse_backed_up(self, record: Record, doing: str) -> None:
        """Raise Busy while a backup of the container is being made."""
        task = self._host.tasks.current(_held(record.id))
        if task is not None:
            raise Busy(
                f"cannot {doing} {record.id}: task {task.id} ({task.kind}) is running",
                f"wait for it with `sysctr task wait {task.id}`, or --force ends it",
            )

    def end_backup(self, number: int) -> None:
        """Cancel the backup of a container, if one is being made, and wait for its end."""
        task = self._host.tasks.current(_held(number))
        if task is not None:
            task.cancel()
            task.wait()

    def restore(self, ref: str, spec: Mapping[str, Any]) -> Task:
        """Make a container of an archive on this host, which is named as those of the catalog are."""
        return self._restore(Source.of_file(self._path(ref), f"restore {_shown(ref)}"), spec)

    def restore_stream(self, in_fd: int, spec: Mapping[str, Any], whole: Callable[[], bool]) -> Task:
        """Make a container of an archive that comes from a descriptor, which is closed afterwards.

        `whole` tells, when nothing more comes, whether that is all of it.
        """
        return self._restore(Source(in_fd, "the archive", "restore the archive", None, whole), spec)

    def import_lxc(self, name: str, directory: str, spec: Mapping[str, Any]) -> Task:
        """Make a container of a stopped one that Debian's LXC keeps on this host, which is only read."""
        return self._restore(LxcSource(self._host, name, directory or DIRECTORY), spec)

    def _restore(self, source: Source, spec: Mapping[str, Any]) -> Task:
        host = self._host
        number = None
        try:
            plan = self._restoring.plan(source, _restore_options(spec))
            if plan.replaced is None:
                number = host.store.reserve(plan.name, plan.number)
            chosen = plan.replaced.id if plan.replaced is not None else number
            assert chosen is not None

            def run(task: Task) -> dict[str, Any]:
                return self._restoring.restore(task, source, plan, chosen)

            task = host.tasks.submit("restore", chosen, run, subject=title(plan.name, chosen))
        except BaseException:
            source.close()
            if number is not None:
                host.store.release(number)
            raise
        task.on_end(source.close)
        return task

    def verify(self, ref: str) -> Task:
        """Prove that an archive can be restored, without restoring it."""
        source = Source.of_file(self._path(ref), f"verify {_shown(ref)}")
        try:
            task = self._host.tasks.submit(
                "backup-verify", None, lambda task: verify(self._host, task, source), subject=source.name,
                exclusive=False,
            )  # fmt: skip
        except BaseException:
            source.close()
            raise
        task.on_end(source.close)
        return task

    def _path(self, ref: str) -> str:
        """Return where an archive is: a path of any file, or the name of one in a backup directory."""
        if ref.startswith("/"):
            return ref
        with self._archiving.catalog().find(ref) as (directory, name):
            return f"{directory.path}/{name}"

    def _find(self, ref: str) -> Record:
        return self._host.store.find(ref)

    def _submit(self, record: Record, run: Any) -> Task:
        return self._host.tasks.submit(
            "backup", record.id, run, subject=record.title, holds=_held(record.id)
        )


def _held(number: int) -> str:
    """Return what a backup holds: other tasks may work on the container meanwhile, but no second backup."""
    return f"backup of {number}"


def _restore_options(spec: Mapping[str, Any]) -> RestoreOptions:
    return RestoreOptions(
        number=spec.get("id"), name=spec.get("name") or "", pool=spec.get("pool") or "",
        force=bool(spec.get("force")), unique=bool(spec.get("unique")), start=bool(spec.get("start")),
        allow=parse_permissions(spec.get("allow") or ()), changes=dict(spec.get("set") or {}),
    )  # fmt: skip


def _shown(ref: str) -> str:
    return values.shown(ref)[1:-1]


def _variables(record: Record) -> dict[str, str]:
    """Return what the variables of a template of notes stand for, by Proxmox's names."""
    return {"guestname": record.name, "vmid": str(record.id), "node": os.uname().nodename}
