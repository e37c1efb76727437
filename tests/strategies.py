"""hypothesis strategies, one section a package. Append yours; keep a section small."""

from __future__ import annotations

import string

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from fdir import health, recovery
from node import modes
from telemetry import packets as p
from telemetry.ack import Ack
from telemetry.commands import (
    ActivateKey,
    Arguments,
    Arm,
    Cancel,
    DeleteProduct,
    DumpMemory,
    ExternalControl,
    Infer,
    LoadFdir,
    Ping,
    QueryFdir,
    RearmFdir,
    RecomputeBaseline,
    ReportLedger,
    ResendProduct,
    ResetCounters,
    RestartWorker,
    Resync,
    RetireKey,
    RollbackImage,
    ScheduleDelete,
    ScheduleInsert,
    ScheduleList,
    ScheduleShift,
    ScrubNow,
    SequenceLoad,
    SequenceStart,
    SequenceStep,
    SequenceStop,
    SetFdirRow,
    SetMode,
    SetPowerCap,
    SetRates,
    SwitchImage,
    UploadAbort,
    UploadBegin,
    UploadCommit,
    UploadStatus,
)
from telemetry.envelope import Command, make_command
from telemetry.sampling import MAX_TOP_K, Sampling

# --- telemetry ---------------------------------------------------------------------------------

counts = st.integers(0, 2**63 - 1)
times_ns = st.integers(-(2**63), 2**63 - 1)
reals = st.floats(allow_nan=False, allow_infinity=False, width=64)
positive_reals = st.floats(0, 1e12)
fractions = st.floats(0, 1)
texts = st.text(max_size=40)
evidence = st.dictionaries(
    texts, st.one_of(texts, st.integers(-(2**63), 2**63 - 1), reals, st.booleans(), st.none()), max_size=4
)
node_names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,30}", fullmatch=True)
job_ids = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
boots = st.integers(0, 2**32 - 1)
sequences = st.integers(0, 2**63 - 1)
streams = st.sampled_from(p.Stream)
token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=8)

certificates = st.builds(
    p.Certificate,
    image_id=texts,
    epoch=counts,
    kv_digest=st.binary(min_size=8, max_size=8),
    chain=st.binary(min_size=32, max_size=32),
)
stream_ledgers = st.builds(
    p.StreamLedger,
    boot=boots,
    stream=streams,
    generated=counts,
    acked=counts,
    stored=counts,
    dropped=st.dictionaries(texts, counts, max_size=3),
)

key_reports = st.builds(p.KeyReport, state=texts, use=texts, last_seq=st.none() | counts)
scheduled_commands = st.builds(
    p.ScheduledCommand,
    entry=counts,
    execute_ns=times_ns,
    name=texts,
    key_id=texts,
    command_seq=counts,
    sequence=st.none() | texts,
)

row_reports = st.builds(
    p.RowReport,
    row=texts,
    state=texts,
    watch=texts,
    point=texts,
    fired=st.booleans(),
    evaluations=counts,
    consecutive=counts,
    cumulative=counts,
    actions=counts,
    last_violation_s=st.none() | reals,
)

