"""SIGKILL at random moments: no gap, no number used twice, nothing lost, the ledger balanced."""

from __future__ import annotations

import os
import random
import selectors
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from telemetry.database import Database
from telemetry.frame import decode_frame
from telemetry.ledger import reconcile, to_ranges
from telemetry.packets import Stream
from telemetry.spool import Spool

ROUNDS = 14
CAPACITY = 60_000

WRITER = """
import asyncio, os, random, sys
from pathlib import Path
from telemetry.ack import Ack
from telemetry.database import Database
from telemetry.packets import Certificate, Event, PowerPlan, Result, Severity, Stream
from telemetry.spool import Spool, SpoolRefused

path, boot, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def packet(stream):
    padding = "x" * chance.randrange(400)
    if stream is Stream.EVENT:
        return Event(severity=Severity.LOW, name="a", text=padding)
    if stream is Stream.PLAN:
        return PowerPlan(ceiling_w=1.0, duty=1.0, reason=padding, battery_soc=None, soc_floor=0.1,
                         eclipse_entry_ns=None, eclipse_exit_ns=None)
    certificate = Certificate(image_id="i", epoch=0, kv_digest=b"8" * 8, chain=b"c" * 32)
    return Result(job="j", first=0, tokens=[1], text=padding.encode(), certificate=certificate)

async def producer(database, spool, stream):
    while True:
        one = packet(stream)
        try:
            seq = await database.run(lambda c: spool.append(c, one, 0))
        except SpoolRefused:
            await asyncio.sleep(0.001)
            continue
        say("generated", boot, stream.value, seq)

async def ground(database, spool):
    while True:
        await asyncio.sleep(0.004)
        batch = await database.run(lambda c: spool.batch(c, 12, set()))
        held = {}
        for record in batch:
            held.setdefault((record.boot, record.stream), []).append(record.seq)
        for (b, stream), seqs in held.items():
            upto = max(seqs) + 1
            missing = sorted(set(range(min(seqs), upto)) - set(seqs))
            gaps = ([(0, min(seqs) - 1)] if min(seqs) else [])
            for seq in missing:
                if gaps and gaps[-1][1] == seq - 1:
                    gaps[-1] = (gaps[-1][0], seq)
                else:
                    gaps.append((seq, seq))
            for seq in seqs:
                say("archived", b, stream.value, seq)
            ack = Ack(node="sat-1", boot=b, stream=stream, upto=upto, gaps=gaps)
            await database.run(lambda c: spool.acknowledge(c, ack))

async def main():
    database = await Database.open(path)
    spool = Spool("sat-1", boot, int(sys.argv[4]))
    await database.run(spool.create)
    async with asyncio.TaskGroup() as group:
        for stream in (Stream.EVENT, Stream.PLAN, Stream.RESULT):
            for _ in range(3):
                group.create_task(producer(database, spool, stream))
        group.create_task(ground(database, spool))

asyncio.run(main())
"""


def run_and_kill(path: Path, boot: int, seed: int, after_s: float) -> list[list[str]]:
    """Start the writer, SIGKILL it `after_s` after its first word, return what it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(boot), str(seed), str(CAPACITY)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    said = b""
    deadline: float | None = None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        give_up = time.monotonic() + 30
        while deadline is None or time.monotonic() < deadline:
            assert time.monotonic() < give_up, "the writer said nothing"
            if selector.select(0.002):
                said += os.read(process.stdout.fileno(), 1 << 16)
                deadline = deadline or time.monotonic() + after_s
    process.send_signal(signal.SIGKILL)
    said += process.stdout.read()
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    whole_lines = said.decode().rsplit("\n", 1)[0]
    return [line.split() for line in whole_lines.split("\n")]


@pytest.mark.parametrize("seed", [1, 2])
async def test_kill_at_random_moments(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    path = tmp_path / "node.db"
    said: dict[str, list[tuple[int, Stream, int]]] = defaultdict(list)
    boot = 1
    for round_ in range(ROUNDS):
        for word, *identity in run_and_kill(path, boot, 100 * seed + round_, chance.uniform(0, 0.12)):
            said[word].append((int(identity[0]), Stream(identity[1]), int(identity[2])))
        # A boot number used again must go on counting; a new one starts from 0.
        boot += chance.randrange(2)

    assert len(said["generated"]) > 500
    assert len(said["generated"]) == len(set(said["generated"])), "a sequence number was used twice"

    database = await Database.open(path)
    assert database.recovered_from is None
    spool = Spool("sat-1", boot, CAPACITY)
    await database.run(spool.create)
    ledger = await database.run(spool.ledger)
    stored = await database.run(spool.stored_sequences)
    ranges = await database.run(spool.dropped_ranges)
    records = await database.run(lambda c: spool.batch(c, 10**6, set()))
    await database.close()

    dropped = {(r.boot, r.stream, seq) for r in ranges for seq in range(r.first, r.last + 1)}
    held = {(boot, stream, seq) for (boot, stream), seqs in stored.items() for seq in seqs}
    archived = set(said["archived"])
    generated = {(e.boot, e.stream, seq) for e in ledger for seq in range(e.generated)}
    assert set(said["generated"]) <= generated, "what was promised durable is gone"
    assert generated - held - dropped <= archived, "deleted without an acknowledgement"
    assert not held & dropped
    assert len(records) == len(held)
    for record in records:
        frame = decode_frame(record.frame)
        assert (frame.boot, frame.stream, frame.seq) == (record.boot, record.stream, record.seq)

    def by_stream(
        identities: set[tuple[int, Stream, int]],
    ) -> dict[tuple[int, Stream], list[tuple[int, int]]]:
        found: dict[tuple[int, Stream], set[int]] = defaultdict(set)
        for boot, stream, seq in identities:
            found[boot, stream].add(seq)
        return {key: to_ranges(seqs) for key, seqs in found.items()}

    check = reconcile(
        ledger, by_stream(archived), stored=by_stream(held), dropped=by_stream(dropped), final=True
    )
    assert check.problems == []
    assert check.lost == 0
    assert check.generated == check.acked + check.stored + check.dropped
    assert check.acked > 0
