"""The shape every module keeps: its size, its docstring, and who may fork, sleep, run asynchronously."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for part in ("sysctr", "tui", "tests", "templates") for path in (ROOT / part).rglob("*.py")
)
LIMIT = 600


def called(node: ast.AST) -> str:
    """Return the dotted name that a call calls, as it is written."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def swallows(handler: ast.ExceptHandler) -> bool:
    """Tell whether a handler catches everything and does nothing about it."""
    everything = handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException")
    nothing = all(
        isinstance(line, ast.Pass | ast.Continue) or ast.unparse(line) == "..." for line in handler.body
    )
    return everything and nothing


def complaints(path: str, source: str) -> list[str]:
    """Return what the module at `path` (relative to the checkout) does against the rules of the house.

    >>> complaints("sysctr/engine/x.py", "'''X.'''\\nasync def f(): os.fork()")
    ['line 2: async outside api and tui', 'line 2: os.fork outside runtime and linux.process']
    """
    found = []
    tree = ast.parse(source)
    if source.count("\n") > LIMIT:
        found.append(f"{source.count(chr(10))} lines, at most {LIMIT}")
    if not ast.get_docstring(tree):
        found.append("no docstring says what it is for")
    may_async = path.startswith(("sysctr/api/", "tui/", "tests/"))
    may_fork = path.startswith("sysctr/runtime/") or path == "sysctr/linux/process.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef) and not may_async:
            found.append(f"line {node.lineno}: async outside api and tui")
        name = called(node)
        forks = name in ("os.fork", "os.forkpty", "pty.fork", "process.clone", "clone")
        if path.startswith("sysctr/") and forks and not may_fork:
            found.append(f"line {node.lineno}: {name} outside runtime and linux.process")
        if path.startswith("tests/") and name in ("time.sleep", "sleep"):
            found.append(f"line {node.lineno}: {name} in a test, wait for a fact instead")
        if isinstance(node, ast.ExceptHandler) and swallows(node):
            found.append(f"line {node.lineno}: swallows every error")
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            found.append(f"line {node.lineno}: star import")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_keeps_the_shape(path: Path) -> None:
    assert complaints(str(path.relative_to(ROOT)), path.read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("sysctr/cli/a.py", "x = 1"),
        ("sysctr/cli/a.py", "'''X.'''\n" + "x = 1\n" * LIMIT),
        ("sysctr/api/a.py", "'''X.'''\nos.fork()"),
        ("sysctr/cli/a.py", "'''X.'''\nasync def f(): ..."),
        ("tests/a.py", "'''X.'''\ntime.sleep(1)"),
        ("sysctr/cli/a.py", "'''X.'''\ntry:\n    f()\nexcept Exception:\n    pass"),
        ("sysctr/cli/a.py", "'''X.'''\nfrom os import *"),
    ],
)
def test_the_rules_are_watched(path: str, source: str) -> None:
    assert complaints(path, source)


def test_no_module_is_a_heap_of_helpers() -> None:
    names = {path.stem for path in SOURCES}
    assert not names & {"utils", "util", "helpers", "common", "misc"}
