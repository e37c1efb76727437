"""A random walk over a board of patients, some well and some not. `walk` may be run at any length."""

from __future__ import annotations

import random

from fdir.health import (
    Arm,
    Disarm,
    ForPatient,
    HealthBoard,
    PingFatal,
    PingLate,
    PingLimits,
    PingRecovered,
    Pong,
    SendPing,
    SetEnabled,
    SetLimits,
    Tick,
)

NAMES = ("jobs", "link", "power")
LIMITS = (PingLimits(0.1, 0.2, 0.5, 0.1), PingLimits(0.5, 1.0, 2.5, 0.5), PingLimits(0.2, 0.2, 0.3, 0.2))


class _Mirror:
    """What is known of one patient from outside."""

    def __init__(self) -> None:
        self.enabled = True
        self.armed: bool | None = None
        self.lost = self.late = False
        self.unanswered: list[int] = []
        self.last_key = 0

    @property
    def counts_as_out(self) -> bool:
        return self.enabled and self.armed is not False and (self.armed is None or self.lost or self.late)

    def take(self, action: object, limits: PingLimits, wrong_key: bool) -> None:
        """Check one action on this patient, and take note of it."""
        assert self.enabled, "a patient left out is acted on"
        assert self.armed, "a patient that is not armed is acted on"
        match action:
            case SendPing(key):
                assert not self.lost, "a lost patient is pinged"
                assert key > self.last_key, "a key is used twice"
                self.last_key = key
                # It answers late rather than never, but has not more under way than a queue holds.
                self.unanswered = [*self.unanswered, key][-12:]
            case PingLate(_, silent_s):
                assert limits.warn_s <= silent_s < limits.fatal_s
                assert not self.late, "late twice for one ping"
                self.late = True
            case PingRecovered():
                assert self.late
                self.late = False
            case PingFatal(_, silent_s):
                # The keys sent are all answered once and in order: only a made-up key is wrong.
                assert wrong_key or silent_s >= limits.fatal_s, "lost without a cause"
                assert not self.lost, "lost twice without being armed"
                self.lost, self.late = True, False
            case other:
                raise AssertionError(f"{other} is no action")


def walk(steps: int, seed: int) -> None:
    """Take `steps` random events; raise AssertionError when what must hold does not."""
    rng = random.Random(seed)
    board = HealthBoard({name: LIMITS[i] for i, name in enumerate(NAMES)})
    mirrors = {name: _Mirror() for name in NAMES}
    now_s = 0.0
    for _ in range(steps):
        now_s += rng.choice((0.0, 0.01, 0.05, 0.1, 0.1, 0.3, 50.0))
        name = rng.choice(NAMES)
        mirror = mirrors[name]
        wrong_key = False
        event: ForPatient | Tick | SetEnabled | SetLimits = Tick()
        match rng.random():
            case x if x < 0.55:
                pass
            case x if x < 0.85 and mirror.unanswered:
                # Answers come in order, most at once, some late, all at last, or never.
                event = ForPatient(name, Pong(mirror.unanswered.pop(0)))
            case x if x < 0.86:
                event = ForPatient(name, Pong(-rng.randrange(1, 9)))
                wrong_key = True
            case x if x < 0.91:
                event = ForPatient(name, Arm())
                mirror.armed, mirror.lost, mirror.late = True, False, False
            case x if x < 0.93:
                event = ForPatient(name, Disarm())
                mirror.armed, mirror.lost, mirror.late = False, False, False
            case x if x < 0.97:
                event = SetEnabled(name, rng.random() < 0.7)
                if event.enabled != mirror.enabled:
                    mirror.enabled, mirror.lost, mirror.late = event.enabled, False, False
            case _:
                event = SetLimits(name, rng.choice(LIMITS))
        for action in board.handle(event, now_s):
            assert isinstance(event, Tick) or action.name == name, "an event of one patient acts on another"
            mirrors[action.name].take(action.what, board.limits(action.name), wrong_key)
        expected = tuple(n for n in NAMES if mirrors[n].counts_as_out)
        assert board.out_of_limits == expected
        assert board.in_limits == (not expected)
