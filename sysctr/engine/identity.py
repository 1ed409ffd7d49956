"""What makes a container itself and no copy of it: taken from the files of a clone and of a template."""

from sysctr.config import schema, toml
from sysctr.engine.changes import with_macs

MACHINE_ID = "/etc/machine-id"
_SSH_KEYS = "/etc/ssh/ssh_host_*"
_REMOVED = (
    _SSH_KEYS, "/var/lib/dbus/machine-id", "/var/lib/systemd/random-seed",
    "/var/lib/systemd/credential.secret", "/var/lib/dhcp/*", "/var/lib/dhcpcd/*",
)  # fmt: skip

# Debian's sshd makes no keys of its own accord; a template of ours brings its own way.
_KEY_UNIT = """\
[Unit]
Description=New SSH host keys for a copied container
ConditionPathExists=/usr/bin/ssh-keygen
ConditionPathExists=!/usr/local/lib/sysctr/ssh-host-keys
ConditionPathExistsGlob=!/etc/ssh/ssh_host_*_key

[Service]
Type=oneshot
ExecStart=/usr/bin/ssh-keygen -A
"""
_KEY_DROP_IN = """\
[Unit]
Wants=sysctr-host-keys.service
After=sysctr-host-keys.service
"""
_UNITS = "/etc/systemd/system"
_KEY_FILES = {
    f"{_UNITS}/sysctr-host-keys.service": _KEY_UNIT,
    f"{_UNITS}/ssh.service.d/10-sysctr-host-keys.conf": _KEY_DROP_IN,
    f"{_UNITS}/sshd.service.d/10-sysctr-host-keys.conf": _KEY_DROP_IN,
}

# Run in a template's tree. What is opened through a symlink of it ends in the job's own empty root.
_CLEANING = """\
set -eu
cd "$1"
rm -rf -- etc/machine-id var/lib/dbus/machine-id var/lib/systemd/random-seed \\
    var/lib/systemd/credential.secret var/log/journal/* etc/udev/rules.d/70-persistent-net.rules \\
    etc/ssh/ssh_host_* var/lib/dhcp/* var/lib/dhcpcd/* var/lib/NetworkManager/*lease* \\
    var/lib/cloud/instance var/lib/cloud/instances \\
    root/.bash_history root/.ash_history root/.zsh_history root/.lesshst root/.viminfo \\
    root/.python_history root/.wget-hsts \\
    var/cache/apt/*.bin var/cache/apt/archives/*.deb var/cache/apt/archives/partial/* \\
    var/cache/dnf/* var/cache/yum/* var/cache/apk/* var/cache/pacman/pkg/*
for directory in tmp var/tmp run; do
    [ ! -d "$directory" ] || [ -L "$directory" ] || find "$directory" -xdev -mindepth 1 -delete
done
if [ -d var/log ] && [ ! -L var/log ]; then
    find var/log -xdev -type f \\( -name '*.gz' -o -name '*.xz' -o -name '*.[0-9]' \\) -delete
    find var/log -xdev -type f -size +0 -exec truncate --size=0 -- {} +
fi
[ ! -d etc ] || [ -L etc ] || : > etc/machine-id
for file in etc/hostname etc/resolv.conf; do
    [ ! -f "$file" ] || [ -L "$file" ] || : > "$file"
done
shift
[ -d etc/systemd/system ] && [ -d etc/ssh ] && [ ! -e usr/local/lib/sysctr/ssh-host-keys ] || exit 0
while [ $# -gt 0 ]; do
    mkdir -p "./${1%/*}"
    printf %s "$2" > "./$1"
    shift 2
done
"""


def cleaning(root: str) -> list[str]:
    """Return the command that makes the tree of a container at `root` that of a template."""
    files = [part for path, text in _KEY_FILES.items() for part in (path, text)]
    return ["sh", "-c", _CLEANING, "clean", root, *files]


def setup_work(*, systemd: bool) -> dict:
    """Return the work that gives the files of a clone an identity of its own at their next boot."""
    files = [{"path": MACHINE_ID, "text": "", "mode": 0o444}]
    if systemd:
        files += [{"path": path, "text": text} for path, text in _KEY_FILES.items()]
    return {"builtin": "setup", "remove": list(_REMOVED), "files": files}


def cloned_config(
    text: str, name: str, own_bridge: str, changes: dict, *, keep_addresses: bool
) -> tuple[str, list[str]]:
    """Return the configuration of a clone, and what of it differs for a reason one should know.

    Cards get new MACs, and lose an address that is the original's unless that is to be kept.
    """
    before = schema.parse_config(toml.read_container(text))
    edits: dict = {"name": name, "protected": None}
    notes = []
    for nic in before.nets:
        prefix = f"net.{nic.index}"
        edits[f"{prefix}.mac"] = None
        if "/" in nic.ip and not keep_addresses:
            # On a bridge that is not ours nobody gives addresses but the guest's own DHCP client.
            ours = nic.bridge in ("", own_bridge)
            edits |= {f"{prefix}.ip": "managed" if ours else "manual", f"{prefix}.gateway": None}
            notes.append(
                f"{nic.name} has not the address {nic.ip}, which is the original's: it is "
                + ("given another one" if ours else "left to the container itself")
            )
    edits |= schema.plain_changes(changes)
    edited = schema.parse_config(toml.read_container(toml.edit(text, edits)))
    # A text of its own: the comments of the other are about the other.
    return with_macs(toml.new_text(edited)), notes
