"""What `pct` of Proxmox VE takes, subcommand by subcommand, and what that is here."""

from sysctr.cli.pct_arguments import Subcommand

_SKIPLOCK = "sysctr has no locks to skip: a task holds a container, and ends or can be cancelled"
_BWLIMIT = "sysctr does not slow this down"
_POOL = "it is a pool of Proxmox's permissions; --storage names a place"
_DIGEST = "sysctr checks another digest; leave it out"
_ALWAYS_UNIQUE = "a container always gets an identity of its own"
_KEEP_ENV = "sysctr never hands the host's environment to a program inside"
_NODE = "there is one host here"

# Options of the configuration, which create, set and restore have alike.
_VALUES = (
    "hostname memory swap cores cpulimit cpuunits description nameserver searchdomain tags features "
    "entrypoint env rootfs startup timezone cmode tty hookscript"
)
_FLAGS = "onboot protection console debug"
_FACTS = {
    "arch=": "the template or the archive says that",
    "ostype=": "the template or the archive says that",
}
_SETTLED = {
    "lock": _SKIPLOCK,
    "template": "`sysctr template create` makes a template, and the container stays",
}
_CREATING = {
    "bwlimit=": _BWLIMIT,
    "pool=": _POOL,
    "ha-managed": "sysctr has no high availability",
    "ignore-unpack-errors": "what cannot be unpacked always ends it",
    **_FACTS,
}

