"""Mount points against a hostile root (security.md S1, S2, S14, S29, S36): no way out, no flag taken off."""

import ctypes
import itertools
import os
import stat
import threading
from pathlib import Path

import pytest

from sysctr.linux import mount, path, process, syscall
from tests.attack.inside import Inside, init_pid, inside
from tests.node import Node
from tests.system.guests import create, refused, shell
from tests.system.guests import inside as output

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox")]

# clear-bits of mount_setattr: what an attacker wants to be rid of.
_LOCKED = {
    "rdonly": mount.MOUNT_ATTR_RDONLY, "nosuid": mount.MOUNT_ATTR_NOSUID,
    "nodev": mount.MOUNT_ATTR_NODEV, "noexec": mount.MOUNT_ATTR_NOEXEC,
}  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory of the host that a container is given."""
    directory = tmp_path / "given"
    directory.mkdir()
    directory.chmod(0o777)
    (directory / "note").write_text("of the host\n")
    (directory / "note").chmod(0o666)
    return directory


def picture(directory: Path) -> list[tuple]:
    """Return everything below a directory of the host, to compare."""
    return sorted(
        (str(p), p.lstat().st_mode, p.lstat().st_uid, p.read_bytes() if p.is_file() else b"")
        for p in directory.rglob("*")
    )


def widened(target: str, flags: "dict[str, int]") -> list[str]:
    """Try, as the container's root, to take each flag off a mount, in every way; return what worked."""
    got = []
    kept = {"rdonly": mount.MS_RDONLY, "nosuid": mount.MS_NOSUID, "nodev": mount.MS_NODEV,
            "noexec": mount.MS_NOEXEC}  # fmt: skip
    for name in flags:
        rest = sum(kept[other] for other in flags if other != name)
        tries = {
            "remount": lambda rest=rest: mount.mount(
                "none", target, None, mount.MS_REMOUNT | mount.MS_BIND | rest
            ),
            "mount_setattr": lambda name=name: _clear(target, flags[name]),
            "copy": lambda name=name: _clear_on_copy(target, flags[name]),
            "namespace": lambda name=name: _clear_in_namespace(target, flags[name]),
        }
        for how, attempt in tries.items():
            try:
                attempt()
                got.append(f"{name} off {target} by {how}")
            except OSError:
                pass
    return got


def _clear(target: str, attribute: int) -> None:
    fd = os.open(target, os.O_PATH)
    try:
        _clear_fd(fd, attribute)
    finally:
        os.close(fd)


def _clear_fd(fd: int, attribute: int) -> None:
    argument = attribute.to_bytes(8, "little").rjust(16, b"\0") + bytes(16)
    result = syscall.call(
        syscall.MOUNT_SETATTR, fd, ctypes.c_char_p(b""), mount.AT_EMPTY_PATH, ctypes.c_char_p(argument), 32
    )
    syscall.check(result, "mount_setattr")


def _clear_on_copy(target: str, attribute: int) -> None:
    fd = mount.open_tree(target)
    try:
        _clear_fd(fd, attribute)
    finally:
        os.close(fd)


def _clear_in_namespace(target: str, attribute: int) -> None:
    process.unshare(process.CLONE_NEWNS)
    _clear(target, attribute)


@pytest.mark.parametrize("plugged", [False, True], ids=["at the start", "while it runs"])
@pytest.mark.parametrize("idmap", ["", ",idmap=1000=0"], ids=["plain", "idmapped"])
def test_no_flag_of_a_bind_can_be_taken_off(
    shared_host: Node, source: Path, plugged: bool, idmap: str
) -> None:
    host = shared_host
    line = f"source={source},target=/given,ro,noexec{idmap}"
    file = f"source={source}/note,target=/note,ro,noexec{idmap}"
    if plugged:
        ref = create(host)
        host.run("mount", "add", ref, line, file)
    else:
        ref = create(host, "--mount", line, "--mount", file)
    before = picture(source)

    def attack() -> list[str]:
        got = widened("/given", _LOCKED) + widened("/note", _LOCKED)
        for name in ("/given/note", "/given/new", "/note"):
            try:
                os.close(os.open(name, os.O_WRONLY | os.O_CREAT))
                got.append(f"opened {name}")
            except OSError:
                pass
        return got

    assert inside(init_pid(host, ref), attack) == []
    assert picture(source) == before
    host.run("destroy", ref, "--force", "--yes")


