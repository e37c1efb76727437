"""A random walk over boots, with the node's real state on its way from one to the next.

Boots end in every way there is; slots break and are mended; copies of stored values are struck.
`walk` may be run at any length.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Mapping

from fdir.boot import SLOTS, BootDecision, BootFacts, BootLimits, BootMode, Slot, SlotState, decide
from node import state as store

LIMITS = BootLimits(other_slot_after=2, safe_after=4)


def facts_of(
    found: store.BootState, slots: Mapping[Slot, SlotState], active: Slot, *, may_enter_safe: bool
) -> BootFacts:
    return BootFacts(
        boot=found.boot,
        clean_shutdown=found.clean_shutdown,
        restart_requested=bool(found.restart_requested),
        safe=found.safe,
        unintended=found.unintended,
        last_slot=found.slot,
        failed_starts=found.failed_starts,
        slots=slots,
        active=active,
        last_active=found.active,
        may_enter_safe=may_enter_safe,
        lost=found.lost,
    )


def strike(connection: sqlite3.Connection, rng: random.Random) -> None:
    """Flip a bit in one copy of one value: a vote carries that."""
    rows = connection.execute("SELECT key, value FROM node_values").fetchall()
    key, value = rng.choice(rows)
    struck = bytearray(value)
    struck[rng.randrange(len(struck))] ^= 1 << rng.randrange(8)
    connection.execute("UPDATE node_values SET value = ? WHERE key = ?", (bytes(struck), key))


def check(found: store.BootState, decision: BootDecision, facts: BootFacts) -> None:
    if facts.slots[facts.active] is SlotState.VALID or any(
        s is SlotState.VALID for s in facts.slots.values()
    ):
        assert decision.slot is not None
        assert facts.slots[decision.slot] is SlotState.VALID, "a slot that is not whole, while one is"
    if decision.slot is None:
        assert all(s is SlotState.MISSING for s in facts.slots.values())
    if found.safe:
        assert decision.mode is BootMode.SAFE, "safe mode was left without a command"
    assert decision.entered_safe == (
        decision.unintended >= LIMITS.safe_after and facts.may_enter_safe and not found.safe
    )
    if decision.mode is BootMode.SAFE:
        assert found.safe or decision.entered_safe
    assert bool(decision.reasons) or not decision.is_unintended


def walk(steps: int, seed: int) -> dict[str, int]:
    """Take `steps` boots; raise AssertionError when what must hold does not. Returns what it saw."""
    rng = random.Random(seed)
    connection = sqlite3.connect(":memory:", isolation_level=None)
    store.create(connection)
    slots: dict[Slot, SlotState] = dict.fromkeys(SLOTS, SlotState.VALID)
    active: Slot = "a"
    last_boot, unintended, ended, safe = 0, 0, "clean", False
    seen = dict.fromkeys(("safe", "other_slot", "struck", "good", "crash", "requested", "clean"), 0)
    for _ in range(steps):
        if rng.random() < 0.1:
            slots[rng.choice(SLOTS)] = rng.choice((*SlotState, SlotState.VALID, SlotState.VALID))
        if rng.random() < 0.05:
            active = rng.choice(SLOTS)
        struck = last_boot > 0 and rng.random() < 0.2
        if struck:
            strike(connection, rng)
        found = store.begin_boot(connection)
        assert found.boot == last_boot + 1, "a boot number is used twice, or left out"
        assert found.lost == (), "one struck copy is beyond the vote"
        seen["struck"] += bool(found.repaired)
        assert not found.repaired or struck
        last_boot = found.boot
        assert found.clean_shutdown == (ended in {"clean", "first"} or last_boot == 1)
        facts = facts_of(found, slots, active, may_enter_safe=rng.random() < 0.9)
        decision = decide(facts, LIMITS)
        unintended = {"crash": unintended + 1, "requested": unintended}.get(ended, 0) if last_boot > 1 else 0
        assert decision.unintended == unintended
        check(found, decision, facts)
        assert found.safe == safe
        safe = decision.mode is BootMode.SAFE
        seen["safe"] += safe
        seen["other_slot"] += decision.slot not in {active, None}
        store.keep_decision(connection, decision)
        if rng.random() < 0.3:
            store.note_good_boot(connection)
            unintended = 0
            seen["good"] += 1
        if safe and rng.random() < 0.5:
            store.set_safe(connection, safe=False)
            store.forget_reboots(connection)
            safe, unintended = False, 0
        ended = rng.choice(("clean", "crash", "crash", "requested"))
        if ended == "clean":
            store.end_boot(connection)
        elif ended == "requested":
            store.request_restart(connection, "a reason", 1)
        seen[ended] += 1
    connection.close()
    return seen
