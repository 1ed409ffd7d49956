"""From our settings to pct.conf, of which `pct restore` makes the same container; and what it cannot say."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sysctr.config import schema
from sysctr.config.mounts import Device, Mount, idmap_ranges
from sysctr.config.pct import SPACE, Document, Section
from sysctr.config.pct_convert import ARCHITECTURES, OSTYPES
from sysctr.config.pct_notes import CHANGED, DROPPED, Note
from sysctr.config.schema import Container, Nic
from sysctr.config.values import format_properties, format_size, shown
from sysctr.errors import ConfigError

_MIB = 2**20
_DEFAULT_MIB = 512
_CARD = re.compile(r"[A-Za-z0-9_.-]+")
_MACHINES = {
    "x86_64": "amd64", "i686": "i386", "i386": "i386", "aarch64": "arm64", "armv7l": "armhf",
    "riscv64": "riscv64",
}  # fmt: skip
_SYSTEMS = {
    "arch": "archlinux",
    "sles": "opensuse",
    "rocky": "centos",
    "almalinux": "centos",
    "rhel": "centos",
}
# A volume's name in a backup is only looked at for its form: the restoring host makes another one.
_STORAGE = "local"


@dataclass(frozen=True)
class Exported:
    """A pct.conf and what it does not say."""

    document: Document
    notes: tuple[Note, ...]


class _Writing:
    """The keys and the notes while they come together."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.environment: list[str] = []
        self.notes: list[Note] = []

    def put(self, name: str, key: str, value: str) -> None:
        """Write a key; `name` is ours."""
        kept = value.strip(SPACE)
        if kept != value:
            self.changed(name, "Proxmox takes no space at either end")
        if kept:
            self.values[key] = kept

    def put_properties(
        self, name: str, key: str, properties: Mapping[str, str], default_key: str = ""
    ) -> None:
        """Write a key of several options; a comma or an outer space in one of them cannot be said."""
        try:
            if any(value != value.strip(SPACE) for value in properties.values()):
                raise ConfigError("Proxmox takes no space at either end")
            self.values[key] = format_properties(properties, default_key)
        except ConfigError as error:
            self.dropped(name, error.message)

    def dropped(self, name: str, reason: str) -> None:
        self.notes.append(Note(name, reason, DROPPED))

    def changed(self, name: str, reason: str) -> None:
        self.notes.append(Note(name, reason, CHANGED))


def to_pct(
    container: Container,
    *,
    number: int,
    rootfs_size_bytes: int,
    volume_sizes: Mapping[int, int] | None = None,
    arch: str = "amd64",
    ostype: str = "unmanaged",
    memory_bytes: int | None = None,
    default_bridge: str = "vmbr0",
    managed_bridge: str = "",
    nesting: bool = False,
) -> Exported:
    """Return the pct.conf of a container, as a backup of Proxmox has it.

    Proxmox's restore needs a size of every volume: that of the rootfs, and in `volume_sizes` by the index of
    the mount point for those without a limit. `memory_bytes` is what a container without a limit gets there.
    `managed_bridge` is the name of sysctr's own; its cards go to `default_bridge` and ask for an address.
    """
    writing = _Writing()
    _write_general(writing, container, arch, ostype)
    _write_limits(writing, container, memory_bytes)
    _write_volume(writing, "limits.disk", "rootfs", {}, number, 0, rootfs_size_bytes)
    if container.limits.disk_bytes != _whole_mib(rootfs_size_bytes):
        writing.changed("limits.disk", f"there it is {format_size(_whole_mib(rootfs_size_bytes))}")
    _write_mounts(writing, container, number, volume_sizes or {})
    for device in container.devices:
        _write_device(writing, device)
    for nic in container.nets:
        own = nic.bridge in ("", managed_bridge)
        _write_net(writing, nic, default_bridge if own else nic.bridge, own=own)
    if nesting:
        writing.values["features"] = "nesting=1"
    else:
        writing.changed("features", "`pct set --features nesting=1` there helps newer versions of systemd")
    root = Section(container.description, writing.values, tuple(writing.environment))
    return Exported(Document(root), tuple(writing.notes))


