"""push packs what is asked; pull survives whatever a container sends."""

import contextlib
import doctest
import io
import os
import stat
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sysctr import errors
from sysctr.cli import archive, files
from sysctr.cli import main as cli_main
from sysctr.cli.archive import Owner, pack, unpack
from tests.unit.cli_stub import Stub, Tickets, send


@pytest.mark.parametrize("module", [archive, files])
def test_examples_of_the_modules_hold(module):
    assert doctest.testmod(module).failed == 0


def member(name, kind=tarfile.REGTYPE, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode = kind, len(content), 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def stream(*members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as made:
        for info, content in members:
            made.addfile(info, io.BytesIO(content))
    return io.BytesIO(out.getvalue())


class Target:
    """A directory to unpack into, beside one that must stay as it is."""

    def __init__(self, root):
        self.root = root
        self.into = root / "into"
        self.into.mkdir()
        self.outside = root / "outside"
        self.outside.mkdir()
        (self.outside / "kept").write_text("kept")
        self.warnings = []

    def unpack(self, made, name="top", owner=None):
        fd = os.open(self.into, os.O_RDONLY | os.O_DIRECTORY)
        try:
            unpack(made, fd, name, owner or Owner(), self.warnings.append)
        finally:
            os.close(fd)

    def untouched(self):
        return sorted(os.listdir(self.outside)) == ["kept"] and (self.outside / "kept").read_text() == "kept"


@pytest.fixture
def target(tmp_path):
    target = Target(tmp_path)
    yield target
    assert target.untouched()
    assert sorted(os.listdir(tmp_path)) == ["into", "outside"]


def test_a_tree_arrives_under_the_name_the_user_chose(target):
    made = stream(
        member("etc", tarfile.DIRTYPE),
        member("etc/hosts", content=b"127.0.0.1"),
        member("etc/deep/er/x", content=b"y"),
        member("etc/link", tarfile.SYMTYPE, linkname="hosts"),
        member("etc/hard", tarfile.LNKTYPE, linkname="etc/hosts"),
    )
    target.unpack(made, "mine")
    assert (target.into / "mine/hosts").read_bytes() == b"127.0.0.1"
    assert (target.into / "mine/deep/er/x").read_bytes() == b"y"
    assert os.readlink(target.into / "mine/link") == "hosts"
    assert os.stat(target.into / "mine/hard").st_ino == os.stat(target.into / "mine/hosts").st_ino
    assert target.warnings == []


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../outside/kept", "top/../../outside/kept", "a/../../outside/x"]
)
def test_names_that_lead_out_are_refused(target, name):
    with pytest.raises(errors.Refused):
        target.unpack(stream(member("top", tarfile.DIRTYPE), member(name, content=b"owned")))


def test_a_second_top_is_refused(target):
    with pytest.raises(errors.Refused):
        target.unpack(stream(member("top", content=b"x"), member("other", content=b"y")), "top")


@pytest.mark.parametrize(
    "linkname",
    ["/etc", "..", "../../outside", "sub/../../../outside", "./../../x", "/", "hosts", "a\nb", "x\x1b[31m"],
)
def test_links_are_kept_as_they_are(target, linkname):
    made = stream(member("top", tarfile.DIRTYPE), member("top/l", tarfile.SYMTYPE, linkname=linkname))
    target.unpack(made)
    assert os.readlink(target.into / "top/l") == linkname
    assert target.warnings == []


def test_links_get_the_owner_that_was_asked_for(target):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    made = stream(member("top", tarfile.DIRTYPE), member("top/l", tarfile.SYMTYPE, linkname="/etc"))
    target.unpack(made, owner=Owner(uid=33, gid=44))
    status = os.lstat(target.into / "top/l")
    assert (status.st_uid, status.st_gid) == (33, 44)
    assert os.stat("/etc").st_uid == 0


def test_a_link_in_place_of_what_was_asked_for_is_refused(target):
    with pytest.raises(errors.Refused, match="cannot unpack mine: it is a link"):
        target.unpack(stream(member("top", tarfile.SYMTYPE, linkname="/etc")), "mine")
    assert os.listdir(target.into) == []


def test_a_link_to_nowhere_is_refused(target):
    with pytest.raises(errors.Refused, match="a link to nowhere"):
        target.unpack(stream(member("top/l", tarfile.SYMTYPE, linkname="")))


@pytest.mark.parametrize("leads", ["outside", "outside/kept", "absolute"])
def test_nothing_is_written_through_a_link_of_the_archive(target, leads):
    link = str(target.outside) if leads == "absolute" else f"../../{leads}"
    target.unpack(
        stream(
            member("top", tarfile.DIRTYPE),
            member("top/l", tarfile.SYMTYPE, linkname=link),
            member("top/l", content=b"owned"),
            member("top/m", tarfile.SYMTYPE, linkname=link),
            member("top/new", content=b"x"),
            member("top/new", tarfile.SYMTYPE, linkname=link),
        )
    )
    # Of two members with one name the link comes last, whatever their order was.
    assert {name: os.readlink(target.into / "top" / name) for name in ("l", "m", "new")} == dict.fromkeys(
        ("l", "m", "new"), link
    )
    assert target.untouched()


def test_what_lies_below_a_link_of_the_archive_is_an_error(target):
    made = stream(
        member("top", tarfile.DIRTYPE),
        member("top/l", tarfile.SYMTYPE, linkname="../../outside"),
        member("top/l/kept", content=b"owned"),
    )
    # The file made a real directory `l`, so the link has no place.
    with pytest.raises(errors.SysctrError, match="cannot write top/l"):
        target.unpack(made)
    assert (target.into / "top/l/kept").read_bytes() == b"owned"
    assert target.untouched()


def test_a_second_pull_replaces_the_links_of_the_first(target):
    for content in (b"first", b"second"):
        target.unpack(
            stream(
                member("top", tarfile.DIRTYPE),
                member("top/l", tarfile.SYMTYPE, linkname="../../outside"),
                member("top/f", content=content),
            )
        )
    assert (target.into / "top/f").read_bytes() == b"second"
    # What was a link in the first is a directory in the second: not entered, and said.
    with pytest.raises(errors.SysctrError, match="none is written through"):
        target.unpack(stream(member("top/l", tarfile.DIRTYPE), member("top/l/kept", content=b"owned")))
    assert target.untouched()


def test_a_link_that_was_in_the_destination_before_is_not_followed(target):
    os.mkdir(target.into / "top")
    os.symlink(target.outside, target.into / "top/l")
    os.symlink(target.outside / "kept", target.into / "top/f")
    with pytest.raises(errors.SysctrError):
        target.unpack(stream(member("top/l/kept", content=b"owned")))
    target.unpack(stream(member("top/f", content=b"new")))
    assert not os.path.islink(target.into / "top/f")


@pytest.mark.parametrize("linkname", ["../outside/kept", "/etc/passwd", "top/l", "top/never"])
def test_hard_links_reach_only_files_of_the_archive(target, linkname):
    made = stream(
        member("top", tarfile.DIRTYPE),
        member("top/l", tarfile.SYMTYPE, linkname="x"),
        member("top/h", tarfile.LNKTYPE, linkname=linkname),
    )
    with pytest.raises(errors.Refused):
        target.unpack(made)


def test_devices_and_pipes_are_left_out_and_setuid_bits_dropped(target):
    made = stream(
        member("top", tarfile.DIRTYPE, mode=0o7777),
        member("top/dev", tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("top/pipe", tarfile.FIFOTYPE),
        member("top/su", content=b"x", mode=0o6777, uid=0),
    )
    target.unpack(made)
    assert sorted(os.listdir(target.into / "top")) == ["su"]
    assert stat.S_IMODE(os.stat(target.into / "top/su").st_mode) == 0o755
    assert stat.S_IMODE(os.stat(target.into / "top").st_mode) & 0o7022 == 0
    assert len(target.warnings) == 2


def test_a_header_that_would_fill_the_memory_is_refused(target):
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 64 * 1024**3
    with pytest.raises(errors.SysctrError, match="too large"):
        target.unpack(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 1024))


def test_a_negative_size_does_not_read_for_ever(target):
    info = tarfile.TarInfo("top/x")
    info.size = 512
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    raw[124:136] = b"\xff" * 8 + (-512).to_bytes(4, "big", signed=True)
    raw[148:156] = b"        "
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    with pytest.raises(errors.SysctrError):
        target.unpack(io.BytesIO(bytes(raw) + bytes(1024)))


@given(st.binary(max_size=3000))
def test_noise_is_an_error_and_never_a_crash(noise):
    read_fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        # An end of the archive in the first bytes is an empty archive; all else is an error of ours.
        with contextlib.suppress(errors.SysctrError):
            unpack(io.BytesIO(b"x" + noise), read_fd, "never-made", Owner(), lambda _: None)
        assert not os.path.lexists("/never-made")
    finally:
        os.close(read_fd)


_NAMES = st.lists(st.sampled_from(["..", ".", "a", "b", "new\nline", ""]), min_size=1, max_size=4).map(
    "/".join
)
_KINDS = [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, b"Z"]
_MEMBERS = st.tuples(
    st.one_of(_NAMES.map("top/{}".format), _NAMES, st.just("/etc/x")),
    st.sampled_from(_KINDS),
    st.one_of(
        _NAMES, _NAMES.map("top/{}".format), st.sampled_from(["/", "../../outside", "../outside/kept"])
    ),
)


@settings(deadline=None)
@given(st.lists(_MEMBERS, max_size=6), st.sampled_from(["top", ""]))
def test_no_order_of_members_reaches_outside(drawn, name):
    with tempfile.TemporaryDirectory() as root:
        target = Target(Path(root))
        made = stream(
            *(
                member(path, kind, b"owned" if kind == tarfile.REGTYPE else b"", linkname=link)
                for path, kind, link in drawn
            )
        )
        for _ in range(2):
            # The second time everything is in the way of itself.
            made.seek(0)
            with contextlib.suppress(errors.SysctrError):
                target.unpack(made, name)
        assert target.untouched()
        assert sorted(os.listdir(root)) == ["into", "outside"]


_PAX = st.dictionaries(
    st.sampled_from(
        ["size", "mtime", "uid", "path", "linkpath", "GNU.sparse.map", "GNU.sparse.major", "GNU.sparse.minor",
         "GNU.sparse.size", "GNU.sparse.realsize", "hdrcharset", "SCHILY.xattr.user.a"]
    ),
    st.sampled_from(["", "0", "1", "-1", "1e400", "nan", "inf", "9" * 30, "a,b", "1,2,3", "top/x", "BINARY"]),
    max_size=4,
)  # fmt: skip


@settings(deadline=None)
@given(_PAX, st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE]))
def test_pax_headers_are_an_error_or_a_file_and_never_a_crash(pax, kind):
    info, content = member("top/f", kind, linkname="x")
    info.pax_headers = pax
    raw = info.tobuf(tarfile.PAX_FORMAT) + content + bytes(2048)
    with tempfile.TemporaryDirectory() as root, contextlib.suppress(errors.SysctrError):
        Target(Path(root)).unpack(io.BytesIO(raw))


