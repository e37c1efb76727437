"""Fit what a board's draw follows: load, clock and temperature, by least squares; exact where it is quiet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fdir.latchup import DrawSample
from telemetry.figures import CurrentProfile

LEAST_SAMPLES: Final = 8
"""Fewer tell nothing of the scatter."""
LEAST_FREQ_SPREAD_GHZ: Final = 0.05
"""A clock that varies by less (standard deviation) is taken as fixed."""
LEAST_TEMP_SPREAD_C: Final = 1.0
QUIET_SHARE: Final = 0.25
"""CPU share up to which a sample counts as quiet, 1 = one core: as in `fdir.latchup.LatchupLimits`."""

_Floats = npt.NDArray[np.float64]


def fit_current(samples: Sequence[DrawSample], sample_s: float) -> CurrentProfile | None:
    """Return the profile that explains the draw best; None when the samples are too few, or the load is one.

    Parameters
    ----------
    samples
        Load and draw; those whose draw is not finite are left out.
    sample_s
        Time between samples, s.
    """
    used = [s for s in samples if np.isfinite(s.power_w)]
    if len(used) < LEAST_SAMPLES:
        return None
    power = np.array([s.power_w for s in used])
    share = np.array([s.cpu_share for s in used])
    freq = _known([s.freq_ghz for s in used], LEAST_FREQ_SPREAD_GHZ)
    temp = _known([s.temp_c for s in used], LEAST_TEMP_SPREAD_C)
    if share.std() < QUIET_SHARE / 10:
        return None
    columns = [np.ones_like(share), share]
    if freq is not None:
        columns.append(share * (freq - freq.mean()))
    if temp is not None:
        columns.append(temp - temp.mean())
    matrix = np.stack(columns, axis=1)
    found, _, rank, _ = np.linalg.lstsq(matrix, power, rcond=None)
    if rank < matrix.shape[1]:
        return None
    residual = power - matrix @ found
    terms = iter(found[2:].tolist())
    quiet = residual[share <= QUIET_SHARE]
    # Only quiet samples are judged: there the model has to be right, wherever the draw bends above.
    shift_w = float(np.median(quiet)) if len(quiet) >= LEAST_SAMPLES else 0.0
    return CurrentProfile(
        idle_w=max(0.0, float(found[0]) + shift_w),
        core_w=float(found[1]),
        core_w_per_ghz=next(terms) if freq is not None else 0.0,
        freq_ghz=float(freq.mean()) if freq is not None else 0.0,
        w_per_c=next(terms) if temp is not None else 0.0,
        temp_c=float(temp.mean()) if temp is not None else 0.0,
        residual_sigma_w=float(np.sqrt(np.sum(residual**2) / max(1, len(used) - matrix.shape[1]))),
        quiet_sigma_w=float(quiet.std()) if len(quiet) > 1 else None,
        samples=len(used),
        sample_s=sample_s,
    )


def _known(values: Sequence[float | None], least_spread: float) -> _Floats | None:
    """Return a quantity known at every sample that varies enough for its term to be told; else None."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    if len(known) < len(values):
        return None
    array = np.array(known)
    return array if array.std() >= least_spread else None
