"""Feeds the live view: from what came down, from the node's own disk between contacts, from the bench.

Between contacts the ground knows nothing new. The bench does: it reads the newest housekeeping and results
from the spool on the node's disk, which costs the node nothing and changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from hil.accounts import newer_packets, newest_packet
from hil.faults import Strike
from hil.live import LiveState, clock
from hil.spacecraft import FlightClock
from telemetry.frame import Frame
from telemetry.packets import Event, FdirReport, Housekeeping, Packet, PowerPlan, Result, Severity

NS_PER_S = 1_000_000_000
RUNNING = "running"
"""State of a worker that has proven its memory and computes."""
PERIOD_S = 0.5
"""Interval of looking at the node's disk, s."""
HOLD_S = 3.0
"""Time the text of a job stays shown after its last block, while other jobs go on, s: a few blocks."""
RATE_OVER_S = 4.0
"""Time over which the shown rate is taken, s: a few blocks of tokens."""


class LiveFeed:
    """Keeps a `LiveState` up to date.

    Parameters
    ----------
    state
        What the view shows.
    clock
        Mission time.
    database
        The node's `node.db`; it need not exist yet.
    """

    def __init__(self, state: LiveState, clock: FlightClock, database: Path) -> None:
        self._state = state
        self._clock = clock
        self._database = database
        self.computing: tuple[int, int] | None = None
        """(boot, worker generation) of the worker that computes; None while none does, as far as is known."""
        self._newest_ns = 0
        self._planned_ns = 0
        self._detected = _Sum()
        self._repaired = _Sum()
        self._texts: dict[str, dict[int, Result]] = {}
        """Blocks of each job by their first token."""
        self._shown_until_s = 0.0
        """Until when the job whose text is shown keeps the screen, CLOCK_MONOTONIC, s."""
        self._read_upto = (0, -1)
        """(boot, sequence number) of the newest result read from the disk."""
        self._strikes: dict[tuple[str, int, str], int] = {}
        """When each (target, page, job of a KV row) was struck last, CLOCK_REALTIME, ns."""
        self._counts: deque[tuple[float, int]] = deque()

    async def run(self, archived: Callable[[], int]) -> None:
        """Look at clock, disk and ground until cancelled. `archived` counts the records on the ground."""
        while True:
            self._state.t_s = max(0.0, self._clock.elapsed_s)
            self._state.archived = archived()
            found = await asyncio.to_thread(newest_packet, self._database, Housekeeping)
            if found is not None:
                self.on_packet(*found)
            planned = await asyncio.to_thread(newest_packet, self._database, PowerPlan)
            if planned is not None:
                self.on_packet(*planned)
            results = await asyncio.to_thread(newer_packets, self._database, Result, self._read_upto)
            for frame, result in results:
                self._read_upto = (frame.boot, frame.seq)
                self._on_result(result)
            if self._clock.start_host_ns is not None:
                self._rate(time.monotonic())
            await asyncio.sleep(PERIOD_S)

    def _rate(self, now_s: float) -> None:
        """Tokens come a block at a time: the rate shown is a mean over some blocks."""
        self._counts.append((now_s, self._state.tokens_released))
        while len(self._counts) > 2 and now_s - self._counts[0][0] > RATE_OVER_S:
            self._counts.popleft()
        since_s, tokens = self._counts[0]
        if now_s > since_s:
            rate = max(0.0, (self._state.tokens_released - tokens) / (now_s - since_s))
            self._state.token_rate_hz = rate
            self._state.rates.append(rate)

    def on_packet(self, frame: Frame, packet: Packet) -> None:
        """Take a packet that came down."""
        match packet:
            case Housekeeping():
                self._on_housekeeping(frame, packet)
            case Result():
                self._on_result(packet)
            case PowerPlan() if frame.t_ns >= self._planned_ns:
                self._planned_ns = frame.t_ns
                self._state.plan = plan_text(packet, self._clock.start_ns)
            case Event() if packet.severity >= Severity.LOW:
                self._state.note(f"node: {packet.text}", int(packet.severity))
            case FdirReport() if packet.page is not None:
                self._on_answer(packet)

    def on_strike(self, strike: Strike) -> None:
        """Take a flip that landed."""
        self._state.flips_injected += 1
        self._strikes[strike.target.value, strike.page, strike.job] = strike.t_ns
        self._state.last_strike = f"last in {strike.role}, page {strike.page}"

    def _on_housekeeping(self, frame: Frame, packet: Housekeeping) -> None:
        if frame.t_ns < self._newest_ns or not packet.clock_locked:
            return  # from before a contact: the disk has told more since; or stamped by no mission clock
        self._newest_ns = frame.t_ns
        running = packet.worker_state == RUNNING
        self.computing = (frame.boot, packet.worker_generation) if running else None
        state = self._state
        if state.mode and packet.mode != state.mode:
            state.note(f"mode {state.mode} to {packet.mode.value}", 2)
        state.mode = packet.mode.value
        state.ceiling_w, state.duty = packet.ceiling_w, packet.duty
        state.tokens_released = packet.tokens_released
        state.jobs_done, state.jobs_queued = packet.jobs_done, packet.jobs_queued
        state.jobs_active = packet.jobs_active
        state.backlog = packet.spool_records
        state.worker, state.restarts = packet.worker_state, packet.worker_restarts
        state.flips_detected = self._detected.add(packet.strikes_detected)
        state.flips_repaired = self._repaired.add(packet.strikes_repaired)

    def _on_result(self, packet: Result) -> None:
        """Show the text of one job; the blocks of several come in turn, and each is to be readable."""
        blocks = self._texts.setdefault(packet.job, {})
        blocks[packet.first] = packet
        now_s = time.monotonic()
        if packet.job != self._state.job and now_s < self._shown_until_s:
            return
        self._state.job = packet.job
        self._state.text = _end_of_text(blocks).decode(errors="replace")
        self._shown_until_s = now_s + (HOLD_S if packet.finish is None else 0.0)

    def _on_answer(self, packet: FdirReport) -> None:
        job = str(packet.evidence.get("job", ""))
        struck_ns = self._strikes.get((packet.region, packet.page or 0, job))
        if struck_ns is not None and packet.recovered_ns is not None and packet.recovered_ns >= struck_ns:
            took_ms = (packet.recovered_ns - struck_ns) / 1e6
            self._state.last_strike = f"{packet.role} page {packet.page}: {took_ms:.0f} ms"