def proxmox_arch(machine: str) -> str:
    """Return what Proxmox calls an architecture of the kernel.

    >>> proxmox_arch("x86_64")
    'amd64'
    """
    return _MACHINES.get(machine, machine if machine in ARCHITECTURES else "amd64")


def proxmox_ostype(system: str) -> str:
    """Return what Proxmox calls a distribution by the ID of its os-release.

    >>> proxmox_ostype("rocky"), proxmox_ostype("opensuse-leap"), proxmox_ostype("tiny")
    ('centos', 'opensuse', 'unmanaged')
    """
    known = "opensuse" if system.startswith("opensuse-") else _SYSTEMS.get(system, system)
    return known if known in OSTYPES else "unmanaged"


def _write_general(writing: _Writing, container: Container, arch: str, ostype: str) -> None:
    writing.put("arch", "arch", arch)
    # Proxmox has a plugin for openEuler, but does not take the word.
    writing.put("ostype", "ostype", ostype if ostype in OSTYPES and ostype != "openeuler" else "unmanaged")
    writing.put("unprivileged", "unprivileged", "1")
    writing.put("name", "hostname", container.name)
    if container.onboot:
        writing.put("onboot", "onboot", "1")
    if container.protected:
        writing.put("protected", "protection", "1")
    writing.put("tags", "tags", ";".join(container.tags))
    writing.put("dns.nameservers", "nameserver", " ".join(container.dns.nameservers))
    writing.put("dns.search", "searchdomain", " ".join(container.dns.search))
    if re.search(r"\s", container.init):
        writing.dropped("init", "Proxmox would take what follows the space for arguments")
    else:
        writing.put("init", "entrypoint", container.init)
    for name, value in container.environment.items():
        if value != value.rstrip(SPACE):
            writing.changed(f"environment.{name}", "Proxmox takes no space at the end")
        writing.environment.append(f"{name}={value}".rstrip(SPACE))
    if container.template:
        writing.dropped("template", "Proxmox does not remember what a container was made from")
    if container.stop_signal:
        writing.dropped("stop_signal", "Proxmox sends its own")
    rules = schema.dump_config(container).get("snapshot")
    if rules:
        writing.dropped("snapshot", "Proxmox makes no snapshots by itself")


def _write_limits(writing: _Writing, container: Container, memory_bytes: int | None) -> None:
    limits = container.limits
    if isinstance(limits.cores, int):
        writing.put("limits.cores", "cores", str(limits.cores))
    elif limits.cores is not None:
        writing.put("limits.cores", "cores", str(len(limits.cores)))
        writing.changed("limits.cores", "how many processors, not which: Proxmox chooses them")
    if limits.cpu is not None:
        writing.put("limits.cpu", "cpulimit", f"{limits.cpu:.2f}".rstrip("0").rstrip("."))
    if limits.cpu_weight is not None:
        writing.put("limits.cpu_weight", "cpuunits", str(limits.cpu_weight))
    _write_mib(writing, "memory", limits.memory_bytes, memory_bytes or _DEFAULT_MIB * _MIB)
    _write_mib(writing, "swap", limits.swap_bytes, _DEFAULT_MIB * _MIB)
    if limits.pids is not None:
        writing.dropped("limits.pids", "Proxmox does not limit the number of processes")


