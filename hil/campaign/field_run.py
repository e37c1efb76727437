"""Single fields of every message mutated, with all others valid: what the flight software answers to each.

In this process every mutation is given to the flight's own code, those of the bus also as a broker would have
kept them, and what it knows is compared before and after a refusal. Those of the bus go to a running node as
well, over a real broker: first all that are to be refused, while what its housekeeping shows must not change,
then those that are to be taken. Each is counted by the node itself, by reason; its counts must add up to what
was sent, and to what was answered here.
"""

from __future__ import annotations

import asyncio
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from hil.bench.link_load import NODE, T0_NS
from hil.campaign.field_mutations import Mutation, mutations, paths
from hil.campaign.field_node import ROUNDS, FieldNode
from hil.campaign.field_seeds import (
    Kind,
    bus_kinds,
    bus_messages,
    channel_of,
    command_kinds,
    packet_kinds,
    signed_kinds,
)
from hil.campaign.field_shadow import TAKEN, Commands, Shadow, kind_of, why_malformed
from hil.campaign.hostile import RING
from telemetry import bus
from telemetry.ack import AckError, decode_ack
from telemetry.dictionary.codes import DropCode
from telemetry.flow import decode_flow
from telemetry.frame import FrameError, decode_frame
from telemetry.signed import SignedError
from telemetry.upload import decode_chunk

BATCH: Final = 400
"""Messages under way at a time: the node's link holds 1,000, and what sound messages said before them stays
fresh for 10 s."""
Say = Callable[[str, float], None]
Progress = Callable[[str], None]


class FieldCount(msgspec.Struct, kw_only=True):
    """What was made of the mutations of one kind of message. Counts."""

    message: str
    fields: int
    """Different fields that were mutated."""
    sent: int = 0
    answers: dict[str, int] = {}
    """`accepted`, or why not; adds up to `sent`."""
    escaped: int = 0
    """Other errors than its own came out of the code. The node's way in catches those, as `failed`: one is
    never expected (ADR 0020)."""
    changed: int = 0
    """Refused, and something is not as it was."""


class LiveCount(msgspec.Struct, kw_only=True):
    """What a running node counted of the mutations of one kind of message. Counts."""

    message: str
    sent: int = 0
    answers: dict[str, int] = {}
    unaccounted: int = 0
    """Sent, and not counted by the node."""
    unexpected: int = 0
    """Counted otherwise than the same code answered in the bench."""
    changed: int = 0
    """Batches of refused messages after which housekeeping showed something else."""


class FieldsResult(msgspec.Struct, kw_only=True):
    """The mutations of single fields."""

    bus: list[FieldCount] = []
    others: list[FieldCount] = []
    live: list[LiveCount] = []
    node_restarts: int = 0
    node_end: str = ""
    """How the node ended when it was asked to stop; empty: none was run."""
    power_failures: int = 0
    """Reports of the node that its power loop failed on what a message, taken before, had said."""
    recovered: bool = True
    """Whether it knew again what it knew before, after sound messages."""
    findings: list[str] = []
    """In words, at most `MAX_FINDINGS`."""

    @property
    def is_right(self) -> bool:
        """Whether nothing changed or got lost that was refused, and the node lived on."""
        counts = [*self.bus, *self.others]
        return (
            not any(c.changed or c.escaped or sum(c.answers.values()) != c.sent for c in counts)
            and not any(each.unaccounted or each.unexpected or each.changed for each in self.live)
            and not self.node_restarts
            and not self.power_failures
            and self.node_end in {"", "exit code 0"}
            and self.recovered
        )


MAX_FINDINGS: Final = 20


class Chosen(msgspec.Struct):
    """Mutations of the bus, as they are sent: by kind, those to be refused and those to be taken."""

    refused: dict[str, list[tuple[bytes, DropCode]]] = {}
    taken: dict[str, list[bytes]] = {}


def _share(kinds: Iterable[Kind], count: int, chance: random.Random) -> dict[str, int]:
    """Return how many mutations each kind gets: by its fields."""
    sizes = {kind.name: len(list(paths(kind.tree(chance)))) for kind in kinds}
    return {name: math.ceil(count * size / sum(sizes.values())) for name, size in sizes.items()}


