"""Mutations of single fields: what they are, and that a weakness is found by them."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import pytest

from hil.bench.link_load import T0_NS
from hil.campaign.field_mutations import FIXED, UNKNOWN, mutations, name_of, paths, put
from hil.campaign.field_run import FieldsResult, mutate_bus, mutate_others
from hil.campaign.field_seeds import (
    COMMANDS,
    NS,
    bus_kinds,
    channel_of,
    command_kinds,
    orbit_omm,
    packet_kinds,
    signed_kinds,
)
from hil.campaign.field_shadow import Commands, Shadow, kind_of, why_malformed
from node.bus_view import BusView
from node.intake import BUS_CHANNELS
from node.power.elements import OMM_READ
from node.power.estimator import SocEstimator
from telemetry import bus
from telemetry.commands import COMMANDS as DICTIONARY
from telemetry.dictionary.codes import DropCode

TREE: dict[str, Any] = {"a": 1, "b": [{"c": 2.0}, {"c": 3.0}], "d": "x"}


def said(_: str, __: float) -> None:
    return


def test_every_node_of_a_tree_is_a_field() -> None:
    names = [name_of(path) for path in paths(TREE)]
    assert names == ["", "a", "b", "b[]", "b[].c", "b[]", "b[].c", "d"]
    assert [name_of(path) for path in paths([1, [2]])] == ["", "[0]", "[1]", "[1][]"]
    assert put(TREE, ("b", 1, "c"), 7) == {"a": 1, "b": [{"c": 2.0}, {"c": 7}], "d": "x"}
    assert TREE["b"][1] == {"c": 3.0}


def test_one_field_is_changed_and_all_others_are_as_they_were() -> None:
    chance = random.Random(1)
    drawn = list(mutations(TREE, 3000, chance))
    assert len(drawn) == 3000
    assert {each.path for each in drawn} == {"", "a", "b", "b[]", "b[].c", "d", UNKNOWN, f"b[].{UNKNOWN}"}
    for each in drawn:
        if each.path in {"a", "d"}:
            other = {name: value for name, value in each.tree.items() if name != each.path}
            assert other == {name: value for name, value in TREE.items() if name != each.path}
        msgspec.msgpack.encode(each.tree)
    of_a = [each.tree.get("a") for each in drawn if each.path == "a"]
    for value in (0, -1, 1e-308, 1e300, "", [], {}, None, True, 2**63, -(2**63)):
        assert any(type(each) is type(value) and each == value for each in of_a), value
    assert any(isinstance(each, float) and math.isnan(each) for each in of_a), "NaN"
    assert len(of_a) > len(FIXED)


def test_there_is_a_sound_seed_of_every_message() -> None:
    chance = random.Random(1)
    assert {channel_of(kind.name) for kind in bus_kinds()} == set(BUS_CHANNELS)
    assert {arguments.name for arguments in COMMANDS} == set(DICTIONARY)
    shadow = Shadow()
    for kind in bus_kinds():
        assert shadow.take(channel_of(kind.name), kind.seal(kind.tree(chance))) is None, kind.name
    assert (orbit_omm().omm or {}).keys() >= OMM_READ
    judge = Commands()
    for kind in command_kinds():
        answer = judge.answer(kind.seal(kind.tree(chance)))
        assert answer not in {"malformed", "bad_mac", "unknown_command"}, kind.name
        assert answer != "bad_argument" or kind.name == "arm"
    judge.close()
    assert len(packet_kinds()) > 10
    assert [kind.name for kind in signed_kinds()] == ["ack", "flow", "upload chunk"]


def test_a_few_thousand_single_fields_change_nothing_and_end_nothing() -> None:
    result = FieldsResult()
    chosen = mutate_bus(3000, 5, result, said)
    mutate_others(2000, 5, result, said)
    assert result.is_right, result.findings
    assert all(sum(each.answers.values()) == each.sent > 0 for each in [*result.bus, *result.others])
    assert sum(each.sent for each in result.bus) >= 3000
    assert sum(map(len, chosen.refused.values())) + sum(map(len, chosen.taken.values())) >= 3000
    assert {"eps", "orbit, OMM"} <= chosen.taken.keys()


def test_the_same_seed_draws_the_same() -> None:
    drawn = [mutate_bus(300, 7, FieldsResult(), said) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_a_refusal_that_changes_something_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = BusView.handle

    def careless(self: BusView, message: bus.BusMessage, now_s: float) -> None:
        if isinstance(message, bus.BusThermal) and message.radiator_c == 0.0:
            self.rejections += 1
            raise ValueError("no radiator is at 0")
        sound(self, message, now_s)

    monkeypatch.setattr(BusView, "handle", careless)
    result = FieldsResult()
    mutate_bus(1000, 1, result, said)
    assert not result.is_right
    assert sum(each.changed for each in result.bus) > 0
    assert any("radiator_c" in finding for finding in result.findings)


def test_a_consumer_that_fails_is_counted_and_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(self: SocEstimator, reading: Any) -> None:
        self.estimate = None
        raise ZeroDivisionError("float division by zero")

    shadow, kind, chance = Shadow(), bus_kinds()[1], random.Random(1)
    assert shadow.take("eps", kind.seal(kind.tree(chance))) is None
    monkeypatch.setattr(SocEstimator, "handle", fragile)
    assert shadow.take("eps", kind.seal(kind.tree(chance))) is DropCode.FAILED
    assert shadow.changed == 0


def test_a_time_that_is_held_is_taken_and_moves_nothing() -> None:
    shadow = Shadow()
    for t_ns in (T0_NS, T0_NS + NS, T0_NS + 1024 * 7 * 86_400 * NS):
        assert shadow.take("time", bus.encode(bus.BusTime(t_ns=t_ns))) is None
    assert shadow.clock.holding
    assert abs(shadow.clock.now_ns(0) - T0_NS) < 10 * NS


def test_a_retained_message_that_is_dropped_and_changes_something_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shadow, kind, chance = Shadow(), bus_kinds()[2], random.Random(1)
    payload = kind.seal(kind.tree(chance))
    assert shadow.take("thermal", payload, retained=True) is DropCode.RETAINED
    assert shadow.changed == 0

    def careless(self: BusView, message: bus.BusMessage, now_s: float, *_: object) -> str:
        self.handle(message, now_s)
        return "a live one is needed"

    monkeypatch.setattr(BusView, "handle_retained", careless)
    assert shadow.take("thermal", payload, retained=True) is DropCode.RETAINED
    assert shadow.changed == 1
    result = FieldsResult()
    mutate_bus(300, 1, result, said)
    assert not result.is_right


def test_a_message_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(self: BusView, *_: object) -> str:
        raise ZeroDivisionError("float division by zero")

    for name in ("handle", "handle_retained"):
        with monkeypatch.context() as patched:
            patched.setattr(BusView, name, fragile)
            result = FieldsResult()
            mutate_bus(300, 1, result, said)
        assert sum(each.escaped for each in result.bus) > 0
        assert not result.is_right


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ({"t_ns": "x"}, "type"),
        ({}, "missing"),
        ({"t_ns": 0}, "range"),
        ({"t_ns": bus.EARLIEST_NS, "x": 1}, "unknown"),
        ([], "type"),
    ],
)
def test_an_error_of_the_schema_has_a_kind(message: object, kind: str) -> None:
    assert why_malformed("time", msgspec.msgpack.encode(message)) == kind
    assert why_malformed("time", b"\xc1") == "no msgpack"
    assert kind_of("either line1 and line2 are given, or omm") == "content"
