"""Every path and every host-wide name of an installation; SYSCTR_ROOT moves them all.

Two installations on one machine share no bridge, table, cgroup, id range or socket, because each of these
names carries the tag of its root. The CLI imports this module, so it imports little.
"""

import os
import zlib


class Layout:
    """The paths and host-wide names of one installation.

    >>> Layout("").api_socket, Layout("").bridge
    ('/run/sysctr/api.sock', 'sysctr0')
    >>> Layout("/tmp/a").bridge == Layout("/tmp/b").bridge
    False
    """

    def __init__(self, root: str = "") -> None:
        self.root = os.path.abspath(root) if root else ""
        # Six hex digits: an interface name has 15 characters, and the longest of ours is v<tag>9999i99.
        self.tag = f"{zlib.crc32(self.root.encode()) & 0xFFFFFF:06x}" if self.root else ""
        suffix = f"-{self.tag}" if self.tag else ""
        self.etc = f"{self.root}/etc" if self.root else "/etc/sysctr"
        self.lib = f"{self.root}/lib" if self.root else "/var/lib/sysctr"
        self.run = f"{self.root}/run" if self.root else "/run/sysctr"
        self.log = f"{self.root}/log" if self.root else "/var/log/sysctr"

        self.host_config = f"{self.etc}/host.toml"
        self.container_configs = f"{self.etc}/containers"
        self.pool_configs = f"{self.etc}/pools"
        self.backup_jobs = f"{self.etc}/backup-jobs"
        self.containers = f"{self.lib}/containers"
        self.templates = f"{self.lib}/templates"
        self.tasks = f"{self.lib}/tasks"
        self.network = f"{self.lib}/network"
        self.pool = f"{self.lib}/storage/default"
        self.backups = f"{self.lib}/backups"
        self.backup_runs = f"{self.lib}/backup-runs"
        self.peer = f"{self.lib}/peer"
        self.peers = f"{self.lib}/peers"
        self.migrations = f"{self.lib}/migrations"
        self.state_lock = f"{self.lib}/lock"

        self.api_socket = f"{self.run}/api.sock"
        self.plan_socket = f"{self.run}/plan.sock"
        self.ticket_socket = f"{self.run}/ticket.sock"
        self.notify_dir = f"{self.run}/notify"
        self.consoles = f"{self.run}/console"
        self.supervised = f"{self.run}/supervised"
        self.daemon_lock = f"{self.run}/daemon.lock"
        self.keeper_lock = f"{self.run}/keeper.lock"

        self.bridge = f"sc{self.tag}" if self.tag else "sysctr0"
        self.nft_table = f"sysctr_{self.tag}" if self.tag else "sysctr"
        self.cgroup = f"sysctr{suffix}"
        self.subid_owner = f"sysctr{suffix}"
        self.group = "sysctr"

    def pool_run(self, name: str) -> str:
        """Return the directory of what a pool needs until the next boot: mount points, and what is in use."""
        return f"{self.run}/storage/{name}"

    def veth(self, container_id: int, index: int) -> str:
        """Return the name of the host's end of a container's NIC (at most 15 characters).

        >>> Layout("").veth(101, 0)
        'veth101i0'
        """
        if self.tag:
            return f"v{self.tag}{container_id}i{index}"
        return f"veth{container_id}i{index}"

    def container_config(self, container_id: int) -> str:
        """Return the path of the container's configuration, the file an administrator edits."""
        return f"{self.container_configs}/{container_id}.toml"

    def container_dir(self, container_id: int) -> str:
        """Return the directory of what sysctr records of a container."""
        return f"{self.containers}/{container_id}"


def layout() -> Layout:
    """Return the layout that the environment asks for."""
    return Layout(os.environ.get("SYSCTR_ROOT", ""))
