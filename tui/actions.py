"""Everything that can be done here: the one list that makes keys, footer, help, menus, palette and read-only.

An action is data. What it asks for is a form (sysctr.tui.forms), what it then does is one request to the API
for each item; the few that do more name a method of the app (`flow`). The words are the command line's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sysctr.cli.progress import ENDED
from sysctr.client import path
from sysctr.tui.forms import (
    BACKUP,
    BUILD,
    CLONE,
    COPY,
    CREATE,
    IMPORT_LXC,
    IMPORT_TEMPLATE,
    JOB,
    JOIN,
    LIMITS,
    MIGRATE,
    MOUNT,
    NAME_TEMPLATE,
    NOTES,
    PASSWORD,
    PEER_RIGHTS,
    POOL,
    PROMOTE,
    PRUNE,
    RENAME,
    REPLICATE,
    RESTORE,
    SNAPSHOT,
    TOKEN,
    UNMOUNT,
    Form,
    Values,
)  # fmt: skip
from sysctr.tui.store import Item

# Which list an action is about.
CONTAINERS, TEMPLATES, BACKUPS, TASKS, HOSTS = "containers", "templates", "backups", "tasks", "hosts"
# Lists that open above the others.
SNAPSHOTS, JOBS, POOLS, MIGRATIONS, REPLICAS = "snapshots", "backup-jobs", "pools", "migrations", "replicas"
RUNS = frozenset({"running", "booting", "frozen"})


class Ask(Enum):
    """What is asked before it is done."""

    NOTHING = "nothing"
    # As the settings say: always, only for several, or never.
    YES = "yes"
    # Always: its name typed, or for several how many they are.
    NAME = "name"


@dataclass(frozen=True)
class Target:
    """What an action is done to: an item of a list, its host, and whether that is read-only."""

    host: str
    item: Item
    name: str
    state: str = ""
    busy: str = ""


Request = tuple[str, str, "dict[str, Any] | None"]


@dataclass(frozen=True)
class Action:
    """One thing that can be done. `request` says how, from the item and what was filled in."""

    id: str
    key: str
    title: str
    scope: str
    # Said in the help and the palette.
    help: str
    # The command of the shell that does the same.
    command: str = ""
    mutates: bool = True
    ask: Ask = Ask.NOTHING
    # What is said where it is asked; and the method of the flows that finds out more of one item.
    warning: str = ""
    loses: str = ""
    bulk: bool = False
    # Works without an item.
    free: bool = False
    # Shown in the footer.
    first: bool = False
    # Returns why it cannot be done to an item, empty where it can.
    prevents: Callable[[Target], str] = lambda target: ""
    form: Form | None = None
    request: "Callable[[Item, Values], Request] | None" = None
    # The method of the app that does it, where that is more than a request.
    flow: str = ""
    # What of the API it uses; a test looks for the whole of the API here.
    routes: tuple[str, ...] = ()

    def possible(self, target: Target | None, *, read_only: bool = False) -> str:
        """Return why it cannot be done now, empty where it can."""
        if read_only and self.mutates:
            return "read-only"
        if target is None:
            return "" if self.free else "nothing is chosen"
        if target.busy and self.mutates and self.scope == CONTAINERS and not self.free:
            return f"{target.busy} is under way"
        return self.prevents(target)


def _when(*states: str) -> Callable[[Target], str]:
    def prevents(target: Target) -> str:
        return "" if target.state in states else f"it is {target.state}"

    return prevents


def _not_away(target: Target) -> str:
    return "another host has it" if target.state == "away" else ""


def _on_container(verb: str = "", method: str = "POST") -> Callable[[Item, Values], Request]:
    def request(item: Item, values: Values) -> Request:
        segments = ("containers", item["id"], verb) if verb else ("containers", item["id"])
        return method, path(*segments), values

    return request


def _fixed(method: str, *segments: str) -> Callable[[Item, Values], Request]:
    def request(item: Item, values: Values) -> Request:
        return method, path(*segments), values

    return request


def _at(key: str, method: str, *segments: str) -> Callable[[Item, Values], Request]:
    """Return a request whose address has the item's own name where a segment is "*"."""

    def request(item: Item, values: Values) -> Request:
        return method, path(*(item[key] if one == "*" else one for one in segments)), values

    return request