PACKETS: dict[str, st.SearchStrategy[p.Packet]] = {
    "housekeeping": st.builds(
        p.Housekeeping,
        mode=st.sampled_from(p.Mode),
        uptime_s=reals,
        clock_locked=st.booleans(),
        sunlit=st.none() | fractions,
        eclipse_entry_ns=st.none() | times_ns,
        eclipse_exit_ns=st.none() | times_ns,
        battery_soc=st.none() | fractions,
        array_w=st.none() | reals,
        load_w=reals,
        ceiling_w=reals,
        duty=fractions,
        board_c=st.none() | reals,
        worker_state=texts,
        worker_generation=counts,
        worker_restarts=counts,
        tokens_released=counts,
        tokens_discarded=counts,
        token_rate_hz=positive_reals,
        epochs_clean=counts,
        epochs_dirty=counts,
        strikes_detected=counts,
        strikes_repaired=counts,
        scan_ms=positive_reals,
        jobs_queued=counts,
        jobs_done=counts,
        spool_records=counts,
        spool_bytes=counts,
        link_up=st.booleans(),
        commands_accepted=counts,
        commands_rejected=counts,
        garbage_messages=counts,
        bus_messages=counts,
        dropped=st.dictionaries(texts, counts, max_size=3),
        jobs_active=counts,
        batch=counts,
        threads=counts,
        prefill_tokens=counts,
        compute_trips=counts,
        fdir_external=st.booleans(),
        fdir_level=st.none() | counts,
        resets=counts,
        scrub_pass_s=st.none() | reals,
        loop_lag_ms=positive_reals,
        watchdog=texts,
        eps_source=texts,
    ),
    "event": st.builds(
        p.Event, severity=st.sampled_from(p.Severity), name=texts, text=texts, evidence=evidence
    ),
    "command_schedule": st.builds(
        p.CommandSchedule,
        entries=st.lists(scheduled_commands, max_size=3),
        sequences=st.lists(texts, max_size=3),
    ),
    "result": st.builds(
        p.Result,
        job=job_ids,
        first=counts,
        tokens=token_ids,
        text=st.binary(max_size=40),
        certificate=certificates,
        prompt_tokens=st.none() | token_ids,
        finish=st.none() | texts,
        logprobs=st.none() | st.lists(reals, max_size=8),
    ),
    "verification": st.builds(
        p.Verification,
        key_id=texts,
        command_seq=counts,
        name=texts,
        stage=st.sampled_from(p.Stage),
        ok=st.booleans(),
        code=texts,
        reason=texts,
        entry=st.none() | counts,
    ),
    "fdir": st.builds(
        p.FdirReport,
        monitor=texts,
        level=st.sampled_from(p.Level),
        outcome=st.sampled_from(p.Outcome),
        action=texts,
        detected_ns=times_ns,
        recovered_ns=st.none() | times_ns,
        region=texts,
        page=st.none() | counts,
        role=texts,
        evidence=evidence,
        count=st.integers(1, 10**6),
        first=st.none()
        | st.builds(
            p.FirstFinding,
            level=st.sampled_from(p.Level),
            action=texts,
            detected_ns=times_ns,
            recovered_ns=st.none() | times_ns,
            evidence=evidence,
        ),
        covers=st.lists(st.tuples(counts, counts, counts), max_size=3),
    ),
    "flight_record": st.builds(
        p.FlightRecord,
        reason=texts,
        level=st.none() | st.sampled_from(p.Level),
        noted=counts,
        entries=st.binary(max_size=40),
    ),
    "fdir_status": st.builds(
        p.FdirStatus,
        table_sha256=texts,
        overall=texts,
        external_control=st.booleans(),
        resets=counts,
        max_resets=counts,
        rows=st.lists(row_reports, max_size=3),
    ),
    "boot": st.builds(
        p.BootReport,
        software=texts,
        boot=counts,
        clean_shutdown=st.booleans(),
        config_sha256=texts,
        image_id=st.none() | texts,
        board=texts,
        python=texts,
        onnxruntime=st.none() | texts,
        resumed_job=st.none() | job_ids,
        resumed_jobs=st.lists(job_ids, max_size=3),
        mode=st.sampled_from(p.Mode),
        slot=st.none() | texts,
        reasons=st.lists(texts, max_size=2),
        repaired_state=st.lists(texts, max_size=2),
    ),
    "plan": st.builds(
        p.PowerPlan,
        ceiling_w=reals,
        duty=fractions,
        reason=texts,
        battery_soc=st.none() | fractions,
        soc_floor=fractions,
        eclipse_entry_ns=st.none() | times_ns,
        eclipse_exit_ns=st.none() | times_ns,
        source=texts,
        binding=texts,
        binds_at_ns=st.none() | times_ns,
        note=texts,
        array_gain=reals,
        die_c=st.none() | reals,
        least_priority=st.integers(0, 9),
        backlog_tokens=counts,
        backlog_clear_ns=st.none() | times_ns,
        horizon=st.lists(
            st.builds(p.PlanSegment, end_ns=times_ns, ceiling_w=reals, battery_soc=fractions), max_size=3
        ),
    ),
    "ledger": st.builds(p.Ledger, streams=st.lists(stream_ledgers, max_size=4)),
    "security": st.builds(
        p.SecurityReport,
        accepted=counts,
        redelivered=counts,
        rejected=st.dictionaries(texts, counts, max_size=3),
        last_key_id=st.none() | texts,
        last_seq=st.none() | counts,
        last_reason=st.none() | texts,
        keys=st.dictionaries(texts, key_reports, max_size=2),
    ),
    "upload": st.builds(
        p.UploadReport,
        sha256=texts,
        kind=texts,
        chunks=counts,
        received=counts,
        missing=st.lists(st.tuples(counts, counts), max_size=3),
        refused=counts,
    ),
    "product": st.builds(
        p.Product,
        product=job_ids,
        kind=st.sampled_from(["memory_dump", "file"]),
        name=texts,
        first_byte=counts,
        parts=st.lists(
            st.builds(p.ProductPart, first_byte=counts, size_bytes=counts, file=texts, offset=counts),
            max_size=2,
        ),
        size_bytes=counts,
        chunk_bytes=st.integers(1, 2**31),
        sha256=texts,
    ),
    "product_chunk": st.builds(p.ProductChunk, product=job_ids, index=counts, data=st.binary(max_size=200)),
}
"""A strategy for every packet type, by its name on the wire."""

packets = st.one_of(*PACKETS.values())

