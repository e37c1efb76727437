"""Any order, any repetition, any batching of ingest gives the same archive; what it acknowledges is true."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from telemetry.ack import decode_ack, encode_ack
from telemetry.archive import Archive
from telemetry.frame import decode_frame, encode_frame
from telemetry.keys import Key, KeyRing
from telemetry.packets import Event, PowerPlan, Severity, Stream

KEY = Key("ground-1", bytes(range(32)))


def _frame(boot: int, stream: Stream, seq: int) -> bytes:
    packet = (
        Event(severity=Severity.INFO, name="a", text=f"{seq}")
        if stream is Stream.EVENT
        else PowerPlan(
            ceiling_w=1.0,
            duty=1.0,
            reason="board",
            battery_soc=None,
            soc_floor=0.2,
            eclipse_entry_ns=None,
            eclipse_exit_ns=None,
        )
    )
    return encode_frame(node="sat-1", boot=boot, seq=seq, t_ns=seq, packet=packet)


IDENTITIES = st.tuples(st.integers(0, 2), st.sampled_from([Stream.EVENT, Stream.PLAN]), st.integers(0, 12))


@settings(max_examples=40, deadline=None)
@given(
    arriving=st.lists(IDENTITIES, min_size=1, max_size=60),
    again=st.randoms(use_true_random=False),
    size=st.integers(1, 20),
)
def test_order_and_repetition_change_nothing(arriving: list, again: object, size: int) -> None:
    frames = [_frame(*identity) for identity in arriving]
    shuffled = frames + frames[: len(frames) // 2]
    again.shuffle(shuffled)  # type: ignore[attr-defined]
    with TemporaryDirectory() as directory:
        first = Archive.open(Path(directory) / "first.db")
        second = Archive.open(Path(directory) / "second.db")
        whole = first.ingest(frames)
        parts = [second.ingest(shuffled[i : i + size]) for i in range(0, len(shuffled), size)]
        assert whole.new == sum(part.new for part in parts) == len(set(arriving))
        assert whole.new + whole.duplicate == len(frames)
        assert sum(part.new + part.duplicate for part in parts) == len(shuffled)
        assert not any(part.rejected or part.conflicting for part in parts)
        assert first.sequences("sat-1") == second.sequences("sat-1")
        assert first.acks("sat-1") == second.acks("sat-1")
        assert set(first.frames("sat-1")) == set(second.frames("sat-1")) == set(frames)
        assert len(second.frames("sat-1")) == len(set(frames))
        covered = {
            (ack.boot, ack.stream, seq)
            for ack in second.acks("sat-1")
            for low, high in decode_ack(encode_ack(ack, KEY), KeyRing([KEY])).ranges()
            for seq in range(low, high + 1)
        }
        assert covered == set(arriving)
        assert second.counts("sat-1") == {
            key: sum(last - low + 1 for low, last in ranges)
            for key, ranges in second.sequences("sat-1").items()
        }
        seqs = [(frame.boot, frame.seq) for frame, _ in second.packets("sat-1", Event)]
        assert seqs == sorted(seqs)
        first.close()
        second.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(IDENTITIES, min_size=1, max_size=30), st.integers(1, 30))
def test_arrival_order_is_kept_for_replay(arriving: list, cut: int) -> None:
    frames = list(dict.fromkeys(_frame(*identity) for identity in arriving))
    with TemporaryDirectory() as directory:
        archive = Archive.open(Path(directory) / "a.db")
        archive.ingest(frames[:cut])
        archive.ingest(frames)
        assert archive.frames("sat-1") == frames
        assert [decode_frame(f) for f in archive.frames("sat-1")] == [decode_frame(f) for f in frames]
        archive.close()
