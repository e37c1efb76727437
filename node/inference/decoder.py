"""Plain decoding of several sequences on KV rows bound in place: no proof, no policy, no choice of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from node.inference.arena import ARENA_VERSION, KV_PAGE, ArenaShape, KvArena
from node.inference.guard import ComputeGuard
from node.inference.manifest import image_id
from node.inference.model import Model

PREFILL_CHUNK: Final = 64
"""Prompt tokens a run of the model takes, at most. Chunks begin at multiples of it, so that whole chunks of
a common prefix are the same rows to the bit. Between two of them others decode, and pings are answered."""

Hidden = npt.NDArray[np.float32]


class _Run:
    """Inputs and outputs of a run over `count` seats from `first` on, `length` tokens each, bound once."""

    def __init__(self, model: Model, cache: dict[str, Any], count: int, length: int) -> None:
        self.tokens = np.zeros((count, length), np.int64)
        self.positions = np.zeros((count, length), np.int64)
        self.last = np.zeros(count, np.int32)
        self.total = np.zeros((), np.int32)
        self.window_last = np.zeros(count, np.int32)
        self.window_total = np.zeros((), np.int32)
        self.hidden = np.zeros((count, length, model.shape.width), np.float32)
        self.residual: npt.NDArray[np.float32] | None = None
        self.binding = model.trunk.io_binding()
        for name, array in (
            ("input_ids", self.tokens),
            ("position_ids", self.positions),
            ("seqlens_k", self.last),
            ("total_sequence_length", self.total),
            ("window_seqlens_k", self.window_last),
            ("window_total_sequence_length", self.window_total),
        ):
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        self.binding.bind_ortvalue_output("hidden", ort.OrtValue.ortvalue_from_numpy(self.hidden))
        if model.check_limits is not None:
            self.residual = np.zeros((count, length, len(model.check_limits)), np.float32)
            self.binding.bind_ortvalue_output("residual", ort.OrtValue.ortvalue_from_numpy(self.residual))
        for name, value in cache.items():
            self.binding.bind_ortvalue_input(f"past_{name}", value)
            self.binding.bind_ortvalue_output(f"present_{name}", value)


class BatchDecoder:
    """Run the trunk of a model over the seats of a KV arena.

    Parameters
    ----------
    model
        The model; its head is for the caller to ask.
    arena
        Where ONNX Runtime reads and writes the KV rows in place.
    guard
        Checks every run.

    Raises
    ------
    RuntimeError
        ONNX Runtime copied the rows instead of binding them: nothing could be proven then.
    """

    def __init__(self, model: Model, arena: KvArena, guard: ComputeGuard) -> None:
        self.guard = guard
        self._model = model
        self._arena = arena
        self._caches: dict[tuple[int, int], dict[str, Any]] = {}
        self._runs: dict[tuple[int, int, int], _Run] = {}

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Hidden:
        """Feed one token to each of the seats 0 to B-1; return the hidden states that follow.

        Parameters
        ----------
        tokens, positions
            B of each. The KV row of each position is written.

        Returns
        -------
        float32, shape (B, width), valid until the next step of as many seats.

        Raises
        ------
        ComputeTrip
            The guard found the result unsound.
        """
        count = len(tokens)
        run = self._run(0, count, 1)
        run.tokens[:, 0] = tokens
        run.positions[:, 0] = run.last[:] = positions
        run.total[...] = max(positions) + 1
        seats = self._arena.seats
        within = [position - seats[seat].window_rows.base for seat, position in enumerate(positions)]
        run.window_last[:] = within
        run.window_total[...] = max(within) + 1
        self._model.trunk.run_with_iobinding(run.binding)
        hidden: Hidden = run.hidden[:, 0]
        residual = None if run.residual is None else run.residual[:, 0]
        self.guard.check(hidden, residual, range(count), positions)
        return hidden

    def prefill(self, seat: int, tokens: Sequence[int], start: int) -> Hidden:
        """Feed a chunk of a prompt to one seat; return the hidden state after its last token.

        Parameters
        ----------
        seat
            The seat; its rows below `start` are written.
        tokens
            1 to `PREFILL_CHUNK` tokens, for the positions from `start` on.
        start
            A multiple of `PREFILL_CHUNK`.

        Returns
        -------
        float32, shape (width,), valid until the next chunk.

        Raises
        ------
        ComputeTrip
            The guard found the result unsound.
        """
        stop = start + len(tokens)
        within = stop - self._arena.seats[seat].window_rows.base
        run = self._run(seat, 1, len(tokens))
        run.tokens[0] = tokens
        run.positions[0] = np.arange(start, stop)
        run.last[0], run.total[...] = stop - 1, stop
        run.window_last[0], run.window_total[...] = within - 1, within
        self._model.trunk.run_with_iobinding(run.binding)
        hidden: Hidden = run.hidden[0]
        residual = None if run.residual is None else run.residual[0]
        self.guard.check(hidden, residual, [seat] * len(tokens), range(start, stop))
        last: Hidden = hidden[-1]
        return last

    def _run(self, first: int, count: int, length: int) -> _Run:
        """Return the bound run; those of steps and of whole chunks are kept."""
        key = first, count, length
        run = self._runs.get(key)
        if run is None:
            run = _Run(self._model, self._cache(first, count), count, length)
            if length in {1, PREFILL_CHUNK}:
                self._runs[key] = run
        return run

    def _cache(self, first: int, count: int) -> dict[str, Any]:
        """Return the KV rows of some seats as values of ONNX Runtime, by name."""
        cache = self._caches.get((first, count))
        if cache is None:
            cache = {}
            for layer in range(self._model.shape.layers):
                for name, rows in zip(("key", "value"), self._arena.planes(layer), strict=True):
                    part = rows[first : first + count]
                    value = ort.OrtValue.ortvalue_from_numpy(part)
                    if value.data_ptr() != part.ctypes.data:
                        raise RuntimeError("ONNX Runtime copied the KV rows instead of binding them in place")
                    cache[f"{name}.{layer}"] = value
            self._caches[first, count] = cache
        return cache


def arena_shape(model: Model, positions: int, seats: int) -> ArenaShape:
    """Return the shape of an arena for a model.

    Parameters
    ----------
    model
        The model.
    positions
        Longest prompt and text together: at most the model's context, in whole KV pages.
    seats
        Sequences it holds.
    """
    shape = model.shape
    return ArenaShape(
        version=ARENA_VERSION,
        image_id=image_id(model.manifest),
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        positions=max(min(positions, shape.context) // KV_PAGE, 1) * KV_PAGE,
        window=shape.window,
        window_step=model.manifest.window_step,
        global_every=shape.global_every,
        seats=seats,
    )
