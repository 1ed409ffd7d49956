"""Proxmox's pct.conf as text: what Proxmox writes comes back unchanged, and no document loses anything."""

import contextlib
import doctest
import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sysctr.config import pct
from sysctr.config.pct import Document, Section, read, write
from sysctr.errors import ConfigError

WHOLE = """\
#Web front end
#second description line%3A 100%25
arch: amd64
cores: 2
hostname: www
mp0: local-zfs:subvol-107-disk-1,mp=/srv,backup=1,size=20G
mp1: /tank/media,mp=/media,ro=1,replicate=0
mp10: local-zfs:subvol-107-disk-2,mp=/srv/b
unknown_key: kept as it is
unprivileged: 1
lxc.environment.runtime: FOO=bar
lxc.environment.runtime: EMPTY=
lxc.mount.entry: /dev/net/tun dev/net/tun none bind,create=file
lxc.cgroup2.devices.allow: c 10:200 rwm
lxc.empty: 

[pve:pending]
delete: mp1,!unused0
memory: 4096

[After]
snapstate: prepare

[before_upgrade]
#taken before dist-upgrade
hostname: www
snaptime: 1767225600
"""  # noqa: W291  # Proxmox writes an empty raw value so


def test_a_whole_file_becomes_a_document_and_the_same_file() -> None:
    document = read(WHOLE)
    assert document.root.description == "Web front end\nsecond description line: 100%"
    assert document.root.values["mp1"] == "/tank/media,mp=/media,ro=1,replicate=0"
    assert document.root.values["unknown_key"] == "kept as it is"
    assert document.root.environment == ("FOO=bar", "EMPTY=")
    assert document.root.raw == (
        ("lxc.mount.entry", "/dev/net/tun dev/net/tun none bind,create=file"),
        ("lxc.cgroup2.devices.allow", "c 10:200 rwm"),
        ("lxc.empty", ""),
    )
    assert document.pending == Section(values={"delete": "mp1,!unused0", "memory": "4096"})
    assert list(document.snapshots) == ["After", "before_upgrade"]
    assert document.snapshots["before_upgrade"].description == "taken before dist-upgrade"
    assert document.problems == ()
    assert write(document) == WHOLE
    assert read(write(document)) == document


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        ("\n \t\n", ""),
        ("\u00a0\nhostname: a\u00a0 \n", "hostname: a\u00a0\n\u00a0\n"),
        ("arch:amd64", "arch: amd64\n"),
        ("arch:  amd64 \t\r\n", "arch: amd64\n"),
        ("b: 1\na: 2\n", "a: 2\nb: 1\n"),
        ("lxc.tty.max=4\n", "lxc.tty.max: 4\n"),
        ("lxc.tty.max   =  4\n", "lxc.tty.max: 4\n"),
        ("lxc.b = 1\nlxc.a = 2\nonboot: 1\n", "onboot: 1\nlxc.b: 1\nlxc.a: 2\n"),
        ("env: A=1\n", "lxc.environment.runtime: A=1\n"),
        ("lxc.environment.runtime = A=1\n", "lxc.environment.runtime: A=1\n"),
        ("onboot: 1\n#late\n", "#late\nonboot: 1\n"),
        ("description: one%0Atwo\n", "#one\n#two\n"),
        ("#a\n#\n#b\n#\n", "#a\n#\n#b\n"),
        ("#%0a%0A\n", ""),
        ("#%c3%A9 \u00e9 %zz\n", "#%C3%A9 %C3%A9 %25zz\n"),
        ("[PVE:Pending] \nmemory: 1\n", "\n[pve:pending]\nmemory: 1\n"),
        ("[pve:pending]\n", ""),
        ("[b_1]\n[a-]\na: 1\n", "\n[a-]\na: 1\n\n[b_1]\n"),
        ("snapstate: delete\nonboot: 1\n", "onboot: 1\n"),
        ("delete: mp1\n", "delete: mp1\n"),
        ("[snap]\ndelete: mp1\nparent: x\n", "\n[snap]\nparent: x\ndelete: mp1\n"),
        (" onboot: 1\nMemory: 1\nempty:\nonboot: 0\n[x\n", "onboot: 0\n onboot: 1\nMemory: 1\nempty:\n[x\n"),
    ],
)  # fmt: skip
def test_what_is_not_as_proxmox_writes_it_becomes_so(text: str, canonical: str) -> None:
    document = read(text)
    assert write(document) == canonical
    assert read(canonical) == document
    assert write(read(canonical)) == canonical


