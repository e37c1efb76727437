"""Random walk over the books of the memory scrub."""

from __future__ import annotations

import random

from fdir.region_book import (
    Action,
    Added,
    Check,
    Checked,
    CheckNow,
    Event,
    NowDone,
    Refresh,
    Refreshed,
    RegionBook,
    Removed,
    SetEnabled,
    Tick,
    Unreadable,
)

NAMES = tuple("abcde")
BUDGET_S = 1.0


class Model:
    """What must be true of a book, kept beside it in the simplest way."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.book = RegionBook(BUDGET_S)
        self.now_s = 0.0
        self.pieces: dict[str, int] = {}
        self.on: dict[str, bool] = {}
        self.all_on = True
        self.asked: Refresh | Check | None = None
        self.asked_now = False
        self.ordered: str | None = None
        self.used_s = 0.0
        self.in_cycle = False
        self.turn: dict[str, int] = {}
        """Next piece of the pass in turn over each region, from its refresh on."""
        self.out_of_turn: int = -1

    def send(self, event: Event) -> list[Action]:
        self.now_s += self.rng.random()
        return self.book.handle(event, self.now_s)

    def refused(self, event: Event) -> None:
        before = self.book.regions, self.book.passes, self.book.checking_now
        try:
            self.book.handle(event, self.now_s)
        except ValueError:
            assert (self.book.regions, self.book.passes, self.book.checking_now) == before
        else:
            raise AssertionError(f"{event} was taken")

    def step(self) -> None:
        order = self.rng.random()
        if order < 0.04:
            self.add_or_remove()
        elif order < 0.08:
            self.switch()
        elif order < 0.11:
            self.check_now()
        elif self.asked is None:
            self.used_s, self.in_cycle = 0.0, True
            self.follow(self.send(Tick()))
        elif order < 0.13:
            wrong = Checked(self.asked.region, 10_000, 0.1)
            self.refused(wrong)
        else:
            self.answer()

    def add_or_remove(self) -> None:
        name = self.rng.choice(NAMES)
        if name not in self.pieces:
            self.refused(Removed(name))
            assert self.send(Added(name)) == []
            self.pieces[name], self.on[name] = self.rng.randrange(5), True
            return
        self.refused(Added(name))
        actions = self.send(Removed(name))
        assert len(actions) == (self.ordered == name)
        if self.ordered == name:
            assert isinstance(actions[0], NowDone)
            self.ordered = None
        del self.pieces[name], self.on[name]
        self.turn.pop(name, None)

    def switch(self) -> None:
        name = self.rng.choice((None, *NAMES))
        on = self.rng.random() < 0.7
        if name is None:
            self.all_on = on
        elif name in self.on:
            self.on[name] = on
        else:
            self.refused(SetEnabled(name, on))
            return
        assert self.send(SetEnabled(name, on)) == []

    def check_now(self) -> None:
        name = self.rng.choice(NAMES)
        if name not in self.pieces or self.ordered is not None:
            self.refused(CheckNow(name))
            return
        assert self.send(CheckNow(name)) == []
        self.ordered, self.out_of_turn = name, -1

    def answer(self) -> None:
        asked, self.asked = self.asked, None
        assert asked is not None
        # The region may have been removed meanwhile, and added again: then the answer counts for nothing.
        took_s = self.rng.choice((0.0, 0.1, 0.5, 2.0))
        self.used_s += took_s
        entry = self.book.entry(asked.region) if asked.region in self.pieces else None
        before = None if entry is None else (entry.miscompares, entry.repaired)
        done_expected = None
        mine = self.asked_now and self.ordered == asked.region and self.out_of_turn_asked
        if self.rng.random() < 0.05:
            event: Event = Unreadable(asked.region, took_s, "cannot be read")
            if mine:
                done_expected, self.ordered = asked.region, None
            elif not self.asked_now:
                self.turn.pop(asked.region, None)
        elif isinstance(asked, Refresh):
            pieces = self.pieces.get(asked.region, 1)
            event = Refreshed(asked.region, pieces, took_s)
            if mine:
                self.out_of_turn = 0
            elif not self.asked_now:
                self.turn[asked.region] = 0
        else:
            bad = self.rng.choice((0, 0, 0, 1, 2))
            repaired = self.rng.randint(0, bad)
            event = Checked(asked.region, asked.piece, took_s, bad, repaired)
            if mine:
                self.out_of_turn += 1
            elif not self.asked_now and asked.region in self.turn:
                self.turn[asked.region] += 1
        if mine and done_expected is None and self.out_of_turn == self.now_pieces(asked, event):
            done_expected, self.ordered = asked.region, None
        self.follow(self.send(event), done_expected)
        if entry is not None and before is not None:
            after = (entry.miscompares, entry.repaired)
            assert after[0] >= before[0]
            assert before[1] <= after[1] <= after[0]

    def now_pieces(self, asked: Refresh | Check, event: Event) -> int:
        if isinstance(event, Refreshed):
            self.now_count = event.pieces
        return self.now_count

    now_count = 0
    out_of_turn_asked = False

    def follow(self, actions: list[Action], done: str | None = None) -> None:
        told = [action for action in actions if isinstance(action, NowDone)]
        assert [action.region for action in told] == ([] if done is None else [done])
        work = [action for action in actions if not isinstance(action, NowDone)]
        assert len(work) <= 1
        if not work:
            return
        assert self.used_s < BUDGET_S, "work beyond the budget"
        (action,) = work
        assert not isinstance(action, NowDone)
        assert action.region in self.pieces
        self.asked = action
        self.asked_now = self.ordered is not None
        self.out_of_turn_asked = self.asked_now
        if self.ordered is not None:
            assert action.region == self.ordered, "what is out of turn goes first"
            piece = -1 if isinstance(action, Refresh) else action.piece
            assert piece == self.out_of_turn, "piece out of order"
            return
        assert self.all_on, "read while all is off"
        assert self.on[action.region], "a region that is off is read"
        if isinstance(action, Check):
            assert action.piece == self.turn[action.region], "piece out of order"


def walk(steps: int, seed: int) -> None:
    """Send random events; AssertionError when something is read out of order or beyond the budget."""
    model = Model(seed)
    passes = 0
    for _ in range(steps):
        model.step()
        assert model.book.passes >= passes
        passes = model.book.passes
        assert model.book.checking_now == model.ordered
        assert model.book.regions == tuple(model.pieces)
    assert passes > steps // 200, "the walk goes round"
