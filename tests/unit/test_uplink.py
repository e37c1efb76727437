"""Stop and wait: one command at a time, the same bytes until it is answered, only in contact."""

from __future__ import annotations

import msgspec
import pytest

from hil.uplink import LIFETIME_S, RETRY_S, Send, Uplink
from telemetry.commands import ActivateKey, Arguments, Infer, Ping, Resync, RetireKey
from telemetry.envelope import open_command
from telemetry.keys import Key, KeyRing, KeyState, KeyUse
from telemetry.packets import Stage, Verification

KEY = Key("ground-1", bytes(range(32)))
RING = KeyRing([KEY])
T0 = 1_700_000_000_000_000_000


def uplink(count: int = 2) -> Uplink:
    made = Uplink("penumbra-1", RING)
    made.queue([Infer(job=f"job-{n}", prompt="hello", max_tokens=8) for n in range(count)])
    return made


def answer(
    seq: int, stage: Stage = Stage.ACCEPTED, ok: bool = True, key_id: str = "ground-1"
) -> Verification:
    return Verification(key_id=key_id, command_seq=seq, name="infer", stage=stage, ok=ok, code="ok")


def one(sends: list[Send]) -> Send:
    (send,) = sends
    return send


def test_command_is_signed_for_the_node_and_expires_late() -> None:
    send = one(uplink().tick(0.0, T0, in_contact=True))
    command = open_command(send.payload, RING)
    assert (command.node, command.name, command.seq, command.key_id) == ("penumbra-1", "infer", 1, "ground-1")
    assert command.args == {"job": "job-0", "prompt": "hello", "max_tokens": 8}
    assert command.t_issue_ns == T0
    assert command.t_expire_ns - T0 == LIFETIME_S * 1e9


def test_next_command_waits_for_the_answer_to_the_one_before() -> None:
    up = uplink()
    first = one(up.tick(0.0, T0, in_contact=True))
    assert up.tick(0.1, T0, in_contact=True) == []
    assert not up.on_verification(answer(2))
    assert not up.on_verification(answer(1, Stage.STARTED))
    assert not up.on_verification(answer(1, key_id="ground-2"))
    assert up.tick(0.2, T0, in_contact=True) == []
    assert up.on_verification(answer(1))
    assert not up.on_verification(answer(1))  # a repeated answer settles nothing twice
    second = one(up.tick(0.3, T0, in_contact=True))
    assert (first.seq, second.seq) == (1, 2)
    assert up.on_verification(answer(2))
    assert up.tick(0.4, T0, in_contact=True) == []
    assert up.pending == 0
    assert (up.counts.issued, up.counts.accepted, up.counts.repeats) == (2, 2, 0)


def test_unanswered_command_is_sent_again_byte_for_byte() -> None:
    up = uplink()
    first = one(up.tick(0.0, T0, in_contact=True))
    assert up.tick(RETRY_S - 0.01, T0, in_contact=True) == []
    again = one(up.tick(RETRY_S, T0 + 60, in_contact=True))
    assert again.payload == first.payload
    assert again.again
    assert up.counts.repeats == 1


def test_silent_outside_contact_and_repeats_at_once_in_the_next() -> None:
    up = uplink()
    assert up.tick(0.0, T0, in_contact=False) == []
    first = one(up.tick(1.0, T0, in_contact=True))
    assert up.tick(9.0, T0, in_contact=False) == []
    assert one(up.tick(9.1, T0, in_contact=True)).payload == first.payload


def test_refused_command_makes_room_for_the_next() -> None:
    up = uplink()
    up.tick(0.0, T0, in_contact=True)
    assert up.on_verification(answer(1, ok=False))
    assert one(up.tick(0.1, T0, in_contact=True)).seq == 2
    assert (up.counts.accepted, up.counts.refused) == (0, 1)


def test_expired_command_is_given_up() -> None:
    up = uplink()
    up.tick(0.0, T0, in_contact=True)
    late = T0 + round(LIFETIME_S * 1e9)
    assert one(up.tick(5.0, late, in_contact=True)).seq == 2
    assert up.counts.expired == 1


def test_sequence_numbers_can_be_carried_on() -> None:
    up = Uplink("penumbra-1", RING, lambda key_id: 40)
    up.queue([Ping()])
    assert up.pending == 1
    assert one(up.tick(0.0, T0, in_contact=True)).seq == 40


def test_a_command_that_cannot_be_numbered_waits() -> None:
    fail = True

    def number(key_id: str) -> int:
        if fail:
            raise OSError("disk full")
        return 7

    up = Uplink("penumbra-1", RING, number)
    up.queue([Ping()])
    with pytest.raises(OSError, match="full"):
        up.tick(0.0, T0, in_contact=True)
    assert up.pending == 1
    fail = False
    assert one(up.tick(1.0, T0, in_contact=True)).seq == 7
    assert up.pending == 1


