"""The proof that ends an epoch, and the mending of what it finds (design section 5)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from fdir.rows import BadRow
from node.inference.arena import Bank
from node.inference.epoch import Epoch, Unequal
from node.inference.guard import ComputeTrip
from node.inference.protocol import Strike
from node.inference.sequence import SequenceState


class BeyondRepair(Exception):
    """Memory cannot be made whole here: the recovery ladder has to take the next step."""


@dataclass(frozen=True, slots=True)
class Mended:
    """One bad weight page and what became of it."""

    page: int
    role: str
    """Role of its tensor; `digests` when it was the page's digest in memory that was bad."""
    method: str
    """`parity`, `golden`, `other_slot`, or `none` when the page is still bad."""
    file_mended: bool | None = None
    """Whether the image file was mended with it; None when that was not tried."""
    found_ns: int = field(default=0, compare=False)
    """When the scan that found it was done, CLOCK_REALTIME, ns: the time of its repair counts from here."""
    whole_ns: int = field(default=0, compare=False)
    """When it was whole again; 0 when it is not."""


class Weights(Protocol):
    """Protected weight memory."""

    def check(
        self,
        tokens: Collection[int],
        rows: Iterable[npt.NDArray[np.int64]] = (),
        positions: Collection[int] = (),
    ) -> list[Mended]:
        """Prove all pages an epoch read; repair bad ones in place and return them.

        It fed `tokens` at `positions`, and its head read `rows` of the table.
        """


class Proof:
    """Prove and mend the memory that sequences are decoded from, and report what was found.

    Parameters
    ----------
    weights
        The protected weights.
    report
        Takes a `Strike` for every damage.
    executor
        Has a thread that proves rows beside this one; None: this one proves all.

    Attributes
    ----------
    whole
        Whether the last proof found nothing bad.
    took_s
        Time it took, s.
    began_ns
        When it began, CLOCK_REALTIME, ns: what is struck later may be behind it.
    """

    def __init__(
        self, weights: Weights, report: Callable[[Strike], None], executor: Executor | None = None
    ) -> None:
        self.whole = True
        self.took_s = 0.0
        self.began_ns = 0
        self._weights = weights
        self._report = report
        self._executor = executor
        self._found_ns: dict[str, int] = {}
        """When the last proof of a job's rows found them bad, by job, CLOCK_REALTIME, ns."""
        self._lost: dict[str, list[Strike]] = {}
        """Strikes on rows that are being computed anew, by job."""

    def of_weights(self) -> None:
        """Prove the weights alone, for nobody.

        Raises
        ------
        BeyondRepair
            A page could not be restored.
        """
        self.began_ns, started = time.time_ns(), time.perf_counter()
        self.whole = self._check_weights(())
        self.took_s = time.perf_counter() - started

    def of_epoch(self, epoch: Epoch, sequences: Sequence[SequenceState]) -> bool:
        """Prove what an epoch read, and all rows of its sequences; True when all was whole.

        Pages are repaired at once; rows are for `rewind`.

        Raises
        ------
        BeyondRepair
            A page could not be restored.
        """
        self.began_ns, started = time.time_ns(), time.perf_counter()
        self.whole = self._check_weights(epoch.fed, epoch.head_rows, epoch.positions)
        for sequence in sequences:
            self.whole = self.of_rows(sequence) and self.whole
        self.took_s = time.perf_counter() - started
        return self.whole

    def of_rows(self, sequence: SequenceState) -> bool:
        """Prove the rows of a sequence, those of the open epoch included."""
        whole = all(rows.prove(self._executor) for rows in sequence.seat.banks.values())
        if not whole:
            self._found_ns[sequence.job] = time.time_ns()
        return whole

    def rewind(self, sequence: SequenceState) -> None:
        """Cut a sequence back to its last committed row, and repair what is not whole."""
        self._found_ns.setdefault(sequence.job, time.time_ns())
        self.mend(sequence, {name: rows.rewind() for name, rows in sequence.seat.banks.items()})

    def mend(self, sequence: SequenceState, bad: Mapping[Bank, list[BadRow]]) -> None:
        """Report rows that were bad; if one is beyond repair, have all rows of the sequence computed anew."""
        now_ns = time.time_ns()
        found_ns = self._found_ns.pop(sequence.job, now_ns)
        lost = []
        for bank, rows in bad.items():
            for row in rows:
                strike = Strike(
                    region="kv", page=row.position, role=bank,
                    method=row.method if row.repaired else "recompute",
                    detected_ns=found_ns, recovered_ns=now_ns if row.repaired else None,
                    evidence={
                        "job": sequence.job, "seat": sequence.seat.index, "position": row.position,
                        "planes": ",".join(map(str, row.planes)),
                    },
                )  # fmt: skip
                self._report(strike)
                if not row.repaired:
                    lost.append(strike)
        if lost:
            self._lost.setdefault(sequence.job, []).extend(lost)
            sequence.lose_rows()

    def regained(self, sequence: SequenceState) -> None:
        """Report lost rows of a sequence as recovered, once all are computed anew and proven."""
        if sequence.job in self._lost and not sequence.lagging:
            now_ns = time.time_ns()
            for strike in self._lost.pop(sequence.job):
                self._report(msgspec.structs.replace(strike, recovered_ns=now_ns))

    def forget(self, job: str) -> None:
        """Forget rows of a job that nobody will compute anew."""
        self._lost.pop(job, None)
        self._found_ns.pop(job, None)

    def account_for(self, fault: Exception) -> bool:
        """Report what a check on the computing found, unless struck memory accounts for it.

        Returns
        -------
        bool
            True: the last proof found all memory whole, so it was computing that failed.
        """
        if not self.whole:
            return False
        now_ns = time.time_ns()
        evidence: dict[str, str | int | float | bool | None] = {"reason": str(fault)}
        page, role = 0, "logits"
        if isinstance(fault, ComputeTrip):
            first = fault.findings[0]
            page, role = first.number, first.check
            evidence |= {"position": first.position, "value": first.value, "limit": first.limit}
            evidence["findings"] = len(fault.findings)
        elif isinstance(fault, Unequal):
            role, evidence["position"] = "redundancy", fault.position
        self._report(
            Strike(
                region="compute", page=page, role=role, method="redo", detected_ns=now_ns,
                recovered_ns=now_ns, evidence=evidence,
            )
        )  # fmt: skip
        return True

    def _check_weights(
        self,
        tokens: Collection[int],
        rows: Iterable[npt.NDArray[np.int64]] = (),
        positions: Collection[int] = (),
    ) -> bool:
        """Prove the weights and repair what is bad; True when nothing was."""
        mended = self._weights.check(tokens, rows, positions)
        for page in mended:
            whole = page.method != "none"
            self._report(
                Strike(
                    region="weights", page=page.page, role=page.role, method=page.method,
                    detected_ns=page.found_ns, recovered_ns=page.whole_ns if whole else None,
                    evidence={} if page.file_mended is None else {"file_mended": page.file_mended},
                )
            )  # fmt: skip
        if any(page.method == "none" for page in mended):
            raise BeyondRepair(
                "a weight page could not be restored from parity, the image file, or the other slot"
            )
        return not mended
