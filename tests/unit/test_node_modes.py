from __future__ import annotations

import itertools

import pytest

from node.modes import (
    TRANSITIONS,
    AllowInference,
    Announce,
    Command,
    FdirSafe,
    ForbidInference,
    InvalidTransition,
    ModeMachine,
    PersistSafe,
    Restored,
    Sunlight,
    Trigger,
)
from telemetry.packets import Mode


def in_mode(mode: Mode) -> ModeMachine:
    machine = ModeMachine()
    if mode is not Mode.BOOT:
        machine.handle(Restored(safe=mode is Mode.SAFE), 0)
    if mode is Mode.ECLIPSE:
        machine.handle(Sunlight(0.0), 0)
    assert machine.mode is mode
    return machine


EVENTS = {
    Trigger.RESTORED: Restored(safe=False),
    Trigger.RESTORED_SAFE: Restored(safe=True),
    Trigger.COMMAND_NOMINAL: Command(Mode.NOMINAL),
    Trigger.COMMAND_SAFE: Command(Mode.SAFE),
    Trigger.FDIR_SAFE: FdirSafe("test"),
}


@pytest.mark.parametrize(("mode", "trigger"), list(itertools.product(Mode, EVENTS)))
def test_each_pair_is_in_the_table_or_raises_with_its_history(mode: Mode, trigger: Trigger) -> None:
    machine = in_mode(mode)
    if (mode, trigger) in TRANSITIONS:
        machine.handle(EVENTS[trigger], 1)
        target = TRANSITIONS[mode, trigger]
        assert machine.mode is (Mode.NOMINAL if target == "sunlit_mode" else target)
    else:
        with pytest.raises(InvalidTransition) as caught:
            machine.handle(EVENTS[trigger], 1)
        assert (caught.value.mode, caught.value.trigger) == (mode, trigger)
        assert caught.value.history == machine.history
        assert machine.mode is mode


def test_safe_is_reachable_from_every_mode_and_left_only_by_command() -> None:
    for mode in Mode:
        assert TRANSITIONS[mode, Trigger.FDIR_SAFE] == Mode.SAFE
    leaving = {t for (m, t), target in TRANSITIONS.items() if m is Mode.SAFE and target != Mode.SAFE}
    assert leaving == {Trigger.COMMAND_NOMINAL}


def test_entering_safe_persists_before_it_stops_the_worker() -> None:
    actions = in_mode(Mode.NOMINAL).handle(FdirSafe("worker"), 5)
    assert actions == [
        PersistSafe(True),
        ForbidInference(),
        Announce(Mode.NOMINAL, Mode.SAFE, Trigger.FDIR_SAFE, "worker"),
    ]


def test_leaving_safe_rearms_and_follows_the_sun() -> None:
    machine = in_mode(Mode.SAFE)
    assert machine.handle(Sunlight(0.1), 1) == []
    actions = machine.handle(Command(Mode.NOMINAL), 2)
    assert actions[:2] == [PersistSafe(False), AllowInference(rearm=True)]
    assert machine.mode is Mode.ECLIPSE


def test_a_command_for_the_present_mode_does_nothing() -> None:
    assert in_mode(Mode.NOMINAL).handle(Command(Mode.NOMINAL), 1) == []
    assert in_mode(Mode.ECLIPSE).handle(Command(Mode.NOMINAL), 1) == []
    assert in_mode(Mode.SAFE).handle(Command(Mode.SAFE), 1) == []


def test_eclipse_has_hysteresis_and_does_not_touch_the_worker() -> None:
    machine = in_mode(Mode.NOMINAL)
    assert machine.handle(Sunlight(0.5), 1) == []
    assert [type(a) for a in machine.handle(Sunlight(0.39), 2)] == [Announce]
    assert machine.handle(Sunlight(0.5), 3) == []
    assert machine.mode is Mode.ECLIPSE
    assert [type(a) for a in machine.handle(Sunlight(0.61), 4)] == [Announce]
    assert machine.mode is Mode.NOMINAL


@pytest.mark.parametrize("mode", [Mode.BOOT, Mode.ECLIPSE])
def test_only_nominal_and_safe_can_be_commanded(mode: Mode) -> None:
    with pytest.raises(ValueError, match="nominal and safe"):
        in_mode(Mode.NOMINAL).handle(Command(mode), 0)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_sunlit_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="0 to 1"):
        in_mode(Mode.NOMINAL).handle(Sunlight(fraction), 0)


def test_the_history_is_bounded() -> None:
    machine = in_mode(Mode.NOMINAL)
    for _ in range(40):
        machine.handle(Command(Mode.SAFE), 1)
        machine.handle(Command(Mode.NOMINAL), 2)
    assert len(machine.history) == 20
    assert machine.history[-1] == "2 safe->nominal on command_nominal"
