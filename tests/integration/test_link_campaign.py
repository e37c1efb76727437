"""The campaign against the space link: a few schedules as a user runs them, and its judge."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from hil.campaign import link_run
from hil.campaign.link_ends import ARCHIVE_DB, NODE_DB
from hil.campaign.link_run import LinkRecord, _read_books, _read_long
from hil.campaign.records import TRIALS, read_lines
from hil.mosquitto import find_mosquitto
from hil.products import Assembled
from telemetry.archive import Archive
from telemetry.errors import PenumbraError
from telemetry.frame import encode_frame
from telemetry.packets import Event, Product, Severity, Stage, Verification
from telemetry.spool import Spool

NODE = "penumbra-1"
EVENT = Event(severity=Severity.LOW, name="a", text="b")


@pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")
def test_a_few_schedules_keep_the_books_equal(tmp_path: Path) -> None:
    code = "from hil.cli import main\nif __name__ == '__main__':\n    main()\n"
    (tmp_path / "penumbra_cli.py").write_text(code)
    out = tmp_path / "out"
    arguments = ["campaign", "run", "link", "--out", str(out), "--trials", "4", "--seed", "7"]
    done = subprocess.run(
        [sys.executable, tmp_path / "penumbra_cli.py", *arguments],
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    records = list(read_lines(out / TRIALS, LinkRecord))
    assert sorted(r.index for r in records) == [0, 1, 2, 3]
    assert {r.broker for r in records} == {"mosquitto", "amqtt"}
    for record in records:
        assert record.drained
        assert record.consistent
        assert record.lost == record.duplicated == 0
        assert record.archived == record.generated > 100
        assert record.jobs == record.commands > 0
        assert sum(record.faults.values()) >= 4
    assert "| all | 4 |" in done.stdout
    assert not list(out.glob("trial-*"))


@pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")
async def test_an_end_that_dies_by_itself_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(index: int, seed: int, root: Path, context: object) -> LinkRecord:
        raise PenumbraError("the node's end died by itself, exit code 1")

    monkeypatch.setattr(link_run, "run_trial", fail)
    with pytest.raises(PenumbraError, match="died by itself"):
        await link_run.run_link(tmp_path / "out", trials=3, seed=1, at_once=2)


def test_a_record_that_is_missing_or_there_twice_is_found(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / NODE_DB, isolation_level=None)
    connection.execute("CREATE TABLE jobs (id TEXT)")
    spool = Spool(NODE, 1, 1 << 20)
    spool.create(connection)
    for _ in range(3):
        spool.append(connection, EVENT, 0)
    archive = Archive.open(tmp_path / ARCHIVE_DB)
    archive.ingest([encode_frame(node=NODE, boot=1, seq=seq, t_ns=0, packet=EVENT) for seq in range(3)])
    # Deleted on board, and not on the ground: seq 3 never came down.
    spool.append(connection, EVENT, 0)
    connection.execute("DELETE FROM spool_record")
    connection.close()
    archive.close()
    books = _read_books(tmp_path)
    assert books.check.lost == 1
    assert not books.check.consistent


def report(name: str, seq: int, stage: Stage, code: str = "ok", reason: str = "") -> Verification:
    return Verification(
        key_id="g", command_seq=seq, name=name, stage=stage, ok=code == "ok", code=code, reason=reason
    )


def test_a_dump_that_is_not_whole_and_a_command_without_an_end_are_found() -> None:
    head = Product(product="dump-1-1", kind="memory_dump", name="x", size_bytes=1, chunk_bytes=1, sha256="")
    reports = [
        report("dump_memory", 1, Stage.STARTED),
        report("dump_memory", 1, Stage.COMPLETED, reason="product dump-1-1 of 1 bytes"),
        report("dump_memory", 1, Stage.COMPLETED, reason="product dump-1-1 of 1 bytes"),
        report("dump_memory", 2, Stage.STARTED),
        report("upload_commit", 3, Stage.STARTED),
        report("upload_commit", 3, Stage.COMPLETED, "interrupted"),
        report("upload_commit", 4, Stage.STARTED),
        report("upload_commit", 4, Stage.COMPLETED),
        report("upload_commit", 5, Stage.STARTED),
        report("upload_commit", 5, Stage.COMPLETED),
        report("upload_commit", 5, Stage.COMPLETED, "interrupted"),
        report("infer", 6, Stage.STARTED),
    ]
    found = _read_long(reports, [Assembled(head, (), b"x")])
    assert (found.dumps, found.broken) == (1, 0)
    assert found.unanswered == 2  # 2 has no end, 5 has two.
    assert _read_long(reports, [Assembled(head, ((0, 0),), None)]).broken == 1
    assert _read_long(reports, []).broken == 1
