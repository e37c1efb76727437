"""The boot manager's rules, one by one."""

from __future__ import annotations

from typing import Any

import pytest

from fdir.boot import SLOTS, BootDecision, BootFacts, BootLimits, BootMode, SlotState, decide

BOTH = {"a": SlotState.VALID, "b": SlotState.VALID}


def boot(**values: Any) -> BootDecision:
    facts: dict[str, Any] = {
        "boot": 7, "clean_shutdown": True, "restart_requested": False, "safe": False, "slots": BOTH,
        "last_slot": "a", "last_active": "a",
    }  # fmt: skip
    return decide(BootFacts(**(facts | values)), BootLimits(2, 4))


def test_after_an_ordered_stop_it_starts_as_ever():
    found = boot(unintended=3)
    assert (found.mode, found.slot, found.reasons, found.unintended) == (BootMode.NORMAL, "a", (), 0)


def test_an_unintended_reboot_is_counted_and_put_down_to_its_slot():
    found = boot(clean_shutdown=False, unintended=1, failed_starts={"a": 1})
    assert (found.is_unintended, found.unintended, found.failed_starts["a"]) == (True, 2, 2)
    assert "unintended reboot, 2 in a row" in found.reasons


def test_a_restart_asked_for_is_no_unintended_one_and_forgets_none():
    found = boot(clean_shutdown=False, restart_requested=True, unintended=2)
    assert (found.is_unintended, found.unintended) == (False, 2)
    assert found.reasons == ("restart asked for by the recovery ladder",)


@pytest.mark.parametrize(("failed", "slot"), [(0, "a"), (1, "b"), (5, "b")])
def test_a_slot_that_fails_is_left_for_the_other(failed, slot):
    assert boot(clean_shutdown=False, failed_starts={"a": failed}).slot == slot


def test_when_both_fail_the_one_that_failed_less_is_used():
    assert boot(failed_starts={"a": 3, "b": 3}).slot == "a"
    assert boot(failed_starts={"a": 3, "b": 2}).slot == "b"


@pytest.mark.parametrize(
    ("a", "b", "slot"),
    [
        (SlotState.INVALID, SlotState.VALID, "b"),
        (SlotState.MISSING, SlotState.VALID, "b"),
        (SlotState.INVALID, SlotState.INVALID, "a"),
        (SlotState.MISSING, SlotState.INVALID, "b"),
        (SlotState.MISSING, SlotState.MISSING, None),
        (SlotState.VALID, SlotState.MISSING, "a"),
    ],
)
def test_a_slot_that_is_not_whole_is_not_used_while_the_other_is(a, b, slot):
    assert boot(slots={"a": a, "b": b}).slot == slot


def test_a_pinned_slot_is_used_whatever_it_did():
    assert boot(pinned=True, failed_starts={"a": 9}).slot == "a"
    assert boot(pinned=True, slots={"a": SlotState.INVALID, "b": SlotState.VALID}).slot == "a"
    assert boot(pinned=True, slots={"b": SlotState.VALID}).slot is None


def test_a_slot_the_ground_has_chosen_since_gets_its_chance():
    assert boot(active="b", last_active="a", failed_starts={"b": 9}).slot == "b"
    assert boot(active="b", last_active="b", failed_starts={"b": 9}).slot == "a"


def test_safe_mode_comes_after_so_many_unintended_reboots_in_a_row():
    before = boot(clean_shutdown=False, unintended=2)
    assert (before.mode, before.entered_safe) == (BootMode.NORMAL, False)
    found = boot(clean_shutdown=False, unintended=3)
    assert (found.mode, found.entered_safe) == (BootMode.SAFE, True)
    held = boot(clean_shutdown=False, unintended=3, may_enter_safe=False)
    assert (held.mode, held.entered_safe) == (BootMode.NORMAL, False)


def test_safe_mode_is_left_by_command_only():
    found = boot(safe=True)
    assert (found.mode, found.entered_safe) == (BootMode.SAFE, False)
    assert "safe mode is left by command only" in found.reasons


def test_when_it_is_lost_whether_the_node_was_in_safe_mode_it_is():
    assert boot(lost=("safe",)).mode is BootMode.SAFE
    assert boot(lost=("resets",)).mode is BootMode.NORMAL


@pytest.mark.parametrize("limits", [(0, 4), (5, 4), (-1, 0)])
def test_limits_that_make_no_sense_are_refused(limits):
    with pytest.raises(ValueError, match="does not hold"):
        BootLimits(*limits)


@pytest.mark.parametrize("values", [{"unintended": -1}, {"failed_starts": {"a": -1}}])
def test_negative_counts_are_refused(values):
    with pytest.raises(ValueError, match="must not be negative"):
        boot(**values)


def test_there_are_two_slots():
    assert SLOTS == ("a", "b")
