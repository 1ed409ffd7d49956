"""A whole host in QEMU: boots it, runs commands in it, and ends it; only the cached image survives a run.

    with Machine(root_image()) as machine:
        machine.put("/root/demo.tar", data)
        machine.output(["tar", "-tf", "/root/demo.tar"])

Inside, PAYLOAD/checkout is this checkout and PAYLOAD/venv an installation of it (bin/sysctr, bin/python3),
both read-only. Writes to the root disk are thrown away. A large tree is given by `mount`: to unpack an
archive inside takes a minute.

A machine has no network unless `nics` names some, each the value of QEMU's `-nic`; the guest calls them eth0,
eth1 … and leaves them down. To link it with this host make a tap device (`ip tuntap add NAME mode tap`), give
it an address or a bridge, and pass `tap,ifname=NAME,script=no,downscript=no,model=virtio-net-pci`. To link
two machines pass `socket,listen=127.0.0.1:PORT,model=virtio-net-pci` to one, `socket,connect=…` to the other.
What needs nothing of this host's network is `user,hostfwd=tcp:127.0.0.1:PORT-:PORT,model=virtio-net-pci`: a
guest that gives itself 10.0.2.15 is reached at that port, and reaches our loopback device at 10.0.2.2.
"""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.vm.image import SCRATCH, Image, make_ext4
from tests.vm.payload import payload

GUEST_ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}
COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on net.ifnames=0 "
    "apparmor=1 security=apparmor"
)
# How long a guest that hangs may keep the test after the agent should have ended a command.
GRACE_S = 30
SPARE_BYTES = 4 << 30


class MachineError(Exception):
    """The virtual host did not boot, died, or did not do what was asked; the text ends with its console."""


class TimedOut(MachineError):
    """A command in the virtual host was ended at its deadline; the text carries its output."""


@dataclass(frozen=True)
class Result:
    """How a command in the virtual host ended; a negative status is the signal that killed it."""

    status: int
    stdout: str
    stderr: str


