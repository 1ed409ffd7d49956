"""quickstart and uninstall as a user runs them, below a SYSCTR_ROOT so that the host's own stays as it is."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sysctr.engine import removal
from sysctr.paths import Layout
from tests import leaks
from tests.node import CHECKOUT, Node
from tests.tmux import Terminal
from tests.wait import wait_until

pytestmark = [pytest.mark.root, pytest.mark.net, pytest.mark.slow, pytest.mark.needs("overlay", "busybox")]


def run(root: str, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    wanted = ("PIP_", leaks.SESSION_VARIABLE)
    kept = {name: value for name, value in os.environ.items() if name.startswith(wanted)}
    return subprocess.run(
        [f"{CHECKOUT}/packaging/{script}", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": root, **kept, "SYSCTR_ROOT": root, **env},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


def sysctr(root: str, *arguments: str) -> str:
    """Run the launcher of an installation and return what it prints."""
    return subprocess.run(
        [f"{root}/bin/sysctr", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


@pytest.fixture(scope="module")
def installed() -> Iterator[str]:
    node = Node()
    try:
        done = run(node.root, "quickstart", "--no-demo")
        assert done.returncode == 0, done.stdout + done.stderr
        yield node.root
        # Also for what is shared: the group goes with the last installation.
        assert run(node.root, "uninstall", "--purge").returncode == 0
        assert not Path(node.root, "bin").exists()
    finally:
        node.close()


def test_quickstart_brings_a_launcher_that_works(installed: str) -> None:
    # From another directory, with a Python environment that would lead a less careful launcher astray.
    done = subprocess.run(
        [f"{installed}/bin/sysctr", "list", "--json"],
        env={"PYTHONPATH": "/nonexistent", "PYTHONHOME": "/nonexistent", "PATH": "/usr/bin:/bin"},
        cwd="/", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.needs("tmux")
def test_the_terminal_ui_is_a_part_of_it(installed: str) -> None:
    with Terminal(80, 24, {"HOME": installed}) as terminal:
        terminal.command([f"{installed}/bin/sysctr", "tui"])
        terminal.shows("No containers.")
        terminal.keys("q")
        terminal.shows("ended=0")
        # In a browser only for whoever wants that.
        terminal.command([f"{installed}/bin/sysctr", "tui", "--serve"])
        terminal.shows("quickstart --web")
        terminal.shows("ended=2")


def test_quickstart_again_changes_nothing(installed: str) -> None:
    before = (os.readlink(f"{installed}/opt/current"), Path(f"{installed}/lib/changes").read_text())
    pids = removal.service_pids(Layout(installed))
    done = run(installed, "quickstart", "--no-demo")
    assert done.returncode == 0, done.stdout + done.stderr
    # No step at all was needed.
    assert "==>" not in done.stdout
    assert (os.readlink(f"{installed}/opt/current"), Path(f"{installed}/lib/changes").read_text()) == before
    assert removal.service_pids(Layout(installed)) == pids


def test_links_of_proxmox_are_made_when_asked_for_and_are_taken_back(installed: str) -> None:
    somebodys = Path(installed, "bin", "vzdump")
    assert not Path(installed, "bin", "pct").exists()
    somebodys.write_text("#!/bin/sh\n")
    done = run(installed, "quickstart", "--no-demo", "--proxmox-links")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"no link {somebodys}" in done.stderr
    assert os.readlink(f"{installed}/bin/pct") == "sysctr"
    listed = subprocess.run([f"{installed}/bin/pct", "list"], capture_output=True, text=True, check=True)
    assert (listed.stdout, listed.stderr) == ("", "")
    somebodys.unlink()
    again = run(installed, "quickstart", "--no-demo", "--proxmox-links")
    assert again.returncode == 0, again.stdout + again.stderr
    # What uninstall takes back, which the end of these tests looks at.
    noted = Path(installed, "lib", "changes").read_text().splitlines()
    assert {f"file\t{installed}/bin/{name}" for name in ("pct", "vzdump")} <= set(noted)


def test_a_half_installed_version_is_finished(installed: str) -> None:
    venv = Path(installed, "opt", os.readlink(f"{installed}/opt/current"))
    (venv / ".complete").unlink()
    done = run(installed, "quickstart", "--no-demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (venv / ".complete").exists()
    assert "Python packages into" in done.stdout


def test_what_browsers_need_is_installed_when_asked_for_and_stays(installed: str) -> None:
    for options in (("--web",), ()):
        done = run(installed, "quickstart", "--no-demo", *options)
        assert done.returncode == 0, done.stdout + done.stderr
        subprocess.run([f"{installed}/opt/current/bin/python", "-Ic", "import textual_serve"], check=True)
    assert "==>" not in done.stdout


def test_where_apt_has_no_debian_demo_is_made_of_tiny(installed: str, tmp_path: Path) -> None:
    # As on Ubuntu, whose apt knows other archives only.
    settings = tmp_path / "apt.conf"
    settings.write_text('Dir::Etc::sourcelist "/dev/null";\nDir::Etc::sourceparts "/dev/null";\n')
    done = run(installed, "quickstart", APT_CONFIG=str(settings))
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        assert "The apt of this host has no Debian archive" in done.stdout
        assert "bootstrap.sources.bookworm=ADDRESS" in done.stdout
        assert sysctr(installed, "status", "demo") == "running\n"
        assert sysctr(installed, "exec", "demo", "--", "busybox", "true") == ""
    finally:
        sysctr(installed, "destroy", "--yes", "--force", "demo")


def test_the_checkout_stays_as_it_was(installed: str) -> None:
    assert not list(CHECKOUT.glob("*.egg-info"))
    assert not (CHECKOUT / "build").exists()


def test_what_it_leaves_running_holds_nothing_of_it(tmp_path: Path) -> None:
    # What reads from a script, as `quickstart | tee`, reads until the last one that could write has gone.
    script = f'''. {CHECKOUT}/packaging/lib.sh
        exec 3>&1
        leave_running {tmp_path}/log sh -c 'echo $$; read -r line <{tmp_path}/end'
    '''
    os.mkfifo(tmp_path / "end")
    done = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, check=True, timeout=20)
    assert done.stdout == b""
    pid = wait_until((tmp_path / "log").read_text, what="the pid of the program").strip()
    try:
        assert {fd.name for fd in Path("/proc", pid, "fd").iterdir()} <= {"0", "1", "2"}
        assert Path("/proc", pid, "stat").read_text().split()[5] == pid, "it has a session of its own"
    finally:
        (tmp_path / "end").write_text("\n")


def test_check_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    done = run(str(root), "quickstart", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not root.exists()


def test_uninstall_purge_leaves_nothing_but_backups() -> None:
    with Node() as node:
        assert run(node.root, "quickstart", "--no-demo").returncode == 0
        archive = Path(node.layout.backups, "vzdump-lxc-101-2026_01_31-12_00_00.tar.zst")
        archive.parent.mkdir(mode=0o700)
        archive.write_bytes(b"all that is left")
        done = run(node.root, "uninstall", "--purge")
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"Kept: the backups in {archive.parent}" in done.stdout
        assert os.listdir(node.root) == ["lib"]
        assert os.listdir(node.layout.lib) == ["backups"]
        assert archive.read_bytes() == b"all that is left"
        archive.unlink()
        done = run(node.root, "uninstall", "--purge")
        assert done.returncode == 0, done.stdout + done.stderr
        assert removal.service_pids(node.layout) == {}
        assert os.listdir(node.root) == []


def test_an_unknown_host_is_refused_before_a_change(tmp_path: Path) -> None:
    # In a mount namespace of its own, where os-release is that of another distribution.
    release = tmp_path / "os-release"
    release.write_text('ID=arch\nPRETTY_NAME="Arch Linux"\n')
    root = tmp_path / "root"
    script = 'mount --bind "$1" "$(realpath /etc/os-release)" && SYSCTR_ROOT="$2" "$3"'
    words = [str(release), str(root), f"{CHECKOUT}/packaging/quickstart"]
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot install on Arch Linux" in done.stderr
    assert "Debian 12" in done.stderr
    assert not root.exists()


@pytest.mark.skipif(not shutil.which("setpriv"), reason="no setpriv (package util-linux)")
def test_without_root_nothing_is_tried(tmp_path: Path) -> None:
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", f"{CHECKOUT}/packaging/quickstart"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "not root" in done.stderr