def test_a_node_that_takes_no_more_in_the_time_is_asked_again() -> None:
    up = uplink()
    first = one(up.tick(0.0, T0, in_contact=True))
    busy = Verification(
        key_id="ground-1", command_seq=first.seq, name="infer", stage=Stage.ACCEPTED, ok=False,
        code="rate_limited",
    )  # fmt: skip
    assert not up.on_verification(busy)
    again = one(up.tick(RETRY_S, T0, in_contact=True))
    assert (again.payload, again.again) == (first.payload, True)


def test_commands_can_be_sealed() -> None:
    up = Uplink("penumbra-1", RING, sealed=True)
    up.queue([Infer(job="a-secret-job", prompt="p", max_tokens=1)])
    payload = one(up.tick(0.0, T0, in_contact=True)).payload
    assert b"a-secret-job" not in payload
    assert open_command(payload, RING).args["job"] == "a-secret-job"


def test_a_rollover_is_followed_once_the_node_has_carried_it_out() -> None:
    ring = KeyRing([Key("old", b"o" * 32), Key("new", b"n" * 32, KeyState.STANDBY)])
    up = Uplink("penumbra-1", ring)

    def give(arguments: Arguments, *, ok: bool = True) -> tuple[str, int]:
        up.queue([arguments])
        command = open_command(one(up.tick(0.0, T0, in_contact=True)).payload, ring)
        for stage, fine in ((Stage.ACCEPTED, True), (Stage.COMPLETED, ok)):
            up.on_verification(
                Verification(
                    key_id=command.key_id,
                    command_seq=command.seq,
                    name=command.name,
                    stage=stage,
                    ok=fine,
                    code="ok" if fine else "key_unchanged",
                )
            )
        return command.key_id, command.seq

    assert give(ActivateKey(key="new"), ok=False) == ("old", 1)
    assert [key.id for key in ring.active()] == ["old"]
    assert give(ActivateKey(key="new")) == ("old", 2)
    assert [key.id for key in ring.active()] == ["old", "new"]
    assert give(RetireKey(key="old")) == ("new", 1)  # No key retires itself.
    assert [key.id for key in ring.active()] == ["new"]
    assert give(Ping()) == ("new", 2)


def test_argument_out_of_range_is_not_sent() -> None:
    up = Uplink("penumbra-1", RING)
    wrong, sound = up.queue([Infer(job="job", prompt="p", max_tokens=0), Ping()])
    assert one(up.tick(0.0, T0, in_contact=True)).name == "ping"
    assert "max_tokens" in wrong.not_sent
    assert sound.not_sent == ""
    assert up.pending == 1


def test_a_resync_is_signed_with_the_recovery_key_or_not_sent() -> None:
    resync = Resync(key="ground-1", last_seq=9)
    up = Uplink("penumbra-1", RING)
    (ticket,) = up.queue([resync])
    assert up.tick(0.0, T0, in_contact=True) == []
    assert "recovery key" in ticket.not_sent
    ring = KeyRing([KEY, Key("rescue", bytes(32), use=KeyUse.RECOVERY)])
    up = Uplink("penumbra-1", ring)
    up.queue([resync])
    assert open_command(one(up.tick(0.0, T0, in_contact=True)).payload, ring).key_id == "rescue"


def test_a_ticket_tells_each_stage_and_how_it_ended() -> None:
    up = Uplink("penumbra-1", RING)
    first, second, third = up.queue([Ping(), Ping(), Ping()])
    up.tick(0.0, T0, in_contact=True)
    limited = msgspec.structs.replace(answer(1, ok=False), code="rate_limited")
    for report in (
        limited,
        answer(1),
        answer(1),
        answer(1, Stage.STARTED),
        msgspec.structs.replace(answer(1, Stage.COMPLETED, ok=False), entry=7),
    ):
        up.on_verification(report)
    assert first.outcome is None
    assert [report.stage for report in first.reports] == [Stage.ACCEPTED, Stage.ACCEPTED, Stage.STARTED]
    up.on_verification(answer(1, Stage.COMPLETED))
    assert first.outcome == answer(1, Stage.COMPLETED)
    up.tick(1.0, T0, in_contact=True)
    up.on_verification(answer(2, ok=False))
    assert second.outcome == answer(2, ok=False)
    up.tick(2.0, T0, in_contact=True)
    up.tick(3.0, T0 + round(LIFETIME_S * 1e9), in_contact=True)
    assert third.expired
    assert third.outcome is None
