"""The archive: what it acknowledges it has, what it cannot read it keeps, what is damaged it refuses."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from telemetry import frame as frame_module
from telemetry.ack import MAX_GAPS, Ack
from telemetry.archive import Archive
from telemetry.database import StoreFull
from telemetry.errors import PenumbraError
from telemetry.frame import decode_frame, encode_frame
from telemetry.packets import Certificate, Event, Ledger, Packet, PowerPlan, Result, Severity, Stream


def frame(seq: int, packet: Packet | None = None, *, boot: int = 1, node: str = "sat-1") -> bytes:
    packet = packet or Event(severity=Severity.INFO, name="a", text=f"{seq}")
    return encode_frame(node=node, boot=boot, seq=seq, t_ns=0, packet=packet)


def result(job: str, first: int) -> Result:
    certificate = Certificate(image_id="i", epoch=0, kv_digest=b"8" * 8, chain=b"c" * 32)
    return Result(job=job, first=first, tokens=[1], text=b"t", certificate=certificate)


@pytest.fixture
def archive(tmp_path: Path):
    archive = Archive.open(tmp_path / "archive.db")
    yield archive
    archive.close()


def test_gaps_and_late_data(archive: Archive) -> None:
    archive.ingest([frame(0), frame(1), frame(5), frame(9)])
    (ack,) = archive.acks("sat-1")
    assert ack == Ack(node="sat-1", boot=1, stream=Stream.EVENT, upto=10, gaps=[(2, 4), (6, 8)])
    done = archive.ingest([frame(3), frame(2), frame(3)])
    assert (done.new, done.duplicate, done.rejected, done.conflicting) == (2, 1, 0, 0)
    (ack,) = archive.acks("sat-1")
    assert ack.gaps == [(4, 4), (6, 8)]


def test_what_never_came_from_zero_is_a_gap(archive: Archive) -> None:
    archive.ingest([frame(4)])
    assert archive.acks("sat-1")[0].gaps == [(0, 3)]


def test_acknowledgements_only_of_what_was_touched(archive: Archive) -> None:
    archive.ingest([frame(0), frame(0, boot=2), frame(0, node="sat-2")])
    done = archive.ingest([frame(0, boot=2), b"garbage"])
    assert done.touched == {("sat-1", 2, Stream.EVENT)}
    assert done.rejected == 1
    acks = archive.acks("sat-1", [(boot, stream) for node, boot, stream in done.touched])
    assert [(ack.boot, ack.upto) for ack in acks] == [(2, 1)]
    assert len(archive.acks("sat-1")) == 2
    assert archive.nodes() == ["sat-1", "sat-2"]


def test_an_archive_with_too_many_gaps_acknowledges_less(archive: Archive) -> None:
    archive.ingest([frame(2 * i) for i in range(MAX_GAPS + 5)])
    (ack,) = archive.acks("sat-1")
    assert len(ack.gaps) == MAX_GAPS
    assert ack.upto == 2 * MAX_GAPS + 1


def test_two_contents_under_one_identity_are_both_kept_and_counted(archive: Archive) -> None:
    other = frame(0, Event(severity=Severity.INFO, name="a", text="another"))
    archive.ingest([frame(0)])
    done = archive.ingest([other, other])
    assert (done.new, done.duplicate, done.conflicting) == (0, 0, 2)
    assert archive.conflicts("sat-1") == 1
    assert archive.frames("sat-1") == [frame(0)]
    assert archive.conflicts("sat-2") == 0


def test_a_packet_from_a_newer_node_is_archived_and_acknowledged(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = frame(0)
    archive.ingest([unknown, frame(1)])
    monkeypatch.delitem(frame_module.BY_TYPE, "event")
    archive.ingest([frame_for_unknown_type()])
    assert archive.packets("sat-1", Event) == []
    assert archive.frames("sat-1")[:2] == [unknown, frame(1)]
    assert archive.acks("sat-1")[0].upto == 3


def frame_for_unknown_type() -> bytes:
    return frame(2)


def test_packets_results_and_the_last_ledger(archive: Archive) -> None:
    assert archive.last_ledger("sat-1") is None
    archive.ingest([frame(1, result("b", 8)), frame(0, result("b", 0)), frame(2, result("a", 0))])
    archive.ingest([frame(0, Ledger(streams=[]), boot=2), frame(5, Ledger(streams=[]), boot=1)])
    results = archive.results("sat-1")
    assert {job: [block.first for block in blocks] for job, blocks in results.items()} == {
        "b": [0, 8],
        "a": [0],
    }
    assert archive.packets("sat-1", PowerPlan) == []
    ledgers = archive.packets("sat-1", Ledger)
    assert [found.boot for found, _ in ledgers] == [1, 2]
    assert archive.last_ledger("sat-1") == ledgers[-1][1]
    assert archive.counts("sat-1") == {
        (1, Stream.RESULT): 3,
        (1, Stream.LEDGER): 1,
        (2, Stream.LEDGER): 1,
    }


def test_it_survives_closing(tmp_path: Path) -> None:
    path = tmp_path / "archive.db"
    first = Archive.open(path)
    first.ingest([frame(0), frame(1)])
    first.close()
    second = Archive.open(path)
    assert second.ingest([frame(1), frame(2)]).new == 1
    assert second.sequences("sat-1") == {(1, Stream.EVENT): [(0, 2)]}
    second.close()


def test_a_full_disk_archives_and_acknowledges_nothing_of_the_batch(archive: Archive) -> None:
    archive.ingest([frame(0)])
    archive._connection.execute("PRAGMA max_page_count = 12")
    batch = [frame(seq, Event(severity=Severity.INFO, name="a", text="x" * 2000)) for seq in range(1, 60)]
    with pytest.raises(StoreFull):
        archive.ingest(batch)
    assert archive.sequences("sat-1") == {(1, Stream.EVENT): [(0, 0)]}
    archive._connection.execute("PRAGMA max_page_count = 10000")
    assert archive.ingest(batch).new == 59


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(PenumbraError, match=r"none/archive\.db"):
        Archive.open(tmp_path / "none" / "archive.db")
    path = tmp_path / "archive.db"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(PenumbraError, match="not a database"):
        Archive.open(path)
    assert path.read_bytes() == b"no database" * 1000


def files(directory: Path) -> dict[str, bytes]:
    """Return what is in a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def another_programs(path: Path, mode: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA journal_mode={mode}")
    connection.execute("CREATE TABLE mine (x)")
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Path.touch, "it is empty"),
        (lambda path: path.write_bytes(b"no database" * 1000), "not a database"),
        (lambda path: another_programs(path, "DELETE"), "no table of frames"),
        (Path.mkdir, "not a regular file"),
        (os.mkfifo, "not a regular file"),
        (lambda _: None, "no such file"),
    ],
    ids=["empty", "garbage", "another database", "directory", "fifo", "nothing"],
)
def test_what_is_no_archive_is_refused_for_reading_and_left_as_it_is(
    tmp_path: Path, make: Callable[[Path], object], says: str
) -> None:
    path = tmp_path / "it.db"
    make(path)
    before = files(tmp_path)
    with pytest.raises(PenumbraError, match=says) as caught:
        Archive.read(path)
    assert str(path) in caught.value.what
    assert files(tmp_path) == before


