"""The table of the API: every route with its fields, and what of the engine it calls.

The engine's methods are synchronous; these actions run in worker threads. An action that returns a Task is
answered with 202. Actions that wait or stream are coroutines and live in live.py and websocket.py. The table
is also what GET /1/openapi.json is made from.
"""

from typing import Any

from sysctr.api import live, openapi, websocket
from sysctr.api.fields import Anything, Array, Boolean, Field, Nullable, Number, Table, Text
from sysctr.api.route import BYTES, STREAM, Call, Route
from sysctr.api.routes_archive import ARCHIVE_ROUTES
from sysctr.api.routes_backup import BACKUP_ROUTES
from sysctr.api.routes_migrate import MIGRATE_ROUTES
from sysctr.api.routes_peer import PEER_ROUTES
from sysctr.api.websocket import EXEC_REQUEST

TASK_STATES = ("queued", "running", "done", "failed", "cancelled")
NAME = Text(63)
PATH = Text(4096, raw=True)
SECONDS = Number(0, 86400, whole=False)
LONG_POLL = Field("timeout", Number(0, 600, whole=False), "seconds to wait (60)")
TIMEOUT = Field("timeout_s", Nullable(SECONDS), "seconds that the init may take")
FORCE = Field("force", Boolean(), "even if it runs")
ENVIRONMENT = Table(Text(32768, raw=True))

CREATE = (
    Field("name", NAME, "unique name: lower-case letters, digits, -", required=True),
    Field("id", Nullable(Number(100, 9999)), "number; without it the first free one"),
    Field("template", Nullable(Text(128)), "name of a template; without it the host's default"),
    Field("pool", Nullable(NAME), "pool that it is kept in; without it the host's default"),
    Field("set", Table(Anything()), "settings by key, as in `sysctr set`"),
    Field("ssh_keys", Array(Text(16384)), "public keys that may log in as root"),
    Field("password", Nullable(Text(1024)), "root's password"),
    Field("environment", ENVIRONMENT, "environment of the init"),
    Field("tags", Array(Text(63)), "tags"),
    Field("mounts", Array(Anything(), 32), "mount points: the keys of [mount.N], or target=T,size=S"),
    Field("devices", Array(Anything(), 32), "devices: the keys of [device.N], or fuse, tun, a path"),
    Field("nets", Array(Anything(), 16), "network cards: the keys of [net.N], or name=eth0,bridge=B,ip=A/N"),
    Field("onboot", Boolean(), "start it with the host"),
    Field("start", Boolean(), "start it at once"),
)
PCT = (
    Field("pct", Text(256 << 10, raw=True), "the text of the pct.conf", required=True),
    Field("name", Nullable(NAME), "name; without it the file's host name"),
    Field("id", Nullable(Number(100, 9999)), "number; without it the first free one"),
    Field("template", Nullable(Text(128)), "name of a template; without it the host's default"),
    Field("pool", Nullable(NAME), "pool that it is kept in; without it the host's default"),
    Field("allow", Array(Text(16)), "what of the host it may be given: bind, device, raw, feature"),
    Field("set", Table(Anything()), "settings by key that differ"),
    Field("start", Boolean(), "start it at once"),
)
SNAPSHOT = Text(63)
CLONE = (
    Field("name", NAME, "unique name of the new container", required=True),
    Field("id", Nullable(Number(100, 9999)), "its number; without it the first free one"),
    Field("snapshot", Nullable(SNAPSHOT), "of this state; without it the present one"),
    Field("pool", Nullable(NAME), "where to keep it; without it where the original is"),
    Field("full", Boolean(), "copy all data, also where the storage could share it"),
    Field("keep_addresses", Boolean(), "keep addresses that are set by hand"),
    Field("set", Table(Anything()), "settings by key that differ"),
    Field("start", Boolean(), "start it at once"),
)
FILES = (
    Field("op", Text(choices=("push", "pull")), "which way", required=True),
    Field("path", PATH, "absolute path inside", required=True),
    Field("names", Array(PATH, 4096), "push: names of what comes"),
    Field("user", Nullable(Text(256)), "push: owner inside, by name or number"),
    Field("group", Nullable(Text(256)), "push: group inside, by name or number"),
    Field("mode", Nullable(Text(4)), "push: mode of files, in octal"),
)


def _act(verb: str, *fields: Field) -> Route:
    def action(engine: Any, call: Call) -> Any:
        return getattr(engine, verb)(call.ref, **call.body)

    return Route(
        "POST",
        f"/1/containers/{{ref}}/{verb}",
        action,
        f"{verb} a container",
        fields,
        answer="task",
        status=202,
    )


