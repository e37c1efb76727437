"""The node as a process against a real broker and a real ground; only its worker is scripted."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import aiomqtt
import pytest
from node_bench import NODE, STARTER, Bench, open_bench
from scripted_worker import IMAGE_ID, text_of

from node.power.forecast import EclipseForecast
from node.runtime import EXIT_CRASH, EXIT_OVERRUN
from telemetry import bus, commands, topics
from telemetry.certificate import check_chain, verify_results
from telemetry.link import BrokerAddress
from telemetry.packets import (
    BootReport,
    FdirReport,
    Housekeeping,
    Level,
    Mode,
    Outcome,
    PowerPlan,
    SecurityReport,
    Stage,
    Stream,
)
from telemetry.sampling import Sampling

S = 1_000_000_000
NO_REPAIR = {"fdir__model_file": '"none.gguf"', "fdir__max_resets": "0"}
"""Levels 3 and 4 fail at once: there is no image to mend, and no restart of the node is left."""
ISS = bus.BusOrbit(
    line1="1 25544U 98067A   08264.51782528 -.00002182  00000-0 -11606-4 0  2927",
    line2="2 25544  51.6416 247.4627 0006703 130.5360 325.0288 15.72125391563537",
)
ISS_EPOCH_NS = 1_221_913_540 * S
EPS = bus.BusEps(
    t_ns=ISS_EPOCH_NS,
    battery_soc=0.9,
    battery_v=14.0,
    battery_a=0.0,
    battery_wh=80.0,
    array_w=60.0,
    array_sun_w=60.0,
    platform_w=10.0,
    soc_floor=0.5,
)


async def test_a_commanded_job_comes_down_whole_and_the_ledger_closes(tmp_path: Path) -> None:
    async with open_bench(tmp_path) as bench:
        await bench.start()
        verification = await bench.execute(commands.Infer(job="j1", prompt="!strike", max_tokens=30))
        assert verification.ok
        await bench.until(lambda: bench.finished("j1") == "length", "end of job j1")
        assert bench.text("j1") == text_of("j1", 30)
        results = bench.archive.results(NODE)["j1"]
        assert check_chain(IMAGE_ID, "j1", results) == 30
        stages = [v.stage for v in bench.verifications(0)]
        assert stages == [Stage.ACCEPTED, Stage.STARTED, Stage.COMPLETED]
        await bench.until(lambda: bool(bench.fdir("epoch.proof")), "report of the redone epoch")
        strike = bench.fdir("weights.digest")[0]
        assert (strike.level, strike.outcome, strike.page) == (Level.IN_WORKER_REPAIR, Outcome.REPAIRED, 12)
        assert bench.loads
        assert all(load.power_w >= 4.0 for load in bench.loads)

        assert await bench.stop() == 0
        await settle_ledger(bench)
        assert set(Stream) - {Stream.PRODUCT} <= bench.streams()  # No product was asked for.
        reports = [p for _, p in bench.archive.packets(NODE, BootReport)]
        assert [(r.boot, r.clean_shutdown) for r in reports] == [(1, True), (2, True)]
        assert bench.archive.packets(NODE, PowerPlan)


async def settle_ledger(bench: Bench) -> None:
    """Start the node once more, so that all is downlinked, and hold its books against the archive's."""
    await bench.start()
    await bench.execute(commands.ReportLedger())

    def consistent() -> bool:
        ledger = bench.archive.last_ledger(NODE)
        if ledger is None:
            return False
        streams = {(s.boot, s.stream): s for s in ledger.streams}
        return all(s.generated == s.acked for (boot, _), s in streams.items() if boot < bench.boot)

    await bench.until(consistent, "settled ledger")
    assert bench.sequences_have_no_gap()
    ledger = bench.archive.last_ledger(NODE)
    assert ledger is not None
    for s in ledger.streams:
        assert s.generated == s.acked + s.stored + sum(s.dropped.values())


