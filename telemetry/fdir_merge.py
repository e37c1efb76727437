"""Reports of the FDIR as one, and how many findings reports stand for. Pure.

The spool numbers the reports of a row (`monitor`) and outcome from 1 in each boot, and a report names in
`covers` which numbers it stands for. A merged one covers every number from the first to the last in each
boot, also those that the ground has acknowledged in between. So the ground takes the union, and counts
nothing twice, whatever it got of the reports that were merged.

A report covers at most `MAX_SPANS` boots by number. Of more, it keeps the count alone, oldest first: if the
ground has one of those reports, and the node does not know it, that one is counted twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from msgspec.structs import replace

from telemetry.ledger import Ranges, merge
from telemetry.packets import FdirReport, FirstFinding, Outcome

MAX_SPANS = 32
"""Boots whose numbers a report names (assumed: the boots between two contacts, and many more)."""
SHORT_CHARACTERS = 40
"""What is left of a text of the evidence where room is short (assumed: enough to know it again)."""

Kind = tuple[str, Outcome]
"""What reports must share to be merged: row and outcome."""
Span = tuple[int, int, int]
"""(boot, first, last): running numbers, both included."""


def kind_of(report: FdirReport) -> Kind:
    """Return the row and the outcome of a report."""
    return report.monitor, report.outcome


def merged(reports: Iterable[FdirReport]) -> FdirReport:
    """Return the report that stands for numbered reports of one row and outcome, in any order.

    It says of the last finding what that one's own report says, and of the first what `first` holds.
    """
    ordered = sorted(reports, key=lambda report: (report.covers[-1][0], report.covers[-1][2]))
    oldest, newest = ordered[0], ordered[-1]
    spans = _hull(span for report in ordered for span in report.covers)
    unnamed = sum(_unnamed(report) for report in ordered)
    return replace(
        newest,
        count=unnamed + _length(spans),
        first=oldest.first or _first(oldest),
        covers=spans[-MAX_SPANS:],
    )


def shorter(report: FdirReport) -> Iterator[FdirReport]:
    """Yield the report, then with less and less evidence: where `evidence_cut` stands, some is missing."""
    yield report
    for cut in (_shortened, _nothing):
        first = report.first
        yield replace(
            report,
            evidence={**cut(report.evidence), "evidence_cut": True},
            first=None if first is None else replace(first, evidence=cut(first.evidence)),
        )


def counted(reports: Iterable[FdirReport]) -> int:
    """Return how many findings reports stand for, those that came alone and in a merged report once."""
    numbered: dict[tuple[Kind, int], Ranges] = {}
    held: list[FdirReport] = []
    total = 0
    for report in reports:
        if not report.covers:  # of an earlier version
            total += report.count
            continue
        held.append(report)
        for boot, first, last in report.covers:
            numbered.setdefault((kind_of(report), boot), []).append((first, last))
    united = {key: merge(ranges) for key, ranges in numbered.items()}
    total += sum(last - first + 1 for ranges in united.values() for first, last in ranges)
    most: dict[tuple[Kind, Span], int] = {}
    for report in held:
        # Merged reports with the same last boot and range hold each other's findings.
        boot, _, last = report.covers[0]
        whole = next(r for r in united[kind_of(report), boot] if r[0] <= last <= r[1])
        key = (kind_of(report), (boot, *whole))
        most[key] = max(most.get(key, 0), _unnamed(report))
    return total + sum(most.values())


def both_ends(report: FdirReport) -> Sequence[FdirReport]:
    """Return the reports of the first and of the last finding, as they were alone; one, if not merged."""
    first = report.first
    last = replace(report, count=1, first=None)
    if first is None:
        return [last]
    return [
        replace(
            last,
            level=first.level,
            action=first.action,
            detected_ns=first.detected_ns,
            recovered_ns=first.recovered_ns,
            region=first.region,
            page=first.page,
            role=first.role,
            evidence=first.evidence,
        ),
        last,
    ]


def _first(report: FdirReport) -> FirstFinding:
    return FirstFinding(
        level=report.level,
        action=report.action,
        detected_ns=report.detected_ns,
        recovered_ns=report.recovered_ns,
        region=report.region,
        page=report.page,
        role=report.role,
        evidence=report.evidence,
    )


def _hull(spans: Iterable[Span]) -> list[Span]:
    found: dict[int, tuple[int, int]] = {}
    for boot, first, last in spans:
        low, high = found.get(boot, (first, last))
        found[boot] = min(low, first), max(high, last)
    return [(boot, *found[boot]) for boot in sorted(found)]


def _length(spans: Iterable[Span]) -> int:
    return sum(last - first + 1 for _, first, last in spans)


def _unnamed(report: FdirReport) -> int:
    return report.count - _length(report.covers)


_Evidence = dict[str, str | int | float | bool | None]


def _shortened(evidence: _Evidence) -> _Evidence:
    return {
        key: value[:SHORT_CHARACTERS] if isinstance(value, str) else value for key, value in evidence.items()
    }


def _nothing(_: _Evidence) -> _Evidence:
    return {}
