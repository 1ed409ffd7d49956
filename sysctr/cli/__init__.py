"""The command line. Only the module of the command that was called is imported, and only its parser built."""

import sys

from sysctr import errors

# name: (module below sysctr.cli, group of the overview, what it does)
COMMANDS = {
    "tui": ("tui", "daily", "look at everything, and do it, in the terminal"),
    "list": ("container", "daily", "list the containers"),
    "create": ("create", "daily", "create a container from a template"),
    "start": ("life", "daily", "start containers"),
    "stop": ("life", "daily", "stop containers: ask, then kill after the time-out"),
    "shutdown": ("life", "daily", "ask containers to shut down, and leave them running if they do not"),
    "reboot": ("life", "daily", "shut containers down and start them again"),
    "enter": ("shell", "daily", "open a login shell in a container"),
    "exec": ("shell", "daily", "run a program in a container"),
    "console": ("shell", "daily", "attach to a container's console"),
    "push": ("files", "daily", "copy files into a container"),
    "pull": ("files", "daily", "copy files out of a container"),
    "snapshot": ("snapshot", "daily", "keep the present state of containers"),
    "backup": ("backup", "daily", "write archives of containers, as vzdump does"),
    "restore": ("backup", "daily", "make a container of an archive"),
    "import lxc": ("imports", "daily", "make a container of one that LXC keeps on this host"),
    "rollback": ("snapshot", "daily", "bring a container back to a snapshot"),
    "clone": ("clone", "daily", "make a container of another one"),
    "migrate": ("migrate", "daily", "move containers to another host"),
    "copy": ("migrate", "daily", "make copies of containers on another host"),
    "replicate": ("replicate", "daily", "keep a copy of a container on another host up to date"),
    "promote": ("replicate", "daily", "make a container of a replica whose host is lost"),
    "destroy": ("life", "daily", "destroy containers and all that is in them"),
    "info": ("container", "look", "show everything about a container"),
    "status": ("container", "look", "print a container's state in one word"),
    "backups": ("backups", "look", "list the backups"),
    "backup verify": ("backup", "look", "prove that a backup can be restored"),
    "backup show": ("backups", "look", "show everything about a backup"),
    "snapshots": ("snapshot", "look", "list the snapshots of a container"),
    "migrations": ("migrate", "look", "list the containers that are on their way, or in doubt"),
    "diff": ("snapshot", "look", "list the files that changed since a snapshot, or since the creation"),
    "logs": ("watch", "look", "show what a container wrote to its console"),
    "events": ("watch", "look", "follow what happens on this host"),
    "wait": ("life", "look", "wait until a container is running, booted or stopped"),
    "set": ("settings", "change", "change settings of a container"),
    "config": ("settings", "change", "print the configuration of a container"),
    "edit": ("settings", "change", "edit the configuration of a container in $EDITOR"),
    "rename": (
        "settings",
        "change",
        "give a container another name; its host name inside follows at the next start",
    ),
    "mount list": ("mounts", "change", "list the mount points and devices of a container"),
    "mount add": ("mounts", "change", "add a mount point or a device to a container"),
    "mount remove": ("mounts", "change", "remove a mount point or a device from a container"),
    "passwd": ("settings", "change", "set a password inside a container"),
    "protect": ("settings", "change", "keep containers from being destroyed"),
    "delsnapshot": ("snapshot", "change", "delete snapshots of a container"),
    "backup remove": ("backups", "change", "remove backups"),
    "backup protect": ("backups", "change", "keep backups from being removed"),
    "backup notes": ("backups", "change", "show or write the notes of a backup"),
    "backup prune": ("backups", "change", "remove the backups that no rule keeps"),
    "freeze": ("life", "change", "freeze all processes of containers"),
    "thaw": ("life", "change", "let frozen containers go on"),
    "df": ("pool", "look", "show what containers take of the disks"),
    "template list": ("template", "host", "list the templates"),
    "template show": ("template", "host", "show everything about a template"),
    "template build": ("template", "host", "build a template from a recipe"),
    "template create": ("clone", "host", "make a template of a container, which is not changed"),
    "template import": ("template", "host", "make a template of a rootfs archive"),
    "template remove": ("template", "host", "remove templates"),
    "pool list": ("pool", "host", "list the storage pools"),
    "pool show": ("pool", "host", "show a pool with what is in it"),
    "pool add": ("pool", "host", "make a directory a storage pool"),
    "pool remove": ("pool", "host", "remove storage pools that no container is in"),
    "backup job list": ("backup_jobs", "host", "list the backup jobs"),
    "backup job show": ("backup_jobs", "host", "show a backup job and how its last run went"),
    "backup job add": ("backup_jobs", "host", "make a backup job"),
    "backup job edit": ("backup_jobs", "host", "edit the file of a backup job in $EDITOR"),
    "backup job run": ("backup_jobs", "host", "run backup jobs now"),
    "backup job remove": ("backup_jobs", "host", "forget backup jobs; their archives stay"),
    "peer list": ("peer", "host", "list the hosts that this one trusts"),
    "peer show": ("peer", "host", "show a peer, and whether it can be reached"),
    "peer token": ("peer", "host", "make a token with which another host can join, once"),
    "peer join": ("peer", "host", "trust the host that made a token, and be trusted by it"),
    "peer rename": ("peer", "host", "give a peer another name"),
    "peer restrict": ("peer", "host", "change what a peer may do"),
    "peer remove": ("peer", "host", "end the trust between this host and another"),
    "peer rotate": ("peer", "host", "get a new key and tell all peers"),
    "task list": ("task", "host", "list the tasks"),
    "task show": ("task", "host", "show a task and its log"),
    "task wait": ("task", "host", "wait for tasks and report their end"),
    "task cancel": ("task", "host", "cancel tasks"),
    "daemon status": ("daemon", "host", "say whether the daemon runs"),
    "daemon start": ("daemon", "host", "start the daemon"),
    "daemon stop": ("daemon", "host", "stop the daemon; containers go on running"),
    "daemon restart": ("daemon", "host", "restart the daemon; containers go on running"),
    "pct": ("pct", "host", "take the arguments of Proxmox VE's pct, and say what is run for them"),
    "vzdump": ("vzdump", "host", "take the arguments of Proxmox VE's vzdump, and say what is run for them"),
    "import-pct": ("proxmox", "host", "create a container with the settings of a pct.conf of Proxmox VE"),
    "recover": ("clone", "host", "rebuild lost records of containers from their volumes"),
    "doctor": ("daemon", "host", "check this host and say how to mend it"),
    "version": ("daemon", "host", "print the version"),
    "help": ("help", "help", "show the help of a command"),
    "completion": ("help", "help", "print the completion script of a shell"),
    "_words": ("help", "", "list names for the completion scripts"),
}
FAMILIES = ("mount", "backup", "backup job", "import", "template", "pool", "peer", "task", "daemon")
_MOST_WORDS = 3