def _with(
    key: str, field: str, method: str, *segments: str, **fixed: Any
) -> Callable[[Item, Values], Request]:
    """Return a request whose body names the item."""

    def request(item: Item, values: Values) -> Request:
        return method, path(*segments), {**fixed, **values, field: item[key]}

    return request


def _protect(item: Item, values: Values) -> Request:
    return "POST", path("containers", item["id"], "protect"), {"protected": not item.get("protected")}


def _protect_archive(item: Item, values: Values) -> Request:
    return (
        "POST",
        path("backups", "protect"),
        {"archive": item["path"], "protected": not item.get("protected")},
    )


def _freeze(item: Item, values: Values) -> Request:
    verb = "thaw" if item["state"] == "frozen" else "freeze"
    return "POST", path("containers", item["id"], verb), {}


def _clone(item: Item, values: Values) -> Request:
    return "POST", path("containers", item["id"], "clone"), values


def _from_snapshot(verb: str, field: str = "snapshot") -> Callable[[Item, Values], Request]:
    def request(item: Item, values: Values) -> Request:
        return "POST", path("containers", item["container"], verb), {**values, field: item["name"]}

    return request


def _not_now(target: Target) -> str:
    return "it is the present state" if target.state == "now" else ""


def _not_a_host(target: Target) -> str:
    return "" if target.state == "peer" else "it is a host: choose its line below the one that trusts it"


def _change_peer(item: Item, values: Values) -> Request:
    # A name that stays is none that is wanted.
    changes = {key: value for key, value in values.items() if key != "name" or value != item["name"]}
    return "PATCH", path("peers", item["name"]), changes


def _keep(where: str) -> Callable[[Item, Values], Request]:
    return lambda item, values: ("POST", path("migrations", item["id"], "resolve"), {"keep": where})


def _delete_snapshot(item: Item, values: Values) -> Request:
    return "DELETE", path("containers", item["container"], "snapshots"), {"names": [item["name"]]}


def _ref(verb: str) -> tuple[str, ...]:
    return (f"POST /1/containers/{{ref}}/{verb}",)


