"""`penumbra campaign run strikes`: thousands of strikes on a decoding worker, in volleys within its epochs.

A volley is a few strikes at random moments of one epoch. Its proof finds them, the epoch is decoded again,
and is committed clean before the next volley: so each strike meets a sound worker but for its neighbours of
the volley, which lie in other parity groups.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from hil.campaign.records import Header, Records
from hil.campaign.strata import Strata, Stratum
from hil.campaign.strike_worker import READY_S, StruckWorker, WorkerSettings
from hil.campaign.strikes import COUNTED, StrikeRecord, Trial, draw
from hil.campaign.texts import Text, make_texts, with_references
from hil.shared_memory import scratch
from node.inference.manifest import image_id, load_manifest
from telemetry.errors import PenumbraError

VOLLEY: Final = 5
"""Mean strikes of a volley."""
TRIES: Final = 8
"""Draws of a trial that find nothing to strike, or no room beside others, before it waits for a volley."""
ATTEMPTS: Final = 50
"""Strikes of a trial that no epoch used, before the campaign is given up."""
EPOCH_BOUND_S: Final = 30.0
"""Longest time to the end of an epoch while the worker lives, s."""
RESTARTS: Final = 50
"""Times the worker may give up before the campaign does."""
NOTE_S: Final = 5.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is struck, and how often."""

    trials: int = 3000
    """Strikes of each stratum that count."""
    seed: int = 1
    settings: WorkerSettings = msgspec.field(default_factory=WorkerSettings)
    strata: tuple[Stratum, ...] = ()
    """Memory that is struck; empty: all that there is."""
    texts: int = 12
    bytes_a_token: int = 4


async def run_strikes(
    image: Path, out: Path, plan: Plan, say: Callable[[str, float], None] = lambda text, part: None
) -> None:
    """Run the campaign, or the rest of it, into a directory.

    Parameters
    ----------
    image
        Directory of the image slot.
    out
        The campaign's directory.
    plan
        What to run.
    say
        Called with what is being done, and the part done, 0 to 1.

    Raises
    ------
    PenumbraError
        The worker does not come up, or gives up too often, or a trial finds nothing to strike.
    """
    manifest = load_manifest(image)
    settings = plan.settings
    header = Header(
        plan="strikes", seed=plan.seed, image_id=image_id(manifest),
        settings={
            "volley": VOLLEY, **msgspec.to_builtins(settings),
            **({"strata": ",".join(plan.strata)} if plan.strata else {}),
        },
    )  # fmt: skip
    with Records(out, header, StrikeRecord) as records:
        say("reference texts", 0.0)
        texts = with_references(
            make_texts(settings.positions, count=plan.texts, bytes_a_token=plan.bytes_a_token),
            image, header.image_id, keep=out, positions=settings.positions, threads=settings.threads,
        )  # fmt: skip
        strata = Strata(manifest, only=plan.strata)
        await Campaign(image=image, records=records, plan=plan, strata=strata, texts=texts, say=say).run()