def test_headers_before_headers_without_end_are_an_error(target):
    info, _ = member("top/f")
    info.pax_headers = {"comment": "x"}
    header = info.tobuf(tarfile.PAX_FORMAT)[:-512]
    with pytest.raises(errors.SysctrError):
        target.unpack(io.BytesIO(header * 5000))


def test_what_is_packed_is_roots_and_has_the_mode_asked_for(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "f").write_bytes(b"content")
    os.symlink("/etc", tree / "l")
    os.mkfifo(tree / "p")
    out, warnings = io.BytesIO(), []
    pack([(str(tree), "named")], out, Owner(uid=33, mode=0o600), warnings.append)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as made:
        members = {info.name: info for info in made}
    assert sorted(members) == ["named", "named/f", "named/l"]
    assert {(info.uid, info.gid, info.uname) for info in members.values()} == {(33, 0, "")}
    assert members["named/f"].mode == 0o600
    assert members["named/l"].linkname == "/etc"
    assert len(warnings) == 1


@pytest.fixture
def host(tmp_path, monkeypatch):
    stub = Stub(tmp_path / "host")
    monkeypatch.setenv("SYSCTR_ROOT", stub.layout.root)
    stub.routes["POST", "/1/containers/demo/files"] = {"ticket": "t", "socket": stub.layout.ticket_socket}
    yield stub
    stub.close()


