"""Hosts whose containers are kept by one storage driver or another, and what the tests ask of them."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.disk import disk
from tests.node import Node, TemplateStore
from tests.system.guests import new_name

KINDS = ("overlay", "btrfs", "loop")


class Kept:
    """A host, and the pool in which its containers are made."""

    def __init__(self, host: Node, kind: str, pool: str, directory: str) -> None:
        self.kind = kind
        self.host = host
        self.pool = pool
        self.directory = directory

    def create(self, *options: str, start: bool = False) -> str:
        """Create a container in the pool and return its name."""
        name = new_name()
        # An image has a size, said or not.
        options = ("--disk", "128M", *options) if self.kind == "loop" else options
        starting = ["--start"] if start else []
        self.host.run("create", name, "--template", "tiny", "--pool", self.pool, *options, *starting)
        return name

    def mount(self, number: int, target: str) -> str:
        """Return the setting that gives a container a volume of its own."""
        return f"mount.{number}=target={target}{',size=64M' if self.kind == 'loop' else ''}"

    def write(self, ref: str, path: str, text: str) -> None:
        """Write a file of a container, running or stopped."""
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(text)
            file.flush()
            self.host.run("push", file.name, f"{ref}:{path}")

    def read(self, ref: str, path: str) -> str | None:
        """Return a file of a container, running or stopped; None where there is none."""
        with tempfile.TemporaryDirectory() as directory:
            done = self.host.run("pull", f"{ref}:{path}", f"{directory}/file", check=False)
            return Path(f"{directory}/file").read_text() if done.status == 0 else None

    def names(self, ref: str) -> list[str]:
        """Return the names of a container's snapshots, oldest first."""
        return self.host.run("snapshots", ref, "-q").out.split()

    def leftovers(self) -> list[str]:
        """Return what doctor finds that belongs to nothing."""
        _, answer = self.host.api("GET", "/1/doctor")
        checks = [check for check in answer["checks"] if check["check"] == "leftovers"]
        assert checks
        return [check["detail"] for check in checks if check["state"] != "ok"]

    def volumes(self) -> list[str]:
        """Return what lies in the pool's directory of volumes, half-made ones too."""
        return sorted(path.name for path in Path(f"{self.directory}/volumes").iterdir())


@contextlib.contextmanager
def host_keeping(
    kind: str, templates: TemplateStore, directory: Path, *, keep: bool = False
) -> Iterator[Kept]:
    """Give a host with a pool of that driver; overlay is the one that every host has."""
    if kind == "overlay":
        with Node(keep=keep) as host:
            templates.give(host, "tiny")
            yield Kept(host, kind, "default", host.layout.pool)
        return
    with disk(str(directory), "btrfs", size_bytes=2 << 30), Node(keep=keep) as host:
        templates.give(host, "tiny")
        host.run("pool", "add", "kept", "--driver", kind, "--path", f"{directory}/pool")
        yield Kept(host, kind, "kept", f"{directory}/pool")
