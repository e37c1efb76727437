"""A scripted worker for the tests of the node: speaks the real protocol, decodes nothing.

The text it "generates" is a function of the job and the index of the token, so a resumed job must come
out equal. Several jobs go on together, a block of each an epoch; the jobs under way are noted beside the
socket, as the real worker's arena keeps them, and named by the next generation. Misbehaviour is asked for by
the prompt (`!exit_at=N`, `!stall_at=N`, `!strike`, `!trip`, `!jobs_bad`) or, at start, by `--start` (`ok`,
`exit`, `hang`, `wrong_generation`, `garbage`).
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import re
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from node.inference import protocol as p
from telemetry.certificate import chain_next, chain_start
from telemetry.packets import Certificate

IMAGE_ID = "00112233aabbccdd"
PR_SET_PDEATHSIG = 1


def prompt_tokens(prompt: str) -> list[int]:
    return list(prompt.encode()[:16])


def token(job: str, index: int) -> int:
    digest = hashlib.sha256(f"{job}/{index}".encode()).digest()
    return 97 + int.from_bytes(digest[:2], "big") % 26


def text_of(job: str, count: int) -> bytes:
    return bytes(token(job, i) for i in range(count))


def blocks(
    job: str, prompt: str, max_tokens: int, epoch_tokens: int, *, logprobs: bool = False
) -> list[p.Block]:
    """Every block of a job, as a worker that is never disturbed sends them."""
    chain = chain_start(IMAGE_ID, job, prompt_tokens(prompt))
    out = []
    for epoch, first in enumerate(range(0, max_tokens, epoch_tokens)):
        tokens = [token(job, i) for i in range(first, min(first + epoch_tokens, max_tokens))]
        kv_digest = struct.pack(">Q", first)
        chain = chain_next(chain, epoch, first, tokens, kv_digest)
        certificate = Certificate(image_id=IMAGE_ID, epoch=epoch, kv_digest=kv_digest, chain=chain)
        last = first + len(tokens) == max_tokens
        out.append(
            p.Block(
                job=job,
                first=first,
                tokens=tokens,
                text=bytes(tokens),
                certificate=certificate,
                prompt_tokens=prompt_tokens(prompt) if first == 0 else None,
                finish="length" if last else None,
                logprobs=[-token / 128 for token in tokens] if logprobs else None,
            )
        )
    return out


def last_block(start: p.Start, first: int, epoch_tokens: int, finish: str) -> p.Block:
    """The block that ends a job before its end, at token `first`: without tokens, and certified as such."""
    every = blocks(start.job, start.prompt, start.max_tokens, epoch_tokens)
    before = [block for block in every if block.first < first]
    chain = chain_start(IMAGE_ID, start.job, prompt_tokens(start.prompt))
    if before:
        chain = before[-1].certificate.chain
    kv_digest = bytes(8)
    chain = chain_next(chain, len(before), first, [], kv_digest)
    return p.Block(
        job=start.job,
        first=first,
        tokens=[],
        text=b"",
        certificate=Certificate(image_id=IMAGE_ID, epoch=len(before), kv_digest=kv_digest, chain=chain),
        prompt_tokens=prompt_tokens(start.prompt) if first == 0 else None,
        finish=finish,
    )


@dataclass
class Job:
    """A job under way."""

    start: p.Start
    pending: list[p.Block]
    park: bool = False
    finish: str | None = None
    """How it was told to end."""

    def option(self, name: str) -> int | None:
        found = re.search(rf"!{name}=(\d+)", self.start.prompt)
        return int(found[1]) if found else None


class ScriptedWorker:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.socket = socket.socket(socket.AF_UNIX)
        self.reader: p.Reader[p.FromSupervisor] = p.Reader(p.FromSupervisor)
        self.jobs: dict[str, Job] = {}
        """Active jobs, in the order of their starts."""
        self.held = Path(args.socket).with_name("held-jobs.json")
        self.pace = p.Pace(duty=1.0, threads=2, batch=args.batch, redundant=False)
        self.committed = 0
        self.prefilled = 0
        self.struck = 0
        self.status_at = 0.0
        self.epoch_at = 0.0

    def send(self, message: p.Message) -> None:
        self.socket.sendall(p.encode(message))

    def run(self) -> int:
        start = self.args.start
        if start == "exit":
            return 7
        self.socket.connect(self.args.socket)
        if start == "garbage":
            self.socket.sendall(struct.pack(">I", 3) + b"\xc1\xc1\xc1")
        if start in ("hang", "garbage"):
            time.sleep(600)
        generation = self.args.generation + (start == "wrong_generation")
        held = json.loads(self.held.read_text()) if self.held.exists() else {}
        self.send(
            p.Ready(
                generation=generation,
                pid=os.getpid(),
                image_id=IMAGE_ID,
                onnxruntime="none",
                resumed=[p.Resumed(job=job, tokens=tokens) for job, tokens in held.items()],
                load_s=0.01,
            )
        )
        self.socket.settimeout(0.01)
        while True:
            try:
                data = self.socket.recv(1 << 16)
            except TimeoutError:
                data = None
            if data == b"":
                return 0
            for message in self.reader.feed(data or b""):
                if isinstance(message, p.Shutdown):
                    return 0
                self.take(message)
            self.step()

    def take(self, message: p.FromSupervisor) -> None:
        match message:
            case p.Ping(key=key):
                self.send(p.Pong(key=key))
            case p.Pace():
                self.pace = message
            case p.Park(job=job) if job in self.jobs:
                self.jobs[job].park = True
            case p.Cancel(job=job, finish=finish) if job in self.jobs:
                self.jobs[job].finish = finish
            case p.Start():
                self.start(message)

    def start(self, message: p.Start) -> None:
        if "!jobs_bad" in message.prompt:
            self.send(p.JobError(job=message.job, reason="the prompt is too long"))
            return
        if message.job in self.jobs or len(self.jobs) >= (self.pace.batch or 1):
            self.send(p.Fatal(reason=f"{message.job} was started beyond the batch, or twice"))
            sys.exit(1)
        every = blocks(
            message.job,
            message.prompt,
            message.max_tokens,
            self.args.epoch_tokens,
            logprobs=message.sampling.logprobs,
        )
        skip = 1 if "!gap" in message.prompt else 0
        known = message.known_tokens
        pending = [b for b in every if b.first + len(b.tokens) > known][skip:]
        if "!repeat" in message.prompt:
            pending = every
        self.prefilled += len(prompt_tokens(message.prompt))
        self.jobs[message.job] = Job(message, pending)

    def misbehave_once(self, job: Job, name: str, first: int) -> bool:
        """True at the block the prompt names, the first time only: a file remembers it over restarts."""
        mark = Path(self.args.socket).with_name(f"mark-{name}-{first}")
        if job.option(name) != first or ("!always" not in job.start.prompt and mark.exists()):
            return False
        mark.touch()
        return True

    def step(self) -> None:
        now = time.monotonic()
        if now >= self.status_at:
            self.status_at = now + 0.2
            self.status()
        if now < self.epoch_at:
            return
        self.epoch_at = now + self.args.block_s
        for name, job in list(self.jobs.items()):
            self.advance(job)
            if job.park or job.finish is not None or not job.pending:
                del self.jobs[name]
        # In one step: it may be killed at any moment.
        draft = self.held.with_suffix(".new")
        draft.write_text(json.dumps({n: j.pending[0].first for n, j in self.jobs.items()}))
        draft.rename(self.held)

    def advance(self, job: Job) -> None:
        """End an epoch of one job."""
        block = job.pending.pop(0)
        if job.finish is not None:
            self.send(last_block(job.start, block.first, self.args.epoch_tokens, job.finish))
            return
        if self.misbehave_once(job, "exit_at", block.first):
            os._exit(3)
        if self.misbehave_once(job, "stall_at", block.first):
            time.sleep(600)
        if self.misbehave_once(job, "fatal_at", block.first):
            self.send(p.Fatal(reason="retries exhausted"))
            sys.exit(1)
        if block.first == 0:
            self.strike(job.start.prompt)
        self.committed += len(block.tokens)
        self.send(block)
        if job.park and job.pending:
            self.send(p.Parked(job=block.job))

    def strike(self, prompt: str) -> None:
        now_ns = time.time_ns()
        if "!strike" in prompt:
            self.struck += 1
            self.send(
                p.Strike(
                    region="weights",
                    page=12,
                    role="ffn_gate_up",
                    detected_ns=now_ns,
                    recovered_ns=now_ns + 1_000_000,
                    method="parity",
                )
            )
        if "!trip" in prompt:
            self.struck += 1
            self.send(
                p.Strike(
                    region="compute",
                    page=3,
                    role="matmul",
                    detected_ns=now_ns,
                    recovered_ns=now_ns + 2_000_000,
                    method="redo",
                    evidence={"residual": 7.5},
                )
            )

    def status(self) -> None:
        dirty = self.struck
        self.send(
            p.Status(
                tokens_committed=self.committed,
                tokens_discarded=4 * dirty,
                epochs_clean=self.committed // 4,
                epochs_dirty=dirty,
                scan_ms=1.5,
                step_ms=1.0,
                scrub_pass_s=None,
                active=len(self.jobs),
                batch=self.pace.batch or 1,
                threads=self.pace.threads or 1,
                prefill_tokens=self.prefilled,
                tokens_s=0.0,
            )
        )


def main() -> int:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--generation", type=int, required=True)
    parser.add_argument("--epoch-tokens", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--block-s", type=float, default=0.02)
    parser.add_argument("--start", default="ok")
    args, _ = parser.parse_known_args()
    return ScriptedWorker(args).run()


if __name__ == "__main__":
    sys.exit(main())