async def test_commands_are_verified_once_and_repetitions_answered(tmp_path: Path) -> None:
    async with open_bench(tmp_path) as bench:
        await bench.start()
        payload = await bench.command(commands.Infer(job="once", prompt="hello", max_tokens=8))
        await bench.until(lambda: bench.finished("once") == "length", "end of the job")
        for _ in range(3):
            await bench.publish(topics.tc(NODE), payload)
        await bench.until(lambda: len(bench.verifications(0)) == 12, "stored verifications again")
        assert len(bench.archive.results(NODE)["once"]) == 2

        progress = await bench.execute(commands.Ping())
        assert progress.ok
        assert [v.stage for v in bench.verifications(1)] == list(Stage)
        cancelled = await bench.execute(commands.Cancel(job="nothing"))
        assert (cancelled.ok, cancelled.code) == (False, "unknown_job")
        again = await bench.execute(commands.Infer(job="once", prompt="other", max_tokens=8))
        assert (again.ok, again.code) == (False, "job_exists")
        done = await bench.execute(commands.Cancel(job="once"))
        assert (done.ok, done.code) == (False, "job_done")


async def test_garbage_on_every_topic_is_counted_and_service_goes_on(tmp_path: Path) -> None:
    async with open_bench(tmp_path) as bench:
        await bench.start()
        channels = [topics.bus(NODE, c) for c in ("time", "orbit", "eps", "thermal", "contact")]
        garbage = [b"", b"\x00", b"\xff" * 300, b"\x81\xa1x\xc1", b"{}", bytes(range(256))]
        bad_orbit = bus.encode(bus.BusOrbit(line1="1" * 69, line2="2" * 69))
        await bench.publish(topics.bus(NODE, "orbit"), bad_orbit)
        await bench.publish(topics.bus(NODE, "time"), bus.encode(bus.BusTime(t_ns=2**62)))
        for topic in [topics.tc(NODE), topics.ack(NODE), *channels]:
            for payload in garbage:
                await bench.publish(topic, payload)
        expected = 2 + len(garbage) * (1 + len(channels))
        await bench.until(
            lambda: bench.new_housekeeping()[-1].garbage_messages == expected, "count of garbage"
        )
        await bench.until(
            lambda: bench.new_housekeeping()[-1].commands_rejected == len(garbage), "count of rejections"
        )
        assert 1 <= len(bench.events("garbage.received")) <= 1 + len(channels)
        # Each rejection has a report while they are few; the ledger brings the final count.
        await bench.until(
            lambda: (
                bench.archive.packets(NODE, SecurityReport)[-1][1].rejected == {"malformed": len(garbage)}
            ),
            "security report",
        )

        await bench.command(commands.Ping(), lifetime_s=0.0000001)
        await bench.until(lambda: bool(bench.verifications(0)), "verification of an expired command")
        assert [(v.ok, v.code) for v in bench.verifications(0)] == [(False, "expired")]
        await bench.execute(commands.Infer(job="after", prompt="x", max_tokens=8))
        await bench.until(lambda: bench.finished("after") == "length", "a job after the garbage")


@pytest.mark.parametrize(
    ("number", "monitor"), [(signal.SIGKILL, "worker.exit"), (signal.SIGSTOP, "worker.ping")]
)
async def test_a_lost_worker_is_restarted_and_its_job_goes_on(
    tmp_path: Path, number: signal.Signals, monitor: str
) -> None:
    async with open_bench(tmp_path) as bench:
        bench.worker_arguments = ["--block-s", "0.1"]
        await bench.start()
        await bench.execute(commands.Infer(job="long", prompt="x", max_tokens=80))
        await bench.until(lambda: len(bench.text("long")) >= 8, "first tokens")
        lost = bench.signal_worker(number)
        await bench.until(lambda: bench.finished("long") == "length", "end of the job", 20)
        assert bench.worker_pid() != lost
        assert bench.text("long") == text_of("long", 80)
        assert check_chain(IMAGE_ID, "long", bench.archive.results(NODE)["long"]) == 80
        outcomes = [(r.level, r.outcome) for r in bench.fdir(monitor)]
        assert outcomes == [
            (Level.WORKER_RESTART, Outcome.STARTED),
            (Level.WORKER_RESTART, Outcome.RESTARTED),
        ]
        report = bench.fdir(monitor)[1]
        assert report.recovered_ns is not None
        assert 0 < report.recovered_ns - report.detected_ns < 5e9