_CONTAINER_ACTIONS = (
    Action("ct.start", "s", "Start", CONTAINERS, "start it", "start {name}", bulk=True, first=True,
           prevents=_when("stopped"), request=_on_container("start"), routes=_ref("start")),
    Action("ct.stop", "S", "Stop", CONTAINERS, "ask its init to end, kill it after the time-out",
           "stop {name}",
           ask=Ask.YES, bulk=True, first=True, prevents=_when(*RUNS, "starting"),
           request=_on_container("stop"),
           routes=_ref("stop")),
    Action("ct.shutdown", "ctrl+s", "Shut down", CONTAINERS,
           "ask its init to end, and leave it running if it does not",
           "shutdown {name}", ask=Ask.YES, bulk=True, prevents=_when("running", "booting"),
           request=_on_container("shutdown"), routes=_ref("shutdown")),
    Action("ct.kill", "K", "Kill", CONTAINERS, "end it at once", "stop --kill {name}", ask=Ask.YES, bulk=True,
           warning="What its programs have not written is lost.", prevents=_when(*RUNS, "starting",
           "stopping"),
           request=lambda item, values: ("POST", path("containers", item["id"], "stop"), {"kill": True})),
    Action("ct.reboot", "r", "Reboot", CONTAINERS, "shut it down and start it again", "reboot {name}",
           ask=Ask.YES,
           bulk=True, prevents=_when("running", "booting"), request=_on_container("reboot"),
           routes=_ref("reboot")),
    Action("ct.freeze", "f", "Freeze/thaw", CONTAINERS, "hold all its processes, or let them go on",
           "freeze {name}",
           ask=Ask.YES, bulk=True, prevents=_when(*RUNS), request=_freeze, routes=(*_ref("freeze"),
           *_ref("thaw"))),
    Action("ct.console", "c", "Console", CONTAINERS, "attach to its console", "console {name}",
           first=True, prevents=_when(*RUNS), flow="console", routes=_ref("console")),
    Action("ct.shell", "e", "Shell", CONTAINERS, "open a login shell inside", "enter {name}", first=True,
           prevents=_when("running", "booting"), flow="shell", routes=_ref("exec")),
    Action("ct.logs", "l", "Logs", CONTAINERS, "read what it wrote to its console", "logs -f {name}",
           mutates=False,
           flow="logs"),
    Action("ct.create", "n", "New", CONTAINERS, "create a container from a template", "create NAME",
           free=True,
           first=True, form=CREATE, request=_fixed("POST", "containers"), routes=("POST /1/containers",)),
    Action("ct.clone", "o", "Clone", CONTAINERS, "make a container of it", "clone {name} NAME", form=CLONE,
           prevents=_not_away, request=_clone, routes=_ref("clone")),
    Action("ct.edit", "E", "Edit", CONTAINERS, "edit its configuration in $EDITOR", "edit {name}",
           flow="edit",
           routes=("PUT /1/containers/{ref}/config",)),
    Action("ct.limits", "L", "Limits", CONTAINERS, "change cores, memory, swap, disk",
           "set {name} limits.memory=2G",
           form=LIMITS, prevents=_not_away, flow="limits", routes=("PATCH /1/containers/{ref}/config",)),
    Action("ct.rename", "f2", "Rename", CONTAINERS, "give it another name", "rename {name} NAME", form=RENAME,
           request=_on_container("rename"), routes=_ref("rename")),
    Action("ct.protect", "p", "Protect", CONTAINERS, "keep it from being destroyed, or do not any more",
           "protect {name}", request=_protect, routes=_ref("protect")),
    Action("ct.passwd", "", "Password", CONTAINERS, "set a password inside", "passwd {name}", form=PASSWORD,
           prevents=_not_away, request=_on_container("passwd"), routes=_ref("passwd")),
    Action("ct.mount", "", "Add a mount point", CONTAINERS, "mount a volume, a host path or a device in it",
           "mount add {name} …", form=MOUNT, prevents=_not_away, flow="add_mount",
           routes=_ref("mounts")),
    Action("ct.unmount", "", "Remove a mount point", CONTAINERS, "take a mount point away",
           "mount remove {name} …",
           form=UNMOUNT, prevents=_not_away, request=_on_container("mounts", "DELETE"),
           routes=("DELETE /1/containers/{ref}/mounts",)),
    Action("ct.push", "", "Copy in", CONTAINERS, "copy files of this machine into it",
           "push FILE… {name}:PATH",
           prevents=_not_away, flow="push", routes=_ref("files")),
    Action("ct.pull", "", "Copy out", CONTAINERS, "copy files of it to this machine", "pull {name}:PATH FILE",
           prevents=_not_away, flow="pull"),
    Action("ct.snapshot", "t", "Snapshot", CONTAINERS, "keep its present state", "snapshot {name}", bulk=True,
           first=True, form=SNAPSHOT, prevents=_not_away, request=_on_container("snapshots"),
           routes=_ref("snapshots")),
    Action("ct.snapshots", "T", "Snapshots", CONTAINERS, "roll back to, clone, compare or delete snapshots",
           "snapshots {name}", mutates=False, flow="snapshots"),
    Action("ct.diff", "D", "Diff", CONTAINERS, "list what changed since it was created", "diff {name}",
           mutates=False,
           prevents=_not_away, flow="diff", routes=_ref("diff")),
    Action("ct.template", "", "Make a template", CONTAINERS, "make a template of it",
           "template create {name} NAME",
           form=NAME_TEMPLATE, prevents=_not_away, request=_on_container("template"),
           routes=_ref("template")),
    Action("ct.backup", "b", "Backup", CONTAINERS, "write an archive of it", "backup {name}", bulk=True,
           form=BACKUP,
           first=True, prevents=_not_away, request=_on_container("backup"), routes=_ref("backup")),
    Action("ct.migrate", "m", "Migrate", CONTAINERS, "move it to another host",
           "migrate {name} PEER --restart",
           bulk=True, form=MIGRATE, prevents=_not_away, flow="migrate", routes=_ref("migrate")),
    Action("ct.copy", "", "Copy to a host", CONTAINERS, "make a copy of it on another host",
           "copy {name} PEER",
           form=COPY, prevents=_not_away, request=_on_container("copy"), routes=_ref("copy")),
    Action("ct.replicate", "", "Replicate", CONTAINERS, "keep a copy of it on another host up to date",
           "replicate {name} PEER", form=REPLICATE, prevents=_not_away, request=_on_container("replicate"),
           routes=_ref("replicate")),
    Action("ct.unreplicate", "", "End replication", CONTAINERS, "remove its replica",
           "replicate {name} --stop",
           ask=Ask.YES, request=_on_container("replicate", "DELETE"),
           routes=("DELETE /1/containers/{ref}/replicate",)),
    Action("ct.destroy", "d,delete", "Destroy", CONTAINERS, "destroy it and all that is in it",
           "destroy {name}",
           ask=Ask.NAME, bulk=True, warning="Its files and snapshots are gone after that.",
           prevents=lambda target: "it is protected" if target.item.get("protected") else "",
           request=lambda item, values: ("DELETE", path("containers", item["id"]), {"force": True}),
           routes=("DELETE /1/containers/{ref}",)),
)  # fmt: skip

