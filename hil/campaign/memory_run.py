"""`penumbra campaign run memory`: single bits anywhere in the resident memory of worker and node.

Pages are drawn uniformly from those that are in the process, whatever they hold: weights, KV rows, heap,
stacks, code of libraries. What a flip does that nobody notices stays in the process; it is replaced every
`FRESH` trials, so that latent damage does not pile up for ever.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

from hil.campaign.kill_run import Target
from hil.campaign.live_node import UP_S, LiveNode, LiveSettings, live_campaign
from hil.memory import NotThere, ProcessMemory
from node.inference.arena_layout import SHARED_MEMORY
from telemetry.fdir_merge import counted
from telemetry.packets import FdirReport, Outcome

FRESH: Final = 25
"""Trials after which the struck process is replaced."""
SOUND_NS: Final = 600_000_000
"""Time after a flip from which a new token counts as service that goes on, ns: beyond the next proof."""
BACK_S: Final = 45.0
"""Longest wait for service; then the node is killed from outside, and the trial told as lost service."""
TRIES: Final = 50
NODE_FIRST: Final = 1_000_000
PAGE: Final = 4096
_PRESENT: Final = 1 << 63


SHARED: Final = str(SHARED_MEMORY)
ROWS: Final = {
    "weights": {"weights.digest"},
    "arena": {"kv.digest"},
    "code": {"memory.segments"},
    "file": {"memory.segments"},
}
"""Rows of the FDIR table that a repair of a region is reported under; of others: any not named here."""


class MemoryOutcome(StrEnum):
    """What became of a flip."""

    MASKED = "masked"
    """Nothing was noticed, and nothing was wrong."""
    REPAIRED = "repaired"
    """Found and mended in place."""
    REDONE = "redone"
    """An epoch was decoded again."""
    WORKER_RESTARTED = "worker_restarted"
    NODE_RESTARTED = "node_restarted"
    WRONG_OUTPUT = "wrong_output"
    """A token came down that the undisturbed model does not say."""
    NO_SERVICE = "no_service"
    """No new token in time, and no recovery by itself: the node was killed from outside."""


class MemoryRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One flip and its outcome."""

    index: int
    target: Target
    outcome: MemoryOutcome
    region: str
    """`weights`, `arena`, `code`, `heap`, `stack`, `file` or `anonymous`."""
    page: int
    """Of the process's address space."""
    byte: int
    bit: int
    t_ns: int
    monitors: str = ""
    """Rows of the FDIR table that reported."""
    others: int = 0
    """Repairs of other regions meanwhile: of flips before, which the scrub came to later."""
    back_ms: float | None = None
    """Flip to the first new token after it that came down, when something was restarted, ms."""


@dataclass(frozen=True)
class ResidentPage:
    """A page of a process that is in memory."""

    address: int
    region: str


