"""Makes hostile archives, one for each attack, and sees what a host has afterwards that it had not before.

Most of them have a root whose init is no more than the header of a program: enough for a restore, which
neither runs nor loads anything of it.
"""

import contextlib
import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Iterable
from pathlib import Path

from tests.attack.inside import init_pid
from tests.node import Node, Result
from tests.wait import wait_until

Member = tuple[tarfile.TarInfo, bytes]

CONFIG = "./etc/vzdump/pct.conf"
FIREWALL = "./etc/vzdump/pct.fw"
OWN = "./dev/.sysctr.json"
UUID = "4a0e3f2c-93f1-4d4e-9c0e-6f3c6d6b8a01"
MIB = 1 << 20


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", **more: object
) -> Member:
    """Return a member of an archive; `more` are attributes of TarInfo."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.size = kind, link, 0o755, len(data)
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


def symlink(name: str, target: str) -> Member:
    return member(name, kind=tarfile.SYMTYPE, link=target)


def hard_link(name: str, target: str) -> Member:
    return member(name, kind=tarfile.LNKTYPE, link=target)


def pax(name: str, data: bytes = b"", **headers: str) -> Member:
    """Return a member with extended headers, `SCHILY_xattr_user_x` for SCHILY.xattr.user.x."""
    named = {key.replace("_", "."): value for key, value in headers.items()}
    return member(name, data, pax_headers=named)


def raw(name: str, kind: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    """Return the blocks of one member, which may claim another size than it has."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def elf() -> bytes:
    """Return the header of a program of this machine."""
    with open("/proc/self/exe", "rb") as file:
        return file.read(256)


def root() -> list[Member]:
    """Return the least that is a root."""
    names = ("./", "./sbin/", "./etc/", "./dev/", "./proc/", "./sys/")
    directories = [member(name, kind=tarfile.DIRTYPE) for name in names]
    return [*directories, member("./sbin/init", elf()), member("./etc/os-release", b"ID=hostile\n")]


def own(config: str = 'schema = 1\nname = "hostile"\n', **facts: object) -> Member:
    """Return the member of our own, with other facts than a backup writes."""
    known = {
        "schema": 1, "id": 901, "uuid": UUID, "generation": 3, "created": 1.0, "template": "",
        "config": config,
    }  # fmt: skip
    return member(OWN, json.dumps(known | facts).encode())


def pct(text: str | bytes) -> Member:
    return member(CONFIG, text if isinstance(text, bytes) else text.encode())


