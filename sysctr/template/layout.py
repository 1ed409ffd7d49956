"""Where the root is in a tar archive: at its top, or below a directory beside what describes it.

That is decided of its beginning, and tar then takes what is below that directory and nothing else. A member
that comes later and is not where the first ones are is none of the root's.
"""

import io
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence

from sysctr.linux.files import write_all
from sysctr.template.base import RunJob
from sysctr.template.jobs import run_connected
from sysctr.template.unpack import CHUNK_BYTES, DECOMPRESS

# How much of an archive as it is is looked at, and how much of what that unpacks to.
PEEKED_BYTES = 1 << 20
HEAD_LIMIT_BYTES = 4 << 20
# Images of LXC and Incus keep their root here, beside metadata.yaml and templates/.
_ROOTFS = "rootfs"
# Where one of these is, `rootfs` is a directory like any other.
_OF_A_ROOT = frozenset({"bin", "etc", "lib", "sbin", "usr", "var"})
_MEMBERS_LOOKED_AT = 512
_PEEK = f"""\
{DECOMPRESS}
decompress "$1" 2>/dev/null | head --bytes="$2"
"""


def unpacked_head(run_job: RunJob, codec: str, data: bytes) -> bytes:
    """Return what the first bytes of an archive unpack to, in a job: a decompressor is not trusted either."""
    if codec == "none":
        return data
    found = bytearray()

    def collect(fd: int) -> None:
        while piece := os.read(fd, CHUNK_BYTES):
            found.extend(piece)

    run_connected(
        run_job,
        ["bash", "-c", _PEEK, "peek", codec, str(HEAD_LIMIT_BYTES)],
        stdin=lambda fd: write_all(fd, data),
        stdout=collect,
    )
    return bytes(found)


def find_root(data: bytes) -> str:
    """Return the directory of an unpacked archive, which may end anywhere, that is the root, "" for all.

    It is spelled as the archive does: `rootfs` or `./rootfs`.
    """
    below = ""
    for member in first_members(data):
        dot = "./" if member.name.startswith("./") else ""
        top, slash, _ = member.name.removeprefix("./").partition("/")
        if top in _OF_A_ROOT:
            return ""
        if top == _ROOTFS and not below:
            if not slash and not member.isdir():
                return ""
            below = f"{dot}{top}"
    return below


def first_members(data: bytes) -> Iterator[tarfile.TarInfo]:
    """Yield the members that an unpacked archive begins with, as many as can be read of what is there."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for _ in range(_MEMBERS_LOOKED_AT):
                member = archive.next()
                if member is None:
                    return
                yield member
    except (tarfile.TarError, ValueError, OverflowError, EOFError, UnicodeError):
        return


def tar_arguments(roots: Mapping[str, str], left_out: Sequence[str] = ()) -> list[str]:
    """Return what tar is told so that it takes these directories alone, each to a place of its own.

    Both are paths; "" is all of the archive or all of the tree. What is left out are patterns of paths in
    each of them. It has to be the end of a command: directories are named by operands.

    >>> tar_arguments({"": ""}, ["dev/*"])
    ['--exclude=./dev/*', '--exclude=dev/*', '--exclude=/dev/*']
    """
    prefixes = [prefix for below in roots for prefix in ([f"{below}/"] if below else ["./", "", "/"])]
    arguments = [f"--exclude={prefix}{path}" for prefix in prefixes for path in left_out]
    for below, place in roots.items():
        if below:
            # The directory itself gives the new root its owner and permissions. Symbolic links keep their
            # targets, hard links follow their files.
            literal = below.replace(".", r"\.")
            arguments.append(f"--transform=s,^{literal}\\(/\\|$\\),./{place}\\1,rSh")
    return arguments + [below for below in roots if below]