async def test_a_killed_node_resumes_with_the_next_boot_number_and_loses_nothing(tmp_path: Path) -> None:
    async with open_bench(tmp_path) as bench:
        bench.worker_arguments = ["--block-s", "0.05"]
        await bench.start()
        payload = await bench.command(commands.Infer(job="long", prompt="x", max_tokens=120))
        worker = 0
        for count in (8, 40, 72):
            await bench.until(lambda count=count: len(bench.text("long")) >= count, "tokens")
            worker = bench.worker_pid() or 0
            await bench.kill()
            await bench.until(lambda pid=worker: not running(pid), "end of the orphaned worker")
            await bench.start()
        await bench.publish(topics.tc(NODE), payload)
        await bench.until(lambda: bench.finished("long") == "length", "end of the job", 30)
        assert bench.text("long") == text_of("long", 120)
        assert await bench.stop() == 0
        await settle_ledger(bench)
        reports = [p for _, p in bench.archive.packets(NODE, BootReport)]
        assert [r.boot for r in reports] == [1, 2, 3, 4, 5]
        assert [r.clean_shutdown for r in reports] == [True, False, False, False, True]
        assert [r.resumed_job for r in reports] == [None, "long", "long", "long", None]
        firsts = [r.first for r in bench.archive.results(NODE)["long"]]
        assert len(firsts) == len(set(firsts)) == 30


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


async def test_too_many_restarts_end_in_safe_mode_that_outlives_the_node(tmp_path: Path) -> None:
    async with open_bench(tmp_path, worker__restart_limit="2", **NO_REPAIR) as bench:
        await bench.start()
        await bench.execute(commands.Infer(job="bad", prompt="!always !exit_at=0", max_tokens=8))
        await bench.until(lambda: bench.new_housekeeping()[-1].mode is Mode.SAFE, "safe mode", 20)
        escalation = next(p for _, p in bench.archive.packets(NODE, FdirReport) if p.level is Level.SAFE_MODE)
        assert (escalation.action, escalation.outcome) == ("safe_mode", Outcome.ESCALATED)
        assert bench.worker_pid() is None
        await bench.kill()
        await bench.start()
        assert {hk.mode for hk in bench.new_housekeeping()} <= {Mode.BOOT, Mode.SAFE}
        assert bench.worker_pid() is None
        assert (await bench.execute(commands.Cancel(job="bad"))).ok
        await bench.until(lambda: bench.finished("bad") == "cancelled", "end of the job without a worker")
        assert (await bench.execute(commands.SetMode(mode=Mode.NOMINAL))).ok
        await bench.execute(commands.Infer(job="good", prompt="x", max_tokens=8))
        await bench.until(lambda: bench.finished("good") == "length", "a job after safe mode")
        assert bench.new_housekeeping()[-1].mode is Mode.NOMINAL


async def test_commanded_safe_mode_stops_the_worker_and_keeps_the_job(tmp_path: Path) -> None:
    async with open_bench(tmp_path) as bench:
        bench.worker_arguments = ["--block-s", "0.1"]
        await bench.start()
        await bench.execute(commands.Infer(job="long", prompt="x", max_tokens=40))
        await bench.until(lambda: len(bench.text("long")) >= 4, "first tokens")
        assert (await bench.execute(commands.SetMode(mode=Mode.SAFE))).ok
        await bench.until(lambda: bench.worker_pid() is None, "end of the worker")
        assert bench.finished("long") is None
        assert (await bench.execute(commands.SetMode(mode=Mode.NOMINAL))).ok
        await bench.until(lambda: bench.finished("long") == "length", "end of the job")
        assert bench.text("long") == text_of("long", 40)
        assert not bench.fdir("worker.exit")


