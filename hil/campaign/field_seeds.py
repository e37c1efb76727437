"""Sound messages as plain trees, and how each is sealed again after a field of it was changed."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import crc32c
import msgspec

from hil.bench.link_load import NODE, T0_NS
from hil.campaign.fuzz_seeds import examples
from hil.campaign.hostile import KEY
from hil.sensor_faults import SensorBench
from hil.tle import tle_from_elements
from telemetry import bus, commands, topics
from telemetry.ack import Ack, encode_ack
from telemetry.envelope import COMMAND_VERSION
from telemetry.flow import Flow, encode_flow
from telemetry.frame import FRAME_VERSION
from telemetry.keys import MAC_BYTES, Domain
from telemetry.packets import PRIORITY, Packet, Stream
from telemetry.sampling import Sampling
from telemetry.upload import Chunk, encode_chunk

NS: Final = 1_000_000_000
TRUTH: Final = bus.BusEps(
    t_ns=T0_NS, battery_soc=0.8, battery_v=7.6, battery_a=0.4, battery_wh=24.0, array_w=24.0,
    array_sun_w=25.0, platform_w=4.0, soc_floor=0.7,
)  # fmt: skip
_encoder: Final = msgspec.msgpack.Encoder()


def encode(tree: Any) -> bytes:
    """Return a tree as msgpack."""
    return _encoder.encode(tree)


@dataclass(frozen=True)
class Kind:
    """A kind of message."""

    name: str
    tree: Callable[[random.Random], Any]
    """Makes a sound one."""
    seal: Callable[[Any], bytes] = encode
    """Encodes one, with the CRC or the MAC that fits."""


def bus_messages(t_ns: int, chance: random.Random) -> dict[str, bus.BusMessage]:
    """Return a sound message of each channel, at mission time `t_ns`."""
    truth = msgspec.structs.replace(TRUTH, t_ns=t_ns, array_w=chance.uniform(23.0, 25.0))
    spans = [
        bus.ContactSpan(start_ns=t_ns + n * 6000 * NS, end_ns=t_ns + (n * 6000 + 400) * NS) for n in range(3)
    ]
    return {
        "time": bus.BusTime(t_ns=t_ns, rate=1.0),
        "orbit": orbit_tle(),
        "eps": SensorBench(chance.randrange(1000)).read(truth),
        "thermal": bus.BusThermal(t_ns=t_ns, board_c=chance.uniform(20, 40), radiator_c=5.0),
        "contact": bus.BusContact(
            t_ns=t_ns, in_contact=False, station="Svalbard", next_start_ns=spans[0].start_ns,
            next_end_ns=spans[0].end_ns, windows=spans, known_until_ns=t_ns + 86_400 * NS,
        ),
    }  # fmt: skip


def orbit_tle() -> bus.BusOrbit:
    """Return the elements as a TLE."""
    line1, line2 = tle_from_elements(
        epoch_ns=T0_NS, altitude_km=520.0, eccentricity=0.001, inclination_deg=97.5, raan_deg=40.0,
        arg_perigee_deg=90.0, mean_anomaly_deg=10.0, bstar=1e-4,
    )  # fmt: skip
    return bus.BusOrbit(line1=line1, line2=line2)


def orbit_omm() -> bus.BusOrbit:
    """Return elements as an OMM with all fields that are looked at."""
    epoch = dt.datetime.fromtimestamp(T0_NS / NS, dt.UTC)
    return bus.BusOrbit(
        omm={
            "OBJECT_NAME": "PENUMBRA", "OBJECT_ID": "2026-001A", "CENTER_NAME": "EARTH", "REF_FRAME": "TEME",
            "REF_FRAME_EPOCH": None, "TIME_SYSTEM": "UTC", "MEAN_ELEMENT_THEORY": "SGP4",
            "EPOCH": epoch.strftime("%Y-%m-%dT%H:%M:%S.%f"),
            "MEAN_MOTION": 15.15, "ECCENTRICITY": 0.001, "INCLINATION": 97.5, "RA_OF_ASC_NODE": 40.0,
            "ARG_OF_PERICENTER": 90.0, "MEAN_ANOMALY": 10.0, "EPHEMERIS_TYPE": 0, "CLASSIFICATION_TYPE": "U",
            "NORAD_CAT_ID": 25544, "ELEMENT_SET_NO": 999, "REV_AT_EPOCH": 123, "BSTAR": 1e-4,
            "MEAN_MOTION_DOT": 1e-5, "MEAN_MOTION_DDOT": 0.0, "BTERM": 0.0, "AGOM": 0.0,
        }
    )  # fmt: skip


def _of_bus(channel: str) -> Callable[[random.Random], Any]:
    return lambda chance: _tree(bus.encode(bus_messages(T0_NS + chance.randrange(10**12), chance)[channel]))


def bus_kinds() -> list[Kind]:
    """Return the kinds of messages a node takes from the bus, elements in both forms."""
    return [
        *(Kind(channel, _of_bus(channel)) for channel in ("time", "eps", "thermal", "contact")),
        Kind("orbit, TLE", lambda _: _given(_tree(bus.encode(orbit_tle())))),
        Kind("orbit, OMM", lambda _: _given(_tree(bus.encode(orbit_omm())))),
    ]


def channel_of(kind: str) -> str:
    """Return the channel that a kind travels on."""
    return kind.split(",", 1)[0]


def _given(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if value is not None}


def _tree(data: bytes) -> Any:
    return msgspec.msgpack.decode(data)


def _signed(name: str, domain: Domain, payload: bytes) -> Kind:
    def seal(tree: Any) -> bytes:
        body = encode(tree)
        return body + KEY.mac(domain, body)

    return Kind(name, lambda _: _tree(payload[:-MAC_BYTES]), seal)


def signed_kinds() -> list[Kind]:
    """Return what the ground signs, but for telecommands."""
    ack = encode_ack(Ack(node=NODE, boot=1, stream=Stream.EVENT, upto=90, gaps=[(3, 5), (8, 8)]), KEY)
    flow = encode_flow(Flow(node=NODE, t_ns=T0_NS, records=100, valid_s=3.0), KEY)
    chunk = encode_chunk(Chunk(node=NODE, sha256=bytes(range(32)), index=3, data=bytes(range(200))), KEY)
    return [
        _signed("ack", Domain.ACK, ack),
        _signed("flow", Domain.FLOW, flow),
        _signed("upload chunk", Domain.UPLOAD, chunk),
    ]


_SHA256: Final = "0123456789abcdef" * 4
COMMANDS: Final[tuple[commands.Arguments, ...]] = (
    commands.Ping(),
    commands.Infer(
        job="j",
        prompt="Why is the sky blue?",
        max_tokens=64,
        priority=7,
        deadline_ns=T0_NS + 10**12,
        sampling=Sampling(
            temperature=0.7,
            top_k=40,
            top_p=0.9,
            repetition_penalty=1.1,
            seed=3,
            stop=("a", "bc"),
            logprobs=True,
        ),
    ),
    commands.Cancel(job="j"),
    commands.SetMode(mode="nominal"),
    commands.SetPowerCap(power_w=7.5),
    commands.ReportLedger(),
    commands.SetFdirRow(row="weights.digest", state="passive"),
    commands.RearmFdir(row="weights.digest"),
    commands.ExternalControl(on=True),
    commands.ResetCounters(),
    commands.LoadFdir(source="uplinked"),
    commands.ScrubNow(region="weights"),
    commands.QueryFdir(recorder=True),
    commands.ActivateKey(key="ground-2"),
    commands.RetireKey(key="ground-2"),
    commands.Resync(key="ground-1", last_seq=41),
    commands.Arm(command="upload_commit", args={}),
    commands.ScheduleInsert(t_ns=T0_NS + 10**12, command="cancel", args={"job": "j"}),
    commands.ScheduleDelete(entry=1),
    commands.ScheduleShift(by_s=10.0, entry=1),
    commands.ScheduleList(),
    commands.SequenceLoad(sequence="dawn", steps=(commands.make_step(commands.Cancel(job="j"), 1.0),)),
    commands.SequenceStart(sequence="dawn"),
    commands.SequenceStop(sequence="dawn"),
    commands.RestartWorker(),
    commands.RecomputeBaseline(region="weights"),
    commands.SetRates(housekeeping_s=1.0, ledger_s=5.0),
    commands.DumpMemory(region="weights", first_byte=4, size_bytes=100),
    commands.ResendProduct(product="dump-1-1", first=1, last=2),
    commands.DeleteProduct(product="dump-1-1"),
    commands.UploadBegin(kind="fdir_table", sha256=_SHA256, size_bytes=1000, chunk_bytes=256),
    commands.UploadStatus(),
    commands.UploadAbort(),
    commands.UploadCommit(sha256=_SHA256),
    commands.SwitchImage(slot="a"),
    commands.RollbackImage(),
)
"""Sound arguments of every command of the dictionary."""


def command_kinds() -> list[Kind]:
    """Return every telecommand, signed."""
    topic = topics.tc(NODE).encode() + b"\0"

    def seal(tree: Any) -> bytes:
        body = encode(tree)
        return body + KEY.mac(Domain.COMMAND, topic + body)

    def of(arguments: commands.Arguments) -> Kind:
        args = _tree(encode(arguments))
        head = [COMMAND_VERSION, KEY.id, 7, T0_NS - 1, T0_NS + 10**12, NODE, arguments.name]
        return Kind(arguments.name, lambda _: [*head, args], seal)

    return [of(arguments) for arguments in COMMANDS]


def packet_kinds() -> list[Kind]:
    """Return a frame of every packet type, sealed by its CRC."""

    def seal(tree: Any) -> bytes:
        array = encode(tree)
        return array + crc32c.crc32c(array).to_bytes(4, "big")

    def of(packet: Packet) -> Kind:
        body = _tree(encode(packet))
        head = [FRAME_VERSION, NODE, 1, packet.stream.value, 4, T0_NS, PRIORITY[packet.stream]]
        return Kind(packet.type_name, lambda _: [*head, packet.type_name, body], seal)

    return [of(packet) for packet in examples()]