def test_a_key_that_is_there_twice_counts_as_said_last() -> None:
    document = read("memory: 1\nonboot: 1\nmemory: 2\nonboot: 1\nsnapstate: delete\n")
    assert document.root.values == {"memory": "2", "onboot": "1"}
    assert document.problems == ("line 3: memory is there twice: this one counts",
                                 "line 5: snapstate is of snapshots only")  # fmt: skip


def test_what_is_no_utf8_comes_back_as_the_same_bytes() -> None:
    raw = b"#\xff%FE\xc3\xa9\nhostname: a\xfe\n"
    document = read(raw)
    assert document.root.values == {"hostname": "a\udcfe"}
    assert write(document).encode("utf-8", "surrogateescape") == b"#%FF%FE%C3%A9\nhostname: a\xfe\n"
    assert read(write(document)) == document


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: 1\nb: \0\n", "line 2: a zero byte"),
        ("a: 1\n[x1]\n[y1]\n[x1]\n", r"line 4: the section \[x1\] is there twice"),
        ("[pve:pending]\n[PVE:PENDING]\n", r"line 2: the section \[pve:pending\] is there twice"),
        ("a: 1\nb: \ud800\n", "line 2: it is not text"),
        ("a" * (2**20 + 1), "longer than 1048576 bytes"),
        ("\u00e9" * 2**19 + "a", "longer than 1048576 bytes"),
        ("#" + ":" * 2**19, "longer than 1048576 bytes"),
    ],
)
def test_a_text_that_breaks_the_format_is_refused_with_its_line(text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        read(text)


@pytest.mark.parametrize(
    "line", [f"a: {' ' * 2**19}x{' ' * 2**18}", f"lxc.a{' ' * 2**19}", "[" + "a" * 2**19, "a" * 2**19]
)
def test_a_line_that_is_built_to_take_long_does_not(line: str) -> None:
    # What is quadratic in the spaces takes hours here.
    document = read(line)
    assert read(write(document)) == document


@pytest.mark.parametrize(
    "wrong",
    [
        {"root": Section(values={"Memory": "1"})},
        {"root": Section(values={"memory": ""})},
        {"root": Section(values={"memory": " 1"})},
        {"root": Section(values={"memory": "1\nonboot: 1"})},
        {"root": Section(values={"memory": "1\0"})},
        {"root": Section(values={"description": "x"})},
        {"root": Section(values={"env": "x"})},
        {"root": Section(values={"snapstate": "prepare"})},
        {"root": Section(values={"delete": "mp0"})},
        {"root": Section(values={"hostname": "\ud800"})},
        {"root": Section(description="\udcc3\udca9")},
        {"root": Section(description="x\n")},
        {"root": Section(raw=(("lxc.environment.runtime", "A=1"),))},
        {"root": Section(raw=(("lxc.a b", "1"),))},
        {"root": Section(raw=(("lxc.a", "1 "),))},
        {"root": Section(environment=("A=1\nonboot: 1",))},
        {"root": Section(lines=("onboot: 1",))},
        {"root": Section(values={"onboot": "1"}, lines=("onboot: 1",))},
        {"root": Section(lines=("#x",))},
        {"root": Section(lines=("",))},
        {"root": Section(lines=("[x1]",))},
        {"pending": Section(lines=("delete: a",))},
        {"snapshots": {"pve:pending": Section()}},
        {"snapshots": {"a]\n[b": Section()}},
        {"snapshots": {"a": Section()}},
    ],
)
def test_a_document_that_would_not_come_back_cannot_be_made(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=r"^cannot write "):
        Document(**wrong)


# Texts as Proxmox writes them, and any documents

_PRINTABLE = string.digits + string.ascii_letters + string.punctuation + "\u00e9\u2028 "
_VALUE = st.text(_PRINTABLE, min_size=1, max_size=12).map(lambda text: text.strip(pct.SPACE)).filter(bool)
_KEY = st.from_regex(r"[a-z][a-z_]{0,5}[0-9]{0,2}", fullmatch=True).filter(
    lambda key: key not in ("description", "env", "delete", "snapstate")
)
_RAW_KEY = st.from_regex(r"lxc\.[a-z0-9_.-]{1,6}", fullmatch=True)
_SNAPSHOT = st.from_regex(r"[a-zA-Z][a-z0-9_-]{1,6}", fullmatch=True)


@st.composite
def block(draw: st.DrawFn) -> list[str]:
    """A section's lines as Proxmox writes them."""
    description = draw(st.lists(st.text(string.ascii_letters + " #=[]", max_size=6), max_size=3))
    while description and not description[-1]:
        description.pop()
    escaped = draw(st.lists(st.sampled_from(["%3A", "%25", "%C3%A9", "%0D", "%7F", "x"]), max_size=2))
    lines = [f"#{line}" for line in description] + ([f"#{''.join(escaped)}"] if escaped else [])
    values = draw(st.dictionaries(_KEY, _VALUE, max_size=4))
    lines += [f"{key}: {values[key]}" for key in sorted(values)]
    lines += [f"lxc.environment.runtime: {item}" for item in draw(st.lists(_VALUE, max_size=2))]
    return lines + [f"{key}: {draw(_VALUE)}" for key in draw(st.lists(_RAW_KEY, max_size=3))]


@st.composite
def proxmox_texts(draw: st.DrawFn) -> str:
    """A file as Proxmox writes it: `pending` only where there is something, snapshots sorted."""
    lines = draw(block())
    if pending := draw(block()):
        lines += ["", "[pve:pending]", *pending]
    for name in sorted(draw(st.sets(_SNAPSHOT, max_size=2))):
        lines += ["", f"[{name}]", *draw(block())]
    return "".join(f"{line}\n" for line in lines)


@settings(deadline=None)
@given(proxmox_texts())
@example(WHOLE)
def test_what_proxmox_writes_is_written_again(text: str) -> None:
    assert write(read(text)) == text


ANYTHING = st.text(st.characters() | st.sampled_from("\n\r\f\v \t:=#[]%lxc."), max_size=12)
SECTIONS = st.builds(
    Section,
    description=ANYTHING,
    values=st.dictionaries(_KEY | st.sampled_from(["delete", "snapstate"]), ANYTHING | _VALUE, max_size=3),
    environment=st.lists(ANYTHING | _VALUE, max_size=2).map(tuple),
    raw=st.lists(st.tuples(_RAW_KEY, ANYTHING | _VALUE), max_size=3).map(tuple),
    lines=st.lists(ANYTHING, max_size=2).map(tuple),
)


@settings(deadline=None)
@given(SECTIONS, SECTIONS, st.dictionaries(_SNAPSHOT, SECTIONS, max_size=2))
def test_every_document_comes_back(root: Section, pending: Section, snapshots: dict) -> None:
    # Whatever part of it cannot be a document's is refused; each part that can be comes back.
    for parts in (
        {"root": root}, {"pending": pending}, {"snapshots": snapshots},
        {"root": root, "pending": pending, "snapshots": snapshots},
    ):  # fmt: skip
        with contextlib.suppress(ConfigError):
            document = Document(**parts)
            assert read(write(document)) == document


_LINES = st.lists(
    st.one_of(
        ANYTHING,
        st.sampled_from(
            ["[pve:pending]", "[snap]", "#%0a", "#%c3", "delete: a", "snapstate: delete", "description: %e9",
             "lxc.environment.runtime:", "lxc.environment.runtime: A=1", "env: B", "lxc.a=", "a: 1", "a:  2 ",
             "\ufeffa: 1", "a: 1\r", "\x1b[31m", "\u0430: 1", "\u212aey: 1", "[\u017fnap]"]
        ),
    ),
    max_size=8,
).map("\n".join)  # fmt: skip


@settings(deadline=None)
@given(_LINES | st.binary(max_size=60))
def test_any_text_is_read_and_settles_or_is_refused(text: str | bytes) -> None:
    refusal = ""
    try:
        document = read(text)
    except ConfigError as error:
        refusal = error.message
    if refusal:
        assert refusal.isprintable()
        assert "line" in refusal
        return
    canonical = write(document)
    assert read(canonical) == document
    assert write(read(canonical)) == canonical


def test_property_strings_are_read_strictly() -> None:
    known = ("volume", "size", "mp")
    assert pct.parse_property_string("local:1,mp=/a=b,size=8G", known, "volume") == {
        "volume": "local:1", "mp": "/a=b", "size": "8G",
    }  # fmt: skip
    assert pct.parse_property_string("size=8G,local:1", known, "volume")["volume"] == "local:1"
    for wrong in ("a,b", "size=1,size=2", "other=1", "size=", "=1"):
        with pytest.raises(ConfigError):
            pct.parse_property_string(wrong, known, "volume")
    with pytest.raises(ConfigError, match="not written key=value"):
        pct.parse_property_string("bare", known)


def test_the_examples_hold() -> None:
    assert doctest.testmod(pct).failed == 0
