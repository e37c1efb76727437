"""The authenticator over a real database: persist before execute, survive the restart, count everything."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from telemetry import topics
from telemetry.authenticator import (
    HISTORY,
    WINDOW,
    Accepted,
    Authenticator,
    KeyChangeError,
    Redelivered,
    RejectCode,
    Rejected,
    ReplayError,
)
from telemetry.commands import Arguments, Cancel, Ping, ReportLedger, Resync
from telemetry.database import Database
from telemetry.envelope import encode_command, make_command
from telemetry.keys import Key, KeyRing, KeyState, KeyUse
from telemetry.packets import Stage, Verification

RING = KeyRing([Key("a", b"a" * 32)])
NOW_NS = 10**18


def sign(seq: int, arguments: Arguments | None = None) -> bytes:
    command = make_command(
        arguments or Ping(), key_id="a", seq=seq, t_issue_ns=NOW_NS, t_expire_ns=NOW_NS + 10**9, node="sat-1"
    )
    return encode_command(command, RING)


def verification(seq: int, stage: Stage) -> Verification:
    return Verification(key_id="a", command_seq=seq, name="ping", stage=stage, ok=True, code="ok")


def accept(authenticator: Authenticator, seq: int) -> Accepted:
    verdict = authenticator.check(sign(seq), NOW_NS)
    assert isinstance(verdict, Accepted)
    return verdict


@pytest.fixture
def connection(tmp_path: Path):
    connection = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    yield connection
    connection.close()


@pytest.fixture
def authenticator(connection: sqlite3.Connection) -> Authenticator:
    authenticator = Authenticator("sat-1", RING)
    authenticator.load(connection)
    return authenticator


def test_the_same_message_checked_twice_is_committed_once(
    connection: sqlite3.Connection, authenticator: Authenticator
) -> None:
    first, second = accept(authenticator, 0), accept(authenticator, 0)
    authenticator.commit(connection, first)
    with pytest.raises(ReplayError, match="committed already"):
        authenticator.commit(connection, second)
    assert isinstance(authenticator.check(sign(0), NOW_NS), Redelivered)
    assert authenticator.report().accepted == 1


async def test_a_commit_that_was_rolled_back_can_be_run_again(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db")
    authenticator = Authenticator("sat-1", RING)
    await database.run(authenticator.load)
    accepted = accept(authenticator, 0)

    def fail(connection: sqlite3.Connection) -> None:
        authenticator.commit(connection, accepted)
        raise OSError("the disk died")

    with pytest.raises(OSError, match="died"):
        await database.run(fail)
    await database.run(authenticator.load)
    again = accept(authenticator, 0)
    await database.run(lambda c: authenticator.commit(c, again))
    assert isinstance(authenticator.check(sign(0), NOW_NS), Redelivered)
    await database.close()


def test_verifications_survive_the_restart_in_order(
    connection: sqlite3.Connection, authenticator: Authenticator
) -> None:
    reports = [verification(3, stage) for stage in Stage]
    authenticator.commit(connection, accept(authenticator, 3))
    for report in reports:
        authenticator.record(connection, report)
    for instance in (authenticator, Authenticator("sat-1", RING)):
        instance.load(connection)
        verdict = instance.check(sign(3), NOW_NS)
        assert isinstance(verdict, Redelivered)
        assert list(verdict.verifications) == reports
    report = instance.report()
    assert (report.last_key_id, report.last_seq) == ("a", 3)
    assert (report.accepted, report.redelivered) == (0, 1)


def test_history_is_bounded_and_what_is_forgotten_is_still_not_executed(
    connection: sqlite3.Connection, authenticator: Authenticator
) -> None:
    for seq in range(0, HISTORY + 10):
        authenticator.commit(connection, accept(authenticator, seq))
        authenticator.record(connection, verification(seq, Stage.ACCEPTED))
    for instance in (authenticator, Authenticator("sat-1", RING)):
        instance.load(connection)
        verdict = instance.check(sign(9), NOW_NS)
        assert isinstance(verdict, Rejected)
        assert verdict.code is RejectCode.OLD_SEQUENCE
        assert isinstance(instance.check(sign(10), NOW_NS), Redelivered)
    for query in ("SELECT COUNT(*) FROM auth_command", "SELECT COUNT(*) FROM auth_verification"):
        assert connection.execute(query).fetchone() == (HISTORY,)


def test_the_edges_of_the_default_window(authenticator: Authenticator) -> None:
    assert isinstance(authenticator.check(sign(WINDOW - 1), NOW_NS), Accepted)
    verdict = authenticator.check(sign(WINDOW), NOW_NS)
    assert isinstance(verdict, Rejected)
    assert verdict.code is RejectCode.OUTSIDE_WINDOW
    assert (verdict.key_id, verdict.seq, verdict.name) == ("a", WINDOW, "ping")


def test_the_edges_of_the_lifetime(authenticator: Authenticator) -> None:
    assert isinstance(authenticator.check(sign(0), NOW_NS + 10**9 - 1), Accepted)
    verdict = authenticator.check(sign(0), NOW_NS + 10**9)
    assert isinstance(verdict, Rejected)
    assert verdict.code is RejectCode.EXPIRED


def test_a_mac_is_checked_before_the_node_the_expiry_and_the_window(authenticator: Authenticator) -> None:
    command = make_command(
        Ping(), key_id="a", seq=10**6, t_issue_ns=0, t_expire_ns=1, node="sat-2"
    )  # Everything is wrong with it; only the first finding may be told to a forger.
    forged = encode_command(command, KeyRing([Key("a", b"f" * 32)]))
    verdict = authenticator.check(forged, NOW_NS)
    assert isinstance(verdict, Rejected)
    assert verdict.code is RejectCode.BAD_MAC


def test_rejections_are_counted_by_reason(
    connection: sqlite3.Connection, authenticator: Authenticator
) -> None:
    authenticator.commit(connection, accept(authenticator, 0))
    authenticator.check(b"", NOW_NS)
    authenticator.check(b"", NOW_NS)
    authenticator.check(sign(0, ReportLedger()), NOW_NS)
    report = authenticator.report()
    assert report.rejected == {"malformed": 2, "sequence_reused": 1}
    assert report.last_reason == "sequence_reused"
    assert (report.accepted, report.last_key_id, report.last_seq) == (1, "a", 0)


def test_a_window_under_one_is_refused() -> None:
    with pytest.raises(ValueError, match="window"):
        Authenticator("sat-1", RING, window=0)


def test_a_key_in_standby_waits_for_its_activation(connection: sqlite3.Connection) -> None:
    ring = KeyRing([Key("a", b"a" * 32), Key("next", b"n" * 32, KeyState.STANDBY)])
    holder = KeyRing([Key("next", b"n" * 32)])
    authenticator = Authenticator("sat-1", ring)
    authenticator.load(connection)
    command = make_command(Ping(), key_id="next", seq=0, t_issue_ns=0, t_expire_ns=NOW_NS + 1, node="sat-1")
    payload = encode_command(command, holder)
    assert rejection(authenticator.check(payload, NOW_NS)) is RejectCode.KEY_STANDBY
    authenticator.activate(connection, "next")
    authenticator.load(connection)
    assert isinstance(authenticator.check(payload, NOW_NS), Accepted)
    authenticator.retire(connection, "a", "next")
    authenticator.load(connection)
    assert rejection(authenticator.check(sign(0), NOW_NS)) is RejectCode.KEY_RETIRED
    for wrong in (
        lambda: authenticator.activate(connection, "a"),
        lambda: authenticator.activate(connection, "nobody"),
        lambda: authenticator.retire(connection, "next", "next"),
        lambda: authenticator.retire(connection, "next", "a"),
    ):
        with pytest.raises(KeyChangeError):
            wrong()


def test_a_key_its_file_retires_is_retired_whatever_was_commanded(connection: sqlite3.Connection) -> None:
    authenticator = Authenticator(
        "sat-1", KeyRing([Key("a", b"a" * 32), Key("b", b"b" * 32, KeyState.STANDBY)])
    )
    authenticator.load(connection)
    authenticator.activate(connection, "b")
    ring = KeyRing([Key("a", b"a" * 32), Key("b", b"b" * 32, KeyState.RETIRED)])
    Authenticator("sat-1", ring).load(connection)
    assert [key.id for key in ring.active()] == ["a"]


def test_a_recovery_key_brings_a_ground_back_that_is_out_of_the_window(
    connection: sqlite3.Connection,
) -> None:
    ring = KeyRing([Key("a", b"a" * 32), Key("r", b"r" * 32, use=KeyUse.RECOVERY)])
    authenticator = Authenticator("sat-1", ring)
    authenticator.load(connection)

    def give(key_id: str, seq: int, arguments: Arguments) -> object:
        command = make_command(
            arguments, key_id=key_id, seq=seq, t_issue_ns=0, t_expire_ns=NOW_NS + 1, node="sat-1"
        )
        return authenticator.check(encode_command(command, ring), NOW_NS)

    resync = Resync(key="a", last_seq=4999)
    assert rejection(give("a", 5000, Ping())) is RejectCode.OUTSIDE_WINDOW
    assert rejection(give("a", 0, resync)) is RejectCode.NOT_PERMITTED
    assert rejection(give("r", 0, Cancel(job="j"))) is RejectCode.NOT_PERMITTED
    assert isinstance(give("r", 10**9, resync), Accepted)  # No window for it.
    authenticator.resync(connection, "a", 4999)
    authenticator.load(connection)
    assert isinstance(give("a", 5000, Ping()), Accepted)
    assert rejection(give("a", 4999, Ping())) is RejectCode.OLD_SEQUENCE
    with pytest.raises(KeyChangeError, match="going back"):
        authenticator.resync(connection, "a", 4998)


def test_a_node_may_take_sealed_commands_only() -> None:
    authenticator = Authenticator("sat-1", RING, require_sealed=True)
    command = make_command(Ping(), key_id="a", seq=0, t_issue_ns=0, t_expire_ns=NOW_NS + 1, node="sat-1")
    assert rejection(authenticator.check(encode_command(command, RING), NOW_NS)) is RejectCode.NOT_SEALED
    assert isinstance(authenticator.check(encode_command(command, RING, sealed=True), NOW_NS), Accepted)


def test_a_command_played_back_elsewhere_is_named_as_such(authenticator: Authenticator) -> None:
    verdict = authenticator.check(sign(0), NOW_NS, topics.ack("sat-1"))
    assert rejection(verdict) is RejectCode.WRONG_TOPIC
    other = make_command(Ping(), key_id="a", seq=0, t_issue_ns=0, t_expire_ns=NOW_NS + 1, node="sat-2")
    assert rejection(authenticator.check(encode_command(other, RING), NOW_NS)) is RejectCode.WRONG_NODE
    assert authenticator.report().rejected == {"wrong_topic": 1, "wrong_node": 1}


def rejection(verdict: object) -> RejectCode:
    assert isinstance(verdict, Rejected), verdict
    return verdict.code