def _end_of_text(blocks: dict[int, Result]) -> bytes:
    """Return the text of the last blocks that follow on each other: nothing is joined over a gap."""
    text = b""
    begins: int | None = None
    for first in sorted(blocks, reverse=True):
        if begins is not None and first + len(blocks[first].tokens) != begins:
            break
        text, begins = blocks[first].text + text, first
    return text


class _Sum:
    """A count that begins at 0 again with every boot, carried on."""

    def __init__(self) -> None:
        self._before = 0
        self._last = 0

    def add(self, count: int) -> int:
        if count < self._last:
            self._before += self._last
        self._last = count
        return self._before + count


def plan_text(plan: PowerPlan, start_ns: int) -> str:
    """Return who decides the watts and what binds, for people."""
    if plan.reason == "plan":
        because = _BINDING.get(plan.binding, plan.binding)
    else:
        because = _REASON.get(plan.reason, plan.reason)
    at = ""
    if plan.reason == "plan" and plan.binds_at_ns is not None and plan.binding not in {"board", "cap"}:
        at = f" at {clock((plan.binds_at_ns - start_ns) / NS_PER_S)}"
    clear = ""
    if plan.backlog_tokens and plan.source == "planner":
        done = plan.backlog_clear_ns
        when = "beyond the horizon" if done is None else f"done {clock((done - start_ns) / NS_PER_S)}"
        clear = f"   backlog {plan.backlog_tokens} tokens, {when}"
    shed = f"   shed below priority {plan.least_priority}" if plan.least_priority else ""
    return f"{plan.source}: {because}{at}{clear}{shed}"


_BINDING = {
    "board": "all the board can draw",
    "cap": "the commanded cap",
    "demand": "all jobs are served",
    "battery_floor": "the battery's floor",
    "next_eclipse": "charge for the next eclipse",
    "thermal": "the die's temperature",
    "worth": "worth more later",
    "none": "nothing",
}
_REASON = {
    "board": "all the board can draw",
    "array": "the array",
    "battery": "what the battery can give",
    "thermal": "the die's temperature",
    "command": "the commanded cap",
    "floor": "the battery's floor is near",
    "unknown_bus": "the bus is silent",
}
