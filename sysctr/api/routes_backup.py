"""The routes of archives: they are named by path or by name, which no segment of an address could hold."""

from typing import Any

from sysctr.api.fields import Anything, Array, Boolean, Field, Nullable, Number, Object, Table, Text
from sysctr.api.route import Call, Route

_PATH = Text(4096, raw=True)
_ARCHIVE = Field("archive", _PATH, "its absolute path, or its name alone", required=True)
_DIRECTORY = Field("directory", Nullable(_PATH), "absolute path of a directory; without it the host's own")
_COUNT = Nullable(Number(0, 1000))
KEEP_FIELDS = tuple(
    Field(f"keep_{rule}", _COUNT, doc)
    for rule, doc in (
        ("last", "archives of a container to keep"), ("hourly", "hours of which the last one is kept"),
        ("daily", "days of which the last one is kept"), ("weekly", "weeks of which the last one is kept"),
        ("monthly", "months of which the last one is kept"),
        ("yearly", "years of which the last one is kept"),
    )
)  # fmt: skip


def _prune(engine: Any, call: Call) -> Any:
    body = call.body
    return engine.archiving.prune(
        body.get("directory"),
        keep=body.get("keep"),
        containers=body.get("containers", []),
        dry_run=body.get("dry_run", False),
    )


BACKUP_ROUTES: tuple[Route, ...] = (
    Route(
        "GET", "/1/backups", lambda engine, call: engine.archiving.list(call.query.get("directory")),
        "all archives, and what there is of each container",
        query=(Field("directory", _PATH, "only those in this directory"),),
        answer="archives containers problems",
    ),
    Route(
        "GET", "/1/backups/archive",
        lambda engine, call: {"archive": engine.archiving.show(call.query["archive"])},
        "an archive with its notes and log", query=(_ARCHIVE,), answer="archive",
    ),
    Route(
        "DELETE", "/1/backups/archive", lambda engine, call: engine.archiving.remove(call.body["archive"]),
        "remove an archive that is not protected", (_ARCHIVE,), answer="task", status=202,
    ),
    Route(
        "POST", "/1/backups/protect",
        lambda engine, call: {
            "archive": engine.archiving.protect(call.body["archive"], call.body["protected"])
        },
        "protect an archive from being removed and pruned, or no longer",
        (_ARCHIVE, Field("protected", Boolean(), "whether", required=True)), answer="archive",
    ),
    Route(
        "POST", "/1/backups/notes",
        lambda engine, call: {"archive": engine.archiving.notes(call.body["archive"], call.body["notes"])},
        "write down something about an archive",
        (_ARCHIVE, Field("notes", Text(65536), "the text; empty: none", required=True)), answer="archive",
    ),
    Route(
        "POST", "/1/backups/prune", _prune, "remove the archives that no rule keeps",
        (
            _DIRECTORY,
            Field("keep", Nullable(Object(KEEP_FIELDS)), "rules; without them those of the host's settings"),
            Field("containers", Array(Text(63), 4096), "only of these, by id or name"),
            Field("dry_run", Boolean(), "only say which"),
        ),
        answer="task", status=202,
    ),
    # Jobs
    Route(
        "GET", "/1/backup-jobs", lambda engine, call: {"jobs": engine.backup_jobs.list()},
        "all backup jobs with what became of their last runs", answer="jobs",
    ),
    Route(
        "POST", "/1/backup-jobs",
        lambda engine, call: engine.backup_jobs.add(call.body["name"], call.body["settings"]),
        "make a backup job",
        (
            Field("name", Text(63), "unique name: lower-case letters, digits, -", required=True),
            Field("settings", Table(Anything()), "the keys of its file", required=True),
        ),
        answer="job notes",
    ),
    Route(
        "GET", "/1/backup-jobs/{name}", lambda engine, call: engine.backup_jobs.show(call.path["name"]),
        "a backup job, and its file", answer="job toml digest",
    ),
    Route(
        "PUT", "/1/backup-jobs/{name}",
        lambda engine, call: engine.backup_jobs.replace(
            call.path["name"], call.body["toml"], call.body["digest"]
        ),
        "replace the file of a backup job",
        (
            Field("toml", Text(256 << 10), "the whole text", required=True),
            Field("digest", Text(128), "of the text that was edited", required=True),
        ),
        answer="job notes",
    ),
    Route(
        "DELETE", "/1/backup-jobs/{name}", lambda engine, call: engine.backup_jobs.remove(call.path["name"]),
        "forget a backup job; its archives stay",
    ),
    Route(
        "POST", "/1/backup-jobs/{name}/run", lambda engine, call: engine.backup_jobs.run(call.path["name"]),
        "run a backup job now", answer="task", status=202,
    ),
)  # fmt: skip