# name: words and options, and what is run instead
SUBCOMMANDS = {
    "list": Subcommand("", "sysctr list, in pct's columns", show="pct_shown.listing"),
    "config": Subcommand(
        "VMID", "sysctr config --format pct", show="pct_shown.config", flags="current",
        refused={"snapshot": "the settings in a snapshot come back with a rollback or a clone alone"},
    ),
    "pending": Subcommand("VMID", "sysctr config --pending, in pct's lines", show="pct_shown.pending"),
    "set": Subcommand(
        "VMID", "sysctr set, sysctr mount remove", plan="pct_settings.change", numbered=True,
        values=f"{_VALUES} delete", flags=f"{_FLAGS} unprivileged", idle=_FACTS,
        refused={
            **_SETTLED, "digest": _DIGEST,
            "revert": "set the value that it had; `pct pending` shows that as cur",
        },
    ),
    "create": Subcommand(
        "VMID TEMPLATE", "sysctr create (a file: sysctr template import first)", plan="pct_create.create",
        numbered=True, values=f"{_VALUES} storage password ssh-public-keys",
        flags=f"{_FLAGS} unprivileged start restore force unique", idle=_CREATING, refused=_SETTLED,
    ),
    "restore": Subcommand(
        "VMID ARCHIVE", "sysctr restore", plan="pct_create.restore", numbered=True,
        values=f"{_VALUES} storage", flags=f"{_FLAGS} unprivileged start force unique", idle=_CREATING,
        refused={
            **_SETTLED,
            "password": "an archive keeps the passwords that it has; `sysctr passwd` sets one afterwards",
            "ssh-public-keys": "an archive keeps the keys that it has; `sysctr push` adds them afterwards",
        },
    ),
    "destroy": Subcommand(
        "VMID", "sysctr destroy --yes", plan="pct_life.destroy", flags="force",
        idle={
            "purge": "its backups stay; a job that names it is changed by `sysctr backup job edit`",
            "destroy-unreferenced-disks": "its volumes go with it, kept ones too",
        },
    ),
    "start": Subcommand(
        "VMID", "sysctr start", plan="pct_life.start",
        idle={"skiplock": _SKIPLOCK, "debug": "`sysctr logs` and `sysctr task show` say how a start went"},
    ),
    "stop": Subcommand(
        "VMID", "sysctr stop --kill", plan="pct_life.stop",
        idle={"skiplock": _SKIPLOCK, "overrule-shutdown": "a stop always takes over from a shutdown"},
    ),
    "shutdown": Subcommand(
        "VMID", "sysctr shutdown; with --forceStop sysctr stop, which kills", plan="pct_life.shutdown",
        values="timeout", flags="forceStop",
    ),
    "reboot": Subcommand("VMID", "sysctr reboot", plan="pct_life.reboot", values="timeout"),
    "suspend": Subcommand(
        "VMID", "sysctr freeze (in memory; nothing is written)", plan="pct_life.suspend",
        idle={"skiplock": _SKIPLOCK},
    ),
    "resume": Subcommand("VMID", "sysctr thaw", plan="pct_life.resume", idle={"skiplock": _SKIPLOCK}),
    "resize": Subcommand(
        "VMID DISK SIZE", "sysctr set limits.disk or mount.N.size (grows only)", plan="pct_settings.resize",
        refused={"digest": _DIGEST},
    ),
    "clone": Subcommand(
        "VMID NEWID", "sysctr clone", plan="pct_create.clone",
        values="hostname snapname storage description target", flags="full",
        idle={"bwlimit=": _BWLIMIT, "pool=": _POOL},
    ),
    "template": Subcommand("VMID", "sysctr template create; the container stays", plan="pct_create.template"),
    "migrate": Subcommand(
        "VMID NODE", "sysctr migrate; NODE is one of `sysctr peer list`", plan="pct_life.migrate",
        values="target-storage bwlimit", flags="restart",
        idle={"timeout=": "a container is asked to stop for as long as `sysctr stop` does"},
        refused={"online": "processes do not move; --restart stops it for a moment, and starts it there"},
    ),
    "remote-migrate": Subcommand(
        "VMID [NEWID] ENDPOINT", "refused",
        values="target-bridge target-storage target-vmid timeout bwlimit", flags="online restart delete",
        reason="hosts know each other by a token, not by an endpoint: `sysctr peer token` there, `sysctr "
        "peer join TOKEN` here, then `sysctr migrate N PEER --as NEWID` (or `sysctr copy`)",
    ),
    "move-volume": Subcommand(
        "VMID VOLUME STORAGE", "refused", values="bwlimit digest target-vmid target-volume target-digest",
        flags="delete",
        reason="a volume stays in its pool; `sysctr clone N NAME --full --pool P` makes a container of it in "
        "another one",
    ),
    "snapshot": Subcommand(
        "VMID NAME", "sysctr snapshot", plan="pct_life.snapshot", values="description"
    ),
    "delsnapshot": Subcommand(
        "VMID NAME", "sysctr delsnapshot", plan="pct_life.delsnapshot",
        idle={"force": "what is left of a snapshot goes with the next try"},
    ),
    "rollback": Subcommand(
        "VMID NAME", "sysctr rollback --yes; without --start it is stopped first", plan="pct_life.rollback",
        flags="start",
    ),
    "listsnapshot": Subcommand("VMID", "sysctr snapshots, as pct's tree", show="pct_shown.snapshots"),
    "status": Subcommand("VMID", "sysctr status", show="pct_shown.status", flags="verbose"),
    "exec": Subcommand(
        "VMID", "sysctr exec (with --tty on a terminal)", plan="pct_life.execute", trailing=True,
        idle={"keep-env": _KEEP_ENV},
    ),
    "enter": Subcommand("VMID", "sysctr enter", plan="pct_life.enter", idle={"keep-env": _KEEP_ENV}),
    "console": Subcommand("VMID", "sysctr console", plan="pct_life.console", values="escape"),
    "push": Subcommand("VMID FILE PATH", "sysctr push", plan="pct_life.push", values="user group perms"),
    "pull": Subcommand("VMID PATH FILE", "sysctr pull", plan="pct_life.pull", values="user group perms"),
    "df": Subcommand("VMID", "sysctr df, in pct's columns", show="pct_shown.disks"),
    "cpusets": Subcommand("", "what each container may run on, in pct's table", show="pct_shown.cpusets"),
    "unlock": Subcommand("VMID", "nothing, if no task holds it; else refused", show="pct_shown.unlock"),
    "mount": Subcommand(
        "VMID", "refused",
        reason="the files of a container are never mounted where the host's programs would follow them; use "
        "`sysctr pull`, `sysctr push` or `sysctr exec`",
    ),
    "unmount": Subcommand("VMID", "refused", reason="`pct mount` is refused here, so nothing is mounted"),
    "fsck": Subcommand(
        "VMID", "refused", values="device", flags="force",
        reason="a volume is a tree in its pool's file system, or an image that is checked when it is opened; "
        "`sysctr doctor` tells of pools that are damaged",
    ),
    "fstrim": Subcommand(
        "VMID", "refused", flags="ignore-mountpoints",
        reason="only the file system below a pool can be trimmed: `fstrim` the PATH that `sysctr pool list` "
        "shows",
    ),
    "rescan": Subcommand(
        "", "refused", values="vmid", flags="dryrun",
        reason="sizes are always those of the volumes; `sysctr mount list N` shows kept volumes, `sysctr "
        "recover` finds lost containers",
    ),
}  # fmt: skip
# Other spellings that Proxmox has.
ALIASES = {"move_volume": "move-volume", "umount": "unmount"}
