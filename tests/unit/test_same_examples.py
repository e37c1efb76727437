"""Tests draw the same everywhere; what a seed of `make explore` finds can be run again."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import explore
import pytest
from hypothesis import settings
from hypothesis.internal.conjecture import engine

TESTS = Path(__file__).parents[1]
DRAWS = """
import hypothesis_profiles
from hypothesis import given, strategies as st

drawn = []

@given(st.lists(st.integers()), st.text(), st.floats(), st.sampled_from(["a", "b"]))
def collect(numbers, text, real, letter):
    drawn.append(repr((numbers, text, real, letter)))

collect()
print("\\n".join(drawn))
"""


def drawn(before: str, **environment: str) -> list[str]:
    """Return what a fresh process draws after some other code."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8:surrogatepass"} | environment
    command = [sys.executable, "-c", before + DRAWS]
    output = subprocess.run(command, env=environment, check=True, capture_output=True).stdout
    return output.decode("utf-8", "surrogatepass").splitlines()


def test_a_property_draws_the_same_in_every_process() -> None:
    here = drawn("", PYTHONHASHSEED="1")
    there = drawn("import node.modes, telemetry.packets, hil.link_proxy", PYTHONHASHSEED="2", CI="true")
    assert len(here) >= 100
    assert here == there


def test_the_profile_of_every_run(pytestconfig: pytest.Config) -> None:
    now = settings()
    assert now.derandomize
    assert now.database is None
    assert now.deadline is None
    assert float(pytestconfig.getini("timeout")) > 2 * engine.MAX_SHRINKING_SECONDS
    assert not settings.get_profile("explore").derandomize


def chances(source: str) -> list[str]:
    """What brings chance into a test, in words."""
    tree = ast.parse(source)
    uses_random = any(
        isinstance(node, ast.Import) and any(alias.name == "random" for alias in node.names)
        for node in ast.walk(tree)
    )
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {each.arg: ast.unparse(each.value) for each in node.keywords}
        unseeded = called.endswith(("default_rng", "random.Random")) and not (node.args or keywords)
        of_module = re.fullmatch(r"(np|numpy)\.random\.(?!default_rng)\w+", called) or (
            uses_random and re.fullmatch(r"random\.(?!Random)\w+", called)
        )
        of_system = called in {"os.urandom", "uuid.uuid4"} or called.startswith("secrets.")
        against_profile = called == "settings" and (
            keywords.keys() & {"derandomize", "database", "phases"}
            or keywords.get("deadline", "None") != "None"
        )
        if unseeded or of_module or of_system or against_profile:
            found.append(f"line {node.lineno}: {called}")
    return found


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda p: p.relative_to(TESTS).as_posix())
def test_no_test_brings_chance_back(path: Path) -> None:
    assert chances(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.urandom(3)",
        "import random\nrandom.random()",
        "import random\nrandom.Random()",
        "np.random.default_rng()",
        "np.random.random(3)",
        "secrets.token_bytes()",
        "settings(derandomize=False)",
        "settings(deadline=200)",
    ],
)
def test_chance_is_found(source: str) -> None:
    assert chances(source) != []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of walks: one of each kind that holds, and one that does not."""
    (tmp_path / "conftest.py").write_text("import hypothesis_profiles\n")
    head = "from hypothesis import given, strategies as st\n"
    for name, law in (("holds", "n >= 0"), ("fails", "n < 300")):
        body = f"@given(st.integers(0, 1000))\ndef test_it(n):\n    assert {law}, 'seen'\n"
        (tmp_path / f"test_{name}.py").write_text(head + body)
        walk = f"def walk(steps, seed):\n    assert '{name}' == 'holds' or seed != 6, f'step {{steps - 1}}'\n"
        (tmp_path / f"walk_made_up_{name}.py").write_text(walk)
    (tmp_path / "test_plain.py").write_text("def test_it(): pass\n")
    return tmp_path


def test_what_a_seed_finds_is_counted_and_can_be_run_again(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert explore.main(["--first-seed", "5", "--seeds", "3", "--steps", "40"], folder) == 1
    table, failures = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in table.splitlines()[2:]]
    assert rows[1:] == [
        ["test_holds", "5 to 7", "300", "0"],
        ["walk_made_up_fails", "5 to 7", "120", "1"],
        ["walk_made_up_holds", "5 to 7", "120", "0"],
    ]
    assert rows[0][:2] + rows[0][3:] == ["test_fails", "5 to 7", "3"]
    again = re.findall(r"^again: (.*)$", failures, re.M)
    assert len(again) == 4
    assert "--first-seed 6 --seeds 1 --steps 40" in again[3]
    assert "step 39" in failures
    assert "n=300" in failures, "shrunk"
    ran = subprocess.run([*shlex.split(again[1]), "-p", "no:cacheprovider"], capture_output=True, check=False,
        text=True, env={**os.environ, "PYTHONPATH": str(TESTS)})  # fmt: skip
    assert ran.returncode == 1
    assert "n=300" in ran.stdout


def test_time_is_shared_and_what_got_none_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explore.main(["--minutes", "0", "walk_made_up_fails", "test_fails"], folder) == 0
    assert capsys.readouterr().out.count("no time left") == 2


def test_a_file_that_cannot_be_run_is_a_failure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, line in (("gone", "os._exit(3)"), ("broken", "raise ImportError('there is none')")):
        text = f"""
            import os
            from hypothesis import given, strategies as st
            if "{name}" == "broken":
                {line}
            @given(st.integers())
            def test_it(n):
                {line}
            """
        (folder / f"test_{name}.py").write_text(textwrap.dedent(text))
    assert explore.main(["--seeds", "1", "test_gone", "test_broken"], folder) == 1
    table, failures = capsys.readouterr()
    assert [line.split("|")[4].strip() for line in table.splitlines()[2:]] == ["1", "1"]
    assert "ended with 3" in failures
    assert "there is none" in failures


def test_a_walk_that_is_none_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        explore.main(["walk_of_nobody"], folder)
    assert "no walk 'walk_of_nobody'; there are: test_fails, test_holds" in capsys.readouterr().err


def test_every_walk_is_known() -> None:
    names = {path.stem for path in explore.PROPERTY.glob("*.py") if explore.is_walk(path)}
    assert {"test_delivery_walk", "test_batch_walk", "walk_boot", "test_wire"} <= names
    assert "test_ladder_walks" not in names, "it is walk_ladder and walk_boot"
