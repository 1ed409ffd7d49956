"""The routes that make archives and containers of them; those that stream are in archive_streams.py."""

from typing import Any

from sysctr.api import archive_streams
from sysctr.api.archive_fields import BACKUP, PATH, REQUEST, RESTORE
from sysctr.api.fields import Field, Nullable, Text
from sysctr.api.route import BYTES, Call, Route


def _restore(engine: Any, call: Call) -> Any:
    spec = call.given
    return engine.archive.restore(spec.pop("archive"), spec)


def _import_lxc(engine: Any, call: Call) -> Any:
    spec = call.given
    return engine.archive.import_lxc(spec.pop("container"), spec.pop("directory", ""), spec)


ARCHIVE_ROUTES: tuple[Route, ...] = (
    Route(
        "POST", "/1/containers/{ref}/backup",
        lambda engine, call: engine.archive.backup(call.ref, call.given),
        "write an archive of a container into a directory", BACKUP, answer="task", status=202,
    ),
    Route(
        "GET", "/1/containers/{ref}/archive", archive_streams.download,
        "an archive of a container, as it is written; one that is not whole breaks the connection",
        query=(Field("request", REQUEST, "JSON: mode, compress, exclude, bwlimit_bytes"),), media=BYTES,
    ),
    Route(
        "POST", "/1/restore", _restore, "make a container of an archive on this host",
        (Field("archive", PATH, "its absolute path, or its name alone", required=True), *RESTORE),
        answer="task", status=202,
    ),
    Route(
        "PUT", "/1/restore", archive_streams.upload,
        "make a container of the archive that the body is, of any length",
        query=(Field("request", REQUEST, "JSON: id, name, pool, force, unique, start, allow, set"),),
        answer="task", status=202, streams=True,
    ),
    Route(
        "POST", "/1/import/lxc", _import_lxc, "make a container of a stopped one of LXC on this host",
        (
            Field("container", Text(255, raw=True), "its name in LXC", required=True),
            Field("directory", Nullable(PATH), "where LXC keeps its containers; without it /var/lib/lxc"),
            *RESTORE,
        ),
        answer="task", status=202,
    ),
    Route(
        "POST", "/1/backups/verify", lambda engine, call: engine.archive.verify(call.body["archive"]),
        "prove that an archive can be restored, without restoring it",
        (Field("archive", PATH, "its absolute path, or its name alone", required=True),),
        answer="task", status=202,
    ),
)  # fmt: skip
