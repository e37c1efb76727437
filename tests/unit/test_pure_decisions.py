"""Every `handle()` decides without I/O, a clock or randomness: what was recorded can be decided again.

Looked for in the source, so that a new policy is held to it without being named here.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLIGHT = ("node", "fdir", "telemetry")
ALLOWED = {
    "__future__", "bisect", "collections", "copy", "crc32c", "dataclasses", "enum", "fractions", "functools",
    "graphlib", "hashlib", "heapq", "highspy", "itertools", "math", "msgspec", "numpy", "operator",
    "rainflow", "re", "reprlib", "sgp4", "statistics", "struct", "types", "typing",
}  # fmt: skip
"""Modules that compute and do nothing else."""
FORBIDDEN_CALLS = {"open", "print", "input", "exec", "eval", "breakpoint", "__import__"}
RANDOM_OF_NUMPY = "random"


def module_path(name: str) -> Path | None:
    """The file of one of our modules, None for another's."""
    base = ROOT.joinpath(*name.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def imports(tree: ast.AST) -> set[str]:
    """Full names of the modules imported at run time."""
    found: set[str] = set()
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if module_path(name)} or {node.module}
    return found


def impurities(source: str) -> list[str]:
    """What a module with a `handle()` must not have, in words."""
    tree = ast.parse(source)
    found = [
        f"imports {name}"
        for name in sorted(imports(tree))
        if name.split(".")[0] not in ALLOWED and module_path(name) is None
    ]
    for node in ast.walk(tree):
        if isinstance(node, (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)):
            found.append(f"line {node.lineno}: is asynchronous")
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FORBIDDEN_CALLS or f".{RANDOM_OF_NUMPY}." in f".{called}.":
                found.append(f"line {node.lineno}: calls {called}")
    return found


def policies() -> list[Path]:
    """Modules with a class that has `handle(event, ...)` and returns what to do."""
    found = []
    for package in FLIGHT:
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text())
            methods = [
                item
                for node in ast.walk(tree)
                if isinstance(node, ast.ClassDef)
                for item in node.body
                if isinstance(item, ast.FunctionDef) and item.name == "handle"
            ]
            if methods:
                found.append(path)
    return found


POLICIES = policies()


def test_the_known_policies_are_found() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in POLICIES}
    assert {"fdir/recovery.py", "fdir/health.py", "node/modes.py", "node/power/governor.py"} <= names


@pytest.mark.parametrize("path", POLICIES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_policy_has_no_io_clock_or_randomness(path: Path) -> None:
    assert impurities(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "import asyncio",
        "from pathlib import Path",
        "import random",
        "import numpy as np\nnp.random.default_rng()",
        "def handle(self):\n    open('x')",
        "async def handle(self):\n    pass",
        "from os import read",
        "import sqlite3",
    ],
)
def test_an_impure_policy_is_told(source: str) -> None:
    assert impurities(source) != []


def test_imports_for_types_only_are_no_io() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pathlib import Path\n"
    assert impurities(source) == []


def reached(path: Path) -> dict[str, list[str]]:
    """Our modules that a policy imports, directly or not, with what is impure in each."""
    seen: dict[str, list[str]] = {}
    waiting = [name for name in imports(ast.parse(path.read_text())) if module_path(name)]
    while waiting:
        name = waiting.pop()
        found = module_path(name)
        if name in seen or found is None:
            continue
        source = found.read_text()
        seen[name] = impurities(source)
        waiting += [inner for inner in imports(ast.parse(source)) if module_path(inner)]
    return seen


@pytest.mark.parametrize("path", POLICIES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_what_a_policy_imports_is_pure_or_known(path: Path) -> None:
    # These load files or talk to the kernel for others; policies take only types and constants from them.
    known = {"telemetry.errors", "telemetry.strict_toml", "fdir.table"}
    assert {name: why for name, why in reached(path).items() if why and name not in known} == {}
