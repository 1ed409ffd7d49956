"""The diagram of the architecture: which part of sysctr may import which."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sysctr"
TUI = ROOT / "tui"

# Read a row as "may import these parts of sysctr and nothing else of it". A dotted name allows one module.
ALLOWED = {
    "errors": set(),
    "paths": set(),
    "config": {"errors"},
    "linux": {"errors"},
    "runtime": {"linux", "errors", "paths"},
    "cgroup": {"linux", "errors", "paths"},
    "network": {"linux", "config", "errors", "paths"},
    "storage": {"linux", "config", "errors", "paths"},
    "peer": {"linux", "errors", "paths"},
    "template": {"storage", "linux", "config", "errors", "paths", "templates"},
    "engine": {
        "config", "linux", "cgroup", "network", "storage", "template", "peer", "runtime.steps",
        "runtime.wire", "runtime.accounts", "runtime.begin", "runtime.console", "runtime.steps_mounts",
        "launch", "errors", "paths",
    },
    "api": {"engine", "config", "runtime.wire", "linux", "errors", "paths"},
    "launch": {"errors", "paths"},
    "client": {"errors", "paths", "launch", "remote", "ticket"},
    "cli": {"client", "launch", "config", "errors", "paths", "ticket", "tui"},
    "tui": {
        "client", "launch", "errors", "paths", "config.values", "config.schedule", "cli.container",
        "cli.migrate", "cli.moved", "cli.output", "cli.peer", "cli.progress", "cli.snapshot", "cli.table",
    },
    "remote": {"errors"},
    "ticket": {"errors"},
    "__main__": {"cli"},
}  # fmt: skip

# What each part may use of PyPI; whatever is not named here is for nobody.
THIRD_PARTY = {
    "config": {"tomli", "tomlkit", "yaml"},
    "linux": {"pyseccomp"},
    "network": {"pyroute2"},
    "peer": {"cryptography"},
    "template": {"tomli"},
    "engine": {"pyseccomp", "cryptography"},
    "api": {"aiohttp", "cryptography"},
    "cli": {"shtab"},
    "tui": {"textual", "rich", "textual_serve", "aiohttp"},
}
# Part: modules that it may not import when it is itself imported, because they are slow or for few.
ONLY_IN_FUNCTIONS = {
    "network": {"pyroute2"},
    "peer": {"cryptography", "ssl"},
    "engine": {"cryptography", "ssl"},
    "cli": {"sysctr.config", "shtab"},
    "config": {"yaml"},
    "linux": {"pyseccomp"},
}

MODULES = sorted([*PACKAGE.rglob("*.py"), *TUI.rglob("*.py")])


def part_of(path: Path) -> str:
    """Return the part of sysctr that a file belongs to: a package's name or a single module's."""
    if path.is_relative_to(TUI):
        return "tui"
    relative = path.relative_to(PACKAGE).with_suffix("")
    return relative.parts[0]


def imports(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Yield the line, the full dotted name and "at import time" for everything a module imports."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[int, str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and isinstance(child.test, ast.Name):
                # `if TYPE_CHECKING:` is never run, but it is still knowledge of the other part.
                yield from visit(child, False)
            elif isinstance(child, ast.Import):
                for alias in child.names:
                    yield child.lineno, alias.name, at_import
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"line {child.lineno}: relative import"
                for alias in child.names:
                    yield child.lineno, f"{child.module}.{alias.name}", at_import
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, at_import and not inside)

    yield from visit(tree, True)


def violations(part: str, source: str) -> list[str]:
    """Return what `source`, as a module of `part`, imports against the diagram.

    >>> violations("linux", "from sysctr.config import schema")
    ['line 1: linux may not import sysctr.config.schema']
    """
    found = []
    for line, name, at_import in imports(ast.parse(source)):
        top, *rest = name.split(".")
        if top == "sysctr" and rest and rest[0] != "__version__":
            target = rest[0]
            dotted = ".".join(rest[:2])
            if target != part and not {target, dotted} & ALLOWED[part]:
                found.append(f"line {line}: {part} may not import {name}")
        elif top not in ("sysctr", "__future__") and top not in sys.stdlib_module_names:
            if top not in THIRD_PARTY.get(part, set()):
                found.append(f"line {line}: {part} may not import {name}")
        elif top == "asyncio" and part not in ("api", "tui"):
            found.append(f"line {line}: asyncio is for api and tui")
        if at_import:
            for slow in ONLY_IN_FUNCTIONS.get(part, set()):
                if name == slow or name.startswith(f"{slow}."):
                    found.append(f"line {line}: {part} may import {slow} inside functions only")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        assert list(imports(ast.parse(path.read_text()))) == []
        return
    assert violations(part_of(path), path.read_text()) == []


def test_every_part_has_a_row() -> None:
    parts = {part_of(path) for path in MODULES if path != PACKAGE / "__init__.py"}
    assert parts <= ALLOWED.keys()


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("linux", "import sysctr.config.values"),
        ("runtime", "from sysctr.engine import state"),
        ("engine", "from sysctr.runtime.supervisor import main"),
        ("cli", "import sysctr.config"),
        ("cli", "def f():\n    import tomli"),
        ("network", "import pyroute2"),
        ("engine", "import asyncio"),
        ("config", "if TYPE_CHECKING:\n    from sysctr.linux import mount"),
    ],
)
def test_the_diagram_forbids(part: str, source: str) -> None:
    assert violations(part, source)


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("engine", "from sysctr.runtime import wire\nfrom sysctr.runtime.steps import Tmpfs"),
        ("network", "def f():\n    from pyroute2.netlink import nlmsg"),
        ("cli", "def f():\n    from sysctr.config import schema"),
        ("cli", "from sysctr import __version__"),
    ],
)
def test_the_diagram_allows(part: str, source: str) -> None:
    assert violations(part, source) == []
