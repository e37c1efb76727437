"""A random walk of the scheduler with a worker that obeys at its epoch ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hypothesis import given
from hypothesis import strategies as st

from node.scheduler import Action, End, Park, Start, Task, plan

EPOCH_NS = 10


@dataclass
class World:
    """Jobs, the batch and the time; holds the scheduler's decisions against what must be true."""

    batch: int = 2
    now_ns: int = 0
    tasks: dict[str, Task] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    """Epochs each open job still needs."""
    active: set[str] = field(default_factory=set)
    ending: dict[str, str] = field(default_factory=dict)
    parking: set[str] = field(default_factory=set)
    ended: dict[str, str] = field(default_factory=dict)
    parks: int = 0
    allowed_parks: int = 0
    first_starts: list[str] = field(default_factory=list)
    with_deadline: set[str] = field(default_factory=set)

    def seen(self, active: bool) -> list[Task]:
        return [
            replace(task, leaving=name in self.ending or name in self.parking)
            for name, task in self.tasks.items()
            if (name in self.active) == active
        ]

    def schedule(self) -> None:
        actions = plan(self.seen(True), self.seen(False), self.batch, self.now_ns)
        for action in actions:
            self.obey(action)
        assert len(self.active) <= self.batch or not any(isinstance(a, Start) for a in actions)
        again = plan(self.seen(True), self.seen(False), self.batch, self.now_ns)
        assert again == [], "a decision carried out is settled"
        staying = [self.tasks[n] for n in self.active - self.parking - self.ending.keys()]
        waiting = [t for n, t in self.tasks.items() if n not in self.active]
        if staying and waiting:
            best = max(t.priority for t in waiting)
            lowest = min(t.priority for t in staying)
            freed = len(self.parking) + len(self.ending)
            assert best <= lowest or freed, "nothing lower stays while a higher one waits for nothing"

    def obey(self, action: Action) -> None:
        match action:
            case Start(job):
                assert job in self.tasks
                assert job not in self.active
                self.active.add(job)
                assert len(self.active) <= self.batch, "never more than the batch"
                if job not in self.first_starts:
                    self.first_starts.append(job)
            case Park(job):
                assert job in self.active - self.parking - self.ending.keys()
                self.parks += 1
                assert self.parks <= self.allowed_parks, "each cause pushes out one job at most"
                self.parking.add(job)
            case End(job, finish):
                if job in self.active:
                    self.ending[job] = finish
                else:
                    self.end(job, finish)

    def end(self, job: str, finish: str) -> None:
        assert job not in self.ended, "every job ends once"
        task = self.tasks.pop(job)
        if finish == "deadline":
            assert task.deadline_ns is not None
            assert task.deadline_ns <= self.now_ns
        self.ended[job] = finish
        self.left.pop(job)

    def epoch(self) -> None:
        """Let the worker finish an epoch: what was to leave leaves, the others advance."""
        self.now_ns += EPOCH_NS
        for job in sorted(self.active):
            self.left[job] -= 1
            if job in self.ending or self.left[job] <= 0:
                self.active.discard(job)
                self.parking.discard(job)
                self.end(job, self.ending.pop(job, "length"))
            elif job in self.parking:
                self.parking.discard(job)
                self.active.discard(job)
        self.schedule()

    def arrive(self, priority: int, epochs: int, deadline_ns: int | None) -> None:
        number = len(self.tasks) + len(self.ended)
        job = f"job-{number}"
        self.tasks[job] = Task(job, number, priority, deadline_ns)
        self.left[job] = epochs
        if deadline_ns is not None:
            self.with_deadline.add(job)
        self.allowed_parks += 1
        self.schedule()

    def resize(self, batch: int) -> None:
        self.allowed_parks += max(0, self.batch - batch)
        self.batch = batch
        self.schedule()

    def cancel(self, which: int) -> None:
        names = sorted(self.tasks)
        if names:
            job = names[which % len(names)]
            self.tasks[job] = replace(self.tasks[job], cancel=True)
            self.schedule()

    def worker_restarts(self) -> None:
        """All that was under way at the worker is forgotten; the places are kept."""
        for job, finish in list(self.ending.items()):
            self.active.discard(job)
            self.end(job, finish)
        self.active -= self.parking
        self.ending.clear()
        self.parking.clear()
        self.schedule()


Step = Callable[[World], None]
arrivals = st.builds(
    lambda priority, epochs, after: (
        lambda w: w.arrive(priority, epochs, None if after is None else w.now_ns + after)
    ),
    st.integers(0, 9),
    st.integers(1, 6),
    st.none() | st.integers(-20, 200),
)
plain_arrivals = st.builds(
    lambda epochs, after: lambda w: w.arrive(5, epochs, None if after is None else w.now_ns + after),
    st.integers(1, 6),
    st.none() | st.integers(1, 500),
)
resizes = st.integers(1, 4).map(lambda batch: lambda w: w.resize(batch))
cancels = st.integers(0, 50).map(lambda which: lambda w: w.cancel(which))
epochs = st.just(World.epoch)
restarts = st.just(World.worker_restarts)


def walk(steps: list[Step]) -> World:
    world = World()
    for step in steps:
        step(world)
    # No more news: everything open must come to its end, each job in as many epochs as it needs and some.
    for _ in range(10 + 8 * sum(world.left.values()) + 8 * len(world.left)):
        if not world.tasks:
            break
        world.epoch()
    assert not world.tasks, "no job waits for ever"
    assert not world.active
    return world


@given(st.lists(st.one_of(arrivals, arrivals, resizes, cancels, epochs, epochs, restarts), max_size=80))
def test_every_job_ends_once_and_no_cause_pushes_out_more_than_one(steps: list[Step]) -> None:
    walk(steps)


@given(st.lists(st.one_of(plain_arrivals, epochs, restarts), max_size=60))
def test_equal_jobs_are_never_parked_and_start_in_order_of_arrival(steps: list[Step]) -> None:
    world = walk(steps)
    assert world.parks == 0
    # Those with a deadline may overtake those without, and each other.
    plain = [int(job[4:]) for job in world.first_starts if job not in world.with_deadline]
    assert plain == sorted(plain)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=20), st.integers(1, 4))
def test_a_job_of_the_highest_priority_waits_for_one_epoch_at_most(
    jobs: list[tuple[int, int]], batch: int
) -> None:
    world = World(batch=batch)
    for priority, length in jobs:
        world.arrive(priority, length + 3, None)
        world.epoch()
    if all(priority < 9 for priority, _ in jobs):
        world.arrive(9, 1, None)
        newest = f"job-{len(jobs)}"
        if newest not in world.active:
            world.epoch()
        assert newest in world.active