def split_command(argv: "list[str]") -> "tuple[str, list[str]]":
    """Return the name of the command, or of the family, that the first words are, and the words after it.

    >>> split_command(["template", "list", "--json"]), split_command(["list"])
    (('template list', ['--json']), ('list', []))
    >>> split_command(["backup", "job", "run", "x"]), split_command(["backup", "job", "ran"])
    (('backup job run', ['x']), ('backup job', ['ran']))
    """
    if argv[0] in FAMILIES:
        for count in range(min(_MOST_WORDS, len(argv)), 1, -1):
            name = " ".join(argv[:count])
            if name in COMMANDS or name in FAMILIES:
                return name, argv[count:]
    return argv[0], argv[1:]


def split_host(argv: "list[str]") -> "tuple[str, list[str]]":
    """Return the peer whose containers are meant, as --host before the command says, and the other words.

    >>> split_host(["--host", "paris", "list"]), split_host(["--host=paris"]), split_host(["list"])
    (('paris', ['list']), ('paris', []), ('', ['list']))
    """
    import os

    if argv[:1] == ["--host"]:
        if len(argv) < 2 or not argv[1]:
            raise errors.UsageError("cannot run the command: --host needs the name of a peer")
        return argv[1], argv[2:]
    if argv and argv[0].startswith("--host="):
        # An empty name would mean this host: that of a variable which is not set.
        return split_host(["--host", argv[0].removeprefix("--host="), *argv[1:]])
    return os.environ.get("SYSCTR_HOST", ""), argv