def pack(members: Iterable[Member], *, end: bool = True) -> bytes:
    """Return an archive of the members; without `end` it lacks the mark of its end."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as out:
        for info, data in members:
            out.addfile(info, io.BytesIO(data) if info.size else None)
        whole = out.offset
    data = packed.getvalue()
    return data if end else data[:whole]


def archive(*members: Member, head: Iterable[Member] | None = None) -> bytes:
    """Return an archive whose root has further members, after a head as a backup writes it."""
    first = [pct("hostname: hostile\n"), member(FIREWALL)] if head is None else head
    return pack([*first, *root(), *members])


class Scene:
    """A host under attack, and what of it must be as it was."""

    def __init__(self, host: Node, directory: Path, victim: str) -> None:
        self.host = host
        self.directory = directory
        self.victim = victim
        self.canary = directory / "canary"
        self.canary.mkdir()
        (self.canary / "file").write_text("sings")
        (self.canary / "link").symlink_to("file")
        (self.canary / "inner").mkdir()
        (self.canary / "inner" / "secret").write_text("of the host")
        os.chmod(self.canary, 0o777)
        self._init = init_pid(host, victim)
        self._before = self.picture()
        self._data = self.data()

    def picture(self) -> dict[str, object]:
        """Return what an attack may not change."""
        where = self.host.layout
        return {
            "canary": tree(self.canary),
            "etc": etc(),
            "directory": sorted(os.listdir(self.directory)),
            "containers": sorted(one["id"] for one in self.listed()),
            "state": listing(
                where.containers, where.container_configs, where.backup_runs, f"{where.run}/stage"
            ),
            "volumes": listing(f"{where.pool}/volumes"),
            "mounts": below(where.root, "/proc/self/mountinfo", 4),
            "loops": loops(where.root, str(self.directory)),
            "jobs": self.jobs(),
        }

    def data(self) -> list[str]:
        """Return what takes space in the pool of the host."""
        pool = Path(self.host.layout.pool)
        return sorted(
            path.name for where in ("uppers", ".trash", "layers") for path in pool.glob(f"{where}/*")
        )

    def jobs(self) -> set[str]:
        """Return the processes that the supervisor has beside the init of the victim."""
        supervisor = self.host.pids()["supervisor"]
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        return set(children) - {str(self._init)}

    def file(self, data: bytes, name: str = "hostile.tar") -> str:
        """Write an archive, whose directory is none of what is compared."""
        path = self.directory / "archives" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return str(path)

    def restore(self, data: bytes, *options: str, stdin: bool = False, name: str = "hostile.tar") -> Result:
        """Try to restore an archive from a file or from standard input; bounded in memory and in time."""
        forget_peak(self.daemon)
        before = resident(self.daemon)
        if stdin:
            done = self.host.run("restore", "-", *options, stdin=data, check=False, timeout_s=60)
        elif options:
            done = self.host.run("restore", self.file(data, name), *options, check=False, timeout_s=60)
        else:
            done = self._task("POST", "/1/restore", {"archive": self.file(data, name)})
        assert peak(self.daemon) - before < 48 * MIB, "the daemon's memory grew"
        self.plain(done)
        return done

    def verify(self, data: bytes, name: str = "hostile.tar") -> Result:
        """Ask whether an archive can be restored."""
        done = self._task("POST", "/1/backups/verify", {"archive": self.file(data, name)})
        self.plain(done)
        return done

    @property
    def daemon(self) -> int:
        return self.host.pids()["daemon"]

    def listed(self) -> list[dict]:
        """Return the containers of the host."""
        status, answer = self.host.api("GET", "/1/containers")
        assert status == 200, answer
        return answer["containers"]  # type: ignore[index, return-value]

    def _task(self, method: str, path: str, body: object) -> Result:
        """Do what a command does by the API, a hundred times as often in the same time."""
        status, answer = self.host.api(method, path, body)
        if status == 202:
            _, answer = self.host.api("GET", f"/1/tasks/{answer['task']['id']}/wait?timeout=60")
            task = answer["task"]
            assert task["ended"], task
            error = task["error"]
            done = {} if error else task["result"]
        else:
            assert status >= 400, answer
            error, done = answer["error"], {}
        words = [f"left out: {line}" for line in (done or {}).get("left_out") or ()]
        words += [f"sysctr: {error['message']}"] if error else []
        return Result((method, path), bool(error), json.dumps(done).encode(), "\n".join(words).encode())

    def plain(self, done: Result) -> None:
        """Assert that a command has ended as commands do: an error is one line, and no bug."""
        assert "Traceback" not in done.err + done.out, done
        assert "internal error" not in done.err, done
        assert "\x1b" not in done.err + done.out, done
        if done.status:
            assert done.status in (1, 2, 3, 4, 5), done
            errors = [line for line in done.err.splitlines() if line.startswith("sysctr: ")]
            assert len(errors) == 1, done
            assert errors[0].startswith("sysctr: cannot "), done

    def made(self) -> list[dict]:
        """Return the containers that are there now and were not before."""
        known = self._before["containers"]
        return [one for one in self.listed() if one["id"] not in known]

    def destroy(self) -> None:
        """Destroy what attacks made."""
        for one in self.made():
            self._task("DELETE", f"/1/containers/{one['id']}", {"force": True})

    def unharmed(self) -> None:
        """Assert that nothing but what was there before is there."""
        wait_until(lambda: not self.jobs(), what="no job left")
        # What is destroyed is deleted in the background.
        wait_until(lambda: self.data() == self._data, what="no data of what was destroyed")
        now = self.picture()
        for what, before in self._before.items():
            if what == "directory":
                before, now[what] = [set(one) - {"archives"} for one in (before, now[what])]
            assert now[what] == before, f"{what}: {now[what]} was {before}"
        (victim,) = [one for one in self.listed() if one["name"] == self.victim]
        assert victim["pid"] == self._init

    def refused(self, done: Result, *words: str) -> None:
        """Assert that an attack was refused, for a reason that is told, and has left nothing."""
        assert done.status != 0, done
        for word in words:
            assert word in done.err, done
        self.unharmed()


def tree(directory: Path) -> str:
    """Return a digest of all that is in a directory: names, modes, owners, times, content, attributes."""
    digest = hashlib.sha256()
    for path in [directory, *sorted(directory.rglob("*"))]:
        facts = os.lstat(path)
        digest.update(f"{path} {facts.st_mode:o} {facts.st_uid} {facts.st_gid} {facts.st_ino} ".encode())
        digest.update(f"{facts.st_nlink} {facts.st_mtime_ns} ".encode())
        if stat.S_ISREG(facts.st_mode):
            digest.update(path.read_bytes())
            digest.update(repr([(name, os.getxattr(path, name)) for name in os.listxattr(path)]).encode())
    return digest.hexdigest()


def etc() -> dict[str, tuple[int, ...]]:
    """Return what is in the host's /etc, but for the files that other sessions of tests change, too."""
    found = {}
    for path in sorted(Path("/etc").iterdir()):
        if not path.name.startswith((".", "subuid", "subgid", "group")):
            facts = os.lstat(path)
            found[path.name] = (facts.st_ino, facts.st_mode, facts.st_size, facts.st_mtime_ns)
    return found


def listing(*directories: str) -> list[str]:
    """Return the names in directories, two levels deep; one that is not there has none."""
    found = []
    for directory in map(Path, directories):
        for path in sorted([*directory.glob("*"), *directory.glob("*/*")]):
            found.append(str(path))
    return found


def below(directory: str, table: str, column: int) -> list[str]:
    with open(table) as file:
        return sorted(line.split()[column] for line in file if line.split()[column].startswith(directory))


def loops(*directories: str) -> list[str]:
    """Return the files below directories that are behind loop devices."""
    backing = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            backing.append(path.read_text().strip())
    return sorted(path for path in backing if path.startswith(directories))


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name} of {pid}")


def peak(pid: int) -> int:
    """Return the most memory a process has had since `forget_peak`."""
    return _status(pid, "VmHWM")


def resident(pid: int) -> int:
    return _status(pid, "VmRSS")


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")
