"""From pct's arguments to ours: what makes a container or a template: create, restore, clone, template."""

import os
import re
import sys

from sysctr import errors
from sysctr.cli.pct_arguments import Step, Typed, note
from sysctr.cli.pct_settings import Settings, as_text
from sysctr.client import field, path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from sysctr.client import Client

# Where Proxmox keeps what a volume of these kinds names; our hosts may have them too.
_CACHE = "/var/lib/vz/template/cache"
_DUMP = "/var/lib/vz/dump"
_ARCHIVE = re.compile(r"\.(?:tar(?:\.(?:gz|xz|zst|bz2|lzo))?|tgz|txz)$")
_ARCHITECTURES = ("amd64", "i386", "arm64", "armhf", "riscv64")
_LIMITS = ("cores", "cpu", "memory", "swap", "disk")


def create(typed: Typed, client: "Client") -> "list[Step]":
    """Return what `pct create` does."""
    if typed.flag("restore"):
        # The older way to say `pct restore`.
        return restore(typed, client)
    number, template = typed.words
    for option in ("force", "unique"):
        if option in typed.options:
            note(f"--{option} has no effect: it is about `pct restore`")
    settings = Settings(typed, client)
    name, steps = _template(template, client)
    pool = settings.pool(settings.storage_of_root())
    settings.tell()
    words = [str(settings.changes.pop("name", f"ct{number}")), "--id", number, "--template", name]
    words += ["--pool", pool] if pool else []
    for limit in _LIMITS:
        if (value := settings.changes.pop(f"limits.{limit}", None)) is not None:
            words += [f"--{limit}", as_text(value)]
    for table, option in (("net", "--net"), ("mount", "--mount"), ("device", "--device")):
        for at, (index, line) in enumerate(settings.lines(table)):
            # A number that is left out is left out here too.
            words += [option, line] if at == index else ["--set", f"{table}.{index}={line}"]
    for tag in settings.changes.pop("tags", ()):
        words += ["--tag", tag]
    words += ["--onboot"] if settings.changes.pop("onboot", False) else []
    for text in settings.assignments(("net", "mount", "device")):
        words += ["--set", text]
    if "ssh-public-keys" in typed.options:
        words += ["--ssh-key", typed.last("ssh-public-keys")]
    secret, shown = _password(typed)
    start = ["--start"] if typed.flag("start") else []
    return [*steps, Step("create", *words, *secret, *start, shown=["create", *words, *shown, *start])]


def _password(typed: Typed) -> "tuple[list[str], list[str]]":
    """Return the option that hands a password over, and how it is shown: never with the password."""
    if "password" not in typed.options:
        return [], []
    password = typed.last("password")
    if not password:
        if not sys.stdin.isatty():
            raise typed.error("there is no terminal to ask for a password on", "--password PASSWORD")
        import getpass

        password = getpass.getpass("Enter password: ")
        if getpass.getpass("Retype password: ") != password:
            raise typed.error("the two passwords are not the same")
    if not password or "\n" in password:
        raise typed.error("a password is one line that is not empty")
    # In memory, and gone with this process.
    password_fd = os.memfd_create("password", os.MFD_CLOEXEC)
    os.write(password_fd, password.encode("utf-8", "surrogateescape"))
    return ["--password-file", f"/proc/self/fd/{password_fd}"], ["--password-file", "-"]


# Templates


def _template(text: str, client: "Client") -> "tuple[str, list[Step]]":
    """Return the template that is meant, and what makes it where it is a file.

    A file that is there comes before a template of ours that only begins alike.
    """
    known = field(client.get(path("templates")), "templates")
    names = [template["name"] for template in known]
    wanted = os.path.basename(text.partition(":vztmpl/")[2] or text)
    plain = plain_name(wanted)
    for exact in (wanted, plain):
        if exact in names:
            return exact, []
    file = f"{_CACHE}/{wanted}" if ":vztmpl/" in text else text
    if os.path.isfile(file):
        return plain, [Step("template", "import", file, "--name", plain)]
    if ("/" not in text or ":vztmpl/" in text) and (found := find_template(wanted, known)):
        note(f"the template {wanted} is {found} here")
        return found, []
    raise errors.NotFound(
        f"cannot find a template for {text}: there are {', '.join(sorted(names)) or 'none'}",
        f"`sysctr template build {_distribution(plain)}` builds one where there is a recipe, `sysctr "
        "template import FILE` makes one of an archive",
    )


def plain_name(file: str) -> str:
    """Return the name of a file of templates without what says how it is packed.

    >>> plain_name("/x/debian-12-standard_12.7-1_amd64.tar.zst"), plain_name("mine.tgz")
    ('debian-12-standard_12.7-1_amd64', 'mine')
    """
    return _ARCHIVE.sub("", os.path.basename(file))


def _distribution(name: str) -> str:
    """Return the first two parts of a template's name, such as debian-12."""
    return "-".join(name.partition("_")[0].split("-")[:2])