async def test_active_and_queued_jobs_can_be_cancelled_and_bad_ones_fail_alone(tmp_path: Path) -> None:
    async with open_bench(tmp_path, worker__batch="1") as bench:
        bench.worker_arguments = ["--block-s", "0.1"]
        await bench.start()
        await bench.execute(commands.Infer(job="first", prompt="x", max_tokens=400))
        await bench.execute(commands.Infer(job="second", prompt="x", max_tokens=400))
        await bench.execute(commands.Infer(job="refused", prompt="!jobs_bad", max_tokens=8))
        await bench.execute(commands.Infer(job="holed", prompt="!gap", max_tokens=40))
        await bench.execute(commands.Infer(job="last", prompt="!repeat", max_tokens=8))
        assert (await bench.execute(commands.Cancel(job="second"))).ok
        await bench.until(lambda: bench.finished("second") == "cancelled", "end of the queued job")
        assert bench.text("second") == b""
        await bench.until(lambda: len(bench.text("first")) >= 4, "tokens of the active job")
        assert (await bench.execute(commands.Cancel(job="first"))).ok
        await bench.until(lambda: bench.finished("first") == "cancelled", "end of the active job")
        await bench.until(lambda: bench.finished("refused") is not None, "end of the refused job")
        assert bench.finished("refused") == "failed: the prompt is too long"
        await bench.until(lambda: bench.finished("holed") is not None, "end of the job with a gap")
        assert str(bench.finished("holed")).startswith("failed: block at 4")
        assert bench.events("job.gap")
        await bench.until(lambda: bench.finished("last") == "length", "end of the last job")
        assert bench.text("last") == text_of("last", 8)


async def test_many_jobs_share_the_batch_by_priority_and_all_come_down_whole(tmp_path: Path) -> None:
    async with open_bench(tmp_path, worker__batch="3") as bench:
        bench.worker_arguments = ["--block-s", "0.1"]
        await bench.start()
        lengths = {f"j{number}": 60 + 4 * number for number in range(8)}
        for job, length in lengths.items():
            await bench.command(commands.Infer(job=job, prompt="x", max_tokens=length))
        await bench.until(lambda: bench.new_housekeeping()[-1].jobs_active == 3, "a full batch")
        await bench.until(lambda: bench.new_housekeeping()[-1].batch == 3, "the batch in housekeeping")
        sampling = Sampling(seed=1, logprobs=True)
        urgent = commands.Infer(job="urgent", prompt="!trip", max_tokens=40, sampling=sampling, priority=9)
        await bench.execute(urgent)
        await bench.until(lambda: len(bench.text("urgent")) >= 8, "tokens of the urgent job")
        assert not all(bench.finished(job) for job in lengths)
        bench.signal_worker(signal.SIGKILL)
        lengths["urgent"] = 40
        await bench.until(lambda: all(bench.finished(job) == "length" for job in lengths), "all ends", 40)
        results = bench.archive.results(NODE)
        for job, length in lengths.items():
            assert bench.text(job) == text_of(job, length)
            assert check_chain(IMAGE_ID, job, results[job]) == length
            assert all((r.logprobs is not None) == (job == "urgent") for r in results[job])
        (parked,) = bench.events("job.parked")
        assert parked.evidence["job"] in lengths.keys() - {"urgent"}
        report = bench.fdir("compute.check")[0]
        assert (report.level, report.outcome, report.role) == (Level.EPOCH_REDO, Outcome.REDONE, "matmul")
        latest = bench.new_housekeeping()[-1]
        assert (latest.compute_trips, latest.threads) == (1, 2)
        assert latest.prefill_tokens > 0
        # The worker that was killed and the node's log agree on who was under way.
        assert "holds " in bench.log()