class Machine:
    """One virtual host, booted for the length of a `with` block.

    `append` is added to the kernel's command line: `systemd.unified_cgroup_hierarchy=0` makes a host of
    cgroup v1.
    """

    def __init__(
        self,
        image: Image,
        *,
        memory_mb: int = 2048,
        cpus: int = 2,
        nics: Sequence[str] = ("none",),
        append: str = "",
        boot_timeout_s: float = 400,
    ) -> None:
        self.image = image
        self.boot_s = 0.0
        self._hardware = ["-m", str(memory_mb), "-smp", str(cpus)]
        for nic in nics:
            self._hardware += ["-nic", nic]
        self._command_line = f"{COMMAND_LINE} {append}".rstrip()
        self._boot_timeout_s = boot_timeout_s

    def __enter__(self) -> "Machine":
        with ExitStack() as undo:
            self._directory = undo.enter_context(scratch())
            disk = payload(self.image.python, Path(self._directory))
            self._spare = Path(self._directory, "spare.ext4")
            with open(self._spare, "wb") as spare:
                spare.truncate(SPARE_BYTES)
            self._port, theirs = socket.socketpair()
            undo.callback(self._port.close)
            started = time.monotonic()
            with theirs, open(f"{self._directory}/qemu", "wb") as complaints:
                self._qemu = subprocess.Popen(
                    self._command(disk, theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=complaints,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "TMPDIR": self._directory},
                )
            undo.callback(self._end)
            self._await_agent("boot")
            self.boot_s = time.monotonic() - started
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float = 180,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
    ) -> Result:
        """Run a program as root and wait for its end; at the deadline its process group is killed."""
        request = {
            "run": list(argv), "timeout_s": timeout_s, "cwd": cwd, "env": {**GUEST_ENVIRONMENT, **(env or {})}
        }  # fmt: skip
        reply, data = self._ask(request, stdin, timeout_s + GRACE_S, f"run {' '.join(argv)}")
        output, errors = data[: reply["stdout"]], data[reply["stdout"] :]
        result = Result(reply["status"], output.decode(errors="replace"), errors.decode(errors="replace"))
        if reply["timed_out"]:
            raise TimedOut(f"{' '.join(argv)} took more than {timeout_s} s\n{result.stdout}{result.stderr}")
        return result

    def output(self, argv: Sequence[str], *, timeout_s: float = 180) -> str:
        """Return what a program writes to its standard output, without the last newline; it must succeed."""
        result = self.run(argv, timeout_s=timeout_s)
        if result.status:
            raise MachineError(
                f"{' '.join(argv)} ended with status {result.status}\n{result.stdout}{result.stderr}"
            )
        return result.stdout.removesuffix("\n")

    def put(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a file in the virtual host, and the directories above it; 64 MB take about a second."""
        self._ask({"put": path, "mode": mode}, data, GRACE_S, f"write {path}")

    def mount(self, tree: Path, target: str) -> None:
        """Copy a directory of this host to the spare disk and mount that, writable; once for each machine."""
        make_ext4(tree, self._spare, SPARE_BYTES)
        # What the guest read of the empty disk at its boot is no longer so.
        self.output(["blockdev", "--flushbufs", "/dev/vdc"])
        self.output(["mkdir", "-p", target])
        line = f"/dev/vdc {target} ext4 noatime,noinit_itable 0 0"
        self.output(["sh", "-c", f"echo {line} >>/etc/fstab && mount {target}"])
        self.output(["rmdir", f"{target}/lost+found"])
        self.output(["chmod", f"{tree.stat().st_mode & 0o7777:o}", target])

    def reboot(self) -> None:
        """Restart the virtual host as its administrator would; what is on its disks stays."""
        request = {"run": ["systemctl", "reboot"], "timeout_s": 60, "cwd": "/", "env": GUEST_ENVIRONMENT}
        self._port.sendall(json.dumps({**request, "size": 0}).encode() + b"\n")
        self._await_agent("reboot")

    def console(self) -> str:
        """Return what kernel and systemd wrote to the serial console."""
        return Path(self._directory, "console").read_text(errors="replace")

    def _command(self, disk: Path, port_fd: int) -> list[str]:
        # No guess about KVM: a /dev/kvm that opens may still not boot a distribution's kernel.
        accelerator = os.environ.get("SYSCTR_VM_ACCEL", "tcg")
        # Translated, an older processor is the faster one: no module or library finds vector units to use.
        cpu = "Nehalem" if accelerator == "tcg" else "host"
        return [
            # QEMU does not end when its sockets do: it must die with the test that started it.
            "setpriv", "--pdeathsig", "KILL",
            "qemu-system-x86_64", "-accel", accelerator, "-cpu", cpu, *self._hardware,
            "-machine", "q35,hpet=off,vmport=off,smbus=off,sata=off",
            "-nodefaults", "-no-user-config", "-display", "none",
            "-kernel", str(self.image.kernel), "-initrd", str(self.image.initramfs),
            "-append", self._command_line,
            "-drive", f"file={self.image.root},format=raw,if=virtio,snapshot=on,cache=unsafe",
            "-drive", f"file={disk},format=raw,if=virtio,readonly=on,cache=unsafe",
            "-drive", f"file={self._spare},format=raw,if=virtio,cache=unsafe",
            "-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=agent,fd={port_fd}",
            "-device", "virtserialport,chardev=agent,name=sysctr",
            "-serial", f"file:{self._directory}/console",
        ]  # fmt: skip

    def _ask(self, request: dict, data: bytes, timeout_s: float, what: str) -> tuple[dict, bytes]:
        self._port.settimeout(timeout_s)
        try:
            self._port.sendall(json.dumps({**request, "size": len(data)}).encode() + b"\n" + data)
        except OSError as error:
            raise self._failed(what, str(error)) from error
        reply, received = self._receive(timeout_s, what)
        if "ready" in reply:
            raise self._failed(what, "the machine started again")
        return reply, received

    def _await_agent(self, what: str) -> None:
        # The agent may still answer, or not, the request that ends it.
        while "ready" not in self._receive(self._boot_timeout_s, what)[0]:
            pass

    def _receive(self, timeout_s: float, what: str) -> tuple[dict, bytes]:
        deadline = time.monotonic() + timeout_s
        received = bytearray()
        reply: dict = {}
        wanted = None
        while wanted is None or len(received) < wanted:
            self._port.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                chunk = self._port.recv(1 << 20)
            except TimeoutError as error:
                raise self._failed(what, f"no answer in {timeout_s} s") from error
            if not chunk:
                raise self._failed(what, "the machine ended")
            received += chunk
            if wanted is None and b"\n" in received:
                line, _, received = received.partition(b"\n")
                reply = json.loads(line)
                wanted = reply.get("stdout", 0) + reply.get("stderr", 0)
        if "error" in reply:
            raise MachineError(f"cannot {what}: {reply['error']}")
        return reply, bytes(received)

    def _failed(self, what: str, reason: str) -> MachineError:
        complaints = Path(self._directory, "qemu").read_text(errors="replace")
        return MachineError(f"cannot {what}: {reason}\n{complaints}{self.console()[-4000:]}")

    def _end(self) -> None:
        self._qemu.kill()
        self._qemu.wait()


@contextmanager
def scratch() -> Iterator[str]:
    """Make a directory for what one run writes, and remove those of runs that were killed."""
    with ExitStack() as undo:
        # Everybody looks and locks in turn, so that none takes a new directory for an old one.
        everybody = undo.enter_context(ExitStack())
        _lock(everybody, SCRATCH)
        for old in Path(SCRATCH).glob("sysctr-vm.*"):
            if old.is_dir() and not old.is_symlink() and old.stat().st_uid == os.geteuid():
                with ExitStack() as briefly:
                    if _lock(briefly, str(old), wait=False):
                        shutil.rmtree(old)
        directory = undo.enter_context(tempfile.TemporaryDirectory(prefix="sysctr-vm.", dir=SCRATCH))
        _lock(undo, directory)
        everybody.close()
        yield directory


def _lock(until: ExitStack, directory: str, *, wait: bool = True) -> bool:
    directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    until.callback(os.close, directory_fd)
    try:
        fcntl.flock(directory_fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