def _drawn(kind: Kind, count: int, chance: random.Random) -> Iterable[Mutation]:
    """Yield mutations of a kind, of another sound message every few hundred."""
    left = count
    while left > 0:
        tree = kind.tree(chance)
        # Every field takes every fixed value once, and then as many by chance.
        several = min(left, 140 * len(list(paths(tree))))
        yield from mutations(tree, several, chance)
        left -= several


def mutate_bus(count: int, seed: int, result: FieldsResult, say: Say) -> Chosen:
    """Give mutated messages of the bus to the node's code in this process; return them, sorted."""
    chance = random.Random(f"{seed} fields of the bus")  # noqa: S311 - damage, not secrets
    shadow, chosen, kinds = Shadow(), Chosen(), bus_kinds()
    for number, (kind, share) in enumerate(zip(kinds, _share(kinds, count, chance).values(), strict=True)):
        say(f"fields of bus/{kind.name}", number / len(kinds))
        for channel, message in bus_messages(T0_NS, chance).items():
            shadow.take(channel, bus.encode(message))
        answers: Counter[str] = Counter()
        names: set[str] = set()
        changed, failed_kept = shadow.changed, 0
        refused, taken = chosen.refused.setdefault(kind.name, []), chosen.taken.setdefault(kind.name, [])
        for mutation in _drawn(kind, share, chance):
            names.add(mutation.path)
            payload = kind.seal(mutation.tree)
            kept = shadow.take(channel_of(kind.name), payload, retained=True)
            failed_kept += kept is DropCode.FAILED
            code = shadow.take(channel_of(kind.name), payload)
            answers[_answer(code, kind, payload)] += 1
            if code is None:
                taken.append(payload)
            else:
                refused.append((payload, code))
            if DropCode.FAILED in {code, kept} or shadow.changed != changed:
                answer = f"{code}, retained {kept}, changed {shadow.changed - changed}"
                _note(result, f"bus/{kind.name}, {mutation.path}: {answer}")
        result.bus.append(
            FieldCount(
                message=f"bus/{kind.name}", fields=len(names), sent=len(refused) + len(taken),
                answers=dict(answers), escaped=answers[DropCode.FAILED.value] + failed_kept,
                changed=shadow.changed - changed,
            )
        )  # fmt: skip
    return chosen


def _answer(code: DropCode | None, kind: Kind, payload: bytes) -> str:
    if code is None:
        return TAKEN
    return code.value if code is not DropCode.MALFORMED else why_malformed(channel_of(kind.name), payload)


def mutate_others(count: int, seed: int, result: FieldsResult, say: Say) -> None:
    """Give mutated telecommands, signed messages and packets to the code that takes them."""
    chance = random.Random(f"{seed} other fields")  # noqa: S311 - as above
    judge = Commands()
    decoders: dict[str, Callable[[bytes], object]] = {
        "ack": lambda data: decode_ack(data, RING),
        "flow": lambda data: decode_flow(data, RING),
        "upload chunk": lambda data: decode_chunk(data, RING, NODE),
    }
    groups: list[tuple[str, list[Kind], Callable[[Kind, bytes], str]]] = [
        *(
            (kind.name, [kind], lambda kind, data: _decoded(decoders[kind.name], data))
            for kind in signed_kinds()
        ),
        ("telecommands", command_kinds(), lambda _, data: judge.answer(data)),
        ("packets", packet_kinds(), lambda _, data: _decoded(lambda d: decode_frame(d).packet(), data)),
    ]
    shares = _share([kind for _, kinds, _ in groups for kind in kinds], count, chance)
    for number, (name, kinds, ask) in enumerate(groups):
        say(f"fields of {name}", number / len(groups))
        found = FieldCount(message=name, fields=0)
        answers: Counter[str] = Counter()
        for kind in kinds:
            names: set[str] = set()
            for mutation in _drawn(kind, shares[kind.name], chance):
                names.add(mutation.path)
                found.sent += 1
                try:
                    answers[ask(kind, kind.seal(mutation.tree))] += 1
                except Exception as error:
                    found.escaped += 1
                    answers[type(error).__name__] += 1
                    _note(result, f"{kind.name}, {mutation.path}: {type(error).__name__}: {error}")
            found.fields += len(names)
        found.answers = dict(answers)
        result.others.append(found)
    judge.close()


