"""The report of a flight: one HTML file that needs nothing else."""

from __future__ import annotations

import datetime as dt
import html
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from hil.faults import Fate
from hil.live import clock
from hil.live_feed import plan_text
from hil.record import FlightRecord, JobFact
from hil.report_plots import fault_figure, orbit_figure
from hil.verdict import matches
from telemetry.errors import PenumbraError
from telemetry.summary import Check, Summary

_CSS = """
:root { --ink: #1d2733; --faint: #6b7785; --line: #e3e8ee; --good: #2f8f5b; --bad: #c8402f; --open: #a67c00; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2.2rem 1.6rem 4rem; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p { max-width: 48rem; margin: .4rem 0; } .faint { color: var(--faint); }
header { display: flex; gap: 1.2rem; align-items: flex-start; justify-content: space-between;
  border-bottom: 1px solid var(--line); padding-bottom: 1rem; }
.badge { font-weight: 700; padding: .35rem .9rem; border-radius: .4rem; color: #fff; white-space: nowrap; }
.badge.pass { background: var(--good); } .badge.fail { background: var(--bad); }
.badge.open { background: var(--open); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .8rem;
  margin: 1.4rem 0; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.35rem; font-weight: 650; letter-spacing: -.01em; }
.card span { color: var(--faint); font-size: .82rem; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; }
th { text-align: left; color: var(--faint); font-weight: 600; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { max-width: 40rem; overflow-wrap: anywhere; }
td.pass, td.fail, td.open { font-weight: 700; }
td.pass { color: var(--good); } td.fail, p.fail { color: var(--bad); } td.open { color: var(--open); }
figure { margin: .4rem 0 0; } figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--faint); font-size: .84rem; max-width: 52rem; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: .15rem; vertical-align: -.08rem;
  margin: 0 .25rem 0 .6rem; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--faint); }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 0 2.5rem; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } h2 { break-after: avoid; }
  figure, .card, tr { break-inside: avoid; } details > *:not(summary) { display: block; } }
"""
_WORD = {True: ("pass", "PASS"), False: ("fail", "FAIL"), None: ("open", "OPEN")}


def write_report(path: Path, record: FlightRecord, summary: Summary) -> None:
    """Write the report, whole or not at all.

    Raises
    ------
    PenumbraError
        The file cannot be written.
    """
    text = render(record, summary).encode()
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(text)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise PenumbraError(
            f"report {path}: cannot be written: {error.strerror or error}",
            "free space, or give another --out",
        ) from None


def render(record: FlightRecord, summary: Summary) -> str:
    """Return the report as HTML."""
    title = f"Penumbra flight report: {record.scenario}"
    parts = [
        _header(record, summary),
        _cards(record, summary),
        "<h2>Verdict</h2>",
        _table(
            ("", "check", "n:measured", "n:limit", "what was checked"), [_verdict(c) for c in summary.verdict]
        ),
        "<h2>The orbit</h2>",
        _figure(
            orbit_figure(record),
            "Truth of the simulated spacecraft (battery, array, payload draw) and housekeeping of the node "
            "(ceiling, tokens/s, records waiting) over mission time."
            + _key("#dfe6f2", "umbra") + _key("#d9f0df", "contact") + ".",
        ),
        "<h2>Power: the plan and its reasons</h2>",
        _plans(record),
        "<h2>Bit flips, from strike to repair</h2>",
        _faults(record),
        "<h2>Texts</h2>",
        _jobs(record.jobs),
        "<h2>Telemetry ledger</h2>",
        _ledger(record),
        "<h2>Events</h2>",
        _events(record),
        "<h2>Constants of the scenario</h2>",
        _constants(record),
        "<h2>What flew</h2>",
        _table(("", ""), [(_e(key), _e(value)) for key, value in record.manifest.items()]),
    ]  # fmt: skip
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(title)}</title><style>{_CSS}</style>"
    )
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _e(value: object) -> str:
    return html.escape(str(value))