_SNAPSHOT_ACTIONS = (
    Action("snap.rollback", "R", "Roll back", SNAPSHOTS, "bring the container back to this state",
           "rollback {container} {name}", ask=Ask.NAME, warning="What changed since then is lost.",
           loses="changes", first=True, prevents=_not_now, request=_from_snapshot("rollback"),
           routes=_ref("rollback")),
    Action("snap.clone", "o", "Clone", SNAPSHOTS, "make a container of this state",
           "clone {container} NAME --snapshot {name}", form=CLONE, first=True, prevents=_not_now,
           request=_from_snapshot("clone")),
    Action("snap.diff", "D", "Diff", SNAPSHOTS, "list what changed since", "diff {container} {name}",
           mutates=False,
           first=True, prevents=_not_now, flow="diff"),
    Action("snap.delete", "d,delete", "Delete", SNAPSHOTS, "delete it", "delsnapshot {container} {name}",
           ask=Ask.YES, bulk=True, first=True, prevents=_not_now, request=_delete_snapshot,
           routes=("DELETE /1/containers/{ref}/snapshots",)),
)  # fmt: skip

_TEMPLATE_ACTIONS = (
    Action("template.new", "n", "New container", TEMPLATES, "create a container from it",
           "create NAME --template {name}",
           form=CREATE, first=True, request=_with("name", "template", "POST", "containers")),
    Action("template.build", "B", "Build", TEMPLATES, "build a template from a recipe",
           "template build RECIPE",
           free=True, first=True, form=BUILD, request=_fixed("POST", "templates", "build"),
           routes=("POST /1/templates/build",)),
    Action("template.import", "i", "Import", TEMPLATES, "make a template of an archive on the host",
           "template import FILE", free=True, first=True, form=IMPORT_TEMPLATE,
           request=_fixed("POST", "templates", "import"), routes=("POST /1/templates/import",)),
    Action("template.remove", "d,delete", "Remove", TEMPLATES, "remove it", "template remove {name}",
           ask=Ask.YES,
           bulk=True, request=_at("name", "DELETE", "templates", "*"),
           routes=("DELETE /1/templates/{name}",)),
)  # fmt: skip