def draw_page(pid: int, rng: random.Random) -> ResidentPage:
    """Return one of the resident pages of a process, each as likely.

    Raises
    ------
    NotThere
        The process is gone.
    """
    spans: list[tuple[int, list[int], str]] = []
    total = 0
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
            for line in maps:
                fields = line.split(maxsplit=5)
                path = fields[5] if len(fields) > 5 else ""
                if path.startswith("[v") or (fields[1].endswith("s") and not path.startswith(SHARED)):
                    continue  # the kernel's; and shared files, which a write would change on the disk
                start, end = (int(part, 16) for part in fields[0].split("-"))
                data = os.pread(file.fileno(), (end - start) // PAGE * 8, start // PAGE * 8)
                entries = array("Q", data[: len(data) // 8 * 8])
                present = [number for number, entry in enumerate(entries) if entry & _PRESENT]
                if present:
                    spans.append((start, present, _region(path, fields[1])))
                    total += len(present)
    except (OSError, ValueError):
        raise NotThere(f"process {pid} is gone") from None
    if not total:
        raise NotThere(f"process {pid} has no memory")
    at = rng.randrange(total)
    for start, present, region in spans:
        if at < len(present):
            return ResidentPage(start + present[at] * PAGE, region)
        at -= len(present)
    raise AssertionError("unreachable")


def _region(path: str, permissions: str) -> str:
    if path.endswith("weights.bin"):
        return "weights"
    if path.startswith(SHARED):
        return "arena"
    if path == "[heap]":
        return "heap"
    if path.startswith("[stack"):
        return "stack"
    if not path or path.startswith("["):
        return "anonymous"
    return "code" if "x" in permissions or re.search(r"\.so(\.|$)", path) else "file"


async def run_memory(
    images: Path,
    out: Path,
    *,
    worker_trials: int,
    node_trials: int,
    seed: int,
    settings: LiveSettings | None = None,
    bytes_a_token: int = 4,
    say: Callable[[str, float], None] = lambda text, part: None,
) -> None:
    """Flip bits in worker and node, or the rest of them.

    Raises
    ------
    PenumbraError
        The node does not come up.
    """
    async with live_campaign(
        images, out, MemoryRecord, plan="memory", seed=seed, settings=settings or LiveSettings(),
        bytes_a_token=bytes_a_token, say=say,
    ) as (records, live):  # fmt: skip
        # Numbers of the node's trials begin after all that the worker may ever have.
        order = [*range(worker_trials), *range(NODE_FIRST, NODE_FIRST + node_trials)]
        order = [index for index in order if index not in records.done]
        rng = random.Random(f"{seed} {len(records.done)}")  # noqa: S311 - faults
        for number, index in enumerate(order):
            target: Target = "worker" if index < NODE_FIRST else "node"
            record = await _trial(live, index, target, rng)
            records.add(record)
            if record.outcome is MemoryOutcome.NO_SERVICE or number % FRESH == FRESH - 1:
                await _replace(live, "node" if record.outcome is MemoryOutcome.NO_SERVICE else target)
            say(f"memory: {number + 1} of {len(order)}", (number + 1) / len(order))


async def _trial(live: LiveNode, index: int, target: Target, rng: random.Random) -> MemoryRecord:
    for _ in range(TRIES):
        pid = live.worker_pid() if target == "worker" else live.node_pid()
        if pid is not None:
            with suppress(NotThere):
                page = await asyncio.to_thread(draw_page, pid, rng)
                byte, bit = rng.randrange(PAGE), rng.randrange(8)
                wrong, boots = live.seen.wrong, len(live.seen.boots)
                t_ns = time.time_ns()
                with ProcessMemory(pid) as memory:
                    memory.flip(page.address + byte, bit)
                break
        await asyncio.sleep(0.2)
    else:
        raise live.failed(f"no {target} to strike")
    served = await live.until(lambda: live.block_since(t_ns + SOUND_NS) is not None, BACK_S)
    reports = [r for _, r in live.seen.reports if r.detected_ns > t_ns]
    restarted = len(live.seen.boots) > boots
    mended = [r for r in reports if r.outcome in {Outcome.REPAIRED, Outcome.REDONE} and not _is_of(r, page)]
    reports = [r for r in reports if r not in mended]
    outcome = _outcome(reports, served=served, wrong=live.seen.wrong > wrong, node_restarted=restarted)
    back_ms = None
    if outcome in {MemoryOutcome.WORKER_RESTARTED, MemoryOutcome.NODE_RESTARTED}:
        # What was made before the restart says nothing about service after it.
        begun = [frame.t_ns for frame, _ in live.seen.boots[boots:]]
        begun += [r.detected_ns for r in reports if r.outcome is Outcome.STARTED]
        since = max(begun, default=t_ns)
        await live.until(lambda: live.block_since(since) is not None, BACK_S)
        block = live.block_since(since)
        back_ms = None if block is None else (block[1] - t_ns) / 1e6
    return MemoryRecord(
        index=index, target=target, outcome=outcome, region=page.region, page=page.address // PAGE, byte=byte,
        bit=bit, t_ns=t_ns, monitors=",".join(sorted({r.monitor for r in reports})), back_ms=back_ms,
        others=counted(mended),
    )  # fmt: skip


def _is_of(report: FdirReport, page: ResidentPage) -> bool:
    """Whether a repair can be of this page. The epoch decoded again goes with any."""
    if report.monitor == "epoch.proof":
        return True
    named = set().union(*ROWS.values())
    rows = ROWS.get(page.region)
    return report.monitor in rows if rows is not None else report.monitor not in named


def _outcome(reports: list[FdirReport], *, served: bool, wrong: bool, node_restarted: bool) -> MemoryOutcome:
    """Return the gravest that happened."""
    happened = (
        (MemoryOutcome.WRONG_OUTPUT, wrong),
        (MemoryOutcome.NO_SERVICE, not served),
        (MemoryOutcome.NODE_RESTARTED, node_restarted),
        (MemoryOutcome.WORKER_RESTARTED, any(r.action == "restart_worker" for r in reports)),
        (MemoryOutcome.REPAIRED, any(r.outcome is Outcome.REPAIRED for r in reports)),
        (MemoryOutcome.REDONE, any(r.outcome is Outcome.REDONE for r in reports)),
    )
    return next((outcome for outcome, found in happened if found), MemoryOutcome.MASKED)


async def _replace(live: LiveNode, target: Target) -> None:
    pid = live.worker_pid() if target == "worker" else live.node_pid()
    t_ns = time.time_ns()
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    # Some service first, so that what the replacement brings is not put down to the next flip.
    if not await live.until(lambda: live.block_since(t_ns + SOUND_NS) is not None, UP_S):
        raise live.failed(f"no token within {UP_S:g} s")
