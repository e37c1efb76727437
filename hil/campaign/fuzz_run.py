"""`penumbra campaign run fuzz`: mutated messages against decoders, command authenticator and a running node.

A decoder may reject, by its own error, or accept; anything else that comes out of it is a finding. What a
CRC guards is accepted only when the CRC was made anew over the damage, what a key guards never. One input
for each distinct answer is kept as corpus. Single fields of sound messages are mutated too
(`hil.campaign.field_run`).
"""

from __future__ import annotations

import random
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import crc32c
import msgspec

from hil.bench.link_load import NODE, T0_NS
from hil.campaign.field_run import FieldsResult, run_fields
from hil.campaign.fuzz_seeds import examples
from hil.campaign.hostile import KEY, RING, hostile_commands
from hil.campaign.mutations import mutate
from hil.campaign.records import SUMMARY, Header, Value, write_header, write_json
from telemetry import bus, commands
from telemetry.ack import Ack, AckError, decode_ack, encode_ack
from telemetry.authenticator import Accepted, Authenticator, Rejected
from telemetry.block import BlockError, decode_block, encode_block
from telemetry.envelope import encode_command, make_command
from telemetry.errors import PenumbraError
from telemetry.flow import Flow, decode_flow, encode_flow
from telemetry.frame import FrameError, decode_frame, encode_frame
from telemetry.packets import Stream
from telemetry.signed import SignedError
from telemetry.upload import Chunk, decode_chunk, encode_chunk

NODE_FILES: Final = "node"
"""Directory of the node that single-field mutations are sent to, in that of the campaign."""
CORPUS: Final = "corpus.msgpack"
MAX_CORPUS: Final = 80
"""Inputs kept of each target."""
FINDINGS: Final = "findings.msgpack"
RESEALED: Final = 4
"""One of so many damaged frames gets a CRC that fits: else nothing behind the CRC would be reached."""
_DETAIL: Final = re.compile(r"'[^']*'|`[^`]*`|\(.*?\)|\d+")
SLOW_MS: Final = 1000.0
"""An input that takes longer is a finding: no message of these sizes may hold the event loop up so long."""
SHARES: Final = {"frame": 0.9, "block": 0.02, "ack": 0.02, "flow": 0.02, "upload": 0.02, "bus": 0.02}


class DecoderResult(msgspec.Struct, kw_only=True):
    """What one decoder made of its inputs. Counts."""

    decoder: str
    inputs: int = 0
    rejected: int = 0
    resealed: int = 0
    """Accepted with a CRC made anew over the damage, which is no error of the decoder."""
    unchanged: int = 0
    """Mutations that came out as one of the seeds."""
    undetected: int = 0
    """Damage accepted with the CRC, or the signature, that it had."""
    escaped: int = 0
    """Other errors than the decoder's own came out."""
    slow: int = 0
    slowest_ms: float = 0.0
    flips: int = 0
    """Single bits flipped, every bit of every seed."""
    flips_accepted: int = 0


class CommandResult(msgspec.Struct, kw_only=True):
    """What the authenticator made of mutated and of hostile commands. Counts."""

    inputs: int = 0
    unchanged: int = 0
    executed: int = 0
    """Damaged and accepted: each is a break-in."""
    escaped: int = 0
    slowest_ms: float = 0.0
    rejected: dict[str, int] = {}
    hostile: dict[str, dict[str, int]] = {}
    """Answers by kind of attack: reasons of rejection, `accepted`, `redelivered`."""


class FuzzResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `penumbra campaign run fuzz`."""

    seed: int
    decoders: list[DecoderResult]
    commands: CommandResult
    fields: FieldsResult | None = None
    """Mutations of single fields; None where none were asked for."""
    corpus: int
    """Inputs kept, one for each distinct answer."""
    findings: int
    wall_s: float


@dataclass(frozen=True)
class Target:
    """A decoder."""

    name: str
    seeds: tuple[bytes, ...]
    decode: Callable[[bytes], object]
    own: tuple[type[Exception], ...]
    """Errors by which it may reject."""
    guarded: bool = True
    """Whether a CRC or a key tells damage; the bus has neither, its values are checked."""


def _read_frame(data: bytes) -> object:
    return decode_frame(data).packet()


def _read_bus(data: bytes) -> object:
    return [bus.decode_eps(data), bus.decode("eps", data)]


def targets() -> list[Target]:
    """Return every decoder that takes bytes from outside, with sound seeds."""
    frames = tuple(
        encode_frame(node=NODE, boot=1, seq=seq, t_ns=T0_NS, packet=packet)
        for seq, packet in enumerate(examples())
    )
    block = encode_block(frames * 4)
    ack = encode_ack(Ack(node=NODE, boot=1, stream=Stream.EVENT, upto=90, gaps=[(3, 5), (8, 8)]), KEY)
    flow = encode_flow(Flow(node=NODE, t_ns=T0_NS, records=100, valid_s=3.0), KEY)
    chunk = encode_chunk(Chunk(node=NODE, sha256=bytes(range(32)), index=3, data=bytes(range(200))), KEY)
    eps = bus.encode(
        bus.BusEps(
            t_ns=T0_NS, battery_soc=0.9, battery_v=14.0, battery_a=0.0, battery_wh=80.0, array_w=60.0,
            array_sun_w=60.0, platform_w=10.0, soc_floor=0.5,
        )
    )  # fmt: skip
    return [
        Target("frame", frames, _read_frame, (FrameError,)),
        Target("block", () if block is None else (block,), decode_block, (BlockError,)),
        Target("ack", (ack,), lambda data: decode_ack(data, RING), (AckError, SignedError)),
        Target("flow", (flow,), lambda data: decode_flow(data, RING), (SignedError,)),
        Target("upload", (chunk,), lambda data: decode_chunk(data, RING, NODE), (SignedError,)),
        Target("bus", (eps,), _read_bus, (ValueError, PenumbraError), guarded=False),
    ]


class Corpus:
    """One input for each distinct answer, and every finding."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], bytes] = {}
        self.findings: list[tuple[str, str, bytes]] = []
        self._count: Counter[str] = Counter()

    def keep(self, target: str, answer: str, data: bytes) -> None:
        """Keep an input if its answer is new, numbers and quoted text left out."""
        if answer.startswith("CRC"):
            return
        key = (target, _DETAIL.sub("#", answer)[:60])
        if key not in self.kept and self._count[target] < MAX_CORPUS:
            self._count[target] += 1
            self.kept[key] = data


def _reseal(data: bytes) -> bytes:
    return data[:-4] + crc32c.crc32c(data[:-4]).to_bytes(4, "big")


def fuzz_decoder(target: Target, count: int, chance: random.Random, corpus: Corpus) -> DecoderResult:
    """Give a decoder so many mutated inputs."""
    result = DecoderResult(decoder=target.name)
    seeds, known = target.seeds, set(target.seeds)
    crc = target.name in ("frame", "block")
    for number in range(count):
        data = mutate(seeds, chance)
        resealed = crc and number % RESEALED == 0 and len(data) > 4
        if resealed:
            data = _reseal(data)
        begun = time.perf_counter()
        try:
            target.decode(data)
        except target.own as error:
            result.rejected += 1
            corpus.keep(target.name, str(error), data)
        except Exception as error:
            result.escaped += 1
            corpus.findings.append((target.name, f"{type(error).__name__}: {error}", data))
        else:
            if data in known:
                result.unchanged += 1
            elif resealed or not target.guarded:
                result.resealed += 1
            else:
                result.undetected += 1
                corpus.findings.append((target.name, "undetected", data))
        took_ms = 1e3 * (time.perf_counter() - begun)
        result.slowest_ms = max(result.slowest_ms, took_ms)
        result.slow += took_ms > SLOW_MS
    result.inputs = count
    if target.guarded:
        _flip_every_bit(target, result)
    return result


def _flip_every_bit(target: Target, result: DecoderResult) -> None:
    for seed in target.seeds:
        for bit in range(8 * len(seed)):
            data = bytearray(seed)
            data[bit >> 3] ^= 1 << (bit & 7)
            result.flips += 1
            try:
                target.decode(bytes(data))
            except target.own:
                continue
            result.flips_accepted += 1