def serve_tar(name, argv):
    """Be the job inside: a program whose stdin or stdout is the stream."""

    def run(connection, _):
        read_fd, write_fd = os.pipe()
        ours, theirs = (read_fd, write_fd) if name == "stdin" else (write_fd, read_fd)
        send(connection, {"ok": True, "fds": [name]}, [theirs])
        os.close(theirs)
        done = subprocess.run(argv, **{name: ours}, check=False)
        os.close(ours)
        send(connection, {"exit": done.returncode})

    return run


def test_push_and_pull_carry_a_tree_there_and_back(host, tmp_path, capsys):
    inside = tmp_path / "inside"
    inside.mkdir()
    source = tmp_path / "site"
    (source / "sub").mkdir(parents=True)
    (source / "sub/page").write_bytes(os.urandom(300_000))
    tickets = Tickets(host.layout, serve_tar("stdin", ["tar", "-x", "-C", str(inside)]))
    assert cli_main(["push", str(source), "demo:/srv"]) == 0
    tickets.close()
    os.unlink(host.layout.ticket_socket)
    assert (inside / "site/sub/page").read_bytes() == (source / "sub/page").read_bytes()
    assert host.requests[-1][3] == {"op": "push", "path": "/srv", "names": ["site"]}
    tickets = Tickets(host.layout, serve_tar("stdout", ["tar", "-c", "-C", str(inside), "site"]))
    assert cli_main(["pull", "demo:/srv/site", str(tmp_path / "back")]) == 0
    tickets.close()
    assert (tmp_path / "back/sub/page").read_bytes() == (source / "sub/page").read_bytes()
    assert host.requests[-1][3] == {"op": "pull", "path": "/srv/site"}


