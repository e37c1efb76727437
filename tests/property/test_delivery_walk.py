"""Node, broker and ground together: kills, cuts, reorderings, repetitions; the invariants I1 to I8 as oracle.

The flight's own spool, downlink window and messages, the ground's own archive and acknowledgements; only the
way between is a model: two bags of messages, from which anything comes out at any time, or never, or twice,
or damaged. Of each invariant (reference/fsw.md section 6) the name stands where it is checked.
"""

from __future__ import annotations

import sqlite3
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from node.downlink import DownlinkWindow, Message, Turns, messages
from telemetry.ack import AckError, decode_ack, encode_ack
from telemetry.archive import Archive
from telemetry.block import BlockError, frames_in
from telemetry.fdir_merge import both_ends, counted
from telemetry.frame import FrameError, decode_frame
from telemetry.keys import Key, KeyRing
from telemetry.ledger import reconcile, to_ranges
from telemetry.packets import PRIORITY, Event, FdirReport, Level, Outcome, Packet, Severity, Stream
from telemetry.packets import ProductChunk as Chunk
from telemetry.spool import Spool, SpoolRefused
from telemetry.spool_policy import REPORT_BYTES, DropReason

NODE = "sat-1"
KEY = Key("k", b"k" * 32)
RING = KeyRing([KEY])
CAPACITY = 9_000
"""Chunks leave half of it: enough for a report of each of the two rows, so none is dropped."""
Identity = tuple[int, Stream, int]

EVENTS = st.builds(
    Event, severity=st.just(Severity.LOW), name=st.just("a"), text=st.text(max_size=200), evidence=st.just({})
)
FINDINGS = st.builds(
    FdirReport,
    monitor=st.sampled_from(["m", "n"]),
    level=st.just(Level.IN_WORKER_REPAIR),
    outcome=st.just(Outcome.REPAIRED),
    action=st.just("repair"),
    detected_ns=st.integers(0, 10**18),
    recovered_ns=st.none(),
    evidence=st.dictionaries(st.sampled_from("ab"), st.text(max_size=300), max_size=2),
)
CHUNKS = st.builds(
    Chunk, product=st.just("dump"), index=st.integers(0, 99), data=st.binary(min_size=0, max_size=800)
)


