"""The bars of the order for this engine, and what became of each."""

from __future__ import annotations

from typing import Final, Literal

from telemetry.figures import Bar, BenchCosts, BenchRatios, Spread

_BARS: Final = {
    "decode1_vs_llama": ("decode, 1 sequence, protected, against llama.cpp unprotected", 1.15, 1.5, "x"),
    "decode8_vs_decode1": ("decode, 8 sequences together, protected, against 1 sequence", 3.4, 4.5, "x"),
    "decode8_vs_llama": ("same, against llama.cpp with 8 parallel sequences", 1.35, 1.8, "x"),
    "prefill512_vs_llama": ("prefill of 512 tokens against llama.cpp", 1.3, 1.6, "x"),
    "floor_share": ("share of the memory-bandwidth floor, 1 sequence", 0.85, 0.95, ""),
    "verified": ("cost of verified decoding", 2.0, 1.0, "%"),
    "checks": ("cost of compute checks on top", 4.0, 2.0, "%"),
    "load": ("image load to first token", 1.0, 0.5, "s"),
}
"""Name, bar, stretch, unit. Costs and times are bars from above, ratios from below."""
_LOWER_IS_BETTER: Final = frozenset({"verified", "checks", "load"})


def judge(ratios: BenchRatios, costs: BenchCosts, load_s: Spread) -> list[Bar]:
    """Hold medians against the bars.

    Returns
    -------
    list of Bar
        All of them, in the order's own order; `not measured` for those without a peer.
    """
    measured: dict[str, Spread | None] = {name: getattr(ratios, name) for name in ratios.__struct_fields__}
    medians = {name: None if figure is None else figure.median for name, figure in measured.items()}
    medians |= {"verified": costs.verified.median, "checks": costs.checks.median, "load": load_s.median}
    return [
        Bar(name=text, measured=medians[name], bar=bar, stretch=stretch, unit=unit,
            verdict=_verdict(medians[name], bar, stretch, lower=name in _LOWER_IS_BETTER))
        for name, (text, bar, stretch, unit) in _BARS.items()
    ]  # fmt: skip


def _verdict(
    measured: float | None, bar: float, stretch: float, *, lower: bool
) -> Literal["stretch", "passed", "falls short", "not measured"]:
    if measured is None:
        return "not measured"
    sign = -1 if lower else 1
    if sign * measured >= sign * stretch:
        return "stretch"
    return "passed" if sign * measured >= sign * bar else "falls short"
