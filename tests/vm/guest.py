"""How the tests talk to sysctr in a virtual host and to its containers."""

import json
from dataclasses import dataclass

from sysctr.paths import Layout
from tests.vm.machine import Machine, Result

SYSCTR = "/usr/local/bin/sysctr"
CGROUP = f"/sys/fs/cgroup/{Layout('').cgroup}"


def as_root_of(pid: int) -> list[str]:
    """Return what a command line begins with that has the ids and rights of a container's root.

    The files are the host's: only as such a user are ids, capabilities and access lists those from inside.
    """
    return ["nsenter", "--user", "--target", str(pid), "-S", "0", "-G", "0", "--"]


@dataclass(frozen=True)
class Container:
    """A container of a virtual host, by its name there."""

    vm: Machine
    name: str

    def sysctr(self, *arguments: str, timeout_s: float = 300) -> str:
        """Run `sysctr ARGUMENTS` on the virtual host and return what it prints."""
        return self.vm.output([SYSCTR, *arguments], timeout_s=timeout_s)

    def exec(self, script: str, timeout_s: float = 300) -> Result:
        """Run a shell script in the container."""
        return self.vm.run([SYSCTR, "exec", self.name, "--", "sh", "-c", script], timeout_s=timeout_s)

    def python(self, code: str, *arguments: str) -> str:
        """Run Python of the virtual host as the container's root; its first argument is the container's /."""
        pid = self.info()["pid"]
        return self.vm.output([*as_root_of(pid), "/usr/bin/python3", "-I", "-c", code, f"/proc/{pid}/root",
                               *arguments])  # fmt: skip

    def info(self) -> dict:
        """Return all that `sysctr info` knows."""
        return json.loads(self.sysctr("info", self.name, "--json"))

    def cgroup(self, file: str) -> str:
        """Return a control file of the container's cgroup, as the virtual host's kernel has it."""
        return self.vm.output(["cat", f"{CGROUP}/{self.info()['id']}/{file}"])

    def start(self, *options: str) -> None:
        """Create and start the container and wait until it has booted."""
        self.sysctr("create", self.name, *options)
        self.sysctr("start", self.name)
        self.sysctr("wait", self.name, "--state", "booted", "--timeout", "280")

    def destroy(self) -> None:
        """Stop and destroy the container; nothing of it may be left."""
        number = self.info()["id"]
        self.sysctr("stop", self.name, "--timeout", "90")
        assert self.sysctr("status", self.name) == "stopped"
        self.sysctr("destroy", self.name, "--yes")
        assert self.name not in self.sysctr("list")
        assert self.vm.run(["test", "-e", f"{CGROUP}/{number}"]).status == 1, "its cgroup is still there"
        assert Layout("").veth(number, 0) not in self.vm.output(["ls", "/sys/class/net"]).split()
