"""Flow control: a word of the ground that is forged, old or stale holds nothing up."""

from __future__ import annotations

import pytest

from node.downlink import DownlinkWindow
from telemetry.flow import MAX_VALID_S, Flow, decode_flow, encode_flow
from telemetry.keys import Domain, Key, KeyRing, KeyState
from telemetry.packets import Stream
from telemetry.signed import SignedError
from telemetry.spool import SpoolRecord

KEY = Key("ground-1", bytes(32))
RETIRED = Key("old", bytes(32), KeyState.RETIRED)
RING = KeyRing([KEY, RETIRED])
FLOW = Flow(node="n", t_ns=5, records=3, valid_s=2.0)


def test_round_trip() -> None:
    assert decode_flow(encode_flow(FLOW, KEY), RING) == FLOW


@pytest.mark.parametrize(
    "data",
    [
        b"",
        encode_flow(FLOW, Key("ground-1", bytes([1]) * 32)),
        encode_flow(FLOW, Key("nobody", bytes(32))),
        encode_flow(FLOW, RETIRED),
        encode_flow(Flow(node="n", t_ns=5, records=-1, valid_s=2.0), KEY),
        encode_flow(Flow(node="n", t_ns=5, records=1, valid_s=2 * MAX_VALID_S), KEY),
        (body := encode_flow(FLOW, KEY)[:-32]) + KEY.mac(Domain.ACK, body),
    ],
)
def test_what_is_no_word_of_the_ground_is_refused(data: bytes) -> None:
    with pytest.raises(SignedError):
        decode_flow(data, RING)


def test_the_ground_bounds_what_is_under_way_while_its_word_is_fresh() -> None:
    window = DownlinkWindow(10, 60.0)
    window.on_sent(SpoolRecord(1, Stream.EVENT, 1, 1, b""), 0.0)
    assert window.room(0.0) == 9
    assert window.on_flow(FLOW, 1.0)
    assert window.room(1.0) == 2
    assert window.room(2.9) == 2
    assert window.room(3.1) == 9  # silence does not hold the downlink up
    assert not window.on_flow(FLOW, 3.2)  # nor does an old word
    assert window.room(3.2) == 9
    assert window.on_flow(Flow(node="n", t_ns=6, records=0, valid_s=2.0), 4.0)
    assert window.room(4.0) == 0
    assert window.on_flow(Flow(node="n", t_ns=7, records=10**6, valid_s=2.0), 4.5)
    assert window.room(4.5) == 9
