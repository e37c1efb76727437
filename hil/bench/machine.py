"""The machine a measurement is taken on, and how fast it reads memory."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime as ort
import xxhash
from numpy.typing import NDArray

from telemetry.figures import Machine

_FEATURES: Final = frozenset(
    {"avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"}
    | {"avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "sve", "bf16"}
)
_SLICE: Final = 1 << 20
"""Bytes one call reads, 1 MiB: long enough that calling costs nothing, short enough to share out evenly."""
PEAK_FIELD: Final = "VmHWM:"


def describe_machine(threads: int, *, peers: bool, load_before: float) -> Machine:
    """Describe this machine.

    Parameters
    ----------
    threads
        Threads each contender was given.
    peers
        Whether llama.cpp takes part.
    load_before
        `load_average` before the first run.
    """
    cpu, features = _cpu()
    return Machine(
        cpu=cpu,
        features=features,
        cores=len(os.sched_getaffinity(0)),
        threads=threads,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        python=platform.python_version(),
        numpy=np.__version__,
        onnxruntime=ort.__version__,
        llama_cpp_python=_peer_version() if peers else None,
        load_before=load_before,
        load_after=load_average(),
    )


def load_average() -> float:
    """Return the load average of the last minute."""
    return os.getloadavg()[0]


def peak_bytes() -> int:
    """Return the most memory this process ever held, bytes (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(PEAK_FIELD):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {PEAK_FIELD}")


class MemoryReader:
    """Read a large piece of memory from end to end with several threads, and time it.

    Two ways are tried, and the faster counts, for each is a lower bound of what the memory gives: xxh3
    over the bytes, and numpy's largest element of 64-bit words. Both let go of the interpreter lock.

    Parameters
    ----------
    size
        Bytes to read, as many as the live weights: far more than the caches hold.
    threads
        Threads that read.
    """

    WAYS: Final = ("xxh3_64", "numpy max of uint64")

    def __init__(self, size: int, threads: int) -> None:
        words = size // 8
        self._memory: NDArray[np.uint64] = np.arange(words, dtype=np.uint64)
        self._pool = ThreadPoolExecutor(threads, "penumbra-read")
        step = _SLICE // 8
        self._slices = [self._memory[at : at + step] for at in range(0, words, step)]
        self._shares = [self._slices[number::threads] for number in range(threads)]

    def gb_s(self) -> dict[str, float]:
        """Read once in each way; return GB/s (10^9 bytes) by way."""
        return dict(
            zip(
                self.WAYS,
                (self._time(lambda part: xxhash.xxh3_64_intdigest(part.data)), self._time(np.max)),
                strict=True,
            )
        )

    def close(self) -> None:
        """Give the memory and the threads back."""
        self._pool.shutdown()
        self._slices, self._shares = [], []
        self._memory = np.empty(0, np.uint64)

    def _time(self, read: Callable[[NDArray[np.uint64]], object]) -> float:
        def share(slices: list[NDArray[np.uint64]]) -> None:
            for part in slices:
                read(part)

        started = time.perf_counter()
        list(self._pool.map(share, self._shares))
        return self._memory.nbytes / (time.perf_counter() - started) / 1e9


def _cpu() -> tuple[str, list[str]]:
    name, flags = platform.machine(), ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in {"flags", "Features"}:
            flags = value
            break
    return name, sorted(_FEATURES & set(flags.split()))


def _peer_version() -> str | None:
    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return None
