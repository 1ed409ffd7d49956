"""`sysctr list` stays fast because it imports almost nothing."""

import os
import subprocess
import sys

import pytest

from tests.unit.cli_stub import Stub

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
HEAVY = {
    "asyncio", "dataclasses", "typing", "pathlib", "logging", "subprocess", "http", "importlib.metadata",
    "tomllib", "tomli", "pyroute2", "textual", "cryptography", "inspect", "ssl", "urllib", "tempfile",
    "threading", "unicodedata", "difflib", "signal", "tarfile", "shutil", "aiohttp", "shtab", "ctypes",
}  # fmt: skip
PROBE = f"""
import sys
before = set(sys.modules)     # a distribution's .pth files may have imported things already
sys.path.insert(0, {ROOT!r})
from sysctr.cli import main
code = main(sys.argv[1:])
print("modules:", *sorted(set(sys.modules) - before), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def stub(tmp_path):
    stub = Stub(tmp_path)
    yield stub
    stub.close()


def run(stub, *arguments):
    return subprocess.run(
        [sys.executable, "-I", "-c", PROBE, *arguments],
        env={"SYSCTR_ROOT": stub.layout.root, "PATH": os.environ["PATH"]},
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments", [["list"], ["list", "--json"], ["list", "-q", "--tag", "web"], ["start", "demo"]]
)
def test_listing_and_starting_import_nothing_heavy(stub, arguments):
    stub.routes["GET", "/1/containers"] = [stub.container(), stub.container(102, "web", state="stopped")]
    stub.routes["POST", "/1/containers/demo/start"] = (202, {"task": stub.task()})
    done = run(stub, *arguments)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.rpartition("modules:")[2].split())
    assert "sysctr.client" in loaded
    assert HEAVY.isdisjoint(loaded), HEAVY & loaded


def test_only_the_module_of_the_command_is_loaded(stub):
    stub.routes["GET", "/1/containers"] = []
    done = run(stub, "list")
    loaded = {name for name in done.stderr.split() if name.startswith("sysctr")}
    assert loaded == {
        "sysctr", "sysctr.cli", "sysctr.cli.command", "sysctr.cli.container", "sysctr.cli.output",
        "sysctr.cli.table", "sysctr.client", "sysctr.errors", "sysctr.paths",
    }  # fmt: skip


def launched(stub, *arguments, **options):
    code = f"import sys; sys.path.insert(0, {ROOT!r}); from sysctr.cli import program; program()"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, *arguments],
        env={"SYSCTR_ROOT": stub.layout.root, "PATH": os.environ["PATH"]},
        text=True, check=False, **options,
    )  # fmt: skip


def test_the_launchers_way_out_loses_no_output_and_no_exit_code(stub):
    stub.routes["GET", "/1/containers"] = [stub.container(n, f"c{n}") for n in range(100, 3100)]
    done = launched(stub, "list", "-q", capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [str(n) for n in range(100, 3100)]
    done = launched(stub, "nonsense", capture_output=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no such command" in done.stderr


def test_a_reader_who_left_is_told_by_the_launchers_exit_code(stub):
    stub.routes["GET", "/1/containers"] = [stub.container(n, f"c{n}") for n in range(100, 3100)]
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    with open(write_fd, "wb") as closed:
        done = launched(stub, "list", stdout=closed, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, "")
