"""The routes that move containers between hosts."""

from sysctr.api.fields import Array, Boolean, Field, Nullable, Number, Table, Text
from sysctr.api.route import Route
from sysctr.engine.replication import LEAST_EVERY_S

_NAME = Text(63)
_PEER = Field("peer", _NAME, "name of the other host, as in `sysctr peer list`", required=True)
_WISHES = (
    Field("id", Nullable(Number(100, 9999)), "its number there; without it the same, where that is free"),
    Field("name", Nullable(_NAME), "its name there"),
    Field("start", Boolean(), "start it there, even if it does not run here"),
    Field("pool_map", Table(_NAME), "for a pool of this host the one to use there"),
    Field("bridge_map", Table(Text(15)), "for a bridge of this host the one to use there"),
    Field("leave_out", Array(Text(16, choices=("bind", "device")), 8), "what of this host it can do without"),
    Field("bwlimit_bytes", Nullable(Number(1, 1 << 40)), "most bytes sent in a second"),
    Field("patience_s", Nullable(Number(0, 86400, whole=False)), "how long a peer is waited for"),
    Field("dry_run", Boolean(), "only say what would be done, and what is in the way"),
)


MIGRATE_ROUTES: tuple[Route, ...] = (
    Route(
        "POST", "/1/containers/{ref}/migrate",
        lambda engine, call: engine.migrations.migrate(call.ref, call.given),
        "move a container to a peer",
        (
            _PEER,
            Field("restart", Boolean(), "one that runs is stopped for the last changes, and started there"),
            Field("keep", Boolean(), "keep what is here, as one that is away"),
            *_WISHES,
        ),
        answer="task", status=202,
    ),
    Route(
        "POST", "/1/containers/{ref}/copy",
        lambda engine, call: engine.migrations.copy(call.ref, call.given),
        "make a copy of a container on a peer, with an identity of its own", (_PEER, *_WISHES),
        answer="task", status=202,
    ),
    Route(
        "GET", "/1/migrations", lambda engine, call: {"migrations": engine.migrations.list()},
        "every migration that is under way or in doubt", answer="migrations",
    ),
    Route(
        "POST", "/1/migrations/{id}/resolve",
        lambda engine, call: engine.migrations.resolve(call.path["id"], call.body.get("keep")),
        "settle a migration: by talking to the peer, or as the administrator decides",
        (Field("keep", Nullable(Text(5, choices=("here", "there"))), "who has the container from now on"),),
        answer="task", status=202,
    ),
    # Replicas
    Route(
        "POST", "/1/containers/{ref}/replicate",
        lambda engine, call: engine.replication.replicate(call.ref, call.given),
        "keep a replica of a container on a peer, brought up to date now and then",
        (
            _PEER,
            Field("every_s", Nullable(Number(LEAST_EVERY_S, 31 * 86400, whole=False)), "how often (900)"),
            *(one for one in _WISHES if one.name in ("pool_map", "bridge_map", "leave_out", "bwlimit_bytes")),
        ),
        answer="task", status=202,
    ),
    Route(
        "DELETE", "/1/containers/{ref}/replicate",
        lambda engine, call: engine.replication.stop(call.ref, **call.body),
        "end the replication of a container and remove the replica, or a replica that is here",
        (Field("force", Boolean(), "even if the peer cannot be told"),), answer="task", status=202,
    ),
    Route(
        "GET", "/1/replicas", lambda engine, call: {"replicas": engine.replication.list()},
        "the replicas of containers here on peers, and of others' here", answer="replicas",
    ),
    Route(
        "POST", "/1/replicas/{ref}/promote",
        lambda engine, call: engine.replication.promote(call.ref, **call.body),
        "make a container of a replica whose source is lost",
        (
            Field("fenced", Boolean(), "its source does not answer, and does not run for certain"),
            Field("start", Boolean(), "start it at once"),
        ),
        answer="task", status=202,
    ),
)  # fmt: skip