class DeliveryWalk(RuleBasedStateMachine):
    """One node, one ground, and a broker that promises nothing."""

    @initialize()
    def start(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        root = Path(self.directory.name)
        self.archive_path = root / "archive.db"
        self.connection = sqlite3.connect(root / "node.db", isolation_level=None)
        self.connection.execute("PRAGMA synchronous=OFF")
        self.archive = Archive.open(self.archive_path)
        self.boot = 0
        self.now_s = 0.0
        self.generated: dict[Identity, Packet | None] = {}
        """What was stored, None for what the spool itself made by merging."""
        self.found: dict[tuple[str, int], list[FdirReport]] = {}
        """What the FDIR found, by row and boot, in order."""
        self.down: list[Message] = []
        self.up: list[bytes] = []
        self.was_archived: set[Identity] = set()
        self.kill_node()

    def teardown(self) -> None:
        if hasattr(self, "connection"):
            self.peace()
            self.connection.close()
            self.archive.close()
            self.directory.cleanup()

    # --- what happens ---------------------------------------------------------------------------

    @rule()
    def kill_node(self) -> None:
        self.boot += 1
        self.spool = Spool(NODE, self.boot, CAPACITY)
        self.spool.create(self.connection)
        self.window, self.turns = DownlinkWindow(64, 5.0), Turns()

    @rule()
    def kill_ground(self) -> None:
        self.archive.close()
        self.archive = Archive.open(self.archive_path)

    @rule()
    def kill_broker(self) -> None:
        self.down.clear()
        self.up.clear()
        self.window.on_disconnected()

    @rule(packets=st.lists(EVENTS | FINDINGS | CHUNKS, min_size=1, max_size=12))
    def generate(self, packets: list[Packet]) -> None:
        for packet in packets:
            lowest = sum((b, s) == (self.boot, packet.stream) for b, s, _ in self.generated)
            self.connection.execute("BEGIN")
            try:
                seq = self.spool.append(self.connection, packet, 0)
                self.connection.execute("COMMIT")
            except SpoolRefused:
                self.connection.execute("ROLLBACK")
                # I8: products are refused when the store fills, findings of the FDIR never.
                assert packet.stream is not Stream.FDIR
                continue
            assert seq == lowest  # I1: no gap at generation, over restarts as well.
            (upto,) = (
                entry.generated
                for entry in self.spool.ledger(self.connection)
                if (entry.boot, entry.stream) == (self.boot, packet.stream)
            )
            assert packet.stream is Stream.FDIR or upto == seq + 1
            for number in range(seq, upto):
                self.generated[self.boot, packet.stream, number] = packet if number == seq else None
            if isinstance(packet, FdirReport):
                self.found.setdefault((packet.monitor, self.boot), []).append(packet)

    @rule(findings=st.lists(FINDINGS, min_size=1, max_size=3), times=st.integers(2, 10))
    def find_much(self, findings: list[Packet], times: int) -> None:
        """A storm of reports, for which the store is too small."""
        self.generate(findings * times)

    @rule(limit=st.integers(1, 40), later_s=st.floats(0, 8))
    def send(self, limit: int, later_s: float) -> None:
        self.now_s += later_s
        waiting, first = self.window.waiting(self.now_s), self.turns.next()
        room = min(limit, self.window.room(self.now_s))
        records = self.spool.batch(self.connection, room, waiting, first=first) if room else []
        order = [PRIORITY[r.stream] for r in records]
        # I7: most urgent first, but for the one record that the floor rate of bulk may put ahead.
        assert order[1:] == sorted(order[1:]) or order == sorted(order)
        assert not records or records[0].stream is first or order == sorted(order)
        made = messages(NODE, records)
        assert sorted(r.rowid for m in made for r in m.records) == sorted(r.rowid for r in records)
        for record in records:
            self.window.on_sent(record, self.now_s)
        self.down += made

    @rule(data=st.data(), again=st.booleans())
    @precondition(lambda self: self.down)
    def deliver(self, data: st.DataObject, again: bool) -> None:
        """Any message, in any order, and it may come again later."""
        at = data.draw(st.integers(0, len(self.down) - 1))
        message = self.down[at] if again else self.down.pop(at)
        self.take(message.topic, message.payload)

    @rule(data=st.data())
    @precondition(lambda self: self.down)
    def damage(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.down) - 1))
        message = self.down.pop(at)
        struck = bytearray(message.payload)
        bit = data.draw(st.integers(0, 8 * len(struck) - 1))
        struck[bit // 8] ^= 1 << bit % 8
        before = self.archive.sequences(NODE)
        self.take(message.topic, bytes(struck))
        assert self.archive.sequences(NODE) == before

    @rule(data=st.data())
    @precondition(lambda self: self.down)
    def lose(self, data: st.DataObject) -> None:
        self.down.pop(data.draw(st.integers(0, len(self.down) - 1)))

    def take(self, topic: str, payload: bytes) -> None:
        try:
            frames = frames_in(topic, payload)
            for frame in frames:
                decode_frame(frame)
        except (BlockError, FrameError):
            return
        before = self.archive.sequences(NODE)
        done = self.archive.ingest(frames)
        assert done.rejected == done.conflicting == 0
        if done.new == 0:
            assert self.archive.sequences(NODE) == before  # I5: told twice is told once.
        # I6: however late, nothing is refused.
        assert done.new + done.duplicate == len(frames)

    @rule(times=st.integers(1, 2))
    def acknowledge(self, times: int) -> None:
        self.up += [encode_ack(ack, KEY) for ack in self.archive.acks(NODE)] * times

    @rule(data=st.data(), damaged=st.booleans())
    @precondition(lambda self: self.up)
    def hear(self, data: st.DataObject, damaged: bool) -> None:
        payload = self.up.pop(data.draw(st.integers(0, len(self.up) - 1)))
        if damaged:
            struck = bytearray(payload)
            struck[len(struck) // 2] ^= 4
            payload = bytes(struck)
        try:
            ack = decode_ack(payload, RING)
        except AckError:
            assert damaged
            return
        assert not damaged
        self.window.on_ack(ack)
        self.connection.execute("BEGIN")
        self.spool.acknowledge(self.connection, ack)
        self.connection.execute("COMMIT")

    # --- what must hold -------------------------------------------------------------------------

    def identities(self) -> tuple[set[Identity], set[Identity], set[Identity]]:
        """Return what is archived, stored and dropped."""
        archived = {
            (boot, stream, seq)
            for (boot, stream), ranges in self.archive.sequences(NODE).items()
            for first, last in ranges
            for seq in range(first, last + 1)
        }
        stored = {
            (boot, stream, seq)
            for (boot, stream), seqs in self.spool.stored_sequences(self.connection).items()
            for seq in seqs
        }
        dropped = {
            (r.boot, r.stream, seq)
            for r in self.spool.dropped_ranges(self.connection)
            for seq in range(r.first, r.last + 1)
        }
        return archived, stored, dropped

    @invariant()
    def nothing_is_lost_and_the_books_agree(self) -> None:
        if not hasattr(self, "spool"):
            return
        archived, stored, dropped = self.identities()
        self.what_the_fdir_found_is_reported()
        # I3, I4: what was durable is archived, or stored, or counted as dropped: never just gone.
        assert set(self.generated) == archived | stored | dropped
        assert self.was_archived <= archived
        self.was_archived = archived
        # I8: a report of the FDIR is merged, not dropped.
        assert all(
            r.reason is DropReason.MERGED
            for r in self.spool.dropped_ranges(self.connection)
            if r.stream is Stream.FDIR
        )
        # I2: both sides' books, record by record.
        check = reconcile(
            self.spool.ledger(self.connection),
            self.archive.sequences(NODE),
            stored=_ranges(stored),
            dropped=_ranges(dropped),
            duplicated=self.archive.conflicts(NODE),
            final=True,
        )
        assert check.problems == []
        assert check.lost == 0

    def what_the_fdir_found_is_reported(self) -> None:
        """I8: the ground and the store together count every finding once, and hold both ends."""
        reports = [report for _, report in self.archive.packets(NODE, FdirReport)]
        for record in self.spool.batch(self.connection, 10_000, set()):
            if record.stream is Stream.FDIR:
                assert len(record.frame) <= REPORT_BYTES
                report = decode_frame(record.frame).packet()
                assert isinstance(report, FdirReport)
                reports.append(report)
        for report in reports:
            (boot, first, _), (last_boot, _, last) = report.covers[0], report.covers[-1]
            ends = [
                self.found[report.monitor, boot][first - 1],
                self.found[report.monitor, last_boot][last - 1],
            ]
            assert report.count == sum(high - low + 1 for _, low, high in report.covers)
            for told, was in zip(both_ends(report), ends[-1:] if report.count == 1 else ends, strict=True):
                cut = "evidence_cut" in report.evidence
                assert replace(told, covers=[], evidence=was.evidence if cut else told.evidence) == was
        assert counted(reports) == sum(map(len, self.found.values()))

    def peace(self) -> None:
        """Leave it alone: everything comes down, once, and with its content."""
        for _ in range(200):
            self.now_s += 1000.0
            records = self.spool.batch(self.connection, 256, self.window.waiting(self.now_s))
            for message in messages(NODE, records):
                self.take(message.topic, message.payload)
            for ack in self.archive.acks(NODE):
                self.spool.acknowledge(self.connection, ack)
            if not records:
                break
        archived, stored, dropped = self.identities()
        assert not stored
        assert archived | dropped == set(self.generated)
        frames = [decode_frame(data) for data in self.archive.frames(NODE)]
        assert len(frames) == len(archived)
        for frame in frames:
            if frame.stream is not Stream.FDIR:
                assert frame.packet() == self.generated[frame.boot, frame.stream, frame.seq]
        self.what_the_fdir_found_is_reported()


def _ranges(identities: set[Identity]) -> dict[tuple[int, Stream], list[tuple[int, int]]]:
    found: dict[tuple[int, Stream], set[int]] = {}
    for boot, stream, seq in identities:
        found.setdefault((boot, stream), set()).add(seq)
    return {key: to_ranges(seqs) for key, seqs in found.items()}


TestDeliveryWalk = DeliveryWalk.TestCase
TestDeliveryWalk.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