def test_the_attempt_works_on_a_mount_of_its_own(shared_host: Node, evil: str) -> None:
    """What the tests above rely on: an unlocked flag goes, so their refusals are the lock's."""

    def attack() -> list[str]:
        fd = mount.new_mount("tmpfs", {}, mount.MOUNT_ATTR_RDONLY | mount.MOUNT_ATTR_NODEV)
        os.makedirs("/root/own", exist_ok=True)
        target_fd = os.open("/root/own", os.O_PATH)
        mount.move_mount(fd, target_fd)
        got = widened("/root/own", {"rdonly": mount.MOUNT_ATTR_RDONLY})
        os.close(target_fd)
        os.close(fd)
        mount.umount2("/root/own", mount.MNT_DETACH)
        return got

    ways = inside(init_pid(shared_host, evil), attack)
    assert [way.rpartition(" ")[2] for way in ways] == ["remount", "mount_setattr", "copy", "namespace"]


def test_a_reader_of_a_shared_volume_stays_one(shared_host: Node) -> None:
    host = shared_host
    writer = create(host, "--mount", "volume=lent,target=/lent")
    reader = create(host, "--mount", "volume=lent,target=/lent,ro")
    output(host, writer, "echo 1 > /lent/x && cp /bin/busybox /lent/su && chmod 4755 /lent/su")
    flags = {name: _LOCKED[name] for name in ("rdonly", "nosuid", "nodev")}
    assert inside(init_pid(host, reader), lambda: widened("/lent", flags)) == []
    writers = {name: _LOCKED[name] for name in ("nosuid", "nodev")}
    assert inside(init_pid(host, writer), lambda: widened("/lent", writers)) == []
    host.run("destroy", writer, "--force", "--yes")
    host.run("mount", "remove", reader, "/lent", "--delete")
    host.run("destroy", reader, "--force", "--yes")


def test_a_read_only_volume_of_its_own_stays_so(shared_host: Node) -> None:
    host = shared_host
    ref = create(host, "--mount", "target=/data,ro")
    assert inside(init_pid(host, ref), lambda: widened("/data", {"rdonly": mount.MOUNT_ATTR_RDONLY})) == []
    assert "Read-only" in shell(host, ref, "touch /data/x", check=False).err
    host.run("destroy", ref, "--force", "--yes")


def test_host_ids_outside_of_the_map_are_nobodys(shared_host: Node, source: Path) -> None:
    host = shared_host
    secret = source / "secret"
    secret.write_text("the host's root's\n")
    secret.chmod(0o600)
    program = source / "program"
    program.write_bytes(Path("/bin/busybox").read_bytes() if Path("/bin/busybox").exists() else b"x")
    program.chmod(0o4755)
    before = picture(source)
    ref = create(host, "--mount", f"source={source},target=/given,idmap=1000=0,suid")

    def attack() -> list[str]:
        got = []
        attempts = {
            "read": lambda: os.open("/given/secret", os.O_RDONLY),
            "chown": lambda: os.chown("/given/secret", 0, 0),
            "chmod": lambda: os.chmod("/given/secret", 0o777),
            "take": lambda: os.chown("/given/note", 0, 0),
            "unset": lambda: os.chmod("/given/program", 0o755),
            "node": lambda: os.mknod("/given/sda", 0o666 | stat.S_IFBLK, os.makedev(8, 0)),
        }
        for name, attempt in attempts.items():
            try:
                attempt()
                got.append(name)
            except OSError:
                pass
        return got

    assert inside(init_pid(host, ref), attack) == []
    assert picture(source) == before
    host.run("destroy", ref, "--force", "--yes")


