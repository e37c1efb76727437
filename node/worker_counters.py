"""What the workers of this boot have done, summed over their generations."""

from __future__ import annotations

from dataclasses import dataclass, field

from node.inference import protocol


@dataclass
class WorkerCounters:
    """Sums over all generations since boot, and the latest figures."""

    tokens_discarded: int = 0
    epochs_clean: int = 0
    epochs_dirty: int = 0
    strikes_detected: int = 0
    strikes_repaired: int = 0
    compute_trips: int = 0
    prefill_tokens: int = 0
    restarts: int = 0
    generation: int = 0
    tokens_s: float = 0.0
    """Rate in the last epoch while it computed, all jobs together; 0 before the first."""
    scans_ms: list[float] = field(default_factory=list)
    """Times of the proofs since the last housekeeping."""

    def add(self, before: protocol.Status | None, status: protocol.Status) -> tuple[int, int]:
        """Add what a worker did since its status before; return the epochs of it, clean and dirty."""
        clean = status.epochs_clean - (before.epochs_clean if before else 0)
        dirty = status.epochs_dirty - (before.epochs_dirty if before else 0)
        self.epochs_clean += clean
        self.epochs_dirty += dirty
        self.tokens_discarded += status.tokens_discarded - (before.tokens_discarded if before else 0)
        self.prefill_tokens += status.prefill_tokens - (before.prefill_tokens if before else 0)
        if clean:
            self.tokens_s = status.tokens_s
        if clean or dirty:
            self.scans_ms.append(status.scan_ms)
        return clean, dirty

    def take_scan_ms(self) -> float:
        """Return the mean time of a proof since the last call, ms; 0 when there was none."""
        scans, self.scans_ms = self.scans_ms, []
        return sum(scans) / len(scans) if scans else 0.0
