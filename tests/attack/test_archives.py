"""Hostile archives (security.md S8, S10-S17, S30, S31): restored and verified for real, one by one.

Each is refused or contained. Afterwards the host is what it was, to the last file, and the error says in one
line what was wrong with the archive.
"""

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.attack.hostile import (
    CONFIG,
    OWN,
    Member,
    Scene,
    archive,
    hard_link,
    member,
    own,
    pack,
    pax,
    pct,
    raw,
    root,
    symlink,
)

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox")]

@pytest.fixture(autouse=True)
def nothing_stays(scene: Scene) -> Iterator[None]:
    yield
    scene.destroy()
    scene.unharmed()


# S10

TRAVERSAL: dict[str, Callable[[str], list[Member]]] = {
    "absolute": lambda out: [member(f"{out}/new")],
    "absolute over a file": lambda out: [member(f"{out}/file", b"evil")],
    "dotdot": lambda out: [member(f"./{'../' * 30}{out[1:]}/new")],
    "dotdot inside": lambda out: [member(f"./etc/{'../' * 30}{out[1:]}/file", b"evil")],
    "symlink": lambda out: [symlink("./out", out), member("./out/new")],
    "symlink over a file": lambda out: [symlink("./out", f"{out}/file"), member("./out", b"evil")],
    "relative symlink": lambda out: [symlink("./out", f"{'../' * 30}{out[1:]}"), member("./out/new")],
    "two symlinks": lambda out: [
        symlink("./a", ".."), symlink("./b", f"a/{'../' * 30}{out[1:]}"), member("./b/new"),
    ],
    "symlink and directory": lambda out: [
        symlink("./out", out), member("./out", kind=tarfile.DIRTYPE), member("./out/inner/secret"),
    ],
    "through proc": lambda out: [symlink("./out", f"/proc/1/root{out}"), member("./out/new")],
    "through the descriptors": lambda out: [symlink("./out", "/proc/self/cwd/.."), member("./out/new")],
    "hard link": lambda out: [hard_link("./link", f"{out}/file"), member("./link", b"evil")],
    "hard link to a symlink": lambda out: [
        symlink("./out", f"{out}/file"), hard_link("./hard", "./out"), member("./hard", b"evil"),
    ],
    "hard link through a symlink": lambda out: [
        symlink("./out", out), hard_link("./hard", "./out/file"), member("./hard", b"evil"),
    ],
    "the volume by its name": lambda out: [symlink("./out", f"/volume/../..{out}"), member("./out/new")],
    "the root as a symlink": lambda out: [symlink("./", out), member("./new")],
    "long names": lambda out: [pax("./x", path=f"{'../' * 40}{out[1:]}/new")],
    "contiguous": lambda out: [member(f"{out}/new", kind=tarfile.CONTTYPE)],
}  # fmt: skip


@pytest.mark.parametrize("attack", TRAVERSAL)
def test_no_member_reaches_outside(scene: Scene, attack: str) -> None:
    data = archive(*TRAVERSAL[attack](str(scene.canary)))
    scene.restore(data, stdin=bool(len(attack) % 2))
    scene.destroy()
    scene.unharmed()


# S11, S12, S17