def test_what_is_written_is_the_mapped_users_never_roots(shared_host: Node, source: Path) -> None:
    host = shared_host
    ref = create(host, "--mount", f"source={source},target=/given,idmap=1000=0")
    # Not even what everybody may write, where its owner has no place in the map.
    assert shell(host, ref, "echo x > /given/mine", check=False).status != 0
    os.chown(source, 1000, 1000)
    output(host, ref, "echo x > /given/mine")
    assert (source / "mine").stat().st_uid == 1000
    refused(host, 2, "host's root", "mount", "add", ref, f"source={source},target=/x,idmap=0=0")
    refused(host, 2, "host's root", "mount", "add", ref, f"source={source},target=/x,idmap=0-9=1000")
    assert (source / "note").stat().st_uid == 0
    host.run("destroy", ref, "--force", "--yes")


@pytest.mark.parametrize(
    "line", ["source=/proc/sys,target=/x", "source=/sys,target=/x", "source=/dev,target=/x"]
)
def test_the_kernels_own_files_are_not_to_be_had(shared_host: Node, line: str) -> None:
    ref = create(shared_host, start=False)
    refused(shared_host, 2, "the kernel's", "mount", "add", ref, line)
    shared_host.run("destroy", ref, "--yes")


def test_nor_by_another_mount_of_them(shared_host: Node, tmp_path: Path) -> None:
    host = shared_host
    alias = tmp_path / "alias"
    alias.mkdir()
    mount.mount("proc", str(alias), "proc")
    try:
        ref = create(host, start=False)
        refused(host, 5, "is on proc", "mount", "add", ref, f"source={alias}/sys,target=/x")
    finally:
        mount.umount2(str(alias), mount.MNT_DETACH)
    # Checked again by who opens it: between the two it may have become one.
    host.run("mount", "add", ref, f"source={alias},target=/x")
    host.run("start", ref)
    host.run("stop", ref, "--kill")
    mount.mount("proc", str(alias), "proc")
    try:
        refused(host, 1, "is on proc", "start", ref)
    finally:
        mount.umount2(str(alias), mount.MNT_DETACH)
    host.run("destroy", ref, "--yes")


@pytest.mark.parametrize("become", ["symlink", "socket", "nothing", "symlink above"])
def test_a_source_replaced_after_the_check_stops_the_start(
    shared_host: Node, tmp_path: Path, become: str
) -> None:
    host = shared_host
    (tmp_path / "above" / "given").mkdir(parents=True)
    (tmp_path / "secret" / "given").mkdir(parents=True)
    given = tmp_path / "above" / "given"
    ref = create(host, "--mount", f"source={given},target=/x")
    host.run("stop", ref, "--kill")
    given.rmdir()
    if become == "symlink":
        given.symlink_to(tmp_path / "secret")
        words = f"{given} is a symlink"
    elif become == "socket":
        os.mknod(given, 0o600 | stat.S_IFSOCK)
        words = f"{given} is a socket"
    elif become == "symlink above":
        given.parent.rmdir()
        given.parent.symlink_to(tmp_path / "secret")
        words = f"{given.parent} is a symlink"
    else:
        words = f"{given} does not exist"
    refused(host, 1, words, "start", ref)
    assert host.state(ref) == "stopped"
    host.run("mount", "remove", ref, "/x")
    host.run("start", ref)
    host.run("destroy", ref, "--force", "--yes")


@pytest.mark.parametrize("link", ["/trap", "/a/trap"])
def test_a_target_that_is_a_symlink_stops_the_start_and_a_plug(
    shared_host: Node, source: Path, tmp_path: Path, link: str
) -> None:
    host = shared_host
    outside = tmp_path / "outside"
    outside.mkdir()
    ref = create(host)
    output(host, ref, f"mkdir -p /a && ln -s {'../' * 20}{str(outside)[1:]} {link}")
    for target in (link, f"{link}/below"):
        refused(
            host,
            1,
            "a symlink or a file is in the way",
            "mount",
            "add",
            ref,
            f"source={source},target={target}",
        )
    host.run("stop", ref, "--kill")
    host.run("mount", "add", ref, f"source={source},target={link}/below")
    refused(host, 1, "a symlink or a file is in the way", "start", ref)
    assert list(outside.iterdir()) == []
    assert str(outside) not in Path("/proc/self/mountinfo").read_text()
    host.run("destroy", ref, "--yes")


