"""The node's modes: one explicit transition table, and what each change makes the node do.

BOOT lasts until the node knows what the last boot persisted. ECLIPSE is entered and left on the
forecast sunlit fraction, with hysteresis. SAFE is entered by FDIR or by command, survives restarts,
and is left by command only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fdir.voting import Triplicate
from telemetry.packets import Mode

ECLIPSE_BELOW = 0.4
"""Sunlit fraction under which the node goes to ECLIPSE (assumed: middle of penumbra, less hysteresis)."""
NOMINAL_ABOVE = 0.6
"""Sunlit fraction above which it goes back (assumed)."""
_HISTORY_LENGTH = 20


class Trigger(StrEnum):
    """What can change the mode."""

    RESTORED = "restored"
    RESTORED_SAFE = "restored_safe"
    SUN_SET = "sun_set"
    SUN_ROSE = "sun_rose"
    COMMAND_NOMINAL = "command_nominal"
    COMMAND_SAFE = "command_safe"
    FDIR_SAFE = "fdir_safe"


@dataclass(frozen=True)
class Restored:
    """Event: the persisted state is read; leave BOOT."""

    safe: bool


@dataclass(frozen=True)
class Sunlight:
    """Event: the forecast says this fraction of the solar disc is seen now, 0 to 1."""

    fraction: float


@dataclass(frozen=True)
class Command:
    """Event: the ground asks for NOMINAL or SAFE."""

    mode: Mode


@dataclass(frozen=True)
class FdirSafe:
    """Event: the recovery ladder has reached level 5."""

    reason: str


ModeEvent = Restored | Sunlight | Command | FdirSafe


@dataclass(frozen=True)
class PersistSafe:
    """Action: store whether the node is in safe mode, before anything else is done."""

    safe: bool


@dataclass(frozen=True)
class Announce:
    """Action: report the change."""

    before: Mode
    after: Mode
    trigger: Trigger
    reason: str


@dataclass(frozen=True)
class AllowInference:
    """Action: a worker may run."""

    rearm: bool
    """True on leaving SAFE: the recovery ladder begins anew."""


@dataclass(frozen=True)
class ForbidInference:
    """Action: stop the worker and start none."""


ModeAction = PersistSafe | Announce | AllowInference | ForbidInference


class InvalidTransition(Exception):
    """A pair of mode and trigger that the table does not hold; carries the latest history."""

    def __init__(self, mode: Mode, trigger: Trigger, history: list[str]) -> None:
        super().__init__(f"no transition from {mode} on {trigger}; history: {'; '.join(history) or 'none'}")
        self.mode = mode
        self.trigger = trigger
        self.history = history


_SUNLIT_MODE = "sunlit_mode"
"""Target that stands for NOMINAL or ECLIPSE, whichever the sun says now."""

TRANSITIONS: dict[tuple[Mode, Trigger], Mode | str] = {
    (Mode.BOOT, Trigger.RESTORED): _SUNLIT_MODE,
    (Mode.BOOT, Trigger.RESTORED_SAFE): Mode.SAFE,
    (Mode.BOOT, Trigger.FDIR_SAFE): Mode.SAFE,
    (Mode.NOMINAL, Trigger.SUN_SET): Mode.ECLIPSE,
    (Mode.NOMINAL, Trigger.COMMAND_NOMINAL): Mode.NOMINAL,
    (Mode.NOMINAL, Trigger.COMMAND_SAFE): Mode.SAFE,
    (Mode.NOMINAL, Trigger.FDIR_SAFE): Mode.SAFE,
    (Mode.ECLIPSE, Trigger.SUN_ROSE): Mode.NOMINAL,
    (Mode.ECLIPSE, Trigger.COMMAND_NOMINAL): Mode.ECLIPSE,
    (Mode.ECLIPSE, Trigger.COMMAND_SAFE): Mode.SAFE,
    (Mode.ECLIPSE, Trigger.FDIR_SAFE): Mode.SAFE,
    (Mode.SAFE, Trigger.COMMAND_NOMINAL): _SUNLIT_MODE,
    (Mode.SAFE, Trigger.COMMAND_SAFE): Mode.SAFE,
    (Mode.SAFE, Trigger.FDIR_SAFE): Mode.SAFE,
}
"""(mode, trigger) -> next mode. A pair that is not here is illegal."""


class ModeMachine:
    """Hold the mode and decide its changes."""

    def __init__(self) -> None:
        self._mode = Triplicate("mode", Mode.BOOT, Mode)
        self.history: list[str] = []
        self._dark = False

    @property
    def mode(self) -> Mode:
        """The mode, voted over three copies."""
        return self._mode.get()

    @property
    def repairs(self) -> int:
        """Struck copies of the mode that were written anew."""
        return self._mode.repairs

    def copies(self) -> tuple[bytearray, ...]:
        """Return the copies of the mode, for a test that strikes them."""
        return self._mode.buffers()

    def handle(self, event: ModeEvent, now_ns: int) -> list[ModeAction]:
        """Take one event at mission time `now_ns`; return what to do, in order.

        Raises
        ------
        InvalidTransition
            The table holds no transition for this mode and event: a defect of the caller.
        ValueError
            A commanded mode other than NOMINAL or SAFE, or a sunlit fraction outside 0 to 1.
        """
        match event:
            case Restored(safe):
                trigger = Trigger.RESTORED_SAFE if safe else Trigger.RESTORED
                return self._transit(trigger, "start of the node", now_ns)
            case Sunlight(fraction):
                return self._sunlight(fraction, now_ns)
            case Command(mode):
                if mode not in (Mode.NOMINAL, Mode.SAFE):
                    raise ValueError(f"mode {mode} cannot be commanded; nominal and safe can")
                trigger = Trigger.COMMAND_SAFE if mode is Mode.SAFE else Trigger.COMMAND_NOMINAL
                return self._transit(trigger, "command", now_ns)
            case FdirSafe(reason):
                return self._transit(Trigger.FDIR_SAFE, reason, now_ns)

    def _sunlight(self, fraction: float, now_ns: int) -> list[ModeAction]:
        if not 0 <= fraction <= 1:
            raise ValueError(f"sunlit fraction {fraction}, 0 to 1 is allowed")
        was_dark = self._dark
        self._dark = fraction < NOMINAL_ABOVE if was_dark else fraction < ECLIPSE_BELOW
        if self._dark is was_dark or self.mode not in (Mode.NOMINAL, Mode.ECLIPSE):
            return []
        trigger = Trigger.SUN_SET if self._dark else Trigger.SUN_ROSE
        return self._transit(trigger, f"sunlit fraction {fraction:.2f}", now_ns)

    def _transit(self, trigger: Trigger, reason: str, now_ns: int) -> list[ModeAction]:
        before = self.mode
        target = TRANSITIONS.get((before, trigger))
        if target is None:
            raise InvalidTransition(before, trigger, list(self.history))
        sunlit_mode = Mode.ECLIPSE if self._dark else Mode.NOMINAL
        after = sunlit_mode if target == _SUNLIT_MODE else Mode(target)
        if after is before:
            return []
        self._mode.set(after)
        self.history = [*self.history[1 - _HISTORY_LENGTH :], f"{now_ns} {before}->{after} on {trigger}"]
        actions: list[ModeAction] = []
        if after is Mode.SAFE:
            actions += [PersistSafe(True), ForbidInference()]
        elif before is Mode.SAFE:
            actions += [PersistSafe(False), AllowInference(rearm=True)]
        elif before is Mode.BOOT:
            actions.append(AllowInference(rearm=False))
        actions.append(Announce(before, after, trigger, reason))
        return actions