key_ids = st.text(string.ascii_lowercase, min_size=1, max_size=8)
samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 2),
    top_k=st.integers(1, MAX_TOP_K),
    top_p=st.floats(0, 1, exclude_min=True),
    repetition_penalty=st.floats(1, 2),
    seed=st.integers(0, 2**63 - 1),
    stop=st.lists(st.text(min_size=1, max_size=64), max_size=4).map(tuple),
    logprobs=st.booleans(),
)
command_names = st.sampled_from(["ping", "infer", "set_mode"])
sequence_names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,39}", fullmatch=True)
raw_args = st.dictionaries(texts, texts | st.integers(-(2**63), 2**63 - 1), max_size=3)
steps = st.builds(
    SequenceStep,
    delay_s=st.floats(0, 1e6),
    command=command_names,
    args=raw_args,
    crc32c=st.integers(0, 2**32 - 1),
)
key_ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", fullmatch=True)
sha256s = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
chunk_indexes = st.integers(0, 2**32 - 1)
row_ids = st.sampled_from(["*", "weights.digest", "node.memory", "a.b_2.c"])
arguments: st.SearchStrategy[Arguments] = st.one_of(
    st.builds(Ping),
    st.builds(
        Infer,
        job=job_ids,
        prompt=st.text(min_size=1, max_size=60),
        max_tokens=st.integers(1, 2048),
        sampling=samplings,
        priority=st.integers(0, 9),
        deadline_ns=st.none() | times_ns,
    ),
    st.builds(Cancel, job=job_ids),
    st.builds(SetMode, mode=st.sampled_from(["nominal", "safe"])),
    st.builds(SetPowerCap, power_w=st.none() | st.floats(0.1, 1000)),
    st.builds(ReportLedger),
    st.builds(SetFdirRow, row=row_ids, state=st.sampled_from(["enabled", "passive", "disabled"])),
    st.builds(RearmFdir, row=row_ids),
    st.builds(ExternalControl, on=st.booleans()),
    st.builds(ResetCounters),
    st.builds(LoadFdir, source=st.sampled_from(["configured", "uplinked", "previous"])),
    st.builds(ScrubNow, region=st.sampled_from(["supervisor.code", "config"])),
    st.builds(QueryFdir, recorder=st.booleans()),
    st.builds(ActivateKey, key=key_ids),
    st.builds(RetireKey, key=key_ids),
    st.builds(Arm, command=command_names, args=raw_args),
    st.builds(ScheduleInsert, t_ns=times_ns, command=command_names, args=raw_args),
    st.builds(ScheduleDelete, entry=st.integers(1, 2**63 - 1)),
    st.builds(ScheduleShift, by_s=st.floats(-1e7, 1e7), entry=st.none() | st.integers(1, 2**63 - 1)),
    st.builds(ScheduleList),
    st.builds(
        SequenceLoad, sequence=sequence_names, steps=st.lists(steps, min_size=1, max_size=3).map(tuple)
    ),
    st.builds(SequenceStart, sequence=sequence_names),
    st.builds(SequenceStop, sequence=sequence_names),
    st.builds(RestartWorker),
    st.builds(RecomputeBaseline, region=st.sampled_from(["supervisor.code", "config"])),
    st.builds(SetRates, housekeeping_s=st.none() | st.floats(0.05, 3600)),
    st.builds(
        DumpMemory,
        region=st.sampled_from(["supervisor.code", "worker.weights"]),
        first_byte=st.integers(0, 2**40),
        size_bytes=st.integers(1, 16 << 20),
    ),
    st.builds(ResendProduct, product=job_ids, first=chunk_indexes, last=st.none() | chunk_indexes),
    st.builds(DeleteProduct, product=job_ids),
    st.builds(
        UploadBegin,
        kind=st.sampled_from(["image", "fdir_table"]),
        sha256=sha256s,
        size_bytes=st.integers(1, 16 << 30),
        chunk_bytes=st.integers(256, 65536),
    ),
    st.builds(UploadStatus),
    st.builds(UploadAbort),
    st.builds(UploadCommit, sha256=sha256s),
    st.builds(SwitchImage, slot=st.sampled_from(["a", "b"])),
    st.builds(RollbackImage),
)
"""Of every command that any key may give."""
resyncs = st.builds(Resync, key=key_ids, last_seq=sequences)


@st.composite
def commands(draw: st.DrawFn, key_id: str) -> Command:
    """Draw a command of the dictionary, for signing with `key_id`."""
    issue = draw(st.integers(-(2**63), 2**63 - 2))
    return make_command(
        draw(arguments | resyncs),
        key_id=key_id,
        seq=draw(sequences),
        t_issue_ns=issue,
        t_expire_ns=draw(st.integers(issue + 1, 2**63 - 1)),
        node=draw(node_names),
    )