def _decoded(decode: Callable[[bytes], Any], data: bytes) -> str:
    try:
        decode(data)
    except (AckError, SignedError, FrameError) as error:
        return kind_of(str(error))
    return TAKEN


async def run_live(folder: Path, chosen: Chosen, result: FieldsResult, say: Say) -> None:
    """Send the mutations of the bus to a running node; its files stay in `folder` if something is wrong."""
    result.live = [LiveCount(message=f"bus/{name}") for name in {**chosen.refused, **chosen.taken}]
    total = sum(map(len, chosen.refused.values())) + sum(map(len, chosen.taken.values()))
    if total:

        def progress(what: str) -> None:
            say(what, sum(count.sent for count in result.live) / total)

        async with FieldNode(folder) as node:
            before = await node.learn()
            result.recovered = await _send_refused(node, chosen, before, result, progress)
            if result.recovered:
                await _send_taken(node, chosen, result, progress)
                result.recovered = await _recovers(node, before, result)
            result.node_restarts, result.power_failures = node.restarts, node.power_failures
            result.node_end = await node.stop()
    if result.is_right:
        shutil.rmtree(folder, ignore_errors=True)


async def _send_refused(
    node: FieldNode, chosen: Chosen, before: dict[str, Any], result: FieldsResult, progress: Progress
) -> bool:
    """Send what is to be refused; return False if sound messages do not put right what it changed."""
    for count in result.live:
        name = count.message.removeprefix("bus/")
        for batch in _batches(chosen.refused.get(name, [])):
            progress(f"bus/{name}, to be refused")
            await node.speak()
            expected = Counter(code.value for _, code in batch)
            await _send(node, count, [payload for payload, _ in batch], expected)
            after = await node.look()
            if after != before:
                count.changed += 1
                _note(result, f"bus/{name}: {_difference(before, after)} after refused messages")
                if not await _recovers(node, before, result):
                    return False
    return True


async def _send_taken(node: FieldNode, chosen: Chosen, result: FieldsResult, progress: Progress) -> None:
    for count in result.live:
        name = count.message.removeprefix("bus/")
        for payloads in _batches(chosen.taken.get(name, [])):
            progress(f"bus/{name}, to be taken")
            await _send(node, count, payloads, Counter({TAKEN: len(payloads)}))
            # The power loop works with what was taken last, before other messages replace it.
            await node.look()


async def _send(node: FieldNode, count: LiveCount, payloads: list[bytes], expected: Counter[str]) -> None:
    answers = await node.send([(channel_of(count.message.removeprefix("bus/")), each) for each in payloads])
    count.sent += len(payloads)
    count.answers = dict(Counter(count.answers) + answers)
    count.unaccounted += abs(len(payloads) - answers.total())
    count.unexpected += (expected - answers).total()


async def _recovers(node: FieldNode, before: dict[str, Any], result: FieldsResult) -> bool:
    for _ in range(ROUNDS):
        await node.speak()
        after = await node.look()
        if not _difference(before, after):
            return True
    _note(result, f"after sound messages the node knows {_difference(before, after)}")
    return False


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {before[key]} and then {after[key]}" for key in before if before[key] != after[key]
    )


def _batches(items: list[Any]) -> Iterable[list[Any]]:
    return (items[at : at + BATCH] for at in range(0, len(items), BATCH))


def _note(result: FieldsResult, text: str) -> None:
    if len(result.findings) < MAX_FINDINGS and text[:400] not in result.findings:
        result.findings.append(text[:400])


def run_fields(folder: Path, count: int, seed: int, say: Say) -> FieldsResult:
    """Mutate single fields of `count` messages of the bus, and half as many others; a node uses `folder`."""
    result = FieldsResult()
    mutate_others(count // 2, seed, result, say)
    asyncio.run(run_live(folder, mutate_bus(count, seed, result, say), result, say))
    return result
