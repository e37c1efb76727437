"""Reconcile the node's ledger with what the ground's archive really holds. Pure.

The ground does not believe the node: it looks up every sequence number that was generated, and calls lost
what is neither archived, nor stored, nor dropped by policy. Lost must be 0, always.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from telemetry.packets import Stream, StreamLedger

Key = tuple[int, Stream]
"""(boot, stream)"""
Ranges = list[tuple[int, int]]
"""(first, last), both included, ascending and apart."""


@dataclass(frozen=True)
class LedgerCheck:
    """The account of all boots and streams together, as the ground sees it. Counts of records."""

    generated: int
    acked: int
    stored: int
    dropped: int
    lost: int
    duplicated: int
    consistent: bool
    """True when nothing is lost, nothing is duplicated and no problem was found."""
    problems: list[str] = field(default_factory=list)


def to_ranges(sequence: Iterable[int]) -> Ranges:
    """Return the ranges of a set of numbers in any order."""
    ranges: Ranges = []
    for number in sorted(set(sequence)):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def merge(*many: Ranges) -> Ranges:
    """Return the union of ranges in any order, which may overlap."""
    merged: Ranges = []
    for first, last in sorted(r for ranges in many for r in ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def count_below(ranges: Ranges, end: int) -> int:
    """Return how many numbers of `ranges` are below `end`."""
    return sum(min(last + 1, end) - first for first, last in ranges if first < end)


def reconcile(
    node_ledger: Iterable[StreamLedger],
    archived: Mapping[Key, Ranges],
    *,
    stored: Mapping[Key, Ranges] | None = None,
    dropped: Mapping[Key, Ranges] | None = None,
    duplicated: int = 0,
    final: bool = False,
) -> LedgerCheck:
    """Check a ledger of the node against the archive, stream by stream.

    Parameters
    ----------
    node_ledger
        The account the node gave. It may be older than the archive, never newer.
    archived
        Sequence numbers the archive holds, see `Archive.sequences`.
    stored, dropped
        Sequence numbers the node holds and has dropped, read from its database. With both, every single
        number is looked up. Without, numbers not archived are set against the counts of the ledger, which
        can hide a loss behind a record that was archived after the ledger was taken.
    duplicated
        Identities that arrived with two different contents, see `Archive.conflicts`.
    final
        The ledger was read after the node's last record: an archived record it does not know is a problem,
        not one that is merely newer.
    """
    problems: list[str] = []
    totals = {"generated": 0, "acked": 0, "stored": 0, "dropped": 0, "lost": 0}
    known: set[Key] = set()
    for entry in node_ledger:
        key = (entry.boot, entry.stream)
        where = f"boot {entry.boot} {entry.stream.value}"
        if key in known:
            problems.append(f"{where}: twice in the ledger")
        known.add(key)
        held = archived.get(key, [])
        exact = None
        if stored is not None and dropped is not None:
            exact = merge(held, stored.get(key, []), dropped.get(key, []))
        lost = _check_stream(entry, where, held, exact, problems)
        if final and held and held[-1][1] >= entry.generated:
            problems.append(f"{where}: {held[-1][1]} is archived, but only {entry.generated} were generated")
        totals["generated"] += entry.generated
        totals["acked"] += entry.acked
        totals["stored"] += entry.stored
        totals["dropped"] += sum(entry.dropped.values())
        totals["lost"] += lost
    if final:
        problems += [
            f"boot {boot} {stream.value}: archived, but unknown to the node"
            for boot, stream in sorted(archived.keys() - known)
        ]
    if duplicated:
        problems.append(f"{duplicated} records arrived under an identity already used by another")
    consistent = not problems and totals["lost"] == 0
    return LedgerCheck(**totals, duplicated=duplicated, consistent=consistent, problems=problems)


def _check_stream(
    entry: StreamLedger, where: str, held: Ranges, exact: Ranges | None, problems: list[str]
) -> int:
    """Return how many records of one stream are lost; add what is wrong to `problems`."""
    dropped = sum(entry.dropped.values())
    accounted = entry.acked + entry.stored + dropped
    if entry.generated != accounted:
        problems.append(
            f"{where}: generated {entry.generated}, but acked {entry.acked} + stored {entry.stored} "
            f"+ dropped {dropped} = {accounted}"
        )
    archived = count_below(held, entry.generated)
    if entry.acked > archived:
        problems.append(f"{where}: the node deleted {entry.acked} as archived, the archive has {archived}")
    if exact is not None:
        lost = entry.generated - count_below(exact, entry.generated)
    else:
        lost = max(0, entry.generated - archived - entry.stored - dropped)
    if lost:
        problems.append(f"{where}: {lost} lost")
    return lost
