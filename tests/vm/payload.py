"""Makes the second disk of a virtual host: this checkout, an installation of it, and the agent.

It changes with every edit of the checkout, so it is made for each run, in two seconds.
"""

import compileall
import re
import shutil
import sysconfig
from pathlib import Path

from tests.vm.image import PAYLOAD, make_ext4

CHECKOUT = Path(__file__).resolve().parents[2]


def payload(python: str, work: Path) -> Path:
    """Make the second disk: the checkout, a venv with this interpreter's packages, and the agent."""
    tree = work / "tree"
    skip = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist")
    shutil.copytree(CHECKOUT, tree / "checkout", ignore=skip, symlinks=True)
    _make_venv(tree / "venv", python)
    shutil.copy(Path(__file__).with_name("agent.py"), tree)
    for sources in (tree / "checkout", tree / "venv"):
        # Compiling in the guest would be ten times slower, and its copy is read-only.
        compileall.compile_dir(str(sources), quiet=2, ddir=f"{PAYLOAD}/{sources.name}", workers=0)
    size_bytes = sum(file.lstat().st_size + 4096 for file in tree.rglob("*"))
    disk = work / "payload.ext4"
    make_ext4(tree, disk, size_bytes=size_bytes + size_bytes // 4 + (16 << 20))
    shutil.rmtree(tree)
    return disk


def _make_venv(venv: Path, python: str) -> None:
    """Make what a user's installation has, from the packages of the interpreter that runs the tests."""
    packages = venv / "lib" / python / "site-packages"
    shutil.copytree(sysconfig.get_path("purelib"), packages, ignore=_skip_packages, symlinks=True)
    # As in a wheel, where the recipes are a package of data inside sysctr.
    shutil.copytree(CHECKOUT / "sysctr", packages / "sysctr", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CHECKOUT / "templates", packages / "sysctr/templates")
    (venv / "bin").mkdir()
    (venv / "bin/python3").symlink_to(f"/usr/bin/{python}")
    (venv / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    launcher = venv / "bin/sysctr"
    launcher.write_text((CHECKOUT / "packaging/sysctr").read_text().replace("@PREFIX@", PAYLOAD))
    launcher.chmod(0o755)
    # Where the launcher of an installation looks for its venv.
    (venv.parent / "current").symlink_to(venv.name)


def _skip_packages(directory: str, names: list[str]) -> set[str]:
    """Choose what stays behind: large tools that the guest does not use, and what points to a checkout."""
    if directory != sysconfig.get_path("purelib"):
        return set()
    unused = re.compile(r"pip|setuptools|pkg_resources|mypy|ruff|textual|sysctr|__editable__|.*\.pth$")
    return {name for name in names if unused.match(name)}
