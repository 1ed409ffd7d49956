"""What the API offers on archives: what there is, and removing, protecting, describing and pruning them."""

import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sysctr.config import values
from sysctr.config.backup import Keep
from sysctr.engine import archives
from sysctr.engine.archives import Archive, Catalog, Verdict
from sysctr.engine.host import Host
from sysctr.engine.tasks import Task
from sysctr.errors import SysctrError, UsageError

log = logging.getLogger(__name__)

_LOG_SHOWN_BYTES = 64 << 10
_VERDICTS_SHOWN = 1000


def note_success(host: Host, number: int, archive: str, size_bytes: int) -> None:
    """Remember of a container that it was backed up now, and where to."""
    done = {"time": round(time.time(), 3), "archive": archive, "size_bytes": size_bytes}
    try:
        host.store.update(number, last_backup=done)
    except SysctrError as error:
        # Destroyed meanwhile, or the disk is full: the archive is made all the same.
        log.warning("%d: cannot note its backup: %s", number, error.message)


class Archiving:
    """The archives of all backup directories that this host knows of.

    `others` returns those that backup jobs use, beside the host's own.
    """

    def __init__(self, host: Host, others: Callable[[], Iterable[str]] = tuple) -> None:
        self._host = host
        self._others = others

    @property
    def directory(self) -> str:
        """Return where archives go if nobody says otherwise."""
        return archives.own_directory(self._host.where, self._host.settings.backup)

    def catalog(self) -> Catalog:
        """Return the archives of every directory in use."""
        return Catalog([self.directory, *self._others()])

    def list(self, directory: str | None = None) -> dict[str, Any]:
        """Return all archives, or those of one directory, and what there is of each container."""
        if directory is None:
            found, problems = self.catalog().list()
        else:
            with archives.opened(_absolute(directory)) as one:
                found, problems = one.list(), []
        names = {record.id: record.name for record in self._host.store.list()}
        return {
            "archives": [self._shown(one, names) for one in found],
            "containers": self._by_container(found), "problems": problems,
        }  # fmt: skip

    def show(self, ref: str) -> dict[str, Any]:
        """Return one archive, with its notes and the end of the log of its making."""
        with self.catalog().find(ref) as (directory, name):
            text = directory.read_log(name, _LOG_SHOWN_BYTES).decode("utf-8", "replace")
            return {**self._shown(directory.get(name)), "log": text}

    def protect(self, ref: str, protected: bool) -> dict[str, Any]:
        """Protect an archive from being removed and pruned, or no longer."""
        with self.catalog().find(ref) as (directory, name):
            shown = self._shown(directory.protect(name, protected))
        self._publish(shown["path"], "protected" if protected else "unprotected")
        return shown

    def notes(self, ref: str, text: str) -> dict[str, Any]:
        """Write down something about an archive."""
        with self.catalog().find(ref) as (directory, name):
            shown = self._shown(directory.set_notes(name, text))
        self._publish(shown["path"], "noted")
        return shown

    def remove(self, ref: str) -> Task:
        """Remove an archive with what lies beside it."""
        with self.catalog().find(ref) as (directory, name):
            archive = directory.get(name)
            archives.refuse_protected(archive)
        shown = values.shown(archive.path)[1:-1]
        return self._host.tasks.submit(
            "backup-remove", None, lambda _task: self._remove(archive.path), subject=f"archive {shown}"
        )

    def _remove(self, path: str) -> dict[str, Any]:
        with self.catalog().find(path) as (directory, name):
            gone = directory.remove(name)
        self._publish(path, "removed")
        return {"archive": path, "size_bytes": gone.size_bytes}

    def prune(
        self,
        directory: str | None = None,
        *,
        keep: Mapping[str, int] | None = None,
        containers: Iterable[str] = (),
        dry_run: bool = False,
    ) -> Task:
        """Remove the archives of a directory that no rule keeps, of these containers or of all."""
        path = self.directory if directory is None else _absolute(directory)
        rules = self._host.settings.backup.keep.rules if keep is None else Keep(**keep).rules
        if not rules:
            raise UsageError(
                f"cannot prune archives in {values.shown(path)[1:-1]}: no rule says which to keep",
                "give one such as --keep-last 3, or set backup.keep_last in host.toml",
            )
        numbers = [self._number(ref) for ref in containers] or None
        return self._host.tasks.submit(
            "backup-prune", None,
            lambda task: self.prune_now(task, path, rules, numbers, dry_run=dry_run),
            subject=f"archives in {values.shown(path)[1:-1]}",
        )  # fmt: skip

    def prune_now(
        self,
        task: Task,
        directory: str,
        rules: Mapping[str, int],
        numbers: Iterable[int] | None,
        *,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Prune within a task; SysctrError where some could not be removed, when the others are."""
        with archives.opened(directory) as one:
            verdicts = one.prune(rules, numbers, dry_run=dry_run)
        removed = [verdict for verdict in verdicts if verdict.mark == "remove" and not verdict.error]
        failed = [verdict for verdict in verdicts if verdict.error]
        if not dry_run:
            told = [f"removed {values.shown(verdict.archive.name)[1:-1]}" for verdict in removed]
            told += [verdict.error for verdict in failed]
            if told:
                task.log("\n".join(told))
            for verdict in removed:
                self._publish(verdict.archive.path, "removed")
        if failed:
            more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
            raise SysctrError(f"{failed[0].error}{more}")
        names = {record.id: record.name for record in self._host.store.list()}
        return {
            "directory": directory, "dry_run": dry_run,
            "removed": len(removed), "freed_bytes": sum(one.archive.size_bytes for one in removed),
            "archives": [self._judged(verdict, names) for verdict in verdicts[:_VERDICTS_SHOWN]],
            "truncated": len(verdicts) > _VERDICTS_SHOWN,
        }  # fmt: skip

    def _judged(self, verdict: Verdict, names: "dict[int, str]") -> dict[str, Any]:
        return {**self._shown(verdict.archive, names), "mark": verdict.mark}

    def _shown(self, archive: Archive, names: "dict[int, str] | None" = None) -> dict[str, Any]:
        if names is None:
            names = {record.id: record.name for record in self._host.store.list()}
        # Whoever has the number now: as on any host, the name may be another than that of the archive.
        return {**archive.as_dict(), "container_name": names.get(archive.number or 0, "")}

    def _by_container(self, found: "list[Archive]") -> "list[dict[str, Any]]":
        groups: dict[int, list[Archive]] = {}
        for one in found:
            if one.number is not None:
                groups.setdefault(one.number, []).append(one)
        shown = []
        known = {record.id: record for record in self._host.store.list()}
        for number in sorted({*known, *groups}):
            record, of_it = known.get(number), groups.get(number, [])
            shown.append(
                {
                    "id": number, "name": record.name if record else "", "exists": record is not None,
                    "last_backup": record.last_backup if record else None,
                    "archives": len(of_it), "size_bytes": sum(one.size_bytes for one in of_it),
                    "newest": max((one.time for one in of_it), default=None),
                }
            )  # fmt: skip
        return shown

    def _number(self, ref: str) -> int:
        # The archives of a container that is no more, or is another host's, can be pruned by its number.
        if re.fullmatch(r"[1-9][0-9]{2,8}", ref):
            return int(ref)
        return self._host.store.find(ref).id

    def _publish(self, path: str, change: str) -> None:
        self._host.bus.publish("backup", archive=path, change=change)


def _absolute(path: str) -> str:
    if not path.startswith("/") or "\0" in path:
        raise UsageError(f"cannot open the backup directory {values.shown(path)}: it is no absolute path")
    return path.rstrip("/") or "/"
