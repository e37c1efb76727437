"""Random walks of the spool: generated = acked + stored + dropped, no gap, no number twice, no loss."""

from __future__ import annotations

import sqlite3
from typing import Any

import strategies
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from telemetry.ack import MAX_GAPS, Ack
from telemetry.fdir_merge import kind_of
from telemetry.frame import decode_frame
from telemetry.ledger import to_ranges
from telemetry.packets import FdirReport, Packet, Stream
from telemetry.spool import Spool, SpoolRefused
from telemetry.spool_policy import GIVES_WAY, PROTECTED, REFUSED_ABOVE, DropReason

NODE = "sat-1"
Identity = tuple[int, Stream, int]


class SpoolWalk(RuleBasedStateMachine):
    """The spool against a model: sets of identities generated, archived by a ground, dropped."""

    @initialize(capacity=st.integers(400, 20_000))
    def start(self, capacity: int) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        self.capacity = capacity
        self.boot = 0
        self.generated: set[Identity] = set()
        self.archived: set[Identity] = set()
        self.acked: set[Identity] = set()
        self.on_the_way: list[tuple[Identity, int]] = []
        self.reports: set[Identity] = set()
        self.restart()

    def teardown(self) -> None:
        if hasattr(self, "connection"):
            self.connection.close()

    @rule()
    def restart(self) -> None:
        self.boot += 1
        self.spool = Spool(NODE, self.boot, self.capacity)
        self.spool.create(self.connection)
        self.on_the_way.clear()

    @rule(packet=strategies.packets, times=st.integers(1, 6))
    def append(self, packet: Packet, times: int) -> None:
        for _ in range(times):
            self.append_one(packet)

    def append_one(self, packet: Packet) -> None:
        before = self.dropped()
        expected = sum((b, s) == (self.boot, packet.stream) for b, s, _ in self.generated)
        self.connection.execute("SAVEPOINT walk")
        try:
            seq = self.spool.append(self.connection, packet, 0)
        except SpoolRefused:
            assert packet.stream in REFUSED_ABOVE
            self.connection.execute("ROLLBACK TO walk")
            self.connection.execute("RELEASE walk")
            return
        self.connection.execute("RELEASE walk")
        assert seq == expected
        self.note_generated(packet.stream, seq)
        self.check_policy(packet, {i: r for i, r in self.dropped().items() if i not in before}, seq)

    @rule(packets=st.lists(strategies.packets, min_size=1, max_size=6))
    def append_together(self, packets: list[Packet]) -> None:
        expected = {
            p.stream: sum((b, s) == (self.boot, p.stream) for b, s, _ in self.generated) for p in packets
        }
        self.connection.execute("SAVEPOINT walk")
        try:
            seqs = self.spool.append_many(self.connection, [(packet, 0) for packet in packets])
        except SpoolRefused:
            assert any(packet.stream in REFUSED_ABOVE for packet in packets)
            self.connection.execute("ROLLBACK TO walk")
            self.connection.execute("RELEASE walk")
            return
        self.connection.execute("RELEASE walk")
        for packet, seq in zip(packets, seqs, strict=True):
            assert seq >= expected[packet.stream]
            expected[packet.stream] = seq + 1
        for stream in expected:
            self.note_generated(stream, 0)

    def note_generated(self, stream: Stream, first: int) -> None:
        """Note new numbers of this boot: for a packet, and for what was merged to make room for it."""
        (upto,) = (
            entry.generated
            for entry in self.spool.ledger(self.connection)
            if (entry.boot, entry.stream) == (self.boot, stream)
        )
        assert stream is Stream.FDIR or first in {0, upto - 1}
        self.generated |= {(self.boot, stream, seq) for seq in range(first, upto)}

    def check_policy(self, packet: Packet, drops: dict[Identity, DropReason], seq: int) -> None:
        own = (self.boot, packet.stream, seq)
        merged = {identity for identity, reason in drops.items() if reason is DropReason.MERGED}
        assert set(drops.values()) <= {DropReason.FULL, DropReason.TOO_LARGE, DropReason.MERGED}
        for _, stream, _ in merged:
            assert stream is packet.stream is Stream.FDIR
        others = drops.keys() - merged - {own}
        for identity in others:
            assert identity[1] not in REFUSED_ABOVE
            if identity[1] in PROTECTED:
                assert packet.stream in PROTECTED
                assert not any(s in GIVES_WAY for _, s, _ in self.stored() - {own})
            # Of the FDIR a flight record or a status: a report gives way to nothing.
            assert identity not in self.reports
        if isinstance(packet, FdirReport):
            if drops.get(own) is DropReason.FULL:
                self.check_nothing_else_was_left()
            self.reports.add(own)
        if merged:
            self.reports |= {
                i for i in self.stored() if i[1] is Stream.FDIR and i[0] == self.boot and i[2] > seq
            }

    def check_nothing_else_was_left(self) -> None:
        """A report was dropped: then there are but results, products, and one report of a row and outcome."""
        assert {stream for _, stream, _ in self.stored()} <= {Stream.FDIR, *REFUSED_ABOVE}
        kinds = []
        for (frame,) in self.connection.execute("SELECT frame FROM spool_record WHERE stream = 'fdir'"):
            report = decode_frame(frame).packet()
            assert isinstance(report, FdirReport)
            kinds.append(kind_of(report))
        assert len(kinds) == len(set(kinds))

    @rule(
        limit=st.integers(1, 20),
        max_bytes=st.none() | st.integers(1, 3000),
        first=st.none() | strategies.streams,
        data=st.data(),
    )
    def send(self, limit: int, max_bytes: int | None, first: Stream | None, data: st.DataObject) -> None:
        excluded = {rowid for _, rowid in self.on_the_way}
        batch = self.spool.batch(self.connection, limit, excluded, max_bytes=max_bytes, first=first)
        assert not excluded & {record.rowid for record in batch}
        frames = [decode_frame(record.frame) for record in batch]
        assert len(batch) <= 1 or max_bytes is None or sum(len(r.frame) for r in batch) <= max_bytes
        waiting = {i for i in self.stored() if i not in {identity for identity, _ in self.on_the_way}}
        of_first = sorted((b, q) for b, s, q in waiting if s is first)
        order = [(f.priority, f.boot, f.seq) for f in frames]
        if of_first:
            assert (frames[0].stream, frames[0].boot, frames[0].seq) == (first, *of_first[0])
            order = order[1:]
        assert order == sorted(order)
        for record in batch:
            identity = (record.boot, record.stream, record.seq)
            self.on_the_way.append((identity, record.rowid))
            if data.draw(st.booleans(), label="arrives"):
                self.archived.add(identity)

    @rule()
    def forget_the_way(self) -> None:
        self.on_the_way.clear()

    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        keys = sorted({(b, s) for b, s, _ in self.archived})
        if not keys:
            return
        boot, stream = data.draw(st.sampled_from(keys))
        held = sorted(seq for b, s, seq in self.archived if (b, s) == (boot, stream))
        upto = held[-1] + 1
        gaps = to_ranges(set(range(upto)) - set(held))
        assert len(gaps) <= MAX_GAPS
        ack = Ack(node=NODE, boot=boot, stream=stream, upto=upto, gaps=gaps)
        stored = {seq for b, s, seq in self.stored() if (b, s) == (boot, stream)}
        assert self.spool.acknowledge(self.connection, ack) == len(stored & set(held))
        assert self.spool.acknowledge(self.connection, ack) == 0
        self.acked |= {(boot, stream, seq) for seq in held}

    @rule(beyond=st.integers(1, 5), stream=strategies.streams)
    def acknowledge_what_never_was(self, beyond: int, stream: Stream) -> None:
        known = sum((b, s) == (self.boot, stream) for b, s, _ in self.generated)
        ack = Ack(node=NODE, boot=self.boot, stream=stream, upto=known + beyond)
        assert self.spool.acknowledge(self.connection, ack) == 0
        other = Ack(node="sat-2", boot=self.boot, stream=stream, upto=known)
        assert self.spool.acknowledge(self.connection, other) == 0

    @rule(data=st.data())
    def strike(self, data: st.DataObject) -> None:
        stored = self.connection.execute(
            "SELECT rowid, boot, stream, seq, frame FROM spool_record"
        ).fetchall()
        if not stored:
            return
        rowid, boot, stream, seq, frame = data.draw(st.sampled_from(stored))
        bit = data.draw(st.integers(0, 8 * len(frame) - 1))
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        self.connection.execute("UPDATE spool_record SET frame = ? WHERE rowid = ?", (bytes(flipped), rowid))
        self.spool.batch(self.connection, len(stored), set())
        assert self.dropped()[boot, Stream(stream), seq] is DropReason.CORRUPT

    def stored(self) -> set[Identity]:
        held = self.spool.stored_sequences(self.connection)
        return {(boot, stream, seq) for (boot, stream), seqs in held.items() for seq in seqs}

    def dropped(self) -> dict[Identity, DropReason]:
        ranges = self.spool.dropped_ranges(self.connection)
        pairs: list[tuple[Any, DropReason]] = [
            ((r.boot, r.stream, seq), r.reason) for r in ranges for seq in range(r.first, r.last + 1)
        ]
        assert len(pairs) == len(dict(pairs))
        return dict(pairs)

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "spool"):
            return
        stored, dropped = self.stored(), self.dropped().keys()
        assert stored | dropped | self.acked == self.generated
        assert not stored & dropped
        assert not stored & self.acked
        assert not dropped & self.acked
        entries = self.spool.ledger(self.connection)
        for entry in entries:
            assert entry.generated == entry.acked + entry.stored + sum(entry.dropped.values())
        assert sum(entry.generated for entry in entries) == len(self.generated)
        assert sum(entry.acked for entry in entries) == len(self.acked)
        records, size = self.spool.size(self.connection)
        assert records == len(stored)
        assert (
            size
            == self.connection.execute("SELECT COALESCE(SUM(LENGTH(frame)), 0) FROM spool_record").fetchone()[
                0
            ]
        )
        assert size <= self.capacity


TestSpoolWalk = SpoolWalk.TestCase
TestSpoolWalk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