BAD_HEADS: dict[str, list[Member]] = {
    "a symlink": [symlink(CONFIG, "/etc/shadow")],
    "a hard link": [hard_link(CONFIG, "/etc/shadow")],
    "a fifo": [member(CONFIG, kind=tarfile.FIFOTYPE)],
    "a device": [member(CONFIG, kind=tarfile.CHRTYPE, devmajor=1, devminor=5)],
    "a directory": [member(CONFIG, kind=tarfile.DIRTYPE)],
    "sparse": [pax(CONFIG, b"x" * 512, GNU_sparse_map="0,512", GNU_sparse_size="512")],
    "big": [pct(b"hostname: a\n" * 90_000)],
    "a zero byte": [pct(b"hostname: a\0b\n")],
    "our own as a symlink": [pct("hostname: a\n"), symlink(OWN, "/etc/shadow")],
    "our own as a fifo": [pct("hostname: a\n"), member(OWN, kind=tarfile.FIFOTYPE)],
    "no JSON": [member(OWN, b"\xff\xfe")],
    "nested JSON": [member(OWN, b"[" * 100_000)],
    "a long number": [member(OWN, b'{"schema": ' + b"9" * 50_000 + b"}")],
    "a list": [member(OWN, b"[1]")],
    "a newer schema": [own(schema=2)],
    "a schema that is true": [own(schema=True)],
    "an id that is a text": [own(id="101")],
    "an id that is true": [own(id=True)],
    "a huge id": [own(id=2**70)],
    "a negative id": [own(id=-1)],
    "an id of a directory": [own(id="../../etc")],
    "a uuid with a newline": [own(uuid="a\nb")],
    "a uuid that is a path": [own(uuid="../../../etc/passwd")],
    "a uuid that is no text": [own(uuid=None)],
    "a uuid of a surrogate": [own(uuid="\ud800")],
    "a huge generation": [own(generation=2**70)],
    "a generation that is nothing": [own(generation=None)],
    "a configuration that is a table": [own(config={"name": "x"})],  # type: ignore[arg-type]
    "a name with a newline": [own('schema = 1\nname = "a\\nb"\n')],
    "a name that is a path": [own('schema = 1\nname = "../../x"\n')],
    "a name that is an option": [own('schema = 1\nname = "--force"\n')],
    "a nested configuration": [own(f'schema = 1\nname = "a"\nx = {"[" * 20_000}{"]" * 20_000}\n')],
    "an unknown key": [own('schema = 1\nname = "a"\nhook = "/bin/sh"\n')],
    "a volume that is a path": [own('schema = 1\nname = "a"\n[mount.0]\ntarget = "/m"\nname = "../../x"\n')],
    "a variable with a newline": [own('schema = 1\nname = "a"\n[environment]\nA = "x\\ny"\n')],
    "a MAC that is a command": [own('schema = 1\nname = "a"\n[net.0]\nmac = "$(id)"\n')],
    "a card with a newline": [own('schema = 1\nname = "a"\n[net.0]\nname = "eth0\\nx"\n')],
    **{
        f"a mount on {target}": [own(f'schema = 1\nname = "a"\n[mount.0]\ntarget = "{target}"\n')]
        for target in ("/", "/proc", "/dev/pts", "/sys/fs", "/run/host", "/a/../..", "m", "/a\\nb")
    },
}  # fmt: skip


@pytest.mark.parametrize("attack", BAD_HEADS)
def test_a_bad_head_is_refused(scene: Scene, attack: str) -> None:
    data = pack([*BAD_HEADS[attack], *root()])
    scene.refused(scene.restore(data, stdin=bool(len(attack) % 2)), "cannot ")
    scene.refused(scene.verify(data))


RAW_HEADS: dict[str, bytes] = {
    "a gigabyte": raw(CONFIG, b"0", b"hostname: a\n", size=1 << 30),
    "16 EiB": raw(CONFIG, b"0", b"hostname: a\n", size=(1 << 64) - 1),
    "a negative size": raw(CONFIG, b"0", b"hostname: a\n", size=-(1 << 40)),
    "long names on end": raw("x", b"L", b"abc\0") * 3000,
    "headers for all on end": raw("x", b"g", b"12 a=bcdefg\n") * 3000,
    "a name of 16 EiB": raw("x", b"L", b"abc\0", size=(1 << 64) - 1),
    "headers of an exabyte": raw("x", b"x", b"abc\0", size=1 << 60),
}


@pytest.mark.parametrize("attack", RAW_HEADS)
def test_blocks_that_lie_are_refused(scene: Scene, attack: str) -> None:
    data = RAW_HEADS[attack] + bytes(10240)
    scene.refused(scene.restore(data))
    scene.refused(scene.verify(data))


def test_the_first_head_counts_and_none_is_unpacked(scene: Scene) -> None:
    late = [own('schema = 1\nname = "second"\n'), pct("hostname: third\n"), symlink(CONFIG, "/etc/shadow")]
    scene.restore(archive(*late, head=[own('schema = 1\nname = "first"\n'), pct("hostname: zeroth\n")]))
    (made,) = scene.made()
    assert made["name"] == "first"
    upper = scene.host.json("info", "first")
    assert upper["mounts"] == []
    for path in (CONFIG, OWN):
        assert scene.host.run("pull", f"first:{path[1:]}", str(scene.directory / "gone"), check=False).status


def test_a_head_that_comes_after_the_root_is_nothing(scene: Scene) -> None:
    evil = 'schema = 1\nname = "late"\n[mount.0]\ntarget = "/m"\nsource = "/etc"\n'
    scene.restore(pack([*root(), own(evil), pct("hostname: later\n")]), "--allow", "bind")
    (made,) = scene.made()
    assert made["name"] == "hostile"


# S13: what a configuration asks of the host

