"""llama.cpp as the peer: the same GGUF through `llama_decode` with an explicit batch.

Package `llama-cpp-python` (extra `peers`) is only the binding. Its high-level interface copies the logits of
the whole vocabulary into Python for every token (about 10 ms, measured.md), which would flatter us; so the
C functions are called as a C program would call them. Choosing the token is part of a step, as it is
for us: the largest logit, found by numpy in llama.cpp's own memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from telemetry.errors import PenumbraError

PREFILL_BATCH: Final = 512
"""Tokens a call of prefill takes at most: llama.cpp's own default."""
PIECE_BYTES: Final = 64
"""Room for the bytes of a piece at first; llama.cpp says how much is needed where that is too little."""


def require_peer() -> Any:
    """Import the low-level binding.

    Raises
    ------
    PenumbraError
        The extra `peers` is not installed, or its library cannot be loaded.
    """
    try:
        from llama_cpp import llama_cpp as binding  # noqa: PLC0415
    except (ImportError, OSError, RuntimeError) as error:  # the last two: its library cannot be loaded
        raise PenumbraError(
            f"the peer llama.cpp (llama-cpp-python) is not installed, or cannot be loaded: {error}",
            "pip install 'penumbra-node[peers]' (it is compiled: a C++ compiler and cmake are needed), "
            "or, but for `bench tokens`, measure without it: --no-peers",
        ) from None
    return binding


def _load(gguf: Path, *, vocab_only: bool) -> tuple[Any, Any, Any]:
    """Return the binding, the log callback it must keep, and a loaded model."""
    binding = require_peer()
    # llama.cpp keeps the pointer to the log callback: without a reference here it would dangle.
    quiet = binding.llama_log_callback(lambda level, text, data: None)
    binding.llama_log_set(quiet, ctypes.c_void_p(0))
    binding.llama_backend_init()
    parameters = binding.llama_model_default_params()
    parameters.vocab_only = vocab_only
    model = binding.llama_model_load_from_file(str(gguf).encode(), parameters)
    if not model:
        raise PenumbraError(f"{gguf}: llama.cpp cannot load it", "check the file")
    return binding, quiet, model


class LlamaVocab:
    """The tokenizer of llama.cpp: the vocabulary of a GGUF without its weights.

    Parameters
    ----------
    gguf
        The file.

    Raises
    ------
    PenumbraError
        The extra `peers` is not installed, or llama.cpp cannot load the file.
    """

    def __init__(self, gguf: Path) -> None:
        self._c, self._quiet, self._model = _load(gguf, vocab_only=True)
        self._vocab = self._c.llama_model_get_vocab(self._model)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without `bos`; what looks like a control piece is text."""
        raw = text.encode()
        room = len(raw) + 1  # a token has a byte or more
        ids = (self._c.llama_token * room)()
        count = self._c.llama_tokenize(self._vocab, raw, len(raw), ids, room, False, False)
        if count < 0:
            raise RuntimeError(f"llama_tokenize returned {count}")
        return list(ids[:count])

    def piece(self, number: int, *, control: bool = False) -> bytes:
        """Return the bytes of an id; control pieces print nothing unless `control`."""
        room = PIECE_BYTES
        while True:
            text = ctypes.create_string_buffer(room)
            count = self._c.llama_token_to_piece(self._vocab, number, text, room, 0, control)
            if count >= 0:
                return text.raw[:count]
            room = -count

    def is_control(self, number: int) -> bool:
        """Whether llama.cpp takes the id for a control piece."""
        return bool(self._c.llama_vocab_is_control(self._vocab, number))

    def close(self) -> None:
        """Free the model."""
        self._c.llama_model_free(self._model)


class LlamaPeer:
    """One model in llama.cpp, and contexts of it.

    Parameters
    ----------
    gguf
        The file our image was built from.
    threads
        Threads that compute, in prefill and in steps.

    Raises
    ------
    PenumbraError
        The extra `peers` is not installed, or llama.cpp cannot load the file.
    """

    def __init__(self, gguf: Path, threads: int) -> None:
        self._c, self._quiet, self._model = _load(gguf, vocab_only=False)
        self.threads = threads
        self.vocab = int(self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self._model)))

    def context(self, sequences: int, positions: int, batch: int = PREFILL_BATCH) -> LlamaContext:
        """Return a context for so many sequences of so many positions each."""
        parameters = self._c.llama_context_default_params()
        parameters.n_ctx = positions * sequences
        parameters.n_batch = parameters.n_ubatch = batch
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = self.threads
        handle = self._c.llama_init_from_model(self._model, parameters)
        if not handle:
            raise PenumbraError(f"llama.cpp cannot make a context of {sequences} x {positions} positions")
        return LlamaContext(self._c, handle, self.vocab, batch)

    def close(self) -> None:
        """Free the model; its contexts must be closed before."""
        self._c.llama_model_free(self._model)


class LlamaContext:
    """KV cache and batch of one context: see `LlamaPeer.context`."""

    def __init__(self, binding: Any, handle: Any, vocab: int, batch: int) -> None:
        self._c, self._handle, self._vocab = binding, handle, vocab
        self._batch = binding.llama_batch_init(batch, 0, 1)
        self._limit = batch

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> list[int]:
        """Feed one token to each sequence 0, 1, ...; return the most probable next of each."""
        self._run(tokens, positions, range(len(tokens)), [True] * len(tokens))
        return [int(row.argmax()) for row in self._logits(len(tokens))]

    def prefill(self, tokens: Sequence[int], sequence: int = 0) -> int:
        """Feed a prompt to an empty sequence; return the most probable token after it."""
        for start in range(0, len(tokens), self._limit):
            chunk = tokens[start : start + self._limit]
            wanted = [start + number == len(tokens) - 1 for number in range(len(chunk))]
            self._run(chunk, range(start, start + len(chunk)), [sequence] * len(chunk), wanted)
        return int(self._logits(1)[0].argmax())

    def all_logits(self, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        """Feed some tokens of sequence 0 from a position on; return the logits after each of them.

        Shape ``(len(tokens), vocab)``: llama.cpp's memory, valid until the next run.
        """
        count = len(tokens)
        self._run(tokens, range(start, start + count), [0] * count, [True] * count)
        return self._logits(count)

    def clear(self) -> None:
        """Empty all sequences."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._handle), False)

    def close(self) -> None:
        """Free cache and batch."""
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._handle)

    def _run(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[bool],
    ) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for number, token in enumerate(tokens):
            batch.token[number] = token
            batch.pos[number] = positions[number]
            batch.n_seq_id[number] = 1
            batch.seq_id[number][0] = sequences[number]
            batch.logits[number] = wanted[number]
        code = self._c.llama_decode(self._handle, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        self._c.llama_synchronize(self._handle)

    def _logits(self, count: int) -> NDArray[np.float32]:
        pointer = self._c.llama_get_logits(self._handle)
        return np.ctypeslib.as_array(pointer, (count, self._vocab))