def test_names_of_owners_go_in_the_request_and_numbers_into_the_stream(host, tmp_path):
    source = tmp_path / "f"
    source.write_text("x")
    stream_file = tmp_path / "stream"
    tickets = Tickets(host.layout, serve_tar("stdin", ["dd", f"of={stream_file}", "status=none"]))
    assert (
        cli_main(["push", "--user", "www-data", "--group", "44", "--mode", "600", str(source), "demo:/f"])
        == 0
    )
    tickets.close()
    assert host.requests[-1][3] == {"op": "push", "path": "/f", "names": ["f"], "user": "www-data"}
    with tarfile.open(stream_file) as made:
        info = made.next()
    assert (info.name, info.uid, info.gid, info.mode) == ("f", 0, 44, 0o600)


def test_a_push_that_the_other_side_breaks_off_reports_its_reason(host, tmp_path, capsys):
    big = tmp_path / "big"
    big.write_bytes(bytes(1_000_000))

    def refuse(connection, _):
        read_fd, write_fd = os.pipe()
        send(connection, {"ok": True, "fds": ["stdin"]}, [write_fd])
        os.close(write_fd)
        os.close(read_fd)
        error = {"code": "no-space", "message": "cannot write /srv/big: the disk is full", "hint": ""}
        send(connection, {"error": error})

    tickets = Tickets(host.layout, refuse)
    assert cli_main(["push", str(big), "demo:/srv"]) == 1
    tickets.close()
    assert "cannot write /srv/big: the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["push", "a"], ["push", "a", "b"], ["push", "a", "b", "c", "d"], ["pull", "demo:/x"]]
)
def test_an_order_that_names_no_container_is_wrong_usage(host, arguments):
    assert cli_main(arguments) == 2


def test_orders_of_pct_are_understood():
    assert files.push_order(["101", "./f", "/etc/f"]) == (["./f"], "101", "/etc/f")
    assert files.pull_order(["101", "/etc/f", "f"]) == ([("101", "/etc/f")], "f")
