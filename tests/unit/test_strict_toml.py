"""TOML read strictly: the message shows the one wrong value, and every reader takes the same files."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from msgspec import Meta

from fdir.table import PACKAGED, load_table
from telemetry.errors import PenumbraError
from telemetry.keys import KeyRing, generate_key_file
from telemetry.strict_toml import load_toml


class Leaf(msgspec.Struct, forbid_unknown_fields=True):
    """Innermost table."""

    value: Annotated[float, Meta(le=9)]
    other: list[list[int]] = []


class Branch(msgspec.Struct, forbid_unknown_fields=True):
    """Tables and lists in each other."""

    leaves: Annotated[list[Leaf], Meta(min_length=1)] = []
    several: tuple[Leaf, ...] = ()
    pair: tuple[int, str] = (0, "")
    one: Leaf | None = None
    named: dict[str, Leaf] = {}

    def __post_init__(self) -> None:
        """Refuse a pair of 13."""
        if self.pair[0] == 13:
            raise ValueError("pair must not be 13")


class Tree(msgspec.Struct, forbid_unknown_fields=True):
    """The file."""

    text: str = ""
    branches: Annotated[list[Branch], Meta(min_length=1)] = []
    branch: Branch | None = None


FILLER = f'text = "{"filler " * 500}"\n'
GOOD = "leaves = [{value = 1}, {value = 2}]\n"


def refusal(tmp_path: Path, text: str | bytes, kind: Any = Tree) -> PenumbraError:
    path = tmp_path / "tree.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(PenumbraError) as caught:
        load_toml(path, kind)
    assert str(path) in caught.value.what
    return caught.value


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        (
            f"[[branches]]\n{GOOD}[[branches]]\nleaves = [{{value = '78N'}}]",
            "branches[1].leaves[0].value = '78N':",
        ),
        (f"[[branches]]\n{GOOD}[[branches]]\nleaves = [{{value = 99}}]", "branches[1].leaves[0].value = 99:"),
        (
            "[[branches]]\nleaves = [{value = 1, other = [[1], [2, 'x']]}]",
            "branches[0].leaves[0].other[1][1] = 'x':",
        ),
        ("[branch]\nseveral = [{value = 1}, {value = true}]", "branch.several[1].value = True:"),
        ("[branch]\npair = [1, 2]", "branch.pair[1] = 2:"),
        ("[branch]\none = {value = 'x'}", "branch.one.value = 'x':"),
        ("[branch]\none = 7", "branch.one = 7:"),
        ("[branch]\nleaves = [{value = 1}, 'x']", "branch.leaves[1] = 'x':"),
        ("[branch]\nleaves = []", "branch.leaves = []:"),
        ("[branch]\nleaves = [{}]", "branch.leaves[0].value is missing"),
        (
            "[branch]\nleaves = [{value = 1, valve = 2}]",
            "unknown key 'valve' in [branch.leaves[0]]; allowed: other, value",
        ),
        ("[branch]\npair = [13, 'x']", "branch = {'pair': [13, 'x']}: pair must not be 13"),
        ("[branch.named]\na = {value = 1}\n'b.c' = {value = 'x'}", "branch.named"),
        ("unknown = 1", "unknown key 'unknown' in the file; allowed: branch, branches, text"),
    ],
)
def test_the_value_that_is_wrong_is_shown_alone(tmp_path: Path, tables: str, says: str) -> None:
    error = refusal(tmp_path, tables + "\n" if tables.startswith("unknown") else FILLER + tables)
    assert says in error.what
    assert len(error.what) < 300 + len(str(tmp_path))
    assert error.mend


@pytest.mark.parametrize(
    "value",
    ['"' + "a" * 5000 + '"', f"[{'1, ' * 5000}]", f"{{{', '.join(f'k{i} = 1' for i in range(500))}}}"],
    ids=["text", "list", "table"],
)
def test_a_long_value_is_shown_in_part(tmp_path: Path, value: str) -> None:
    error = refusal(tmp_path, f"branches = [{{leaves = [{{value = {value}}}]}}]")
    assert "branches[0].leaves[0].value = " in error.what
    assert len(error.what) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "text = " + "[" * 100_000 + "]" * 100_000,
        "branch" + ".a" * 2_000 + " = 1",
        "text = " + "1" * 5000,
        "text = 2026-02-30",
        b"\xff\xfet\0e\0x\0t\0",
    ],
    ids=["lists", "tables", "digits", "date", "utf-16"],
)
def test_what_no_reader_takes_is_refused_in_one_message(tmp_path: Path, text: str | bytes) -> None:
    error = refusal(tmp_path, text)
    assert "no TOML" in error.what
    assert len(error.what) < 300 + len(str(tmp_path))


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "marked.toml"
    path.write_bytes(codecs.BOM_UTF8 + FILLER.encode())
    assert load_toml(path, Tree).text.startswith("filler")
    path.write_bytes(codecs.BOM_UTF8 + PACKAGED.read_bytes())
    assert load_table(path).sha256 == load_table().sha256
    keys = tmp_path / "keys.toml"
    generate_key_file(keys)
    keys.write_bytes(codecs.BOM_UTF8 + keys.read_bytes())
    assert [key.id for key in KeyRing.load(keys)] == ["ground-1"]


def test_a_secret_is_in_no_message(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    generate_key_file(keys)
    secret = KeyRing.load(keys).signing_key().secret.hex()
    for old, new in (("secret = ", "secret = 1, "), ("state", "secret"), (f'"{secret}"', f'["{secret}"]')):
        text = keys.read_text()
        assert old in text
        keys.write_text(text.replace(old, new))
        with pytest.raises(PenumbraError, match="key file") as caught:
            KeyRing.load(keys)
        assert secret[:8] not in str(caught.value)
        keys.write_text(text)


@pytest.mark.parametrize("value", ["0x" + "f" * 5000, "9223372036854775808"])
def test_an_integer_that_toml_does_not_keep_is_refused(tmp_path: Path, value: str) -> None:
    error = refusal(tmp_path, f"branch = {{pair = [{value}, 'x']}}")
    assert "branch.pair[0] = an integer of " in error.what
    assert "64 bits" in error.what
