"""Checks on what a run of the model computes: faults that leave no trace in memory show here or nowhere.

Two checks look at every position of every run:

- **hidden**: a hidden state leaves an RMS norm, so component i cannot exceed sqrt(width) times the i-th gain
  of that norm, whatever went in. This bound is proven, not calibrated: it has no false alarms, and NaN and
  infinity fail it too.
- **matmul**: the checksum residual of each matrix product against a limit calibrated on clean data
  (`Manifest.checks`), where the model is a checked one.

Limits of residuals are statistical, and decoding is deterministic: a sound result a little over its limit
would come again at every attempt, for ever. So a finding that comes again to the bit, from memory proven in
between, is let pass: a transient fault does not repeat itself exactly. A fault that does (a stuck unit) is
what the known answer at loading is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from fdir.pages import memory_view
from node.inference.manifest import WEIGHTS
from node.inference.model import Model
from node.inference.probe import mapped_addresses

OUTPUT_NORM: Final = "output_norm.weight"
ROUNDING: Final = 1.001
"""Allowance for rounding of the norm in float32; a norm of 640 components errs by 1e-6 or so."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One value out of its limit."""

    check: Literal["hidden", "matmul"]
    number: int
    """Component of the hidden state, or number of the matrix product in the order of `Manifest.checks`."""
    seat: int
    position: int
    value: float
    limit: float


class ComputeTrip(Exception):
    """A run of the model computed what sound hardware would not: the epoch is dirty."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        first = findings[0]
        super().__init__(
            f"{first.check} {first.number} at position {first.position} "
            f"is {first.value:g}, its limit {first.limit:g}"
        )
        self.findings = tuple(findings)


class ComputeGuard:
    """Judge the outputs of a run.

    Parameters
    ----------
    gain
        Weights of the norm hidden states leave, float32, shape (width,). Copied.
    residual_limits
        float32, shape (matmuls,), None when the model is not a checked one.
    """

    def __init__(
        self, gain: npt.NDArray[np.float32], residual_limits: npt.NDArray[np.float32] | None
    ) -> None:
        self.hidden_limits = (np.abs(gain) * (np.sqrt(len(gain)) * ROUNDING)).astype(np.float32)
        self.residual_limits = residual_limits
        self._excused: set[tuple[str, int, int, float]] = set()

    def check(
        self,
        hidden: npt.NDArray[np.float32],
        residual: npt.NDArray[np.float32] | None,
        seats: Sequence[int],
        positions: Sequence[int],
    ) -> None:
        """Look at one run.

        Parameters
        ----------
        hidden
            float32, shape (n, width): a row for each position computed.
        residual
            float32, shape (n, matmuls), None when the model is not a checked one.
        seats, positions
            Where each of the n rows belongs, for the evidence.

        Raises
        ------
        ComputeTrip
            A value is out of its limit, and not excused.
        """
        found = []
        # "not <=" and not ">": NaN is within no limit.
        if not (np.abs(hidden) <= self.hidden_limits).all():
            found += self._findings("hidden", hidden, self.hidden_limits, seats, positions)
        limits = self.residual_limits
        if residual is not None and limits is not None and not (np.abs(residual) <= limits).all():
            found += self._findings("matmul", residual, limits, seats, positions)
        found = [finding for finding in found if _key(finding) not in self._excused]
        if found:
            raise ComputeTrip(found)

    def excuse(self, trip: ComputeTrip) -> None:
        """Let these findings pass if they come again to the bit: memory was proven whole after them."""
        self._excused |= {_key(finding) for finding in trip.findings if finding.check == "matmul"}

    @staticmethod
    def _findings(
        check: Literal["hidden", "matmul"],
        values: npt.NDArray[np.float32],
        limits: npt.NDArray[np.float32],
        seats: Sequence[int],
        positions: Sequence[int],
    ) -> list[Finding]:
        rows, columns = np.nonzero(~(np.abs(values) <= limits))
        return [
            Finding(
                check, column, seats[row], positions[row], float(values[row, column]), float(limits[column])
            )
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        ]


def output_gain(model: Model) -> npt.NDArray[np.float32]:
    """Return the weights of the norm that hidden states leave, as the trunk has mapped them; a view."""
    tensor = next(tensor for tensor in model.manifest.tensors if tensor.name == OUTPUT_NORM)
    (address,) = mapped_addresses(model.directory / WEIGHTS, [tensor])[tensor.name]
    return np.frombuffer(memory_view(address, tensor.length), np.float32)


def _key(finding: Finding) -> tuple[str, int, int, float]:
    """Return what makes a finding the same one; NaN is equal to nothing, so it is never excused."""
    return finding.check, finding.number, finding.position, finding.value
