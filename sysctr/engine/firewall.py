"""The firewall rules of Proxmox that an archive brought: kept, put into backups again, and not enforced."""

import contextlib
import os

from sysctr.linux import files
from sysctr.paths import Layout

_NAME = "pct.fw"
_LIMIT_BYTES = 1 << 20


def note(rules: str) -> list[str]:
    """Return what people should know of an archive with these rules; nothing where there are none."""
    if not rules.strip():
        return []
    return [f"pct.fw: its firewall rules are kept as {_NAME} beside the container's record, and not enforced"]


def keep(layout: Layout, number: int, rules: str) -> None:
    """Keep the rules beside what is recorded of a container; without any, what was kept goes."""
    path = f"{layout.container_dir(number)}/{_NAME}"
    if rules.strip():
        files.write_atomically(path, rules.encode("utf-8", "surrogateescape"))
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def kept(layout: Layout, number: int) -> bytes:
    """Return the rules that were kept, nothing where there are none or they cannot be read."""
    try:
        return files.read_bounded(f"{layout.container_dir(number)}/{_NAME}", _LIMIT_BYTES)[0]
    except OSError:
        return b""