_BACKUP_ACTIONS = (
    Action("backup.restore", "r", "Restore", BACKUPS, "make a container of it", "restore {path}", first=True,
           form=RESTORE, request=_with("path", "archive", "POST", "restore"), routes=("POST /1/restore",)),
    Action("backup.verify", "v", "Verify", BACKUPS, "prove that it can be restored", "backup verify {path}",
           bulk=True,
           mutates=False, first=True, request=_with("path", "archive", "POST", "backups", "verify"),
           routes=("POST /1/backups/verify",)),
    Action("backup.protect", "p", "Protect", BACKUPS, "keep it from being removed, or do not any more",
           "backup protect {path}", bulk=True, request=_protect_archive, routes=("POST /1/backups/protect",)),
    Action("backup.notes", "N", "Notes", BACKUPS, "write its notes", "backup notes {path}", form=NOTES,
           flow="notes",
           request=_with("path", "archive", "POST", "backups", "notes"), routes=("POST /1/backups/notes",)),
    Action("backup.remove", "d,delete", "Remove", BACKUPS, "remove it", "backup remove {path}", ask=Ask.NAME,
           bulk=True, prevents=lambda target: "it is protected" if target.item.get("protected") else "",
           request=_with("path", "archive", "DELETE", "backups", "archive"),
           routes=("DELETE /1/backups/archive",)),
    Action("backup.prune", "P", "Prune", BACKUPS, "remove those that no rule keeps", "backup prune",
           free=True,
           form=PRUNE, flow="prune", routes=("POST /1/backups/prune",)),
    Action("job.list", "J", "Jobs", BACKUPS, "run, edit or remove backup jobs", "backup job list", free=True,
           mutates=False, first=True, flow="jobs"),
)  # fmt: skip

_TASK_ACTIONS = (
    Action("task.log", "l", "Log", TASKS, "read its log", "task show {id}", mutates=False, first=True,
           flow="task_log"),
    Action("task.cancel", "d,delete", "Cancel", TASKS, "cancel it", "task cancel {id}", bulk=True, first=True,
           ask=Ask.YES,
           prevents=lambda target: f"it is {target.state}" if target.state in ENDED else "",
           request=_at("id", "DELETE", "tasks", "*"), routes=("DELETE /1/tasks/{id}",)),
)  # fmt: skip

_HOST_ACTIONS = (
    Action("host.scope", "enter", "Only this one", HOSTS, "show what is on this host alone", mutates=False,
           flow="scope"),
    Action("host.doctor", "D", "Doctor", HOSTS, "check it", "doctor", mutates=False, first=True,
           flow="doctor"),
    Action("peer.token", "t", "Token", HOSTS, "make a token with which another host can join", "peer token",
           free=True,
           first=True, form=TOKEN, flow="token", routes=("POST /1/peers/token",)),
    Action("peer.join", "a", "Join", HOSTS, "trust the host that made a token", "peer join", free=True,
           first=True,
           form=JOIN, request=_fixed("POST", "peers", "join"), routes=("POST /1/peers/join",)),
    Action("peer.change", "E", "Change", HOSTS, "rename a peer, and say what it may do",
           "peer restrict {name}",
           form=PEER_RIGHTS, prevents=_not_a_host, request=_change_peer, routes=("PATCH /1/peers/{name}",)),
    Action("peer.remove", "d,delete", "Remove", HOSTS, "end the trust between both", "peer remove {name}",
           ask=Ask.NAME, prevents=_not_a_host, request=_at("name", "DELETE", "peers", "*"),
           routes=("DELETE /1/peers/{name}",)),
    Action("peer.rotate", "", "New key", HOSTS, "get a new key and tell all peers", "peer rotate", free=True,
           ask=Ask.YES, request=_fixed("POST", "peers", "rotate"), routes=("POST /1/peers/rotate",)),
    Action("migration.list", "m", "Migrations", HOSTS, "what is on its way, or in doubt", "migrations",
           free=True,
           mutates=False, flow="migrations"),
    Action("replica.list", "c", "Replicas", HOSTS, "copies of containers that are kept up to date",
           "replicate --list",
           free=True, mutates=False, flow="replicas"),
    Action("pool.list", "p", "Pools", HOSTS, "what the storage pools have left", "pool list", free=True,
           mutates=False, first=True, flow="pools"),
    Action("import.lxc", "", "Import from LXC", HOSTS, "make a container of one that LXC keeps there",
           "import lxc NAME", free=True, form=IMPORT_LXC, request=_fixed("POST", "import", "lxc"),
           routes=("POST /1/import/lxc",)),
    Action("host.recover", "", "Recover", HOSTS, "rebuild lost records of containers", "recover", free=True,
           ask=Ask.YES, request=_fixed("POST", "recover"), routes=("POST /1/recover",)),
)  # fmt: skip

