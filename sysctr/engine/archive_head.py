"""What the first members of an archive say: whose it is, and its configuration.

./etc/vzdump/pct.conf, ./etc/vzdump/pct.fw   as vzdump writes them (proxmox.md 2.2)
./dev/.sysctr.json                           what pct.conf cannot say; Proxmox leaves out all below ./dev
./backup/index.yaml                          of an export of Incus or LXD (images-and-migration.md 4.5)
"""

import io
import json
import tarfile
import uuid
from dataclasses import dataclass
from typing import Any

from sysctr.config import incus, schema, toml, values
from sysctr.config.foreign import Foreign
from sysctr.engine.record import Record
from sysctr.errors import ConfigError, SysctrError
from sysctr.template.layout import find_root, first_members

CONFIG_MEMBER = "./etc/vzdump/pct.conf"
FIREWALL_MEMBER = "./etc/vzdump/pct.fw"
OWN_MEMBER = "./dev/.sysctr.json"
INDEX_MEMBER = "./backup/index.yaml"
_FIRST_MEMBERS = (CONFIG_MEMBER, FIREWALL_MEMBER, OWN_MEMBER, INDEX_MEMBER)
# What vzdump wrote of OpenVZ's containers, until Proxmox VE 3.
_OPENVZ_MEMBER = "./etc/vzdump/vps.conf"
# One of these is less.
_MEMBER_LIMIT_BYTES = 1 << 20
_MEMBERS_LOOKED_AT = 8
# JSON's readers elsewhere keep so many digits of a number.
_MOST_GENERATIONS = 1 << 53
SCHEMA = 1


@dataclass(frozen=True)
class Head:
    """What an archive says of itself; each part is empty where it has none.

    `first` is the name of the first member, `below` the directory that is the root, empty for all of it.
    `foreign` is the configuration by another manager than Proxmox.
    """

    pct: str = ""
    firewall: str = ""
    own: "dict[str, Any] | None" = None
    first: str = ""
    below: str = ""
    foreign: Foreign | None = None

    @property
    def uuid(self) -> str:
        """Return the identity of the container that it was made of, empty where it says none."""
        if self.own is not None:
            return str(self.own["uuid"])
        return self.foreign.uuid if self.foreign is not None else ""


def own_facts(record: Record) -> dict[str, Any]:
    """Return what the member of our own says of a container."""
    return {
        "schema": SCHEMA, "id": record.id, "uuid": record.uuid, "generation": record.generation,
        "created": record.created, "template": record.template, "config": record.config_text,
    }  # fmt: skip


def parse_head(data: bytes, doing: str) -> Head:
    """Read the beginning of an unpacked archive, which may end anywhere.

    Only regular files that come before any other member count: what follows is the container's own.
    Raises SysctrError where it is no tar, or a member does not hold.
    """
    found: dict[str, bytes] = {}
    first = ""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for _ in range(_MEMBERS_LOOKED_AT):
                member = archive.next()
                if member is None:
                    break
                first = first or member.name
                name = f"./{member.name.removeprefix('./')}"
                if name == _OPENVZ_MEMBER:
                    raise SysctrError(
                        f"cannot {doing}: it is the backup of an OpenVZ container, whose settings mean "
                        "nothing to Linux as it is today",
                        "unpack it, and restore the files without etc/vzdump as a plain rootfs",
                    )
                # Of the others each comes first or after one of these, and an index before all else.
                known = (CONFIG_MEMBER, FIREWALL_MEMBER, OWN_MEMBER) if found else _FIRST_MEMBERS
                if name not in known or name in found:
                    break
                if not member.isreg() or member.issparse() or member.size > _MEMBER_LIMIT_BYTES:
                    raise SysctrError(f"cannot {doing}: {name} in it is no small file")
                file = archive.extractfile(member)
                content = file.read(member.size) if file is not None else b""
                if len(content) != member.size:
                    raise SysctrError(f"cannot {doing}: it ends within {name}")
                found[name] = content
    # tarfile goes one call deeper for each extended header.
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError, RecursionError) as error:
        if not first:
            raise SysctrError(f"cannot {doing}: it is no tar archive, or a damaged one") from error
    if INDEX_MEMBER in found:
        return _of_index(found[INDEX_MEMBER], data, first, doing)
    return Head(
        pct=_text(found.get(CONFIG_MEMBER, b"")), firewall=_text(found.get(FIREWALL_MEMBER, b"")),
        own=_own(found[OWN_MEMBER], doing) if OWN_MEMBER in found else None, first=first,
        below="" if found else find_root(data),
    )  # fmt: skip


def _of_index(index: bytes, data: bytes, first: str, doing: str) -> Head:
    """Return what the index of an export of Incus or LXD says; it alone counts."""
    dot = "./" if first.startswith("./") else ""
    try:
        foreign = incus.read(index, doing, dot)
    except ConfigError as error:
        raise SysctrError(error.message, error.hint) from error
    # Versions that do not say how the files are kept are known by them.
    if any(member.name.removeprefix("./") == "backup/container.bin" for member in first_members(data)):
        raise incus.refuse_optimized(doing)
    return Head(first=first, below=f"{dot}{incus.ROOT}", foreign=foreign)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _own(data: bytes, doing: str) -> dict[str, Any]:
    """Read our own member; what is in it may be anybody's."""
    try:
        facts = json.loads(data)
        if not isinstance(facts, dict) or type(facts.get("schema")) is not int:
            raise ValueError("it has no schema")
        if facts["schema"] > SCHEMA:
            raise SysctrError(f"cannot {doing}: a newer sysctr made it", "upgrade sysctr")
        kinds = {"id": int, "uuid": str, "generation": int, "template": str, "config": str}
        for name, kind in kinds.items():
            if type(facts.get(name)) is not kind:
                raise ValueError(f"its {name} does not hold")
        # They go into the record and into files of the container; a number's length is a file name's.
        values.check_container_id(facts["id"])
        if not 0 <= facts["generation"] <= _MOST_GENERATIONS:
            raise ValueError("its generation does not hold")
        if str(uuid.UUID(facts["uuid"])) != facts["uuid"]:
            raise ValueError("its uuid does not hold")
        schema.parse_config(toml.read_container(facts["config"]))
    except (ValueError, RecursionError, ConfigError) as error:
        reason = error.message if isinstance(error, ConfigError) else error
        raise SysctrError(f"cannot {doing}: {OWN_MEMBER} in it is damaged: {reason}") from error
    return facts