async def test_a_job_ends_at_its_deadline_active_or_not_once_mission_time_is_known(tmp_path: Path) -> None:
    async with open_bench(tmp_path, worker__batch="1") as bench:
        bench.worker_arguments = ["--block-s", "0.1"]
        await bench.start()
        # By the host's idea of the time it is long over.
        deadline_ns = ISS_EPOCH_NS + 5 * S
        await bench.command(commands.Infer(job="a", prompt="x", max_tokens=2000, deadline_ns=deadline_ns))
        await bench.command(commands.Infer(job="b", prompt="x", max_tokens=2000, deadline_ns=deadline_ns))
        await bench.until(lambda: len(bench.text("a")) >= 4, "tokens")
        await bench.set_mission_time(ISS_EPOCH_NS)
        await asyncio.sleep(1.0)
        assert bench.finished("a") is None
        # A gateway that counts its weeks wrong for one second.
        wrong = bus.BusTime(t_ns=ISS_EPOCH_NS + 1024 * 7 * 86400 * S)
        await bench.publish(topics.bus(NODE, "time"), bus.encode(wrong))
        await bench.until(lambda: bool(bench.events("clock.step_held")), "the step is held")
        await asyncio.sleep(1.0)
        assert bench.finished("a") is None
        assert bench.finished("b") is None
        await bench.set_mission_time(deadline_ns)
        await bench.until(lambda: bench.finished("a") == "deadline", "end of the active job")
        await bench.until(lambda: bench.finished("b") == "deadline", "end of the queued job")
        assert bench.text("b") == b""
        text = bench.text("a")
        assert text == text_of("a", len(text))
        assert check_chain(IMAGE_ID, "a", bench.archive.results(NODE)["a"]) == len(text)
        await bench.execute(commands.Infer(job="c", prompt="x", max_tokens=8))
        await bench.until(lambda: bench.finished("c") == "length", "a job after that")


async def test_what_the_broker_kept_of_yesterday_is_no_time_and_no_reading(tmp_path: Path) -> None:
    async with open_bench(tmp_path) as bench:
        yesterday_ns = time.time_ns() - 86400 * S
        broker = BrokerAddress.parse(bench.url)
        async with aiomqtt.Client(broker.host, broker.port, identifier="gateway") as gateway:
            for channel, message in (("time", bus.BusTime(t_ns=yesterday_ns)), ("eps", EPS)):
                topic = topics.bus(NODE, channel)
                await gateway.publish(topic, bus.encode(message), qos=1, retain=True)
        await bench.start()
        await bench.until(lambda: len(bench.events("bus.retained")) >= 2, "both are reported")
        latest = bench.new_housekeeping()[-1]
        assert (latest.clock_locked, latest.battery_soc) == (False, None)
        assert not bench.events("clock.locked")


