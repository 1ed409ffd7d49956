"""Makes a template by a recipe: bootstrap, files, scripts, each in a job that has no rights over the host."""

import io
import os
import re
import stat
import tarfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sysctr.errors import NoSpace, SysctrError
from sysctr.linux.path import open_in_root
from sysctr.storage import tree
from sysctr.template import apt, tiny
from sysctr.template.base import Made, RunJob, Source, Task, Template
from sysctr.template.jobs import run_lines
from sysctr.template.recipe import File, Recipe
from sysctr.template.registry import Registry

_ROOTFS = "/volume/rootfs"
_DPKG_STATUS_MAX_BYTES = 64 * 1024**2
_PROXIES = ("http_proxy", "https_proxy", "no_proxy")

# Files of the host that a program in the job needs to reach a mirror: names, addresses, authorities,
# and the links by which Debian chooses among equal programs.
_HOST_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl", "/etc/alternatives")

_SCRIPT_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}
# What a script may count on is a root with /dev, /proc and an empty /run, as in a container. The mounts
# are the job's own and go with it.
_IN_TREE = """\
exec 2>&1
root=$1; shift
mount --rbind /dev "$root/dev" && mount --rbind /proc "$root/proc" && mount -t tmpfs tmpfs "$root/run" || exit
exec chroot "$root" /bin/sh -eu -c "$1" run
"""
# What mmdebstrap set for its own run would stay in the tree: the container gets files of ours instead.
_FORGET_OWN_FILES = (
    'cd "$1/etc" && rm -f apt/sources.list.d/0000* apt/apt.conf.d/99mmdebstrap dpkg/dpkg.cfg.d/99mmdebstrap'
)
_UNPACK = (
    "tar", "--extract", "--file=-", f"--directory={_ROOTFS}", "--numeric-owner", "--same-owner",
    "--preserve-permissions", "--keep-directory-symlink", "--no-overwrite-dir", "--warning=no-timestamp",
)  # fmt: skip

_UNREACHABLE = re.compile(
    r"Could not (resolve|connect)|Temporary failure resolving|Unable to connect|Connection reset"
    r"|[Cc]onnection (timed out|refused|failed)|No route to host|Network is unreachable"
)
_UNVERIFIED = re.compile(
    r"NO_PUBKEY|is not signed|signatures? (were invalid|couldn't be verified)|EXPKEYSIG|expired"
)


class MirrorUnreachable(SysctrError):
    """No package archive answers; the host's network, proxy or mirror is at fault, not the recipe."""

    code = "mirror-unreachable"
    http_status = 502


@dataclass
class _Words:
    """What a program of the job said: everything to the log, the errors kept."""

    task: Task
    errors: list[str] = field(default_factory=list)

    def take(self, line: str) -> None:
        text = "".join(c for c in line.rstrip() if c.isprintable() or c == "\t")
        if not text:
            return
        self.task.log(text)
        if text.startswith("I: ") and not text.startswith("I: success"):
            self.task.step(text[3:])
        elif re.match(r"(E|Err|W)[:\d]|dpkg: error|.*[Ee]rror", text) and len(self.errors) < 200:
            self.errors.append(text)

    def best(self, status: int) -> str:
        """Return the words that say best why it ended with `status`."""
        # apt's first error is the cause; those after it only say who gave up because of it.
        certain = [line for line in self.errors if line.startswith(("E: ", "dpkg: error"))]
        return certain[0] if certain else (self.errors or [f"exit status {status}"])[-1]


def build_template(
    registry: Registry,
    recipe: Recipe,
    *,
    name: str = "",
    run_job: RunJob,
    task: Task,
    environment: Mapping[str, str] | None = None,
) -> Template:
    """Make a template by `recipe` and return it; nothing is left if it fails.

    `environment` is the caller's, for its proxies. Raises MirrorUnreachable where no archive answers,
    NoSpace, and SysctrError with the words of the step that failed.
    """
    name = name or recipe.name
    builder = _Builder(recipe, name, run_job, task, environment or os.environ)
    return registry.add(name, builder.build, log_line=task.step)


