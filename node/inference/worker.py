"""The inference worker: a process of its own that decodes a batch, proves and repairs; one thread, no policy.

    python -m node.inference.worker --socket PATH --generation N --image DIR --arena PATH ...

It speaks `node.inference.protocol` with the supervisor. Pings are answered by the decoding thread itself,
between two runs of the model. Exit codes: 0 ordered stop, 2 the configuration or the image is at fault,
3 memory beyond repair (`Fatal` was sent), 4 the supervisor is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import onnxruntime as ort

from node.inference import protocol
from node.inference.arena import KvArena
from node.inference.decoder import arena_shape
from node.inference.manifest import TOKENIZER, image_id
from node.inference.model import open_model
from node.inference.proof import BeyondRepair
from node.inference.sequence import JobSpec, Rules
from node.inference.tokenizer import Tokenizer
from node.inference.verified import Policy, VerifiedBatch
from node.inference.weights import ProtectedWeights
from telemetry.errors import PenumbraError

EXIT_STOP: Final = 0
EXIT_BEYOND_REPAIR: Final = 3
EXIT_ORPHAN: Final = 4
IDLE_CHECK_S: Final = 1.0
START_DUTY: Final = 0.05
"""Share of time a worker computes until the first `Pace`: a restart in eclipse must not draw full power."""
_PR_SET_PDEATHSIG: Final = 1


class SupervisorGone(Exception):
    """The supervisor closed its end, or sent something that is no message."""


class Channel:
    """The worker's end of the socket.

    Raises
    ------
    SupervisorGone
        From every method, when the other end is closed or unreadable.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._reader: protocol.Reader[protocol.FromSupervisor] = protocol.Reader(protocol.FromSupervisor)
        self._call(lambda: self._socket.connect(path))

    def send(self, message: protocol.FromWorker) -> None:
        """Send one message, waiting while the supervisor's buffer is full."""
        self._call(lambda: self._socket.sendall(protocol.encode(message)))

    def receive(self, timeout_s: float) -> list[protocol.FromSupervisor]:
        """Return what arrived, after at most `timeout_s`; an empty list when nothing did."""
        if not select.select([self._socket], [], [], max(timeout_s, 0.0))[0]:
            return []
        data = self._call(lambda: self._socket.recv(65536))
        if not data:
            raise SupervisorGone("the supervisor closed the socket")
        try:
            return list(self._reader.feed(data))
        except ValueError as error:
            raise SupervisorGone(str(error)) from error

    def _call(self, operation: Callable[[], bytes | None]) -> bytes | None:
        try:
            return operation()
        except OSError as error:
            raise SupervisorGone(f"socket: {error.strerror}") from error


class Cores:
    """The processor cores this process computes on.

    ONNX Runtime cannot change its threads once a session is loaded; the kernel can change where they run.

    Parameters
    ----------
    most
        Cores used at first, and at most: the threads of the session, or fewer where there are fewer cores.
    """

    def __init__(self, most: int) -> None:
        self._all = sorted(os.sched_getaffinity(0))[:most]
        self.used = len(self._all)

    def use(self, count: int) -> None:
        """Compute on so many cores from now on, 1 to `most`: all threads of the process, also later ones."""
        self.used = min(max(count, 1), len(self._all))
        chosen = self._all[: self.used]
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.sched_setaffinity(int(thread), chosen)