def fuzz_commands(count: int, chance: random.Random, corpus: Corpus) -> CommandResult:
    """Give the authenticator so many mutated commands, then each kind of attack."""
    result = CommandResult()
    connection = sqlite3.connect(":memory:", isolation_level=None)
    authenticator = Authenticator(NODE, RING)
    authenticator.load(connection)
    given: list[commands.Arguments] = [
        commands.Ping(),
        commands.Infer(job="j", prompt="Why is the sky blue?", max_tokens=64),
        commands.SetPowerCap(power_w=7.5),
        commands.SequenceLoad(sequence="dawn", steps=(commands.make_step(commands.Ping(), 1.0),)),
    ]
    seeds = []
    for seq, arguments in enumerate(given * 2):
        command = make_command(
            arguments, key_id=KEY.id, seq=seq, t_issue_ns=T0_NS - 1, t_expire_ns=T0_NS + 10**12, node=NODE
        )
        seeds.append(encode_command(command, RING, sealed=seq >= len(given)))
    # Half of them are accepted already, as what a stranger has recorded: those may be answered, not executed.
    for payload in seeds[::2]:
        verdict = authenticator.check(payload, T0_NS)
        if isinstance(verdict, Accepted):
            authenticator.commit(connection, verdict)
    known = set(seeds)
    before = Counter(authenticator.report().rejected)
    for _ in range(count):
        data = mutate(seeds, chance)
        begun = time.perf_counter()
        try:
            verdict = authenticator.check(data, T0_NS)
        except Exception as error:
            result.escaped += 1
            corpus.findings.append(("command", f"{type(error).__name__}: {error}", data))
            continue
        result.slowest_ms = max(result.slowest_ms, 1e3 * (time.perf_counter() - begun))
        if data in known:
            result.unchanged += 1
        elif isinstance(verdict, Rejected):
            corpus.keep("command", verdict.text, data)
        else:
            result.executed += 1
            corpus.findings.append(("command", type(verdict).__name__, data))
    result.inputs = count
    result.rejected = dict(Counter(authenticator.report().rejected) - before)
    connection.close()
    result.hostile = hostile_commands(1000)
    return result


def run_fuzz(
    out: Path,
    *,
    inputs: int,
    command_inputs: int,
    fields: int = 0,
    seed: int,
    say: Callable[[str, float], None],
) -> None:
    """Fuzz all of it and leave `summary.json`, the corpus and the findings in `out`.

    Raises
    ------
    PenumbraError
        The node that `fields` mutated messages of the bus are sent to does not serve.
    """
    settings: dict[str, Value] = {"inputs": inputs, "command_inputs": command_inputs}
    write_header(out, Header(plan="fuzz", seed=seed, settings=settings | {"fields": fields}))
    begun, corpus = time.monotonic(), Corpus()
    results = []
    for number, target in enumerate(targets()):
        say(f"decoder of {target.name}", number / 7)
        chance = random.Random(f"{seed} {target.name}")  # noqa: S311 - damage, not secrets
        results.append(fuzz_decoder(target, round(SHARES[target.name] * inputs), chance, corpus))
    say("commands", 6 / 7)
    chance = random.Random(f"{seed} command")  # noqa: S311 - as above
    judged = fuzz_commands(command_inputs, chance, corpus)
    (out / CORPUS).write_bytes(
        msgspec.msgpack.encode([[name, answer, data] for (name, answer), data in sorted(corpus.kept.items())])
    )
    (out / FINDINGS).write_bytes(msgspec.msgpack.encode(corpus.findings))
    single = run_fields(out / NODE_FILES, fields, seed, say) if fields else None
    write_json(
        out / SUMMARY,
        FuzzResult(
            seed=seed, decoders=results, commands=judged, fields=single, corpus=len(corpus.kept),
            findings=len(corpus.findings), wall_s=time.monotonic() - begun,
        ),
    )  # fmt: skip
