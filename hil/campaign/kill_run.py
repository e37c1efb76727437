"""`penumbra campaign run kills`: SIGKILL and SIGSTOP of worker and node, at random moments of decoding."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal, TypeAlias

import msgspec

from hil.campaign.live_node import LiveNode, LiveSettings, live_campaign
from telemetry.packets import Outcome

Target: TypeAlias = Literal["worker", "node"]
Kind: TypeAlias = Literal["kill", "stop"]
KINDS: Final[tuple[tuple[Target, Kind], ...]] = (
    ("worker", "kill"), ("worker", "stop"), ("node", "kill"), ("node", "stop"),
)  # fmt: skip
BACK_S: Final = 60.0
"""Longest wait for the service to be back, s; then the campaign has failed."""
REST_S: Final = (0.2, 1.2)
"""Shortest and longest time of sound service before a trial, s."""
_SIGNALS: Final = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class KillRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One process fault and what followed."""

    index: int
    target: Target
    kind: Kind
    t_ns: int
    back: bool
    """A token made after it came down."""
    detect_ms: float | None = None
    """Fault to its detection by the node, ms; None for faults of the node itself."""
    token_ms: float | None = None
    """Detection, for the worker, or fault, to the first token made after it, ms."""
    back_ms: float | None = None
    """Fault to the first new token in the archive, ms."""


async def run_kills(
    images: Path,
    out: Path,
    *,
    trials: int,
    seed: int,
    settings: LiveSettings | None = None,
    bytes_a_token: int = 4,
    say: Callable[[str, float], None] = lambda text, part: None,
) -> None:
    """Run `trials` faults of each kind, or the rest of them.

    Raises
    ------
    PenumbraError
        The node does not come up, or not back.
    """
    async with live_campaign(
        images, out, KillRecord, plan="kills", seed=seed, settings=settings or LiveSettings(),
        bytes_a_token=bytes_a_token, say=say,
    ) as (records, live):  # fmt: skip
        order = [index for index in range(trials * len(KINDS)) if index not in records.done]
        rng = random.Random(f"{seed} {len(records.done)}")  # noqa: S311 - moments of faults
        rng.shuffle(order)
        for number, index in enumerate(order):
            target, kind = KINDS[index % len(KINDS)]
            await asyncio.sleep(rng.uniform(*REST_S))
            record = await _strike(live, index, target, kind)
            records.add(record)
            say(f"kills: {number + 1} of {len(order)}", (number + 1) / len(order))
            if not record.back:
                raise live.failed(
                    f"no new token within {BACK_S:g} s of trial {index} ({kind} of the {target})"
                )


async def _strike(live: LiveNode, index: int, target: Target, kind: Kind) -> KillRecord:
    deadline_s = time.monotonic() + BACK_S
    while (pid := live.worker_pid() if target == "worker" else live.node_pid()) is None:
        if time.monotonic() > deadline_s:
            raise live.failed(f"there is no {target} to strike")
        await asyncio.sleep(0.05)
    t_ns = time.time_ns()
    with suppress(ProcessLookupError):
        os.kill(pid, _SIGNALS[kind])

    def report_ns() -> int | None:
        found = (
            r.detected_ns
            for _, r in live.seen.reports
            if r.detected_ns > t_ns and r.outcome is Outcome.STARTED and r.monitor.startswith("worker.")
        )
        return next(found, None)

    def over() -> bool:
        since = report_ns() if target == "worker" else t_ns
        return since is not None and live.block_since(since) is not None

    back = await live.until(over, BACK_S)
    since = report_ns() if target == "worker" else t_ns
    block = None if since is None else live.block_since(since)
    if block is None or since is None:
        return KillRecord(index=index, target=target, kind=kind, t_ns=t_ns, back=False)
    return KillRecord(
        index=index, target=target, kind=kind, t_ns=t_ns, back=back,
        detect_ms=(since - t_ns) / 1e6 if target == "worker" else None,
        token_ms=(block[0] - since) / 1e6, back_ms=(block[1] - t_ns) / 1e6,
    )  # fmt: skip
