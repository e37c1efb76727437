"""What `penumbra fly` leaves behind for machines: the fields of its `summary.json` (design section 4).

A figure that could not be measured is null, never 0, and its check in `verdict` is then null too.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from telemetry.errors import PenumbraError

Count = Annotated[int, Meta(ge=0, description="count")]
Seconds = Annotated[float, Meta(ge=0, description="s")]
Milliseconds = Annotated[float, Meta(ge=0, description="ms")]
Watts = Annotated[float, Meta(ge=0, description="W")]
Fraction = Annotated[float, Meta(ge=0, le=1, description="0 to 1")]


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all parts of a summary."""


class Tokens(_Part, frozen=True, kw_only=True):
    """Tokens of all jobs of the flight."""

    released: Count
    """Left the node with a certificate."""
    discarded: Count
    """Decoded in an epoch whose memory was not clean, and thrown away."""
    unverified_released: Count
    """Released without a valid certificate, as the ground recomputes the chain. Must be 0."""
    reference_match: bool | None
    """Text is byte for byte that of a fault-free run of the same jobs; null when no such run was made."""


class Flips(_Part, frozen=True, kw_only=True):
    """Bit flips, as the injector and the telemetry tell of them."""

    injected: Count
    by_target: dict[str, int]
    """Injected flips by target, such as `weights` and `kv`."""
    detected: Count
    repaired: Count
    masked: Count
    """Gone before anyone could see them: the memory was rewritten or freed. No text depends on them."""
    missed: Count
    """Neither detected nor masked. Must be 0."""


class Recovery(_Part, frozen=True, kw_only=True):
    """Time from the strike to service whole again; null without a repaired flip."""

    p50: Milliseconds | None
    p99: Milliseconds | None
    max: Milliseconds | None


class Power(_Part, frozen=True, kw_only=True):
    """Energy, as the plant knows it."""

    soc_min: Fraction
    """Lowest state of charge of the battery."""
    soc_floor: Fraction
    floor_violation_s: Seconds
    """Mission time spent under the floor."""
    watts_sun_mean: Watts | None
    """Mean draw of the payload computer in sunlight; null without sunlight."""
    watts_eclipse_mean: Watts | None
    """Mean draw of the payload computer in umbra and penumbra; null without eclipse."""
    joule_per_token: Annotated[float, Meta(ge=0, description="J")] | None
    """Draw over the flight by tokens released; null without tokens."""


class Telemetry(_Part, frozen=True, kw_only=True):
    """Ledger of all records, recomputed by the ground: generated = acked + stored + dropped."""

    generated: Count
    acked: Count
    stored: Count
    dropped: Count
    lost: Count
    """Must be 0."""


class Check(_Part, frozen=True, kw_only=True):
    """One check of the flight."""

    name: str
    ok: bool | None
    """True: passed, false: failed, null: could not be judged."""
    measured: float | int | str | bool | None
    limit: float | int | str | bool | None
    text: str
    """What was checked, in words, with units."""


class Summary(_Part, frozen=True, kw_only=True):
    """The result of `penumbra fly`."""

    scenario: str
    """Name of the scenario."""
    seed: int
    speed: Annotated[float, Meta(gt=0)]
    """Mission seconds a second of physical time."""
    wall_s: Seconds
    """Physical time the flight took."""
    orbit_s: Seconds
    """Mission time flown."""
    eclipse_s: Seconds
    """Mission time in umbra, as the plant knows it."""
    tokens: Tokens
    flips: Flips
    recovery_ms: Recovery
    power: Power
    telemetry: Telemetry
    protection_overhead_pct: Annotated[float, Meta(description="%")] | None
    """Slow-down of decoding by verified decoding, from a paired run; null when no pair was run."""
    verdict: list[Check]

    def passed(self) -> bool | None:
        """Return False if any check failed, else None if any could not be judged, else True."""
        outcomes = [check.ok for check in self.verdict]
        if False in outcomes:
            return False
        return None if None in outcomes or not outcomes else True


def write_json(path: Path, content: msgspec.Struct) -> None:
    """Write a struct as indented JSON, whole or not at all.

    Raises
    ------
    PenumbraError
        The file cannot be written.
    ValueError
        A number of it is not finite: JSON has no such number, and null would claim "not measured".
    """
    _refuse_non_finite(msgspec.to_builtins(content), type(content).__name__)
    text = msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise PenumbraError(
            f"{path}: cannot be written: {error.strerror or error}", "choose a writable place"
        ) from None


def _refuse_non_finite(value: object, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}")
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_non_finite(item, f"{where}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _refuse_non_finite(item, f"{where}[{number}]")
