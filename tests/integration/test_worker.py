"""The real worker process on the tiny model, driven over its socket as the supervisor does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from fdir.pages import MappedTensor
from hil.reference import ReferenceJob, run_reference
from node.inference import protocol
from node.inference.arena import ArenaShape, newest_state, read_record
from node.inference.protocol import (
    Block,
    Cancel,
    Pace,
    Park,
    Parked,
    Ping,
    Pong,
    Ready,
    Shutdown,
    Start,
    Status,
    Strike,
)
from node.inference.worker import EXIT_ORPHAN, START_DUTY
from telemetry.sampling import Sampling

PROMPT, TOKENS = "abc abd abe", 200


class Supervisor:
    """Start workers on one arena, one after another."""

    def __init__(self, image: Path, folder: Path) -> None:
        self.image, self.folder = image, folder
        self.generation = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "socket"))
        self._listener.listen()
        self._listener.settimeout(30)
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: socket.socket | None = None

    def start(self, *extra: str, pace: bool = True) -> Ready:
        self.generation += 1
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "node.inference.worker", "--socket", str(self.folder / "socket"),
                "--generation", str(self.generation), "--image", str(self.image),
                "--arena", str(self.folder / "arena"), "--threads", "1", "--epoch-tokens", "8",
                "--positions", "256", "--seats", "6", "--epoch-seconds", "0.2", *extra,
            ],
            stderr=subprocess.PIPE,
        )  # fmt: skip
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(30)
        self._reader: protocol.Reader[protocol.FromWorker] = protocol.Reader(protocol.FromWorker)
        self._messages = self._read()
        ready = self.expect(object)  # whatever comes first
        assert isinstance(ready, Ready)
        assert ready.generation == self.generation
        assert ready.pid == self.process.pid
        if pace:
            self.send(Pace(duty=1.0))
        return ready

    def send(self, message: protocol.FromSupervisor) -> None:
        assert self.connection is not None
        self.connection.sendall(protocol.encode(message))

    def _read(self) -> Iterator[protocol.FromWorker]:
        assert self.connection is not None
        while data := self.connection.recv(65536):
            yield from self._reader.feed(data)

    def expect(self, kind: type) -> protocol.FromWorker:
        for message in self._messages:
            if isinstance(message, kind):
                return message
            assert not isinstance(message, protocol.JobError | protocol.Fatal), message
        raise EOFError

    def blocks(self, count: int | None = None) -> list[Block]:
        found: list[Block] = []
        while (count is None or len(found) < count) and not (found and found[-1].finish):
            found.append(self.expect(Block))
        return found

    def finish(self, jobs: int) -> list[Block]:
        """Return the blocks that come until so many jobs have finished."""
        found: list[Block] = []
        while sum(block.finish is not None for block in found) < jobs:
            found.append(self.expect(Block))
        return found

    def status(self, jobs: int | None = None) -> Status:
        """Return the next status, the next with so many active jobs."""
        while True:
            status = self.expect(Status)
            if jobs is None or status.active == jobs:
                return status

    def end(self) -> tuple[int, str]:
        assert self.process is not None
        code = self.process.wait(20)
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            return code, stream.read().decode()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.end()
        self.connection.close()

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.end()
        if self.connection is not None:
            self.connection.close()
        self._listener.close()


@pytest.fixture
def supervisor(tiny_image: Path, tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tiny_image, tmp_path)
    yield supervisor
    supervisor.close()


def _tokens(blocks: list[Block]) -> list[int]:
    return [token for block in blocks for token in block.tokens]


def test_a_job_runs_and_the_worker_stops_in_order(supervisor: Supervisor) -> None:
    ready = supervisor.start()
    assert ready.resumed == []
    supervisor.send(Start(job="a", prompt=PROMPT, max_tokens=40))
    blocks = supervisor.blocks()
    assert len(_tokens(blocks)) == 40
    assert [block.first for block in blocks] == [0, 8, 16, 24, 32]
    assert blocks[-1].finish == "length"
    supervisor.send(Shutdown())
    assert supervisor.end() == (0, "")


def test_pings_are_answered_while_decoding_and_while_pacing(supervisor: Supervisor) -> None:
    supervisor.start()
    supervisor.send(Pace(duty=0.02))
    supervisor.send(Start(job="a", prompt=PROMPT, max_tokens=TOKENS))
    for key in (1, 2**50, 3):
        supervisor.send(Ping(key=key))
        assert supervisor.expect(Pong) == Pong(key=key)


def test_a_killed_worker_is_succeeded_with_the_same_text(supervisor: Supervisor) -> None:
    supervisor.start()
    supervisor.send(Start(job="whole", prompt=PROMPT, max_tokens=TOKENS))
    expected = _tokens(supervisor.blocks())
    supervisor.send(Pace(duty=0.1))
    supervisor.send(Start(job="cut", prompt=PROMPT, max_tokens=TOKENS))
    got = supervisor.blocks(3)
    for _ in range(3):
        supervisor.kill()
        ready = supervisor.start()
        supervisor.send(Pace(duty=0.1))
        assert [one.job for one in ready.resumed] == ["cut", "whole"]
        assert ready.resumed[0].tokens >= len(_tokens(got))
        supervisor.send(Start(job="cut", prompt=PROMPT, max_tokens=TOKENS, known_tokens=len(_tokens(got))))
        got += supervisor.blocks(4)
    supervisor.send(Pace(duty=1.0))
    got += supervisor.blocks()
    assert _tokens(got) == expected
    assert [block.first for block in got] == list(range(0, TOKENS, 8))


def test_a_lost_arena_starts_the_job_again_and_sends_only_what_is_new(supervisor: Supervisor) -> None:
    supervisor.start()
    supervisor.send(Start(job="a", prompt=PROMPT, max_tokens=80))
    expected = supervisor.blocks()
    supervisor.kill()
    (supervisor.folder / "arena").unlink()
    assert supervisor.start().resumed == []
    supervisor.send(Start(job="a", prompt=PROMPT, max_tokens=80, known_tokens=32))
    assert supervisor.blocks() == expected[4:]


def test_pace_spreads_the_same_work_over_more_time(supervisor: Supervisor) -> None:
    supervisor.start()

    def seconds(job: str, duty: float) -> float:
        supervisor.send(Pace(duty=duty))
        started = time.monotonic()
        supervisor.send(Start(job=job, prompt=PROMPT, max_tokens=TOKENS))
        supervisor.blocks()
        return time.monotonic() - started

    seconds("warm-up", 1.0)
    assert seconds("paced", 0.1) > 4 * seconds("full", 1.0)


def test_a_worker_rests_until_it_is_told_its_pace(supervisor: Supervisor) -> None:
    supervisor.start()
    supervisor.send(Pace(duty=START_DUTY))
    supervisor.send(Start(job="paced", prompt=PROMPT, max_tokens=16))
    supervisor.blocks()
    started = time.monotonic()
    supervisor.send(Start(job="told", prompt=PROMPT, max_tokens=64))
    supervisor.blocks()
    told_s = time.monotonic() - started
    supervisor.kill()
    supervisor.start(pace=False)
    started = time.monotonic()
    supervisor.send(Start(job="untold", prompt=PROMPT, max_tokens=64))
    supervisor.blocks()
    assert time.monotonic() - started > told_s / 2


def test_cancel_ends_the_job_between_epochs(supervisor: Supervisor) -> None:
    supervisor.start()
    supervisor.send(Pace(duty=0.05))
    supervisor.send(Start(job="a", prompt=PROMPT, max_tokens=TOKENS))
    supervisor.blocks(1)
    supervisor.send(Cancel(job="a"))
    supervisor.send(Pace(duty=1.0))
    assert supervisor.blocks()[-1].finish == "cancelled"


def test_a_prompt_too_long_is_the_jobs_fault_not_the_workers(supervisor: Supervisor) -> None:
    supervisor.start()
    supervisor.send(Start(job="long", prompt=PROMPT * 300, max_tokens=10))
    error = supervisor.expect(protocol.JobError)
    assert error.job == "long"
    assert "256" in error.reason
    supervisor.send(Start(job="a", prompt=PROMPT, max_tokens=8))
    assert supervisor.blocks()[-1].finish == "length"


def _ffn_down(supervisor: Supervisor, pid: int) -> tuple[MappedTensor, int]:
    """Return a tensor and where the worker has it."""
    from fdir.pages import live_mappings
    from node.inference.manifest import WEIGHTS, load_manifest

    tensor = next(t for t in load_manifest(supervisor.image).tensors if t.role == "ffn_down")
    (address,) = (
        span.address + tensor.offset - span.file_offset
        for span in live_mappings(supervisor.image / WEIGHTS, pid)
        if span.file_offset <= tensor.offset < span.file_offset + span.length
    )
    return tensor, address


def test_a_strike_is_fatal_and_not_reported_where_mending_is_switched_off(supervisor: Supervisor) -> None:
    ready = supervisor.start()
    supervisor.send(protocol.Repair(weights=False, kv=True, compute=True))
    supervisor.send(Ping(key=1))
    supervisor.expect(Pong)
    _, address = _ffn_down(supervisor, ready.pid)
    with open(f"/proc/{ready.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(address + 5)
        (byte,) = memory.read(1)
        memory.seek(address + 5)
        memory.write(bytes([byte ^ 0x40]))
    told = next(m for m in supervisor._messages if isinstance(m, Strike | protocol.Fatal))
    assert isinstance(told, protocol.Fatal)
    assert "switched off" in told.reason
    assert supervisor.end()[0] == 3


def test_a_strike_from_outside_is_repaired_and_reported(supervisor: Supervisor) -> None:
    from fdir.pages import PAGE_SIZE

    ready = supervisor.start()
    tensor, address = _ffn_down(supervisor, ready.pid)
    with open(f"/proc/{ready.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(address + 5)
        (byte,) = memory.read(1)
        memory.seek(address + 5)
        memory.write(bytes([byte ^ 0x40]))
        strike = supervisor.expect(Strike)
        assert (strike.region, strike.role, strike.method) == ("weights", "ffn_down", "parity")
        assert strike.page == tensor.offset // PAGE_SIZE
        memory.seek(address + 5)
        assert memory.read(1) == bytes([byte])


def test_rows_mended_while_loading_are_reported_after_ready(supervisor: Supervisor) -> None:
    supervisor.start()
    supervisor.send(Start(job="a", prompt=PROMPT, max_tokens=TOKENS))
    supervisor.blocks(3)
    supervisor.kill()
    path = supervisor.folder / "arena"
    data = path.read_bytes()
    shape, state = read_record(data, 0, ArenaShape), newest_state(data, 0)
    assert shape is not None
    assert state is not None
    assert state.positions > 0
    with path.open("r+b") as arena:
        arena.seek(shape.row_offset("global", 1, 0, 2) + 9)
        (byte,) = arena.read(1)
        arena.seek(-1, 1)
        arena.write(bytes([byte ^ 0x10]))
    ready = supervisor.start()
    assert [one.job for one in ready.resumed] == ["a"]
    strike = supervisor.expect(Strike)
    assert (strike.region, strike.page, strike.role, strike.method) == ("kv", 2, "global", "parity")
    assert strike.evidence["planes"] == "1"


def _jobs(count: int) -> list[Start]:
    sampling = [
        Sampling(),
        Sampling(temperature=1.0, seed=5, logprobs=True),
        Sampling(temperature=0.8, top_k=20),
    ]
    return [
        Start(
            job=f"job-{number}", prompt=PROMPT + " the sun" * (number * 3 % 7), max_tokens=20 + 9 * number,
            sampling=sampling[number % 3],
        )
        for number in range(count)
    ]  # fmt: skip


def _by_job(blocks: list[Block]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for block in blocks:
        tokens = found.setdefault(block.job, [])
        assert block.first == len(tokens)
        tokens += block.tokens
    return found


def _alone(supervisor: Supervisor, jobs: list[Start]) -> dict[str, list[int]]:
    referred = [ReferenceJob(job.job, job.prompt, job.max_tokens, job.sampling) for job in jobs]
    return run_reference(supervisor.image, referred, positions=256, threads=1)


def test_jobs_decode_together_and_say_what_each_says_alone(supervisor: Supervisor) -> None:
    supervisor.start()
    jobs = _jobs(9)
    for job in jobs:
        supervisor.send(job)
    blocks = supervisor.finish(len(jobs))
    assert _by_job(blocks) == _alone(supervisor, jobs)
    for block in blocks:
        wanted = jobs[int(block.job.removeprefix("job-"))].sampling.logprobs
        assert (block.logprobs is not None) == wanted
        assert not wanted or len(block.logprobs) == len(block.tokens)


def test_a_killed_worker_is_succeeded_with_the_same_texts_of_a_batch(supervisor: Supervisor) -> None:
    supervisor.start()
    jobs = _jobs(5)
    supervisor.send(Pace(duty=0.1))
    got: list[Block] = []
    for job in jobs:
        supervisor.send(job)
    for _ in range(3):
        got += [supervisor.expect(Block) for _ in range(4)]
        supervisor.kill()
        ready = supervisor.start()
        supervisor.send(Pace(duty=0.1))
        known = {job: len(tokens) for job, tokens in _by_job(got).items()}
        ended = {block.job for block in got if block.finish}
        # One that has ended may have given its seat to one that had not begun.
        assert {one.job for one in ready.resumed} >= known.keys() - ended
        assert all(one.tokens >= known.get(one.job, 0) for one in ready.resumed)
        for job in jobs:
            if job.job not in ended:
                supervisor.send(msgspec.structs.replace(job, known_tokens=known.get(job.job, 0)))
    supervisor.send(Pace(duty=1.0))
    got += supervisor.finish(len(jobs) - len(ended))
    assert _by_job(got) == _alone(supervisor, jobs)


def test_a_parked_job_goes_on_with_the_same_text(supervisor: Supervisor) -> None:
    supervisor.start()
    supervisor.send(Pace(duty=0.1))
    job = Start(job="a", prompt=PROMPT, max_tokens=TOKENS, sampling=Sampling(temperature=1.0))
    supervisor.send(job)
    got = supervisor.blocks(2)
    supervisor.send(Park(job="a"))
    while not isinstance(message := supervisor.expect(Parked | Block), Parked):
        got.append(message)
    assert message == Parked(job="a")
    assert supervisor.status(0).active == 0
    supervisor.send(Pace(duty=1.0))
    other = Start(job="b", prompt=PROMPT, max_tokens=30)
    supervisor.send(other)
    assert _by_job(supervisor.blocks()) == _alone(supervisor, [other])
    supervisor.send(msgspec.structs.replace(job, known_tokens=len(_tokens(got))))
    got += supervisor.blocks()
    assert _by_job(got) == _alone(supervisor, [job])


def _affinities(pid: int) -> set[frozenset[int]]:
    threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    return {frozenset(os.sched_getaffinity(thread)) for thread in threads}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor core")
def test_operating_points_change_without_reloading_and_never_the_text(supervisor: Supervisor) -> None:
    ready = supervisor.start("--threads", "2", "--seats", "6")
    jobs = _jobs(6)
    supervisor.send(Pace(duty=0.2, threads=1, batch=2, redundant=True))
    for job in jobs:
        supervisor.send(job)
    got = [supervisor.expect(Block) for _ in range(3)]

    def next_status() -> Status:
        while isinstance(message := supervisor.expect(Status | Block), Block):
            got.append(message)
        return message

    status = next_status()
    assert (status.batch, status.threads) == (2, 1)
    assert [len(cores) for cores in _affinities(ready.pid)] == [1]
    supervisor.send(Pace(duty=0.5, threads=2, batch=6, redundant=False))
    got += [supervisor.expect(Block) for _ in range(3)]
    status = next_status()
    assert (status.batch, status.threads) == (6, 2)
    assert [len(cores) for cores in _affinities(ready.pid)] == [2]
    supervisor.send(Pace(duty=1.0, threads=1))
    got += supervisor.finish(len(jobs) - sum(block.finish is not None for block in got))
    assert _by_job(got) == _alone(supervisor, jobs)
    assert supervisor.process.pid == ready.pid


def test_a_checked_worker_says_the_same_and_finds_nothing(supervisor: Supervisor) -> None:
    supervisor.start("--checked", "--redundant")
    jobs = _jobs(4)
    for job in jobs:
        supervisor.send(job)
    assert _by_job(supervisor.finish(4)) == _alone(supervisor, jobs)
    assert supervisor.status(0).epochs_dirty == 0


def test_cancel_before_any_token_ends_with_an_empty_block(supervisor: Supervisor) -> None:
    supervisor.start()
    supervisor.send(Pace(duty=0.01, batch=1))
    supervisor.send(Start(job="a", prompt=PROMPT, max_tokens=TOKENS))
    supervisor.send(Start(job="b", prompt=PROMPT, max_tokens=TOKENS))
    supervisor.send(Cancel(job="b", finish="deadline"))
    supervisor.send(Cancel(job="never", finish="deadline"))
    while (block := supervisor.expect(Block)).job != "b":
        pass
    assert (block.tokens, block.finish) == ([], "deadline")


def test_an_orphan_exits_by_itself(supervisor: Supervisor) -> None:
    supervisor.start()
    supervisor.send(Start(job="a", prompt=PROMPT, max_tokens=TOKENS))
    supervisor.blocks(1)
    supervisor.connection.close()
    code, message = supervisor.end()
    assert code == EXIT_ORPHAN
    assert "Traceback" not in message


def test_garbage_on_the_socket_ends_the_worker_with_a_sentence(supervisor: Supervisor) -> None:
    supervisor.start()
    supervisor.connection.sendall(b"\x00\x00\x00\x02\xc1\xc1")
    code, message = supervisor.end()
    assert code == EXIT_ORPHAN
    assert "unreadable message" in message
    assert "Traceback" not in message


def test_a_missing_image_is_one_sentence_and_exit_code_2(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.image = tmp_path / "nowhere"
    with pytest.raises(EOFError):
        supervisor.start()
    code, message = supervisor.end()
    assert code == 2
    assert "nowhere" in message
    assert "penumbra model build" in message
    assert "Traceback" not in message


def test_more_positions_than_the_image_has_are_refused(supervisor: Supervisor) -> None:
    with pytest.raises(EOFError):
        supervisor.start("--positions", "512")
    code, message = supervisor.end()
    assert code == 2
    assert "[worker] positions is 512" in message
    assert "addresses 256" in message
    assert "--context 512" in message
    assert "Traceback" not in message


def test_a_killed_supervisor_takes_the_worker_with_it(tiny_image: Path, tmp_path: Path) -> None:
    program = (
        "import socket, subprocess, sys\n"
        "listener = socket.socket(socket.AF_UNIX); listener.bind(sys.argv[1]); listener.listen()\n"
        "worker = subprocess.Popen([sys.executable, '-m', 'node.inference.worker', '--generation', '1',"
        " '--socket', sys.argv[1], '--image', sys.argv[2], '--arena', sys.argv[3], '--threads', '1',"
        " '--positions', '256'])\n"
        "connection, _ = listener.accept(); connection.recv(1)\n"
        "print(worker.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "s"), str(tiny_image), str(tmp_path / "arena")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "Z":
            break
        time.sleep(0.02)
    else:
        assert not Path(f"/proc/{worker}").exists()
