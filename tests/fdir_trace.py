"""Does each row of the FDIR table have an injector and a test that proves it? Told as sentences."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from fdir.table import Row


def disable_row(toml: str, row_id: str) -> str:
    """Return the text of a table with one row disabled; ValueError when it holds no such row."""
    head, *blocks = toml.split("[[row]]\n")
    wanted = f'id = "{row_id}"'
    if not any(wanted in block.splitlines() for block in blocks):
        raise ValueError(f"{row_id!r} is no row of the table")
    changed = [
        "\n".join(
            part
            for line in block.split("\n")
            if not (wanted in block.splitlines() and line.startswith("state ="))
            for part in ([line, 'state = "disabled"'] if line == wanted else [line])
        )
        for block in blocks
    ]
    return "[[row]]\n".join([head, *changed])


def injector_problem(dotted: str) -> str:
    """Why a dotted name does not lead to anything, empty if it does."""
    parts = dotted.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        try:
            found: object = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            continue
        for name in parts[length:]:
            if not hasattr(found, name):
                return f"{module} has no {'.'.join(parts[length:])}"
            found = getattr(found, name)
        return "" if callable(found) else f"{dotted} cannot be called"
    return f"there is no module of {dotted}"


def test_problem(row: Row, root: Path) -> str:
    """Why the test a row names does not stand for it, empty if it does."""
    file, _, name = row.test.partition("::")
    path = root / file
    if not path.is_file():
        return f"there is no {file}"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            marks = {ast.unparse(mark) for mark in node.decorator_list}
            return (
                "" if f"pytest.mark.fdir({row.id!r})" in marks else f"{name} lacks the mark fdir({row.id!r})"
            )
    return f"{file} has no {name}"


test_problem.__test__ = False  # type: ignore[attr-defined]


def disabled_problems(
    rows: Sequence[Row], root: Path, report: Path, timeout_s: float = 240.0
) -> dict[str, str]:
    """Run the rows' tests, each with its own row disabled; return why that proves nothing, by row.

    A test must run and fail: a pass, a skip, or an error outside the test itself proves nothing.
    """
    # Four at once: with its row disabled a test only waits.
    run = [sys.executable, "-m", "pytest", "-q", "-n", "4", "-p", "no:cacheprovider", f"--junitxml={report}"]
    try:
        done = subprocess.run(
            [*run, "--fdir-disable", "own", *(row.test for row in rows)],
            cwd=root, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {row.id: f"with the rows disabled it does not end within {timeout_s:g} s" for row in rows}
    if not report.is_file():
        tail = "\n".join(done.stdout.splitlines()[-8:])
        return {row.id: f"it did not run (exit code {done.returncode}): {tail}" for row in rows}
    cases: dict[str, list[ET.Element]] = {}
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - written by pytest just now
        file = case.get("classname", "").replace(".", "/")
        cases.setdefault(f"{file}.py::{case.get('name', '')}", []).append(case)
    problems = {row.id: _case_problem(cases.get(row.test, [])) for row in rows}
    return {row: problem for row, problem in problems.items() if problem}


def _case_problem(cases: Sequence[ET.Element]) -> str:
    if len(cases) != 1 or cases[0].find("error") is not None or cases[0].find("skipped") is not None:
        return "with the row disabled it does not run to its end"
    failure = cases[0].find("failure")
    if failure is None:
        return "it passes with the row disabled: it does not prove the row"
    # An assertion within a task group comes wrapped.
    text = failure.get("message", "") + (failure.text or "")
    wrapped = "ExceptionGroup" in text and re.search(
        r"^[ |]*\| (AssertionError|TimeoutError)\b", text, re.MULTILINE
    )
    if wrapped or text.startswith(("AssertionError", "assert ", "TimeoutError", "Failed: Timeout")):
        return ""
    return f"with the row disabled it fails for another reason: {text[:200]}"
