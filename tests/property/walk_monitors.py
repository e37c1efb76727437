"""A random walk over the monitors of a table with every kind of check. `walk` may be run at any length."""

from __future__ import annotations

import random
from dataclasses import astuple

from some_rows import hot, make_row

from fdir.monitors import (
    Announce,
    Fired,
    ModeChanged,
    MonitorEvent,
    Monitors,
    PersistStates,
    Point,
    Rearm,
    Recovered,
    Reported,
    Sample,
    SetState,
    Tick,
    Transition,
    Watch,
)
from fdir.table import Action, Delta, Expected, Expr, Limit, Report, RowState, Stale, Table
from telemetry.packets import Mode

TABLE = Table(
    [
        hot("a.limit", persistence=3, clear=2, action=Action.SAFE_MODE, max_events=4, stale_after_s=5.0),
        hot("a.ground", rearm="ground", persistence=2, action=Action.RESTART_NODE),
        hot("a.delta", check=Delta(high=30.0, unit="degC", samples=2), modes=(Mode.NOMINAL, Mode.ECLIPSE)),
        make_row("a.mask", item="jobs.queued", check=Expected(value=2, mask=3), validity="worker.running"),
        make_row("a.bool", item="clock.locked", check=Expected(value=True), persistence=2),
        make_row("a.stale", item="battery.v", check=Stale(after_s=4.0), clear=2),
        make_row("a.expr", check=Expr(rows="(a.limit or a.exit) and not a.bool"), persistence=2),
        make_row("a.nested", check=Expr(rows="a.expr xor a.stale")),
        make_row("a.exit", action=Action.RESTART_WORKER, max_events=3),
        make_row("kv.digest", action=Action.REPAIR, max_events=5),
        make_row(
            "a.fill", item="spool.fill", check=Limit(high=0.9, low=0.0, unit="1"), state=RowState.PASSIVE
        ),
    ]
)
REPORTS = tuple(row.id for row in TABLE.rows if isinstance(row.check, Report))
VALUES: dict[str, tuple[float | int | bool | None, ...]] = {
    "board.c": (20.0, 40.0, 50.0, 51.0, 90.0, None, float("nan"), float("inf")),
    "jobs.queued": (0, 1, 2, 6, 7, None),
    "clock.locked": (True, False, None),
    "battery.v": (14.0, None),
    "worker.running": (True, False, None),
    "spool.fill": (0.0, 0.5, 0.95, None),
}


def event_of(rng: random.Random) -> MonitorEvent:  # noqa: PLR0911 - one a kind
    pick = rng.random()
    if pick < 0.55:
        item = rng.choice(tuple(VALUES))
        return Sample(item, rng.choice(VALUES[item]))
    if pick < 0.70:
        return Tick()
    if pick < 0.85:
        return Reported(rng.choice(REPORTS), {"n": rng.randrange(9)}, "found")
    if pick < 0.90:
        return Recovered(rng.choice(TABLE.ids))
    if pick < 0.93:
        return Rearm(rng.choice((None, *TABLE.ids)))
    if pick < 0.96:
        return ModeChanged(rng.choice(tuple(Mode)))
    row = rng.choice((None, None, *TABLE.ids))
    allowed = [s for s in RowState if not (row == "kv.digest" and s is RowState.PASSIVE)]
    # More often enabled than not, or little would happen.
    return SetState(row, rng.choice((RowState.ENABLED, RowState.ENABLED, *allowed)))


def walk(steps: int, seed: int) -> dict[str, int]:
    """Take `steps` random events; raise AssertionError when what must hold does not.

    Returns how often each row fired: a walk that fires nothing proves nothing.
    """
    rng = random.Random(seed)
    monitors = Monitors(TABLE, {})
    states: dict[str, RowState] = {}
    overall, now_s = RowState.ENABLED, 0.0
    announced: dict[str, list[float]] = {row: [] for row in TABLE.ids}
    fired = dict.fromkeys(TABLE.ids, 0)
    rearmed = dict.fromkeys(TABLE.ids, True)
    before = {row: monitors.status(row) for row in TABLE.ids}
    for _ in range(steps):
        now_s += rng.choice((0.0, 0.1, 0.5, 1.0, 1.0, 6.0, 400.0))
        event = event_of(rng)
        actions = monitors.handle(event, now_s)
        if isinstance(event, SetState):
            if event.row is None:
                overall = event.state
            else:
                states[event.row] = event.state
            assert actions[0] == PersistStates(states, overall), "states are persisted first, and whole"
        match event:
            case Rearm(None):
                rearmed = dict.fromkeys(TABLE.ids, True)
            case Rearm(str() as row):
                rearmed[row] = True
            case Recovered(row) if TABLE.row(row).rearm == "auto":
                rearmed[row] = True
            case _:
                pass
        for action in actions:
            check_action(action, event, monitors, rearmed, now_s, announced)
            if isinstance(action, Fired):
                fired[action.row.id] += 1
                rearmed[action.row.id] = action.row.is_momentary
        for row in TABLE.rows:
            before[row.id] = check_row(row.id, monitors, before[row.id], rearmed)
            want = min(states.get(row.id, row.state), overall, key=list(reversed(RowState)).index)
            assert monitors.effective(row.id) is want
    return fired


def check_action(  # noqa: PLR0917
    action: object,
    event: MonitorEvent,
    monitors: Monitors,
    rearmed: dict[str, bool],
    now_s: float,
    announced: dict[str, list[float]],
) -> None:
    match action:
        case Fired(row):
            assert monitors.effective(row.id) is RowState.ENABLED, "a row that is not enabled fires"
            assert rearmed[row.id], "a row fires again before it is re-armed"
            assert not row.modes or monitors.mode in row.modes
            status = monitors.status(row.id)
            assert status.counts.consecutive >= row.persistence
            assert status.point is Point.FAIL
            if isinstance(event, Sample):
                assert row.item in {event.item, ""}
        case Announce(row, what):
            if row is None or what in {Transition.STATE, Transition.REARMED, Transition.CLEARED}:
                return
            assert monitors.effective(row.id) is not RowState.DISABLED, "a disabled row is heard"
            times = announced[row.id]
            times[:] = [t for t in times if now_s - t < 3600.0] + [now_s]
            assert len(times) <= row.max_events, "more events than allowed"
        case PersistStates():
            assert isinstance(event, SetState)
        case other:
            raise AssertionError(f"{other} is no action")


def check_row(row_id: str, monitors: Monitors, before: object, rearmed: dict[str, bool]) -> object:
    row, status = TABLE.row(row_id), monitors.status(row_id)
    old = astuple(before.counts)  # type: ignore[attr-defined]
    new = astuple(status.counts)
    for number, (was, now) in enumerate(zip(old, new, strict=True)):
        assert number == 1 or now >= was, "a counter went back"
    counts = status.counts
    assert counts.consecutive <= counts.cumulative <= counts.evaluations
    assert counts.actions <= counts.cumulative
    known = status.watch in {Watch.TRUE, Watch.FALSE}
    assert (status.point in {Point.PASS, Point.FAIL}) == known
    if monitors.effective(row_id) is RowState.DISABLED or (row.modes and monitors.mode not in row.modes):
        assert status.watch is Watch.UNCHECKED
    if status.watch is Watch.TRUE and counts.consecutive >= row.persistence:
        assert status.point is Point.FAIL
    if not status.fired:
        # Only good results, recovery or a command arm a row: so it may fire again.
        rearmed[row_id] = True
    elif row.is_momentary:
        raise AssertionError("a momentary row waits to be re-armed")
    return status
