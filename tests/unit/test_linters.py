"""The linters, as tests: skipped where they are not installed, which CI forbids with SYSCTR_REQUIRE."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def shell_scripts() -> list[Path]:
    """Return the files of the checkout that are shell scripts by their first line."""
    found = []
    for directory in ("packaging", ".ci", "templates"):
        for path in sorted((ROOT / directory).rglob("*")):
            if path.is_file() and path.read_bytes()[:64].split(b"\n")[0] in (b"#!/bin/sh", b"#!/bin/bash"):
                found.append(path)
    return [*found, *sorted((ROOT / "packaging").glob("*.sh"))]


def test_shell_scripts_are_found() -> None:
    names = {path.name for path in shell_scripts()}
    assert {"quickstart", "test", "uninstall"} <= names


@pytest.mark.needs("ruff")
def test_ruff_is_content() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.needs("shellcheck")
def test_shellcheck_is_content() -> None:
    done = subprocess.run(
        ["shellcheck", "--external-sources", "--source-path", "SCRIPTDIR", *map(str, shell_scripts())],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
