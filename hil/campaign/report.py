"""`penumbra campaign report`: what campaigns found, as Markdown, made from their records alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from hil.campaign.ends_run import KINDS as ENDS
from hil.campaign.ends_run import REPORT_DUE, EndRecord
from hil.campaign.field_run import FieldsResult
from hil.campaign.field_shadow import TAKEN
from hil.campaign.fuzz_run import FuzzResult
from hil.campaign.kill_run import KINDS, KillRecord
from hil.campaign.link_run import LinkRecord
from hil.campaign.live_node import FEED_S
from hil.campaign.memory_run import MemoryOutcome, MemoryRecord
from hil.campaign.records import (
    SUMMARY,
    TRIALS,
    Header,
    Note,
    read_header,
    read_lines,
    read_machine,
    read_notes,
)
from hil.campaign.statistics import milliseconds, percent, proven_at_least, table
from hil.campaign.strata import Stratum
from hil.campaign.strikes import COUNTED, FOUND, UNDETECTED, Fate, StrikeRecord
from hil.latchup_trials import Comparison, markdown
from telemetry.errors import PenumbraError

REPAIR_BAR_MS: Final = 20.0
"""Bar of the 99th percentile of a repair in place (issue 4)."""


def last_notes(notes: Iterable[Note]) -> list[Note]:
    """Return the last note of each worker."""
    return list({str(note["worker"]): note for note in notes if "worker" in note}.values())


def strikes_section(path: Path, header: Header) -> str:
    """Return the section of a campaign of strikes."""
    records: list[StrikeRecord] = list(read_lines(path / TRIALS, StrikeRecord))
    notes = last_notes(read_notes(path))
    rows = []
    strata = [s for s in Stratum if any(r.stratum is s for r in records)]
    for stratum in [*strata, None]:
        mine = [r for r in records if stratum in (r.stratum, None) and r.fate in COUNTED]
        fates = Counter(r.fate for r in mine)
        undetected = sum(fates[fate] for fate in UNDETECTED)
        repair_ms = [r.repair_ms for r in mine if r.fate is Fate.REPAIRED and r.repair_ms is not None]
        rows.append(
            [
                "all" if stratum is None else stratum.value,
                f"{len(mine):,}",
                str(fates[Fate.REPAIRED]),
                str(fates[Fate.REDONE]),
                str(fates[Fate.GAVE_UP]),
                str(undetected),
                f"{100 * proven_at_least(undetected, len(mine)):.3f}",
                milliseconds([r.detect_ms for r in mine if r.fate in FOUND and r.detect_ms is not None]),
                milliseconds(repair_ms),
            ]
        )

    def total(key: str) -> int:
        return sum(int(note.get(key) or 0) for note in notes)

    released, wrong = total("released"), total("wrong")
    wall_s = sum(float(note.get("wall_s") or 0) for note in notes)
    ended = [str(note["ended"]) for note in notes if note.get("ended")]
    settings = ", ".join(f"{key} {value}" for key, value in header.settings.items())
    only = "".join(f" --stratum {each}" for each in str(header.settings.get("strata", "")).split(",") if each)
    lines = [
        "## Strikes on a decoding worker\n",
        f"`penumbra campaign run strikes --trials {_trials(records)} --seed {header.seed}{only} --out DIR`\n",
        f"Image {header.image_id}; {settings}. {wall_s / 60:.0f} minutes, {len(notes)} worker(s), "
        f"{total('epochs'):,} epochs committed, {total('dirty'):,} decoded again, "
        f"{total('unsure'):,} of which it is not known what rows they used.\n",
        table(
            (
                "memory",
                "strikes used",
                "repaired",
                "redone",
                "gave up",
                "undetected",
                "detected, % at 95 % at least",
                "strike to proof, ms, p50 / p99 / max",
                "repair in place, ms, p50 / p99 / max",
            ),
            rows,
        ),
        f"Tokens released under fire: {released:,}, all compared with what the undisturbed model says; "
        f"**wrong: {wrong:,}** (at most {100 * (1 - proven_at_least(wrong, released)):.4f} % at 95 %). "
        f"Jobs that ended: {total('jobs'):,}, at another token than their reference: {total('wrong_ends')}. "
        f"Reports on memory nobody had struck: {total('unexplained')}.\n",
        "A strike counts when an epoch used the memory it hit; it is undetected when the first proof that "
        "began after it, of an epoch that used it, did not find it. A strike on rows that nobody used, or "
        "that an epoch may have used and nobody can tell, is drawn again "
        f"({sum(r.fate is Fate.UNUSED for r in records):,} of them).\n",
    ]
    if ended:
        lines.append("Workers that gave up: " + "; ".join(sorted(set(ended))[:5]) + ".\n")
    return "\n".join(lines)


def _trials(records: Sequence[StrikeRecord]) -> int:
    counts = Counter(record.stratum for record in records if record.fate in COUNTED)
    return min(counts.values(), default=0)


def kills_section(path: Path, header: Header) -> str:
    """Return the section of a campaign of process faults."""
    records: list[KillRecord] = list(read_lines(path / TRIALS, KillRecord))
    rows = []
    for target, kind in KINDS:
        mine = [r for r in records if (r.target, r.kind) == (target, kind)]
        rows.append(
            [
                f"{'SIGKILL' if kind == 'kill' else 'SIGSTOP'} of the {target}",
                str(len(mine)),
                str(sum(r.back for r in mine)),
                milliseconds([r.detect_ms for r in mine if r.detect_ms is not None]),
                milliseconds([r.token_ms for r in mine if r.token_ms is not None]),
                milliseconds([r.back_ms for r in mine if r.back_ms is not None]),
            ]
        )
    each = len(records) // len(KINDS)
    head = (
        "fault", "trials", "service back", "fault to detection, ms, p50 / p99 / max",
        "detection to first new token, ms", "fault to first new token in the archive, ms",
    )  # fmt: skip
    return "\n".join(
        [
            "## Processes killed and stopped\n",
            f"`penumbra campaign run kills --trials {each} --seed {header.seed} --out DIR`\n",
            f"Image {header.image_id}; {_settings(header)}. {_live_note(path)}\n",
            table(head, rows),
            "A stopped worker is found by its pings (period 0.1 s, fatal after 1 s here), a stopped node by "
            f"its parent, {FEED_S:g} s after its last feed. For faults of the node the time to the first "
            "token counts from the fault.\n",
        ]
    )


def memory_section(path: Path, header: Header) -> str:
    """Return the section of a campaign of flips anywhere in memory."""
    records: list[MemoryRecord] = list(read_lines(path / TRIALS, MemoryRecord))
    parts = [
        "## Bits anywhere in resident memory\n",
        f"`penumbra campaign run memory --worker {sum(r.target == 'worker' for r in records)} "
        f"--node {sum(r.target == 'node' for r in records)} --seed {header.seed} --out DIR`\n",
        f"Image {header.image_id}; {_settings(header)}. {_live_note(path)}\n",
    ]
    outcomes = list(MemoryOutcome)
    rows = []
    for target in ("worker", "node"):
        of_target = [r for r in records if r.target == target]
        for region in [None, *sorted({r.region for r in of_target})]:
            mine = [r for r in of_target if region in {None, r.region}]
            counts = Counter(r.outcome for r in mine)
            rows.append(
                [
                    f"**{target}**" if region is None else region,
                    str(len(mine)),
                    *(str(counts[outcome]) for outcome in outcomes),
                ]
            )
    parts.append(table(("memory", "flips", *(o.value.replace("_", " ") for o in outcomes)), rows))
    rows = []
    for target in ("worker", "node"):
        mine = [r for r in records if r.target == target]
        for outcome in outcomes:
            count = sum(r.outcome is outcome for r in mine)
            rows.append(
                [f"{target}: {outcome.value.replace('_', ' ')}", str(count), percent(count, len(mine))]
            )
    parts.append(table(("outcome", "flips", "share, % (95 % interval)"), rows))
    back = [r.back_ms for r in records if r.back_ms is not None]
    parts.append(
        "A flip is watched for 0.6 s, and until a new token has come down; what the scrub of pages that no "
        "epoch reads comes to only later counts as masked.\n"
    )
    parts.append(f"Service back after a restart, ms, p50 / p99 / max: {milliseconds(back)}.\n")
    return "\n".join(parts)


def _settings(header: Header) -> str:
    return ", ".join(f"{key} {value}" for key, value in header.settings.items())


def _live_note(path: Path) -> str:
    """Say what all nodes of a campaign released, and how their ledgers closed."""
    notes = last_notes(read_notes(path))

    def total(key: str) -> int:
        return sum(int(note.get(key) or 0) for note in notes)

    released, wrong = total("released"), total("wrong")
    closed = sum(bool(note.get("consistent")) and not note.get("lost") for note in notes)
    return (
        f"{total('boots')} boots; {released:,} tokens released, all compared with what the undisturbed model "
        f"says: **wrong {wrong}**; jobs ended {total('jobs')}, at another token than their reference "
        f"{total('wrong_ends')}; certificates not proven on the ground {total('unproven')}. Telemetry: "
        f"{total('generated'):,} records generated, lost {total('lost')}, duplicated {total('duplicated')}; "
        f"ledger, every sequence number of every boot looked up at the end, closed in {closed} of "
        f"{len(notes)} runs."
    )


def link_section(path: Path, header: Header) -> str:
    """Return the section of a campaign against the space link."""
    records: list[LinkRecord] = list(read_lines(path / TRIALS, LinkRecord))
    rows = []
    for broker in [*sorted({record.broker for record in records}), "all"]:
        mine = [record for record in records if broker in (record.broker, "all")]
        wrong = sum(not r.is_right for r in mine)
        rows.append(
            [
                broker,
                f"{len(mine):,}",
                f"{sum(r.generated for r in mine):,}",
                f"{sum(r.archived for r in mine):,}",
                str(sum(r.dropped for r in mine)),
                str(sum(r.lost for r in mine)),
                str(sum(r.duplicated for r in mine)),
                str(wrong),
                f"{100 * proven_at_least(wrong, len(mine)):.2f}",
                f"{sum(r.commands for r in mine):,}",
                f"{sum(r.jobs for r in mine):,}",
            ]
        )
    faults: Counter[str] = Counter()
    for record in records:
        faults.update(record.faults)
    told = ", ".join(f"`{kind}` {count:,}" for kind, count in sorted(faults.items()))
    problems = [f"- schedule {r.index}: {'; '.join(r.problems) or 'not drained'}" for r in records
                if not r.is_right]  # fmt: skip
    return "\n".join(
        [
            "## Space link: kills, cuts and lies\n",
            f"{len(records):,} random schedules, seed {header.seed}; 4 to 9 strikes each, then peace until "
            "the node's store is empty. Node's end and ground's end are processes ended by SIGKILL, the "
            "broker is mosquitto (MQTT 5) or amqtt (3.1.1). Compared record by record from the databases of "
            f"both sides. Strikes: {told}; {sum(r.boots for r in records):,} boots of the node.\n",
            table(
                ["broker", "schedules", "generated", "archived", "dropped", "lost", "duplicated",
                 "not right", "right in at least, %", "commands executed", "jobs made of them"],
                rows,
            ),
            "Carried out beside them, over the same kills: "
            f"{sum(r.dumps for r in records):,} dumps of 60,000 bytes in chunks, "
            f"{sum(r.dumps_broken for r in records)} of them not whole in the archive; "
            f"{sum(r.uploads for r in records):,} tables uploaded in chunks and committed; "
            f"{sum(r.interrupted for r in records)} such commands were interrupted by a kill and reported "
            f"so by the next boot, {sum(r.unanswered for r in records)} were begun and not answered once.\n",
            *problems,
        ]
    )  # fmt: skip


def ends_section(path: Path, header: Header) -> str:
    """Return the section of a campaign of flights that are ended."""
    records: list[EndRecord] = list(read_lines(path / TRIALS, EndRecord))
    names = {
        "hup": "SIGHUP, or its terminal closes", "term": "SIGTERM", "twice": "SIGTERM twice",
        "kill": "SIGKILL", "pipe": "closed pipe", "full": "full output",
    }  # fmt: skip
    rows = []
    for kind in ENDS:
        mine = [r for r in records if r.kind == kind]
        due = [r for r in mine if r.begun and kind in REPORT_DUE]
        phases = Counter(r.phase for r in mine)
        rows.append(
            [
                names[kind],
                str(len(mine)),
                ", ".join(f"{phase} {count}" for phase, count in phases.most_common()),
                str(sum(r.processes_left for r in mine)),
                str(sum(r.shared_left for r in mine)),
                str(sum(r.cleared for r in mine)),
                f"{sum(r.report for r in due)} of {len(due)}",
                milliseconds([1e3 * r.end_s for r in mine if kind not in {"pipe", "full"}]),
                str(sum(not r.is_right for r in mine)),
            ]
        )
    head = (
        "the bench's end", "flights", "in phase", "processes left", "shared memory left",
        "cleared by the next flight", "reports written of those due", "to its end, ms, p50 / p99 / max",
        "not right",
    )  # fmt: skip
    return "\n".join(
        [
            "## Flights that are ended\n",
            f"`penumbra campaign run ends --trials {len(records) // len(ENDS)} --seed {header.seed} "
            "--images DIR --out DIR`\n",
            f"Image {header.image_id}. Each flight is a command of its own with broker, node and worker; its "
            "end comes at a random moment, that of a full output at its start. Processes are those that "
            "inherited the flight's environment; shared memory is looked for once the next flight has begun, "
            "which clears what a killed bench left. A report is due once there is a run directory, but not "
            "after SIGKILL or a second signal.\n",
            table(head, rows),
            *(f"- flight {r.index} ({r.kind}): {'; '.join(r.problems)}" for r in records if not r.is_right),
        ]
    )


def fuzz_section(path: Path, _: Header) -> str:
    """Return the section of a fuzzing run."""
    result = msgspec.json.decode((path / SUMMARY).read_bytes(), type=FuzzResult)
    judged = result.commands
    decoders = table(
        ["decoder", "inputs", "rejected", "accepted undetected", "other errors", "over 1 s", "slowest, ms",
         "single bits flipped", "of these accepted"],
        [
            [r.decoder, f"{r.inputs:,}", f"{r.rejected:,}", str(r.undetected), str(r.escaped), str(r.slow),
             f"{r.slowest_ms:.1f}", f"{r.flips:,}", str(r.flips_accepted)]
            for r in result.decoders
        ],
    )  # fmt: skip
    attacks = table(
        ["attack", "answers"],
        [
            [name, ", ".join(f"`{answer}` {count:,}" for answer, count in answers.items())]
            for name, answers in judged.hostile.items()
        ],
    )
    reasons = ", ".join(f"`{code}` {count:,}" for code, count in sorted(judged.rejected.items()))
    return "\n".join(
        [
            "## Fuzzing\n",
            f"Seed {result.seed}, {result.wall_s:.0f} s on one core. Damage: bits, bursts, msgpack's own "
            "bytes, cut, removed, inserted and repeated pieces, splices of two; one frame or block of four "
            "gets a CRC that fits its damage, so that what lies behind is reached (what is accepted then is "
            "no error). The bus carries no CRC: its values are checked.\n",
            decoders,
            f"Telecommands: {judged.inputs:,} mutated, {judged.unchanged:,} of them unchanged by luck, "
            f"**{judged.executed} accepted**, {judged.escaped} other errors, slowest "
            f"{judged.slowest_ms:.1f} ms. Rejected: {reasons}.\n",
            attacks,
            f"Kept: {result.corpus} inputs, one for each distinct answer; findings: {result.findings}.\n",
            *([] if result.fields is None else [fields_section(result.fields)]),
        ]
    )


def fields_section(result: FieldsResult) -> str:
    """Return the part of a fuzzing run that is about single fields."""
    counts = [*result.bus, *result.others]
    asked = table(
        ["message", "fields", "mutations", "accepted", "refused, by why", "other errors",
         "refused, and something changed"],
        [
            [c.message, str(c.fields), f"{c.sent:,}", f"{c.answers.get(TAKEN, 0):,}",
             _answers({why: count for why, count in c.answers.items() if why != TAKEN}),
             str(c.escaped), str(c.changed)]
            for c in counts
        ],
    )  # fmt: skip
    counted = table(
        ["message", "sent", "counted by the node", "not counted", "counted otherwise than expected",
         "batches refused after which something differs"],
        [
            [c.message, f"{c.sent:,}", _answers(c.answers), str(c.unaccounted), str(c.unexpected),
             str(c.changed)]
            for c in result.live
        ],
    )  # fmt: skip
    sent = sum(c.sent for c in result.live)
    findings = "".join(f"- {finding}\n" for finding in result.findings)
    return "\n".join(
        [
            "### Single fields\n",
            "Each field of a sound message, nested ones too, is taken out, or set to another type or value, "
            "with all others valid; what is signed or has a CRC gets the one that fits. Asked in the bench, "
            "of the flight's own code (telecommands with their effects, each undone; messages of the bus as "
            "retained and as live, the answers are to the live ones):\n",
            asked,
            f"The {sent:,} messages of the bus were also sent to a node that runs, through a broker, and "
            "counted by it. Those to be refused came first: what its housekeeping shows (clock, eclipse, "
            "battery, array, board, mode) must not change.\n",
            counted,
            f"Restarts of the node: **{result.node_restarts}**; it ended with {result.node_end}; failures of "
            f"its power loop on what had been taken: {result.power_failures}; after sound messages it "
            f"{'knew' if result.recovered else '**did not know**'} again what it knew before.\n",
            findings,
        ]
    )


def _answers(answers: dict[str, int]) -> str:
    return ", ".join(f"`{answer}` {count:,}" for answer, count in sorted(answers.items()))


def latchup_section(path: Path, _: Header) -> str:
    """Return the section of the trials of the latch-up detector."""
    return markdown(msgspec.json.decode((path / SUMMARY).read_bytes(), type=Comparison))


SECTIONS: Final[dict[str, Callable[[Path, Header], str]]] = {
    "strikes": strikes_section,
    "kills": kills_section,
    "memory": memory_section,
    "latchup": latchup_section,
    "link": link_section,
    "ends": ends_section,
    "fuzz": fuzz_section,
}


def make_report(directories: Sequence[Path]) -> str:
    """Return the report of campaigns, in the order given.

    Raises
    ------
    PenumbraError
        A directory holds no campaign, or one that cannot be read.
    """
    parts = ["# Fault campaigns\n"]
    machines = {m.cpu: m for path in directories if (m := read_machine(path)) is not None}
    for machine in machines.values():
        features = ", ".join(machine.features)
        parts.append(
            f"Measured on {machine.cores} cores of {machine.cpu} ({features}), Python {machine.python}, ONNX "
            f"Runtime {machine.onnxruntime}. Intervals are exact (Clopper-Pearson, 95 %).\n"
        )
    for path in directories:
        header = read_header(path)
        section = SECTIONS.get(header.plan)
        if section is None:
            raise PenumbraError(
                f"{path}: plan {header.plan!r}: {', '.join(SECTIONS)} allowed", "name other directories"
            )
        parts.append(section(path, header))
        parts += [f"Remark: {note['remark']}\n" for note in read_notes(path) if "remark" in note]
    return "\n".join(parts)
