"""Results of the bench as Markdown: what `docs/results/` holds is written by these functions, not by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from telemetry.figures import (
    BenchInference,
    BenchLink,
    BenchPerplexity,
    BenchTokens,
    Calibration,
    CeilingBench,
    Machine,
    PairedCost,
    Spread,
)


def inference(result: BenchInference, command: str) -> str:
    """Return the page of `penumbra bench inference`.

    Parameters
    ----------
    result
        What was measured.
    command
        What to type to measure it again.
    """
    costs, memory, parts = result.cost_pct, result.memory, result.cost_parts
    look = " Quick look: short runs, not for quoting." if result.quick else ""
    sections = [
        "# Inference, measured\n",
        f"Written by `{command}`; do not edit.{look} {result.runs} rounds; in each, every contender had its "
        "turn at every batch size, in an order that alternates. Figures are medians (smallest to largest "
        "round), ratios are taken within a round.\n",
        _machine(result.machine),
        f"Model: {result.model}, image {result.image_id}, GGUF {result.gguf_sha256[:16]}. `off`: nothing "
        "proven. `on`: verified decoding. `checked`: compute checks as well. llama.cpp: the same GGUF and "
        "threads, `llama_decode` with an explicit batch, largest logit by numpy; KV cache in its default, "
        "16-bit floats (ours: 32).\n",
        "## Bars\n",
        _table(
            ("", "measured", "bar", "stretch", "verdict"),
            (
                (bar.name, "-" if bar.measured is None else _figure(bar.measured, bar.unit),
                 _figure(bar.bar, bar.unit), _figure(bar.stretch, bar.unit), bar.verdict)
                for bar in result.bars
            ),
        ),
        "## Ratios\n",
        _table(
            ("ratio", "median (range)"),
            (
                (f"`{name}`", _spread(getattr(result.ratios, name), 3))
                for name in result.ratios.__struct_fields__
            ),
        ),
        "## Decoding\n",
        _table(
            ("sequences", "contender", "tokens/s", "step, ms"),
            (
                (str(row.batch), row.contender, _spread(row.tokens_s, 1), _spread(row.step_ms, 2))
                for row in result.decode
            ),
        ),
        "## Prefill\n",
        _table(
            ("contender", "prompt tokens", "to the first token, ms"),
            ((row.contender, str(row.tokens), _spread(row.time_ms, 0)) for row in result.prefill),
        ),
        "## What protection costs\n",
        "Paired short runs of one sequence, order rotating; 95 % bootstrap interval of the median over "
        "pairs. On a shared machine single pairs lie far apart.\n",
        _table(
            ("cost", "median", "95 % interval", "pairs, smallest to largest"),
            (
                ("verified decoding", *_cost(costs.verified)),
                ("compute checks on top", *_cost(costs.checks)),
            ),
        ),
        "The same cost of verified decoding by its parts, timed where they happen:\n",
        _table(
            ("part", "median (range)"),
            (
                ("a proof, ms", _spread(parts.scan_ms, 2)),
                ("steps of an epoch", _spread(parts.epoch_tokens, 0)),
                ("a step, ms", _spread(parts.step_ms, 2)),
                ("digests of a token's KV rows, us", _spread(parts.digest_us, 1)),
                ("sum, % of a step", _spread(parts.cost_pct, 2)),
            ),
        ),
        "## Memory\n",
        _table(
            ("", "median (range)"),
            (
                (f"sequential read, GB/s ({memory.method})", _spread(memory.read_gb_s, 1)),
                ("weights one token reads, MB", f"{memory.token_bytes / 1e6:.1f}"),
                ("floor of a token, ms", _spread(memory.floor_ms, 2)),
                ("share of the floor, `on`", _spread(result.ratios.floor_share, 3)),
                ("share of the floor, `off`", _spread(memory.share_off, 3)),
            ),
        ),
        "## Windows\n",
        "Times in which a strike on some memory goes unseen, at one sequence; `docs/verified-decoding.md` "
        "says which memory, and why. The longest counts: a row of the first layer waits through "
        "the whole run of the model.\n",
        _table(
            ("window", "us, median (range)"),
            ((window.name, _spread(window.time_us, 0)) for window in result.windows),
        ),
        "## A fresh process\n",
        _table(
            ("contender", "imports, s", "load, s", "load to first token, s", "peak memory, MB"),
            (
                (
                    start.contender, _spread(start.import_s, 2), _spread(start.load_s, 2),
                    _spread(start.first_token_s, 2),
                    ", ".join(f"{size / 1e6:.0f} ({count} seq.)" for count, size in start.peak_bytes.items()),
                )
                for start in result.starts
            ),
        ),
        "Our load includes the proof of the session and our first token is proven. Peak memory is VmHWM: "
        "pages of mapped files and shared memory count in both.\n",
    ]  # fmt: skip
    return "\n".join(sections)


def perplexity(result: BenchPerplexity, command: str) -> str:
    """Return the page of `penumbra bench perplexity`."""
    against = result.against_llama_pct
    sections = [
        "# Perplexity and agreement, measured\n",
        f"Written by `{command}`; do not edit. The first {result.tokens} tokens of `hil/bench/english.txt` "
        f"(SHA-256 {result.text_sha256[:16]}), written for this project. Reference: a float32 forward "
        "pass in numpy over the dequantised GGUF (`hil/bench/reference_gemma.py`).\n",
        _machine(result.machine),
        f"Model: {result.model}, image {result.image_id}, GGUF {result.gguf_sha256[:16]}.\n",
        _table(
            ("", "perplexity", "against the reference", "same first token", "same where it is clear", "s"),
            (
                (
                    row.contender, f"{row.perplexity:.4f}", _percent(row.against_reference_pct, signed=True),
                    _percent(row.agreement_pct), _percent(row.clear_agreement_pct), f"{row.wall_s:.0f}",
                )
                for row in result.rows
            ),
        ),
        "`penumbra`: as flown, activations rounded to 8 bits a block, as in llama.cpp. `penumbra float32`: "
        "the same graph without that rounding; it differs by the requantised Q4_K matrices only.\n",
        f"Ours against llama.cpp: {_percent(against, signed=True)}. Clear: the reference's first choice "
        "leads its second by 0.1 nat or more.\n",
        "## Where first tokens differ\n",
        _table(
            ("", "positions", "lead there, median", "largest", "lead everywhere, median", "took the second"),
            (
                (
                    found.contender, str(found.positions), _nats(found.gap_median), _nats(found.gap_max),
                    _nats(found.gap_all), str(found.second_choice),
                )
                for found in result.disagreements
            ),
        ),
        "Lead: reference logit of its first choice minus that of its second, nat.\n",
        f"The head as it flies found the largest exact logit at {result.head_top1_equal} of "
        f"{result.head_positions} positions; its `log_total` was off by {result.head_log_total_error:.2g} "
        "nat at most.\n",
    ]  # fmt: skip
    return "\n".join(sections)


def tokens(result: BenchTokens, command: str) -> str:
    """Return the page of `penumbra bench tokens`."""
    kinds = ", ".join(f"{kind} {size:,}" for kind, size in result.corpus_bytes.items())
    made_control = ", ".join(f"`{piece}` (id {number})" for piece, number in result.made_control.items())
    sections = [
        "# Token ids beside llama.cpp, measured\n",
        f"Written by `{command}`; do not edit. Our tokenizer (SentencePiece, rebuilt from the GGUF) and that "
        "of llama.cpp read the same file; control pieces in a text are text in both. Our ids must also give "
        "back every text byte for byte (U+2581 as a space).\n",
        _machine(result.machine),
        f"Model: {result.model}, GGUF {result.gguf_sha256[:16]}. Seed {result.seed}.\n",
        f"Corpus, bytes: {kinds}; SHA-256 {result.corpus_sha256[:16]}. It is made at run time and not kept: "
        f"sources of the standard library, and text by faker {result.faker or '-'} in {len(result.locales)} "
        f"languages ({', '.join(result.locales)}), with emoji.\n",
        _table(
            ("part", "texts", "bytes", "our tokens", "equal", "explained", "unexplained", "s"),
            (
                (
                    row.part, f"{row.texts:,}", f"{row.size_bytes:,}", f"{row.tokens:,}", f"{row.equal:,}",
                    f"{sum(row.explained.values()):,}", f"{row.unexplained:,}", f"{row.wall_s:.0f}",
                )
                for row in result.rows
            ),
        ),
        "## Explained differences\n",
        _table(
            ("part", "rule", "texts"),
            (
                (row.part, rule, f"{count:,}")
                for row in result.rows
                for rule, count in sorted(row.explained.items())
            ),
        ),
        *(f"- **{name}**: {rule}" for name, rule in result.rules.items()),
        f"\nMade control pieces by llama.cpp: {made_control or 'none'}. The other control pieces print "
        "nothing in both.\n",
        f"## Unexplained differences: {result.unexplained:,}\n",
    ]  # fmt: skip
    if result.differences:
        sections += [
            f"The first {len(result.differences)}, from the place on where they differ:\n",
            _table(
                ("part", "text", "ours", "llama.cpp"),
                ((each.part, code(each.text), each.ours, each.peer) for each in result.differences),
            ),
        ]
    return "\n".join(sections)


def ceiling(result: CeilingBench, command: str) -> str:
    """Return the page of `penumbra bench ceiling`."""
    return "\n".join([
        "# Ceiling, measured\n",
        f"Written by `{command}`; do not edit. {result.steps} caps in a row, eight seconds each, on a real "
        "worker under the governor of the node; draw of the `sim` board by the worker's CPU time, as means "
        "over one second, from two seconds after each step on.\n",
        _machine(result.machine),
        _table(
            ("", "measured", "bar", "stretch"),
            (
                ("means above the cap", f"{result.over_share:.2%} of {result.samples}", "3 %", ""),
                ("time from a step down to the last mean above the cap, s",
                 "-" if result.settled_s is None else _spread(result.settled_s, 2), "2", "1"),
                ("99 % are above by at most, W", f"{result.excess_w:.2f}", "", ""),
                ("left unused below the cap, share of it", _spread(result.unused_share, 3), "", ""),
            ),
        ),
    ])  # fmt: skip


def link(result: BenchLink, command: str) -> str:
    """Return the page of `penumbra bench link`."""
    contact = result.contact
    by_priority: dict[int, list[str]] = {}
    for stream, priority in contact.streams.items():
        by_priority.setdefault(priority, []).append(stream)
    return "\n".join([
        "# Space link, measured\n",
        f"Written by `{command}`; do not edit. {result.rounds} rounds, median (smallest to largest); frames "
        f"of {result.frame_bytes} bytes, an event each. Node's downlink and ground station share one Python "
        "process and one event loop; mosquitto (MQTT 5) has its own.\n",
        _machine(result.machine),
        _table(
            ("", "measured", "bar"),
            (
                ("codec, packet to frame, frame/s", _spread(result.codec_frames_s.encode, 0), "500,000"),
                ("codec, frame to packet, frame/s", _spread(result.codec_frames_s.decode, 0), "500,000"),
                ("spool, durable by full sync, record/s", _spread(result.spool_records_s, 0), "50,000"),
                ("spool to committed archive through mosquitto, acknowledged and deleted, frame/s",
                 _spread(result.end_to_end_frames_s, 0), "5,000"),
                ("bare MQTT client, one frame a message, message/s", _spread(result.client_msgs_s, 0), ""),
                ("a black hole is noticed after, s", _spread(result.black_hole_noticed_s, 2), "5"),
            ),
        ),
        "A backlog goes down in compressed blocks of many frames: that is how the chain passes more frames "
        "than the client passes messages. Kills, cuts and fuzzing: [link-campaigns.md](link-campaigns.md).\n",
        "## A pass\n",
        f"{contact.backlog_s / 60:g} minutes of backlog, {contact.records} records of "
        f"{contact.frames_bytes / 1e6:.1f} MB, with a memory dump of random bytes among them; a contact of "
        f"{contact.pass_s / 60:g} minutes at {contact.bit_s / 1e6:g} Mbit/s.\n",
        _table(
            ("", "measured", "bar"),
            (
                ("archived, each once", str(contact.archived), str(contact.records)),
                ("drained after, s", f"{contact.drained_s:.0f}", f"{contact.pass_s:g}"),
                ("over the link, MB", f"{contact.wire_bytes / 1e6:.2f}", ""),
                ("records archived before a more urgent one", str(contact.inversions),
                 f"{contact.bulk_turns} (floor rate of bulk: one a batch)"),
            ),
        ),
        _table(
            ("priority", "streams", "last one's place in the archive"),
            (
                (priority, ", ".join(by_priority.get(int(priority), ["-"])), str(place))
                for priority, place in contact.last_position.items()
            ),
        ),
    ])  # fmt: skip


def calibration(result: Calibration) -> str:
    """Return the operating points as a table."""
    return _table(
        ("threads", "batch", "duty", "mode", "tokens/s", "CPU share", "W", "degC"),
        (
            (
                str(point.threads), str(point.batch), f"{point.duty:g}", point.power_mode or "-",
                f"{point.tokens_s:.1f}", f"{point.cpu_share:.2f}",
                "-" if point.power_w is None else f"{point.power_w:.2f}",
                "-" if point.board_c is None else f"{point.board_c:.1f}",
            )
            for point in result.points
        ),
    )  # fmt: skip


def _machine(machine: Machine) -> str:
    peer = f", llama-cpp-python {machine.llama_cpp_python}" if machine.llama_cpp_python else ""
    return (
        f"Machine: {machine.cpu} ({' '.join(machine.features)}), {machine.cores} cores, {machine.threads} "
        f"threads, {machine.memory_bytes / 2**30:.1f} GiB; CPython {machine.python}, onnxruntime "
        f"{machine.onnxruntime}, numpy {machine.numpy}{peer}. Load average before {machine.load_before:.2f}, "
        f"after {machine.load_after:.2f}. Ratios travel, absolute times do not.\n"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def code(text: str) -> str:
    """Return any text as code in a cell of a table."""
    return "`` " + ascii(text).replace("|", "\\x7c") + " ``"


def _spread(figure: Spread | None, digits: int) -> str:
    if figure is None:
        return "not measured (no peer)"
    return f"{figure.median:.{digits}f} ({figure.min:.{digits}f} to {figure.max:.{digits}f})"


def _cost(cost: PairedCost) -> tuple[str, str, str]:
    return (
        f"{cost.median:.2f} %",
        f"{cost.low95:.2f} to {cost.high95:.2f} %",
        f"{cost.pairs}, {cost.min:.1f} to {cost.max:.1f} %",
    )


def _figure(value: float, unit: str) -> str:
    return f"{value:.2f} {unit}".rstrip()


def _percent(value: float | None, *, signed: bool = False) -> str:
    return "-" if value is None else f"{value:+.2f} %" if signed else f"{value:.2f} %"


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