async def test_clock_modes_and_power_follow_the_bus(tmp_path: Path) -> None:
    async with open_bench(tmp_path) as bench:
        await bench.start()
        assert not bench.new_housekeeping()[-1].clock_locked
        assert bench.archive.packets(NODE, PowerPlan)[-1][1].reason == "unknown_bus"

        umbra = EclipseForecast.from_tle(ISS.line1, ISS.line2).next_umbra(ISS_EPOCH_NS)
        assert umbra is not None
        await bench.set_mission_time(umbra.penumbra_entry_ns - 600 * S)
        await bench.publish(topics.bus(NODE, "orbit"), bus.encode(ISS))
        await bench.publish(topics.bus(NODE, "eps"), bus.encode(EPS))
        await bench.until(lambda: bench.new_housekeeping()[-1].eclipse_entry_ns is not None, "forecast")
        frame, latest = bench.archive.packets(NODE, Housekeeping)[-1]
        assert latest.clock_locked
        assert abs(frame.t_ns - (umbra.penumbra_entry_ns - 600 * S)) < 60 * S
        # The edges depend on where the search began by less than a millisecond.
        assert latest.eclipse_entry_ns == pytest.approx(umbra.entry_ns, abs=S // 1000)
        assert latest.eclipse_exit_ns == pytest.approx(umbra.exit_ns, abs=S // 1000)
        assert (latest.mode, latest.sunlit, latest.battery_soc) == (Mode.NOMINAL, 1.0, 0.9)
        await bench.until(
            lambda: bench.archive.packets(NODE, PowerPlan)[-1][1].reason == "board", "a plan from the bus"
        )

        assert (await bench.execute(commands.SetPowerCap(power_w=5.0))).ok
        await bench.until(
            lambda: bench.archive.packets(NODE, PowerPlan)[-1][1].reason == "command", "a plan with the cap"
        )
        assert bench.archive.packets(NODE, PowerPlan)[-1][1].ceiling_w == 5.0

        await bench.set_mission_time(umbra.entry_ns + 60 * S)
        await bench.until(lambda: bench.new_housekeeping()[-1].mode is Mode.ECLIPSE, "eclipse")
        assert bench.new_housekeeping()[-1].sunlit == 0.0
        assert bench.events("clock.stepped")
        await bench.set_mission_time(umbra.penumbra_exit_ns + 60 * S)
        await bench.until(lambda: bench.new_housekeeping()[-1].mode is Mode.NOMINAL, "sunlight")
        await bench.until(lambda: bool(bench.events("clock.free_running")), "loss of the clock")
        await bench.until(lambda: not bench.new_housekeeping()[-1].clock_locked, "flag of the clock")

        # The cap is durable.
        await bench.kill()
        await bench.start()
        await bench.until(lambda: bench.new_housekeeping()[-1].ceiling_w <= 5.0, "the cap after a restart")


async def test_a_full_spool_holds_results_back_and_telemetry_goes_on(tmp_path: Path) -> None:
    async with open_bench(tmp_path, telemetry__spool_max_bytes="65536") as bench:
        bench.ack = False
        bench.worker_arguments = ["--block-s", "0.0"]
        await bench.start()
        for number in range(2):
            await bench.command(commands.Infer(job=f"j{number}", prompt="x", max_tokens=1200))
        await bench.until(lambda: bool(bench.events("spool.refused")), "refusal", 30)
        before = bench.new_housekeeping()[-1].uptime_s
        await bench.until(lambda: bench.new_housekeeping()[-1].uptime_s > before + 1, "more housekeeping")
        assert bench.fdir("worker.ping") == []
        bench.ack = True
        await bench.until(lambda: bench.finished("j1") == "length", "end of the last job", 60)
        for number in range(2):
            assert bench.text(f"j{number}") == text_of(f"j{number}", 1200)


async def test_a_worker_that_never_comes_up_is_given_up_in_bounded_time(tmp_path: Path) -> None:
    limits = {"worker__restart_limit": "1", "worker__start_timeout_s": "0.5", **NO_REPAIR}
    for mode in ("exit", "hang", "wrong_generation", "garbage"):
        directory = tmp_path / mode
        directory.mkdir()
        async with open_bench(directory, **limits) as bench:
            bench.worker_arguments = ["--start", mode]
            await bench.start()
            await bench.until(
                lambda b=bench: b.new_housekeeping()[-1].mode is Mode.SAFE, f"safe mode ({mode})"
            )
            assert bench.worker_pid() is None
            assert await bench.stop() == 0


async def test_a_second_node_on_the_same_state_is_refused_without_a_traceback(tmp_path: Path) -> None:
    async with open_bench(tmp_path) as bench:
        await bench.start()
        first, bench.process = bench.process, None
        await bench.start_process()
        second, bench.process = bench.process, first
        assert second is not None
        assert await asyncio.wait_for(second.wait(), 20) == 2
        assert "another process is using it" in bench.log()
        assert "mend: " in bench.log()
        assert "Traceback" not in bench.log()
        assert await bench.stop() == 0


async def test_a_corrupt_database_is_moved_aside_and_no_boot_number_used_twice(tmp_path: Path) -> None:
    async with open_bench(tmp_path) as bench:
        await bench.start()
        assert await bench.stop() == 0
        path = tmp_path / "state" / "node.db"
        data = bytearray(path.read_bytes())
        data[:64] = bytes(64)
        path.write_bytes(data)
        began = int(time.time())
        await bench.start_process()
        await bench.until(lambda: bool(bench.events("database.lost")), "report of the lost database")
        boots = [p.boot for _, p in bench.archive.packets(NODE, BootReport)]
        assert boots[0] == 1
        assert boots[-1] >= began
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("SELECT COUNT(*) FROM spool_stream").fetchone()[0] > 0


async def test_the_real_worker_gives_the_same_text_through_kills_of_worker_and_node(
    tmp_path: Path, tiny_images: Path
) -> None:
    limits = {
        "model__images_dir": f'"{tiny_images}"',
        "worker__positions": "256",
        "worker__epoch_s": "0.1",
        "worker__start_timeout_s": "20.0",
        "worker__ping_fatal_s": "2.5",
        # Slow enough to be struck in the middle: without a bus the governor allows little.
        "power__min_duty": "0.03",
        "power__unknown_bus_share": "0.04",
    }
    async with open_bench(tmp_path, **limits) as bench:
        bench.real_worker = True
        await bench.start()
        texts = []
        for job, struck in (("calm", False), ("struck", True)):
            await bench.execute(commands.Infer(job=job, prompt="abc abd abe", max_tokens=160))
            if struck:
                await bench.until(
                    lambda: len(bench.archive.results(NODE).get("struck", [])) > 10, "blocks", 30
                )
                bench.signal_worker(signal.SIGKILL)
                await bench.until(lambda: bool(bench.fdir("worker.exit")), "report of the loss", 30)
                await bench.until(
                    lambda: len(bench.archive.results(NODE).get("struck", [])) > 30, "blocks", 30
                )
                await bench.kill()
                await bench.start()
            await bench.until(lambda j=job: bench.finished(j) is not None, f"end of job {job}", 60)
            results = bench.archive.results(NODE)[job]
            tokens = [token for result in results for token in result.tokens]
            assert check_chain(results[0].certificate.image_id, job, results) == len(tokens) > 100
            texts.append((bench.finished(job), tokens))
        assert texts[0] == texts[1]
        assert await bench.stop() == 0
        report = bench.archive.packets(NODE, BootReport)[-1][1]
        assert report.image_id == bench.archive.results(NODE)["calm"][0].certificate.image_id
        assert report.resumed_job == "struck"


async def test_the_real_worker_gives_each_of_several_jobs_the_text_it_has_alone(
    tmp_path: Path, tiny_images: Path
) -> None:
    limits = {
        "model__images_dir": f'"{tiny_images}"',
        "worker__positions": "256",
        "worker__epoch_s": "0.1",
        "worker__batch": "2",
        "worker__seats": "3",
        "worker__start_timeout_s": "20.0",
        "worker__ping_fatal_s": "2.5",
        "power__min_duty": "0.03",
        "power__unknown_bus_share": "0.04",
    }
    settings: dict[str, Sampling] = {
        "greedy": Sampling(),
        "drawn": Sampling(temperature=1.0, seed=7, logprobs=True),
        "urgent": Sampling(temperature=0.5, top_k=8, seed=9),
    }

    def infer(prefix: str, name: str, priority: int = 5) -> commands.Infer:
        return commands.Infer(
            job=f"{prefix}-{name}",
            prompt="abc abd abe",
            max_tokens=120,
            sampling=settings[name],
            priority=priority,
        )

    async with open_bench(tmp_path, **limits) as bench:
        bench.real_worker = True
        await bench.start()
        for name in settings:
            await bench.execute(infer("alone", name))
            await bench.until(lambda n=name: bench.finished(f"alone-{n}") is not None, f"end of {name}", 60)
        for name in ("greedy", "drawn"):
            await bench.command(infer("both", name))
        blocks = bench.archive.results
        await bench.until(lambda: len(blocks(NODE).get("both-drawn", [])) > 3, "blocks", 30)
        await bench.execute(infer("both", "urgent", priority=9))
        await bench.until(lambda: len(blocks(NODE).get("both-urgent", [])) > 3, "blocks", 30)
        bench.signal_worker(signal.SIGKILL)
        await bench.until(lambda: all(bench.finished(f"both-{n}") for n in settings), "all ends", 90)
        assert len(bench.events("job.parked")) == 1
        results = blocks(NODE)
        for name in settings:
            texts = [
                [(r.first, r.tokens, r.text, r.finish, r.logprobs) for r in results[f"{prefix}-{name}"]]
                for prefix in ("alone", "both")
            ]
            assert texts[0] == texts[1]
        verdicts = verify_results([block for job in results.values() for block in job])
        assert [verdict.job for verdict in verdicts if not verdict.sound] == []
        assert all(r.logprobs is not None for r in results["both-drawn"])


async def test_any_number_of_interrupts_is_one_ordered_stop(tmp_path: Path) -> None:
    async with open_bench(tmp_path) as bench:
        await bench.start()
        assert bench.process is not None
        for _ in range(3):
            bench.process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(bench.process.wait(), 20) == 0
        assert bench.log().count("ordered stop") == 1
        assert "Traceback" not in bench.log()


CRASHING = """
from node.power_service import PowerService
def crash(self, now_s):
    raise RuntimeError("struck by a test")
PowerService._turn = crash
"""
HANGING = """
import asyncio
import node.runtime as runtime
from node.worker_service import WorkerService
runtime.REAP_S = runtime.FLUSH_S = runtime.CANCEL_S = runtime.CLOSE_S = 0.1
async def hang(self):
    await asyncio.sleep(600)
WorkerService.stop = hang
"""


async def test_a_defect_is_an_event_a_log_line_and_an_exit_code(tmp_path: Path) -> None:
    async with open_bench(tmp_path) as bench:
        await bench.start_process(CRASHING + STARTER)
        assert bench.process is not None
        assert await asyncio.wait_for(bench.process.wait(), 20) == EXIT_CRASH
        assert "RuntimeError: struck by a test" in bench.log()
        assert "Traceback" not in bench.log()
        await bench.start()
        await bench.until(lambda: bool(bench.events("node.crash")), "report of the crash")
        assert "struck by a test" in bench.events("node.crash")[0].text
        report = bench.archive.packets(NODE, BootReport)[-1][1]
        assert not report.clean_shutdown


async def test_a_stop_that_overruns_names_its_tasks_and_ends(tmp_path: Path) -> None:
    async with open_bench(tmp_path, worker__stop_timeout_s="0.5") as bench:
        await bench.start_process(HANGING + STARTER)
        await bench.until(lambda: bool(bench.new_housekeeping()), "housekeeping")
        worker = bench.worker_pid()
        assert await bench.stop() == EXIT_OVERRUN
        assert "node.worker.run" in bench.log()
        assert worker is not None
        await bench.until(lambda: not running(worker), "end of the orphaned worker")


async def test_a_full_disk_refuses_commands_and_telemetry_goes_on(tmp_path: Path) -> None:
    sizes = {"telemetry__spool_max_bytes": "65536", "telemetry__database_max_bytes": str(1 << 20)}
    async with open_bench(tmp_path, **sizes) as bench:
        await bench.start()
        await bench.execute(commands.SetMode(mode=Mode.SAFE))
        for number in range(60):
            prompt = f"{number:04d}" * 4000
            await bench.command(commands.Infer(job=f"j{number}", prompt=prompt, max_tokens=4))
        await bench.until(lambda: "not executed" in bench.log(), "a refused command")
        before = bench.new_housekeeping()[-1].uptime_s
        await bench.until(lambda: bench.new_housekeeping()[-1].uptime_s > before + 1, "more housekeeping")
        assert 1 < bench.new_housekeeping()[-1].jobs_queued < 60
        # What was refused was not executed, so it may be sent again once there is room.
        await bench.execute(commands.Cancel(job="j0"))
        await bench.until(lambda: bench.finished("j0") == "cancelled", "end of a cancelled job")
        assert "Traceback" not in bench.log()
        assert await bench.stop() == 0