@st.composite
def acks(draw: st.DrawFn) -> Ack:
    """Draw an acknowledgement with gaps ascending, apart and below its end."""
    cuts = sorted(draw(st.sets(st.integers(0, 2**40), max_size=12)))
    gaps: list[tuple[int, int]] = []
    for first, last in zip(cuts[::2], cuts[1::2], strict=False):
        if not gaps or first > gaps[-1][1] + 1:
            gaps.append((first, last))
    upto = (gaps[-1][1] if gaps else 0) + draw(st.integers(1, 2**40))
    return Ack(node=draw(node_names), boot=draw(boots), stream=draw(streams), upto=upto, gaps=gaps)


# --- node.power --------------------------------------------------------------------------------

power_cases = st.fixed_dictionaries(
    {
        "array_w": st.floats(9.0, 60.0),
        "battery_wh": st.floats(12.0, 80.0),
        "platform_w": st.floats(0.0, 6.0),
        "soc_start": st.floats(0.72, 1.0),
        "eclipse_share": st.floats(0.0, 0.40),
        "phase": st.floats(0.0, 1.0, exclude_max=True),
        "gain": st.floats(0.6, 1.3),
        "work": st.lists(st.booleans(), min_size=1, max_size=12),
    }
)
"""Spacecraft, orbit and worker for a walk of the governor; not all of them are feasible."""

# --- node: modes, health, recovery ---------------------------------------------------------------

steps_s = st.one_of(st.floats(0, 0.3), st.floats(0, 100))
ping_events = st.one_of(
    st.just(health.Arm()),
    st.just(health.Disarm()),
    st.builds(health.Tick),
    st.builds(health.Pong, key=st.integers(0, 12)),
)
recovery_events = st.one_of(
    st.just(recovery.Want()),
    st.just(recovery.Unwant()),
    st.just(recovery.Rearm()),
    st.just(recovery.Ready()),
    st.just(recovery.Tick()),
    st.builds(recovery.Fault, monitor=st.just("m"), reason=st.just("r")),
    st.builds(recovery.Exited, reason=st.just("e")),
)
mode_events = st.one_of(
    st.builds(modes.Restored, safe=st.booleans()),
    st.builds(modes.Sunlight, fraction=fractions),
    st.builds(modes.Command, mode=st.sampled_from([p.Mode.NOMINAL, p.Mode.SAFE])),
    st.builds(modes.FdirSafe, reason=st.just("r")),
)

# --- node: head ----------------------------------------------------------------------------------


@st.composite
def hidden_states(
    draw: st.DrawFn, weights: npt.NDArray[np.float32], calibration: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Draw a state along a row of a table, between two, of few elements, of calibration, or any other."""
    width = weights.shape[1]
    rows = st.integers(0, len(weights) - 1)
    kind = draw(st.sampled_from(["row", "between", "few", "calibration", "any"]))
    if kind == "row":
        state = weights[draw(rows)]
    elif kind == "between":
        state = weights[draw(rows)] + weights[draw(rows)]
    elif kind == "few":
        state = np.zeros(width, np.float32)
        state[draw(st.lists(st.integers(0, width - 1), max_size=3))] = 1
    elif kind == "calibration":
        state = calibration[draw(st.integers(0, len(calibration) - 1))]
    else:
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        state = rng.standard_normal(width) * rng.choice([1, 1e-3, 30], width)
    return (state * draw(st.sampled_from([1, -1, 1e-4, 50]))).astype(np.float32)


# Prompts

_PROMPT_PARTS = (
    *(" " * length for length in (1, 2, 3, 4, 7, 8, 31, 32, 63)),
    *("\n" * length for length in (1, 2, 3, 31, 32)),
    *("\t", "\t\t", "\r\n", "\u00a0", "\u3000", "\u200b", "\u0301", "\ufffd", "\x00", "\x7f"),
    *(
        "<td>",
        "</td>",
        "<tr",
        "td>",
        "<table>",
        "</s>",
        "<bos>",
        "<eos>",
        "<unk>",
        "<start_of_turn>",
        "[multimodal]",
    ),
    *("def f(x):", "    return x", '{"a": [1, 2]}', "| a | b |", "0x1F", "12345", "The capital", "the sun"),
    *(
        "\u4e2d\u6587",
        "\u3042\u308a\u304c\u3068\u3046",
        "\u0e44\u0e17\u0e22",
        "\u0639\u0631\u0628",
        "\U0001f680",
    ),
)


def prompts(max_parts: int = 12) -> st.SearchStrategy[str]:
    """Text as operators send it: code, tables, JSON, runs of spaces, scripts without spaces, emoji.

    Without U+2581, which SentencePiece takes for a space.
    """
    characters = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=6)
    return st.lists(st.one_of(st.sampled_from(_PROMPT_PARTS), characters), max_size=max_parts).map("".join)