def _write_mib(writing: _Writing, key: str, size_bytes: int | None, without_bytes: int) -> None:
    name = f"limits.{key}"
    wanted = without_bytes if size_bytes is None else size_bytes
    written = _whole_mib(wanted)
    if size_bytes is None:
        writing.changed(name, f"there is always a limit: {written // _MIB} MiB")
    elif written != size_bytes:
        writing.changed(name, f"{written // _MIB} MiB: Proxmox counts in them")
    writing.put(name, key, str(written // _MIB))


def _whole_mib(size_bytes: int) -> int:
    return -(-size_bytes // _MIB) * _MIB


def _write_volume(
    writing: _Writing,
    name: str,
    key: str,
    options: Mapping[str, str],
    number: int,
    disk: int,
    size_bytes: int,
) -> None:
    size = {"volume": f"{_STORAGE}:subvol-{number}-disk-{disk}", "size": format_size(_whole_mib(size_bytes))}
    writing.put_properties(name, key, {**size, **options}, "volume")


def _write_mounts(writing: _Writing, container: Container, number: int, sizes: Mapping[int, int]) -> None:
    disk = 1
    for mount in container.mounts:
        key, options = f"mp{mount.index}", _mount_options(mount)
        if mount.kind == "volume":
            size_bytes = sizes.get(mount.index, mount.size_bytes)
            if size_bytes is None:
                raise ConfigError(f"cannot write {key} to pct.conf: the size of {mount.key} is not known")
            options |= {"backup": "1"} if mount.backup else {}
            _write_volume(writing, mount.key, key, options, number, disk, size_bytes)
            disk += 1
            _note_volume(writing, mount, _whole_mib(size_bytes))
        elif mount.kind == "bind":
            bind = {"volume": mount.source, **options, **_bind_options(writing, mount)}
            writing.put_properties(mount.key, key, bind, "volume")
        elif mount.kind == "shared":
            writing.dropped(mount.key, f"Proxmox has no volumes that containers share ({mount.volume})")
        else:
            writing.dropped(mount.key, "Proxmox mounts no tmpfs")


def _note_volume(writing: _Writing, mount: Mount, size_bytes: int) -> None:
    if mount.size_bytes != size_bytes:
        writing.changed(f"{mount.key}.size", f"there it is {format_size(size_bytes)}")
    if mount.name != f"disk{mount.index}":
        writing.dropped(f"{mount.key}.name", "Proxmox names volumes itself")
    if mount.pool:
        writing.dropped(f"{mount.key}.pool", "whoever restores it says where to")


def _mount_options(mount: Mount) -> dict[str, str]:
    """Return what a volume and a bind have alike."""
    options = {"mp": mount.target}
    if mount.read_only:
        options["ro"] = "1"
    if mount.noexec:
        options["mountoptions"] = "noexec"
    return options


def _bind_options(writing: _Writing, mount: Mount) -> dict[str, str]:
    flags = (("nodev", not mount.dev), ("noexec", mount.noexec), ("nosuid", not mount.suid))
    options = {"mountoptions": ";".join(name for name, given in flags if given)}
    if mount.dev or mount.suid:
        writing.changed(mount.key, "setuid programs and devices of it work there")
    if mount.idmap:
        maps = zip("ug", idmap_ranges(mount.idmap), strict=True)
        items = [f"{kind}:{ids.inside}:{ids.host}:{ids.count}" for kind, ranges in maps for ids in ranges]
        options["idmap"] = ";".join(items)
    else:
        writing.changed(
            f"{mount.key}.idmap", "there the files of the host ids from 100000 are the container's"
        )
    return {name: value for name, value in options.items() if value}


def _write_device(writing: _Writing, device: Device) -> None:
    properties = {"path": device.path, "mode": device.mode}
    properties |= {key: str(value) for key, value in (("uid", device.uid), ("gid", device.gid)) if value}
    writing.put_properties(device.key, f"dev{device.index}", properties, "path")
    if device.place != device.path:
        writing.changed(f"{device.key}.target", f"there it is at {shown(device.path)}")


def _write_net(writing: _Writing, nic: Nic, bridge: str, *, own: bool) -> None:
    name = nic.name
    if _CARD.fullmatch(name) is None:
        name = f"eth{nic.index}"
        writing.changed(f"net.{nic.index}.name", f"{name}: Proxmox does not take {shown(nic.name)}")
    properties = {"name": name, "type": "veth", "bridge": bridge, "hwaddr": nic.mac.upper()}
    properties |= {"ip": "dhcp" if nic.ip == "managed" else nic.ip, "gw": nic.gateway}
    properties["mtu"] = str(nic.mtu or "")
    given = {key: value for key, value in properties.items() if value}
    writing.put_properties(f"net.{nic.index}", f"net{nic.index}", given)
    if own:
        asks = ", and asks for an address" if nic.ip == "managed" else ""
        writing.changed(f"net.{nic.index}.bridge", f"there it is on {bridge}{asks}")
