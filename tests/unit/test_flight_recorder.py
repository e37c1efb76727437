"""The flight recorder: order, bounds, and that what it kept can be read again."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdir.flight_recorder import Entry, EntryKind, FlightRecorder, read_dump, shrink
from fdir.recovery import Fault, PersistRestarts


@dataclasses.dataclass(frozen=True)
class Found:
    row: object
    evidence: dict[str, Any]


class NamedRow(msgspec.Struct):
    id: str
    text: str = "x" * 1000


def test_stimuli_and_actions_come_back_in_order_with_their_fields() -> None:
    recorder = FlightRecorder()
    recorder.stimulus("recovery", Fault("worker.ping", "silent"), 10)
    recorder.action("recovery", PersistRestarts((1.5, 2.5)), 11)
    recorder.stimulus("monitors", {"battery.soc": 0.5, "clock.locked": None}, 12)
    recorder.stimulus("monitors", "Tick", 13)
    assert read_dump(recorder.dump()) == [
        Entry(10, EntryKind.STIMULUS, "recovery", "Fault", {"monitor": "worker.ping", "reason": "silent"}),
        Entry(11, EntryKind.ACTION, "recovery", "PersistRestarts", {"times_s": [1.5, 2.5]}),
        Entry(12, EntryKind.STIMULUS, "monitors", "values", {"battery.soc": 0.5, "clock.locked": None}),
        Entry(13, EntryKind.STIMULUS, "monitors", "Tick", {}),
    ]


def test_a_row_is_named_and_not_copied() -> None:
    recorder = FlightRecorder()
    recorder.stimulus("ladder", Found(NamedRow("kv.digest"), {"page": 3}), 0)
    assert read_dump(recorder.dump())[0].fields == {"row": "kv.digest", "evidence": {"page": 3}}


def test_only_the_latest_are_held() -> None:
    recorder = FlightRecorder(capacity=3)
    for number in range(10):
        recorder.stimulus("m", {"n": number}, number)
    assert [entry.fields["n"] for entry in read_dump(recorder.dump())] == [7, 8, 9]
    assert (len(recorder), recorder.noted) == (3, 10)


def test_a_giant_is_left_out_and_its_neighbours_stay() -> None:
    recorder = FlightRecorder(max_bytes=2000)
    recorder.stimulus("m", {"n": 1}, 1)
    recorder.stimulus("m", {f"k{i}": "x" * 200 for i in range(20)}, 2)
    recorder.stimulus("m", {"n": 3}, 3)
    entries = read_dump(recorder.dump())
    assert [entry.t_ns for entry in entries] == [1, 2, 3]
    assert entries[1].fields["left_out_bytes"] > 500


def test_bounds_are_checked_and_garbage_is_refused() -> None:
    for arguments in ((0, 1000), (1, 999)):
        with pytest.raises(ValueError, match="required"):
            FlightRecorder(*arguments)
    for garbage in (b"", b"\xc1", msgspec.msgpack.encode([[1, "stimulus"]])):
        with pytest.raises(ValueError, match="no dump"):
            read_dump(garbage)


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.sets(st.text()),
    max_leaves=20,
)


@settings(max_examples=60)
@given(st.lists(st.dictionaries(st.text(), values, max_size=4), max_size=30))
def test_whatever_is_noted_the_dump_is_bounded_and_readable(events: list[dict[str, Any]]) -> None:
    recorder = FlightRecorder(capacity=20, max_bytes=1500)
    for number, event in enumerate(events):
        recorder.stimulus("m", event, number)
    dump = recorder.dump()
    assert len(dump) <= 1500
    times = [entry.t_ns for entry in read_dump(dump)]
    assert times == list(range(len(events)))[len(events) - len(times) :]
    assert bool(times) == bool(events)


@given(values)
def test_shrunk_values_are_plain_and_stable(value: Any) -> None:
    plain = shrink(value)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plain)) == plain
    assert shrink(object()) == "object"