_WANTS = """\
schema = 1
name = "wants"
[mount.0]
target = "/host"
source = "/etc"
host_root = true
idmap = "0=0"
dev = true
[mount.1]
target = "/shared"
volume = "secret"
[device.0]
path = "/dev/loop0"
"""
_PCT_WANTS = """\
hostname: wants
mp0: /etc,mp=/host,backup=1
mp1: /dev/vda,mp=/disk
dev0: /dev/loop0,uid=0,mode=0666
features: nesting=1,keyctl=1,mount=nfs;cifs,fuse=1
hookscript: local:snippets/evil.sh
unprivileged: 0
lxc.mount.entry: /etc mnt none bind,create=dir 0 0
lxc.mount.entry = / host none rbind 0 0
lxc.hook.pre-start: /bin/sh -c id
lxc.hook.autodev: /bin/sh
lxc.rootfs.path: dir:/
lxc.include: /etc/shadow
lxc.idmap: u 0 0 65536
lxc.cap.drop:
lxc.apparmor.profile: unconfined
lxc.cgroup2.devices.allow: a
lxc.namespace.share.net: 1
lxc.environment: LD_PRELOAD=/x
"""


@pytest.mark.parametrize("head", [[own(_WANTS)], [pct(_PCT_WANTS)]], ids=["own", "pct"])
def test_what_widens_a_container_is_left_out_and_told(scene: Scene, head: list[Member]) -> None:
    done = scene.restore(archive(head=head), "--name", "wants")
    assert done.status == 0, done
    for word in ("/etc", "/dev/loop0", "--allow bind", "--allow device"):
        assert word in done.err, done
    info = scene.host.json("info", "wants")
    assert info["mounts"] == [], info
    text = Path(info["config_file"]).read_text()
    for word in ("/etc", "loop", "shared", "host_root", "lxc", "hook", "nesting", "LD_PRELOAD"):
        assert word not in text, text
    verified = scene.verify(archive(head=head))
    assert verified.status == 0
    assert "--allow bind" in verified.err


def test_who_replaces_a_container_gets_no_more_than_it_had(scene: Scene) -> None:
    scene.restore(archive(head=[own()]), "902", "--name", "mine")
    done = scene.restore(archive(head=[own(_WANTS)]), "902", "--force")
    assert done.status == 0, done
    assert "--allow bind" in done.err
    info = scene.host.json("info", "902")
    assert info["mounts"] == []
    assert "device" not in Path(info["config_file"]).read_text()


@pytest.mark.parametrize("kind", ["", "tmpfs = true\n"], ids=["volume", "tmpfs"])
@pytest.mark.parametrize("target", ["/deep/data", "/deep"])
def test_a_mount_point_that_is_a_link_leads_nowhere(scene: Scene, kind: str, target: str) -> None:
    text = f'schema = 1\nname = "linked"\n[mount.0]\ntarget = "{target}"\n{kind}'
    link = symlink("./deep", str(scene.canary) if target == "/deep" else str(scene.canary.parent))
    done = scene.restore(archive(link, member(f".{target}/new", b"x"), head=[own(text)]))
    assert len(scene.made()) == (done.status == 0)
    for one in scene.made():
        # Its init is none, and before that is tried all is mounted.
        assert scene.host.run("start", str(one["id"]), check=False).status != 0
    scene.destroy()
    scene.unharmed()


def test_an_archive_says_not_which_container_ends(scene: Scene) -> None:
    number = scene.host.json("info", scene.victim)["id"]
    data = archive(head=[own(id=number)])
    for stdin, name in ((False, "web.tar"), (True, ""), (False, "vzdump-lxc-999-2026_01_31-12_00_00.tar")):
        done = scene.restore(data, "--force", stdin=stdin, name=name)
        scene.refused(done, "nothing but the archive says that it is", f"{number}")
    # Without --force it is one more.
    done = scene.restore(data)
    assert done.status == 0, done
    assert scene.made()[0]["id"] != number


def test_what_is_another_containers_is_not_taken(scene: Scene) -> None:
    victim = scene.host.json("info", scene.victim)
    (card,) = victim["nets"]
    text = (
        f'schema = 1\nname = "{scene.victim}"\n'
        f'[net.0]\nip = "{victim["addresses"][0]}/24"\nmac = "{card["mac"]}"\n'
    )
    done = scene.restore(archive(head=[own(text, id=903)]), "903")
    assert done.status == 0, done
    info = scene.host.json("info", "903")
    assert info["name"] != scene.victim
    assert info["nets"][0]["mac"] != card["mac"]
    scene.host.run("start", "903", check=False)
    assert scene.host.json("info", "903")["state"] == "stopped"
    again = scene.restore(archive(head=[own(text, id=904, uuid=victim["uuid"])]))
    assert again.status == 0, again
    assert scene.host.json("info", "904")["uuid"] != victim["uuid"]


def test_the_notes_on_a_configuration_are_bounded(scene: Scene) -> None:
    many = "".join(f"mp{number}: /etc/{number},mp=/m{number}\nx{number}: y\n" for number in range(20_000))
    done = scene.restore(archive(head=[pct(f"hostname: a\n{many}")]))
    assert done.status == 0, done
    assert len(done.err.splitlines()) < 1000
    assert "more" in done.err
