"""What a component of the node found, on its way to the FDIR: its row of the table, and evidence.

Components find and carry out; whether anything is done about a finding is decided by the monitors and the
ladder (`fdir.monitors`, `fdir.ladder`), which `node.fdir_service` asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from node.inference.protocol import Strike
from node.recorder import Evidence
from telemetry.packets import FdirReport, Level, Outcome


@dataclass(frozen=True)
class Finding:
    """A violation of a row of the FDIR table, found by a component."""

    row: str
    """Id of the row."""
    reason: str
    """What was found, in words."""
    evidence: Evidence = field(default_factory=dict)
    detected_ns: int = field(default_factory=time.time_ns)
    """CLOCK_REALTIME, ns."""
    report: FdirReport | None = None
    """What the component has done about it already, where it acts by itself (levels 0 and 1)."""
    failed: str = ""
    """Why that did not make it whole; empty if it did, or if nothing was to be done yet."""


Find: TypeAlias = Callable[[Finding], None]


def of_strike(strike: Strike) -> Finding:
    """Return what the worker found in its memory or computing, and mended, as a finding."""
    whole = strike.recovered_ns is not None
    row = "compute.check" if strike.region == "compute" else f"{strike.region}.digest"
    redo = strike.region == "compute" or strike.method == "recompute"
    level = Level.EPOCH_REDO if redo else Level.IN_WORKER_REPAIR
    if whole:
        outcome = Outcome.REDONE if redo else Outcome.REPAIRED
    elif strike.method == "none" or not redo:
        outcome = Outcome.ESCALATED
    else:
        outcome = Outcome.STARTED
    report = FdirReport(
        monitor=row,
        level=level,
        outcome=outcome,
        action=strike.method,
        detected_ns=strike.detected_ns,
        recovered_ns=strike.recovered_ns,
        region=strike.region,
        page=strike.page,
        role=strike.role,
        evidence=strike.evidence,
    )
    reason = f"{strike.region} struck: {strike.role} {strike.page}, {strike.method}"
    # What the worker cannot mend ends in its `Fatal`, which is a finding of its own.
    return Finding(row, reason, dict(strike.evidence), strike.detected_ns, report)
