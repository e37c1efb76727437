"""The proof of traceability must itself be able to fail."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest
from fdir_trace import disable_row, disabled_problems, injector_problem, test_problem

from fdir.table import PACKAGED, RowState, load_table

ROW = msgspec.structs.replace(load_table().row("worker.exit"), test="tests/test_x.py::test_x")
CONFTEST = """
import pytest
def pytest_addoption(parser):
    parser.addoption("--fdir-disable")
@pytest.fixture
def disabled(request):
    return request.config.getoption("--fdir-disable")
"""


def tree(tmp_path: Path, body: str) -> Path:
    """A tree with one test, which has the fixture `disabled`: the row disabled, or None."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(CONFTEST)
    (tmp_path / "tests" / "test_x.py").write_text(f"import pytest\ndef test_x(disabled):\n    {body}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("assert disabled is None, 'no action came'", ""),
        ("raise TimeoutError('waited in vain')", ""),
        ("pass", "passes with the row disabled"),
        ("pytest.skip('not here')", "does not run to its end"),
        ("raise KeyError('x')", "another reason"),
    ],
)
def test_what_a_run_with_the_row_disabled_proves(tmp_path: Path, body: str, why: str) -> None:
    found = disabled_problems([ROW], tree(tmp_path, body), tmp_path / "r.xml").get(ROW.id, "")
    assert (found == "") if not why else (why in found)


def test_a_test_that_is_not_there_proves_nothing(tmp_path: Path) -> None:
    root = tree(tmp_path, "pass")
    row = msgspec.structs.replace(ROW, test="tests/test_x.py::test_y")
    assert disabled_problems([row], root, tmp_path / "r.xml")


def test_a_test_must_carry_the_mark_of_its_row(tmp_path: Path) -> None:
    root = tree(tmp_path, "pass")
    assert "lacks the mark" in test_problem(ROW, root)
    file = root / "tests" / "test_x.py"
    file.write_text("import pytest\n@pytest.mark.fdir('worker.exit')\nasync def test_x(): pass\n")
    assert test_problem(ROW, root) == ""
    file.write_text("def test_z(): pass\n")
    assert "has no test_x" in test_problem(ROW, root)
    file.unlink()
    assert "there is no" in test_problem(ROW, root)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("hil.faults.draw_faults", ""),
        ("hil.injector.Injector.run", ""),
        ("hil.nothing.here", "has no nothing.here"),
        ("hil.faults.no_such", "has no no_such"),
        ("nowhere_at_all.f", "there is no module"),
    ],
)
def test_an_injector_must_lead_somewhere(name: str, why: str) -> None:
    assert (injector_problem(name) == "") if not why else (why in injector_problem(name))


@pytest.mark.parametrize("row", load_table().ids)
def test_one_row_is_disabled(tmp_path: Path, row: str) -> None:
    path = tmp_path / "t.toml"
    path.write_text(disable_row(PACKAGED.read_text(), row))
    changed = load_table(path)
    assert [r.id for r in changed.rows if r.state is RowState.DISABLED] == [row]
    assert len(changed.rows) == len(tomllib.loads(PACKAGED.read_text())["row"])


def test_a_state_given_is_replaced() -> None:
    text = '[[row]]\nid = "a.b"\nstate = "passive"\n[[row]]\nid = "c.d"\nstate = "passive"\n'
    assert tomllib.loads(disable_row(text, "c.d"))["row"] == [
        {"id": "a.b", "state": "passive"}, {"id": "c.d", "state": "disabled"},
    ]  # fmt: skip


def test_a_row_that_is_not_there_is_not_disabled() -> None:
    with pytest.raises(ValueError, match="no row"):
        disable_row(PACKAGED.read_text(), "no.row")
