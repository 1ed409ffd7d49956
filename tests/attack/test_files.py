"""Work on a container's files (security.md S10, S20-S22) leads nowhere and runs nothing of the guest's."""

import io
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from sysctr.runtime import wire
from tests.attack.inside import Inside, init_pid, inside
from tests.node import Node
from tests.system.guests import create, shell
from tests.system.guests import inside as output
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.needs("userns", "idmap", "overlay", "veth", "busybox")]


def push_stream(host: Node, ref: str, data: bytes, path: str = "/root/") -> dict:
    """Send a tar stream of any kind into a container; return the supervisor's last word."""
    status, ticket = host.api("POST", f"/1/containers/{ref}/files", {"op": "push", "path": path})
    assert status == 200, ticket
    with wire.connect(ticket["socket"], 20) as connection:
        wire.send(connection, {"ticket": ticket["ticket"]})
        answer, fds = wire.receive(connection)
        assert answer.get("ok"), answer
        with os.fdopen(fds[0], "wb", buffering=0) as stream:
            try:
                stream.write(data)
            except BrokenPipeError:
                pass
        return wire.receive_plain(connection)


def archive(*members: tarfile.TarInfo, compression: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as out:
        for member in members:
            out.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_no_stream_gets_outside(shared_host: Node, tmp_path: Path, running: bool) -> None:
    host = shared_host
    ref = create(host, start=running)
    precious = tmp_path / "precious"
    precious.write_text("the host's\n")
    up = "../" * 20
    streams = [
        archive(member(f"{up}{precious}", size=4)),
        archive(member(str(precious), size=4)),
        archive(member("link", tarfile.SYMTYPE, str(tmp_path)), member("link/precious", size=4)),
        archive(member("link2", tarfile.SYMTYPE, f"{up}{tmp_path}"), member("link2/precious", size=4)),
        archive(member("hard", tarfile.LNKTYPE, str(precious)), member("hard", size=4)),
        archive(member("device", tarfile.BLKTYPE)),
        b"no tar at all" * 1000,
        b"",
    ]
    for stream in streams:
        push_stream(host, ref, stream)
    assert precious.read_text() == "the host's\n"
    assert os.listdir(tmp_path) == ["precious"]
    host.run("destroy", ref, "--force", "--yes")


def test_a_target_that_leads_out_stays_inside(shared_host: Node, tmp_path: Path) -> None:
    host = shared_host
    ref = create(host)
    precious = tmp_path / "precious"
    precious.write_text("the host's\n")
    shell(host, ref, f"cd /root; ln -s {tmp_path} out; ln -s /proc/1/root proc; ln -s {precious} file")
    source = tmp_path / "source"
    source.write_text("new\n")
    for target in ("/root/out/precious", "/root/file", "/root/proc/etc/x"):
        host.run("push", str(source), f"{ref}:{target}", check=False)
    done = host.run("pull", f"{ref}:{precious}", str(tmp_path / "got"), check=False)
    assert done.status != 0
    assert sorted(os.listdir(tmp_path)) == ["precious", "source"]
    assert precious.read_text() == "the host's\n"
    host.run("destroy", ref, "--force", "--yes")


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_no_code_of_the_container_is_loaded(shared_host: Node, tmp_path: Path, running: bool) -> None:
    """Python's modules and the C library's name service would be looked for in the tree one works on."""
    host = shared_host
    ref = create(host)
    trap = "open('/root/owned', 'w').write('owned')\\nraise SystemExit(1)\\n"
    paths = " ".join(f"'{path}'" for path in sys.path if path.startswith("/"))
    names = "bz2 lzma zlib gzip _bz2 _lzma pwd grp encodings/idna encodings/latin_1 linecache traceback"
    shell(host, ref, f"for d in {paths}; do for n in {names}; do mkdir -p $d/encodings && "
          f"printf \"{trap}\" > $d/$n.py; done; done")  # fmt: skip
    # Opening either of these would wait for ever; the passwords are read by our own code, without waiting.
    shell(host, ref, "cd /etc; rm passwd group; mkfifo passwd group nsswitch.conf; echo x > /root/file")
    if not running:
        host.run("stop", ref, "--kill")
    for compression in ("", "gz", "bz2", "xz"):
        answer = push_stream(host, ref, archive(member(f"file-{compression}"), compression=compression))
        assert answer.get("exit") == 0, (compression, answer)
    host.run("pull", f"{ref}:/root", str(tmp_path / "got"), timeout_s=30)
    assert (tmp_path / "got" / "file-bz2").exists()
    assert not (tmp_path / "got" / "owned").exists()
    host.run("destroy", ref, "--force", "--yes")


@pytest.mark.parametrize(
    "trap",
    ["mkfifo /etc/passwd", "ln -s /dev/zero /etc/passwd", "ln -s /dev/console /etc/passwd",
     "mkdir /etc/passwd", "dd if=/dev/zero of=/etc/passwd bs=1M count=64", "ln -s passwd /etc/passwd",
     "rm -f /dev/ptmx; mount -t tmpfs none /dev/pts; mkfifo /dev/pts/ptmx"],
)  # fmt: skip
def test_a_trapped_exec_hangs_nobody_else(shared_host: Node, victim: str, trap: str) -> None:
    host = shared_host
    ref = create(host)
    shell(host, ref, f"rm -f /etc/passwd; {trap}", check=False)
    client = host.popen("exec", "--tty", ref, "--", "true", stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    plain = host.popen("exec", ref, "--", "true", stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert output(host, victim, "echo on") == "on"
    assert host.run("list", timeout_s=5).status == 0
    assert plain.wait(20) in (0, 1, 125, 126, 127)
    client.kill()
    host.run("destroy", ref, "--force", "--yes", timeout_s=60)


def test_a_file_swapped_while_it_is_read_leads_nowhere(shared_host: Node, tmp_path: Path) -> None:
    host = shared_host
    ref = create(host)
    secret = tmp_path / "secret"
    secret.write_text("of the host")

    def attack() -> None:
        os.makedirs("/root/swap", exist_ok=True)
        Path("/root/swap/real").write_text("inside")
        while True:
            for target in ("real", str(secret)):
                os.symlink(target, "/root/swap/.new")
                os.rename("/root/swap/.new", "/root/swap/file")

    with Inside(init_pid(host, ref), attack):
        shell(host, ref, "while [ ! -L /root/swap/file ]; do :; done")
        for number in range(10):
            host.run("pull", f"{ref}:/root/swap/file", str(tmp_path / f"got-{number}"), check=False)
    for got in tmp_path.glob("got-*"):
        assert got.is_symlink() or got.read_text() == "inside"
        assert "of the host" not in (got.read_text() if not got.is_symlink() else "")
    host.run("destroy", ref, "--force", "--yes")


def test_the_console_is_kept_where_no_link_is_followed(host: Node, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("the host's\n")
    host.run("create", "one", "--template", "tiny")
    ring = Path(f"{host.layout.consoles}/{host.json('info', 'one')['id']}.ring")
    ring.unlink(missing_ok=True)
    ring.symlink_to(precious)
    host.run("start", "one")
    assert precious.read_text() == "the host's\n"
    assert not ring.is_symlink()


def test_abandoned_and_unread_execs_cost_nobody_anything(shared_host: Node, victim: str) -> None:
    host = shared_host
    ref = create(host)
    deaf = []
    for _ in range(5):
        _, ticket = host.api("POST", f"/1/containers/{ref}/exec", {"argv": ["yes"]})
        connection = wire.connect(ticket["socket"], 10)
        wire.send(connection, {"ticket": ticket["ticket"]})
        answer, fds = wire.receive(connection)
        assert answer.get("ok"), answer
        deaf.append((connection, fds))
    assert output(host, victim, "echo on") == "on"
    for connection, fds in deaf:
        wire.close_all(fds)
        connection.close()
    wait_until(lambda: "yes" not in output(host, ref, "ps -o comm"), what="the end of what nobody reads")
    host.run("destroy", ref, "--force", "--yes")


def test_a_ticket_works_once_and_cannot_be_guessed(shared_host: Node, evil: str) -> None:
    host = shared_host
    _, ticket = host.api("POST", f"/1/containers/{evil}/exec", {"argv": ["true"]})
    assert len(ticket["ticket"]) == 32

    def use(text: object) -> dict:
        with wire.connect(ticket["socket"], 10) as connection:
            wire.send(connection, {"ticket": text})
            answer, fds = wire.receive(connection)
            wire.close_all(fds)
            return answer

    assert use(ticket["ticket"]).get("ok")
    for text in (ticket["ticket"], "", None, "0" * 32, ["a"], {"a": 1}, 7):
        assert use(text)["error"]["code"] == "not-found"
    # The plan socket is not a ticket socket, and the other way round.
    with wire.connect(host.layout.ticket_socket, 10) as connection:
        wire.send(connection, {"op": "list"})
        assert "error" in wire.receive_plain(connection)


def test_garbage_on_the_ticket_socket_hurts_nobody(shared_host: Node, victim: str) -> None:
    host = shared_host
    supervisor = host.pids()["supervisor"]
    for data in (b"", bytes(50_000), b"[" * 50_000, b'{"ticket":', b'{"_memfd":true}', b"1" * 60_000, b"NaN"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(host.layout.ticket_socket)
            sock.send(data)
    idle = [wire.connect(host.layout.ticket_socket, 10) for _ in range(200)]
    assert output(host, victim, "echo on") == "on"
    for sock in idle:
        sock.close()
    assert host.pids()["supervisor"] == supervisor


def test_what_the_container_pulled_out_is_not_followed_here(shared_host: Node, tmp_path: Path) -> None:
    """Pulled names are the guest's; see also the client's own tests of hostile archives."""
    host = shared_host
    ref = create(host)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "kept").write_text("the host's\n")

    def attack() -> None:
        os.makedirs("/root/tree/sub")
        os.symlink(precious, "/root/tree/link")
        os.symlink(f"{precious}/kept", "/root/tree/file")
        os.symlink("../../precious", "/root/tree/sub/up")
        os.link("/root/tree/file", "/root/tree/hard", follow_symlinks=False)
        Path("/root/tree/we\nird\x1b[31m").write_text("x")

    def swap() -> None:
        for name in ("link", "file", "hard", "sub/up"):
            os.unlink(f"/root/tree/{name}")
        for name in ("file", "hard"):
            Path(f"/root/tree/{name}").write_text("of the guest")
        for name in ("link", "sub/up"):
            os.mkdir(f"/root/tree/{name}")
            Path(f"/root/tree/{name}/kept").write_text("of the guest")

    inside(init_pid(host, ref), attack)
    done = host.run("pull", f"{ref}:/root/tree", str(tmp_path / "tree"))
    assert b"\x1b[31m" not in done.stdout + done.stderr
    links = {name: os.readlink(tmp_path / "tree" / name) for name in ("link", "file", "hard", "sub/up")}
    assert links == {"link": str(precious), "file": f"{precious}/kept", "hard": f"{precious}/kept",
                     "sub/up": "../../precious"}  # fmt: skip
    # The same tree again, with files where the links were.
    inside(init_pid(host, ref), swap)
    (tmp_path / "again").mkdir()
    os.rename(tmp_path / "tree", tmp_path / "again/tree")
    os.symlink("../precious", tmp_path / "again/precious")
    done = host.run("pull", f"{ref}:/root/tree", str(tmp_path / "again"), check=False)
    assert (done.status, "none is written through" in done.err) == (1, True), done
    assert os.listdir(precious) == ["kept"]
    assert (precious / "kept").read_text() == "the host's\n"
    host.run("destroy", ref, "--force", "--yes")