def _number(value: object, digits: int = 2) -> str:
    if value is None:
        return "&ndash;"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:,}" if isinstance(value, int) else _e(value)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. Heads with `n:` in front are of numbers; cells that begin with `<td` stay."""
    numeric = [head.startswith("n:") for head in heads]

    def cell(tag: str, text: str, number: bool) -> str:
        if text.startswith("<td"):
            return text
        return f'<{tag} class="n">{text}</{tag}>' if number else f"<{tag}>{text}</{tag}>"

    names = [head.removeprefix("n:") for head in heads]
    head = "".join(cell("th", name, n) for name, n in zip(names, numeric, strict=True))
    body = "".join(
        "<tr>" + "".join(cell("td", c, n) for c, n in zip(row, numeric, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _key(colour: str, name: str) -> str:
    return f'<span class="key" style="background:{colour}"></span>{name}'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _header(record: FlightRecord, summary: Summary) -> str:
    passed = summary.passed()
    style, word = _WORD[passed]
    word = "INCONCLUSIVE" if passed is None else word
    start = dt.datetime.fromtimestamp(record.start_ns / 1e9, dt.UTC)
    interrupted = ", interrupted" if record.interrupted else ""
    flown = (
        f"{clock(record.flown_s)} of mission time in {record.wall_s:.0f} s (x{record.speed:g}{interrupted})"
    )
    return (
        f'<header><div><h1>{_e(record.scenario)}</h1><p>{_e(record.description)}</p><p class="faint">'
        f"Penumbra flight report. Mission time from {start:%Y-%m-%d %H:%M:%S} UTC; {flown}; "
        f'seed {record.seed}.</p></div><div class="badge {style}">{word}</div></header>'
    )


def _cards(record: FlightRecord, summary: Summary) -> str:
    flips, power, recovery = summary.flips, summary.power, summary.recovery_ms
    words = {True: "equal to", False: "DIFFERENT from", None: "not compared with"}
    match = words[summary.tokens.reference_match]
    cards = [
        (
            _number(summary.tokens.released),
            f"tokens released, {match} the fault-free run",
        ),
        (_number(summary.tokens.unverified_released), "tokens released without proof"),
        (f"{flips.injected} / {flips.detected} / {flips.repaired}", "flips injected / detected / repaired"),
        (f"{_number(recovery.p50, 0)} / {_number(recovery.p99, 0)} ms", "strike to repair, p50 / p99"),
        (f"{power.soc_min * 100:.1f} %", f"lowest charge, floor {power.soc_floor * 100:.0f} %"),
        (
            f"{_number(power.watts_sun_mean)} / {_number(power.watts_eclipse_mean)} W",
            "mean draw in sunlight / eclipse",
        ),
        (_number(summary.telemetry.lost), f"records lost, of {summary.telemetry.generated:,}"),
        (
            "&ndash;"
            if summary.protection_overhead_pct is None
            else f"{summary.protection_overhead_pct:.1f} %",
            "cost of verified decoding",
        ),
    ]
    return '<div class="cards">' + "".join(
        f'<div class="card"><b>{value}</b><span>{_e(name)}</span></div>' for value, name in cards
    ) + "</div>"  # fmt: skip


def _plans(record: FlightRecord) -> str:
    """Return the plans of the node, and the reasons the ceiling changed for in between."""
    if not record.plans:
        return '<p class="faint">The node told of no plan.</p>'
    decided = sum(p.packet.source == "planner" for p in record.plans)
    made = sum(bool(p.packet.horizon) for p in record.plans)
    last = record.plans[-1].packet
    rows = [
        (
            clock(sample.t_s), f"{sample.packet.ceiling_w:.2f}", _e(sample.packet.reason),
            _e(plan_text(sample.packet, record.start_ns)),
            "" if sample.packet.battery_soc is None else f"{sample.packet.battery_soc:.1%}",
            f"{sample.packet.array_gain:.1%}",
            "" if sample.packet.die_c is None else f"{sample.packet.die_c:.1f}", _e(sample.packet.note),
        )
        for sample in record.plans
        if sample.packet.horizon or sample.packet.note
    ]  # fmt: skip
    text = (
        f"<p>{made} plans; {decided} of {len(record.plans)} reports of the ceiling were under one. The thin "
        "violet lines in the figure above are the state of charge each plan expected. Cycles of the battery "
        f"since boot: {last.battery_cycles:.2f}, {last.battery_wear:.4%} of its life (assumed table).</p>"
    )
    head = ("n:at", "n:ceiling, W", "limit", "plan", "n:charge", "n:array / expected", "n:die, degC", "note")
    return f"{text}<details open><summary>plans</summary>{_table(head, rows)}</details>"


def _verdict(check: Check) -> tuple[str, ...]:
    style, word = _WORD[check.ok]
    return (
        f'<td class="{style}">{word}</td>',
        _e(check.name),
        _number(check.measured, 3),
        _number(check.limit, 3),
        _e(check.text),
    )


def _faults(record: FlightRecord) -> str:
    if not record.fates:
        return "<p>No flip landed.</p>"
    figure = _figure(
        fault_figure(record),
        "Left: every flip; the stem begins at the strike, the dot is its detection, the green dash its "
        "repair. A cross is a flip nobody reported: grey when its memory was given up before a proof, red "
        "when missed. Latency is physical time and grows with the pause between two proofs: it is longer in "
        "eclipse." + _key("#2f6fb3", "weights") + _key("#7a55a8", "KV cache") + ".",
    )
    rows = [
        (
            str(fate.strike.index),
            clock(record.host_to_s(fate.strike.t_ns)),
            fate.strike.target.value,
            _e(fate.strike.role),
            _e(fate.strike.tensor),
            str(fate.strike.page),
            f"{fate.strike.byte}.{fate.strike.bit}",
            f"0x{fate.strike.before:02x} &rarr; 0x{fate.strike.after:02x}",
            f'<td class="{_fate_style(fate.fate)}">{fate.fate.value}</td>',
            _number(fate.detect_ms, 1),
            _number(fate.repair_ms, 1),
            _e(fate.reason),
        )
        for fate in record.fates
    ]
    heads = ("n:#", "time", "target", "role", "tensor", "n:page", "n:byte.bit", "change", "fate",
             "n:detected, ms", "n:repaired, ms", "by, or why")  # fmt: skip
    left = record.flips_not_injected
    note = f'<p class="faint">{left} flips of the list found nothing to strike in time.</p>' if left else ""
    return f"{figure}{note}<details><summary>all {len(rows)} flips</summary>{_table(heads, rows)}</details>"


def _fate_style(fate: Fate) -> str:
    return {Fate.REPAIRED: "pass", Fate.MISSED: "fail"}.get(fate, "open")


def _jobs(jobs: Sequence[JobFact]) -> str:
    if not jobs:
        return "<p>No text came down.</p>"

    def row(job: JobFact) -> tuple[str, ...]:
        match = matches(job)
        style, _ = _WORD[match]
        word = {True: "equal", False: "DIFFERS", None: "not compared"}[match]
        text = " ".join(job.text.decode(errors="replace").split())
        shown = text if len(text) <= 220 else text[:220] + "\u2026"
        return (
            _e(job.job),
            _number(len(job.tokens)),
            _number(job.proven),
            _e(job.finish or "open"),
            f'<td class="{style}">{word}</td>',
            f'<td class="text"><span class="faint">{_e(job.prompt[:90])}</span> {_e(shown)}</td>',
        )

    heads = ("job", "n:tokens", "n:proven", "end", "fault-free run", "prompt and text")
    first, rest = jobs[:6], jobs[6:]
    more = (
        f"<details><summary>{len(rest)} more</summary>{_table(heads, map(row, rest))}</details>"
        if rest
        else ""
    )
    return _table(heads, map(row, first)) + more


def _ledger(record: FlightRecord) -> str:
    ledger = record.ledger
    rows: list[tuple[str, ...]] = [
        (
            str(s.boot), s.stream.value, _number(s.generated), _number(s.acked), _number(s.stored),
            _number(s.dropped), _number(s.archived),
        )
        for s in ledger.streams
    ]  # fmt: skip
    rows.append(
        tuple(
            f'<td class="n"><b>{_number(n)}</b></td>' if n is not None else "<td><b>all</b></td>"
            for n in (None, None, ledger.generated, ledger.acked, ledger.stored, ledger.dropped,
                      sum(s.archived for s in ledger.streams))
        )
    )  # fmt: skip
    problems = "".join(f'<p class="fail">{_e(p)}</p>' for p in ledger.problems)
    reasons = ", ".join(f"{n} {_e(why)}" for why, n in ledger.drop_reasons.items())
    return (
        "<p>Every record the node ever generated is acknowledged, stored on its disk, or dropped by policy"
        f"{f' ({reasons})' if reasons else ''}; lost: <b>{ledger.lost}</b>. "
        f"The ground looked up each sequence number in its own archive.</p>{problems}"
        + _table(
            ("boot", "stream", "n:generated", "n:acked", "n:stored", "n:dropped", "n:in the archive"),
            rows,
        )
    )


def _events(record: FlightRecord) -> str:
    rows = [
        (clock(h.t_s), h.source, _e(h.name), _e(h.text))
        for h in record.happenings
        if h.source != "node" or h.severity >= 2
    ]
    return f"<details><summary>{len(rows)} events</summary>" + _table(
        ("time", "source", "event", ""), rows
    ) + "</details>"  # fmt: skip


def _constants(record: FlightRecord) -> str:
    rows = [(_e(c.name), _e(c.value), _e(c.tag), _e(c.note)) for c in record.constants]
    factor = (
        ""
        if record.acceleration is None
        else f"<p>Radiation is accelerated: {record.acceleration:,.0f} flips were planned for each one "
        "nature would cause in the same weights and time, by the flux and the cross-section below.</p>"
    )
    return factor + f"<details open><summary>{len(rows)} constants</summary>" + _table(
        ("constant", "value", "tag", ""), rows
    ) + "</details>"  # fmt: skip
