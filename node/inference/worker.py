"""The inference worker: a process of its own that decodes, proves and repairs, one thread, no policy.

    python -m node.inference.worker --socket PATH --generation N --image DIR --arena PATH ...

It speaks `node.inference.protocol` with the supervisor. Pings are answered by the decoding thread itself,
between two runs of the model. Exit codes: 0 ordered stop, 2 the configuration or the image is at fault,
3 memory beyond repair (`Fatal` was sent), 4 the supervisor is gone.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import onnxruntime as ort

from node.inference import protocol
from node.inference.arena import ARENA_VERSION, ArenaShape, KvArena
from node.inference.decoder import Decoder
from node.inference.image import open_session
from node.inference.manifest import TOKENIZER, image_id, load_manifest
from node.inference.tokenizer import Tokenizer
from node.inference.verified import BeyondRepair, VerifiedDecoder
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


class Worker:
    """Serve one supervisor until it says stop."""

    def __init__(self, args: argparse.Namespace) -> None:
        started = time.monotonic()
        self._channel = Channel(args.socket)
        self._duty = START_DUTY
        self._stop = False
        self._starts: deque[protocol.Start] = deque()
        self._cancelled: set[str] = set()
        self._early: list[protocol.Strike] | None = []
        manifest = load_manifest(args.image)
        shape = manifest.shape
        self._arena = KvArena(
            args.arena,
            ArenaShape(
                version=ARENA_VERSION,
                image_id=image_id(manifest),
                layers=shape.layers,
                kv_heads=shape.kv_heads,
                positions=min(args.positions, shape.context),
                head_dim=shape.head_dim,
            ),
        )
        session = open_session(args.image, args.threads)
        self._weights = ProtectedWeights(args.image, manifest, args.threads)
        self._tokenizer = Tokenizer(args.image / TOKENIZER)
        self._decoder = VerifiedDecoder(
            Decoder(session, shape, self._arena.kv),
            self._arena,
            self._weights,
            image_id=image_id(manifest),
            block_tokens=args.epoch_tokens,
            epoch_s=args.epoch_seconds,
            retries=args.retries,
            eos=manifest.eos,
            text=self._tokenizer.token_bytes,
            report=self._report,
            between=self._between,
        )
        self._decoder.check_idle()
        resumed = self._decoder.resume()
        self._channel.send(
            protocol.Ready(
                generation=args.generation,
                pid=os.getpid(),
                image_id=image_id(manifest),
                onnxruntime=ort.__version__,
                resumed_job=self._decoder.job if resumed else None,
                resumed_tokens=self._decoder.generated if resumed else 0,
                load_s=time.monotonic() - started,
            )
        )
        # Ready comes first; what was mended while loading is told right after it.
        early, self._early = self._early, None
        for strike in early:
            self._channel.send(strike)

    def run(self) -> int:
        """Serve until told to stop; return the exit code."""
        active = False
        while not self._stop:
            if not active and self._starts:
                active = self._start(self._starts.popleft())
            elif active:
                active = self._epoch()
            else:
                self._idle()
        return EXIT_STOP

    def _start(self, start: protocol.Start) -> bool:
        """Take up a job; return True when there is something to decode."""
        if self._decoder.job != start.job:
            prompt = self._tokenizer.encode(start.prompt)
            try:
                self._decoder.begin(start.job, prompt, start.max_tokens)
            except ValueError as error:
                self._channel.send(protocol.JobError(job=start.job, reason=str(error)))
                return False
        for block in self._decoder.blocks(start.known_tokens):
            self._channel.send(block)
        self._known = start.known_tokens
        return self._decoder.finish is None

    def _epoch(self) -> bool:
        block = self._decoder.run_epoch(lambda: self._decoder.job in self._cancelled)
        if block is not None and block.first >= self._known:
            self._channel.send(block)
        self._between(self._decoder.counters.scan_ms / 1e3)
        self._send_status()
        return self._decoder.finish is None

    def _idle(self) -> None:
        self._decoder.check_idle()
        self._send_status()
        self._wait(IDLE_CHECK_S, lambda: bool(self._starts) or self._stop)

    def _report(self, strike: protocol.Strike) -> None:
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
                case protocol.Pace(duty=duty):
                    self._duty = min(max(duty, 0.01), 1.0)
                case protocol.Start():
                    self._starts.append(message)
                case protocol.Cancel(job=job):
                    self._cancelled.add(job)
                case protocol.Shutdown():
                    self._stop = True

    def _send_status(self) -> None:
        counters = self._decoder.counters
        self._channel.send(
            protocol.Status(
                tokens_committed=counters.tokens_committed,
                tokens_discarded=counters.tokens_discarded,
                epochs_clean=counters.epochs_clean,
                epochs_dirty=counters.epochs_dirty,
                scan_ms=counters.scan_ms,
                step_ms=counters.step_ms,
                scrub_pass_s=self._weights.scrub_pass_s,
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
    parser.add_argument("--epoch-tokens", type=int, default=32)
    parser.add_argument("--epoch-seconds", type=float, default=1.0)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--retries", type=int, default=6)
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
