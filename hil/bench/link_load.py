"""What a node generates in an outage, for `penumbra bench link`: as in the default flight, and a dump."""

from __future__ import annotations

import random
from typing import Final

from telemetry.packets import (
    Certificate,
    Event,
    Housekeeping,
    Ledger,
    Mode,
    Packet,
    PowerPlan,
    ProductChunk,
    Result,
    Severity,
    Stage,
    Stream,
    StreamLedger,
    Verification,
)

NODE: Final = "penumbra-1"
T0_NS: Final = 1_767_225_600_000_000_000
NS: Final = 1_000_000_000
DUMP_BYTES: Final = 8 << 20
"""Size of a memory dump that waits in the backlog: random bytes, so that no compression helps it."""
CHUNK_BYTES: Final = 32 << 10

EVENT: Final = Event(
    severity=Severity.INFO,
    name="worker.restarted",
    text="worker 3 was started again after a fault of its own",
    evidence={"pid": 1234, "why": "exit"},
)


def backlog(seconds: float) -> list[tuple[Packet, int]]:
    """Return what a node generates in an outage: as in the default flight, and a memory dump."""
    chance = random.Random(1)  # noqa: S311 - contents of a bench
    dump = [
        ProductChunk(product="dump-1", index=index, data=chance.randbytes(CHUNK_BYTES))
        for index in range(DUMP_BYTES // CHUNK_BYTES)
    ]
    packets: list[tuple[Packet, int]] = [(chunk, T0_NS) for chunk in dump]
    for second in range(int(seconds)):
        t_ns = T0_NS + second * NS
        packets.append((_housekeeping(second, chance), t_ns))
        if second % 3 == 0:
            packets.append((_result(second, chance), t_ns))
        if second % 5 == 0:
            packets.append((Ledger(streams=[_account(stream, second) for stream in Stream]), t_ns))
        if second % 10 == 0:
            packets.append((EVENT, t_ns))
        if second % 60 == 0:
            packets.append((_PLAN, t_ns))
            packets.append((_VERIFICATION, t_ns))
    return packets


def _result(second: int, chance: random.Random) -> Result:
    text = " ".join(chance.choice(("orbit", "light", "shadow", "battery", "the", "of")) for _ in range(32))
    certificate = Certificate(
        image_id="0123456789abcdef", epoch=second, kv_digest=chance.randbytes(8), chain=chance.randbytes(32)
    )
    tokens = [chance.randrange(262_144) for _ in range(32)]
    return Result(job=f"job-{second}", first=0, tokens=tokens, text=text.encode(), certificate=certificate)


def _account(stream: Stream, count: int) -> StreamLedger:
    return StreamLedger(boot=1, stream=stream, generated=count, acked=0, stored=count, dropped={})


_PLAN: Final = PowerPlan(
    ceiling_w=9.0, duty=0.8, reason="plan", battery_soc=0.9, soc_floor=0.7, eclipse_entry_ns=T0_NS,
    eclipse_exit_ns=T0_NS,
)  # fmt: skip
_VERIFICATION: Final = Verification(
    key_id="ground-1", command_seq=1, name="ping", stage=Stage.COMPLETED, ok=True, code="ok"
)


def _housekeeping(second: int, chance: random.Random) -> Housekeeping:
    return Housekeeping(
        mode=Mode.NOMINAL, uptime_s=second + chance.random(), clock_locked=True, sunlit=1.0,
        eclipse_entry_ns=T0_NS + 1800 * NS, eclipse_exit_ns=T0_NS + 3900 * NS,
        battery_soc=0.8 + 0.1 * chance.random(), array_w=chance.uniform(18, 22),
        load_w=chance.uniform(7, 10), ceiling_w=10.0, duty=chance.random(), board_c=chance.uniform(30, 40),
        worker_state="ready", worker_generation=1, worker_restarts=0, tokens_released=second * 40,
        tokens_discarded=chance.randrange(100), token_rate_hz=chance.uniform(60, 90),
        epochs_clean=second, epochs_dirty=2, strikes_detected=12, strikes_repaired=12,
        scan_ms=chance.uniform(20, 30), jobs_queued=8, jobs_done=second // 10, spool_records=second * 2,
        spool_bytes=second * 900, link_up=False, commands_accepted=62, commands_rejected=0,
        garbage_messages=0, jobs_active=8, batch=8, threads=2, loop_lag_ms=chance.uniform(0, 3),
    )  # fmt: skip