def find_template(text: str, known: "Iterable[dict[str, Any]]") -> str:
    """Return the name of ours that a template of Proxmox's means: the longest that its name begins with.

    >>> ours = [{"name": "debian-12", "arch": "amd64"}, {"name": "debian", "arch": "amd64"}]
    >>> find_template("debian-12-standard_12.7-1_amd64.tar.zst", ours), find_template("debian-1", ours)
    ('debian-12', '')
    >>> find_template("debian-12-standard_12.7-1_arm64.tar.zst", ours)
    ''
    """
    arches = {template["name"]: str(template.get("arch") or "") for template in known}
    stem, _, rest = plain_name(text).partition("_")
    arch = rest.rpartition("_")[2]
    fitting = [
        name
        for name in arches
        # A version in our name keeps debian-12 from standing for debian-13; without one it may be any.
        if (stem == name or (stem.startswith(f"{name}-") and re.search(r"[0-9]", name)))
        and (arch not in _ARCHITECTURES or _same_arch(arches[name], arch))
    ]
    return max(fitting, key=len, default="")


def _same_arch(ours: str, theirs: str) -> bool:
    from sysctr.config.pct_export import proxmox_arch

    return not ours or proxmox_arch(ours) == theirs or ours == theirs


def template(typed: Typed, client: "Client") -> "list[Step]":
    """Return what `pct template` does: here the container stays what it is."""
    number = typed.words[0]
    name = field(client.get(path("containers", number)), "container")["name"]
    note(f"{number} stays a container, which can be started and cloned as before")
    return [Step("template", "create", number, name)]


# Restore and clone


def archive_of(text: str) -> str:
    """Return how our commands are told an archive that Proxmox calls by a volume's name.

    >>> archive_of("local:backup/vzdump-lxc-101-2026_01_31-12_00_00.tar.zst")
    'vzdump-lxc-101-2026_01_31-12_00_00.tar.zst'
    """
    if ":backup/" not in text:
        return text
    name = text.partition(":backup/")[2]
    # One of Proxmox itself, on a host that has both.
    there = f"{_DUMP}/{name}"
    return there if text.startswith("local:") and os.path.isfile(there) else name


def restore(typed: Typed, client: "Client") -> "list[Step]":
    """Return what `pct restore` does."""
    number, archive = typed.words
    for name in typed.options:
        if re.fullmatch(r"mp[0-9]+", name):
            raise errors.Refused(
                f"cannot run `{typed.shown} --{name}`: an archive comes back with its own mount points",
                f"`pct set {number} -{name} …` adds one afterwards",
            )
        if name in ("password", "ssh-public-keys"):
            raise errors.Refused(f"cannot run `{typed.shown} --{name}`: an archive keeps its own")
    settings = Settings(typed, client)
    pool = settings.pool(settings.storage_of_root())
    settings.tell()
    words = [archive_of(archive), number]
    if name := settings.changes.pop("name", ""):
        words += ["--name", str(name)]
    words += ["--pool", pool] if pool else []
    words += [f"--{option}" for option in ("force", "unique", "start") if typed.flag(option)]
    for text in [*settings.assignments(), *_cleared(settings)]:
        words += ["--set", text]
    return [Step("restore", *words)]


def _cleared(settings: Settings) -> "list[str]":
    """Return what unsets the rest of each card that was typed: it takes the place of the archive's."""
    typed = {name.rpartition(".")[0] for name in settings.changes if name.startswith("net.")}
    columns = [f"{card}.{column}" for card in sorted(typed) for column in ("bridge", "gateway", "mtu")]
    return [f"{name}=" for name in columns if name not in settings.changes]


def clone(typed: Typed, client: "Client") -> "list[Step]":
    """Return what `pct clone` does."""
    from sysctr.config.pct_convert import name_of

    number, new = typed.words
    target = typed.last("target")
    if target and target != os.uname().nodename:
        raise errors.Refused(
            f"cannot run `{typed.shown} --target {target}`: a clone stays on this host",
            f"`sysctr copy {number} {target}` makes a copy there, where {target} is in `sysctr peer list`",
        )
    hostname = typed.last("hostname")
    name = name_of(hostname) if hostname else f"ct{new}"
    if not name:
        raise typed.error(f"no name can be made of {hostname!r}")
    if hostname and name != hostname:
        note(f"{hostname} is {name} here")
    words = [number, name, "--id", new]
    if snapshot := typed.last("snapname"):
        words += ["--snapshot", snapshot.lower()]
    words += ["--full"] if typed.flag("full") else []
    if storage := typed.last("storage"):
        settings = Settings(Typed("pct", "clone"), client)
        pool = settings.pool(storage)
        settings.tell()
        words += ["--pool", pool] if pool else []
    if text := " ".join(typed.last("description").split()):
        words += ["--set", f"description={text}"]
    return [Step("clone", *words)]