_OTHER_ACTIONS = (
    Action("job.run", "r", "Run", JOBS, "run it now", "backup job run {name}", first=True, bulk=True,
           request=_at("name", "POST", "backup-jobs", "*", "run"),
           routes=("POST /1/backup-jobs/{name}/run",)),
    Action("job.add", "a", "New job", JOBS, "make a job that backs up by itself", "backup job add NAME",
           free=True,
           first=True, form=JOB, request=_fixed("POST", "backup-jobs"), routes=("POST /1/backup-jobs",)),
    Action("job.edit", "E", "Edit", JOBS, "edit its file in $EDITOR", "backup job edit {name}", first=True,
           flow="edit_job", routes=("PUT /1/backup-jobs/{name}",)),
    Action("job.remove", "d,delete", "Remove", JOBS, "forget it; its archives stay",
           "backup job remove {name}",
           ask=Ask.YES, first=True, request=_at("name", "DELETE", "backup-jobs", "*"),
           routes=("DELETE /1/backup-jobs/{name}",)),
    Action("pool.add", "a", "New pool", POOLS, "make a directory a storage pool", "pool add NAME", free=True,
           first=True,
           form=POOL, request=_fixed("POST", "pools"), routes=("POST /1/pools",)),
    Action("pool.remove", "d,delete", "Remove", POOLS, "forget a pool that no container is in",
           "pool remove {name}",
           ask=Ask.YES, first=True, request=_at("name", "DELETE", "pools", "*"),
           routes=("DELETE /1/pools/{name}",)),
    Action("migration.ask", "r", "Ask again", MIGRATIONS, "ask the other host at once",
           "migrate --resolve {name}",
           first=True, request=_at("id", "POST", "migrations", "*", "resolve"),
           routes=("POST /1/migrations/{id}/resolve",)),
    Action("migration.here", "h", "It is here", MIGRATIONS, "this host has the container from now on",
           "migrate --resolve {name} --here", first=True, ask=Ask.NAME,
           warning="Only if the other host is lost: else both may run it.", request=_keep("here")),
    Action("migration.there", "t", "It is there", MIGRATIONS, "the other host has the container from now on",
           "migrate --resolve {name} --there", first=True, ask=Ask.NAME,
           warning="What is here of it is given up.", request=_keep("there")),
    Action("replica.promote", "P", "Promote", REPLICAS, "make it the container, when its host is lost",
           "promote {name}", first=True, form=PROMOTE,
           prevents=lambda target: "" if target.item.get("role") == "replica" else "its container is here",
           request=lambda item, values: ("POST", path("replicas", item["name"], "promote"), values),
           routes=("POST /1/replicas/{ref}/promote",)),
)  # fmt: skip

ACTIONS = (
    *_CONTAINER_ACTIONS, *_SNAPSHOT_ACTIONS, *_TEMPLATE_ACTIONS, *_BACKUP_ACTIONS, *_TASK_ACTIONS,
    *_HOST_ACTIONS,
    *_OTHER_ACTIONS,
)  # fmt: skip
BY_ID: Mapping[str, Action] = {action.id: action for action in ACTIONS}
# What of the API is for programs, and for no key.
NOT_HERE = {
    "POST /1/daemon/stop": "who stops the daemon does not want to look on",
    "POST /1/supervisor/upgrade": "packaging does it",
    "PUT /1/restore": "an archive that comes from a pipe",
    "POST /1/pct": "sysctr import-pct reads the file of the host it runs on",
    "POST /1/pct/check": "sysctr import-pct reads the file of the host it runs on",
}


def of_scope(scope: str) -> Sequence[Action]:
    """Return the actions of one list."""
    return [action for action in ACTIONS if action.scope == scope]
