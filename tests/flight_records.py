"""A synthetic flight: every fact set, every check passed. Tests change what they are about."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hil.faults import Fate, Strike, StrikeFate, Target
from hil.record import (
    Constant,
    FlightRecord,
    ForecastError,
    Happening,
    HousekeepingSample,
    JobFact,
    LedgerFact,
    Limits,
    OverheadFact,
    PlanSample,
    PlantSample,
    StreamAccount,
    Window,
)
from telemetry.packets import Housekeeping, Mode, PlanSegment, PowerPlan, Stream

ORBIT_S = 5560.0
NS_PER_S = 1_000_000_000
START_NS = 1_767_225_600_000_000_000
UMBRA = Window(start_s=2000.0, end_s=4100.0)


def sunlit(t_s: float) -> float:
    return 0.0 if UMBRA.start_s <= t_s <= UMBRA.end_s else 1.0


def plant_sample(t_s: float, soc: float | None = None) -> PlantSample:
    lit = sunlit(t_s)
    wave = 0.72 + 0.12 * math.sin((t_s - 400) / ORBIT_S * 2 * math.pi)
    return PlantSample(
        t_s=t_s, soc=wave if soc is None else soc, array_w=21.0 * lit, load_w=9.0 if lit else 6.0,
        platform_w=4.0, sunlit=lit, board_c=30.0 + 6 * lit,
    )  # fmt: skip


def plans() -> list[PlanSample]:
    """Two plans, and a change of the ceiling between them."""
    horizon = [
        PlanSegment(end_ns=START_NS + minute * 60 * NS_PER_S, ceiling_w=9.0, battery_soc=0.9 - minute / 1000)
        for minute in range(10, 170, 10)
    ]
    common: dict[str, Any] = {
        "duty": 0.8, "battery_soc": 0.9, "soc_floor": 0.7, "eclipse_entry_ns": None,
        "eclipse_exit_ns": None,
    }  # fmt: skip
    planned = {**common, "source": "planner", "reason": "plan", "binding": "battery_floor"}
    at_ns = START_NS + 70 * 60 * NS_PER_S
    return [
        PlanSample(t_s=2.0, packet=PowerPlan(ceiling_w=9.0, binds_at_ns=at_ns, horizon=horizon, **planned)),
        PlanSample(t_s=500.0, packet=PowerPlan(ceiling_w=5.0, reason="command", **common)),
        PlanSample(t_s=900.0, packet=PowerPlan(ceiling_w=8.0, note="HiGHS: time", reason="array", **common)),
    ]


def housekeeping(t_s: float, tokens: int, records: int) -> HousekeepingSample:
    lit = sunlit(t_s)
    packet = Housekeeping(
        mode=Mode.NOMINAL if lit else Mode.ECLIPSE, uptime_s=t_s / 60, clock_locked=True, sunlit=lit,
        eclipse_entry_ns=None, eclipse_exit_ns=None, battery_soc=0.8, array_w=21.0 * lit,
        load_w=9.0 if lit else 6.0, ceiling_w=9.5 if lit else 6.4, duty=0.9 if lit else 0.5, board_c=31.0,
        worker_state="running", worker_generation=1, worker_restarts=0, tokens_released=tokens,
        tokens_discarded=64, token_rate_hz=55.0 * (0.9 if lit else 0.5), epochs_clean=100, epochs_dirty=2,
        strikes_detected=0, strikes_repaired=0, scan_ms=14.0, jobs_queued=3, jobs_done=2,
        spool_records=records, spool_bytes=records * 300, link_up=records < 20,
        commands_accepted=9, commands_rejected=0, garbage_messages=0,
    )  # fmt: skip
    return HousekeepingSample(t_s=t_s, packet=packet)


def strike(index: int, t_s: float = 600.0, target: Target = Target.WEIGHTS) -> Strike:
    role = (
        ("head", "ffn_gate_up", "ffn_down", "attn_qkv")[index % 4]
        if target is Target.WEIGHTS
        else "kv"[index % 2]
    )
    return Strike(
        index=index, target=target, pid=77, t_ns=START_NS + int(t_s / 60 * 1e9), address=4096 * index,
        page=1000 + index, role=role, tensor=f"tensor {index}", byte=12, bit=index % 8, before=0,
        after=1 << index % 8, job="" if target is Target.WEIGHTS else "job-001",
    )  # fmt: skip


def fate(index: int, t_s: float = 600.0, target: Target = Target.WEIGHTS, **changes: object) -> StrikeFate:
    fields: dict[str, object] = {
        "fate": Fate.REPAIRED, "reason": f"{target.value}.digest", "detect_ms": 200.0 + 9 * index,
        "repair_ms": 203.0 + 9 * index, "commits_before_detection": index % 2,
    } | changes  # fmt: skip
    return StrikeFate(strike=strike(index, t_s, target), **fields)  # type: ignore[arg-type]


def fates(count: int = 40) -> list[StrikeFate]:
    rng = np.random.default_rng(8)
    times = np.sort(rng.uniform(200.0, ORBIT_S - 200.0, count))
    return [
        fate(
            i,
            float(t),
            Target.KV if i % 3 == 0 else Target.WEIGHTS,
            detect_ms=float(d),
            repair_ms=float(d) + 2.5,
        )
        for i, (t, d) in enumerate(zip(times, rng.gamma(3.0, 110.0, count), strict=True))
    ]


def job(name: str = "job-001", tokens: int = 96, **changes: object) -> JobFact:
    ids = list(range(100, 100 + tokens))
    text = b" word" * tokens
    fields: dict[str, object] = {
        "job": name, "prompt": "The capital of France is", "max_tokens": 96, "tokens": ids, "text": text,
        "proven": tokens, "finish": "length", "reference": ids, "reference_text": text,
    } | changes  # fmt: skip
    return JobFact(**fields)  # type: ignore[arg-type]


def ledger(**changes: object) -> LedgerFact:
    streams = [
        StreamAccount(boot=1, stream=s, generated=100, acked=90, stored=8, dropped=2, archived=90)
        for s in (Stream.HOUSEKEEPING, Stream.EVENT, Stream.RESULT, Stream.FDIR)
    ]
    fields: dict[str, object] = {
        "generated": 400, "acked": 360, "stored": 32, "dropped": 8, "lost": 0, "duplicated": 0,
        "consistent": True, "problems": [], "streams": streams, "drop_reasons": {"full": 8},
    } | changes  # fmt: skip
    return LedgerFact(**fields)  # type: ignore[arg-type]


def record(**changes: object) -> FlightRecord:
    times = [float(t) for t in np.arange(0.0, ORBIT_S, 12.0)]
    hk = []
    for n, t in enumerate(times):
        in_contact = 100 <= t <= 700 or 4600 <= t <= 5200
        hk.append(housekeeping(t, 12 * n, 6 if in_contact else int((t - 700) % 3900 / 9) + 20))
    fields: dict[str, object] = {
        "scenario": "default", "description": "One revolution of an ISS-like orbit.", "seed": 7,
        "speed": 60.0, "start_ns": START_NS, "start_host_ns": START_NS, "wall_s": 92.7, "planned_s": ORBIT_S,
        "flown_s": ORBIT_S, "orbit_s": ORBIT_S, "eclipse_s": 2100.0, "interrupted": False,
        "limits": Limits(
            soc_floor=0.55, floor_violation_s=0.0, eclipse_forecast_error_s=5.0, min_flips=30, min_contacts=1
        ),
        "plant": [plant_sample(t) for t in times], "housekeeping": hk, "plans": plans(), "umbrae": [UMBRA],
        "contacts": [
            Window(start_s=100.0, end_s=700.0, name="Svalbard"),
            Window(start_s=4600.0, end_s=5200.0, name="Troll"),
        ],
        "fates": fates(), "flips_not_injected": 0, "process_faults": [], "worker_restarts": 0,
        "node_restarts": 0, "stopped_how": "exit code 0", "orphans_killed": 0,
        "forecast": [ForecastError(t_s=10.0, entry_s=2000.0, error_s=-1.4)],
        "jobs": [job(), job("job-002", 40, finish=None)], "tokens_discarded": 64, "ledger": ledger(),
        "ground_garbage": 0,
        "overhead": OverheadFact(median_pct=3.4, min_pct=2.1, max_pct=5.0, pairs=5, tokens=96),
        "happenings": [
            Happening(t_s=0.0, source="bench", name="node.started", text="node started, pid 1234"),
            Happening(t_s=100.0, source="ground", name="contact.begin", text="contact with Svalbard begins"),
            Happening(t_s=2000.0, source="node", name="mode.changed", text="nominal to eclipse", severity=2),
        ],
        "constants": [
            Constant(name="array area", value="0.06 m2", tag="assumed"),
            Constant(name="board idle draw", value="4 W", tag="estimated"),
        ],
        "acceleration": 1.2e6, "manifest": {"image": "0123456789abcdef", "git": "abc1234", "cpu": "AMD EPYC"},
    } | changes  # fmt: skip
    return FlightRecord(**fields)  # type: ignore[arg-type]
