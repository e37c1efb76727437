"""The FDIR table is refused whole when anything in it is not allowed, and says where and why."""

from __future__ import annotations

import contextlib
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from some_rows import hot, make_row

from fdir.table import (
    ACTS_IN_WORKER,
    PACKAGED,
    Action,
    Delta,
    Expected,
    Expr,
    Limit,
    Report,
    Row,
    RowState,
    Stale,
    Table,
    decode_table,
    load_table,
)
from telemetry.errors import PenumbraError
from telemetry.packets import Level, Mode

GOOD = """
[[row]]
id = "board.hot"
text = "the board is too hot"
level = 5
item = "board.c"
check = { type = "limit", high = 95.0, unit = "degC" }
severity = 4
max_events = 12
action = "safe_mode"
injector = "hil.row_faults.heat_board"
test = "tests/x.py::test_x"
"""


def refusal(tmp_path: Path, text: str) -> str:
    path = tmp_path / "table.toml"
    path.write_text(text)
    with pytest.raises(PenumbraError) as caught:
        load_table(path)
    assert str(path) in caught.value.what
    assert caught.value.mend
    return caught.value.what


def test_the_packaged_table_is_whole():
    table = load_table()
    assert len(table.rows) == len(tomllib.loads(PACKAGED.read_text())["row"]) >= 28
    assert {row.level for row in table.rows} == set(Level)
    assert set(table.ids) >= ACTS_IN_WORKER
    assert [row.id for row in table.escalation("worker.exit")][-1] == "node.resets"
    assert table.row("node.resets").action is Action.SAFE_MODE


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('item = "board.c"', 'item = "board.d"', ["row board.hot", "item", "'board.d'", "board.c"]),
        ("high = 95.0, ", "", ["row board.hot", "check", "a limit is missing"]),
        ("high = 95.0", "high = nan", ["row board.hot", "check", "high", "nan", "finite"]),
        ("high = 95.0", "high = inf", ["row board.hot", "check", "high", "inf", "finite"]),
        ("high = 95.0", "high = 5.0, low = 9.0", ["row board.hot", "check.low", "9", "5"]),
        ('unit = "degC"', 'unit = "K"', ["row board.hot", "check.unit", "'K'", "'degC'"]),
        ('type = "limit"', 'type = "limits"', ["row board.hot", "check.type", "'limits'", "limit"]),
        ('unit = "degC"', 'unit = "degC", lo = 1', ["row board.hot", "check", "lo"]),
        ('action = "safe_mode"', 'action = "explode"', ["row board.hot", "action", "explode"]),
        ("level = 5", "level = 4", ["row board.hot", "level", "4", "safe_mode", "5"]),
        ("level = 5", "level = 7", ["row board.hot", "level", "7"]),
        ("severity = 4", 'severity = "high"', ["row board.hot", "severity"]),
        ("max_events = 12", "max_events = -1", ["row board.hot", "max_events", "-1"]),
        ("max_events = 12", "max_event = 12", ["row board.hot", "max_event"]),
        ('id = "board.hot"', 'id = "Board"', ["row Board", "id", "'Board'", "lower-case"]),
        ('id = "board.hot"', "", ["row [0]", "id"]),
        ("severity = 4", "severity = 4\npersistence = 0", ["row board.hot", "persistence", "0"]),
        ("severity = 4", "severity = 4\nwindow_s = inf", ["row board.hot", "window_s", "finite"]),
        ("severity = 4", 'severity = 4\nvalidity = "board.c"', ["row board.hot", "validity", "bool"]),
        ("severity = 4", 'severity = 4\nmodes = ["sleep"]', ["row board.hot", "modes", "sleep"]),
        ("severity = 4", 'severity = 4\nmodes = ["safe", "safe"]', ["row board.hot", "modes", "once"]),
        (
            "severity = 4",
            'severity = 4\nescalates_to = "no.row"',
            ["row board.hot", "escalates_to", "no.row"],
        ),
        (
            "severity = 4",
            'severity = 4\nescalates_to = "board.hot"',
            ["row board.hot", "escalates_to", "circle"],
        ),
        ("severity = 4", 'severity = 4\nstate = "on"', ["row board.hot", "state", "on"]),
        ('"hil.row_faults.heat_board"', '"os.system"', ["row board.hot", "injector", "os.system"]),
        ('"tests/x.py::test_x"', '"x.py"', ["row board.hot", "test", "x.py"]),
        ("[[row]]", "[row]", ["[[row]]"]),
        ("[[row]]", "name = 1\n[[row]]", ["unknown key", "name", "allowed: row"]),
        ("level = 5", "level =", ["no TOML"]),
    ],
)
def test_what_is_not_allowed_is_refused_with_row_field_and_reason(
    tmp_path: Path, old: str, new: str, words: list[str]
) -> None:
    assert old in GOOD
    text = refusal(tmp_path, GOOD.replace(old, new))
    assert [word for word in words if word not in text] == [], text