def test_another_programs_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "it.db"
    another_programs(path, "DELETE")
    before = files(tmp_path)
    with pytest.raises(PenumbraError, match="no table of frames"):
        Archive.open(path)
    assert files(tmp_path) == before


def test_an_archive_is_read_while_a_station_writes_it_and_cannot_be_written_so(tmp_path: Path) -> None:
    path = tmp_path / "it # of 50 %?.db"
    writing = Archive.open(path)
    writing.ingest([frame(0)])
    reading = Archive.read(path)
    writing.ingest([frame(1)])
    assert reading.sequences("sat-1") == {(1, Stream.EVENT): [(0, 1)]}
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reading.ingest([frame(2)])
    reading.close()
    writing.close()


def test_an_archive_is_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "archive.db"
    opened = Archive.open(path)
    opened.ingest([frame(0)])
    opened.close()
    monkeypatch.setattr(os, "access", lambda *_: False)  # A mode would not hold back root.
    before = files(tmp_path)
    reading = Archive.read(path)
    assert reading.sequences("sat-1") == {(1, Stream.EVENT): [(0, 0)]}
    reading.close()
    assert files(tmp_path) == before


def test_the_raw_frames_are_what_was_received(archive: Archive) -> None:
    archive.ingest([frame(1), frame(0)])
    assert [decode_frame(data).seq for data in archive.frames("sat-1")] == [1, 0]
    assert msgspec.msgpack.decode(decode_frame(archive.frames("sat-1")[0]).body)["text"] == "1"