class Worker:
    """Serve one supervisor until it says stop."""

    def __init__(self, args: argparse.Namespace) -> None:
        started = time.monotonic()
        self._channel = Channel(args.socket)
        self._cores = Cores(args.threads)
        self._duty = START_DUTY
        self._stop = False
        self._may_mend = protocol.Repair(weights=True, kv=True, compute=True)
        self._known: dict[str, int] = {}
        self._early: list[protocol.Strike] | None = []
        model = open_model(args.image, args.threads, checked=args.checked)
        manifest, image = model.manifest, image_id(model.manifest)
        if args.positions > model.shape.context:
            raise PenumbraError(
                f"[worker] positions is {args.positions}; image {args.image} addresses {model.shape.context}",
                f"lower it, or build the image with: penumbra model build --context {args.positions}",
            )
        arena = KvArena(args.arena, arena_shape(model, args.positions, args.seats))
        self._weights = ProtectedWeights(args.image, manifest, args.threads, checked=args.checked)
        self._tokenizer = Tokenizer(args.image / TOKENIZER)
        self._engine = VerifiedBatch(
            model,
            arena,
            self._weights,
            Rules(image, args.epoch_tokens, manifest.eos, self._tokenizer.token_bytes),
            Policy(epoch_s=args.epoch_seconds, budget=args.overhead_budget, retries=args.retries),
            report=self._report,
            between=self._between,
            executor=ThreadPoolExecutor(1, "penumbra-rows") if args.threads > 1 else None,
        )
        self._engine.batch = min(max(args.batch, 1), args.seats)
        self._engine.redundant = args.redundant
        resumed = self._engine.resume()
        self._channel.send(
            protocol.Ready(
                generation=args.generation,
                pid=os.getpid(),
                image_id=image,
                onnxruntime=ort.__version__,
                resumed=[protocol.Resumed(job=one.job, tokens=len(one.generated)) for one in resumed],
                load_s=time.monotonic() - started,
            )
        )
        # Ready comes first; what was mended while loading is told right after it.
        early, self._early = self._early, None
        for strike in early:
            self._channel.send(strike)

    def run(self) -> int:
        """Serve until told to stop; return the exit code."""
        while not self._stop:
            if self._engine.active:
                self._epoch()
            else:
                self._idle()
        return EXIT_STOP

    def _epoch(self) -> None:
        progress = self._engine.run_epoch()
        for block in progress.blocks:
            self._send_block(block)
        for job in progress.parked:
            self._channel.send(protocol.Parked(job=job))
        for job, reason in progress.refused:
            self._channel.send(protocol.JobError(job=job, reason=reason))
        self._between(self._engine.counters.scan_ms / 1e3)
        self._send_status()

    def _idle(self) -> None:
        self._engine.check_idle()
        self._send_status()
        self._wait(IDLE_CHECK_S, lambda: bool(self._engine.active) or self._stop)

    def _start(self, start: protocol.Start) -> None:
        """Take up a job, and send what the supervisor does not know of it."""
        spec = JobSpec(start.job, self._tokenizer.encode(start.prompt), start.max_tokens, start.sampling)
        try:
            blocks = self._engine.admit(spec, start.known_tokens)
        except ValueError as error:
            self._channel.send(protocol.JobError(job=start.job, reason=str(error)))
            return
        self._known[start.job] = start.known_tokens
        for block in blocks:
            self._send_block(block)

    def _send_block(self, block: protocol.Block) -> None:
        """Send a block unless the supervisor has it: a job that starts again makes it again."""
        if block.first >= self._known.get(block.job, 0):
            self._channel.send(block)
            self._known[block.job] = block.first + len(block.tokens)
        if block.finish is not None:
            self._known.pop(block.job, None)

    def _pace(self, pace: protocol.Pace) -> None:
        self._duty = min(max(pace.duty, 0.01), 1.0)
        if pace.threads is not None:
            self._cores.use(pace.threads)
        if pace.batch is not None:
            self._engine.batch = min(max(pace.batch, 1), self._engine.seats)
        if pace.redundant is not None:
            self._engine.redundant = pace.redundant

    def _report(self, strike: protocol.Strike) -> None:
        if not getattr(self._may_mend, strike.region):
            raise BeyondRepair(f"{strike.region} struck ({strike.role}), and mending it is switched off")
        if self._early is None:
            self._channel.send(strike)
        else:
            self._early.append(strike)

    def _between(self, seconds: float) -> None:
        """Answer what arrived, and rest so that computing takes the share of time that `Pace` allows."""
        ran = time.monotonic()
        self._handle(0.0)
        while not self._stop and (rest := ran + seconds * (1 / self._duty - 1) - time.monotonic()) > 0:
            self._handle(rest)
        if self._stop:
            raise SystemExit(EXIT_STOP)

    def _wait(self, seconds: float, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        self._handle(0.0)
        while not until() and (rest := deadline - time.monotonic()) > 0:
            self._handle(rest)

    def _handle(self, timeout_s: float) -> None:
        for message in self._channel.receive(timeout_s):
            match message:
                case protocol.Ping(key=key):
                    self._channel.send(protocol.Pong(key=key))
                case protocol.Pace():
                    self._pace(message)
                case protocol.Repair():
                    self._may_mend = message
                case protocol.Start():
                    self._start(message)
                case protocol.Park(job=job):
                    self._engine.park(job)
                case protocol.Cancel(job=job, finish=finish):
                    self._engine.cancel(job, finish)
                case protocol.Shutdown():
                    self._stop = True

    def _send_status(self) -> None:
        counters = self._engine.counters
        self._channel.send(
            protocol.Status(
                tokens_committed=counters.tokens_committed,
                tokens_discarded=counters.tokens_discarded,
                epochs_clean=counters.epochs_clean,
                epochs_dirty=counters.epochs_dirty,
                scan_ms=counters.scan_ms,
                proof_ns=counters.proof_ns,
                step_ms=counters.step_ms,
                scrub_pass_s=self._weights.scrub_pass_s,
                active=len(self._engine.active),
                batch=self._engine.batch,
                threads=self._cores.used,
                prefill_tokens=counters.prefill_tokens,
                tokens_s=counters.tokens_s,
            )
        )

    def fail(self, reason: str) -> None:
        """Tell the supervisor why the worker gives up."""
        self._channel.send(protocol.Fatal(reason=reason))


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends; exit at once if it already has."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        raise SystemExit(EXIT_ORPHAN)


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the worker's arguments."""
    parser = argparse.ArgumentParser(
        prog="penumbra-worker", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--socket", required=True, help="Unix socket the supervisor listens on")
    parser.add_argument("--generation", type=int, required=True, help="echoed in Ready")
    parser.add_argument("--image", type=Path, required=True, help="directory of the image slot")
    parser.add_argument("--arena", type=Path, required=True, help="file of the KV arena")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seats", type=int, default=10, help="sequences the arena holds")
    parser.add_argument("--batch", type=int, default=8, help="sequences decoded together, until a Pace")
    parser.add_argument("--positions", type=int, default=4096, help="longest prompt and text together")
    parser.add_argument("--overhead-budget", type=float, default=0.01, help="share of time for proofs")
    parser.add_argument("--epoch-seconds", type=float, default=2.0, help="longest epoch")
    parser.add_argument("--epoch-tokens", type=int, default=32, help="tokens of a block")
    parser.add_argument("--retries", type=int, default=6)
    parser.add_argument("--checked", action="store_true", help="check every matrix product by a checksum")
    parser.add_argument("--redundant", action="store_true", help="compute epochs twice, until a Pace")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the worker; return its exit code (module docstring)."""
    die_with_parent(os.getppid())
    args = parse(sys.argv[1:] if argv is None else argv)
    # Ctrl-C in a terminal reaches the whole group; the supervisor decides when the worker stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = None
    try:
        worker = Worker(args)
        return worker.run()
    except PenumbraError as error:
        sys.stderr.write(f"penumbra worker: {error}\n")
        return error.exit_code
    except BeyondRepair as error:
        sys.stderr.write(f"penumbra worker: {error}\n")
        if worker is not None:
            worker.fail(str(error))
        return EXIT_BEYOND_REPAIR
    except SupervisorGone as error:
        sys.stderr.write(f"penumbra worker: {error}\n")
        return EXIT_ORPHAN


if __name__ == "__main__":
    sys.exit(main())