@pytest.mark.parametrize("text", ["", "\xff", "row = []", "row = 3", "row = [3]"])
def test_what_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "table.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(PenumbraError, match=r"table\.toml"):
        load_table(tmp_path / "table.toml")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(PenumbraError, match="No such file"):
        load_table(tmp_path / "none.toml")


def worker(id: str, **values: Any) -> Row:
    return make_row(id, action=Action.RESTART_WORKER, **values)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([hot("a.a"), hot("a.a")], "two rows of this id"),
        ([worker("a.a", escalates_to="b.b"), worker("b.b", escalates_to="a.a")], "circle: a.a -> b.b -> a.a"),
        (
            [worker("a.a", escalates_to="b.b"), make_row("b.b", action=Action.REPAIR)],
            "of level 0, this row is of",
        ),
        ([make_row("a.a", escalates_to="b.b"), worker("b.b")], "action 'none' cannot fail"),
        ([make_row("a.a", attempts=1)], "is not bounded"),
        ([make_row("a.a", persistence=2)], "only 1 is allowed"),
        ([make_row("a.a", item="board.c")], "watches no item"),
        ([make_row("a.a", stale_after_s=1.0)], "no samples to grow old"),
        (
            [make_row("weights.digest", action=Action.REPAIR, state=RowState.PASSIVE)],
            "acts before it reports",
        ),
        ([hot(item="clock.locked")], "which is a bool"),
        ([hot(check=Expected(value=1))], "which is a float"),
        ([hot(item="clock.locked", check=Expected(value=1))], "not of type bool"),
        ([hot(item="jobs.queued", check=Expected(value=True))], "not of type int"),
        ([hot(item="jobs.queued", check=Expected(value=4, mask=3))], "outside mask"),
        ([hot(item="clock.locked", check=Expected(value=True, mask=1))], "which is a bool"),
        ([hot(check=Delta(unit="degC"))], "a limit is missing"),
        ([hot(check=Stale(after_s=float("inf")))], "finite"),
        ([hot(check=Stale(after_s=1.0), stale_after_s=2.0)], "never stale itself"),
        ([make_row("a.a", check=Expr(rows="b.b and"))], "ends where an id is expected"),
        ([make_row("a.a", check=Expr(rows="b.b"))], "there is no row 'b.b'"),
        ([make_row("a.a", check=Expr(rows="not a.a"))], "circle: a.a -> a.a"),
        (
            [make_row("a.a", check=Expr(rows="b.b")), make_row("b.b", check=Expr(rows="not a.a"))],
            "goes in a circle",
        ),
        ([], "it holds no row"),
    ],
)
def test_rows_that_do_not_fit_together_are_refused(rows: list[Row], words: str) -> None:
    with pytest.raises(PenumbraError) as caught:
        Table(rows)
    assert words in caught.value.what


def test_a_table_is_the_same_after_a_trip_and_its_digest_tells_tables_apart():
    table = load_table()
    again = decode_table(table.encode())
    assert again.rows == table.rows
    assert again.sha256 == table.sha256
    other = Table([msgspec.structs.replace(table.rows[0], max_events=1), *table.rows[1:]])
    assert other.sha256 != table.sha256


@given(st.data())
def test_struck_bytes_of_a_table_are_refused_or_another_table_but_never_a_crash(data):
    encoded = bytearray(load_table().encode())
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = decode_table(bytes(encoded))
    except PenumbraError:
        return
    assert found.encode() != load_table().encode()


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**9),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=2),
)


@given(field=st.sampled_from([f.encode_name for f in msgspec.structs.fields(Row)]), value=VALUES)
def test_any_one_field_spoilt_gives_a_row_or_an_error_the_user_can_mend(field, value):
    raw = msgspec.to_builtins(load_table().row("worker.memory")) | {field: value}
    # What is no row is told by `convert_toml` in a file.
    with contextlib.suppress(msgspec.ValidationError, PenumbraError):
        Table([msgspec.convert(raw, Row), *(r for r in load_table().rows if r.id != "worker.memory")])


def test_a_row_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(PenumbraError, match=r"'no\.row' is no row of the FDIR table; rows: a\.a"):
        Table([make_row("a.a")]).row("no.row")


def test_momentary_rows_are_reports_of_the_lowest_levels():
    assert make_row("a.a", action=Action.REPAIR).is_momentary
    assert make_row("a.a", action=Action.REDO).is_momentary
    assert not worker("a.a").is_momentary
    assert not hot().is_momentary
    assert isinstance(make_row("a.a").check, Report)
    assert Limit(unit="s") != Delta(unit="s")
    assert Mode.SAFE in make_row("a.a", modes=(Mode.SAFE,)).modes