def _create(engine: Any, call: Call) -> Any:
    return engine.create(call.given)


def _tasks(engine: Any, call: Call) -> Any:
    return {"tasks": [task.as_dict() for task in engine.tasks.list(call.query.get("state"))]}


def _template_build(engine: Any, call: Call) -> Any:
    return engine.template_build(
        call.body["recipe"], name=call.body.get("name"), settings=call.body.get("set", {})
    )


ROUTES: tuple[Route, ...] = (
    Route("GET", "/1/openapi.json", lambda engine, call: openapi.document(ROUTES), "this description"),
    Route("GET", "/1/daemon", live.daemon_status, "the daemon's and the supervisor's state", answer="daemon"),
    Route("POST", "/1/daemon/stop", live.daemon_stop, "end the daemon; containers go on running"),
    Route("GET", "/1/host", live.host, "the host", answer="host"),
    Route(
        "POST", "/1/supervisor/upgrade", lambda engine, call: {"supervisor": engine.upgrade_supervisor()},
        "let the supervisor execute the code on disk; containers do not notice", answer="supervisor",
    ),
    Route(
        "GET", "/1/doctor", lambda engine, call: {"checks": engine.doctor()},
        "check the host", answer="checks",
    ),
    Route("GET", "/1/events", live.events, "what happens from now on, as server-sent events", media=STREAM),
    # Tasks
    Route(
        "GET", "/1/tasks", _tasks, "tasks, oldest first", answer="tasks",
        query=(Field("state", Text(choices=TASK_STATES), "only these"),),
    ),
    Route(
        "GET", "/1/tasks/{id}", lambda engine, call: {"task": engine.tasks.get(call.path["id"]).as_dict()},
        "a task", answer="task",
    ),
    Route(
        "GET", "/1/tasks/{id}/log", lambda engine, call: engine.tasks.read_log(call.path["id"]),
        "the log of a task", media=BYTES,
    ),
    Route(
        "GET", "/1/tasks/{id}/wait", live.task_wait, "the task when it has ended, or after the time-out",
        query=(LONG_POLL,), answer="task",
    ),
    Route("DELETE", "/1/tasks/{id}", live.task_cancel, "ask a task to stop", answer="task"),
    # Containers
    Route(
        "GET", "/1/containers",
        lambda engine, call: {
            "containers": engine.list(tag=call.query.get("tag")), "notices": engine.notices()
        },
        "all containers, and what to know of this host",
        query=(Field("tag", Text(63), "only with this tag"),), answer="containers notices",
    ),
    Route("POST", "/1/containers", _create, "create a container", CREATE, answer="task", status=202),
    Route(
        "GET", "/1/containers/{ref}", lambda engine, call: {"container": engine.info(call.ref)},
        "a container with its usage", answer="container",
    ),
    Route(
        "DELETE", "/1/containers/{ref}", lambda engine, call: engine.destroy(call.ref, **call.body),
        "destroy a container and its files", (FORCE,), answer="task", status=202,
    ),
    _act("start"),
    _act("stop", TIMEOUT, Field("kill", Boolean(), "do not ask the init")),
    _act("shutdown", TIMEOUT),
    _act("reboot", TIMEOUT),
    _act("freeze"),
    _act("thaw"),
    Route(
        "GET", "/1/containers/{ref}/config", lambda engine, call: engine.config(call.ref),
        "the configuration as text and as values", answer="toml config pending in_force digest",
    ),
    Route(
        "PATCH", "/1/containers/{ref}/config",
        lambda engine, call: engine.set_config(call.ref, call.body["changes"]),
        "change settings",
        (Field("changes", Table(Anything()), "values by key, null unsets", required=True),),
        answer="applied pending",
    ),
    Route(
        "PUT", "/1/containers/{ref}/config",
        lambda engine, call: engine.put_config(call.ref, call.body["toml"], call.body["digest"]),
        "replace the configuration's text",
        (
            Field("toml", Text(256 << 10), "the whole text", required=True),
            Field("digest", Text(128), "of the text that was edited", required=True),
        ),
        answer="applied pending",
    ),
    Route(
        "GET", "/1/containers/{ref}/pct", lambda engine, call: engine.export_pct(call.ref),
        "the configuration as Proxmox's pct.conf, and what that cannot say", answer="pct notes",
    ),
    Route(
        "POST", "/1/pct", lambda engine, call: engine.import_pct(call.given),
        "create a container with the settings of a pct.conf", PCT, answer="task", status=202,
    ),
    Route(
        "POST", "/1/pct/check", lambda engine, call: engine.check_pct(call.given),
        "what a container made of a pct.conf would be", PCT, answer="name template toml kept notes",
    ),
    Route(
        "GET", "/1/containers/{ref}/mounts", lambda engine, call: {"mounts": engine.mount_list(call.ref)},
        "mount points, devices and kept volumes", answer="mounts",
    ),
    Route(
        "POST", "/1/containers/{ref}/mounts", lambda engine, call: engine.mount_add(call.ref, **call.body),
        "add a mount point or a device, at once where it runs",
        (
            Field("mount", Anything(), "the keys of [mount.N], or one line: target=/data,size=8G"),
            Field("device", Anything(), "the keys of [device.N], or one line: fuse"),
        ),
        answer="applied pending notes key",
    ),
    Route(
        "DELETE", "/1/containers/{ref}/mounts",
        lambda engine, call: engine.mount_remove(call.ref, **call.body),
        "remove a mount point or a device",
        (
            Field("which", PATH, "its target, number or table, or a kept volume", required=True),
            Field("data", Nullable(Text(choices=("keep", "delete"))), "what becomes of a volume"),
        ),
        answer="applied pending notes volume deleted",
    ),
    Route(
        "POST", "/1/containers/{ref}/rename", lambda engine, call: engine.rename(call.ref, call.body["name"]),
        "give another name", (Field("name", NAME, "the new name", required=True),),
    ),
    Route(
        "POST", "/1/containers/{ref}/protect",
        lambda engine, call: engine.protect(call.ref, call.body["protected"]),
        "protect from destruction, or no longer", (Field("protected", Boolean(), "whether", required=True),),
    ),
    Route(
        "POST", "/1/containers/{ref}/passwd",
        lambda engine, call: engine.passwd(call.ref, call.body.get("user", "root"), call.body["password"]),
        "set a password",
        (
            Field("user", Text(256), "whose (root)"),
            Field("password", Text(1024), "the new one", required=True),
        ),
        answer="task", status=202,
    ),
    Route(
        "GET", "/1/containers/{ref}/usage", lambda engine, call: {"usage": engine.usage(call.ref)},
        "what it uses now", answer="usage",
    ),
    Route(
        "GET", "/1/containers/{ref}/wait", live.container_wait,
        "the container when it has reached a state, or after the time-out",
        query=(
            Field(
                "state", Text(choices=("stopped", "running", "booted", "frozen")),
                "the state to wait for", required=True,
            ),
            LONG_POLL,
        ),
        answer="container",
    ),
    Route(
        "GET", "/1/containers/{ref}/logs", live.logs, "what the container wrote", media=BYTES,
        query=(
            Field("kind", Text(64), "which log (console)"),
            Field("follow", Boolean(), "go on with what comes"),
        ),
    ),
    # Snapshots, and what is made of containers
    Route(
        "GET", "/1/containers/{ref}/snapshots", lambda engine, call: engine.history.snapshots(call.ref),
        "its snapshots, oldest first, and the one that the present goes back to", answer="snapshots parent",
    ),
    Route(
        "POST", "/1/containers/{ref}/snapshots",
        lambda engine, call: engine.history.snapshot(call.ref, **call.given), "keep its present state",
        (
            Field("name", Nullable(SNAPSHOT), "name; without it one of the time"),
            Field("description", Text(1024), "one line for people"),
            Field("expires", Nullable(Text(16)), "delete it after this time, such as 12h or 7d"),
        ),
        answer="task", status=202,
    ),
    Route(
        "DELETE", "/1/containers/{ref}/snapshots",
        lambda engine, call: engine.history.delsnapshot(
            call.ref, call.body.get("names", []), every=call.body.get("all", False)
        ),
        "delete snapshots",
        (Field("names", Array(SNAPSHOT, 1024), "which"), Field("all", Boolean(), "every one")),
        answer="task", status=202,
    ),
    Route(
        "POST", "/1/containers/{ref}/rollback",
        lambda engine, call: engine.history.rollback(call.ref, call.body["snapshot"]),
        "bring it back to a snapshot; one that runs is killed, and started again",
        (Field("snapshot", SNAPSHOT, "its name", required=True),), answer="task", status=202,
    ),
    Route(
        "POST", "/1/containers/{ref}/clone",
        lambda engine, call: engine.history.clone(call.ref, call.given),
        "make a container of it", CLONE, answer="task", status=202,
    ),
    Route(
        "POST", "/1/containers/{ref}/template",
        lambda engine, call: engine.history.template(call.ref, **call.given), "make a template of it",
        (
            Field("name", Text(128), "name of the template", required=True),
            Field("snapshot", Nullable(SNAPSHOT), "of this state; without it the present one"),
            Field("description", Text(1024), "one line for people"),
        ),
        answer="task", status=202,
    ),
    Route(
        "POST", "/1/containers/{ref}/diff",
        lambda engine, call: engine.history.diff(call.ref, **call.given),
        "compare its files with a snapshot, or with its template",
        (Field("snapshot", Nullable(SNAPSHOT), "with this one; without it the template"),),
        answer="task", status=202,
    ),
    Route(
        "POST", "/1/recover", lambda engine, call: engine.history.recover(**call.body),
        "rebuild the records of containers that only their volumes remember",
        (Field("dry_run", Boolean(), "only say which"),), answer="recovered problems",
    ),
    # Local programs: a ticket for the supervisor's socket. From elsewhere: a websocket.
    Route(
        "POST", "/1/containers/{ref}/exec", lambda engine, call: engine.exec_ticket(call.ref, call.body),
        "a ticket to run a program", EXEC_REQUEST.fields, answer="ticket socket",
    ),
    Route(
        "POST", "/1/containers/{ref}/console", lambda engine, call: engine.console_ticket(call.ref),
        "a ticket for the console", answer="ticket socket",
    ),
    Route(
        "POST", "/1/containers/{ref}/files", lambda engine, call: engine.files_ticket(call.ref, call.body),
        "a ticket to push or pull files", FILES, answer="ticket socket",
    ),
    Route("GET", "/1/containers/{ref}/exec/ws", websocket.exec_in, "run a program (websocket)", status=101),
    Route("GET", "/1/containers/{ref}/console/ws", websocket.console, "the console (websocket)", status=101),
    # Pools
    Route("GET", "/1/pools", lambda engine, call: {"pools": engine.pool_list()}, "all pools", answer="pools"),
    Route(
        "GET", "/1/pools/{name}", lambda engine, call: {"pool": engine.pool_show(call.path["name"])},
        "a pool with its volumes and templates", answer="pool",
    ),
    Route(
        "POST", "/1/pools", lambda engine, call: {"pool": engine.pool_add(**call.body)},
        "make a directory of this host a pool",
        (
            Field("name", NAME, "unique name: lower-case letters, digits, -", required=True),
            Field("driver", Text(16), "overlay, btrfs, loop or zfs", required=True),
            Field("path", PATH, "absolute path of the directory, which is made", required=True),
            Field("low_space", Nullable(Text(8)), "warn when less than this is free (10%)"),
            Field("force", Boolean(), "even if other files are in it"),
        ),
        answer="pool",
    ),
    Route(
        "DELETE", "/1/pools/{name}",
        lambda engine, call: engine.pool_remove(call.path["name"], **call.body),
        "forget a pool that no container is in",
        (Field("force", Boolean(), "even if it cannot be reached"),), answer="task", status=202,
    ),
    Route(
        "GET", "/1/df", lambda engine, call: {"disks": engine.disk_usage()},
        "what each container takes of its pool", answer="disks",
    ),
    # Templates
    Route(
        "GET", "/1/templates", lambda engine, call: {"templates": engine.template_list()},
        "all templates", answer="templates",
    ),
    Route(
        "GET", "/1/templates/{name}",
        lambda engine, call: {"template": engine.template_show(call.path["name"])},
        "a template", answer="template",
    ),
    Route(
        "DELETE", "/1/templates/{name}", lambda engine, call: engine.template_remove(call.path["name"]),
        "remove a template",
    ),
    Route(
        "POST", "/1/templates/build", _template_build, "build a template from a recipe",
        (
            Field("recipe", PATH, "name of a recipe, or an absolute path on this host", required=True),
            Field("name", Nullable(Text(128)), "name of the template (the recipe's)"),
            Field("set", Table(Text(4096)), "what the recipe asks for"),
        ),
        answer="task", status=202,
    ),
    Route(
        "POST", "/1/templates/import",
        lambda engine, call: engine.template_import(call.body["path"], name=call.body.get("name")),
        "make a template of an archive",
        (
            Field("path", PATH, "absolute path of a tar archive on this host", required=True),
            Field("name", Nullable(Text(128)), "name of the template (the file's)"),
        ),
        answer="task", status=202,
    ),
    *BACKUP_ROUTES,
    *ARCHIVE_ROUTES,
    *MIGRATE_ROUTES,
    *PEER_ROUTES,
)  # fmt: skip