@pytest.mark.parametrize(
    "target", ["/a/../../x", "../x", "/./x", "/proc/x", "/run/x", "/dev/x", "/sys/x", "/"]
)
def test_a_target_never_steps_out_or_onto_the_kernels_places(shared_host: Node, target: str) -> None:
    ref = create(shared_host, start=False)
    refused(shared_host, 2, "cannot accept mount.0", "mount", "add", ref, f"tmpfs,target={target}")
    shared_host.run("destroy", ref, "--yes")


def test_a_target_swapped_while_it_is_plugged_never_leads_out(
    shared_host: Node, source: Path, tmp_path: Path
) -> None:
    host = shared_host
    outside = tmp_path / "outside"
    outside.mkdir()
    ref = create(host)
    trap = "../" * 20 + str(outside)[1:]

    def attack() -> None:
        os.makedirs("/pit/real", exist_ok=True)
        os.symlink(trap, "/pit/link")
        for turn in itertools.count():
            try:
                os.rename("/pit/real", "/pit/aside")
                os.rename("/pit/link", "/pit/real")
                os.rename("/pit/real", "/pit/link")
                os.rename("/pit/aside", "/pit/real")
            except OSError:
                if turn > 10**7:
                    raise

    with Inside(init_pid(host, ref), attack):
        for _ in range(12):
            done = host.run("mount", "add", ref, f"source={source},target=/pit/real/x", check=False)
            assert "Traceback" not in done.err
            if done.status == 0:
                host.run("mount", "remove", ref, "/pit/real/x", check=False)
            assert list(outside.iterdir()) == []
            assert f" {outside}" not in Path("/proc/self/mountinfo").read_text()
    host.run("destroy", ref, "--force", "--yes")


def test_who_enters_to_mount_can_be_neither_seen_nor_traced(shared_host: Node) -> None:
    host = shared_host
    ref = create(host)

    def attack() -> list[str]:
        seen = set()
        mine = {entry for entry in os.listdir("/proc") if entry.isdigit()}
        for _ in range(3000):
            seen |= {entry for entry in os.listdir("/proc") if entry.isdigit()} - mine
        return sorted(seen)

    with Inside(init_pid(host, ref), attack) as watching:
        thread = threading.Thread(
            target=lambda: [
                host.run("mount", verb, ref, *what)
                for verb, what in [("add", ["tmpfs,target=/t"]), ("remove", ["/t"])] * 2
            ]
        )
        thread.start()
        assert watching.result() == []
        thread.join()
    host.run("destroy", ref, "--force", "--yes")


def test_what_is_given_to_one_is_seen_by_no_other(
    shared_host: Node, source: Path, victim: str, evil: str
) -> None:
    host = shared_host
    host.run("mount", "add", victim, f"source={source},target=/given")
    assert shell(host, evil, "cat /given/note", check=False).status != 0
    assert str(source) not in Path("/proc/self/mountinfo").read_text()
    host.run("mount", "remove", victim, "/given")


def test_a_device_is_a_node_of_the_containers_own(shared_host: Node) -> None:
    host = shared_host
    before = os.stat("/dev/fuse")
    ref = create(host, "--device", "fuse")

    def attack() -> list[str]:
        got = []
        os.chmod("/dev/fuse", 0o600)
        try:
            os.mknod("/dev/sda", 0o666 | stat.S_IFBLK, os.makedev(8, 0))
            got.append("made a node beside it")
        except OSError:
            pass
        return got + widened("/dev/fuse", {name: _LOCKED[name] for name in ("nosuid", "noexec")})

    assert inside(init_pid(host, ref), attack) == []
    after = os.stat("/dev/fuse")
    assert (before.st_mode, before.st_uid) == (after.st_mode, after.st_uid)
    host.run("destroy", ref, "--force", "--yes")


def test_the_kernels_own_file_systems_are_known() -> None:
    kinds = {}
    for place in ("/proc", "/sys", "/dev/pts", "/tmp"):
        fd = os.open(place, os.O_PATH)
        kinds[place] = path.kernels_own(fd)
        os.close(fd)
    assert kinds == {"/proc": "proc", "/sys": "sysfs", "/dev/pts": "devpts", "/tmp": ""}
