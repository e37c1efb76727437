"""Which jobs share the batch: a pure decision from the open jobs, the places, and the time.

Jobs are ranked by priority, highest first. Within a priority those that hold a place come first, so that
equals never push each other out; then the earliest deadline, none last; then the oldest. The first `batch`
of them are to hold the places.

A job is therefore pushed out only by one of higher priority, or by a batch that has become smaller, and
each arrival pushes out one job at most. Two jobs can never push each other out in turn: priorities do not
change. A job that was pushed out goes on as soon as its rank gives it a place again.

A deadline says until when a job is worth its place. It ends then as it is, whether it had a place or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

CANCELLED: Final = "cancelled"
DEADLINE: Final = "deadline"


@dataclass(frozen=True)
class Task:
    """What the scheduler knows of an open job."""

    job: str
    number: int
    """Order of arrival."""
    priority: int = 5
    """9 goes first."""
    deadline_ns: int | None = None
    """Mission time at which it ends as it is; None: never."""
    cancel: bool = False
    """The ground asked to end it."""
    tokens_left: int = 0
    """Most tokens still to be decoded."""
    leaving: bool = False
    """Of an active job: it was told to park or to end, and holds its place until it has."""


@dataclass(frozen=True)
class Start:
    """Action: give the job a place."""

    job: str


@dataclass(frozen=True)
class Park:
    """Action: take the job's place from it at the end of its epoch; it goes on later."""

    job: str


@dataclass(frozen=True)
class End:
    """Action: end the job as it is, at the end of its epoch if it is active."""

    job: str
    finish: str
    """`cancelled` or `deadline`."""


Action = Start | Park | End


def plan(
    active: Sequence[Task],
    queued: Sequence[Task],
    batch: int,
    now_ns: int | None,
    *,
    closing: int = 0,
    least_priority: int = 0,
) -> list[Action]:
    """Return what to do now, in order. Carrying it out and asking again changes nothing.

    Parameters
    ----------
    active
        Jobs that hold a place, those leaving it included.
    queued
        Jobs that wait for one: new, or parked.
    batch
        Places there are, at least 1.
    now_ns
        Mission time, UTC ns; None while it is not known, and no deadline can be judged.
    closing
        Places held by jobs that are no longer open: they are free only when the worker says so.
    least_priority
        Jobs below it get no place: there is no energy for them now. They wait, and end by their deadlines.
    """
    actions: list[Action] = []
    staying: list[Task] = []
    waiting: list[Task] = []
    for tasks, still_open in ((active, staying), (queued, waiting)):
        for task in tasks:
            if task.leaving:
                continue
            finish = _finish(task, now_ns)
            if finish is None:
                still_open.append(task)
            else:
                actions.append(End(task.job, finish))
    served = [task for task in (*staying, *waiting) if task.priority >= least_priority]
    ranked = sorted(served, key=lambda task: _rank(task, task in staying))
    shed = [task for task in staying if task.priority < least_priority]
    actions += [Park(task.job) for task in (*ranked[batch:], *shed) if task in staying]
    free = max(0, batch - len(active) - closing)
    actions += [Start(task.job) for task in [task for task in ranked[:batch] if task in waiting][:free]]
    return actions


def _finish(task: Task, now_ns: int | None) -> str | None:
    """Return how the job is to end now, None when it goes on."""
    if task.cancel:
        return CANCELLED
    if task.deadline_ns is not None and now_ns is not None and now_ns >= task.deadline_ns:
        return DEADLINE
    return None


def _rank(task: Task, holds: bool) -> tuple[int, bool, float, int]:
    deadline_ns = math.inf if task.deadline_ns is None else task.deadline_ns
    return -task.priority, not holds, deadline_ns, task.number