class Campaign:
    """Leads workers through all trials that are not on record yet."""

    def __init__(
        self,
        *,
        image: Path,
        records: Records[StrikeRecord],
        plan: Plan,
        strata: Strata,
        texts: list[Text],
        say: Callable[[str, float], None],
    ) -> None:
        self._image, self._records, self._plan, self._strata = image, records, plan, strata
        self._texts, self._say = texts, say
        self._total = plan.trials * len(strata.here)
        counted = {record.index for record in records.trials if record.fate in COUNTED}
        self._done = len(counted)
        self._attempts = Counter[int]()
        for record in records.trials:
            self._attempts[record.index] = max(self._attempts[record.index], record.attempt + 1)
        self._waiting = deque(index for index in range(self._total) if index not in counted)
        self._rng = random.Random(f"{plan.seed} {len(records.trials)}")  # noqa: S311 - sizes of volleys

    async def run(self) -> None:
        """Run all trials."""
        generation = 0
        while self._waiting:
            generation += 1
            if generation > RESTARTS:
                raise PenumbraError(f"the worker gave up {RESTARTS} times", "read notes.jsonl: it says why")
            with scratch("strikes") as folder:
                worker = StruckWorker(
                    image=self._image, folder=folder, generation=generation,
                    settings=self._plan.settings, texts=self._texts, strata=self._strata,
                    on_settled=self._settled,
                )  # fmt: skip
                started_s = time.monotonic()
                async with asyncio.TaskGroup() as group:
                    living = group.create_task(worker.run(), name="hil.campaign.worker")
                    try:
                        async with asyncio.timeout(READY_S):
                            await worker.computing.wait()
                        await self._volleys(worker)
                    finally:
                        await worker.stop()
                        await living
                self._note(worker, started_s)
                if worker.failure and not worker.clean:
                    log = (Path(folder) / "worker.log").read_text(errors="replace").strip().splitlines()
                    raise PenumbraError(
                        f"the worker does not come up: {worker.failure}; {' '.join(log[-1:])}"
                    )

    async def _volleys(self, worker: StruckWorker) -> None:
        """Fire until no trial is left, or the worker is gone."""
        noted_s = started_s = time.monotonic()
        while (self._waiting or worker.watch.open) and not worker.failure:
            if not await worker.epoch(EPOCH_BOUND_S):
                worker.failure = worker.failure or f"no epoch ended within {EPOCH_BOUND_S:g} s"
                return
            for stale in worker.watch.stale():
                worker.take_back(stale)
            await self._volley(worker)
            if time.monotonic() - noted_s > NOTE_S:
                noted_s = time.monotonic()
                self._note(worker, started_s)
                self._say(f"strikes: {self._done} of {self._total}", self._done / self._total)

    async def _volley(self, worker: StruckWorker) -> None:
        """Let a few strikes land at random moments of the epoch that begins now."""
        count = min(self._rng.randint(1, 2 * VOLLEY - 1), len(self._waiting))
        trials = [
            draw(self._plan.seed, index, self._attempts[index], self._strata)
            for index in (self._waiting.popleft() for _ in range(count))
        ]
        began_s = time.monotonic()
        for trial in sorted(trials, key=lambda trial: trial.moment):
            rest_s = began_s + trial.moment * self._plan.settings.epoch_s - time.monotonic()
            await asyncio.sleep(max(0.0, rest_s))
            if not self._land(worker, trial):
                self._waiting.appendleft(trial.index)

    def _land(self, worker: StruckWorker, trial: Trial) -> bool:
        for _ in range(TRIES):
            self._attempts[trial.index] += 1
            if worker.strike(trial):
                return True
            trial = draw(self._plan.seed, trial.index, self._attempts[trial.index], self._strata)
        return False

    def _settled(self, settled: list[StrikeRecord]) -> None:
        self._records.add(*settled)
        for record in settled:
            if record.fate in COUNTED:
                self._done += 1
            elif self._attempts[record.index] > ATTEMPTS * TRIES:
                raise PenumbraError(
                    f"trial {record.index} ({record.stratum.value}): no epoch uses what it hits"
                )
            else:
                self._waiting.append(record.index)

    def _note(self, worker: StruckWorker, started_s: float, *, last: bool = False) -> None:
        """Note what the worker did so far: the last note of a worker counts."""
        tokens, unexplained = worker.tokens, worker.watch.unexplained
        self._records.note(
            worker=worker.name, released=tokens.released, wrong=tokens.wrong, jobs=tokens.jobs,
            wrong_ends=tokens.wrong_ends, epochs=worker.clean, dirty=worker.dirty, unsure=worker.unsure,
            unexplained=len(unexplained), first_unexplained=str(unexplained[0]) if unexplained else None,
            wall_s=round(time.monotonic() - started_s, 3), ended=worker.failure or None,
        )  # fmt: skip