class _Builder:
    """One run of a recipe."""

    def __init__(
        self, recipe: Recipe, name: str, run_job: RunJob, task: Task, environment: Mapping[str, str]
    ) -> None:
        self.recipe = recipe
        self.doing = f"build template {name}"
        self.run_job = run_job
        self.task = task
        self.environment = environment

    def build(self, building: str) -> Made:
        """Fill `building`/rootfs."""
        if self.recipe.bootstrap.tool == "busybox":
            self.task.step("copying busybox")
            self._unpack(building, [*tiny.members(tiny.find_busybox()), *map(_member_of, self.recipe.files)])
        else:
            self._bootstrap(building)
            if self.recipe.files:
                self.task.step(f"writing {len(self.recipe.files)} files")
                self._unpack(building, map(_member_of, self.recipe.files))
        for run in self.recipe.run:
            self.task.check()
            self.task.step(run.name)
            self._run(building, run.name, run.script)
        return Made(
            source=Source(kind="recipe", name=self.recipe.name, digest=self.recipe.digest),
            version=self.recipe.version,
            description=self.recipe.description,
            init=self.recipe.init,
            stop_signal=self.recipe.stop_signal,
            labels=dict(self.recipe.labels),
            packages=_count_packages(f"{building}/rootfs"),
        )

    def _bootstrap(self, building: str) -> None:
        wanted = self.recipe.bootstrap
        environment = {key: self.environment[key] for key in _PROXIES if self.environment.get(key)}
        host = apt.read_host(dict(wanted.sources), wanted.components, wanted.keyring, environment=environment)
        for note in host.notes:
            self.task.log(note)
        inputs = f"{building}/inputs"
        _write_inputs(inputs, host)
        words = _Words(self.task)
        argv = ["sh", "-c", 'exec "$@" 2>&1', "bootstrap", *self._mmdebstrap(host)]
        binds = [(f"{inputs}/apt", "/etc/apt")]
        binds += [(os.path.realpath(path), path) for path in _HOST_FILES if os.path.exists(path)]
        status = run_lines(
            self.run_job,
            argv,
            volume=building,
            on_line=words.take,
            network=True,
            binds=binds,
            environment={"TMPDIR": "/tmp", "LC_ALL": "C.UTF-8", **environment},
            task=self.task,
        )
        self.task.check()
        if status != 0:
            raise self._bootstrap_error(words, status, host)
        tree.delete(inputs)
        self._unpack(building, _apt_members(host))
        if host.authorities:
            self._run(building, "certificate authorities", "update-ca-certificates")

    def _mmdebstrap(self, host: apt.HostApt) -> list[str]:
        wanted = self.recipe.bootstrap
        return [
            "mmdebstrap", "--mode=root", "--format=directory", f"--variant={wanted.variant}",
            *([f"--include={','.join(wanted.packages)}"] if wanted.packages else []),
            # A container made of this template can install packages at once, without an update before.
            "--skip=cleanup/apt/lists", "--aptopt=Acquire::GzipIndexes \"true\"",
            "--aptopt=Acquire::Languages \"none\"", "--dpkgopt=force-unsafe-io",
            *[f'--aptopt={key} "{value}"' for key, value in host.job_options],
            f"--customize-hook={_FORGET_OWN_FILES}",
            wanted.sources[0][0], _ROOTFS, "/etc/apt/sources.list",
        ]  # fmt: skip

    def _bootstrap_error(self, words: _Words, status: int, host: apt.HostApt) -> SysctrError:
        text = "\n".join(words.errors)
        if "No space left on device" in text:
            return NoSpace(f"cannot {self.doing}: no space left", hint="a Debian template needs about 1 GiB")
        if _UNREACHABLE.search(text):
            addresses = " or ".join(sorted({source.uri for source in host.sources}))
            return MirrorUnreachable(
                f"cannot {self.doing}: {addresses} cannot be reached",
                hint="try `apt-get update` on this host; `sysctr template build tiny` needs no mirror",
            )
        if _UNVERIFIED.search(text):
            return SysctrError(
                f"cannot {self.doing}: the archive's signature cannot be verified ({words.best(status)})",
                hint="is this host's clock right, and its debian-archive-keyring up to date?",
            )
        return SysctrError(f"cannot {self.doing}: {words.best(status)}", hint="the task's log has all of it")

    def _run(self, building: str, name: str, script: str) -> None:
        words = _Words(self.task)
        status = run_lines(
            self.run_job,
            ["sh", "-c", _IN_TREE, "in-tree", _ROOTFS, script],
            volume=building,
            on_line=words.take,
            environment=_SCRIPT_ENVIRONMENT,
            task=self.task,
        )
        self.task.check()
        if status != 0:
            raise SysctrError(
                f"cannot {self.doing}: step {name!r} failed: {words.best(status)}",
                hint="the task's log has all it said",
            )

    def _unpack(self, building: str, members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> None:
        """Write files into the tree from within a job: a tree that ran foreign code may hold any symlink."""
        words = _Words(self.task)
        stream = _archive(members)
        status = run_lines(
            self.run_job,
            ["sh", "-c", 'exec "$@" 2>&1', "unpack", *_UNPACK],
            volume=building,
            on_line=words.take,
            feed=lambda fd: _feed(fd, stream),
            task=self.task,
        )
        self.task.check()
        if status != 0:
            if any("No space left on device" in line for line in words.errors):
                raise NoSpace(f"cannot {self.doing}: no space left")
            raise SysctrError(f"cannot {self.doing}: writing its files: {words.best(status)}")


def _write_inputs(inputs: str, host: apt.HostApt) -> None:
    """Write the /etc/apt of the job: the chosen archives and the keys that verify them."""
    files = {"sources.list": _sources_list(host.sources).encode(), **host.files}
    for directory in ("", "apt", "apt/apt.conf.d", "apt/preferences.d", "apt/trusted.gpg.d", "apt/keyrings"):
        os.mkdir(f"{inputs}/{directory}", 0o755)
        os.chmod(f"{inputs}/{directory}", 0o755)
    for name, data in files.items():
        with open(f"{inputs}/apt/{name}", "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o644)  # the job's root is nobody to files of the host


def _sources_list(sources: Sequence[apt.AptSource]) -> str:
    return "".join(f"{source.as_line()}\n" for source in sources)


def _apt_members(host: apt.HostApt) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Return what makes apt in the container reach what the host's apt reaches."""
    options = [("Acquire::GzipIndexes", "true"), ("Acquire::Languages", "none"), *host.options]
    lines = ["// As on the host this template was built on; package lists are kept small."]
    lines += [f'{key} "{value}";' for key, value in options]
    files = {
        "/etc/apt/sources.list": _sources_list(host.sources).encode(),
        "/etc/apt/apt.conf.d/70sysctr": "\n".join([*lines, ""]).encode(),
        # mmdebstrap copies these from the host; who sets up a container writes them.
        "/etc/resolv.conf": b"",
        "/etc/hostname": b"",
    }
    files |= {f"/etc/apt/{name}": data for name, data in host.files.items()}
    files |= {f"/usr/local/share/ca-certificates/{name}": data for name, data in host.authorities.items()}
    return [_regular(path, 0o644, data) for path, data in files.items()]


def _member_of(file: File) -> tuple[tarfile.TarInfo, bytes]:
    if not file.link:
        return _regular(file.path, file.mode, file.content.encode())
    member = tarfile.TarInfo(f".{file.path}")
    member.mtime = int(time.time())
    member.type, member.linkname, member.mode = tarfile.SYMTYPE, file.link, 0o777
    return member, b""


def _regular(path: str, mode: int, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(f".{path}")
    member.mtime = int(time.time())
    member.size, member.mode = len(data), mode
    return member, data


def _archive(members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, data in members:
            archive.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return buffer.getvalue()


def _feed(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _count_packages(rootfs: str) -> int | None:
    """Return how many packages dpkg has there, None where there is no dpkg."""
    root_fd = os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status_fd = open_in_root(root_fd, "/var/lib/dpkg/status", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None
    finally:
        os.close(root_fd)
    with os.fdopen(status_fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(status_fd).st_mode):
            return None
        return len(re.findall(rb"(?m)^Status: install ok installed$", file.read(_DPKG_STATUS_MAX_BYTES)))