def load(name: str):  # type: ignore[no-untyped-def]  # Command is not imported before it is needed
    """Return the Command of that name."""
    module = f"sysctr.cli.{COMMANDS[name][0]}"
    __import__(module)
    return sys.modules[module].COMMANDS[name]


def run(argv: "list[str]") -> int:
    """Run one command and return its exit code; errors of the user are raised."""
    host, argv = split_host(argv)
    if not argv:
        from sysctr.cli.help import print_short

        print_short()
        return 0
    name, rest = split_command(argv)
    if name in ("-h", "--help"):
        name = "help"
    elif name in ("-V", "--version"):
        name = "version"
    # A word may be both: `backup web` makes one, `backup show` is one of its family.
    if name in FAMILIES and (rest[:1] in (["-h"], ["--help"]) or (not rest and name not in COMMANDS)):
        name, rest = "help", [name]
    if name not in COMMANDS:
        raise unknown(name, rest)
    from sysctr.cli.command import build_parser
    from sysctr.client import Client

    command = load(name)
    parser = build_parser(name, COMMANDS[name][2], command)
    arguments = command.parse(parser, rest)
    with Client(host=host) as client:
        return command.run(arguments, client) or 0


# What LXC, Incus, Proxmox VE, Docker and people call what is called otherwise here.
_ELSEWHERE = {
    "ls": "list",
    "ps": "list",
    "show": "info",
    "inspect": "info",
    "new": "create",
    "launch": "create --start",
    "run": "create --start",
    "rm": "destroy",
    "delete": "destroy",
    "remove": "destroy",
    "restart": "reboot",
    "kill": "stop --kill",
    "attach": "enter",
    "shell": "enter",
    "login": "enter",
    "suspend": "freeze",
    "pause": "freeze",
    "resume": "thaw",
    "unfreeze": "thaw",
    "unpause": "thaw",
    "monitor": "events",
    "move": "rename",
    "cp": "push",
    "unprotect": "protect --off",
}


def unknown(name: str, rest: "list[str]") -> errors.UsageError:
    """Return the error for a command that does not exist, with the nearest one that does."""
    import difflib

    typed = f"{name} {rest[0]}" if name in FAMILIES and rest else name
    if meant := _ELSEWHERE.get(typed):
        return errors.UsageError(f"cannot run `{typed}`: no such command", f"here it is `sysctr {meant}`")
    near = difflib.get_close_matches(typed, [known for known in COMMANDS if known[0] != "_"], n=1, cutoff=0.5)
    hint = f"did you mean `sysctr {near[0]}`?" if near else "see `sysctr help`"
    return errors.UsageError(f"cannot run `{typed}`: no such command", hint)


def main(argv: "list[str] | None" = None) -> int:
    """Run the command line and return the exit code."""
    # A name with odd bytes must not end the program where the locale cannot print it.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    try:
        code = run(_typed() if argv is None else argv)
        sys.stdout.flush()
    except errors.SysctrError as error:
        from sysctr.cli.output import print_error

        try:
            print_error(error)
        except BrokenPipeError:
            _quiet_streams()
        code = error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader of our output is gone, as in `sysctr list | head -1`: end as SIGPIPE would have it.
        _quiet_streams()
        code = 141
    except SystemExit as exit_:  # argparse after --help
        code = exit_.code if isinstance(exit_.code, int) else 1
    return code


def _typed() -> "list[str]":
    """Return what was typed; a link with the name of one of Proxmox's commands stands for that command."""
    name = sys.argv[0].rpartition("/")[2]
    return [name, *sys.argv[1:]] if name in ("pct", "vzdump") else sys.argv[1:]


def program() -> None:
    """Run the command line as the whole of a process, and end it."""
    import gc
    import os

    # A command lives for some milliseconds, and looking for garbage meanwhile takes two of them.
    gc.set_threshold(50_000)
    code = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            pass  # main has seen to it that a reader who left is told by the exit code
    # Not sys.exit: taking the interpreter apart takes another three.
    os._exit(code & 0xFF)


def _quiet_streams() -> None:
    import os

    null_fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null_fd, 1)
    os.close(null_fd)
