"""What the ground is sent of the mission clock: an event for each of its actions."""

from __future__ import annotations

from node.clock import HOLD_S, ClockAction, ClockLocked, ClockLost, ClockStepped, StepHeld, StepRejected
from node.recorder import Evidence
from telemetry.packets import Severity


def describe(action: ClockAction) -> tuple[Severity, str, str, Evidence]:
    """Return severity, name, text and evidence of the event."""
    match action:
        case ClockLocked(error_s):
            text = f"mission clock locked to the bus, it was {error_s:+.3f} s off"
            return Severity.INFO, "clock.locked", text, {"error_s": error_s}
        case ClockStepped(error_s):
            text = f"mission clock stepped by {error_s:+.3f} s: a second sample of the bus confirmed it"
            return Severity.MEDIUM, "clock.stepped", text, {"error_s": error_s}
        case StepHeld(error_s, rate):
            text = (
                f"a time of the bus is {error_s:+.3f} s off at rate {rate:g}: deadlines and schedule wait "
                f"for a second sample, at most {HOLD_S:g} s"
            )
            return Severity.MEDIUM, "clock.step_held", text, {"error_s": error_s, "rate": rate}
        case StepRejected(error_s, agreed):
            why = "the bus agrees with it again" if agreed else "no two times of the bus agree"
            text = f"mission clock goes on without a step of {error_s:+.3f} s: {why}"
            return Severity.MEDIUM, "clock.step_rejected", text, {"error_s": error_s, "agreed": agreed}
        case ClockLost(silent_s):
            text = f"no usable time from the bus for {silent_s:.1f} s: the mission clock runs free"
            return Severity.LOW, "clock.free_running", text, {"silent_s": silent_s}
